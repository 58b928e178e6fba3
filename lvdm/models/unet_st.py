"""LVDM's UNet without text: attention over space, then over time, and adaptive norms (arXiv 2211.13221, section 3.3).

Unconditional for short videos; with a mask channel and noise-level labels it predicts and interpolates frames of long
ones (section 3.4).

Shape letters: B batch, C channels, T frames, H height, W width, N = B * T frames of a batch, S = H * W pixels,
E channels of the time embedding, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lvdm.models.attention import RelativeKeys, attend, attend_relative
from lvdm.models.layers import GroupNorm, NormOver, PixelGroupNorm, zero_init
from lvdm.models.unet_frames import FrameUNet


class SpaceTimeUNet(FrameUNet):
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
        super().__init__(
            channels_in=latent_channels + mask_channel,
            channels_out=latent_channels,
            model_channels=model_channels,
            channel_mult=channel_mult,
            res_blocks=res_blocks,
            attention_levels=attention_levels,
            attention=lambda channels: SpaceTimeAttention(channels, heads, temporal_length, relative_keys, norm_groups),
            norm_groups=norm_groups,
            norm_over=norm_over,
            scale_shift=True,
        )
        self.mask_channel = mask_channel
        self.level_embed = nn.Embedding(noise_levels, 4 * model_channels) if noise_levels else None

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
        if (mask_B1THW is not None) != self.mask_channel:
            raise ValueError(
                f"mask_channel is {self.mask_channel}, so the mask must be given if and only if it is true"
            )
        embedding_BE = self.embed_time(t_B, like=z_BCTHW)
        if level_B is not None:
            if self.level_embed is None:
                raise ValueError("a network without noise_levels was given noise levels")
            embedding_BE = embedding_BE + self.level_embed(level_B)
        if mask_B1THW is not None:
            b, _, t, h, w = z_BCTHW.shape
            z_BCTHW = torch.cat([z_BCTHW, mask_B1THW.to(z_BCTHW.dtype).expand(b, 1, t, h, w)], dim=1)
        return self.through(z_BCTHW, embedding_BE[:, None], z_BCTHW.shape[2])


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
