"""Stable Diffusion 1.x's UNet made into our text-to-video UNet: how LVDM's text model starts.

Every tensor of the 2-D model has a place in `TextUNet`; what is left over there is temporal attention. Its output
starts at zero, so with ``norm_over: frame`` each frame of a clip is at first what the 2-D model makes of it. Two
layouts are read: CompVis' (a ``.ckpt`` or ``.safetensors`` with ``model.diffusion_model.*``) and the folder of a
diffusers ``UNet2DConditionModel``. The 1x1 convolutions around their transformers are linear layers here:
``[O, I, 1, 1]`` becomes ``[O, I]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvdm.errors import UserError
from lvdm.storage import new_folder, read_json
from lvdm.weights.conversion import Mismatch, check_plain
from lvdm.weights.foreign import CONFIG_FILE, Renamed, check_names, open_tensors, write_model
from lvdm.weights.native import SHARDED, Writing

CLASS = "UNet2DConditionModel"
COMPVIS_PREFIX = "model.diffusion_model."

# Our name of a module, CompVis' and diffusers'.
_RES = [
    ("norm1", "in_layers.0", "norm1"),
    ("conv1", "in_layers.2", "conv1"),
    ("embed", "emb_layers.1", "time_emb_proj"),
    ("norm2", "out_layers.0", "norm2"),
    ("conv2", "out_layers.3", "conv2"),
    ("skip", "skip_connection", "conv_shortcut"),
]
_AROUND_BLOCKS = ["norm", "proj_in", "proj_out"]  # the same everywhere
_BLOCK = [
    ("norm_space", "norm1"),
    ("attn_space.to_q", "attn1.to_q"),
    ("attn_space.to_k", "attn1.to_k"),
    ("attn_space.to_v", "attn1.to_v"),
    ("attn_space.to_out", "attn1.to_out.0"),
    ("norm_text", "norm2"),
    ("attn_text.to_q", "attn2.to_q"),
    ("attn_text.to_k", "attn2.to_k"),
    ("attn_text.to_v", "attn2.to_v"),
    ("attn_text.to_out", "attn2.to_out.0"),
    ("norm_ff", "norm3"),
    ("ff.proj_in", "ff.net.0.proj"),
    ("ff.proj_out", "ff.net.2"),
]
_OUTSIDE = [
    ("time_embed.0", "time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.conv", "input_blocks.0.0", "conv_in"),
    ("norm_out", "out.0", "conv_norm_out"),
    ("conv_out", "out.2", "conv_out"),
]
_WITHOUT_BIAS = ("to_q", "to_k", "to_v")
_HEADS = 8  # Stable Diffusion 1.x's, which CompVis' layout does not tell, as the next
_NORM_GROUPS = 32

_FIXED: dict[str, Any] = {
    "_class_name": CLASS,
    "act_fn": "silu",
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
"""Options of diffusers' model that have one value here."""


@dataclass(frozen=True)
class Inflation:
    """A 2-D UNet as the start of a 3-D one."""

    model: dict[str, Any]
    """Plain config of a ``text_unet``, with ``norm_over: frame``."""
    tensors: Mapping[str, Tensor]
    """All tensors of that model by our names, read when asked for."""
    taken: tuple[str, ...]
    """Our names of those that the 2-D model gave."""
    new: tuple[str, ...]
    """Our names of temporal attention's, which come from the seed."""
    left_out: tuple[str, ...]
    """Their names of what a file holds beside the UNet."""

    def report(self) -> str:
        """One line on what was taken."""
        new = f"{len(self.new)} new (temporal attention, whose output starts at zero)"
        parts = sorted({name.split(".")[0] for name in self.left_out})
        left_out = f", {len(self.left_out)} left out ({', '.join(parts[:4])})" if parts else ""
        return f"{len(self.taken)} tensors taken, {new}{left_out}"


