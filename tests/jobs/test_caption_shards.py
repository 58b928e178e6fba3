"""Sidecars of captions: what the real loader reads of a set that they are joined to."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvdm.config import ClipConfig, DataConfig, ShardSet, VideoSource
from lvdm.data.batch import VideoBatch
from lvdm.data.build_index import build_index
from lvdm.data.encode import encode_mp4
from lvdm.data.fetch import read_sample
from lvdm.data.index import open_index
from lvdm.data.loader import build_loader
from lvdm.data.sources import open_sources
from lvdm.data.writer import ShardSample, write_shard
from lvdm.errors import UserError
from lvdm.jobs.caption_shards import CaptionList, Sidecar, make_caption_shards, read_captions
from lvdm.synthetic import combinations, render
from tests.commands import call

NAMES = ("00000", "00001", "part-b")
PER_SHARD = 3


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Nine clips in three shards, the last of which has a name of its own; not to be changed."""
    folder = str(tmp_path_factory.mktemp("videos"))
    for shard, name in enumerate(NAMES):
        write_shard(folder, name, [clip(f"{shard}{number:04d}") for number in range(PER_SHARD)])
    build_index(folder)
    return folder


def clip(key: str) -> ShardSample:
    """A clip that is called by its key."""
    video = encode_mp4(render(combinations()[0], 0, frames=4, size=16), 8)
    meta = {"caption": f"old {key}", "width": 16, "height": 16, "fps": 8.0, "frames": 4, "score": 1.0}
    return ShardSample(key, {"mp4": video, "txt": f"old {key}".encode()}, meta)


def write_list(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(rows: list[dict[str, Any]], shards: str, tmp_path: Path, **how: Any) -> tuple[Sidecar, str]:
    out = str(tmp_path / "captions")
    return make_caption_shards(out, read_captions(write_list(tmp_path / "list.jsonl", rows)), shards, **how), out


def trained_on(shards: str, sidecar: str, captions: dict[str, float], epochs: int = 1, **how: Any) -> list[str]:
    """The captions that training sees of a set with its sidecar."""
    data = DataConfig(
        kind="video",
        workers=0,
        text_dropout=0.0,
        video=VideoSource(
            shards=(ShardSet(folders=(shards,), join=(sidecar,), **how),),
            clip=ClipConfig(frames=2, height=16, width=16),
            captions=captions,
        ),
    )
    samples = len(open_sources(data.video.shards, [])[0].selection) if data.video else 0
    loader = build_loader(data, seed=3, batch=samples, micro=samples, world=1, rank=0, steps=epochs)
    batches = [batch for batch in loader if isinstance(batch, VideoBatch)]
    assert not [entry for batch in batches for entry in batch.replaced]
    return [caption for batch in batches for caption in batch.captions]


def test_training_sees_the_new_captions_beside_the_old_videos(shards: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"key": "00001", "caption": "new one", "score": 5.0},
        {"key": "20002", "caption": " new two\n", "tags": ["a", "b"]},
        {"key": "10000", "caption": "", "score": None},
        {"key": "nobody", "caption": "new three"},
    ]
    calls: list[tuple[int, int]] = []
    made, out = make(rows, shards, tmp_path, progress=lambda *call: calls.append(call))
    assert (made.shards, made.samples, made.listed, made.texts) == (3, 9, 3, 2)
    assert (made.bare, made.first_bare[:2]) == (6, ("00000.tar 00000", "00000.tar 00002"))
    assert (made.strangers, made.first_strangers) == (1, ("nobody",))
    assert calls == [(3, 9), (6, 9), (9, 9)]
    index, source = open_index([out]), open_index([shards])
    where = [(Path(one[row].shard).name, one[row].key) for one in (index, source) for row in range(9)]
    assert where[:9] == where[9:]
    assert read_sample(index[1]) == {
        "json": json.dumps({"caption": "new one", "score": 5.0}, indent=4).encode(),
        "txt": b"new one",
    }
    assert read_sample(index[0]) == {"json": b"{}"}
    old = {f"old {shard}{number:04d}" for shard in range(3) for number in range(3)}
    seen = trained_on(shards, out, {})
    assert sorted(seen) == sorted((old - {"old 00001", "old 20002"}) | {"new one", "new two"})
    assert [one[0].meta.get("frames") for one in (index, source)] == [None, 4]


def test_captions_are_drawn_by_weight_among_old_and_new(shards: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"key": "00001", "llava": ["long one", "long two"]},
        {"key": "00002", "llava": "alone", "language": "en"},
    ]
    made, out = make(rows, shards, tmp_path)
    assert made.texts == 0
    weights = {"txt": 1.0, "llava": 3.0}
    seen = Counter(trained_on(shards, out, weights, epochs=200))
    assert {name: seen[name] for name in ("old 00000", "old 10000")} == {"old 00000": 200, "old 10000": 200}
    assert seen["old 00001"] + seen["long one"] + seen["long two"] == 200
    assert abs(seen["old 00001"] - 50) < 20
    assert abs(seen["long one"] - 75) < 22
    assert abs(seen["alone"] - 150) < 20
    assert set(trained_on(shards, out, {"llava": 1.0}, where=("language == en",))) == {"alone"}


