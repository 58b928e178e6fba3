"""diffusers' UNet3DConditionModel in and out: the same numbers, the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import TextToVideoSDPipeline, UNet3DConditionModel
from safetensors.torch import load_file, save_file

from lvdm.config import DiffusionConfig, ModelScopeUNetConfig, parse_config
from lvdm.errors import UserError
from lvdm.models.build import build_model
from lvdm.models.remat import checkpoint_blocks
from lvdm.models.unet_modelscope import ModelScopeUNet
from lvdm.weights.diffusers import (
    from_ours,
    our_config,
    read_unet3d,
    scheduler_config,
    tensor_names,
    write_pipeline,
    write_unet3d,
)

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(unet3d, tmp_path) -> Path:
    unet3d.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def imported(folder: Path) -> tuple[dict, ModelScopeUNet]:
    model, tensors = read_unet3d(folder)
    network = build_model(parse_config(ModelScopeUNetConfig, model, "test"), seed=0)
    network.load_state_dict(dict(tensors))
    assert isinstance(network, ModelScopeUNet)
    return model, network


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 5, 8, 12, generator=generator)
    return z, torch.tensor([7, 613]), torch.randn(2, 6, 24, generator=generator)


def test_forward_and_backward_equal_diffusers(unet3d, folder):
    _, network = imported(folder)
    checkpoint_blocks(network.remat_blocks())
    z, t, text = inputs()
    own, theirs = network(z, t, text), unet3d(z, t, text).sample
    torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)
    assert own.std() > 0.1
    unet3d.zero_grad()
    weight = torch.linspace(-1, 1, own.numel()).view_as(own)
    (own * weight).sum().backward()
    (theirs * weight).sum().backward()
    names = tensor_names(read_unet3d(folder)[0])
    wanted = dict(unet3d.named_parameters())
    for name, parameter in network.named_parameters():
        gradient = wanted[names[name]].grad
        if gradient.ndim == 5:
            gradient = gradient[..., 0, 0].permute(2, 0, 1)
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_round_trip_is_exact_to_the_bit(folder, tmp_path):
    model, network = imported(folder)
    write_unet3d(tmp_path / "back", model, network.state_dict(), {"source": "test"}, sample_size=8)
    before, after = load_file(folder / FILE), load_file(tmp_path / "back" / FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "back" / "provenance.json").read_text()) == {"source": "test"}
    was, now = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    assert {k: v for k, v in was.items() if not k.startswith("_")} == {
        k: v for k, v in now.items() if not k.startswith("_")
    }
    again = UNet3DConditionModel.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs()), again(*inputs()).sample, atol=1e-4, rtol=1e-4)


def test_exported_pipeline_runs_with_our_outputs(folder, pipeline_parts, tmp_path):
    model, network = imported(folder)
    diffusion = DiffusionConfig().model_dump()
    scheduler = scheduler_config(diffusion)
    write_pipeline(
        tmp_path / "pipeline", model, network.state_dict(), {}, scheduler=scheduler, sample_size=8, **pipeline_parts
    )
    pipeline = TextToVideoSDPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "num_frames": 3, "height": 16, "width": 16, "guidance_scale": 4.0}
    options["latents"] = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = pipeline("a red circle", output_type="latent", **options).frames

    # The same sampling with our network: guidance and DDIM written out.
    tokens = pipeline.tokenizer(["", "a red circle"], padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        text = pipeline.text_encoder(tokens.input_ids).last_hidden_state
        pipeline.scheduler.set_timesteps(3)
        z = options["latents"]
        for t in pipeline.scheduler.timesteps:
            without, given = network(torch.cat([z, z]), t.expand(2), text).chunk(2)
            z = pipeline.scheduler.step(without + 4.0 * (given - without), t, z).prev_sample
    torch.testing.assert_close(z, theirs, atol=1e-3, rtol=1e-3)
    frames = pipeline("a red circle", output_type="np", **options).frames
    assert frames.shape == (1, 3, 16, 16, 3)


def test_wrong_tensors_are_one_line_and_write_nothing(folder, tmp_path):
    state = load_file(folder / FILE)
    state["surplus"] = state.pop("conv_in.weight")
    save_file(state, folder / FILE)
    with pytest.raises(UserError) as error:
        read_unet3d(folder)
    assert "1 missing (conv_in.weight), 1 unexpected (surplus)" in str(error.value)
    assert "\n" not in str(error.value)
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_unet3d(folder)
    model = our_config(json.loads((folder / "config.json").read_text()), "test")
    with pytest.raises(UserError, match="is not of the layout modelscope_unet"):
        write_unet3d(tmp_path / "back", model, {}, {})
    with pytest.raises(UserError, match="without frame_rate"):
        from_ours(model | {"frame_rate": True}, {})
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name='UNet2DConditionModel'"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"attention_head_dim": None}, "describes no UNet3DConditionModel"),
        ({"out_channels": 8}, "as many channels out as in"),
        ({"up_block_types": ["UpBlock3D", "UpBlock3D", "CrossAttnUpBlock3D"]}, "mirrored"),
    ],
)
def test_configs_that_our_network_cannot_be_are_refused(folder, change, message):
    document = json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError, match=message):
        our_config(document | change, "test")
