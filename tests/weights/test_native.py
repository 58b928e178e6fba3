from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lvdm.errors import UserError
from lvdm.weights.native import Weights, copy_weights, load_into, read_model, save_model

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
