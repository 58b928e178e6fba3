from __future__ import annotations

import pytest
import torch

from lvdm.config import DiffusionConfig, SpaceTimeUNetConfig
from lvdm.diffusion.denoiser import Denoiser
from lvdm.diffusion.masks import GivenFrames
from lvdm.diffusion.objective import diffusion_loss
from lvdm.errors import UserError
from lvdm.models.attention import attend_relative
from lvdm.models.layers import PixelGroupNorm
from lvdm.models.unet_st import SpaceTimeUNet
from tests.models.formula import expected, fill_by_formula, formula_input, lvdm_space_time_unet_key

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
TINY = {"model_channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "attention_levels": (1,), "heads": 4}


def network(**options) -> SpaceTimeUNet:
    """Weights by formula: none of them zero."""
    model = SpaceTimeUNet(**{**TINY, "relative_keys": "transposed", **options})
    fill_by_formula(model, lvdm_space_time_unet_key)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return formula_input("unet.x", 2, 4, 4, 8, 8), torch.tensor([7, 613])


def given_frames() -> tuple[torch.Tensor, torch.Tensor]:
    """The latent and the fifth channel of the reference's frame-conditioned input."""
    return expected("space_time_unet")["x5"].split([4, 1], dim=1)


@torch.no_grad()
def test_equals_the_reference():
    want = expected("space_time_unet")
    model = network()
    z, t = inputs()
    torch.testing.assert_close(model(z, t), want["out"], **TOLERANCE)
    longer = model(formula_input("unet.x6", 1, 4, 6, 8, 8), t[:1])
    torch.testing.assert_close(longer, want["out_long"], **TOLERANCE)


@torch.no_grad()
def test_with_given_frames_equals_the_reference(space_time_unet):
    want = expected("space_time_unet")
    z, mask = given_frames()
    t = torch.tensor([7, 613])
    torch.testing.assert_close(space_time_unet(z, t, mask, torch.tensor([100, 3])), want["out_with_level"], **TOLERANCE)
    torch.testing.assert_close(space_time_unet(z, t, mask), want["out_without_level"], **TOLERANCE)


def check_gradients(model: SpaceTimeUNet, name: str) -> None:
    """Against the reference's gradients, of which the largest are stored in part."""
    want = {key.removeprefix(f"{name}.grad."): g for key, g in expected("space_time_unet").items() if ".grad." in key
            and key.startswith(name)}  # fmt: skip
    got = {lvdm_space_time_unet_key(name): p.grad for name, p in model.named_parameters()}
    assert len(want) >= 5
    for key, gradient in want.items():
        rows = [17, 100] if key.startswith("label_emb") else range(len(gradient))
        scale = gradient.abs().max().item()
        part = got[key][list(rows)].view_as(gradient)
        torch.testing.assert_close(part, gradient, atol=1e-4 * scale, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_loss_and_gradients_equal_the_reference():
    model = network()
    z0, noise = formula_input("loss.x0", 2, 4, 4, 8, 8), formula_input("loss.noise", 2, 4, 4, 8, 8)
    t = torch.tensor([37, 820])
    config = DiffusionConfig(beta_start=0.0015, beta_end=0.0155, loss="l1")
    loss = diffusion_loss(Denoiser(model, config), z0, noise, t).mean()
    torch.testing.assert_close(loss.detach(), expected("space_time_unet")["plain.loss"], **TOLERANCE)
    loss.backward()
    check_gradients(model, "plain")


def test_loss_and_gradients_with_given_frames_equal_the_reference(space_time_unet):
    z0, noise = formula_input("loss.x0", 2, 4, 4, 8, 8), formula_input("loss.noise", 2, 4, 4, 8, 8)
    config = DiffusionConfig(beta_start=0.0015, beta_end=0.0155, loss="l1")
    mask_B1T11 = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]).view(2, 1, 4, 1, 1)
    given = GivenFrames(mask_B1T11, level_B=torch.tensor([100, 17]), label_B=torch.tensor([100, 17]))
    loss = diffusion_loss(Denoiser(space_time_unet, config), z0, noise, torch.tensor([37, 820]), given=given).mean()
    torch.testing.assert_close(loss.detach(), expected("space_time_unet")["given.loss"], **TOLERANCE)
    loss.backward()
    check_gradients(space_time_unet, "given")
    assert space_time_unet.level_embed.weight.grad.any(1).nonzero().flatten().tolist() == [17, 100]


