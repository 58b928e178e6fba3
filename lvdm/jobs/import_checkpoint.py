"""From a foreign checkpoint to our exported folder, with all that came in the file beside the model.

OUT/model.safetensors, config.json   the network, as `tools/export_checkpoint.py` writes it
OUT/vae  OUT/text_encoder            the frozen models, ours or in the form of diffusers and transformers
OUT/scaling.json                     scale and shift of the latents, for ``vae.scaling``
OUT/rest.safetensors                 what else the file held, so that it can be handed back as it was
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

import lvdm
from lvdm.config import UNetConfig, VideoAutoencoderConfig
from lvdm.errors import UserError
from lvdm.inference import TEXT_FOLDER, VAE_FOLDER
from lvdm.models.build import build_model
from lvdm.storage import sha256_of, write_json
from lvdm.weights.conversion import Component, Contents, Mismatch, Shapes, convert, some
from lvdm.weights.layouts import identify
from lvdm.weights.lvdm_release import SCALINGS
from lvdm.weights.native import CONFIG_FILE, WEIGHTS_FILE, as_document, save_model, write_safetensors
from lvdm.weights.torch_file import read_tensors

REST_FILE = "rest.safetensors"
SCALING_FILE = "scaling.json"
_FILE_OF = {"lvdm": WEIGHTS_FILE, "transformers": WEIGHTS_FILE, "diffusers": "diffusion_pytorch_model.safetensors"}
_MODELS: TypeAdapter[Any] = TypeAdapter(VideoAutoencoderConfig | UNetConfig)


def import_checkpoint(
    source: Path,
    target: Path,
    layout: str = "auto",
    *,
    weights: Literal["ema", "live"] = "ema",
    scaling: tuple[float, float] | None = None,
    model_values: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Convert a file to a folder that `run.init_from`, `vae.folder` and sampling take, one tensor at a time.

    Args:
        source: ``.ckpt``, ``.pt`` or ``.safetensors``.
        target: new folder.
        layout: a name of `lvdm.weights.layouts.LAYOUTS`, or ``auto``.
        weights: averaged or live weights, where the file has both; the others travel in ``rest.safetensors``.
        scaling: scale and shift of the latents; by default Stable Diffusion's for its autoencoder.
        model_values: ``name=value`` of the model's config that names and shapes do not tell.
        progress: called with (tensors done, tensors in all).
    Returns:
        The layout's name.
    Raises:
        UserError: the file cannot be read or is not of this layout, or ``target`` exists; nothing was written.
    """
    if target.exists():
        raise UserError(f"{target} already exists; name another output folder or remove it first")
    tensors = read_tensors(source)
    shapes = tensors.shapes() if hasattr(tensors, "shapes") else {name: tuple(t.shape) for name, t in tensors.items()}
    try:
        layout, contents = identify(shapes, layout, weights)
        configs = {
            name: _config(component, model_values if not name else (), shapes)
            for name, component in contents.components.items()
        }
        _check_aliases(contents, tensors)
    except Mismatch as fault:
        raise UserError(f"cannot import {source}: {fault}") from None
    main = contents.components[""]
    scaling = scaling or (SCALINGS["stable-diffusion"] if TEXT_FOLDER in contents.components else None)
    if scaling is None and main.config["kind"] != "video_autoencoder":
        raise UserError(
            f"{source} does not hold the scale and shift of its latents: give --scaling SCALE,SHIFT or --data-set "
            f"({', '.join(SCALINGS)})"
        )
    provenance = {
        "source": str(source),
        "source_sha256": sha256_of(source),
        "layout": layout,
        "weights": weights,
        "imported_by": f"lvdm {lvdm.__version__}",
        "torch": torch.__version__,
    }
    total = sum(len(component.entries) for component in contents.components.values()) + len(contents.rest)
    done = 0

    def counted(pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        nonlocal done
        for pair in pairs:
            yield pair
            done += 1
            if progress:
                progress(done, total)

    def add(folder: Path) -> None:
        for name, component in contents.components.items():
            if name:
                (folder / name).mkdir()
                pairs = counted(convert(component, tensors))
                write_safetensors(folder / name / _FILE_OF[component.library], pairs)
                own = component.library == "lvdm"
                document = {"model": configs[name], "weights": "live", "provenance": provenance}
                write_json(folder / name / CONFIG_FILE, as_document(document) if own else component.config)
        if scaling:
            write_json(folder / SCALING_FILE, {"scale": scaling[0], "shift": scaling[1]})
        if contents.rest:
            write_safetensors(folder / REST_FILE, counted((name, tensors[name]) for name in contents.rest))

    facts = {"scale": scaling[0], "shift": scaling[1]} if scaling else {}
    document = {
        "model": configs[""],
        "training": _training(target, configs, contents),
        "facts": facts | _latent_shape(configs[""]),
        "weights": weights,
        "provenance": provenance,
    }
    save_model(target, counted(convert(main, tensors)), document, add=add)
    return layout


def _config(component: Component, values: Sequence[str], shapes: Shapes) -> dict[str, Any]:
    """The complete config of a component, checked against the shapes. Raises `Mismatch`."""
    config = dict(component.config)
    for value in values:
        name, equals, text = value.partition("=")
        if not equals:
            raise UserError(f"model value {value!r} is not of the form name=value")
        config[name] = yaml.safe_load(text)
    if component.library == "lvdm":
        try:
            section = _MODELS.validate_python(config)
        except ValidationError as error:
            faults = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors() if fault["loc"])
            raise Mismatch(f"they make up no model of ours: {faults or error.errors()[0]['msg']}") from None
        with torch.device("meta"):
            state: Mapping[str, Tensor] = build_model(section, seed=0).state_dict()
        config = section.model_dump(mode="json")
    else:
        state = _foreign_state(component)
    wanted = {entry.ours: tuple(entry.to_theirs(state[entry.ours]).shape) for entry in component.entries}
    wrong = [
        f"{entry.theirs} {list(shapes[entry.theirs])} for {list(wanted[entry.ours])}"
        for entry in component.entries
        if shapes[entry.theirs] != wanted[entry.ours]
    ]
    if wrong:
        raise Mismatch(f"tensors {len(wrong)} of another shape ({some(wrong)})")
    return config


