"""The training loop, top to bottom.

Everything periodic is a function of the step, everything random a function of (seed, position), so what a run must
remember is one clock: steps done and samples seen.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch

from lvdm.attempts import Attempt
from lvdm.checkpoint.folder import CheckpointFolder, Retention
from lvdm.checkpoint.manifest import MODEL
from lvdm.checkpoint.reader import Checkpoint
from lvdm.config import AnyTraining, AutoencoderTraining, LatentDiffusionTraining
from lvdm.data.batch import Replacement
from lvdm.data.loader import Loader, build_loader, build_validation_loader
from lvdm.engine import desync, distributed, preflight, saving, signals
from lvdm.engine.distributed import Ranks, gather_json, on_any_rank, together
from lvdm.engine.engine import Engine
from lvdm.engine.memory_plan import plan_of
from lvdm.engine.optim import learning_rate
from lvdm.engine.pulse import Pulse, Vitals
from lvdm.engine.watchdog import Watchdog
from lvdm.errors import AskedToStop, Requeue, UserError, own_errors, rank_from_environment
from lvdm.models.build import parameter_count
from lvdm.models.remat import checkpoint_blocks
from lvdm.models.trainable import freeze_all_but
from lvdm.storage import append_json
from lvdm.train.autoencoder import AutoencoderTask
from lvdm.train.events import EventLog
from lvdm.train.guard import Guard
from lvdm.train.latent_diffusion import LatentDiffusionTask
from lvdm.train.metrics import Means, MetricsWriter, drop_lines_after, memory_gb
from lvdm.train.recovery import go_back, note_spike
from lvdm.train.run_folder import RunFolder
from lvdm.train.sample_log import SampleLog
from lvdm.train.speed import Speedometer
from lvdm.train.stragglers import Stopwatch, Stragglers
from lvdm.train.validation import sample_preview, validate
from lvdm.weights.native import load_into

Task = AutoencoderTask | LatentDiffusionTask
_BEATS = ("loss", "samples_per_second", "seconds_left")
"""What the heartbeat tells of the log's values."""


@dataclass
class Clock:
    """All that a run remembers besides the engine's tensors."""

    step: int = 0
    """Optimiser steps done, skipped ones included."""
    samples: int = 0
    """``batch.size`` a step, even of a bucket whose steps are larger or smaller: what the learning rate goes by."""
    taken: int = 0
    """Samples that the steps really took: what the speed and the fraction of bad samples are measured in."""
    data: dict[str, Any] = field(default_factory=dict)
    """How the samples are mixed and since when, or which shards of a stream are finished (`Loader.state`)."""
    replaced: int = 0
    """Samples that others stood in for."""
    skipped_steps: list[int] = field(default_factory=list)
    """Steps whose gradients were not finite."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What gradient norms are usual (`Guard.state`)."""
    passed_over: list[int] = field(default_factory=list)
    """Steps that are done without their samples, since the run spiked there once and went back."""


def train(config: AnyTraining, stop: signals.StopRequest) -> None:
    """Run a training config to its end on this rank, or until any rank's ``stop`` has received a signal.

    Raises:
        UserError: bad input, on all ranks alike.
        Requeue: a stop signal came and the run is saved, or a fault that passes ended it; ``run.resume=auto`` goes on.
    """
    run = RunFolder(config)
    changes = run.enter()
    limit = config.run.stall_timeout
    with (
        Attempt(run.path, config.run.steps, enabled=rank_from_environment() == 0) as attempt,
        Watchdog(limit, often=attempt.write, stalled=attempt.stalled) as watchdog,
    ):
        ranks = distributed.start(limit, config.run.deterministic, met=watchdog.join)
        try:
            _train(config, run, changes, ranks, stop, attempt, watchdog)
        except RuntimeError as error:
            if distributed.lost_a_device(error):
                if isinstance(error, distributed.FaultElsewhere):
                    what = f"the device of another rank failed ({' '.join(str(error).split())})"
                else:  # rank 0 alone reports what is raised
                    where = f"of rank {ranks.rank} on {socket.gethostname()}"
                    what = f"the device {where} failed ({str(error).splitlines()[0]})"
                    print(what, file=sys.stderr, flush=True)
            elif distributed.lost_a_rank(error):
                what = "another rank died or hangs"
            else:
                raise
            whole = CheckpointFolder(run.checkpoints).latest() or "no checkpoint"
            raise Requeue(f"{what}; {whole} is whole, go on with run.resume=auto") from error
        finally:
            distributed.stop()


