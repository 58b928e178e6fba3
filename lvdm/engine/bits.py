"""Checksums of tensors' bits, taken where the tensors lie and without waiting for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sums_of_bits(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """A checksum of each tensor, ``[N]`` int64 on ``device``.

    It is the sum of the bits read as integers of 64, modulo 2^64: one flipped bit adds or takes a power of two and so
    always shows; it does not depend on where in memory the tensor lies.
    """
    sums = [_sum_of_bits(tensor).to(device, non_blocking=True) for tensor in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=device)


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    per_word = 8 // flat.element_size()
    if flat.storage_offset() % per_word:  # words of 64 bits begin at multiples of 8 bytes
        flat = flat.clone()
    whole = flat.numel() - flat.numel() % per_word
    total = flat[:whole].view(torch.int64).sum()
    if whole < flat.numel():
        total = total + flat[whole:].view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
    return total


class Rest:
    """Notices what changes while nothing may: between one update of the weights and the next."""

    def __init__(self, parts: Callable[[], Mapping[str, Sequence[torch.Tensor]]], device: torch.device) -> None:
        """
        Args:
            parts: the tensors to watch, by what they are. A part that is there in another size is not compared.
        """
        self._parts, self._device = parts, device
        self.names = list(parts())
        """Of the parts."""
        self.disturbed = torch.zeros(len(self.names), dtype=torch.bool, device=device)
        """Which parts have changed at rest since the beginning."""
        self.mark()

    def mark(self) -> None:
        """Remember what there is now: an update is over."""
        self._sums, self._sizes = self._take()

    def look(self) -> None:
        """Compare what there is with what was marked last."""
        sums, sizes = self._take()
        changed = sums != self._sums
        if sizes != self._sizes:
            same = [now == before for now, before in zip(sizes, self._sizes, strict=True)]
            changed &= torch.tensor(same, device=self._device)
        self.disturbed |= changed

    def _take(self) -> tuple[torch.Tensor, list[int]]:
        """A checksum and the size of each part. The checksums of its tensors have odd factors, so that each bit counts
        and each place."""
        totals, sizes = [], []
        for tensors in self._parts().values():
            sums = sums_of_bits(tensors, self._device)
            factors = 1 + 2 * torch.arange(len(sums), device=self._device)
            totals.append((sums * factors).sum())
            sizes.append(sum(tensor.numel() for tensor in tensors))
        return torch.stack(totals), sizes
