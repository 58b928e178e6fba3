"""Checkpoints: one safetensors file a rank, and a manifest that is written last and defines completeness.

    checkpoints/
      latest                       name of the newest verified checkpoint
      step-00000100/
        rank-00000.safetensors     this rank's pieces; keys are "KIND:START:PARAMETER"
        rank-00001.safetensors
        manifest.json              sizes and SHA-256 of the files, shapes of the parameters, the clock

KIND is ``master`` (fp32 weights), ``exp_avg``, ``exp_avg_sq`` or ``ema``, or ``frozen`` for the whole of a parameter
that does not learn; START is the piece's first element in the
flattened parameter. Pieces are addressed by name and place, so any number of ranks in any ZeRO stage reads what any
other wrote, and nothing is ever unpickled. Reading needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import bisect
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lvdm.errors import UserError
from lvdm.storage import sha256_of, sync, write_text

FORMAT = "lvdm-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
FROZEN = "frozen"
LATEST = "latest"


class Damaged(Exception):
    """A checkpoint that is not what its manifest says; the message names the file and the fault."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    """Optimiser steps of the run, skipped ones included."""
    optimizer_step: int
    """Optimiser steps that were applied."""
    clock: dict[str, Any]
    """State of the training loop, plain JSON."""
    facts: dict[str, Any]
    """What the task found out and users of the weights need, such as the scale of the latents."""
    config: dict[str, Any]
    """The resolved training config that wrote it."""
    written_by: dict[str, Any]
    """Ranks, stage, precision and versions."""
    shapes: dict[str, tuple[int, ...]]
    """Full shape of every parameter."""
    frozen: list[str]
    """Parameters that do not learn: stored once, and no different in any kind."""
    files: dict[str, dict[str, Any]]
    """``size`` in bytes and ``sha256`` of every file."""


@dataclass(frozen=True)
class Piece:
    """A stored run of elements of one parameter."""

    start: int
    length: int
    file: str
    key: str


class Checkpoint:
    """A complete checkpoint folder, opened for reading by parameter and range."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest of ``folder``. Raises `Damaged` if there is none or a file is absent or of another size."""
        self.folder = folder
        self.manifest = _read_manifest(folder)
        for name, entry in self.manifest.files.items():
            path = folder / name
            if not path.is_file():
                raise Damaged(f"{path} is missing")
            if path.stat().st_size != entry["size"]:
                raise Damaged(f"{path} has {path.stat().st_size} bytes, not {entry['size']}")
        self._open: dict[str, Any] = {}
        self._pieces: dict[tuple[str, str], list[Piece]] | None = None

    def verify(self, share: int = 0, of: int = 1) -> None:
        """Check the SHA-256 of every ``of``-th file, beginning with number ``share``. Raises `Damaged`."""
        for name in sorted(self.manifest.files)[share::of]:
            if sha256_of(self.folder / name) != self.manifest.files[name]["sha256"]:
                raise Damaged(f"{self.folder / name} has changed since it was written (SHA-256 differs)")

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        """Elements ``[start, start + length)`` of the flattened parameter ``name``, fp32. Raises `Damaged` on a gap."""
        pieces = self._index().get((kind, name), [])
        out = torch.empty(length, dtype=torch.float32)
        done = start
        first = max(0, bisect.bisect_right([piece.start for piece in pieces], start) - 1)
        for piece in pieces[first:]:
            if done >= start + length or piece.start > done:
                break
            upto = min(start + length, piece.start + piece.length)
            if upto > done:
                stored = self._file(piece.file).get_slice(piece.key)
                out[done - start : upto - start] = stored[done - piece.start : upto - piece.start]
                done = upto
        if done != start + length:
            raise Damaged(f"{self.folder}: {kind} of {name} lacks elements from {done}")
        return out

    def parameter(self, kind: str, name: str) -> torch.Tensor:
        """The whole parameter ``name`` in its shape, fp32; of a frozen one its weights, whatever ``kind``."""
        shape = self.manifest.shapes[name]
        return self.read(FROZEN if name in self.manifest.frozen else kind, name, 0, torch.Size(shape).numel()).reshape(
            shape
        )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except SafetensorError as error:
                raise Damaged(f"{self.folder / name} is no safetensors file: {error}") from None
        return self._open[name]

    def _index(self) -> dict[tuple[str, str], list[Piece]]:
        if self._pieces is None:
            found: dict[tuple[str, str], list[Piece]] = {}
            for file in self.manifest.files:
                handle = self._file(file)
                for key in handle.keys():  # noqa: SIM118 (not a mapping)
                    kind, start, name = key.split(":", 2)
                    length = handle.get_slice(key).get_shape()[0]
                    found.setdefault((kind, name), []).append(Piece(int(start), length, file, key))
            self._pieces = {key: sorted(pieces, key=lambda p: p.start) for key, pieces in found.items()}
        return self._pieces


