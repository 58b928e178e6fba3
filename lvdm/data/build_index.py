"""Build the index of a folder of shards: in parallel, resumable, from local disk or any store.

Groups of shards are scanned by worker processes; what a group gave is kept in ``.index/`` in the folder under a name
that changes with its shards, so that a build that was stopped, or runs again after a few shards were added, scans only
what is new. Who writes shards by the thousand puts what is in each there, so that none is read again. At the end all is
merged into ``index.arrow``, a few files at a time.

A damaged shard gives the samples that stand before the damage, and is named in the log and in the index.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from lvdm.data.decode import VIDEO_EXTENSIONS
from lvdm.data.images import IMAGE_EXTENSIONS
from lvdm.data.index import COLUMNS, INDEX_NAME, MEMBER, META, VERSION, ShardFile, ends_of, list_shards
from lvdm.data.tar_scan import DamagedShard, Scanned, scan_tar
from lvdm.errors import UserError
from lvdm.storage import Missing, atomic_file, locate, persistently, read_file

log = logging.getLogger(__name__)

PARTS = ".index"
"""Folder of what a build has so far; it stays where a later one can use it."""
_GROUP = 16  # shards of a group on average
_LARGEST_GROUP = 64
_MOST_EXTENSIONS = 2**15 - 1
_ROWS_PER_BATCH = 65536
_SAMPLED = 32  # members whose sizes decide how a remote shard is read
_STREAM_BLOCK = 8 << 20
_HEADER_BLOCK = 16 << 10
_SKIPPING_PAYS = 4 << 20  # bytes that are streamed in the time that one more request takes
_MOST_COLUMNS = 64
_LONGEST_TEXT = 64  # characters of a metadata value that is worth a column
_NEEDED_COLUMNS = {
    f"{META}{name}" for name in ("frames", "width", "height", "fps", "clip_frames", "clip_height", "clip_width")
}
_NO_COLUMN = {"key", "caption", "url", "status", "error_message"}
_VIDEO_COLUMNS = {
    "nb_frames": "frames",
    "duration": "duration",
    "r_frame_rate": "fps",
}
_EXCLUDED = "excluded"
_SCAN = 2  # of what a scan gives: part of the names of groups, so that those of another one are not used
_OURS = (TypeError, ValueError, LookupError, AssertionError, AttributeError)  # what comes of faults of ours
_READS = 16  # of groups' files, side by side
_NAMED = 100  # damaged shards that the log names


@dataclass(frozen=True)
class Built:
    """What a build made."""

    samples: int
    shards: int
    left_out: dict[str, int]
    """Members and samples that are no samples of the set, by reason."""
    damaged: dict[str, str]
    """What is wrong with shards that could not be read to their ends, by name."""
    unmatched: int = 0
    """Entries of ``exclude`` that are no sample of the set."""


def build_index(
    folder: str,
    *,
    workers: int = 1,
    exclude: Mapping[str, frozenset[str]] = MappingProxyType({}),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Index all ``*.tar`` of a folder (any fsspec URL). Only headers and ``.json`` members are read.

    Samples that their ``.json`` records as failed are left out, and those of ``exclude``: keys by URL of the shard.
    Damaged shards are named in the log and in the result, which counts too what of ``exclude`` is not there.

    Raises:
        UserError: no shard in the folder, none that gives a sample and is whole, or a folder that cannot be written.
        Requeue: the store does not answer; the same call goes on where this one stopped.
    """
    folder = folder.rstrip("/")
    shards = list_shards(folder)
    if not shards:
        raise UserError(f"{folder} holds no shards (*.tar)")
    here = locate(folder)[1]
    excluded: dict[str, frozenset[str]] = {}
    for url, keys in exclude.items():
        name = locate(url)[1].removeprefix(f"{here}/")
        excluded[name] = excluded.get(name, frozenset()) | keys
    there = _there(f"{folder}/{PARTS}")
    told = {shard.name for shard in shards if _part_of(shard) in there and shard.name not in excluded}
    groups = list(_groups(shards, told))
    names = [_part_of(group[0]) if group[0].name in told else f"{_name(group, excluded)}.arrow" for group in groups]
    paths = [f"{folder}/{PARTS}/{name}" for name in names]
    fs, root = locate(f"{folder}/{PARTS}")
    missing = [i for i, name in enumerate(names) if name not in there]
    done = len(shards) - sum(len(groups[i]) for i in missing)
    progress(done, len(shards))
    for i in _each(folder, missing, groups, paths, excluded, workers):
        done += len(groups[i])
        progress(done, len(shards))
    built = _merge(folder, groups, paths)
    named = sum(map(len, excluded.values()))
    built = replace(built, unmatched=named - built.left_out.get(_EXCLUDED, 0))
    # another shard would be scanned together with these, or they are read in no time
    if len(groups) == 1 or (len(told) == len(shards) <= _LARGEST_GROUP):
        fs.rm(root, recursive=True)
    else:
        for name in there.keys() - set(names):
            fs.rm(there[name], recursive=True)
    return built


