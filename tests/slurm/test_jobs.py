"""What a job does about each way in which its tasks can end (slurm/job.sh)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster, wait_until
from tests.slurm.scenarios import PATIENCE, Scenarios

SCRIPT = """#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append
#SBATCH --output=slurm-%x.log
source "$LVDM_HOME/slurm/job.sh"
run_ranks bash -c "$1"
finish
"""
AGAIN = "[[ ${SLURM_RESTART_COUNT:-0} = 0 ]] || exit 0; "
SAVES = 'trap "sleep 1; exit 85" TERM USR1; echo started; for ((i = 0; i < 600; i++)); do sleep 0.1; done'


@dataclass(frozen=True)
class Case:
    """What the tasks do, what somebody does to them, and how the job ends."""

    tasks: str
    ends: tuple[str, int, str]
    """State, starts after the first, exit code:signal."""
    says: str
    """In the job's log."""
    nodes: int = 1
    act: tuple[str, ...] = ()
    """A command, given the job's id, once the tasks run."""
    requeues: int = 100
    minutes: int = 10
    """Time limit."""
    options: tuple[str, ...] = ()
    """More of sbatch's."""


CASES = {
    "done": Case("true", ("COMPLETED", 0, "0:0"), "done", nodes=2),
    "bad-input-of-one-rank": Case(
        "[[ $SLURM_PROCID = 0 ]] || { echo no such file; exit 2; }; sleep 60",
        ("FAILED", 0, "2:0"),
        "rank-0001.log:\nno such file\n",
        nodes=2,
    ),
    "fault-of-one-rank": Case(
        '[[ $SLURM_PROCID = 0 ]] || exit 1; trap "exit 85" TERM; for ((i = 0; i < 600; i++)); do sleep 0.1; done',
        ("FAILED", 0, "1:0"),
        "failed with exit code 1; not requeued",
        nodes=2,
    ),
    "other-code": Case("exit 3", ("FAILED", 0, "3:0"), "failed with exit code 3; not requeued"),
    "other-code-of-one-rank": Case(
        "[[ $SLURM_PROCID = 0 ]] || exit 255; sleep 60",
        ("FAILED", 0, "255:0"),
        "failed with exit code 255; not",
        nodes=2,
    ),
    "time-limit": Case(
        AGAIN + 'trap "" TERM USR1; for ((i = 0; i < 3000; i++)); do sleep 0.1; done',
        ("COMPLETED", 1, "0:0"),
        "the time limit is reached; requeued",
        minutes=1,
    ),
    "ctrl-c": Case("exit 130", ("FAILED", 0, "130:0"), "interrupted (exit code 130); not requeued"),
    "asked-to-stop": Case(AGAIN + "exit 85", ("COMPLETED", 1, "0:0"), "started again (exit code 85); requeued"),
    "hung": Case(AGAIN + "exit 86", ("COMPLETED", 1, "0:0"), "its watchdog ended it (exit code 86); requeued"),
    "hung-then-a-fault": Case(  # the start that hung says much behind it; the next one appends to the same log
        "[[ ${SLURM_RESTART_COUNT:-0} = 1 ]] || { echo 'Timeout (0:00:10)!'; seq 40000; }; exit 1",
        ("FAILED", 1, "1:0"),
        "failed with exit code 1; not requeued",
    ),
    "preempted-by-cancelling": Case(
        AGAIN + SAVES,
        ("COMPLETED", 1, "0:0"),
        "preempted; requeued",
        act=("bash", "-c", "sbatch -p urgent --nodelist=n7 --exclusive --output=/dev/null --wrap true"),
        options=("--partition=given-up", "--exclusive"),
    ),
    "one-rank-killed": Case(
        AGAIN + "[[ $SLURM_PROCID = 0 ]] || kill -KILL $$; sleep 60",
        ("COMPLETED", 1, "0:0"),
        "killed by signal 9 (exit code 137); requeued",
        nodes=2,
    ),
    "too-often": Case("exit 85", ("FAILED", 1, "85:0"), "not requeued again after 1 times", requeues=1),
    "cancelled": Case(
        AGAIN + SAVES, ("CANCELLED", 0, "85:0"), "SLURM has ended the job and requeues it unless", act=("scancel",)
    ),
    "requeued-by-slurm": Case(
        AGAIN + SAVES, ("COMPLETED", 1, "0:0"), "SLURM has ended the job and requeues", 2, ("scontrol", "requeue")
    ),
    "tasks-warned": Case(
        AGAIN + SAVES, ("COMPLETED", 1, "0:0"), "(exit code 85); requeued", 2, ("scancel", "-s", "USR1")
    ),
    "script-warned": Case(
        AGAIN + SAVES, ("COMPLETED", 1, "0:0"), "the tasks are told", 2, ("scancel", "-s", "USR1", "--batch")
    ),
}


