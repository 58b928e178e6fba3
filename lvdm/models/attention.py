"""All attention of the UNets: over the pixels of a frame, to the text, and over the frames of a pixel.

Shape letters: B batch, T frames, S pixels of a frame, N = any batch, Q and K tokens, L text tokens, D channels,
h heads, d channels of a head (``D = h * d``).

Tokens keep their channels last in memory, so that splitting heads is a view and the linear layers need no copies.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RelativeKeys = Literal["shaw", "transposed"]


def attend(q_NQhd: Tensor, k_NKhd: Tensor, v_NKhd: Tensor, mask_NK: Tensor | None = None) -> Tensor:
    """Softmax attention ``[N, Q, h, d]``; ``mask_NK`` is true where a key may be seen."""
    mask_N11K = None if mask_NK is None else mask_NK[:, None, None, :]
    out_NhQd = F.scaled_dot_product_attention(
        q_NQhd.transpose(1, 2), k_NKhd.transpose(1, 2), v_NKhd.transpose(1, 2), attn_mask=mask_N11K
    )
    return out_NhQd.transpose(1, 2)


def relative_table(table_Rd: Tensor, frames: int) -> Tensor:
    """``[T, T, d]``: row (i, j) is the entry for distance ``j - i``, clipped to what the table holds."""
    limit = table_Rd.shape[0] // 2
    index = torch.arange(frames, device=table_Rd.device)
    distance = (index[None, :] - index[:, None]).clamp(-limit, limit)
    return table_Rd[distance + limit]


def attend_relative(
    q_BTShd: Tensor,
    k_BTShd: Tensor,
    v_BTShd: Tensor,
    table_k_Rd: Tensor,
    table_v_Rd: Tensor,
    relative_keys: RelativeKeys = "shaw",
) -> Tensor:
    """Attention over T with relative positions (Shaw et al., arXiv 1803.02155), ``[B, T, S, h, d]``.

    ``logit_ij = q_i . (k_j + table_k[j-i]) / sqrt(d)`` and ``out_i = sum_j softmax(logit)_ij (v_j + table_v[j-i])``.
    The terms of the tables are one matrix product per frame i over all pixels and heads at once, so nothing of size
    ``S * T * T * d`` ever exists; the softmax is fp32.

    Args:
        relative_keys: ``transposed`` swaps i and j in the term of the key table and divides it by ``d^(1/4)``, not by
            ``sqrt(d)``: ``q_j . table_k[i-j] / d^(1/4)``. LVDM's unconditional weights were trained with that.
    """
    b, t, s, h, d = q_BTShd.shape
    q_BTShd = q_BTShd * d**-0.5
    table_k_TTd, table_v_TTd = relative_table(table_k_Rd, t), relative_table(table_v_Rd, t)

    logits_BShTT = torch.einsum("bishd,bjshd->bshij", q_BTShd, k_BTShd)
    relative_BTSh_T = torch.matmul(q_BTShd.reshape(b, t, s * h, d), table_k_TTd.transpose(1, 2))
    relative_BShTT = relative_BTSh_T.view(b, t, s, h, t).permute(0, 2, 3, 1, 4)
    if relative_keys == "transposed":
        relative_BShTT = relative_BShTT.transpose(-1, -2) * d**0.25
    logits_BShTT = logits_BShTT + relative_BShTT
    weights_BShTT = logits_BShTT.softmax(dim=-1, dtype=torch.float32).to(q_BTShd.dtype)

    out_BTShd = torch.einsum("bshij,bjshd->bishd", weights_BShTT, v_BTShd)
    weights_BTSh_T = weights_BShTT.permute(0, 3, 1, 2, 4).reshape(b, t, s * h, t)
    return out_BTShd + torch.matmul(weights_BTSh_T, table_v_TTd).view(b, t, s, h, d)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to a context of ``context_dim`` channels."""

    def __init__(self, channels: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x_NQD: Tensor, context_NLD: Tensor | None = None, mask_NL: Tensor | None = None) -> Tensor:
        context = x_NQD if context_NLD is None else context_NLD
        q, k, v = (
            tokens.view(*tokens.shape[:-1], self.heads, -1)
            for tokens in (self.to_q(x_NQD), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attend(q, k, v, mask_NL).flatten(2))


class TemporalAttention(nn.Module):
    """Multi-head attention of each pixel over the frames of its clip.

    With ``max_distance`` there are relative position tables for keys and values, clipped beyond that many frames. Only
    the output starts at zero, so that an inflated model begins as its image model. (LVDM starts q, k and v at zero too:
    what frames show then reaches each other late in training.)
    """

    def __init__(self, channels: int, heads: int, max_distance: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.relative_k: nn.Parameter | None = None
        self.relative_v: nn.Parameter | None = None
        if max_distance is not None:
            self.relative_k = nn.Parameter(torch.empty(2 * max_distance + 1, channels // heads))
            self.relative_v = nn.Parameter(torch.empty(2 * max_distance + 1, channels // heads))
            nn.init.xavier_uniform_(self.relative_k)
            nn.init.xavier_uniform_(self.relative_v)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x_BTSD: Tensor) -> Tensor:
        q, k, v = (
            tokens.view(*tokens.shape[:-1], self.heads, -1)
            for tokens in (self.to_q(x_BTSD), self.to_k(x_BTSD), self.to_v(x_BTSD))
        )
        if self.relative_k is not None and self.relative_v is not None:
            out_BTShd = attend_relative(q, k, v, self.relative_k, self.relative_v)
        else:
            q, k, v = (tokens.transpose(1, 2).flatten(0, 1) for tokens in (q, k, v))
            out_BTShd = attend(q, k, v).unflatten(0, (x_BTSD.shape[0], -1)).transpose(1, 2)
        return self.to_out(out_BTShd.flatten(3))
