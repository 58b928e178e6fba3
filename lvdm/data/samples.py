"""From a sample's members to its tensors, and from samples to a batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    (decoded,) = cut_clips(members, clip, [transforms.clip_draws(seed, position)], decoder)
    caption = ""
    if not transforms.drops_text(seed, position, text_dropout):
        caption = transforms.choose_caption(members, captions, seed, position)
    return VideoSample(position, decoded.frames_THWC, caption, replaced)


def cut_clips(
    members: Mapping[str, bytes], clip: ClipConfig, draws: Sequence[transforms.Draws], decoder: decode.Decoder = "pyav"
) -> list[decode.Decoded]:
    """As many clips of a sample's members as there are draws, or as `lvdm.data.transforms.several_clips` finds; those
    that their draws say are mirrored. Raises as `load_clip` does."""

    def cuts(info: decode.VideoInfo) -> list[decode.Cut]:
        if clip.fps is None or clip.frames == 1:
            indices = partial(transforms.clip_indices, info.frames)
        else:
            times = info.times() or transforms.times_of_images(members, info.frames)
            indices = partial(transforms.clip_indices_at, times)
        found = transforms.several_clips(indices, clip, [draw.start for draw in draws])
        return [decode.Cut(numbers, (draw.down, draw.across)) for numbers, draw in zip(found, draws, strict=False)]

    footage = decode.footage(members)
    clips = decode.decode_clips(footage, cuts, clip.height, clip.width, clip.resize, decoder=decoder)
    return [
        replace(one, frames_THWC=transforms.mirror(one.frames_THWC)) if transforms.mirrors(draw, clip) else one
        for one, draw in zip(clips, draws, strict=False)
    ]


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
