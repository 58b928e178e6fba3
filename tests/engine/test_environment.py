"""Which ranks there are, from what each launcher sets."""

from __future__ import annotations

import pytest

from lvdm.engine.environment import World, first_host, read_world
from lvdm.errors import UserError

SLURM = {
    "SLURM_PROCID": "13",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "5",
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
    assert env["MASTER_ADDR"] == "gpu003"
    assert env["MASTER_PORT"] == str(20000 + 1234567 % 20000)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("13", "16", "5")


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
