from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from lvdm.config import ClipConfig, DataConfig, VideoSource
from lvdm.data.batch import VideoBatch
from lvdm.data.loader import build_loader
from lvdm.data.writer import ShardSample, write_shard
from lvdm.errors import UserError
from tests.data.conftest import SAMPLES, write_set


def read(folder: str, *, world: int, workers: int = 0, steps: int = 6, start: int = 0) -> list[list[VideoBatch]]:
    """The batches of each rank; 4 samples a step."""
    source = VideoSource(shards=[folder], clip=ClipConfig(frames=4, height=8, width=8))
    data = DataConfig(kind="stream", video=source, workers=workers, text_dropout=0.0)
    return [
        list(
            build_loader(data, seed=5, batch=4, micro=1, world=world, rank=rank, first_step=start, steps=steps - start)
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 2), (4, 0)])
def test_every_rank_makes_the_same_steps_with_the_positions_of_the_run(shards: str, world: int, workers: int) -> None:
    ranks = read(shards, world=world, workers=workers, start=2)
    assert {len(batches) for batches in ranks} == {16 // world}
    for rank, batches in enumerate(ranks):
        positions = [position for batch in batches for position in batch.positions]
        assert positions == [q for q in range(8, 24) if q % world == rank]


def test_ranks_share_the_shards_and_a_pass_has_every_sample_once(shards: str, samples: list[ShardSample]) -> None:
    ranks = read(shards, world=2, steps=24)
    captions = [{caption for batch in batches for caption in batch.captions} for batches in ranks]
    assert captions[0] | captions[1] == {sample.meta["caption"] for sample in samples}
    (alone,) = read(shards, world=1, steps=6)
    counts = Counter(caption for batch in alone[:SAMPLES] for caption in batch.captions)
    assert set(counts.values()) == {1}
    assert len(counts) == SAMPLES
    assert list(counts) != [sample.meta["caption"] for sample in samples]


def test_one_shard_feeds_many(samples: list[ShardSample], tmp_path: Path) -> None:
    folder = write_set(tmp_path, samples[:4])
    ranks = read(folder, world=4, workers=2)
    assert [len(batches) for batches in ranks] == [6, 6, 6, 6]


def test_bad_clips_and_damaged_shards_cost_no_step(samples: list[ShardSample], tmp_path: Path) -> None:
    bad = ShardSample("bad", {"mp4": b"junk", "txt": b"x"}, {})
    write_shard(str(tmp_path), 0, [samples[0], bad, samples[1]])
    write_shard(str(tmp_path), 1, samples[9:12])
    cut = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(cut[: len(cut) // 2])
    (batches,) = read(str(tmp_path), world=1)
    assert len(batches) == 24
    replaced = [entry for batch in batches for entry in batch.replaced]
    assert {(entry.key, entry.shard) for entry in replaced} == {("bad", f"{tmp_path}/00000.tar")}


def test_shards_can_be_named_one_by_one(shards: str) -> None:
    (batches,) = read(f"{shards}/{{00000..00001}}.tar", world=1, steps=9)
    assert len({caption for batch in batches for caption in batch.captions}) == 18


def test_commands_in_place_of_urls_are_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(UserError, match=r"^shard pipe:touch .* is missing"):
        read(f"pipe:touch {mark} #.tar", world=1)
    assert not mark.exists()


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of shards"):
        read(str(tmp_path / "nowhere"), world=1)
    with pytest.raises(UserError, match="holds no shards"):
        read(str(tmp_path), world=1)
    write_shard(str(tmp_path), 0, [])
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^no samples in"):
            read(str(tmp_path), world=1, workers=workers)


def test_it_says_that_resume_is_not_exact(shards: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(shards, world=2, steps=0)
    assert len([record for record in caplog.records if "resume is not exact" in record.message]) == 1
