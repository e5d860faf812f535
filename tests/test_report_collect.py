"""Are a report's figures those of the runs' predictions, whatever the runs know and lack?"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_pages import OTHER_FOLDS, QUICK, collected, two_runs
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    recall_score,
    roc_auc_score,
)
from test_runs import N_FOLDS, TABLES, edit_record, made_run, patches, predicted

from features.console import UserError
from features.samples import make_samples
from probe.ensembles import ensemble_of
from probe.evidence import COMPARED, Question
from probe.metrics import as_dict
from probe.predictions import Predictions, concatenate, predictions_of
from probe.report.collect import ReportOptions, collect
from probe.report.gallery import select_patches
from probe.report.read import read_runs
from probe.significance import holm as holm_of


def test_figures_are_scikit_learn_s(tmp_path):
    two_runs(tmp_path)
    report, runs = collected(tmp_path)
    assert [on.name for on in report.sets] == ["ami-br/test", "atnorm-br/test", "atnorm-md/test", "ami-br/validation"]
    for on, run in itertools.product(report.sets, runs):
        judged = ensemble_of(run.predictions, on.dataset, on.split)
        y, p, said = judged.label, judged.probability[:, 1], judged.probability[:, 1] >= judged.threshold
        found = {name: one.value for name, one in on.comparison.judgements[run.label].figures.items()}
        assert found == pytest.approx(
            {
                "balanced_accuracy": balanced_accuracy_score(y, said),
                "auroc": roc_auc_score(y, p),
                "average_precision": average_precision_score(y, p),
                "sensitivity": recall_score(y, said),
                "specificity": recall_score(1 - y, ~said),
                "f1": f1_score(y, said),
                "mcc": matthews_corrcoef(y, said),
                "brier": brier_score_loss(y, p),
                "ece": found["ece"],
            }
        )
        (tn, fp), (fn, tp) = confusion_matrix(y, said)
        assert on.confusion[run.label] == ((tn, fp), (fn, tp))
        assert on.counts == (tn + fp, fn + tp)
        assert (on.n, on.n_positive) == (len(y), tp + fn)
        part = run.predictions.select((run.predictions.dataset == on.dataset) & (run.predictions.split == on.split))
        each = [
            roc_auc_score(part.label[part.fold == fold], part.probability[part.fold == fold, 1])
            for fold in range(N_FOLDS)
        ]
        folds = on.folds[run.label]["auroc"]
        assert folds.each == pytest.approx(each)
        assert (folds.mean, folds.std) == pytest.approx((np.mean(each), np.std(each)))


def curves_of(logit: np.ndarray, label: np.ndarray, runs: Path):
    """One run whose single fold model says these logits of a test set."""
    table = make_samples(
        [f"{k}" for k in range(len(label))], label.tolist(), sha256=[""] * len(label), split=["test"] * len(label)
    )
    tables = {"mine": patches("mine", 36, test_from=36), "t": table}
    parts = predicted({"mine": tables["mine"]}, "mine")
    test = predictions_of("t", table, split="test", fold=np.array([0]), logit=logit[:, None, None])
    made_run(runs, tables=tables, train="mine", predictions=concatenate([parts, test]))
    report, (run,) = collected(runs)
    return report.sets[0].curves[run.label][0], ensemble_of(run.predictions, "t", "test")


def test_the_area_under_the_drawn_curve_is_the_auroc_ties_included(tmp_path):
    rng = np.random.default_rng(0)
    label = (np.arange(120) % 3 == 0).astype(np.int8)
    cases = {
        "ties": np.round(label + rng.standard_normal(120)).astype("f4"),
        "distinct": (label + rng.standard_normal(120)).astype("f4"),
        "all equal": np.zeros(120, dtype="f4"),
    }
    for name, logit in cases.items():
        curves, judged = curves_of(logit, label, tmp_path / name)
        x, y = np.array(curves.roc).T
        assert curves.roc[0] == (0, 0)
        assert curves.roc[-1] == (1, 1)
        assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(label, judged.probability[:, 1]), abs=1e-12), name
        recall, precision = np.array(curves.precision_recall).T
        area = (np.diff(recall, prepend=0) * precision).sum()
        assert area == pytest.approx(average_precision_score(label, judged.probability[:, 1]), abs=1e-12), name
        assert sum(count for *_, count in curves.calibration) == 120
        rate = sum(observed * count for _, observed, count in curves.calibration) / 120
        assert rate == pytest.approx(label.mean())


def test_a_long_curve_is_drawn_with_fewer_points_and_the_same_area(tmp_path):
    rng = np.random.default_rng(0)
    label = (np.arange(3000) % 3 == 0).astype(np.int8)
    curves, judged = curves_of((label + rng.standard_normal(3000)).astype("f4"), label, tmp_path)
    assert len(curves.roc) <= 401
    x, y = np.array(curves.roc).T
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(label, judged.probability[:, 1]), abs=2e-3)


def test_the_fullest_patch_table_serves_all_runs(tmp_path):
    first, _ = two_runs(tmp_path)
    whole, _ = collected(tmp_path)
    (first / "samples.csv").unlink()
    edit_record(first, sha256=None)
    report, runs = collected(tmp_path)
    for on, before in zip(report.sets, whole.sets, strict=True):
        assert as_dict(on.raters) == as_dict(before.raters)
        assert as_dict(on.domains) == as_dict(before.domains)
    assert set(report.sets[0].raters) == set(report.sets[2].domains) == {"uni probe", "virchow probe"}
    assert (report.sets[1].raters, report.sets[1].domains) == ({}, {})
    patches_shown = select_patches(report, runs)
    assert set(patches_shown.votes) >= {"111", "000"}
    assert set(patches_shown.domain.tolist()) == {"", "domain 0", "domain 1", "domain 2"}


def test_domains_without_votes_are_shown_whichever_run_knows_them(tmp_path):
    table = patches("mine", 48, domains=3, test_from=24)
    first, _ = two_runs(tmp_path, tables={"mine": table}, train="mine")
    (first / "samples.csv").unlink()
    report, runs = collected(tmp_path)
    assert report.sets[0].domains
    found = select_patches(report, runs)
    domain = dict(zip(table.id.tolist(), table.domain.tolist(), strict=True))
    assert found.domain.tolist() == [domain[id] for id in found.id.tolist()]


def flat(value: Any, name: str = "") -> dict[str, float]:
    """The numbers of nested results, by where they stand."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: number for k, one in pairs for key, number in flat(one, f"{name}/{k}").items()}
    return {name: value} if isinstance(value, int | float) else {}


