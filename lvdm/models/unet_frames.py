"""What LVDM's two UNets share: residual blocks on frames, the ladder of stages, the way through it.

Shape letters: B batch, C channels, T frames, H height, W width, N = B * T frames of a batch, E channels of the time
embedding.

Convolutions see one frame at a time, so the networks work on frames ``x_NCHW`` that lie channels-last in memory:
convolutions are 2-D, and pixels as tokens are views of the same memory. Only temporal attention (and, with
``norm_over="clip"``, the statistics of the group norms) mixes frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lvdm.errors import UserError
from lvdm.models.embeddings import timestep_embedding
from lvdm.models.layers import FrameGroupNorm, NormOver, Upsample, join_channels, zero_init


class FrameUNet(nn.Module):
    """A UNet of residual blocks on frames, with attention where ``attention_levels`` says and in the middle."""

    def __init__(
        self,
        *,
        channels_in: int,
        channels_out: int,
        model_channels: int,
        channel_mult: Sequence[int],
        res_blocks: int,
        attention_levels: Sequence[int],
        attention: Callable[[int], nn.Module],
        norm_groups: int,
        norm_over: NormOver,
        scale_shift: bool,
    ) -> None:
        """``attention`` makes the attention of a stage from its channels."""
        super().__init__()
        self.model_channels = model_channels
        self.factor = 2 ** (len(channel_mult) - 1)  # by which height and width shrink on the way down
        embedding = 4 * model_channels

        def res(channels_in: int, channels_out: int) -> ResBlock:
            return ResBlock(channels_in, channels_out, embedding, norm_groups, norm_over, scale_shift)

        def attention_at(level: int, channels: int) -> nn.Module | None:
            return attention(channels) if level in attention_levels else None

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )

        channels = model_channels
        skips = [channels]
        self.input_blocks = nn.ModuleList([Stage(conv=nn.Conv2d(channels_in, channels, 3, padding=1))])
        for level, multiple in enumerate(channel_mult):
            for _ in range(res_blocks):
                block, channels = res(channels, multiple * model_channels), multiple * model_channels
                self.input_blocks.append(Stage(block, attention_at(level, channels)))
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
                self.output_blocks.append(Stage(block, attention_at(level, channels), up))

        self.norm_out = FrameGroupNorm(norm_groups, channels, 1e-5, norm_over, silu=True)
        self.conv_out = nn.Conv2d(channels, channels_out, 3, padding=1)
        zero_init(self.conv_out)

    def embed_time(self, t_B: Tensor, like: Tensor) -> Tensor:
        """The time embedding ``[B, E]``, of the type of ``like``."""
        embedding_BE: Tensor = self.time_embed(timestep_embedding(t_B, self.model_channels).to(like.dtype))
        return embedding_BE

    def through(self, z_BCTHW: Tensor, embedding_BTE: Tensor, *context: Any) -> Tensor:
        """Down, across and up: the output ``[B, C, T, H, W]``; attention is given ``context`` behind its tokens.

        The embedding has a row for each frame, or one for all.

        Raises:
            UserError: height or width is no multiple of the UNet's downsampling.
        """
        t, h, w = z_BCTHW.shape[2:]
        if h % self.factor or w % self.factor:
            raise UserError(f"latents of {h}x{w} do not fit a UNet that halves {self.factor.bit_length() - 1} times: "
                            f"height and width must be multiples of {self.factor}")  # fmt: skip
        embedding_BTE = F.silu(embedding_BTE)  # every residual block starts with it
        x_NCHW = rearrange(z_BCTHW, "b c t h w -> (b t) h w c").permute(0, 3, 1, 2)
        skips = []
        for block in self.input_blocks:
            x_NCHW = block(x_NCHW, embedding_BTE, *context)
            skips.append(x_NCHW)
        for block in self.middle_blocks:
            x_NCHW = block(x_NCHW, embedding_BTE, *context)
        for block in self.output_blocks:
            x_NCHW = block(join_channels(x_NCHW, skips.pop()), embedding_BTE, *context)
        x_NCHW = self.conv_out(self.norm_out(x_NCHW, t))
        return rearrange(x_NCHW, "(b t) c h w -> b c t h w", t=t)

    def remat_blocks(self) -> list[nn.Module]:
        """The blocks that activation checkpointing wraps: residual blocks and what attends."""
        attention = [m.transformer for m in self.modules() if isinstance(m, Stage) and m.transformer is not None]
        return [m for m in self.modules() if isinstance(m, ResBlock)] + attention


class Stage(nn.Module):
    """One rung of the UNet: whichever it has of residual block, transformer and convolution, in this order.

    What a call is given behind the embedding goes to the transformer.
    """

    def __init__(
        self, res: ResBlock | None = None, attention: nn.Module | None = None, conv: nn.Conv2d | None = None
    ) -> None:
        super().__init__()
        self.res = res
        self.transformer = attention
        self.conv = conv

    def forward(self, x_NCHW: Tensor, embedding_BTE: Tensor, *context: Any) -> Tensor:
        if self.res is not None:
            x_NCHW = self.res(x_NCHW, embedding_BTE)
        if self.transformer is not None:
            x_NCHW = self.transformer(x_NCHW, *context)
        if self.conv is not None:
            x_NCHW = self.conv(x_NCHW)
        return x_NCHW


class ResBlock(nn.Module):
    """Two convolutions with the time embedding between them; starts as the identity (or a projection).

    The embedding is added, or with ``scale_shift`` it scales and shifts what the second norm gives (adaptive group
    norm, arXiv 2105.05233, section 3.1).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding: int,
        groups: int,
        norm_over: NormOver,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = FrameGroupNorm(groups, channels_in, 1e-5, norm_over, silu=True)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.embed = nn.Linear(embedding, 2 * channels_out if scale_shift else channels_out)
        self.norm2 = FrameGroupNorm(groups, channels_out, 1e-5, norm_over, silu=not scale_shift)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None
        zero_init(self.conv2)

    def forward(self, x_NCHW: Tensor, embedding_BTE: Tensor) -> Tensor:
        frames = x_NCHW.shape[0] // embedding_BTE.shape[0]
        embedding_NC11 = self.embed(embedding_BTE).expand(-1, frames, -1).flatten(0, 1)[:, :, None, None]
        h_NCHW = self.conv1(self.norm1(x_NCHW, frames))
        if self.scale_shift:
            scale_NC11, shift_NC11 = embedding_NC11.chunk(2, dim=1)
            h_NCHW = F.silu(self.norm2(h_NCHW, frames) * (1 + scale_NC11) + shift_NC11)
        else:
            h_NCHW = self.norm2(h_NCHW + embedding_NC11, frames)
        h_NCHW = self.conv2(h_NCHW)
        return h_NCHW + (x_NCHW if self.skip is None else self.skip(x_NCHW))
