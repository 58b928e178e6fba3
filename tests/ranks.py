"""Run a function on several real ranks: gloo, DeepSpeed imported once by a fork server, a time limit, no leftovers."""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as launch/train.py; read when the fork server loads torch
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = [
    "lvdm.train.loop",
    "deepspeed.module_inject.auto_ep_layer",  # from here on what is imported late, for seconds in every rank
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "setuptools",
    "torchvision.utils",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "diffusers.models.autoencoders.autoencoder_kl",
    "s3fs",
    "tests.preloaded",
]


def start_server() -> None:
    """Start what ranks are forked from, in the background. Whoever does so first in a process decides what it imports
    and which signals it blocks, and loaders would want others."""
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    multiprocessing.forkserver.ensure_running()


class Launch:
    """Ranks that were started; `results` waits for them."""

    def __init__(self, function: Callable[..., Any], world: int, args: tuple[Any, ...]) -> None:
        port = _free_port()
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_run, args=(theirs, rank, world, port, function, args))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def results(self, timeout: float = 120) -> list[Any]:
        """What ``function`` returned on each rank. Raises `AssertionError` with the first traceback."""
        deadline = time.monotonic() + timeout
        answers = []
        try:
            for rank, pipe in enumerate(self._pipes):
                assert pipe.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} did not answer in {timeout} s"
                try:
                    answers.append(pipe.recv())
                except EOFError:
                    answers.append((False, f"rank {rank} died"))
        finally:
            self.kill() if len(answers) < len(self._pipes) else self._join()
        failed = [text for fine, text in answers if not fine]
        assert not failed, failed[0]
        return [torch.load(io.BytesIO(value), weights_only=True) for _, value in answers]

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self.processes:
            process.kill()
        self._join()

    def _join(self) -> None:
        for process in self.processes:
            process.join(20)


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*args)`` on ``world`` ranks with the launcher's environment set; results in rank order."""
    return Launch(function, world, args).results(timeout)


def _run(pipe: Connection, rank: int, world: int, port: int, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started the fork server may have blocked some
    try:
        # as bytes: tensors sent as such live in shared memory that dies with this process
        answer = io.BytesIO()
        torch.save(function(*args), answer)
        pipe.send((True, answer.getvalue()))
    except BaseException:
        pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
