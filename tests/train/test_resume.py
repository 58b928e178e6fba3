"""Runs that stop and go on: killed, on other ranks, in other stages."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import fsspec
import pytest
import torch

from lvdm.checkpoint.folder import open_checkpoint
from lvdm.checkpoint.reader import Checkpoint
from lvdm.config import parse_training_config
from lvdm.errors import UserError
from lvdm.train import loop, run_folder
from lvdm.train.run_folder import RunFolder
from tests.checkpoint.files import write_checkpoint
from tests.conftest import Toy, copy_with_broken_clips
from tests.data.stores import s3_server
from tests.ranks import Launch, run_ranks
from tests.train import chaos
from tests.train.runs import log_of, losses_of, run, samples_of, state_of, wait_for_step

REMAT = {"engine__activation_checkpointing": True}
"""Which changes no bit, so that not every run here needs it."""


@pytest.fixture(scope="module")
def straight(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks in ZeRO-2, never stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    run_ranks(run, 2, toy.diffusion(folder, **REMAT))
    return folder


def test_kill_and_resume_is_bit_for_bit_the_straight_run(toy: Toy, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tree = toy.diffusion(folder, run__save_every=3, run__steps=10**6, **REMAT)
    launch = Launch(run, 2, (tree,))
    wait_for_step(folder, 5)
    launch.kill()  # SIGKILL to both ranks, somewhere behind step 5
    assert (folder / "checkpoints" / "latest").read_text() in {"step-00000003", "step-00000006"}
    for newer in folder.glob("checkpoints/step-*[!3]"):
        newer.rename(newer.with_name(".out-of-the-way"))  # so that it goes on from step 3, however late the kill came
    run_ranks(run, 2, toy.diffusion(folder, **REMAT))
    assert_equal_state(folder, straight)
    assert losses_of(folder) == losses_of(straight)
    assert [line["step"] for line in log_of(folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 5e-4)])
def test_other_ranks_and_stages_go_on_with_the_same_run(toy: Toy, tmp_path: Path, precision: str, bound: float) -> None:
    folder, unbroken, steps = tmp_path / "run", tmp_path / "unbroken", 8
    options = {"engine__precision": precision, "run__log_samples": True}
    run_ranks(run, 2, toy.diffusion(unbroken, run__steps=steps, **options))
    changes = sorted(random.Random(precision).sample(range(1, steps), 3))
    for (world, stage), end in zip(((2, 2), (1, 1), (4, 3), (2, 2)), [*changes, steps], strict=True):
        run_ranks(run, world, toy.diffusion(folder, run__steps=end, engine__zero_stage=stage, **options))
    assert samples_of(folder) == samples_of(unbroken)
    assert losses_of(folder) == pytest.approx(losses_of(unbroken), rel=bound)
    there, here = state_of(unbroken), state_of(folder)
    assert there.keys() == here.keys()
    for name in there if precision == "fp32" else []:
        torch.testing.assert_close(here[name], there[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    worst = max(abs(a - b) / b for a, b in zip(losses_of(folder), losses_of(unbroken), strict=True))
    print(f"{precision}: changes behind steps {changes}, losses differ by {worst:.1e} at most")


def test_checkpoints_in_a_store_serve_a_killed_run_as_those_on_a_disk_do(
    toy: Toy, straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    tree = toy.diffusion(
        folder, run__checkpoints="s3://runs/toy", run__save_every=2, run__keep=1, run__log_samples=True
    )
    (tmp_path / "s3").mkdir()
    with s3_server(tmp_path / "s3") as endpoint:
        s3 = {"endpoint_url": endpoint, "key": "any", "secret": "any"}
        store = fsspec.filesystem("s3", **s3)
        store.makedirs("runs", exist_ok=True)
        launch = Launch(chaos.run_armed, 2, (chaos.Kill("step", rank=1, number=5, delay=0.0, twice=False), tree, s3))
        with pytest.raises(AssertionError, match=r"Requeue: another rank died or hangs; step-0000000[24] is whole"):
            launch.results()
        said = run_ranks(run, 2, tree, s3)
        assert re.search(r"going on at step [24];", said[0]), said[0]
        fsspec.config.conf["s3"] = s3
        try:
            assert_equal_state(folder, straight)
        finally:
            del fsspec.config.conf["s3"]
        store.invalidate_cache()
        assert sorted({path.split("/")[2] for path in store.find("runs/toy")}) == ["latest", "step-00000006"]
    assert not (folder / "checkpoints").exists()


def test_another_batch_size_goes_on_behind_the_samples_already_seen(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_ranks(run, 1, toy.diffusion(folder, run__steps=2))
    run_ranks(run, 1, toy.diffusion(folder, run__steps=4, batch__size=2))
    assert open_checkpoint(folder).manifest.clock["samples"] == 2 * 4 + 2 * 2


def test_damaged_newest_checkpoint_is_named_and_passed_over(toy: Toy, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_ranks(run, 2, toy.diffusion(folder, run__save_every=3))
    damaged = folder / "checkpoints" / "step-00000006" / "rank-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    said = run_ranks(run, 2, toy.diffusion(folder, run__steps=5, run__keep=1))
    assert f"damaged checkpoint passed over: {damaged} has changed" in said[0]
    assert "going on at step 3" in said[0]
    assert said[1] == ""
    said = run_ranks(run, 2, toy.diffusion(folder))  # the damaged one has not taken the place of step 5
    assert "going on at step 5" in said[0]
    assert_equal_state(folder, straight)


def test_a_clock_of_another_version_is_one_line(tmp_path: Path) -> None:
    known, unknown = {"step": 1, "samples": 4}, {"step": 1, "samples": 4, "moon": 1, "sun": 2}
    assert loop._clock_of(Checkpoint(write_checkpoint(tmp_path / "a", clock=known))) == loop.Clock(step=1, samples=4)
    other = Checkpoint(write_checkpoint(tmp_path / "b", clock=unknown, written_by={"lvdm": "9"}))
    with pytest.raises(UserError, match=r"b/step-00000001 was written by lvdm 9, whose clock has moon, sun; go on"):
        loop._clock_of(other)


def test_a_kill_while_a_folder_is_claimed_leaves_one_that_can_be_entered(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(parse_training_config(toy.diffusion(tmp_path / "run"), source="test"))
    (tmp_path / "run" / ".writing-1").mkdir(parents=True)  # killed while the first file was written
    assert folder.enter() == []

    def killed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "describe_environment", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.claim(1)
    assert folder.enter() == []


def test_all_checkpoints_damaged_is_an_error_and_no_new_start(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_ranks(run, 1, toy.diffusion(folder, run__steps=1))
    (folder / "checkpoints" / "step-00000001" / "manifest.json").write_text("{")
    with pytest.raises(AssertionError, match=r"every checkpoint in .* is damaged"):
        run_ranks(run, 1, toy.diffusion(folder))


def test_a_stream_goes_on_behind_its_finished_shards_on_other_ranks(toy: Toy, tmp_path: Path) -> None:
    folder, shards = tmp_path / "run", tmp_path / "shards"
    copy_with_broken_clips(Path(toy.shards), shards, 2)  # one in the first shard, one in the second: traces of reading
    tree = {"data__kind": "stream", "data__shuffle": False, "data__video__shards": [str(shards)]}
    (said,) = run_ranks(run, 1, toy.diffusion(folder, run__steps=3, **tree))
    assert "streaming 3 shards without an index: resume is by whole shards" in said
    assert traces(folder) == ["00000", "00001"]
    with (folder / "replaced.jsonl").open("a") as file:
        file.write('{"step": 4, "shard": "/of/a/step/that/is/done/again.tar"}\n{"step": 4, "sha')
    # 12 samples and 2 bad ones: the first shard of ten is finished, the second is not
    assert finished_of(folder) == (1, [])

    said = run_ranks(run, 2, toy.diffusion(folder, run__steps=6, **tree))
    assert f"{shards}: going on behind 1 finished shard, 0.33 passes" in said[0]
    assert said[1] == ""
    # one rank takes 6 samples of the second shard from its beginning, the other 4 of the third and 2 of the next pass
    assert traces(folder) == ["00000", "00001", "00001"]
    assert finished_of(folder) == (1, [2])
    assert [line["step"] for line in log_of(folder)] == [1, 2, 3, 4, 5, 6]


def traces(folder: Path) -> list[str]:
    """Shards of the bad samples that a run met."""
    lines = (folder / "replaced.jsonl").read_text().splitlines()
    return [Path(json.loads(line)["shard"]).stem for line in lines]


def finished_of(folder: Path) -> tuple[int, list[int]]:
    (one,) = open_checkpoint(folder).manifest.clock["data"]["sets"]
    return one["next"], one["finished"]


def assert_equal_state(one: Path, other: Path) -> None:
    mine, theirs = state_of(one), state_of(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
