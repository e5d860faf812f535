"""Which test patches of a run are known from its training, and which are left without them?

A set `<dataset>/unseen` holds the test patches that no training patch gives away (`features.leaks`). It is a set like
any other: it has figures, intervals and comparisons beside those of the whole test set.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from features.leaks import Leak, find_leak
from features.samples import TEST, Samples
from probe.predictions import Predictions, concatenate

UNSEEN = "unseen"  # the split name of test patches that are not known from training


@dataclass(frozen=True, eq=False)
class KnownPatches:
    """The patches of a test set that are known from training.

    Attributes:
        dataset: of the test set.
        id: (n,) str; the patches of the test set.
        leak: (n,) how each of them is known.
    """

    dataset: str
    id: NDArray[np.str_]
    leak: Leak

    @property
    def ids(self) -> NDArray[np.str_]:
        """Those that are known."""
        return self.id[self.leak.seen]

    def line(self, train: str) -> str:
        """Say how many there are, how they are known, and what follows."""
        known = f"{len(self.ids):,} of {len(self.id):,} test patches of {self.dataset}"
        rest = f"figures without them are those of {self.dataset}/{UNSEEN}"
        if len(self.ids) == len(self.id):
            known, rest = f"all {len(self.id):,} test patches of {self.dataset}", "none is left without them"
        return f"{known} are known from the training patches of {train} ({self.leak.found()}): {rest}"


def known_patches(
    train: str, tables: Mapping[str, Samples], similar: Mapping[str, Collection[str]]
) -> dict[str, KnownPatches]:
    """Compare every test set of a run with its training rows.

    Args:
        train: the dataset that trains.
        tables: dataset to patch table, of what the run trains on and scores.
        similar: dataset to the ids of test patches that look like training patches, as the run found them.

    Returns:
        By dataset, only of those with known patches.
    """
    training = tables[train].select(tables[train].training_rows)
    found = {}
    for name, table in tables.items():
        test = table.select(table.split == TEST) if name == train else table
        leak = find_leak(training, test, similar=np.isin(test.id, list(similar.get(name, ()))))
        if leak.seen.any():
            found[name] = KnownPatches(name, test.id, leak)
    return found


def with_unseen(predictions: Predictions, known: Iterable[KnownPatches]) -> Predictions:
    """Add a set `<dataset>/unseen` for every test set with known patches of which some are left."""
    parts = [predictions]
    for one in known:
        rows = (predictions.dataset == one.dataset) & (predictions.split == TEST)
        part = predictions.select(rows)
        part = part.select(~np.isin(part.id, one.ids))
        if len(part):
            parts.append(replace(part, split=np.broadcast_to(UNSEEN, len(part))))
    return concatenate(parts) if len(parts) > 1 else predictions
