"""Encode videos and captions once: video shards in, latent shards out, one for one.

Any number of processes, GPUs and nodes run the same job on one output folder, a path or any fsspec URL, without talking
to each other: each claims shards by leases (`lvdm.jobs.leases`) and finishes them by manifests
(`lvdm.jobs.shard_board`).

What was finished stays finished. A shard's bytes depend on its source shard and the settings alone, which are written
first, so that a folder never mixes two encoders.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
    read_latent_set,
    write_latent_set,
)
from lvdm.data.loader import read_videos
from lvdm.data.writer import ShardSample, write_shard
from lvdm.errors import UserError
from lvdm.inference import frames_to_float, load_vae, read_scaling
from lvdm.jobs.leases import Leases, create
from lvdm.jobs.progress import Report, silent
from lvdm.jobs.shard_board import Board
from lvdm.models.frozen import FrozenTextEncoder, FrozenVAE, NoText, load_text_encoder
from lvdm.models.video_autoencoder import split_moments
from lvdm.storage import Missing, locate, persistently, read_file

log = logging.getLogger(__name__)

SETTINGS_NAME = "encoding.json"
"""The settings of an encoding job, written before its first shard."""
_FINISH = "finish"  # the lease on writing the index
_NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_LOOK_EVERY = 5.0  # seconds between counts of what all workers finished


@dataclass
class Encoded:
    """What a job did to one folder."""

    samples: int = 0
    """Samples in the finished folder."""
    skipped_shards: int = 0
    """Shards that were finished before this process started."""
    failed: list[Replacement] = field(default_factory=list)
    """Samples left out because their bytes are bad."""
    given_up: dict[str, str] = field(default_factory=dict)
    """Source shards that could not be encoded in several attempts, with one reason each."""


def encode_folder(
    config: LatentDiffusionTraining,
    source: str,
    target: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    stored: Literal["fp32", "bf16"] = "fp32",
    lease_seconds: float = 120.0,
    verify: bool = False,
    progress: Report = silent,
) -> Encoded:
    """Encode the video shards in ``source`` into latent shards in ``target``, with the clips, VAE and text encoder of
    a training config.

    Args:
        source, target: folders, paths or any fsspec URLs. Several processes may work on one target.
        dtype: what the VAE and text encoder compute in.
        batch: clips encoded at once.
        stored: ``fp32`` or ``bf16``, the type of the moments and text states on disk.
        lease_seconds: seconds after which another worker takes over the shard of one that is gone.
        verify: whether finished shards are held against their checksums, not their sizes alone.
        progress: told of the samples that all workers have finished, and how many there are.
    Raises:
        UserError: the source cannot be read, the config has clips of several sizes, or the target holds latents of
            other settings or cannot be written.
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
    target = target.rstrip("/")
    board_settings = _claim(
        target, info, {"source": source, "batch": batch, "compute": str(dtype), "seed": config.run.seed}
    )
    rows = _rows_of(index)
    board = Board(target, rows, board_settings, hashes=verify)
    board.look()
    done = Encoded(skipped_shards=len(board.finished))

    def encode(number: int) -> None:
        left_out: list[list[Any]] = []

        def report(own: int) -> None:
            board.look(_LOOK_EVERY)
            progress(sum(len(rows[n]) for n in board.finished) + own, len(index))

        batches = read_videos(config.data, index, rows[number], batch=batch, seed=config.run.seed)
        stats = write_shard(target, number, _encode(index, batches, vae, text, info, device, left_out, report))
        board.finish(number, stats, left_out)
        report(0)

    with Leases(target, lease_seconds) as leases:
        _work(board, leases, index, encode)
        _summarise(done, board, index)
        if not done.samples:
            reasons = [*done.given_up.values(), *(str(item) for item in done.failed)]
            raise UserError(f"none of the {len(index)} samples in {source} could be encoded; the first: {reasons[0]}")
        while not leases.claim(_FINISH):
            time.sleep(lease_seconds / 10)
        if not _described(target, done.samples):
            build_index(target)
            scale, shift = _scaling(config, info, target)
            whole = info.model_copy(update={"scale": scale, "shift": shift, "samples": done.samples})
            write_latent_set(target, whole, _true_length(text, [""])[0])
    progress(sum(len(rows[n]) for n in board.finished), len(index))
    return done


