"""Choices about a sample: which frames, what part, mirrored or not, which caption or none. Arithmetic on draws."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvdm.config import ClipConfig
from lvdm.errors import BadSample
from lvdm.randomness import Purpose, generator


@dataclass(frozen=True)
class Draws:
    """Uniform draws in [0, 1) about a clip; all are always made, so that none moves another."""

    start: float
    flip: float
    down: float
    across: float


def clip_draws(seed: int, position: int) -> Draws:
    """What chance decides about the clip at ``position``."""
    return Draws(*(float(draw) for draw in generator(seed, position, Purpose.CLIP).random(4)))


def clip_indices(video_frames: int, clip: ClipConfig, draw: float) -> list[int]:
    """Frame numbers of a clip, ``clip.frames`` of them ``clip.stride`` apart.

    Args:
        video_frames: frames of the video.
        draw: uniform in [0, 1); places a clip with ``start: random``.

    Raises:
        BadSample: the video is too short.
    """
    _check_length(video_frames, clip)
    span = (clip.frames - 1) * clip.stride + 1
    slack = video_frames - span
    if slack < 0:
        raise BadSample(f"{video_frames} frames are too few: {clip.frames} frames {clip.stride} apart need {span}")
    start = _start(slack, clip, draw)
    return list(range(start, start + span, clip.stride))


def clip_indices_at(times: Sequence[float], clip: ClipConfig, draw: float) -> list[int]:
    """Frame numbers of a clip of ``clip.fps`` frames a second: at each instant the nearest in time.

    Args:
        times: seconds at which the frames of the video are shown, ascending.
        draw: as for `clip_indices`.

    Raises:
        BadSample: the video is too short.
    """
    assert clip.fps
    _check_length(len(times), clip)
    span = (clip.frames - 1) / clip.fps
    slack = -1
    if times:
        half = 0.5 * (times[-1] - times[0]) / max(len(times) - 1, 1)  # a frame is shown until the next one is due
        slack = bisect.bisect_right(times, times[-1] + half - span) - 1
    if slack < 0:
        raise BadSample(
            f"{len(times)} frames are too few: {clip.frames} frames at {clip.fps:g} a second need {span:.3f} s"
        )
    start = times[_start(slack, clip, draw)]
    return [_nearest(times, start + number / clip.fps) for number in range(clip.frames)]


def times_of_images(members: Mapping[str, bytes], frames: int) -> list[float]:
    """Seconds at which the images of a sample are shown, by the field ``fps`` of its ``.json``. Raises `BadSample`."""
    fps = read_fields(members).get("fps")
    if not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise BadSample("clip.fps needs to know how fast the images follow each other: the .json gives no fps")
    return [number / fps for number in range(frames)]


def _check_length(video_frames: int, clip: ClipConfig) -> None:
    if video_frames < clip.min_frames:
        raise BadSample(f"{video_frames} frames are fewer than clip.min_frames={clip.min_frames}")


def _start(slack: int, clip: ClipConfig, draw: float) -> int:
    """Number of the first frame, of ``slack + 1`` that it may be."""
    match clip.start:
        case "first":
            return 0
        case "center":
            return slack // 2
        case "random":
            return int(draw * (slack + 1))


def _nearest(times: Sequence[float], instant: float) -> int:
    after = bisect.bisect_left(times, instant)
    if after == len(times) or (after > 0 and instant - times[after - 1] <= times[after] - instant):
        return after - 1
    return after


def drops_text(seed: int, position: int, probability: float) -> bool:
    """Whether the sample at ``position`` trains without its text."""
    return bool(generator(seed, position, Purpose.CAPTION).random() < probability)


def mirror(frames_THWC: np.ndarray) -> np.ndarray:
    """The frames with left and right exchanged."""
    return frames_THWC[:, :, ::-1]


def choose_caption(members: Mapping[str, bytes], weights: Mapping[str, float], seed: int, position: int) -> str:
    """The caption that ``position`` draws among those a sample has; empty if it has none.

    Args:
        weights: weight of each place captions come from, as in ``data.video.captions``; empty as for `read_caption`.
    """
    if not weights:
        return read_caption(members)
    fields = read_fields(members)
    found = {name: _texts(members, fields, name) for name, weight in weights.items() if weight > 0}
    there = [name for name, texts in found.items() if texts]
    if not there:
        return ""
    # the first draw decides whether the text is dropped
    _, which, item = generator(seed, position, Purpose.CAPTION).random(3)
    ends = np.cumsum([weights[name] for name in there])
    texts = found[there[min(int(np.searchsorted(ends, which * ends[-1], side="right")), len(there) - 1)]]
    return texts[int(item * len(texts))]


def read_caption(members: Mapping[str, bytes]) -> str:
    """The caption of a sample: its ``txt`` member (any bytes), else ``caption`` in its ``json``, else empty."""
    if "txt" in members:
        return members["txt"].decode("utf-8", errors="replace").strip()
    texts = _texts(members, read_fields(members), "caption")
    return texts[0] if texts else ""


def _texts(members: Mapping[str, bytes], fields: Mapping[str, Any], name: str) -> list[str]:
    """The captions that a sample has in one place."""
    value = members["txt"].decode("utf-8", errors="replace") if name == "txt" and "txt" in members else fields.get(name)
    texts = value if isinstance(value, list) else [value]
    # a lone surrogate can be written in JSON, but in no UTF-8
    clean = (text.encode(errors="replace").decode().strip() for text in texts if isinstance(text, str))
    return [text for text in clean if text]


def read_fields(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of a sample's ``.json``; none if it has none or a damaged one."""
    try:
        value = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
