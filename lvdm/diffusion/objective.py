"""The training loss, one fp32 value a sample, and the draws that go into it as pure functions of the position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lvdm.config import DiffusionConfig
from lvdm.diffusion.denoiser import Denoiser
from lvdm.diffusion.masks import GivenFrames
from lvdm.randomness import Purpose, normal, uniform


def draw_timesteps(seed: int, positions: Sequence[int], config: DiffusionConfig) -> Tensor:
    """Times of the samples at ``positions`` of the run, on the CPU: int64 in 0..T-1, or for flow float32 in [0, 1).

    Numbers just under 1 that would round up to it are kept below.
    """
    draws_B = uniform(seed, positions, Purpose.TIMESTEP)
    draws_B = config.timestep_shift * draws_B / (1 + (config.timestep_shift - 1) * draws_B)
    if config.parameterization == "flow":
        return torch.from_numpy(np.minimum(draws_B.astype(np.float32), np.nextafter(np.float32(1), np.float32(0))))
    return torch.from_numpy(np.minimum(draws_B * config.timesteps, config.timesteps - 1).astype(np.int64))


def draw_noise(seed: int, positions: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Diffusion noise ``[len(positions), *shape]`` of the samples at ``positions``, float32 on the CPU."""
    return torch.from_numpy(normal(seed, positions, Purpose.NOISE, shape))


def diffusion_loss(
    denoiser: Denoiser,
    z0_BCTHW: Tensor,
    noise_BCTHW: Tensor,
    t_B: Tensor,
    given: GivenFrames | None = None,
    **conditioning: Tensor | None,
) -> Tensor:
    """Weighted distance between the network's output and its target, mean over C, T, H, W: fp32 ``[B]``.

    ``eps`` with no weighting is DDPM's simple loss (arXiv 2006.11239, eq. 14), LVDM's objective. Frames that are
    ``given`` take their own noise level in place of ``t_B``, in the input and in the target.
    """
    z_BCTHW = denoiser.add_noise(z0_BCTHW, noise_BCTHW, t_B)
    target_BCTHW = denoiser.target(z0_BCTHW, noise_BCTHW, t_B)
    if given is not None:
        z_given, target_given = _at_level(denoiser, z0_BCTHW, noise_BCTHW, given)
        z_BCTHW = torch.where(given.mask_B1T11 > 0, z_given, z_BCTHW)
        target_BCTHW = torch.where(given.mask_B1T11 > 0, target_given, target_BCTHW)
        conditioning |= {"mask_B1THW": given.mask_B1T11, "level_B": given.label_B}
    error_BCTHW = denoiser.predict(z_BCTHW, t_B, **conditioning) - target_BCTHW
    distance_BCTHW = error_BCTHW.abs() if denoiser.config.loss == "l1" else error_BCTHW.square()
    if given is None or given.in_loss:
        loss_B = distance_BCTHW.flatten(1).mean(1)
    else:
        wanted_BCTHW = (1 - given.mask_B1T11).expand_as(distance_BCTHW)
        loss_B = (distance_BCTHW * wanted_BCTHW).flatten(1).sum(1) / wanted_BCTHW.flatten(1).sum(1)
    if denoiser.config.min_snr_gamma:
        loss_B = loss_B * _snr_weight(denoiser, z_BCTHW, t_B)
    return loss_B


def _at_level(denoiser: Denoiser, z0_BCTHW: Tensor, noise_BCTHW: Tensor, given: GivenFrames) -> tuple[Tensor, Tensor]:
    """Noisy latent and target at the level of the given frames; a level of -1 is clean."""
    steps_B = given.level_B.clamp(min=0)
    flow = denoiser.config.parameterization == "flow"
    level_B = steps_B / denoiser.config.timesteps if flow else steps_B
    noisy = denoiser.add_noise(z0_BCTHW, noise_BCTHW, level_B)
    clean_B1111 = (given.level_B < 0).view(-1, 1, 1, 1, 1)
    return torch.where(clean_B1111, z0_BCTHW.float(), noisy), denoiser.target(z0_BCTHW, noise_BCTHW, level_B)


def quarter_means(loss_B: Tensor, t_B: Tensor, timesteps: int) -> tuple[Tensor, Tensor]:
    """Sums ``[4]`` and counts ``[4]`` (fp32) of the losses by quarter of the process, first quarter cleanest.

    An integer ``t_B`` counts steps of ``timesteps``; a floating one (flow) is a fraction of the process already. Sums
    and counts add up over micro-batches and ranks; their ratio is the mean. Stays on the device of ``loss_B``.
    """
    t_B = t_B.to(loss_B.device)
    fraction_B = t_B if t_B.is_floating_point() else t_B.double() / timesteps
    quarter_B = (4 * fraction_B).long().clamp(0, 3)
    member_4B = quarter_B == torch.arange(4, device=loss_B.device)[:, None]
    # where, not a product: a NaN loss must show in its own quarter only
    sums_4 = torch.where(member_4B, loss_B.detach().float(), 0.0).sum(1)
    return sums_4, member_4B.float().sum(1)


def _snr_weight(denoiser: Denoiser, like_BCTHW: Tensor, t_B: Tensor) -> Tensor:
    """The SNR, kept from floor to gamma, on the error of z_0 (arXiv 2303.09556, section 3.4): ``[B]`` for each target.

    An error of ``x0`` counts as it is; one of ``eps`` is SNR, one of ``v`` SNR + 1 times as large.
    """
    a, s = denoiser.coefficients(like_BCTHW, t_B)
    snr_B = (a / s).square().flatten()
    weight_B = snr_B.clamp(denoiser.config.snr_floor, denoiser.config.min_snr_gamma)
    match denoiser.config.parameterization:
        case "eps":
            return weight_B / snr_B
        case "v":
            return weight_B / (snr_B + 1)
        case _:
            return weight_B
