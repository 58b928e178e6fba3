from __future__ import annotations

import itertools
import time
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lvdm.data.order import MIX_BLOCK, Order, sample_at, share
from lvdm.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10, 97, 1000, 4097])
def test_every_epoch_has_each_sample_exactly_once(size: int) -> None:
    for epoch in (0, 1, 10**9):
        drawn = [sample_at(epoch * size + i, size, seed=3, shuffle=True) for i in range(size)]
        assert sorted(drawn) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(sample_at(epoch * 50 + i, 50, seed, shuffle=True) for i in range(50))
        for seed, epoch in itertools.product((0, 1, 2**40), range(4))
    }
    assert len(orders) == 12


@pytest.mark.parametrize("size", [2, 3, 10])
def test_every_sample_is_equally_likely_at_every_place(size: int) -> None:
    epochs = 3000
    counts = [[0] * size for _ in range(size)]
    for epoch, place in itertools.product(range(epochs), range(size)):
        counts[place][sample_at(epoch * size + place, size, seed=11, shuffle=True)] += 1
    expected = epochs / size
    chi_square = sum((count - expected) ** 2 / expected for row in counts for count in row)
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_neighbours_in_the_order_are_not_neighbours_in_the_set() -> None:
    order = [sample_at(i, 10_000, seed=0, shuffle=True) for i in range(10_000)]
    close = sum(abs(a - b) <= 10 for a, b in itertools.pairwise(order))
    assert close < 50  # 20 expected of a random order


