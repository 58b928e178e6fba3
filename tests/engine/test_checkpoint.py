"""Checkpoint folders: pieces in any cut, complete or absent, and what is said of damaged ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from lvdm.engine.checkpoint import (
    Checkpoint,
    Damaged,
    Manifest,
    check_shapes,
    delete_old,
    newest_complete,
    open_checkpoint,
    partial_folder,
    piece_key,
    publish,
    write_rank_file,
)
from lvdm.errors import UserError

WEIGHT = torch.arange(12.0).reshape(3, 4)
BIAS = torch.arange(5.0)


def write(root: Path, step: int = 1, cuts: tuple[int, ...] = (0, 5, 12)) -> Path:
    """A checkpoint of WEIGHT, cut at ``cuts`` over as many ranks, and BIAS, whole on rank 0."""
    partial, final = partial_folder(root, step)
    partial.mkdir(parents=True)
    files = {}
    for rank, (start, stop) in enumerate(itertools.pairwise(cuts)):
        pieces = {piece_key("ema", start, "block.weight"): WEIGHT.flatten()[start:stop]}
        if rank == 0:
            pieces[piece_key("ema", 0, "bias")] = BIAS
        entry = write_rank_file(partial, rank, pieces)
        files[entry.pop("name")] = entry
    shapes = {"block.weight": (3, 4), "bias": (5,)}
    publish(partial, final, Manifest(step, step, {"step": step}, {}, {}, {}, shapes, [], files))
    return final


@pytest.mark.parametrize("cuts", [(0, 12), (0, 5, 12), (0, 1, 2, 11, 12)])
def test_any_range_is_read_from_pieces_in_any_cut(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    checkpoint = Checkpoint(write(tmp_path, cuts=cuts))
    for start in range(12):
        for stop in range(start + 1, 13):
            read = checkpoint.read("ema", "block.weight", start, stop - start)
            assert torch.equal(read, WEIGHT.flatten()[start:stop])
    assert torch.equal(checkpoint.parameter("ema", "block.weight"), WEIGHT)
    assert torch.equal(checkpoint.parameter("ema", "bias"), BIAS)
    with pytest.raises(Damaged, match="master of bias lacks elements from 0"):
        checkpoint.parameter("master", "bias")


def test_a_missing_piece_is_a_named_gap(tmp_path: Path) -> None:
    folder = write(tmp_path, cuts=(0, 4, 8, 12))
    tree = json.loads((folder / "manifest.json").read_text())
    del tree["files"]["rank-00001.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(Damaged, match=r"ema of block.weight lacks elements from 4"):
        Checkpoint(folder).parameter("ema", "block.weight")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "rank-00001.safetensors").unlink(), "rank-00001.safetensors is missing"),
        (lambda folder: truncate(folder / "rank-00000.safetensors"), "rank-00000.safetensors has .* bytes, not"),
        (lambda folder: flip(folder / "rank-00000.safetensors"), "has changed since it was written"),
        (lambda folder: (folder / "manifest.json").unlink(), "the checkpoint was never completed"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": "x"}'), "manifest.json"),
    ],
)
def test_damage_is_named_and_the_newest_good_one_is_found(tmp_path: Path, spoil, message: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    spoil(bad)
    found, faults = newest_complete(tmp_path)
    assert found is not None
    assert found.folder == good
    assert len(faults) == 1
    with pytest.raises(UserError, match=message):
        open_checkpoint(bad)


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / ".step-00000009.partial").mkdir()
    delete_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003"


def test_a_checkpoint_of_another_model_is_refused_by_its_differences() -> None:
    stored = {"a": (2, 3), "b": (4,), "old": (1,)}
    wanted = {"a": (2, 3), "b": (5,), "new": (1,)}
    message = r"is of another model .*1 missing: new; 1 unexpected: old; 1 of another shape: b \(4,\) instead of \(5,\)"
    with pytest.raises(UserError, match=message):
        check_shapes(stored, wanted, "runs/x")
    check_shapes(stored, stored, "runs/x")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
