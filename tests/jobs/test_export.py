"""From a run's fragments to a folder that anybody can load, with nothing changed on the way."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.checkpoint.folder import open_checkpoint
from lvdm.checkpoint.manifest import Network
from lvdm.checkpoint.reader import Checkpoint
from lvdm.errors import UserError
from lvdm.inference import load
from lvdm.jobs.export import export_checkpoint
from lvdm.jobs.export_layout import export_layout
from lvdm.jobs.export_source import Choice
from lvdm.weights.native import Writing, read_model
from lvdm.weights.torch_file import read_tensors
from tests.checkpoint.files import deal_out, make_tensors, write_checkpoint
from tests.conftest import Toy
from tests.ranks import run_ranks
from tests.train.runs import averaged_output, probe, run

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools/export_checkpoint.py")


@pytest.fixture(scope="module")
def trained(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on two ranks in ZeRO-3, where the fragments of a parameter lie on both ranks."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(run, 2, toy.diffusion(folder, run__steps=2, run__save_every=1, engine__zero_stage=3))
    return folder


def test_exported_model_gives_the_output_of_the_run(toy: Toy, trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained, tmp_path / "export")
    model = load(tmp_path / "export", device="cpu")
    with torch.no_grad():
        actual = model.network(*probe(model.latent_shape, model.config.model.context_dim))
    (wanted,) = run_ranks(averaged_output, 1, toy.diffusion(trained, batch__size=1))
    assert torch.equal(actual, wanted)
    clips = model.sample(["a red circle", "a blue square"], seeds=[1, 2], steps=2)
    alone = model.sample(["a blue square"], seeds=[2], steps=2)
    assert clips.shape == (2, 4, 16, 16, 3)
    assert clips.dtype == torch.uint8
    assert (clips[1].int() - alone[0].int()).abs().max() <= 1


def test_live_and_averaged_weights_are_both_there_with_their_origin(trained: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trained)
    for weights, kind in (("ema", "ema"), ("live", "master")):
        export_checkpoint(trained, tmp_path / weights, Choice(weights))
        document, tensors = read_model(tmp_path / weights)
        assert tensors.keys() == checkpoint.network().shapes.keys()
        assert all(torch.equal(tensors[name], checkpoint.parameter(kind, name)) for name in tensors)
        assert document["weights"] == weights
        assert document["provenance"]["step"] == 2
        assert document["training"]["engine"]["zero_stage"] == 3
    assert (tmp_path / "ema" / "vae" / "model.safetensors").is_file()


def test_what_is_no_checkpoint_is_one_clear_error_and_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint to read in .*: there is none"):
        export_checkpoint(tmp_path, tmp_path / "export")
    with pytest.raises(UserError, match="exists"):
        export_checkpoint(trained, trained)
    copy = tmp_path / "step-00000002"
    shutil.copytree(open_checkpoint(trained).location, copy)
    manifest = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json").write_bytes(manifest.replace(b'"rank-00001', b'"../elsewhere'))
    with pytest.raises(UserError, match=r"manifest.json is damaged.*seal does not fit"):
        export_checkpoint(copy, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_model_without_text_samples_from_seeds_alone(toy: Toy, tmp_path: Path) -> None:
    tree = toy.diffusion(tmp_path / "run", run__steps=1, data__kind="video")
    del tree["text"]
    tree["model"] = {"kind": "space_time_unet", "model_channels": 8, "channel_mult": [1, 2], "res_blocks": 1,
                     "attention_levels": [1], "heads": 2, "norm_groups": 4}  # fmt: skip
    run_ranks(run, 1, tree)
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    model = load(tmp_path / "export", device="cpu")
    clips = model.sample(["", ""], seeds=[1, 2], steps=2)
    assert clips.shape == (2, 4, 16, 16, 3)
    assert not torch.equal(clips[0], clips[1])
    with pytest.raises(UserError, match="trained without text, so it takes no captions"):
        model.sample(["a red circle"], seeds=[1], steps=2)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1 to 3; the second is the best."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / "run/checkpoints", step, config={"model": {"kind": "test"}})
    (tmp_path / "run/checkpoints/best").write_text("step-00000002")
    return tmp_path / "run"


def spoil(checkpoint: str | Path, kind: str) -> None:
    """Change one byte of the last values of a kind in every file that has some."""
    for file in Path(checkpoint).glob("rank-*.safetensors"):
        data = bytearray(file.read_bytes())
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        stops = [entry["data_offsets"][1] for key, entry in header.items() if key.startswith(f"{kind}:")]
        if stops:
            data[8 + length + max(stops) - 1] ^= 1
            file.write_bytes(data)


def test_a_damaged_one_is_passed_over_in_a_run_and_an_error_where_it_was_named(three: Path, tmp_path: Path) -> None:
    """Nothing is read in advance: the damage shows when a part is written already."""
    newest = three / "checkpoints/step-00000003"
    spoil(newest, "ema")
    notes: list[str] = []
    done = export_checkpoint(three, tmp_path / "out", note=notes.append)
    assert done.checkpoints == [str(three / "checkpoints/step-00000002")]
    assert len(notes) == 1
    assert "passed over a damaged checkpoint: " in notes[0]
    assert f"{newest}/rank-0000" in notes[0]
    _, weights = read_model(tmp_path / "out")
    assert torch.equal(weights["block.weight"], make_tensors(2)["ema", "model", "block.weight"])
    assert torch.equal(weights["table"], make_tensors(2)["frozen", "model", "table"])

    with pytest.raises(UserError, match=r"checkpoint is damaged: .*step-00000003/rank-0000"):
        export_checkpoint(newest, tmp_path / "named")
    (three / "checkpoints/best").write_text("step-00000003")
    with pytest.raises(UserError, match=r"checkpoint is damaged: .*step-00000003/rank-0000"):
        export_checkpoint(three, tmp_path / "named", Choice(best=True))
    for step in (1, 2):
        spoil(three / f"checkpoints/step-0000000{step}", "ema")
    with pytest.raises(
        UserError, match=r"no checkpoint to read in .*: all are damaged: .*step-00000003.*step-00000001"
    ):
        export_checkpoint(three, tmp_path / "named")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_damage_that_shows_when_a_part_is_written_begins_anew_with_the_one_before(tmp_path: Path) -> None:
    networks = {"model": Network(optimizer_step=1, shapes={"first": (1 << 20,), "second": (1 << 20,)}, frozen=())}
    for step in (1, 2):
        tensors = make_tensors(step, networks)
        newest = write_checkpoint(tmp_path / "run", step, ranks=deal_out(tensors, world=1), networks=networks)
    spoil(newest, "ema")
    seen: list[int] = []
    export_checkpoint(tmp_path / "run", tmp_path / "out", progress=lambda done, total: seen.append(done))
    assert seen == [4 << 20, 4 << 20, 8 << 20]
    _, weights = read_model(tmp_path / "out")
    assert torch.equal(weights["second"], make_tensors(1, networks)["ema", "model", "second"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_no_more_is_read_than_the_weights(three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Checkpoint] = []
    close = Checkpoint.close
    monkeypatch.setattr(Checkpoint, "close", lambda self: (opened.append(self), close(self))[1])
    export_checkpoint(three, tmp_path / "out")
    size = sum(file.stat().st_size for file in (three / "checkpoints/step-00000003").glob("rank-*"))
    assert 0 < opened[-1].bytes_read <= size  # files smaller than a block are read once, whole


def test_casts_are_torchs_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    tensors = make_tensors(1)
    checkpoint = write_checkpoint(tmp_path / "run", 1, tensors)
    for dtype, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        export_checkpoint(checkpoint, tmp_path / dtype, dtype=dtype, writing=Writing(verify=True))
        document, weights = read_model(tmp_path / dtype)
        assert document["provenance"]["dtype"] == dtype
        for name, tensor in weights.items():
            held = tensors["frozen" if name == "table" else "ema", "model", name]
            assert torch.equal(tensor, held.to(wanted)), name
    tensors["ema", "model", "conv.weight"][1, 2, 0, 1] = -70000.0
    tensors["ema", "model", "bias"][2] = float("inf")  # it is infinite in fp16 too: no loss
    large = write_checkpoint(tmp_path / "run", 2, tensors)
    with pytest.raises(UserError, match=r"tensor conv.weight does not fit float16: it has a value of 7e\+04"):
        export_checkpoint(large, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    export_checkpoint(large, tmp_path / "out", dtype="bf16")


def test_means_are_of_the_newest_or_of_those_named_with_their_origins(three: Path, tmp_path: Path) -> None:
    export_checkpoint(three, tmp_path / "newest", Choice("live", average=2))
    other = write_checkpoint(tmp_path / "other", 9, make_tensors(9), config={"model": {"kind": "test"}})
    also = Choice(also=(other, str(three / "checkpoints/step-00000001")), best=True)
    export_checkpoint(three, tmp_path / "named", also)
    for folder, seeds, kind in (("newest", [3, 2], "master"), ("named", [2, 9, 1], "ema")):
        document, weights = read_model(tmp_path / folder)
        assert [origin["step"] for origin in document["provenance"]["mean_of"]] == seeds
        assert document["provenance"]["step"] == seeds[0]
        for name, tensor in weights.items():
            stored = "frozen" if name == "table" else kind
            exact = torch.stack([make_tensors(seed)[stored, "model", name].double() for seed in seeds]).mean(0)
            torch.testing.assert_close(tensor.double(), exact, rtol=6e-8, atol=1e-12)
    with pytest.raises(UserError, match="has 3 good checkpoints to average, not 4"):
        export_checkpoint(three, tmp_path / "out", Choice(average=4))
    with pytest.raises(UserError, match="is one checkpoint; --average takes a run"):
        export_checkpoint(other, tmp_path / "out", Choice(average=2))
    shapes = {"model": Network(optimizer_step=1, shapes={"bias": (6,)}, frozen=())}
    strange = write_checkpoint(tmp_path / "strange", 1, make_tensors(1, shapes), networks=shapes)
    with pytest.raises(UserError, match=r"of different models, so they have no mean: bias is \[5\] and \[6\]"):
        export_checkpoint(three, tmp_path / "out", Choice(also=(strange,)))
    with pytest.raises(UserError, match="step-00000003 would count twice in the mean"):
        export_checkpoint(three, tmp_path / "out", Choice(also=(f"{three}/../run/checkpoints/step-00000003",)))
    (three / "checkpoints/best").unlink()
    with pytest.raises(UserError, match="has no best checkpoint; a run has with validation"):
        export_checkpoint(three, tmp_path / "out", Choice(best=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": {"model": {"kind": "test", "heads": 2}}}, r"model.heads is 4 and 2"),
        ({"config": {"diffusion": {"parameterization": "v"}}}, r"diffusion.parameterization is eps and v"),
        ({"facts": {"scale": 0.5}}, r"facts.scale is 1.0 and 0.5"),
        ({"facts": {"scale": 1.0, "latent_shape": [4, 2, 8, 8]}, "config": {"diffusion": {"loss": "l1"}}}, ""),
    ],
)
def test_weights_of_another_meaning_have_no_mean(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    config = {"model": {"kind": "test", "heads": 4}, "diffusion": {"parameterization": "eps"}}
    facts = {"scale": 1.0, "latent_shape": [4, 2, 4, 4]}
    first = write_checkpoint(tmp_path / "one", config=config, facts=facts)
    other = {section: values | fields.get("config", {}).get(section, {}) for section, values in config.items()}
    second = write_checkpoint(tmp_path / "two", config=other, facts=fields.get("facts", facts))
    with pytest.raises(UserError, match=f"have no mean that would work: {message}") if message else nullcontext():
        export_checkpoint(first, tmp_path / "out", Choice(also=(second,)))


def test_an_export_is_no_source_of_one_and_an_url_no_target(three: Path, tmp_path: Path) -> None:
    export_checkpoint(three, tmp_path / "out")
    with pytest.raises(UserError, match="out is an exported model; give a run"):
        export_checkpoint(tmp_path / "out", tmp_path / "again")
    with pytest.raises(UserError, match="memory:/bucket/out is an URL; name a folder on this machine"):
        export_checkpoint(three, "memory://bucket/out")


def test_an_export_that_does_not_know_its_latents_says_so(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    for facts in ({}, config["facts"] | {"scale": None}, config["facts"] | {"latent_shape": [4, 2]}, None):
        (tmp_path / "out/config.json").write_text(json.dumps(config | {"facts": facts}))
        with pytest.raises(UserError, match=r"config.json does not say of which shape, scale and shift"):
            load(tmp_path / "out", device="cpu")


def test_the_copy_of_the_autoencoder_is_verified_too(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def spoilt(source: Path, target: Path) -> Path:
        data = bytearray(Path(source).read_bytes())
        data[-1] ^= 1
        target.write_bytes(data)
        return target

    monkeypatch.setattr(shutil, "copyfile", spoilt)
    with pytest.raises(UserError, match=r"the copy of .*autoencoder/config.json reads otherwise than it was written"):
        export_checkpoint(trained, tmp_path / "out", writing=Writing(verify=True))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "copyfile", copy)
    export_checkpoint(trained, tmp_path / "out", writing=Writing(verify=True))


def test_a_network_is_taken_by_its_name(three: Path, tmp_path: Path) -> None:
    export_checkpoint(three, tmp_path / "out", Choice("live", network="discriminator"))
    document, weights = read_model(tmp_path / "out")
    assert (document["model"], document["provenance"]["network"]) == ({"kind": "discriminator"}, "discriminator")
    assert weights.keys() == {"head.weight", "head.scale"}
    assert torch.equal(weights["head.scale"], make_tensors(3)["master", "discriminator", "head.scale"])
    with pytest.raises(UserError, match="holds no network critic; it holds model, discriminator"):
        export_checkpoint(three, tmp_path / "none", Choice(network="critic"))


def test_from_a_store(tmp_path: Path) -> None:
    for step in (4, 5):
        write_checkpoint("memory://exports-test/checkpoints", step)
    export_checkpoint("memory://exports-test/checkpoints", tmp_path / "newest")
    done = export_checkpoint("memory://exports-test/checkpoints/step-00000004", tmp_path / "named")
    assert done.checkpoints == ["memory://exports-test/checkpoints/step-00000004"]
    for folder, seed in (("newest", 5), ("named", 4)):
        assert torch.equal(read_model(tmp_path / folder)[1]["bias"], make_tensors(seed)["ema", "model", "bias"])


def test_a_layout_with_one_place_gets_the_weights_that_were_asked_for(toy: Toy, trained: Path, tmp_path: Path) -> None:
    run_ranks(run, 1, toy.autoencoder(tmp_path / "run", run__steps=1))
    tensors = {}
    for weights in ("ema", "live"):
        export_layout(tmp_path / "run", tmp_path / f"{weights}.ckpt", "lvdm-ae", Choice(weights))
        export_checkpoint(tmp_path / "run", tmp_path / weights, Choice(weights))
        export_layout(tmp_path / weights, tmp_path / f"{weights}_again.ckpt", "lvdm-ae", Choice(weights))
        tensors[weights], again = (read_tensors(tmp_path / f"{weights}{end}.ckpt") for end in ("", "_again"))
        assert tensors[weights].keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in tensors[weights].items())
    assert not all(torch.equal(tensor, tensors["live"][name]) for name, tensor in tensors["ema"].items())
    with pytest.raises(UserError, match="ema holds averaged weights alone; export the live ones of a run"):
        export_layout(tmp_path / "ema", tmp_path / "out.ckpt", "lvdm-ae", Choice("live"))
    with pytest.raises(UserError, match="as lvdm-t2v: the autoencoder is no AutoencoderKL"):
        export_layout(trained, tmp_path / "out.ckpt", "lvdm-t2v")
    assert not (tmp_path / "out.ckpt").exists()


def test_an_autoencoder_in_several_files_travels_along_and_is_loaded(
    toy: Toy, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export itself is in several files too; it gives what one of single files gives."""
    monkeypatch.chdir(tmp_path)
    run_ranks(run, 1, toy.autoencoder(tmp_path / "autoencoder", run__steps=1))
    small = Writing(shard_size=4000, verify=True)
    export_checkpoint(tmp_path / "autoencoder", tmp_path / "vae", writing=small)
    assert len(list((tmp_path / "vae").glob("model-*-of-*.safetensors"))) > 2
    export_checkpoint(tmp_path / "autoencoder", tmp_path / "vae_whole")
    clips = {}
    for name, writing in (("whole", Writing()), ("parts", Writing(shard_size=100_000))):
        export_checkpoint(trained, tmp_path / name, writing=writing)
        vae = tmp_path / ("vae" if name == "parts" else "vae_whole")
        shutil.rmtree(tmp_path / name / "vae")
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["training"]["vae"]["folder"] = str(vae)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        clips[name] = load(tmp_path / name, device="cpu").sample(["a red circle"], seeds=[1], steps=2)
    assert torch.equal(clips["whole"], clips["parts"])


