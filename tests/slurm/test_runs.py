"""Whatever happens to a run on SLURM, nobody has to come, and its weights are those of an unbroken one."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.slurm.scenarios import PATIENCE, Scenarios
from tests.train.runs import losses_of, state_of


def test_a_job_that_slurm_preempts_is_requeued_and_ends_with_the_same_bits(scenarios: Scenarios) -> None:
    outcome, unbroken = scenarios.preempted.result(PATIENCE), scenarios.unbroken_4.result(PATIENCE)
    log = (outcome.folder / f"slurm-preempted-{outcome.job}.log").read_text()
    assert outcome.ends == ("COMPLETED", 1, "0:0"), log
    assert outcome.facts["urgent"] == ("COMPLETED", 0, "0:0")
    assert log.count("2 nodes (n[1-2]) x 2 tasks") == 2
    assert "stopped to be started again (exit code 85); requeued" in log
    ranks = outcome.folder / "logs" / f"preempted-{outcome.job}"
    assert "asked to by SIGUSR1, after step" in (ranks / "rank-0000.log").read_text()
    assert {file.name for file in ranks.glob("rank-*")} == {f"rank-{rank:04d}.log" for rank in range(4)}
    assert same(outcome.folder / "run", unbroken)
    assert losses_of(outcome.folder / "run") == losses_of(unbroken)


def test_a_job_that_loses_a_node_goes_on_with_those_that_are_left(scenarios: Scenarios) -> None:
    outcome, unbroken = scenarios.shrunk.result(PATIENCE), scenarios.unbroken_2.result(PATIENCE)
    log = (outcome.folder / f"slurm-shrunk-{outcome.job}.log").read_text()
    assert outcome.ends[::2] == ("COMPLETED", "0:0"), log
    assert "start 1: 2 nodes (n[3-4])" in log
    assert "1 nodes (n3)" in log
    assert difference(outcome.folder / "run", unbroken) < 1e-5


def test_a_job_whose_batch_host_dies_goes_on_with_the_same_bits_on_a_spare_node(scenarios: Scenarios) -> None:
    outcome, unbroken = scenarios.moved.result(PATIENCE), scenarios.unbroken_2.result(PATIENCE)
    log = (outcome.folder / f"slurm-moved-{outcome.job}.log").read_text()
    assert outcome.ends == ("COMPLETED", 1, "0:0"), log
    assert "start 1: 2 nodes (n[8-9])" in log
    assert "start 2: 2 nodes (n[9-10])" in log
    assert same(outcome.folder / "run", unbroken)


def test_a_chain_of_jobs_runs_by_dependencies_with_a_task_of_its_array_killed(scenarios: Scenarios) -> None:
    outcome = scenarios.chain.result(PATIENCE)
    folder = outcome.folder
    assert set(outcome.facts["ends"].values()) == {("COMPLETED", 0, "0:0")}, outcome.facts
    log = (folder / f"slurm-toy-latents-{outcome.job}.log").read_text()
    assert outcome.ends == ("COMPLETED", 1, "0:0"), log
    assert "killed by signal 9 (exit code 137); requeued" in log
    assert contents(folder / "latents").keys() == contents(folder / "alone").keys()
    assert contents(folder / "latents") == contents(folder / "alone")
    assert len(list((folder / "latents").glob("*.tar"))) == 8
    assert json.loads((folder / "scores.json").read_text())["all"]["shape"]["of"] == 2


def contents(folder: Path) -> dict[str, bytes]:
    """The shards in a folder and their tables."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in {".tar", ".parquet"}}


def same(folder: Path, unbroken: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same tensors, moments and averages too, bit for bit."""
    found, wanted = state_of(folder / "checkpoints"), state_of(unbroken / "checkpoints")
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def difference(folder: Path, unbroken: Path) -> float:
    """Distance of all weights, live and averaged, in the newest checkpoints of two runs, relative to their size."""
    found, wanted = state_of(folder / "checkpoints"), state_of(unbroken / "checkpoints")
    names = [name for name in wanted if name.startswith(("master ", "ema "))]
    apart = torch.cat([(found[name] - wanted[name]).flatten() for name in names])
    return float(apart.norm() / torch.cat([wanted[name].flatten() for name in names]).norm())
