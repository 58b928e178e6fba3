"""Shards in stores: a real S3 server, and a web server of which a tenth of the answers fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from lvdm import storage
from lvdm.config import ClipConfig, DataConfig, VideoSource
from lvdm.data import index, latents, stream
from lvdm.data.build_index import build_index
from lvdm.data.loader import build_loader
from lvdm.errors import Requeue, UserError
from lvdm.storage import cached_copy, file_info, read_range
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
    assert len(list((tmp_path / "cache/ranges").glob("[!.]*"))) == 23
    fs = fsspec.filesystem("s3")
    other = bytearray(fs.cat_file("bucket/set/00001.tar"))
    other[-1] ^= 1
    fs.pipe_file("bucket/set/00001.tar", bytes(other))
    fs.invalidate_cache()
    with pytest.raises(UserError, match=r"shard s3://bucket/set/00001\.tar was changed after it was indexed"):
        index.open_index([bucket])
    assert build_index(bucket).samples == 23
    index.open_index([bucket])


def test_a_tenth_of_all_reads_failing_loses_nothing(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage, "READ_TIMEOUT", 1.0)
    with web_server(Path(shards), faults=0.1) as server:
        url = f"{server.url}/"
        read_here, expected = [], []
        for _ in range(4):
            read_here += read(url)
            expected += read(shards)
        assert read_here == expected
        assert sum(server.met.values()) >= 8
        assert len(server.met) == 4


@pytest.fixture
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))


CALLS: dict[str, tuple[Callable[[str], object], str]] = {
    "listing": (index.list_shards, "no such folder: "),
    "listing for a stream": (lambda url: stream.list_shards([url]), "no such folder of shards: "),
    "index": (lambda url: index.open_index([url]), "no such folder of shards: "),
    "copy": (lambda url: cached_copy(f"{url}/00000.tar"), "cannot read .*: FileNotFoundError"),
    "size": (lambda url: file_info(f"{url}/00000.tar"), "cannot read .*: FileNotFoundError"),
    "latents": (latents.read_latent_set, "holds no latents"),
}


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("what", CALLS)
def test_a_store_that_is_busy_is_asked_again_and_does_not_pass_for_an_empty_one(
    what: str, shards: str, tmp_path: Path
) -> None:
    call, absence = CALLS[what]
    for path in (*Path(shards).glob("*.tar"), Path(shards, "index.arrow")):
        shutil.copy2(path, tmp_path)
    clip = ClipConfig(frames=2, height=4, width=4)
    about = latents.LatentSetInfo(
        vae=latents.LatentVAE(kind="lvdm", name="v", sha256="0"),
        text=latents.LatentText(name="t", sha256="0", max_length=8, dim=3, mask_padding=True),
        scale=1.0,
        shift=0.0,
        clip=clip,
        dtype="fp32",
        shapes=((4, 2, 4, 4),),
        samples=1,
        lvdm_version="0",
    )
    latents.write_latent_set(str(tmp_path), about, torch.zeros(1, 3))
    with web_server(tmp_path) as server:
        server.busy = 3
        call(server.url)
        server.busy = 1000
        with pytest.raises(Requeue, match=r"cannot read http://.* after 6 attempts: ClientResponseError: 503"):
            call(server.url)
        server.busy = 0
        before = server.answers
        with pytest.raises(UserError, match=absence):
            call(f"{server.url}/nowhere")
        assert server.answers - before <= 6  # it is not retried


@pytest.mark.usefixtures("_quick")
def test_a_web_server_without_ranges_is_named_at_once(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server(Path(shards)) as server:
        server.ranges = False
        with pytest.raises(UserError, match=r"00000\.tar: its store does not serve ranges: of 10 bytes \d+ came"):
            read_range(f"{server.url}/00000.tar", 0, 10)
        assert server.answers == 1
        monkeypatch.setattr("lvdm.data.build_index._STREAM_BLOCK", 512)
        monkeypatch.setattr("lvdm.data.build_index._HEADER_BLOCK", 512)
        with pytest.raises(UserError, match=r"cannot read .*00000\.tar: the store does not serve ranges: "):
            build_index(f"{server.url}/")
