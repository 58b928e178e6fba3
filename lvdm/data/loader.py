"""Batches by position: the data set yields the sample at a position of the run, the loader the positions of a rank.

    step -> Order.step -> [(bucket, entry) of a micro-batch]
         -> worker: source -> index -> fetch -> decode -> transforms -> batch

Any position can be produced again by anyone, so ranks, workers and resuming change nothing about the sequence. A sample
whose bytes are bad is replaced by one that (seed, position) determines, and the batch says so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from lvdm.config import ClipConfig, DataConfig, VideoSource
from lvdm.data import latents, transforms
from lvdm.data.batch import LatentBatch, Replacement, VideoBatch
from lvdm.data.fetch import Fetcher
from lvdm.data.index import SampleRecord
from lvdm.data.order import Entry, Order, sample_at, share
from lvdm.data.samples import Failure, LatentSample, VideoSample, collate, load_clip, merge, too_large
from lvdm.data.sources import Course, Source, open_course, open_sources
from lvdm.data.stream import StreamBatch, StreamCourse, StreamDataset, open_stream
from lvdm.data.workers import KILLED, PlannedDataset, WorkerDied, data_loader, read_all, read_plan
from lvdm.errors import BadSample, Requeue, UserError

Batch = VideoBatch | LatentBatch
S = TypeVar("S", VideoSample, LatentSample)

SUBSTITUTES = 16
"""Samples tried in place of a bad one before the set is given up."""


class _OrderedDataset(PlannedDataset, Generic[S]):
    """The sample of each (bucket, entry) of the order, or its substitute."""

    def __init__(self, sources: Sequence[Source], fetcher: Fetcher, *, seed: int, text_dropout: float) -> None:
        self.sources, self.fetcher, self.seed, self.text_dropout = sources, fetcher, seed, text_dropout

    def __getitems__(self, items: Sequence[tuple[int, Entry]]) -> list[S | Failure]:
        """The samples of a micro-batch, whose bytes are fetched together."""
        try:
            records = [
                self.wanted(self.sources[entry.source].records(bucket, entry.place), entry.position)
                for bucket, entry in items
            ]
            refusals = [self.refusal(item, found) for item, found in zip(items, records, strict=True)]
            members = self._fetch([found for found, refusal in zip(records, refusals, strict=True) if not refusal])
            return [
                self._sample(bucket, entry, found, refusal, {} if refusal else next(members))
                for (bucket, entry), found, refusal in zip(items, records, refusals, strict=True)
            ]
        except (UserError, Requeue) as error:
            return [Failure(error)]

    def wanted(self, records: list[SampleRecord], position: int) -> list[SampleRecord]:
        """What is read of a sample for ``position``: all of it, unless a set says better."""
        return records

    @abstractmethod
    def load(self, members: dict[str, bytes], bucket: int, position: int, replaced: tuple[Replacement, ...]) -> S:
        """The sample that ``position`` makes of its members. Raises `BadSample`."""

    def refusal(self, item: tuple[int, Entry], records: list[SampleRecord]) -> str:
        """Why a sample is bad before any of its bytes are fetched; empty if nothing is known against it."""
        return KILLED if item in self.killers else too_large(records)

    def collate(self, samples: list[Any]) -> Batch:
        """The samples of a micro-batch as one."""
        return collate(samples)

    def name(self, item: tuple[int, Entry]) -> str:
        """What an item is called in messages."""
        return f"position {item[1].position}"

    def _fetch(self, samples: Sequence[list[SampleRecord]]) -> Iterator[dict[str, bytes]]:
        fetched = iter(self.fetcher.samples([record for one in samples for record in one]))
        return iter([merge([next(fetched) for _ in one]) for one in samples])

    def _sample(
        self, bucket: int, entry: Entry, records: list[SampleRecord], refusal: str, members: dict[str, bytes]
    ) -> S:
        """The sample of an entry, of ``members`` if there is no ``refusal``; else, or if they are bad, a substitute."""
        source = self.sources[entry.source]
        places = len(source.selection.rows[bucket])
        replaced: tuple[Replacement, ...] = ()
        for attempt in range(SUBSTITUTES + 1):
            if attempt:  # substitutes come from orders of their own, so that neighbours do not share one
                place = sample_at(entry.position, places, self.seed + attempt, shuffle=True)
                records = self.wanted(source.records(bucket, place), entry.position)
                refusal = too_large(records)
                members = {} if refusal else next(self._fetch([records]))
            try:
                if refusal:
                    raise BadSample(refusal)
                return self.load(members, bucket, entry.position, replaced)
            except BadSample as error:
                replaced += (Replacement(entry.position, records[0].shard, records[0].key, str(error)),)
        last = replaced[-1]
        raise UserError(
            f"position {entry.position}: the sample and {SUBSTITUTES} substitutes for it are bad; "
            f"the last is {last.key} in {last.shard}: {last.reason}"
        )


class VideoDataset(_OrderedDataset[VideoSample]):
    """Decoded clips, of one size a bucket."""

    def __init__(
        self,
        sources: Sequence[Source],
        video: VideoSource,
        sizes: Sequence[ClipConfig],
        fetcher: Fetcher,
        *,
        seed: int,
        text_dropout: float,
    ) -> None:
        super().__init__(sources, fetcher, seed=seed, text_dropout=text_dropout)
        self.video, self.sizes = video, sizes

    def load(
        self, members: dict[str, bytes], bucket: int, position: int, replaced: tuple[Replacement, ...]
    ) -> VideoSample:
        """Decode one sample. Raises `BadSample`."""
        return load_clip(
            members,
            self.sizes[bucket],
            position,
            seed=self.seed,
            text_dropout=self.text_dropout,
            captions=self.video.captions,
            decoder=self.video.decoder,
            replaced=replaced,
        )


class LatentDataset(_OrderedDataset[LatentSample]):
    """Pre-encoded clips."""

    def __init__(
        self, sources: Sequence[Source], folders: Sequence[str], fetcher: Fetcher, *, seed: int, text_dropout: float
    ) -> None:
        super().__init__(sources, fetcher, seed=seed, text_dropout=text_dropout)
        self.info = latents.agreed_latent_set(folders)
        self.unconditional_LD = latents.read_unconditional(folders[0])

    def load(
        self, members: dict[str, bytes], bucket: int, position: int, replaced: tuple[Replacement, ...]
    ) -> LatentSample:
        """Decode one sample. Raises `BadSample`."""
        moments_CTHW, states_LD = latents.decode_latent(members, self.info)
        if transforms.drops_text(self.seed, position, self.text_dropout):
            states_LD = self.unconditional_LD
        return LatentSample(position, moments_CTHW, states_LD, replaced)


class Loader:
    """The micro-batches of one rank, in order. Each iteration starts afresh."""

    def __init__(
        self,
        data: DataConfig,
        dataset: _OrderedDataset[Any] | StreamDataset,
        plan: Sequence[Any],
        samples: int,
        course: Course | None = None,
        stream: StreamCourse | None = None,
    ) -> None:
        self._data, self._dataset, self._plan, self._stream = data, dataset, plan, stream
        self._finished: list[tuple[int, int]] = []
        self.samples = samples
        """Samples of the set it reads (for validation, those that it uses); 0 if nobody counted them."""
        self.course = course
        """The order it follows, for training from an index."""

    def __len__(self) -> int:
        return len(self._plan)

    @property
    def notes(self) -> list[str]:
        """What there is to say of the data."""
        if self.course is not None:
            return [*self.course.contents, *self.course.notes]
        return self._stream.notes if self._stream is not None else []

    def take_finished(self) -> list[tuple[int, int]]:
        """Shards of a stream that this rank finished since the last call, for `state`; JSON."""
        taken, self._finished = self._finished, []
        return taken

    def state(self, finished: Iterable[Iterable[Sequence[int]]]) -> dict[str, Any]:
        """What a later start needs to go on behind the batches given so far; JSON.

        Args:
            finished: `take_finished` of every rank.
        """
        if self._stream is None:
            return self.course.state if self.course else {}
        for shards in finished:
            self._stream.finish(shards)
        return self._stream.state

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self._dataset, StreamDataset):
            yield from self._streamed(self._dataset)
            return
        yield from read_plan(self._data, self._dataset, self._plan)

    def _streamed(self, dataset: StreamDataset) -> Iterator[Batch]:
        try:
            for part in read_all(data_loader(self._data, dataset, batch_size=None)):
                assert isinstance(part, StreamBatch)
                self._finished += part.finished
                yield part.batch
        except WorkerDied as death:
            raise Requeue(
                f"a loader process died ({death}); a stream cannot tell at which sample: if it happens again, index "
                f"the shards, and data.kind=video finds the sample and goes on without it"
            ) from None


def build_loader(
    data: DataConfig,
    *,
    seed: int,
    batch: int,
    micro: int,
    world: int,
    rank: int,
    first_step: int = 0,
    steps: int,
    state: Mapping[str, Any] | None = None,
) -> Loader:
    """The micro-batches of ``rank`` for ``steps`` steps from ``first_step`` on, ``batch / (micro * world)`` a step.

    Args:
        batch, micro: samples of a step and of a micro-batch, where a bucket does not say.
        state: `Loader.state` of the run so far.
    Raises:
        UserError: a folder, index or shard is missing or stale, a set is empty, latent folders disagree, or the batch
            arithmetic does not come out even.
    """
    if batch % (world * micro):
        raise UserError(
            f"batch.size {batch} is not divisible by {world} ranks x batch.micro {micro} = {world * micro}; change one"
        )
    if data.kind == "stream":
        assert data.video is not None
        stream = open_stream(data, seed=seed, batch=batch, step=first_step, state=state)
        positions = _StreamPositions(stream.position, batch, micro, world, rank, steps)
        streamed = StreamDataset(
            stream,
            data.video,
            positions,
            Fetcher(int(data.cache_gb * 1e9)),
            seed=seed,
            world=world,
            rank=rank,
            buffer_bytes=int(data.shuffle_mb * 1e6),
            text_dropout=data.text_dropout,
        )
        return Loader(data, streamed, positions, 0, stream=stream)
    sizes = data.video.clip.sizes if data.kind == "video" and data.video is not None else []
    course = open_course(data, sizes, seed=seed, batch=batch, step=first_step, state=state, check=rank == 0)
    dataset = _dataset(data, course.sources, sizes, seed=seed, text_dropout=data.text_dropout)
    accumulation = batch // (world * micro)
    plan = _Plan(course.order, course.state["batches"], accumulation, world, rank, first_step, steps)
    samples = sum(len(source.selection) for source in course.sources)
    return Loader(data, dataset, plan, samples, course)


def build_validation_loader(
    data: DataConfig, shards: Sequence[str], *, seed: int, samples: int, micro: int, world: int, rank: int
) -> Loader:
    """Whole micro-batches, as many on every rank, of the first ``samples`` of those of a set that clips can be cut of.

    No shuffling, no text dropout, clips of the first size, from the centre. Positions count from 0, and rank takes
    those with ``position % world == rank``; how many there are in all is ``samples`` of the result.

    Raises:
        UserError: as `build_loader`, or they are too few for a micro-batch on every rank.
    """
    sizes = []
    if data.kind != "latents":
        assert data.video is not None
        sizes = [data.video.clip.sizes[0].model_copy(update={"start": "center", "flip": 0.0})]
    sources = open_sources(shards, sizes, check=rank == 0)
    available = min(samples, len(sources[0].selection))
    at_once = micro * world
    if available < at_once:
        raise UserError(
            f"validation has {available} samples, fewer than batch.micro x ranks = {at_once}; "
            f"raise validation.samples or add shards"
        )
    dataset = _dataset(data, sources, sizes, seed=seed, text_dropout=0.0)
    used = available // at_once * at_once
    mine = [(0, Entry(position, 0, position)) for position in range(rank, used, world)]
    return Loader(data, dataset, [mine[i : i + micro] for i in range(0, len(mine), micro)], used)


class _Plan(Sequence[list[tuple[int, Entry]]]):
    """The entries of a rank's micro-batches with their bucket, computed when asked for."""

    def __init__(
        self, order: Order, batches: Sequence[int], accumulation: int, world: int, rank: int, first: int, steps: int
    ) -> None:
        for size in batches:
            if size % (world * accumulation):
                raise UserError(
                    f"a bucket of {size} samples is not divisible by {world} ranks x {accumulation} micro-batches = "
                    f"{world * accumulation}; change its size"
                )
        self._order, self._batches, self._accumulation = order, batches, accumulation
        self._world, self._rank, self._first, self._steps = world, rank, first, steps

    def __len__(self) -> int:
        return self._steps * self._accumulation

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        step, part = divmod(i, self._accumulation)
        size = self._batches[self._order.bucket_at(self._first + step)]
        mine = share(size, self._world, self._rank, self._accumulation, part, self._order.contiguous)
        taken = self._order.step(self._first + step, mine)
        return [(taken.bucket, entry) for entry in taken.entries]


class _StreamPositions(Sequence[list[int]]):
    """The positions of a rank's micro-batches of a stream."""

    def __init__(self, start: int, batch: int, micro: int, world: int, rank: int, steps: int) -> None:
        self._start, self._batch, self._micro, self._world, self._rank = start, batch, micro, world, rank
        self._steps = steps

    def __len__(self) -> int:
        return self._steps * self._batch // (self._micro * self._world)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start = self._start + i * self._micro * self._world + self._rank
        return list(range(start, start + self._micro * self._world, self._world))


def _dataset(
    data: DataConfig, sources: Sequence[Source], sizes: Sequence[ClipConfig], *, seed: int, text_dropout: float
) -> VideoDataset | LatentDataset:
    fetcher = Fetcher(int(data.cache_gb * 1e9))
    if data.kind == "latents":
        folders = [folder for source in sources for folder in source.index.folders]
        return LatentDataset(sources, folders, fetcher, seed=seed, text_dropout=text_dropout)
    assert data.video is not None
    return VideoDataset(sources, data.video, sizes, fetcher, seed=seed, text_dropout=text_dropout)
