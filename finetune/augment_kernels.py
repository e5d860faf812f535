"""How does a GPU make a network's input of patches in two kernels: augmented, normalised, channels last?

What comes out is that of `finetune.step.network_input`, written in Triton. The first kernel adds up the grey of the
warped patches, of which contrast needs the mean; the second warps again, which takes less time than to write the warped
patches down and read them back, and finishes. Sums are written out in parts and added in a fixed order, so that results
are repeatable. What a draw can change is a table on the device: other options do not compile anew.
"""

# Triton has no types.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, warn-return-any=False, disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from features.device import constant
from finetune.augment import AugmentOptions
from finetune.kernels import available as available
from finetune.kernels import cdiv, operator, run

try:
    from triton import jit
    from triton import language as tl
except ImportError:  # not every platform has it

    def jit(function: Any) -> Any:
        return function


_TILE = 32  # edge of the square of pixels that a program computes: however it is turned, its source is about a square


def network_input(
    pixels: Tensor, draws: Tensor, scale: Tensor, offset: Tensor, palette: Tensor, options: AugmentOptions
) -> Tensor:
    """Make a network's input of pixels, as `finetune.step.network_input` does.

    Args:
        pixels: (m, 3, s, s) uint8.
        draws: (m, 11) float32, from `finetune.augment.draw`.
        scale, offset: (3, 1, 1) float32 of the transform.
        palette: `finetune.augment.PALETTE` on the device.
        options: of augmentation.

    Returns:
        (m, 3, s, s) float32, channels last.

    Raises:
        ValueError: a tensor that is not contiguous.
    """
    return _augmented_input(pixels, draws, constant(_ranges(options), draws.device), scale, offset, palette)


def _ranges(options: AugmentOptions) -> tuple[tuple[float, float], ...]:
    """List, in the order of `draw`, what each number in 0..1 stands for: the value at 0, and the rise up to 1."""

    def around(value: float, change: float) -> tuple[float, float]:
        return value - change, 2 * change

    smallest, largest = options.scale
    low, high = (0.0, 0.0) if smallest == 1 else map(math.log, options.ratio)  # the whole patch keeps its aspect ratio
    return (
        (-options.flip, 1.0),  # mirrored if negative
        (-options.flip_vertical, 1.0),
        around(0.0, math.radians(options.rotation)),
        (smallest, largest - smallest),
        (low, high - low),
        around(0.0, 1.0),  # the crop's place in the room that it leaves
        around(0.0, 1.0),
        around(1.0, options.brightness),
        around(1.0, options.contrast),
        around(1.0, options.saturation),
        around(0.0, 2 * math.pi * options.hue),
    )


@operator(fake=lambda pixels, draws, *_: torch.empty_like(pixels, dtype=draws.dtype, memory_format=torch.channels_last))
def _augmented_input(
    pixels: Tensor, draws: Tensor, ranges: Tensor, scale: Tensor, offset: Tensor, palette: Tensor
) -> Tensor:
    n, _, size, _ = pixels.shape
    n_parts = cdiv(size, _TILE) ** 2
    greys = draws.new_empty(n, n_parts)
    out = draws.new_empty(n, size, size, 3)
    given = pixels, draws, ranges, palette, greys
    run(_grey_kernel, (n_parts, n), *given, SIZE=size, TILE=_TILE)
    padded = 1 << (n_parts - 1).bit_length()
    run(_input_kernel, (n_parts, n), *given, scale, offset, out, SIZE=size, TILE=_TILE, PARTS=padded)
    return out.permute(0, 3, 1, 2)


# -------------------------------------------------------------------------------------------------------- the kernels
# Names in capitals are constants of a compilation. Patches are squares of SIZE pixels, and programs compute squares of
# TILE. Colours are in levels, 0 to 255.


@jit
def _value(draws, ranges, number):
    """Read what a sample's draw of this number stands for."""
    return tl.load(ranges + 2 * number) + tl.load(draws + number) * tl.load(ranges + 2 * number + 1)


@jit
def _mirrored(place, SIZE: tl.constexpr):
    """Mirror places at a patch's borders and cut them to its pixels' centres, as `grid_sample` does.

    Borders lie half a pixel outside the outermost centres. A crop lies inside the patch, and turned about its own
    centre it reaches at most half a patch beyond a border, so mirroring once at each is enough.
    """
    place = tl.abs(place + 0.5)
    place = tl.minimum(place, 2 * SIZE - place) - 0.5
    return tl.minimum(tl.maximum(place, 0.0), SIZE - 1.0)


@jit
def _level(place):
    return tl.load(place).to(tl.float32)


@jit
def _between(plane, upper, lower, left, right, down, across):
    """Read one colour between four pixels. upper, lower: where their rows begin; down, across: how far, in 0..1."""
    above, below = _level(plane + upper + left), _level(plane + lower + left)
    above += across * (_level(plane + upper + right) - above)
    below += across * (_level(plane + lower + right) - below)
    return above + down * (below - above)


