from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from lvdm.data.build_index import build_index
from lvdm.data.fetch import read_sample
from lvdm.data.index import open_index
from lvdm.data.writer import ShardSample, sample_key, write_shard
from lvdm.errors import UserError


def test_keys_are_video2datasets() -> None:
    assert sample_key(3, 17, 1000) == "00003017"
    assert sample_key(0, 0, 10_000) == "000000000"


def test_a_shard_has_video2datasets_layout(tmp_path: Path) -> None:
    meta = {"caption": "a cat", "width": 64, "extra": {"nested": [1]}}
    samples = [
        ShardSample("00000", {"mp4": b"movie", "txt": b"a cat"}, meta),
        ShardSample("00001", {}, {"caption": "lost"}, "failed_to_download", "404"),
    ]
    stats = write_shard(str(tmp_path), 0, samples)
    assert (stats.count, stats.successes, stats.failed_to_download) == (2, 1, 1)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    assert set(members) == {"00000.mp4", "00000.txt", "00000.json"}
    assert members["00000.mp4"] == b"movie"
    assert json.loads(members["00000.json"]) == meta | {"key": "00000", "status": "success", "error_message": None}
    told = json.loads((tmp_path / "00000_stats.json").read_text())
    assert told["status_dict"] == {"success": 1, "404": 1}
    rows = pq.read_table(tmp_path / "00000.parquet").to_pylist()
    assert [(row["key"], row["status"], row["error_message"]) for row in rows] == [
        ("00000", "success", None),
        ("00001", "failed_to_download", "404"),
    ]


def test_equal_samples_give_equal_tars(samples: list[ShardSample], tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shard(str(tmp_path / name), 0, samples[:5])
    assert (tmp_path / "one/00000.tar").read_bytes() == (tmp_path / "two/00000.tar").read_bytes()


def test_keys_of_foreign_shards_survive(tmp_path: Path) -> None:
    keys = ["v1.0/folder/öne", "x" * 150]
    write_shard(str(tmp_path), 0, [ShardSample(key, {"txt": b"text"}) for key in keys])
    build_index(str(tmp_path))
    index = open_index([str(tmp_path)])
    assert [index[row].key for row in range(2)] == keys
    assert read_sample(index[1])["txt"] == b"text"


def test_a_shard_that_fails_half_way_leaves_nothing(samples: list[ShardSample], tmp_path: Path) -> None:
    def broken() -> Iterator[ShardSample]:
        yield samples[0]
        raise RuntimeError("the source went away")

    with pytest.raises(RuntimeError, match="went away"):
        write_shard(str(tmp_path), 0, broken())
    assert list(tmp_path.iterdir()) == []


def test_stats_are_written_after_the_tar_is_in_place(samples: list[ShardSample], tmp_path: Path) -> None:
    write_shard(str(tmp_path), 0, samples[:2])
    (tmp_path / "00000_stats.json").unlink()
    (tmp_path / "00000.parquet").unlink()
    (tmp_path / "00000.parquet").mkdir()  # the table cannot be put there, so the shard must stay incomplete
    with pytest.raises(UserError, match=r"cannot write .*00000\.parquet: it is a folder"):
        write_shard(str(tmp_path), 0, samples[:2])
    assert not (tmp_path / "00000_stats.json").exists()


def test_a_shard_goes_to_any_store(samples: list[ShardSample]) -> None:
    write_shard("memory://writer/set", 2, samples[:2])
    names = {path.rsplit("/", 1)[-1] for path in fsspec.filesystem("memory").ls("/writer/set", detail=False)}
    assert names == {"00002.tar", "00002.parquet", "00002_stats.json"}
