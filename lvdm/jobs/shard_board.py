"""What a folder says about the shards of a job that any number of processes work on.

``NNNNN_manifest.json``, written last, makes a shard finished: sizes and SHA-256 of its tar and parquet file, counts,
and a digest of the settings. ``.failed/NNNNN-*.json`` are the attempts that failed, a file each, so that nobody's
count is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lvdm.data.writer import FileDigest, ShardStats
from lvdm.errors import UserError
from lvdm.storage import Missing, atomic_file, file_info, locate, persistently, read_file, read_range

MANIFEST = "_manifest.json"
FAILED = ".failed"
ATTEMPTS = 3
"""Times that a shard is tried before it is given up."""
_THREADS = 16
_BLOCK = 32 << 20  # bytes hashed at once


@dataclass(frozen=True)
class Manifest:
    """What ``NNNNN_manifest.json`` says."""

    settings: str
    """SHA-256 of the job's settings."""
    samples: int
    """Samples in the tar."""
    left_out: list[list[Any]]
    """Row in the source's index, key and reason of the samples that are not."""
    files: dict[str, FileDigest]
    """The tar and the parquet file, by extension."""


class Board:
    """Which shards of a job are finished or given up, as `look` last found it.

    Args:
        numbers: the shards of the job.
        settings: digest that the manifests must have.
        hashes: whether the bytes of finished shards are held against their manifests too, not their sizes alone.
    """

    def __init__(self, folder: str, numbers: Iterable[int], settings: str, *, hashes: bool = False) -> None:
        self.folder, self.numbers, self.settings, self.hashes = folder.rstrip("/"), list(numbers), settings, hashes
        self.finished: dict[int, Manifest] = {}
        self.failures: dict[int, int] = {}
        """Failed attempts by shard."""
        self._next = 0.0

    @property
    def open(self) -> list[int]:
        """Shards that are neither finished nor given up."""
        return [n for n in self.numbers if n not in self.finished and self.failures.get(n, 0) < ATTEMPTS]

    @property
    def given_up(self) -> list[int]:
        """Shards that failed too often."""
        return [n for n in self.numbers if n not in self.finished and self.failures.get(n, 0) >= ATTEMPTS]

    def look(self, at_most_every: float = 0.0) -> None:
        """List the folder and read the manifests that are new, if the last time is so many seconds ago, and long ago
        by how long it took. Raises `UserError` and `Requeue`."""
        started = time.monotonic()
        if at_most_every and started < self._next:
            return
        sizes = _list(self.folder)
        self.finished = {n: found for n, found in self.finished.items() if _complete(n, found, sizes)}
        new = [n for n in self.numbers if n not in self.finished and f"{n:05d}{MANIFEST}" in sizes]
        with ThreadPoolExecutor(_THREADS) as pool:
            for number, found in zip(new, pool.map(self._read, new), strict=True):
                if found is not None and _complete(number, found, sizes):
                    self.finished[number] = found
        counts: dict[int, int] = defaultdict(int)
        for name in _list(f"{self.folder}/{FAILED}"):
            digits = name.partition("-")[0]
            if digits.isdigit():
                counts[int(digits)] += 1
        self.failures = dict(counts)
        now = time.monotonic()
        self._next = now + max(at_most_every, 20 * (now - started))

    def is_finished(self, number: int) -> bool:
        """Whether a shard is finished by now. Raises `UserError` and `Requeue`."""
        found = self._read(number)
        if found is None:
            return False
        locate(self.folder)[0].invalidate_cache()
        try:
            sizes = {name: file_info(f"{self.folder}/{number:05d}.{name}")[0] for name in found.files}
        except Missing:
            return False
        if any(sizes[name] != file.size for name, file in found.files.items()):
            return False
        self.finished[number] = found
        return True

    def finish(self, number: int, stats: ShardStats, left_out: list[list[Any]]) -> None:
        """Write a shard's manifest, when all its files are there."""
        found = Manifest(self.settings, stats.successes, left_out, stats.files)
        with atomic_file(f"{self.folder}/{number:05d}{MANIFEST}") as path:
            Path(path).write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
        self.finished[number] = found

    def fail(self, number: int, reason: str) -> None:
        """Record a failed attempt."""
        with atomic_file(f"{self.folder}/{FAILED}/{number:05d}-{secrets.token_hex(6)}.json") as path:
            Path(path).write_text(json.dumps({"reason": reason}) + "\n", encoding="utf-8")
        self.failures[number] = self.failures.get(number, 0) + 1

    def reason(self, number: int) -> str:
        """Why a shard failed, one of the times."""
        folder = f"{self.folder}/{FAILED}"
        name = next(name for name in sorted(_list(folder)) if name.startswith(f"{number:05d}-"))
        return str(json.loads(read_file(f"{folder}/{name}"))["reason"])

    def _read(self, number: int) -> Manifest | None:
        """The manifest of a shard; nothing if it is missing, unreadable, of other settings or not of these bytes."""
        try:
            tree = json.loads(read_file(f"{self.folder}/{number:05d}{MANIFEST}"))
            files = {name: FileDigest(**file) for name, file in tree.pop("files").items()}
            found = Manifest(files=files, **tree)
        except (Missing, json.JSONDecodeError, KeyError, TypeError, AttributeError):
            return None
        if found.settings != self.settings:
            return None
        if self.hashes and any(
            _hash(f"{self.folder}/{number:05d}.{name}", file.size) != file.sha256 for name, file in files.items()
        ):
            return None
        return found


def _complete(number: int, found: Manifest, sizes: dict[str, int]) -> bool:
    names = {f"{number:05d}.{extension}": file.size for extension, file in found.files.items()}
    return f"{number:05d}{MANIFEST}" in sizes and all(sizes.get(name) == size for name, size in names.items())


def _list(folder: str) -> dict[str, int]:
    """Sizes of the files in a folder by name; none if there is no folder. Raises `UserError` and `Requeue`."""
    locate(folder)[0].invalidate_cache()
    try:
        entries = persistently(folder, lambda fs, root: list(fs.ls(root, detail=True)), patient=True)
    except Missing:
        return {}
    return {str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]: int(entry.get("size") or 0) for entry in entries}


def _hash(url: str, size: int) -> str:
    digest = hashlib.sha256()
    try:
        for start in range(0, size, _BLOCK):
            digest.update(read_range(url, start, min(start + _BLOCK, size)))
    except UserError:
        return ""
    return digest.hexdigest()
