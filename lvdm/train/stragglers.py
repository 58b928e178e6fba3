"""Which ranks the others wait for."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lvdm.engine.pulse import Vitals

_ENOUGH = 10
"""Steps by which a rank is judged, at least."""
_NOTABLE = 0.1
"""A rank that loses less than so much of what the median one computes and waits is not worth a word."""


class Stopwatch:
    """Time that this rank's device spends in some blocks. On GPUs nobody waits: what has not ended counts later."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside the block."""
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._under_way.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds counted since the last call."""
        while self._under_way and self._under_way[0][1].query():
            begin, end = self._under_way.popleft()
            self._seconds += begin.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Stragglers:
    """Compares the ranks' own work and their waiting for data.

    What all ranks do together takes all of them as long as the slowest, so that it tells nothing. ZeRO-3 gathers large
    weights in the forward pass, too: there a slow rank shows in the work of all, and less in its own.
    """

    def __init__(self, hosts: Sequence[str], factor: float) -> None:
        """
        Args:
            hosts: of each rank, to name it.
            factor: a rank that takes so many times as long as the median one is named.
        """
        self._hosts, self._factor = hosts, factor
        self._named: set[tuple[int, str]] = set()
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._work = [0.0] * len(self._hosts)
        self._waited = [0.0] * len(self._hosts)

    def add(self, everyone: Sequence[Vitals]) -> None:
        """Take in what all ranks told at a step border; nothing at the first."""
        self._steps += bool(everyone)
        for rank, vitals in enumerate(everyone):
            self._work[rank] += vitals.work
            self._waited[rank] += vitals.waited

    def report(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Seconds a step for the log, and an entry for each rank that the others wait for and did not so far.

        They are of the steps since the last call, or of more calls where that are too few to judge by. Of two ranks the
        faster one counts as the median.
        """
        if not self._steps:
            return {}, []
        work, waited = ([total / self._steps for total in totals] for totals in (self._work, self._waited))
        usual, usual_wait = statistics.median_low(work), statistics.median_low(waited)
        values = {"ranks/work_median": usual, "ranks/work_max": max(work), "ranks/wait_max": max(waited)}
        if self._steps < _ENOUGH:
            return values, []
        late = {}
        for doing, everyone, median in (("computes", work, usual), ("waits for data", waited, usual_wait)):
            for rank, seconds in enumerate(everyone):
                if seconds > self._factor * median and seconds - median > _NOTABLE * (usual + usual_wait):
                    late[rank, doing] = self._entry(rank, doing, seconds, median)
        new = [entry for key, entry in late.items() if key not in self._named]
        self._named = set(late)
        self._begin()
        return values, new

    def _entry(self, rank: int, doing: str, seconds: float, median: float) -> dict[str, Any]:
        host = self._hosts[rank]
        message = f"rank {rank} ({host}) {doing} for {seconds:.3g} s a step, the median rank for {median:.3g} s"
        return {"message": message, "rank": rank, "host": host, "seconds": seconds, "median": median}
