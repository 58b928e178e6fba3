"""Read the bytes of samples: ranged reads through fsspec, retried a bounded number of times, cached if wanted.

A micro-batch is fetched in one go: neighbouring ranges of a shard are joined into one read where little is read in
vain, reads from a store run side by side, and what a node has read before comes from its cache.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from lvdm.data.index import SampleRecord
from lvdm.errors import Requeue, UserError
from lvdm.storage import cache_folder, locate, version_tag

T = TypeVar("T")
ATTEMPTS = 6
FIRST_PAUSE = 0.2
"""Seconds before the second attempt, doubled for each one after it and jittered by half."""
READ_TIMEOUT = 60.0
"""Seconds after which a read from a store counts as failed."""
WASTE = 0.02
"""Bytes that may be read in vain to join two reads into one, as a fraction of what is wanted."""

_SIDE_BY_SIDE = 8  # reads from a store under way in one worker
_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_OURS = (TypeError, ValueError, ImportError, NotImplementedError)  # a fault of a call, which no retry mends


@dataclass(frozen=True)
class Span:
    """Bytes of an object."""

    url: str
    start: int
    end: int
    """Exclusive."""
    tag: str = ""
    """Changes with the content of the object (`lvdm.storage.version_tag`): another one is not served from a cache."""


class RangeCache:
    """Ranges on the node's disk, shared by all processes of a user, up to a number of bytes.

    A range is a file that appears whole; the least recently used go first when there are too many bytes. Nothing is
    trusted to be there: a file that another process removes meanwhile is read from its store.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._folder = cache_folder("ranges")
        self._unswept = 0

    def get(self, span: Span) -> bytes | None:
        """The bytes, if they are here."""
        path = self._path(span)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data if len(data) == span.end - span.start else None

    def put(self, span: Span, data: bytes) -> None:
        """Keep bytes; a full disk is no fault."""
        path = self._path(span)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
        self._unswept += len(data)
        if self._unswept > self.most_bytes // 20:
            self._unswept = 0
            self._sweep()

    def _path(self, span: Span) -> Path:
        return self._folder / hashlib.sha256(f"{span.start}-{span.end} {span.tag} {span.url}".encode()).hexdigest()[:32]

    def _sweep(self) -> None:
        """Remove what was used least recently, down to nine tenths; one process does at a time."""
        with open(self._folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return
            with os.scandir(self._folder) as entries:
                files = []
                for entry in entries:
                    with contextlib.suppress(OSError):
                        files.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
            total = sum(size for _, size, _ in files)
            if total <= self.most_bytes:
                return
            for _, size, path in sorted(files):
                if total <= 0.9 * self.most_bytes:
                    break
                if not path.endswith("/.lock"):
                    Path(path).unlink(missing_ok=True)
                    total -= size


class Fetcher:
    """Reads samples; each process that has one makes its own threads."""

    def __init__(self, cache_bytes: int = 0) -> None:
        self._cache_bytes = cache_bytes
        self._cache: RangeCache | None = None
        self.read_bytes = 0
        """Bytes that came from stores."""

    def __reduce__(self) -> tuple[type[Fetcher], tuple[int]]:
        return Fetcher, (self._cache_bytes,)

    def samples(self, records: Sequence[SampleRecord]) -> list[dict[str, bytes]]:
        """The members of samples by extension.

        Raises:
            UserError: a shard is not there or may not be read.
            Requeue: it could not be read whole in `ATTEMPTS` attempts.
        """
        spans = [Span(record.shard, record.offset, record.offset + record.size, record.tag) for record in records]
        return [
            {
                extension: data[offset - record.offset : offset - record.offset + size]
                for extension, (offset, size) in record.members.items()
            }
            for record, data in zip(records, self.spans(spans), strict=True)
        ]

    def spans(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span. Raises as `samples` does."""
        if self._cache_bytes and self._cache is None:
            self._cache = RangeCache(self._cache_bytes)
        found: dict[Span, bytes] = {}
        wanted = sorted(set(spans), key=lambda span: (span.url, span.tag, span.start, span.end))
        remote = {url: not isinstance(locate(url)[0], LocalFileSystem) for url in {span.url for span in wanted}}
        if self._cache is not None:
            for span in wanted:
                data = self._cache.get(span) if remote[span.url] else None
                if data is not None:
                    found[span] = data
        reads = list(joined([span for span in wanted if span not in found]))
        if len(reads) > 1 and remote[reads[0][0].url]:
            with concurrent.futures.ThreadPoolExecutor(min(_SIDE_BY_SIDE, len(reads))) as pool:
                answers = list(pool.map(lambda read: _read_span(read[0]), reads))
        else:
            answers = [_read_span(whole) for whole, _ in reads]
        for (whole, parts), data in zip(reads, answers, strict=True):
            self.read_bytes += len(data)
            for span in parts:
                found[span] = data[span.start - whole.start : span.end - whole.start]
                if self._cache is not None and remote[span.url]:
                    self._cache.put(span, found[span])
        return [found[span] for span in spans]


def joined(spans: Sequence[Span]) -> Iterator[tuple[Span, list[Span]]]:
    """Reads that cover sorted spans, with the spans that each covers; they read at most `WASTE` in vain."""
    group: list[Span] = []
    wanted = end = 0
    for span in spans:
        size = span.end - span.start
        if group and group[0].url == span.url:
            whole, needed = max(end, span.end) - group[0].start, wanted + size
            if span.start < end or whole <= (1 + WASTE) * needed:
                group.append(span)
                wanted, end = needed, max(end, span.end)
                continue
        if group:
            yield replace(group[0], end=end), group
        group, wanted, end = [span], size, span.end
    if group:
        yield replace(group[0], end=end), group


def read_sample(record: SampleRecord) -> dict[str, bytes]:
    """The members of one sample by extension. Raises as `Fetcher.samples` does."""
    return Fetcher().samples([record])[0]


def read_file(url: str) -> bytes:
    """All bytes of ``url`` (a path or any fsspec URL). Raises as `Fetcher.samples` does."""
    return _persistently(url, lambda fs, path: bytes(fs.cat_file(path)))


def file_info(url: str) -> tuple[int, str]:
    """Bytes of a file and its `Span.tag`. Raises as `Fetcher.samples` does, and `UserError` if its size is not told."""
    info = _persistently(url, lambda fs, path: dict(fs.info(path)))
    if info.get("size") is None:
        raise UserError(f"the store does not say how many bytes {url} has")
    return int(info["size"]), version_tag(info)


def _read_span(span: Span) -> bytes:
    size = span.end - span.start

    def read(fs: AbstractFileSystem, path: str) -> bytes:
        data = bytes(fs.cat_file(path, start=span.start, end=span.end))
        if len(data) != size:
            raise OSError(f"{len(data)} bytes came instead of {size}")
        return data

    return _persistently(span.url, read)


def _persistently(url: str, read: Callable[[AbstractFileSystem, str], T]) -> T:
    fs, path = locate(url)
    local = isinstance(fs, LocalFileSystem)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        try:
            return read(fs, path) if local else _within(READ_TIMEOUT, lambda: read(fs, path))
        except _GONE as error:
            raise UserError(f"cannot read {url}: {type(error).__name__}; was it moved or deleted?") from None
        except _OURS:
            raise
        except Exception as error:  # each store's client has error classes of its own
            last = error
    raise Requeue(f"cannot read {url} after {ATTEMPTS} attempts: {type(last).__name__}: {last}")


def _within(seconds: float, read: Callable[[], T]) -> T:
    """What ``read`` gives, unless it takes longer; then it is left to itself, and its thread dies with the process."""
    answer: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(read())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise OSError(f"no answer within {seconds:g} s") from None
