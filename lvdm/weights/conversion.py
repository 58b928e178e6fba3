"""What every foreign layout of weights is described with: name pairs, the models they make up, and what is wrong.

A layout knows names and shapes only. Tensors pass through one by one, so that converting needs the memory of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lvdm.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
Library = Literal["lvdm", "diffusers", "transformers"]


class Mismatch(ValueError):
    """A file is not of the layout it was taken for; the message says in which way."""


class Entry(NamedTuple):
    """One tensor: its name here, its name there, and the axes of length one that it has more there."""

    ours: str
    theirs: str
    ones: tuple[int, ...] = ()

    def to_ours(self, tensor: Tensor) -> Tensor:
        """The tensor without those axes. Raises `Mismatch` where they are not of length one."""
        shape = list(tensor.shape)
        for axis in sorted(self.ones, reverse=True):
            if axis >= len(shape) or shape[axis] != 1:
                raise Mismatch(f"1 of another shape ({self.theirs} {list(tensor.shape)})")
            del shape[axis]
        return tensor.reshape(shape)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """The tensor with those axes."""
        for axis in sorted(self.ones):
            tensor = tensor.unsqueeze(axis)
        return tensor


@dataclass(frozen=True)
class Component:
    """One model in a file."""

    library: Library
    """Whose model it is, and so what its folder looks like."""
    config: dict[str, Any]
    """The model's config: our section, or the library's ``config.json``."""
    entries: list[Entry]
    """Every tensor of the model."""


@dataclass(frozen=True)
class Contents:
    """What a foreign file holds."""

    components: dict[str, Component]
    """Models by the subfolder they go to; the main one's is empty."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Second names of tensors, with the first."""
    rest: list[str] = field(default_factory=list)
    """Other tensors, which travel along so that a file can be handed back as it was."""
    made: frozenset[str] = frozenset()
    """Tensors that follow from the config and are made anew."""


class Source(NamedTuple):
    """A model to be written in a foreign layout."""

    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that is read when it is written; the same object under two names is one tensor in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """One that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def map(self, function: Callable[[Tensor], Tensor]) -> LazyTensor:
        """``function`` of it, a change of shape."""
        shape = tuple(function(torch.empty(self.shape, device="meta")).shape)
        return LazyTensor(shape, self.dtype, lambda: function(self.read()))


class Unread(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for."""

    def __init__(self, lazy: Mapping[str, LazyTensor]) -> None:
        self.lazy = lazy

    def __getitem__(self, name: str) -> Tensor:
        return self.lazy[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.lazy)

    def __len__(self) -> int:
        return len(self.lazy)


class Layout(Protocol):
    """A foreign layout of weights, both directions."""

    @property
    def description(self) -> str:
        """What such files are, in a few words."""

    def recognise(self, shapes: Shapes) -> float:
        """How well names and shapes fit, 0 to 1."""

    def to_ours(self, shapes: Shapes, weights: Literal["ema", "live"]) -> Contents:
        """The models in a file. Raises `Mismatch`."""

    def from_ours(
        self,
        sources: Mapping[str, Source],
        live: Source | None,
        rest: Mapping[str, LazyTensor],
        facts: Mapping[str, Any],
    ) -> dict[str, LazyTensor]:
        """Every tensor of a file.

        Args:
            sources: our models, by the names that `to_ours` gives them.
            live: the main model before averaging, where both are known.
            rest: tensors that were carried along since the import.
            facts: ``diffusion`` (tables of its schedule), ``ema_decay`` and ``updates``.
        Raises:
            Mismatch: a model is missing, or of another kind.
        """


def check_names(required: Iterable[str], optional: Collection[str], given: Collection[str]) -> None:
    """Raises `Mismatch` where a file's names are not what a layout needs."""
    wanted = list(required)
    known = {*wanted, *optional}
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in known]
    if missing or unexpected:
        pairs = (("missing", missing), ("unexpected", unexpected))
        raise Mismatch(", ".join(f"{len(names)} {fault} ({some(names)})" for fault, names in pairs if names))


def likeness(expected: Collection[str], given: Collection[str]) -> float:
    """Share of names that two sets have in common."""
    first, second = set(expected), set(given)
    return len(first & second) / max(1, len(first | second))


def convert(component: Component, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A component's tensors under our names, one at a time."""
    for entry in component.entries:
        yield entry.ours, entry.to_ours(tensors[entry.theirs])


def write_back(source: Source, entries: Iterable[Entry]) -> dict[str, LazyTensor]:
    """A model's tensors under their names. Raises `Mismatch` where some are missing; what is more is left out."""
    pairs = list(entries)
    check_names([entry.ours for entry in pairs], source.tensors, source.tensors)
    return {entry.theirs: source.tensors[entry.ours].map(entry.to_theirs) for entry in pairs}


def check_plain(config: Mapping[str, Any]) -> None:
    """Raise `Mismatch` where a ``text_unet`` has parts that LVDM's and Stable Diffusion's do not have."""
    extra = [f"model.{name}" for name in ("pooled_text", "scale_shift", "coordinates") if config.get(name)]
    if extra:
        raise Mismatch(f"the layout has no place for {' and '.join(extra)}")


def cast(tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> dict[str, LazyTensor]:
    """The same tensors as ``dtype``, but for those of integers. What does not fit is a `UserError` when it is read."""
    return {name: _cast(name, lazy, dtype) if lazy.dtype.is_floating_point else lazy for name, lazy in tensors.items()}


def _cast(name: str, lazy: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    def read() -> Tensor:
        exact = lazy.read()
        rounded = exact.to(dtype)
        if rounded.isinf().any() and not torch.equal(rounded.isinf(), exact.isinf()):
            most, kind = exact[exact.isfinite()].abs().max().item(), str(dtype).removeprefix("torch.")
            raise UserError(
                f"tensor {name} does not fit {kind}: it has a value of {most:.4g}, and {kind} ends at "
                f"{torch.finfo(dtype).max:.4g}; export as bf16 or fp32"
            )
        return rounded

    return LazyTensor(lazy.shape, dtype, read)


def some(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
