"""The index of a shard folder, ``index.arrow``: where each sample's bytes lie, so that a sample is one ranged read.

Arrow IPC, one row a sample in tar order, memory-mapped (a remote one through a copy in the node's cache):

==============  ========================================================================================
shard           int32, row of the shard in the schema's metadata
key             text before the first dot of the members' names
offset, size    the contiguous byte range of the shard file that holds all members of the sample
members         list of (extension: int16 into the schema's metadata, offset, size), absolute in the shard
meta.NAME …     what the samples' ``.json`` say: a column a name, of numbers, texts or booleans, null where absent
==============  ========================================================================================

The schema's metadata holds one JSON under ``lvdm``: format version, shards (name, size, tag), extensions, how many
members and samples were left out, by reason, and which shards are damaged. ``lvdm.data.build_index`` writes it.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from lvdm.errors import UserError
from lvdm.storage import Missing, cached_copy, locate, persistently, version_tag

INDEX_NAME = "index.arrow"
VERSION = 3
META = "meta."
"""Before the names of metadata columns."""
BUILD = "build it with: python tools/index_shards.py"
_ENDS = 1 << 16  # bytes at both ends of a local shard that tell whether it is the one indexed
MEMBER = pa.struct([("extension", pa.int16()), ("offset", pa.int64()), ("size", pa.int64())])
COLUMNS = {
    "shard": pa.int32(),
    "key": pa.string(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "members": pa.list_(MEMBER),
}
"""The columns that every index has."""


@dataclass(frozen=True)
class ShardFile:
    """A shard as it was when it was indexed."""

    name: str
    size: int
    tag: str
    """What its store says changes with its content, such as ``etag:5f3a``, or a time; empty if it says nothing."""
    ends: int = 0
    """CRC-32 of both ends of a local shard, which tells a copied one from a changed one; 0 elsewhere."""


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
    meta: dict[str, Any] = field(default_factory=dict)
    """Metadata that the index knows; unknown values are absent."""
    tag: str = ""
    """`ShardFile.tag` of the shard."""

    def part(self, extension: str) -> SampleRecord:
        """One member alone, for who does not want the whole sample."""
        offset, size = self.members[extension]
        return replace(self, offset=offset, size=size, members={extension: (offset, size)})


@dataclass(frozen=True)
class Part:
    """The index of one folder."""

    folder: str
    shards: list[ShardFile]
    extensions: list[str]
    left_out: dict[str, int]
    """Members and samples that the index leaves out, by reason."""
    damaged: dict[str, str]
    """What was wrong with shards that could not be read to their ends, by name."""
    batches: list[pa.RecordBatch]
    starts: list[int]
    """Row at which each batch starts, counted in this folder."""
    rows: int
    mark: str
    """Changes with the index file: what is computed from it can be kept under this name."""
    path: Path
    """The local file that is mapped."""

    def batch_of(self, row: int) -> tuple[pa.RecordBatch, int]:
        """The batch that holds a row, and the row's place in it."""
        batch = bisect.bisect_right(self.starts, row) - 1
        return self.batches[batch], row - self.starts[batch]

    def keys(self, first: int, last: int) -> pa.Array:
        """The keys of rows ``first`` to ``last``, exclusive."""
        pieces = []
        while first < last:
            batch, place = self.batch_of(first)
            piece = batch.column("key").slice(place, last - first)
            pieces.append(piece)
            first += len(piece)
        return pa.concat_arrays(pieces)


