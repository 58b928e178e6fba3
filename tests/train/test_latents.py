"""Training on latents: the same as on their videos, with its own scale, and not on others than the config names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.checkpoint.folder import open_checkpoint
from lvdm.config import LatentDiffusionTraining, parse_training_config
from lvdm.data.batch import LatentBatch, VideoBatch
from lvdm.data.build_index import build_index
from lvdm.data.encode import encode_mp4
from lvdm.data.index import open_index
from lvdm.data.latent_sets import open_latent_sets
from lvdm.data.latents import LatentSetInfo, LatentVAE, read_latent_set, write_latent_set
from lvdm.data.loader import build_loader
from lvdm.data.writer import ShardSample, write_shard
from lvdm.errors import UserError
from lvdm.inference import load
from lvdm.jobs.encode_latents import Settings, encode_folder
from lvdm.jobs.export import export_checkpoint
from lvdm.jobs.export_relatives import export_relative
from lvdm.synthetic import caption, combinations, render
from lvdm.train.latent_check import check_latent_set
from lvdm.train.latent_diffusion import LatentDiffusionTask
from tests.conftest import Toy
from tests.ranks import run_ranks
from tests.train.runs import losses_of, run


def config_of(tree: dict[str, Any]) -> LatentDiffusionTraining:
    config = parse_training_config(tree, source="test")
    assert isinstance(config, LatentDiffusionTraining)
    return config


@pytest.fixture(scope="module")
def in_bf16(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bf16") / "latents"
    config = config_of(toy.diffusion(folder))
    encode_folder(
        config, toy.shards, str(folder), device=torch.device("cpu"), dtype=torch.float32, settings=Settings("bf16")
    )
    return str(folder)


@pytest.fixture(scope="module")
def on_videos(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run that encodes on the fly."""
    folder = tmp_path_factory.mktemp("video") / "run"
    run_ranks(run, 1, toy.diffusion(folder, run__steps=4, data__kind="video"))
    return losses_of(folder)


def test_losses_on_latents_are_those_on_their_videos(
    toy: Toy, on_videos: list[float], in_bf16: str, tmp_path: Path
) -> None:
    """Same source and seed, clips from the first frame, none flipped."""
    run_ranks(run, 1, toy.diffusion(tmp_path / "fp32", run__steps=4))
    assert losses_of(tmp_path / "fp32") == pytest.approx(on_videos, rel=1e-5)
    run_ranks(run, 1, toy.diffusion(tmp_path / "bf16", run__steps=4, data__latents__shards=[in_bf16]))
    assert losses_of(tmp_path / "bf16") == pytest.approx(on_videos, rel=1e-2)
    assert losses_of(tmp_path / "bf16") != pytest.approx(on_videos, rel=1e-5)


def test_buckets_train_on_latents_as_on_videos(toy: Toy, tmp_path: Path) -> None:
    """Clips of two lengths, their videos in folders of their own, with steps of two sizes."""
    short = [
        ShardSample(
            f"{number:05d}",
            {"mp4": encode_mp4(render(kind, number, frames=3, size=16), fps=8), "txt": caption(kind).encode()},
            {"frames": 3, "width": 16, "height": 16},
        )
        for number, kind in enumerate(combinations()[:12])
    ]
    write_shard(str(tmp_path / "short"), 0, short)
    build_index(str(tmp_path / "short"))
    buckets = [{"frames": frames, "height": 16, "width": 16, "size": size} for frames, size in ((2, 4), (4, 2))]
    videos = [toy.shards, str(tmp_path / "short")]
    changes = {
        "data__video": {"shards": videos, "clip": toy.clip | {"buckets": buckets}},
        "data__latents__shards": [str(tmp_path / name) for name in ("latents", "short-latents")],
        "batch__size": 2,
        "run__steps": 6,
    }
    config = config_of(toy.diffusion(tmp_path / "run", **changes))
    for source, target in zip(videos, changes["data__latents__shards"], strict=True):
        encode_folder(config, source, target, device=torch.device("cpu"), dtype=torch.float32)
    run_ranks(run, 1, toy.diffusion(tmp_path / "latent-run", **changes))
    run_ranks(run, 1, toy.diffusion(tmp_path / "video-run", data__kind="video", **changes))
    assert losses_of(tmp_path / "latent-run") == pytest.approx(losses_of(tmp_path / "video-run"), rel=1e-5)
    loader = build_loader(config.data, seed=5, batch=2, micro=1, world=1, rank=0, steps=6)
    shapes = {batch.moments_BCTHW.shape[2] for batch in loader if isinstance(batch, LatentBatch)}
    assert shapes == {1, 2}


