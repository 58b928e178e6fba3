"""Encoding jobs that stop and go on, and what they refuse to mix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.config import LatentDiffusionTraining, parse_training_config
from lvdm.data.fetch import read_sample
from lvdm.data.index import open_index
from lvdm.data.latents import decode_latent, read_latent_set
from lvdm.errors import UserError
from lvdm.jobs.encode_latents import Encoded, encode_folder
from tests.conftest import Toy, copy_with_broken_clips


def encode(toy: Toy, target: Path, stored: Any = "fp32", **changes: Any) -> Encoded:
    config = parse_training_config(toy.diffusion(toy.folder / "run", **changes), source="test")
    assert isinstance(config, LatentDiffusionTraining)
    return encode_folder(
        config, toy.shards, str(target), device=torch.device("cpu"), dtype=torch.float32, batch=8, stored=stored
    )


def test_stopped_job_goes_on_and_ends_with_the_same_bytes(toy: Toy, tmp_path: Path) -> None:
    target = tmp_path / "latents"
    shutil.copytree(toy.latents, target)
    for name in ("latents.json", "00001_manifest.json", "00002_manifest.json", "00002.tar"):
        (target / name).unlink()  # as a kill leaves it that comes between a shard and its manifest
    done = encode(toy, target)
    assert done.skipped_shards == 1
    assert done.samples == 24
    names = {file.name for file in Path(toy.latents).iterdir()}
    assert {file.name for file in target.iterdir()} == names
    for name in names:
        if not name.endswith(("_stats.json", "index.arrow")):  # which hold times
            assert (target / name).read_bytes() == (Path(toy.latents) / name).read_bytes(), name


def test_latents_are_standard_under_their_own_scale_and_shift(toy: Toy) -> None:
    info = read_latent_set(toy.latents)
    index = open_index([toy.latents])
    moments = torch.stack([decode_latent(read_sample(index[row]), info)[0] for row in range(len(index))])
    mean, logvar = moments.double().chunk(2, dim=1)
    deviation = (mean.var(correction=0) + logvar.exp().mean()).sqrt()
    assert info.shift == pytest.approx(-float(mean.mean()), rel=1e-5)
    assert info.scale == pytest.approx(1 / float(deviation), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "stored"),
    [
        ({"text__max_length": 8}, "fp32"),
        ({"data__video__clip": {"frames": 2, "height": 16, "width": 16}}, "fp32"),
        ({}, "bf16"),
    ],
)
def test_other_settings_are_refused_in_a_begun_folder(toy: Toy, tmp_path: Path, changes: Any, stored: str) -> None:
    target = tmp_path / "latents"
    target.mkdir()
    shutil.copy(Path(toy.latents) / "encoding.json", target)
    with pytest.raises(UserError, match="holds latents made with other settings"):
        encode(toy, target, stored, **changes)
    assert [file.name for file in target.iterdir()] == ["encoding.json"]


def test_clips_of_several_sizes_are_refused(toy: Toy, tmp_path: Path) -> None:
    clip = toy.clip | {"buckets": [{"frames": 2, "height": 16, "width": 16, "size": 4}]}
    with pytest.raises(UserError, match=r"^data\.video\.clip\.buckets: .* a folder of its own"):
        encode(toy, tmp_path / "latents", data__kind="video", data__video__clip=clip)
    assert not (tmp_path / "latents").exists()


def test_bad_clips_are_left_out_and_named(toy: Toy, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    (broken,) = copy_with_broken_clips(Path(toy.shards), shards, count=1)
    config = parse_training_config(toy.diffusion(tmp_path / "run"), source="test")
    assert isinstance(config, LatentDiffusionTraining)
    done = encode_folder(
        config, str(shards), str(tmp_path / "latents"), device=torch.device("cpu"), dtype=torch.float32, batch=8
    )
    assert [item.key for item in done.failed] == [broken]
    assert done.samples == 23
    statistics = json.loads((tmp_path / "latents" / "00000_stats.json").read_text())
    assert (statistics["successes"], statistics["failed_to_subsample"]) == (9, 1)
