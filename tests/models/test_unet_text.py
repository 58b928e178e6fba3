from __future__ import annotations

import pytest
import torch

from lvdm.errors import UserError
from lvdm.models.embeddings import along_axes, places
from lvdm.models.unet_text import TextUNet
from tests.models.formula import expected, fill_by_formula, formula_input, lvdm_text_unet_key

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return formula_input("unet.x", 2, 4, 4, 8, 8), torch.tensor([7, 613]), formula_input("unet.ctx", 2, 5, 24)


@torch.no_grad()
def test_equals_the_reference(unet):
    torch.testing.assert_close(unet(*inputs()), expected("text_unet")["out"], **TOLERANCE)


@torch.no_grad()
def test_longer_clips_than_the_relative_table_equal_the_reference(unet):
    _, t, text = inputs()
    out = unet(formula_input("unet.x6", 1, 4, 6, 8, 8), t[:1], text[:1])
    torch.testing.assert_close(out, expected("text_unet")["out_long"], **TOLERANCE)


def test_loss_and_gradients_equal_the_reference(unet):
    want = expected("text_unet")
    _, _, text = inputs()
    z0, noise = formula_input("loss.x0", 2, 4, 4, 8, 8), formula_input("loss.noise", 2, 4, 4, 8, 8)
    t = torch.tensor([37, 820])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0)[t].float().view(-1, 1, 1, 1, 1)
    loss = (unet(signal.sqrt() * z0 + (1 - signal).sqrt() * noise, t, text) - noise).square().mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), want["loss"], **TOLERANCE)
    gradients = {lvdm_text_unet_key(name): p.grad for name, p in unet.named_parameters()}
    checked = [key.removeprefix("grad.") for key in want if key.startswith("grad.")]
    assert len(checked) >= 3
    for key in checked:
        gradient = want[f"grad.{key}"]
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[key].view_as(gradient), gradient, atol=1e-4 * scale, rtol=1e-4)


@torch.no_grad()
def test_masked_padding_does_not_change_the_output(unet):
    z, t, text = inputs()
    want = unet(z, t, text)
    padded = torch.cat([text, 100 * torch.ones(2, 3, 24)], dim=1)
    mask = torch.arange(8).expand(2, 8) < 5
    torch.testing.assert_close(unet(z, t, padded, mask), want, **TOLERANCE)
    assert not torch.allclose(unet(z, t, padded), want, atol=1e-2)


@torch.no_grad()
def test_group_norm_statistics_over_clip_or_frame(unet):
    """Without temporal attention, frames meet only in the statistics of the norms."""
    options = {"model_channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "attention_levels": (0, 1), "heads": 4}
    frames_alone = {}
    z, t, text = inputs()
    for over in ("clip", "frame"):
        model = TextUNet(**options, context_dim=24, temporal_length=4, norm_over=over)
        fill_by_formula(model, lvdm_text_unet_key)
        for name, parameter in model.named_parameters():
            if "attn_time" in name and "to_out" in name:
                parameter.zero_()
        single = torch.cat([model(z[:, :, i : i + 1], t, text) for i in range(4)], dim=2)
        frames_alone[over] = torch.allclose(model(z, t, text), single, atol=1e-4)
    assert frames_alone == {"clip": False, "frame": True}


@torch.no_grad()
def test_cast_to_bf16(unet):
    z, t, text = inputs()
    want = unet(z, t, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = (unet(z, t, text).float() - want).norm() / want.norm()
    got = unet.bfloat16()(z.bfloat16(), t, text.bfloat16())
    assert got.dtype == torch.bfloat16
    error = (got.float() - want).norm() / want.norm()
    assert error < 0.03
    assert error < 1.3 * autocast


def test_starts_at_zero_and_learns_from_there():
    """Zero layers come alive one by one: output, projection, temporal attention's output."""
    torch.manual_seed(0)
    z, t, text = inputs()
    model = TextUNet(
        model_channels=32, channel_mult=(1, 2), res_blocks=1, attention_levels=(1,), heads=4, context_dim=24
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    assert model(z, t, text).abs().max() == 0
    for _ in range(6):
        optimiser.zero_grad()
        (model(z, t, text) - z).square().mean().backward()
        optimiser.step()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("relative", [True, False])
def test_every_weight_takes_part(relative):
    model = TextUNet(
        model_channels=16, channel_mult=(1, 1), res_blocks=1, attention_levels=(0,), heads=2, context_dim=24,
        transformer_depth=2, norm_groups=8, relative_position=relative,
    )  # fmt: skip
    fill_by_formula(model, lvdm_text_unet_key)
    z, t, text = inputs()
    model(z, t, text).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert any("relative_k" in name for name, _ in model.named_parameters()) == relative


def test_pooled_text_scale_shift_and_coordinates_take_part_and_see_no_padding():
    model = TextUNet(
        model_channels=16, channel_mult=(1, 1), res_blocks=1, attention_levels=(), heads=2, context_dim=24,
        norm_groups=8, pooled_text=True, scale_shift=True, coordinates=True,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    z, t, text = inputs()
    longer = torch.cat([text, torch.full_like(text[:, :1], 9.0)], dim=1)
    mask = torch.ones(longer.shape[:2], dtype=torch.bool)
    mask[:, -1] = False
    torch.testing.assert_close(model(z, t, longer, mask), model(z, t, text), atol=1e-5, rtol=1e-4)
    assert (model(z, t, text) - model(z, t, text.flip(0))).abs().max() > 1e-4
    model(z, t, text).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_places_along_time_height_and_width():
    like = torch.zeros(())
    maps = along_axes(places(3, like), places(5, like), places(9, like))
    assert maps.shape == (9, 3, 5, 9)
    t, h, w = maps[0], maps[3], maps[6]
    assert t[:, 0, 0].tolist() == [-1, 0, 1]
    assert h[0, :, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert w[0, 0, [0, 4, 8]].tolist() == [-1, 0, 1]
    torch.testing.assert_close(maps[[1, 4, 7]], torch.sin(torch.pi * torch.stack([t, h, w])))
    torch.testing.assert_close(maps[[2, 5, 8]], torch.cos(torch.pi * torch.stack([t, h, w])))


def test_latent_size_that_does_not_fit_is_refused(unet):
    _, t, text = inputs()
    with pytest.raises(UserError, match=r"9x8.*multiples of 2"):
        unet(torch.zeros(2, 4, 4, 9, 8), t, text)
