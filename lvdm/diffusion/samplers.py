"""Samplers: plain functions from a denoiser and initial noise to a clean latent.

A sampler asks ``denoise(z_t, t)`` for an estimate of the clean latent, whatever the network's parameterisation, and
every random number it adds is a pure function of the sample's own seed and the step: no sample depends on its batch.

DDIM and DDPM are a few lines over `schedules.StepTable`: LVDM's tables may have more steps than asked for, and
diffusers' DDIM derives the previous time from the step count, which is off wherever that does not divide the schedule.
DPM-Solver++, UniPC and flow Euler are diffusers' schedulers, walking times that we give them (its own trailing spacing
makes one step too many for some counts, 61 of 1000 for one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lvdm.config import DiffusionConfig
from lvdm.diffusion.schedules import Spacing, StepTable, build_schedule, ddim_table, trailing_times
from lvdm.errors import UserError
from lvdm.randomness import Purpose, normal

Sampler = Literal["ddim", "ddpm", "dpmpp", "unipc", "flow_euler"]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""``(z_BCTHW, t_B) -> estimate of the clean latent BCTHW``, fp32."""
Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all) after each step."""

_VARIANCE_SAMPLERS = ("ddim", "ddpm", "dpmpp", "unipc")
_FLOW_SAMPLERS = ("flow_euler", "dpmpp", "unipc")

_SMALLEST_SIGNAL = 2.0**-24  # abar of pure noise to the multistep solvers, which divide by it
_FLOW_MARGIN = 1e-6  # how far below 1 their flow times start


def initial_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The noise that samples start from, fp32 ``[len(seeds), *shape]``, each row from its own seed."""
    rows = [torch.from_numpy(normal(seed, [0], Purpose.SAMPLING, shape)) for seed in seeds]
    return torch.cat(rows).to(device)


def default_sampler(config: DiffusionConfig) -> Sampler:
    """The sampler of a process where none is named: DDIM, for flow Euler's."""
    return "flow_euler" if config.parameterization == "flow" else "ddim"


def check_sampling(
    config: DiffusionConfig, sampler: Sampler, steps: int, eta: float = 0.0, spacing: Spacing | None = None
) -> None:
    """Raise the `UserError` that `sample` would, before a model is loaded."""
    flow = config.parameterization == "flow"
    allowed = _FLOW_SAMPLERS if flow else _VARIANCE_SAMPLERS
    if sampler not in allowed:
        raise UserError(
            f"sampler={sampler} does not fit parameterization {config.parameterization}; use {', '.join(allowed)}"
        )
    if not 1 <= steps <= config.timesteps:
        raise UserError(f"steps={steps}: give 1 to {config.timesteps}, the timesteps of the schedule")
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta:g}: give 0 (deterministic) to 1 (ancestral)")
    if sampler != "ddim":
        if eta or spacing == "leading":
            raise UserError(f"sampler={sampler} has no eta and no leading spacing; they are options of ddim")
    elif _ddim_spacing(config, spacing) == "leading":
        if config.zero_terminal_snr:
            raise UserError("a schedule with zero terminal SNR has to start at its last step: use spacing trailing")
        ddim_table(build_schedule(config), steps, eta, "leading")


