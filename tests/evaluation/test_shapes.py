"""The checker of moving shapes: right on true clips, at chance on others' captions, and never right about nothing."""

from __future__ import annotations

import numpy as np
import pytest

from lvdm.evaluation.shapes import Score, Seen, look, scores
from lvdm.synthetic import EVALUATION, Combination, render

TRUE = [render(combination, 3, 8, 32) for combination in EVALUATION]


def test_true_clips_are_recognised_also_when_noisy_and_blurred() -> None:
    rng = np.random.default_rng(0)
    noisy = [(clip + rng.normal(0, 12, clip.shape)).clip(0, 255).astype(np.uint8) for clip in TRUE]
    blurred = [
        sum(np.roll(clip.astype(float), shift, axis) for axis in (1, 2) for shift in (-1, 0, 1)) / 6 for clip in TRUE
    ]
    worse = slice(None, None, 4)
    for clips, which, least in ((TRUE, slice(None), 0.99), (noisy, worse, 0.99), (blurred, worse, 0.9)):
        seen = [look(clip.astype(np.uint8)) for clip in clips[which]]
        for aspect, score in scores(seen, EVALUATION[which]).items():
            assert score.share >= least, (aspect, score)


def test_the_captions_of_other_clips_score_at_chance() -> None:
    seen = [look(clip) for clip in TRUE]
    found: dict[str, list[float]] = {}
    for by in range(1, len(seen), 7):
        for aspect, score in scores(seen, [*EVALUATION[by:], *EVALUATION[:by]]).items():
            found.setdefault(aspect, []).append(score.share)
    for aspect, classes in {"shape": 4, "color": 8, "motion": 5}.items():
        assert np.mean(found[aspect]) == pytest.approx(1 / classes, abs=0.04), aspect
    assert np.mean(found["everything"]) < 0.01


def test_what_shows_no_shape_is_never_right() -> None:
    rng = np.random.default_rng(0)
    plain = np.full((8, 32, 32, 3), 12, dtype=np.uint8)
    bright = 255 - render(Combination("cross", "red", "right"), 0, 8, 32)
    noise = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    assert look(plain) == Seen()
    assert look(bright) == Seen()
    assert look(noise).shape == look(noise).motion == ""


def test_a_shape_that_stands_still_or_wanders_has_no_motion() -> None:
    moving = render(Combination("cross", "red", "right"), 0, 8, 32)
    assert look(moving).motion == "right"
    assert look(np.repeat(moving[:1], 8, axis=0)) == Seen("cross", "red", "")
    there_and_back = np.concatenate([moving[::2], moving[::-2]])
    assert look(there_and_back).motion == ""
    assert look(moving[::-1]).motion == "left"


def test_only_a_turn_in_one_direction_is_a_circle() -> None:
    around = render(Combination("triangle", "cyan", "in a circle"), 3, 16, 32)
    assert look(around).motion == look(around[::2]).motion == "in a circle"
    assert look(around[::-1]).motion == "in a circle"  # the caption leaves that open
    assert look(around[:8]).motion != "in a circle"  # half of the way
    rng = np.random.default_rng(0)
    jumps = [look(around[rng.permutation(16)[:8]]).motion for _ in range(50)]
    assert jumps.count("in a circle") <= 2


def test_intervals_are_wilsons() -> None:
    low, high = Score(81, 90).interval
    assert (low, high) == pytest.approx((0.8208, 0.9466), abs=2e-3)
    assert Score(0, 0).interval == (0.0, 1.0)
    assert Score(10, 10).interval[1] == pytest.approx(1.0)
