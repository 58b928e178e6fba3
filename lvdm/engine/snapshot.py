"""A copy of an engine's state in shared host memory, laid out as the file that a checkpoint will hold."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping

import torch

from lvdm.checkpoint.pieces import ELEMENT, FROZEN, Piece, lay_out
from lvdm.engine.engine import Engine
from lvdm.errors import UserError


class Snapshot:
    """Memory for this rank's state of some networks, allotted once and filled by each `take`.

    It is a memfd: a process that is sent its handle reads it while this rank trains on. On GPUs it is pinned.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        """Raises `UserError` if there is no memory for it. Under a limit for a job, the kernel may kill it instead."""
        self._engines = engines
        self._views: list[torch.Tensor] = []
        sources = self._sources()
        header, places, self.size = lay_out([piece for piece, _ in sources])
        """Bytes of the file."""
        try:
            self.handle = os.memfd_create("lvdm-checkpoint", os.MFD_CLOEXEC)
            """What another process opens the memory by."""
            os.ftruncate(self.handle, self.size)
            memory = mmap.mmap(self.handle, self.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise UserError(
                f"no memory for a copy of the state to write checkpoints from, {self.size / 1e6:,.0f} MB a rank: "
                f"{error.strerror}; use more nodes, or such with more memory"
            ) from None
        memory[: len(header)] = header
        self._whole = torch.frombuffer(memory, dtype=torch.uint8)
        for (piece, _), place in zip(sources, places, strict=True):
            self._views.append(self._whole[place : place + piece.length * ELEMENT].view(torch.float32))
        self._on_gpu = any(engine.ranks.device.type == "cuda" for engine in engines.values())
        if self._on_gpu:  # pinned, so that the copies run at the bus's speed
            pinned = torch.cuda.cudart().cudaHostRegister(self._whole.data_ptr(), self.size, 0)  # type: ignore[no-untyped-call]
            if int(pinned):  # which CUDA would report again at some later call
                raise UserError(
                    f"cannot pin {self.size / 1e6:,.0f} MB of memory for checkpoints (CUDA error {int(pinned)}); "
                    "is the node's memory, or the job's share of it, used up?"
                )

    def take(self) -> None:
        """Copy the state of this moment."""
        with torch.no_grad():
            for view, (_, tensor) in zip(self._views, self._sources(), strict=True):
                view.copy_(tensor, non_blocking=True)
        if self._on_gpu:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Give the memory back, as soon as no other process reads it."""
        if self._on_gpu:
            torch.cuda.cudart().cudaHostUnregister(self._whole.data_ptr())  # type: ignore[no-untyped-call]
        self._views.clear()
        del self._whole
        os.close(self.handle)

    def _sources(self) -> list[tuple[Piece, torch.Tensor]]:
        """All that this rank stores, by kind, so that a reader of one kind reads on without gaps."""
        found = []
        for network, engine in self._engines.items():
            for fragment in engine.fragments():
                for kind, tensor in engine.tensors(fragment).items():
                    found.append((Piece(kind, network, fragment.name, fragment.start, fragment.length), tensor))
            for name, tensor in engine.frozen().items():
                found.append((Piece(FROZEN, network, name, 0, tensor.numel()), tensor.flatten()))
        return sorted(found, key=lambda entry: (entry[0].network, entry[0].kind))