@pytest.fixture(scope="session")
def jobs(
    cluster: Cluster, scenarios: Scenarios, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Case, str, Path]]:
    """All cases as jobs, beside each other and the scenarios; a case's job and folder, by name."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "job.sbatch").write_text(SCRIPT)
    ids = {
        name: cluster.call(
            *("sbatch", "--parsable", "--partition=third", f"--nodes={case.nodes}", f"--job-name={name}"),
            *(f"--time={case.minutes}", *case.options),
            *("job.sbatch", case.tasks),
            cwd=folder,
            LVDM_HOME=str(ROOT),
            LVDM_MAX_REQUEUES=str(case.requeues),
        )
        for name, case in CASES.items()
    }

    def started(name: str) -> int:
        logs = [folder / f"slurm-{name}.log", *folder.glob(f"logs/{name}-{ids[name]}/rank-*.log")]
        return sum(log.read_text().count("started\n") for log in logs if log.is_file())

    for name, case in CASES.items():
        if case.act:
            wait_until(lambda name=name, case=case: started(name) >= case.nodes, PATIENCE, lambda name=name: name)
            cluster.call(*case.act, ids[name])
    return lambda name: (CASES[name], ids[name], folder)


@pytest.mark.parametrize("name", CASES)
def test_a_job_ends_as_its_tasks_do(cluster: Cluster, jobs: Callable[[str], tuple[Case, str, Path]], name: str) -> None:
    case, job, folder = jobs(name)
    ends = cluster.end_of(job, timeout=PATIENCE)
    log = (folder / f"slurm-{name}.log").read_text()
    assert ends == case.ends, log
    assert case.says in log
    assert log.count(": start ") == 1 + case.ends[1]


APPTAINER = """#!/usr/bin/env bash
echo "rank $SLURM_PROCID of $SLURM_NTASKS, $SLURM_CPUS_PER_TASK CPUs, GPUs $CUDA_VISIBLE_DEVICES: apptainer $*"
"""


def test_settings_give_each_gpu_of_each_node_of_a_range_a_rank_in_the_container(
    cluster: Cluster, tmp_path: Path
) -> None:
    settings = (
        f"source {ROOT}/slurm/settings.sh\nexport SBATCH_PARTITION=third\n"
        f"LVDM_GPUS_PER_NODE=2 LVDM_CPUS_PER_RANK=3 LVDM_CONTAINER=image.sif LVDM_CONTAINER_MOUNTS=/data\n"
        f"PATH={tmp_path}:$PATH\n"
    )
    (tmp_path / "settings.sh").write_text(settings)
    (tmp_path / "apptainer").write_text(APPTAINER)
    (tmp_path / "apptainer").chmod(0o755)
    env = {"LVDM_SLURM_SETTINGS": str(tmp_path / "settings.sh")}
    # as a shell inside of another job has them
    foreign = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0", "SLURM_RESTART_COUNT": "7"}
    foreign |= {"SLURM_CPUS_PER_TASK": "5", "SLURM_GPUS_ON_NODE": "6", "SLURM_NTASKS_PER_NODE": "5"}
    several = cluster.submit("--nodes=1-2", "train.sbatch", "my.yaml", cwd=tmp_path, **env, **foreign)
    one = cluster.submit("--array=7", "encode.sbatch", "--config", "my.yaml", cwd=tmp_path, **env)
    none = cluster.submit("--export=NONE", "export.sbatch", "runs/mine", "mine", cwd=tmp_path, **env)
    for job in (several, one, none):
        assert cluster.end_of(job, timeout=PATIENCE) == ("COMPLETED", 0, "0:0")

    inside = f"apptainer exec --nv --bind {tmp_path},{ROOT},/data --pwd {tmp_path} image.sif python {ROOT}"
    for rank in range(4):
        said = (tmp_path / "logs" / f"lvdm-{several}" / f"rank-{rank:04d}.log").read_text()
        command = f"{inside}/launch/train.py --config my.yaml run.resume=auto"
        assert said == f"rank {rank} of 4, 3 CPUs, GPUs 0,1: {command}\n"
    assert ": start 1: " in (tmp_path / f"slurm-lvdm-{several}.log").read_text()
    said = (tmp_path / f"slurm-encode-{one}_7.log").read_text()
    assert f"rank 0 of 1, 3 CPUs, GPUs 0: {inside}/tools/encode_latents.py --config my.yaml\n" in said
    said = (tmp_path / f"slurm-export-{none}.log").read_text()
    assert f"rank 0 of 1, 3 CPUs, GPUs : {inside.replace('--nv ', '')}/tools/export_checkpoint.py" in said


def test_a_stage_that_fails_takes_the_later_ones_out_of_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "settings.sh").write_text(f"source {ROOT}/slurm/settings.sh\nexport SBATCH_PARTITION=third\n")
    env = {"LVDM_SLURM_SETTINGS": str(tmp_path / "settings.sh")}
    pipeline = str(ROOT / "slurm" / "pipeline.sh")
    (tmp_path / "fails.plan").write_text(
        "stage first export.sbatch nowhere out\nstage second export.sbatch a b\nbeside third export.sbatch a b\n"
    )
    said = cluster.call(pipeline, "fails.plan", cwd=tmp_path, **env)
    jobs = {line.split()[0]: line.split()[2] for line in said.splitlines() if line.startswith("fails-")}
    assert cluster.end_of(jobs["fails-first"], PATIENCE) == ("FAILED", 0, "2:0")
    log = (tmp_path / f"slurm-fails-first-{jobs['fails-first']}.log").read_text()
    assert "no checkpoint to read in nowhere" in log
    for name in ("fails-second", "fails-third"):
        assert cluster.end_of(jobs[name], PATIENCE)[0] == "CANCELLED"

    begun = cluster.call(pipeline, "fails.plan", "--from", "second", cwd=tmp_path, **env)
    assert [line.split()[0] for line in begun.splitlines()[:2]] == ["fails-second", "fails-third"]
    said = cluster.call(pipeline, "fails.plan", "--from", "fourth", cwd=tmp_path, code=2, **env)
    assert said == "pipeline: error: fails.plan has no stage fourth"
    said = cluster.call(pipeline, "fails.plan", "--from", "third", cwd=tmp_path, code=2, **env)
    assert said == "pipeline: error: fails.plan has no stage third; it is beside second: give that"
    assert "usage: " in cluster.call(pipeline, "fails.plan", "--from", "", cwd=tmp_path, code=2, **env)
    for fault in ("stage second --nodes=x export.sbatch a b", "stag second export.sbatch a b"):
        (tmp_path / "refused.plan").write_text(f"stage first export.sbatch a b\n{fault}\n")
        said = cluster.call(pipeline, "refused.plan", cwd=tmp_path, code=2, **env)
        line = 1 if "stag " in fault else 2
        assert said.endswith(f"refused.plan is wrong in line {line} or behind it; none of its jobs is left")
    assert "refused-first" not in cluster.call("squeue", "--noheader", "--states=PENDING,RUNNING", "--format=%j")
