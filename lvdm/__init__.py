"""lvdm: train latent video diffusion models at scale (LVDM, arXiv 2211.13221)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lvdm.inference import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``lvdm.load``, imported when it is asked for: configs are checked without torch."""
    if name == "load":
        from lvdm.inference import load

        return load
    raise AttributeError(f"module 'lvdm' has no attribute {name!r}")