def _train(
    config: AnyTraining,
    run: RunFolder,
    changes: list[str],
    ranks: Ranks,
    stop: signals.StopRequest,
    attempt: Attempt,
    watchdog: Watchdog,
) -> None:
    began = time.perf_counter()
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    folder = CheckpointFolder(run.checkpoints)
    origin = saving.Resumption(folder, ranks)
    goes_on = origin.checkpoint is not None
    if goes_on and config.run.resume == "never":
        raise UserError(f"{run.checkpoints} holds checkpoints already; go on with run.resume=auto or choose another")
    hosts = gather_json(socket.gethostname(), ranks.device)

    def begin() -> None:
        step, name = (origin.checkpoint.manifest.step, origin.checkpoint.name) if origin.checkpoint else (0, "")
        attempt.begin(step, ranks.world, len(set(hosts)), name)

    if run.exists:  # so that a start counts which memory or a fault ends before its first step
        begin()
    watchdog.progress("loading", extra=origin.patience)
    task, taken = together(lambda: _build_task(config, ranks.device, dtype, new=not goes_on), ranks.device)
    if goes_on:
        origin.attempt(lambda checkpoint: _take_over(run, task, checkpoint))
    size = f"{parameter_count(task.model) / 1e6:.2f} M parameters"
    if config.model.trainable:
        size += f", of which {parameter_count(task.model, learning=True) / 1e6:.2f} M learn"
    checks = preflight.check(config, task.model, ranks, run.checkpoints)
    if config.engine.activation_checkpointing:
        checkpoint_blocks(task.model.remat_blocks(), config.engine.checkpoint_every)
    engine = Engine(task.model.to(ranks.device), config.engine, config.batch, config.optim, ranks)

    clock = Clock()
    if goes_on:
        watchdog.progress("restoring", extra=origin.patience)
        clock = _clock_of(saving.restore({MODEL: engine}, origin))
    elif config.run.resume == "must":
        raise UserError(f"run.resume=must, but {run.checkpoints} holds no checkpoint")
    loader = together(lambda: _open_loader(config, ranks, clock), ranks.device)
    batches = iter(loader)
    held_out = together(lambda: _open_held_out(config, ranks), ranks.device)
    keep = Retention(config.run.keep, config.run.keep_every, config.run.keep_best, task.score)

    if ranks.is_main:
        run.claim(ranks.world)
        begin()
        if run.replaced.is_file():
            drop_lines_after(run.replaced, clock.step)
        notes = [f"damaged checkpoint passed over: {fault}" for fault in origin.faults]
        notes += [f"changed on resume: {change}" for change in changes]
        ahead = [step for step in clock.passed_over if step > clock.step]
        if ahead and any(change.startswith(("batch.size", "data.")) for change in changes):
            notes.append(
                f"steps {ahead[0]} to {ahead[-1]} will be passed over, now with other samples than spiked there"
            )
        _announce(config, run, size, ranks, clock, [*notes, *taken, *loader.notes, *checks, str(plan_of(engine))])
    writer = MetricsWriter(
        run.log, run.tensorboard, run.images, run.samples, enabled=ranks.is_main, from_step=clock.step
    )
    means = Means(ranks.device)
    speed = Speedometer(clock.step, clock.taken)
    speed.spend("start", time.perf_counter() - began)
    preview = config.preview if isinstance(config, LatentDiffusionTraining) else None
    replaced: list[Replacement] = []

    events = EventLog(run.events, enabled=ranks.is_main)
    guard = Guard(config.health, clock.guard)
    pulse = Pulse(ranks, config.run.stall_timeout)
    stopwatch = Stopwatch(ranks.device)
    stragglers = Stragglers(hosts, config.health.straggler)
    seen = SampleLog(run.seen, ranks, clock.step) if config.run.log_samples else None
    if on_any_rank([stop.signal > 0], ranks.device)[0]:
        raise AskedToStop("asked to, before the first step; go on with run.resume=auto")
    if guard.must_go_back:  # it was stopped before it could
        watchdog.progress("going back", extra=origin.patience)
        go_back(config, folder, events, guard, clock.passed_over, ranks)
    with (
        contextlib.closing(saving.Saver(folder, {MODEL: engine}, keep, ranks)) as saver,
        contextlib.ExitStack() as leaving,
    ):
        leaving.callback(watchdog.progress, "the end of the last save", extra=saver.patience)
        while clock.step < config.run.steps:
            watchdog.progress("step", clock.step + 1)
            lr = learning_rate(config.optim, clock.samples, config.run.steps * config.batch.size)
            passed_over = clock.step + 1 in clock.passed_over
            losses: list[tuple[list[int], torch.Tensor]] = []
            for _ in range(engine.accumulation):
                with own_errors(ranks.rank):
                    batch = speed.wait_for(batches)
                clock.taken += len(batch) * ranks.world
                replaced += batch.replaced
                if passed_over:
                    continue
                if seen is not None:
                    seen.add(clock.step + 1, batch)
                with stopwatch.running():
                    loss, report = task.loss(engine, batch)
                engine.backward(loss)
                result = engine.step(lr, guard.limit)
                means.add(report)
                losses.append((batch.positions, loss.detach()))
            clock.step += 1
            clock.samples += config.batch.size
            if not passed_over and guard.see(clock.step, result.grad_norm):
                if not result.applied:
                    clock.skipped_steps.append(clock.step)
                note_spike(events, clock.step, result, guard, losses, hosts, ranks)

            everyone = pulse.beat(
                Vitals(stop.signal, saver.failed, guard.must_go_back, stopwatch.take(), speed.waited_in_step())
            )
            stragglers.add(everyone)
            last = clock.step == config.run.steps
            spiked = any(vitals.spiked for vitals in everyone) or (last and guard.must_go_back)
            if spiked or any(vitals.save_failed for vitals in everyone):
                watchdog.progress("waiting for a checkpoint", clock.step, extra=saver.patience)
                saver.wait()
            if spiked:
                watchdog.progress("going back", clock.step, extra=saver.patience)
                go_back(config, folder, events, guard, clock.passed_over, ranks)
            stopping = max((vitals.stop for vitals in everyone), default=0)
            attempt.now("training", clock.step, **({"checkpoint": saver.newest} if saver.newest else {}))
            saving_now = last or stopping > 0 or clock.step % config.run.save_every == 0
            if saving_now or clock.step % config.run.log_every == 0:
                values = means.reduce()
                clock.replaced += _list_replaced(run, clock.step, replaced, ranks)
                values |= speed.report(clock.step, clock.taken, steps=config.run.steps)
                if not passed_over:
                    values |= {"lr": lr, "grad_norm": result.grad_norm}
                late, slow = stragglers.report()
                values |= {"memory_gb": memory_gb(ranks.device), **late}
                values |= {"skipped_steps": len(clock.skipped_steps), "clipped_steps": guard.clipped}
                values |= {"replaced": clock.replaced}
                if math.isfinite(guard.limit):
                    values["clip_limit"] = guard.limit
                writer.scalars(clock.step, values)
                for fault in slow:
                    events.add("straggler", clock.step, **fault)
                if ranks.is_main:
                    _print_line(clock.step, config.run.steps, values)
                known: dict[str, Any] = {name: values.get(name) for name in _BEATS}
                attempt.now("training", **known)
                _check_bad_fraction(config, run, clock)
            scores: dict[str, float] = {}
            in_haste = stopping > 0 and not last  # whoever asked may not wait for more than a checkpoint
            if held_out is not None and not in_haste and (last or clock.step % config.validation.every == 0):
                attempt.now("validating")
                with speed.paused("validation"):
                    alive = functools.partial(watchdog.progress, "validation", clock.step)
                    scores = validate(task, engine, held_out, writer, clock.step, alive)
            due = preview is not None and not in_haste and (last or clock.step % preview.every == 0)
            if due and (last or not on_any_rank([stop.signal > 0], ranks.device)[0]):
                attempt.now("sampling")
                with speed.paused("preview"):
                    assert preview is not None
                    assert isinstance(task, LatentDiffusionTask)
                    alive = functools.partial(watchdog.progress, "preview", clock.step)
                    sample_preview(preview, task, engine, writer, clock.step, alive)
            if saving_now or clock.step % config.health.check_every == 0:
                clock.guard = guard.state()
                desync.check(engine, task.frozen_parts(), asdict(clock), hosts)
            if saving_now:
                attempt.now("saving")
                watchdog.progress("saving", clock.step, extra=saver.patience)
                with speed.paused("saving"):
                    clock.data = loader.state(gather_json(loader.take_finished(), ranks.device))
                    state = {"clock": asdict(clock), "facts": task.facts(), "config": config.model_dump(mode="json")}
                    saver.save(saving.describe({MODEL: engine}, clock.step, scores=scores, **state))
                    if stopping or last:
                        saver.wait()
                        attempt.now("saving", checkpoint=saver.newest)
            if stopping or last:
                writer.scalars(clock.step, speed.spent())
            if in_haste:
                writer.close()
                by = signal.Signals(stopping).name
                raise AskedToStop(
                    f"asked to by {by}, after step {clock.step}; everything is saved, go on with run.resume=auto"
                )
    writer.close()


