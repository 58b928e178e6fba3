"""Reading any range from pieces in any cut, and no more bytes than that takes."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

from lvdm.checkpoint import blocks, reader
from lvdm.checkpoint.blocks import BLOCK, Damaged, write_blocks
from lvdm.checkpoint.manifest import Network
from lvdm.checkpoint.pieces import FROZEN, KINDS, Piece
from lvdm.checkpoint.reader import Checkpoint, Near, check_shapes
from lvdm.errors import UserError
from tests.checkpoint.files import Parts, deal_out, make_tensors, read_all, same, write_checkpoint

LINE = {"model": Network(optimizer_step=1, shapes={"line": (12,)}, frozen=())}
WIDE = (8, 1 << 12)
"""A parameter of 128 KB: with its four kinds 512 KB, or 128 of the `SMALL` blocks."""
SMALL = 4096


def cut(cuts: tuple[int, ...], missing: tuple[str, int] | None = None) -> list[Parts]:
    """LINE, cut at these places; without the piece of ``missing`` kind and start."""
    tensors = make_tensors(0, LINE)
    return [
        [
            (Piece(kind, "model", "line", start, stop - start), tensors[kind, "model", "line"][start:stop])
            for kind in KINDS
            if (kind, start) != missing
        ]
        for start, stop in itertools.pairwise(cuts)
    ]


@pytest.mark.parametrize("cuts", [(0, 12), (0, 5, 12), (0, 1, 2, 11, 12), tuple(range(13))])
def test_any_range_is_read_from_pieces_in_any_cut(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    tensors = make_tensors(0, LINE)
    place = write_checkpoint(tmp_path, ranks=cut(cuts), networks=LINE)
    checkpoint = Checkpoint(place)
    checkpoint.verify()
    for kind in KINDS:
        for start in range(13):
            for stop in range(start, 13):
                out = torch.full((stop - start,), float("nan"))
                checkpoint.read(kind, "line", start, out)
                assert torch.equal(out, tensors[kind, "model", "line"][start:stop])
    for start, length in ((12, 1), (0, 13), (-1, 2), (100, 1)):
        with pytest.raises(Damaged, match=rf"master of line lacks elements from {start if start else 12}$"):
            checkpoint.read("master", "line", start, torch.empty(length))


def test_a_missing_piece_is_a_named_gap_where_it_is_needed_and_when_all_is_verified(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path, ranks=cut((0, 4, 8, 12), missing=("ema", 4)), networks=LINE))
    checkpoint.parameter("master", "line")
    checkpoint.read("ema", "line", 0, torch.empty(4))
    checkpoint.read("ema", "line", 8, torch.empty(4))
    for read in (lambda: checkpoint.parameter("ema", "line"), checkpoint.verify):
        with pytest.raises(Damaged, match=rf"{tmp_path}/step-00000001: ema of line lacks elements from 4$"):
            read()
    with pytest.raises(Damaged, match="holds no parameter 'other'"):
        checkpoint.parameter("ema", "other")
    with pytest.raises(Damaged, match="holds no network 'other', but model"):
        checkpoint.parameter("ema", "line", "other")


@pytest.mark.parametrize("seed", range(8))
def test_networks_and_frozen_parameters_in_random_cuts(tmp_path: Path, seed: int) -> None:
    tensors, world = make_tensors(seed), random.Random(seed).randint(1, 9)
    place = write_checkpoint(tmp_path, tensors=tensors, ranks=deal_out(tensors, world, seed))
    checkpoint = Checkpoint(place)
    told: list[tuple[int, int]] = []
    checkpoint.verify(lambda done, total: told.append((done, total)))
    size = sum(path.stat().st_size for path in Path(place).glob("rank-*"))
    assert told[-1] == (size, size)
    assert same(read_all(checkpoint), tensors)
    assert torch.equal(checkpoint.parameter("ema", "table"), tensors[FROZEN, "model", "table"])
    checkpoint.close()
    assert same(read_all(checkpoint), tensors)  # closed files are opened again


def wide(world: int, seed: int = 0) -> list[Parts]:
    """A large parameter in equal shares, as ZeRO cuts it, with a small one in front."""
    generator = torch.Generator().manual_seed(seed)
    whole = {kind: torch.randn(WIDE, generator=generator).flatten() for kind in KINDS}
    share = WIDE[0] * WIDE[1] // world
    ranks: list[Parts] = []
    for rank in range(world):
        parts: Parts = []
        for kind in sorted(KINDS):
            if rank == 0:
                parts.append((Piece(kind, "model", "bias", 0, 5), torch.arange(5.0)))
            start = rank * share
            parts.append((Piece(kind, "model", "wide", start, share), whole[kind][start : start + share]))
        ranks.append(parts)
    return ranks


WIDE_NETWORK = {"model": Network(optimizer_step=1, shapes={"bias": (5,), "wide": WIDE}, frozen=())}


@pytest.mark.parametrize("written", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 4])
def test_a_rank_reads_its_range_and_the_borders_of_blocks_alone(
    tmp_path: Path, written: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", SMALL)
    place = write_checkpoint(tmp_path, ranks=wide(written), networks=WIDE_NETWORK)
    whole = {piece.kind: tensor for piece, tensor in wide(1)[0] if piece.name == "wide"}
    share, total = WIDE[0] * WIDE[1] // world, sum(path.stat().st_size for path in Path(place).glob("rank-*"))
    for rank in range(world):
        checkpoint = Checkpoint(place, Near(rank, world))
        for kind in sorted(KINDS):
            out = torch.empty(share)
            checkpoint.read(kind, "wide", rank * share, out)
            assert torch.equal(out, whole[kind][rank * share : (rank + 1) * share])
        files = max(written // world, 1)
        borders = 2 * len(KINDS) if world > written else 0  # of a file read whole no block is read twice
        assert checkpoint.bytes_read <= total / world + (borders + 1) * files * SMALL
        used = [file.url for file in checkpoint._files if file.bytes_read]
        assert len(used) == files
        if world == written:
            assert used == [f"{place}/rank-{rank:05d}.safetensors"]


def test_a_quarter_of_a_large_parameter(tmp_path: Path) -> None:
    # 40 MB in ten blocks: one kind of a quarter
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(10 * BLOCK // 4, generator=generator)
    network = {"model": Network(optimizer_step=1, shapes={"large": tuple(large.shape)}, frozen=("large",))}
    place = write_checkpoint(
        tmp_path, ranks=[[(Piece(FROZEN, "model", "large", 0, large.numel()), large)]], networks=network
    )
    quarter = large.numel() // 4
    for rank in range(4):
        checkpoint = Checkpoint(place, Near(rank, 4))
        out = torch.empty(quarter)
        checkpoint.read(FROZEN, "large", rank * quarter, out)
        assert torch.equal(out, large[rank * quarter : (rank + 1) * quarter])
        assert checkpoint.bytes_read <= quarter * 4 + 2 * BLOCK + BLOCK  # the range, its borders and the header


def test_damage_is_found_where_it_is_read_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", SMALL)
    place = write_checkpoint(tmp_path, ranks=wide(1), networks=WIDE_NETWORK)
    path = Path(place, "rank-00000.safetensors")
    with open(path, "r+b") as file:
        file.seek(50 * SMALL + 5)
        byte = file.read(1)
        file.seek(50 * SMALL + 5)
        file.write(bytes([byte[0] ^ 1]))
    checkpoint = Checkpoint(place)
    checkpoint.parameter("ema", "wide")  # the first 33 blocks
    message = r"rank-00000.safetensors has changed since it was written \(SHA-256 of block 50 differs\)"
    with pytest.raises(Damaged, match=message):
        checkpoint.parameter("exp_avg", "wide")
    with pytest.raises(Damaged, match=message):
        checkpoint.verify()


def test_block_files_read_any_range_in_runs_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 16)
    rng = random.Random(3)
    for url in (str(tmp_path / "file"), "memory://blocks/file"):
        data = rng.randbytes(16 * 21 + 5)
        digests = write_blocks(url, memoryview(data))
        assert len(digests) == 22
        for _ in range(300):
            start, end = sorted(rng.choices(range(len(data) + 1), k=2))
            file = blocks.BlockFile(url, len(data), digests)
            assert file.read(start, end) == data[start:end]
            assert file.bytes_read <= end - start + 30
            file.close()


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MOST_OPEN", 3)
    tensors = make_tensors(2)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, ranks=deal_out(tensors, 9), tensors=tensors))
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert same(read_all(checkpoint), tensors)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 3
    assert sum(len(file._cut[1]) > 0 for file in checkpoint._files) == 3  # and no more blocks in memory
    checkpoint.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_checkpoint_of_another_model_is_refused_by_its_differences() -> None:
    stored = {"a": (2, 3), "b": (4,), "old": (1,)}
    wanted = {"a": (2, 3), "b": (5,), "new": (1,)}
    message = r"is of another model .*1 missing: new; 1 unexpected: old; 1 of another shape: b \(4,\) instead of \(5,\)"
    with pytest.raises(UserError, match=message):
        check_shapes(stored, wanted, "runs/x")
    check_shapes(stored, stored, "runs/x")
