"""What a run starts from, and which part of it learns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lvdm.checkpoint.folder import open_checkpoint
from lvdm.config import parse_training_config
from lvdm.models.build import build_model
from lvdm.weights.native import save_model
from tests.conftest import Toy
from tests.ranks import run_ranks
from tests.train.runs import losses_of, run


def test_frozen_parameters_stay_and_travel_with_checkpoints_and_exports(toy: Toy, tmp_path: Path) -> None:
    """Temporal layers alone learn; stopped and on other ranks in another stage; then exported."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    start = tmp_path / "start"
    config = parse_training_config(toy.diffusion(straight), source="test")
    model = build_model(config.model, seed=9)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # new, its last layers are zero, and nothing before them would learn
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_model(start, model.state_dict(), {"model": config.model.model_dump(mode="json")})
    changes = {"run__init_from": str(start), "model__trainable": ["*attn_time*", "*norm_time*"]}
    said = run_ranks(run, 1, toy.diffusion(straight, run__steps=4, engine__zero_stage=1, **changes))
    assert "M learn" in said[0]
    for world, stage, steps in ((2, 2, 2), (2, 3, 4)):
        run_ranks(run, world, toy.diffusion(resumed, run__steps=steps, engine__zero_stage=stage, **changes))
    assert losses_of(resumed) == pytest.approx(losses_of(straight), rel=1e-5)
    before, after, other = model.state_dict(), open_checkpoint(straight), open_checkpoint(resumed)
    learnt = [name for name in before if name not in after.network().frozen]
    assert learnt == [name for name in before if "attn_time" in name or "norm_time" in name]
    for name in before:
        unchanged = torch.equal(after.parameter("master", name), before[name])
        assert unchanged == (name not in learnt), name
        # AdamW turns the last bits of a gradient near zero into 1e-5 of a weight that moves by 1e-3 a step
        torch.testing.assert_close(other.parameter("ema", name), after.parameter("ema", name), rtol=1e-4, atol=1e-5)


def test_weights_that_fit_in_part_are_refused_or_taken_with_a_report(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = parse_training_config(toy.diffusion(folder), source="test")
    other = config.model.model_copy(update={"temporal_length": 3})
    save_model(tmp_path / "start", build_model(other, seed=9).state_dict(), {"model": other.model_dump(mode="json")})
    changes = {"run__init_from": str(tmp_path / "start"), "run__steps": 1}
    with pytest.raises(AssertionError, match=r"UserError: the weights in .* are of another model: tensors \d+ of"):
        run_ranks(run, 1, toy.diffusion(folder, **changes))
    said = run_ranks(run, 1, toy.diffusion(folder, run__init_strict=False, **changes))
    assert re.search(r"start: \d+ of \d+ tensors taken; \d+ of another shape", said[0])
    with pytest.raises(AssertionError, match=r"model.trainable: 'nothing' matches no parameter"):
        run_ranks(run, 1, toy.diffusion(tmp_path / "new", model__trainable=["nothing"], **changes))
