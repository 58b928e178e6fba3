"""A checkpoint that DeepSpeed itself wrote, ZeRO stages 1 to 3: its parameters, masters and moments by name.

    latest                                            name of the newest tag
    global_step100/                                   a tag
      mp_rank_00_model_states.pt                      stages 1, 2: weights, shapes, step
      zero_pp_rank_N_mp_rank_00_model_states.pt       stage 3: the same of every rank, without the weights
      [bf16_]zero_pp_rank_N_mp_rank_00_optim_states.pt   every rank's masters and optimiser state

A rank holds flat vectors ("flats"): in stages 1 and 2 its part of each group of parameters laid end to end, in stage 3
its part of every parameter, laid end to end. The files do not say where in them a parameter lies; the order of their
``param_shapes`` does. Written after DeepSpeed 0.19's ``zero_to_fp32.py`` and checked with files of that version.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvdm.errors import UserError
from lvdm.weights.restricted_pickle import Archive, StoredTensor, printable

MOMENTS = ("exp_avg", "exp_avg_sq")
_RANK_FILE = re.compile(r"(bf16_|fp16_|)zero_pp_rank_([0-9]{1,6})_mp_rank_([0-9]{2,6})_optim_states\.pt")
_MODEL_FILE = "mp_rank_00_model_states.pt"
_Shapes = dict[str, tuple[int, ...]]


class _Piece(NamedTuple):
    """Elements of a parameter, from ``start`` on, in a flat of a rank, from ``offset`` on."""

    rank: int
    flat: int
    start: int
    offset: int
    length: int


@dataclass
class _Rank:
    """The flats of a rank by kind, in order; ``padding`` elements at the end of each belong to no parameter."""

    path: Path
    flats: dict[str, list[StoredTensor]]
    sizes: list[int]
    padding: list[int]
    step: int | None


@dataclass
class DeepSpeedCheckpoint:
    """What is in the files of one tag."""

    path: Path
    """The tag's folder."""
    version: str
    """Of the DeepSpeed that wrote it."""
    stage: int
    ranks: int
    step: int
    """Optimiser steps of the run, skipped ones included."""
    samples: int
    skipped: int
    optimizer_step: int | None
    """Steps that were applied; None if the optimiser's state does not tell."""
    kinds: tuple[str, ...]
    """What there is of every element that learns: ``master``, and of moments and ``ema`` what the optimiser kept."""
    shapes: _Shapes
    """Shape of every parameter, by the name that the trained module gave it."""
    frozen: tuple[str, ...]
    """Parameters that did not learn."""
    aliases: dict[str, str]
    """Other names of shared parameters, and the name under which each is held."""
    _pieces: dict[str, list[_Piece]] = field(repr=False)
    _ranks: list[_Rank] = field(repr=False)
    _weights: dict[str, list[StoredTensor]] = field(repr=False)  # as the network computes with, by parameter

    def read(self, kind: str, name: str, start: int, end: int) -> Tensor:
        """Elements ``start`` to ``end``, exclusive, of a flattened parameter that learns, fp32. Raises `UserError`."""
        found = []
        for piece in self._pieces[name]:
            low, high = max(start, piece.start), min(end, piece.start + piece.length)
            if low < high:
                flat = self._ranks[piece.rank].flats[kind][piece.flat]
                place = piece.offset - piece.start
                found.append(flat.elements(low + place, high + place).float())
        return torch.cat(found) if found else torch.empty(0)

    def read_frozen(self, name: str) -> Tensor:
        """The whole flattened parameter that does not learn, fp32. Raises `UserError`."""
        flat = torch.cat([part.whole().flatten().float() for part in self._weights[name]])
        return flat[: math.prod(self.shapes[name])]

    def check_weights(self, name: str) -> None:
        """Compare a master with the weights that the network computed with, where the files hold both.

        Raises:
            UserError: they differ, so that the files are not of one moment of one run.
        """
        if name in self.frozen or name not in self._weights or not self._pieces[name]:
            return
        (stored,) = self._weights[name]
        used = stored.whole().flatten()
        master = self.read("master", name, 0, used.numel()).to(used.dtype)
        if torch.equal(master, used):
            return
        precision = 0.0 if used.dtype is torch.float32 else torch.finfo(used.dtype).eps  # a unit in the last place
        if not torch.allclose(master.float(), used.float(), rtol=precision, atol=0.0, equal_nan=True):
            path = self._ranks[self._pieces[name][0].rank].path
            raise UserError(
                f"{path} is not of the same moment of the same run as {_MODEL_FILE} beside it: the masters of {name} "
                f"differ from its weights there"
            )


