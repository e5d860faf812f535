"""Are the inputs that dropout drops a function of fold, layer and step, and as many as was asked for?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.dropout import drop_threshold, keep_mask, philox4x32, philox_mask

Draw = Callable[..., Tensor]


def as_on_a_gpu(like: Tensor, keys: Tensor, *, layer: int, threshold: int, first: int = 0, n: int = 1, total: int = 1):
    first_row = first * (like.shape[1] // n)
    return philox_mask(like, keys, torch.tensor(layer), threshold=threshold, first_row=first_row)


both = pytest.mark.parametrize("draw", [keep_mask, as_on_a_gpu], ids=["cpu", "gpu"])


# ----------------------------------------------------------------------------------------------- what a mask looks like


@both
@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.5, 0.9])
def test_masks_keep_what_was_asked_for(draw: Draw, dropout: float) -> None:
    threshold = drop_threshold(dropout)
    keep = 1 - threshold / 256
    assert abs(keep - (1 - dropout)) <= 1 / 512
    mask = draw(torch.empty(2, 500, 400), torch.tensor([11, 2**62 + 12]), layer=0, threshold=threshold)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    deviation = (keep * (1 - keep) / 200_000) ** 0.5
    assert (mask.mean(dim=(1, 2)) - keep).abs().max() < 4.5 * deviation
    for axis in (1, 2):  # neither tokens nor features are dropped together
        spread = mask.mean(dim=axis).std() / (keep * (1 - keep) / mask.shape[axis]) ** 0.5
        assert 0.9 < spread < 1.1


@both
def test_folds_layers_and_steps_drop_independently_and_the_same_again(draw: Draw) -> None:
    like = torch.empty(2, 200, 100, dtype=torch.float64)
    # Two folds in two steps, in two layers: keys that differ in their low bits alone, and in their high ones alone.
    drawn = [draw(like, torch.tensor(keys), layer=layer, threshold=77) for keys in ([3, 4], [2**40 + 3, 2**62 + 4])
             for layer in (0, 1)]  # fmt: skip
    again = draw(like, torch.tensor([3, 4]), layer=0, threshold=77)
    assert torch.equal(again, drawn[0])
    masks = torch.cat(drawn).flatten(1)
    for one, other in combinations(masks, 2):
        # The correlation of n independent pairs has a standard deviation of n^-1/2.
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 4.5 * len(one) ** -0.5


@both
def test_a_fold_drops_the_same_whatever_else_is_in_the_batch(draw: Draw) -> None:
    both_folds = draw(torch.empty(2, 30, 20), torch.tensor([3, 4]), layer=1, threshold=77)
    assert torch.equal(draw(torch.empty(1, 30, 20), torch.tensor([4]), layer=1, threshold=77)[0], both_folds[1])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        like = torch.empty(2, 30, 20, dtype=dtype)
        found = draw(like, torch.tensor([3, 4]), layer=1, threshold=77)
        assert found.dtype == dtype
        assert torch.equal(found.float(), both_folds)


@both
def test_the_masks_of_shares_make_up_the_mask_of_the_batch(draw: Draw) -> None:
    keys, tokens, width = torch.tensor([11, 12]), 3, 21
    whole = draw(torch.empty(2, 7 * tokens, width), keys, layer=4, threshold=77)
    parts = [
        draw(torch.empty(2, n * tokens, width), keys, layer=4, threshold=77, first=first, n=n, total=7)
        for first, n in ((0, 2), (2, 4), (6, 1))
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_a_layer_is_a_number_or_a_tensor() -> None:
    keys, like = torch.tensor([11]), torch.empty(1, 5, 20)
    expected = keep_mask(like, keys, layer=4, threshold=77)
    for layer in (torch.tensor(4), torch.tensor([4], dtype=torch.int32)):
        assert torch.equal(keep_mask(like, keys, layer=layer, threshold=77), expected)


def test_a_cpu_draws_the_bits_that_it_always_did() -> None:
    mask = keep_mask(torch.empty(2, 2, 9), torch.tensor([11, 2**62]), layer=3, threshold=77)
    assert ["".join(map(str, row)) for row in mask.int().flatten(0, 1).tolist()] == [
        "011111111",
        "101111111",
        "001111110",
        "111111110",
    ]


# --------------------------------------------------------------------------------------------------------------- Philox


def philox_in_numpy(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox4x32-10 of counters (n, 4) and a key (2,), written as in Salmon et al. 2011, section 3.3."""
    left, key = counter.copy(), key.copy()
    for _ in range(10):
        high, low = zip(*(divmod(left[:, i].astype(np.uint64) * np.uint64(m), np.uint64(2**32))
                          for i, m in ((0, 0xD2511F53), (2, 0xCD9E8D57))), strict=True)  # fmt: skip
        left = np.stack([high[1] ^ left[:, 1] ^ key[0], low[1], high[0] ^ left[:, 3] ^ key[1], low[0]], axis=1)
        left = left.astype(np.uint32)
        key += np.array([0x9E3779B9, 0xBB67AE85], np.uint32)
    return left


KNOWN = [  # of Random123's kat_vectors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == expected
    assert tuple(philox_in_numpy(np.array([counter], np.uint32), np.array(key, np.uint32))[0]) == expected


@pytest.mark.parametrize("width", [1, 16, 37])
def test_a_mask_of_a_gpu_is_philox_of_fold_row_group_and_layer(width: int) -> None:
    keys, layer, first_row, n_rows = [2**62 + 12345, 77], 9, 1000, 4
    mask = philox_mask(torch.empty(2, n_rows, width), torch.tensor(keys), torch.tensor(layer),
                       threshold=128, first_row=first_row)  # fmt: skip
    n_groups = (width + 15) // 16
    for key, found in zip(keys, mask.bool().numpy(), strict=True):
        start = first_row * n_groups
        groups = np.arange(start, start + n_rows * n_groups)
        counter = np.stack([groups, np.full_like(groups, layer), 0 * groups, 0 * groups], axis=1).astype(np.uint32)
        words = philox_in_numpy(counter, np.array([key % 2**32, key >> 32], np.uint32))
        drawn = words.astype("<u4").view(np.uint8).reshape(n_rows, -1)[:, :width]
        np.testing.assert_array_equal(found, drawn >= 128)


def test_a_gpu_is_asked_for_no_number() -> None:
    with FakeTensorMode():  # an .item() of a fake tensor fails
        like, keys = (
            torch.empty(2, 6, 40, dtype=torch.bfloat16, device="cuda"),
            torch.empty(2, dtype=int, device="cuda"),
        )
        layer = torch.empty((), dtype=torch.int32, device="cuda")
        for mask in (
            keep_mask(like, keys, layer=layer, threshold=77, first=1, n=2, total=4),
            philox_mask(like, keys, layer, threshold=77, first_row=3),
        ):
            assert (mask.shape, mask.dtype, mask.device.type) == (like.shape, torch.bfloat16, "cuda")


@pytest.mark.gpu
def test_a_gpu_draws_the_bits_of_plain_philox() -> None:
    like, keys = torch.empty(2, 6, 40), torch.tensor([5, 2**62])
    found = keep_mask(like.cuda(), keys.cuda(), layer=3, threshold=77, first=1, n=2, total=4)
    assert torch.equal(found.cpu(), philox_mask(like, keys, torch.tensor(3), threshold=77, first_row=3))
