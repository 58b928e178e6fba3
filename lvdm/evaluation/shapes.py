"""What a clip of moving shapes shows, measured from its pixels: shape, colour and motion.

No network and nothing learnt: the background is the colour of the border, the ink the colour that differs most from
it, the shape the template (`lvdm.synthetic.template`) that explains the pixels best, its places the path, and the
path's spread the motion. A clip that no template explains, or not over black, shows nothing, which is never right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lvdm.synthetic import BACKGROUND, COLORS, RADII, SHAPES, Combination, template

_LEAST_CONTRAST = 40.0  # distance in RGB below which nothing stands out from the background
_FARTHEST_FROM_BLACK = 60.0  # distance in RGB of a background; true ones are within 14
_INK_QUANTILE = 0.97  # the smallest shape covers 11 % of a frame
_LARGEST_RESIDUAL = 0.5  # share of the ink's energy that the best template may leave unexplained
_ROUND = 0.5  # ratio of the path's smaller to its larger spread: 1 on a circle, 0 on a line
_LEAST_RADIUS = 0.5  # of a circle's path anywhere, over its mean; true clips have 0.9 and more
_LEAST_TURN = 0.7  # of a full turn, all the same way; true clips of 8 frames show 0.92 of it
_LEAST_SPREAD = 0.06  # of a path, in units of the frame's side; true clips have 0.10 and more
_TEMPLATE_RADII = tuple(np.linspace(RADII[0] * 0.9, RADII[1] * 1.1, 5))
_PHASES = (-0.25, 0.25)  # of a template's centre within a pixel


@dataclass(frozen=True)
class Seen:
    """What a clip shows; empty where that cannot be told."""

    shape: str = ""
    color: str = ""
    motion: str = ""


def look(frames_THWC: np.ndarray) -> Seen:
    """What a square clip, uint8 RGB ``[T, H, H, 3]``, shows."""
    frames = frames_THWC.astype(np.float64)
    paper = np.median(np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)]), axis=0)
    contrast_THW = np.linalg.norm(frames - paper, axis=-1)
    threshold = float(np.quantile(contrast_THW, _INK_QUANTILE))
    if threshold < _LEAST_CONTRAST or np.linalg.norm(paper - np.array(BACKGROUND)) > _FARTHEST_FROM_BLACK:
        return Seen()
    ink = np.median(frames[contrast_THW >= threshold], axis=0)
    color = _nearest(ink, COLORS)
    along = ink - paper
    coverage_THW = np.clip((frames - paper) @ along / (along @ along), 0, 1)
    shape, residual, path_T2 = _best_template(coverage_THW)
    if residual > _LARGEST_RESIDUAL:
        return Seen(color=color)
    return Seen(shape, color, _motion(path_T2))


def _nearest(color: np.ndarray, named: Mapping[str, tuple[int, int, int]]) -> str:
    return min(named, key=lambda name: float(np.linalg.norm(color - np.array(named[name]))))


@functools.lru_cache(maxsize=4)
def _templates(size: int) -> tuple[list[tuple[str, float, float]], np.ndarray, np.ndarray]:
    """Shape and offset (x, y, in pixels) of every template, their spectra, and their energies."""
    kinds, images = [], []
    for shape in SHAPES:
        for radius in _TEMPLATE_RADII:
            for x in _PHASES:
                for y in _PHASES:
                    kinds.append((shape, x, y))
                    images.append(template(shape, radius, size, 0.5 + x / size, 0.5 + y / size))
    stack = np.stack(images)
    return kinds, np.conj(np.fft.rfft2(stack, s=_padded(size))), (stack**2).sum((1, 2))


def _padded(size: int) -> tuple[int, int]:
    """Side of the images that are correlated: enough that a template which leaves on one side reaches nothing else."""
    return size + size // 2, size + size // 2


def _best_template(coverage_THW: np.ndarray) -> tuple[str, float, np.ndarray]:
    """The shape that leaves least unexplained, that share, and its centre in each frame, ``[T, 2]`` in 0..1.

    The radius is one for the whole clip; in each frame the template may lie anywhere.
    """
    frames, size, _ = coverage_THW.shape
    kinds, spectra, energies_K = _templates(size)
    side, _ = _padded(size)
    spectrum_T = np.fft.rfft2(coverage_THW, s=_padded(size))
    energy = float((coverage_THW**2).sum())
    best: tuple[float, int, np.ndarray] = (math.inf, 0, np.zeros((frames, 2)))
    phases = len(_PHASES) ** 2
    for first in range(0, len(kinds), phases):  # the four phases of one shape and radius
        group = slice(first, first + phases)
        overlap_PTHW = np.fft.irfft2(spectra[group, None] * spectrum_T[None], s=_padded(size))
        flat_PTS = energies_K[group, None, None] - 2 * overlap_PTHW.reshape(phases, frames, -1)
        by_frame = flat_PTS.transpose(1, 0, 2).reshape(frames, -1)
        chosen_T = by_frame.argmin(1)
        left = energy + float(by_frame[np.arange(frames), chosen_T].sum())
        if left < best[0]:
            phase_T, place_T = np.divmod(chosen_T, side * side)
            shift_T2 = np.stack([place_T % side, place_T // side], axis=1).astype(np.float64)
            shift_T2[shift_T2 >= side / 2] -= side
            offset_T2 = np.array([kinds[first + phase][1:] for phase in phase_T])
            best = left, first, 0.5 + (shift_T2 + offset_T2) / size
    return kinds[best[1]][0], best[0] / energy, best[2]


def _motion(path_T2: np.ndarray) -> str:
    """The motion of a path of centres (x to the right, y down); empty where it is none of the five."""
    around = path_T2 - path_T2.mean(0)
    small, large = np.sqrt(np.linalg.eigvalsh(around.T @ around / len(around)).clip(min=0))
    if large < _LEAST_SPREAD:
        return ""
    if small > _ROUND * large:
        return "in a circle" if _turns_around(path_T2) else ""
    x, y = path_T2[-1] - path_T2[0]
    if max(abs(x), abs(y)) < 2 * large or min(abs(x), abs(y)) > _ROUND * max(abs(x), abs(y)):
        return ""
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _turns_around(path_T2: np.ndarray) -> bool:
    """Whether a path goes around a point, most of a turn and never back; a caption does not say which way around."""
    # the circle nearest to the points: |p|^2 = 2 c p + constant, in least squares
    known_T3 = np.column_stack([2 * path_T2, np.ones(len(path_T2))])
    solution_3, *_ = np.linalg.lstsq(known_T3, (path_T2**2).sum(1), rcond=None)
    x, y = (path_T2 - solution_3[:2]).T
    radius = np.hypot(x, y)
    steps = np.diff(np.unwrap(np.arctan2(y, x))) / (2 * np.pi)
    steps *= np.sign(steps.sum())
    return bool(radius.min() > _LEAST_RADIUS * radius.mean() and (steps > 0).all() and steps.sum() > _LEAST_TURN)


@dataclass(frozen=True)
class Score:
    """How often something was right."""

    right: int
    of: int

    @property
    def share(self) -> float:
        """0 to 1; 0 of none."""
        return self.right / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        if not self.of:
            return 0.0, 1.0
        z, n, p = 1.96, self.of, self.share
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


ASPECTS = ("shape", "color", "motion")


def scores(seen: Sequence[Seen], wanted: Sequence[Combination]) -> dict[str, Score]:
    """By aspect, and as ``everything`` all three of a clip at once, how many clips show what was wanted."""
    rows = [
        [getattr(one, aspect) == getattr(other, aspect) for aspect in ASPECTS]
        for one, other in zip(seen, wanted, strict=True)
    ]
    counts = {aspect: sum(row[i] for row in rows) for i, aspect in enumerate(ASPECTS)}
    counts["everything"] = sum(map(all, rows))
    return {name: Score(count, len(rows)) for name, count in counts.items()}
