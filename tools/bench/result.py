"""The dated file that a bench leaves: its tables under what they were measured with."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def write_result(folder: Path, name: str, title: str, packages: Sequence[str], lines: Sequence[str]) -> Path:
    """Print the lines and write them, with hardware, versions and command, to ``NAME_cpuN_DATE.md``."""
    print("\n".join(lines))
    today = datetime.date.today().isoformat()
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    cpu = model.partition(":")[2].strip() or platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    head = [
        f"# {title}, {today}",
        "",
        f"- command: `{' '.join([Path(sys.executable).name, *sys.argv])}`",
        f"- hardware: {cpu}, {os.cpu_count()} cores, {memory:.0f} GB, load average {os.getloadavg()[0]:.1f} at the end",
        f"- versions: Python {platform.python_version()}, {', '.join(f'{p} {version(p)}' for p in packages)}",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_cpu{os.cpu_count()}_{today}.md"
    path.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    return path
