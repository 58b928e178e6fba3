"""A folder of sampled clips: mp4s (and gifs), what was asked for, and a contact sheet.

samples.json         what was sampled and how: ``clips``, each with ``prompt``, ``seed`` and ``file``
clip-0000.mp4 ...    the clips, enlarged so that small ones can be watched
contact_sheet.png    some of them beside their captions
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvdm.data.decode import decode_frames, probe
from lvdm.errors import BadSample, UserError
from lvdm.media import contact_sheet, write_gif, write_mp4
from lvdm.storage import read_json

RECORD_NAME = "samples.json"
"""What was sampled and how."""
SHEET_NAME = "contact_sheet.png"
_WATCHABLE = 128
"""Height in pixels to which smaller clips are enlarged by whole multiples."""


def clip_name(number: int) -> str:
    """File of a clip."""
    return f"clip-{number:04d}.mp4"


def write_clip(path: Path, clip_THWC: np.ndarray, fps: float, *, gif: bool) -> None:
    """Write a clip, uint8 ``THWC``, as mp4 and on demand as gif beside it. Raises `UserError`."""
    scale = max(1, _WATCHABLE // clip_THWC.shape[1])
    if gif:
        write_gif(path.with_suffix(".gif"), clip_THWC, fps, scale=scale)
    write_mp4(path, clip_THWC, fps, scale=scale)


def read_clip(path: Path) -> np.ndarray:
    """All frames of a video file, uint8 ``THWC``. Raises `UserError`."""
    try:
        data = path.read_bytes()
        info = probe(data)
        return decode_frames(data, range(info.frames), info.height, info.width)
    except (OSError, BadSample) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def write_sheet(folder: Path, prompts: Sequence[str], rows: int) -> None:
    """The contact sheet of the clips in a folder, of ``rows`` of them evenly chosen. Raises `UserError`."""
    shown = np.linspace(0, len(prompts) - 1, min(rows, len(prompts))).round().astype(int)
    clips = [read_clip(folder / clip_name(int(number))) for number in shown]
    contact_sheet(folder / SHEET_NAME, clips, [prompts[int(number)] for number in shown])


def read_record(folder: Path) -> dict[str, Any]:
    """What was sampled into a folder; the clips' files are names without a folder. Raises `UserError`."""
    path = folder / RECORD_NAME
    record = read_json(path)
    clips = record.get("clips")
    if not isinstance(clips, list) or not clips or not all(_is_clip(clip) for clip in clips):
        raise UserError(f"{folder} was not written by tools/sample.py: {path.name} lists no clips")
    return record


def _is_clip(clip: Any) -> bool:
    texts = isinstance(clip, dict) and all(isinstance(clip.get(name), str) for name in ("prompt", "file"))
    return texts and Path(clip["file"]).name == clip["file"]
