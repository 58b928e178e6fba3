"""LVDM's names (YingqingHe/LVDM) of the tensors of its networks and losses, and what they tell of a model's config.

Names are data: tables of (our name, LVDM's name, leaves, axes of length one that LVDM's weight has more), put under
the prefixes that a config's structure gives. What a file holds is read off its names and shapes.

LVDM's moving average keeps each tensor under a name without dots, which cannot be undone; names are matched forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lvdm.weights.conversion import Entry, LazyTensor, Mismatch, Shapes

Row = tuple[str, str, tuple[str, ...], tuple[int, ...]]
_WEIGHT, _BOTH, _ITSELF = ("weight",), ("weight", "bias"), ("",)
_CONV = (2,)  # LVDM's kernels over space have an axis of length one for time

_RES: list[Row] = [
    ("norm1", "in_layers.0", _BOTH, ()),
    ("conv1", "in_layers.2", _BOTH, _CONV),
    ("embed", "emb_layers.1", _BOTH, ()),
    ("norm2", "out_layers.0", _BOTH, ()),
    ("conv2", "out_layers.3", _BOTH, _CONV),
]
_SKIP: list[Row] = [("skip", "skip_connection", _BOTH, _CONV)]
_SPACE_TIME: list[Row] = [
    ("norm_space", "norm_s", _BOTH, ()),
    ("qkv_space", "qkv_s", _BOTH, (2,)),
    ("out_space", "proj_out_s", _BOTH, (2,)),
    ("norm_time", "norm_t", _BOTH, ()),
    ("qkv_time", "qkv_t", _BOTH, (2,)),
    ("relative_k", "relative_position_k.embeddings_table", _ITSELF, ()),
    ("relative_v", "relative_position_v.embeddings_table", _ITSELF, ()),
    ("out_time", "proj_out_t", _BOTH, (2,)),
]
_TRANSFORMER: list[Row] = [
    ("norm", "norm", _BOTH, ()),
    ("proj_in", "proj_in", _BOTH, (2, 3, 4)),
    ("proj_out", "proj_out", _BOTH, (2, 3, 4)),
]
_ATTENTION: list[Row] = [
    ("to_q", "to_q", _WEIGHT, ()),
    ("to_k", "to_k", _WEIGHT, ()),
    ("to_v", "to_v", _WEIGHT, ()),
    ("to_out", "to_out.0", _BOTH, ()),
]
_RELATIVE: list[Row] = [
    ("relative_k", "relative_position_k.embeddings_table", _ITSELF, ()),
    ("relative_v", "relative_position_v.embeddings_table", _ITSELF, ()),
]
_BLOCK_PARTS: list[tuple[str, str, bool]] = [  # attention of a transformer block, and whether it is over time
    ("attn_space", "attn1", False),
    ("attn_text", "attn2", False),
    ("attn_time1", "attn1_tmp", True),
    ("attn_time2", "attn2_tmp", True),
]
_BLOCK: list[Row] = [
    ("norm_space", "norm1", _BOTH, ()),
    ("norm_text", "norm2", _BOTH, ()),
    ("norm_ff", "norm3", _BOTH, ()),
    ("norm_time1", "norm4", _BOTH, ()),
    ("norm_time2", "norm5", _BOTH, ()),
    ("ff.proj_in", "ff.net.0.proj", _BOTH, ()),
    ("ff.proj_out", "ff.net.2", _BOTH, ()),
]
_ENDS: list[Row] = [
    ("time_embed.0", "time_embed.0", _BOTH, ()),
    ("time_embed.2", "time_embed.2", _BOTH, ()),
    ("input_blocks.0.conv", "input_blocks.0.0", _BOTH, _CONV),
    ("norm_out", "out.0", _BOTH, ()),
    ("conv_out", "out.2", _BOTH, _CONV),
]

UNET, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."
TEXT = "cond_stage_model.transformer."
EMA_STATE = ("model_ema.decay", "model_ema.num_updates")
TABLES = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip


def _rows(ours: str, theirs: str, table: Sequence[Row]) -> Iterator[Entry]:
    for here, there, leaves, ones in table:
        for leaf in leaves:
            end = f".{leaf}" if leaf else ""
            yield Entry(f"{ours}{here}{end}", f"{theirs}{there}{end}", () if leaf == "bias" else ones)


def unet_entries(config: Mapping[str, Any], prefix: str = UNET) -> list[Entry]:
    """Names of a ``text_unet`` or ``space_time_unet``, ours and LVDM's, in the order of the constructors."""
    entries = list(_rows("", prefix, _ENDS))
    if config.get("noise_levels"):
        entries.append(Entry("level_embed.weight", f"{prefix}label_emb.weight"))
    multiples = list(config["channel_mult"])

    def res(ours: str, theirs: str, changes: bool) -> None:
        entries.extend(_rows(f"{ours}.res.", f"{prefix}{theirs}.", _RES + (_SKIP if changes else [])))

    def attention(ours: str, theirs: str) -> None:
        ours, theirs = f"{ours}.transformer.", f"{prefix}{theirs}."
        if config["kind"] == "space_time_unet":
            entries.extend(_rows(ours, theirs, _SPACE_TIME))
            return
        entries.extend(_rows(ours, theirs, _TRANSFORMER))
        for depth in range(config["transformer_depth"]):
            block, their_block = f"{ours}blocks.{depth}.", f"{theirs}transformer_blocks.{depth}."
            entries.extend(_rows(block, their_block, _BLOCK))
            for here, there, over_time in _BLOCK_PARTS:
                table = _ATTENTION + (_RELATIVE if over_time and config["relative_position"] else [])
                entries.extend(_rows(f"{block}{here}.", f"{their_block}{there}.", table))

    channels, index = 1, 1
    for level, multiple in enumerate(multiples):
        for _ in range(config["res_blocks"]):
            res(f"input_blocks.{index}", f"input_blocks.{index}.0", changes=channels != multiple)
            if level in config["attention_levels"]:
                attention(f"input_blocks.{index}", f"input_blocks.{index}.1")
            channels = multiple
            index += 1
        if level < len(multiples) - 1:
            down: list[Row] = [("conv", "0.op", _BOTH, _CONV)]
            entries.extend(_rows(f"input_blocks.{index}.", f"{prefix}input_blocks.{index}.", down))
            index += 1
    res("middle_blocks.0", "middle_block.0", changes=False)
    attention("middle_blocks.0", "middle_block.1")
    res("middle_blocks.1", "middle_block.2", changes=False)
    index = 0
    for level in reversed(range(len(multiples))):
        for i in range(config["res_blocks"] + 1):
            res(f"output_blocks.{index}", f"output_blocks.{index}.0", changes=True)  # a skip joins in
            attended = level in config["attention_levels"]
            if attended:
                attention(f"output_blocks.{index}", f"output_blocks.{index}.1")
            if level > 0 and i == config["res_blocks"]:
                up: list[Row] = [("conv", f"{1 + attended}.conv", _BOTH, _CONV)]
                entries.extend(_rows(f"output_blocks.{index}.", f"{prefix}output_blocks.{index}.", up))
            index += 1
    return entries


