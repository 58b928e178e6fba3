from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lvdm.errors import UserError
from lvdm.storage import atomic_file, locate, sha256_of


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


def test_unknown_stores_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^cannot open nosuchstore://bucket/set: .*nosuchstore") as caught:
        locate("nosuchstore://bucket/set")
    assert "\n" not in str(caught.value)


def test_sha256_of_files_is_that_of_their_bytes_in_a_row(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    (tmp_path / "b").write_bytes(b"d")
    assert sha256_of(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"abc" * 1000 + b"d").hexdigest()
