"""What the loaders yield. Letters: B batch, C channels, T frames, H height, W width, L tokens, D text channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Replacement:
    """A sample whose bytes are bad and whose place in the run another sample took."""

    position: int
    """Position in the run at which it was due."""
    shard: str
    """URL of its shard."""
    key: str
    """Its key in the shard; empty for what follows damage in a shard of a stream."""
    reason: str
    """What is wrong with it."""


@dataclass(frozen=True)
class VideoBatch:
    """Clips as decoded, with their captions."""

    positions: list[int]
    """Positions in the run, the key of every random draw about these samples."""
    frames_BCTHW: Tensor
    """uint8 RGB."""
    captions: list[str]
    """Empty where the text was dropped."""
    replaced: tuple[Replacement, ...] = ()
    """Bad samples that others stand in for; ``replaced[i].position`` is among ``positions``."""

    def __post_init__(self) -> None:
        assert self.frames_BCTHW.dtype == torch.uint8
        assert self.frames_BCTHW.ndim == 5
        assert len(self.positions) == len(self.captions) == len(self.frames_BCTHW)

    def __len__(self) -> int:
        return len(self.positions)

    def pin_memory(self) -> VideoBatch:
        """The same batch in memory that a GPU copies from while the host goes on; torch's loader calls it."""
        return replace(self, frames_BCTHW=self.frames_BCTHW.pin_memory())

    def to(self, device: torch.device | str) -> VideoBatch:
        """The same batch with its tensors on ``device``."""
        return replace(self, frames_BCTHW=self.frames_BCTHW.to(device, non_blocking=True))


@dataclass(frozen=True)
class LatentBatch:
    """Pre-encoded clips and captions."""

    positions: list[int]
    """Positions in the run, the key of every random draw about these samples."""
    moments_BCTHW: Tensor
    """float32 mean and log-variance of the posterior, one after the other along C."""
    text_BLD: Tensor
    """float32 text states, zero past a sample's own length; those of the empty caption where the text was dropped."""
    text_mask_BL: Tensor
    """bool, true at real tokens."""
    replaced: tuple[Replacement, ...] = ()
    """Bad samples that others stand in for; ``replaced[i].position`` is among ``positions``."""

    def __post_init__(self) -> None:
        assert self.moments_BCTHW.dtype == self.text_BLD.dtype == torch.float32
        assert self.text_mask_BL.dtype == torch.bool
        assert self.text_mask_BL.shape == self.text_BLD.shape[:2]
        assert len(self.positions) == len(self.moments_BCTHW) == len(self.text_BLD)

    def __len__(self) -> int:
        return len(self.positions)

    def pin_memory(self) -> LatentBatch:
        """As for `VideoBatch`."""
        return replace(
            self,
            moments_BCTHW=self.moments_BCTHW.pin_memory(),
            text_BLD=self.text_BLD.pin_memory(),
            text_mask_BL=self.text_mask_BL.pin_memory(),
        )

    def to(self, device: torch.device | str) -> LatentBatch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            moments_BCTHW=self.moments_BCTHW.to(device, non_blocking=True),
            text_BLD=self.text_BLD.to(device, non_blocking=True),
            text_mask_BL=self.text_mask_BL.to(device, non_blocking=True),
        )
