"""From DeepSpeed's own checkpoint to a run of ours that goes on as DeepSpeed itself does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lvdm.checkpoint.folder import CheckpointFolder, open_checkpoint
from lvdm.config import BatchConfig, EngineConfig, LatentDiffusionTraining, parse_training_config
from lvdm.engine import distributed, saving
from lvdm.engine.engine import Engine
from lvdm.errors import UserError
from lvdm.jobs.export import export_checkpoint
from lvdm.jobs.import_deepspeed import Imported, import_deepspeed
from lvdm.weights.native import read_model
from tests.commands import call
from tests.conftest import Toy
from tests.engine import zero_cases
from tests.engine.zero_cases import BATCH, LR, MODEL, OPTIM
from tests.ranks import run_ranks
from tests.train.runs import log_of, run
from tests.weights.stock_deepspeed import FROZEN, MORE, STEPS, Case, network, train_cases

KINDS = ("master", "exp_avg", "exp_avg_sq")
CASES = {
    "2_fp32": Case(2, freeze=False, model=MODEL),
    "3_fp32": Case(3, freeze=False, groups=1, model=MODEL),
    "1_frozen": Case(1, bf16=True, wide=True, model=MODEL),
}


@pytest.fixture(scope="module")
def stock(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder of two ranks' checkpoints by DeepSpeed, and what its engines held."""
    folder = tmp_path_factory.mktemp("stock")
    return folder, run_ranks(train_cases, 2, CASES | {"toy": toy_case(toy)}, str(folder))[0]


def toy_case(toy: Toy) -> Case:
    config = parse_training_config(toy.diffusion(toy.folder / "run"), source="toy")
    return Case(2, freeze=False, model=config.model)  # type: ignore[arg-type]


def config_of(toy: Toy, case: str, **changes: Any) -> LatentDiffusionTraining:
    model = MODEL.model_dump(mode="json")
    if case == "1_frozen":
        names = {name.split(".")[0] for name, _ in network(MODEL).named_parameters()} - {FROZEN}
        model["trainable"] = [f"{name}.*" for name in sorted(names)]
    if case == "toy":
        model = toy.diffusion(toy.folder / "run")["model"]
    config = parse_training_config(toy.diffusion(Path("elsewhere"), model=model, **changes), source="test")
    assert isinstance(config, LatentDiffusionTraining)
    return config


def take(stock: tuple[Path, dict[str, Any]], toy: Toy, case: str, target: Path, **how: Any) -> Imported:
    """Import a case into a run folder, in small files."""
    return import_deepspeed(stock[0] / case, target, config_of(toy, case), **({"trust": True, "file_size": 5000} | how))


