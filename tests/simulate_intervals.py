"""Do intervals cover and do tests keep their level on slides as unequal as real ones?

    python tests/simulate_intervals.py [--sets N] [--replicates N] [--only PART ...]

Test sets are drawn whose truth is known: slides with replacement from AMi-Br's test split, each with its own numbers of
normal and atypical figures; a logit with a shift per slide (standard deviation .7, and .4 on the atypical ones only)
and noise of 1 per figure, class means 1.3 apart. Two runs share half of the variance of slides and noise; of the other
half, trainings of one run share one part. The truth is that of 60,000 slides. Printed are, in per cent of the sets,
how often the truth lies within the interval, below it and above it, and how often a test calls what is not so.

Exits 1 if a coverage lies outside of 93.5 to 97 %, an error above 5 %, or the power at the detectable difference
outside of 75 to 85 %, each by more than two Monte Carlo standard errors. What need only cover may cover more.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtri

from probe.edge import held
from probe.ensembles import Ensemble
from probe.metrics import COMPARED, NAMES, probabilities, scores
from probe.rates import by_slide
from probe.resample import Clusters, Resampled, Resampling, intervals, make_clusters, resample
from probe.significance import Difference, difference
from probe.tally import tally

# Normal and atypical figures of every slide of AMi-Br's test split.
SLIDES = """0+1 0+1 1+0 1+0 1+0 1+0 1+0 1+1 1+1 1+2 1+2 1+3 2+0 2+1 2+1 2+1 2+2 3+0 3+0 3+0 3+0 3+1 3+3 3+4 4+0 4+1 4+1
4+2 4+2 6+5 7+1 7+2 7+2 8+0 10+1 10+3 11+0 11+1 11+3 12+1 13+17 14+0 14+5 14+6 15+8 18+4 18+4 19+3 22+3 24+16 27+9
38+11 50+15 51+6 54+7 90+21"""
SHAPE = np.array([one.split("+") for one in SLIDES.split()], dtype=int)  # (56, 2)
# 746 figures of 179 patients, as AtNorM-Br's: 4.2 of each on average, one in six atypical.
PATIENTS = np.array([[1, 0]] * 5 + [[2, 0]] * 4 + [[2, 1]] * 4 + [[4, 1], [5, 1], [7, 1], [8, 2], [12, 3], [17, 2]])
N_PATIENTS = 179
MANY = 60_000  # slides
ERROR = 0.05


@dataclass(frozen=True)
class World:
    """How runs score figures.

    Attributes:
        shape: (s, 2) numbers of normal and atypical figures that a slide may have.
        apart: distance between the class means.
        slide, atypical: standard deviation of a slide's shift, and of the one of its atypical figures.
        shared: share of all variance that runs have in common.
        own: share of it that each training of a run has for itself.
        training: standard deviation of the distance between the class means from training to training.
    """

    shape: NDArray[np.int_] = field(default_factory=lambda: SHAPE)
    apart: float = 1.3
    slide: float = 0.7
    atypical: float = 0.4
    shared: float = 0.5
    own: float = 0.0
    training: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """A test set: labels and slides (n,), logits (runs, trainings, n)."""

    label: NDArray[np.bool_]
    slide: NDArray[np.intp]
    logit: NDArray[np.float64]


def draw(
    world: World,
    rng: np.random.Generator,
    n_slides: int,
    *,
    gains: tuple[float, ...] = (0.0,),
    shifts: NDArray[np.float64] | None = None,
    trainings: int = 1,
) -> Drawn:
    """Draw a set, and runs whose class means are farther apart by `gains`.

    Args:
        world: how runs score.
        rng: of everything drawn.
        n_slides: how many slides.
        gains: one for every run.
        shifts: (trainings,) to use in place of random ones.
        trainings: of every run.
    """
    of_slide = world.shape[rng.integers(0, len(world.shape), n_slides)]
    return score(world, rng, of_slide, gains=gains, shifts=shifts, trainings=trainings)


def score(
    world: World,
    rng: np.random.Generator,
    of_slide: NDArray[np.int_],
    *,
    gains: tuple[float, ...] = (0.0,),
    shifts: NDArray[np.float64] | None = None,
    trainings: int = 1,
) -> Drawn:
    """Let runs score a set of slides, of which (n_slides, 2) numbers of normal and atypical figures are given."""
    n_slides = len(of_slide)
    slide = np.repeat(np.arange(n_slides), of_slide.sum(axis=1))
    first = np.cumsum(of_slide.sum(axis=1)) - of_slide[:, 1]
    label = np.arange(len(slide)) >= first[slide]
    shared, run, own = np.sqrt([world.shared, 1 - world.shared - world.own, world.own])

    def noise(n: int) -> NDArray[np.float64]:
        found = shared * rng.standard_normal(n) + run * rng.standard_normal((len(gains), 1, n))
        return found + own * rng.standard_normal((len(gains), trainings, n)) if own else found

    logit = world.slide * noise(n_slides)[..., slide] + noise(len(slide))
    logit = logit + world.atypical * noise(n_slides)[..., slide] * label
    shift = world.training * rng.standard_normal((len(gains), trainings)) if shifts is None else shifts[None]
    return Drawn(label, slide, logit + (world.apart + np.array(gains)[:, None] + shift)[..., None] * label)


def threshold(world: World) -> float:
    """Place the threshold halfway between the class means."""
    return float(expit(world.apart / 2))


def truth(world: World, gain: float = 0.0, *, n_slides: int = MANY, seed: int = 1) -> dict[str, float]:
    """Compute the figures of one run on very many slides; of several trainings their mean."""
    shifts = world.training * ndtri((np.arange(9) + 0.5) / 9) if world.training else np.zeros(1)
    each = []
    for shift in shifts:  # the same slides for each
        drawn = draw(world, np.random.default_rng(seed), n_slides, gains=(gain,), shifts=np.array([shift]))
        each.append(scores(drawn.label, expit(drawn.logit[0, 0]), threshold=threshold(world)))
    return {name: float(np.mean([one[name] for one in each])) for name in NAMES}


def judged(drawn: Drawn, cut: float, clusters: Clusters, resampling: Resampling, names: tuple[str, ...]) -> Resampled:
    """Resample the runs on a set."""
    runs = [
        [
            tally(drawn.label, expit(one), cluster=clusters.index, n_clusters=clusters.n, threshold=cut, names=names)
            for one in run
        ]
        for run in drawn.logit
    ]
    return resample(runs, clusters, resampling)


class Table:
    """Counts what happened in every set, prints it, and remembers what is not as asked."""

    def __init__(self) -> None:
        self.failed = False

    def title(self, text: str) -> None:
        """Begin a part."""
        print(f"\n{text}", flush=True)

    def covers(self, name: str, ends: list[tuple[float, float]], true: float, *, at_most: float = 0.97) -> None:
        """Print how often intervals cover; sets without one are left out and counted."""
        low, high = np.array(ends).T
        there = np.isfinite(low)
        n = int(there.sum())
        below, above = (low[there] > true).mean(), (high[there] < true).mean()
        covered = 1 - below - above
        error = math.sqrt(max(covered * (1 - covered), 0.95 * 0.05) / n)
        self._line(
            name,
            f"{100 * covered:5.1f} cover, truth below {100 * below:4.1f}, above {100 * above:4.1f}, "
            f"width {(high - low)[there].mean():.3f}" + (f", none in {len(ends) - n}" if n < len(ends) else ""),
            0.935 - 2 * error <= covered <= at_most + 2 * error,
        )

    def errs(self, name: str, called: list[bool], *, most: float = ERROR, least: float = 0.0) -> None:
        """Print how often something is called."""
        share = float(np.mean(called))
        error = math.sqrt(share * (1 - share) / len(called))
        self._line(name, f"{100 * share:5.1f} called", least - 2 * error <= share <= most + 2 * error)

    def _line(self, name: str, text: str, good: bool) -> None:
        self.failed |= not good
        print(f"  {name:34s} {text}{'' if good else '   <- not as asked'}", flush=True)


def sets(world: World, n: int, n_slides: int, seed: int, **options: object) -> Iterator[Drawn]:
    """Draw n sets, each with a generator of its own."""
    for k in range(n):
        yield draw(world, np.random.default_rng([seed, n_slides, k]), n_slides, **options)  # type: ignore[arg-type]


def by_slide_of(drawn: Drawn) -> Clusters:
    """Take every slide for one cluster."""
    return make_clusters(drawn.slide.astype(str))


# ------------------------------------------------------------------------------------------------------------- parts


def figures(table: Table, n: int, resampling: Resampling) -> None:
    """Fixed trainings: every figure, and differences of two equal runs."""
    world = World()
    true = truth(world)
    for n_slides in (8, 20, 56):
        table.title(f"fixed trainings, {n_slides} slides")
        ends: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
        for drawn in sets(world, n, n_slides, 1):
            clusters = by_slide_of(drawn)
            found = intervals(
                judged(drawn, threshold(world), clusters, resampling, NAMES),
                0,
                classes=held(drawn.label.astype(int), clusters.index, probabilities(drawn.logit[0][..., None])),
            )
            for name in NAMES:
                ends[name].append((found[name].low, found[name].high))
        for name in NAMES:
            table.covers(name, ends[name], true[name], at_most=0.98 if n_slides == 8 or name == "ece" else 0.97)


def tests(table: Table, n: int, resampling: Resampling) -> None:
    """Two runs: equal, apart by the margin, apart by the detectable difference; with fixed trainings and with three."""
    for trainings in (1, 3):
        world = World(own=0.25, training=0.15) if trainings > 1 else World()
        for n_slides in (8, 20, 56) if trainings == 1 else (20, 56):
            several = "three trainings each" if trainings > 1 else "fixed trainings"
            table.title(f"two equal runs, {several}, {n_slides} slides")
            found = differences(world, n, n_slides, (0.0, 0.0), trainings, resampling)
            for name in COMPARED:
                ends = [(one.low, one.high) for one in found[name]]
                table.covers(f"difference in {name}", ends, 0.0, at_most=0.98 if n_slides == 8 else 0.97)
                table.errs(f"called different in {name}", [one.p < ERROR for one in found[name]])
            if n_slides == 8:
                continue
            table.title(f"apart by the margin, by the detectable difference, {several}, {n_slides} slides")
            for name in COMPARED:
                size = float(np.median([one.detectable for one in found[name]]))
                gain = gain_for(world, name, size)
                apart = differences(world, n, n_slides, (0.0, gain), trainings, resampling, margin=size, names=(name,))
                table.errs(f"called equivalent in {name}", [one.p_equivalent < ERROR for one in apart[name]])
                table.errs(f"called not worse in {name}", [one.p_not_worse < ERROR for one in apart[name]])
                table.errs(f"{size:.3f} in {name} found", [one.p < ERROR for one in apart[name]], least=0.75, most=0.85)
            if trainings > 1:
                coverage_with_trainings(table, world, n, n_slides, trainings, resampling)


def differences(
    world: World,
    n: int,
    n_slides: int,
    gains: tuple[float, float],
    trainings: int,
    resampling: Resampling,
    *,
    margin: float | None = None,
    names: tuple[str, ...] = COMPARED,
) -> dict[str, list[Difference]]:
    """Compare two runs on n sets."""
    found: dict[str, list[Difference]] = {name: [] for name in names}
    for drawn in sets(world, n, n_slides, 2, gains=gains, trainings=trainings):
        resampled = judged(drawn, threshold(world), by_slide_of(drawn), resampling, names)
        for name in names:
            found[name].append(difference(resampled, name, 0, 1, margin=margin))
    return found


def gain_for(world: World, name: str, size: float) -> float:
    """Find by how much the class means must be farther apart for a figure that is better by `size`."""
    n_slides = MANY // 4
    start, gain, step = truth(world, n_slides=n_slides)[name], 0.0, size / 0.15
    for _ in range(4):  # nearly a straight line
        gain += step
        reached = truth(world, gain, n_slides=n_slides)[name] - start
        step = gain * (size / reached - 1)
    return gain + step


def coverage_with_trainings(
    table: Table, world: World, n: int, n_slides: int, trainings: int, resampling: Resampling
) -> None:
    """Figures of three trainings: the truth is the mean over all trainings."""
    table.title(f"three trainings, {n_slides} slides")
    true = truth(world, n_slides=MANY // 2)
    ends: dict[str, list[tuple[float, float]]] = {name: [] for name in COMPARED}
    for drawn in sets(world, n, n_slides, 3, trainings=trainings):
        found = intervals(judged(drawn, threshold(world), by_slide_of(drawn), resampling, COMPARED), 0)
        for name in COMPARED:
            ends[name].append((found[name].low, found[name].high))
    for name in COMPARED:
        table.covers(name, ends[name], true[name])


def unknown_slides(table: Table, n: int, resampling: Resampling) -> None:
    """Patches of unknown patients, as AtNorM-Br's, drawn one by one: as they are, and at the largest design effect."""
    world = World(shape=PATIENTS)
    names = ("balanced_accuracy", "auroc", "specificity", "sensitivity")
    table.title(f"{N_PATIENTS} patients that nobody knows, drawn by patch")
    true = truth(world)
    plain: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    wide: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    values: dict[str, list[float]] = {name: [] for name in names}
    errors: dict[str, list[float]] = {name: [] for name in names}
    called: dict[str, list[tuple[bool, bool]]] = {name: [] for name in COMPARED}
    for drawn in sets(world, n, N_PATIENTS, 4, gains=(0.0, 0.0)):
        clusters = make_clusters(np.full(len(drawn.label), ""))
        resampled = judged(drawn, threshold(world), clusters, resampling, names)
        found = intervals(resampled, 0)
        for name in names:
            figure = found[name]
            plain[name].append((figure.low, figure.high))
            wide[name].append(figure.wide or (math.nan, math.nan))
            values[name].append(figure.value)
            errors[name].append(resampled.of(name, 0).standard_error)
        for name in COMPARED:
            one = difference(resampled, name, 0, 1)
            called[name].append((one.p < ERROR, one.p_wide < ERROR))
    for name in names:
        effect = np.var(values[name]) / np.mean(np.square(errors[name]))
        covered = np.mean([low <= true[name] <= high for low, high in plain[name]])
        print(f"  {name:34s} {100 * covered:5.1f} cover by patch; the design effect is {effect:.2f}")
        table.covers(f"{name} at a design effect of 2", wide[name], true[name], at_most=1.0)
    for name in COMPARED:
        print(f"  called different in {name:21s} {100 * np.mean([a for a, _ in called[name]]):5.1f} by patch")
        table.errs(f"the same at a design effect of 2, {name}", [b for _, b in called[name]])


