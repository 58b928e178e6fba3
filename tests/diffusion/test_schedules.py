from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lvdm.config import DiffusionConfig
from lvdm.diffusion.schedules import build_schedule, ddim_table, nearest_leading_steps
from lvdm.errors import UserError

CONFIGS = {
    "uncond": DiffusionConfig(beta_start=0.0015, beta_end=0.0155),
    "t2v": DiffusionConfig(beta_start=0.00085, beta_end=0.012),
}


def same(actual: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "buffer",
    [
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ],
)
def test_the_reference_s_buffers(reference: dict[str, Tensor], name: str, buffer: str) -> None:
    values = getattr(build_schedule(CONFIGS[name]), buffer)
    assert values.dtype == torch.float64
    assert values.shape == (1000,)
    same(values[reference["rows"]], reference[f"{name}.{buffer}"])
    same(values.sum(), reference[f"{name}.{buffer}.sum"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tables_of_the_reference_s_checkpoints(reference: dict[str, Tensor], name: str) -> None:
    tables = build_schedule(CONFIGS[name]).tables()
    assert len(tables) == 12
    for table, values in tables.items():
        assert values.dtype == torch.float32
        if f"{name}.{table}" in reference:  # the square roots of what is there are not stored
            same(values[reference["rows"]], reference[f"{name}.{table}"])
            same(values.double().sum(), reference[f"{name}.{table}.sum"])
    same(tables["sqrt_alphas_cumprod"] ** 2, tables["alphas_cumprod"], rtol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", [5, 25, 50, 100, 250])
@pytest.mark.parametrize("eta", [0, 1])
def test_the_reference_s_ddim_tables(reference: dict[str, Tensor], name: str, steps: int, eta: int) -> None:
    table = ddim_table(build_schedule(CONFIGS[name]), steps, eta, "leading")
    assert len(table) == steps
    picked = torch.tensor([0, 1, steps // 2, steps - 1])
    for column in ("timesteps", "sigmas", "alphas", "alphas_prev") if eta else ("sigmas",):
        key = f"{name}.ddim{steps}.eta{eta}.{column}"
        same(getattr(table, column)[picked], reference[key])
        same(getattr(table, column).sum(), reference[f"{key}.sum"])


@pytest.mark.parametrize(("steps", "length"), [(30, 31), (75, 77), (150, 167)])
def test_a_count_that_does_not_divide_makes_more_steps_as_the_reference_does(steps: int, length: int) -> None:
    table = ddim_table(build_schedule(DiffusionConfig()), steps, 0, "leading")
    stride = 1000 // steps
    assert table.timesteps.tolist() == [1 + stride * i for i in range(length)]


def test_leading_counts_that_pass_the_end_are_refused_with_the_nearest_that_works() -> None:
    schedule = build_schedule(DiffusionConfig())
    failing = [
        3,
        9,
        27,
        36,
        37,
        *range(101, 112),
        *range(251, 334),
        *range(501, 1001),
    ]  # found by running the reference
    for steps in range(1, 1001):
        if steps in failing:
            with pytest.raises(UserError, match=f"use {nearest_leading_steps(1000, steps)}$"):
                ddim_table(schedule, steps, 0, "leading")
        else:
            assert ddim_table(schedule, steps, 0, "leading").timesteps[-1] < 1000
    assert [nearest_leading_steps(1000, s) for s in (3, 37, 105, 107, 1000, 50)] == [2, 38, 100, 112, 500, 50]


@pytest.mark.parametrize("steps", [0, 1001])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_step_counts_outside_the_schedule_are_refused(steps: int, spacing: str) -> None:
    with pytest.raises(UserError, match="1 to 1000"):
        ddim_table(build_schedule(DiffusionConfig()), steps, 0, spacing)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 7, 50, 61, 1000])
def test_trailing_tables_start_at_the_last_step_and_end_clean(steps: int) -> None:
    table = ddim_table(build_schedule(DiffusionConfig()), steps, 1, "trailing")
    assert len(table) == steps
    assert table.timesteps[-1] == 999
    assert table.timesteps.min() >= 0
    assert steps == 1 or table.timesteps.diff().min() > 0
    assert table.alphas_prev[0] == 1
    assert table.sigmas[0] == 0


def test_eta_one_over_every_step_is_the_ddpm_posterior() -> None:
    schedule = build_schedule(DiffusionConfig())
    table = ddim_table(schedule, 1000, 1, "trailing")
    same(table.sigmas**2, schedule.posterior_variance, rtol=2e-3)  # the table is made of float32 buffers
    eps_factor = (1 - table.alphas_prev - table.sigmas**2).clamp(min=0).sqrt()
    # mean = sqrt(abar') z0 + eps_factor eps, with eps = (z_t - sqrt(abar) z0) / sqrt(1 - abar)
    same(eps_factor / (1 - table.alphas).sqrt(), schedule.posterior_mean_coef2, rtol=2e-3)


@pytest.mark.parametrize("shape", ["scaled_linear", "linear", "cosine"])
def test_zero_terminal_snr(shape: str) -> None:
    plain = build_schedule(DiffusionConfig(schedule=shape))  # type: ignore[arg-type]
    zero = build_schedule(DiffusionConfig(schedule=shape, zero_terminal_snr=True, parameterization="v"))  # type: ignore[arg-type]
    assert zero.alphas_cumprod[-1] == 0
    assert zero.betas[-1] == 1
    same(zero.alphas_cumprod[0], plain.alphas_cumprod[0], rtol=1e-12)
    same(torch.cumprod(1 - zero.betas, 0), zero.alphas_cumprod, rtol=1e-9)
    assert zero.alphas_cumprod.diff().max() < 0


def test_cosine_schedule_follows_its_formula() -> None:
    schedule = build_schedule(DiffusionConfig(schedule="cosine", timesteps=100))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    signal = (
        torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2 / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2)) ** 2
    )
    same(schedule.alphas_cumprod[[9, 49, 89]], signal)
    assert schedule.betas.max() == 0.999
