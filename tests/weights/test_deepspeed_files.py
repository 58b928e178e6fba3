"""DeepSpeed's own checkpoints, made by DeepSpeed: read to the bit, and refused where anything about them is wrong."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.errors import UserError
from lvdm.weights.deepspeed_files import DeepSpeedCheckpoint, open_deepspeed
from lvdm.weights.restricted_pickle import Archive
from tests.ranks import run_ranks
from tests.weights.stock_deepspeed import Case, train_cases

KINDS = ("master", "exp_avg", "exp_avg_sq")
PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "wide": {"bf16": True, "wide": True}}
CASES = {f"{stage}_{name}": Case(stage, **how) for stage in (1, 2, 3) for name, how in PRECISIONS.items()}
MORE_CASES = {
    "1_plain": Case(1, freeze=False, groups=1),
    "2_round_robin": Case(2, zero={"round_robin_gradients": True}),
    "2_offload": Case(2, bf16=True, zero={"offload_optimizer": {"device": "cpu"}}),
    "3_sub_groups": Case(3, bf16=True, zero={"sub_group_size": 50, "offload_optimizer": {"device": "cpu"}}),
    "3_elements": Case(3, freeze=False, groups=1, zero={"sub_group_size": 10}),
}
"""What else changes where elements lie."""
MIXED_UP = "2_round_robin"
"""Where DeepSpeed's own ``safe_get_full_fp32_param`` gives other parameters' values; the weights are the judge."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module", params=[1, 2, 4])
def trained(request: pytest.FixtureRequest, folder: Path) -> tuple[int, Path, dict[str, Any]]:
    """Ranks, folder, and what each case's engine held."""
    world = request.param
    here = folder / str(world)
    return world, here, run_ranks(train_cases, world, cases_of(world), str(here))[0]


def cases_of(world: int) -> dict[str, Case]:
    if world == 2:
        return CASES | MORE_CASES
    return {name: CASES[name] for name in ("1_wide", "2_fp32", "3_bf16")}


def test_masters_moments_and_frozen_parameters_are_the_engine_s_to_the_bit(
    trained: tuple[int, Path, dict[str, Any]],
) -> None:
    world, here, held = trained
    for name, case in cases_of(world).items():
        files = open_deepspeed(here / name)
        assert (files.stage, files.ranks, files.step, files.samples) == (case.stage, world, 3, 24), name
        assert (files.optimizer_step, files.skipped, files.kinds) == (3, 0, KINDS), name
        assert files.aliases == {"tied.weight": "last.weight"}, name
        for parameter in files.shapes:
            files.check_weights(parameter)
        assert set(files.frozen) == held[name]["frozen"].keys(), name
        assert files.shapes.keys() == held[name]["master"].keys() | set(files.frozen), name
        wrong = [n for n, t in held[name]["frozen"].items() if not torch.equal(files.read_frozen(n), t.flatten())]
        for kind in KINDS if name != MIXED_UP else ():
            for parameter, tensor in held[name][kind].items():
                if not torch.equal(files.read(kind, parameter, 0, tensor.numel()), tensor.flatten()):
                    wrong.append(f"{kind} of {parameter}")
                if not torch.equal(files.read(kind, parameter, 2, 5), tensor.flatten()[2:5]):
                    wrong.append(f"a range of {kind} of {parameter}")
        assert wrong == [], name


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a case of two ranks; the folder with the files."""

    def make(name: str) -> Path:
        shutil.copytree(two_ranks(folder) / name, tmp_path / name)
        return tmp_path / name / "global_step3"

    return make


def two_ranks(folder: Path) -> Path:
    here = folder / "2"
    if not here.exists():  # where these tests run alone
        run_ranks(train_cases, 2, cases_of(2), str(here))
    return here


def values(files: DeepSpeedCheckpoint) -> dict[str, torch.Tensor]:
    """All that the files hold, checked as an import does."""
    learning = [name for name in files.shapes if name not in files.frozen]
    for name in learning:
        files.check_weights(name)
    found = {f"{kind} {name}": files.read(kind, name, 0, 10**6) for kind in files.kinds for name in learning}
    return found | {f"frozen {name}": files.read_frozen(name) for name in files.frozen}


def outcome(place: Path) -> tuple[dict[str, torch.Tensor] | None, str]:
    """What the files hold, or None and why they are refused."""
    try:
        files = open_deepspeed(place)
        return values(files), ""
    except UserError as error:
        return None, str(error)


def refusal(place: Path) -> str:
    with pytest.raises(UserError) as caught:
        values(open_deepspeed(place))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tag_by_latest_by_name_or_the_folder_itself(copy: Callable[[str], Path]) -> None:
    place = copy("2_fp32")
    shutil.copytree(place, place.parent / "other tag")
    for source, tag, found in (
        (place.parent, "", place),
        (place.parent, "other tag", place.parent / "other tag"),
        (place, "", place),
    ):
        files = open_deepspeed(source, tag)
        assert files.path == found


@pytest.mark.parametrize("tag", ["../../x", "..", "/etc", "a/b", "\0", "", "no such tag", "x" * 400])
def test_latest_never_leads_out_of_its_folder(copy: Callable[[str], Path], tag: str) -> None:
    place = copy("2_fp32").parent
    (place.parent / "x").mkdir()
    (place / "latest").write_text(tag)
    assert str(place / "latest") in refusal(place)


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Save a file again after a change to what it holds, by torch."""
    tree = torch.load(path, weights_only=False)
    change(tree)
    torch.save(tree, path)


