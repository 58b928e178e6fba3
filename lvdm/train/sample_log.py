"""Which samples each step took: the record by which a run can be audited, and two runs compared."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch

from lvdm.data.batch import LatentBatch, VideoBatch
from lvdm.engine.distributed import Ranks, together
from lvdm.train.metrics import drop_lines_after


class SampleLog:
    """``seen/rank-NNNNN.jsonl``: per micro-batch its step, the positions of its samples and a CRC-32 of each one's
    tensor."""

    def __init__(self, folder: Path, ranks: Ranks, from_step: int) -> None:
        """Collective. Lines of steps after ``from_step``, which a run that goes on will do again, are dropped."""

        def trim() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob("rank-*.jsonl"):
                drop_lines_after(file, from_step)

        together(lambda: trim() if ranks.is_main else None, ranks.device)
        self._file = (folder / f"rank-{ranks.rank:05d}.jsonl").open("a", buffering=1, encoding="utf-8")

    def add(self, step: int, batch: VideoBatch | LatentBatch) -> None:
        """Note a micro-batch of the optimiser step ``step`` (from 1)."""
        tensor = batch.frames_BCTHW if isinstance(batch, VideoBatch) else batch.moments_BCTHW
        sums = [zlib.crc32(sample.contiguous().view(torch.uint8).numpy().data) for sample in tensor]
        self._file.write(json.dumps({"step": step, "positions": batch.positions, "crc32": sums}) + "\n")
