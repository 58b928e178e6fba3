"""Chosen frames out of the bytes of a video, by PyAV (FFmpeg).

The packets are listed without decoding; frame i is the i-th by presentation time. Decoding starts at the last key
frame that is not after the first wanted frame and stops at the last wanted one; in between, packets of unwanted frames
that no other frame refers to are skipped, which changes no bit of the others. swscale resizes.

Input is hostile until proven otherwise: only self-contained container formats are opened, and work is bounded by
budgets of packets and pixels, not of seconds, so that the outcome is the same on a busy machine.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from lvdm.errors import BadSample

VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi", "mov", "gif", "m4v")

MAX_BYTES = 1 << 31
MAX_PACKETS = 1_000_000
MAX_FRAME_PIXELS = 1 << 26
"""Pixels of one frame as the header gives them: 8192 x 8192."""
MAX_DECODED_PIXELS = 1 << 34
"""Pixels decoded for one clip: 18,000 frames of 1280x720."""

# playlists and the concat format would open other files
_FORMATS = "mov,mp4,matroska,webm,avi,gif"
_Timed = tuple[int, "av.Packet[VideoStream]"]  # with its presentation time, in the stream's units
_REORDER = 32  # packets that may separate decoding order from presentation order; H.264 and H.265 allow 16 frames


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video says."""

    frames: int
    """Frames in the file (counted where the header does not say)."""
    fps: float
    """Frames a second on average; 0 if unknown."""
    width: int
    height: int
    duration: float
    """Seconds; 0 if unknown."""


Indices = Sequence[int] | Callable[[VideoInfo], Sequence[int]]


def probe(data: bytes) -> VideoInfo:
    """Read the header of a video. Raises `BadSample` if it is none, or beyond the budgets."""
    with _opened(data) as (container, stream):
        return _info(container, stream)


def decode_frames(
    data: bytes, indices: Indices, height: int, width: int, resize: Literal["crop", "squash"] = "crop"
) -> np.ndarray:
    """Decode chosen frames, uint8 RGB ``[T, H, W, 3]``.

    Args:
        data: a whole video file.
        indices: frame numbers from 0 in the order wanted, or a function that chooses them from the header.
        height, width: size of the result in pixels.
        resize: ``crop`` scales the shorter side to fit and crops the centre; ``squash`` ignores the aspect.

    Raises:
        BadSample: not a video, damaged where it is needed, too short, or beyond the budgets.
    """
    with _opened(data) as (container, stream):
        info = _info(container, stream)
        wanted = list(indices(info) if callable(indices) else indices)
        frames = dict(_frames(container, stream, info, set(wanted), height, width, resize))
    return np.stack([frames[index] for index in wanted])


def iterate_frames(data: bytes, span: range, height: int, width: int) -> Iterator[np.ndarray]:
    """The frames of ``span`` one by one, uint8 RGB ``[H, W, 3]``, resized as by ``crop``. Raises as `decode_frames`."""
    with _opened(data) as (container, stream):
        for _, frame_HWC in _frames(container, stream, _info(container, stream), set(span), height, width, "crop"):
            yield frame_HWC


