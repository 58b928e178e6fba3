"""Encoding by several processes on one folder, killed at random: the result is that of one process, bit for bit."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from lvdm.config import LatentDiffusionTraining, parse_training_config
from lvdm.data.index import open_index
from lvdm.data.latents import read_latent_set
from lvdm.jobs import encode_latents
from lvdm.jobs.encode_latents import encode_folder
from lvdm.jobs.leases import FOLDER, Leases
from lvdm.jobs.make_shards import make_shapes
from lvdm.storage import locate
from tests.conftest import Toy
from tests.data.stores import s3_server

_CONTEXT = multiprocessing.get_context("forkserver")
LEASE = 1.5
LEASES = f"/{FOLDER}/"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 clips in 12 shards."""
    folder = tmp_path_factory.mktemp("source")
    make_shapes(str(folder), clips=24, held_out_clips=2, frames=8, size=16, fps=8, seed=0, shard_size=2)
    return str(folder / "train")


@pytest.fixture(scope="module")
def alone(toy: Toy, source: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a single process makes."""
    target = str(tmp_path_factory.mktemp("alone") / "latents")
    process = start(toy, source, target)
    process.join(60)
    assert process.exitcode == 0
    return contents(target)


def start(toy: Toy, source: str, target: str, s3: dict[str, Any] | None = None) -> BaseProcess:
    """A worker in a process of its own."""
    process = _CONTEXT.Process(target=work, args=(toy.diffusion(toy.folder / "run"), source, target, s3 or {}))
    process.start()
    return process


def work(tree: dict[str, Any], source: str, target: str, s3: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    fsspec.config.conf["s3"] = s3
    encode_latents._LOOK_EVERY = 0.2
    writing = encode_latents.write_shard
    # a worker has each shard long enough for kills to find it there
    encode_latents.write_shard = lambda *given: (time.sleep(0.3), writing(*given))[1]  # type: ignore[attr-defined]
    config = parse_training_config(tree, source="test")
    assert isinstance(config, LatentDiffusionTraining)
    cpu = torch.device("cpu")
    encode_folder(config, source, target, device=cpu, dtype=torch.float32, batch=4, lease_seconds=LEASE)


def files(target: str) -> list[str]:
    """Paths of all files in a folder."""
    fs, root = locate(target)
    fs.invalidate_cache()
    return list(fs.find(root)) if fs.exists(root) else []


def holders(target: str) -> set[int]:
    """Processes that hold leases."""
    fs, _ = locate(target)
    found = set()
    for path in files(target):
        if LEASES in path and path.endswith(".json"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                found.add(int(json.loads(fs.cat_file(path))["pid"]))
    return found


def contents(target: str) -> dict[str, bytes]:
    """The files of a finished folder, but for the statistics and the index, which hold times."""
    fs, root = locate(target)
    paths = {path.rsplit("/", 1)[-1]: path for path in files(target) if f"{root}/." not in path}
    return {
        name: fs.cat_file(path)
        for name, path in sorted(paths.items())
        if not name.endswith(("_stats.json", "index.arrow"))
    }


def kill_at_random(toy: Toy, source: str, target: str, workers: int, kills: int, s3: dict[str, Any]) -> None:
    """Run a job whose workers are killed and started again until ``kills`` of them were; then let it finish."""
    draw = random.Random(0)
    processes = [start(toy, source, target, s3) for _ in range(workers)]
    deadline = time.monotonic() + 120
    met = 0
    try:
        while met < kills and any(process.is_alive() for process in processes):
            held = holders(target)
            busy = [i for i, process in enumerate(processes) if process.is_alive() and process.pid in held]
            if busy:
                time.sleep(draw.uniform(0, 0.2))
                victim = draw.choice(busy)
                processes[victim].kill()
                processes[victim].join(10)
                met += processes[victim].exitcode == -signal.SIGKILL
                processes[victim] = start(toy, source, target, s3)
            time.sleep(0.05)
        assert met == kills, f"only {met} workers were killed that held a shard"
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()


def check(alone: dict[str, bytes], target: str) -> None:
    found = contents(target)
    assert found.keys() == alone.keys()
    for name in alone:
        assert found[name] == alone[name], name
    assert read_latent_set(target).samples == len(open_index([target])) == 24


def test_workers_killed_at_random_leave_what_one_process_makes(
    toy: Toy, source: str, alone: dict[str, bytes], tmp_path: Path
) -> None:
    target = str(tmp_path / "latents")
    kill_at_random(toy, source, target, workers=3, kills=5, s3={})
    check(alone, target)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        options = {"endpoint_url": endpoint, "key": "any", "secret": "any"}
        patch.setitem(fsspec.config.conf, "s3", options)
        fsspec.filesystem("s3").makedirs("encoded")
        yield options


def test_the_same_in_an_object_store(
    toy: Toy,
    source: str,
    alone: dict[str, bytes],
    store: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path))
    kill_at_random(toy, source, "s3://encoded/latents", workers=3, kills=3, s3=store)
    check(alone, "s3://encoded/latents")


def test_a_lease_is_one_workers_until_it_expires(tmp_path: Path) -> None:
    with Leases(str(tmp_path), 0.4) as ours, Leases(str(tmp_path), 0.4) as theirs:
        assert ours.claim("a")
        assert not theirs.claim("a")
        time.sleep(0.8)
        assert not theirs.claim("a")  # it was renewed meanwhile
        ours.release("a")
        assert theirs.claim("a")
        dead = tmp_path / ".leases" / "b.json"
        dead.write_text("{}")
        assert not ours.claim("b")
        time.sleep(0.5)
        assert ours.claim("b")
    assert dead.exists() is False
