"""Do pixels reach the network as the card says?"""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from extract.backbones import find_backbone
from extract.views import STATISTICS, make_transform, orientations, parse_view
from features import views
from features.alterations import altered_view, split_alteration
from features.console import UserError

CPU = torch.device("cpu")


def patch(height: int = 128, width: int = 128, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise, as stained tissue has."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(60, 230, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return np.clip(smooth + rng.integers(-6, 7, (height, width, 3)), 0, 255).astype(np.uint8)


def pixels(backbone, view: str, *patches: np.ndarray) -> np.ndarray:
    """The batch with the normalisation undone: (b, h, w, 3) grey levels."""
    transform = make_transform(backbone, parse_view(view))
    batch = transform(patches, CPU)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    return ((batch * std + mean) * 255).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", ["efficientnet-lite0", "uni"])
def test_full_is_the_whole_patch_resized_as_pil_does_it(name):
    backbone = find_backbone(name)
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    expected = Image.fromarray(patch()).resize((224, 224), filters[backbone.interpolation])
    found = pixels(backbone, "full", patch())[0]
    assert np.abs(found - np.asarray(expected)).max() < 2.1  # torch's filter has coarser weights
    assert np.abs(found - np.asarray(expected)).mean() < 0.3


def test_a_card_that_crops_gets_its_crop():
    gigapath = find_backbone("prov-gigapath")
    assert (gigapath.resize, gigapath.input_size) == (256, 224)
    expected = np.asarray(Image.fromarray(patch()).resize((256, 256), Image.Resampling.BICUBIC))[16:240, 16:240]
    assert np.abs(pixels(gigapath, "full", patch())[0] - expected).max() < 2.1


def test_center_is_the_middle_resized_with_nothing_cropped_off():
    gigapath = find_backbone("prov-gigapath")
    middle = patch()[32:96, 32:96]
    expected = np.asarray(Image.fromarray(middle).resize((224, 224), Image.Resampling.BICUBIC))
    assert np.abs(pixels(gigapath, "center64", patch())[0] - expected).max() < 2.1


def test_an_input_size_can_be_asked_for():
    assert pixels(find_backbone("efficientnet-lite0"), "center64@160", patch()).shape == (1, 160, 160, 3)


def test_values_are_whole_grey_levels_before_normalisation():
    found = pixels(find_backbone("uni"), "full", patch())
    assert np.abs(found - found.round()).max() < 1e-3


def test_patches_of_different_sizes_share_a_batch():
    uni = find_backbone("uni")
    large, small, wide = patch(200, 200), patch(64, 64), patch(96, 160)
    together = pixels(uni, "full", large, small, wide)
    assert together.shape == (3, 224, 224, 3)
    np.testing.assert_array_equal(together[0], pixels(uni, "full", large)[0])
    np.testing.assert_array_equal(together[2], pixels(uni, "full", wide)[0])


def test_a_wide_patch_keeps_its_proportions():
    wide = np.zeros((100, 200, 3), dtype=np.uint8)
    wide[:, 50:150] = 255  # exactly the central square
    assert pixels(find_backbone("uni"), "full", wide)[0][:, 5:-5].min() > 250


def test_a_patch_smaller_than_its_crop_is_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"48 x 48 pixels has no central 64 pixels. Use `view='center48'`"):
        pixels(find_backbone("uni"), "center64", patch(48, 48))


@pytest.mark.parametrize(
    "text",
    ["", "center", "center0", "middle64", "full@", "center64@0", "center64x", "full@9999999999", "full@٣", "+imagenet"],
)
def test_an_unknown_view_is_refused(text):
    with pytest.raises(UserError, match="unknown view"):
        parse_view(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("full+rot45", r"unknown modifier '\+rot45'; known are \+imagenet, \+half"),
        ("full+", r"unknown modifier '\+'"),
        ("full+imagenet@224", r"unknown modifier '\+imagenet@224'"),
        ("full+half+imagenet", r"normalised in one way; use one of \+half and \+imagenet"),
        ("full+half+flips+imagenet", r"normalised in one way; use one of \+half and \+imagenet"),
        ("full+flip", r"unknown modifier '\+flip'; known are \+imagenet, \+half, \+flips"),
    ],
)
def test_a_modifier_that_means_nothing_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_view(text)


def test_a_view_can_say_how_images_are_normalised():
    """Pixels are those of the view without the modifier; mean and deviation are not the card's."""
    hoptimus = find_backbone("h-optimus-0")
    made = {name: make_transform(hoptimus, parse_view(f"center64@160{name}")) for name in ("", "+imagenet", "+half")}
    assert {name: (one.mean, one.std) for name, one in made.items()} == {
        "": (hoptimus.mean, hoptimus.std),
        "+imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "+half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    }
    assert {(one.crop, one.resize, one.input_size) for one in made.values()} == {(64, 160, 160)}
    records = [one.record() for one in made.values()]
    assert all(a != b for k, a in enumerate(records) for b in records[:k])


