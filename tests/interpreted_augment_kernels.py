"""Do the augmentation's GPU kernels compute what plain PyTorch does, element by element?

Triton's interpreter runs them on a CPU. It has to be asked for before Triton is loaded, so tests/test_kernels.py runs
this file in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
from torch import Tensor
from triton import language as tl

from finetune import augment_kernels
from finetune.augment import PALETTE, AugmentOptions, draw
from finetune.step import network_input

OFF = {
    "flip": 0, "flip_vertical": 0, "rotation": 0, "scale": (1, 1),
    "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0,
}  # fmt: skip
CROPS = {"scale": (0.2, 0.6), "ratio": (0.3, 3.0)}
COLOURS = {"brightness": 0.6, "contrast": 0.7, "saturation": 0.8, "hue": 0.4}
STRONG = AugmentOptions(flip=0.9, flip_vertical=0.2, rotation=180, **CROPS, **COLOURS)
# Each channel has a factor and an offset of its own, so that none is taken for another.
SCALE, OFFSET = (torch.tensor(values).view(3, 1, 1) for values in ((0.01, 0.02, 0.03), (1.0, 2.0, 0.5)))
MATRICES = torch.tensor(PALETTE)


def noise(n: int, size: int) -> Tensor:
    """Patches (n, 3, size, size) whose neighbours differ by up to 255, each of another brightness."""
    generator = torch.Generator().manual_seed(size)
    pixels = torch.randint(0, 256, (n, 3, size, size), generator=generator)
    return (pixels * torch.linspace(1, 0.4, n).view(n, 1, 1, 1)).to(torch.uint8)


def draws(n: int) -> Tensor:
    """Numbers of n samples: two samples with the least and the largest of all, and others at random."""
    least, largest = torch.zeros(1, 11), torch.full((1, 11), 1 - 2**-24)
    return torch.cat([least, largest, draw(n - 2, generator=torch.Generator().manual_seed(1))])


def bound(size: int, options: AugmentOptions) -> float:
    """How far float32 may be from exact numbers, before normalisation, in levels.

    A place is computed by rounding angles (up to pi: 15 units), the crop's edges (9) and their products, each up to
    half a patch, and by five sums of up to two patches: 42 units of 2^-24 of a patch, or less. A level is off by the
    place in two directions times the largest step, 255. Colours multiply that: each by what they may grow to, where the
    difference from grey is twice as large at most, and a row of the hue's last matrix adds up to 2.5. Interpolation,
    factors, products and the mean add some sixty roundings of numbers no larger than that.
    """
    brightness, contrast, saturation = 1 + options.brightness, 1 + options.contrast, 1 + options.saturation
    sine = math.sin(2 * math.pi * min(options.hue, 0.25))
    gain = brightness * (contrast * (1 + saturation * (2 + 2.5 * sine)) + options.contrast)
    return gain * 255 * 2**-24 * (2 * 42 * size + 60)


def excess(pixels: Tensor, numbers: Tensor, options: AugmentOptions, *, palette: Tensor = MATRICES) -> float:
    """The largest difference from plain PyTorch computed in float64, as a multiple of what rounding explains."""
    found = augment_kernels.network_input(pixels, numbers, SCALE, OFFSET, palette, options)
    expected = network_input(pixels.double(), numbers, SCALE.double(), OFFSET.double(), MATRICES, options)
    assert found.dtype == torch.float32
    assert found.stride() == expected.stride()
    allowed = bound(pixels.shape[-1], options) * SCALE.double() + 2**-22 * (255 * SCALE + OFFSET)
    return ((found - expected).abs() / allowed).max().item()


@pytest.mark.parametrize(
    "changes",
    [{}, {"rotation": 180}, CROPS, COLOURS, {"flip": 0.9, "flip_vertical": 0.2}],
    ids=["all off", "rotation", "crops", "colours", "flips"],
)
def test_each_change_alone_is_that_of_plain_pytorch(changes: dict[str, float]) -> None:
    assert excess(noise(4, 17), draws(4), AugmentOptions(**(OFF | changes))) <= 1


@pytest.mark.parametrize(("size", "n"), [(32, 4), (33, 3)])  # of one tile, and of four, three of them nearly empty
def test_all_changes_together_are_those_of_plain_pytorch(size: int, n: int) -> None:
    assert excess(noise(n, size), draws(n), STRONG) <= 1


def test_a_draw_equal_to_a_flips_probability_does_not_mirror() -> None:
    numbers = torch.full((1, 11), 0.25)
    assert excess(noise(1, 17), numbers, AugmentOptions(**(OFF | {"flip": 0.25, "flip_vertical": 0.25}))) <= 1


def test_turned_corners_mirror_the_border() -> None:
    """A patch that is bright in its outermost two pixels alone: turned by 45 degrees, so are its corners' insides."""
    pixels = torch.full((1, 3, 33, 33), 200, dtype=torch.uint8)
    pixels[:, :, 2:-2, 2:-2] = 0
    numbers = torch.full((1, 11), 0.75)
    options = AugmentOptions(**(OFF | {"rotation": 90}))
    assert excess(pixels, numbers, options) <= 1
    found = augment_kernels.network_input(pixels, numbers, SCALE, OFFSET * 0, MATRICES, options)[0, 0] / SCALE[0]
    # The corner's centre lies 16 sqrt(2) = 22.6 from the middle, 6.1 outside the border at 16.5: mirrored, it is dark.
    assert found[0, 0] < 1
    assert found[3:6, 3:6].diag().max() > 100  # 13 to 11 pixels from the middle along each axis: 18.4 to 15.6


# ------------------------------------------------------------------------------------- wrong kernels would be noticed


@triton.jit
def _cut(place, SIZE: tl.constexpr):
    """Repeats the border instead of mirroring."""
    return tl.minimum(tl.maximum(place, 0.0), SIZE - 1.0)


@triton.jit
def _aligned(place, SIZE: tl.constexpr):
    """Mirrors at the outermost centres, as grid_sample does with align_corners."""
    place = tl.abs(place)
    return tl.minimum(place, 2 * (SIZE - 1) - place)


@pytest.mark.parametrize("mirrored", [_cut, _aligned])
def test_another_way_to_fill_corners_would_be_noticed(
    mirrored: triton.JITFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment_kernels, "_mirrored", mirrored)
    assert excess(noise(3, 17), draws(3), AugmentOptions(**(OFF | {"rotation": 180}))) > 10


def test_transposed_colours_would_be_noticed() -> None:
    palette = torch.cat([MATRICES[:4], MATRICES[4:].view(3, 3).mT.reshape(1, 9)])
    assert excess(noise(3, 17), draws(3), AugmentOptions(**(OFF | COLOURS)), palette=palette) > 10
