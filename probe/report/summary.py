"""What do the figures say, in at most three sentences that can be read aloud?

The first says what the first test set shows, the second what the others show, and the third what the figures cannot
say. "Better" stands only where the test says so after Holm's correction for all pairs, and where slides are not known
only if it still does should every patient have given several patches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from probe.leaks import UNSEEN
from probe.metrics import TITLES, Interval, Judgement
from probe.resample import SLIDE
from probe.significance import Difference, Verdict, verdict

if TYPE_CHECKING:
    from probe.report.collect import Report, SetReport

RANKING = "auroc"  # the figure that orders runs, here and in the leaderboard
ALPHA = 0.05
_CASES = 20  # "in 1 of 20 cases"
_FEW = 10  # slides: from fewer nothing is planned
_WIDEST = 0.5  # of AUROCs above chance, no two differ by more


def three_sentences(report: Report) -> tuple[str, ...]:
    """Say what a report shows.

    Returns:
        One to three sentences.
    """
    sets = held_out(report.sets)
    if not sets:
        return _out_of_fold(report.sets)
    first, *others = sets
    sentences = [_clause(first, report)]
    if others:
        sentences.append(_of_others(first, others, report))
    return tuple(f"{sentence[0].upper()}{sentence[1:]}." for sentence in (*sentences, _caveat(first)))


def reversed_difference(difference: Difference) -> Difference:
    """Turn a difference round: second minus first."""
    low, high = 0.0 - difference.high, 0.0 - difference.low  # no -0.0
    return replace(
        difference,
        value=0.0 - difference.value,
        low=low,
        high=high,
        wide=None if difference.wide is None else (0.0 - difference.wide[1], 0.0 - difference.wide[0]),
        p_not_worse=difference.p_not_better,
        p_not_better=difference.p_not_worse,
        p_not_worse_holm=difference.p_not_better_holm,
        p_not_better_holm=difference.p_not_worse_holm,
    )


def difference_of(set_report: SetReport, first: str, second: str, figure: str) -> Difference | None:
    """Find first minus second on a set; None where they are one run."""
    for pair in set_report.comparison.pairs:
        if (pair.first, pair.second) == (first, second):
            return pair.differences[figure]
        if (pair.first, pair.second) == (second, first):
            return reversed_difference(pair.differences[figure])
    return None


def certain(difference: Difference, margin: float | None) -> Verdict:
    """Say what a difference shows even if slides that are not known held several patches each."""
    said = verdict(difference, margin, ALPHA)
    if difference.wide is None:
        return said
    return said if said in ("better", "worse") and difference.p_wide_holm < ALPHA else "unknown"


def by_rank(set_report: SetReport) -> list[str]:
    """List the runs of a set, the best first."""
    ranks = set_report.comparison.ranks[RANKING]
    return sorted(ranks, key=lambda label: ranks[label].value)


# ---------------------------------------------------------------------------------------------------------- sentences


def held_out(sets: Sequence[SetReport]) -> list[SetReport]:
    """List the test sets; of those that hold patches known from training, what is left without them."""
    unseen = {one.dataset for one in sets if one.split == UNSEEN}
    return [one for one in sets if not one.is_validation and (one.split == UNSEEN or one.dataset not in unseen)]


def _out_of_fold(sets: Sequence[SetReport]) -> tuple[str, ...]:
    on = max(sets, key=lambda one: len(one.comparison.judgements))
    figures = [one.figures[RANKING].value for one in on.comparison.judgements.values()]
    if len(figures) == 1:
        reached = f"{by_rank(on)[0]} reaches {_article(on)} {in_words(on)} of {short(figures[0])}"
    else:
        reached = f"the {len(figures)} runs reach {ranging(figures, in_words(on), _areas(on))}"
    return (
        f"Out of fold on {on.dataset}, {reached}, which is optimistic: what a run chose, it chose on these patches.",
        "There is no test set, so nothing is said here of which run is better: score the runs on one with --test.",
    )


def _clause(on: SetReport, report: Report) -> str:
    """Say what one set shows."""
    labels = by_rank(on)
    if all(math.isnan(on.comparison.judgements[label].figures[RANKING].value) for label in labels):
        return _of_one_class(on)
    if len(labels) == 1:
        return f"on {_place(on)}, {labels[0]} reaches {_article(on)} {in_words(on)} of {_reached(on, labels[0])}"
    if len(labels) == 2:
        return _of_two(on, labels[0], labels[1], report)
    return _of_many(on, labels, report)


def _of_others(first: SetReport, others: Sequence[SetReport], report: Report) -> str:
    """Say what the other sets show: in short where they repeat the first."""
    if all(_same_order(first, other, report) for other in others):
        first_label, second_label = by_rank(first)  # of all sets, then
        pairs = [(other, difference_of(other, first_label, second_label, RANKING)) for other in others]
        return "so it is on " + listed([f"{_place(on)} by {_by(one)}" for on, one in pairs if one is not None])
    disagree = "the sets disagree: " if _disagree([first, *others], report.margin) else ""
    return disagree + "; ".join(_clause(other, report) for other in others)


def _same_order(first: SetReport, other: SetReport, report: Report) -> bool:
    """Whether both sets hold the same two runs and say that the same one is better."""
    labels = by_rank(first)
    if len(labels) != 2 or by_rank(other) != labels:
        return False
    found = [difference_of(on, labels[0], labels[1], RANKING) for on in (first, other)]
    return all(one is not None and certain(one, report.margin) == "better" for one in found)


def _disagree(sets: Sequence[SetReport], margin: float | None) -> bool:
    """Whether one set says that a run is better than another, and a second set that it is worse."""
    said: dict[tuple[str, str], set[str]] = {}
    for on in sets:
        for pair in on.comparison.pairs:
            first, second = sorted((pair.first, pair.second))
            found = difference_of(on, first, second, RANKING)
            assert found is not None
            said.setdefault((first, second), set()).add(certain(found, margin))
    return any({"better", "worse"} <= verdicts for verdicts in said.values())


def _of_one_class(on: SetReport) -> str:
    name, said, several = ("sensitivity",) * 2 + ("sensitivities",)
    if len(on.classes) > 2:
        (k,) = on.held
        name, said, several = f"recall {k}", f"recall of {on.classes[k]}", f"recalls of {on.classes[k]}"
    elif not on.n_positive:
        name, said, several = ("specificity",) * 2 + ("specificities",)
    found = {label: one.figures[name] for label, one in on.comparison.judgements.items()}
    start = f"on {_place(on)}, all of one class, there is no AUROC"
    if len(found) == 1:
        ((label, only),) = found.items()
        return f"{start}; the {said} {'of' if len(on.classes) == 2 else 'by'} {label} is {_with_ends(only)}"
    return f"{start}; the runs reach {ranging([one.value for one in found.values()], said, several)}"


def _of_two(on: SetReport, best: str, other: str, report: Report) -> str:
    found = difference_of(on, best, other, RANKING)
    assert found is not None
    start = f"on {_place(on)}, "
    said = verdict(found, report.margin, ALPHA)
    if _tied(found):
        return f"{start}{best} and {other} reach the same {in_words(on)}, {_reached(on, best)}"
    if math.isnan(found.low) or found.high - found.low > 2 * _WIDEST:
        return f"{start}{best} and {other} cannot be compared: there are too few {_few(on)} for an interval"
    if said == "unknown":
        limit = _limit(on, found.detectable)
        return f"{start}{best} and {other} cannot be told apart in {in_words(on)} ({_ends(found)}){limit}"
    area, margin = in_words(on), _margin(report)
    claim = {
        "better": f"{best} is better than {other} by {short(found.value)} in {area}",
        "worse": f"{best} is worse than {other} by {short(-found.value)} in {area}",  # ranked by value: never met
        "equivalent": f"{best} and {other} are equivalent: their {_areas(on)} differ by less than {margin}",
        "not worse": f"{best} is not worse than {other} by {margin} or more in {area}, nor shown to be better",
        "not better": f"{best} is not better than {other} by {margin} or more in {area}, nor shown to be worse",
    }[said]
    if certain(found, report.margin) == said:
        return f"{start}{claim} ({_ends(found)})"
    assert found.wide is not None
    return (
        f"{start}{claim} ({_ends(found)}) if every patch comes from its own patient, and uncertain otherwise "
        f"({short(found.wide[0])} to {short(found.wide[1])})"
    )


def _of_many(on: SetReport, labels: Sequence[str], report: Report) -> str:
    best = labels[0]
    pairs = {label: one for label in labels[1:] if (one := difference_of(on, best, label, RANKING)) is not None}
    tied = [label for label, one in pairs.items() if _tied(one)]
    found = {label: one for label, one in pairs.items() if label not in tied}
    start = f"on {_place(on)}, "
    if not found:
        return f"{start}all {len(labels)} runs reach the same {in_words(on)}, {_reached(on, best)}"
    highest = f"the highest {in_words(on)}, {_reached(on, best)}"
    start += f"{listed([best, *tied])} share {highest}" if tied else f"{best} has {highest}"
    if all(math.isnan(one.low) for one in found.values()):
        return f"{start}, and the set is too small to compare runs"
    sure = Counter(certain(one, report.margin) for one in found.values())
    following, least = next(iter(found.items()))
    if sure["better"] == len(found):
        are = "are" if tied else "is"
        if len(found) == 1:
            return f"{start}, and {are} better than {following} by {_by(least)}"
        return f"{start}, and {are} better than every other run, than the next, {following}, by {_by(least)}"
    it = "them" if tied else "it"
    text = f"{start}; {_counted(sure, report, it)}"
    if (hopeful := Counter(verdict(one, report.margin, ALPHA) for one in found.values())) != sure:
        text += f" (if every patch comes from its own patient: {_counted(hopeful, report, it)})"
    undecided = [one.detectable_holm for one in found.values() if certain(one, report.margin) == "unknown"]
    return text + _limit(on, min((limit for limit in undecided if math.isfinite(limit)), default=math.nan))


def _tied(difference: Difference) -> bool:
    """Whether two runs have the same figure, whatever slides are drawn."""
    return difference.value == 0 and (math.isnan(difference.low) or difference.low == difference.high == 0)


def _counted(verdicts: Counter[Verdict], report: Report, it: str) -> str:
    """Say how many other runs the best one beats, equals, or cannot be told from."""
    margin = _margin(report)
    parts: dict[Verdict, tuple[str, str]] = {
        "better": ("is worse", "are worse"),
        "worse": ("is better", "are better"),
        "equivalent": (f"is equivalent to {it} within {margin}", f"are equivalent to {it} within {margin}"),
        "not worse": (f"is not better by {margin} or more", f"are not better by {margin} or more"),
        "not better": (f"is not worse by {margin} or more", f"are not worse by {margin} or more"),
        "unknown": (f"cannot be told from {it}", f"cannot be told from {it}"),
    }
    n = verdicts.total()
    others = f"the {n} other runs" if n > 1 else "the other run"
    if len(+verdicts) == 1:
        ((said, _),) = (+verdicts).items()
        return f"{others} {parts[said][n > 1]}"
    return f"of {others} {listed([f'{verdicts[k]} {parts[k][verdicts[k] > 1]}' for k in parts if verdicts[k]])}"


def _caveat(on: SetReport) -> str:
    """Say what the figures leave open: what another training would do."""
    best, *others = by_rank(on)
    trainings = {label: judgement.trainings for label, judgement in on.comparison.judgements.items()}
    if not others:
        n = trainings[best]
        if n > 1:
            return f"the interval includes how much {best} changes from one of its {n} trainings to another"
        if best in on.comparison.exact:
            return f"training {best} again would change nothing: its solution is exact"
        return f"as {best} was trained once, another training may change its figures: train with --seeds 3"
    both = (best, others[0])
    names = f"{best} and {others[0]}"
    turned = next(pair.turned for pair in on.comparison.pairs if {pair.first, pair.second} == set(both))
    once = [label for label in both if trainings[label] == 1 and label not in on.comparison.exact]
    if once:
        every = max(trainings.values()) == 1 and not on.comparison.exact
        who = "every run was" if every else f"{' and '.join(once)} {'was' if len(once) == 1 else 'were'}"
        return f"as {who} trained once, another training may change the order of {names}: train with --seeds 3"
    if set(both) <= set(on.comparison.exact):
        return f"training {names} again would change nothing: their solution is exact"
    chance = turned[RANKING]
    if math.isnan(chance):
        return f"how much {names} change from training to training is not known on {on.dataset}"
    n = round(_CASES * chance)
    cases = f"{n} of {_CASES} cases" if n else f"fewer than 1 of {_CASES} cases"
    return f"with another training seed the order of {names} on {on.dataset} would turn in {cases}"


# ------------------------------------------------------------------------------------------------------------ in words


def _place(on: SetReport) -> str:
    judgement = on.any_judgement
    known = " without patches known from training" if on.split == UNSEEN else ""
    n = judgement.n_clusters if judgement.unit == SLIDE else judgement.n  # copies of a patch are patches too
    return f"{on.dataset}'s {n:,} held-out {units(judgement)}{known}"


def over(set_report: SetReport) -> str:
    """Say what the intervals of a set generalise over."""
    said = list(dict.fromkeys(judged.over for judged in set_report.comparison.judgements.values()))
    return min(said, key=len) + (", and other trainings of runs that had several" if len(said) > 1 else "")


def units(judgement: Judgement) -> str:
    """Name what was resampled, in the plural."""
    return "slides" if judgement.unit == SLIDE else "patches"


def in_words(on: SetReport, name: str = RANKING) -> str:
    """Name a figure of `COMPARED` in a sentence about a set."""
    if name == RANKING and len(on.classes) > 2:
        return f"macro AUROC over {len(on.held)} classes"
    return TITLES[name] if TITLES[name].isupper() else TITLES[name].lower()


def _areas(on: SetReport) -> str:
    return in_words(on).replace("AUROC", "AUROCs")


def _article(on: SetReport) -> str:
    return "an" if in_words(on).startswith("A") else "a"


def _reached(on: SetReport, label: str) -> str:
    return _with_ends(on.comparison.judgements[label].figures[RANKING])


def _with_ends(figure: Interval) -> str:
    if math.isnan(figure.low):
        return short(figure.value)
    wide = ""
    if figure.wide is not None:
        wide = f"; {short(figure.wide[0])} to {short(figure.wide[1])} if patients gave several patches"
    return f"{short(figure.value)} ({short(figure.low)} to {short(figure.high)}{wide})"


def _by(difference: Difference) -> str:
    return f"{short(difference.value)} ({_ends(difference)})"


def _ends(difference: Difference) -> str:
    return f"{short(difference.low)} to {short(difference.high)}"


def _limit(on: SetReport, smallest: float) -> str:
    """Say which differences of runs that cannot be told apart the set would have shown in four of five cases."""
    if math.isnan(smallest):
        return ""
    if smallest >= _WIDEST:
        return f"; with so few {_few(on)} hardly any difference would show"
    limit = on.comparison.detectable.get(RANKING)
    needed = ""
    if limit is not None and limit.wanted is not None and limit.slides is not None and limit.n_clusters >= _FEW:
        unit = units(on.any_judgement)
        needed = f"; to show {short(limit.wanted)} it would take about {limit.slides:,} {unit}"
    return f"; there, differences below {short(smallest)} would mostly go unseen{needed}"


def _few(on: SetReport) -> str:
    several = max(judgement.trainings for judgement in on.comparison.judgements.values()) > 1
    return units(on.any_judgement) + (" or trainings" if several else "")


def _margin(report: Report) -> str:
    return "" if report.margin is None else short(report.margin)


def short(value: float) -> str:
    """Print a figure as it is read aloud, with two digits; three where two would say nothing."""
    if math.isnan(value):
        return "–"
    digits = 3 if 0 < abs(value) < 0.0095 else 2
    text = f"{abs(value):.{digits}f}"
    sign = "−" if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0.") else text)


def ranging(values: Sequence[float], one: str, several: str) -> str:
    """Say which values a figure has: "AUROCs of .80 to .90", or where they are equal in print "the same AUROC, .90"."""
    low, high = short(min(values)), short(max(values))
    return f"the same {one}, {low}" if low == high else f"{several} of {low} to {high}"


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
