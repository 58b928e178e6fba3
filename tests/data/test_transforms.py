from __future__ import annotations

import json
from collections import Counter
from functools import partial

import pytest

from lvdm.config import ClipConfig
from lvdm.data.transforms import (
    captions_by_place,
    choose_caption,
    clip_draws,
    clip_indices,
    clip_indices_at,
    draw_caption,
    drops_text,
    read_caption,
    several_clips,
)
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


def test_clips_of_so_many_frames_a_second() -> None:
    times = [number / 30 for number in range(90)]
    clip = ClipConfig(frames=4, fps=10, start="first")
    assert clip_indices_at(times, clip, 0.0) == [0, 3, 6, 9]
    assert clip_indices_at([round(time, 2) for time in times], clip, 0.0) == [0, 3, 6, 9]  # coarse stamps
    assert clip_indices_at(times, ClipConfig(frames=4, fps=50, start="first"), 0.0) == [0, 1, 1, 2]
    assert clip_indices_at(times, ClipConfig(frames=4, fps=10), 0.9999) == [80, 83, 86, 89]
    assert clip_indices_at(times, ClipConfig(frames=4, fps=10, start="center"), 0.0) == [40, 43, 46, 49]
    uneven = [0.0, 0.1, 0.5, 0.55, 0.6, 1.0]
    assert clip_indices_at(uneven, ClipConfig(frames=5, fps=4, start="first"), 0.0) == [0, 1, 2, 4, 5]
    with pytest.raises(BadSample, match=r"10 frames are too few: 5 frames at 10 a second need 0\.400 s"):
        clip_indices_at(times[:10], ClipConfig(frames=5, fps=10), 0.0)
    with pytest.raises(BadSample, match="0 frames are too few"):
        clip_indices_at([], clip, 0.0)


def test_videos_below_the_least_length_are_bad() -> None:
    clip = ClipConfig(frames=3, min_frames=50)
    assert len(clip_indices(50, clip, 0.5)) == 3
    with pytest.raises(BadSample, match=r"49 frames are fewer than clip\.min_frames=50"):
        clip_indices(49, clip, 0.5)


def test_several_clips_lie_one_behind_the_other() -> None:
    def cut(frames: int, clip: ClipConfig, clips: int) -> list[list[int]]:
        return several_clips(partial(clip_indices, frames), clip, [0.9] * clips)

    first = ClipConfig(frames=3, stride=4, start="first")
    assert cut(33, first, 2) == [[0, 4, 8], [12, 16, 20]]  # as one clip of 6 frames, cut in two
    assert cut(33, first, 9) == [[0, 4, 8], [12, 16, 20], [24, 28, 32]]
    assert cut(32, first, 9) == [[0, 4, 8], [12, 16, 20]]
    assert cut(23, first.model_copy(update={"start": "center"}), 2) == [[1, 5, 9], [13, 17, 21]]
    assert cut(9, first, 9) == [[0, 4, 8]]
    with pytest.raises(BadSample, match="8 frames are too few: 3 frames 4 apart need 9"):
        cut(8, first, 2)
    with pytest.raises(BadSample, match=r"fewer than clip\.min_frames=50"):
        cut(33, first.model_copy(update={"min_frames": 50}), 2)
    times = [number / 30 for number in range(30)]
    at_ten = ClipConfig(frames=4, fps=10, start="first")
    assert several_clips(partial(clip_indices_at, times), at_ten, [0.0] * 3) == [[0, 3, 6, 9], [12, 15, 18, 21]]


def test_random_clips_lie_where_each_draw_says() -> None:
    clip = ClipConfig(frames=3, stride=4)
    assert several_clips(partial(clip_indices, 20), clip, [0.0, 0.5, 0.99, 0.5]) == [
        [start, start + 4, start + 8] for start in (0, 6, 11, 6)
    ]
    assert several_clips(partial(clip_indices, 9), clip, [0.0, 0.99]) == [[0, 4, 8]] * 2
    with pytest.raises(BadSample, match="8 frames are too few"):
        several_clips(partial(clip_indices, 8), clip, [0.0, 0.99])


def test_captions_are_drawn_by_weight_among_those_there() -> None:
    fields = {"caption": "short", "vblip": ["one", "two", ""], "number": 3}
    members = {"txt": b"from file", "json": json.dumps(fields).encode()}
    weights = {"txt": 1.0, "vblip": 3.0, "caption": 0.0, "missing": 9.0, "number": 9.0}
    drawn = Counter(choose_caption(members, weights, 1, position) for position in range(4000))
    assert drawn.keys() == {"from file", "one", "two"}
    assert abs(drawn["from file"] - 1000) < 120
    assert abs(drawn["one"] - 1500) < 140
    assert choose_caption(members, weights, 1, 5) == choose_caption(members, weights, 1, 5)
    assert choose_caption(members, {}, 1, 5) == "from file"
    assert choose_caption({"json": members["json"]}, {"txt": 1.0}, 1, 5) == ""
    lone = {"json": b'{"caption": "a \\ud800 b"}'}
    assert choose_caption(lone, {"caption": 1.0}, 1, 5) == "a ? b"


def test_captions_once_drawn_stay_drawn() -> None:
    """What runs of earlier versions drew, so that they go on as they began."""
    members = {"txt": b"t", "json": json.dumps({"caption": "c", "many": ["0", "1", "2"]}).encode()}
    weights = {"many": 2.0, "missing": 9.0, "zero": 0.0, "txt": 1.0, "caption": 0.5}
    drawn = "".join(choose_caption(members, weights, 2**40 + 5, position) for position in range(40))
    assert drawn == "c112cc01tt01t20tcctt2tttt0ct211t2ct010tc"


def test_a_caption_can_be_drawn_by_how_many_there_are() -> None:
    fields = {"caption": "short", "none": [" ", 3], "many": ["one", "", " two"]}
    members = {"txt": b"\xc3\xa4 \n", "json": json.dumps(fields).encode()}
    weights = {"many": 2.0, "none": 1.0, "txt": 1.0, "caption": 0.0}
    texts = captions_by_place(members, list(weights))
    assert texts == (("one", "two"), (), ("ä",), ("short",))
    for position in range(50):
        drawn = draw_caption([len(place) for place in texts], list(weights.values()), 1, position)
        assert drawn is not None
        assert texts[drawn[0]][drawn[1]] == choose_caption(members, weights, 1, position)
    assert draw_caption([0, 0], [1.0, 1.0], 1, 5) is None
    assert draw_caption([0, 4], [1.0, 0.0], 1, 5) is None
    assert draw_caption([0, 1], [1.0, 0.5], 1, 5) == (1, 0)


def test_without_places_there_is_one_with_the_usual_caption() -> None:
    assert captions_by_place({"txt": b" a \n", "json": b'{"caption": "b"}'}, []) == (("a",),)
    assert captions_by_place({"json": b'{"caption": "b"}'}, []) == (("b",),)
    assert captions_by_place({"txt": b"  "}, []) == ((),)
    assert captions_by_place({}, []) == ((),)


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
