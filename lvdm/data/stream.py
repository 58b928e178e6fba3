"""The streaming source: webdataset's pipeline over shards that have no index.

    shards, shuffled -> share of this worker of this rank -> open by fsspec -> untar -> group by key
           -> shuffle buffer (of bytes) -> decode -> micro-batch, and from the start again

The stream never ends, so every rank makes the steps it is asked for, whatever its shards hold. What it cannot do is go
on where it stopped: a resumed run starts on freshly shuffled shards, and says so.
"""

from __future__ import annotations

import itertools
import logging
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from lvdm.config import ClipConfig
from lvdm.data.batch import LatentBatch, Replacement, VideoBatch
from lvdm.data.samples import Failure, VideoSample, collate, load_clip
from lvdm.errors import BadSample, Requeue, UserError
from lvdm.storage import locate

log = logging.getLogger(__name__)

SHUFFLE_BUFFER = 256
"""Samples, still encoded, among which the next one is drawn."""
_GIVE_UP = 1000  # bad samples in a row


class StreamDataset(IterableDataset[VideoBatch | LatentBatch | Failure]):
    """The micro-batches of one rank: one for each list of positions, shared out to the workers in turn."""

    def __init__(
        self,
        folders: Sequence[str],
        clip: ClipConfig,
        positions: Sequence[Sequence[int]],
        *,
        seed: int,
        world: int,
        rank: int,
        shuffle: bool,
        text_dropout: float,
    ) -> None:
        self.urls = list_shards(folders)
        self.clip, self.positions, self.seed, self.shuffle = clip, positions, seed, shuffle
        self.world, self.rank, self.text_dropout = world, rank, text_dropout
        if rank == 0:
            log.warning(
                "streaming %d shards without an index: resume is not exact, it starts on freshly shuffled shards",
                len(self.urls),
            )

    def __iter__(self) -> Iterator[VideoBatch | LatentBatch | Failure]:
        try:
            yield from self._batches()
        except (UserError, Requeue) as error:
            yield Failure(error)

    def _batches(self) -> Iterator[VideoBatch | LatentBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        members = self._endless(self.rank * workers + worker, self.world * workers)
        for positions in itertools.islice(self.positions, worker, None, workers):
            yield collate([self._next_clip(members, position) for position in positions])

    def _next_clip(self, members: Iterator[dict[str, Any]], position: int) -> VideoSample:
        replaced: list[Replacement] = []
        for sample in itertools.islice(members, _GIVE_UP):
            try:
                return load_clip(
                    sample,
                    self.clip,
                    position,
                    seed=self.seed,
                    text_dropout=self.text_dropout,
                    replaced=tuple(replaced),
                )
            except BadSample as error:
                replaced.append(Replacement(position, sample["__url__"], sample["__key__"], str(error)))
        last = replaced[-1]
        raise UserError(
            f"{len(replaced)} samples in a row are bad; the last is {last.key} in {last.shard}: {last.reason}"
        )

    def _endless(self, slot: int, slots: int) -> Iterator[dict[str, Any]]:
        """Samples of the shards that fall to ``slot`` of ``slots``, pass after pass."""
        # the first position makes a resumed run differ from the one it continues
        start = self.positions[0][0] if self.positions else 0
        for turn in itertools.count():
            own = len(self.urls) < slots  # too few to share out: everyone reads all, each in an order of its own
            rng = random.Random(f"{self.seed}/{start}/{turn}/{slot if own else ''}")
            urls = rng.sample(self.urls, len(self.urls)) if self.shuffle or own else self.urls
            stages: list[Any] = [
                wds.SimpleShardList(urls if own else urls[slot::slots]),
                _open_shards,
                lambda data: tar_file_expander(data, handler=_on_tar_error),
                lambda data: group_by_keys(data, handler=_on_tar_error),
            ]
            if self.shuffle:
                stages.append(wds.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng))
            count = 0
            for sample in wds.DataPipeline(*stages):
                count += 1
                yield sample
            if not count:
                raise UserError(f"no samples in {', '.join(urls[:3])}{' ...' if len(urls) > 3 else ''}")


def list_shards(folders: Sequence[str]) -> list[str]:
    """URLs of the shards in ``folders``; an entry that ends in ``.tar`` is a shard itself, ``{000..999}`` is expanded.

    Raises:
        UserError: a folder is missing or holds no shard.
    """
    urls: list[str] = []
    for folder in folders:
        if folder.endswith(".tar"):
            urls += expand_urls(folder)
            continue
        fs, root = locate(folder)
        if not fs.isdir(root):
            raise UserError(f"no such folder of shards: {folder}")
        names = sorted(path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False) if path.endswith(".tar"))
        if not names:
            raise UserError(f"{folder} holds no shards (*.tar)")
        urls += [f"{folder.rstrip('/')}/{name}" for name in names]
    return urls


def _open_shards(data: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Open each shard by fsspec: webdataset's own opener would run shell commands for some URLs."""
    for shard in data:
        try:
            fs, path = locate(shard["url"])
            with fs.open(path, "rb") as stream:
                yield {**shard, "stream": stream}
        except FileNotFoundError:
            raise UserError(f"shard {shard['url']} is missing") from None


def _on_tar_error(error: Exception) -> bool:
    """Skip what is damaged; anything else is the store's fault and ends the run, to be started again."""
    if not isinstance(error, tarfile.TarError | ValueError | EOFError):
        raise Requeue(f"reading a shard failed: {type(error).__name__}: {error}") from error
    log.warning("skipping the damaged rest of a shard: %s", error)
    return True
