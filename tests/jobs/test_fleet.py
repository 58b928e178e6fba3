"""The list of all runs: real ones that ended in every way, made-up ones, and folders full of nonsense."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from rich.console import Console

from lvdm.attempts import read_attempts
from lvdm.errors import UserError
from lvdm.jobs import fleet
from lvdm.jobs.fleet import Run, look_at, plain, read_run
from lvdm.jobs.fleet_table import duration, show
from tests.commands import ROOT, call
from tests.conftest import Toy
from tests.ranks import Launch
from tests.train.runs import run, wait_for_step

TOOL = "tools/runs.py"


def printed(runs: list[Run], width: int) -> str:
    out = io.StringIO()
    show(Console(file=out, width=width, highlight=False), runs)
    return out.getvalue()


@pytest.fixture(scope="module")
def real(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that finished, were killed, and were asked to stop twice."""
    folder = tmp_path_factory.mktemp("fleet")
    done, killed, asked = (folder / name for name in ("done", "deep/killed", "asked"))
    endless = {"run__steps": 10**6, "run__save_every": 2}
    launches = [Launch(run, 1, (toy.diffusion(done),)), Launch(run, 1, (toy.diffusion(killed, **endless),))]
    for _ in range(2):
        lines = len((asked / "log.jsonl").read_text().splitlines()) if asked.is_dir() else 0
        stopping = Launch(run, 1, (toy.diffusion(asked, **endless),))
        wait_for_step(asked, lines + 3)
        os.kill(stopping.processes[0].pid or 0, signal.SIGTERM)
        with pytest.raises(AssertionError, match="AskedToStop"):
            stopping.results()
    wait_for_step(killed, 3)
    deadline = time.monotonic() + 60
    while read_run(killed).state != "training" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert read_run(killed).state == "training"
    launches[1].kill()
    launches[0].results()
    grow_old(killed, 3600)
    return folder


def grow_old(folder: Path, seconds: float) -> None:
    """Make a heartbeat older, as of a run that was killed long ago."""
    path = folder / "heartbeat.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"updated": facts["updated"] - seconds}))
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_real_runs_say_how_they_ended(real: Path) -> None:
    killed, stopped, finished = look_at([real])
    assert [Path(one.folder).name for one in (killed, stopped, finished)] == ["killed", "asked", "done"]
    host = socket.gethostname()

    assert (finished.state, finished.step, finished.steps, finished.ended) == ("finished", 6, 6, "finished")
    assert (finished.attempts, finished.ranks, finished.nodes, finished.host) == (1, 1, 1, host)
    assert (finished.checkpoint, finished.fault, finished.code) == ("step-00000006", "", 0)
    assert finished.loss is not None
    assert 0 < finished.loss < 10
    assert finished.samples_per_second is not None
    assert finished.samples_per_second > 0

    assert (stopped.state, stopped.attempts, stopped.steps, stopped.code) == ("stopped", 2, 10**6, 85)
    assert f"after step {stopped.step}; " in stopped.ended
    assert stopped.checkpoint == f"step-{stopped.step:08d}"
    first, second = read_attempts(Path(stopped.folder))
    assert (first.from_step, second.from_step) == (0, first.step)

    assert (killed.state, killed.attempts, killed.code) == ("silent", 1, None)
    assert killed.ended == "killed, or its node went down"
    assert killed.age is not None
    assert 3600 <= killed.age < 7200
    assert re.fullmatch(r"step-\d{8}", killed.checkpoint)


def test_tool_prints_a_table_or_json_and_refuses_what_is_not_there(real: Path) -> None:
    answer = call(TOOL, real, "--json")
    assert answer.returncode == 0, answer.stderr
    assert {Path(one["folder"]).name for one in json.loads(answer.stdout)} == {"done", "killed", "asked"}
    answer = call(TOOL, real)
    assert answer.returncode == 0, answer.stderr
    assert re.match(r"3 runs: .*1 stopped, 1 finished", answer.stdout)
    assert "asked to" in answer.stdout
    answer = call(TOOL, real, real / "nowhere")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == f"runs: error: there is no folder {real / 'nowhere'}\n"


