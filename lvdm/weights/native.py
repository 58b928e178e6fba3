"""The exported folder: ``model.safetensors`` (one model's weights) and ``config.json`` (what it is, where it is from).

::

    config.json = {"format": "lvdm", "version": 1, "model": {"kind": ..., ...}, "training": {...},
                   "weights": "ema" | "live", "provenance": {...}}

Above a size the weights are several files, ``model-00001-of-00003.safetensors`` and so on, with an index
``model.safetensors.index.json`` of which tensor is where, as transformers and diffusers have them.

Written tensor by tensor into a temporary folder that is renamed when complete, so a folder is whole or absent, and
exporting needs the memory of one tensor. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lvdm.errors import UserError
from lvdm.storage import new_folder, read_json, sync, write_json
from lvdm.weights.conversion import LazyTensor

FORMAT = "lvdm"
VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_STEM = "model"
_COMPARED = 4 << 20  # bytes compared at once

State = Mapping[str, LazyTensor] | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""Tensors to be written. Where shapes and types are known before a tensor is read, a file takes one pass, not two."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Writing:
    """How weights are written."""

    shard_size: int = 5 * 10**9
    """Bytes of tensors above which they go into several files; a larger tensor has a file to itself."""
    verify: bool = False
    """Whether to read the files again, from the disk, and compare them bit for bit with their source."""


SHARDED = Writing()


class Weights(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for."""

    def __init__(self, *paths: str | Path) -> None:
        """Raises `UserError` when a file is missing, truncated or no safetensors file, or two hold the same tensor."""
        self._file_of: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        """Name of the file that each tensor is in."""
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
                names = list(file.keys())
            except FileNotFoundError:
                raise UserError(f"no weights at {path}") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a readable safetensors file: {error}") from None
            for name in names:
                if name in self._file_of:
                    raise UserError(f"tensor {name} is in both {self.places[name]} and {Path(path).name}, of {path}")
                self._file_of[name], self.places[name] = file, Path(path).name

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers alone."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Type of every tensor, from the headers alone. Raises `UserError` where one is of a type that is not used."""
        types = {text: dtype for dtype, text in _DTYPES.items()}
        found = {name: file.get_slice(name).get_dtype() for name, file in self._file_of.items()}
        for name, text in found.items():
            if text not in types:
                raise UserError(f"tensor {name} in {self.places[name]} is of type {text}, not of {', '.join(types)}")
        return {name: types[text] for name, text in found.items()}


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of an exported folder, in order. Raises `UserError` as `read_index` does."""
    index = Path(folder) / index_name(_STEM)
    if not index.is_file():
        return [Path(folder) / WEIGHTS_FILE]
    if (Path(folder) / WEIGHTS_FILE).exists():
        raise UserError(f"{folder} holds both {WEIGHTS_FILE} and {index.name}; remove the one that does not belong")
    return [Path(folder) / name for name in sorted(set(read_index(index).values()))]


def read_index(path: Path) -> dict[str, str]:
    """Name of the file beside ``path`` that each tensor is in.

    Raises:
        UserError: it is no index of safetensors files beside it.
    """
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path} is no index of weights: it has no weight_map")
    for name, file in places.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\0" in file:
            raise UserError(f"{path} puts tensor {name} into {file!r}, which is no safetensors file beside it")
    return places


def open_weights(folder: str | Path) -> Weights:
    """The weights of an exported folder, of one file or several.

    Raises:
        UserError: a file is missing or damaged, or the index says otherwise than the files.
    """
    weights = Weights(*weight_files(folder))
    index = Path(folder) / index_name(_STEM)
    if index.is_file():
        places = read_index(index)
        wrong = [
            name for name in sorted(places.keys() | weights.keys()) if places.get(name) != weights.places.get(name)
        ]
        if wrong:
            raise UserError(f"{index} does not fit the files beside it: {len(wrong)} tensors ({_some(wrong)})")
    return weights


def index_name(stem: str) -> str:
    """File name of the index of several files of weights."""
    return f"{stem}.safetensors.index.json"


def save_model(
    folder: str | Path,
    state: State,
    config: Mapping[str, Any],
    parts: Mapping[str, Path] | None = None,
    add: Callable[[Path], None] | None = None,
    writing: Writing = SHARDED,
) -> None:
    """Write an exported folder; ``config`` holds all of config.json but format and version.

    Args:
        parts: exported folders that travel along, by the name of the subfolder they are copied to.
        add: called with the folder while it is being written, to put more files into it.
        writing: not for pairs in ``state``, which go into one file.
    Raises:
        UserError: ``folder`` exists, or cannot be written, or cannot be read again as it was written.
    """
    with new_folder(Path(folder)) as temporary:
        if isinstance(state, Mapping):
            write_weights(temporary, _STEM, state, writing)
        else:
            write_safetensors(temporary / WEIGHTS_FILE, state)
        write_json(temporary / CONFIG_FILE, as_document(config))
        for name, part in (parts or {}).items():
            copy_model(part, temporary / name, writing.verify)
        if add:
            add(temporary)


def copy_model(source: Path, target: Path, verify: bool = False) -> None:
    """Copy weights and config of an exported folder to the new folder ``target``. Raises `UserError`.

    Args:
        verify: read the copies, from the disk, and compare them.
    """
    files = [source / CONFIG_FILE, *weight_files(source)]
    index = source / index_name(_STEM)
    target.mkdir()
    for file in [*files, index] if index.is_file() else files:
        try:
            shutil.copyfile(file, target / file.name)
        except FileNotFoundError:
            raise UserError(f"{source} is not an exported model: {file.name} is missing") from None
        sync(target / file.name)
        if verify:
            _check_copy(file, target / file.name)
    sync(target)


def _check_copy(source: Path, copy: Path) -> None:
    with source.open("rb") as wanted, copy.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what the disk holds, not the cache
        while part := wanted.read(_COMPARED):
            check_bytes(file, memoryview(part), f"the copy of {source}")


def as_document(config: Mapping[str, Any]) -> dict[str, Any]:
    """All of config.json."""
    return {"format": FORMAT, "version": VERSION, **config}


def read_model(folder: str | Path) -> tuple[dict[str, Any], Weights]:
    """Config document and weights of an exported folder.

    Raises:
        UserError: it is no exported folder, or one of a newer version.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} is not an exported model: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON") from None
    if (
        not isinstance(document, dict)
        or document.get("format") != FORMAT
        or not isinstance(document.get("model"), dict)
    ):
        raise UserError(f"{path} does not describe a model exported by lvdm (tools/export_checkpoint.py writes one)")
    if document.get("version") != VERSION:
        raise UserError(f"{path} has version {document.get('version')!r} of the format; this lvdm reads {VERSION}")
    return document, open_weights(folder)


