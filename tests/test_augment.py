"""Is augmentation per sample, does it leave the figure in the picture, and do colours change as documented?"""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference

from finetune.augment import AugmentOptions, affine, augment, draw, recolour, warp

OFF = AugmentOptions(
    flip=0, flip_vertical=0, rotation=0, scale=(1, 1), ratio=(1, 1), brightness=0, contrast=0, saturation=0, hue=0
)


def only(**changes) -> AugmentOptions:
    return AugmentOptions(**(vars(OFF) | changes))


def draws(n: int, seed: int = 0) -> torch.Tensor:
    return draw(n, generator=torch.Generator().manual_seed(seed))


def images(n: int, size: int = 24) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(9))


def test_nothing_switched_on_changes_nothing():
    batch = images(4)
    torch.testing.assert_close(augment(batch, draws(4), size=24, options=OFF), batch, rtol=0, atol=1e-5)


def test_every_sample_has_changes_of_its_own():
    same = images(1).expand(8, -1, -1, -1)
    changed = augment(same, draws(8), size=24, options=AugmentOptions())
    for i in range(8):
        for j in range(i):
            assert (changed[i] - changed[j]).abs().max() > 0.05


def test_a_samples_result_does_not_depend_on_its_batch():
    batch, numbers = images(6), draws(6)
    together = augment(batch, numbers, size=24, options=AugmentOptions())
    alone = augment(batch[4:5], numbers[4:5], size=24, options=AugmentOptions())
    torch.testing.assert_close(together[4:5], alone, rtol=0, atol=1e-6)


def test_equal_generators_draw_equal_changes():
    assert torch.equal(draws(5, seed=3), draws(5, seed=3))
    assert not torch.equal(draws(5, seed=3), draws(5, seed=4))


def test_flips_mirror_about_half_of_the_samples():
    batch = images(200)
    changed = augment(batch, draws(200), size=24, options=only(flip=0.5, flip_vertical=0.5))
    kinds = {"none": batch, "x": batch.flip(3), "y": batch.flip(2), "both": batch.flip(2, 3)}
    close = {name: ((changed - k).abs().amax(dim=(1, 2, 3)) < 1e-4).sum().item() for name, k in kinds.items()}
    assert sum(close.values()) == 200
    assert all(30 < n < 70 for n in close.values())


def test_a_quarter_turn_is_exact():
    numbers = draws(1)
    numbers[:, 2] = 1.0 - 1e-7  # the largest rotation
    turned = augment(images(1), numbers, size=24, options=only(rotation=90))
    quarter = [torch.rot90(images(1), k, dims=(2, 3)) for k in (1, 3)]
    assert min((turned - q).abs().max().item() for q in quarter) < 1e-3


