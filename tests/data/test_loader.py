from __future__ import annotations

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvdm.config import ClipConfig, DataConfig, LatentSource, VideoSource
from lvdm.data.batch import LatentBatch, Replacement, VideoBatch
from lvdm.data.decode import decode_frames
from lvdm.data.fetch import Fetcher
from lvdm.data.index import SampleRecord
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
from lvdm.data.loader import (
    VideoDataset,
    build_loader,
    build_validation_loader,
)
from lvdm.data.samples import VideoSample
from lvdm.data.workers import WorkerDied, read_all
from lvdm.data.writer import ShardSample
from lvdm.errors import Requeue, UserError
from tests.data.conftest import SAMPLES, write_set

SEED, BATCH = 2**40 + 5, 4
CLIP = ClipConfig(frames=8, height=16, width=16, flip=0.5)

LATENTS = LatentSetInfo(
    vae=LatentVAE(kind="lvdm", name="somewhere", sha256="ab"),
    text=LatentText(name="encoder", sha256="cd", max_length=8, dim=3, mask_padding=True),
    scale=1.0,
    shift=0.0,
    clip=CLIP,
    dtype="fp32",
    shapes=((2, 2, 4, 4),),
    samples=SAMPLES,
    lvdm_version="0",
)


def video_data(folder: str, workers: int = 0, **changes: object) -> DataConfig:
    source = VideoSource(shards=[folder], clip=CLIP)
    return DataConfig.model_validate(
        {"kind": "video", "video": source, "workers": workers, "text_dropout": 0.3} | changes
    )


def latent_data(folder: str, workers: int = 0) -> DataConfig:
    return DataConfig(kind="latents", latents=LatentSource(shards=[folder]), workers=workers, text_dropout=0.3)


def encoded(moments_CTHW: torch.Tensor, states_LD: torch.Tensor) -> dict[str, bytes]:
    """The members of a sample of one clip and one caption."""
    return {text_member(0, 0): pack_text(states_LD, "fp32"), latent_member(0): pack_latent(moments_CTHW, "fp32")}


@pytest.fixture(scope="module")
def latent_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("latents")
    draws = torch.Generator().manual_seed(0)
    samples = [
        ShardSample(
            f"{number:06d}",
            encoded(torch.randn(4, 2, 4, 4, generator=draws), torch.randn(1 + number % 8, 3, generator=draws)),
        )
        for number in range(SAMPLES)
    ]
    write_set(folder, samples)
    write_latent_set(str(folder), LATENTS, torch.full((2, 3), 9.0))
    return str(folder)


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def contents(batches: Iterable[VideoBatch | LatentBatch]) -> list[tuple[int, str, str]]:
    """Position, pixels or moments, and text of every sample, in the order of the batches."""
    found = []
    for batch in batches:
        for row, position in enumerate(batch.positions):
            if isinstance(batch, VideoBatch):
                found.append((position, digest(batch.frames_BCTHW[row]), batch.captions[row]))
            else:
                text_LD = batch.text_BLD[row][batch.text_mask_BL[row]]
                found.append((position, digest(batch.moments_BCTHW[row]), digest(text_LD)))
    return found


def run(
    data: DataConfig, *, world: int = 1, micro: int = 1, start: int = 0, steps: int = 6
) -> list[tuple[int, str, str]]:
    """The samples of all ranks for some steps, by position."""
    return sorted(
        itertools.chain.from_iterable(
            contents(
                build_loader(
                    data,
                    seed=SEED,
                    batch=BATCH,
                    micro=micro,
                    world=world,
                    rank=rank,
                    first_step=start,
                    steps=steps - start,
                )
            )
            for rank in range(world)
        )
    )


@pytest.mark.parametrize("kind", ["video", "latents"])
def test_ranks_workers_and_resuming_change_nothing(kind: str, shards: str, latent_shards: str) -> None:
    folder, make = (shards, video_data) if kind == "video" else (latent_shards, latent_data)
    whole = run(make(folder))
    assert [position for position, _, _ in whole] == list(range(24))
    for world, workers, micro in [(1, 2, 4), (2, 0, 1), (2, 2, 2), (4, 0, 1), (4, 2, 1)]:
        assert run(make(folder, workers), world=world, micro=micro) == whole, (world, workers, micro)
    for world, workers in [(1, 0), (2, 2), (4, 0)]:
        assert run(make(folder, workers), world=world, start=3) == whole[12:], (world, workers)


