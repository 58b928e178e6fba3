"""The latent diffusion task: a UNet learns to denoise the latents of a frozen VAE, given text, frames or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lvdm.config import LatentDiffusionTraining, PreviewConfig, TextUNetConfig
from lvdm.data.batch import LatentBatch, VideoBatch
from lvdm.data.latent_sets import open_latent_sets, scaling_of, shapes_of, sizes_to_read
from lvdm.data.latents import INFO_NAME
from lvdm.diffusion.denoiser import Denoiser
from lvdm.diffusion.masks import draw_given_frames
from lvdm.diffusion.objective import diffusion_loss, draw_noise, draw_timesteps, quarter_means
from lvdm.diffusion.samplers import check_sampling, default_sampler
from lvdm.errors import UserError
from lvdm.inference import VideoModel, check_scaling, frames_to_float, load_vae, read_scaling
from lvdm.models.build import build_model
from lvdm.models.frozen import FrozenTextEncoder, FrozenVAE, load_text_encoder, normalize
from lvdm.models.video_autoencoder import sample_posterior
from lvdm.randomness import Purpose, normal, seed_from_text
from lvdm.train.latent_check import check_latent_set
from lvdm.train.metrics import Sums

Batch = LatentBatch | VideoBatch
_VALIDATION_SEED = seed_from_text("validation")


@dataclass(frozen=True)
class Encoded:
    """A batch as the network sees it: scaled latents and, if it reads text, the text's states."""

    z_BCTHW: torch.Tensor
    text: dict[str, torch.Tensor | None] = field(default_factory=dict)


