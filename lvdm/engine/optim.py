"""AdamW whose state includes the moving average of the weights, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from lvdm.config import OptimConfig

STATE_KEYS = ("exp_avg", "exp_avg_sq", "ema")
"""Per-element optimiser state, in the order in which checkpoints list it."""


class AdamWWithEMA(torch.optim.AdamW):
    """AdamW that keeps ``state[p]["ema"]`` beside the moments.

    Living in the optimiser's state, the average is sharded and offloaded by every ZeRO stage like the moments, follows
    the fp32 masters, and moves only on steps that were applied. ZeRO-3 calls `step` once per sub-group, so the warm-up
    counts ``state[p]["step"]`` and not calls.

    The decay at update n (from 1) is ``min(ema_decay, (1 + n) / (10 + n))``, as in LVDM.
    """

    def __init__(self, params: Iterable[torch.Tensor], config: OptimConfig, fused: bool = False) -> None:
        super().__init__(
            params,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=fused or None,
            foreach=False if not fused else None,
        )
        self.ema_decay = config.ema_decay

    def materialize(self, param: torch.Tensor) -> dict[str, Any]:
        """The state of ``param``, made if there is none yet: zero moments and an average equal to the weights."""
        state: dict[str, Any] = self.state[param]
        if not state:
            fused = bool(self.defaults["fused"])
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(param, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(param, requires_grad=False)
            state["ema"] = param.detach().clone()
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, then of its average."""
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for param in moved:
            self.materialize(param)
        super().step(closure)
        for param in moved:
            state = self.state[param]
            n = state["step"]
            # Kept as a tensor: reading it on the host would wait for the GPU.
            one_minus_decay = 1 - torch.clamp((1 + n) / (10 + n), max=self.ema_decay)
            state["ema"].lerp_(param, one_minus_decay.to(param.device))


def learning_rate(config: OptimConfig, samples: int, total_samples: int) -> float:
    """Learning rate of a step before which ``samples`` of ``total_samples`` were seen."""
    if samples < config.warmup_samples:
        return config.lr * (samples + 1) / (config.warmup_samples + 1)
    span = max(1, total_samples - config.warmup_samples)
    progress = min(1.0, (samples - config.warmup_samples) / span)
    match config.decay:
        case "constant":
            return config.lr
        case "linear":
            left = 1 - progress
        case "cosine":
            left = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * left)