def write_rank_file(folder: Path, rank: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write one rank's pieces to disk and read them back. Returns the manifest's entry with the file's ``name``.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    path = folder / f"rank-{rank:05d}.safetensors"
    try:
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, path)
        sync(path)
        return {"name": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write checkpoint file {path}: {error}") from None


def publish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Make a checkpoint visible: manifest into ``partial``, rename to ``final``, then move ``latest`` to it."""
    tree = {"format": FORMAT, "version": VERSION} | vars(manifest)
    write_text(partial / MANIFEST, json.dumps(tree, indent=1, sort_keys=True))
    sync(partial)
    if final.exists():
        shutil.rmtree(final)  # of the same step, written before a rollback
    partial.rename(final)
    sync(final.parent)
    Checkpoint(final)
    write_text(final.parent / LATEST, final.name)


def delete_old(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what an interrupted save left."""
    for folder in newest_first(root)[keep:]:
        # Renamed first, so that a kill in the middle never leaves half a checkpoint under a valid name.
        doomed = folder.with_name(f".{folder.name}.deleted")
        folder.rename(doomed)
    for leftover in [*root.glob(".step-*.deleted"), *root.glob(".step-*.partial")]:
        shutil.rmtree(leftover, ignore_errors=True)


def partial_folder(root: Path, step: int) -> tuple[Path, Path]:
    """Where the checkpoint of ``step`` is assembled, and where it appears when complete."""
    name = f"step-{step:08d}"
    return root / f".{name}.partial", root / name


def newest_complete(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint under ``root`` whose every byte is right, and the faults of the newer ones.

    ``(None, [])`` where there has never been a checkpoint.
    """
    faults: list[str] = []
    for folder in newest_first(root):
        try:
            checkpoint = Checkpoint(folder)
            checkpoint.verify()
        except Damaged as fault:
            faults.append(str(fault))
        else:
            return checkpoint, faults
    return None, faults


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint by its own folder, or the newest good one of a run's folder, verified.

    Raises:
        UserError: there is none, or the one named is damaged.
    """
    if (path / MANIFEST).is_file() or path.name.startswith("step-"):
        try:
            checkpoint = Checkpoint(path)
            checkpoint.verify()
        except Damaged as fault:
            raise UserError(f"checkpoint is damaged: {fault}") from None
        return checkpoint
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found, faults = newest_complete(root)
    if found is None:
        reason = f"all are damaged: {'; '.join(faults)}" if faults else "there is none"
        raise UserError(f"no checkpoint to read in {path}: {reason}")
    return found


def check_shapes(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise `UserError` unless both hold the same parameters in the same shapes."""
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(stored.keys() - wanted.keys())
    other = [
        f"{name} {stored[name]} instead of {wanted[name]}"
        for name in sorted(wanted.keys() & stored.keys())
        if stored[name] != wanted[name]
    ]
    parts = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
        if names
    ]
    if parts:
        raise UserError(f"{source} is of another model than the config describes ({'; '.join(parts)})")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format") != FORMAT or tree.pop("version") != VERSION:
            raise Damaged(f"{path} is not of format {FORMAT} version {VERSION}")
        tree["shapes"] = {name: tuple(shape) for name, shape in tree["shapes"].items()}
        if any(Path(name).name != name for name in tree["files"]):
            raise Damaged(f"{path} names files outside its folder")
        return Manifest(**tree)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing: the checkpoint was never completed") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise Damaged(f"{path} cannot be read: {type(error).__name__} {error}") from None


def newest_first(root: Path) -> list[Path]:
    """Folders of the checkpoints under ``root``, newest first, complete or not."""
    return sorted((folder for folder in root.glob("step-*") if folder.is_dir()), reverse=True)


def piece_key(kind: str, start: int, name: str) -> str:
    """Key of a piece in a rank's file."""
    return f"{kind}:{start}:{name}"