def test_batches_come_in_the_order_of_the_steps(shards: str) -> None:
    loader = build_loader(
        video_data(shards, workers=2), seed=0, batch=8, micro=2, world=2, rank=1, first_step=5, steps=2
    )
    assert len(loader) == 4
    assert [batch.positions for batch in loader] == [[41, 43], [45, 47], [49, 51], [53, 55]]
    assert [len(batch) for batch in loader] == [2, 2, 2, 2]


def test_a_run_can_go_on_with_another_batch_size(shards: str) -> None:
    data = video_data(shards)
    whole = run(data)
    before = build_loader(data, seed=SEED, batch=BATCH, micro=1, world=1, rank=0, steps=2)
    assert before.course is not None
    rest = build_loader(
        data, seed=SEED, batch=6, micro=3, world=1, rank=0, first_step=2, steps=2, state=before.course.state
    )
    assert contents(rest) == whole[8:20]
    assert rest.course is not None
    assert "the mixing of the data changed (batches) and is new from step 2 on" in rest.course.notes[0]
    later = build_loader(
        data, seed=SEED, batch=6, micro=1, world=2, rank=1, first_step=3, steps=1, state=rest.course.state
    )
    assert contents(later) == whole[15:20:2]


def test_every_epoch_has_each_sample_once(shards: str) -> None:
    data = video_data(shards, text_dropout=0.0)
    captions = [caption for _, _, caption in run(data, steps=12)]
    first, second = captions[:SAMPLES], captions[SAMPLES : 2 * SAMPLES]
    assert len(set(first)) == SAMPLES
    assert sorted(first) == sorted(second)
    assert first != second


def test_samples_are_the_clips_of_the_shards(shards: str, samples: list[ShardSample]) -> None:
    clip = CLIP.model_copy(update={"flip": 0.0, "start": "center"})
    data = video_data(shards, shuffle=False, text_dropout=0.0, video=VideoSource(shards=[shards], clip=clip))
    batch = next(iter(build_loader(data, seed=1, batch=3, micro=3, world=1, rank=0, steps=1)))
    assert isinstance(batch, VideoBatch)
    assert batch.frames_BCTHW.shape == (3, 3, 8, 16, 16)
    for row in range(3):
        expected_THWC = decode_frames(samples[row].members["mp4"], range(3, 11), 16, 16)
        np.testing.assert_array_equal(batch.frames_BCTHW[row].permute(1, 2, 3, 0).numpy(), expected_THWC)
        assert batch.captions[row] == samples[row].meta["caption"]


def test_draws_vary_starts_flips_and_dropped_text(shards: str) -> None:
    once = run(video_data(shards), steps=23)
    again = [digest_ for _, digest_, _ in once]
    assert len(set(again)) > SAMPLES * 2  # four epochs of other starts and flips
    dropped = sum(caption == "" for _, _, caption in once)
    assert 0.1 < dropped / len(once) < 0.5


def test_text_is_padded_and_dropped_text_is_the_unconditional(latent_shards: str) -> None:
    loader = build_loader(latent_data(latent_shards), seed=SEED, batch=23, micro=23, world=1, rank=0, steps=1)
    batch = next(iter(loader))
    assert isinstance(batch, LatentBatch)
    assert batch.moments_BCTHW.shape == (23, 4, 2, 4, 4)
    assert batch.text_BLD.shape == (23, 8, 3)
    assert (batch.text_BLD[~batch.text_mask_BL] == 0).all()
    dropped = [row for row in range(23) if (batch.text_BLD[row, 0] == 9).all()]
    assert 2 <= len(dropped) <= 14
    assert all(batch.text_mask_BL[row].sum() == 2 for row in dropped)


def test_validation_is_fixed_and_even(shards: str, samples: list[ShardSample]) -> None:
    data = video_data(shards)
    parts = [build_validation_loader(data, [shards], seed=1, samples=15, micro=2, world=3, rank=r) for r in range(3)]
    assert [(len(part), part.samples) for part in parts] == [(2, 12)] * 3  # the other 3 fill no micro-batch of all
    found = sorted(itertools.chain.from_iterable(map(contents, parts)))
    assert [position for position, _, _ in found] == list(range(12))
    assert [caption for _, _, caption in found] == [sample.meta["caption"] for sample in samples[:12]]
    alone = build_validation_loader(data, [shards], seed=99, samples=10, micro=5, world=1, rank=0)
    assert contents(alone) == contents(alone) == found[:10]
    assert build_validation_loader(data, [shards], seed=1, samples=99, micro=1, world=1, rank=0).samples == SAMPLES