def _work(board: Board, leases: Leases, index: Index, encode: Callable[[int], None]) -> None:
    """Encode shards that nobody else has, until every shard is finished or given up."""
    while left := board.open:
        idle = True
        first = random.SystemRandom().randrange(len(left))  # so that workers do not queue for the same shards
        for number in [*left[first:], *left[:first]]:
            name = f"{number:05d}"
            if number in board.finished or not leases.claim(name):
                continue
            try:
                if not board.is_finished(number):
                    idle = False
                    encode(number)
            except OSError as error:
                if error.errno in _NO_PLACE:
                    raise UserError(f"cannot write {board.folder}: {error.strerror}") from None
                board.fail(number, f"{type(error).__name__}: {error}")
            except Exception as error:  # whatever it is: the next attempt, perhaps on another node, may do better
                log.warning("%s failed: %s: %s", index.shards[number], type(error).__name__, error)
                board.fail(number, f"{type(error).__name__}: {error}")
            finally:
                leases.release(name)
        if idle:
            time.sleep(min(leases.seconds / 10, _LOOK_EVERY))
        board.look()


def _summarise(done: Encoded, board: Board, index: Index) -> None:
    """What all workers did, from the manifests."""
    for number, manifest in sorted(board.finished.items()):
        done.samples += manifest.samples
        done.failed += [Replacement(row, index.shards[number], key, why) for row, key, why in manifest.left_out]
    done.given_up = {index.shards[number]: board.reason(number) for number in board.given_up}


def _described(target: str, samples: int) -> bool:
    """Whether another worker has indexed and described a folder with so many samples."""
    with contextlib.suppress(UserError):
        locate(target)[0].invalidate_cache()
        return read_latent_set(target).samples == len(open_index([target])) == samples
    return False


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


def _claim(target: str, info: LatentSetInfo, origin: dict[str, Any]) -> str:
    """Record the settings in a new folder, or check that a begun one has the same; their digest. Raises `UserError`."""
    latents = info.model_dump(mode="json", exclude={"scale", "shift", "samples"})
    document = json.dumps({**origin, "latents": latents}, indent=1) + "\n"
    url = f"{target}/{SETTINGS_NAME}"
    there = _settings(url)
    if there is None:
        try:
            names = persistently(target, lambda fs, root: list(fs.ls(root, detail=False)))
        except Missing:
            names = []
        # another process may have begun the folder since
        if names and _settings(url) is None:
            raise UserError(f"{target} is not empty and holds no latents; choose another folder")
        there = document if create(url, document.encode()) else _settings(url)
    if there != document:
        raise UserError(f"{target} holds latents made with other settings (see {url}); choose another folder")
    return hashlib.sha256(document.encode()).hexdigest()


def _settings(url: str) -> str | None:
    try:
        return read_file(url).decode("utf-8", "replace")
    except Missing:
        return None


def _rows_of(index: Index) -> dict[int, range]:
    """Rows of each shard that has samples, by its number."""
    numbers = {shard.name: number for number, shard in enumerate(index.parts[0].shards)}
    found = [(numbers[name], first) for name, first, _ in index.shard_keys()]
    ends = [*(first for _, first in found[1:]), len(index)]
    return {number: range(first, end) for (number, first), end in zip(found, ends, strict=True)}


def _encode(
    index: Index,
    batches: Iterator[VideoBatch],
    vae: FrozenVAE,
    text: FrozenTextEncoder | NoText,
    info: LatentSetInfo,
    device: torch.device,
    left_out: list[list[Any]],
    report: Callable[[int], None],
) -> Iterator[ShardSample]:
    """Encoded samples; row, key and reason of bad ones go to ``left_out``."""
    count = 0
    for batch in batches:
        bad = {item.position: item for item in batch.replaced}
        moments = vae.encode(frames_to_float(batch.to(device).frames_BCTHW)).float().cpu()
        states = _true_length(text, batch.captions)
        for i, row in enumerate(batch.positions):
            record = index[row]
            reason = bad[row].reason if row in bad else _fault(moments[i])
            if reason:
                left_out.append([row, record.key, reason])
                yield ShardSample(record.key, {}, status="failed_to_subsample", error_message=reason)
            else:
                members = encode_latent(moments[i], states[i], batch.captions[i], info.dtype)
                yield ShardSample(record.key, members, record.meta)
        count += len(batch)
        report(count)


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
