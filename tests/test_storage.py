from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from lvdm import storage
from lvdm.errors import UserError
from lvdm.storage import Missing, append_json, atomic_file, cache_folder, cached_copy, locate, sha256_of
from tests.data.stores import web_server


def test_a_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail_half_way() -> None:
        with atomic_file(str(target)) as path:
            Path(path).write_text("half")
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fail_half_way()
    assert target.read_text() == "old"
    with atomic_file(str(target)) as path:
        Path(path).write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_lines_are_added_behind_one_that_a_kill_cut_short(tmp_path: Path) -> None:
    append_json(tmp_path / "log", {"a": 1}, {"a": 2})
    with (tmp_path / "log").open("a") as file:
        file.write('{"a": ')
    append_json(tmp_path / "log", {"a": 3})
    append_json(tmp_path / "log", {"a": 4})
    assert (tmp_path / "log").read_text().split("\n") == ['{"a": 1}', '{"a": 2}', '{"a": ', '{"a": 3}', '{"a": 4}', ""]


def test_unknown_stores_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^cannot open nosuchstore://bucket/set: .*nosuchstore") as caught:
        locate("nosuchstore://bucket/set")
    assert "\n" not in str(caught.value)


def test_sha256_of_files_is_that_of_their_bytes_in_a_row(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    (tmp_path / "b").write_bytes(b"d")
    assert sha256_of(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"abc" * 1000 + b"d").hexdigest()


@pytest.fixture
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_quick")
def test_a_copy_is_fetched_in_ranges_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_COPY_BLOCK", 1000)
    (tmp_path / "set").mkdir()
    with web_server(tmp_path / "set", faults=0.2) as server:
        monkeypatch.setattr(storage, "READ_TIMEOUT", 0.5)
        for content in (bytes(range(256)) * 60, b"other" * 3000):
            (tmp_path / "set/file").write_bytes(content)
            copy = cached_copy(f"{server.url}/file")
            assert copy.read_bytes() == content
            sent = server.sent
            assert cached_copy(f"{server.url}/file") == copy
            assert server.sent == sent
    with pytest.raises(Missing):
        cached_copy(f"memory://{tmp_path}/nowhere")


@pytest.mark.usefixtures("_quick")
def test_what_nobody_used_for_a_month_leaves_the_cache(tmp_path: Path) -> None:
    folder = cache_folder("files")
    month_ago = time.time() - 86400 * (storage.UNUSED_DAYS + 1)
    for name in ("old", "used", "young"):
        (folder / name).write_text("x")
    (folder / "answer").mkdir()
    (folder / "answer/rows").write_text("x")
    for name in ("old", "used", "answer"):
        os.utime(folder / name, (month_ago, month_ago))
    storage.note_use(folder / "used")
    assert (folder / "used").stat().st_mtime == pytest.approx(month_ago)
    with locate("memory://month/file")[0].open("memory://month/file", "wb") as file:
        file.write(b"new")
    copy = cached_copy("memory://month/file")
    assert {path.name for path in folder.iterdir()} == {"used", "young", copy.name}
