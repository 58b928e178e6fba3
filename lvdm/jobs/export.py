"""From a checkpoint's fragments to one folder that anybody can load: weights, config, and the autoencoder with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

import lvdm
from lvdm.checkpoint.manifest import MODEL
from lvdm.checkpoint.reader import Checkpoint
from lvdm.config import OwnVAE, parse_config
from lvdm.errors import UserError
from lvdm.inference import VAE_FOLDER, own_vae_weights
from lvdm.jobs.export_source import KINDS, NEWEST, Choice, lazy_weights, watched, with_checkpoints
from lvdm.weights.conversion import cast
from lvdm.weights.native import SHARDED, Writing, save_model, weight_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of exported weights by what a user calls them."""
_UNITS = {"": 1, "B": 1} | {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    checkpoints: list[str]
    """Location of each checkpoint that was read."""
    files: int
    """Files of weights."""
    bytes: int
    """Their size."""


def export_checkpoint(
    source: str | Path,
    target: str | Path,
    choice: Choice = NEWEST,
    *,
    dtype: str = "fp32",
    writing: Writing = SHARDED,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Exported:
    """Write the weights of a checkpoint, or the mean of several, straight from the fragments, one tensor at a time.

    Args:
        source: a run's folder or a folder of checkpoints (the newest good one is taken), or one checkpoint; any of them
            may be an fsspec URL.
        target: new folder; for a diffusion model it also gets the autoencoder, if that is one of ours.
        dtype: a name of `DTYPES`.
        progress: called with (bytes of weights done, bytes in all).
        note: called with what the user should know, such as a damaged checkpoint that was passed over.
    Raises:
        UserError: no good checkpoint, ``target`` exists or cannot be written, or a value does not fit ``dtype``.
    """
    target = Path(target)
    check_target(target, "output folder")

    def write(checkpoints: list[Checkpoint]) -> Exported:
        tensors = lazy_weights(checkpoints, KINDS[choice.weights], choice.network)
        if dtype != "fp32":
            tensors = cast(tensors, DTYPES[dtype])
        tensors = watched(tensors, progress, passes=1 + writing.verify)
        document = _document(checkpoints, choice, dtype)
        try:
            save_model(target, tensors, document, parts=_parts(checkpoints[0], choice.network), writing=writing)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from None
        files = weight_files(target)
        return Exported([one.location for one in checkpoints], len(files), sum(file.stat().st_size for file in files))

    return with_checkpoints(source, choice, write, note)


def check_target(target: Path, what: str) -> None:
    """Raise `UserError` where ``target`` exists, or is an URL, of which a path makes a folder of that name here."""
    if re.match(r"[a-z][a-z0-9+.]+:/", str(target)):
        raise UserError(f"{target} is an URL; name a folder on this machine, and copy it there once it is whole")
    if target.exists():
        raise UserError(f"{target} already exists; name another {what} or remove it first")


def _document(checkpoints: Sequence[Checkpoint], choice: Choice, dtype: str) -> dict[str, Any]:
    first = checkpoints[0].manifest
    return {
        "model": _model(first.config, choice.network),
        "training": first.config,
        "facts": first.facts,
        "weights": choice.weights,
        "provenance": {
            **provenance(checkpoints),
            "network": choice.network,
            "dtype": dtype,
            "exported_by": f"lvdm {lvdm.__version__}",
        },
    }


def provenance(checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Where weights are from; a mean has all its checkpoints in ``mean_of``."""
    listed = [
        {
            "checkpoint": checkpoint.location,
            "step": checkpoint.manifest.step,
            "samples": checkpoint.manifest.clock.get("samples"),
            "written_by": checkpoint.manifest.written_by,
        }
        for checkpoint in checkpoints
    ]
    return listed[0] | ({"mean_of": listed} if len(listed) > 1 else {})


def _model(config: dict[str, Any], network: str) -> dict[str, Any]:
    """The config section of a network; one that has none is known by its name."""
    section = config.get(network)
    return section if isinstance(section, dict) else {"kind": network}


def _parts(checkpoint: Checkpoint, network: str) -> dict[str, Path]:
    """The autoencoder that goes with a diffusion model, if it is one of ours."""
    if network != MODEL:
        return {}
    vae = checkpoint.manifest.config.get("vae") or {}
    if vae.get("kind") != "lvdm":
        return {}
    config = parse_config(OwnVAE, vae, source=checkpoint.location)
    return {VAE_FOLDER: own_vae_weights(config)[0].parent}


def bytes_of(text: str) -> int:
    """A size such as ``5GB``, ``500 MB`` or ``2GiB``. Raises `UserError`."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text.strip())
    size = int(Fraction(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if size < 1:
        raise UserError(f"--shard-size {text!r} is no size such as 5GB or 500MB")
    return size
