"""Saving engines while they train on, and restoring them, on all ranks together."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch

import lvdm
from lvdm.checkpoint.blocks import Damaged
from lvdm.checkpoint.folder import Attempt, CheckpointFolder, Retention
from lvdm.checkpoint.manifest import MODEL, Manifest, Network, StoredFile
from lvdm.checkpoint.node_writer import NodeWriter, discard
from lvdm.checkpoint.pieces import FROZEN, KINDS
from lvdm.checkpoint.reader import Checkpoint, Near, check_shapes, step_name
from lvdm.engine import distributed
from lvdm.engine.engine import Engine
from lvdm.engine.snapshot import Snapshot
from lvdm.errors import Requeue, UserError

T = TypeVar("T")
_SLOWEST = 10 << 20  # bytes a second that a node reads, or writes and reads back, both attempts together, at least
_HANG = 1800.0  # seconds that a rank may take for anything else
_RETRY_PAUSE = 1.0
_LONGEST_PLACE = 95  # bytes; a socket's path has 107 at most


class Saver:
    """Writes checkpoints in the background; at most one is in flight.

    `save` copies the state into host memory and returns. A thread of each rank then has its node's writer write the
    rank's file, and the main rank's publishes the checkpoint when all are there. These threads speak with each other
    over a process group of their own, so that they are independent of the training's collectives.
    """

    def __init__(
        self, folder: CheckpointFolder, engines: Mapping[str, Engine], keep: Retention, ranks: distributed.Ranks
    ) -> None:
        """Collective. Removes what interrupted saves left in ``folder``.

        Raises:
            UserError: there is no memory for a copy of the state or no place for a socket, or ``folder`` is unreadable.
            Requeue: the store of ``folder`` does not answer.
        """
        self._folder, self._keep, self._ranks = folder, keep, ranks
        starts_writer = ranks.local_rank == 0
        distributed.together(lambda: folder.sweep() if ranks.is_main else None, ranks.device)
        self._snapshot = distributed.together(lambda: Snapshot(engines), ranks.device)
        self._scratch = distributed.together(lambda: _place_of_socket() if starts_writer else None, ranks.device)
        node = ranks.rank - ranks.local_rank  # by its first rank
        facts = {"node": node, "size": self._snapshot.size, "scratch": str(self._scratch)}
        gathered = distributed.gather_json(facts, ranks.device)
        nodes: Counter[int] = Counter()
        for item in gathered:
            nodes[item["node"]] += item["size"]
        self._total = nodes.total()
        self.patience = max(nodes.values()) / _SLOWEST
        """Seconds that a save may take, beyond what a rank may take for anything, before it counts as hung."""
        self._group = distributed.host_group(self.patience + _HANG)
        path = f"{gathered[node]['scratch']}/socket"
        self._writer = distributed.together(lambda: NodeWriter(path, owner=starts_writer), ranks.device)
        self.newest = ""
        """Name of the last checkpoint that `save` has completed."""
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the last save failed; `wait` then raises on all ranks."""
        return self._failure is not None

    def save(self, manifest: Manifest) -> None:
        """Begin to write the checkpoint that ``manifest`` describes, but for its files (collective).

        Raises what `wait` raises, of the save before.
        """
        self.wait()
        self._snapshot.take()
        self._thread = threading.Thread(target=self._finish, args=(manifest,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint in flight is complete.

        Raises:
            UserError: on all ranks, if any could not write; what was there before is untouched.
            Requeue: the same, where a store or a writer failed that may work again later.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Wait, whatever came of it, and end the writer."""
        if self._thread is not None:
            self._thread.join()
        self._writer.close()
        self._snapshot.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _finish(self, manifest: Manifest) -> None:
        """In the background, on each rank: everything from the copy to the published checkpoint."""
        try:
            begin = functools.partial(self._folder.begin, manifest.step, self._total)
            attempt = Attempt(**self._agree(lambda: self._on_main(lambda: vars(begin())))[0])
            try:
                written = self._written(attempt)
                self._agree(lambda: self._on_main(lambda: self._publish(attempt, manifest, written)))
                self.newest = step_name(manifest.step)
            except (UserError, Requeue):
                self._on_main(lambda: self._folder.abandon(attempt))
                raise
        except (UserError, Requeue) as error:
            self._failure = type(error)(f"{error}{self._what_is_whole()}")
        except Exception as error:
            self._failure = error

    def _written(self, attempt: Attempt) -> list[dict[str, Any]]:
        """The files of all ranks, in two attempts.

        All ranks make the second one: the rank that starts a dead writer again may have had its file already.
        """
        try:
            return self._agree(lambda: self._write(attempt))
        except (UserError, Requeue) as first:
            time.sleep(_RETRY_PAUSE)
            written = self._agree(lambda: self._write(attempt, again=True))
            if self._ranks.is_main:
                print(
                    f"checkpoint written at the second attempt; the first failed: {first}", file=sys.stderr, flush=True
                )
            return written

    def _write(self, attempt: Attempt, again: bool = False) -> dict[str, Any]:
        name = attempt.file_name(self._ranks.rank)
        url = f"{attempt.place}/{name}"
        if again:
            discard(url)
        entry = self._writer.write(url, self._snapshot.handle, self._snapshot.size)
        return {"name": name, "size": entry.size, "sha256": entry.sha256}

    def _what_is_whole(self) -> str:
        with contextlib.suppress(Exception):  # where it lies may be what has failed
            whole = self._folder.latest()
            return f"; {whole} is whole" if whole else ""
        return ""

    def _publish(self, attempt: Attempt, manifest: Manifest, written: list[dict[str, Any]]) -> None:
        files = {item["name"]: StoredFile(size=item["size"], sha256=tuple(item["sha256"])) for item in written}
        try:
            self._folder.publish(attempt, manifest.model_copy(update={"files": files}))
        except (OSError, Damaged) as error:
            raise UserError(f"cannot write checkpoint {attempt.final}: {error}") from None
        try:
            self._folder.prune(self._keep)
        except OSError as error:
            raise UserError(f"cannot delete old checkpoints in {self._folder.root}: {error.strerror}") from None

    def _on_main(self, action: Callable[[], T]) -> T | None:
        return action() if self._ranks.is_main else None

    def _agree(self, action: Callable[[], Any]) -> list[Any]:
        """What ``action`` gave on each rank (plain JSON); an error of any rank is raised on all."""
        return distributed.everyones(action, self._group)


def _place_of_socket() -> Path:
    """A private folder with a path that is short enough for a socket's. Raises `UserError`."""
    for folder in (None, "/tmp"):  # noqa: S108 (mkdtemp's is private); that of TMPDIR may be too long for a socket
        try:
            place = tempfile.mkdtemp(prefix="lvdm-writer-", dir=folder)
        except OSError as error:
            raise UserError(f"cannot make a temporary folder: {error}; set TMPDIR to one that can be written") from None
        if len(os.fsencode(place)) <= _LONGEST_PLACE:
            break
        os.rmdir(place)
    return Path(place)


def describe(
    engines: Mapping[str, Engine],
    step: int,
    *,
    clock: dict[str, Any],
    facts: dict[str, Any],
    scores: dict[str, float],
    config: dict[str, Any],
) -> Manifest:
    """The manifest of this moment, without files; the arguments are fields of `Manifest`."""
    one = next(iter(engines.values()))
    return Manifest(
        step=step,
        clock=clock,
        facts=facts,
        scores=scores,
        config=config,
        written_by={
            "ranks": one.ranks.world,
            "zero_stage": one.stage,
            "precision": one.precision,
            "lvdm": lvdm.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        },
        networks={
            name: Network(
                optimizer_step=engine.optimizer_step, shapes=engine.shapes(), frozen=tuple(engine.frozen_names)
            )
            for name, engine in engines.items()
        },
        files={},
    )


class Resumption:
    """The newest checkpoint of a run, or the newest older one once something about it turns out to be damaged."""

    def __init__(self, folder: CheckpointFolder, ranks: distributed.Ranks) -> None:
        """Collective. Raises `UserError` if there are checkpoints, but none of them is whole."""
        self._folder, self._ranks = folder, ranks
        self._names = distributed.everyones(lambda: folder.names() if ranks.is_main else None, ranks.device)[0]
        self.checkpoint: Checkpoint | None = None
        """What the run goes on from; None where there has never been a checkpoint."""
        self.faults: list[str] = []
        """What is wrong with newer ones."""
        if self._names:
            self.attempt(lambda checkpoint: None)

    @property
    def patience(self) -> float:
        """Seconds that reading the checkpoint may take, as if one slow node read all of it, before that is a hang."""
        if self.checkpoint is None:
            return 0.0
        return sum(file.size for file in self.checkpoint.manifest.files.values()) / _SLOWEST

    def attempt(self, action: Callable[[Checkpoint], None]) -> None:
        """Call ``action`` with the checkpoint, and where it raises `Damaged` on any rank, on all with the one before.

        Raises:
            UserError: there is none left.
        """
        while True:
            faults = [fault for fault in distributed.everyones(lambda: self._try(action), self._ranks.device) if fault]
            if not faults:
                return
            self.faults.append(faults[0])
            self.checkpoint = None
            self._folder.pass_over(self._names.pop(0))
            if not self._names:
                raise UserError(f"every checkpoint in {self._folder.root} is damaged: {'; '.join(self.faults)}")

    def _try(self, action: Callable[[Checkpoint], None]) -> str:
        try:
            if self.checkpoint is None:
                place = Near(self._ranks.rank, self._ranks.world)
                self.checkpoint = Checkpoint(self._folder.location(self._names[0]), place)
            action(self.checkpoint)
        except Damaged as fault:
            return str(fault)
        return ""


def restore_frozen(module: torch.nn.Module, checkpoint: Checkpoint, network: str = MODEL) -> None:
    """Load the parameters that do not learn, before an engine takes the module.

    Raises:
        Damaged: the checkpoint is.
        UserError: it is of another model, or others of its parameters learnt.
    """
    held, source = checkpoint.network(network), checkpoint.location
    check_shapes(held.shapes, {name: tuple(p.shape) for name, p in module.named_parameters()}, source)
    frozen = {name for name, param in module.named_parameters() if not param.requires_grad}
    if frozen != set(held.frozen):
        raise UserError(f"in {source} other parameters learnt than model.trainable says; start a new run")
    with torch.no_grad():
        for name in held.frozen:
            module.get_parameter(name).copy_(checkpoint.parameter(FROZEN, name, network))


def restore(engines: Mapping[str, Engine], resumption: Resumption) -> Checkpoint:
    """Load masters, moments and averages into ``engines`` (collective), whatever ranks and stage wrote them.

    Returns:
        The checkpoint that they are from.
    Raises:
        UserError: no checkpoint is whole, or it is of other networks.
    """
    resumption.attempt(lambda checkpoint: _read_into(engines, checkpoint))
    assert resumption.checkpoint is not None
    resumption.checkpoint.close()
    for name, engine in engines.items():
        engine.restored(resumption.checkpoint.network(name).optimizer_step)
    return resumption.checkpoint


def _read_into(engines: Mapping[str, Engine], checkpoint: Checkpoint) -> None:
    if engines.keys() != checkpoint.manifest.networks.keys():
        raise UserError(
            f"{checkpoint.location} holds {', '.join(checkpoint.manifest.networks)}; this run trains "
            f"{', '.join(engines)}"
        )
    for network, engine in engines.items():
        check_shapes(checkpoint.network(network).shapes, engine.shapes(), checkpoint.location)
        parts = [(fragment, engine.tensors(fragment)) for fragment in engine.fragments()]
        for kind in KINDS:  # as they lie in the files
            for fragment, tensors in parts:
                target = tensors[kind]
                read = target if target.device.type == "cpu" else torch.empty(fragment.length)
                checkpoint.read(kind, fragment.name, fragment.start, read, network)
                if read is not target:
                    target.copy_(read)