def inflate(path: str | Path, *, temporal_length: int = 16, relative_position: bool = True, seed: int = 0) -> Inflation:
    """Read Stable Diffusion 1.x's UNet, in either layout, as the start of a ``text_unet``.

    Args:
        path: a ``.ckpt`` or ``.safetensors`` of CompVis' layout, or the folder of a ``UNet2DConditionModel``.
        temporal_length: largest relative distance in frames with its own position embedding.
        relative_position: whether temporal attention has those embeddings.
        seed: of the new layers.
    Raises:
        UserError: it is no such model, or tensors are missing or unexpected.
    """
    path = Path(path)
    given = open_tensors(path)
    left_out: tuple[str, ...] = ()
    temporal = {"temporal_length": temporal_length, "relative_position": relative_position, "norm_over": "frame"}
    if path.is_dir():
        model = diffusers_config(read_json(path / CONFIG_FILE), str(path / CONFIG_FILE)) | temporal
        names = {ours: theirs for ours, _, theirs in tensor_names(model)}
        layout = CLASS
    else:
        inside = {name.removeprefix(COMPVIS_PREFIX): name for name in given if name.startswith(COMPVIS_PREFIX)}
        left_out = tuple(name for name in given if inside and not name.startswith(COMPVIS_PREFIX))
        given = Renamed(given, inside or {name: name for name in given}, lambda _, tensor: tensor)
        model = compvis_config(given, str(path)) | temporal
        names = {ours: theirs for ours, theirs, _ in tensor_names(model)}
        layout = "Stable Diffusion 1.x UNet"
    check_names(given, names.values(), str(path), layout)
    taken = Renamed(given, names, lambda name, tensor: _linear(names[name], tensor) if _is_projection(name) else tensor)
    query = ".attn_space.to_q.weight"
    widths = {name.removesuffix(query): len(taken[name]) for name in taken if name.endswith(query)}
    new = _Temporal(model, widths, seed)
    return Inflation(model, _Both(taken, new), tuple(taken), tuple(new), left_out)


def deflate(model: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: str) -> Renamed:
    """The 2-D part of a ``text_unet`` in the layout ``compvis`` or ``diffusers``; temporal attention is left out.

    Raises:
        UserError: the model is no ``text_unet``, or a tensor of it is missing.
    """
    if model.get("kind") != "text_unet" or layout not in ("compvis", "diffusers"):
        raise UserError(f"only a text_unet has a 2-D part, in the layout compvis or diffusers; not {model.get('kind')}")
    if model["transformer_depth"] != 1:
        raise UserError(f"Stable Diffusion 1.x has transformers of depth 1, the model of {model['transformer_depth']}")
    try:
        check_plain(model)
    except Mismatch as fault:
        raise UserError(f"the model has no 2-D part as Stable Diffusion 1.x has it: {fault}") from None
    theirs = {
        (COMPVIS_PREFIX + compvis if layout == "compvis" else diffusers): ours
        for ours, compvis, diffusers in tensor_names(model)
    }
    check_names([name for name in tensors if not _is_temporal(name)], theirs.values(), "the model", "text_unet")
    return Renamed(
        tensors, theirs, lambda name, tensor: _convolution(tensor) if _is_projection(theirs[name]) else tensor
    )


def write_unet2d(
    folder: str | Path,
    model: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    sample_size: int = 64,
    writing: Writing = SHARDED,
) -> None:
    """Write the 2-D part of a ``text_unet`` as a folder for ``UNet2DConditionModel.from_pretrained``.

    Args:
        provenance: where the weights are from, into ``provenance.json``.
    Raises:
        UserError: ``folder`` exists or cannot be written, or the model has no such part.
    """
    theirs = deflate(model, tensors, "diffusers")
    with new_folder(Path(folder)) as temporary:
        write_model(temporary, their_config(model, sample_size), theirs, provenance, writing)


def their_config(model: Mapping[str, Any], sample_size: int) -> dict[str, Any]:
    """diffusers' ``config.json`` of the 2-D part; ``sample_size`` is the side of its latents."""
    channels = [model["model_channels"] * multiple for multiple in model["channel_mult"]]
    attention = [level in set(model["attention_levels"]) for level in range(len(channels))]
    return {
        **_FIXED,
        "_diffusers_version": "0.33.1",
        "sample_size": sample_size,
        "in_channels": model["latent_channels"],
        "out_channels": model["latent_channels"],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "block_out_channels": channels,
        "layers_per_block": model["res_blocks"],
        "norm_num_groups": model["norm_groups"],
        "cross_attention_dim": model["context_dim"],
        "attention_head_dim": model["heads"],
    }


