"""The training loop, top to bottom.

Everything periodic is a function of the step, everything random a function of (seed, position), so what a run must
remember is one clock: steps done and samples seen.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch

from lvdm.checkpoint.folder import CheckpointFolder, Retention
from lvdm.checkpoint.manifest import MODEL
from lvdm.checkpoint.reader import Checkpoint
from lvdm.config import AnyTraining, AutoencoderTraining, LatentDiffusionTraining, PreviewConfig
from lvdm.data.batch import Replacement
from lvdm.data.loader import Loader, build_loader, build_validation_loader
from lvdm.engine import distributed, saving, signals
from lvdm.engine.distributed import Ranks, gather_json, gather_rows, on_any_rank, together
from lvdm.engine.engine import Engine
from lvdm.engine.memory_plan import plan_of
from lvdm.engine.optim import learning_rate
from lvdm.errors import Requeue, UserError
from lvdm.models.build import parameter_count
from lvdm.models.remat import checkpoint_blocks
from lvdm.models.trainable import freeze_all_but
from lvdm.train.autoencoder import AutoencoderTask
from lvdm.train.latent_diffusion import LatentDiffusionTask
from lvdm.train.metrics import Means, MetricsWriter, drop_lines_after, memory_gb
from lvdm.train.run_folder import RunFolder
from lvdm.train.sample_log import SampleLog
from lvdm.weights.native import load_into

Task = AutoencoderTask | LatentDiffusionTask


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


def train(config: AnyTraining, stop: signals.StopRequest) -> None:
    """Run a training config to its end on this rank, or until any rank's ``stop`` has received a signal.

    Raises:
        UserError: bad input, on all ranks alike.
        Requeue: a stop signal came and the run is saved, or another rank died; it goes on with ``run.resume=auto``.
    """
    run = RunFolder(config)
    changes = run.enter()
    signals.expect_progress_within(config.run.stall_timeout)
    ranks = distributed.start(config.run.stall_timeout)
    try:
        _train(config, run, changes, ranks, stop)
    except RuntimeError as error:
        if not distributed.lost_a_rank(error):
            raise
        whole = CheckpointFolder(run.checkpoints).latest() or "no checkpoint"
        raise Requeue(f"another rank died or hangs; {whole} is whole, go on with run.resume=auto") from error
    finally:
        signals.stop_watching()
        distributed.stop()


def _train(config: AnyTraining, run: RunFolder, changes: list[str], ranks: Ranks, stop: signals.StopRequest) -> None:
    began = time.perf_counter()
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    folder = CheckpointFolder(run.checkpoints)
    origin = saving.Resumption(folder, ranks)
    goes_on = origin.checkpoint is not None
    if goes_on and config.run.resume == "never":
        raise UserError(f"{run.checkpoints} holds checkpoints already; go on with run.resume=auto or choose another")
    task, taken = together(lambda: _build_task(config, ranks.device, dtype, new=not goes_on), ranks.device)
    if goes_on:
        origin.attempt(lambda checkpoint: _take_over(run, task, checkpoint))
    size = f"{parameter_count(task.model) / 1e6:.2f} M parameters"
    if config.model.trainable:
        size += f", of which {parameter_count(task.model, learning=True) / 1e6:.2f} M learn"
    if config.engine.activation_checkpointing:
        checkpoint_blocks(task.model.remat_blocks(), config.engine.checkpoint_every)
    engine = Engine(task.model.to(ranks.device), config.engine, config.batch, config.optim, ranks)

    clock = Clock()
    if goes_on:
        clock = _clock_of(saving.restore({MODEL: engine}, origin))
    elif config.run.resume == "must":
        raise UserError(f"run.resume=must, but {run.checkpoints} holds no checkpoint")
    loader = together(lambda: _open_loader(config, ranks, clock), ranks.device)
    batches = iter(loader)
    held_out = together(lambda: _open_held_out(config, ranks), ranks.device)
    keep = Retention(config.run.keep, config.run.keep_every, config.run.keep_best, task.score)

    if ranks.is_main:
        run.claim(ranks.world)
        if run.replaced.is_file():
            drop_lines_after(run.replaced, clock.step)
        notes = [f"damaged checkpoint passed over: {fault}" for fault in origin.faults]
        notes += [f"changed on resume: {change}" for change in changes]
        _announce(config, run, size, ranks, clock, [*notes, *taken, *loader.notes, str(plan_of(engine))])
    writer = MetricsWriter(
        run.log, run.tensorboard, run.images, run.samples, enabled=ranks.is_main, from_step=clock.step
    )
    means = Means(ranks.device)
    speed = Speedometer(clock.step, clock.taken)
    speed.spend("start", time.perf_counter() - began)
    preview = config.preview if isinstance(config, LatentDiffusionTraining) else None
    replaced: list[Replacement] = []
    stopping = False

    seen = SampleLog(run.seen, ranks, clock.step) if config.run.log_samples else None
    with contextlib.closing(saving.Saver(folder, {MODEL: engine}, keep, ranks)) as saver:
        while clock.step < config.run.steps:
            lr = learning_rate(config.optim, clock.samples, config.run.steps * config.batch.size)
            for _ in range(engine.accumulation):
                batch = speed.wait_for(batches)
                if seen is not None:
                    seen.add(clock.step + 1, batch)
                loss, report = task.loss(engine, batch)
                engine.backward(loss)
                result = engine.step(lr)
                means.add(report)
                clock.taken += len(batch) * ranks.world
                replaced += batch.replaced
            clock.step += 1
            clock.samples += config.batch.size
            if not result.applied:
                clock.skipped_steps.append(clock.step)
            signals.expect_progress_within(config.run.stall_timeout)

            last = clock.step == config.run.steps
            saving_now = last or clock.step % config.run.save_every == 0
            if saving_now or clock.step % config.run.log_every == 0:
                values = means.reduce()
                clock.replaced += _list_replaced(run, clock.step, replaced, ranks)
                values |= speed.report(clock.step, clock.taken, steps=config.run.steps)
                values |= {"lr": lr, "grad_norm": result.grad_norm, "memory_gb": memory_gb(ranks.device)}
                values |= {"skipped_steps": len(clock.skipped_steps), "replaced": clock.replaced}
                writer.scalars(clock.step, values)
                if ranks.is_main:
                    _print_line(clock.step, config.run.steps, values)
                _check_bad_fraction(config, run, clock)
                stopping, failed = on_any_rank([stop.received, saver.failed], ranks.device)
                if failed:
                    saver.wait()
            scores: dict[str, float] = {}
            if held_out is not None and (last or clock.step % config.validation.every == 0):
                with speed.paused("validation"):
                    scores = _validate(task, engine, held_out, writer, clock.step)
            if preview is not None and (last or clock.step % preview.every == 0):
                with speed.paused("preview"):
                    assert isinstance(task, LatentDiffusionTask)
                    _preview(preview, task, engine, writer, clock.step)
            if saving_now or stopping:
                with speed.paused("saving"):
                    signals.expect_progress_within(config.run.stall_timeout + saver.patience)
                    clock.data = loader.state(gather_json(loader.take_finished(), ranks.device))
                    state = {"clock": asdict(clock), "facts": task.facts(), "config": config.model_dump(mode="json")}
                    saver.save(saving.describe({MODEL: engine}, clock.step, scores=scores, **state))
                    if stopping or last:
                        saver.wait()
            if stopping or last:
                writer.scalars(clock.step, speed.spent())
            if stopping and not last:
                writer.close()
                raise Requeue(f"asked to, after step {clock.step}; everything is saved, go on with run.resume=auto")
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


def _validate(task: Task, engine: Engine, held_out: Loader, writer: MetricsWriter, step: int) -> dict[str, float]:
    """What validation gives with the live and with the averaged weights; the picture shows the averaged ones."""

    def run() -> tuple[dict[str, float], Any]:
        means = Means(engine.ranks.device)
        with engine.evaluating():
            sums, picture = task.validate(engine, held_out, held_out.samples)
        means.add(sums)
        return means.reduce(), picture

    live, _ = run()
    with engine.averaged_weights():
        averaged, picture = run()
    values = {f"validation/{name}": value for name, value in live.items()}
    values |= {f"validation_ema/{name}": value for name, value in averaged.items()}
    writer.scalars(step, values)
    if picture is not None:
        writer.image(step, "reconstructions", picture)
    if engine.ranks.is_main:
        shown = "  ".join(f"{name} {live[name]:.4f} (EMA {averaged[name]:.4f})" for name in live if "/" not in name)
        print(f"validation at step {step}: {shown}", flush=True)
    return values


def _preview(
    preview: PreviewConfig, task: LatentDiffusionTask, engine: Engine, writer: MetricsWriter, step: int
) -> None:
    """Sample the preview's captions with the averaged weights, by all ranks."""
    ranks = engine.ranks
    with engine.averaged_weights(), engine.evaluating():
        clips_BTHWC = task.preview(engine, preview, ranks.rank, ranks.world)
    everyones_BTHWC = gather_rows(clips_BTHWC.to(ranks.device)).cpu().numpy()
    writer.clips(step, everyones_BTHWC[: len(preview.prompts)], preview.prompts, preview.fps)


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
        with run.replaced.open("a", encoding="utf-8") as file:
            for item in sorted(lines, key=lambda item: item["position"]):
                file.write(json.dumps({"step": step} | item) + "\n")
    return len(lines)