class Index:
    """The samples of one or more indexed folders, as one concatenated set with random access."""

    def __init__(self, folders: Sequence[str], parts: Sequence[Part]) -> None:
        self.folders = tuple(folders)
        self.parts = tuple(parts)
        self._files = [(part.path, part.mark) for part in parts]
        self._starts = [sum(part.rows for part in parts[:i]) for i in range(len(parts))]
        self._rows = sum(part.rows for part in parts)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> SampleRecord:
        if not 0 <= row < self._rows:
            raise IndexError(row)
        which = bisect.bisect_right(self._starts, row) - 1
        part = self.parts[which]
        batch, place = part.batch_of(row - self._starts[which])
        values = batch.slice(place, 1).to_pylist()[0]
        shard = part.shards[values["shard"]]
        return SampleRecord(
            shard=f"{part.folder}/{shard.name}",
            key=values["key"],
            offset=values["offset"],
            size=values["size"],
            members={part.extensions[m["extension"]]: (m["offset"], m["size"]) for m in values["members"]},
            meta={
                name.removeprefix(META): value
                for name, value in values.items()
                if name.startswith(META) and value is not None
            },
            tag=shard.tag,
        )

    @property
    def shards(self) -> list[str]:
        """URLs of all shards."""
        return [f"{part.folder}/{shard.name}" for part in self.parts for shard in part.shards]

    @property
    def mark(self) -> str:
        """Changes with any of the index files."""
        return "-".join(part.mark for part in self.parts)

    def columns(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Batches with some columns in the order of rows; a column that a folder's index lacks is all null there."""
        for part in self.parts:
            for batch in part.batches:
                there = batch.schema.names
                arrays = [batch.column(name) if name in there else pa.nulls(batch.num_rows) for name in names]
                yield pa.RecordBatch.from_arrays(arrays, names=list(names))

    def shard_keys(self) -> Iterator[tuple[str, int, Callable[[], pa.Array]]]:
        """Name and first row of each shard that has samples, and a call that gives the keys of its rows."""
        for part, start in zip(self.parts, self._starts, strict=True):
            if not part.rows:
                continue
            shards = np.concatenate([batch.column("shard").to_numpy() for batch in part.batches])
            firsts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist()]
            for first, last in itertools.pairwise([*firsts, part.rows]):
                name = part.shards[int(shards[first])].name
                yield name, start + first, functools.partial(part.keys, first, last)

    def types(self) -> dict[str, list[pa.DataType]]:
        """The types that each metadata column has in the folders that have it."""
        found: dict[str, list[pa.DataType]] = {}
        for part in self.parts:
            for column in part.batches[0].schema if part.batches else ():
                if column.name.startswith(META):
                    found.setdefault(column.name.removeprefix(META), []).append(column.type)
        return found

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """The index of each folder. Raises `UserError` in a worker if a file is another one than the run began with."""
        parts = []
        for folder, (path, mark) in zip(self.folders, self._files, strict=True):
            part = _map(folder.rstrip("/"), path) if path.is_file() else None
            if part is None or part.mark != mark:
                raise UserError(f"the index of {folder} changed while the run reads it; start the run again")
            parts.append(part)
        return tuple(parts)

    def __getstate__(self) -> dict[str, Any]:
        # a worker maps the same files again instead of receiving their rows through a pipe
        return {name: value for name, value in vars(self).items() if name != "parts"}


def open_index(folders: Sequence[str], check: bool = True) -> Index:
    """Open the indexes of ``folders`` (any fsspec URLs) as one set.

    Args:
        check: whether the shards are held against the index; one rank does that for all.
    Raises:
        UserError: a folder or its index is missing or empty, or a shard is missing or not the one that was indexed.
        Requeue: the store does not answer.
    """
    index = Index(folders, [_open_part(folder.rstrip("/")) for folder in folders])
    if check:
        for part in index.parts:
            _check_shards(part)
    if not len(index):
        raise UserError(f"no samples in {', '.join(folders)}: the shard set is empty")
    return index


def list_shards(folder: str) -> list[ShardFile]:
    """The ``*.tar`` of a folder in the order of their names, without their ends. Raises `UserError` and `Requeue`."""
    local = isinstance(locate(folder)[0], LocalFileSystem)
    try:
        found = persistently(folder, _list_local) if local else _list_remote(folder)
    except Missing:
        raise UserError(f"no such folder: {folder}") from None
    return sorted(found, key=lambda shard: shard.name)


def ends_of(path: str | Path) -> int:
    """CRC-32 of both ends of a local file."""
    with open(path, "rb") as file:
        start = file.read(_ENDS)
        file.seek(max(os.fstat(file.fileno()).st_size - _ENDS, 0))
        return zlib.crc32(file.read(_ENDS), zlib.crc32(start))


