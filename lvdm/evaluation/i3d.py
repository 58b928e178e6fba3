"""I3D (arXiv 1705.07750): Inception v1 inflated to video, trained on Kinetics-400, whose logits FVD compares.

Its weights, ``i3d_pretrained_400.pt``, come from TATS (github.com/SongweiGe/TATS); names and numbers are those.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lvdm.errors import UserError

SIZE = 224
"""Height and width of the frames that the network is given."""
MIN_FRAMES = 9
"""Fewer leave nothing to average after three halvings."""
_CLASSES = 400

# channels of the branches: 1x1 | 1x1 -> 3x3 | 1x1 -> 3x3 | pool -> 1x1
_MIXED = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}


class I3D(nn.Module):
    """Clips ``[B, 3, T, 224, 224]`` in -1..1 to logits ``[B, 400]``."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        channels = 192
        for name, branches in _MIXED.items():
            self.add_module(f"Mixed_{name}", _Mixed(channels, branches))
            channels = branches[0] + branches[2] + branches[4] + branches[5]
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(channels, _CLASSES, 1)})

    def forward(self, clips_BCTHW: Tensor) -> Tensor:
        """Logits, averaged over time. Raises `UserError` for clips of fewer than 9 frames."""
        if clips_BCTHW.shape[2] < MIN_FRAMES:
            raise UserError(f"clips of {clips_BCTHW.shape[2]} frames are too short for I3D, which needs {MIN_FRAMES}")
        x = _pool(self.Conv3d_1a_7x7(clips_BCTHW), (1, 3, 3), (1, 2, 2))
        x = _pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in _MIXED:
            if name == "4b":
                x = _pool(x, (3, 3, 3), (2, 2, 2))
            elif name == "5b":
                x = _pool(x, (2, 2, 2), (2, 2, 2))
            x = self.get_submodule(f"Mixed_{name}")(x)
        x = F.avg_pool3d(x, (2, SIZE // 32, SIZE // 32), stride=1)
        return self.logits["conv3d"](x).mean((2, 3, 4))


class _Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU; padded as TensorFlow's SAME."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out, eps=1e-3, momentum=0.01)
        self._window = (kernel,) * 3, (stride,) * 3

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_pad_same(x_BCTHW, *self._window))))


class _Mixed(nn.Module):
    """Inception's four branches side by side."""

    def __init__(self, channels: int, branches: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = _Unit(channels, branches[0], 1)
        self.b1a, self.b1b = _Unit(channels, branches[1], 1), _Unit(branches[1], branches[2], 3)
        self.b2a, self.b2b = _Unit(channels, branches[3], 1), _Unit(branches[3], branches[4], 3)
        self.b3b = _Unit(channels, branches[5], 1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        pooled = _pool(x_BCTHW, (3, 3, 3), (1, 1, 1))
        parts = self.b0(x_BCTHW), self.b1b(self.b1a(x_BCTHW)), self.b2b(self.b2a(x_BCTHW)), self.b3b(pooled)
        return torch.cat(parts, dim=1)


def _pool(x_BCTHW: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(_pad_same(x_BCTHW, kernel, stride), kernel, stride)


def _pad_same(x_BCTHW: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Zeros so that each axis gives ``ceil(size / stride)``, the odd one behind: TensorFlow's SAME."""
    padding: list[int] = []
    for size, window, step in zip(x_BCTHW.shape[2:], kernel, stride, strict=True):
        total = max(window - (step if size % step == 0 else size % step), 0)
        padding = [total // 2, total - total // 2, *padding]
    return F.pad(x_BCTHW, padding) if any(padding) else x_BCTHW


def preprocess(clips_BTHWC: Tensor) -> Tensor:
    """uint8 ``BTHWC`` to what the network takes: bilinear to 224 x 224 whatever the aspect, -1..1 ``BCTHW``."""
    frames = clips_BTHWC.permute(0, 1, 4, 2, 3).flatten(0, 1).float() / 255
    frames = F.interpolate(frames, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (frames * 2 - 1).unflatten(0, clips_BTHWC.shape[:2]).transpose(1, 2).contiguous()