def test_rotation_turns_pixels_of_a_wide_patch_without_shearing():
    numbers = draws(1)
    numbers[:, 2] = 0.75  # half of the largest rotation
    (matrix,) = affine(numbers, only(rotation=90), aspect=2.0)
    in_pixels = torch.diag(torch.tensor([2.0, 1.0])) @ matrix[:, :2] @ torch.diag(torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(in_pixels @ in_pixels.T, torch.eye(2), rtol=0, atol=1e-5)


def test_a_crop_keeps_the_area_asked_for_and_stays_inside():
    maps = affine(draws(500), only(scale=(0.3, 0.6), ratio=(3 / 4, 4 / 3)))
    half_width, half_height = maps[:, 0, 0], maps[:, 1, 1]
    area = half_width * half_height
    assert 0.3 - 1e-5 <= area.min() < 0.35
    assert 0.55 < area.max() <= 0.6 + 1e-5
    assert (maps[:, 0, 2].abs() + half_width).max() <= 1 + 1e-5
    assert (maps[:, 1, 2].abs() + half_height).max() <= 1 + 1e-5


def test_the_figure_in_the_middle_stays_in_the_picture():
    size = 64
    axis = torch.arange(size) - (size - 1) / 2
    disc = (axis[:, None] ** 2 + axis[None] ** 2 < 8**2).float().expand(1, 3, size, size)
    gentle = AugmentOptions(rotation=180, brightness=0, contrast=0, saturation=0, hue=0)
    changed = augment(disc.expand(100, -1, -1, -1), draws(100), size=size, options=gentle)
    # A crop of at least .8 of the area magnifies, and never cuts a central disc of a quarter of the width.
    assert (changed[:, 0].sum(dim=(1, 2)) >= disc[0, 0].sum() * 0.95).all()
    border = torch.cat([changed[:, 0, 0], changed[:, 0, -1], changed[:, 0, :, 0], changed[:, 0, :, -1]], dim=1)
    assert border.max() < 0.5


@pytest.mark.parametrize(
    ("option", "column", "adjust"),
    [
        ("brightness", 7, reference.adjust_brightness),
        ("contrast", 8, reference.adjust_contrast),
        ("saturation", 9, reference.adjust_saturation),
    ],
)
def test_colour_changes_equal_torchvisions_one_by_one(option, column, adjust):
    batch, numbers = images(5) * 0.5 + 0.2, draws(5)
    changed = recolour(batch, numbers, only(**{option: 0.3}))
    for image, number, found in zip(batch, numbers[:, column], changed, strict=True):
        expected = adjust(image, 1 + (2 * float(number) - 1) * 0.3)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # torchvision's luma has fewer digits


def test_a_full_turn_of_the_hue_is_none_and_half_a_turn_is_a_change_that_keeps_grey():
    batch, numbers = images(3) * 0.4 + 0.3, draws(3)
    numbers[:, 10] = 1.0
    torch.testing.assert_close(recolour(batch, numbers, only(hue=1.0)), batch, rtol=0, atol=1e-4)
    half = recolour(batch, numbers, only(hue=0.5))
    luma = torch.tensor([0.299, 0.587, 0.114])
    grey_before, grey_after = (torch.einsum("c,bchw->bhw", luma, x) for x in (batch, half))
    unclamped = ((half > 0) & (half < 1)).all(dim=1)
    torch.testing.assert_close(grey_after[unclamped], grey_before[unclamped], rtol=0, atol=1e-4)
    assert (half - batch).abs().mean() > 0.05
    grey = torch.full((1, 3, 4, 4), 0.4)
    torch.testing.assert_close(recolour(grey, numbers[:1], only(hue=0.3)), grey, rtol=0, atol=1e-5)


def test_the_result_stays_in_range_and_has_the_size_asked_for():
    changed = augment(images(10, size=32), draws(10), size=48, options=AugmentOptions(brightness=0.9, contrast=0.9))
    assert changed.shape == (10, 3, 48, 48)
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_magnification_interpolates():
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    larger = warp(ramp, identity, 32)
    assert (larger[0, 0, 0].diff() >= -1e-6).all()
    assert math.isclose(float(larger.mean()), 0.5, abs_tol=1e-3)


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"scale": (0, 1)}, {"scale": (0.9, 0.5)}, {"ratio": (0, 1)}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentOptions(**wrong)


# ------------------------------------------------------------------------------------------ several changes at once

# In the order of the eleven numbers that a sample draws: two flips, the rotation, the crop's area, shape and place
# (four numbers that act together), and four colours.
FACTORS = {
    "flip": {"flip": 0.6},
    "flip_vertical": {"flip_vertical": 0.3},
    "rotation": {"rotation": 70.0},
    "crop": {"scale": (0.3, 0.9), "ratio": (0.4, 2.5)},
    "brightness": {"brightness": 0.25},
    "contrast": {"contrast": 0.3},
    "saturation": {"saturation": 0.4},
    "hue": {"hue": 0.05},
}
N_COLOURS = 4


def mirrored(place: np.ndarray, n: int) -> np.ndarray:
    """Places on an axis of n pixels whose centres are 0..n-1, mirrored at the outer edges into [-0.5, n - 0.5]."""
    period = np.mod(place + 0.5, 2 * n)
    return np.minimum(period, 2 * n - period) - 0.5


def plainly_warped(image: np.ndarray, numbers: np.ndarray, size: int, options: AugmentOptions) -> np.ndarray:
    """Where every pixel of the result comes from, in source pixels about the patch's centre; bilinear."""
    _, height, width = image.shape
    flip_x, flip_y, turn, area, shape, left, top = numbers[:7]
    share = options.scale[0] + area * (options.scale[1] - options.scale[0])
    aspect = options.ratio[0] ** (1 - shape) * options.ratio[1] ** shape
    if options.scale[0] == 1:
        aspect = 1.0
    wide, high = min(1, np.sqrt(share * aspect)), min(1, np.sqrt(share / aspect))
    steps = (np.arange(size) + 0.5) / size - 0.5  # across the result, in its own edge
    across, down = np.meshgrid(steps * wide * width, steps * high * height)
    across = -across if flip_x < options.flip else across
    down = -down if flip_y < options.flip_vertical else down
    angle = np.radians((2 * turn - 1) * options.rotation)
    x = np.cos(angle) * across - np.sin(angle) * down + (left - 0.5) * (1 - wide) * width + width / 2 - 0.5
    y = np.sin(angle) * across + np.cos(angle) * down + (top - 0.5) * (1 - high) * height + height / 2 - 0.5
    x, y = np.clip(mirrored(x, width), 0, width - 1), np.clip(mirrored(y, height), 0, height - 1)
    column, row = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    right, below = x - column, y - row
    upper = image[:, row, column] * (1 - right) + image[:, row, column + 1] * right
    lower = image[:, row + 1, column] * (1 - right) + image[:, row + 1, column + 1] * right
    return upper * (1 - below) + lower * below


