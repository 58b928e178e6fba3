"""A network under DeepSpeed ZeRO: forward, backward, step, averaged weights, and its state as named fragments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch

from lvdm.config import BatchConfig, EngineConfig, OptimConfig
from lvdm.engine import fragments
from lvdm.engine.bits import Rest
from lvdm.engine.deepspeed_config import accumulation_steps, deepspeed_config
from lvdm.engine.distributed import Ranks
from lvdm.engine.fragments import Fragment
from lvdm.engine.optim import STATE_KEYS, AdamWWithEMA


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did."""

    applied: bool
    """False where a non-finite gradient on any rank made all ranks skip the step."""
    grad_norm: float
    """Norm of the whole gradient before clipping; infinite where the step was skipped."""


class Engine:
    """``module`` trained by AdamW with EMA under ZeRO.

    Call it like the module. One optimiser step is ``accumulation`` pairs of forward and `backward`, then `step`.
    """

    def __init__(
        self, module: torch.nn.Module, config: EngineConfig, batch: BatchConfig, optim: OptimConfig, ranks: Ranks
    ) -> None:
        on_gpu, on_bf16 = ranks.device.type == "cuda", config.precision == "bf16"
        self.ranks = ranks
        self.stage, self.precision = config.zero_stage, config.precision
        self.dtype = torch.bfloat16 if on_bf16 else torch.float32
        self.accumulation = accumulation_steps(batch, ranks.world)
        learning = [param for param in module.parameters() if param.requires_grad]
        elements = sum(param.numel() for param in learning)
        self._clip_grad_norm = optim.clip_grad_norm
        self.record = deepspeed_config(config, batch, optim, ranks.world, on_gpu, elements)
        # DeepSpeed makes its fp32 masters from weights it has already rounded to bf16; these are put back below.
        exact = {name: p.detach().clone() for name, p in module.named_parameters()} if on_bf16 else {}
        self.frozen_names = [name for name, param in module.named_parameters() if not param.requires_grad]
        """Parameters that do not learn."""
        # Kept aside on the rank that stores them, since ZeRO-3 will cut them up.
        stored = self.frozen_names if ranks.is_main else []
        self._frozen = {name: module.get_parameter(name).detach().float().cpu().clone() for name in stored}
        self._adamw = AdamWWithEMA(learning, optim, fused=on_gpu and not config.offload_optimizer)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module, optimizer=self._adamw, config=self.record, dist_init_required=False
        )
        self.masters = fragments.masters(self._zero)
        pieces = self.fragments()
        fragments.clear_padding(self.masters, pieces)
        for piece in pieces if on_bf16 else []:
            piece.of(piece.master).copy_(exact[piece.name].flatten().narrow(0, piece.start, piece.length))
        for master in self.masters:
            self._adamw.materialize(master)
        self.rest = Rest(self._at_rest, ranks.device)
        """Whether bits of the state have changed between two steps, while the network only computed with them."""

    @property
    def module(self) -> torch.nn.Module:
        """The network itself."""
        module: torch.nn.Module = self._engine.module
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of the network."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of ``loss`` (the mean over a micro-batch) over micro-batches and ranks."""
        self._engine.backward(loss)

    def step(self, lr: float, limit: float = math.inf) -> StepResult:
        """Finish a micro-batch; after the last one of the step, update the weights with learning rate ``lr``.

        Args:
            limit: norm to which a larger gradient is scaled, where ``optim.clip_grad_norm`` is not lower still.
        """
        clip = min(limit, self._clip_grad_norm or math.inf)
        self._zero.clip_grad = clip if math.isfinite(clip) else 0.0
        for group in self._zero.param_groups:
            group["lr"] = lr
        updates = self._engine.is_gradient_accumulation_boundary()
        if updates:
            self.rest.look()
        self._engine.step()
        if updates:
            if not self._engine.was_step_applied():
                fragments.drop_gradients(self._zero)
            self.rest.mark()
        norm = self._engine.get_global_grad_norm()
        return StepResult(self._engine.was_step_applied(), float("inf") if norm is None else float(norm))

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Compute with the moving average of the weights inside the block; exact and reversible (collective)."""
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def _swap_average(self) -> None:
        for master in self.masters:
            average = self._adamw.state[master]["ema"]
            kept = master.detach().clone()
            master.data.copy_(average)
            average.copy_(kept)
        fragments.publish_masters(self._zero)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients and eval mode inside the block."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    # State as named fragments: what checkpoints read and write.

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter."""
        return fragments.shapes(self.module)

    def fragments(self) -> list[Fragment]:
        """The pieces of parameters that this rank holds."""
        return fragments.fragments(self._zero, self.module, self.ranks.rank)

    def tensors(self, fragment: Fragment) -> dict[str, torch.Tensor]:
        """Views of the fp32 master, both moments and the average of a fragment, by the name of their kind."""
        state = self._adamw.state[fragment.master]
        return {"master": fragment.of(fragment.master)} | {key: fragment.of(state[key]) for key in STATE_KEYS}

    def frozen(self) -> dict[str, torch.Tensor]:
        """What this rank stores of the parameters that do not learn: on the main rank all of them, fp32."""
        return self._frozen

    @property
    def optimizer_step(self) -> int:
        """Steps applied so far."""
        return int(self._adamw.state[self.masters[0]]["step"])

    def restored(self, optimizer_step: int) -> None:
        """Take over what was written into `tensors` of all fragments, after ``optimizer_step`` applied steps."""
        for master in self.masters:
            self._adamw.state[master]["step"].fill_(optimizer_step)
        fragments.publish_masters(self._zero)
        self.rest.mark()

    # What ranks hold more than once: what `desync.check` compares.

    def replicas(self) -> dict[str, torch.Tensor]:
        """The parameters that every rank holds whole, by name."""
        return fragments.replicas(self._zero, self.module)

    def weights_of(self, fragment: Fragment) -> torch.Tensor:
        """What the network computes with where this rank's fragment is, flat; it is the master, rounded to `dtype`."""
        return fragments.weights_of(fragment, self.module.get_parameter(fragment.name))

    def _at_rest(self) -> dict[str, list[torch.Tensor]]:
        """The state that this rank holds; without what is offloaded, which is slow to read."""
        kinds = fragments.weights_at_rest(self._zero, self.module) | {"fp32 masters": list(self.masters)}
        for key in STATE_KEYS:
            kinds[key] = [self._adamw.state[master][key] for master in self.masters]
        return {
            kind: [tensor for tensor in tensors if tensor.device.type == self.ranks.device.type]
            for kind, tensors in kinds.items()
        }
