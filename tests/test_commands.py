"""The commands of the README as a user types them, in processes of their own, good and bad."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import ROOT, call, write_config
from tests.conftest import Toy
from tests.train.runs import wait_for_step

TRAIN = str(ROOT / "launch/train.py")
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
ENV = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def start(*command: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command in a new interpreter, with the virtual environment's programs first."""
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((TRAIN, "--config", "missing.yaml"), "train: error: cannot read config missing.yaml: No such file"),
        ((TRAIN, "--config", QUICKSTART, "run.stepz=1"), "run.stepz: unknown key; did you mean steps?"),
        ((TRAIN, "--config", QUICKSTART, "engine.zero_stage=0"), "engine.zero_stage: stage 0 is refused"),
        (
            (TRAIN, "--config", QUICKSTART, "batch={size: 10, micro: 4}"),
            "batch.size 10 is not divisible by batch.micro 4 x 1 rank",
        ),
        ((TRAIN, "--config", QUICKSTART, "run.resume=must"), "run.resume=must, but demo/runs/diffusion holds no run"),
        (("tools/sample.py", "nowhere", "out", "--prompt", "x"), "sample: error: nowhere is not an exported model"),
        (("tools/sample.py", "nowhere", "out"), "no captions: give --prompt or --prompts-file"),
        (("tools/export_checkpoint.py", "nowhere", "out"), "no checkpoint to read in nowhere: there is none"),
        (("tools/export_checkpoint.py", "nowhere", "out", "--layout", "lvdm-ae"), "no checkpoint to read in nowhere"),
        (("tools/export_checkpoint.py", "nowhere", "out", "--layout", "ldm"), "--layout ldm is none of lvdm-ae"),
        (("tools/import_checkpoint.py", "nowhere.ckpt", "out"), "cannot read nowhere.ckpt: No such file"),
        (("tools/import_checkpoint.py", "nowhere", "out", "--data-set", "sea"), "--data-set sea is none of sky, ucf"),
        (("tools/import_checkpoint.py", "nowhere", "out", "--scaling", "2"), "'2' is not of the form SCALE,SHIFT"),
        (("tools/index_shards.py", "nowhere"), "nowhere"),
        (("tools/encode_latents.py", "--config", QUICKSTART), "demo/shards/shapes/train"),
        (("tools/runs.py", "nowhere"), "runs: error: "),
        (("tools/report.py", "nowhere"), "report: error: nowhere is no run folder: it has no config.yaml"),
        (("tools/show_config.py",), "show_config: error: give a config to show, or --reference"),
        (("tools/make_shards.py", "folder", "--videos", "nowhere", "--out", "out"), "nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_said_once_with_exit_code_2_and_leaves_nothing(
    tmp_path: Path, command: tuple[str, ...], message: str
) -> None:
    done = call(*command, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(message) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_under_the_launcher_bad_input_is_said_once_and_not_per_rank(toy: Toy, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    tree = toy.autoencoder(tmp_path / "run", batch__micro=1, data__video={"shards": [str(empty)], "clip": toy.clip})
    config = write_config(tree, tmp_path / "config.yaml")
    done = start("deepspeed", "--num_gpus", "2", TRAIN, "--config", config, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert said.count("train: error: ") == 1, said
    assert f"{empty}" in said
    assert "Traceback" not in said
    assert done.returncode == 2, said
    assert not (tmp_path / "run").exists()


def test_the_launcher_asks_one_rank_after_another_and_they_save_together(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tree = toy.autoencoder(folder, run__steps=10**6, batch__size=4, validation__shards=[])
    config = write_config(tree, tmp_path / "config.yaml")
    command = ["deepspeed", "--num_gpus", "2", TRAIN, "--config", config]
    run = subprocess.Popen(command, cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_step(folder, 2)
        (launcher,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(launcher), signal.SIGTERM)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert "train: stopped: asked to by SIGTERM, after step" in said
    stopped_at = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{stopped_at:08d}"


def test_a_signal_to_all_processes_of_a_run_saves_it(toy: Toy, tmp_path: Path) -> None:
    """As SLURM warns of a time limit: loader workers and their helpers get the signal too."""
    folder = tmp_path / "run"
    tree = toy.diffusion(folder, data__workers=1, run__steps=10**6)
    command = [sys.executable, TRAIN, "--config", write_config(tree, tmp_path / "config.yaml")]
    run = subprocess.Popen(command, cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for_step(folder, 2)
        os.killpg(run.pid, signal.SIGUSR1)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 85, said
    assert "train: stopped: asked to by SIGUSR1, after step" in said
    stopped_at = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{stopped_at:08d}"


def test_a_signal_while_torch_is_imported_is_remembered(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = write_config(toy.diffusion(folder, run__steps=10**6), tmp_path / "config.yaml")
    command = [sys.executable, TRAIN, "--config", config]
    run = subprocess.Popen(command, cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 85, said
    assert "train: stopped: asked to, before the first step" in said
    assert not (folder / "checkpoints").exists()


def test_demo_chain_at_toy_length(tmp_path: Path) -> None:
    done = start(sys.executable, str(ROOT / "tools/demo.py"), "--toy", cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    demo = tmp_path / "demo"
    for made in (
        "moving shapes",
        "real footage",
        "autoencoder",
        "latents",
        "text-to-video",
        "export",
        "samples",
        "scores",
        "report",
    ):
        assert made in done.stdout
    assert "tensorboard --logdir demo/runs" in done.stdout
    losses = [json.loads(line).get("loss") for line in (demo / "runs/diffusion/log.jsonl").read_text().splitlines()]
    assert np.isfinite([loss for loss in losses if loss is not None]).all()
    assert json.loads((demo / "runs/diffusion/environment.json").read_text())["ranks"] == 2
    assert len(list((demo / "samples").glob("*.mp4"))) == len(list((demo / "samples").glob("*.gif"))) == 4
    sheet = np.asarray(Image.open(demo / "samples/contact_sheet.png"))
    assert sheet.std() > 5
    again = call("tools/demo.py", "--toy", cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout.count("already there") == 11
    other = call("tools/demo.py", cwd=tmp_path)
    assert other.returncode == 2
    assert "demo was made by python tools/demo.py --toy; remove it to run another chain" in other.stderr
    scores = json.loads((demo / "scores.json").read_text())
    assert scores["all"]["shape"]["of"] == scores["trained"]["shape"]["of"] + scores["unseen"]["shape"]["of"] == 4
    assert scores["ceiling"]["shape"]["of"] == 4
    result = json.loads((demo / "result.json").read_text())
    assert result["scores"] == scores
    assert len(result["commands"]) == len(result["seconds"]) - 1 == 11
    assert (demo / "report.html").read_text().count("<video ") == 4
    assert Image.open(demo / "curves.png").size[0] > 500
