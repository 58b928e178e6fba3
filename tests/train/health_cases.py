"""What the ranks of ``test_health.py`` do: runs one after the other, some with a fault of this rank."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed.utils import groups

from lvdm.engine.engine import Engine
from lvdm.errors import Requeue, UserError
from lvdm.train.latent_diffusion import LatentDiffusionTask
from tests.engine.desync_cases import flip
from tests.train.runs import run

VICTIM = 1
"""The rank with the fault."""


def each(trees: list[dict[str, Any]], ports: list[int], faults: list[str]) -> list[str]:
    """Train every config tree; how each ended.

    Args:
        faults: of each run: ``flip N``: a bit of the victim's weights flips before its N-th micro-batch ends; ``slow``:
            its forward passes take ten times as long.
    """
    ended, before = [], dict(vars(groups))
    for tree, port, fault in zip(trees, ports, faults, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with contextlib.ExitStack() as stack:
            if os.environ["RANK"] == str(VICTIM) and fault:
                stack.enter_context(_flipping(int(fault.split()[1])) if fault.startswith("flip") else _slow())
            try:
                run(tree)
                ended.append("done")
            except (UserError, Requeue) as error:
                ended.append(f"{type(error).__name__}: {error}")
        vars(groups).update(before)  # DeepSpeed keeps the process groups, which the end of a run has destroyed
    return ended


@contextlib.contextmanager
def _flipping(number: int) -> Iterator[None]:
    left, real = number, Engine.step

    def step(engine: Engine, *given: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            weights = max(engine.replicas().values(), key=torch.numel)
            flip(weights, weights.numel() // 3, 20)
        return real(engine, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", step)
        yield


@contextlib.contextmanager
def _slow() -> Iterator[None]:
    real = LatentDiffusionTask.loss

    def loss(task: LatentDiffusionTask, *given: Any) -> Any:
        began = time.perf_counter()
        answer = real(task, *given)
        until = time.perf_counter() + 9 * (time.perf_counter() - began)
        while time.perf_counter() < until:
            pass
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentDiffusionTask, "loss", loss)
        yield
