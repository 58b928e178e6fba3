"""The frozen models of an encoding job, with copies to and from their device beside the computing.

Shape letters as in `lvdm.models.frozen`; N clips of one call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lvdm.config import ClipConfig, LatentDiffusionTraining
from lvdm.errors import UserError
from lvdm.inference import frames_to_float, load_vae
from lvdm.models.frozen import FrozenTextEncoder, FrozenVAE, load_text_encoder
from lvdm.models.memory import free_bytes, peak_bytes

Part = Literal["latents", "text"]
CAPTIONS_AT_ONCE = 64
"""In one call of the text encoder."""
_FEWEST_FRAMES, _MOST_FRAMES = 16, 128  # in one call: more are not faster
_PIXELS_ON_CPU = 1 << 20  # as many as keep all cores at it
_SHARE_OF_MEMORY = 0.5  # kernels have workspaces, and memory is fragmented


@dataclass(frozen=True)
class Coming:
    """A tensor on its way to the host."""

    tensor: Tensor
    arrived: Any = None
    """CUDA event; none if it is there already."""

    def wait(self) -> Tensor:
        """The tensor, once it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor


class Encoders:
    """A VAE, a text encoder, or both. What they give comes to the host while the next is computed."""

    def __init__(self, vae: FrozenVAE | None, text: FrozenTextEncoder | None, device: torch.device) -> None:
        self.vae, self.text, self.device = vae, text, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def frames_that_fit(self, sizes: Sequence[ClipConfig]) -> int:
        """Frames of the largest of ``sizes`` that the VAE can be given at once, by what a trial of few takes.

        Raises:
            UserError: not even those fit.
        """
        if self.vae is None:
            return 1
        size = max(sizes, key=lambda one: one.height * one.width * one.frames)
        few = self.vae.limit_calls(1, size.frames)
        frames = torch.zeros(1, 3, few, size.height, size.width, device=self.device)
        vae, free = self.vae, free_bytes(self.device)
        try:
            needed = peak_bytes(lambda: vae.encode(frames)) / _SHARE_OF_MEMORY
        except torch.OutOfMemoryError:
            needed = math.inf
        if needed > free:
            raise UserError(
                f"encoding {few} frames of {size.height}x{size.width} takes more memory than the {free / 1e9:.1f} GB "
                f"that are free; set a smaller data.video.clip"
            )
        worthwhile = _MOST_FRAMES if self.device.type == "cuda" else _PIXELS_ON_CPU // (size.height * size.width)
        most = min(max(worthwhile, _FEWEST_FRAMES), _MOST_FRAMES)
        times = max(1, min(int(free // needed), most // few))
        return few * 2 ** int(math.log2(times))

    def limit_calls(self, frames: int, sizes: Sequence[ClipConfig]) -> None:
        """Give the VAE at most so many frames at once."""
        if self.vae is not None:
            self.vae.limit_calls(frames, max(size.frames for size in sizes))

    def moments(self, clips: Sequence[Tensor]) -> Coming:
        """Moments ``[N, 2C, T, H, W]``, fp32, of N uint8 clips ``[T, H, W, 3]``."""
        assert self.vae is not None
        if self._copies is None:
            clips_NTHWC = torch.stack(list(clips)).to(self.device)
        else:  # one by one, as each is in pinned memory and what they are stacked into would not be
            main = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._copies):
                clips_NTHWC = torch.stack([clip_THWC.to(self.device, non_blocking=True) for clip_THWC in clips])
            main.wait_stream(self._copies)
            clips_NTHWC.record_stream(main)
        return self._home(self.vae.encode(frames_to_float(clips_NTHWC.permute(0, 4, 1, 2, 3))))

    def states(self, captions: Sequence[str]) -> list[Coming]:
        """States ``[L, D]``, fp32, of each caption, without its padding where that is masked."""
        assert self.text is not None
        states_BLD, mask_BL = self.text.encode(captions)
        kept = mask_BL.sum(1).tolist() if self.text.mask_padding else [states_BLD.shape[1]] * len(captions)
        return [self._home(states[:length].float()) for states, length in zip(states_BLD, kept, strict=True)]

    def _home(self, result: Tensor) -> Coming:
        if self._copies is None:
            return Coming(result.to("cpu"))
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            home = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            home.copy_(result, non_blocking=True)
            result.record_stream(self._copies)
            arrived = torch.cuda.Event()
            arrived.record(self._copies)
        return Coming(home, arrived)


def load_encoders(
    config: LatentDiffusionTraining, device: torch.device, dtype: torch.dtype, only: Part | None = None
) -> Encoders:
    """The VAE and text encoder that a config names, or one of them. Raises `UserError`."""
    if only == "text" and config.text is None:
        raise UserError("the config has no section text, so there is no text to encode")
    vae = load_vae(config.vae, device, dtype, scaling=(1.0, 0.0)) if only != "text" else None
    text = load_text_encoder(config.text, device, dtype) if config.text and only != "latents" else None
    return Encoders(vae, text, device)
