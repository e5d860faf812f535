"""Which interval has a figure that no resample changes, such as a perfect score?

Without a single error every resample is perfect too, and says nothing of the errors that other slides would bring. What
is known is that none of n slides brought one. Clopper and Pearson's bound (Biometrika 26, 1934) then is the rate of
perfect slides below which n perfect ones would be a chance of less than 2.5 %. The n is the number of slides (of
patches, where slides are unknown) that hold the class, as if each held one patch: many patches of one slide are no more
than one, and so the bound is rather too low.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probe.metrics import confusion_figures

_FROM_CONFUSION = frozenset({"balanced_accuracy", "f1", "mcc"})


@dataclass(frozen=True)
class Held:
    """How often a set holds each class.

    Attributes:
        clusters: (c,) with at least one patch of the class; fewer by a design effect.
        prevalence: share of patches that are of class 1.
    """

    clusters: tuple[float, ...]
    prevalence: float

    @property
    def n_positive(self) -> float:
        """Clusters that hold class 1."""
        return self.clusters[1]

    @property
    def n_negative(self) -> float:
        """Clusters that hold class 0."""
        return self.clusters[0]

    def thinned(self, design_effect: float) -> Held:
        """Take as many clusters for one as the design effect says."""
        return Held(tuple(n / design_effect for n in self.clusters), self.prevalence)


def held(label: NDArray[np.integer], cluster: NDArray[np.intp], probability: NDArray[np.floating]) -> Held | None:
    """Count the clusters that hold each class; None where perfect figures have no bound.

    A run that gives every patch the same probabilities calls all patches one class, on any slides: its sensitivity of 1
    and its specificity of 0, and so its balanced accuracy of a half, are no finding that other slides could change.

    Args:
        label: (n,) of the class.
        cluster: (n,) number of the slide, or of the patch.
        probability: (..., n, c) of the classes.
    """
    if len(label) and not np.ptp(probability, axis=-2).any():
        return None
    clusters = tuple(len(np.unique(cluster[label == k])) for k in range(probability.shape[-1]))
    return Held(clusters, float((label == 1).mean()))


def edge_ends(name: str, values: Mapping[str, float], classes: Held, level: float) -> tuple[float, float] | None:
    """Compute the ends of the interval of a figure that no resample changes.

    Figures of both classes have half the error for each class: balanced accuracy, F1 and MCC at the corners of the box
    that holds sensitivity and specificity; AUROC is at least their product at a threshold that parts the classes, and
    average precision what is left when the false positives that the box allows come first.

    Args:
        name: of `probe.metrics.figure_names`. Of more than two classes, only recalls have such an interval.
        values: every figure as it is.
        classes: how many clusters hold each class.
        level: coverage asked.

    Returns:
        The ends; None for a figure that is not at its edge, such as the AUROC of one and the same score.
    """
    error = 1 - level
    if name.startswith("recall "):
        return _side(values[name], classes.clusters[int(name.split()[1])], error)
    if len(classes.clusters) > 2:
        return None
    if name == "sensitivity":
        return _side(values[name], classes.n_positive, error)
    if name == "specificity":
        return _side(values[name], classes.n_negative, error)
    if name in _FROM_CONFUSION:
        sensitivity = _side(values["sensitivity"], classes.n_positive, error / 2)
        specificity = _side(values["specificity"], classes.n_negative, error / 2)
        if sensitivity is None or (specificity is None and not (name == "f1" and values[name] == 0)):
            return None
        corners = zip(sensitivity, specificity or (0.0, 1.0), strict=True)
        low, high = (_at(name, *corner, classes.prevalence) for corner in corners)
        return low, high
    if name in ("auroc", "average_precision") and values[name] in (0, 1) and classes.n_positive and classes.n_negative:
        least = [(error / 4) ** (1 / n) for n in (classes.n_positive, classes.n_negative)]
        if name == "auroc":
            area = least[0] * least[1]
            return (area, 1.0) if values[name] == 1 else (0.0, 1 - area)
        first = (1 - classes.prevalence) / classes.prevalence * (1 - least[1])  # false positives for every positive
        return (least[0] - first * math.log1p(least[0] / first) if first else least[0]), 1.0
    return None


def _side(value: float, n: float, error: float) -> tuple[float, float] | None:
    """Bound a rate that is 1 or 0 in all of n."""
    if value not in (0, 1):
        return None
    least = (error / 2) ** (1 / n)
    return (least, 1.0) if value == 1 else (0.0, 1 - least)


def _at(name: str, sensitivity: float, specificity: float, prevalence: float) -> float:
    figures = confusion_figures(
        np.float64(prevalence),
        np.float64(1 - prevalence),
        tp=prevalence * sensitivity,
        tn=(1 - prevalence) * specificity,
    )
    return float(figures[name])
