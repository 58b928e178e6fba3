"""From a model's config section to the model."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lvdm.config import ModelScopeUNetConfig, SpaceTimeUNetConfig, TextUNetConfig, VideoAutoencoderConfig
from lvdm.models.unet_modelscope import ModelScopeUNet
from lvdm.models.unet_st import SpaceTimeUNet
from lvdm.models.unet_text import TextUNet
from lvdm.models.video_autoencoder import VideoAutoencoder

ModelConfig = VideoAutoencoderConfig | TextUNetConfig | SpaceTimeUNetConfig | ModelScopeUNetConfig
Model = VideoAutoencoder | TextUNet | SpaceTimeUNet | ModelScopeUNet


def build_model(config: ModelConfig, seed: int) -> Model:
    """The model, initialised from ``seed`` alone; the global generator is left as it was.

    Under ``torch.device("meta")`` the model has shapes but no storage.
    """
    fields = config.model_dump(exclude={"kind", "trainable"})
    with torch.random.fork_rng(devices=[]):
        # torch's CPU generator keeps 32 bits of a seed, so all 64 are mixed into them.
        torch.default_generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        match config:
            case VideoAutoencoderConfig():
                return VideoAutoencoder(**fields)
            case TextUNetConfig():
                return TextUNet(**fields)
            case SpaceTimeUNetConfig():
                return SpaceTimeUNet(**fields)
            case ModelScopeUNetConfig():
                return ModelScopeUNet(**fields)


def parameter_count(module: nn.Module, learning: bool = False) -> int:
    """Number of weights, each shared one counted once; with ``learning``, of those that are not frozen."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not learning)
