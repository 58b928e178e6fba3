"""From a run or an exported folder to a file in another code base's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lvdm.checkpoint.reader import Checkpoint
from lvdm.config import DiffusionConfig, parse_config
from lvdm.diffusion.schedules import build_schedule
from lvdm.errors import UserError
from lvdm.inference import TEXT_FOLDER, VAE_FOLDER
from lvdm.jobs.export import check_target, provenance
from lvdm.jobs.export_source import NEWEST, Choice, exported_folder, lazy_weights, watched, with_checkpoints
from lvdm.jobs.import_checkpoint import REST_FILE
from lvdm.models.frozen import find_model, weight_files
from lvdm.storage import atomic_file, read_json
from lvdm.weights.conversion import LazyTensor, Mismatch, Source
from lvdm.weights.layouts import LAYOUTS
from lvdm.weights.lvdm_release import ClipLayout
from lvdm.weights.native import CONFIG_FILE, Weights, read_model
from lvdm.weights.torch_file import write_torch_file

T = TypeVar("T")


class Exportable(NamedTuple):
    """A model of ours to be handed to another code base."""

    main: Source
    """The network; of a run with averaged weights."""
    live: Source | None
    """Of a run, the network with its live weights."""
    training: Mapping[str, Any]
    """The training config; empty where there is none."""
    facts: Mapping[str, Any]
    """What the run or the import knew of its data."""
    provenance: Mapping[str, Any]
    """Where it is from."""
    updates: int
    """Optimiser steps that were averaged."""


def with_source(
    source: str | Path,
    choice: Choice,
    action: Callable[[Exportable], T],
    note: Callable[[str], None] | None = None,
) -> T:
    """What ``action`` gives for the checkpoints of a source, as `with_checkpoints` does, or for an exported folder.

    Raises:
        UserError: as `with_checkpoints`, or checkpoints are chosen of an exported folder, or live weights of one that
            holds averaged ones.
    """
    if (exported := exported_folder(source)) is not None:
        if choice.average != 1 or choice.also or choice.best:
            raise UserError(f"{source} is an exported folder; --average, --also and --best take checkpoints")
        document, weights = read_model(exported)
        if choice.weights == "live" and document.get("weights") != "live":
            raise UserError(f"{source} holds averaged weights alone; export the live ones of a run or a checkpoint")
        main, origin = Source(document["model"], _lazy(weights)), document.get("provenance") or {}
        return action(Exportable(main, None, document.get("training") or {}, document.get("facts") or {}, origin, 0))

    def opened(checkpoints: list[Checkpoint]) -> T:
        manifest = checkpoints[0].manifest
        main, live = (Source(manifest.config["model"], lazy_weights(checkpoints, kind)) for kind in ("ema", "master"))
        origin = provenance(checkpoints)
        return action(Exportable(main, live, manifest.config, manifest.facts, origin, manifest.step))

    return with_checkpoints(source, choice, opened, note)


def export_layout(
    source: str | Path,
    target: Path,
    layout: str,
    choice: Choice = NEWEST,
    *,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, LazyTensor]:
    """Write a run's newest checkpoint or an exported folder as ``torch.save`` would its ``state_dict``.

    Args:
        source: run, checkpoint, or folder that `export_checkpoint` or `import_checkpoint` wrote.
        target: new ``.ckpt`` file.
        layout: a name of `lvdm.weights.layouts.LAYOUTS`.
        choice: which checkpoints, and which weights where the layout has a place for one kind.
        verify: read the file again and compare every tensor.
        progress: called with (bytes done, bytes in all).
        note: called with what the user should know.
    Returns:
        The tensors written, unread.
    Raises:
        UserError: there is nothing to export, it does not fit the layout, or ``target`` exists; nothing was written.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout} is none of {', '.join(LAYOUTS)}")
    if choice.weights == "live" and isinstance(LAYOUTS[layout], ClipLayout):
        raise UserError(f"--layout {layout} has both the averaged and the live weights; leave --weights out")
    check_target(target, "file")

    def write(ours: Exportable) -> dict[str, LazyTensor]:
        if choice.weights == "live" and ours.live:
            ours = ours._replace(main=ours.live)
        tensors = _tensors(source, ours, layout)
        try:
            with atomic_file(str(target)) as temporary:
                write_torch_file(temporary, watched(tensors, progress, passes=1 + verify), verify)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from None
        return tensors

    return with_source(source, choice, write, note)


def _tensors(source: str | Path, ours: Exportable, layout: str) -> dict[str, LazyTensor]:
    """Every tensor of the file. Raises `UserError` where the model does not fit the layout."""
    exported, rest = exported_folder(source), dict[str, LazyTensor]()
    if exported and (exported / REST_FILE).is_file() and ours.provenance.get("layout") == layout:
        rest = _lazy(Weights(exported / REST_FILE))
    frozen = {name: _read(folder) for name, folder in frozen_folders(exported, ours.training).items()}
    diffusion = parse_config(DiffusionConfig, ours.training.get("diffusion", {}), source=str(source))
    facts = {
        "tables": build_schedule(diffusion).tables(),
        "ema_decay": ours.training.get("optim", {}).get("ema_decay", 0.9999),
        "updates": ours.updates,
    }
    try:
        return LAYOUTS[layout].from_ours({"": ours.main, **frozen}, ours.live, rest, facts)
    except Mismatch as fault:
        raise UserError(f"cannot export {source} as {layout}: {fault}") from None


def _lazy(weights: Weights) -> dict[str, LazyTensor]:
    dtypes = weights.dtypes()
    return {
        name: LazyTensor(shape, dtypes[name], lambda name=name: weights[name])  # type: ignore[misc]
        for name, shape in weights.shapes().items()
    }


def frozen_folders(exported: Path | None, training: Mapping[str, Any]) -> dict[str, Path]:
    """The frozen models: those in the exported folder, or else those that the training config names.

    Raises:
        UserError: one cannot be had.
    """
    found = {}
    vae, text = training.get("vae") or {}, training.get("text") or {}
    if exported and (exported / VAE_FOLDER).is_dir():
        found[VAE_FOLDER] = exported / VAE_FOLDER
    elif vae.get("kind") == "lvdm":
        found[VAE_FOLDER] = Path(vae["folder"])
    elif vae:
        found[VAE_FOLDER] = _named(vae, "diffusion_pytorch_model")
    if exported and (exported / TEXT_FOLDER).is_dir():
        found[TEXT_FOLDER] = exported / TEXT_FOLDER
    elif text:
        found[TEXT_FOLDER] = _named(text, "model")
    return found


def _named(config: Mapping[str, Any], stem: str) -> Path:
    subfolder = config.get("subfolder", "")
    files = [f"{subfolder}/{file}" if subfolder else file for file in (CONFIG_FILE, f"{stem}.safetensors")]
    return find_model(config["name"], subfolder, files)


def _read(folder: Path) -> Source:
    """Config and tensors of a model of ours, of diffusers or of transformers."""
    config = read_json(folder / CONFIG_FILE)
    if isinstance(config.get("model"), dict):
        document, weights = read_model(folder)
        return Source(document["model"], _lazy(weights))
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    tensors: dict[str, LazyTensor] = {}
    for file in weight_files(folder, stem):
        tensors |= _lazy(Weights(file))
    text = config.get("text_config")  # of a whole CLIP, the text half
    return Source(text if isinstance(text, dict) else config, tensors)
