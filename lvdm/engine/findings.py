"""What a rank finds before the first step: of its host's disks and memory, its device, versions and the other ranks."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import nn

import lvdm
from lvdm.checkpoint.folder import SPARE
from lvdm.checkpoint.reader import step_of
from lvdm.config import AnyTraining
from lvdm.engine.deepspeed_config import deepspeed_config
from lvdm.engine.distributed import Ranks, gather_rows, sum_over_ranks
from lvdm.engine.memory_plan import MemoryPlan, checkpoint_bytes, memory_plan
from lvdm.storage import locate

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
"""Where torch's loader processes put batches."""
_UNLIMITED = 1 << 60  # bytes; limits that say "none" are larger
_FILES = 1000  # of a run beside its checkpoints


@dataclass(frozen=True)
class Room:
    """Memory, by somebody's account of it."""

    where: str
    total: int
    """Bytes there are at all."""
    free: int | None
    """Bytes that can be had now; None if that is not told."""


@dataclass(frozen=True)
class Device:
    """A GPU."""

    name: str
    total: int
    """Bytes."""
    free: int
    """Bytes that this process could allocate."""


@dataclass(frozen=True)
class Findings:
    """What one rank finds."""

    rank: int
    host: str
    node: int
    """First rank of its node."""
    needs_device: int = 0
    """Bytes that the model's state will take on the device, beyond what is there already."""
    needs_host: int = 0
    """The same in the host's memory; all of it, where the device is the CPU."""
    plan: str = ""
    """What these are for."""
    resident: int = 0
    """Bytes of the host's memory that the process has to itself."""
    memory: tuple[Room, ...] = ()
    """Of its host."""
    shared_memory: int = _UNLIMITED
    """Bytes free where loader processes put batches."""
    device: Device | None = None
    """None without a GPU."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What must be the same on all ranks, by name; a node's first rank alone may know of some."""
    faults: tuple[str, ...] = ()
    """What is wrong by itself, in complete sentences but for who says it."""
    notes: tuple[str, ...] = ()
    """What is worth to be said of it."""
    probe: str = ""
    """A folder that the main rank has made where checkpoints will be; empty where they go to a store."""

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Findings:
        """Of ``asdict``, by way of JSON."""
        rooms = tuple(Room(**room) for room in facts["memory"])
        device = None if facts["device"] is None else Device(**facts["device"])
        lists = {name: tuple(facts[name]) for name in ("faults", "notes")}
        return cls(**{**facts, **lists, "memory": rooms, "device": device})


@dataclass(frozen=True)
class Reply:
    """What a rank finds of the others."""

    clock: float
    """UTC seconds, right after all have met."""
    sees_probe: bool = True
    """Whether it sees the folder that the main rank made."""
    wrong_sum: bool = False
    """Whether a sum over all ranks came out wrong."""
    garbled: tuple[int, ...] = ()
    """Ranks whose numbers arrived changed."""


def look(config: AnyTraining, model: nn.Module, ranks: Ranks, checkpoints: str) -> Findings:
    """What this rank finds; the arguments are those of `lvdm.engine.preflight.check`."""
    on_gpu = ranks.device.type == "cuda"
    faults, notes, probe = _look_at_disks(config, model, checkpoints, ranks.world) if ranks.is_main else ([], [], "")
    faults += _test_device(ranks.device)
    plan = _plan(config, model, ranks)
    tensors = [param for param in model.parameters() if param.device.type == ranks.device.type]
    needs_device = max(0, sum(plan.device.values()) - sum(one.numel() * one.element_size() for one in tensors))
    needs_host = sum(plan.host.values())
    return Findings(
        rank=ranks.rank,
        host=socket.gethostname(),
        node=ranks.rank - ranks.local_rank,
        needs_device=needs_device if on_gpu else 0,
        needs_host=needs_host if on_gpu else needs_host + needs_device,
        plan=str(plan),
        resident=_resident(),
        memory=tuple(host_memory()),
        shared_memory=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else _UNLIMITED,
        device=_device(ranks.device) if on_gpu else None,
        versions=_versions(config, with_code=ranks.local_rank == 0),
        faults=tuple(faults),
        notes=tuple(notes),
        probe=probe,
    )