def load_into(module: nn.Module, folder: str | Path, strict: bool = True) -> list[str]:
    """Copy the weights of an exported folder into ``module``, cast to its types.

    Args:
        strict: whether every name and shape must fit; if not, what fits is copied.
    Returns:
        What was not taken, in words; nothing where all fits.
    Raises:
        UserError: names missing, unexpected and misshaped tensors, or nothing fits. Nothing was copied then.
    """
    _, weights = read_model(folder)
    return copy_weights(module, weights, source=str(folder), strict=strict)


def copy_weights(module: nn.Module, weights: Weights, source: str, strict: bool = True) -> list[str]:
    """As `load_into`, from weights already open; ``source`` names them in the error."""
    own = module.state_dict()
    assert not any(tensor.is_meta for tensor in own.values()), "the module needs storage: module.to_empty(device=...)"
    given = weights.shapes()
    fitting = [name for name in own if given.get(name) == tuple(own[name].shape)]
    faults = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {list(given[name])} for {list(own[name].shape)}"
            for name in own
            if name in given and given[name] != tuple(own[name].shape)
        ],
    }
    parts = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]
    if parts and (strict or not fitting):
        raise UserError(f"the weights in {source} are of another model: tensors {', '.join(parts)}")
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(weights[name])
    return [f"{source}: {len(fitting)} of {len(own)} tensors taken; {', '.join(parts)}"] if parts else []