def is_compvis(given: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensors look like CompVis' layout of a 2-D UNet: LVDM's kernels have three axes."""
    ends = [f"{prefix}{end}.weight" for prefix in (COMPVIS_PREFIX, "") for end in ("input_blocks.0.0", "out.2")]
    return any(name in given and given[name].ndim == 4 for name in ends)


def tensor_names(model: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Our, CompVis' and diffusers' name of every tensor of the 2-D model; ``model`` is a plain ``text_unet`` config."""
    multiples, attention_levels = list(model["channel_mult"]), set(model["attention_levels"])
    modules = list(_OUTSIDE)

    def stage(ours: str, compvis: str, group: str, number: int, attention: bool, skip: bool, first: int = 0) -> None:
        """Add a residual block, entry ``first`` of CompVis' stage, and the transformer behind it."""
        modules.extend(
            (f"{ours}.res.{name}", f"{compvis}.{first}.{middle}", f"{group}.resnets.{number}.{last}")
            for name, middle, last in _RES
            if name != "skip" or skip
        )
        if attention:
            ours, compvis, group = f"{ours}.transformer", f"{compvis}.{first + 1}", f"{group}.attentions.{number}"
            modules.extend((f"{ours}.{name}", f"{compvis}.{name}", f"{group}.{name}") for name in _AROUND_BLOCKS)
            modules.extend(
                (
                    f"{ours}.blocks.{depth}.{name}",
                    f"{compvis}.transformer_blocks.{depth}.{theirs}",
                    f"{group}.transformer_blocks.{depth}.{theirs}",
                )
                for depth in range(model["transformer_depth"])
                for name, theirs in _BLOCK
            )

    block, current, skips = 1, 1, [1]
    for level, multiple in enumerate(multiples):
        for number in range(model["res_blocks"]):
            name = f"input_blocks.{block}"
            stage(name, name, f"down_blocks.{level}", number, level in attention_levels, current != multiple)
            block, current = block + 1, multiple
            skips.append(current)
        if level < len(multiples) - 1:
            name = f"input_blocks.{block}"
            modules.append((f"{name}.conv", f"{name}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            block += 1
            skips.append(current)
    stage("middle_blocks.0", "middle_block", "mid_block", 0, True, skip=False)
    stage("middle_blocks.1", "middle_block", "mid_block", 1, False, skip=False, first=2)
    block = 0
    for up, (level, multiple) in enumerate(reversed(list(enumerate(multiples)))):
        attention = level in attention_levels
        for number in range(model["res_blocks"] + 1):
            name = f"output_blocks.{block}"
            stage(name, name, f"up_blocks.{up}", number, attention, current + skips.pop() != multiple)
            block, current = block + 1, multiple
        if level > 0:
            name = f"output_blocks.{block - 1}"
            modules.append((f"{name}.conv", f"{name}.{1 + attention}.conv", f"up_blocks.{up}.upsamplers.0.conv"))
    return [
        (f"{ours}.{kind}", f"{compvis}.{kind}", f"{diffusers}.{kind}")
        for ours, compvis, diffusers in modules
        for kind in (("weight",) if ours.endswith(_WITHOUT_BIAS) else ("weight", "bias"))
    ]


def diffusers_config(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Plain config of the ``text_unet`` around a ``UNet2DConditionModel``. Raises `UserError` for what has none."""
    wrong = [f"{key}={document[key]!r}" for key, value in _FIXED.items() if document.get(key, value) != value]
    try:
        channels = [int(width) for width in document["block_out_channels"]]
        down, up = list(document["down_block_types"]), list(document["up_block_types"])
        heads = document["attention_head_dim"]  # diffusers' name for it: in this class it is the number of heads
        heads = heads if isinstance(heads, int) else int(heads[0]) if len(set(heads)) == 1 else 0
        model = _model(
            int(document["in_channels"]), channels, int(document["layers_per_block"]),
            [level for level, name in enumerate(down) if name == "CrossAttnDownBlock2D"], heads,
            int(document["cross_attention_dim"]), int(document["norm_num_groups"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{source} describes no UNet2DConditionModel: {type(error).__name__} {error}") from None
    attention = [name == "CrossAttnDownBlock2D" for name in down]
    if up != ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)]:
        wrong.append(f"up_block_types={up}")
    if any(not has and name != "DownBlock2D" for has, name in zip(attention, down, strict=True)):
        wrong.append(f"down_block_types={down}")
    if heads < 1:
        wrong.append("attention_head_dim of several values")
    if document.get("out_channels", document["in_channels"]) != document["in_channels"]:
        wrong.append("out_channels other than in_channels")
    if any(width % channels[0] for width in channels):
        wrong.append(f"block_out_channels={channels}")
    if wrong:
        raise UserError(f"{source} is not of Stable Diffusion 1.x's kind: {', '.join(wrong)}")
    return model


def compvis_config(given: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Plain config of the ``text_unet`` around a UNet of CompVis' layout, told from names and shapes.

    Raises:
        UserError: there is no such UNet in it.
    """
    try:
        base, latent = given["input_blocks.0.0.weight"].shape[:2]
        stages = sorted({int(name.split(".")[1]) for name in given if name.startswith("input_blocks.")})[1:]
        levels: list[tuple[int, bool]] = [(0, False)]
        for stage in stages:
            if f"input_blocks.{stage}.0.op.weight" in given:
                levels.append((0, False))
            else:
                width = given[f"input_blocks.{stage}.0.out_layers.3.weight"].shape[0]
                levels[-1] = (width, f"input_blocks.{stage}.1.norm.weight" in given)
        res_blocks = (len(stages) - len(levels) + 1) // len(levels)
        linear = given["middle_block.1.proj_in.weight"].ndim == 2
        context_dim = given["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    except (KeyError, IndexError, ValueError):
        raise UserError(f"{source} holds no Stable Diffusion 1.x UNet ({COMPVIS_PREFIX}*)") from None
    channels = [width for width, _ in levels]
    if linear or any(not width or width % base for width in channels) or channels[0] != base:
        raise UserError(f"{source} holds a UNet of another kind than Stable Diffusion 1.x (channels {channels})")
    attention = [level for level, (_, has) in enumerate(levels) if has]
    return _model(latent, channels, res_blocks, attention, _HEADS, context_dim, _NORM_GROUPS)


def _model(
    latent: int, channels: list[int], res_blocks: int, levels: list[int], heads: int, context_dim: int, groups: int
) -> dict[str, Any]:
    return {
        "kind": "text_unet",
        "latent_channels": latent,
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "res_blocks": res_blocks,
        "attention_levels": levels,
        "heads": heads,
        "transformer_depth": 1,
        "context_dim": context_dim,
        "norm_groups": groups,
    }


class _Temporal(Mapping[str, Tensor]):
    """Temporal attention of every transformer block as `TextUNet` starts it: its output is zero."""

    def __init__(self, model: Mapping[str, Any], widths: Mapping[str, int], seed: int) -> None:
        """``widths``: channels of each transformer block, by our name of it."""
        self._seed = seed
        self._shapes: dict[str, tuple[int, ...]] = {}
        for block, width in widths.items():
            for number in (1, 2):
                norm, attention = f"{block}.norm_time{number}", f"{block}.attn_time{number}"
                self._shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
                self._shapes |= {f"{attention}.to_{part}.weight": (width, width) for part in ("q", "k", "v", "out")}
                self._shapes[f"{attention}.to_out.bias"] = (width,)
                if model["relative_position"]:
                    table = (2 * model["temporal_length"] + 1, width // model["heads"])
                    self._shapes |= {f"{attention}.relative_{part}": table for part in ("k", "v")}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if ".norm_time" in name:
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        if "relative" in name:
            return self._uniform(name, (6 / sum(shape)) ** 0.5)
        if "to_out" in name:
            return torch.zeros(shape)
        return self._uniform(name, shape[1] ** -0.5)

    def _uniform(self, name: str, bound: float) -> Tensor:
        """Uniform over ``-bound..bound``, from the seed and the name alone."""
        words = np.random.SeedSequence([self._seed, *name.encode()]).generate_state(1)
        generator = torch.Generator().manual_seed(int(words[0]))
        return torch.empty(self._shapes[name]).uniform_(-bound, bound, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class _Both(Mapping[str, Tensor]):
    """The tensors of two mappings."""

    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self._parts = (first, second)

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name not in self._parts[0]][name]

    def __iter__(self) -> Iterator[str]:
        return (name for part in self._parts for name in part)

    def __len__(self) -> int:
        return sum(map(len, self._parts))


def _is_projection(name: str) -> bool:
    """Whether our tensor ``name`` is a linear layer where theirs is a 1x1 convolution."""
    return name.endswith((".transformer.proj_in.weight", ".transformer.proj_out.weight"))


def _linear(name: str, kernel: Tensor) -> Tensor:
    if tuple(kernel.shape[2:]) != (1, 1):
        raise UserError(f"tensor {name} is of another shape: {list(kernel.shape)} is no convolution of one pixel")
    return kernel.flatten(1)


def _convolution(matrix: Tensor) -> Tensor:
    return matrix[..., None, None]


def _is_temporal(name: str) -> bool:
    return ".attn_time" in name or ".norm_time" in name