def _build_task(config: AnyTraining, device: torch.device, dtype: torch.dtype, new: bool) -> tuple[Task, list[str]]:
    """The task, of a new run with the weights it starts from, and what to say of it."""
    task: Task
    match config:
        case AutoencoderTraining():
            task = AutoencoderTask(config, device, dtype)
        case LatentDiffusionTraining():
            task = LatentDiffusionTask(config, device, dtype)
    freeze_all_but(task.model, config.model.trainable)
    notes = task.notes if isinstance(task, LatentDiffusionTask) else []
    if new and config.run.init_from:
        notes = [*notes, *load_into(task.model, config.run.init_from, strict=config.run.init_strict)]
    return task, notes


def _take_over(run: RunFolder, task: Task, checkpoint: Checkpoint) -> None:
    """Check that ``checkpoint`` is of this run, and load what does not learn; the rest is `saving.restore`'s."""
    run.changes_from(checkpoint.manifest.config, source=checkpoint.location)
    if isinstance(task, LatentDiffusionTask):
        task.check_facts(checkpoint.manifest.facts)
    saving.restore_frozen(task.model, checkpoint)


def _clock_of(checkpoint: Checkpoint) -> Clock:
    """The clock of a checkpoint. Raises `UserError` if it has fields that this version of lvdm does not know."""
    unknown = checkpoint.manifest.clock.keys() - asdict(Clock()).keys()
    if unknown:
        raise UserError(
            f"{checkpoint.location} was written by lvdm {checkpoint.manifest.written_by.get('lvdm')}, whose clock has "
            f"{', '.join(sorted(unknown))}; go on with that version, or start a new run from its exported weights"
        )
    return Clock(**checkpoint.manifest.clock)


