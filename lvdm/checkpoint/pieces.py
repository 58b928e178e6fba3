"""The file of one rank: a safetensors file of pieces, addressed by name and place and not by rank or stage.

Its keys are ``KIND:START:NETWORK/PARAMETER``. KIND is ``master`` (fp32 weights), ``exp_avg``, ``exp_avg_sq`` or
``ema``, or ``frozen`` for a parameter that does not learn; START is the piece's first element in the
flattened parameter. All are fp32 vectors. All pieces of a kind lie together, so that an export reads its kind alone.
"""

from __future__ import annotations

import json
import operator
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lvdm.checkpoint.blocks import BlockFile, Damaged

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
"""What is stored of every element that learns."""
FROZEN = "frozen"
ELEMENT = 4
"""Bytes of an element."""
_KEY = re.compile(rf"({'|'.join((*KINDS, FROZEN))}):(0|[1-9][0-9]{{0,18}}):([a-z_]+)/(\S+)")
_MAX_HEADER = 100_000_000  # bytes; what the safetensors library takes
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_BY_PLACE = operator.attrgetter("offset", "length")


@dataclass(frozen=True)
class Piece:
    """Elements ``[start, start + length)`` of the flattened parameter ``name`` of ``network``."""

    kind: str
    network: str
    name: str
    start: int
    length: int

    @property
    def key(self) -> str:
        """Its key in the file."""
        return f"{self.kind}:{self.start}:{self.network}/{self.name}"


class StoredPiece(NamedTuple):
    """A piece and the byte of its file at which it begins."""

    kind: str
    network: str
    name: str
    start: int
    length: int
    offset: int


def lay_out(pieces: Sequence[Piece]) -> tuple[bytes, list[int], int]:
    """Header of a file of ``pieces`` in their order, the byte at which each begins, and the size of the file."""
    entries: dict[str, Any] = {_METADATA: {"format": "pt"}}
    place, places = 0, []
    for piece in pieces:
        size = piece.length * ELEMENT
        entries[piece.key] = {"dtype": "F32", "shape": [piece.length], "data_offsets": [place, place + size]}
        places.append(place)
        place += size
    assert len(entries) == len(pieces) + 1, "a piece comes twice"
    text = _spelt(entries)
    header = _LENGTH.pack(len(text)) + text
    return header, [len(header) + place for place in places], len(header) + place


def read_pieces(file: BlockFile) -> list[StoredPiece]:
    """What a rank's file holds, by its header. Raises `Damaged` unless every byte of the file belongs to one piece."""
    try:
        (length,) = _LENGTH.unpack(file.read(0, min(_LENGTH.size, file.size)))
        if length > min(_MAX_HEADER, file.size - _LENGTH.size):
            raise ValueError(f"a header of {length} bytes")
        begin = _LENGTH.size + length
        text = bytes(file.read(_LENGTH.size, begin))
        entries = json.loads(text)
        found = [_piece(key, entry, begin) for key, entry in entries.items() if key != _METADATA]
        if _spelt(entries) != text:  # as where a key comes twice
            raise ValueError("its header is not spelt as one")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise Damaged(f"{file.url} is no file of a checkpoint: {type(error).__name__}: {str(error)[:300]}") from None
    found.sort(key=_BY_PLACE)
    end = begin
    for piece in found:
        if piece.offset != end:
            raise Damaged(f"{file.url}: {piece.kind} of {piece.name} begins at byte {piece.offset}, not at {end}")
        end += piece.length * ELEMENT
    if end != file.size:
        raise Damaged(f"{file.url}: its pieces end at byte {end} of {file.size}")
    return found


def _piece(key: str, entry: dict[str, Any], begin: int) -> StoredPiece:
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"key {key[:300]!r}")
    kind, start, network, name = match.groups()
    (length,) = entry["shape"]
    first, last = entry["data_offsets"]
    if not (type(length) is type(first) is type(last) is int and length >= 0 and first >= 0):  # true is no number
        raise ValueError(f"{length!r}, {first!r} or {last!r} is no count")
    if entry["dtype"] != "F32" or last - first != length * ELEMENT:
        raise ValueError(f"{last - first} bytes of {entry['dtype']!r} for {length} elements of {name}")
    return StoredPiece(kind, network, name, int(start), length, begin + first)


def _spelt(entries: dict[str, Any]) -> bytes:
    """The header's JSON, with blanks that keep the tensors aligned."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
