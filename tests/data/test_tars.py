"""Hostile tars: whatever a shard holds, it gives samples within its bounds or an error that names it."""

from __future__ import annotations

import gc
import io
import json
import logging
import random
import tarfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from lvdm.data.build_index import build_index
from lvdm.data.fetch import read_sample
from lvdm.data.index import open_index
from lvdm.data.tar_scan import DamagedShard, Scanned, scan_tar
from lvdm.data.transforms import read_caption
from lvdm.errors import UserError

MUTATED = 1200
FIELDS = {"name": (0, 100), "mode": (100, 108), "size": (124, 136), "time": (136, 148), "kind": (156, 157)}
FIELDS |= {"link": (157, 257), "magic": (257, 265), "device": (329, 345), "prefix": (345, 500), "sparse": (386, 512)}
NAMES = [b"../../etc/x.mp4", b"/etc/x.mp4", b"a/../../b.mp4", b"..", b".", b"", b".mp4", b"a.mp4/", b"\xff\xfe.mp4"]
NAMES += [b"a\0b.mp4", b"\xed\xa0\x80.txt", b"x" * 100, b"00000001.json", b"\n.mp4", b"a/" * 49 + b".m"]
SIZES = [
    b"7" * 11 + b"\0",
    b"-0000000001\0",
    b"1_0\0",
    b"0o17",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"\x80" + bytes(11),
]
SIZES += [b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7, b"\xff" * 11 + b"\x00", b"99999999999\0", b" \0", b"", b"0" * 12]
RECORDS = [b"size=99999999999999999999", b"size=-1", b"size=1e9", b"size=" + b"9" * 5000, b"path=../../x.mp4", b"path="]
RECORDS += [b"path=/etc/x.mp4", b"path=\xff.mp4", b"GNU.sparse.map=1,2,3", b"GNU.sparse.major=1", b"hdrcharset=BINARY"]
RECORDS += [b"path=" + b"d/" * 3000 + b"x.mp4", b"=", b"mtime=nan", b"size=00", b"linkpath=\0"]
CAPTIONS = [b"", b"\xff\xfe\xfd", b"\0" * 50, "a\u202eb \U0001f600".encode(), b"\xed\xa0\x80", b"x" * 3000]
DEEP = b"[" * 100_000
DOCUMENTS = [b"{", DEEP, b'{"a":' * 5000, b'{"n": NaN, "i": -Infinity}', b'{"n": 1' + b"0" * 400 + b"}", b"[]", b"\xff"]
DOCUMENTS += [b'{"n": ' + b"9" * 5000 + b"}", b'{"\\ud800": 1, "t": "\\udfff"}', b'{"caption": "\\ud800", "status": 3}']
DOCUMENTS += [b'{"n": 1e400, "": "", "b": true}', b'{"n": "text", "b": 1}', b'{"status": ["failed"], "status": null}']
DOCUMENTS += [b'{"video_metadata": {"streams": [{"width": "1/0", "nb_frames": "' + b"9" * 400 + b'"}]}}']
DOCUMENTS += [b'{"video_metadata": {"streams": [7]}}', "{'single': 1}".encode("utf-16"), b'{"caption": {"a": 1}}', b"3"]


def tar_of(rng: random.Random) -> tuple[bytearray, list[int]]:
    """A small tar of one of the formats, and where its headers are."""
    stream = io.BytesIO()
    how = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=stream, mode="w", format=how) as tar:
        for number in range(rng.randint(1, 4)):
            long = "x" * 120 if rng.random() < 0.2 and how != tarfile.USTAR_FORMAT else ""
            members = {"mp4": rng.randbytes(rng.randint(0, 1500)), "txt": rng.choice(CAPTIONS)}
            members["json"] = rng.choice(DOCUMENTS)[: rng.choice([10**6, 600])]
            for extension, held in members.items():
                info = tarfile.TarInfo(f"{long}{number:08d}.{extension}")
                info.size = len(held)
                tar.addfile(info, io.BytesIO(held))
    data = bytearray(stream.getvalue())
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    return data, headers


