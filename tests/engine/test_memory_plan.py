"""The plan of a rank's memory against the tensors of real training."""

from __future__ import annotations

from typing import Any

import pytest

from lvdm.config import BatchConfig, EngineConfig, OptimConfig
from lvdm.engine.deepspeed_config import BUCKET, deepspeed_config
from lvdm.engine.memory_plan import COMPONENTS, MemoryPlan, memory_plan
from tests.engine import memory_cases
from tests.ranks import run_ranks

# Odd sizes, which every stage has to pad.
MODEL = {
    "model_channels": 15,
    "channel_mult": (1,),
    "res_blocks": 1,
    "attention_levels": (),
    "heads": 3,
    "context_dim": 5,
    "temporal_length": 2,
    "norm_groups": 5,
}
CASES: dict[str, memory_cases.Case] = {}
for stage in (1, 2, 3):
    CASES[f"zero{stage}_fp32"] = {"stage": stage, "precision": "fp32"}
    # Several buckets, none smaller than a parameter.
    CASES[f"zero{stage}_bf16"] = {"stage": stage, "precision": "bf16", "frozen": True, "bucket": 8000}
CASES |= {f"{name}_offload": {**CASES[name], "offload": True} for name in ("zero2_fp32", "zero2_bf16", "zero3_bf16")}


Results = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By rank and case."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    cases = [{**case, "folder": folder if name == "zero2_bf16" else ""} for name, case in CASES.items()]
    ranks = run_ranks(memory_cases.measure_all, 2, MODEL, cases, timeout=300)
    return [dict(zip(CASES, rank, strict=True)) for rank in ranks]


@pytest.mark.parametrize("case", CASES)
def test_every_component_is_as_large_as_planned(measured: Results, case: str) -> None:
    for rank in measured:
        planned, found = rank[case]["planned"], rank[case]["found"]
        for component in set(COMPONENTS) - {"saving"}:
            # Stage 2 pads the last rank's gradients by a tensor of their own.
            assert found[component] == pytest.approx(planned[component], abs=8), component
        # The file that it becomes has a header of up to 200 bytes a piece.
        assert planned["saving"] < found["saving"] < planned["saving"] + 4 * 200 * 108, "saving"


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_is_overlooked(measured: Results, case: str) -> None:
    assert all(rank[case]["unknown"] <= memory_cases.SMALL for rank in measured)


def test_checkpoint_on_disk_has_the_size_of_the_formula(measured: Results) -> None:
    result = measured[0]["zero2_bf16"]
    overhead = result["on_disk"] - result["formula"]
    saving = sum(rank["zero2_bf16"]["found"]["saving"] for rank in measured)
    assert 0 < saving - result["formula"] < overhead < saving - result["formula"] + 30_000  # the manifest


def plan(stage: int, precision: str, world: int, learning: list[int], rank: int = 0, **more: Any) -> MemoryPlan:
    engine = EngineConfig(zero_stage=stage, precision=precision, **more)
    batch = BatchConfig(size=2 * world, micro=1)
    record = deepspeed_config(engine, batch, OptimConfig(lr=1e-4), world, on_gpu=True, learning=sum(learning))
    return memory_plan(learning, [], record, rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_together_save_every_element_once(stage: int, world: int) -> None:
    learning = [7, 1, 130, 2, 16, 5]
    saved = [plan(stage, "fp32", world, learning, rank).host["saving"] for rank in range(world)]
    assert sum(saved) == 16 * sum(learning)


def test_buckets_are_no_larger_than_the_network_and_bounded() -> None:
    assert plan(2, "bf16", 2, [1000, 24]).device["buckets"] == 2 * 2 * 1024  # two, in bf16
    assert plan(3, "bf16", 2, [1000, 24]).device["buckets"] == 4 * 1024
    assert plan(3, "bf16", 2, [10**9]).device["buckets"] == 4 * BUCKET
    assert plan(1, "bf16", 2, [1000, 24]).device["buckets"] == 0


def test_offload_moves_optimizer_state_to_the_host() -> None:
    here, away = (plan(3, "bf16", 2, [1000, 24], offload_optimizer=offload) for offload in (False, True))
    for component in ("masters", "moments", "EMA", "accumulation"):
        assert here.device[component] == here.bytes_of(component) == away.host[component] == away.bytes_of(component)


def test_plan_reads_as_one_line() -> None:
    text = str(plan(2, "bf16", 8, [958_924_964]))
    assert text.startswith("model states 4.52 GB a rank (parameters 1.92 GB, accumulation 479.5 MB, masters 479.5 MB, ")
    assert text.endswith(", host memory 1.92 GB (saving 1.92 GB)")
