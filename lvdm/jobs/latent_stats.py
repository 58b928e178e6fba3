"""Mean and standard deviation of latents by channel, over folders of any size: what scale and shift are taken from."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lvdm.data.fetch import Fetcher
from lvdm.data.index import Index, SampleRecord, open_index
from lvdm.data.latents import (
    INFO_NAME,
    LatentSetInfo,
    LatentVAE,
    Scaling,
    latent_member,
    read_latent_set,
    unpack_latent,
)
from lvdm.errors import BadSample, UserError
from lvdm.jobs.progress import Report, silent
from lvdm.jobs.shard_board import MANIFEST
from lvdm.models.video_autoencoder import split_moments
from lvdm.storage import Missing, atomic_file, read_file

_THREADS = 16
_READ = 16 << 20  # bytes that a thread reads at once, if there is not more in one sample


@dataclass(frozen=True)
class ChannelSums:
    """What is known of samples of the posteriors of some latents, by channel; those of no latents by default."""

    latents: int = 0
    """Latents that were counted: clips, not samples of a set."""
    values: int = 0
    """Their values in each channel."""
    means: tuple[float, ...] = ()
    """Mean of each channel."""
    squares: tuple[float, ...] = ()
    """Sum of the squared deviations from the mean of each channel."""

    @classmethod
    def of(cls, moments_CTHW: Tensor) -> ChannelSums:
        """Those of one latent: a sample of its posterior has the variance of the means and its own."""
        mean_CTHW, logvar_CTHW = (part[0].double() for part in split_moments(moments_CTHW[None]))
        mean_CN, variance_CN = mean_CTHW.flatten(1), logvar_CTHW.exp().flatten(1)
        mean_C = mean_CN.mean(1)
        squares_C = (mean_CN - mean_C[:, None]).square().sum(1) + variance_CN.sum(1)
        return cls(1, mean_CN.shape[1], tuple(mean_C.tolist()), tuple(squares_C.tolist()))

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> ChannelSums:
        """What `to_json` gave. Raises `ValueError` if it is something else."""
        try:
            means, squares = (tuple(map(float, tree[name])) for name in ("means", "squares"))
            found = cls(int(tree["latents"]), int(tree["values"]), means, squares)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no sums of channels: {error}") from None
        if len(means) != len(squares) or not all(map(math.isfinite, (*means, *squares))):
            raise ValueError("no sums of channels")
        return found

    def to_json(self) -> dict[str, Any]:
        """Numbers and lists of them, which `from_json` reads without loss."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def merge(self, other: ChannelSums) -> ChannelSums:
        """Those of the latents of both (Chan et al. 1979)."""
        if not (self.values and other.values):
            return self if self.values else other
        assert len(self.means) == len(other.means), "latents of different autoencoders"
        ours, theirs, values = self.values, other.values, self.values + other.values
        a, b = np.array([self.means, self.squares]), np.array([other.means, other.squares])
        apart_C = b[0] - a[0]
        means_C = a[0] + apart_C * (theirs / values)
        squares_C = a[1] + b[1] + apart_C**2 * (ours * theirs / values)
        return ChannelSums(self.latents + other.latents, values, tuple(means_C.tolist()), tuple(squares_C.tolist()))

    def scaled(self, scale: Scaling, shift: Scaling) -> ChannelSums:
        """Those of ``scale * (latent + shift)``."""
        means_C, squares_C = np.array(self.means), np.array(self.squares)
        means_C, squares_C = (means_C + shift) * scale, squares_C * np.square(scale)
        return ChannelSums(self.latents, self.values, tuple(means_C.tolist()), tuple(squares_C.tolist()))

    @property
    def deviations(self) -> tuple[float, ...]:
        """Standard deviation of each channel."""
        return tuple(math.sqrt(square / self.values) for square in self.squares)

    def pooled(self) -> tuple[float, float]:
        """Mean and standard deviation of all channels taken together."""
        means_C = np.array(self.means)
        mean = float(means_C.mean())
        variance_C = np.array(self.squares) / self.values + (means_C - mean) ** 2
        return mean, math.sqrt(variance_C.mean())

    def scaling(self, per_channel: bool = False) -> tuple[Scaling, Scaling]:
        """Scale and shift with which ``scale * (latent + shift)`` has mean 0 and standard deviation 1.

        Args:
            per_channel: one of each for every channel, else one for all.
        Raises:
            UserError: there are no latents, or they do not vary.
        """
        if not self.values:
            raise UserError("there are no latents to take scale and shift from")
        mean, deviation = self.pooled()
        if not min(self.deviations if per_channel else [deviation]) > 0:
            raise UserError("latents that do not vary give no scale: look at what their autoencoder makes of videos")
        if per_channel:
            return tuple(1 / d for d in self.deviations), tuple(-m for m in self.means)
        return 1 / deviation, -mean


