"""Encode videos and captions once: video shards in, latent shards out, one for one.

What was finished stays finished: a shard appears whole with its statistics written last, and a job that is started
again goes on behind the finished ones. Settings are written first, so that a folder never mixes two encoders.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import lvdm
from lvdm.config import LatentDiffusionTraining
from lvdm.data.batch import Replacement, VideoBatch
from lvdm.data.build_index import build_index
from lvdm.data.fetch import read_sample
from lvdm.data.index import Index, open_index
from lvdm.data.latents import (
    LatentSetInfo,
    LatentText,
    LatentVAE,
    decode_latent,
    encode_latent,
    write_latent_set,
)
from lvdm.data.loader import read_videos
from lvdm.data.writer import ShardSample, write_shard
from lvdm.errors import UserError
from lvdm.inference import frames_to_float, load_vae, read_scaling
from lvdm.jobs.progress import Report, silent
from lvdm.models.frozen import FrozenTextEncoder, FrozenVAE, NoText, load_text_encoder
from lvdm.models.video_autoencoder import split_moments

SETTINGS_NAME = "encoding.json"
"""The settings of an encoding job, written before its first shard."""


@dataclass
class Encoded:
    """What a job did to one folder."""

    samples: int = 0
    """Samples in the finished folder."""
    skipped_shards: int = 0
    """Shards that an earlier start had finished."""
    failed: list[Replacement] = field(default_factory=list)
    """Samples left out because their bytes are bad."""


def encode_folder(
    config: LatentDiffusionTraining,
    source: str,
    target: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    stored: Literal["fp32", "bf16"] = "fp32",
    progress: Report = silent,
) -> Encoded:
    """Encode the video shards in ``source`` into latent shards in ``target``, with the clips, VAE and text encoder of
    a training config.

    Args:
        source, target: folders; the target is local.
        dtype: what the VAE and text encoder compute in.
        batch: clips encoded at once.
        stored: ``fp32`` or ``bf16``, the type of the moments and text states on disk.
    Raises:
        UserError: the source cannot be read, the config has clips of several sizes, or the target holds latents of
            other settings.
    """
    assert config.data.video is not None
    if config.data.video.clip.buckets:
        raise UserError(
            "data.video.clip.buckets: latents of a folder have one size; set data.video.clip.frames, height and width "
            "instead, and encode each size into a folder of its own"
        )
    index = open_index([source])
    vae = load_vae(config.vae, device, dtype, scaling=(1.0, 0.0))
    text = load_text_encoder(config.text, device, dtype) if config.text else NoText()
    clip = config.data.video.clip
    info = LatentSetInfo(
        vae=LatentVAE(kind=config.vae.kind, name=_vae_name(config), sha256=vae.fingerprint),
        text=LatentText(
            name=config.text.name if config.text else "none",
            sha256=text.fingerprint,
            max_length=text.max_length,
            dim=text.dim,
            mask_padding=text.mask_padding,
        ),
        scale=1.0,
        shift=0.0,
        clip=clip,
        dtype=stored,
        shape=vae.latent_shape(clip.frames, clip.height, clip.width),
        samples=0,
        lvdm_version=lvdm.__version__,
    )
    _claim(Path(target), info, source)

    done = Encoded()
    rows = list(_rows_left(index, Path(target), done))
    batches = read_videos(config.data, index, rows, batch=batch, seed=config.run.seed)
    encoded = _encode(index, batches, vae, text, info, device, done, len(rows), progress)
    shard_numbers = {url: number for number, url in enumerate(index.shards)}
    for url, samples in itertools.groupby(encoded, key=lambda item: item[0]):
        write_shard(target, shard_numbers[url], (sample for _, sample in samples))
    done.samples = build_index(target).samples
    if not done.samples:
        raise UserError(f"none of the {len(index)} samples in {source} could be encoded; the first: {done.failed[0]}")
    scale, shift = _scaling(config, info, target)
    unconditional = _true_length(text, [""])[0]
    write_latent_set(
        target, info.model_copy(update={"scale": scale, "shift": shift, "samples": done.samples}), unconditional
    )
    return done


def latent_statistics(folder: str, info: LatentSetInfo) -> tuple[float, float]:
    """Mean and standard deviation of posterior samples over all latents in ``folder``, in one streaming pass."""
    index = open_index([folder])
    count, mean, squares = 0, 0.0, 0.0
    for row in range(len(index)):
        moments, _ = decode_latent(read_sample(index[row]), info)
        centre, logvar = (part.double() for part in split_moments(moments[None]))
        # Chan's merge of two means and sums of squares; a posterior sample adds its own variance.
        size, part = centre.numel(), float(centre.mean())
        within = float((centre - part).square().sum() + logvar.exp().sum())
        total = count + size
        squares += within + (part - mean) ** 2 * count * size / total
        mean += (part - mean) * size / total
        count = total
    return mean, (squares / count) ** 0.5


def _scaling(config: LatentDiffusionTraining, info: LatentSetInfo, target: str) -> tuple[float, float]:
    """The config's scale and shift; those that make these latents standard where it names a file yet to be written."""
    own_file = getattr(config.vae, "scaling", "")
    if config.vae.kind == "diffusers" or (own_file and Path(own_file).is_file()):
        return read_scaling(config.vae)
    mean, deviation = latent_statistics(target, info)
    return 1 / deviation, -mean