def _foreign_state(component: Component) -> Mapping[str, Tensor]:
    """Names and shapes of the library's own model of this config. Raises `Mismatch` where it cannot be built."""
    try:
        with torch.device("meta"):
            if component.library == "diffusers":
                from diffusers import AutoencoderKL

                config = {name: value for name, value in component.config.items() if not name.startswith("_")}
                vae: Any = AutoencoderKL(**config)
                return dict(vae.state_dict())
            from transformers import CLIPTextConfig, CLIPTextModel

            state = CLIPTextModel(CLIPTextConfig(**component.config)).state_dict()
            return {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in state.items()}
    except (ValueError, RuntimeError, TypeError) as error:
        raise Mismatch(f"they make up no model of {component.library}: {' '.join(str(error).split())[:150]}") from None


def _check_aliases(contents: Contents, tensors: Mapping[str, Tensor]) -> None:
    for alias, name in contents.aliases.items():
        if tensors[alias].shape != tensors[name].shape or not torch.equal(tensors[alias], tensors[name]):
            raise Mismatch(f"{alias} and {name} are one tensor in LVDM, but differ here")


def _latent_shape(model: Mapping[str, Any]) -> dict[str, Any]:
    """The latent that LVDM trained this network on: clips of 256x256."""
    if model["kind"] == "video_autoencoder":
        return {}
    return {"latent_shape": [model["latent_channels"], model["temporal_length"], 32, 32]}


def _training(target: Path, configs: Mapping[str, Any], contents: Contents) -> dict[str, Any]:
    """A training config around the model, since the file has none: what sampling needs, and a start for going on."""
    model = configs[""]
    if model["kind"] == "video_autoencoder":
        return {}
    text = TEXT_FOLDER in contents.components
    beta = (0.00085, 0.012) if text else (0.0015, 0.0155)
    tree = {
        "task": "latent_diffusion",
        "run": {"folder": f"runs/{target.name}", "steps": 1},
        "batch": {"size": 1, "micro": 1},
        "data": {"kind": "video", "video": {"shards": ["data/my_videos/shards"]}},
        "model": model,
        "diffusion": {"beta_start": beta[0], "beta_end": beta[1], "loss": "l2" if text else "l1"},
        "vae": {"kind": "diffusers", "name": str(target), "subfolder": VAE_FOLDER}
        if text
        else {"kind": "lvdm", "folder": str(target / VAE_FOLDER), "scaling": str(target / SCALING_FILE)},
        "optim": {"lr": 6e-5},
    }
    if text:
        tree["text"] = {"name": str(target), "subfolder": TEXT_FOLDER, "max_length": 77, "mask_padding": False}
    if model.get("mask_channel"):
        levels = max(0, model["noise_levels"] - 1)
        tree["given"] = {"noise_levels": levels, "label_without": "drawn", "in_loss": True}
    return tree
