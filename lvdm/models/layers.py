"""Norms and convolutions that the networks share.

Shape letters: B batch, C channels (I in, O out), T frames, H height, W width, N = B * T frames of a batch,
S = H * W pixels, L text tokens, D channels of a text token.

Normalisation and its activation run in fp32 whatever the module was cast to; the result has the input's type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NormOver = Literal["clip", "frame"]


def _float(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float()


class GroupNorm(nn.GroupNorm):
    """Group norm in fp32, optionally followed by SiLU in fp32, of any ``[B, C, ...]``."""

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = False) -> None:
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, input: Tensor) -> Tensor:
        out = F.group_norm(input.float(), self.num_groups, _float(self.weight), _float(self.bias), self.eps)
        return (F.silu(out) if self.silu else out).to(input.dtype)


class FrameGroupNorm(GroupNorm):
    """`GroupNorm` of frames ``x_NCHW`` whose statistics run over a whole clip (LVDM) or over each frame alone."""

    def __init__(self, groups: int, channels: int, eps: float, over: NormOver, silu: bool = False) -> None:
        super().__init__(groups, channels, eps, silu)
        self.over = over

    def forward(self, input: Tensor, frames: int = 1) -> Tensor:
        """``input`` is ``[N, C, H, W]`` with ``N = B * frames``, the frames of a clip in a row."""
        if self.over == "frame" or frames == 1:
            return super().forward(input)
        # With channels last in memory the frames of a clip are just more rows of one image, so nothing is copied.
        x_NHWC = input.permute(0, 2, 3, 1)
        n, h, w, c = x_NHWC.shape
        x_BCHW = x_NHWC.reshape(n // frames, frames * h, w, c).permute(0, 3, 1, 2)
        out_BHWC = super().forward(x_BCHW).permute(0, 2, 3, 1)
        return out_BHWC.reshape(n, h, w, c).permute(0, 3, 1, 2)


class PixelGroupNorm(GroupNorm):
    """`GroupNorm` of tokens ``x_BTSC`` whose statistics run over the frames of each pixel."""

    def forward(self, input: Tensor) -> Tensor:
        out_NCT = super().forward(rearrange(input, "b t s c -> (b s) c t"))
        return rearrange(out_NCT, "(b s) c t -> b t s c", b=len(input))


class LayerNorm(nn.LayerNorm):
    """Layer norm in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        out = F.layer_norm(input.float(), self.normalized_shape, _float(self.weight), _float(self.bias), self.eps)
        return out.to(input.dtype)


class Upsample(nn.Conv2d):
    """Nearest-neighbour doubling of height and width, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))


class FrameConv(nn.Module):
    """Convolution of each pixel over three frames, with zeros before the first and after the last frame.

    ``out_t = W_0 x_(t-1) + W_1 x_t + W_2 x_(t+1) + bias``: matrix products over the channels, which lie last in memory.
    That is what a 3-D convolution of 3x1x1 computes, in less time and without products with the padding.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(3 * channels)
        self.weight = nn.Parameter(torch.empty(3, channels, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x_BTSC: Tensor) -> Tensor:
        return _FrameProducts.apply(x_BTSC, self.weight, self.bias)


class _FrameProducts(torch.autograd.Function):
    """The three products of `FrameConv`, each added to the same output and, in the backward pass, to one gradient."""

    @staticmethod
    def forward(ctx: Any, x_BTSI: Tensor, weight_3OI: Tensor, bias_O: Tensor) -> Tensor:
        ctx.save_for_backward(x_BTSI, weight_3OI)
        out_BTSO = F.linear(x_BTSI, weight_3OI[1], bias_O)
        before, _, after = weight_3OI.to(out_BTSO.dtype)  # differs under autocast alone
        x_BTSI = x_BTSI.to(out_BTSO.dtype)
        _add_products(out_BTSO[:, 1:], x_BTSI[:, :-1], before.t())
        _add_products(out_BTSO[:, :-1], x_BTSI[:, 1:], after.t())
        return out_BTSO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BTSI, weight_3OI = ctx.saved_tensors
        grad_BTSO = gradients[0].contiguous()
        before, centre, after = weight_3OI.to(grad_BTSO.dtype)
        grad_x_BTSI = grad_BTSO @ centre
        _add_products(grad_x_BTSI[:, :-1], grad_BTSO[:, 1:], before)
        _add_products(grad_x_BTSI[:, 1:], grad_BTSO[:, :-1], after)
        x = x_BTSI.to(grad_BTSO.dtype)
        pairs = [(grad_BTSO[:, 1:], x[:, :-1]), (grad_BTSO, x), (grad_BTSO[:, :-1], x[:, 1:])]
        grad_weight_3OI = torch.stack([grad.flatten(0, 2).t() @ seen.flatten(0, 2) for grad, seen in pairs])
        kind = weight_3OI.dtype
        return grad_x_BTSI.to(x_BTSI.dtype), grad_weight_3OI.to(kind), grad_BTSO.sum((0, 1, 2)).to(kind)


def _add_products(out_BTSO: Tensor, x_BTSI: Tensor, matrix_IO: Tensor) -> None:
    """``out += x @ matrix``; both are contiguous but for the frames left out between clips."""
    batch = x_BTSI.shape[0]
    out_BTSO.view(batch, -1, out_BTSO.shape[3]).baddbmm_(
        x_BTSI.view(batch, -1, x_BTSI.shape[3]), matrix_IO.expand(batch, -1, -1)
    )


class GatedMLP(nn.Module):
    """GEGLU (arXiv 2002.05202): ``out(value * gelu(gate))`` with four times the channels inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(channels, 8 * channels)
        self.proj_out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(_Gate.apply(self.proj_in(x)))


class _Gate(torch.autograd.Function):
    """``value * gelu(gate)`` of halves of one tensor, whose gradient is written in one piece, not put together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        opened = F.gelu(gate)
        ctx.save_for_backward(x, opened)
        return value * opened

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, opened = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        grad = torch.empty_like(x)
        grad_value, grad_gate = grad.chunk(2, dim=-1)
        torch.mul(gradients[0], value, out=grad_value)  # a place to keep the gate's incoming gradient
        torch.ops.aten.gelu_backward.grad_input(grad_value, gate, grad_input=grad_gate)
        torch.mul(gradients[0], opened, out=grad_value)
        return grad


def zero_init(module: nn.Conv2d | nn.Linear | FrameConv) -> None:
    """Make a residual branch or the output start at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def join_channels(x_NCHW: Tensor, y_NCHW: Tensor) -> Tensor:
    """Both one after the other along the channels, which lie last in memory before and after."""
    return torch.cat([x_NCHW.permute(0, 2, 3, 1), y_NCHW.permute(0, 2, 3, 1)], dim=3).permute(0, 3, 1, 2)


def replicate_pad(x_BCTHW: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Repeat the borders so that a convolution without padding gives ``size / stride``; the front gets the odd one."""
    pad: list[int] = []
    for size, step in zip(reversed(kernel), reversed(stride), strict=True):
        total = size - step
        pad += [total - total // 2, total // 2]
    return F.pad(x_BCTHW, pad, mode="replicate") if any(pad) else x_BCTHW


class SameConv3d(nn.Conv3d):
    """3-D convolution over replicated borders: every axis shrinks by exactly its stride. Not causal in time."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(replicate_pad(input, self.kernel_size, self.stride))


class SameConvTranspose3d(nn.ConvTranspose3d):
    """Transposed 3-D convolution over replicated borders: every axis grows by exactly its stride."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding=kernel - 1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(replicate_pad(input, self.kernel_size, self.stride), output_size)
