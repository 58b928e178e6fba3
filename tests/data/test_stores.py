"""Shards in stores: a real S3 server, and a web server of which a tenth of the answers fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from lvdm.config import ClipConfig, DataConfig, VideoSource
from lvdm.data import fetch
from lvdm.data.build_index import build_index
from lvdm.data.index import open_index
from lvdm.data.loader import build_loader
from lvdm.errors import UserError
from tests.data.stores import s3_server, web_server
from tests.data.test_loader import contents

CLIP = ClipConfig(frames=8, height=16, width=16)


@pytest.fixture(scope="module")
def bucket(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The shards of the session in a bucket, without their index."""
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint, "key": "any", "secret": "any"})
        fs = fsspec.filesystem("s3")
        fs.makedirs("bucket/set")
        for path in sorted(Path(shards).glob("*.tar")):
            fs.put_file(str(path), f"bucket/set/{path.name}")
        yield "s3://bucket/set"


def read(folder: str, workers: int = 0, **changes: object) -> list[tuple[int, str, str]]:
    """The samples of two epochs."""
    data = DataConfig(
        kind="video", video=VideoSource(shards=(folder,), clip=CLIP), workers=workers, text_dropout=0.0, **changes
    )
    loader = build_loader(data, seed=3, batch=23, micro=23, world=1, rank=0, steps=2)
    batches = list(loader)
    assert not [entry for batch in batches for entry in batch.replaced]
    return contents(batches)


def test_shards_in_s3_are_indexed_read_and_held_against_their_etags(
    bucket: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    assert build_index(bucket).samples == 23
    expected = read(shards)
    assert read(bucket) == expected
    assert read(bucket, cache_gb=1.0) == expected
    assert len(list((tmp_path / "cache/ranges").iterdir())) == 23
    fs = fsspec.filesystem("s3")
    other = bytearray(fs.cat_file("bucket/set/00001.tar"))
    other[-1] ^= 1
    fs.pipe_file("bucket/set/00001.tar", bytes(other))
    fs.invalidate_cache()
    with pytest.raises(UserError, match=r"shard s3://bucket/set/00001\.tar was changed after it was indexed"):
        open_index([bucket])
    assert build_index(bucket).samples == 23
    open_index([bucket])


def test_a_tenth_of_all_reads_failing_loses_nothing(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(fetch, "READ_TIMEOUT", 1.0)
    with web_server(Path(shards), faults=0.1) as server:
        url = f"{server.url}/"
        read_here, expected = [], []
        for _ in range(4):
            read_here += read(url)
            expected += read(shards)
        assert read_here == expected
        assert sum(server.met.values()) >= 8
        assert len(server.met) == 4
