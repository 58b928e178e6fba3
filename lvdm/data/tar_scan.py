"""Find the samples of a tar without reading their bytes: headers and ``.json`` members alone.

Shards come from anywhere, so nothing in them is believed: sizes that are negative or run past the end, links, devices,
names that lead out of the tar, keys that return after others. What cannot be a sample is left out and counted.

Headers are parsed here: on some damaged ones Python's ``tarfile`` stops as if the tar ended, allocates what they ask
for, or does not return, and it is several times slower.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from lvdm.data.images import frame_number
from lvdm.errors import UserError

MOST_MEMBERS = 100
"""Of one sample, its numbered frames aside."""
MOST_FRAMES = 10_000
"""Numbered frames of one sample."""
_JSON_LIMIT = 16 << 20  # metadata beyond this is not worth reading
_HEADER_LIMIT = 1 << 20  # bytes of a long name or other extended header
_BLOCK = 512
_EXTENDS = frozenset((b"x", b"X", b"g", b"L", b"K"))
_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))  # whatever size their headers give
_KINDS = {b"0": "", b"\0": "", b"7": "", b"5": "folder", b"1": "link", b"2": "link", b"S": "sparse file"}
_KINDS |= dict.fromkeys((b"3", b"4", b"6"), "device or pipe")


class DamagedShard(UserError):
    """A shard that cannot be read, or not from some byte on."""


@dataclass
class Scanned:
    """One sample of a tar."""

    key: str
    """Names of its members up to the first dot of the base name."""
    offset: int
    """First byte of its range in the shard: the header of its first member."""
    size: int = 0
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset in the shard and size of each member, by lower-case extension."""
    frames: int = 0
    """How many of the members are numbered frames."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What its ``.json`` holds, if that is an object."""

    @property
    def failed(self) -> bool:
        """Whether its ``.json`` records that it could not be made, as video2dataset's does: it is no sample then."""
        return str(self.meta.get("status")).startswith("failed")


class _Member(NamedTuple):
    name: str
    start: int
    """The first of its headers."""
    offset: int
    """Its data."""
    size: int
    special: str
    """What it is if it is no plain file."""


def scan_tar(stream: BinaryIO, url: str, length: int, left_out: Counter[str]) -> Iterator[Scanned]:
    """The samples of one uncompressed tar: neighbouring files whose names agree up to the first dot.

    Args:
        stream: the shard; it is read forwards, with seeks over what members hold.
        url: names the shard in errors.
        length: bytes of the shard.
        left_out: counts, by reason, members and samples that are none.
    Raises:
        DamagedShard: what follows cannot be read; the sample that the damage may have cut is left out.
        UserError: the store serves no ranges.
        OSError: the stream does not give what it should.
    """
    current: Scanned | None = None
    seen: set[str] = set()
    members = _members(stream, length)
    while True:
        try:
            member = next(members, None)
        except UserError:  # of the store, and no damage
            raise
        except ValueError as error:
            if current is not None:
                left_out["sample next to the damage of its shard"] += 1
            raise DamagedShard(f"shard {url} is damaged {error}; replace it and index again") from None
        if member is None:
            break
        reason = _why_not(member)
        if reason:
            left_out[reason] += 1
            continue
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        if current is None or key != current.key:
            if current is not None:
                yield current
            current = None
            if key in seen:
                left_out["key returns after others"] += 1
                continue
            seen.add(key)
            current = Scanned(key, member.start)
        reason = _too_much(current, extension)
        if reason:
            left_out[reason] += 1
            continue
        current.frames += frame_number(extension) is not None
        current.members[extension] = (member.offset, member.size)
        current.size = member.offset + member.size - current.offset
        if extension == "json":
            current.meta = _json_object(stream, member, left_out)
    if current is not None:
        yield current


