"""Clips of many captions into one folder, by any number of ranks, resumable.

The captions are cut into batches whatever the ranks, and rank r takes the batches whose number is r modulo the ranks: a
clip is the same bits however many ranks there are. A batch whose files all exist is not sampled again.
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
from lvdm.storage import read_json, write_json

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


def read_requests(path: Path, first_seed: int, negative: str) -> list[Request]:
    """The requests of a text file with a caption a line, or of a ``.jsonl`` of ``{"prompt", "seed", "negative"}``.

    Raises:
        UserError: the file cannot be read, or a line is faulty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if path.suffix != ".jsonl":
        return [Request(line, first_seed + number, negative) for number, line in enumerate(lines)]
    requests = []
    for number, line in enumerate(lines):
        try:
            request = Request(**({"seed": first_seed + number, "negative": negative} | json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: line {number + 1} is no request such as {{'prompt': 'x'}}: {error}") from None
        if not isinstance(request.prompt, str) or not isinstance(request.seed, int):
            raise UserError(f"{path}: line {number + 1}: prompt must be text and seed a whole number")
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
    if world.size == 1:
        _sample_share(model, out, requests, settings, world)
    else:
        from lvdm.engine import distributed

        ranks = distributed.start(_PATIENCE)
        try:
            distributed.together(lambda: _sample_share(model, out, requests, settings, world), ranks.device)
        finally:
            distributed.stop()
    if world.rank == 0:
        if settings.rows:
            write_sheet(out, [request.prompt for request in requests], settings.rows)
        formats = "mp4 and gif" if settings.gif else "mp4"
        print(f"{out}: {len(requests)} clips as {formats}{f', {SHEET_NAME}' if settings.rows else ''}")


def _record(model: str, out: Path, requests: Sequence[Request], settings: Settings) -> dict[str, Any]:
    """What is to be sampled. Raises `UserError` if ``out`` was begun with anything else."""
    record: dict[str, Any] = {
        "model": model,
        "clips": [asdict(request) | {"file": clip_name(i)} for i, request in enumerate(requests)],
        **asdict(settings),
    }
    path = out / RECORD_NAME
    if path.is_file() and read_json(path) != record:
        raise UserError(f"{out} holds other samples (see {path}); choose another folder or remove it")
    return record


def _sample_share(model: str, out: Path, requests: Sequence[Request], settings: Settings, world: World) -> None:
    """Sample this rank's batches that are not there yet."""
    from lvdm.inference import load

    pipeline = load(model)
    record = _record(model, out, requests, settings)
    starts = range(0, len(requests), settings.batch)[world.rank :: world.size]
    missing = [start for start in starts if not _complete(out, start, len(requests), settings)]
    if not missing:
        return
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
                _begin(out, record)
            for number, clip in enumerate(clips_BTHWC, start=start):
                write_clip(out / clip_name(number), clip, settings.fps, gif=settings.gif)


def _begin(out: Path, record: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RECORD_NAME, record)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def _complete(out: Path, start: int, total: int, settings: Settings) -> bool:
    files = [out / clip_name(number) for number in range(start, min(start + settings.batch, total))]
    if settings.gif:
        files += [file.with_suffix(".gif") for file in files]
    return all(file.is_file() for file in files)
