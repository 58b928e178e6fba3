"""How much memory the state of a network takes on a rank, by component: what ZeRO keeps, counted without running it.

``e`` below is the size of a weight (2 bytes in bf16, 4 in fp32), W the number of ranks. Activations, what kernels work
with, and the copies that a collective makes while it runs (of a bucket, in fp32) are not counted;
`tests/engine/test_memory_plan.py` holds all else against the tensors of real runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lvdm.checkpoint.pieces import ELEMENT, KINDS
from lvdm.engine.engine import Engine

COMPONENTS = {
    "parameters": "what the network computes with",
    "gathered": "stage 3: whole parameters, put together from all ranks for forward and backward",
    "gradients": "whole gradients, as autograd leaves them",
    "accumulation": "sums of gradients over micro-batches, and what the optimiser reads of them",
    "masters": "fp32 weights",
    "moments": "both of AdamW's",
    "EMA": "the moving average of the weights",
    "buckets": "gradients on their way to other ranks",
    "staging": "offload: what passes between GPU and host",
    "frozen copy": "fp32 copy of parameters that do not learn, for checkpoints",
    "saving": "copy of all state that a checkpoint is written from",
}
"""What the memory of a rank is for."""
_ALIGNMENT = 2  # elements; DeepSpeed's `nccl_start_alignment_factor`
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank by component, each at the moment of a step at which it is largest."""

    device: dict[str, int]
    """Where the network is computed."""
    host: dict[str, int]
    """In the host's memory."""

    def bytes_of(self, component: str) -> int:
        """Of one component, wherever it is."""
        return self.device.get(component, 0) + self.host.get(component, 0)

    def __str__(self) -> str:
        on_device = f"model states {_size(sum(self.device.values()))} a rank ({_listed(self.device)})"
        return f"{on_device}, host memory {_size(sum(self.host.values()))} ({_listed(self.host)})"


@dataclass(frozen=True)
class _Share:
    """What a rank holds of the elements that learn, in elements."""

    owned: int
    """Real ones whose masters are its own."""
    padded: int
    """The same with padding: the size of its flat tensors."""
    touched: int
    """Sum of the whole sizes of parameters of which it owns any part."""
    group: int
    """Most of its elements that are stepped together."""


