"""What the ranks of the tests of DeepSpeed's own files do: train with DeepSpeed alone, and save as it does."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from lvdm.config import TextUNetConfig
from lvdm.engine import distributed
from lvdm.models.build import build_model
from tests.engine import zero_cases
from tests.engine.zero_cases import BATCH, LR, MODEL, OPTIM, Tensors, loss_of, micro_batches

STEPS, MORE = 3, 2
FROZEN = "time_embed"
"""What stands in the names of the parameters that do not learn where some do not."""


@dataclass(frozen=True)
class Case:
    """A training by DeepSpeed."""

    stage: int
    bf16: bool = False
    wide: bool = False
    """Accumulate in fp32 where the weights are bf16."""
    freeze: bool = True
    groups: int = 2
    """Of parameters; 1 or 2."""
    zero: dict[str, Any] = field(default_factory=dict)
    """Further settings of ``zero_optimization``."""
    model: TextUNetConfig | None = None
    """None for `Small`."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


def train_cases(cases: dict[str, Case], folder: str) -> dict[str, dict[str, Any]]:
    """Every case in a process group; each saves into a folder of its name."""
    ranks = distributed.start(60)
    found = {name: _train(case, f"{folder}/{name}", ranks) for name, case in cases.items()}
    distributed.stop()
    return found


def _train(case: Case, folder: str, ranks: distributed.Ranks) -> dict[str, Any]:
    """Train, save and train on: what the engine held when it saved, whole, and the losses of the steps behind that."""
    model = network(case.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not case.freeze or FROZEN not in name)
    frozen = {name: p.detach().to(case.dtype).float() for name, p in model.named_parameters() if not p.requires_grad}
    engine = _engine(model, case)
    for step in range(STEPS):
        _step(engine, step, ranks, case)
    with contextlib.redirect_stdout(io.StringIO()):
        engine.save_checkpoint(folder, client_state={"note": "of the tests"})
    found = _state(engine)
    losses = [_step(engine, STEPS + step, ranks, case) for step in range(MORE)]
    return found | {"frozen": frozen, "losses": losses, "after": _state(engine)["master"]}


class Small(torch.nn.Module):
    """Parameters of awkward sizes, one of them shared, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(5, 7)
        self.time_embed = torch.nn.Linear(7, 7)
        self.scale = torch.nn.Parameter(torch.tensor([1.5]))
        self.norm = torch.nn.LayerNorm(7)
        self.last = torch.nn.Linear(7, 5, bias=False)
        self.tied = torch.nn.Linear(7, 5, bias=False)
        self.tied.weight = self.last.weight
        self.kernel = torch.nn.Parameter(torch.randn(3, 3, 5, 1))
        self.register_buffer("offset", torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.time_embed(self.first(x)) * self.scale)
        return self.last(hidden) + self.tied(hidden.tanh()) * self.kernel.mean((0, 1, 3)) + self.offset


def network(config: TextUNetConfig | None) -> torch.nn.Module:
    """`Small`, the tiny network of the engine's tests, or another one."""
    if config is None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return Small()
    return zero_cases.network() if config == MODEL else build_model(config, seed=3)


def _engine(model: torch.nn.Module, case: Case) -> Any:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cut = len(learning) // 3 if case.groups == 2 else len(learning)
    groups = [{"params": part} for part in (learning[:cut], learning[cut:]) if part]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay)
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": OPTIM.clip_grad_norm,
        "bf16": {"enabled": case.bf16},
        "zero_optimization": {"stage": case.stage, "memory_efficient_linear": False, **case.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }
    if case.wide:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config, dist_init_required=False)
    return engine


def _step(engine: Any, step: int, ranks: distributed.Ranks, case: Case) -> float:
    total, parts = torch.zeros(()), micro_batches(step, ranks.rank, ranks.world, 2)
    for part in parts:
        loss = _loss(engine, part, case)
        engine.backward(loss)
        engine.step()
        total += loss.detach() / len(parts)
    return float(distributed.sum_over_ranks(total)) / ranks.world


def _loss(engine: Any, part: tuple[torch.Tensor, ...], case: Case) -> torch.Tensor:
    z, t, text, target = part
    if case.model is None:
        return (engine(z.flatten(1)[:, :5].to(case.dtype)).float() - target.flatten(1)[:, :5]).square().mean()
    wider = torch.nn.functional.pad(text, (0, case.model.context_dim - text.shape[-1]))
    return loss_of(engine, (z, t, wider, target), case.dtype)


def _state(engine: Any) -> dict[str, Tensors]:
    """Whole masters and moments as DeepSpeed itself puts them together (collective)."""
    learning = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False  # of torch's AdamW it links before there are any
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {"master": {name: safe_get_full_fp32_param(p).clone() for name, p in learning.items()}}
    for kind in ("exp_avg", "exp_avg_sq"):
        found[kind] = {name: safe_get_full_optimizer_state(p, kind).clone() for name, p in learning.items()}
    return found
