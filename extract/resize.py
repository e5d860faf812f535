"""How are images resized on a GPU as Pillow resizes them, to the bit?

The cards' transforms were written with Pillow, so its pixels are what the networks know. Pillow (`Resample.c`) resizes
8-bit images along rows, then along columns, in integers: every output pixel is a sum of input pixels times weights of
22 bits behind the point, rounded and clamped to 0 to 255. Here either pass is a product of matrices in float32. The
integer weights are cut into parts of so few bits that all products and sums are integers below 2^24: float32 holds
these exactly, whatever the order of the additions, and so does TF32, whose factors have 11 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_FRACTION = 22  # bits behind the point of Pillow's weights
_PIXEL = 8  # bits of a pixel
_EXACT = 24  # bits of an integer that float32 holds exactly
_FACTOR = 11  # bits of an integer that TF32 and float16 hold exactly


def resize_as_pillow(pixels: Tensor, size: tuple[int, int], *, interpolation: str) -> Tensor:
    """Resize images as `PIL.Image.resize` does: every pixel is the same, on any device.

    Args:
        pixels: (b, c, h, w) uint8.
        size: height and width to resize to.
        interpolation: "bicubic" or "bilinear"; antialiased, as always in Pillow.

    Returns:
        (b, c, *size) uint8.
    """
    height, width = size
    if width != pixels.shape[3]:
        pixels = _resize_rows(pixels, width, interpolation)
    if height != pixels.shape[2]:
        pixels = _resize_rows(pixels.mT, height, interpolation).mT
    return pixels


def _resize_rows(pixels: Tensor, n_out: int, interpolation: str) -> Tensor:
    """Resize (..., n) to (..., n_out)."""
    parts, bits = _weights(pixels.shape[-1], n_out, interpolation, pixels.device)
    values = pixels.to(torch.float32)
    total = (values @ parts[0]).to(torch.int32)
    for k, part in enumerate(parts[1:], start=1):
        total += (values @ part).to(torch.int32) << k * bits
    half = 1 << (_FRACTION - 1)
    return (total.add_(half) >> _FRACTION).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def _weights(n_in: int, n_out: int, interpolation: str, device: torch.device) -> tuple[Tensor, int]:
    """Compute the weights of every input pixel in every output pixel, cut into parts.

    Returns:
        Parts (k, n_in, n_out) float32, lowest bits first, and the number of bits of each part. They stay on their
        device, because each copy would wait for all of a GPU's work.
    """
    taps = pillow_weights(n_in, n_out, interpolation)
    bits = min(_FACTOR, _EXACT - _PIXEL - math.ceil(math.log2(max(len(weights) for _, weights in taps))))
    matrix = np.zeros((n_in, n_out), dtype=np.int64)
    for column, (first, weights) in enumerate(taps):
        matrix[first : first + len(weights), column] = weights
    size = np.abs(matrix)
    n_parts = -(-int(size.max()).bit_length() // bits)
    parts = [(size >> k * bits) % (1 << bits) * np.sign(matrix) for k in range(n_parts)]
    with torch.inference_mode(False):
        return torch.from_numpy(np.stack(parts).astype(np.float32)).to(device), bits


def pillow_weights(n_in: int, n_out: int, interpolation: str) -> list[tuple[int, list[int]]]:
    """Compute Pillow's weights (`precompute_coeffs`, `normalize_coeffs_8bpc`), in its order of operations.

    Returns:
        For each output pixel the first input pixel that it is made of, and the weights from there on, in units of
        2^-22.
    """
    support, filter = _FILTERS[interpolation]
    scale = n_in / n_out
    stretch = max(scale, 1.0)  # a smaller image is made with a wider filter: antialiasing
    support *= stretch
    taps = []
    for out in range(n_out):
        center = (out + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        end = min(int(center + support + 0.5), n_in)
        weights = [filter((k - center + 0.5) * (1.0 / stretch)) for k in range(first, end)]
        total = 0.0
        for weight in weights:  # not sum(), which from Python 3.12 on rounds otherwise
            total += weight
        taps.append((first, [int(math.copysign(0.5, w) + w / total * (1 << _FRACTION)) for w in weights]))
    return taps


def _bilinear(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


_FILTERS: dict[str, tuple[float, Callable[[float], float]]] = {"bilinear": (1.0, _bilinear), "bicubic": (2.0, _bicubic)}
