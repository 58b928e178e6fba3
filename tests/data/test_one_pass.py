from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lvdm.config import Bucket, ClipConfig, DataConfig, ShardSet, VideoSource
from lvdm.data.decode import decode_frames
from lvdm.data.encode import encode_mp4
from lvdm.data.fetch import Fetcher
from lvdm.data.index import SampleRecord
from lvdm.data.one_pass import OnePassDataset, SourceSample
from lvdm.data.samples import load_clip
from lvdm.data.sources import open_sources
from lvdm.data.transforms import clip_draws
from lvdm.data.workers import read_plan
from lvdm.data.writer import ShardSample
from lvdm.errors import Requeue, UserError
from lvdm.randomness import seed_from_text
from tests.data.conftest import write_set

SEED = 2**40 + 5
CLIP = ClipConfig(frames=8, height=16, width=16, flip=0.5)
RANDOM = ClipConfig(frames=3, height=16, width=12, resize="random_crop", flip=0.5)


def one_pass(
    folder: str,
    clip: ClipConfig = CLIP,
    *,
    captions: dict[str, float] | None = None,
    join: tuple[str, ...] = (),
    kind: Any = OnePassDataset,
    **how: Any,
) -> Any:
    video = VideoSource(shards=(folder,), clip=clip, captions=captions or {})
    (source,) = open_sources([ShardSet(folders=(folder,), join=join)], clip.sizes)
    return kind(source, video, Fetcher(), seed=SEED, **how)


def read(dataset: OnePassDataset, rows: Sequence[int], batch: int = 4, workers: int = 0) -> list[SourceSample]:
    """The samples of rows of the first bucket."""
    items = [(0, row) for row in rows]
    plan = [items[i : i + batch] for i in range(0, len(items), batch)]
    data = DataConfig(kind="video", video=VideoSource(shards=("unused",)), workers=workers)
    return [sample for samples in read_plan(data, dataset, plan) for sample in samples]


def pixels(sample: SourceSample) -> np.ndarray:
    assert sample.fault == ""
    assert sample.clips_NTHWC is not None
    return sample.clips_NTHWC.numpy()


def told(sample: SourceSample, name: str) -> list[Any]:
    """What is told of each clip under a name."""
    return [clip[name] for clip in sample.about["clips"]]


def png(frame_HWC: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame_HWC).save(stream, "PNG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_come_in_the_order_of_the_plan_and_bad_ones_say_why(
    workers: int, samples: list[ShardSample], tmp_path: Path
) -> None:
    mixed = [*samples[:3], ShardSample("bad", {"mp4": b"junk", "txt": b"x"}), *samples[4:9]]
    found = read(one_pass(write_set(tmp_path, mixed)), [5, 3, 1, 8], batch=2, workers=workers)
    assert [(one.row, one.bucket, one.shard, one.key) for one in found] == [
        (row, 0, "00000.tar", mixed[row].key) for row in (5, 3, 1, 8)
    ]
    assert [bool(one.fault) for one in found] == [False, True, False, False]
    bad = found.pop(1)
    assert "not decodable" in bad.fault
    assert bad.clips_NTHWC is None
    for one in found:
        assert pixels(one).shape == (1, 8, 16, 16, 3)
        assert one.captions == ((samples[one.row].meta["caption"],),)
        assert one.meta == samples[one.row].meta  # without key, status and error_message
        json.dumps(one.about, allow_nan=False)


def test_a_micro_batch_may_be_empty(shards: str) -> None:
    data = DataConfig(kind="video", video=VideoSource(shards=("unused",)), workers=1)
    assert [len(batch) for batch in read_plan(data, one_pass(shards), [[], [(0, 3)], []])] == [0, 1, 0]


def test_one_clip_is_the_one_that_training_cuts(samples: list[ShardSample], shards: str) -> None:
    for clip in (CLIP, RANDOM, RANDOM.model_copy(update={"start": "center"}), ClipConfig(frames=3, height=8, fps=4)):
        for one in read(one_pass(shards, clip), [0, 9, 22]):
            position = seed_from_text(f"{one.shard}/{samples[one.row].key}")
            expected = load_clip(samples[one.row].members, clip, position, seed=SEED, text_dropout=0.0)
            np.testing.assert_array_equal(pixels(one), expected.frames_THWC[None])
            draws = clip_draws(SEED, position)
            assert told(one, "flipped") == [draws.flip < clip.flip]