def test_a_view_has_one_name_whatever_the_order_of_its_modifiers():
    assert parse_view("full@224+flips+imagenet") == parse_view("full@224+imagenet+flips")
    assert parse_view("full+flips+flips").name == "full+flips"


def test_orientations_are_the_eight_of_a_square_and_keep_its_layout():
    image = torch.arange(18.0).view(1, 2, 3, 3)
    found = {tuple(turned.flatten().tolist()) for turned in orientations(image)}
    assert len(found) == 8
    assert torch.equal(next(orientations(image)), image)
    assert all(set(turned[:9]) == set(range(9)) for turned in found)  # channels stay apart
    transform = make_transform(find_backbone("uni"), parse_view("full+flips"))
    shown = list(transform.shown(image.contiguous(memory_format=torch.channels_last)))
    assert {tuple(one.flatten().tolist()) for one in shown} == found
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in shown)


@pytest.mark.parametrize("name", ["vit-l", "swin-b", "prov-gigapath"])
def test_the_whole_patch_at_224_loses_no_border_where_the_card_crops_one(name):
    backbone = find_backbone(name)
    assert backbone.resize > backbone.input_size == 224
    whole = np.asarray(Image.fromarray(patch()).resize((224, 224), Image.Resampling.BICUBIC))
    assert np.abs(pixels(backbone, "full@224+imagenet", patch())[0] - whole).max() < 2.1
    assert np.abs(pixels(backbone, "full", patch())[0] - whole).max() > 10


def test_every_normalisation_that_a_view_may_name_is_known():
    assert tuple(STATISTICS) == views.STATISTICS


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("centre64@160", "center64"), ("center48x", "center48"), ("Full", "full"), ("full+flip", "flips or fliph")],
)
def test_a_misspelt_view_names_the_nearest(text, nearest):
    with pytest.raises(UserError, match=rf"Did you mean {nearest}\?"):
        parse_view(text)


def test_what_is_far_from_every_view_gets_no_suggestion():
    with pytest.raises(UserError, match="unknown view 'nope'") as refused:
        parse_view("nope")
    assert "Did you mean" not in str(refused.value)


def test_a_network_is_built_for_other_sizes_only_where_it_gets_them():
    uni = find_backbone("uni")
    found = {
        name: parse_view(name).resizes(uni.input_size) for name in ("full", "center64", "full@224+imagenet", "full@160")
    }
    assert found == {"full": False, "center64": False, "full@224+imagenet": False, "full@160": True}


def test_an_input_that_no_memory_holds_is_refused():
    parse_view("full@2048")
    with pytest.raises(UserError, match="an input of 2,049 pixels is too large; at most 2,048"):
        parse_view("full@2049")


def test_what_decides_the_pixels_is_recorded():
    backbone = find_backbone("efficientnet-lite0")
    record = make_transform(backbone, parse_view("full")).record()
    for change in ({"mean": (0.1, 0.2, 0.3)}, {"interpolation": "bilinear"}, {"resize": 256}, {"input_size": 160}):
        assert make_transform(dataclasses.replace(backbone, **change), parse_view("full")).record() != record
    assert make_transform(backbone, parse_view("center64")).record() != record


