"""Early stops that all ranks agree on, and a watchdog against hangs."""

from __future__ import annotations

import faulthandler
import signal
from types import FrameType

import torch

from lvdm.engine.distributed import sum_over_ranks

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a stop signal until the ranks meet; SLURM sends SIGUSR1 ahead of the time limit, SIGTERM at it."""

    def __init__(self) -> None:
        self._received = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop (collective, so every rank gets the same answer)."""
        return bool(sum_over_ranks(torch.tensor(float(self._received), device=device)) > 0)


def expect_progress_within(seconds: float) -> None:
    """Print all stacks of this rank and end it, unless called again within ``seconds``."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def stop_watching() -> None:
    """Call off the last `expect_progress_within`."""
    faulthandler.cancel_dump_traceback_later()
