"""What the diffusion tests share: numbers the reference produced, and a data distribution with a known denoiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lvdm.config import DiffusionConfig
from lvdm.diffusion.denoiser import Denoiser

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"

MEAN, STD = 0.3, 0.5


@pytest.fixture(scope="session")
def reference() -> dict[str, Tensor]:
    """Selected entries and float64 sums of LVDM's schedules and DDIM tables, and one of its noised latents."""
    return load_file(FIXTURES / "schedules.safetensors")


@pytest.fixture
def gaussian() -> Callable[[DiffusionConfig], Denoiser]:
    """For data N(MEAN, STD^2), elementwise: the denoiser around the network that has learnt it perfectly."""

    def build(config: DiffusionConfig) -> Denoiser:
        def network(z: Tensor, t_B: Tensor) -> Tensor:
            time_B = t_B / config.timesteps if config.parameterization == "flow" else t_B
            a, s = denoiser.coefficients(z, time_B)
            variance = a**2 * STD**2 + s**2
            x0 = MEAN + a * STD**2 / variance * (z - a * MEAN)
            eps = s / variance * (z - a * MEAN)
            return {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[config.parameterization]

        denoiser = Denoiser(network, config)
        return denoiser

    return build


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(4, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
