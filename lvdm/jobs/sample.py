"""Clips of many captions into one folder, by any number of ranks, resumable.

The captions are cut into batches whatever the ranks, and the batches whose files do not all exist are shared out to the
ranks in turn: a clip is the same bits however many ranks there are, and what is there is not sampled again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvdm.clip_folder import RECORD_NAME, SHEET_NAME, clip_name, write_clip, write_sheet
from lvdm.errors import UserError
from lvdm.jobs.progress import progress_line, silent
from lvdm.storage import local_folder, read_json, sha256_of, write_json

if TYPE_CHECKING:  # torch takes seconds to import, and bad requests are refused without it
    from lvdm.diffusion.samplers import Sampler
    from lvdm.engine.environment import World

_PATIENCE = 3600.0
"""Seconds that a rank waits for the others, which may have a batch more to sample."""


@dataclass(frozen=True)
class Request:
    """One clip."""

    prompt: str
    seed: int
    negative: str = ""


@dataclass(frozen=True)
class Settings:
    """How all clips of a folder are sampled; see `lvdm.inference.VideoModel.sample`."""

    steps: int = 50
    guidance: float = 7.5
    sampler: Sampler | None = None
    eta: float = 0.0
    frames: int | None = None
    batch: int = 8
    fps: int = 8
    gif: bool = True
    """Whether each clip is written as a gif too, beside its mp4."""
    rows: int = 16
    """Clips on the contact sheet, evenly chosen; 0 for no sheet."""

    def __post_init__(self) -> None:
        """Refuse what would fail after the sampling. Raises `UserError`."""
        for name, least in {"batch": 1, "fps": 1, "rows": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)} must be at least {least}")


def read_requests(path: Path, first_seed: int, negative: str) -> list[Request]:
    """The requests of a text file with a caption a line, or of a ``.jsonl`` of ``{"prompt", "seed", "negative"}``.

    Raises:
        UserError: the file cannot be read, or a line is faulty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    requests: list[Request] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields: dict[str, Any] = {"seed": first_seed + len(requests), "negative": negative}
        if path.suffix != ".jsonl":
            requests.append(Request(line.strip(), **fields))
            continue
        try:
            request = Request(**(fields | json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no request such as {{'prompt': 'x'}}: {error}") from None
        if [type(request.prompt), type(request.seed), type(request.negative)] != [str, int, str]:
            raise UserError(f"{path}: line {number}: prompt and negative must be text and seed a whole number")
        requests.append(request)
    return requests


def sample_folder(model: str, out: Path, requests: Sequence[Request], settings: Settings) -> None:
    """Sample ``requests`` with an exported model into ``out``, or go on with that; called on every rank.

    Args:
        model: folder or URL of an export.
    Raises:
        UserError: the model cannot be read or does not fit the settings, or ``out`` holds other samples.
    """
    from lvdm.engine.environment import read_world

    world = read_world()
    with local_folder(model) as folder:
        if world.size == 1:
            record = _record(model, folder, out, requests, settings)
            _sample_batches(folder, out, record, requests, settings, _missing(out, len(requests), settings), world)
        else:
            from lvdm.engine import distributed

            ranks = distributed.start(_PATIENCE)
            try:
                record = distributed.together(lambda: _record(model, folder, out, requests, settings), ranks.device)
                # one list for all, made before anybody writes: what is left is shared out evenly
                missing = distributed.gather_json(_missing(out, len(requests), settings), ranks.device)[0]
                mine = missing[world.rank :: world.size]
                distributed.together(
                    lambda: _sample_batches(folder, out, record, requests, settings, mine, world), ranks.device
                )
            finally:
                distributed.stop()
    if world.rank == 0:
        if settings.rows:
            write_sheet(out, [request.prompt for request in requests], settings.rows)
        formats = "mp4 and gif" if settings.gif else "mp4"
        print(f"{out}: {len(requests)} clips as {formats}{f', {SHEET_NAME}' if settings.rows else ''}")


def _record(model: str, folder: Path, out: Path, requests: Sequence[Request], settings: Settings) -> dict[str, Any]:
    """What is to be sampled, with which weights. Raises `UserError` if ``out`` was begun with anything else."""
    record: dict[str, Any] = {
        "model": model,
        "sha256": sha256_of(*sorted(folder.rglob("*.safetensors"))),
        "clips": [asdict(request) | {"file": clip_name(i)} for i, request in enumerate(requests)],
        **asdict(settings),
    }
    path = out / RECORD_NAME
    held = read_json(path) if path.is_file() else record
    changed = sorted(name for name in record.keys() | held.keys() if held.get(name) != record.get(name))
    if set(changed) - {"rows"}:
        raise UserError(
            f"{out} holds other samples: {', '.join(changed)} differ (see {path}); choose another folder or remove it"
        )
    return record


def _missing(out: Path, total: int, settings: Settings) -> list[int]:
    """First clips of the batches that are not there yet."""
    starts = range(0, total, settings.batch)
    return [start for start in starts if not _complete(out, start, total, settings)]


def _sample_batches(
    folder: Path,
    out: Path,
    record: dict[str, Any],
    requests: Sequence[Request],
    settings: Settings,
    missing: Sequence[int],
    world: World,
) -> None:
    """Sample the batches that begin with these clips."""
    if not missing:
        return
    from lvdm.inference import load

    pipeline = load(folder)
    with progress_line("sampling", "steps") if world.rank == 0 else contextlib.nullcontext(silent) as progress:
        for turn, start in enumerate(missing):
            batch = requests[start : start + settings.batch]

            def report(done: int, total: int, turn: int = turn) -> None:
                progress(turn * total + done, len(missing) * total)

            clips_BTHWC = pipeline.sample(
                [request.prompt for request in batch],
                negative_prompts=[request.negative for request in batch],
                seeds=[request.seed for request in batch],
                frames=settings.frames,
                steps=settings.steps,
                guidance=settings.guidance,
                sampler=settings.sampler,
                eta=settings.eta,
                batch=len(batch),
                progress=report,
            ).numpy()
            if turn == 0:  # not before something fits; every rank writes the same
                write_json(out / RECORD_NAME, record)
            for number, clip in enumerate(clips_BTHWC, start=start):
                write_clip(out / clip_name(number), clip, settings.fps, gif=settings.gif)


def _complete(out: Path, start: int, total: int, settings: Settings) -> bool:
    files = [out / clip_name(number) for number in range(start, min(start + settings.batch, total))]
    if settings.gif:
        files += [file.with_suffix(".gif") for file in files]
    return all(file.is_file() for file in files)