def _claim(target: Path, info: LatentSetInfo, source: str) -> None:
    """Record the settings in a new folder, or check that a begun one has the same. Raises `UserError`."""
    settings = {"source": source, "latents": info.model_dump(mode="json", exclude={"scale", "shift", "samples"})}
    path = target / SETTINGS_NAME
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != settings:
            raise UserError(f"{target} holds latents made with other settings (see {path}); choose another folder")
    elif target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty and holds no latents; choose another folder")
    else:
        target.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _rows_left(index: Index, target: Path, done: Encoded) -> Iterator[int]:
    """Rows of the shards that are not finished, in index order."""
    finished = {number for number in range(len(index.shards)) if (target / f"{number:05d}_stats.json").is_file()}
    done.skipped_shards = len(finished)
    numbers = {url: number for number, url in enumerate(index.shards)}
    for row in range(len(index)):
        if numbers[index[row].shard] not in finished:
            yield row


def _encode(
    index: Index,
    batches: Iterator[VideoBatch],
    vae: FrozenVAE,
    text: FrozenTextEncoder | NoText,
    info: LatentSetInfo,
    device: torch.device,
    done: Encoded,
    total: int,
    progress: Report,
) -> Iterator[tuple[str, ShardSample]]:
    """Encoded samples with the shard they came from; bad ones go to ``done.failed``."""
    count = 0
    for batch in batches:
        bad = {item.position: item for item in batch.replaced}
        moments = vae.encode(frames_to_float(batch.to(device).frames_BCTHW)).float().cpu()
        states = _true_length(text, batch.captions)
        for i, row in enumerate(batch.positions):
            record = index[row]
            reason = bad[row].reason if row in bad else _fault(moments[i])
            if reason:
                done.failed.append(Replacement(row, record.shard, record.key, reason))
                yield record.shard, ShardSample(record.key, {}, status="failed_to_subsample", error_message=reason)
            else:
                members = encode_latent(moments[i], states[i], batch.captions[i], info.dtype)
                yield record.shard, ShardSample(record.key, members, record.meta)
        count += len(batch)
        progress(count, total)


def _true_length(text: FrozenTextEncoder | NoText, captions: list[str]) -> list[torch.Tensor]:
    """Text states ``[L, D]`` of each caption, without its padding where that is masked."""
    states_BLD, mask_BL = text.encode(captions)
    kept_B = mask_BL.sum(1).tolist() if text.mask_padding else [states_BLD.shape[1]] * len(captions)
    return [states[:length].float().cpu() for states, length in zip(states_BLD, kept_B, strict=True)]


def _fault(moments: torch.Tensor) -> str:
    """Why moments must not be stored; empty if they are fine."""
    if not torch.isfinite(moments).all():
        return "the latent is not finite"
    return ""


def _vae_name(config: LatentDiffusionTraining) -> str:
    return config.vae.folder if config.vae.kind == "lvdm" else config.vae.name
