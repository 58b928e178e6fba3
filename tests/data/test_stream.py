from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lvdm import storage
from lvdm.config import ClipConfig, DataConfig, ShardSet, VideoSource
from lvdm.config.base import parse_config
from lvdm.data import stream
from lvdm.data.batch import VideoBatch
from lvdm.data.build_index import build_index
from lvdm.data.fetch import Fetcher
from lvdm.data.loader import Loader, build_loader
from lvdm.data.samples import VideoSample
from lvdm.data.stream import Feed, StreamDataset, StreamSample, StreamSet
from lvdm.data.writer import ShardSample, write_shard
from lvdm.errors import Requeue, UserError
from tests.data.conftest import SAMPLES, write_set
from tests.data.stores import web_server

BATCH = 4


def loaders(
    shards: Sequence[str | ShardSet],
    *,
    world: int = 1,
    start: int = 0,
    steps: int = 6,
    state: dict[str, Any] | None = None,
    batch: int = BATCH,
    micro: int = 1,
    seed: int = 5,
    **settings: Any,
) -> list[Loader]:
    """A loader for each rank."""
    source = VideoSource(shards=tuple(shards), clip=ClipConfig(frames=4, height=8, width=8))
    data = DataConfig(kind="stream", video=source, text_dropout=0.0, **{"workers": 0, **settings})
    how: dict[str, Any] = {"seed": seed, "batch": batch, "micro": micro, "world": world, "state": state}
    return [build_loader(data, rank=rank, first_step=start, steps=steps - start, **how) for rank in range(world)]


def read(folder: str, **how: Any) -> list[list[VideoBatch]]:
    """The batches of each rank."""
    return [list(loader) for loader in loaders([folder], **how)]  # type: ignore[arg-type]


def captions(batches: Iterable[Any]) -> list[str]:
    return [caption for batch in batches for caption in batch.captions]


def texts(samples: Iterable[ShardSample]) -> list[str]:
    return [sample.meta["caption"] for sample in samples]


def state_of(ranks: Sequence[Loader]) -> dict[str, Any]:
    """What a checkpoint keeps of the loaders of all ranks, through JSON as there."""
    finished = json.loads(json.dumps([loader.take_finished() for loader in ranks]))
    states = [loader.state(finished) for loader in ranks]
    assert all(state == states[0] for state in states)
    return dict(json.loads(json.dumps(states[0])))


@pytest.fixture
def threes(samples: list[ShardSample], tmp_path: Path) -> str:
    """Eight shards of three clips, the last of two."""
    return write_set(tmp_path / "threes", samples, per_shard=3)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 2), (4, 0)])