def _plan(config: AnyTraining, model: nn.Module, ranks: Ranks) -> MemoryPlan:
    learning = [param.numel() for param in model.parameters() if param.requires_grad]
    frozen = [param.numel() for param in model.parameters() if not param.requires_grad]
    on_gpu = ranks.device.type == "cuda"
    record = deepspeed_config(config.engine, config.batch, config.optim, ranks.world, on_gpu, sum(learning))
    return memory_plan(learning, frozen, record, ranks.rank, ranks.world)


def _look_at_disks(
    config: AnyTraining, model: nn.Module, checkpoints: str, world: int
) -> tuple[list[str], list[str], str]:
    """Faults, notes, and a folder that was made where checkpoints will be (empty in a store)."""
    fs, path = locate(checkpoints)
    faults, probe = look_at_disk(Path(config.run.folder), 0, 0, world)
    shutil.rmtree(probe, ignore_errors=True)
    if faults or not isinstance(fs, LocalFileSystem):
        return faults, [], ""
    learning = sum(param.numel() for param in model.parameters() if param.requires_grad)
    size = checkpoint_bytes(learning, sum(param.numel() for param in model.parameters()) - learning)
    new, for_good = checkpoints_to_come(config, Path(path))
    faults, probe = look_at_disk(Path(path), size, new, world)
    free = shutil.disk_usage(probe).free if for_good and not faults else math.inf
    if free >= (new + for_good) * size:
        return faults, [], probe
    said = f"run.keep_every may keep {for_good} more checkpoints of {size_text(size)} for good; their disk has"
    return faults, [f"{said} {size_text(free)} left"], probe


