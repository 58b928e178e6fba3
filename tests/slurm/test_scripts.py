"""The batch scripts without SLURM: commands stand in for it where a race or a fault of its own is wanted."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT

STUBS = {
    "srun": """while [[ $1 == --* ]]; do shift; done
[[ -z ${SRUN_SAYS:-} ]] || { echo "srun: error: $SRUN_SAYS" >&2; exit 1; }
exec "$@"
""",
    "python": """out=${@: -1}
[[ -z ${AT_WORK:-} ]] || eval "$AT_WORK"
echo made >"$out"
""",
    "scontrol": """if [[ $1 == requeue ]]; then echo "$*" >>asked; exit "${REFUSED:-0}"; fi
[[ ! -e asked || -z ${THEN:-} ]] || JOB=$THEN
[[ -z ${AT_LOOK:-} ]] || eval "$AT_LOOK"
echo "JobId=7 ${JOB:-JobState=RUNNING Reason=None }"
""",
    "scancel": "echo told >>told\n",
    "sleep": "[[ $1 == 5 ]] || exit 0; exec /bin/sleep 0.1\n",
    "sbatch": "printf '%s\\n' \"$@\"\n",
}


@dataclass
class Shell:
    """A folder with the stand-ins, where the scripts run."""

    folder: Path

    def run(self, *command: str, **env: str) -> tuple[int, str]:
        """Exit code of a command, and what it says."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        kept |= {"PATH": f"{self.folder}:/usr/bin:/bin", "LVDM_HOME": str(self.folder), "SLURM_JOB_ID": "7"}
        kept |= {"SLURM_JOB_NAME": "mine", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
        kept |= {"SLURM_JOB_CPUS_PER_NODE": "8"}
        done = subprocess.run(
            command, cwd=self.folder, env=kept | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout

    def job(self, script: str, *arguments: str, **env: str) -> tuple[int, str]:
        """One start of a batch script."""
        return self.run("bash", str(ROOT / "slurm" / script), *arguments, **env)

    def asked(self) -> int:
        """How often SLURM was asked to start the job again."""
        asked = self.folder / "asked"
        return len(asked.read_text().splitlines()) if asked.exists() else 0


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    return Shell(tmp_path)


@pytest.mark.parametrize(
    "message", ["Unable to confirm allocation for job 7: timeout", "Protocol authentication error"]
)
def test_a_job_whose_srun_finds_no_controller_is_started_again(shell: Shell, message: str) -> None:
    code, said = shell.job("evaluate.sbatch", "out", SRUN_SAYS=message)
    assert (code, shell.asked()) == (85, 1), said
    assert f"the first to end: {message}" in said


@pytest.mark.parametrize(("restarts", "asked"), [("2", 1), ("3", 0)])
def test_a_job_that_begins_anew_and_dies_is_started_again_three_times(shell: Shell, restarts: str, asked: int) -> None:
    code, said = shell.job("evaluate.sbatch", "out", SLURM_RESTART_COUNT=restarts, AT_WORK="kill -KILL $$")
    assert (code, shell.asked()) == (137, asked), said


def test_an_export_appears_whole_and_once(shell: Shell) -> None:
    part, out = shell.folder / "exports/.part-7", shell.folder / "exports/mine"
    dies = {"AT_WORK": 'echo half >"$out"; kill -KILL $$'}
    code, said = shell.job("export.sbatch", "run", "exports/mine", **dies)
    assert (code, shell.asked(), out.exists(), part.exists()) == (137, 1, False, False), said

    out.write_text("somebody else's")
    code, said = shell.job("export.sbatch", "run", "exports/mine", SLURM_RESTART_COUNT="1")
    assert (code, out.read_text()) == (2, "somebody else's"), said
    out.unlink()

    for moved in (False, True):  # killed before or after it was moved: not made again
        part.mkdir(parents=True)
        (part / "whole").touch()
        (out if moved else part / "mine").write_text("made")
        code, said = shell.job("export.sbatch", "run", "exports/mine", SLURM_RESTART_COUNT="1", **dies)
        assert (code, out.read_text(), part.exists()) == (0, "made", False), said
        out.unlink()


def test_shards_in_a_store_are_not_begun_again(shell: Shell) -> None:
    code, said = shell.job("shards.sbatch", "shapes", "--out=s3://mine/x", AT_WORK="kill -KILL $$")
    assert (code, shell.asked()) == (137, 0), said
    code, said = shell.job("shards.sbatch", "shapes", "--out=made/x")
    assert (code, (shell.folder / "made/x").read_text()) == (0, "made\n"), said


def test_a_warning_to_the_script_reaches_the_tasks_whenever_it_comes(shell: Shell) -> None:
    settings = shell.folder / "settings.sh"
    wait = "for ((i = 0; i < 300; i++)); do [[ ! -e told ]] || exit 85; /bin/sleep 0.1; done"
    for early, work, look in (("kill -USR1 $$", wait, ""), ("", f"kill -TERM $SCRIPT; {wait}", "kill -USR1 $SCRIPT")):
        settings.write_text(f"source {ROOT}/slurm/settings.sh\nexport SCRIPT=$$\n{early}\n")
        env = {"LVDM_SLURM_SETTINGS": str(settings), "AT_WORK": work, "AT_LOOK": look}
        code, said = shell.job("encode.sbatch", "out", **env)
        assert (code, "the tasks are told" in said) == (85, True), said
        (shell.folder / "told").unlink()


def test_a_job_that_is_cancelled_while_requeueing_fails_is_left_alone(shell: Shell) -> None:
    env = {"AT_WORK": "exit 85", "REFUSED": "1", "THEN": "JobState=COMPLETING Reason=None "}
    code, said = shell.job("encode.sbatch", "out", **env)
    assert (code, shell.asked()) == (85, 1), said
    assert "SLURM has ended the job and requeues it unless it was cancelled" in said


def test_a_job_that_is_preempted_comes_back_unless_it_was_cancelled_meanwhile(shell: Shell) -> None:
    for end, asked in (("2026-01-01T00:00:09", 0), ("2026-01-01T00:00:05", 1)):
        job = f"JobState=COMPLETING Reason=None EndTime={end} Deadline=N/A PreemptTime=2026-01-01T00:00:05 X=1"
        code, said = shell.job("encode.sbatch", "out", AT_WORK="exit 85", JOB=job)
        assert (code, shell.asked()) == (85, asked), said


def test_what_submit_refuses_and_takes(shell: Shell) -> None:
    (shell.folder / "mine").mkdir()
    (shell.folder / "mine/train.sbatch").touch()
    submit = ("bash", str(ROOT / "slurm/submit.sh"))
    for arguments, why in (
        (("./mine/train.sbatch", "a.yaml"), "./mine/train.sbatch is not "),
        (("--ranks-per-node=x", "train.sbatch"), "--ranks-per-node=x is no number of ranks"),
        (("--ranks-per-node", "2", "train.sbatch"), "write --ranks-per-node=... with an equals sign"),
        (("-J", "mine.sbatch"), "usage: "),
    ):
        code, said = shell.run(*submit, *arguments)
        assert (code, said.count("\n"), why in said) == (2, 1, True), said
    (shell.folder / "link.sh").symlink_to(ROOT / "slurm/submit.sh")
    for command in (submit, ("bash", "link.sh"), ("bash", "-c", f'cd {ROOT}/slurm && bash submit.sh "$@"', "-")):
        code, said = shell.run(*command, "-J", "mine.sbatch", "train.sbatch", "a.yaml")
        assert code == 0, said
        assert said.splitlines()[1:] == ["-J", "mine.sbatch", f"{ROOT}/slurm/train.sbatch", "a.yaml"]


def test_ranks_get_the_cpus_that_the_smallest_node_has(shell: Shell) -> None:
    code, said = shell.job("sample.sbatch", "out", LVDM_RANKS_PER_NODE="2", SLURM_JOB_CPUS_PER_NODE="8(x2),4")
    assert (code, "x 2 tasks x 2 CPUs" in said) == (0, True), said


def test_training_without_a_config_says_so(shell: Shell) -> None:
    code, said = shell.job("train.sbatch")
    assert (code, "name a config" in said) == (2, True), said
