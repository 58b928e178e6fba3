"""Encode videos and captions once: video shards in, latent shards out, one for one.

    claim a shard (lease) -> loader workers: fetch, decode -> VAE and text encoder -> a thread: pack, write -> manifest

Any number of processes, GPUs and nodes run the same job on one output folder, a path or any fsspec URL, without talking
to each other: each claims shards by leases (`lvdm.jobs.leases`) and finishes them by manifests
(`lvdm.jobs.shard_board`). A shard's bytes depend on its source shard and the settings alone, which are written first,
so that a folder never mixes two encoders. A source shard that changed since is encoded again, and one that is gone has
its latents removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from fsspec.implementations.local import LocalFileSystem

import lvdm
from lvdm.config import ClipConfig, Condition, LatentDiffusionTraining, Scaling, VideoSource
from lvdm.data.batch import Replacement
from lvdm.data.build_index import build_index
from lvdm.data.index import open_index
from lvdm.data.latents import (
    LatentSetInfo,
    LatentText,
    LatentVAE,
    read_latent_set,
    settings_difference,
    write_latent_set,
)
from lvdm.errors import Requeue, UserError
from lvdm.inference import read_scaling
from lvdm.jobs.encoders import Encoders, Part, load_encoders
from lvdm.jobs.encoding_source import open_encoding_source
from lvdm.jobs.encoding_worker import Worker
from lvdm.jobs.latent_stats import ChannelSums
from lvdm.jobs.leases import Leases, create
from lvdm.jobs.progress import Report, silent
from lvdm.jobs.shard_board import MANIFEST, Board, list_files
from lvdm.jobs.shard_queue import LOOK_EVERY
from lvdm.storage import Missing, locate, read_file

SETTINGS_NAME = "encoding.json"
"""The settings of an encoding job, written before its first shard."""
_FINISH = "finish"  # the lease on writing the index
_ENDINGS = (MANIFEST, "_stats.json", ".parquet", ".tar")  # of a shard's files; the manifest is the first to go


@dataclass(frozen=True)
class Settings:
    """What a job makes of its source, beside what the training config says."""

    stored: Literal["fp32", "bf16"] = "fp32"
    """Type of the moments and text states on disk."""
    clips: int = 1
    """Most clips of a video: at random places, or one after another where ``clip.start`` is not random."""
    only: Part | None = None
    """What is encoded, if not both."""
    where: tuple[Condition, ...] = ()
    """Conditions that a sample must meet."""
    join: tuple[str, ...] = ()
    """Folders with more members and fields of the same samples, such as other captions."""
    frames_at_once: int | None = None
    """Frames in one call of the autoencoder; None takes what the folder was begun with, else what fits in memory."""


@dataclass
class Encoded:
    """What a job did to one folder."""

    samples: int = 0
    """Samples in the finished folder."""
    skipped_shards: int = 0
    """Shards that were finished before this process started."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Samples of the source that the index shows to be unfit, by reason."""
    failed: list[Replacement] = field(default_factory=list)
    """Samples left out because their bytes are bad."""
    removed: list[str] = field(default_factory=list)
    """Shards of the folder that were removed, as their source is gone or could not be encoded any more."""
    given_up: dict[str, str] = field(default_factory=dict)
    """Source shards that could not be encoded in several attempts, with one reason each."""


