"""Distances between two sets of feature vectors ``[N, D]``, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1024  # of a kernel matrix held at once


def frechet_distance(real_ND: Tensor, fake_MD: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians fitted to the features; FVD where these are I3D's.

    ``|m1 - m2|^2 + tr(S1 + S2) - 2 tr (S1 S2)^(1/2)`` with unbiased covariances (arXiv 1812.01717). It falls with the
    number of samples, so scores of different numbers cannot be compared.
    """
    real_ND, fake_MD = real_ND.double(), fake_MD.double()
    root_DD = _matrix_root(real_ND.T.cov())
    fake_DD = fake_MD.T.cov()
    # S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2)
    cross = torch.linalg.eigvalsh(root_DD @ fake_DD @ root_DD).clamp(min=0).sqrt().sum()
    means = (real_ND.mean(0) - fake_MD.mean(0)).square().sum()
    return float(means + root_DD.square().sum() + fake_DD.trace() - 2 * cross)


def kernel_distance(real_ND: Tensor, fake_MD: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3``; KVD where features are I3D's."""
    real_ND, fake_MD = real_ND.double(), fake_MD.double()
    n, m = len(real_ND), len(fake_MD)
    within_real = _kernel_sum(real_ND, real_ND) - _kernel(real_ND.square().sum(1), real_ND.shape[1])
    within_fake = _kernel_sum(fake_MD, fake_MD) - _kernel(fake_MD.square().sum(1), fake_MD.shape[1])
    between = _kernel_sum(real_ND, fake_MD)
    return within_real / (n * (n - 1)) + within_fake / (m * (m - 1)) - 2 * between / (n * m)


def _matrix_root(matrix_DD: Tensor) -> Tensor:
    """The symmetric square root of a covariance."""
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    return (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T


def _kernel_sum(left_ND: Tensor, right_MD: Tensor) -> float:
    return sum(_kernel(rows @ right_MD.T, right_MD.shape[1]) for rows in left_ND.split(_ROWS))


def _kernel(products: Tensor, dim: int) -> float:
    return float((products / dim + 1).pow(3).sum())
