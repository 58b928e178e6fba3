"""Which frames of a clip the network is given, and how noisy, for prediction and interpolation (arXiv 2211.13221, 3.4).

Given frames are diffused to a level s of their own, small against the time t of the others: the network learns to go
on from frames that are not quite right, as its own will be ("conditional latent perturbation").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvdm.config import GivenFramesConfig
from lvdm.randomness import Purpose, generator


@dataclass(frozen=True)
class GivenFrames:
    """The given frames of a batch."""

    mask_B1T11: Tensor
    """1 where a frame is given, 0 elsewhere; float."""
    level_B: Tensor
    """Step of the process to which given frames are diffused, int64; -1 leaves them clean."""
    label_B: Tensor | None = None
    """What the network is told of the level, int64; None for a network without such labels."""
    in_loss: bool = True
    """Whether the loss counts given frames too."""

    def to(self, device: torch.device) -> GivenFrames:
        """The same on ``device``."""
        label_B = None if self.label_B is None else self.label_B.to(device)
        return GivenFrames(self.mask_B1T11.to(device), self.level_B.to(device), label_B, self.in_loss)


def frame_mask(frames: int, config: GivenFramesConfig, draw: float, pick: float) -> list[bool]:
    """Which frames of one clip are given.

    Args:
        draw: uniform in [0, 1); decides between interpolation, prediction and no frame at all.
        pick: uniform in [0, 1); decides how many frames a prediction starts from.
    """
    if draw < config.interpolate:
        if config.every:
            return [frame % config.every == 0 for frame in range(frames)]
        return [frame in (0, frames - 1) for frame in range(frames)]
    if draw < config.interpolate + config.predict:
        first = config.first[int(pick * len(config.first))]
        return [frame < first for frame in range(frames)]
    return [False] * frames


def draw_given_frames(seed: int, positions: Sequence[int], frames: int, config: GivenFramesConfig) -> GivenFrames:
    """Masks, levels and labels of the samples at ``positions`` of the run, on the CPU."""
    masks, levels, labels = [], [], []
    for position in positions:
        draw, pick, height = generator(seed, position, Purpose.GIVEN_FRAMES).random(3)
        mask = frame_mask(frames, config, draw, pick)
        level = int(height * config.noise_levels) if config.noise_levels else -1
        masks.append(mask)
        levels.append(level)
        labels.append(level if any(mask) or config.label_without == "drawn" else config.noise_levels)
    return GivenFrames(
        torch.tensor(masks, dtype=torch.float32)[:, None, :, None, None],
        torch.tensor(levels),
        torch.tensor(labels) if config.noise_levels else None,
        config.in_loss,
    )