SANDBOX = """
import resource, signal, sys
from pathlib import Path
from lvdm.errors import UserError
from lvdm.jobs.export import export_checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    export_checkpoint(sys.argv[1], Path(sys.argv[2]))
except UserError as error:
    print(error)
"""


def in_a_process(script: str, *arguments: str | Path, **env: str) -> str:
    """Standard output of a Python script in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_disk_that_takes_no_more_is_said_and_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    said = in_a_process(SANDBOX, trained, tmp_path / "out")
    assert said.strip() == f"cannot write {tmp_path / 'out'}: File too large"
    assert list(tmp_path.iterdir()) == []


MEASURED = """
import json, sys
from pathlib import Path
from lvdm.jobs.export import export_checkpoint
from lvdm.jobs.export_source import Choice
from lvdm.weights.native import Writing

def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return 1024 * int(line.split()[1])

small, large, twin, out = sys.argv[1:]
found = {}
for label, choice, options in (
    ("warm", Choice(), {}),
    ("plain", Choice(), {}),
    ("half", Choice(), {"dtype": "bf16", "writing": Writing(shard_size=20_000_000, verify=True)}),
    ("mean", Choice("live", also=(twin,)), {}),
):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = memory("VmRSS:")
    export_checkpoint(small if label == "warm" else large, f"{out}/{label}", choice, **options)
    found[label] = memory("VmHWM:") - before
