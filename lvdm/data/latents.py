"""The shard format of pre-encoded clips: everything a later run must know travels with the bytes.

A sample ``{key}`` has the members

* ``{key}.json`` and ``{key}.txt``: metadata with what was encoded and how (``encoded``), and the first caption
* ``{key}.P-I.text.safetensors``: ``states`` ``[L, D]`` of caption I of place P, at its true length L
* ``{key}.N.latent.safetensors``: ``moments`` ``[2C, T, H, W]`` of clip N, mean and log-variance of the posterior

and a folder of shards has ``latents.json`` (`LatentSetInfo`) and ``unconditional.safetensors`` (``states`` of the empty
caption). Moments are stored unscaled and unsampled: scale, shift and posterior noise are applied when they are read.
A folder may hold text states alone, to be joined to one of latents, or latents alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lvdm.config import ClipConfig, Scaling, Section
from lvdm.config.base import NonNegativeInt, PositiveInt
from lvdm.errors import BadSample, UserError
from lvdm.storage import Missing, atomic_file, read_file, write_text

INFO_NAME = "latents.json"
UNCONDITIONAL_NAME = "unconditional.safetensors"
LARGEST_MEAN = 1e3
"""Means beyond this come from a broken encoder; such samples are bad."""
LARGEST_LOG_VARIANCE = 100.0
"""As `LARGEST_MEAN`, either way; a posterior takes log variances of -30 to 20 as they are."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BUILD = "make it with: python tools/encode_latents.py"


class LatentVAE(Section):
    """The autoencoder that made the latents."""

    kind: Literal["lvdm", "diffusers"]
    """As in the config section ``vae``."""
    name: str
    """Folder or hub name it was loaded from."""
    sha256: str
    """Digest of its weights."""


class LatentText(Section):
    """The text encoder that made the text states."""

    name: str
    """Folder, hub or package name it was loaded from."""
    sha256: str
    """Digest of its weights."""
    max_length: int
    """Tokens kept of a caption."""
    dim: int
    """Channels of the states."""
    mask_padding: bool
    """Whether padding was left out of the states (and is masked in attention)."""


class LatentSetInfo(Section):
    """What ``latents.json`` says about a folder of latent shards."""

    format: Literal["lvdm-latents"] = "lvdm-latents"
    """Names the format."""
    version: Literal[2] = 2
    """Its version."""
    vae: LatentVAE | None
    """The autoencoder; none in a folder of text states alone."""
    text: LatentText | None
    """The text encoder; none in a folder without text states."""
    scale: Scaling = 1.0
    """The UNet sees ``scale * (latent + shift)``; one for all channels or one a channel."""
    shift: Scaling = 0.0
    """See ``scale``."""
    clip: ClipConfig
    """How clips were cut and resized."""
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    """What decoded the videos: each scales in its own way."""
    clips: PositiveInt = 1
    """Most clips of a video."""
    captions: dict[str, float] = Field(default_factory=dict)
    """Where captions came from, with weights, as in ``data.video.captions``."""
    seed: NonNegativeInt = 0
    """Seed of the draws of where clips lie."""
    dtype: Literal["fp32", "bf16"]
    """Type of the stored moments and states."""
    compute: Literal["fp32", "bf16"] = "fp32"
    """Type that the encoders computed in."""
    frames_at_once: PositiveInt = 16
    """Frames in one call of the autoencoder (whole clips of them, for one that sees a clip as a whole), which decides
    the last bits."""
    shapes: tuple[tuple[int, int, int, int], ...]
    """C, T, H, W of the latents of each of ``clip.sizes``; empty in a folder of text states alone."""
    samples: int
    """Samples in the folder."""
    content: str = ""
    """Digest of all shards."""
    lvdm_version: str
    """Version of the code that wrote it."""

    @model_validator(mode="after")
    def _a_shape_a_size(self) -> LatentSetInfo:
        wanted = len(self.clip.sizes) if self.vae else 0
        if len(self.shapes) != wanted:
            raise ValueError(f"{len(self.shapes)} shapes instead of {wanted}")
        return self

    @property
    def places(self) -> list[str]:
        """Where captions came from, in the order of their numbers; empty for the one place of `read_caption`."""
        return [name for name, weight in self.captions.items() if weight > 0]


