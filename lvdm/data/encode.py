"""Frames to H.264 in MP4, in memory."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np


def encode_mp4(frames_THWC: np.ndarray | Iterable[np.ndarray], fps: float, crf: int = 18) -> bytes:
    """Encode uint8 RGB frames ``[H, W, 3]`` (H and W even) as H.264, yuv420p; equal frames give equal bytes.

    Args:
        frames_THWC: the frames as one array, or one after the other.
        fps: frames a second.
        crf: x264's constant rate factor, 0 (lossless) to 51.
    """
    frames = iter(frames_THWC)
    first = next(frames)
    height, width, channels = first.shape
    assert first.dtype == np.uint8
    assert channels == 3
    assert height % 2 == width % 2 == 0
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        video.codec_context.thread_count = 1  # the bytes do not depend on the machine
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        # x264's macroblock tree reads memory that it did not set: the same frames gave other bytes
        video.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"}
        for frame in itertools.chain([first], frames):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()
