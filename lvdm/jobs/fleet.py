"""All runs below some folders: what each is doing, how far it is, and why its last attempt ended.

Only small files of the run folders are read, and of a log its end. Neither torch nor the config's classes are imported,
so that a look at a thousand runs takes a second.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lvdm.attempts import ATTEMPTS, HEARTBEAT, Heartbeat, Start, read_attempts, read_heartbeat
from lvdm.errors import UserError
from lvdm.storage import locate, place_of_run

SILENT_AFTER = 120.0
"""Seconds without a heartbeat, of which there is one every few seconds, after which a run counts as gone."""
ALIVE = ("starting", "training", "validating", "sampling", "saving")
ENDED = ("finished", "stopped", "stalled", "failed")

_URGENCY = ("unreadable", "failed", "silent", "stalled", "stopped", "unknown", *ALIVE, "finished")
_READERS = 16  # threads; file systems of clusters take their time
_TAIL = 1 << 14  # bytes of a log
_EVENTS = 1 << 20  # bytes of a list of events
_CONFIG = 1 << 20
_STORE_PATIENCE = 15.0  # seconds for all stores together
_LONGEST_POINTER = 1000
_KIND = re.compile(rb'"kind": "(\w{1,40})"')
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast


@dataclass(frozen=True)
class Run:
    """A run, as its folder tells. What is not known is None, zero or empty."""

    folder: str
    state: str
    """One of `ALIVE` or `ENDED`; ``silent`` if it was alive when last heard of, long ago; ``unknown`` without a
    heartbeat; ``unreadable``."""
    age: float | None = None
    """Seconds since it was last heard of."""
    step: int = 0
    steps: int = 0
    samples_per_second: float | None = None
    seconds_left: float | None = None
    loss: float | None = None
    host: str = ""
    """Of the main rank."""
    ranks: int = 0
    nodes: int = 0
    job: str = ""
    """SLURM's number of the job."""
    checkpoint: str = ""
    """Name of the newest whole one."""
    checkpoints: str = ""
    """Where they are, if that is not in the run folder."""
    attempts: int = 0
    """Starts so far; all but the first one are requeues, or somebody started it again."""
    ended: str = ""
    """Why the last attempt that has ended did so."""
    code: int | None = None
    """Its exit code."""
    events: dict[str, int] = field(default_factory=dict)
    """How often what happened, by kind."""
    fault: str = ""
    """What could not be read."""

    @property
    def urgency(self) -> int:
        """Place among others, those that need somebody first."""
        return _URGENCY.index(self.state)


def look_at(folders: Sequence[str | Path], *, stores: bool = False) -> list[Run]:
    """The runs in and below ``folders``, those that need attention first.

    Args:
        stores: read from stores what the newest checkpoint there is; otherwise it is what the run last said.
    Raises:
        UserError: a folder is not there.
    """
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"there is no folder {folder}")
    found = list(find_runs(folders))
    with ThreadPoolExecutor(_READERS) as pool:
        runs = list(pool.map(lambda one: one if isinstance(one, Run) else read_run(one), found))
    if stores:
        runs = _with_stores(runs)
    return sorted(runs, key=lambda run: (run.urgency, run.folder))


def plain(run: Run) -> dict[str, Any]:
    """A run as JSON, in which a loss that is no finite number is a text."""
    loss = run.loss if run.loss is None or math.isfinite(run.loss) else str(run.loss)
    return asdict(run) | {"loss": loss}