def told_to_be_short(samples: Iterable[ShardSample], short: Iterable[int]) -> list[ShardSample]:
    """The samples, some of which say that they have too few frames."""
    return [
        ShardSample(s.key, s.members, {**s.meta, "frames": 7 if number in short else 14})
        for number, s in enumerate(samples)
    ]


def test_validation_counts_the_samples_that_are_long_enough(samples: list[ShardSample], tmp_path: Path) -> None:
    folder = write_set(tmp_path, told_to_be_short(samples[:9], {0, 3, 4}))
    loader = build_validation_loader(video_data(folder), [folder], seed=1, samples=9, micro=2, world=1, rank=0)
    assert (len(loader), loader.samples) == (3, 6)
    assert [caption for _, _, caption in contents(loader)] == [samples[i].meta["caption"] for i in (1, 2, 5, 6, 7, 8)]
    with pytest.raises(UserError, match=r"validation has 6 samples, fewer than batch\.micro x ranks = 8"):
        build_validation_loader(video_data(folder), [folder], seed=1, samples=9, micro=4, world=2, rank=1)
    long = VideoSource(shards=[folder], clip=ClipConfig(frames=15, height=16, width=16))
    with pytest.raises(UserError, match=r"no samples are left of the 9 .*: 9 by too short"):
        build_validation_loader(video_data(folder, video=long), [folder], seed=1, samples=9, micro=1, world=1, rank=0)


def test_clips_choose_nothing_among_latents(tmp_path: Path) -> None:
    members = encoded(torch.zeros(4, 2, 4, 4), torch.zeros(1, 3))
    folder = write_set(tmp_path, [ShardSample(f"{i}", members, {"frames": 7}) for i in range(4)])
    write_latent_set(folder, LATENTS, torch.zeros(1, 3))
    data = latent_data(folder).model_copy(update={"video": VideoSource(shards=["nowhere"], clip=CLIP)})
    assert build_validation_loader(data, [folder], seed=1, samples=4, micro=2, world=2, rank=0).samples == 4


