"""Encoding jobs: what they make of a source, how they go on, and what they refuse to mix."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lvdm.config import (
    Bucket,
    ClipConfig,
    LatentDiffusionTraining,
    ShardSet,
    VideoAutoencoderConfig,
    parse_training_config,
)
from lvdm.data.batch import LatentBatch
from lvdm.data.build_index import build_index
from lvdm.data.decode import decode_frames
from lvdm.data.fetch import read_sample
from lvdm.data.index import open_index
from lvdm.data.latents import (
    latent_member,
    read_latent_set,
    text_member,
    unpack_latent,
    unpack_text,
)
from lvdm.data.loader import build_loader
from lvdm.data.samples import load_clip
from lvdm.data.writer import FileDigest, ShardSample, write_shard
from lvdm.errors import UserError
from lvdm.inference import frames_to_float
from lvdm.jobs import encoders as encoders_module
from lvdm.jobs.caption_shards import make_caption_shards, read_captions
from lvdm.jobs.encode_latents import Encoded, Settings, encode_folder
from lvdm.jobs.encoders import Encoders, load_encoders
from lvdm.jobs.latent_stats import write_scaling
from lvdm.jobs.shard_board import MANIFEST, SUMMARY, Board, Manifest
from lvdm.models.build import build_model
from lvdm.models.frozen import OwnFrozenVAE
from lvdm.models.video_autoencoder import VideoAutoencoder
from lvdm.randomness import seed_from_text
from lvdm.weights.native import save_model
from tests.conftest import Toy
from tests.data.conftest import shape_sample, write_set

CPU = torch.device("cpu")
PER_FRAME = VideoAutoencoderConfig(hidden_channels=4, downsample=(1, 4, 4), norm_groups=4)
BOTH, LATENTS_ALONE, TEXT_ALONE = Settings(), Settings(only="latents"), Settings(only="text")


def parsed(toy: Toy, **changes: Any) -> LatentDiffusionTraining:
    config = parse_training_config(toy.diffusion(toy.folder / "run", **changes), source="test")
    assert isinstance(config, LatentDiffusionTraining)
    return config


def encode(
    toy: Toy,
    source: str,
    target: Path,
    settings: Settings = BOTH,
    *,
    encoders: Encoders | None = None,
    verify: bool = False,
    **changes: Any,
) -> Encoded:
    config = parsed(toy, **changes)
    return encode_folder(
        config,
        source,
        str(target),
        device=CPU,
        dtype=torch.float32,
        settings=settings,
        encoders=encoders,
        verify=verify,
    )


def contents(folder: Path | str) -> dict[str, bytes]:
    """The files of a folder, but for those that hold times."""
    files = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in sorted(files.items())
        if not name.endswith(("_stats.json", "index.arrow")) and not name.startswith(".index/")
    }


def written(folder: Path) -> dict[str, int]:
    """When each file was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def samples_of(folder: Path | str) -> list[tuple[dict[str, Any], dict[str, bytes]]]:
    """Fields and members of each sample."""
    index = open_index([str(folder)])
    found = [read_sample(index[row]) for row in range(len(index))]
    return [(json.loads(members["json"]), members) for members in found]


