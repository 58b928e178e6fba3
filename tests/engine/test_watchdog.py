"""Ranks that stop, hang, die or never come: the others end within seconds, say whose fault it is, and can go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.attempts import read_attempts
from lvdm.engine import watchdog
from lvdm.engine.distributed import Ranks
from lvdm.engine.meeting import MeetingPlace
from lvdm.engine.verdict import Beat, blame
from lvdm.errors import EXIT_STALLED
from tests.conftest import Toy
from tests.data.stores import free_port
from tests.engine import watchdog_cases
from tests.ranks import Launch, run_ranks
from tests.train.runs import state_of

HOST = os.uname().nodename


def beat(rank: int, count: int = 9, calls: int = 4, host: str = "n1", waits: bool = True, place: str = "wait") -> Beat:
    return Beat(rank, host, count, calls, f"step {calls}", "12:01:03", place, waits)


OF_FOUR = [beat(0), beat(1), beat(2, host="n2"), beat(3, host="n2")]


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        (
            [beat(2, count=7, host="n2"), beat(3, count=7, host="n2")],
            "no answer from ranks 2, 3 on n2 (last heard of in step 4 since 12:01:03); stopped, dead or cut off",
        ),
        ([beat(1, calls=3)], "rank 1 on n1 is behind the others: step 3 since 12:01:03, at wait"),
        (
            [beat(1, calls=3), beat(3, calls=3, host="n2", waits=False, place="read")],
            "rank 3 on n2 is behind the others: step 3 since 12:01:03, at read",
        ),
        (
            [beat(1, waits=False, place="read")],
            "rank 1 on n1 is not in the collective in which the others wait: step 4 since 12:01:03, at read",
        ),
        (
            [beat(1, place="barrier")],
            "rank 1 on n1 is not where the others are, wait: step 4 since 12:01:03, at barrier",
        ),
        ([], "all ranks answer, and none is behind; rank 0 on n1 is in step 4 since 12:01:03, at wait"),
    ],
)
def test_who_is_to_blame(changed: list[Beat], verdict: str) -> None:
    now = {beat.rank: beat for beat in [*OF_FOUR, *changed]}
    assert blame([beat(rank, count=7) for rank in range(4)], [now[rank] for rank in range(4)]) == verdict


def test_a_rank_that_was_never_heard_of_is_named_and_many_ranks_are_counted() -> None:
    assert blame([beat(0, count=1), None], [beat(0), None]).startswith("no word ever from rank 1;")
    before = [beat(rank, count=1) for rank in range(20)]
    assert "from ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more on n1" in blame(before, [beat(0), *before[1:]])


def test_beats_travel_as_text() -> None:
    assert Beat.load(beat(3).dump().encode()) == beat(3)


def test_a_rank_whose_connection_breaks_makes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    port, connect, tries = free_port(), torch.distributed.TCPStore, []
    server = connect("127.0.0.1", port, is_master=True, wait_for_workers=False)

    def connecting(*where: Any, **how: Any) -> Any:
        tries.append(where)
        if len(tries) == 1:
            raise torch.distributed.DistNetworkError("reset by peer")
        return connect(*where, **how)

    monkeypatch.setattr(torch.distributed, "TCPStore", connecting)
    monkeypatch.setattr(watchdog, "meeting_place", lambda: MeetingPlace("127.0.0.1", port, HOST, False, server))
    over, ranks = threading.Event(), Ranks(1, 2, torch.device("cpu"))
    line = watchdog._Line(ranks, lambda count: beat(1, count), over, threading.Event())
    telling = threading.Thread(target=line.run, daemon=True)
    telling.start()
    wait_for(lambda: server.check(["lvdm/watchdog/1"]), timeout=10)
    over.set()
    telling.join(10)
    assert (len(tries), telling.is_alive()) == (2, False)


class Started:
    """Ranks that hang, one way or another; what they say goes into a folder of their own."""

    def __init__(self, launch: Launch, folder: Path) -> None:
        self.launch, self.folder = launch, folder

    def end(self, *ranks: int, timeout: float = 40) -> list[int | None]:
        """Exit codes of ``ranks``, which end by themselves; then all are killed."""
        deadline = time.monotonic() + timeout
        for rank in ranks:
            self.launch.processes[rank].join(max(0.0, deadline - time.monotonic()))
        codes = [self.launch.processes[rank].exitcode for rank in ranks]
        self.launch.kill()
        return codes

    def said(self, rank: int) -> str:
        """What a rank said on stderr."""
        return (self.folder / f"{rank}.stderr").read_text()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Started]]:
    """Starts ranks with a function of the cases; none is left at the end."""
    launches = []

    def started(name: str, function: Callable[..., str], world: int, *args: Any) -> Started:
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        launches.append(Launch(function, world, (*args, str(folder))))
        return Started(launches[-1], folder)

    yield started
    for launch in launches:
        launch.kill()


KINDS = (
    "sleeps",
    "sleeps, and nobody listens",
    "keeps the lock",
    "is stopped",
    "is suspended",
    "never comes",
    "dies while the ranks connect",
)


@pytest.fixture(scope="module")
def hanging(start: Callable[..., Started]) -> dict[str, Started]:
    """Ranks of all kinds that hang while other tests run; those of ``is suspended`` go on after 8 s."""
    runs = {kind: start(kind, watchdog_cases.work, 3 if kind == "sleeps" else 2, kind, 3.0) for kind in KINDS}
    wait_for((runs["is suspended"].folder / "1.ready").exists)
    for process in runs["is suspended"].launch.processes:
        os.kill(process.pid, signal.SIGSTOP)
        threading.Timer(8.0, os.kill, (process.pid, signal.SIGCONT)).start()
    return runs


@pytest.mark.usefixtures("hanging")
def test_a_training_ends_by_itself_and_goes_on(toy: Toy, tmp_path: Path, start: Callable[..., Started]) -> None:
    names = ("rank 0 stops", "rank 1 stops", "the writer stops")
    changes = {"run__steps": 20, "run__save_every": 2, "run__stall_timeout": 5.0}
    trees = {name: toy.diffusion(tmp_path / "run" / name, **changes) for name in (*names, "nothing stops")}
    runs = {name: start(name, watchdog_cases.train, 2, trees[name]) for name in names}
    for name, run in runs.items():
        wait_for(lambda folder=tmp_path / "run" / name: list(folder.glob("checkpoints/step-*/manifest.json")))
        rank = 1 if name == "rank 1 stops" else 0
        process = run.launch.processes[rank].pid
        os.kill(writer_of(process) if name == "the writer stops" else process, signal.SIGSTOP)
    run_ranks(watchdog_cases.train, 2, trees["nothing stops"], str(tmp_path))

    assert runs["rank 0 stops"].end(1) == [EXIT_STALLED]
    assert f"no answer from rank 0 on {HOST}; stopped, dead or cut off" in runs["rank 0 stops"].said(1)
    assert runs["rank 1 stops"].end(0) == [EXIT_STALLED]
    assert f"no answer from rank 1 on {HOST} (last heard of in step" in runs["rank 1 stops"].said(0)
    for name, speaker in (("rank 0 stops", 1), ("rank 1 stops", 0)):
        assert "lvdm/train/loop.py" in runs[name].said(speaker), "no stacks"
        (attempt,) = read_attempts(tmp_path / "run" / name)
        assert attempt.code == EXIT_STALLED
        assert f"no answer from rank {1 - speaker} on {HOST}" in attempt.reason
    assert runs["the writer stops"].end(0, 1) == [EXIT_STALLED, EXIT_STALLED]
    assert "in saving at step" in runs["the writer stops"].said(0)

    again = {name: start(f"{name} no more", watchdog_cases.train, 2, trees[name]) for name in names}
    straight = state_of(tmp_path / "run" / "nothing stops")
    for name, run in again.items():
        assert "going on at step" in run.launch.results()[0]
        resumed = state_of(tmp_path / "run" / name)
        assert all(torch.equal(straight[key], resumed[key]) for key in straight), name
        assert run.said(0) + run.said(1) == ""


def test_hangs_of_all_kinds(hanging: dict[str, Started]) -> None:
    assert hanging["sleeps"].end(0, 1, 2) == [EXIT_STALLED] * 3
    for rank in range(3):
        assert f"rank {rank} on {HOST}: " in hanging["sleeps"].said(rank)
        assert "(most recent call first)" in hanging["sleeps"].said(rank), "no stacks"
    reasons = {file.name: file.read_text() for file in hanging["sleeps"].folder.glob("*.reason")}
    assert reasons.keys() == {"0.reason"}, "not told once for all"
    assert f"rank 1 on {HOST} is not in the collective in which the others wait: step 3 since" in reasons["0.reason"]
    assert "at sleep_in_python (tests/engine/watchdog_cases.py:" in reasons["0.reason"]
    assert [hanging["sleeps"].said(rank).count("stalled: ") for rank in range(3)] == [1, 0, 0], "not said once for all"

    unheard = hanging["sleeps, and nobody listens"]
    assert unheard.end(0, 1) == [EXIT_STALLED] * 2
    assert "rank 1 on" in (unheard.folder / "0.reason").read_text()

    assert hanging["is stopped"].end(0) == [EXIT_STALLED]
    assert f"no answer from rank 1 on {HOST} (last heard of in " in hanging["is stopped"].said(0)

    answers = hanging["never comes"].launch.results()
    assert "requeue: of 2 ranks, these did not come to 127.0.0.1:" in answers[0]
    assert answers[0].endswith("in time: 1")

    assert hanging["is suspended"].launch.results() == ["done"] * 2
    assert hanging["is suspended"].said(0) + hanging["is suspended"].said(1) == ""

    assert hanging["keeps the lock"].end(0, 1) == [EXIT_STALLED, 1]
    assert f"no answer from rank 1 on {HOST} (last heard of in " in hanging["keeps the lock"].said(0)
    assert "Timeout (" in hanging["keeps the lock"].said(1)
    assert "watchdog_cases.py" in hanging["keeps the lock"].said(1)

    connecting = hanging["dies while the ranks connect"]
    assert connecting.end(0, 1) == [EXIT_STALLED, 9]
    assert "in loading (since" in connecting.said(0)
    assert "no word ever from rank 1; stopped, dead or cut off" in connecting.said(0)


def writer_of(process: int) -> int:
    """The process that writes checkpoints for a rank."""
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        if b"lvdm.checkpoint.node_writer" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError(f"process {process} has no writer")


def wait_for(there: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not there():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
