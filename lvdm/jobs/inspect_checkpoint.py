"""What checkpoints hold: those of a run in a list, one of them in detail, and the norms of its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvdm.checkpoint.blocks import Damaged
from lvdm.checkpoint.folder import BEST, LATEST
from lvdm.checkpoint.manifest import Network
from lvdm.checkpoint.pieces import ELEMENT, FROZEN, KINDS
from lvdm.checkpoint.reader import Checkpoint
from lvdm.errors import UserError
from lvdm.jobs.export_source import CheckpointSource

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""
_CHUNK = 1 << 18  # elements read at once


@dataclass(frozen=True)
class Listed:
    """A checkpoint among those of a run."""

    name: str
    step: int
    samples: int
    bytes: int
    scores: dict[str, float]
    marks: tuple[str, ...]
    """``latest``, ``best``, both or none."""
    fault: str
    """What is wrong with it; empty for a good one."""


@dataclass(frozen=True)
class NetworkSummary:
    """A network of a checkpoint, in numbers."""

    optimizer_step: int
    learning: int
    """Parameters (elements) that learn."""
    frozen: int
    tensors: int
    """Parameters by name."""
    bytes: dict[str, int]
    """What each kind takes."""


@dataclass(frozen=True)
class Contents:
    """What one checkpoint is."""

    location: str
    step: int
    clock: dict[str, Any]
    facts: dict[str, Any]
    scores: dict[str, float]
    written_by: dict[str, Any]
    networks: dict[str, NetworkSummary]
    files: dict[str, int]
    """Bytes of each."""

    @property
    def bytes(self) -> int:
        """All its bytes but the manifest's."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of what is stored of a parameter."""

    network: str
    name: str
    elements: int
    norms: dict[str, float]
    """By kind; of a frozen one its weights alone."""
    ema_distance: float | None
    """Norm of the average less the weights, relative to the weights'; None of a frozen one."""
    non_finite: dict[str, int]
    """Elements that are no finite numbers, by kind where there are any; the norms leave them out."""


@dataclass(frozen=True)
class Inspected:
    """What there is at a path."""

    root: str
    """The folder of checkpoints."""
    checkpoints: list[Listed]
    """All of a run, newest first; none where one checkpoint was named."""
    checkpoint: Contents | None
    """The one that was named, or the newest good one; None where all are damaged."""
    norms: list[Norms] | None
    """Of that one, where they were asked for."""

    @property
    def damaged(self) -> list[str]:
        """Names of the damaged ones."""
        return [one.name for one in self.checkpoints if one.fault]


def inspect(
    path: str | Path, *, with_norms: bool = False, verify: bool = False, progress: Progress | None = None
) -> Inspected:
    """Say what a run, a folder of checkpoints or one checkpoint holds; also under an fsspec URL.

    Args:
        verify: read every byte of every checkpoint.
    Raises:
        UserError: there is none, or the one that was named is damaged.
    """
    source = CheckpointSource(path)
    listed = [] if source.named else list_checkpoints(source, verify=verify, progress=progress)
    good = [source.folder.location(one.name) for one in listed if not one.fault]
    if listed and not good:
        return Inspected(source.folder.root, listed, None, None)
    with closing(source.newest()[0] if source.named or not listed else _opened(good[0])) as checkpoint:
        if verify and source.named:
            verify_all(checkpoint, progress)
        found = contents(checkpoint)
    rows = list(norms(found.location, progress)) if with_norms else None
    return Inspected(source.folder.root, listed, found, rows)


def list_checkpoints(
    source: CheckpointSource, *, verify: bool = False, progress: Progress | None = None
) -> list[Listed]:
    """The checkpoints of a run or folder, newest first.

    Args:
        verify: read every byte of each.
    """
    folder = source.folder
    pointed = {mark: folder.pointed_at(mark) for mark in (LATEST, BEST)}
    found = []
    for name in folder.names():
        marks = tuple(mark for mark, pointed_at in pointed.items() if pointed_at == name)
        step = int(name.split("-")[1])
        try:
            with closing(Checkpoint(folder.location(name))) as checkpoint:
                manifest = checkpoint.manifest
                size, samples = (
                    sum(file.size for file in manifest.files.values()),
                    manifest.samples,
                )
                if verify:
                    checkpoint.verify(progress)
                found.append(Listed(name, step, samples, size, manifest.scores, marks, ""))
        except Damaged as fault:
            found.append(Listed(name, step, 0, 0, {}, marks, str(fault)))
    return found