def first_flat(tree: dict[str, Any]) -> list[torch.Tensor]:
    state = tree["optimizer_state_dict"]
    return state["fp32_flat_groups"] if "fp32_flat_groups" in state else state["single_partition_of_fp32_groups"]


def shorten(tree: dict[str, Any]) -> None:
    flats = first_flat(tree)
    flats[0] = flats[0].detach()[:-3].clone()


def with_holes(tree: dict[str, Any]) -> None:
    flats = first_flat(tree)
    flats[0] = torch.zeros(2 * flats[0].numel())[::2]


def grow(tree: dict[str, Any]) -> None:
    for group in tree["param_shapes"]:
        name = next(iter(group))
        group[name] = torch.Size([2**40, 2**19])


def other_step(tree: dict[str, Any]) -> None:
    for entry in (
        tree["optimizer_state_dict"].get("base_optimizer_state", tree["optimizer_state_dict"])["state"].values()
    ):
        entry["step"] += 1


def part_of_state(tree: dict[str, Any], key: str, value: Any) -> None:
    tree["optimizer_state_dict"][key] = value


@pytest.mark.parametrize("case", ["2_fp32", "3_fp32"])
def test_files_that_do_not_fit_together_are_refused_by_name(copy: Callable[[str], Path], case: str) -> None:
    place = copy(case)
    optim, model = sorted(place.glob("*1_mp*optim_states.pt"))[0], sorted(place.glob("*model_states.pt"))[-1]
    faults: list[tuple[Path, Callable[[dict[str, Any]], object]]] = [
        (optim, shorten),
        (optim, with_holes),
        (model, grow),
        (optim, partial(part_of_state, key="partition_count", value=3)),
        (optim, partial(part_of_state, key="partition_count", value="two")),
        (optim, partial(part_of_state, key="zero_stage", value=4)),
        (optim, partial(part_of_state, key="zero_stage", value=1 if case[0] == "3" else 3)),
        (optim, lambda tree: tree["optimizer_state_dict"].clear()),
        (optim, lambda tree: tree.update(ds_version="0.1")),
        (model, lambda tree: tree.update(param_shapes=None)),
        (model, lambda tree: tree.update(global_steps=-1)),
        (model, lambda tree: tree["param_shapes"][0].update({"\x1b[2J": torch.Size([1])})),
        (model, lambda tree: tree["param_shapes"][0].popitem()),
        (optim, lambda tree: first_flat(tree).pop()),
    ]
    kept = {path: path.read_bytes() for path in (optim, model)}
    for path, change in faults:
        edited(path, change)
        said = refusal(place)
        assert str(place) in said
        assert said.isprintable()
        path.write_bytes(kept[path])
    files = open_deepspeed(place)
    assert values(files)
    if case == "2_fp32":
        edited(optim, other_step)
        assert f"{optim} is no file" in refusal(place)
        assert "it is of step 4, rank 0's of 3" in refusal(place)
        optim.write_bytes(kept[optim])
        edited(model, lambda tree: tree["module"]["norm.weight"].add_(1e-3))
        assert "is not of the same moment of the same run" in refusal(place)


