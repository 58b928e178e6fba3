"""ModelScope's and Stable Diffusion's models through the tools' functions: in, sampled from, and the same bits back."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, TextToVideoSDPipeline, UNet2DConditionModel, UNet3DConditionModel
from safetensors.torch import load_file, save_file

from lvdm.errors import UserError
from lvdm.inference import load
from lvdm.jobs.export_relatives import export_relative
from lvdm.jobs.export_source import Choice
from lvdm.jobs.import_checkpoint import import_checkpoint
from lvdm.jobs.import_relatives import import_relative, recognise
from lvdm.weights.native import Writing, read_model
from lvdm.weights.stable_diffusion import COMPVIS_PREFIX, deflate, inflate
from tests.conftest import Toy
from tests.ranks import run_ranks
from tests.train.runs import run
from tests.weights.lvdm_files import tiny_file

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline(
    unet3d: UNet3DConditionModel, pipeline_parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny TextToVideoSDPipeline as diffusers saves it, with a process of its own."""
    folder = tmp_path_factory.mktemp("theirs") / "pipeline"
    unet3d.save_pretrained(folder / "unet")
    for name, part in pipeline_parts.items():
        shutil.copytree(part, folder / name)
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.01, clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.fixture(scope="module")
def ckpt(unet2d: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion's UNet in CompVis' layout beside another part, in half precision."""
    folder = tmp_path_factory.mktemp("sd")
    unet2d.save_pretrained(folder / "unet")
    inflation = inflate(folder / "unet")
    compvis = deflate(inflation.model, inflation.tensors, "compvis")
    state = {name: tensor.half() for name, tensor in compvis.items()}
    torch.save({"state_dict": state | {"first_stage_model.quant_conv.bias": torch.zeros(1)}}, folder / "sd.ckpt")
    return folder / "sd.ckpt"


def same_bits(one: Path, other: Path) -> None:
    before, after = load_file(one), load_file(other)
    assert before.keys() == after.keys()
    wrong = [n for n in before if before[n].dtype != after[n].dtype or not torch.equal(before[n], after[n])]
    assert wrong == []


def public(path: Path) -> dict:
    """A config of diffusers without its own notes."""
    return {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("_")}


@torch.no_grad()
def test_pipeline_comes_in_samples_and_goes_back_to_the_bit(
    pipeline: Path, unet3d: UNet3DConditionModel, tmp_path: Path
) -> None:
    assert recognise(pipeline) == recognise(pipeline / "unet") == "diffusers-unet3d"
    said = import_relative(pipeline, tmp_path / "in", "diffusers-unet3d")
    assert said.endswith("; copied: vae, text_encoder, tokenizer")
    document, _ = read_model(tmp_path / "in")
    digest = hashlib.sha256((pipeline / "unet" / FILE).read_bytes()).hexdigest()
    assert document["provenance"]["source_sha256"] == digest
    assert document["training"]["diffusion"]["beta_end"] == 0.01

    model = load(tmp_path / "in", device="cpu")
    assert (model.vae.scale, model.text.max_length, model.latent_shape) == (0.18215, 12, (4, 16, 8, 8))
    z, t = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([7])
    text, _ = model.text.encode(["a red circle"])
    torch.testing.assert_close(model.network(z, t, text), unet3d(z, t, text).sample, atol=1e-4, rtol=1e-4)
    assert model.sample(["a red circle"], seeds=[0], steps=2).shape == (1, 16, 16, 16, 3)

    assert export_relative(tmp_path / "in", tmp_path / "back", "diffusers-unet3d") == "TextToVideoSDPipeline"
    same_bits(pipeline / "unet" / FILE, tmp_path / "back" / "unet" / FILE)
    assert public(pipeline / "unet" / "config.json") == public(tmp_path / "back" / "unet" / "config.json")
    again = TextToVideoSDPipeline.from_pretrained(tmp_path / "back")
    assert again.scheduler.config.beta_end == 0.01
    torch.testing.assert_close(again.unet(z, t, text).sample, unet3d(z, t, text).sample)
    provenance = json.loads((tmp_path / "back" / "unet" / "provenance.json").read_text())
    assert provenance["source_provenance"]["source_sha256"] == digest


@torch.no_grad()
def test_half_precision_in_several_files_is_read_by_diffusers_and_by_us(
    pipeline: Path, unet3d: UNet3DConditionModel, ckpt: Path, tmp_path: Path
) -> None:
    small = Writing(shard_size=100_000, verify=True)
    import_relative(pipeline, tmp_path / "in", "diffusers-unet3d")
    export_relative(tmp_path / "in", tmp_path / "out", "diffusers-unet3d", dtype="bf16", writing=small)
    assert len(list((tmp_path / "out/unet").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 2
    theirs = UNet3DConditionModel.from_pretrained(tmp_path / "out/unet", torch_dtype=torch.bfloat16)
    import_relative(tmp_path / "out", tmp_path / "again", "diffusers-unet3d")
    import_relative(ckpt, tmp_path / "sd", "sd-unet")
    export_relative(tmp_path / "sd", tmp_path / "sd_out", "sd-unet", dtype="bf16", writing=small)
    frames = UNet2DConditionModel.from_pretrained(tmp_path / "sd_out", torch_dtype=torch.bfloat16)
    whole = {name: tensor.bfloat16() for name, tensor in unet3d.state_dict().items()}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in theirs.state_dict().items())
    sd = load_file(ckpt.parent / "unet" / FILE)
    assert all(torch.equal(tensor, sd[name].half().bfloat16()) for name, tensor in frames.state_dict().items())
    _, first = read_model(tmp_path / "in")
    _, second = read_model(tmp_path / "again")
    assert all(torch.equal(second[name], tensor.bfloat16()) for name, tensor in first.items())
    with pytest.raises(UserError, match="is an exported folder; --average, --also and --best take checkpoints"):
        export_relative(tmp_path / "in", tmp_path / "none", "diffusers-unet3d", Choice(average=2))


def test_unet_alone_comes_in_and_says_that_it_cannot_sample(pipeline: Path, tmp_path: Path) -> None:
    import_relative(pipeline / "unet", tmp_path / "in", "diffusers-unet3d")
    with pytest.raises(UserError, match="imported without the models to sample with"):
        load(tmp_path / "in")
    said = export_relative(tmp_path / "in", tmp_path / "back", "diffusers-unet3d")
    assert said.startswith("UNet3DConditionModel alone, without the rest of a pipeline: there is no vae and no text")
    same_bits(pipeline / "unet" / FILE, tmp_path / "back" / FILE)


def test_training_starts_from_an_import_and_its_run_goes_out(
    toy: Toy, unet3d: UNet3DConditionModel, tmp_path: Path
) -> None:
    """A step of a rate of almost nothing: what goes out is what came in, but for that step."""
    theirs = UNet3DConditionModel(**{**unet3d.config, "cross_attention_dim": 384})
    theirs.save_pretrained(tmp_path / "theirs")
    import_relative(tmp_path / "theirs", tmp_path / "in", "diffusers-unet3d")
    tree = toy.diffusion(
        tmp_path / "run",
        run__steps=1,
        run__init_from=str(tmp_path / "in"),
        optim__lr=1e-12,
        optim__weight_decay=0.0,
        model=read_model(tmp_path / "in")[0]["model"],
    )
    run_ranks(run, 1, tree)
    for weights in ("ema", "live"):
        said = export_relative(tmp_path / "run", tmp_path / weights, "diffusers-unet3d", Choice(weights))
        assert "is no AutoencoderKL" in said
        before, after = load_file(tmp_path / "theirs" / FILE), load_file(tmp_path / weights / FILE)
        assert before.keys() == after.keys()
        assert all((before[name] - after[name]).abs().max() < 1e-9 for name in before)
    assert json.loads((tmp_path / "ema" / "provenance.json").read_text())["source_provenance"]["step"] == 1


def test_stable_diffusion_is_inflated_and_its_part_goes_back(ckpt: Path, tmp_path: Path) -> None:
    assert recognise(ckpt) == recognise(ckpt.parent / "unet") == "sd-unet"
    said = import_relative(ckpt, tmp_path / "in", "sd-unet", model_values=["temporal_length=4"])
    assert "temporal attention, whose output starts at zero), 1 left out (first_stage_model)" in said
    document, _ = read_model(tmp_path / "in")
    assert (document["model"]["temporal_length"], document["model"]["norm_over"]) == (4, "frame")
    assert document["facts"]["scale"] == 0.18215

    export_relative(tmp_path / "in", tmp_path / "back.safetensors", "sd-unet")
    state = torch.load(ckpt, weights_only=True)["state_dict"]
    save_file({n: t for n, t in state.items() if n.startswith(COMPVIS_PREFIX)}, tmp_path / "unet.safetensors")
    same_bits(tmp_path / "unet.safetensors", tmp_path / "back.safetensors")

    import_relative(ckpt.parent / "unet", tmp_path / "in2", "sd-unet")
    export_relative(tmp_path / "in2", tmp_path / "back", "sd-unet")
    same_bits(ckpt.parent / "unet" / FILE, tmp_path / "back" / FILE)
    theirs, again = (UNet2DConditionModel.from_pretrained(f) for f in (ckpt.parent / "unet", tmp_path / "back"))
    z, t, text = torch.ones(1, 4, 16, 8), torch.tensor([7]), torch.ones(1, 6, 24)
    with torch.no_grad():
        torch.testing.assert_close(theirs(z, t, text).sample, again(z, t, text).sample)


def test_lvdm_s_own_file_is_not_taken_for_stable_diffusion_s(tmp_path: Path) -> None:
    torch.save({"state_dict": tiny_file("lvdm-t2v")}, tmp_path / "t2v.ckpt")
    assert recognise(tmp_path / "t2v.ckpt") == ""
    import_checkpoint(tmp_path / "t2v.ckpt", tmp_path / "in")
    with pytest.raises(UserError, match="needs a modelscope_unet without frame_rate, not text_unet"):
        export_relative(tmp_path / "in", tmp_path / "out", "diffusers-unet3d")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conv_in.weight": torch.zeros(16, 4, 3, 1)},
            r"1 tensors of another shape, .* \(conv_in.weight \[16, 4, 3, 1\]",
        ),
        ({"surplus": torch.zeros(1)}, r"1 unexpected \(surplus\)"),
        (
            {"transformer_in.norm.weight": None},
            r"is not of the layout UNet3DConditionModel: tensors 1 missing \(transformer_in.norm.weight\)",
        ),
        (
            {"down_blocks.0.temp_convs.0.conv1.2.weight": torch.zeros(16, 16, 1, 3, 1)},
            r"temp_convs.0.conv1.2.weight is of another shape: \[16, 16, 1, 3, 1\] is no temporal kernel",
        ),
    ],
)
def test_wrong_tensors_are_one_line_and_write_nothing(
    pipeline: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    shutil.copytree(pipeline, tmp_path / "bad")
    state = load_file(pipeline / "unet" / FILE) | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "bad" / "unet" / FILE)
    with pytest.raises(UserError, match=message) as caught:
        import_relative(tmp_path / "bad", tmp_path / "in", "diffusers-unet3d")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_what_is_no_such_source_is_one_line_and_writes_nothing(
    pipeline: Path, pipeline_parts: dict[str, Path], ckpt: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="describes AutoencoderKL, which is none of UNet3DConditionModel"):
        recognise(pipeline_parts["vae"])
    with pytest.raises(UserError, match=r"cannot read .*config.json"):
        recognise(tmp_path)
    with pytest.raises(UserError, match="this layout takes temporal_length, relative_position, seed"):
        import_relative(ckpt, tmp_path / "in", "sd-unet", model_values=["heads=4"])
    with pytest.raises(UserError, match="is not of the form temporal_length=int"):
        import_relative(ckpt, tmp_path / "in", "sd-unet", model_values=["temporal_length=long"])
    shutil.copytree(pipeline, tmp_path / "cut")
    weights = tmp_path / "cut" / "vae" / FILE
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"vae/.* is not a readable safetensors file"):
        import_relative(tmp_path / "cut", tmp_path / "in", "diffusers-unet3d")
    with pytest.raises(UserError, match="already exists"):
        import_relative(pipeline, tmp_path / "cut", "diffusers-unet3d")
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]
