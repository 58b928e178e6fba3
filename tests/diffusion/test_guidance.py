from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lvdm.config import DiffusionConfig
from lvdm.diffusion.denoiser import Denoiser
from lvdm.diffusion.guidance import Conditioning, classifier_free_guidance
from lvdm.errors import UserError

T_B = torch.tensor([900, 900, 900, 900])


class TextNetwork:
    """Mixes the mean of the unmasked text into the latent, not linearly, and counts its calls."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, z: Tensor, t_B: Tensor, *, text_BLD: Tensor, text_mask_BL: Tensor | None = None) -> Tensor:
        self.batches.append(len(z))
        weight_BL = torch.ones(text_BLD.shape[:2]) if text_mask_BL is None else text_mask_BL.float()
        mean_B = (text_BLD.mean(2) * weight_BL).sum(1) / weight_BL.sum(1)
        return torch.tanh(z * mean_B.reshape(-1, 1, 1, 1, 1)) * t_B.reshape(-1, 1, 1, 1, 1) / 1000


def text(batch: int, length: int, seed: int, mask: bool = False) -> Conditioning:
    states = torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(seed))
    mask_BL = torch.arange(length) < torch.arange(1, batch + 1)[:, None]
    return {"text_BLD": states, "text_mask_BL": mask_BL if mask else None}


@pytest.mark.parametrize("mask_c", [False, True])
@pytest.mark.parametrize("mask_u", [False, True])
@pytest.mark.parametrize("length_u", [3, 5, 8])
def test_a_doubled_batch_equals_two_calls(noise: Tensor, mask_c: bool, mask_u: bool, length_u: int) -> None:
    network = TextNetwork()
    denoiser = Denoiser(network, DiffusionConfig())
    sides = text(4, 5, 1, mask_c), text(4, length_u, 2, mask_u)
    one = classifier_free_guidance(denoiser, *sides, scale=7.5)(noise, T_B)
    assert network.batches == [8]
    two = classifier_free_guidance(denoiser, *sides, scale=7.5, one_batch=False)(noise, T_B)
    assert network.batches == [8, 4, 4]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_the_formula(noise: Tensor, parameterization: str) -> None:
    denoiser = Denoiser(TextNetwork(), DiffusionConfig(parameterization=parameterization))  # type: ignore[arg-type]
    given, without = text(4, 5, 1), text(4, 5, 2)
    output_c, output_u = denoiser.predict(noise, T_B, **given), denoiser.predict(noise, T_B, **without)
    expected = denoiser.to_x0(noise, output_u + 4 * (output_c - output_u), T_B)
    guided = classifier_free_guidance(denoiser, given, without, scale=4)(noise, T_B)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)
    # and so the same combination of clean estimates
    x0_c, x0_u = denoiser.denoise(noise, T_B, **given), denoiser.denoise(noise, T_B, **without)
    torch.testing.assert_close(guided, x0_u + 4 * (x0_c - x0_u), rtol=1e-4, atol=1e-4)


def test_scale_one_calls_the_network_once_on_the_single_batch(noise: Tensor) -> None:
    network = TextNetwork()
    denoiser = Denoiser(network, DiffusionConfig())
    alone = classifier_free_guidance(denoiser, text(4, 5, 1), text(4, 5, 2), scale=1)(noise, T_B)
    assert network.batches == [4]
    assert torch.equal(alone, denoiser.denoise(noise, T_B, **text(4, 5, 1)))


def test_one_unconditional_text_serves_the_whole_batch(noise: Tensor) -> None:
    denoiser = Denoiser(TextNetwork(), DiffusionConfig())
    single = text(1, 2, 2)
    repeated = {name: None if value is None else value.repeat(4, 1, 1) for name, value in single.items()}
    short = classifier_free_guidance(denoiser, text(4, 5, 1), single, scale=3)(noise, T_B)
    assert torch.equal(short, classifier_free_guidance(denoiser, text(4, 5, 1), repeated, scale=3)(noise, T_B))


def test_texts_without_masks_and_of_one_length_stay_unmasked(noise: Tensor) -> None:
    seen: list[Tensor | None] = []

    def network(z: Tensor, t_B: Tensor, *, text_BLD: Tensor, text_mask_BL: Tensor | None) -> Tensor:
        seen.append(text_mask_BL)
        return z

    classifier_free_guidance(Denoiser(network, DiffusionConfig()), text(4, 5, 1), text(4, 5, 2), scale=2)(noise, T_B)
    assert seen == [None]


def test_guidance_without_unconditional_states_is_refused() -> None:
    with pytest.raises(UserError, match=r"guidance=7.5 needs unconditional"):
        classifier_free_guidance(Denoiser(TextNetwork(), DiffusionConfig()), text(4, 5, 1), scale=7.5)


def test_sides_with_different_arguments_are_a_bug(noise: Tensor) -> None:
    guided = classifier_free_guidance(
        Denoiser(TextNetwork(), DiffusionConfig()), text(4, 5, 1), {"text_BLD": torch.zeros(4, 5, 6)}, scale=2
    )
    with pytest.raises(ValueError, match="differ"):
        guided(noise, T_B)
