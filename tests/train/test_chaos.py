"""Runs that are killed at seeded moments and go on: the end is that of the straight run, bit for bit."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Toy
from tests.train import chaos


def test_killed_anywhere_a_run_ends_as_the_straight_one(toy: Toy, tmp_path: Path) -> None:
    result = chaos.torment(toy.diffusion, tmp_path, seed=0, kills=20)
    assert result.kills == 20
    assert all(result.by_way[way] >= 3 for way in chaos.WAYS), result.by_way
    assert result.differences == []
