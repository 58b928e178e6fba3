"""The sets a run reads from, and the order over them that goes on when they change.

    data.*.shards -> indexes -> selections by size of clip -> Order

What a resumed run needs of it is `Course.state`: how the samples are mixed and since when. Where that differs from what
the config says now, a new era of the order begins at the step, and the notes say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lvdm.config import ClipConfig, DataConfig, ShardSet, shard_sets
from lvdm.data.index import Index, SampleRecord, open_index
from lvdm.data.order import Era, Order
from lvdm.data.select import Selection, select
from lvdm.errors import UserError


@dataclass(frozen=True)
class Source:
    """One set of shards, its samples grouped by size of clip."""

    index: Index
    joined: tuple[Index, ...]
    selection: Selection

    def records(self, bucket: int, place: int) -> list[SampleRecord]:
        """Where the sample lies: in its shard, and in those that are joined."""
        row = self.selection.rows[bucket][place]
        theirs = [side[rows[row]] for side, rows in zip(self.joined, self.selection.joined, strict=True)]
        return [self.index[row], *theirs]


@dataclass(frozen=True)
class Course:
    """The sources of a run, in their order."""

    sources: list[Source]
    order: Order
    state: dict[str, Any]
    """What a later start needs to go on; JSON."""
    notes: list[str]
    """What there is to say of it."""


def open_sources(shards: Sequence[str | ShardSet], sizes: Sequence[ClipConfig], check: bool = True) -> list[Source]:
    """The sets that a ``shards`` setting names.

    Args:
        sizes: sizes of clips that share the samples out.
        check: whether the shards are held against their indexes.
    Raises:
        UserError: a folder, index or shard is missing or stale, or nothing is left of a set.
    """
    sources = []
    for one in shard_sets(shards):
        index = open_index(one.folders, check)
        joined = tuple(open_index([folder], check) for folder in one.join)
        selection = select(index, one.where, sizes, joined)
        if not len(selection):
            reasons = "; ".join(f"{count} by {reason}" for reason, count in selection.removed.items())
            raise UserError(f"no samples are left of the {len(index)} in {', '.join(one.folders)}: {reasons}")
        sources.append(Source(index, joined, selection))
    return sources


def open_course(
    data: DataConfig,
    sizes: Sequence[ClipConfig],
    *,
    seed: int,
    batch: int,
    step: int = 0,
    state: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Course:
    """The sources of a data config in the order that step ``step`` of the run goes on in.

    Args:
        sizes: sizes of clips, one a bucket.
        batch: samples of a step, where a bucket does not say.
        state: `Course.state` of the run so far.
    Raises:
        UserError: as `open_sources`, or no source has a weight above 0.
    """
    setting = data.latents if data.kind == "latents" else data.video
    assert setting is not None
    sets = shard_sets(setting.shards)
    sources = open_sources(setting.shards, sizes, check)
    buckets = data.video.clip.buckets if data.kind == "video" and data.video is not None else ()
    weights = [one.weight for one in sets]
    mixing: dict[str, Any] = {
        "names": [_name(one) for one in sets],
        "sizes": [[len(rows) for rows in source.selection.rows] for source in sources],
        "batches": [bucket.size for bucket in buckets] or [batch],
        "weights": None if None in weights else weights,
        "shuffle": data.shuffle,
        "contiguous": data.contiguous,
    }
    notes = [
        f"{name}: {count} samples left out: {reason}"
        for name, source in zip(mixing["names"], sources, strict=True)
        for reason, count in source.selection.removed.items()
        if count
    ]
    era = Era()
    if state:
        before = {name: state[name] for name in mixing}
        era = _era(state["era"])
        if before != mixing:
            era, passed_over = _next_era(before, mixing, era, seed, step)
            changed = [name for name in mixing if before[name] != mixing[name]]
            notes.append(
                f"the mixing of the data changed ({', '.join(changed)}): from step {step} on it is new, each set that "
                f"stayed goes on behind what it gave; {passed_over} samples of this epoch are passed over"
            )
    order = _order(mixing, seed, era)
    return Course(sources, order, {**mixing, "era": asdict(era)}, notes)


def _name(one: ShardSet) -> str:
    return ", ".join(one.folders)


def _order(mixing: Mapping[str, Any], seed: int, era: Era) -> Order:
    return Order(
        mixing["sizes"],
        mixing["batches"],
        seed=seed,
        weights=mixing["weights"],
        shuffle=mixing["shuffle"],
        contiguous=mixing["contiguous"],
        era=era,
    )


def _era(tree: Mapping[str, Any]) -> Era:
    return Era(tree["step"], tree["position"], tuple(tuple(row) for row in tree["taken"]))


def _next_era(before: Mapping[str, Any], after: Mapping[str, Any], era: Era, seed: int, step: int) -> tuple[Era, int]:
    """The era that begins at ``step``, and how many samples of the old one it passes over.

    What was taken is carried over by the names of the sets where the buckets are as many as before; new sets start
    from their beginning.
    """
    old = _order(before, seed, era)
    ended = old.next_era(step)
    mixed = [mixing["weights"] is not None for mixing in (before, after)]
    buckets = len(after["batches"])
    nothing = (0,) * buckets
    if len(before["batches"]) != buckets or mixed[0] != mixed[1]:
        taken: tuple[tuple[int, ...], ...] = ()
    elif mixed[0]:
        by_name = dict(zip(before["names"], ended.taken, strict=True))
        taken = tuple(by_name.get(name, nothing) for name in after["names"])
    else:
        taken = ended.taken
    return Era(step, ended.position, taken), old.unseen(step)
