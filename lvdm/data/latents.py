"""The shard format of pre-encoded clips: everything a later run must know travels with the bytes.

A sample ``{key}`` has the members

* ``{key}.latent.safetensors``: ``moments`` ``[2C, T, H, W]``, mean and log-variance of the posterior, fp32 or bf16
* ``{key}.text.safetensors``: ``states`` ``[L, D]``, text states at the caption's true length L
* ``{key}.txt`` and ``{key}.json``: caption and metadata

and a folder of shards has ``latents.json`` (`LatentSetInfo`) and ``unconditional.safetensors`` (``states`` of the empty
caption). Moments are stored unscaled and unsampled: scale, shift and posterior noise are applied when they are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lvdm.config import ClipConfig, Section
from lvdm.config.base import NonNegativeInt, PositiveInt
from lvdm.errors import BadSample, UserError
from lvdm.storage import Missing, atomic_file, read_file

INFO_NAME = "latents.json"
UNCONDITIONAL_NAME = "unconditional.safetensors"
LARGEST_MEAN = 1e3
"""Means beyond this come from a broken encoder; such samples are bad."""

Scaling = float | tuple[float, ...]

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
    batch: PositiveInt = 1
    """Clips in one call of the autoencoder, which decides the last bits."""
    shapes: tuple[tuple[int, int, int, int], ...]
    """C, T, H, W of the latents of each of ``clip.sizes``; empty in a folder of text states alone."""
    samples: int
    """Samples in the folder."""
    lvdm_version: str
    """Version of the code that wrote it."""


def latent_member(clip: int) -> str:
    """Extension of the moments of a sample's clip, counted from 0."""
    return f"{clip}.latent.safetensors"


def text_member(place: int, item: int) -> str:
    """Extension of the states of a sample's caption: which of the places in `LatentSetInfo.captions` (0 if that is
    empty), and which there."""
    return f"{place}-{item}.text.safetensors"


def write_latent_set(folder: str, info: LatentSetInfo, unconditional_LD: Tensor) -> None:
    """Write the two files that describe the latent shards in ``folder`` (any fsspec URL)."""
    with atomic_file(f"{folder}/{UNCONDITIONAL_NAME}") as path:
        Path(path).write_bytes(_pack("states", unconditional_LD, info.dtype))
    with atomic_file(f"{folder}/{INFO_NAME}") as path:
        Path(path).write_text(info.model_dump_json(indent=2), encoding="utf-8")


def read_latent_set(folder: str) -> LatentSetInfo:
    """Read ``latents.json`` of a folder of latent shards (any fsspec URL). Raises `UserError` and `Requeue`."""
    folder = folder.rstrip("/")
    try:
        return LatentSetInfo.model_validate_json(read_file(f"{folder}/{INFO_NAME}"))
    except Missing:
        raise UserError(f"{folder} holds no latents ({INFO_NAME} is missing); {_BUILD}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise UserError(f"{folder}/{INFO_NAME}: {where}: {fault['msg']}") from None


def read_unconditional(folder: str) -> Tensor:
    """Text states ``[L, D]`` (fp32) of the empty caption. Raises `UserError` and `Requeue`."""
    url = f"{folder.rstrip('/')}/{UNCONDITIONAL_NAME}"
    try:
        return _unpack("states", read_file(url), 2)
    except Missing:
        raise UserError(f"{url} is missing; {_BUILD}") from None
    except BadSample as error:
        raise UserError(f"{url} is damaged: {error}; {_BUILD}") from None


def agreed_latent_set(folders: Sequence[str]) -> LatentSetInfo:
    """The info that all ``folders`` share, with their samples added up.

    Raises:
        UserError: naming the first field in which two of them differ.
    """
    infos = [read_latent_set(folder) for folder in folders]
    for folder, info in zip(folders[1:], infos[1:], strict=True):
        field = _first_difference(infos[0], info)
        if field:
            raise UserError(f"{folders[0]} and {folder} cannot be trained on together: {field} of {INFO_NAME} differs")
    return infos[0].model_copy(update={"samples": sum(info.samples for info in infos)})


def encode_latent(
    moments_CTHW: Tensor, states_LD: Tensor, caption: str, dtype: Literal["fp32", "bf16"]
) -> dict[str, bytes]:
    """The members of one sample by extension; ``states_LD`` at the caption's true length."""
    return {
        LATENT_MEMBER: _pack("moments", moments_CTHW, dtype),
        TEXT_MEMBER: _pack("states", states_LD, dtype),
        "txt": caption.encode(),
    }


def decode_latent(members: dict[str, bytes], info: LatentSetInfo) -> tuple[Tensor, Tensor]:
    """Moments ``[2C, T, H, W]`` and text states ``[L, D]`` of one sample, both fp32.

    Raises:
        BadSample: a member is missing or damaged, of another shape than ``info`` says, or holds values out of bounds.
    """
    for extension in (LATENT_MEMBER, TEXT_MEMBER):
        if extension not in members:
            raise BadSample(f"no .{extension} member")
    moments_CTHW = _unpack("moments", members[LATENT_MEMBER], 4)
    states_LD = _unpack("states", members[TEXT_MEMBER], 2)
    channels, *rest = info.shape
    if list(moments_CTHW.shape) != [2 * channels, *rest]:
        raise BadSample(f"moments of shape {list(moments_CTHW.shape)} instead of {[2 * channels, *rest]}")
    if not 0 < len(states_LD) <= info.text.max_length or states_LD.shape[1] != info.text.dim:
        raise BadSample(f"text states of shape {list(states_LD.shape)}")
    if not (math.isfinite(_largest(moments_CTHW)) and math.isfinite(_largest(states_LD))):
        raise BadSample("not all values are finite")
    if _largest(moments_CTHW[:channels]) > LARGEST_MEAN:
        raise BadSample(f"a mean exceeds {LARGEST_MEAN:g}")
    return moments_CTHW, states_LD


def _pack(name: str, tensor: Tensor, dtype: str) -> bytes:
    return save({name: tensor.detach().to("cpu", _DTYPES[dtype]).contiguous()})


def _unpack(name: str, data: bytes, ndim: int) -> Tensor:
    try:
        tensor = load(data)[name]
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadSample(f"not the safetensors expected: {error}") from None
    if tensor.ndim != ndim:
        raise BadSample(f"{name} of shape {list(tensor.shape)}")
    return tensor.float()


def _largest(tensor: Tensor) -> float:
    """Largest magnitude, NaN if there is one; one pass."""
    low, high = tensor.aminmax()
    return float(torch.maximum(low.abs(), high.abs()))


def _first_difference(a: Section, b: Section) -> str:
    one, two = _flat(a), _flat(b)
    # names are where the weights were found, not what they are: the digests tell
    ignored = {"samples", "lvdm_version", "vae.name", "text.name"}
    return next((name for name in one if name not in ignored and one[name] != two[name]), "")


def _flat(section: Section) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in section.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": json.dumps(v) for inner, v in value.items()}
        else:
            flat[name] = json.dumps(value)
    return flat
