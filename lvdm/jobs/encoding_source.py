"""The shards of a source that are encoded one by one, and what tells whether one of them changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lvdm.config import ClipConfig, Condition, ShardSet
from lvdm.data.index import Part, ShardFile
from lvdm.data.one_pass import Item
from lvdm.data.sources import Source, open_sources
from lvdm.errors import UserError


@dataclass(frozen=True)
class EncodingSource:
    """A folder of indexed shards, with its selected rows by shard."""

    source: Source
    rows: dict[str, list[_Slice]]
    """Rows of the index by shard (its name without ``.tar``) and bucket; shards without any are absent."""

    @property
    def samples(self) -> int:
        """Selected samples."""
        return len(self.source.selection)

    def count(self, shard: str) -> int:
        """Selected samples of a shard."""
        return sum(map(len, self.rows[shard]))

    def batches(self, shard: str, size: int) -> list[list[Item]]:
        """The items of a shard in order, by bucket, in lists of up to ``size`` of one bucket."""
        return [
            [(bucket, rows[i]) for i in range(first, min(first + size, len(rows)))]
            for bucket, rows in enumerate(self.rows[shard])
            for first in range(0, len(rows), size)
        ]

    def digests(self) -> dict[str, str]:
        """By shard, what changes with its file, with those joined to it, or with the choice of its samples."""
        (part,) = self.source.index.parts
        joined = [{file.name: file for file in side.parts[0].shards} for side in self.source.joined]
        files = {file.name: file for file in part.shards}
        offsets = _Offsets(part)
        found = {}
        for shard, rows in self.rows.items():
            name = f"{shard}.tar"
            about = [_mark(file) for file in (files[name], *(side[name] for side in joined if name in side))]
            digest = hashlib.sha256(json.dumps(about).encode())
            for chosen in rows:
                digest.update(b"|")
                digest.update(offsets.of(chosen.numbers()).tobytes())
            found[shard] = digest.hexdigest()[:32]
        return found


def open_encoding_source(
    folder: str,
    sizes: Sequence[ClipConfig],
    where: Sequence[Condition] = (),
    join: Sequence[str] = (),
    check: bool = True,
) -> EncodingSource:
    """Open a folder for encoding.

    Args:
        sizes: sizes of clips that share the samples out.
        check: whether the shards are held against the index.
    Raises:
        UserError: as `lvdm.data.sources.open_sources`.
    """
    (source,) = open_sources([ShardSet(folders=(folder,), where=tuple(where), join=tuple(join))], sizes, check)
    starts = [(name.removesuffix(".tar"), first) for name, first, _ in source.index.shard_keys()]
    names = [name for name, _ in starts]
    if len(set(names)) < len(names):
        raise UserError(
            f"{folder}: the index lists a shard twice; build it with: python tools/index_shards.py {folder}"
        )
    bounds = np.array([*(first for _, first in starts), len(source.index)])
    cuts = [_cut(rows, bounds) for rows in source.selection.rows]
    found = {}
    for number, name in enumerate(names):
        mine = [
            _Slice(rows, int(cut[number]), int(cut[number + 1]))
            for rows, cut in zip(source.selection.rows, cuts, strict=True)
        ]
        if any(map(len, mine)):
            found[name] = mine
    return EncodingSource(source, found)


class _Slice(Sequence[int]):
    """Some neighbours of rows that stay where they are."""

    __slots__ = ("_first", "_last", "_rows")

    def __init__(self, rows: Sequence[int], first: int, last: int) -> None:
        self._rows, self._first, self._last = rows, first, last

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, place: int) -> int:  # type: ignore[override]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._rows[self._first + place]

    def numbers(self) -> np.ndarray:
        """The rows as one array."""
        if isinstance(self._rows, range):
            return np.arange(self._first, self._last)
        numbers: np.ndarray = getattr(self._rows, "array", np.asarray(self._rows))[self._first : self._last]
        return numbers


def _cut(rows: Sequence[int], bounds: np.ndarray) -> np.ndarray:
    """Where in ascending rows those of each shard begin."""
    if isinstance(rows, range):
        return bounds
    cut: np.ndarray = np.searchsorted(getattr(rows, "array", rows), bounds)
    return cut


def _mark(file: ShardFile) -> list[str | int]:
    return [file.name, file.size, file.ends, file.tag]


class _Offsets:
    """The first byte of each row of an index in its shard, as arrays over the mapped file."""

    def __init__(self, part: Part) -> None:
        self._batches = [batch.column("offset").to_numpy() for batch in part.batches]
        self._starts = np.array(part.starts, np.int64)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Those of ascending rows that lie close together, such as those of one shard."""
        if not len(rows):
            return np.zeros(0, np.int64)
        first, end = int(rows[0]), int(rows[-1]) + 1
        low, high = np.searchsorted(self._starts, [first, end - 1], side="right") - 1
        start = int(self._starts[low])
        near = self._batches[low] if low == high else np.concatenate(self._batches[low : high + 1])
        whole: np.ndarray = near[first - start : end - start]
        return whole[rows.astype(np.int64) - first] if len(whole) > len(rows) else whole
