"""What the ranks of ``test_preflight.py`` do: check again and again, each time with something else wrong."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.config import parse_training_config
from lvdm.engine import distributed, findings, preflight
from lvdm.errors import Requeue, UserError
from lvdm.models.build import build_model
from tests.conftest import changed

_CLONE_NEWNS = 0x00020000


def check_all(tree: dict[str, Any], cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`preflight.check` for each case in one process group: what it said or raised, and how long it took.

    A case may hold ``changes`` of the config, the same ``on_1`` on rank 1 alone, ``env``, the name of a ``fault`` for
    rank 1, a ``shared_memory`` folder and ``nodes`` (each rank is one).
    """
    ranks = distributed.start(60)
    results = []
    for case in cases:
        now = case.get("changes", {}) | (case.get("on_1", {}) if ranks.rank == 1 else {})
        config = parse_training_config(changed(_copy(tree), now), source="test")
        model = build_model(config.model, seed=1)
        checkpoints = config.run.checkpoints or f"{config.run.folder}/checkpoints"
        place = replace(ranks, local_rank=0) if case.get("nodes") else ranks
        with pytest.MonkeyPatch.context() as patch:
            for name, value in case.get("env", {}).items():
                patch.setenv(name, value)
            if case.get("shared_memory"):
                for module in (findings, preflight):
                    patch.setattr(module, "SHARED_MEMORY", Path(case["shared_memory"]))
            if ranks.rank == 1 and case.get("fault"):
                FAULTS[case["fault"]](patch, config.run.folder)
            began, kind = time.perf_counter(), "notes"
            try:
                said = preflight.check(config, model, place, checkpoints)
            except (UserError, Requeue) as error:
                kind, said = type(error).__name__, str(error)
        results.append({"kind": kind, "said": said, "seconds": time.perf_counter() - began})
    distributed.stop()
    return results


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) if isinstance(value, dict) else value for name, value in tree.items()}


def _flip_a_bit(numbers: torch.Tensor) -> torch.Tensor:
    flipped = numbers.clone()
    flipped.view(torch.int32).view(-1)[77] ^= 1 << 20
    return flipped


def _multiply_wrongly(patch: pytest.MonkeyPatch, folder: str) -> None:
    right = torch.matmul
    patch.setattr(torch, "matmul", lambda a, b: _flip_a_bit(right(a, b)))


def _fail_to_multiply(patch: pytest.MonkeyPatch, folder: str) -> None:
    def fail(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with ...")

    patch.setattr(torch, "matmul", fail)


def _garble_what_it_sends(patch: pytest.MonkeyPatch, folder: str) -> None:
    right = findings.gather_rows
    patch.setattr(findings, "gather_rows", lambda rows: right(_flip_a_bit(rows)))


def _sum_wrongly(patch: pytest.MonkeyPatch, folder: str) -> None:
    right = findings.sum_over_ranks
    patch.setattr(findings, "sum_over_ranks", lambda values: _flip_a_bit(right(values)))


def _another_version(patch: pytest.MonkeyPatch, folder: str) -> None:
    patch.setattr(torch, "__version__", "2.0.1")


def _see_another_disk(patch: pytest.MonkeyPatch, folder: str) -> None:
    """As on a node that has a disk of its own there; this process sees it ever after."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "none", Path(folder).parent]):
        subprocess.run(command, check=True)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, str], None]] = {
    "multiplies wrongly": _multiply_wrongly,
    "cannot multiply": _fail_to_multiply,
    "garbles what it sends": _garble_what_it_sends,
    "sums wrongly": _sum_wrongly,
    "another version": _another_version,
    "sees another disk": _see_another_disk,
}
