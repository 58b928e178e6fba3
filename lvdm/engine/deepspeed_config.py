"""The DeepSpeed configuration as a pure function of ours. Saved with the run as a record; never read back."""

from __future__ import annotations

from typing import Any

from lvdm.config import BatchConfig, EngineConfig, OptimConfig
from lvdm.errors import UserError

BUCKET = 50_000_000
"""Gradients that are reduced together, at most. DeepSpeed allots a bucket whole, however small the network, and its
default of 500,000,000 takes 2 GB in fp32; it also reduces nothing before a bucket is full, so that a bucket of the
network's size would leave nothing to overlap with the backward pass."""
MAX_GATHERED = 1_000_000_000
"""Parameters that stage 3 keeps whole at once, at most: DeepSpeed's own default."""
SUB_GROUP = 1_000_000_000
"""Elements of a rank that stage 3 steps together, at most: DeepSpeed's own default."""


def accumulation_steps(batch: BatchConfig, world: int) -> int:
    """Micro-batches of one rank in an optimiser step. Raises `UserError` if the batch does not divide."""
    if batch.size % (batch.micro * world):
        raise UserError(
            f"batch.size {batch.size} is not divisible by batch.micro {batch.micro} x {world} rank{'s' * (world > 1)} "
            f"= {batch.micro * world}; change batch.size, batch.micro or the number of ranks"
        )
    return batch.size // (batch.micro * world)


def deepspeed_config(
    engine: EngineConfig, batch: BatchConfig, optim: OptimConfig, world: int, on_gpu: bool, learning: int
) -> dict[str, Any]:
    """DeepSpeed's JSON for a run that trains ``learning`` elements.

    Gradients are accumulated and reduced in fp32 whatever the precision of the weights; DeepSpeed's default is the
    weights' own dtype, which loses small micro-batch gradients in bf16 (DeepSpeed issues 1800, 2768).
    """
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        # DeepSpeed's own linear for stage 3 rounds before it adds the bias: other numbers than stages 1 and 2.
        "memory_efficient_linear": False,
        "reduce_bucket_size": max(1, min(BUCKET, learning)),
        # What `memory_plan` counts with is said rather than left to defaults.
        "stage3_max_live_parameters": MAX_GATHERED,
        "sub_group_size": SUB_GROUP,
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_batch_size": batch.size,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": accumulation_steps(batch, world),
        "gradient_clipping": optim.clip_grad_norm,
        "bf16": {"enabled": engine.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }
