"""Whether a run can work here: disks, memory, devices, versions and connections, before its first step.

Every rank notes what it finds (`lvdm.engine.findings`), all of that is gathered, and every rank comes to the same
judgement of it, which names ranks and hosts. What never can work is a `UserError`. Memory that somebody else holds is a
`Requeue`: after a kill, a process may take its time to end.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from lvdm.config import AnyTraining
from lvdm.engine.distributed import Ranks, everyones, host_group
from lvdm.engine.findings import SHARED_MEMORY, Findings, Reply, exchange, look, size_text
from lvdm.errors import Requeue, UserError

_APART = 5.0  # seconds between clocks that are worth a note


def check(config: AnyTraining, model: nn.Module, ranks: Ranks, checkpoints: str) -> list[str]:
    """Check disks, memory, devices, versions and connections (collective). Nothing stays behind.

    Args:
        model: what will be trained, before an engine takes it.
        checkpoints: folder or URL that they will be written to.
    Returns:
        What there is to say.
    Raises:
        UserError: the run cannot work here; on all ranks alike.
        Requeue: others hold the memory that it needs; on all ranks alike.
    """
    group = host_group(config.run.stall_timeout)  # which does not need the GPUs' connections to be sound
    found: Findings | None = None

    def finding() -> dict[str, Any]:
        nonlocal found
        found = look(config, model, ranks, checkpoints)
        return asdict(found)

    try:
        everyone = [Findings.from_json(facts) for facts in everyones(finding, group)]
        notes = judge(config, everyone)
        clock, sums = time.time(), exchange(ranks)
        sees_probe = not everyone[0].probe or ranks.local_rank > 0 or os.path.isdir(everyone[0].probe)
        replies = everyones(lambda: asdict(Reply(clock, sees_probe, *sums)), group)
        return [*notes, *judge_replies(everyone, [Reply(**reply) for reply in replies])]
    finally:
        if ranks.is_main and found is not None and found.probe:
            shutil.rmtree(found.probe, ignore_errors=True)
        torch.distributed.destroy_process_group(group)


def judge(config: AnyTraining, everyone: Sequence[Findings]) -> list[str]:
    """What there is to say of the findings of all ranks. Raises as `check` does."""
    verdict = _Verdict()
    for one in everyone:
        verdict.faults += [f"{_who([one])}: {fault}" if len(everyone) > 1 else fault for fault in one.faults]
        verdict.notes += one.notes
    _judge_versions(everyone, verdict)
    _judge_devices(config, everyone, verdict)
    nodes = list(_grouped(everyone, lambda one: str(one.node)).values())
    _judge_places(nodes, verdict)
    _judge_memory(nodes, verdict)
    _judge_shared_memory(config, nodes, verdict)
    if verdict.faults:
        raise UserError("this run cannot work here: " + "; ".join(verdict.faults))
    if verdict.passing:
        raise Requeue("this run cannot work here now: " + "; ".join(verdict.passing))
    return verdict.notes


@dataclass
class _Verdict:
    faults: list[str] = field(default_factory=list)
    """What somebody has to mend."""
    passing: list[str] = field(default_factory=list)
    """What may mend itself."""
    notes: list[str] = field(default_factory=list)


def _judge_versions(everyone: Sequence[Findings], verdict: _Verdict) -> None:
    for name in dict.fromkeys(name for one in everyone for name in one.versions):
        groups: dict[str, list[Findings]] = {}
        for one in everyone:
            if name in one.versions:
                groups.setdefault(one.versions[name], []).append(one)
        if len(groups) > 1:
            said = ", ".join(f"{value} ({_who(members)})" for value, members in groups.items())
            verdict.faults.append(f"{name} is not the same on all ranks: {said}; start all with the same one")


def _judge_places(nodes: Sequence[Sequence[Findings]], verdict: _Verdict) -> None:
    mixed = [node for node in nodes if len({one.host for one in node}) > 1]
    for node in mixed[:1]:  # one stands for all
        verdict.faults.append(
            f"{_who(node)} are numbered as if they were on one node; number ranks node by node "
            "(srun --distribution=block)"
        )


def _judge_devices(config: AnyTraining, everyone: Sequence[Findings], verdict: _Verdict) -> None:
    kinds = _grouped(everyone, lambda one: one.device.name if one.device else "")
    if len(kinds) > 1:
        said = ", ".join(f"{name} ({_who(members)})" for name, members in kinds.items())
        verdict.notes.append(f"GPUs differ, and the slowest sets the pace: {said}")
    small = [one for one in everyone if one.device is not None and one.needs_device > one.device.total]
    taken = [one for one in everyone if one.device is not None and one.needs_device > one.device.free]
    for lacking in (small or taken)[:1]:  # one stands for all
        device, who = lacking.device, _who(small or taken)
        assert device is not None
        what = f"the model's state alone takes {size_text(lacking.needs_device)} of GPU memory on {who}"
        if small:
            verdict.faults.append(f"{what}, and a {device.name} has {size_text(device.total)}: {_less(config)}")
        else:
            said = f"of the {size_text(device.total)} of a {device.name} {size_text(device.free)} are free there"
            verdict.passing.append(f"{what}, and {said}; see what else runs there (nvidia-smi)")


def _less(config: AnyTraining) -> str:
    """How the state of a model takes less memory on each GPU."""
    engine = config.engine
    ways = ["engine.zero_stage=3"] if engine.zero_stage < 3 else []
    ways += ["engine.offload_optimizer=true"] if not engine.offload_optimizer else []
    ways += ["engine.precision=bf16"] if engine.precision == "fp32" else []
    return ", ".join(["use more GPUs", *ways[:-1]]) + (f" or {ways[-1]}" if ways else "")


def _judge_memory(nodes: Sequence[Sequence[Findings]], verdict: _Verdict) -> None:
    for members in nodes:
        needed, resident = sum(one.needs_host for one in members), sum(one.resident for one in members)
        what = f"{_who(members)} need{'s' * (len(members) == 1)} {size_text(needed)} more host memory"
        for room in members[0].memory:
            limit, free = room.total, room.total - resident if room.free is None else room.free
            if needed + resident > limit:
                verdict.faults.append(
                    f"{what} beside {size_text(resident)} so far (rank {members[0].rank}: {members[0].plan}), and the "
                    f"{room.where} is {size_text(limit)}: ask for more, use more nodes, or fewer ranks a node"
                )
                return  # one node stands for all
            if needed > free:
                said = f"of {size_text(limit)} ({room.where}) {size_text(max(0, free))} are free"
                verdict.passing.append(f"{what}, and {said}: see what else runs there")
                break


def _judge_shared_memory(config: AnyTraining, nodes: Sequence[Sequence[Findings]], verdict: _Verdict) -> None:
    """Loader processes die of a bus error where there is too little of it, as in containers by default."""
    each = config.data.workers * config.data.prefetch * _micro_batch_bytes(config)
    for members in nodes:
        needed, free = len(members) * each, members[0].shared_memory
        if needed > free:
            said = f"loaders of {_who(members)} may put {size_text(needed)} into {SHARED_MEMORY}, of which"
            said += f" {size_text(free)} are free: enlarge it (docker run --shm-size), or lower data.prefetch"
            # of latents the size is a guess
            (verdict.notes if config.data.kind == "latents" else verdict.faults).append(said)
            return  # one node stands for all


def _micro_batch_bytes(config: AnyTraining) -> int:
    """Of the largest micro-batch: uint8 RGB, or latents, for which a sixth of that is usual."""
    if config.data.video is None:
        return 0
    clip, micro = config.data.video.clip, config.batch.micro
    sizes = [(b.frames * b.height * b.width, b.size * micro // config.batch.size) for b in clip.buckets]
    largest = max(3 * pixels * count for pixels, count in sizes or [(clip.frames * clip.height * clip.width, micro)])
    return largest // 6 if config.data.kind == "latents" else largest


def judge_replies(everyone: Sequence[Findings], replies: Sequence[Reply]) -> list[str]:
    """What there is to say of what the ranks found of one another. Raises `UserError`."""
    faults = []
    blind = [one for one, reply in zip(everyone, replies, strict=True) if not reply.sees_probe]
    if blind:
        place = os.path.dirname(everyone[0].probe)
        faults.append(
            f"{_who(blind)} does not see what rank 0 on {everyone[0].host} writes in {place}: checkpoints must go to "
            "a folder that all nodes share, or to a store (run.checkpoints)"
        )
    faults += _judge_exchange(everyone, replies)
    if faults:
        raise UserError("this run cannot work here: " + "; ".join(faults))
    usual = statistics.median_low(reply.clock for reply in replies)
    notes = []
    for members in _grouped(everyone, lambda one: str(one.node)).values():
        late = replies[members[0].rank].clock - usual
        if abs(late) > _APART:
            notes.append(
                f"the clock of {members[0].host} is {abs(late):.0f} s {'ahead' if late > 0 else 'late'}: times in logs "
                "of its ranks will be, too"
            )
    return notes


def _judge_exchange(everyone: Sequence[Findings], replies: Sequence[Reply]) -> list[str]:
    """Whose connection, or GPU, changes what it sends or receives: whoever has a part in most of what went wrong."""
    bad = [(sender, one.rank) for one, reply in zip(everyone, replies, strict=True) for sender in reply.garbled]
    if not bad:
        wrong = [one for one, reply in zip(everyone, replies, strict=True) if reply.wrong_sum]
        said = f"{_who(wrong)} got a wrong sum over all ranks; take out hosts until it is right"
        return [said] if wrong else []
    parts = {one.rank: sum(one.rank in pair for pair in bad) for one in everyone}
    most = [one for one in everyone if parts[one.rank] == max(parts.values())]
    return [
        f"numbers between {_who(most)} and others arrive changed ({len(bad)} of {len(everyone) ** 2} messages); take "
        "this host out of the job"
    ]


def _grouped(everyone: Sequence[Findings], key: Callable[[Findings], str]) -> dict[str, list[Findings]]:
    groups: dict[str, list[Findings]] = {}
    for one in everyone:
        if value := key(one):
            groups.setdefault(value, []).append(one)
    return groups


def _who(members: Sequence[Findings]) -> str:
    """``ranks 0-3 on n1, rank 5 on n2``."""
    return ", ".join(
        f"rank{'s' * (len(ranks) > 1)} {_ranges(ranks)} on {host}"
        for host in dict.fromkeys(one.host for one in members)
        if (ranks := [one.rank for one in members if one.host == host])
    )


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