def repair(data: bytearray, at: int) -> None:
    """Give a header the checksum that it should have."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def put(data: bytearray, at: int, field: str, value: bytes) -> None:
    first, last = FIELDS[field]
    data[at + first : at + last] = value[: last - first].ljust(last - first, b"\0")
    repair(data, at)


def header(name: bytes, size: int, kind: bytes = b"0") -> bytearray:
    block = bytearray(512)
    put(block, 0, "name", name)
    put(block, 0, "size", b"%011o\0" % size)
    put(block, 0, "kind", kind)
    return block


def block_of(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def record(text: bytes) -> bytes:
    size = len(text) + 2
    while len(b"%d %s\n" % (size, text)) != size:
        size += 1
    return b"%d %s\n" % (size, text)


def mutate(rng: random.Random, data: bytearray, headers: list[int]) -> bytearray:
    at = rng.choice(headers)
    match rng.randrange(11):
        case 0:
            del data[rng.randrange(len(data)) :]
        case 1:
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 2:
            put(data, at, "name", rng.choice(NAMES))
        case 3:
            put(data, at, "size", rng.choice(SIZES))
        case 4:
            put(
                data,
                at,
                "kind",
                rng.choice([b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"L", b"K", b"x", b"g", b"V"]),
            )
        case 5:
            put(data, at, rng.choice(list(FIELDS)), rng.randbytes(512))
        case 6:
            held = b"".join(record(rng.choice(RECORDS)) for _ in range(rng.randint(1, 3)))
            held = (
                held
                if rng.random() < 0.7
                else rng.choice([b"0 a=b\n", b"99 a=b\n", b"9" * 400, b"x", b"5 a\n", b"7 a=b"])
            )
            data[at:at] = header(b"pax", len(held), rng.choice([b"x", b"g", b"X"])) + block_of(held)
        case 7:
            name = rng.choice(NAMES) * rng.choice([1, 400])
            data[at:at] = header(b"././@LongLink", len(name), rng.choice([b"L", b"K"])) + block_of(name)
        case 8:
            other = rng.randrange(0, len(data), 512)
            data[at : at + 512] = data[other : other + 512]
        case 9:
            put(data, at, "kind", b"S")
            put(data, at, "sparse", b"7" * 126)
        case _:
            data[:0] = bytes(rng.choice([512, 1, 511]))
    return data


def scanned(data: bytes, left_out: Counter[str] | None = None) -> tuple[list[Scanned], str]:
    """The samples of a tar and what is wrong with it."""
    samples: list[Scanned] = []
    try:
        for sample in scan_tar(io.BytesIO(data), "s.tar", len(data), Counter() if left_out is None else left_out):
            samples.append(sample)
    except DamagedShard as error:
        return samples, str(error)
    return samples, ""


def hostile(number: int) -> bytes:
    rng = random.Random(number)
    data, headers = tar_of(rng)
    data = mutate(rng, data, headers)
    for _ in range(rng.choice([0, 0, 1, 2])):
        again = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
        data = mutate(rng, data, again) if again else data
    return bytes(data)


def test_mutated_tars_give_samples_within_their_bounds_or_say_what_is_wrong() -> None:
    found, damages, reasons = 0, Counter[str](), Counter[str]()
    for number in range(MUTATED):
        data = hostile(number)
        left_out: Counter[str] = Counter()
        samples, damage = scanned(data, left_out)
        reasons.update(left_out)
        damages[damage.rpartition(": ")[2].partition(";")[0]] += 1
        assert not damage or damage.startswith("shard s.tar is damaged at byte ")
        for sample in samples:
            found += 1
            end = sample.offset + sample.size
            assert 0 <= sample.offset <= end <= len(data)
            assert sample.members
            for offset, size in sample.members.values():
                assert sample.offset + 512 <= offset <= offset + size <= end
            assert not sample.key.startswith("/")
            assert ".." not in sample.key.split("/")[:-1]
            sample.key.encode()
    # the mutations get through: most damages and most reasons occur
    assert found > MUTATED
    assert MUTATED / 4 < damages[""] < MUTATED * 3 / 4
    assert len(damages) >= 8, damages
    for reason in ("link", "folder", "sparse file", "device or pipe", "name that leads out of the tar"):
        assert reasons[reason] > 5, reasons
    for reason in ("name without an extension", "key returns after others", "extension given twice in a sample"):
        assert reasons[reason] > 5, reasons


def test_a_folder_of_mutated_tars_is_indexed_and_its_damaged_shards_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = 0
    for number in range(300):
        data = hostile(number)
        (tmp_path / f"{number:04d}.tar").write_bytes(data)
        expected += len(scanned(data)[0])
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "no\ntar.tar").write_bytes(b"plain text " * 100)
    with caplog.at_level(logging.WARNING):
        built = build_index(str(tmp_path))
    assert 0.9 * expected < built.samples <= expected  # some jsons say that their samples failed
    assert built.left_out["shard damaged from some byte on"] == len(built.damaged) > 50
    index = open_index([str(tmp_path)])
    assert index.parts[0].damaged == built.damaged
    assert built.damaged["empty.tar"].endswith(
        "empty.tar is damaged at byte 0: it is empty; replace it and index again"
    )
    assert "no header of a tar" in built.damaged["no\ntar.tar"]
    assert sum("is damaged at byte" in line for line in caplog.messages) == min(len(built.damaged), 100)
    sizes = {f"{tmp_path}/{shard.name}": shard.size for shard in index.parts[0].shards}
    for row in range(len(index)):
        found = index[row]
        assert 0 <= found.offset <= found.offset + found.size <= sizes[found.shard]
        members = read_sample(found)
        assert {name: len(data) for name, data in members.items()} == {
            n: size for n, (_, size) in found.members.items()
        }
        read_caption(members)


def test_nothing_but_damaged_shards_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.tar").write_bytes(b"\x1f\x8b" + bytes(range(256)) * 4)
    with pytest.raises(
        UserError, match=r"all 2 shards of .* are damaged; the first: shard .*a\.tar is damaged at byte 0"
    ):
        build_index(str(tmp_path))
    assert not (tmp_path / "index.arrow").exists()


def plain(*members: tuple[str, bytes], how: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=how) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_a_cut_at_any_byte_loses_what_it_touches_and_no_more() -> None:
    data = plain(*((f"{n}.{e}", b"12345" * 150) for n in range(3) for e in ("mp4", "txt")))
    whole, damage = scanned(data)
    assert (len(whole), damage) == (3, "")
    ends = [sample.offset + sample.size for sample in whole]
    for cut in range(1, len(data), 7):
        samples, damage = scanned(data[:cut])
        kept = sum(end <= cut for end in ends)
        if cut % 512 and cut < ends[-1]:
            assert damage.startswith("shard s.tar is damaged at byte")
        if damage:
            assert samples == whole[: len(samples)]
            assert kept - 1 <= len(samples) <= kept
        else:  # between two members nothing tells, but by the one that is missing
            assert kept <= len(samples) <= kept + 1


def test_a_flipped_header_is_no_silent_end() -> None:
    data = bytearray(plain(*((f"{n}.mp4", b"x") for n in range(9))))
    data[4 * 1024 + 3] ^= 1
    left_out: Counter[str] = Counter()
    samples, damage = scanned(bytes(data), left_out)
    assert [sample.key for sample in samples] == ["0", "1", "2"]
    assert "at byte 4096: that is no header of a tar" in damage
    assert left_out == {"sample next to the damage of its shard": 1}


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_tars_are_read_as_tarfile_reads_them(how: int) -> None:
    rng = random.Random(0)
    members = []
    for number in range(60):
        folders = "".join(rng.choice(["", "a/", "dir.with.dots/", "ü/", "n" * 60 + "/"]) for _ in range(3))
        stem = rng.choice(["", "y" * 80]) if how != tarfile.USTAR_FORMAT else ""
        members += [(f"{folders}{stem}{number:04d}.{e}", rng.randbytes(rng.randint(0, 2000))) for e in ("mp4", "x.txt")]
    data = plain(*members, how=how)
    samples, damage = scanned(data)
    assert not damage
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = {info.name: (info.offset_data, info.size) for info in tar}
    assert {f"{s.key}.{e}": place for s in samples for e, place in s.members.items()} == expected


def chain(kind: bytes, held: bytes) -> Callable[[], bytes]:
    return lambda: (
        bytes(header(b"a", len(held), kind) + block_of(held)) * 5000 + bytes(header(b"a.mp4", 0)) + bytes(1024)
    )


def pax(held: bytes) -> Callable[[], bytes]:
    return lambda: bytes(header(b"a", len(held), b"x") + block_of(held) + header(b"a.mp4", 0)) + bytes(1024)


def endless_sparse() -> bytes:
    return bytes(header(b"a.mp4", 0, b"S")[:482]) + b"\1" * (4 << 20)


@pytest.mark.parametrize(
    ("make", "samples", "message"),
    [
        (chain(b"x", record(b"path=b.mp4")), 1, ""),
        (chain(b"L", b"c.mp4"), 1, ""),
        (chain(b"g", b"9" * 400), 1, ""),
        (pax(b"9" * (1 << 20)), 0, "is no size|records that are none"),
        (pax(record(b"a=b") * 150_000), 1, ""),
        (pax(b"".join(record(b"k%d=v" % n) for n in range(50_000))), 1, ""),
        (pax(bytes(1 << 20)), 1, ""),
        (pax(b"7" * (2 << 20)), 0, "an extended header of 2097152 bytes"),
        (endless_sparse, 0, "no header|cut off"),
    ],
    ids=["pax_chain", "name_chain", "global_chain", "digits", "records", "keys", "zeros", "large", "sparse"],
)
def test_what_makes_parsers_hang_or_recurse_costs_little(make: Callable[[], bytes], samples: int, message: str) -> None:
    data = make()
    begin = time.process_time()
    found, damage = scanned(data)
    assert time.process_time() - begin < 2
    assert len(found) == samples
    if message:
        assert any(part in damage for part in message.split("|")), damage
    else:
        assert not damage


class Headers:
    """A tar of empty members that is never held: each header is made when it is read."""

    def __init__(self, count: int) -> None:
        self.length = count * 512
        self._at = 0
        template = header(b"0000000.mp4", 0)
        self._before, self._between, self._after = bytes(template[11:148]), b"\0 ", bytes(template[156:])
        self._sum = sum(template[11:148]) + sum(template[156:]) + 8 * 32

    def seek(self, at: int) -> int:
        self._at = at
        return at

    def read(self, size: int) -> bytes:
        assert size in (0, 512)
        if not size:
            return b""
        name = b"%07d.mp4" % (self._at // 512)
        return name + self._before + b"%06o\0 " % (self._sum + sum(name)) + self._after


def test_a_tar_of_a_hundred_thousand_empty_members_takes_little_time() -> None:
    stream = Headers(100_000)
    begin = time.process_time()
    count = sum(1 for _ in scan_tar(cast(BinaryIO, stream), "s.tar", stream.length, Counter()))
    assert count == 100_000
    assert time.process_time() - begin < 15


def test_members_are_not_held() -> None:
    small = Headers(3_000)
    gc.collect()
    tracemalloc.start()
    sum(1 for _ in scan_tar(cast(BinaryIO, small), "s.tar", small.length, Counter()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000 * 200  # the keys, to know one that returns


def test_size_fields_are_read_in_all_their_forms() -> None:
    for field in (b"00000000005\0", b"5", b"       5 \0", b"\x80" + (5).to_bytes(11, "big")):
        data = header(b"a.mp4", 0)
        put(data, 0, "size", field)
        ((sample,), damage) = scanned(bytes(data) + block_of(b"12345") + bytes(1024))
        assert (sample.members, damage) == ({"mp4": (512, 5)}, "")
    for field in (b"-0000000005\0", b"0o5", b"8", b"\xff" * 12, b"1_0"):
        put(data, 0, "size", field)
        assert scanned(bytes(data) + block_of(b"12345") + bytes(1024)) == ([], scanned(bytes(data) + bytes(1024))[1])
        assert "is no size" in scanned(bytes(data))[1]


def test_old_tars_with_sums_of_signed_bytes_are_read() -> None:
    data = header("ü.mp4".encode(), 0)
    signed = sum(byte - 256 * (byte > 127) for byte in [*data[:148], *b" " * 8, *data[156:]])
    data[148:156] = b"%06o\0 " % signed
    ((sample,), _) = scanned(bytes(data) + bytes(1024))
    assert sample.key == "ü"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_any_json_gives_fields_that_an_index_holds(document: bytes, tmp_path: Path) -> None:
    fine = json.dumps({"n": 1.5}).encode()
    members = [(f"{i}.{e}", d) for i, j in enumerate((document, fine)) for e, d in (("mp4", b"x"), ("json", j))]
    (tmp_path / "0.tar").write_bytes(plain(*members))
    built = build_index(str(tmp_path))
    index = open_index([str(tmp_path)])
    assert built.samples == 2
    assert index[1].meta["n"] in (1.5, "1.5")
    for name, value in index[0].meta.items():
        assert isinstance(value, float | bool | str)
        json.dumps([name, value], allow_nan=False).encode()
    read_caption({"json": document}).encode()


@pytest.mark.parametrize("text", CAPTIONS)
def test_any_bytes_are_a_caption(text: bytes) -> None:
    read_caption({"txt": text}).encode()


class Refusing(io.BytesIO):
    """Gives the first bytes, and says then that there will be no more."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= 512:
            raise UserError("the store says no")
        return super().read(size)


@pytest.mark.parametrize("name", ["a.json", "a.txt"])
def test_what_a_store_refuses_is_no_damage(name: str) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    left_out: Counter[str] = Counter()
    with pytest.raises(UserError, match=r"^the store says no$") as refused:
        list(scan_tar(Refusing(data.getvalue()), "a.tar", len(data.getvalue()), left_out))
    assert not isinstance(refused.value, DamagedShard)
    assert not left_out
