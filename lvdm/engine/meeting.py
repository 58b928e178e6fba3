"""How the ranks of a run find each other, and what is said where some do not come."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from lvdm.engine.environment import World
from lvdm.engine.verdict import listed
from lvdm.errors import Requeue, UserError, own_errors

_LATE = 20.0  # seconds that ranks may come apart, however short a step may be: their imports take different times
_ANSWER_LATER = 5.0  # seconds, for clocks that began at different times
_PARTING = 1.0  # seconds that rank 0 leaves the others to read what is wrong
_LOOK = 0.1  # seconds between looks at who has come
_LISTED = 16
_ANSWER = "lvdm/answer"


@dataclass(frozen=True)
class MeetingPlace:
    """The store through which the ranks found each other. It serves as long as this object lives."""

    address: str
    port: int
    host: str
    """Name of the machine that it runs on, as that machine calls itself."""
    served_by_rank_0: bool
    """False under ``torchrun``, whose agent serves it."""
    store: torch.distributed.Store


def meet(world: World, device: torch.device, timeout_seconds: float) -> MeetingPlace:
    """Wait until all ranks are there, so that it can be said which are not.

    The process group's own start would wait as long and know no names. It finds this store's server in its place.

    Args:
        timeout_seconds: for the last rank to come, and some more.
    Raises:
        Requeue: some ranks did not come, or rank 0 did not.
        UserError: two ranks compute on the same GPU, or the launcher would restart ranks by itself.
    """
    deadline = time.monotonic() + timeout_seconds + _LATE
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launchers and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UserError(
            "torchrun must not restart ranks by itself, since its store still tells of the start before: leave out "
            "--max-restarts, and start the same command again"
        )
    try:
        store = torch.distributed.TCPStore(
            address,
            port,
            is_master=world.rank == 0 and not launchers,
            timeout=timedelta(seconds=max(1.0, deadline - time.monotonic())),
            wait_for_workers=False,
            multi_tenant=True,
        )
        uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
        store.set(_came(world.rank), json.dumps([socket.gethostname(), uuid]))
        if world.rank == 0:
            store.set(_ANSWER, json.dumps(_wait_for_all(store, world.size, deadline)))
        while not store.check([_ANSWER]):
            if time.monotonic() > deadline + _ANSWER_LATER:
                raise torch.distributed.DistStoreError("rank 0 did not come")
            time.sleep(_LOOK)
        host, missing, shared = json.loads(store.get(_ANSWER))
        if world.rank == 0 and (missing or shared):
            time.sleep(_PARTING)
    except torch.distributed.DistError as error:
        with own_errors(world.rank):  # there may be no rank 0
            reason = str(error).splitlines()[0]
            raise Requeue(f"cannot meet the other ranks at {address}:{port}: {reason}") from error
    if missing:
        raise Requeue(f"of {world.size} ranks, these did not come to {address}:{port} in time: {missing}")
    if shared:
        raise UserError(shared)
    return MeetingPlace(address, port, host, not launchers, store)


def _wait_for_all(store: torch.distributed.Store, world: int, deadline: float) -> tuple[str, str, str]:
    """On rank 0: its host, the ranks that have not come by ``deadline``, and what is wrong with the devices."""
    missing = list(range(world))
    while missing := [rank for rank in missing if not store.check([_came(rank)])]:
        if time.monotonic() > deadline:
            return socket.gethostname(), listed(missing, _LISTED), ""
        time.sleep(_LOOK)
    came = store.multi_get([_came(rank) for rank in range(world)])
    return socket.gethostname(), "", shared_devices([tuple(json.loads(place)) for place in came])


def _came(rank: int) -> str:
    return f"lvdm/came/{rank}"


def device_index(local_rank: int, local_size: int, devices: int) -> int:
    """Which of the ``devices`` that a rank sees is its own.

    SLURM's ``--gpus-per-task=1`` shows each rank one device, which then is that rank's; `shared_devices` finds out
    whether it is another's too.

    Raises:
        UserError: there are too few for the ``local_size`` ranks of the node.
    """
    if devices == 1:
        return 0
    if devices < local_size:
        raise UserError(
            f"{local_size} ranks on {socket.gethostname()} see {devices} GPUs; start one rank a GPU, each of which "
            "sees all GPUs of its node or one alone (srun --gpus-per-task=1)"
        )
    return local_rank


def shared_devices(came: Sequence[tuple[str, str]]) -> str:
    """What is wrong with the devices of ``came``: host and device of each rank, in rank order; empty where nothing is.

    Devices are named by what is theirs alone (a GPU's UUID); those without a name may be shared.
    """
    users: dict[tuple[str, str], list[str]] = {}
    for rank, place in enumerate(came):
        if place[1]:
            users.setdefault(place, []).append(str(rank))
    for (host, _), ranks in users.items():
        if len(ranks) > 1:
            return f"ranks {', '.join(ranks)} on {host} share one GPU; start one rank a GPU"
    return ""
