"""What the ranks of ``test_zero.py`` do, and the same without DeepSpeed in one process."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lvdm.config import BatchConfig, EngineConfig, OptimConfig, TextUNetConfig
from lvdm.engine import distributed
from lvdm.engine.engine import Engine
from lvdm.models.build import build_model
from lvdm.models.remat import checkpoint_blocks

STEPS, BATCH, LR = 3, 8, 2e-3
MODEL = TextUNetConfig(
    model_channels=8,
    channel_mult=(1,),
    res_blocks=1,
    attention_levels=(),
    heads=2,
    context_dim=6,
    temporal_length=2,
    norm_groups=4,
)
# A large eps keeps Adam's first steps from turning rounding of tiny gradients into steps of full size.
OPTIM = OptimConfig(lr=LR, eps=1e-3, weight_decay=0.1, clip_grad_norm=1.0, ema_decay=0.9)
Tensors = dict[str, torch.Tensor]


def network() -> torch.nn.Module:
    """The tiny text UNet; its zero-initialised layers, and all of temporal attention, are filled with small numbers, so
    that every gradient is at work and none is so large that bf16 hides the others."""
    model = build_model(MODEL, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() or (".attn_time" in name and ".to_" in name):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(step: int) -> tuple[torch.Tensor, ...]:
    """Latents, times, text and targets of a step's global batch."""
    generator = torch.Generator().manual_seed(100 + step)
    z = torch.randn(BATCH, 4, 2, 4, 4, generator=generator)
    text = torch.randn(BATCH, 3, 6, generator=generator)
    t = torch.randint(0, 1000, (BATCH,), generator=generator)
    return z, t, text, torch.randn(z.shape, generator=generator)


