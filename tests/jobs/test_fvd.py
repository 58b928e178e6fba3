"""FVD end to end: real files, the real network with weights that are made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvdm.config import ClipConfig
from lvdm.errors import UserError
from lvdm.evaluation.i3d import I3D
from lvdm.jobs.fvd import Clips, fvd
from lvdm.jobs.progress import silent
from lvdm.media import write_mp4
from lvdm.synthetic import combinations, render
from tests.commands import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of moving shapes, the same as an array, and weights of I3D."""
    folder = tmp_path_factory.mktemp("fvd")
    clips = [render(combination, 0, 10, 32) for combination in combinations()[:2]]
    for number, clip in enumerate(clips):
        write_mp4(folder / "real" / f"{number}.mp4", clip, 8)
    (folder / "real" / "1-broken.mp4").write_bytes(b"no video")
    np.save(folder / "sampled.npy", np.stack(clips))
    np.save(folder / "noise.npy", np.random.default_rng(0).integers(0, 255, (2, 10, 32, 32, 3), dtype=np.uint8))
    torch.manual_seed(0)
    save_file(I3D().state_dict(), folder / "i3d.safetensors")
    return folder


def test_fvd_of_files_names_what_it_depends_on(folder: Path) -> None:
    done = call(
        *("tools/evaluate.py", "--metric", "fvd", "sampled.npy", "--real", "real"),
        *("--i3d", "i3d.safetensors", "--frames", "9", "--size", "32", "--redraws", "2", "--out", "score.json"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "(2 sampled, 2 real clips)" in done.stdout
    assert "1 files could not be used, the first: real/1-broken.mp4" in done.stdout
    score = json.loads((folder / "score.json").read_text())
    assert len(score["kvd"]["redraws"]) == 2
    assert score["real"]["clip"]["stride"] == 1
    assert len(score["i3d"]["sha256"]) == 64
    assert score["fvd"]["mean"] < 0.1 * score_of(folder, "noise.npy", "real")["fvd"]["mean"]


@pytest.mark.parametrize(
    ("fake", "real", "frames", "message"),
    [
        ("sampled.npy", "nowhere", 9, "cannot read .*nowhere as a folder of videos or as .npz / .npy"),
        ("sampled.npy", "real", 8, "--frames 8 is too short for I3D, which needs 9"),
        ("sampled.npy", "real", 16, "sampled.npy has clips of 10 frames, not 16"),
        ("i3d.safetensors", "real", 9, "cannot read .*i3d.safetensors as a folder of videos"),
    ],
)
def test_bad_sets_are_refused(folder: Path, fake: str, real: str, frames: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_of(folder, fake, real, frames)


def score_of(folder: Path, fake: str, real: str, frames: int = 9) -> dict[str, Any]:
    clip = ClipConfig(frames=frames, height=32, width=32)
    sets = [Clips(folder / name, clip, limit=8) for name in (real, fake)]
    return fvd(*sets, folder / "i3d.safetensors", redraws=1, batch=4, device=torch.device("cpu"), progress=silent)
