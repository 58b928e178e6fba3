"""Stop signals, remembered until the ranks can act on them together. Needs no torch: one may come during its import."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a stop signal until the ranks meet; SLURM sends SIGUSR1 ahead of the time limit, SIGTERM at it.

    Further ones change nothing, so that a launcher which repeats itself does not end a save. Before this object is
    made, a signal ends the process, which has done nothing yet. SIGINT stays Python's `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.signal = 0
        """Number of the first signal that came; 0 for none."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
