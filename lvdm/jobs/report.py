"""A run as one web page that needs nothing else: curves, samples that play, config, versions, data, where time went."""

from __future__ import annotations

import base64
import html
import io
import json
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from lvdm.attempts import read_attempts
from lvdm.clip_folder import RECORD_NAME, read_record
from lvdm.config import AnyTraining, dump_yaml, parse_training_config, read_tree, shard_folders
from lvdm.data.index import open_index
from lvdm.errors import UserError
from lvdm.storage import atomic_file, read_json, write_text

Point = tuple[int, float]
Curves = dict[str, list[Point]]

_CHARTS = (
    ("Loss", ("loss", "validation/loss", "validation_ema/loss")),
    ("Loss by quarter of the diffusion time, held out, averaged weights", ("validation_ema/loss_by_time/quarter_",)),
    ("PSNR of reconstructions, held out (dB)", ("validation/psnr", "validation_ema/psnr")),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("lr",)),
    ("Samples a second", ("samples_per_second",)),
    ("Seconds a step of ranks' own work and waiting for data", ("ranks/",)),
    ("Memory of the main rank (GB)", ("memory_gb",)),
)
_LOGARITHMIC = ("Loss", "Gradient")
_SHOWN_SAMPLES = 3
"""Previews on the page, the newest and evenly chosen older ones."""
_SHOWN_CLIPS = 28
"""Clips of a folder on the page, evenly chosen."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c20; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2.2rem } p.state { color: #555 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 1rem }
.charts svg { width: 100%; height: auto }
.clips { display: flex; flex-wrap: wrap; gap: 12px } figure { margin: 0; width: 140px }
figure video { width: 140px; border-radius: 4px } figcaption { font-size: 12px; color: #555 }
table { border-collapse: collapse } td, th { padding: 3px 14px 3px 0; text-align: left; vertical-align: top }
th { font-weight: 600 } td.number { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #4c72b0; height: 12px; border-radius: 2px }
img { max-width: 100% }
pre { background: #f5f5f7; padding: 1rem; overflow-x: auto; border-radius: 4px; font-size: 13px }
"""


def write_report(run: Path, out: Path, samples: Sequence[Path] = (), scores: Path | None = None) -> None:
    """Write the page of a run folder to ``out``.

    Args:
        samples: folders of sampled clips to show beside the run's own previews.
        scores: what ``tools/evaluate.py --metric shapes`` wrote.
    Raises:
        UserError: the run, a folder of samples or the scores cannot be read, or ``out`` cannot be written.
    """
    config = read_config(run)
    lines = read_log(run)
    environment = read_json(run / "environment.json")
    parts = [
        f"<h1>{html.escape(run.name)}</h1>",
        f'<p class="state">{html.escape(_state(config, lines, environment))}</p>',
        *([_section("Scores", _scores(scores))] if scores else []),
        *(_section(f"Samples: {folder}", _clips(folder)) for folder in samples),
        *(_section(f"Preview, {folder.name}", _clips(folder)) for folder in _previews(run)),
        *_pictures(run),
        _section("Curves", _charts(curves(lines))),
        _section("Where the time went", _times(lines)),
        _section("Starts", _starts(run)),
        _section("Data", _data(config, lines, run)),
        _section("Versions", _table(environment)),
        _section("Config", f"<pre>{html.escape(dump_yaml(config))}</pre>"),
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(run.name)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    write_text(out, page)


def write_losses(run: Path, out: Path) -> None:
    """Write the chart of a run's losses as a PNG. Raises `UserError`."""
    found = charts(curves(read_log(run)))
    if not found:
        raise UserError(f"the log of {run} has no losses yet")
    with atomic_file(str(out)) as temporary:
        Path(temporary).write_bytes(draw(*found[0], "png"))


def read_config(run: Path) -> AnyTraining:
    """The config that a run folder holds. Raises `UserError`."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is no run folder: it has no config.yaml")
    return parse_training_config(read_tree(path), source=str(path))


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; one that a kill cut short is left out. Raises `UserError` if there is none yet."""
    path = run / "log.jsonl"
    lines = []
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; has the run made its first log line?") from None
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            lines.append(entry)
    if not lines:
        raise UserError(f"{path} holds no line yet")
    return lines


def curves(lines: Iterable[dict[str, Any]]) -> Curves:
    """The numbers of a log by name, each a list of (step, value)."""
    named: Curves = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                named.setdefault(name, []).append((line["step"], float(value)))
    return named


def draw(title: str, named: Curves, kind: str) -> bytes:
    """A chart of some curves as ``svg`` or ``png``, logarithmic for losses."""
    from matplotlib.figure import Figure  # not pyplot, whose figures are global; and the import takes a second

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, points in named.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name, linewidth=1.2, marker="." if len(points) < 30 else "")
    if title.startswith(_LOGARITHMIC) and all(value > 0 for points in named.values() for _, value in points):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    if len(named) > 1:
        axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()


def charts(named: Curves) -> list[tuple[str, Curves]]:
    """Title and curves of each chart that there is something for."""
    found = []
    for title, names in _CHARTS:
        picked = {
            name: points
            for name, points in sorted(named.items())
            if any(name == wanted or (wanted.endswith(("_", "/")) and name.startswith(wanted)) for wanted in names)
        }
        if picked:
            found.append((title, picked))
    return found


