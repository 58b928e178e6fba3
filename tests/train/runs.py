"""What the ranks of the run tests do."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import fsspec
import torch

from lvdm.checkpoint.folder import CheckpointFolder, open_checkpoint
from lvdm.config import LatentDiffusionTraining, parse_training_config
from lvdm.engine import distributed, saving
from lvdm.engine.engine import Engine
from lvdm.engine.signals import StopRequest
from lvdm.train.latent_diffusion import LatentDiffusionTask
from lvdm.train.loop import train
from lvdm.train.run_folder import RunFolder

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def run(tree: dict[str, Any], s3: dict[str, str] | None = None) -> str:
    """Train a config tree on this rank, as ``launch/train.py`` does; what it printed.

    Args:
        s3: settings of a store, which go where users have them: into the environment.
    """
    os.environ.update({f"FSSPEC_S3_{name.upper()}": value for name, value in (s3 or {}).items()})
    fsspec.config.set_conf_env(fsspec.config.conf)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train(parse_training_config(tree, source="test"), StopRequest())
    return said.getvalue()


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint, whole, by kind and name."""
    checkpoint = open_checkpoint(folder)
    return {
        f"{kind} {name}": checkpoint.parameter(kind, name) for kind in KINDS for name in checkpoint.network().shapes
    }


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What a run's log says of each step; training, validation and the times each write a line of their own."""
    steps: dict[int, dict[str, Any]] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        values = json.loads(line)
        known = steps.setdefault(values["step"], {"step": values["step"]})
        twice = {name for name in known.keys() & values.keys() - {"step"} if not name.startswith("seconds/")}
        assert not twice, f"step {values['step']} has {sorted(twice)} twice"
        known |= values
    return list(steps.values())


def samples_of(folder: Path) -> dict[int, list[tuple[int, int]]]:
    """Position and checksum of the samples that each step took, on all ranks together, in the order of positions."""
    steps: dict[int, list[tuple[int, int]]] = {}
    for file in (folder / "seen").glob("rank-*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            steps.setdefault(line["step"], []).extend(zip(line["positions"], line["crc32"], strict=True))
    return {step: sorted(samples) for step, samples in sorted(steps.items())}


def losses_of(folder: Path) -> list[float]:
    """Training losses by step."""
    return [line["loss"] for line in log_of(folder) if "loss" in line]


def averaged_output(tree: dict[str, Any]) -> torch.Tensor:
    """Output for a fixed input of a run's newest checkpoint, restored into the engine, with the averaged weights."""
    config = parse_training_config(tree, source="test")
    assert isinstance(config, LatentDiffusionTraining)
    ranks = distributed.start(60)
    try:
        task = LatentDiffusionTask(config, ranks.device, torch.float32)
        engine = Engine(task.model, config.engine, config.batch, config.optim, ranks)
        saving.restore({"model": engine}, saving.Resumption(CheckpointFolder(RunFolder(config).checkpoints), ranks))
        with engine.averaged_weights(), engine.evaluating():
            return engine(*probe(task.latent_shape, config.model.context_dim))
    finally:
        distributed.stop()


def probe(latent_shape: tuple[int, ...], context_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A fixed input of a text UNet."""
    generator = torch.Generator().manual_seed(3)
    z_BCTHW = torch.randn(2, *latent_shape, generator=generator)
    return z_BCTHW, torch.tensor([10, 700]), torch.randn(2, 5, context_dim, generator=generator)


def wait_for_step(folder: Path, step: int, timeout: float = 60) -> None:
    """Wait until the log of a run has so many lines."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (folder / "log.jsonl").is_file() and len((folder / "log.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {timeout} s")
