from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from lvdm.config import DiffusionConfig
from lvdm.diffusion.denoiser import Denoiser
from lvdm.diffusion.objective import diffusion_loss, draw_noise, draw_timesteps, quarter_means


def test_draws_belong_to_the_position_not_to_the_batch() -> None:
    config = DiffusionConfig()
    together = draw_timesteps(7, range(100, 164), config)
    assert torch.equal(together[[5, 60]], draw_timesteps(7, [105, 160], config))
    assert not torch.equal(together, draw_timesteps(8, range(100, 164), config))
    noise = draw_noise(7, [3, 4, 5], (4, 2, 8, 8))
    assert torch.equal(noise[1:], draw_noise(7, [4, 5], (4, 2, 8, 8)))
    assert not torch.equal(noise[0], draw_noise(7 + 2**32, [3], (4, 2, 8, 8))[0])  # 64 bits of the seed count
    assert noise.dtype == torch.float32


def test_timesteps_are_uniform_over_the_schedule() -> None:
    t = draw_timesteps(0, range(20000), DiffusionConfig(timesteps=10))
    counts = torch.bincount(t, minlength=10)
    assert t.dtype == torch.int64
    assert len(counts) == 10
    assert (counts - 2000).abs().max() < 200  # 4.7 standard deviations
    flow = draw_timesteps(0, range(20000), DiffusionConfig(parameterization="flow"))
    assert flow.dtype == torch.float32
    assert flow.min() >= 0
    assert flow.max() < 1
    assert abs(float(flow.mean()) - 0.5) < 0.01


@pytest.mark.parametrize("parameterization", ["v", "flow"])
def test_a_shift_draws_noisy_times_more_often(parameterization: Literal["v", "flow"]) -> None:
    """With s = 3, u = 1/2 becomes 3/4: half of the draws lie above it."""
    config = DiffusionConfig(parameterization=parameterization, timesteps=1000, timestep_shift=3.0)
    t = draw_timesteps(0, range(20000), config).double() / (1 if parameterization == "flow" else 1000)
    assert abs(float((t > 0.75).double().mean()) - 0.5) < 0.02
    assert abs(float((t > 0.5).double().mean()) - 0.75) < 0.02


def test_a_time_never_rounds_up_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from lvdm.diffusion import objective

    monkeypatch.setattr(objective, "uniform", lambda *_: np.array([1 - 2.0**-53]))
    for shift in (1.0, 5.0):
        flow = DiffusionConfig(parameterization="flow", timestep_shift=shift)
        assert float(draw_timesteps(0, [0], flow)) < 1
        assert int(draw_timesteps(0, [0], DiffusionConfig(timestep_shift=shift))) == 999


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_loss_is_the_reference_s_formula_for_each_sample(loss: Literal["l1", "l2"], noise: Tensor) -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    denoiser = Denoiser(lambda z, t_B, text_BLD: weight * z + text_BLD.mean(), DiffusionConfig(loss=loss))
    z0, t_B, text = noise.flip(0), torch.tensor([0, 10, 500, 999]), torch.ones(4, 3, 2)
    loss_B = diffusion_loss(denoiser, z0, noise, t_B, text_BLD=text)
    assert loss_B.shape == (4,)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    for i, t in enumerate(t_B.tolist()):
        z_t = abar[t].sqrt() * z0[i].double() + (1 - abar[t]).sqrt() * noise[i].double()
        error = noise[i] - (0.5 * z_t + 1)
        expected = error.abs().mean() if loss == "l1" else (error**2).mean()
        torch.testing.assert_close(loss_B[i].double(), expected, rtol=1e-5, atol=0)
    loss_B.mean().backward()
    assert weight.grad is not None
    assert weight.grad != 0


@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_the_weight_of_the_clean_error_is_the_clamped_snr(
    parameterization: Literal["eps", "v", "x0"], floor: float, noise: Tensor
) -> None:
    """A network whose clean estimate is off by d everywhere pays that weight times d^2 in every parameterisation."""
    gamma, off = 5.0, 0.1
    config = DiffusionConfig(parameterization=parameterization, min_snr_gamma=gamma, snr_floor=floor)
    z0, t_B = noise.flip(0), torch.tensor([20, 100, 400, 900])

    def network(z: Tensor, t: Tensor) -> Tensor:
        a, s = denoiser.coefficients(z, t)
        wrong = z0 + off
        eps = (z - a * wrong) / s
        return {"x0": wrong, "eps": eps, "v": a * eps - s * wrong}[parameterization]

    denoiser = Denoiser(network, config)
    a, s = denoiser.coefficients(z0, t_B)
    expected = (a / s).flatten().square().clamp(floor, gamma) * off**2
    torch.testing.assert_close(diffusion_loss(denoiser, z0, noise, t_B), expected, rtol=2e-3, atol=0)


def test_min_snr_is_finite_at_zero_terminal_snr(noise: Tensor) -> None:
    config = DiffusionConfig(parameterization="v", zero_terminal_snr=True, min_snr_gamma=5)
    loss_B = diffusion_loss(Denoiser(lambda z, t_B: z, config), noise, noise, torch.tensor([999, 998, 0, 1]))
    assert loss_B.isfinite().all()


def test_flow_loss_is_zero_for_the_straight_line(noise: Tensor) -> None:
    z0 = noise.flip(0)
    denoiser = Denoiser(lambda z, t_B: noise - z0, DiffusionConfig(parameterization="flow"))
    assert diffusion_loss(denoiser, z0, noise, torch.tensor([0.0, 0.2, 0.5, 0.99])).abs().max() == 0


def test_losses_by_quarter_of_the_process() -> None:
    loss_B, t_B = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 249, 250, 999, 750])
    sums, counts = quarter_means(loss_B, t_B, 1000)
    assert sums.tolist() == [3, 4, 0, 24]
    assert counts.tolist() == [2, 1, 0, 2]
    fractions = torch.tensor([0.0, 0.2499, 0.25, 0.9999999, 0.75])
    assert quarter_means(loss_B, fractions, 1000)[0].tolist() == [3, 4, 0, 24]
    spoiled = quarter_means(torch.tensor([float("nan"), 1.0]), torch.tensor([0, 999]), 1000)[0]
    assert spoiled[0].isnan()
    assert spoiled[1:].tolist() == [0, 0, 1]
