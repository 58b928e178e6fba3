from __future__ import annotations

import pytest
import torch

from lvdm.config import VideoAutoencoderConfig
from lvdm.errors import UserError
from lvdm.models.build import build_model
from lvdm.models.frozen import OwnFrozenVAE
from lvdm.models.video_autoencoder import (
    VideoAutoencoder,
    block_strides,
    kl_divergence,
    sample_posterior,
    split_moments,
)
from lvdm.synthetic import combinations, render
from tests.models.formula import expected, formula_input

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@torch.no_grad()
def test_equals_the_reference(autoencoder):
    want = expected("video_autoencoder")
    frames = formula_input("ae.x", 2, 3, 4, 16, 16, scale=0.5)
    noise = formula_input("ae.noise", 2, 4, 2, 4, 4)
    moments = autoencoder.encode(frames)
    reconstruction, mean, logvar = autoencoder(frames, noise)
    torch.testing.assert_close(moments, want["moments"], **TOLERANCE)
    torch.testing.assert_close(mean, want["moments"][:, :4], **TOLERANCE)
    torch.testing.assert_close(logvar, want["logvar"], **TOLERANCE)
    torch.testing.assert_close(sample_posterior(moments, noise), want["sample"], **TOLERANCE)
    torch.testing.assert_close(reconstruction, want["recon_sample"], **TOLERANCE)
    # The fixture is the reference's sum over three of the four dimensions, summed over the last one too.
    torch.testing.assert_close(kl_divergence(mean, logvar), want["kl"], atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_scaled_latents_equal_the_reference(autoencoder):
    want = expected("video_autoencoder")
    vae = OwnFrozenVAE(autoencoder, scale=0.33422927, shift=1.4606637, fingerprint="")
    moments = vae.encode(formula_input("ls.x", 1, 3, 4, 16, 16, scale=0.5))
    z = vae.normalize(sample_posterior(moments, formula_input("ls.n", 1, 4, 2, 4, 4)))
    torch.testing.assert_close(z, want["scaling.z"], **TOLERANCE)
    torch.testing.assert_close(vae.decode(vae.denormalize(z)), want["scaling.decoded"], **TOLERANCE)


@torch.no_grad()
def test_decode_and_other_sizes_equal_the_reference(autoencoder):
    want = expected("video_autoencoder")
    decoded = autoencoder.decode(formula_input("ae.z", 2, 4, 2, 4, 4))
    torch.testing.assert_close(decoded, want["decode_z"], **TOLERANCE)
    moments = autoencoder.encode(formula_input("ae.x2", 1, 3, 8, 24, 32, scale=0.5))
    torch.testing.assert_close(moments, want["moments_x2"], **TOLERANCE)


@torch.no_grad()
def test_untrained_autoencoder_gives_back_a_blurred_clip():
    model = build_model(
        VideoAutoencoderConfig(hidden_channels=4, norm_groups=1, downsample=(2, 4, 4), latent_channels=8), seed=0
    )
    for combination in combinations()[::60]:
        clip = torch.from_numpy(render(combination, 0, 8, 32)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        mean, _ = split_moments(model.encode(clip))
        like = torch.corrcoef(torch.stack([clip.flatten(), model.decode(mean).flatten()]))[0, 1].abs()
        assert like > 0.6, combination


def test_log_variance_is_clamped():
    moments = torch.tensor([-100.0, 100.0, -50.0, 50.0]).reshape(1, 4, 1, 1, 1)
    mean, logvar = split_moments(moments)
    assert mean.flatten().tolist() == [-100.0, 100.0]
    assert logvar.flatten().tolist() == [-30.0, 20.0]


def test_strides_of_blocks():
    assert block_strides((4, 8, 8)) == [(2, 2, 2), (2, 2, 2), (1, 2, 2)]
    assert block_strides((1, 4, 2)) == [(1, 2, 2), (1, 2, 1)]


@pytest.mark.parametrize("downsample", [(1, 2, 2), (4, 4, 2), (2, 8, 8)])
def test_shapes_follow_the_factors(downsample):
    model = VideoAutoencoder(hidden_channels=4, downsample=downsample, latent_channels=3, norm_groups=4)
    frames = torch.zeros(1, 3, 4, 16, 24)
    latent = (1, 3, 4 // downsample[0], 16 // downsample[1], 24 // downsample[2])
    reconstruction, mean, _ = model(frames, torch.zeros(latent))
    assert mean.shape == latent
    assert reconstruction.shape == frames.shape


def test_clip_that_does_not_fit_is_refused(autoencoder):
    with pytest.raises(UserError, match=r"\(4, 18, 16\).*multiple of \(2, 4, 4\)"):
        autoencoder.encode(torch.zeros(1, 3, 4, 18, 16))


@torch.no_grad()
def test_cast_to_bf16(autoencoder):
    frames = formula_input("ae.x", 2, 3, 4, 16, 16, scale=0.5)
    noise = formula_input("ae.noise", 2, 4, 2, 4, 4)
    want, _, _ = autoencoder(frames, noise)
    got, mean, _ = autoencoder.bfloat16()(frames.bfloat16(), noise.bfloat16())
    assert got.dtype == mean.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.03 * want.norm()
