"""The streaming source: a webdataset pipeline over shards that have no index.

    a set's shards in an endless order -> share of this worker of this rank -> blocks by ranged reads -> untar
           -> shuffle buffer of bytes -> decode -> micro-batch

**Order.** Shard n of a set is a pure function of (seed, n): pass after pass over its shards, each a permutation. Slot s
of S (a worker of a rank, of all workers of all ranks) takes every S-th of those that are not finished. With weights,
the position of a sample in the run says which set it comes from, in blocks of exact quota as for indexed sets. The
stream never ends, so every rank makes the steps it is asked for, whatever its shards hold.

**Resume** is by whole shards. A shard is finished when training has taken the last of its samples, be it out of the
shuffle buffer. Finished ones are not read again before the next pass, on whatever ranks and workers the run goes on;
those under way start over, so that some of their samples are seen twice.

**Untarring** is that of the index and gives the same samples: webdataset's own takes a damaged header for the end of a
shard, in silence.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, cast

import braceexpand
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from lvdm.config import DataConfig, VideoSource, shard_sets
from lvdm.data.batch import LatentBatch, Replacement, VideoBatch
from lvdm.data.decode import MAX_BYTES
from lvdm.data.fetch import Fetcher, Span
from lvdm.data.order import Order, sample_at
from lvdm.data.samples import Failure, VideoSample, collate, load_clip
from lvdm.data.tar_scan import DamagedShard, scan_tar
from lvdm.errors import BadSample, Requeue, UserError
from lvdm.randomness import seed_from_text
from lvdm.storage import Missing, file_info, persistently

log = logging.getLogger(__name__)

BLOCK = 8 << 20
"""Bytes of a read."""
_GIVE_UP = 1000  # bad samples in a row


@dataclass
class StreamSet:
    """Shards that are read as one set in an endless order, and which of the order are finished."""

    name: str
    urls: list[str]
    seed: int
    shuffle: bool
    next: int = 0
    """All before this one are finished,"""
    beyond: set[int] = field(default_factory=set)
    """and so are these behind it."""

    def url(self, number: int) -> str:
        """Shard ``number`` of the order."""
        return self.urls[sample_at(number, len(self.urls), self.seed, self.shuffle)]

    def remaining(self) -> Iterator[int]:
        """Numbers that are not finished, without end."""
        return itertools.filterfalse(frozenset(self.beyond).__contains__, itertools.count(self.next))

    def finish(self, number: int) -> None:
        """Count a shard as finished."""
        self.beyond.add(number)
        while self.next in self.beyond:
            self.beyond.remove(self.next)
            self.next += 1

    @property
    def listing(self) -> int:
        """Changes if the order does."""
        return seed_from_text("\n".join([str(self.shuffle), *self.urls]))


@dataclass
class StreamCourse:
    """The sets of a streaming run and how far they are consumed."""

    sets: list[StreamSet]
    weights: list[float] | None
    step: int
    position: int
    """Position in the run of the first sample of ``step``."""
    batch: int
    notes: list[str]
    """What there is to say of it."""

    def finish(self, shards: Iterable[Sequence[int]]) -> None:
        """Count shards, given as set and number, as finished."""
        for source, number in shards:
            self.sets[source].finish(number)

    @property
    def state(self) -> dict[str, Any]:
        """What a later start needs to go on; JSON."""
        sets = [
            {"name": one.name, "listing": one.listing, "next": one.next, "finished": sorted(one.beyond)}
            for one in self.sets
        ]
        return {"step": self.step, "position": self.position, "batch": self.batch, "sets": sets}


def open_stream(
    data: DataConfig, *, seed: int, batch: int, step: int = 0, state: Mapping[str, Any] | None = None
) -> StreamCourse:
    """The sets of a data config, going on where ``state`` (`StreamCourse.state`) says.

    Raises:
        UserError: a folder is missing or holds no shard.
    """
    assert data.video is not None
    named = shard_sets(data.video.shards)
    weights = [one.weight for one in named if one.weight is not None]
    folders = [one.folders for one in named] if weights else [tuple(f for one in named for f in one.folders)]
    sets = [StreamSet(", ".join(these), list_shards(these), seed, data.shuffle) for these in folders]
    notes = [
        f"streaming {sum(len(one.urls) for one in sets)} shards without an index: resume is by whole shards, those "
        f"that training has taken to the end are not read again, those under way start over"
    ]
    position = step * batch
    if state:
        position = state["position"] + (step - state["step"]) * state["batch"]
        before = {one["name"]: one for one in state["sets"]}
        for one in sets:
            notes.append(_go_on(one, before.get(one.name)))
    return StreamCourse(sets, weights or None, step, position, batch, notes)


def _go_on(one: StreamSet, before: Mapping[str, Any] | None) -> str:
    """Let a set go on behind what it gave, if it is the same; what to say of it."""
    if before is None:
        return f"{one.name}: new in this run, from its beginning"
    if before["listing"] != one.listing:
        return f"{one.name}: its shards or data.shuffle changed, so it starts from its beginning"
    one.next, one.beyond = before["next"], set(before["finished"])
    done = one.next + len(one.beyond)
    passes = done / len(one.urls)
    return f"{one.name}: going on behind {done} finished shard{'s' * (done != 1)}, {passes:.2f} passes"


@dataclass(frozen=True)
class StreamBatch:
    """A micro-batch, and the shards, as set and number, that are finished once training has taken it."""

    batch: VideoBatch | LatentBatch
    finished: list[tuple[int, int]]

    def pin_memory(self) -> StreamBatch:
        """As for `VideoBatch`."""
        return replace(self, batch=self.batch.pin_memory())


class StreamDataset(IterableDataset[StreamBatch | Failure]):
    """The micro-batches of one rank: one for each list of positions, shared out to the workers in turn."""

    def __init__(
        self,
        course: StreamCourse,
        video: VideoSource,
        positions: Sequence[Sequence[int]],
        fetcher: Fetcher,
        *,
        seed: int,
        world: int,
        rank: int,
        buffer_bytes: int,
        text_dropout: float,
    ) -> None:
        self.video, self.positions, self.fetcher, self.seed = video, positions, fetcher, seed
        self.world, self.rank, self.text_dropout = world, rank, text_dropout
        # copies, as the course counts on while workers deal out what was left at its beginning
        self.sets = [replace(one, beyond=set(one.beyond)) for one in course.sets]
        self.start = course.position
        self.mix = Order([[1] for _ in self.sets], [1], seed=seed, weights=course.weights)
        whole = sum(course.weights or [1.0])
        self.buffers = [int(buffer_bytes * weight / whole) for weight in course.weights or [1.0]]

    def __iter__(self) -> Iterator[StreamBatch | Failure]:
        try:
            yield from self._batches()
        except (UserError, Requeue) as error:
            yield Failure(error)

    def _batches(self) -> Iterator[StreamBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        slot, slots = self.rank * workers + worker, self.world * workers
        feeds = [
            Feed(one, slot, slots, self.fetcher, buffer, random.Random(f"{self.seed}/{self.start}/{slot}/{number}"))
            for number, (one, buffer) in enumerate(zip(self.sets, self.buffers, strict=True))
        ]
        for positions in itertools.islice(self.positions, worker, None, workers):
            batch = collate([self._next_clip(feeds, position) for position in positions])
            finished = [(source, number) for source, feed in enumerate(feeds) for number in feed.take_finished()]
            yield StreamBatch(batch, finished)

    def _next_clip(self, feeds: Sequence[Feed], position: int) -> VideoSample:
        feed = feeds[self.mix.step(position).entries[0].source]
        replaced: list[Replacement] = []
        for sample in itertools.islice(feed, _GIVE_UP):
            replaced += feed.take_faults(position)
            try:
                return load_clip(
                    sample.members,
                    self.video.clip,
                    position,
                    seed=self.seed,
                    text_dropout=self.text_dropout,
                    captions=self.video.captions,
                    decoder=self.video.decoder,
                    replaced=tuple(replaced),
                )
            except BadSample as error:
                replaced.append(Replacement(position, sample.url, sample.key, str(error)))
        last = replaced[-1]
        raise UserError(
            f"{len(replaced)} samples in a row are bad; the last is {last.key} in {last.shard}: {last.reason}"
        )


@dataclass(frozen=True)
class StreamSample:
    """A sample, still encoded."""

    shard: int
    """Number of its shard in the order of the set."""
    url: str
    key: str
    members: dict[str, bytes]
    last: bool
    """Whether its shard holds no more."""

    @property
    def size(self) -> int:
        """Bytes of its members."""
        return sum(map(len, self.members.values()))


class Feed(Iterator[StreamSample]):
    """What one slot takes of a set, sample by sample without end.

    Raises:
        UserError: a shard is missing, or there are no samples.
        Requeue: a shard could not be read.
    """

    def __init__(
        self, shards: StreamSet, slot: int, slots: int, fetcher: Fetcher, buffer_bytes: int, rng: random.Random
    ) -> None:
        """
        Args:
            buffer_bytes: the shuffle buffer holds no more, but for the sample that is on its way through; 0 keeps the
                order of the shards.
        """
        self._shards, self._fetcher, self._rng = shards, fetcher, rng
        self._slot, self._slots = slot, slots
        self._buffer_bytes = buffer_bytes if shards.shuffle else 0
        self._finished: list[int] = []
        self._faults: deque[tuple[str, str, str]] = deque()
        self._said: set[str] = set()
        self._samples = iter(wds.DataPipeline(self._own, self._untar, self._shuffle))

    def __next__(self) -> StreamSample:
        return next(self._samples)

    def take_finished(self) -> list[int]:
        """Shards of the order that gave their last sample since the last call."""
        taken, self._finished = self._finished, []
        return taken

    def take_faults(self, position: int) -> Iterator[Replacement]:
        """What could not be read since the last call, as replaced at ``position``."""
        while self._faults:
            yield Replacement(position, *self._faults.popleft())

    def _own(self) -> Iterator[int]:
        return itertools.islice(self._shards.remaining(), self._slot, None, self._slots)

    def _untar(self, numbers: Iterable[int]) -> Iterator[StreamSample]:
        empty = 0
        for number in numbers:
            url = self._shards.url(number)
            empty += 1
            # one sample ahead, so that the last one of a shard says so
            for sample, following in itertools.pairwise(itertools.chain(self._members(url), [None])):
                assert sample is not None
                empty = 0
                yield StreamSample(number, url, *sample, last=following is None)
            if empty:
                self._finished.append(number)
            if empty > len(self._shards.urls):
                why = f": {self._faults[-1][2]}" if self._faults else ""
                raise UserError(f"no samples in {empty} shards in a row, the last is {url}{why}")

    def _members(self, url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Key and members of the samples of a shard."""
        window = _Window(url, self._fetcher)
        left_out: Counter[str] = Counter()
        try:
            for found in scan_tar(cast(BinaryIO, window), url, window.length, left_out):
                if found.offset < window.start:
                    self._faults.append((url, found.key, f"more than {MAX_BYTES} bytes"))
                    continue
                if found.failed:
                    left_out["recorded as failed"] += 1
                    window.let_go(found.offset + found.size)
                    continue
                members = {name: window.read_at(offset, size) for name, (offset, size) in found.members.items()}
                window.let_go(found.offset + found.size)
                yield found.key, members
        except DamagedShard as error:
            self._faults.append((url, "", str(error)))
        for reason in left_out.keys() - self._said - {"folder"}:
            log.warning("%s: left out: %d x %s (said of the first such shard alone)", url, left_out[reason], reason)
            self._said.add(reason)

    def _shuffle(self, samples: Iterable[StreamSample]) -> Iterator[StreamSample]:
        """Give samples in random order out of a buffer of bytes, which is emptied at the end of a pass."""
        held: list[StreamSample] = []
        held_bytes = 0
        under_way: Counter[int] = Counter()  # samples in the buffer by shard, and 1 if it is not read to its end

        def draw() -> StreamSample:
            nonlocal held_bytes
            place = self._rng.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            sample = held.pop()
            held_bytes -= sample.size
            under_way[sample.shard] -= 1
            if not under_way[sample.shard]:
                del under_way[sample.shard]
                self._finished.append(sample.shard)
            return sample

        turn = 0
        for sample in samples:
            if sample.shard // len(self._shards.urls) != turn:
                turn = sample.shard // len(self._shards.urls)
                while held:
                    yield draw()
            if sample.shard not in under_way:
                under_way[sample.shard] = 1
            under_way[sample.shard] += not sample.last
            held.append(sample)
            held_bytes += sample.size
            while held and (held_bytes > self._buffer_bytes or not self._buffer_bytes):
                yield draw()


