"""Which ranks there are, from what each launcher sets."""

from __future__ import annotations

import pytest

from lvdm.engine.environment import World, first_host, meeting_port, read_world, tasks_on_node
from lvdm.errors import UserError

SLURM = {
    "SLURM_PROCID": "13",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "5",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "1234567",
}


def test_deepspeed_and_torchrun() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert read_world(env) == World(3, 4, 1, 2)
    assert read_world({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}) == World(3, 4, 1, 2)


def test_slurm_gives_every_rank_the_same_meeting_point() -> None:
    env = dict(SLURM)
    assert read_world(env) == World(13, 16, 5, 8)
    assert read_world(env) == World(13, 16, 5, 8), "the second time, from what the first has set"
    assert env["MASTER_ADDR"] == "gpu003"
    other = SLURM | {"SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_NODEID": "0"}
    assert read_world(other) == World(2, 16, 2, 8)
    assert (other["MASTER_ADDR"], other["MASTER_PORT"]) == (env["MASTER_ADDR"], env["MASTER_PORT"])
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("13", "16", "5")


def test_steps_restarts_and_jobs_meet_at_ports_of_their_own() -> None:
    """A start must not meet ranks of the one before, which may be dying still; other jobs may share the node."""
    ports = [
        meeting_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restart)})
        for job in range(1234567, 1234597)
        for step in range(4)
        for restart in range(10)
    ]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 20000
    assert max(ports) < 32000
    first = {"SLURM_JOB_ID": "7"}  # SLURM sets no count at a job's first start
    assert meeting_port(first) == meeting_port({**first, "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "0"})


@pytest.mark.parametrize(
    ("counts", "nodes"), [("8", [8]), ("8(x2)", [8, 8]), ("2(x2),1", [2, 2, 1]), ("1,3(x2),2", [1, 3, 3, 2])]
)
def test_tasks_of_a_ranks_own_node(counts: str, nodes: list[int]) -> None:
    assert [tasks_on_node(counts, node) for node in range(len(nodes))] == nodes
    with pytest.raises(UserError, match="cannot read SLURM_STEP_TASKS_PER_NODE"):
        tasks_on_node(counts, len(nodes))
    with pytest.raises(UserError, match="cannot read SLURM_STEP_TASKS_PER_NODE='x'"):
        tasks_on_node("x", 0)


def test_plain_start_is_a_world_of_one_also_in_an_allocation() -> None:
    env = {"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}  # sbatch's own shell: no step
    assert read_world(env) == World(0, 1, 0, 1)
    assert env["MASTER_ADDR"] == "127.0.0.1"


def test_half_a_launcher_is_refused() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE='' is not a number"):
        read_world({"RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("gpu[003-007,12],cpu1", "gpu003"), ("n[7,9]-ib", "n7-ib"), ("r1n[2]", "r1n2")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