def checkpoints_to_come(config: AnyTraining, folder: Path) -> tuple[int, int]:
    """By how many checkpoints a folder will grow: at most at a time by those that go again, and by those that stay."""
    run = config.run
    saves = -(-run.steps // run.save_every)
    kept = run.keep + (run.keep_best if config.validation.shards else 0)
    for_good = min(saves, run.steps * config.batch.size // run.keep_every) if run.keep_every else 0
    present = sum(step_of(name) is not None for name in os.listdir(folder)) if folder.is_dir() else 0
    # one more than are kept, since the oldest goes when the newest is whole
    return max(1, min(kept + 1, saves) - present), max(0, for_good - present)


def look_at_disk(folder: Path, size: int, count: int, world: int) -> tuple[list[str], str]:
    """What is wrong with the disk of a folder, which need not exist yet, for ``count`` checkpoints of ``size`` bytes
    and as many files each as ``world`` ranks write; and a new folder on that disk, empty where something is."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    probe = ""
    try:
        probe = tempfile.mkdtemp(prefix=".writing-", dir=place)  # which sweeping a folder of checkpoints removes
        Path(probe, "file").write_bytes(b"lvdm")
        disk = os.statvfs(probe)
    except OSError as error:
        shutil.rmtree(probe, ignore_errors=True)
        return [f"cannot write in {place}: {error.strerror}; mend that, or choose another folder"], ""
    faults, free, needed = [], disk.f_bavail * disk.f_frsize, count * size + SPARE
    if free < needed:
        what = f", for {count} of {size_text(size)} and {size_text(SPARE)} to spare" if count else ""
        faults.append(
            f"the disk of {folder} has {size_text(free)} left, and the run needs {size_text(needed)}{what}; make room"
            + (", or keep fewer (run.keep)" if count else "")
        )
    files = count * (world + 2) + _FILES
    if disk.f_files and disk.f_favail < files:  # some file systems do not count
        faults.append(f"the disk of {folder} takes {disk.f_favail:,} more files, and the run may need {files:,}")
    if faults:
        shutil.rmtree(probe, ignore_errors=True)
    return faults, "" if faults else probe


def _test_device(device: torch.device) -> list[str]:
    """What is wrong with its arithmetic."""
    advice = "take this host out of the job"
    try:
        wrong = wrong_rows(device, 2048 if device.type == "cuda" else 256)
    except RuntimeError as error:  # as CUDA's are
        return [f"cannot compute on {device}: {str(error).splitlines()[0]}; {advice}"]
    return [f"{device} computes wrongly, {wrong} rows of a product of matrices; {advice}"] if wrong else []


def wrong_rows(device: torch.device, size: int) -> int:
    """Rows of a product of square matrices that ``device`` gets wrong.

    They are of small whole numbers, so that the product is exact in any precision. By Freivalds' check it is multiplied
    by a vector, in float64 on the CPU, and compared with the factors multiplied by that one after the other.
    """
    row = torch.arange(size, dtype=torch.float64)
    column = row[:, None]
    first, second = (column * 37 + row * 11) % 15 - 7, (column * 5 + row * 29) % 13 - 6
    product = torch.matmul(first.float().to(device), second.float().to(device)).cpu().double()
    vector = (row * 7919) % 1009 + 1
    wrong = product @ vector != first @ (second @ vector)
    return int((wrong | (product != product.round()).any(dim=1)).sum())


def exchange(ranks: Ranks) -> tuple[bool, tuple[int, ...]]:
    """Whether a sum over all ranks comes out wrong here, and whose numbers arrive changed (collective)."""
    size = min(1 << 16, (16 << 20) // ranks.world)
    mine = _numbers(ranks.rank, size).to(ranks.device)
    total, rows = sum_over_ranks(mine).cpu(), gather_rows(mine[None]).cpu()
    garbled = tuple(rank for rank, row in enumerate(rows) if not torch.equal(row, _numbers(rank, size)))
    expected = functools.reduce(torch.add, (_numbers(rank, size) for rank in range(ranks.world)))
    return not torch.equal(total, expected), garbled


def _numbers(rank: int, size: int) -> torch.Tensor:
    """Of a rank, such that a sum over 100,000 of them is exact in fp32, in any order."""
    return (rank % 8 + 1.0) * (torch.arange(size) % 16 + 1)


def _device(device: torch.device) -> Device:
    free, total = torch.cuda.mem_get_info(device)
    mine = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Device(torch.cuda.get_device_name(device), total, free + mine)


def _versions(config: AnyTraining, with_code: bool) -> dict[str, str]:
    found = {
        "lvdm": lvdm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "the config": hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12],
    }
    return found | ({"lvdm's code": _hash_of_code(Path(lvdm.__file__).parent)} if with_code else {})


def _hash_of_code(package: Path) -> str:
    """Of all modules, which tells more than a commit: what was changed and not committed, or installed without git."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def host_memory(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup"), env: Mapping[str, str] = os.environ
) -> list[Room]:
    """The accounts of this host's memory that hold for this process: the kernel's, its cgroups', SLURM's."""
    lines = dict(line.split(":", 1) for line in _lines(proc / "meminfo") if ":" in line)
    rooms = []
    if "MemTotal" in lines and "MemAvailable" in lines:
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        rooms.append(Room("memory of the host", total, free))
    rooms += _cgroup_memory(proc, cgroups)
    names = ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")
    per_node, per_core, cores = (int(env[name]) if env.get(name, "").isdigit() else 0 for name in names)
    if asked := per_node or per_core * cores:  # MiB
        rooms.append(Room("memory that the SLURM job asked for (--mem)", asked << 20, None))
    return rooms


def _cgroup_memory(proc: Path, cgroups: Path) -> Iterator[Room]:
    """The limits of this process's cgroups, and of those that these are in."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        below = Path(path.lstrip("/"))
        # in a container the path may be the host's, while what is mounted is the container's own group
        groups = (below, *below.parents) if ".." not in below.parts else (Path(),)
        for group in groups:
            if controllers == "":
                hybrid = cgroups / "unified"
                folder = (hybrid if hybrid.is_dir() else cgroups) / group
                limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
            elif "memory" in controllers.split(","):
                folder = cgroups / "memory" / group
                limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
            else:
                break
            if limit is not None and used is not None and limit < _UNLIMITED:
                free = limit - used + _cached(folder / "memory.stat")
                yield Room(f"limit of the cgroup {folder}", limit, max(0, free))


def _cached(statistics: Path) -> int:
    """Bytes of the cache of files, which make room where something else wants it."""
    values = dict(line.split(" ", 1) for line in _lines(statistics) if " " in line)
    return sum(int(values.get(f"total_{name}") or values.get(name) or 0) for name in ("inactive_file", "active_file"))


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _resident() -> int:
    lines = dict(line.split(":", 1) for line in _lines(Path("/proc/self/status")) if ":" in line)
    return int(lines.get("RssAnon", "0 kB").split()[0]) * 1024


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def size_text(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
