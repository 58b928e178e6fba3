"""What every rank tells all others at each step border, read one border later, so that nobody waits for it."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from lvdm.engine.distributed import Ranks, host_group


@dataclass(frozen=True)
class Vitals:
    """What one rank tells."""

    stop: int = 0
    """Number of the signal by which it was asked to stop; 0 for none."""
    save_failed: bool = False
    """It knows that the last checkpoint could not be written."""
    spiked: bool = False
    """Its guard has seen enough spikes to go back."""
    work: float = 0.0
    """Seconds of its own computing in the step: the forward pass, with encoding."""
    waited: float = 0.0
    """Seconds that it waited for data in the step."""


class Pulse:
    """A small all-gather a step over host memory, on a group of its own.

    All ranks read the same answers at the same border, so that what follows from them is agreed. A signal that arrives
    during step k is told at its end and acted on at the end of step k + 1.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float) -> None:
        """Collective."""
        self._world = ranks.world
        self._group = host_group(timeout_seconds)
        self._under_way: tuple[torch.distributed.Work, list[torch.Tensor]] | None = None

    def beat(self, mine: Vitals) -> list[Vitals]:
        """Send this border's vitals (collective).

        Returns:
            What each rank sent at the border before, in rank order; nothing at the first.
        """
        before = self._everyones()
        sent = torch.tensor(astuple(mine), dtype=torch.float64)
        received = [torch.empty_like(sent) for _ in range(self._world)]
        work = torch.distributed.all_gather(received, sent, group=self._group, async_op=True)
        assert work is not None
        self._under_way = work, received
        return before

    def _everyones(self) -> list[Vitals]:
        if self._under_way is None:
            return []
        work, received = self._under_way
        work.wait()
        told = [row.tolist() for row in received]
        return [Vitals(int(stop), bool(failed), bool(spiked), *seconds) for stop, failed, spiked, *seconds in told]
