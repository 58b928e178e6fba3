from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lvdm.config import DiffusionConfig
from lvdm.diffusion.denoiser import Denoiser
from lvdm.diffusion.samplers import check_sampling, initial_noise, sample
from lvdm.diffusion.schedules import build_schedule, ddim_table
from lvdm.errors import UserError
from tests.diffusion.conftest import MEAN, STD

Build = Callable[[DiffusionConfig], Denoiser]
SHAPE = (4, 4, 16, 16)
SEEDS = [11, 12, 13, 14]
VARIANCE = DiffusionConfig()
FLOW = DiffusionConfig(parameterization="flow")
ZERO_SNR = DiffusionConfig(parameterization="v", zero_terminal_snr=True)

RUNS: list[tuple[DiffusionConfig, dict[str, Any]]] = [
    (VARIANCE, {"sampler": "ddim", "steps": 250}),
    (VARIANCE, {"sampler": "ddim", "steps": 250, "spacing": "trailing"}),
    (VARIANCE, {"sampler": "ddim", "steps": 250, "eta": 1.0}),
    (VARIANCE, {"sampler": "ddpm", "steps": 250}),
    (VARIANCE, {"sampler": "dpmpp", "steps": 250}),
    (VARIANCE, {"sampler": "unipc", "steps": 250}),
    (ZERO_SNR, {"sampler": "ddim", "steps": 250}),
    (ZERO_SNR, {"sampler": "ddpm", "steps": 250}),
    (ZERO_SNR, {"sampler": "dpmpp", "steps": 250}),
    (ZERO_SNR, {"sampler": "unipc", "steps": 250}),
    (FLOW, {"sampler": "flow_euler", "steps": 250}),
    (FLOW, {"sampler": "dpmpp", "steps": 250}),
    (FLOW, {"sampler": "unipc", "steps": 250}),
]
IDS = [
    "-".join([config.parameterization + "0" * config.zero_terminal_snr, *map(str, options.values())])
    for config, options in RUNS
]


def run(denoiser: Denoiser, seeds: list[int], **options: Any) -> Tensor:
    noise = initial_noise(seeds, SHAPE)
    return sample(denoiser.denoise, noise, config=denoiser.config, seeds=seeds, **options)


@pytest.mark.parametrize(("config", "options"), RUNS, ids=IDS)
def test_samples_have_the_data_s_mean_and_spread(
    config: DiffusionConfig, options: dict[str, Any], gaussian: Build
) -> None:
    samples = run(gaussian(config), SEEDS, **options)
    assert samples.shape == (4, *SHAPE)
    assert samples.dtype == torch.float32
    # 16384 draws: standard error of the mean 0.004; that the schedule does not end in pure noise costs 0.02 of mean
    assert abs(float(samples.mean()) - MEAN) < 0.03
    assert abs(float(samples.std()) - STD) < 0.02


@pytest.mark.parametrize(
    ("config", "options"),
    [r for r in RUNS if r[1]["sampler"] != "ddpm" and not r[1].get("eta")],
    ids=[i for i, r in zip(IDS, RUNS, strict=True) if r[1]["sampler"] != "ddpm" and not r[1].get("eta")],
)
def test_deterministic_samplers_follow_the_exact_path(
    config: DiffusionConfig, options: dict[str, Any], gaussian: Build
) -> None:
    """The probability-flow ODE of Gaussian data keeps (z_t - a_t MEAN) / std(z_t), which tells where each path ends."""
    denoiser, noise = gaussian(config), initial_noise(SEEDS, SHAPE)
    samples = run(denoiser, SEEDS, **options)
    leading = options["sampler"] == "ddim" and config is VARIANCE and "spacing" not in options
    start = torch.full((4,), 1.0) if config is FLOW else torch.full((4,), 997 if leading else 999)
    a, s = denoiser.coefficients(noise, start)
    exact = MEAN + STD * (noise - a * MEAN) / (a**2 * STD**2 + s**2).sqrt()
    assert float((samples - exact).std()) < 0.02 * STD


@pytest.mark.parametrize(("config", "options"), RUNS, ids=IDS)
def test_a_sample_depends_on_its_seed_alone(config: DiffusionConfig, options: dict[str, Any], gaussian: Build) -> None:
    options = {**options, "steps": 10}
    denoiser = gaussian(config)
    together = run(denoiser, SEEDS, **options)
    assert torch.equal(together, run(denoiser, SEEDS, **options))
    assert torch.equal(together[2:3], run(denoiser, [13], **options))
    assert torch.equal(together[[3, 1]], run(denoiser, [14, 12], **options))
    assert not torch.equal(together[0], together[1])


def test_only_eta_makes_ddim_draw(gaussian: Build) -> None:
    denoiser, noise = gaussian(VARIANCE), initial_noise(SEEDS, SHAPE)
    options: dict[str, Any] = {"config": VARIANCE, "sampler": "ddim", "steps": 10}
    still = [sample(denoiser.denoise, noise, seeds=seeds, **options) for seeds in (SEEDS, [1, 2, 3, 4])]
    assert torch.equal(*still)
    drawn = [sample(denoiser.denoise, noise, seeds=seeds, eta=0.5, **options) for seeds in (SEEDS, [11, 2, 3, 4])]
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][1], drawn[1][1])


