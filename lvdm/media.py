"""Files to look at: H.264 mp4, gif, and a contact sheet of many clips. Frames are uint8 ``THWC`` RGB.

A file is complete or absent: it is written beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvdm.errors import UserError
from lvdm.storage import atomic_file

_CRF = "10"  # x264's constant quality, LVDM's choice: next to lossless to the eye
_GIF_TICKS = 100  # a gif counts time in hundredths of a second
_PALETTE_PIXELS = 1 << 18  # pixels that a gif's palette is made from

_MARGIN = 16
_GAP = 4
_ROW_GAP = 14
_TEXT_WIDTH = 230
_FONT_SIZE = 16
_LINE_HEIGHT = 21
_INK, _PAPER, _RULE = (28, 28, 32), (255, 255, 255), (226, 226, 230)


def write_mp4(path: str | Path, frames_THWC: np.ndarray, fps: float, *, scale: int = 1) -> None:
    """Write a clip as H.264 in yuv420p, which every player and browser shows.

    Args:
        path: the file; its folder is made.
        frames_THWC: uint8 RGB. An odd height or width is made even by repeating the last row or column.
        fps: frames per second.
        scale: integer enlargement by nearest neighbour, so that small clips can be watched.

    Raises:
        UserError: the path cannot be written.
    """
    frames_THWC = enlarge(_checked(frames_THWC), scale)
    height, width = frames_THWC.shape[1:3]
    frames_THWC = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    def write(target: Path) -> None:
        options = {"movflags": "+faststart"}
        with av.open(str(target), "w", format="mp4", options=options) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frames_THWC.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": _CRF}
            for frame in frames_THWC:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())

    _write_atomically(Path(path), write)


def write_gif(path: str | Path, frames_THWC: np.ndarray, fps: float, *, scale: int = 1) -> None:
    """Write a clip as an endless gif.

    All frames share one palette and nothing is dithered, so colours stand still where the clip does. See `write_mp4`
    for the arguments and errors; a gif's clock has hundredths of a second, kept right on average.
    """
    _write_bytes(Path(path), gif_bytes(enlarge(frames_THWC, scale), fps))


def gif_bytes(frames_THWC: np.ndarray, fps: float) -> bytes:
    """What `write_gif` writes."""
    frames_THWC = _checked(frames_THWC)
    palette = _palette(frames_THWC)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames_THWC]
    ticks = [round(_GIF_TICKS * i / fps) for i in range(len(images) + 1)]
    milliseconds = [10 * max(after - before, 1) for before, after in itertools.pairwise(ticks)]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0, optimize=False
    )
    return buffer.getvalue()


def side_by_side(clips_BTHWC: np.ndarray) -> np.ndarray:
    """Clips in rows of as many as there are rows, or one more: uint8 ``THWC``."""
    number, frames, height, width, colors = clips_BTHWC.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    blank = np.full((rows * columns - number, *clips_BTHWC.shape[1:]), 255, dtype=np.uint8)
    grid = np.concatenate([clips_BTHWC, blank]).reshape(rows, columns, frames, height, width, colors)
    return grid.transpose(2, 0, 3, 1, 4, 5).reshape(frames, rows * height, columns * width, colors)


def contact_sheet(
    path: str | Path,
    videos: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    columns: int = 6,
    frame_height: int = 128,
) -> None:
    """Write a PNG with a row for each clip: its caption, then ``columns`` of its frames from first to last.

    Args:
        path: the file; its folder is made.
        videos: clips, uint8 ``THWC``, of any lengths and sizes.
        captions: one a clip, wrapped to fit (accents are dropped: the font that Pillow carries has none).
        columns: frames shown, evenly spaced in time; clips that are shorter show all of theirs.
        frame_height: largest height of a shown frame in pixels; small clips are enlarged by whole multiples.

    Raises:
        UserError: the path cannot be written.
        ValueError: no clips, or not as many captions as clips.
    """
    if not videos or len(videos) != len(captions):
        raise ValueError(f"{len(videos)} clips with {len(captions)} captions")
    strips = [_strip(_checked(video), columns, frame_height) for video in videos]
    font = ImageFont.load_default(_FONT_SIZE)
    texts = [_wrap(_without_accents(caption), font, _TEXT_WIDTH) for caption in captions]
    heights = [max(strip.height, _LINE_HEIGHT * len(lines)) for strip, lines in zip(strips, texts, strict=True)]
    left = _MARGIN + _TEXT_WIDTH + _MARGIN
    width = left + max(strip.width for strip in strips) + _MARGIN
    sheet = Image.new("RGB", (width, 2 * _MARGIN + sum(heights) + _ROW_GAP * (len(strips) - 1)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = _MARGIN
    for strip, lines, height in zip(strips, texts, heights, strict=True):
        if y > _MARGIN:
            rule = y - _ROW_GAP // 2
            draw.line([(_MARGIN, rule), (width - _MARGIN, rule)], fill=_RULE)
        top = y + (height - _LINE_HEIGHT * len(lines)) // 2
        for i, line in enumerate(lines):
            draw.text((_MARGIN, top + i * _LINE_HEIGHT), line, font=font, fill=_INK)
        sheet.paste(strip, (left, y + (height - strip.height) // 2))
        y += height + _ROW_GAP
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    _write_bytes(Path(path), buffer.getvalue())


def enlarge(frames_THWC: np.ndarray, scale: int) -> np.ndarray:
    """Repeat every pixel ``scale`` times in height and width."""
    if scale < 1:
        raise ValueError(f"scale {scale} must be at least 1")
    return frames_THWC if scale == 1 else frames_THWC.repeat(scale, axis=1).repeat(scale, axis=2)


def _checked(frames_THWC: np.ndarray) -> np.ndarray:
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3 or not frames_THWC.size:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], not {frames_THWC.dtype} {list(frames_THWC.shape)}")
    return frames_THWC


def _palette(frames_THWC: np.ndarray) -> Image.Image:
    """256 colours for the whole clip: median cut over an even subset of its pixels, refined by k-means."""
    pixels = frames_THWC.reshape(-1, 3)
    pixels = pixels[:: -(-len(pixels) // _PALETTE_PIXELS)]
    return Image.fromarray(pixels[None]).quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)


def _strip(frames_THWC: np.ndarray, columns: int, frame_height: int) -> Image.Image:
    """Evenly spaced frames of a clip side by side."""
    length, height, width = frames_THWC.shape[:3]
    shown = np.linspace(0, length - 1, min(columns, length)).round().astype(int)
    if height <= frame_height:
        frames_THWC = enlarge(frames_THWC[shown], frame_height // height)
        images = [Image.fromarray(frame) for frame in frames_THWC]
    else:
        size = (max(round(width * frame_height / height), 1), frame_height)
        images = [Image.fromarray(frames_THWC[i]).resize(size, Image.Resampling.LANCZOS) for i in shown]
    cell = images[0].width + _GAP
    strip = Image.new("RGB", (len(images) * cell - _GAP, images[0].height), _PAPER)
    for i, image in enumerate(images):
        strip.paste(image, (i * cell, 0))
    return strip


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than ``width`` pixels; a word wider than that is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _write_bytes(path: Path, data: bytes) -> None:
    def write(target: Path) -> None:
        target.write_bytes(data)

    _write_atomically(path, write)


def _write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    with _reported(path), atomic_file(str(path)) as temporary:
        write(Path(temporary))


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
