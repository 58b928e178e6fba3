"""Where an export is from: which checkpoints of a run, a folder or a store, and their weights, read when asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from lvdm.checkpoint.blocks import Damaged
from lvdm.checkpoint.folder import BEST, locate_checkpoints, newest_good, none_to_read
from lvdm.checkpoint.manifest import MODEL, Network
from lvdm.checkpoint.pieces import FROZEN
from lvdm.checkpoint.reader import Checkpoint
from lvdm.errors import UserError
from lvdm.storage import locate
from lvdm.weights.conversion import LazyTensor
from lvdm.weights.native import CONFIG_FILE

T = TypeVar("T")
KINDS = {"ema": "ema", "live": "master"}
"""What a checkpoint calls the weights that a user may ask for."""
_AVERAGED = 1 << 18
"""Elements averaged at once: the mean of a tensor takes the memory of the tensor and little more."""
_MAY_DIFFER = {"trainable", "loss", "min_snr_gamma", "snr_floor", "timestep_shift", "latent_shape"}
"""How and on which clips weights were learnt, and not what they do: their mean is one of like things."""


@dataclass(frozen=True)
class Choice:
    """Which weights of a source."""

    weights: Literal["ema", "live"] = "ema"
    """Averaged over the training, or as they are."""
    network: str = MODEL
    average: int = 1
    """The mean of so many checkpoints, the newest of a run."""
    also: tuple[str, ...] = ()
    """Further sources whose checkpoints are averaged with those of the first."""
    best: bool = False
    """The checkpoint with the best validation in place of the newest."""


NEWEST = Choice()


class DamagedCheckpoint(Damaged):
    """One of the checkpoints in use turned out to be damaged."""

    def __init__(self, location: str, fault: Damaged) -> None:
        super().__init__(str(fault))
        self.location = location


class CheckpointSource:
    """A run, a folder of checkpoints or one checkpoint, local or under an fsspec URL.

    Of a run or a folder the newest good ones are taken, and one that turns out to be damaged is passed over. One that
    is named, also by `BEST`, is that one or an error.
    """

    def __init__(self, path: str | Path, best: bool = False) -> None:
        """Raises `UserError` if ``path`` cannot be listed or is an export, or ``best`` is wanted and not to be had."""
        self.path = str(path)
        if exported_folder(path):
            raise UserError(f"{path} is an exported model; give a run, a folder of checkpoints or a checkpoint")
        self.folder, name = locate_checkpoints(path)
        if best:
            if name:
                raise UserError(f"{path} is one checkpoint; --best takes a run or a folder of checkpoints")
            name = self.folder.pointed_at(BEST)
            if not name:
                raise UserError(
                    f"{self.folder.root} has no best checkpoint; a run has with validation and run.keep_best"
                )
        self.named = bool(name)
        """Whether it is one checkpoint."""
        self.faults: list[str] = []
        """What is wrong with those that were passed over."""
        self._left = [self.folder.location(entry) for entry in ([name] if name else self.folder.names())]

    def newest(self, count: int = 1) -> list[Checkpoint]:
        """The newest ``count`` good ones, by what their manifests say.

        Raises:
            UserError: there are fewer, or the one that was named is damaged.
        """
        if self.named and count > 1:
            raise UserError(
                f"{self.path} is one checkpoint; --average takes a run or a folder, or name others by --also"
            )
        found, damaged = newest_good(list(self._left), count)
        for location, fault in damaged.items():
            self.pass_over(location, fault)
        if len(found) == count:
            return found
        close(found)
        if found:
            bad = f"; damaged: {'; '.join(self.faults)}" if self.faults else ""
            raise UserError(f"{self.path} has {len(found)} good checkpoints to average, not {count}{bad}")
        raise none_to_read(self.folder, self.faults, named=False)

    def pass_over(self, location: str, fault: Damaged) -> None:
        """Go on without the checkpoint in ``location``, if it is of this source. Raises `UserError` if it was named."""
        if location not in self._left:
            return
        if self.named:
            raise none_to_read(self.folder, [str(fault)], named=True) from None
        self._left.remove(location)
        self.faults.append(str(fault))


def exported_folder(source: str | Path) -> Path | None:
    """``source``, if it is an exported folder on this machine."""
    fs, path = locate(str(source))
    return Path(path) if isinstance(fs, LocalFileSystem) and Path(path, CONFIG_FILE).is_file() else None


def close(checkpoints: Sequence[Checkpoint]) -> None:
    """Close their files."""
    for checkpoint in checkpoints:
        checkpoint.close()


def with_checkpoints(
    path: str | Path,
    choice: Choice,
    action: Callable[[list[Checkpoint]], T],
    note: Callable[[str], None] | None = None,
) -> T:
    """What ``action`` gives for the checkpoints chosen; where one turns out to be damaged, for the next older ones.

    Nothing is read in advance: the reader verifies every block that ``action`` reads.

    Args:
        note: called with what is wrong with each checkpoint that was passed over.
    Raises:
        UserError: there are too few good ones, one is taken twice, or one that was named is damaged.
    """
    if choice.average < 1 or (choice.best and choice.average > 1):
        raise UserError(f"--average {choice.average}: give at least 1, and no --best beside more than 1")
    sources = [CheckpointSource(path, choice.best), *map(CheckpointSource, choice.also)]
    said: set[str] = set()
    while True:
        taken: list[Checkpoint] = []
        try:
            for number, source in enumerate(sources):
                taken += source.newest(1 if number else choice.average)
                for fault in source.faults:
                    if note and fault not in said:
                        note(f"passed over a damaged checkpoint: {fault}")
                    said.add(fault)
            _check_apart(taken)
            return action(taken)
        except DamagedCheckpoint as damage:
            for source in sources:
                source.pass_over(damage.location, damage)
        finally:
            close(taken)


def _check_apart(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise `UserError` where a mean would count a checkpoint twice."""
    seen: set[str] = set()
    for location in (checkpoint.location for checkpoint in checkpoints):
        place = location if "://" in location else os.path.realpath(location)
        if place in seen:
            raise UserError(f"{location} would count twice in the mean; name another checkpoint in its place")
        seen.add(place)