def copy_of(folder: str, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.fixture(scope="module")
def models(toy: Toy) -> Encoders:
    """Those that the toy's config names."""
    return load_encoders(parsed(toy), CPU, torch.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six clips in two shards; not to be changed."""
    return write_set(tmp_path_factory.mktemp("small"), [shape_sample(number, 3) for number in range(6)], per_shard=3)


@pytest.fixture(scope="module")
def small_latents(toy: Toy, small: str, models: Encoders, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the toy's config makes of them; not to be changed."""
    target = tmp_path_factory.mktemp("encoded") / "latents"
    assert encode(toy, small, target, encoders=models).samples == 6
    return str(target)


@pytest.fixture(scope="module")
def per_frame(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An autoencoder that sees each frame alone, so that it takes images."""
    folder = tmp_path_factory.mktemp("per_frame") / "autoencoder"
    document = {"model": PER_FRAME.model_dump(mode="json"), "training": {}, "weights": "ema", "provenance": {}}
    save_model(folder, build_model(PER_FRAME, seed=2).state_dict(), document)
    return str(folder)


def test_stopped_job_goes_on_and_ends_with_the_same_bytes(toy: Toy, models: Encoders, tmp_path: Path) -> None:
    target = copy_of(toy.latents, tmp_path / "latents")
    for name in ("latents.json", "00001_manifest.json", "00002_manifest.json", "00002.tar"):
        (target / name).unlink()  # as a kill leaves it that comes between a shard and its manifest
    told: list[tuple[int, int]] = []
    done = encode_folder(
        parsed(toy),
        toy.shards,
        str(target),
        device=CPU,
        dtype=torch.float32,
        encoders=models,
        progress=lambda *now: told.append(now),
    )
    assert (done.skipped_shards, done.samples, done.failed, done.given_up) == (1, 24, [], {})
    assert contents(target) == contents(toy.latents)
    assert told[-1] == (24, 24)
    assert [now for now, _ in told] == sorted(now for now, _ in told)


def test_a_finished_folder_is_left_as_it_is(
    toy: Toy, small: str, small_latents: str, models: Encoders, tmp_path: Path
) -> None:
    target = copy_of(small_latents, tmp_path / "latents")
    before, bytes_before = written(target), contents(target)
    done = encode(toy, small, target, encoders=models)
    assert (done.skipped_shards, done.samples) == (2, 6)
    assert written(target) == before
    assert contents(target) == bytes_before


def test_latents_are_standard_under_their_own_scale_and_shift(toy: Toy) -> None:
    info = read_latent_set(toy.latents)
    moments = torch.stack([unpack_latent(members[latent_member(0)], info) for _, members in samples_of(toy.latents)])
    mean, logvar = moments.double().chunk(2, dim=1)
    deviation = (mean.var(correction=0) + logvar.exp().mean()).sqrt()
    assert info.shift == pytest.approx(-float(mean.mean()), rel=1e-5)
    assert info.scale == pytest.approx(1 / float(deviation), rel=1e-5)


@pytest.mark.parametrize(("start", "firsts"), [("random", None), ("first", [0, 2, 4]), ("center", [4, 6, 8])])
def test_several_clips_and_captions_of_a_video(
    toy: Toy, start: str, firsts: Sequence[int] | None, tmp_path: Path
) -> None:
    sources = [shape_sample(number) for number in range(4)]  # of 14 frames
    texts = ["a red square", "something quite different that goes on for longer", "third"]
    sources[0] = replace(sources[0], meta={**sources[0].meta, "more": texts})
    bare = {"mp4": sources[3].members["mp4"]}
    sources[3] = replace(sources[3], members=bare, meta={"fps": 8.0, "width": 24, "height": 24, "frames": 14})
    folder = write_set(tmp_path / "source", sources, per_shard=3)
    clip = {"frames": 2, "height": 16, "width": 16, "start": start, "flip": 0.5}
    places = {"txt": 1.0, "unused": 0.0, "more": 2.0}
    config = parsed(toy, data__kind="video", data__video__clip=clip, data__video__captions=places)
    models = load_encoders(config, CPU, torch.float32)
    target = tmp_path / "latents"
    encode_folder(
        config, folder, str(target), device=CPU, dtype=torch.float32, settings=Settings(clips=3), encoders=models
    )
    info = read_latent_set(str(target))
    assert (info.clips, info.captions) == (3, {"txt": 1.0, "more": 2.0})
    assert models.vae is not None
    assert models.text is not None
    for number, (fields, members) in enumerate(samples_of(target)):
        source, about = sources[number], fields["encoded"]
        captions = [("txt", 0)] * ("txt" in source.members) + [("more", item) for item in range(3 * (number == 0))]
        names = [text_member(["txt", "more"].index(place), item) for place, item in captions]
        with tarfile.open(target / f"0000{number // 3}.tar") as tar:
            order = [name.removeprefix(f"{source.key}.") for name in tar.getnames() if name.startswith(source.key)]
        assert order == sorted(["json", *(["txt"] if captions else []), *names, *map(latent_member, range(3))])
        assert about["captions"] == [list(pair) for pair in captions]
        assert {name: fields[name] for name in source.meta} == source.meta
        assert [fields[f"clip_{name}"] for name in ("frames", "height", "width")] == [2, 16, 16]
        assert (fields["clips"], len(about["clips"])) == (3, 3)
        assert (about["vae"], about["text"]) == (models.vae.fingerprint, models.text.fingerprint)
        assert about["source"]["shard"] == f"0000{number // 3}.tar"
        for name, (where, item) in zip(names, captions, strict=True):
            text = source.members["txt"].decode() if where == "txt" else texts[item]
            alone_BLD, mask_BL = models.text.encode([text])
            assert mask_BL.all()
            torch.testing.assert_close(unpack_text(members[name], info), alone_BLD[0], rtol=1e-4, atol=1e-4)
        for place in range(3):
            name = f"{about['source']['shard']}/{source.key}" + (f"/{place}" if place else "")
            if firsts is None:
                size = ClipConfig.model_validate(clip)
                frames = load_clip(
                    source.members, size, seed_from_text(name), seed=config.run.seed, text_dropout=0.0
                ).frames_THWC.copy()
            else:
                frames = decode_frames(source.members["mp4"], [firsts[place], firsts[place] + 1], 16, 16)
                frames = frames[:, :, ::-1].copy() if about["clips"][place]["flipped"] else frames
                assert about["clips"][place]["frames"] == [firsts[place], firsts[place] + 1]
            video = frames_to_float(torch.from_numpy(frames).permute(3, 0, 1, 2)[None])
            moments = unpack_latent(members[latent_member(place)], info)
            torch.testing.assert_close(moments, models.vae.encode(video)[0], rtol=1e-4, atol=1e-4)


def png(frame_HWC: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame_HWC).save(stream, "PNG")
    return stream.getvalue()


def test_images_folders_of_frames_and_videos_by_size(toy: Toy, per_frame: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 24, 24, 3), dtype=np.uint8)
    numbered = {f"{number:04d}.png": png(frame) for number, frame in enumerate(pixels)}
    kinds = [
        ShardSample("0000", {"png": png(pixels[0]), "txt": b"an image"}, {"width": 24, "height": 24}),
        replace(shape_sample(0), key="0001"),
        ShardSample("0002", {**numbered, "txt": b"frames"}, {"width": 24, "height": 24}),
        ShardSample("0003", {"png": png(pixels[5])}, {"width": 24, "height": 24}),
        replace(shape_sample(1), key="0004"),
    ]
    folder = write_set(tmp_path / "source", kinds, per_shard=4)
    sizes = [Bucket(frames=1, height=16, width=16, size=2), Bucket(frames=4, height=16, width=16, size=2)]
    changes: dict[str, Any] = {
        "data__video__clip": {"start": "first", "buckets": [bucket.model_dump() for bucket in sizes]},
        "vae__folder": per_frame,
        "model__temporal_length": 4,
        "batch__size": 2,
    }
    config = parsed(toy, data__kind="video", **changes)
    target = tmp_path / "latents"
    done = encode(toy, folder, target, data__kind="video", **changes)
    assert (done.samples, done.failed) == (5, [])
    info = read_latent_set(str(target))
    channels = info.shapes[0][0]
    assert info.shapes == ((channels, 1, 4, 4), (channels, 4, 4, 4))
    vae = load_encoders(config, CPU, torch.float32, "latents").vae
    assert vae is not None
    found = samples_of(target)
    # by size, and as in the source within a size
    assert [fields["key"] for fields, _ in found] == ["0000", "0003", "0001", "0002", "0004"]
    assert [fields["clip_frames"] for fields, _ in found] == [1, 1, 4, 4, 4]
    by_key = {source.key: source for source in kinds}
    for fields, members in found:
        frames = fields["clip_frames"]
        size = ClipConfig(frames=frames, height=16, width=16, start="first")
        clip = load_clip(by_key[fields["key"]].members, size, 0, seed=0, text_dropout=0.0)
        video = frames_to_float(torch.from_numpy(clip.frames_THWC).permute(3, 0, 1, 2)[None])
        moments = unpack_latent(members[latent_member(0)], info)
        torch.testing.assert_close(moments, vae.encode(video)[0], rtol=1e-4, atol=1e-4)
    batches = read(config, ShardSet(folders=(str(target),)), steps=3)
    assert {batch.moments_BCTHW.shape[2] for batch in batches} == {1, 4}


def read(config: LatentDiffusionTraining, shards: ShardSet, steps: int = 4) -> list[LatentBatch]:
    """The batches that training sees of latent shards."""
    tree = config.data.model_dump() | {"kind": "latents", "latents": {"shards": [shards.model_dump()]}}
    data = type(config.data).model_validate(tree)
    loader = build_loader(data, seed=3, batch=2, micro=2, world=1, rank=0, steps=steps)
    batches = list(loader)
    assert all(isinstance(batch, LatentBatch) and not batch.replaced for batch in batches)
    return batches  # type: ignore[return-value]


def test_text_alone_beside_latents_alone_is_as_good_as_both_together(
    toy: Toy, small: str, small_latents: str, models: Encoders, tmp_path: Path
) -> None:
    latents = tmp_path / "latents"
    done = encode(toy, small, latents, LATENTS_ALONE, encoders=Encoders(models.vae, None, CPU))
    assert done.samples == 6
    assert read_latent_set(str(latents)).text is None
    assert not (latents / "unconditional.safetensors").exists()

    rows = [{"key": fields["key"], "caption": members["txt"].decode()} for fields, members in samples_of(small)]
    listed = tmp_path / "list.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sidecar = str(tmp_path / "sidecar")
    make_caption_shards(sidecar, read_captions(str(listed)), small)

    config = parsed(toy)
    whole = read(config, ShardSet(folders=(small_latents,)), steps=6)
    assert len({len(batch.text_BLD[0]) for batch in whole}) > 1
    for number, source in enumerate((small, sidecar, str(latents))):
        text = tmp_path / f"text{number}"
        done = encode(toy, source, text, TEXT_ALONE, encoders=Encoders(None, models.text, CPU))
        assert done.samples == 6
        about = read_latent_set(str(text))
        assert (about.vae, about.shapes) == (None, ())
        assert all("0.latent.safetensors" not in members for _, members in samples_of(text))
        joined = read(config, ShardSet(folders=(str(latents),), join=(str(text),)), steps=6)
        assert [batch.positions for batch in joined] == [batch.positions for batch in whole]
        for one, other in zip(joined, whole, strict=True):
            torch.testing.assert_close(one.moments_BCTHW, other.moments_BCTHW, rtol=1e-4, atol=1e-4)
            assert torch.equal(one.text_mask_BL, other.text_mask_BL)
            torch.testing.assert_close(one.text_BLD, other.text_BLD, rtol=1e-4, atol=1e-4)


def shards_written(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name, when in after.items() if name.endswith(".tar") and before.get(name) != when}


def test_only_what_changed_is_encoded_again(toy: Toy, models: Encoders, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "latents"
    for shard in range(4):
        write_shard(str(source), shard, [shape_sample(2 * shard + item, per_shard=2) for item in range(2)])
    build_index(str(source))
    encode(toy, str(source), target, encoders=models)
    write_scaling([str(target)], (2.0, 3.0, 4.0, 5.0), (0.5, 0.25, 0.0, -1.0))  # as tools/latent_stats.py --write does
    chosen = read_latent_set(str(target))
    before, kept = written(target), contents(target)

    write_shard(str(source), 1, [shape_sample(number, per_shard=2) for number in (3, 2, 20)])
    write_shard(str(source), 4, [shape_sample(number, per_shard=2) for number in (21, 22)])
    for path in source.glob("00002*"):
        path.unlink()
    build_index(str(source))
    done = encode(toy, str(source), target, encoders=models)
    assert (done.samples, done.skipped_shards) == (2 + 3 + 2 + 2, 2)
    assert shards_written(before, written(target)) == {"00001.tar", "00004.tar"}
    after = contents(target)
    assert not [name for name in after if name.startswith("00002")]
    assert {name for name in kept if after.get(name) != kept[name]} == {
        *(f"00001{part}" for part in (".tar", ".parquet", "_manifest.json")),
        *(f"00002{part}" for part in (".tar", ".parquet", "_manifest.json")),
        "latents.json",
    }
    info = read_latent_set(str(target))
    assert (info.scale, info.shift, info.samples) == (chosen.scale, chosen.shift, 9)
    keys = [fields["key"] for fields, _ in samples_of(target)]
    assert keys == [shape_sample(number, per_shard=2).key for number in (0, 1, 3, 2, 20, 6, 7, 21, 22)]
    for fields, members in samples_of(target):
        assert unpack_latent(members[latent_member(0)], info).shape[1:] == (2, 4, 4), fields["key"]


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"text__max_length": 8}, {}, "text.max_length: 16, not 8"),
        ({"data__video__clip": {"frames": 4, "height": 16, "width": 16, "stride": 2}}, {}, "clip.start: "),
        ({}, {"stored": "bf16"}, "dtype: fp32, not bf16"),
        ({}, {"clips": 2}, "clips: 1, not 2"),
        ({}, {"frames_at_once": 4}, "frames_at_once: 128, not 4"),
        ({}, {"only": "latents"}, "text: given, not none"),
        ({"data__video__captions": {"txt": 1.0, "b": 1.0}}, {}, "captions: txt, else caption, not txt, b"),
        ({"source": "held_out"}, {}, "source: "),
    ],
)
def test_other_settings_are_refused_in_a_begun_folder(
    toy: Toy, tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    target = tmp_path / "latents"
    target.mkdir()
    shutil.copy(Path(toy.latents) / "encoding.json", target)
    (target / "00000.tar").write_bytes(b"somebody's")
    before = contents(target)
    source = toy.held_out if changes.pop("source", None) else toy.shards
    with pytest.raises(UserError) as caught:
        encode(toy, source, target, Settings(**settings), data__kind="video", **changes)
    assert str(caught.value).startswith(f"{target} holds latents made with another {message}")
    assert str(caught.value).endswith("; choose another folder")
    assert "\n" not in str(caught.value)
    assert contents(target) == before


def broken_vae(toy: Toy, where: str, value: float) -> Encoders:
    """Encoders whose VAE adds a number to the means or log variances of the first clip of each call."""
    models = load_encoders(parsed(toy), CPU, torch.float32, "latents")
    assert models.vae is not None
    sound = models.vae.encode

    def encode_badly(frames_BCTHW: torch.Tensor) -> torch.Tensor:
        moments = sound(frames_BCTHW)
        part = moments.chunk(2, dim=1)[where == "variances"]
        part[0] += value
        return moments

    models.vae.encode = encode_badly  # type: ignore[method-assign]
    return models


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        ("means", float("nan"), "not all values of the latent are finite"),
        ("means", 2000.0, "a mean of the latent exceeds 1000"),
        ("variances", 200.0, "a log variance of the latent exceeds 100"),
    ],
)
def test_absurd_latents_are_refused_and_listed(
    toy: Toy, small: str, where: str, value: float, reason: str, tmp_path: Path
) -> None:
    done = encode(toy, small, tmp_path / "latents", LATENTS_ALONE, encoders=broken_vae(toy, where, value))
    assert len(done.failed) == 2
    assert {item.reason for item in done.failed} == {reason}
    assert done.samples == 6 - len(done.failed)
    kept = [fields["key"] for fields, _ in samples_of(tmp_path / "latents")]
    assert sorted([*kept, *(item.key for item in done.failed)]) == [f["key"] for f, _ in samples_of(small)]
    statistics = [json.loads(path.read_text()) for path in sorted((tmp_path / "latents").glob("*_stats.json"))]
    assert sum(each["failed_to_subsample"] for each in statistics) == len(done.failed)


def test_where_all_latents_are_bad_there_is_one_line(toy: Toy, small: str, tmp_path: Path) -> None:
    models = broken_vae(toy, "means", float("nan"))
    assert isinstance(models.vae, OwnFrozenVAE)
    next(iter(models.vae.model.parameters())).data.fill_(float("nan"))
    message = rf"none of the 6 samples in {small} could be encoded; the first: not all values of the latent are"
    with pytest.raises(UserError, match=message):
        encode(toy, small, tmp_path / "latents", LATENTS_ALONE, encoders=models)
    assert not (tmp_path / "latents" / "latents.json").exists()


def test_memory_tells_how_many_frames_are_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(VideoAutoencoderConfig(hidden_channels=4, downsample=(2, 4, 4), norm_groups=4), seed=0)
    assert isinstance(model, VideoAutoencoder)
    vae = OwnFrozenVAE(model, scale=1.0, shift=0.0, fingerprint="none")
    models = Encoders(vae, None, CPU)
    sizes = [ClipConfig(frames=2, height=16, width=16), ClipConfig(frames=4, height=32, width=32)]
    one_clip = encoders_module.peak_bytes(lambda: vae.encode(torch.zeros(1, 3, 4, 32, 32)))
    # at least the input's cast and the first layer's output, at most some dozen of them
    layer = 4 * 4 * 32 * 32 * 4
    assert layer < one_clip < 40 * layer

    def that_fit(free: int) -> int:
        monkeypatch.setattr(encoders_module, "free_bytes", lambda device: free)
        return models.frames_that_fit(sizes)

    assert [that_fit(times * one_clip) for times in (2, 4, 7, 1000)] == [4, 8, 8, 128]
    models.limit_calls(8, sizes)
    assert vae.slice_clips == 2
    message = r"^encoding 4 frames of 32x32 takes more memory than the .* free; set a smaller data\.video\.clip$"
    with pytest.raises(UserError, match=message):
        that_fit(one_clip)


def test_thousands_of_finished_shards_are_looked_over_in_no_time(tmp_path: Path) -> None:
    names = [f"{number:05d}" for number in range(2000)]
    files = {"tar": FileDigest(3, "ab"), "parquet": FileDigest(3, "cd")}
    manifest = Manifest("settings", "source", 1, [], files, {"means": [0.5] * 4})
    for name in names:
        (tmp_path / f"{name}.tar").write_bytes(b"abc")
        (tmp_path / f"{name}.parquet").write_bytes(b"abc")
        (tmp_path / f"{name}{MANIFEST}").write_text(json.dumps(asdict(manifest)))
    sources = dict.fromkeys(names, "source")
    Board(str(tmp_path), sources, "settings").look()
    summary = json.loads((tmp_path / SUMMARY).read_text())
    assert len(summary) == 2000
    (tmp_path / "00007.tar").unlink()
    (tmp_path / "00009_manifest.json").unlink()
    (tmp_path / "00011.tar").write_bytes(b"abcd")
    changed = sources | {"00013": "another"}
    board = Board(str(tmp_path), changed, "settings")
    started = time.process_time()
    board.look()
    assert time.process_time() - started < 1
    assert set(names) - set(board.finished) == {"00007", "00009", "00011", "00013"} == set(board.open)
    assert Board(str(tmp_path), sources, "others").open == names
    # a summary of a shard that was made from something else since must not come back to life
    board.finish("00013", replace(manifest, source="another"))
    board.summarise()
    later = Board(str(tmp_path), sources, "settings")
    later.look()
    assert "00013" in later.open


def test_a_shard_of_bad_samples_alone_is_finished_and_stays_so(toy: Toy, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "latents"
    write_shard(str(source), 0, [shape_sample(0)])
    write_shard(str(source), 1, [ShardSample("bad", {"mp4": b"junk"}, {"width": 24, "height": 24, "frames": 14})])
    build_index(str(source))
    done = encode(toy, str(source), target, LATENTS_ALONE)
    assert (done.samples, [item.key for item in done.failed]) == (1, ["bad"])
    with tarfile.open(target / "00001.tar") as tar:
        assert tar.getnames() == []
    before = written(target)
    done = encode(toy, str(source), target, LATENTS_ALONE)
    assert (done.skipped_shards, done.samples, len(done.failed)) == (2, 1, 1)
    assert written(target) == before


def test_a_byte_that_flipped_is_found_when_it_is_looked_for(
    toy: Toy, small: str, small_latents: str, models: Encoders, tmp_path: Path
) -> None:
    target = copy_of(small_latents, tmp_path / "latents")
    whole = bytearray((target / "00001.tar").read_bytes())
    whole[len(whole) // 2] ^= 1
    (target / "00001.tar").write_bytes(whole)
    assert encode(toy, small, target, encoders=models).skipped_shards == 2
    before = written(target)
    done = encode(toy, small, target, encoders=models, verify=True)
    assert (done.skipped_shards, done.samples) == (1, 6)
    assert shards_written(before, written(target)) == {"00001.tar"}
    assert contents(target) == contents(small_latents)
