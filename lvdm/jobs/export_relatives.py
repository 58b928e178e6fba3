"""From a run or an exported folder to what diffusers loads: ModelScope's UNet or pipeline, Stable Diffusion's UNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import lvdm
from lvdm.config import DiffusionConfig, parse_config
from lvdm.errors import UserError
from lvdm.inference import TEXT_FOLDER, TOKENIZER_FOLDER, VAE_FOLDER
from lvdm.jobs.export import DTYPES, check_target
from lvdm.jobs.export_layout import Exportable, frozen_folders, with_source
from lvdm.jobs.export_source import NEWEST, Choice, exported_folder, watched
from lvdm.models.frozen import TOKENIZER_FILES, find_model
from lvdm.storage import atomic_file, read_json
from lvdm.weights.conversion import Unread, cast
from lvdm.weights.diffusers import scheduler_config, write_pipeline, write_unet3d
from lvdm.weights.native import CONFIG_FILE, SHARDED, Writing, check_written, write_safetensors
from lvdm.weights.stable_diffusion import deflate, write_unet2d


def export_relative(
    source: str | Path,
    target: Path,
    layout: str,
    choice: Choice = NEWEST,
    *,
    dtype: str = "",
    writing: Writing = SHARDED,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> str:
    """Write a ``modelscope_unet`` or the 2-D part of a ``text_unet`` for diffusers, tensor by tensor.

    Args:
        source: run, checkpoint, or folder that `export_checkpoint` or one of the imports wrote.
        target: new folder; for ``sd-unet`` a name with ``.safetensors`` is a file of CompVis' layout.
        layout: ``diffusers-unet3d`` (a whole pipeline where the other models are to be had) or ``sd-unet``.
        choice: which checkpoints, and averaged or live weights.
        dtype: a name of `DTYPES` for the UNet; empty for the type that it is stored in. Other models are copied.
        writing: a file of CompVis' layout is one file whatever its size.
        progress: called with (bytes done, bytes in all).
        note: called with what the user should know.
    Returns:
        What was written, in one line.
    Raises:
        UserError: there is nothing to export, it does not fit the layout, its latents are scaled by channel, or
            ``target`` exists; nothing was written.
    """
    check_target(target, "output")

    def write(ours: Exportable) -> str:
        main = ours.live if choice.weights == "live" and ours.live else ours.main
        tensors = cast(main.tensors, DTYPES[dtype]) if dtype else dict(main.tensors)
        unread = Unread(watched(tensors, progress, passes=1 + writing.verify))
        about = {
            "source": str(source),
            "source_provenance": dict(ours.provenance),
            "layout": layout,
            "weights": choice.weights if ours.live else "as in the source",
            "dtype": dtype or "as in the source",
            "training": dict(ours.training),
            "exported_by": f"lvdm {lvdm.__version__}",
            "torch": torch.__version__,
        }
        try:
            return _write(source, ours, main.config, unread, target, layout, about, writing)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from None

    return with_source(source, choice, write, note)


def _write(
    source: str | Path,
    ours: Exportable,
    model: Mapping[str, Any],
    tensors: Unread,
    target: Path,
    layout: str,
    about: Mapping[str, Any],
    writing: Writing,
) -> str:
    """Write ``tensors`` of ``model`` with ``about`` as their provenance; what that is, in one line."""
    if any(isinstance(ours.facts.get(name), list) for name in ("scale", "shift")):
        raise UserError(
            f"{source} has a scale and shift for each channel of its latents; {layout} has no place for them"
        )
    side = int(ours.facts["latent_shape"][-1]) if "latent_shape" in ours.facts else 32
    if layout == "sd-unet" and target.suffix != ".safetensors":
        write_unet2d(target, model, tensors, about, side, writing)
        return "UNet2DConditionModel; temporal attention is left out"
    if layout == "sd-unet":
        theirs = deflate(model, tensors, "compvis").unread()
        with atomic_file(str(target)) as temporary:
            write_safetensors(Path(temporary), theirs)
            if writing.verify:
                check_written(Path(temporary), theirs)
        return "the UNet of CompVis' layout; temporal attention is left out"
    try:
        parts, note = _pipeline_parts(source, ours)
    except UserError as fault:
        write_unet3d(target, model, tensors, about, side, writing)
        return f"UNet3DConditionModel alone, without the rest of a pipeline: {fault}"
    write_pipeline(target, model, tensors, about, sample_size=side, writing=writing, **parts)
    return f"TextToVideoSDPipeline{note}"


def _pipeline_parts(source: str | Path, ours: Exportable) -> tuple[dict[str, Any], str]:
    """What `write_pipeline` takes beside the UNet, and what its user should know.

    Raises:
        UserError: a model is missing, or is none that the pipeline has.
    """
    exported = exported_folder(source)
    folders = frozen_folders(exported, ours.training)
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
    tokenizer, text = (exported or Path()) / TOKENIZER_FOLDER, ours.training.get("text") or {}
    if exported is None or not tokenizer.is_dir():
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
