"""Names of Stable Diffusion 1.x's autoencoder and text encoder: CompVis's against those of diffusers and transformers.

LVDM's text-to-video checkpoint holds both, as Stable Diffusion's own do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lvdm.weights.conversion import Component, Entry, Mismatch, Shapes

_RES = [("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2")]
_ATTENTION = [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")]
_ENDS = [("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")]
_LAYER = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2",
    "mlp.fc1", "mlp.fc2",
]  # fmt: skip


def vae_entries(config: Mapping[str, Any], prefix: str) -> list[Entry]:
    """Names of a 2-D KL autoencoder, diffusers' first; CompVis's decoder counts its levels the other way round."""
    return list(_vae(list(config["block_out_channels"]), int(config["layers_per_block"]), prefix))


def _vae(widths: list[int], layers: int, prefix: str) -> Iterator[Entry]:
    def both(ours: str, theirs: str, ones: tuple[int, ...] = ()) -> Iterator[Entry]:
        yield Entry(f"{ours}.weight", f"{prefix}{theirs}.weight", ones)
        yield Entry(f"{ours}.bias", f"{prefix}{theirs}.bias")

    def res(ours: str, theirs: str, changes: bool) -> Iterator[Entry]:
        for here, there in [*_RES, *([("conv_shortcut", "nin_shortcut")] if changes else [])]:
            yield from both(f"{ours}.{here}", f"{theirs}.{there}")

    for half in ("encoder", "decoder"):
        for here, there in _ENDS:
            yield from both(f"{half}.{here}", f"{half}.{there}")
        for i in (0, 1):
            yield from res(f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}", changes=False)
        for here, there in _ATTENTION:
            ones = () if here == "group_norm" else (2, 3)  # linear here, convolutions of one pixel there
            yield from both(f"{half}.mid_block.attentions.0.{here}", f"{half}.mid.attn_1.{there}", ones)
    top = len(widths) - 1
    for level, width in enumerate(widths):
        before = widths[max(0, level - 1)]
        for j in range(layers):
            changes = j == 0 and before != width
            yield from res(f"encoder.down_blocks.{level}.resnets.{j}", f"encoder.down.{level}.block.{j}", changes)
        if level < top:
            yield from both(f"encoder.down_blocks.{level}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv")
        above = widths[min(top, level + 1)]
        for j in range(layers + 1):
            ours = f"decoder.up_blocks.{top - level}.resnets.{j}"
            yield from res(ours, f"decoder.up.{level}.block.{j}", changes=j == 0 and above != width)
        if level > 0:
            yield from both(f"decoder.up_blocks.{top - level}.upsamplers.0.conv", f"decoder.up.{level}.upsample.conv")
    yield from both("quant_conv", "quant_conv")
    yield from both("post_quant_conv", "post_quant_conv")


def vae_component(shapes: Shapes, prefix: str) -> Component:
    """The autoencoder whose names and shapes these are, as a folder of diffusers. Raises `Mismatch`."""
    widths: list[int] = []
    while (name := f"{prefix}encoder.down.{len(widths)}.block.0.conv1.weight") in shapes:
        widths.append(shapes[name][0])
    latent = shapes.get(f"{prefix}post_quant_conv.weight")
    if not widths or latent is None:
        raise Mismatch(f"1 missing ({prefix}{'post_quant_conv.weight' if widths else 'encoder.down.0.block.0.conv1'})")
    layers = 0
    while f"{prefix}encoder.down.0.block.{layers}.conv1.weight" in shapes:
        layers += 1
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "in_channels": 3,
        "latent_channels": latent[0],
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    return Component("diffusers", config, vae_entries(config, prefix))


def clip_entries(config: Mapping[str, Any], prefix: str) -> list[Entry]:
    """Names of CLIP's text encoder, which are the same but for a prefix."""
    names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    for layer in range(config["num_hidden_layers"]):
        names += [f"encoder.layers.{layer}.{part}.{leaf}" for part in _LAYER for leaf in ("weight", "bias")]
    names += ["final_layer_norm.weight", "final_layer_norm.bias"]
    return [Entry(f"text_model.{name}", f"{prefix}text_model.{name}") for name in names]


def position_ids(prefix: str) -> str:
    """Name of the buffer 0, 1, ... that older versions of transformers stored with CLIP."""
    return f"{prefix}text_model.embeddings.position_ids"


def clip_component(shapes: Shapes, prefix: str) -> Component:
    """The text encoder whose names and shapes these are, as a folder of transformers. Raises `Mismatch`."""
    start = f"{prefix}text_model."
    wanted = [f"{start}embeddings.{name}_embedding.weight" for name in ("token", "position")]
    wanted.append(f"{start}encoder.layers.0.mlp.fc1.weight")
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise Mismatch(f"{len(missing)} missing ({', '.join(missing)})")
    vocabulary, width = shapes[wanted[0]]
    layers = 0
    while f"{start}encoder.layers.{layers}.mlp.fc1.weight" in shapes:
        layers += 1
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "intermediate_size": shapes[wanted[2]][0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": shapes[wanted[1]][0],
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": layers,
        "projection_dim": width,
        "vocab_size": vocabulary,
    }
    return Component("transformers", config, clip_entries(config, prefix))
