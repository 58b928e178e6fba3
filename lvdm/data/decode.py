"""Chosen frames out of the bytes of a video or of images.

Videos are read by PyAV (FFmpeg). The packets are listed without decoding; frame i is the i-th by presentation time.
Decoding starts at the last key frame that is not after the first wanted frame and stops at the last wanted one; in
between, packets of unwanted frames that no other frame refers to are skipped, which changes no bit of the others.
Where a file's time stamps cannot be trusted, frames are counted as they come out of the decoder. swscale resizes.

Frames come out as a player shows them: upright, with square pixels.

Input is hostile until proven otherwise: only self-contained formats are opened, and work is bounded by budgets of
bytes, packets and pixels, not of seconds, so that the outcome is the same on a busy machine.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from lvdm.data import images
from lvdm.data.fit import CENTER, Fit, Resize, fit
from lvdm.errors import BadSample

VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi", "mov", "gif", "m4v")
Decoder = Literal["pyav", "torchcodec"]

MAX_BYTES = 1 << 31
MAX_PACKETS = 1_000_000
MAX_FRAME_PIXELS = 1 << 26
"""Pixels of one frame as the header gives them: 8192 x 8192."""
MAX_DECODED_PIXELS = 1 << 34
"""Pixels decoded for one clip: 18,000 frames of 1280x720."""

# playlists and the concat format would open other files
_FORMATS = "mov,mp4,matroska,webm,avi,gif"
_REORDER = 32  # packets that may separate decoding order from presentation order; H.264 and H.265 allow 16 frames
_SKIPPABLE = {"h264", "hevc"}  # codecs whose decoders leave out an unwanted frame and nothing else
_IN_ORDER = {"mjpeg", "ffv1", "prores", "png", "rawvideo", "huffyuv", "dvvideo"}  # codecs without reordering
_Timed = tuple[int, "av.Packet[VideoStream]"]  # with its presentation time, in the stream's units


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video says."""

    frames: int
    """Frames in the file (counted where the header does not say)."""
    fps: float
    """Frames a second on average; 0 if unknown."""
    width: int
    """As shown: upright, with square pixels. So is the height."""
    height: int
    duration: float
    """Seconds; 0 if unknown."""
    times: Callable[[], Sequence[float]] = field(default=list, repr=False, compare=False)
    """Gives the seconds at which the frames are shown, in order, while the file is being decoded."""


@dataclass(frozen=True)
class Cut:
    """What of a video makes a clip."""

    indices: Sequence[int]
    """Frame numbers from 0, in the order wanted."""
    place: tuple[float, float] = CENTER
    """Where a random crop lies, from 0 to 1 down and across."""


@dataclass(frozen=True)
class Decoded:
    """A clip and where it comes from."""

    frames_THWC: np.ndarray
    """uint8 RGB."""
    cut: Cut
    fit: Fit
    """How the first of its frames was made to fit."""
    info: VideoInfo
    """Of the whole video; ``times`` is not to be asked for."""
    seconds: tuple[float, float] | None
    """When the first and the last frame of the clip are shown; None where the file does not say, as of images."""


Indices = Sequence[int] | Callable[[VideoInfo], Sequence[int]]
_Scaled = tuple[int, np.ndarray, tuple[int, int]]  # number of a frame, its scaled pixels, height and width it had


def footage(members: Mapping[str, bytes]) -> bytes | list[bytes]:
    """The video among a sample's members, or its frames: ``0001.jpg``, ``0002.jpg`` and so on, or one image.

    Raises:
        BadSample: there is none.
    """
    for extension in VIDEO_EXTENSIONS:
        if extension in members:
            return members[extension]
    numbered = sorted((number, name) for name in members if (number := images.frame_number(name)) is not None)
    frames = [members[name] for _, name in numbered]
    frames = frames or [members[extension] for extension in images.IMAGE_EXTENSIONS if extension in members][:1]
    if not frames:
        raise BadSample("no video and no image in the sample")
    return frames


def probe(data: bytes | Sequence[bytes]) -> VideoInfo:
    """Read the header and the first frame of a video, or of images; ``times`` is not to be asked for.

    Raises:
        BadSample: it is none, its first frame does not decode, or it is beyond the budgets.
    """
    if not isinstance(data, bytes):
        width, height = images.size_of(data[0], MAX_FRAME_PIXELS)
        return VideoInfo(len(data), 0.0, width, height, 0.0)
    with _opened(data) as (container, stream):
        info = _info(container, stream)
        listed = _Packets(container, stream, 0)
        _check_range([0], len(listed))
        _, frame = next(listed.decode({0}))
        height, width = _shown(frame, stream)
    return VideoInfo(info.frames, info.fps, width, height, info.duration)


