"""Moving shapes: captioned clips made from nothing, for demos and tests of learning.

A clip shows one shape in one colour moving one way over black, as its caption says ("a red circle moves left"); size,
start, speed and shade vary from clip to clip. Each further background made learning several times as long
(``tools/bench/results/shapes_log.md``).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from lvdm.randomness import Purpose, generator, seed_from_text

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 230),
    "yellow": (240, 220, 30),
    "magenta": (220, 40, 210),
    "cyan": (30, 210, 220),
    "orange": (240, 120, 20),
    "white": (235, 235, 235),
}
BACKGROUND = (12, 12, 12)
SHAPES = ("circle", "square", "triangle", "cross")
RADII = (0.24, 0.29)
"""Smallest and largest radius, in units of the frame's side."""
MOTIONS = ("left", "right", "up", "down", "in a circle")


@dataclass(frozen=True)
class Combination:
    """What the caption of a clip says."""

    shape: str
    color: str
    motion: str


def combinations() -> list[Combination]:
    """All 160 combinations, in a fixed order."""
    return [Combination(*parts) for parts in itertools.product(SHAPES, COLORS, MOTIONS)]


def caption(combination: Combination) -> str:
    """The caption, such as "a red circle moves left"."""
    return f"a {combination.color} {combination.shape} moves {combination.motion}"


def _held_out() -> tuple[Combination, ...]:
    # a lattice: of every shape, colour and motion, and of every pair of them, some
    lattice = itertools.product(enumerate(SHAPES), enumerate(COLORS), enumerate(MOTIONS))
    return tuple(
        Combination(shape, color, motion)
        for (i, shape), (j, color), (k, motion) in lattice
        if (i + j + 2 * k) % 10 in (0, 3, 6)
    )


HELD_OUT: tuple[Combination, ...] = _held_out()
"""The 48 combinations, three of ten, that no training set contains."""


def _evaluation() -> tuple[Combination, ...]:
    trained = [c for c in combinations() if c not in HELD_OUT]
    order = generator(0, 0, Purpose.SYNTHETIC).permutation(len(trained))
    return (*HELD_OUT, *(trained[i] for i in order[: 2 * len(HELD_OUT)]))


EVALUATION: tuple[Combination, ...] = _evaluation()
"""What a model's samples are scored on: the combinations never trained on, and twice as many others."""


def render(combination: Combination, seed: int, frames: int, size: int) -> np.ndarray:
    """Draw one clip, uint8 RGB ``[T, H, W, 3]`` with ``H = W = size``.

    ``seed`` draws size, start, speed and shade; the same arguments always give the same pixels.
    """
    rng = generator(seed, seed_from_text(caption(combination)), Purpose.SYNTHETIC)
    radius = rng.uniform(*RADII)
    shade, background_shade = rng.uniform(-18, 18), rng.uniform(-8, 8)
    x_T, y_T = _path(combination.motion, radius, frames, rng)
    shapes = [template(combination.shape, radius, size, x, y) for x, y in zip(x_T, y_T, strict=True)]
    coverage_THWC = np.stack(shapes)[..., None]
    ink = np.clip(np.array(COLORS[combination.color]) + shade, 0, 255)
    paper = np.clip(np.array(BACKGROUND) + background_shade, 0, 255)
    frames_THWC: np.ndarray = np.rint(coverage_THWC * ink + (1 - coverage_THWC) * paper).astype(np.uint8)
    return frames_THWC


def template(shape: str, radius: float, size: int, x: float, y: float) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1, ``[H, W]``; radius and centre in units of the frame's side."""
    grid = (np.arange(size) + 0.5) / size
    coverage: np.ndarray = np.clip(0.5 - _distance(shape, grid[None, :] - x, grid[:, None] - y, radius) * size, 0, 1)
    return coverage


def _path(motion: str, radius: float, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centre of the shape in each frame, x to the right and y down, both in units of the frame's side."""
    low, high = radius, 1 - radius  # the shape stays inside
    time_T = np.linspace(0, 1, frames)
    if motion == "in a circle":
        orbit = rng.uniform(0.17, min(0.22, 0.5 - radius))
        x, y = rng.uniform(low + orbit, high - orbit, size=2)
        angle_T = 2 * np.pi * (rng.random() + time_T)  # clockwise, once around
        return x + orbit * np.cos(angle_T), y + orbit * np.sin(angle_T)
    travel = rng.uniform(0.37, high - low)
    start = rng.uniform(low, high - travel)
    along_T = start + travel * time_T
    across_T = np.full(frames, rng.uniform(low, high))
    match motion:
        case "right":
            return along_T, across_T
        case "left":
            return 1 - along_T, across_T
        case "down":
            return across_T, along_T
        case "up":
            return across_T, 1 - along_T
    raise ValueError(f"unknown motion {motion!r}")


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline of a shape at the origin, negative inside."""
    x, y = np.broadcast_arrays(x, y)
    distance: np.ndarray
    match shape:
        case "circle":
            distance = np.hypot(x, y) - radius
        case "square":
            distance = np.maximum(abs(x), abs(y)) - 0.85 * radius
        case "triangle":  # isosceles, point up, as wide as it is high
            side = (2 * abs(x) - (y + radius)) / np.sqrt(5)
            distance = np.maximum(side, y - radius)
        case "cross":
            arm = 0.36 * radius
            upright = np.maximum(abs(x) - arm, abs(y) - radius)
            distance = np.minimum(upright, np.maximum(abs(y) - arm, abs(x) - radius))
        case _:
            raise ValueError(f"unknown shape {shape!r}")
    return distance
