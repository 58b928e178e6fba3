"""The index of a shard folder, ``index.arrow``: where each sample's bytes lie, so that a sample is one ranged read.

Arrow IPC, one row a sample in tar order, memory-mapped when local:

==============  ========================================================================================
shard           int32, row of the shard in the schema's metadata
key             text before the first dot of the members' names
offset, size    the contiguous byte range of the shard file that holds all members of the sample
members         list of (extension: int16 into the schema's metadata, offset, size), absolute in the shard
width … duration  metadata where the sample's ``.json`` tells it, else null
==============  ========================================================================================

The schema's metadata holds one JSON under ``lvdm``: format version, shards (name, size), extensions, and how many
samples were left out because whoever wrote the shards recorded them as failed.
"""

from __future__ import annotations

import bisect
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from lvdm.errors import UserError
from lvdm.storage import atomic_file, locate

INDEX_NAME = "index.arrow"
_VERSION = 1
_BUILD = "build it with: python tools/index_shards.py"
_ROWS_PER_BATCH = 65536
_JSON_LIMIT = 1 << 20  # metadata beyond this is not worth reading
_META = {
    "width": pa.int32(),
    "height": pa.int32(),
    "fps": pa.float64(),
    "frames": pa.int64(),
    "duration": pa.float64(),
}
_MEMBER = pa.struct([("extension", pa.int16()), ("offset", pa.int64()), ("size", pa.int64())])
_COLUMNS = {
    "shard": pa.int32(),
    "key": pa.string(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "members": pa.list_(_MEMBER),
    **_META,
}


@dataclass(frozen=True)
class SampleRecord:
    """Where one sample lies."""

    shard: str
    """URL of the shard."""
    key: str
    """Key in the shard."""
    offset: int
    """First byte of the sample's range."""
    size: int
    """Bytes of the range."""
    members: dict[str, tuple[int, int]]
    """Offset in the shard and size of each member, by extension."""
    meta: dict[str, Any]
    """Metadata that the index knows; unknown values are absent."""


@dataclass(frozen=True)
class _Part:
    """The index of one folder."""

    folder: str
    shards: list[str]
    sizes: list[int]
    extensions: list[str]
    batches: list[pa.RecordBatch]
    starts: list[int]
    """Row at which each batch starts, counted in this folder."""
    rows: int


class Index:
    """The samples of one or more indexed folders, as one concatenated set with random access."""

    def __init__(self, folders: Sequence[str], parts: Sequence[_Part]) -> None:
        self.folders = tuple(folders)
        self._parts = tuple(parts)
        self._starts = [sum(part.rows for part in parts[:i]) for i in range(len(parts))]
        self._rows = sum(part.rows for part in parts)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> SampleRecord:
        if not 0 <= row < self._rows:
            raise IndexError(row)
        which = bisect.bisect_right(self._starts, row) - 1
        part = self._parts[which]
        row -= self._starts[which]
        batch = bisect.bisect_right(part.starts, row) - 1
        values = part.batches[batch].slice(row - part.starts[batch], 1).to_pylist()[0]
        return SampleRecord(
            shard=f"{part.folder}/{part.shards[values['shard']]}",
            key=values["key"],
            offset=values["offset"],
            size=values["size"],
            members={part.extensions[m["extension"]]: (m["offset"], m["size"]) for m in values["members"]},
            meta={name: values[name] for name in _META if values[name] is not None},
        )

    @property
    def shards(self) -> list[str]:
        """URLs of all shards."""
        return [f"{part.folder}/{name}" for part in self._parts for name in part.shards]

    def __reduce__(self) -> tuple[Callable[[tuple[str, ...]], Index], tuple[tuple[str, ...]]]:
        # a worker maps the same file again instead of receiving its rows through a pipe
        return _open_unchecked, (self.folders,)


def open_index(folders: Sequence[str]) -> Index:
    """Open the indexes of ``folders`` (any fsspec URLs) as one set.

    Raises:
        UserError: a folder or its index is missing or empty, or a shard is missing or of another size than indexed.
    """
    index = _open_unchecked(tuple(folders))
    for part in index._parts:
        _check_shards(part)
    if not len(index):
        raise UserError(f"no samples in {', '.join(folders)}: the shard set is empty")
    return index


def write_index(folder: str) -> int:
    """Index all ``*.tar`` in ``folder`` (any fsspec URL) and write ``index.arrow``; returns the number of samples.

    Only tar headers and ``.json`` members are read. Samples that their ``.json`` records as failed are left out.

    Raises:
        UserError: no shard in the folder, or a shard that is not a tar.
    """
    folder = folder.rstrip("/")
    fs, root = locate(folder)
    if not fs.isdir(root):
        raise UserError(f"no such folder: {folder}")
    paths = sorted(path for path in fs.ls(root, detail=False) if path.endswith(".tar"))
    if not paths:
        raise UserError(f"{folder} holds no shards (*.tar)")
    extensions: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    shards: list[dict[str, Any]] = []
    failed = 0
    for number, path in enumerate(paths):
        name = path.rsplit("/", 1)[-1]
        with fs.open(path, "rb") as stream:
            for sample in _scan(stream, f"{folder}/{name}"):
                if sample.meta.get("status", "success") != "success":
                    failed += 1
                    continue
                members = [
                    {"extension": extensions.setdefault(extension, len(extensions)), "offset": offset, "size": size}
                    for extension, (offset, size) in sample.members.items()
                ]
                rows.append(
                    {
                        "shard": number,
                        "key": sample.key,
                        "offset": sample.offset,
                        "size": sample.size,
                        "members": members,
                    }
                    | _known_meta(sample.meta)
                )
        shards.append({"name": name, "size": fs.size(path)})
    about = {"version": _VERSION, "shards": shards, "extensions": list(extensions), "left_out_as_failed": failed}
    schema = pa.schema(_COLUMNS, metadata={"lvdm": json.dumps(about)})
    table = pa.Table.from_pylist(rows, schema=schema)
    with atomic_file(f"{folder}/{INDEX_NAME}") as target, pa.ipc.new_file(target, schema) as writer:
        writer.write_table(table, max_chunksize=_ROWS_PER_BATCH)
    return len(rows)


def _open_unchecked(folders: tuple[str, ...]) -> Index:
    return Index(folders, [_open_part(folder.rstrip("/")) for folder in folders])


def _open_part(folder: str) -> _Part:
    fs, root = locate(folder)
    path = f"{root}/{INDEX_NAME}"
    try:
        local = isinstance(fs, LocalFileSystem)
        source = pa.memory_map(path) if local else pa.BufferReader(fs.cat_file(path))
        reader = pa.ipc.open_file(source)
        about = json.loads(reader.schema.metadata[b"lvdm"])
        if about["version"] != _VERSION or dict(zip(reader.schema.names, reader.schema.types, strict=True)) != _COLUMNS:
            raise UserError(f"{folder}/{INDEX_NAME} has another format than this lvdm reads; {_BUILD} {folder}")
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except FileNotFoundError:
        if not fs.exists(root):
            raise UserError(f"no such folder of shards: {folder}") from None
        raise UserError(f"{folder} has no {INDEX_NAME}; {_BUILD} {folder}") from None
    except (pa.ArrowInvalid, KeyError, TypeError, json.JSONDecodeError):
        raise UserError(f"{folder}/{INDEX_NAME} is damaged; {_BUILD} {folder}") from None
    starts = [sum(batch.num_rows for batch in batches[:i]) for i in range(len(batches))]
    return _Part(
        folder=folder,
        shards=[shard["name"] for shard in about["shards"]],
        sizes=[shard["size"] for shard in about["shards"]],
        extensions=about["extensions"],
        batches=batches,
        starts=starts,
        rows=sum(batch.num_rows for batch in batches),
    )


def _check_shards(part: _Part) -> None:
    """One listing of the folder tells a missing or changed shard; stores that list no sizes are asked one by one."""
    fs, root = locate(part.folder)
    try:
        entries = fs.ls(root, detail=True)
    except (OSError, NotImplementedError):
        entries = []
    listed = {entry["name"].rsplit("/", 1)[-1]: entry.get("size") for entry in entries}
    for name, size in zip(part.shards, part.sizes, strict=True):
        url = f"{part.folder}/{name}"
        try:
            found = listed.get(name)
            found = fs.size(f"{root}/{name}") if found is None else found
        except FileNotFoundError:
            raise UserError(f"shard {url} is missing; put it back, or {_BUILD} {part.folder}") from None
        if found is not None and found != size:
            raise UserError(f"shard {url} has {found} bytes, but {size} when it was indexed; {_BUILD} {part.folder}")


@dataclass
class _Scanned:
    key: str
    offset: int
    size: int
    members: dict[str, tuple[int, int]]
    meta: dict[str, Any]


def _scan(stream: Any, url: str) -> Iterator[_Scanned]:
    """The samples of one tar: neighbouring files whose names agree up to the first dot of the base name."""
    current: _Scanned | None = None
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                leaves_the_tar = ".." in folder.split("/") or member.name.startswith("/")
                if leaves_the_tar or not (member.isreg() and stem and dot):
                    continue
                key = folder + slash + stem
                if current is None or key != current.key:
                    if current is not None:
                        yield current
                    current = _Scanned(key, member.offset, 0, {}, {})
                extension = extension.lower()
                current.members[extension] = (member.offset_data, member.size)
                current.size = member.offset_data + member.size - current.offset
                if extension == "json" and member.size <= _JSON_LIMIT:
                    file = tar.extractfile(member)
                    assert file is not None
                    current.meta = _json_object(file.read())
    except tarfile.TarError as error:
        raise UserError(
            f"shard {url} is not a whole tar file ({error}); replace it, or remove it and index again"
        ) from None
    if current is not None:
        yield current


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _known_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """The columns of the index out of a ``.json`` member; what is absent or of a wrong type is null."""
    known: dict[str, Any] = dict.fromkeys(_META)
    for name, kind in _META.items():
        value = meta.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31:
            known[name] = float(value) if pa.types.is_floating(kind) else int(value)
    return known
