"""The learning rate over the samples seen, and the average beside AdamW."""

from __future__ import annotations

import pytest
import torch

from lvdm.config import OptimConfig
from lvdm.engine.optim import AdamWWithEMA, learning_rate
from tests.models.formula import expected


def test_learning_rate_rises_then_falls_to_its_fraction() -> None:
    config = OptimConfig(lr=2.0, warmup_samples=99, decay="cosine", final_lr_fraction=0.1)
    rates = [learning_rate(config, samples, 1099) for samples in (0, 49, 98, 99, 599, 1099, 5000)]
    assert rates == pytest.approx([0.02, 1.0, 1.98, 2.0, 1.1, 0.2, 0.2])
    linear = OptimConfig(lr=2.0, decay="linear")
    assert [learning_rate(linear, samples, 100) for samples in (0, 25, 100)] == pytest.approx([2.0, 1.5, 0.0])
    assert learning_rate(OptimConfig(lr=2.0), 10**9, 100) == 2.0


def test_average_warms_up_as_lvdm_s() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = AdamWWithEMA([weight], OptimConfig(lr=0.1, ema_decay=0.5))
    average = weight.detach().clone()
    for n in range(1, 12):
        weight.grad = torch.tensor([0.3, -1.0]) / n
        optimizer.step()
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight.detach()
        torch.testing.assert_close(optimizer.state[weight]["ema"], average)


def test_average_equals_the_reference_s_on_its_weights() -> None:
    want = expected("masks_ema")
    names = ("0.weight", "0.bias")
    weights = [torch.nn.Parameter(want[f"ema.init.{name}"].clone()) for name in names]
    # Without gradients and weight decay a step leaves the weights alone, so they can be the reference's.
    optimizer = AdamWWithEMA(weights, OptimConfig(lr=0.1, weight_decay=0, ema_decay=0.9999))
    for weight in weights:
        optimizer.materialize(weight)

    def average_of(update: str) -> None:
        for weight, name in zip(weights, names, strict=True):
            weight.data.copy_(want[f"ema.{update}.param.{name}"])
            weight.grad = torch.zeros_like(weight)
        optimizer.step()

    for update in range(5):
        average_of(str(update))
        for weight, name in zip(weights, names, strict=True):
            torch.testing.assert_close(
                optimizer.state[weight]["ema"], want[f"ema.{update}.ema.{name}"], rtol=1e-6, atol=1e-7
            )

    for weight, name in zip(weights, names, strict=True):  # long after the warm-up the decay is the constant
        optimizer.state[weight]["step"].fill_(10**7)
        optimizer.state[weight]["ema"].copy_(want[f"ema.init.{name}"])
    average_of("0")
    for weight, name in zip(weights, names, strict=True):
        torch.testing.assert_close(optimizer.state[weight]["ema"], want[f"ema.constant.{name}"], rtol=1e-6, atol=1e-7)


def test_step_is_torch_s_adamw() -> None:
    config = OptimConfig(lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    ours, theirs = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
    mine = AdamWWithEMA([ours], config)
    other = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    for step in range(5):
        ours.grad = theirs.grad = torch.sin(torch.arange(4.0) + step)
        mine.step()
        other.step()
    assert torch.equal(ours, theirs)
