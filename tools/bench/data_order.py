"""Open an index of 100,000,000 samples, and look up what steps of a run take, at its start and after 10^9 samples.

    python tools/bench/data_order.py

The index (9.6 GB, removed at the end) and 100,000 sparse files that stand for its shards are made in a temporary
folder. Every row of the result is a fresh process: the first of each kind begins with the index out of the page cache
and chooses its rows, the second has the index in the page cache, as far as there is memory, and finds them chosen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from result import RESULTS, table, write_result

from lvdm.config import Bucket, ClipConfig, Condition, DataConfig, ShardSet, VideoSource
from lvdm.data.index import COLUMNS, INDEX_NAME, MEMBER, META, VERSION, list_shards
from lvdm.data.sources import Course, open_course

BATCH, FAR = 64, 10**9
SHARDS_PER_BATCH = 32  # as lvdm.data.build_index writes them on average
SAMPLE_BYTES = 1 << 18  # room for a sample in its shard
FIELDS = (f"{META}width", f"{META}height", f"{META}frames")
SHAPES = np.array([[1280, 720], [720, 1280], [512, 512]], np.float64)
CONDITIONS = (
    Condition(field="frames", comparison=">=", value=64),
    Condition(field="width", comparison="in", value=(1280.0, 512.0)),
)
BUCKETS = (
    Bucket(frames=16, height=256, width=448, size=64),
    Bucket(frames=16, height=448, width=256, size=64),
    Bucket(frames=1, height=256, width=256, size=256),
)


@dataclass(frozen=True)
class Kind:
    """A way to open the set."""

    label: str
    shards: tuple[str | ShardSet, ...]
    clip: ClipConfig | None = None
    """How clips are cut, which shares samples out and leaves short ones out; none for latents."""
    check: bool = False
    """Whether the shards are held against the index."""


@dataclass(frozen=True)
class Memory:
    """Megabytes that a process holds."""

    own: float
    """Its own."""
    mapped: float
    """Pages of files it maps, such as the index, which the system takes back when it needs them."""
    peak: float
    """The most that both were together."""

    def __str__(self) -> str:
        return f"{self.own:.0f} + {self.mapped:.0f}"


@dataclass(frozen=True)
class Measured:
    """What one process measured; times in seconds."""

    opening: float
    first: float
    near: float
    far: float
    samples: int
    before: Memory
    opened: Memory
    after: Memory


def main() -> None:
    """Write the index, measure in fresh processes, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000_000, help="samples of the index (100,000,000)")
    parser.add_argument("--shards", type=int, default=100_000, help="shards that they are in (100,000)")
    parser.add_argument("--steps", type=int, default=200, help="steps looked up at each place (200)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lvdm-bench-", dir=arguments.folder) as name:
        os.environ["LVDM_CACHE"] = f"{name}/cache"
        shards = Path(name, "shards")
        start = time.perf_counter()
        write_set(shards, arguments.samples, arguments.shards)
        seconds, index = time.perf_counter() - start, shards / INDEX_NAME
        size = index.stat().st_size
        print(f"{index}: {size / 1e9:.1f} GB, written in {seconds:.0f} s", flush=True)
        rows = []
        for kind in kinds(str(shards)):
            for turn, prepare in (("first", forget), ("again", load)):
                prepare(index)
                rows.append((f"{kind.label}, {turn}", fresh(kind, arguments.steps)))
                print(*rows[-1], flush=True)
    speed = [
        (
            label,
            f"{m.samples / 1e6:,.1f}",
            f"{m.opening:.2f}",
            f"{m.first * 1e3:.1f}",
            f"{m.near * 1e3:.2f}",
            f"{m.far * 1e3:.2f}",
            f"{m.far / m.near:.2f}",
        )
        for label, m in rows
    ]
    memory = [(label, str(m.before), str(m.opened), str(m.after), f"{m.after.peak:.0f}") for label, m in rows]
    head = ["", "samples, M", "opening, s", "first step, ms", "a step at 0, ms", f"a step at {FAR:.0e}, ms", "ratio"]
    lines = [
        f"{arguments.samples:,} samples in {arguments.shards:,} shards, an index of {size / 1e9:.1f} GB. A step is",
        f"the order of its {BATCH} samples ({BUCKETS[-1].size} in the third bucket) and their records: median of",
        f"{arguments.steps} steps from sample 0 on and from sample {FAR:.0e} on, in turn. First: the index is on disk,",
        "the rows are not chosen; again: a new process, with the index in the page cache and the rows chosen.",
        "",
        *table(head, speed),
        "",
        "Memory in MB: the process's own + mapped pages of files, the index above all.",
        "",
        *table(["", "before", "index open", "at the end", "peak"], memory),
    ]
    write_result(arguments.results, "data_order", "The order of the data at scale", ["pyarrow", "numpy"], lines)


