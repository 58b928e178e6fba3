"""From a run or an exported folder to what diffusers loads: ModelScope's UNet or pipeline, Stable Diffusion's UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import lvdm
from lvdm.config import DiffusionConfig, parse_config
from lvdm.engine.checkpoint import Damaged
from lvdm.errors import UserError
from lvdm.inference import TEXT_FOLDER, TOKENIZER_FOLDER, VAE_FOLDER
from lvdm.jobs.export_layout import Exportable, frozen_folders, open_source
from lvdm.models.frozen import TOKENIZER_FILES, find_model
from lvdm.storage import atomic_file, read_json
from lvdm.weights.conversion import LazyTensor
from lvdm.weights.diffusers import scheduler_config, write_pipeline, write_unet3d
from lvdm.weights.native import CONFIG_FILE, write_safetensors
from lvdm.weights.stable_diffusion import deflate, write_unet2d


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a model, each read, and counted, when it is asked for."""

    def __init__(self, lazy: Mapping[str, LazyTensor], progress: Callable[[int, int], None] | None) -> None:
        self._lazy = lazy
        self._progress = progress
        self._done = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._lazy[name].read()
        self._done += 1
        if self._progress:
            self._progress(self._done, len(self))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._lazy)

    def __len__(self) -> int:
        return len(self._lazy)


def export_relative(
    source: Path,
    target: Path,
    layout: str,
    weights: Literal["ema", "live"] = "ema",
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Write a ``modelscope_unet`` or the 2-D part of a ``text_unet`` for diffusers.

    Args:
        source: run, checkpoint, or folder that `export_checkpoint` or one of the imports wrote.
        target: new folder; for ``sd-unet`` a name with ``.safetensors`` is a file of CompVis' layout.
        layout: ``diffusers-unet3d`` (a whole pipeline where the other models are to be had) or ``sd-unet``.
        weights: averaged or live weights of a run.
        progress: called with (tensors done, tensors in all).
    Returns:
        What was written, in one line.
    Raises:
        UserError: there is nothing to export, it does not fit the layout, its latents are scaled by channel, or
            ``target`` exists; nothing was written.
    """
    if target.exists():
        raise UserError(f"{target} already exists; name another output or remove it first")
    ours = open_source(source)
    if any(isinstance(ours.facts.get(name), list) for name in ("scale", "shift")):
        raise UserError(
            f"{source} has a scale and shift for each channel of its latents; {layout} has no place for them"
        )
    main = ours.live if weights == "live" and ours.live else ours.main
    tensors = _Tensors(main.tensors, progress)
    provenance = {
        "source": str(source),
        "source_provenance": dict(ours.provenance),
        "layout": layout,
        "weights": weights if ours.live else "as in the source",
        "training": dict(ours.training),
        "exported_by": f"lvdm {lvdm.__version__}",
        "torch": torch.__version__,
    }
    side = int(ours.facts["latent_shape"][-1]) if "latent_shape" in ours.facts else 32
    try:
        if layout == "sd-unet":
            if target.suffix != ".safetensors":
                write_unet2d(target, main.config, tensors, provenance, side)
                return "UNet2DConditionModel; temporal attention is left out"
            theirs = deflate(main.config, tensors, "compvis")
            with atomic_file(str(target)) as temporary:
                write_safetensors(Path(temporary), theirs.items())
            return "the UNet of CompVis' layout; temporal attention is left out"
        try:
            parts, note = _pipeline_parts(source, ours)
        except UserError as fault:
            write_unet3d(target, main.config, tensors, provenance, side)
            return f"UNet3DConditionModel alone, without the rest of a pipeline: {fault}"
        write_pipeline(target, main.config, tensors, provenance, sample_size=side, **parts)
        return f"TextToVideoSDPipeline{note}"
    except Damaged as fault:
        raise UserError(f"checkpoint is damaged: {fault}") from None
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None


def _pipeline_parts(source: Path, ours: Exportable) -> tuple[dict[str, Any], str]:
    """What `write_pipeline` takes beside the UNet, and what its user should know.

    Raises:
        UserError: a model is missing, or is none that the pipeline has.
    """
    folders = frozen_folders(source, ours.training)
    missing = [name for name in (VAE_FOLDER, TEXT_FOLDER) if name not in folders]
    if missing:
        raise UserError(f"there is no {' and no '.join(missing)}")
    vae = read_json(folders[VAE_FOLDER] / CONFIG_FILE)
    if vae.get("_class_name") != "AutoencoderKL":
        raise UserError(f"the autoencoder in {folders[VAE_FOLDER]} is no AutoencoderKL")
    scale, shift = ours.facts.get("scale", 1.0), ours.facts.get("shift", 0.0)
    if (scale, shift) != (vae.get("scaling_factor", 0.18215), 0.0) or vae.get("shift_factor"):
        raise UserError(
            f"the model's latents are scaled by {scale} and shifted by {shift}, its autoencoder's otherwise"
        )
    kind = read_json(folders[TEXT_FOLDER] / CONFIG_FILE).get("model_type")
    if kind not in ("clip", "clip_text_model"):
        raise UserError(f"the text encoder in {folders[TEXT_FOLDER]} is a {kind}, not CLIP's")
    tokenizer, text = source / TOKENIZER_FOLDER, ours.training.get("text") or {}
    if not tokenizer.is_dir():
        if not text:
            raise UserError(f"there is no {TOKENIZER_FOLDER}")
        folder = TOKENIZER_FOLDER if text.get("subfolder") else ""
        tokenizer = find_model(text["name"], folder, [f"{folder}/{f}" if folder else f for f in TOKENIZER_FILES])
    diffusion = parse_config(DiffusionConfig, ours.training.get("diffusion", {}), source=str(source))
    parts = {
        "vae": folders[VAE_FOLDER],
        "text_encoder": folders[TEXT_FOLDER],
        "tokenizer": tokenizer,
        "scheduler": scheduler_config(diffusion.model_dump()),
    }
    masked = text.get("mask_padding", True) and bool(text)
    return parts, "; it attends to padding, which text.mask_padding: true did not" if masked else ""
