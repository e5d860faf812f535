"""Of which patches are embeddings measured, and which measures would say nothing of them?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.console import say
from features.folds import effective_groups
from features.samples import Samples
from probe.measure_records import MEASURES
from probe.resample import SLIDE, Clusters, make_clusters
from probe.robustness import robustness_of_chance

_MOST = 10_000  # patches of a set that are measured; neighbours take time and memory with their square
_SEED = 0  # of the patches that are drawn from larger sets

Key = tuple[str, str]  # dataset and split


@dataclass(frozen=True, eq=False)
class PatchSet:
    """The patches of a set that are measured.

    Attributes:
        dataset, split: "train" for those that probes train on, else "test".
        rows: of the dataset's table.
        samples: (n,) those rows.
        group: (n,) number of the slide; patches of unknown slides are alone, and copies of a file together.
        clusters: what intervals are over.
        confounder: (n,) number of the domain, or of the slide where the set has no two domains; -1 where unknown.
        confounded_by: "domain", "slide", or empty where neither is known of two.
    """

    dataset: str
    split: str
    rows: NDArray[np.intp]
    samples: Samples
    group: NDArray[np.intp]
    clusters: Clusters
    confounder: NDArray[np.intp]
    confounded_by: str

    @property
    def label(self) -> NDArray[np.intp]:
        """(n,) number of the class."""
        return self.samples.label.astype(np.intp)


def patch_set(dataset: str, split: str, table: Samples, rows: NDArray[np.intp]) -> PatchSet:
    """Gather a set; of more than `_MOST` patches so many are drawn, always the same, which is said."""
    if len(rows) > _MOST:
        say(f"{dataset}: {_MOST:,} of {len(rows):,} {split} patches are measured, drawn at random.")
        rows = np.sort(np.random.default_rng(_SEED).choice(rows, _MOST, replace=False))
    samples = table.select(rows)
    confounder, confounded_by = np.full(len(rows), -1), ""
    for name, values in (("domain", samples.domain), ("slide", samples.group)):
        known = values != ""
        names, number = np.unique(values[known], return_inverse=True)
        if len(names) > 1:
            confounder[known], confounded_by = number, name
            break
    clusters = make_clusters(samples.group, samples.sha256)
    return PatchSet(dataset, split, rows, samples, effective_groups(samples), clusters, confounder, confounded_by)


def silent_measures(of: PatchSet, names: Sequence[str]) -> dict[str, str]:
    """Find the measures that would say nothing of a set, and why.

    Args:
        of: the set.
        names: of the classes.
    """
    present, by = np.unique(of.label), of.confounded_by
    why = dict.fromkeys(("retrieval", "robustness"), f"it has one {_one(of)}") if of.group.max() < 1 else {}
    if of.split == "train" and why:
        why["knn"] = why["retrieval"]  # k is chosen on other slides
    if not by:
        why.setdefault("robustness", "no two domains or slides are known")
    elif not 0 < (chance := robustness_of_chance(of.label, of.confounder)) < 1:
        said = f"no class has patches of two {by}s" if chance == 0 else f"no {by} has patches of two classes"
        why.setdefault("robustness", said)
    if len(of.rows) < len(names):
        why["clustering"] = "it has fewer patches than there are classes"
    if len(present) < 2:
        alone = ("knn", "fewshot", "retrieval", "robustness", *(() if by else ("clustering",)))
        why |= dict.fromkeys(alone, f"it has patches of one class alone, {names[present[0]]}")
    return why


def _one(of: PatchSet) -> str:
    """Say what a set has but one of: slide, or patch where slides are unknown."""
    return "slide" if of.clusters.unit == SLIDE else "patch"


def say_left_out(sets: Mapping[Key, PatchSet], silent: Mapping[Key, Mapping[str, str]], wanted: frozenset[str]) -> None:
    """Say of each set what is left out, a line for each reason."""
    for (dataset, split), of in sets.items():
        left_out: dict[str, list[str]] = defaultdict(list)
        for name in MEASURES:
            if name in wanted and name in silent[dataset, split] and (name, split) != ("fewshot", "train"):
                left_out[silent[dataset, split][name]].append(name)
        if of.clusters.n_units < 2:
            left_out[f"it has one {_one(of)}"].append("intervals")
        for why, measures in left_out.items():
            say(f"{dataset}, {split}: {why}. Left out: {', '.join(measures)}.")