def test_patches_may_come_in_any_order(tmp_path):
    two_runs(tmp_path / "a")
    before, _ = collected(tmp_path / "a")
    made_run(tmp_path / "b", "uni", signal=0.6)
    shuffled = predicted(TABLES, "ami-br", signal=0.3, seed=1)
    shuffled = shuffled.select(np.random.default_rng(0).permutation(len(shuffled.id)))
    made_run(tmp_path / "b", "virchow", predictions=shuffled)
    report, runs = collected(tmp_path / "b")
    by_name = {on.name: on for on in report.sets}
    for on in before.sets:
        again = by_name[on.name]
        for part in ("raters", "domains", "comparison"):
            assert flat(as_dict(getattr(again, part))) == pytest.approx(flat(as_dict(getattr(on, part))), abs=1e-12)
    found = select_patches(report, runs)
    for run, probability in zip(runs, found.probability, strict=True):
        for k, on in enumerate(report.sets):
            judged = ensemble_of(run.predictions, on.dataset, on.split)
            of = dict(zip(judged.id.tolist(), judged.probability.tolist(), strict=True))
            rows = np.flatnonzero(found.set_index == k)
            assert probability[rows].tolist() == [of[id] for id in found.id[rows].tolist()]


def test_identical_patches_are_noted(tmp_path):
    table = replace(TABLES["atnorm-br"], sha256=np.array([f"{k // 2}" for k in range(24)]))
    two_runs(tmp_path, tables=TABLES | {"atnorm-br": table})
    report, _ = collected(tmp_path)
    assert report.notes == (
        "atnorm-br, test holds 12 sets of byte-identical patches; in resamples they are drawn together.",
    )
    judged = report.sets[1].any_judgement
    assert (judged.n, judged.n_clusters, judged.unit) == (24, 12, "sample")
    assert report.sets[1].comparison.pairs[0].delong is None  # patients are not known: patches may share one


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("patches", "judged on different patches of atnorm-br"),
        ("label", "have different labels for 1 patches of atnorm-br"),
        ("group", "have different slides for 1 patches of atnorm-br"),
    ],
)
def test_runs_of_different_patches_are_refused(change, said, tmp_path):
    made_run(tmp_path, "uni")
    other = TABLES["atnorm-br"]
    if change == "patches":
        other = other.select(np.arange(len(other)) > 0)
    else:
        column = getattr(other, change).copy()
        column = column.astype("<U9") if change == "group" else column
        column[0] = "slide 9" if change == "group" else 1 - column[0]
        other = replace(other, **{change: column})
    made_run(tmp_path, "virchow", tables=TABLES | {"atnorm-br": other}, seed=1)
    with pytest.raises(UserError, match=said):
        collected(tmp_path)