def latent_member(clip: int) -> str:
    """Extension of the moments of a sample's clip, counted from 0."""
    return f"{clip}.latent.safetensors"


def text_member(place: int, item: int) -> str:
    """Extension of the states of a sample's caption: which of the places in `LatentSetInfo.captions` (0 if that is
    empty), and which there."""
    return f"{place}-{item}.text.safetensors"


def write_latent_set(folder: str, info: LatentSetInfo, unconditional_LD: Tensor | None) -> None:
    """Write the files that describe the latent shards in ``folder`` (any fsspec URL).

    Args:
        unconditional_LD: states of the empty caption; none in a folder without text states.
    """
    assert (unconditional_LD is None) == (info.text is None)
    if unconditional_LD is not None:
        with atomic_file(f"{folder}/{UNCONDITIONAL_NAME}") as path:
            Path(path).write_bytes(pack_text(unconditional_LD, info.dtype))
    write_text(f"{folder}/{INFO_NAME}", info.model_dump_json(indent=2))


def read_latent_set(folder: str) -> LatentSetInfo:
    """Read ``latents.json`` of a folder of latent shards (any fsspec URL).

    Raises:
        Missing: there is none.
        UserError: it is of another version, or damaged.
        Requeue: the store does not answer.
    """
    url = f"{folder.rstrip('/')}/{INFO_NAME}"
    try:
        tree = json.loads(read_file(url))
    except Missing:
        raise Missing(f"{folder.rstrip('/')} holds no latents ({INFO_NAME} is missing); {_BUILD}") from None
    except ValueError as error:
        raise UserError(f"{url} is damaged: {error}; {_BUILD}") from None
    if isinstance(tree, dict) and tree.get("version") == 1:
        raise UserError(f"{url} is of version 1, which this lvdm does not read; encode the videos again: {_BUILD}")
    try:
        return LatentSetInfo.model_validate(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise UserError(f"{url}: {where}: {fault['msg']}") from None


def read_unconditional(folder: str) -> Tensor:
    """Text states ``[L, D]`` (fp32) of the empty caption. Raises `UserError` and `Requeue`."""
    url = f"{folder.rstrip('/')}/{UNCONDITIONAL_NAME}"
    try:
        return _unpack("states", read_file(url), 2)
    except Missing:
        raise UserError(f"{url} is missing; {_BUILD}") from None
    except BadSample as error:
        raise UserError(f"{url} is damaged: {error}; {_BUILD}") from None


def settings_difference(a: LatentSetInfo, b: LatentSetInfo) -> str:
    """The first setting that decides what two folders hold and is not the same, with both values, as
    ``text.max_length: 16, not 8``; empty if there is none."""
    return first_difference(content_settings(a), content_settings(b))


def content_settings(info: LatentSetInfo) -> dict[str, str]:
    """What decides the content of a folder, by dotted name. Names of models do not: their digests tell."""
    free = {"samples", "content", "lvdm_version", "scale", "shift", "shapes", "clip", "captions"}
    settings = _flat(info.model_dump(mode="json", exclude=free))
    settings = {name: value for name, value in settings.items() if name not in ("vae.name", "text.name")}
    places = ", ".join(info.places) or "txt, else caption"
    return settings | {f"clip.{name}": value for name, value in clip_settings(info.clip).items()} | {"captions": places}


def clip_settings(clip: ClipConfig) -> dict[str, str]:
    """What of a clip's settings decides the clips, by name; batch sizes of buckets do not."""
    sizes = sorted(f"{size.frames}x{size.height}x{size.width}" for size in clip.sizes)
    unused = {"buckets", "frames", "height", "width"} if clip.buckets else {"buckets"}
    rest = _flat(clip.model_dump(mode="json", exclude=unused))
    return {"buckets": ", ".join(sizes) if clip.buckets else "none", **rest}


def first_difference(a: dict[str, str], b: dict[str, str]) -> str:
    """The first name under which two mappings differ, with both values; empty if there is none."""
    for name in [*a, *(name for name in b if name not in a)]:
        if a.get(name) != b.get(name):
            return f"{name}: {a.get(name, 'none')}, not {b.get(name, 'none')}"
    return ""


def pack_latent(moments_CTHW: Tensor, dtype: Literal["fp32", "bf16"]) -> bytes:
    """The member that holds a clip's moments ``[2C, T, H, W]``."""
    return _pack("moments", moments_CTHW, dtype)


def pack_text(states_LD: Tensor, dtype: Literal["fp32", "bf16"]) -> bytes:
    """The member that holds a caption's states ``[L, D]``, which have its true length."""
    return _pack("states", states_LD, dtype)


def unpack_latent(data: bytes, info: LatentSetInfo) -> Tensor:
    """Moments ``[2C, T, H, W]`` of a clip, fp32.

    Raises:
        BadSample: they are damaged, of another shape than ``info`` says, or `fault_of_moments`.
    """
    moments_CTHW = _unpack("moments", data, 4)
    wanted = [[2 * channels, *rest] for channels, *rest in info.shapes]
    if list(moments_CTHW.shape) not in wanted:
        listed = " or ".join(map(str, wanted))
        raise BadSample(f"moments of shape {list(moments_CTHW.shape)} instead of {listed}")
    fault = fault_of_moments(moments_CTHW)
    if fault:
        raise BadSample(fault)
    return moments_CTHW


def unpack_text(data: bytes, info: LatentSetInfo) -> Tensor:
    """Text states ``[L, D]`` of a caption, fp32. Raises `BadSample` as `unpack_latent` does."""
    assert info.text is not None
    states_LD = _unpack("states", data, 2)
    if not 0 < len(states_LD) <= info.text.max_length or states_LD.shape[1] != info.text.dim:
        raise BadSample(f"text states of shape {list(states_LD.shape)}")
    if not math.isfinite(_largest(states_LD)):
        raise BadSample("not all text states are finite")
    return states_LD


def fault_of_moments(moments_CTHW: Tensor) -> str:
    """Why moments are bad: not finite or absurd; empty if they are fine."""
    mean, log_variance = (_largest(part) for part in moments_CTHW.float().chunk(2))
    if not math.isfinite(mean + log_variance):
        return "not all values of the latent are finite"
    if mean > LARGEST_MEAN:
        return f"a mean of the latent exceeds {LARGEST_MEAN:g}"
    if log_variance > LARGEST_LOG_VARIANCE:
        return f"a log variance of the latent exceeds {LARGEST_LOG_VARIANCE:g}"
    return ""


def _pack(name: str, tensor: Tensor, dtype: str) -> bytes:
    return save({name: tensor.detach().to("cpu", _DTYPES[dtype]).contiguous()})


def _unpack(name: str, data: bytes, ndim: int) -> Tensor:
    try:
        tensor = load(data)[name]
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadSample(f"not the safetensors expected: {error}") from None
    if tensor.ndim != ndim or not tensor.is_floating_point():
        raise BadSample(f"{name} of shape {list(tensor.shape)} and type {tensor.dtype}")
    return tensor.float()


def _largest(tensor: Tensor) -> float:
    """Largest magnitude, NaN if there is one; one pass."""
    low, high = tensor.aminmax()
    return float(torch.maximum(low.abs(), high.abs()))


def _flat(tree: dict[str, Any]) -> dict[str, str]:
    """Values of a nested mapping as text, by dotted name; a mapping that may be absent is there under its own name."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {name: "given"} | {f"{name}.{inner}": text for inner, text in _flat(value).items()}
        else:
            flat[name] = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    return flat
