"""Which inputs of an adapter does dropout drop, and how is the same choice made again in the backward pass?

A fold's mask depends only on (seed, fold, layer, step). So it need not be kept: the backward pass draws it again, which
is cheap. And no fold's training depends on which other folds are trained with it, nor on how many processes share its
batch.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class BatchRows(NamedTuple):
    """Which images of each fold's batch a process holds: `n` of `total`, from the one with index `first` on."""

    first: int
    n: int
    total: int


WHOLE_BATCH = BatchRows(0, 1, 1)


def drop_threshold(dropout: float) -> int:
    """Count the byte values, of 256, that drop their element: the probability, rounded, but never all of them.

    >>> drop_threshold(0.3)
    77
    """
    return min(round(256 * dropout), 255)


# An operator of its own, so that torch.compile calls it instead of tracing into numpy.
@torch.library.custom_op("mitofm::keep_mask", mutates_args=())
def keep_mask(
    like: Tensor, keys: Tensor, *, layer: int, threshold: int, first: int = 0, n: int = 1, total: int = 1
) -> Tensor:
    """Draw the dropout mask of one layer in one step: 1 keeps, with probability 1 - threshold / 256, and 0 drops.

    One random byte per element is compared with the threshold; on a CPU that is twenty times as fast as drawing floats.

    Args:
        like: (f, t, in); the mask has its shape, dtype and device.
        keys: (f,) one seed per fold for this step; the mask of a fold follows from its key and the layer alone.
        layer: position of the layer in the network.
        threshold: from `drop_threshold`.
        first, n, total: which images of a fold's batch the t rows belong to, as in `BatchRows`. The mask of all
            `total` images is drawn, and the part of these images returned.
    """
    mask = torch.empty_like(like, memory_format=torch.contiguous_format)
    for key, fold_mask in zip(keys.tolist(), mask.flatten(1), strict=True):
        per_image = len(fold_mask) // n
        drawn = _random_bytes(seed_of(key, layer), per_image * total, like.device)
        # Compared straight into the wanted dtype: a mask of booleans would have to be cast, several times slower.
        torch.ge(drawn[per_image * first : per_image * (first + n)], threshold, out=fold_mask)
    return mask


@keep_mask.register_fake
def _(like: Tensor, keys: Tensor, *, layer: int, threshold: int, first: int = 0, n: int = 1, total: int = 1) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _random_bytes(seed: int, n: int, device: torch.device) -> Tensor:
    n_words = -(-n // 8)
    if device.type == "cpu":
        words = torch.from_numpy(np.random.SFC64(seed).random_raw(n_words))  # twice as fast as torch's generator
    else:
        generator = _generator(device).manual_seed(seed)
        words = torch.empty(n_words, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[:n]


@cache
def _generator(device: torch.device) -> torch.Generator:
    """Give a device's generator, seeded anew for every mask: making one takes longer than drawing from it."""
    return torch.Generator(device)


def seed_of(*key: int) -> int:
    """Mix a tuple of numbers, such as (seed, fold, epoch), into one seed of 63 bits.

    >>> seed_of(42, 0) == seed_of(42, 0), seed_of(42, 0) == seed_of(42, 1)
    (True, False)
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
