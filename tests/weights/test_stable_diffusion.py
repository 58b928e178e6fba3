"""Stable Diffusion's 2-D UNet as the start of ours: each frame is what the 2-D model makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvdm.config import TextUNetConfig, parse_config
from lvdm.errors import UserError
from lvdm.models.build import build_model
from lvdm.weights.stable_diffusion import COMPVIS_PREFIX, Inflation, deflate, inflate, tensor_names

FILE = "diffusion_pytorch_model.safetensors"
SD_1 = {
    "channel_mult": [1, 2, 4, 4], "res_blocks": 2, "attention_levels": [0, 1, 2], "transformer_depth": 1
}  # fmt: skip


@pytest.fixture
def folder(unet2d, tmp_path) -> Path:
    unet2d.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def ckpt(folder, tmp_path) -> Path:
    """The same weights in CompVis' layout, among other parts of a whole model."""
    inflation = inflate(folder)
    state = {name: tensor.clone() for name, tensor in deflate(inflation.model, inflation.tensors, "compvis").items()}
    state["first_stage_model.quant_conv.weight"] = torch.zeros(1)
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "sd.ckpt")
    return tmp_path / "sd.ckpt"


def build(inflation: Inflation) -> torch.nn.Module:
    network = build_model(parse_config(TextUNetConfig, inflation.model, "test"), seed=0)
    network.load_state_dict(dict(inflation.tensors))
    return network


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 5, 16, 8, generator=generator)
    return z, torch.tensor([7, 613]), torch.randn(2, 6, 24, generator=generator)


@pytest.mark.parametrize("relative", [True, False])
@torch.no_grad()
def test_each_of_different_frames_equals_the_2d_model(unet2d, folder, relative):
    inflation = inflate(folder, temporal_length=4, relative_position=relative)
    network = build(inflation)
    z, t, text = inputs()
    want = torch.stack([unet2d(z[:, :, i], t, text).sample for i in range(5)], dim=2)
    torch.testing.assert_close(network(z, t, text), want, atol=2e-5, rtol=1e-4)
    assert (want[:, :, 0] - want[:, :, 1]).abs().max() > 0.1
    network.load_state_dict(
        {n: torch.full_like(p, 0.1) for n, p in network.state_dict().items() if n in inflation.new}, strict=False
    )
    assert not torch.allclose(network(z, t, text), want, atol=1e-2)


def test_new_layers_are_those_of_a_new_model_and_learn(folder):
    inflation = inflate(folder, temporal_length=64, seed=1)
    network = build(inflation)
    fresh = build_model(parse_config(TextUNetConfig, inflation.model, "test"), seed=0).state_dict()
    for name in inflation.new:
        assert inflation.tensors[name].any() == fresh[name].any(), name
        assert inflation.tensors[name].std() == pytest.approx(fresh[name].std().item(), rel=0.2), name
    assert set(inflation.taken) | set(inflation.new) == set(fresh)
    assert f"{len(inflation.taken)} tensors taken, {len(inflation.new)} new" in inflation.report()
    network(*inputs()).square().mean().backward()
    assert any(p.grad.any() for name, p in network.named_parameters() if name in inflation.new)
    table = next(name for name in inflation.new if "relative_v" in name)
    assert torch.equal(inflation.tensors[table], inflate(folder, temporal_length=64, seed=1).tensors[table])
    assert not torch.equal(inflation.tensors[table], inflate(folder, temporal_length=64, seed=2).tensors[table])


def test_round_trips_are_exact_to_the_bit(folder, ckpt):
    before = load_file(folder / FILE)
    from_compvis = inflate(ckpt)
    assert from_compvis.model == inflate(folder).model
    after = deflate(from_compvis.model, from_compvis.tensors, "diffusers")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape
        assert torch.equal(after[name], tensor), name


def test_safetensors_of_compvis_layout(ckpt, tmp_path):
    save_file(torch.load(ckpt, weights_only=True)["state_dict"], tmp_path / "sd.safetensors")
    a, b = inflate(ckpt), inflate(tmp_path / "sd.safetensors")
    assert a.model == b.model
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.taken)


def test_compvis_names_are_those_of_the_release():
    """The 2-D part of LVDM's text model has Stable Diffusion's keys: some of each kind, written down by hand."""
    names = {compvis for _, compvis, _ in tensor_names(SD_1)}
    assert len(names) == 686
    assert {
        "time_embed.2.bias", "input_blocks.0.0.weight", "input_blocks.3.0.op.weight",
        "input_blocks.4.0.skip_connection.weight",
        "input_blocks.8.1.transformer_blocks.0.attn2.to_out.0.bias", "input_blocks.11.0.out_layers.3.weight",
        "middle_block.1.proj_out.weight", "middle_block.2.in_layers.0.weight", "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.bias", "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight", "out.2.weight",
    } <= names  # fmt: skip


def test_what_is_no_such_model_is_one_line(folder, ckpt, tmp_path):
    state = torch.load(ckpt, weights_only=True)["state_dict"]
    del state[f"{COMPVIS_PREFIX}out.2.bias"]
    torch.save(state, tmp_path / "part.ckpt")
    with pytest.raises(UserError, match=r"1 missing \(out.2.bias\)"):
        inflate(tmp_path / "part.ckpt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="holds no Stable Diffusion"):
        inflate(tmp_path / "other.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(ckpt.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is truncated or damaged"):
        inflate(tmp_path / "broken.ckpt")
    torch.save({"state_dict": Path("/")}, tmp_path / "hostile.ckpt")
    with pytest.raises(UserError, match="holds Python objects beside tensors"):
        inflate(tmp_path / "hostile.ckpt")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"use_linear_projection": false', '"use_linear_projection": true'))
    with pytest.raises(UserError, match="use_linear_projection=True"):
        inflate(folder)


@pytest.mark.parametrize("part", ["pooled_text", "scale_shift", "coordinates"])
def test_parts_that_the_layout_has_no_place_for_are_not_left_out_in_silence(folder: Path, part: str) -> None:
    inflation = inflate(folder)
    with pytest.raises(UserError, match=rf"no 2-D part .*: the layout has no place for model\.{part}"):
        deflate(inflation.model | {part: True}, inflation.tensors, "diffusers")
