from __future__ import annotations

from pathlib import Path

import pytest

from lvdm.data.build_index import build_index
from lvdm.data.encode import encode_mp4
from lvdm.data.writer import ShardSample, sample_key, write_shard
from lvdm.synthetic import caption, combinations, render

SAMPLES = 23
PER_SHARD = 9


def shape_sample(number: int, per_shard: int = PER_SHARD) -> ShardSample:
    """A moving shape of 14 frames, 24x24, another combination for each number."""
    combination = combinations()[number * 7]
    video = encode_mp4(render(combination, number, frames=14, size=24), fps=8)
    text = caption(combination)
    meta = {"caption": text, "width": 24, "height": 24, "fps": 8.0, "frames": 14, "duration": 1.75}
    key = sample_key(number // per_shard, number % per_shard, per_shard)
    return ShardSample(key, {"mp4": video, "txt": text.encode()}, meta)


def write_set(folder: Path, samples: list[ShardSample], per_shard: int = PER_SHARD) -> str:
    for shard in range(-(-len(samples) // per_shard)):
        write_shard(str(folder), shard, samples[shard * per_shard : (shard + 1) * per_shard])
    build_index(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def samples() -> list[ShardSample]:
    return [shape_sample(number) for number in range(SAMPLES)]


@pytest.fixture(scope="session")
def shards(samples: list[ShardSample], tmp_path_factory: pytest.TempPathFactory) -> str:
    """An indexed folder of 23 clips in 3 shards; not to be changed."""
    return write_set(tmp_path_factory.mktemp("shards"), samples)
