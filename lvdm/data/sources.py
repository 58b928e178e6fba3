"""The sets a run reads from, and the order over them that goes on when they change.

    data.*.shards -> indexes -> selections by size of clip -> Order

What a resumed run needs of it is `Course.state`: how the samples are mixed and since when. Where that differs from what
the config says now, a new era of the order begins at the step, and the notes say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lvdm.config import ClipConfig, DataConfig, ShardSet, shard_sets
from lvdm.data.index import Index, SampleRecord, open_index
from lvdm.data.latent_sets import EncodedSet
from lvdm.data.order import Era, Order
from lvdm.data.select import Selection, select
from lvdm.errors import UserError
from lvdm.randomness import seed_from_text


@dataclass(frozen=True)
class Source:
    """One set of shards, its samples grouped by size of clip."""

    index: Index
    joined: tuple[Index, ...]
    selection: Selection

    def records(self, bucket: int, place: int) -> list[SampleRecord]:
        """Where the sample lies: in its shard, and in those that are joined."""
        return self.at(self.selection.rows[bucket][place])

    def at(self, row: int) -> list[SampleRecord]:
        """Where the sample of a row of the index lies, as `records`."""
        theirs = [side[rows[row]] for side, rows in zip(self.joined, self.selection.joined, strict=True)]
        return [self.index[row], *theirs]


@dataclass(frozen=True)
class Course:
    """The sources of a run, in their order."""

    sources: list[Source]
    order: Order
    state: dict[str, Any]
    """What a later start needs to go on; JSON."""
    contents: list[str]
    """What each set gives."""
    notes: list[str]
    """What is left out of the sets, and what changed since the run began."""


def open_sources(
    shards: Sequence[str | ShardSet],
    sizes: Sequence[ClipConfig],
    check: bool = True,
    encoded: Sequence[EncodedSet] = (),
) -> list[Source]:
    """The sets that a ``shards`` setting names.

    Args:
        sizes: sizes of clips that share the samples out.
        check: whether the shards are held against their indexes.
        encoded: of latents, what each set holds: its samples have one of the sizes already.
    Raises:
        UserError: a folder, index or shard is missing or stale, or nothing is left of a set.
    """
    sources = []
    for number, one in enumerate(shard_sets(shards)):
        index = open_index(one.folders, check)
        joined = tuple(open_index([folder], check) for folder in one.join)
        if encoded:
            selection = _select_encoded(index, one, sizes, joined, encoded[number])
        else:
            selection = select(index, one.where, sizes, joined)
        if not len(selection):
            reasons = "; ".join(f"{count} by {reason}" for reason, count in selection.removed.items())
            raise UserError(f"no samples are left of the {len(index)} in {', '.join(one.folders)}: {reasons}")
        sources.append(Source(index, joined, selection))
    return sources


def _select_encoded(
    index: Index, one: ShardSet, sizes: Sequence[ClipConfig], joined: Sequence[Index], encoded: EncodedSet
) -> Selection:
    """The rows that were encoded as each size."""
    if len(sizes) == len(encoded.shapes) == 1:
        return select(index, one.where, (), joined)
    found = [select(index, (*one.where, *encoded.where(size)), (), joined) for size in sizes]
    about_size = {str(condition) for size in sizes for condition in encoded.where(size)}
    removed = {reason: count for reason, count in found[0].removed.items() if reason not in about_size}
    rows = tuple(selection.rows[0] for selection in found)
    others = len(index) - sum(removed.values()) - sum(map(len, rows))
    return Selection(rows, found[0].joined, removed | ({"encoded as clips of another size": others} if others else {}))


def open_course(
    data: DataConfig,
    sizes: Sequence[ClipConfig],
    *,
    seed: int,
    batch: int,
    step: int = 0,
    state: Mapping[str, Any] | None = None,
    check: bool = True,
    encoded: Sequence[EncodedSet] = (),
) -> Course:
    """The sources of a data config in the order that step ``step`` of the run goes on in.

    Args:
        sizes: sizes of clips, one a bucket.
        batch: samples of a step, where a bucket does not say.
        state: `Course.state` of the run so far.
        check, encoded: as `open_sources` takes them.
    Raises:
        UserError: as `open_sources`, or no source has a weight above 0.
    """
    setting = data.latents if data.kind == "latents" else data.video
    assert setting is not None
    sets = shard_sets(setting.shards)
    sources = open_sources(setting.shards, sizes, check, encoded)
    buckets = data.video.clip.buckets if data.video is not None else ()
    weights = [one.weight for one in sets]
    mixing: dict[str, Any] = {
        "sets": _identified(sets, sources),
        "batches": [bucket.size for bucket in buckets] or [batch],
        "weights": None if None in weights else weights,
        "shuffle": data.shuffle,
        "contiguous": data.contiguous,
    }
    notes = [
        f"{known['name']}: {count} samples left out: {reason}"
        for known, source in zip(mixing["sets"], sources, strict=True)
        for reason, count in source.selection.removed.items()
        if count
    ]
    era = Era()
    if state:
        before = {name: state[name] for name in mixing}
        era = _era(state["era"])
        if _content(before) != _content(mixing):
            era, changes = _next_era(before, mixing, era, seed, step)
            notes += changes
    order = _order(mixing, seed, era)
    return Course(sources, order, {**mixing, "era": asdict(era)}, _contents(mixing, sizes), notes)


def _contents(mixing: Mapping[str, Any], sizes: Sequence[ClipConfig]) -> list[str]:
    lines = []
    for number, known in enumerate(mixing["sets"]):
        line = f"reading {known['name']}: {sum(known['sizes'])} samples"
        if len(known["sizes"]) > 1:
            shares = zip(known["sizes"], sizes, mixing["batches"], strict=True)
            line += "".join(f", {n} as {c.frames}x{c.height}x{c.width} in steps of {b}" for n, c, b in shares)
        lines.append(line + (f", weight {mixing['weights'][number]:g}" if mixing["weights"] else ""))
    return lines


def _identified(sets: Sequence[ShardSet], sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What is remembered of each set: its name, its samples by bucket, and a number that is the same for as long as its
    samples are, wherever they lie."""
    found: list[dict[str, Any]] = []
    for one, source in zip(sets, sources, strict=True):
        shards = [
            [part.rows, part.left_out, [(shard.name, shard.size) for shard in part.shards]]
            for index in (source.index, *source.joined)
            for part in index.parts
        ]
        rows = [len(chosen) for chosen in source.selection.rows]
        samples = seed_from_text(
            json.dumps([shards, [str(condition) for condition in one.where], rows], sort_keys=True)
        )
        while any(samples == other["samples"] for other in found):  # the same set twice
            samples = seed_from_text(str(samples))
        found.append({"name": ", ".join(one.folders), "sizes": rows, "samples": samples})
    return found


