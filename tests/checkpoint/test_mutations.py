"""Damaged and hostile checkpoints: refused with the file named, never loaded silently, no code run, nothing awaited."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.checkpoint.blocks import Damaged, block_digests
from lvdm.checkpoint.folder import open_checkpoint
from lvdm.checkpoint.reader import Checkpoint
from lvdm.errors import UserError
from tests.checkpoint.files import Tensors, make_tensors, read_all, same, write_checkpoint

MANIFEST = "manifest.json"
BYTES, TREES, HEADERS = 1300, 400, 400
"""Seeded mutations of each sort; with the crafted ones below more than 2,000 in all."""
NASTY: list[Any] = [
    float("nan"), float("inf"), -1, -(2**63), 2**60, 2**63, 2**200, 1.5, 1e300, True, False, None, "", "1", "../x",
    "\x1b[2J\n", "9" * 5000, [], {}, [[]], {"": 0}, [2**62, 2**62], [2**40], [-1], [True], [1] * 100, "F64",
]  # fmt: skip
FILE_NAMES = [
    "../step-00000001/rank-00000.safetensors", "/etc/passwd", "rank-00000.safetensors/", "./rank-00000.safetensors",
    "rank-1.safetensors", "rank-00000.a/b.safetensors", "rank-00000.safetensors\n", "rank-00000.pt", "manifest.json",
    "rank-" + "0" * 300 + ".safetensors", "rank-00000.\u0661.safetensors", "%2e%2e/x", "s3://b/rank-00000.safetensors",
]  # fmt: skip
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """The files of checkpoints: ``one``, ``two`` (the next step of its run) and ``other`` (another run's first)."""
    root = tmp_path_factory.mktemp("origins")
    folders = {"one": write_checkpoint(root / "a", 1), "two": write_checkpoint(root / "a", 2)}
    folders["other"] = write_checkpoint(root / "b", 1, make_tensors(99))
    return {key: {path.name: path.read_bytes() for path in Path(folders[key]).iterdir()} for key in folders}


@pytest.fixture
def limits() -> Iterator[None]:
    """An error where something waits for long, or asks for gigabytes."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    old = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), old[1]))
    signal.alarm(100)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, old)
    signal.signal(signal.SIGALRM, before)


class Case:
    """A folder that holds a copy of a checkpoint, to be spoilt and loaded."""

    def __init__(self, root: Path, files: Files, truth: Tensors) -> None:
        self.folder, self.files, self.truth = root / "step-00000001", files, truth
        self.folder.mkdir(parents=True)
        self.refused = 0

    def put(self, files: Files) -> None:
        """Make these the files of the folder."""
        for path in self.folder.iterdir():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, data in files.items():
            (self.folder / name).write_bytes(data)

    def expect_refusal(self, what: str, *names: str) -> None:
        """Load it: opened, verified and all parameters read; and once more without verification."""
        said = ""
        try:
            checkpoint = Checkpoint(self.folder)
            checkpoint.verify()
            read_all(checkpoint)
        except (Damaged, UserError) as error:
            said = str(error)
        assert said, f"loaded: {what}"
        assert any(name in said for name in names or [self.folder.name]), f"{what}: {said}"
        assert str(self.folder) in said, f"{what}: {said}"
        assert said.isprintable(), f"{what}: {said}"
        assert len(said) < 2100
        self.refused += 1
        try:
            found = read_all(Checkpoint(self.folder))
        except Damaged:
            return
        assert same(found, self.truth), f"loaded something else unverified: {what}"


@pytest.fixture
def case(origins: dict[str, Files], tmp_path: Path, limits: None) -> Case:
    return Case(tmp_path, origins["one"], make_tensors(1))


def test_the_untouched_one_loads(case: Case) -> None:
    case.put(case.files)
    checkpoint = Checkpoint(case.folder)
    checkpoint.verify()
    assert same(read_all(checkpoint), case.truth)
    assert (
        sealed(tree_of(case.files)) == case.files[MANIFEST]
    )  # so that what is forged below differs where it is meant to


def spoilt(rng: random.Random, files: Files, others: list[Files]) -> tuple[str, str, Files]:
    """What is done to which file, and the files then."""
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(200, len(data)))
    count = min(rng.choice([1, 2, 8, 64, 1000]), len(data) - at)
    ranks = sorted(files.keys() - {MANIFEST})
    match rng.randrange(12):
        case 0:
            return f"cut at {at}", name, files | {name: bytes(data[:at])}
        case 1 | 2 | 3 | 4:
            data[at] ^= 1 << rng.randrange(8)
            return f"bit flip at {at}", name, files | {name: bytes(data)}
        case 5:
            data[at : at + count] = bytes(count)
            return f"zeros at {at}", name, files | {name: bytes(data)}
        case 6:
            data[at : at + count] = rng.randbytes(count)
            return f"garbage at {at}", name, files | {name: bytes(data)}
        case 7:
            return f"{count} bytes more", name, files | {name: bytes(data) + rng.randbytes(count)}
        case 8:
            return f"{count} bytes of {at} twice", name, files | {name: bytes(data[: at + count] + data[at:])}
        case 9:
            left, right = rng.sample(ranks, 2)
            return "ranks swapped", "rank-", files | {left: files[right], right: files[left]}
        case 10:
            name = rng.choice(sorted(files))
            return "of another checkpoint", "", files | {name: rng.choice(others)[name]}
        case _:
            return "missing", name, {key: value for key, value in files.items() if key != name}


def test_damaged_bytes(case: Case, origins: dict[str, Files]) -> None:
    rng, harmless = random.Random(7), 0
    while case.refused < BYTES:
        what, name, files = spoilt(rng, case.files, [origins["two"], origins["other"]])
        if files == case.files:
            harmless += 1
            continue
        case.put(files)
        case.expect_refusal(f"{what} of {name}", name)
    assert harmless < BYTES / 10


def tree_of(files: Files) -> dict[str, Any]:
    """The manifest without its seal."""
    tree: dict[str, Any] = json.loads(files[MANIFEST])
    del tree["seal"]
    return tree


def sealed(tree: dict[str, Any] | str) -> bytes:
    """A manifest that says anything, with a seal that fits."""
    text = tree if isinstance(tree, str) else json.dumps(tree, indent=1, ensure_ascii=False)
    body = text.encode().removesuffix(b"\n}") + b',\n "seal": "'
    return body + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def forged(files: Files, **ranks: bytes) -> Files:
    """Other contents of ranks' files, by ``rN``, with a manifest that fits them."""
    tree, changed = tree_of(files), dict(files)
    for rank, data in ranks.items():
        name = f"rank-{int(rank[1:]):05d}.safetensors"
        changed[name] = data
        tree["files"][name] = {"size": len(data), "sha256": block_digests(memoryview(data))}
    return changed | {MANIFEST: sealed(tree)}


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything below the root."""
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from nodes(tree[key], (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of ``tree`` in which ``change`` was called with the parent of ``path`` and the last key."""
    copy = json.loads(json.dumps(tree))
    node = copy
    for key in path[:-1]:
        node = node[key]
    change(node, path[-1])
    return copy


def put(value: Any) -> Callable[[Any, Any], None]:
    def change(parent: Any, key: Any) -> None:
        parent[key] = value

    return change


def rename(new: str) -> Callable[[Any, Any], None]:
    def change(parent: Any, key: Any) -> None:
        parent[new] = parent.pop(key)

    return change


def delete(parent: Any, key: Any) -> None:
    del parent[key]


FREE = {"facts", "config", "written_by"}
"""What has no rules of its own, so that other values cannot be told from true ones."""


def is_allowed(path: tuple[Any, ...], hostile: dict[str, Any]) -> bool:
    """Whether what was done at ``path`` leaves a manifest that may be true: free texts, and a clock without samples."""
    if path[0] in {*FREE, "clock"} and isinstance(hostile.get(path[0]), dict):
        return path[0] in FREE or "samples" not in hostile["clock"]
    return False


def test_sealed_manifests_that_say_something_absurd(case: Case) -> None:
    rng, tree = random.Random(11), tree_of(case.files)
    tree["scores"] = {"loss": 1.5}
    names = ["", "../x", "/x", "rank-00000.safetensors/../x", "rank-00009.safetensors", "\x00", "a\nb", "e" * 10**5]
    while case.refused < TREES:
        path = rng.choice(list(nodes(tree)))
        changes = [put(rng.choice(NASTY)), put(rng.choice(NASTY)), delete]
        if isinstance(path[-1], str):
            changes.append(rename(rng.choice(names)))
        hostile = replaced(tree, path, rng.choice(changes))
        if sealed(hostile) == sealed(tree) or is_allowed(path, hostile) or path[0] == "scores":
            continue
        case.put(case.files | {MANIFEST: sealed(hostile)})
        case.expect_refusal(f"{path} in the manifest", MANIFEST, "rank-", "lacks elements")


def compact(tree: Any) -> str:
    """JSON as headers have it."""
    text = json.dumps(tree, separators=(",", ":"))
    return text + " " * (-len(text) % 8)


def header_of(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def with_header(data: bytes, header: dict[str, Any] | str | bytes, length: int | None = None) -> bytes:
    """A rank's file with another header, and another word for its length."""
    (old,) = struct.unpack("<Q", data[:8])
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else compact(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data[8 + old :]


def test_files_with_headers_that_say_something_absurd(case: Case) -> None:
    rng = random.Random(13)
    keys = ["", "x", "master:0:model/nobody", "master:00:model/bias", "master:-1:model/bias", "master:0:nobody/bias",
            "ema:99999999999999999999:model/bias", "ema:4611686018427387904:model/bias", "frozen:0:model/bias",
            "ema:0:model/table", "ema:0:model/bias\n", "__metadata__", "master:0:model/" + "x" * 10**6]  # fmt: skip
    while case.refused < HEADERS:
        rank = rng.randrange(3)
        data = case.files[f"rank-{rank:05d}.safetensors"]
        header = header_of(data)
        path = rng.choice([path for path in nodes(header) if path[0] != "__metadata__"])
        changes = [put(rng.choice(NASTY)), put(rng.choice(NASTY)), delete]
        if len(path) == 1:
            changes += [rename(rng.choice(keys)), rename(rng.choice(keys))]
        if path[-1] in (0, 1):
            changes += [put(header[path[0]]["data_offsets"][0] + rng.choice([-8, -4, 1, 4, 8]))] * 2
        hostile = replaced(header, path, rng.choice(changes))
        if hostile == header or same_but_empty(hostile, header):
            continue
        case.put(forged(case.files, **{f"r{rank}": with_header(data, hostile)}))
        case.expect_refusal(
            f"{path} in the header of rank {rank}: {hostile.get(path[0])!r:.200}", "rank-", "lacks elements"
        )


def same_but_empty(hostile: dict[str, Any], header: dict[str, Any]) -> bool:
    """Whether they differ in pieces without elements alone, of which nothing is missed."""

    def full(tree: dict[str, Any]) -> dict[str, Any]:
        return {
            k: v for k, v in tree.items() if k != "__metadata__" and not (isinstance(v, dict) and v.get("shape") == [0])
        }

    return full(hostile) == full(header)


def first(tree: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = tree["files"]["rank-00000.safetensors"]
    return entry


def twice(files: Files, key: str) -> bytes:
    """A sealed manifest in which the line that begins with ``key`` comes twice."""
    text = json.dumps(tree_of(files), indent=1)
    line = next(line for line in text.splitlines() if line.strip().startswith(f'"{key}"'))
    return sealed(text.replace(line, f"{line.rstrip(',')},\n{line}", 1))


def manifests(files: Files) -> Iterator[tuple[str, bytes]]:
    """Crafted manifests whose seals fit."""
    for key in ("step", "format", "optimizer_step", "size"):
        yield f"{key} comes twice", twice(files, key)
    for depth in (100, 250, 10_000, 1_000_000):
        text = json.dumps(tree_of(files), indent=1)
        yield (
            f"lists in lists, {depth} deep",
            sealed(text.replace('"facts": {}', '"facts": {"a": ' + "[" * depth + "]" * depth + "}")),
        )
        yield f"open lists, {depth} deep", sealed(text.replace('"facts": {}', '"facts": ' + "[" * depth))
    for shape in (
        [2**62],
        [2**31, 2**31],
        [2**32, 2**32],
        [2**40],
        [3, 2**50],
        [2**59],
        [0, 2**62],
        [1] * 17,
    ):
        for name in ("block.weight", "none", "table"):
            tree = tree_of(files)
            tree["networks"]["model"]["shapes"][name] = shape
            yield f"{name} of shape {shape}", sealed(tree)
    for size, digests in ((2**50, 1), (2**62, 0), (0, 0), (1, 1), (4 << 20, 1), (-1, 0)):
        tree = tree_of(files)
        first(tree).update(size=size, sha256=["0" * 64] * digests)
        yield f"{size} bytes", sealed(tree)
    for name in FILE_NAMES:
        tree = tree_of(files)
        tree["files"][name] = tree["files"].pop("rank-00000.safetensors")
        yield f"a file {name[:40]!r}", sealed(tree)
    for digest in ("", "0" * 64, "A" * 64, "0" * 63, "0" * 65, 0, None):
        tree = tree_of(files)
        first(tree)["sha256"] = [digest]
        yield f"digest {digest!r}", sealed(tree)
    yield "no JSON", sealed("no JSON\n}")
    yield "a list", sealed("[]\n}")
    yield "other spaces", sealed(json.dumps(tree_of(files), indent=2))
    yield "no UTF-8", sealed_bytes(b'{"a": "\xff"')
    yield "half a surrogate", sealed(json.dumps(tree_of(files) | {"config": {"a": "\ud800"}}, indent=1))
    yield "nothing", sealed("{\n}")
    yield "of an older version", sealed(tree_of(files) | {"version": 1})


def sealed_bytes(body: bytes) -> bytes:
    body += b',\n "seal": "'
    return body + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def test_crafted_manifests(case: Case) -> None:
    for what, manifest in manifests(case.files):
        case.put(case.files | {MANIFEST: manifest})
        case.expect_refusal(what, MANIFEST, "rank-")
    assert case.refused > 60


def headers(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Crafted contents of a rank's file."""
    header = header_of(data)
    text = compact(header)
    tensors = [key for key in header if key != "__metadata__"]
    key, entry = tensors[0], header[tensors[0]]
    for length in (0, 1, 7, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1, len(data), len(data) - 8, len(data) - 7):
        yield f"header of {length} bytes", with_header(data, header, length)
    for size in (0, 1, 7, 8):
        yield f"{size} bytes", data[:size]
    yield "a key twice", with_header(data, text.replace("{", '{"' + key + '":' + compact(entry) + ",", 1))
    yield "an entry's key twice", with_header(data, text.replace('"dtype"', '"dtype":"F32","dtype"', 1))
    for depth in (100, 10_000, 1_000_000):
        yield f"{depth} deep", with_header(data, "[" * depth)
        yield f"metadata {depth} deep", with_header(data, '{"__metadata__": ' + '{"a":' * depth)
    for word in ("NaN", "Infinity", "1e400", "-1", "9" * 4000, "9" * 5000, "true", "null", '"0"', "[0]"):
        yield f"shape {word[:20]}", with_header(data, text.replace('"shape":[', f'"shape":[{word},', 1))
        replaced_shape = header | {key: entry | {"shape": ["@"]}}
        yield f"shape of {word[:20]} alone", with_header(data, compact(replaced_shape).replace('"@"', word))
    for dtype in ("F64", "I32", "f32", "", None, ["F32"], {"F32": 1}, "O"):
        yield f"dtype {dtype!r}", with_header(data, header | {key: entry | {"dtype": dtype}})
    begin, end = entry["data_offsets"]
    lists = [[begin, end + 4], [begin - 4, end], [end, begin], [begin, 2**62], [2**70, 2**70 + end - begin], [begin]]
    lists += [[begin, end, end], [-4, end], [begin + 4, end + 4], [float(begin), float(end)]]
    for offsets in lists:
        yield f"offsets {offsets}", with_header(data, header | {key: entry | {"data_offsets": offsets}})
    last = tensors[-1]
    yield "a piece less", with_header(data, {k: v for k, v in header.items() if k != last})
    yield (
        "a piece and its bytes less",
        with_header(data[: len(data) - 4 * header[last]["shape"][0]], {k: v for k, v in header.items() if k != last}),
    )
    kind, start, rest = key.split(":", 2)
    starts = [str(int(start) + 1), str(2**60), str(2**63), str(10**300), f"0{start}", f" {start}", "\u0661", "-1", ""]
    others = [f"{kind}:{other}:{rest}" for other in starts]
    others += [f"{other}:{start}:{rest}" for other in ("grad", "frozen", "", "MASTER")]
    others += [f"{kind}:{start}:../{rest}", f"{kind}:{start}:x/../../y", rest, "", "\x1b[2J"]
    for other in others:
        moved = {other if k == key else k: v for k, v in header.items()}
        yield f"key {other[:60]!r}", with_header(data, moved)


def test_crafted_headers(case: Case) -> None:
    for rank in (0, 1, 2):
        for what, data in headers(case.files[f"rank-{rank:05d}.safetensors"]):
            case.put(forged(case.files, **{f"r{rank}": data}))
            case.expect_refusal(what, "rank-", "lacks elements")
    for left, right in ((0, 1), (1, 2), (2, 0)):  # the same pieces in two files
        case.put(forged(case.files, **{f"r{left}": case.files[f"rank-{right:05d}.safetensors"]}))
        case.expect_refusal("pieces twice", "rank-")
    assert case.refused > 200


class Payload:
    """Leaves a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_pickles_are_not_run(case: Case, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickles = [pickle.dumps(Payload(marker), protocol) for protocol in range(6)]
    for new in (True, False):
        torch.save({"module": Payload(marker)}, tmp_path / "saved", _use_new_zipfile_serialization=new)
        pickles.append((tmp_path / "saved").read_bytes())
    pickle.loads(pickles[0])
    assert marker.exists()  # so that one which was run would be seen
    marker.unlink()
    for data in pickles:
        for rank in (0, 1, 2):
            case.put(case.files | {f"rank-{rank:05d}.safetensors": data})
            case.expect_refusal("a pickle in place of a rank's file", "rank-")
            whole = case.files[f"rank-{rank:05d}.safetensors"]
            for forgery in (data, struct.pack("<Q", len(data)) + data, with_header(whole, data)):
                case.put(forged(case.files, **{f"r{rank}": forgery}))
                case.expect_refusal("a pickle under a fitting seal", "rank-")
        for manifest in (data, data + case.files[MANIFEST], case.files[MANIFEST] + data, sealed_bytes(data)):
            case.put(case.files | {MANIFEST: manifest})
            case.expect_refusal("a pickle in place of the manifest", MANIFEST)
    assert not marker.exists()


def test_links_pipes_and_folders_in_place_of_files(case: Case, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name, data in case.files.items():
        away, here = tmp_path / "elsewhere" / name, case.folder / name
        away.write_bytes(data)
        for what, make in {
            "a link to the true bytes": lambda: here.symlink_to(away),  # noqa: B023 (called at once)
            "a link to nowhere": lambda: here.symlink_to(tmp_path / "nowhere"),  # noqa: B023
            "a link to itself": lambda: here.symlink_to(here),  # noqa: B023
            "a link to a device": lambda: here.symlink_to("/dev/zero"),  # noqa: B023
            "a pipe": lambda: os.mkfifo(here),  # noqa: B023
            "a folder": here.mkdir,
            "a socket": lambda: os.mknod(here, 0o140600),  # noqa: B023
        }.items():
            case.put({key: value for key, value in case.files.items() if key != name})
            make()
            case.expect_refusal(what, name)


def test_a_file_that_is_made_shorter_or_replaced_while_it_is_read(case: Case) -> None:
    for name in sorted(case.files.keys() - {MANIFEST}):
        for change in (
            lambda path: os.truncate(path, 100),
            os.unlink,
            lambda path: path.write_bytes(bytes(path.stat().st_size)),
        ):
            case.put(case.files)
            checkpoint = Checkpoint(case.folder)
            change(case.folder / name)
            with pytest.raises(Damaged, match=name):
                read_all(checkpoint)


def test_a_folder_of_checkpoints_that_is_no_such_thing(tmp_path: Path, limits: None) -> None:
    for make in (os.mkfifo, lambda path: path.symlink_to(path), lambda path: path.write_bytes(b"x"), lambda path: None):
        place = tmp_path / "step-00000001"
        place.unlink(missing_ok=True)
        make(place)
        for path in (place, tmp_path, place / "checkpoints", place / MANIFEST):
            with pytest.raises(UserError, match=r"step-00000001|no checkpoint to read in"):
                open_checkpoint(path)
