"""Early stops, and a watchdog against hangs. Needs no torch, so that a signal during its import is remembered too."""

from __future__ import annotations

import faulthandler
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a stop signal until the ranks meet; SLURM sends SIGUSR1 ahead of the time limit, SIGTERM at it."""

    def __init__(self) -> None:
        self.received = False
        """Whether this rank was asked to stop."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def expect_progress_within(seconds: float) -> None:
    """Print all stacks of this rank and end it, unless called again within ``seconds``."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def stop_watching() -> None:
    """Call off the last `expect_progress_within`."""
    faulthandler.cancel_dump_traceback_later()
