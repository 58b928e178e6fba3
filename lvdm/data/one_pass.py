"""The samples of a set for a job that goes over it once: their clips, all their captions, and where these come from.

Nothing stands in for a bad sample, which says what is wrong with it. Draws are keyed by the names of shard and sample,
so that what is cut out of a shard does not depend on what else is in the set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lvdm.config import ClipConfig, VideoSource
from lvdm.data import transforms
from lvdm.data.decode import Decoded
from lvdm.data.fetch import Fetcher
from lvdm.data.index import SampleRecord
from lvdm.data.samples import Failure, cut_clips, merge, too_large
from lvdm.data.sources import Source
from lvdm.data.workers import KILLED, PlannedDataset
from lvdm.errors import BadSample, Requeue, UserError
from lvdm.randomness import seed_from_text

MOST_CLIP_BYTES = 1 << 30
"""Pixels of the clips of one video, which are held at once."""

_TEXT_MEMBERS = ("txt", "json")
_OF_A_SHARD = ("key", "status", "error_message")  # what video2dataset adds to the fields of each sample
Item = tuple[int, int]
"""Bucket, and row of the index."""


@dataclass(frozen=True)
class SourceSample:
    """What a worker read of one sample."""

    row: int
    """Row of the index."""
    bucket: int
    """Which of the sizes its clips have."""
    shard: str
    """File name of its shard."""
    key: str
    clips_NTHWC: torch.Tensor | None = None
    """uint8 RGB; None if frames were not asked for, or there is a fault."""
    captions: tuple[tuple[str, ...], ...] = ()
    """By place, as `lvdm.data.transforms.captions_by_place` gives them."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The fields of its ``.json`` and of those joined to it, without what is told of each sample of a shard."""
    about: dict[str, Any] = field(default_factory=dict)
    """Where the clips come from: ``source`` and ``clips``; JSON."""
    fault: str = ""
    """Why there is none of this; empty if nothing is wrong."""

    def pin_memory(self) -> SourceSample:
        """With its clips in memory that an accelerator reads by itself; PyTorch's loaders ask for this."""
        return self if self.clips_NTHWC is None else replace(self, clips_NTHWC=self.clips_NTHWC.pin_memory())


class OnePassDataset(PlannedDataset):
    """The samples of (bucket, row) in a plan's lists, as a list."""

    def __init__(
        self,
        source: Source,
        video: VideoSource,
        fetcher: Fetcher,
        *,
        seed: int,
        clips: int = 1,
        frames: bool = True,
    ) -> None:
        """
        Args:
            clips: of each video; with ``clip.start`` ``first`` or ``center`` fewer where it is too short for so many.
            frames: whether clips are decoded; if not, captions and fields alone are fetched.
        Raises:
            UserError: so many clips would take too much memory.
        """
        self.source, self.fetcher, self.seed, self.clips, self.frames = source, fetcher, seed, clips, frames
        self.sizes, self.decoder = video.clip.sizes, video.decoder
        self.places = [name for name, weight in video.captions.items() if weight > 0]
        for size in self.sizes if frames else ():
            needed = clips * size.frames * size.height * size.width * 3
            if needed > MOST_CLIP_BYTES:
                raise UserError(
                    f"{clips} clips of {size.frames}x{size.height}x{size.width} are {needed} bytes a video, more than "
                    f"the limit of {MOST_CLIP_BYTES}; encode fewer clips of each video or smaller ones"
                )

    def __getitems__(self, items: Sequence[Item]) -> list[SourceSample | Failure]:
        """The samples of a micro-batch, whose bytes are fetched together."""
        try:
            records = [self.source.at(row) for _, row in items]
            wanted = [self._wanted(found) for found in records]
            refusals = [KILLED if item in self.killers else too_large(w) for item, w in zip(items, wanted, strict=True)]
            fetched = iter(
                self.fetcher.samples(
                    [part for parts, refusal in zip(wanted, refusals, strict=True) if not refusal for part in parts]
                )
            )
            samples: list[SourceSample | Failure] = []
            for (bucket, row), found, parts, refusal in zip(items, records, wanted, refusals, strict=True):
                members = {} if refusal else merge([next(fetched) for _ in parts])
                shard = found[0].shard.rsplit("/", 1)[-1]
                sample = SourceSample(row, bucket, shard, found[0].key, fault=refusal)
                samples.append(sample if refusal else self._loaded(sample, members))
            return samples
        except (UserError, Requeue) as error:
            return [Failure(error)]

    def collate(self, samples: list[SourceSample]) -> list[SourceSample]:
        """The samples of a micro-batch, with all clips in one piece of memory: a file descriptor each would be many."""
        clips = [sample.clips_NTHWC for sample in samples if sample.clips_NTHWC is not None]
        if not clips:
            return samples
        whole = torch.cat([one.flatten() for one in clips])
        parts = iter(whole.split([one.numel() for one in clips]))
        return [
            one if one.clips_NTHWC is None else replace(one, clips_NTHWC=next(parts).view(one.clips_NTHWC.shape))
            for one in samples
        ]

    def name(self, item: Item) -> str:
        """What an item is called in messages."""
        record = self.source.index[item[1]]
        return f"sample {record.key} of {record.shard}"

    def _wanted(self, records: list[SampleRecord]) -> list[SampleRecord]:
        """What is fetched of a sample."""
        if self.frames:
            return records
        return [record.part(name) for record in records for name in _TEXT_MEMBERS if name in record.members]

    def _loaded(self, sample: SourceSample, members: dict[str, bytes]) -> SourceSample:
        fields = transforms.read_fields(members)
        source: dict[str, Any] = {"shard": sample.shard}
        about: dict[str, Any] = {"source": source, "clips": []}
        clips_NTHWC = None
        if self.frames:
            size = self.sizes[sample.bucket]
            names = [f"{sample.shard}/{sample.key}"]
            names += [f"{names[0]}/{number}" for number in range(1, self.clips)]
            draws = [transforms.clip_draws(self.seed, seed_from_text(name)) for name in names]
            try:
                decoded = cut_clips(members, size, draws, self.decoder)
            except BadSample as error:
                return replace(sample, fault=str(error))
            clips_NTHWC = torch.from_numpy(np.stack([one.frames_THWC for one in decoded]))
            info = decoded[0].info
            fps = info.fps or transforms.told_fps(fields)
            source |= {"width": info.width, "height": info.height, "frames": info.frames, "fps": fps or None}
            about["clips"] = [_about(one, draw, size, fps) for one, draw in zip(decoded, draws, strict=False)]
        return replace(
            sample,
            clips_NTHWC=clips_NTHWC,
            captions=transforms.captions_by_place(members, self.places),
            meta={name: value for name, value in fields.items() if name not in _OF_A_SHARD},
            about=about,
        )


def _about(clip: Decoded, draws: transforms.Draws, size: ClipConfig, fps: float) -> Mapping[str, Any]:
    """Where a clip comes from; ``fps`` is that of its video, 0 if unknown."""
    first, last = clip.cut.indices[0], clip.cut.indices[-1]
    seconds = clip.seconds or ((first / fps, last / fps) if fps else None)
    stride = size.stride if size.frames > 1 and size.fps is None else None  # a single frame has no pace
    pace = fps / stride if stride else (size.fps if size.frames > 1 else None)
    return {
        "frames": [first, last],
        "seconds": list(seconds) if seconds else None,
        "fps": pace or None,
        "stride": stride,
        "crop": list(clip.fit.seen),
        "scaled": [clip.fit.height, clip.fit.width],
        "flipped": transforms.mirrors(draws, size),
    }