def encode_folder(
    config: LatentDiffusionTraining,
    source: str,
    target: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings = Settings(),
    encoders: Encoders | None = None,
    lease_seconds: float = 120.0,
    verify: bool = False,
    progress: Report = silent,
) -> Encoded:
    """Encode the shards in ``source`` into latent shards in ``target``, with the clips, VAE and text encoder of a
    training config.

    Args:
        source, target: folders, paths or any fsspec URLs. Several processes may work on one target.
        dtype: what the VAE and text encoder compute in.
        encoders: in place of those that the config names.
        lease_seconds: seconds after which another worker takes over the shard of one that is gone.
        verify: whether finished shards are held against their checksums, not their sizes alone.
        progress: told of the samples that all workers have finished, and how many there are.
    Raises:
        UserError: the source cannot be read, a model cannot be loaded, or the target holds latents of other settings or
            cannot be written.
        Requeue: a store does not answer; the same command goes on.
    """
    assert config.data.video is not None
    source, target = source.rstrip("/"), target.rstrip("/")
    sizes = config.data.video.clip.sizes if settings.only != "text" else []
    shards = open_encoding_source(source, sizes, settings.where, settings.join)
    encoders = encoders or load_encoders(config, device, dtype, settings.only)
    origin = {"source": source, "where": [str(one) for one in settings.where], "join": list(settings.join)}
    info = _claim(target, origin, _describe(config, config.data.video, encoders, settings, dtype), encoders, settings)
    encoders.limit_calls(info.frames_at_once, info.clip.sizes)
    # of what was recorded, not of what this version of the code makes of it
    digest = hashlib.sha256(read_file(f"{target}/{SETTINGS_NAME}")).hexdigest()
    _check_scaling(config)
    board = Board(target, shards.digests(), digest, hashes=verify)
    board.look()
    done = Encoded(skipped_shards=len(board.finished), passed_over=shards.source.selection.removed)
    with Leases(target, lease_seconds) as leases:
        worker = Worker(config.data, shards, target, info, encoders, board, leases, progress)
        worker.run()
        _summarise(done, board, source)
        progress(done.samples + len(done.failed), shards.samples)
        if not done.samples:
            reasons = [*done.given_up.values(), *(item.reason for item in done.failed)]
            raise UserError(
                f"none of the {shards.samples} samples in {source} could be encoded; the first: {reasons[0]}"
            )
        while not leases.claim(_FINISH):
            if _content(target) == board.content:
                return done  # another worker did it
            time.sleep(min(lease_seconds / 10, LOOK_EVERY))
        if open_encoding_source(source, sizes, settings.where, settings.join, check=False).digests() != board.sources:
            raise Requeue(f"{source} changed while it was encoded")
        board.look()
        done.removed = _finish(config, target, info, encoders, board, leases, done.samples)
    return done


def _describe(
    config: LatentDiffusionTraining,
    video: VideoSource,
    encoders: Encoders,
    settings: Settings,
    dtype: torch.dtype,
) -> LatentSetInfo:
    vae, text = encoders.vae, encoders.text
    clip = video.clip if vae is not None else ClipConfig()
    return LatentSetInfo(
        vae=LatentVAE(
            kind=config.vae.kind,
            name=config.vae.folder if config.vae.kind == "lvdm" else config.vae.name,
            sha256=vae.fingerprint,
        )
        if vae is not None
        else None,
        text=LatentText(
            name=config.text.name,
            sha256=text.fingerprint,
            max_length=text.max_length,
            dim=text.dim,
            mask_padding=text.mask_padding,
        )
        if text is not None and config.text is not None
        else None,
        clip=clip,
        decoder=video.decoder if vae is not None else "pyav",
        clips=settings.clips if vae is not None else 1,
        captions={name: weight for name, weight in video.captions.items() if weight > 0} if text is not None else {},
        seed=config.run.seed,
        dtype=settings.stored,
        compute="bf16" if dtype == torch.bfloat16 else "fp32",
        frames_at_once=settings.frames_at_once or 1,
        shapes=tuple(vae.latent_shape(size.frames, size.height, size.width) for size in clip.sizes) if vae else (),
        samples=0,
        lvdm_version=lvdm.__version__,
    )


def _claim(
    target: str, origin: dict[str, Any], info: LatentSetInfo, encoders: Encoders, settings: Settings
) -> LatentSetInfo:
    """Record the settings in a new folder, or take those of a begun one if they are the same. Raises `UserError`."""
    url = f"{target}/{SETTINGS_NAME}"
    begun = _read_settings(url)
    if begun is None and any(not name.startswith(".") for name in list_files(target)):
        begun = _read_settings(url)  # another process may have begun the folder since
        if begun is None:
            raise UserError(f"{target} is not empty and holds no latents; choose another folder")
    if settings.frames_at_once is None:
        chosen = begun[1].frames_at_once if begun else encoders.frames_that_fit(info.clip.sizes)
        info = info.model_copy(update={"frames_at_once": chosen})
    if begun is None:
        document = json.dumps({**origin, "latents": info.model_dump(mode="json")}, indent=1) + "\n"
        if create(url, document.encode()):
            return info
        begun = _read_settings(url)
        if begun is None:
            raise UserError(f"{url} appears and disappears; start again when nobody removes {target}")
        if settings.frames_at_once is None:
            info = info.model_copy(update={"frames_at_once": begun[1].frames_at_once})
    difference = settings_difference(begun[1], info)
    for name, value in origin.items():
        if begun[0][name] != value:
            difference = f"{name}: {begun[0][name] or 'none'}, not {value or 'none'}"
    if difference:
        raise UserError(f"{target} holds latents made with another {difference}; choose another folder")
    return info


