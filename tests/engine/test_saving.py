"""Saving beside the training, and restoring on other ranks, in other stages: real DeepSpeed, real writer processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.checkpoint.folder import open_checkpoint
from lvdm.checkpoint.pieces import KINDS
from tests.engine import saving_cases
from tests.ranks import run_ranks

WRITTEN = {
    "1-fp32": {"zero_stage": 1, "precision": "fp32"},
    "1-bf16": {"zero_stage": 1, "precision": "bf16"},
    "2-fp32-offload": {"zero_stage": 2, "precision": "fp32", "offload_optimizer": True},
    "2-bf16": {"zero_stage": 2, "precision": "bf16"},
    "3-fp32": {"zero_stage": 3, "precision": "fp32"},
    "3-bf16-offload": {"zero_stage": 3, "precision": "bf16", "offload_optimizer": True},
}
READ = {
    1: [("3-bf16-offload", "1-fp32"), ("2-fp32-offload", "3-fp32")],
    2: [("1-bf16", "3-fp32"), ("3-fp32", "1-bf16"), ("2-bf16", "2-bf16")],
    4: [("1-fp32", "3-bf16-offload"), ("3-bf16-offload", "2-bf16")],
}
"""By number of ranks: what was written, and the case that it is restored into."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    """A checkpoint of each case, by two ranks, and the state it was made from."""
    root = str(tmp_path_factory.mktemp("written"))
    return root, run_ranks(saving_cases.write_each, 2, root, WRITTEN)[0]


def assert_equal(actual: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(actual[name], wanted[name])] == []


@pytest.mark.parametrize("name", WRITTEN)
def test_a_checkpoint_is_the_state_of_its_step_although_training_went_on(written: Any, name: str) -> None:
    root, states = written
    checkpoint = open_checkpoint(f"{root}/{name}")
    for network in saving_cases.ADDRESSES:
        held = checkpoint.network(network)
        assert bool(held.frozen) == (network == "generator")
        assert held.optimizer_step == 2
        for parameter in held.shapes.keys() - set(held.frozen):
            for kind in KINDS:
                stored = checkpoint.parameter(kind, parameter, network)
                assert torch.equal(stored, states[name][f"{network} {kind} {parameter}"]), (network, kind, parameter)


@pytest.mark.parametrize("world", READ)
def test_other_ranks_in_other_stages_restore_every_bit(written: Any, world: int) -> None:
    root, states = written
    cases = {name: (name, WRITTEN[into]) for name, into in READ[world]}
    ranks = run_ranks(saving_cases.read_each, world, root, cases)
    for name in cases:
        assert_equal(ranks[0][name]["states"], states[name])
        assert ranks[0][name]["optimizer_steps"] == [2, 2]
    if (name := "2-bf16") in cases and world == 2:  # as it was written: each rank reads its own file and no other
        files = sorted(Path(root, name).glob("step-*/rank-*"))
        assert [rank[name]["bytes"] for rank in ranks] == [file.stat().st_size for file in files]


def test_a_slow_or_dead_writer_a_full_disk_and_a_store_without_an_answer_lose_nothing(
    disk: Callable[[str], Path], tmp_path: Path
) -> None:
    root = disk("size=80m") / "checkpoints"
    root.mkdir()
    ranks = run_ranks(saving_cases.slow_then_full, 2, str(root), str(root.parent / "filler"))
    main = ranks[0]
    assert main["latest while it is written"] == ""
    assert main["latest afterwards"] == "step-00000001"
    changed = [name for name in main["saved"] if not torch.equal(main["saved"][name], main["later"][name])]
    assert len(changed) > len(main["saved"]) / 2  # it was trained on
    checkpoint = open_checkpoint(root / "step-00000001")
    name = next(name for name in changed if name.startswith("discriminator master"))
    assert torch.equal(checkpoint.parameter("master", name.split()[-1], "discriminator"), main["saved"][name])
    checkpoint.close()

    for seen in ranks:
        assert seen["full"].startswith(f"UserError: cannot write checkpoint file {root}/.step-00000003.")
        assert seen["full"].endswith("No space left on device; step-00000001 is whole")
    assert main["left"] == ["latest", "step-00000001"]
    assert main["latest with room again"] == "step-00000004"
    assert main["latest after the writer died"] == "step-00000005"
    for seen in ranks:
        assert seen["no answer"] == "Requeue: no answer (on rank 0)"
