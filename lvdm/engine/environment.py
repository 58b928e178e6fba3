"""Which ranks there are, read from the launcher's environment before torch is imported.

Understood: ``deepspeed`` and ``torchrun`` (RANK, WORLD_SIZE, LOCAL_RANK), SLURM's ``srun`` (SLURM_PROCID and friends),
and a plain ``python`` start, which is a world of one.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from lvdm.errors import UserError

_SPINS = "10000"
"""Turns that an idle thread of torch's CPU kernels waits busily. As fast as libgomp's own 300000 on a machine that has
nothing else to do, four times as fast where another process wants a core (measured: small convolutions, 2 cores)."""

_PORTS = range(20000, 32000)


@dataclass(frozen=True)
class World:
    """Rank of this process among all, and its place on its own machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def read_world(env: MutableMapping[str, str] = os.environ) -> World:
    """Find the world in ``env`` and complete the variables that torch.distributed's ``env://`` start needs."""
    if "RANK" in env:
        world = World(
            rank=_number(env, "RANK"),
            size=_number(env, "WORLD_SIZE"),
            local_rank=_number(env, "LOCAL_RANK"),
            local_size=int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or "1"),
        )
    elif "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        world = World(
            rank=_number(env, "SLURM_PROCID"),
            size=_number(env, "SLURM_NTASKS"),
            local_rank=_number(env, "SLURM_LOCALID"),
            local_size=tasks_on_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(env.get("SLURM_NODEID", "0"))),
        )
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(meeting_port(env)))
    else:
        world = World(rank=0, size=1, local_rank=0, local_size=1)
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(_free_port()))
    env["RANK"], env["WORLD_SIZE"] = str(world.rank), str(world.size)
    # all of them: who reads the environment next finds RANK and takes them for a launcher's
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = str(world.local_rank), str(world.local_size)
    env.setdefault("GOMP_SPINCOUNT", _SPINS)
    return world


def first_host(nodes: str) -> str:
    """First host of a SLURM node list: ``gpu[003-007,12],cpu1`` -> ``gpu003``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(f"cannot read the SLURM node list {nodes!r}; set MASTER_ADDR to the first node's name")
    prefix, index, suffix = match.groups(default="")
    return prefix + index + suffix


def tasks_on_node(counts: str, node: int) -> int:
    """Tasks on the node with index ``node``, of SLURM's list for all nodes: ``2(x2),1`` -> 2, 2 and 1."""
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            break
        node -= int(match[2] or 1)
        if node < 0:
            return int(match[1])
    raise UserError(f"cannot read SLURM_STEP_TASKS_PER_NODE={counts!r}; start the ranks with srun")


def meeting_port(env: MutableMapping[str, str]) -> int:
    """Port at which the ranks of a SLURM step meet: the same for all of them, another for the steps beside it, for the
    job's next start (whose predecessor may not have gone yet) and for other jobs on the node.

    It lies below the ports that systems give to outgoing connections (from 32768 on Linux).
    """
    step, restart = env.get("SLURM_STEP_ID", "0"), env.get("SLURM_RESTART_COUNT", "0")
    number = 128 * _number(env, "SLURM_JOB_ID") + 16 * int(step) + int(restart)
    return _PORTS.start + number % len(_PORTS)


def _number(env: MutableMapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not text.isdigit():
        raise UserError(
            f"environment variable {name}={text!r} is not a number, though the launcher set others; unset RANK"
        )
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
