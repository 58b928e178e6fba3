"""Read the bytes of a sample: one ranged read through fsspec, retried a bounded number of times."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from fsspec import AbstractFileSystem

from lvdm.data.index import SampleRecord
from lvdm.errors import Requeue, UserError
from lvdm.storage import locate

ATTEMPTS = 5
FIRST_PAUSE = 0.2
"""Seconds before the second attempt, doubled for each one after it and jittered by half."""

_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_OURS = (TypeError, ValueError, ImportError, NotImplementedError)  # a fault of a call, which no retry mends


def read_range(url: str, offset: int, size: int) -> bytes:
    """Bytes ``[offset, offset + size)`` of ``url`` (any fsspec URL).

    Raises:
        UserError: the object is not there or may not be read.
        Requeue: it could not be read whole in `ATTEMPTS` attempts.
    """

    def read(fs: AbstractFileSystem, path: str) -> bytes:
        data = bytes(fs.cat_file(path, start=offset, end=offset + size))
        if len(data) != size:
            raise OSError(f"{len(data)} bytes came instead of {size}")
        return data

    return _persistently(url, read)


def read_file(url: str) -> bytes:
    """All bytes of ``url`` (a path or any fsspec URL). Raises as `read_range` does."""
    return _persistently(url, lambda fs, path: bytes(fs.cat_file(path)))


def read_sample(record: SampleRecord) -> dict[str, bytes]:
    """The members of a sample by extension, in one read. Raises as `read_range` does."""
    data = read_range(record.shard, record.offset, record.size)
    return {
        extension: data[offset - record.offset : offset - record.offset + size]
        for extension, (offset, size) in record.members.items()
    }


def _persistently(url: str, read: Callable[[AbstractFileSystem, str], bytes]) -> bytes:
    fs, path = locate(url)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        try:
            return read(fs, path)
        except _GONE as error:
            raise UserError(f"cannot read {url}: {type(error).__name__}; was it moved or deleted?") from None
        except _OURS:
            raise
        except Exception as error:  # each store's client has error classes of its own
            last = error
    raise Requeue(f"cannot read {url} after {ATTEMPTS} attempts: {type(last).__name__}: {last}")