def decode_frames(
    data: bytes | Sequence[bytes],
    indices: Indices,
    height: int,
    width: int,
    resize: Resize = "crop",
    *,
    place: tuple[float, float] = CENTER,
    decoder: Decoder = "pyav",
) -> np.ndarray:
    """Decode chosen frames, uint8 RGB ``[T, H, W, 3]``.

    Args:
        data: a whole video file, or images that are its frames.
        indices: frame numbers from 0 in the order wanted, or a function that chooses them from the header.
        height, width: size of the result in pixels.
        resize: how frames are made to fit, see `lvdm.data.fit.fit`.
        place: where a crop lies, from 0 to 1 down and across.
        decoder: what decodes videos.

    Raises:
        BadSample: not a video, damaged where it is needed, too short, or beyond the budgets.
        UserError: the decoder is not installed.
    """

    def cuts(info: VideoInfo) -> list[Cut]:
        return [Cut(indices(info) if callable(indices) else indices, place)]

    return decode_clips(data, cuts, height, width, resize, decoder=decoder)[0].frames_THWC


def decode_clips(
    data: bytes | Sequence[bytes],
    cuts: Callable[[VideoInfo], Sequence[Cut]],
    height: int,
    width: int,
    resize: Resize = "crop",
    *,
    decoder: Decoder = "pyav",
) -> list[Decoded]:
    """Decode several clips out of one listing of a video's packets; those near each other in one go.

    Args:
        cuts: chooses them from the header.
        data, height, width, resize, decoder: as for `decode_frames`, which tells what is raised.
    """
    if not isinstance(data, bytes):
        info = VideoInfo(len(data), 0.0, 0, 0, 0.0)
        chosen = cuts(info)
        wanted = {index for cut in chosen for index in cut.indices}
        _check_range(wanted, len(data))
        pictures = _images(data, sorted(wanted), height, width, resize)
        return _gather(pictures, chosen, info, lambda _: None, height, width, resize)
    with _opened(data) as (container, stream):
        info = _info(container, stream)
        chosen = cuts(info)
        wanted = {index for cut in chosen for index in cut.indices}
        listed = _Packets(container, stream, max(wanted))
        _check_range(wanted, len(listed))
        if decoder == "torchcodec" and listed.stamped:
            from lvdm.data import decode_torchcodec

            clips = [sorted(set(cut.indices)) for cut in chosen]
            for clip in clips:
                listed.check_budget(set(clip))
            pictures = decode_torchcodec.decode(data, clips, height, width, resize, _aspect(stream))
        else:
            groups = listed.together([set(cut.indices) for cut in chosen])
            pictures = (one for group in groups for one in _scaled(listed, stream, group, height, width, resize))
        return _gather(pictures, chosen, info, listed.second, height, width, resize)


def iterate_frames(data: bytes | Sequence[bytes], span: range, height: int, width: int) -> Iterator[np.ndarray]:
    """The frames of ``span`` one by one, uint8 RGB ``[H, W, 3]``, resized as by ``crop``. Raises as `decode_frames`."""
    if not isinstance(data, bytes):
        _check_range(span, len(data))
        for _, scaled_HWC, shown in _images(data, span, height, width, "crop"):
            yield fit(*shown, height, width, "crop").apply(scaled_HWC)
        return
    with _opened(data) as (container, stream):
        _info(container, stream)
        listed = _Packets(container, stream, max(span))
        _check_range(span, len(listed))
        for _, scaled_HWC, shown in _scaled(listed, stream, set(span), height, width, "crop"):
            yield fit(*shown, height, width, "crop").apply(scaled_HWC)


def _check_range(wanted: Collection[int], frames: int) -> None:
    if max(wanted) >= frames:
        raise BadSample(f"frame {max(wanted)} is missing: the file holds {frames} frames")


def _gather(
    pictures: Iterable[_Scaled],
    cuts: Sequence[Cut],
    info: VideoInfo,
    second: Callable[[int], float | None],
    height: int,
    width: int,
    resize: Resize,
) -> list[Decoded]:
    """Clips out of frames as they come; ``second`` tells when a frame is shown."""
    clips_NTHWC = [np.empty((len(cut.indices), height, width, 3), np.uint8) for cut in cuts]
    fits: dict[int, Fit] = {}
    for number, scaled_HWC, shown in pictures:
        for clip, cut in enumerate(cuts):
            if number not in cut.indices:
                continue
            how = fit(*shown, height, width, resize, cut.place)
            if number == cut.indices[0]:
                fits[clip] = how
            for row, index in enumerate(cut.indices):
                if index == number:
                    clips_NTHWC[clip][row] = how.apply(scaled_HWC)
    decoded = []
    for clip, (cut, frames_THWC) in enumerate(zip(cuts, clips_NTHWC, strict=True)):
        how = fits[clip]
        start, end = second(cut.indices[0]), second(cut.indices[-1])
        span = None if start is None or end is None else (start, end)
        whole = replace(info, height=how.from_height, width=how.from_width)
        decoded.append(Decoded(frames_THWC, cut, how, whole, span))
    return decoded


