"""Images as frames, by Pillow: JPEG, PNG and WebP."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lvdm.data.fit import Resize, fit
from lvdm.errors import BadSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_FORMATS = ("JPEG", "PNG", "WEBP")  # what else Pillow reads may start programs or follow paths
_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_FRAME = re.compile(rf"(\d{{1,9}})\.(?:{'|'.join(IMAGE_EXTENSIONS)})", re.ASCII)
# what Pillow raises for damaged files
_FAULTS = (OSError, ValueError, SyntaxError, struct.error, IndexError, KeyError, Image.DecompressionBombError)


def decode(data: bytes, height: int, width: int, resize: Resize, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """One image, upright, uint8 RGB ``[H, W, 3]``, scaled as `fit` says but not yet cut; what is transparent is black.

    Returns:
        with the height and width that it had.
    Raises:
        BadSample: no image of these formats, damaged, of more than 8 bits, or of more than ``max_pixels``.
    """
    with _opened(data, max_pixels) as image:
        shown = image.height, image.width
        how = fit(*shown, height, width, resize)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
        scaled = image.convert("RGB").resize((how.width, how.height), Image.Resampling.BILINEAR)
    return np.asarray(scaled), shown


def size_of(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height of an image as shown. Raises as `decode` does."""
    with _opened(data, max_pixels) as image:
        return image.width, image.height


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The image, upright; every error of Pillow becomes a `BadSample`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are checked here
            image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > max_pixels:
                raise BadSample(f"an image of {image.width}x{image.height} exceeds the limit of {max_pixels} pixels")
            if image.mode not in _EIGHT_BITS:
                raise BadSample(f"images of mode {image.mode} are not supported: they have more than 8 bits a channel")
            yield ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise BadSample(f"not decodable: no {', '.join(_FORMATS)}") from None
    except MemoryError:
        raise BadSample("not decodable: it takes more memory than there is") from None
    except _FAULTS as error:
        raise BadSample(f"not decodable: {type(error).__name__}: {error}") from None


def frame_number(extension: str) -> int | None:
    """The number of the frame that a sample's member is, by its extension such as ``0007.jpg``; None if it is none."""
    found = _FRAME.fullmatch(extension)
    return int(found[1]) if found else None
