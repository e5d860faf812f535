"""How do all runs compare? One comparison per set, computed from run folders alone.

    folders -> read_runs -> collect -> Report -> probe.report.page (HTML), probe.report.tables (Markdown, LaTeX)

All runs on a set are judged on the same patches and the same resamples (`probe.evidence`). Test sets compare all runs;
out of fold, only runs on the same folds are compared.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from html import escape
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from features.console import UserError, progress
from features.labels import Classes
from features.samples import MISSING_VOTE, TEST, Samples, audit
from probe.across import Across, across_sets, adjusted_over
from probe.calibration import Calibration, calibrate
from probe.commands import commands
from probe.domains import DomainView, by_domain
from probe.ensembles import Ensemble, ensemble_of, rows_of
from probe.evidence import Comparison, Question, compare, fold_figures
from probe.leaks import UNSEEN, KnownPatches, known_patches, with_unseen
from probe.metrics import ECE_BINS, FoldFigure, Judgement, calibration_bin, figure_titles
from probe.predictions import VALIDATION
from probe.raters import RaterView, by_agreement
from probe.rates import RateView, by_slide
from probe.report.read import Run
from probe.report.summary import RANKING, difference_of, in_words, listed, three_sentences
from probe.resample import SLIDE, Resampling
from probe.thresholds import ThresholdView, by_threshold

_SPLIT_TITLES = {VALIDATION: "out of fold", TEST: "test", UNSEEN: "test without patches known from training"}
_DIGITS = 8  # of a digest
_ROPE = 0.01  # differences between datasets' means that are of no account, where no margin is named
_POINTS, _LEAST_POINTS = 250, 60  # at most, of a drawn curve: of two classes, and of many


@dataclass(frozen=True)
class ReportOptions:
    """What a reader asks of a report.

    Attributes:
        question: a margin of equivalence, and a difference to be shown.
        prevalences: rates of class 1 at which predictive values are wanted.
        specificity: at which sensitivities are compared.
        holm: p-values are adjusted for all pairs of a "set" and figure, or for "all" pairs, figures and sets together.

    Raises:
        UserError: a value outside its range.
    """

    question: Question = Question()
    prevalences: tuple[float, ...] = ()
    specificity: float = 0.9
    holm: Literal["set", "all"] = "set"

    def __post_init__(self) -> None:
        for value in self.prevalences:
            if not 0 < value < 1:
                raise UserError(f"`prevalence={value:g}`: expected a rate between 0 and 1, such as 0.2.")
        if not 0 < self.specificity < 1:
            raise UserError(f"`specificity={self.specificity:g}`: expected a share between 0 and 1, such as 0.9.")
        if self.holm not in ("set", "all"):
            raise UserError(f"unknown `holm={self.holm!r}`: use set or all.")


Confusion = tuple[tuple[int, ...], ...]  # patches by label (rows) and predicted class


@dataclass(frozen=True)
class Curves:
    """What is drawn of one class against the rest, of one run on one set. A curve that needs an absent class is empty.

    Attributes:
        roc: (false positive rate, true positive rate) from (0, 0) to (1, 1).
        precision_recall: (recall, precision) from the highest threshold to the lowest.
        calibration: (mean probability, observed rate, patches) of every bin of the calibration error that is not empty.
    """

    roc: tuple[tuple[float, float], ...]
    precision_recall: tuple[tuple[float, float], ...]
    calibration: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class SetReport:
    """All runs on one set; every mapping is by run label.

    Attributes:
        dataset, split: which set; split "validation" holds out-of-fold predictions.
        fold_digest: of the assignment that out-of-fold predictions belong to; empty for a test set, and if all runs
            share one.
        classes: their names.
        counts: patches of every class.
        slides: slides that hold each class; 0 where slides are not known.
        n_identical: sets of byte-identical patches.
        comparison: figures with intervals, differences, ranks.
        folds: figure to what the fold models reach.
        confusion: of the ensemble, as it predicts (`Ensemble.predicted`).
        curves: of the ensemble, an entry for each of `drawn_classes`.
        raters: by agreement of the raters; empty without two raters, and with more than two classes.
        domains: by domain; empty without two domains.
        calibration: of predicted probabilities; empty with more than two classes.
        thresholds: how thresholds travel to other domains; empty without two domains, out of fold, and with more than
            two classes.
        rates: the rate of class 1 per slide; empty where slides are not known, out of fold, and with more than two
            classes.
        missing: runs without predictions here.
        held_out_domains: the domains that were held out in turn, of out-of-fold predictions by such models; else none.
    """

    dataset: str
    split: str
    fold_digest: str
    classes: Classes
    counts: tuple[int, ...]
    slides: tuple[int, ...]
    n_identical: int
    comparison: Comparison
    folds: dict[str, dict[str, FoldFigure]]
    confusion: dict[str, Confusion]
    curves: dict[str, tuple[Curves, ...]]
    raters: dict[str, RaterView]
    domains: dict[str, DomainView]
    calibration: dict[str, Calibration]
    thresholds: dict[str, ThresholdView]
    rates: dict[str, RateView]
    missing: tuple[str, ...]
    held_out_domains: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """How many patches there are."""
        return sum(self.counts)

    @property
    def n_positive(self) -> int:
        """Patches of class 1."""
        return self.counts[1]

    @property
    def held(self) -> tuple[int, ...]:
        """The classes that the set holds; means over classes are over these."""
        return tuple(k for k, count in enumerate(self.counts) if count)

    @property
    def drawn_classes(self) -> tuple[int, ...]:
        """The classes that curves are drawn of, each against the rest: of two, class 1."""
        return drawn_classes(len(self.classes))

    @property
    def titles(self) -> dict[str, str]:
        """Figure to its heading."""
        return figure_titles(self.classes)

    @property
    def is_validation(self) -> bool:
        """Whether these are out-of-fold predictions."""
        return self.split == VALIDATION

    @property
    def name(self) -> str:
        """Dataset and split, as in metrics.json."""
        return f"{self.dataset}/{self.split}"

    @property
    def title(self) -> str:
        """Dataset and split, for a reader; of out-of-fold predictions also which folds, if there are several."""
        folds = f" (folds {self.fold_digest[:_DIGITS]})" if self.fold_digest else ""
        return f"{self.dataset}, {_SPLIT_TITLES[self.split]}{folds}"

    @property
    def any_judgement(self) -> Judgement:
        """The judgement of one of the runs; all of them share what was resampled, and how."""
        return next(iter(self.comparison.judgements.values()))


@dataclass(frozen=True)
class Report:
    """Everything that is tabulated or drawn.

    Attributes:
        created: when, in UTC.
        version: of mitofm.
        labels: of the runs, by date.
        train: the dataset that all runs were trained on.
        classes: what the runs tell apart.
        ordinal: whether these are ordered.
        fold_digest, n_folds: of the first run's assignment.
        ids: run to its id, which is the name of its folder.
        fold_digests: run to the digest of its assignment.
        how: resamples were drawn.
        options: what was asked.
        sets: the test sets, that of the training dataset first, then the out-of-fold predictions, by assignment.
        across: the runs over all test sets; None for fewer than two sets or runs.
        summary: at most three sentences.
        notes: what a reader must know: sets that runs lack, identical patches, what was left out.
        ensembles: of each ensemble of runs, the ids of these and their weights.
    """

    created: str
    version: str
    labels: tuple[str, ...]
    train: str
    classes: Classes
    ordinal: bool
    fold_digest: str
    n_folds: int
    ids: dict[str, str]
    fold_digests: dict[str, str]
    how: Resampling
    options: ReportOptions
    sets: tuple[SetReport, ...]
    across: Across | None
    summary: tuple[str, ...]
    notes: tuple[str, ...]
    ensembles: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def margin(self) -> float | None:
        """Differences below it are of no account; None if none was named."""
        return self.options.question.margin

    @property
    def wanted(self) -> float | None:
        """A difference that the reader would like to show; None if none was named."""
        return self.options.question.wanted

    @property
    def prevalences(self) -> tuple[float, ...]:
        """Rates of class 1 at which predictive values are wanted."""
        return self.options.prevalences

    def __repr__(self) -> str:
        sets = ", ".join(set_report.name for set_report in self.sets)
        return f"Report({len(self.labels)} runs trained on {self.train}, {self.n_folds} folds: {sets})"

    def _repr_html_(self) -> str:
        return "".join(f"<h4>{escape(one.title)}</h4>{one.comparison._repr_html_()}" for one in self.sets)


def collect(
    runs: Sequence[Run],
    notes: Sequence[str] = (),
    *,
    resampling: Resampling = Resampling(),
    options: ReportOptions = ReportOptions(),
) -> Report:
    """Compare runs, of `read_runs`, on every set that any of them has; the report's notes begin with those given.

    Raises:
        UserError: if runs disagree on a set's patches, labels or slides.
    """
    from importlib.metadata import version

    from threadpoolctl import threadpool_limits

    first = runs[0].record
    runs, known = _with_unseen(runs)
    ordered = _sets(runs)
    with (
        progress("compare", len(ordered) + sum(map(len, ordered.values())), unit="comparisons") as advance,
        threadpool_limits(1, user_api="blas"),  # the work is shared out already: more threads would wait for each other
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):

        def compared(key: _Key) -> _Compared:
            found = _compare_on(*key, ordered[key], resampling=resampling, options=options)
            advance(1)
            return found

        def judged(one: tuple[_Compared, Run]) -> _Views:
            found = _views(*one, resampling=resampling, options=options)
            advance(1)
            return found

        comparisons = list(pool.map(compared, ordered))
        pairs = [(on, run) for on in comparisons for run in on.scored]
        views = list(pool.map(judged, pairs))
    sets = []
    for on in comparisons:
        of_runs = {run.label: view for (other, run), view in zip(pairs, views, strict=True) if other is on}
        sets.append(_set_report(on, of_runs, missing=[run.label for run in runs if run not in on.scored]))
    whole = {one.title: one.comparison for one in sets if one.split == TEST}
    if options.holm == "all":
        over_all = adjusted_over({one.title: one.comparison for one in sets})
        sets = [replace(one, comparison=over_all[one.title]) for one in sets]
    all_notes = [*notes, *(f"{one.line(first.train)}." for one in known)]
    all_notes += [_say_absent(one) for one in sets if len(one.classes) > 2 and len(one.held) < len(one.classes)]
    for one in sets:
        if one.split == UNSEEN or one.is_validation:
            continue
        if unscored := [run for run in runs if run.label in one.missing and not run.members]:
            all_notes.append(_say_unscored(one, unscored, runs))
        if one.n_identical:
            all_notes.append(_say_identical(one))
    all_notes += [_say_gain(one, run) for run in runs if run.members for one in sets if run.label not in one.missing]
    report = Report(
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=version("mitofm"),
        labels=tuple(run.label for run in runs),
        train=first.train,
        classes=first.label_names,
        ordinal=first.ordinal,
        fold_digest=first.folds.digest,
        n_folds=first.folds.n,
        ids={run.label: run.record.id for run in runs if not run.members},
        fold_digests={run.label: run.record.folds.digest for run in runs},
        how=resampling,
        options=options,
        sets=tuple(sets),
        across=across_sets(whole, rope=options.question.margin or _ROPE),
        summary=(),
        notes=tuple(dict.fromkeys(all_notes)),
        ensembles={
            run.label: {
                part.model: 1 / len(run.members) if part.weight is None else part.weight
                for part in run.record.each_part
            }
            for run in runs
            if run.members
        },
    )
    return replace(report, summary=three_sentences(report))


_Key = tuple[str, str, str]  # dataset, split, and the fold digest of out-of-fold predictions where runs differ in it


def _sets(runs: Sequence[Run]) -> dict[_Key, list[Run]]:
    """List the sets of a report, out-of-fold predictions last, and the runs that were scored on each."""
    differ = len({run.record.folds.digest for run in runs}) > 1
    found: dict[_Key, list[Run]] = defaultdict(list)
    for run in runs:
        for dataset, split in run.predictions.sets():
            found[dataset, split, run.record.folds.digest if differ and split == VALIDATION else ""].append(run)
    datasets = list(dict.fromkeys((runs[0].record.train, *(dataset for dataset, _, _ in found))))
    in_order = sorted(found, key=lambda key: (key[1] == VALIDATION, datasets.index(key[0]), key[1] == UNSEEN))
    return {key: found[key] for key in in_order}


def _say_unscored(one: SetReport, unscored: Sequence[Run], runs: Sequence[Run]) -> str:
    """Say which runs lack a set, and how to make the first of them again with it."""
    record = unscored[0].record
    source = next((of for run in runs if (of := run.record.sources.get(one.dataset))), "")
    cut = next((slides for run in runs if (slides := (run.record.slides or {}).get(one.dataset))), None)
    of_slides = {} if cut is None else {one.dataset: cut}
    with_it = replace(
        record,
        test=(*record.test, one.dataset),
        sources={one.dataset: source, **record.sources},
        slides={**of_slides, **(record.slides or {})} or None,
        options={**record.options, "test": [*record.test, one.dataset]},
    )
    were = "was" if len(unscored) == 1 else "were"
    again = "run it again" if len(unscored) == 1 else f"run them again, {unscored[0].label}"
    lines = [line for line in commands(with_it) if not line.startswith("#")]
    return (
        f"{listed([run.label for run in unscored])} {were} not scored on {one.dataset}: {again} by {' && '.join(lines)}"
    )


def _say_identical(one: SetReport) -> str:
    drawn = "with their slides" if one.any_judgement.unit == SLIDE else "together"
    return f"{one.title} holds {one.n_identical} sets of byte-identical patches; in resamples they are drawn {drawn}."


def _say_absent(one: SetReport) -> str:
    absent = [one.classes[k] for k, count in enumerate(one.counts) if not count]
    n = len(one.held)
    over = f"are over the {n} classes that it holds" if n > 1 else "do not exist there"
    return f"{one.title} has no patch of {listed(absent)}: means over classes {over}."


def _say_gain(one: SetReport, ensemble: Run) -> str:
    """Say what an ensemble of runs gains over its best member on a set."""
    best = ensemble.members[0].label
    found = difference_of(one, ensemble.label, best, RANKING)
    assert found is not None  # an ensemble is judged where all its members are
    optimistic = ", which is optimistic: choices were made there" if one.is_validation and ensemble.chose else ""
    ends = "no interval" if math.isnan(found.low) else f"{found.low:+.3f} to {found.high:+.3f}"
    return (
        f"{one.title}: {ensemble.label} gains {found.value:+.3f} ({ends}) in {in_words(one)} over {best}, its best "
        f"member out of fold{optimistic}."
    )


def _with_unseen(runs: Sequence[Run]) -> tuple[list[Run], list[KnownPatches]]:
    """Add the test patches that none of the runs knows from training, as sets that all runs share."""
    train = runs[0].record.train
    tables: dict[str, Samples] = {}
    similar: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for name, table in run.tables.items():
            tables[name] = fullest([table, tables.get(name, table)])
        for name, ids in (run.record.similar or {}).items():
            similar[name].update(ids)
    known = list(known_patches(train, tables, similar).values())
    return [replace(run, predictions=with_unseen(run.predictions, known)) for run in runs], known


@dataclass(frozen=True, eq=False)
class _Compared:
    """The runs that were scored on a set, compared."""

    dataset: str
    split: str
    fold_digest: str
    scored: Sequence[Run]
    ensembles: dict[str, Ensemble]
    tables: dict[str, Samples]  # the patch table in each run's order of patches
    folds: dict[str, dict[str, FoldFigure]]
    comparison: Comparison


@dataclass(frozen=True, eq=False)
class _Views:
    """What is said of one run on one set; None where its table does not tell what that needs."""

    confusion: Confusion
    curves: tuple[Curves, ...]
    calibration: Calibration | None
    raters: RaterView | None
    domains: DomainView | None
    thresholds: ThresholdView | None
    rates: RateView | None


def _compare_on(
    dataset: str,
    split: str,
    fold_digest: str,
    scored: Sequence[Run],
    *,
    resampling: Resampling,
    options: ReportOptions,
) -> _Compared:
    table = fullest([run.tables[dataset] for run in scored])
    ensembles = {run.label: _ensemble(run, dataset, split, table) for run in scored}
    folds = {run.label: fold_figures(run.predictions, dataset, split, ordinal=run.record.ordinal) for run in scored}
    comparison = compare(  # refuses runs of different patches
        ensembles,
        resampling=resampling,
        question=options.question,
        folds=folds,
        chose={run.label: run.chose for run in scored} if split == VALIDATION else None,
        exact=[run.label for run in scored if not run.is_random],
    )
    if _held_out_domains(split, scored):  # no random splits, which the test over folds is for
        comparison = replace(comparison, pairs=tuple(replace(pair, resampled_t={}) for pair in comparison.pairs))
    tables = {label: table.select(rows_of(ensemble, table.id)) for label, ensemble in ensembles.items()}
    return _Compared(dataset, split, fold_digest, scored, ensembles, tables, folds, comparison)


def _views(on: _Compared, run: Run, *, resampling: Resampling, options: ReportOptions) -> _Views:
    ensemble, table = on.ensembles[run.label], on.tables[run.label]
    is_test = on.split != VALIDATION
    of_two = ensemble.n_classes == 2
    has_raters = ((table.votes != MISSING_VOTE).sum(axis=1) >= 2).any()
    has_domains = len(set(table.domain.tolist()) - {""}) >= 2
    thresholds = rates = None
    if of_two and has_domains and is_test:
        thresholds = by_threshold(ensemble, table.domain, specificity=options.specificity, resampling=resampling)
    if of_two and (table.group != "").any() and is_test and (run.record.train, VALIDATION) in run.predictions.sets():
        out_of_fold = _at_own_threshold(_ensemble(run, run.record.train, VALIDATION, None), ensemble)
        rates = by_slide(ensemble, table.domain, out_of_fold=out_of_fold, resampling=resampling)
    return _Views(
        confusion=_confusion(ensemble),
        curves=tuple(_curves(ensemble, k) for k in drawn_classes(ensemble.n_classes)),
        calibration=calibrate(ensemble, prevalences=options.prevalences, resampling=resampling) if of_two else None,
        raters=by_agreement(ensemble, table.votes, resampling=resampling) if of_two and has_raters else None,
        domains=by_domain(ensemble, table.domain, resampling=resampling) if has_domains else None,
        thresholds=thresholds,
        rates=rates,
    )


def _set_report(on: _Compared, views: dict[str, _Views], *, missing: Sequence[str]) -> SetReport:
    samples = next(iter(on.tables.values()))
    counts = next(iter(on.ensembles.values())).counts
    return SetReport(
        dataset=on.dataset,
        split=on.split,
        fold_digest=on.fold_digest,
        classes=on.scored[0].record.label_names,
        counts=counts,
        slides=tuple(len(set(samples.group[samples.label == k].tolist()) - {""}) for k in range(len(counts))),
        n_identical=len(audit(samples).duplicates),
        comparison=on.comparison,
        folds=on.folds,
        confusion={label: view.confusion for label, view in views.items()},
        curves={label: view.curves for label, view in views.items()},
        raters={label: view.raters for label, view in views.items() if view.raters},
        domains={label: view.domains for label, view in views.items() if view.domains},
        calibration={label: view.calibration for label, view in views.items() if view.calibration},
        thresholds={label: view.thresholds for label, view in views.items() if view.thresholds},
        rates={label: view.rates for label, view in views.items() if view.rates},
        missing=tuple(missing),
        held_out_domains=_held_out_domains(on.split, on.scored),
    )


def _held_out_domains(split: str, runs: Sequence[Run]) -> tuple[str, ...]:
    """List the domains that folds are, on the out-of-fold predictions of runs that share their folds."""
    return (runs[0].record.folds.names or ()) if split == VALIDATION else ()


def _at_own_threshold(out_of_fold: Ensemble, test: Ensemble) -> Ensemble:
    """Judge out-of-fold predictions at the thresholds that were chosen on them, as test sets are."""
    return replace(out_of_fold, thresholds=test.thresholds, threshold=test.threshold)


def fullest(tables: Sequence[Samples]) -> Samples:
    """Choose the patch table that knows most; those of runs without a samples.csv know least."""
    return max(tables, key=lambda table: (table.votes.shape[1], (table.domain != "").sum(), (table.sha256 != "").sum()))


def _ensemble(run: Run, dataset: str, split: str, samples: Samples | None) -> Ensemble:
    try:
        return ensemble_of(run.predictions, dataset, split, samples=samples, ordinal=run.record.ordinal)
    except UserError as error:
        raise UserError(f"{run.folder}: {error}") from error


def _confusion(ensemble: Ensemble) -> Confusion:
    c = ensemble.n_classes
    cell = ensemble.label.astype(np.intp) * c + ensemble.predicted
    return tuple(map(tuple, np.bincount(cell, minlength=c * c).reshape(c, c).tolist()))


def drawn_classes(n_classes: int) -> tuple[int, ...]:
    """List the classes that say all against the rest: of two, class 1 alone."""
    return (1,) if n_classes == 2 else tuple(range(n_classes))


def _curves(ensemble: Ensemble, k: int) -> Curves:
    from sklearn.metrics import precision_recall_curve, roc_curve

    y, p = ensemble.label == k, ensemble.probability[:, k]
    points = max(_LEAST_POINTS, 2 * _POINTS // ensemble.n_classes)
    roc: tuple[tuple[float, float], ...] = ()
    precision_recall: tuple[tuple[float, float], ...] = ()
    if y.any() and not y.all():
        false_rate, true_rate, _ = roc_curve(y, p, drop_intermediate=False)
        roc = ((0.0, 0.0), *_thinned(false_rate[1:], true_rate[1:], points))
    if y.any():
        precision, recall, _ = precision_recall_curve(y, p)
        # From the highest threshold; the last has none.
        precision_recall = _thinned(recall[-2::-1], precision[-2::-1], points)
    bins = calibration_bin(p)
    count = np.bincount(bins, minlength=ECE_BINS)
    filled = np.flatnonzero(count)
    mean, rate = (np.bincount(bins, weights=values, minlength=ECE_BINS)[filled] / count[filled] for values in (p, y))
    return Curves(
        roc=roc,
        precision_recall=precision_recall,
        calibration=tuple(zip(mean.tolist(), rate.tolist(), count[filled].tolist(), strict=True)),
    )


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64], most: int) -> tuple[tuple[float, float], ...]:
    """Thin a curve to at most so many points, both ends kept."""
    rows = np.unique(np.linspace(0, len(x) - 1, min(len(x), most)).astype(np.intp))
    return tuple(zip(x[rows].tolist(), y[rows].tolist(), strict=True))
