from __future__ import annotations

import itertools

import pytest

from lvdm.data.order import sample_at, step_positions
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


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (1, 3), (2, 2), (4, 1), (4, 3)])
def test_a_step_is_the_same_positions_for_any_number_of_ranks(world: int, micro: int) -> None:
    parts = [step_positions(84, 12, world, rank, micro) for rank in range(world)]
    assert sorted(q for part in parts for batch in part for q in batch) == list(range(84, 96))
    for rank, part in enumerate(parts):
        assert len(part) == 12 // world // micro
        assert all(len(batch) == micro for batch in part)
        assert all(q % world == rank for batch in part for q in batch)


def test_a_step_may_start_anywhere() -> None:
    parts = [step_positions(13, 8, 4, rank, 2) for rank in range(4)]
    assert parts == [[[16, 20]], [[13, 17]], [[14, 18]], [[15, 19]]]


def test_an_uneven_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch\.size 10 is not divisible by 2 ranks x batch\.micro 4 = 8"):
        step_positions(0, 10, 2, 0, 4)
