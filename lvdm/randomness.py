"""Every random draw about a sample, as a pure function of (seed, position, purpose).

A Philox counter-based generator keyed by ``[seed, position]`` gives each sample of the run its own streams, one per
purpose. No draw depends on ranks, workers, batch composition or on what was drawn before, so a run that resumes at a
position replays nothing and continues exactly. (``torch.Generator`` on CPU keeps 32 bits of its seed and is not used.)
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

_MASK64 = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw is for; the value is part of the counter, so it never changes its meaning."""

    CLIP = 0  # start frame, crop and flip
    CAPTION = 1  # which caption, and whether it is dropped
    POSTERIOR = 2  # noise of the VAE's posterior sample
    TIMESTEP = 3  # diffusion time
    NOISE = 4  # diffusion noise
    SAMPLING = 5  # initial noise of generated samples
    SAMPLER_STEP = 6  # noise that ancestral samplers add at each step
    SYNTHETIC = 7  # generated data
    GIVEN_FRAMES = 8  # which frames the network is given, and how noisy
    MIX = 9  # which source each place of a mixed stream comes from


def generator(seed: int, position: int, purpose: Purpose) -> np.random.Generator:
    """The generator of one sample for one purpose; ``position`` counts the samples of the run from 0."""
    key = np.array([seed & _MASK64, position & _MASK64], dtype=np.uint64)
    counter = np.array([0, 0, 0, int(purpose)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, positions: Sequence[int], purpose: Purpose, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 noise ``[len(positions), *shape]``, one independent stream a position."""
    out = np.empty((len(positions), *shape), dtype=np.float32)
    for row, position in zip(out, positions, strict=True):
        generator(seed, position, purpose).standard_normal(out=row, dtype=np.float32)
    return out


def uniform(seed: int, positions: Sequence[int], purpose: Purpose) -> np.ndarray:
    """Uniform float64 draws in [0, 1), ``[len(positions)]``, one independent stream a position."""
    return np.array([generator(seed, position, purpose).random() for position in positions])


def seed_from_text(text: str) -> int:
    """A stable 32-bit seed for a string (CRC-32 of its UTF-8 bytes)."""
    return zlib.crc32(text.encode())
