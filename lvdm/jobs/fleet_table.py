"""What `fleet` finds, as a table for a person."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lvdm.jobs.fleet import ALIVE, Run

_WIDE = 120  # columns that all cells need
_PIPED = 160
_GAP = 2
_SHORTEST_NAME = 12
_WHERE = 7
_COLOURS = {
    "unreadable": "red",
    "failed": "red",
    "silent": "red",
    "stalled": "yellow",
    "stopped": "yellow",
    "finished": "green",
    "unknown": "dim",
}


def console() -> Console:
    """Standard output, wide where it is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_PIPED)


def show(to: Console, runs: Sequence[Run]) -> None:
    """The runs, in their order, a line each, and indented below it what else is worth to be known of it."""
    to.print(Text(summary(runs), style="bold"))
    if not runs:
        return
    base, wide = _common_folder(runs), to.width >= _WIDE
    rows = [_cells(run, wide) for run in runs]
    header = ["state", "step", "left", "loss"] + (["samples/s", "saved", "requeues", "ranks"] if wide else [])
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    room = max(_SHORTEST_NAME, to.width - sum(widths) - _GAP * len(widths))
    room = min(room, max(len(_name(run, base)) for run in runs))
    to.print()
    _print_line(to, Text("run".ljust(room)), header, widths, "dim")
    for run, row in zip(runs, rows, strict=True):
        name = _name(run, base)
        if len(name) > room:
            to.print(Text(name), soft_wrap=True)
            name = ""
        _print_line(to, Text(name.ljust(room)), row, widths, _COLOURS.get(run.state, ""))
        if said := remarks(run):
            to.print(Padding(Text("; ".join(said), style="dim"), (0, 0, 0, 4)))


def _print_line(to: Console, name: Text, row: Sequence[str], widths: Sequence[int], style: str) -> None:
    """A line of the table, whose first cell, the state, and last one, where it runs, begin where those above do."""
    for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
        words = place == 0 or place == _WHERE
        name.append(" " * _GAP)
        name.append(cell.ljust(width) if words else cell.rjust(width), style=style if place == 0 else "")
    name.rstrip()
    to.print(name, no_wrap=True, overflow="ellipsis")


def _cells(run: Run, wide: bool) -> list[str]:
    left = "" if run.seconds_left is None else duration(run.seconds_left)
    cells = [state_of(run), progress_of(run, wide), left, "" if run.loss is None else f"{run.loss:.4f}"]
    if not wide:
        return cells
    speed = "" if run.samples_per_second is None else f"{run.samples_per_second:.1f}"
    return [*cells, speed, _saved(run), str(max(0, run.attempts - 1)), _where(run)]


def summary(runs: Sequence[Run]) -> str:
    """How many runs are in which state, in a line."""
    groups = {"unreadable": "unreadable", "failed": "failed", "silent": "silent", "stalled": "stalled"}
    groups |= {"stopped": "stopped", "unknown": "without a heartbeat", "finished": "finished"}
    groups |= dict.fromkeys(ALIVE, "running")
    counts = Counter(groups[run.state] for run in runs)
    said = ", ".join(f"{count:,} {name}" for name in dict.fromkeys(groups.values()) if (count := counts[name]))
    return f"{len(runs):,} run{'s' * (len(runs) != 1)}" + (f": {said}" if said else "")


def state_of(run: Run) -> str:
    """Its state; of one that is gone, for how long."""
    if run.state == "silent" and run.age is not None:
        return f"silent {duration(run.age)}"
    return run.state if run.state != "unknown" else "no heartbeat"


def progress_of(run: Run, wide: bool = True) -> str:
    """Steps done and their share, and if there is room of how many."""
    if not run.steps:
        return f"{run.step:,}" if run.step else ""
    share = int(100 * min(run.step, run.steps) / run.steps)
    return f"{run.step:,}" + (f"/{run.steps:,}" if wide else "") + f" {share:3d}%"


def remarks(run: Run) -> list[str]:
    """What is worth to be known of it beside numbers."""
    found = [run.fault] if run.fault else []
    if run.state == "silent":
        found.append("it was killed, or its node is gone")
    elif run.ended and run.state != "finished":
        found.append(f"last start: {run.ended}" if run.state in ALIVE else run.ended)
    found += [f"{count} x {kind.replace('_', ' ')}" for kind, count in run.events.items()]
    return found


def duration(seconds: float) -> str:
    """A time for a person, in two units at most: ``3 d 4 h``, ``12 min``."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours >= 10:
        return f"{hours} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"


def _saved(run: Run) -> str:
    number = run.checkpoint.rpartition("-")[2]
    return f"{int(number):,}" if number.isdigit() else run.checkpoint


def _where(run: Run) -> str:
    if not run.host:
        return ""
    said = f"{run.ranks} on {run.host}" if run.ranks else run.host
    return said + (f" +{run.nodes - 1}" if run.nodes > 1 else "")


def _common_folder(runs: Sequence[Run]) -> str:
    """What all runs are below of."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(run.folder)) for run in runs])


def _name(run: Run, base: str) -> str:
    return os.path.relpath(os.path.abspath(run.folder), base)
