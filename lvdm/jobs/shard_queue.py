"""The shards that a worker of a job takes, claimed by a thread one ahead of the work, as a plan that grows.

A plan's micro-batches never span shards. Where no shard is free at the moment, as others work on the last ones, the
plan lists empty micro-batches, so that the loader's processes stay for what is still to come.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lvdm.jobs.leases import Leases
from lvdm.jobs.shard_board import Board

LOOK_EVERY = 5.0
"""Seconds between looks at what all workers finished."""
_IDLE = 0.05  # seconds that an empty micro-batch takes


@dataclass(frozen=True)
class Planned:
    """Which shard a micro-batch belongs to."""

    shard: str
    items: Sequence[Any]
    last: bool
    """Whether it is the shard's last."""


class ShardQueue(Sequence[Sequence[Any]]):
    """Micro-batches of the shards that this worker claims, until all shards of the job are finished or given up.

    Args:
        items: the micro-batches of a shard.
    """

    def __init__(self, board: Board, leases: Leases, items: Callable[[str], Sequence[Sequence[Any]]]) -> None:
        self._board, self._leases, self._items = board, leases, items
        self._claimed: queue.Queue[str] = queue.Queue(maxsize=1)
        self._planned: deque[Planned | None] = deque()
        self._first = 0
        """Number of the first micro-batch in ``_planned``."""
        self._mine: set[str] = set()
        self._tried: set[str] = set()
        self._all_done = self._stop = False
        self._through = threading.Event()
        """Set when this worker is through with a shard, so that nothing may be left."""
        self.error: Exception | None = None
        """What claiming met, which ends the plan."""
        self._thread = threading.Thread(target=self._claim_all, daemon=True)

    def __enter__(self) -> ShardQueue:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._through.set()
        self._thread.join()

    def __len__(self) -> int:
        raise TypeError("it grows")

    def __getitem__(self, number: Any) -> Any:
        while number - self._first >= len(self._planned):
            self._grow()
        planned = self._planned[number - self._first]
        return planned.items if planned is not None else []

    def take(self) -> Planned | None:
        """What the next micro-batch that the loader gave belongs to; nothing for an empty one."""
        self._first += 1
        planned = self._planned.popleft()
        if planned is None:
            time.sleep(_IDLE)
        return planned

    def drop(self) -> str:
        """Forget the rest of the shard that the next micro-batch belongs to, of which reading failed; its name.

        Whoever reads the plan starts again, and counts from 0.
        """
        while self._planned[0] is None:
            self.take()
        shard = self._planned[0].shard
        kept = [planned for planned in self._planned if planned is not None and planned.shard != shard]
        self._planned, self._first = deque(kept), 0
        return shard

    def done(self, shard: str) -> None:
        """This worker is through with a shard, for good or ill."""
        self._leases.release(shard)
        self._mine.discard(shard)
        self._through.set()

    def _grow(self) -> None:
        if self.error is not None:
            raise self.error
        try:
            shard = self._claimed.get_nowait()
        except queue.Empty:
            if self._all_done:
                raise IndexError from None
            self._planned.append(None)
            return
        batches = self._items(shard)
        for number, items in enumerate(batches, start=1):
            self._planned.append(Planned(shard, items, number == len(batches)))

    def _claim_all(self) -> None:
        try:
            while not self._stop:
                self._through.clear()
                self._board.look(LOOK_EVERY)
                left = self._board.open
                if not left:
                    self._all_done = True
                    return
                shard = self._claim_one(left)
                if shard is None:
                    self._through.wait(min(self._leases.seconds / 10, LOOK_EVERY))
                    continue
                self._mine.add(shard)
                while not self._stop:
                    try:
                        self._claimed.put(shard, timeout=0.1)
                        break
                    except queue.Full:
                        continue
        except Exception as error:  # of whatever kind: else the plan would wait for this thread for ever
            self.error = error

    def _claim_one(self, left: Sequence[str]) -> str | None:
        """Claim a shard that nobody has; those that this worker failed at before come last."""
        first = random.SystemRandom().randrange(len(left))  # so that workers do not queue for the same shards
        fresh = sorted([*left[first:], *left[:first]], key=lambda name: name in self._tried)
        for shard in fresh:
            if self._stop:
                return None
            if shard in self._mine or not self._leases.claim(shard):
                continue
            if self._board.is_finished(shard):
                self._leases.release(shard)
                continue
            self._tried.add(shard)
            return shard
        return None
