"""Files of ``torch.save``: read without unpickling anything but tensors, written tensor by tensor."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from lvdm.errors import UserError
from lvdm.weights.conversion import LazyTensor
from lvdm.weights.native import Weights, check_bytes, tensor_bytes

_ROOT = "archive"  # folder of the file, which is a ZIP archive
_ALIGNMENT = 64  # of tensors in the file, as torch writes them


def read_tensors(path: str | Path) -> Mapping[str, Tensor]:
    """The tensors of a ``.ckpt``, ``.pt`` or ``.safetensors`` file, memory-mapped.

    Of a checkpoint that holds more than a dict of tensors, its ``state_dict``.

    Raises:
        UserError: the file is missing, damaged, or holds other objects than tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(2)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if head not in (b"PK", b"\x80\x02", b"\x80\x04"):
        return Weights(path)
    if head == b"PK":
        _check_archive(path)
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=head == b"PK")
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds Python objects beside tensors, which are never unpickled; save its state_dict alone"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its opcodes come to
        raise UserError(f"{path} is damaged or no checkpoint of torch: {_one_line(error)}") from None
    if isinstance(tree, Mapping) and isinstance(tree.get("state_dict"), Mapping):
        tree = tree["state_dict"]
    if not isinstance(tree, Mapping) or not tree or not all(isinstance(name, str) for name in tree):
        raise UserError(f"{path} holds no state dict")
    for name, tensor in tree.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise UserError(f"{path}: {name} is no plain tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} claims to be larger than what the file holds of it")
    return tree


def write_torch_file(path: str | Path, tensors: Mapping[str, LazyTensor], verify: bool = False) -> None:
    """Write ``{"state_dict": tensors}`` as ``torch.save`` would, holding one tensor at a time in memory.

    Args:
        verify: read the file again, from the disk, and compare every tensor with its source bit for bit.
    Raises:
        UserError: what was to be verified is not as it was written.
    """
    order = list({id(lazy): lazy for lazy in tensors.values()}.values())  # a second name is no second tensor
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write(archive, f"{_ROOT}/data.pkl", _pickled(tensors, order))
        _write(archive, f"{_ROOT}/byteorder", b"little")
        for number, lazy in enumerate(order):
            data = lazy.read()
            assert tuple(data.shape) == lazy.shape, f"shape {tuple(data.shape)} for {lazy.shape}"
            assert data.dtype == lazy.dtype, f"{data.dtype} for {lazy.dtype}"
            _write(archive, f"{_ROOT}/data/{number}", tensor_bytes(data))
        _write(archive, f"{_ROOT}/version", b"3\n")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    if verify:
        _check_written(path, tensors, order)


def _check_written(path: str | Path, tensors: Mapping[str, LazyTensor], order: list[LazyTensor]) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what the disk holds, not the cache
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in read_tensors(path).items()}
    if found != {name: (lazy.shape, lazy.dtype) for name, lazy in tensors.items()}:
        raise UserError(f"{path} names other tensors than were written; is the disk in order?")
    names = {id(lazy): name for name, lazy in tensors.items()}
    with zipfile.ZipFile(path) as archive:
        for number, lazy in enumerate(order):
            with archive.open(f"{_ROOT}/data/{number}") as member:
                check_bytes(cast(BinaryIO, member), tensor_bytes(lazy.read()), f"{path}: tensor {names[id(lazy)]}")


class _StorageRef:
    """Stands for a tensor's bytes in the pickle."""

    def __init__(self, number: int, lazy: LazyTensor) -> None:
        self.number = number
        self.lazy = lazy


class _Blank:
    """Pickles as the call that rebuilds a contiguous tensor on its storage."""

    def __init__(self, storage: _StorageRef) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[object, ...]:
        from collections import OrderedDict

        shape = self.storage.lazy.shape
        strides = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    """Writes storages as the references that ``torch.load`` resolves."""

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, _StorageRef):
            return None
        kind = getattr(torch, _STORAGES[obj.lazy.dtype])
        count = int(torch.Size(obj.lazy.shape).numel())
        return "storage", kind, str(obj.number), "cpu", count


_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}


def _pickled(tensors: Mapping[str, LazyTensor], order: list[LazyTensor]) -> bytes:
    storages = {id(lazy): _StorageRef(number, lazy) for number, lazy in enumerate(order)}
    out = io.BytesIO()
    pickler = _Pickler(out, protocol=2)
    pickler.dump({"state_dict": {name: _Blank(storages[id(lazy)]) for name, lazy in tensors.items()}})
    return out.getvalue()


def _write(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Add a member whose data begins at a multiple of the alignment, so that it can be memory-mapped."""
    info = zipfile.ZipInfo(name)
    assert archive.fp is not None
    size = memoryview(data).nbytes
    zip64 = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0  # bytes that zipfile adds for members this large
    begin = archive.fp.tell() + 30 + len(name) + zip64
    padding = (-begin - 4) % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    info.file_size = size
    with archive.open(info, "w") as member:
        member.write(data)


def _check_archive(path: Path) -> None:
    """Compressed members could unfold to any size, so only stored ones are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise UserError(f"{path} is truncated or damaged: {_one_line(error)}") from None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(f"{path} has compressed members, which torch never writes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise UserError(f"{path} claims to hold more than its size")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
