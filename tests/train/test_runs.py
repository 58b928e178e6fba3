"""What a run leaves behind, what it refuses, and what it does with bad clips and signals."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from lvdm.checkpoint.folder import open_checkpoint
from lvdm.config import parse_training_config
from lvdm.data.build_index import build_index
from lvdm.data.loader import build_loader
from lvdm.data.writer import ShardSample, write_shard
from lvdm.inference import load
from lvdm.jobs.export import export_checkpoint
from lvdm.synthetic import caption, combinations, render
from lvdm.train.loop import Speedometer
from tests.conftest import Toy, copy_with_broken_clips
from tests.ranks import Launch, run_ranks
from tests.train.runs import log_of, losses_of, run, wait_for_step


@pytest.fixture(scope="module")
def autoencoder_run(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    return folder, run_ranks(run, 1, toy.autoencoder(folder))[0]


def test_autoencoder_run_leaves_log_picture_config_and_environment(autoencoder_run: tuple[Path, str]) -> None:
    folder, said = autoencoder_run
    assert "step 3/3" in said
    assert "left 0:00:00" in said
    lines = log_of(folder)
    trained = [line for line in lines if "loss" in line]
    validated = [line for line in lines if "validation_ema/psnr" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert [line["step"] for line in validated] == [2, 3]
    assert all(line["samples_per_second"] > 0 and 0 <= line["data_wait_fraction"] <= 1 for line in trained)
    picture = np.asarray(Image.open(folder / "images" / "reconstructions-00000003.png"))
    assert picture.shape == (4 * 2 * 17 + 1, 2 * 17 + 1, 3)  # 4 clips above their reconstructions, every other frame
    assert list((folder / "tensorboard").glob("events*"))
    assert json.loads((folder / "environment.json").read_text())["ranks"] == 1


def test_validation_compares_live_and_averaged_weights(autoencoder_run: tuple[Path, str]) -> None:
    folder, _ = autoencoder_run
    line = log_of(folder)[-1]
    assert line["validation/l1"] != line["validation_ema/l1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__resume": "never"}, "already holds a run"),
        ({"run__seed": 6}, "cannot go on with a changed run.seed: 5 -> 6"),
        ({"model__hidden_channels": 8}, "cannot go on with a changed model.hidden_channels: 4 -> 8"),
        ({"run__folder": "/nonexistent/empty", "run__resume": "must"}, "holds no run"),
        ({"run__folder": "{new}", "data__video__shards": ["/nowhere"]}, "no such folder of shards: /nowhere"),
        (
            {"run__folder": "{new}", "data__video__clip": {"frames": 5, "height": 16, "width": 16}},
            "not divisible by model",
        ),
        ({"run__folder": "{new}", "validation__samples": 1}, "fewer than batch.micro x ranks"),
        ({"run__folder": "{new}", "run__init_from": "/nowhere"}, "/nowhere is not an exported model"),
    ],
)
def test_bad_input_is_one_clear_error(
    toy: Toy, autoencoder_run: tuple[Path, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder, _ = autoencoder_run
    new = tmp_path / "new"
    changes = {key: str(new) if value == "{new}" else value for key, value in changes.items()}
    with pytest.raises(AssertionError, match=f"UserError: .*{message}"):
        run_ranks(run, 1, toy.autoencoder(folder, **changes))
    assert not new.exists()


def test_bad_input_on_one_rank_stops_all_and_names_it(toy: Toy, tmp_path: Path) -> None:
    tree = toy.autoencoder(tmp_path / "run", batch__size=4, data__video__shards=["train"])
    launch = Launch(run_unless_hidden, 2, (tree, Path(toy.shards).parent))
    with pytest.raises(AssertionError, match=r"UserError: no such folder of shards: train.* \(on rank 1\)"):
        launch.results()


def run_unless_hidden(tree: dict[str, Any], folder: Path) -> str:
    """As `run` in ``folder``, whose shards rank 1 alone cannot see."""
    os.chdir(folder if os.environ["RANK"] == "0" else "/")
    return run(tree)


def test_clips_that_do_not_decode_are_replaced_counted_and_listed(toy: Toy, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    broken = copy_with_broken_clips(Path(toy.shards), shards, count=4)
    folder = tmp_path / "run"
    tree = toy.autoencoder(
        folder,
        data__video__shards=[str(shards)],
        run__steps=6,
        batch__size=4,
        run__save_every=100,
        validation__shards=[],
    )
    run_ranks(run, 2, tree)  # 24 positions: every clip once
    listed = [json.loads(line) for line in (folder / "replaced.jsonl").read_text().splitlines()]
    assert {item["key"] for item in listed} >= broken
    assert all(item["reason"] and item["shard"].endswith(".tar") for item in listed)
    lines = log_of(folder)
    assert lines[-1]["replaced"] == len(listed) >= 4
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_too_many_bad_clips_stop_the_run_on_all_ranks(toy: Toy, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    copy_with_broken_clips(Path(toy.shards), shards, count=12)
    tree = toy.autoencoder(
        tmp_path / "run", data__video__shards=[str(shards)], data__max_bad_fraction=0.002, run__steps=6, batch__size=4
    )
    with pytest.raises(AssertionError, match="had bad bytes, more than data"):
        run_ranks(run, 2, tree | {"validation": {}})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_stops_all(toy: Toy, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    launch = Launch(run, 2, (toy.diffusion(folder, run__steps=10**6),))
    wait_for_step(folder, 2)
    os.kill(launch.processes[1].pid or 0, number)
    with pytest.raises(AssertionError, match=rf"AskedToStop: asked to by {number.name}, after step"):
        launch.results()
    stopped_at = log_of(folder)[-1]["step"]
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{stopped_at:08d}"


def test_images_and_videos_of_weighted_sets_train_together_and_resume(toy: Toy, tmp_path: Path) -> None:
    """Two buckets, one of them of images, a bad one too, whose step is twice as large; two ranks stop, one goes on."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 4],
        norm_num_groups=2,
        latent_channels=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    pictures = tmp_path / "images"
    for number, combination in enumerate(combinations()[:12]):
        stream = io.BytesIO()
        Image.fromarray(render(combination, number, 1, 16)[0]).save(stream, "PNG")
        members = {"png": b"junk" if number == 3 else stream.getvalue(), "txt": caption(combination).encode()}
        write_shard(str(pictures), number, [ShardSample(f"{number:05d}", members, {"width": 16, "height": 16})])
    build_index(str(pictures))
    buckets = [{"frames": 1, "height": 16, "width": 16, "size": 8}, {"frames": 2, "height": 16, "width": 16, "size": 4}]
    sets = [{"folders": [toy.shards], "weight": 1}, {"folders": [str(pictures)], "weight": 2}]

    def tree(folder: Path, **changes: Any) -> dict[str, Any]:
        clip = {"stride": 1, "buckets": buckets}
        mixed = {"data__kind": "video", "data__video": {"shards": sets, "clip": clip}, "data__workers": 0}
        frozen = {"vae": {"kind": "diffusers", "name": str(tmp_path / "vae")}}
        return toy.diffusion(folder, **(mixed | frozen | changes))

    run_ranks(run, 1, tree(tmp_path / "straight", run__steps=12))
    run_ranks(run, 2, tree(tmp_path / "run", run__steps=5))
    run_ranks(run, 1, tree(tmp_path / "run", run__steps=12))
    straight, resumed = losses_of(tmp_path / "straight"), losses_of(tmp_path / "run")
    assert resumed == pytest.approx(straight, rel=1e-4)
    config = parse_training_config(tree(tmp_path / "run"), source="test")
    course = build_loader(config.data, seed=5, batch=4, micro=1, world=1, rank=0, steps=12).course
    assert course is not None
    taken = sum(len(course.order.step(step).entries) for step in range(12))
    assert taken > 12 * 4
    for name in ("straight", "run"):
        clock = open_checkpoint(tmp_path / name).manifest.clock
        assert (clock["samples"], clock["taken"]) == (12 * 4, taken)
        assert clock["replaced"] == len((tmp_path / name / "replaced.jsonl").read_text().splitlines()) > 1
    other = [{"folders": [toy.shards], "weight": 3}, {"folders": [str(pictures)], "weight": 1}]
    (said,) = run_ranks(run, 1, tree(tmp_path / "run", run__steps=14, data__video__shards=other))
    assert "the mixing of the data changed (weights) and is new from step 12 on" in said


def test_speed_is_of_the_samples_that_steps_took_and_the_time_left_of_steps() -> None:
    speed = Speedometer(step=10, samples=100)
    values = speed.report(12, 116, steps=14)  # as many steps are left as were done
    assert values["samples_per_second"] * values["seconds_left"] == pytest.approx(16)


def test_streaming_source_trains(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_ranks(run, 2, toy.diffusion(folder, run__steps=2, data__kind="stream"))
    assert [line["step"] for line in log_of(folder)] == [1, 2]


def test_modelscope_unet_trains_and_its_export_samples(toy: Toy, tmp_path: Path) -> None:
    model = {
        "kind": "modelscope_unet",
        "channels": [8, 16],
        "res_blocks": 1,
        "attention_levels": [1],
        "head_channels": 8,
        "context_dim": 384,
        "norm_groups": 4,
    }
    run_ranks(run, 1, toy.diffusion(tmp_path / "run", run__steps=2, batch__size=1, model=model, engine__zero_stage=3))
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2]
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    clips = load(tmp_path / "export", device="cpu").sample(["a red circle"], seeds=[1], steps=2)
    assert clips.shape == (1, 4, 16, 16, 3)
