"""What a run reports: means gathered without waiting for the device, and where they are written."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from lvdm.engine.distributed import sum_over_ranks
from lvdm.storage import write_text

Sums = dict[str, tuple[torch.Tensor, torch.Tensor | float]]
"""By name: the sum of a quantity (a scalar on the device) and the number of things summed."""


class Means:
    """Sums on the device between log steps; one collective turns them into means over all ranks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, sums: Sums) -> None:
        """Add sums and counts; every rank must use the same names between two `reduce`."""
        for name, (total, count) in sums.items():
            pair = torch.stack([total.detach().float(), torch.as_tensor(count, device=total.device).float()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def reduce(self) -> dict[str, float]:
        """Means over all that was added on all ranks since the last call (collective), where anything was counted."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        pairs = sum_over_ranks(torch.stack([self._sums[name] for name in names])).cpu()
        self._sums.clear()
        return {name: float(total / count) for name, (total, count) in zip(names, pairs, strict=True) if count > 0}


class MetricsWriter:
    """TensorBoard and one JSON line per log step; silent on all ranks but the main one."""

    def __init__(self, log: Path, tensorboard: Path, images: Path, enabled: bool, from_step: int) -> None:
        """Lines of steps after ``from_step``, which a run that goes on will do again, are dropped from the log."""
        self._images = images
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=from_step + 1) if enabled else None
        if enabled:
            if log.exists():
                kept = [line for line in log.read_text().splitlines() if _step_of(line) <= from_step]
                write_text(log, "".join(line + "\n" for line in kept))
            self._log = log.open("a", encoding="utf-8")

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Write named numbers."""
        if self._tensorboard is None:
            return
        self._log.write(json.dumps({"step": step} | values) + "\n")
        self._log.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        """Write an RGB uint8 picture to TensorBoard and to ``images/NAME-STEP.png``."""
        if self._tensorboard is None:
            return
        from PIL import Image

        self._tensorboard.add_image(name, picture_HWC, step, dataformats="HWC")
        Image.fromarray(picture_HWC).save(self._images / f"{name}-{step:08d}.png")

    def close(self) -> None:
        """Flush everything."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._log.close()


def memory_gb(device: torch.device) -> float:
    """Peak memory of this rank so far in GB: of its GPU, or of the process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line that a kill cut short
