from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest

from lvdm.data.build_index import build_index
from lvdm.data.fetch import read_sample
from lvdm.data.index import open_index
from lvdm.data.writer import ShardSample, write_shard
from lvdm.errors import UserError


@pytest.fixture
def copy(shards: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def test_every_sample_is_one_range_with_all_its_members(shards: str, samples: list[ShardSample]) -> None:
    index = open_index([shards])
    assert len(index) == len(samples)
    for row, sample in enumerate(samples):
        record = index[row]
        members = read_sample(record)
        assert record.key == sample.key
        assert record.meta == {"width": 24, "height": 24, "fps": 8.0, "frames": 14, "duration": 1.75}
        assert set(members) == {"mp4", "txt", "json"}
        assert (members["mp4"], members["txt"]) == (sample.members["mp4"], sample.members["txt"])
        assert sum(map(len, members.values())) <= record.size < sum(map(len, members.values())) + 3 * 1024


def test_folders_follow_each_other(shards: str, copy: Path) -> None:
    both = open_index([shards, str(copy)])
    assert len(both) == 46
    assert both[22].shard == f"{shards}/00002.tar"
    assert both[23].shard == f"{copy}/00000.tar"
    assert both[23].key == both[0].key
    with pytest.raises(IndexError):
        both[46]


def test_a_pickled_index_is_the_same(shards: str) -> None:
    index = open_index([shards])
    data = pickle.dumps(index)
    assert len(data) < 1000
    assert pickle.loads(data)[20] == index[20]


def test_other_stores(samples: list[ShardSample]) -> None:
    write_shard("memory://index/set", 0, samples[:3])
    assert build_index("memory://index/set").samples == 3
    index = open_index(["memory://index/set"])
    assert read_sample(index[2])["mp4"] == samples[2].members["mp4"]


def test_foreign_shards(tmp_path: Path) -> None:
    def add(name: str, data: bytes = b"x") -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("folder/"))
        add("folder/one.MP4", b"1" * 700)
        add("folder/one.txt")
        add("two.txt")  # video2dataset keeps text and status of what it could not download
        add("two.json", json.dumps({"status": "failed_to_download"}).encode())
        add("three.latent.safetensors", b"3")
        link = tarfile.TarInfo("four.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add("five.json", b"not json")
        add("../six.mp4")
        add("/seven.mp4")
        add(("x" * 200) + ".mp4", b"long")  # needs an extended header
    built = build_index(str(tmp_path))
    assert built.samples == 4
    index = open_index([str(tmp_path)])
    records = [index[i] for i in range(4)]
    assert [record.key for record in records] == ["folder/one", "three", "five", "x" * 200]
    assert read_sample(records[0]) == {"mp4": b"1" * 700, "txt": b"x"}
    assert read_sample(records[1]) == {"latent.safetensors": b"3"}
    assert read_sample(records[3]) == {"mp4": b"long"}


def test_missing_things_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder of shards: .*nowhere"):
        open_index([str(tmp_path / "nowhere")])
    (copy / "00001.tar").rename(tmp_path / "moved.tar")
    with pytest.raises(UserError, match=r"shard .*copy/00001\.tar is missing"):
        open_index([str(copy)])
    (copy / "index.arrow").unlink()
    with pytest.raises(
        UserError, match=r"copy has no index\.arrow; build it with: python tools/index_shards\.py .*copy"
    ):
        open_index([str(copy)])


def test_a_stale_index_names_the_shard(copy: Path) -> None:
    with open(copy / "00002.tar", "ab") as stream:
        stream.write(b"\0" * 512)
    size = (copy / "00002.tar").stat().st_size
    with pytest.raises(UserError, match=rf"00002\.tar has {size} bytes, but {size - 512} when it was indexed"):
        open_index([str(copy)])


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty"])
def test_a_damaged_index_is_refused(copy: Path, damage: str) -> None:
    path = copy / "index.arrow"
    data = path.read_bytes()
    path.write_bytes({"garbage": b"x" * len(data), "cut": data[: len(data) // 2], "empty": b""}[damage])
    with pytest.raises(UserError, match=r"index\.arrow is damaged"):
        open_index([str(copy)])


def test_sets_without_samples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shards"):
        build_index(str(tmp_path))
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    assert build_index(str(tmp_path)).samples == 0
    with pytest.raises(UserError, match="the shard set is empty"):
        open_index([str(tmp_path)])


def test_a_cut_shard_is_not_indexed(copy: Path) -> None:
    path = copy / "00001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"00001\.tar is not a whole tar file"):
        build_index(str(copy))
