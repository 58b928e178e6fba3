"""The frozen models around the UNet: video autoencoders and text encoders, ours and those of other libraries.

Shape letters: B batch, C channels, T frames, H height, W width, N = B * T frames of a batch, L text tokens, D channels
of a text token.

Nothing here has gradients, every result is fp32, and models of others are read from safetensors alone: a folder that
holds only pickled weights is refused. Their libraries take seconds to import, so each is imported where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn

from lvdm.config import DiffusersVAE, Scaling, TextEncoderConfig
from lvdm.errors import UserError
from lvdm.models.video_autoencoder import VideoAutoencoder
from lvdm.storage import cache_folder, forget_unused, note_use, sha256_of, write_text


class FrozenVAE(ABC):
    """A frozen autoencoder of video. The UNet sees ``scale * (z + shift)``."""

    model: Any
    """The network."""
    fingerprint: str
    """SHA-256 of the weights."""
    latent_channels: int
    frames_per_latent: int = 1
    """Frames that one frame of a latent stands for."""

    def __init__(self, scale: Scaling, shift: Scaling) -> None:
        self.scale = scale
        self.shift = shift

    @abstractmethod
    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        """Moments (mean, then log variance, along the channels) of RGB frames in -1..1; fp32."""

    @abstractmethod
    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """RGB frames, about -1..1 but not clamped, of latents that are not normalised; fp32."""

    @abstractmethod
    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """``(C, T, H, W)`` of the latent of a clip. Raises `UserError` when the clip does not fit."""

    @abstractmethod
    def limit_calls(self, frames: int, clip_frames: int) -> int:
        """Give the network at most ``frames`` frames at once, of clips of ``clip_frames``, but as many as it must have;
        how many these are."""

    def normalize(self, z_BCTHW: Tensor) -> Tensor:
        """From the autoencoder's latents to the UNet's."""
        return normalize(z_BCTHW, self.scale, self.shift)

    def denormalize(self, z_BCTHW: Tensor) -> Tensor:
        """From the UNet's latents to the autoencoder's."""
        return z_BCTHW / _along_channels(self.scale, z_BCTHW) - _along_channels(self.shift, z_BCTHW)


class OwnFrozenVAE(FrozenVAE):
    """Our video autoencoder; time and space shrink. Works through a batch a few clips at a time."""

    def __init__(
        self, model: VideoAutoencoder, *, scale: Scaling, shift: Scaling, fingerprint: str, slice_clips: int = 4
    ) -> None:
        super().__init__(scale, shift)
        self.model = freeze(model)
        self.fingerprint = fingerprint
        self.latent_channels = model.latent_channels
        self.frames_per_latent = model.downsample[0]
        self.slice_clips = slice_clips

    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        return _sliced(self.model.encode, frames_BCTHW, self.slice_clips, self.model)

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        return _sliced(self.model.decode, z_BCTHW, self.slice_clips, self.model)

    def limit_calls(self, frames: int, clip_frames: int) -> int:
        self.slice_clips = max(1, frames // clip_frames)
        return self.slice_clips * clip_frames

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        t, h, w = _divide((frames, height, width), self.model.downsample)
        return self.latent_channels, t, h, w


class DiffusersFrozenVAE(FrozenVAE):
    """A 2-D autoencoder of diffusers, which sees each frame alone, a few frames at a time."""

    def __init__(self, model: Any, *, scale: Scaling, shift: Scaling, fingerprint: str, slice_frames: int = 16) -> None:
        super().__init__(scale, shift)
        self.model = freeze(model)
        self.fingerprint = fingerprint
        self.latent_channels = int(model.config.latent_channels)
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        self.slice_frames = slice_frames

    @classmethod
    def load(
        cls,
        config: DiffusersVAE,
        device: torch.device | str,
        dtype: torch.dtype,
        scaling: tuple[Scaling, Scaling] | None = None,
    ) -> DiffusersFrozenVAE:
        """Load by folder or hub name.

        Args:
            scaling: scale and shift that override the config's.
        Raises:
            UserError: there is none, or only pickled weights.
        """
        folder, files = _find_vae(config)
        scale, shift = scaling or stated_scaling(config)
        from diffusers import AutoencoderKL
        from diffusers.utils import logging

        with _loading(folder, logging):
            model, report = AutoencoderKL.from_pretrained(
                folder, torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
        _check_complete(report["missing_keys"], folder)
        return cls(model.to(device), scale=scale, shift=shift, fingerprint=sha256_of(*files))

    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        return self._per_frame(lambda x_NCHW: self.model.encode(x_NCHW).latent_dist.parameters, frames_BCTHW)

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        return self._per_frame(lambda z_NCHW: self.model.decode(z_NCHW).sample, z_BCTHW)

    def _per_frame(self, function: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
        x_NCHW = rearrange(x_BCTHW, "b c t h w -> (b t) c h w")
        y_NCHW = _sliced(function, x_NCHW, self.slice_frames, self.model)
        return rearrange(y_NCHW, "(b t) c h w -> b c t h w", b=len(x_BCTHW)).contiguous()

    def limit_calls(self, frames: int, clip_frames: int) -> int:
        self.slice_frames = max(1, frames)
        return self.slice_frames

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        _, h, w = _divide((frames, height, width), (1, self.factor, self.factor))
        return self.latent_channels, frames, h, w


class FrozenTextEncoder:
    """A text encoder of transformers: captions in, the last layer's states out."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, max_length: int, mask_padding: bool, fingerprint: str
    ) -> None:
        self.model: Any = freeze(model)
        self.tokenizer = tokenizer
        self.dim = int(self.model.config.hidden_size)
        self.max_length = max_length
        self.mask_padding = mask_padding
        self.fingerprint = fingerprint

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States ``[B, L, D]`` in fp32 and a mask ``[B, L]``, true where cross-attention may look.

        With ``mask_padding``, L is the longest caption's length and padding is masked, in the encoder too. Without,
        as LVDM does, L is always ``max_length``, the encoder is told of no padding and the mask is all true.
        """
        tokens = self.tokenizer(
            list(captions),
            padding="longest" if self.mask_padding else "max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        ids_BL = tokens["input_ids"].to(self.model.device)
        mask_BL = tokens["attention_mask"].to(self.model.device)
        if not self.mask_padding:
            mask_BL = torch.ones_like(mask_BL)
        states_BLD = self.model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return states_BLD.float(), mask_BL.bool()


class NoText:
    """In place of a text encoder where no model reads text: one zero of one channel for every caption."""

    dim = 1
    max_length = 1
    mask_padding = True
    fingerprint = "none"

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States ``[B, 1, 1]`` and a mask ``[B, 1]``."""
        return torch.zeros(len(captions), 1, 1), torch.ones(len(captions), 1, dtype=torch.bool)