def test_missing_and_foreign_files_are_refused_by_name(copy: Callable[[str], Path]) -> None:
    place = copy("3_bf16")
    model, optim = (
        place / f"{start}zero_pp_rank_0_mp_rank_00_{end}_states.pt"
        for start, end in (("", "model"), ("bf16_", "optim"))
    )
    for path in (model, optim):
        aside = path.rename(place / "aside")
        assert path.name.removeprefix("bf16_") in refusal(place)
        aside.rename(path)
    last = place / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    aside = last.rename(place / "aside")
    assert "2 ranks, but there are the files of 1" in refusal(place)
    shutil.copy(aside, place / "zero_pp_rank_0_mp_rank_01_optim_states.pt")
    assert "split over ranks" in refusal(place)
    shutil.rmtree(place)
    place.mkdir()
    assert "holds no zero_pp_rank_" in refusal(place.parent)
    assert "there is no folder" in refusal(place / "none")
    with pytest.raises(UserError, match=r"cannot read .*none: No such file"):
        Archive(place / "none")


def with_average(tree: dict[str, Any]) -> None:
    for entry in tree["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        entry["ema"] = entry["exp_avg"] + 1


def test_an_average_in_the_optimiser_s_state_is_taken(copy: Callable[[str], Path]) -> None:
    place = copy("2_fp32")
    for path in place.glob("*optim_states.pt"):
        edited(path, with_average)
    files = open_deepspeed(place)
    assert files.kinds == (*KINDS, "ema")
    found = values(files)
    assert all(
        torch.equal(found[f"ema {name}"], found[f"exp_avg {name}"] + 1)
        for name in files.shapes
        if name not in files.frozen
    )


class Evil:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def evils(marker: Path) -> dict[str, Any]:
    """Objects that would make ``marker`` when they are unpickled, and others that have no business here."""
    import builtins
    import functools
    import subprocess

    import numpy as np

    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": Evil(os.system, command),
        ".eval": Evil(builtins.eval, code),
        ".exec": Evil(builtins.exec, code),
        ".getattr": Evil(getattr, "x", "upper"),
        "functools.partial": Evil(functools.partial, os.system, command),
        ".Popen": Evil(subprocess.Popen, ["touch", str(marker)]),
        "torch.serialization.load": Evil(torch.load, str(marker)),
        "torch.storage._load_from_bytes": Evil(torch.storage._load_from_bytes, b"x"),
        "_reconstruct": np.zeros(3),
        "numpy": np.float64(3),
        "pathlib": Path("/etc/passwd"),
        "random": random.Random(1),
        "torch.nn.modules": torch.nn.Linear(2, 2),
    }


def test_pickles_that_would_run_code_are_refused_and_run_nothing(copy: Callable[[str], Path], tmp_path: Path) -> None:
    place, marker = copy("2_fp32"), tmp_path / "ran"
    for path in sorted(place.iterdir()):
        kept = path.read_bytes()
        for name, evil in evils(marker).items():
            path.write_bytes(kept)
            edited(path, lambda tree, evil=evil: tree.update(extra=[evil]))
            said = refusal(place)
            assert f"{path} is refused" in said
            assert name in said
        path.write_bytes(kept)
    assert not marker.exists()


def test_files_of_ranks_that_changed_places_are_refused(copy: Callable[[str], Path]) -> None:
    for name in ("2_fp32", "3_fp32"):
        place = copy(name)
        for kind in ("optim", "model"):
            files = sorted(place.glob(f"zero_pp_rank_*{kind}_states.pt"))
            if files:
                datas = [file.read_bytes() for file in files]
                for file, data in zip(files, reversed(datas), strict=True):
                    file.write_bytes(data)
                assert f"{files[0]} was written as {files[1].name}" in refusal(place)
                for file, data in zip(files, datas, strict=True):
                    file.write_bytes(data)


