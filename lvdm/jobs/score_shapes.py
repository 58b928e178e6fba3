"""How well sampled moving shapes follow their captions, beside chance and the ceiling that the autoencoder sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lvdm
from lvdm.clip_folder import read_clip, read_record
from lvdm.errors import UserError
from lvdm.evaluation.shapes import Score, Seen, look, scores
from lvdm.inference import VideoModel, float_to_frames, frames_to_float, load
from lvdm.jobs.progress import Report
from lvdm.models.video_autoencoder import split_moments
from lvdm.synthetic import HELD_OUT, Combination, caption, combinations, render

_SIDE = 32
"""Pixels to which larger clips are shrunk: what the checker takes grows with the area."""
_CEILING_SEED = 1_000_000
"""Of the true clips that the autoencoder is tried on; training sets count up from small seeds."""


def score_folder(folder: Path, progress: Report) -> dict[str, Any]:
    """Scores of a folder that ``tools/sample.py`` wrote, by part of the captions, and all that they depend on.

    ``all``, ``trained`` (combinations that training sets contain) and ``unseen`` (those that none does) give for each
    aspect the share of clips that show it, with its 95 % interval; ``chance`` is what the same clips score against each
    other's captions, ``ceiling`` what true clips score after a round trip through the model's autoencoder.

    Raises:
        UserError: the folder was not written by ``tools/sample.py``, a clip is missing, a caption is of no moving
            shape, or the model is gone.
    """
    record = read_record(folder)
    if not isinstance(record.get("model"), str):
        raise UserError(f"{folder} names no model that its clips are of; sample them with tools/sample.py")
    model = load(record["model"])
    wanted = [_combination(clip["prompt"], folder) for clip in record["clips"]]
    seen, ceiling = [], []
    for number, (clip, combination) in enumerate(zip(record["clips"], wanted, strict=True), start=1):
        seen.append(look(shrink(read_clip(folder / clip["file"]))))
        ceiling.append(look(shrink(round_trip(model, _true_clip(model, combination)))))
        progress(number, len(wanted))
    unseen = [combination in HELD_OUT for combination in wanted]
    parts = {
        "all": range(len(wanted)),
        "trained": [i for i, is_new in enumerate(unseen) if not is_new],
        "unseen": [i for i, is_new in enumerate(unseen) if is_new],
    }
    return {
        **{name: _as_json(scores([seen[i] for i in part], [wanted[i] for i in part])) for name, part in parts.items()},
        "chance": chance(seen, wanted),
        "ceiling": _as_json(scores(ceiling, wanted)),
        "sampling": {name: value for name, value in record.items() if name != "clips"},
        "versions": {"lvdm": lvdm.__version__, "torch": torch.__version__},
    }


def chance(seen: Sequence[Seen], wanted: Sequence[Combination]) -> dict[str, float]:
    """What clips score against each other's captions, on average over all shifts of the list."""
    shifted = [scores(seen, [*wanted[by:], *wanted[:by]]) for by in range(1, len(wanted))]
    return {name: sum(one[name].share for one in shifted) / len(shifted) for name in shifted[0]} if shifted else {}


def round_trip(model: VideoModel, frames_THWC: np.ndarray) -> np.ndarray:
    """A clip encoded to the posterior's mean and decoded again, uint8 ``THWC``."""
    frames_BCTHW = torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(3, 0, 1, 2)[None].to(model.device)
    mean_BCTHW, _ = split_moments(model.vae.encode(frames_to_float(frames_BCTHW)))
    return float_to_frames(model.vae.decode(mean_BCTHW))[0].cpu().numpy()


def shrink(frames_THWC: np.ndarray) -> np.ndarray:
    """Averages over whole pixels, down to a side of 32 or just above."""
    factor = frames_THWC.shape[1] // _SIDE
    if factor < 2 or any(side % factor for side in frames_THWC.shape[1:3]):
        return frames_THWC
    frames, height, width, channels = frames_THWC.shape
    blocks = frames_THWC.reshape(frames, height // factor, factor, width // factor, factor, channels)
    return blocks.mean((2, 4)).round().astype(np.uint8)


def _true_clip(model: VideoModel, combination: Combination) -> np.ndarray:
    """A clip as the model was trained on. Raises `UserError`."""
    source = model.config.data.video
    if source is None:
        raise UserError("the model's config has no data.video, so the clips it was trained on are not known")
    clip = source.clip
    return render(combination, _CEILING_SEED, clip.frames * clip.stride, clip.height)[:: clip.stride]


def _combination(prompt: str, folder: Path) -> Combination:
    found = next((combination for combination in combinations() if caption(combination) == prompt), None)
    if found is None:
        raise UserError(f"{folder}: {prompt!r} is no caption of moving shapes, such as {caption(combinations()[0])!r}")
    return found


def _as_json(counted: dict[str, Score]) -> dict[str, Any]:
    return {
        name: {"share": score.share, "right": score.right, "of": score.of, "interval": score.interval}
        for name, score in counted.items()
    }
