"""Reading a checkpoint by parameter and range, from any number of ranks' files; every byte is verified before use."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from lvdm.checkpoint import manifest as manifests
from lvdm.checkpoint.blocks import BlockFile, Damaged, check_sizes, read_plain_file
from lvdm.checkpoint.manifest import MODEL, Network
from lvdm.checkpoint.pieces import ELEMENT, FROZEN, KINDS, read_pieces
from lvdm.errors import UserError

STEP_NAME = re.compile(r"step-([0-9]{8,18})")
_MOST_OPEN = 64  # files at a time, each with a block in memory


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name; None if it is no such name."""
    match = STEP_NAME.fullmatch(name)
    return int(match[1]) if match and name == step_name(int(match[1])) else None


def step_name(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:08d}"


class Near(NamedTuple):
    """A reader among others: it will mostly find its share in the files of like-placed writers."""

    rank: int
    world: int


_ALONE = Near(0, 1)


class _Held(NamedTuple):
    """Elements ``[start, stop)`` of a parameter, and the file and byte at which they begin."""

    start: int
    stop: int
    offset: int
    file: int


class _Pieces:
    """Where the elements of one kind of one parameter lie. As numbers: thousands of ranks make millions of pieces."""

    def __init__(self) -> None:
        self._columns = tuple(array("q") for _ in _Held._fields)

    def add(self, held: tuple[int, int, int, int]) -> bool:
        """Take in a piece, by the fields of `_Held`; False, and nothing, if it overlaps another."""
        starts, stops, *_ = self._columns
        at = bisect_right(starts, held[0])
        if (at and stops[at - 1] > held[0]) or (at < len(starts) and starts[at] < held[1]):
            return False
        for column, value in zip(self._columns, held):  # noqa: B905 (a million times)
            column.insert(at, value)
        return True

    def holding(self, element: int) -> _Held | None:
        """The piece with this element."""
        at = bisect_right(self._columns[0], element) - 1
        if at < 0 or element >= self._columns[1][at]:
            return None
        return _Held(*(column[at] for column in self._columns))

    def gap(self, size: int) -> int | None:
        """The first of ``size`` elements that is missing."""
        upto = 0
        while upto < size:
            held = self.holding(upto)
            if held is None:
                return upto
            upto = held.stop
        return None


