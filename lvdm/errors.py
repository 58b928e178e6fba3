"""What can go wrong, by who has to act, and how a command line reports it.

Exit codes of every command:

==  =========================================================================
 0  done
 2  bad input: a config, a file or a folder; the one line printed says what to do
85  stopped early on purpose (signal or passing fault): start the same command again
86  the watchdog ended a training that hung, after printing all stacks: start the same command again
 1  a fault of lvdm itself, with a traceback
==  =========================================================================
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator

EXIT_BAD_INPUT = 2
EXIT_REQUEUE = 85
EXIT_STALLED = 86


class UserError(ValueError):
    """Input that the user has to mend. The message is complete: what, where, and what to do."""


class Requeue(Exception):
    """The run stopped early in a good state; the same command with ``run.resume=auto`` goes on."""


class AskedToStop(Requeue):
    """A signal asked for it."""


class RolledBack(Requeue):
    """A loss spike made the run go back to an earlier checkpoint."""


class BadSample(Exception):
    """The bytes of one sample are proven bad: it is replaced, counted and listed, never silently dropped."""


def rank_from_environment() -> int:
    """Rank of this process as torchrun, deepspeed or SLURM tell it, before torch is imported (0 alone)."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


@contextlib.contextmanager
def own_errors(rank: int) -> Iterator[None]:
    """For what one rank may meet alone: it says so itself, since rank 0 only sees that it is gone."""
    try:
        yield
    except (UserError, Requeue) as error:
        if rank != 0:
            print(f"rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        raise


@contextlib.contextmanager
def command_line(name: str, *, ranks: bool = True) -> Iterator[None]:
    """Run a main: a `UserError` becomes one line on stderr and exit code 2.

    Args:
        ranks: processes started together are ranks of one run, which speaks through rank 0 alone. Under srun all speak,
            since the fault may be of one node, and each rank may have a log of its own.
    """
    under_srun = "RANK" not in os.environ and "SLURM_PROCID" in os.environ
    speaks = not ranks or under_srun or rank_from_environment() == 0
    try:
        yield
    except UserError as error:
        _exit(f"{name}: error: {error}", EXIT_BAD_INPUT, speaks)
    except Requeue as stop:
        _exit(f"{name}: stopped: {stop}", EXIT_REQUEUE, speaks)
    except KeyboardInterrupt:
        _exit(f"{name}: interrupted", 130, speaks)


def _exit(message: str, code: int, speaks: bool) -> None:
    if speaks:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)
