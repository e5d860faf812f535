"""Does the page of a task of more than two classes say what its runs say of every class, and nothing of thresholds?"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from report_pages import (
    HOSTILE,
    PHASES,
    QUICK,
    cells_of,
    check_page,
    collected,
    embedded,
    page_of,
    patches_of_classes,
    run_of_classes,
    runs_of_classes,
    table_of,
)
from rich.console import Console
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    recall_score,
    roc_auc_score,
)

from features.console import UserError
from features.samples import MOST_CLASSES
from finetune.report import make_report
from probe.ensembles import ensemble_of
from probe.evidence import evaluate
from probe.report import gallery
from probe.report.gallery import PAGE_BYTES, select_patches
from probe.report.terminal import curve_tables, result_tables

pytestmark = pytest.mark.usefixtures("no_patches_at_hand")


def with_ends(figure) -> str:
    if math.isnan(figure.low):
        return f"{figure.value:.3f} no interval"
    return f"{figure.value:.3f} {figure.low:.3f}–{figure.high:.3f}{' exact' if figure.exact else ''}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four runs of five classes: their folder, page, report and runs."""
    runs = tmp_path_factory.mktemp("classes")
    runs_of_classes(runs)
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("MITOFM_DATA", raising=False)
        page, report, read = make_report(runs, resampling=QUICK)
    return runs, page, report, read


def test_figures_and_curves_of_every_class_are_scikit_learn_s(made):
    _, _, report, runs = made
    assert [on.name for on in report.sets] == ["cells/test", "cells/validation"]
    for on in report.sets:
        for run in runs:
            judged = ensemble_of(run.predictions, on.dataset, on.split)
            y, p, said = judged.label, judged.probability, judged.probability.argmax(axis=1)
            found = {name: one.value for name, one in on.comparison.judgements[run.label].figures.items()}
            assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, said), abs=1e-12)
            assert found["auroc"] == pytest.approx(roc_auc_score(y, p, multi_class="ovr"), abs=1e-12)
            assert on.confusion[run.label] == tuple(map(tuple, confusion_matrix(y, said).tolist()))
            assert len(on.curves[run.label]) == 5
            for k, curves in enumerate(on.curves[run.label]):
                assert found[f"recall {k}"] == pytest.approx(recall_score(y, said, labels=[k], average="macro"))
                fall, rise = np.array(curves.roc).T
                area = roc_auc_score(y == k, p[:, k])
                assert found[f"auroc {k}"] == pytest.approx(area, abs=1e-12)
                assert np.trapezoid(rise, fall) == pytest.approx(area, abs=1e-2)  # 100 points of up to 162
                precise = average_precision_score(y == k, p[:, k])
                assert found[f"average_precision {k}"] == pytest.approx(precise, abs=1e-12)
                assert sum(count for *_, count in curves.calibration) == on.n


def test_every_class_stands_in_a_table_with_its_patches_and_slides(made):
    _, page, report, runs = made
    root = check_page(page)
    on = report.sets[0]
    table = runs[0].tables["cells"]
    tested = table.select(table.split == "test")
    board = sorted(runs, key=lambda run: on.comparison.ranks["auroc"][run.label].value)
    for part, of in (("", board[:3]), (", part 2", board[3:])):
        rows = cells_of(root, f"Every class of cells, test{part}")
        assert [row[0] for row in rows] == list(PHASES)
        for k, row in enumerate(rows):
            mine = tested.label == k
            assert row[1:3] == [str(mine.sum()), str(len(set(tested.group[mine].tolist())))]
            figures = [on.comparison.judgements[run.label].figures for run in of]
            names = (f"recall {k}", f"auroc {k}", f"average_precision {k}")
            assert row[3:] == [with_ends(one[name]) for one in figures for name in names]