class Checkpoint:
    """A complete checkpoint, opened for reading by network, kind, parameter and range.

    Opening reads the manifest and looks at the sizes of the files. Files are opened as they are needed, and of each
    only the blocks that hold what is asked for are read. Memory: a block of each of the `_MOST_OPEN` files used last.
    """

    def __init__(self, location: str | Path, near: Near = _ALONE) -> None:
        """Raises `Damaged` unless there is a sealed manifest and every file it lists has its size."""
        self.location = str(location).rstrip("/")
        """Folder or fsspec URL."""
        where = f"{self.location}/{manifests.NAME}"
        self.manifest = manifests.unseal(read_plain_file(where, manifests.LIMIT), where)
        if STEP_NAME.fullmatch(self.name) and step_of(self.name) != self.manifest.step:
            raise Damaged(f"{where} is of step {self.manifest.step}: it belongs into another folder")
        self._sizes = dict(_sizes(self.manifest.networks))
        self._frozen = {key[1:] for key in self._sizes if key[0] == FROZEN}
        sizes = {name: entry.size for name, entry in sorted(self.manifest.files.items())}
        needed, there = sum(self._sizes.values()) * ELEMENT, sum(sizes.values())
        if needed > there:  # so that nobody allots memory for what cannot be there
            raise Damaged(f"{where} lists files of {there} bytes for {needed} bytes of state")
        check_sizes(self.location, sizes)
        self._files = [
            BlockFile(f"{self.location}/{name}", size, self.manifest.files[name].sha256) for name, size in sizes.items()
        ]
        self._open: dict[BlockFile, None] = {}  # the one used last at the end
        likely = (near.rank + 0.5) * len(self._files) / near.world
        self._unindexed = sorted(range(len(self._files)), key=lambda number: -abs(number + 0.5 - likely))
        self._pieces = {key: _Pieces() for key in self._sizes}

    @property
    def name(self) -> str:
        """Last part of the location: ``step-NNNNNNNN`` in a run."""
        return self.location.rsplit("/", 1)[-1]

    @property
    def bytes_read(self) -> int:
        """Bytes read of the ranks' files so far."""
        return sum(file.bytes_read for file in self._files)

    def network(self, name: str = MODEL) -> Network:
        """Shapes and frozen parameters of a network. Raises `Damaged` if it is not in the checkpoint."""
        if name not in self.manifest.networks:
            raise Damaged(f"{self.location} holds no network {name!r}, but {', '.join(self.manifest.networks)}")
        return self.manifest.networks[name]

    def read(self, kind: str, name: str, start: int, out: torch.Tensor, network: str = MODEL) -> None:
        """Fill ``out`` (fp32 vector on the CPU) with the elements of flattened ``name`` from ``start`` on.

        Raises:
            Damaged: they are not all there, or not what was written.
        """
        assert out.dtype is torch.float32, out.dtype
        assert out.is_contiguous()
        view = out.view(-1).view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        done, end = start, start + out.numel()
        while done < end:
            held = self._holding(kind, network, name, done)
            upto = min(end, held.stop)
            place = held.offset + (done - held.start) * ELEMENT
            self._used(held.file).readinto(place, view[(done - start) * ELEMENT : (upto - start) * ELEMENT])
            done = upto

    def parameter(self, kind: str, name: str, network: str = MODEL) -> torch.Tensor:
        """The whole parameter ``name`` in its shape, fp32; of a frozen one its weights, whatever ``kind``.

        Raises:
            Damaged: as `read` does, and where there is no such parameter.
        """
        held = self.network(network)
        if name not in held.shapes:
            raise Damaged(f"{self.location} holds no parameter {name!r}")
        out = torch.empty(held.shapes[name], dtype=torch.float32)
        self.read(FROZEN if (network, name) in self._frozen else kind, name, 0, out, network)
        return out

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check every byte of every file, and that nothing is missing.

        Args:
            progress: called with (bytes checked, bytes in all).
        Raises:
            Damaged: the first fault found.
        """
        total, done = sum(file.size for file in self._files), 0
        for file in self._files:
            for count in file.check():
                done += count
                if progress:
                    progress(done, total)
        while self._unindexed:
            self._index_next()
        for (kind, network, name), size in self._sizes.items():
            gap = self._pieces[kind, network, name].gap(size)
            if gap is not None:
                raise self._lacks(kind, name, gap)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _lacks(self, kind: str, name: str, element: int) -> Damaged:
        return Damaged(f"{self.location}: {kind} of {name} lacks elements from {element}")

    def _holding(self, kind: str, network: str, name: str, element: int) -> _Held:
        """The piece with this element, looking into further files until it is found."""
        while True:
            pieces = self._pieces.get((kind, network, name))
            held = pieces.holding(element) if pieces else None
            if held is not None:
                return held
            if not self._unindexed:
                raise self._lacks(kind, name, element)
            self._index_next()

    def _index_next(self) -> None:
        """Take in what the likeliest file not yet looked into holds."""
        number = self._unindexed.pop()
        file = self._used(number)
        for kind, network, name, start, length, offset in read_pieces(file):
            size = self._sizes.get((kind, network, name))
            stop = start + length
            if size is None:
                raise Damaged(f"{file.url}: {kind} of {name} in {network} is of no parameter of the manifest")
            if stop > size:
                raise Damaged(f"{file.url}: {kind} of {name} reaches beyond its parameter")
            if length and not self._pieces[kind, network, name].add((start, stop, offset, number)):
                raise Damaged(f"{file.url}: {kind} of {name} from {start} overlaps another piece")

    def _used(self, number: int) -> BlockFile:
        """A file about to be read; of many the one unused for longest is closed."""
        file = self._files[number]
        self._open.pop(file, None)
        self._open[file] = None
        if len(self._open) > _MOST_OPEN:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.close()
        return file


def _sizes(networks: Mapping[str, Network]) -> Iterator[tuple[tuple[str, str, str], int]]:
    """Kind, network and parameter of everything that a checkpoint of ``networks`` holds, and its elements."""
    for network, held in networks.items():
        frozen = set(held.frozen)
        for name in held.shapes:
            for kind in (FROZEN,) if name in frozen else KINDS:
                yield (kind, network, name), held.size(name)


def check_shapes(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise `UserError` unless both hold the same parameters in the same shapes."""
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(stored.keys() - wanted.keys())
    other = [
        f"{name} {stored[name]} instead of {wanted[name]}"
        for name in sorted(wanted.keys() & stored.keys())
        if stored[name] != wanted[name]
    ]
    parts = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
        if names
    ]
    if parts:
        raise UserError(f"{source} is of another model than the config describes ({'; '.join(parts)})")
