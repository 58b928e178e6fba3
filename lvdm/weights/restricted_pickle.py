"""Files of ``torch.save`` that hold more than tensors, read without running anything that they name.

A pickle may call any function of any module. Here its names are looked up in a list of this file, where each stands for
an inert reader: neither torch nor DeepSpeed is called, and a name off the list is refused. What comes out is a tree of
dicts, lists, numbers and `StoredTensor`, whose bytes stay in the file until they are asked for.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from lvdm.errors import UserError

_MOST_PICKLE = 256 << 20  # bytes; names, shapes and settings alone
_MOST_SIDES = 64  # of a tensor
_DEEPEST = 1000  # tuples in tuples; the hash of too many of them ends the process
_CHUNK = 4 << 20  # bytes read at a time where a whole member is checked
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip: signature, lengths of name and extra field


class Archive:
    """A file of ``torch.save``: its tree, and the bytes of its tensors by range.

    A member's checksum is verified before the first of its bytes is used.
    """

    def __init__(self, path: Path) -> None:
        """Read the tree.

        Raises:
            UserError: the file is missing, truncated or damaged, or names what is not on the list.
        """
        self.path = path
        self._verified: set[str] = set()
        self.root, self._members = self._list_members()
        """Name of the folder in the archive, which torch gives it."""
        self.tree = self._unpickle()

    def fault(self, what: str) -> UserError:
        """The error that this file is not what it should be."""
        return UserError(f"{self.path} is damaged or no checkpoint of torch: {printable(what)}")

    def storage_size(self, key: str) -> int:
        """Bytes of a tensor's storage. Raises `UserError` if there is none."""
        return self._member(f"data/{key}")[1]

    def read_storage(self, key: str, start: int, end: int) -> bytearray:
        """Bytes ``start`` to ``end``, exclusive, of a tensor's storage. Raises `UserError`."""
        name = f"data/{key}"
        self._verify(name)
        return self._read(name, start, end)

    def _list_members(self) -> tuple[str, dict[str, tuple[int, int, int]]]:
        """The folder that torch puts all into; first byte, size and checksum of every member, by its name in there."""
        try:
            with self._opened() as file, zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                found = {info.filename.partition("/")[2]: _place(info, file) for info in infos}
            roots = {info.filename.partition("/")[0] for info in infos}
        except UserError:
            raise
        except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError, RuntimeError) as error:
            raise self.fault(str(error)) from None
        if len(roots) != 1 or len(found) != len(infos) or "data.pkl" not in found:
            raise self.fault("it is no archive of one pickle")
        end = 0
        for begin, size, _ in sorted(found.values()):
            if begin < end:
                raise self.fault("its members overlap")
            end = begin + size
        return printable(roots.pop()), found

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The file, for a moment: a checkpoint of many ranks has more files than may be open together."""
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not make it wait
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        with open(handle, "rb", buffering=0) as file:
            yield cast(BinaryIO, file)

    def _member(self, name: str) -> tuple[int, int, int]:
        if name not in self._members:
            raise self.fault(f"it lacks its member {name!r}")
        return self._members[name]

    def _read(self, name: str, start: int, end: int) -> bytearray:
        begin, size, _ = self._member(name)
        assert 0 <= start <= end <= size, f"{start} to {end} of {size} bytes"
        out, done = bytearray(end - start), 0
        view = memoryview(out)
        with self._opened() as file:
            while done < len(out):
                try:
                    count = os.preadv(file.fileno(), [view[done:]], begin + start + done)
                except OSError as error:
                    raise UserError(f"cannot read {self.path}: {error.strerror}") from None
                if not count:
                    raise self.fault("it ends too early")
                done += count
        return out

    def _verify(self, name: str) -> None:
        if name in self._verified:
            return
        _, size, wanted = self._member(name)
        found = 0
        for start in range(0, size, _CHUNK):
            found = zlib.crc32(self._read(name, start, min(start + _CHUNK, size)), found)
        if found != wanted:
            raise self.fault(f"the checksum of its member {name!r} differs from the one it was written with")
        self._verified.add(name)

    def _unpickle(self) -> Any:
        order = self._members.get("byteorder")
        if order and (order[1] != len(b"little") or self._read("byteorder", 0, order[1]) != b"little"):
            raise self.fault("its numbers are not little-endian")
        size = self._member("data.pkl")[1]
        if size > _MOST_PICKLE:
            raise self.fault(f"its pickle has {size} bytes")
        self._verify("data.pkl")
        data = bytes(self._read("data.pkl", 0, size))
        try:
            _check_opcodes(data)
            return _Unpickler(self, data).load()
        except UserError:
            raise
        except Exception as error:  # a damaged pickle raises whatever its opcodes come to
            raise self.fault(f"its pickle cannot be read: {type(error).__name__}: {error}") from None


def _place(info: zipfile.ZipInfo, file: BinaryIO) -> tuple[int, int, int]:
    """First byte, size and checksum of a member. Raises `ValueError` unless it lies in the file as torch writes it."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError("a member is compressed or encrypted, which torch never writes")
    header = os.pread(file.fileno(), _LOCAL_HEADER.size, info.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(header)
    begin = info.header_offset + _LOCAL_HEADER.size + name + extra
    end = begin + info.file_size
    if signature != b"PK\x03\x04" or info.file_size != info.compress_size or end > os.fstat(file.fileno()).st_size:
        raise ValueError(f"member {info.filename!r} does not lie in the file")
    return begin, info.file_size, info.CRC


class _Sealed:
    """An object that a pickle may hold, but not change."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"a state for {type(self).__name__}")


class _Storage(_Sealed):
    """The bytes of a tensor. Sealed and no tuple: a pickle that could take it apart would have the `Archive` itself."""

    __slots__ = ("archive", "dtype", "key")

    def __init__(self, archive: Archive, key: str, dtype: torch.dtype) -> None:
        self.archive, self.key, self.dtype = archive, key, dtype


class StoredTensor(_Sealed):
    """A tensor whose bytes are in an `Archive`."""

    __slots__ = ("_archive", "_key", "_offset", "_strides", "dtype", "shape")

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        """Raises `UserError` if it reaches beyond its storage."""
        archive = storage.archive
        self._archive, self._key, self._offset, self._strides = archive, storage.key, offset, strides
        self.dtype, self.shape = storage.dtype, shape
        numbers = (offset, *shape, *strides)
        if (
            len(strides) != len(shape)
            or len(shape) > _MOST_SIDES
            or any(type(number) is not int or not 0 <= number < 2**60 for number in numbers)
        ):
            raise archive.fault(f"a tensor of shape {shape}, strides {strides} and offset {offset}")
        if self.numel and (offset + self._span) * self.dtype.itemsize > archive.storage_size(storage.key):
            raise archive.fault(f"a tensor of shape {shape} claims to be larger than what the file holds of it")

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def _span(self) -> int:
        """Elements of the storage from its first to its last."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self._strides, strict=True))

    def elements(self, start: int, end: int) -> Tensor:
        """Elements ``start`` to ``end``, exclusive, of a contiguous vector, in its own dtype. Raises `UserError`."""
        if len(self.shape) != 1 or self._strides != (1,) or end > self.numel:
            raise self._archive.fault(f"elements {start} to {end} of a tensor of shape {self.shape}")
        return self._storage(self._offset + start, self._offset + end)

    def whole(self) -> Tensor:
        """The tensor itself, in its own dtype. Raises `UserError`."""
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        if self._span != self.numel:  # gaps, or a number that stands for many
            raise self._archive.fault(f"a tensor of shape {self.shape} and strides {self._strides}")
        return self._storage(self._offset, self._offset + self._span).as_strided(self.shape, self._strides)

    def _storage(self, start: int, end: int) -> Tensor:
        if start == end:
            return torch.empty(0, dtype=self.dtype)
        size = self.dtype.itemsize
        return torch.frombuffer(self._archive.read_storage(self._key, start * size, end * size), dtype=self.dtype)


class _Unpickler(pickle.Unpickler):
    """Unpickles from a list of names, none of which runs foreign code."""

    def __init__(self, archive: Archive, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a class or function. Raises `UserError` unless it is on the list."""
        if (module, name) not in _ADMITTED:
            raise UserError(
                f"{self._archive.path} is refused: its pickle names {printable(module)}.{printable(name)}, which "
                f"DeepSpeed's own files never do; nothing of it was run"
            )
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """The storage of a tensor: archive, key and dtype."""
        match pid:
            case ("storage", _Dtype() as kind, str(key), str(), int()):
                return _Storage(self._archive, key, kind.dtype)
        raise pickle.UnpicklingError(f"reference {str(pid)[:80]}")


class _Table(dict[Any, Any]):
    """Stands for an OrderedDict, which is made empty: a copy of another could be made a million times."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Attributes, which torch gives a state dict, are left out."""


class _Inert(_Sealed):
    """Stands for an object that nobody asks for."""

    __slots__ = ()

    def __new__(cls, *arguments: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Left out."""


class _Call(_Sealed):
    """Stands for a function: a pickle can call it, but not set its attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _Dtype(_Sealed):
    """Stands for a dtype, or the class of storages of it."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return StoredTensor(storage, offset, _size(shape), _size(strides))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _of_type(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    if not isinstance(function, _Call) or not isinstance(arguments, tuple):
        raise pickle.UnpicklingError("a tensor that no function makes")
    return function(*arguments)


def _size(sides: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sides, tuple):  # of which no copy is made
        raise pickle.UnpicklingError(f"a size of a {type(sides).__name__}")
    return sides


def _number(value: Any) -> Any:
    return value


_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Table,
    ("torch", "Size"): _Call(_size),
    ("torch", "device"): _Call(_Inert),
    ("torch", "Tensor"): _Inert,
    ("torch.nn.parameter", "Parameter"): _Inert,
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Call(_of_type),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _Call(_number),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"): _Inert,
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"): _Inert,
    ("deepspeed.utils.tensor_fragment", "fragment_address"): _Inert,
}
"""What DeepSpeed's own files name, and what stands for it."""
_ADMITTED |= {("torch", f"{name}Storage"): _Dtype(dtype) for name, dtype in _STORAGES.items()}
_ADMITTED |= {("torch", str(dtype).removeprefix("torch.")): _Dtype(dtype) for dtype in _STORAGES.values()}


def printable(text: str) -> str:
    """Foreign text as a part of a line on a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split())[:300])


def _check_opcodes(data: bytes) -> None:
    """Refuse what would harm the reader before it can raise: a memo larger than the pickle, and tuples nested so deep
    that hashing one would overrun the stack. Raises `ValueError`.

    What is nowhere on the stack or in the memo, as in a damaged pickle, is for the reader to refuse.
    """
    stack: list[int] = []  # how deep tuples are nested in each object; -1 for a mark
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name or opcode.name == "MEMOIZE":
            number = len(memo) if argument is None else argument
            if not isinstance(number, int) or number > len(data):
                raise ValueError(f"memo {number} in {len(data)} bytes")
            memo[number] = stack[-1] if stack else 0
        elif "GET" in opcode.name:
            stack.append(memo.get(argument, 0) if isinstance(argument, int) else 0)
        elif opcode.name == "MARK":
            stack.append(-1)
        else:
            depth = _taken(stack, opcode) + opcode.name.startswith("TUPLE")
            if depth > _DEEPEST:
                raise ValueError(f"more than {_DEEPEST} tuples in one another")
            stack += [depth] * len(opcode.stack_after)


def _taken(stack: list[int], opcode: pickletools.OpcodeInfo) -> int:
    """Take off what an opcode takes; the deepest of it."""
    deepest, count = 0, len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        while stack and (depth := stack.pop()) >= 0:
            deepest = max(deepest, depth)
        count = opcode.stack_before.index(pickletools.markobject)
    for _ in range(min(count, len(stack))):
        deepest = max(deepest, stack.pop())
    return deepest
