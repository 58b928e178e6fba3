"""The autoencoder task: reconstruct clips through a small latent, with LVDM's losses but its adversarial one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange

from lvdm.config import AutoencoderTraining
from lvdm.data.batch import VideoBatch
from lvdm.errors import UserError
from lvdm.inference import float_to_frames, frames_to_float
from lvdm.models.build import build_model
from lvdm.models.video_autoencoder import kl_divergence
from lvdm.randomness import Purpose, normal
from lvdm.train.metrics import Sums

_SHOWN = 6
"""Clips in the picture of reconstructions."""


class AutoencoderTask:
    """Model and loss: absolute and squared error of pixels in -1..1, and KL divergence, by their weights.

    LVDM sums the error over the pixels of a frame and the divergence over a latent. Both are divided here by the number
    of values in a frame (3 x H x W), so that the loss reads as an error per pixel; the minimum is the same.
    """

    score = "-validation_ema/psnr"
    """Validation that the best checkpoint goes by; with a minus sign in front, since more is better."""

    def __init__(self, config: AutoencoderTraining, device: torch.device, dtype: torch.dtype) -> None:
        """Raises `UserError` where clip and downsampling do not fit."""
        self.config = config
        self.device = device
        self.dtype = dtype
        assert config.data.video is not None
        for clip in config.data.video.clip.sizes:
            sides = (clip.frames, clip.height, clip.width)
            if any(side % factor for side, factor in zip(sides, config.model.downsample, strict=True)):
                raise UserError(
                    f"data.video.clip of {sides} frames, height and width is not divisible by model.downsample "
                    f"{config.model.downsample}"
                )
        first = config.data.video.clip.sizes[0]
        self.latent_shape = self._latent_shape((first.frames, first.height, first.width))
        self.model = build_model(config.model, config.run.seed)

    def _latent_shape(self, sides: Sequence[int]) -> tuple[int, ...]:
        grid = (side // factor for side, factor in zip(sides, self.config.model.downsample, strict=True))
        return (self.config.model.latent_channels, *grid)

    def facts(self) -> dict[str, Any]:
        """What users of this autoencoder need beyond its config; stored in checkpoints and exports."""
        return {"latent_shape": list(self.latent_shape)}

    def frozen_parts(self) -> list[torch.nn.Module]:
        """What every rank has a copy of beside the model: nothing."""
        return []

    def loss(self, network: Callable[..., Any], batch: VideoBatch) -> tuple[torch.Tensor, Sums]:
        """Mean loss of a micro-batch, and what to report of it."""
        frames = frames_to_float(batch.to(self.device).frames_BCTHW)
        shape = self._latent_shape(frames.shape[2:])
        noise = torch.from_numpy(normal(self.config.run.seed, batch.positions, Purpose.POSTERIOR, shape))
        reconstruction, mean, logvar = network(frames.to(self.dtype), noise.to(self.device, self.dtype))
        difference = reconstruction.float() - frames
        l1, l2 = difference.abs().mean(), difference.square().mean()
        divergence = kl_divergence(mean.float(), logvar.float()).mean()
        weights = self.config.loss
        loss = weights.l1_weight * l1 + weights.l2_weight * l2
        loss = loss + weights.kl_weight * divergence / frames[0, :, 0].numel()
        size = float(len(batch))
        named = {"loss": loss, "l1": l1, "l2": l2, "kl": divergence}
        return loss, {name: (value * size, size) for name, value in named.items()}

    @torch.no_grad()
    def validate(
        self, network: Callable[..., Any], batches: Iterable[Any], samples: int
    ) -> tuple[Sums, np.ndarray | None]:
        """Error of reconstructions from the posterior mean, and a picture: clips above their reconstructions."""
        shown: list[torch.Tensor] = []
        squared = absolute = torch.zeros((), device=self.device)
        count = 0
        for batch in batches:
            frames = frames_to_float(batch.to(self.device).frames_BCTHW)
            no_noise = torch.zeros(len(batch), *self.latent_shape, device=self.device, dtype=self.dtype)
            reconstruction, _, _ = network(frames.to(self.dtype), no_noise)
            difference = reconstruction.float().clamp(-1, 1) - frames
            # PSNR counts signals of width 1, pixels here have width 2.
            squared = squared + (difference / 2).square().flatten(1).mean(1).clamp(min=1e-10).log10().mul(-10).sum()
            absolute = absolute + difference.abs().flatten(1).mean(1).sum()
            count += len(batch)
            if len(shown) < _SHOWN:
                shown += torch.stack([frames, reconstruction.float()], dim=1)[: _SHOWN - len(shown), :, :, ::2]
        picture = _picture(shown) if shown else None
        return {"psnr": (squared, float(count)), "l1": (absolute, float(count))}, picture


def _picture(pairs_2CTHW: list[torch.Tensor]) -> np.ndarray:
    """Every clip above its reconstruction, a frame a column: uint8 RGB ``[H, W, 3]``."""
    from torchvision.utils import make_grid

    frames_NCHW = rearrange(torch.stack(pairs_2CTHW), "b pair c t h w -> (b pair t) c h w")
    grid_CHW = make_grid(frames_NCHW, nrow=pairs_2CTHW[0].shape[2], padding=1, pad_value=1.0)
    return float_to_frames(grid_CHW[None, :, None])[0, 0].cpu().numpy()
