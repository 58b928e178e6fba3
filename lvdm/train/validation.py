"""What a run does beside its steps: losses on held-out samples, and clips to watch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from lvdm.config import PreviewConfig
from lvdm.data.loader import Loader
from lvdm.engine.distributed import gather_rows
from lvdm.engine.engine import Engine
from lvdm.train.autoencoder import AutoencoderTask
from lvdm.train.latent_diffusion import LatentDiffusionTask
from lvdm.train.metrics import Means, MetricsWriter

T = TypeVar("T")


def validate(
    task: AutoencoderTask | LatentDiffusionTask,
    engine: Engine,
    held_out: Loader,
    writer: MetricsWriter,
    step: int,
    alive: Callable[[], None],
) -> dict[str, float]:
    """What validation gives with the live and with the averaged weights; the picture shows the averaged ones.

    Args:
        alive: called at each batch.
    """

    def run() -> tuple[dict[str, float], Any]:
        means = Means(engine.ranks.device)
        with engine.evaluating():
            sums, picture = task.validate(engine, _each(held_out, alive), held_out.samples)
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


def sample_preview(
    config: PreviewConfig,
    task: LatentDiffusionTask,
    engine: Engine,
    writer: MetricsWriter,
    step: int,
    alive: Callable[[], None],
) -> None:
    """Sample the preview's captions with the averaged weights, by all ranks.

    Args:
        alive: called at each step of the sampler.
    """
    ranks = engine.ranks
    with engine.averaged_weights(), engine.evaluating():
        clips_BTHWC = task.preview(engine, config, ranks.rank, ranks.world, lambda done, total: alive())
    everyones_BTHWC = gather_rows(clips_BTHWC.to(ranks.device)).cpu().numpy()
    writer.clips(step, everyones_BTHWC[: len(config.prompts)], config.prompts, config.fps)


def _each(items: Iterable[T], alive: Callable[[], None]) -> Iterator[T]:
    for item in items:
        alive()
        yield item