def test_ddim_is_diffusers_ddim_where_the_count_divides(gaussian: Build) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    denoiser, z = gaussian(VARIANCE), initial_noise(SEEDS, SHAPE)
    ours = run(denoiser, SEEDS, sampler="ddim", steps=50)
    theirs = DDIMScheduler(
        trained_betas=build_schedule(VARIANCE).betas.tolist(), clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    theirs.set_timesteps(50)
    for t in theirs.timesteps:
        eps = denoiser.predict(z, t.expand(4))
        z = theirs.step(eps, int(t), z, eta=0.0).prev_sample
    torch.testing.assert_close(ours, z, atol=2e-4, rtol=0)


def test_a_ddpm_step_is_the_posterior_of_the_reference(gaussian: Build) -> None:
    """The first two of 1000 ancestral steps, against DDPM's eq. 7 with the noise that the second one adds taken out."""
    denoiser, z = gaussian(VARIANCE), initial_noise([5], SHAPE)
    seen: list[Tensor] = []

    def watch(z_t: Tensor, t_B: Tensor) -> Tensor:
        seen.append(z_t)
        if len(seen) > 2:
            raise StopIteration
        return denoiser.denoise(z_t, t_B)

    with pytest.raises(StopIteration):
        sample(watch, z, config=VARIANCE, sampler="ddpm", steps=1000, seeds=[5])
    schedule = build_schedule(VARIANCE)
    for step, t in enumerate((999, 998)):
        x0 = denoiser.denoise(seen[step], torch.tensor([t]))
        mean = schedule.posterior_mean_coef1[t] * x0 + schedule.posterior_mean_coef2[t] * seen[step]
        added = (seen[step + 1] - mean) / schedule.posterior_variance[t].sqrt()
        # unit noise, independent of where it is added
        assert abs(float(added.std()) - 1) < 0.05
        assert abs(float((added * seen[step]).mean())) < 0.07


def test_lvdm_s_last_step_at_eta_one_leaves_the_first_level_of_noise(gaussian: Build) -> None:
    denoiser = gaussian(VARIANCE)
    table = ddim_table(build_schedule(VARIANCE), 50, 1.0, "leading")
    last: list[Tensor] = []

    def watch(z_t: Tensor, t_B: Tensor) -> Tensor:
        last[:] = [z_t, denoiser.denoise(z_t, t_B)]
        return last[1]

    noise = initial_noise(SEEDS, SHAPE)
    final = sample(watch, noise, config=VARIANCE, sampler="ddim", steps=50, eta=1.0, seeds=SEEDS)
    a, a_prev, sigma = float(table.alphas[0]), float(table.alphas_prev[0]), float(table.sigmas[0])
    z_t, x0 = last
    eps = (z_t - a**0.5 * x0) / (1 - a) ** 0.5
    added = (final - a_prev**0.5 * x0 - (1 - a_prev - sigma**2) ** 0.5 * eps) / sigma
    assert float(added.std()) == pytest.approx(1, abs=0.03)
    assert a_prev == pytest.approx(1 - VARIANCE.beta_start)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 5, 1000])
def test_zero_terminal_snr_is_finite_at_any_count(sampler: str, steps: int, gaussian: Build) -> None:
    denoiser = gaussian(ZERO_SNR)
    noise = initial_noise([1], (1, 1, 2, 2))
    final = sample(denoiser.denoise, noise, config=ZERO_SNR, sampler=sampler, steps=steps, seeds=[1])  # type: ignore[arg-type]
    assert final.isfinite().all()


@pytest.mark.parametrize("sampler", ["flow_euler", "dpmpp", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_flow_is_finite_at_few_steps(sampler: str, steps: int, gaussian: Build) -> None:
    assert run(gaussian(FLOW), [1], sampler=sampler, steps=steps).isfinite().all()


def test_progress_counts_every_step(gaussian: Build) -> None:
    for config, sampler, asked, made in (
        (VARIANCE, "ddim", 30, 31),
        (VARIANCE, "unipc", 5, 5),
        (FLOW, "flow_euler", 4, 4),
    ):
        seen: list[tuple[int, int]] = []
        run(gaussian(config), [1], sampler=sampler, steps=asked, progress=lambda *step, seen=seen: seen.append(step))
        assert seen == [(i, made) for i in range(1, made + 1)]


def test_initial_noise_comes_from_each_seed() -> None:
    noise = initial_noise([3, 4, 3], (2, 3))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], initial_noise([3 + 2**32], (2, 3))[0])


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (FLOW, {"sampler": "ddim", "steps": 5}, "use flow_euler, dpmpp, unipc"),
        (VARIANCE, {"sampler": "flow_euler", "steps": 5}, "use ddim, ddpm, dpmpp, unipc"),
        (VARIANCE, {"sampler": "ddpm", "steps": 0}, "1 to 1000"),
        (VARIANCE, {"sampler": "unipc", "steps": 1001}, "1 to 1000"),
        (VARIANCE, {"sampler": "ddim", "steps": 105}, "use 100"),
        (VARIANCE, {"sampler": "ddim", "steps": 5, "eta": 1.5}, "eta=1.5"),
        (VARIANCE, {"sampler": "dpmpp", "steps": 5, "eta": 0.5}, "options of ddim"),
        (ZERO_SNR, {"sampler": "ddim", "steps": 5, "spacing": "leading"}, "use spacing trailing"),
    ],
)
def test_what_cannot_be_sampled_is_refused(config: DiffusionConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_sampling(config, **options)
