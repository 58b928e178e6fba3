"""Small networks for the tests of models."""

from __future__ import annotations

import pytest
import torch

from lvdm.config import TextUNetConfig, VideoAutoencoderConfig
from lvdm.models.build import build_model
from lvdm.models.unet_text import TextUNet
from lvdm.models.video_autoencoder import VideoAutoencoder
from tests.models.formula import fill_by_formula, lvdm_autoencoder_key, lvdm_text_unet_key


@pytest.fixture(autouse=True)
def _one_thread():
    """The tests' tensors are too small for threads to pay."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def autoencoder() -> VideoAutoencoder:
    """Weights by formula: none of them zero."""
    model = build_model(VideoAutoencoderConfig(hidden_channels=16, downsample=(2, 4, 4)), seed=0)
    fill_by_formula(model, lvdm_autoencoder_key)
    assert isinstance(model, VideoAutoencoder)
    return model


@pytest.fixture
def unet() -> TextUNet:
    """Weights by formula: none of them zero."""
    config = TextUNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        res_blocks=1,
        attention_levels=(0, 1),
        heads=4,
        context_dim=24,
        temporal_length=4,
    )
    model = build_model(config, seed=0)
    fill_by_formula(model, lvdm_text_unet_key)
    assert isinstance(model, TextUNet)
    return model
