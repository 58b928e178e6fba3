"""What a shard set is, from its index alone, and what conditions and sizes of clips would keep of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lvdm.config import ClipConfig, Condition
from lvdm.data.decode import decode_frames, footage, probe
from lvdm.data.fetch import Fetcher
from lvdm.data.images import frame_number
from lvdm.data.index import META, Index, open_index
from lvdm.data.select import select
from lvdm.data.transforms import read_caption
from lvdm.errors import BadSample, UserError
from lvdm.media import contact_sheet

_TEXTS_SHOWN = 5
_MEMBERS_SHOWN = 30
_SHEET_FRAMES = 6


@dataclass(frozen=True)
class Inspected:
    """What there is, in the order in which it is worth reading."""

    samples: int
    shards: int
    bytes: int
    left_out: dict[str, int]
    """Members and samples that the index left out, by reason."""
    damaged: dict[str, str]
    """What was wrong with shards that could not be read to their ends, by URL."""
    members: dict[str, dict[str, int]]
    """By extension, numbered frames as ``*.jpg``: how many, their bytes, and the median of these."""
    numbers: dict[str, dict[str, float]]
    """By field of numbers: how many samples have it, least, median, 95th percentile, largest, and the sum."""
    texts: dict[str, dict[str, int]]
    """By field of texts or booleans: the commonest values with their counts."""
    kept: dict[str, int] = field(default_factory=dict)
    """Samples by size of clip that the conditions keep."""
    removed: dict[str, int] = field(default_factory=dict)
    """Samples that each condition removes."""

    def as_json(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return asdict(self)


def inspect_shards(
    folders: Sequence[str], where: Sequence[Condition] = (), sizes: Sequence[ClipConfig] = ()
) -> Inspected:
    """Sum up indexed folders without reading a shard.

    Raises:
        UserError: a folder or its index is missing or stale, or a condition fits no field.
    """
    index = open_index(folders)
    types = index.types()
    numbers, texts = {}, {}
    for name in sorted(types):
        chunks = [batch.column(0) for batch in index.columns([f"{META}{name}"])]
        if all(pa.types.is_floating(kind) for kind in types[name]):
            numbers[name] = _numbers(chunks)
        else:
            texts[name] = _texts(chunks)
    selection = select(index, where, sizes)
    kept = {
        f"{size.frames} x {size.height} x {size.width}": len(rows)
        for size, rows in zip(sizes, selection.rows, strict=False)
    }
    left_out: dict[str, int] = {}
    for part in index.parts:
        for reason, count in part.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count
    return Inspected(
        samples=len(index),
        shards=len(index.shards),
        bytes=sum(shard.size for part in index.parts for shard in part.shards),
        left_out=left_out,
        damaged={f"{part.folder}/{name}": what for part in index.parts for name, what in part.damaged.items()},
        members=_members(index),
        numbers=numbers,
        texts=texts,
        kept=kept or ({"all": len(selection)} if where else {}),
        removed=selection.removed,
    )


def write_sheet(folders: Sequence[str], path: Path, rows: int, where: Sequence[Condition] = ()) -> list[str]:
    """Write a picture of ``rows`` samples, evenly chosen, with their captions; returns what could not be shown.

    Raises:
        UserError: as `inspect_shards`, or none of them can be shown.
    """
    if rows < 1:
        raise UserError(f"--rows {rows}: a sheet shows at least 1 sample")
    index = open_index(folders, check=False)
    chosen = select(index, where).rows[0]
    if not len(chosen):
        raise UserError(f"no samples are left to show of {', '.join(folders)}: --where removes all {len(index)}")
    places = np.unique(np.linspace(0, len(chosen) - 1, min(rows, len(chosen))).round().astype(int))
    records = [index[chosen[int(place)]] for place in places]
    clips, captions, faults = [], [], []
    for record, members in zip(records, Fetcher().samples(records), strict=True):
        try:
            data = footage(members)
            info = probe(data)
            shown = np.linspace(0, info.frames - 1, _SHEET_FRAMES).round().astype(int).tolist()
            height = min(info.height, 256)
            width = max(round(info.width * height / info.height), 1)
            clips.append(decode_frames(data, shown, height, width))
            captions.append(f"{record.key}: {read_caption(members) or '(no caption)'}")
        except BadSample as error:
            faults.append(f"{record.key} in {record.shard}: {error}")
    if not clips:
        raise UserError(f"none of {len(records)} samples can be shown; the first: {faults[0]}")
    contact_sheet(path, clips, captions)
    return faults


def _numbers(chunks: Sequence[pa.Array]) -> dict[str, float]:
    values = np.concatenate([chunk.drop_null().to_numpy() for chunk in chunks if not pa.types.is_null(chunk.type)])
    if not len(values):
        return {"samples": 0}
    least, median, most_of_them, largest = np.quantile(values, [0, 0.5, 0.95, 1]).tolist()
    return {
        "samples": len(values),
        "least": least,
        "median": median,
        "95 %": most_of_them,
        "largest": largest,
        "sum": float(values.sum()),
    }


def _texts(chunks: Sequence[pa.Array]) -> dict[str, int]:
    known = [chunk.drop_null().cast(pa.string()) for chunk in chunks if not pa.types.is_null(chunk.type)]
    found = pa.chunked_array(known, pa.string()).value_counts()
    counts = pa.table({"values": found.field("values"), "counts": found.field("counts")})
    order = [("counts", "descending"), ("values", "ascending")]
    common = counts.take(pc.select_k_unstable(counts, _TEXTS_SHOWN, order))
    shown = dict(zip(common["values"].to_pylist(), common["counts"].to_pylist(), strict=True))
    rest = sum(map(len, known)) - sum(shown.values())
    return shown | ({f"{len(counts) - len(shown)} others": rest} if rest else {})


def _members(index: Index) -> dict[str, dict[str, int]]:
    numbers: dict[str, int] = {}
    kinds, sizes = [np.zeros(0, np.int16)], [np.zeros(0, np.int64)]
    for part in index.parts:
        labels = [
            f"*.{name.rpartition('.')[2]}" if frame_number(name) is not None else name for name in part.extensions
        ]
        number_of = np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int16)
        for batch in part.batches:
            inner = batch.column("members").flatten()
            kinds.append(number_of[inner.field("extension").to_numpy()])
            sizes.append(inner.field("size").to_numpy())
    kind, size = np.concatenate(kinds), np.concatenate(sizes)
    counts = np.bincount(kind, minlength=len(numbers))
    size = size[np.argsort(kind, kind="stable")]
    by_name = dict(zip(numbers, np.split(size, np.cumsum(counts)[:-1]), strict=True)) if numbers else {}
    names = sorted(by_name, key=lambda name: (-len(by_name[name]), name))
    groups = {name: by_name[name] for name in sorted(names[:_MEMBERS_SHOWN])}
    if rest := names[_MEMBERS_SHOWN:]:
        groups[f"{len(rest)} others"] = np.concatenate([by_name[name] for name in rest])
    return {
        name: {"members": len(values), "bytes": int(values.sum()), "median": int(np.median(values))}
        for name, values in groups.items()
        if len(values)
    }
