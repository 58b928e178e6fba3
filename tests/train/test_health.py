"""Faults in the middle of real runs on two ranks: bad batches, spikes, a flipped bit, a slow rank.

The data is read in order, four samples a step, so that the samples of step s are the rows 4 (s - 1) to 4 s - 1.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from lvdm.checkpoint import manifest as manifests
from lvdm.checkpoint.folder import CheckpointFolder, open_checkpoint
from lvdm.config import HealthConfig
from lvdm.data.build_index import build_index
from lvdm.data.index import open_index
from lvdm.train.guard import Guard
from tests.conftest import Toy
from tests.data.stores import free_port
from tests.ranks import run_ranks
from tests.train import health_cases
from tests.train.runs import log_of, state_of

HOST = socket.gethostname()
BATCH, SAVE_EVERY, STEPS = 4, 3, 7
HEALTH = {"warmup_steps": 2, "spike_steps": 2, "check_every": 2}
Tensors = dict[str, torch.Tensor]


def rows_of(step: int) -> list[int]:
    """The samples of a step."""
    return list(range(BATCH * (step - 1), BATCH * step))


def poisoned(source: str, target: Path, kind: str, rows: list[int], change: Callable[[Tensors], None]) -> str:
    """A copy of a folder of latents in which the member ``kind`` of some samples is changed."""
    shutil.copytree(source, target)
    index = open_index([str(target)])
    for row in rows:
        record = index[row]
        (member,) = [name for name in record.members if name.endswith(f"{kind}.safetensors")]
        offset, size = record.members[member]
        with open(record.shard, "r+b") as file:
            file.seek(offset)
            tensors = load(file.read(size))
            change(tensors)
            data = save(tensors)
            assert len(data) == size
            file.seek(offset)
            file.write(data)
    build_index(str(target))
    return str(target)


def huge_text(tensors: Tensors) -> None:
    """Finite, but no product with it is."""
    tensors["states"].fill_(3e38)


def huge_means(tensors: Tensors) -> None:
    """As large as a latent may be."""
    means, _ = tensors["moments"].chunk(2)
    means.fill_(900.0)


class Runs:
    """All runs of this file, in two goes: those with faults, then those that go on and those they are compared with."""

    def __init__(self, toy: Toy, root: Path) -> None:
        self.root, self.toy = root, toy
        self.nan = poisoned(toy.latents, root / "latents-nan", "text", [17], huge_text)
        self.spike = poisoned(toy.latents, root / "latents-spike", "latent", [*rows_of(4), *rows_of(5)], huge_means)
        self.one = poisoned(toy.latents, root / "latents-one", "latent", rows_of(5), huge_means)
        self.ended: dict[str, list[str]] = {}

        self.go(
            straight=(toy.latents, {}, ""),
            nan=(self.nan, {}, ""),
            spike=(self.spike, {}, ""),
            once=(self.spike, {"health__rollbacks": 0}, ""),
            one=(self.one, {"run__steps": 5, "health__warmup_steps": 4}, ""),
            flip=(toy.latents, {}, "flip 10"),
            cut=(self.spike, {"run__steps": 5, "health__spike_steps": 0}, ""),
        )
        for name, steps in {"spike_reference": [4, 5], "nan_reference": [5]}.items():
            shutil.copytree(self.root / "straight", self.root / name)
            self.amend(name, steps)
        usual = Guard(HealthConfig(warmup_steps=4))
        for line in log_of(self.root / "one")[:4]:
            usual.see(line["step"], line["grad_norm"])
        self.limit = usual.limit
        self.go(
            spike=(self.spike, {}, ""),
            spike_reference=(toy.latents, {}, ""),
            nan_reference=(toy.latents, {}, ""),
            one_reference=(
                self.one, {"run__steps": 5, "optim__clip_grad_norm": self.limit, "health__clip_sigmas": 0}, ""
            ),
            flip=(toy.latents, {}, ""),
            cut=(self.spike, {}, ""),
            slow=(toy.latents, {"run__steps": 13, "run__log_every": 4}, "slow"),
        )  # fmt: skip

    def go(self, **runs: tuple[str, dict[str, Any], str]) -> None:
        """Start each run in its folder, as a job would: latents, changes of the config, fault."""
        common = {
            "run__steps": STEPS,
            "run__save_every": SAVE_EVERY,
            "run__keep": 9,
            "data__shuffle": False,
            "data__text_dropout": 0.0,
            "optim__clip_grad_norm": 0.0,
            **{f"health__{name}": value for name, value in HEALTH.items()},
        }
        trees = [
            self.toy.diffusion(self.root / name, **common | {"data__latents__shards": [latents]} | changes)
            for name, (latents, changes, _) in runs.items()
        ]
        faults = [fault for _, _, fault in runs.values()]
        ports = [free_port() for _ in runs]
        for name, *ended in zip(runs, *run_ranks(health_cases.each, 2, trees, ports, faults, timeout=300), strict=True):
            assert ended[0] == ended[1], name
            self.ended.setdefault(name, []).append(ended[0])

    def amend(self, name: str, steps: list[int]) -> None:
        """Let a run go on from step 3 without the samples of ``steps``, by writing the manifest by hand."""
        for newer in (6, STEPS):
            shutil.rmtree(self.root / name / "checkpoints" / f"step-{newer:08d}")
        checkpoint = open_checkpoint(self.root / name)
        assert checkpoint.manifest.step == 3
        clock = checkpoint.manifest.clock | {"passed_over": steps}
        document = manifests.seal(checkpoint.manifest.model_copy(update={"clock": clock}))
        Path(checkpoint.location, "manifest.json").write_bytes(document)

    def events(self, name: str) -> list[dict[str, Any]]:
        """What a run noted, without the times."""
        lines = (self.root / name / "events.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]

    def same(self, one: str, other: str) -> bool:
        """Whether two runs ended with the same weights, moments and averages, bit for bit."""
        mine, theirs = state_of(self.root / one), state_of(self.root / other)
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def runs(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(toy, tmp_path_factory.mktemp("health"))


def test_a_batch_that_gives_nan_on_one_rank_is_skipped_by_all_and_named(runs: Runs) -> None:
    assert runs.ended["straight"] == runs.ended["nan"] == ["done"]
    assert not (runs.root / "straight" / "events.jsonl").exists()
    (event,) = runs.events("nan")
    assert (event["kind"], event["step"], event["positions"]) == ("non_finite", 5, rows_of(5))
    (suspect,) = event["suspects"]
    assert suspect == {"rank": suspect["rank"], "host": HOST, "positions": [17], "loss": "nan"}
    assert event["message"] == (
        f"gradients are not finite; no rank took the step; loss of rank {suspect['rank']} ({HOST}) at positions 17: nan"
    )
    checkpoint = open_checkpoint(runs.root / "nan").manifest
    assert (checkpoint.clock["skipped_steps"], checkpoint.networks["model"].optimizer_step) == ([5], STEPS - 1)
    assert runs.same("nan", "nan_reference")
    assert not runs.same("nan", "straight")


def test_a_spike_sends_the_run_back_and_on_without_its_samples(runs: Runs) -> None:
    back, end = runs.ended["spike"]
    told = "the gradient norm spiked from step 4 on (2 times in a row); back to step-00000003, then on without the "
    assert back.startswith(f"RolledBack: {told}samples of steps 4 to 5; ")
    assert end == "done"
    *spikes, rolled_back = runs.events("spike")
    assert [(event["kind"], event["step"], event["positions"]) for event in spikes[:2]] == [
        ("spike", 4, rows_of(4)),
        ("spike", 5, rows_of(5)),
    ]
    assert all(suspect["host"] == HOST for event in spikes for suspect in event["suspects"])
    assert rolled_back["kind"] == "rolled_back"
    clock = open_checkpoint(runs.root / "spike").manifest.clock
    assert (clock["passed_over"], clock["guard"]["rollbacks"]) == ([4, 5], 1)
    assert runs.same("spike", "spike_reference")
    assert not runs.same("spike", "straight")


def test_a_run_that_was_stopped_at_its_last_spike_goes_back_as_one_that_was_not(runs: Runs) -> None:
    end, back = runs.ended["cut"]
    assert end == "done"
    assert back == runs.ended["spike"][0]
    newest = open_checkpoint(runs.root / "cut").manifest
    assert (newest.step, newest.clock["passed_over"], newest.clock["guard"]["rollbacks"]) == (3, [4, 5], 1)


def test_one_return_too_many_is_an_error(runs: Runs) -> None:
    (once,) = runs.ended["once"]
    assert once.startswith("UserError: the gradient norm spiked from step 4 on (2 times in a row), after 0 returns to")
    assert CheckpointFolder(runs.root / "once" / "checkpoints").latest() == "step-00000003"


def test_a_single_spike_is_clipped_to_what_is_usual_and_no_more(runs: Runs) -> None:
    assert runs.ended["one"] == runs.ended["one_reference"] == ["done"]
    (event,) = runs.events("one")
    assert (event["kind"], event["step"], event["positions"]) == ("spike", 5, rows_of(5))
    norms = [line["grad_norm"] for line in log_of(runs.root / "one")]
    assert max(norms[:4]) < runs.limit < norms[4] / 10
    assert event["grad_norm"] == norms[4]
    assert [line["clipped_steps"] for line in log_of(runs.root / "one")] == [0, 0, 0, 0, 1]
    assert runs.same("one", "one_reference")


def test_a_flipped_bit_names_the_rank_and_the_run_goes_on_as_if_it_had_not_been(runs: Runs) -> None:
    found, end = runs.ended["flip"]
    assert found.startswith(f"Requeue: rank 1 ({HOST}): its weights changed between two steps, as by faulty memory; ")
    assert end == "done"
    assert runs.same("flip", "straight")


def test_a_rank_that_computes_ten_times_as_long_is_named(runs: Runs) -> None:
    assert runs.ended["slow"] == ["done"]
    (event,) = runs.events("slow")
    assert (event["kind"], event["rank"], event["host"]) == ("straggler", 1, HOST)
    assert event["seconds"] > 4 * event["median"] > 0
    assert event["message"].startswith(f"rank 1 ({HOST}) computes for ")
    assert all(line["ranks/work_max"] > 4 * line["ranks/work_median"] for line in log_of(runs.root / "slow")[1:])
