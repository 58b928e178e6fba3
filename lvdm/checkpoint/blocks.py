"""Files whose every block has a checksum in the manifest: what is read is verified before it is used.

A rank that needs a few ranges of a large file reads and checks the blocks they lie in and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from lvdm.errors import UserError
from lvdm.storage import Missing, file_info, locate, persistently, read_range

T = TypeVar("T")
BLOCK = 4 << 20
"""Bytes that have a checksum of their own."""
_THREADS = 2  # reading and hashing overlap; a rank has few cores to spare
_STRIDE = 256 << 10  # bytes that are hashed while the processor still has them in its cache
_STORE_BLOCKS = 8  # in one request to a store
_CHECKED_AT_ONCE = 16  # blocks
_LONGEST_MESSAGE = 2000


class Damaged(Exception):
    """A checkpoint that is not what its manifest says.

    The message names the file and the fault. It is one line without control characters, whatever the file put in it.
    """

    def __init__(self, message: str) -> None:
        line = "".join(letter if letter.isprintable() else "?" for letter in message[:_LONGEST_MESSAGE])
        super().__init__(line + "..." * (len(message) > _LONGEST_MESSAGE))


class Unreadable(Damaged):
    """A disk or a store did not give what is there. No proof against the file, and no reason to delete it."""


def block_digests(data: memoryview) -> list[str]:
    """SHA-256, in hex, of every `BLOCK` of ``data``; the last may be shorter."""
    return [hashlib.sha256(block).hexdigest() for block in _blocks(data)]


def write_blocks(url: str, data: memoryview) -> list[str]:
    """Write ``data`` to the new file ``url`` (a path or any fsspec URL), durably, and read it back.

    Returns:
        The digests of its blocks, of the memory and of what was read back alike.
    Raises:
        OSError: it could not be written, or what was read back differs. Stores raise errors of their own classes.
    """
    fs, path = locate(url)
    local = isinstance(fs, LocalFileSystem)
    with ThreadPoolExecutor(1) as beside, open(path, "xb", buffering=0) if local else fs.open(path, "wb") as file:
        hashed = beside.submit(block_digests, data)
        for block in _blocks(data):
            while block:  # a write may take a part
                block = block[file.write(block) :]
        if local:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # to read what the disk holds, not the cache
        digests = hashed.result()
    try:
        for _ in BlockFile(url, len(data), digests).check():
            pass
    except Damaged as fault:
        raise OSError(f"what was written cannot be read back: {fault}") from None
    return digests


class BlockFile:
    """Verified reading of ranges of a file."""

    def __init__(self, url: str, size: int, digests: Sequence[str]) -> None:
        """The file has ``size`` bytes and blocks of these ``digests``. It is opened when something is read of it."""
        self._handle: int | None = None
        self._cut = (-1, bytearray())  # number and bytes of the last block of which a part was asked for
        self.url, self.size = url, size
        self.bytes_read = 0
        """Bytes that came from the disk or the store."""
        self._digests = digests
        fs, self._path = locate(url)
        self._local = isinstance(fs, LocalFileSystem)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and forget what is kept of it, until something is read again."""
        self._cut = (-1, bytearray())
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def read(self, start: int, end: int) -> bytearray:
        """Bytes ``start`` to ``end``, exclusive. Raises `Damaged`."""
        out = bytearray(end - start)
        self.readinto(start, memoryview(out))
        return out

    def readinto(self, start: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``start`` on. Raises `Damaged`."""
        end = start + len(out)
        assert 0 <= start <= end <= self.size, f"{start} to {end} of {self.size} bytes"
        if start == end:
            return
        first, last = start // BLOCK, -(-end // BLOCK)  # blocks that hold a part of the range
        inner, outer = -(-start // BLOCK), last if end == self.size else end // BLOCK  # blocks that lie within it
        for number in dict.fromkeys((first, last - 1)):
            if not inner <= number < outer:
                begin, block = number * BLOCK, self._block(number)
                low, high = max(start, begin), min(end, begin + len(block))
                out[low - start : high - start] = memoryview(block)[low - begin : high - begin]
        runs = self._runs(inner, outer)
        targets = [out[begin * BLOCK - start : min(stop * BLOCK, end) - start] for begin, stop in runs]
        self._fetch([begin for begin, _ in runs], targets)

    def check(self) -> Iterator[int]:
        """Read and check everything; gives the bytes checked, a part at a time. Raises `Damaged`."""
        step = _CHECKED_AT_ONCE * BLOCK
        buffer = memoryview(bytearray(min(step, self.size)))
        try:
            for start in range(0, self.size, step):
                out = buffer[: min(step, self.size - start)]
                self.readinto(start, out)
                yield len(out)
        finally:
            self.close()

    def _runs(self, inner: int, outer: int) -> list[tuple[int, int]]:
        """First and end of the groups in which blocks ``inner`` to ``outer`` are fetched."""
        count = 1 if self._local else _STORE_BLOCKS
        return [(begin, min(begin + count, outer)) for begin in range(inner, outer, count)]

    def _block(self, number: int) -> bytearray:
        """A whole block, kept until another is asked for."""
        if self._cut[0] != number:
            block = bytearray(min(BLOCK, self.size - number * BLOCK))
            self._fetch([number], [memoryview(block)])
            self._cut = (number, block)
        return self._cut[1]

    def _fetch(self, firsts: Sequence[int], outs: Sequence[memoryview]) -> None:
        """Read and check runs of whole blocks, each from its first block on."""
        if self._local and self._handle is None:
            self._handle = _open_plain_file(self._path, self.url)
            _check_size(self.url, os.fstat(self._handle).st_size, self.size)
        if len(outs) > 1:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(self._fetch_run, firsts, outs))
        else:
            list(map(self._fetch_run, firsts, outs))
        self.bytes_read += sum(map(len, outs))

    def _fetch_run(self, first: int, out: memoryview) -> None:
        begin = first * BLOCK
        if not self._local:
            out[:] = _from_store(lambda: read_range(self.url, begin, begin + len(out)))
        for number, block in enumerate(_blocks(out), start=first):
            digest = hashlib.sha256()
            for start in range(0, len(block), _STRIDE):
                part = block[start : start + _STRIDE]
                if self._handle is not None:
                    _read_plain(self._handle, number * BLOCK + start, part, self.url)
                digest.update(part)
            if digest.hexdigest() != self._digests[number]:
                raise Damaged(f"{self.url} has changed since it was written (SHA-256 of block {number} differs)")


def check_sizes(folder: str, sizes: Mapping[str, int]) -> None:
    """Raise `Damaged` unless ``folder`` holds plain files of these names and sizes; nothing is read."""
    fs, path = locate(folder)
    if isinstance(fs, LocalFileSystem):
        for name, size in sizes.items():
            _check_size(f"{folder}/{name}", _plain_size(f"{path}/{name}", f"{folder}/{name}"), size)
        return
    listed = {name: entry.get("size") for name, entry in list_store(folder).items()}
    for name, size in sizes.items():
        url = f"{folder}/{name}"
        found = listed.get(name)  # one request for all; some stores list nothing, or without sizes
        _check_size(url, _from_store(lambda url=url: file_info(url)[0]) if found is None else found, size)  # type: ignore[misc]


def list_store(folder: str) -> dict[str, dict[str, Any]]:
    """What lies in a folder of a store, by name, as fsspec describes it; nothing if there is none.

    Raises:
        UserError, Requeue: as `persistently` does.
    """

    def read(fs: Any, path: str) -> dict[str, dict[str, Any]]:
        fs.invalidate_cache()
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry for entry in fs.ls(path, detail=True)}

    try:
        return persistently(folder, read, doing="list")
    except Missing:
        return {}


def read_plain_file(url: str, limit: int) -> bytes:
    """All bytes of a small file. Raises `Damaged` if there is none, it is a link, or has more than ``limit`` bytes."""
    fs, path = locate(url)
    if not isinstance(fs, LocalFileSystem):
        size = _from_store(lambda: file_info(url)[0])
        if size > limit:
            raise Damaged(f"{url} has more than {limit} bytes")
        return _from_store(lambda: read_range(url, 0, size)) if size else b""
    handle = _open_plain_file(path, url)
    try:
        size = os.fstat(handle).st_size
        if size > limit:
            raise Damaged(f"{url} has more than {limit} bytes")
        data = bytearray(size)
        _read_plain(handle, 0, memoryview(data), url)
    finally:
        os.close(handle)
    return bytes(data)


def _blocks(data: memoryview) -> Iterator[memoryview]:
    return (data[start : start + BLOCK] for start in range(0, len(data), BLOCK))


def _check_size(url: str, found: int, size: int) -> None:
    if found != size:
        raise Damaged(f"{url} has {found} bytes, not {size}")


def _plain_size(path: str, url: str) -> int:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise Damaged(f"{url} is missing") from None
    except OSError as error:
        raise Unreadable(f"{url} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{url} is no plain file")
    return status.st_size


def _open_plain_file(path: str, url: str) -> int:
    """A handle of a regular file that is no link, so that none leads out of its folder and no pipe is waited for."""
    _plain_size(path, url)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Unreadable(f"{url} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # exchanged just now
        os.close(handle)
        raise Damaged(f"{url} is no plain file")
    return handle


def _read_plain(handle: int, begin: int, out: memoryview, url: str) -> None:
    done = 0
    while done < len(out):
        try:
            count = os.preadv(handle, [out[done:]], begin + done)
        except OSError as error:
            raise Unreadable(f"{url} cannot be read at byte {begin + done}: {error.strerror}") from None
        if count == 0:
            raise Damaged(f"{url} ends at byte {begin + done}")
        done += count


def _from_store(read: Callable[[], T]) -> T:
    """What ``read`` gives of a store's file; `Damaged` if there is none, `Unreadable` if it may not be had."""
    try:
        return read()
    except Missing as error:
        raise Damaged(str(error)) from None
    except UserError as error:
        raise Unreadable(str(error)) from None
