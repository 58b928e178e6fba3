from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lvdm.config import DiffusionConfig, GivenFramesConfig
from lvdm.diffusion.denoiser import Denoiser
from lvdm.diffusion.masks import GivenFrames, draw_given_frames, frame_mask
from lvdm.diffusion.objective import diffusion_loss
from tests.models.formula import expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pred", {"predict": 0.5}),
        ("pred_multi", {"predict": 0.7, "first": (1, 2, 3)}),
        ("interp", {"predict": 0.0, "interpolate": 0.9}),
        ("interp_stride", {"predict": 0.0, "interpolate": 0.9, "every": 2}),
    ],
)
def test_masks_equal_the_reference_on_its_draws(name: str, options: dict[str, Any]) -> None:
    config = GivenFramesConfig(**options)
    generator = random.Random(0)  # Python's own, which the reference draws from
    rows = []
    for _ in range(8):
        draw, pick = generator.random(), 0.0
        if config.interpolate <= draw < config.interpolate + config.predict:
            pick = (generator.choice(range(len(config.first))) + 0.5) / len(config.first)
        rows.append(frame_mask(5, config, draw, pick))
    assert torch.equal(torch.tensor(rows, dtype=torch.uint8), expected("masks_ema")[f"mask.{name}"])


def test_draws_belong_to_the_position_and_follow_the_config() -> None:
    config = GivenFramesConfig(predict=0.3, interpolate=0.2, first=(1, 2), noise_levels=10)
    given = draw_given_frames(7, range(4000), 5, config)
    again = draw_given_frames(7, [3, 1500], 5, config)
    assert torch.equal(again.mask_B1T11, given.mask_B1T11[[3, 1500]])
    assert torch.equal(again.level_B, given.level_B[[3, 1500]])
    counts = given.mask_B1T11.flatten(1).sum(1).long()
    ends = (counts == 2) & (given.mask_B1T11[:, 0, -1, 0, 0] == 1)
    shares = [ends.float().mean(), (counts == 1).float().mean(), (counts == 0).float().mean()]
    assert [round(float(share), 2) for share in shares] == pytest.approx([0.2, 0.15, 0.5], abs=0.03)
    assert torch.bincount(given.level_B, minlength=10).min() > 330
    assert given.label_B is not None
    assert torch.equal(given.label_B, torch.where(counts > 0, given.level_B, 10))
    drawn = draw_given_frames(7, range(4000), 5, config.model_copy(update={"label_without": "drawn"}))
    assert torch.equal(drawn.label_B, drawn.level_B)  # type: ignore[arg-type]
    clean = draw_given_frames(7, range(4), 5, config.model_copy(update={"noise_levels": 0}))
    assert clean.label_B is None
    assert clean.level_B.tolist() == [-1] * 4


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0", "flow"])
def test_given_frames_stand_at_their_own_level(noise: Tensor, parameterization: str) -> None:
    """A network that knows the answer pays nothing; the mask, label and noisy frames that it sees are right."""
    config = DiffusionConfig(parameterization=parameterization)  # type: ignore[arg-type]
    flow = parameterization == "flow"
    z0 = noise.flip(0)
    t_B = torch.tensor([0.9, 0.7, 0.5, 0.3]) if flow else torch.tensor([900, 700, 500, 300])
    level_B = torch.tensor([100, 0, 30, -1])
    mask = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]])[:, None, :, None, None]
    given = GivenFrames(mask, level_B, label_B=torch.tensor([100, 250, 30, 5]))
    seen = {}

    def network(z: Tensor, t: Tensor, mask_B1THW: Tensor, level_B: Tensor) -> Tensor:
        seen.update(z=z, mask=mask_B1THW, label=level_B)
        return torch.zeros_like(z)

    denoiser = Denoiser(network, config)
    wrong = diffusion_loss(denoiser, z0, noise, t_B, given=given)
    assert torch.equal(seen["mask"], mask)
    assert seen["label"].tolist() == [100, 250, 30, 5]
    s_B = level_B / 1000 if flow else level_B
    torch.testing.assert_close(seen["z"][0, :, 0], denoiser.add_noise(z0[:1], noise[:1], s_B[:1])[0, :, 0])
    torch.testing.assert_close(seen["z"][2, :, 3], denoiser.add_noise(z0[2:3], noise[2:3], s_B[2:3])[0, :, 3])
    torch.testing.assert_close(seen["z"][3, :, :2], z0[3, :, :2])
    torch.testing.assert_close(seen["z"][1], denoiser.add_noise(z0, noise, t_B)[1])
    assert wrong.min() > 0.1

    target = denoiser.target(z0, noise, t_B)
    target[0, :, 0] = denoiser.target(z0[:1], noise[:1], s_B[:1])[0, :, 0]
    target[2, :, [0, 3]] = denoiser.target(z0[2:3], noise[2:3], s_B[2:3])[0, :, [0, 3]]
    knowing = Denoiser(lambda z, t, mask_B1THW, level_B: target, config)
    assert diffusion_loss(knowing, z0, noise, t_B, given=given)[:3].abs().max() < 1e-9


def test_loss_may_leave_given_frames_out(noise: Tensor) -> None:
    mask = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 0]])[:, None, :, None, None]
    given = GivenFrames(mask, torch.zeros(4, dtype=torch.int64), in_loss=False)

    def network(z: Tensor, t: Tensor, mask_B1THW: Tensor, level_B: None) -> Tensor:
        return noise + torch.where(mask_B1THW > 0, 100.0, 0.5)

    loss_B = diffusion_loss(
        Denoiser(network, DiffusionConfig()), noise.flip(0), noise, torch.tensor([5] * 4), given=given
    )
    torch.testing.assert_close(loss_B, torch.full((4,), 0.25))
