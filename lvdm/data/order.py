"""Which samples each step of a run takes: pure functions of the step with O(1) random access and no state.

    step -> epoch and bucket -> batch of the bucket's stream -> (source, place) -> sample

**Streams.** The samples of a bucket (clips of one size) form a stream: endless epochs over the same samples, each a
permutation of its own. Unweighted sources are one stream together. Weighted ones have a stream each, and a bucket takes
from them in blocks of `MIX_BLOCK` places with exact quotas, in an order drawn for the block.

**Buckets.** A step takes one batch of one bucket, on all ranks. Epoch e of the run holds
``floor((e + 1) n / B) - floor(e n / B)`` batches of a bucket of n samples and batch size B, so that what does not fill
a batch is carried into the next epoch. The steps of an epoch, permuted, stand for its batches.

**Permutations** are Feistel networks over pairs ``(left, right)`` with ``left * right_size + right`` just above N; a
value that lands at N or above is sent through again (cycle walking), which keeps it a permutation of 0..N-1.

Rank r of W takes the samples whose position q has ``q // c % W == r``, where c neighbours are kept together: the step
has the same samples whatever W is, and a rank can read neighbours in one go.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lvdm.errors import UserError
from lvdm.randomness import Purpose, generator

MIX_BLOCK = 1000
"""Places of a bucket's stream in which the sources' shares are exact; weights are rounded to its fractions."""

_MASK64 = (1 << 64) - 1
_ROUNDS = 8  # each half is mixed four times


@dataclass(frozen=True)
class Entry:
    """One sample of a step."""

    position: int
    """Position in the run, the key of every random draw about the sample; unique."""
    source: int
    place: int
    """Which of the source's samples in the step's bucket."""


@dataclass(frozen=True)
class Step:
    """What one optimiser step takes, over all ranks."""

    bucket: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Era:
    """Where a way of mixing begins; a run whose sources or weights change on resume begins another."""

    step: int = 0
    position: int = 0
    """Position of the era's first sample."""
    taken: tuple[tuple[int, ...], ...] = ()
    """By stream and bucket, how far the stream was consumed before; empty: not at all."""


