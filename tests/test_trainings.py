"""Do several trainings of a run count as what they are: a scatter of their own, beside that of slides?"""

from __future__ import annotations

import math
from dataclasses import replace
from operator import itemgetter

import numpy as np
import pytest

from features.console import UserError
from probe.ensembles import Ensemble, ensemble_of
from probe.evidence import Question, compare, fold_figures, judge
from probe.metrics import auroc, balanced_accuracy, best_threshold
from probe.predictions import VALIDATION, Predictions
from probe.resample import Resampling, resample
from probe.significance import difference
from probe.trainings import chance_to_turn, variance_parts

QUICK = Resampling(replicates=400)
N_FOLDS = 3


def predictions(seeds=(7, 8), *, noise: float = 1.0, n: int = 60, rng_seed: int = 0, gain: float = 1.0) -> Predictions:
    """A run on 60 training and 60 test patches of ten slides each: every training adds noise of its own."""
    rng = np.random.default_rng(rng_seed)
    columns: dict[str, list] = {name: [] for name in ("id", "label", "group", "split", "fold", "seed", "logit")}
    for split in (VALIDATION, "test"):
        for patch in range(n):
            label, base = patch % 2, rng.standard_normal() + gain * (patch % 2)
            for seed in seeds:
                for fold in [patch % N_FOLDS] if split == VALIDATION else range(N_FOLDS):
                    row = (f"{split}-{patch}", label, f"{split}-{patch // 6}", split, fold, seed)
                    value = base + noise * rng.standard_normal()
                    for name, cell in zip(columns, (*row, value), strict=True):
                        columns[name].append(cell)
    arrays = {name: np.array(values) for name, values in columns.items()}
    return Predictions(
        dataset=np.full(len(arrays["id"]), "mine"),
        **{**arrays, "label": arrays["label"].astype(np.int8), "logit": arrays["logit"].astype(np.float32)[:, None]},
    )


def test_every_training_has_its_own_ensemble_and_its_own_threshold():
    run = predictions()
    judged = ensemble_of(run, "mine", "test")
    assert judged.by_training.shape == (2, 60, 2)
    for number, seed in enumerate((7, 8)):
        rows = (run.seed == seed) & (run.id == "test-4")
        assert judged.positive[number, 4] == pytest.approx(run.probability[rows, 1].mean(), abs=1e-15)
        held_out = (run.seed == seed) & (run.split == VALIDATION)
        assert judged.thresholds[number] == best_threshold(run.label[held_out], run.probability[held_out, 1])
    assert judged.probability == pytest.approx(judged.by_training.mean(axis=0), abs=1e-15)
    assert judged.prior == 0.5


def test_figures_are_means_over_trainings_each_at_its_threshold():
    judged = ensemble_of(predictions(noise=3), "mine", "test")
    figures = judge(judged, resampling=QUICK).figures
    each = [auroc(judged.label, one) for one in judged.positive]
    assert each[0] != each[1]
    assert figures["auroc"].value == pytest.approx(np.mean(each), abs=1e-12)
    cut = [
        balanced_accuracy(judged.label, one >= threshold)
        for one, threshold in zip(judged.positive, judged.thresholds, strict=True)
    ]
    assert figures["balanced_accuracy"].value == pytest.approx(np.mean(cut), abs=1e-12)
    assert figures["auroc"].value != pytest.approx(auroc(judged.label, judged.probability[:, 1]), abs=1e-6)


