"""Runs on the cluster that something happens to, and the unbroken ones that they must equal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lvdm.config import LatentDiffusionTraining, parse_training_config
from lvdm.jobs.encode_latents import encode_folder
from tests.commands import write_config
from tests.conftest import Toy
from tests.ranks import run_ranks
from tests.slurm.cluster import ROOT, Cluster, wait_until
from tests.train.runs import run

PATIENCE = 400.0  # seconds: a loaded machine is slow, and a test that waits for nothing is not


@dataclass
class Outcome:
    """What came of a scenario."""

    folder: Path
    """Where its jobs ran."""
    job: str
    """Its job, or the one that something happened to."""
    ends: tuple[str, int, str]
    """State of that job, starts after the first, exit code."""
    facts: dict[str, Any] = field(default_factory=dict)


class Scenarios:
    """All of them at the same time, on nodes of their own: most of their time is waiting."""

    def __init__(self, cluster: Cluster, toy: Toy, folder: Path) -> None:
        self._pool = ThreadPoolExecutor(max_workers=6)
        self._cluster, self._toy = cluster, toy
        self.preempted = self._start(self._run_preempted, folder / "preempted")
        self.shrunk = self._start(self._run_until_a_node_dies, folder / "shrunk", "second", "1-2", "n4")
        self.moved = self._start(self._run_until_a_node_dies, folder / "moved", "spare", "2", "n8")
        self.chain = self._start(self._run_chain, folder / "chain")
        self.unbroken_4 = self._start(self._run_unbroken, folder / "unbroken_4", 4, 30, 4)
        self.unbroken_2 = self._start(self._run_unbroken, folder / "unbroken_2", 2, 20, 8)

    def close(self) -> None:
        """Wait for their ends."""
        self._pool.shutdown()

    def _start(self, scenario: Any, folder: Path, *args: Any) -> Future[Any]:
        folder.mkdir()
        return self._pool.submit(scenario, folder, *args)

    def _tree(self, folder: Path, steps: int, batch: int = 4) -> dict[str, Any]:
        changes = {"run__steps": steps, "run__save_every": 3, "run__keep": 100, "batch__size": batch}
        return self._toy.diffusion(folder / "run", **changes)

    def _wait_for_step(self, folder: Path, step: int, job: str) -> None:
        log = folder / "log.jsonl"

        def there() -> bool:
            assert not self._cluster.is_over(job), f"job {job} ended before step {step}: {self._cluster.facts(job)}"
            return log.is_file() and len(log.read_text().splitlines()) >= step

        wait_until(there, PATIENCE, lambda: f"no step {step} in {folder}")

    def _run_unbroken(self, folder: Path, world: int, steps: int, batch: int) -> Path:
        run_ranks(run, world, self._tree(folder, steps, batch), timeout=PATIENCE)
        return folder / "run"

    def _run_preempted(self, folder: Path) -> Outcome:
        """Two nodes of two tasks; a job of a partition with priority takes the nodes."""
        write_config(self._tree(folder, 30), folder / "run.yaml")
        options = ("--partition=first", "--nodes=2", "--ranks-per-node=2", "--job-name=preempted")
        job = self._cluster.submit(*options, "train.sbatch", "run.yaml", cwd=folder)
        self._wait_for_step(folder / "run", 3, job)
        other = self._cluster.call(
            *("sbatch", "--parsable", "--partition=urgent", "--nodelist=n[1-2]", "--nodes=2", "--exclusive"),
            *("--output=/dev/null", "--wrap", "sleep 1"),
            cwd=folder,
        )
        ended = self._cluster.end_of(other, PATIENCE)
        return Outcome(folder, job, self._cluster.end_of(job, PATIENCE), {"urgent": ended})

    def _run_until_a_node_dies(self, folder: Path, partition: str, nodes: str, victim: str) -> Outcome:
        """Two nodes of a task each, of which one loses its power."""
        write_config(self._tree(folder, 20, 8), folder / "run.yaml")  # steps long enough for a node to die in one
        options = (f"--partition={partition}", f"--nodes={nodes}", "--ranks-per-node=1", f"--job-name={folder.name}")
        job = self._cluster.submit(*options, "train.sbatch", "run.yaml", cwd=folder)
        self._wait_for_step(folder / "run", 4, job)
        assert self._cluster.sandbox("node-kill", victim).returncode == 0
        return Outcome(folder, job, self._cluster.end_of(job, PATIENCE))

    def _run_chain(self, folder: Path) -> Outcome:
        """Every stage by dependencies; one task of the array that encodes eight shards is killed at work."""
        autoencoder = self._toy.autoencoder(
            folder / "runs/ae",
            run__steps=1,
            data__video__shards=[f"{folder}/shapes/train"],
            validation__shards=[f"{folder}/shapes/held_out"],
        )
        diffusion = self._toy.diffusion(
            folder / "runs/diffusion",
            run__steps=2,
            data__video__shards=[f"{folder}/shapes/train"],
            data__latents__shards=[f"{folder}/latents"],
            vae={"kind": "lvdm", "folder": f"{folder}/exports/ae", "scaling": f"{folder}/latents/latents.json"},
        )
        write_config(autoencoder, folder / "ae.yaml")
        write_config(diffusion, folder / "diffusion.yaml")
        (folder / "toy.plan").write_text(PLAN)
        (folder / "settings.sh").write_text(f"export SBATCH_PARTITION=third\nsource {ROOT}/slurm/settings.sh\n")
        said = self._cluster.call(
            str(ROOT / "slurm/pipeline.sh"), "toy.plan", cwd=folder, LVDM_SLURM_SETTINGS=str(folder / "settings.sh")
        )
        jobs = {line.split()[0]: line.split()[2] for line in said.splitlines() if line.startswith("toy-")}
        wait_until(lambda: self._cluster.facts(jobs["toy-latents"])["JobState"] != "PENDING", PATIENCE, lambda: said)
        killed = kill_holder(folder / "latents", self._cluster, jobs["toy-latents"])
        ends = {name: self._cluster.end_of(job, PATIENCE) for name, job in jobs.items() if name != "toy-latents"}
        config = parse_training_config(diffusion, source="test")
        assert isinstance(config, LatentDiffusionTraining)
        cpu = torch.device("cpu")
        encode_folder(config, f"{folder}/shapes/train", f"{folder}/alone", device=cpu, dtype=torch.float32)
        return Outcome(folder, killed, self._cluster.end_of(killed, PATIENCE), {"said": said, "ends": ends})


PLAN = """
stage shards shards.sbatch shapes --out shapes \
    --clips 160 --held-out-clips 8 --frames 8 --size 16 --fps 8 --shard-size 20
