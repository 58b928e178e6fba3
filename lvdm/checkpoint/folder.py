"""The checkpoints of a run, in a local folder or under an fsspec URL: complete or absent, the best kept, found again.

A local checkpoint is assembled in a hidden folder and renamed. Stores have no rename, so there the files of each
attempt have names of their own, and the manifest, which is put last, makes the checkpoint. So it is done, too, where a
local one takes the place of another of its step.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from lvdm.checkpoint import manifest as manifests
from lvdm.checkpoint.blocks import Damaged, Unreadable, check_sizes, list_store, read_plain_file
from lvdm.checkpoint.manifest import Manifest
from lvdm.checkpoint.reader import Checkpoint, step_name, step_of
from lvdm.config import read_tree
from lvdm.errors import Requeue, UserError
from lvdm.storage import Missing, locate, persistently, place_of_run, sync, write_text

LATEST, BEST = "latest", "best"
CHECKPOINTS, CONFIG = "checkpoints", "config.yaml"
"""Where a run has its checkpoints, unless its config names another place."""
SPARE = 64 << 20
"""Bytes that a disk must have beyond what is about to be written."""
_POINTER_LIMIT = 1000


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    last: int = 3
    """The newest ones."""
    every_samples: int = 0
    """The first one behind every multiple of so many samples stays for good; 0 for none."""
    best: int = 0
    """So many with the best validation."""
    score: str = ""
    """Name of the validation that ``best`` goes by; a minus sign in front where more is better."""


@dataclass(frozen=True)
class Attempt:
    """A checkpoint on its way."""

    step: int
    token: str
    """Sets it apart from other attempts at the same step."""
    place: str
    """Where its files are written."""
    final: str
    """Where it will be."""

    @property
    def is_local(self) -> bool:
        """Whether it will be renamed."""
        return self.place != self.final

    def file_name(self, rank: int) -> str:
        """Name of a rank's file."""
        name = f"rank-{rank:05d}.safetensors"
        return name if self.is_local else self.named_apart(name)

    def named_apart(self, name: str) -> str:
        """A rank's file name that no other attempt has."""
        return f"{name.split('.')[0]}.{self.token}.safetensors"


@dataclass(frozen=True)
class _Merits:
    """What retention goes by."""

    samples: int
    scores: Mapping[str, float]


