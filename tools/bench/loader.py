"""Read clips and latents, against the limit and against what others use: one thread on one core, runs interleaved.

    python tools/bench/loader.py

* a clip out of a video's bytes, against libav alone (seek, decode, swscale) and against decord with torchvision
* batches of clips, against webdataset with the same decoder; batches of latents, against reading the shards' bytes
* bytes read for each byte needed

Needs ``pip install -e .[bench]``. Videos and shards are made once and kept in ``$LVDM_CACHE``. Prints tables and
writes them, dated, into ``tools/bench/results``.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import decord
import numpy as np
import torch
import webdataset as wds
from av.video.reformatter import VideoReformatter
from PIL import Image
from result import RESULTS, table, write_result
from torch import Tensor
from torchvision.transforms import v2

from lvdm import __version__
from lvdm.config import ClipConfig, DataConfig, LatentSource, VideoSource
from lvdm.data.build_index import build_index
from lvdm.data.decode import decode_frames
from lvdm.data.fetch import Fetcher
from lvdm.data.latents import (
    LatentSetInfo,
    LatentText,
    LatentVAE,
    latent_member,
    pack_latent,
    pack_text,
    text_member,
    write_latent_set,
)
from lvdm.data.loader import Loader, build_loader
from lvdm.data.writer import ShardSample, sample_key, write_shard
from lvdm.storage import atomic_file, cache_folder, new_folder

SIDE, FRAMES, FPS = 256, 16, 30
SIZES = {"720p": (1280, 720), "180p": (320, 180)}
LENGTH, DEEP = 300, 220
"""Frames of a video, and where a clip deep inside it starts."""
GAPS = (250, 30)
"""Frames from one key frame to the next."""
BATCH, PER_SHARD = 4, 16
VIDEOS = 4
"""Different videos in a set of shards, of `SHORT` frames each."""
SHORT = 64
LATENT, TOKENS, DIM = (4, 16, 32, 32), 77, 768
LATENT_BATCH, LATENTS_PER_SHARD = 16, 64
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Run = Callable[[], object]
Race = Callable[[Mapping[str, Run]], dict[str, list[float]]]


@dataclass(frozen=True)
class Target:
    """What is to be reached."""

    name: str
    value: float
    least: float = -float("inf")
    most: float = float("inf")

    @property
    def row(self) -> list[str]:
        """Of the table of targets."""
        bound = f">= {self.least:.2f}" if self.least > -float("inf") else f"<= {self.most:.2f}"
        return [self.name, bound, f"{self.value:.3f}", "yes" if self.least <= self.value <= self.most else "no"]


def main() -> None:
    """Measure all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="interleaved runs of each (10)")
    parser.add_argument("--shards", type=int, default=4, help="shards of a set that loaders read (4)")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="sizes of the videos (all)")
    parser.add_argument(
        "--clock", default="wall", choices=CLOCKS, help="cpu: of this process, for a busy machine (wall)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # decord decodes in a thread of its own
    torch.set_num_threads(1)
    race = functools.partial(measure, rounds=arguments.rounds, clock=CLOCKS[arguments.clock])
    parts = [
        clips(arguments.sizes, race),
        batches(arguments.sizes, arguments.shards, race),
        latents(arguments.shards, race),
    ]
    targets = [target.row for _, found in parts for target in found]
    lines = [
        f"One thread on one core, {arguments.rounds} interleaved rounds, {arguments.clock} time. Rates are medians,",
        "ratios the medians of the rounds' ratios: above 1, lvdm is faster.",
        "",
        *table(["target", "", "measured", "holds"], targets),
    ]
    for part, _ in parts:
        lines += ["", *part]
    packages = ["av", "decord", "webdataset", "torch", "torchvision", "safetensors"]
    write_result(arguments.results, "loader", "Reading clips and latents", packages, lines)


def clips(sizes: Sequence[str], race: Race) -> tuple[list[str], list[Target]]:
    """Clips from bytes to uint8 frames, by lvdm, by libav alone and by decord."""
    rows, peers = [], ("libav", "decord")
    ratios: dict[str, list[float]] = {peer: [] for peer in peers}
    for size, gap, start, stride in itertools.product(sizes, GAPS, (0, DEEP), (1, 4)):
        data, indices = video(size, LENGTH, gap, seed=0), list(range(start, start + FRAMES * stride, stride))
        limit_THWC = np.stack([centre(frame.to_ndarray()) for frame in by_libav(data, indices)])
        assert np.array_equal(by_lvdm(data, indices), limit_THWC), (size, gap, start, stride)
        runs: dict[str, Run] = {
            "lvdm": functools.partial(by_lvdm, data, indices),
            "libav": functools.partial(by_libav, data, indices),
            "decord": functools.partial(by_decord, data, indices),
        }
        seconds = race(runs)
        for peer in peers:
            ratios[peer].append(ratio(seconds, peer))
        row = [f"{size}, a key frame in {gap}, frame {start} on, stride {stride}"]
        row += [f"{1 / statistics.median(of):.1f}" for of in seconds.values()]
        rows.append([*row, *(f"{ratios[peer][-1]:.2f}" for peer in peers), str(misplaced(data, size, indices))])
        print(*rows[-1], sep=" | ", flush=True)
    means = {peer: statistics.geometric_mean(ratios[peer]) for peer in peers}
    rows.append(["geometric mean", "", "", "", *(f"{mean:.2f}" for mean in means.values()), ""])
    head = ["clips a second", "lvdm", "libav", "decord", "lvdm / libav", "lvdm / decord", "misplaced"]
    lines = [
        f"{FRAMES} frames of {SIDE}x{SIDE} out of H.264 with B-frames. libav alone seeks, decodes and scales the same",
        "frames to the same pixels, skips nothing and copies nothing out. decord is followed by torchvision's resize",
        "and centre crop of uint8; misplaced: its frames that look more like a neighbour than like the one asked for.",
        "",
        *table(head, rows),
    ]
    return lines, [
        Target("clips, lvdm / libav alone", means["libav"], least=0.9),
        Target("clips, lvdm / decord", means["decord"], least=1.1),
    ]


def batches(sizes: Sequence[str], shards: int, race: Race) -> tuple[list[str], list[Target]]:
    """Batches of clips from local shards, by the loader and by webdataset with the same decoder."""
    clip = ClipConfig(frames=FRAMES, height=SIDE, width=SIDE, start="center")
    samples = shards * PER_SHARD
    rows, ratios, wastes = [], [], []
    for size in sizes:
        folder = video_set(size, shards)
        source = VideoSource(shards=(str(folder),), clip=clip)
        data = DataConfig(kind="video", video=source, workers=0, text_dropout=0.0)
        loader = in_batches(data, BATCH, samples)
        urls = sorted(map(str, folder.glob("*.tar")))
        assert exhaust(loader) == by_webdataset(urls) == samples
        runs: dict[str, Run] = {
            "lvdm": functools.partial(exhaust, loader),
            "webdataset": functools.partial(by_webdataset, urls),
        }
        seconds = race(runs)
        ratios.append(ratio(seconds, "webdataset"))
        wastes.append(read_over_needed(loader, ("mp4", "txt")))
        row = [size, *(f"{samples / statistics.median(of):.1f}" for of in seconds.values())]
        rows.append([*row, f"{ratios[-1]:.3f}", f"{wastes[-1]:.4f}"])
        print(*rows[-1], sep=" | ", flush=True)
    lines = [
        f"Index, fetch, decode and collate of {samples} clips from the middle of videos of {SHORT} frames, in batches",
        f"of {BATCH} out of {shards} local shards; webdataset reads the shards in sequence, with a shuffle buffer.",
        "",
        *table(["clips a second", "lvdm", "webdataset", "lvdm / webdataset", "bytes read / needed"], rows),
    ]
    return lines, [
        Target("clips, loader / webdataset", statistics.geometric_mean(ratios), least=1.0),
        Target("clips, bytes read / needed", max(wastes), most=1.05),
    ]


def latents(shards: int, race: Race) -> tuple[list[str], list[Target]]:
    """Batches of latents from local shards, by the loader and as bytes alone."""
    rows, wastes = [], []
    samples = shards * LATENTS_PER_SHARD
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    for dtype in dtypes:
        folder = latent_set(dtype, shards)
        source = LatentSource(shards=(str(folder),))
        data = DataConfig(kind="latents", latents=source, workers=0, text_dropout=0.0)
        loader = in_batches(data, LATENT_BATCH, samples)
        paths = sorted(folder.glob("*.tar"))
        runs: dict[str, Run] = {"lvdm": functools.partial(exhaust, loader), "cat": functools.partial(cat, paths)}
        assert exhaust(loader) == samples
        megabytes = cat(paths) / 1e6
        seconds = race(runs)
        wastes.append(read_over_needed(loader, (latent_member(0), text_member(0, 0))))
        row = [dtype, *(f"{megabytes / statistics.median(of):.0f}" for of in seconds.values())]
        rows.append([*row, f"{ratio(seconds, 'cat'):.3f}", f"{wastes[-1]:.4f}"])
        print(*rows[-1], sep=" | ", flush=True)
    lines = [
        f"{samples} latents of {'x'.join(map(str, LATENT))} (mean and log-variance) with {TOKENS} text states of",
        f"{DIM}, in batches of {LATENT_BATCH}, fp32 and checked, against reading the shards into one buffer of 1 MiB.",
        "",
        *table(["MB a second", "lvdm", "cat", "lvdm / cat", "bytes read / needed"], rows),
    ]
    return lines, [Target("latents, bytes read / needed", max(wastes), most=1.05)]


def by_lvdm(data: bytes, indices: Sequence[int]) -> np.ndarray:
    """As the loader does."""
    return decode_frames(data, lambda info: indices, SIDE, SIDE)


def by_libav(data: bytes, indices: Sequence[int]) -> list[av.VideoFrame]:
    """The least that gives these frames: seek to the key frame before, decode up to the last, scale the wanted."""
    scaled = []
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.average_rate is not None
        assert stream.time_base is not None
        period = int(1 / stream.average_rate / stream.time_base)
        wanted = {index * period for index in indices}
        scale = SIDE / min(stream.width, stream.height)
        width, height = round(stream.width * scale), round(stream.height * scale)
        reformatter = VideoReformatter()
        container.seek(min(wanted), stream=stream)
        for frame in container.decode(stream):
            if frame.pts in wanted:
                scaled.append(reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1))
                if len(scaled) == len(wanted):
                    break
    return scaled


