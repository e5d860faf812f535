"""What is done to a patch, to see how far a backbone's embedding moves?

Each alteration is fixed, so that every backbone sees the same pixels. It is done to what a view shows of a patch,
before that is resized: sizes are in pixels of the patch. `features.alterations` says which views have one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from features.alterations import ALTERATIONS
from features.device import constant

BLUR_SIGMA = 1.0  # pixels of the patch
_RADIUS = 4  # pixels; a Gaussian is cut off there, at four sigma
STAIN = (1.2, 0.8, 1.0)  # of haematoxylin, eosin and the rest: where the strong augmentation of Tellez et al. 2019 ends
# Optical density of each stain in red, green and blue, a row each (Ruifrok and Johnston, 2001).
HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


def alter(pixels: Tensor, alteration: str) -> Tensor:
    """Alter pixels (b, 3, h, w) uint8 in one of the ways of `features.alterations`, and give uint8.

    >>> alter(torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8).expand(1, 3, 2, 2), "rot90")[0, 0].tolist()
    [[2, 4], [1, 3]]
    """
    return _WAYS[alteration](pixels)


def _turned(pixels: Tensor) -> Tensor:
    return torch.rot90(pixels, 1, (2, 3))


def _mirrored(pixels: Tensor) -> Tensor:
    return pixels.flip(3)


def _restained(pixels: Tensor) -> Tensor:
    """Make each stain as much stronger as `STAIN` says: optical density, apart into stains and back."""
    stains = constant(HED, pixels.device)
    stains = stains / stains.norm(dim=1, keepdim=True)
    # (3, 3): from density in red, green, blue to the same with other amounts of stain.
    change = torch.linalg.inv(stains) @ torch.diag(constant(STAIN, pixels.device)) @ stains
    density = -torch.log((pixels.float() + 1) / 256)
    return _rounded(256 * torch.exp(-torch.einsum("bchw,cd->bdhw", density, change)) - 1)


def _blurred(pixels: Tensor) -> Tensor:
    """Blur by a Gaussian, rows and columns; beyond the edge the outermost pixels go on."""
    at = torch.arange(-_RADIUS, _RADIUS + 1, device=pixels.device, dtype=torch.float32)
    weights = torch.exp(-(at**2) / (2 * BLUR_SIGMA**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pixels.float(), [_RADIUS] * 4, mode="replicate")
    rows = F.conv2d(padded, weights, groups=3)
    return _rounded(F.conv2d(rows, weights.transpose(2, 3), groups=3))


def _halved(pixels: Tensor) -> Tensor:
    """Average squares of 2 x 2 pixels; of an odd size the last row and column are averaged alone."""
    return _rounded(F.avg_pool2d(pixels.float(), 2, ceil_mode=True, count_include_pad=False))


def _rounded(levels: Tensor) -> Tensor:
    return levels.round().clamp(0, 255).to(torch.uint8)


_WAYS: Mapping[str, Callable[[Tensor], Tensor]] = dict(
    zip(ALTERATIONS, (_turned, _mirrored, _restained, _blurred, _halved), strict=True)
)
