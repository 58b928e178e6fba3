"""Choose rows of an index by what its fields say, and keep the answer where every process can map it."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lvdm.config import ClipConfig, Condition
from lvdm.data.index import META, Index
from lvdm.errors import UserError
from lvdm.storage import atomic_file, cache_folder, forget_unused, note_use, read_json, write_json

_COMPARE = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


_ABOUT_SIZE = ("width", "height", "frames", "fps")
_VERSION = 2  # of how rows are chosen: part of the name under which an answer is kept
_ANSWER = "answer.json"
"""What each condition removed, and of which sizes of clip all rows are."""


class MappedRows(Sequence[int]):
    """Numbers in a ``.npy`` file, mapped: a worker that is sent them maps the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.array: np.ndarray = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, place: Any) -> Any:
        return int(self.array[place])

    def __reduce__(self) -> tuple[type[MappedRows], tuple[Path]]:
        return MappedRows, (self.path,)


@dataclass(frozen=True)
class Selection:
    """Rows of an index that pass all conditions."""

    rows: tuple[Sequence[int], ...]
    """Row numbers by size of clip, in the order of the index."""
    joined: tuple[MappedRows, ...]
    """For each joined index, its row of the same sample by row of this one, -1 where it has none."""
    removed: dict[str, int]
    """By condition, the rows that it removed of those that the ones before it left."""

    def __len__(self) -> int:
        return sum(map(len, self.rows))


def select(
    index: Index, where: Sequence[Condition] = (), sizes: Sequence[ClipConfig] = (), join: Sequence[Index] = ()
) -> Selection:
    """The rows that pass all conditions and that every joined index has, by the size of clip that suits them best.

    Conditions see the fields of the index and of those joined. Videos that are known to be too short for every size
    are left out. Several ``sizes`` share the rows out: to the longest clip that a video has frames for, of those to the
    one nearest in shape.

    Raises:
        UserError: no index has a field of that name, or a value cannot be compared with it.
    """
    fields = _fields(where, sizes, [index, *join])
    if not fields and not join:
        return Selection((range(len(index)),), (), {})
    about = [
        _VERSION,
        [index.mark, *(side.mark for side in join)],
        [condition.model_dump(mode="json") for condition in where],
        [size.model_dump(mode="json") for size in sizes],
    ]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    folder = cache_folder("selections") / key
    paths = [folder / f"rows-{number}.npy" for number in range(max(len(sizes), 1))]
    joins = [folder / f"joined-{number}.npy" for number in range(len(join))]
    with _one_at_a_time(folder):  # a node's ranks all ask
        kept = _kept(folder, paths, joins)
        if kept is None:
            forget_unused(folder.parent)
            matches = [_join(index, side) for side in join]
            rows, removed = _select(index, where, sizes, join, matches, fields)
            kept = {"removed": removed, "all": [number for number, some in enumerate(rows) if len(some) == len(index)]}
            for path, array in zip([*paths, *joins], [*rows, *matches], strict=True):
                if path in paths and len(array) == len(index):
                    continue
                with atomic_file(str(path)) as target:
                    np.save(target, array)
            write_json(folder / _ANSWER, kept)  # last
        return Selection(
            tuple(
                range(len(index)) if number in kept["all"] else MappedRows(path) for number, path in enumerate(paths)
            ),
            tuple(MappedRows(path) for path in joins),
            kept["removed"],
        )


def _kept(folder: Path, rows: Sequence[Path], joins: Sequence[Path]) -> dict[str, Any] | None:
    """The answer that is kept in a folder, if none of its files was removed by whoever cleans there."""
    if not (folder / _ANSWER).is_file():
        return None
    kept = read_json(folder / _ANSWER)
    needed = [path for number, path in enumerate(rows) if number not in kept["all"]]
    return kept if all(path.is_file() for path in (*needed, *joins)) else None


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Other processes of this node wait at the same folder."""
    folder.mkdir(exist_ok=True)
    note_use(folder)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fields(where: Sequence[Condition], sizes: Sequence[ClipConfig], indexes: Sequence[Index]) -> dict[str, int]:
    """The fields that decide, each with the number of the index that has it. Raises `UserError` if none has."""
    fields = {condition.field: _owner(condition.field, indexes, where) for condition in where}
    types = [index.types() for index in indexes]
    about_size = {"frames"} if sizes else set()
    about_size |= {"fps"} if any(size.fps for size in sizes) else set()
    for field in about_size:
        owner = next((number for number, known in enumerate(types) if field in known), None)
        fields |= {} if owner is None else {field: owner}
    if len(sizes) > 1:  # a field that nobody has is unknown of all
        for field in ("width", "height", "frames"):
            fields.setdefault(field, next((number for number, known in enumerate(types) if field in known), 0))
    return dict(sorted(fields.items()))


def _select(
    index: Index,
    where: Sequence[Condition],
    sizes: Sequence[ClipConfig],
    join: Sequence[Index],
    matches: Sequence[np.ndarray],
    fields: dict[str, int],
) -> tuple[list[np.ndarray], dict[str, int]]:
    removed: dict[str, int] = {}
    kept: list[list[np.ndarray]] = [[] for _ in range(max(len(sizes), 1))]
    start = 0
    for columns in _columns(index, join, matches, fields):
        rows = len(next(iter(columns.values()))) if columns else 0
        alive = np.ones(rows, dtype=bool)

        def leave(passes: np.ndarray, reason: str, alive: np.ndarray = alive) -> None:
            removed[reason] = removed.get(reason, 0) + int((alive & ~passes).sum())
            alive &= passes

        for side, match in zip(join, matches, strict=True):
            leave(match[start : start + rows] >= 0, f"not in {', '.join(side.folders)}")
        for condition in where:
            leave(_passes(columns[condition.field], condition), str(condition))
        bucket = np.zeros(rows, dtype=np.int64)
        known = {name: _numbers(column) for name, column in columns.items() if name in _ABOUT_SIZE}
        enough = [_long_enough(size, rows, known) for size in sizes]
        if len(sizes) > 1:
            sides = known["width"] + known["height"]
            leave(~np.isnan(sides + known["frames"]), "width, height or frames unknown")
            bucket = _bucket_of(known["width"], known["height"], enough, sizes)
        if sizes:
            leave(np.any(enough, axis=0), "too short")
        for number, chosen in enumerate(kept):
            chosen.append(np.flatnonzero(alive & (bucket == number)) + start)
        start += rows
    dtype = np.uint32 if start < 2**32 else np.uint64
    return [np.concatenate([np.zeros(0, np.int64), *chosen]).astype(dtype) for chosen in kept], removed


def _columns(
    index: Index, join: Sequence[Index], matches: Sequence[np.ndarray], fields: dict[str, int]
) -> Iterator[dict[str, pa.Array]]:
    """The wanted fields of each batch of rows; a joined index's are looked up row by row."""
    theirs = {
        field: pa.chunked_array([batch.column(0) for batch in join[owner - 1].columns([f"{META}{field}"])])
        for field, owner in fields.items()
        if owner
    }
    own = [f"{META}{field}" for field, owner in fields.items() if not owner]
    start = 0
    for batch in index.columns(["shard", *own]):
        found = {name.removeprefix(META): batch.column(name) for name in batch.schema.names}
        for field, owner in fields.items():
            if owner:
                rows = matches[owner - 1][start : start + batch.num_rows]
                taken = theirs[field].take(pa.array(rows, mask=rows < 0))
                found[field] = taken.combine_chunks()
        start += batch.num_rows
        yield found


