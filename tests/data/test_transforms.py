from __future__ import annotations

import pytest

from lvdm.config import ClipConfig
from lvdm.data.transforms import clip_draws, clip_indices, drops_text, read_caption
from lvdm.errors import BadSample


def test_where_a_clip_starts() -> None:
    assert clip_indices(20, ClipConfig(frames=3, stride=4, start="first"), 0.9) == [0, 4, 8]
    assert clip_indices(20, ClipConfig(frames=3, stride=4, start="center"), 0.9) == [5, 9, 13]
    starts = [clip_indices(20, ClipConfig(frames=3, stride=4), i / 1200)[0] for i in range(1200)]
    assert {start: starts.count(start) for start in set(starts)} == dict.fromkeys(range(12), 100)


def test_a_clip_as_long_as_the_video_and_one_longer() -> None:
    assert clip_indices(9, ClipConfig(frames=3, stride=4), 0.999) == [0, 4, 8]
    with pytest.raises(BadSample, match="8 frames are too few: 3 frames 4 apart need 9"):
        clip_indices(8, ClipConfig(frames=3, stride=4), 0.0)


def test_draws_belong_to_the_position() -> None:
    assert clip_draws(1, 7) == clip_draws(1, 7)
    assert len({clip_draws(seed, position) for seed in (1, 2) for position in range(50)}) == 100


def test_text_is_dropped_as_often_as_asked() -> None:
    dropped = sum(drops_text(3, position, 0.25) for position in range(4000))
    assert abs(dropped - 1000) < 100
    assert not any(drops_text(3, position, 0.0) for position in range(100))
    assert all(drops_text(3, position, 1.0) for position in range(100))


def test_captions_of_any_bytes() -> None:
    assert read_caption({"txt": " ein Bär\n".encode()}) == "ein Bär"
    assert read_caption({"txt": b"\xff\xfe\x00"}).endswith("\0")
    assert read_caption({"json": b'{"caption": "from json"}'}) == "from json"
    for broken in (b"", b"[1]", b'{"caption": 3}', b"[" * 100_000):
        assert read_caption({"json": broken}) == ""
    assert read_caption({}) == ""