@pytest.mark.parametrize("case", CASES)
def test_every_number_arrives_to_the_bit(
    stock: tuple[Path, dict[str, Any]], toy: Toy, tmp_path: Path, case: str
) -> None:
    held, reported = stock[1][case], list[tuple[int, int]]()
    done = take(stock, toy, case, tmp_path / "run", progress=lambda *now: reported.append(now))
    assert done.location == str(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert (done.stage, done.ranks, done.step, done.kinds) == (int(case[0]), 2, 3, KINDS)
    checkpoint = open_checkpoint(tmp_path / "run")
    manifest, model = checkpoint.manifest, checkpoint.network()
    assert (manifest.step, manifest.samples, model.optimizer_step) == (3, 24, 3)
    assert manifest.written_by["deepspeed"] == done.version
    assert len(manifest.files) > 20
    assert reported[-1][0] == reported[-1][1] == sum(file.size for file in manifest.files.values())
    assert set(model.frozen) == held["frozen"].keys()
    assert list(model.shapes) == [name for name, _ in network(MODEL).named_parameters()]
    for kind in KINDS:
        for name, tensor in held[kind].items():
            assert torch.equal(checkpoint.parameter(kind, name), tensor), f"{kind} of {name}"
    for name in model.shapes:
        assert torch.equal(checkpoint.parameter("ema", name), (held["master"] | held["frozen"])[name])


def go_on(folder: str, stage: int, batch: int) -> dict[str, Any]:
    """The steps behind an import, by our engine."""
    ranks = distributed.start(60)
    engine = Engine(
        network(MODEL), EngineConfig(zero_stage=stage, precision="fp32"), BatchConfig(size=BATCH, micro=2), OPTIM, ranks
    )
    saving.restore({"model": engine}, saving.Resumption(CheckpointFolder(folder), ranks))
    losses = []
    for step in range(STEPS, STEPS + MORE):
        total = torch.zeros(())
        for parts in zero_cases.micro_batches(step, ranks.rank, ranks.world, 2):
            loss = zero_cases.loss_of(engine, parts, engine.dtype)
            engine.backward(loss)
            engine.step(LR)
            total += loss.detach() / engine.accumulation
        losses.append(float(distributed.sum_over_ranks(total)) / ranks.world)
    after = zero_cases.full(engine, "master")
    distributed.stop()
    return {"losses": losses, "after": after}


@pytest.mark.parametrize(("case", "world", "stage"), [("2_fp32", 2, 2), ("3_fp32", 2, 3), ("3_fp32", 1, 1)])
def test_training_goes_on_as_deepspeed_itself_does(
    stock: tuple[Path, dict[str, Any]], toy: Toy, tmp_path: Path, case: str, world: int, stage: int
) -> None:
    take(stock, toy, case, tmp_path / "run")
    found = run_ranks(go_on, world, str(tmp_path / "run" / "checkpoints"), stage, BATCH)[0]
    wanted = stock[1][case]
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    for name, tensor in wanted["after"].items():
        torch.testing.assert_close(found["after"][name], tensor, rtol=1e-6, atol=1e-7)


def test_the_command_makes_a_run_that_training_and_export_take(
    stock: tuple[Path, dict[str, Any]], toy: Toy, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    folder = tmp_path / "run"
    config.write_text(yaml.safe_dump(toy.diffusion(tmp_path / "elsewhere")))
    given = (stock[0] / "toy", folder, "--config", config, "--trust", "optim.lr=1e-4")
    done = call("tools/import_deepspeed.py", *given)
    assert done.returncode == 0, done.stderr
    assert "ZeRO-2 on 2 ranks" in done.stdout

    export_checkpoint(folder, tmp_path / "export")
    document, weights = read_model(tmp_path / "export")
    assert document["facts"].keys() == {"scale", "shift", "latent_shape"}
    held = stock[1]["toy"]["master"]
    assert all(torch.equal(weights[name], held[name]) for name in held)

    tree = toy.diffusion(folder, run__resume="must", run__steps=STEPS + 2)
    said = run_ranks(run, 1, tree)[0]
    assert "changed on resume: optim.lr: 0.0001 -> 0.001" in said
    assert [line["step"] for line in log_of(folder)] == [STEPS + 1, STEPS + 2]
    newest = open_checkpoint(folder)
    assert (newest.manifest.step, newest.network().optimizer_step) == (STEPS + 2, STEPS + 2)
    assert newest.manifest.samples == STEPS * BATCH + 2 * 4
    for name, tensor in held.items():
        assert 0 < (newest.parameter("master", name) - tensor).abs().max() < 0.01


def test_weights_alone_start_the_optimiser_anew(stock: tuple[Path, dict[str, Any]], toy: Toy, tmp_path: Path) -> None:
    done = take(stock, toy, "2_fp32", tmp_path / "run", weights_only=True)
    checkpoint = open_checkpoint(tmp_path / "run")
    assert done.kinds == ("master",)
    assert (checkpoint.manifest.step, checkpoint.network().optimizer_step) == (3, 0)
    for name, tensor in stock[1]["2_fp32"]["master"].items():
        assert torch.equal(checkpoint.parameter("master", name), tensor)
        assert not checkpoint.parameter("exp_avg", name).any()


def renamed(folder: Path, change: Any) -> None:
    """Save the model file again under other names of parameters."""
    path = folder / "global_step3" / "mp_rank_00_model_states.pt"
    tree = torch.load(path, weights_only=False)
    tree["param_shapes"] = [{change(name): shape for name, shape in group.items()} for group in tree["param_shapes"]]
    tree["module"] = {change(name): tensor for name, tensor in tree["module"].items()}
    torch.save(tree, path)


def test_a_prefix_is_taken_off(stock: tuple[Path, dict[str, Any]], toy: Toy, tmp_path: Path) -> None:
    shutil.copytree(stock[0] / "2_fp32", tmp_path / "wrapped")
    renamed(tmp_path / "wrapped", lambda name: f"module.{name}")
    import_deepspeed(tmp_path / "wrapped", tmp_path / "run", config_of(toy, "2_fp32"), trust=True)
    renamed(tmp_path / "wrapped", lambda name: name.replace("module.", "unet."))
    import_deepspeed(tmp_path / "wrapped", tmp_path / "other", config_of(toy, "2_fp32"), trust=True, prefix="unet.")
    with pytest.raises(UserError, match=r"108 missing: .*108 unexpected: unet\."):
        import_deepspeed(tmp_path / "wrapped", tmp_path / "none", config_of(toy, "2_fp32"), trust=True)
    with pytest.raises(UserError, match=r"--prefix vae.: no parameter in .* begins so; one is unet\."):
        import_deepspeed(tmp_path / "wrapped", tmp_path / "none", config_of(toy, "2_fp32"), trust=True, prefix="vae.")
    for name in ("run", "other"):
        checkpoint = open_checkpoint(tmp_path / name)
        for parameter, tensor in stock[1]["2_fp32"]["master"].items():
            assert torch.equal(checkpoint.parameter("master", parameter), tensor)


def test_what_does_not_fit_is_refused_and_nothing_is_written(
    stock: tuple[Path, dict[str, Any]], toy: Toy, tmp_path: Path
) -> None:
    target, source = tmp_path / "run", stock[0]
    with pytest.raises(UserError, match="a pickle from somebody else can be made to run code"):
        take(stock, toy, "2_fp32", target, trust=False)
    with pytest.raises(UserError, match="is of another model than the config describes"):
        import_deepspeed(source / "2_fp32", target, config_of(toy, "2_fp32", model__model_channels=16), trust=True)
    with pytest.raises(UserError, match=r"other parameters learnt than model.trainable says \(time_embed"):
        import_deepspeed(source / "1_frozen", target, config_of(toy, "2_fp32"), trust=True)
    with pytest.raises(UserError, match=r"other parameters learnt than model.trainable says \(time_embed"):
        import_deepspeed(source / "2_fp32", target, config_of(toy, "1_frozen"), trust=True)
    shutil.copytree(source / "3_fp32", tmp_path / "later")
    for path in (tmp_path / "later" / "global_step3").glob("*model_states.pt"):
        tree = torch.load(path, weights_only=False)
        torch.save(tree | {"global_steps": 7}, path)
    with pytest.raises(UserError, match="the optimiser has taken 3 steps and the run 7"):
        import_deepspeed(tmp_path / "later", target, config_of(toy, "3_fp32"), trust=True)
    shutil.copytree(source / "2_fp32", tmp_path / "plain")
    for path in (tmp_path / "plain" / "global_step3").glob("*optim_states.pt"):
        tree = torch.load(path, weights_only=False)
        for entry in tree["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            del entry["exp_avg"]
        torch.save(tree, path)
    with pytest.raises(UserError, match="no exp_avg, the moments of Adam; --weights-only"):
        import_deepspeed(tmp_path / "plain", target, config_of(toy, "2_fp32"), trust=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["later", "plain"]
    target.mkdir()
    with pytest.raises(UserError, match="already exists"):
        take(stock, toy, "2_fp32", target)