def load_text_encoder(config: TextEncoderConfig, device: torch.device | str, dtype: torch.dtype) -> FrozenTextEncoder:
    """Load a text encoder and its tokenizer by folder, hub name or ``package:NAME/PATH``.

    Raises:
        UserError: there is none, it has only pickled weights, or it takes fewer tokens than ``max_length``.
    """
    folder, files = _find_text_encoder(config)
    import transformers
    from transformers.utils import logging

    with _loading(folder, logging):
        described = transformers.AutoConfig.from_pretrained(folder)
        loader = getattr(transformers, _TEXT_TOWERS.get(described.model_type, "AutoModel"))
        model, report = loader.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    _check_complete(report["missing_keys"], folder)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise UserError(f"text.max_length {config.max_length} exceeds the {positions} tokens that {config.name} takes")

    tokenizer_folder = folder.parent / "tokenizer" if config.subfolder else folder
    with _loading(tokenizer_folder, logging):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer in {tokenizer_folder} has no padding token, so captions cannot be batched")
    return FrozenTextEncoder(
        model.to(device),
        tokenizer,
        max_length=config.max_length,
        mask_padding=config.mask_padding,
        fingerprint=sha256_of(*files),
    )


def normalize(z_BCTHW: Tensor, scale: Scaling, shift: Scaling) -> Tensor:
    """``scale * (z + shift)``, each one for all channels or one a channel."""
    return _along_channels(scale, z_BCTHW) * (z_BCTHW + _along_channels(shift, z_BCTHW))


def _along_channels(value: Scaling, z_BCTHW: Tensor) -> float | Tensor:
    if not isinstance(value, tuple):
        return value
    return torch.tensor(value, dtype=z_BCTHW.dtype, device=z_BCTHW.device)[:, None, None, None]


def stated_scaling(config: DiffusersVAE) -> tuple[float, float]:
    """Scale and shift of a config that names no file of them: its own, else Stable Diffusion's."""
    return (0.18215 if config.scale is None else config.scale), config.shift or 0.0


def known_fingerprint(config: DiffusersVAE | TextEncoderConfig) -> str:
    """The fingerprint of a model's weights, without loading them.

    Raises:
        UserError: it is not on this machine, or has only pickled weights.
    """
    found = _find_vae(config, here=True) if isinstance(config, DiffusersVAE) else _find_text_encoder(config, here=True)
    return kept_fingerprint(*found[1])


def kept_fingerprint(*files: Path) -> str:
    """SHA-256 of files one after the other; the node keeps those of files that it has read before."""
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    kept = cache_folder("fingerprints") / hashlib.sha256(json.dumps(states).encode()).hexdigest()[:32]
    if kept.is_file():
        note_use(kept)
        return kept.read_text(encoding="utf-8")
    forget_unused(kept.parent)
    fingerprint = sha256_of(*files)
    write_text(kept, fingerprint)
    return fingerprint