def _content(mixing: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the order; where the sets lie does not."""
    return {**mixing, "sets": [(known["sizes"], known["samples"]) for known in mixing["sets"]]}


def _order(mixing: Mapping[str, Any], seed: int, era: Era) -> Order:
    return Order(
        [known["sizes"] for known in mixing["sets"]],
        mixing["batches"],
        seed=seed,
        weights=mixing["weights"],
        shuffle=mixing["shuffle"],
        contiguous=mixing["contiguous"],
        keys=[known["samples"] for known in mixing["sets"]],
        era=era,
    )


def _era(tree: Mapping[str, Any]) -> Era:
    return Era(tree["step"], tree["position"], tuple(tuple(row) for row in tree["taken"]))


@dataclass(frozen=True)
class _Stream:
    """Samples that are gone through together: a weighted set, or all sets without weights."""

    name: str
    sizes: tuple[int, ...]
    """Samples by bucket."""
    order: tuple[Any, ...]
    """The same for as long as the order of its samples is."""


def _streams(mixing: Mapping[str, Any]) -> list[_Stream]:
    sets, how = mixing["sets"], (mixing["shuffle"], mixing["contiguous"])
    groups = [sets] if mixing["weights"] is None else [[known] for known in sets]
    weighted = mixing["weights"] is not None
    return [
        _Stream(
            ", ".join(known["name"] for known in group),
            tuple(sum(column) for column in zip(*(known["sizes"] for known in group), strict=True)),
            (weighted, *how, *(known["samples"] for known in group)),
        )
        for group in groups
    ]


def _next_era(
    before: Mapping[str, Any], after: Mapping[str, Any], era: Era, seed: int, step: int
) -> tuple[Era, list[str]]:
    """The era that begins at ``step``, and what to say of it.

    A stream of the same samples in the same order goes on behind what it gave; one that changed begins another epoch,
    so that from there on each of its samples comes once an epoch again.
    """
    old = _order(before, seed, era)
    ended = old.next_era(step)
    known = list(zip(_streams(before), ended.taken, strict=True))
    taken, said = [], []
    for stream in _streams(after):
        same = next((given for other, given in known if other.order == stream.order), None)
        changed = next((pair for pair in known if pair[0].name == stream.name), None)
        if same is not None:
            taken.append(same)
            said.append(f"{stream.name} goes on behind what it gave")
        elif changed is not None:
            epochs = [-(-given // max(size, 1)) for given, size in zip(changed[1], changed[0].sizes, strict=True)]
            taken.append(tuple(number * size for number, size in zip(epochs, stream.sizes, strict=True)))
            unseen = sum(e * size - g for e, size, g in zip(epochs, changed[0].sizes, changed[1], strict=True))
            said.append(f"{stream.name} changed and begins another epoch, {unseen} samples of the last one unseen")
        else:
            taken.append((0,) * len(stream.sizes))
            said.append(f"{stream.name} begins")
    if passed := old.steps_left(step):
        said.append(f"the {passed} steps left of the epoch of all buckets are passed over")
    what = ", ".join(name for name in after if before[name] != after[name])
    note = f"the mixing of the data changed ({what}) and is new from step {step} on: {'; '.join(said)}"
    return Era(step, ended.position, tuple(taken)), [note]
