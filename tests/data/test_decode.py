from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lvdm.data import decode
from lvdm.data.decode import decode_frames, iterate_frames, probe
from lvdm.data.encode import encode_mp4
from lvdm.errors import BadSample
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


def test_a_span_comes_frame_by_frame(b_frames: bytes) -> None:
    span = range(33, 60)
    frames = list(iterate_frames(b_frames, span, 48, 64))
    np.testing.assert_array_equal(np.stack(frames), sequential(b_frames)[33:60])


def test_the_header_is_read(b_frames: bytes) -> None:
    info = probe(b_frames)
    assert (info.frames, info.fps, info.width, info.height) == (FRAMES, 24.0, 64, 48)
    assert info.duration == pytest.approx(FRAMES / 24, abs=0.01)


@pytest.mark.parametrize(
    ("codec", "container", "pix_fmt"),
    [
        ("libx264", "matroska", "yuv420p"),
        ("libx264", "mov", "yuv444p"),
        ("libvpx-vp9", "webm", "yuv420p"),
        ("mpeg4", "avi", "yuv420p"),
        ("gif", "gif", "rgb8"),
    ],
)
def test_other_containers_and_codecs(codec: str, container: str, pix_fmt: str) -> None:
    data = encode(moving_noise(20), codec, container, pix_fmt)
    expected = sequential(data)
    info = probe(data)
    assert (info.frames, info.width, info.height) == (20, 64, 48)
    np.testing.assert_array_equal(decode_frames(data, [7, 9, 19], 48, 64), expected[[7, 9, 19]])


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