class Order:
    """The samples of every step of an era."""

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        batches: Sequence[int],
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        contiguous: int = 1,
        keys: Sequence[int] | None = None,
        era: Era | None = None,
    ) -> None:
        """
        Args:
            sizes: samples by source and bucket.
            batches: batch size by bucket.
            seed: of all permutations.
            weights: shares of the samples that the sources give, in any unit; by default their sizes, as one set.
            shuffle: off takes streams, and buckets within an epoch, in their own order.
            contiguous: neighbouring samples that a permutation keeps together, for stores that hate random reads.
            keys: of weighted sources, 32-bit numbers that tell their permutations apart wherever they stand in the
                list; by default their places in it.
            era: where this order begins.
        """
        assert sizes
        assert all(len(row) == len(batches) for row in sizes)
        assert min(*batches, contiguous) > 0
        self._sizes = [list(row) for row in sizes]
        self._batches = list(batches)
        self._seed, self._shuffle, self.contiguous = seed, shuffle, contiguous
        self._keys = list(range(len(sizes)) if keys is None or weights is None else keys)
        self.era = era or Era()
        self._mixed = weights is not None
        totals = [sum(row) for row in sizes]
        if weights is None:
            self._streams = [[sum(column) for column in zip(*sizes, strict=True)]]
            self._shares = [Fraction(size) for size in self._streams[0]]
            self._quotas: list[list[int]] = []
        else:
            self._streams = self._sizes
            largest = max(weight * (size > 0) for weight, size in zip(weights, totals, strict=True))
            if not largest:
                raise UserError("no source that has samples has a weight above 0")
            wanted = [
                Fraction(weight / largest).limit_denominator(10**6) * (size > 0)
                for weight, size in zip(weights, totals, strict=True)
            ]
            given = [
                [weight * row[bucket] / max(total, 1) for weight, row, total in zip(wanted, sizes, totals, strict=True)]
                for bucket in range(len(batches))
            ]
            self._quotas = [_in_whole(column, MIX_BLOCK) for column in given]
            whole = Fraction(sum(totals)) / sum(wanted)
            self._shares = [sum(column, Fraction()) * whole for column in given]
        if not any(self._shares):
            raise UserError("there are no samples to take")
        self._stride = max(batch for batch, share in zip(batches, self._shares, strict=True) if share)

    def bucket_at(self, step: int) -> int:
        """The bucket of which a step of the run takes a batch."""
        assert step >= self.era.step
        return self._batch_of(step - self.era.step)[1]

    def step(self, step: int, numbers: Sequence[int] | None = None) -> Step:
        """What a step of the run takes, or the ``numbers`` of it, counted from 0."""
        assert step >= self.era.step
        _, bucket, batch = self._batch_of(step - self.era.step)
        size, first = self._batches[bucket], self.position_at(step)
        numbers = range(size) if numbers is None else numbers
        return Step(bucket, tuple(Entry(first + i, *self._sample(bucket, batch * size + i)) for i in numbers))

    def position_at(self, step: int) -> int:
        """Position of the first sample of a step."""
        return self.era.position + (step - self.era.step) * self._stride

    def epoch_at(self, step: int) -> int:
        """Epoch of this era that a step belongs to, from 0."""
        return self._epoch_of(step - self.era.step)

    def next_era(self, step: int) -> Era:
        """The era that begins at ``step`` with other weights or batch sizes, in the terms of this one.

        Each stream goes on behind what it gave. With several buckets the batches of the epoch under way are permuted,
        so it goes on behind that epoch, and the `steps_left` of it are passed over.
        """
        taken = tuple(
            tuple(
                self._consumed(stream, bucket, self._batches_until(step, bucket))
                for bucket in range(len(self._batches))
            )
            for stream in range(len(self._streams))
        )
        return Era(step, self.position_at(step), taken)

    def steps_left(self, step: int) -> int:
        """Steps of the epoch under way that an era beginning at ``step`` passes over."""
        past = step - self.era.step
        epoch = self._epoch_of(past)
        if self._only_bucket() is not None or past == self._first_step(epoch):
            return 0
        return self._first_step(epoch + 1) - past

    def _batches_until(self, step: int, bucket: int) -> int:
        """Batches of a bucket up to where a new era at ``step`` lets it go on."""
        past = step - self.era.step
        if self._only_bucket() is not None:
            return past if bucket == self._only_bucket() else 0
        epoch = self._epoch_of(past)
        epochs = epoch if past == self._first_step(epoch) else epoch + 1
        return math.floor(epochs * self._shares[bucket] / self._batches[bucket])

    def _consumed(self, stream: int, bucket: int, batches: int) -> int:
        """How far a stream is consumed after so many batches of a bucket."""
        places = batches * self._batches[bucket]
        if not self._mixed:
            return self._before(stream, bucket) + places
        block, inside = divmod(places, MIX_BLOCK)
        quota = self._quotas[bucket][stream]
        sources, _ = _mix_block(tuple(self._quotas[bucket]), self._seed, bucket, block, self._shuffle)
        return self._before(stream, bucket) + block * quota + int((sources[:inside] == stream).sum())

    def _before(self, stream: int, bucket: int) -> int:
        return self.era.taken[stream][bucket] if self.era.taken else 0

    def _only_bucket(self) -> int | None:
        used = [bucket for bucket, share in enumerate(self._shares) if share]
        return used[0] if len(used) == 1 else None

    def _first_step(self, epoch: int) -> int:
        return sum(math.floor(epoch * share / batch) for share, batch in zip(self._shares, self._batches, strict=True))

    def _epoch_of(self, step: int) -> int:
        per_epoch = sum((share / batch for share, batch in zip(self._shares, self._batches, strict=True)), Fraction())
        epoch = math.floor(step / per_epoch)  # each floor loses less than one step: the epoch is this one or a few on
        while self._first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    def _batch_of(self, step: int) -> tuple[int, int, int]:
        """Epoch and bucket of a step of the era, and the number of the batch in the bucket's stream."""
        epoch = self._epoch_of(step)
        only = self._only_bucket()
        if only is not None:
            return epoch, only, step
        before = [math.floor(epoch * s / b) for s, b in zip(self._shares, self._batches, strict=True)]
        after = [math.floor((epoch + 1) * s / b) for s, b in zip(self._shares, self._batches, strict=True)]
        ends = list(itertools.accumulate(last - first for first, last in zip(before, after, strict=True)))
        slot = step - sum(before)
        if self._shuffle:
            slot = permute(slot, ends[-1], _mix(_mix(_mix(self._seed & _MASK64) ^ epoch) ^ 1))
        bucket = bisect.bisect_right(ends, slot)
        return epoch, bucket, before[bucket] + slot - (ends[bucket - 1] if bucket else 0)

    def _sample(self, bucket: int, place: int) -> tuple[int, int]:
        """Source and place of a sample, by its place in the bucket's stream."""
        if self._mixed:
            block, inside = divmod(place, MIX_BLOCK)
            sources, ranks = _mix_block(tuple(self._quotas[bucket]), self._seed, bucket, block, self._shuffle)
            source = int(sources[inside])
            number = self._before(source, bucket) + block * self._quotas[bucket][source] + int(ranks[inside])
            return source, self._shuffled(number, self._sizes[source][bucket], bucket, source)
        number = self._before(0, bucket) + place
        found = self._shuffled(number, self._streams[0][bucket], bucket, 0)
        source = 0
        while found >= self._sizes[source][bucket]:
            found -= self._sizes[source][bucket]
            source += 1
        return source, found

    def _shuffled(self, number: int, size: int, bucket: int, stream: int) -> int:
        """The sample at a place of endless epochs over ``size`` samples."""
        own = (bucket << 32) | self._keys[stream]
        seed = _mix(_mix(self._seed & _MASK64) ^ own) if own else self._seed
        return sample_at(number, size, seed, self._shuffle, self.contiguous)


