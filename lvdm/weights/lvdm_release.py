"""LVDM's checkpoints (YingqingHe/LVDM): autoencoder, short, prediction, interpolation and text-to-video models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lvdm.weights.conversion import (
    Component,
    Contents,
    LazyTensor,
    Mismatch,
    Shapes,
    Source,
    check_names,
    check_plain,
    likeness,
    write_back,
)
from lvdm.weights.lvdm_names import (
    EMA_STATE,
    FIRST_STAGE,
    LOSS,
    TABLES,
    TEXT,
    UNET,
    autoencoder_config,
    autoencoder_entries,
    blank_losses,
    ema_name,
    unet_config,
    unet_entries,
)
from lvdm.weights.stable_diffusion_parts import clip_component, clip_entries, position_ids, vae_component, vae_entries

SCALINGS = {
    "sky": (0.33422927, 1.4606637),
    "ucf": (0.220142075, 0.5837740898),
    "taichi": (0.175733933, 0.03291025),
    "stable-diffusion": (0.18215, 0.0),
}
"""Scale and shift of the latents by data set, which LVDM keeps in its configs and not in its files."""


@dataclass(frozen=True)
class AutoencoderLayout:
    """``ae_*.ckpt``."""

    description: str = "LVDM's video autoencoder"

    def recognise(self, shapes: Shapes) -> float:
        try:
            entries, aliases = autoencoder_entries(autoencoder_config(shapes))
        except Mismatch:
            entries, aliases = autoencoder_entries({"downsample": (4, 8, 8)})
        return likeness({*(entry.theirs for entry in entries), *aliases, *LOSS}, shapes)

    def to_ours(self, shapes: Shapes, weights: Literal["ema", "live"]) -> Contents:
        config = autoencoder_config(shapes)
        entries, aliases = autoencoder_entries(config)
        check_names([entry.theirs for entry in entries], {*aliases, *LOSS}, shapes)
        wrong = [f"{name} {list(shapes[name])}" for name in LOSS if name in shapes and shapes[name] != LOSS[name]]
        if wrong:
            raise Mismatch(f"{len(wrong)} of another shape ({', '.join(wrong[:3])})")
        held = {alias: name for alias, name in aliases.items() if alias in shapes}
        rest = [name for name in LOSS if name in shapes]
        return Contents({"": Component("lvdm", config, entries)}, held, rest)

    def from_ours(
        self,
        sources: Mapping[str, Source],
        live: Source | None,
        rest: Mapping[str, LazyTensor],
        facts: Mapping[str, Any],
    ) -> dict[str, LazyTensor]:
        return _autoencoder_tensors(sources.get(""), "") | blank_losses() | dict(rest)


@dataclass(frozen=True)
class ClipLayout:
    """``short_*.ckpt`` and the checkpoints of prediction and interpolation, which have one network each."""

    description: str
    mask_channel: bool
    temporal_length: int

    def recognise(self, shapes: Shapes) -> float:
        try:
            config = unet_config(shapes)
        except Mismatch:
            config = {
                "kind": "space_time_unet", "channel_mult": (1, 2, 3, 4), "res_blocks": 3, "attention_levels": (1, 2, 3),
                "noise_levels": 251 if self.mask_channel else 0, "mask_channel": self.mask_channel,
                "temporal_length": self.temporal_length,
            }  # fmt: skip
        if config["kind"] != "space_time_unet" or config["mask_channel"] != self.mask_channel:
            return 0.0
        names = {entry.theirs for entry in unet_entries(config)}
        entries, aliases = autoencoder_entries({"downsample": (4, 8, 8)}, FIRST_STAGE)
        names |= {ema_name(name) for name in names} | set(EMA_STATE) | set(TABLES)
        names |= {entry.theirs for entry in entries} | set(aliases)
        return likeness(names, shapes) * (1.0 if config["temporal_length"] == self.temporal_length else 0.99)

    def to_ours(self, shapes: Shapes, weights: Literal["ema", "live"]) -> Contents:
        config = unet_config(shapes)
        if config["kind"] != "space_time_unet":
            raise Mismatch("its network reads text")
        if config["mask_channel"] != self.mask_channel:
            raise Mismatch(f"its network has {'a' if config['mask_channel'] else 'no'} mask channel")
        live = unet_entries(config)
        averaged = [entry._replace(theirs=ema_name(entry.theirs)) for entry in live]
        names, ema_names = [entry.theirs for entry in live], [entry.theirs for entry in averaged]
        vae_config = autoencoder_config(shapes, FIRST_STAGE)
        vae, aliases = autoencoder_entries(vae_config, FIRST_STAGE)
        if weights == "ema" and not any(name in shapes for name in ema_names):
            raise Mismatch("it holds no moving average; ask for the live weights")
        required = (ema_names if weights == "ema" else names) + [entry.theirs for entry in vae]
        check_names(required, {*names, *ema_names, *aliases, *TABLES, *EMA_STATE}, shapes)
        components = {
            "": Component("lvdm", config, averaged if weights == "ema" else live),
            "vae": Component("lvdm", vae_config, vae),
        }
        held = {alias: name for alias, name in aliases.items() if alias in shapes}
        other = [*EMA_STATE, *(names if weights == "ema" else ema_names)]
        return Contents(components, held, [name for name in other if name in shapes], frozenset(TABLES))

    def from_ours(
        self,
        sources: Mapping[str, Source],
        live: Source | None,
        rest: Mapping[str, LazyTensor],
        facts: Mapping[str, Any],
    ) -> dict[str, LazyTensor]:
        main = _main(sources, "space_time_unet")
        if bool(main.config.get("mask_channel")) != self.mask_channel:
            raise Mismatch(f"the model has {'a' if not self.mask_channel else 'no'} mask channel")
        entries = unet_entries(main.config)
        tensors = _tables(facts)
        tensors |= write_back(live or main, entries)
        tensors |= {
            EMA_STATE[0]: LazyTensor.of(torch.tensor(facts["ema_decay"], dtype=torch.float32)),
            EMA_STATE[1]: LazyTensor.of(torch.tensor(facts["updates"], dtype=torch.int32)),
        }
        tensors |= write_back(main, [entry._replace(theirs=ema_name(entry.theirs)) for entry in entries])
        tensors |= _autoencoder_tensors(sources.get("vae"), FIRST_STAGE)
        return tensors | dict(rest)


@dataclass(frozen=True)
class TextLayout:
    """``t2v.ckpt``: our UNet, the text encoder of transformers and the autoencoder of diffusers."""

    description: str = "LVDM's text-to-video model"

    def recognise(self, shapes: Shapes) -> float:
        try:
            contents = self._contents(shapes)
        except Mismatch:
            return likeness({name for name in shapes if name.startswith((UNET, FIRST_STAGE, TEXT))}, shapes) * 0.1
        names = {entry.theirs for component in contents.components.values() for entry in component.entries}
        return likeness(names | contents.made, shapes)

    def to_ours(self, shapes: Shapes, weights: Literal["ema", "live"]) -> Contents:
        contents = self._contents(shapes)
        required = [entry.theirs for component in contents.components.values() for entry in component.entries]
        check_names(required, contents.made, shapes)
        return contents

    def _contents(self, shapes: Shapes) -> Contents:
        config = unet_config(shapes)
        if config["kind"] != "text_unet":
            raise Mismatch("its network reads no text")
        components = {
            "": Component("lvdm", config, unet_entries(config)),
            "vae": vae_component(shapes, FIRST_STAGE),
            "text_encoder": clip_component(shapes, TEXT),
        }
        return Contents(components, made=frozenset({*TABLES, position_ids(TEXT)}))

    def from_ours(
        self,
        sources: Mapping[str, Source],
        live: Source | None,
        rest: Mapping[str, LazyTensor],
        facts: Mapping[str, Any],
    ) -> dict[str, LazyTensor]:
        main = _main(sources, "text_unet")
        vae, text = sources.get("vae"), sources.get("text_encoder")
        if vae is None or text is None:
            raise Mismatch("the file holds the autoencoder and the text encoder too, and they are not to be had")
        if "block_out_channels" not in vae.config:
            raise Mismatch("the autoencoder is no AutoencoderKL of diffusers")
        if not str(text.config.get("model_type", "clip")).startswith("clip"):
            raise Mismatch(f"the text encoder is a {text.config['model_type']}, not CLIP's")
        positions = torch.arange(text.config["max_position_embeddings"])[None]
        tensors = _tables(facts) | write_back(main, unet_entries(main.config))
        tensors |= write_back(vae, vae_entries(vae.config, FIRST_STAGE))
        tensors |= write_back(text, clip_entries(text.config, TEXT))
        return tensors | {position_ids(TEXT): LazyTensor.of(positions)}


def _main(sources: Mapping[str, Source], kind: str) -> Source:
    main = sources[""]
    if main.config["kind"] != kind:
        raise Mismatch(f"the model is a {main.config['kind']}, not a {kind}")
    check_plain(main.config)
    return main


def _tables(facts: Mapping[str, Any]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(facts["tables"][name]) for name in TABLES}


def _autoencoder_tensors(source: Source | None, prefix: str) -> dict[str, LazyTensor]:
    if source is None or source.config["kind"] != "video_autoencoder":
        raise Mismatch("the file holds the video autoencoder, and it is not to be had")
    entries, aliases = autoencoder_entries(source.config, prefix)
    tensors = write_back(source, entries)
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}