stage autoencoder train.sbatch ae.yaml
stage autoencoder-export export.sbatch runs/ae exports/ae
stage latents --array=0-1 encode.sbatch --config diffusion.yaml --lease-seconds 5
stage training train.sbatch diffusion.yaml
stage export export.sbatch runs/diffusion exports/diffusion
stage samples --ranks-per-node=2 sample.sbatch exports/diffusion samples --steps 2 --no-gif \
    --prompt 'a red circle moves left' --prompt 'a green square moves up'
stage scores evaluate.sbatch --metric shapes samples --out scores.json
"""


def kill_holder(target: Path, cluster: Cluster, array: str) -> str:
    """SIGKILL to a task of an array that holds a lease; the task, as SLURM names it."""
    killed: list[str] = []

    def kill() -> bool:
        for lease in target.glob(".leases/*"):
            with contextlib.suppress(OSError, ValueError):  # it was given back
                holder = json.loads(lease.read_text())["pid"]
                for pid, task in tasks_of(array):
                    if holder in pids_of(pid):
                        os.kill(pid, signal.SIGKILL)
                        killed.append(f"{array}_{task}")
                        return True
        return False

    wait_until(kill, PATIENCE, lambda: f"no lease in {target}; {cluster.facts(array)}", every=0.01)
    return killed[0]


def tasks_of(array: str) -> list[tuple[int, str]]:
    """Processes of an array's encoders, and the array task of each."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if not {"python", "encode_latents.py"} <= {Path(word).name for word in words(folder / "cmdline")}:
                continue
            env = dict(item.split("=", 1) for item in words(folder / "environ") if "=" in item)
            if env.get("SLURM_ARRAY_JOB_ID") == array:
                found.append((int(folder.name), env["SLURM_ARRAY_TASK_ID"]))
    return found


def words(file: Path) -> list[str]:
    """The strings of a file of /proc."""
    return file.read_bytes().decode(errors="replace").split("\0")


def pids_of(pid: int) -> list[int]:
    """The ids that a process has outside and inside the node that it runs on."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next([int(n) for n in line.split()[1:]] for line in status.splitlines() if line.startswith("NSpid:"))
