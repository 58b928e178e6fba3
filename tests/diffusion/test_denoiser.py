from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lvdm.config import DiffusionConfig
from lvdm.diffusion.denoiser import Denoiser

PROCESSES = [
    DiffusionConfig(parameterization="eps"),
    DiffusionConfig(parameterization="v"),
    DiffusionConfig(parameterization="x0"),
    DiffusionConfig(parameterization="flow"),
    DiffusionConfig(parameterization="v", zero_terminal_snr=True),
]


def times(config: DiffusionConfig) -> Tensor:
    return (
        torch.tensor([0.01, 0.3, 0.7, 0.99]) if config.parameterization == "flow" else torch.tensor([0, 250, 700, 999])
    )


def nowhere(*_: Tensor) -> Tensor:
    raise AssertionError("the network is not needed here")


@pytest.mark.parametrize("config", PROCESSES, ids=lambda c: f"{c.parameterization}-{c.zero_terminal_snr}")
def test_conversions_invert_the_target(config: DiffusionConfig, noise: Tensor) -> None:
    denoiser = Denoiser(nowhere, config)
    z0, t_B = noise.roll(1, 0) * 0.7 + 0.2, times(config)
    z_t = denoiser.add_noise(z0, noise, t_B)
    target = denoiser.target(z0, noise, t_B)
    torch.testing.assert_close(denoiser.to_x0(z_t, target, t_B), z0, atol=5e-6, rtol=0)
    torch.testing.assert_close(denoiser.to_eps(z_t, target, t_B), noise, atol=5e-5, rtol=0)


def test_noised_latents_equal_the_reference(reference: dict[str, Tensor]) -> None:
    denoiser = Denoiser(nowhere, DiffusionConfig(beta_start=0.0015, beta_end=0.0155))
    z_t = denoiser.add_noise(reference["q_sample.x_start"], reference["q_sample.noise"], reference["q_sample.t"])
    torch.testing.assert_close(z_t, reference["q_sample.x_noisy"], atol=1e-6, rtol=1e-6)


def test_zero_terminal_snr_ends_in_pure_noise(noise: Tensor) -> None:
    denoiser = Denoiser(nowhere, PROCESSES[-1])
    t_B = torch.full((4,), 999)
    assert torch.equal(denoiser.add_noise(torch.full_like(noise, 5.0), noise, t_B), noise)
    assert torch.equal(denoiser.target(torch.full_like(noise, 5.0), noise, t_B), torch.full_like(noise, -5.0))


def test_the_network_sees_its_dtype_and_everything_else_is_fp32(noise: Tensor) -> None:
    seen: dict[str, Tensor | None] = {}

    def network(z: Tensor, t_B: Tensor, *, text_BLD: Tensor, text_mask_BL: Tensor, extra: Tensor | None) -> Tensor:
        seen.update(z=z, t=t_B, text=text_BLD, mask=text_mask_BL, extra=extra)
        return z

    denoiser = Denoiser(network, DiffusionConfig(), torch.bfloat16)
    conditioning = {"text_BLD": torch.randn(4, 5, 8), "text_mask_BL": torch.ones(4, 5, dtype=torch.bool), "extra": None}
    output = denoiser.predict(noise, torch.tensor([0, 1, 500, 999]), **conditioning)
    dtypes = {name: None if value is None else value.dtype for name, value in seen.items()}
    assert dtypes == {
        "z": torch.bfloat16, "t": torch.int64, "text": torch.bfloat16, "mask": torch.bool, "extra": None,
    }  # fmt: skip
    assert output.dtype == torch.float32
    t_B = torch.tensor([3])
    for made in (denoiser.add_noise, denoiser.target, denoiser.to_x0, denoiser.to_eps):
        if made in (denoiser.add_noise, denoiser.target):
            assert made(noise[:1].bfloat16(), noise[:1].bfloat16(), t_B).dtype == torch.float32
        else:
            assert made(noise[:1], noise[:1], t_B).dtype == torch.float32


def test_flow_times_reach_the_network_in_steps_and_in_fp32(noise: Tensor) -> None:
    seen = []
    denoiser = Denoiser(
        lambda z, t_B: (seen.append(t_B), z)[1], DiffusionConfig(parameterization="flow"), torch.bfloat16
    )
    denoiser.predict(noise, torch.tensor([0.0, 0.25, 0.5, 0.9999]))
    torch.testing.assert_close(seen[0], torch.tensor([0.0, 250.0, 500.0, 999.9]))