def tell_index(folder: str, shard: str) -> None:
    """Put what is in a new shard of ``folder`` where `build_index` finds it, so that it need not read the shard.

    Args:
        shard: a local path of the shard, of the name that it has in the folder. Another one of that name and size must
            not come into the folder without this.
    Raises:
        UserError: the folder cannot be written.
    """
    file = ShardFile(os.path.basename(shard), os.path.getsize(shard), "")
    rows = _Rows()
    damage = _scan_shard(rows, 0, shard, file, frozenset())
    assert not damage, damage
    _write_part(f"{folder.rstrip('/')}/{PARTS}/{_part_of(file)}", rows, [file], {})


def read_exclusions(path: Path) -> dict[str, frozenset[str]]:
    """Keys to leave out by shard, from a JSONL such as a run's ``replaced.jsonl``. Raises `UserError`."""
    found: dict[str, set[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            shard, key = str(entry["shard"]), str(entry["key"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} is no object with shard and key") from None
        found.setdefault(shard, set()).add(key)
    return {shard: frozenset(keys) for shard, keys in found.items()}


def _there(folder: str) -> dict[str, str]:
    """Where the files of a folder are in its store, by name; none if there is no such folder."""
    try:
        paths = persistently(folder, lambda fs, root: list(fs.ls(root, detail=False)))
    except Missing:
        return {}
    return {path.rsplit("/", 1)[-1]: path for path in paths}


def _each(
    folder: str,
    missing: Sequence[int],
    groups: Sequence[Sequence[ShardFile]],
    paths: Sequence[str],
    exclude: Mapping[str, frozenset[str]],
    workers: int,
) -> Iterator[int]:
    """Scan the missing groups, yielding each one's number when its file is written."""
    if workers <= 1 or len(missing) <= 1:
        for i in missing:
            _scan_group(folder, groups[i], paths[i], _of(groups[i], exclude))
            yield i
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context, initializer=_end_with_parent) as pool:
        tasks = {pool.submit(_scan_group, folder, groups[i], paths[i], _of(groups[i], exclude)): i for i in missing}
        try:
            for task in as_completed(tasks):
                task.result()
                yield tasks[task]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Make this worker end when the process that started it is killed, which the pool would not notice."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _groups(shards: Sequence[ShardFile], told: Collection[str]) -> Iterator[list[ShardFile]]:
    """Neighbouring shards; their names alone say where a group ends, so that one more shard changes one group.

    Args:
        told: names of shards that are groups of their own, as whoever wrote them told what is in them.
    """
    group: list[ShardFile] = []
    for shard in shards:
        if shard.name in told:
            yield from ([group] if group else [])
            yield [shard]
            group = []
            continue
        group.append(shard)
        draw = hashlib.sha256(os.fsencode(shard.name)).digest()[0]
        if draw % _GROUP == 0 or len(group) == _LARGEST_GROUP:
            yield group
            group = []
    if group:
        yield group


def _part_of(shard: ShardFile) -> str:
    """The file of what is in one shard, by whoever wrote it."""
    return f"{shard.name}.{shard.size}.arrow"


def _of(group: Sequence[ShardFile], exclude: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    return {shard.name: exclude[shard.name] for shard in group if shard.name in exclude}


def _name(group: Sequence[ShardFile], exclude: Mapping[str, frozenset[str]]) -> str:
    about = [[shard.name, shard.size, shard.tag, sorted(exclude.get(shard.name, ()))] for shard in group]
    return hashlib.sha256(json.dumps([VERSION, _SCAN, about]).encode()).hexdigest()[:32]


@dataclass
class _Rows:
    """The rows of a group while it is scanned: plain arrays, as frames may be members by the million."""

    shard: array[int] = field(default_factory=lambda: array("i"))
    key: list[str] = field(default_factory=list)
    offset: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("i", [0]))
    """Where each row's members end."""
    extension: array[int] = field(default_factory=lambda: array("i"))
    member_offset: array[int] = field(default_factory=lambda: array("q"))
    member_size: array[int] = field(default_factory=lambda: array("q"))
    meta: list[dict[str, Any]] = field(default_factory=list)
    extensions: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, shard: int, sample: Scanned) -> None:
        """One more row."""
        self.shard.append(shard)
        self.key.append(sample.key)
        self.offset.append(sample.offset)
        self.size.append(sample.size)
        for name, (offset, size) in sample.members.items():
            self.extension.append(self.extensions.setdefault(name, len(self.extensions)))
            self.member_offset.append(offset)
            self.member_size.append(size)
        self.ends.append(len(self.extension))
        self.meta.append(_meta(sample))

    def cut(self, rows: int) -> None:
        """Forget all but the first so many."""
        for column in (self.shard, self.key, self.offset, self.size, self.meta):
            del column[rows:]
        for column in (self.extension, self.member_offset, self.member_size):
            del column[self.ends[rows] :]
        del self.ends[rows + 1 :]

    def table(self) -> tuple[pa.Table, dict[str, int]]:
        """The rows, and how many members there are of each extension."""
        counts = np.bincount(np.asarray(self.extension), minlength=len(self.extensions)).tolist()
        members = _lists(*map(np.asarray, (self.ends, self.extension, self.member_offset, self.member_size)))
        names = Counter(name for row in self.meta for name in row)
        kept = _kept_columns(names)
        own = (self.shard, self.key, self.offset, self.size)
        arrays = [pa.array(values, kind) for values, kind in zip(own, COLUMNS.values(), strict=False)]
        arrays += [members, *(_column([row.get(name) for row in self.meta]) for name in kept)]
        return pa.Table.from_arrays(arrays, names=[*COLUMNS, *kept]), dict(zip(self.extensions, counts, strict=True))


def _scan_group(folder: str, group: Sequence[ShardFile], path: str, exclude: Mapping[str, frozenset[str]]) -> None:
    """Write the rows of a group, whose ``shard`` counts within the group, with what its shards are and left out."""
    rows = _Rows()
    shards, damaged = [], {}
    for number, shard in enumerate(group):
        damage = _scan_shard(rows, number, f"{folder}/{shard.name}", shard, exclude.get(shard.name, frozenset()))
        if damage:
            damaged[shard.name] = damage
        fs, place = locate(f"{folder}/{shard.name}")
        shards.append(replace(shard, ends=ends_of(place)) if isinstance(fs, LocalFileSystem) else shard)
    _write_part(path, rows, shards, damaged)


def _write_part(path: str, rows: _Rows, shards: Sequence[ShardFile], damaged: Mapping[str, str]) -> None:
    table, extensions = rows.table()
    about = {"shards": [asdict(shard) for shard in shards], "extensions": extensions}
    about |= {"left_out": rows.left_out, "damaged": damaged}
    table = table.replace_schema_metadata({"lvdm": json.dumps(about)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with atomic_file(path) as target, pa.ipc.new_file(target, table.schema, options=options) as writer:
        writer.write_table(table)


def _scan_shard(rows: _Rows, number: int, url: str, shard: ShardFile, exclude: frozenset[str]) -> str:
    """Add the rows of one shard, in several attempts if its store fails; what is wrong with it, or nothing."""
    before = len(rows.key)

    def scan(fs: AbstractFileSystem, place: str) -> tuple[Counter[str], str]:
        rows.cut(before)
        left_out: Counter[str] = Counter()
        local = isinstance(fs, LocalFileSystem)
        try:
            how = {} if local else {"cache_type": "readahead", "block_size": _block_size(url, shard)}
            with fs.open(place, "rb", **how) as stream:
                for sample in scan_tar(stream, url, shard.size, left_out):
                    if sample.key in exclude:
                        left_out[_EXCLUDED] += 1
                    elif sample.failed:
                        left_out["recorded as failed"] += 1
                    else:
                        rows.add(number, sample)
        except DamagedShard as error:
            left_out["shard damaged from some byte on"] += 1
            return left_out, str(error)
        except UserError as error:
            raise UserError(f"cannot read {url}: {error}") from None
        return left_out, ""

    left_out, damage = persistently(url, scan, patient=True, ours=_OURS)
    rows.left_out.update(left_out)
    return damage


def _block_size(url: str, shard: ShardFile) -> int:
    """How a remote shard is read: from header to header where its members are large, else as a stream."""
    fs, place = locate(url)
    sizes: list[int] = []
    with (
        contextlib.suppress(DamagedShard),
        fs.open(place, "rb", cache_type="readahead", block_size=_STREAM_BLOCK) as stream,
    ):
        for sample in scan_tar(stream, url, shard.size, Counter()):
            sizes += [size for _, size in sample.members.values()]
            if len(sizes) >= _SAMPLED or stream.tell() > 4 * _STREAM_BLOCK:
                break
    large = sizes and sum(sizes) / len(sizes) > _SKIPPING_PAYS
    return _HEADER_BLOCK if large else _STREAM_BLOCK


def _merge(folder: str, groups: Sequence[Sequence[ShardFile]], paths: Sequence[str]) -> Built:
    """Write ``index.arrow`` out of the groups' files, holding one of them at a time."""
    found: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    damaged: dict[str, str] = {}
    files: list[dict[str, Any]] = []
    kinds: dict[str, set[pa.DataType]] = {}
    seen: Counter[str] = Counter()
    rows = 0
    for group, table in zip(groups, _tables(paths), strict=True):
        about = json.loads(table.schema.metadata[b"lvdm"])
        found.update(about["extensions"])
        left_out.update(about["left_out"])
        damaged |= about["damaged"]
        files += [asdict(_as_listed(folder, *pair)) for pair in zip(group, about["shards"], strict=True)]
        rows += table.num_rows
        for column in table.schema:
            if column.name.startswith(META):
                kinds.setdefault(column.name, set()).add(column.type)
                seen[column.name] += table.num_rows
    for damage in itertools.islice(damaged.values(), _NAMED):
        log.warning("%s", damage)
    if len(damaged) > _NAMED:
        log.warning("%d more shards of %s are damaged; the index names them", len(damaged) - _NAMED, folder)
    if len(damaged) == len(files) and not rows:
        raise UserError(
            f"no samples: all {len(files)} shards of {folder} are damaged; the first: {next(iter(damaged.values()))}"
        )
    extensions = {name: number for number, (name, _) in enumerate(found.most_common(_MOST_EXTENSIONS))}
    if len(found) > len(extensions):
        rare = sum(count for name, count in found.items() if name not in extensions)
        left_out[f"member whose extension is none of the {_MOST_EXTENSIONS} commonest"] += rare
    kept = _kept_columns(seen)
    fields = [pa.field(name, kind) for name, kind in COLUMNS.items()]
    fields += [pa.field(name, _common(kinds[name])) for name in kept]
    about = {"version": VERSION, "shards": files, "extensions": list(extensions)}
    about |= {"left_out": dict(left_out), "damaged": damaged}
    schema = pa.schema(fields, metadata={"lvdm": json.dumps(about)})
    first = 0
    with atomic_file(f"{folder}/{INDEX_NAME}") as target, pa.ipc.new_file(target, schema) as writer:
        for group, table in zip(groups, _tables(paths), strict=True):
            own = json.loads(table.schema.metadata[b"lvdm"])["extensions"]
            numbers = np.array([extensions.get(name, -1) for name in own], dtype=np.int16)
            writer.write_table(_conform(table, schema, first, numbers), max_chunksize=_ROWS_PER_BATCH)
            first += len(group)
    return Built(rows, len(files), dict(left_out), damaged)


def _tables(paths: Sequence[str]) -> Iterator[pa.Table]:
    """What groups' files hold, a few files ahead."""
    with ThreadPoolExecutor(_READS) as pool:
        for first in range(0, len(paths), 2 * _READS):
            yield from pool.map(_read_part, paths[first : first + 2 * _READS])


def _kept_columns(counts: Counter[str]) -> list[str]:
    """The commonest metadata columns, with those that sizes of clips are chosen by."""
    ranked = sorted(counts, key=lambda name: (name not in _NEEDED_COLUMNS, -counts[name]))
    return sorted(ranked[:_MOST_COLUMNS])


def _read_part(path: str) -> pa.Table:
    return pa.ipc.open_file(pa.BufferReader(read_file(path))).read_all()


def _as_listed(folder: str, listed: ShardFile, known: Mapping[str, Any]) -> ShardFile:
    """A shard with its tag and ends, which whoever wrote it could not know."""
    if known["ends"] or not isinstance(locate(folder)[0], LocalFileSystem):
        return replace(listed, ends=known["ends"])
    return replace(listed, ends=ends_of(f"{locate(folder)[1]}/{listed.name}"))


def _conform(table: pa.Table, schema: pa.Schema, first_shard: int, extensions: np.ndarray) -> pa.Table:
    """A group's rows with the shards, extensions and columns of the whole set."""
    arrays = []
    for column in schema:
        if column.name == "shard":
            arrays.append(pc.add(table["shard"], pa.scalar(first_shard, pa.int32())))
        elif column.name == "members":
            arrays.append(_renumbered(table["members"].combine_chunks(), extensions))
        elif column.name in table.schema.names:
            arrays.append(table[column.name].cast(column.type))
        else:
            arrays.append(pa.nulls(table.num_rows, column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _renumbered(members: pa.ListArray, extensions: np.ndarray) -> pa.ListArray:
    """The members with the numbers that ``extensions`` gives for theirs, without those that it gives -1 for."""
    ends = members.offsets.to_numpy()
    extension, offset, size = (members.values.field(name).to_numpy() for name in ("extension", "offset", "size"))
    extension = extensions[extension]
    stays = extension >= 0
    if not stays.all():
        ends = np.concatenate([[0], np.cumsum(stays)])[ends]
        extension, offset, size = extension[stays], offset[stays], size[stays]
    return _lists(ends, extension, offset, size)


def _lists(ends: np.ndarray, extension: np.ndarray, offset: np.ndarray, size: np.ndarray) -> pa.ListArray:
    fields = [pa.field("extension", pa.from_numpy_dtype(extension.dtype)), *list(MEMBER)[1:]]
    inner = pa.StructArray.from_arrays([pa.array(values) for values in (extension, offset, size)], fields=fields)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), inner)


def _meta(sample: Scanned) -> dict[str, Any]:
    """Columns for a sample: the numbers, booleans and short texts of its ``.json``, what ffprobe says there of its
    first video, and how many frames it has if it is made of images."""
    found = {
        f"{META}{_text(name)}": _text(value) if isinstance(value, str) else value
        for name, value in sample.meta.items()
        if name not in _NO_COLUMN and len(name) <= _LONGEST_TEXT and _is_scalar(value)
    }
    video = _first_video(sample.meta)
    for theirs, ours in _VIDEO_COLUMNS.items():
        number = _number(video.get(theirs))
        if number is not None:
            found.setdefault(f"{META}{ours}", number)
    for name, pixels in _shown(video).items():
        found.setdefault(f"{META}{name}", pixels)
    if sample.members.keys().isdisjoint(VIDEO_EXTENSIONS):
        if sample.frames:
            found[f"{META}frames"] = sample.frames
        elif not sample.members.keys().isdisjoint(IMAGE_EXTENSIONS):
            found.setdefault(f"{META}frames", 1)
    return found


def _first_video(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """What ffprobe says of the first video stream."""
    try:
        streams = meta["video_metadata"]["streams"]
        video = next(stream for stream in streams if stream.get("codec_type", "video") == "video")
    except (KeyError, TypeError, AttributeError, StopIteration):
        return {}
    return video if isinstance(video, dict) else {}


def _shown(video: Mapping[str, Any]) -> dict[str, float]:
    """Width and height as `lvdm.data.decode` gives frames: upright, with square pixels; ffprobe tells them as coded."""
    sides = {name: _number(video.get(name)) for name in ("width", "height")}
    width, height = sides["width"], sides["height"]
    if width is None or height is None:
        return {name: pixels for name, pixels in sides.items() if pixels is not None}
    aspect = _number(str(video.get("sample_aspect_ratio")).replace(":", "/")) or 1.0
    if 1 / 8 <= aspect <= 8:  # beyond, it is a mistake
        width = float(max(round(width * aspect), 1))
    return {"width": height, "height": width} if _turns(video) % 2 else {"width": width, "height": height}


def _turns(video: Mapping[str, Any]) -> int:
    """Quarter turns from a video as coded to as it is shown."""
    found = video.get("side_data_list")
    entries = found if isinstance(found, list) else []
    said = [entry["rotation"] for entry in entries if isinstance(entry, dict) and "rotation" in entry]
    tags = video.get("tags")
    said += [tags["rotate"]] if isinstance(tags, dict) and "rotate" in tags else []
    try:
        return round(float(said[0]) / 90)
    except (IndexError, TypeError, ValueError, OverflowError):
        return 0


def _text(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can name and Arrow cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT
    return isinstance(value, bool) or (isinstance(value, int | float) and abs(value) < 2**53 and value == value)


def _number(value: Any) -> float | None:
    try:
        number = float(Fraction(str(value)))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if 0 < number < 2**53 else None


def _column(values: Sequence[Any]) -> pa.Array:
    """Numbers as float64, booleans as they are; as text where the kinds are mixed."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _common(kinds: set[pa.DataType]) -> pa.DataType:
    return next(iter(kinds)) if len(kinds) == 1 else pa.string()
