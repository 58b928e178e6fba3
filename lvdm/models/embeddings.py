"""Sinusoidal embedding of the diffusion time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(t_B: Tensor, channels: int, max_period: float = 10000.0) -> Tensor:
    """fp32 ``[B, channels]``: cosines, then sines, of ``t * max_period^(-i / half)``; an odd last channel is zero."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device)
    frequencies = torch.exp(-math.log(max_period) / half * exponents)
    angles = t_B.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return torch.nn.functional.pad(embedding, (0, channels % 2))