@pytest.mark.parametrize("clip", [RANDOM, RANDOM.model_copy(update={"fps": 4.0, "resize": "pad"})])
def test_random_clips_are_cut_each_for_itself(clip: ClipConfig, samples: list[ShardSample], shards: str) -> None:
    for one in read(one_pass(shards, clip, clips=5), range(3)):
        assert len(pixels(one)) == 5
        for number, frames_THWC in enumerate(pixels(one)):
            name = f"{one.shard}/{one.key}" + (f"/{number}" if number else "")
            alone = load_clip(samples[one.row].members, clip, seed_from_text(name), seed=SEED, text_dropout=0.0)
            np.testing.assert_array_equal(frames_THWC, alone.frames_THWC)
        assert len({tuple(span) for span in told(one, "frames")}) > 1
        assert (len({tuple(crop) for crop in told(one, "crop")}) > 1) == (clip.resize == "random_crop")


@pytest.mark.parametrize(
    ("start", "clips", "firsts"),
    [("first", 3, [0, 4, 8]), ("first", 9, [0, 4, 8]), ("center", 2, [3, 7]), ("center", 9, [1, 5, 9])],
)
def test_clips_one_behind_the_other(
    start: Any, clips: int, firsts: list[int], samples: list[ShardSample], shards: str
) -> None:
    clip = ClipConfig(frames=2, stride=2, height=16, width=16, start=start)
    (one,) = read(one_pass(shards, clip, clips=clips), [4])  # of 14 frames
    assert told(one, "frames") == [[first, first + 2] for first in firsts]
    assert told(one, "seconds") == [[first / 8, (first + 2) / 8] for first in firsts]
    for first, frames_THWC in zip(firsts, pixels(one), strict=True):
        expected = decode_frames(samples[4].members["mp4"], [first, first + 2], 16, 16)
        np.testing.assert_array_equal(frames_THWC, expected)


def test_what_is_cut_out_of_a_shard_is_its_own_affair(samples: list[ShardSample], shards: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path, samples[:9])
    alone, among_others = (read(one_pass(where, RANDOM, clips=2), range(9)) for where in (folder, shards))
    for one, other in zip(alone, among_others, strict=True):
        np.testing.assert_array_equal(pixels(one), pixels(other))
        assert dataclasses.replace(one, clips_NTHWC=None) == dataclasses.replace(other, clips_NTHWC=None)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The keys of the samples that this process fetches at once."""
    calls: list[list[str]] = []
    fetch = Fetcher.samples

    def spy(self: Fetcher, records: list[SampleRecord]) -> list[dict[str, bytes]]:
        calls.append([record.key for record in records])
        return fetch(self, records)

    monkeypatch.setattr(Fetcher, "samples", spy)
    return calls


def test_a_micro_batch_is_fetched_at_once_and_what_is_too_large_not_at_all(
    samples: list[ShardSample], fetched: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = list(samples[:9])
    mixed[4] = ShardSample(mixed[4].key, {**mixed[4].members, "wav": bytes(1 << 20)}, mixed[4].meta)
    dataset = one_pass(write_set(tmp_path, mixed))
    monkeypatch.setattr("lvdm.data.decode.MAX_BYTES", 1 << 20)
    found = read(dataset, range(9), batch=9)
    assert [one.row for one in found if one.fault] == [4]
    assert found[4].fault.endswith("bytes exceed the limit of 1048576")
    assert fetched == [[sample.key for sample in mixed if sample is not mixed[4]]]
    assert pixels(found[5]).shape == (1, 8, 16, 16, 3)


class Deadly(OnePassDataset):
    """Kills the process that reads one of its samples."""

    deadly = ""

    def _loaded(self, sample: SourceSample, members: dict[str, bytes]) -> SourceSample:
        if sample.key == self.deadly and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._loaded(sample, members)


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch looks for dead workers more often than every 5 s."""
    look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.1,))


