"""Kill a run again and again, at seeded moments, and let it go on: what `test_chaos.py` and `tools/bench/chaos.py` do.

Each kill is a SIGKILL, from inside so that its moment can be chosen:

start    of a rank, before the first step
step     of a rank, some milliseconds behind the first micro-batch of some step
save     of a rank, some milliseconds after the writing of a checkpoint began
publish  of the main rank, at its n-th file operation among the checkpoints: one is found, made, published, or deleted
writer   of the process that writes the files, some milliseconds after it began: once, which the run survives, or at the
         second attempt too, which ends the run
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing.connection
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from lvdm.checkpoint.folder import CheckpointFolder, newest_good
from lvdm.train import loop
from lvdm.train.sample_log import SampleLog
from tests.ranks import Launch, run_ranks
from tests.train.runs import run, samples_of, state_of

WAYS = ("start", "step", "save", "publish", "writer")
_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}
STEPS, WORLD = 16, 2
_WRITER_DIED = "the writer was killed"
_LIMIT = 60.0
"""Seconds that one start may take."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """One seeded way and moment to die."""

    way: str
    rank: int
    number: int
    """Of the step or the checkpoint, from where the run goes on, or of the file operation."""
    delay: float
    """Seconds."""
    twice: bool
    """Of a writer: whether the second attempt dies too."""

    @classmethod
    def draw(cls, seed: int, world: int, way: str) -> Kill:
        """The kill of a seed."""
        draw = random.Random(f"{seed} {way}")
        number = draw.randint(1, {"step": 5, "publish": 60}.get(way, 2))
        delay = draw.uniform(*{"start": (0.05, 1.5), "step": (0, 0.06)}.get(way, (0, 0.02)))
        rank = 0 if way in ("publish", "writer") else draw.randrange(world)
        return cls(way, rank, number, delay, draw.random() < 0.5)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one start."""

    killed: bool
    """False where the run ended before the moment came."""
    finished: bool
    """Whether the run came to its end."""
    newest: int
    """Step of the newest whole checkpoint afterwards, 0 for none."""


@dataclasses.dataclass
class Result:
    """What became of many kills."""

    differences: list[str]
    """Between each run that was killed and the straight one."""
    by_way: Counter[str] = dataclasses.field(default_factory=Counter)
    """Kills that happened."""
    starts: int = 0
    runs: int = 0

    @property
    def kills(self) -> int:
        """Kills that happened, in all."""
        return self.by_way.total()


def start_and_kill(tree: dict[str, Any], kill: Kill, world: int) -> Outcome:
    """Start ``tree`` on ``world`` ranks, and end what is left of it as a launcher would when one of them is killed.

    Raises:
        AssertionError: it ended otherwise than by the kill, or has lost a checkpoint that was whole before.
    """
    root = Path(tree["run"]["folder"]) / "checkpoints"
    before = newest_step(root)
    launch = Launch(run_armed, world, (kill, tree))
    deadline = time.monotonic() + _LIMIT
    while any(process.is_alive() for process in launch.processes) and time.monotonic() < deadline:
        multiprocessing.connection.wait([p.sentinel for p in launch.processes if p.is_alive()], timeout=1)
        if any(process.exitcode == -signal.SIGKILL for process in launch.processes):
            time.sleep(0.05)
            break
    assert time.monotonic() < deadline, f"{kill}: still running after {_LIMIT} s"
    killed = any(process.exitcode == -signal.SIGKILL for process in launch.processes)
    said = ""
    if killed:
        launch.kill()
    else:
        try:
            said = launch.results(_LIMIT)[0]
        except AssertionError as error:
            if kill.way != "writer" or "Requeue: cannot write checkpoint file" not in str(error):
                raise AssertionError(f"{kill}: {error}") from None
            killed = True
    after = newest_step(root)
    assert after >= before, f"{kill}: of step {before} step {after} is left"
    return Outcome(killed or _WRITER_DIED in said, bool(said), after)


