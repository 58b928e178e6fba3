"""The cluster that the SLURM tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Toy
from tests.slurm.cluster import Cluster, Unavailable
from tests.slurm.scenarios import Scenarios


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """SLURM looks at time limits every 30 s: whoever waits for one does so while all other tests run."""
    items.sort(key=lambda item: "time-limit" in item.name)


def _place() -> str:
    """In memory, if that may hold scripts and devices: SLURM answers nobody while it saves its state, and checkpoints
    keep the disk busy. Not below pytest's folders, whose names are too long for sockets."""
    memory = "/dev/shm"
    usable = os.path.isdir(memory) and not os.statvfs(memory).f_flag & (os.ST_NOEXEC | os.ST_NODEV)
    return memory if usable else "/tmp"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Skips where SLURM cannot be started, unless LVDM_REQUIRE_SLURM says that it must (.ci/run)."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir=_place()))
    try:
        started = Cluster(folder)
    except Unavailable as reason:
        shutil.rmtree(folder)
        if os.environ.get("LVDM_REQUIRE_SLURM"):
            raise
        pytest.skip(str(reason))
    yield started
    started.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def scenarios(cluster: Cluster, toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenarios]:
    """Begun with the first test that wants them or runs beside them."""
    begun = Scenarios(cluster, toy, tmp_path_factory.mktemp("scenarios"))
    yield begun
    begun.close()