def truncated(video: bytes) -> dict[str, bytes]:
    return {"mp4": video[: len(video) // 2], "txt": b"cut off"}


def garbage(video: bytes) -> dict[str, bytes]:
    return {"mp4": b"\0" * len(video), "txt": b"garbage"}


def missing(video: bytes) -> dict[str, bytes]:
    return {"txt": b"no video"}


@pytest.mark.parametrize("spoil", [truncated, garbage, missing])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_clip_is_replaced_counted_and_listed(
    spoil: Callable[[bytes], dict[str, bytes]], workers: int, samples: list[ShardSample], tmp_path: Path
) -> None:
    bad = {4, 11, 20}
    mixed = [
        ShardSample(s.key, spoil(s.members["mp4"]), s.meta) if number in bad else s for number, s in enumerate(samples)
    ]
    folder = write_set(tmp_path, mixed)
    data = video_data(folder, workers, text_dropout=0.0)
    batches = [
        batch
        for rank in range(2)
        for batch in build_loader(data, seed=7, batch=2, micro=1, world=2, rank=rank, steps=23)
    ]
    assert sorted(position for batch in batches for position in batch.positions) == list(range(46))
    first_epoch = [entry for batch in batches for entry in batch.replaced if entry.position < 23]
    listed = {entry.key for entry in first_epoch}
    assert listed == {samples[number].key for number in bad}
    shard_of = {samples[number].key: f"{folder}/{number // 9:05d}.tar" for number in bad}
    for batch in batches:
        for entry in batch.replaced:
            assert entry.position in batch.positions
            assert entry.shard == shard_of[entry.key]
            assert entry.reason
    shown = {caption for batch in batches if isinstance(batch, VideoBatch) for caption in batch.captions}
    assert shown == {samples[number].meta["caption"] for number in range(23) if number not in bad}
    again = build_loader(data, seed=7, batch=2, micro=2, world=1, rank=0, steps=23)
    assert sorted(contents(again)) == sorted(contents(batches))


def test_a_set_of_bad_clips_alone_ends_with_one_line(tmp_path: Path) -> None:
    folder = write_set(tmp_path, [ShardSample(f"{i}", {"mp4": b"junk"}, {}) for i in range(3)])
    for workers in (0, 1):
        with pytest.raises(
            UserError, match=r"^position 0: the sample and 16 substitutes for it are bad; .*junk|^position 0"
        ):
            run(video_data(folder, workers))


def test_a_shard_that_vanishes_ends_with_one_line(samples: list[ShardSample], tmp_path: Path) -> None:
    folder = write_set(tmp_path, samples[:9])
    for workers in (0, 1):
        loader = build_loader(video_data(folder, workers), seed=0, batch=1, micro=1, world=1, rank=0, steps=3)
        (tmp_path / "00000.tar").rename(tmp_path / "gone")
        with pytest.raises(UserError, match=r"^cannot read .*00000\.tar: FileNotFoundError"):
            list(loader)
        (tmp_path / "gone").rename(tmp_path / "00000.tar")


def test_a_shard_that_shrinks_is_not_a_bad_sample(
    samples: list[ShardSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lvdm.storage.FIRST_PAUSE", 0.001)
    folder = write_set(tmp_path, samples[:9])
    loader = build_loader(video_data(folder), seed=0, batch=9, micro=9, world=1, rank=0, steps=1)
    with open(tmp_path / "00000.tar", "r+b") as stream:
        stream.truncate(3000)
    with pytest.raises(Requeue, match="bytes came instead of"):
        list(loader)


def test_bad_latents_are_replaced(latent_shards: str, tmp_path: Path) -> None:
    def latent(number: int, moments: torch.Tensor) -> ShardSample:
        return ShardSample(f"{number}", encoded(moments, torch.zeros(1, 3)))

    fine = torch.zeros(4, 2, 4, 4)
    broken = {
        "finite": torch.full_like(fine, float("nan")),
        "exceeds": fine + 2e3,
        "shape": torch.zeros(4, 2, 4, 5),
    }
    samples = [latent(0, fine), latent(1, fine), *(latent(2 + i, m) for i, m in enumerate(broken.values()))]
    samples.append(ShardSample("5", {text_member(0, 0): b"junk", latent_member(0): b"junk"}))
    samples.append(ShardSample("6", {"txt": b"alone"}))
    folder = write_set(tmp_path, samples)
    write_latent_set(folder, LATENTS, torch.zeros(1, 3))
    loader = build_loader(latent_data(folder), seed=1, batch=7, micro=7, world=1, rank=0, steps=1)
    reasons = {entry.key: entry.reason for batch in loader for entry in batch.replaced}
    assert set(reasons) == {"2", "3", "4", "5", "6"}
    for key, text in zip("23456", [*broken, "safetensors", "no .latent.safetensors member"], strict=True):
        assert text in reasons[key]


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


def test_a_sample_that_is_too_large_is_bad_before_it_is_fetched(
    samples: list[ShardSample], fetched: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = list(samples[:9])
    mixed[4] = ShardSample(mixed[4].key, {**mixed[4].members, "wav": bytes(1 << 20)}, mixed[4].meta)
    folder = write_set(tmp_path, mixed)
    monkeypatch.setattr("lvdm.data.decode.MAX_BYTES", 1 << 20)
    loader = build_loader(video_data(folder), seed=1, batch=9, micro=9, world=1, rank=0, steps=1)
    (batch,) = loader
    (bad,) = batch.replaced
    assert bad.key == mixed[4].key
    assert bad.reason.endswith("bytes exceed the limit of 1048576")
    assert sorted(fetched[0]) == [s.key for s in mixed if s is not mixed[4]]
    assert all(mixed[4].key not in keys for keys in fetched)


def test_reading_draws_nothing_from_the_global_generator(shards: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(video_data(shards), steps=1)
    run(video_data(shards, workers=1), steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_errors_come_before_any_batch(shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of shards"):
        run(video_data(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="not divisible by 3 ranks"):
        build_loader(video_data(shards), seed=0, batch=4, micro=1, world=3, rank=0, steps=1)


def test_a_batch_moves_to_a_device(shards: str) -> None:
    batch = next(iter(build_loader(video_data(shards), seed=0, batch=1, micro=1, world=1, rank=0, steps=1)))
    assert isinstance(batch, VideoBatch)
    moved = batch.to("meta")
    assert moved.frames_BCTHW.device.type == "meta"
    assert moved.captions == batch.captions


class Deadly(VideoDataset):
    """Kills the process that decodes one of its clips."""

    deadly = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.deadly = type(self).deadly  # of the instance, to travel to the workers with it

    def load(
        self, members: dict[str, bytes], bucket: int, position: int, replaced: tuple[Replacement, ...]
    ) -> VideoSample:
        if members["txt"].decode() == self.deadly and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(members, bucket, position, replaced)


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch looks for dead workers more often than every 5 s."""
    look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.1,))


@pytest.mark.usefixtures("watchful")
def test_a_clip_that_kills_its_worker_twice_is_bad_and_the_sequence_goes_on(
    shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = video_data(shards, text_dropout=0.0)
    whole = run(data)
    monkeypatch.setattr("lvdm.data.loader.VideoDataset", Deadly)
    monkeypatch.setattr(Deadly, "deadly", whole[9][2])
    loader = build_loader(
        video_data(shards, workers=2, text_dropout=0.0), seed=SEED, batch=BATCH, micro=2, world=1, rank=0, steps=6
    )
    batches = []
    for batch in loader:
        batches.append(batch)
        if batch.replaced:
            assert not multiprocessing.active_children()  # those that were left have been ended
    replaced = [entry for batch in batches for entry in batch.replaced]
    assert [(entry.position, entry.reason) for entry in replaced] == [(9, "killed two workers that read it")]
    found = contents(batches)
    assert found[:9] + found[10:] == whole[:9] + whole[10:]
    assert found[9] != whole[9]


class Heavy(VideoDataset):
    """Kills the process that reads more than one clip at once."""

    def __getitems__(self, items: Any) -> Any:
        if len(items) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(items)


class Murderous(VideoDataset):
    """Kills whatever process decodes one of its clips."""

    def load(self, *args: Any) -> VideoSample:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().load(*args)


@pytest.mark.usefixtures("watchful")
@pytest.mark.parametrize("kind", [Heavy, Murderous])
def test_deaths_that_no_one_sample_explains_stop_the_run(
    kind: type[VideoDataset], shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lvdm.data.loader.VideoDataset", kind)
    loader = build_loader(video_data(shards, workers=1), seed=1, batch=2, micro=2, world=1, rank=0, steps=1)
    with pytest.raises(Requeue, match=r"died of the micro-batch with position 0, position 1 .*fewer data\.workers"):
        list(loader)


class Failing(VideoDataset):
    """Meets a full disk."""

    def load(self, *args: Any) -> VideoSample:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_of_a_living_worker_blames_no_sample(
    workers: int, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lvdm.data.loader.VideoDataset", Failing)
    loader = build_loader(video_data(shards, workers), seed=1, batch=1, micro=1, world=1, rank=0, steps=1)
    with pytest.raises(Requeue, match=r"^reading samples failed: .*No space left on device"):
        list(loader)


class Handover:
    """A loader whose worker is read from in vain."""

    num_workers = 1

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Any]:
        raise self.error
        yield


@pytest.mark.parametrize(
    ("error", "outcome", "message"),
    [
        (EOFError(), WorkerDied, "EOFError"),
        (ConnectionResetError(104, "reset"), WorkerDied, "reset"),
        (FileNotFoundError(2, "no socket"), WorkerDied, "no socket"),
        (OSError("got end of file during message"), WorkerDied, "end of file"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), WorkerDied, "pid 7"),
        (OSError(12, "Cannot allocate memory"), Requeue, "Cannot allocate memory"),
        (OSError(), WorkerDied, "OSError"),
        (EOFError("Caught EOFError in DataLoader worker process 0."), EOFError, "Caught"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), RuntimeError, "Caught"),
        (ConnectionError("Caught ConnectionError in DataLoader worker process 0.\nC: x\n"), Requeue, "C: x$"),
    ],
)
def test_what_waiting_for_a_worker_may_raise(error: Exception, outcome: type[Exception], message: str) -> None:
    loader: Any = Handover(error)
    with pytest.raises(outcome, match=message):
        next(read_all(loader))


def test_the_memory_of_workers_stays_flat_over_ten_thousand_clips(shards: str) -> None:
    source = VideoSource(shards=[shards], clip=ClipConfig(frames=2, height=8, width=8))
    data = video_data(shards, workers=2, video=source)
    loader = build_loader(data, seed=SEED, batch=50, micro=50, world=1, rank=0, steps=200)
    early = 0
    for number, _ in enumerate(loader):
        if number == 40:
            early = workers_memory()
    late = workers_memory()
    assert early > 0
    assert late - early < 10 << 20, f"{early >> 20} MiB after 2,000 clips, {late >> 20} MiB after 10,000"


def workers_memory() -> int:
    """Bytes of their own that the descendants of this process hold."""
    parents: dict[int, tuple[int, int]] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            parents[int(status.parent.name)] = (
                int(fields["PPid"]),
                int(fields.get("RssAnon", "0 kB").split()[0]) << 10,
            )
    mine = {os.getpid()}
    while grown := {pid for pid, (parent, _) in parents.items() if parent in mine} - mine:
        mine |= grown
    return sum(parents[pid][1] for pid in mine - {os.getpid()})
