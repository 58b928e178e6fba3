"""What the ranks of ``test_desync.py`` do: flip single bits in the state of one rank, at every moment of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lvdm.config import BatchConfig, EngineConfig
from lvdm.engine import desync, distributed
from lvdm.engine.engine import Engine
from lvdm.errors import Requeue
from tests.engine.zero_cases import LR, OPTIM, loss_of, micro_batches, network

VICTIM = 1
"""The rank whose bits flip."""
Case = dict[str, Any]


def flip(tensor: torch.Tensor, element: int, bit: int) -> None:
    """Flip one bit of a tensor where it lies."""
    words = tensor.detach().view(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    mask = 1 << bit
    words[element] ^= mask - (mask << 1 if bit == 8 * tensor.element_size() - 1 else 0)


class Ranks:
    """Engines of one process group, with a frozen part beside them, and what `desync.check` says of their state."""

    def __init__(self) -> None:
        self.ranks = distributed.start(60)
        self.hosts = [f"host{rank}" for rank in range(self.ranks.world)]
        self.frozen = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).requires_grad_(False)
        nn.init.ones_(self.frozen[0].weight)
        nn.init.ones_(self.frozen[0].bias)

    @property
    def is_victim(self) -> bool:
        return self.ranks.rank == VICTIM

    def engine(self, case: Case) -> Engine:
        """One that has made two steps; the time embedding does not learn."""
        model = network()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "time" not in name
        batch = BatchConfig(size=4 * self.ranks.world, micro=2)
        engine = Engine(model, EngineConfig(**case), batch, OPTIM, self.ranks)
        for step in (1, 2):
            self.step(engine, step)
        return engine

    def step(self, engine: Engine, number: int, between: Callable[[], None] = lambda: None, bad: float = 1.0) -> bool:
        """A step of two micro-batches, with something ``between`` them; whether it was applied."""
        for turn, parts in enumerate(micro_batches(number, 0, 2, 2)):
            engine.backward(loss_of(engine, parts, engine.dtype) * (1 + self.ranks.rank) * bad)
            result = engine.step(LR)
            if turn == 0:
                between()
        return result.applied

    def said(self, engine: Engine, clock: dict[str, Any] | None = None) -> str:
        """What the check says, which is the same on all ranks; the engine is as good as new afterwards."""
        try:
            desync.check(engine, [self.frozen], clock or {"step": 2}, self.hosts)
            message = ""
        except Requeue as stop:
            message = str(stop)
        assert len(set(distributed.gather_json(message, self.ranks.device))) == 1
        engine.rest.disturbed.zero_()
        return message

    def flipped(self, engine: Engine, tensor: torch.Tensor, element: int, bit: int, seen_at_rest: bool = True) -> str:
        """What the check says while a bit of ``tensor`` is flipped on the victim.

        Args:
            seen_at_rest: false for a flip while the update was under way, when nothing is at rest.
        """
        if self.is_victim:
            flip(tensor, element, bit)
        if not seen_at_rest:
            engine.rest.mark()
        message = self.said(engine)
        if self.is_victim:
            flip(tensor, element, bit)
        engine.rest.mark()
        return message


def each(cases: dict[str, Case]) -> dict[str, dict[str, str]]:
    """By case, what is said of each flip."""
    ranks = Ranks()
    told = {name: _flips(ranks, case) for name, case in cases.items()}
    distributed.stop()
    return told


def _flips(ranks: Ranks, case: Case) -> dict[str, str]:
    engine = ranks.engine(case)
    said = {"nothing": ranks.said(engine)}
    copies = engine.replicas()
    weights = sorted(
        (name for name in copies if name not in engine.frozen_names), key=lambda name: copies[name].numel()
    )
    name = weights[-1]
    copy, bits = copies[name], 8 * copies[name].element_size()
    for bit in (0, bits // 2, bits - 1):
        said[f"copy, bit {bit}"] = ranks.flipped(engine, copy, copy.numel() // 2, bit)
    said["frozen copy"] = ranks.flipped(engine, copies[engine.frozen_names[0]], 0, 3)
    pieces = distributed.gather_json([(piece.name, piece.start) for piece in engine.fragments()], ranks.ranks.device)
    own = engine.fragments()[len(pieces[ranks.ranks.rank]) // 2]
    master = engine.masters[0]
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        said[kind] = ranks.flipped(engine, engine.tensors(own)[kind], 0, 7)

    # while the update was under way
    said["master in the update"] = ranks.flipped(engine, master, own.offset, 30, seen_at_rest=False)
    said["own copy in the update"] = ranks.flipped(engine, engine.weights_of(own), 0, 9, seen_at_rest=False)
    theirs, place = pieces[0][0]
    said["another's copy in the update"] = ranks.flipped(engine, copies[theirs], place, 9, seen_at_rest=False)
    said["frozen copy in the update"] = ranks.flipped(engine, copies[engine.frozen_names[0]], 0, 3, seen_at_rest=False)

    said["frozen part"] = ranks.flipped(engine, ranks.frozen[0].weight, 7, 31)
    said["buffer of a frozen part"] = ranks.flipped(engine, ranks.frozen[1].running_var, 4, 0)
    said["clock"] = ranks.said(engine, {"step": 2, "samples": 8 + ranks.is_victim})

    # in the middle of a step, whose end sets the copies right again
    for what, tensor in {"copy in a step": copy, "master in a step": master}.items():
        ranks.step(engine, 3, between=lambda tensor=tensor: flip(tensor, 0, 3) if ranks.is_victim else None)
        said[what] = ranks.said(engine)

    # and what is no fault
    with engine.averaged_weights(), engine.evaluating():
        loss_of(engine, micro_batches(9, 0, 2, 2)[0], engine.dtype)
    assert not ranks.step(engine, 4, bad=float("nan") if ranks.is_victim else 1.0)
    assert ranks.step(engine, 5)
    engine.restored(engine.optimizer_step)
    said["nothing, afterwards"] = ranks.said(engine)
    return said