def _members(stream: BinaryIO, length: int) -> Iterator[_Member]:
    """All entries in the order of the file. Raises `ValueError` where it is no tar, or no more."""
    at = start = 0
    name: bytes | None = None
    records: dict[bytes, bytes] = {}
    while (block := _read(stream, at, _BLOCK, length)).strip(b"\0"):
        where = f"at byte {at}"
        if len(block) < _BLOCK:
            raise ValueError(f"{where}: it is cut off inside a header")
        if not _checksum_fits(block):
            raise ValueError(f"{where}: that is no header of a tar")
        kind, size = block[156:157], _number(block[124:136], where)
        data = at + _BLOCK
        if kind in _EXTENDS:
            if size > _HEADER_LIMIT:
                raise ValueError(f"{where}: an extended header of {size} bytes")
            held = _read(stream, data, size, length)
            if len(held) < size:
                raise ValueError(f"{where}: it is cut off inside an extended header")
            if kind == b"L":
                name = held.split(b"\0", 1)[0]
            elif kind != b"g" and kind != b"K":
                records |= _records(held, where)
            at = data + _padded(size)
            continue
        while kind == b"S" and _continues(stream, at, data, length):
            data += _BLOCK
        if b"size" in records:
            size = _decimal(records[b"size"], where)
        text = records.get(b"path", name if name is not None else _short_name(block)).decode(
            "utf-8", "backslashreplace"
        )
        special = _KINDS.get(kind, "other special file")
        if kind == b"\0" and text.endswith("/"):
            special = "folder"
        if any(record.startswith(b"GNU.sparse.") for record in records):
            special = "sparse file"
        size = 0 if kind in _WITHOUT_DATA else size
        at = data + _padded(size)
        if data + size > length:
            raise ValueError(f"{where}: {text[:100]!r} of {size} bytes reaches past the end of the file")
        yield _Member(text, start, data, size, special)
        start, name, records = at, None, {}
    if not length:
        raise ValueError("at byte 0: it is empty")
    if start != at:
        raise ValueError(f"at byte {at}: it is cut off behind an extended header")
    if at > length:
        raise ValueError(f"at byte {length}: it is cut off inside a block")


def _read(stream: BinaryIO, at: int, size: int, length: int) -> bytes:
    """Bytes of the shard, fewer where it ends."""
    size = max(min(size, length - at), 0)
    try:
        stream.seek(min(at, length))
        data = stream.read(size)
    except UserError:
        raise
    except ValueError as error:  # as fsspec says it of a web server
        raise UserError(f"the store does not serve ranges: {error}") from None
    if len(data) != size:
        raise OSError(f"{len(data)} bytes came instead of {size}")
    return data


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _checksum_fits(block: bytes) -> bool:
    """Whether the sum of a header, with spaces for the sum itself, is what it says; old tars add signed bytes."""
    try:
        stored = int(block[148:156].split(b"\0", 1)[0], 8)
    except ValueError:
        return False
    rest = block[:148] + block[156:]
    total = sum(rest) + 8 * ord(" ")
    return stored == total or stored == total - 256 * sum(byte > 127 for byte in rest)


def _number(digits: bytes, where: str) -> int:
    """Octal digits, or a number in base 256 after a byte of 128."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0", 1)[0].strip()
    if text.strip(b"01234567"):
        raise ValueError(f"{where}: {digits!r} is no size")
    return int(text or b"0", 8)


def _decimal(digits: bytes, where: str) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError(f"{where}: {digits[:20]!r} is no size")
    return int(digits)


def _records(held: bytes, where: str) -> dict[bytes, bytes]:
    """The records of a pax header, each ``LENGTH NAME=VALUE`` and a line feed."""
    found, at = {}, 0
    while held[at : at + 1].strip(b"\0"):
        space = held.find(b" ", at, at + 20)
        size = _decimal(held[at:space], where) if space > at else 0
        name, equals, value = held[space + 1 : at + size].partition(b"=")
        if not (size and equals and value.endswith(b"\n")):
            raise ValueError(f"{where}: an extended header of records that are none")
        found[name] = value[:-1]
        at += size
    return found


def _continues(stream: BinaryIO, at: int, data: int, length: int) -> bool:
    """Whether a header of an old sparse file at ``at`` goes on at ``data``, by the flag that its last block has."""
    flag = 482 if data == at + _BLOCK else 504
    block = _read(stream, data - _BLOCK, _BLOCK, length)
    return len(block) == _BLOCK and block[flag] != 0


def _short_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _why_not(member: _Member) -> str:
    """Why a member is no part of a sample; empty if it is."""
    if member.special:
        return member.special
    folder, _, base = member.name.rpartition("/")
    if member.name.startswith("/") or ".." in folder.split("/"):
        return "name that leads out of the tar"
    stem, dot, _ = base.partition(".")
    return "" if stem and dot else "name without an extension"


def _too_much(sample: Scanned, extension: str) -> str:
    """Why a sample takes no further member of this extension; empty if it does."""
    if extension in sample.members:
        return "extension given twice in a sample"
    if frame_number(extension) is not None:
        return f"more than {MOST_FRAMES} frames in a sample" if sample.frames >= MOST_FRAMES else ""
    others = len(sample.members) - sample.frames
    return f"more than {MOST_MEMBERS} members in a sample" if others >= MOST_MEMBERS else ""


def _json_object(stream: BinaryIO, member: _Member, left_out: Counter[str]) -> dict[str, Any]:
    """What a ``.json`` member holds; nothing if it is no object or too long, which is counted."""
    if member.size <= _JSON_LIMIT:
        data = _read(stream, member.offset, member.size, member.offset + member.size)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            return value
    left_out["fields of a json that is no object or too long"] += 1
    return {}
