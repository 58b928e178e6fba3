"""diffusers' ``UNet3DConditionModel`` (ModelScope's text-to-video): a folder of theirs in, a folder of theirs out.

Ours and theirs differ in names, and in temporal convolutions, which are ``[3, O, I]`` here and ``[O, I, 3, 1, 1]``
there: the same numbers in another order, so a round trip is exact to the bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lvdm.errors import UserError
from lvdm.storage import new_folder, read_json, write_json
from lvdm.weights.foreign import (
    CONFIG_FILE,
    Renamed,
    check_names,
    open_tensors,
    write_model,
)
from lvdm.weights.native import SHARDED, Writing

CLASS = "UNet3DConditionModel"

_RES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "embed": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
_TEMPORAL_CONV = {
    "norms.0": "conv1.0",
    "convs.0": "conv1.2",
    "norms.1": "conv2.0",
    "convs.1": "conv2.3",
    "norms.2": "conv3.0",
    "convs.2": "conv3.3",
    "norms.3": "conv4.0",
    "convs.3": "conv4.3",
}
_TRANSFORMER = {
    "norm": "norm",
    "proj_in": "proj_in",
    "block.norm1": "transformer_blocks.0.norm1",
    "block.attn1.to_q": "transformer_blocks.0.attn1.to_q",
    "block.attn1.to_k": "transformer_blocks.0.attn1.to_k",
    "block.attn1.to_v": "transformer_blocks.0.attn1.to_v",
    "block.attn1.to_out": "transformer_blocks.0.attn1.to_out.0",
    "block.norm2": "transformer_blocks.0.norm2",
    "block.attn2.to_q": "transformer_blocks.0.attn2.to_q",
    "block.attn2.to_k": "transformer_blocks.0.attn2.to_k",
    "block.attn2.to_v": "transformer_blocks.0.attn2.to_v",
    "block.attn2.to_out": "transformer_blocks.0.attn2.to_out.0",
    "block.norm3": "transformer_blocks.0.norm3",
    "block.ff.proj_in": "transformer_blocks.0.ff.net.0.proj",
    "block.ff.proj_out": "transformer_blocks.0.ff.net.2",
    "proj_out": "proj_out",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_LAYERS = {
    "res": ("resnets", _RES),
    "temporal_conv": ("temp_convs", _TEMPORAL_CONV),
    "transformer": ("attentions", _TRANSFORMER),
    "temporal_transformer": ("temp_attentions", _TRANSFORMER),
}
_WITHOUT_BIAS = ("to_q", "to_k", "to_v")


def tensor_names(model: Mapping[str, Any]) -> dict[str, str]:
    """Their name of every tensor of ours; ``model`` is the plain config of a ``modelscope_unet``."""
    channels, attention_levels = list(model["channels"]), set(model["attention_levels"])
    modules = dict(_OUTSIDE)
    modules |= {f"transformer_in.{ours}": f"transformer_in.{theirs}" for ours, theirs in _TRANSFORMER.items()}

    def stage(ours: str, theirs: str, number: int, attention: bool, skip: bool) -> None:
        """Add the layers of one stage, which are entry ``number`` of each of their lists."""
        for layer, (group, table) in _LAYERS.items():
            if attention or layer in ("res", "temporal_conv"):
                modules.update(
                    {
                        f"{ours}.{layer}.{name}": f"{theirs}.{group}.{number}.{their_name}"
                        for name, their_name in table.items()
                        if name != "skip" or skip
                    }
                )

    block, current, skips = 0, channels[0], [channels[0]]
    for level, width in enumerate(channels):
        for number in range(model["res_blocks"]):
            stage(f"input_blocks.{block}", f"down_blocks.{level}", number, level in attention_levels, current != width)
            block, current = block + 1, width
            skips.append(current)
        if level < len(channels) - 1:
            modules[f"input_blocks.{block}.conv"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
            skips.append(current)
    for number, attention in enumerate((True, False)):
        stage(f"middle_blocks.{number}", "mid_block", number, attention, skip=False)
    block = 0
    for up, (level, width) in enumerate(reversed(list(enumerate(channels)))):
        for number in range(model["res_blocks"] + 1):
            skip = current + skips.pop() != width
            stage(f"output_blocks.{block}", f"up_blocks.{up}", number, level in attention_levels, skip)
            block, current = block + 1, width
        if level > 0:
            modules[f"output_blocks.{block - 1}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"

    names = {}
    for ours, theirs in modules.items():
        for kind in ("weight",) if ours.endswith(_WITHOUT_BIAS) else ("weight", "bias"):
            names[f"{ours}.{kind}"] = f"{theirs}.{kind}"
    return names


def read_unet3d(folder: str | Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Model config and tensors, by our names and read when asked for, of a folder with a ``UNet3DConditionModel``.

    Raises:
        UserError: it is none, has options that our network lacks, or tensors are missing or unexpected.
    """
    folder = Path(folder)
    model = our_config(read_json(folder / CONFIG_FILE), source=str(folder / CONFIG_FILE))
    given = open_tensors(folder)
    return model, to_ours(model, given, source=str(folder))


