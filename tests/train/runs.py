"""What the ranks of the run tests do."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from lvdm.config import parse_training_config
from lvdm.engine.checkpoint import open_checkpoint
from lvdm.train.loop import train

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def run(tree: dict[str, Any]) -> str:
    """Train a config tree on this rank, as ``launch/train.py`` does; what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train(parse_training_config(tree, source="test"))
    return said.getvalue()


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint, whole, by kind and name."""
    checkpoint = open_checkpoint(folder)
    return {f"{kind} {name}": checkpoint.parameter(kind, name) for kind in KINDS for name in checkpoint.manifest.shapes}


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[float]:
    """Training losses by step."""
    return [line["loss"] for line in log_of(folder) if "loss" in line]
