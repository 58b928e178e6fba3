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

import torch

from lvdm.config import ClipConfig, DataConfig, VideoSource
from lvdm.data import latents, transforms
from lvdm.data.batch import LatentBatch, Replacement, VideoBatch
from lvdm.data.fetch import Fetcher
from lvdm.data.index import SampleRecord
from lvdm.data.latent_sets import EncodedSet, open_latent_sets, shapes_of, sizes_to_read
from lvdm.data.latents import LatentSetInfo
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

_LATENT, _TEXT = ".latent.safetensors", ".text.safetensors"


class _OrderedDataset(PlannedDataset, Generic[S]):
    """The sample of each (bucket, entry) of the order, or its substitute."""

    def __init__(self, sources: Sequence[Source], fetcher: Fetcher, *, seed: int, text_dropout: float) -> None:
        self.sources, self.fetcher, self.seed, self.text_dropout = sources, fetcher, seed, text_dropout

    def __getitems__(self, items: Sequence[tuple[int, Entry]]) -> list[S | Failure]:
        """The samples of a micro-batch, whose bytes are fetched together."""
        try:
            records = [self.wanted(entry.source, bucket, entry.place, entry.position) for bucket, entry in items]
            refusals = [self.refusal(item, found) for item, found in zip(items, records, strict=True)]
            members = self._fetch([found for found, refusal in zip(records, refusals, strict=True) if not refusal])
            return [
                self._sample(bucket, entry, found, refusal, {} if refusal else next(members))
                for (bucket, entry), found, refusal in zip(items, records, refusals, strict=True)
            ]
        except (UserError, Requeue) as error:
            return [Failure(error)]

    def wanted(self, source: int, bucket: int, place: int, position: int) -> list[SampleRecord]:
        """What is read of a source's sample for ``position``: all of it, unless a set says better."""
        return self.sources[source].records(bucket, place)

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
        places = len(self.sources[entry.source].selection.rows[bucket])
        replaced: tuple[Replacement, ...] = ()
        for attempt in range(SUBSTITUTES + 1):
            if attempt:  # substitutes come from orders of their own, so that neighbours do not share one
                place = sample_at(entry.position, places, self.seed + attempt, shuffle=True)
                records = self.wanted(entry.source, bucket, place, entry.position)
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
    """Pre-encoded clips, of one size a bucket: of each sample one clip and one caption, which its position draws."""

    def __init__(
        self,
        sources: Sequence[Source],
        sets: Sequence[EncodedSet],
        sizes: Sequence[ClipConfig],
        captions: Mapping[str, float] | None,
        fetcher: Fetcher,
        *,
        seed: int,
        text_dropout: float,
    ) -> None:
        """
        Args:
            captions: weights of the places of captions, as in ``data.video.captions``; None: those of the encoding.
        """
        super().__init__(sources, fetcher, seed=seed, text_dropout=text_dropout)
        self.sets, self.captions = sets, captions
        self.infos = [sets[0].info.model_copy(update={"shapes": (shape,)}) for shape in shapes_of(sets, sizes)]
        # without text, what `lvdm.models.frozen.NoText` gives
        self.unconditional_LD = (
            torch.zeros(1, 1) if sets[0].text is None else latents.read_unconditional(sets[0].text_folder)
        )

    def wanted(self, source: int, bucket: int, place: int, position: int) -> list[SampleRecord]:
        """The members of a clip and of a caption; of the caption none, where its text is dropped or there is none."""
        one = self.sets[source]
        records = self.sources[source].records(bucket, place)
        video = records[one.latents]
        clips = sum(name.endswith(_LATENT) for name in video.members)
        clip = latents.latent_member(int(transforms.clip_draws(self.seed, position).start * clips))
        if clip not in video.members:
            return [video]
        chosen = [video.part(clip)]
        if one.text is not None and not transforms.drops_text(self.seed, position, self.text_dropout):
            caption = self._caption(one.info, records[one.text], position)
            chosen += [records[one.text].part(caption)] if caption else []
        return chosen

    def _caption(self, info: LatentSetInfo, record: SampleRecord, position: int) -> str:
        """The extension of the states that a position draws among those a sample has; empty if it has none."""
        places = info.places or [""]
        weights = (self.captions if self.captions is not None else info.captions) or {"": 1.0}
        numbers = [places.index(name) for name, weight in weights.items() if weight > 0 and name in places]
        # in the order of the weights, as captions of videos are drawn
        counts = [sum(name.startswith(f"{number}-") for name in record.members) for number in numbers]
        drawn = transforms.draw_caption(counts, [weights[places[number]] for number in numbers], self.seed, position)
        name = latents.text_member(numbers[drawn[0]], drawn[1]) if drawn else ""
        return name if name in record.members else ""

    def load(
        self, members: dict[str, bytes], bucket: int, position: int, replaced: tuple[Replacement, ...]
    ) -> LatentSample:
        """Unpack one sample. Raises `BadSample`."""
        clip, text = (next((name for name in members if name.endswith(kind)), "") for kind in (_LATENT, _TEXT))
        if not clip:
            raise BadSample(f"no {_LATENT} member")
        moments_CTHW = latents.unpack_latent(members[clip], self.infos[bucket])
        states_LD = latents.unpack_text(members[text], self.infos[bucket]) if text else self.unconditional_LD
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
    encoded: list[EncodedSet] = []
    if data.kind == "latents":
        assert data.latents is not None
        encoded = open_latent_sets(data.latents.shards)
        sizes = sizes_to_read(encoded, data.video.clip if data.video else None)
    else:
        assert data.video is not None
        sizes = data.video.clip.sizes
    course = open_course(
        data, sizes, seed=seed, batch=batch, step=first_step, state=state, check=rank == 0, encoded=encoded
    )
    dataset = _dataset(data, course.sources, encoded, sizes, seed=seed, text_dropout=data.text_dropout)
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
    encoded: list[EncodedSet] = []
    if data.kind == "latents":
        encoded = open_latent_sets(shards)
        sizes = sizes_to_read(encoded, data.video.clip.sizes[0] if data.video else None)
    else:
        assert data.video is not None
        sizes = [data.video.clip.sizes[0].model_copy(update={"start": "center", "flip": 0.0})]
    sources = open_sources(shards, sizes, check=rank == 0, encoded=encoded)
    available = min(samples, len(sources[0].selection))
    at_once = micro * world
    if available < at_once:
        raise UserError(
            f"validation has {available} samples, fewer than batch.micro x ranks = {at_once}; "
            f"raise validation.samples or add shards"
        )
    dataset = _dataset(data, sources, encoded, sizes, seed=seed, text_dropout=0.0)
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
    data: DataConfig,
    sources: Sequence[Source],
    encoded: Sequence[EncodedSet],
    sizes: Sequence[ClipConfig],
    *,
    seed: int,
    text_dropout: float,
) -> VideoDataset | LatentDataset:
    fetcher = Fetcher(int(data.cache_gb * 1e9))
    if data.kind == "latents":
        captions = data.video.captions if data.video else None
        return LatentDataset(sources, encoded, sizes, captions, fetcher, seed=seed, text_dropout=text_dropout)
    assert data.video is not None
    return VideoDataset(sources, data.video, sizes, fetcher, seed=seed, text_dropout=text_dropout)
