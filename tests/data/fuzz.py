"""Decode damaged and hostile files and say what became of each: a process of its own, which a codec may take down.

    python -m tests.data.fuzz SEED FILES

A line a file on stdout: its number, what was done to it, and ``frames`` or the reason for which it is bad.
"""

from __future__ import annotations

import io
import resource
import struct
import sys
import time
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from lvdm.data.decode import decode_frames
from lvdm.errors import BadSample

MEMORY = 6 << 30
EDGES = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 100_000)
CONTAINERS = (("libx264", "mp4"), ("libx264", "matroska"), ("libvpx", "webm"), ("mpeg4", "avi"), ("gif", "gif"))


def main() -> None:
    """Try so many files of a seed."""
    seed, files = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    av.logging.set_level(av.logging.PANIC)
    for number, (what, data) in enumerate(mutants(seed, files)):
        print(number, what, end=" ", flush=True)  # before it is tried: the last line names what took the process down
        began = time.perf_counter()
        try:
            frames = decode_frames(data, lambda info: [info.frames // 2, 0], 24, 24)
            outcome = "frames" if frames.shape == (2, 24, 24, 3) else f"wrong shape {frames.shape}"
        except BadSample as error:
            outcome = f"bad: {error}"
        print(f"{time.perf_counter() - began:.2f}s", outcome.replace("\n", " "), flush=True)


def mutants(seed: int, files: int) -> Iterator[tuple[str, bytes | list[bytes]]]:
    """Files made from good ones, with what was done to each."""
    rng = np.random.default_rng(seed)
    originals: list[tuple[str, bytes | list[bytes]]] = [(kind, video(codec, kind)) for codec, kind in CONTAINERS]
    originals += [(kind, [image(kind)]) for kind in ("jpeg", "png", "webp")]
    changes = (flip, cut, overwrite, large_number, repeat, leave_out)
    for _ in range(files):
        kind, original = originals[rng.integers(len(originals))]
        data = bytearray(original if isinstance(original, bytes) else original[0])
        done = []
        for change in rng.choice(len(changes), size=rng.integers(1, 4)):
            data = changes[change](data, rng)
            done.append(changes[change].__name__)
        yield f"{kind}:{'+'.join(done)}", bytes(data) if isinstance(original, bytes) else [bytes(data)]


def flip(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Change some bits."""
    for place in rng.integers(len(data), size=rng.integers(1, 20)):
        data[place] ^= 1 << int(rng.integers(8))
    return data


def cut(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Keep the beginning."""
    return data[: rng.integers(1, len(data) + 1)]


def overwrite(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Put random bytes somewhere."""
    place, size = rng.integers(len(data)), int(rng.integers(1, 200))
    data[place : place + size] = rng.bytes(size)
    return data


def large_number(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Put numbers at the edge of their range into the header."""
    for place in rng.integers(min(len(data), 1200), size=rng.integers(1, 4)):
        data[place : place + 4] = struct.pack(
            ">I", int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 100_000]))
        )
    return data


def repeat(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Say something several times."""
    start = int(rng.integers(len(data)))
    part = data[start : start + int(rng.integers(1, 500))]
    return data[:start] + part * int(rng.integers(2, 20)) + data[start:]


def leave_out(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Leave a part out."""
    start = int(rng.integers(len(data)))
    return data[:start] + data[start + int(rng.integers(1, 200)) :] or bytearray(b"\0")


def video(codec: str, container: str) -> bytes:
    """Twelve small frames that move."""
    stream = io.BytesIO()
    canvas = np.random.default_rng(0).integers(0, 255, (32, 80, 3), dtype=np.uint8)
    with av.open(stream, "w", format=container) as out:
        track = out.add_stream(codec, rate=Fraction(12))
        track.height, track.width = 32, 48
        track.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for number in range(12):
            out.mux(track.encode(av.VideoFrame.from_ndarray(canvas[:, number : number + 48], format="rgb24")))
        out.mux(track.encode())
    return stream.getvalue()


def image(kind: str) -> bytes:
    """A small picture."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


if __name__ == "__main__":
    main()
