"""Which sample stands at which position of the run: pure functions with O(1) random access and no state.

Position q belongs to epoch ``q // N`` and takes sample ``pi(q % N)`` of it, where pi is a permutation keyed by (seed,
epoch). pi is a Feistel network over pairs ``(left, right)`` with ``left * right_size + right`` just above N; a value
that lands at N or above is sent through again (cycle walking), which keeps it a permutation of 0..N-1. A step takes the
next B positions, rank r of W those with ``q % W == r``: the same samples whatever W is.
"""

from __future__ import annotations

import math

from lvdm.errors import UserError

_MASK64 = (1 << 64) - 1
_ROUNDS = 8  # each half is mixed four times


def sample_at(position: int, size: int, seed: int, shuffle: bool) -> int:
    """Index, in a set of ``size`` samples, of the sample at ``position`` of the run (counted from 0)."""
    assert position >= 0
    assert size > 0
    epoch, place = divmod(position, size)
    if not shuffle:
        return place
    return _permute(place, size, _mix(_mix(seed & _MASK64) ^ epoch))


def step_positions(first: int, batch: int, world: int, rank: int, micro: int) -> list[list[int]]:
    """Positions that ``rank`` of ``world`` takes in the step from ``first`` on, one inner list a micro-batch.

    Raises:
        UserError: if ``batch`` is not a multiple of ``world * micro``.
    """
    if batch % (world * micro):
        raise UserError(
            f"batch.size {batch} is not divisible by {world} ranks x batch.micro {micro} = {world * micro}; change one"
        )
    assert 0 <= rank < world
    mine = [q for q in range(first, first + batch) if q % world == rank]
    return [mine[i : i + micro] for i in range(0, len(mine), micro)]


def _permute(value: int, size: int, key: int) -> int:
    left_size = math.isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    while True:
        left, right = divmod(value, right_size)
        for round_ in range(0, _ROUNDS, 2):
            left = (left + _mix(key ^ _mix((right << 8) | round_))) % left_size
            right = (right + _mix(key ^ _mix((left << 8) | (round_ + 1)))) % right_size
        value = left * right_size + right
        if value < size:
            return value


def _mix(x: int) -> int:
    """The finaliser of SplitMix64: a bijection of 64-bit integers that spreads every bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
