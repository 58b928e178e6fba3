"""Norms and convolutions that the networks share.

Shape letters: B batch, C channels, T frames, H height, W width, N = B * T frames of a batch, S = H * W pixels,
L text tokens, D channels of a text token.

Normalisation and its activation run in fp32 whatever the module was cast to; the result has the input's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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