class CheckpointFolder:
    """A run's checkpoints. One process at a time writes here."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root).rstrip("/")
        """A path or an fsspec URL."""
        fs, self._path = locate(self.root)
        self._local = isinstance(fs, LocalFileSystem)
        if self._local and "://" in self.root:
            self.root = self._path
        self._known: dict[str, _Merits] = {}  # the whole ones
        self._unreadable: set[str] = set()
        self._passed_over: set[str] = set()  # by `pass_over`

    def latest(self) -> str:
        """Name of the newest verified checkpoint; empty if there is none."""
        return self.pointed_at(LATEST)

    def pointed_at(self, pointer: str) -> str:
        """Name of the checkpoint that `LATEST` or `BEST` names; empty if it names none."""
        with contextlib.suppress(Damaged):
            name = read_plain_file(self.location(pointer), _POINTER_LIMIT).decode(errors="replace").strip()
            return name if step_of(name) is not None else ""
        return ""

    def location(self, name: str) -> str:
        """Folder of the checkpoint ``name``."""
        return f"{self.root}/{name}"

    def names(self) -> list[str]:
        """Names of the checkpoints there are, damaged ones too, newest first. Raises as `entries` does."""
        names = self._step_folders()
        return names if self._local else [name for name in names if manifests.NAME in self.entries(name)]

    def entries(self, name: str = "") -> list[str]:
        """What lies in the folder, or in a checkpoint's; nothing if it is not there.

        Raises:
            UserError: it cannot be listed.
            Requeue: its store does not answer.
        """
        url = self.location(name) if name else self.root
        if not self._local:
            return list(list_store(url))
        try:
            return os.listdir(os.path.join(self._path, name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"cannot list {url}: {error.strerror}") from None

    def pass_over(self, name: str) -> None:
        """Count no more on a checkpoint in which damage was met, although its manifest and sizes may be right."""
        self._passed_over.add(name)

    def begin(self, step: int, size: int) -> Attempt:
        """Make ready for a checkpoint of ``size`` bytes.

        Raises:
            UserError: the folder cannot be written, or its disk has too little room.
        """
        name, token = step_name(step), secrets.token_hex(4)
        final = self.location(name)
        if not self._local:
            return Attempt(step, token, final, final)
        place = self.location(f".{name}.{token}.partial")
        try:
            os.makedirs(place)
            free = shutil.disk_usage(place).free
        except OSError as error:
            raise UserError(f"cannot write checkpoint {final}: {error.strerror}") from None
        if free < size + SPARE:
            shutil.rmtree(place, ignore_errors=True)
            raise UserError(
                f"cannot write checkpoint {final}: it takes {size / 1e6:,.0f} MB and {SPARE / 1e6:,.0f} MB to spare, "
                f"and its disk has {free / 1e6:,.0f} MB left; make room, or keep fewer (run.keep)"
            )
        return Attempt(step, token, place, final)

    def publish(self, attempt: Attempt, manifest: Manifest) -> None:
        """Make a checkpoint whose files are written and verified visible, and move `LATEST` to it.

        Raises:
            OSError, Damaged, UserError: it could not be; what was there before is as it was.
            Requeue: a store failed; the checkpoint may be there.
        """
        name = step_name(attempt.step)
        self._known.pop(name, None)
        check_sizes(attempt.place, {file: entry.size for file, entry in manifest.files.items()})
        self._put(f"{attempt.place}/{manifests.NAME}", manifests.seal(manifest))
        Checkpoint(attempt.place).close()
        if attempt.is_local:
            if self._is_whole(name):
                manifest = self._replace(attempt, manifest)
            else:
                if os.path.lexists(attempt.final):  # a damaged one that was passed over
                    os.rename(attempt.final, self._hidden(name))
                os.rename(attempt.place, attempt.final)
            sync(self.root)
        self._passed_over.discard(name)
        self._known[name] = _merits(manifest)
        self._put(self.location(LATEST), name.encode())
        with contextlib.suppress(OSError, UserError, Requeue):  # they would go with the next sweep
            self._remove_unlisted(name, manifest)

    def abandon(self, attempt: Attempt) -> None:
        """Remove what an attempt left, as far as that is possible."""
        with contextlib.suppress(Exception):
            if attempt.is_local:
                shutil.rmtree(attempt.place, ignore_errors=True)
            name = step_name(attempt.step)
            if left := [file for file in self.entries(name) if f".{attempt.token}." in file]:
                self._remove(name, set(left) - self._listed(name))  # a store may take the manifest and fail to say so

    def prune(self, keep: Retention) -> None:
        """Delete what ``keep`` does not name, and point `BEST` at the best. Call when the newest one is verified.

        Damaged ones, and in stores unfinished ones, go when they are older than all of the newest that stay.

        Raises:
            OSError, UserError, Requeue: something could not be listed or deleted.
        """
        names = self._step_folders()
        whole = [name for name in names if self._is_whole(name)]
        newest, best = whole[: keep.last], self._best(whole, keep)
        if best:
            self._put(self.location(BEST), best[0].encode())
        stay = {*newest, *best, *self._milestones(whole, keep.every_samples), *self._unreadable}
        for name in names[names.index(newest[-1]) + 1 :] if newest else []:
            if name not in stay:
                self._delete(name)
        self._sweep_hidden()

    def roll_back(self, before: int, clock: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
        """Make the newest whole checkpoint of a step below ``before`` the newest of all, with another clock.

        A kill at any moment leaves as newest one that is whole: the one that was, or any between it and the amended
        one, or that, amended.

        Args:
            clock: gives the new clock for the one that the checkpoint holds.
        Returns:
            Its name; empty, and nothing has changed, if there is none.
        Raises:
            OSError, UserError, Requeue: something could not be listed, read, written or deleted.
        """
        names = self.names()
        older = [name for name in names if int(step_of(name) or 0) < before and name not in self._passed_over]
        found, damaged = newest_good(map(self.location, older), verify=True)  # the newer ones go
        for fault in damaged.values():
            if isinstance(fault, Unreadable):  # it may be the one that is wanted
                raise Requeue(f"cannot go back to a checkpoint before step {before}: {fault}")
        if not found:
            return ""
        found[0].close()
        name, manifest = found[0].name, found[0].manifest
        self._put_manifest(name, manifest.model_copy(update={"clock": clock(manifest.clock)}))
        self._put(self.location(LATEST), name.encode())
        newer = names[: names.index(name)]
        if self.pointed_at(BEST) in newer:  # the next `prune` finds another
            self._remove("", [BEST])
        for one in newer:
            self._delete(one)
        self._sweep_hidden()
        return name

    def sweep(self) -> None:
        """Remove what interrupted saves and deletions left. Only when nobody is writing here.

        Raises:
            OSError, UserError, Requeue: something could not be listed or deleted.
        """
        self._sweep_hidden()
        for name in self._step_folders():
            if not self._local and manifests.NAME not in self.entries(name):
                self._delete(name)
                continue
            with contextlib.suppress(Damaged):
                self._remove_unlisted(name, Checkpoint(self.location(name)).manifest)

    def _step_folders(self) -> list[str]:
        steps = [step for step in map(step_of, self.entries()) if step is not None]
        return [step_name(step) for step in sorted(steps, reverse=True)]

    def _replace(self, attempt: Attempt, manifest: Manifest) -> Manifest:
        """Put an attempt in the place of a whole checkpoint of its step: at every moment one of the two is there."""
        names = {name: attempt.named_apart(name) for name in manifest.files}
        moved = manifest.model_copy(update={"files": {names[name]: entry for name, entry in manifest.files.items()}})
        self._put(f"{attempt.place}/{manifests.NAME}", manifests.seal(moved))
        for name, apart in names.items():
            os.rename(f"{attempt.place}/{name}", f"{attempt.final}/{apart}")
        sync(attempt.final)
        self._move_manifest(attempt.place, attempt.final)
        return moved

    def _put_manifest(self, name: str, manifest: Manifest) -> None:
        """Replace the manifest of a checkpoint."""
        final = self.location(name)
        place = self.location(f".{name}.{secrets.token_hex(4)}.partial") if self._local else final
        self._put(f"{place}/{manifests.NAME}", manifests.seal(manifest))
        if self._local:
            self._move_manifest(place, final)

    def _move_manifest(self, place: str, final: str) -> None:
        """Out of a hidden folder, which goes, into a checkpoint's."""
        os.rename(f"{place}/{manifests.NAME}", f"{final}/{manifests.NAME}")
        sync(final)
        shutil.rmtree(place, ignore_errors=True)

    def _remove_unlisted(self, name: str, manifest: Manifest) -> None:
        """Remove ranks' files that a whole checkpoint has from other attempts at its step."""
        self._remove(name, set(fnmatch.filter(self.entries(name), "rank-*.safetensors")) - manifest.files.keys())

    def _milestones(self, names: Iterable[str], every: int) -> set[str]:
        first: dict[int, str] = {}
        for name in names if every else []:  # newest first, so that the oldest of each bucket stays
            first[self._known[name].samples // every] = name
        return {name for bucket, name in first.items() if bucket > 0}

    def _best(self, names: Iterable[str], keep: Retention) -> list[str]:
        """As many as ``keep`` says, the best one first."""
        sign, metric = (-1, keep.score[1:]) if keep.score.startswith("-") else (1, keep.score)
        scored = [(sign * self._known[name].scores.get(metric, math.nan), name) for name in names]
        return [name for score, name in sorted(entry for entry in scored if not math.isnan(entry[0]))][: keep.best]

    def _is_whole(self, name: str) -> bool:
        """Whether there is such a checkpoint, by its manifest the sizes of its files, and nobody passed it over."""
        self._unreadable.discard(name)
        if name not in self._known:
            try:
                checkpoint = Checkpoint(self.location(name))
            except Unreadable:
                self._unreadable.add(name)
            except Damaged:
                return False
            else:
                self._known[name] = _merits(checkpoint.manifest)
        return name in self._known and name not in self._passed_over

    def _listed(self, name: str) -> set[str]:
        """Files of a checkpoint by its manifest; none if it is damaged."""
        try:
            return set(Checkpoint(self.location(name)).manifest.files)
        except Unreadable:
            raise
        except Damaged:
            return set()

    def _delete(self, name: str) -> None:
        # Hidden or without its manifest first, so that a kill in the middle never leaves half of one that looks whole.
        self._known.pop(name, None)
        if self._local:
            os.rename(self.location(name), self._hidden(name))
        else:
            self._remove(name, [manifests.NAME])
            self._remove(name, self.entries(name))

    def _hidden(self, name: str) -> str:
        return self.location(f".{name}.{secrets.token_hex(4)}.deleted")

    def _sweep_hidden(self) -> None:
        if self._local and os.path.isdir(self._path):
            sync(self._path)  # the renames first
            for pattern in (".step-*.deleted", ".step-*.partial", ".writing-*"):
                for leftover in Path(self._path).glob(pattern):
                    shutil.rmtree(leftover, ignore_errors=True)

    def _put(self, url: str, data: bytes) -> None:
        """Replace a small file whole."""
        if self._local:
            write_text(url, data.decode())
        else:
            persistently(url, lambda fs, path: fs.pipe_file(path, data), doing="write")

    def _remove(self, name: str, files: Iterable[str]) -> None:
        """Delete files of a checkpoint's folder, or with an empty name of the folder of all."""
        for file in files:
            with contextlib.suppress(Missing):
                persistently(
                    self.location(f"{name}/{file}" if name else file), lambda fs, path: fs.rm_file(path), doing="delete"
                )


def _merits(manifest: Manifest) -> _Merits:
    return _Merits(manifest.samples, manifest.scores)


def open_checkpoint(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """A checkpoint by its own folder, or the newest good one of a run or of a folder of checkpoints.

    Args:
        verify: read every byte first. Without it damage shows only when the part is read.
    Raises:
        UserError: there is none, or the one named is damaged.
        Requeue: a store does not answer.
    """
    folder, named = locate_checkpoints(path)
    found, damaged = newest_good(map(folder.location, [named] if named else folder.names()), verify=verify)
    if not found:
        raise none_to_read(folder, map(str, damaged.values()), named=bool(named))
    return found[0]


def newest_good(
    locations: Iterable[str], count: int = 1, *, verify: bool = False
) -> tuple[list[Checkpoint], dict[str, Damaged]]:
    """The first ``count`` good checkpoints of ``locations``, or fewer, by what their manifests say.

    Args:
        locations: newest first.
        verify: read every byte.
    Returns:
        They, and what is wrong with those that were passed over, by location.
    """
    found: list[Checkpoint] = []
    damaged: dict[str, Damaged] = {}
    for location in locations:
        if len(found) == count:
            break
        try:
            found.append(_opened(location, verify))
        except Damaged as fault:
            damaged[location] = fault
    return found, damaged


def none_to_read(folder: CheckpointFolder, faults: Iterable[str], *, named: bool) -> UserError:
    """The error where no checkpoint is good.

    Args:
        faults: of those there are.
        named: one was asked for by its name.
    """
    listed = "; ".join(faults)
    if named:
        return UserError(f"checkpoint is damaged: {listed}")
    return UserError(
        f"no checkpoint to read in {folder.root}: {f'all are damaged: {listed}' if listed else 'there is none'}"
    )


def locate_checkpoints(path: str | Path) -> tuple[CheckpointFolder, str]:
    """The folder of checkpoints that ``path`` leads to, and the name of one in it, if that is what it leads to.

    ``path`` may end in `LATEST` or `BEST`, and may be a run whose config has its checkpoints elsewhere.
    """
    path = str(path).rstrip("/")
    parent, name = os.path.dirname(path) or ".", os.path.basename(path)
    if name in (LATEST, BEST) and (pointed := CheckpointFolder(parent).pointed_at(name)):
        return CheckpointFolder(parent), pointed
    folder = CheckpointFolder(path)
    if step_of(name) is not None or manifests.NAME in folder.entries():
        return CheckpointFolder(parent), name
    return (folder if folder.names() else CheckpointFolder(_checkpoints_of_run(path, folder.entries()))), ""


def _checkpoints_of_run(path: str, entries: list[str]) -> str:
    """Where a run has its checkpoints, by its config; ``path`` itself if it holds no run."""
    config = f"{path}/{CONFIG}"
    if os.path.isfile(config):  # a run's folder is local
        run = read_tree(config).get("run")
        run = run if isinstance(run, dict) else {}
        place, started_as = str(run.get("checkpoints") or ""), str(run.get("folder") or "")
        if place:
            return place_of_run(place, Path(path), started_as)
    return f"{path}/{CHECKPOINTS}" if CHECKPOINTS in entries else path


def _opened(location: str, verify: bool) -> Checkpoint:
    checkpoint = Checkpoint(location)
    if verify:
        checkpoint.verify()
    return checkpoint
