"""The networks: a config class each, told apart by ``kind``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lvdm.config.base import NonNegativeInt, PositiveInt, Section


class ModelSection(Section):
    """What every network has."""

    trainable: tuple[str, ...] = ()
    """Shell patterns of the names of parameters that learn, such as ``*attn_time*``; the rest is frozen. Empty: all."""


class VideoAutoencoderConfig(ModelSection):
    """LVDM's 3-D convolutional autoencoder (``lvdm/models/video_autoencoder.py``)."""

    kind: Literal["video_autoencoder"] = "video_autoencoder"
    """Tells the class."""
    hidden_channels: PositiveInt = 32
    """Channels after the first convolution; each of the down blocks doubles them."""
    downsample: tuple[PositiveInt, PositiveInt, PositiveInt] = (4, 8, 8)
    """Factors by which time, height and width shrink; powers of two."""
    latent_channels: PositiveInt = 4
    """Channels of a latent."""
    norm_groups: PositiveInt = 32
    """Groups of the group norms; must divide ``2 * hidden_channels``."""

    @model_validator(mode="after")
    def _fits(self) -> VideoAutoencoderConfig:
        if any(factor & (factor - 1) for factor in self.downsample):
            raise ValueError(f"downsample {self.downsample} must hold powers of two")
        if (2 * self.hidden_channels) % self.norm_groups:
            raise ValueError(
                f"norm_groups {self.norm_groups} must divide 2 * hidden_channels = {2 * self.hidden_channels}"
            )
        return self


class TextUNetConfig(ModelSection):
    """LVDM's text-to-video UNet: Stable Diffusion's shape plus temporal attention (``lvdm/models/unet_text.py``)."""

    kind: Literal["text_unet"] = "text_unet"
    """Tells the class."""
    latent_channels: PositiveInt = 4
    """Channels of the latents it denoises."""
    model_channels: PositiveInt = 320
    """Channels at full latent resolution."""
    channel_mult: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 4)
    """Multiples of ``model_channels`` per level; each level but the last halves height and width."""
    res_blocks: PositiveInt = 2
    """Residual blocks per level."""
    attention_levels: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """Levels (0 is full resolution) with a space-time transformer behind each residual block; the middle has one."""
    heads: PositiveInt = 8
    """Attention heads; the head dimension is channels / heads."""
    transformer_depth: PositiveInt = 1
    """Transformer blocks in each space-time transformer."""
    context_dim: PositiveInt = 768
    """Channels of the text states."""
    temporal_length: PositiveInt = 16
    """Largest relative distance in frames that has its own position embedding; clips may be longer."""
    relative_position: bool = True
    """Relative position tables in temporal attention."""
    pooled_text: bool = False
    """Add the mean of the text states, normed and projected, to the time embedding, beside cross-attention (as Imagen,
    arXiv 2205.11487): the text is then heard at all levels, and early in training. LVDM: false."""
    scale_shift: bool = False
    """Whether the time embedding scales and shifts the norms of residual blocks (arXiv 2105.05233) rather than being
    added. LVDM's text model: false."""
    coordinates: bool = False
    """Tell the network where in time, height and width a value lies, by nine more input channels (arXiv 1807.03247) and
    by letting the frame's place scale and shift the time embedding, so that "left" can be learnt early. LVDM: false."""
    norm_groups: PositiveInt = 32
    """Groups of the group norms; must divide ``model_channels``."""
    norm_over: Literal["clip", "frame"] = "clip"
    """Whether group norm statistics run over all frames of a clip (LVDM) or over each frame alone."""

    @property
    def halvings(self) -> int:
        """How often height and width are halved on the way down."""
        return len(self.channel_mult) - 1

    @model_validator(mode="after")
    def _fits(self) -> TextUNetConfig:
        _check_levels(self)
        return self


