"""From a run or an exported folder to a file in another code base's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lvdm.config import DiffusionConfig, parse_config
from lvdm.diffusion.schedules import build_schedule
from lvdm.engine.checkpoint import Checkpoint, Damaged, open_checkpoint
from lvdm.errors import UserError
from lvdm.inference import TEXT_FOLDER, VAE_FOLDER
from lvdm.jobs.import_checkpoint import REST_FILE
from lvdm.models.frozen import find_model, weight_files
from lvdm.storage import atomic_file
from lvdm.weights.conversion import LazyTensor, Mismatch, Source
from lvdm.weights.layouts import LAYOUTS
from lvdm.weights.native import CONFIG_FILE, Weights, read_json, read_model
from lvdm.weights.torch_file import write_torch_file


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
    if (source / CONFIG_FILE).is_file():
        document, weights = read_model(source)
        main, live = Source(document["model"], _lazy(weights)), None
        training, updates = document.get("training") or {}, 0
        if (source / REST_FILE).is_file() and document.get("provenance", {}).get("layout") == layout:
            rest = _lazy(Weights(source / REST_FILE))
    else:
        checkpoint = open_checkpoint(source)
        training, updates = checkpoint.manifest.config, checkpoint.manifest.step
        main = Source(training["model"], _fragments(checkpoint, "ema"))
        live = Source(training["model"], _fragments(checkpoint, "master"))
    sources = {"": main, **_frozen(source, training)}
    diffusion = parse_config(DiffusionConfig, training.get("diffusion", {}), source=str(source))
    facts = {
        "tables": build_schedule(diffusion).tables(),
        "ema_decay": training.get("optim", {}).get("ema_decay", 0.9999),
        "updates": updates,
    }
    try:
        tensors = LAYOUTS[layout].from_ours(sources, live, rest, facts)
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


def _frozen(source: Path, training: Mapping[str, Any]) -> dict[str, Source]:
    """The frozen models: those in the folder, or else those that the training config names."""
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
    return {name: _read(folder) for name, folder in found.items()}


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
