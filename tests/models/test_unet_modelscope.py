"""ModelScope's UNet alone; `tests/weights/test_diffusers.py` compares it with diffusers'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lvdm.errors import UserError
from lvdm.models.layers import FrameConv
from lvdm.models.unet_modelscope import ModelScopeUNet
from tests.models.formula import fill_by_formula, formula_input

SMALL = {"channels": (16, 32), "attention_levels": (0,), "head_channels": 8, "context_dim": 24, "norm_groups": 8}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return formula_input("unet.x", 2, 4, 4, 8, 8), torch.tensor([7, 613]), formula_input("unet.ctx", 2, 5, 24)


@pytest.fixture
def modelscope() -> ModelScopeUNet:
    """Weights by formula: none of them zero."""
    model = ModelScopeUNet(**SMALL, frame_rate=True)
    fill_by_formula(model, lambda name: name)
    return model


def test_frame_convolution_equals_a_3d_convolution():
    conv = FrameConv(6)
    x_BTSC = formula_input("x", 2, 5, 7, 6).requires_grad_()
    kernel = conv.weight.detach().permute(1, 2, 0)[..., None, None].clone().requires_grad_()
    want = F.conv3d(x_BTSC.permute(0, 3, 1, 2)[..., None], kernel, conv.bias, padding=(1, 0, 0))[..., 0]
    want = want.permute(0, 2, 3, 1)
    got = conv(x_BTSC)
    torch.testing.assert_close(got, want)
    weight = formula_input("weight", *got.shape)
    inside = [x_BTSC, conv.weight, conv.bias]
    own = torch.autograd.grad((got * weight).sum(), inside)
    other = torch.autograd.grad((want * weight).sum(), [x_BTSC, kernel, conv.bias])
    torch.testing.assert_close(own[0], other[0])
    torch.testing.assert_close(own[1], other[1][..., 0, 0].permute(2, 0, 1))
    torch.testing.assert_close(own[2], other[2])
    torch.testing.assert_close(conv(x_BTSC[:, :1]), F.linear(x_BTSC[:, :1], conv.weight[1], conv.bias))


@torch.no_grad()
def test_masked_padding_does_not_change_the_output(modelscope):
    z, t, text = inputs()
    fps = torch.tensor([8, 24])
    want = modelscope(z, t, text, fps_B=fps)
    padded = torch.cat([text, 100 * torch.ones(2, 3, 24)], dim=1)
    mask = torch.arange(8).expand(2, 8) < 5
    torch.testing.assert_close(modelscope(z, t, padded, mask, fps), want, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(modelscope(z, t, padded, fps_B=fps), want, atol=1e-2)


@torch.no_grad()
def test_frame_rate_matters_and_is_demanded(modelscope):
    slow, fast = (modelscope(*inputs(), fps_B=torch.tensor(fps)) for fps in ([8, 8], [8, 24]))
    assert torch.allclose(slow[0], fast[0], atol=1e-5)
    assert not torch.allclose(slow[1], fast[1], atol=1e-2)
    with pytest.raises(UserError, match="give fps"):
        modelscope(*inputs())
    with pytest.raises(UserError, match="multiples of 2"):
        modelscope(torch.zeros(2, 4, 4, 9, 8), *inputs()[1:], fps_B=torch.ones(2))


@torch.no_grad()
def test_cast_to_bf16(modelscope):
    z, t, text = inputs()
    fps = torch.tensor([8, 24])
    want = modelscope(z, t, text, fps_B=fps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = (modelscope(z, t, text, fps_B=fps).float() - want).norm() / want.norm()
    got = modelscope.bfloat16()(z.bfloat16(), t, text.bfloat16(), fps_B=fps)
    assert got.dtype == torch.bfloat16
    error = (got.float() - want).norm() / want.norm()
    assert error < 0.03
    assert error < 1.3 * autocast


def test_gradients_under_autocast_have_the_weights_type(modelscope):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        modelscope(*inputs(), fps_B=torch.ones(2)).float().square().mean().backward()
    for name, parameter in modelscope.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.any(), name


def test_starts_at_zero_and_learns_from_there():
    torch.manual_seed(0)
    z, t, text = inputs()
    model = ModelScopeUNet(**SMALL)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    assert model(z, t, text).abs().max() == 0
    for _ in range(4):
        optimiser.zero_grad()
        (model(z, t, text) - z).square().mean().backward()
        optimiser.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
