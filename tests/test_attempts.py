"""What a start of a run notes of itself, and what can be read of it whatever happened."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvdm import attempts
from lvdm.attempts import Attempt, futile_starts, read_attempts, read_heartbeat
from lvdm.config import parse_training_config
from lvdm.errors import AskedToStop, Requeue, RolledBack, UserError
from lvdm.train.run_folder import RunFolder
from tests.conftest import Toy

KILLED = object()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that has been claimed."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    return tmp_path / "run"


def start(folder: Path, from_step: int | None, ending: Any, saves: int | None = None) -> None:
    """An attempt from a step (None: it ends before it knows) until it is `KILLED`, raises, or is done (None)."""
    attempt = Attempt(folder, 100, enabled=True)
    if from_step is not None:
        attempt.begin(from_step, ranks=4, nodes=2)
        attempt.now("training", from_step + 1, **({} if saves is None else {"checkpoint": f"step-{saves:08d}"}))
        beat_until(attempt, folder, "attempt", len(read_attempts(folder)))
        beat_until(attempt, folder, "state", "training")
    if ending is KILLED:
        return
    try:
        with attempt:
            if ending is not None:
                raise ending
    except type(ending):
        pass


def heartbeat(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "heartbeat.json").read_text())


def beat_until(attempt: Attempt, folder: Path, name: str, value: Any, timeout: float = 10) -> None:
    """Write as the watchdog's thread does, until the heartbeat says so."""
    deadline = time.monotonic() + timeout
    while not (folder / "heartbeat.json").is_file() or heartbeat(folder)[name] != value:
        assert time.monotonic() < deadline
        attempt.write()
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("ending", "code", "state", "how"),
    [
        (None, 0, "finished", "finished"),
        (AskedToStop("asked to\nand more"), 85, "stopped", "asked to"),
        (Requeue("the store does not answer"), 85, "stopped", "the store does not answer"),
        (UserError("lower run.keep"), 2, "failed", "lower run.keep"),
        (KeyboardInterrupt(), 130, "stopped", "KeyboardInterrupt"),
        (ZeroDivisionError("by zero"), 1, "failed", "ZeroDivisionError: by zero"),
        (SystemExit(3), 3, "failed", "SystemExit: 3"),
        (KILLED, None, "killed", "killed, or its node went down"),
    ],
)
def test_an_ending_is_noted_with_its_reason_and_exit_code(
    folder: Path, ending: Any, code: int | None, state: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    start(folder, 10, ending)
    (found,) = read_attempts(folder)
    assert (found.attempt, found.from_step, found.ranks, found.nodes) == (1, 10, 4, 2)
    assert (found.job, found.restarts, found.host) == ("77", 2, os.uname().nodename)
    assert (found.code, found.state, found.how) == (code, state, how)
    assert abs(found.started - time.time()) < 60
    last = read_heartbeat(folder)
    assert last is not None
    assert (last.state, last.step, last.steps) == ("training" if ending is KILLED else state, 11, 100)
    if ending is not KILLED:
        assert found.ended is not None
        assert found.ended >= found.started
        assert found.step == 11


def test_nothing_is_written_by_other_ranks_nor_where_there_is_no_run(folder: Path) -> None:
    other = Attempt(folder, 100, enabled=False)
    other.begin(0, 1, 1)
    other.write()
    with pytest.raises(Requeue), other:
        raise Requeue("x")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    (folder / "config.yaml").unlink()
    start(folder, None, UserError("no such folder of shards"))
    start(folder.parent / "nowhere", None, None)
    assert list(folder.iterdir()) == []
    assert not (folder.parent / "nowhere").exists()


def test_a_start_that_ends_before_it_knows_its_step_is_listed_too(folder: Path) -> None:
    start(folder, 10, None)
    start(folder, None, Requeue("no answer"))
    second = read_attempts(folder)[1]
    assert (second.attempt, second.from_step, second.code, second.how) == (2, None, 85, "no answer")
    assert second.host == os.uname().nodename
    assert second.ended is not None
    assert second.started > 0


def test_heartbeat_is_written_at_a_new_state_and_otherwise_now_and_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt(folder, 100, enabled=True)
    attempt.write()
    assert not (folder / "heartbeat.json").exists()
    attempt.begin(0, 1, 1)
    beat_until(attempt, folder, "state", "starting")
    attempt.now("training", 1, loss=float("nan"), samples_per_second=2.5)
    beat_until(attempt, folder, "step", 1)
    attempt.now("training", 2, loss=0.5)
    attempt.write()
    found = read_heartbeat(folder)
    assert found is not None
    assert (found.step, found.samples_per_second, str(found.loss)) == (1, 2.5, "nan")
    attempt.now("saving")
    beat_until(attempt, folder, "state", "saving")
    assert (heartbeat(folder)["step"], heartbeat(folder)["samples_per_second"]) == (2, 2.5)
    monkeypatch.setattr(attempts, "_OFTEN", 0.0)
    attempt.now("training", 3)
    beat_until(attempt, folder, "step", 3)
    attempt.now("training", 4)
    beat_until(attempt, folder, "step", 4)
    attempt.stalled("rank 3 on n2 does not answer")
    attempt.now("training", 5)
    attempt.write()
    assert (heartbeat(folder)["state"], heartbeat(folder)["step"]) == ("stalled", 4)
    assert [(one.code, one.how) for one in read_attempts(folder)] == [(86, "rank 3 on n2 does not answer")]


def test_a_disk_that_takes_nothing_is_said_once_and_ends_nothing(
    disk: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = disk("size=64k")
    (folder / "config.yaml").touch()
    attempt = Attempt(folder, 100, enabled=True)
    attempt.begin(0, 1, 1)
    beat_until(attempt, folder, "state", "starting")
    disk("ro")
    for state in ("training", "saving", "training"):
        attempt.now(state)
        attempt.write()
        time.sleep(0.05)
    with attempt:
        pass
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"cannot note the state of the run in {folder}: ")
    assert "Read-only file system" in said
    assert heartbeat(folder)["state"] == "starting"


def test_a_disk_that_hangs_holds_up_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_PATIENCE", 0.2)
    attempt = Attempt(folder, 100, enabled=True)
    attempt.begin(0, 1, 1)
    beat_until(attempt, folder, "state", "starting")
    os.mkfifo(folder / ".heartbeat.json")  # to write to which one waits until somebody reads
    began = time.monotonic()
    for state in ("training", "saving"):
        attempt.now(state)
        attempt.write()
    assert time.monotonic() - began < 0.1
    attempt.stalled("hung")
    assert time.monotonic() - began < 2
    assert [one.how for one in read_attempts(folder)] == ["hung"]


def test_what_a_kill_cut_short_and_what_is_newer_is_passed_over(folder: Path) -> None:
    lines = folder / "attempts.jsonl"
    start(folder, 0, KILLED)
    with lines.open("a") as file:
        file.write('{"attempt": 1, "ended": 17')
    start(folder, 10, Requeue("x"))
    with lines.open("a") as file:
        file.write('{"moon": "full"}\n[1]\n{"attempt": "3"}\n{"attempt": 3, "started": "noon", "from_step": 1e999}\n')
        file.write('{"attempt": 2, "weather": "fine", "host": ["n1"]}\n' + "[" * 100_000 + "\n\xff\n")
    first, second, third = read_attempts(folder)
    assert (first.ended, first.from_step) == (None, 0)
    assert (second.from_step, second.code, second.host) == (10, 85, "")
    assert (third.attempt, third.started, third.from_step) == (3, 0.0, None)
    for text in ("", '{"updated": 1', "[]", '{"updated": "now"}', '{"updated": 1e999}', "\xff"):
        (folder / "heartbeat.json").write_text(text)
        assert read_heartbeat(folder) is None
    (folder / "heartbeat.json").write_text('{"updated": 5, "state": 7, "step": "many", "loss": {}, "new": 1}')
    found = read_heartbeat(folder)
    assert found is not None
    assert (found.updated, found.state, found.step, found.loss) == (5.0, "", 0, None)


FUTILE = [(10, KILLED), (10, Requeue("a")), (10, ValueError("b"))]


@pytest.mark.parametrize(
    ("starts", "count", "last"),
    [
        ([], 0, ""),
        ([(10, None)], 0, ""),
        (FUTILE, 3, "ValueError: b"),
        ([*FUTILE, (None, Requeue("c"))], 4, "c"),
        ([(None, Requeue("c")), *FUTILE], 4, "ValueError: b"),
        ([(5, KILLED), *FUTILE], 3, "ValueError: b"),  # it made a checkpoint
        ([*FUTILE, (5, KILLED)], 1, "killed, or its node went down"),
        ([*FUTILE, (10, AskedToStop("a"))], 0, ""),
        ([*FUTILE, (10, RolledBack("a")), (10, KILLED)], 1, "killed, or its node went down"),
        ([*FUTILE, (10, UserError("a")), (10, KILLED)], 1, "killed, or its node went down"),  # somebody saw to it
        ([*FUTILE, (10, KeyboardInterrupt())], 0, ""),
    ],
)
def test_starts_that_come_to_nothing_are_counted(folder: Path, starts: list[Any], count: int, last: str) -> None:
    for from_step, ending in starts:
        start(folder, from_step, ending)
    assert futile_starts(folder) == (count, last)


def test_a_start_is_one_whatever_it_learns_of_its_step_and_of_its_end(folder: Path) -> None:
    attempt = Attempt(folder, 100, enabled=True)
    for step in (20, 20, 10):  # the newest checkpoint turned out to be damaged
        attempt.begin(step, ranks=4, nodes=2, checkpoint=f"step-{step:08d}")
    beat_until(attempt, folder, "checkpoint", "step-00000010")
    (begun,) = read_attempts(folder)
    assert (begun.from_step, begun.state) == (10, "killed")
    assert len((folder / "attempts.jsonl").read_text().splitlines()) == 2
    Attempt(folder, 100, enabled=False).stalled("no answer from rank 0")
    with contextlib.suppress(Requeue), attempt:  # rank 0 goes on, and finds the others gone
        raise Requeue("another rank died")
    (ended,) = read_attempts(folder)
    assert (ended.code, ended.how) == (86, "no answer from rank 0")


def test_a_start_that_saved_something_was_not_futile(folder: Path) -> None:
    start(folder, 10, KILLED, saves=10)
    assert futile_starts(folder)[0] == 1
    start(folder, 10, KILLED, saves=20)
    assert futile_starts(folder)[0] == 0


def test_a_run_refuses_to_start_for_ever(tmp_path: Path) -> None:
    tree = Toy(tmp_path).diffusion(tmp_path / "run", run__futile_starts=3)
    run = RunFolder(parse_training_config(tree, source="test"))
    run.claim(1)
    for _ in range(2):
        start(run.path, 0, KILLED)
        run.enter()
    start(run.path, 0, Requeue("no answer"))
    with pytest.raises(
        UserError, match=r"run: the last 3 starts ended before a new .*: no answer; .*run.futile_starts"
    ):
        run.enter()
    start(run.path, 6, None)
    run.enter()


def test_stalls_that_other_ranks_tell_of_are_starts_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(folder, 40, AskedToStop("asked to"))
    for restarts in ("1", "2"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        for _ in range(2):  # two ranks that think they speak for all make one line of one start
            Attempt(folder, 100, enabled=False).stalled("no answer from rank 0")
    told = [(one.attempt, one.error, one.restarts) for one in read_attempts(folder)]
    assert told == [(1, "AskedToStop", 0), (2, "Stalled", 1), (3, "Stalled", 2)]
    assert futile_starts(folder) == (2, "no answer from rank 0")
