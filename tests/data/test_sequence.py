"""The global sequence of samples with all their draws: the same for any ranks and workers, stopped anywhere."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from lvdm.config import Bucket, ClipConfig, DataConfig, ShardSet, VideoSource
from lvdm.data.batch import VideoBatch
from lvdm.data.loader import _Plan, build_loader
from lvdm.data.order import Entry, Era, Order
from lvdm.data.sources import open_course
from lvdm.data.writer import ShardSample
from tests.data.conftest import shape_sample, write_set
from tests.data.test_loader import contents

SEED = 2**50 + 11
WORLDS = (1, 2, 4)
COMBINATIONS = [(world, workers) for workers in range(5) for world in WORLDS]
"""All numbers of ranks with all numbers of workers; neighbours differ in ranks, and in turn in workers."""
BUCKETS = (
    Bucket(frames=8, height=16, width=16, size=8),
    Bucket(frames=4, height=16, width=24, size=4),
    Bucket(frames=1, height=24, width=24, size=16),
)
BATCH = 8


def image_sample(number: int) -> ShardSample:
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    text = f"an image {number}"
    return ShardSample(f"image{number}", {"png": file.getvalue(), "txt": text.encode()}, {"width": 32, "height": 32})


def video_sample(number: int) -> ShardSample:
    """A clip of 14 frames, or one that its metadata call shorter and wider, with two captions."""
    sample = shape_sample(number)
    kind = {"frames": 5, "width": 36} if number % 3 == 0 else {}
    return ShardSample(f"video{number:02d}", sample.members, {**sample.meta, **kind, "short": f"video {number}"})


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Videos of two sizes in three shards, and videos beside images in two."""
    first = write_set(tmp_path_factory.mktemp("videos"), [video_sample(number) for number in range(14)], 5)
    mixed = [video_sample(14 + i // 2) if i % 2 else image_sample(i) for i in range(18)]
    return [first, write_set(tmp_path_factory.mktemp("mixed"), mixed, 10)]


def config(
    sets: Sequence[str], workers: int = 0, weights: Sequence[float | None] = (2, 1), **changes: Any
) -> DataConfig:
    clip = ClipConfig(frames=8, height=16, width=16, start="random", resize="random_crop", flip=0.5, buckets=BUCKETS)
    shards = tuple(ShardSet(folders=(folder,), weight=weight) for folder, weight in zip(sets, weights, strict=True))
    source = VideoSource(shards=shards, clip=clip, captions={"txt": 1.0, "short": 1.0})
    return DataConfig.model_validate(
        {"kind": "video", "video": source, "workers": workers, "prefetch": 2, "text_dropout": 0.5} | changes
    )


def segment(
    data: DataConfig, world: int, micro: int, start: int, steps: int, state: Mapping[str, Any] | None
) -> tuple[list[tuple[int, str, str]], dict[str, Any]]:
    """The samples of all ranks for some steps, by position, and the state that goes on behind them, through JSON."""
    found: list[tuple[int, str, str]] = []
    states = []
    for rank in range(world):
        loader = build_loader(
            data,
            seed=SEED,
            batch=BATCH,
            micro=micro,
            world=world,
            rank=rank,
            first_step=start,
            steps=steps,
            state=state,
        )
        batches = list(loader)
        assert not [entry for batch in batches for entry in batch.replaced]
        found += contents(batches)
        assert loader.course is not None
        states.append(loader.course.state)
    assert all(one == states[0] for one in states)
    assert len({position for position, _, _ in found}) == len(found), "a sample on two ranks"
    return sorted(found), json.loads(json.dumps(states[0]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_stopped_again_and_again_on_other_ranks_and_workers_is_one_run(sets: list[str]) -> None:
    """Fifteen pieces, one on each combination of ranks and workers, are bit by bit the run that never stopped."""
    whole, _ = segment(config(sets), 1, BATCH, 0, 2 * len(COMBINATIONS), None)
    pieces: list[tuple[int, str, str]] = []
    state = None
    for number, (world, workers) in enumerate(COMBINATIONS):
        micro = BATCH // world // (2 if number % 4 == 0 and world < 4 else 1)
        piece, state = segment(config(sets, workers), world, micro, 2 * number, 2, state)
        pieces += piece
        assert piece == [sample for sample in whole if piece[0][0] <= sample[0] <= piece[-1][0]], (world, workers)
    assert pieces == whole
    assert len({position for position, _, _ in whole}) == len(whole)
    texts = Counter(text for _, _, text in whole)
    assert 0.35 < texts[""] / len(whole) < 0.65
    assert any(text.startswith("an image") for text in texts)
    assert any(text.startswith("video ") for text in texts)
    # samples that come again come with other draws
    again = [text for text in texts if text and texts[text] > 1 and not text.startswith("an image")]
    assert again
    assert any(len({pixels for _, pixels, text in whole if text == wanted}) > 1 for wanted in again)


def test_another_seed_is_another_sequence(sets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = segment(config(sets), 1, BATCH, 0, 3, None)
    monkeypatch.setattr("tests.data.test_sequence.SEED", SEED + 2**32)
    other, _ = segment(config(sets), 1, BATCH, 0, 3, None)
    assert len(set(one) & set(other)) < len(one) / 4


def test_each_epoch_of_decoded_clips_has_each_sample_once_or_carries_it_over(sets: list[str]) -> None:
    data = config(sets, weights=(None, None), text_dropout=0.0)
    assert data.video is not None
    course = open_course(data, data.video.clip.sizes, seed=SEED, batch=BATCH)
    sizes = [sum(column) for column in zip(*(one["sizes"] for one in course.state["sets"]), strict=True)]
    assert sizes == [15, 8, 9]
    for epochs in (1, 3):
        steps = next(step for step in itertools.count() if course.order.epoch_at(step) == epochs)
        seen: Counter[str] = Counter()
        for batch in build_loader(data, seed=SEED, batch=BATCH, micro=BATCH, world=1, rank=0, steps=steps):
            assert isinstance(batch, VideoBatch)
            seen.update(batch.captions)
        carried = [epochs * size % bucket.size for size, bucket in zip(sizes, BUCKETS, strict=True)]
        assert seen.total() == epochs * sum(sizes) - sum(carried)
        images = [seen[f"an image {number}"] for number in range(0, 18, 2)]
        assert sum(images) == epochs * sizes[2] - carried[2]
        assert max(images) - min(images) <= 1


@st.composite
def orders(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes by source and bucket, batch sizes that four ranks share, weights or none, and how they are shuffled."""
    sources, buckets = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shards = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(sum)
    sizes = [draw(st.lists(shards, min_size=buckets, max_size=buckets)) for _ in range(sources)]
    weights = draw(st.none() | st.lists(st.integers(0, 9), min_size=sources, max_size=sources))
    assume(any(sum(row) * (weights is None or weights[i]) for i, row in enumerate(sizes)))
    return {
        "sizes": sizes,
        "batches": draw(st.lists(st.sampled_from([4, 8, 12]), min_size=buckets, max_size=buckets)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "weights": weights,
        "shuffle": draw(st.booleans()),
        "contiguous": draw(st.sampled_from([1, 1, 3])),
    }


def planned(how: Mapping[str, Any], era: Era, world: int, first: int, steps: int) -> list[tuple[int, Entry]]:
    """Bucket and entry of all ranks' samples of some steps, by position, from an order made anew."""
    order = Order(
        how["sizes"], how["batches"], **{k: how[k] for k in ("seed", "weights", "shuffle", "contiguous")}, era=era
    )
    plans = [_Plan(order, how["batches"], 4 // world, world, rank, first, steps) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    entries = [entry for plan in plans for number in range(len(plan)) for entry in plan[number]]
    return sorted(entries, key=lambda entry: entry[1].position)


@settings(max_examples=40, deadline=None)
@given(how=orders(), data=st.data())
def test_the_plans_of_any_ranks_stopped_anywhere_are_one_sequence(how: dict[str, Any], data: st.DataObject) -> None:
    whole = planned(how, Era(), 1, 0, 16)
    assert len({entry.position for _, entry in whole}) == len(whole)
    done: list[tuple[int, Entry]] = []
    step = 0
    while step < 16:
        steps = min(data.draw(st.integers(1, 12)), 16 - step)
        done += planned(how, Era(), data.draw(st.sampled_from(WORLDS)), step, steps)
        step += steps
    assert done == whole


@settings(max_examples=30, deadline=None)
@given(how=orders(), data=st.data())
def test_a_change_of_batch_sizes_anywhere_is_the_same_for_any_ranks(how: dict[str, Any], data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 20))
    old = Order(how["sizes"], how["batches"], seed=how["seed"], weights=how["weights"], shuffle=how["shuffle"])
    era = Era(**json.loads(json.dumps(asdict(old.next_era(step)))))
    era = Era(era.step, era.position, tuple(tuple(row) for row in era.taken))
    other = how | {"batches": [4 * data.draw(st.integers(1, 3)) for _ in how["batches"]]}
    whole = planned(other, era, 1, step, 12)
    assert whole[0][1].position == old.position_at(step)
    for world in (2, 4):
        assert planned(other, era, world, step, 5) + planned(other, era, 1, step + 5, 7) == whole