@pytest.mark.usefixtures("watchful")
def test_a_sample_that_kills_its_worker_twice_is_bad_and_the_others_are_not(shards: str) -> None:
    dataset = one_pass(shards, kind=Deadly)
    whole = read(dataset, range(9), batch=3)
    dataset.deadly = whole[4].key
    found = read(dataset, range(9), batch=3, workers=2)
    assert [(one.row, one.fault) for one in found if one.fault] == [(4, "killed two workers that read it")]
    for row in (0, 3, 5, 8):
        np.testing.assert_array_equal(pixels(found[row]), pixels(whole[row]))


@pytest.mark.usefixtures("watchful")
def test_deaths_that_no_one_sample_explains_name_the_samples(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = one_pass(shards, kind=Heavy)
    with pytest.raises(Requeue, match=rf"died of the micro-batch with sample 0+1 of {shards}/00000\.tar, sample"):
        read(dataset, [1, 2], workers=1)


class Heavy(OnePassDataset):
    """Kills the process that reads more than one sample at once."""

    def __getitems__(self, items: Any) -> Any:
        if len(items) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(items)


def test_a_shard_that_vanishes_is_told_in_one_line(samples: list[ShardSample], tmp_path: Path) -> None:
    dataset = one_pass(write_set(tmp_path, samples[:9]))
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"^cannot read .*00000\.tar: FileNotFoundError"):
        read(dataset, range(3))


def test_a_batch_of_many_samples_takes_few_file_descriptors(shards: str) -> None:
    dataset = one_pass(shards, ClipConfig(frames=1, height=8, width=8))
    before = len(os.listdir("/proc/self/fd"))
    found = read(dataset, [0, 1] * 50, batch=50, workers=1)
    assert len({one.row for one in found}) == 2
    assert len(os.listdir("/proc/self/fd")) - before < 20
    assert pixels(found[98]).tolist() == pixels(found[0]).tolist() != pixels(found[1]).tolist()


def test_images_and_folders_of_frames(tmp_path: Path) -> None:
    frames_THWC = np.random.default_rng(0).integers(0, 255, (6, 16, 24, 3), dtype=np.uint8)
    numbered = {f"{number:04d}.png": png(frame) for number, frame in enumerate(frames_THWC)}
    mixed = [
        ShardSample("a", numbered, {"fps": 4}),
        ShardSample("b", numbered),
        ShardSample("c", {"png": png(frames_THWC[2])}),
    ]
    folder = write_set(tmp_path, mixed)
    clip = ClipConfig(frames=2, stride=2, height=16, width=24, start="first")
    timed, untimed, short = read(one_pass(folder, clip, clips=3), range(3))
    for one in (timed, untimed):
        np.testing.assert_array_equal(pixels(one), frames_THWC[[[0, 2]]])  # 6 frames have one clip and a half
    assert timed.about["source"] == {"shard": "00000.tar", "width": 24, "height": 16, "frames": 6, "fps": 4}
    assert (told(timed, "seconds"), told(timed, "fps"), told(timed, "stride")) == ([[0.0, 0.5]], [2.0], [2])
    assert untimed.about["source"]["fps"] is None
    assert (told(untimed, "seconds"), told(untimed, "fps")) == ([None], [None])
    assert short.fault == "1 frames are too few: 2 frames 2 apart need 3"
    single = ClipConfig(frames=1, height=16, width=24, start="center")
    found = read(one_pass(folder, single, clips=2), range(3))
    np.testing.assert_array_equal(pixels(found[0]), frames_THWC[[[2], [3]]])
    np.testing.assert_array_equal(pixels(found[2]), frames_THWC[[[2]]])
    assert (told(found[2], "frames"), told(found[2], "stride"), told(found[2], "fps")) == ([[0, 0]], [None], [None])


def test_buckets_have_sizes_of_their_own(shards: str) -> None:
    buckets = tuple(Bucket(frames=frames, height=height, width=16, size=1) for frames, height in ((4, 16), (2, 8)))
    dataset = one_pass(shards, ClipConfig(buckets=buckets))
    found = dataset.collate(dataset.__getitems__([(1, 3), (0, 3), (0, 4)]))
    assert [(one.row, one.bucket, pixels(one).shape) for one in found] == [
        (3, 1, (1, 2, 8, 16, 3)),
        (3, 0, (1, 4, 16, 16, 3)),
        (4, 0, (1, 4, 16, 16, 3)),
    ]
    assert pixels(found[0]).any()


