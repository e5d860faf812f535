"""What does a run say of every patch of a set?

A training has one model per fold, and says the mean of their probabilities. A run has one training, or several with
different seeds; as one model it says the mean over all of them, which is what `fm-predict` applies.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from features.samples import Samples
from probe.metrics import THRESHOLD, describe_counts, predicted_classes
from probe.predictions import (
    VALIDATION,
    Predictions,
    by_training,
    patches_of,
    threshold_of,
    thresholds_of,
    trainings_of,
)
from probe.resample import Clusters, make_clusters
from probe.tally import Tally, tally

_COLUMNS = ("id", "label", "group", "digest")


@dataclass(frozen=True, eq=False)
class Ensemble:
    """One run on one set, one row per patch.

    Figures with intervals are means over the run's trainings, each at its own threshold. Single patches and drawn
    curves are those of `probability` at `threshold`: of all fold models together. With more than two classes the most
    probable one is predicted, and thresholds are NaN.

    Attributes:
        dataset, split: which set.
        id, group: (n,) str; group is empty where the slide is unknown.
        digest: (n,) str; SHA-256 of the patch's file, empty where it is not known.
        label: (n,) int8.
        by_training: (K, n, c) probabilities of each training, the mean over its fold models; of "validation", those by
            the one model that did not train on the patch's slide.
        thresholds: (K,) each training is positive from this probability on; chosen on its out-of-fold predictions. On
            "validation" itself they are 0.5, so that nothing was chosen on the patches that are judged.
        threshold: of `probability`, likewise.
        prior: share of class 1 among the patches that the run trained on; NaN where it is not known.
        ordinal: whether the classes are ordered.
    """

    dataset: str
    split: str
    id: NDArray[np.str_]
    label: NDArray[np.int8]
    group: NDArray[np.str_]
    digest: NDArray[np.str_]
    by_training: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    threshold: float
    prior: float
    ordinal: bool = False

    def __len__(self) -> int:
        return len(self.id)

    def __repr__(self) -> str:
        trainings = f", {len(self.by_training)} trainings" if len(self.by_training) > 1 else ""
        threshold = f", threshold {self.threshold:.3f}" if self.n_classes == 2 else ""
        return f"Ensemble({self.dataset}/{self.split}: {describe_counts(self.counts)}{trainings}{threshold})"

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return int(self.by_training.shape[2])

    @property
    def counts(self) -> tuple[int, ...]:
        """Patches of every class."""
        return tuple(np.bincount(self.label, minlength=self.n_classes).tolist())

    @property
    def probability(self) -> NDArray[np.float64]:
        """(n, c) mean over trainings."""
        return np.asarray(self.by_training.mean(axis=0))

    @property
    def positive(self) -> NDArray[np.float64]:
        """(K, n) probability of class 1 by each training: what views of two classes are made of."""
        return self.by_training[..., 1]

    @property
    def predicted(self) -> NDArray[np.int8]:
        """(n,) class that all fold models together predict."""
        return predicted_classes(self.probability, self.threshold)

    def against_rest(self, k: int) -> Ensemble:
        """Ask for one class against all others: label 1 is class k, with its probability, and threshold 0.5."""
        own = self.by_training[..., k]
        return replace(
            self,
            label=(self.label == k).astype(np.int8),
            by_training=np.stack([1 - own, own], axis=-1),
            thresholds=np.full(len(own), THRESHOLD),
            threshold=THRESHOLD,
            prior=math.nan,
            ordinal=False,
        )

    @property
    def clusters(self) -> Clusters:
        """The clusters that its patches are drawn in."""
        return make_clusters(self.group, self.digest)

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Ensemble:
        """Keep the rows of a mask, or those of an index array in its order."""
        columns = {name: getattr(self, name)[rows] for name in _COLUMNS}
        return replace(self, **columns, by_training=self.by_training[:, rows])

    def tallies(self, clusters: Clusters, *, names: Collection[str] | None = None) -> list[Tally]:
        """Count its predictions by cluster, those of each training, for some figures."""
        return [
            tally(
                self.label,
                probability,
                cluster=clusters.index,
                n_clusters=clusters.n,
                threshold=float(threshold),
                ordinal=self.ordinal,
                names=names,
            )
            for probability, threshold in zip(self.by_training, self.thresholds, strict=True)
        ]


def ensemble_of(
    predictions: Predictions, dataset: str, split: str, *, samples: Samples | None = None, ordinal: bool = False
) -> Ensemble:
    """Average a run's probabilities over the fold models of each training, on one of its sets.

    Args:
        predictions: of the run.
        dataset, split: which set; its patches keep their order.
        samples: the dataset's patch table, which tells the patches' digests.
        ordinal: whether the run's classes are ordered.

    Raises:
        UserError: if the run has no such set, or its rows are not those of whole fold models.
    """
    part = predictions.select((predictions.dataset == dataset) & (predictions.split == split))
    name = f"{dataset}/{split}"
    if not len(part.id):
        known = ", ".join(sorted(f"{a}/{b}" for a, b in predictions.sets())) or "none"
        raise UserError(f"this run has no predictions of {name}; it has: {known}. Run it again with --test {dataset}.")
    first, patch = patches_of(part)
    seeds, training = trainings_of(part)
    cell = training * len(first) + patch
    n_models = np.bincount(cell, minlength=len(seeds) * len(first)).reshape(len(seeds), len(first))
    if np.bincount(cell * (part.fold.max() + 1) + part.fold).max() > 1:
        raise UserError(f"predictions of {name}: a patch occurs twice for one fold. predictions.csv is damaged.")
    if n_models.min() < n_models.max():
        lacking = int(np.argmin(n_models.min(axis=0)))
        raise UserError(
            f"predictions of {name}: {part.id[first[lacking]]} has {n_models[:, lacking].min()} fold models, others "
            f"have {n_models.max()}. predictions.csv is damaged."
        )
    finite = np.isfinite(part.logit).all(axis=1)
    if not finite.all():
        raise UserError(f"predictions of {name}: {(~finite).sum()} are no numbers. The run diverged.")
    for column in ("label", "group"):
        values = getattr(part, column)
        differing = np.flatnonzero(values != values[first][patch])
        if len(differing):
            raise UserError(
                f"predictions of {name}: {part.id[differing[0]]} has two {column}s. predictions.csv is damaged."
            )
    # On the patches that thresholds are chosen on, nothing may be chosen for those that are judged.
    at_half = split == VALIDATION and predictions.n_classes == 2
    trained_on = predictions.select(predictions.split == VALIDATION).label
    ensemble = Ensemble(
        dataset=dataset,
        split=split,
        id=part.id[first],
        label=part.label[first],
        group=part.group[first],
        digest=np.full(len(first), ""),
        by_training=by_training(part, dataset, split)[1],
        thresholds=np.full(len(seeds), THRESHOLD) if at_half else thresholds_of(predictions),
        threshold=THRESHOLD if at_half else threshold_of(predictions),
        prior=float((trained_on == 1).mean()) if len(trained_on) else math.nan,
        ordinal=ordinal,
    )
    return ensemble if samples is None else replace(ensemble, digest=samples.sha256[rows_of(ensemble, samples.id)])


def rows_of(ensemble: Ensemble, ids: NDArray[np.str_]) -> NDArray[np.intp]:
    """Find each patch of the set in a patch table: votes[rows_of(ensemble, table_ids)] are aligned with the set.

    Raises:
        UserError: if the table lacks a patch.
    """
    order = np.argsort(ids, kind="stable")
    position = np.searchsorted(ids, ensemble.id, sorter=order)
    missing = ensemble.id[position == np.searchsorted(ids, ensemble.id, side="right", sorter=order)]
    if len(missing):
        raise UserError(
            f"{len(missing)} of {len(ensemble)} patches of {ensemble.dataset}/{ensemble.split} are not in the patch "
            f"table (first: {missing[0]}). The run and the table are of different data."
        )
    return np.asarray(order[position])
