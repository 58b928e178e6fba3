"""What saving, loading and exporting cost, against the limit or the peer measured beside it.

    PYTHONPATH=. python tools/bench/checkpoint.py

* the stall of a step that saves: beside the training, and waiting until the checkpoint is complete, on two ranks
* bytes a second of saving and loading, against copying the same bytes with fsync
* bytes on the disk, against 16 for each element that learns
* `tools/export_checkpoint.py` against DeepSpeed's `zero_to_fp32` on the same weights: seconds and peak memory

Rounds are interleaved and medians taken. Prints tables and writes them, dated, into ``tools/bench/results``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from result import RESULTS, table, write_result

from lvdm.checkpoint.folder import CheckpointFolder, Retention, open_checkpoint
from lvdm.checkpoint.manifest import MODEL
from lvdm.config import BatchConfig, EngineConfig, OptimConfig, TextUNetConfig, parse_training_config
from lvdm.engine import distributed, saving
from lvdm.engine.engine import Engine
from lvdm.models.build import build_model
from tests.ranks import run_ranks, start_server

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2
STALL, PEAK = 0.15, 0.4
"""What is to be reached."""


def main() -> None:
    """Measure everything, print it and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repetitions of each measurement")
    parser.add_argument("--channels", type=int, default=64, help="width of the UNet that is saved")
    parser.add_argument("--export-channels", type=int, default=192, help="width of the UNet that is exported")
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    given = parser.parse_args()
    start_server()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        lines = saving_lines(Path(scratch), given.channels, given.rounds)
        lines += export_lines(Path(scratch), given.export_channels, given.rounds)
    path = write_result(given.out, "checkpoint", "Checkpoints", ("torch", "deepspeed", "safetensors"), lines)
    print(f"written to {path}")


def saving_lines(scratch: Path, channels: int, rounds: int) -> list[str]:
    """Stall, throughput and size."""
    seen = run_ranks(measure_saving, WORLD, str(scratch / "saving"), channels, rounds, timeout=1800)[0]
    of = {name: statistics.median(values) for name, values in seen["seconds"].items()}
    size, learning = seen["bytes"], seen["learning"]
    call, slower = of["async call"], max(0.0, of["steps beside a save"] - of["steps"])
    whole = of["sync call"]
    rate = {name: f"{size / of[name] / 1e6:,.0f} MB/s" for name in ("sync call", "load", "copy of the same bytes")}
    return [
        f"## Saving {learning / 1e6:.1f} M parameters, {size / 1e6:,.0f} MB, by {WORLD} ranks in ZeRO-2",
        "",
        *table(
            ("what a save costs the training", "seconds", "of the synchronous save"),
            [
                ("synchronous: until the checkpoint is complete and verified", f"{whole:.3f}", "1"),
                ("asynchronous: until training goes on (the stall)", f"{call:.3f}", f"{call / whole:.3f}"),
                (
                    f"asynchronous: what {seen['steps']} steps take longer while it is written, on cores that they "
                    "share with the writer",
                    f"{slower:.3f}",
                    f"{slower / whole:.3f}",
                ),
            ],
        ),
        "",
        f"To be reached: a stall of at most {STALL}. {seen['steps']} steps take {of['steps']:.2f} s.",
        "",
        *table(
            ("same bytes", "rate", "of the copy"),
            [
                (name, rate[key], f"{of['copy of the same bytes'] / of[key]:.2f}")
                for name, key in (
                    ("copying the files with fsync", "copy of the same bytes"),
                    ("saving: copy to host memory, write, fsync, read back and check", "sync call"),
                    ("loading into the engines, every byte checked", "load"),
                )
            ],
        ),
        "",
        f"On the disk {size:,} bytes, by the formula 16 a parameter {16 * learning:,}: "
        f"{100 * (size / (16 * learning) - 1):.3f} % more, which are names and checksums.",
        "",
    ]


def measure_saving(root: str, channels: int, rounds: int) -> dict[str, Any]:
    """On each rank: seconds of everything, by name."""
    ranks = distributed.start(600)
    engine = engine_of(channels, ranks, stage=2)
    engines, folder = {MODEL: engine}, CheckpointFolder(root)
    saver = saving.Saver(folder, engines, Retention(last=1), ranks)
    seconds: dict[str, list[float]] = {}
    step = 0

    def timed(name: str, action: Callable[[], object]) -> float:
        distributed.barrier()
        began = time.perf_counter()
        action()
        took = time.perf_counter() - began
        seconds.setdefault(name, []).append(took)
        return took

    def save() -> None:
        nonlocal step
        step += 1
        saver.save(saving.describe(engines, step, clock={"samples": step}, facts={}, scores={}, config={}))

    def save_and_wait() -> None:
        save()
        saver.wait()

    train(engine, 1)
    save_and_wait()
    seconds.clear()
    one = min(timed("one step", lambda: train(engine, 1)) for _ in range(2))
    steps = max(2, round(3 * timed("warm up", save_and_wait) / one))
    steps = int(distributed.gather_json(steps, ranks.device)[0])
    for _ in range(rounds):
        timed("steps", lambda: train(engine, steps))
        timed("async call", save)
        timed("steps beside a save", lambda: train(engine, steps))
        saver.wait()
        timed("sync call", save_and_wait)
        timed("load", lambda: saving.restore(engines, saving.Resumption(folder, ranks)))
        timed("copy of the same bytes", lambda: copy_mine(Path(folder.location(folder.latest())), ranks.rank))
    saver.close()
    files = Path(folder.location(folder.latest())).iterdir()
    result = {
        "seconds": seconds,
        "steps": steps,
        "bytes": sum(file.stat().st_size for file in files),
        "learning": sum(torch.Size(shape).numel() for shape in engine.shapes().values()),
    }
    distributed.stop()
    return result