def loss_of(net: Any, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """Mean squared error in fp32."""
    z, t, text, target = parts
    return (net(z.to(dtype), t, text.to(dtype), None).float() - target).square().mean()


def micro_batches(step: int, rank: int, world: int, micro: int) -> list[tuple[torch.Tensor, ...]]:
    """A rank's share of a step, in micro-batches."""
    mine = [part[rank::world] for part in batch_of(step)]
    return [tuple(part[i : i + micro] for part in mine) for i in range(0, BATCH // world, micro)]


def train_engine(stage: int, precision: str, micro: int, remat: bool) -> dict[str, Any]:
    """Train under DeepSpeed; losses, gradient norms, weights, averages, and whether swapping them was exact."""
    ranks = RANKS[0]
    model = network()
    if remat:
        checkpoint_blocks(model.remat_blocks())
    config = EngineConfig(zero_stage=stage, precision=precision)
    engine = Engine(model, config, BatchConfig(size=BATCH, micro=micro), OPTIM, ranks)
    losses, norms, average = [], [], full(engine, "master")
    for step in range(STEPS):
        total = torch.zeros(())
        for parts in micro_batches(step, ranks.rank, ranks.world, micro):
            loss = loss_of(engine, parts, engine.dtype)
            engine.backward(loss)
            result = engine.step(LR)
            total += loss.detach() / engine.accumulation
        assert result.applied
        losses.append(float(distributed.sum_over_ranks(total)) / ranks.world)
        norms.append(result.grad_norm)
        masters, n = full(engine, "master"), step + 1
        decay = min(OPTIM.ema_decay, (1 + n) / (10 + n))
        average = {name: average[name] * decay + masters[name] * (1 - decay) for name in masters}
    kept = {name: p.detach().clone() for name, p in engine.module.named_parameters() if p.numel()}
    with engine.averaged_weights():
        inside = full(engine, "master")
        seen = forward(engine)
    after = {name: p.detach() for name, p in engine.module.named_parameters() if p.numel()}
    ema = full(engine, "ema")
    return {
        "losses": losses,
        "norms": norms,
        "weights": masters,
        "ema": ema,
        "unsharded_ema": average,
        "swap_shows_average": all(torch.equal(inside[name], ema[name]) for name in ema),
        "swap_restores": all(torch.equal(kept[name], after[name]) for name in kept)
        and all(torch.equal(a, b) for a, b in zip(masters.values(), full(engine, "master").values(), strict=True)),
        "output_with_average": seen,
    }


def non_finite_step(stage: int, precision: str) -> dict[str, Any]:
    """One step whose loss is NaN on rank 1 alone."""
    ranks = RANKS[0]
    engine = Engine(
        network(), EngineConfig(zero_stage=stage, precision=precision), BatchConfig(size=BATCH, micro=4), OPTIM, ranks
    )
    before, ema = full(engine, "master"), full(engine, "ema")
    loss = loss_of(engine, micro_batches(0, ranks.rank, ranks.world, 4)[0], engine.dtype)
    engine.backward(loss * float("nan") if ranks.rank == 1 else loss)
    result = engine.step(LR)
    after, ema_after = full(engine, "master"), full(engine, "ema")
    return {
        "applied": result.applied,
        "unchanged": all(torch.equal(before[n], after[n]) and torch.equal(ema[n], ema_after[n]) for n in before),
        "optimizer_step": engine.optimizer_step,
    }


def forward(engine: Engine) -> torch.Tensor:
    """Output on a fixed input with the weights of the moment."""
    z, t, text, _ = batch_of(0)
    with engine.evaluating():
        return engine(z[:2].to(engine.dtype), t[:2], text[:2].to(engine.dtype), None).float()


def full(engine: Engine, kind: str) -> Tensors:
    """Whole tensors of one kind, put together from the fragments of all ranks."""
    shapes = engine.shapes()
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    flat = torch.zeros(sum(sizes))
    out = dict(zip(shapes, flat.split(sizes), strict=True))
    for piece in engine.fragments():
        out[piece.name][piece.start : piece.start + piece.length] = engine.tensors(piece)[kind].cpu()
    whole = distributed.sum_over_ranks(flat).split(sizes)  # one collective for all
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, whole, strict=True)}


RANKS: list[distributed.Ranks] = []


def all_cases() -> dict[str, Any]:
    """Every case of the file in one process group."""
    RANKS.append(distributed.start(60))
    results = {
        f"zero{stage}_{precision}": train_engine(stage, precision, micro=2, remat=False)
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16")
    }
    results["big_batch"] = train_engine(2, "fp32", micro=4, remat=False)
    results["single_micro"] = train_engine(2, "fp32", micro=1, remat=False)
    for stage in (2, 3):
        results[f"remat{stage}"] = train_engine(stage, "fp32", micro=2, remat=True)
        results[f"nan{stage}_fp32"] = non_finite_step(stage, "fp32")
    results["nan1_bf16"] = non_finite_step(1, "bf16")
    distributed.stop()
    return results


def reference(precision: str, world: int = 2, micro: int = 2) -> dict[str, Any]:
    """The same training in one process with torch alone: fp32 masters and accumulation, plain AdamW and average."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    master = network()
    model = copy.deepcopy(master).to(dtype)
    average = {name: p.detach().clone() for name, p in master.named_parameters()}
    adamw = torch.optim.AdamW(
        master.parameters(), lr=LR, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay
    )
    losses, norms = [], []
    for step in range(STEPS):
        sums = {name: torch.zeros_like(p) for name, p in master.named_parameters()}
        total, shares = 0.0, BATCH // micro
        for rank in range(world):
            for parts in micro_batches(step, rank, world, micro):
                model.zero_grad()
                loss = loss_of(model, parts, dtype)
                loss.backward()
                total += float(loss.detach()) / shares
                for name, p in model.named_parameters():
                    sums[name] += p.grad.float() / shares
        for name, p in master.named_parameters():
            p.grad = sums[name]
        norms.append(float(torch.nn.utils.clip_grad_norm_(master.parameters(), OPTIM.clip_grad_norm)))
        adamw.step()
        n = step + 1
        decay = min(OPTIM.ema_decay, (1 + n) / (10 + n))
        for name, p in master.named_parameters():
            average[name] = average[name] * decay + p.detach() * (1 - decay)
        losses.append(total)
        model.load_state_dict({name: value.to(dtype) for name, value in master.state_dict().items()})
    weights = {name: p.detach().clone() for name, p in master.named_parameters()}
    averaged = copy.deepcopy(master)
    averaged.load_state_dict(average)
    z, t, text, _ = batch_of(0)
    with torch.no_grad():
        seen = averaged.to(dtype)(z[:2].to(dtype), t[:2], text[:2].to(dtype), None).float()
    return {"losses": losses, "norms": norms, "weights": weights, "ema": average, "output_with_average": seen}
