"""Batches by position: the data set yields the sample at a position of the run, the loader the positions of a rank.

    step -> order.step_positions -> [positions of a micro-batch]
         -> worker: order -> index -> fetch -> decode -> transforms -> batch

Any position can be produced again by anyone, so ranks, workers and resuming change nothing about the sequence. A sample
whose bytes are bad is replaced by one that (seed, position) determines, and the batch says so.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lvdm.config import ClipConfig, DataConfig
from lvdm.data import latents, transforms
from lvdm.data.batch import LatentBatch, Replacement, VideoBatch
from lvdm.data.fetch import read_sample
from lvdm.data.index import Index, SampleRecord, open_index
from lvdm.data.order import sample_at, step_positions
from lvdm.data.samples import Failure, LatentSample, VideoSample, collate, load_clip
from lvdm.data.stream import StreamDataset
from lvdm.errors import BadSample, Requeue, UserError

Batch = VideoBatch | LatentBatch
S = TypeVar("S", VideoSample, LatentSample)

SUBSTITUTES = 16
"""Samples tried in place of a bad one before the set is given up."""


class _PositionDataset(Dataset[S | Failure], Generic[S]):
    """The sample at each position of the run, or its substitute."""

    def __init__(self, index: Index, *, seed: int, shuffle: bool, text_dropout: float) -> None:
        self.index, self.seed, self.shuffle, self.text_dropout = index, seed, shuffle, text_dropout

    def __getitem__(self, position: int) -> S | Failure:
        try:
            return self._sample(position)
        except (UserError, Requeue) as error:
            return Failure(error)

    @abstractmethod
    def load(self, record: SampleRecord, position: int, replaced: tuple[Replacement, ...]) -> S:
        """Read one sample for ``position``. Raises `BadSample`."""

    def _sample(self, position: int) -> S:
        replaced: tuple[Replacement, ...] = ()
        for attempt in range(SUBSTITUTES + 1):
            # a substitute is drawn from an order of its own, so that neighbours do not share one
            shuffle = self.shuffle or attempt > 0
            record = self.index[sample_at(position, len(self.index), self.seed + attempt, shuffle)]
            try:
                return self.load(record, position, replaced)
            except BadSample as error:
                replaced += (Replacement(position, record.shard, record.key, str(error)),)
        last = replaced[-1]
        raise UserError(
            f"position {position}: the sample and {SUBSTITUTES} substitutes for it are bad; "
            f"the last is {last.key} in {last.shard}: {last.reason}"
        )


class VideoDataset(_PositionDataset[VideoSample]):
    """The decoded clip at each position of the run."""

    def __init__(self, index: Index, clip: ClipConfig, *, seed: int, shuffle: bool, text_dropout: float) -> None:
        super().__init__(index, seed=seed, shuffle=shuffle, text_dropout=text_dropout)
        self.clip = clip

    def load(self, record: SampleRecord, position: int, replaced: tuple[Replacement, ...]) -> VideoSample:
        """Read and decode one sample. Raises `BadSample`."""
        members = read_sample(record)
        return load_clip(
            members, self.clip, position, seed=self.seed, text_dropout=self.text_dropout, replaced=replaced
        )


class LatentDataset(_PositionDataset[LatentSample]):
    """The pre-encoded clip at each position of the run."""

    def __init__(self, index: Index, folders: Sequence[str], *, seed: int, shuffle: bool, text_dropout: float) -> None:
        super().__init__(index, seed=seed, shuffle=shuffle, text_dropout=text_dropout)
        self.info = latents.agreed_latent_set(folders)
        self.unconditional_LD = latents.read_unconditional(folders[0])

    def load(self, record: SampleRecord, position: int, replaced: tuple[Replacement, ...]) -> LatentSample:
        """Read one sample. Raises `BadSample`."""
        moments_CTHW, states_LD = latents.decode_latent(read_sample(record), self.info)
        if transforms.drops_text(self.seed, position, self.text_dropout):
            states_LD = self.unconditional_LD
        return LatentSample(position, moments_CTHW, states_LD, replaced)


class Loader:
    """The micro-batches of one rank, in order. Each iteration starts afresh."""

    def __init__(self, loader: DataLoader[Any], length: int, samples: int) -> None:
        self._loader, self._length = loader, length
        self.samples = samples
        """Samples of the set it reads (for validation, those that it uses); 0 if nobody counted them."""

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        with _signals_stay_here():
            batches = iter(self._loader)
        for batch in batches:
            if isinstance(batch, Failure):
                raise batch.error
            yield batch


def build_loader(
    data: DataConfig, *, seed: int, batch: int, micro: int, world: int, rank: int, first_position: int, steps: int
) -> Loader:
    """The micro-batches of ``rank`` for ``steps`` steps from ``first_position`` on, ``batch / (micro * world)`` a step.

    Raises:
        UserError: a folder, index or shard is missing or stale, the set is empty, latent folders disagree, or the batch
            arithmetic does not come out even.
    """
    positions = _StepPositions(batch, micro, world, rank, first_position, steps)
    if data.kind == "stream":
        assert data.video is not None
        stream = StreamDataset(
            data.video.shards,
            data.video.clip,
            positions,
            seed=seed,
            world=world,
            rank=rank,
            shuffle=data.shuffle,
            text_dropout=data.text_dropout,
        )
        return Loader(_data_loader(data, stream, batch_size=None), len(positions), 0)
    dataset = _dataset(data, _folders(data), seed=seed, shuffle=data.shuffle, text_dropout=data.text_dropout)
    return Loader(_by_position(data, dataset, positions), len(positions), len(dataset.index))


def build_validation_loader(
    data: DataConfig, shards: list[str], *, seed: int, samples: int, micro: int, world: int, rank: int
) -> Loader:
    """Micro-batches of the first ``samples`` of the index (fewer if it holds fewer: see ``samples`` of the result).

    No shuffling, no text dropout, clips from the centre. Positions count from 0, and rank takes those with
    ``position % world == rank``. So that all ranks yield the same number of batches, positions run on to a multiple of
    ``world`` and wrap around in the set: leave those ``>= loader.samples`` out of a mean.

    Raises:
        UserError: as `build_loader`.
    """
    if data.video is not None:
        clip = data.video.clip.model_copy(update={"start": "center", "flip": 0.0})
        data = data.model_copy(update={"video": data.video.model_copy(update={"clip": clip})})
    dataset = _dataset(data, shards, seed=seed, shuffle=False, text_dropout=0.0)
    used = min(samples, len(dataset.index))
    mine = list(range(rank, -(-used // world) * world, world))
    positions = [mine[i : i + micro] for i in range(0, len(mine), micro)]
    return Loader(_by_position(data, dataset, positions), len(positions), used)


def read_videos(data: DataConfig, index: Index, rows: Sequence[int], *, batch: int, seed: int) -> Iterator[VideoBatch]:
    """The clips of chosen ``rows`` of an index, in that order, with their captions; ``positions`` are the rows.

    For jobs that go over a set once. A row that is bad has one entry in ``replaced`` and frames that stand in for it.
    """
    assert data.video is not None
    dataset = VideoDataset(index, data.video.clip, seed=seed, shuffle=False, text_dropout=0.0)
    positions = [list(rows[i : i + batch]) for i in range(0, len(rows), batch)]
    for clips in Loader(_by_position(data, dataset, positions), len(positions), len(rows)):
        assert isinstance(clips, VideoBatch)
        first = {entry.position: entry for entry in reversed(clips.replaced)}  # not those of bad substitutes
        yield replace(clips, replaced=tuple(first.values()))


class _StepPositions(Sequence[list[int]]):
    """The lists of positions of a rank's micro-batches, computed when asked for."""

    def __init__(self, batch: int, micro: int, world: int, rank: int, first: int, steps: int) -> None:
        self._arguments = (batch, world, rank, micro)
        self._first, self._batch, self._steps = first, batch, steps
        self._per_step = len(step_positions(first, *self._arguments))

    def __len__(self) -> int:
        return self._steps * self._per_step

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        step, part = divmod(i, self._per_step)
        return step_positions(self._first + step * self._batch, *self._arguments)[part]