def test_only_what_is_listed(shards: str, tmp_path: Path) -> None:
    rows = [{"key": "10001", "caption": "one"}, {"key": "20000", "caption": "two"}]
    made, out = make(rows, shards, tmp_path, only_listed=True)
    assert (made.shards, made.samples, made.bare) == (2, 2, 7)
    assert sorted(path.name for path in Path(out).glob("*.tar")) == ["00001.tar", "part-b.tar"]
    assert made.first_bare[0] == "00000.tar 00000"
    assert sorted(trained_on(shards, out, {})) == ["one", "two"]


def test_keys_that_return_need_their_shards(tmp_path: Path) -> None:
    twice = str(tmp_path / "twice")
    for name in ("00000", "00001"):
        write_shard(twice, name, [clip("a"), clip(f"b{name}")])
    build_index(twice)
    rows = [{"key": "a", "caption": "one"}]
    with pytest.raises(UserError, match=r"list\.jsonl: a is in 00000\.tar and in 00001\.tar; add a column shard"):
        make(rows, twice, tmp_path)
    assert not (tmp_path / "captions").exists()
    named: list[dict[str, Any]] = [
        {"shard": "00000.tar", "key": "a", "caption": "one"},
        {"shard": "s3://elsewhere/00001.tar", "key": "a", "caption": "two"},
        {"shard": 1, "key": "b00001", "caption": "three"},
        {"shard": "00000", "key": "b00001", "caption": "nobody's"},
    ]
    made, out = make(named, twice, tmp_path)
    assert made.first_strangers == ("00000.tar b00001",)
    index = open_index([out])
    assert [read_sample(index[row]).get("txt") for row in range(4)] == [b"one", None, b"two", b"three"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_lists_of_other_kinds(kind: str, shards: str, tmp_path: Path) -> None:
    path = tmp_path / f"list.{kind}"
    between = {"csv": ",", "tsv": "\t", "parquet": ""}[kind]
    columns = {"key": ["10000", "10001"], "text": ["1", "2"], "score": [0.5, None], "status": ["failed_x", "success"]}
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        lines = [list(columns), ["10000", "1", "0.5", "failed_x"], ["10001", "2", "", "success"]]
        path.write_text("".join(f"{between.join(line)}\n" for line in lines))
    out = str(tmp_path / "captions")
    make_caption_shards(out, read_captions(str(path)), shards, only_listed=True)
    index = open_index([out])
    assert [read_sample(index[row])["txt"] for row in range(2)] == [b"1", b"2"]
    assert json.loads(read_sample(index[0])["json"]) == {"text": "1", "score": 0.5}
    assert json.loads(read_sample(index[1])["json"]) == {"text": "2"}
    assert index[0].meta["score"] == 0.5


@pytest.mark.parametrize(
    ("rows", "column", "fault"),
    [
        ([{"caption": "x"}], "", "has no column key; it has caption"),
        ([{"key": "00000", "text": "x"}], "blip", "has no column blip; it has key, text"),
        ([{"key": "00000"}, {"key": None}], "", "row 2: key is empty"),
        ([{"key": "a", "shard": "x"}, {"key": "b"}], "", "row 2: shard is empty"),
        ([{"key": "00000"}, {"key": "00000"}], "", "row 2: 00000 has a row already"),
        ([{"key": "00000", "caption": ["a"]}], "", "row 1: caption is a list, and a .txt holds one caption"),
        ([{"key": "nobody"}], "", "no row of .* is about a sample of .*, not even nobody"),
    ],
)
def test_faults_are_named_and_leave_nothing(
    rows: list[dict[str, Any]], column: str, fault: str, shards: str, tmp_path: Path
) -> None:
    path = write_list(tmp_path / "list.jsonl", rows)
    with pytest.raises(UserError, match=fault):
        make_caption_shards(str(tmp_path / "captions"), read_captions(path, column), shards)
    assert not (tmp_path / "captions").exists()


def test_a_used_folder_is_refused(shards: str) -> None:
    before = sorted(Path(shards).iterdir())
    captions = CaptionList("list", {("", "00000"): {"key": "00000"}}, "", by_shard=False)
    with pytest.raises(UserError, match="already holds shards"):
        make_caption_shards(shards, captions, shards)
    assert sorted(Path(shards).iterdir()) == before


def test_the_command_line(shards: str, tmp_path: Path) -> None:
    path, out = tmp_path / "list.csv", str(tmp_path / "captions")
    path.write_text("key,blip,caption\n00000,seen,unused\n9,,\n")
    arguments = ["--file", str(path), "--shards", shards, "--out", out, "--caption-column", "blip"]
    done = call("tools/make_shards.py", "captions", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"{out}: 9 samples in 3 shards, 1 listed, 1 captions" in done.stdout
    assert "8 samples have no row, the first: 00000.tar 00001, " in done.stdout
    assert "1 rows match no sample, the first: 9" in done.stdout
    assert read_sample(open_index([out])[0])["txt"] == b"seen"
