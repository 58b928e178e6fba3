from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lvdm.config import ClipConfig
from lvdm.data.latents import (
    LatentSetInfo,
    LatentText,
    LatentVAE,
    agreed_latent_set,
    decode_latent,
    encode_latent,
    read_latent_set,
    read_unconditional,
    write_latent_set,
)
from lvdm.errors import UserError

INFO = LatentSetInfo(
    vae=LatentVAE(kind="diffusers", name="vae", sha256="ab"),
    text=LatentText(name="text", sha256="cd", max_length=77, dim=5, mask_padding=False),
    scale=0.18215,
    shift=0.25,
    clip=ClipConfig(frames=4, height=16, width=16, start="center"),
    dtype="fp32",
    shape=(4, 2, 3, 3),
    samples=7,
    lvdm_version="0.1",
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sample_comes_back_in_the_stored_precision(dtype: str) -> None:
    draws = torch.Generator().manual_seed(1)
    moments, states = torch.randn(8, 2, 3, 3, generator=draws), torch.randn(6, 5, generator=draws)
    members = encode_latent(moments.clone().permute(0, 1, 3, 2), states, "a cät", dtype)
    assert members["txt"].decode() == "a cät"
    back_moments, back_states = decode_latent(members, INFO.model_copy(update={"dtype": dtype}))
    assert back_moments.dtype == back_states.dtype == torch.float32
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert torch.equal(back_moments, moments.permute(0, 1, 3, 2).to(stored).float())
    assert torch.equal(back_states, states.to(stored).float())
    assert len(members["latent.safetensors"]) < 8 * 18 * stored.itemsize + 200


@pytest.mark.parametrize("folder", ["local", "memory://latents/set"])
def test_a_set_describes_itself(folder: str, tmp_path: Path) -> None:
    folder = str(tmp_path) if folder == "local" else folder
    write_latent_set(folder, INFO, torch.full((3, 5), 1.5))
    assert read_latent_set(folder) == INFO
    assert torch.equal(read_unconditional(folder), torch.full((3, 5), 1.5))


def test_sets_that_agree_add_up(tmp_path: Path) -> None:
    other = INFO.model_copy(update={"samples": 5, "vae": INFO.vae.model_copy(update={"name": "a copy of it"})})
    write_latent_set(str(tmp_path / "a"), INFO, torch.zeros(1, 5))
    write_latent_set(str(tmp_path / "b"), other, torch.zeros(1, 5))
    assert agreed_latent_set([str(tmp_path / "a"), str(tmp_path / "b")]).samples == 12


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("vae.sha256", {"vae": INFO.vae.model_copy(update={"sha256": "ef"})}),
        ("text.max_length", {"text": INFO.text.model_copy(update={"max_length": 12})}),
        ("scale", {"scale": 1.0}),
        ("clip.start", {"clip": INFO.clip.model_copy(update={"start": "random"})}),
        ("shape", {"shape": (4, 2, 3, 4)}),
    ],
)
def test_sets_that_disagree_are_refused_by_the_field(field: str, change: dict[str, object], tmp_path: Path) -> None:
    write_latent_set(str(tmp_path / "a"), INFO, torch.zeros(1, 5))
    write_latent_set(str(tmp_path / "b"), INFO.model_copy(update=change), torch.zeros(1, 5))
    with pytest.raises(
        UserError, match=rf"/a and .*/b cannot be trained on together: {field} of latents\.json differs"
    ):
        agreed_latent_set([str(tmp_path / "a"), str(tmp_path / "b")])


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with pytest.raises(UserError, match=r"holds no latents \(latents\.json is missing\)"):
        read_latent_set(folder)
    with pytest.raises(UserError, match=r"unconditional\.safetensors is missing"):
        read_unconditional(folder)
    path = tmp_path / "latents.json"
    path.write_text(json.dumps(INFO.model_dump(mode="json") | {"version": 2}))
    with pytest.raises(UserError, match=r"latents\.json: version: "):
        read_latent_set(folder)
    path.write_text("{")
    with pytest.raises(UserError, match=r"latents\.json: the file: Invalid JSON"):
        read_latent_set(folder)
    (tmp_path / "unconditional.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"unconditional\.safetensors is damaged"):
        read_unconditional(folder)