def write_weights(
    folder: Path, stem: str, state: Mapping[str, LazyTensor] | Mapping[str, Tensor], how: Writing
) -> None:
    """Write ``STEM.safetensors``, or several files and their index, tensor by tensor.

    Raises:
        UserError: what was to be verified cannot be read again as it was written.
    """
    tensors = {name: _lazy(tensor) for name, tensor in state.items()}
    shards = _shards(tensors, how.shard_size)
    if len(shards) == 1:
        files = {f"{stem}.safetensors": shards[0]}
    else:
        files = {f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}
    for name, shard in files.items():
        write_safetensors(folder / name, shard)
    if len(files) > 1:
        places = {tensor: name for name, shard in files.items() for tensor in shard}
        total = sum(lazy.nbytes for lazy in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / index_name(stem), index)
    if how.verify:
        for name, shard in files.items():
            check_written(folder / name, shard)


def write_safetensors(path: Path, state: Mapping[str, LazyTensor] | Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file tensor by tensor. Raises `ValueError` when a name comes twice."""
    if isinstance(state, Mapping):
        with path.open("wb") as file:
            file.write(_header(state))
            for name, lazy in state.items():
                _write(file, name, lazy)
            file.flush()
            os.fsync(file.fileno())
        return
    seen: dict[str, LazyTensor] = {}
    with tempfile.TemporaryFile(dir=path.parent) as body:
        for name, tensor in state:
            if name in seen:
                raise ValueError(f"tensor {name} comes twice")
            seen[name] = LazyTensor(tuple(tensor.shape), tensor.dtype, _gone)
            body.write(tensor_bytes(tensor))
        # The header, which knows every offset, comes first in the file, so the body is written aside and appended.
        body.seek(0)
        with path.open("wb") as file:
            file.write(_header(seen))
            shutil.copyfileobj(body, file, 1 << 24)
            file.flush()
            os.fsync(file.fileno())


def _write(file: BinaryIO, name: str, lazy: LazyTensor) -> None:
    """Append one tensor, which is forgotten before the next is read."""
    tensor = lazy.read()
    assert (tuple(tensor.shape), tensor.dtype) == (lazy.shape, lazy.dtype), f"{name} is not as announced"
    file.write(tensor_bytes(tensor))


def check_written(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Compare a safetensors file, read from the disk, with its source, bit for bit. Raises `UserError`."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what the disk holds, not the cache
        check_bytes(file, memoryview(_header(tensors)), f"{path.name}: the header")
        for name, lazy in tensors.items():
            check_bytes(file, tensor_bytes(lazy.read()), f"{path.name}: tensor {name}")
        if file.read(1):
            raise UserError(f"{path.name} is longer than what was written; is the disk in order?")


def check_bytes(file: BinaryIO, wanted: memoryview, what: str) -> None:
    """Compare the next bytes of ``file`` with those wanted. Raises `UserError`, naming ``what``."""
    for start in range(0, len(wanted), _COMPARED):
        part = wanted[start : start + _COMPARED]
        found = b""
        while len(found) < len(part) and (more := file.read(len(part) - len(found))):
            found += more
        if found != part:
            raise UserError(f"{what} reads otherwise than it was written; is the disk in order?")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; of one that is contiguous already and on the CPU, its own memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def _header(tensors: Mapping[str, LazyTensor]) -> bytes:
    """The head of a safetensors file of these tensors in their order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, lazy in tensors.items():
        offsets = [place, place + lazy.nbytes]
        entries[name] = {"dtype": _DTYPES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": offsets}
        place += lazy.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    return struct.pack("<Q", len(text)) + text


def _shards(tensors: Mapping[str, LazyTensor], size: int) -> list[dict[str, LazyTensor]]:
    """The tensors in their order, in groups of up to ``size`` bytes."""
    shards: list[dict[str, LazyTensor]] = [{}]
    used = 0
    for name, lazy in tensors.items():
        if shards[-1] and used + lazy.nbytes > size:
            shards.append({})
            used = 0
        shards[-1][name] = lazy
        used += lazy.nbytes
    return shards


def _lazy(tensor: LazyTensor | Tensor) -> LazyTensor:
    return tensor if isinstance(tensor, LazyTensor) else LazyTensor.of(tensor)


def _gone() -> Tensor:
    raise AssertionError("a tensor of a stream is read once")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