def open_deepspeed(folder: Path, tag: str = "") -> DeepSpeedCheckpoint:
    """Open a folder that DeepSpeed's ``save_checkpoint`` wrote, or the folder of one tag in it.

    Its files are pickles: they are read by `restricted_pickle`, tensors as they are asked for.

    Args:
        tag: by default the one that ``latest`` names.
    Raises:
        UserError: a file is missing, damaged, refused or does not fit the others, naming it.
    """
    place = _tag_folder(folder, tag)
    return _assemble(place, [_open(place / name) for name in _rank_files(place)])


def _open(path: Path) -> Archive:
    archive = Archive(path)
    # torch names the root of an archive after the file; nothing else in a file says of which rank it is
    if archive.root not in (path.stem, "archive"):
        raise UserError(f"{path} was written as {archive.root}.pt; has it taken the place of another rank's file?")
    return archive


def _tag_folder(folder: Path, tag: str) -> Path:
    """The folder of ``tag``, which never lies elsewhere than in ``folder``."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    source = "--tag"
    if not tag:
        if any(_RANK_FILE.fullmatch(path.name) for path in folder.iterdir()):
            return folder
        latest = folder / "latest"
        source = str(latest)
        if not latest.is_file():
            raise UserError(f"{folder} holds neither DeepSpeed's file 'latest' nor a rank's *_optim_states.pt")
        with latest.open("rb") as file:
            tag = file.read(300).decode(errors="replace").strip()
    if not tag or Path(tag).name != tag or "\0" in tag or tag == ".." or len(tag) > 200:
        raise UserError(f"{source} names {tag!r}, which is no folder in {folder}")
    if not os.path.isdir(folder / tag):
        raise UserError(f"{source} names {tag}, but there is no folder {folder / tag}")
    return folder / tag


def _rank_files(place: Path) -> list[str]:
    """The files of the ranks' optimisers, in rank order."""
    found: dict[int, str] = {}
    for name in sorted(path.name for path in place.iterdir() if path.name.endswith("_optim_states.pt")):
        match = _RANK_FILE.fullmatch(name)
        if match is None or int(match[3]):
            raise UserError(f"{place / name} is of a model that was split over ranks, which ours never are")
        if int(match[2]) in found:
            raise UserError(f"{place / name} and {found[int(match[2])]} are of the same rank")
        found[int(match[2])] = name
    if not found:
        raise UserError(f"{place} holds no zero_pp_rank_*_optim_states.pt: DeepSpeed writes them in ZeRO stages 1 to 3")
    for rank in range(max(found) + 1):
        if rank not in found:
            raise UserError(f"{place} lacks rank {rank}'s zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return [found[rank] for rank in sorted(found)]


def _assemble(place: Path, archives: Sequence[Archive]) -> DeepSpeedCheckpoint:
    states, versions = [], []
    for archive in archives:
        with _reading(archive):
            versions.append(printable(_typed(archive.tree["ds_version"], str)))
            states.append(_typed(archive.tree["optimizer_state_dict"], dict))
    stage, world = 0, len(archives)
    ranks = []
    for archive, state in zip(archives, states, strict=True):
        with _reading(archive):
            # BF16_Optimizer, which stage 1 becomes with bf16 and fp32 accumulation, does not say
            found = _count(state.get("zero_stage", 1))
            stage = stage or found
            _expect(found == stage and stage in (1, 2, 3), f"it is of ZeRO stage {found}, others of {stage}")
            count = state["partition_count"]
            count = max(map(_count, count)) if isinstance(count, list) else _count(count)
            _expect(count == world, f"it is of {count} ranks, but there are the files of {world}")
            _expect("ds_zero_partition_groups" not in state, "its experts are split over ranks")
            ranks.append(_read_stage3(archive, state) if stage == 3 else _read_stage12(archive, state))
            _expect(ranks[-1].step == ranks[0].step, f"it is of step {ranks[-1].step}, rank 0's of {ranks[0].step}")
            _expect(ranks[-1].flats.keys() == ranks[0].flats.keys(), "its optimiser's state has other entries")

    files = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world)]
    models = [_open(place / name) for name in (files if stage == 3 else [_MODEL_FILE])]
    with _reading(models[0]):
        first = _typed(models[0].tree, dict)
        groups = [_shapes(group) for group in _typed(first["param_shapes"], list)]
        learning = {name: shape for group in groups for name, shape in group.items()}
        _expect(len(learning) == sum(map(len, groups)), "a parameter is in two groups")
        aliases = {_name(a): _name(b) for a, b in _typed(first.get("shared_params") or {}, dict).items()}
        clock = {name: _count(first[name]) for name in ("global_steps", "global_samples", "skipped_steps")}
        versions.append(printable(_typed(first["ds_version"], str)))
    for model in models[1:]:
        with _reading(model):
            for name, value in clock.items():
                _expect(model.tree[name] == value, f"its {name} are {model.tree[name]!r}, rank 0's {value}")
            _expect([_shapes(group) for group in model.tree["param_shapes"]] == groups, "its parameters are others")
    if len(set(versions)) > 1:
        raise UserError(
            f"the files in {place} are of several versions of DeepSpeed: {', '.join(sorted(set(versions)))}"
        )
    if stage == 3:
        frozen, weights = _frozen_stage3(models)
    else:
        with _reading(models[0]):
            frozen, weights = _weights_stage12(first, learning, aliases)
    pieces = _place_stage3(ranks, learning) if stage == 3 else _place_stage12(ranks, groups, archives)
    return DeepSpeedCheckpoint(
        path=place,
        version=versions[0],
        stage=stage,
        ranks=world,
        step=clock["global_steps"],
        samples=clock["global_samples"],
        skipped=clock["skipped_steps"],
        optimizer_step=ranks[0].step,
        kinds=tuple(ranks[0].flats),
        shapes=learning | frozen,
        frozen=tuple(frozen),
        aliases=aliases,
        _pieces=pieces,
        _ranks=ranks,
        _weights=weights,
    )


