"""Micro-batches made by loader processes, in the order of a plan, whatever happens to the processes.

A worker that dies, of a codec's fault or for its memory, costs nothing: what was under way is read again by new ones,
one micro-batch at a time, and a sample that kills two is given up.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import multiprocessing
import signal
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lvdm.config import DataConfig
from lvdm.data.samples import Failure
from lvdm.errors import Requeue

log = logging.getLogger(__name__)

KILLED = "killed two workers that read it"
"""Why a sample among `PlannedDataset.killers` is bad."""
_TOLD_OF_DEATH = ("DataLoader worker (pid", "Pin memory thread exited")


class WorkerDied(Exception):
    """A loader process ended by itself: killed for its memory, or by a fault in a codec."""


class PlannedDataset(Dataset[Any]):
    """Makes the samples of the items that a plan lists, in a worker."""

    killers: frozenset[Hashable] = frozenset()
    """Items whose samples killed two workers, and which are read no more."""

    @abstractmethod
    def __getitems__(self, items: Sequence[Any]) -> list[Any]:
        """The samples of a micro-batch, among them a `Failure` if reading is to end."""

    @abstractmethod
    def collate(self, samples: list[Any]) -> Any:
        """The samples of a micro-batch as one."""

    @abstractmethod
    def name(self, item: Any) -> str:
        """What an item is called in messages."""

    def collate_or_fail(self, samples: list[Any]) -> Any:
        """As `collate`, or the failure among the samples."""
        failure = next((sample for sample in samples if isinstance(sample, Failure)), None)
        return failure if failure is not None else self.collate(samples)


def read_plan(data: DataConfig, dataset: PlannedDataset, plan: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """The micro-batches of a plan's lists of items, in order, by ``data.workers`` processes.

    Args:
        plan: ends where it raises `IndexError`; it may grow while it is read, and is not asked for its length.
    Raises:
        UserError, Requeue: what a worker met.
    """
    done = 0
    while True:
        try:
            for batch in _from(data, dataset, plan, done):
                yield batch
                done += 1
            return
        except WorkerDied as error:
            death = str(error)  # the error itself would keep the other workers alive
        log.warning("%s at micro-batch %d; going on there with new workers", death, done)
        # those that were under way are read one at a time: should one kill again, it is known which
        for number in range(done, done + data.workers * data.prefetch):
            try:
                items = plan[number]
            except IndexError:
                return
            yield _alone(data, dataset, items)
            done += 1


def read_all(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader. Raises what a worker met, or `WorkerDied`."""
    with _signals_stay_here():
        batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if loader.num_workers and _tells_of_death(error):
                raise WorkerDied((str(error) or type(error).__name__).splitlines()[0]) from None
            if isinstance(error, OSError):  # of a worker, then its last line says what it was
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
                raise Requeue(f"reading samples failed: {reason}") from error
            raise
        if isinstance(batch, Failure):
            raise batch.error
        yield batch


def data_loader(data: DataConfig, dataset: Dataset[Any], **how: Any) -> DataLoader[Any]:
    """A loader over a data set with the workers that a config asks for."""
    if data.workers:
        # forkserver: a fork of the training process would copy its threads' locks and its accelerator context
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imports torch once, not once a worker
        how |= {"multiprocessing_context": context, "prefetch_factor": data.prefetch}
    # a generator of its own, or each iteration would draw from the global one
    how |= {"generator": torch.Generator(), "pin_memory": torch.cuda.is_available()}
    return DataLoader(dataset, num_workers=data.workers, **how)


@contextlib.contextmanager
def _signals_stay_here() -> Iterator[None]:
    """Processes started inside never see the signals that the training process acts on.

    SLURM sends its warnings to every process of a step, and Ctrl-C goes to all of them; a worker that dies of one takes
    the run with it. A blocked signal stays blocked in children, and here it is delivered as soon as the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _from(data: DataConfig, dataset: PlannedDataset, plan: Sequence[Any], first: int) -> Iterator[Any]:
    return read_all(data_loader(data, dataset, batch_sampler=_Rest(plan, first), collate_fn=dataset.collate_or_fail))


def _alone(data: DataConfig, dataset: PlannedDataset, items: Sequence[Any]) -> Any:
    """A micro-batch read by a worker of its own; items that kill even that one are bad from then on."""
    one = data.model_copy(update={"workers": 1, "prefetch": 1})
    try:
        return next(_from(one, dataset, [items], 0))
    except WorkerDied:
        pass
    for item in items:
        try:
            next(_from(one, dataset, [[item]], 0))
        except WorkerDied:
            dataset.killers |= {item}
    try:
        return next(_from(one, dataset, [items], 0))
    except WorkerDied as death:
        raise Requeue(
            f"three loader processes died of the micro-batch with {', '.join(map(dataset.name, items))} ({death}): its "
            f"samples may not fit in memory together, or one that stood in for another killed too; if it happens "
            f"again, set fewer data.workers or a smaller batch.micro"
        ) from None


class _Rest:
    """A plan from a micro-batch on."""

    def __init__(self, plan: Sequence[Any], first: int) -> None:
        self._plan, self._first = plan, first

    def __iter__(self) -> Iterator[Any]:
        for number in itertools.count(self._first):
            try:
                items = self._plan[number]
            except IndexError:
                return
            yield items


def _tells_of_death(error: Exception) -> bool:
    """Whether what waiting for a batch raised means that a worker is dead; torch has no class for it."""
    if str(error).startswith("Caught "):  # a living worker's own
        return False
    if isinstance(error, RuntimeError):
        return str(error).startswith(_TOLD_OF_DEATH)
    # one that dies while its batch is handed over breaks the connection, or leaves files that cannot be opened
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return error.errno in (None, errno.ENOENT, errno.EBADF)
    return True
