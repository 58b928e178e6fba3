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
from lvdm.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all ranks, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

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
    return Ranks(world.rank, world.size, torch.device("cuda", world.local_rank) if cuda else torch.device("cpu"))


def stop() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a small tensor over all ranks, as a new tensor on the same device (a host synchronisation on gloo)."""
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true on any rank; every rank gets the same answer (collective)."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def gather_json(value: Any, device: torch.device) -> list[Any]:
    """``value`` of every rank in rank order, on every rank; it must be plain JSON."""
    world = torch.distributed.get_world_size()
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([payload.numel()], device=device)
    lengths = [torch.zeros_like(length) for _ in range(world)]
    torch.distributed.all_gather(lengths, length)
    longest = max(int(n) for n in lengths)
    padded = torch.nn.functional.pad(payload, (0, longest - payload.numel()))
    received = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(received, padded)
    return [json.loads(bytes(row[: int(n)].cpu().numpy().tobytes())) for row, n in zip(received, lengths, strict=True)]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Row i of every rank, then row i + 1: the rows ``[N * world, ...]`` that ranks took turns in, on every rank."""
    received = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(received, rows.contiguous())
    return torch.stack(received, dim=1).flatten(0, 1)


def together(action: Callable[[], T], device: torch.device) -> T:
    """Run ``action`` on every rank; a `UserError` on any rank is raised on all, so that none waits for the others."""
    message, result = "", None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    raise_first(gather_json(message, device))
    return result  # type: ignore[return-value]


def raise_first(messages: Sequence[str]) -> None:
    """Raise the first non-empty message of the ranks as a `UserError`, naming the ranks if not all saw it."""
    failed = [rank for rank, message in enumerate(messages) if message]
    if not failed:
        return
    where = "" if len(failed) == len(messages) else f" (on rank {', '.join(map(str, failed))})"
    raise UserError(messages[failed[0]] + where)
