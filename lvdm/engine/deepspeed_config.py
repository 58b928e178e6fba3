"""The DeepSpeed configuration as a pure function of ours. Saved with the run as a record; never read back."""

from __future__ import annotations

from typing import Any

from lvdm.config import BatchConfig, EngineConfig, OptimConfig
from lvdm.errors import UserError


def accumulation_steps(batch: BatchConfig, world: int) -> int:
    """Micro-batches of one rank in an optimiser step. Raises `UserError` if the batch does not divide."""
    if batch.size % (batch.micro * world):
        raise UserError(
            f"batch.size {batch.size} is not divisible by batch.micro {batch.micro} x {world} rank{'s' * (world > 1)} "
            f"= {batch.micro * world}; change batch.size, batch.micro or the number of ranks"
        )
    return batch.size // (batch.micro * world)


def deepspeed_config(
    engine: EngineConfig, batch: BatchConfig, optim: OptimConfig, world: int, on_gpu: bool
) -> dict[str, Any]:
    """DeepSpeed's JSON for a run.

    Gradients are accumulated and reduced in fp32 whatever the precision of the weights; DeepSpeed's default is the
    weights' own dtype, which loses small micro-batch gradients in bf16 (DeepSpeed issues 1800, 2768).
    """
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        # DeepSpeed's own linear for stage 3 rounds before it adds the bias: other numbers than stages 1 and 2.
        "memory_efficient_linear": False,
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
