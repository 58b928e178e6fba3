"""Activation checkpointing, put around a model's blocks from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Sequence[nn.Module], every: int = 1) -> None:
    """Make each block, or each ``every``-th one, drop its activations and compute them again in the backward pass.

    The instance's ``forward`` is wrapped, so names in the state dict and module hooks (ZeRO-3's, which gather a block's
    weights before its forward) stay as they are. Without gradients a block runs as before. Blocks must be deterministic
    functions of their inputs: no random state is kept.
    """
    for block in blocks[::every]:
        block.forward = partial(_rematerialise, block.forward)


def _rematerialise(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