def sample_at(position: int, size: int, seed: int, shuffle: bool, contiguous: int = 1) -> int:
    """Index, in a set of ``size`` samples, of the sample at ``position`` of endless epochs over it (counted from 0).

    With ``contiguous`` above 1, that many neighbours stay together; the few at the end that fill no such group come
    last, and an epoch starts to count its groups at an index of its own, so that they are others every time.
    """
    assert position >= 0
    assert size > 0
    epoch, place = divmod(position, size)
    if not shuffle:
        return place
    key = _mix(_mix(seed & _MASK64) ^ epoch)
    if contiguous == 1:
        return permute(place, size, key)
    groups = size // contiguous
    if place < groups * contiguous:
        group, inside = divmod(place, contiguous)
        place = permute(group, groups, key) * contiguous + inside
    return (place + _mix(key)) % size


def share(size: int, world: int, rank: int, accumulation: int, part: int, contiguous: int = 1) -> list[int]:
    """Which of the ``size`` samples of a step ``rank`` of ``world`` takes in ``part`` of its micro-batches.

    Ranks take turns at ``contiguous`` samples, or at as many of them as go evenly into their shares.
    """
    micro, rest = divmod(size, world * accumulation)
    assert not rest
    together = math.gcd(contiguous, size // world)
    mine = [number for number in range(size) if number // together % world == rank]
    return mine[part * micro : (part + 1) * micro]


def permute(value: int, size: int, key: int) -> int:
    """Where the permutation of 0..size-1 that ``key`` chooses sends ``value``."""
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


@functools.lru_cache(maxsize=64)
def _mix_block(
    quotas: tuple[int, ...], seed: int, bucket: int, block: int, shuffle: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Source of each place of a block of a bucket's stream, and how many of that source stand before it there."""
    sources = np.repeat(np.arange(len(quotas)), quotas)
    if shuffle:
        sources = generator(_mix(seed & _MASK64) ^ bucket, block, Purpose.MIX).permutation(sources)
    ranks = np.zeros_like(sources)
    for source in range(len(quotas)):
        mine = sources == source
        ranks[mine] = np.arange(int(mine.sum()))
    return sources, ranks


def _in_whole(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that add up to ``total``, as near to ``shares`` as can be, but at least 1 for any share above 0."""
    whole = sum(shares, Fraction())
    if not whole:
        return [0] * len(shares)
    exact = [share * total / whole for share in shares]
    rounded = [max(math.floor(value), 1) if value else 0 for value in exact]
    if sum(rounded) > total:
        rounded[rounded.index(max(rounded))] -= sum(rounded) - total
    # largest remainders first
    by_remainder = sorted(range(len(exact)), key=lambda i: (rounded[i] - exact[i], i))
    for i in by_remainder[: total - sum(rounded)]:
        rounded[i] += 1
    assert min(rounded) >= 0, f"more than {total} sources"
    return rounded


def _mix(x: int) -> int:
    """The finaliser of SplitMix64: a bijection of 64-bit integers that spreads every bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
