"""What went wrong in a run and what was done about it: a JSON line each, for good."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from lvdm.storage import append_json


class EventLog:
    """``events.jsonl``, and a line on the main rank's output. Lines stay when a run goes back: they are its history."""

    def __init__(self, path: Path, enabled: bool) -> None:
        """
        Args:
            enabled: false on all ranks but the main one.
        """
        self._path, self._enabled = path, enabled

    def add(self, kind: str, step: int, message: str, **facts: Any) -> None:
        """Note an event at a step.

        Args:
            kind: one word, for programs.
            message: one line, for people.
            facts: JSON.
        """
        if not self._enabled:
            return
        print(f"step {step}: {message}", flush=True)
        line = {"time": round(time.time(), 3), "step": step, "kind": kind, "message": message} | facts
        try:
            append_json(self._path, line)
        except OSError as error:  # it is printed as well, and a full disk must not end a run
            print(f"cannot note it in {self._path}: {error.strerror}", file=sys.stderr, flush=True)