class _Window:
    """A shard read forwards in blocks, each byte once; what was read stays until it is let go."""

    def __init__(self, url: str, fetcher: Fetcher) -> None:
        self._url, self._fetcher = url, fetcher
        self.length, self._tag = file_info(url)
        self.start = 0
        """First byte that is held."""
        self._held = bytearray()
        self._at = 0

    def seek(self, at: int) -> None:
        """Go to a byte."""
        self._at = at

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end of the shard."""
        if self._at - self.start > MAX_BYTES:  # what lies between is no sample that anyone could decode
            self._held.clear()
            self.start = self._at
        end = min(self._at + size, self.length)
        while (known := self.start + len(self._held)) < end:
            (block,) = self._fetcher.spans([Span(self._url, known, min(known + BLOCK, self.length), self._tag)])
            self._held += block
        data = bytes(memoryview(self._held)[self._at - self.start : end - self.start])
        self._at = end
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes that are held; where to go on reading stays as it is."""
        here, self._at = self._at, offset
        data = self.read(size)
        self._at = here
        return data

    def let_go(self, before: int) -> None:
        """Forget what lies before a byte."""
        del self._held[: before - self.start]
        self.start = before


def list_shards(folders: Sequence[str]) -> list[str]:
    """URLs of the shards in ``folders``; an entry that ends in ``.tar`` is a shard itself, ``{000..999}`` is expanded.

    Raises:
        UserError: a folder is missing or holds no shard.
        Requeue: its store does not answer.
    """
    urls: list[str] = []
    for folder in folders:
        if folder.endswith(".tar"):
            urls += braceexpand.braceexpand(folder)
            continue
        try:
            paths = persistently(folder, lambda fs, root: list(fs.ls(root, detail=False)))
        except Missing:
            raise UserError(f"no such folder of shards: {folder}") from None
        names = sorted(path.rsplit("/", 1)[-1] for path in paths if path.endswith(".tar"))
        if not names:
            raise UserError(f"{folder} holds no shards (*.tar)")
        urls += [f"{folder.rstrip('/')}/{name}" for name in names]
    return urls
