"""Is augmentation per sample, does it leave the figure in the picture, and do colours change as documented?"""

import math

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
    return draw(n, OFF, generator=torch.Generator().manual_seed(seed))


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
