"""LVDM's UNet without text: attention over space, then over time, and adaptive norms (arXiv 2211.13221, section 3.3).

Unconditional for short videos; with a mask channel and noise-level labels it predicts and interpolates frames of long
ones (section 3.4).

Shape letters: B batch, C channels, T frames, H height, W width, N = B * T frames of a batch, S = H * W pixels,
E channels of the time embedding, h heads, d channels of a head.

As in `unet_text`, frames ``x_NCHW`` lie channels-last in memory and convolutions see one frame at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lvdm.errors import UserError
from lvdm.models.attention import RelativeKeys, attend, attend_relative
from lvdm.models.embeddings import timestep_embedding
from lvdm.models.layers import FrameGroupNorm, GroupNorm, NormOver, PixelGroupNorm, Upsample
from lvdm.models.unet_text import ResBlock, Stage, zero_init


class SpaceTimeUNet(nn.Module):
    """Predicts what the parameterisation asks for from noisy latents and, where it has the inputs, given frames."""

    def __init__(
        self,
        *,
        latent_channels: int = 4,
        model_channels: int = 256,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        res_blocks: int = 3,
        attention_levels: Sequence[int] = (1, 2, 3),
        heads: int = 4,
        temporal_length: int = 4,
        relative_keys: RelativeKeys = "shaw",
        norm_groups: int = 32,
        norm_over: NormOver = "clip",
        mask_channel: bool = False,
        noise_levels: int = 0,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        self.mask_channel = mask_channel
        self.factor = 2 ** (len(channel_mult) - 1)  # by which height and width shrink on the way down
        embedding = 4 * model_channels

        def res(channels_in: int, channels_out: int) -> ResBlock:
            return ResBlock(channels_in, channels_out, embedding, norm_groups, norm_over, scale_shift=True)

        def attention(channels: int) -> SpaceTimeAttention:
            return SpaceTimeAttention(channels, heads, temporal_length, relative_keys, norm_groups)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.level_embed = nn.Embedding(noise_levels, embedding) if noise_levels else None

        channels = model_channels
        skips = [channels]
        conv_in = nn.Conv2d(latent_channels + mask_channel, channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([Stage(conv=conv_in)])
        for level, multiple in enumerate(channel_mult):
            for _ in range(res_blocks):
                block, channels = res(channels, multiple * model_channels), multiple * model_channels
                self.input_blocks.append(Stage(block, attention(channels) if level in attention_levels else None))
                skips.append(channels)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(Stage(conv=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))
                skips.append(channels)

        self.middle_blocks = nn.ModuleList(
            [Stage(res(channels, channels), attention(channels)), Stage(res(channels, channels))]
        )

        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(channel_mult))):
            for i in range(res_blocks + 1):
                block, channels = res(channels + skips.pop(), multiple * model_channels), multiple * model_channels
                up = Upsample(channels) if level > 0 and i == res_blocks else None
                self.output_blocks.append(Stage(block, attention(channels) if level in attention_levels else None, up))

        self.norm_out = FrameGroupNorm(norm_groups, channels, 1e-5, norm_over, silu=True)
        self.conv_out = nn.Conv2d(channels, latent_channels, 3, padding=1)
        zero_init(self.conv_out)

    def forward(
        self,
        z_BCTHW: Tensor,
        t_B: Tensor,
        mask_B1THW: Tensor | None = None,
        level_B: Tensor | None = None,
    ) -> Tensor:
        """The network's output ``[B, C, T, H, W]``, of the type of ``z_BCTHW``.

        Args:
            z_BCTHW: noisy latents, of the type of the weights; given frames already stand in them.
            t_B: diffusion time, integer or float, on the scale 0..1000 of training.
            mask_B1THW: 1 where a frame is given, 0 elsewhere; H and W may be 1. For a mask channel, and only for it.
            level_B: labels of the noise level of the given frames; None adds no label.

        Raises:
            UserError: height or width is no multiple of the UNet's downsampling.
        """
        b, _, t, h, w = z_BCTHW.shape
        if h % self.factor or w % self.factor:
            raise UserError(f"latents of {h}x{w} do not fit a UNet that halves {self.factor.bit_length() - 1} times: "
                            f"height and width must be multiples of {self.factor}")  # fmt: skip
        if (mask_B1THW is not None) != self.mask_channel:
            raise ValueError(
                f"mask_channel is {self.mask_channel}, so the mask must be given if and only if it is true"
            )
        embedding_BE = self.time_embed(timestep_embedding(t_B, self.model_channels).to(z_BCTHW.dtype))
        if level_B is not None:
            if self.level_embed is None:
                raise ValueError("a network without noise_levels was given noise levels")
            embedding_BE = embedding_BE + self.level_embed(level_B)
        embedding_BE = F.silu(embedding_BE)  # every residual block starts with it

        if mask_B1THW is not None:
            z_BCTHW = torch.cat([z_BCTHW, mask_B1THW.to(z_BCTHW.dtype).expand(b, 1, t, h, w)], dim=1)
        x_NCHW = rearrange(z_BCTHW, "b c t h w -> (b t) h w c").permute(0, 3, 1, 2)
        skips = []
        for block in self.input_blocks:
            x_NCHW = block(x_NCHW, embedding_BE, t)
            skips.append(x_NCHW)
        for block in self.middle_blocks:
            x_NCHW = block(x_NCHW, embedding_BE, t)
        for block in self.output_blocks:
            x_NCHW = block(torch.cat([x_NCHW, skips.pop()], dim=1), embedding_BE, t)
        x_NCHW = self.conv_out(self.norm_out(x_NCHW, t))
        return rearrange(x_NCHW, "(b t) c h w -> b c t h w", t=t)

    def remat_blocks(self) -> list[nn.Module]:
        """The blocks that activation checkpointing wraps: residual blocks and attention."""
        return [m for m in self.modules() if isinstance(m, ResBlock | SpaceTimeAttention)]


class SpaceTimeAttention(nn.Module):
    """Attention over the pixels of each frame, then over the frames of each pixel, as residuals that start at zero."""

    def __init__(self, channels: int, heads: int, max_distance: int, relative_keys: RelativeKeys, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_keys = relative_keys
        self.norm_space = GroupNorm(groups, channels, 1e-5)
        self.qkv_space = nn.Linear(channels, 3 * channels)
        self.out_space = nn.Linear(channels, channels)
        self.norm_time = PixelGroupNorm(groups, channels, 1e-5)
        self.qkv_time = nn.Linear(channels, 3 * channels)
        self.relative_k = nn.Parameter(torch.empty(2 * max_distance + 1, channels // heads))
        self.relative_v = nn.Parameter(torch.empty(2 * max_distance + 1, channels // heads))
        self.out_time = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.relative_k)
        nn.init.xavier_uniform_(self.relative_v)
        zero_init(self.out_space)
        zero_init(self.out_time)

    def forward(self, x_NCHW: Tensor, frames: int) -> Tensor:
        n, c, h, w = x_NCHW.shape
        x_NSC = x_NCHW.permute(0, 2, 3, 1).reshape(n, h * w, c)
        tokens_NSC = self.norm_space(x_NCHW).permute(0, 2, 3, 1).reshape(n, h * w, c)
        q, k, v = self._heads(self.qkv_space(tokens_NSC))
        x_NSC = x_NSC + self.out_space(attend(q, k, v).flatten(-2))

        x_BTSC = x_NSC.view(n // frames, frames, h * w, c)
        q, k, v = self._heads(self.qkv_time(self.norm_time(x_BTSC)))
        out_BTShd = attend_relative(q, k, v, self.relative_k, self.relative_v, self.relative_keys)
        x_BTSC = x_BTSC + self.out_time(out_BTShd.flatten(-2))
        return x_BTSC.reshape(n, h, w, c).permute(0, 3, 1, 2)

    def _heads(self, qkv: Tensor) -> list[Tensor]:
        """Queries, keys and values ``[..., h, d]``: each has its third of the channels, a head a part of that."""
        return [part.unflatten(-1, (self.heads, -1)) for part in qkv.chunk(3, dim=-1)]
