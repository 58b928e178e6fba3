"""Single flipped bits, anywhere in the state of one rank: real DeepSpeed on gloo ranks."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from lvdm.engine.bits import sums_of_bits
from tests.engine import desync_cases
from tests.ranks import run_ranks

CASES = {
    "1-bf16": {"zero_stage": 1, "precision": "bf16"},
    "2-bf16-offload": {"zero_stage": 2, "precision": "bf16", "offload_optimizer": True},
    "2-fp32": {"zero_stage": 2, "precision": "fp32"},
    "3-fp32": {"zero_stage": 3, "precision": "fp32"},
    "3-bf16": {"zero_stage": 3, "precision": "bf16"},
}
END = "; go on with run.resume=auto at the last checkpoint, which was checked"


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return run_ranks(desync_cases.each, 2, CASES, timeout=300)[0]


@pytest.fixture(scope="module")
def three() -> dict[str, Any]:
    return run_ranks(desync_cases.each, 3, {name: CASES[name] for name in ("2-fp32", "3-bf16")}, timeout=300)[0]


@pytest.mark.parametrize("case", CASES)
def test_a_bit_that_flips_between_two_updates_is_seen_wherever_it_is(two: dict[str, Any], case: str) -> None:
    said = two[case]
    assert said["nothing"] == said["nothing, afterwards"] == ""
    weights = "whole weights" if case.startswith("3") else "weights"
    at_rest = {name: weights for name in said if name.startswith("copy")} | {"frozen copy": weights}
    assert len(at_rest) == 5
    at_rest |= {"master": "fp32 masters", "master in a step": "fp32 masters"}
    at_rest |= {kind: kind for kind in ("exp_avg", "exp_avg_sq", "ema")}
    for name, kind in at_rest.items():
        assert said[name] == f"rank 1 (host1): its {kind} changed between two steps, as by faulty memory{END}", name


@pytest.mark.parametrize("case", CASES)
def test_of_two_ranks_the_one_is_named_that_is_not_what_a_master_says(two: dict[str, Any], case: str) -> None:
    said = two[case]
    for name in ("master in the update", "own copy in the update"):
        wanted = rf"^rank 1 \(host1\): the fp32 master of [a-z][\w.]+ is not what the network computes with{END}$"
        assert re.search(wanted, said[name])
    wanted = rf"^rank 1 \(host1\): [a-z][\w.]+ differs from other ranks'{END}$"
    assert re.search(wanted, said["another's copy in the update"])


BY_MAJORITY = {
    "frozen copy in the update": r"time_embed\.[\w.]+ differs from other ranks'",
    "frozen part": r"Sequential\.0\.weight differs from other ranks'",
    "buffer of a frozen part": r"Sequential\.1\.running_var differs from other ranks'",
    "clock": r"the clock differs from other ranks': samples is 8, 9",
}


def test_where_nothing_tells_which_of_two_ranks_is_right_both_are_named(two: dict[str, Any]) -> None:
    for case, what in itertools.product(CASES, BY_MAJORITY):
        assert re.search(rf"^rank 0 \(host0\) and rank 1 \(host1\): {BY_MAJORITY[what]}{END}$", two[case][what])


def test_of_three_ranks_the_odd_one_is_named(three: dict[str, Any]) -> None:
    for case, what in itertools.product(three, [*BY_MAJORITY, "another's copy in the update"]):
        wanted = BY_MAJORITY.get(what, r"[a-z][\w.]+ differs from other ranks'")
        assert re.search(rf"^rank 1 \(host1\): {wanted}(, 8)?{END}$", three[case][what])
        assert three[case]["nothing, afterwards"] == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float64])
def test_every_bit_counts_in_a_checksum_and_the_place_in_memory_does_not(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    size = torch.empty((), dtype=dtype).element_size()
    data = torch.randint(0, 256, (21 * size,), dtype=torch.uint8, generator=generator)
    whole = checksum(data.view(dtype))
    for byte, bit in itertools.product(range(len(data)), range(8)):
        changed = data.clone()
        changed[byte] ^= 1 << bit
        assert checksum(changed.view(dtype)) != whole
    for offset in range(9):
        moved = torch.cat([torch.zeros(offset * size, dtype=torch.uint8), data]).view(dtype)[offset:]
        assert checksum(moved) == whole
    assert checksum(data.view(dtype).reshape(3, 7).t()) == checksum(data.view(dtype).reshape(3, 7).t().contiguous())
    assert checksum(data.view(dtype)[:0]) == 0


def checksum(tensor: torch.Tensor) -> int:
    return int(sums_of_bits([tensor], torch.device("cpu"))[0])
