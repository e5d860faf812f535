"""Is every figure that the page prints that of the record?"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from report_pages import QUICK, Element, cells_of, check_page, collected, table_of
from sklearn.metrics import confusion_matrix
from test_runs import N_FOLDS, edit_record, made_run, patches, predicted

from features.samples import Samples
from finetune.report import make_report
from probe.curve import CurvePoint, curve_csv
from probe.ensembles import ensemble_of
from probe.evidence import Question
from probe.metrics import COMPARED, as_dict
from probe.predictions import VALIDATION, concatenate
from probe.report.collect import ReportOptions
from probe.report.headlines import headlines, power


def on_other_slides(table: Samples) -> Samples:
    """No slide is in train and test."""
    other = np.char.add(table.group, np.where(table.split == "test", "", " of training"))
    return replace(table, group=other)


def on_slides_of(n: int, table: Samples) -> Samples:
    """n patches follow each other on a slide."""
    slide = (np.arange(len(table)) // n).astype(str)
    domain = (
        np.char.add("domain ", (np.arange(len(table)) // n % 3).astype(str)) if table.domain.any() else table.domain
    )
    return replace(table, group=np.char.add(f"{table.id[0]} slide ", slide), domain=domain)


LARGER = {
    "ami-br": on_other_slides(patches("ami-br", 147, raters=3, test_from=75)),
    "atnorm-br": patches("atnorm-br", 53, slides=False),
    "atnorm-md": on_slides_of(12, patches("atnorm-md", 119, raters=5, domains=3)),
    "single": on_slides_of(1, patches("single", 31)),
}
ASKED = ReportOptions(Question(margin=0.3, wanted=0.2), prevalences=(0.1, 0.3))
COSTS = (
    {"seconds": 1234.4, "images_per_second": 87.6, "peak_memory_mb": 4321},
    {"seconds": 5.6, "images_per_second": None, "peak_memory_mb": 99},
    {"seconds": 70, "images_per_second": 6.5, "peak_device_memory_mb": 23456, "peak_memory_mb": 1},
)


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[Element, Any, list[Any]]:
    """The page of three runs that are alike in nothing, the record of their comparison, and the runs."""
    folder = tmp_path_factory.mktemp("printed")
    rng = np.random.default_rng(5)
    for k, (model, strength) in enumerate((("uni", 0.5), ("virchow", 0.15), ("conch", 1.1))):
        points = [
            CurvePoint(fraction, draw, fold, 9 * k + 3 + 2 * fold, 1000 * k + 31 + fold, 4, 1.0, name, split, *scored)
            for fraction in (0.25, 0.7)
            for draw in range(2)
            for fold in range(N_FOLDS)
            for name, split in (("atnorm-br", "test"), ("ami-br", VALIDATION))
            for scored in [rng.uniform(0.3, 0.9, 2).tolist()]
        ]
        trainings = [predicted(LARGER, "ami-br", signal=strength, seed=(25, 22, 23)[k])]
        if model == "conch":
            again = predicted(LARGER, "ami-br", signal=strength, seed=123)
            trainings.append(replace(again, seed=again.seed + 1))
        made = made_run(
            folder,
            model,
            tables=LARGER,
            predictions=concatenate(trainings),
            files={"learning_curve.csv": curve_csv(points)},
        )
        edit_record(made, cost=COSTS[k], created=f"2026-01-0{k + 1}T00:00:00Z", view=f"center{60 + k}", pooling="cls")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MITOFM_DATA", str(folder / "nothing"))
        page, report, runs = make_report(folder, resampling=QUICK, options=ASKED)
    return check_page(page), report, runs


def three(value: float, digits: int = 3) -> str:
    return "–" if np.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # no −0.000


def with_sign(value: float) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:+.3f}".replace("-", "−")


def both_ends(low: float, high: float) -> str:
    return f"{three(low)}{' to ' if low < 0 else '–'}{three(high)}"  # a minus sign beside a dash could not be read


def with_ends(one: Any) -> str:
    if np.isnan(one.low):
        return f"{three(one.value)} no interval"
    wide = f" {both_ends(*one.wide)}" if one.wide else ""
    return f"{three(one.value)} {both_ends(one.low, one.high)}{' exact' * one.exact}{wide}"


def with_signed_ends(one: Any) -> str:
    ends = "no interval" if np.isnan(one.low) else f"{with_sign(one.low)} to {with_sign(one.high)}"
    return f"{with_sign(one.value)} {ends}"


def p_text(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}"


def run_named(runs: list[Any], cell: str) -> Any:
    (found,) = (run for run in runs if run.label in cell)
    return found


def test_the_printed_example_has_no_two_figures_alike(printed):
    """Where two of them agreed, a cell could print the one for the other."""
    _, report, runs = printed
    for on in report.sets:
        counts = [sum(on.confusion[run.label], ()) for run in runs]
        assert all(len(set(of)) == 4 for of in counts), (on.name, counts)
        for run in runs:
            found = on.comparison.judgements[run.label].figures
            assert len({with_ends(one) for one in found.values()}) == len(found) == 9
            assert all(len({three(one.value), three(one.low), three(one.high)}) == 3 for one in found.values())
        assert len({three(pair.differences[name].p_holm) for pair in on.comparison.pairs for name in COMPARED}) > 2
    assert any(rank.low < rank.high for on in report.sets for rank in on.comparison.ranks["auroc"].values())
    assert any(pair.delong for on in report.sets for pair in on.comparison.pairs)


def test_the_record_inside_the_page_is_that_of_the_comparison(printed):
    root, report, _ = printed
    (element,) = (one for one in root.all("script") if one.attributes.get("id") == "figures")
    record, expected = json.loads(element.text), json.loads(json.dumps(as_dict(report)))
    for on in expected["sets"]:
        del on["curves"]
    del record["created"], expected["created"]
    assert record == expected


def test_tables_are_sorted_by_the_figures_that_they_print(printed):
    root, report, runs = printed
    for on in report.sets:
        ranks = []
        for cells in table_of(root, f"Leaderboard of {on.title}"):
            label = run_named(runs, cells[1].text).label
            found, folds = on.comparison.judgements[label].figures, on.folds[label]
            values = [float(cells[k].attributes["data-value"]) for k in (0, 2, 3, 4, 5)]
            ranks.append(values[0])
            place = on.comparison.ranks["auroc"][label].value
            assert values == [
                place,
                *(found[name].value for name in COMPARED),
                *(folds[name].mean for name in COMPARED),
            ]
        assert ranks == sorted(ranks)
        for cells in table_of(root, f"All figures of {on.title}"):
            judged = on.comparison.judgements[run_named(runs, cells[0].text).label]
            values = [float(cell.attributes["data-value"]) for cell in cells[1:]]
            assert values == [judged.threshold, *(one.value for one in judged.figures.values())]


def test_every_figure_of_the_leaderboard_is_that_of_the_record(printed):
    root, report, runs = printed
    sections = {one.attributes.get("id"): one for one in root.all("section")}
    titles = [" ".join(one.text.split()) for one in sections["leaderboard"].all("h3")]
    for on, title in zip(report.sets, titles, strict=True):
        any_run = on.comparison.judgements[runs[0].label]
        alone = f" ({any_run.n_alone} patches of unknown slide count as one each)" * bool(any_run.n_alone)
        units = "slides" if any_run.unit == "slide" else "distinct patches"
        size = f"{on.n:,} patches, {on.n_positive} Atypical"
        assert title == f"{on.title} {size}, {any_run.n_clusters:,} {units}{alone}"
        rows = cells_of(root, f"Leaderboard of {on.title}")
        assert len(rows) == len(runs)
        for rank, name, *figures in rows:
            run = run_named(runs, name)
            judged, folds = on.comparison.judgements[run.label], on.folds[run.label]
            place = on.comparison.ranks["auroc"][run.label]
            assert rank == f"{place.value}" + f" {place.low}–{place.high}" * (place.low != place.high)
            number = report.labels.index(run.label) + 1
            assert name == (
                f"{number} {run.label}{run.record.view}, {run.record.pooling}"
                + f", {judged.trainings} trainings" * (judged.trainings > 1)
            )
            expected = [with_ends(judged.figures[figure]) for figure in COMPARED]
            expected += [f"{three(folds[figure].mean)} ± {three(folds[figure].std)}" for figure in COMPARED]
            assert figures[:4] == expected
            cost = run.record.cost
            memory = cost.peak_memory_mb if cost.peak_device_memory_mb is None else cost.peak_device_memory_mb
            said = [cost.seconds, cost.images_per_second, memory, 9]  # eight features and the intercept
            (costs,) = (cells for name, *cells in cells_of(root, "Cost") if run.label in name)
            assert costs[:-1] == ["–" if value is None else f"{value:,.0f}" for value in said]
        for name, threshold, *figures in cells_of(root, f"All figures of {on.title}"):
            judged = on.comparison.judgements[run_named(runs, name).label]
            assert threshold == three(judged.threshold)
            assert figures == [with_ends(one) for one in judged.figures.values()]
        header = cells_of(root, f"All figures of {on.title}", header=True)[0]
        titles_of = ("Balanced accuracy", "AUROC", "Average precision", "Sensitivity", "Specificity")
        order = ("balanced_accuracy", "auroc", "average_precision", "sensitivity", "specificity")
        found = on.comparison.judgements[runs[0].label].figures
        assert [header[2 + list(found).index(name)] for name in order] == list(titles_of)


def test_every_difference_is_that_of_the_record_with_its_sign(printed):
    root, report, runs = printed
    numbers = {str(number): label for number, label in enumerate(report.labels, start=1)}
    marks = set()
    for on, (name, title) in itertools.product(report.sets, zip(COMPARED, ("Balanced accuracy", "AUROC"), strict=True)):
        label = f"Differences in {title} on {on.title}"
        ((_, *columns),) = cells_of(root, label, header=True)
        of = {(pair.first, pair.second): pair.differences[name] for pair in on.comparison.pairs}
        for row, *cells in cells_of(root, label):
            first = run_named(runs, row).label
            for column, cell in zip(columns, cells, strict=True):
                second = numbers[column]
                if first == second:
                    assert cell == "·"
                    continue
                one = of.get((first, second)) or of[second, first]
                sign = 1 if (first, second) in of else -1
                value, *ends = (sign * one.value, *sorted((sign * one.low, sign * one.high)))
                mark, *said = cell.split(" ", 1) if cell[0] not in "+−" else ("", cell)
                marks.add(mark)
                expected = f"{with_sign(value)}{with_sign(ends[0])} to {with_sign(ends[1])}p {p_text(one.p_holm)}"
                if one.wide:
                    wide = sorted(sign * end for end in one.wide)
                    expected += f"{with_sign(wide[0])} to {with_sign(wide[1])}p {p_text(one.p_wide_holm)}"
                expected += f"shows {three(one.detectable_holm)}" * (mark not in ("▲", "▼", "△", "▽", "≈"))
                assert said == [expected]
                differs = one.p_holm < 0.05
                sure = not one.wide or one.p_wide_holm < 0.05
                assert (mark in ("▲", "▼", "△", "▽")) == differs
                assert not differs or mark == {(1, 1): "▲", (0, 1): "▼", (1, 0): "△", (0, 0): "▽"}[value > 0, sure]
                if mark in ("≈", "≥", "≤"):
                    assert not one.wide
                    which = {"≈": "p_equivalent_holm", "≥": "p_not_worse_holm", "≤": "p_not_better_holm"}[mark]
                    if sign < 0 and mark != "≈":
                        which = {"≥": "p_not_better_holm", "≤": "p_not_worse_holm"}[mark]
                    assert getattr(one, which) < 0.05
    assert marks > {"", "▲", "▼"}


def test_every_figure_of_delongs_test_is_that_of_the_record(printed):
    root, report, _ = printed
    tested = [on for on in report.sets if on.comparison.pairs[0].delong]
    assert [on.dataset for on in tested] == ["single"]
    for on in tested:
        rows = cells_of(root, f"DeLong's test on {on.title}")
        assert rows == [
            [
                pair.first,
                pair.second,
                f"{three(pair.delong.first)}, {three(pair.delong.second)}",
                with_sign(pair.delong.value),
                three(pair.delong.standard_error),
                three(pair.delong.z, 2),
                p_text(pair.delong.p),
                p_text(pair.delong.p_holm),
            ]
            for pair in on.comparison.pairs
        ]


def test_every_count_of_a_confusion_matrix_stands_in_its_own_cell(printed):
    root, report, runs = printed
    (section,) = (one for one in root.all("section") if one.attributes.get("id") == "decisions")
    articles = list(section.all("article"))[: len(report.sets)]
    for on, article in zip(report.sets, articles, strict=True):
        cards = [one for one in article.all("div") if one.attributes.get("class") == "card"]
        assert len(cards) == len(runs)
        for card in cards:
            run = run_named(runs, next(card.all("h4")).text)
            judged = ensemble_of(run.predictions, on.dataset, on.split)
            said = judged.probability[:, 1] >= judged.threshold
            (tn, fp), (fn, tp) = confusion_matrix(judged.label, said).tolist()
            table = next(card.all("table"))
            assert next(table.all("caption")).text == f"Threshold {three(judged.threshold)}"
            assert [[cell.text for cell in row.all("td", "th")] for row in table.all("tr")] == [
                ["", "said Atypical", "said Normal"],
                ["Atypical", str(tp), str(fn)],
                ["Normal", str(fp), str(tn)],
            ]
            figures = on.comparison.judgements[run.label].figures
            names = ("sensitivity", "specificity", "brier", "ece")
            titles = ("Sensitivity", "Specificity", "Brier", "ECE")
            below = "".join(f"{title} {with_ends(figures[name])}" for name, title in zip(names, titles, strict=True))
            assert next(card.all("p")).text == below
        legends = [f"Legend of {on.title}"]
        for name, area, precision in cells_of(root, legends[0]):
            figures = on.comparison.judgements[run_named(runs, name).label].figures
            assert [area, precision] == [three(figures["auroc"].value), three(figures["average_precision"].value)]


def test_every_figure_beside_the_raters_is_that_of_the_record(printed):
    root, report, runs = printed
    rated = [on for on in report.sets if on.raters]
    assert [on.dataset for on in rated] == ["ami-br", "atnorm-md", "ami-br"]
    for on in rated:
        for name, *cells in cells_of(root, f"Agreement on {on.title}"):
            view = on.raters[run_named(runs, name).label]
            expected = [
                text
                for part in (view.unanimous, view.disputed)
                for text in (f"{part.n:,} ({part.n_positive})", *(with_ends(part.figures[name]) for name in COMPARED))
            ]
            assert cells == expected + [with_ends(view.soft[name]) for name in ("brier", "log_loss", "correlation")]
        rows = [cells[-8:] for cells in cells_of(root, f"Raters on {on.title}")]
        expected = []
        for label in on.raters:
            for number, rater in enumerate(on.raters[label].raters, start=1):
                texts = [
                    with_ends(who[name])
                    + f"({three(who['sensitivity'].value)} / {three(who['specificity'].value)})" * (name != "kappa")
                    for name in ("balanced_accuracy", "kappa")
                    for who in (rater.rater, rater.run)
                ]
                one = rater.difference
                ends = f"{with_sign(one.low)} to {with_sign(one.high)}" if not np.isnan(one.low) else "– to –"
                p = p_text(one.p_holm) if not np.isnan(one.p_holm) else "–"
                expected.append([str(number), f"{rater.n:,}", *texts, f"{with_sign(one.value)}{ends}", p])
        assert rows == expected


def test_every_figure_of_calibration_is_that_of_the_record(printed):
    root, report, runs = printed
    for on in report.sets:
        for name, prior, *cells in cells_of(root, f"Calibration on {on.title}"):
            one = on.calibration[run_named(runs, name).label]
            assert prior == three(one.prior)
            names = ("brier", "ece", "slope", "intercept")
            assert cells == [with_ends(of[name]) for name in names for of in (one.raw, one.corrected)]
        for name, *cells in cells_of(root, f"Predictive values on {on.title}"):
            values = on.calibration[run_named(runs, name).label].predictive_values
            assert [of.prevalence for of in values] == [0.1, 0.3]
            assert cells == [with_ends(one) for of in values for one in (of.ppv, of.npv)]


def test_every_figure_of_a_threshold_is_that_of_the_record(printed):
    root, report, _ = printed
    shown = [(on, label, view) for on in report.sets for label, view in on.thresholds.items()]
    assert shown
    for on, label, view in shown:
        domains = {"all": view.all, **view.domains}
        assert cells_of(root, f"Thresholds of {label} on {on.title}") == [
            [
                domain,
                f"{of.n:,} ({of.n_positive}), {of.n_clusters}",
                *(with_ends(of.own[name]) for name in ("sensitivity", "specificity", "balanced_accuracy")),
                three(of.oracle_threshold),
                with_ends(of.oracle["balanced_accuracy"]),
                with_ends(of.at_specificity),
                "–" if of.n_slides_needed is None else str(of.n_slides_needed),
            ]
            for domain, of in domains.items()
        ]


def test_every_figure_of_a_rate_per_slide_is_that_of_the_record(printed):
    root, report, _ = printed
    shown = [on for on in report.sets if any(view.agreement for view in on.rates.values())]
    assert [on.dataset for on in shown] == ["atnorm-md"]
    (on,) = shown
    expected = [
        [domain, str(of.n_slides)]
        + [
            with_signed_ends(which[name]) if name != "concordance" else with_ends(which[name])
            for which in (of.predicted, of.corrected)
            for name in ("bias", "lower limit", "upper limit", "concordance")
        ]
        for label in on.comparison.judgements
        for domain, of in on.rates[label].agreement.items()
    ]
    rows = [cells[-10:] for cells in cells_of(root, f"Agreement per slide on {on.title}")]
    assert sorted(rows) == sorted(expected)


def test_every_standard_deviation_of_trainings_is_that_of_the_record(printed):
    root, report, runs = printed
    for on, (name, title) in itertools.product(report.sets, zip(COMPARED, ("Balanced accuracy", "AUROC"), strict=True)):
        ((run, each, *cells),) = cells_of(root, f"Trainings: {title} on {on.title}")
        of = on.comparison.trainings[run_named(runs, run).label].figures[name]
        assert each == ", ".join(map(three, of.each))
        parts = (of.training, of.fold, of.residual, of.ensemble_training, of.ensemble_slide)
        assert cells == [three(one) for one in parts]


def test_every_figure_across_sets_is_that_of_the_record(printed):
    root, report, _ = printed
    for name, title in zip(COMPARED, ("Balanced accuracy", "AUROC"), strict=True):
        of = report.across.figures[name]
        assert cells_of(root, f"{title} across data sets") == [
            [
                pair.first,
                pair.second,
                str(pair.n_sets),
                f"{with_sign(pair.mean)} {with_sign(pair.low)} to {with_sign(pair.high)}",
                three(pair.between),
                *(f"{p:.0%}" for p in (pair.p_better, pair.p_equivalent, pair.p_worse)),
            ]
            for pair in of.pairs
        ]
        ranks = [(label.split(" ", 1)[1], rank) for label, rank in cells_of(root, f"Mean ranks by {title}")]
        assert ranks == [
            (label, f"{rank:.2f}") for label, rank in sorted(of.mean_ranks.items(), key=lambda one: one[1])
        ]


def test_the_sentences_on_top_are_those_of_the_record(printed):
    root, report, _ = printed
    (section,) = (one for one in root.all("section") if one.attributes["id"] == "summary")
    assert [one.text for one in section.all("p")] == list(report.summary)


def test_every_figure_by_domain_is_that_of_the_record(printed):
    root, report, runs = printed
    (on,) = (on for on in report.sets if on.domains)
    for name, title in zip(COMPARED, ("Balanced accuracy", "AUROC"), strict=True):
        label = f"{title} by domain on {on.title}"
        first = on.domains[runs[0].label].domains
        assert cells_of(root, label, header=True)[0] == [
            "Run",
            *(f"{k}{of.n:,} ({of.n_positive}), {of.n_clusters} {of.unit}s" for k, of in first.items()),
            "Mean of domains",
            "Worst",
        ]
        for run, *cells in cells_of(root, label):
            view = on.domains[run_named(runs, run).label]
            worst = view.worst[name]
            assert cells == [
                *(with_ends(of.figures[name]) for of in view.domains.values()),
                with_ends(view.macro[name]),
                f"{worst.domain} {three(worst.value)} {worst.share:.0%}",
            ]


def test_every_figure_of_a_learning_curve_is_the_mean_of_its_models(printed):
    root, report, runs = printed
    for on in report.sets:
        points = {
            run.label: [one for one in run.curve if (one.dataset, one.split) == (on.dataset, on.split)] for run in runs
        }
        if not any(points.values()):
            continue
        found = [cells[-6:] for cells in cells_of(root, f"Learning curves on {on.title}")]
        expected = []
        for run, fraction in itertools.product(runs, (0.25, 0.7)):
            of = [one for one in points[run.label] if one.fraction == fraction]
            means = [np.mean([getattr(one, name) for one in of]) for name in ("n_slides", "n_patches")]
            scores_of = [[getattr(one, name) for one in of] for name in COMPARED]
            expected.append(
                [
                    f"{fraction:g}",
                    f"{means[0]:.0f}",
                    f"{means[1]:,.0f}",
                    "6",
                    *(f"{np.mean(of_one):.3f} ± {np.std(of_one):.3f}" for of_one in scores_of),
                ]
            )
        assert found == expected


def test_sentences_about_equal_and_perfect_runs_name_no_worst_and_no_range(tmp_path):
    for model in ("uni", "virchow"):
        made_run(tmp_path, model, signal=60)
    report, runs = collected(tmp_path)
    said = headlines(report, runs)
    assert said["curves"] == "On ami-br, test, the area under the ROC curve of both runs is 1.00."
    assert said["decisions"] == "On ami-br, test, uni probe is right on every patch at its threshold."
    assert said["thresholds"].startswith("On atnorm-md, test, no other threshold would fit any domain better than")
    assert said["domains"] == "On atnorm-md, test, uni probe has the same AUROC in all 3 domains, 1.00."
    assert said["gallery"] == "On ami-br, test, uni probe is right on all 24 patches."
    assert "would lie within .01 of each other in AUROC with a probability of 99 %" in said["across"]
    assert power(report.sets[0]) == "ami-br, test: the two runs cannot be told apart in balanced accuracy or AUROC."
