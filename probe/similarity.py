"""Are two embeddings of the same patches alike: of two backbones, or of a patch and its altered self?"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from probe.neighbours import nearest


def linear_cka(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Compute linear CKA of two embeddings (n, d) and (n, e) of the same patches, and its mean over shuffled patches.

    Of Kornblith, Norouzi, Lee and Hinton, ICML 2019: |Y'X|^2 / (|X'X| |Y'Y|) of centred embeddings, Frobenius norms; 1
    where one is the other turned and scaled. With few patches and many features it is large even for embeddings that
    have nothing in common. Then so is its mean over all orders of the patches of one: |X|^2 |Y|^2 / (n - 1) instead of
    |Y'X|^2, since the mean of a shuffled centred Gram matrix is a multiple of the centring matrix.
    """
    X, Y = (one - one.mean(0) for one in (first, second))
    n = len(X)
    by_patch = n < min(X.shape[1], Y.shape[1])  # the same products, of patches instead of features
    own = [(one @ one.T if by_patch else one.T @ one) for one in (X, Y)]
    shared = (own[0] * own[1]).double().sum() if by_patch else (Y.T @ X).double().square().sum()
    chance = X.double().square().sum() * Y.double().square().sum() / (n - 1)
    scale = own[0].double().norm() * own[1].double().norm()
    return float(shared / scale), float(chance / scale)


def self_similarity(plain: Tensor, altered: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_], float]:
    """Compare every patch with its altered self, both (n, d), centred by the mean of the patches as they are.

    Returns:
        (n,) cosine of a patch and its altered self; (n,) whether that one is the nearest of all altered patches; the
        mean cosine of a patch and another one's altered self.
    """
    n, centre = len(plain), plain.mean(0)
    X, Y = (F.normalize(one - centre, dim=1) for one in (plain, altered))
    own = (X * Y).sum(1).double()
    others = (X.double().sum(0) @ Y.double().sum(0) - own.sum()) / max(1, n * (n - 1))
    found = nearest(X, Y, 1)[:, 0] == np.arange(n)
    return own.cpu().numpy(), found, float(others)


def as_tensor(embeddings: NDArray[np.floating], device: str = "cpu") -> Tensor:
    """Copy embeddings (n, d) to a device, as float32."""
    return torch.from_numpy(np.ascontiguousarray(embeddings, np.float32)).to(device)
