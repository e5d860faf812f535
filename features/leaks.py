"""Which patches of a test set has a model seen while it trained, or as good as seen?

Three things are looked for between the training rows and every test set: the same bytes or pixels, the same group
(slide, patient), and patches that look the same to the backbone: crops that overlap, copies saved in another format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.blocks import Embeddings
from features.samples import Samples, group_key
from features.store import FeatureStore

# Squared distance of standardised embeddings, as a share of what two patches drawn at random are apart.
IDENTICAL = 0.01
NEARER = 1 / 3
_FALSE = 1e-4  # patches that are expected to be found by chance in a whole test set
_RANK = 10
_FEWEST = 50  # training rows; among fewer, neighbours say nothing
_PROJECTED = 256  # dimensions: random projection to so many keeps squared distances to 9 %
_MOST_PAIRS = 10**9  # some ten seconds; larger sets are not compared patch by patch
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Leak:
    """The patches of a test set that the training rows know already; one patch may be found in several ways.

    Attributes:
        identical: (n,) bool; the same file or the same pixels trains.
        grouped: (n,) bool; patches of the same group train.
        similar: (n,) bool; a patch that looks the same to the backbone trains; all False where this was not looked for.
    """

    identical: NDArray[np.bool_]
    grouped: NDArray[np.bool_]
    similar: NDArray[np.bool_]

    @property
    def seen(self) -> NDArray[np.bool_]:
        """(n,) found in any of the three ways."""
        return self.identical | self.grouped | self.similar

    def found(self) -> str:
        """Count the patches by how they were found; empty if there are none.

        >>> yes, no = np.array([True, True, False]), np.zeros(3, np.bool_)
        >>> Leak(identical=yes, grouped=no, similar=yes).found()
        '2 identical'
        """
        counts = {
            "identical": self.identical,
            "nearly identical": self.similar & ~self.identical,
            "of a group (slide, patient) in both": self.grouped,
        }
        return ", ".join(f"{int(rows.sum()):,} {what}" for what, rows in counts.items() if rows.any())


def find_leak(
    train: Samples,
    test: Samples,
    *,
    similar: NDArray[np.bool_] | None = None,
    pixels: tuple[list[str], list[str]] | None = None,
) -> Leak:
    """Compare a test set with the training rows by digest and by group.

    >>> from features.samples import make_samples
    >>> train = make_samples(["a", "b"], [0, 1], sha256=["1", "2"], group=["s1", "s2"])
    >>> test = make_samples(["c", "d", "e"], [0, 1, 1], sha256=["2", "3", "4"], group=["", "s1", "s9"])
    >>> leak = find_leak(train, test)
    >>> leak.identical.tolist(), leak.grouped.tolist()
    ([True, False, False], [False, True, False])

    Args:
        train: (n_train,) the rows that train.
        test: (n,) the rows of a test set.
        similar: (n,) what `similar_rows` found.
        pixels: digests of the decoded pixels of `train` and of `test`, where patches have been decoded.
    """
    identical = _known(test.sha256, train.sha256)
    if pixels is not None:
        identical = identical | _known(np.array(pixels[1], np.str_), np.array(pixels[0], np.str_))
    return Leak(
        identical=identical,
        grouped=_known(*(np.array([group_key(name) for name in one.group.tolist()], np.str_) for one in (test, train))),
        similar=np.zeros(len(test), np.bool_) if similar is None else similar,
    )


def _known(values: NDArray[np.str_], known: NDArray[np.str_]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.isin(values, known) & (values != "")
    return found


def similar_rows(train: Embeddings, test: Embeddings, *, fold: NDArray[np.intp] | None = None) -> NDArray[np.bool_]:
    """Mark the rows of `test` that look the same to the backbone as some row of `train`.

    A patch does so if its nearest neighbour is closer than `IDENTICAL`; or if its squared distance is less than a third
    of that of the tenth neighbour after it, and this would happen by chance once in ten thousand such test sets. How
    near the nearest of independent neighbours is follows from the dimension of the data, estimated from the other
    neighbours (Levina and Bickel, NeurIPS 2004). docs/protocol.md has what this finds. Sets of more than 10^9 pairs are
    not compared: nothing is marked.

    Args:
        train: (n_train, d).
        test: (n_test, d).
        fold: (n,) where both are the same rows: only rows of other folds are compared.

    Returns:
        (n_test,) bool.
    """
    n_train, n_features = train.shape
    if not n_train or not len(test) or n_train * len(test) > _MOST_PAIRS:
        return np.zeros(len(test), np.bool_)
    mean, scale = _moments(train)
    few = np.diag(scale)
    if n_features > _PROJECTED:
        few = np.random.default_rng(0).standard_normal((n_features, _PROJECTED), np.float32) * scale[:, None]
        few /= np.sqrt(_PROJECTED, dtype=np.float32)
    ranks = np.arange(_RANK + 1 if n_train >= _FEWEST else 1)
    nearest = _nearest(_projected(train, mean, few), _projected(test, mean, few), ranks, fold)  # (n_test, ranks)
    at_random = 2 * np.count_nonzero(scale)  # of a standardised feature, the squared difference is 2 on average
    same: NDArray[np.bool_] = nearest[:, 0] < IDENTICAL * at_random
    if len(ranks) == 1 or same.all():
        return same
    # Of independent neighbours, (distance / distance of the last)^dimension is uniform.
    ratio = np.maximum(nearest[:, :-1], 1e-12) / np.maximum(nearest[:, -1:], 1e-12)  # squared distances
    spread = np.log(ratio[~same, 1:]).mean()
    if spread == 0:  # all equally far away, as where embeddings are constant
        return same
    dimension = -2 / spread
    chance = -np.expm1(_RANK * np.log1p(-np.minimum(ratio[:, 0] ** (dimension / 2), 0.5)))
    found: NDArray[np.bool_] = same | ((ratio[:, 0] < NEARER) & (chance * len(test) < _FALSE))
    return found


def _nearest(
    known: NDArray[np.float32], asked: NDArray[np.float32], ranks: NDArray[np.intp], fold: NDArray[np.intp] | None
) -> NDArray[np.float32]:
    """Find the squared distances of each row of `asked` to its nearest rows of `known`, in ascending order."""
    nearest = np.empty((len(asked), len(ranks)), np.float32)
    sizes = (known**2).sum(axis=1)
    for start in range(0, len(asked), _BLOCK):
        part = asked[start : start + _BLOCK]
        squared = (part**2).sum(axis=1)[:, None] + sizes - 2 * part @ known.T
        if fold is not None:
            squared[fold[start : start + _BLOCK, None] == fold] = np.inf
        few = np.partition(squared, ranks[-1], axis=1)[:, : len(ranks)]
        nearest[start : start + _BLOCK] = np.sort(few, axis=1)
    return nearest


def _moments(embeddings: Embeddings) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute mean and inverse standard deviation of every feature; 0 for a constant one."""
    n, d = embeddings.shape
    total, squares = np.zeros(d), np.zeros(d)
    for _, block in embeddings.blocks():
        values = block.astype(np.float64)
        total += values.sum(axis=0)
        squares += (values**2).sum(axis=0)
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    constant = std <= 1e-6 * np.abs(mean)
    return mean.astype(np.float32), np.where(constant, 0, 1 / np.where(constant, 1, std)).astype(np.float32)


def _projected(embeddings: Embeddings, mean: NDArray[np.float32], few: NDArray[np.float32]) -> NDArray[np.float32]:
    projected = np.empty((len(embeddings), few.shape[1]), np.float32)
    for rows, block in embeddings.blocks():
        projected[rows] = (block.astype(np.float32) - mean) @ few
    return projected


def shared_with_others(store: FeatureStore, dataset: str, samples: Samples) -> Iterator[str]:
    """Say which other datasets of a store hold patches or groups of this one, a sentence for each."""
    for other in store.datasets():
        if other != dataset and (found := find_leak(store.samples(other), samples).found()):
            yield f"{dataset} shares patches with {other} ({found}): where one trains, the other is no independent test"