def test_the_confusion_of_every_run_has_counts_shares_and_a_shade_in_every_cell(made):
    _, page, report, runs = made
    root = check_page(page)
    for on in report.sets:
        for run in runs:
            matrix = on.confusion[run.label]
            heads = cells_of(root, f"Confusion of {run.label} on {on.title}", header=True)
            assert heads == [["True class", *PHASES, "All"]]
            rows = table_of(root, f"Confusion of {run.label} on {on.title}")
            for k, (row, counts) in enumerate(zip(rows, matrix, strict=True)):
                texts = [[part if isinstance(part, str) else part.text for part in cell.children] for cell in row]
                shares = [n / sum(counts) for n in counts]
                expected = [[str(n), f"{share:.0%}"] if n else ["0"] for n, share in zip(counts, shares, strict=True)]
                assert texts == [[PHASES[k]], *expected, [str(on.counts[k])]]
                shades = [cell.attributes.get("class", "") for cell in row[1:-1]]
                assert [shade.split()[0] for shade in shades if shade.startswith("q")] == [
                    f"q{round(10 * share)}" for n, share in zip(counts, shares, strict=True) if n
                ]
                assert [called for called, shade in enumerate(shades) if "hit" in shade] == [k]


def test_nothing_is_said_of_thresholds_and_positives(made):
    _, page, report, _ = made
    root = check_page(page)
    main = next(root.all("main"))
    sections = {one.attributes["id"] for one in main.all("section")}
    assert sections.isdisjoint({"thresholds", "slides", "raters"})
    assert all(not (on.thresholds or on.rates or on.raters or on.calibration) for on in report.sets)
    left_out = next(one.text for one in main.all("p") if one.text.startswith("Left out"))
    for name in ("thresholds by domain", "predictive values", "net benefit", "rates per slide", "raters"):
        assert name in left_out
    words = main.text.replace(left_out, "").lower()
    assert "positive" not in words
    assert {words[at.start() - 3 : at.start()] for at in re.finditer("threshold", words)} <= {"no ", " a "}
    assert "sensitivity" not in " ".join(cell.text.lower() for cell in main.all("th"))
    (header,) = (one for one in root.all("header"))
    assert "5 classes: " + ", ".join(PHASES) in header.text
    assert report.summary[0].startswith(
        "On cells's 13 held-out slides, model-0 probe has the highest macro AUROC over 5"
    )


def test_headlines_name_the_hardest_class_and_the_commonest_mistake(made):
    _, page, report, _ = made
    root = check_page(page)
    on, best = report.sets[0], "model-0 probe"
    said = {
        one.attributes["id"]: next(p.text for p in one.all("p") if p.attributes.get("class") == "headline")
        for one in root.all("section")
        if one.attributes["id"] in ("curves", "decisions", "gallery")
    }
    matrix = np.array(on.confusion[best])
    recall = matrix.diagonal() / matrix.sum(axis=1)
    wrong = matrix - np.diag(matrix.diagonal())
    least = int(recall.argmin())
    assert f"finds {PHASES[least]} least: {recall[least]:.0%}".replace("%", " %") in said["decisions"]
    assert f"takes {wrong[least].max()} of {matrix[least].sum()} for" in said["decisions"]
    label, called = np.unravel_index(wrong.argmax(), wrong.shape)
    assert f"is wrong on {wrong.sum()} of 78 patches" in said["gallery"]
    assert f"takes {PHASES[label]} for {PHASES[called]} ({wrong.max()})" in said["gallery"]
    areas = [on.comparison.judgements[best].figures[f"auroc {k}"].value for k in range(5)]
    assert f"tells {PHASES[int(np.argmin(areas))]} from the rest worst" in said["curves"]
    cards = [one.text.split()[0] for one in root.all("h4") if "patches" in one.text][:5]
    assert cards == [PHASES[k].split()[0] for k in np.argsort(areas, kind="stable")]


