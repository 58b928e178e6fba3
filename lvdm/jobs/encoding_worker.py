"""One process of an encoding job: it encodes the shards that it can claim, until all of the job are done."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from lvdm.config import DataConfig
from lvdm.data.fetch import Fetcher
from lvdm.data.latents import LatentSetInfo, fault_of_moments, latent_member, pack_latent, pack_text, text_member
from lvdm.data.one_pass import OnePassDataset, SourceSample
from lvdm.data.workers import read_plan
from lvdm.data.writer import ShardSample, write_shard
from lvdm.errors import Requeue, UserError
from lvdm.jobs.encoders import CAPTIONS_AT_ONCE, Coming, Encoders
from lvdm.jobs.encoding_source import EncodingSource
from lvdm.jobs.latent_stats import ChannelSums
from lvdm.jobs.leases import Leases
from lvdm.jobs.progress import Report
from lvdm.jobs.shard_board import Board, Manifest
from lvdm.jobs.shard_output import ClipPlace, EncodedSample, ShardOutput
from lvdm.jobs.shard_queue import ShardQueue

log = logging.getLogger(__name__)

LATENT_FIELDS = ("clips", "clip_frames", "clip_height", "clip_width", "encoded")
"""Fields of a sample's ``.json`` that encoding adds."""
_CLIPS_OF_BATCH, _BYTES_OF_BATCH = 16, 64 << 20  # that a loader process hands over at once
_FAILED_IN_A_ROW = 5  # shards after which the fault is not sought in them
_SHARDS_AT_ONCE = 2  # that are written while the next is encoded