def with_pickle(path: Path, data: bytes) -> None:
    """Put another pickle into a file, with all checksums as they should be."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, held in members.items():
            archive.writestr(name, data if name.endswith("data.pkl") else held)


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02"
        + REBUILD
        + b"}X\x04\x00\x00\x00codeX\x01\x00\x00\x00xsb.",  # attributes for what stands for torch's
        b"\x80\x02" + REBUILD + b"N}X\x0c\x00\x00\x00__defaults__)s\x86b.",
        b"\x80\x02ccollections\nOrderedDict\n}X\x05\x00\x00\x00itemsNsb.",
        b"\x80\x02" + REBUILD + b"(NNNNtR.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nTensor\nNN)tR.",
        b"\x80\x02(X\x07\x00\x00\x00storageNNNNtQ.",
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo of gigabytes
        b"\x80\x04\x8c\x0bcollections\x8c\x18OrderedDict.__init__.__x\x93.",
        b"\x80\x02(cos\nsystem\no.",
        b"\x80\x02(ios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02" + b"(" * 100000 + b"t" * 100000 + b".",
        b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",  # a key whose hash would overrun the stack
        b"\x80\x02)q\x00" + b"h\x00\x85q\x00" * 300_000 + b"0}h\x00Ns.",  # the same by the memo
        b"\x80\x02ccollections\nOrderedDict\n}\x85R.",  # copies, which could be as many as there are bytes
        b"\x80\x02ctorch\nSize\n]\x85R.",
        b"\x80\x02]" + b"]" * 50000 + b"a" * 50000 + b".",
        b"\x80\x02N.",
        b"\x80\x02",
        b"",
    ],
)
def test_crafted_pickles_are_refused(copy: Callable[[str], Path], data: bytes) -> None:
    place = copy("2_fp32")
    path = place / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with_pickle(path, data)
    assert str(path) in refusal(place)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"


@pytest.mark.parametrize(
    "data",
    [
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_parameter\nN" + STORAGE + b"NtR",
        STORAGE,
    ],
)
def test_a_pickle_cannot_lead_its_reader_to_another_file(copy: Callable[[str], Path], data: bytes) -> None:
    """What stands for a storage knows the reader, whose attributes the pickle would set to read any file."""
    path = copy("2_fp32") / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with_pickle(path, b"\x80\x02" + data + b"}X\x04\x00\x00\x00pathX\x0b\x00\x00\x00/etc/passwdsb.")
    with pytest.raises(UserError, match=f"{path.name} is damaged or no checkpoint"):
        Archive(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_other_formats_of_torch_are_refused(copy: Callable[[str], Path]) -> None:
    place = copy("2_fp32")
    path = place / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    tree = torch.load(path, weights_only=False)
    torch.save(tree, path, _use_new_zipfile_serialization=False)
    assert str(path) in refusal(place)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    assert str(path) in refusal(place)
    path.unlink()
    os.mkfifo(path)
    assert str(path) in refusal(place)


def mutate(place: Path, draw: random.Random) -> str:
    """Damage a file of a checkpoint; its name."""
    files = sorted(place.iterdir())
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    match draw.choice(["flip", "flip", "flip", "truncate", "zero", "swap", "delete", "random", "insert", "cut"]):
        case "flip":
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case "truncate":
            del data[draw.randrange(len(data)) :]
        case "zero":
            start = draw.randrange(len(data))
            data[start : start + 500] = bytes(len(data[start : start + 500]))
        case "swap":
            other = draw.choice([file for file in files if file != path])
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
            return path.name
        case "delete":
            path.unlink()
            return path.name
        case "random":
            data = bytearray(draw.randbytes(len(data)))
        case "insert":
            start = draw.randrange(len(data))
            data[start:start] = draw.randbytes(draw.randrange(1, 100))
        case "cut":
            start = draw.randrange(len(data))
            del data[start : start + draw.randrange(1, 100)]
    path.write_bytes(data)
    return path.name


def mutate_pickle(place: Path, draw: random.Random) -> str:
    """Change bytes of a pickle whose file's checksums are then put right."""
    path = draw.choice(sorted(place.iterdir()))
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        data = bytearray(archive.read(name))
    for _ in range(draw.randrange(1, 4)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    with_pickle(path, bytes(data))
    return path.name


@pytest.mark.parametrize("case", ["2_fp32", "3_bf16"])
def test_two_hundred_mutations_are_refused_or_change_nothing(copy: Callable[[str], Path], case: str) -> None:
    place = copy(case)
    files = open_deepspeed(place)
    whole = values(files)
    kept = {path: path.read_bytes() for path in place.iterdir()}
    draw, refused, silent = random.Random(7), 0, []
    for number in range(100):
        name = mutate(place, draw)
        found, said = outcome(place)
        if found is None:
            refused += 1
            assert str(place) in said
            assert "\n" not in said
        # what nobody reads, such as times and filling, may be anything
        elif found.keys() != whole.keys() or not all(torch.equal(found[key], whole[key]) for key in whole):
            silent.append((number, name))
        for path, data in kept.items():
            path.write_bytes(data)
    assert silent == []
    assert refused >= 85


@pytest.mark.parametrize("case", ["2_fp32", "3_bf16"])
def test_mutated_pickles_never_raise_anything_else(copy: Callable[[str], Path], case: str) -> None:
    place = copy(case)
    kept = {path: path.read_bytes() for path in place.iterdir()}
    draw = random.Random(11)
    for _ in range(100):
        mutate_pickle(place, draw)
        _, said = outcome(place)
        assert not said or str(place) in said
        assert "\n" not in said
        for path, data in kept.items():
            path.write_bytes(data)
