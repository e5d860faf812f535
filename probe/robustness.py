"""Is a patch most like others of its class from elsewhere, or like others from its own laboratory or scanner?

The robustness index (Kömen et al., PathoROB, 2025, arXiv 2507.17845) counts both among a patch's nearest neighbours. It
depends on how classes and laboratories are mixed. In a balanced design it does not: sets of two classes and two
laboratories with equally many patches in each of the four cells, as in PathoROB's data sets, and as in the design
`paired_2x2` of croma (Grisi, van der Laak and Litjens, 2026, arXiv 2607.25497). By chance it is one half there.

Their cross-confounder robustness margin (CRoMa) says how decided the matter is: by how much the patches of one kind are
nearer than those of the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe.neighbours import neighbours, similarities
from probe.resample import Clusters, Statistic, Sums, sums_by_cluster

FEW = 10  # neighbours that are looked at
BALANCED_DRAWS = 10
_MOST = 250  # patches of a combination of class and confounder; neighbours take time with their square
_MOST_SETS = 100  # of a draw
_MARGIN_OF = 5  # patches of a kind, whose mean distance counts: croma's default
_MOST_MEDIANS = 100  # sets whose medians are computed on every resample


def robustness_counts(
    neighbour: NDArray[np.intp], label: NDArray[np.integer], confounder: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Count the neighbours (n, k) that speak for the class, and those that speak for the confounder: (n, 2).

    SO are of the same class and another confounder, OS of another class and the same confounder. The robustness index
    is sum SO / (sum SO + sum OS).

    Args:
        neighbour: rows of the set.
        label: (n,) of the class.
        confounder: (n,) number of the scanner, laboratory or the like; -1 where unknown, of which nothing is counted.
    """
    same_class = label[neighbour] == label[:, None]
    same_confounder = confounder[neighbour] == confounder[:, None]
    known = (confounder[neighbour] >= 0) & (confounder >= 0)[:, None]
    counts = (known & same_class & ~same_confounder, known & ~same_class & same_confounder)
    return np.stack([one.sum(axis=1) for one in counts], axis=1).astype(np.float64)


def robustness_of_chance(label: NDArray[np.integer], confounder: NDArray[np.intp]) -> float:
    """Compute the index of neighbours drawn from all patches: it follows from how classes and confounders are mixed.

    Args:
        label: (n,) of the class.
        confounder: (n,) number of the scanner, laboratory or the like; -1 where unknown.

    Returns:
        NaN where no confounder has patches of two classes, and no class of two confounders.
    """
    known = confounder >= 0
    cells = np.zeros((label.max() + 1, confounder.max() + 1))
    np.add.at(cells, (label[known], confounder[known]), 1)
    same_class = (cells * (cells.sum(axis=1, keepdims=True) - cells)).sum()
    same_confounder = (cells * (cells.sum(axis=0, keepdims=True) - cells)).sum()
    return float(same_class / (same_class + same_confounder)) if same_class + same_confounder else float("nan")


def draw_balanced(
    label: NDArray[np.integer], confounder: NDArray[np.intp], *, draws: int, seed: int
) -> list[list[NDArray[np.intp]]]:
    """Draw sets with equally many patches of each of two classes from each of two confounders.

    There is one for every two classes and two confounders, of which all four combinations have `FEW` patches or more;
    of more than `_MOST_SETS`, so many are drawn. Each has as many patches of a combination as the smallest of the four
    has, `_MOST` at most.

    >>> label, laboratory = np.array([0, 1] * 30), np.array([0] * 32 + [1] * 28)
    >>> drawn = draw_balanced(label, laboratory, draws=1, seed=0)[0][0]
    >>> np.bincount(2 * label[drawn] + laboratory[drawn]).tolist()
    [14, 14, 14, 14]

    Args:
        label: (n,) of the class.
        confounder: (n,) number of the scanner, laboratory or the like; -1 where unknown, and never drawn.
        draws: how many times all are drawn.
        seed: of the draws.

    Returns:
        Of each draw, the rows of each set, ascending; empty where there is none.
    """
    rng = np.random.default_rng(seed)
    cells = {
        (k, c): np.flatnonzero((label == k) & (confounder == c))
        for k in np.unique(label)
        for c in np.unique(confounder[confounder >= 0])
    }
    classes, confounders = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    of_two = [
        [cells[k, c] for k in two for c in others]
        for two in combinations(classes, 2)
        for others in combinations(confounders, 2)
    ]
    of_two = [four for four in of_two if min(map(len, four)) >= FEW]

    def drawn(four: Sequence[NDArray[np.intp]]) -> NDArray[np.intp]:
        n = min(_MOST, *map(len, four))
        return np.sort(np.concatenate([rng.choice(rows, n, replace=False) for rows in four]))

    def some() -> Sequence[int]:
        if len(of_two) <= _MOST_SETS:
            return range(len(of_two))
        return sorted(map(int, rng.choice(len(of_two), _MOST_SETS, replace=False)))

    return [[drawn(of_two[k]) for k in some()] for _ in range(draws)]


