"""Saving and restoring an `Engine`, on all ranks together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch

import lvdm
from lvdm.engine import checkpoint as files
from lvdm.engine import distributed
from lvdm.engine.checkpoint import Checkpoint, Damaged, Manifest
from lvdm.engine.engine import Engine
from lvdm.errors import UserError


def save(
    root: Path,
    engine: Engine,
    step: int,
    *,
    clock: dict[str, Any],
    facts: dict[str, Any],
    config: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` under ``root`` (collective). Complete or absent, whatever fails on the way.

    Args:
        clock: state of the training loop, plain JSON.
        facts: what users of the weights need beyond the config, plain JSON.
        config: the resolved training config.
        keep: newest checkpoints that stay; older ones are deleted after this one is verified.
    Raises:
        UserError: on all ranks, if any rank could not write; what was there before is untouched.
    """
    ranks = engine.ranks
    partial, final = files.partial_folder(root, step)
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    tensors = {
        files.piece_key(kind, fragment.start, fragment.name): tensor
        for fragment in engine.fragments()
        for kind, tensor in engine.tensors(fragment).items()
    }
    tensors |= {files.piece_key(files.FROZEN, 0, name): tensor.flatten() for name, tensor in engine.frozen().items()}
    entries, message = None, ""
    try:
        entries = files.write_rank_file(partial, ranks.rank, tensors)
    except UserError as error:
        message = str(error)
    gathered = distributed.gather_json({"entry": entries, "message": message}, ranks.device)
    if ranks.is_main and any(item["message"] for item in gathered):
        shutil.rmtree(partial, ignore_errors=True)
    distributed.raise_first([item["message"] for item in gathered])

    def publish() -> None:
        if not ranks.is_main:
            return
        manifest = Manifest(
            step=step,
            optimizer_step=engine.optimizer_step,
            clock=clock,
            facts=facts,
            config=config,
            written_by={
                "ranks": ranks.world,
                "zero_stage": engine.stage,
                "precision": engine.precision,
                "lvdm": lvdm.__version__,
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
            },
            shapes=engine.shapes(),
            frozen=engine.frozen_names,
            files={item["entry"].pop("name"): item["entry"] for item in gathered},
        )
        try:
            files.publish(partial, final, manifest)
            files.delete_old(root, keep)
        except OSError as error:
            raise UserError(f"cannot write checkpoint {final}: {error}") from None

    distributed.together(publish, ranks.device)
    return final


def find_newest(root: Path, ranks: distributed.Ranks) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every byte is right and the faults of newer ones; the ranks share the reading.

    Raises:
        UserError: there are checkpoints, but none of them is good.
    """
    names = distributed.gather_json([folder.name for folder in files.newest_first(root)], ranks.device)[0]
    faults: list[str] = []
    for name in names:
        message, found = "", None
        try:
            found = Checkpoint(root / name)
            found.verify(ranks.rank, ranks.world)
        except Damaged as fault:
            message = str(fault)
        messages = [m for m in distributed.gather_json(message, ranks.device) if m]
        if found is not None and not messages:
            return found, faults
        faults.append(messages[0])
    if faults:
        raise UserError(f"every checkpoint in {root} is damaged: {'; '.join(faults)}")
    return None, []


def restore_frozen(module: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Load the parameters that do not learn, before an engine takes the module.

    Raises:
        UserError: the checkpoint is of another model, or others of its parameters learnt.
    """
    manifest, source = checkpoint.manifest, str(checkpoint.folder)
    files.check_shapes(manifest.shapes, {name: tuple(p.shape) for name, p in module.named_parameters()}, source)
    frozen = {name for name, param in module.named_parameters() if not param.requires_grad}
    if frozen != set(manifest.frozen):
        raise UserError(f"in {source} other parameters learnt than model.trainable says; start a new run")
    with torch.no_grad():
        for name in manifest.frozen:
            module.get_parameter(name).copy_(checkpoint.parameter(files.FROZEN, name))


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Load masters, moments and averages into ``engine`` (collective), whatever ranks and stage wrote them.

    Raises:
        UserError: the checkpoint lacks a part.
    """

    def read() -> None:
        for fragment in engine.fragments():
            for kind, tensor in engine.tensors(fragment).items():
                try:
                    tensor.copy_(checkpoint.read(kind, fragment.name, fragment.start, fragment.length))
                except Damaged as fault:
                    raise UserError(str(fault)) from None

    distributed.together(read, engine.ranks.device)
    engine.restored(checkpoint.manifest.optimizer_step)
