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
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from lvdm.data.index import SampleRecord
from lvdm.storage import cache_folder, locate, read_range

WASTE = 0.02
"""Bytes that may be read in vain to join two reads into one, as a fraction of what is wanted."""

_SIDE_BY_SIDE = 8  # reads from a store under way in one worker
_UNIT = 1000  # of how many parts a cache is, in which what was put is counted
_SWEEP = 50  # parts that all processes put between two sweeps


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
        self._unnoted = most_bytes // _UNIT  # as if another process had ended before it noted what it put

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
        """Keep bytes, unless another process is making room; a full disk is no fault."""
        self._unnoted += len(data)
        if self._unnoted >= self.most_bytes / _UNIT and not self._make_room():
            self._unnoted -= len(data)
            return
        path = self._path(span)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _path(self, span: Span) -> Path:
        return self._folder / hashlib.sha256(f"{span.start}-{span.end} {span.tag} {span.url}".encode()).hexdigest()[:32]

    def _make_room(self) -> bool:
        """Note what this process puts, and sweep when all have put enough; False if another one is at it."""
        try:
            with open(self._folder / ".lock", "ab") as lock:  # a byte for each part that was put since the last sweep
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.write(b"." * min(self._unnoted * _UNIT // max(self.most_bytes, 1), _UNIT))
                if lock.tell() >= _SWEEP:
                    self._sweep()
                    lock.truncate(0)
        except OSError:
            return False
        self._unnoted = 0
        return True

    def _sweep(self) -> None:
        """Remove what was used least recently, down to nine tenths."""
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    files.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= 0.9 * self.most_bytes:
                break
            if not path.endswith("/.lock"):
                with contextlib.suppress(OSError):
                    os.unlink(path)
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
            Requeue: it could not be read whole in `lvdm.storage.ATTEMPTS` attempts.
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


def _read_span(span: Span) -> bytes:
    return read_range(span.url, span.start, span.end)
