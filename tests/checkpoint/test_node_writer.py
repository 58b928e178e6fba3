"""The process that writes for a node's ranks: what it answers, and when it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lvdm.checkpoint.blocks import block_digests
from lvdm.checkpoint.node_writer import NodeWriter
from lvdm.errors import UserError

DATA = b"state" * 1000


@pytest.fixture
def handle() -> Iterator[int]:
    """Memory with `DATA` and more in it."""
    memory = os.memfd_create("test")
    os.write(memory, DATA + b"not asked for")
    yield memory
    os.close(memory)


def test_it_writes_what_it_is_handed_and_says_in_one_line_what_it_cannot(tmp_path: Path, handle: int) -> None:
    writer = NodeWriter(f"{tmp_path}/socket", owner=True)
    other = NodeWriter(f"{tmp_path}/socket", owner=False)  # of another rank
    try:
        entry = other.write(f"{tmp_path}/file", handle, len(DATA))
        assert (tmp_path / "file").read_bytes() == DATA
        assert (entry.size, list(entry.sha256)) == (len(DATA), block_digests(memoryview(DATA)))
        message = (
            rf"^cannot write checkpoint file {tmp_path}/nowhere/file: its folder is not there; can all nodes see it"
        )
        with pytest.raises(UserError, match=message):
            writer.write(f"{tmp_path}/nowhere/file", handle, len(DATA))
        with pytest.raises(UserError, match=r"^cannot write checkpoint file nosuch://file: .*nosuch"):
            writer.write("nosuch://file", handle, len(DATA))
    finally:
        writer.close()
    assert not (tmp_path / "socket").exists()


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from lvdm.checkpoint.node_writer import NodeWriter\n"
        "writer = NodeWriter(sys.argv[1], owner=True)\n"
        "writer._connect().close()\n"
        "print(writer._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, f"{tmp_path}/socket"], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        writer = int(owner.stdout.readline())
        assert (tmp_path / "socket").exists()
        owner.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{writer}/cmdline").exists() and Path(f"/proc/{writer}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "socket").exists()
