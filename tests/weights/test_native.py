from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lvdm.errors import UserError
from lvdm.weights.conversion import LazyTensor
from lvdm.weights.native import (
    Weights,
    Writing,
    check_written,
    copy_weights,
    load_into,
    read_model,
    save_model,
    write_safetensors,
)

CONFIG = {"model": {"kind": "text_unet"}, "weights": "ema", "provenance": {"step": 3}}


def network(out: int = 2) -> nn.Module:
    torch.manual_seed(out)
    return nn.Sequential(nn.Linear(3, out), nn.BatchNorm1d(out))


def test_round_trip(tmp_path):
    model = network()
    save_model(tmp_path / "a" / "export", model.state_dict(), CONFIG)
    document, weights = read_model(tmp_path / "a" / "export")
    assert document == {"format": "lvdm", "version": 1, **CONFIG}
    assert weights.keys() == model.state_dict().keys()
    fresh = network()
    nn.init.zeros_(fresh[0].weight)
    load_into(fresh, tmp_path / "a" / "export")
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
        assert torch.equal(weights[name], tensor)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["export"]


def test_streamed_file_is_what_the_library_reads(tmp_path):
    tensors = {
        "odd.bf16": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "empty": torch.zeros(0, 4),
        "count": torch.tensor([1, 2**40]),
    }
    save_model(tmp_path / "export", ((name, tensor) for name, tensor in tensors.items()), CONFIG)
    read = load_file(tmp_path / "export" / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match="already exists"):
        save_model(tmp_path / "export", {}, CONFIG)
    assert list((tmp_path / "export").iterdir()) == []


def test_a_failing_export_leaves_nothing(tmp_path):
    def tensors():
        yield "a", torch.zeros(3)
        raise RuntimeError("a fragment is gone")

    with pytest.raises(RuntimeError, match="fragment"):
        save_model(tmp_path / "export", tensors(), CONFIG)
    with pytest.raises(ValueError, match="a comes twice"):
        save_model(tmp_path / "export", [("a", torch.zeros(1)), ("a", torch.zeros(1))], CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_another_models_weights_are_named_and_not_copied(tmp_path):
    state = {"0.weight": torch.zeros(5, 3), "0.bias": torch.zeros(2), "extra": torch.zeros(1)}
    save_model(tmp_path / "export", state, CONFIG)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_into(model, tmp_path / "export")
    message = str(error.value)
    assert "\n" not in message
    assert "2 missing (1.weight, 1.bias)" in message
    assert "1 unexpected (extra)" in message
    assert "1 of another shape (0.weight [5, 3] for [2, 3])" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_copying_casts_to_the_modules_type(tmp_path):
    save_model(tmp_path / "export", nn.Linear(3, 2).state_dict(), CONFIG)
    model = nn.Linear(3, 2).bfloat16()
    _, weights = read_model(tmp_path / "export")
    copy_weights(model, weights, "export")
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight, weights["weight"].bfloat16())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "not an exported model"),
        ("{", "not valid JSON"),
        ('{"_class_name": "AutoencoderKL"}', "does not describe a model exported by lvdm"),
        (json.dumps({"format": "lvdm", "version": 2, "model": {}}), "version 2"),
        (json.dumps({"format": "lvdm", "version": 1, "model": {}}), "no weights at"),
    ],
)
def test_what_is_no_export_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        read_model(tmp_path)


def test_truncated_weights_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        Weights(path)


SIZES = {"a": 10, "b": 30, "c": 90, "d": 25, "e": 25}
"""Elements of fp32 tensors; files of up to 200 bytes hold a and b, c, d and e."""


@pytest.fixture
def sharded(tmp_path):
    """An export in three files."""
    state = {name: torch.arange(size, dtype=torch.float32) + ord(name) for name, size in SIZES.items()}
    save_model(tmp_path / "export", state, CONFIG, writing=Writing(shard_size=200, verify=True))
    return tmp_path / "export", state


def test_several_files_are_as_transformers_has_them_and_read_as_one(sharded, tmp_path):
    folder, state = sharded
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", *names, "model.safetensors.index.json"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    places = {"a": names[0], "b": names[0], "c": names[1], "d": names[2], "e": names[2]}
    assert index == {"metadata": {"total_size": 4 * sum(SIZES.values())}, "weight_map": places}
    assert [list(load_file(folder / name)) for name in names] == [["a", "b"], ["c"], ["d", "e"]]
    _, weights = read_model(folder)
    assert weights.shapes() == {name: (size,) for name, size in SIZES.items()}
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())
    save_model(tmp_path / "whole", state, CONFIG, parts={"part": folder}, writing=Writing(shard_size=720))
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    copied = read_model(tmp_path / "whole" / "part")[1]
    assert all(torch.equal(copied[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: places.update(a="../elsewhere.safetensors"), "which is no safetensors file beside it"),
        (lambda places: places.update(a="/etc/passwd"), "which is no safetensors file beside it"),
        (lambda places: places.update(a="config.json"), "which is no safetensors file beside it"),
        (lambda places: places.update(a=3), "which is no safetensors file beside it"),
        (lambda places: places.update(a="x\0.safetensors"), "which is no safetensors file beside it"),
        (lambda places: places.update(a=places["c"]), r"does not fit the files beside it: 1 tensors \(a\)"),
        (lambda places: places.update(f=places["c"]), r"does not fit the files beside it: 1 tensors \(f\)"),
        (lambda places: places.pop("b"), r"does not fit the files beside it: 1 tensors \(b\)"),
        (lambda places: places.update(a="none.safetensors"), "no weights at .*none.safetensors"),
        (lambda places: places.clear(), "it has no weight_map"),
    ],
)
def test_an_index_that_says_otherwise_is_refused(sharded, change, message):
    folder, _ = sharded
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        read_model(folder)


def test_types_that_are_not_used_are_named(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.int8)}, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=r"tensor b in file.safetensors is of type I8, not of F64, F32"):
        Weights(tmp_path / "file.safetensors").dtypes()


def test_tensors_and_weights_that_are_there_twice_are_refused(sharded):
    folder, state = sharded
    save_file({"c": state["c"], "a": state["a"]}, folder / "model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match=r"tensor a is in both model-00001-of-00003.safetensors and model-00002"):
        read_model(folder)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"holds both model.safetensors and model.safetensors.index.json"):
        read_model(folder)


@pytest.mark.parametrize("place", [0, 20, 200, -1, None])
def test_a_byte_that_reads_otherwise_than_it_was_written_is_found(tmp_path, place):
    lazy = {name: LazyTensor.of(torch.randn(50)) for name in ("one", "two")}
    path = tmp_path / "file.safetensors"
    write_safetensors(path, lazy)
    check_written(path, lazy)
    data = bytearray(path.read_bytes())
    if place is None:
        data += b"x"
    else:
        data[place] ^= 1
    path.write_bytes(data)
    what = {0: "the header", 20: "the header", 200: "tensor one", -1: "tensor two", None: "is longer than"}[place]
    with pytest.raises(UserError, match=what):
        check_written(path, lazy)
