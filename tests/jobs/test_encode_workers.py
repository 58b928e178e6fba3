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
from lvdm.jobs import encoding_worker, shard_queue
from lvdm.jobs.encode_latents import Settings, encode_folder
from lvdm.jobs.leases import FOLDER, Leases
from lvdm.jobs.make_shards import make_shapes
from lvdm.storage import locate
from tests.conftest import Toy
from tests.data.stores import s3_server

_CONTEXT = multiprocessing.get_context("forkserver")
LEASE = 1.0
WORKERS, KILLS, SHARDS = 4, 20, 40
SETTINGS = Settings(only="latents", frames_at_once=8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two clips a shard."""
    folder = tmp_path_factory.mktemp("source")
    make_shapes(str(folder), clips=2 * SHARDS, held_out_clips=2, frames=8, size=16, fps=8, seed=0, shard_size=2)
    return str(folder / "train")


@pytest.fixture(scope="module")
def alone(toy: Toy, source: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a single process makes."""
    target = str(tmp_path_factory.mktemp("alone") / "latents")
    process = start(toy, source, target, {}, 0.0)
    process.join(60)
    assert process.exitcode == 0
    return contents(target)


def start(toy: Toy, source: str, target: str, s3: dict[str, Any], pause: float) -> BaseProcess:
    """A worker in a process of its own, which takes ``pause`` more seconds for a shard."""
    process = _CONTEXT.Process(target=work, args=(toy.diffusion(toy.folder / "run"), source, target, s3, pause))
    process.start()
    return process


def work(tree: dict[str, Any], source: str, target: str, s3: dict[str, Any], pause: float) -> None:
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    fsspec.config.conf["s3"] = s3
    shard_queue.LOOK_EVERY = 0.2
    writing = encoding_worker.write_shard
    # a worker has each shard long enough for kills to find it there
    encoding_worker.write_shard = lambda *given, **how: (time.sleep(pause), writing(*given, **how))[1]  # type: ignore[attr-defined]
    config = parse_training_config(tree, source="test")
    assert isinstance(config, LatentDiffusionTraining)
    cpu = torch.device("cpu")
    encode_folder(config, source, target, device=cpu, dtype=torch.float32, settings=SETTINGS, lease_seconds=LEASE)


def files(target: str) -> list[str]:
    """Paths of all files in a folder."""
    fs, root = locate(target)
    fs.invalidate_cache()
    return list(fs.find(root)) if fs.exists(root) else []


def holders(target: str) -> set[int]:
    """Processes that hold leases."""
    fs, root = locate(f"{target}/{FOLDER}")
    fs.invalidate_cache()
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for path in fs.ls(root, detail=False):
            with contextlib.suppress(OSError, ValueError):
                found.add(int(json.loads(fs.cat_file(path))["pid"]))
    return found


def contents(target: str) -> dict[str, bytes]:
    """The files of a finished folder, but for the statistics and the index, which hold times."""
    fs, root = locate(target)
    paths = {path.removeprefix(f"{root}/"): path for path in files(target)}
    return {
        name: fs.cat_file(path)
        for name, path in sorted(paths.items())
        if not name.endswith(("_stats.json", "index.arrow")) and not name.startswith(".index/")
    }


def kill_at_random(toy: Toy, source: str, target: str, s3: dict[str, Any]) -> None:
    """Run a job whose workers are killed and started again until `KILLS` of them were; then let it finish."""
    draw = random.Random(0)
    processes = [start(toy, source, target, s3, 0.3) for _ in range(WORKERS)]
    deadline = time.monotonic() + 120
    met = 0
    try:
        while met < KILLS and any(process.is_alive() for process in processes):
            held = holders(target)
            busy = [i for i, process in enumerate(processes) if process.is_alive() and process.pid in held]
            if busy:
                time.sleep(draw.uniform(0, 0.2))
                victim = draw.choice(busy)
                processes[victim].kill()
                processes[victim].join(10)
                met += processes[victim].exitcode == -signal.SIGKILL
                processes[victim] = start(toy, source, target, s3, 0.3)
            time.sleep(0.02)
        assert met == KILLS, f"only {met} workers were killed that held a shard"
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
    assert read_latent_set(target).samples == len(open_index([target])) == 2 * SHARDS


def test_workers_killed_at_random_leave_what_one_process_makes(
    toy: Toy, source: str, alone: dict[str, bytes], tmp_path: Path
) -> None:
    target = str(tmp_path / "latents")
    kill_at_random(toy, source, target, {})
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
    kill_at_random(toy, source, "s3://encoded/latents", store)
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