def _charts(named: Curves) -> str:
    svgs = (draw(title, picked, "svg").decode() for title, picked in charts(named))
    return f'<div class="charts">{"".join(svg[svg.index("<svg") :] for svg in svgs)}</div>'


def _state(config: AnyTraining, lines: Sequence[dict[str, Any]], environment: dict[str, Any]) -> str:
    step = lines[-1]["step"]
    losses = [line["loss"] for line in lines if "loss" in line]
    share = f"{step} of {config.run.steps} steps of {config.batch.size} samples"
    loss = f", training loss {losses[-1]:.4f}" if losses else ""
    where = f"{environment.get('ranks')} ranks, ZeRO-{config.engine.zero_stage}, {config.engine.precision}"
    return f"{config.task}, {config.model.kind}: {share}{loss}; {where}"


def _previews(run: Path) -> list[Path]:
    """The folders of the newest preview and of some older ones, evenly chosen, newest first."""
    found = sorted(path.parent for path in (run / "samples").glob(f"step-*/{RECORD_NAME}"))
    last = len(found) - 1
    return (
        sorted({found[last * i // (_SHOWN_SAMPLES - 1)] for i in range(_SHOWN_SAMPLES)}, reverse=True) if found else []
    )


def _clips(folder: Path) -> str:
    clips = read_record(folder)["clips"]
    shown = min(len(clips), _SHOWN_CLIPS)
    figures = []
    for clip in (clips[i * len(clips) // shown] for i in range(shown)):
        try:
            film = base64.b64encode((folder / clip["file"]).read_bytes()).decode()
        except OSError as error:
            raise UserError(f"cannot read {folder / clip['file']}: {error.strerror}") from None
        figures.append(
            f'<figure><video src="data:video/mp4;base64,{film}" autoplay loop muted playsinline></video>'
            f"<figcaption>{html.escape(clip['prompt'])}</figcaption></figure>"
        )
    return f'<div class="clips">{"".join(figures)}</div>'


def _pictures(run: Path) -> list[str]:
    found = sorted((run / "images").glob("*.png"))[-1:]
    return [
        _section(
            f"Clips above their reconstructions, {path.stem}",
            f'<img alt="" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">',
        )
        for path in found
    ]


def _times(lines: Iterable[dict[str, Any]]) -> str:
    seconds: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("seconds/"):
                part = name.removeprefix("seconds/").replace("_", " ")
                seconds[part] = seconds.get(part, 0.0) + value
    total = sum(seconds.values()) or 1.0
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{timedelta(seconds=round(value))}</td>'
        f'<td class="number">{value / total:.1%}</td>'
        f'<td style="width:300px"><div class="bar" style="width:{100 * value / total:.1f}%"></div></td></tr>'
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    )
    return f"<table>{rows}</table>"


def _starts(run: Path) -> str:
    """When each start of the run began, where, and how it ended."""
    titles = ("", "began (UTC)", "host of rank 0", "ranks", "from step", "to step", "how it ended")
    rows = ["".join(f"<th>{title}</th>" for title in titles)]
    for start in read_attempts(run):
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(start.started))
        known = (start.attempt, began, start.host, start.ranks, start.from_step, start.step, start.how)
        rows.append("".join(f"<td>{html.escape('' if value is None else str(value))}</td>" for value in known))
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _data(config: AnyTraining, lines: Sequence[dict[str, Any]], run: Path) -> str:
    source = config.data.latents if config.data.kind == "latents" else config.data.video
    assert source is not None
    rows: dict[str, Any] = {"kind": config.data.kind}
    for name, folders in {"training": shard_folders(source.shards), "held out": list(config.validation.shards)}.items():
        for folder in folders:
            try:
                rows[f"{name}: {folder}"] = f"{len(open_index([folder]))} samples"
            except UserError as error:
                rows[f"{name}: {folder}"] = str(error)
    replaced = max((line.get("replaced", 0) for line in lines), default=0)
    rows["samples seen"] = lines[-1]["step"] * config.batch.size
    rows["samples replaced"] = f"{replaced}, listed in {run / 'replaced.jsonl'}" if replaced else "none"
    return _table(rows)


def _scores(path: Path) -> str:
    parts = read_json(path)
    if not {"all", "unseen", "chance", "ceiling"} <= parts.keys():
        raise UserError(f"{path} holds no scores of moving shapes; tools/evaluate.py --metric shapes --out writes them")
    head = "<tr><th></th>" + "".join(f"<th>{name}</th>" for name in ("all", "unseen", "chance", "ceiling")) + "</tr>"
    rows = []
    for aspect, score in parts["all"].items():
        low, high = score["interval"]
        unseen, ceiling = parts["unseen"][aspect], parts["ceiling"][aspect]
        chance = f"{parts['chance'][aspect]:.0%}" if parts["chance"] else "-"  # one clip has no other's caption
        rows.append(
            f"<tr><td>{html.escape(aspect)}</td><td>{score['share']:.0%} ({low:.0%} - {high:.0%})</td>"
            f"<td>{unseen['share']:.0%}</td><td>{chance}</td><td>{ceiling['share']:.0%}</td></tr>"
        )
    return f"<table>{head}{''.join(rows)}</table>"


def _table(rows: dict[str, Any]) -> str:
    cells = []
    for name, value in rows.items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        cells.append(f"<tr><th>{html.escape(name)}</th><td>{html.escape(shown)}</td></tr>")
    return f"<table>{''.join(cells)}</table>"


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{content}"
