"""Fréchet and kernel distance, I3D's input and layout: the reference's numbers, and what they must do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lvdm.errors import UserError
from lvdm.evaluation.distances import frechet_distance, kernel_distance
from lvdm.evaluation.i3d import I3D, preprocess
from lvdm.jobs.fvd import load_i3d
from tests.models.formula import expected


def test_distances_and_preprocessing_equal_the_reference() -> None:
    given = expected("metrics")
    a, b = given["feat_a"], given["feat_b"]
    distance = torch.tensor(frechet_distance(a, b), dtype=torch.float64)
    torch.testing.assert_close(distance, given["fvd_float64"], atol=0, rtol=1e-9)
    torch.testing.assert_close(distance.float(), given["fvd"], atol=0, rtol=1e-3)
    assert abs(frechet_distance(a, a)) < 1e-9
    kernel = torch.tensor(kernel_distance(a, b), dtype=torch.float64)
    torch.testing.assert_close(kernel, given["kvd_f64"], atol=0, rtol=1e-9)
    frames = preprocess(given["video_uint8"])
    assert frames.shape == (2, 3, 3, 224, 224)
    torch.testing.assert_close(frames[..., ::16, ::16], given["preprocessed_sub"], atol=2e-5, rtol=1e-4)


def test_kernel_distance_of_like_sets_is_zero_on_average() -> None:
    """The estimate is unbiased: neither set is compared with itself item by item."""
    draws = torch.randn(200, 2, 30, 8, generator=torch.Generator().manual_seed(0))
    estimates = torch.tensor([kernel_distance(a, b) for a, b in draws])
    assert abs(estimates.mean()) < 3 * estimates.std() / len(estimates) ** 0.5
    assert estimates.min() < 0


def test_i3d_has_the_names_and_size_of_the_published_one(tmp_path: Path) -> None:
    network = I3D()
    assert sum(p.numel() for p in network.parameters()) == 12_697_264
    state = network.state_dict()
    assert len(state) == 344
    assert state["Mixed_4f.b2b.conv3d.weight"].shape == (128, 32, 3, 3, 3)
    save_file(state | {"logits.conv3d.bias": torch.zeros(600)}, tmp_path / "i3d.safetensors")
    with pytest.raises(
        UserError, match=r"is not I3D for 400 classes: 1 tensors differ, the first logits\.conv3d\.bias"
    ):
        load_i3d(tmp_path / "i3d.safetensors")


def test_i3d_halves_time_and_space_where_the_paper_does() -> None:
    network = I3D().eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda _m, _i, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:])))
    with torch.no_grad():
        logits = network(torch.zeros(1, 3, 16, 224, 224))
    assert logits.shape == (1, 400)
    assert shapes["Conv3d_1a_7x7"] == (64, 8, 112, 112)
    assert shapes["Conv3d_2c_3x3"] == (192, 8, 56, 56)
    assert shapes["Mixed_3c"] == (480, 8, 28, 28)
    assert shapes["Mixed_4f"] == (832, 4, 14, 14)
    assert shapes["Mixed_5c"] == (1024, 2, 7, 7)
