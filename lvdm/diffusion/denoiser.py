"""The one border between fp32 noise arithmetic and the low-precision network.

Every parameterisation shares z_t = a_t z_0 + s_t noise, with a = sqrt(abar), s = sqrt(1 - abar) from the variance
schedule, or a = 1 - t, s = t for rectified flow (arXiv 2209.03003). What the network is trained to output:

=====  ====================  ==================  ==================
name   target                z_0 from output o   noise from output
=====  ====================  ==================  ==================
eps    noise                 (z_t - s o) / a     o
v      a noise - s z_0       a z_t - s o         s z_t + a o
x0     z_0                   o                   (z_t - a o) / s
flow   noise - z_0           z_t - s o           z_t + a o
=====  ====================  ==================  ==================

(v: arXiv 2202.00512, appendix D.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lvdm.config import DiffusionConfig
from lvdm.diffusion.schedules import build_schedule


class Denoiser:
    """Calls the network in its own dtype; takes and gives fp32.

    Args:
        network: ``network(z_BCTHW, t_B, **conditioning) -> BCTHW``, a module or a DeepSpeed engine.
        config: the process and the parameterisation.
        dtype: dtype of the network's weights; latents and floating conditioning are cast to it.
    """

    def __init__(
        self, network: Callable[..., Tensor], config: DiffusionConfig, dtype: torch.dtype = torch.float32
    ) -> None:
        self.network = network
        self.config = config
        self.dtype = dtype

    def predict(self, z_BCTHW: Tensor, t_B: Tensor, **conditioning: Tensor | None) -> Tensor:
        """The network's output, fp32 ``BCTHW``. Flow's t in [0, 1] reaches the network as t * timesteps, in fp32."""
        time_B = t_B.float() * self.config.timesteps if self.config.parameterization == "flow" else t_B
        cast = {name: self._cast(value) for name, value in conditioning.items()}
        return self.network(z_BCTHW.to(self.dtype), time_B, **cast).float()

    def denoise(self, z_BCTHW: Tensor, t_B: Tensor, **conditioning: Tensor | None) -> Tensor:
        """The network's estimate of the clean latent, fp32 ``BCTHW``."""
        return self.to_x0(z_BCTHW, self.predict(z_BCTHW, t_B, **conditioning), t_B)

    def add_noise(self, z0_BCTHW: Tensor, noise_BCTHW: Tensor, t_B: Tensor) -> Tensor:
        """z_t, fp32 ``BCTHW``."""
        a, s = self.coefficients(z0_BCTHW, t_B)
        return a * z0_BCTHW.float() + s * noise_BCTHW.float()

    def target(self, z0_BCTHW: Tensor, noise_BCTHW: Tensor, t_B: Tensor) -> Tensor:
        """What the network should output, fp32 ``BCTHW``."""
        z0, noise = z0_BCTHW.float(), noise_BCTHW.float()
        match self.config.parameterization:
            case "eps":
                return noise
            case "x0":
                return z0
            case "flow":
                return noise - z0
            case "v":
                a, s = self.coefficients(z0, t_B)
                return a * noise - s * z0

    def to_x0(self, z_BCTHW: Tensor, output_BCTHW: Tensor, t_B: Tensor) -> Tensor:
        """The clean latent that an output stands for, fp32 ``BCTHW``."""
        a, s = self.coefficients(z_BCTHW, t_B)
        match self.config.parameterization:
            case "eps":
                return (z_BCTHW - s * output_BCTHW) / a
            case "x0":
                return output_BCTHW
            case "flow":
                return z_BCTHW - s * output_BCTHW
            case "v":
                return a * z_BCTHW - s * output_BCTHW

    def to_eps(self, z_BCTHW: Tensor, output_BCTHW: Tensor, t_B: Tensor) -> Tensor:
        """The noise that an output stands for, fp32 ``BCTHW``."""
        a, s = self.coefficients(z_BCTHW, t_B)
        match self.config.parameterization:
            case "eps":
                return output_BCTHW
            case "x0":
                return (z_BCTHW - a * output_BCTHW) / s
            case "flow":
                return z_BCTHW + a * output_BCTHW
            case "v":
                return s * z_BCTHW + a * output_BCTHW

    def coefficients(self, like_BCTHW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Factors (a_t, s_t) of signal and noise, fp32, shaped to broadcast over ``like_BCTHW`` and on its device."""
        t_B = t_B.to(like_BCTHW.device)
        if self.config.parameterization == "flow":
            time_B = t_B.float()
            a_B, s_B = 1 - time_B, time_B
        else:
            a_B, s_B = _signal_and_noise(self.config, t_B.device)[:, t_B]
        shape = (-1, *[1] * (like_BCTHW.ndim - 1))
        return a_B.reshape(shape), s_B.reshape(shape)

    def _cast(self, value: Tensor | None) -> Tensor | None:
        return value.to(self.dtype) if value is not None and value.is_floating_point() else value


@functools.cache  # copied to a device once, so that a denoiser made for each step costs no host sync
def _signal_and_noise(config: DiffusionConfig, device: torch.device) -> Tensor:
    """sqrt(abar) and sqrt(1 - abar) of every step, fp32 ``[2, T]``."""
    alphas_cumprod = build_schedule(config).alphas_cumprod
    return torch.stack([alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()]).float().to(device)
