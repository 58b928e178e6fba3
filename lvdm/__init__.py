"""lvdm: train latent video diffusion models at scale (LVDM, arXiv 2211.13221)."""

__version__ = "0.1.0"
