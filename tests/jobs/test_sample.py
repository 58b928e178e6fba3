"""Sampling into a folder: the same bits on any number of ranks, resumed where it stopped, never mixed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

import lvdm
from lvdm.errors import UserError
from lvdm.jobs.export import export_checkpoint
from lvdm.jobs.progress import silent
from lvdm.jobs.sample import Request, Settings, read_requests, sample_folder
from lvdm.jobs.score_shapes import score_folder
from lvdm.media import write_mp4
from lvdm.storage import write_json
from lvdm.synthetic import EVALUATION, HELD_OUT, caption, render
from tests.conftest import Toy
from tests.ranks import run_ranks
from tests.train.runs import run

REQUESTS = [Request(f"a {color} circle", seed) for seed, color in enumerate(("red", "green", "blue", "cyan", "red"))]
SETTINGS = Settings(steps=2, batch=2, guidance=3.0, gif=False, rows=3)


@pytest.fixture(scope="module")
def export(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with weights that are not zero, so that every part of it counts."""
    folder = tmp_path_factory.mktemp("sampled")
    run_ranks(run, 1, toy.diffusion(folder / "run", run__steps=3, model__attention_levels=[0, 1]))
    export_checkpoint(folder / "run", folder / "export")
    return str(folder / "export")


@pytest.fixture(scope="module")
def alone(export: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank samples."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run_ranks(sample_folder, 1, export, out, REQUESTS, SETTINGS)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_two_ranks_make_the_same_bits_as_one(export: str, alone: Path, tmp_path: Path) -> None:
    run_ranks(sample_folder, 2, export, tmp_path / "out", REQUESTS, SETTINGS)
    assert contents(tmp_path / "out") == contents(alone)
    assert sorted(contents(alone)) == [*(f"clip-000{i}.mp4" for i in range(5)), "contact_sheet.png", "samples.json"]


def test_what_is_there_is_not_sampled_again(export: str, alone: Path, tmp_path: Path) -> None:
    before = contents(alone)
    kept, lost = alone / "clip-0000.mp4", alone / "clip-0003.mp4"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    run_ranks(sample_folder, 1, export, alone, REQUESTS, SETTINGS)
    assert contents(alone) == before
    assert kept.stat().st_mtime_ns == stamp


def test_other_samples_are_not_mixed_in(export: str, alone: Path) -> None:
    before = contents(alone)
    with pytest.raises(UserError, match=r"holds other samples: clips differ \(see .*samples.json\)"):
        sample_folder(export, alone, REQUESTS[:1], SETTINGS)
    assert contents(alone) == before


def test_a_model_exported_anew_is_another(export: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "export", tmp_path / "out"
    shutil.copytree(export, folder)
    sample_folder(str(folder), out, REQUESTS[:1], SETTINGS)
    sample_folder(str(folder), out, REQUESTS[:1], replace(SETTINGS, rows=0))  # the sheet is no matter
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"holds other samples: sha256 differ"):
        sample_folder(str(folder), out, REQUESTS[:1], SETTINGS)


def test_settings_that_do_not_fit_leave_nothing(export: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="frames=3: give a multiple of 2"):
        sample_folder(export, tmp_path / "out", REQUESTS, Settings(steps=2, frames=3))
    assert not (tmp_path / "out").exists()
    for fault in ({"batch": 0}, {"fps": 0}, {"rows": -1}):
        (name,) = fault
        with pytest.raises(UserError, match=f"{name} -?[0-9] must be at least"):
            Settings(**fault)
    with pytest.raises(UserError, match="give a list of at least one prompt"):
        lvdm.load(export, device="cpu").sample("a red circle")


def test_requests_come_from_lines_or_objects(tmp_path: Path) -> None:
    lines, objects = tmp_path / "captions.txt", tmp_path / "requests.jsonl"
    lines.write_text("a red circle\n\na blue square\n")
    assert read_requests(lines, 5, "fog") == [Request("a red circle", 5, "fog"), Request("a blue square", 6, "fog")]
    objects.write_text(json.dumps({"prompt": "x", "seed": 9}) + "\n" + json.dumps({"prompt": "y", "negative": "n"}))
    assert read_requests(objects, 0, "") == [Request("x", 9), Request("y", 1, "n")]
    objects.write_text('\n\n{"prompt": 3}')
    with pytest.raises(UserError, match=r"requests\.jsonl: line 3: prompt and negative must be text"):
        read_requests(objects, 0, "")
    for line in (
        "{}",
        "[1]",
        '{"prompt": "x", "negative": 3}',
        '{"prompt": "x", "seed": true}',
        '{"prompt": 3}',
        '{"prompt": "x", "sed": 1}',
        "prompt",
    ):
        objects.write_text(line)
        with pytest.raises(UserError, match=r"requests\.jsonl: line 1"):
            read_requests(objects, 0, "")


def test_longer_clips_and_exports_at_a_url(export: str) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(export, "/exports/toy", recursive=True)
    here, there = lvdm.load(export, device="cpu"), lvdm.load("memory://exports/toy", device="cpu")
    clips = [model.sample(["a red circle"], seeds=3, steps=2, frames=8).numpy() for model in (here, there)]
    assert clips[0].shape == (1, 8, 16, 16, 3)
    np.testing.assert_array_equal(*clips)
    with pytest.raises(UserError, match="there is no folder memory://exports/nothing"):
        lvdm.load("memory://exports/nothing")


def test_true_clips_written_as_samples_are_right_and_reported_by_part(export: str, tmp_path: Path) -> None:
    shown = EVALUATION[::12]
    clips = [{"prompt": caption(c), "file": f"clip-{i:04d}.mp4"} for i, c in enumerate(shown)]
    for clip, combination in zip(clips, shown, strict=True):
        write_mp4(tmp_path / clip["file"], render(combination, 11, 8, 32), 8, scale=4)
    write_json(tmp_path / "samples.json", {"model": export, "clips": clips, "steps": 2})
    scores = score_folder(tmp_path, silent)
    assert scores["all"]["everything"]["share"] == 1
    assert scores["unseen"]["shape"]["of"] == sum(c in HELD_OUT for c in shown) > 0
    assert scores["trained"]["shape"]["of"] + scores["unseen"]["shape"]["of"] == len(shown)
    assert scores["chance"]["color"] < 0.5
    assert scores["ceiling"]["shape"]["of"] == len(shown)
    assert scores["sampling"] == {"model": export, "steps": 2}

    clips[0]["prompt"] = "a dog"
    write_json(tmp_path / "samples.json", {"model": export, "clips": clips})
    with pytest.raises(UserError, match="'a dog' is no caption of moving shapes, such as 'a red circle"):
        score_folder(tmp_path, silent)
    with pytest.raises(UserError, match=r"cannot read .*samples\.json: No such file"):
        score_folder(Path(export), silent)
    write_json(tmp_path / "samples.json", {"model": export, "clips": []})
    with pytest.raises(UserError, match=r"was not written by tools/sample.py: samples.json lists no clips"):
        score_folder(tmp_path, silent)
