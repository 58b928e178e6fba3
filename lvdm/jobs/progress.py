"""The progress line of every offline command: how much, how fast, how long yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Report = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


def silent(done: int, total: int) -> None:
    """Reports nothing."""


def megabytes(report: Report) -> Report:
    """``report`` in MB, to be called with bytes."""
    return lambda done, total: report(-(-done // 10**6), -(-total // 10**6))


@contextmanager
def progress_line(label: str, unit: str, stderr: bool = False) -> Iterator[Report]:
    """A line on the terminal while the block runs; gives the function that moves it.

    Args:
        stderr: where standard output is for results.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=stderr)) as progress:
        task = progress.add_task(label, total=None, visible=False)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        yield report


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self.unit}/s")