def contents(checkpoint: Checkpoint) -> Contents:
    """What one checkpoint is, by its manifest alone."""
    manifest = checkpoint.manifest
    return Contents(
        location=checkpoint.location,
        step=manifest.step,
        clock=manifest.clock,
        facts=manifest.facts,
        scores=manifest.scores,
        written_by=manifest.written_by,
        networks={name: _summary(network) for name, network in manifest.networks.items()},
        files={name: file.size for name, file in sorted(manifest.files.items())},
    )


def _summary(network: Network) -> NetworkSummary:
    frozen = sum(math.prod(network.shapes[name]) for name in network.frozen)
    learning = sum(math.prod(shape) for shape in network.shapes.values()) - frozen
    return NetworkSummary(
        optimizer_step=network.optimizer_step,
        learning=learning,
        frozen=frozen,
        tensors=len(network.shapes),
        bytes=dict.fromkeys(KINDS, learning * ELEMENT) | ({FROZEN: frozen * ELEMENT} if frozen else {}),
    )


def _opened(location: str) -> Checkpoint:
    try:
        return Checkpoint(location)
    except Damaged as fault:  # since it was listed
        raise UserError(f"checkpoint is damaged: {fault}") from None


def verify_all(checkpoint: Checkpoint, progress: Progress | None = None) -> None:
    """Read every byte. Raises `UserError` where one is not as it was written."""
    try:
        checkpoint.verify(progress)
    except Damaged as fault:
        raise UserError(f"checkpoint is damaged: {fault}") from None


def norms(location: str, progress: Progress | None = None) -> Iterator[Norms]:
    """The norms of every parameter of a checkpoint, in little memory.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        with ExitStack() as stack:
            # One reader a kind, since each reads on where it was: a kind lies in one part of a file.
            readers = {kind: stack.enter_context(closing(Checkpoint(location))) for kind in KINDS}
            networks = readers[KINDS[0]].manifest.networks
            total = sum(sum(_summary(network).bytes.values()) for network in networks.values())
            for network, held in networks.items():
                for name, shape in held.shapes.items():
                    kinds = [FROZEN] if name in held.frozen else list(KINDS)
                    yield _norms(readers, network, name, math.prod(shape), kinds)
                    if progress:
                        progress(min(total, sum(reader.bytes_read for reader in readers.values())), total)
    except Damaged as fault:
        raise UserError(f"checkpoint is damaged: {fault}") from None


def _norms(readers: dict[str, Checkpoint], network: str, name: str, elements: int, kinds: list[str]) -> Norms:
    squares = dict.fromkeys(kinds, 0.0)
    non_finite = dict.fromkeys(kinds, 0)
    distance = 0.0
    for start, length in chunks(elements):
        parts = {kind: read(readers.get(kind, readers[KINDS[0]]), kind, name, start, length, network) for kind in kinds}
        for kind, part in parts.items():
            finite = part.isfinite()
            non_finite[kind] += length - int(finite.sum())
            squares[kind] += square_sum(part.where(finite, 0))
        if FROZEN not in parts:
            apart = parts["ema"].double() - parts["master"]
            distance += square_sum(apart.where(apart.isfinite(), 0))
    found = {kind: math.sqrt(square) for kind, square in squares.items()}
    return Norms(
        network=network,
        name=name,
        elements=elements,
        norms=found,
        ema_distance=None if FROZEN in kinds else ratio(math.sqrt(distance), found["master"]),
        non_finite={kind: count for kind, count in non_finite.items() if count},
    )


def read(checkpoint: Checkpoint, kind: str, name: str, start: int, length: int, network: str) -> Tensor:
    """Some elements of a flattened parameter. Raises `Damaged`."""
    out = torch.empty(length)
    checkpoint.read(kind, name, start, out, network)
    return out


def chunks(elements: int) -> Iterator[tuple[int, int]]:
    """Start and length of the parts that a parameter is read in."""
    for start in range(0, elements, _CHUNK):
        yield start, min(_CHUNK, elements - start)


def square_sum(values: Tensor) -> float:
    """Sum of the squares, in fp64."""
    return float(values.double().square().sum())


def ratio(part: float, whole: float) -> float:
    """``part / whole``; nothing of nothing is 0, something of it infinite."""
    return part / whole if whole else math.inf if part else 0.0


def total_of(rows: Iterable[Norms], network: str) -> dict[str, float]:
    """The norm of each kind over all parameters of a network."""
    squares: dict[str, float] = {}
    for row in rows:
        for kind, norm in row.norms.items() if row.network == network else ():
            squares[kind] = squares.get(kind, 0.0) + norm**2
    return {kind: math.sqrt(square) for kind, square in squares.items()}


def plain(value: Any) -> Any:
    """JSON of it: dataclasses as mappings, and what JSON has no numbers for as text."""
    if hasattr(value, "__dataclass_fields__"):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value