class Speedometer:
    """Rates since the last report, leaving out what it is `paused` for, and where the time went."""

    def __init__(self, step: int, samples: int) -> None:
        self._spent: dict[str, float] = {}
        self._step, self._samples = step, samples
        self._since = time.perf_counter()
        self._waited = 0.0

    def wait_for(self, loader: Iterator[Any]) -> Any:
        """The next micro-batch; the time until it is there counts as waiting for data."""
        begin = time.perf_counter()
        batch = next(loader)
        self._waited += time.perf_counter() - begin
        return batch

    def report(self, step: int, samples: int, steps: int) -> dict[str, float]:
        """Rates at ``step`` of ``steps``, which all ranks took ``samples`` to reach, and a new beginning."""
        seconds = time.perf_counter() - self._since
        values = {
            "samples_per_second": (samples - self._samples) / seconds,
            "data_wait_fraction": self._waited / seconds,
            "seconds_left": (steps - step) * seconds / (step - self._step),
        }
        self.spend("training", seconds - self._waited)
        self.spend("data_wait", self._waited)
        self._step, self._samples, self._waited = step, samples, 0.0
        self._since = time.perf_counter()
        return values | self.spent()

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Leave the time inside the block out of the rates; it goes into ``name``."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._since += seconds
        self.spend(name, seconds)

    def spend(self, name: str, seconds: float) -> None:
        """Count seconds as gone into ``name``."""
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    def spent(self) -> dict[str, float]:
        """Seconds by what they went into since the last call, as ``seconds/NAME``."""
        taken = {f"seconds/{name}": seconds for name, seconds in self._spent.items()}
        self._spent.clear()
        return taken


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
    print(
        f"step {step}/{steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad {values['grad_norm']:.2f}  "
        f"{values['samples_per_second']:.1f} samples/s  data wait {values['data_wait_fraction']:.0%}  left {left}",
        flush=True,
    )
