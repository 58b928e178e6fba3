"""Memory of a network's state on a rank, planned and measured, by component: ZeRO stages 1-3 on 1, 2 and 4 ranks.

    PYTHONPATH=. python tools/bench/memory.py

Every row of the first table is a training of its own: two steps of two micro-batches on each rank (gloo), of which the
second is watched while it goes forward, at the end of each backward pass, in the optimiser and after it. All tensors
that are alive are assigned to a component by the memory that they are views of.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from result import RESULTS, table, write_result

sys.path.insert(0, str(Path(__file__).parents[2]))

from lvdm.config import BatchConfig, EngineConfig, OptimConfig
from lvdm.engine.deepspeed_config import deepspeed_config
from lvdm.engine.memory_plan import COMPONENTS, memory_plan
from tests.engine import memory_cases
from tests.ranks import run_ranks, start_server

WORLDS, STAGES, PRECISIONS = (1, 2, 4), (1, 2, 3), ("fp32", "bf16")
SHAPE = {"channel_mult": (1,), "res_blocks": 1, "attention_levels": (), "heads": 4, "context_dim": 64}
CHANNELS = {"fp32": 192, "bf16": 128}
DEFAULT_BUCKET = 500_000_000
SHOWN = [name for name in COMPONENTS if name not in ("staging", "frozen copy")]


def main() -> None:
    """Train, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    arguments = parser.parse_args()
    start_server()
    rows, disk, sizes, worst, unknown = [], [], {}, 0.0, 0
    for precision in PRECISIONS:
        for stage in STAGES:
            for world in WORLDS:
                label = [f"{stage}, {precision}", str(world)]
                ranks = measure(precision, {"stage": stage, "precision": precision}, world)
                sizes[precision] = ranks[0]["formula"] // 16
                rows.append([*label, *(cell(ranks, name) for name in SHOWN), megabytes(ranks, "together")])
                worst = max([worst, *(error(rank, name) for rank in ranks for name in SHOWN)])
                unknown = max([unknown, *(rank["unknown"] for rank in ranks)])
                share = ranks[0]["on_disk"] / ranks[0]["formula"]
                disk.append([*label, *(f"{ranks[0][key]:,}" for key in ("formula", "on_disk")), f"{share:.4f}"])
                print(*rows[-1], flush=True)
    lines = [
        f"A text-to-video UNet of {sizes['fp32']:,} parameters in fp32, {sizes['bf16']:,} in bf16; accumulation over",
        f"{memory_cases.ACCUMULATION} micro-batches. MB by formula / measured of the rank with most, each component at",
        "the moment of a step at which it is largest; together: the most that all were at one moment, without saving.",
        "",
        *table(["stage", "ranks", *SHOWN, "together"], rows),
        "",
        f"Largest difference of any component on any rank: {worst:.2%}. Tensors that belong to no component, while no",
        f"activations are alive: {unknown:,} bytes at most.",
        "",
        f"What buckets of DeepSpeed's default size, {DEFAULT_BUCKET:,} elements, would take (two in stage 2 on GPUs):",
        "",
        *table(["", "buckets now", "by default", "a rank now", "by default"], before_and_after(sizes)),
        "",
        "Bytes of a checkpoint: 16 for every parameter that learns (master, two moments, average), and on disk, with",
        "headers and manifest:",
        "",
        *table(["written by stage", "ranks", "formula", "on disk", "ratio"], disk),
    ]
    write_result(arguments.out, "memory", "Memory of model states by component", ["torch", "deepspeed"], lines)


def measure(precision: str, case: memory_cases.Case, world: int) -> list[dict[str, Any]]:
    """`memory_cases.measure` by rank, with a checkpoint."""
    model = {**SHAPE, "model_channels": CHANNELS[precision]}
    with tempfile.TemporaryDirectory(prefix="lvdm-bench-") as folder:
        ranks = run_ranks(memory_cases.measure_all, world, model, [{**case, "folder": folder}], timeout=300)
    return [cases[0] for cases in ranks]


def cell(ranks: Sequence[dict[str, Any]], name: str) -> str:
    """Planned / found, of the rank that has most of it."""
    most = max(ranks, key=lambda rank: rank["found"][name])
    planned, found = most["planned"][name], most["found"][name]
    return f"{planned / 1e6:.2f} / {found / 1e6:.2f}" if planned or found else "0"


def megabytes(ranks: Sequence[dict[str, Any]], key: str) -> str:
    """The most of any rank."""
    return f"{max(rank[key] for rank in ranks) / 1e6:.2f}"


def error(rank: dict[str, Any], name: str) -> float:
    """Of the formula, as a fraction of what was found."""
    planned, found = rank["planned"][name], rank["found"][name]
    return abs(planned - found) / max(found, 1)


def before_and_after(sizes: dict[str, int]) -> list[list[str]]:
    """What our bucket size saves the networks of the table, on CPU, and LVDM's text-to-video UNet on 8 GPUs."""
    plans = [
        ("the network above", sizes["fp32"], "fp32", 2, False),
        ("the network above", sizes["bf16"], "bf16", 2, False),
    ]
    plans += [("958,924,964 parameters", 958_924_964, precision, 8, True) for precision in PRECISIONS]
    rows = []
    for label, size, precision, world, on_gpu in plans:
        for stage in (2, 3):
            batch = BatchConfig(size=2 * world, micro=1)
            engine = EngineConfig(zero_stage=stage, precision=precision)
            record = deepspeed_config(engine, batch, OptimConfig(lr=1e-4), world, on_gpu, learning=size)
            after = memory_plan([size], [], record, 0, world)
            record["zero_optimization"]["reduce_bucket_size"] = DEFAULT_BUCKET
            before = memory_plan([size], [], record, 0, world)
            place = f"{label}, {world} {'GPUs' if on_gpu else 'ranks'}, stage {stage}, {precision}"
            buckets = [f"{plan.device['buckets'] / 1e6:,.0f} MB" for plan in (after, before)]
            rows.append([place, *buckets, *(f"{sum(plan.device.values()) / 1e6:,.0f} MB" for plan in (after, before))])
    return rows


if __name__ == "__main__":
    main()
