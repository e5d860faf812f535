"""How good is a run in every domain (tumour type, scanner, centre), and in the worst?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from probe.edge import held
from probe.ensembles import Ensemble
from probe.metrics import SMALLER_IS_BETTER, Interval, Judgement
from probe.resample import Resampled, Resampling, Scatter, interval, intervals, resample


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
    alone = [resample([part.tallies(part.clusters)], part.clusters, resampling) for part in parts]
    clusters = ensemble.select(known).clusters
    if sum(one.n_clusters for one in alone) == clusters.n:
        resampled = _together(alone, resampling)
    else:  # a slide lies in two domains, and is drawn in both of them together
        of_domains = [replace(clusters, index=clusters.index[domain[known] == name]) for name in names]
        tallies = [part.tallies(own) for part, own in zip(parts, of_domains, strict=True)]
        resampled = resample(tallies, clusters, resampling)
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
        domains={name: _judgement(part, one, resampling) for name, part, one in zip(names, parts, alone, strict=True)},
        n_without=int((~known).sum()),
        macro=macro,
        n_domains=n_domains,
        worst=worst,
    )


def _together(alone: Sequence[Resampled], resampling: Resampling) -> Resampled:
    """Set domains side by side that were resampled each on its own and share no slide.

    All were drawn from the same seed, so each one's resamples are put into an order of its own. A slide that is left
    out changes its own domain alone.
    """
    rng = np.random.default_rng(resampling.seed)
    orders = [rng.permutation(resampling.replicates) for _ in alone]
    first = alone[0]
    starts = np.cumsum([0, *(one.n_clusters for one in alone)])

    def without(name: str) -> NDArray[np.float64]:
        if not all(one.without[name].shape[1] for one in alone):  # very many clusters
            return np.empty((len(alone), 0))
        values = np.repeat([one.value[name] for one in alone], starts[-1], axis=1)
        for k, one in enumerate(alone):
            values[k, starts[k] : starts[k + 1]] = one.without[name][0]
        return values

    return Resampled(
        value={name: np.concatenate([one.value[name] for one in alone]) for name in first.value},
        drawn={
            name: np.stack([one.drawn[name][0][order] for one, order in zip(alone, orders, strict=True)])
            for name in first.value
        },
        without={name: without(name) for name in first.value},
        trainings={name: tuple(one.trainings[name][0] for one in alone) for name in first.value},
        n_clusters=int(starts[-1]),
        level=first.level,
        design_effect=min(one.design_effect for one in alone),
    )


def _judgement(part: Ensemble, resampled: Resampled, resampling: Resampling) -> Judgement:
    """Give the figures of one domain, as `probe.evidence.judge` does."""
    clusters = part.clusters
    return Judgement(
        counts=part.counts,
        unit=clusters.unit,
        n_clusters=clusters.n_units,
        n_alone=clusters.n_alone,
        threshold=part.threshold,
        level=resampling.level,
        replicates=resampling.replicates,
        figures=intervals(resampled, 0, classes=held(part.label, clusters.index, part.by_training)),
        trainings=len(part.by_training),
        design_effect=resampled.design_effect,
    )


def _worst(name: str, domains: list[str], value: NDArray[np.float64], drawn: NDArray[np.float64]) -> Worst:
    sign = -1 if name in SMALLER_IS_BETTER else 1
    worst = int(np.argmin(sign * value))
    defined = drawn[:, np.isfinite(drawn).all(axis=0)]
    share = float((np.argmin(sign * defined, axis=0) == worst).mean()) if defined.size else math.nan
    return Worst(domains[worst], float(value[worst]), share)