def torment(
    diffusion: Callable[..., dict[str, Any]], folder: Path, seed: int, kills: int, report: Callable[[str], None] = print
) -> Result:
    """Let runs on two ranks be killed until ``kills`` have happened, and compare each with the straight one at its end.

    Args:
        diffusion: makes the config tree of a run in a folder, as `tests.conftest.Toy.diffusion`.
        folder: new, for the runs.
    """
    options = {"run__steps": STEPS, "run__save_every": 2, "run__keep": 2, "run__log_samples": True}
    run_ranks(run, WORLD, diffusion(folder / "straight", **options))
    result = Result(differences=[] if _all_once(folder / "straight") else ["the straight run"])
    while result.kills < kills:
        result.runs += 1
        killed = folder / f"killed-{result.runs}"
        finished = False
        while not finished:
            turn, number = divmod(result.starts, len(WAYS))
            way = random.Random(f"{seed} {turn}").sample(WAYS, len(WAYS))[number]
            kill = Kill.draw(seed * 10**6 + result.starts, WORLD, way)
            if result.kills == kills:  # the last run goes on undisturbed
                kill = dataclasses.replace(kill, rank=-1)
            outcome = start_and_kill(diffusion(killed, **options), kill, WORLD)
            finished = outcome.finished
            result.starts += 1
            result.by_way[way] += outcome.killed
            report(f"{result.kills} of {kills} kills: {kill} {outcome}")
        result.differences += [f"killed-{result.runs}: {name}" for name in differences(killed, folder / "straight")]
        if not result.differences:
            shutil.rmtree(killed)
    return result


def _all_once(folder: Path) -> bool:
    """Whether the steps of a run took every position once, in order."""
    positions = [position for samples in samples_of(folder).values() for position, _ in samples]
    return positions == list(range(len(positions))) and len(positions) > 0


def newest_step(root: Path) -> int:
    """Step of the newest whole checkpoint, every byte of it read; 0 if there never was one.

    Raises:
        AssertionError: there is a damaged one under a valid name.
    """
    folder = CheckpointFolder(root)
    found, damaged = newest_good(map(folder.location, folder.names()), verify=True)
    assert not damaged, damaged
    if not found:
        return 0
    found[0].close()
    return found[0].manifest.step


def differences(one: Path, other: Path) -> list[str]:
    """In what two finished runs differ: weights, moments and averages bit for bit, samples of every step, losses."""
    mine, theirs = state_of(one), state_of(other)
    found = [name for name in mine.keys() | theirs.keys() if not torch.equal(mine[name], theirs[name])]
    if samples_of(one) != samples_of(other):
        found.append("samples")
    return found


def run_armed(kill: Kill, tree: dict[str, Any], s3: dict[str, str] | None = None) -> str:
    """As `run`, on a rank that may be the one that ``kill`` is for."""
    root, rank = f"{tree['run']['folder']}/checkpoints", int(os.environ["RANK"])
    died: list[int] = []
    match kill.way:
        case _ if rank != kill.rank:
            pass
        case "start":
            _die_in(kill.delay)
        case "step":
            loop.SampleLog = _armed_log(kill)
        case "save":
            _at_files(kill, Path(root), _die)
        case "publish":
            _die_at_operation(kill.number, f"{root}/")
        case "writer":
            _at_files(kill, Path(root), lambda: _kill_writers(kill, died))
    return run(tree, s3) + (_WRITER_DIED if died else "")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in(seconds: float) -> None:
    timer = threading.Timer(seconds, _die)
    timer.daemon = True
    timer.start()


def _armed_log(kill: Kill) -> type[SampleLog]:
    """A log of samples that also sees when the step comes."""

    class Armed(SampleLog):
        steps: ClassVar[set[int]] = set()

        def add(self, step: int, batch: Any) -> None:
            super().add(step, batch)
            if step not in self.steps:
                self.steps.add(step)
                if len(self.steps) == kill.number:
                    _die_in(kill.delay)

    return Armed


def _die_at_operation(number: int, root: str) -> None:
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _OPERATIONS and arguments and str(arguments[0]).startswith(root):
            left -= 1
            if left == 0:
                _die()

    sys.addaudithook(count)


def _at_files(kill: Kill, root: Path, action: Callable[[], None]) -> None:
    """Call ``action`` in a thread, some time after the files of the n-th checkpoint from now on come up."""

    def watch() -> None:
        met: set[Path] = set()
        while len(met) < kill.number:
            time.sleep(0.0005)
            met |= set(root.glob(".step-*.partial"))
        time.sleep(kill.delay)
        action()

    threading.Thread(target=watch, daemon=True).start()


def _kill_writers(kill: Kill, died: list[int]) -> None:
    """The writer of this moment, and where the kill is of two, the next one while it is asked again."""
    while len(died) < 1 + kill.twice:
        time.sleep(0.001)
        for pid in set(writers_of_this_process()).difference(died):
            if died:
                socket = Path(_command(pid).split(b"\0")[3].decode())
                while not socket.exists():
                    time.sleep(0.001)
                os.kill(pid, signal.SIGSTOP)  # it takes what it is asked, and does nothing
                time.sleep(1.5)
            os.kill(pid, signal.SIGKILL)
            died.append(pid)


def writers_of_this_process() -> list[int]:
    """The processes that write checkpoints for this one and its node's ranks."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended since
            found += map(int, (task / "children").read_text().split())
    return [pid for pid in found if b"lvdm.checkpoint.node_writer" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
