"""The folder of a run: one resolved config, one log, its checkpoints; and what may change when it goes on.

config.yaml          the resolved config of the last start
environment.json     versions, git state, command and ranks of the last start
log.jsonl            one line per log step
replaced.jsonl       samples that others stand in for, with the reason
events.jsonl         what went wrong, and what was done about it
heartbeat.json       what it is doing now
attempts.jsonl       when each start began, and how it ended
seen/                samples of every step, if run.log_samples
tensorboard/  images/  samples/  checkpoints/
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lvdm.attempts import ATTEMPTS, futile_starts
from lvdm.config import AnyTraining, dump_yaml, parse_training_config, read_tree
from lvdm.errors import UserError
from lvdm.storage import write_text

_FIXED = (
    "task", "model", "diffusion", "loss", "vae", "text", "given", "latent_stride", "run.seed", "data.kind",
    "data.video.clip",
)  # fmt: skip
"""Fields that define what is learnt from which sequence of samples; a run that goes on keeps them."""


class RunFolder:
    """Paths of a run, and the rules of entering it. Needs no torch."""

    def __init__(self, config: AnyTraining) -> None:
        self.config = config
        self.path = Path(config.run.folder)
        self.checkpoints = config.run.checkpoints or str(self.path / "checkpoints")
        self._resolved = self.path / "config.yaml"
        self.log = self.path / "log.jsonl"
        self.replaced = self.path / "replaced.jsonl"
        self.events = self.path / "events.jsonl"
        self.seen = self.path / "seen"
        self.images = self.path / "images"
        self.samples = self.path / "samples"
        self.tensorboard = self.path / "tensorboard"

    @property
    def exists(self) -> bool:
        """Whether the folder is a run's, this start's (`claim`) or that of one before."""
        return self._resolved.is_file()

    def enter(self) -> list[str]:
        """Check that this config may start or go on here; nothing is written.

        Returns:
            Changes against the config that the run had so far, as ``path: old -> new``; they apply from now on.
        Raises:
            UserError: the folder holds another run, ``resume=must`` finds none, a change is not allowed, or too many
            starts in a row came to nothing.
        """
        resume = self.config.run.resume
        if not self.exists:
            if resume == "must" and not self.config.run.checkpoints:
                raise UserError(f"run.resume=must, but {self.path} holds no run")
            if self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise UserError(f"run.folder {self.path} is not empty and holds no run; choose another folder")
            return []
        if resume == "never":
            raise UserError(f"run.folder {self.path} already holds a run; go on with run.resume=auto or choose another")
        changes = self.changes_from(read_tree(self._resolved), source=str(self._resolved))
        self._refuse_another_futile_start()
        return changes

    def _refuse_another_futile_start(self) -> None:
        count, last = futile_starts(self.path)
        if count >= self.config.run.futile_starts:
            listed = self.path / ATTEMPTS
            raise UserError(
                f"{self.path}: the last {count} starts ended before a new checkpoint, the last of them: {last}; find "
                f"out why, mend it, then go on with a higher run.futile_starts, or rename {listed}, which lists them"
            )

    def changes_from(self, tree: dict[str, Any], source: str) -> list[str]:
        """Changes against the config ``tree`` of ``source``, the run so far, as ``path: old -> new``.

        Raises:
            UserError: one is not allowed.
        """
        old = _flatten(parse_training_config(tree, source=source).model_dump(mode="json"))
        new = _flatten(self.config.model_dump(mode="json"))
        changes = {
            key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
        }
        refused = [key for key in changes if any(key == f or key.startswith(f + ".") for f in _FIXED)]
        if refused:
            listed = "; ".join(f"{key}: {changes[key][0]} -> {changes[key][1]}" for key in refused)
            raise UserError(
                f"{self.path} cannot go on with a changed {listed} (so far by {source}); start a new run.folder"
            )
        return [f"{key}: {before} -> {after}" for key, (before, after) in changes.items()]

    def claim(self, ranks: int) -> None:
        """Write the config and the environment of this start (main rank only)."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self._resolved, dump_yaml(self.config))  # first: it makes the folder a run's
        environment = {"command": sys.argv, "ranks": ranks} | describe_environment()
        write_text(self.path / "environment.json", json.dumps(environment, indent=1) + "\n")
        self.images.mkdir(exist_ok=True)


def describe_environment() -> dict[str, Any]:
    """Versions of Python and the packages that decide results, the machine, and the git commit of the code."""
    packages = ("lvdm", "torch", "deepspeed", "diffusers", "transformers", "webdataset", "av", "numpy", "safetensors")
    versions = {name: _version(name) for name in packages}
    return {"python": platform.python_version(), "platform": platform.platform(), "git": _git_state(), **versions}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> str | None:
    """Commit of the code, with ``-dirty`` behind it where files differ; None outside a checkout."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],  # noqa: S607 (git as the user has it)
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        key: value
        for name, child in tree.items()
        for key, value in _flatten(child, f"{path}.{name}" if path else name).items()
    }
