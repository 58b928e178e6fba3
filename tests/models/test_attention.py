from __future__ import annotations

import pytest
import torch

from lvdm.models.attention import attend, attend_relative
from lvdm.models.embeddings import timestep_embedding


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_relative_attention_equals_its_definition(frames):
    generator = torch.Generator().manual_seed(frames)
    q, k, v = torch.randn(3, 2, frames, 5, 2, 4, generator=generator, dtype=torch.float64).unbind()
    table_k, table_v = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64).unbind()

    want = torch.zeros_like(q)
    for i in range(frames):
        keys = [k[:, j] + table_k[max(-4, min(4, j - i)) + 4] for j in range(frames)]
        values = [v[:, j] + table_v[max(-4, min(4, j - i)) + 4] for j in range(frames)]
        logits = torch.stack([(q[:, i] * key).sum(-1) / 2 for key in keys])
        want[:, i] = (logits.softmax(0)[..., None] * torch.stack(values)).sum(0)
    torch.testing.assert_close(attend_relative(q, k, v, table_k, table_v), want, atol=1e-6, rtol=1e-6)


def test_relative_attention_with_zero_tables_is_plain_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 5, 2, 8, generator=generator).unbind()
    zeros = torch.zeros(5, 8)
    plain = attend(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))).unflatten(0, (2, 5)).transpose(1, 2)
    torch.testing.assert_close(attend_relative(q, k, v, zeros, zeros), plain)


def test_timestep_embedding():
    embedding = timestep_embedding(torch.tensor([0, 999]), 7)
    assert embedding.dtype == torch.float32
    assert embedding[0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    want = torch.tensor(999 * 10000 ** (-1 / 3))
    torch.testing.assert_close(embedding[1, [1, 4]], torch.stack([want.cos(), want.sin()]), atol=1e-4, rtol=0)
    torch.testing.assert_close(timestep_embedding(torch.tensor([0.5]), 4)[0, 0], torch.tensor(0.5).cos())
