from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lvdm.data.decode import decode_frames, probe
from lvdm.data.decode import footage as footage_of
from lvdm.data.encode import encode_mp4
from lvdm.data.fetch import read_sample
from lvdm.data.index import open_index
from lvdm.errors import UserError
from lvdm.jobs.make_shards import Source, footage, make_shapes, make_video_shards, read_folder, read_list
from lvdm.synthetic import HELD_OUT, caption, combinations, render
from tests.commands import call


def video(number: int = 0, frames: int = 24, size: int = 32, fps: float = 8.0) -> bytes:
    return encode_mp4(render(combinations()[number], number, frames, size), fps)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three videos, of which the second one is cut off; the third one has no caption."""
    videos = tmp_path / "videos"
    (videos / "deep").mkdir(parents=True)
    (videos / "a.mp4").write_bytes(video(0))
    (videos / "a.txt").write_text("the first\n")
    (videos / "b.mp4").write_bytes(video(1)[:1500])
    (videos / "b.txt").write_text("the second")
    (videos / "deep/c.MP4").write_bytes(video(2, size=48))
    (videos / "notes.txt").write_text("no video")
    return videos


def shapes(out: Path, seed: int = 0) -> None:
    made = make_shapes(str(out), clips=30, held_out_clips=7, frames=6, size=32, fps=8, seed=seed, shard_size=16)
    assert [part.samples for part in made] == [30, 7]
    assert [part.shards for part in made] == [2, 1]


def captions(out: Path) -> list[str]:
    index = open_index([str(out)])
    return [read_sample(index[row])["txt"].decode() for row in range(len(index))]


def test_shapes_are_deterministic_and_keep_what_is_held_out_apart(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        shapes(tmp_path / name, seed)
    for tar in ("train/00000.tar", "train/00001.tar", "held_out/00000.tar"):
        assert (tmp_path / "one" / tar).read_bytes() == (tmp_path / "two" / tar).read_bytes()
        assert (tmp_path / "one" / tar).read_bytes() != (tmp_path / "other" / tar).read_bytes()
    held_out = set(map(caption, HELD_OUT))
    train = captions(tmp_path / "one/train")
    assert len(set(train)) == 30
    assert not set(train) & held_out
    assert set(captions(tmp_path / "one/held_out")) <= held_out


def test_shapes_are_the_rendered_ones(tmp_path: Path) -> None:
    shapes(tmp_path)
    record = open_index([str(tmp_path / "held_out")])[3]
    members = read_sample(record)
    (combination,) = [c for c in HELD_OUT if caption(c).encode() == members["txt"]]
    rendered = render(combination, 0, 6, 32)
    assert members["mp4"] == encode_mp4(rendered, 8)
    assert json.loads(members["json"])["motion"] == combination.motion
    size = {"width": 32, "height": 32, "fps": 8.0, "frames": 6, "duration": 0.75}
    assert record.meta == size | {name: getattr(combination, name) for name in ("shape", "color", "motion")}


def test_a_folder_of_videos(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    out = str(tmp_path / "out")
    made = make_video_shards(out, read_folder(str(folder)), shard_size=2, progress=lambda *call: calls.append(call))
    assert (made.samples, made.shards) == (2, 2)
    assert [(Path(where).name, bool(why)) for where, why in made.failed] == [("b.mp4", True)]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    index = open_index([out])
    first, third = read_sample(index[0]), read_sample(index[1])
    assert first["mp4"] == (folder / "a.mp4").read_bytes()  # neither cut nor resized: not encoded anew
    assert (first["txt"], third["txt"]) == (b"the first", b"")
    assert index[1].meta["width"] == 48
    stats = json.loads((tmp_path / "out/00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_subsample"]) == (2, 1, 1)
    row = pq.read_table(tmp_path / "out/00000.parquet").to_pylist()[1]
    assert row["status"] == "failed_to_subsample"
    assert row["error_message"] == made.failed[0][1]
    assert row["url"].endswith("b.mp4")
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        assert {name.split(".")[0] for name in tar.getnames()} == {index[0].key}


def test_cutting_and_resizing(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    source = Source(str(folder / "deep/c.MP4"), "a shape", {"tag": 7}, start=0.5, end=2.9)  # frames 4 to 22
    made = make_video_shards(out, [source], shard_size=10, clip_seconds=1.0, size=16)
    assert made.samples == 2
    original = decode_frames((folder / "deep/c.MP4").read_bytes(), range(24), 16, 16)
    index = open_index([out])
    for row in range(2):
        record = index[row]
        members = read_sample(record)
        assert record.key == f"000000_{row:05d}"
        meta = json.loads(members["json"])
        assert (meta["tag"], meta["clips"], meta["frames"]) == (7, [[0.5 + row, 1.5 + row]], 8)
        info = probe(members["mp4"])
        assert (info.frames, info.height, info.width, info.fps) == (8, 16, 16, 8.0)
        clip = decode_frames(members["mp4"], range(8), 16, 16).astype(float)
        expected = original[4 + 8 * row : 12 + 8 * row]
        assert abs(clip - expected).mean() < 6  # of 255: encoded twice
        later = original[5 + 8 * row : 13 + 8 * row]
        assert abs(clip - expected).mean() < abs(clip - later).mean()


def test_folders_of_frames(tmp_path: Path) -> None:
    frames = render(combinations()[3], 0, frames=12, size=32)
    (tmp_path / "videos/sky/clip_7").mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"videos/sky/clip_7/frame{number}.PNG")
    (tmp_path / "videos/sky/clip_7.txt").write_text("clouds pass")
    sources = read_folder(str(tmp_path / "videos"), frames_fps=6)
    assert [(Path(s.location).name, s.caption) for s in sources] == [("clip_7", "clouds pass")]
    make_video_shards(str(tmp_path / "whole"), sources, shard_size=10)
    record = open_index([str(tmp_path / "whole")])[0]
    assert (record.meta["frames"], record.meta["fps"], record.meta["duration"]) == (12, 6, 2)
    members = read_sample(record)
    assert members["0010.png"] == (tmp_path / "videos/sky/clip_7/frame10.PNG").read_bytes()
    np.testing.assert_array_equal(decode_frames(footage_of(members), [2, 10, 11], 32, 32), frames[[2, 10, 11]])
    make_video_shards(str(tmp_path / "cut"), sources, shard_size=10, clip_seconds=1.0)
    index = open_index([str(tmp_path / "cut")])
    assert len(index) == 2
    clip = decode_frames(read_sample(index[1])["mp4"], range(6), 32, 32)
    assert abs(clip.astype(float) - frames[6:]).mean() < 6
    made = make_video_shards(
        str(tmp_path / "unknown"), [*read_folder(str(tmp_path / "videos")), sources[0]], shard_size=10, clip_seconds=1.0
    )
    assert [reason for _, reason in made.failed] == ["the frame rate is unknown, so it cannot be cut"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_list(kind: str, folder: Path, tmp_path: Path) -> None:
    rows = [
        {"url": "videos/a.mp4", "text": "one", "start": "", "end": "00:00:01.5", "score": 3},
        {"url": f"file://{folder}/a.mp4", "text": "two", "start": "1", "end": "", "score": 4},
        {"url": "videos/nowhere.mp4", "text": "three", "start": "", "end": "", "score": 5},
    ]
    path = tmp_path / f"list.{kind}"
    if kind in ("csv", "tsv"):
        with open(path, "w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    sources = read_list(str(path))
    assert [(s.caption, s.start, s.end, s.meta) for s in sources] == [
        ("one", 0.0, 1.5, {"score": 3}),
        ("two", 1.0, None, {"score": 4}),
        ("three", 0.0, None, {"score": 5}),
    ]
    made = make_video_shards(str(tmp_path / "out"), sources, shard_size=5)
    index = open_index([str(tmp_path / "out")])
    assert [index[row].meta["frames"] for row in range(2)] == [12, 16]
    assert [Path(where).name for where, _ in made.failed] == ["nowhere.mp4"]
    stats = json.loads((tmp_path / "out/00000_stats.json").read_text())
    assert stats["failed_to_download"] == 1


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("path,caption\n", "has no rows"),
        ("file,caption\na.mp4,x\n", r"has no column path / url / video; it has file, caption"),
        ("path\n\nb.mp4\n,\n", r"row 2: path is empty"),
        ("path,caption\na.mp4,a dog, running\n", "row 1 has more cells than there are columns; quote its texts"),
        ("path,start\na.mp4,soon\n", r"row 1: start 'soon' is no time"),
        ("path,start,end\na.mp4,1,2\nb.mp4,3,2\n", r"row 2: end 2\.0 is not after start 3\.0"),
    ],
)
def test_faults_of_a_list_are_named(text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=fault):
        read_list(str(path))


def test_lists_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.mp4")
    with pytest.raises(UserError, match=r"a list is \.csv, \.tsv, \.jsonl or \.parquet, not \.txt"):
        read_list(str(tmp_path / "list.txt"))
    (tmp_path / "list.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"list\.jsonl cannot be parsed"):
        read_list(str(tmp_path / "list.jsonl"))
    (tmp_path / "list.jsonl").write_text("[]")
    with pytest.raises(UserError, match="each line must hold one JSON object"):
        read_list(str(tmp_path / "list.jsonl"))
    with pytest.raises(UserError, match="cannot read"):
        read_list(str(tmp_path / "none.csv"))


def test_links_out_of_a_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(video(3))
    (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(UserError, match=r"link\.mp4 is a link out of"):
        read_folder(str(folder))


def test_nothing_readable_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    sources = [Source(str(folder / "b.mp4")), Source(str(folder / "none.mp4"))]
    with pytest.raises(UserError, match="none of the videos can be read; the first fault: "):
        make_video_shards(str(tmp_path / "out"), sources, shard_size=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_used_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    source = [Source(str(folder / "a.mp4"))]
    make_video_shards(str(tmp_path / "out/train"), source, shard_size=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(UserError, match=r"out/train already holds shards"):
        make_video_shards(str(tmp_path / "out/train"), source, shard_size=1)
    with pytest.raises(UserError, match=r"out/train already holds shards"):
        shapes(tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_footage_is_cut_scene_by_scene(tmp_path: Path) -> None:
    sources = footage()
    assert {Path(source.location).name for source in sources} == {
        "bikes.mp4",
        "bigbuckbunny.mp4",
        "carphone_pristine.mp4",
    }
    assert len({source.caption for source in sources}) == len(sources) == 8
    made = make_video_shards(str(tmp_path), [sources[0], sources[-1]], shard_size=10, clip_seconds=0.8, size=32)
    assert made.samples == 1 + 5
    assert made.failed == ()
    index = open_index([str(tmp_path)])
    bus = read_sample(index[0])
    assert bus["txt"].startswith(b"a white bus")
    assert probe(bus["mp4"]).height == 32
    clip = decode_frames(bus["mp4"], range(20), 32, 32)
    assert np.std(clip) > 20


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = call("tools/make_shards.py", "folder", "--videos", str(folder), "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"{out}: 2 clips in 1 shards" in done.stdout
    assert "1 videos could not be read" in done.stdout
    assert "b.mp4: " in done.stdout
    assert "1 of 3 videos have no caption" in done.stdout
    again = call("tools/make_shards.py", "folder", "--videos", str(folder), "--out", out)
    assert again.returncode == 2
    assert again.stderr == f"make_shards: error: {out} already holds shards; delete it or choose another folder\n"
    (tmp_path / "out/index.arrow").unlink()
    indexed = call("tools/index_shards.py", out)
    assert indexed.returncode == 0
    assert indexed.stdout.endswith(f"{out}: 2 samples in 1 shards\n")
    assert len(open_index([out])) == 2


def test_numbers_and_booleans_of_a_csv_are_such(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,caption,score,checked,code\na.mp4,12,4.5,True,007\nb.mp4,x,,false,12\n")
    first, second = read_list(str(tmp_path / "a.csv"))
    assert (first.caption, first.meta) == ("12", {"score": 4.5, "checked": True, "code": "007"})
    assert second.meta == {"score": None, "checked": False, "code": "12"}
    (tmp_path / "b.csv").write_text("path,caption\n7,12\n8,13\n")  # but neither names nor captions
    assert [(Path(s.location).name, s.caption) for s in read_list(str(tmp_path / "b.csv"))] == [
        ("7", "12"),
        ("8", "13"),
    ]