def _list_local(_: AbstractFileSystem, root: str) -> list[ShardFile]:
    with os.scandir(root) as entries:
        return [
            ShardFile(entry.name, stat.st_size, f"mtime_ns:{stat.st_mtime_ns}")
            for entry in entries
            if entry.name.endswith(".tar") and entry.is_file() and (stat := entry.stat())
        ]


def _list_remote(folder: str) -> list[ShardFile]:
    found = []
    for entry in persistently(folder, lambda fs, root: list(fs.ls(root, detail=True))):
        place = entry["name"]
        name = place.rstrip("/").rsplit("/", 1)[-1]
        if not name.endswith(".tar") or entry.get("type") == "directory":
            continue
        if entry.get("size") is None:  # a plain web server's listing tells no sizes
            entry = persistently(f"{folder.rstrip('/')}/{name}", functools.partial(_info, place))
            if entry.get("size") is None:
                raise UserError(f"the store does not say how many bytes {place} has")
        found.append(ShardFile(name, int(entry["size"]), version_tag(entry)))
    return found


def _info(place: str, fs: AbstractFileSystem, _: str) -> dict[str, Any]:
    return dict(fs.info(place))


def _open_part(folder: str) -> Part:
    """The index of a folder, a remote one through a copy."""
    fs, root = locate(folder)
    try:
        local = isinstance(fs, LocalFileSystem)
        return _map(folder, Path(root) / INDEX_NAME if local else cached_copy(f"{folder}/{INDEX_NAME}"))
    except (Missing, FileNotFoundError, NotADirectoryError):
        try:
            persistently(folder, lambda fs, path: fs.ls(path, detail=False))
        except Missing:
            raise UserError(f"no such folder of shards: {folder}") from None
        raise UserError(f"{folder} has no {INDEX_NAME}; {BUILD} {folder}") from None


def _map(folder: str, path: Path) -> Part:
    """The index of a folder out of a local file."""
    try:
        stat = path.stat()
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        about = json.loads(reader.schema.metadata[b"lvdm"])
        given = dict(zip(reader.schema.names, reader.schema.types, strict=True))
        if about["version"] != VERSION or {name: given.get(name) for name in COLUMNS} != COLUMNS:
            raise UserError(f"{folder}/{INDEX_NAME} has another format than this lvdm reads; {BUILD} {folder}")
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        shards = [ShardFile(**shard) for shard in about["shards"]]
        extensions, left_out, damaged = list(about["extensions"]), dict(about["left_out"]), dict(about["damaged"])
    except (pa.ArrowInvalid, KeyError, TypeError, json.JSONDecodeError):
        raise UserError(f"{folder}/{INDEX_NAME} is damaged; {BUILD} {folder}") from None
    starts, rows = [], 0
    for batch in batches:
        starts.append(rows)
        rows += batch.num_rows
    mark = f"{zlib.crc32(folder.encode()):08x}{stat.st_size:x}{stat.st_mtime_ns:x}"
    return Part(folder, shards, extensions, left_out, damaged, batches, starts, rows, mark, path)


def _check_shards(part: Part) -> None:
    """One listing of the folder tells a missing or changed shard."""
    listed = {shard.name: shard for shard in list_shards(part.folder)}
    fs, root = locate(part.folder)
    for shard in part.shards:
        url = f"{part.folder}/{shard.name}"
        found = listed.get(shard.name)
        if found is None:
            raise UserError(f"shard {url} is missing; put it back, or {BUILD} {part.folder}")
        if found.size != shard.size:
            raise UserError(
                f"shard {url} has {found.size} bytes, but {shard.size} when it was indexed; {BUILD} {part.folder}"
            )
        # shards that were copied from another kind of store have tags of another kind: their sizes must do
        if found.tag == shard.tag or found.tag.partition(":")[0] != shard.tag.partition(":")[0]:
            continue
        # a copied folder has times of its own, and the same bytes
        if isinstance(fs, LocalFileSystem) and shard.ends and ends_of(f"{root}/{shard.name}") == shard.ends:
            continue
        raise UserError(f"shard {url} was changed after it was indexed; {BUILD} {part.folder}")