def test_all_captions_come_by_place(samples: list[ShardSample], tmp_path: Path) -> None:
    video = samples[0].members["mp4"]
    fields = {"long": ["one", " ", "two "], "caption": "short"}
    mixed = [ShardSample("a", {"mp4": video, "txt": b"file"}, fields), ShardSample("b", {"mp4": video})]
    folder = write_set(tmp_path, mixed)
    weights = {"long": 1.0, "caption": 0.0, "missing": 1.0, "txt": 2.0}
    assert [one.captions for one in read(one_pass(folder, captions=weights), [0, 1])] == [
        (("one", "two"), (), ("file",)),
        ((), (), ()),
    ]
    assert [one.captions for one in read(one_pass(folder), [0, 1])] == [(("file",),), ((),)]


@pytest.mark.parametrize("workers", [0, 1])
def test_for_captions_alone_no_other_byte_is_read(workers: int, samples: list[ShardSample], tmp_path: Path) -> None:
    spoiled = [ShardSample(one.key, {**one.members, "mp4": b"junk" * 50_000}, one.meta) for one in samples[:9]]
    folder = write_set(tmp_path / "videos", [*spoiled[:8], ShardSample(spoiled[8].key, {"mp4": b"x"})])
    added = [ShardSample(samples[3].key, {}, {"caption": "other", "new": 1.5})]
    side = write_set(tmp_path / "side", [*added, *(ShardSample(one.key, {}) for one in samples[4:6])])
    # a joined folder leaves the rows that it has too
    dataset = one_pass(folder, captions={"caption": 1.0}, join=(side,), frames=False)
    joined = read(dataset, [3, 4], workers=workers)
    assert joined[0].captions == (("other",),)
    assert joined[0].meta == {**samples[3].meta, "caption": "other", "new": 1.5}
    assert joined[1].captions == ((samples[4].meta["caption"],),)
    dataset = one_pass(folder, frames=False, clips=10**6)
    found = read(dataset, range(9), workers=workers)
    assert [one.captions for one in found[:8]] == [((one.meta["caption"],),) for one in samples[:8]]
    assert [one.meta for one in found[:8]] == [one.meta for one in samples[:8]]
    assert all(one.clips_NTHWC is None and not one.fault for one in found)
    assert found[2].about == {"source": {"shard": "00000.tar"}, "clips": []}
    members = [record.members for record in map(dataset.source.index.__getitem__, range(9))]
    texts = sum(one[name][1] for one in members for name in ("txt", "json") if name in one)
    if not workers:
        assert dataset.fetcher.read_bytes == texts < 10_000


def test_so_many_clips_that_they_fit_in_no_memory_are_refused_before_any_is_read(shards: str) -> None:
    buckets = tuple(Bucket(frames=frames, height=512, width=512, size=1) for frames in (1, 64))
    clip = ClipConfig(buckets=buckets)
    (source,) = open_sources([shards], ())
    video = VideoSource(shards=(shards,), clip=clip)
    assert OnePassDataset(source, video, Fetcher(), seed=SEED, clips=21).clips == 21
    with pytest.raises(UserError, match=r"^22 clips of 64x512x512 are 1107296256 bytes a video, more than the limit"):
        OnePassDataset(source, video, Fetcher(), seed=SEED, clips=22)


# a picture whose red tells the row and whose green tells the column of each pixel
RAMP = np.zeros((60, 100, 3), np.uint8)
RAMP[..., 0] = 4 * np.arange(60)[:, None]
RAMP[..., 1] = 2 * np.arange(100)


