"""Folders of the diffusers library: their tensors by name, read when asked for, and new ones whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lvdm.errors import UserError
from lvdm.storage import read_json, write_json
from lvdm.weights import conversion
from lvdm.weights.conversion import LazyTensor, Mismatch, Unread
from lvdm.weights.native import Weights, Writing, write_weights
from lvdm.weights.torch_file import read_tensors

CONFIG_FILE = "config.json"
_STEM = "diffusion_pytorch_model"


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

    def unread(self) -> dict[str, LazyTensor]:
        """The same, to be written in one pass; a source of tensors that are unread stays so until then."""
        source = self._source
        lazy = source.lazy if isinstance(source, Unread) else {name: LazyTensor.of(source[name]) for name in source}
        return {name: lazy[old].map(partial(self._change, name)) for name, old in self._names.items()}


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


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a model: the file itself, or those of a folder of diffusers.

    Raises:
        UserError: the folder holds none.
    """
    if not path.is_dir():
        return [path]
    index = path / f"{_STEM}.safetensors.index.json"
    if index.is_file():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or any(Path(str(name)).name != name for name in files.values()):
            raise UserError(f"{index} is no index of files beside it")
        return [path / name for name in sorted(set(files.values()))]
    for suffix in (".safetensors", ".bin"):
        if (path / (_STEM + suffix)).is_file():
            return [path / (_STEM + suffix)]
    raise UserError(f"{path} holds no {_STEM}.safetensors")


def open_tensors(path: str | Path) -> Mapping[str, Tensor]:
    """The tensors of a file, as `read_tensors` does, or of a folder of diffusers. Raises `UserError`."""
    files = weight_files(Path(path))
    return read_tensors(files[0]) if len(files) == 1 else _Shards(files)


def check_names(given: Collection[str], wanted: Iterable[str], source: str, layout: str) -> None:
    """Raise `UserError`, one line, when names are missing or unexpected."""
    try:
        conversion.check_names(wanted, (), given)
    except Mismatch as fault:
        raise UserError(f"{source} is not of the layout {layout}: tensors {fault}") from None


def write_model(
    folder: Path, config: Mapping[str, Any], tensors: Renamed, provenance: Mapping[str, Any], writing: Writing
) -> None:
    """Put a model of diffusers into ``folder``, tensor by tensor, with ``provenance.json`` beside it."""
    write_weights(folder, _STEM, tensors.unread(), writing)
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / "provenance.json", provenance)