def test_the_script_gets_what_every_run_says_of_every_patch(made):
    _, page, report, runs = made
    data = embedded(page, "data")
    assert data["names"] == list(PHASES)
    assert "thresholds" not in data
    for k, run in enumerate(runs):
        for s, on in enumerate(report.sets):
            judged = ensemble_of(run.predictions, on.dataset, on.split)
            at = {id: row for row, id in enumerate(judged.id.tolist())}
            rows = [row for row, of in enumerate(data["set"]) if of == s]
            p = judged.probability[[at[data["id"][row]] for row in rows]]
            label = [data["label"][row] for row in rows]
            assert [data["predicted"][k][row] for row in rows] == p.argmax(axis=1).tolist()
            assert [data["probability"][k][row] for row in rows] == pytest.approx(p.max(axis=1), abs=5.1e-5)
            of_label = p[np.arange(len(label)), label]
            assert [data["probability_of_label"][k][row] for row in rows] == pytest.approx(of_label, abs=5.1e-5)
    votes = {row: data["votes"][data["vote"][row]] for row in range(len(data["id"]))}
    table = runs[0].tables["cells"]
    given = dict(zip(table.id.tolist(), table.votes.tolist(), strict=True))
    assert all(votes[row] == "".join(map(str, given[id])) for row, id in enumerate(data["id"]))


def test_a_run_that_was_not_scored_says_nothing_of_a_patch(tmp_path):
    table = patches_of_classes("cells", 240, 5)
    run_of_classes(tmp_path, table)
    run_of_classes(tmp_path, table.select(table.split == "train"), model="other")
    data = embedded(page_of(tmp_path), "data")
    other = data["runs"].index("other probe")
    lacking = [row for row, on in enumerate(data["set"]) if data["sets"][on]["title"] == "cells, test"]
    assert len(lacking) == 78
    columns = (data[name][other] for name in ("probability", "probability_of_label", "predicted"))
    assert {tuple(column[row] for row in lacking) for column in columns} == {(None,) * 78, (-1,) * 78}


