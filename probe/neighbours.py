"""Which patches are nearest to each in an embedding, and what do they say of it?

Neighbours are those of the largest cosine. Similarities are computed a block of queries at a time, once for all that is
asked of a set: neighbours among all others, neighbours on other slides, and the ranking of all others. So memory is
bounded, and no pair of patches is looked at twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 2**23  # similarities at a time: 32 MiB, and as much several times while they are sorted


def unit_vectors(embeddings: NDArray[np.floating], device: str = "cpu") -> Tensor:
    """Scale embeddings (n, d) to length 1, as float32 on a device; a row of zeros stays so."""
    return F.normalize(torch.from_numpy(np.ascontiguousarray(embeddings, np.float32)).to(device), dim=1)


def similarities(query: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks (b, n) of the products of all queries (m, d) with all of a gallery (n, d), and which rows they are.

    What is yielded may be changed.
    """
    step = max(1, _BLOCK // max(1, len(gallery)))
    for start in range(0, len(query), step):
        yield slice(start, start + step), query[start : start + step] @ gallery.T


def nearest(query: Tensor, gallery: Tensor, k: int) -> NDArray[np.intp]:
    """Find the k rows of `gallery` (n, d) nearest to each of `query` (m, d), of length 1: (m, k), nearest first."""
    found = [of.topk(k, dim=1).indices.cpu().numpy() for _, of in similarities(query, gallery)]
    return np.concatenate(found).astype(np.intp)


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The neighbours of every patch of a set within that set.

    Attributes:
        any: (n, k) rows of the nearest others, nearest first.
        apart: (n, l) the same of patches on other slides.
        average_precision: (n,) of the ranking of all patches on other slides, relevant where they have the label of the
            query; NaN where none is, or where it was not asked for.
    """

    any: NDArray[np.intp]
    apart: NDArray[np.intp]
    average_precision: NDArray[np.float64]


def neighbours(
    embeddings: Tensor, group: NDArray[np.intp], label: NDArray[np.integer], *, most: int, ranked: bool = True
) -> Neighbours:
    """Find every patch's neighbours within a set.

    Args:
        embeddings: (n, d) of length 1, see `unit_vectors`.
        group: (n,) number of the slide, as in `features.folds.effective_groups`.
        label: (n,) of the class.
        most: how many neighbours are wanted; fewer are found where fewer patches are on other slides than that of any
            patch, and none apart where all are of one slide.
        ranked: whether to compute `average_precision`.
    """
    n = len(embeddings)
    k_any, k = min(most, n - 1), min(most, n - int(np.bincount(group).max()))
    groups, labels = (torch.from_numpy(np.asarray(one, np.int64)).to(embeddings.device) for one in (group, label))
    rank = torch.arange(1, n + 1, device=embeddings.device)
    any_, apart, precision = [], [], []
    for rows, of in similarities(embeddings, embeddings):
        each = torch.arange(len(of), device=of.device)
        of[each, each + rows.start] = -torch.inf
        any_.append(of.topk(k_any, dim=1).indices)
        same_slide = groups[rows, None] == groups
        of[same_slide] = -torch.inf
        if not ranked:
            apart.append(of.topk(k, dim=1).indices)
            continue
        order = of.argsort(dim=1, descending=True)
        apart.append(order[:, :k])
        relevant = ((labels[rows, None] == labels) & ~same_slide).gather(1, order)
        found = relevant.cumsum(1)
        precision.append(((found / rank) * relevant).double().sum(1) / found[:, -1])  # 0 / 0 is NaN
    return Neighbours(
        any=torch.cat(any_).cpu().numpy(),
        apart=torch.cat(apart).cpu().numpy(),
        average_precision=torch.cat(precision).cpu().numpy() if ranked else np.full(n, np.nan),
    )


def class_shares(label: NDArray[np.integer], k: int, n_classes: int) -> NDArray[np.float64]:
    """Compute the share of each class among the first k neighbours, of the neighbours' labels (m, K): (m, n_classes).

    >>> class_shares(np.array([[1, 0, 1, 2]]), 2, 3).tolist()
    [[0.5, 0.5, 0.0]]
    """
    return np.stack([(label[:, :k] == c).mean(axis=1) for c in range(n_classes)], axis=1)


def precision_at(label: NDArray[np.integer], neighbour: NDArray[np.intp], k: int) -> NDArray[np.float64]:
    """Compute the share of each patch's first k neighbours (n, K) that have its label (n,): (n,)."""
    return np.asarray((label[neighbour[:, :k]] == label[:, None]).mean(axis=1))


def mutual_neighbours(first: NDArray[np.intp], second: NDArray[np.intp]) -> NDArray[np.float64]:
    """Compute the share of each patch's neighbours (n, k) that two embeddings have in common: (n,).

    Mutual nearest neighbours of Huh, Cheung, Wang and Isola, The Platonic Representation Hypothesis, 2024.

    >>> mutual_neighbours(np.array([[1, 2], [0, 3]]), np.array([[2, 3], [3, 0]])).tolist()
    [0.5, 1.0]
    """
    return np.asarray((first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1))
