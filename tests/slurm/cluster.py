"""A SLURM of ten nodes on this machine, started by sandbox.sh."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SANDBOX = str(Path(__file__).with_name("sandbox.sh"))
# Jobs on nodes of their own do not hear of what happens to the others: power failures, preemption.
_CONF = "\n".join(
    f"PartitionName={name} Nodes={nodes} DefaultTime=10 MaxTime=INFINITE PriorityTier=1 {preemption} State=UP"
    for name, nodes, preemption in (
        ("first", "n[1-2]", "PreemptMode=REQUEUE GraceTime=60"),
        ("second", "n[3-4]", "PreemptMode=REQUEUE GraceTime=60"),
        ("third", "n[5-6]", "PreemptMode=REQUEUE GraceTime=60"),
        ("given-up", "n7", "PreemptMode=CANCEL GraceTime=0"),
        ("spare", "n[8-10]", "PreemptMode=REQUEUE GraceTime=60"),
    )
)

_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")


class Unavailable(Exception):
    """SLURM cannot be started on this machine."""


class Cluster:
    """The nodes n1 to n10; partitions debug and urgent of all, and those of `_CONF`."""

    def __init__(self, folder: Path) -> None:
        """Start it. Raises `Unavailable` with the reason."""
        foreign = ("SLURM_", "SBATCH_", "MASTER_")  # of a job, or of a run, that the tests are part of
        self._env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self._env |= {
            "SLURM_SANDBOX_DIR": str(folder),
            "SLURM_SANDBOX_NODES": "10",
            "SLURM_SANDBOX_PORT": str(random.randrange(10000, 19000, 20)),
            "SLURM_SANDBOX_OWNER": str(os.getpid()),
            "SLURM_SANDBOX_KILLWAIT": "20",
            "SLURM_SANDBOX_REQUEUE": "15",  # as long may a busy node take to launch a step: its credential
            "SLURM_SANDBOX_GRACE": "60",
            "SLURM_SANDBOX_DOWN": "40",
            "SLURM_SANDBOX_MAX_S": "2400",
            "SLURM_SANDBOX_CONF": _CONF,
        }
        started = self.sandbox("start")
        if started.returncode:
            raise Unavailable(f"SLURM does not start here: {started.stderr.strip().splitlines()[-1]}")
        self._env["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
        self._env["PATH"] = f"{Path(sys.executable).parent}:{self._env['PATH']}"
        self.folder = folder

    def sandbox(self, *command: str) -> subprocess.CompletedProcess[str]:
        """What sandbox.sh does with ``command``, such as ``node-kill n2``."""
        return subprocess.run([_SANDBOX, *command], env=self._env, capture_output=True, text=True, timeout=90)

    def call(self, *command: str, cwd: Path | None = None, code: int = 0, **env: str) -> str:
        """What a command says, as a user of the cluster types it; it must end with exit code ``code``."""
        done = subprocess.run(command, cwd=cwd, env=self._env | env, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip() if code == 0 else done.stderr.strip()

    def submit(self, *arguments: str, cwd: Path, **env: str) -> str:
        """Submit by slurm/submit.sh; the job's id."""
        return self.call(str(ROOT / "slurm" / "submit.sh"), "--parsable", *arguments, cwd=cwd, **env)

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        words = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def is_over(self, job: str) -> bool:
        """Whether a job has ended for good."""
        return self.facts(job)["JobState"] in _OVER

    def end_of(self, job: str, timeout: float) -> tuple[str, int, str]:
        """Wait until a job is over: its state, the times it was started again, and its exit code."""
        wait_until(lambda: self.is_over(job), timeout, lambda: f"job {job}: {self.facts(job)}")
        facts = self.facts(job)
        return facts["JobState"], int(facts["Restarts"]), facts["ExitCode"]

    def stop(self) -> None:
        """End all jobs and all daemons."""
        assert self.sandbox("stop").returncode == 0


def wait_until(true: Callable[[], bool], timeout: float, what: Callable[[], str], every: float = 0.2) -> None:
    """Look ``every`` so many seconds. Raises `AssertionError` with ``what`` is instead."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"after {timeout} s: {what()}"
        time.sleep(every)
