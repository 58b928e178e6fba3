from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lvdm.models.remat import checkpoint_blocks
from tests.models.formula import formula_input


def autoencoder_loss(model: nn.Module) -> Tensor:
    frames = formula_input("frames", 1, 3, 4, 16, 16)
    reconstruction, mean, _ = model(frames, noise_BCTHW=formula_input("noise", 1, 4, 2, 4, 4))
    return (reconstruction - frames).abs().mean() + mean.square().mean()


def unet_loss(model: nn.Module) -> Tensor:
    z, text = formula_input("z", 2, 4, 4, 8, 8), formula_input("text", 2, 5, 24)
    mask = torch.arange(5).expand(2, 5) < torch.tensor([[5], [3]])
    return model(z, torch.tensor([3, 500]), text_BLD=text, text_mask_BL=mask).square().mean()


def frames_loss(model: nn.Module) -> Tensor:
    mask, level = torch.tensor([1.0, 0, 0, 1]).view(1, 1, 4, 1, 1).expand(2, 1, 4, 1, 1), torch.tensor([100, 250])
    return model(formula_input("z", 2, 4, 4, 8, 8), torch.tensor([3, 500]), mask, level).square().mean()


def saved_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Bytes of distinct activations that the graph keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("fixture", "loss"),
    [
        ("autoencoder", autoencoder_loss),
        ("unet", unet_loss),
        ("space_time_unet", frames_loss),
        ("modelscope", unet_loss),
    ],
)
def test_same_loss_gradients_and_names_with_less_memory(fixture, loss, request):
    plain = request.getfixturevalue(fixture)
    wrapped = copy.deepcopy(plain)
    names = list(wrapped.state_dict())
    checkpoint_blocks(wrapped.remat_blocks())
    assert list(wrapped.state_dict()) == names

    losses = [loss(plain), loss(wrapped)]
    for value in losses:
        value.backward()
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert saved_bytes(wrapped, loss) < 0.4 * saved_bytes(plain, loss)


def test_every_second_block_alone_saves_less_and_changes_nothing(unet):
    plain, half, whole = unet, copy.deepcopy(unet), copy.deepcopy(unet)
    checkpoint_blocks(half.remat_blocks(), every=2)
    checkpoint_blocks(whole.remat_blocks())
    assert torch.equal(unet_loss(plain), unet_loss(half))
    assert saved_bytes(whole, unet_loss) < saved_bytes(half, unet_loss) < saved_bytes(plain, unet_loss)


def test_keyword_arguments_and_no_grad():
    class Scale(nn.Module):
        calls = 0

        def forward(self, x: Tensor, *, by: Tensor) -> Tensor:
            self.calls += 1
            return (x * by).sin()

    block = Scale()
    checkpoint_blocks([block])
    x, by = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    block(x, by=by).sum().backward()
    assert block.calls == 2
    torch.testing.assert_close(by.grad, torch.full((3,), 2.0).cos())
    with torch.no_grad():
        block(x, by=by)
    assert block.calls == 3
