"""Which inputs of an adapter does dropout drop, and how is the same choice made again in the backward pass?

A fold's mask depends only on (seed, fold, layer, step). So it need not be kept: the backward pass draws it again, which
is cheap. And no fold's training depends on which other folds are trained with it, nor on how many processes share its
batch.

On a CPU the random bytes come from numpy's SFC64. On a GPU they come from Philox4x32-10 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). That is a function from a counter to 16 bytes, so every thread, and every process
that shares a batch, draws its own part of the mask and no other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GROUP = 16  # columns that share one call of Philox: it gives so many bytes
_LOW = 0xFFFFFFFF  # the low 32 bits


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


def keep_mask(
    like: Tensor, keys: Tensor, *, layer: Tensor | int, threshold: int, first: int = 0, n: int = 1, total: int = 1
) -> Tensor:
    """Draw the dropout mask of one layer in one step: 1 keeps, with probability 1 - threshold / 256, and 0 drops.

    One random byte per element is compared with the threshold; on a CPU that is twenty times as fast as drawing floats.

    Args:
        like: (f, t, in); the mask has its shape, dtype and device.
        keys: (f,) int64 on that device: a seed per fold for this step. A fold's mask follows from it and the layer.
        layer: position of the layer in the network, best as an integer tensor () or (1,) on that device: numbers that
            differ from layer to layer would have torch.compile compile every layer anew.
        threshold: from `drop_threshold`.
        first, n, total: which images of a fold's batch the t rows belong to, as in `BatchRows`. Shares of a batch have
            the masks that they would have in the whole one.
    """
    # An operator takes a quarter of a millisecond; what is traced or stands for a GPU needs it.
    plain = like.device.type == "cpu" and type(keys) is Tensor and not torch.compiler.is_compiling()
    draw = _draw_mask if plain else _keep_mask
    mask: Tensor = draw(
        like, keys, torch.as_tensor(layer, device=keys.device), threshold=threshold, first=first, n=n, total=total
    )
    return mask


def _draw_mask(like: Tensor, keys: Tensor, layer: Tensor, *, threshold: int, first: int, n: int, total: int) -> Tensor:
    if like.device.type != "cpu":
        return philox_mask(like, keys, layer, threshold=threshold, first_row=first * (like.shape[1] // n))
    mask = torch.empty_like(like, memory_format=torch.contiguous_format)
    for key, fold_mask in zip(keys.tolist(), mask.flatten(1), strict=True):
        per_image = len(fold_mask) // n
        # A stream has no middle to begin at, so the bytes of all images are drawn.
        drawn = _sfc64_bytes(seed_of(key, int(layer)), per_image * total)
        # Compared straight into the wanted dtype: a mask of booleans would have to be cast, several times slower.
        torch.ge(drawn[per_image * first : per_image * (first + n)], threshold, out=fold_mask)
    return mask


# An operator of its own, so that torch.compile calls it instead of tracing into numpy.
_keep_mask = torch.library.custom_op("mitofm::keep_mask", _draw_mask, mutates_args=())


@_keep_mask.register_fake
def _(like: Tensor, keys: Tensor, layer: Tensor, *, threshold: int, first: int, n: int, total: int) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _sfc64_bytes(seed: int, n: int) -> Tensor:
    # Twice as fast as torch's generator. The same words as of `random_raw`, which would let no other thread compute.
    generator = np.random.Generator(np.random.SFC64(seed))
    words = generator.integers(2**64 - 1, size=-(-n // 8), dtype=np.uint64, endpoint=True)
    return torch.from_numpy(words.view(np.uint8)[:n])


def seed_of(*key: int) -> int:
    """Mix a tuple of numbers, such as (seed, fold, epoch), into one seed of 63 bits.

    >>> seed_of(42, 0) == seed_of(42, 0), seed_of(42, 0) == seed_of(42, 1)
    (True, False)
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


# -------------------------------------------------------------------------------------------------------------- Philox


def philox_mask(like: Tensor, keys: Tensor, layer: Tensor, *, threshold: int, first_row: int) -> Tensor:
    """Draw the mask of `keep_mask` as it is on a GPU, on any device.

    Bytes 16g to 16g + 15 of a row are the words of Philox4x32-10, little-endian, for the fold's key and the counter
    (row * ceil(in / 16) + g, layer, 0, 0). The kernels draw the same; this is what they are held to.

    Args:
        like: (f, t, in).
        keys: (f,) int64 seeds.
        layer: () or (1,) position of the layer.
        threshold: from `drop_threshold`.
        first_row: the index that the first of the t rows has in the fold's whole batch.
    """
    n_rows, width = like.shape[1:]
    n_groups = -(-width // GROUP)
    rows = torch.arange(first_row, first_row + n_rows, device=like.device)
    groups = (rows[:, None] * n_groups + torch.arange(n_groups, device=like.device)) & _LOW  # (t, g)
    zeros = torch.zeros_like(groups)
    keys = keys[:, None, None]  # (f, 1, 1)
    words = philox4x32((groups, zeros + layer, zeros, zeros), (keys & _LOW, keys >> 32 & _LOW))  # 4 x (f, t, g)
    halves = torch.stack([words[0] | words[1] << 32, words[2] | words[3] << 32], dim=-1)  # (f, t, g, 2)
    drawn = halves.view(torch.uint8).flatten(2)[..., :width]
    return torch.ge(drawn, threshold, out=torch.empty_like(like, memory_format=torch.contiguous_format))


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10 of words of 32 bits, each in an int64 tensor; all shapes broadcast.

    Source: Salmon et al. 2011, and Random123, whose known answers the tests hold this to.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products pass 2^63 and wrap around: the 64 bits are those of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3
