"""Sinusoidal embedding of the diffusion time, and of places in a clip."""

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


PLACE_CHANNELS = 3
"""Channels of `places`."""


def places(length: int, like: Tensor) -> Tensor:
    """``[length, 3]``: the places x in -1..1 along an axis, sin(pi x) and cos(pi x), of the type of ``like``."""
    x = torch.linspace(-1, 1, length, dtype=like.dtype, device=like.device)
    return torch.stack([x, torch.sin(math.pi * x), torch.cos(math.pi * x)], dim=1)


def along_axes(t_TP: Tensor, h_HP: Tensor, w_WP: Tensor) -> Tensor:
    """`places` along time, height and width as ``[9, T, H, W]``."""
    sides = (len(t_TP), len(h_HP), len(w_WP))
    t = t_TP.T[:, :, None, None].expand(-1, *sides)
    h = h_HP.T[:, None, :, None].expand(-1, *sides)
    w = w_WP.T[:, None, None, :].expand(-1, *sides)
    return torch.cat([t, h, w])