def measure(folder: str, progress: Report = silent, *, read: bool = False) -> ChannelSums:
    """The sums over all latents of an indexed folder (any fsspec URL).

    Shards whose manifests hold their sums are not read; the others are streamed through.

    Args:
        progress: told of shards.
        read: do not believe the manifests, and read all latents.
    Raises:
        UserError: the folder holds no latents, or lacks shards or index, or some latent is bad.
        Requeue: its store does not answer.
    """
    folder = folder.rstrip("/")
    _autoencoder(folder)
    info = read_latent_set(folder)
    index = open_index([folder])
    sizes = {shard.name: shard.size for shard in index.parts[0].shards}
    found = [(name, first) for name, first, _ in index.shard_keys()]
    ends = [*(first for _, first in found[1:]), len(index)]

    def sums_of(name: str, first: int, end: int) -> ChannelSums:
        kept = None if read else _kept(f"{folder}/{name.removesuffix('.tar')}{MANIFEST}", sizes[name], end - first)
        return _stream(index, range(first, end), info) if kept is None else kept

    whole = ChannelSums()
    with ThreadPoolExecutor(_THREADS) as pool:
        names, firsts = zip(*found, strict=True)
        for done, sums in enumerate(pool.map(sums_of, names, firsts, ends), start=1):
            whole = whole.merge(sums)
            progress(done, len(found))
    return whole


def check_same_autoencoder(folders: Sequence[str]) -> None:
    """Raise `UserError` if one of the folders holds no latents, or two hold those of different autoencoders."""
    first, *others = [(folder, _autoencoder(folder)) for folder in folders]
    for folder, vae in others:
        if vae.sha256 != first[1].sha256:
            raise UserError(
                f"{first[0]} and {folder} hold latents of different autoencoders, which have no scale and shift in "
                f"common: vae.sha256 {first[1].sha256[:12]} ({first[1].name}) and {vae.sha256[:12]} ({vae.name})"
            )


def write_scaling(folders: Sequence[str], scale: Scaling, shift: Scaling) -> None:
    """Put scale and shift into ``latents.json`` of each folder, where training finds them; other fields stay.

    Raises:
        UserError: a folder cannot be written.
        Requeue: its store does not take it.
    """
    wanted = {"scale": scale, "shift": shift}
    texts = [read_latent_set(folder).model_copy(update=wanted).model_dump_json(indent=2) for folder in folders]
    # all are ready before the first is put in its place
    with contextlib.ExitStack() as written:
        for folder, text in zip(folders, texts, strict=True):
            path = written.enter_context(atomic_file(f"{folder.rstrip('/')}/{INFO_NAME}"))
            Path(path).write_text(text, encoding="utf-8")


def _autoencoder(folder: str) -> LatentVAE:
    vae = read_latent_set(folder).vae
    if vae is None:
        raise UserError(f"{folder} holds text states alone, which have no scale and shift; name folders of latents")
    return vae


def _kept(url: str, size: int, samples: int) -> ChannelSums | None:
    """The sums in the manifest of a shard of so many bytes and samples; none if it has none or is of another shard."""
    try:
        tree = json.loads(read_file(url))
        if tree["files"]["tar"]["size"] == size and tree["samples"] == samples and tree["sums"]:
            return ChannelSums.from_json(tree["sums"])
    except (Missing, ValueError, KeyError, TypeError):
        pass
    return None


def _stream(index: Index, rows: range, info: LatentSetInfo) -> ChannelSums:
    """The sums of some rows of an index, read in pieces of bounded size."""
    sums, fetcher = ChannelSums(), Fetcher()
    parts = (part for row in rows for part in _clips(index[row]))
    for piece in _pieces(parts):
        for part, members in zip(piece, fetcher.samples(piece), strict=True):
            ((member, data),) = members.items()
            try:
                sums = sums.merge(ChannelSums.of(unpack_latent(data, info)))
            except BadSample as error:
                raise UserError(f"{part.key}.{member} in {part.shard} is bad: {error}; encode it again") from None
    return sums


def _clips(record: SampleRecord) -> Iterator[SampleRecord]:
    """Where each clip of a sample lies."""
    names = map(latent_member, itertools.count())
    return map(record.part, itertools.takewhile(record.members.__contains__, names))


def _pieces(parts: Iterator[SampleRecord]) -> Iterator[list[SampleRecord]]:
    """Neighbours that are read together."""
    piece: list[SampleRecord] = []
    size = 0
    for part in parts:
        if piece and size + part.size > _READ:
            yield piece
            piece, size = [], 0
        piece.append(part)
        size += part.size
    if piece:
        yield piece