def test_an_interval_over_trainings_is_wider_by_their_scatter():
    judged = ensemble_of(predictions(seeds=(1, 2, 3), noise=3), "mine", "test")
    figure, over = judge(judged, resampling=QUICK).figures["auroc"], judge(judged, resampling=QUICK).over
    assert over == "other slides and trainings"
    clusters = judged.clusters
    resampled = resample([judged.tallies(clusters)], clusters, QUICK)
    fixed, both = resampled.spread("auroc", itemgetter(0)), resampled.of("auroc", 0)
    each = [auroc(judged.label, one) for one in judged.positive]
    assert both.standard_error**2 - fixed.standard_error**2 == pytest.approx(np.var(each, ddof=1) / 3, rel=1e-9)
    assert figure.high - figure.low > np.subtract(*reversed(fixed.ends(0.95, within=(0, 1))))
    alike = np.repeat(judged.by_training[:1], 3, axis=0)  # three trainings that do not differ add nothing
    same = judge(replace(judged, by_training=alike, thresholds=judged.thresholds[[0, 0, 0]]), resampling=QUICK)
    alone = judge(
        replace(judged, by_training=judged.by_training[:1], thresholds=judged.thresholds[:1]), resampling=QUICK
    )
    assert alone.over == "other slides"
    ends = [(one.figures["auroc"].low, one.figures["auroc"].high) for one in (same, alone)]
    assert ends[0] == pytest.approx(ends[1], abs=1e-9)


def test_out_of_fold_predictions_are_judged_at_one_half_where_nothing_was_chosen():
    run = predictions()
    judged = ensemble_of(run, "mine", VALIDATION)
    assert judged.thresholds.tolist() == [0.5, 0.5]
    assert judged.threshold == 0.5
    assert ensemble_of(run, "mine", "test").threshold != 0.5


def two_runs(split: str) -> dict[str, Ensemble]:
    return {
        name: ensemble_of(predictions(rng_seed=k, gain=1 + k, seeds=(7,)), "mine", split)
        for k, name in enumerate(("probe", "lora"))
    }


def test_out_of_fold_a_difference_has_no_p_where_a_run_chose_on_these_patches():
    """Of 8 epochs the best is better than it would be elsewhere: equal runs then differ in 12 to 19 of 100 cases."""
    runs = two_runs(VALIDATION)
    folds = {
        name: fold_figures(predictions(rng_seed=k, gain=1 + k, seeds=(7,)), "mine", VALIDATION)
        for k, name in enumerate(runs)
    }
    (tested,) = compare(runs, resampling=QUICK, folds=folds).pairs
    (chosen,) = compare(runs, resampling=QUICK, folds=folds, chose={"lora": "its epoch"}).pairs
    assert tested.untested == ""
    assert tested.differences["auroc"].p < 1
    assert 0 < tested.resampled_t["auroc"].p < 1
    assert chosen.untested == "lora chose its epoch on these very patches"
    assert math.isnan(chosen.differences["auroc"].p)
    assert math.isnan(chosen.differences["auroc"].p_holm)
    assert chosen.resampled_t == {}
    assert chosen.differences["auroc"].low == tested.differences["auroc"].low  # the interval stays


def test_the_test_over_folds_is_of_the_figures_of_the_folds():
    runs = two_runs(VALIDATION)
    made = {name: predictions(rng_seed=k, gain=1 + k, seeds=(7,)) for k, name in enumerate(runs)}
    folds = {name: fold_figures(one, "mine", VALIDATION) for name, one in made.items()}
    (pair,) = compare(runs, resampling=QUICK, folds=folds).pairs
    each = [
        auroc(made["probe"].label[rows], made["probe"].logit[rows, 0])
        - auroc(made["lora"].label[rows], made["lora"].logit[rows, 0])
        for rows in ((made["probe"].split == VALIDATION) & (made["probe"].fold == fold) for fold in range(N_FOLDS))
    ]
    assert pair.resampled_t["auroc"].value == pytest.approx(np.mean(each), abs=1e-12)
    (on_tests,) = compare(two_runs("test"), resampling=QUICK, folds=folds).pairs
    assert on_tests.resampled_t == {}


def test_what_a_set_can_show_is_said_for_its_pairs_and_for_a_difference_that_is_asked_for():
    compared = compare(two_runs("test"), resampling=QUICK, question=Question(wanted=0.01))
    shown, (pair,) = compared.detectable["auroc"], compared.pairs
    assert shown.one == shown.low == shown.high == pair.differences["auroc"].detectable
    assert shown.slides is not None
    assert shown.n_clusters == 10
    assert shown.slides == pytest.approx(10 * (shown.one / 0.01) ** 2, rel=0.35)  # t needs fewer with more slides
    assert compare({"probe": two_runs("test")["probe"]}, resampling=QUICK).detectable == {}


