"""Build the index of a folder of shards: in parallel, resumable, from local disk or any store.

Groups of shards are scanned by worker processes; what a group gave is kept in ``.index/`` in the folder under a name
that changes with its shards, so that a build that was stopped, or runs again after a few shards were added, scans only
what is new. At the end the groups are merged into ``index.arrow``, one at a time.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem

from lvdm.data.index import COLUMNS, INDEX_NAME, META, VERSION, ShardFile, ends_of, list_shards
from lvdm.data.tar_scan import scan_tar
from lvdm.errors import UserError
from lvdm.storage import atomic_file, locate

PARTS = ".index"
"""Folder of what a build has so far."""
_GROUP = 32  # shards of a group
_ROWS_PER_BATCH = 65536
_SAMPLED = 32  # members whose sizes decide how a remote shard is read
_STREAM_BLOCK = 8 << 20
_HEADER_BLOCK = 16 << 10
_SKIPPING_PAYS = 4 << 20  # bytes that are streamed in the time that one more request takes
_MOST_COLUMNS = 64
_LONGEST_TEXT = 64  # characters of a metadata value that is worth a column
_NO_COLUMN = {"key", "caption", "url", "status", "error_message"}
_VIDEO_COLUMNS = {"width": "width", "height": "height", "nb_frames": "frames", "duration": "duration"}


@dataclass(frozen=True)
class Built:
    """What a build made."""

    samples: int
    shards: int
    left_out: dict[str, int]
    """Members and samples that are no samples of the set, by reason."""


def build_index(
    folder: str,
    *,
    workers: int = 1,
    exclude: Mapping[str, frozenset[str]] = MappingProxyType({}),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Index all ``*.tar`` of a folder (any fsspec URL). Only headers and ``.json`` members are read.

    Samples that their ``.json`` records as failed are left out, and those of ``exclude``: keys by URL of the shard.

    Raises:
        UserError: no shard in the folder, a shard that is no whole tar, or a folder that cannot be written.
    """
    folder = folder.rstrip("/")
    shards = list_shards(folder)
    if not shards:
        raise UserError(f"{folder} holds no shards (*.tar)")
    here = locate(folder)[1]
    excluded = {locate(url)[1].removeprefix(f"{here}/"): keys for url, keys in exclude.items()}
    groups = [shards[i : i + _GROUP] for i in range(0, len(shards), _GROUP)]
    paths = [f"{folder}/{PARTS}/{_name(group, excluded)}.arrow" for group in groups]
    fs, root = locate(f"{folder}/{PARTS}")
    there = {path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)} if fs.isdir(root) else set()
    missing = [i for i, path in enumerate(paths) if path.rsplit("/", 1)[-1] not in there]
    done = len(shards) - sum(len(groups[i]) for i in missing)
    progress(done, len(shards))
    for i in _each(folder, missing, groups, paths, excluded, workers):
        done += len(groups[i])
        progress(done, len(shards))
    built = _merge(folder, shards, paths)
    fs.rm(root, recursive=True)
    return built


