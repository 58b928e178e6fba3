"""From a sample's members to its tensors, and from samples to a batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lvdm.config import ClipConfig
from lvdm.data import decode, transforms
from lvdm.data.batch import LatentBatch, Replacement, VideoBatch
from lvdm.data.index import SampleRecord
from lvdm.errors import Requeue, UserError


@dataclass(frozen=True)
class VideoSample:
    """A decoded clip and its caption."""

    position: int
    frames_THWC: np.ndarray
    """uint8 RGB."""
    caption: str
    """Empty where the text is dropped."""
    replaced: tuple[Replacement, ...] = ()


@dataclass(frozen=True)
class LatentSample:
    """A pre-encoded clip and its text states, both fp32."""

    position: int
    moments_CTHW: Tensor
    states_LD: Tensor
    replaced: tuple[Replacement, ...] = ()


@dataclass(frozen=True)
class Failure:
    """An error on its way from a worker to the training process, where it is raised as it was, without a traceback."""

    error: UserError | Requeue


def load_clip(
    members: Mapping[str, bytes],
    clip: ClipConfig,
    position: int,
    *,
    seed: int,
    text_dropout: float,
    captions: Mapping[str, float] = MappingProxyType({}),
    decoder: decode.Decoder = "pyav",
    replaced: tuple[Replacement, ...] = (),
) -> VideoSample:
    """The clip that ``position`` draws from a sample's members: of a video, of images that are its frames, or an image.

    Args:
        captions: as `lvdm.data.transforms.choose_caption` takes them.
    Raises:
        BadSample: none of these, too short, or damaged where it is needed.
        UserError: the decoder is not installed.
    """
    draws = transforms.clip_draws(seed, position)

    def indices(info: decode.VideoInfo) -> list[int]:
        if clip.fps is None or clip.frames == 1:
            return transforms.clip_indices(info.frames, clip, draws.start)
        times = info.times() or transforms.times_of_images(members, info.frames)
        return transforms.clip_indices_at(times, clip, draws.start)

    frames_THWC = decode.decode_frames(
        decode.footage(members),
        indices,
        clip.height,
        clip.width,
        clip.resize,
        place=(draws.down, draws.across),
        decoder=decoder,
    )
    if draws.flip < clip.flip:
        frames_THWC = transforms.mirror(frames_THWC)
    caption = ""
    if not transforms.drops_text(seed, position, text_dropout):
        caption = transforms.choose_caption(members, captions, seed, position)
    return VideoSample(position, frames_THWC, caption, replaced)


def collate(samples: Sequence[VideoSample] | Sequence[LatentSample]) -> VideoBatch | LatentBatch:
    """Samples of one kind as a batch; text is padded with zeros to the longest of the batch."""
    positions = [sample.position for sample in samples]
    replaced = tuple(entry for sample in samples for entry in sample.replaced)
    if isinstance(samples[0], VideoSample):
        videos = cast(Sequence[VideoSample], samples)
        frames_BTHWC = torch.from_numpy(np.stack([sample.frames_THWC for sample in videos]))
        return VideoBatch(
            positions=positions,
            frames_BCTHW=frames_BTHWC.permute(0, 4, 1, 2, 3).contiguous(),
            captions=[sample.caption for sample in videos],
            replaced=replaced,
        )
    encoded = cast(Sequence[LatentSample], samples)
    states = [sample.states_LD for sample in encoded]
    lengths_B = torch.tensor([len(s) for s in states])
    return LatentBatch(
        positions=positions,
        moments_BCTHW=torch.stack([sample.moments_CTHW for sample in encoded]),
        text_BLD=torch.nn.utils.rnn.pad_sequence(states, batch_first=True),
        text_mask_BL=torch.arange(int(lengths_B.max()))[None, :] < lengths_B[:, None],
        replaced=replaced,
    )


def too_large(records: Sequence[SampleRecord]) -> str:
    """Why a sample is too large to be read; empty if it is not."""
    size = sum(record.size for record in records)
    return f"{size} bytes exceed the limit of {decode.MAX_BYTES}" if size > decode.MAX_BYTES else ""


def merge(members: Sequence[dict[str, bytes]]) -> dict[str, bytes]:
    """The members of a sample and of those joined to it; a joined one wins over one of the same name, but for
    ``.json``, whose fields are put together."""
    merged = {name: data for one in members for name, data in one.items()}
    fields = [transforms.read_fields(one) for one in members if "json" in one]
    if len(fields) > 1:
        merged["json"] = json.dumps({name: value for one in fields for name, value in one.items()}).encode()
    return merged
