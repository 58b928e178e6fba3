"""How fast a run goes, and where its time went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Speedometer:
    """Rates since the last report, leaving out what it is `paused` for, and where the time went."""

    def __init__(self, step: int, samples: int) -> None:
        self._spent: dict[str, float] = {}
        self._step, self._samples = step, samples
        self._since = time.perf_counter()
        self._waited = self._waited_in_step = 0.0

    def wait_for(self, loader: Iterator[Any]) -> Any:
        """The next micro-batch; the time until it is there counts as waiting for data."""
        begin = time.perf_counter()
        batch = next(loader)
        waited = time.perf_counter() - begin
        self._waited += waited
        self._waited_in_step += waited
        return batch

    def waited_in_step(self) -> float:
        """Seconds waited for data since the last call."""
        waited, self._waited_in_step = self._waited_in_step, 0.0
        return waited

    def report(self, step: int, samples: int, steps: int) -> dict[str, float]:
        """Rates at ``step`` of ``steps``, which all ranks took ``samples`` to reach, and a new beginning."""
        seconds = time.perf_counter() - self._since
        values = {
            "samples_per_second": (samples - self._samples) / seconds,
            "data_wait_fraction": self._waited / seconds,
            "seconds_left": (steps - step) * seconds / (step - self._step),
        }
        self.spend("training", seconds - self._waited)
        self.spend("data_wait", self._waited)
        self._step, self._samples, self._waited = step, samples, 0.0
        self._since = time.perf_counter()
        return values | self.spent()

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Leave the time inside the block out of the rates; it goes into ``name``."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._since += seconds
        self.spend(name, seconds)

    def spend(self, name: str, seconds: float) -> None:
        """Count seconds as gone into ``name``."""
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    def spent(self) -> dict[str, float]:
        """Seconds by what they went into since the last call, as ``seconds/NAME``."""
        taken = {f"seconds/{name}": seconds for name, seconds in self._spent.items()}
        self._spent.clear()
        return taken
