"""Start of torch.distributed under DeepSpeed, and the few collectives the rest of the code uses.

Objects travel between ranks as JSON, never as pickles.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from lvdm.engine.environment import read_world
from lvdm.engine.meeting import MeetingPlace, device_index, meet
from lvdm.errors import Requeue, UserError

T = TypeVar("T")
_COLLECTIVE, _COLLECTIVE_MORE = 1.25, 60.0  # times the time-out, and seconds: until a collective gives up by itself
_NCCL_DEFAULTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # a collective that times out ends the process
    "TORCH_FR_BUFFER_SIZE": "2000",  # collectives that the flight recorder remembers
    "TORCH_FR_DUMP_ON_TIMEOUT": "1",  # to $TORCH_FR_DUMP_TEMP_FILE and the rank's number
}
_FILES = 1 << 16
_OF_DEVICE = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "CUSOLVER_STATUS", "CUFFT_")
_OURS = (
    "out of memory",
    "device-side assert",
    "no kernel image",
    "invalid device",
    "invalid argument",
    "invalid configuration",
    "not supported",
    "NOT_SUPPORTED",
    "BAD_PARAM",
    "INVALID_VALUE",
    "ALLOC_FAILED",
    "driver version is insufficient",
    "peer access",
)
_place: MeetingPlace | None = None


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


def start(
    timeout_seconds: float, deterministic: bool = False, met: Callable[[Ranks], None] = lambda ranks: None
) -> Ranks:
    """Join the process group that the launcher's environment describes (NCCL on GPUs, gloo without).

    Args:
        timeout_seconds: for all ranks to come, and nearly so much for one to wait for the others later on. A watchdog
            with this limit speaks first: it knows whose fault it is.
        deterministic: compute the same bits every time; torch raises where it has no such algorithm.
        met: called as soon as all ranks are there, before they connect with each other.
    Raises:
        Requeue: some ranks did not come, or have gone before all were there.
        UserError: there are too few GPUs for the ranks of a node.
    """
    global _place
    world = read_world()
    _allow_connections()
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    for name, value in _NCCL_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if deterministic:
        be_deterministic()
    if cuda:
        device = torch.device("cuda", device_index(world.local_rank, world.local_size, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        # DeepSpeed takes it for the number of the device, which differs where each rank sees one device alone.
        os.environ["LOCAL_RANK"] = str(device.index)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    _place = meet(world, device, timeout_seconds)
    ranks = Ranks(world.rank, world.size, device, world.local_rank)
    met(ranks)
    import deepspeed

    # DeepSpeed calls collectives by names that torch has since renamed, reports its inner life at INFO, and warns of
    # any optimiser that is not its own; skipped steps, its one useful warning, we report ourselves.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its CPU shared-memory op serves inference alone; building it would need a compiler and 80 s at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=_COLLECTIVE * timeout_seconds + _COLLECTIVE_MORE)
    # DeepSpeed makes groups of its own without saying a time-out; torch's default for NCCL is 10 minutes.
    for default in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(torch.distributed.distributed_c10d, default, timeout)
    try:
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=timeout, verbose=False)
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        raise Requeue(f"a rank died or hung while the ranks connected: {str(error).splitlines()[0]}") from error
    return ranks


def stop() -> None:
    """Leave the process group."""
    global _place
    _place = None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def meeting_place() -> MeetingPlace:
    """Where the ranks of the present `start` met."""
    assert _place is not None
    return _place


def _allow_connections() -> None:
    """Many systems let a process have 1024 files open; a group has a connection to each rank, rank 0's store three."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def be_deterministic() -> None:
    """Have torch compute the same bits every time, or raise; before anything touches a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()


class FaultElsewhere(RuntimeError):
    """Another rank raised something that is neither a `UserError` nor a `Requeue`; the message names it at its end."""


def lost_a_device(error: BaseException) -> bool:
    """Whether this rank's GPU failed, or the driver under it; not where memory ran out, nor for a mistake of ours.

    An illegal access can be either's fault; a program that makes them is stopped by ``run.futile_starts``.
    """
    text = str(error)
    of_device = isinstance(error, torch.AcceleratorError) or any(sign in text for sign in _OF_DEVICE)
    ours = isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in _OURS)
    return isinstance(error, RuntimeError) and of_device and not ours


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
        timeout_seconds: one rank may be so much later than another, and some more: a watchdog with this limit is first.
    """
    timeout = timedelta(seconds=_COLLECTIVE * timeout_seconds + _COLLECTIVE_MORE)
    group = torch.distributed.new_group(backend="gloo", timeout=timeout)
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
        FaultElsewhere: another rank raised something else.
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
    raise _KNOWN.get(answers[first][1], FaultElsewhere)(answers[first][2] + where)


_KNOWN = {"user": UserError, "requeue": Requeue}