def by_decord(data: bytes, indices: Sequence[int]) -> Tensor:
    """As LVDM, VideoCrafter and Latte read."""
    reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
    frames_TCHW = torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)
    resized_TCHW = v2.functional.resize(frames_TCHW, [SIDE], antialias=True)
    cropped_TCHW: Tensor = v2.functional.center_crop(resized_TCHW, [SIDE, SIDE])
    return cropped_TCHW


def in_batches(data: DataConfig, batch: int, samples: int) -> Loader:
    """Our loader, for a pass over a set."""
    return build_loader(data, seed=0, batch=batch, micro=batch, world=1, rank=0, steps=samples // batch)


def by_webdataset(urls: Sequence[str]) -> int:
    """A pass of its usual pipeline, with the decoder of the loader; how many samples it gives."""
    start = (SHORT - FRAMES) // 2
    indices = range(start, start + FRAMES)

    def decode(sample: Mapping[str, bytes]) -> tuple[np.ndarray, str]:
        return by_lvdm(sample["mp4"], indices), sample["txt"].decode()

    def join(samples: Sequence[tuple[np.ndarray, str]]) -> tuple[Tensor, list[str]]:
        frames_BTHWC = torch.from_numpy(np.stack([frames_THWC for frames_THWC, _ in samples]))
        return frames_BTHWC.permute(0, 4, 1, 2, 3).contiguous(), [text for _, text in samples]

    pipeline = wds.WebDataset(list(urls), shardshuffle=False).shuffle(PER_SHARD).map(decode)
    return sum(len(frames_BCTHW) for frames_BCTHW, _ in pipeline.batched(BATCH, collation_fn=join))


def cat(paths: Sequence[Path]) -> int:
    """Read files one after the other; how many bytes they have."""
    buffer, total = bytearray(1 << 20), 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while read := file.readinto(buffer):
                total += read
    return total


def misplaced(data: bytes, size: str, indices: Sequence[int]) -> int:
    """How many of decord's frames look less like the frame asked for than like one of its neighbours."""
    width, height = SIZES[size]
    near = sorted({near for index in indices for near in range(max(index - 1, 0), min(index + 2, LENGTH))})
    frames = dict(zip(near, decode_frames(data, near, height, width), strict=True))
    theirs_THWC = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1).get_batch(indices).asnumpy()
    count = 0
    for index, frame_HWC in zip(indices, theirs_THWC, strict=True):
        apart = {i: np.abs(frame_HWC - frames[i].astype(np.int16)).mean() for i in near if abs(i - index) <= 1}
        count += min(apart, key=lambda i: apart[i]) != index
    return count


