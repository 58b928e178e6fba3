"""The small models of other projects, which the tests of weights make."""

from tests.weights.conftest import pipeline_parts, unet2d, unet3d

__all__ = ["pipeline_parts", "unet2d", "unet3d"]
