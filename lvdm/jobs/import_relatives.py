"""ModelScope's and Stable Diffusion's models as exported folders of ours: one UNet, or a whole pipeline of diffusers.

OUT/model.safetensors, config.json        the network, as `tools/export_checkpoint.py` writes it
OUT/vae  OUT/text_encoder  OUT/tokenizer  copies of the pipeline's other models, where it has them
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

import lvdm
from lvdm.config import UNetConfig
from lvdm.errors import UserError
from lvdm.inference import TEXT_FOLDER, TOKENIZER_FOLDER, VAE_FOLDER
from lvdm.models.build import build_model
from lvdm.models.frozen import weight_files as frozen_files
from lvdm.storage import read_json, sha256_of
from lvdm.weights import diffusers, stable_diffusion
from lvdm.weights.conversion import some
from lvdm.weights.foreign import weight_files
from lvdm.weights.lvdm_release import SCALINGS
from lvdm.weights.native import CONFIG_FILE, Weights, save_model
from lvdm.weights.torch_file import read_tensors

RELATIVES = {
    "diffusers-unet3d": "ModelScope's text-to-video model (diffusers' UNet3DConditionModel)",
    "sd-unet": "Stable Diffusion 1.x's UNet inflated into the text-to-video UNet",
}
"""What the layouts are, by the name of ``--layout``."""
_LAYOUT_OF = {diffusers.CLASS: "diffusers-unet3d", stable_diffusion.CLASS: "sd-unet"}
_UNET_FOLDER = "unet"
_STEMS = {VAE_FOLDER: "diffusion_pytorch_model", TEXT_FOLDER: "model"}
_INFLATION = {"temporal_length": int, "relative_position": bool, "seed": int}
_MODELS: TypeAdapter[Any] = TypeAdapter(UNetConfig)


def recognise(source: Path) -> str:
    """The layout of a folder of diffusers or of a file with Stable Diffusion's UNet; empty for another file.

    Raises:
        UserError: it cannot be read, or is a folder of something else.
    """
    if not source.is_dir():
        return "sd-unet" if stable_diffusion.is_compvis(read_tensors(source)) else ""
    path = _unet_of(source) / CONFIG_FILE
    name = read_json(path).get("_class_name")
    if name not in _LAYOUT_OF:
        raise UserError(f"{path} describes {name or 'no model of diffusers'}, which is none of {', '.join(_LAYOUT_OF)}")
    return _LAYOUT_OF[name]


def import_relative(
    source: Path,
    target: Path,
    layout: str,
    *,
    scaling: tuple[float, float] | None = None,
    model_values: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Convert to a folder that `run.init_from` takes, and `lvdm.inference.load` where all models came along.

    Args:
        source: folder of the UNet or of a whole pipeline; for ``sd-unet`` also a file of CompVis' layout.
        target: new folder.
        layout: a name of `RELATIVES`.
        scaling: scale and shift of the latents; by default the autoencoder's, or Stable Diffusion's.
        model_values: for ``sd-unet``, ``name=value`` of what the 2-D model does not tell: `_INFLATION`.
        progress: called with (tensors done, tensors in all).
    Returns:
        What was taken and what was left out, in one line.
    Raises:
        UserError: it cannot be read or is of another layout, or ``target`` exists; nothing was written.
    """
    if target.exists():
        raise UserError(f"{target} already exists; name another output folder or remove it first")
    values = _values(model_values, _INFLATION if layout == "sd-unet" else {})
    unet = _unet_of(source)
    tensors: Mapping[str, Tensor]
    if layout == "sd-unet":
        inflation = stable_diffusion.inflate(unet, **values)
        model, tensors, said = inflation.model, inflation.tensors, inflation.report()
    else:
        model, tensors = diffusers.read_unet3d(unet)
        said = f"{len(tensors)} tensors taken"
    model = _checked(model, tensors, source)
    parts = _parts(source) if unet != source else {}
    if VAE_FOLDER in parts and scaling is None:
        scaling = _vae_scaling(parts[VAE_FOLDER] / CONFIG_FILE)
    scaling = scaling or SCALINGS["stable-diffusion"]
    size = read_json(unet / CONFIG_FILE).get("sample_size") if unet.is_dir() else None
    side = size if isinstance(size, int) else 32 if layout == "diffusers-unet3d" else 64
    document = {
        "model": model,
        "training": _training(source, target, model, parts, scaling),
        "facts": {
            "scale": scaling[0],
            "shift": scaling[1],
            "latent_shape": [model["latent_channels"], model.get("temporal_length", 16), side, side],
        },
        "weights": "live",
        "provenance": {
            "source": str(source),
            "source_sha256": sha256_of(*weight_files(unet)),
            "layout": layout,
            "imported_by": f"lvdm {lvdm.__version__}",
            "torch": torch.__version__,
        },
    }

    def counted() -> Iterator[tuple[str, Tensor]]:
        for done, pair in enumerate(tensors.items(), start=1):
            yield pair
            if progress:
                progress(done, len(tensors))

    def add(folder: Path) -> None:
        for name, part in parts.items():
            (folder / name).mkdir()
            for file in _files(name, part):
                shutil.copyfile(file, folder / name / file.name)

    save_model(target, counted(), document, add=add)
    return said + (f"; copied: {', '.join(parts)}" if parts else "")


