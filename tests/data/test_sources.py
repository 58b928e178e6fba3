"""Which samples are chosen, joined and grouped by size, and how a run goes on when its sets change."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lvdm.config import Bucket, ClipConfig, Condition, DataConfig, ShardSet, VideoSource
from lvdm.data.index import open_index
from lvdm.data.select import select
from lvdm.data.sources import Course, open_course, open_sources
from lvdm.data.writer import ShardSample
from lvdm.errors import UserError
from tests.data.conftest import write_set


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))


def make(folder: Path, rows: Sequence[dict[str, Any]], name: str = "s") -> str:
    """A set of samples that have metadata and nothing to decode, four a shard."""
    return write_set(folder, [ShardSample(f"{name}{i:03d}", {"mp4": b"x"}, row) for i, row in enumerate(rows)], 4)


ROWS = [
    {"score": i / 10, "language": "en" if i % 2 else "de", "checked": i < 3, **({"rare": 1.0} if i == 5 else {})}
    for i in range(10)
]


def chosen(folder: str, *conditions: tuple[str, str, Any]) -> tuple[list[int], dict[str, int]]:
    where = [Condition(field=field, comparison=comparison, value=value) for field, comparison, value in conditions]
    selection = select(open_index([folder]), where)
    assert select(open_index([folder]), where).removed == selection.removed  # from the cache
    return list(selection.rows[0]), selection.removed


def test_conditions_choose_rows_and_count_what_each_removes(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", ROWS)
    assert chosen(folder) == (list(range(10)), {})
    rows, removed = chosen(folder, ("score", ">=", 0.4), ("language", "==", "en"))
    assert rows == [5, 7, 9]
    assert removed == {"score >= 0.4": 4, "language == en": 3}
    assert chosen(folder, ("language", "in", ["de", "fr"]))[0] == [0, 2, 4, 6, 8]
    assert chosen(folder, ("checked", "==", True))[0] == [0, 1, 2]
    assert chosen(folder, ("rare", ">", 0))[0] == [5]  # what is unknown passes no condition
    assert len(chosen(folder, ("rare", "!=", 1))[0]) == 9  # but this one


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (("scor", ">", 1), r"has no field scor \(did you mean score\?\); it has checked, language, rare, score"),
        (("score", "==", "high"), "condition score == high: score is a number, which 'high' is not"),
        (("language", ">", 3), "language is a text, which 3"),
        (("checked", "==", "yes"), "checked is a boolean, which 'yes' is not"),
        (("score", ">", 5), "no samples are left of the 10 in .*set: 10 by score > 5"),
    ],
)
def test_conditions_that_fit_nothing_say_so(condition: tuple[str, str, Any], message: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "set", ROWS)
    field, comparison, value = condition
    where = (Condition(field=field, comparison=comparison, value=value),)
    with pytest.raises(UserError, match=message):
        open_sources([ShardSet(folders=(folder,), where=where)], [])


def test_a_rebuilt_index_is_selected_anew(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", ROWS)
    assert len(chosen(folder, ("score", ">=", 0.5))[0]) == 5
    make(tmp_path / "set", [{**row, "score": row["score"] + 0.1} for row in ROWS])
    assert len(chosen(folder, ("score", ">=", 0.5))[0]) == 6


def test_sidecar_shards_are_joined_by_shard_and_key(tmp_path: Path) -> None:
    main = make(tmp_path / "main", ROWS)
    extra = [ShardSample(f"s{i:03d}", {"vblip.txt": b"seen"}, {"aesthetic": float(i)}) for i in (3, 0, 1)]
    extra += [ShardSample(f"s{i:03d}", {"vblip.txt": b"seen"}, {"aesthetic": float(i)}) for i in (4, 9, 5, 7)]
    for number, part in enumerate((extra[:3], extra[3:4] + extra[5:])):  # s009 is in no shard that main has it in
        write_set(tmp_path / f"part{number}", part, 9)
    side = tmp_path / "side"
    side.mkdir()
    (tmp_path / "part0/00000.tar").rename(side / "00000.tar")
    (tmp_path / "part1/00000.tar").rename(side / "00001.tar")
    from lvdm.data.build_index import build_index

    build_index(str(side))
    where = (Condition(field="aesthetic", comparison="<", value=5),)
    (source,) = open_sources([ShardSet(folders=(main,), join=(str(side),), where=where)], [])
    assert [source.index[row].key for row in source.selection.rows[0]] == ["s000", "s001", "s003", "s004"]
    assert source.selection.removed == {f"not in {side}": 4, "aesthetic < 5.0": 2}
    for place in range(4):
        own, joined = source.records(0, place)
        assert own.key == joined.key
        assert own.shard.rsplit("/", 1)[-1] == joined.shard.rsplit("/", 1)[-1]
        assert set(joined.members) == {"json", "vblip.txt"}


def test_sizes_share_out_videos_by_length_and_shape(tmp_path: Path) -> None:
    rows = [
        {"width": 64, "height": 64, "frames": 40},  # long
        {"width": 64, "height": 64, "frames": 9},  # short, square
        {"width": 128, "height": 64, "frames": 9},  # short, wide
        {"width": 512, "height": 512, "frames": 1},  # an image
        {"width": 64, "height": 64},
    ]
    folder = make(tmp_path / "set", rows)
    buckets = ((16, 32, 32), (8, 32, 32), (8, 32, 64), (1, 64, 64))
    clip = ClipConfig(buckets=tuple(Bucket(frames=f, height=h, width=w, size=2) for f, h, w in buckets))
    selection = select(open_index([folder]), (), clip.sizes)
    assert [list(rows) for rows in selection.rows] == [[0], [1], [2], [3]]
    assert selection.removed == {"width, height or frames unknown": 1, "too short": 0}


def test_an_image_goes_to_no_longer_clip_though_its_rate_is_unknown(tmp_path: Path) -> None:
    rows = [
        {"width": 64, "height": 64, "frames": 1},
        {"width": 64, "height": 64, "frames": 40, "fps": 24.0},
        {"width": 64, "height": 64, "frames": 14, "fps": 24.0},  # too short for 4 frames at 5 a second
    ]
    folder = make(tmp_path / "set", rows)
    buckets = tuple(Bucket(frames=frames, height=32, width=32, size=2) for frames in (4, 1))
    selection = select(open_index([folder]), (), ClipConfig(fps=5, buckets=buckets).sizes)
    assert [list(rows) for rows in selection.rows] == [[1], [0, 2]]


def test_sizes_that_no_index_knows_are_counted_as_unknown(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", [{"width": 64, "height": 64}] * 3)
    buckets = tuple(Bucket(frames=frames, height=32, width=32, size=2) for frames in (4, 1))
    with pytest.raises(UserError, match="3 by width, height or frames unknown"):
        open_sources([folder], ClipConfig(buckets=buckets).sizes)


def course(shards: Sequence[Any], batch: int = 4, **how: Any) -> Course:
    data = DataConfig(kind="video", video=VideoSource(shards=tuple(shards)))
    return open_course(data, data.video.clip.sizes, seed=7, batch=batch, **how)


def taken(course: Course, steps: range) -> Counter[tuple[int, int]]:
    return Counter((entry.source, entry.place) for step in steps for entry in course.order.step(step).entries)


def test_weights_share_out_the_samples_and_may_change_on_resume(tmp_path: Path) -> None:
    sets = [make(tmp_path / name, ROWS, name) for name in "abc"]

    def weighted(*weights: float) -> list[ShardSet]:
        return [ShardSet(folders=(folder,), weight=w) for folder, w in zip(sets, weights, strict=False)]

    first = course(weighted(3, 1))
    counts = Counter(source for source, _ in taken(first, range(250)).elements())
    assert counts == {0: 750, 1: 250}
    assert first.notes == []
    state = json.loads(json.dumps(first.state))
    again = course(weighted(3, 1), step=250, state=state)
    assert again.notes == []
    assert again.order.step(300) == first.order.step(300)
    more = course(weighted(1, 1, 2), step=250, state=state)
    assert "the mixing of the data changed (sets, weights) and is new from step 250 on" in more.notes[0]
    said = f"{sets[0]} goes on behind what it gave; {sets[1]} goes on behind what it gave; {sets[2]} begins"
    assert said in more.notes[0]
    assert more.order.step(250).entries[0].position == 1000
    counts = Counter(source for source, _ in taken(more, range(250, 500)).elements())
    assert counts == {0: 250, 1: 250, 2: 500}
    # every sample of the first set came 75 times, and goes on to come once an epoch
    assert set(taken(first, range(250)).values()) == {75, 25}
    third = course(weighted(1, 1, 2), step=600, state=json.loads(json.dumps(more.state)))
    assert third.order.step(601) == more.order.step(601)


def test_sets_may_move_and_change_places(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a", ROWS), make(tmp_path / "b", ROWS[:9])
    (tmp_path / "elsewhere").mkdir()
    first = course([ShardSet(folders=(one,), weight=1), ShardSet(folders=(two,), weight=1)])
    seen = taken(first, range(3))
    shutil.copytree(one, tmp_path / "elsewhere" / "a")
    moved = ShardSet(folders=(str(tmp_path / "elsewhere" / "a"),), weight=1)
    same = course([moved, ShardSet(folders=(two,), weight=1)], step=3, state=first.state)
    assert same.notes == []
    assert same.order.step(5) == first.order.step(5)
    turned = course([ShardSet(folders=(two,), weight=1), moved], step=3, state=first.state)
    assert turned.notes[0].count("goes on behind what it gave") == 2
    seen += Counter({(1 - s, p): n for (s, p), n in taken(turned, range(3, 5)).items()})
    for source, size in ((0, 10), (1, 9)):
        counts = [seen[source, place] for place in range(size)]
        assert set(counts) <= {sum(counts) // size, sum(counts) // size + 1}


def test_a_set_without_weights_may_grow(tmp_path: Path) -> None:
    one, two = (make(tmp_path / name, ROWS, name) for name in "ab")
    before = course([one])
    after = course([one, two], step=3, state=before.state)
    assert f"{one}, {two} begins" in after.notes[0]
    assert sorted(taken(after, range(3, 8)).values()) == [1] * 20  # each sample once an epoch from here on


def test_a_set_whose_samples_changed_begins_another_epoch(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", ROWS)
    before = course([ShardSet(folders=(folder,), weight=1)])
    make(tmp_path / "set", ROWS[:-1])
    after = course([ShardSet(folders=(folder,), weight=1)], step=2, state=before.state)
    assert f"{folder} changed and begins another epoch, 2 samples of the last one unseen" in after.notes[0]
    assert sorted(taken(after, range(2, 2 + 9)).values()) == [4] * 9


def test_turning_weights_on_starts_sets_of_their_own(tmp_path: Path) -> None:
    one, two = (make(tmp_path / name, ROWS, name) for name in "ab")
    before = course([one, two])
    sets = [ShardSet(folders=(folder,), weight=1) for folder in (one, two)]
    after = course(sets, step=2, state=before.state)
    assert f"{one} begins; {two} begins" in after.notes[0]


def test_two_choices_from_one_folder_go_on_each_for_itself(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", ROWS)
    tests = [Condition(field="score", comparison=sign, value=0.45) for sign in ("<", ">=")]

    def sets(*weights: float) -> list[ShardSet]:
        return [ShardSet(folders=(folder,), weight=w, where=(t,)) for w, t in zip(weights, tests, strict=True)]

    before = course(sets(1, 3))
    after = course(sets(1, 1), step=9, state=before.state)
    given = Counter(entry.source for step in range(9) for entry in before.order.step(step).entries)
    assert after.state["era"]["taken"] == ((given[0],), (given[1],))
