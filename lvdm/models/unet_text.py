"""LVDM's text-to-video UNet: Stable Diffusion's shape plus temporal attention (arXiv 2211.13221; LVDM's release).

Shape letters: B batch, C channels, T frames, H height, W width, N = B * T frames of a batch, S = H * W pixels,
L text tokens, D channels of a text token, E channels of the time embedding.

Pixels as tokens ``x_NSC`` or ``x_BTSC`` are views of the frames that `unet_frames` works on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lvdm.models.attention import Attention, TemporalAttention
from lvdm.models.embeddings import PLACE_CHANNELS, along_axes, places
from lvdm.models.layers import FrameGroupNorm, GatedMLP, LayerNorm, NormOver, zero_init
from lvdm.models.unet_frames import FrameUNet


class TextUNet(FrameUNet):
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
        pooled_text: bool = False,
        scale_shift: bool = False,
        coordinates: bool = False,
        norm_groups: int = 32,
        norm_over: NormOver = "clip",
    ) -> None:
        max_distance = temporal_length if relative_position else None
        super().__init__(
            channels_in=latent_channels + (3 * PLACE_CHANNELS if coordinates else 0),
            channels_out=latent_channels,
            model_channels=model_channels,
            channel_mult=channel_mult,
            res_blocks=res_blocks,
            attention_levels=attention_levels,
            attention=lambda channels: SpaceTimeTransformer(
                channels, heads, transformer_depth, context_dim, max_distance, norm_groups, norm_over
            ),
            norm_groups=norm_groups,
            norm_over=norm_over,
            scale_shift=scale_shift,
        )
        self.frame_embed = nn.Linear(PLACE_CHANNELS, 8 * model_channels) if coordinates else None
        self.text_embed = PooledText(context_dim, 4 * model_channels) if pooled_text else None

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
        text_BLD = text_BLD.to(z_BCTHW.dtype)
        embedding_BE = self.embed_time(t_B, like=z_BCTHW)
        if self.text_embed is not None:
            embedding_BE = embedding_BE + self.text_embed(text_BLD, text_mask_BL)
        embedding_BTE = embedding_BE[:, None]
        if self.frame_embed is not None:
            t, h, w = (places(side, like=z_BCTHW) for side in z_BCTHW.shape[2:])
            scale_TE, shift_TE = self.frame_embed(t).chunk(2, dim=-1)
            embedding_BTE = embedding_BTE * (1 + scale_TE) + shift_TE  # a product: what moves left is a matter of both
            z_BCTHW = torch.cat([z_BCTHW, along_axes(t, h, w).expand(len(z_BCTHW), -1, -1, -1, -1)], dim=1)
        return self.through(z_BCTHW, embedding_BTE, text_BLD, text_mask_BL)


class PooledText(nn.Module):
    """The normed mean of the text states, projected to the channels of the time embedding.

    Captions differ by few of their words, so their means differ little: the norm and first weights of variance 1 / D
    (`nn.Linear` has a third of it) make that difference about as large as the time's, or it is not heard for long.
    """

    def __init__(self, context_dim: int, embedding: int) -> None:
        super().__init__()
        self.norm = LayerNorm(context_dim)
        self.proj = nn.Linear(context_dim, embedding)
        nn.init.normal_(self.proj.weight, std=context_dim**-0.5)

    def forward(self, text_BLD: Tensor, text_mask_BL: Tensor | None) -> Tensor:
        """``[B, E]``; tokens outside the mask do not count."""
        if text_mask_BL is None:
            mean_BD = text_BLD.mean(1)
        else:
            weights_BL1 = text_mask_BL[..., None].to(text_BLD.dtype)
            mean_BD = (text_BLD * weights_BL1).sum(1) / weights_BL1.sum(1)
        embedding_BE: Tensor = self.proj(self.norm(mean_BD))
        return embedding_BE


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
