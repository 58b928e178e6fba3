"""How a picture is made to fit another size: scaling, then cropping or padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lvdm.errors import BadSample

Resize = Literal["crop", "random_crop", "squash", "pad"]
CENTER = (0.5, 0.5)
MAX_SCALED_PIXELS = 1 << 26
"""Pixels of a scaled picture before it is cut: a thin one becomes long where its shorter side must fit."""


@dataclass(frozen=True)
class Fit:
    """A picture is scaled to ``height`` x ``width`` pixels, and then cut or padded to the size it shall have."""

    from_height: int
    """Of the picture; so is ``from_width``."""
    from_width: int
    height: int
    width: int
    target_height: int
    target_width: int
    top: int
    """Rows cut off above; negative: black ones added."""
    left: int
    """Columns cut off at the left; negative: black ones added."""

    @property
    def seen(self) -> tuple[float, float, float, float]:
        """Top, left, height and width of what is seen of the picture, in pixels of its own."""
        down, across = (self.from_height, self.height), (self.from_width, self.width)
        lengths = (
            (max(self.top, 0), down),
            (max(self.left, 0), across),
            (min(self.height, self.target_height), down),
            (min(self.width, self.target_width), across),
        )
        top, left, height, width = (pixels * whole / scaled for pixels, (whole, scaled) in lengths)
        return top, left, height, width

    def apply(self, scaled_HWC: np.ndarray) -> np.ndarray:
        """The scaled picture, cut and padded."""
        cut = scaled_HWC[
            max(self.top, 0) : max(self.top, 0) + self.target_height,
            max(self.left, 0) : max(self.left, 0) + self.target_width,
        ]
        if cut.shape[:2] == (self.target_height, self.target_width):
            return cut
        padded = np.zeros((self.target_height, self.target_width, 3), np.uint8)
        top, left = max(-self.top, 0), max(-self.left, 0)
        padded[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
        return padded


def fit(
    from_height: int, from_width: int, height: int, width: int, resize: Resize, place: tuple[float, float] = CENTER
) -> Fit:
    """How a picture of ``from_height`` x ``from_width`` becomes one of ``height`` x ``width``.

    Args:
        resize: ``crop`` scales the shorter side to fit and keeps the centre (LVDM's loader of frames); ``random_crop``
            keeps the part at ``place``; ``squash`` ignores the aspect (LVDM's loader of videos); ``pad`` keeps all of
            it, with black bars.
        place: where a random crop lies, from 0 (top, left) to 1 (bottom, right), exclusive.
    Raises:
        BadSample: the picture is so thin that it would be scaled to more than `MAX_SCALED_PIXELS`.
    """
    if resize == "squash":
        return Fit(from_height, from_width, height, width, height, width, 0, 0)
    ratios = height / from_height, width / from_width
    if resize == "pad":
        scale = min(ratios)
        scaled = max(1, min(height, round(from_height * scale))), max(1, min(width, round(from_width * scale)))
    else:
        scale = max(ratios)
        scaled = max(height, round(from_height * scale)), max(width, round(from_width * scale))
        if scaled[0] * scaled[1] > MAX_SCALED_PIXELS:
            raise BadSample(
                f"a picture of {from_width}x{from_height} would be scaled to {scaled[1]}x{scaled[0]} to be cut to "
                f"{width}x{height}, which exceeds the limit of {MAX_SCALED_PIXELS} pixels"
            )
    spare = scaled[0] - height, scaled[1] - width
    if resize == "random_crop":
        top, left = (int((pixels + 1) * draw) for pixels, draw in zip(spare, place, strict=True))
    else:
        top, left = (int(pixels / 2) for pixels in spare)
    return Fit(from_height, from_width, *scaled, height, width, top, left)