def test_latents_come_in_the_order_of_their_videos(toy: Toy, tmp_path: Path) -> None:
    """Position by position the sample of the same key, over more than an epoch, in the right place of the set."""

    def entries(kind: str) -> list[tuple[int, str]]:
        config = config_of(toy.diffusion(tmp_path / "run", data__kind=kind))
        loader = build_loader(config.data, seed=5, batch=4, micro=4, world=1, rank=0, steps=10)
        assert loader.course is not None
        source = loader.course.sources[0]
        taken = [entry for step in range(10) for entry in loader.course.order.step(step).entries]
        return [(entry.position, source.records(0, entry.place)[0].key) for entry in taken]

    assert entries("latents") == entries("video")
    assert len({key for _, key in entries("video")}) == len(open_index([toy.shards]))


def test_the_latent_of_a_position_is_that_of_its_clip(toy: Toy, tmp_path: Path) -> None:
    stored = config_of(toy.diffusion(tmp_path / "run"))
    videos = config_of(toy.diffusion(tmp_path / "run", data__kind="video"))
    task = LatentDiffusionTask(videos, torch.device("cpu"), torch.float32)
    how: dict[str, Any] = {"seed": 5, "batch": 8, "micro": 8, "world": 1, "rank": 0, "steps": 1}
    (latents,), (clips,) = (list(build_loader(config.data, **how)) for config in (stored, videos))
    assert isinstance(latents, LatentBatch)
    assert isinstance(clips, VideoBatch)
    encoded, expected = task._encode(latents, seed=5), task._encode(clips, seed=5)
    torch.testing.assert_close(encoded.z_BCTHW, expected.z_BCTHW, rtol=1e-5, atol=1e-5)
    one, two = encoded.text["text_BLD"], expected.text["text_BLD"]
    assert one is not None
    assert two is not None
    mask = expected.text["text_mask_BL"]
    assert mask is not None
    assert mask.equal(encoded.text["text_mask_BL"])  # type: ignore[arg-type]
    torch.testing.assert_close(one[mask], two[mask], rtol=1e-4, atol=1e-5)


def with_scaling(toy: Toy, folder: Path, **scaling: Any) -> str:
    """A copy of the latents with another scale or shift."""
    shutil.copytree(toy.latents, folder)
    tree = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(json.dumps(tree | scaling))
    return str(folder)


def test_scale_and_shift_of_each_channel_train_are_exported_and_sample(toy: Toy, tmp_path: Path) -> None:
    channels = read_latent_set(toy.latents).shapes[0][0]
    scale, shift = [1.0 + number for number in range(channels)], [0.25 * number for number in range(channels)]
    folder = with_scaling(toy, tmp_path / "latents", scale=scale, shift=shift)
    changes = {"data__latents__shards": [folder], "vae__scaling": "", "run__steps": 2}
    tree = toy.diffusion(tmp_path / "run", **changes)
    task = LatentDiffusionTask(config_of(tree), torch.device("cpu"), torch.float32)
    (batch,) = build_loader(config_of(tree).data, seed=5, batch=4, micro=4, world=1, rank=0, steps=1)
    assert isinstance(batch, LatentBatch)
    without = LatentDiffusionTask(
        config_of(toy.diffusion(tmp_path / "run", vae__scaling=with_file(tmp_path, 1.0, 0.0))),
        torch.device("cpu"),
        torch.float32,
    )
    z, plain = task._encode(batch, 5).z_BCTHW, without._encode(batch, 5).z_BCTHW
    for channel in range(channels):
        torch.testing.assert_close(z[:, channel], scale[channel] * (plain[:, channel] + shift[channel]))

    run_ranks(run, 1, tree)
    assert open_checkpoint(tmp_path / "run").manifest.facts["scale"] == scale
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    model = load(tmp_path / "export", device="cpu")
    assert (model.vae.scale, model.vae.shift) == (tuple(scale), tuple(shift))
    assert model.sample(["a red circle"], steps=2).shape == (1, 4, 16, 16, 3)
    with pytest.raises(UserError, match="a scale and shift for each channel of its latents; sd-unet has no place"):
        export_relative(tmp_path / "export", tmp_path / "theirs", "sd-unet")
    assert not (tmp_path / "theirs").exists()


def with_file(folder: Path, scale: Any, shift: Any) -> str:
    path = folder / "scaling.json"
    path.write_text(json.dumps({"scale": scale, "shift": shift}))
    return str(path)


def test_a_run_does_not_go_on_with_another_scale(toy: Toy, tmp_path: Path) -> None:
    folder = with_scaling(toy, tmp_path / "latents", scale=2.0)
    changes = {"data__latents__shards": [folder], "vae__scaling": ""}
    run_ranks(run, 1, toy.diffusion(tmp_path / "run", run__steps=1, **changes))
    shutil.rmtree(folder)
    with_scaling(toy, tmp_path / "latents", scale=3.0)
    with pytest.raises(AssertionError, match=r"had latents of scale 2\.0, which latents\.json now gives as 3\.0: put"):
        run_ranks(run, 1, toy.diffusion(tmp_path / "run", run__steps=2, **changes))
    explicit = with_file(tmp_path, 2.0, read_latent_set(toy.latents).shift)
    with pytest.raises(AssertionError, match=r"cannot go on with a changed vae\.scaling"):
        run_ranks(run, 1, toy.diffusion(tmp_path / "run", run__steps=2, **changes | {"vae__scaling": explicit}))


