"""Videos, images and captions that nobody made in good faith; hostile tars are in ``test_tars.py``."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lvdm.config import ClipConfig
from lvdm.data import decode_torchcodec
from lvdm.data.decode import decode_frames
from lvdm.data.fit import MAX_SCALED_PIXELS, fit
from lvdm.data.samples import load_clip
from lvdm.errors import BadSample
from tests.data.fuzz import image, video

FILES = 1500


@pytest.mark.parametrize("seed", [1, 2])
def test_a_damaged_file_gives_its_frames_or_a_reason(seed: int) -> None:
    command = [sys.executable, "-m", "tests.data.fuzz", str(seed), str(FILES)]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    lines = tried.stdout.splitlines()
    assert tried.returncode == 0, f"{lines[-1]}\n{tried.stderr[-2000:]}"
    assert len(lines) == FILES
    outcomes = [line.split(" ", 3)[3] for line in lines]
    wrong = [line for line, outcome in zip(lines, outcomes, strict=True) if not outcome.startswith(("frames", "bad: "))]
    assert not wrong
    assert min(outcomes.count("frames"), sum(o.startswith("bad: ") for o in outcomes)) > FILES / 5
    slow = [line for line in lines if float(line.split(" ")[2].rstrip("s")) > 5]
    assert not slow


def patched(data: bytes, box: bytes, behind: int, content: bytes) -> bytes:
    place = data.index(box) + len(box) + behind
    return data[:place] + content + data[place + len(content) :]


def png_of(width: int, height: int) -> bytes:
    data = image("png")
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def test_headers_that_promise_too_much_are_bad() -> None:
    mp4, gif, avi = video("libx264", "mp4"), video("gif", "gif"), video("rawvideo", "avi")
    cases: list[tuple[bytes | list[bytes], str]] = [
        (patched(mp4, b"stsz", 4, struct.pack(">II", 1, 0xFFFFFFFF)), "not decodable"),
        (patched(mp4, b"stts", 4, struct.pack(">III", 1, 0xFFFFFFFF, 1)), "the file holds"),
        (patched(avi, b"strf", 8, struct.pack("<II", 100_000, 100_000)), "100000x100000 exceed|no frame size"),
        (patched(gif, b"GIF89a", 0, struct.pack("<HH", 65535, 65535)), "exceed|no frame size|not decodable"),
        ([png_of(100_000, 100_000)], "exceed"),
        ([png_of(8_000, 8_000)], "truncated"),
    ]
    for data, reason in cases:
        with pytest.raises(BadSample, match=reason):
            decode_frames(data, lambda info: [info.frames // 2], 24, 24)


def test_endless_streams_come_to_an_end() -> None:
    gif = video("gif", "gif")
    frames = gif[gif.index(b"\x21\xf9") : -1]
    endless = gif[:-1] + frames * 500
    assert decode_frames(endless, [0, 12 * 500], 24, 24).shape == (2, 24, 24, 3)
    with pytest.raises(BadSample, match=r"missing|damaged|not decodable"):
        decode_frames(endless, [10**9], 24, 24)


@pytest.mark.parametrize(
    "text", [b"", b"\0" * 1000, bytes(range(256)) * 50, b"\xed\xa0\x80 \xff", "\u202e\U0001f600".encode(), b"a" * 10**6]
)
def test_captions_of_any_bytes_come_through_as_text(text: bytes) -> None:
    clip = ClipConfig(frames=2, height=16, width=16)
    escaped = text.decode("utf-8", "surrogateescape").encode("utf-16-le", "surrogatepass")
    lone = "".join(f"\\u{unit:04x}" for (unit,) in struct.iter_unpack("<H", escaped[:2000]))
    for members in ({"txt": text}, {"json": b'{"caption": "' + lone.encode() + b'"}'}, {"json": text}):
        sample = load_clip({"mp4": video("libx264", "mp4"), **members}, clip, 0, seed=0, text_dropout=0.0)
        sample.caption.encode()  # whatever comes later can write it


@pytest.mark.parametrize(("width", "height"), [(4000, 1), (1, 4000), (32768, 16), (10**6, 1)])
def test_a_thin_picture_is_refused_before_it_is_blown_up(width: int, height: int) -> None:
    with pytest.raises(
        BadSample, match=rf"a picture of {width}x{height} would be scaled to \d+x\d+ .* to 256x256, which"
    ):
        fit(height, width, 256, 256, "crop")
    assert fit(height, width, 256, 256, "pad").width <= 256
    how = fit(2160, 3840, 1080, 1080, "crop")
    assert how.height * how.width < MAX_SCALED_PIXELS


def test_a_thin_image_is_a_bad_sample() -> None:
    data = io.BytesIO()
    Image.new("RGB", (4000, 1)).save(data, "png")
    with pytest.raises(BadSample, match=r"^a picture of 4000x1 would be scaled"):
        decode_frames([data.getvalue()], [0], 256, 256)


def test_what_takes_more_memory_than_there_is_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.Image.Image.resize", exhausted)
    monkeypatch.setattr("lvdm.data.decode._scaled", exhausted)
    for data in ([image("png")], video("libx264", "mp4")):
        with pytest.raises(BadSample, match="it takes more memory than there is"):
            decode_frames(data, [0], 16, 16)


def test_torchcodec_frames_larger_than_the_header_said_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    class Decoder:
        """As of TorchCodec, with frames that outgrew their header."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
            return SimpleNamespace(data=torch.zeros(len(indices), 3, 50, 41, dtype=torch.uint8))

    monkeypatch.setattr(decode_torchcodec, "_decoder", lambda: Decoder)
    how = ([[0, 1]], 16, 16, "crop", Fraction(1))
    frames = decode_torchcodec.decode(b"", *how)  # type: ignore[arg-type]
    assert [(number, scaled.shape, shown) for number, scaled, shown in frames] == [
        (number, (20, 16, 3), (50, 41)) for number in (0, 1)
    ]
    monkeypatch.setattr(decode_torchcodec, "MAX_FRAME_PIXELS", 2000)
    with pytest.raises(BadSample, match="a frame of 41x50 exceeds the limit of 2000 pixels"):
        list(decode_torchcodec.decode(b"", *how))  # type: ignore[arg-type]