def _owner(field: str, indexes: Sequence[Index], where: Sequence[Condition]) -> int:
    """Which of the indexes has a field, the first of them first. Raises `UserError` if none has, or not as compared."""
    types = [index.types() for index in indexes]
    owner = next((number for number, known in enumerate(types) if field in known), None)
    if owner is None:
        known = sorted(set().union(*types))
        near = difflib.get_close_matches(field, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"the index of {', '.join(indexes[0].folders)} has no field {field}{hint}; it has "
            f"{', '.join(known) or 'none'}"
        )
    for condition in where:
        if condition.field != field:
            continue
        values = condition.value if isinstance(condition.value, tuple) else (condition.value,)
        for kind, value in ((kind, value) for kind in types[owner][field] for value in values):
            if isinstance(value, str) != pa.types.is_string(kind) or isinstance(value, bool) != pa.types.is_boolean(
                kind
            ):
                is_a = "text" if pa.types.is_string(kind) else "boolean" if pa.types.is_boolean(kind) else "number"
                raise UserError(f"condition {condition}: {field} is a {is_a}, which {value!r} is not")
    return owner


def _passes(column: pa.Array, condition: Condition) -> np.ndarray:
    if pa.types.is_null(column.type):
        return np.full(len(column), condition.comparison == "!=")
    if condition.comparison == "in":
        passes = pc.is_in(column, pa.array(condition.value, column.type))
    else:
        passes = _COMPARE[condition.comparison](column, pa.scalar(condition.value, column.type))
        passes = pc.fill_null(passes, condition.comparison == "!=")
    answer: np.ndarray = passes.to_numpy(zero_copy_only=False).astype(bool)
    return answer


def _numbers(column: pa.Array) -> np.ndarray:
    if not pa.types.is_floating(column.type):
        return np.full(len(column), np.nan)
    numbers: np.ndarray = column.to_numpy(zero_copy_only=False)
    return numbers


def _long_enough(size: ClipConfig, rows: int, known: dict[str, np.ndarray]) -> np.ndarray:
    """Which videos may have the frames that a clip takes; only decoding tells of those whose length is unknown."""
    unknown = np.full(rows, np.nan)
    frames = known.get("frames", unknown)
    step: np.ndarray = np.full(rows, float(size.stride))
    if size.fps:
        fps = known.get("fps", unknown)
        step = np.where(np.isnan(fps), 1.0, fps / size.fps)
    # the instants of a clip may be half a frame off
    needed = np.maximum(np.round((size.frames - 1) * step), size.min_frames - 1) + 1
    enough: np.ndarray = ~(frames < needed)
    return enough


def _bucket_of(
    width: np.ndarray, height: np.ndarray, enough: Sequence[np.ndarray], sizes: Sequence[ClipConfig]
) -> np.ndarray:
    """The size of clip that suits each video best, of those that it is long enough for."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shape = np.log(width / height)
    far = np.stack([np.abs(shape - np.log(size.width / size.height)) for size in sizes])
    # a frame more outweighs any shape
    cost = far - 1e6 * np.array([[size.frames] for size in sizes])
    best: np.ndarray = np.where(enough, cost, np.inf).argmin(0)
    return best


def _join(index: Index, side: Index) -> np.ndarray:
    """The row of ``side`` with the same name of shard and the same key, by row of ``index``; -1 where it has none."""
    theirs: dict[str, tuple[int, Callable[[], pa.Array]]] = {}
    for name, first, keys in side.shard_keys():
        theirs.setdefault(name, (first, keys))
    matches = np.full(len(index), -1, dtype=np.int64)
    for name, first, keys in index.shard_keys():
        if name not in theirs:
            continue
        own = keys()
        start, their_keys = theirs[name]
        found = pc.index_in(own, value_set=their_keys())
        rows = pc.fill_null(pc.add(pc.cast(found, pa.int64()), start), -1)
        matches[first : first + len(own)] = rows.to_numpy(zero_copy_only=False)
    return matches