def _find_vae(config: DiffusersVAE, here: bool = False) -> tuple[Path, list[Path]]:
    """The folder and the weights of a VAE of diffusers. Raises `UserError`."""
    folder = find_model(config.name, config.subfolder, _within(config.subfolder, _DIFFUSERS_FILES), here)
    return folder, weight_files(folder, "diffusion_pytorch_model")


def _find_text_encoder(config: TextEncoderConfig, here: bool = False) -> tuple[Path, list[Path]]:
    """The folder and the weights of a text encoder. Raises `UserError`."""
    files = _within(config.subfolder, _TRANSFORMERS_FILES)
    files += _within("tokenizer" if config.subfolder else "", TOKENIZER_FILES)
    folder = find_model(config.name, config.subfolder, files, here)
    return folder, weight_files(folder, "model")


# The text half of models that have another half; of all else transformers' AutoModel is the text encoder.
_TEXT_TOWERS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
_TRANSFORMERS_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)
_DIFFUSERS_FILES = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model-*-of-*.safetensors",
)


def _within(subfolder: str, files: Sequence[str]) -> list[str]:
    return [f"{subfolder}/{file}" if subfolder else file for file in files]


def find_model(name: str, subfolder: str, files: Sequence[str], here: bool = False) -> Path:
    """The local folder of a model named by folder, by ``package:NAME/PATH`` or by hub name.

    Of a hub model only ``files`` (names or patterns, from its root) are fetched, once; later calls need no network.

    Args:
        here: whether it must be on this machine already, so that nothing is fetched.
    Raises:
        UserError: there is no such folder, package or hub model, or the hub cannot be reached.
    """
    if name.startswith("package:"):
        root = _package_folder(name)
    elif Path(name).expanduser().is_dir():
        root = Path(name).expanduser()
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no model folder {name}")
    else:
        from huggingface_hub import snapshot_download

        try:
            root = Path(snapshot_download(name, allow_patterns=list(files), local_files_only=here))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{name} is neither a folder nor to be had from the model hub ({_one_line(error)}); "
                "download it and give its folder"
            ) from None
    folder = (root / subfolder).resolve()
    if not folder.is_relative_to(root.resolve()):
        raise UserError(f"subfolder {subfolder} lies outside of {name}")
    if not folder.is_dir():
        raise UserError(f"no folder {subfolder} in {root}")
    return folder


def _package_folder(name: str) -> Path:
    package, _, path = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name}: no Python package {package!r} is installed")
    root = Path(spec.submodule_search_locations[0]).resolve()
    folder = (root / path).resolve()
    if not folder.is_relative_to(root) or not folder.is_dir():
        raise UserError(f"{name}: the package has no folder {path!r}")
    return folder


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors file(s) of a model, in order. Raises `UserError` when there are none."""
    whole = folder / f"{stem}.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if files:
        return files
    pickled = [path.name for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    if pickled:
        raise UserError(
            f"{folder} has its weights only as a pickle ({pickled[0]}), which is never read; "
            "convert them to safetensors"
        )
    raise UserError(f"no weights in {folder}: {whole.name} is missing")


def freeze(model: Any) -> Any:
    """The model without gradients and in evaluation mode."""
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _sliced(function: Callable[[Tensor], Tensor], x: Tensor, size: int, model: nn.Module) -> Tensor:
    """``function`` of slices of a batch, in the model's type and on its device; fp32."""
    weight = next(model.parameters())
    parts = [function(part.to(weight.device, weight.dtype)).float() for part in x.split(size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _divide(size: tuple[int, int, int], factors: tuple[int, ...]) -> tuple[int, ...]:
    if any(axis % factor for axis, factor in zip(size, factors, strict=True)):
        raise UserError(
            f"clips of frames x height x width {size} do not fit the autoencoder: each must be a multiple of {factors}"
        )
    return tuple(axis // factor for axis, factor in zip(size, factors, strict=True))


def _check_complete(missing: Sequence[str], folder: Path) -> None:
    """The libraries would fill missing tensors with random numbers. A pooler is not used, so may be missing."""
    absent = sorted(name for name in missing if not name.startswith("pooler."))
    if absent:
        raise UserError(
            f"the weights in {folder} lack {len(absent)} tensors that its config.json asks for, such as {absent[0]}"
        )


@contextlib.contextmanager
def _loading(folder: Path, logging: Any) -> Iterator[None]:
    """Load from ``folder`` silently; what the library raises about it becomes a `UserError` of one line.

    Args:
        logging: the module with which the library sets its verbosity.
    """
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"cannot load the model in {folder}: {_one_line(error)}") from None
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