def _unet_of(source: Path) -> Path:
    """The UNet's place in a pipeline, or the source itself."""
    return source / _UNET_FOLDER if (source / _UNET_FOLDER).is_dir() else source


def _values(texts: Sequence[str], known: Mapping[str, type]) -> dict[str, Any]:
    """``name=value`` parsed. Raises `UserError`."""
    values = {}
    for text in texts:
        name, _, given = text.partition("=")
        if name not in known:
            raise UserError(f"model value {text!r}: this layout takes {', '.join(known) or 'none'}")
        try:
            values[name] = yaml.safe_load(given)
        except yaml.YAMLError:
            values[name] = None
        if type(values[name]) is not known[name] or values[name] < 0:
            raise UserError(f"model value {text!r} is not of the form {name}={known[name].__name__}")
    return values


def _checked(model: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """The complete config, once the tensors have the shapes of our model. Raises `UserError`."""
    try:
        section = _MODELS.validate_python(model)
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors())
        raise UserError(f"{source} makes up no model of ours: {faults}") from None
    with torch.device("meta"):
        wanted = build_model(section, seed=0).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        f"{name} {list(shapes.get(name, ()))} for {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if shapes.get(name) != tuple(tensor.shape)
    ]
    if wrong:
        raise UserError(f"cannot import {source}: {len(wrong)} tensors of another shape, by our names ({some(wrong)})")
    return dict(section.model_dump(mode="json"))


def _parts(pipeline: Path) -> dict[str, Path]:
    """The pipeline's folders that travel along, all of whose files can be read. Raises `UserError`."""
    names = (VAE_FOLDER, TEXT_FOLDER, TOKENIZER_FOLDER)
    parts = {name: pipeline / name for name in names if (pipeline / name).is_dir()}
    for name, part in parts.items():
        if name in _STEMS:
            read_json(part / CONFIG_FILE)
            for file in frozen_files(part, _STEMS[name]):
                Weights(file)
    return parts


def _files(name: str, part: Path) -> list[Path]:
    """The files of a part that lvdm and the libraries read."""
    if name not in _STEMS:
        return sorted(file for file in part.iterdir() if file.is_file())
    index = part / f"{_STEMS[name]}.safetensors.index.json"
    return [part / CONFIG_FILE, *frozen_files(part, _STEMS[name]), *([index] if index.is_file() else [])]


def _vae_scaling(path: Path) -> tuple[float, float]:
    """Scale and shift of an autoencoder of diffusers: theirs is subtracted. Raises `UserError`."""
    config = read_json(path)
    try:
        return float(config.get("scaling_factor", 0.18215)), -float(config.get("shift_factor") or 0.0)
    except (TypeError, ValueError):
        raise UserError(f"{path}: scaling_factor and shift_factor must be numbers") from None


def _training(
    source: Path, target: Path, model: Mapping[str, Any], parts: Mapping[str, Path], scaling: tuple[float, float]
) -> dict[str, Any]:
    """A training config around the model, as sampling needs it; empty without the models to sample with."""
    if not parts.keys() >= {VAE_FOLDER, TEXT_FOLDER, TOKENIZER_FOLDER}:
        return {}
    scheduler = source / "scheduler" / "scheduler_config.json"
    diffusion = diffusers.our_diffusion(read_json(scheduler), str(scheduler)) if scheduler.is_file() else {}
    positions = read_json(parts[TEXT_FOLDER] / CONFIG_FILE).get("max_position_embeddings", 77)
    return {
        "task": "latent_diffusion",
        "run": {"folder": f"runs/{target.name}", "steps": 1},
        "batch": {"size": 1, "micro": 1},
        "data": {"kind": "video", "video": {"shards": ["data/my_videos/shards"]}},
        "model": dict(model),
        "diffusion": diffusion,
        "vae": {
            "kind": "diffusers",
            "name": str(target),
            "subfolder": VAE_FOLDER,
            "scale": scaling[0],
            "shift": scaling[1],
        },
        "text": {
            "name": str(target),
            "subfolder": TEXT_FOLDER,
            "max_length": min(77, positions),
            "mask_padding": False,
        },
        "optim": {"lr": 6e-5},
    }
