"""What does each section of the page say in one sentence? Of one run where there are many: the best of the set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from probe.metrics import COMPARED, Interval
from probe.report.collect import Report, SetReport
from probe.report.read import Run
from probe.report.summary import ALPHA, RANKING, by_rank, held_out, in_words, listed, short, units


def headlines(report: Report, runs: Sequence[Run]) -> dict[str, str]:
    """Say what each section shows, section to sentence; empty where nothing can be said."""
    sets = held_out(report.sets) or list(report.sets)

    def first(name: str) -> SetReport | None:
        """The first set that has something of that name; the test sets are asked first."""
        return next((one for one in (*sets, *report.sets) if getattr(one, name)), None)

    return {
        "trainings": _trainings(report.sets),
        "across": _across(report),
        "curves": _curves(sets[0]),
        "decisions": _decisions(sets[0]),
        "thresholds": _thresholds(first("thresholds")),
        "slides": _slides(first("rates")),
        "raters": _raters(first("raters")),
        "domains": _domains(first("domains")),
        "learning": _learning(report, runs),
        "gallery": _gallery(sets[0]),
    }


def power(on: SetReport) -> str:
    """Say how many pairs of runs differ on a set, and which differences it can show; empty without a pair."""
    comparison = on.comparison
    n = sum(not pair.untested for pair in comparison.pairs)
    if not n:
        return f"{on.title}: {comparison.pairs[0].untested}, so that no test is valid." if comparison.pairs else ""
    pairs = f"{n} pair{'s' * (n > 1)}"
    differing = {
        in_words(on, name): sum(pair.differences[name].p_holm < ALPHA for pair in comparison.pairs) for name in COMPARED
    }
    if not any(differing.values()):
        said = f"{on.title}: {'the two runs' if n == 1 else f'no two of the runs ({pairs})'} can"
        said += f"{'not' if n == 1 else ''} be told apart in {' or '.join(differing)}"
    elif n == 1:
        shown, hidden = ([name for name, count in differing.items() if bool(count) == found] for found in (True, False))
        said = f"{on.title}: the two runs differ in {listed(shown)}" + (f", not in {listed(hidden)}" if hidden else "")
    else:
        counts = listed([f"{count or 'none'} in {name}" for name, count in differing.items()])
        said = f"{on.title}: of {pairs} of runs, {counts} differ after Holm's correction"
    if on.any_judgement.unit != "slide":
        said += ", if every patch comes from its own patient"
    known = {name: limit for name in COMPARED if (limit := comparison.detectable.get(name))}
    if not known:
        return f"{said}."
    limits = [
        f"{short(limit.one)} (one pair) or {short(limit.holm)} (after Holm over {pairs}) in {in_words(on, name)}"
        if n > 1
        else f"{short(limit.one)} in {in_words(on, name)}"
        for name, limit in known.items()
    ]
    said += f". This set can show differences of {listed(limits)} with 80 % power"
    unit = units(on.any_judgement)
    needed = [
        f"{limit.slides:,} {unit} for {short(limit.wanted)} in {in_words(on, name)}"
        if limit.slides is not None
        else f"for {short(limit.wanted)} in {in_words(on, name)} no number of {unit} would do"
        for name, limit in known.items()
        if limit.wanted is not None
    ]
    return f"{said}; needed: {listed(needed)}." if needed else f"{said}."


def _trainings(sets: Sequence[SetReport]) -> str:
    on = next((one for one in sets if one.comparison.trainings), None)
    if on is None:
        return ""
    label = next(label for label in by_rank(on) if label in on.comparison.trainings)
    of = on.comparison.trainings[label]
    parts = of.figures[RANKING]
    return (
        f"On {on.title}, the {in_words(on)} of {label} changes by {short(parts.ensemble_training)} (standard "
        f"deviation over {of.n} trainings) with another training, and by {short(parts.ensemble_slide)} with "
        f"other {units(on.any_judgement)}."
    )


def _across(report: Report) -> str:
    figure = report.across.figures.get(RANKING) if report.across else None
    if figure is None:
        return ""
    best, following, *_ = (*sorted(figure.mean_ranks, key=lambda label: figure.mean_ranks[label]), "", "")
    pair = next((one for one in figure.pairs if {one.first, one.second} == {best, following}), None)
    if pair is None or report.across is None:
        return figure.sentence
    area = "AUROC" if len(report.classes) == 2 else "macro AUROC"
    within = 1 - pair.p_better - pair.p_worse
    if _per_cent(pair.p_better) == _per_cent(pair.p_worse):
        return (
            f"On a new data set, {best} and {following} would lie within {short(report.across.rope)} of each other in "
            f"{area} with a probability of {_per_cent(within)}. {figure.sentence}"
        )
    as_named = pair.first == best
    better, worse = (pair.p_better, pair.p_worse) if as_named else (pair.p_worse, pair.p_better)
    return (
        f"On a new data set, {best} would be better than {following} in {area} by more than "
        f"{short(report.across.rope)} with a probability of {_per_cent(better)}, and worse with one of "
        f"{_per_cent(worse)}. {figure.sentence}"
    )


def _curves(on: SetReport) -> str:
    if len(on.classes) > 2:
        return _curves_by_class(on)
    values = {label: one.figures[RANKING].value for label, one in on.comparison.judgements.items()}
    known = {label: value for label, value in values.items() if not math.isnan(value)}
    if not known:
        return f"On {on.title} there is one class, and no curve."
    best, worst = max(known, key=lambda label: known[label]), min(known, key=lambda label: known[label])
    if len(known) == 1:
        return f"On {on.title}, {best} has an area under the ROC curve of {short(known[best])}."
    if short(known[best]) == short(known[worst]):
        runs = "both runs" if len(known) == 2 else f"all {len(known)} runs"
        return f"On {on.title}, the area under the ROC curve of {runs} is {short(known[best])}."
    return (
        f"On {on.title}, the area under the ROC curve goes from {short(known[worst])} ({worst}) to "
        f"{short(known[best])} ({best})."
    )


def _curves_by_class(on: SetReport) -> str:
    best = by_rank(on)[0]
    figures = on.comparison.judgements[best].figures
    areas = {k: figures[f"auroc {k}"].value for k in on.held}
    if len(areas) < 2:
        return f"On {on.title} there is one class, and no curve."
    hardest, easiest = min(areas, key=lambda k: areas[k]), max(areas, key=lambda k: areas[k])
    if short(areas[hardest]) == short(areas[easiest]):
        return f"On {on.title}, {best} tells every class from the rest with an AUROC of {short(areas[easiest])}."
    return (
        f"On {on.title}, {best} tells {on.classes[hardest]} from the rest worst (AUROC {short(areas[hardest])}) and "
        f"{on.classes[easiest]} best ({short(areas[easiest])})."
    )


def _decisions(on: SetReport) -> str:
    best, positive = by_rank(on)[0], on.classes[1]
    if len(on.classes) > 2:
        return _recalls(on, best)
    figures = on.comparison.judgements[best].figures
    found, passed = figures["sensitivity"], figures["specificity"]
    if found.value == passed.value == 1:
        return f"On {on.title}, {best} is right on every patch at its threshold."
    parts = []
    if not math.isnan(found.value):
        parts.append(f"finds {_per_cent(found.value)} of {positive} patches")
    if not math.isnan(passed.value):
        parts.append(f"takes {_per_cent(1 - passed.value)} of the others for {positive}")
    return f"On {on.title}, {best} {listed(parts)} at its threshold."


def _recalls(on: SetReport, best: str) -> str:
    """Say which class a run finds least, and what it takes it for."""
    recalls = {k: on.comparison.judgements[best].figures[f"recall {k}"].value for k in on.held}
    least = min(recalls, key=lambda k: recalls[k])
    if recalls[least] == 1:
        return f"On {on.title}, {best} finds every patch of every class."
    said = f"On {on.title}, {best} finds {on.classes[least]} least: {_per_cent(recalls[least])} of its patches"
    wrong = {k: n for k, n in enumerate(on.confusion[best][least]) if k != least and n}
    if not wrong:
        return f"{said}."
    taken = max(wrong, key=lambda k: wrong[k])
    return f"{said}, and takes {wrong[taken]:,} of {on.counts[least]:,} for {on.classes[taken]}."


def _thresholds(on: SetReport | None) -> str:
    if on is None:
        return ""
    label = next(label for label in by_rank(on) if label in on.thresholds)
    gaps = {
        domain: of.oracle["balanced_accuracy"].value - of.own["balanced_accuracy"].value
        for domain, of in on.thresholds[label].domains.items()
    }
    known = {domain: gap for domain, gap in gaps.items() if not math.isnan(gap)}
    if not known:
        return ""
    worst = max(known, key=lambda domain: known[domain])
    if known[worst] <= 0:
        return f"On {on.title}, no other threshold would fit any domain better than that of {label}."
    of = on.thresholds[label].domains[worst]
    return (
        f"On {on.title}, the threshold of {label} costs most in {worst}: balanced accuracy "
        f"{_ends(of.own['balanced_accuracy'])}, where the threshold that fits these patches best would give "
        f"{short(of.oracle['balanced_accuracy'].value)}."
    )


def _slides(on: SetReport | None) -> str:
    if on is None:
        return ""
    label = next(label for label in by_rank(on) if label in on.rates)
    of = on.rates[label].agreement.get("all")
    if of is None:
        return f"No slide of {on.title} has figures enough for a rate."
    found = of.corrected if not math.isnan(of.corrected["bias"].value) else of.predicted
    which = "corrected" if found is of.corrected else "apparent"
    low, high = (found[f"{name} limit"].value for name in ("lower", "upper"))
    if low == high == 0:
        return (
            f"On {of.n_slides} slides of {on.title}, the {which} rate of {on.classes[1]} by {label} is the annotated."
        )
    return (
        f"On {of.n_slides} slides of {on.title}, the {which} rate of {on.classes[1]} by {label} is off by "
        f"{_signed(found['bias'].value)} on average, and on 95 % of slides by {_signed(low)} to {_signed(high)}."
    )


def _raters(on: SetReport | None) -> str:
    if on is None:
        return ""
    label = next(label for label in by_rank(on) if label in on.raters)
    view = on.raters[label]
    pairs = [(one.run["kappa"].value, one.rater["kappa"].value) for one in view.raters]
    known = [pair for pair in pairs if not any(math.isnan(value) for value in pair)]
    if not known:
        return ""
    run, rater = (fmean(column) for column in zip(*known, strict=True))
    return (
        f"On {on.title}, {label} agrees with a rater with a kappa of {short(run)} on average, and another rater with "
        f"one of {short(rater)}, on the same patches; Fleiss' kappa of the raters is {_ends(view.fleiss)}."
    )


def _domains(on: SetReport | None) -> str:
    if on is None:
        return ""
    label = next(label for label in by_rank(on) if label in on.domains)
    view = on.domains[label]
    worst = view.worst[RANKING]
    if worst is None:
        return ""
    values = [value for one in view.domains.values() if not math.isnan(value := one.figures[RANKING].value)]
    if len(values) > 1 and short(min(values)) == short(max(values)):
        return f"On {on.title}, {label} has the same {in_words(on)} in all {len(values)} domains, {short(values[0])}."
    return (
        f"On {on.title}, the worst domain of {label} is {worst.domain} ({in_words(on)} {short(worst.value)}); the "
        f"mean of its domains is {_ends(view.macro[RANKING])}."
    )


def _learning(report: Report, runs: Sequence[Run]) -> str:
    n = sum(bool(run.curve) for run in runs)
    return f"{n} of {len(report.labels)} runs have a learning curve." if n else ""


def _gallery(on: SetReport) -> str:
    best = by_rank(on)[0]
    wrong = {
        (label, called): n
        for label, row in enumerate(on.confusion[best])
        for called, n in enumerate(row)
        if called != label and n
    }
    if not wrong:
        return f"On {on.title}, {best} is right on all {on.n:,} patches."
    said = f"On {on.title}, {best} is wrong on {sum(wrong.values()):,} of {on.n:,} patches"
    if len(on.classes) == 2:
        return f"{said}: {wrong.get((1, 0), 0):,} missed and {wrong.get((0, 1), 0):,} false {on.classes[1]}."
    label, called = max(wrong, key=lambda cell: wrong[cell])
    return f"{said}, most often where it takes {on.classes[label]} for {on.classes[called]} ({wrong[label, called]:,})."


def _ends(figure: Interval) -> str:
    ends = "" if math.isnan(figure.low) else f" ({short(figure.low)} to {short(figure.high)})"
    return f"{short(figure.value)}{ends}"


def _signed(value: float) -> str:
    text = short(value)
    return text if text.startswith(("−", "–")) else f"+{text}"


def _per_cent(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")
