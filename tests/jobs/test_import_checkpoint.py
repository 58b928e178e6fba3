"""LVDM's checkpoints in, the reference's numbers out of them, and the same bits back."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel

from lvdm.config import DiffusersVAE, TextEncoderConfig, parse_training_config
from lvdm.errors import UserError
from lvdm.inference import load_vae
from lvdm.jobs.export_layout import export_layout
from lvdm.jobs.import_checkpoint import import_checkpoint
from lvdm.models.build import build_model
from lvdm.models.frozen import DiffusersFrozenVAE
from lvdm.models.video_autoencoder import split_moments
from lvdm.weights.native import load_into, read_model
from lvdm.weights.torch_file import read_tensors
from tests.models.formula import expected, formula_input
from tests.weights.lvdm_files import tiny_file

LAYOUTS = ["lvdm-ae", "lvdm-short", "lvdm-pred", "lvdm-interp", "lvdm-t2v"]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
SKY = (0.33422927, 1.4606637)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint in each layout."""
    folder = tmp_path_factory.mktemp("lvdm")
    for layout in LAYOUTS:
        torch.save({"state_dict": tiny_file(layout)}, folder / f"{layout}.ckpt")
    return {layout: folder / f"{layout}.ckpt" for layout in LAYOUTS}


@pytest.fixture(scope="module")
def imported(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("imported")
    for layout, file in files.items():
        assert import_checkpoint(file, folder / layout, scaling=None if layout == "lvdm-t2v" else SKY) == layout
    return {layout: folder / layout for layout in LAYOUTS}


def model_of(folder: Path) -> Any:
    document, _ = read_model(folder)
    if document["model"]["kind"] == "video_autoencoder":
        from lvdm.config import VideoAutoencoderConfig

        config: Any = VideoAutoencoderConfig(**document["model"])
    else:
        config = parse_training_config(document["training"], source=str(folder)).model
    model = build_model(config, seed=0)
    load_into(model, folder)
    return model


@torch.no_grad()
def test_averaged_weights_of_short_give_the_reference_s_output(imported: dict[str, Path]) -> None:
    model = model_of(imported["lvdm-short"])
    out = model(formula_input("unet.x", 2, 4, 4, 8, 8), torch.tensor([7, 613]))
    torch.testing.assert_close(out, expected("space_time_unet")["out"], **TOLERANCE)


@torch.no_grad()
def test_prediction_model_gives_the_reference_s_output(imported: dict[str, Path]) -> None:
    want = expected("space_time_unet")
    z, mask = want["x5"].split([4, 1], dim=1)
    out = model_of(imported["lvdm-pred"])(z, torch.tensor([7, 613]), mask, torch.tensor([100, 3]))
    torch.testing.assert_close(out, want["out_with_level"], **TOLERANCE)


@torch.no_grad()
def test_autoencoder_gives_the_reference_s_output(imported: dict[str, Path]) -> None:
    want = expected("video_autoencoder")
    config = parse_training_config(read_model(imported["lvdm-short"])[0]["training"], source="short")
    own = load_vae(config.vae, torch.device("cpu"), torch.float32)  # type: ignore[union-attr]
    assert (own.scale, own.shift) == SKY
    for model in (model_of(imported["lvdm-ae"]), own):
        torch.testing.assert_close(model.decode(formula_input("ae.z", 2, 4, 2, 4, 4)), want["decode_z"], **TOLERANCE)
        moments = model.encode(formula_input("ae.x2", 1, 3, 8, 24, 32, scale=0.5))
        torch.testing.assert_close(moments, want["moments_x2"], **TOLERANCE)


@torch.no_grad()
def test_text_to_video_gives_the_reference_s_outputs(imported: dict[str, Path], files: dict[str, Path]) -> None:
    model = model_of(imported["lvdm-t2v"])
    out = model(formula_input("unet.x", 2, 4, 4, 8, 8), torch.tensor([7, 613]), formula_input("unet.ctx", 2, 5, 24))
    torch.testing.assert_close(out, expected("text_unet")["out"], **TOLERANCE)

    want = expected("image_autoencoder")
    config = DiffusersVAE(kind="diffusers", name=str(imported["lvdm-t2v"]), subfolder="vae")
    vae = DiffusersFrozenVAE.load(config, "cpu", torch.float32)
    moments = vae.encode(formula_input("vae.x", 2, 3, 32, 32, scale=0.5)[:, :, None])
    mean, logvar = split_moments(moments)
    torch.testing.assert_close(moments[:, :, 0], want["moments"], **TOLERANCE)
    torch.testing.assert_close(logvar[:, :, 0], want["logvar"], **TOLERANCE)
    torch.testing.assert_close(vae.decode(mean)[:, :, 0], want["recon_mode"], **TOLERANCE)
    decoded = vae.decode(formula_input("vae.z", 2, 4, 8, 8)[:, :, None])
    torch.testing.assert_close(decoded[:, :, 0], want["decode_z"], **TOLERANCE)
    mean, _ = split_moments(vae.encode(formula_input("ls.v", 1, 3, 2, 32, 32, scale=0.5)))
    torch.testing.assert_close(vae.normalize(mean), want["scaling.z"], **TOLERANCE)
    torch.testing.assert_close(vae.decode(mean), want["scaling.decoded"], **TOLERANCE)

    text, report = CLIPTextModel.from_pretrained(imported["lvdm-t2v"] / "text_encoder", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    key = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    name = next(name for name, _ in text.named_parameters() if name.endswith("layers.1.mlp.fc1.weight"))
    assert torch.equal(text.get_parameter(name), read_tensors(files["lvdm-t2v"])[key])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_exact_to_the_bit(
    files: dict[str, Path], imported: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    export_layout(imported[layout], tmp_path / "back.ckpt", layout, verify=True)
    assert_same_file(tmp_path / "back.ckpt", files[layout])
    assert [path.name for path in tmp_path.iterdir()] == ["back.ckpt"]


def test_live_weights_on_request_and_their_round_trip(files: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(files["lvdm-short"], tmp_path / "live", weights="live", scaling=SKY)
    document, weights = read_model(tmp_path / "live")
    there = read_tensors(files["lvdm-short"])
    assert torch.equal(weights["time_embed.0.weight"], there["model.diffusion_model.time_embed.0.weight"])
    assert document["weights"] == "live"
    export_layout(tmp_path / "live", tmp_path / "back.ckpt", "lvdm-short")
    assert_same_file(tmp_path / "back.ckpt", files["lvdm-short"])


def assert_same_file(one: Path, other: Path) -> None:
    """As ``torch.load`` reads them, without memory-mapping; second names share their memory."""
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in (one, other))
    assert first.keys() == second.keys()
    wrong = [n for n in first if first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])]
    assert wrong == []
    if "encoder.conv_first.weight" in first:
        aliases = [first[f"encoder.conv_first.{name}"].data_ptr() for name in ("weight", "conv.weight")]
        assert aliases[0] == aliases[1]
    with zipfile.ZipFile(one) as archive:
        assert archive.testzip() is None
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def test_provenance_scaling_and_training_config(files: dict[str, Path], imported: dict[str, Path]) -> None:
    document, _ = read_model(imported["lvdm-pred"])
    provenance = document["provenance"]
    assert provenance["source_sha256"] == hashlib.sha256(files["lvdm-pred"].read_bytes()).hexdigest()
    assert (provenance["layout"], provenance["weights"]) == ("lvdm-pred", "ema")
    assert document["facts"]["scale"] == SKY[0]
    config = parse_training_config(document["training"], source="pred")
    assert config.given.noise_levels == 250  # type: ignore[union-attr]
    assert config.model.relative_keys == "transposed"  # type: ignore[union-attr]
    text = parse_training_config(read_model(imported["lvdm-t2v"])[0]["training"], source="t2v")
    assert isinstance(text.text, TextEncoderConfig)  # type: ignore[union-attr]
    assert read_model(imported["lvdm-t2v"])[0]["facts"]["scale"] == 0.18215


def damaged(kind: str, tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file with a fault."""
    first = "time_embed.0.weight"
    live, averaged = f"model.diffusion_model.{first}", "model_ema.diffusion_model" + first.replace(".", "")
    match kind:
        case "shape":
            tensors = tensors | {averaged: torch.zeros(3, 3)}
        case "missing":
            tensors = {name: tensor for name, tensor in tensors.items() if name != averaged}
        case "unexpected":
            tensors = tensors | {"optimizer": torch.zeros(1)}
        case "no tensor":
            tensors = tensors | {live: 3}  # type: ignore[dict-item]
        case "huge":
            tensors = tensors | {live: torch.zeros(1).expand(10**12)}
        case "alias":
            tensors = tensors | {"first_stage_model.quant_conv.conv.weight": torch.ones(8, 8, 1, 1, 1)}
        case "pickle":
            path.write_bytes(pickle.dumps({"state_dict": Path("/etc")}, protocol=2))
            return
        case "text":
            path.write_text("not a checkpoint")
            return
    torch.save({"state_dict": tensors}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-20000])
    if kind == "compressed":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", r"1 of another shape \(model_ema.diffusion_modeltime_embed0weight \[3, 3\] for \[128, 32\]\)"),
        (
            "missing",
            r"1 missing \(model_ema.diffusion_modeltime_embed0weight\); the nearest known layout is lvdm-short",
        ),
        ("unexpected", r"1 unexpected \(optimizer\); the nearest known layout is lvdm-short"),
        ("no tensor", r"time_embed.0.weight is a int, not a tensor"),
        ("huge", r"time_embed.0.weight claims to be larger"),
        ("alias", r"quant_conv.conv.weight and .* are one tensor in LVDM, but differ"),
        ("pickle", r"holds Python objects beside tensors"),
        ("text", r"is not a readable safetensors file"),
        ("truncated", r"is truncated or damaged"),
        ("compressed", r"has compressed members"),
        ("absent", r"cannot read .*: No such file"),
    ],
)
def test_bad_file_is_one_line_and_writes_nothing(tmp_path: Path, kind: str, message: str) -> None:
    file = tmp_path / "bad.ckpt"
    if kind != "absent":
        damaged(kind, tiny_file("lvdm-short"), file)
    with pytest.raises(UserError, match=message) as caught:
        import_checkpoint(file, tmp_path / "out", scaling=SKY)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.ckpt"}


def test_missing_scale_and_unfit_exports_are_refused(
    files: dict[str, Path], imported: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="give --scaling SCALE,SHIFT or --data-set"):
        import_checkpoint(files["lvdm-short"], tmp_path / "out")
    with pytest.raises(UserError, match="already exists"):
        import_checkpoint(files["lvdm-short"], imported["lvdm-short"], scaling=SKY)
    with pytest.raises(UserError, match="as lvdm-t2v: the model is a space_time_unet"):
        export_layout(imported["lvdm-short"], tmp_path / "out.ckpt", "lvdm-t2v")
    with pytest.raises(UserError, match="as lvdm-short: the model has a mask channel"):
        export_layout(imported["lvdm-pred"], tmp_path / "out.ckpt", "lvdm-short")
    with pytest.raises(UserError, match="--layout lvdm is none of lvdm-ae"):
        export_layout(imported["lvdm-pred"], tmp_path / "out.ckpt", "lvdm")
    assert list(tmp_path.iterdir()) == []


def test_values_that_no_shape_tells_come_from_the_command(files: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(files["lvdm-ae"], tmp_path / "out", model_values=["downsample=[1, 4, 4]"])
    assert read_model(tmp_path / "out")[0]["model"]["downsample"] == [1, 4, 4]
    with pytest.raises(UserError, match=r"no model of ours: .*powers of two"):
        import_checkpoint(files["lvdm-ae"], tmp_path / "no", model_values=["downsample=[3, 4, 4]"])