def read_over_needed(loader: Loader, members: Sequence[str]) -> float:
    """Bytes fetched for a pass over bytes of the members that make the samples."""
    assert loader.course is not None
    fetcher, needed = Fetcher(), 0
    for step in range(len(loader)):
        taken = loader.course.order.step(step)
        sources = loader.course.sources
        records = [r for e in taken.entries for r in sources[e.source].records(taken.bucket, e.place)]
        fetcher.samples(records)
        needed += sum(record.members[member][1] for record in records for member in members)
    return fetcher.read_bytes / needed


def exhaust(batches: Iterable[Sized]) -> int:
    """Samples of all batches."""
    return sum(map(len, batches))


def measure(runs: Mapping[str, Run], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds by name, after one warm-up, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], peer: str) -> float:
    """How many times as fast as the peer lvdm is."""
    return statistics.median(other / own for other, own in zip(seconds[peer], seconds["lvdm"], strict=True))


def centre(frame_HWC: np.ndarray) -> np.ndarray:
    """The middle of a scaled frame."""
    top, left = (frame_HWC.shape[0] - SIDE) // 2, (frame_HWC.shape[1] - SIDE) // 2
    return frame_HWC[top : top + SIDE, left : left + SIDE]


def video(size: str, length: int, gap: int, seed: int) -> bytes:
    """An MP4 of moving textures, made once."""
    path = cache_folder("bench") / f"{size}-{length}-{gap}-{seed}.mp4"
    if not path.exists():
        width, height = SIZES[size]
        with atomic_file(str(path)) as target, av.open(target, "w") as container:
            stream = container.add_stream("libx264", rate=FPS)
            stream.codec_context.thread_count = 1
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            keys = f"keyint={gap}:min-keyint={gap}:scenecut=0:bframes=3"
            stream.options = {"crf": "20", "preset": "medium", "x264-params": keys}
            for frame_HWC in moving_textures(width, height, length, seed):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
            container.mux(stream.encode())
    return path.read_bytes()


