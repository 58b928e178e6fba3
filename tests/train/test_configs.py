"""Every LVDM config: its network at full size, and one step of it at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lvdm.config import AutoencoderTraining, load_training_config, read_tree
from lvdm.data.latents import read_latent_set
from lvdm.engine import distributed
from lvdm.errors import UserError
from lvdm.jobs.encode_latents import encode_folder
from lvdm.models.build import build_model, parameter_count
from tests.conftest import AUTOENCODER, MINILM, Toy, changed
from tests.ranks import run_ranks
from tests.train.runs import log_of, run

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {
    "lvdm_sky_ae": 19_446_759,
    "lvdm_ucf_ae": 19_446_759,
    "lvdm_taichi_ae": 19_446_759,
    "lvdm_sky_short": 548_904_580,
    "lvdm_ucf_short": 548_904_580,
    "lvdm_taichi_short": 548_904_580,
    "lvdm_sky_pred": 549_163_908,
    "lvdm_sky_interp": 549_181_060,
    "t2v_256": 958_924_964,
}


def test_every_lvdm_config_is_here() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("lvdm_*.yaml")} == PARAMETERS.keys() - {"t2v_256"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_network_has_the_reference_s_parameters(name: str) -> None:
    config = load_training_config(ROOT / f"configs/{name}.yaml")
    with torch.device("meta"):
        assert parameter_count(build_model(config.model, seed=0)) == PARAMETERS[name]
    if not isinstance(config, AutoencoderTraining) and name != "t2v_256":
        assert config.model.relative_keys == "transposed"  # type: ignore[union-attr]


def toy_tree(name: str, toy: Toy, folder: Path) -> dict[str, Any]:
    """A shipped config with everything as it is but sizes and places."""
    tree = read_tree(ROOT / f"configs/{name}.yaml")
    clip = tree["data"]["video"]["clip"] | {"frames": 8, "height": 16, "width": 16, "stride": 1}
    tree["data"] |= {"workers": 0, "video": {"shards": [toy.shards], "clip": clip}}
    tree["run"] |= {"folder": str(folder / name), "steps": 1, "log_every": 1}
    tree["batch"] = {"size": 2, "micro": 1}
    tree["engine"] = tree["engine"] | {"precision": "fp32"}
    if tree["task"] == "autoencoder":
        tree["model"] = AUTOENCODER.model_dump(mode="json")
        return tree
    small = {"model_channels": 8, "channel_mult": [1, 2], "res_blocks": 1, "attention_levels": [1], "heads": 2}
    tree["model"] |= small | {"norm_groups": 4}
    tree["vae"] = toy.diffusion(folder)["vae"]  # shrinks time by 2
    if "latent_stride" in tree:
        tree["latent_stride"] = 2
    if "text" in tree:
        tree["text"] |= {"name": MINILM, "max_length": 16}
        tree["model"]["context_dim"] = 384
    return tree


def run_all(trees: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Train them one after the other on this rank, in one process group: DeepSpeed keeps its groups for good."""
    ranks = distributed.start(60)
    with mock.patch.multiple(distributed, start=lambda *_, **__: ranks, stop=lambda: None):
        said = {name: run(tree) for name, tree in trees.items()}
    distributed.stop()
    return said


def test_every_config_takes_a_step_at_toy_size(toy: Toy, tmp_path: Path) -> None:
    trees = {name: toy_tree(name, toy, tmp_path) for name in PARAMETERS}
    stored = changed(toy_tree("lvdm_sky_short", toy, tmp_path), {"run__folder": str(tmp_path / "stored")})
    latents = {"kind": "latents", "latents": {"shards": [toy.latents]}, "workers": 0}
    trees["stored"] = stored | {"data": latents | {"video": {"shards": [toy.shards], "clip": toy.clip}}}
    said = run_ranks(run_all, 1, trees)[0]
    for name in trees:
        (line,) = log_of(tmp_path / name)
        assert line["loss"] > 0, name
        assert line["grad_norm"] > 0, name
        assert line["skipped_steps"] == 0, name
        assert "step 1/1" in said[name]
    manifest = json.loads(next((tmp_path / "lvdm_sky_pred" / "checkpoints").glob("step-*/manifest.json")).read_text())
    assert manifest["facts"]["latent_shape"] == [4, 2, 4, 4]  # 8 frames, 4 latents, every other one


def test_latents_without_text_train_a_model_without_text(toy: Toy, tmp_path: Path) -> None:
    tree = toy_tree("lvdm_sky_interp", toy, tmp_path)
    path = tmp_path / "config.json"  # YAML reads JSON
    path.write_text(json.dumps(tree))
    latents = str(tmp_path / "latents")
    config = load_training_config(path)
    encode_folder(config, toy.shards, latents, device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[arg-type]
    assert read_latent_set(latents).text is None
    run_ranks(run, 1, changed(tree, {"data__kind": "latents", "data__latents__shards": [latents]}))
    assert log_of(tmp_path / "lvdm_sky_interp")[0]["loss"] > 0


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("lvdm_sky_short", "text={name: x}", "a space_time_unet reads no text"),
        ("t2v_256", "text=null", "a text_unet needs this section"),
        ("lvdm_sky_short", "given={}", "useless without model.mask_channel"),
        ("lvdm_sky_pred", "given=null", "given: needed by model.mask_channel"),
        ("lvdm_sky_pred", "given.noise_levels=100", "model.noise_levels must be 101"),
        ("lvdm_sky_pred", "given.interpolate=0.9", "are more than 1 together"),
        ("lvdm_sky_short", "model.noise_levels=251", "need mask_channel: true"),
        ("lvdm_sky_short", "model.heads=3", "must be divisible by heads 3"),
    ],
)
def test_sections_that_do_not_go_together_are_refused(name: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_training_config(ROOT / f"configs/{name}.yaml", [override])