def _frames(
    container: InputContainer,
    stream: VideoStream,
    info: VideoInfo,
    wanted: set[int],
    height: int,
    width: int,
    resize: str,
) -> Iterator[tuple[int, np.ndarray]]:
    """The wanted frames and their numbers, in order."""
    packets, times = _packets(container, stream, max(wanted))
    if max(wanted) >= len(times):
        raise BadSample(f"frame {max(wanted)} is missing: the file holds {len(times)} frames")
    scaled_height, scaled_width = _scaled_size(info, height, width, resize)
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    numbers = {times[index]: index for index in wanted}
    reformatter = VideoReformatter()
    for time, frame in _decode(stream, packets, set(numbers)):
        scaled = reformatter.reformat(frame, width=scaled_width, height=scaled_height, format="rgb24", threads=1)
        yield numbers[time], scaled.to_ndarray()[top : top + height, left : left + width]


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream; every FFmpeg error becomes a `BadSample`."""
    if len(data) > MAX_BYTES:
        raise BadSample(f"{len(data)} bytes exceed the limit of {MAX_BYTES}")
    # a small probe: stream info comes from the header, not from decoding the first frames
    options = {"format_whitelist": _FORMATS, "probesize": "32", "analyzeduration": "0"}
    try:
        with av.open(io.BytesIO(data), options=options) as container:
            if not container.streams.video:
                raise BadSample("no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # whatever the frames say
            yield cast(InputContainer, container), stream
    except (av.FFmpegError, UnicodeError, OverflowError) as error:
        raise BadSample(f"not decodable: {type(error).__name__}: {error}") from None


def _info(container: InputContainer, stream: VideoStream) -> VideoInfo:
    if not (stream.width > 0 and stream.height > 0):
        raise BadSample("the header gives no frame size")
    if stream.width * stream.height > MAX_FRAME_PIXELS:
        raise BadSample(f"frames of {stream.width}x{stream.height} exceed the limit of {MAX_FRAME_PIXELS} pixels")
    entries = stream.index_entries
    frames = stream.frames
    if 0 < frames <= len(entries):  # mp4 lists all its packets; an edit list hides some
        frames = sum(not entry.is_discard for entry in entries)
    elif frames <= 0:  # only some containers tell: count
        frames = len(_packets(container, stream, MAX_PACKETS)[1])
        container.seek(0)
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else 0.0
    if stream.duration and stream.time_base:
        duration = float(stream.duration * stream.time_base)
    else:
        duration = frames / fps if fps else 0.0
    return VideoInfo(frames=frames, fps=fps, width=stream.width, height=stream.height, duration=duration)


def _packets(container: InputContainer, stream: VideoStream, last: int) -> tuple[list[_Timed], list[int]]:
    """Packets in decoding order up to what frame ``last`` can need, and the sorted times of the frames in them."""
    packets: list[_Timed] = []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None:
            packet.pts = packet.dts
        if packet.pts is None:
            raise BadSample("a packet has no time stamp")
        packets.append((packet.pts, packet))
        if len(packets) > MAX_PACKETS:
            raise BadSample(f"more than {MAX_PACKETS} packets")
        if len(packets) > last + _REORDER:
            break
    times = sorted(time for time, packet in packets if not packet.is_discard)
    if len(set(times)) != len(times):
        raise BadSample("two frames have the same time stamp")
    return packets, times


def _decode(stream: VideoStream, packets: list[_Timed], wanted: set[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames at the presentation times ``wanted``, in order. Raises `BadSample` if one does not come out whole."""
    first, left = min(wanted), set(wanted)
    keys = [i for i, (time, packet) in enumerate(packets) if packet.is_keyframe and time <= first]
    budget = MAX_DECODED_PIXELS // (stream.width * stream.height)
    decoder = stream.codec_context
    for time, packet in [*packets[max(keys, default=0) :], (None, None)]:
        if packet is not None:
            if packet.is_corrupt:
                raise BadSample("the file is cut off inside a frame that the clip needs")
            decoder.skip_frame = "DEFAULT" if time in wanted else "NONREF"
            budget -= 1
            if budget < 0:
                raise BadSample(f"decoding this clip exceeds the limit of {MAX_DECODED_PIXELS} pixels")
        for frame in decoder.decode(packet):
            if frame.is_corrupt:  # its damage spreads to the frames that refer to it, and nothing marks those
                raise BadSample("a frame that the clip needs is damaged")
            if frame.pts in left:
                if frame.width * frame.height > MAX_FRAME_PIXELS:
                    raise BadSample(f"a frame of {frame.width}x{frame.height} exceeds the limit of pixels")
                left.remove(frame.pts)
                yield frame.pts, frame
        if not left:
            return
    raise BadSample(f"{len(left)} of {len(wanted)} frames do not decode")


def _scaled_size(info: VideoInfo, height: int, width: int, resize: str) -> tuple[int, int]:
    if resize == "squash":
        return height, width
    scale = max(height / info.height, width / info.width)
    return max(height, round(info.height * scale)), max(width, round(info.width * scale))
