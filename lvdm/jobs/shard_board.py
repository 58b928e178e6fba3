"""What a folder says about the shards of a job that any number of processes work on.

``NAME_manifest.json``, written last, makes a shard finished: sizes and SHA-256 of its tar and parquet file, counts, and
digests of the settings and of the source shard. ``.failed/NAME-*.json`` are the attempts that failed, a file each, so
that nobody's count is overwritten. ``.board.json`` holds copies of the manifests, so that a process which starts on a
hundred thousand finished shards reads one file; what it lacks is read from the manifests themselves.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from lvdm.data.writer import FileDigest
from lvdm.errors import UserError
from lvdm.storage import Missing, file_info, locate, persistently, read_file, read_range, write_text

MANIFEST = "_manifest.json"
SUMMARY = ".board.json"
FAILED = ".failed"
ATTEMPTS = 3
"""Times that a shard is tried before it is given up."""
_MARK = 12  # characters of a source's digest in the names of failed attempts
_THREADS = 16
_STATS = 500  # files that one thread asks for
_BLOCK = 32 << 20  # bytes hashed at once
_WORTH_A_SUMMARY = 1000  # manifests
_SIZED = (".tar", ".parquet")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``NAME_manifest.json`` says."""

    settings: str
    """SHA-256 of the job's settings."""
    source: str
    """Digest of what the shard was made from."""
    samples: int
    """Samples in the tar."""
    left_out: list[list[str]]
    """Key and reason of the samples that are not."""
    files: dict[str, FileDigest]
    """The tar and the parquet file, by extension."""
    sums: dict[str, Any] | None
    """`lvdm.jobs.latent_stats.ChannelSums` of the shard; none where there are no latents."""