def test_trainings_of_a_run_are_reported_only_where_there_are_several():
    made = {"lora": predictions(seeds=(1, 2, 3), noise=3), "probe": predictions(seeds=(1,))}
    runs = {name: ensemble_of(one, "mine", "test") for name, one in made.items()}
    folds = {name: fold_figures(one, "mine", "test") for name, one in made.items()}
    compared = compare(runs, resampling=QUICK, folds=folds, exact=["probe"])
    assert list(compared.trainings) == ["lora"]
    parts = compared.trainings["lora"].figures["auroc"]
    assert np.mean(parts.each) == pytest.approx(compared.judgements["lora"].figures["auroc"].value, abs=1e-12)
    assert parts.ensemble_training == pytest.approx(np.std(parts.each, ddof=1), abs=1e-12)
    assert 0 < parts.ensemble_slide < 0.5
    (pair,) = compared.pairs
    assert 0 < pair.turned["auroc"] < 1
    (unknown,) = compare(runs, resampling=QUICK, folds=folds).pairs  # a probe that might scatter, trained once
    assert math.isnan(unknown.turned["auroc"])


def test_the_parts_of_variance_are_those_that_were_put_in():
    rng = np.random.default_rng(0)
    tables = [
        0.7
        + 0.03 * rng.standard_normal((4, 1))
        + 0.05 * rng.standard_normal((1, 5))
        + 0.02 * rng.standard_normal((4, 5))
        for _ in range(500)
    ]
    parts = [variance_parts(table, table.mean(axis=1), slide=0.0) for table in tables]
    # Variances are estimated without bias, but for those cut off at 0; the mean of 500 is known to 4 %.
    assert np.mean([part.training**2 for part in parts]) == pytest.approx(0.03**2, rel=0.2)
    assert np.mean([part.fold**2 for part in parts]) == pytest.approx(0.05**2, rel=0.2)
    assert np.mean([part.residual**2 for part in parts]) == pytest.approx(0.02**2, rel=0.1)


def test_the_chance_to_turn_is_how_often_new_trainings_turn():
    """Truths of all sizes: three trainings of each run, then one more of each."""
    rng = np.random.default_rng(0)
    said, happened = [], []
    for gain in np.linspace(-0.15, 0.15, 1_000):
        first, second = gain + 0.02 * rng.standard_normal(3), 0.02 * rng.standard_normal(3)
        new = gain + 0.02 * rng.standard_normal() - 0.02 * rng.standard_normal()
        said.append(chance_to_turn(first, second))
        happened.append((new > 0) != (first.mean() > second.mean()))
    # Some 10 % turn: known to 1 %.
    assert np.mean(said) == pytest.approx(np.mean(happened), abs=0.03)
    assert math.isnan(chance_to_turn(np.array([0.8]), np.array([0.7])))
    assert chance_to_turn(np.array([0.8, 0.8]), np.array([0.7])) == 0
    assert chance_to_turn(np.array([0.8, 0.8]), np.array([0.8])) == 0.5


@pytest.mark.parametrize("value", [0, 1, -0.02, 2])
def test_a_margin_that_is_no_difference_is_refused(value):
    with pytest.raises(UserError, match=r"margin=.*between 0 and 1"):
        Question(margin=value)
    with pytest.raises(UserError, match=r"difference=.*between 0 and 1"):
        Question(wanted=value)


def test_a_difference_contains_the_scatter_of_both_runs():
    made = [ensemble_of(predictions(seeds=(1, 2, 3), noise=3, rng_seed=k), "mine", "test") for k in range(2)]
    clusters = made[0].clusters
    resampled = resample([one.tallies(clusters) for one in made], clusters, QUICK)
    found = difference(resampled, "auroc", 0, 1)
    each = [[auroc(one.label, values) for values in one.by_training] for one in made]
    expected = math.sqrt(sum(np.var(values, ddof=1) / 3 for values in each))
    assert found.training_error == pytest.approx(expected, abs=1e-12)
    assert found.standard_error > expected
