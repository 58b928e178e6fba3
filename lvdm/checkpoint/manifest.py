"""The manifest: what a checkpoint holds. Written last, it defines completeness; sealed, so that no byte of it changes
unseen."""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lvdm.checkpoint import blocks
from lvdm.checkpoint.blocks import Damaged

NAME = "manifest.json"
MODEL = "model"
"""The network that a run trains; others, such as a discriminator, have names of their own."""

LIMIT = 1 << 28
"""Bytes that a manifest has at most; one of 10 TB of state has 200 MB."""

_Count = Annotated[int, Field(ge=0, lt=2**60)]
_Shape = Annotated[tuple[_Count, ...], Field(max_length=16)]
_ParameterName = Annotated[str, Field(pattern=r"^[^\s[:cntrl:]]+$", max_length=500)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_FileName = Annotated[str, Field(pattern=r"^rank-[0-9]{5,9}(\.[0-9a-z]{1,32})?\.safetensors$")]
_NetworkName = Annotated[str, Field(pattern=r"^[a-z_]{1,100}$")]
_SEAL = b'"\n}\n'


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Network(_Part):
    """One network under an optimiser."""

    optimizer_step: _Count
    """Optimiser steps that were applied."""
    shapes: dict[_ParameterName, _Shape]
    """Full shape of every parameter."""
    frozen: tuple[_ParameterName, ...]
    """Parameters that do not learn: stored once, and no different in any kind."""

    @model_validator(mode="after")
    def _known(self) -> Network:
        unknown = set(self.frozen) - self.shapes.keys()
        if unknown or len(set(self.frozen)) < len(self.frozen):
            raise ValueError(f"frozen parameters without a shape, or listed twice: {sorted(unknown)[:3]}")
        for name, shape in self.shapes.items():
            if math.prod(max(size, 1) for size in shape) >= 2**60:
                raise ValueError(f"{name} is too large to be one")
        return self

    def size(self, name: str) -> int:
        """Elements of a parameter."""
        return math.prod(self.shapes[name])


class StoredFile(_Part):
    """Size in bytes of a file, and the SHA-256 of each of its blocks."""

    size: _Count
    sha256: tuple[_Digest, ...]

    @model_validator(mode="after")
    def _complete(self) -> StoredFile:
        if len(self.sha256) != -(-self.size // blocks.BLOCK):
            raise ValueError(f"{len(self.sha256)} checksums for {self.size} bytes")
        return self


class Manifest(_Part):
    """What a checkpoint holds."""

    format: Literal["lvdm-checkpoint"] = "lvdm-checkpoint"
    version: Literal[2] = 2
    step: _Count
    """Optimiser steps of the run, skipped ones included."""
    clock: dict[str, Any]
    """State of the training loop, plain JSON."""
    facts: dict[str, Any]
    """What the task found out and users of the weights need, such as the scale of the latents."""
    scores: dict[str, float]
    """Validation at this very step, by name; empty where there was none."""
    config: dict[str, Any]
    """The resolved training config that wrote it."""
    written_by: dict[str, Any]
    """Ranks, stage, precision and versions."""
    networks: dict[_NetworkName, Network]
    files: dict[_FileName, StoredFile]
    """One for each rank that wrote."""

    @model_validator(mode="after")
    def _counted(self) -> Manifest:
        if type(self.samples) is not int or not 0 <= self.samples < 2**60:
            raise ValueError("clock.samples is no count")
        return self

    @property
    def samples(self) -> int:
        """Samples that the run had seen."""
        samples: int = self.clock.get("samples", 0)
        return samples


def seal(manifest: Manifest) -> bytes:
    """The JSON document of a manifest; its last entry is the SHA-256 of all bytes before it."""
    body = manifest.model_dump_json(indent=1).encode().removesuffix(b"\n}") + b',\n "seal": "'
    return body + hashlib.sha256(body).hexdigest().encode() + _SEAL


def unseal(data: bytes, where: str) -> Manifest:
    """Inverse of `seal`. Raises `Damaged`, naming ``where``, if a byte was changed or it is no manifest."""
    split = max(len(data) - len(_SEAL) - 64, 0)
    body, digest = data[:split], data[split : -len(_SEAL)]
    if not data.endswith(_SEAL) or hashlib.sha256(body).hexdigest().encode() != digest:
        raise Damaged(f"{where} is damaged, or no manifest of this version: its seal does not fit what it says")
    try:
        manifest = Manifest.model_validate_json(body.removesuffix(b',\n "seal": "') + b"\n}")
        same = seal(manifest) == data  # also where a key comes twice, or a number has other spellings
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part)[:100] for part in first["loc"])
        raise Damaged(f"{where} is no manifest of this version: {place}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{where} is no manifest of this version: {error}") from None
    if not same:
        raise Damaged(f"{where} is no manifest of this version: it is not spelt as one")
    return manifest
