"""The exported folder: ``model.safetensors`` (one model's weights) and ``config.json`` (what it is, where it is from).

::

    config.json = {"format": "lvdm", "version": 1, "model": {"kind": ..., ...}, "training": {...},
                   "weights": "ema" | "live", "provenance": {...}}

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
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lvdm.errors import UserError
from lvdm.storage import new_folder, write_json

FORMAT = "lvdm"
VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

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


class Weights(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: str | Path) -> None:
        """Raises `UserError` when the file is missing, truncated or no safetensors file."""
        try:
            self._file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"no weights at {path}") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from None
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the header alone."""
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self._names}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Type of every tensor, from the header alone."""
        types = {text: dtype for dtype, text in _DTYPES.items()}
        return {name: types[self._file.get_slice(name).get_dtype()] for name in self._names}


def save_model(
    folder: str | Path,
    state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    parts: Mapping[str, Path] | None = None,
    add: Callable[[Path], None] | None = None,
) -> None:
    """Write an exported folder; ``config`` holds all of config.json but format and version.

    Args:
        parts: exported folders that travel along, by the name of the subfolder they are copied to.
        add: called with the folder while it is being written, to put more files into it.
    Raises:
        UserError: ``folder`` exists, or cannot be written.
    """
    with new_folder(Path(folder)) as temporary:
        write_safetensors(temporary / WEIGHTS_FILE, state.items() if isinstance(state, Mapping) else state)
        write_json(temporary / CONFIG_FILE, as_document(config))
        for name, part in (parts or {}).items():
            (temporary / name).mkdir()
            for file_name in (WEIGHTS_FILE, CONFIG_FILE):
                shutil.copyfile(part / file_name, temporary / name / file_name)
        if add:
            add(temporary)


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
    except ValueError:
        raise UserError(f"{path} is not valid JSON") from None
    if (
        not isinstance(document, dict)
        or document.get("format") != FORMAT
        or not isinstance(document.get("model"), dict)
    ):
        raise UserError(f"{path} does not describe a model exported by lvdm (tools/export_checkpoint.py writes one)")
    if document.get("version") != VERSION:
        raise UserError(f"{path} has version {document.get('version')!r} of the format; this lvdm reads {VERSION}")
    return document, Weights(folder / WEIGHTS_FILE)


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


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file tensor by tensor. Raises `ValueError` when a name comes twice."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    with tempfile.TemporaryFile(dir=path.parent) as body:
        for name, tensor in tensors:
            if name in header:
                raise ValueError(f"tensor {name} comes twice")
            start = body.tell()
            data = tensor.detach().cpu().contiguous()
            body.write(data.reshape(-1).view(torch.uint8).numpy().data)
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, body.tell()],
            }
        # The header, which knows every offset, comes first in the file, so the body is written aside and appended.
        body.seek(0)
        with path.open("wb") as file:
            _write_header(file, header)
            shutil.copyfileobj(body, file, 1 << 24)
            file.flush()
            os.fsync(file.fileno())


def _write_header(file: BinaryIO, header: dict[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    file.write(struct.pack("<Q", len(text)) + text)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
