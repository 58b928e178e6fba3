"""Small checkpoints for tests: two networks, frozen parameters, pieces cut anywhere over the files of several ranks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lvdm.checkpoint.blocks import write_blocks
from lvdm.checkpoint.folder import CheckpointFolder
from lvdm.checkpoint.manifest import Manifest, Network, StoredFile
from lvdm.checkpoint.pieces import FROZEN, KINDS, Piece, lay_out
from lvdm.checkpoint.reader import Checkpoint, step_name

NETWORKS = {
    "model": Network(
        optimizer_step=7,
        shapes={"block.weight": (3, 4), "bias": (5,), "conv.weight": (2, 3, 2, 2), "none": (0,), "table": (7, 2)},
        frozen=("table",),
    ),
    "discriminator": Network(optimizer_step=6, shapes={"head.weight": (4, 3), "head.scale": ()}, frozen=()),
}
Tensors = dict[tuple[str, str, str], torch.Tensor]
"""By kind, network and parameter."""
Parts = list[tuple[Piece, torch.Tensor]]


def make_tensors(seed: int = 0, networks: Mapping[str, Network] = NETWORKS) -> Tensors:
    """Random values for everything that a checkpoint of ``networks`` holds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, network, name): torch.randn(shape, generator=generator)
        for network, held in networks.items()
        for name, shape in held.shapes.items()
        for kind in ((FROZEN,) if name in held.frozen else KINDS)
    }


def deal_out(tensors: Tensors, world: int, seed: int = 0) -> list[Parts]:
    """Cut every parameter, all kinds alike, at random places, one piece for each rank; frozen ones are rank 0's."""
    rng = random.Random(seed)
    cuts: dict[tuple[str, str], list[int]] = {}
    ranks: list[Parts] = [[] for _ in range(world)]
    for (kind, network, name), tensor in tensors.items():
        size = tensor.numel()
        inner = sorted(rng.randint(0, size) for _ in range(world - 1))
        edges = cuts.setdefault((network, name), [0, *inner, size] if kind != FROZEN else [0, *[size] * world])
        for rank in range(world):
            start, stop = edges[rank], edges[rank + 1]
            if start < stop or (start, rank) == (0, 0):
                ranks[rank].append((Piece(kind, network, name, start, stop - start), tensor.flatten()[start:stop]))
    return ranks


def rank_file(parts: Parts) -> bytes:
    """The bytes of a rank's file."""
    header, _, _ = lay_out([piece for piece, _ in parts])
    return header + b"".join(tensor.contiguous().numpy().tobytes() for _, tensor in parts)


def write_checkpoint(
    root: str | Path,
    step: int = 1,
    tensors: Tensors | None = None,
    ranks: Sequence[Parts] | None = None,
    networks: Mapping[str, Network] = NETWORKS,
    **fields: Any,
) -> str:
    """Write and publish one as a run does; its folder. ``fields`` are fields of the manifest."""
    parts = ranks or deal_out(tensors or make_tensors(step), world=3, seed=step)
    return write_files(root, step, list(map(rank_file, parts)), networks, **fields)


def write_files(
    root: str | Path, step: int, files: Sequence[bytes], networks: Mapping[str, Network] = NETWORKS, **fields: Any
) -> str:
    """As `write_checkpoint`, of the ranks' files; needs no torch."""
    folder = CheckpointFolder(root)
    attempt = folder.begin(step, sum(map(len, files)))
    entries = {}
    for rank, data in enumerate(files):
        name = attempt.file_name(rank)
        digests = write_blocks(f"{attempt.place}/{name}", memoryview(data))
        entries[name] = StoredFile(size=len(data), sha256=tuple(digests))
    plain: dict[str, Any] = {"clock": {"samples": 10 * step}, "facts": {}, "scores": {}, "config": {}, "written_by": {}}
    folder.publish(attempt, Manifest(step=step, networks=dict(networks), files=entries, **plain | fields))
    return folder.location(step_name(step))


def read_all(checkpoint: Checkpoint) -> Tensors:
    """Every kind of every parameter."""
    return {
        (kind, network, name): checkpoint.parameter(kind, name, network)
        for network, held in checkpoint.manifest.networks.items()
        for name in held.shapes
        for kind in ((FROZEN,) if name in held.frozen else KINDS)
    }


def same(found: Tensors, expected: Tensors) -> bool:
    """Whether both are equal bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
