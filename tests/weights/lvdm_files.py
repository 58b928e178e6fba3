"""Tiny checkpoints in LVDM's layouts, whose weights follow the reference's formula from their names."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lvdm.config import DiffusionConfig, SpaceTimeUNetConfig, TextUNetConfig, VideoAutoencoderConfig
from lvdm.diffusion.schedules import build_schedule
from lvdm.models.build import build_model
from lvdm.weights.conversion import LazyTensor, Source
from lvdm.weights.layouts import LAYOUTS
from tests.models.formula import formula_weight

TINY: dict[str, Any] = {"model_channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "heads": 4}
AUTOENCODER = VideoAutoencoderConfig(hidden_channels=16, downsample=(2, 4, 4))
SHORT = SpaceTimeUNetConfig(**TINY, attention_levels=(1,), relative_keys="transposed")
PRED = SHORT.model_copy(update={"mask_channel": True, "noise_levels": 251})
INTERP = PRED.model_copy(update={"temporal_length": 5})
TEXT = TextUNetConfig(**TINY, attention_levels=(0, 1), context_dim=24, temporal_length=4)
IMAGE_VAE = {
    "block_out_channels": [32, 64, 32], "layers_per_block": 1, "norm_num_groups": 32, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
}  # fmt: skip
CLIP = {
    "vocab_size": 9, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1,
    "max_position_embeddings": 12,
}  # fmt: skip
MODELS = {"lvdm-short": SHORT, "lvdm-pred": PRED, "lvdm-interp": INTERP, "lvdm-t2v": TEXT, "lvdm-ae": AUTOENCODER}
PREFIXES = ("model.diffusion_model.", "first_stage_model.")


def reference_keys() -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    """Name, shape and type of every tensor of LVDM's checkpoints, from its own code."""
    text = gzip.decompress((Path(__file__).parents[1] / "fixtures" / "lvdm_keys.json.gz").read_bytes())
    return {
        layout: {name: (tuple(shape), dtype) for name, (shape, dtype) in names.items()}
        for layout, names in json.loads(text).items()
    }


def source_of(config: Any, module: nn.Module) -> Source:
    """A model of shapes alone."""
    document = config if isinstance(config, dict) else config.model_dump(mode="json")
    return Source(document, {name: LazyTensor.of(tensor) for name, tensor in module.state_dict().items()})


def sources(layout: str, main: Any, autoencoder: Any, image_vae: Mapping[str, Any], clip: Mapping[str, Any]) -> Any:
    """What an export in this layout is made of, on the meta device."""
    with torch.device("meta"):
        found = {"": source_of(main, build_model(main, seed=0))}
        if layout == "lvdm-t2v":
            from diffusers import AutoencoderKL

            found["vae"] = source_of(dict(image_vae), AutoencoderKL(**image_vae))
            text = CLIPTextModel(CLIPTextConfig(**clip)).state_dict()
            named = {name if name.startswith("text_model") else f"text_model.{name}": t for name, t in text.items()}
            found["text_encoder"] = Source(dict(clip), {name: LazyTensor.of(t) for name, t in named.items()})
        elif layout != "lvdm-ae":
            found["vae"] = source_of(autoencoder, build_model(autoencoder, seed=0))
    return found


def names_and_shapes(layout: str, main: Any, autoencoder: Any, image_vae: Any, clip: Any) -> dict[str, LazyTensor]:
    """The tensors of a file in this layout, without their values."""
    text = layout == "lvdm-t2v"
    diffusion = DiffusionConfig() if text else DiffusionConfig(beta_start=0.0015, beta_end=0.0155)
    facts = {"tables": build_schedule(diffusion).tables(), "ema_decay": 0.9999, "updates": 3}
    return LAYOUTS[layout].from_ours(sources(layout, main, autoencoder, image_vae, clip), None, {}, facts)


def tiny_file(layout: str) -> dict[str, Tensor]:
    """A tiny checkpoint; the average is by formula of the name that it averages, the live weights are others."""
    lazy = names_and_shapes(layout, MODELS[layout], AUTOENCODER, IMAGE_VAE, CLIP)
    made: dict[int, Tensor] = {}
    dotless = {"model_ema." + n.removeprefix("model.").replace(".", ""): n for n in lazy if n.startswith("model.")}
    tensors = {}
    for name, tensor in lazy.items():
        if id(tensor) not in made:
            if name in dotless:
                made[id(tensor)] = formula_weight(plain(dotless[name]), tensor.shape)
            elif tensor.dtype != torch.float32 or tensor.shape == (1000,):
                made[id(tensor)] = tensor.read()
            elif name.startswith("model.") and dotless.keys() & lazy.keys():
                made[id(tensor)] = formula_weight("live." + name, tensor.shape)
            else:
                made[id(tensor)] = formula_weight(plain(name), tensor.shape)
        tensors[name] = made[id(tensor)]
    return tensors


def plain(name: str) -> str:
    """A name without the prefix that the formula does not count."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
