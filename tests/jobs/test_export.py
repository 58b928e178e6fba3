"""From a run's fragments to a folder that anybody can load, with nothing changed on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lvdm.engine.checkpoint import open_checkpoint
from lvdm.errors import UserError
from lvdm.inference import load
from lvdm.jobs.export import export_checkpoint
from lvdm.weights.native import read_model
from tests.conftest import Toy
from tests.ranks import run_ranks
from tests.train.runs import averaged_output, probe, run


@pytest.fixture(scope="module")
def trained(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on two ranks in ZeRO-3, where the fragments of a parameter lie on both ranks."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(run, 2, toy.diffusion(folder, run__steps=2, engine__zero_stage=3))
    return folder


def test_exported_model_gives_the_output_of_the_run(toy: Toy, trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained, tmp_path / "export")
    model = load(tmp_path / "export", device="cpu")
    with torch.no_grad():
        actual = model.network(*probe(model.latent_shape, model.config.model.context_dim))
    (wanted,) = run_ranks(averaged_output, 1, toy.diffusion(trained, batch__size=1))
    assert torch.equal(actual, wanted)
    clips = model.sample(["a red circle", "a blue square"], seeds=[1, 2], steps=2)
    alone = model.sample(["a blue square"], seeds=[2], steps=2)
    assert clips.shape == (2, 4, 16, 16, 3)
    assert clips.dtype == torch.uint8
    assert (clips[1].int() - alone[0].int()).abs().max() <= 1


def test_live_and_averaged_weights_are_both_there_with_their_origin(trained: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trained)
    for weights, kind in (("ema", "ema"), ("live", "master")):
        export_checkpoint(trained, tmp_path / weights, weights)
        document, tensors = read_model(tmp_path / weights)
        assert tensors.keys() == checkpoint.manifest.shapes.keys()
        assert all(torch.equal(tensors[name], checkpoint.parameter(kind, name)) for name in tensors)
        assert document["weights"] == weights
        assert document["provenance"]["step"] == 2
        assert document["training"]["engine"]["zero_stage"] == 3
    assert (tmp_path / "ema" / "vae" / "model.safetensors").is_file()


def test_what_is_no_checkpoint_is_one_clear_error_and_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint to read in .*: there is none"):
        export_checkpoint(tmp_path, tmp_path / "export")
    with pytest.raises(UserError, match="exists"):
        export_checkpoint(trained, trained)
    copy = tmp_path / "step-00000002"
    copy.mkdir()
    source = open_checkpoint(trained).folder
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tree = json.loads((copy / "manifest.json").read_text())
    tree["files"]["../../elsewhere"] = {"size": 0, "sha256": ""}
    (copy / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="names files outside its folder"):
        export_checkpoint(copy, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_model_without_text_samples_from_seeds_alone(toy: Toy, tmp_path: Path) -> None:
    tree = toy.diffusion(tmp_path / "run", run__steps=1, data__kind="video")
    del tree["text"]
    tree["model"] = {"kind": "space_time_unet", "model_channels": 8, "channel_mult": [1, 2], "res_blocks": 1,
                     "attention_levels": [1], "heads": 2, "norm_groups": 4}  # fmt: skip
    run_ranks(run, 1, tree)
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    model = load(tmp_path / "export", device="cpu")
    clips = model.sample(["", ""], seeds=[1, 2], steps=2)
    assert clips.shape == (2, 4, 16, 16, 3)
    assert not torch.equal(clips[0], clips[1])
    with pytest.raises(UserError, match="trained without text, so it takes no captions"):
        model.sample(["a red circle"], seeds=[1], steps=2)