def engine_of(channels: int, ranks: distributed.Ranks, stage: int) -> Engine:
    """A text UNet of LVDM's kind, narrow or wide."""
    model = build_model(unet(channels), seed=1)
    config = EngineConfig(zero_stage=stage, precision="fp32")
    return Engine(model, config, BatchConfig(size=ranks.world, micro=1), OptimConfig(lr=1e-4), ranks)


def unet(channels: int) -> TextUNetConfig:
    """Two levels, a block each."""
    return TextUNetConfig(
        model_channels=channels, channel_mult=(1, 2, 4), res_blocks=1, heads=4, context_dim=64, temporal_length=2
    )


def train(engine: Engine, steps: int) -> None:
    """Optimiser steps on noise."""
    for _ in range(steps):
        noise = torch.randn(1, 4, 2, 8, 8)
        loss = (engine(noise, torch.zeros(1, dtype=torch.long), torch.zeros(1, 3, 64), None) - noise).square().mean()
        engine.backward(loss)
        engine.step(1e-4)


def copy_mine(folder: Path, rank: int) -> None:
    """Copy a rank's file beside it, durably, from the disk."""
    source = folder / f"rank-{rank:05d}.safetensors"
    target = folder.parent / f"copy-{rank}"
    with source.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    target.unlink()


def export_lines(scratch: Path, channels: int, rounds: int) -> list[str]:
    """Our export against DeepSpeed's."""
    run, stock = scratch / "run", scratch / "stock"
    parameters = run_ranks(save_both, WORLD, str(run), str(stock), channels, timeout=1800)[0]
    commands = {
        "tools/export_checkpoint.py --weights live": [
            str(ROOT / "tools" / "export_checkpoint.py"), str(run), "TARGET", "--weights", "live",
        ],
        "zero_to_fp32 --safe_serialization": [
            str(stock / "zero_to_fp32.py"), str(stock), "TARGET", "--safe_serialization",
        ],
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(max(3, rounds // 2)):
        for name, command in commands.items():
            target = scratch / f"export-{number}"
            took, peak = run_alone([str(target) if part == "TARGET" else part for part in command])
            seconds[name].append(took)
            peaks[name].append(peak)
            shutil.rmtree(target)
    took = {name: statistics.median(values) for name, values in seconds.items()}
    peak = {name: statistics.median(values) for name, values in peaks.items()}
    theirs = "zero_to_fp32 --safe_serialization"
    idle = run_alone(["-c", "import torch"])[1]
    largest = max(torch.Size(shape).numel() for shape in open_checkpoint(run).network().shapes.values())
    return [
        f"## Exporting {parameters / 1e6:.0f} M parameters ({parameters * 4 / 1e6:,.0f} MB in fp32) of {WORLD} ranks",
        "",
        *table(
            ("", "seconds", "ratio", "peak memory", "ratio"),
            [
                (
                    f"`{name}`",
                    f"{took[name]:.1f}",
                    f"{took[name] / took[theirs]:.2f}",
                    f"{peak[name] / 1e6:,.0f} MB",
                    f"{peak[name] / peak[theirs]:.2f}",
                )
                for name in commands
            ],
        ),
        "",
        f"To be reached: faster, and at most {PEAK} of its peak. Of the peak, Python and torch alone take "
        f"{idle / 1e6:,.0f} MB; the largest tensor has {largest * 4 / 1e6:,.0f} MB. Each in a process of its own, from "
        "start to exit.",
        "",
    ]


def save_both(run: str, stock: str, channels: int) -> int:
    """Save the same weights as ours and as DeepSpeed's checkpoint; their number."""
    ranks = distributed.start(600)
    engine = engine_of(channels, ranks, stage=2)
    train(engine, 1)
    saver = saving.Saver(CheckpointFolder(f"{run}/checkpoints"), {MODEL: engine}, Retention(), ranks)
    config = parse_training_config(training_of(channels), source="bench").model_dump(mode="json")
    saver.save(saving.describe({MODEL: engine}, 1, clock={"samples": 2}, facts={}, scores={}, config=config))
    saver.wait()
    saver.close()
    engine._engine.save_checkpoint(stock)
    distributed.stop()
    return sum(torch.Size(shape).numel() for shape in engine.shapes().values())


def training_of(channels: int) -> dict[str, Any]:
    """A training config around the UNet."""
    return {
        "task": "latent_diffusion",
        "run": {"folder": "bench", "steps": 1},
        "batch": {"size": 2, "micro": 1},
        "data": {"kind": "latents", "latents": {"shards": ["none"]}},
        "model": unet(channels).model_dump(mode="json"),
        "diffusion": {},
        "vae": {"kind": "diffusers", "name": "none", "scaling": "none"},
        "text": {"name": "none"},
        "optim": {"lr": 1e-4},
    }


def run_alone(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in bytes of a Python process."""
    before = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said[-2000:]}")
    return time.perf_counter() - before, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
