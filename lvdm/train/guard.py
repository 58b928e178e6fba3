"""The guard against loss spikes: what gradient norms are usual, and when a run has to go back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lvdm.config import HealthConfig


@dataclass
class _Memory:
    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0
    spikes: list[int] = field(default_factory=list)
    clipped: int = 0
    rollbacks: int = 0


class Guard:
    """Exponential moving mean and variance of the gradient norm, as in Open-Sora Plan 1.5: norms above mean + 3 sigma
    are clipped, also for these statistics, so that one bad batch moves neither the weights nor them by much.

    Every rank sees the same norms, which are of the whole gradient, and so comes to the same answers.
    """

    def __init__(self, config: HealthConfig, state: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            state: `state` of the run so far.
        """
        self._config = config
        self._memory = _Memory(**(state or {}))
        self.spiked = range(0)
        """The steps that `must_go_back` is about; the same ones for a run that was stopped before it could."""
        self._judge()  # a run may have been killed before it went back

    @property
    def limit(self) -> float:
        """Largest norm that the next step may have before it is clipped; infinite until the statistics are good."""
        if not self._config.clip_sigmas or not self._is_warm:
            return math.inf
        return self._memory.mean + self._config.clip_sigmas * math.sqrt(self._memory.variance)

    @property
    def mean(self) -> float:
        """Running mean of the norm."""
        return self._memory.mean

    @property
    def clipped(self) -> int:
        """Steps so far whose norm was above `limit`."""
        return self._memory.clipped

    @property
    def rollbacks(self) -> int:
        """How often the run has gone back."""
        return self._memory.rollbacks

    @property
    def must_go_back(self) -> bool:
        """Whether as many steps as ``health.spike_steps`` have spiked in a row."""
        return len(self.spiked) > 0

    def see(self, step: int, norm: float) -> bool:
        """Take in the norm of a step's gradient before clipping, infinite if it was not; whether it is a spike."""
        memory = self._memory
        spiked = not math.isfinite(norm) or (self._is_warm and norm > self._config.spike_factor * memory.mean)
        memory.spikes = [*memory.spikes, step] if spiked else []
        self._judge()
        if math.isfinite(norm):
            # the plain mean and variance at first, so that the beginning does not weigh more than its share
            decay = min(self._config.decay, memory.steps / (memory.steps + 1))
            memory.clipped += norm > self.limit
            difference = min(norm, self.limit) - memory.mean
            memory.mean += (1 - decay) * difference
            memory.variance = decay * (memory.variance + (1 - decay) * difference**2)
            memory.steps += 1
        return spiked

    def _judge(self) -> None:
        spikes, enough = self._memory.spikes, self._config.spike_steps
        if 0 < enough <= len(spikes):  # stays, whatever comes until all ranks have heard of it
            self.spiked = range(spikes[0], spikes[enough - 1] + 1)

    def state(self) -> dict[str, Any]:
        """What a later start needs; JSON."""
        return asdict(self._memory)

    @staticmethod
    def state_gone_back(state: Mapping[str, Any] | None, rollbacks: int) -> dict[str, Any]:
        """The ``state`` of an older checkpoint, for a run that has gone back to it for the ``rollbacks``-th time."""
        return asdict(_Memory(**(state or {}))) | {"spikes": [], "rollbacks": rollbacks}

    @property
    def _is_warm(self) -> bool:
        return self._memory.steps >= self._config.warmup_steps
