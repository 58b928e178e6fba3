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
            local_size=int(env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]),
        )
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(20000 + _number(env, "SLURM_JOB_ID") % 20000))
    else:
        world = World(rank=0, size=1, local_rank=0, local_size=1)
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(_free_port()))
    env["RANK"], env["WORLD_SIZE"] = str(world.rank), str(world.size)
    env["LOCAL_RANK"] = str(world.local_rank)
    env.setdefault("GOMP_SPINCOUNT", _SPINS)
    return world


def first_host(nodes: str) -> str:
    """First host of a SLURM node list: ``gpu[003-007,12],cpu1`` -> ``gpu003``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(f"cannot read the SLURM node list {nodes!r}; set MASTER_ADDR to the first node's name")
    prefix, index, suffix = match.groups(default="")
    return prefix + index + suffix


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