def test_scales_that_differ_need_a_choice(toy: Toy, tmp_path: Path) -> None:
    other = with_scaling(toy, tmp_path / "latents", scale=2.0)
    changes: dict[str, Any] = {"data__latents__shards": [toy.latents, other]}
    LatentDiffusionTask(config_of(toy.diffusion(tmp_path, **changes)), torch.device("cpu"), torch.float32)
    config = config_of(toy.diffusion(tmp_path, **changes, vae__scaling=""))
    with pytest.raises(UserError, match=r"the scale and shift of .* those of .* 2\.0 and .*with vae\.scaling"):
        LatentDiffusionTask(config, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"text__max_length": 8}, "text.max_length: 16, not 8"),
        ({"text__mask_padding": False}, "text.mask_padding: True, not False"),
        ({"text": None, "vae": {"kind": "diffusers", "name": "x"}}, "vae.kind: lvdm, not diffusers"),
        ({"data__video__clip__frames": 8}, "data.video.clip.frames: 4, not 8"),
        ({"data__video__clip__height": 32}, "data.video.clip.height: 16, not 32"),
        ({"data__video__clip__width": 32}, "data.video.clip.width: 16, not 32"),
        ({"data__video__clip__stride": 1}, "data.video.clip.stride: 2, not 1"),
        ({"data__video__clip__stride": 1, "data__video__clip__fps": 4.0}, "data.video.clip.stride: 2, not 1"),
        ({"data__video__clip__start": "random"}, "data.video.clip.start: first, not random"),
        ({"data__video__clip__resize": "pad"}, "data.video.clip.resize: crop, not pad"),
        ({"data__video__clip__flip": 0.5}, "data.video.clip.flip: 0.0, not 0.5"),
        ({"data__video__clip__min_frames": 8}, "data.video.clip.min_frames: 0, not 8"),
        (
            {"data__video__clip__buckets": [{"frames": n, "height": 16, "width": 16, "size": 4} for n in (1, 4)]},
            "data.video.clip.buckets: 4x16x16, not 1x16x16, 4x16x16",
        ),
        ({"data__video__captions": {"alt": 1.0}}, "data.video.captions: none, not alt"),
    ],
)
def test_latents_made_otherwise_are_refused_by_the_field(
    toy: Toy, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    if changes.pop("text", "kept") is None:
        changes |= {"model": {"kind": "space_time_unet"}}
    tree = toy.diffusion(tmp_path / "run", **changes)
    tree["data"]["video"]["clip"] = dict(tree["data"]["video"]["clip"])
    config = config_of({name: value for name, value in tree.items() if name != "text" or "model" not in changes})
    with pytest.raises(UserError) as caught:
        check_latent_set(config, open_latent_sets([toy.latents]))
    assert str(caught.value) == f"the latents in {toy.latents} were made with another {field}"


def test_other_weights_are_refused_by_their_digest(toy: Toy, tmp_path: Path) -> None:
    config = config_of(toy.diffusion(tmp_path / "run"))
    info = read_latent_set(toy.latents)
    assert info.vae is not None
    assert info.text is not None
    for name, changes in {
        "weights of vae.folder": {"vae": info.vae.model_copy(update={"sha256": "ab"})},
        "weights of text.name .*MiniLM|weights of text.name package:": {
            "text": info.text.model_copy(update={"sha256": "ab"})
        },
        "text.name: none": {"text": None},
    }.items():
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        other = info.model_copy(update=changes)
        write_latent_set(str(folder), other, torch.zeros(1, info.text.dim) if other.text else None)
        with pytest.raises(UserError, match=f"{folder} were made with another ({name})"):
            check_latent_set(config, open_latent_sets([toy.latents]), open_latent_sets([str(folder)]))


def test_models_that_are_not_here_are_compared_by_name(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    info = read_latent_set(toy.latents)
    made = LatentSetInfo.model_validate(
        info.model_dump() | {"vae": LatentVAE(kind="diffusers", name="some/vae", sha256="ab"), "shapes": info.shapes}
    )
    write_latent_set(str(tmp_path / "latents"), made, torch.zeros(1, 384))
    sets = open_latent_sets([str(tmp_path / "latents")])
    named = {"kind": "diffusers", "name": "some/vae"}
    (note,) = check_latent_set(config_of(toy.diffusion(tmp_path / "run", vae=named)), sets)
    assert note.startswith("the VAE of the latents is compared by its name alone: some/vae is neither a folder nor")
    with pytest.raises(UserError, match=r"another vae\.name: some/vae, not other/vae"):
        check_latent_set(config_of(toy.diffusion(tmp_path / "run", vae=named | {"name": "other/vae"})), sets)