def balanced_robustness(
    embeddings: Tensor,
    group: NDArray[np.intp],
    label: NDArray[np.integer],
    confounder: NDArray[np.intp],
    drawn: Sequence[Sequence[NDArray[np.intp]]],
) -> NDArray[np.float64]:
    """Count as `robustness_counts`, among the nearest on other slides within the sets that were drawn: (n, draws, 2).

    The index of a draw is sum SO / (sum SO + sum OS) over all its sets.

    Args:
        embeddings: (n, d) of length 1.
        group: (n,) number of the slide.
        label, confounder: (n,) see `robustness_counts`.
        drawn: see `draw_balanced`.
    """
    counts = np.zeros((len(label), len(drawn), 2))
    for draw, sets in enumerate(drawn):
        for rows in sets:
            own = embeddings[torch.from_numpy(rows).to(embeddings.device)]
            near = neighbours(own, group[rows], label[rows], most=FEW, ranked=False).apart
            counts[rows, draw] += robustness_counts(near, label[rows], confounder[rows])
    return counts


def robustness_index(name: str, counts: NDArray[np.float64], clusters: Clusters) -> Sums:
    """Make the statistic of the index, the mean over draws.

    Args:
        name: of the figure.
        counts: (n, draws, 2) of the patches, see `balanced_robustness`.
        clusters: of the patches.
    """
    shape = counts.shape[1:]

    def figures(sums: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
        of_draws = sums.reshape(-1, *shape)
        with np.errstate(invalid="ignore", divide="ignore"):
            return {name: (of_draws[..., 0] / of_draws.sum(axis=2)).mean(axis=1)}

    return Sums(sums_by_cluster(counts.reshape(len(counts), -1), clusters), figures)


def robustness_margins(
    embeddings: Tensor, group: NDArray[np.intp], label: NDArray[np.integer], confounder: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Compute the cross-confounder robustness margin of every patch of a set: (n,), from -1 to 1.

    It is (d_OS - d_SO) / (d_OS + d_SO), of the mean cosine distances to the five nearest patches of the same class and
    another confounder (SO), and of another class and the same confounder (OS). Above 0 the class is nearer.

    Args:
        embeddings: (n, d) of length 1.
        group: (n,) number of the slide, whose other patches are not looked at; each its own to look at all.
        label, confounder: (n,) see `robustness_counts`.

    Returns:
        NaN where there are not five of both kinds, or all of them are at no distance.
    """
    device = embeddings.device
    groups, labels, places = (
        torch.from_numpy(np.asarray(one, np.int64)).to(device) for one in (group, label, confounder)
    )
    margins = []
    for rows, of in similarities(embeddings, embeddings):
        same_class, same_place = labels[rows, None] == labels, places[rows, None] == places
        apart = (groups[rows, None] != groups) & (places[rows, None] >= 0) & (places >= 0)
        kinds = (apart & same_class & ~same_place, apart & ~same_class & same_place)
        nearest = [of.where(kind, -torch.inf).topk(min(_MARGIN_OF, of.shape[1]), dim=1).values for kind in kinds]
        so, os = (1 - one.double().mean(dim=1) for one in nearest)  # infinite where there are too few
        margins.append((os - so) / (os + so))
    found = torch.cat(margins).cpu().numpy()
    return np.where(np.isfinite(found), found, np.nan)


def weighted_medians(values: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the medians of values (n,) that occur `weight` (b, n) times: (b,), NaN where none occurs.

    >>> weighted_medians(np.array([3.0, 1.0, 2.0]), np.array([[1.0, 1, 1], [1, 1, 0], [0, 0, 0]])).tolist()
    [2.0, 2.0, nan]
    """
    order = values.argsort()
    ranked, sums = values[order], weight[:, order].cumsum(axis=1)
    half = sums[:, -1:] / 2
    middle = (ranked[(sums >= half).argmax(axis=1)] + ranked[(sums > half).argmax(axis=1)]) / 2
    return np.where(half[:, 0] > 0, middle, np.nan)


def median_margin(
    name: str, draws: Sequence[Sequence[tuple[NDArray[np.intp], NDArray[np.float64]]]]
) -> list[Statistic]:
    """Make the statistic of margins: the mean over draws of the median over sets of the median over patches.

    Args:
        name: of the figure.
        draws: of each draw and set the clusters and the margins of its patches.

    Returns:
        The statistic; none where no patch has a margin.
    """
    known = [[(cluster[np.isfinite(of)], of[np.isfinite(of)]) for cluster, of in sets] for sets in draws]
    known = [[one for one in sets if len(one[1])] for sets in known]
    known = [sets for sets in known if sets]

    def figures(count: NDArray[np.float64], /) -> Mapping[str, NDArray[np.float64]]:
        medians = [[weighted_medians(of, count[:, cluster]) for cluster, of in sets] for sets in known]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of resamples without a patch that has a margin
            return {name: np.nanmean([np.nanmedian(sets, axis=0) for sets in medians], axis=0)}

    return [figures] if known else []


def balanced_margin(
    name: str,
    embeddings: Tensor,
    group: NDArray[np.intp],
    label: NDArray[np.integer],
    confounder: NDArray[np.intp],
    drawn: Sequence[Sequence[NDArray[np.intp]]],
    clusters: Clusters,
) -> list[Statistic]:
    """Make the statistic of margins within the sets that were drawn (see `draw_balanced`): the first draws, of many."""
    draws = drawn[: max(1, _MOST_MEDIANS // len(drawn[0]))]

    def margins(rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        own = embeddings[torch.from_numpy(rows).to(embeddings.device)]
        return clusters.index[rows], robustness_margins(own, group[rows], label[rows], confounder[rows])

    return median_margin(name, [[margins(rows) for rows in sets] for sets in draws])
