"""Choices about a sample: which frames, mirrored or not, with its caption or without. Pure arithmetic on draws."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from lvdm.config import ClipConfig
from lvdm.errors import BadSample
from lvdm.randomness import Purpose, generator


def clip_indices(video_frames: int, clip: ClipConfig, draw: float) -> list[int]:
    """Frame numbers of a clip, ``clip.frames`` of them ``clip.stride`` apart.

    Args:
        video_frames: frames of the video.
        draw: uniform in [0, 1); places a clip with ``start: random``.

    Raises:
        BadSample: the video is shorter than the clip.
    """
    span = (clip.frames - 1) * clip.stride + 1
    slack = video_frames - span
    if slack < 0:
        raise BadSample(f"{video_frames} frames are too few: {clip.frames} frames {clip.stride} apart need {span}")
    match clip.start:
        case "first":
            start = 0
        case "center":
            start = slack // 2
        case "random":
            start = int(draw * (slack + 1))
    return list(range(start, start + span, clip.stride))


def clip_draws(seed: int, position: int) -> tuple[float, float]:
    """Uniform draws for a clip's start and for mirroring; both are always drawn, so neither moves the other."""
    start, flip = generator(seed, position, Purpose.CLIP).random(2)
    return float(start), float(flip)


def drops_text(seed: int, position: int, probability: float) -> bool:
    """Whether the sample at ``position`` trains without its text."""
    return bool(generator(seed, position, Purpose.CAPTION).random() < probability)


def mirror(frames_THWC: np.ndarray) -> np.ndarray:
    """The frames with left and right exchanged."""
    return frames_THWC[:, :, ::-1]


def read_caption(members: Mapping[str, bytes]) -> str:
    """The caption of a sample: its ``txt`` member (any bytes), else ``caption`` in its ``json``, else empty."""
    if "txt" in members:
        return members["txt"].decode("utf-8", errors="replace").strip()
    try:
        caption = json.loads(members.get("json", b"{}"))["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return caption.strip() if isinstance(caption, str) else ""