def test_tool_looks_again_until_it_is_interrupted(real: Path) -> None:
    command = [sys.executable, str(ROOT / TOOL), str(real), "--watch", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        looks = 0
        while looks < 3:
            looks += "3 runs: " in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "runs: interrupted\n")


NOW = 1_800_000_000.0


def make(
    folder: Path, beat: dict[str, Any] | None = None, *lines: dict[str, Any], age: float = 1.0, config: str = ""
) -> Path:
    """A run folder whose heartbeat is ``age`` seconds old at `NOW`."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"run:\n  steps: 1000\n  checkpoints: '{config}'\n")
    if beat is not None:
        facts = {"state": "training", "step": 100, "steps": 1000, "attempt": 1, "updated": NOW - age} | beat
        (folder / "heartbeat.json").write_text(json.dumps(facts))
        os.utime(folder / "heartbeat.json", (NOW - age, NOW - age))
    (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


BEGAN: dict[str, Any] = {"attempt": 1, "started": NOW - 500, "host": "n1", "ranks": 8, "nodes": 2, "from_step": 40}
ENDED: dict[str, Any] = {"attempt": 1, "ended": NOW - 9, "step": 90, "reason": "why", "code": 85}


@pytest.mark.parametrize(
    ("beat", "lines", "age", "state", "ended"),
    [
        ({}, [BEGAN], 1, "training", ""),
        ({"state": "saving"}, [BEGAN], 119, "saving", ""),
        ({}, [BEGAN], 121, "silent", "killed, or its node went down"),
        ({}, [BEGAN, ENDED], 10, "stopped", "why"),
        ({}, [BEGAN, ENDED | {"code": 86}], 1, "stalled", "why"),
        ({}, [BEGAN, ENDED | {"code": 2}], 1000, "failed", "why"),
        ({}, [BEGAN, ENDED | {"code": 0}], 1000, "finished", "why"),
        ({"attempt": 2}, [BEGAN, ENDED, {"attempt": 2}], 1, "training", "why"),  # of the start before
        ({"attempt": 2}, [BEGAN, {"attempt": 2}], 1, "training", "killed, or its node went down"),
        ({"attempt": 1}, [BEGAN, ENDED, ENDED | {"attempt": 2, "code": 1}], 50, "failed", "why"),  # before it began
        ({"state": "finished"}, [BEGAN], 1000, "finished", ""),  # whose last line could not be written
        ({"state": "dreaming"}, [BEGAN], 1, "unknown", ""),  # of a newer version
        (None, [BEGAN], 1, "silent", "killed, or its node went down"),  # it could not write a heartbeat
        (None, [BEGAN, ENDED], 1, "stopped", "why"),
        (None, [], 1, "unknown", ""),
    ],
)
def test_state_follows_from_the_heartbeat_and_how_attempts_ended(
    tmp_path: Path, beat: dict[str, Any] | None, lines: list[dict[str, Any]], age: float, state: str, ended: str
) -> None:
    found = read_run(make(tmp_path / "run", beat, *lines, age=age), NOW)
    assert (found.state, found.ended) == (state, ended)
    assert found.steps == 1000


def test_a_wrong_clock_makes_no_run_silent(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", {"updated": NOW - 5000}, BEGAN)
    assert read_run(folder, NOW).state == "training"  # by the file system's clock
    os.utime(folder / "heartbeat.json", (NOW - 5000, NOW - 5000))
    assert read_run(folder, NOW).state == "silent"
    ahead = make(tmp_path / "ahead", {"updated": NOW + 5000}, BEGAN)
    assert (read_run(ahead, NOW).state, read_run(ahead, NOW).age) == ("training", 0.0)


def test_what_the_heartbeat_does_not_say_comes_from_the_log(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", {"step": 600}, BEGAN)
    lines = [
        {"step": 400, "loss": 0.7, "samples_per_second": 8.0, "seconds_left": 60.0},
        {"step": 500, "loss": float("nan"), "seconds_left": 50.0},
        {"step": 500, "validation/loss": 0.3},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 50')
    found = read_run(folder, NOW)
    assert (found.step, found.samples_per_second, found.seconds_left) == (600, 8.0, 40.0)
    assert plain(found)["loss"] == "nan"
    json.dumps(plain(found), allow_nan=False)
    (folder / "heartbeat.json").unlink()
    (folder / "attempts.jsonl").unlink()
    assert (read_run(folder, NOW).state, read_run(folder, NOW).step) == ("unknown", 500)
    with (folder / "log.jsonl").open("a") as file:
        file.write('\n{"step": 1000, "loss": 0.1}\n')
    assert (read_run(folder, NOW).state, read_run(folder, NOW).steps) == ("finished", 1000)


def test_events_are_counted_and_checkpoints_found_beside_the_run(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "latest").write_text("step-00000300\n")
    folder = make(tmp_path / "run", {"checkpoint": "step-00000200"}, BEGAN, config=str(elsewhere))
    kinds = ["non_finite", "straggler", "non_finite", "rolled_back"]
    lines = [json.dumps({"time": NOW, "step": 1, "kind": kind, "message": '"kind": "x"'}) for kind in kinds]
    (folder / "events.jsonl").write_text("\n".join(lines) + '\n{"time": 1, "ki')
    found = read_run(folder, NOW)
    assert found.events == {"non_finite": 2, "straggler": 1, "rolled_back": 1}
    assert (found.checkpoint, found.checkpoints) == ("step-00000300", str(elsewhere))
    (folder / "config.yaml").write_text(
        f"run:\n  folder: {tmp_path.name}/{folder.name}\n  checkpoints: {tmp_path.name}/elsewhere\n"
    )
    found = read_run(folder)  # as it was started, from the folder above
    assert (found.checkpoint, found.checkpoints) == ("step-00000300", str(elsewhere))
    (elsewhere / "latest").write_text("../../etc/passwd")
    assert read_run(folder, NOW).checkpoint == "step-00000200"


def test_stores_are_asked_only_on_demand_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_STORE_PATIENCE", 2.0)
    said = {"checkpoint": "step-00000200", "updated": time.time()}
    fsspec.filesystem("memory").pipe_file("/fleet/latest", b"step-00000300\n")
    with socket.socket() as mute:  # takes connections, and says nothing
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        make(tmp_path / "mute", said, BEGAN, config=f"http://127.0.0.1:{mute.getsockname()[1]}/ckpt")
        make(tmp_path / "there", said, BEGAN, config="memory://fleet")
        make(tmp_path / "new", said, BEGAN, config="memory://nothing")
        make(tmp_path / "strange", said, BEGAN, config="gopher://x/y")
        began = time.monotonic()
        assert {one.checkpoint for one in look_at([tmp_path])} == {"step-00000200"}
        assert time.monotonic() - began < 2
        found = {Path(one.folder).name: one for one in look_at([tmp_path], stores=True)}
        assert time.monotonic() - began < 30
    assert found["there"].checkpoint == "step-00000300"
    assert (found["new"].checkpoint, found["new"].fault) == ("step-00000200", "")
    assert "does not answer within 2 s" in found["mute"].fault
    assert found["strange"].fault == "cannot read gopher://x/y: UserError"


def test_links_lead_to_runs_but_not_in_circles(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    make(root / "a" / "one", {}, BEGAN)
    make(root / "a" / "one" / "inner", {}, BEGAN)  # what lies in a run is its own business
    make(root / ".hidden", {}, BEGAN)
    make(tmp_path / "away" / "two", {}, BEGAN)
    (root / "link").symlink_to(tmp_path / "away" / "two")
    (root / "twice").symlink_to(root / "a" / "one")
    (root / "a" / "up").symlink_to(tmp_path)
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    (root / "self").symlink_to(root / "self")
    (root / "folder").symlink_to(tmp_path / "away")
    assert {one.folder for one in look_at([root])} == {str(root / "a" / "one"), str(root / "link")}
    assert [one.folder for one in look_at([root / "a" / "one"])] == [str(root / "a" / "one")]
    assert len(look_at([tmp_path, root, root / "a"])) == 2
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        look_at([root, tmp_path / "nowhere"])


def test_what_cannot_be_read_is_said_and_hides_no_other(tmp_path: Path) -> None:
    make(tmp_path / "fine", {"updated": time.time()}, BEGAN)
    for name in ("heartbeat.json", "attempts.jsonl", "log.jsonl", "events.jsonl"):
        folder = make(tmp_path / f"no {name}", None, BEGAN)
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    found = look_at([tmp_path])
    faults = [one.fault for one in found if one.state == "unreadable"]
    assert [one.state for one in found].count("training") == 1
    assert len(faults) == 4
    assert all(fault.endswith((".json: Is a directory", ".jsonl: Is a directory")) for fault in faults)


def test_nonsense_in_a_run_folder_breaks_nothing(tmp_path: Path) -> None:
    draw = random.Random(3)
    words = ["{", "}", "[", "]", ":", ",", '"step"', '"attempt"', '"ended"', '"updated"', "1", "-5", "1e999", "NaN"]
    words += [
        "null",
        "true",
        '"x"',
        "\n",
        "run:",
        "  steps: ",
        "  checkpoints: ",
        '"kind": "spike"',
        "\x00",
        "é",
        "&a *a",
    ]
    names = ("heartbeat.json", "attempts.jsonl", "log.jsonl", "events.jsonl", "config.yaml", "checkpoints/latest")
    for number in range(40):
        folder = tmp_path / str(number)
        (folder / "checkpoints").mkdir(parents=True)
        for name in names:
            text = "".join(draw.choice(words) for _ in range(draw.randrange(40)))
            if draw.random() < 0.5 and name.endswith(("json", "jsonl")):
                values = {
                    key: draw.choice([1, -1, "x", None, [], 1e308, True, {}]) for key in ("step", "steps", "loss")
                }
                text = json.dumps({"attempt": 1, "updated": time.time(), "state": "training"} | values) + "\n" + text
                text = text.split("\n")[0] if name == "heartbeat.json" else text
            (folder / name).write_text(text)
    found = look_at([tmp_path])
    assert len(found) == 40
    json.dumps([plain(one) for one in found], allow_nan=False)
    for width in (40, 80, 160):
        assert printed(found, width)


def test_those_that_need_somebody_come_first(tmp_path: Path) -> None:
    for number, code in enumerate((0, 85, 86, 2)):
        make(tmp_path / f"{number}", {}, BEGAN, ENDED | {"code": code})
    make(tmp_path / "4", {"updated": time.time()}, BEGAN)
    make(tmp_path / "5", {"updated": 1}, BEGAN)
    os.utime(tmp_path / "5" / "heartbeat.json", (1, 1))
    assert [one.state for one in look_at([tmp_path])] == [
        "failed",
        "silent",
        "stalled",
        "stopped",
        "training",
        "finished",
    ]


def test_table_fits_the_terminal() -> None:
    runs = [
        Run(
            "runs/a", "failed", step=12_345, steps=100_000, loss=0.25, host="n1", ranks=8, ended="no room " * 30, code=2
        ),
        Run("runs/" + "long" * 30, "silent", age=3700, step=1, steps=10, checkpoint="step-00004000", attempts=3),
        Run("runs/b", "training", step=50, steps=100, seconds_left=200_000, host="n2", ranks=16, nodes=2, attempts=2),
    ]
    runs[2] = Run(**{**vars(runs[2]), "events": {"non_finite": 2}, "ended": "asked to"})
    for width in (80, 160):
        lines = printed(runs, width).splitlines()
        assert lines[0] == "3 runs: 1 failed, 1 silent, 1 running"
        assert all(len(line.rstrip()) <= width for line in lines if "longlong" not in line)
        assert any(line.startswith("    last start: asked to; 2 x non finite") for line in lines)
        assert "silent 1 h 1 min" in "\n".join(lines)
        assert "2 d 7 h" in "\n".join(lines)
    assert "12,345/100,000  12%" in printed(runs, 160)
    assert re.search(r" 4,000 +2$", printed(runs, 160), re.MULTILINE)
    assert "16 on n2 +1" in printed(runs, 160)
    assert printed([], 80) == "0 runs\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.9, "59 s"), (60, "1 min"), (3600, "1 h 0 min"), (36_000, "10 h"), (172_800, "2 d 0 h")],
)
def test_durations_are_short(seconds: float, said: str) -> None:
    assert duration(seconds) == said
