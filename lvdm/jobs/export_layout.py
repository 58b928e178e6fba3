"""From a run or an exported folder to a file in another code base's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lvdm.config import DiffusionConfig, parse_config
from lvdm.diffusion.schedules import build_schedule
from lvdm.engine.checkpoint import Checkpoint, Damaged, open_checkpoint
from lvdm.errors import UserError
from lvdm.inference import TEXT_FOLDER, VAE_FOLDER
from lvdm.jobs.import_checkpoint import REST_FILE
from lvdm.models.frozen import find_model, weight_files
from lvdm.storage import atomic_file, read_json
from lvdm.weights.conversion import LazyTensor, Mismatch, Source
from lvdm.weights.layouts import LAYOUTS
from lvdm.weights.native import CONFIG_FILE, Weights, read_model
from lvdm.weights.torch_file import write_torch_file


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


def open_source(source: Path) -> Exportable:
    """A run's newest checkpoint, or an exported folder. Raises `UserError`."""
    if (source / CONFIG_FILE).is_file():
        document, weights = read_model(source)
        main, origin = Source(document["model"], _lazy(weights)), document.get("provenance") or {}
        return Exportable(main, None, document.get("training") or {}, document.get("facts") or {}, origin, 0)
    checkpoint = open_checkpoint(source)
    manifest = checkpoint.manifest
    model = manifest.config["model"]
    main, live = (Source(model, _fragments(checkpoint, kind)) for kind in ("ema", "master"))
    origin = {"checkpoint": str(checkpoint.folder), "step": manifest.step, "written_by": manifest.written_by}
    return Exportable(main, live, manifest.config, manifest.facts, origin, manifest.step)


def export_layout(
    source: Path, target: Path, layout: str, progress: Callable[[int, int], None] | None = None
) -> dict[str, LazyTensor]:
    """Write a run's newest checkpoint or an exported folder as ``torch.save`` would its ``state_dict``.

    Args:
        source: run, checkpoint, or folder that `export_checkpoint` or `import_checkpoint` wrote.
        target: new ``.ckpt`` file.
        layout: a name of `lvdm.weights.layouts.LAYOUTS`.
        progress: called with (tensors done, tensors in all).
    Returns:
        The tensors written, unread.
    Raises:
        UserError: there is nothing to export, it does not fit the layout, or ``target`` exists; nothing was written.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout} is none of {', '.join(LAYOUTS)}")
    if target.exists():
        raise UserError(f"{target} already exists; name another file or remove it first")
    rest: dict[str, LazyTensor] = {}
    ours = open_source(source)
    if (source / REST_FILE).is_file() and ours.provenance.get("layout") == layout:
        rest = _lazy(Weights(source / REST_FILE))
    frozen = {name: _read(folder) for name, folder in frozen_folders(source, ours.training).items()}
    diffusion = parse_config(DiffusionConfig, ours.training.get("diffusion", {}), source=str(source))
    facts = {
        "tables": build_schedule(diffusion).tables(),
        "ema_decay": ours.training.get("optim", {}).get("ema_decay", 0.9999),
        "updates": ours.updates,
    }
    try:
        tensors = LAYOUTS[layout].from_ours({"": ours.main, **frozen}, ours.live, rest, facts)
    except Mismatch as fault:
        raise UserError(f"cannot export {source} as {layout}: {fault}") from None
    try:
        with atomic_file(str(target)) as temporary:
            write_torch_file(temporary, _watched(tensors, progress) if progress else tensors)
    except Damaged as fault:
        raise UserError(f"checkpoint is damaged: {fault}") from None
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    return tensors


def _lazy(weights: Weights) -> dict[str, LazyTensor]:
    dtypes = weights.dtypes()
    return {
        name: LazyTensor(shape, dtypes[name], lambda name=name: weights[name])  # type: ignore[misc]
        for name, shape in weights.shapes().items()
    }


def _fragments(checkpoint: Checkpoint, kind: str) -> dict[str, LazyTensor]:
    return {
        name: LazyTensor(tuple(shape), torch.float32, lambda name=name: checkpoint.parameter(kind, name))  # type: ignore[misc]
        for name, shape in checkpoint.manifest.shapes.items()
    }


def frozen_folders(source: Path, training: Mapping[str, Any]) -> dict[str, Path]:
    """The frozen models: those in the folder, or else those that the training config names. Raises `UserError`."""
    found = {}
    vae, text = training.get("vae") or {}, training.get("text") or {}
    if (source / VAE_FOLDER).is_dir():
        found[VAE_FOLDER] = source / VAE_FOLDER
    elif vae.get("kind") == "lvdm":
        found[VAE_FOLDER] = Path(vae["folder"])
    elif vae:
        found[VAE_FOLDER] = _named(vae, "diffusion_pytorch_model")
    if (source / TEXT_FOLDER).is_dir():
        found[TEXT_FOLDER] = source / TEXT_FOLDER
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


def _watched(tensors: Mapping[str, LazyTensor], progress: Callable[[int, int], None]) -> dict[str, LazyTensor]:
    """The same tensors, each counted when it is read; second names stay second names."""
    once: dict[int, LazyTensor] = {}
    done = 0

    def watch(lazy: LazyTensor) -> LazyTensor:
        def read() -> torch.Tensor:
            nonlocal done
            done += 1
            progress(done, len(once))
            return lazy.read()

        return LazyTensor(lazy.shape, lazy.dtype, read)

    for lazy in tensors.values():
        once.setdefault(id(lazy), watch(lazy))
    return {name: once[id(lazy)] for name, lazy in tensors.items()}
