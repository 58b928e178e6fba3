"""The foreign layouts that are one file of LVDM; those of diffusers and Stable Diffusion are read beside them."""

from __future__ import annotations

from typing import Literal

from lvdm.weights.conversion import Contents, Layout, Mismatch, Shapes
from lvdm.weights.lvdm_release import AutoencoderLayout, ClipLayout, TextLayout

LAYOUTS: dict[str, Layout] = {
    "lvdm-ae": AutoencoderLayout(),
    "lvdm-short": ClipLayout("LVDM's short unconditional model", mask_channel=False, temporal_length=4),
    "lvdm-pred": ClipLayout("LVDM's prediction model", mask_channel=True, temporal_length=4),
    "lvdm-interp": ClipLayout("LVDM's interpolation model", mask_channel=True, temporal_length=5),
    "lvdm-t2v": TextLayout(),
}
"""Layouts by the name of ``--layout``."""


def identify(shapes: Shapes, layout: str, weights: Literal["ema", "live"]) -> tuple[str, Contents]:
    """What names and shapes hold, in the layout of that name or, with ``auto``, in the one that fits best.

    Raises:
        Mismatch: they do not fit; the message tells the nearest layout.
    """
    fits = {name: candidate.recognise(shapes) for name, candidate in LAYOUTS.items()}
    nearest = max(fits, key=lambda name: fits[name])
    taken = nearest if layout == "auto" else layout
    try:
        return taken, LAYOUTS[taken].to_ours(shapes, weights)
    except Mismatch as fault:
        hint = f"the nearest known layout is {nearest}" if fits[nearest] > 0.01 else "no known layout is near"
        raise Mismatch(f"it is no {taken} checkpoint: tensors {fault}; {hint}") from None