def test_every_rank_makes_the_same_steps_with_the_positions_of_the_run(shards: str, world: int, workers: int) -> None:
    ranks = read(shards, world=world, workers=workers, start=2)
    assert {len(batches) for batches in ranks} == {16 // world}
    for rank, batches in enumerate(ranks):
        positions = [position for batch in batches for position in batch.positions]
        assert positions == [q for q in range(8, 24) if q % world == rank]


def test_a_pass_has_every_sample_once_and_another_order_than_the_next(shards: str, samples: list[ShardSample]) -> None:
    (batches,) = read(shards, steps=12)
    first, second = captions(batches[:SAMPLES]), captions(batches[SAMPLES : 2 * SAMPLES])
    assert sorted(first) == sorted(second) == sorted(texts(samples))
    assert first != second
    assert texts(samples) not in (first, second)


def test_ranks_and_workers_share_the_shards_of_a_pass(threes: str, samples: list[ShardSample]) -> None:
    ranks = read(threes, world=2, workers=2, steps=5)  # four slots with 5 samples of two shards each
    given = captions(itertools.chain(*ranks))
    assert len(given) == len(set(given)) == 20


def test_the_same_ranks_and_workers_give_the_same_run(threes: str) -> None:
    once, again, other = (captions(read(threes, seed=seed)[0]) for seed in (5, 5, 6))
    assert once == again
    assert once != other


def test_without_shuffling_samples_come_as_they_lie(threes: str, samples: list[ShardSample]) -> None:
    (batches,) = read(threes, shuffle=False)
    assert captions(batches) == (texts(samples) * 2)[: 6 * BATCH]


def test_a_buffer_of_nothing_permutes_shards_alone(threes: str, samples: list[ShardSample]) -> None:
    given = captions(read(threes, shuffle_mb=0)[0][:SAMPLES])
    places = [[given.index(caption) for caption in texts(samples[i : i + 3])] for i in range(0, SAMPLES, 3)]
    assert all(shard == list(range(shard[0], shard[0] + len(shard))) for shard in places)
    assert places != sorted(places)


def test_one_shard_feeds_many(samples: list[ShardSample], tmp_path: Path) -> None:
    folder = write_set(tmp_path, samples[:4])
    ranks = read(folder, world=4, workers=2)
    assert [len(batches) for batches in ranks] == [6, 6, 6, 6]


class Counted(Feed):
    """Notes the bytes in the shuffle buffer whenever it takes one more sample."""

    def _shuffle(self, samples: Iterable[StreamSample]) -> Iterator[StreamSample]:
        self.inside, self.most = 0, 0
        for sample in super()._shuffle(self._entering(samples)):
            self.inside -= sample.size
            yield sample

    def _entering(self, samples: Iterable[StreamSample]) -> Iterator[StreamSample]:
        for sample in samples:
            self.most = max(self.most, self.inside)
            self.inside += sample.size
            yield sample


def test_the_shuffle_buffer_is_bounded_in_bytes_and_lets_a_giant_pass(tmp_path: Path) -> None:
    sizes = [random.Random(7).randrange(100, 5000) for _ in range(200)]
    sizes[50] = 90_000
    for shard in range(4):
        rows = range(shard * 50, shard * 50 + 50)
        write_shard(str(tmp_path), shard, [ShardSample(f"{row:03d}", {"bin": bytes(sizes[row])}) for row in rows])
    order = StreamSet("set", stream.list_shards([str(tmp_path)]), 1, True)
    feed = Counted(order, 0, 1, Fetcher(), 20_000, random.Random(3))
    given = list(itertools.islice(feed, 200))
    assert 15_000 < feed.most <= 20_000
    assert sorted(sample.key for sample in given) == [f"{row:03d}" for row in range(200)]
    came = [sample.shard * 50 + int(sample.key) % 50 for sample in given]  # by the order of the shards
    assert sum(abs(place - number) for number, place in enumerate(came)) / 200 > 4


def test_weights_are_shares_of_the_samples_however_many_a_shard_holds(
    samples: list[ShardSample], tmp_path: Path
) -> None:
    many = ShardSet(folders=(write_set(tmp_path / "many", samples[:10], per_shard=5),), weight=1.5)
    few = ShardSet(folders=(write_set(tmp_path / "few", samples[10:16], per_shard=1),), weight=0.5)
    ranks = [list(loader) for loader in loaders([many, few], world=2, batch=100, micro=50, steps=10)]
    given = captions(itertools.chain(*ranks))
    assert len(given) == 1000
    assert sum(caption in texts(samples[:10]) for caption in given) == 750
    assert len(set(given)) == 16


def test_a_shard_counts_as_finished_when_its_last_sample_is_given_and_not_when_it_is_ready(threes: str) -> None:
    (loader,) = ranks = loaders([threes], shuffle=False, workers=1, prefetch=8)
    for count, _ in enumerate(loader, start=1):
        (one,) = state_of(ranks)["sets"]
        assert (one["next"], one["finished"]) == ((count // 3 if count < SAMPLES else 8), [])


@pytest.mark.parametrize(("workers", "steps"), [(0, 3), (2, 4)])
def test_a_resumed_run_reads_what_is_left_of_the_pass_and_unfinished_shards_anew(
    threes: str, samples: list[ShardSample], workers: int, steps: int
) -> None:
    ranks = loaders([threes], world=2, workers=workers, shuffle_mb=0.004, steps=50)
    before = captions(batch for loader in ranks for batch in itertools.islice(loader, 2 * steps))
    state = state_of(ranks)
    (one,) = state["sets"]
    done = {*range(one["next"]), *one["finished"]}
    assert 1 < len(done) <= 4
    order = StreamSet(one["name"], stream.list_shards([threes]), 5, True)
    clips = {url: texts(samples[3 * i : 3 * i + 3]) for i, url in enumerate(order.urls)}
    finished = [caption for number in done for caption in clips[order.url(number)]]
    unfinished = [caption for number in range(8) if number not in done for caption in clips[order.url(number)]]
    assert set(finished) <= set(before)

    (loader,) = loaders([threes], start=steps, steps=50, state=state)
    assert f"{threes}: going on behind {len(done)} finished shards, {len(done) / 8:.2f} passes" in loader.notes
    batches = list(itertools.islice(loader, len(unfinished)))
    assert batches[0].positions == [BATCH * steps]
    assert sorted(captions(batches)) == sorted(unfinished)

    many = loaders([threes], world=2, workers=2, start=steps, steps=50, state=state, shuffle_mb=0)
    firsts = captions(batch for loader in many for batch in itertools.islice(loader, 2))  # a sample of each slot
    assert len({url for url, held in clips.items() for caption in firsts if caption in held}) == 4
    assert set(firsts) <= set(unfinished)


def test_resuming_again_goes_on_behind_both_parts(threes: str) -> None:
    state, taken = None, []
    for start, world in ((0, 1), (2, 2), (4, 4)):
        ranks = loaders([threes], world=world, start=start, steps=start + 2, state=state, shuffle_mb=0)
        assert [len(list(loader)) for loader in ranks] == [2 * BATCH // world] * world
        state = state_of(ranks)
        (one,) = state["sets"]
        taken.append({*range(one["next"]), *one["finished"]})
    assert taken[0] < taken[1] <= taken[2]
    assert taken[0] == {0, 1}  # 3 + 3 clips of 8


def test_what_is_kept_of_a_set_goes_by_its_shards_and_another_batch_size_by_positions(
    samples: list[ShardSample], tmp_path: Path
) -> None:
    kept = ShardSet(folders=(write_set(tmp_path / "kept", samples[:6], per_shard=1),), weight=1)
    grown = ShardSet(folders=(write_set(tmp_path / "grown", samples[6:9], per_shard=1),), weight=1)
    ranks = loaders([kept, grown], shuffle_mb=0, steps=3)
    assert len(list(ranks[0])) == 12
    state = state_of(ranks)
    new = ShardSet(folders=(write_set(tmp_path / "new", samples[9:10]),), weight=1)
    write_shard(grown.folders[0], 3, samples[10:11])
    (loader,) = ranks = loaders([new, grown, kept], start=3, steps=4, batch=2, state=state, shuffle_mb=0)
    assert [note.partition(": ")[2] for note in loader.notes[1:]] == [
        "new in this run, from its beginning",
        "its shards or data.shuffle changed, so it starts from its beginning",
        f"going on behind {state['sets'][0]['next']} finished shards, {state['sets'][0]['next'] / 6:.2f} passes",
    ]
    assert [batch.positions for batch in loader] == [[12], [13]]
    (loader,) = loaders([kept], start=9, steps=10, batch=8, state=state_of(ranks))
    assert next(iter(loader)).positions == [24]


def test_what_an_index_alone_can_serve_is_refused() -> None:
    conditions = [{"field": "duration", "comparison": ">", "value": 2}]
    shards = ["a", {"folders": ["b"], "where": conditions, "join": ["c"]}]
    tree = {"kind": "stream", "video": {"shards": shards}}
    with pytest.raises(UserError, match=r"needs?; use kind=video") as refused:
        parse_config(DataConfig, tree, "config")
    assert "data.video.shards.1.where, data.video.shards.1.join" in str(refused.value)
    bucket = {"frames": 1, "height": 8, "width": 8, "size": 4}
    tree = {"kind": "stream", "contiguous": 4, "video": {"shards": ["a"], "clip": {"buckets": [bucket]}}}
    with pytest.raises(UserError, match=r"which data.video.clip.buckets, data.contiguous needs"):
        parse_config(DataConfig, tree, "config")


def test_bad_clips_and_damaged_shards_cost_no_step_and_are_named(samples: list[ShardSample], tmp_path: Path) -> None:
    bad = ShardSample("bad", {"mp4": b"junk", "txt": b"x"}, {})
    write_shard(str(tmp_path), 0, [samples[0], bad, samples[1]])
    for shard in (1, 2):
        write_shard(str(tmp_path), shard, samples[9:12])
    (tmp_path / "00003.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "00001.tar") as tar:
        last, middle = tar.getmember(f"{samples[11].key}.mp4"), tar.getmember(f"{samples[10].key}.txt")
    data = bytearray((tmp_path / "00001.tar").read_bytes())
    (tmp_path / "00001.tar").write_bytes(data[: last.offset_data + last.size // 2])  # cut inside a video
    data[middle.offset : middle.offset + 512] = b"\xff" * 512
    (tmp_path / "00002.tar").write_bytes(data)  # a header overwritten
    (batches,) = read(str(tmp_path))
    assert len(batches) == 24
    # of the cut shard two clips are whole, of the overwritten one the first, with the clip in the wreck left out
    assert set(captions(batches)) == set(texts([samples[0], samples[1], samples[9], samples[10]]))
    replaced = [entry for batch in batches for entry in batch.replaced]
    named = {(entry.shard[-9:], entry.key) for entry in replaced}
    assert named == {("00000.tar", "bad"), ("00001.tar", ""), ("00002.tar", ""), ("00003.tar", "")}
    assert {entry.reason.partition(" is ")[2].split(" at byte")[0] for entry in replaced if not entry.key} == {
        "damaged"
    }
    assert {entry.position for entry in replaced} <= set(range(24))


def test_no_entry_but_a_plain_file_becomes_a_sample(
    samples: list[ShardSample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    video = samples[0].members["mp4"]
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(video)
    kinds = {"sym": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "fifo": tarfile.FIFOTYPE}
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, kind in kinds.items():
            entry = tarfile.TarInfo(f"{name}.mp4")
            entry.type, entry.linkname = kind, str(secret)
            tar.addfile(entry)
        for name in ("../up", "/root", "a/../../up", "good"):
            entry = tarfile.TarInfo(f"{name}.mp4")
            entry.size = len(video)
            tar.addfile(entry, io.BytesIO(video))
        text = tarfile.TarInfo("good.txt")
        text.size = 4
        tar.addfile(text, io.BytesIO(b"good"))
    (batches,) = read(f"{tmp_path}/00000.tar", steps=2)
    assert captions(batches) == ["good"] * 8
    assert not [entry for batch in batches for entry in batch.replaced]
    for said in ("00000.tar: left out: 2 x link", "2 x device or pipe", "3 x name that leads out of the tar"):
        assert caplog.text.count(said) == 1


def test_a_sample_beyond_what_decodes_is_not_read(
    samples: list[ShardSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(str(tmp_path), 0, [samples[0], ShardSample("giant", {"mp4": bytes(10**6)}), samples[1]])
    monkeypatch.setattr(stream, "MAX_BYTES", 10**5)
    monkeypatch.setattr(stream, "BLOCK", 3000)
    with web_server(tmp_path) as server:
        (batches,) = read(f"{server.url}/00000.tar", steps=1, batch=2)
    assert set(captions(batches)) == set(texts(samples[:2]))
    replaced = {(entry.key, entry.reason) for batch in batches for entry in batch.replaced}
    assert replaced == {("giant", "more than 100000 bytes")}
    assert server.sent < 10**5


def test_failing_reads_lose_nothing_and_each_byte_is_read_once(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(stream, "BLOCK", 6000)
    with web_server(Path(shards), faults=0.0) as server:
        url = f"{server.url}/{{00000..00002}}.tar"
        whole = captions(read(url, steps=1, batch=SAMPLES)[0])
        # and the first samples of the next pass
        assert server.sent < 1.1 * sum(path.stat().st_size for path in Path(shards).glob("*.tar"))
        server.faults = 0.2
        assert captions(read(url, steps=1, batch=SAMPLES)[0]) == whole
        assert sum(server.met.values()) >= 4
        server.faults = 1.0
        monkeypatch.setattr(storage, "ATTEMPTS", 3)
        with pytest.raises(Requeue, match=r"cannot read http://.*\.tar after 3 attempts"):
            read(url)


class Deadly(StreamDataset):
    """Kills the worker that makes the sample of one position."""

    def _next_clip(self, feeds: Sequence[Feed], position: int) -> VideoSample:
        if position == 9 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._next_clip(feeds, position)


def test_a_worker_that_dies_ends_the_run_to_be_started_again(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvdm.data.loader.StreamDataset", Deadly)
    with pytest.raises(Requeue, match=r"^a loader process died .* a stream cannot tell at which sample"):
        read(shards, workers=1)


def test_shards_can_be_named_one_by_one(shards: str) -> None:
    (batches,) = read(f"{shards}/{{00000..00001}}.tar", steps=9)
    assert len(set(captions(batches))) == 18


def test_commands_in_place_of_urls_are_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(UserError, match=r"^cannot read pipe:touch .*: FileNotFoundError"):
        read(f"pipe:touch {mark} #.tar")
    assert not mark.exists()


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of shards"):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no shards"):
        read(str(tmp_path))
    write_shard(str(tmp_path), 0, [])
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^no samples in"):
            read(str(tmp_path), workers=workers)


def test_it_says_how_many_shards_there_are_and_how_it_resumes(shards: str) -> None:
    (loader,) = loaders([shards])
    (note,) = loader.notes
    assert note.startswith("streaming 3 shards without an index: resume is by whole shards")


def test_samples_that_are_recorded_as_failed_are_left_out_as_by_the_index(
    samples: list[ShardSample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = json.dumps({"status": "failed_to_subsample"}).encode()  # video2dataset keeps such samples in its tars
    failed = ShardSample("failed", {**samples[0].members, "json": told})
    write_shard(str(tmp_path), 0, [samples[1], failed, samples[2]])
    (batches,) = read(str(tmp_path), steps=3)
    assert set(captions(batches)) == set(texts(samples[1:3]))
    assert not [entry for batch in batches for entry in batch.replaced]
    assert build_index(str(tmp_path)).left_out == {"recorded as failed": 1}
    assert "left out: 1 x recorded as failed" in caplog.text


def test_chained_urls_of_shards_stay_whole() -> None:
    given = stream.list_shards(["simplecache::s3://bucket/{00..01}.tar", "a::b.tar"])
    assert given == ["simplecache::s3://bucket/00.tar", "simplecache::s3://bucket/01.tar", "a::b.tar"]
