"""What a set is, from its index: the numbers, the sheet, and how fast a million samples are summed up."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lvdm.config import ClipConfig, Condition
from lvdm.data.index import COLUMNS, MEMBER, VERSION, ends_of
from lvdm.data.writer import ShardSample, write_shard
from lvdm.jobs.inspect_shards import inspect_shards, write_sheet
from tests.data.conftest import SAMPLES, write_set
from tests.data.test_index import write_tar
from tools.inspect_shards import main

TOOL = Path(__file__).resolve().parents[2] / "tools/inspect_shards.py"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the tool prints, as one line of words."""
    monkeypatch.setattr(sys, "argv", ["inspect_shards", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    main()
    return " ".join(capsys.readouterr().out.split())


def test_the_numbers_are_those_of_the_samples(samples: list[ShardSample], shards: str) -> None:
    found = inspect_shards([shards])
    assert (found.samples, found.shards) == (SAMPLES, 3)
    assert found.bytes == sum(path.stat().st_size for path in Path(shards).glob("*.tar"))
    assert set(found.members) == {"mp4", "txt", "json"}
    videos = [len(sample.members["mp4"]) for sample in samples]
    assert found.members["mp4"] == {"members": 23, "bytes": sum(videos), "median": int(np.median(videos))}
    least = {"samples": 23, "least": 1.75, "median": 1.75, "95 %": 1.75, "largest": 1.75, "sum": 23 * 1.75}
    assert found.numbers["duration"] == least
    assert found.numbers["fps"]["median"] == 8
    assert found.numbers["width"]["largest"] == 24
    assert (found.left_out, found.damaged, found.kept, found.removed) == ({}, {}, {}, {})


def test_spread_texts_and_failures_are_told(tmp_path: Path) -> None:
    members: dict[str, bytes | dict[str, Any]] = {}
    for number in range(20):
        about: dict[str, Any] = {"score": number, "language": "en" if number < 12 else f"x{number % 7}", "url": "u"}
        about |= {"checked": number == 3, "mixed": number if number % 2 else "odd"}
        members[f"{number:03d}.mp4"] = b"v" * number
        members[f"{number:03d}.json"] = about | ({"status": "failed_to_download"} if number >= 18 else {})
        members |= {f"{number:03d}.{frame:04d}.jpg": b"12" for frame in range(number)}
    write_tar(tmp_path / "set/0.tar", members)
    folder = write_set(tmp_path / "set", [])
    found = inspect_shards([folder])
    assert found.samples == 18
    assert found.left_out == {"recorded as failed": 2}
    assert found.numbers == {
        "score": {"samples": 18, "least": 0, "median": 8.5, "95 %": pytest.approx(16.15), "largest": 17, "sum": 153}
    }
    assert found.texts["language"] == {"en": 12, "x0": 1, "x1": 1, "x2": 1, "x3": 1, "2 others": 2}
    assert found.texts["checked"] == {"false": 17, "true": 1}
    assert found.texts["mixed"]["odd"] == 9
    assert found.members["*.jpg"] == {"members": 153, "bytes": 306, "median": 2}
    assert set(found.members) == {"*.jpg", "json", "mp4"}


def test_conditions_and_sizes_say_what_they_keep(
    shards: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [Condition(field="duration", comparison=">=", value=2.0)]
    assert inspect_shards([shards], where).kept == {"all": 0}
    assert inspect_shards([shards], where).removed == {"duration >= 2.0": 23}
    sizes = [ClipConfig(frames=frames, height=16, width=16) for frames in (99, 8)]
    assert inspect_shards([shards], [], sizes).kept == {"99 x 16 x 16": 0, "8 x 16 x 16": 23}
    text = call(monkeypatch, capsys, shards, "--where", "fps == 8", "--size", "99x16x16", "--size", "8x16x16")
    assert "23 samples in 3 shards" in text
    assert "removed: 0 by fps == 8.0" in text
    assert "kept: 0 (99 x 16 x 16) kept: 23 (8 x 16 x 16)" in text
    assert "duration │ 23 │ 1.75" in text


def test_damaged_shards_are_named(
    samples: list[ShardSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad[red].tar").write_bytes(b"no tar" * 100)
    folder = write_set(tmp_path, samples[:3])
    text = call(monkeypatch, capsys, folder)
    assert "left out of the index: 1 shard damaged from some byte on" in text
    assert "bad[red].tar is damaged at byte 0: that is no header of a tar" in text
    assert list(inspect_shards([folder]).damaged) == [f"{folder}/bad[red].tar"]


def test_json_is_what_the_tables_show(
    shards: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = call(monkeypatch, capsys, shards, shards, "--json", "--where", "width > 1")
    found = json.loads(text)
    assert found == inspect_shards([shards, shards], [Condition(field="width", comparison=">", value=1)]).as_json()
    assert (found["samples"], found["kept"]) == (46, {"all": 46})


def test_a_sheet_shows_samples_from_end_to_end_and_names_what_it_cannot(
    samples: list[ShardSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ShardSample("bad", {"mp4": b"junk", "txt": b"x"}, {"width": 9})
    folder = write_set(tmp_path / "set", [*samples[:4], bad])
    assert "not shown: bad in" in call(monkeypatch, capsys, folder, "--sheet", tmp_path / "look.png", "--rows", 3)
    with Image.open(tmp_path / "look.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[0] > 2 * 24
    assert pixels.std() > 10
    (again,) = write_sheet([folder], tmp_path / "all.png", 99)
    assert again.startswith(f"bad in {folder}/00000.tar: ")
    with Image.open(tmp_path / "all.png") as sheet:
        assert sheet.height > pixels.shape[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "no such folder of shards: nowhere"),
        (("unindexed",), "unindexed has no index.arrow; build it with: python tools/index_shards.py unindexed"),
        (("SET", "--where", "durration > 2"), "has no field durration (did you mean duration?); it has duration"),
        (("SET", "--where", "duration"), "--where 'duration' is not of the form FIELD COMPARISON VALUE"),
        (("SET", "--where", "duration > long"), "condition duration > long: duration is a number, which 'long' is not"),
        (
            ("SET", "--where", "duration in 2,a"),
            "condition duration in (2.0, 'a'): duration is a number, which 'a' is not",
        ),
        (("SET", "--where", "duration >= "), "--where 'duration >= ' is not of the form FIELD COMPARISON VALUE"),
        (("SET", "--where", "duration > [1"), "'[1' is not valid YAML"),
        (("SET", "--where", "duration > 1e999"), "'1e999' is no number, text or boolean"),
        (("SET", "--where", "duration == null"), "'null' is no number, text or boolean"),
        (("SET", "--size", "16x256"), "--size '16x256' is not of the form FRAMESxHEIGHTxWIDTH"),
        (("SET", "--size", "0x8x8"), "--size '0x8x8' is not of the form"),
        (("SET", "--size", "²x8x8"), "--size '²x8x8' is not of the form"),
        (("SET", "--size", "8x8x8", "--stride", "0"), "--stride 0 is less than 1"),
        (("SET", "--sheet", "look.png", "--where", "width > 99"), "no samples are left to show"),
        (("SET", "--sheet", "look.png", "--rows", "0"), "--rows 0: a sheet shows at least 1 sample"),
        (("SET", "--sheet", "unindexed"), "cannot write unindexed"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    shards: str,
    samples: list[ShardSample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard("unindexed", 0, samples[:1])
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, capsys, *(shards if argument == "SET" else argument for argument in arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("inspect_shards: error: ")
    assert error.count("\n") == 1


def test_a_mistake_ends_the_process_with_2(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOL, "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "inspect_shards: error: no such folder of shards: nowhere\n"


def write_million(folder: Path, rows: int) -> None:
    """An index of so many samples in one shard that is a hole of their size, in batches as the builder writes them."""
    folder.mkdir()
    with open(folder / "0.tar", "wb") as shard:
        shard.truncate(rows * 4096)
    tag = f"mtime_ns:{(folder / '0.tar').stat().st_mtime_ns}"
    files = [{"name": "0.tar", "size": rows * 4096, "tag": tag, "ends": ends_of(folder / "0.tar")}]
    about = {"version": VERSION, "shards": files, "extensions": ["mp4", "txt", "json"], "left_out": {}, "damaged": {}}
    numbers = np.arange(rows)
    starts = numbers * 4096
    inner = [np.tile(np.arange(3, dtype=np.int16), rows), np.repeat(starts, 3), np.tile([2000, 20, 300], rows)]
    members = pa.StructArray.from_arrays([pa.array(values) for values in inner], fields=list(MEMBER))
    texts = pa.array(numbers).cast(pa.string())
    columns = {
        "shard": pa.array(np.zeros(rows, np.int32)),
        "key": texts,
        "offset": pa.array(starts),
        "size": pa.array(np.full(rows, 4096)),
        "members": pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * 3), members),
        "meta.duration": pa.array(numbers % 977 / 10),
        "meta.frames": pa.array(numbers % 300 + 1.0),
        "meta.width": pa.array(np.where(numbers % 2, 640.0, 360.0)),
        "meta.height": pa.array(np.where(numbers % 2, 360.0, 640.0)),
        "meta.sha256": texts,
        "meta.language": pa.array(np.array(["en", "de", "fr"])[numbers % 3]),
    }
    table = pa.table(columns, metadata={"lvdm": json.dumps(about)})
    assert list(columns)[:5] == list(COLUMNS)
    with pa.ipc.new_file(str(folder / "index.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=65536)


def test_a_million_samples_are_summed_up_in_about_a_second(tmp_path: Path) -> None:
    write_million(tmp_path / "set", 1_000_000)
    begin = time.process_time()
    where = [Condition(field="duration", comparison=">=", value=2.0)]
    sizes = [ClipConfig(frames=16, height=256, width=448), ClipConfig(frames=16, height=448, width=256)]
    found = inspect_shards([str(tmp_path / "set")], where, sizes)
    assert time.process_time() - begin < 3
    assert found.samples == 1_000_000
    assert found.members["mp4"] == {"members": 1_000_000, "bytes": 2_000_000_000, "median": 2000}
    assert found.texts["language"] == {"en": 333_334, "de": 333_333, "fr": 333_333}
    assert list(found.texts["sha256"])[-1] == "999995 others"
    assert found.numbers["duration"]["largest"] == 97.6
    assert sum(found.kept.values()) + sum(found.removed.values()) == 1_000_000
    assert min(found.kept.values()) > 400_000
