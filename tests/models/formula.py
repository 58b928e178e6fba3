"""Weights and inputs by formula, so that parity tests store the reference's outputs alone.

`tests/fixtures/parity/*.safetensors` hold what LVDM's code (YingqingHe/LVDM at d251dcc; torch 2.14.1, CPU, fp32) gives
when every tensor of its state dict, zero-initialised ones too, is set by `formula_weight` under its name there, and
inputs are `formula_input` of the names that the tests use.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"


def expected(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


def _normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    stream = np.random.RandomState(zlib.crc32(name.encode()))
    return stream.standard_normal(math.prod(shape)).astype(np.float32).reshape(shape)


def formula_input(name: str, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(_normal(name, shape) * np.float32(scale))


def formula_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    values = _normal(key, shape)
    if len(shape) >= 2:
        values *= np.float32(1 / math.sqrt(math.prod(shape[1:])))
    elif key.endswith(".weight"):
        values = 1 + np.float32(0.1) * values
    else:
        values *= np.float32(0.1)
    return torch.from_numpy(values)


def fill_by_formula(module: nn.Module, lvdm_key: Callable[[str], str]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(formula_weight(lvdm_key(name), tuple(parameter.shape)))


def lvdm_autoencoder_key(name: str) -> str:
    """The reference's name of one of our autoencoder's tensors."""
    name = name.replace("conv_in.", "conv_first.").replace("blocks.", "conv_blocks.").replace(".up.", ".up.convt.")
    name = name.replace("norm_out.", "final_block.0.").replace("encoder.conv_out.", "encoder.final_block.2.")
    plain_conv = re.search(r"(down|conv\d|conv_first|conv_out|final_block\.2|quant_conv)\.bias$", name)
    return name.replace(".bias", ".conv.bias") if plain_conv else name


_UNET_RULES = [
    (r"^input_blocks\.0\.conv", "input_blocks.0.0"),
    (r"^(input_blocks\.\d+)\.conv", r"\1.0.op"),
    (r"^middle_blocks\.0\.res", "middle_block.0"),
    (r"^middle_blocks\.0\.transformer", "middle_block.1"),
    (r"^middle_blocks\.1\.res", "middle_block.2"),
    (r"^((?:in|out)put_blocks\.\d+)\.res", r"\1.0"),
    (r"^((?:in|out)put_blocks\.\d+)\.transformer", r"\1.1"),
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.embed\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.skip\.", ".skip_connection."),
    (r"(middle_block\.1|put_blocks\.\d+\.1)\.blocks", r"\1.transformer_blocks"),
    (r"norm_space", "norm1"),
    (r"norm_text", "norm2"),
    (r"norm_ff", "norm3"),
    (r"norm_time1", "norm4"),
    (r"norm_time2", "norm5"),
    (r"attn_space", "attn1"),
    (r"attn_text", "attn2"),
    (r"attn_time(\d)", r"attn\1_tmp"),
    (r"to_out", "to_out.0"),
    (r"relative_([kv])$", r"relative_position_\1.embeddings_table"),
    (r"ff\.proj_in", "ff.net.0.proj"),
    (r"ff\.proj_out", "ff.net.2"),
    (r"^norm_out", "out.0"),
    (r"^conv_out", "out.2"),
]


def lvdm_text_unet_key(name: str) -> str:
    """The reference's name of one of our text UNet's tensors, in a UNet with transformers on every level."""
    for pattern, replacement in _UNET_RULES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^(output_blocks\.\d+)\.conv", r"\1.2.conv", name)


_SPACE_TIME_RULES = [
    (r"norm_(s|t)(pace|ime)\.", r"norm_\1."),
    (r"qkv_(s|t)(pace|ime)", r"qkv_\1"),
    (r"out_(s|t)(pace|ime)", r"proj_out_\1"),
    (r"^level_embed", "label_emb"),
]


def lvdm_space_time_unet_key(name: str) -> str:
    """The reference's name of one of our space-time UNet's tensors."""
    for pattern, replacement in _SPACE_TIME_RULES:
        name = re.sub(pattern, replacement, name)
    return lvdm_text_unet_key(name)
