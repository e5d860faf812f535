"""How does a patch look different in every epoch? One affine map and one colour map per sample, on the device.

Mitotic figures have no up, left or handedness, and stain and exposure vary between laboratories. So flips, rotations,
crops and colour changes keep the label. Every sample draws its own values, where torchvision's transforms draw one per
batch. Each fold has a generator of its own, so its images do not depend on which other folds are in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from features.device import constant

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, torchvision's weights for grey


@dataclass(frozen=True)
class AugmentOptions:
    """What may change, and how much. A value of 0 (or a scale of 1 to 1) switches a change off.

    >>> AugmentOptions(rotation=180.0, hue=0.0).rotation
    180.0

    Attributes:
        flip: probability of mirroring left to right.
        flip_vertical: probability of mirroring top to bottom.
        rotation: largest rotation in either direction, in degrees; 180 for any.
        scale: smallest and largest fraction of the patch's area that a random crop keeps.
        ratio: smallest and largest aspect ratio of the crop.
        brightness, contrast, saturation: largest relative change in either direction.
        hue: largest rotation of the hue in either direction, as a fraction of the full circle.

    Raises:
        ValueError: a value outside its range.
    """

    flip: float = 0.5
    flip_vertical: float = 0.5
    rotation: float = 15.0
    scale: tuple[float, float] = (0.8, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02

    def __post_init__(self) -> None:
        for flip in (self.flip, self.flip_vertical):
            if not 0 <= flip <= 1:
                raise ValueError(f"a flip is a probability, got {flip}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must rise within (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must rise and be positive, got {self.ratio}")


def draw(n: int, *, generator: torch.Generator) -> Tensor:
    """Draw the changes of n samples: (n, 11) uniform numbers in [0, 1), on the generator's device.

    All randomness of `augment` is in them, so a resumed run that draws them again changes patches in the same way.
    """
    return torch.rand(n, _N_DRAWS, generator=generator, device=generator.device)


_N_DRAWS = 11


def augment(
    images: Tensor, draws: Tensor, *, size: int, options: AugmentOptions, palette: Tensor | None = None
) -> Tensor:
    """Change every image as its own draws say.

    Args:
        images: (b, 3, h, w) float32 in 0..1.
        draws: (b, 11) uniform, from `draw`.
        size: edge of the result in pixels.
        options: what may change, and how much.
        palette: as for `recolour`.

    Returns:
        (b, 3, size, size) float32 in 0..1. Outside the patch (rotated corners) its border is mirrored.
    """
    draws = draws.to(images)
    warped = warp(images, affine(draws, options, aspect=images.shape[3] / images.shape[2]), size)
    return recolour(warped, draws, options, palette=palette)


def affine(draws: Tensor, options: AugmentOptions, *, aspect: float = 1.0) -> Tensor:
    """Compute the maps (b, 2, 3) from result to source, in `grid_sample`'s coordinates (-1..1 across the patch).

    Crop, then mirror, then rotate about the crop's centre. Angles are those between pixels, whatever the aspect ratio.
    """
    flip_x, flip_y, turn, area, shape, left, top = draws[:, :7].unbind(dim=1)
    lowest, highest = options.scale
    area = lowest + area * (highest - lowest)
    log_ratio = math.log(options.ratio[0]) + shape * (math.log(options.ratio[1]) - math.log(options.ratio[0]))
    if lowest == 1:  # the whole patch, with its own aspect ratio
        log_ratio = torch.zeros_like(log_ratio)
    # The crop's half extents relative to the patch's; a crop wider than the patch is cut to it.
    half_width = (area * log_ratio.exp()).sqrt().clamp(max=1)
    half_height = (area / log_ratio.exp()).sqrt().clamp(max=1)
    centre_x = (2 * left - 1) * (1 - half_width)
    centre_y = (2 * top - 1) * (1 - half_height)
    sign_x = torch.where(flip_x < options.flip, -1.0, 1.0)
    sign_y = torch.where(flip_y < options.flip_vertical, -1.0, 1.0)
    angle = (2 * turn - 1) * math.radians(options.rotation)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * half_width * sign_x, -sin * half_height * sign_y / aspect, centre_x], dim=1),
        torch.stack([sin * half_width * sign_x * aspect, cos * half_height * sign_y, centre_y], dim=1),
    ]
    return torch.stack(rows, dim=1)


def warp(images: Tensor, maps: Tensor, size: int) -> Tensor:
    """Resample images (b, 3, h, w) by affine maps (b, 2, 3) to (b, 3, size, size), bilinear, borders mirrored."""
    grid = F.affine_grid(maps, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def recolour(images: Tensor, draws: Tensor, options: AugmentOptions, *, palette: Tensor | None = None) -> Tensor:
    """Change brightness, contrast, saturation and hue of images (b, 3, h, w), each as its own draws say.

    Brightness scales; contrast blends with the image's mean grey; saturation blends with a pixel's grey; hue rotates
    about the grey axis in YIQ, where that is linear. Together they are one 3 x 3 matrix and one offset per sample.
    `palette` is `PALETTE` on the images' device, for compiled code, which must not make it.
    """
    strengths = (options.brightness, options.contrast, options.saturation)
    brightness, contrast, saturation = (
        1 + (2 * draw - 1) * strength for draw, strength in zip(draws[:, 7:10].unbind(dim=1), strengths, strict=True)
    )
    turn = (2 * draws[:, 10] - 1) * options.hue * 2 * math.pi
    palette = constant(PALETTE, images.device) if palette is None else palette
    identity, grey, *rotation = palette.to(images.dtype).view(5, 3, 3).unbind()
    hue = rotation[0] + turn.cos()[:, None, None] * rotation[1] + turn.sin()[:, None, None] * rotation[2]
    matrix = hue @ (saturation[:, None, None] * identity + (1 - saturation)[:, None, None] * grey)
    # Contrast changes about the mean grey of the whole image, which the matrices above do not change.
    mean_grey = (images.mean(dim=(2, 3)) @ grey[0])[:, None] * brightness[:, None]
    scale = brightness * contrast
    offset = (1 - contrast)[:, None] * mean_grey
    changed = torch.einsum("bij,bjhw->bihw", scale[:, None, None] * matrix, images)
    return (changed + offset[:, :, None, None]).clamp(0, 1)


def _palette() -> tuple[tuple[float, ...], ...]:
    """List, row by row, five 3 x 3 matrices of colours: identity, grey, and a rotation of the hue in three parts.

    Rotated by t, the hue is the first part, plus cos(t) times the second, plus sin(t) times the third: RGB to YIQ, I
    and Q rotated, and back.
    """
    to_yiq = np.array([_LUMA, (0.59590059, -0.27455667, -0.32134392), (0.21153661, -0.52273617, 0.31119955)])
    parts = np.zeros((3, 3, 3))
    parts[0, 0, 0] = parts[1, 1, 1] = parts[1, 2, 2] = parts[2, 2, 1] = 1
    parts[2, 1, 2] = -1
    matrices = [np.eye(3), np.tile(_LUMA, (3, 1)), *(np.linalg.inv(to_yiq) @ part @ to_yiq for part in parts)]
    return tuple(tuple(matrix.flatten().tolist()) for matrix in matrices)


PALETTE = _palette()
