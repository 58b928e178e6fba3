"""LVDM's checkpoints: the names are the reference's, and what is imported gives the reference's numbers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from lvdm.config import SpaceTimeUNetConfig, TextUNetConfig, VideoAutoencoderConfig
from lvdm.weights.conversion import Mismatch
from lvdm.weights.layouts import LAYOUTS, identify
from lvdm.weights.lvdm_names import ema_name
from tests.weights.lvdm_files import names_and_shapes, reference_keys, tiny_file

SD_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
CLIP_LARGE = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77,
}  # fmt: skip
FULL: dict[str, Any] = {
    "lvdm-ae": VideoAutoencoderConfig(),
    "lvdm-short": SpaceTimeUNetConfig(),
    "lvdm-pred": SpaceTimeUNetConfig(mask_channel=True, noise_levels=251),
    "lvdm-interp": SpaceTimeUNetConfig(mask_channel=True, noise_levels=251, temporal_length=5),
    "lvdm-t2v": TextUNetConfig(),
}


@pytest.fixture(scope="module")
def keys() -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    return reference_keys()


@pytest.mark.parametrize("layout", FULL)
def test_exports_have_exactly_the_reference_s_names_shapes_and_types(layout: str, keys: Any) -> None:
    written = names_and_shapes(layout, FULL[layout], VideoAutoencoderConfig(), SD_VAE, CLIP_LARGE)
    described = {name: (lazy.shape, str(lazy.dtype).removeprefix("torch.")) for name, lazy in written.items()}
    assert described == keys[layout]


@pytest.mark.parametrize("layout", FULL)
def test_full_size_files_are_recognised_and_read_off(layout: str, keys: Any) -> None:
    shapes = {name: shape for name, (shape, _) in keys[layout].items()}
    found, contents = identify(shapes, "auto", "ema")
    assert found == layout
    config = contents.components[""].config
    section = type(FULL[layout])(**config)
    wanted = FULL[layout]
    if isinstance(wanted, SpaceTimeUNetConfig):
        wanted = wanted.model_copy(update={"relative_keys": "transposed"})
    assert section == wanted


@pytest.mark.parametrize("layout", ["lvdm-short", "lvdm-pred", "lvdm-interp"])
def test_dotless_names_are_unique(layout: str, keys: Any) -> None:
    names = [name for name in keys[layout] if name.startswith("model.")]
    averaged = {ema_name(name) for name in names}
    assert len(averaged) == len(names)
    assert averaged < keys[layout].keys()


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_missing_or_too_much_is_named(layout: str) -> None:
    shapes = shapes_of(tiny_file(layout))
    lost = next(name for name in reversed(shapes) if "relative" in name or ("convt" in name and "first" not in name))
    shapes.pop(lost)
    shapes["surprise"] = (1,)
    if "model_ema" in lost or layout in ("lvdm-ae", "lvdm-t2v"):
        with pytest.raises(Mismatch, match=rf"no {layout} checkpoint: tensors .*1 missing \({lost}\)"):
            identify(shapes, layout, "ema")
    with pytest.raises(Mismatch, match=r"1 unexpected \(surprise\); the nearest known layout is " + layout):
        identify(shapes | {lost: shapes_of(tiny_file(layout))[lost]}, "auto", "ema")


def test_another_layout_is_named_as_the_nearest() -> None:
    shapes = shapes_of(tiny_file("lvdm-short"))
    with pytest.raises(Mismatch, match=r"no lvdm-ae checkpoint: .* nearest known layout is lvdm-short"):
        identify(shapes, "lvdm-ae", "ema")
    with pytest.raises(Mismatch, match="its network has no mask channel; the nearest known layout is lvdm-short"):
        identify(shapes, "lvdm-pred", "ema")
    with pytest.raises(Mismatch, match="no known layout is near"):
        identify({"fc.weight": (3, 3)}, "auto", "ema")
    live = {name: shape for name, shape in shapes.items() if not name.startswith("model_ema")}
    with pytest.raises(Mismatch, match="no moving average; ask for the live weights"):
        identify(live, "lvdm-short", "ema")
    assert identify(live, "auto", "live")[0] == "lvdm-short"
