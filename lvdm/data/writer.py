"""Write shards in video2dataset's layout: ``NNNNN.tar``, ``NNNNN.parquet`` and, last of all, ``NNNNN_stats.json``.

A shard is complete when its stats file exists. Each file appears whole or not at all (a rename on a file system, a
single put on an object store), and equal samples give equal tar bytes.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds

from lvdm.data.build_index import tell_index
from lvdm.storage import atomic_file, sha256_of

Status = str  # success, failed_to_download or failed_to_subsample, as video2dataset calls them


@dataclass(frozen=True)
class ShardSample:
    """One sample on its way into a shard."""

    key: str
    """Name of its members up to the first dot, unique in the set; foreign ones may have folders in front."""
    members: Mapping[str, bytes]
    """Bytes by extension, such as ``mp4`` and ``txt``; ``json`` is made from ``meta`` unless given."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Metadata: the ``.json`` member and the row of the parquet file."""
    status: Status = "success"
    """Anything but ``success`` keeps the sample out of the tar; the parquet and stats files list it."""
    error_message: str | None = None
    """Why it failed."""


@dataclass(frozen=True)
class FileDigest:
    """What tells whether a file is the one that was written."""

    size: int
    """Bytes."""
    sha256: str
    """In hex."""


@dataclass(frozen=True)
class ShardStats:
    """What ``NNNNN_stats.json`` says; the names are video2dataset's."""

    count: int
    successes: int
    failed_to_download: int
    failed_to_subsample: int
    duration: float
    """Seconds that writing took."""
    bytes_downloaded: int
    """Payload bytes in the tar."""
    start_time: float
    end_time: float
    status_dict: dict[str, int]
    """Samples by ``success`` or error message."""
    files: dict[str, FileDigest]
    """The tar and the parquet file, by extension."""


def sample_key(shard_id: int, index: int, samples_per_shard: int) -> str:
    """video2dataset's key of sample ``index`` in shard ``shard_id``: digits that sort as the samples do."""
    digits = len(str(max(samples_per_shard - 1, 1)))
    return f"{shard_id * 10**digits + index:0{digits + 5}d}"


def write_shard(folder: str, shard: int | str, samples: Iterable[ShardSample], *, tell: bool = False) -> ShardStats:
    """Write one shard, a number or a name without ``.tar``, into ``folder`` (any fsspec URL; made if missing).

    ``samples`` is consumed as a stream; only metadata is held in memory. If it raises, no file of the shard is left.

    Args:
        tell: whether what is in the shard is told to `build_index`, for sets too large to be read again.
    """
    start = time.time()
    rows: list[dict[str, Any]] = []
    statuses: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    payload = 0
    name = f"{folder.rstrip('/')}/{shard if isinstance(shard, str) else f'{shard:05d}'}"
    # fixed owner and time: equal samples give equal bytes
    how = {"encoder": False, "mtime": 0, "user": "lvdm", "group": "lvdm", "format": "PAX_FORMAT"}
    with atomic_file(f"{name}.tar") as path, open(path, "wb") as stream, wds.TarWriter(stream, **how) as tar:
        for sample in samples:
            *folders, base = sample.key.split("/")
            assert base, sample.key
            assert "." not in base, sample.key
            assert not {"", ".", ".."} & set(folders), sample.key
            row = {**sample.meta, "key": sample.key, "status": sample.status, "error_message": sample.error_message}
            rows.append(row)
            statuses[sample.status] += 1
            messages[sample.error_message or sample.status] += 1
            if sample.status == "success":
                members = {"json": json.dumps(row, indent=4, default=str).encode(), **sample.members}
                payload += sum(map(len, members.values()))
                tar.write({"__key__": sample.key, **members})
        tar.close()
        stream.flush()
        files = {"tar": _digest(path)}
        if tell:
            tell_index(folder, path)
    with atomic_file(f"{name}.parquet") as path:
        pq.write_table(_table(rows), path, row_group_size=100)
        files["parquet"] = _digest(path)
    end = time.time()
    stats = ShardStats(
        count=len(rows),
        successes=statuses["success"],
        failed_to_download=statuses["failed_to_download"],
        failed_to_subsample=statuses["failed_to_subsample"],
        duration=end - start,
        bytes_downloaded=payload,
        start_time=start,
        end_time=end,
        status_dict=dict(messages),
        files=files,
    )
    with atomic_file(f"{name}_stats.json") as path:
        Path(path).write_text(json.dumps(asdict(stats), indent=4), encoding="utf-8")
    return stats


def _digest(path: str) -> FileDigest:
    return FileDigest(os.path.getsize(path), sha256_of(path))


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as columns; nested values become JSON, and a column of mixed types becomes text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [_scalar(row.get(name)) for row in rows] for name in names}
    return pa.table({name: _column(values) for name, values in columns.items()})


def _scalar(value: Any) -> Any:
    return json.dumps(value, default=str) if isinstance(value, dict | list | tuple) else value


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])
