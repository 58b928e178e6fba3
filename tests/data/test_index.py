from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lvdm import storage
from lvdm.config import Bucket, ClipConfig, ShardSet
from lvdm.data import build_index as module
from lvdm.data.build_index import PARTS, build_index
from lvdm.data.fetch import read_sample
from lvdm.data.index import Index, open_index
from lvdm.data.select import select
from lvdm.data.sources import open_sources
from lvdm.data.tar_scan import MOST_FRAMES, MOST_MEMBERS, Scanned
from lvdm.data.writer import ShardSample, write_shard
from lvdm.errors import Requeue, UserError
from tests.data.stores import web_server

TOOL = Path(__file__).resolve().parents[2] / "tools/index_shards.py"


def write_tar(path: Path, members: Mapping[str, bytes | dict[str, Any]]) -> None:
    """A tar of these members, dicts as JSON."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = json.dumps(content, indent=4).encode() if isinstance(content, dict) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def rows_of(index: Index) -> list[Any]:
    return [index[row] for row in range(len(index))]


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


def test_a_worker_reads_the_very_index_that_the_run_began_with_and_asks_no_store(
    copy: Path, samples: list[ShardSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    write_shard("memory://worker/set", 0, samples[:3])
    build_index("memory://worker/set")
    remote = open_index(["memory://worker/set"])
    data = pickle.dumps(remote)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "info", None)
        assert pickle.loads(data)[2] == remote[2]
    index = open_index([str(copy)])
    data, first = pickle.dumps(index), index[0]
    build_index(str(copy), exclude={f"{copy}/00000.tar": frozenset([first.key])})
    other = pickle.loads(data)
    assert len(other) == 23
    with pytest.raises(UserError, match=rf"the index of {copy} changed while the run reads it; start the run again"):
        other[0]
    assert index[0] == first
    assert pickle.loads(pickle.dumps(open_index([str(copy)])))[0] != first


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


def test_a_cut_shard_gives_what_stands_before_the_cut_and_is_named(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = rows_of(open_index([str(copy)]))
    path = copy / "00001.tar"
    cut = before[12].members["mp4"][0] + 5  # inside the fourth of its nine
    path.write_bytes(path.read_bytes()[:cut])
    built = build_index(str(copy))
    assert built.samples == 23 - 6
    assert built.left_out == {"shard damaged from some byte on": 1, "sample next to the damage of its shard": 1}
    assert list(built.damaged) == ["00001.tar"]
    assert built.damaged["00001.tar"] == caplog.messages[0]
    assert f"shard {path} is damaged at byte" in caplog.messages[0]
    assert "reaches past the end of the file" in caplog.messages[0]
    index = open_index([str(copy)])
    places = [(record.shard, record.key, record.members) for record in rows_of(index)]
    assert places == [(record.shard, record.key, record.members) for record in before[:12] + before[18:]]
    assert index.parts[0].damaged == built.damaged


def test_a_set_of_one_cut_shard_is_what_stands_before_the_cut(copy: Path, tmp_path: Path) -> None:
    cut = open_index([str(copy)])[3].members["mp4"][0] + 5
    (tmp_path / "one").mkdir()
    (tmp_path / "one/0.tar").write_bytes((copy / "00000.tar").read_bytes()[:cut])
    built = build_index(str(tmp_path / "one"))
    assert (built.samples, list(built.damaged)) == (3, ["0.tar"])
    (tmp_path / "one/0.tar").write_bytes(b"no tar" * 100)
    with pytest.raises(UserError, match=r"no samples: all 1 shards of .*one are damaged; the first: "):
        build_index(str(tmp_path / "one"))


def test_entries_to_exclude_that_match_nothing_are_counted(copy: Path, tmp_path: Path) -> None:
    key = open_index([str(copy)])[0].key
    here = f"{copy}/00000.tar"
    exclude = {here: frozenset([key, "none"]), "/elsewhere/00000.tar": frozenset([key])}
    for _ in range(2):  # the second takes what it found before
        built = build_index(str(copy), exclude=exclude)
        assert (built.samples, built.left_out, built.unmatched) == (22, {"excluded": 1}, 2)
    listed = tmp_path / "replaced.jsonl"
    listed.write_text("".join(json.dumps({"shard": s, "key": k}) + "\n" for s, keys in exclude.items() for k in keys))
    command = [sys.executable, str(TOOL), str(copy), "--exclude", str(listed)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert f"2 of the 3 entries of {listed} are no samples of what was indexed" in told.stdout
    assert build_index(str(copy)).unmatched == 0


@pytest.fixture
def many(samples: list[ShardSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve small shards, in groups of about two."""
    monkeypatch.setattr(module, "_GROUP", 2)
    for number in range(12):
        write_shard(str(tmp_path / "many"), number, [samples[number], samples[(number + 1) % 23]])
    return tmp_path / "many"