def _read_stage12(archive: Archive, state: Mapping[str, Any]) -> _Rank:
    masters = [_vector(flat) for flat in _typed(state["single_partition_of_fp32_groups"], list)]
    padding = [_count(size) for size in state["group_paddings"]]
    base = state["base_optimizer_state"]
    if isinstance(base, list):  # elastic: a state for each group
        entries, step = base, state.get("base_optimizer_state_step")
    else:
        entries, step = _entries(base)
    # Stages 1 and 2 leave the padding out of what they save, BF16_Optimizer does not.
    lean = "zero_stage" in state
    sizes = [flat.numel + (extra if lean else 0) for flat, extra in zip(masters, padding, strict=True)]
    return _rank(archive, masters, entries, sizes, padding, step)


def _read_stage3(archive: Archive, state: Mapping[str, Any]) -> _Rank:
    masters = [_vector(flat) for flat in _typed(state["fp32_flat_groups"], list)]
    entries, step = _entries(state["optimizer_state_dict"])
    return _rank(archive, masters, entries, [flat.numel for flat in masters], [0] * len(masters), step)


def _entries(base: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The state of each flat of a torch optimiser, and the step where its groups hold it."""
    groups = _typed(base["param_groups"], list)
    order = [number for group in groups for number in _typed(group["params"], list)]
    return [base["state"].get(number, {}) for number in order], groups[0].get("step") if groups else None


def _rank(
    archive: Archive,
    masters: list[StoredTensor],
    entries: Sequence[Any],
    sizes: list[int],
    padding: list[int],
    step: Any,
) -> _Rank:
    _expect(len(entries) == len(masters), f"it holds {len(masters)} flat groups and the state of {len(entries)}")
    flats = {"master": masters}
    steps = {_step(step)} if step is not None else set()
    full = [place for place, flat in enumerate(masters) if flat.numel]
    for kind in (*MOMENTS, "ema"):
        if full and all(kind in _typed(entries[place], dict) for place in full):
            flats[kind] = [_vector(entry[kind]) if kind in entry else masters[i] for i, entry in enumerate(entries)]
            for flat, master in zip(flats[kind], masters, strict=True):
                _expect(flat.numel >= master.numel, f"{flat.numel} elements of {kind} for {master.numel} of the master")
    steps |= {_step(entries[place]["step"]) for place in full if "step" in entries[place]}
    _expect(len(steps) < 2, f"its groups are of several steps: {sorted(steps)}")
    return _Rank(archive.path, flats, sizes, padding, min(steps, default=None))


def _place_stage12(
    ranks: Sequence[_Rank], groups: Sequence[_Shapes], archives: Sequence[Archive]
) -> dict[str, list[_Piece]]:
    """Where the elements of each parameter lie: the parameters of a group one behind the other, over all ranks."""
    pieces: dict[str, list[_Piece]] = {}
    gaps = _alignment_gaps(archives[0], groups)
    for number, shapes in enumerate(groups):
        for rank, archive in zip(ranks, archives, strict=True):
            with _reading(archive):
                _expect(len(rank.sizes) == len(groups), f"it has {len(rank.sizes)} groups of parameters")
                _expect(rank.sizes[number] == ranks[0].sizes[number], "its part of a group is of another size")
        held = sum(rank.sizes[number] - rank.padding[number] for rank in ranks)
        wanted = sum(map(math.prod, shapes.values())) + sum(gaps[number])
        with _reading(archives[0]):
            _expect(wanted == held, f"the parameters of group {number} have {wanted} elements, the ranks hold {held}")
        size, place = ranks[0].sizes[number], 0
        for (name, shape), gap in zip(shapes.items(), gaps[number], strict=True):
            begin, end = place, place + math.prod(shape)
            pieces[name] = []
            for rank_number in range(begin // size, -(-end // size)) if end > begin else ():
                low, high = max(begin, rank_number * size), min(end, (rank_number + 1) * size)
                pieces[name].append(_Piece(rank_number, number, low - begin, low - rank_number * size, high - low))
            place = end + gap
    return pieces


def _alignment_gaps(archive: Archive, groups: Sequence[_Shapes]) -> list[list[int]]:
    """Elements left free behind each parameter of each group."""
    with _reading(archive):
        stored = archive.tree["optimizer_state_dict"].get("param_alignment_paddings")
        gaps = [[_count(gap) for gap in gaps] for gaps in stored] if stored else [[0] * len(group) for group in groups]
        _expect(list(map(len, gaps)) == list(map(len, groups)), "its paddings are of other parameters")
    return gaps


def _place_stage3(ranks: Sequence[_Rank], learning: _Shapes) -> dict[str, list[_Piece]]:
    """Where the elements of each parameter lie: its equal parts at the same place in the flats of each rank."""
    parts = {name: -(-math.prod(shape) // len(ranks)) for name, shape in learning.items()}
    for rank in ranks:
        if rank.sizes != ranks[0].sizes or sum(rank.sizes) != sum(parts.values()):
            raise UserError(
                f"{rank.path} holds {sum(rank.sizes)} elements in {len(rank.sizes)} flat groups; by the shapes of the "
                f"parameters there would be {sum(parts.values())}, as many in each as in {ranks[0].path.name}"
            )
    ends = [sum(ranks[0].sizes[: number + 1]) for number in range(len(ranks[0].sizes))]
    pieces: dict[str, list[_Piece]] = {}
    place = 0
    for name, part in parts.items():
        pieces[name] = []
        size = math.prod(learning[name])
        for rank_number in range(len(ranks)):
            first = rank_number * part
            begin, stop = place, place + max(0, min(part, size - first))  # the last ranks hold padding
            for flat, end in enumerate(ends):
                base = end - ranks[0].sizes[flat]
                low, high = max(begin, base), min(stop, end)
                if low < high:
                    pieces[name].append(_Piece(rank_number, flat, first + low - begin, low - base, high - low))
        place += part
    return pieces


def _weights_stage12(
    model: Mapping[str, Any], learning: _Shapes, aliases: Mapping[str, str]
) -> tuple[_Shapes, dict[str, list[StoredTensor]]]:
    """Shapes of the frozen parameters, and all weights: one file holds the whole network."""
    buffers = set(model.get("buffer_names") or ())
    weights = {}
    for name, tensor in _typed(model["module"], dict).items():
        if _name(name) not in buffers and name not in aliases:
            weights[name] = [_typed(tensor, StoredTensor)]
            shape = learning.get(name, tensor.shape)
            _expect(tensor.shape == shape, f"{name} has shape {tensor.shape}, not {shape}")
    return {name: parts[0].shape for name, parts in weights.items() if name not in learning}, weights


def _frozen_stage3(models: Sequence[Archive]) -> tuple[_Shapes, dict[str, list[StoredTensor]]]:
    """Shapes of the frozen parameters, and the part of each that every rank holds."""
    frozen: _Shapes = {}
    weights: dict[str, list[StoredTensor]] = {}
    for model in models:
        with _reading(model):
            frozen = frozen or _shapes(model.tree.get("frozen_param_shapes") or {})
            for name, shape in frozen.items():
                part = _vector(model.tree["frozen_param_fragments"][name])
                wanted = -(-math.prod(shape) // len(models))
                _expect(part.numel == wanted, f"its part of {name} has {part.numel} elements, not {wanted}")
                weights.setdefault(name, []).append(part)
    return frozen, weights


@contextlib.contextmanager
def _reading(archive: Archive) -> Iterator[None]:
    """Say of which file it is that does not hold what it should."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        what = printable(f"it lacks {error}" if isinstance(error, KeyError) else str(error))
        raise UserError(f"{archive.path} is no file of a DeepSpeed checkpoint that can be read: {what}") from None


def _expect(fits: bool, otherwise: str) -> None:
    if not fits:
        raise ValueError(otherwise)


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where a {kind.__name__} belongs")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**60:
        raise TypeError(f"{str(value)[:60]} is no count")
    return value


def _step(value: Any) -> int:
    """A step, which torch keeps as an fp32 scalar and others as a number."""
    if isinstance(value, StoredTensor):
        _expect(value.numel == 1, f"a step of shape {value.shape}")
        value = value.whole().item()
    _expect(isinstance(value, int | float) and value == int(value), f"{str(value)[:60]} is no step")
    return _count(int(value))


def _vector(value: Any) -> StoredTensor:
    tensor: StoredTensor = _typed(value, StoredTensor)
    _expect(len(tensor.shape) == 1 and tensor.dtype.is_floating_point, f"a flat group of shape {tensor.shape}")
    return tensor


def _name(value: Any) -> str:
    """The name of a parameter, fit for messages."""
    name: str = _typed(value, str)
    _expect(name.isprintable() and " " not in name and 0 < len(name) <= 500, f"{name[:60]!r} as a parameter's name")
    return name


def _shapes(group: Any) -> _Shapes:
    return {_name(name): tuple(map(_count, shape)) for name, shape in _typed(group, dict).items()}