def _folders(data: DataConfig) -> list[str]:
    source = data.latents if data.kind == "latents" else data.video
    assert source is not None
    return source.shards


def _dataset(
    data: DataConfig, folders: list[str], *, seed: int, shuffle: bool, text_dropout: float
) -> VideoDataset | LatentDataset:
    index = open_index(folders)
    if data.kind == "latents":
        return LatentDataset(index, folders, seed=seed, shuffle=shuffle, text_dropout=text_dropout)
    assert data.video is not None
    return VideoDataset(index, data.video.clip, seed=seed, shuffle=shuffle, text_dropout=text_dropout)


def _by_position(
    data: DataConfig, dataset: VideoDataset | LatentDataset, positions: Sequence[Sequence[int]]
) -> DataLoader[Any]:
    return _data_loader(data, dataset, batch_sampler=positions, collate_fn=_collate)


def _data_loader(data: DataConfig, dataset: Dataset[Any], **how: Any) -> DataLoader[Any]:
    if data.workers:
        # forkserver: a fork of the training process would copy its threads' locks and its accelerator context
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imports torch once, not once a worker
        how |= {"multiprocessing_context": context, "prefetch_factor": data.prefetch}
    # a generator of its own, or each iteration would draw from the global one
    return DataLoader(dataset, num_workers=data.workers, generator=torch.Generator(), **how)


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


def _collate(samples: list[Any]) -> Batch | Failure:
    failure = next((sample for sample in samples if isinstance(sample, Failure)), None)
    return failure if failure is not None else collate(samples)
