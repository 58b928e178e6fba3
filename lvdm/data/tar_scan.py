"""Find the samples of a tar without reading their bytes: headers and ``.json`` members alone.

Shards come from anywhere, so nothing in them is believed: sizes that are negative or run past the end, links, devices,
names that lead out of the tar, keys that return after others. What cannot be a sample is left out and counted.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from lvdm.errors import UserError

_JSON_LIMIT = 1 << 20  # metadata beyond this is not worth reading
_MOST_MEMBERS = 100  # of one sample
_FORGET = 1000  # members after which tarfile's own list of them is emptied


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
    meta: dict[str, Any] = field(default_factory=dict)
    """What its ``.json`` holds, if that is an object."""


def scan_tar(stream: BinaryIO, url: str, length: int, left_out: Counter[str]) -> Iterator[Scanned]:
    """The samples of one uncompressed tar: neighbouring files whose names agree up to the first dot.

    Args:
        stream: the shard; it is read forwards, with seeks over what members hold.
        url: names the shard in errors.
        length: bytes of the shard.
        left_out: counts, by reason, members and samples that are none.
    Raises:
        UserError: the shard is no whole tar.
    """
    current: Scanned | None = None
    seen: set[str] = set()
    for member, data_end in _members(stream, url, length):
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
            current = Scanned(key, member.offset)
        if extension in current.members:
            left_out["extension given twice in a sample"] += 1
            continue
        if len(current.members) >= _MOST_MEMBERS:
            left_out[f"more than {_MOST_MEMBERS} members in a sample"] += 1
            continue
        current.members[extension] = (member.offset_data, member.size)
        current.size = data_end - current.offset
        if extension == "json" and member.size <= _JSON_LIMIT:
            here = stream.tell()
            stream.seek(member.offset_data)
            current.meta = _json_object(stream.read(member.size))
            stream.seek(here)
    if current is not None:
        yield current


def _members(stream: BinaryIO, url: str, length: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Members in the order of the file with the end of their data; sizes are held against the file's."""
    end = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                data_end = member.offset_data + (member.size if member.isreg() else 0)
                if member.size < 0 or member.offset < end or data_end > length:
                    raise tarfile.ReadError(f"member {member.name[:100]!r} has an impossible size")
                end = data_end
                yield member, data_end
                if len(tar.members) > _FORGET:  # type: ignore[attr-defined]
                    tar.members = []  # type: ignore[attr-defined]  # a million members must not stay in memory
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        raise UserError(
            f"shard {url} is not a whole tar file ({error}); replace it, or remove it and index again"
        ) from None


def _why_not(member: tarfile.TarInfo) -> str:
    """Why a member is no part of a sample; empty if it is."""
    if member.isdir():
        return "folder"
    if not member.isreg() or member.issparse():
        return "link, device or other special file"
    folder, _, base = member.name.rpartition("/")
    if member.name.startswith("/") or ".." in folder.split("/"):
        return "name that leads out of the tar"
    stem, dot, _ = base.partition(".")
    return "" if stem and dot else "name without an extension"


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
