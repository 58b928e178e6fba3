"""ModelScope's text-to-video UNet: Stable Diffusion's shape plus temporal convolutions and temporal transformers
(arXiv 2308.06571; in eval mode equal to diffusers' ``UNet3DConditionModel``, which cannot checkpoint activations).

Shape letters: B batch, C channels, T frames, H height, W width, N = B * T frames of a batch, S = H * W pixels,
Q tokens, L text tokens, D channels of a text token, E channels of the time embedding.

Frames ``x_NCHW`` lie channels-last in memory, as in `unet_text`. A temporal convolution sees the same memory as
``x_BTSC`` and is matrix products over the channels, so nothing is copied. A temporal transformer needs the frames of a
pixel in a row: it copies its tokens once on the way in and once on the way out. Statistics of group norms run over each
frame alone, but over the clip in front of a temporal layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lvdm.errors import UserError
from lvdm.models.attention import Attention
from lvdm.models.embeddings import timestep_embedding
from lvdm.models.layers import (
    FrameConv,
    FrameGroupNorm,
    GatedMLP,
    GroupNorm,
    LayerNorm,
    Upsample,
    join_channels,
    zero_init,
)
from lvdm.models.unet_frames import ResBlock

_IN_HEADS = 8  # of the transformer behind the first convolution, whatever its channels


class ModelScopeUNet(nn.Module):
    """Predicts, from noisy latents, the diffusion time and a text, what the parameterisation asks for."""

    def __init__(
        self,
        *,
        latent_channels: int = 4,
        channels: Sequence[int] = (320, 640, 1280, 1280),
        res_blocks: int = 2,
        attention_levels: Sequence[int] = (0, 1, 2),
        head_channels: int = 64,
        context_dim: int = 1024,
        norm_groups: int = 32,
        frame_rate: bool = False,
    ) -> None:
        super().__init__()
        self.model_channels = channels[0]
        self.factor = 2 ** (len(channels) - 1)  # by which height and width shrink on the way down
        embedding = 4 * self.model_channels

        def stage(channels_in: int, channels_out: int, attention: bool, up: bool = False) -> Stage:
            return Stage(
                ResBlock(channels_in, channels_out, embedding, norm_groups, "frame"),
                TemporalConv(channels_out, norm_groups),
                SpatialTransformer(channels_out, head_channels, context_dim, norm_groups) if attention else None,
                TemporalTransformer(channels_out, channels_out // head_channels, head_channels, norm_groups)
                if attention
                else None,
                Upsample(channels_out) if up else None,
            )

        self.time_embed = embedding_mlp(self.model_channels, embedding)
        self.frame_rate_embed: nn.Sequential | None = None
        if frame_rate:
            self.frame_rate_embed = embedding_mlp(self.model_channels, embedding)
            zero_init(self.frame_rate_embed[2])  # type: ignore[arg-type]

        current = self.model_channels
        self.conv_in = nn.Conv2d(latent_channels, current, 3, padding=1)
        self.transformer_in = TemporalTransformer(current, _IN_HEADS, head_channels, norm_groups)

        skips = [current]
        self.input_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            for _ in range(res_blocks):
                self.input_blocks.append(stage(current, width, level in attention_levels))
                current = width
                skips.append(current)
            if level < len(channels) - 1:
                self.input_blocks.append(Stage(conv=nn.Conv2d(current, current, 3, stride=2, padding=1)))
                skips.append(current)

        self.middle_blocks = nn.ModuleList([stage(current, current, True), stage(current, current, False)])

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            for i in range(res_blocks + 1):
                up = level > 0 and i == res_blocks
                self.output_blocks.append(stage(current + skips.pop(), width, level in attention_levels, up))
                current = width

        self.norm_out = GroupNorm(norm_groups, current, 1e-5, silu=True)
        self.conv_out = nn.Conv2d(current, latent_channels, 3, padding=1)
        zero_init(self.conv_out)

    def forward(
        self,
        z_BCTHW: Tensor,
        t_B: Tensor,
        text_BLD: Tensor,
        text_mask_BL: Tensor | None = None,
        fps_B: Tensor | None = None,
    ) -> Tensor:
        """The network's output ``[B, C, T, H, W]``, of the type of ``z_BCTHW``.

        Args:
            z_BCTHW: noisy latents, of the type of the weights.
            t_B: diffusion time, integer or float, on the scale 0..1000 of training.
            text_BLD: text states.
            text_mask_BL: true where a token may be attended to; None for all.
            fps_B: frames a second of each clip, for a model with ``frame_rate``.

        Raises:
            UserError: height or width is no multiple of the UNet's downsampling, or the frame rate is missing.
        """
        t, h, w = z_BCTHW.shape[2:]
        if h % self.factor or w % self.factor:
            raise UserError(f"latents of {h}x{w} do not fit a UNet that halves {self.factor.bit_length() - 1} times: "
                            f"height and width must be multiples of {self.factor}")  # fmt: skip
        embedding_BE = self.time_embed(timestep_embedding(t_B, self.model_channels).to(z_BCTHW.dtype))
        if self.frame_rate_embed is not None:
            if fps_B is None:
                raise UserError("this model is conditioned on the frame rate (model.frame_rate): give fps")
            fps_BC = timestep_embedding(fps_B, self.model_channels).to(z_BCTHW.dtype)
            embedding_BE = embedding_BE + self.frame_rate_embed(fps_BC)
        embedding_BTE = F.silu(embedding_BE)[:, None]  # silu: every residual block starts with it; T is 1
        text_BLD = text_BLD.to(z_BCTHW.dtype)

        x_NCHW = rearrange(z_BCTHW, "b c t h w -> (b t) h w c").permute(0, 3, 1, 2)
        x_NCHW = self.transformer_in(self.conv_in(x_NCHW), t)
        skips = [x_NCHW]
        for block in self.input_blocks:
            x_NCHW = block(x_NCHW, embedding_BTE, text_BLD, text_mask_BL)
            skips.append(x_NCHW)
        for block in self.middle_blocks:
            x_NCHW = block(x_NCHW, embedding_BTE, text_BLD, text_mask_BL)
        for block in self.output_blocks:
            x_NCHW = block(join_channels(x_NCHW, skips.pop()), embedding_BTE, text_BLD, text_mask_BL)
        x_NCHW = self.conv_out(self.norm_out(x_NCHW))
        return rearrange(x_NCHW, "(b t) c h w -> b c t h w", t=t)

    def remat_blocks(self) -> list[nn.Module]:
        """The blocks that activation checkpointing wraps: residual blocks, temporal convolutions and transformers."""
        kinds = ResBlock | TemporalConv | SpatialTransformer | TemporalTransformer
        return [m for m in self.modules() if isinstance(m, kinds)]


def embedding_mlp(channels: int, embedding: int) -> nn.Sequential:
    """From sinusoids to what the residual blocks add."""
    return nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))


class Stage(nn.Module):
    """One rung of the UNet: whichever it has of these layers, in this order."""

    def __init__(
        self,
        res: ResBlock | None = None,
        temporal_conv: TemporalConv | None = None,
        transformer: SpatialTransformer | None = None,
        temporal_transformer: TemporalTransformer | None = None,
        conv: nn.Conv2d | None = None,
    ) -> None:
        super().__init__()
        self.res = res
        self.temporal_conv = temporal_conv
        self.transformer = transformer
        self.temporal_transformer = temporal_transformer
        self.conv = conv

    def forward(self, x_NCHW: Tensor, embedding_BTE: Tensor, text_BLD: Tensor, text_mask_BL: Tensor | None) -> Tensor:
        frames = x_NCHW.shape[0] // embedding_BTE.shape[0]
        if self.res is not None:
            x_NCHW = self.res(x_NCHW, embedding_BTE)
        if self.temporal_conv is not None:
            x_NCHW = self.temporal_conv(x_NCHW, frames)
        if self.transformer is not None:
            x_NCHW = self.transformer(x_NCHW, text_BLD, text_mask_BL)
        if self.temporal_transformer is not None:
            x_NCHW = self.temporal_transformer(x_NCHW, frames)
        if self.conv is not None:
            x_NCHW = self.conv(x_NCHW)
        return x_NCHW


class TemporalConv(nn.Module):
    """Four normed convolutions over three frames of each pixel, as a residual that starts at zero."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(GroupNorm(groups, channels, 1e-5, silu=True) for _ in range(4))
        self.convs = nn.ModuleList(FrameConv(channels) for _ in range(4))
        zero_init(self.convs[3])  # type: ignore[arg-type]

    def forward(self, x_NCHW: Tensor, frames: int) -> Tensor:
        n, c, h, w = x_NCHW.shape
        x_BTSC = x_NCHW.permute(0, 2, 3, 1).reshape(n // frames, frames, h * w, c)
        h_BTSC = x_BTSC
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h_BTSC = conv(norm(h_BTSC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return (x_BTSC + h_BTSC).reshape(n, h, w, c).permute(0, 3, 1, 2)


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a frame and the text, as a residual that starts at zero."""

    def __init__(self, channels: int, head_channels: int, context_dim: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.block = TransformerBlock(channels, channels // head_channels, context_dim)
        self.proj_out = nn.Linear(channels, channels)
        zero_init(self.proj_out)

    def forward(self, x_NCHW: Tensor, text_BLD: Tensor, text_mask_BL: Tensor | None) -> Tensor:
        n, c, h, w = x_NCHW.shape
        tokens_NSC = self.proj_in(self.norm(x_NCHW).permute(0, 2, 3, 1).reshape(n, h * w, c))
        tokens_NSC = self.proj_out(self.block(tokens_NSC, text_BLD, text_mask_BL))
        return x_NCHW + tokens_NSC.reshape(n, h, w, c).permute(0, 3, 1, 2)


class TemporalTransformer(nn.Module):
    """A transformer block over the frames of each pixel, as a residual that starts at zero; it knows no positions."""

    def __init__(self, channels: int, heads: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.norm = FrameGroupNorm(groups, channels, 1e-6, "clip")
        self.proj_in = nn.Linear(channels, heads * head_channels)
        self.block = TransformerBlock(heads * head_channels, heads, None)
        self.proj_out = nn.Linear(heads * head_channels, channels)
        zero_init(self.proj_out)

    def forward(self, x_NCHW: Tensor, frames: int) -> Tensor:
        h = x_NCHW.shape[2]
        tokens_QTC = rearrange(self.norm(x_NCHW, frames), "(b t) c h w -> (b h w) t c", t=frames)
        tokens_QTC = self.proj_out(self.block(self.proj_in(tokens_QTC)))
        n = x_NCHW.shape[0] // frames
        return x_NCHW + rearrange(tokens_QTC, "(b h w) t c -> (b t) h w c", b=n, h=h).permute(0, 3, 1, 2)


class TransformerBlock(nn.Module):
    """Attention of tokens to themselves, to the text (without one, to themselves again), then a gated MLP."""

    def __init__(self, channels: int, heads: int, context_dim: int | None) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_dim)
        self.norm3 = LayerNorm(channels)
        self.ff = GatedMLP(channels)

    def forward(self, x_NQC: Tensor, text_BLD: Tensor | None = None, text_mask_BL: Tensor | None = None) -> Tensor:
        x_NQC = x_NQC + self.attn1(self.norm1(x_NQC))
        queries = self.norm2(x_NQC)
        if text_BLD is not None:  # every frame sees the same text: one long query
            queries = queries.view(text_BLD.shape[0], -1, x_NQC.shape[-1])
        x_NQC = x_NQC + self.attn2(queries, text_BLD, text_mask_BL).view_as(x_NQC)
        return x_NQC + self.ff(self.norm3(x_NQC))