def _read_settings(url: str) -> tuple[dict[str, Any], LatentSetInfo] | None:
    """Origin and settings of a begun folder. Raises `UserError` if they are damaged."""
    try:
        tree = json.loads(read_file(url))
        return {name: tree[name] for name in ("source", "where", "join")}, LatentSetInfo.model_validate(tree["latents"])
    except Missing:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{url} is damaged or of another lvdm; choose another folder") from None


def _summarise(done: Encoded, board: Board, source: str) -> None:
    """What all workers did, from the manifests."""
    for name, manifest in sorted(board.finished.items()):
        done.samples += manifest.samples
        done.failed += [Replacement(-1, f"{source}/{name}.tar", key, why) for key, why in manifest.left_out]
    done.given_up = {f"{source}/{name}.tar": reason for name, reason in board.reasons().items()}


def _finish(
    config: LatentDiffusionTraining,
    target: str,
    info: LatentSetInfo,
    encoders: Encoders,
    board: Board,
    leases: Leases,
    samples: int,
) -> list[str]:
    """Index and describe a folder whose shards are finished, unless another worker has; remove what is of no use, and
    name the shards among it."""
    removed = _tidy(target, set(board.finished), leases.seconds)
    if removed or not _is_described(target, board.content):
        board.summarise()
        build_index(target)
        scale, shift = _scaling(config, target, board)
        about = {"scale": scale, "shift": shift, "samples": samples, "content": board.content}
        whole = info.model_copy(update=about)
        unconditional_LD = encoders.states([""])[0].wait() if info.text is not None else None
        write_latent_set(target, whole, unconditional_LD)
    leases.sweep()
    return removed


def _content(target: str) -> str:
    """The digest of the shards that a folder is described with; empty if it is not."""
    locate(target)[0].invalidate_cache()
    with contextlib.suppress(UserError):
        return read_latent_set(target).content
    return ""


def _is_described(target: str, content: str) -> bool:
    """Whether the folder's description and index are those of the shards that are there."""
    with contextlib.suppress(UserError):
        open_index([target])
        return _content(target) == content
    return False


def _check_scaling(config: LatentDiffusionTraining) -> None:
    """Refuse a file of scale and shift that holds none now, not when all is encoded. Raises `UserError`."""
    if config.vae.scaling and Path(config.vae.scaling).exists():
        read_scaling(config.vae)


def _scaling(config: LatentDiffusionTraining, target: str, board: Board) -> tuple[Scaling, Scaling]:
    """Scale and shift: those that the folder or the config already has, else what makes these latents standard."""
    with contextlib.suppress(UserError):
        before = read_latent_set(target)
        return before.scale, before.shift
    if Path(config.vae.scaling).is_file() if config.vae.scaling else config.vae.kind == "diffusers":
        return read_scaling(config.vae)
    sums = ChannelSums()
    for _, manifest in sorted(board.finished.items()):
        if manifest.sums is not None:
            sums = sums.merge(ChannelSums.from_json(manifest.sums))
    return sums.scaling() if sums.values else (1.0, 0.0)


def _tidy(target: str, finished: set[str], age: float) -> list[str]:
    """Remove shards that are not of this job any more, or were begun and given up, and what killed workers left: files
    that nobody has written to for ``age`` seconds. The shards that it removed."""
    fs, root = locate(target)
    files = list_files(target)
    begun = {name.removesuffix(ending) for ending in (MANIFEST, ".tar") for name in files if name.endswith(ending)}
    removed = sorted(begun - finished)
    for shard in removed:
        for name in (f"{shard}{ending}" for ending in _ENDINGS):
            if name in files:
                fs.rm_file(f"{root}/{name}")
    if isinstance(fs, LocalFileSystem):
        for path in Path(root).glob(".writing-*"):
            with contextlib.suppress(FileNotFoundError):
                if max(part.stat().st_mtime for part in (path, *path.iterdir())) <= time.time() - age:
                    shutil.rmtree(path, ignore_errors=True)
    return removed
