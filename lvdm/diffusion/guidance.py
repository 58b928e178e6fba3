"""Classifier-free guidance (arXiv 2207.12598) as a wrapper around a denoiser: e_u + scale (e_c - e_u).

The same formula holds on eps, v, x0 and flow outputs, because at a given z_t each is an affine function of the others.
A negative prompt is nothing special: its text states take the place of the unconditional ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lvdm.diffusion.denoiser import Denoiser
from lvdm.errors import UserError

Conditioning = Mapping[str, Tensor | None]


def classifier_free_guidance(
    denoiser: Denoiser,
    conditional: Conditioning,
    unconditional: Conditioning | None = None,
    *,
    scale: float = 1.0,
    one_batch: bool = True,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function ``(z_BCTHW, t_B) -> clean latent BCTHW`` that follows the conditioning ``scale`` times as far.

    Args:
        denoiser: the network and its parameterisation.
        conditional: keyword arguments of the network, such as ``text_BLD`` and ``text_mask_BL``; a leading dimension of
            1 is repeated over the batch.
        unconditional: the same keywords for the empty (or negative) prompt. Not needed, nor called, at scale 1.
        scale: 1 follows the conditioning as trained; LVDM's other form, e_c + w (e_c - e_u), is scale 1 + w.
        one_batch: one network call on a doubled batch; off makes two calls and needs half the memory.

    Raises:
        UserError: ``scale`` is not 1 and there is nothing unconditional.
    """
    if scale == 1:
        return lambda z_BCTHW, t_B: denoiser.denoise(z_BCTHW, t_B, **_repeat(conditional, len(z_BCTHW)))
    if unconditional is None:
        raise UserError(f"guidance={scale:g} needs unconditional text states (those of an empty or a negative prompt)")
    negative = unconditional

    def guided(z_BCTHW: Tensor, t_B: Tensor) -> Tensor:
        batch = len(z_BCTHW)
        without, given = _repeat(negative, batch), _repeat(conditional, batch)
        if one_batch:
            both = denoiser.predict(torch.cat([z_BCTHW] * 2), torch.cat([t_B] * 2), **_join(without, given))
            output_u, output_c = both.chunk(2)
        else:
            output_u = denoiser.predict(z_BCTHW, t_B, **without)
            output_c = denoiser.predict(z_BCTHW, t_B, **given)
        return denoiser.to_x0(z_BCTHW, output_u + scale * (output_c - output_u), t_B)

    return guided


def _repeat(conditioning: Conditioning, batch: int) -> dict[str, Tensor | None]:
    return {
        name: value.expand(batch, *value.shape[1:]) if value is not None and len(value) == 1 else value
        for name, value in conditioning.items()
    }


def _join(first: Conditioning, second: Conditioning) -> dict[str, Tensor | None]:
    """Both conditionings along the batch; texts of different lengths are padded and masked."""
    if first.keys() != second.keys():
        raise ValueError(f"conditional and unconditional arguments differ: {sorted(second)} and {sorted(first)}")
    sides = [_with_mask(first), _with_mask(second)] if _needs_mask(first, second) else [dict(first), dict(second)]
    joined: dict[str, Tensor | None] = {}
    for name in sides[0]:
        values = [value for side in sides if (value := side[name]) is not None]
        if len(values) == 1:
            raise ValueError(f"{name} is given on one side of the guidance only")
        if name in ("text_BLD", "text_mask_BL"):
            length = max((value.shape[1] for value in values), default=0)
            values = [_pad_length(value, length) for value in values]
        joined[name] = torch.cat(values) if values else None
    return joined


def _needs_mask(first: Conditioning, second: Conditioning) -> bool:
    texts = [side["text_BLD"] for side in (first, second) if side.get("text_BLD") is not None]
    masks = [side.get("text_mask_BL") for side in (first, second)]
    lengths = {text.shape[1] for text in texts if text is not None}
    return len(lengths) > 1 or (masks[0] is None) != (masks[1] is None)


def _with_mask(conditioning: Conditioning) -> dict[str, Tensor | None]:
    """The conditioning with an explicit text mask (True: a real token)."""
    text_BLD = conditioning["text_BLD"]
    if text_BLD is None or conditioning.get("text_mask_BL") is not None:
        return dict(conditioning)
    return {**conditioning, "text_mask_BL": torch.ones(text_BLD.shape[:2], dtype=torch.bool, device=text_BLD.device)}


def _pad_length(value: Tensor, length: int) -> Tensor:
    """Pad dimension 1 with zeros (False in a mask)."""
    missing = length - value.shape[1]
    return F.pad(value, (0, 0) * (value.ndim - 2) + (0, missing)) if missing else value
