from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.config import Bucket, ClipConfig
from lvdm.data.latents import (
    LatentSetInfo,
    LatentText,
    LatentVAE,
    fault_of_moments,
    pack_latent,
    pack_text,
    read_latent_set,
    read_unconditional,
    settings_difference,
    unpack_latent,
    unpack_text,
    write_latent_set,
)
from lvdm.errors import BadSample, UserError

INFO = LatentSetInfo(
    vae=LatentVAE(kind="diffusers", name="vae", sha256="ab"),
    text=LatentText(name="text", sha256="cd", max_length=77, dim=5, mask_padding=False),
    scale=0.18215,
    shift=0.25,
    clip=ClipConfig(frames=4, height=16, width=16, start="center"),
    captions={"txt": 1.0, "alt": 2.0, "unused": 0.0},
    dtype="fp32",
    shapes=((4, 2, 3, 3),),
    samples=7,
    lvdm_version="0.1",
)


def changed(**changes: Any) -> LatentSetInfo:
    return LatentSetInfo.model_validate(INFO.model_dump() | changes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_packed_comes_back_in_the_stored_precision(dtype: Any) -> None:
    draws = torch.Generator().manual_seed(1)
    moments, states = torch.randn(8, 2, 3, 3, generator=draws), torch.randn(6, 5, generator=draws)
    turned = moments.clone().permute(0, 1, 3, 2)  # not contiguous
    packed = pack_latent(turned, dtype)
    back_moments, back_states = unpack_latent(packed, INFO), unpack_text(pack_text(states, dtype), INFO)
    assert back_moments.dtype == back_states.dtype == torch.float32
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert torch.equal(back_moments, turned.to(stored).float())
    assert torch.equal(back_states, states.to(stored).float())
    assert len(packed) < 8 * 18 * stored.itemsize + 200


def test_members_that_do_not_fit_are_bad() -> None:
    for data, fault in [(pack_latent(torch.zeros(8, 2, 3, 4), "fp32"), "instead of"), (b"junk", "not the safetensors")]:
        with pytest.raises(BadSample, match=fault):
            unpack_latent(data, INFO)
    for states in (torch.zeros(0, 5), torch.zeros(78, 5), torch.zeros(2, 4), torch.full((2, 5), torch.nan)):
        with pytest.raises(BadSample, match="text states"):
            unpack_text(pack_text(states, "fp32"), INFO)


@pytest.mark.parametrize(
    ("channel", "value", "fault"),
    [
        (0, float("nan"), "not all values of the latent are finite"),
        (7, float("-inf"), "not all values of the latent are finite"),
        (3, -1001.0, "a mean of the latent exceeds 1000"),
        (4, 101.0, "a log variance of the latent exceeds 100"),
        (3, 999.0, ""),
        (4, -40.0, ""),
    ],
)
def test_absurd_moments_have_a_fault(channel: int, value: float, fault: str) -> None:
    moments = torch.zeros(8, 2, 3, 3)
    moments[channel, 1, 2, 0] = value
    assert fault_of_moments(moments) == fault


@pytest.mark.parametrize("folder", ["local", "memory://latents/set"])
def test_a_set_describes_itself(folder: str, tmp_path: Path) -> None:
    folder = str(tmp_path) if folder == "local" else folder
    info = changed(scale=(1.0, 0.5, 2.0, 3.0), shift=(0.0, 0.1, 0.2, -0.3))
    write_latent_set(folder, info, torch.full((3, 5), 1.5))
    assert read_latent_set(folder) == info
    assert torch.equal(read_unconditional(folder), torch.full((3, 5), 1.5))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"vae": {"kind": "diffusers", "name": "vae", "sha256": "ef"}}, "vae.sha256: ab, not ef"),
        ({"vae": None, "shapes": ()}, "vae: given, not none"),
        ({"text": None}, "text: given, not none"),
        ({"clip": {"frames": 8, "height": 16, "width": 16, "start": "center"}}, "clip.frames: 4, not 8"),
        ({"clip": {"frames": 4, "height": 16, "width": 16, "flip": 0.5}}, "clip.start: center, not random"),
        ({"captions": {"alt": 1.0, "txt": 1.0}}, "captions: txt, alt, not alt, txt"),
        ({"dtype": "bf16"}, "dtype: fp32, not bf16"),
        ({"clips": 3}, "clips: 1, not 3"),
        ({"seed": 1}, "seed: 0, not 1"),
        ({"captions": {"txt": 9.0, "alt": 2.0}}, ""),
        ({"scale": 1.0, "shift": (0.0, 1.0), "samples": 0, "lvdm_version": "2"}, ""),
        ({"vae": {"kind": "diffusers", "name": "a copy", "sha256": "ab"}}, ""),
    ],
)
def test_settings_that_decide_the_content_are_told_apart(changes: dict[str, Any], difference: str) -> None:
    assert settings_difference(INFO, changed(**changes)) == difference


def test_batch_sizes_of_buckets_decide_no_content() -> None:
    def with_buckets(size: int, frames: int = 8) -> LatentSetInfo:
        sizes = [Bucket(frames=frames, height=16, width=32, size=size), Bucket(frames=1, height=8, width=8, size=1)]
        return changed(clip=ClipConfig(buckets=tuple(sizes)), shapes=((4, 2, 3, 3), (4, 1, 1, 1)))

    assert settings_difference(with_buckets(2), with_buckets(3)) == ""
    found = settings_difference(with_buckets(2), with_buckets(2, frames=4))
    assert found == "clip.buckets: 1x8x8, 8x16x32, not 1x8x8, 4x16x32"


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    folder, path = str(tmp_path), tmp_path / "latents.json"
    with pytest.raises(UserError, match=r"holds no latents \(latents\.json is missing\)"):
        read_latent_set(folder)
    with pytest.raises(UserError, match=r"unconditional\.safetensors is missing"):
        read_unconditional(folder)
    tree = INFO.model_dump(mode="json")
    for document, fault in [
        (tree | {"version": 1, "shape": [4, 2, 3, 3]}, r"of version 1, which this lvdm does not read; encode .* again"),
        (tree | {"version": 3}, r"latents\.json: version: "),
        (tree | {"shapes": []}, r"0 shapes instead of 1"),
    ]:
        path.write_text(json.dumps(document))
        with pytest.raises(UserError, match=fault):
            read_latent_set(folder)
    path.write_text("{")
    with pytest.raises(UserError, match=r"latents\.json is damaged"):
        read_latent_set(folder)
    (tmp_path / "unconditional.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"unconditional\.safetensors is damaged"):
        read_unconditional(folder)
