"""How good is a run in every domain (tumour type, scanner, centre), and in the worst?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from probe.ensembles import Ensemble
from probe.evidence import judge
from probe.metrics import SMALLER_IS_BETTER, Interval, Judgement
from probe.resample import Resampling, Scatter, Statistic, interval, resample


@dataclass(frozen=True)
class Worst:
    """The domain with the worst score.

    Attributes:
        domain: its name.
        value: its score.
        share: share of resamples in which it is the worst.
    """

    domain: str
    value: float
    share: float


@dataclass(frozen=True)
class DomainView:
    """Scores by domain: every domain counts the same, however many patches it has.

    Attributes:
        domains: domain to its figures, resampled within it.
        n_without: patches without a domain; they are in no figure here.
        macro: figure to the mean over the domains in which it exists; resampled over all of them.
        n_domains: figure to the number of those domains.
        worst: figure to the worst of those domains; None where there is none.
    """

    domains: dict[str, Judgement]
    n_without: int
    macro: dict[str, Interval]
    n_domains: dict[str, int]
    worst: dict[str, Worst | None]


def by_domain(ensemble: Ensemble, domain: NDArray[np.str_], *, resampling: Resampling = Resampling()) -> DomainView:
    """Judge a run in every domain, over their mean, and in the worst domain.

    Args:
        ensemble: the run on the set.
        domain: (n,) str, aligned with the set (see `probe.ensembles.rows_of`); empty where unknown.
        resampling: how resamples are drawn.

    Raises:
        ValueError: if domain is not (n,).
        UserError: if no patch has a domain.
    """
    domain = np.asarray(domain)
    if domain.shape != (len(ensemble),):
        raise ValueError(f"domain must be ({len(ensemble)},), got shape {domain.shape}")
    known = domain != ""
    if not known.any():
        raise UserError(f"{ensemble.dataset} has no domains (tumour type, scanner, centre). It has no domain view.")
    names = np.unique(domain[known]).tolist()
    parts = [ensemble.select(domain == name) for name in names]
    # For the mean, slides are drawn from the whole set: a slide may lie in two domains.
    clusters = ensemble.select(known).clusters
    statistics = []
    for name, part in zip(names, parts, strict=True):
        members, index = np.unique(clusters.index[domain[known] == name], return_inverse=True)
        own = replace(clusters, index=index, n=len(members))
        statistics.append([_Within(members, tallied) for tallied in part.tallies(own)])
    resampled = resample(statistics, clusters, resampling)
    macro: dict[str, Interval] = {}
    n_domains: dict[str, int] = {}
    worst: dict[str, Worst | None] = {}
    for name, value in resampled.value.items():
        rows = np.flatnonzero(np.isfinite(value))
        n_domains[name] = len(rows)
        if not len(rows):
            macro[name], worst[name] = Interval(math.nan, math.nan, math.nan, resampling.replicates), None
            continue

        def mean(values: NDArray[np.float64], rows: NDArray[np.intp] = rows) -> NDArray[np.float64]:
            return np.asarray(values[rows].mean(axis=0))

        trainings = mean(np.stack(resampled.trainings[name]))  # (K,) the mean over domains, of each training
        spread = resampled.spread(name, mean, training=Scatter.of(trainings))
        macro[name] = interval(name, spread, resampling.level)
        worst[name] = _worst(name, [names[row] for row in rows], value[rows], resampled.drawn[name][rows])
    return DomainView(
        domains={name: judge(part, resampling=resampling) for name, part in zip(names, parts, strict=True)},
        n_without=int((~known).sum()),
        macro=macro,
        n_domains=n_domains,
        worst=worst,
    )


@dataclass(frozen=True, eq=False)
class _Within:
    """A statistic that looks at some of the clusters alone, and so has less to add up."""

    members: NDArray[np.intp]
    statistic: Statistic

    def __call__(self, count: NDArray[np.float64], /) -> Mapping[str, NDArray[np.float64]]:
        return self.statistic(count[:, self.members])


def _worst(name: str, domains: list[str], value: NDArray[np.float64], drawn: NDArray[np.float64]) -> Worst:
    sign = -1 if name in SMALLER_IS_BETTER else 1
    worst = int(np.argmin(sign * value))
    defined = drawn[:, np.isfinite(drawn).all(axis=0)]
    share = float((np.argmin(sign * defined, axis=0) == worst).mean()) if defined.size else math.nan
    return Worst(domains[worst], float(value[worst]), share)
