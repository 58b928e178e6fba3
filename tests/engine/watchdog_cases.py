"""What the ranks of the watchdog tests do: stop, sleep, keep the interpreter's lock, die, or never come."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lvdm.engine import distributed
from lvdm.engine import watchdog as watchdog_module
from lvdm.engine.distributed import Ranks
from lvdm.engine.environment import read_world
from lvdm.engine.meeting import meet
from lvdm.engine.watchdog import Watchdog
from lvdm.errors import Requeue
from tests.train.runs import run


def speak_into(folder: str) -> Path:
    """Send what this rank says on stderr, also from C, into a file of its own; its stem in ``folder``."""
    stem = Path(folder) / os.environ["RANK"]
    with stem.with_suffix(".stderr").open("ab") as file:
        os.dup2(file.fileno(), 2)
    return stem


def train(tree: dict[str, Any], folder: str) -> str:
    """A training whose stderr goes into ``folder``; what it printed."""
    speak_into(folder)
    return run(tree)


def work(case: str, limit: float, folder: str) -> str:
    """Steps of a collective each under a watchdog, until the case has its way; how it ended, if this rank can say."""
    stem = speak_into(folder)
    if case == "sleeps, and nobody listens":
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.close(reader)
    beats = 0

    def often() -> None:
        nonlocal beats
        beats += 1
        if beats == 1:
            raise OSError("a file system that is away for a moment")

    if case == "dies while the ranks connect":
        watchdog_module._START = 15.0
    try:
        with Watchdog(limit, often=often, stalled=stem.with_suffix(".reason").write_text) as watchdog:
            if case == "dies while the ranks connect" and os.environ["RANK"] == "1":
                meet(read_world(), torch.device("cpu"), limit)
                os._exit(9)
            if case == "never comes" and os.environ["RANK"] == "1":
                return "gone"
            ranks = distributed.start(limit, met=watchdog.join)
            for step in range(1, 31):
                watchdog.progress("step", step)
                if step == 3 and ranks.rank == 1:
                    stem.with_suffix(".ready").touch()
                    FAULTS.get(case, lambda: None)()
                time.sleep(0.1)
                _collective(ranks)
            distributed.stop()
    except Requeue as error:
        return f"requeue: {error}"
    assert beats > 1, "a fault of the file system must not end the heartbeat"
    return "done"


def _collective(ranks: Ranks) -> None:
    distributed.sum_over_ranks(torch.ones(1, device=ranks.device))


def sleep_in_python() -> None:
    """A rank that does something else for ever."""
    while True:
        time.sleep(0.1)


FAULTS: dict[str, Callable[[], Any]] = {
    "sleeps": sleep_in_python,
    "sleeps, and nobody listens": sleep_in_python,
    "keeps the lock": lambda: ctypes.PyDLL(None).sleep(120),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