def ema_name(name: str) -> str:
    """LVDM's name of the average of ``model.NAME``."""
    return EMA + name.removeprefix("model.").replace(".", "")


def unet_config(shapes: Shapes, prefix: str = UNET) -> dict[str, Any]:
    """The config of the UNet whose names and shapes these are. Raises `Mismatch` where there is none."""

    def shape(name: str) -> tuple[int, ...]:
        if prefix + name not in shapes:
            raise Mismatch(f"1 missing ({prefix}{name})")
        return shapes[prefix + name]

    def has(name: str) -> bool:
        return prefix + name in shapes

    text = has("middle_block.1.proj_in.weight")
    width, inputs = shape("input_blocks.0.0.weight")[:2]
    multiples: list[int] = []
    blocks, attended, index = 0, set(), 1
    while has(f"input_blocks.{index}.0.in_layers.0.weight") or has(f"input_blocks.{index}.0.op.weight"):
        if has(f"input_blocks.{index}.0.op.weight"):
            blocks = 0
        else:
            if blocks == 0:
                multiples.append(shape(f"input_blocks.{index}.0.out_layers.0.weight")[0] // width)
            blocks += 1
            if has(f"input_blocks.{index}.1.{'proj_in' if text else 'qkv_s'}.weight"):
                attended.add(len(multiples) - 1)
        index += 1
    if not blocks:
        raise Mismatch(f"1 missing ({prefix}input_blocks.1.0.in_layers.0.weight)")
    config: dict[str, Any] = {
        "kind": "text_unet" if text else "space_time_unet",
        "latent_channels": shape("out.2.weight")[0],
        "model_channels": width,
        "channel_mult": multiples,
        "res_blocks": blocks,
        "attention_levels": sorted(attended),
    }
    middle = multiples[-1] * width
    if text:
        block = "middle_block.1.transformer_blocks."
        table = f"{block}0.attn1_tmp.relative_position_k.embeddings_table"
        config["relative_position"] = has(table)
        depth = 0
        while has(f"{block}{depth}.norm1.weight"):
            depth += 1
        config["transformer_depth"] = depth
        config["context_dim"] = shape(f"{block}0.attn2.to_k.weight")[1]
        rows, head = shape(table) if has(table) else (33, middle // 8)
    else:
        rows, head = shape("middle_block.1.relative_position_k.embeddings_table")
        config["relative_keys"] = "transposed"
        config["mask_channel"] = inputs == config["latent_channels"] + 1
        config["noise_levels"] = shape("label_emb.weight")[0] if has("label_emb.weight") else 0
    config["heads"] = max(1, middle // head)
    config["temporal_length"] = rows // 2
    return config


def autoencoder_config(shapes: Shapes, prefix: str = "") -> dict[str, Any]:
    """The config of the video autoencoder whose names and shapes these are. Raises `Mismatch` where there is none.

    Strides leave no trace in the weights: space is taken to shrink at every block, time at all but the last.
    """
    first, last = f"{prefix}encoder.conv_first.weight", f"{prefix}post_quant_conv.weight"
    for name in (first, last):
        if name not in shapes:
            raise Mismatch(f"1 missing ({name})")
    blocks = 0
    while f"{prefix}encoder.conv_blocks.{blocks}.down.weight" in shapes:
        blocks += 1
    return {
        "kind": "video_autoencoder",
        "hidden_channels": shapes[first][0],
        "downsample": [2 ** max(0, blocks - 1), 2**blocks, 2**blocks],
        "latent_channels": shapes[last][0],
    }


_PADDED: list[Row] = [("", "", _WEIGHT, ()), ("", ".conv", ("bias",), ())]


def autoencoder_entries(config: Mapping[str, Any], prefix: str = "") -> tuple[list[Entry], dict[str, str]]:
    """Names of a video autoencoder, ours and LVDM's, and the second names of its padded convolutions' weights."""
    entries: list[Entry] = []
    aliases: dict[str, str] = {}

    def conv(ours: str, theirs: str) -> None:
        entries.extend(_rows(ours, prefix + theirs, _PADDED))
        aliases[f"{prefix}{theirs}.conv.weight"] = f"{prefix}{theirs}.weight"

    def norm(ours: str, theirs: str) -> None:
        entries.extend(_rows(ours, prefix + theirs, [("", "", _BOTH, ())]))

    def res(ours: str, theirs: str) -> None:
        for i in (1, 2):
            norm(f"{ours}.norm{i}", f"{theirs}.norm{i}")
            conv(f"{ours}.conv{i}", f"{theirs}.conv{i}")

    conv("encoder.conv_in", "encoder.conv_first")
    for i in range(max(config["downsample"]).bit_length() - 1):
        conv(f"encoder.blocks.{i}.down", f"encoder.conv_blocks.{i}.down")
        res(f"encoder.blocks.{i}.res", f"encoder.conv_blocks.{i}.res")
        norm(f"decoder.blocks.{i}.up", f"decoder.conv_blocks.{i}.up.convt")
        for j in (1, 2):
            res(f"decoder.blocks.{i}.res{j}", f"decoder.conv_blocks.{i}.res{j}")
    norm("encoder.norm_out", "encoder.final_block.0")
    conv("encoder.conv_out", "encoder.final_block.2")
    conv("decoder.conv_out", "decoder.conv_out")
    conv("quant_conv", "quant_conv")
    conv("post_quant_conv", "post_quant_conv")
    return entries, aliases


def _loss_shapes() -> dict[str, tuple[int, ...]]:
    """LVDM keeps its losses' weights in the autoencoder's file: perceptual (VGG-16 and its heads) and adversarial."""
    shapes: dict[str, tuple[int, ...]] = {"loss.logvar": ()}
    perceptual = "loss.perceptual_loss."
    shapes |= {f"{perceptual}scaling_layer.{name}": (1, 3, 1, 1) for name in ("shift", "scale")}
    channels = 3
    slices = {1: (64, (0, 2)), 2: (128, (5, 7)), 3: (256, (10, 12, 14)), 4: (512, (17, 19, 21)), 5: (512, (24, 26, 28))}
    for number, (width, layers) in slices.items():
        for layer in layers:
            shapes[f"{perceptual}net.slice{number}.{layer}.weight"] = (width, channels, 3, 3)
            shapes[f"{perceptual}net.slice{number}.{layer}.bias"] = (width,)
            channels = width
        shapes[f"{perceptual}lin{number - 1}.model.1.weight"] = (1, width, 1, 1)
    main = "loss.discriminator.main."
    widths = {0: (3, 64), 2: (64, 128), 5: (128, 256), 8: (256, 512), 11: (512, 1)}
    for layer, (inputs, outputs) in widths.items():
        shapes[f"{main}{layer}.weight"] = (outputs, inputs, 4, 4)
        if layer in (0, 11):
            shapes[f"{main}{layer}.bias"] = (outputs,)
        else:
            names = ("weight", "bias", "running_mean", "running_var")
            shapes |= {f"{main}{layer + 1}.{name}": (outputs,) for name in names}
            shapes[f"{main}{layer + 1}.num_batches_tracked"] = ()
    return shapes


LOSS = _loss_shapes()


def blank_losses() -> dict[str, LazyTensor]:
    """Losses for an autoencoder that has none, so that LVDM's strict loader takes the file.

    The adversary is fresh, the perceptual network zero: to go on training in LVDM, load those from its own source.
    """
    generator = torch.Generator().manual_seed(0)
    constants = {"shift": (-0.030, -0.088, -0.188), "scale": (0.458, 0.448, 0.450)}
    tensors = {}
    for name, shape in LOSS.items():
        leaf = name.rpartition(".")[2]
        if leaf in constants:
            tensor = torch.tensor(constants[leaf]).view(shape)
        elif leaf == "num_batches_tracked":
            tensor = torch.zeros(shape, dtype=torch.int64)
        elif "discriminator" in name and len(shape) == 4:
            tensor = torch.normal(0.0, 0.02, shape, generator=generator)
        elif "discriminator" in name and leaf in ("weight", "running_var"):
            tensor = torch.ones(shape)
        else:
            tensor = torch.zeros(shape)
        tensors[name] = LazyTensor.of(tensor)
    return tensors