def kinds(folder: str) -> list[Kind]:
    """What is measured."""
    clip = ClipConfig()
    chosen = ShardSet(folders=(folder,), where=CONDITIONS)
    weighted = tuple(ShardSet(folders=(folder,), weight=weight) for weight in (3.0, 1.0))
    return [
        Kind("all samples", (folder,)),
        Kind("all samples, shards checked", (folder,), check=True),
        Kind(f"videos of {clip.frames} frames", (folder,), clip),
        Kind("those on two conditions", (chosen,), clip),
        Kind("two weighted sets, three buckets", weighted, ClipConfig(buckets=BUCKETS)),
    ]


def fresh(kind: Kind, steps: int) -> Measured:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, kind, steps).result()


def measure(kind: Kind, steps: int) -> Measured:
    """Open the set and look up steps."""
    data = DataConfig(kind="video", video=VideoSource(shards=kind.shards, clip=kind.clip or ClipConfig()))
    sizes = kind.clip.sizes if kind.clip else []
    before = memory_now()
    start = time.perf_counter()
    course = open_course(data, sizes, seed=7, batch=BATCH, check=kind.check)
    opening = time.perf_counter() - start
    opened = memory_now()
    first = lookup(course, 0)
    far = FAR // course.order.position_at(1)
    times = [(lookup(course, 1 + i), lookup(course, far + i)) for i in range(steps)]
    samples = sum(len(source.selection) for source in course.sources)
    near_s, far_s = (statistics.median(column) for column in zip(*times, strict=True))
    return Measured(opening, first, near_s, far_s, samples, before, opened, memory_now())


def lookup(course: Course, step: int) -> float:
    """Seconds to find what a step takes and where its samples lie."""
    start = time.perf_counter()
    taken = course.order.step(step)
    for entry in taken.entries:
        course.sources[entry.source].records(taken.bucket, entry.place)
    return time.perf_counter() - start


def memory_now() -> Memory:
    """Of this process."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {line[0].rstrip(":"): float(line[1]) for line in lines if line[-1] == "kB"}
    return Memory(*(kilobytes[name] / 1e3 for name in ("RssAnon", "RssFile", "VmHWM")))


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(path: Path) -> None:
    """Bring a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def write_set(folder: Path, samples: int, shards: int) -> None:
    """Shards without content, and an index as `lvdm.data.build_index` would write it for full ones."""
    folder.mkdir()
    per_shard = -(-samples // shards)
    for number in range(shards):
        with open(folder / f"{number:05d}.tar", "wb") as file:
            file.truncate(per_shard * SAMPLE_BYTES)
    files = [asdict(shard) for shard in list_shards(str(folder))]
    about = {"version": VERSION, "shards": files, "extensions": ["mp4", "txt"], "left_out": {}, "damaged": {}}
    fields = [*((name, kind) for name, kind in COLUMNS.items()), *((name, pa.float64()) for name in FIELDS)]
    schema = pa.schema(fields, metadata={"lvdm": json.dumps(about)})
    size = SHARDS_PER_BATCH * per_shard
    with pa.ipc.new_file(str(folder / INDEX_NAME), schema) as writer:
        for first in range(0, samples, size):
            writer.write_batch(rows_from(first, min(first + size, samples), per_shard, schema))


def rows_from(first: int, last: int, per_shard: int, schema: pa.Schema) -> pa.RecordBatch:
    """Rows of the index, ``last`` exclusive: an mp4 of about 200 kB and a caption each."""
    row = np.arange(first, last)
    count = len(row)
    shard, place = np.divmod(row, per_shard)
    offset = place * SAMPLE_BYTES
    random = np.random.default_rng(first)
    # an mp4 behind its header, then a caption behind its own
    sizes = np.stack([random.integers(150_000, 250_000, count), random.integers(20, 200, count)], 1)
    text = 512 + (sizes[:, 0] + 511) // 512 * 512
    offsets = np.stack([offset + 512, offset + text + 512], 1)
    parts = [
        pa.array(np.tile(np.array([0, 1], np.int16), count)),
        pa.array(offsets.reshape(-1)),
        pa.array(sizes.reshape(-1)),
    ]
    members = pa.StructArray.from_arrays(parts, fields=list(MEMBER))
    digits = (row[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")).astype(np.uint8)
    starts = np.arange(0, 9 * count + 1, 9, dtype=np.int32)
    shape = SHAPES[random.integers(0, len(SHAPES), count)]
    arrays = [
        pa.array(shard.astype(np.int32)),
        pa.StringArray.from_buffers(count, pa.py_buffer(starts), pa.py_buffer(digits)),
        pa.array(offset),
        pa.array(text + 512 + sizes[:, 1]),
        pa.ListArray.from_arrays(pa.array(np.arange(0, 2 * count + 1, 2, dtype=np.int32)), members),
        *(pa.array(np.ascontiguousarray(column)) for column in shape.T),
        pa.array(random.integers(1, 300, count).astype(np.float64)),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


if __name__ == "__main__":
    main()
