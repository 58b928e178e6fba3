"""What `inspect_checkpoint` and `compare_checkpoints` find, as tables for a person."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lvdm.checkpoint.pieces import FROZEN, KINDS
from lvdm.jobs.compare_checkpoints import Difference
from lvdm.jobs.inspect_checkpoint import Contents, Inspected, Listed, Norms, total_of

SHOWN = 20
"""Lines of a list that may be long."""
_FILES = 8
_WIDTH = 160  # of what is piped on
_LONG = 100  # characters of a value
_NUMBER = (int, float)


def console() -> Console:
    """Standard output, wide enough for names of parameters where it is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_WIDTH)


def size(count: float) -> str:
    """Bytes for a person: ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def amount(count: int) -> str:
    """A number of elements for a person: ``1.23 M``."""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {unit}"
    return str(count)


def show(to: Console, found: Inspected) -> None:
    """What there is at a path."""
    if found.checkpoints:
        show_list(to, found.root, found.checkpoints)
    if found.checkpoint is not None:
        show_contents(to, found.checkpoint)
    if found.norms is not None:
        show_norms(to, found.norms)


def show_list(to: Console, root: str, found: Sequence[Listed]) -> None:
    """The checkpoints of a run."""
    damaged = [one for one in found if one.fault]
    said = f"{root}: {_plural(len(found), 'checkpoint')}, {size(sum(one.bytes for one in found))}"
    to.print(Text(said + (f", {len(damaged)} damaged" if damaged else ""), style="bold"))
    scores = sorted({name for one in found for name in one.scores})
    table = _table("checkpoint", "step", "samples", "size", *scores, left=("",))
    for one in found:
        numbers = [f"{one.scores[name]:.6g}" if name in one.scores else "" for name in scores]
        about = [f"{one.samples:,}", size(one.bytes)] if not one.fault else ["", ""]
        mark = Text(", ".join(one.marks))
        table.add_row(one.name, f"{one.step:,}", *about, *numbers, Text("damaged", "red") if one.fault else mark)
    to.print(table)
    for one in damaged:
        to.print(Text.assemble(("damaged ", "red"), one.fault), soft_wrap=True)


def show_contents(to: Console, found: Contents) -> None:
    """One checkpoint."""
    to.print(Text(found.location, style="bold"), soft_wrap=True)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column(overflow="fold")
    by = dict(found.written_by)
    steps = {name: network.optimizer_step for name, network in found.networks.items()}
    applied = ", ".join(f"{count:,}{f' of {name}' * (len(steps) > 1)}" for name, count in steps.items())
    lines.add_row("step", f"{found.step:,} ({found.clock.get('samples', 0):,} samples, {applied} optimizer steps)")
    ranks, stage, precision = (by.pop(name, "?") for name in ("ranks", "zero_stage", "precision"))
    written = f"{ranks} rank{'s' * (ranks != 1)}, ZeRO stage {stage}, {precision}; "
    lines.add_row("written by", Text(written + ", ".join(f"{name} {_short(value)}" for name, value in by.items())))
    for label, values in (("scores", found.scores), ("facts", found.facts), ("clock", found.clock)):
        told = {name: value for name, value in values.items() if name not in ("step", "samples")}
        shown = [f"{name} {_brief(value)}" for name, value in told.items() if value not in ({}, [])]
        if shown:
            lines.add_row(label, Text(", ".join(shown)))
    files = [f"{name} {size(count)}" for name, count in list(found.files.items())[:_FILES]]
    more = [f"{len(found.files) - _FILES} more"] if len(found.files) > _FILES else []
    count = _plural(len(found.files), "file")
    lines.add_row("size", f"{size(found.bytes)} in {count}: {', '.join([*files, *more])}")
    to.print(lines)
    table = _table("network", "learning", "frozen", "tensors", *KINDS, FROZEN)
    for name, network in found.networks.items():
        kinds = [size(network.bytes[kind]) if kind in network.bytes else "" for kind in (*KINDS, FROZEN)]
        table.add_row(name, amount(network.learning), amount(network.frozen), f"{network.tensors:,}", *kinds)
    to.print(table)


def show_norms(to: Console, rows: Sequence[Norms]) -> None:
    """The norms of every parameter, and of each network."""
    table = _table("parameter", "elements", *KINDS, "EMA distance", left=("",))
    networks = list(dict.fromkeys(row.network for row in rows))
    for row in rows:
        weights = row.norms.get(FROZEN, row.norms.get("master", 0.0))
        values = [_number(weights), *(_number(row.norms[kind]) if kind in row.norms else "" for kind in KINDS[1:])]
        distance = "" if row.ema_distance is None else _number(row.ema_distance)
        name = f"{row.network}/{row.name}" if len(networks) > 1 else row.name
        remark = Text("not finite", "red") if row.non_finite else Text("frozen" * (FROZEN in row.norms), "dim")
        table.add_row(Text(name), f"{row.elements:,}", *values, distance, remark)
    for network in networks:
        table.add_section()
        total, elements = total_of(rows, network), sum(row.elements for row in rows if row.network == network)
        weights = math.hypot(total.get("master", 0.0), total.get(FROZEN, 0.0))
        values = [_number(total[kind]) if kind in total else "" for kind in KINDS[1:]]
        table.add_row(Text(f"all of {network}", "bold"), f"{elements:,}", _number(weights), *values, "", "")
    to.print(table)
    for row in rows:
        for kind, count in row.non_finite.items():
            said = f"{row.network}/{row.name}: {count:,} of {row.elements:,} elements of {kind} are not finite"
            to.print(Text(said, "red"), soft_wrap=True)


def show_difference(to: Console, found: Difference) -> None:
    """What differs between two checkpoints."""
    to.print(Text(f"- {found.first}\n+ {found.second}", style="bold"), soft_wrap=True)
    for label, names in (
        ("only in the first", found.only_first),
        ("only in the second", found.only_second),
        ("learns in one alone", found.frozen),
    ):
        _show_names(to, label, names)
    shapes = [f"{name} {list(first)} and {list(second)}" for name, (first, second) in found.shapes.items()]
    _show_names(to, "of another shape", shapes)
    table = _table(
        "kind", "parameters that differ", "largest difference", "relative", "largest in", left=("largest in",)
    )
    for kind, one in found.kinds.items():
        count = f"{one.parameters:,} of {one.of:,}"
        table.add_row(kind, count, _number(one.largest), _number(one.relative), Text(one.largest_in))
    to.print(table)
    if found.parameters:
        rows = _table("parameter", "kind", "elements", "largest difference", "relative", left=("kind",))
        for row in found.parameters[:SHOWN]:
            name = Text(f"{row.network}/{row.name}")
            rows.add_row(name, row.kind, f"{row.elements:,}", _number(row.largest), _number(row.relative))
        to.print(rows)
        if len(found.parameters) > SHOWN:
            to.print(f"and {len(found.parameters) - SHOWN:,} more, which differ less (all of them with --json)")
    _show_entries(to, "what a run goes on from", found.state)
    _show_entries(to, "what does not count as a difference", found.about)
    to.print(Text("equal" if found.equal else "different", style="bold"))


def _show_names(to: Console, label: str, names: Sequence[str]) -> None:
    if not names:
        return
    to.print(f"{label}: {len(names):,}")
    for name in names[:SHOWN]:
        to.print(Text(f"  {name}"), soft_wrap=True)
    if len(names) > SHOWN:
        to.print(f"  and {len(names) - SHOWN:,} more")


def _show_entries(to: Console, label: str, entries: Mapping[str, tuple[Any, Any]]) -> None:
    if not entries:
        return
    table = _table(label, "first", "second", left=("first", "second"))
    for path, (first, second) in entries.items():
        table.add_row(Text(path), Text(_short(first)), Text(_short(second)))
    to.print(table)


def _table(first: str, *rest: str, left: Sequence[str] = ()) -> Table:
    """A table whose columns of numbers end alike; those of ``left`` begin alike."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in rest:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    if "" in left:
        table.add_column("", overflow="fold")
    return table


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.4g}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _brief(value: Any) -> str:
    """A value in a line of several: of a mapping or a long list how much it holds."""
    if isinstance(value, dict) or (isinstance(value, list) and len(value) > 8):
        return f"({len(value)} entries)"
    return _short(value)


def _short(value: Any) -> str:
    """A value in few characters; a mapping or a list by what it begins with."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list) and all(isinstance(entry, _NUMBER) for entry in value):
        value = "[" + ", ".join(f"{entry:.6g}" for entry in value) + "]"
    text = " ".join(str(value).split())
    return text if len(text) <= _LONG else text[: _LONG - 3] + "..."
