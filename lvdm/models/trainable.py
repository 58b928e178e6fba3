"""Which part of a network learns: the rest is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lvdm.errors import UserError


def freeze_all_but(module: nn.Module, patterns: Sequence[str]) -> None:
    """Leave gradients to the parameters whose names match one of the shell patterns; no patterns: to all.

    Raises:
        UserError: a pattern matches no parameter.
    """
    names = [name for name, _ in module.named_parameters()]
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise UserError(f"model.trainable: {idle[0]!r} matches no parameter; names look like {names[len(names) // 2]}")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not patterns or any(fnmatchcase(name, pattern) for pattern in patterns))
