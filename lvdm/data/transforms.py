"""Choices about a sample: which frames, what part, mirrored or not, which caption or none. Arithmetic on draws."""

from __future__ import annotations

import bisect
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
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


def several_clips(
    indices: Callable[[ClipConfig, float], list[int]], clip: ClipConfig, draws: Sequence[float]
) -> list[list[int]]:
    """Frame numbers of as many clips of a video as there are draws: with ``start: random`` each where its draw says,
    else one behind the other, as many as the video has frames for.

    Args:
        indices: gives those of one clip of the video, by `clip_indices` or `clip_indices_at`.
    Raises:
        BadSample: the video is too short for one.
    """
    if clip.start == "random":
        return [indices(clip, draw) for draw in draws]
    for clips in range(len(draws), 1, -1):
        with contextlib.suppress(BadSample):  # too short for so many
            whole = indices(clip.model_copy(update={"frames": clips * clip.frames}), draws[0])
            return [whole[first : first + clip.frames] for first in range(0, len(whole), clip.frames)]
    return [indices(clip, draws[0])]


def times_of_images(members: Mapping[str, bytes], frames: int) -> list[float]:
    """Seconds at which the images of a sample are shown, by the field ``fps`` of its ``.json``. Raises `BadSample`."""
    fps = told_fps(read_fields(members))
    if not fps:
        raise BadSample("clip.fps needs to know how fast the images follow each other: the .json gives no fps")
    return [number / fps for number in range(frames)]


def told_fps(fields: Mapping[str, Any]) -> float:
    """Frames a second as the fields of a ``.json`` say; 0 if they do not."""
    fps = fields.get("fps")
    return fps if isinstance(fps, int | float) and 0 < fps < 1e6 else 0.0


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


def mirrors(draws: Draws, clip: ClipConfig) -> bool:
    """Whether a clip is mirrored."""
    return draws.flip < clip.flip


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
    places = captions_by_place(members, list(weights))
    drawn = draw_caption([len(texts) for texts in places], list(weights.values()), seed, position)
    return places[drawn[0]][drawn[1]] if drawn else ""


def captions_by_place(members: Mapping[str, bytes], places: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The captions that a sample has in each of ``places``; without places, in one: that of `read_caption`."""
    if not places:
        caption = read_caption(members)
        return ((caption,) if caption else (),)
    fields = read_fields(members)
    return tuple(tuple(_texts(members, fields, name)) for name in places)


def draw_caption(counts: Sequence[int], weights: Sequence[float], seed: int, position: int) -> tuple[int, int] | None:
    """Which caption ``position`` draws: the number of its place, and its own there; None if there is none.

    Args:
        counts: captions in each place.
        weights: weight of each place; those of places without captions do not count.
    """
    there = [place for place, count in enumerate(counts) if count and weights[place] > 0]
    if not there:
        return None
    # the first draw decides whether the text is dropped
    _, which, item = generator(seed, position, Purpose.CAPTION).random(3)
    ends = np.cumsum([weights[place] for place in there])
    place = there[min(int(np.searchsorted(ends, which * ends[-1], side="right")), len(there) - 1)]
    return place, int(item * counts[place])


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