class SpaceTimeUNetConfig(ModelSection):
    """LVDM's UNet without text: attention over space, then time, and adaptive norms (``lvdm/models/unet_st.py``)."""

    kind: Literal["space_time_unet"] = "space_time_unet"
    """Tells the class."""
    latent_channels: PositiveInt = 4
    """Channels of the latents it denoises."""
    model_channels: PositiveInt = 256
    """Channels at full latent resolution."""
    channel_mult: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3, 4)
    """Multiples of ``model_channels`` per level; each level but the last halves height and width."""
    res_blocks: PositiveInt = 3
    """Residual blocks per level."""
    attention_levels: tuple[NonNegativeInt, ...] = (1, 2, 3)
    """Levels (0 is full resolution) with space-time attention behind each residual block; the middle has one."""
    heads: PositiveInt = 4
    """Attention heads; the head dimension is channels / heads."""
    temporal_length: PositiveInt = 4
    """Largest relative distance in frames that has its own position embedding; clips may be longer."""
    relative_keys: Literal["shaw", "transposed"] = "shaw"
    """Relative positions of the keys: as defined (``shaw``, arXiv 1803.02155), or ``transposed``, the released LVDM
    models' slip, which swaps query and key in that term and scales it by d^(-1/4): their weights need it."""
    norm_groups: PositiveInt = 32
    """Groups of the group norms; must divide ``model_channels``."""
    norm_over: Literal["clip", "frame"] = "clip"
    """Whether group norm statistics of residual blocks run over all frames of a clip (LVDM) or over each frame."""
    mask_channel: bool = False
    """Whether the input has one more channel that marks given frames, for prediction and interpolation."""
    noise_levels: NonNegativeInt = 0
    """Labels of the noise level of given frames, embedded like the time; the last one means none. 0: no labels."""

    @property
    def halvings(self) -> int:
        """How often height and width are halved on the way down."""
        return len(self.channel_mult) - 1

    @model_validator(mode="after")
    def _fits(self) -> SpaceTimeUNetConfig:
        _check_levels(self)
        if self.noise_levels and not self.mask_channel:
            raise ValueError("noise_levels belong to given frames, so they need mask_channel: true")
        return self


def _check_levels(model: TextUNetConfig | SpaceTimeUNetConfig) -> None:
    """Raises `ValueError` where channels, heads, groups and levels do not go together."""
    for multiple in model.channel_mult:
        channels = model.model_channels * multiple
        if channels % model.heads or channels % model.norm_groups:
            raise ValueError(
                f"{channels} channels must be divisible by heads {model.heads} and norm_groups {model.norm_groups}"
            )
    if any(level >= len(model.channel_mult) for level in model.attention_levels):
        raise ValueError(
            f"attention_levels {model.attention_levels} exceed the {len(model.channel_mult)} levels of channel_mult"
        )


class ModelScopeUNetConfig(ModelSection):
    """ModelScope's text-to-video UNet, diffusers' UNet3DConditionModel (``lvdm/models/unet_modelscope.py``)."""

    kind: Literal["modelscope_unet"] = "modelscope_unet"
    """Tells the class."""
    latent_channels: PositiveInt = 4
    """Channels of the latents it denoises."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (320, 640, 1280, 1280)
    """Channels per level; each level but the last halves height and width."""
    res_blocks: PositiveInt = 2
    """Residual blocks per level."""
    attention_levels: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """Levels (0 is full resolution) with transformers behind each residual block; the middle has one of each."""
    head_channels: PositiveInt = 64
    """Channels of an attention head; must divide the channels of the levels with transformers."""
    context_dim: PositiveInt = 1024
    """Channels of the text states."""
    norm_groups: PositiveInt = 32
    """Groups of the group norms; must divide all channels."""
    frame_rate: bool = False
    """Condition on the frames a second of a clip; no layout of diffusers has that."""

    @property
    def halvings(self) -> int:
        """How often height and width are halved on the way down."""
        return len(self.channels) - 1

    @model_validator(mode="after")
    def _fits(self) -> ModelScopeUNetConfig:
        if any(level >= len(self.channels) for level in self.attention_levels):
            raise ValueError(
                f"attention_levels {self.attention_levels} exceed the {len(self.channels)} levels of channels"
            )
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(f"{width} channels must be divisible by norm_groups {self.norm_groups}")
        for width in (self.channels[-1], *(self.channels[level] for level in self.attention_levels)):
            if width % self.head_channels:
                raise ValueError(f"{width} channels must be divisible by head_channels {self.head_channels}")
        return self


UNetConfig = Annotated[TextUNetConfig | SpaceTimeUNetConfig | ModelScopeUNetConfig, Field(discriminator="kind")]
