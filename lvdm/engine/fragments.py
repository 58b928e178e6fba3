"""Where each parameter lies in DeepSpeed's flat fp32 masters: the one file that knows ZeRO's internals.

Checked by the tests for DeepSpeed 0.19. In every stage a rank holds flat fp32 tensors ("masters"), each a concatenation
of pieces of parameters. A `Fragment` names such a piece; optimiser state has the shape of its master, so one address
serves weights, moments and average alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, start + length)`` of the flattened parameter ``name``, held at ``offset`` of ``master``."""

    name: str
    start: int
    length: int
    master: torch.Tensor
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The view of this piece in ``flat``, which is the master itself or state of its shape."""
        return flat.detach().narrow(0, self.offset, self.length)


def masters(optimizer: Any) -> list[torch.Tensor]:
    """The flat fp32 masters that this rank holds."""
    match optimizer:
        case DeepSpeedZeroOptimizer():
            return list(optimizer.single_partition_of_fp32_groups)
        case BF16_Optimizer():  # what stage 1 becomes with bf16 and fp32 accumulation
            return list(optimizer.fp32_groups_flat_partition)
        case DeepSpeedZeroOptimizer_Stage3():
            return list(optimizer.fp32_partitioned_groups_flat)
    raise TypeError(f"no ZeRO optimizer: {type(optimizer).__name__}")


def fragments(optimizer: Any, module: torch.nn.Module, rank: int) -> list[Fragment]:
    """All pieces of trainable parameters that this rank holds."""
    names = {id(param): name for name, param in module.named_parameters() if param.requires_grad}
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(_stage3_fragments(optimizer, names, rank))
    flats = masters(optimizer)
    found = []
    for param in module.parameters():
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is not None:
            source, place = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = flats[mapping.param_group_index]
            found.append(Fragment(names[id(param)], source.start, source.numel, flat, place.start))
    return found


def _stage3_fragments(optimizer: Any, names: dict[int, str], rank: int) -> Iterator[Fragment]:
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for param in group:
            per_rank = param.ds_tensor.ds_numel
            start = rank * per_rank
            length = min(per_rank, param.ds_numel - start)  # the last ranks hold padding
            if length > 0:
                yield Fragment(names[id(param)], start, length, flat, offset)
            offset += per_rank


def replicas(optimizer: Any, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that every rank holds whole, frozen ones too, by name: in stages 1 and 2 all, in stage 3 the small
    ones that it does not partition."""
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return {name: param.data for name, param in module.named_parameters()}
    whole = {id(param) for param in optimizer.persistent_parameters if param.data.numel() == param.ds_numel}
    return {name: param.data for name, param in module.named_parameters() if id(param) in whole}


def weights_of(piece: Fragment, param: Any) -> torch.Tensor:
    """What the network on this rank computes with for a fragment of ``param`` that this rank holds; flat."""
    if param.data.numel() < getattr(param, "ds_numel", 0):  # stage 3 has partitioned it
        weights: torch.Tensor = param.ds_tensor.data.flatten()[: piece.length]
    else:
        weights = param.data.flatten()[piece.start : piece.start + piece.length]
    return weights


def weights_at_rest(optimizer: Any, module: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """All weights that this rank holds to compute with, in as few tensors as DeepSpeed keeps them in."""
    frozen: list[Any] = [param for param in module.parameters() if not param.requires_grad]
    match optimizer:
        case DeepSpeedZeroOptimizer():
            return {"weights": [*optimizer.bit16_groups_flat, *frozen]}
        case BF16_Optimizer():
            return {"weights": [*optimizer.bf16_groups_flat, *frozen]}
        case DeepSpeedZeroOptimizer_Stage3():
            return {
                "weights": [*optimizer.fp16_partitioned_groups_flat, *(param.ds_tensor for param in frozen)],
                # which are not there before the first step, nor behind one that was skipped
                "whole weights": list(replicas(optimizer, module).values()),
            }
    raise TypeError(f"no ZeRO optimizer: {type(optimizer).__name__}")


def drop_gradients(optimizer: Any) -> None:
    """Forget the gradients of a step that was skipped.

    Stage 2 with offloading and bf16 keeps its buffer of them (DeepSpeed 0.19.8): one gradient that is not finite would
    make it skip every step from then on.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.cpu_offload:
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


def clear_padding(flats: Iterable[torch.Tensor], pieces: Sequence[Fragment]) -> None:
    """Zero what no parameter owns: ZeRO-3 pads with uninitialised memory, whose NaNs would spread into the state."""
    for flat in flats:
        owned = torch.zeros_like(flat, dtype=torch.bool)
        for piece in pieces:
            if piece.master is flat:
                piece.of(owned).fill_(True)
        flat.data.masked_fill_(~owned, 0.0)


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter, also where ZeRO-3 has partitioned it."""
    return {name: tuple(getattr(param, "ds_shape", param.shape)) for name, param in module.named_parameters()}


def publish_masters(optimizer: Any) -> None:
    """Copy the masters into the weights the network computes with, on all ranks (collective)."""
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()  # whole weights that are still around would be used as they are
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:  # small ones that ZeRO-3 keeps whole on every rank
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
