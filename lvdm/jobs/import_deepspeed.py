"""From a checkpoint of DeepSpeed's own to a run folder of ours, which training goes on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lvdm
from lvdm.checkpoint.blocks import Damaged, write_blocks
from lvdm.checkpoint.folder import CheckpointFolder
from lvdm.checkpoint.manifest import MODEL, Manifest, Network, StoredFile
from lvdm.checkpoint.pieces import ELEMENT, FROZEN, KINDS, Piece, lay_out
from lvdm.checkpoint.reader import check_shapes
from lvdm.config import AnyTraining, dump_yaml
from lvdm.errors import UserError
from lvdm.models.build import build_model
from lvdm.models.trainable import freeze_all_but
from lvdm.storage import new_folder, write_text
from lvdm.weights.deepspeed_files import MOMENTS, DeepSpeedCheckpoint, open_deepspeed

FILE_SIZE = 256 << 20
"""Bytes of state in a file of the checkpoint: what is held in memory at a time."""


class Imported(NamedTuple):
    """What an import wrote, and from what."""

    location: str
    """The new checkpoint."""
    version: str
    """Of the DeepSpeed that wrote the files."""
    stage: int
    ranks: int
    step: int
    parameters: int
    """Numbers that they have together."""
    kinds: tuple[str, ...]
    """What the files held of each element; the rest was made: moments of zero, an average equal to the weights."""


def import_deepspeed(
    source: Path,
    target: Path,
    config: AnyTraining,
    *,
    trust: bool,
    tag: str = "",
    prefix: str = "",
    weights_only: bool = False,
    facts: Callable[[], dict[str, Any]] | None = None,
    file_size: int = FILE_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Write a run folder whose only checkpoint holds the masters, moments and step of DeepSpeed's files.

    Args:
        source: folder that DeepSpeed's ``save_checkpoint`` wrote, or that of one tag.
        target: new run folder.
        config: of the run that goes on; its model is the one in the files.
        trust: the user knows where the files come from.
        tag: by default the one that ``latest`` names.
        prefix: take only the parameters whose names begin so, and the names without it.
        weights_only: leave the moments, which the optimiser then starts anew.
        facts: finds out what `Manifest.facts` is to hold; called once the files are known to be good.
        file_size: bytes of state in a file, and in memory at a time.
        progress: called with (bytes written, bytes in all).
    Raises:
        UserError: a file is missing, damaged, refused or of another model, or ``target`` exists; nothing was written.
    """
    if not trust:
        raise UserError(
            f"{source} holds pickles, and a pickle from somebody else can be made to run code when it is read; the "
            f"reader here admits tensors, dicts and the few classes of DeepSpeed's own files, and refuses all else: "
            f"pass --trust if you know where the files come from"
        )
    if target.exists():
        raise UserError(f"{target} already exists; name another run folder or remove it first")
    config = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(target)})})
    files = open_deepspeed(source, tag)
    state = _State(files, config, prefix, weights_only)
    known = facts() if facts else {}
    with new_folder(target) as folder:
        (folder / "checkpoints").mkdir()
        checkpoints = CheckpointFolder(config.run.checkpoints or str(folder / "checkpoints"))
        if checkpoints.names():
            raise UserError(f"run.checkpoints {checkpoints.root} already holds checkpoints; name another place")
        _write(checkpoints, state, config, known, file_size, progress)
        write_text(folder / "config.yaml", dump_yaml(config))
    root = config.run.checkpoints or str(target / "checkpoints")
    return Imported(
        CheckpointFolder(root).location(f"step-{files.step:08d}"),
        files.version,
        files.stage,
        files.ranks,
        files.step,
        sum(torch.Size(shape).numel() for shape in state.shapes.values()),
        state.kinds,
    )


class _State:
    """The state in DeepSpeed's files by the names of our model."""

    def __init__(self, files: DeepSpeedCheckpoint, config: AnyTraining, prefix: str, weights_only: bool) -> None:
        """Raises `UserError` unless the files hold just the model that ``config`` describes."""
        self.files = files
        self.kinds = ("master",) if weights_only else files.kinds
        if not weights_only:
            _check_optimizer(files)
        with torch.device("meta"):
            model = build_model(config.model, seed=0)
        freeze_all_but(model, config.model.trainable)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._theirs = _our_names(files, prefix, self.shapes)
        check_shapes(
            {name: files.shapes[theirs] for name, theirs in self._theirs.items()}, self.shapes, str(files.path)
        )
        self.frozen = tuple(name for name in self.shapes if self._theirs[name] in files.frozen)
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if other := sorted(learning & set(self.frozen)) or sorted(self.shapes.keys() - learning - set(self.frozen)):
            raise UserError(
                f"in {files.path} other parameters learnt than model.trainable says ({other[0]} for one); change it"
            )
        for name in self.shapes:
            files.check_weights(self._theirs[name])

    @property
    def optimizer_step(self) -> int:
        """Steps that the moments are of."""
        if self.kinds == ("master",):
            return 0
        applied = self.files.optimizer_step
        return self.files.step - self.files.skipped if applied is None else applied

    def pieces(self) -> list[Piece]:
        """All that a checkpoint of ours holds, by kind."""
        sizes = {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}
        learning = [name for name in sizes if name not in self.frozen]
        found = [Piece(kind, MODEL, name, 0, sizes[name]) for kind in KINDS for name in learning]
        return found + [Piece(FROZEN, MODEL, name, 0, sizes[name]) for name in self.frozen]

    def read(self, piece: Piece) -> Tensor:
        """Its elements, an fp32 vector. Raises `UserError`."""
        theirs, end = self._theirs[piece.name], piece.start + piece.length
        if piece.kind == FROZEN:
            return self.files.read_frozen(theirs)[piece.start : end]
        if piece.kind in self.kinds:
            return self.files.read(piece.kind, theirs, piece.start, end)
        if piece.kind in MOMENTS:
            return torch.zeros(piece.length)
        return self.files.read("master", theirs, piece.start, end)  # no average yet: it starts as the weights


