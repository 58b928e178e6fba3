"""What the ranks of ``test_memory_plan.py`` and ``tools/bench/memory.py`` do: train two steps and walk the tensors."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from lvdm.checkpoint.folder import CheckpointFolder, Retention
from lvdm.checkpoint.manifest import MODEL
from lvdm.config import BatchConfig, EngineConfig, OptimConfig, TextUNetConfig
from lvdm.engine import deepspeed_config, distributed, saving
from lvdm.engine.engine import Engine
from lvdm.engine.memory_plan import COMPONENTS, checkpoint_bytes, plan_of
from lvdm.engine.snapshot import Snapshot
from lvdm.models.build import build_model

ACCUMULATION, FRAMES, SIDE, TEXT = 2, 2, 4, 3
SMALL = 4096
"""Bytes that flags, norms and counts of steps may take together."""
Case = dict[str, Any]


def measure_all(model: dict[str, Any], cases: list[Case]) -> list[dict[str, Any]]:
    """`measure` of each case in one process group; ``model`` are fields of `TextUNetConfig`."""
    ranks = distributed.start(120)
    # The walk over all objects meets some of torch's that warn when they are looked at.
    warnings.filterwarnings("ignore", category=FutureWarning)
    results = [measure(TextUNetConfig(**model), ranks, **case) for case in cases]
    distributed.stop()
    return results


def measure(
    config: TextUNetConfig,
    ranks: distributed.Ranks,
    stage: int,
    precision: str,
    frozen: bool = False,
    offload: bool = False,
    bucket: int = deepspeed_config.BUCKET,
    folder: str = "",
) -> dict[str, Any]:
    """Bytes of this rank by component: as planned, and the most that were found at any moment of a step.

    Args:
        frozen: whether a third of the parameters does not learn.
        bucket: in the place of `deepspeed_config.BUCKET`.
        folder: where a checkpoint is written, to be weighed; empty for none.
    """
    deepspeed_config.BUCKET = bucket
    walk = Walk()
    model = build_model(config, seed=3)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not frozen or number % 3 > 0)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    zero = EngineConfig(zero_stage=stage, precision=precision, offload_optimizer=offload)
    batch = BatchConfig(size=ACCUMULATION * ranks.world, micro=1)
    engine = Engine(model, zero, batch, OptimConfig(lr=1e-3), ranks)
    train(engine, config, walk)
    plan = plan_of(engine)
    walk.most["saving"] = Snapshot({MODEL: engine}).size
    return {
        "planned": {name: plan.bytes_of(name) for name in COMPONENTS},
        "found": {name: walk.most[name] for name in COMPONENTS},
        "together": walk.together,
        "unknown": walk.unknown,
        "on_disk": write_checkpoint(engine, folder) if folder else 0,
        "formula": checkpoint_bytes(learning, total - learning),
    }


def write_checkpoint(engine: Engine, folder: str) -> int:
    """Bytes of the files of a checkpoint, on all ranks alike (collective)."""
    with contextlib.closing(
        saving.Saver(CheckpointFolder(folder), {MODEL: engine}, Retention(), engine.ranks)
    ) as saver:
        saver.save(saving.describe({MODEL: engine}, 2, clock={}, facts={}, scores={}, config={}))
        saver.wait()
    distributed.barrier()
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def train(engine: Engine, config: TextUNetConfig, walk: Walk) -> None:
    """Two steps on noise, the second of them under ``walk``'s eyes."""
    generator = torch.Generator().manual_seed(1)
    zero: Any = engine._zero
    for step in range(2):
        watched = step == 1
        if watched:
            release = getattr(zero, "_release_ipg_buffers", lambda: None)  # the last thing that a backward pass does
            zero._release_ipg_buffers = lambda r=release: (walk.look(engine, busy=True), r())
            engine._adamw.register_step_pre_hook(lambda *_: walk.look(engine))
        for _ in range(ACCUMULATION):
            z = torch.randn(1, config.latent_channels, FRAMES, SIDE, SIDE, generator=generator).to(engine.dtype)
            text = torch.randn(1, TEXT, config.context_dim, generator=generator).to(engine.dtype)
            loss = engine(z, torch.tensor([5]), text, None).float().square().mean()
            if watched:
                walk.look(engine, busy=True)
            engine.backward(loss)
            del loss
            if watched:
                walk.look(engine)
            engine.step(1e-3)
            if watched:
                walk.look(engine)


class Walk:
    """Assigns every tensor that came alive since it was made to a component, by whose memory it is a view of."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()  # `gc.get_objects` passes over what there is now
        self.most: Counter[str] = Counter()
        """Most bytes of each component that were found at one time."""
        self.together = 0
        """Most bytes of all components that were found at one time."""
        self.unknown = 0
        """Most bytes of tensors that belonged to none, while no activations were alive."""

    def look(self, engine: Engine, busy: bool = False) -> None:
        """Take stock; ``busy`` if activations are alive."""
        found: Counter[str] = Counter()
        known: set[int] = set()
        for component, tensors in _owned(engine):
            found[component] += _unseen(tensors, known)
        if not busy:
            unknown = _unseen(_alive(), set(known))
            for _ in range(40):  # gloo's threads let go of what a collective sent some time after its end
                if unknown > SMALL:
                    time.sleep(0.05)
                    unknown = _unseen(_alive(), set(known))
            self.unknown = max(self.unknown, unknown)
        self.together = max(self.together, found.total())
        self.most |= found


def _unseen(tensors: Iterable[Any], seen: set[int]) -> int:
    """Bytes of the tensors whose memory is not yet in ``seen``, which it then is."""
    new = {place: storage for place, storage in _storages(tensors).items() if place not in seen}
    seen.update(new)
    return sum(storage.nbytes() for storage in new.values())


def _owned(engine: Engine) -> Iterator[tuple[str, list[Any]]]:
    """Tensors by component. A tensor that is a view of another's memory belongs to the component that comes first."""
    zero: Any = engine._zero
    parameters = list(engine.module.parameters())
    states = [engine._adamw.state[master] for master in engine.masters]
    yield "masters", engine.masters
    yield "moments", [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    yield "EMA", [state["ema"] for state in states]
    yield "buckets", [bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()]
    sums = ("grads_in_partition", "all_grad_tensors", "averaged_gradients", "accumulated_grads_in_cpu")
    more = ("grad_partitions_flat_buffer", "fp32_groups_gradients_flat")
    yield "accumulation", [getattr(zero, name, None) for name in (*sums, *more)] + [m.grad for m in engine.masters]
    passing = ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload")
    yield "staging", [getattr(zero, n, None) for n in (*passing, "param_buffer_of_bit16_for_cpu_offload_groups")]
    yield "parameters", [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    yield "gathered", parameters
    yield "gradients", [parameter.grad for parameter in parameters]
    yield "frozen copy", list(engine.frozen().values())


def _alive() -> list[torch.Tensor]:
    """Every tensor made since the walk began that Python knows, and its gradient, which it may not know."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return tensors + [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]


def _storages(things: Iterable[Any]) -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors among ``things`` and in the lists and mappings among them, by its identity."""
    found = {}
    for thing in things:
        match thing:
            case torch.Tensor():
                storage = thing.untyped_storage()
                if storage.nbytes() and thing.device.type != "meta":
                    found[storage._cdata] = storage
            case dict():
                found |= _storages(thing.values())
            case list():
                found |= _storages(thing)
    return found
