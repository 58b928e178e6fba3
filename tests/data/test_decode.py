from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lvdm.data import decode, decode_torchcodec
from lvdm.data.decode import Cut, VideoInfo, decode_clips, decode_frames, iterate_frames, probe
from lvdm.data.encode import encode_mp4
from lvdm.errors import BadSample, UserError
from lvdm.synthetic import combinations, render

FRAMES = 90


def moving_noise(frames: int = FRAMES, height: int = 48, width: int = 64) -> np.ndarray:
    """Textured frames that move, so that every frame differs and B-frames pay."""
    canvas = np.random.default_rng(0).integers(0, 255, (height + 8, width + frames, 3), dtype=np.uint8)
    canvas[::2] //= 2
    return np.stack([canvas[t % 8 : t % 8 + height, t : t + width] for t in range(frames)])


def encode(frames_THWC: np.ndarray, codec: str, container: str, pix_fmt: str, **options: str) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as out:
        video = out.add_stream(codec, rate=Fraction(24))
        video.height, video.width = frames_THWC.shape[1:3]
        video.pix_fmt = pix_fmt
        video.options = options
        for frame in frames_THWC:
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(video.encode())
    return stream.getvalue()


def sequential(data: bytes) -> np.ndarray:
    """All frames as a plain PyAV loop gives them."""
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def b_frames() -> bytes:
    """H.264 with B-frames that others refer to, open groups of pictures and a key frame every 30 frames."""
    options = {"bf": "3", "g": "30", "preset": "veryfast", "x264-params": "b-pyramid=normal:open-gop=1:scenecut=0"}
    return encode(moving_noise(), "libx264", "mp4", "yuv420p", **options)


