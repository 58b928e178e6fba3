"""Say what indexed shards hold, from the index alone, and show some of their clips.

python tools/inspect_shards.py data/my_videos/shards --sheet look.png
python tools/inspect_shards.py data/my_videos/shards --where "duration >= 2" --where "language in en,de"
python tools/inspect_shards.py s3://bucket/shards --size 16x256x256 --size 1x512x512 --json
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lvdm.errors import UserError, command_line

if TYPE_CHECKING:
    from lvdm.config import ClipConfig, Condition
    from lvdm.jobs.inspect_shards import Inspected

DAMAGED_SHOWN = 20


def main() -> None:
    """Print the tables, or JSON, and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="indexed folder, or any fsspec URL of one")
    parser.add_argument("--where", action="append", default=[], metavar="CONDITION", help='such as "duration >= 2"')
    parser.add_argument("--size", action="append", default=[], metavar="TxHxW", help="size of clips to share out to")
    parser.add_argument("--stride", type=int, default=1, help="video frames from one clip frame to the next (1)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="picture of some samples")
    parser.add_argument("--rows", type=int, default=16, help="samples on the sheet (16)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    arguments = parser.parse_args()
    with command_line("inspect_shards"):
        where = [condition_of(text) for text in arguments.where]
        sizes = [size_of(text, arguments.stride) for text in arguments.size]
        from lvdm.jobs.inspect_shards import inspect_shards, write_sheet

        found = inspect_shards(arguments.folders, where, sizes)
        if arguments.json:
            print(json.dumps(found.as_json(), indent=1))
        else:
            show(found, ", ".join(arguments.folders))
        if arguments.sheet:
            for fault in write_sheet(arguments.folders, arguments.sheet, arguments.rows, where):
                print(f"not shown: {fault}")


def condition_of(text: str) -> Condition:
    """A condition such as ``duration >= 2`` or ``language in en,de``. Raises `UserError`."""
    from pydantic import ValidationError

    from lvdm.config import Condition

    try:
        return Condition.model_validate(text)
    except ValidationError as error:
        raise UserError(f"--where {error.errors()[0]['ctx']['error']}") from None


def size_of(text: str, stride: int) -> ClipConfig:
    """A size such as ``16x256x256``. Raises `UserError`."""
    from lvdm.config import ClipConfig

    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if not found:
        raise UserError(f"--size {text!r} is not of the form FRAMESxHEIGHTxWIDTH, such as 16x256x256")
    if stride < 1:
        raise UserError(f"--stride {stride} is less than 1")
    frames, height, width = map(int, found.groups())
    return ClipConfig(frames=frames, height=height, width=width, stride=stride)


def show(found: Inspected, title: str) -> None:
    """Print it as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{title}: {found.samples:,} samples in {found.shards:,} shards, {found.bytes / 1e9:,.3f} GB")
    for reason, count in found.left_out.items():
        console.print(f"left out of the index: {count:,} {reason}", highlight=False)
    for damage in list(found.damaged.values())[:DAMAGED_SHOWN]:
        console.print(damage, highlight=False, markup=False)
    members = Table("member", "samples", "MB", "median kB")
    for name, row in found.members.items():
        members.add_row(name, f"{row['members']:,}", f"{row['bytes'] / 1e6:,.1f}", f"{row['median'] / 1e3:,.1f}")
    console.print(members)
    if found.numbers:
        names = ("samples", "least", "median", "95 %", "largest", "sum")
        numbers = Table("field", *names)
        for name, values in found.numbers.items():
            numbers.add_row(name, *(f"{values[part]:,.4g}" if part in values else "-" for part in names))
        console.print(numbers)
    for name, counts in found.texts.items():
        shown = ", ".join(f"{value!r} {count:,}" for value, count in counts.items())
        console.print(f"{name}: {shown}", highlight=False)
    for reason, count in found.removed.items():
        console.print(f"removed: {count:,} by {reason}", highlight=False)
    for name, count in found.kept.items():
        console.print(f"kept: {count:,} ({name})", highlight=False)


if __name__ == "__main__":
    main()
