"""Previews while training, and the page of a run."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from lvdm.attempts import read_attempts
from lvdm.clip_folder import read_clip, read_record
from lvdm.config import parse_training_config
from lvdm.errors import UserError
from lvdm.inference import load
from lvdm.jobs.export import export_checkpoint
from lvdm.jobs.report import read_log, write_losses, write_report
from tests.conftest import Toy
from tests.ranks import run_ranks
from tests.train.runs import log_of, run

PROMPTS = ["a red circle moves left", "a <green> square", "a blue cross moves up"]


@pytest.fixture(scope="module")
def previewed(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("previewed") / "run"
    tree = toy.diffusion(
        folder,
        run__steps=4,
        run__save_every=2,
        engine__zero_stage=3,
        preview={"prompts": PROMPTS, "every": 3, "steps": 4, "guidance": 2.0},
        validation={"shards": [toy.latents], "every": 4, "samples": 4},
    )
    run_ranks(run, 2, tree)
    return folder


def test_previews_show_every_caption_with_the_averaged_weights_on_any_ranks(previewed: Path, tmp_path: Path) -> None:
    previews = sorted((previewed / "samples").iterdir())
    assert [folder.name for folder in previews] == ["step-00000003", "step-00000004"]
    clips = read_record(previews[-1])["clips"]
    assert [clip["prompt"] for clip in clips] == PROMPTS
    assert (previews[-1] / "contact_sheet.png").is_file()

    export_checkpoint(previewed, tmp_path / "export")
    model = load(tmp_path / "export")
    for number, clip in enumerate(clips):
        alone = model.sample([clip["prompt"]], seeds=[number], steps=4, guidance=2.0)[0].numpy()
        shown = read_clip(previews[-1] / clip["file"])[:, 4::8, 4::8]
        assert np.abs(shown.astype(float) - alone).mean() < 6, "beyond what H.264 loses"


def test_previews_are_on_tensorboard_as_a_sheet_and_as_a_film(previewed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(previewed / "tensorboard"))
    events.Reload()
    for tag in ("samples", "samples_playing"):
        assert [image.step for image in events.Images(tag)] == [3, 4]
    assert events.Images("samples_playing")[0].encoded_image_string[:6] == b"GIF89a"


def test_the_log_says_where_the_time_went(previewed: Path) -> None:
    spent: dict[str, float] = {}
    for line in log_of(previewed):
        for name, seconds in line.items():
            if name.startswith("seconds/"):
                spent[name] = spent.get(name, 0.0) + seconds
    parts = ("start", "training", "data_wait", "validation", "preview", "saving")
    assert set(spent) == {f"seconds/{part}" for part in parts}
    assert all(seconds > 0 for seconds in spent.values())


def test_scores_that_are_none_and_a_log_without_losses_are_said(previewed: Path, tmp_path: Path) -> None:
    (tmp_path / "fvd.json").write_text('{"fvd": {"mean": 3.0}}')
    with pytest.raises(UserError, match=r"fvd\.json holds no scores of moving shapes; tools/evaluate\.py"):
        write_report(previewed, tmp_path / "page.html", scores=tmp_path / "fvd.json")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "seconds/start": 2.0}\n')
    with pytest.raises(UserError, match="has no losses yet"):
        write_losses(tmp_path, tmp_path / "losses.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/page\.html: (Not a directory|File exists)"):
        write_report(previewed, tmp_path / "file" / "page.html")


def test_the_page_holds_all_of_a_run_in_one_file(previewed: Path, tmp_path: Path) -> None:
    scores = {"share": 0.5, "interval": [0.4, 0.6]}
    parts = {part: {"shape": scores} for part in ("all", "unseen", "ceiling")} | {"chance": {"shape": 0.25}}
    (tmp_path / "scores.json").write_text(json.dumps(parts))
    page = tmp_path / "page.html"
    write_report(previewed, page, [previewed / "samples" / "step-00000003"], tmp_path / "scores.json")
    text = page.read_text()
    films = re.findall(r'src="data:video/mp4;base64,([^"]+)"', text)
    assert len(films) == 3 * len(PROMPTS)  # two previews, and one of them as a folder of samples
    assert all(base64.b64decode(film)[4:8] == b"ftyp" for film in films)
    assert "a &lt;green&gt; square" in text
    assert "<green>" not in text
    assert text.count("<svg") >= 5
    for wanted in ("50% (40% - 60%)", "Where the time went", "ZeRO-3", "temporal_length: 2", "samples seen", "torch"):
        assert wanted in text, wanted
    (started,) = read_attempts(previewed)
    assert f"<td>{started.host}</td><td>2</td><td>0</td><td>4</td><td>finished</td>" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text), "the page needs another file"

    write_losses(previewed, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"


def test_a_log_that_a_kill_cut_short_is_read_up_to_there(previewed: Path, tmp_path: Path) -> None:
    lines = (previewed / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(lines + '{"step": 5, "lo')
    assert read_log(tmp_path) == [json.loads(line) for line in lines.splitlines()]
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no line yet"):
        read_log(tmp_path)


def test_steps_that_the_sampler_cannot_take_are_refused_before_training(toy: Toy, tmp_path: Path) -> None:
    tree = toy.diffusion(tmp_path / "run", preview={"prompts": ["x"], "steps": 3})
    with pytest.raises(AssertionError, match="UserError: steps=3: its leading table runs past the 1000 timesteps"):
        run_ranks(run, 1, tree)
    assert not (tmp_path / "run").exists()


def test_a_preview_that_cannot_be_is_refused(toy: Toy, tmp_path: Path) -> None:
    tree = toy.diffusion(tmp_path / "run", preview={"prompts": ["x"]})
    tree["model"] = {"kind": "space_time_unet", "model_channels": 32}
    del tree["text"]
    with pytest.raises(UserError, match=r"preview\.prompts: a space_time_unet reads no text; give empty captions"):
        parse_training_config(tree, source="test")
