"""Commands of the repository, run as their own processes."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lvdm.config import parse_training_config
from lvdm.config.base import dump_yaml

ROOT = Path(__file__).resolve().parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")


def write_config(tree: dict[str, Any], path: Path) -> str:
    """A config tree as a YAML file; its path."""
    path.write_text(dump_yaml(parse_training_config(tree, source="test")))
    return str(path)


def call(
    script: str, *arguments: str | Path, cwd: Path = ROOT, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command of the repository and wait for it: its exit code and what it wrote.

    Its process is forked from the server that ranks are forked from, which has imported torch and DeepSpeed: seconds
    less each. What a command imports, and when, is for tests that start a new interpreter.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``timeout`` seconds, and was killed.
    """
    command = [str(ROOT / script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _CONTEXT.Process(target=_run, args=(command, str(cwd), list(map(str, written))))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in written))


def _run(command: list[str], cwd: str, written: list[str]) -> None:
    """As ``python`` runs a script; `multiprocessing` makes exit codes of exceptions as an interpreter does."""
    for path, stream in zip(written, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.chdir(cwd)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