def to_ours(model: Mapping[str, Any], given: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """Our names and shapes over their tensors. Raises `UserError` naming what is missing or unexpected."""
    names = tensor_names(model)
    check_names(given, names.values(), source, layout=CLASS)
    return Renamed(given, names, lambda name, tensor: _matrices(names[name], tensor) if _is_temporal(name) else tensor)


def from_ours(model: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Renamed:
    """Their names and shapes over our tensors. Raises `UserError` when diffusers has no such model."""
    if model.get("kind") != "modelscope_unet" or model.get("frame_rate"):
        raise UserError(f"a {CLASS} needs a modelscope_unet without frame_rate, not {model.get('kind')}")
    names = tensor_names(model)
    check_names(tensors, names, "the model", layout="modelscope_unet")
    theirs = {their_name: name for name, their_name in names.items()}
    return Renamed(tensors, theirs, lambda name, tensor: _kernel(tensor) if _is_temporal(theirs[name]) else tensor)


def our_config(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Plain model config from their ``config.json``. Raises `UserError` for what our network cannot be."""
    wrong = [f"{key}={document[key]!r}" for key, value in _FIXED.items() if document.get(key, value) != value]
    if wrong:
        raise UserError(f"{source} describes no {CLASS} that lvdm has: {', '.join(wrong)}")
    try:
        down, up = list(document["down_block_types"]), list(document["up_block_types"])
        model = {
            "kind": "modelscope_unet",
            "latent_channels": int(document["in_channels"]),
            "channels": [int(width) for width in document["block_out_channels"]],
            "res_blocks": int(document["layers_per_block"]),
            "attention_levels": [level for level, name in enumerate(down) if name == _DOWN[True]],
            "head_channels": int(document["attention_head_dim"]),
            "context_dim": int(document["cross_attention_dim"]),
            "norm_groups": int(document["norm_num_groups"]),
            "frame_rate": False,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} describes no {CLASS}: {type(error).__name__} {error}") from None
    same = {"block types": (down, up), "channels": document.get("out_channels", model["latent_channels"])}
    if same != {"block types": _block_types(model), "channels": model["latent_channels"]}:
        raise UserError(f"{source}: lvdm has only mirrored down and up blocks and as many channels out as in")
    return model


def their_config(model: Mapping[str, Any], sample_size: int) -> dict[str, Any]:
    """Their ``config.json`` of one of our models; ``sample_size`` is the side of its latents."""
    down, up = _block_types(model)
    return {
        **_FIXED,
        "_diffusers_version": "0.33.1",
        "sample_size": sample_size,
        "in_channels": model["latent_channels"],
        "out_channels": model["latent_channels"],
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": list(model["channels"]),
        "layers_per_block": model["res_blocks"],
        "norm_num_groups": model["norm_groups"],
        "cross_attention_dim": model["context_dim"],
        "attention_head_dim": model["head_channels"],
    }


def write_unet3d(
    folder: str | Path,
    model: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    sample_size: int = 32,
    writing: Writing = SHARDED,
) -> None:
    """Write a folder for ``UNet3DConditionModel.from_pretrained``, tensor by tensor, whole or not at all.

    Args:
        provenance: where the weights are from, into ``provenance.json``.
    Raises:
        UserError: ``folder`` exists or cannot be written, or diffusers has no such model.
    """
    theirs = from_ours(model, tensors)
    with new_folder(Path(folder)) as temporary:
        write_model(temporary, their_config(model, sample_size), theirs, provenance, writing)


def write_pipeline(
    folder: str | Path,
    model: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    *,
    vae: Path,
    text_encoder: Path,
    tokenizer: Path,
    scheduler: Mapping[str, Any],
    sample_size: int = 32,
    writing: Writing = SHARDED,
) -> None:
    """Write a folder for ``TextToVideoSDPipeline.from_pretrained``, whole or not at all.

    Args:
        vae: folder of an ``AutoencoderKL``, which is copied, as are the next two.
        text_encoder: folder of a ``CLIPTextModel``.
        tokenizer: folder of a ``CLIPTokenizer``.
        scheduler: what `scheduler_config` gives.
    Raises:
        UserError: as for `write_unet3d`, or a part is no folder.
    """
    theirs = from_ours(model, tensors)
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    for name, part in parts.items():
        if not Path(part).is_dir():
            raise UserError(f"{name} {part} is no folder; the pipeline needs one to copy")
    with new_folder(Path(folder)) as temporary:
        (temporary / "unet").mkdir()
        write_model(temporary / "unet", their_config(model, sample_size), theirs, provenance, writing)
        for name, part in parts.items():
            # a text encoder's folder may be its tokenizer's too; weights go with the encoder alone
            unwanted = ("*.safetensors", "*.bin") if name == "tokenizer" else ("*.bin",)
            shutil.copytree(part, temporary / name, ignore=shutil.ignore_patterns(*unwanted))
        (temporary / "scheduler").mkdir()
        write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        write_json(temporary / "model_index.json", _PIPELINE)


def scheduler_config(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """``DDIMScheduler``'s config for our diffusion section. Raises `UserError` for what it has no name for."""
    schedule, target = diffusion["schedule"], diffusion["parameterization"]
    if schedule not in _SCHEDULES or target not in _PREDICTIONS:
        raise UserError(f"diffusers' DDIMScheduler knows no schedule {schedule} with parameterization {target}")
    zero = bool(diffusion["zero_terminal_snr"])
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": diffusion["timesteps"],
        "beta_schedule": schedule,
        "beta_start": diffusion["beta_start"],
        "beta_end": diffusion["beta_end"],
        "prediction_type": _PREDICTIONS[target],
        "rescale_betas_zero_snr": zero,
        "timestep_spacing": "trailing" if zero else "leading",
        "steps_offset": 0 if zero else 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


def our_diffusion(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Our diffusion section of a ``scheduler_config.json``. Raises `UserError` for a process that lvdm lacks."""
    targets = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    schedule, target = document.get("beta_schedule", "linear"), document.get("prediction_type", "epsilon")
    if schedule not in _SCHEDULES or target not in targets or document.get("trained_betas") is not None:
        raise UserError(f"{source}: lvdm has no process of beta_schedule {schedule}, prediction_type {target}")
    return {
        "timesteps": document.get("num_train_timesteps", 1000),
        "schedule": schedule,
        "beta_start": document.get("beta_start", 0.0001),
        "beta_end": document.get("beta_end", 0.02),
        "zero_terminal_snr": bool(document.get("rescale_betas_zero_snr", False)),
        "parameterization": targets[target],
    }


_SCHEDULES = ("scaled_linear", "linear")
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_FIXED: dict[str, Any] = {
    "_class_name": CLASS,
    "act_fn": "silu",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "time_cond_proj_dim": None,
}
"""Options of theirs that have one value here."""
_DOWN = {True: "CrossAttnDownBlock3D", False: "DownBlock3D"}
_UP = {True: "CrossAttnUpBlock3D", False: "UpBlock3D"}
_PIPELINE = {
    "_class_name": "TextToVideoSDPipeline",
    "_diffusers_version": "0.33.1",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", CLASS],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _block_types(model: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    attention = [level in set(model["attention_levels"]) for level in range(len(model["channels"]))]
    return [_DOWN[has] for has in attention], [_UP[has] for has in reversed(attention)]


def _is_temporal(name: str) -> bool:
    """Whether our tensor ``name`` is the kernel of a temporal convolution."""
    return ".temporal_conv.convs." in name and name.endswith(".weight")


def _matrices(name: str, kernel_OI311: Tensor) -> Tensor:
    if tuple(kernel_OI311.shape[2:]) != (3, 1, 1):
        raise UserError(f"tensor {name} is of another shape: {list(kernel_OI311.shape)} is no temporal kernel")
    return kernel_OI311.flatten(2).permute(2, 0, 1)


def _kernel(matrices_3OI: Tensor) -> Tensor:
    return matrices_3OI.permute(1, 2, 0)[..., None, None]