def lazy_weights(checkpoints: Sequence[Checkpoint], kind: str, network: str = MODEL) -> dict[str, LazyTensor]:
    """The weights of a network, frozen ones too, or their mean over several checkpoints.

    Reading them raises `DamagedCheckpoint`.

    Args:
        kind: of `KINDS`, as a checkpoint calls it.
    Raises:
        UserError: there is no such network, or the checkpoints are of different models.
    """
    first, *others = [_network(checkpoint, network) for checkpoint in checkpoints]
    for checkpoint, other in zip(checkpoints[1:], others, strict=True):
        differing = [
            name
            for name in sorted(first.shapes.keys() | other.shapes.keys())
            if first.shapes.get(name) != other.shapes.get(name)
        ]
        if differing:
            raise UserError(
                f"{checkpoints[0].location} and {checkpoint.location} are of different models, so they have no mean: "
                f"{differing[0]} is {_shape(first, differing[0])} and {_shape(other, differing[0])}"
            )
        if unlike := _unlike(checkpoints[0], checkpoint, network):
            raise UserError(
                f"{checkpoints[0].location} and {checkpoint.location} have no mean that would work: {unlike}"
            )

    def read(name: str) -> Tensor:
        return _mean(checkpoints, kind, name, network)

    return {
        name: LazyTensor(tuple(shape), torch.float32, lambda name=name: read(name))  # type: ignore[misc]
        for name, shape in first.shapes.items()
    }


def _network(checkpoint: Checkpoint, name: str) -> Network:
    if name not in checkpoint.manifest.networks:
        held = ", ".join(checkpoint.manifest.networks)
        raise UserError(f"{checkpoint.location} holds no network {name}; it holds {held} (--network)")
    return checkpoint.network(name)


def _unlike(first: Checkpoint, second: Checkpoint, network: str) -> str:
    """A setting by which weights of the same shapes mean something else in two checkpoints; empty if there is none."""
    for section in (network, "diffusion", "facts"):
        one, two = (
            (held.manifest.facts if section == "facts" else held.manifest.config.get(section)) or {}
            for held in (first, second)
        )
        for key in sorted((one.keys() | two.keys()) - _MAY_DIFFER):
            if one.get(key) != two.get(key):
                return f"{section}.{key} is {one.get(key)} and {two.get(key)}"
    return ""


def _shape(network: Network, name: str) -> str:
    return str(list(network.shapes[name])) if name in network.shapes else "not there"


def _mean(checkpoints: Sequence[Checkpoint], kind: str, name: str, network: str) -> Tensor:
    """The mean over checkpoints, summed in fp64 and rounded once."""
    if len(checkpoints) == 1:
        with _noting(checkpoints[0]):
            return checkpoints[0].parameter(kind, name, network)
    out = torch.empty(checkpoints[0].network(network).shapes[name])
    flat = out.view(-1)
    for start in range(0, len(flat), _AVERAGED):
        part = flat[start : start + _AVERAGED]
        total = torch.zeros(len(part), dtype=torch.float64)
        for checkpoint in checkpoints:
            stored = FROZEN if name in checkpoint.network(network).frozen else kind
            with _noting(checkpoint):
                checkpoint.read(stored, name, start, part, network)
            total += part
        part.copy_(total / len(checkpoints))
    return out


@contextlib.contextmanager
def _noting(checkpoint: Checkpoint) -> Iterator[None]:
    """Tell which checkpoint is damaged."""
    try:
        yield
    except Damaged as fault:
        raise DamagedCheckpoint(checkpoint.location, fault) from None


def watched(
    tensors: dict[str, LazyTensor], progress: Callable[[int, int], None] | None, passes: int = 1
) -> dict[str, LazyTensor]:
    """The same tensors, with their bytes counted when they are read; second names stay second names.

    Args:
        progress: called with (bytes done, bytes in all), which are ``passes`` times those of the tensors.
    """
    if progress is None:
        return tensors
    once: dict[int, LazyTensor] = {}
    done = total = 0

    def watch(lazy: LazyTensor) -> LazyTensor:
        def read() -> Tensor:
            nonlocal done
            tensor = lazy.read()
            done += lazy.nbytes
            progress(done, total)
            return tensor

        return LazyTensor(lazy.shape, lazy.dtype, read)

    for lazy in tensors.values():
        if id(lazy) not in once:
            once[id(lazy)] = watch(lazy)
            total += passes * lazy.nbytes
    return {name: once[id(lazy)] for name, lazy in tensors.items()}
