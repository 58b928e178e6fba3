"""Captions and other fields for samples that are in shards already, as shards to be joined to them.

A sidecar has shards of the same names, with samples of the same keys in the same order, that hold only a ``.json`` with
the columns of a list and, if one of them is a caption, a ``.txt``. ``join`` of a set in ``data.*.shards`` puts the two
together; neither the videos nor their latents are touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lvdm.data.build_index import build_index
from lvdm.data.index import Index, open_index
from lvdm.data.writer import ShardSample, write_shard
from lvdm.errors import UserError
from lvdm.jobs.lists import CAPTION_COLUMNS, pick_column, read_rows
from lvdm.jobs.make_shards import refuse_used
from lvdm.jobs.progress import Report, silent

_NAMED = 10
_OF_THE_SHARD = {"key", "shard", "status", "error_message"}  # what a sample's own shard says of it
_Place = tuple[str, str]  # name of a shard, empty if the list does not say it, and key


@dataclass(frozen=True)
class Sidecar:
    """What was made."""

    folder: str
    shards: int
    samples: int
    """All that were written, with a row or without."""
    listed: int
    """Those with a row."""
    texts: int
    """Those with a caption."""
    bare: int
    """Samples of the source without a row,"""
    first_bare: tuple[str, ...]
    """and the first of them, as shard and key."""
    strangers: int
    """Rows that match no sample,"""
    first_strangers: tuple[str, ...]
    """and the first of them."""


@dataclass(frozen=True)
class CaptionList:
    """The rows of a list by the sample that they are about."""

    path: str
    rows: dict[_Place, dict[str, Any]]
    caption: str
    """The column that becomes ``.txt``; empty for none."""
    by_shard: bool
    """Whether the list says in which shard a sample lies."""

    def place(self, shard: str, key: str) -> _Place:
        """Under what the row of a sample is found."""
        return (shard if self.by_shard else "", key)


def read_captions(path: str, caption_column: str = "") -> CaptionList:
    """Read a list with a column ``key``, perhaps ``shard``, and any others.

    Args:
        caption_column: column of the caption; empty for the first of caption, text, if there is one.
    Raises:
        UserError: the file cannot be read, lacks a column, or a row is faulty or there twice.
    """
    table = read_rows(path, texts=("key", "shard", caption_column, *CAPTION_COLUMNS))
    pick_column(path, table, "key", ())
    caption = pick_column(path, table, caption_column, CAPTION_COLUMNS, needed=bool(caption_column))
    by_shard = any("shard" in row for row in table)
    rows: dict[_Place, dict[str, Any]] = {}
    for number, row in enumerate(table, start=1):
        for name in ("key", "shard") if by_shard else ("key",):
            if row.get(name) in (None, ""):
                raise UserError(f"{path}: row {number}: {name} is empty")
        place = (_shard_name(row["shard"]) if by_shard else "", str(row["key"]))
        if place in rows:
            raise UserError(f"{path}: row {number}: {_called(place)} has a row already; give each sample one")
        if isinstance(row.get(caption), list):
            raise UserError(
                f"{path}: row {number}: {caption} is a list, and a .txt holds one caption; call the column otherwise "
                f"and name it in data.video.captions"
            )
        rows[place] = row
    return CaptionList(path, rows, caption, by_shard)


def make_caption_shards(
    folder: str, captions: CaptionList, shards: str, *, only_listed: bool = False, progress: Report = silent
) -> Sidecar:
    """Write the sidecar of the indexed folder ``shards`` into ``folder`` (both any fsspec URL).

    An empty cell is no field, and an empty caption no ``.txt``: there the sample keeps what it has.

    Args:
        only_listed: leave samples without a row out, as then a join does too; else they are there, without fields.
        progress: told of samples.
    Raises:
        UserError: ``folder`` already holds shards, no row matches a sample, or a row matches samples of several shards.
    """
    refuse_used(folder)
    index = open_index([shards])
    matched = _matched(index, captions)
    strangers = [place for place in captions.rows if place not in matched]
    if not matched:
        raise UserError(f"no row of {captions.path} is about a sample of {shards}, not even {_called(strangers[0])}")
    made = written = texts = seen = 0
    first_bare: list[_Place] = []
    for name, _, column in index.shard_keys():
        about = [(key, captions.rows.get(captions.place(name, key))) for key in column().to_pylist()]
        bare = [(name, key) for key, row in about if row is None]
        first_bare = (first_bare + bare)[:_NAMED]
        samples = [
            _sample(key, row or {}, captions.caption) for key, row in about if row is not None or not only_listed
        ]
        if samples:
            write_shard(folder, name.removesuffix(".tar"), samples)
        made += bool(samples)
        written += len(samples)
        texts += sum("txt" in sample.members for sample in samples)
        seen += len(about)
        progress(seen, len(index))
    indexed = build_index(folder).samples
    assert indexed == written, f"{indexed} samples indexed of {written} written"
    return Sidecar(
        folder=folder,
        shards=made,
        samples=written,
        listed=len(matched),
        texts=texts,
        bare=len(index) - len(matched),
        first_bare=tuple(map(_called, first_bare)),
        strangers=len(strangers),
        first_strangers=tuple(map(_called, strangers[:_NAMED])),
    )


def _matched(index: Index, captions: CaptionList) -> set[_Place]:
    """The rows that are about a sample. Raises `UserError` if one is about samples of several shards."""
    matched: dict[_Place, str] = {}
    for name, _, column in index.shard_keys():
        for key in column().to_pylist():
            place = captions.place(name, key)
            if place in matched:
                raise UserError(
                    f"{captions.path}: {_called(place)} is in {matched[place]} and in {name}; add a column shard that "
                    f"says which is meant"
                )
            if place in captions.rows:
                matched[place] = name
    return set(matched)


def _sample(key: str, row: Mapping[str, Any], caption: str) -> ShardSample:
    """The members that a row gives a sample."""
    fields = {name: value for name, value in row.items() if name not in _OF_THE_SHARD and value not in (None, "")}
    members = {"json": json.dumps(fields, indent=4, default=str).encode()}
    text = str(row.get(caption) or "").strip()
    if text:
        members["txt"] = text.encode("utf-8", "replace")
    return ShardSample(key, members, fields)


def _shard_name(given: Any) -> str:
    """The file name of a shard given as a number, a name with or without ``.tar``, or a URL."""
    name = f"{given:05d}" if isinstance(given, int) else str(given).rsplit("/", 1)[-1]
    return f"{name.removesuffix('.tar')}.tar"


def _called(place: _Place) -> str:
    return " ".join(filter(None, place))