def test_without_shuffling_the_order_is_that_of_the_index() -> None:
    assert [sample_at(i, 4, seed=5, shuffle=False) for i in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_a_position_far_into_a_huge_set_needs_no_memory() -> None:
    assert 0 <= sample_at(10**15, 10**8, seed=1, shuffle=True) < 10**8


@pytest.mark.parametrize(("size", "together"), [(40, 8), (43, 8), (7, 8), (8, 8), (1000, 3)])
def test_neighbours_stay_together_where_wanted(size: int, together: int) -> None:
    tails = set()
    for epoch in range(4):
        order = [sample_at(epoch * size + i, size, 1, True, contiguous=together) for i in range(size)]
        assert sorted(order) == list(range(size))
        steps = [(b - a) % size for a, b in itertools.pairwise(order)]
        assert sum(step != 1 for step in steps) <= size // together
        tails.add(tuple(order[size // together * together :]))
    if size % together:
        assert len(tails) > 1, "the same samples come last in every epoch"


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 3), (4, 3), (12, 1)])
def test_a_step_is_the_same_samples_for_any_number_of_ranks(world: int, accumulation: int) -> None:
    order = Order([[50]], [12], seed=0)
    whole = order.step(7).entries
    assert [entry.position for entry in whole] == list(range(84, 96))
    for together in (1, 3, 4, 100):
        parts = {
            (rank, part): order.step(7, share(12, world, rank, accumulation, part, together)).entries
            for rank in range(world)
            for part in range(accumulation)
        }
        assert {len(entries) for entries in parts.values()} == {12 // world // accumulation}
        assert sorted((e for entries in parts.values() for e in entries), key=lambda e: e.position) == list(whole)
        if together == 1:
            assert all(entry.position % world == rank for (rank, _), entries in parts.items() for entry in entries)


def test_ranks_take_neighbours_that_stay_together() -> None:
    order = Order([[6400]], [64], seed=0, contiguous=16)
    for rank in range(4):
        places = [entry.place for entry in order.step(3, share(64, 4, rank, 1, 0, order.contiguous)).entries]
        assert places == list(range(places[0], places[0] + 16))


def test_one_set_in_one_bucket_is_the_plain_order() -> None:
    order = Order([[30], [12]], [8], seed=3)
    for step in (0, 5, 10**9):
        for entry in order.step(step).entries:
            row = sample_at(entry.position, 42, 3, True)
            assert (entry.source, entry.place) == ((0, row) if row < 30 else (1, row - 30))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sources=st.integers(1, 3), buckets=st.integers(1, 3), seed=st.integers(0, 2**63 - 1))
def test_each_epoch_takes_every_sample_once_or_carries_it_over(
    data: st.DataObject, sources: int, buckets: int, seed: int
) -> None:
    sizes = [data.draw(st.lists(st.integers(0, 25), min_size=buckets, max_size=buckets)) for _ in range(sources)]
    assume(sum(map(sum, sizes)))
    batches = data.draw(st.lists(st.integers(1, 16), min_size=buckets, max_size=buckets))
    order = Order(sizes, batches, seed=seed, contiguous=data.draw(st.sampled_from([1, 4])))
    epochs = data.draw(st.integers(1, 4))
    seen: Counter[tuple[int, int, int]] = Counter()
    positions: set[int] = set()
    step = 0
    while order.epoch_at(step) < epochs:
        taken = order.step(step)
        assert len(taken.entries) == batches[taken.bucket]
        for entry in taken.entries:
            assert 0 <= entry.place < sizes[entry.source][taken.bucket]
            seen[taken.bucket, entry.source, entry.place] += 1
            assert entry.position not in positions
            positions.add(entry.position)
        step += 1
    for bucket in range(buckets):
        whole = sum(row[bucket] for row in sizes)
        counts = [seen[bucket, source, place] for source, row in enumerate(sizes) for place in range(row[bucket])]
        assert 0 <= epochs * whole - sum(counts) < batches[bucket]
        assert not counts or set(counts) <= {sum(counts) // whole, sum(counts) // whole + 1}


@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**63 - 1))
def test_weights_are_kept_in_every_block_and_each_source_runs_through_its_samples(
    data: st.DataObject, seed: int
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=2, max_size=4))
    weights = data.draw(st.lists(st.integers(0, 20), min_size=len(sizes), max_size=len(sizes)))
    assume(any(weights))
    order = Order([[size] for size in sizes], [50], seed=seed, weights=weights)
    places: list[list[int]] = [[] for _ in sizes]
    for step in range(2 * MIX_BLOCK // 50):
        for entry in order.step(step).entries:
            places[entry.source].append(entry.place)
    for size, weight, taken in zip(sizes, weights, places, strict=True):
        assert abs(len(taken) - 2 * MIX_BLOCK * weight / sum(weights)) <= 2 * len(sizes)
        for epoch in range(len(taken) // size):
            assert sorted(taken[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_weights_hold_across_buckets() -> None:
    # the first source lies mostly in the first bucket, the second in the second
    order = Order([[900, 100], [50, 450]], [8, 4], seed=0, weights=[0.5, 0.5])
    taken: Counter[int] = Counter()
    for step in range(4000):
        for entry in order.step(step).entries:
            taken[entry.source] += 1
    assert taken[0] / sum(taken.values()) == pytest.approx(0.5, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**63 - 1), step=st.integers(0, 200))
def test_new_weights_let_every_source_go_on_where_it_was(data: st.DataObject, seed: int, step: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 200), min_size=2, max_size=3))
    first = Order([[size] for size in sizes], [8], seed=seed, weights=[1] * len(sizes))
    assert first.steps_left(step) == 0
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    second = Order([[size] for size in sizes], [16], seed=seed, weights=weights, era=first.next_era(step))
    places: list[list[int]] = [[] for _ in sizes]
    positions = []
    for order, steps in ((first, range(step)), (second, range(step, step + 60))):
        for number in steps:
            for entry in order.step(number).entries:
                places[entry.source].append(entry.place)
                positions.append(entry.position)
    assert positions == list(range(len(positions)))
    for size, taken in zip(sizes, places, strict=True):
        for epoch in range(len(taken) // size):
            assert sorted(taken[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**63 - 1))
def test_what_a_change_passes_over_with_buckets_is_counted(data: st.DataObject, seed: int) -> None:
    sizes = data.draw(st.lists(st.integers(20, 90), min_size=2, max_size=3))
    order = Order([sizes], [5] * len(sizes), seed=seed)
    step = data.draw(st.integers(0, 60))
    era, seen = order.next_era(step), Counter(order.step(number).bucket for number in range(step))
    assert order.steps_left(step) == sum(era.taken[0]) // 5 - seen.total() >= 0
    epoch = order.epoch_at(step)
    assert order.epoch_at(step + order.steps_left(step)) == (epoch + 1 if order.steps_left(step) else epoch)


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [([[500], [500]], [1, 0.0004]), ([[10**6, 10], [100, 10**6]], [1, 1]), ([[50], [70]], [1e-9, 2e-9])],
)
def test_no_source_is_lost_by_rounding(sizes: list[list[int]], weights: list[float]) -> None:
    order = Order(sizes, [50] * len(sizes[0]), seed=0, weights=weights)
    found: Counter[tuple[int, int]] = Counter()
    for step in range(200):
        taken = order.step(step)
        found.update((entry.source, taken.bucket) for entry in taken.entries)
    assert found.keys() == {(source, bucket) for source, row in enumerate(sizes) for bucket in range(len(row))}


def test_a_step_far_away_costs_what_the_first_costs() -> None:
    order = Order([[10**8, 10**7], [10**6, 10**5]], [64, 256], seed=0, weights=[3, 1], contiguous=64)
    for step in (0, 10**9):
        begin = time.perf_counter()
        for number in range(20):
            order.step(step + number)
        assert (time.perf_counter() - begin) / 20 < 0.05


def test_sets_that_give_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="no samples"):
        Order([[0, 0]], [4, 4], seed=0)
    with pytest.raises(UserError, match="no source that has samples has a weight above 0"):
        Order([[5], [0]], [4], seed=0, weights=[0, 1])
