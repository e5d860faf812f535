"""Is every pixel of a resized image Pillow's?"""

import numpy as np
import pytest
import torch
from PIL import Image

from extract.resize import _weights, resize_as_pillow

CPU = torch.device("cpu")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SIZES = [  # (height, width) before and after
    ((128, 128), (224, 224)),
    ((64, 64), (224, 224)),
    ((256, 256), (224, 224)),
    ((48, 61), (224, 285)),
    ((301, 257), (224, 191)),
    ((224, 100), (224, 240)),  # one axis stays
    ((50, 224), (70, 224)),
    ((900, 611), (31, 17)),  # 54 pixels in one: of 119 taps
    ((1, 2), (7, 9)),
]


def images(height: int, width: int) -> np.ndarray:
    """Noise, and black and white alone, where a cubic filter overshoots and every clamp counts."""
    rng = np.random.default_rng(height * width)
    noise = rng.integers(0, 256, (height, width, 3))
    return np.stack([noise, rng.choice([0, 255], (height, width, 3))]).astype(np.uint8)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_every_pixel_is_pillow_s(before, after, interpolation, device):
    patches = images(*before)
    pixels = torch.from_numpy(patches).permute(0, 3, 1, 2).to(device)
    found = resize_as_pillow(pixels, after, interpolation=interpolation).cpu()
    height, width = after
    expected = [np.asarray(Image.fromarray(patch).resize((width, height), FILTERS[interpolation])) for patch in patches]
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1).numpy(), np.stack(expected))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("n_in", "n_out"), [(128, 224), (900, 31), (224, 7), (4096, 16)])
def test_products_are_exact_in_tf32_and_sums_in_float32(n_in, n_out, interpolation):
    parts, _ = _weights(n_in, n_out, interpolation, CPU)
    assert torch.equal(parts.half().float(), parts)  # float16 has the 11 bits of TF32
    assert (255 * parts.double().abs().sum(dim=1)).max() < 2**24
    assert torch.equal(parts, parts.round())


def test_the_weights_of_a_size_are_made_once():
    first, _ = _weights(20, 30, "bicubic", CPU)
    assert _weights(20, 30, "bicubic", CPU)[0] is first


def test_a_thread_in_inference_mode_leaves_weights_that_others_can_use():
    _weights.cache_clear()
    with torch.inference_mode():
        parts, _ = _weights(20, 30, "bicubic", CPU)
    assert not parts.is_inference()
