"""What differs between two checkpoints: weights, moments and averages by parameter, and all that is said of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvdm.checkpoint.blocks import Damaged
from lvdm.checkpoint.manifest import Manifest, Network
from lvdm.checkpoint.pieces import FROZEN, KINDS
from lvdm.checkpoint.reader import Checkpoint
from lvdm.errors import UserError
from lvdm.jobs.inspect_checkpoint import chunks, ratio, read, square_sum

ABOUT = ("written_by", "config", "scores")
"""What is shown of differences and does not count: where, by whom and how well."""


@dataclass(frozen=True)
class Differing:
    """A kind of a parameter in two checkpoints, where it differs by more than the tolerance."""

    network: str
    name: str
    kind: str
    elements: int
    """Elements that differ."""
    largest: float
    """Largest absolute difference; infinite where one of two values is no finite number."""
    relative: float
    """Norm of the difference relative to that of the first."""


@dataclass(frozen=True)
class KindDifference:
    """All parameters of a kind together."""

    parameters: int
    """Those that differ."""
    of: int
    largest: float
    largest_in: str
    """The parameter with the largest absolute difference."""
    relative: float


@dataclass(frozen=True)
class Difference:
    """What differs between a first and a second checkpoint."""

    first: str
    second: str
    only_first: list[str]
    """Parameters that the second lacks, as ``NETWORK/NAME``."""
    only_second: list[str]
    shapes: dict[str, tuple[list[int], list[int]]]
    """Shapes of those that have another in each, which are not compared further."""
    frozen: list[str]
    """Parameters that learn in one and not in the other; their weights are compared."""
    kinds: dict[str, KindDifference]
    """By network and kind, as ``NETWORK/KIND``."""
    parameters: list[Differing]
    """The largest relative difference first."""
    state: dict[str, tuple[Any, Any]]
    """Entries of steps, clock and facts that differ, by dotted path; None where there is none."""
    about: dict[str, tuple[Any, Any]]
    """The same of `ABOUT`."""

    @property
    def equal(self) -> bool:
        """Whether a run would go on alike from both: everything but `ABOUT`."""
        parts = (self.only_first, self.only_second, self.shapes, self.frozen, self.parameters, self.state)
        return not any(parts)


def compare(
    first: str, second: str, tolerance: float = 0.0, progress: Callable[[int, int], None] | None = None
) -> Difference:
    """Compare two checkpoints, a part at a time.

    Args:
        first: location of a checkpoint, as is ``second``.
        tolerance: relative difference (norm of the difference by that of the first) up to which a kind of a parameter
            counts as the same. With 0 every element has to be the same number; two NaNs are.
        progress: called with (bytes read of the first, its bytes).
    Raises:
        UserError: one is damaged.
    """
    try:
        with ExitStack() as stack:
            readers = {
                kind: tuple(stack.enter_context(closing(Checkpoint(where))) for where in (first, second))
                for kind in (*KINDS, FROZEN)
            }
            return _compare(readers, tolerance, progress)
    except Damaged as fault:
        raise UserError(f"checkpoint is damaged: {fault}") from None


def _compare(
    readers: Mapping[str, tuple[Checkpoint, ...]], tolerance: float, progress: Callable[[int, int], None] | None
) -> Difference:
    one, two = readers[KINDS[0]]
    held = [_parameters(checkpoint.manifest) for checkpoint in (one, two)]
    both = [key for key in held[0] if key in held[1]]
    shapes = {
        f"{network}/{name}": (list(held[0][network, name].shapes[name]), list(held[1][network, name].shapes[name]))
        for network, name in both
        if held[0][network, name].shapes[name] != held[1][network, name].shapes[name]
    }
    total = sum(file.size for file in one.manifest.files.values())
    kinds: dict[str, _Sum] = {}
    found, frozen = [], []
    for network, name in both:
        if f"{network}/{name}" in shapes:
            continue
        still = [name in parameters[network, name].frozen for parameters in held]
        if still[0] != still[1]:
            frozen.append(f"{network}/{name}")
        pairs = [(kind, kind) for kind in KINDS] if not any(still) else [_weights(*still)]
        for first, second in pairs:
            elements = math.prod(held[0][network, name].shapes[name])
            apart = _apart((readers[first][0], first), (readers[second][1], second), network, name, elements)
            entry = kinds.setdefault(f"{network}/{first}", _Sum())
            differs = entry.add(name, apart, tolerance)
            if differs:
                found.append(Differing(network, name, first, apart.elements, apart.largest, apart.relative))
        if progress:
            progress(min(total, sum(pair[0].bytes_read for pair in readers.values())), total)
    return Difference(
        first=one.location,
        second=two.location,
        only_first=[f"{network}/{name}" for network, name in held[0] if (network, name) not in held[1]],
        only_second=[f"{network}/{name}" for network, name in held[1] if (network, name) not in held[0]],
        shapes=shapes,
        frozen=frozen,
        kinds={key: entry.whole() for key, entry in kinds.items()},
        parameters=sorted(found, key=lambda row: (row.relative, row.largest), reverse=True),
        state=differing(_state(one.manifest), _state(two.manifest)),
        about=differing(*({part: getattr(c.manifest, part) for part in ABOUT} for c in (one, two))),
    )


def _weights(first_is_frozen: bool, second_is_frozen: bool) -> tuple[str, str]:
    """What holds the weights in each."""
    return FROZEN if first_is_frozen else KINDS[0], FROZEN if second_is_frozen else KINDS[0]


def _parameters(manifest: Manifest) -> dict[tuple[str, str], Network]:
    """The network of every parameter, by the names of both."""
    return {(label, name): network for label, network in manifest.networks.items() for name in network.shapes}


def _state(manifest: Manifest) -> dict[str, Any]:
    """What a run goes on from besides tensors."""
    steps = {name: network.optimizer_step for name, network in manifest.networks.items()}
    return {"step": manifest.step, "optimizer_step": steps, "clock": manifest.clock, "facts": manifest.facts}


@dataclass
class _Apart:
    """How far two tensors are apart."""

    elements: int = 0
    largest: float = 0.0
    square: float = 0.0
    """Of the difference; infinite where one of two values is no finite number."""
    first_square: float = 0.0

    @property
    def relative(self) -> float:
        return ratio(math.sqrt(self.square), math.sqrt(self.first_square))

    def add(self, first: Tensor, second: Tensor) -> None:
        self.first_square += square_sum(first.where(first.isfinite(), 0))
        other = (first != second) & ~(first.isnan() & second.isnan())
        if not other.any():
            return
        self.elements += int(other.sum())
        apart = torch.where(other, (first.double() - second.double()).abs(), 0.0).nan_to_num(nan=math.inf)
        self.largest = max(self.largest, float(apart.max()))
        self.square += square_sum(apart)


@dataclass
class _Sum:
    """The differences of a kind, added up."""

    parameters: int = 0
    of: int = 0
    largest: float = 0.0
    largest_in: str = ""
    square: float = 0.0
    first_square: float = 0.0

    def add(self, name: str, apart: _Apart, tolerance: float) -> bool:
        """Count a parameter; whether it differs by more than the tolerance."""
        differs = apart.elements > 0 and not apart.relative <= tolerance
        self.of += 1
        self.parameters += differs
        if apart.largest > self.largest:
            self.largest, self.largest_in = apart.largest, name
        self.square += apart.square
        self.first_square += apart.first_square
        return differs

    def whole(self) -> KindDifference:
        relative = ratio(math.sqrt(self.square), math.sqrt(self.first_square))
        return KindDifference(self.parameters, self.of, self.largest, self.largest_in, relative)


def _apart(
    first: tuple[Checkpoint, str], second: tuple[Checkpoint, str], network: str, name: str, elements: int
) -> _Apart:
    apart = _Apart()
    for start, length in chunks(elements):
        apart.add(*(read(checkpoint, kind, name, start, length, network) for checkpoint, kind in (first, second)))
    return apart


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries of two trees that differ, by dotted path; lists are compared whole."""
    one, two = _flat(first), _flat(second)
    return {
        path: (one.get(path), two.get(path))
        for path in sorted(one.keys() | two.keys())
        if path not in one or path not in two or one[path] != two[path]
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        found |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found
