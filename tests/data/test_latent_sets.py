"""Which clip and caption of a sample are read, from which folder, and in which bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.config import ClipConfig, DataConfig, ShardSet
from lvdm.data.batch import LatentBatch
from lvdm.data.fetch import Fetcher
from lvdm.data.latent_sets import open_latent_sets, scaling_of
from lvdm.data.latents import (
    LatentSetInfo,
    LatentText,
    LatentVAE,
    latent_member,
    pack_latent,
    pack_text,
    text_member,
    write_latent_set,
)
from lvdm.data.loader import build_loader, build_validation_loader
from lvdm.data.transforms import clip_draws, draw_caption, drops_text
from lvdm.data.writer import ShardSample
from lvdm.errors import UserError
from tests.data.conftest import write_set

SEED = 11
VAE = LatentVAE(kind="lvdm", name="somewhere", sha256="ab")
TEXT = LatentText(name="encoder", sha256="cd", max_length=4, dim=3, mask_padding=True)
CLIP = ClipConfig(frames=8, height=16, width=16)
SMALL = {"frames": 1, "height": 16, "width": 16, "size": 2}
LARGE = {"frames": 8, "height": 16, "width": 16, "size": 4}
UNCONDITIONAL = -1.0


def info(**changes: Any) -> LatentSetInfo:
    fields = {"vae": VAE, "text": TEXT, "clip": CLIP, "dtype": "fp32", "shapes": ((1, 2, 4, 4),), "samples": 1}
    return LatentSetInfo(**(fields | {"lvdm_version": "0"} | changes))


def write(
    folder: Path,
    about: LatentSetInfo,
    *,
    samples: int = 8,
    clips: int = 1,
    captions: Sequence[int] = (1,),
    images: Sequence[int] = (),
    offset: float = 0.0,
) -> str:
    """A set whose moments are all 100 x sample + clip, and whose states 100 x place + caption, plus an offset.

    Args:
        captions: captions by place.
        images: samples of one frame, without captions.
    """
    shards = []
    for number in range(samples):
        frames = 1 if number in images else 8
        members: dict[str, bytes] = {}
        if about.text and number not in images:
            for place, count in enumerate(captions):
                for item in range(count):
                    states = torch.full((2, 3), 100.0 * place + item + offset)
                    members[text_member(place, item)] = pack_text(states, "fp32")
        if about.vae:
            for clip in range(clips):
                moments = torch.full((2, 1 if frames == 1 else 2, 4, 4), 100.0 * number + clip + offset)
                moments[1] = 0
                members[latent_member(clip)] = pack_latent(moments, "fp32")
        meta = {"clips": clips, "clip_frames": frames, "clip_height": 16, "clip_width": 16} if about.vae else {}
        shards.append(ShardSample(f"{number:04d}", {"txt": b"text", **members}, meta))
    write_set(folder, shards, per_shard=5)
    write_latent_set(str(folder), about, torch.full((1, 3), UNCONDITIONAL) if about.text else None)
    return str(folder)


def data(shards: Sequence[Any], video: dict[str, Any] | None = None, dropout: float = 0.0) -> DataConfig:
    tree: dict[str, Any] = {"kind": "latents", "latents": {"shards": shards}, "workers": 0, "text_dropout": dropout}
    if video is not None:
        tree["video"] = {"shards": ["nowhere"], **video}
    return DataConfig.model_validate(tree)


def batches(config: DataConfig, steps: int = 2, batch: int = 4) -> list[LatentBatch]:
    return list(build_loader(config, seed=SEED, batch=batch, micro=batch, world=1, rank=0, steps=steps))  # type: ignore[arg-type]


def read(config: DataConfig, steps: int = 2, batch: int = 4) -> list[tuple[int, float, float]]:
    """Position, value of the mean and value of the text of each sample."""
    given = batches(config, steps, batch)
    assert not any(one.replaced for one in given)
    return [
        (position, float(one.moments_BCTHW[row, 0, 0, 0, 0]), float(one.text_BLD[row, 0, 0]))
        for one in given
        for row, position in enumerate(one.positions)
    ]


def test_clips_and_captions_are_drawn_by_position_and_evenly(tmp_path: Path) -> None:
    places = {"a": 1.0, "unused": 0.0, "b": 3.0}
    folder = write(tmp_path, info(clips=3, captions=places), clips=3, captions=(2, 1))
    found = read(data([folder], dropout=0.2), steps=150, batch=8)
    clips, texts = Counter[float](), Counter[float]()
    for position, moment, text in found:
        assert moment % 100 == int(clip_draws(SEED, position).start * 3)
        clips[moment % 100] += 1
        if drops_text(SEED, position, 0.2):
            assert text == UNCONDITIONAL
        else:
            place, item = draw_caption([2, 1], [1.0, 3.0], SEED, position) or (-1, -1)
            assert text == 100 * place + item
            texts[text] += 1
    assert len(found) == 1200
    assert all(abs(count - 400) < 60 for count in clips.values())
    shares = {text: count / texts.total() for text, count in texts.items()}
    assert shares == pytest.approx({0.0: 0.125, 1.0: 0.125, 100.0: 0.75}, abs=0.05)


def test_weights_of_the_config_decide_among_the_encoded_captions(tmp_path: Path) -> None:
    folder = write(tmp_path, info(captions={"a": 1.0, "b": 1.0}), captions=(1, 2))
    only_b = read(data([folder], {"clip": CLIP, "captions": {"b": 1.0}}), steps=8)
    assert {text for _, _, text in only_b} == {100.0, 101.0}
    both = read(data([folder], {"clip": CLIP, "captions": {"b": 1.0, "a": 1.0}}), steps=8)
    for position, _, text in both:  # in the order of the config, as captions of videos are drawn
        place, item = draw_caption([2, 1], [1.0, 1.0], SEED, position) or (-1, -1)
        assert text == (100.0 + item if place == 0 else 0.0)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_only_the_drawn_clip_and_caption_are_read(
    dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, info(clips=4), clips=4, captions=(3,))
    read_bytes = []
    fetch = Fetcher.samples

    def spy(self: Fetcher, records: Any) -> Any:
        found = fetch(self, records)
        read_bytes.append(self.read_bytes)
        return found

    monkeypatch.setattr(Fetcher, "samples", spy)
    batches(data([folder], dropout=dropout), steps=4)
    states, moments = len(pack_text(torch.zeros(2, 3), "fp32")), len(pack_latent(torch.zeros(2, 2, 4, 4), "fp32"))
    assert read_bytes[-1] <= 1.05 * 16 * (moments + (states if dropout == 0 else 0))


def test_the_last_joined_text_and_latents_are_the_ones_read(tmp_path: Path) -> None:
    only_text = info(vae=None, shapes=())
    base = write(tmp_path / "base", info(), clips=1)
    first = write(tmp_path / "first", only_text, offset=10.0)
    last = write(tmp_path / "last", only_text, captions=(2,), offset=20.0, samples=6)
    scores = write_set(tmp_path / "scores", [ShardSample(f"{n:04d}", {}, {"score": n}) for n in range(8)], per_shard=5)
    joined = {"folders": [base], "join": [first, last, scores], "where": ["score >= 1"]}
    found = read(data([joined]), steps=5)
    assert {moment for _, moment, _ in found} == {100.0, 200.0, 300.0, 400.0, 500.0}
    assert {text for _, _, text in found} == {20.0, 21.0}
    # the other way round: latents joined to text, newer ones over older ones
    newer = write(tmp_path / "newer", info(text=None), offset=7.0)
    found = read(data([{"folders": [last], "join": [base, newer]}]), steps=4)
    assert {moment % 100 for _, moment, _ in found} == {7.0}
    assert {text for _, _, text in found} == {0.0}
    with pytest.raises(UserError, match="last holds text states alone; name the folder of the latents"):
        batches(data([last]))


def test_without_text_states_there_is_one_zero(tmp_path: Path) -> None:
    (batch,) = batches(data([write(tmp_path, info(text=None))]), steps=1)
    assert torch.equal(batch.text_BLD, torch.zeros(4, 1, 1))
    assert batch.text_mask_BL.all()


def test_a_sample_without_a_caption_trains_without_text(tmp_path: Path) -> None:
    found = read(data([write(tmp_path, info(), captions=(0,))]))
    assert {text for _, _, text in found} == {UNCONDITIONAL}


def several_sizes(**changes: Any) -> LatentSetInfo:
    shapes = ((1, 1, 4, 4), (1, 2, 4, 4))
    return info(clip=ClipConfig.model_validate({"buckets": [SMALL, LARGE]}), shapes=shapes, **changes)


def test_buckets_are_trained_by_what_was_encoded(tmp_path: Path) -> None:
    folder = write(tmp_path / "mixed", several_sizes(), samples=12, images=(1, 4, 5, 9))
    config = data([folder], {"clip": {"buckets": [LARGE, SMALL]}})
    found = [(len(one), one.moments_BCTHW.shape[2], one.moments_BCTHW[:, 0, 0, 0, 0]) for one in batches(config, 4)]
    assert sorted((size, frames) for size, frames, _ in found) == [(2, 1), (2, 1), (4, 2), (4, 2)]
    numbers = torch.cat([values for _, frames, values in found if frames == 1]).div(100).tolist()
    assert sorted(numbers) == [1, 4, 5, 9]
    held_out = build_validation_loader(config, [folder], seed=1, samples=20, micro=1, world=1, rank=0)
    assert held_out.samples == 8  # of the first size alone
    with pytest.raises(UserError, match=r"several sizes \(1x16x16, 8x16x16\): name them .* data\.video\.clip\.buckets"):
        batches(data([folder]))
    with pytest.raises(UserError, match=r"holds no latents of clips of 4x16x16, but of 1x16x16, 8x16x16"):
        batches(data([folder], {"clip": {"frames": 4, "height": 16, "width": 16}}))


def test_sizes_in_folders_of_their_own_are_buckets_together(tmp_path: Path) -> None:
    images = info(clip=CLIP.model_copy(update={"frames": 1}), shapes=((1, 1, 4, 4),))
    videos = write(tmp_path / "videos", info())
    pictures = write(tmp_path / "pictures", images, samples=4, images=range(4))
    sets = [{"folders": [videos], "weight": 2}, {"folders": [pictures], "weight": 1}]
    found = batches(data(sets, {"clip": {"buckets": [SMALL, LARGE]}}), steps=20)
    assert {(len(one), one.moments_BCTHW.shape[2]) for one in found} == {(2, 1), (4, 2)}
    assert batches(data([pictures]), steps=1)[0].moments_BCTHW.shape == (4, 2, 1, 4, 4)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"vae": VAE.model_copy(update={"sha256": "ef"})}, "vae.sha256: ab, not ef"),
        ({"text": TEXT.model_copy(update={"max_length": 5})}, "text.max_length: 4, not 5"),
        ({"text": None}, "text: given, not none"),
        ({"clip": CLIP.model_copy(update={"start": "first"})}, "clip.start: random, not first"),
    ],
)
def test_sets_that_disagree_are_refused_by_the_field(changes: dict[str, Any], difference: str, tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", info()), write(tmp_path / "b", info(**changes))
    for shards in ([one, two], [ShardSet(folders=(one,)), ShardSet(folders=(two,))]):
        with pytest.raises(UserError, match=rf"/a and .*/b cannot be trained on together: .* differs in {difference}"):
            batches(data(shards))


def test_sets_may_differ_in_precision_number_of_clips_and_scale(tmp_path: Path) -> None:
    one = write(tmp_path / "a", info())
    two = write(tmp_path / "b", info(clips=2, dtype="bf16", seed=5, scale=(2.0,)), clips=2)
    assert len(batches(data([one, two]))) == 2
    with pytest.raises(UserError, match=r"scale and shift of .*/a are 1\.0 and 0\.0, those of .*/b \(2\.0,\) and 0\.0"):
        scaling_of(open_latent_sets([one, two]))


def test_a_clip_of_another_size_than_its_bucket_is_bad(tmp_path: Path) -> None:
    folder = write(tmp_path, info(), samples=8, images=(3,))
    (batch,) = batches(data([folder]), steps=1, batch=8)
    (bad,) = batch.replaced
    assert bad.key == "0003"
    assert "moments of shape [2, 1, 4, 4] instead of [2, 2, 4, 4]" in bad.reason
