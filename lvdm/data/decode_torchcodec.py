"""TorchCodec in place of PyAV: an optional backend of `lvdm.data.decode.decode_frames`.

It needs the package ``torchcodec`` and the FFmpeg libraries of the system. What may be opened, the numbers of frames
and the budgets are those of `lvdm.data.decode`, which looks at the file first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize as resized

from lvdm.data.decode import MAX_FRAME_PIXELS
from lvdm.data.fit import Resize, fit
from lvdm.errors import BadSample, UserError


def decode(
    data: bytes,
    clips: Sequence[Sequence[int]],
    height: int,
    width: int,
    resize: Resize,
    aspect: Fraction,
) -> Iterator[tuple[int, np.ndarray, tuple[int, int]]]:
    """The frames of each of some clips by their numbers, uint8 RGB ``[H, W, 3]``, scaled as `fit` says, not yet cut.

    Args:
        aspect: of a pixel as shown, its width over its height.
    Yields:
        the number, the frame, and the height and width that it had as shown.
    Raises:
        BadSample: they do not decode, or are larger than the limit, whatever the header said.
        UserError: TorchCodec is not installed, or finds no FFmpeg.
    """
    kind, decoder = _decoder(), None
    for indices in clips:
        try:
            decoder = decoder or kind(data, seek_mode="exact", num_ffmpeg_threads=1)
            frames_TCHW = decoder.get_frames_at(list(indices)).data
        except (RuntimeError, ValueError, IndexError) as error:
            raise BadSample(f"not decodable: {type(error).__name__}: {str(error).strip().splitlines()[0]}") from None
        tall, wide = frames_TCHW.shape[2:]
        if tall * wide > MAX_FRAME_PIXELS:
            raise BadSample(f"a frame of {wide}x{tall} exceeds the limit of {MAX_FRAME_PIXELS} pixels")
        shown = tall, max(round(wide * aspect), 1)
        how = fit(*shown, height, width, resize)
        # one by one, as before they are cut they may be large
        for number, frame_CHW in zip(indices, frames_TCHW, strict=True):
            scaled = resized(frame_CHW, [how.height, how.width], InterpolationMode.BILINEAR, antialias=True)
            yield number, scaled.permute(1, 2, 0).contiguous().numpy(), shown


def _decoder() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:  # without FFmpeg its libraries do not load
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"data.video.decoder=torchcodec: {reason}; install it and FFmpeg, or use pyav") from None
    return VideoDecoder