def grey_of(image: np.ndarray) -> np.ndarray:
    red, green, blue = image
    return 0.299 * red + 0.587 * green + 0.114 * blue


def plainly_recoloured(image: np.ndarray, numbers: np.ndarray, options: AugmentOptions) -> np.ndarray:
    """One change after the other, each on what the one before has left."""
    strengths = (options.brightness, options.contrast, options.saturation)
    brightness, contrast, saturation = 1 + (2 * numbers[7:10] - 1) * strengths
    image = image * brightness
    mean = grey_of(image).mean()
    image = mean + contrast * (image - mean)
    grey = grey_of(image)
    image = grey + saturation * (image - grey)
    angle = 2 * np.pi * options.hue * (2 * numbers[10] - 1)
    # A hue is an angle in the plane of colour differences, of television's U and V as of its I and Q.
    v, u = 0.877283 * (image[0] - grey), 0.492111 * (image[2] - grey)
    v, u = v * np.cos(angle) - u * np.sin(angle), v * np.sin(angle) + u * np.cos(angle)
    red, blue = grey + v / 0.877283, grey + u / 0.492111
    green = (grey - 0.299 * red - 0.114 * blue) / 0.587
    return np.clip(np.stack([red, green, blue]), 0, 1)


def some(factors: tuple[str, ...]) -> AugmentOptions:
    return only(**{name: value for factor in factors for name, value in FACTORS[factor].items()})


@pytest.mark.parametrize(
    "factors",
    [*combinations(FACTORS, 2), tuple(FACTORS)],
    ids=lambda factors: "+".join(factors) if len(factors) < 3 else "all",
)
def test_changes_together_are_those_of_a_plain_computation(factors):
    options = some(factors)
    generator = torch.Generator().manual_seed(5)
    batch = 0.3 + 0.4 * torch.rand(6, 3, 20, 29, generator=generator, dtype=torch.float64)
    batch *= torch.linspace(0.7, 1.0, 6, dtype=torch.float64).view(6, 1, 1, 1)  # no two images have the same mean
    numbers = draw(6, generator=generator)
    found = augment(batch, numbers, size=17, options=options).numpy()
    for image, own, changed in zip(batch.numpy(), numbers.double().numpy(), found, strict=True):
        warped = plainly_warped(image, own, 17, options)
        # The mean that contrast turns about is that of the result, whose pixels a crop has chosen.
        expected = plainly_recoloured(warped, own, options)
        # Constants of both colour planes have six digits, factors are at most 1.4.
        np.testing.assert_allclose(changed, expected, rtol=0, atol=2e-5)


def test_each_flip_has_a_probability_of_its_own():
    ramp = torch.linspace(0, 1, 8).expand(1, 3, 8, 8)
    both = (ramp + 3 * ramp.mT) / 4  # rises to the right by 1, downwards by 3
    n = 2000
    changed = augment(both.expand(n, -1, -1, -1), draws(n), size=8, options=only(flip=0.8, flip_vertical=0.1))
    mirrored_x = changed[:, 0, 4, 0] > changed[:, 0, 4, -1]
    mirrored_y = changed[:, 0, 0, 4] > changed[:, 0, -1, 4]
    for found, expected in ((mirrored_x, 0.8), (mirrored_y, 0.1), (mirrored_x & mirrored_y, 0.08)):
        deviation = (expected * (1 - expected) / n) ** 0.5
        assert abs(found.double().mean().item() - expected) < 5 * deviation


def test_every_change_draws_a_number_of_its_own():
    numbers = draws(4000).double()
    assert 0 <= numbers.min() < numbers.max() < 1
    # Correlations of independent numbers have a deviation of 1 / sqrt(n); 55 of them are compared.
    correlation = torch.corrcoef(numbers.T) - torch.eye(numbers.shape[1])
    assert correlation.abs().max() < 5 / len(numbers) ** 0.5
    # A uniform number's variance is 1/12 and its fourth central moment 1/80.
    assert ((numbers.mean(dim=0) - 0.5).abs() < 5 * (1 / 12 / len(numbers)) ** 0.5).all()
    spread = ((1 / 80 - 1 / 144) / len(numbers)) ** 0.5
    assert ((numbers.var(dim=0) - 1 / 12).abs() < 5 * spread).all()
