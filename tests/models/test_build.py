from __future__ import annotations

import pytest
import torch

from lvdm.config import ModelScopeUNetConfig, SpaceTimeUNetConfig, TextUNetConfig, VideoAutoencoderConfig
from lvdm.models.build import build_model, parameter_count

SMALL_AUTOENCODER = VideoAutoencoderConfig(hidden_channels=4, downsample=(2, 2, 2), norm_groups=4)
SMALL_UNET = TextUNetConfig(
    model_channels=8, channel_mult=(1,), res_blocks=1, heads=2, attention_levels=(), norm_groups=4
)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (TextUNetConfig(), 958_924_964),
        (VideoAutoencoderConfig(), 19_446_759),
        (SpaceTimeUNetConfig(), 548_904_580),
        (SpaceTimeUNetConfig(mask_channel=True, noise_levels=251), 549_163_908),
        (SpaceTimeUNetConfig(mask_channel=True, noise_levels=251, temporal_length=5), 549_181_060),
        (ModelScopeUNetConfig(), 1_411_233_860),
    ],
    ids=["text_unet", "video_autoencoder", "short", "prediction", "interpolation", "modelscope_unet"],
)
def test_full_size_has_the_references_parameters(config, parameters):
    with torch.device("meta"):
        model = build_model(config, seed=0)
    assert parameter_count(model) == parameters
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("config", [SMALL_AUTOENCODER, SMALL_UNET], ids=["video_autoencoder", "text_unet"])
def test_weights_come_from_the_seed_alone(config):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(config, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = build_model(config, seed=7).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for seed in (8, 7 + 2**32):
        other = build_model(config, seed=seed).state_dict()
        assert any(not torch.equal(first[name], other[name]) for name in first)
