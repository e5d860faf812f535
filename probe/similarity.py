"""Are two embeddings of the same patches alike: of two backbones, or of a patch and its altered self?"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from probe.neighbours import nearest


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Compute linear CKA of two embeddings (n, d) and (n, e) of the same patches: 0 to 1.

    Of Kornblith, Norouzi, Lee and Hinton, ICML 2019: |Y'X|^2 / (|X'X| |Y'Y|) of centred embeddings, Frobenius norms.
    It does not change when an embedding is rotated or scaled. With few patches and many features it is large even for
    embeddings that have nothing in common.
    """
    X, Y = (one - one.mean(0) for one in (first.double(), second.double()))
    if len(X) < min(X.shape[1], Y.shape[1]):
        X, Y = X @ X.T, Y @ Y.T  # the same products, of patches instead of features
        return float((X * Y).sum() / (X.norm() * Y.norm()))
    return float((Y.T @ X).square().sum() / ((X.T @ X).norm() * (Y.T @ Y).norm()))


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