def near_the_edge(table: Table, n: int, resampling: Resampling) -> None:
    """Runs that hardly err: the interval need only cover."""
    for apart in (4.5, 6.0):
        world = World(apart=apart)
        true = truth(world)
        table.title(f"class means {apart} apart, 56 slides (may cover more)")
        names = ("sensitivity", "specificity", "balanced_accuracy", "auroc", "average_precision", "f1", "mcc")
        ends: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        exact: dict[str, list[bool]] = {name: [] for name in names}
        for drawn in sets(world, n, 56, 5):
            clusters = by_slide_of(drawn)
            found = intervals(
                judged(drawn, threshold(world), clusters, resampling, names),
                0,
                classes=held(drawn.label.astype(int), clusters.index, probabilities(drawn.logit[0][..., None])),
            )
            for name in names:
                ends[name].append((found[name].low, found[name].high))
                exact[name].append(found[name].exact)
        for name in names:
            label = f"{name} {true[name]:.3f}, {100 * np.mean(exact[name]):.0f} % exact"
            table.covers(label, ends[name], true[name], at_most=1.0)


def rates(table: Table, n: int, resampling: Resampling) -> None:
    """The rate of atypical figures of a slide, corrected by the run's errors out of fold on other slides."""
    sizes = SHAPE.sum(axis=1)
    sizes = sizes[sizes >= 10]
    for n_slides in (20, 56):
        ends: list[tuple[float, float]] = []
        for k in range(max(20, n // 20)):
            rng = np.random.default_rng([6, n_slides, k])
            rate = rng.beta(1.5, 4, n_slides)
            n_figures = sizes[rng.integers(0, len(sizes), n_slides)]
            n_atypical = rng.binomial(n_figures, rate)
            tested = score(World(), rng, np.stack([n_figures - n_atypical, n_atypical], axis=1))
            out_of_fold = _ensemble(draw(World(), rng, 117), "validation")
            view = by_slide(
                _ensemble(tested, "test"),
                np.full(len(tested.label), ""),
                out_of_fold=out_of_fold,
                resampling=resampling,
            )
            of_slide = {str(slide): value for slide, value in enumerate(rate)}
            ends += [(one.low - of_slide[one.slide], one.high - of_slide[one.slide]) for one in view.slides]
        table.title(f"rate of a slide, {n_slides} slides, errors known from 117 others (may cover more)")
        table.covers("corrected rate, less the truth", ends, 0.0, at_most=1.0)


def _ensemble(drawn: Drawn, split: str) -> Ensemble:
    n, cut = len(drawn.label), threshold(World())
    return Ensemble(
        dataset="drawn",
        split=split,
        id=np.arange(n).astype(str),
        label=drawn.label.astype(np.int8),
        group=drawn.slide.astype(str),
        digest=np.full(n, ""),
        by_training=probabilities(drawn.logit[0][..., None]),
        thresholds=np.array([cut]),
        threshold=cut,
        prior=0.25,
    )


PARTS: dict[str, Callable[[Table, int, Resampling], None]] = {
    "figures": figures,
    "tests": tests,
    "unknown": unknown_slides,
    "edge": near_the_edge,
    "rates": rates,
}


def main() -> int:
    """Run the parts asked for; 1 if something is not as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=1000, help="test sets for every line")
    parser.add_argument("--replicates", type=int, default=400, help="resamples of every set")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    options = parser.parse_args()
    table = Table()
    for name in options.only:
        PARTS[name](table, options.sets, Resampling(replicates=options.replicates))
    return int(table.failed)


if __name__ == "__main__":
    sys.exit(main())
