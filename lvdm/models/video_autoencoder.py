"""LVDM's 3-D convolutional video autoencoder (arXiv 2211.13221, section 3.2; LVDM's release, after TATS).

Shape letters: B batch, C channels, T frames, H height, W width; latents z have all of T, H, W divided by the factors.
Convolutions are full 3-D kernels over replicated borders and not causal: a frame sees later frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lvdm.errors import UserError
from lvdm.models.layers import GroupNorm, SameConv3d, SameConvTranspose3d

Stride = tuple[int, int, int]


def split_moments(moments_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance (clamped to -30..20) of the posterior, stacked along the channels."""
    mean, logvar = moments_BCTHW.chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def sample_posterior(moments_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """``mean + std * noise``; ``noise_BCTHW`` is standard normal with the latent's shape."""
    mean, logvar = split_moments(moments_BCTHW)
    return mean + torch.exp(0.5 * logvar) * noise_BCTHW


def kl_divergence(mean_BCTHW: Tensor, logvar_BCTHW: Tensor) -> Tensor:
    """KL divergence of the posterior to the unit Gaussian, summed over C, T, H, W: ``[B]``."""
    return 0.5 * (mean_BCTHW.square() + logvar_BCTHW.exp() - 1 - logvar_BCTHW).flatten(1).sum(1)


def block_strides(downsample: Sequence[int]) -> list[Stride]:
    """Strides of the blocks, outermost first: block i halves an axis while ``2^i`` is below the axis' factor."""
    return [
        tuple(2 if factor > 2**i else 1 for factor in downsample)  # type: ignore[misc]
        for i in range(max(downsample).bit_length() - 1)
    ]


_INITIAL_LOGVAR = -10.0
_COLORS = 3


class VideoAutoencoder(nn.Module):
    """Encoder, Gaussian posterior and decoder of video clips."""

    def __init__(
        self,
        *,
        hidden_channels: int = 32,
        downsample: Sequence[int] = (4, 8, 8),
        latent_channels: int = 4,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.downsample = tuple(downsample)
        self.latent_channels = latent_channels
        self.encoder = Encoder(hidden_channels, downsample, latent_channels, norm_groups)
        self.quant_conv = nn.Conv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(hidden_channels, downsample, latent_channels, norm_groups)
        self._initialize()

    def _initialize(self) -> None:
        """Weights of an image pyramid, so that an untrained autoencoder already gives back a blurred clip.

        Going down, the first channels of a convolution are its input, averaged over what it strides, the next ones
        differences of brightness along the strided axes, the rest random with the variance handed on; going up, the
        first channels repeat their input. Ours, not LVDM's (torch's defaults, which shrink the signal at every
        convolution): after 80 s of one core small clips reach 22 dB, where random weights alone reach 18.5
        (``tools/bench/results/shapes_log.md``).
        """
        convolutions = [m for m in self.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
        for conv in convolutions:
            taps = math.prod(conv.kernel_size)
            if isinstance(conv, nn.ConvTranspose3d):
                taps //= math.prod(conv.stride)  # so many of them meet in one value of the output
            nn.init.normal_(conv.weight, std=(conv.in_channels * taps) ** -0.5)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        for module in self.modules():
            if isinstance(module, ResBlock3d):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, DownBlock):
                _hand_on(module.down)
                _add_differences(module.down)
            elif isinstance(module, UpBlock):
                _hand_on(module.up)
        _hand_on(self.encoder.conv_in)
        for conv in (self.encoder.conv_out, self.quant_conv, self.post_quant_conv, self.decoder.conv_out):
            _hand_on(conv, _COLORS)
        # A posterior of unit variance would drown the mean in noise for the first thousands of steps.
        assert self.quant_conv.bias is not None
        nn.init.constant_(self.quant_conv.bias[self.latent_channels :], _INITIAL_LOGVAR)

    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        """Posterior moments ``[B, 2 * latent_channels, T/ft, H/fh, W/fw]`` of RGB frames in -1..1.

        Raises:
            UserError: an axis is no multiple of its factor.
        """
        size = tuple(frames_BCTHW.shape[2:])
        if any(axis % factor for axis, factor in zip(size, self.downsample, strict=True)):
            raise UserError(
                f"clips of frames x height x width {size} do not fit the autoencoder: "
                f"each must be a multiple of {self.downsample}"
            )
        return self.quant_conv(self.encoder(frames_BCTHW))

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """RGB frames, about -1..1 (not clamped), of latents."""
        return self.decoder(self.post_quant_conv(z_BCTHW))

    def forward(self, frames_BCTHW: Tensor, noise_BCTHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction from a posterior sample, and the posterior's mean and clamped log variance."""
        moments_BCTHW = self.encode(frames_BCTHW)
        mean_BCTHW, logvar_BCTHW = split_moments(moments_BCTHW)
        return self.decode(sample_posterior(moments_BCTHW, noise_BCTHW)), mean_BCTHW, logvar_BCTHW

    def remat_blocks(self) -> list[nn.Module]:
        """The blocks that activation checkpointing wraps: each step of the resolution."""
        return [*self.encoder.blocks, *self.decoder.blocks]


class Encoder(nn.Module):
    """Each block doubles the channels and halves what it is strided over."""

    def __init__(self, hidden: int, downsample: Sequence[int], latent_channels: int, groups: int) -> None:
        super().__init__()
        self.conv_in = SameConv3d(3, hidden, 3)
        self.blocks = nn.ModuleList()
        channels = hidden
        for stride in block_strides(downsample):
            self.blocks.append(DownBlock(channels, 2 * channels, stride, groups))
            channels *= 2
        self.norm_out = GroupNorm(groups, channels, 1e-6, silu=True)
        self.conv_out = SameConv3d(channels, 2 * latent_channels, 3)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x_BCTHW = self.conv_in(x_BCTHW)
        for block in self.blocks:
            x_BCTHW = block(x_BCTHW)
        return self.conv_out(self.norm_out(x_BCTHW))


class Decoder(nn.Module):
    """Each block doubles what it is strided over; strides come in the encoder's order, as in LVDM, not mirrored."""

    def __init__(self, hidden: int, downsample: Sequence[int], latent_channels: int, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        strides = block_strides(downsample)
        channels_in = latent_channels
        for i, stride in enumerate(strides):
            channels = hidden * 2 ** (len(strides) - i)
            self.blocks.append(UpBlock(channels_in, channels, stride, groups))
            channels_in = channels
        self.conv_out = SameConv3d(channels_in, 3, 3)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        for block in self.blocks:
            x_BCTHW = block(x_BCTHW)
        return self.conv_out(x_BCTHW)


class DownBlock(nn.Module):
    """A strided convolution and a residual block."""

    def __init__(self, channels_in: int, channels_out: int, stride: Stride, groups: int) -> None:
        super().__init__()
        self.down = SameConv3d(channels_in, channels_out, 4, stride)
        self.res = ResBlock3d(channels_out, groups)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.res(self.down(x_BCTHW))


class UpBlock(nn.Module):
    """A transposed convolution and two residual blocks."""

    def __init__(self, channels_in: int, channels_out: int, stride: Stride, groups: int) -> None:
        super().__init__()
        self.up = SameConvTranspose3d(channels_in, channels_out, 4, stride)
        self.res1 = ResBlock3d(channels_out, groups)
        self.res2 = ResBlock3d(channels_out, groups)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.res2(self.res1(self.up(x_BCTHW)))


class ResBlock3d(nn.Module):
    """Two pre-normed convolutions and the identity."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels, 1e-6, silu=True)
        self.conv1 = SameConv3d(channels, channels, 3)
        self.norm2 = GroupNorm(groups, channels, 1e-6, silu=True)
        self.conv2 = SameConv3d(channels, channels, 3)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return x_BCTHW + self.conv2(self.norm2(self.conv1(self.norm1(x_BCTHW))))


@torch.no_grad()
def _hand_on(conv: nn.Conv3d | nn.ConvTranspose3d, most: int | None = None) -> None:
    """Make the first output channels the first input channels at the output's resolution."""
    upward = isinstance(conv, nn.ConvTranspose3d)
    weight_OITHW = conv.weight.transpose(0, 1) if upward else conv.weight
    count = min(conv.in_channels, conv.out_channels, most or conv.out_channels)
    weight_OITHW[:count] = 0
    taps = [_repeat(stride) if upward else _average(size, stride) for size, stride in _axes(conv)]
    for channel in range(count):
        weight_OITHW[channel, channel] = _outer(taps)


@torch.no_grad()
def _add_differences(conv: nn.Conv3d) -> None:
    """Make the output channels behind the input's the differences of brightness along each strided axis."""
    channel = conv.in_channels
    for axis, (_, stride) in enumerate(_axes(conv)):
        if stride == 2 and channel < conv.out_channels:
            taps = [_average(size, stride) for size, stride in _axes(conv)]
            taps[axis] = torch.tensor([0, 0.5, -0.5, 0])
            conv.weight[channel] = 0
            conv.weight[channel, :_COLORS] = _outer(taps) * 2 / _COLORS
            channel += 1


def _axes(conv: nn.Conv3d | nn.ConvTranspose3d) -> list[tuple[int, int]]:
    """Size and stride of the kernel along T, H, W."""
    return list(zip(conv.kernel_size, conv.stride, strict=True))


def _average(size: int, stride: int) -> Tensor:
    """Weights along one axis that average the pixels which `SameConv3d` strides over, or take the one."""
    taps = torch.zeros(size)
    taps[size // 2 - stride + 1 : size // 2 + 1] = 1 / stride
    return taps


def _repeat(stride: int) -> Tensor:
    """Weights of four along one axis with which `SameConvTranspose3d` repeats each pixel ``stride`` times."""
    taps = torch.zeros(4)
    taps[1 : 1 + stride] = 1
    return taps


def _outer(taps: list[Tensor]) -> Tensor:
    return taps[0][:, None, None] * taps[1][None, :, None] * taps[2][None, None, :]
