from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from lvdm import storage
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
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    (tmp_path / "data").write_bytes(bytes(range(256)))
    return f"faulty://{tmp_path}/data"


def read(url: str, offset: int, size: int) -> bytes:
    return fetch.Fetcher().spans([fetch.Span(url, offset, offset + size)])[0]


@pytest.mark.parametrize("how", ["raise", "short"])
def test_passing_faults_are_retried(url: str, how: str) -> None:
    FaultyFileSystem.failures, FaultyFileSystem.how = storage.ATTEMPTS - 1, how
    assert read(url, 10, 20) == bytes(range(10, 30))
    assert FaultyFileSystem.failures == 0


@pytest.mark.parametrize("how", ["raise", "short"])
def test_lasting_faults_end_the_run_for_a_new_start(url: str, how: str) -> None:
    FaultyFileSystem.failures, FaultyFileSystem.how = 100, how
    with pytest.raises(Requeue, match=f"after {storage.ATTEMPTS} attempts"):
        read(url, 10, 20)
    assert FaultyFileSystem.failures == 100 - storage.ATTEMPTS


def test_what_is_not_there_is_not_retried(url: str) -> None:
    FaultyFileSystem.failures = 0
    with pytest.raises(UserError, match="other: FileNotFoundError"):
        read(url.replace("data", "other"), 0, 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 10**6), st.integers(1, 10**5)), min_size=1))
def test_joined_reads_cover_all_and_read_little_in_vain(ranges: list[tuple[str, int, int]]) -> None:
    asked = {fetch.Span(url, start, start + size) for url, start, size in ranges}
    spans = sorted(asked, key=lambda span: (span.url, span.start, span.end))
    reads = list(fetch.joined(spans))
    assert [span for _, parts in reads for span in parts] == spans
    for whole, parts in reads:
        assert all(whole.url == part.url and whole.start <= part.start <= part.end <= whole.end for part in parts)
    read_bytes = sum(whole.end - whole.start for whole, _ in reads)
    assert read_bytes <= (1 + fetch.WASTE) * sum(s.end - s.start for s in spans)


def test_neighbours_of_a_shard_are_one_read() -> None:
    spans = [fetch.Span("a", 0, 100_000), fetch.Span("a", 101_000, 200_000), fetch.Span("a", 300_000, 400_000)]
    assert [(whole.start, whole.end) for whole, _ in fetch.joined(spans)] == [(0, 200_000), (300_000, 400_000)]


CACHED, CAP = 400, 2_000_000


def fill(cache: str, seed: int) -> None:
    """Read random ranges through the cache, as a worker of a node does."""
    os.environ["LVDM_CACHE"] = cache
    shared = fetch.RangeCache(CAP)
    draws = random.Random(seed)
    for _ in range(3 * CACHED):
        number = draws.randrange(CACHED)
        span = fetch.Span("s3://bucket/shard", number * 20_000, number * 20_000 + 10_000 + number)
        content = number.to_bytes(4) * ((10_000 + number) // 4 + 1)
        found = shared.get(span)
        assert found in (None, content[: 10_000 + number])
        if found is None:
            shared.put(span, content[: 10_000 + number])


def test_workers_of_a_node_share_a_cache_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(str(tmp_path), seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    held = [file for file in (tmp_path / "ranges").iterdir() if file.name != ".lock"]
    assert all(not file.name.startswith(".") for file in held)
    size = sum(file.stat().st_size for file in held)
    # each worker looks at the size after a twentieth of it
    assert 0.5 * CAP < size < 1.25 * CAP
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path))
    cache = fetch.RangeCache(CAP)
    changed = fetch.Span("s3://bucket/shard", 0, 10_000, tag="etag:other")
    cache.put(fetch.Span("s3://bucket/shard", 0, 10_000, tag="etag:one"), b"a" * 10_000)
    assert cache.get(changed) is None


def test_however_many_processes_fill_a_cache_it_stays_at_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path))
    caches = [fetch.RangeCache(CAP) for _ in range(64)]
    most = least = 0
    for number in range(24 * len(caches)):
        start = number * 8000
        caches[number % len(caches)].put(fetch.Span("s3://x", start, start + 8000), b"x" * 8000)
        if number % 64 == 0:
            held = sum(file.stat().st_size for file in (tmp_path / "ranges").glob("[!.]*"))
            most, least = max(most, held), held
    assert 0.8 * CAP < least <= most < 1.2 * CAP


def test_while_another_process_makes_room_nothing_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path))
    cache = fetch.RangeCache(CAP)
    span = fetch.Span("s3://x", 0, 8000)
    with open(tmp_path / "ranges/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.put(span, b"x" * 8000)
        assert cache.get(span) is None
    cache.put(span, b"x" * 8000)
    assert cache.get(span) == b"x" * 8000
    (tmp_path / "ranges/.lock").unlink()
    (tmp_path / "ranges/.lock").mkdir()  # cannot be opened
    cache.put(fetch.Span("s3://x", 1, 8001), b"x" * 8000)