def assert_crop_is_what_is_seen(crop: Sequence[float], frame_HWC: np.ndarray, flipped: bool, atol: float = 0.6) -> None:
    """The pixels of the picture tell where they were in the source."""
    top, left, height, width = crop
    shown = frame_HWC[:, ::-1] if flipped else frame_HWC
    rows, columns = shown.shape[:2]
    inside = np.s_[2:-2]  # the outermost pixels are mixed with what is not there
    down = top + (np.arange(rows) + 0.5) * height / rows - 0.5
    across = left + (np.arange(columns) + 0.5) * width / columns - 0.5
    np.testing.assert_allclose(shown[rows // 2, inside, 1] / 2, across[inside], atol=atol)
    np.testing.assert_allclose(shown[inside, columns // 2, 0] / 4, down[inside], atol=atol)


@pytest.mark.parametrize(
    ("resize", "scaled"), [("crop", [40, 67]), ("random_crop", [40, 67]), ("squash", [40, 30]), ("pad", [18, 30])]
)
def test_what_is_told_of_the_crop_is_what_is_seen(resize: Any, scaled: list[int], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    mixed = [
        ShardSample("upright", {"png": png(RAMP)}),
        ShardSample("turned", {"png": png(np.rot90(RAMP).copy(), exif=exif)}),
    ]
    clip = ClipConfig(frames=1, height=40, width=30, resize=resize, flip=0.5)
    for one in read(one_pass(write_set(tmp_path, mixed), clip, clips=6), [0, 1]):
        source = one.about["source"]
        assert (source["height"], source["width"]) == (60, 100)
        assert told(one, "scaled") == [scaled] * 6
        assert set(told(one, "flipped")) == {False, True}
        if resize in ("pad", "squash"):
            assert told(one, "crop") == [[0, 0, 60, 100]] * 6
        else:
            assert len({crop[1] for crop in told(one, "crop")}) == (6 if resize == "random_crop" else 1)
        for crop, flipped, (frame_HWC,) in zip(told(one, "crop"), told(one, "flipped"), pixels(one), strict=True):
            seen = frame_HWC[11:29] if resize == "pad" else frame_HWC
            assert_crop_is_what_is_seen(crop, seen, flipped)
            if resize == "pad":
                assert not frame_HWC[:11].any()
                assert not frame_HWC[29:].any()


def turned_video(frames_THWC: np.ndarray, degrees: int) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as out:
        video = out.add_stream("libx264", rate=24, options={"crf": "0"})
        video.height, video.width, video.pix_fmt = *frames_THWC.shape[1:3], "yuv444p"
        video.set_display_rotation(degrees)
        for frame in frames_THWC:
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(video.encode())
    return stream.getvalue()


def test_what_is_told_of_a_turned_video_is_of_it_as_shown(tmp_path: Path) -> None:
    turned = turned_video(np.stack([np.rot90(RAMP)] * 30), -90)
    other = encode_mp4(np.stack([np.rot90(RAMP)] * 30), fps=12, crf=0)
    folder = write_set(tmp_path, [ShardSample("a", {"mp4": turned}), ShardSample("b", {"mp4": other})])
    clip = ClipConfig(frames=3, height=20, width=20, fps=6, start="center", resize="crop")
    upright, lying = read(one_pass(folder, clip, clips=1), [0, 1])
    assert upright.about["source"] == {"shard": "00000.tar", "width": 100, "height": 60, "frames": 30, "fps": 24.0}
    left = 6 * 100 / 33  # 100 columns become 33, of which 6 of 13 are cut off at the left
    assert told(upright, "crop") == [pytest.approx([0, left, 60, 20 * 100 / 33])]
    assert told(upright, "frames") == [[10, 18]]
    assert told(upright, "seconds") == [pytest.approx([10 / 24, 18 / 24])]
    assert (told(upright, "fps"), told(upright, "stride")) == ([6.0], [None])
    (crop,), (clip_THWC,) = told(upright, "crop"), pixels(upright)
    assert_crop_is_what_is_seen(crop, clip_THWC[0], flipped=False, atol=1.5)
    assert (lying.about["source"]["width"], lying.about["source"]["height"]) == (60, 100)
    assert told(lying, "crop") == [pytest.approx([6 * 100 / 33, 0, 20 * 100 / 33, 60])]
    assert told(lying, "seconds") == [pytest.approx([first / 12 for first in told(lying, "frames")[0]])]