def coded(height: int, width: int) -> np.ndarray:
    """A patch whose every pixel says its row, its column, and that it is one."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full((height, width), 255)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [(65, 65), (64, 67), (67, 64), (65, 90), (33, 34), (128, 128)])
@pytest.mark.parametrize("crop", [32, 33])
def test_the_centre_of_odd_and_even_patches_is_where_pil_cuts_it(size, crop):
    """Of an odd margin the larger half is below and to the right."""
    height, width = size
    left, top = (width - crop) // 2, (height - crop) // 2
    expected = Image.fromarray(coded(height, width)).crop((left, top, left + crop, top + crop))
    found = pixels(find_backbone("uni"), f"center{crop}@{crop}", coded(height, width))[0]  # nothing is resized
    assert np.abs(found - np.asarray(expected)).max() < 0.01


@pytest.mark.parametrize(("height", "width"), [(100, 153), (153, 100), (65, 129), (99, 64), (61, 61), (130, 65)])
@pytest.mark.parametrize(("resize", "input_size"), [(224, 224), (235, 224), (97, 64)])
def test_awkward_sizes_are_resized_and_cut_as_pil_does_it(height, width, resize, input_size):
    """A pixel more or less, or a cut one pixel further, is a mean difference of 0.7 grey levels and more."""
    backbone = dataclasses.replace(
        find_backbone("uni"),
        resize=resize,
        input_size=input_size,
        interpolation="bilinear" if height > 99 else "bicubic",
    )
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    scale = resize / min(height, width)
    to = (round(width * scale), round(height * scale))
    left, top = (to[0] - input_size) // 2, (to[1] - input_size) // 2
    resized = Image.fromarray(patch(height, width)).resize(to, filters[backbone.interpolation])
    expected = np.asarray(resized.crop((left, top, left + input_size, top + input_size)), dtype=float)
    found = pixels(backbone, "full", patch(height, width))[0]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 2.1
    assert np.abs(found - expected).mean() < 0.3


@pytest.mark.parametrize("target", [224, 256])
def test_no_edge_loses_a_pixel_to_rounding(target):
    """For some edges `edge * (target / edge)` is a little less than the target."""
    edges = [edge for edge in range(16, 400) if int(edge * (target / edge)) != target]
    assert edges
    backbone = dataclasses.replace(find_backbone("uni"), resize=target, input_size=target)
    for edge in edges[:3]:
        assert pixels(backbone, "full", patch(edge, edge)).shape == (1, target, target, 3)


def test_sizes_and_crops_of_a_view_are_what_its_name_says():
    gigapath = find_backbone("prov-gigapath")  # resizes to 256 and cuts 224
    named = {
        name: make_transform(gigapath, parse_view(name)) for name in ("full", "center60", "full@160", "center60@160")
    }
    found = {name: (one.crop, one.resize, one.input_size) for name, one in named.items()}
    assert found == {
        "full": (None, 256, 224),
        "center60": (60, 224, 224),
        "full@160": (None, 160, 160),
        "center60@160": (60, 160, 160),
    }


def test_a_card_s_mean_and_deviation_normalise_their_own_channel():
    uni = dataclasses.replace(find_backbone("uni"), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    grey = np.full((224, 224, 3), (51, 102, 204), dtype=np.uint8)
    found = make_transform(uni, parse_view("full"))([grey], CPU)[0, :, 7, 9]
    expected = (torch.tensor([0.2, 0.4, 0.8]) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.25, 0.125])
    torch.testing.assert_close(found, expected)


def test_every_part_of_the_transform_is_recorded():
    made = make_transform(find_backbone("uni"), parse_view("full"))
    changed = {"crop": 64, "resize": 225, "input_size": 223, "interpolation": "bicubic"}
    changed |= {"mean": (0.5, 0.5, 0.51), "std": (0.5, 0.5, 0.51), "flips": True, "alteration": "blur"}
    assert set(changed) == {field.name for field in dataclasses.fields(made)}
    records = [dataclasses.replace(made, **{name: value}).record() for name, value in changed.items()]
    records.append(made.record())
    assert all(a != b for k, a in enumerate(records) for b in records[:k])


@pytest.mark.parametrize("modifier", ["rot90", "fliph", "stain", "blur", "mpp2"])
def test_an_altered_view_shows_what_is_altered_before_it_is_resized(modifier):
    """Against numpy and scipy, on the crop; the size is the crop's own, so that nothing else is resized."""
    uni, crop = find_backbone("uni"), patch(130, 150)[33:97, 43:107].astype(float)
    density = -np.log((crop + 1) / 256)
    rows = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    stained = 256 * np.exp(-(density @ np.linalg.inv(rows) * [1.2, 0.8, 1]) @ rows) - 1
    halved = crop.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    expected = {
        "rot90": np.rot90(crop),
        "fliph": np.fliplr(crop),
        "stain": np.clip(stained, 0, 255),
        "blur": gaussian_filter(crop, (1, 1, 0), mode="nearest"),
        "mpp2": pixels(uni, "full@64", halved)[0],
    }[modifier]
    found = pixels(uni, f"center64@64+{modifier}", patch(130, 150))[0]
    assert np.abs(found - expected).max() < 0.51
    assert np.abs(found - crop).max() > 5  # it does something
    # What is resized is altered before: a quarter turn of the whole patch turns its shape as well.
    if modifier == "rot90":
        whole = pixels(uni, "full+rot90", patch(96, 160))[0]
        np.testing.assert_allclose(whole, pixels(uni, "full", np.rot90(patch(96, 160)).copy())[0], atol=1e-3)


def test_an_altered_view_has_one_name_and_a_fingerprint_of_its_own():
    uni = find_backbone("uni")
    view = parse_view("center64+flips+imagenet+stain")
    assert (view.name, view.alteration) == ("center64+stain+imagenet+flips", "stain")
    assert split_alteration(view.name) == ("center64+imagenet+flips", "stain")
    assert altered_view("center64+imagenet+flips", "stain") == view.name
    assert make_transform(uni, parse_view("full+blur")).record() == {
        **make_transform(uni, parse_view("full")).record(),
        "alteration": "blur",
    }
    with pytest.raises(UserError, match=r"altered in one way; use one of \+blur and \+rot90"):
        parse_view("full+blur+rot90")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_normalised_pixels_are_the_same_numbers_in_the_same_layout(dtype, layout):
    transform = make_transform(find_backbone("h-optimus-1"), parse_view("full"))
    pixels = torch.randint(0, 256, (2, 3, 5, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    pixels = pixels.contiguous(memory_format=layout)
    before = pixels.clone()
    found = transform.normalise(pixels)
    for channel, (mean, std) in enumerate(zip(transform.mean, transform.std, strict=True)):
        expected = (pixels[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(found[:, channel].double(), expected, rtol=0, atol=2**-18)  # roundings of 8.3
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=layout)
    assert torch.equal(pixels, before)
    assert torch.equal(found, transform.normalise(pixels.contiguous()))