class Worker:
    """Encodes shards of ``shards`` into ``target``; loader processes decode, a thread a shard writes."""

    def __init__(
        self,
        data: DataConfig,
        shards: EncodingSource,
        target: str,
        info: LatentSetInfo,
        encoders: Encoders,
        board: Board,
        leases: Leases,
        progress: Report,
    ) -> None:
        assert data.video is not None
        self._data, self._shards, self._target, self._info = data, shards, target, info
        self._encoders, self._board, self._leases, self._progress = encoders, board, leases, progress
        self._places = info.places or ["txt"]
        with_frames = info.vae is not None
        self._dataset = OnePassDataset(
            shards.source, data.video, Fetcher(), seed=info.seed, clips=info.clips, frames=with_frames
        )
        self._clips_at_once = max(1, info.frames_at_once // max(size.frames for size in info.clip.sizes))
        self._outputs: dict[str, ShardOutput] = {}
        """Shards that are being encoded or written."""
        self._encoded: Counter[str] = Counter()
        """Samples of those that are encoded."""
        self._failed_in_a_row: set[str] = set()
        """Shards that could not be read since the last that could."""
        self._next_report = 0.0

    def run(self) -> None:
        """Work until nothing is left.

        Raises:
            UserError: the target cannot be written, or one shard after the other cannot be read: that is no fault of
                theirs.
            Requeue: a store does not answer.
        """
        items = self._samples_at_once()
        with (
            ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool,
            ShardQueue(self._board, self._leases, lambda shard: self._shards.batches(shard, items)) as queue,
        ):
            try:
                self._encode_all(pool, queue)
            except BaseException as error:  # or the threads would wait for more
                self._stop(error)
                raise

    def _samples_at_once(self) -> int:
        """Samples of a micro-batch: enough for whole calls of the encoders, but for what would take much memory."""
        if self._info.vae is None:
            return CAPTIONS_AT_ONCE
        largest = max(3 * size.frames * size.height * size.width for size in self._info.clip.sizes)
        calls = max(1, min(_CLIPS_OF_BATCH, _BYTES_OF_BATCH // largest) // self._clips_at_once)
        return max(1, calls * self._clips_at_once // self._info.clips)

    def report(self) -> None:
        """Tell, at most once a second and a small part of the time, what all workers have done."""
        started = time.monotonic()
        if started > self._next_report:
            finished = sum(self._shards.count(name) for name in list(self._board.finished))
            self._progress(min(finished + self._encoded.total(), self._shards.samples), self._shards.samples)
            now = time.monotonic()
            self._next_report = now + max(1.0, 50 * (now - started))

    def _encode_all(self, pool: ThreadPoolExecutor, queue: ShardQueue) -> None:
        batches = read_plan(self._data, self._dataset, queue)
        while True:
            try:
                samples = next(batches, None)
            except (UserError, Requeue) as error:
                if queue.error is not None:
                    raise
                self._fail(queue, error)
                batches = read_plan(self._data, self._dataset, queue)
                continue
            self._collect(queue)
            self.report()
            if samples is None:
                return
            planned = queue.take()
            if planned is None:
                continue
            self._failed_in_a_row.clear()
            output = self._outputs.get(planned.shard)
            if output is None:
                output = ShardOutput(pool, functools.partial(self._write, planned.shard))
                self._outputs[planned.shard] = output
            try:
                for sample in self._encode(samples):
                    output.put(sample)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"{self._target} was begun with {self._info.frames_at_once} frames at once, which the memory of "
                    f"{self._encoders.device} does not hold; encode into another folder with fewer --frames-at-once"
                ) from None
            except (UserError, Requeue):  # of writing
                raise
            except Exception as error:  # a fault of ours must not stop every worker that meets this shard
                self._board.fail(planned.shard, f"{type(error).__name__}: {error}")
                raise
            self._encoded[planned.shard] += len(samples)
            if planned.last:
                output.end()

    def _collect(self, queue: ShardQueue) -> None:
        """Let go of the shards that are written. Raises what writing met."""
        for name, output in list(self._outputs.items()):
            if output.written.done():
                output.written.result()
                del self._outputs[name], self._encoded[name]
                queue.done(name)

    def _fail(self, queue: ShardQueue, error: UserError | Requeue) -> None:
        """Record that a shard could not be read, and go on with the next, unless it is the same with all of them."""
        name = queue.drop()
        log.warning("%s: %s", name, error)
        output = self._outputs.pop(name, None)
        if output is not None:
            output.abort(error)
        del self._encoded[name]
        self._failed_in_a_row.add(name)
        if len(self._failed_in_a_row) >= _FAILED_IN_A_ROW:
            raise error
        self._board.fail(name, str(error))
        queue.done(name)

    def _stop(self, error: BaseException) -> None:
        """Leave the shards under way."""
        for output in self._outputs.values():
            with contextlib.suppress(Exception):
                output.abort(RuntimeError(f"stopped by {type(error).__name__}"))

    def _encode(self, samples: Sequence[SourceSample]) -> Iterator[EncodedSample]:
        """Start encoding the samples of a micro-batch, and give them in their order."""
        good = [sample for sample in samples if not sample.fault]
        clips = [clip_THWC for one in good if one.clips_NTHWC is not None for clip_THWC in one.clips_NTHWC]
        moments = self._encode_clips(clips)
        states = self._encode_captions([text for one in good for place in one.captions for text in place])
        for sample in samples:
            count = 0 if sample.fault or sample.clips_NTHWC is None else len(sample.clips_NTHWC)
            own = [] if sample.fault else [(p, i) for p, texts in enumerate(sample.captions) for i in range(len(texts))]
            yield EncodedSample(
                replace(sample, clips_NTHWC=None),
                [next(moments) for _ in range(count)],
                [(place, number, next(states)) for place, number in own] if self._info.text is not None else [],
            )

    def _encode_clips(self, clips: Sequence[torch.Tensor]) -> Iterator[ClipPlace]:
        for first in range(0, len(clips), self._clips_at_once):
            call = self._encoders.moments(clips[first : first + self._clips_at_once])
            yield from (ClipPlace(call, number) for number in range(len(call.tensor)))

    def _encode_captions(self, captions: Sequence[str]) -> Iterator[Coming]:
        if self._info.text is None:
            return
        for first in range(0, len(captions), CAPTIONS_AT_ONCE):
            yield from self._encoders.states(captions[first : first + CAPTIONS_AT_ONCE])

    def _write(self, name: str, samples: Iterator[EncodedSample]) -> None:
        """Write a shard and finish it."""
        left_out: list[list[str]] = []
        sums: list[ChannelSums] = []
        packed = (self._packed(sample, left_out, sums) for sample in samples)
        try:
            stats = write_shard(self._target, name, packed, tell=True)
        except OSError as error:  # such as a network file system's
            raise Requeue(f"cannot write {self._target}/{name}.tar: {error.strerror or error}") from None
        manifest = Manifest(
            settings=self._board.settings,
            source=self._board.sources[name],
            samples=stats.successes,
            left_out=left_out,
            files=stats.files,
            sums=functools.reduce(ChannelSums.merge, sums).to_json() if sums else None,
        )
        self._board.finish(name, manifest)

    def _packed(self, encoded: EncodedSample, left_out: list[list[str]], sums: list[ChannelSums]) -> ShardSample:
        """The sample with its members; what is wrong with a bad one goes to ``left_out``."""
        sample = encoded.sample
        moments = [place.wait() for place in encoded.moments]
        states = [(place, number, coming.wait()) for place, number, coming in encoded.states]
        fault = sample.fault or next(filter(None, map(fault_of_moments, moments)), "")
        if not fault and not all(torch.isfinite(states_LD).all() for _, _, states_LD in states):
            fault = "the text states are not finite"
        if fault:
            left_out.append([sample.key, fault])
            return ShardSample(sample.key, {}, status="failed_to_subsample", error_message=fault)
        members = {}
        first = next((text for texts in sample.captions for text in texts), "")
        if first:
            members["txt"] = first.encode()
        for place, number, states_LD in states:
            members[text_member(place, number)] = pack_text(states_LD, self._info.dtype)
        for number, moments_CTHW in enumerate(moments):
            members[latent_member(number)] = pack_latent(moments_CTHW, self._info.dtype)
            sums.append(ChannelSums.of(moments_CTHW))
        return ShardSample(sample.key, members, self._fields(encoded))

    def _fields(self, encoded: EncodedSample) -> dict[str, Any]:
        """The fields of a sample's ``.json``: the source's, and what was made of it how."""
        sample, info = encoded.sample, self._info
        fields = {name: value for name, value in sample.meta.items() if name not in LATENT_FIELDS}
        about: dict[str, Any] = {"dtype": info.dtype, "lvdm": info.lvdm_version, **sample.about}
        if info.vae is not None:
            size = info.clip.sizes[sample.bucket]
            fields |= {"clips": len(encoded.moments)}
            fields |= {"clip_frames": size.frames, "clip_height": size.height, "clip_width": size.width}
            about["vae"] = info.vae.sha256
        if info.text is not None:
            about["text"] = info.text.sha256
            about["captions"] = [[self._places[place], number] for place, number, _ in encoded.states]
        return {**fields, "encoded": about}
