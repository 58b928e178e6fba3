"""The launchers of clusters without SLURM: their command lines in slurm/README.md, and the exit codes they pass on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from tests.commands import write_config
from tests.conftest import Toy
from tests.slurm.cluster import ROOT
from tests.train.runs import losses_of

TRAIN = str(ROOT / "launch/train.py")
PDSH = f"""#!{sys.executable}
# Stands in for pdsh and ssh: runs the command on this machine, once for each host, whose number is %n.
import subprocess, sys

hosts, *words = sys.argv[sys.argv.index("-w") + 1 :]
runs = [subprocess.Popen(["bash", "-c", " ".join(words).replace("%n", str(i))]) for i in range(len(hosts.split(",")))]
sys.exit(max(run.wait() for run in runs))  # as pdsh -S
"""
SSH = """#!/usr/bin/env bash
echo 127.0.0.1 # what is asked by ssh is the host's name and address
"""


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    """A launcher with the stand-ins in ``folder`` first, and what it says in a file beside the config."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env |= {"PATH": f"{folder}:{Path(sys.executable).parent}:{env['PATH']}"}
    with (folder / f"{command[0]}.log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, text=True)


def test_hostfile_and_torchrun_start_the_ranks_of_one_run(toy: Toy, tmp_path: Path) -> None:
    """A run under torchrun; under deepspeed, which other tests train with, one that does not fit the ranks."""
    for name, text in (("pdsh", PDSH), ("ssh", SSH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    tree = toy.autoencoder(tmp_path / "run", run__steps=1, batch__micro=1, validation__shards=[])
    write_config(tree, tmp_path / "run.yaml")
    port = random.randrange(34000, 44000)
    elastic = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "mine")
    commands = {
        "torchrun": ("--nnodes", "1", "--nproc-per-node", "2", *elastic, TRAIN, "--config", "run.yaml"),
        "deepspeed": ("--hostfile", "hosts", "--master_port", str(port + 1), TRAIN, "--config", "run.yaml"),
    }
    runs = {
        "torchrun": start(tmp_path, "torchrun", *commands["torchrun"]),
        "deepspeed": start(tmp_path, "deepspeed", *commands["deepspeed"], "batch.size=3"),
    }
    try:
        codes = {name: run.wait(400) for name, run in runs.items()}
    finally:
        for run in runs.values():
            run.kill()
    said = {name: (tmp_path / f"{name}.log").read_text() for name in runs}
    assert codes == {"torchrun": 0, "deepspeed": 2}, said
    assert "2 ranks on cpu" in said["torchrun"]
    assert len(losses_of(tmp_path / "run")) == 1
    assert "batch.size 3 is not divisible by batch.micro 1 x 2 ranks" in said["deepspeed"]
