"""diffusers' ``UNet3DConditionModel`` (ModelScope's text-to-video): a folder of theirs in, a folder of theirs out.

Ours and theirs differ in names, and in temporal convolutions, which are 2-D here ``[O, I, 3, 1]`` and 3-D there
``[O, I, 3, 1, 1]``: a view of the same numbers, so a round trip is exact to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