def _check_optimizer(files: DeepSpeedCheckpoint) -> None:
    missing = [kind for kind in MOMENTS if kind not in files.kinds]
    if missing:
        raise UserError(
            f"the optimiser's state in {files.path} has no {' and no '.join(missing)}, the moments of Adam; "
            f"--weights-only takes the weights alone"
        )
    applied = files.step - files.skipped
    if files.optimizer_step not in (None, applied):
        raise UserError(
            f"in {files.path} the optimiser has taken {files.optimizer_step} steps and the run {applied}: the files "
            f"are of different moments, or the optimiser was started anew on the way; --weights-only takes the weights "
            f"alone"
        )


def _our_names(files: DeepSpeedCheckpoint, prefix: str, wanted: Mapping[str, Any]) -> dict[str, str]:
    """The names in the files by ours; a second name of a shared parameter only where the model wants it."""
    if not prefix and all(name.startswith("module.") for name in files.shapes):
        prefix = "module."
    names = {name[len(prefix) :]: name for name in files.shapes if name.startswith(prefix)}
    if not names:
        raise UserError(
            f"--prefix {prefix}: no parameter in {files.path} begins so; one is {min(files.shapes, default='')}"
        )
    for alias, held in files.aliases.items():
        name = alias.removeprefix(prefix)
        if name in wanted and name not in names and held in files.shapes:
            names[name] = held
    return names


def _write(
    folder: CheckpointFolder,
    state: _State,
    config: AnyTraining,
    facts: dict[str, Any],
    file_size: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write and publish the checkpoint, a file of at most ``file_size`` bytes of state at a time."""
    files = state.files
    parts = list(_parted(state.pieces(), file_size // ELEMENT))
    sizes = [lay_out(part)[2] for part in parts]
    attempt = folder.begin(files.step, sum(sizes))
    stored: dict[str, StoredFile] = {}
    try:
        for number, part in enumerate(parts):
            data = _file_of(part, state)
            name = attempt.file_name(number)
            digests = write_blocks(f"{attempt.place}/{name}", memoryview(data))
            stored[name] = StoredFile(size=len(data), sha256=tuple(digests))
            del data  # before the next one is made
            if progress:
                progress(sum(sizes[: number + 1]), sum(sizes))
        folder.publish(attempt, _manifest(state, config, facts, stored))
    except BaseException as error:
        folder.abandon(attempt)
        if isinstance(error, (OSError, Damaged)):
            raise UserError(f"cannot write checkpoint {attempt.final}: {error}") from None
        raise


def _file_of(part: Sequence[Piece], state: _State) -> bytearray:
    """The bytes of the file that holds ``part``."""
    header, places, size = lay_out(part)
    data = bytearray(size)
    data[: len(header)] = header
    for piece, place in zip(part, places, strict=True):
        if piece.length:
            view = torch.frombuffer(data, dtype=torch.float32, count=piece.length, offset=place)
            view.copy_(state.read(piece))
    return data


def _parted(pieces: Sequence[Piece], most: int) -> Iterator[list[Piece]]:
    """The pieces in parts of at most ``most`` elements, cut where a part is full."""
    part: list[Piece] = []
    room = most
    for piece in pieces:
        start, left = piece.start, piece.length
        while True:
            length = min(left, room)
            part.append(Piece(piece.kind, piece.network, piece.name, start, length))
            start, left, room = start + length, left - length, room - length
            if not room:
                yield part
                part, room = [], most
            if not left:
                break
    if part:
        yield part


def _manifest(state: _State, config: AnyTraining, facts: dict[str, Any], stored: dict[str, StoredFile]) -> Manifest:
    files = state.files
    return Manifest(
        step=files.step,
        clock={"step": files.step, "samples": files.samples, "taken": files.samples},
        facts=facts,
        scores={},
        config=config.model_dump(mode="json"),
        written_by={
            "ranks": files.ranks,
            "zero_stage": files.stage,
            "deepspeed": files.version,
            "imported_by": f"lvdm {lvdm.__version__}",
            "imported_from": str(files.path),
            "imported": list(state.kinds),
            "skipped_steps": files.skipped,
            "torch": torch.__version__,
        },
        networks={MODEL: Network(optimizer_step=state.optimizer_step, shapes=state.shapes, frozen=state.frozen)},
        files=stored,
    )