def moving_textures(width: int, height: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """A texture that pans, another that moves across it, and the noise of a sensor."""
    random = np.random.default_rng(seed)
    back_HWC = texture(random, width + length, height + length // 2)
    front_HWC = texture(random, width // 3, height // 3)
    noise_HWC = random.normal(0, 2, (height, 2 * width, 3)).astype(np.int16)
    for number in range(length):
        top, left = number // 2, number
        frame_HWC = back_HWC[top : top + height, left : left + width].copy()
        y = round((0.5 + 0.5 * np.sin(number / 20)) * (height - len(front_HWC)))
        x = round((0.5 + 0.5 * np.cos(number / 31)) * (width - front_HWC.shape[1]))
        frame_HWC[y : y + front_HWC.shape[0], x : x + front_HWC.shape[1]] = front_HWC
        shift = int(random.integers(width))
        yield np.clip(frame_HWC + noise_HWC[:, shift : shift + width], 0, 255).astype(np.uint8)


def texture(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Smooth noise of six scales, coarse ones strongest."""
    sum_HWC = np.zeros((height, width, 3))
    for scale in (4, 8, 16, 32, 64, 128):
        grain = random.integers(0, 256, (height // scale + 2, width // scale + 2, 3)).astype(np.uint8)
        smooth = Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC)
        sum_HWC += (np.asarray(smooth, np.float64) - 128) * scale**0.5
    return np.clip(sum_HWC / 15 + 128, 0, 255).astype(np.int16)


def video_set(size: str, shards: int) -> Path:
    """Shards of short videos, made once and indexed."""
    folder = cache_folder("bench") / f"{size}-{shards}x{PER_SHARD}"
    if not folder.exists():
        videos = [video(size, SHORT, GAPS[1], seed) for seed in range(VIDEOS)]
        with new_folder(folder) as place:
            for shard in range(shards):
                members = [{"mp4": videos[i % VIDEOS], "txt": b"two textures on the move"} for i in range(PER_SHARD)]
                write_shard(str(place), shard, with_keys(shard, members))
    build_index(str(folder))
    return folder


def latent_set(dtype: Literal["fp32", "bf16"], shards: int) -> Path:
    """Shards of random latents, made once and indexed."""
    folder = cache_folder("bench") / f"latents-2-{dtype}-{shards}x{LATENTS_PER_SHARD}"
    if not folder.exists():
        generator = torch.Generator().manual_seed(0)
        channels, *rest = LATENT
        with new_folder(folder) as place:
            for shard in range(shards):
                members = []
                for _ in range(LATENTS_PER_SHARD):
                    moments_CTHW = torch.randn((2 * channels, *rest), generator=generator)
                    states_LD = torch.randn((TOKENS, DIM), generator=generator)
                    members.append(
                        {
                            "txt": b"noise",
                            text_member(0, 0): pack_text(states_LD, dtype),
                            latent_member(0): pack_latent(moments_CTHW, dtype),
                        }
                    )
                write_shard(str(place), shard, with_keys(shard, members))
            info = LatentSetInfo(
                vae=LatentVAE(kind="lvdm", name="none", sha256=""),
                text=LatentText(name="none", sha256="", max_length=TOKENS, dim=DIM, mask_padding=True),
                scale=1.0,
                shift=0.0,
                clip=ClipConfig(),
                dtype=dtype,
                shapes=(LATENT,),
                samples=shards * LATENTS_PER_SHARD,
                lvdm_version=__version__,
            )
            write_latent_set(str(place), info, torch.zeros(1, DIM))
    build_index(str(folder))
    return folder


def with_keys(shard: int, members: Sequence[Mapping[str, bytes]]) -> list[ShardSample]:
    """Samples of a shard."""
    return [ShardSample(sample_key(shard, i, len(members)), one) for i, one in enumerate(members)]


if __name__ == "__main__":
    main()