def test_predictions_of_a_patch_twice_are_refused_by_run(tmp_path):
    written = predicted(TABLES, "ami-br")
    twice = concatenate([written, written.select(np.arange(len(written.id)) == len(written.id) - 1)])
    assert isinstance(twice, Predictions)
    folder = made_run(tmp_path, predictions=twice)
    with pytest.raises(UserError, match=r"a patch occurs twice for one fold") as said:
        collected(tmp_path)
    assert str(folder) in str(said.value)


# --- what stands beside what ------------------------------------------------------------------------------------------


def test_runs_on_other_folds_meet_on_test_sets_and_stand_apart_out_of_fold(tmp_path):
    two_runs(tmp_path)
    edit_record(made_run(tmp_path, "conch", digest=OTHER_FOLDS, seed=5), created="2999-01-01T00:00:00Z")  # the last
    report, _ = collected(tmp_path)
    assert [(on.name, on.fold_digest[:4]) for on in report.sets] == [
        ("ami-br/test", ""),
        ("atnorm-br/test", ""),
        ("atnorm-md/test", ""),
        ("ami-br/validation", "f01d"),
        ("ami-br/validation", OTHER_FOLDS[:4]),
    ]
    on_test, *_, ours, others = report.sets
    assert set(on_test.comparison.judgements) == {"uni probe", "virchow probe", "conch probe"}
    assert all(pair.differences["auroc"].p > 0 for pair in on_test.comparison.pairs)
    assert set(ours.comparison.judgements) == {"uni probe", "virchow probe"}
    assert set(others.comparison.judgements) == {"conch probe"}
    assert ours.missing == ("conch probe",)
    assert not any("not scored" in note for note in report.notes)  # nothing that --test could mend


def test_out_of_fold_only_runs_that_chose_nothing_there_are_tested(tmp_path):
    two_runs(tmp_path)
    last = made_run(tmp_path, "conch", seed=5, kind="finetune", method="lora")
    edit_record(last, created="2999-01-01T00:00:00Z")
    report, _ = collected(tmp_path)
    pairs = {(pair.first, pair.second): pair for pair in report.sets[-1].comparison.pairs}
    assert pairs["uni probe", "virchow probe"].untested == ""
    assert pairs["uni probe", "virchow probe"].resampled_t["auroc"].p > 0
    chosen = pairs["uni probe", "conch lora"]
    assert chosen.untested == "conch lora chose its epoch on these very patches"
    assert np.isnan(chosen.differences["auroc"].p)
    assert report.sets[0].comparison.pairs[1].differences["auroc"].p > 0


def test_holm_over_all_sets_and_figures_counts_all_tests(tmp_path):
    two_runs(tmp_path)
    read, _ = read_runs(tmp_path)
    alone, over_all = (
        collect(read, resampling=QUICK, options=ReportOptions(holm=holm)).sets for holm in ("set", "all")
    )
    p = [pair.differences[name].p for on in alone for pair in on.comparison.pairs for name in COMPARED]
    expected = holm_of(p)
    found = [pair.differences[name].p_holm for on in over_all for pair in on.comparison.pairs for name in COMPARED]
    assert found == pytest.approx(expected, abs=1e-12)
    assert found != [pair.differences[name].p_holm for on in alone for pair in on.comparison.pairs for name in COMPARED]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prevalences": (1.5,)}, "prevalence=1.5.*between 0 and 1"),
        ({"specificity": 1.0}, "specificity=1.*between 0 and 1"),
        ({"holm": "some"}, "unknown `holm='some'`: use set or all"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked, said):
    with pytest.raises(UserError, match=said):
        ReportOptions(**asked)


def test_what_was_asked_is_answered(tmp_path):
    two_runs(tmp_path)
    read, _ = read_runs(tmp_path)
    options = ReportOptions(question=Question(margin=0.05, wanted=0.1), prevalences=(0.1,), specificity=0.8)
    report = collect(read, resampling=QUICK, options=options)
    on = report.sets[0]
    assert (report.margin, report.wanted, report.prevalences) == (0.05, 0.1, (0.1,))
    assert 0 <= on.comparison.pairs[0].differences["auroc"].p_equivalent <= 1
    assert on.comparison.detectable["auroc"].slides is not None
    assert [one.prevalence for one in on.calibration["uni probe"].predictive_values] == [0.1]
    assert report.sets[2].thresholds["uni probe"].specificity == 0.8
    assert set(on.rates) == {"uni probe", "virchow probe"}
    assert report.sets[1].rates == {}  # no slides there
    assert report.sets[-1].thresholds == report.sets[-1].rates == {}  # out of fold
    assert report.across is not None