def test_of_many_patches_the_most_mistaken_are_shown(made, monkeypatch):
    _, _, report, runs = made
    whole = select_patches(report, runs)
    monkeypatch.setattr(gallery, "MOST", 40)
    found = select_patches(report, runs)
    for s in range(2):
        rows = whole.set_index == s
        p, label = whole.probability[:, rows], whole.label[rows]
        others = np.where(np.arange(5) == label[:, None], 0, p).max(axis=(0, 2))
        worst = whole.id[rows][np.argsort(-others, kind="stable")]
        mine = found.id[found.set_index == s].tolist()
        assert set(worst[: len(mine) // 2].tolist()) <= set(mine)
    assert found.probability.shape[2] == 5


def test_a_set_that_lacks_classes_says_which(tmp_path):
    runs_of_classes(tmp_path, patches_of_classes("cells", 240, 5, lacking=(1, 3)), n=2)
    page, report, _ = make_report(tmp_path, resampling=QUICK)
    root = check_page(page)
    assert report.sets[0].held == (0, 2, 4)
    assert report.notes == (
        "cells, test has no patch of metaphase and telophase: means over classes are over the 3 classes that it holds.",
    )
    assert "78 patches of 3 classes, 13 slides" in root.text
    assert "macro AUROC over 3 classes" in report.summary[0]
    rows = cells_of(root, "Every class of cells, test")
    assert rows[1] == ["metaphase", "0", "–"] + ["–"] * 6
    assert rows[0][1] != "0"
    for on in report.sets:
        (y,) = {
            tuple(ensemble_of(run.predictions, on.dataset, on.split).label.tolist()) for run in collected(tmp_path)[1]
        }
        each = [on.comparison.judgements["model-0 probe"].figures[f"auroc {k}"].value for k in sorted(set(y))]
        assert on.comparison.judgements["model-0 probe"].figures["auroc"].value == pytest.approx(np.mean(each))


def test_a_set_of_one_class_leaves_the_page_whole(tmp_path):
    table = patches_of_classes("cells", 240, 5)
    tested = (table.split == "test") & (table.label != 2)
    runs_of_classes(tmp_path, table.select(~tested), n=2)
    page, report, _ = make_report(tmp_path, resampling=QUICK)
    root = check_page(page)
    assert report.sets[0].held == (2,)
    assert "all of one class, there is no AUROC; the runs reach recalls of anaphase of" in report.summary[0]
    assert "means over classes do not exist there." in report.notes[0]
    assert "The set holds one class, and no curve tells it from others." in root.text


def test_runs_of_other_classes_are_refused(tmp_path):
    table = patches_of_classes("cells", 240, 5)
    run_of_classes(tmp_path / "a", table)
    run_of_classes(tmp_path / "a", table, PHASES[::-1], model="other")
    with pytest.raises(UserError, match=r"\(0\), .* \(4\) apart, and .*answer different.*`classes`"):
        collected(tmp_path / "a")
    run_of_classes(tmp_path / "b", table)
    run_of_classes(tmp_path / "b", table, model="other", ordinal=True)
    with pytest.raises(UserError, match=r"takes its classes to be ordered, and .* does not.*the same `ordinal`"):
        collected(tmp_path / "b")


def test_the_kappa_of_ordered_classes_is_said_to_be_weighted(tmp_path):
    runs_of_classes(tmp_path, n=1, ordinal=True)
    page, report, (run,) = make_report(tmp_path, resampling=QUICK)
    assert "kappa weighs an error by the square of its steps" in check_page(page).text
    judged = ensemble_of(run.predictions, "cells", "test", ordinal=True)
    assert report.ordinal
    plain = ensemble_of(run.predictions, "cells", "test")
    found = report.sets[0].comparison.judgements[run.label].figures["kappa"].value
    both = [
        evaluate(run.predictions, resampling=QUICK, ordinal=of.ordinal)
        .sets["cells/test"]
        .ensemble.figures["kappa"]
        .value
        for of in (judged, plain)
    ]
    assert found == pytest.approx(both[0], abs=1e-12)
    assert abs(both[0] - both[1]) > 1e-3


def test_hostile_class_names_stand_in_the_page_as_text(tmp_path):
    runs_of_classes(tmp_path, patches_of_classes("cells", 240, len(HOSTILE)), n=2, classes=HOSTILE)
    page, _, _ = make_report(tmp_path, resampling=QUICK)
    root = check_page(page)
    names = [row[0] for row in cells_of(root, "Every class of cells, test")]
    assert names == list(HOSTILE)
    options = [one.text for one in root.all("option")]
    assert all(options.count(name) == 2 for name in HOSTILE)  # true class and said class
    assert embedded(page, "data")["names"] == list(HOSTILE)


def test_as_many_classes_as_there_may_be_fit_on_the_page(tmp_path):
    names = tuple(f"class {k}" for k in range(MOST_CLASSES))
    table = patches_of_classes("cells", 900, MOST_CLASSES, votes=1)
    runs_of_classes(tmp_path, table, n=2, classes=names)
    page, report, _ = make_report(tmp_path, resampling=QUICK)
    root = check_page(page)
    assert len(page.encode()) < PAGE_BYTES / 2
    assert len(table_of(root, "Confusion of model-0 probe on cells, test")) == MOST_CLASSES
    assert "62 classes: class 0, " in root.text
    assert set("".join(embedded(page, "data")["votes"])) > set("09azAZ")
    assert report.sets[0].classes == names


def test_tables_for_papers_and_terminals_say_macro_and_no_threshold(made):
    folder, _, _, runs = made
    for format in ("markdown", "latex"):
        text, _, _ = make_report(folder, format=format, resampling=QUICK)
        assert "macro figures over 5 classes" in text
        assert "threshold" not in text
        assert "macro AUROC" in text
    records = [replace(run.record, metrics=evaluate(run.predictions, resampling=QUICK)) for run in runs]
    console = Console(record=True, width=200)
    points = {"a": ()}
    for table in [*result_tables(records), *curve_tables(points, n_classes=5)]:
        console.print(table)
    text = console.export_text()
    assert "means over the classes that a set holds" in text
    assert "threshold" not in text.lower()
    assert "macro AUROC" in text
