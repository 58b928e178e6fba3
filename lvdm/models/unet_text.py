"""LVDM's text-to-video UNet: Stable Diffusion's shape plus temporal attention (arXiv 2211.13221; LVDM's release).

Shape letters: B batch, C channels, T frames, H height, W width, N = B * T frames of a batch, S = H * W pixels,
L text tokens, D channels of a text token, E channels of the time embedding.

Convolutions see one frame at a time, so the network works on frames ``x_NCHW`` that lie channels-last in memory:
convolutions are 2-D, and pixels as tokens ``x_NSC`` or ``x_BTSC`` are views of the same memory. Only temporal attention
(and, with ``norm_over="clip"``, the statistics of the group norms) mixes frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lvdm.errors import UserError
from lvdm.models.attention import Attention, TemporalAttention
from lvdm.models.embeddings import timestep_embedding
from lvdm.models.layers import FrameGroupNorm, GatedMLP, LayerNorm, NormOver, Upsample, join_channels, zero_init


class TextUNet(nn.Module):
    """Predicts, from noisy latents, the diffusion time and a text, what the parameterisation asks for."""

    def __init__(
        self,
        *,
        latent_channels: int = 4,
        model_channels: int = 320,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        res_blocks: int = 2,
        attention_levels: Sequence[int] = (0, 1, 2),
        heads: int = 8,
        transformer_depth: int = 1,
        context_dim: int = 768,
        temporal_length: int = 16,
        relative_position: bool = True,
        norm_groups: int = 32,
        norm_over: NormOver = "clip",
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        self.factor = 2 ** (len(channel_mult) - 1)  # by which height and width shrink on the way down
        embedding = 4 * model_channels
        max_distance = temporal_length if relative_position else None

        def res(channels_in: int, channels_out: int) -> ResBlock:
            return ResBlock(channels_in, channels_out, embedding, norm_groups, norm_over)

        def transformer(channels: int) -> SpaceTimeTransformer:
            return SpaceTimeTransformer(
                channels, heads, transformer_depth, context_dim, max_distance, norm_groups, norm_over
            )

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )

        channels = model_channels
        skips = [channels]
        self.input_blocks = nn.ModuleList([Stage(conv=nn.Conv2d(latent_channels, channels, 3, padding=1))])
        for level, multiple in enumerate(channel_mult):
            for _ in range(res_blocks):
                block, channels = res(channels, multiple * model_channels), multiple * model_channels
                self.input_blocks.append(Stage(block, transformer(channels) if level in attention_levels else None))
                skips.append(channels)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(Stage(conv=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))
                skips.append(channels)

        self.middle_blocks = nn.ModuleList(
            [Stage(res(channels, channels), transformer(channels)), Stage(res(channels, channels))]
        )

        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(channel_mult))):
            for i in range(res_blocks + 1):
                block, channels = res(channels + skips.pop(), multiple * model_channels), multiple * model_channels
                up = Upsample(channels) if level > 0 and i == res_blocks else None
                self.output_blocks.append(
                    Stage(block, transformer(channels) if level in attention_levels else None, up)
                )

        self.norm_out = FrameGroupNorm(norm_groups, channels, 1e-5, norm_over, silu=True)
        self.conv_out = nn.Conv2d(channels, latent_channels, 3, padding=1)
        zero_init(self.conv_out)

    def forward(self, z_BCTHW: Tensor, t_B: Tensor, text_BLD: Tensor, text_mask_BL: Tensor | None = None) -> Tensor:
        """The network's output ``[B, C, T, H, W]``, of the type of ``z_BCTHW``.

        Args:
            z_BCTHW: noisy latents, of the type of the weights.
            t_B: diffusion time, integer or float, on the scale 0..1000 of training.
            text_BLD: text states.
            text_mask_BL: true where a token may be attended to; None for all.

        Raises:
            UserError: height or width is no multiple of the UNet's downsampling.
        """
        t, h, w = z_BCTHW.shape[2:]
        if h % self.factor or w % self.factor:
            raise UserError(f"latents of {h}x{w} do not fit a UNet that halves {self.factor.bit_length() - 1} times: "
                            f"height and width must be multiples of {self.factor}")  # fmt: skip
        embedding_BE = self.time_embed(timestep_embedding(t_B, self.model_channels).to(z_BCTHW.dtype))
        embedding_BE = F.silu(embedding_BE)  # every residual block starts with it
        text_BLD = text_BLD.to(z_BCTHW.dtype)

        x_NCHW = rearrange(z_BCTHW, "b c t h w -> (b t) h w c").permute(0, 3, 1, 2)
        skips = []
        for block in self.input_blocks:
            x_NCHW = block(x_NCHW, embedding_BE, text_BLD, text_mask_BL)
            skips.append(x_NCHW)
        for block in self.middle_blocks:
            x_NCHW = block(x_NCHW, embedding_BE, text_BLD, text_mask_BL)
        for block in self.output_blocks:
            x_NCHW = block(join_channels(x_NCHW, skips.pop()), embedding_BE, text_BLD, text_mask_BL)
        x_NCHW = self.conv_out(self.norm_out(x_NCHW, t))
        return rearrange(x_NCHW, "(b t) c h w -> b c t h w", t=t)

    def remat_blocks(self) -> list[nn.Module]:
        """The blocks that activation checkpointing wraps: residual blocks and transformers."""
        return [m for m in self.modules() if isinstance(m, ResBlock | SpaceTimeTransformer)]


class Stage(nn.Module):
    """One rung of the UNet: whichever it has of residual block, transformer and convolution, in this order.

    What a call is given behind the embedding goes to the transformer.
    """

    def __init__(
        self, res: ResBlock | None = None, transformer: nn.Module | None = None, conv: nn.Conv2d | None = None
    ) -> None:
        super().__init__()
        self.res = res
        self.transformer = transformer
        self.conv = conv

    def forward(self, x_NCHW: Tensor, embedding_BE: Tensor, *context: Any) -> Tensor:
        if self.res is not None:
            x_NCHW = self.res(x_NCHW, embedding_BE)
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

    def forward(self, x_NCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        frames = x_NCHW.shape[0] // embedding_BE.shape[0]
        embedding_NC11 = self.embed(embedding_BE).repeat_interleave(frames, dim=0)[:, :, None, None]
        h_NCHW = self.conv1(self.norm1(x_NCHW, frames))
        if self.scale_shift:
            scale_NC11, shift_NC11 = embedding_NC11.chunk(2, dim=1)
            h_NCHW = F.silu(self.norm2(h_NCHW, frames) * (1 + scale_NC11) + shift_NC11)
        else:
            h_NCHW = self.norm2(h_NCHW + embedding_NC11, frames)
        h_NCHW = self.conv2(h_NCHW)
        return h_NCHW + (x_NCHW if self.skip is None else self.skip(x_NCHW))


class SpaceTimeTransformer(nn.Module):
    """Transformer blocks between two linear projections, as a residual that starts at zero."""

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        context_dim: int,
        max_distance: int | None,
        groups: int,
        norm_over: NormOver,
    ) -> None:
        super().__init__()
        self.norm = FrameGroupNorm(groups, channels, 1e-6, norm_over)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim, max_distance) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)
        zero_init(self.proj_out)

    def forward(self, x_NCHW: Tensor, text_BLD: Tensor, text_mask_BL: Tensor | None) -> Tensor:
        n, c, h, w = x_NCHW.shape
        b = text_BLD.shape[0]
        tokens_NHWC = self.norm(x_NCHW, n // b).permute(0, 2, 3, 1)
        tokens_BTSC = self.proj_in(tokens_NHWC.reshape(b, n // b, h * w, c))
        for block in self.blocks:
            tokens_BTSC = block(tokens_BTSC, text_BLD, text_mask_BL)
        return x_NCHW + self.proj_out(tokens_BTSC).reshape(n, h, w, c).permute(0, 3, 1, 2)


class TransformerBlock(nn.Module):
    """Attention over space, over time, to the text (the same for every frame), over time again, then a gated MLP."""

    def __init__(self, channels: int, heads: int, context_dim: int, max_distance: int | None) -> None:
        super().__init__()
        self.norm_space = LayerNorm(channels)
        self.attn_space = Attention(channels, heads)
        self.norm_time1 = LayerNorm(channels)
        self.attn_time1 = TemporalAttention(channels, heads, max_distance)
        self.norm_text = LayerNorm(channels)
        self.attn_text = Attention(channels, heads, context_dim)
        self.norm_time2 = LayerNorm(channels)
        self.attn_time2 = TemporalAttention(channels, heads, max_distance)
        self.norm_ff = LayerNorm(channels)
        self.ff = GatedMLP(channels)

    def forward(self, x_BTSC: Tensor, text_BLD: Tensor, text_mask_BL: Tensor | None) -> Tensor:
        _, t, s, _ = x_BTSC.shape
        x_BTSC = x_BTSC + self.attn_space(self.norm_space(x_BTSC).flatten(0, 1)).view_as(x_BTSC)
        x_BTSC = x_BTSC + self.attn_time1(self.norm_time1(x_BTSC))
        queries_BQC = self.norm_text(x_BTSC).flatten(1, 2)  # every frame sees the same text: one long query
        x_BTSC = x_BTSC + self.attn_text(queries_BQC, text_BLD, text_mask_BL).unflatten(1, (t, s))
        x_BTSC = x_BTSC + self.attn_time2(self.norm_time2(x_BTSC))
        return x_BTSC + self.ff(self.norm_ff(x_BTSC))
