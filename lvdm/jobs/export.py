"""From a checkpoint's fragments to one folder that anybody can load: weights, config, and the autoencoder with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

import lvdm
from lvdm.config import OwnVAE, parse_training_config
from lvdm.engine.checkpoint import Checkpoint, Damaged, open_checkpoint
from lvdm.errors import UserError
from lvdm.inference import VAE_FOLDER, own_vae_weights
from lvdm.weights.native import save_model

KINDS = {"ema": "ema", "live": "master"}
"""What a checkpoint calls the weights that a user may ask for."""


def export_checkpoint(
    source: Path,
    target: Path,
    weights: Literal["ema", "live"] = "ema",
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Write the averaged or live fp32 weights of a checkpoint, straight from its fragments, one tensor at a time.

    Args:
        source: a run's folder (its newest good checkpoint is taken) or one checkpoint.
        target: new folder; for a diffusion model it also gets the autoencoder, if that is one of ours.
        progress: called with (parameters done, parameters in all).
    Returns:
        The checkpoint that was read.
    Raises:
        UserError: no good checkpoint, or ``target`` exists or cannot be written.
    """
    checkpoint = open_checkpoint(source)
    manifest = checkpoint.manifest
    config = parse_training_config(manifest.config, source=str(checkpoint.folder))
    vae = getattr(config, "vae", None)
    parts = {VAE_FOLDER: own_vae_weights(vae).parent} if isinstance(vae, OwnVAE) else {}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for done, name in enumerate(manifest.shapes, start=1):
            yield name, checkpoint.parameter(KINDS[weights], name)
            if progress:
                progress(done, len(manifest.shapes))

    document: dict[str, Any] = {
        "model": config.model.model_dump(mode="json"),
        "training": manifest.config,
        "facts": manifest.facts,
        "weights": weights,
        "provenance": {
            "checkpoint": str(checkpoint.folder),
            "step": manifest.step,
            "samples": manifest.clock["samples"],
            "written_by": manifest.written_by,
            "exported_by": f"lvdm {lvdm.__version__}",
        },
    }
    try:
        save_model(target, tensors(), document, parts=parts)
    except Damaged as fault:
        raise UserError(f"checkpoint is damaged: {fault}") from None
    return checkpoint