def _open_loader(config: AnyTraining, ranks: Ranks, clock: Clock) -> Loader:
    return build_loader(
        config.data,
        seed=config.run.seed,
        batch=config.batch.size,
        micro=config.batch.micro,
        world=ranks.world,
        rank=ranks.rank,
        first_step=clock.step,
        steps=config.run.steps - clock.step,
        state=clock.data,
    )


def _open_held_out(config: AnyTraining, ranks: Ranks) -> Loader | None:
    """The held-out samples that every validation goes over; none if the config names no shards."""
    if not config.validation.shards:
        return None
    return build_validation_loader(
        config.data,
        config.validation.shards,
        seed=config.run.seed,
        samples=config.validation.samples,
        micro=config.batch.micro,
        world=ranks.world,
        rank=ranks.rank,
    )


def _check_bad_fraction(config: AnyTraining, run: RunFolder, clock: Clock) -> None:
    # Some patience at the start, where a single bad sample is a large fraction.
    allowed = config.data.max_bad_fraction * max(clock.taken, 1000)
    if clock.replaced > allowed:
        raise UserError(
            f"{clock.replaced} of {clock.taken} samples had bad bytes, more than data.max_bad_fraction "
            f"{config.data.max_bad_fraction}; they are listed in {run.replaced}"
        )


def _list_replaced(run: RunFolder, step: int, replaced: list[Replacement], ranks: Ranks) -> int:
    """Append the samples that were replaced on any rank up to ``step`` and since the last call to the run's list, and
    count them (collective)."""
    gathered = gather_json([asdict(item) for item in replaced], ranks.device)
    replaced.clear()
    lines = [item for items in gathered for item in items]
    if ranks.is_main and lines:
        lines.sort(key=lambda item: item["position"])
        append_json(run.replaced, *({"step": step} | item for item in lines))
    return len(lines)


def _announce(config: AnyTraining, run: RunFolder, size: str, ranks: Ranks, clock: Clock, notes: list[str]) -> None:
    for note in notes:
        print(note, flush=True)
    origin = f"going on at step {clock.step}" if clock.step else "new run"
    print(
        f"{run.path}: {origin}; {config.model.kind} of {size}; {config.run.steps} steps of {config.batch.size} "
        f"samples; {ranks.world} rank{'s' * (ranks.world > 1)} on {ranks.device.type}, "
        f"ZeRO-{config.engine.zero_stage}, {config.engine.precision}",
        flush=True,
    )


def _print_line(step: int, steps: int, values: dict[str, float]) -> None:
    left = timedelta(seconds=round(values["seconds_left"]))
    learnt = "samples passed over"
    if "loss" in values and "lr" in values:
        learnt = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad {values['grad_norm']:.2f}"
    print(
        f"step {step}/{steps}  {learnt}  {values['samples_per_second']:.1f} samples/s  "
        f"data wait {values['data_wait_fraction']:.0%}  left {left}",
        flush=True,
    )
