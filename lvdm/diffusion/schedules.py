"""Variance schedules of the forward process, and DDIM's step tables, in float64 on the CPU.

Notation of DDPM (arXiv 2006.11239): q(z_t | z_0) = N(sqrt(abar_t) z_0, (1 - abar_t) I), abar = cumprod(1 - beta).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lvdm.config import DiffusionConfig
from lvdm.errors import UserError

Spacing = Literal["leading", "trailing"]

_COSINE_OFFSET = 0.008  # s of arXiv 2102.09672, eq. 17
_COSINE_MAX_BETA = 0.999
_SMALLEST_VARIANCE = 1e-20  # LVDM's floor below the logarithm: the first posterior variance is 0


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance schedule of T steps; every tensor is float64 ``[T]`` on the CPU."""

    betas: Tensor
    """Variance added by step t."""
    alphas_cumprod: Tensor
    """Share of the signal's variance left after step t."""

    @property
    def timesteps(self) -> int:
        """T, the length of the forward process."""
        return len(self.betas)

    @property
    def alphas_cumprod_prev(self) -> Tensor:
        """``alphas_cumprod`` one step earlier, 1 before the first."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @property
    def posterior_variance(self) -> Tensor:
        """Variance of q(z_{t-1} | z_t, z_0), DDPM eq. 7."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> Tensor:
        """Its logarithm, with the 0 of the first step lifted to 1e-20."""
        return self.posterior_variance.clamp(min=_SMALLEST_VARIANCE).log()

    @property
    def posterior_mean_coef1(self) -> Tensor:
        """Factor of z_0 in the mean of q(z_{t-1} | z_t, z_0), DDPM eq. 7."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @property
    def posterior_mean_coef2(self) -> Tensor:
        """Factor of z_t in the mean of q(z_{t-1} | z_t, z_0), DDPM eq. 7."""
        return (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    def tables(self) -> dict[str, Tensor]:
        """The float32 buffers that LVDM's checkpoints hold of it, by their names there."""
        abar = self.alphas_cumprod
        named = {
            "betas": self.betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": self.alphas_cumprod_prev,
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - abar).log(),
            "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
            "posterior_variance": self.posterior_variance,
            "posterior_log_variance_clipped": self.posterior_log_variance_clipped,
            "posterior_mean_coef1": self.posterior_mean_coef1,
            "posterior_mean_coef2": self.posterior_mean_coef2,
        }
        return {name: table.float() for name, table in named.items()}


def build_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The variance schedule a config describes (``parameterization: flow`` uses none)."""
    steps = config.timesteps
    match config.schedule:
        case "scaled_linear":
            betas = _linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), steps) ** 2
        case "linear":
            betas = _linspace(config.beta_start, config.beta_end, steps)
        case "cosine":
            betas = _cosine_betas(steps)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    if config.zero_terminal_snr:
        betas, alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
    return NoiseSchedule(betas, alphas_cumprod)


@dataclass(frozen=True)
class StepTable:
    """The steps of a strided DDIM run, in ascending time (a sampler walks them backwards)."""

    timesteps: Tensor
    """Time of the network call, int64 ``[N]``."""
    alphas: Tensor
    """``alphas_cumprod`` there, float64 ``[N]``."""
    alphas_prev: Tensor
    """``alphas_cumprod`` that the step leads to, float64 ``[N]``."""
    sigmas: Tensor
    """Standard deviation of the noise that the step adds, float64 ``[N]``."""

    def __len__(self) -> int:
        return len(self.timesteps)


def ddim_table(schedule: NoiseSchedule, steps: int, eta: float, spacing: Spacing) -> StepTable:
    """The steps of DDIM (arXiv 2010.02502, eq. 12 and 16) at noise level ``eta``: 0 deterministic, 1 ancestral.

    ``leading`` is LVDM's table: times ``range(0, T, T // steps) + 1``, which may be more than ``steps`` when ``steps``
    does not divide T; it ends at ``alphas_cumprod[0]``, not quite clean. ``trailing`` (arXiv 2305.08891) has exactly
    ``steps`` times, starts at T - 1, where the latent is noisiest, and ends clean.

    Raises:
        UserError: ``steps`` is not in 1..T, or its leading table would pass T; the nearest count that works is named.
    """
    total = schedule.timesteps
    if not 1 <= steps <= total:
        raise UserError(f"steps={steps}: give 1 to {total}, the timesteps of the schedule")
    # LVDM keeps float32 buffers and makes its tables of them; sigma of the first step shows the difference (4e-5).
    alphas_cumprod = schedule.alphas_cumprod.float().double()
    if spacing == "leading":
        if not _leading_fits(total, steps):
            working = nearest_leading_steps(total, steps)
            raise UserError(f"steps={steps}: its leading table runs past the {total} timesteps; use {working}")
        times = torch.arange(0, total, total // steps) + 1
        before_first = alphas_cumprod[:1]
    else:
        times = trailing_times(total, steps)
        before_first = torch.ones(1, dtype=torch.float64)
    alphas = alphas_cumprod[times]
    alphas_prev = torch.cat([before_first, alphas[:-1]])
    sigmas = eta * ((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev)).sqrt()
    return StepTable(times, alphas, alphas_prev, sigmas)


def trailing_times(total: int, steps: int) -> Tensor:
    """``steps`` times as even as integers can be, ascending to ``total - 1``, int64."""
    return torch.tensor([round(total * (i + 1) / steps) - 1 for i in range(steps)])


def nearest_leading_steps(total: int, steps: int) -> int:
    """The count nearest to ``steps`` whose leading table stays inside ``total`` timesteps (the smaller on a tie)."""
    fitting = (count for count in range(1, total + 1) if _leading_fits(total, count))
    nearest = min(fitting, key=lambda count: abs(count - steps), default=None)
    if nearest is None:
        raise UserError(f"a schedule of {total} timestep has no leading table; use spacing trailing")
    return nearest


def _leading_fits(total: int, steps: int) -> bool:
    return range(0, total, total // steps)[-1] + 1 < total


def _linspace(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _cosine_betas(steps: int) -> Tensor:
    """Cosine schedule, arXiv 2102.09672 eq. 17."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    signal = torch.cos((t + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=_COSINE_MAX_BETA)


def _zero_terminal_snr(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale sqrt(abar) so that its last value is 0 and its first stays (arXiv 2305.08891, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    rescaled = ((root - last) * first / (first - last)) ** 2
    betas = 1 - torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]])
    return betas, rescaled
