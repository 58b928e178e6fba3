"""Files of torch that are damaged: one error that names the file, whatever torch makes of them."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import pytest
import torch

from lvdm.errors import UserError
from lvdm.weights.torch_file import read_tensors


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("archive", [True, False])
def test_three_hundred_damaged_files_raise_one_kind_of_error(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.randn(4, 3), "b": torch.ones(())}, path, _use_new_zipfile_serialization=archive)
    kept, draw, refused = path.read_bytes(), random.Random(3), 0
    for number in range(300):
        if archive and number % 2:
            path.write_bytes(kept)
            spoil_pickle(path, draw)
        else:
            data = bytearray(kept)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data[: draw.choice([len(data), len(data), draw.randrange(len(data))])])
        said = refusal(path)
        refused += bool(said)
        assert not said or str(path) in said
        assert "\n" not in said
    assert refused > 100


def refusal(path: Path) -> str:
    """What is said of a file that is refused; empty of one that is read."""
    try:
        read_tensors(path)
    except UserError as error:
        return str(error)
    return ""


def spoil_pickle(path: Path, draw: random.Random) -> None:
    """Change bytes of the pickle in an archive, whose checksums are then put right."""
    with zipfile.ZipFile(path) as archive:
        members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    for name, data in members.items():
        if name.endswith("data.pkl"):
            data[draw.randrange(len(data))] = draw.randrange(256)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, bytes(data))