def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that builds in this process scan from now on."""
    names: list[str] = []
    scan = module._scan_shard

    def noted(rows: Any, number: int, url: str, *rest: Any) -> str:
        names.append(url.rsplit("/", 1)[-1])
        return scan(rows, number, url, *rest)

    monkeypatch.setattr(module, "_scan_shard", noted)
    return names


def test_workers_change_no_byte_of_an_index(many: Path) -> None:
    build_index(str(many))
    alone = (many / "index.arrow").read_bytes()
    shutil.rmtree(many / PARTS)
    (many / "index.arrow").unlink()
    counts: list[tuple[int, int]] = []
    build_index(str(many), workers=3, progress=lambda done, total: counts.append((done, total)))
    assert (many / "index.arrow").read_bytes() == alone
    assert counts[0] == (0, 12)
    assert counts[-1] == (12, 12)
    assert len(counts) > 4


def test_a_later_build_scans_only_groups_with_new_shards(
    many: Path, samples: list[ShardSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = scanned(monkeypatch)
    build_index(str(many))
    assert names == [f"{number:05d}.tar" for number in range(12)]
    names.clear()
    build_index(str(many))
    assert names == []
    write_shard(str(many), 12, samples[:2])
    (many / "00012.tar").rename(many / "00005b.tar")  # in the middle
    built = build_index(str(many))
    assert built.samples == 26
    assert "00005b.tar" in names
    assert len(names) <= 6
    names.clear()
    write_shard(str(many), 3, samples[4:7])  # another content
    build_index(str(many))
    assert "00003.tar" in names
    assert len(names) <= 6
    together = rows_of(open_index([str(many)]))
    assert len(together) == 27
    parts = list((many / PARTS).iterdir())
    shutil.rmtree(many / PARTS)
    build_index(str(many))
    assert rows_of(open_index([str(many)])) == together
    assert {part.name for part in (many / PARTS).iterdir()} == {part.name for part in parts}  # none is stale


def test_other_exclusions_scan_what_they_change(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(str(many))
    key = open_index([str(many)])[8].key
    names = scanned(monkeypatch)
    built = build_index(str(many), exclude={f"{many}/00004.tar": frozenset([key])})
    assert built.samples == 23
    assert built.left_out == {"excluded": 1}
    assert "00004.tar" in names
    assert len(names) <= 6
    assert build_index(str(many)).samples == 24


def session(leader: int) -> list[int]:
    """Processes of the session that ``leader`` began, itself aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and int(path.parent.name) != leader and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def test_a_killed_build_leaves_no_process_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    write_tar(folder / "0000.tar", {f"{number:05d}.mp4": b"" for number in range(150)})
    for number in range(1, 300):
        os.link(folder / "0000.tar", folder / f"{number:04d}.tar")
    (folder / "bad.tar").write_bytes(b"no tar" * 100)
    parts = folder / PARTS
    with subprocess.Popen([sys.executable, TOOL, folder, "--workers", "2"], start_new_session=True) as tool:
        deadline = time.monotonic() + 60
        while not (parts.is_dir() and len(list(parts.glob("*.arrow"))) >= 2):
            assert tool.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        tool.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while session(tool.pid):
        assert time.monotonic() < deadline, "its workers live on"
        time.sleep(0.05)
    assert not (folder / "index.arrow").exists()
    there = len(list(parts.glob("*.arrow")))
    names = scanned(monkeypatch)
    done: list[int] = []
    assert build_index(str(folder), progress=lambda count, total: done.append(count)).samples == 45_000
    assert done[0] > 0
    assert len(names) == 301 - done[0]
    assert len(list(parts.glob("*.arrow"))) > there
    assert not list(parts.glob(".writing*"))
    index = (folder / "index.arrow").read_bytes()
    shutil.rmtree(parts)
    command = [sys.executable, str(TOOL), str(folder), "--workers", "2"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (folder / "index.arrow").read_bytes() == index
    assert again.returncode == 0
    assert "45000 samples in 301 shards; 1 left out: shard damaged" in " ".join(again.stdout.split())
    assert " ".join(again.stderr.split()).count("bad.tar is damaged at byte 0: that is no header of a tar") == 1


class Flaky:
    """Makes every third opening of a file in the memory store fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
        self.calls = 0
        opened = MemoryFileSystem._open

        def _open(fs: MemoryFileSystem, path: str, mode: str = "rb", **how: Any) -> Any:
            self.calls += mode == "rb"
            if mode == "rb" and self.calls % every == 0:
                raise OSError("the store is busy")
            return opened(fs, path, mode, **how)

        monkeypatch.setattr(MemoryFileSystem, "_open", _open)


def test_a_store_that_fails_now_and_then_loses_nothing_and_one_that_is_down_asks_for_another_start(
    samples: list[ShardSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(module, "_GROUP", 1)
    for number in range(6):
        write_shard("memory://flaky/set", number, samples[number * 3 : number * 3 + 3])
    with monkeypatch.context() as patch:
        scan, group = module._scan_group, iter(range(6))

        def scan_under_faults(*how: Any) -> None:
            with pytest.MonkeyPatch.context() as inner:
                Flaky(inner, 1 if next(group) == 3 else 3)
                scan(*how)

        patch.setattr(module, "_scan_group", scan_under_faults)
        with pytest.raises(
            Requeue, match=r"cannot read memory://flaky/set/00003\.tar after 6 attempts: OSError: the store"
        ):
            build_index("memory://flaky/set")
    names = scanned(monkeypatch)
    assert build_index("memory://flaky/set").samples == 18
    assert names == ["00003.tar", "00004.tar", "00005.tar"]
    index = open_index(["memory://flaky/set"])
    assert [record.key for record in rows_of(index)] == [sample.key for sample in samples[:18]]
    assert read_sample(index[17])["mp4"] == samples[17].members["mp4"]


def test_shards_whose_writer_told_what_is_in_them_are_not_read_again(
    samples: list[ShardSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, read = str(tmp_path / "told"), str(tmp_path / "read")
    for number in range(5):
        for folder in (told, read):
            write_shard(folder, number, samples[4 * number : 4 * number + 4], tell=folder == told)
    build_index(read)
    shutil.copy(tmp_path / "read" / "00003.tar", tmp_path / "told" / "00007.tar")  # of which nobody told
    names = scanned(monkeypatch)
    assert build_index(told).samples == 24
    assert names == ["00007.tar"]
    index, same = open_index([told]), open_index([read])
    for row in range(20):
        assert (index[row].key, index[row].members, index[row].meta) == (
            same[row].key,
            same[row].members,
            same[row].meta,
        )
        assert index[row].shard.rsplit("/", 1)[-1] == same[row].shard.rsplit("/", 1)[-1]
    assert [index[row].key for row in range(20, 24)] == [same[row].key for row in range(12, 16)]


def test_a_store_that_takes_no_index_says_so(samples: list[ShardSample], tmp_path: Path) -> None:
    write_shard(str(tmp_path), 0, samples[:2])
    with web_server(tmp_path) as server, pytest.raises(UserError, match=r"cannot write http://.*\.arrow: "):
        build_index(f"{server.url}/")


def test_a_shard_replaced_by_one_of_the_same_size_is_named(copy: Path) -> None:
    path = copy / "00001.tar"
    data = bytearray(path.read_bytes())
    path.touch()
    open_index([str(copy)])  # another time, the same bytes
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard .*copy/00001\.tar was changed after it was indexed; build it with"):
        open_index([str(copy)])
    assert build_index(str(copy)).samples == 23
    open_index([str(copy)])


FFPROBE = {
    "streams": [
        {"codec_type": "audio", "duration": "9.0"},
        {
            "codec_type": "video",
            "width": 320,
            "height": 240,
            "r_frame_rate": "30000/1001",
            "nb_frames": "60",
            "duration": "2.002",
        },
    ],
    "format": {"duration": "2.0"},
}


def test_video2dataset_shards(tmp_path: Path) -> None:
    """Failures keep text and json; clips have a number of their own; ffprobe's answer is in the json."""
    about: dict[str, Any] = {"url": "http://x", "caption": "a dog", "key": "00000000", "status": "success"}
    about["error_message"] = None
    clip = about | {"key": "00000002_00001", "clips": [[1.0, 2.5]], "yt_meta_dict": {}, "video_metadata": FFPROBE}
    clip |= {"AESTHETIC_SCORE": 5.5, "LANGUAGE": "en", "videoid": 17, "page_dir": "x" * 500}
    failed = about | {"key": "00000001", "status": "failed_to_download", "error_message": "404"}
    cut = about | {"key": "00000003", "status": "failed_to_subsample", "error_message": "no stream"}
    write_tar(
        tmp_path / "set/00000.tar",
        {
            "00000001.txt": b"a cat",
            "00000001.json": failed,
            "00000000.mp4": b"v",
            "00000000.txt": b"a dog",
            "00000000.json": about,
            "00000003.json": cut,
            "00000002_00001.mp4": b"w",
            "00000002_00001.txt": b"a dog",
            "00000002_00001.json": clip,
        },
    )
    built = build_index(str(tmp_path / "set"))
    assert (built.samples, built.left_out) == (2, {"recorded as failed": 2})
    one, two = rows_of(open_index([str(tmp_path / "set")]))
    assert (one.key, one.meta) == ("00000000", {})
    assert two.key == "00000002_00001"
    expected: dict[str, Any] = {
        "width": 320.0,
        "height": 240.0,
        "fps": pytest.approx(29.97, abs=0.001),
        "frames": 60.0,
        "duration": 2.002,
        "AESTHETIC_SCORE": 5.5,
        "LANGUAGE": "en",
        "videoid": 17.0,
    }
    assert two.meta == expected


@pytest.mark.parametrize(
    ("says", "width", "height"),
    [
        ({}, 1920, 1080),
        ({"side_data_list": [{"displaymatrix": "x"}, {"rotation": -90}]}, 1080, 1920),
        ({"tags": {"rotate": "270"}}, 1080, 1920),
        ({"tags": {"rotate": "180"}, "side_data_list": "junk"}, 1920, 1080),
        ({"tags": {"rotate": "nan"}}, 1920, 1080),
        ({"sample_aspect_ratio": "4:3"}, 2560, 1080),
        ({"sample_aspect_ratio": "4:3", "side_data_list": [{"rotation": 90}]}, 1080, 2560),
        ({"sample_aspect_ratio": "0:1"}, 1920, 1080),
        ({"sample_aspect_ratio": "1:100"}, 1920, 1080),
        ({"sample_aspect_ratio": ["x"], "tags": None}, 1920, 1080),
    ],
)
def test_the_size_of_a_video_is_that_of_its_frames_as_shown(says: dict[str, Any], width: int, height: int) -> None:
    stream = {"codec_type": "video", "width": 1920, "height": 1080, **says}
    found = module._meta(Scanned("k", 0, members={"mp4": (0, 1)}, meta={"video_metadata": {"streams": [stream]}}))
    assert found == {"meta.width": width, "meta.height": height}


def test_img2dataset_shards_are_images_of_one_frame_in_the_size_that_is_stored(tmp_path: Path) -> None:
    about = {"caption": "x", "status": "success", "width": 256, "height": 192, "exif": "{}", "sha256": "f" * 64}
    about |= {"original_width": 1024, "original_height": 768}
    failed = about | {"status": "failed_to_resize", "width": None, "height": None}
    write_tar(
        tmp_path / "set/00000.tar",
        {
            "000000000.jpg": b"j",
            "000000000.txt": b"x",
            "000000000.json": about,
            "000000001.json": failed,
            "000000001.txt": b"x",
            "000000002.webp": b"w",
            "000000003.mp4": b"v",
            "000000003.jpg": b"thumbnail",
            "000000004.txt": b"alone",
            "000000005.png": b"p",
            "000000005.json": {"frames": 3},
        },
    )
    assert build_index(str(tmp_path / "set")).left_out == {"recorded as failed": 1}
    index = open_index([str(tmp_path / "set")])
    metas = {record.key[-1]: record.meta for record in rows_of(index)}
    assert (metas["0"]["frames"], metas["0"]["width"], metas["0"]["height"]) == (1, 256, 192)
    assert metas["2"] == {"frames": 1}
    assert metas["3"] == metas["4"] == {}
    assert metas["5"] == {"frames": 3}
    buckets = (Bucket(frames=8, height=64, width=64, size=2), Bucket(frames=1, height=192, width=256, size=4))
    selection = select(index, (), ClipConfig(buckets=buckets).sizes)
    assert [list(rows) for rows in selection.rows] == [[], [0]]


def test_plain_webdataset_shards(tmp_path: Path) -> None:
    """Folders in names, extensions of several parts and in capitals, names with dots in folders, ``./`` in front."""
    write_tar(
        tmp_path / "set/train-{000}.tar",
        {
            "./v1.0/day one/clip_é.MP4": b"1",
            "./v1.0/day one/clip_é.caption.txt": b"2",
            "b.seg.png": b"3",
            "b.cls": b"4",
            "__MACOSX/._b.cls": b"",
            "README": b"",
        },
    )
    built = build_index(str(tmp_path / "set"))
    assert (built.samples, built.left_out) == (2, {"name without an extension": 2})
    one, two = rows_of(open_index([str(tmp_path / "set")]))
    assert (one.key, read_sample(one)) == ("./v1.0/day one/clip_é", {"mp4": b"1", "caption.txt": b"2"})
    assert (two.key, read_sample(two), two.meta) == ("b", {"seg.png": b"3", "cls": b"4"}, {})


def test_sidecar_shards_of_captions_and_flow_join_by_shard_and_key(tmp_path: Path) -> None:
    done = {"status": "success"}
    for shard in range(2):
        keys = [f"0000{shard}00{number}" for number in range(4)]
        write_tar(
            tmp_path / f"videos/{shard:05d}.tar",
            {f"{key}.{e}": d for key in keys for e, d in (("mp4", key.encode()), ("json", done))},
        )
        write_tar(
            tmp_path / f"captions/{shard:05d}.tar",
            {
                f"{key}.{e}": d
                for key in reversed(keys[1:])
                for e, d in (("txt", b"seen"), ("json", done | {"vblip": "x"}))
            },
        )
        write_tar(tmp_path / f"flow/{shard:05d}.tar", {f"{key}.npy": b"" for key in keys[:3]})
    folders = {name: str(tmp_path / name) for name in ("videos", "captions", "flow")}
    for folder in folders.values():
        build_index(folder)
    (source,) = open_sources([ShardSet(folders=(folders["videos"],), join=(folders["captions"], folders["flow"]))], [])
    assert len(source.selection) == 4
    for place in range(4):
        records = source.records(0, place)
        assert len({record.key for record in records}) == 1
        assert [sorted(record.members) for record in records] == [["json", "mp4"], ["json", "txt"], ["npy"]]
        assert len({record.shard.rsplit("/", 1)[-1] for record in records}) == 1


def test_folders_of_frames_are_samples(tmp_path: Path) -> None:
    frames = {f"a.{number:05d}.jpg": b"%d" % number for number in range(MOST_FRAMES + 3)}
    others = {f"b.{number}.png": b"" for number in (3, 1, 2)}
    parts = {f"c.part{number}.bin": b"" for number in range(MOST_MEMBERS + 2)}
    write_tar(
        tmp_path / "set/0.tar", {**frames, "a.json": {"frames": 99, "width": 64, "height": 48}, **others, **parts}
    )
    built = build_index(str(tmp_path / "set"))
    assert built.left_out == {
        f"more than {MOST_FRAMES} frames in a sample": 3,
        f"more than {MOST_MEMBERS} members in a sample": 2,
    }
    one, two, three = rows_of(open_index([str(tmp_path / "set")]))
    assert one.meta == {"frames": MOST_FRAMES, "width": 64, "height": 48}
    assert two.meta == {"frames": 3}
    assert three.meta == {}
    members = read_sample(one)
    assert len(members) == MOST_FRAMES + 1
    assert all(members[f"{number:05d}.jpg"] == b"%d" % number for number in range(MOST_FRAMES))
    assert len(three.members) == MOST_MEMBERS


def test_the_commonest_extensions_are_kept_and_others_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_EXTENSIONS", 2)
    monkeypatch.setattr(module, "_GROUP", 1)
    for shard in range(2):
        members = {f"{number}.{e}": b"x" for number in range(9) for e in (f"v{shard}{number}.mp4", "mp4", "txt")}
        write_tar(tmp_path / f"set/{shard}.tar", members)
    built = build_index(str(tmp_path / "set"))
    assert built.left_out == {"member whose extension is none of the 2 commonest": 18}
    index = open_index([str(tmp_path / "set")])
    assert len(index) == 18
    for record in rows_of(index):
        assert read_sample(record) == {"mp4": b"x", "txt": b"x"}


def test_names_of_shards_may_be_any_that_a_file_system_takes(samples: list[ShardSample], tmp_path: Path) -> None:
    write_shard(str(tmp_path), 0, samples[:2])
    for name in (b"\xff\xfe.tar", "ä #?%41 {1..2}.tar".encode(), b"new\nline.tar"):
        shutil.copy(os.fsencode(tmp_path / "00000.tar"), os.fsencode(tmp_path) + b"/" + name)
    assert build_index(str(tmp_path)).samples == 8
    for record in rows_of(open_index([str(tmp_path)])):
        assert read_sample(record)["mp4"] in (samples[0].members["mp4"], samples[1].members["mp4"])


def test_rows_of_a_selection_that_a_cleaner_took_are_chosen_anew(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    index = open_index([str(copy)])
    sizes = [ClipConfig(frames=frames, height=24, width=24) for frames in (4, 14)]
    first = [list(rows) for rows in select(index, [], sizes).rows]
    assert [len(rows) for rows in first] == [0, 23]
    (folder,) = (tmp_path / "cache/selections").iterdir()
    kept = sorted(path.name for path in folder.glob("rows-*"))
    assert kept == ["rows-0.npy"]  # the other one is all rows
    (folder / "rows-0.npy").unlink()
    assert [list(rows) for rows in select(index, [], sizes).rows] == first
    assert (folder / "rows-0.npy").exists()
