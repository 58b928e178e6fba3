from __future__ import annotations

import itertools
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lvdm.synthetic import (
    COLORS,
    EVALUATION,
    HELD_OUT,
    RADII,
    SHAPES,
    Combination,
    caption,
    combinations,
    render,
    template,
)

HELD_OUT_CHECKSUM = 797903437


def centres(frames_THWC: np.ndarray, combination: Combination) -> np.ndarray:
    """Centre (x, y) of the pixels nearer to the shape's colour than to the first frame's corner, per frame."""
    ink = np.array(COLORS[combination.color])
    corners = frames_THWC[:, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(-1, 3)
    paper = np.median(corners, axis=0)
    mask = abs(frames_THWC - ink).sum(-1) < abs(frames_THWC - paper).sum(-1)
    assert mask.any(axis=(1, 2)).all()
    return np.array([[xs.mean(), ys.mean()] for ys, xs in map(np.nonzero, mask)])


def test_the_combinations_are_fixed() -> None:
    every = combinations()
    assert len(every) == len(set(map(caption, every))) == 160
    assert caption(Combination("circle", "red", "left")) == "a red circle moves left"
    # a change of this list would let training sets made before contain what is now held out
    assert zlib.crc32("\n".join(map(caption, HELD_OUT)).encode()) == HELD_OUT_CHECKSUM


def test_what_is_held_out_is_spread_evenly() -> None:
    assert len(HELD_OUT) == 48
    assert set(HELD_OUT) < set(combinations())
    rest = [c for c in combinations() if c not in HELD_OUT]
    for field in ("shape", "color", "motion"):
        share = Counter(getattr(c, field) for c in HELD_OUT)
        whole = Counter(getattr(c, field) for c in combinations())
        assert all(0.2 < share[value] / whole[value] < 0.4 for value in whole)
    for one, two in itertools.combinations(("shape", "color", "motion"), 2):
        seen = {(getattr(c, one), getattr(c, two)) for c in rest}
        assert seen == {(getattr(c, one), getattr(c, two)) for c in combinations()}


def test_a_third_of_the_captions_for_scores_was_never_trained_on() -> None:
    assert len(set(EVALUATION)) == len(EVALUATION) == 144
    assert set(HELD_OUT) <= set(EVALUATION)
    for field in ("shape", "color", "motion"):
        counts = Counter(getattr(c, field) for c in EVALUATION)
        assert min(counts.values()) > 0.6 * len(EVALUATION) / len(counts), counts
    file = Path(__file__).resolve().parents[1] / "configs" / "shapes_captions.txt"
    assert file.read_text().splitlines() == [caption(c) for c in EVALUATION]


def test_a_clip_is_a_function_of_its_arguments() -> None:
    combination = combinations()[100]
    first = render(combination, 5, frames=6, size=32)
    assert first.shape == (6, 32, 32, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, render(combination, 5, frames=6, size=32))
    assert (first != render(combination, 6, frames=6, size=32)).any()


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "cross"])
def test_the_motion_is_what_the_caption_says(shape: str, size: int) -> None:
    directions = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for seed, (motion, direction) in itertools.product(range(3), directions.items()):
        combination = Combination(shape, "yellow", motion)
        path = centres(render(combination, seed, frames=12, size=size), combination) / size
        moved = path[-1] - path[0]
        assert moved @ direction > 0.33
        assert abs(moved @ direction[::-1]) < 0.05
        assert (np.diff(path @ direction) > 0).all()
    combination = Combination(shape, "yellow", "in a circle")
    path = centres(render(combination, 0, frames=12, size=size), combination) / size
    assert np.linalg.norm(path[-1] - path[0]) < 0.06
    assert np.ptp(path, axis=0).min() > 0.3


def test_colours_and_shapes_differ_clearly() -> None:
    areas = {shape: template(shape, RADII[0], 64, 0.5, 0.5).sum() for shape in SHAPES}
    assert areas["triangle"] < areas["circle"]
    assert areas["cross"] < areas["square"]
