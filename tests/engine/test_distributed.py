"""How a rank begins: its device, its time-outs, deterministic mode, and which errors mean that hardware has failed."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.engine import distributed
from lvdm.engine.distributed import lost_a_device, lost_a_rank
from lvdm.engine.meeting import device_index, shared_devices
from lvdm.errors import UserError, command_line, own_errors
from tests.conftest import Toy
from tests.ranks import run_ranks
from tests.train.runs import run


def test_a_rank_takes_its_own_device_or_the_only_one_it_sees() -> None:
    assert [device_index(local, 4, 4) for local in range(4)] == [0, 1, 2, 3]
    assert device_index(3, 4, 8) == 3
    assert device_index(3, 4, 1) == 0  # --gpus-per-task=1
    with pytest.raises(UserError, match=r"4 ranks on .* see 2 GPUs; start one rank a GPU"):
        device_index(0, 4, 2)


def test_ranks_that_share_a_device_are_named() -> None:
    own = [("n1", "GPU-a"), ("n1", "GPU-b"), ("n2", "GPU-a")]
    assert shared_devices(own) == ""
    assert shared_devices([("n1", ""), ("n1", "")]) == ""  # CPUs
    assert shared_devices([*own, ("n2", "GPU-a")]) == "ranks 2, 3 on n2 share one GPU; start one rank a GPU"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("CUDA error: of somebody's own"), False),
    ],
)
def test_a_failed_device_is_told_from_memory_that_ran_out_and_from_mistakes(error: Exception, lost: bool) -> None:
    assert lost_a_device(error) is lost
    assert not lost_a_rank(error)


def test_what_one_rank_meets_alone_it_says_itself(capfd: pytest.CaptureFixture[str]) -> None:
    for rank, said in ((0, ""), (3, f"rank 3 on {socket.gethostname()}: the shard is gone\n")):
        with pytest.raises(UserError, match=r"^the shard is gone$"), own_errors(rank):
            raise UserError("the shard is gone")
        assert capfd.readouterr().err == said


@pytest.mark.parametrize(
    ("env", "speaks"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "3"}, False),
        ({"RANK": "3", "SLURM_PROCID": "0"}, False),  # torchrun in a job
        ({"SLURM_PROCID": "3"}, True),  # srun: this node alone may lack the file
    ],
)
def test_bad_input_is_said_by_rank_0_and_under_srun_by_all(
    env: dict[str, str], speaks: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended, command_line("train"):
        raise UserError("no such file")
    assert (ended.value.code, capfd.readouterr().err) == (2, "train: error: no such file\n" * speaks)


def facts(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Train each tree in deterministic mode, on one rank in one process group; what became of torch's settings."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 1024), most))
    ranks = distributed.start(100.0, deterministic=True)
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(distributed, "start", lambda *_, **__: ranks)
        patch.setattr(distributed, "stop", lambda: None)
        for tree in trees:
            run(tree)
    groups = torch.distributed.distributed_c10d._world.pg_map
    timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}  # type: ignore[attr-defined]
    found = {
        "groups": len(groups),
        "timeouts": [timeout / timedelta(seconds=1) for timeout in timeouts],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cublas": os.environ["CUBLAS_WORKSPACE_CONFIG"],
        "warnings": [str(warning.message) for warning in caught if "determinis" in str(warning.message)],
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(most, 1 << 16),
    }
    distributed.stop()
    return found


def test_both_tasks_train_in_deterministic_mode_and_no_group_keeps_a_time_out_of_its_own(
    toy: Toy, tmp_path: Path
) -> None:
    validated = {"validation__shards": [toy.latents], "validation__samples": 4}
    trees = [toy.diffusion(tmp_path / "diffusion", run__steps=2, **validated), toy.autoencoder(tmp_path / "ae")]
    (found,) = run_ranks(facts, 1, trees)
    assert found.pop("groups") > 2  # the world, DeepSpeed's and ours
    assert 185.0 in found.pop("timeouts")
    assert found == {
        "deterministic": True, "warn only": False, "cublas": ":4096:8", "warnings": [], "files": True,
    }  # fmt: skip


STOPPING = """
import os, signal, time
from lvdm.engine.signals import StopRequest
stop = StopRequest()
assert stop.signal == 0
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.01)
print(signal.Signals(stop.signal).name)
"""


def test_the_first_stop_signal_is_remembered_and_further_ones_change_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", STOPPING], capture_output=True, text=True, timeout=60)
    assert done.stdout == "SIGUSR1\n", done.stderr
    interrupted = STOPPING.replace("signal.SIGUSR1, signal.SIGTERM", "signal.SIGINT")
    done = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr
