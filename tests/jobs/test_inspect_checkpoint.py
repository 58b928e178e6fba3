"""What checkpoints hold, in numbers that are computed here another way; damage and differences by exit code."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.checkpoint.manifest import Network
from tests.checkpoint.files import NETWORKS, Tensors, make_tensors, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools/inspect_checkpoint.py")
WRITER = {"ranks": 3, "zero_stage": 2, "precision": "bf16", "lvdm": "0.1", "torch": "2.9", "deepspeed": "0.19"}


class Command:
    """The command, called in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.said = ""
        """What the last call wrote to stderr."""

    def __call__(self, *arguments: str | Path, code: int = 0) -> str:
        """Standard output of a call, whose exit code is checked."""
        self._monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", *map(str, arguments)])
        found: Any = 0
        try:
            runpy.run_path(TOOL, run_name="__main__")
        except SystemExit as stop:
            found = stop.code
        written = self._capsys.readouterr()
        self.said = written.err
        assert found == code, written.out + written.err
        return written.out

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        """The same, as JSON, strictly."""
        return json.loads(self(*arguments, "--json", code=code), parse_constant=pytest.fail)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 to 3; the second is the best."""
    for step in (1, 2, 3):
        write_checkpoint(
            tmp_path / "run/checkpoints", step, scores={"val/loss": 1 / step}, written_by=WRITER,
            clock={"step": step, "samples": 1000 * step, "skipped_steps": [2]}, facts={"scale": 0.5},
        )  # fmt: skip
    (tmp_path / "run/checkpoints/best").write_text("step-00000002")
    return tmp_path / "run"


def cut_off(checkpoint: Path) -> Path:
    """Take the last byte of a file away."""
    file = sorted(checkpoint.glob("rank-*"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    return file


def flip(checkpoint: Path) -> Path:
    """Change the last byte of a file."""
    file = sorted(checkpoint.glob("rank-*"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file


def test_a_run_is_listed_and_its_newest_shown(run: Path, command: Command) -> None:
    found = command.json(run)
    assert [one["name"] for one in found["checkpoints"]] == [f"step-0000000{n}" for n in (3, 2, 1)]
    assert [one["marks"] for one in found["checkpoints"]] == [["latest"], ["best"], []]
    for one in found["checkpoints"]:
        files = list((run / "checkpoints" / one["name"]).glob("rank-*"))
        assert one["bytes"] == sum(file.stat().st_size for file in files)
        assert (one["samples"], one["scores"]) == (1000 * one["step"], {"val/loss": 1 / one["step"]})
    newest = found["checkpoint"]
    assert (newest["step"], newest["written_by"], newest["facts"]) == (3, WRITER, {"scale": 0.5})
    model, other = newest["networks"]["model"], newest["networks"]["discriminator"]
    assert (model["learning"], model["frozen"], model["tensors"], model["optimizer_step"]) == (12 + 5 + 24, 14, 5, 7)
    assert model["bytes"] == dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "ema"), 4 * 41) | {"frozen": 4 * 14}
    assert (other["learning"], other["frozen"], "frozen" in other["bytes"]) == (13, 0, False)

    text = command(run)
    rows = [line for line in text.splitlines() if line.lstrip().startswith("step-0000000")]
    assert [line.split()[:3] for line in rows] == [[f"step-0000000{n}", str(n), f"{n},000"] for n in (3, 2, 1)]
    assert [line.split()[5:] for line in rows] == [["0.333333", "latest"], ["0.5", "best"], ["1"]]
    assert len({line.index("kB") for line in rows}) == 1
    assert "3 (3,000 samples, 7 of model, 6 of discriminator optimizer steps)" in text
    assert "3 ranks, ZeRO stage 2, bf16; lvdm 0.1, torch 2.9, deepspeed 0.19" in text
    assert "skipped_steps [2]" in text


def test_norms_are_those_of_the_tensors(tmp_path: Path, command: Command) -> None:
    tensors = make_tensors(5)
    tensors["exp_avg", "model", "block.weight"][1, 2] = math.nan
    tensors["exp_avg", "model", "block.weight"][0, 0] = -math.inf
    tensors["master", "discriminator", "head.scale"].zero_()
    location = write_checkpoint(tmp_path, 5, tensors)
    rows = {(row["network"], row["name"]): row for row in command.json(location, "--norms")["norms"]}
    assert len(rows) == 7
    for (kind, network, name), tensor in tensors.items():
        finite = tensor[tensor.isfinite()].double()
        assert rows[network, name]["norms"][kind] == pytest.approx(float(finite.norm()), rel=1e-12)
    bias = (tensors["ema", "model", "bias"].double() - tensors["master", "model", "bias"]).norm()
    wanted = float(bias / tensors["master", "model", "bias"].double().norm())
    assert rows["model", "bias"]["ema_distance"] == pytest.approx(wanted)
    assert rows["model", "table"]["ema_distance"] is None
    assert rows["discriminator", "head.scale"]["ema_distance"] == "inf"
    assert {key: row["non_finite"] for key, row in rows.items() if row["non_finite"]} == {
        ("model", "block.weight"): {"exp_avg": 2}
    }
    text = command(location, "--norms")
    assert "model/block.weight: 2 of 12 elements of exp_avg are not finite" in text
    weights = [tensors["master", "model", name] for name in ("block.weight", "bias", "conv.weight")]
    together = torch.cat([tensor.flatten() for tensor in [*weights, tensors["frozen", "model", "table"]]]).norm()
    total = next(line for line in text.splitlines() if "all of model" in line)
    assert total.split()[3:5] == ["55", f"{together:.4g}"]


def test_damage_is_listed_with_its_reason_and_exit_code_2(run: Path, command: Command) -> None:
    file = cut_off(run / "checkpoints/step-00000003")
    text = command(run, code=2)
    assert f"damaged {file} has " in text
    assert f"{run}/checkpoints/step-00000002" in text  # the newest good one is shown
    assert command.said.strip() == f"inspect_checkpoint: error: in {run}/checkpoints 1 are damaged: step-00000003"
    found = command.json(run, code=2)
    assert [bool(one["fault"]) for one in found["checkpoints"]] == [True, False, False]
    command(run / "checkpoints/step-00000003", code=2)
    assert "checkpoint is damaged: " in command.said

    hidden = flip(run / "checkpoints/step-00000002")
    command(run / "checkpoints/step-00000002")
    command(run / "checkpoints/step-00000002", "--verify", code=2)
    assert f"{hidden} has changed since it was written" in command.said
    command(run / "checkpoints/step-00000002", "--norms", code=2)
    command(run, "--verify", code=2)
    assert "2 are damaged: step-00000003, step-00000002" in command.said
    assert "every byte is as it was written" in command(run / "checkpoints/step-00000001", "--verify")
    cut_off(run / "checkpoints/step-00000002"), cut_off(run / "checkpoints/step-00000001")
    assert "3 damaged" in command(run, code=2)
    command(run / "nowhere", code=2)
    assert "there is none" in command.said


def changed(tensors: Tensors, *entries: tuple[str, str, str, float]) -> Tensors:
    """A copy in which the first element of some tensors is another by so much."""
    copy = {key: tensor.clone() for key, tensor in tensors.items()}
    for kind, network, name, by in entries:
        copy[kind, network, name].view(-1)[0] += by
    return copy


def test_differences_by_kind_and_parameter(tmp_path: Path, command: Command) -> None:
    tensors = make_tensors(1)
    one = write_checkpoint(tmp_path / "one", 1, tensors, written_by={"ranks": 1})
    same = write_checkpoint(tmp_path / "same", 1, tensors, written_by={"ranks": 2}, config={"run": {"folder": "x"}})
    found = command.json(one, same)
    assert found["equal"] is True
    assert found["about"] == {"config.run.folder": [None, "x"], "written_by.ranks": [1, 2]}

    small, large = ("ema", "model", "bias", 1e-4), ("master", "discriminator", "head.weight", -2.0)
    other = write_checkpoint(
        tmp_path / "other", 2, changed(tensors, small, large, ("frozen", "model", "table", 0.5)),
        clock={"samples": 10, "data": {"batches": [1, 2]}},
    )  # fmt: skip
    found = command.json(one, other, code=1)
    assert [(row["name"], row["kind"], row["elements"]) for row in found["parameters"]] == [
        ("head.weight", "master", 1), ("table", "frozen", 1), ("bias", "ema", 1)
    ]  # fmt: skip
    head = tensors["master", "discriminator", "head.weight"].double()
    row = found["parameters"][0]
    assert row["largest"] == pytest.approx(2.0, rel=1e-6)
    assert row["relative"] == pytest.approx(2.0 / float(head.norm()), rel=1e-6)
    kind = found["kinds"]["model/ema"]
    assert (kind["parameters"], kind["of"], kind["largest_in"]) == (1, 4, "bias")
    assert kind["largest"] == pytest.approx(1e-4, rel=1e-2)
    assert found["kinds"]["model/exp_avg"] == {
        "parameters": 0, "of": 4, "largest": 0.0, "largest_in": "", "relative": 0.0
    }  # fmt: skip
    assert found["state"] == {"step": [1, 2], "clock.data.batches": [None, [1, 2]]}
    text = command(one, other, code=1)
    assert "discriminator/head.weight" in text
    assert "clock.data.batches" in text
    assert text.rstrip().endswith("different")


def test_tolerance_is_of_the_relative_difference(tmp_path: Path, command: Command) -> None:
    tensors = make_tensors(1)
    one = write_checkpoint(tmp_path / "one", 1, tensors)
    two = write_checkpoint(tmp_path / "two", 1, changed(tensors, ("exp_avg", "model", "bias", 1e-3)))
    relative = 1e-3 / float(tensors["exp_avg", "model", "bias"].norm())
    command(one, two, code=1)
    command(one, two, "--tolerance", str(0.9 * relative), code=1)
    assert command(one, two, "--tolerance", str(1.1 * relative)).rstrip().endswith("equal")
    command(one, "--tolerance", "1", code=2)
    command(one, two, "--norms", code=2)


def test_non_finite_values_and_other_parameters_are_differences(tmp_path: Path, command: Command) -> None:
    tensors = make_tensors(1)
    broken = changed(tensors, ("master", "model", "bias", math.nan))
    one, nan = write_checkpoint(tmp_path / "one", 1, tensors), write_checkpoint(tmp_path / "nan", 1, broken)
    assert command.json(one, nan, "--tolerance", "1e9", code=1)["parameters"][0]["largest"] == "inf"
    again = write_checkpoint(tmp_path / "again", 1, broken)
    assert command.json(nan, again)["equal"] is True

    shapes = {**NETWORKS["model"].shapes, "bias": (6,), "new": (2,)}
    del shapes["none"]
    networks = {"model": Network(optimizer_step=7, shapes=shapes, frozen=())}
    other = write_checkpoint(tmp_path / "other", 1, make_tensors(1, networks), networks=networks)
    found = command.json(one, other, code=1)
    assert found["only_first"] == ["model/none", "discriminator/head.weight", "discriminator/head.scale"]
    assert found["only_second"] == ["model/new"]
    assert found["shapes"] == {"model/bias": [[5], [6]]}
    assert found["frozen"] == ["model/table"]
    assert found["state"] == {"optimizer_step.discriminator": [6, None]}
    text = command(one, other, code=1)
    assert "model/bias [5] and [6]" in text


def test_a_store_and_a_process_of_its_own(tmp_path: Path, command: Command) -> None:
    """Without DeepSpeed; piped output is not cut to a terminal's width."""
    write_checkpoint("memory://inspect-test/checkpoints", 4)
    found = command.json("memory://inspect-test/checkpoints", "--verify", "--norms")
    assert [one["name"] for one in found["checkpoints"]] == ["step-00000004"]
    networks = {"model": Network(optimizer_step=1, shapes={"block." * 12 + "weight": (2,)}, frozen=())}
    location = write_checkpoint(tmp_path / "local", 1, make_tensors(1, networks), networks=networks)
    (tmp_path / "deepspeed.py").write_text("raise ImportError('not installed')")
    done = subprocess.run(
        [sys.executable, TOOL, location, "--norms"], env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "block." * 12 + "weight" in done.stdout