def memory_plan(
    learning: Sequence[int], frozen: Sequence[int], deepspeed: Mapping[str, Any], rank: int, world: int
) -> MemoryPlan:
    """The plan of ``rank`` among ``world``.

    Args:
        learning: elements of each parameter that learns, in the network's order.
        frozen: elements of each that does not.
        deepspeed: what `deepspeed_config` gives.
    """
    zero = deepspeed["zero_optimization"]
    stage, bf16 = zero["stage"], deepspeed["bf16"]["enabled"]
    weight = 2 if bf16 else _FLOAT
    share = _sharded(learning, rank, world, zero["sub_group_size"]) if stage == 3 else _flat(learning, rank, world)
    device: dict[str, int] = {}
    host: dict[str, int] = {}
    state = host if "offload_optimizer" in zero else device

    if stage == 3:
        # Every parameter is cut into W equal pieces, of which the last is padded. With one rank nothing is gathered:
        # the piece is the parameter. DeepSpeed keeps what it gathered from a forward pass until it has gone backward,
        # up to its limit, and small parameters for good.
        pieces = [-(-size // world) for size in (*learning, *frozen)]
        device["parameters"] = sum(pieces) * weight
        whole = min(sum(pieces) * world, zero["stage3_max_live_parameters"])
        device["gathered"] = whole * weight if world > 1 else 0
    else:
        device["parameters"] = (_aligned(sum(learning), world) + sum(frozen)) * weight
    # Stage 1 reduces once a step and keeps whole gradients until then. Stages 2 and 3 put each into a bucket as it
    # comes, but for those of parameters larger than a bucket; ours have none.
    device["gradients"] = sum(learning) * weight if stage == 1 else 0
    _accumulation(device, host, share, deepspeed, aligned=_aligned(sum(learning), world))
    # Clones, also in fp32, where they have the very numbers of the parameters.
    state["masters"] = share.padded * _FLOAT
    state["moments"] = 2 * share.padded * _FLOAT
    state["EMA"] = share.padded * _FLOAT
    device["buckets"] = _buckets(zero, weight, bf16)
    if "offload_optimizer" in zero and stage == 2:
        # A flat copy of the new weights in their own precision, and a buffer on either side for one gradient.
        host["staging"] = (share.padded + max(learning)) * weight
        device["staging"] = max(learning) * weight
    kept = sum(frozen) if rank == 0 else 0
    host["frozen copy"] = kept * ELEMENT
    host["saving"] = (share.owned * len(KINDS) + kept) * ELEMENT
    return MemoryPlan(device, host)


def plan_of(engine: Engine) -> MemoryPlan:
    """The plan of this rank."""
    sizes = {name: math.prod(shape) for name, shape in engine.shapes().items()}
    frozen = set(engine.frozen_names)
    learning = [size for name, size in sizes.items() if name not in frozen]
    resting = [sizes[name] for name in engine.frozen_names]
    return memory_plan(learning, resting, engine.record, engine.ranks.rank, engine.ranks.world)


def checkpoint_bytes(learning: int, frozen: int) -> int:
    """Of a checkpoint on disk, but for headers and manifest: fp32 masters, two moments and the average of ``learning``
    elements, and ``frozen`` ones. The same for any number of ranks, since padding is not stored."""
    return (len(KINDS) * learning + frozen) * ELEMENT


def _accumulation(
    device: dict[str, int], host: dict[str, int], share: _Share, deepspeed: Mapping[str, Any], aligned: int
) -> None:
    zero, several = deepspeed["zero_optimization"], deepspeed["gradient_accumulation_steps"] > 1
    stage, bf16, offload = zero["stage"], deepspeed["bf16"]["enabled"], "offload_optimizer" in zero
    if stage == 3:
        # A flat fp32 sum for good, and for the step the same again as the gradient of the masters, a group at a time;
        # offloaded masters keep theirs.
        (host if offload else device)["accumulation"] = (
            share.padded + (share.padded if offload else share.group)
        ) * _FLOAT
    elif bf16 and stage == 1:
        # DeepSpeed's BF16_Optimizer: all elements on every rank, of which it steps its own part in place.
        device["accumulation"] = aligned * _FLOAT
    elif bf16:
        # The reduced gradients of its own part, which offloaded masters get a copy of.
        device["accumulation"] = share.padded * _FLOAT
        if offload:
            host["accumulation"] = share.padded * _FLOAT
    elif offload:
        # A gradient for the masters, and with several micro-batches a sum of each parameter that it owns a part of.
        host["accumulation"] = (share.padded + (share.touched if several else 0)) * _FLOAT
    else:
        # Whole gradients of the parameters that it owns a part of; stage 2 has those of one micro-batch beside the sum
        # of those before. For the step they are exchanged for a flat gradient of its own part.
        sums = 2 if stage == 2 and several else 1
        device["accumulation"] = max(sums * share.touched, share.padded) * _FLOAT


def _buckets(zero: Mapping[str, Any], weight: int, bf16: bool) -> int:
    size = zero["reduce_bucket_size"]
    if zero["stage"] == 3:
        return int(size * _FLOAT)  # made once, in the precision of the reduction
    if zero["stage"] == 1 and bf16:
        return 0  # reduced in place
    # Made anew for each pass. On GPUs one is filled while the other is on its way.
    return int(size * weight * (2 if zero["overlap_comm"] else 1))


def _flat(learning: Sequence[int], rank: int, world: int) -> _Share:
    """Stages 1 and 2: all parameters end to end, padded so that they can be cut into W equal parts."""
    part = _aligned(sum(learning), world) // world
    begin, end = rank * part, (rank + 1) * part
    owned = touched = place = 0
    for size in learning:
        inside = min(place + size, end) - max(place, begin)
        if inside > 0:
            owned += inside
            touched += size
        place += size
    return _Share(owned, part, touched, group=part)


def _sharded(learning: Sequence[int], rank: int, world: int, group_size: int) -> _Share:
    """Stage 3: a W-th of every parameter. Groups are closed once they have reached ``group_size``."""
    owned = padded = group = largest = 0
    for size in learning:
        piece = -(-size // world)
        owned += max(0, min(piece, size - rank * piece))
        padded += piece
        group += piece
        largest = max(largest, group)
        if group >= group_size:
            group = 0
    return _Share(owned, padded, sum(learning), largest)


def _aligned(elements: int, world: int) -> int:
    return -(-elements // (_ALIGNMENT * world)) * _ALIGNMENT * world


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_size(count)}" for name, count in parts.items() if count)
