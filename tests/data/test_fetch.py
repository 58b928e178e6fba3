from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from lvdm.data import fetch
from lvdm.errors import Requeue, UserError


class FaultyFileSystem(LocalFileSystem):
    """Fails its first reads."""

    protocol = "faulty"
    cachable = False
    failures = 0
    how = "raise"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return LocalFileSystem._strip_protocol(path.removeprefix("faulty://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        data = super().cat_file(path, start=start, end=end)
        cls = type(self)
        if cls.failures > 0:
            cls.failures -= 1
            if cls.how == "raise":
                raise ConnectionResetError("reset by peer")
            return data[: len(data) // 2]
        return data


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.001)
    (tmp_path / "data").write_bytes(bytes(range(256)))
    return f"faulty://{tmp_path}/data"


def read(url: str, offset: int, size: int) -> bytes:
    return fetch.Fetcher().spans([fetch.Span(url, offset, offset + size)])[0]


@pytest.mark.parametrize("how", ["raise", "short"])
def test_passing_faults_are_retried(url: str, how: str) -> None:
    FaultyFileSystem.failures, FaultyFileSystem.how = fetch.ATTEMPTS - 1, how
    assert read(url, 10, 20) == bytes(range(10, 30))
    assert FaultyFileSystem.failures == 0


@pytest.mark.parametrize("how", ["raise", "short"])
def test_lasting_faults_end_the_run_for_a_new_start(url: str, how: str) -> None:
    FaultyFileSystem.failures, FaultyFileSystem.how = 100, how
    with pytest.raises(Requeue, match=f"after {fetch.ATTEMPTS} attempts"):
        read(url, 10, 20)
    assert FaultyFileSystem.failures == 100 - fetch.ATTEMPTS


def test_what_is_not_there_is_not_retried(url: str) -> None:
    FaultyFileSystem.failures = 0
    with pytest.raises(UserError, match="other: FileNotFoundError"):
        read(url.replace("data", "other"), 0, 1)
