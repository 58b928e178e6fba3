"""What a user meets when a config is wrong, and what every shipped config promises."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lvdm.config import (
    AnyTraining,
    DataConfig,
    DiffusersVAE,
    LatentDiffusionTraining,
    Section,
    ShardSet,
    VideoSource,
    dump_yaml,
    load_training_config,
    models,
    parse_config,
    parse_training_config,
    read_tree,
    sections,
)
from lvdm.config.reference import reference
from lvdm.engine.deepspeed_config import accumulation_steps, deepspeed_config
from lvdm.errors import UserError
from lvdm.models.build import build_model, parameter_count

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SECTIONS = [
    value
    for module in (models, sections)
    for _, value in inspect.getmembers(module, inspect.isclass)
    if issubclass(value, Section) and value.__module__ == module.__name__
]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_section_is_strict_frozen_and_described(section: type[Section]) -> None:
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["frozen"] is True
    assert section.__doc__
    assert [name for name, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_validates_and_survives_being_written(path: Path) -> None:
    config = load_training_config(path)
    written = dump_yaml(config)
    import yaml

    assert parse_training_config(yaml.safe_load(written), source="written") == config
    head = path.read_text().splitlines()[:3]
    assert any("launch/train.py --config" in line for line in head), "a config opens with its command"


def test_all_faults_are_listed_with_path_and_nearest_name() -> None:
    overrides = (
        "optim.lrr=1e-4",
        "batch.size=many",
        "modle.channels=3",
        "engine.zero_stage=0",
        "data.video.clip.hight=32",
        "vae.kind=lvdn",
    )
    with pytest.raises(UserError) as caught:
        load_training_config(QUICKSTART, overrides)
    message = str(caught.value)
    assert "6 faults in the config" in message
    for fault in (
        "optim.lrr: unknown key; did you mean lr?",
        "batch.size: Input should be a valid integer",
        "modle: unknown key; did you mean model?",
        "engine.zero_stage: stage 0 is refused",
        "data.video.clip.hight: unknown key; did you mean height?",
        "vae.kind: 'lvdn' is none of 'lvdm', 'diffusers'",
    ):
        assert fault in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "is not valid YAML"),
        ("run: {steps: 1, steps: 2}", "key 'steps' given twice"),
        ("- a list", "must hold a mapping of sections, not list"),
        ("task: training", "task: 'training' is none of autoencoder, latent_diffusion"),
        ("!!python/object/apply:os.system [exit]", "is not valid YAML"),
    ],
)
def test_file_that_is_no_config_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_training_config(path)


def test_overrides_come_last_and_read_scientific_numbers() -> None:
    config = load_training_config(QUICKSTART, ["optim.lr=3e-4", "run.folder=elsewhere", "validation.shards=[a, b]"])
    assert (config.optim.lr, config.run.folder, config.validation.shards) == (3e-4, "elsewhere", ("a", "b"))
    with pytest.raises(UserError, match=r"'optim.lr' is not of the form section.key=value"):
        read_tree(QUICKSTART, ["optim.lr"])
    with pytest.raises(UserError, match="task is a value, not a section"):
        read_tree(QUICKSTART, ["task.kind=x"])


def test_check_takes_under_a_second_and_imports_no_torch() -> None:
    program = (
        "import sys, runpy; sys.argv = ['train.py', '--config', 'configs/t2v_256.yaml', '--check'];"
        "runpy.run_path('launch/train.py', run_name='__main__'); print('torch' in sys.modules)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 3  # 0.3 s alone; the machine may be busy
    assert done.stdout.splitlines() == ["configs/t2v_256.yaml: valid latent_diffusion run in runs/t2v_256", "False"]


def test_full_size_config_is_lvdm_text_to_video_for_8_gpus() -> None:
    config = load_training_config(ROOT / "configs/t2v_256.yaml")
    assert isinstance(config, LatentDiffusionTraining)
    with torch.device("meta"):
        size = parameter_count(build_model(config.model, seed=0))
    assert size == 958_924_964
    assert accumulation_steps(config.batch, world=8) >= 1
    derived = deepspeed_config(config.engine, config.batch, config.optim, world=8, on_gpu=True, learning=size)
    assert derived["bf16"]["enabled"] is True
    assert derived["zero_optimization"]["stage"] == 2
    assert derived["zero_optimization"]["overlap_comm"] is True
    assert derived["data_types"]["grad_accum_dtype"] == "fp32"
    assert config.engine.activation_checkpointing


def test_batch_that_does_not_divide_is_refused_with_the_numbers() -> None:
    config = load_training_config(QUICKSTART, ["batch={size: 8, micro: 4}"])
    message = r"batch.size 8 is not divisible by batch.micro 4 x 3 ranks = 12"
    with pytest.raises(UserError, match=message):
        accumulation_steps(config.batch, world=3)


def test_values_are_frozen() -> None:
    config: Any = load_training_config(QUICKSTART)
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0
    assert isinstance(config, AnyTraining)


@pytest.mark.parametrize(
    ("shards", "fault"),
    [
        ([{"folders": ["a"], "weigth": 1}], "video.shards.0.weigth: unknown key; did you mean weight?"),
        ([{"folders": "a"}], "video.shards.0.folders: should be a list (got 'a')"),
        ([], "video.shards: needs at least 1 entry"),
        (["a", {"folders": ["b"], "weight": 1}], "video.shards: entry 0 has no weight, others have"),
        ([{"folders": ["a"], "where": [{"field": "x", "comparison": "=>", "value": 1}]}], ".where.0.comparison: Input"),
        ([{"folders": ["a"], "where": ["duration"]}], ".where.0: 'duration' is not of the form FIELD COMPARISON VALUE"),
    ],
)
def test_each_fault_of_a_set_of_shards_is_one_line(shards: list[Any], fault: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_config(DataConfig, {"kind": "video", "video": {"shards": shards}}, "c")
    head, *lines = str(refused.value).splitlines()
    assert head == "c: 1 fault in the config"
    assert len(lines) == 1
    assert fault in lines[0]


def test_conditions_may_be_texts() -> None:
    shards = [{"folders": ["a"], "where": ["duration >= 2", "language in [en, de]", "checked == true"]}]
    config = parse_config(DataConfig, {"kind": "video", "video": {"shards": shards}}, "c")
    assert config.video is not None
    assert isinstance(config.video.shards[0], ShardSet)
    found = [(one.field, one.comparison, one.value) for one in config.video.shards[0].where]
    assert found == [("duration", ">=", 2), ("language", "in", ("en", "de")), ("checked", "==", True)]


def test_the_example_of_the_data_page_is_a_config() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    whole, sidecar = (
        yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    )
    config = DataConfig.model_validate(whole["data"])
    assert config.video is not None
    assert len(config.video.clip.sizes) == 2
    assert VideoSource.model_validate(sidecar).captions == {"txt": 1, "llava": 3}


def test_the_example_of_the_latents_page_is_a_config() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "latents.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert DataConfig.model_validate(yaml.safe_load(example)["data"]).latents is not None


def test_latents_may_have_buckets() -> None:
    buckets = "data.video.clip.buckets=[{frames: 8, height: 64, width: 64, size: 8}]"
    config = load_training_config(QUICKSTART, [buckets, "data.kind=latents"])
    assert config.data.video is not None
    assert config.data.video.clip.buckets[0].size == 8


def test_a_vae_has_one_scaling() -> None:
    with pytest.raises(ValueError, match="scaling names a file with scale and shift: leave these out"):
        DiffusersVAE(kind="diffusers", name="vae", scale=0.5, scaling="scaling.json")


def test_the_reference_of_all_settings_is_current() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python tools/show_config.py --reference > docs/config.md"
    for setting in ("run.folder", "data.video.clip.stride", "optim.betas", "preview.prompts", "vae.subfolder"):
        assert page.count(f"| `{setting}` |") == 1
