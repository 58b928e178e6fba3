"""A shard on its way to its folder: what the encoders give is packed and written in a thread, beside the computing."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from lvdm.data.one_pass import SourceSample
from lvdm.jobs.encoders import Coming

_AHEAD = 64  # samples that may wait for a shard's thread
_END = object()


@dataclass(frozen=True)
class ClipPlace:
    """One clip of what the autoencoder gave in one call."""

    call: Coming
    number: int

    def wait(self) -> torch.Tensor:
        """Its moments ``[2C, T, H, W]``."""
        return self.call.wait()[self.number]


@dataclass(frozen=True)
class EncodedSample:
    """A sample as it goes into a shard, perhaps still on its way from the device."""

    sample: SourceSample
    """Without its frames."""
    moments: Sequence[ClipPlace]
    """By clip."""
    states: Sequence[tuple[int, int, Coming]]
    """Place and number of each caption, and its states."""


class ShardOutput:
    """Samples handed to a thread that writes them.

    Args:
        write: writes the samples that it is given, to their end; raises, and leaves nothing, if asking for them does.
    """

    def __init__(self, pool: ThreadPoolExecutor, write: Callable[[Iterator[EncodedSample]], None]) -> None:
        self._queue: queue.Queue[object] = queue.Queue(_AHEAD)
        self.written: Future[None] = pool.submit(write, self._samples())
        """Done when the shard is finished."""

    def put(self, sample: EncodedSample) -> None:
        """Hand over the next sample. Raises what writing met."""
        self._hand_over(sample)

    def end(self) -> None:
        """There are no more."""
        self._hand_over(_END)

    def abort(self, reason: Exception) -> None:
        """There should be more and will not be: nothing is written."""
        self._hand_over(reason)

    def _hand_over(self, item: object) -> None:
        while True:
            try:
                return self._queue.put(item, timeout=0.5)
            except queue.Full:
                if self.written.done():
                    return self.written.result()

    def _samples(self) -> Iterator[EncodedSample]:
        while (item := self._queue.get()) is not _END:
            if isinstance(item, Exception):
                raise item
            assert isinstance(item, EncodedSample)
            yield item