def read_exclusions(path: Path) -> dict[str, frozenset[str]]:
    """Keys to leave out by shard, from a JSONL such as a run's ``replaced.jsonl``. Raises `UserError`."""
    found: dict[str, set[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            shard, key = str(entry["shard"]), str(entry["key"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} is no object with shard and key") from None
        found.setdefault(shard, set()).add(key)
    return {shard: frozenset(keys) for shard, keys in found.items()}


def _each(
    folder: str,
    missing: Sequence[int],
    groups: Sequence[Sequence[ShardFile]],
    paths: Sequence[str],
    exclude: Mapping[str, frozenset[str]],
    workers: int,
) -> Iterator[int]:
    """Scan the missing groups, yielding each one's number when its file is written."""
    if workers <= 1 or len(missing) <= 1:
        for i in missing:
            _scan_group(folder, groups[i], paths[i], _of(groups[i], exclude))
            yield i
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context) as pool:
        tasks = {pool.submit(_scan_group, folder, groups[i], paths[i], _of(groups[i], exclude)): i for i in missing}
        try:
            for task in as_completed(tasks):
                task.result()
                yield tasks[task]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _of(group: Sequence[ShardFile], exclude: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    return {shard.name: exclude[shard.name] for shard in group if shard.name in exclude}


def _name(group: Sequence[ShardFile], exclude: Mapping[str, frozenset[str]]) -> str:
    about = [[shard.name, shard.size, shard.tag, sorted(exclude.get(shard.name, ()))] for shard in group]
    return hashlib.sha256(json.dumps([VERSION, about]).encode()).hexdigest()[:32]


def _scan_group(folder: str, group: Sequence[ShardFile], path: str, exclude: Mapping[str, frozenset[str]]) -> None:
    """Write the rows of a group, whose ``shard`` counts within the group, with what its shards are and left out."""
    rows: list[dict[str, Any]] = []
    extensions: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    shards = []
    for number, shard in enumerate(group):
        url = f"{folder}/{shard.name}"
        fs, place = locate(url)
        local = isinstance(fs, LocalFileSystem)
        how = {} if local else {"cache_type": "readahead", "block_size": _block_size(url, shard)}
        excluded = exclude.get(shard.name, frozenset())
        with fs.open(place, "rb", **how) as stream:
            for sample in scan_tar(stream, url, shard.size, left_out):
                if sample.meta.get("status", "success") != "success":
                    left_out["recorded as failed"] += 1
                elif sample.key in excluded:
                    left_out["excluded"] += 1
                else:
                    members = [
                        {"extension": extensions.setdefault(name, len(extensions)), "offset": offset, "size": size}
                        for name, (offset, size) in sample.members.items()
                    ]
                    row = {"shard": number, "key": sample.key, "offset": sample.offset, "size": sample.size}
                    rows.append(row | {"members": members} | _meta(sample.meta))
        shards.append(asdict(replace(shard, ends=ends_of(place)) if local else shard))
    names = Counter(name for row in rows for name in row if name.startswith(META))
    kept = sorted(name for name, _ in names.most_common(_MOST_COLUMNS))
    arrays = [pa.array([row[name] for row in rows], kind) for name, kind in COLUMNS.items()]
    arrays += [_column([row.get(name) for row in rows]) for name in kept]
    about = {"shards": shards, "extensions": list(extensions), "left_out": dict(left_out)}
    table = pa.Table.from_arrays(arrays, names=[*COLUMNS, *kept])
    table = table.replace_schema_metadata({"lvdm": json.dumps(about)})
    with atomic_file(path) as target, pa.ipc.new_file(target, table.schema) as writer:
        writer.write_table(table)


def _block_size(url: str, shard: ShardFile) -> int:
    """How a remote shard is read: from header to header where its members are large, else as a stream."""
    fs, place = locate(url)
    sizes = []
    with fs.open(place, "rb", cache_type="readahead", block_size=_STREAM_BLOCK) as stream:
        for sample in scan_tar(stream, url, shard.size, Counter()):
            sizes += [size for _, size in sample.members.values()]
            if len(sizes) >= _SAMPLED or stream.tell() > 4 * _STREAM_BLOCK:
                break
    large = sizes and sum(sizes) / len(sizes) > _SKIPPING_PAYS
    return _HEADER_BLOCK if large else _STREAM_BLOCK


def _merge(folder: str, shards: Sequence[ShardFile], paths: Sequence[str]) -> Built:
    """Write ``index.arrow`` out of the groups' files, holding one of them at a time."""
    extensions: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    files: list[dict[str, Any]] = []
    kinds: dict[str, set[pa.DataType]] = {}
    seen: Counter[str] = Counter()
    for path in paths:
        table = _read_part(path)
        about = json.loads(table.schema.metadata[b"lvdm"])
        for extension in about["extensions"]:
            extensions.setdefault(extension, len(extensions))
        left_out.update(about["left_out"])
        files += about["shards"]
        for column in table.schema:
            if column.name.startswith(META):
                kinds.setdefault(column.name, set()).add(column.type)
                seen[column.name] += table.num_rows
    kept = sorted(name for name, _ in seen.most_common(_MOST_COLUMNS))
    fields = [pa.field(name, kind) for name, kind in COLUMNS.items()]
    fields += [pa.field(name, _common(kinds[name])) for name in kept]
    about = {"version": VERSION, "shards": files, "extensions": list(extensions), "left_out": dict(left_out)}
    schema = pa.schema(fields, metadata={"lvdm": json.dumps(about)})
    rows = 0
    with atomic_file(f"{folder}/{INDEX_NAME}") as target, pa.ipc.new_file(target, schema) as writer:
        for number, path in enumerate(paths):
            table = _read_part(path)
            own = json.loads(table.schema.metadata[b"lvdm"])["extensions"]
            writer.write_table(
                _conform(table, schema, number * _GROUP, [extensions[name] for name in own]),
                max_chunksize=_ROWS_PER_BATCH,
            )
            rows += table.num_rows
    return Built(rows, len(shards), dict(left_out))


def _read_part(path: str) -> pa.Table:
    fs, place = locate(path)
    return pa.ipc.open_file(pa.BufferReader(fs.cat_file(place))).read_all()


def _conform(table: pa.Table, schema: pa.Schema, first_shard: int, extensions: Sequence[int]) -> pa.Table:
    """A group's rows with the shards, extensions and columns of the whole set."""
    table = table.combine_chunks()
    arrays = []
    for column in schema:
        if column.name == "shard":
            arrays.append(pc.add(table["shard"], pa.scalar(first_shard, pa.int32())))
        elif column.name == "members":
            arrays.append(_renumbered(table["members"], extensions))
        elif column.name in table.schema.names:
            arrays.append(table[column.name].cast(column.type))
        else:
            arrays.append(pa.nulls(table.num_rows, column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _renumbered(members: pa.ChunkedArray, extensions: Sequence[int]) -> pa.Array:
    lists = pa.concat_arrays(members.chunks) if members.num_chunks else pa.array([], members.type)
    inner = lists.values
    numbers = (
        pa.array(extensions, pa.int16()).take(inner.field("extension")) if extensions else inner.field("extension")
    )
    fields = [numbers, inner.field("offset"), inner.field("size")]
    return pa.ListArray.from_arrays(lists.offsets, pa.StructArray.from_arrays(fields, fields=list(inner.type)))


def _meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Columns out of a ``.json``: its numbers, booleans and short texts, and what ffprobe says of the first video."""
    found = {
        f"{META}{name}": value
        for name, value in meta.items()
        if name not in _NO_COLUMN and len(name) <= _LONGEST_TEXT and _is_scalar(value)
    }
    try:
        streams = meta["video_metadata"]["streams"]
        video = next(stream for stream in streams if stream.get("codec_type", "video") == "video")
    except (KeyError, TypeError, AttributeError, StopIteration):
        return found
    for theirs, ours in _VIDEO_COLUMNS.items():
        number = _number(video.get(theirs))
        if number is not None:
            found.setdefault(f"{META}{ours}", number)
    rate = _number(video.get("r_frame_rate"))
    if rate is not None:
        found.setdefault(f"{META}fps", rate)
    return found


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT
    return isinstance(value, bool) or (isinstance(value, int | float) and abs(value) < 2**53 and value == value)


def _number(value: Any) -> float | None:
    try:
        number = float(Fraction(str(value)))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if 0 < number < 2**53 else None


def _column(values: Sequence[Any]) -> pa.Array:
    """Numbers as float64, booleans as they are; as text where the kinds are mixed."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _common(kinds: set[pa.DataType]) -> pa.DataType:
    return next(iter(kinds)) if len(kinds) == 1 else pa.string()
