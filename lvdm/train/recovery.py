"""What a run does about spikes of its gradient norm: say where they come from, and go back if they do not end."""

from __future__ import annotations

import math
from typing import Any

import torch

from lvdm.checkpoint.folder import CheckpointFolder
from lvdm.config import AnyTraining
from lvdm.engine.distributed import Ranks, everyones, gather_json
from lvdm.engine.engine import StepResult
from lvdm.errors import RolledBack, UserError
from lvdm.train.events import EventLog
from lvdm.train.guard import Guard


def note_spike(
    events: EventLog,
    step: int,
    result: StepResult,
    guard: Guard,
    losses: list[tuple[list[int], torch.Tensor]],
    hosts: list[str],
    ranks: Ranks,
) -> None:
    """Say which samples a spike or a gradient that is not finite came from (collective)."""
    mine = [(positions, float(loss)) for positions, loss in losses]
    told = [
        {"rank": rank, "host": hosts[rank], "positions": positions, "loss": loss}
        for rank, micro_batches in enumerate(gather_json(mine, ranks.device))
        for positions, loss in micro_batches
    ]
    suspects = [item for item in told if not math.isfinite(item["loss"])]
    if result.applied and not suspects:
        suspects = [max(told, key=lambda item: abs(item["loss"]))]
    worst = "loss of " + ", ".join(
        f"rank {item['rank']} ({item['host']}) at positions {', '.join(map(str, item['positions']))}: {item['loss']:g}"
        for item in suspects
    )
    if not suspects:
        worst = "all losses are finite, so something overflowed in the backward pass"
    if result.applied:
        kind, what = "spike", f"gradient norm {result.grad_norm:.3g}, usual are {guard.mean:.3g}"
    else:
        kind, what = "non_finite", "gradients are not finite; no rank took the step"
    positions = sorted(position for item in told for position in item["positions"])
    norm = result.grad_norm if math.isfinite(result.grad_norm) else None
    suspects = [item | {"loss": str(item["loss"])} for item in suspects]  # JSON has no NaN
    facts = {"positions": positions, "suspects": suspects, "grad_norm": norm}
    events.add(kind, step, f"{what}; {worst}", **facts)


def go_back(
    config: AnyTraining, folder: CheckpointFolder, events: EventLog, guard: Guard, passed_over: list[int], ranks: Ranks
) -> None:
    """End the run so that it goes on at the newest checkpoint before the spikes, without their samples (collective).

    Args:
        passed_over: steps of earlier returns.
    Raises:
        RolledBack: it can; on all ranks.
        UserError: it has done so too often, or there is no such checkpoint.
    """
    health, first, last = config.health, guard.spiked[0], guard.spiked[-1]
    what = f"the gradient norm spiked from step {first} on ({health.spike_steps} times in a row)"
    advice = "lower optim.lr or look at these samples, which events.jsonl lists"
    if guard.rollbacks >= health.rollbacks:
        raise UserError(f"{what}, after {guard.rollbacks} returns to an earlier checkpoint already; {advice}")

    def amended(clock: dict[str, Any]) -> dict[str, Any]:
        state = Guard.state_gone_back(clock.get("guard"), guard.rollbacks + 1)
        return clock | {"passed_over": sorted({*passed_over, *guard.spiked}), "guard": state}

    def roll_back() -> str:
        try:
            return folder.roll_back(first, amended)
        except OSError as error:
            raise UserError(f"{what}, and the run cannot go back in {folder.root}: {error}; see to its disk") from None

    name = everyones(lambda: roll_back() if ranks.is_main else "", ranks.device)[0]
    if not name:
        raise UserError(
            f"{what}, and there is no checkpoint before; {advice}, or save earlier (run.save_every, run.keep)"
        )
    message = f"{what}; back to {name}, then on without the samples of steps {first} to {last}"
    if config.data.kind == "stream":
        message += ", which in a stream may come at other steps again"
    events.add("rolled_back", last, message, first=first, last=last, checkpoint=name)
    raise RolledBack(f"{message}; go on with run.resume=auto")
