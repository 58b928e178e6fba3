from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lvdm.errors import UserError
from lvdm.media import contact_sheet, enlarge, write_gif, write_mp4


def moving_square(frames: int = 8, height: int = 32, width: int = 48) -> np.ndarray:
    clip = np.full((frames, height, width, 3), (40, 60, 140), dtype=np.uint8)
    for t in range(frames):
        clip[t, 8:20, 2 + 3 * t : 14 + 3 * t] = (220, 60, 40)
    return clip


def read_mp4(path: Path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        return frames, container.streams.video[0]


def test_mp4_plays_back_what_was_written(tmp_path: Path) -> None:
    clip = moving_square()
    write_mp4(tmp_path / "new" / "clip.mp4", clip, 8, scale=4)
    frames, stream = read_mp4(tmp_path / "new" / "clip.mp4")
    assert frames.shape == (8, 128, 192, 3)
    assert (stream.codec_context.name, stream.average_rate) == ("h264", 8)
    assert stream.codec_context.pix_fmt == "yuv420p"
    assert np.abs(frames.astype(int) - enlarge(clip, 4)).mean() < 3
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 47), (33, 47)])
def test_odd_sizes_are_padded_by_one(tmp_path: Path, height: int, width: int) -> None:
    clip = moving_square(height=height, width=width)
    write_mp4(tmp_path / "clip.mp4", clip, 7.5)
    frames, stream = read_mp4(tmp_path / "clip.mp4")
    assert frames.shape == (8, height + height % 2, width + width % 2, 3)
    assert float(stream.average_rate or 0) == 7.5
    assert np.abs(frames[0, -1, -1].astype(int) - clip[0, -1, -1]).max() < 12


def test_gif_loops_with_steady_colours_and_the_right_length(tmp_path: Path) -> None:
    clip = moving_square()
    write_gif(tmp_path / "clip.gif", clip, 8, scale=2)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.info["loop"] == 0
        assert gif.n_frames == 8  # type: ignore[attr-defined]
        shown, duration = [], 0
        for index in range(8):
            gif.seek(index)
            duration += gif.info["duration"]
            shown.append(np.asarray(gif.convert("RGB")))
    assert duration == 1000  # 8 frames at 8 per second, though 125 ms is no whole number of hundredths
    assert np.abs(np.stack(shown).astype(int) - enlarge(clip, 2)).max() <= 4


def test_gif_of_many_colours_stays_near_them(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64)
    frame = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], 128.0), axis=-1)
    clip = np.stack([frame, frame[::-1]]).astype(np.uint8)
    write_gif(tmp_path / "clip.gif", clip, 4)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - clip[0]).mean() < 6


def test_contact_sheet_has_a_row_a_caption(tmp_path: Path) -> None:
    clips = [moving_square(), moving_square(frames=3), moving_square(height=300, width=200)]
    captions = [
        "a red square moves right",
        "short",
        "a caption that is too long for one line and wraps over several of them",
    ]
    contact_sheet(tmp_path / "sheet.png", clips, captions, columns=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    rows = sheet.shape[0] - 2 * 16 - 2 * 14
    assert rows == 128 + 128 + 128
    text = sheet[:, 16:246].min(axis=2) < 100
    for top in (16, 16 + 142, 16 + 2 * 142):
        assert text[top : top + 128].any()
    # frames 0 and 7 of the first clip, four times enlarged, pixel for pixel
    left = 16 + 230 + 16
    assert np.array_equal(sheet[16:144, left : left + 192], enlarge(clips[0], 4)[0])
    assert np.array_equal(sheet[16:144, left + 3 * 196 : left + 3 * 196 + 192], enlarge(clips[0], 4)[7])
    # the second clip has three frames only
    assert (sheet[158:286, left + 3 * 196 : left + 3 * 196 + 192] == 255).all()


def test_captions_stay_in_their_column(tmp_path: Path) -> None:
    clip = moving_square()
    contact_sheet(tmp_path / "sheet.png", [clip] * 2, ["w" * 200, "ünïcödé 🙂"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet[16:144, 248:262] == 255).all()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mp4(tmp_path / "clip.mp4", moving_square(), 8)
    before = (tmp_path / "clip.mp4").read_bytes()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("half way")

    monkeypatch.setattr("lvdm.media.av.VideoFrame", type("Broken", (), {"from_ndarray": broken}))
    with pytest.raises(RuntimeError, match="half way"):
        write_mp4(tmp_path / "clip.mp4", moving_square(), 8)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == before


def test_an_unwritable_path_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (write_mp4, write_gif):
        with pytest.raises(UserError, match=r"cannot write .*file/clip"):
            write(tmp_path / "file" / "clip", moving_square(), 8)


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_other_arrays_are_refused(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        write_gif(tmp_path / "clip.gif", wrong, 8)
    with pytest.raises(ValueError, match="captions"):
        contact_sheet(tmp_path / "sheet.png", [moving_square()], [])