@torch.no_grad()
def test_relative_keys_are_shaw_s_by_default_and_change_the_output():
    assert SpaceTimeUNetConfig().relative_keys == "shaw"
    z, t = inputs()
    away = (network(relative_keys="shaw")(z, t) - network()(z, t)).abs().max()
    assert away > 0.3


def test_transposed_relative_keys_are_their_formula():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 5, 2, 2, 16, generator=generator, dtype=torch.float64).unbind()
    table_k, table_v = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64).unbind()
    want = torch.zeros_like(q)
    for i in range(5):
        near = [max(-2, min(2, j - i)) for j in range(5)]
        logits = torch.stack([
            (q[:, i] * k[:, j]).sum(-1) / 4 + (q[:, j] * table_k[2 - near[j]]).sum(-1) / 2 for j in range(5)
        ])  # fmt: skip
        values = torch.stack([v[:, j] + table_v[2 + near[j]] for j in range(5)])
        want[:, i] = (logits.softmax(0)[..., None] * values).sum(0)
    got = attend_relative(q, k, v, table_k, table_v, "transposed")
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_pixel_norm_runs_over_the_frames_of_a_pixel_alone():
    norm = PixelGroupNorm(2, 8, 1e-5)
    x_BTSC = formula_input("norm", 2, 3, 5, 8)
    out_BTSC = norm(x_BTSC)
    want = torch.nn.functional.group_norm(x_BTSC[1, :, 4].T[None], 2)[0].T
    torch.testing.assert_close(out_BTSC[1, :, 4], want)


@torch.no_grad()
def test_cast_to_bf16(space_time_unet):
    z, t = inputs()
    mask, level = torch.tensor([1.0, 0, 0, 1]).view(1, 1, 4, 1, 1).repeat(2, 1, 1, 1, 1), torch.tensor([100, 250])
    want = space_time_unet(z, t, mask, level)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = (space_time_unet(z, t, mask, level).float() - want).norm() / want.norm()
    got = space_time_unet.bfloat16()(z.bfloat16(), t, mask.bfloat16(), level)
    assert got.dtype == torch.bfloat16
    error = (got.float() - want).norm() / want.norm()
    assert error < 0.03
    assert error < 1.3 * autocast


def test_starts_at_zero_and_learns_from_there():
    """Zero layers come alive one by one: the output, the second convolutions and the attention's projections."""
    torch.manual_seed(0)
    z, t = inputs()
    mask, level = torch.tensor([1.0, 0, 0, 1]).view(1, 1, 4, 1, 1).repeat(2, 1, 1, 1, 1), torch.tensor([100, 250])
    model = SpaceTimeUNet(**TINY, mask_channel=True, noise_levels=251)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    assert model(z, t, mask, level).abs().max() == 0
    for _ in range(4):
        optimiser.zero_grad()
        (model(z, t, mask, level) - z).square().mean().backward()
        optimiser.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.level_embed.weight.grad.any(1).nonzero().flatten().tolist() == [100, 250]


@torch.no_grad()
def test_mask_of_one_pixel_stands_for_the_whole_frame(space_time_unet):
    z, t = inputs()
    mask = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]]).view(2, 1, 4, 1, 1)
    torch.testing.assert_close(
        space_time_unet(z, t, mask), space_time_unet(z, t, mask.expand(2, 1, 4, 8, 8).contiguous())
    )
    assert not torch.allclose(space_time_unet(z, t, mask), space_time_unet(z, t, torch.zeros_like(mask)), atol=1e-2)


def test_inputs_that_do_not_fit_are_refused(space_time_unet):
    z, t = inputs()
    with pytest.raises(UserError, match=r"8x9.*multiples of 2"):
        network()(torch.zeros(2, 4, 4, 8, 9), t)
    with pytest.raises(ValueError, match="mask_channel is True"):
        space_time_unet(z, t)
    with pytest.raises(ValueError, match="mask_channel is False"):
        network()(z, t, torch.zeros(2, 1, 4, 1, 1))
    with pytest.raises(ValueError, match="without noise_levels"):
        network()(z, t, None, torch.tensor([1, 2]))
