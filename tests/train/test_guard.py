"""The guard against loss spikes, and who is late, by plain computations."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from lvdm.config import HealthConfig
from lvdm.engine.pulse import Vitals
from lvdm.train.guard import Guard
from lvdm.train.stragglers import Stopwatch, Stragglers

HOSTS = ["a", "a", "b", "b"]


def norms(count: int, seed: int = 0) -> list[float]:
    """Norms as a run has them: of one size, more or less."""
    return np.random.default_rng(seed).lognormal(0.5, 0.2, count).tolist()


def guard(state: dict[str, Any] | None = None, **config: Any) -> Guard:
    return Guard(HealthConfig(**{"warmup_steps": 20, "spike_steps": 3} | config), state)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_mean_and_deviation_are_those_of_the_norms_by_age(decay: float) -> None:
    seen, one, weights = norms(300), guard(decay=decay, clip_sigmas=2, warmup_steps=10**9), np.zeros(0)
    warm = guard(decay=decay, clip_sigmas=2, warmup_steps=1, spike_factor=1e9)
    for number, norm in enumerate(seen):
        keep = min(decay, number / (number + 1))  # so that at first all weigh the same
        weights = np.append(weights * keep, 1 - keep)
        one.see(number + 1, norm)
        values = np.array(seen[: number + 1])
        mean = weights @ values
        assert weights.sum() == pytest.approx(1)
        assert one.mean == pytest.approx(mean)
        assert math.sqrt(one.state()["variance"]) == pytest.approx(math.sqrt(weights @ (values - mean) ** 2), abs=1e-9)
        assert one.limit == math.inf

        before = warm.state()
        allowed = before["mean"] + 2 * math.sqrt(before["variance"]) if number else math.inf
        assert warm.limit == pytest.approx(allowed)
        warm.see(number + 1, norm)
        taken = min(norm, allowed)
        assert warm.mean == pytest.approx(before["mean"] + (taken - before["mean"]) * (1 - keep))
    assert one.mean == pytest.approx(np.mean(seen[-50:]), rel=0.3)


def test_one_huge_norm_moves_the_statistics_by_no_more_than_the_largest_allowed() -> None:
    one, other = guard(), guard()
    for step, norm in enumerate(norms(100), start=1):
        assert not one.see(step, norm)
        assert not other.see(step, norm)
    allowed = one.limit
    assert one.mean < allowed < 2 * one.mean
    assert one.see(101, 1e30)
    assert not other.see(101, allowed)
    assert one.state() == other.state() | {"spikes": [101], "clipped": other.clipped + 1}
    assert guard(clip_sigmas=0, state=one.state()).limit == math.inf


def test_spikes_in_a_row_send_the_run_back_and_single_ones_do_not() -> None:
    one = guard()
    mean = 0.0
    for step, norm in enumerate(norms(100), start=1):
        one.see(step, norm)
    mean = one.mean
    for step, norm, spiked in (
        (101, 9.9 * mean, False),
        (102, 20 * mean, True),
        (103, math.inf, True),
        (104, mean, False),
        (105, math.nan, True),
        (106, 20 * mean, True),
    ):
        assert one.see(step, norm) is spiked
        assert not one.must_go_back
    assert one.state()["spikes"] == [105, 106]
    assert one.see(107, math.inf)
    assert (one.must_go_back, one.spiked) == (True, range(105, 108))
    for again in (mean, math.inf):  # while the other ranks are told
        later = guard(one.state())
        later.see(108, again)
        assert (later.must_go_back, later.spiked) == (True, range(105, 108))


def test_before_the_statistics_are_good_only_what_is_not_finite_is_a_spike() -> None:
    one, never = guard(), guard(spike_steps=0)
    assert not any(one.see(step, 10.0**step) for step in range(1, 20))
    for step in (20, 21, 22):
        assert not one.must_go_back
        assert one.see(step, math.inf)
        assert never.see(step, math.inf)
    assert (one.spiked, never.must_go_back) == (range(20, 23), False)
    assert one.state()["steps"] == 19


def test_a_run_that_goes_on_has_the_same_guard() -> None:
    seen = [*norms(60), 1e3, math.inf, 1e4, *norms(10, seed=1)]
    for cut in (0, 5, 30, 61, 62, 63, 70):
        straight, first = guard(), guard()
        for step, norm in enumerate(seen[:cut], start=1):
            assert straight.see(step, norm) == first.see(step, norm)
        second = guard(json.loads(json.dumps(first.state())))
        assert second.spiked == (range(61, 64) if cut == 63 else range(0))
        for step, norm in enumerate(seen[cut:], start=cut + 1):
            assert straight.limit == second.limit
            assert straight.see(step, norm) == second.see(step, norm)
        assert straight.state() == second.state()


def test_going_back_forgets_the_spikes_and_counts() -> None:
    one = guard()
    for step, norm in enumerate([*norms(50), 1e3], start=1):
        one.see(step, norm)
    state = Guard.state_gone_back(one.state(), 2)
    assert state == one.state() | {"spikes": [], "rollbacks": 2}
    assert (guard(state).rollbacks, guard(state).mean) == (2, one.mean)
    assert guard(Guard.state_gone_back({}, 1)).state() == guard().state() | {"rollbacks": 1}


def told(work: list[float], waited: list[float] | None = None) -> list[Vitals]:
    return [Vitals(work=a, waited=b) for a, b in zip(work, waited or [0.0] * len(work), strict=True)]


def test_a_slow_rank_is_named_once_with_its_host_until_it_has_been_fine() -> None:
    watch = Stragglers(HOSTS, 2.0)
    assert watch.report() == ({}, [])
    said = []
    for slow in (1.0, 3.0, 3.0, 1.9, 5.0):
        watch.add([])
        for step in range(10):
            watch.add(told([1.0, 1.1, slow + 0.1 * step - 0.45, 0.9]))
        values, entries = watch.report()
        assert values == pytest.approx(
            {"ranks/work_median": 1.0, "ranks/work_max": max(slow, 1.1), "ranks/wait_max": 0}
        )
        said.append([entry["message"] for entry in entries])
    assert said == [
        [],
        ["rank 2 (b) computes for 3 s a step, the median rank for 1 s"],
        [],
        [],
        ["rank 2 (b) computes for 5 s a step, the median rank for 1 s"],
    ]


def test_a_rank_that_waits_for_data_is_named_if_it_is_worth_it() -> None:
    for waited, named in (([1e-5, 2e-5, 1e-3, 1e-5], []), ([0.0, 0.0, 0.0, 0.3], [3]), ([2.0, 0.1, 0.2, 3.0], [0, 3])):
        watch = Stragglers(HOSTS, 2.0)
        for _ in range(10):
            watch.add(told([1.0] * 4, waited))
        values, entries = watch.report()
        assert [entry["rank"] for entry in entries] == named
        assert all(entry["seconds"] == pytest.approx(waited[entry["rank"]]) for entry in entries)
        assert values["ranks/wait_max"] == pytest.approx(max(waited))


def test_too_few_steps_are_judged_with_those_that_follow() -> None:
    watch, found = Stragglers(["a", "b"], 2.0), []
    for _ in range(10):
        watch.add(told([0.1, 1.0]))
        values, entries = watch.report()
        assert values["ranks/work_max"] == pytest.approx(1.0)
        found.append([(entry["rank"], entry["host"], round(entry["median"], 6)) for entry in entries])
    assert found == [[]] * 9 + [[(1, "b", 0.1)]]
    alone = Stragglers(["a"], 2.0)
    for _ in range(10):
        alone.add(told([1.0], [5.0]))
    assert alone.report()[1] == []


def test_a_stopwatch_counts_what_runs_inside() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.running():
            sum(range(100_000))
    first = watch.take()
    assert 0 < first < 5
    assert watch.take() == 0