def _images(data: Sequence[bytes], wanted: Iterable[int], height: int, width: int, resize: Resize) -> Iterator[_Scaled]:
    for number in wanted:
        yield number, *images.decode(data[number], height, width, resize, MAX_FRAME_PIXELS)


def _scaled(
    listed: _Packets, stream: VideoStream, wanted: set[int], height: int, width: int, resize: Resize
) -> Iterator[_Scaled]:
    """The wanted frames in order, upright and scaled as `fit` says, but not yet cut; views of FFmpeg's memory."""
    reformatter = VideoReformatter()
    for number, frame in listed.decode(wanted):
        shown = _shown(frame, stream)
        how = fit(*shown, height, width, resize)
        turns = round(frame.rotation / 90)
        size = (how.width, how.height) if turns % 2 == 0 else (how.height, how.width)
        rgb = reformatter.reformat(frame, width=size[0], height=size[1], format="rgb24", threads=1)
        plane, shape = rgb.planes[0], (rgb.height, rgb.width, 3)
        pixels_HWC: np.ndarray = np.ndarray(shape, np.uint8, memoryview(plane), strides=(plane.line_size, 3, 1))
        yield number, np.rot90(pixels_HWC, turns), shown


def _shown(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Height and width of a frame as a player shows it."""
    width = max(round(frame.width * _aspect(stream)), 1)
    return (width, frame.height) if round(frame.rotation / 90) % 2 else (frame.height, width)


def _aspect(stream: VideoStream) -> Fraction:
    """Width of a pixel over its height."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return aspect if Fraction(1, 8) <= aspect <= 8 else Fraction(1)  # beyond, it is a mistake


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream; every FFmpeg error becomes a `BadSample`."""
    if len(data) > MAX_BYTES:
        raise BadSample(f"{len(data)} bytes exceed the limit of {MAX_BYTES}")
    # a small probe that decodes nothing: stream info comes from the header
    options = {"format_whitelist": _FORMATS, "probesize": "32", "analyzeduration": "0", "skip_frame": "all"}
    try:
        with av.open(io.BytesIO(data), options=options) as container:
            if not container.streams.video:
                raise BadSample("no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadSample("the video is of an unknown codec")
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # whatever the frames say
            yield cast(InputContainer, container), stream
    except MemoryError:
        raise BadSample("not decodable: it takes more memory than there is") from None
    except (av.FFmpegError, UnicodeError, OverflowError) as error:
        raise BadSample(f"not decodable: {type(error).__name__}: {error}") from None


def _info(container: InputContainer, stream: VideoStream) -> VideoInfo:
    """What the header says, of the size as coded."""
    if not (stream.width > 0 and stream.height > 0):
        raise BadSample("the header gives no frame size")
    if stream.width * stream.height > MAX_FRAME_PIXELS:
        raise BadSample(f"frames of {stream.width}x{stream.height} exceed the limit of {MAX_FRAME_PIXELS} pixels")
    entries = stream.index_entries
    frames = stream.frames
    if container.format.name == "avi":  # its header counts empty packets too
        frames = 0
    if 0 < frames <= len(entries):  # mp4 lists all its packets; an edit list hides some
        frames = sum(not entry.is_discard for entry in entries)
    elif frames <= 0:  # only some containers tell: count
        frames = len(_Packets(container, stream, MAX_PACKETS))
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else 0.0
    if stream.duration and stream.time_base:
        duration = float(stream.duration * stream.time_base)
    else:
        duration = frames / fps if fps else 0.0

    def times() -> list[float]:
        return _Packets(container, stream, MAX_PACKETS).seconds()

    return VideoInfo(frames, fps, stream.width, stream.height, duration, times)


class _Packets:
    """The packets of a video in decoding order, up to what frame ``last`` can need."""

    def __init__(self, container: InputContainer, stream: VideoStream, last: int) -> None:
        self._stream = stream
        self._rate = stream.average_rate or stream.guessed_rate
        self._unit = stream.time_base
        self._packets: list[_Timed] = []
        self.stamped: bool = container.format.name != "avi" or stream.codec_context.name in _IN_ORDER
        container.seek(0)
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.pts is None:
                packet.pts = packet.dts
            if packet.pts is None:
                packet.pts = len(self._packets)
                self.stamped = False
            self._packets.append((packet.pts, packet))
            if len(self._packets) > MAX_PACKETS:
                raise BadSample(f"more than {MAX_PACKETS} packets")
            if len(self._packets) > last + _REORDER:
                break
        self._times = sorted(time for time, packet in self._packets if not packet.is_discard)
        self.stamped = self.stamped and len(set(self._times)) == len(self._times)

    def __len__(self) -> int:
        return len(self._times)

    def seconds(self) -> list[float]:
        """When each frame is shown; zeros if nothing tells."""
        return [self.second(number) or 0.0 for number in range(len(self._times))]

    def second(self, number: int) -> float | None:
        """When frame ``number`` is shown; None if nothing tells."""
        if self.stamped and self._unit:
            return float(self._times[number] * self._unit)
        return float(number / self._rate) if self._rate else None

    def together(self, clips: Sequence[set[int]]) -> list[set[int]]:
        """The frames of ``clips``, those that are decoded in one go together: no clip that it pays to jump to."""
        groups: list[set[int]] = []
        for clip in sorted(clips, key=min):
            if groups and (not self.stamped or self._key_before(min(clip)) <= self._packet_of(max(groups[-1]))):
                groups[-1] |= clip
            else:
                groups.append(set(clip))
        return groups

    def check_budget(self, wanted: set[int]) -> None:
        """Raises `BadSample` if getting at the ``wanted`` frames takes too many pixels."""
        first, last = 0, max(wanted)
        if self.stamped:
            first, last = self._key_before(min(wanted)), self._packet_of(last)
        self._spend(last + 1 - first)

    def decode(self, wanted: set[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """The ``wanted`` frames with their numbers, in order. Raises `BadSample` if one does not come out whole."""
        self.check_budget(wanted)
        left = sorted(wanted, reverse=True)
        if not self.stamped:
            yield from self._counted(left)
        else:
            # a stream refreshed bit by bit has key frames that are whole only some frames later: then from the start
            for start in dict.fromkeys((self._key_before(left[-1]), 0)):
                self._stream.codec_context.flush_buffers()
                yield from self._by_time(start, left)
                if not left:
                    break
        if left:
            raise BadSample(f"{len(left)} of {len(wanted)} frames do not decode")

    def _by_time(self, start: int, left: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Take frames off the end of ``left`` as they come, until one is passed over."""
        times = {self._times[number] for number in left}
        for frame in self._decoded(start, times):
            if frame.pts is None or not left or frame.pts < self._times[left[-1]]:
                continue
            if frame.pts > self._times[left[-1]]:
                return
            yield left.pop(), frame
            if not left:
                return

    def _counted(self, left: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Take frames off the end of ``left`` by their number from the start of the file."""
        for number, frame in enumerate(self._decoded(0, None)):
            if number == left[-1]:
                yield left.pop(), frame
                if not left:
                    return

    def _decoded(self, start: int, times: set[int] | None) -> Iterator[av.VideoFrame]:
        """The frames from packet ``start`` on; with ``times`` others may be missing."""
        decoder = self._stream.codec_context
        may_skip = times is not None and decoder.name in _SKIPPABLE
        for spent, (time, packet) in enumerate([*self._packets[start:], (None, None)]):
            if packet is not None:
                self._spend(spent + 1)
                if packet.is_corrupt:
                    raise BadSample("the file is cut off inside a frame that the clip needs")
                decoder.skip_frame = "NONREF" if may_skip and time not in cast(set[int], times) else "DEFAULT"
            for frame in decoder.decode(packet):
                if frame.is_corrupt:  # its damage spreads to the frames that refer to it, and nothing marks those
                    raise BadSample("a frame that the clip needs is damaged")
                if frame.width * frame.height > MAX_FRAME_PIXELS:
                    raise BadSample(f"a frame of {frame.width}x{frame.height} exceeds the limit of pixels")
                yield frame

    def _spend(self, packets: int) -> None:
        if packets * self._stream.width * self._stream.height > MAX_DECODED_PIXELS:
            raise BadSample(f"decoding this clip exceeds the limit of {MAX_DECODED_PIXELS} pixels")

    def _packet_of(self, number: int) -> int:
        """The packet of frame ``number``."""
        return next(i for i, (time, _) in enumerate(self._packets) if time == self._times[number])

    def _key_before(self, number: int) -> int:
        """The last packet from which decoding gives frame ``number``."""
        first = self._times[number]
        keys = [i for i, (time, packet) in enumerate(self._packets) if packet.is_keyframe and time <= first]
        return max(keys, default=0)
