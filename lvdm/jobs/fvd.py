"""FVD and KVD of sampled clips against real ones, by I3D's features (the protocol of LVDM and TATS).

Scores depend on the copy of the data set, its frame rate, resize and number of clips, so all of these are part of the
result. Real clips may be drawn anew several times, as LVDM's evaluation does; the spread of the score says how much
it depends on that draw.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lvdm
from lvdm.config import ClipConfig
from lvdm.data.decode import VIDEO_EXTENSIONS, VideoInfo, decode_frames
from lvdm.data.transforms import clip_draws, clip_indices
from lvdm.errors import BadSample, UserError
from lvdm.evaluation.distances import frechet_distance, kernel_distance
from lvdm.evaluation.i3d import I3D, MIN_FRAMES, preprocess
from lvdm.jobs.progress import Report
from lvdm.storage import sha256_of
from lvdm.weights.torch_file import read_tensors


@dataclass(frozen=True)
class Clips:
    """A set of clips on disk."""

    path: Path
    """Folder of video files (searched to any depth), or a ``.npz`` / ``.npy`` of uint8 ``[N, T, H, W, 3]``."""
    clip: ClipConfig
    """How a clip is cut from a video file; an array is taken as it is, up to ``clip.frames`` frames."""
    limit: int
    """Clips used at most, the first in the order of their names."""


def fvd(
    real: Clips,
    fake: Clips,
    i3d_weights: Path,
    *,
    redraws: int,
    batch: int,
    device: torch.device,
    progress: Report,
) -> dict[str, Any]:
    """Scores with everything that they depend on.

    Args:
        i3d_weights: ``i3d_pretrained_400.pt`` of TATS, or the same as safetensors.
        redraws: times that the real clips are drawn, with the seeds 0, 1, ...
        batch: clips that the network sees at once.
    Raises:
        UserError: a set or the weights cannot be read, or a set has fewer than two clips.
    """
    for clips in (real, fake):
        if clips.clip.frames < MIN_FRAMES:
            raise UserError(f"--frames {clips.clip.frames} is too short for I3D, which needs {MIN_FRAMES}")
    network = load_i3d(i3d_weights).to(device)
    sets = [(fake, 0), *((real, seed) for seed in range(redraws))]
    total = sum(min(len(_names(clips)), clips.limit) for clips, _ in sets)
    features: list[Tensor] = []
    bad: dict[str, str] = {}
    done = 0
    for clips, seed in sets:
        rows: list[Tensor] = []
        for group in _batches(clips, seed, batch, bad):
            rows.append(network(preprocess(torch.from_numpy(group).to(device))).double().cpu())
            done += len(group)
            progress(done, total)
        features.append(torch.cat(rows) if rows else torch.empty(0, 400))
        if len(features[-1]) < 2:
            raise UserError(f"{clips.path} holds fewer than two clips of {clips.clip.frames} frames: {bad or 'none'}")
    fakes, reals = features[0], features[1:]
    scores = {
        "fvd": [frechet_distance(drawn, fakes) for drawn in reals],
        "kvd": [kernel_distance(drawn, fakes) for drawn in reals],
    }
    half = len(reals[0]) // 2
    return {
        **{name: {"mean": statistics.fmean(values), "redraws": values} for name, values in scores.items()},
        "fvd_between_halves_of_the_real": frechet_distance(reals[0][:half], reals[0][half:]) if half > 1 else None,
        "clips": {"real": len(reals[0]), "fake": len(fakes)},
        "unreadable": bad,
        "real": {"path": str(real.path), "clip": real.clip.model_dump()},
        "fake": {"path": str(fake.path), "clip": fake.clip.model_dump()},
        "i3d": {"path": str(i3d_weights), "sha256": sha256_of(i3d_weights)},
        "versions": {"lvdm": lvdm.__version__, "torch": torch.__version__},
    }


def load_i3d(path: Path) -> I3D:
    """I3D in eval mode. Raises `UserError` naming tensors that are missing, unexpected or of another shape."""
    network = I3D().eval().requires_grad_(False)
    tensors = read_tensors(path)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in sorted(wanted.keys() | given.keys()) if wanted.get(name) != given.get(name)]
    if wrong:
        raise UserError(f"{path} is not I3D for 400 classes: {len(wrong)} tensors differ, the first {wrong[0]}")
    network.load_state_dict(dict(tensors))
    return network


def _names(clips: Clips) -> list[Any]:
    """Video files in the order of their names, or the rows of an array. Raises `UserError`."""
    if clips.path.is_dir():
        return sorted(file for file in clips.path.rglob("*") if file.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS)
    return list(range(len(_array(clips.path))))


def _array(path: Path) -> np.ndarray:
    """Clips of an array file; `.npy` is memory-mapped."""
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        array = loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]]
    except (OSError, ValueError, IndexError, EOFError) as error:
        raise UserError(f"cannot read {path} as a folder of videos or as .npz / .npy: {error}") from None
    if array.dtype != np.uint8 or array.ndim != 5 or array.shape[-1] != 3:
        raise UserError(f"{path} holds {array.dtype} {list(array.shape)}, not uint8 [N, T, H, W, 3]")
    return array


def _batches(clips: Clips, seed: int, size: int, bad: dict[str, str]) -> Iterator[np.ndarray]:
    """Clips ``BTHWC``; what cannot be used is named in ``bad``."""
    names = _names(clips)[: clips.limit]
    array = None if clips.path.is_dir() else _array(clips.path)
    if array is not None:
        if array.shape[1] < clips.clip.frames:
            raise UserError(f"{clips.path} has clips of {array.shape[1]} frames, not {clips.clip.frames}")
        for start in range(0, len(names), size):
            yield np.array(array[start : min(start + size, len(names)), : clips.clip.frames])
        return
    group: list[np.ndarray] = []
    for number, file in enumerate(names):
        draw = clip_draws(seed, number).start

        def indices(info: VideoInfo, draw: float = draw) -> list[int]:
            return clip_indices(info.frames, clips.clip, draw)

        try:
            frames = decode_frames(file.read_bytes(), indices, clips.clip.height, clips.clip.width, clips.clip.resize)
        except (BadSample, OSError) as error:
            bad[str(file)] = str(error)
            continue
        group.append(frames)
        if len(group) == size:
            yield np.stack(group)
            group = []
    if group:
        yield np.stack(group)
