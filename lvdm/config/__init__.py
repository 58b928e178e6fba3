"""Typed, strict configs. `load_training_config` reads what ``launch/train.py --config`` is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvdm.config.base import Section, dump_yaml, parse_config, parse_value, read_tree
from lvdm.config.models import (
    ModelScopeUNetConfig,
    SpaceTimeUNetConfig,
    TextUNetConfig,
    UNetConfig,
    VideoAutoencoderConfig,
)
from lvdm.config.sections import (
    AutoencoderTraining,
    BatchConfig,
    Bucket,
    ClipConfig,
    Condition,
    DataConfig,
    DiffusersVAE,
    DiffusionConfig,
    EngineConfig,
    GivenFramesConfig,
    HealthConfig,
    LatentDiffusionTraining,
    LatentSource,
    OptimConfig,
    OwnVAE,
    PreviewConfig,
    ReconstructionConfig,
    RunConfig,
    Scaling,
    ShardSet,
    TextEncoderConfig,
    TrainingConfig,
    VAEConfig,
    ValidationConfig,
    VideoSource,
    shard_folders,
    shard_sets,
)
from lvdm.errors import UserError

AnyTraining = AutoencoderTraining | LatentDiffusionTraining
_TASKS: dict[str, type[AnyTraining]] = {
    "autoencoder": AutoencoderTraining,
    "latent_diffusion": LatentDiffusionTraining,
}


def load_training_config(path: str | Path, overrides: Sequence[str] = ()) -> AnyTraining:
    """Read a training config from YAML and ``a.b=value`` overrides.

    Raises:
        UserError: with every fault at once, a line each with its dotted path.
    """
    return parse_training_config(read_tree(path, overrides), source=str(path))


def parse_training_config(tree: Mapping[str, Any], source: str) -> AnyTraining:
    """Validate the nested dict of a training config; ``source`` names it in errors. Raises `UserError`."""
    task = tree.get("task")
    if task not in _TASKS:
        raise UserError(f"{source}: task: {task!r} is none of {', '.join(_TASKS)}")
    return parse_config(_TASKS[task], tree, source)


__all__ = [
    "AnyTraining",
    "AutoencoderTraining",
    "BatchConfig",
    "Bucket",
    "ClipConfig",
    "Condition",
    "DataConfig",
    "DiffusersVAE",
    "DiffusionConfig",
    "EngineConfig",
    "GivenFramesConfig",
    "HealthConfig",
    "LatentDiffusionTraining",
    "LatentSource",
    "ModelScopeUNetConfig",
    "OptimConfig",
    "OwnVAE",
    "PreviewConfig",
    "ReconstructionConfig",
    "RunConfig",
    "Scaling",
    "Section",
    "ShardSet",
    "SpaceTimeUNetConfig",
    "TextEncoderConfig",
    "TextUNetConfig",
    "TrainingConfig",
    "UNetConfig",
    "VAEConfig",
    "ValidationConfig",
    "VideoAutoencoderConfig",
    "VideoSource",
    "dump_yaml",
    "load_training_config",
    "parse_config",
    "parse_training_config",
    "parse_value",
    "read_tree",
    "shard_folders",
    "shard_sets",
]