def test_the_clip_under_test_has_b_frames_and_open_groups(b_frames: bytes) -> None:
    with av.open(io.BytesIO(b_frames)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    times = [packet.pts for packet in packets]
    assert times != sorted(times)
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    assert len(keys) >= 3
    assert any(packets[key + 1].pts < packets[key].pts for key in keys[1:])


@pytest.mark.parametrize(
    "indices",
    [
        range(16),
        range(FRAMES - 16, FRAMES),
        range(37, 37 + 16 * 3, 3),
        [0],
        [FRAMES - 1],
        [28, 29, 30, 31, 32],
        [50, 3, 3, 70],
        range(FRAMES),
    ],
    ids=["start", "deep", "strided", "first", "last", "around a key frame", "any order", "all"],
)
def test_frames_are_those_of_a_sequential_decode(b_frames: bytes, indices: range | list[int]) -> None:
    expected = sequential(b_frames)
    assert len(expected) == FRAMES
    np.testing.assert_array_equal(decode_frames(b_frames, list(indices), 48, 64), expected[list(indices)])


@pytest.mark.parametrize("container", ["mp4", "avi"])  # an avi of H.264 has no stamps to go by: frames are counted
def test_several_clips_are_those_of_a_sequential_decode(b_frames: bytes, container: str) -> None:
    data = b_frames
    if container == "avi":
        data = encode(moving_noise(), "libx264", "avi", "yuv420p", bf="2", g="30")
    expected = sequential(data)
    chosen = [[70, 72, 74], [3, 4, 5], [5, 4, 4], [28, 29, 30, 31], [73], list(range(0, FRAMES, 9))]
    clips = decode_clips(data, lambda info: [Cut(indices) for indices in chosen], 48, 64)
    for clip, indices in zip(clips, chosen, strict=True):
        np.testing.assert_array_equal(clip.frames_THWC, expected[indices], err_msg=str(indices))
        assert clip.cut.indices == indices
        assert clip.seconds == pytest.approx((indices[0] / 24, indices[-1] / 24))
        assert (clip.info.frames, clip.info.fps, clip.info.height, clip.info.width) == (FRAMES, 24.0, 48, 64)


def test_clips_near_each_other_are_decoded_in_one_go_and_far_ones_apart(
    b_frames: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes: list[set[int]] = []
    decode_packets = decode._Packets.decode

    def spy(self: decode._Packets, wanted: set[int]) -> Any:
        goes.append(set(wanted))
        return decode_packets(self, wanted)

    monkeypatch.setattr(decode._Packets, "decode", spy)
    near, far = [Cut([20, 21]), Cut([2, 3]), Cut([21, 22])], Cut([85, 86])  # key frames every 30 frames
    expected = sequential(b_frames)
    monkeypatch.setattr(decode, "MAX_DECODED_PIXELS", 64 * 48 * 32)  # enough for a group of pictures, not for all
    clips = decode_clips(b_frames, lambda info: [far, *near], 48, 64)
    np.testing.assert_array_equal(clips[0].frames_THWC, expected[[85, 86]])
    np.testing.assert_array_equal(clips[3].frames_THWC, expected[[21, 22]])
    assert goes == [{2, 3, 20, 21, 22}, {85, 86}]


def test_each_clip_has_a_crop_of_its_own() -> None:
    frames = moving_noise(4, 40, 80)
    data = encode(frames, "libx264", "mp4", "yuv444p", crf="0")
    places = [(0.0, 0.0), (0.5, 0.999), (0.5, 0.3)]
    clips = decode_clips(data, lambda info: [Cut([1, 2], place) for place in places], 20, 20, "random_crop")
    for clip, place in zip(clips, places, strict=True):
        alone = decode_frames(data, [1, 2], 20, 20, "random_crop", place=place)
        np.testing.assert_array_equal(clip.frames_THWC, alone)
        assert (clip.fit.left, clip.fit.top) == (int(place[1] * 21), 0)
    assert len({clip.frames_THWC.tobytes() for clip in clips}) == 3


def test_a_span_comes_frame_by_frame(b_frames: bytes) -> None:
    span = range(33, 60)
    frames = list(iterate_frames(b_frames, span, 48, 64))
    np.testing.assert_array_equal(np.stack(frames), sequential(b_frames)[33:60])


def test_the_header_is_read(b_frames: bytes) -> None:
    info = probe(b_frames)
    assert (info.frames, info.fps, info.width, info.height) == (FRAMES, 24.0, 64, 48)
    assert info.duration == pytest.approx(FRAMES / 24, abs=0.01)


QUIET = {"x265-params": "log-level=none:keyint=20:open-gop=1"}
BOTH_WAYS = {"bf": "2", "g": "20"}
"""Key frames every 20 frames, and frames that refer to later ones."""


@pytest.mark.parametrize(
    ("codec", "container", "pix_fmt", "options"),
    [
        ("libx264", "matroska", "yuv420p", BOTH_WAYS | {"x264-params": "open-gop=1"}),
        ("libx264", "mov", "yuv444p", BOTH_WAYS),
        ("libx264", "avi", "yuv420p", BOTH_WAYS),  # its packets come with the stamps of another order
        ("libx264", "matroska", "yuv420p", BOTH_WAYS | {"intra-refresh": "1"}),  # key frames that are whole later
        ("libx265", "mp4", "yuv420p", QUIET),
        ("libx265", "matroska", "yuv420p10le", QUIET),
        ("libvpx", "webm", "yuv420p", {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}),
        ("libvpx-vp9", "webm", "yuv420p", {"g": "20", "cpu-used": "8", "deadline": "realtime"}),
        ("libsvtav1", "mp4", "yuv420p", {"g": "20", "preset": "12"}),
        ("libsvtav1", "webm", "yuv420p10le", {"g": "20", "preset": "12"}),
        ("mpeg4", "avi", "yuv420p", {"bf": "2", "g": "12"}),
        ("mpeg4", "mp4", "yuv420p", {"bf": "2", "g": "12"}),
        ("mjpeg", "avi", "yuvj420p", {}),
        ("prores_ks", "mov", "yuv422p10le", {}),
        ("gif", "gif", "rgb8", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_containers_and_codecs(codec: str, container: str, pix_fmt: str, options: dict[str, str]) -> None:
    data = encode(moving_noise(60), codec, container, pix_fmt, **options)
    expected = sequential(data)
    info = probe(data)
    assert (info.frames, info.width, info.height) == (60, 64, 48)
    for wanted in ([0], [59], [25, 30], [19, 20, 21, 22], [41]):
        np.testing.assert_array_equal(decode_frames(data, wanted, 48, 64), expected[wanted], err_msg=str(wanted))


@pytest.mark.parametrize(("height", "width"), [(35, 51), (1, 1), (16, 17)])
def test_odd_sizes(height: int, width: int) -> None:
    frames = np.full((6, height, width, 3), (200, 120, 40), np.uint8)
    data = encode(frames, "libx264", "mp4", "yuv444p", crf="1")
    assert (probe(data).height, probe(data).width) == (height, width)
    back = decode_frames(data, [0, 5], height, width)
    assert back.shape == (2, height, width, 3)
    assert abs(back.astype(int) - frames[:2]).max() < 6
    assert decode_frames(data, [2], 33, 20).shape == (1, 33, 20, 3)


@pytest.mark.parametrize("standard", [1, 5])  # BT.709, as high definition is told, and BT.601
def test_colours_come_out_as_they_went_in(standard: int) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40]], np.uint8)
    frame = av.VideoFrame.from_ndarray(np.repeat(colours[None], 16, 0).repeat(16, 1), format="rgb24")
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as out:
        video = out.add_stream("libx264", rate=24, options={"crf": "1"})
        video.height, video.width, video.pix_fmt = 16, 64, "yuv420p"
        video.codec_context.colorspace, video.codec_context.color_range = standard, 1
        out.mux(video.encode(frame.reformat(format="yuv420p", dst_colorspace=standard)))
        out.mux(video.encode())
    back = decode_frames(stream.getvalue(), [0], 16, 64)[0, 8, 8::16]
    assert abs(back.astype(int) - colours).max() < 8


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_turned_video_stands_upright(degrees: int) -> None:
    frames = moving_noise(8)
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as out:
        video = out.add_stream("libx264", rate=24)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        video.set_display_rotation(degrees)
        for frame in frames:
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(video.encode())
    data = stream.getvalue()
    with av.open(io.BytesIO(data)) as container:
        turned = next(container.decode(video=0)).rotation  # counterclockwise, as FFmpeg tells it
    info = probe(data)
    assert (info.height, info.width) == ((48, 64) if degrees == 180 else (64, 48))
    expected = np.stack([np.rot90(frame, turned // 90) for frame in sequential(data)])
    np.testing.assert_array_equal(decode_frames(data, range(8), info.height, info.width), expected)


def test_pixels_that_are_not_square_are_shown_as_wide_as_they_are() -> None:
    frames = np.zeros((2, 40, 40, 3), np.uint8)
    frames[:, :, 10:30] = 255
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as out:
        video = out.add_stream("libx264", rate=8)
        video.height, video.width, video.pix_fmt = 40, 40, "yuv420p"
        video.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for frame in frames:
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(video.encode())
    data = stream.getvalue()
    assert (probe(data).height, probe(data).width) == (40, 80)
    cropped = decode_frames(data, [1], 40, 40)[0, 20, :, 0]  # the middle half of 80 columns is white
    assert (cropped[1:-1] > 200).all()


def test_frames_at_instants_of_a_variable_rate() -> None:
    """Frames shown for 10, 20, 30 ... hundredths of a second: their times are the file's, not their numbers'."""
    gaps = [0.1 * (1 + number % 3) for number in range(20)]
    shown = np.cumsum([0.0, *gaps])[:20]
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as out:
        video = out.add_stream("libx264", rate=24)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        for frame, time in zip(moving_noise(20), shown, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = round(time * 1000), Fraction(1, 1000)
            out.mux(video.encode(picture))
        out.mux(video.encode())
    data = stream.getvalue()
    times: list[float] = []

    def indices(info: VideoInfo) -> list[int]:
        times.extend(info.times())
        return [3, 17]

    got = decode_frames(data, indices, 48, 64)
    np.testing.assert_allclose(np.array(times) - times[0], shown, atol=0.002)
    np.testing.assert_array_equal(got, sequential(data)[[3, 17]])


def image(frame_HWC: np.ndarray, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame_HWC).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95, "subsampling": 0})]
)
def test_images_are_frames(kind: str, options: dict[str, Any]) -> None:
    frames = render(combinations()[0], 0, frames=4, size=32)
    data = [image(frame, kind, **options) for frame in frames]
    assert (probe(data).frames, probe(data).width) == (4, 32)
    back = decode_frames(data, [3, 1, 1], 32, 32)
    assert abs(back.astype(float) - frames[[3, 1, 1]]).mean() < 3
    assert decode_frames(data[:1], [0], 16, 24).shape == (1, 16, 24, 3)
    with pytest.raises(BadSample, match="frame 4 is missing: the file holds 4 frames"):
        decode_frames(data, [4], 32, 32)
    with pytest.raises(BadSample, match="not decodable"):
        decode_frames([data[0][:-200]], [0], 32, 32)


def test_images_stand_upright_and_what_is_transparent_is_black() -> None:
    frame = moving_noise(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    turned = image(np.rot90(frame), "JPEG", exif=exif, quality=100, subsampling=0)
    assert (probe([turned]).height, probe([turned]).width) == frame.shape[:2]
    assert abs(decode_frames([turned], [0], *frame.shape[:2])[0].astype(int) - frame).mean() < 4
    clear = np.dstack([frame, np.zeros(frame.shape[:2], np.uint8)])
    assert decode_frames([image(clear, "PNG")], [0], 16, 16).max() == 0


def test_images_of_other_kinds_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = moving_noise(1)[0]
    with pytest.raises(BadSample, match="not decodable"):
        decode_frames([image(frame, "BMP")], [0], 16, 16)
    deep = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep, "PNG")
    with pytest.raises(BadSample, match="more than 8 bits"):
        decode_frames([deep.getvalue()], [0], 8, 8)
    monkeypatch.setattr(decode, "MAX_FRAME_PIXELS", 48 * 64 - 1)
    with pytest.raises(BadSample, match="64x48 exceeds the limit"):
        decode_frames([image(frame, "PNG")], [0], 16, 16)


def test_torchcodec_gives_the_same_frames(b_frames: bytes) -> None:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        with pytest.raises(UserError, match=r"^data\.video\.decoder=torchcodec: .*; install it and FFmpeg"):
            decode_frames(b_frames, [0], 48, 64, decoder="torchcodec")
        pytest.skip("torchcodec is not installed, which was said in one line")
    wanted = [40, 0, FRAMES - 1]
    theirs = decode_frames(b_frames, wanted, 48, 64, decoder="torchcodec")
    assert abs(theirs.astype(int) - sequential(b_frames)[wanted]).max() <= 1
    disordered = encode(moving_noise(40), "libx264", "avi", "yuv420p", **BOTH_WAYS)
    np.testing.assert_array_equal(
        decode_frames(disordered, [33], 48, 64, decoder="torchcodec"), sequential(disordered)[[33]]
    )


def test_torchcodec_is_asked_for_each_clip_by_itself(b_frames: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frames come at full size and all at once, so that those of several clips would fill the memory."""
    expected, asked = sequential(b_frames), []

    class Decoder:
        def __init__(self, data: bytes, **_: object) -> None:
            asked.append(["opened"])

        def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
            asked.append(list(indices))
            return SimpleNamespace(data=torch.from_numpy(expected[indices]).permute(0, 3, 1, 2))

    monkeypatch.setattr(decode_torchcodec, "_decoder", lambda: Decoder)
    cuts = [Cut([40, 3, 3], (0.0, 0.2)), Cut([3, 4], (0.0, 0.9))]
    clips = decode_clips(b_frames, lambda info: cuts, 48, 20, "random_crop", decoder="torchcodec")
    for clip, left in zip(clips, (9, 40), strict=True):
        np.testing.assert_array_equal(clip.frames_THWC, expected[clip.cut.indices, :, left : left + 20])
        assert (clip.fit.left, clip.info.width) == (left, 64)
        assert clip.seconds == (clip.cut.indices[0] / 24, clip.cut.indices[-1] / 24)
    assert asked == [["opened"], [3, 40], [3, 4]]


def test_the_header_can_choose_the_frames(b_frames: bytes) -> None:
    got = decode_frames(b_frames, lambda info: [info.frames - 2], 48, 64)
    np.testing.assert_array_equal(got, sequential(b_frames)[[FRAMES - 2]])


def test_frames_hidden_by_an_edit_list_do_not_count() -> None:
    """Cutting without encoding anew, as `ffmpeg -ss -c copy` does, keeps frames that are not to be shown."""
    whole = encode(moving_noise(40), "libx264", "mp4", "yuv420p", g="40", bf="0")
    cut = io.BytesIO()
    with av.open(io.BytesIO(whole)) as source, av.open(cut, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = int(10 / 24 / packet.time_base)
                packet.pts -= shift
                packet.dts -= shift
                packet.stream = stream
                target.mux(packet)
    data = cut.getvalue()
    expected = sequential(data)
    assert len(expected) == 30
    assert probe(data).frames == 30
    np.testing.assert_array_equal(decode_frames(data, [0, 13, 29], 48, 64), expected[[0, 13, 29]])


def test_padding_and_random_crops() -> None:
    frames = np.zeros((1, 40, 80, 3), np.uint8)
    frames[:, :, :40] = 255
    data = encode_mp4(np.repeat(frames, 2, 0), 8, crf=0)
    padded = decode_frames(data, [0], 40, 40, "pad")[0, :, :, 0]
    assert (padded[:9] == 0).all()
    assert (padded[31:] == 0).all()
    assert (padded[12:28, :18] > 220).all()
    assert (padded[12:28, 22:] < 30).all()
    left, right = (decode_frames(data, [0], 40, 40, "random_crop", place=(0.5, x))[0] for x in (0.0, 0.999))
    assert left.min() > 220
    assert right.max() < 30
    middle = decode_frames(data, [0], 40, 40, "crop", place=(0, 0))[0, 20, :, 0] > 128
    assert middle.tolist() == [True] * 20 + [False] * 20


def test_cropping_keeps_the_aspect_and_the_centre() -> None:
    frames = np.zeros((2, 40, 80, 3), np.uint8)
    frames[:, :, 30:50] = 255  # the middle quarter
    data = encode_mp4(frames, 8, crf=0)
    cropped = decode_frames(data, [1], 20, 20, "crop")[0, :, :, 0]
    assert (cropped[:, :4] < 30).all()
    assert (cropped[:, 7:13] > 220).all()
    assert (cropped[:, 16:] < 30).all()
    squashed = decode_frames(data, [1], 20, 20, "squash")[0, :, :, 0]
    assert (squashed[:, :6] < 30).all()
    assert (squashed[:, 9:11] > 220).all()


def test_an_encoded_shape_comes_back() -> None:
    frames = render(combinations()[0], 0, frames=8, size=64)
    back = decode_frames(encode_mp4(frames, 8), range(8), 64, 64)
    assert abs(back.astype(float) - frames).mean() < 3


def test_equal_frames_are_encoded_to_equal_bytes_whatever_memory_holds() -> None:
    random = np.random.default_rng(0)
    for number in range(8):
        frames = render(combinations()[number], number, frames=6, size=32)
        encoded = set()
        for _ in range(30):
            random.integers(255, size=random.integers(1000, 300_000), dtype=np.uint8)  # left to the encoder, unset
            encoded.add(encode_mp4(frames, 8))
        assert len(encoded) == 1


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9, 0.995])
def test_a_file_that_is_cut_off_is_bad(b_frames: bytes, kept: float) -> None:
    with pytest.raises(BadSample):
        decode_frames(b_frames[: int(len(b_frames) * kept)], range(FRAMES), 48, 64)


def test_frames_lost_behind_an_intact_header_are_bad(b_frames: bytes) -> None:
    """Matroska tells no frame count and has its header first: what is there decodes, what is not is reported."""
    data = encode(moving_noise(40), "libx264", "matroska", "yuv420p", g="10")
    half = data[: len(data) // 2]
    assert decode_frames(half, [0, 5], 48, 64).shape == (2, 48, 64, 3)
    with pytest.raises(BadSample, match=r"frame 39 is missing|do not decode"):
        decode_frames(half, [0, 39], 48, 64)


@pytest.mark.parametrize("data", [b"", b"\0" * 4096, b"this is no video at all" * 100])
def test_garbage_is_bad(data: bytes) -> None:
    with pytest.raises(BadSample):
        probe(data)


def test_garbage_inside_a_file_is_bad_or_told_apart(b_frames: bytes) -> None:
    middle = len(b_frames) // 2
    spoiled = b_frames[: middle - 2000] + bytes(range(256)) * 16 + b_frames[middle + 2096 :]
    with pytest.raises(BadSample):
        decode_frames(spoiled, range(FRAMES), 48, 64)


@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264", "yuv420p"), ("mjpeg", "yuvj420p")])
def test_a_frame_cut_in_half_is_bad(codec: str, pix_fmt: str, tmp_path: Path) -> None:
    """With the header in front, the demuxer hands out half a packet, which some decoders take without complaint."""
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as out:
        stream = out.add_stream(codec, rate=Fraction(24))
        stream.height, stream.width, stream.pix_fmt = 48, 64, pix_fmt
        stream.codec_context.max_b_frames = 0
        for frame in moving_noise(20):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    cut = path.read_bytes()[:-40]
    assert decode_frames(cut, [18], 48, 64).shape == (1, 48, 64, 3)
    with pytest.raises(BadSample):
        decode_frames(cut, [19], 48, 64)


def test_damage_that_spreads_to_the_clip_is_bad() -> None:
    """A frame that others refer to is concealed, not refused, by the decoder; the others then look fine to it."""
    data = encode(moving_noise(40), "libx264", "mp4", "yuv420p", g="40", bf="0")
    with av.open(io.BytesIO(data)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][10]
        start, size = packet.pos, packet.size
    spoiled = bytearray(data)
    spoiled[start + size // 2 : start + size] = bytes(size - size // 2)
    whole = sequential(data)
    assert (sequential(bytes(spoiled))[20] != whole[20]).any()
    np.testing.assert_array_equal(decode_frames(bytes(spoiled), [9], 48, 64), whole[[9]])
    with pytest.raises(BadSample, match="damaged"):
        decode_frames(bytes(spoiled), [20], 48, 64)


def test_playlists_open_no_files(b_frames: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.mp4").write_bytes(b_frames)
    monkeypatch.chdir(tmp_path)
    playlist = b"ffconcat version 1.0\nfile secret.mp4\n"
    with av.open(io.BytesIO(playlist)) as container:
        assert container.streams.video[0].width == 64  # FFmpeg alone would follow it
    with pytest.raises(BadSample):
        probe(playlist)


@pytest.mark.parametrize(
    ("budget", "value", "reason"),
    [
        ("MAX_BYTES", 1000, "bytes exceed the limit of 1000"),
        ("MAX_FRAME_PIXELS", 64 * 48 - 1, "64x48 exceed the limit"),
        ("MAX_PACKETS", 20, "more than 20 packets"),
        ("MAX_DECODED_PIXELS", 64 * 48 * 10, "exceeds the limit of 30720 pixels"),
    ],
)
def test_work_is_bounded(
    b_frames: bytes, budget: str, value: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_of_a_group = [28]
    assert len(decode_frames(b_frames, last_of_a_group, 48, 64)) == 1
    monkeypatch.setattr(decode, budget, value)
    with pytest.raises(BadSample, match=reason):
        decode_frames(b_frames, last_of_a_group, 48, 64)