class LatentDiffusionTask:
    """Model, frozen parts and loss. Latents come from shards, or from videos through the frozen VAE on the fly."""

    score = "validation_ema/loss"
    """Validation that the best checkpoint goes by."""

    def __init__(self, config: LatentDiffusionTraining, device: torch.device, dtype: torch.dtype) -> None:
        """Load what the config names. Raises `UserError` where parts do not fit each other."""
        self.config = config
        self.device = device
        self.dtype = dtype
        self.notes: list[str] = []
        """What there is to say of what it loaded."""
        self._vae: FrozenVAE | None = None
        self._text: FrozenTextEncoder | None = None
        if config.data.kind == "latents":
            assert config.data.latents is not None
            sets = open_latent_sets(config.data.latents.shards)
            held_out = open_latent_sets(config.validation.shards) if config.validation.shards else []
            self.notes = check_latent_set(config, sets, held_out)
            sizes = sizes_to_read(sets, config.data.video.clip if config.data.video else None)
            self.scale, self.shift = read_scaling(config.vae, default=lambda: scaling_of(sets))
            shapes, text = shapes_of(sets, sizes), sets[0].info.text
            check_scaling((self.scale, self.shift), shapes[0][0])
            text_dim = text.dim if text else 0
        else:
            assert config.data.video is not None
            sizes = config.data.video.clip.sizes
            self._vae = load_vae(config.vae, device, dtype)
            self._text = load_text_encoder(config.text, device, dtype) if config.text else None
            self.scale, self.shift = self._vae.scale, self._vae.shift
            shapes = [self._vae.latent_shape(size.frames, size.height, size.width) for size in sizes]
            text_dim = self._text.dim if self._text else 0
        channels, frames, *sides = shapes[0]
        self.latent_shape = (channels, len(range(0, frames, config.latent_stride)), *sides)
        if self.latent_shape[0] != config.model.latent_channels:
            raise UserError(
                f"model.latent_channels {config.model.latent_channels} does not fit latents of "
                f"{self.latent_shape[0]} channels"
            )
        if isinstance(config.model, TextUNetConfig) and text_dim != config.model.context_dim:
            raise UserError(
                f"model.context_dim {config.model.context_dim} does not fit text states of {text_dim} channels"
            )
        smallest = 2**config.model.halvings
        for shape in shapes:
            if any(side % smallest for side in shape[2:]):
                raise UserError(
                    f"model halves the latent {config.model.halvings} times, but its height and width "
                    f"{tuple(shape[2:])} are not divisible by {smallest}"
                )
        if config.preview is not None:  # it decodes, and encodes its captions
            check_sampling(config.diffusion, default_sampler(config.diffusion), config.preview.steps, eta=0.0)
            self._vae = self._vae or load_vae(config.vae, device, dtype, scaling=(self.scale, self.shift))
            if config.text is not None:
                self._text = self._text or load_text_encoder(config.text, device, dtype)
        self.model = build_model(config.model, config.run.seed)

    def facts(self) -> dict[str, Any]:
        """What sampling from this run needs beyond its config; stored in checkpoints and exports."""
        scale, shift = (list(value) if isinstance(value, tuple) else value for value in (self.scale, self.shift))
        return {"scale": scale, "shift": shift, "latent_shape": list(self.latent_shape)}

    def check_facts(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on with what another scale or shift of the latents taught. Raises `UserError` naming both.

        Args:
            facts: `facts` of the run so far.
        """
        now, where = self.facts(), self.config.vae.scaling or INFO_NAME
        for name in ("scale", "shift"):
            if name in facts and facts[name] != now[name]:
                raise UserError(
                    f"the run so far had latents of {name} {facts[name]}, which {where} now gives as {now[name]}: put "
                    f"the former back, or start a new run.folder"
                )

    def frozen_parts(self) -> list[torch.nn.Module]:
        """What every rank has a copy of beside the model: the frozen VAE and text encoder, where they are needed."""
        return [part.model for part in (self._vae, self._text) if part is not None]

    def loss(self, network: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, Sums]:
        """Mean loss of a micro-batch, and what to report of it."""
        encoded = self._encode(batch, self.config.run.seed)
        t_B = draw_timesteps(self.config.run.seed, batch.positions, self.config.diffusion).to(self.device)
        loss, report = self._loss_at(network, encoded, batch.positions, t_B, self.config.run.seed)
        if isinstance(batch, VideoBatch) and self.config.text is not None:
            without = torch.tensor(float(batch.captions.count("")), device=self.device)
            report["without_text"] = (without, float(len(batch)))
        return loss, report

    @torch.no_grad()
    def validate(self, network: Callable[..., Any], batches: Iterable[Any], samples: int) -> tuple[Sums, None]:
        """Losses on held-out samples at fixed noise, their times spread evenly over the process."""
        total: Sums = {}
        for batch in batches:
            steps = (torch.tensor(batch.positions, dtype=torch.float64) + 0.5) / samples
            flow = self.config.diffusion.parameterization == "flow"
            t_B = steps.float() if flow else (steps * self.config.diffusion.timesteps).long()
            encoded = self._encode(batch, _VALIDATION_SEED)
            _, sums = self._loss_at(network, encoded, batch.positions, t_B.to(self.device), _VALIDATION_SEED)
            for name, (value, count) in sums.items():
                before, counted = total.get(name, (0.0, 0.0))
                total[name] = (before + value, counted + count)
        return total, None

    def preview(
        self,
        network: Callable[..., Any],
        preview: PreviewConfig,
        rank: int,
        world: int,
        progress: Callable[[int, int], None],
    ) -> torch.Tensor:
        """This rank's clips of ``preview.prompts``, uint8 ``BTHWC``: every ``world``-th from ``rank`` on.

        Every rank makes as many, since ZeRO-3 computes together; beyond the last prompt it starts again at the first.

        Args:
            progress: as that of `lvdm.inference.VideoModel.sample`.
        """
        assert self._vae is not None
        total = len(preview.prompts)
        mine = [(rank + turn * world) % total for turn in range(-(-total // world))]
        model = VideoModel(self.config, network, self._vae, self._text, self.latent_shape, self.device, self.dtype)
        return model.sample(
            [preview.prompts[number] for number in mine],
            seeds=mine,
            steps=preview.steps,
            guidance=preview.guidance,
            batch=self.config.batch.micro,
            progress=progress,
        )

    def _loss_at(
        self, network: Callable[..., Any], encoded: Encoded, positions: list[int], t_B: torch.Tensor, seed: int
    ) -> tuple[torch.Tensor, Sums]:
        denoiser = Denoiser(network, self.config.diffusion, self.dtype)
        shape = encoded.z_BCTHW.shape[1:]
        noise = draw_noise(seed, positions, shape).to(self.device)
        given = None
        if self.config.given is not None:
            given = draw_given_frames(seed, positions, shape[1], self.config.given).to(self.device)
        loss_B = diffusion_loss(denoiser, encoded.z_BCTHW, noise, t_B, given, **encoded.text)
        sums_4, counts_4 = quarter_means(loss_B, t_B, self.config.diffusion.timesteps)
        report: Sums = {"loss": (loss_B.detach().sum(), float(len(loss_B)))}
        report |= {f"loss_by_time/quarter_{i + 1}": (sums_4[i], counts_4[i]) for i in range(4)}
        return loss_B.mean(), report

    @torch.no_grad()
    def _encode(self, batch: Batch, seed: int) -> Encoded:
        batch = batch.to(self.device)
        text: dict[str, torch.Tensor | None] = {}
        if isinstance(batch, LatentBatch):
            moments = batch.moments_BCTHW
            states_BLD, mask_BL = batch.text_BLD, batch.text_mask_BL
        else:
            assert self._vae is not None
            moments = self._vae.encode(frames_to_float(batch.frames_BCTHW)).float()
            if self._text is not None:
                states_BLD, mask_BL = self._text.encode(batch.captions)
        if self.config.text is not None:
            text = {"text_BLD": states_BLD, "text_mask_BL": mask_BL if self.config.text.mask_padding else None}
        channels, *sides = moments.shape[1:]
        noise = torch.from_numpy(normal(seed, batch.positions, Purpose.POSTERIOR, (channels // 2, *sides)))
        z = normalize(sample_posterior(moments, noise.to(self.device)), self.scale, self.shift)
        return Encoded(z[:, :, :: self.config.latent_stride], text)