def sample(
    denoise: Denoise,
    noise_BCTHW: Tensor,
    *,
    config: DiffusionConfig,
    sampler: Sampler,
    steps: int,
    seeds: Sequence[int],
    eta: float = 0.0,
    spacing: Spacing | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Turn initial noise into a clean latent, fp32 ``BCTHW`` on the device of the noise.

    Args:
        denoise: as `lvdm.diffusion.guidance.classifier_free_guidance` makes one.
        noise_BCTHW: standard normal, `initial_noise` of the same seeds.
        config: the diffusion process that the network was trained on.
        sampler: ``ddim``, ``ddpm`` (ancestral), ``dpmpp`` (DPM-Solver++ 2M), ``unipc``; for flow ``flow_euler``,
            ``dpmpp`` or ``unipc``.
        steps: network calls (LVDM's leading DDIM table makes a few more when ``steps`` does not divide the schedule).
        seeds: one seed a sample, for the noise of ancestral steps.
        eta: DDIM's noise level, 0 to 1.
        spacing: DDIM's step table, see `ddim_table`; default ``leading`` (LVDM), with zero terminal SNR ``trailing``.
        progress: called after each step.

    Raises:
        UserError: the sampler does not fit the parameterisation, or steps, eta or spacing are out of range.
    """
    check_sampling(config, sampler, steps, eta, spacing)
    if len(seeds) != len(noise_BCTHW):
        raise ValueError(f"{len(seeds)} seeds for a batch of {len(noise_BCTHW)}")
    z_BCTHW = noise_BCTHW.float()
    with torch.no_grad():
        match sampler:
            case "ddim":
                table = ddim_table(build_schedule(config), steps, eta, _ddim_spacing(config, spacing))
                return _walk(denoise, z_BCTHW, table, seeds, progress)
            case "ddpm":
                table = ddim_table(build_schedule(config), steps, 1.0, "trailing")
                return _walk(denoise, z_BCTHW, table, seeds, progress)
            case "dpmpp" | "unipc":
                return _solve(denoise, z_BCTHW, *_multistep_solver(config, sampler, steps), progress)
            case "flow_euler":
                return _solve(denoise, z_BCTHW, *_euler_solver(steps), progress, velocity=True)


def _ddim_spacing(config: DiffusionConfig, spacing: Spacing | None) -> Spacing:
    return spacing or ("trailing" if config.zero_terminal_snr else "leading")


def _walk(
    denoise: Denoise, z_BCTHW: Tensor, table: StepTable, seeds: Sequence[int], progress: Progress | None
) -> Tensor:
    """DDIM, arXiv 2010.02502 eq. 12; at eta 1 its step is DDPM's with the posterior variance."""
    for done, index in enumerate(reversed(range(len(table))), start=1):
        a, a_prev = float(table.alphas[index]), float(table.alphas_prev[index])
        sigma = float(table.sigmas[index])
        z0 = denoise(z_BCTHW, _times(z_BCTHW, table.timesteps[index]))
        eps = (z_BCTHW - a**0.5 * z0) / (1 - a) ** 0.5
        z_BCTHW = a_prev**0.5 * z0 + max(1 - a_prev - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            z_BCTHW = z_BCTHW + sigma * _step_noise(seeds, done, z_BCTHW)
        if progress:
            progress(done, len(table))
    return z_BCTHW


def _step_noise(seeds: Sequence[int], step: int, like_BCTHW: Tensor) -> Tensor:
    """The noise of one ancestral step (1 is the first) for each sample, from its own seed."""
    rows = [torch.from_numpy(normal(seed, [step], Purpose.SAMPLER_STEP, like_BCTHW.shape[1:])) for seed in seeds]
    return torch.cat(rows).to(like_BCTHW.device)


def _multistep_solver(config: DiffusionConfig, sampler: Literal["dpmpp", "unipc"], steps: int) -> tuple[Any, Tensor]:
    """DPM-Solver++ 2M (arXiv 2211.01095) or UniPC-2 (arXiv 2302.04867) on clean estimates, and the times."""
    # diffusers takes seconds to import and DDIM does without it
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    flow = config.parameterization == "flow"
    if flow:
        # the solvers take log(1 - t), and UniPC puts it into a linear system: it must not be infinite at the start
        times = sigmas = _flow_times(steps).clamp(max=1 - _FLOW_MARGIN)
    else:
        times = trailing_times(config.timesteps, steps).flip(0)
        alphas_cumprod = build_schedule(config).alphas_cumprod[times].clamp(min=_SMALLEST_SIGNAL)
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    solver: Any
    if sampler == "dpmpp":
        solver = DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", prediction_type="sample", use_flow_sigmas=flow, final_sigmas_type="zero"
        )
    else:
        solver = UniPCMultistepScheduler(
            predict_x0=True, prediction_type="sample", use_flow_sigmas=flow, final_sigmas_type="zero"
        )
    solver.set_timesteps(steps)
    solver.timesteps = times
    solver.sigmas = torch.cat([sigmas, torch.zeros(1)]).float()
    solver.num_inference_steps = steps
    solver.set_begin_index(0)
    return solver, times


def _euler_solver(steps: int) -> tuple[Any, Tensor]:
    """Euler steps of dz/dt = noise - z_0 from t = 1 to 0 in equal strides, and their times."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    times = _flow_times(steps)
    solver: Any = FlowMatchEulerDiscreteScheduler(shift=1.0)
    solver.set_timesteps(sigmas=times.tolist())
    solver.set_begin_index(0)
    return solver, times


def _solve(
    denoise: Denoise, z_BCTHW: Tensor, solver: Any, times: Tensor, progress: Progress | None, *, velocity: bool = False
) -> Tensor:
    """Walk a diffusers scheduler; it is given the clean latent's estimate, or for flow Euler the velocity."""
    for done, (step, time) in enumerate(zip(solver.timesteps, times, strict=True), start=1):
        estimate = denoise(z_BCTHW, _times(z_BCTHW, time))
        if velocity:
            estimate = (z_BCTHW - estimate) / time
        z_BCTHW = solver.step(estimate, step, z_BCTHW, return_dict=False)[0]
        if progress:
            progress(done, len(times))
    return z_BCTHW


def _flow_times(steps: int) -> Tensor:
    """Equal strides from 1 down to ``1 / steps``, fp32."""
    return torch.tensor([1 - i / steps for i in range(steps)])


def _times(like_BCTHW: Tensor, time: Tensor) -> Tensor:
    return time.to(like_BCTHW.device).expand(len(like_BCTHW))