print(json.dumps({"peaks": found, "deepspeed": "deepspeed" in sys.modules}))
"""


def test_memory_is_that_of_the_largest_tensor_and_deepspeed_is_not_imported(tmp_path: Path) -> None:
    """400 MB of state, of which a kind is 100 MB; the largest tensor has 16 MB."""
    shapes = {f"layer{n}.weight": (4096, 1024) if n % 6 == 0 else (1 << 19,) for n in range(24)}
    networks = {"model": Network(optimizer_step=1, shapes=shapes, frozen=())}
    ranks = deal_out(make_tensors(1, networks), world=1)
    large = write_checkpoint(tmp_path / "large", 1, ranks=ranks, networks=networks)
    small = write_checkpoint(tmp_path / "small", 1)
    twin = shutil.copytree(large, tmp_path / "twin/step-00000001", copy_function=os.link)
    found = json.loads(in_a_process(MEASURED, small, large, twin, tmp_path))
    largest = 16 << 20
    assert all(peak < 3 * largest for label, peak in found["peaks"].items() if label != "warm"), found
    assert found["deepspeed"] is False
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) == 4
    assert (tmp_path / "plain/model.safetensors").stat().st_size > 4 * largest


def test_command_with_everything_where_deepspeed_is_not_installed(three: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "deepspeed.py").write_text("raise ImportError('not installed')")
    options = ["--weights", "live", "--average", "2", "--dtype", "bf16", "--shard-size", "100B", "--verify"]
    done = subprocess.run(
        [sys.executable, TOOL, str(three), str(tmp_path / "out"), *options],
        env=os.environ | {"PYTHONPATH": f"{absent}:{ROOT}"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "live weights of the mean of 2 checkpoints, 0.0 MB in 2 files, read again and the same" in done.stdout
    _, weights = read_model(tmp_path / "out")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shard-size 5XB", "--shard-size '5XB' is no size such as 5GB or 500MB"),
        ("--shard-size 0", "is no size such as"),
        (f"--shard-size {'9' * 400}ZB", "is no size such as"),
        ("--average 0", "--average 0: give at least 1"),
        ("--average 2 --best", "give at least 1, and no --best beside more than 1"),
        ("--layout lvdm-short --dtype bf16", "has the types that LVDM's code reads; leave --dtype out"),
        ("--layout lvdm-short --shard-size 1GB", "is one file, which"),
        ("--layout sd-unet --network discriminator", "leave --network out"),
        ("--layout lvdm-short --weights live", "has both the averaged and the live weights; leave --weights out"),
    ],
)
def test_options_that_do_not_go_together(
    three: Path, tmp_path: Path, options: str, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["export_checkpoint.py", str(three), str(tmp_path / "out"), *options.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(TOOL, run_name="__main__")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
