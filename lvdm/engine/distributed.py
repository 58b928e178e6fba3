"""Start of torch.distributed under DeepSpeed, and the few collectives the rest of the code uses.

Objects travel between ranks as JSON, never as pickles.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from lvdm.engine.environment import read_world
from lvdm.errors import Requeue, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all ranks, and the device it computes on."""

    rank: int
    world: int
    device: torch.device
    local_rank: int = 0
    """Place among the ranks of this node; the node's first rank has 0."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the logs."""
        return self.rank == 0


def start(timeout_seconds: float) -> Ranks:
    """Join the process group that the launcher's environment describes (NCCL on GPUs, gloo without).

    Args:
        timeout_seconds: a collective that takes longer ends the run instead of hanging it.
    """
    world = read_world()
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    import deepspeed

    # DeepSpeed calls collectives by names that torch has since renamed, reports its inner life at INFO, and warns of
    # any optimiser that is not its own; skipped steps, its one useful warning, we report ourselves.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its CPU shared-memory op serves inference alone; building it would need a compiler and 80 s at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if cuda:
        torch.cuda.set_device(world.local_rank)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_seconds), verbose=False
    )
    device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
    return Ranks(world.rank, world.size, device, world.local_rank)


def stop() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


def lost_a_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, or does not answer in time."""
    of_gloo = "gloo" in str(error) and any(text in str(error) for text in ("onnection", "imed out"))
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and of_gloo)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a small tensor over all ranks, as a new tensor on the same device (a host synchronisation on gloo)."""
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total


def on_any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of ``flags`` are true on any rank; every rank gets the same answer (collective)."""
    return [count > 0 for count in sum_over_ranks(torch.tensor(flags, dtype=torch.float32, device=device)).tolist()]


def host_group(timeout_seconds: float) -> torch.distributed.ProcessGroup:
    """A group of all ranks that speak through host memory, apart from all other collectives (collective).

    For threads beside the training: what they gather never waits for a step, nor a step for them.

    Args:
        timeout_seconds: one rank may be so much later than another.
    """
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    assert isinstance(group, torch.distributed.ProcessGroup)
    return group


def gather_json(value: Any, via: torch.device | torch.distributed.ProcessGroup) -> list[Any]:
    """``value`` of every rank in rank order, on every rank; it must be plain JSON.

    Args:
        via: the device of the ranks' own group, or a `host_group`.
    """
    device, group = (via, None) if isinstance(via, torch.device) else (torch.device("cpu"), via)
    world = torch.distributed.get_world_size()
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([payload.numel()], device=device)
    lengths = [torch.zeros_like(length) for _ in range(world)]
    torch.distributed.all_gather(lengths, length, group=group)
    longest = max(int(n) for n in lengths)
    padded = torch.nn.functional.pad(payload, (0, longest - payload.numel()))
    received = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(received, padded, group=group)
    return [json.loads(bytes(row[: int(n)].cpu().numpy().tobytes())) for row, n in zip(received, lengths, strict=True)]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Row i of every rank, then row i + 1: the rows ``[N * world, ...]`` that ranks took turns in, on every rank."""
    received = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(received, rows.contiguous())
    return torch.stack(received, dim=1).flatten(0, 1)


def together(action: Callable[[], T], via: torch.device | torch.distributed.ProcessGroup) -> T:
    """Run ``action`` on every rank; an error on any rank is raised on all, so that none waits for the others."""
    result: list[T] = []
    everyones(lambda: result.append(action()), via)
    return result[0]


def everyones(action: Callable[[], Any], via: torch.device | torch.distributed.ProcessGroup) -> list[Any]:
    """What ``action`` gives on each rank, plain JSON, in rank order.

    Raises:
        UserError, Requeue: on all ranks, what any raised; a `UserError` before a `Requeue`, which needs nobody.
        RuntimeError: another rank raised something else.
    """
    value, kind, error = None, "", None
    try:
        value = action()
    except Exception as raised:
        error = raised
        kind = next((name for name, known in _KNOWN.items() if isinstance(raised, known)), "fault")
    answers = gather_json([value, kind, str(error)], via)
    failed = [rank for rank, (_, kind, _) in enumerate(answers) if kind]
    if not failed:
        return [value for value, _, _ in answers]
    if error is not None and kind == "fault":
        raise error
    first = min(failed, key=lambda rank: [*_KNOWN, "fault"].index(answers[rank][1]))
    where = "" if len(failed) == len(answers) else f" (on rank {', '.join(map(str, failed))})"
    raise _KNOWN.get(answers[first][1], RuntimeError)(answers[first][2] + where)


_KNOWN = {"user": UserError, "requeue": Requeue}