class Board:
    """Which shards of a job are finished or given up, as `look` last found it. Safe to use from several threads.

    Args:
        sources: digest of what each shard is made from, by its name without ``.tar``.
        settings: digest that the manifests must have.
        hashes: whether the bytes of finished shards are held against their manifests too, not their sizes alone.
    """

    def __init__(self, folder: str, sources: Mapping[str, str], settings: str, *, hashes: bool = False) -> None:
        self.folder, self.sources, self.settings, self.hashes = folder.rstrip("/"), sources, settings, hashes
        self.finished: dict[str, Manifest] = {}
        self.failures: Counter[str] = Counter()
        """Failed attempts by shard."""
        fs, root = locate(self.folder)
        self._local = root if isinstance(fs, LocalFileSystem) else ""
        self._lock = threading.Lock()
        self._next = 0.0
        self._summarised: dict[str, Manifest] = {}
        """What `SUMMARY` holds, as far as this process knows."""

    @property
    def open(self) -> list[str]:
        """Shards that are neither finished nor given up."""
        with self._lock:
            return [n for n in self.sources if n not in self.finished and self.failures[n] < ATTEMPTS]

    @property
    def given_up(self) -> list[str]:
        """Shards that failed too often."""
        with self._lock:
            return [n for n, count in self.failures.items() if n not in self.finished and count >= ATTEMPTS]

    @property
    def content(self) -> str:
        """Digest of all finished shards."""
        with self._lock:
            files = {name: manifest.files["tar"].sha256 for name, manifest in self.finished.items()}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    def look(self, at_most_every: float = 0.0) -> None:
        """List the folder and read the manifests that are new, if the last time is so many seconds ago, and long ago
        by how long it took. Raises `UserError` and `Requeue`."""
        started = time.monotonic()
        if at_most_every and started < self._next:
            return
        sizes = list_files(self.folder, sizes_of=_SIZED)
        known = self.finished or self._summary()
        found = {name: manifest for name, manifest in known.items() if self._holds(name, manifest, sizes)}
        new = [name for name in self.sources if name not in found and f"{name}{MANIFEST}" in sizes]
        with ThreadPoolExecutor(_THREADS) as pool:
            for name, manifest in zip(new, pool.map(self._read, new), strict=True):
                if manifest is not None and self._holds(name, manifest, sizes):
                    found[name] = manifest
        failures = Counter(self._failures().values())
        with self._lock:
            self.finished, self.failures = found, failures
        # by a share of what there is, so that all summaries together take a few times what the last one does
        if len(found) - len(self._summarised) >= max(_WORTH_A_SUMMARY, len(self._summarised) // 4):
            self.summarise()
        now = time.monotonic()
        self._next = now + max(at_most_every, 20 * (now - started))

    def is_finished(self, name: str) -> bool:
        """Whether a shard is finished by now. Raises `UserError` and `Requeue`."""
        manifest = self._read(name)
        if manifest is None:
            return False
        locate(self.folder)[0].invalidate_cache()
        try:
            sizes = {f"{name}.{part}": file_info(f"{self.folder}/{name}.{part}")[0] for part in manifest.files}
        except Missing:
            return False
        if not self._holds(name, manifest, {f"{name}{MANIFEST}": 0, **sizes}):
            return False
        with self._lock:
            self.finished[name] = manifest
        return True

    def finish(self, name: str, manifest: Manifest) -> None:
        """Write a shard's manifest, when all its files are there. Raises `UserError`."""
        _write(f"{self.folder}/{name}{MANIFEST}", asdict(manifest))
        with self._lock:
            self.finished[name] = manifest

    def fail(self, name: str, reason: str) -> None:
        """Record a failed attempt. Raises `UserError`."""
        file = f"{name}-{self.sources[name][:_MARK]}-{secrets.token_hex(6)}.json"
        _write(f"{self.folder}/{FAILED}/{file}", {"reason": reason})
        with self._lock:
            self.failures[name] += 1

    def reasons(self) -> dict[str, str]:
        """Why each shard that was given up failed, one of the times."""
        folder = f"{self.folder}/{FAILED}"
        files = {name: file for file, name in sorted(self._failures().items())}
        found = {}
        for name in sorted(self.given_up):
            try:
                found[name] = str(json.loads(read_file(f"{folder}/{files[name]}"))["reason"])
            except (Missing, ValueError, KeyError, TypeError):
                found[name] = f"what {folder} says of it cannot be read"
        return found

    def _failures(self) -> dict[str, str]:
        """The shard of each failed attempt, by file, but for those at what their sources were before."""
        found = {}
        for file in list_files(f"{self.folder}/{FAILED}"):
            name, _, rest = file.rpartition("-")[0].rpartition("-")
            if name in self.sources and self.sources[name].startswith(rest):
                found[file] = name
        return found

    def summarise(self) -> None:
        """Write `SUMMARY`, unless it holds the manifests that this process knows."""
        with self._lock:
            found = dict(self.finished)
        there = self._summarised
        same = len(found) == len(there) and all(there.get(name) is manifest for name, manifest in found.items())
        if len(found) < _WORTH_A_SUMMARY or same:
            return
        _write(f"{self.folder}/{SUMMARY}", {name: asdict(manifest) for name, manifest in found.items()})
        self._summarised = found

    def _summary(self) -> dict[str, Manifest]:
        if self.hashes:
            return {}
        gc.disable()  # it would go over the many new objects again and again, and find nothing
        try:
            trees = json.loads(read_file(f"{self.folder}/{SUMMARY}"))
            found = {name: _manifest(tree) for name, tree in trees.items()}
        except (Missing, ValueError, KeyError, TypeError, AttributeError):
            return {}
        finally:
            gc.enable()
        self._summarised = found
        return found

    def _content_of(self, name: str) -> bytes:
        """The bytes of a file of the folder; a local one without all that stores need, as there may be many."""
        if self._local:
            with open(f"{self._local}/{name}", "rb") as file:
                return file.read()
        return read_file(f"{self.folder}/{name}")

    def _holds(self, name: str, manifest: Manifest, sizes: Mapping[str, int]) -> bool:
        """Whether a manifest is of these settings and this source, and the files there have the sizes that it says."""
        return (
            manifest.settings == self.settings
            and manifest.source == self.sources.get(name)
            and f"{name}{MANIFEST}" in sizes
            and all(sizes.get(f"{name}.{part}") == file.size for part, file in manifest.files.items())
        )

    def _read(self, name: str) -> Manifest | None:
        """The manifest of a shard; nothing if it is missing, unreadable or not of these bytes."""
        try:
            manifest = _manifest(json.loads(self._content_of(f"{name}{MANIFEST}")))
        except (Missing, FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if self.hashes and any(
            _hash(f"{self.folder}/{name}.{part}", file.size) != file.sha256 for part, file in manifest.files.items()
        ):
            return None
        return manifest


def list_files(folder: str, sizes_of: tuple[str, ...] = ()) -> dict[str, int]:
    """The files in a folder by name, with the sizes of those whose names end in ``sizes_of``, as asking for each takes
    its time; none if there is no folder. Raises `UserError` and `Requeue`."""
    fs, root = locate(folder)
    if isinstance(fs, LocalFileSystem):
        try:
            with os.scandir(root) as entries:
                names = [entry.name for entry in entries if entry.is_file()]
            return dict.fromkeys(names, 0) | _sizes(root, [name for name in names if name.endswith(sizes_of)])
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise UserError(f"cannot read {folder}: {error.strerror}") from None
    fs.invalidate_cache()
    try:
        listed = persistently(folder, lambda fs, root: list(fs.ls(root, detail=True)), patient=True)
    except Missing:
        return {}
    return {str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]: int(entry.get("size") or 0) for entry in listed}


def _sizes(root: str, names: Sequence[str]) -> dict[str, int]:
    """Sizes of files, asked for side by side, as a network file system takes its time for each."""

    def some(first: int) -> dict[str, int]:
        found = {}
        for name in names[first : first + _STATS]:
            with contextlib.suppress(FileNotFoundError):  # others tidy up meanwhile
                found[name] = os.stat(f"{root}/{name}").st_size
        return found

    with ThreadPoolExecutor(_THREADS) as pool:
        return {name: size for part in pool.map(some, range(0, len(names), _STATS)) for name, size in part.items()}


def _manifest(tree: dict[str, Any]) -> Manifest:
    files = {part: FileDigest(file["size"], file["sha256"]) for part, file in tree.pop("files").items()}
    return Manifest(files=files, **tree)


def _write(url: str, document: Mapping[str, Any]) -> None:
    write_text(url, json.dumps(document) + "\n")


def _hash(url: str, size: int) -> str:
    digest = hashlib.sha256()
    try:
        for start in range(0, size, _BLOCK):
            digest.update(read_range(url, start, min(start + _BLOCK, size)))
    except UserError:
        return ""
    return digest.hexdigest()
