"""What the ranks of ``test_saving.py`` do."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from typing import Any

import torch

from lvdm.checkpoint.folder import CheckpointFolder, Retention
from lvdm.checkpoint.manifest import Manifest
from lvdm.checkpoint.pieces import KINDS
from lvdm.config import BatchConfig, EngineConfig
from lvdm.engine import distributed, saving
from lvdm.engine.distributed import Ranks
from lvdm.engine.engine import Engine
from lvdm.errors import Requeue, UserError
from tests.engine.zero_cases import BATCH, LR, OPTIM, full, loss_of, micro_batches, network
from tests.train.chaos import writers_of_this_process

Case = dict[str, Any]
ADDRESSES = ("generator", "discriminator")


def engines_of(case: Case, ranks: Ranks) -> dict[str, Engine]:
    """Two networks of one run, the first with a part that does not learn, both in the stage and precision of a case."""
    config = EngineConfig(**case)
    made = {}
    for name in ADDRESSES:
        model = network()
        if name == "generator":
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad = "time" not in parameter_name
        made[name] = Engine(model, config, BatchConfig(size=BATCH, micro=BATCH // ranks.world), OPTIM, ranks)
    return made


def train(engines: dict[str, Engine], step: int) -> None:
    """One optimiser step of each network, the second one with twice the learning rate."""
    for number, engine in enumerate(engines.values(), start=1):
        (parts,) = micro_batches(step, engine.ranks.rank, engine.ranks.world, BATCH // engine.ranks.world)
        engine.backward(loss_of(engine, parts, engine.dtype))
        assert engine.step(number * LR).applied


def manifest_of(engines: dict[str, Engine], step: int) -> Manifest:
    """The manifest of a step."""
    return saving.describe(engines, step, clock={"samples": step * BATCH}, facts={}, scores={}, config={})


def states(engines: dict[str, Engine]) -> dict[str, torch.Tensor]:
    """Everything that learns, whole."""
    return {
        f"{network} {kind} {name}": tensor
        for network, engine in engines.items()
        for kind in KINDS
        for name, tensor in full(engine, kind).items()
    }


def write_each(root: str, cases: dict[str, Case]) -> dict[str, dict[str, torch.Tensor]]:
    """Train two steps in each case and save; the states that were saved."""
    ranks = distributed.start(60)
    written = {}
    for name, case in cases.items():
        engines = engines_of(case, ranks)
        saver = saving.Saver(CheckpointFolder(f"{root}/{name}"), engines, Retention(), ranks)
        for step in (1, 2):
            train(engines, step)
        saver.save(manifest_of(engines, 2))
        written[name] = states(engines)
        train(engines, 3)  # while it is being written
        saver.wait()
        saver.close()
    distributed.stop()
    return written


def read_each(root: str, cases: dict[str, tuple[str, Case]]) -> dict[str, Any]:
    """Restore each named checkpoint into engines of another case; the states, and the bytes that this rank read."""
    ranks = distributed.start(60)
    read = {}
    for name, (written, case) in cases.items():
        engines = engines_of(case, ranks)
        origin = saving.Resumption(CheckpointFolder(f"{root}/{written}"), ranks)
        checkpoint = saving.restore(engines, origin)
        read[name] = {
            "states": states(engines),
            "bytes": checkpoint.bytes_read,
            "optimizer_steps": [engine.optimizer_step for engine in engines.values()],
        }
    distributed.stop()
    return read


def slow_then_full(root: str, filler: str) -> dict[str, Any]:
    """A writer that is held up; a disk that fills up while it writes, and has room again; a writer that dies when the
    rank that starts it has its file already; a store that does not answer."""
    ranks = distributed.start(60)
    tempfile.tempdir = f"{os.path.dirname(root)}/{'long' * 30}"  # too long for a socket in it
    os.makedirs(tempfile.tempdir, exist_ok=True)
    engines = engines_of({"zero_stage": 2, "precision": "fp32"}, ranks)
    folder = CheckpointFolder(root)
    saver = saving.Saver(folder, engines, Retention(), ranks)
    seen: dict[str, Any] = {}

    train(engines, 1)
    hold(saver, signal.SIGSTOP)
    saver.save(manifest_of(engines, 1))
    saved = states(engines)
    for step in (2, 3):
        train(engines, step)
    time.sleep(0.2)
    seen["latest while it is written"] = folder.latest()
    hold(saver, signal.SIGCONT)
    saver.wait()
    seen["latest afterwards"] = folder.latest()
    seen["saved"] = saved
    seen["later"] = states(engines)

    hold(saver, signal.SIGSTOP)
    saver.save(manifest_of(engines, 3))
    time.sleep(0.5)  # the disk still has room when it is asked
    if ranks.is_main:
        with open(filler, "wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass
    distributed.barrier()
    hold(saver, signal.SIGCONT)
    while not saver.failed:
        time.sleep(0.01)
    seen["full"] = message_of(saver)
    seen["left"] = sorted(os.listdir(root))
    distributed.barrier()
    if ranks.is_main:
        os.unlink(filler)
    distributed.barrier()
    saver.save(manifest_of(engines, 4))
    saver.wait()
    seen["latest with room again"] = folder.latest()

    (writer,) = distributed.gather_json(writers_of_this_process(), ranks.device)[0]
    if not ranks.is_main:
        kill_when_asked(saver, writer)
    saver.save(manifest_of(engines, 5))
    saver.wait()
    seen["latest after the writer died"] = folder.latest()

    folder.publish = folder.latest = no_answer  # type: ignore[method-assign]
    saver.save(manifest_of(engines, 6))
    seen["no answer"] = message_of(saver)
    saver.close()
    distributed.stop()
    return seen


def hold(saver: saving.Saver, number: signal.Signals) -> None:
    """Stop this node's writer or let it go on; all ranks return when it is done."""
    for pid in writers_of_this_process():
        os.kill(pid, number)
    distributed.barrier()


def kill_when_asked(saver: saving.Saver, writer: int) -> None:
    """Let this rank's next request come last, and its node's writer die while it waits for the answer."""
    write = saver._writer.write

    def late(*given: Any) -> Any:
        saver._writer.write = write  # type: ignore[method-assign]
        time.sleep(1.0)  # the others have their files
        os.kill(writer, signal.SIGSTOP)
        threading.Timer(0.2, os.kill, (writer, signal.SIGKILL)).start()
        return write(*given)

    saver._writer.write = late  # type: ignore[method-assign]


def no_answer(*_: object) -> Any:
    """As a store that is down."""
    raise Requeue("no answer")


def message_of(saver: saving.Saver) -> str:
    """The error of the save in flight."""
    try:
        saver.wait()
    except (UserError, Requeue) as error:
        return f"{type(error).__name__}: {error}"
    return ""
