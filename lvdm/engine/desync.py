"""Whether all ranks still hold the same weights and clock, and whether each rank's state is what the last update left.

ZeRO has every weight twice: rounded, in the copies that ranks compute with, and in the fp32 master of the rank that
updates it. At each step the masters overwrite all copies, so that a copy with a flipped bit spoils one gradient and is
mended, and a master with one spreads to all ranks: neither shows afterwards. That is why each rank also compares the
checksums of its state right after an update with those right before the next one (`bits.Rest`).

What remains unseen: a gradient that is wrong although the weights are right, in the network, in a kernel or on its way
to other ranks; two flipped bits that cancel out in a checksum; moments, averages and masters that are offloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lvdm.engine.bits import sums_of_bits
from lvdm.engine.distributed import gather_json, gather_rows
from lvdm.engine.engine import Engine
from lvdm.errors import Requeue


def check(engine: Engine, frozen: Sequence[nn.Module], clock: Mapping[str, Any], hosts: Sequence[str]) -> None:
    """Compare weights, frozen parts and clock over all ranks (collective). Call it behind a step.

    One pass over the weights where they lie, and one gather of a checksum for each parameter.

    Args:
        frozen: modules beside the engine's that every rank has a copy of.
        clock: JSON that is the same on all ranks.
        hosts: of each rank, to name it.
    Raises:
        Requeue: on all ranks; it names the rank, or the ranks that differ.
    """
    engine.rest.look()
    copies = _copies(engine, frozen)
    learning = [name for name in engine.shapes() if name not in set(engine.frozen_names)]
    device = engine.ranks.device
    parts = [
        engine.rest.disturbed.long(),
        _apart_from_masters(engine, learning),
        sums_of_bits((tensor for _, tensor in copies), device),
        torch.tensor([_digest(clock)], device=device),
    ]
    rows = gather_rows(torch.cat(parts)[None]).cpu()
    disturbed, apart, sums, clocks = (part.tolist() for part in torch.split(rows, list(map(len, parts)), dim=1))

    def odd(ranks: Sequence[int], what: str) -> Requeue:
        named = " and ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks)
        return Requeue(f"{named}: {what}; go on with run.resume=auto at the last checkpoint, which was checked")

    for number, kind in enumerate(engine.rest.names):
        if ranks := [rank for rank, row in enumerate(disturbed) if row[number]]:
            raise odd(ranks, f"its {kind} changed between two steps, as by faulty memory")
    for number, name in enumerate(learning):
        if ranks := [rank for rank, row in enumerate(apart) if row[number]]:
            raise odd(ranks, f"the fp32 master of {name} is not what the network computes with")
    for number, (name, _) in enumerate(copies):
        if ranks := _odd([row[number] for row in sums]):
            if len(ranks) == len(hosts) and name in learning:
                ranks = _apart_from_owners(engine, name) or ranks
            raise odd(ranks, f"{name} differs from other ranks'")
    if ranks := _odd([row[0] for row in clocks]):
        told = gather_json(clock, device)
        usual = told[next((rank for rank in range(len(told)) if rank not in ranks), 0)]
        name = next(key for key in usual if any(other[key] != usual[key] for other in told))
        values = ", ".join(str(other[name])[:100] for other in told)
        raise odd(ranks, f"the clock differs from other ranks': {name} is {values}")


def _copies(engine: Engine, frozen: Sequence[nn.Module]) -> list[tuple[str, torch.Tensor]]:
    """What every rank has a copy of, with its name."""
    copies = [*engine.replicas().items(), *engine.module.named_buffers()]
    for module in frozen:
        held = (*module.named_parameters(), *module.named_buffers())
        copies += [(f"{type(module).__name__}.{name}", tensor) for name, tensor in held]
    return copies


def _apart_from_masters(engine: Engine, learning: Sequence[str]) -> torch.Tensor:
    """By parameter, 1 where the weights are not this rank's masters, rounded; 0 where this rank has none of it."""
    device, pieces = engine.ranks.device, engine.fragments()
    masters = sums_of_bits((piece.of(piece.master).to(engine.dtype) for piece in pieces), device)
    weights = sums_of_bits(map(engine.weights_of, pieces), device)
    places = {name: place for place, name in enumerate(learning)}
    apart = torch.zeros(len(learning), dtype=torch.int64, device=device)
    apart[[places[piece.name] for piece in pieces]] = (masters != weights).long()
    return apart


def _apart_from_owners(engine: Engine, name: str) -> list[int]:
    """The ranks whose copy of a parameter is not everywhere that of the rank that has the master (collective)."""
    mine = [(piece.start, piece.length) for piece in engine.fragments() if piece.name == name]
    owners = [(rank, *place) for rank, places in enumerate(gather_json(mine, engine.ranks.device)) for place in places]
    copy = engine.replicas()[name].flatten()
    sums = sums_of_bits((copy[start : start + length] for _, start, length in owners), engine.ranks.device)
    rows = gather_json(sums.tolist(), engine.ranks.device)
    return [
        rank
        for rank, row in enumerate(rows)
        if any(row[place] != rows[owner][place] for place, (owner, _, _) in enumerate(owners))
    ]


def _odd(values: Sequence[int]) -> list[int]:
    """The ranks whose value is not that of the majority; all of them where there is none and they differ."""
    (usual, count), *others = Counter(values).most_common()
    if not others:
        return []
    return [rank for rank, value in enumerate(values) if 2 * count <= len(values) or value != usual]


def _digest(clock: Mapping[str, Any]) -> int:
    data = hashlib.sha256(json.dumps(clock, sort_keys=True).encode()).digest()
    return int.from_bytes(data[:8], "little", signed=True)
