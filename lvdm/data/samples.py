"""From a sample's members to its tensors, and from samples to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lvdm.config import ClipConfig
from lvdm.data import decode, transforms
from lvdm.data.batch import LatentBatch, Replacement, VideoBatch
from lvdm.errors import BadSample, Requeue, UserError


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
    replaced: tuple[Replacement, ...] = (),
) -> VideoSample:
    """The clip that ``position`` draws from a sample's members. Raises `BadSample`."""
    extension = next((e for e in decode.VIDEO_EXTENSIONS if e in members), None)
    if extension is None:
        raise BadSample("no video member")
    start, flip = transforms.clip_draws(seed, position)
    frames_THWC = decode.decode_frames(
        members[extension],
        lambda info: transforms.clip_indices(info.frames, clip, start),
        clip.height,
        clip.width,
        clip.resize,
    )
    if flip < clip.flip:
        frames_THWC = transforms.mirror(frames_THWC)
    dropped = transforms.drops_text(seed, position, text_dropout)
    return VideoSample(position, frames_THWC, "" if dropped else transforms.read_caption(members), replaced)


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