def find_runs(folders: Sequence[str | Path]) -> Iterator[Path | Run]:
    """Folders of runs, each once, and a `Run` that is unreadable for each folder that cannot be listed.

    Below a run nothing is looked for. Links lead to runs, but no further, so that there is no way in circles.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [(str(folder), False) for folder in reversed(folders)]
    while waiting:
        path, linked = waiting.pop()
        try:
            about = os.stat(path)
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(path) as entries:
                inside = list(entries)
            names = {entry.name for entry in inside}
            if "config.yaml" in names and names & {HEARTBEAT, ATTEMPTS, "log.jsonl"}:
                yield Path(path)
            elif not linked:
                below = [entry for entry in inside if not entry.name.startswith(".") and _is_folder(entry)]
                waiting += sorted(((entry.path, entry.is_symlink()) for entry in below), reverse=True)
        except OSError as error:
            yield Run(path, "unreadable", fault=f"cannot list {path}: {error.strerror}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def read_run(folder: Path, now: float | None = None) -> Run:
    """What a run folder tells.

    Args:
        now: UTC seconds.
    """
    try:
        return _read_run(folder, time.time() if now is None else now)
    except UserError as error:
        return Run(str(folder), "unreadable", fault=str(error))
    except OSError as error:
        return Run(str(folder), "unreadable", fault=f"cannot read {error.filename or folder}: {error.strerror}")


def _read_run(folder: Path, now: float) -> Run:
    starts, heartbeat = read_attempts(folder), read_heartbeat(folder)
    run = _state(Run(str(folder), "unknown"), starts, heartbeat, now)
    over = [start for start in starts if start.ended is not None or start is not starts[-1] or run.state == "silent"]
    if over:
        run = replace(run, ended=over[-1].how, code=over[-1].code)
    run = replace(run, attempts=len(starts), events=_count_events(folder))
    if run.steps == 0 or (run.state in ALIVE and run.seconds_left is None):
        run = _complete_from_log(run, folder)
    name = _pointer(_head(folder / "checkpoints" / "latest", _LONGEST_POINTER))
    if not name:
        section = _run_section(folder)
        place = str(section.get("checkpoints") or "")
        if place:
            run = replace(run, checkpoints=place_of_run(place, folder, str(section.get("folder") or "")))
        if run.checkpoints and "://" not in run.checkpoints:
            name = _pointer(_head(Path(run.checkpoints) / "latest", _LONGEST_POINTER))
    return replace(run, checkpoint=name or run.checkpoint)


def _state(run: Run, starts: Sequence[Start], heartbeat: Heartbeat | None, now: float) -> Run:
    """``run`` with what heartbeat and attempts say of now; the end of an attempt counts more than its heartbeat."""
    last = starts[-1] if starts else None
    if heartbeat is not None:
        # by both clocks, since the host's or the file system's may be wrong
        age = max(0.0, now - max(heartbeat.updated, heartbeat.written))
        names = ("step", "steps", "samples_per_second", "seconds_left", "loss", "host", "ranks", "nodes", "job")
        run = replace(run, age=age, checkpoint=heartbeat.checkpoint, **{n: getattr(heartbeat, n) for n in names})
    if last is not None and last.ended is not None and (heartbeat is None or heartbeat.attempt <= last.attempt):
        known = run if heartbeat is not None else replace(run, host=last.host, step=last.step or 0)
        return replace(known, state=last.state, age=max(0.0, now - last.ended), seconds_left=None)
    if heartbeat is not None and heartbeat.state in ENDED:
        return replace(run, state=heartbeat.state, seconds_left=None)
    if heartbeat is not None and run.age is not None and run.age <= SILENT_AFTER:
        return replace(run, state=heartbeat.state if heartbeat.state in ALIVE else "unknown")
    if heartbeat is not None:
        return replace(run, state="silent", seconds_left=None)
    if last is not None:  # it could not even write a heartbeat
        run = replace(run, host=last.host, ranks=last.ranks, nodes=last.nodes, job=last.job)
        return replace(run, state="silent", age=max(0.0, now - last.started), step=last.from_step or 0)
    return run


def _complete_from_log(run: Run, folder: Path) -> Run:
    """``run`` with what the end of its log says and its heartbeat did not."""
    values = _last_logged(folder, ("step", "loss", "samples_per_second", "seconds_left"))
    logged = _count(values.get("step"))
    steps, step = run.steps or _count(_run_section(folder).get("steps")), run.step or logged
    done = run.state == "unknown" and 0 < steps <= step
    left, since = values.get("seconds_left"), steps - logged
    if left is not None and since > 0 and run.state in ALIVE:
        run = replace(run, seconds_left=left * max(0, steps - step) / since)
    loss, speed = run.loss, run.samples_per_second
    return replace(
        run,
        state="finished" if done else run.state,
        step=step,
        steps=steps,
        loss=values.get("loss") if loss is None else loss,
        samples_per_second=values.get("samples_per_second") if speed is None else speed,
    )


def _last_logged(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """The newest numbers of a log by these names, as far as its last lines have them."""
    values: dict[str, float] = {}
    for line in reversed(_tail(folder / "log.jsonl", _TAIL).splitlines()):
        with contextlib.suppress(ValueError, RecursionError):
            facts = json.loads(line)
            found = facts if isinstance(facts, dict) else {}
            values = {name: found[name] for name in names if isinstance(found.get(name), int | float)} | values
        if len(values) == len(names):
            break
    return values


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _run_section(folder: Path) -> dict[str, Any]:
    """``run`` of a run's config; empty if it makes no sense."""
    with contextlib.suppress(yaml.YAMLError):
        tree = yaml.load(_head(folder / "config.yaml", _CONFIG), Loader=_YAML)  # noqa: S506 (a SafeLoader)
        if isinstance(tree, dict) and isinstance(tree.get("run"), dict):
            return dict(tree["run"])
    return {}


def _count_events(folder: Path) -> dict[str, int]:
    return dict(Counter(kind.decode() for kind in _KIND.findall(_tail(folder / "events.jsonl", _EVENTS))))


def _with_stores(runs: Sequence[Run]) -> list[Run]:
    """``runs`` with what stores say; all are asked at once, and those that do not answer are left to themselves."""
    asked: dict[str, Future[str]] = {run.folder: Future() for run in runs if "://" in run.checkpoints}
    for run in runs:
        if run.folder in asked:
            threading.Thread(target=_ask_store, args=(run.checkpoints, asked[run.folder]), daemon=True).start()
    wait(asked.values(), timeout=_STORE_PATIENCE)

    def completed(run: Run) -> Run:
        answer = asked.get(run.folder)
        if answer is None:
            return run
        if not answer.done():
            return replace(run, fault=f"{run.checkpoints} does not answer within {_STORE_PATIENCE:g} s")
        if error := answer.exception():
            return replace(run, fault=f"cannot read {run.checkpoints}: {type(error).__name__}")
        return replace(run, checkpoint=answer.result() or run.checkpoint)

    return [completed(run) for run in runs]


def _ask_store(checkpoints: str, answer: Future[str]) -> None:
    try:
        fs, path = locate(f"{checkpoints}/latest")
        answer.set_result(_pointer(bytes(fs.cat_file(path))[:_LONGEST_POINTER]))
    except FileNotFoundError:
        answer.set_result("")  # no checkpoint yet
    except BaseException as error:  # each store's client has error classes of its own
        answer.set_exception(error)


def _pointer(content: bytes) -> str:
    """The checkpoint that a pointer's content names; empty for anything else."""
    name = content.decode(errors="replace").strip()
    return name if re.fullmatch(r"step-\d{1,18}", name) else ""


def _head(path: Path, limit: int) -> bytes:
    """The first bytes of a file; none where there is no file. Raises `OSError`."""
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except (FileNotFoundError, NotADirectoryError):
        return b""


def _tail(path: Path, limit: int) -> bytes:
    """The last bytes of a file; none where there is no file. Raises `OSError`."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return b""
