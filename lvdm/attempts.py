"""The starts of a run, in two files of its folder: what the present one is doing, and how each ended.

heartbeat.json   the state of now, replaced every few seconds while the run is alive
attempts.jsonl   a line as an attempt, which is one start, begins, and one as it ends

Only the main rank writes, and of a stall the rank that tells of it. Times are UTC seconds of its clock. An attempt
without a second line was killed, or is alive: the age of its heartbeat tells. Whoever reads passes over what a kill cut
short and what a newer version added.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lvdm.errors import EXIT_BAD_INPUT, EXIT_REQUEUE, EXIT_STALLED, AskedToStop, Requeue, RolledBack, UserError
from lvdm.storage import append_json, sync

HEARTBEAT, ATTEMPTS = "heartbeat.json", "attempts.jsonl"
INTERRUPTED = 130
"""Exit code after Ctrl-C."""

_OFTEN = 5.0  # seconds between heartbeats of one state
_PATIENCE = 10.0  # seconds that a disk may take before an attempt goes on, or ends, without it
_LONGEST_REASON = 500
_APART = 60.0  # seconds between the starts of a run's ranks, at most, with what their clocks differ by
_STATES = {0: "finished", EXIT_REQUEUE: "stopped", INTERRUPTED: "stopped", EXIT_STALLED: "stalled"}
"""What a run is after an exit code; after all others it has failed."""


class Attempt:
    """One start of a run. It outlives its disk: what cannot be written is said once on stderr."""

    def __init__(self, folder: Path, steps: int, enabled: bool) -> None:
        """
        Args:
            folder: of the run; nothing is written there before `begin`.
            steps: how long the run is.
            enabled: false on all ranks but the main one.
        """
        self._folder, self._enabled = folder, enabled
        self._facts: dict[str, Any] = {
            "state": "starting",
            "step": 0,
            "steps": steps,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "restarts": int(restarts) if (restarts := os.environ.get("SLURM_RESTART_COUNT", "")).isdigit() else 0,
            "started": _now(),
        }
        self._number = 0
        self._begun = self._ended = self._complained = False
        self._written_state, self._due = "", 0.0
        self._writing: threading.Thread | None = None

    def begin(self, from_step: int, ranks: int, nodes: int, checkpoint: str = "") -> None:
        """The run folder is this start's: call it once the folder holds the run's config, and again if the start goes
        on from another checkpoint than was thought.

        Args:
            checkpoint: that it goes on from; empty for none.
        """
        before = self._facts.get("from_step")
        known = {"step": from_step, "from_step": from_step, "ranks": ranks, "nodes": nodes, "checkpoint": checkpoint}
        self._facts = self._facts | known
        if self._enabled and from_step != before:
            self._in_time(self._write_start)
            self.write()

    def now(self, state: str, step: int | None = None, **facts: Any) -> None:
        """Remember what it is doing, and numbers or words about it; those not given stay as they were.

        Args:
            state: starting, training, validating, sampling or saving.
            step: steps done.
        """
        moved = {} if step is None else {"step": step}
        self._facts = self._facts | facts | moved | {"state": state}  # whole: another thread reads it

    def write(self) -> None:
        """Write the heartbeat if that is due: at a new state at once, else every few seconds. Neither waits nor raises.

        For a thread that has other things to do than wait for a disk.
        """
        if not self._begun or self._ended or (self._writing is not None and self._writing.is_alive()):
            return
        if self._facts["state"] != self._written_state or time.monotonic() >= self._due:
            self._written_state, self._due = self._facts["state"], time.monotonic() + _OFTEN
            self._writing = self._start(lambda: self._replace_heartbeat(self._facts))

    def stalled(self, reason: str) -> None:
        """Note that the watchdog ends it. Any one rank may: the main one may be what hangs. Takes seconds at most."""
        self._end(EXIT_STALLED, "Stalled", reason)

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Note how it ended, if the folder is a run's."""
        self._end(_code_of(error), type(error).__name__ if error is not None else "", _reason_of(error))

    def _end(self, code: int, error: str, reason: str) -> None:
        if self._ended or not (self._enabled or code == EXIT_STALLED):
            return
        self._ended = True
        if self._writing is not None:
            self._writing.join(_PATIENCE)
        # apart from the other facts, to which a thread that does not know of the end yet may still add
        ending = {"reason": reason[:_LONGEST_REASON], "code": code, "error": error}
        self._in_time(lambda: self._write_end(self._facts, ending))

    # In a thread of their own, since a disk may hang.

    def _write_start(self) -> None:
        self._number = self._number or _next_number(self._folder)
        names = ("started", "host", "pid", "ranks", "nodes", "job", "restarts", "from_step", "steps")
        self._append({name: self._facts[name] for name in names})
        self._begun = True

    def _write_end(self, facts: dict[str, Any], ending: dict[str, Any]) -> None:
        if not self._begun and not (self._folder / "config.yaml").is_file():
            return  # a start that never became a run's
        names = ["step"] if self._begun else ["started", "host", "pid", "job", "restarts"]
        self._number = self._number or (_next_number(self._folder) if self._enabled else self._number_by_another())
        self._append({"ended": _now()} | {name: facts[name] for name in names} | ending)
        if self._begun:
            self._replace_heartbeat(facts | ending | {"state": _STATES.get(ending["code"], "failed")})

    def _number_by_another(self) -> int:
        """For a rank that tells in the main one's place: the last number, if that was given to this start."""
        starts = read_attempts(self._folder)
        if not starts:
            return 1
        last, mine = starts[-1], self._facts
        ours = (last.job, last.restarts) == (mine["job"], mine["restarts"])
        return last.attempt + (not (ours and last.started > mine["started"] - _APART))

    def _append(self, line: dict[str, Any]) -> None:
        append_json(self._folder / ATTEMPTS, {"attempt": self._number} | line)
        sync(self._folder / ATTEMPTS)

    def _replace_heartbeat(self, facts: dict[str, Any]) -> None:
        values = {name: _plain(value) for name, value in facts.items()}
        scratch = self._folder / f".{HEARTBEAT}"
        scratch.write_text(json.dumps(values | {"attempt": self._number, "updated": _now()}) + "\n", encoding="utf-8")
        os.replace(scratch, self._folder / HEARTBEAT)

    def _in_time(self, action: Callable[[], None]) -> None:
        self._start(action).join(_PATIENCE)

    def _start(self, action: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                action()
            except Exception as error:  # a full disk must not end a run
                if not self._complained:
                    self._complained = True
                    print(f"cannot note the state of the run in {self._folder}: {error}", file=sys.stderr, flush=True)

        thread = threading.Thread(target=run, name="attempt", daemon=True)
        thread.start()
        return thread


@dataclass(frozen=True)
class Start:
    """An attempt, as `ATTEMPTS` tells of it. What it does not tell is None, zero or empty."""

    attempt: int
    """Its number, from 1 on."""
    started: float = 0.0
    host: str = ""
    """Of the main rank."""
    ranks: int = 0
    nodes: int = 0
    job: str = ""
    """SLURM's number of the job."""
    restarts: int = 0
    """How often SLURM had requeued it."""
    from_step: int | None = None
    """Of the checkpoint that it went on from; None where it ended before that was known."""
    ended: float | None = None
    """None where it was killed, or is alive."""
    step: int | None = None
    """The last one that it finished."""
    reason: str = ""
    code: int | None = None
    """Exit code."""
    error: str = ""
    """Class of what was raised."""

    @property
    def how(self) -> str:
        """Why it ended, in a line."""
        if self.ended is None:
            return "killed, or its node went down"
        return self.reason or ("finished" if self.code == 0 else f"exit code {self.code}")

    @property
    def state(self) -> str:
        """What the run was after it."""
        return "killed" if self.ended is None else _STATES.get(-1 if self.code is None else self.code, "failed")

    @property
    def is_futile(self) -> bool:
        """Whether it is one of those that must not go on for ever: those that scripts start again by themselves."""
        return self.ended is None or not (
            self.code in {0, EXIT_BAD_INPUT, INTERRUPTED} or self.error in {AskedToStop.__name__, RolledBack.__name__}
        )


@dataclass(frozen=True)
class Heartbeat:
    """What a run was doing when it last said so. What it does not tell is None, zero or empty."""

    updated: float
    """UTC seconds by the clock of ``host``."""
    written: float
    """The same by the file system's."""
    state: str = ""
    attempt: int = 0
    step: int = 0
    steps: int = 0
    host: str = ""
    job: str = ""
    ranks: int = 0
    nodes: int = 0
    samples_per_second: float | None = None
    seconds_left: float | None = None
    loss: float | None = None
    checkpoint: str = ""
    """The newest whole one."""


def read_attempts(folder: Path) -> list[Start]:
    """The attempts of a run in their order. Raises `UserError` if they cannot be read."""
    merged: dict[int, dict[str, Any]] = {}
    for line in _read(folder / ATTEMPTS).splitlines():
        facts = _mapping(line)
        number = _whole(facts.get("attempt"))
        known = merged.get(number or 0, {})
        # Who notes the end first knows why; a main rank that was stopped may note another when it goes on.
        if number is not None and not ("ended" in known and "ended" in facts):
            merged[number] = known | facts
    return [
        Start(
            attempt=number,
            started=_float(facts.get("started")) or 0.0,
            host=_text(facts.get("host")),
            ranks=_whole(facts.get("ranks")) or 0,
            nodes=_whole(facts.get("nodes")) or 0,
            job=_text(facts.get("job")),
            restarts=_whole(facts.get("restarts")) or 0,
            from_step=_whole(facts.get("from_step")),
            ended=_float(facts.get("ended")),
            step=_whole(facts.get("step")),
            reason=_text(facts.get("reason")),
            code=_whole(facts.get("code")),
            error=_text(facts.get("error")),
        )
        for number, facts in sorted(merged.items())
    ]


def read_heartbeat(folder: Path) -> Heartbeat | None:
    """The heartbeat of a run; None if there is none that makes sense. Raises `UserError` if it cannot be read."""
    path = folder / HEARTBEAT
    facts = _mapping(_read(path))
    updated = _float(facts.get("updated"))
    if updated is None:
        return None
    try:
        written = path.stat().st_mtime
    except OSError:
        written = updated  # it was replaced, or removed, since
    return Heartbeat(
        updated=updated,
        written=written,
        state=_text(facts.get("state")),
        attempt=_whole(facts.get("attempt")) or 0,
        step=_whole(facts.get("step")) or 0,
        steps=_whole(facts.get("steps")) or 0,
        host=_text(facts.get("host")),
        job=_text(facts.get("job")),
        ranks=_whole(facts.get("ranks")) or 0,
        nodes=_whole(facts.get("nodes")) or 0,
        samples_per_second=_float(facts.get("samples_per_second")),
        seconds_left=_float(facts.get("seconds_left")),
        loss=_float(facts.get("loss"), finite=False),
        checkpoint=_text(facts.get("checkpoint")),
    )


def futile_starts(folder: Path) -> tuple[int, str]:
    """How many starts in a row, up to the last one, came to nothing, and how the last of them ended.

    They all began at the same step and ended by themselves or by a kill: not because somebody asked, nor with an exit
    code after which somebody has to act, nor to go back from a loss spike. Raises `UserError`.
    """
    starts, count, last, begun = read_attempts(folder), 0, "", None
    if starts and _has_saved(starts[-1], read_heartbeat(folder)):
        return 0, ""
    for start in reversed(starts):
        if not start.is_futile or (start.from_step is not None and begun not in (None, start.from_step)):
            break
        begun = begun if start.from_step is None else start.from_step
        last = last or start.how
        count += 1
    return count, last


def _has_saved(start: Start, heartbeat: Heartbeat | None) -> bool:
    """Whether the heartbeat tells of a checkpoint that this start has written."""
    if heartbeat is None or heartbeat.attempt != start.attempt or start.from_step is None:
        return False
    number = heartbeat.checkpoint.rpartition("-")[2]
    return number.isdigit() and int(number) > start.from_step


def _code_of(error: BaseException | None) -> int:
    match error:
        case None:
            return 0
        case Requeue():
            return EXIT_REQUEUE
        case UserError():
            return EXIT_BAD_INPUT
        case KeyboardInterrupt():
            return INTERRUPTED
        case SystemExit(code=int(code)):
            return code
    return 1


def _reason_of(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() if error is not None else []
    said = lines[0] if lines else ""
    if error is None or isinstance(error, Requeue | UserError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _next_number(folder: Path) -> int:
    return max((start.attempt for start in read_attempts(folder)), default=0) + 1


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _mapping(text: str) -> dict[str, Any]:
    """A JSON mapping; empty for anything else, such as a part of one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _float(value: Any, finite: bool = True) -> float | None:
    if not isinstance(value, int | float) and value not in ("nan", "inf", "-inf"):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) or not finite else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _plain(value: Any) -> Any:
    """A value as JSON has it, which knows no infinite numbers and none that are not a number."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def _now() -> float:
    return round(time.time(), 3)
