"""What is looked at before the first step: by real ranks with something wrong, and of GPUs that are not here."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lvdm.checkpoint.reader import step_name
from lvdm.config import AnyTraining, parse_training_config
from lvdm.engine.findings import Device, Findings, Reply, Room, checkpoints_to_come, host_memory, look_at_disk
from lvdm.engine.preflight import judge, judge_replies
from lvdm.errors import Requeue, UserError
from tests.conftest import Toy
from tests.engine.preflight_cases import check_all
from tests.ranks import run_ranks

HOST = socket.gethostname()
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "all is well": ({}, ""),
    "a store": ({"changes": {"run__checkpoints": "memory://somewhere"}}, ""),
    "multiplies wrongly": (
        {"fault": "multiplies wrongly"},
        f"rank 1 on {HOST}: cpu computes wrongly, 1 rows of a product of matrices; take this host out of the job",
    ),
    "cannot multiply": (
        {"fault": "cannot multiply"},
        f"rank 1 on {HOST}: cannot compute on cpu: CUDA error: uncorrectable ECC error encountered; take this host",
    ),
    "garbles": (
        {"fault": "garbles what it sends"},
        f"numbers between rank 1 on {HOST} and others arrive changed (2 of 4 messages)",
    ),
    "sums wrongly": ({"fault": "sums wrongly"}, f"rank 1 on {HOST} got a wrong sum over all ranks"),
    "torch": ({"fault": "another version"}, f"2.0.1 (rank 1 on {HOST}); start all with the same"),
    "config": ({"on_1": {"optim__lr": 2e-3}}, "the config is not the same on all ranks: "),
    "memory": (
        {"env": {"SLURM_MEM_PER_NODE": "100"}},
        "and the memory that the SLURM job asked for (--mem) is 104.9 MB: ask for more",
    ),
}
DISK_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "enough": ({"changes": {"run__keep": 5, "run__save_every": 1, "run__steps": 7}}, ""),
    "too small": (
        {"changes": {"run__keep": 500, "run__save_every": 1, "run__steps": 1000}},
        "for 501 of 1.0 MB and 67.1 MB to spare; make room, or keep fewer (run.keep)",
    ),
    "that stay": (
        {"changes": {"run__keep_every": 1, "run__save_every": 1, "run__steps": 1000}},
        "run.keep_every may keep 1000 more checkpoints of 1.0 MB for good; their disk has ",
    ),
    "loaders": (
        {"changes": {"data__kind": "video", "data__workers": 8, "data__prefetch": 10**4}, "shared_memory": "{disk}"},
        f"loaders of ranks 0-1 on {HOST} may put 491.5 MB into {{disk}}, of which ",
    ),
    "not shared": (  # the last one: from there is no way back
        {"nodes": True, "fault": "sees another disk"},
        f"rank 1 on {HOST} does not see what rank 0 on {HOST} writes in {{disk}}: checkpoints must go to a folder that "
        "all nodes share, or to a store",
    ),
}
NOTES = {"all is well", "a store", "enough", "that stay"}


def config_of(folder: Path, **changes: Any) -> AnyTraining:
    return parse_training_config(Toy(folder).diffusion(folder / "run", **changes), source="test")


def assert_each_is_said(cases: dict[str, tuple[dict[str, Any], str]], results: list[list[dict[str, Any]]]) -> None:
    for number, (name, (_, expected)) in enumerate(cases.items()):
        for rank in results:
            found = rank[number]
            print(name, found)
            assert found["kind"] == ("notes" if name in NOTES else "UserError"), (name, found)
            assert expected in str(found["said"]) if expected else found["said"] == [], (name, found)
        assert len({str(rank[number]["said"]) for rank in results}) == 1 or name == "config", (name, "ranks differ")


def test_what_is_wrong_with_one_rank_is_said_on_all_and_names_it(tmp_path: Path) -> None:
    tree = Toy(tmp_path).diffusion(tmp_path / "run")
    results = run_ranks(check_all, 2, tree, [case for case, _ in CASES.values()])
    assert_each_is_said(CASES, results)
    assert list(tmp_path.iterdir()) == []  # nothing stays


def test_disks_are_measured_against_what_the_run_will_keep(disk: Callable[[str], Path]) -> None:
    folder = disk("size=200m")
    cases = {
        name: ({**case, "shared_memory": case.get("shared_memory", "").format(disk=folder)}, said.format(disk=folder))
        for name, (case, said) in DISK_CASES.items()
    }
    results = run_ranks(check_all, 2, Toy(folder).diffusion(folder / "run"), [case for case, _ in cases.values()])
    assert_each_is_said(cases, results)
    assert list(folder.iterdir()) == []


def test_a_disk_that_takes_nothing_more_is_refused(disk: Callable[[str], Path]) -> None:
    folder = disk("size=100m,nr_inodes=500")
    (fault,), probe = look_at_disk(folder / "new" / "run", 1 << 20, 3, world=8)
    assert fault.endswith("more files, and the run may need 1,030")
    assert probe == ""
    disk("size=20m")
    fault = look_at_disk(folder, 0, 0, world=8)[0][0]
    assert fault.endswith("MB left, and the run needs 67.1 MB; make room")
    disk("ro")
    (fault,), _ = look_at_disk(folder / "new", 0, 0, world=8)
    assert fault == f"cannot write in {folder}: Read-only file system; mend that, or choose another folder"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "present", "new", "for_good"),
    [
        ({"steps": 100, "save_every": 10}, 0, 4, 0),  # three and the one that pushes the oldest out
        ({"steps": 100, "save_every": 10}, 3, 1, 0),
        ({"steps": 100, "save_every": 10}, 9, 1, 0),
        ({"steps": 20, "save_every": 10}, 0, 2, 0),
        ({"steps": 5, "save_every": 10}, 0, 1, 0),
        ({"steps": 100, "save_every": 10, "keep_best": 2}, 0, 6, 0),
        ({"steps": 100, "save_every": 10, "keep_every": 80}, 1, 3, 4),  # of 400 samples
        ({"steps": 100, "save_every": 30, "keep_every": 4}, 0, 4, 4),
    ],
)
def test_checkpoints_to_come_are_those_that_stay(
    tmp_path: Path, changes: dict[str, int], present: int, new: int, for_good: int
) -> None:
    shards = {"validation__shards": ["somewhere"]} if "keep_best" in changes else {}
    config = config_of(tmp_path, **{f"run__{name}": value for name, value in changes.items()}, **shards)
    for step in range(present):
        (tmp_path / step_name(step)).mkdir()
    (tmp_path / "latest").touch()
    assert checkpoints_to_come(config, tmp_path) == (new, for_good)


GB = 10**9


def fleet(nodes: int = 2, **facts: Any) -> list[Findings]:
    """Findings of nodes of two ranks each."""
    return [Findings(rank=rank, host=f"n{rank // 2}", node=rank // 2 * 2, **facts) for rank in range(2 * nodes)]


def test_ranks_must_be_numbered_node_by_node(tmp_path: Path) -> None:
    everyone = [replace(one, host=f"n{one.rank % 2}") for one in fleet()]
    with pytest.raises(UserError, match=r"here: rank 0 on n0, rank 1 on n1 are .* one node; .*distribution=block\)$"):
        judge(config_of(tmp_path), everyone)


def test_gpus_too_small_for_the_state_are_refused_with_what_to_change(tmp_path: Path) -> None:
    everyone = fleet(needs_device=90 * GB, device=Device("A100", 80 * GB, 79 * GB))
    with pytest.raises(UserError) as refused:
        judge(config_of(tmp_path), everyone)
    assert str(refused.value) == (
        "this run cannot work here: the model's state alone takes 90.0 GB of GPU memory on ranks 0-1 on n0, ranks 2-3 "
        "on n1, and a A100 has 80.0 GB: use more GPUs, engine.zero_stage=3, engine.offload_optimizer=true or "
        "engine.precision=bf16"
    )
    offloaded = config_of(tmp_path, engine__zero_stage=3, engine__offload_optimizer=True, engine__precision="bf16")
    with pytest.raises(UserError, match=r"80.0 GB: use more GPUs$"):
        judge(offloaded, everyone)


def test_gpus_that_others_use_may_be_free_later(tmp_path: Path) -> None:
    everyone = fleet(needs_device=40 * GB, device=Device("A100", 80 * GB, 79 * GB))
    assert judge(config_of(tmp_path), everyone) == []
    everyone[3] = replace(everyone[3], device=Device("A100", 80 * GB, 30 * GB))
    with pytest.raises(Requeue, match=r"on rank 3 on n1, and of the 80.0 GB of a A100 30.0 GB are free there"):
        judge(config_of(tmp_path), everyone)


def test_unlike_gpus_are_a_note(tmp_path: Path) -> None:
    everyone = fleet(nodes=3, device=Device("A100", 80 * GB, 79 * GB))
    for rank in (1, 4, 5):
        everyone[rank] = replace(everyone[rank], device=Device("H100", 80 * GB, 79 * GB))
    assert judge(config_of(tmp_path), everyone) == [
        "GPUs differ, and the slowest sets the pace: A100 (rank 0 on n0, ranks 2-3 on n1), H100 (rank 1 on n0, ranks "
        "4-5 on n2)"
    ]


def test_host_memory_is_that_of_all_ranks_of_a_node(tmp_path: Path) -> None:
    def verdict(total: int, free: int | None) -> list[str]:
        everyone = fleet(needs_host=40 * GB, resident=2 * GB, plan="PLAN", memory=(Room("SOMEWHERE", total, free),))
        return judge(config_of(tmp_path), everyone)

    assert verdict(84 * GB, 80 * GB) == verdict(84 * GB, None) == []
    expected = r"here: ranks 0-1 on n0 need 80.0 GB more host memory beside 4.0 GB so far \(rank 0: PLAN\), and the "
    for free in (90 * GB, None):
        with pytest.raises(UserError, match=expected + "SOMEWHERE is 83.0 GB: ask for more"):
            verdict(83 * GB, free)
    with pytest.raises(Requeue, match=r"here now: ranks 0-1 on n0 need .*, and of 100.0 GB \(SOMEWHERE\) 79.0 GB are"):
        verdict(100 * GB, 79 * GB)


def test_shared_memory_for_latents_is_a_guess_and_so_a_note(tmp_path: Path) -> None:
    config = config_of(tmp_path, data__workers=2, batch__micro=2)
    clip = 4 * 16 * 16 * 3
    size = 2 * 2 * 2 * 2 * clip // 6  # ranks, workers, prefetch, samples
    assert judge(config, fleet(shared_memory=size)) == []
    (note,) = judge(config, fleet(shared_memory=size - 1))
    assert note.startswith("loaders of ranks 0-1 on n0 may put 0.0 MB into /dev/shm")


def test_clocks_apart_are_a_note() -> None:
    replies = [Reply(clock) for clock in (100.0, 100.4, 112.3, 112.3)]
    assert judge_replies(fleet(), replies) == ["the clock of n1 is 12 s ahead: times in logs of its ranks will be, too"]


def test_numbers_that_arrive_changed_are_laid_to_whoever_has_a_part_in_all_of_it() -> None:
    replies = [Reply(0.0, garbled=(2,)), Reply(0.0, garbled=(2,)), Reply(0.0, garbled=(0, 1)), Reply(0.0)]
    with pytest.raises(UserError, match=r"numbers between rank 2 on n1 and others arrive changed \(4 of 16 messages\)"):
        judge_replies(fleet(), replies)


CGROUPS = {
    "v1": ("4:memory:/job/step", "memory/job", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
    "v2": ("0::/job/step", "job", ("memory.max", "memory.current"), ""),
    "hybrid": ("1:name=systemd:/x\n0::/job/step", "unified/job/step", ("memory.max", "memory.current"), ""),
    "container": ("0::/../host", "", ("memory.max", "memory.current"), ""),
    "container v1": ("9:cpu,memory:/docker/17", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
}


@pytest.mark.parametrize("kind", CGROUPS)
def test_limits_of_cgroups_are_found_wherever_they_are(tmp_path: Path, kind: str) -> None:
    line, group, names, prefix = CGROUPS[kind]
    folder = tmp_path / "cgroup" / group
    folder.mkdir(parents=True)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(line + "\n")
    for name, value in zip(names, (1000, 900), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file 100\n{prefix}active_file 50\n")
    found = host_memory(tmp_path / "proc", tmp_path / "cgroup", {"SLURM_MEM_PER_CPU": "2", "SLURM_CPUS_ON_NODE": "4"})
    slurm = Room("memory that the SLURM job asked for (--mem)", 8 << 20, None)
    assert found == [Room(f"limit of the cgroup {folder}", 1000, 250), slurm]
    (folder / names[0]).write_text("max\n" if "max" in names[0] else f"{(1 << 63) - 4096}\n")
    assert host_memory(tmp_path / "proc", tmp_path / "cgroup", {"SLURM_MEM_PER_NODE": "0"}) == []


def test_memory_of_this_host_is_what_the_kernel_says() -> None:
    room = host_memory(env={})[0]
    assert room.total == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), rel=0.01)
    assert room.free is not None
    assert 0 < room.free < room.total
