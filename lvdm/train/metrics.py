"""What a run reports: means gathered without waiting for the device, and where they are written."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from lvdm.clip_folder import RECORD_NAME, SHEET_NAME, clip_name, write_clip
from lvdm.engine.distributed import sum_over_ranks
from lvdm.media import contact_sheet, gif_bytes, side_by_side
from lvdm.storage import new_folder, write_json, write_text

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

    def __init__(
        self, log: Path, tensorboard: Path, images: Path, samples: Path, enabled: bool, from_step: int
    ) -> None:
        """Lines of steps after ``from_step``, which a run that goes on will do again, are dropped from the log."""
        self._images, self._samples = images, samples
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=from_step + 1) if enabled else None
        if enabled:
            if log.exists():
                drop_lines_after(log, from_step)
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

    def clips(self, step: int, clips_BTHWC: np.ndarray, prompts: Sequence[str], fps: int) -> None:
        """Write uint8 clips to ``samples/step-STEP``, and their contact sheet and a film of all to TensorBoard."""
        if self._tensorboard is None:
            return
        from PIL import Image

        folder = self._samples / f"step-{step:08d}"
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that ended before its checkpoint
        with new_folder(folder) as scratch:
            for number, clip in enumerate(clips_BTHWC):
                write_clip(scratch / clip_name(number), clip, fps, gif=False)
            named = [{"prompt": prompt, "file": clip_name(number)} for number, prompt in enumerate(prompts)]
            write_json(scratch / RECORD_NAME, {"step": step, "fps": fps, "clips": named})
            contact_sheet(scratch / SHEET_NAME, list(clips_BTHWC), prompts)
        sheet = np.asarray(Image.open(folder / SHEET_NAME))
        self._tensorboard.add_image("samples", sheet, step, dataformats="HWC")
        film = side_by_side(clips_BTHWC)
        picture = Summary.Image(height=film.shape[1], width=film.shape[2], colorspace=3)
        picture.encoded_image_string = gif_bytes(film, fps)  # TensorBoard plays it; torch's add_video needs moviepy
        summary = Summary(value=[Summary.Value(tag="samples_playing", image=picture)])
        assert self._tensorboard.file_writer is not None
        self._tensorboard.file_writer.add_summary(summary, step)

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


def drop_lines_after(log: Path, step: int) -> None:
    """Keep the JSON lines of a file whose ``step`` is at most this one."""
    kept = [line for line in log.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    write_text(log, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line that a kill cut short
