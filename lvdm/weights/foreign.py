"""Reading the files of other projects: tensors by name, each read when asked for, never unpickled code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvdm.errors import UserError
from lvdm.weights.native import Weights

_DIFFUSERS_NAME = "diffusion_pytorch_model"


class Renamed(Mapping[str, Tensor]):
    """Tensors of another mapping under other names, each changed by a function when it is asked for."""

    def __init__(
        self, source: Mapping[str, Tensor], names: Mapping[str, str], change: Callable[[str, Tensor], Tensor]
    ) -> None:
        """``names`` gives, by new name, the name in ``source``; ``change`` is given the new name and the tensor."""
        self._source = source
        self._names = names
        self._change = change

    def __getitem__(self, name: str) -> Tensor:
        return self._change(name, self._source[self._names[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Shards(Mapping[str, Tensor]):
    """The tensors of several safetensors files."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._file_of = {name: weights for weights in map(Weights, files) for name in weights}

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def open_tensors(path: str | Path) -> Mapping[str, Tensor]:
    """The tensors of a ``.safetensors`` file, of a ``.ckpt``, ``.pt`` or ``.bin`` file, or of a folder of diffusers.

    A pickled file is read with ``weights_only`` and memory-mapped; its ``state_dict`` is taken if it has one.

    Raises:
        UserError: there is none, or it is truncated or holds anything but tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return Weights(path)
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"no weights at {path}") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError):
        raise UserError(f"{path} is no readable checkpoint of tensors: truncated, or it holds code") from None
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping of tensors but a {type(tree).__name__}")
    return {name: tensor for name, tensor in tree.items() if isinstance(tensor, Tensor)}


def _open_folder(folder: Path) -> Mapping[str, Tensor]:
    index = folder / f"{_DIFFUSERS_NAME}.safetensors.index.json"
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or any(Path(str(name)).name != name for name in files.values()):
            raise UserError(f"{index} is no index of files beside it")
        return _Shards(folder / name for name in sorted(set(files.values())))
    for suffix in (".safetensors", ".bin"):
        if (folder / (_DIFFUSERS_NAME + suffix)).is_file():
            return open_tensors(folder / (_DIFFUSERS_NAME + suffix))
    raise UserError(f"{folder} holds no {_DIFFUSERS_NAME}.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError`."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} holds no JSON object")
    return document


def check_names(given: Iterable[str], wanted: Iterable[str], source: str, layout: str) -> None:
    """Raise `UserError`, one line, when names are missing or unexpected."""
    have, want = set(given), set(wanted)
    faults = {"missing": sorted(want - have), "unexpected": sorted(have - want)}
    parts = [
        f"{len(names)} {fault} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for fault, names in faults.items()
        if names
    ]
    if parts:
        raise UserError(f"{source} is not of the layout {layout}: tensors {', '.join(parts)}")