@jit
def _warp(pixels, draws, ranges, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Warp a program's tile of a patch, as `augment.affine` and `augment.warp` do.

    Returns:
        Red, green and blue, each (TILE * TILE,), where the pixels lie in the result, and which lie inside it.
    """
    tile, n_tiles, within = tl.program_id(0), tl.cdiv(SIZE, TILE), tl.arange(0, TILE * TILE)
    row, column = tile // n_tiles * TILE + within // TILE, tile % n_tiles * TILE + within % TILE
    area, ratio = _value(draws, ranges, 3), tl.exp(_value(draws, ranges, 4))
    width, height = tl.minimum(tl.sqrt(area * ratio), 1.0), tl.minimum(tl.sqrt(area / ratio), 1.0)
    centre_x = SIZE / 2 * (1.0 + _value(draws, ranges, 5) * (1.0 - width)) - 0.5
    centre_y = SIZE / 2 * (1.0 + _value(draws, ranges, 6) * (1.0 - height)) - 0.5
    width = tl.where(_value(draws, ranges, 0) < 0, -width, width)
    height = tl.where(_value(draws, ranges, 1) < 0, -height, height)
    angle = _value(draws, ranges, 2)
    cos, sin = tl.cos(angle), tl.sin(angle)
    across, down = (column - (SIZE - 1) / 2) * width, (row - (SIZE - 1) / 2) * height
    x = _mirrored(centre_x + cos * across - sin * down, SIZE)
    y = _mirrored(centre_y + sin * across + cos * down, SIZE)
    left, top = x.to(tl.int32), y.to(tl.int32)
    right = tl.minimum(left + 1, SIZE - 1)
    upper, lower = top * SIZE, tl.minimum(top + 1, SIZE - 1) * SIZE
    across, down = x - left, y - top
    red = _between(pixels, upper, lower, left, right, down, across)
    green = _between(pixels + SIZE * SIZE, upper, lower, left, right, down, across)
    blue = _between(pixels + 2 * SIZE * SIZE, upper, lower, left, right, down, across)
    return red, green, blue, row * SIZE + column, (row < SIZE) & (column < SIZE)


@jit
def _grey(palette, red, green, blue):
    """Weigh colours to grey, by a row of the palette's second matrix."""
    return tl.load(palette + 9) * red + tl.load(palette + 10) * green + tl.load(palette + 11) * blue


@jit
def _grey_kernel(pixels, draws, ranges, palette, greys, SIZE: tl.constexpr, TILE: tl.constexpr):
    """A program adds up the grey of its tile of a warped patch."""
    sample = tl.program_id(1).to(tl.int64)
    pixels += sample * 3 * SIZE * SIZE
    draws += sample * 11
    red, green, blue, _, inside = _warp(pixels, draws, ranges, SIZE, TILE)
    grey = tl.where(inside, _grey(palette, red, green, blue), 0.0)
    tl.store(greys + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(grey, axis=0))


@jit
def _input_kernel(
    pixels, draws, ranges, palette, greys, scale, offset, out,
    SIZE: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of a sample's input, as `augment.recolour` and the normalisation do.

    Saturation and hue change how far a colour is from its grey, and leave the grey as it is. A hue turned by t is that
    difference times cos(t), plus the colour times the palette's last matrix times sin(t).
    """
    sample, n_parts = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    pixels += sample * 3 * SIZE * SIZE
    draws += sample * 11
    red, green, blue, place, inside = _warp(pixels, draws, ranges, SIZE, TILE)
    grey = _grey(palette, red, green, blue)[:, None]
    parts = tl.arange(0, PARTS)
    parts = tl.load(greys + sample * n_parts + parts, mask=parts < n_parts, other=0.0)
    mean_grey = tl.sum(parts, axis=0) / (SIZE * SIZE)
    brightness, contrast = _value(draws, ranges, 7), _value(draws, ranges, 8)
    saturation, turn = _value(draws, ranges, 9), _value(draws, ranges, 10)
    colour = tl.arange(0, 4)  # the edges of tiles are powers of two, so there is a fourth, which is not stored
    real = colour < 3
    matrix = palette + 36 + 3 * colour
    turned = tl.load(matrix, mask=real, other=0.0)[None, :] * red[:, None]
    turned += tl.load(matrix + 1, mask=real, other=0.0)[None, :] * green[:, None]
    turned += tl.load(matrix + 2, mask=real, other=0.0)[None, :] * blue[:, None]
    levels = tl.join(tl.join(red, blue), tl.join(green, green)).reshape(TILE * TILE, 4)  # red, green, blue, green
    levels = grey + saturation * (tl.cos(turn) * (levels - grey) + tl.sin(turn) * turned)
    levels = brightness * (contrast * levels + (1.0 - contrast) * mean_grey)
    levels = tl.minimum(tl.maximum(levels, 0.0), 255.0)
    scale = tl.load(scale + colour, mask=real, other=0.0)[None, :]
    offset = tl.load(offset + colour, mask=real, other=0.0)[None, :]
    places = place[:, None] * 3 + colour[None, :]
    out += sample * 3 * SIZE * SIZE
    tl.store(out + places, levels * scale - offset, mask=inside[:, None] & real[None, :])
