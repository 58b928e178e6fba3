"""Use what training exported: load a folder, sample from it.

import lvdm
model = lvdm.load("exports/quickstart")
clips_BTHWC = model.sample(["a red circle moves left"], seeds=[0])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lvdm.config import (
    DiffusersVAE,
    LatentDiffusionTraining,
    ModelScopeUNetConfig,
    OwnVAE,
    Scaling,
    SpaceTimeUNetConfig,
    TextUNetConfig,
    VAEConfig,
    VideoAutoencoderConfig,
    parse_config,
    parse_training_config,
)
from lvdm.diffusion.denoiser import Denoiser
from lvdm.diffusion.guidance import classifier_free_guidance
from lvdm.diffusion.samplers import Sampler, check_sampling, default_sampler, initial_noise
from lvdm.diffusion.samplers import sample as run_sampler
from lvdm.errors import UserError
from lvdm.models.build import build_model
from lvdm.models.frozen import (
    DiffusersFrozenVAE,
    FrozenTextEncoder,
    FrozenVAE,
    OwnFrozenVAE,
    load_text_encoder,
    stated_scaling,
)
from lvdm.models.video_autoencoder import VideoAutoencoder
from lvdm.storage import local_folder, sha256_of
from lvdm.weights.native import CONFIG_FILE, load_into, read_model, weight_files

VAE_FOLDER = "vae"
"""Where an export carries its own autoencoder."""
TEXT_FOLDER = "text_encoder"
"""Where an import carries the text encoder that came with it."""
TOKENIZER_FOLDER = "tokenizer"
"""Where the tokenizer of that text encoder is."""
_UNETS: dict[str, type[TextUNetConfig] | type[ModelScopeUNetConfig] | type[SpaceTimeUNetConfig]] = {
    "text_unet": TextUNetConfig,
    "modelscope_unet": ModelScopeUNetConfig,
    "space_time_unet": SpaceTimeUNetConfig,
}


def frames_to_float(frames_BCTHW: torch.Tensor) -> torch.Tensor:
    """uint8 frames as fp32 in -1..1."""
    return frames_BCTHW.float() / 127.5 - 1


def float_to_frames(frames_BCTHW: torch.Tensor) -> torch.Tensor:
    """Frames in -1..1 as uint8 ``BTHWC``, truncated like LVDM's."""
    return ((frames_BCTHW.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def own_vae_weights(config: OwnVAE) -> list[Path]:
    """The weights files of an exported autoencoder. Raises `UserError` if there are none."""
    files = weight_files(config.folder)
    for file in files:
        if not file.is_file():
            raise UserError(f"vae.folder {config.folder} holds no exported autoencoder ({file.name} is missing)")
    return files


def read_scaling(
    config: VAEConfig, default: Callable[[], tuple[Scaling, Scaling]] | None = None
) -> tuple[Scaling, Scaling]:
    """Scale and shift of the latents of a VAE: the UNet sees ``scale * (latent + shift)``.

    Args:
        default: tells what holds where the config says nothing of them.
    Raises:
        UserError: the file that it names gives none.
    """
    if config.scaling:
        try:
            return scaling_from(json.loads(Path(config.scaling).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"vae.scaling {config.scaling} gives no scale and shift: {error}") from None
    stated = isinstance(config, DiffusersVAE) and (config.scale is not None or config.shift is not None)
    if default is not None and not stated:
        return default()
    return stated_scaling(config) if isinstance(config, DiffusersVAE) else (1.0, 0.0)


def scaling_from(tree: Mapping[str, Any]) -> tuple[Scaling, Scaling]:
    """``scale`` and ``shift`` as JSON has them: numbers, or lists of one a channel.

    Raises:
        KeyError, TypeError, ValueError: there are none.
    """
    scale, shift = (
        tuple(float(part) for part in value) if isinstance(value, list) else float(value)
        for value in (tree["scale"], tree["shift"])
    )
    return scale, shift


def load_vae(
    config: VAEConfig, device: torch.device, dtype: torch.dtype, scaling: tuple[Scaling, Scaling] | None = None
) -> FrozenVAE:
    """The frozen VAE that a config names, ready on ``device``.

    Args:
        scaling: scale and shift that override the config's.
    Raises:
        UserError: it cannot be found or read, is no autoencoder, or has other channels than its scale and shift.
    """
    scaling = scaling or read_scaling(config)
    vae = (
        _load_own_vae(config, device, dtype, scaling)
        if isinstance(config, OwnVAE)
        else DiffusersFrozenVAE.load(config, device, dtype, scaling)
    )
    check_scaling(scaling, vae.latent_channels)
    return vae


def check_scaling(scaling: tuple[Scaling, Scaling], channels: int) -> None:
    """Refuse a scale or shift a channel for latents of another number of channels. Raises `UserError`."""
    for name, value in zip(("scale", "shift"), scaling, strict=True):
        if isinstance(value, tuple) and len(value) != channels:
            raise UserError(f"the {name} of the VAE has {len(value)} values, but its latents have {channels} channels")


def _load_own_vae(
    config: OwnVAE, device: torch.device, dtype: torch.dtype, scaling: tuple[Scaling, Scaling]
) -> FrozenVAE:
    weights = own_vae_weights(config)
    model_config = read_model(config.folder)[0]["model"]
    if model_config.get("kind") != "video_autoencoder":
        raise UserError(f"vae.folder {config.folder} holds a {model_config.get('kind')}, not a video_autoencoder")
    model = build_model(parse_config(VideoAutoencoderConfig, model_config, source=config.folder), seed=0)
    assert isinstance(model, VideoAutoencoder)
    load_into(model, config.folder)
    scale, shift = scaling
    return OwnFrozenVAE(model.to(device, dtype), scale=scale, shift=shift, fingerprint=sha256_of(*weights))


class VideoModel:
    """A model that makes videos, with its autoencoder and, if it reads text, its text encoder."""

    def __init__(
        self,
        config: LatentDiffusionTraining,
        network: Callable[..., torch.Tensor],
        vae: FrozenVAE,
        text: FrozenTextEncoder | None,
        latent_shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.network = network
        self.vae = vae
        self.text = text
        self.latent_shape = latent_shape
        self.device = device
        self.dtype = dtype

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | str = "",
        seeds: Sequence[int] | int = 0,
        frames: int | None = None,
        steps: int = 50,
        guidance: float = 7.5,
        sampler: Sampler | None = None,
        eta: float = 0.0,
        batch: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Sample one clip a prompt.

        Args:
            prompts: captions; empty ones for a model that reads no text.
            negative_prompts: what guidance leads away from, one a prompt or one for all; empty captions by default.
            seeds: one a prompt, or the first one's, from which the others count up; a clip depends on its own prompt
                and seed alone, up to rounding.
            frames: length of the clips, a multiple of what the autoencoder squeezes into one latent frame; by default
                that of training, beyond which quality falls.
            steps: sampler steps.
            guidance: classifier-free guidance scale, 1 for none; a model that reads no text has none.
            sampler: see `lvdm.diffusion.samplers.sample`; by default ``ddim``, for flow ``flow_euler``.
            eta: noise of DDIM, 0 (deterministic) to 1.
            batch: clips sampled at once.
            progress: called with (done, total) network steps.
        Returns:
            uint8 ``BTHWC`` on the CPU.
        Raises:
            UserError: the sampler, its steps, eta or the frames do not fit the model, there is a caption for a model
                that reads none, the numbers of prompts and seeds differ, or there is no prompt.
        """
        if isinstance(prompts, str) or not prompts or batch < 1:
            raise UserError(f"give a list of at least one prompt, and a batch of at least 1: {prompts!r}, {batch}")
        sampler = sampler or default_sampler(self.config.diffusion)
        negatives = [negative_prompts] * len(prompts) if isinstance(negative_prompts, str) else list(negative_prompts)
        seeds = range(seeds, seeds + len(prompts)) if isinstance(seeds, int) else seeds
        if self.text is None and any([*prompts, *negatives]):
            raise UserError("this model was trained without text, so it takes no captions")
        check_sampling(self.config.diffusion, sampler, steps, eta)
        for name, given in {"seeds": seeds, "negative prompts": negatives}.items():
            if len(given) != len(prompts):
                raise UserError(f"{len(prompts)} prompts need as many {name}, not {len(given)}")
        shape = self.latent_shape if frames is None else self._shape_of(frames)
        denoiser = Denoiser(self.network, self.config.diffusion, self.dtype)
        clips = []
        starts = range(0, len(prompts), batch)
        for number, start in enumerate(starts):
            part = slice(start, start + batch)
            denoise = classifier_free_guidance(
                denoiser,
                self._condition(prompts[part]),
                self._condition(negatives[part]),
                scale=guidance if self.text else 1.0,
            )

            def report(done: int, total: int, number: int = number) -> None:
                if progress:
                    progress(number * total + done, len(starts) * total)

            z = run_sampler(
                denoise,
                initial_noise(seeds[part], shape, self.device),
                config=self.config.diffusion,
                sampler=sampler,
                steps=steps,
                seeds=seeds[part],
                eta=eta,
                progress=report,
            )
            clips.append(float_to_frames(self.vae.decode(self.vae.denormalize(z).to(self.dtype))).cpu())
        return torch.cat(clips)

    def _shape_of(self, frames: int) -> tuple[int, ...]:
        """The latent's shape for clips of so many frames. Raises `UserError`."""
        factor, stride = self.vae.frames_per_latent, self.config.latent_stride
        if frames < 1 or frames % (factor * stride):
            raise UserError(f"frames={frames}: give a multiple of {factor * stride}, the frames of one latent frame")
        channels, _, *sides = self.latent_shape
        return channels, frames // (factor * stride), *sides

    def _condition(self, captions: Sequence[str]) -> dict[str, torch.Tensor | None]:
        if self.text is None:
            return {}
        states, mask = self.text.encode(list(captions))
        return {"text_BLD": states, "text_mask_BL": mask if self.text.mask_padding else None}


def load(folder_or_url: str | Path, device: str | torch.device = "", dtype: torch.dtype = torch.float32) -> VideoModel:
    """Load an exported folder to sample from.

    Args:
        folder_or_url: written by ``tools/export_checkpoint.py``; a folder or any fsspec URL of one, such as s3:// or gs://.
        device: by default the GPU if there is one.
    Raises:
        UserError: the folder, its autoencoder or its text encoder cannot be read.
    """
    with local_folder(str(folder_or_url)) as folder:
        return _load(folder, device, dtype)


def _load(folder: Path, device: str | torch.device, dtype: torch.dtype) -> VideoModel:
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tree, _ = read_model(folder)
    kind = tree["model"].get("kind")
    if kind not in _UNETS:
        raise UserError(f"{folder} holds a {kind}; sampling needs one of {', '.join(_UNETS)}")
    if not tree.get("training"):
        raise UserError(
            f"{folder} was imported without the models to sample with ({VAE_FOLDER}, {TEXT_FOLDER}, "
            f"{TOKENIZER_FOLDER}); import the whole pipeline, or train from it with run.init_from"
        )
    config = parse_training_config(tree["training"], source=str(folder))
    assert isinstance(config, LatentDiffusionTraining)
    latent_shape, scaling = _facts_of(folder, tree)
    network = build_model(parse_config(_UNETS[kind], tree["model"], source=str(folder)), seed=0)
    load_into(network, folder)
    if config.given is not None:
        raise UserError(
            f"{folder} holds a model of given frames (prediction, interpolation), which needs some to go on"
        )
    vae_config, text_config = config.vae, config.text
    if (folder / VAE_FOLDER).is_dir():
        own = isinstance(vae_config, OwnVAE)
        place = {"folder": str(folder / VAE_FOLDER)} if own else {"name": str(folder), "subfolder": VAE_FOLDER}
        vae_config = vae_config.model_copy(update=place)
    if text_config is not None and (folder / TEXT_FOLDER).is_dir():
        text_config = text_config.model_copy(update={"name": str(folder), "subfolder": TEXT_FOLDER})
    vae = load_vae(vae_config, where, dtype, scaling=scaling)
    text = load_text_encoder(text_config, where, dtype) if text_config else None
    network.to(where, dtype).eval()
    return VideoModel(config, network, vae, text, latent_shape, where, dtype)


def _facts_of(folder: Path, document: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[Scaling, Scaling]]:
    """Shape of the latents, and their scale and shift. Raises `UserError` where an export does not tell."""
    try:
        facts = document["facts"]
        channels, frames, height, width = map(int, facts["latent_shape"])
        return (channels, frames, height, width), scaling_from(facts)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder / CONFIG_FILE} does not say of which shape, scale and shift the latents are (facts); let "
            f"training go on from its checkpoint until the next one, which knows, and export that"
        ) from None
