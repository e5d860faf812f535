"""Do calibration figures equal those of other packages, and are corrected probabilities what they should be?"""

import numpy as np
import pytest
from drawn_runs import QUICK, patches, some_run
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_score

from features.console import UserError
from probe import calibration
from probe.calibration import ACTING_FROM, CALIBRATION_FIGURES, calibrate
from probe.metrics import scores


def slope_and_intercept(label, logits):
    """By scikit-learn; the intercept with the slope held at 1 by bisection of its gradient."""
    fit = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logits[:, None], label)
    low, high = -30.0, 30.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (label - expit(logits + middle)).sum() > 0 else (low, middle)
    return float(fit.coef_[0, 0]), low


def test_slope_and_intercept_are_those_of_a_logistic_regression_on_the_logit():
    run = some_run(prior=0.2)
    found = calibrate(run, resampling=QUICK)
    for figures, shift in ((found.raw, 0.0), (found.corrected, logit(0.2))):
        slope, intercept = slope_and_intercept(run.label, logit(run.probability[:, 1]) + shift)
        assert figures["slope"].value == pytest.approx(slope, abs=1e-5)  # how far scikit-learn iterates
        assert figures["intercept"].value == pytest.approx(intercept, abs=1e-8)
        assert figures["slope"].low < slope < figures["slope"].high
        assert figures["intercept"].low < intercept < figures["intercept"].high


def test_probabilities_are_corrected_for_the_training_prior():
    run = some_run(prior=0.2)
    found = calibrate(run, resampling=QUICK)
    odds = run.probability[:, 1] / (1 - run.probability[:, 1]) * 0.25  # prior odds of 1 to 4
    for figures, probability in ((found.raw, run.probability[:, 1]), (found.corrected, odds / (1 + odds))):
        expected = scores(run.label, probability)
        assert figures["brier"].value == pytest.approx(expected["brier"], abs=1e-12)
        assert figures["ece"].value == pytest.approx(expected["ece"], abs=1e-12)
    assert (found.prior, found.prevalence) == (0.2, run.label.mean())


def test_a_run_that_says_what_is_the_case_after_correction():
    """Labels drawn from the corrected probabilities: slope 1 and intercept 0, where raw probabilities are too high."""
    rng = np.random.default_rng(0)
    true = rng.normal(-1.5, 1.5, 1200)
    run = patches(rng.random(1200) < expit(true), expit(true - logit(0.25)), prior=0.25)
    found = calibrate(run, resampling=QUICK)
    for name, right in (("slope", 1), ("intercept", 0)):
        assert found.corrected[name].low < right < found.corrected[name].high
    assert found.raw["intercept"].high < -0.5  # log(1 / 3) is -1.1
    assert found.corrected["ece"].value < 0.3 * found.raw["ece"].value


def test_one_step_on_a_resample_is_nearly_a_refit():
    """Steps and refits agree to a small part of their scatter, on 25 resamples of 30 slides."""
    run = some_run(seed=1)
    clusters, logits, label = run.clusters, logit(run.probability[:, 1]), run.label.astype(float)
    statistic = calibration._agreement(label, logits, clusters)
    rng = np.random.default_rng(0)
    count = rng.multinomial(clusters.n, np.full(clusters.n, 1 / clusters.n), size=25).astype(float)
    steps = statistic(count)
    refits = np.array(
        [slope_and_intercept(*np.repeat([label, logits], c[clusters.index].astype(int), 1)) for c in count]
    )
    for k, name in enumerate(("slope", "intercept")):
        assert np.abs(steps[name] - refits[:, k]).mean() < 0.12 * refits[:, k].std()
        assert np.corrcoef(steps[name], refits[:, k])[0, 1] > 0.97


def test_without_a_prior_nothing_is_corrected():
    found = calibrate(some_run(prior=np.nan), resampling=QUICK)
    assert np.isnan([found.corrected[name].value for name in CALIBRATION_FIGURES]).all()
    assert found.net_benefit.run == ()
    assert np.isfinite([found.raw[name].value for name in CALIBRATION_FIGURES]).all()


def test_figures_that_do_not_exist():
    parted = calibrate(patches([0, 0, 1, 1] * 5, [0.1, 0.2, 0.7, 0.9] * 5, prior=0.5), resampling=QUICK)
    assert np.isnan(parted.raw["slope"].value)  # infinitely steep
    assert np.isfinite(parted.raw["intercept"].value)
    one_class = calibrate(patches([0] * 8, np.linspace(0.1, 0.8, 8), prior=0.5), resampling=QUICK, prevalences=(0.2,))
    assert np.isnan([one_class.raw[name].value for name in ("slope", "intercept")]).all()
    assert one_class.raw["brier"].value > 0
    assert np.isnan(one_class.predictive_values[0].ppv.value)
    certain = calibrate(patches([0, 1, 0, 1], [0.0, 1.0, 1.0, 0.0], prior=0.5), resampling=QUICK)  # logits without end
    assert np.isfinite(certain.raw["intercept"].value)


def test_predictive_values_are_those_of_a_set_with_that_prevalence():
    """Of 200 patches with a prevalence of 20 %, made of the same patches by repeating the negatives."""
    label, probability = np.array([1, 1, 1, 1, 0, 0, 0, 0]), np.array([0.9, 0.8, 0.7, 0.3, 0.6, 0.2, 0.2, 0.1])
    (found,) = calibrate(patches(label, probability), prevalences=(0.2,), resampling=QUICK).predictive_values
    many = np.concatenate([np.repeat([0, 1, 2, 3], 10), np.repeat([4, 5, 6, 7], 40)])
    predicted = probability[many] >= 0.5
    assert found.ppv.value == pytest.approx(precision_score(label[many], predicted), abs=1e-12)
    assert found.npv.value == pytest.approx(precision_score(label[many], predicted, pos_label=0), abs=1e-12)
    assert found.prevalence == 0.2
    with pytest.raises(UserError, match=r"`prevalence=20`: expected a share between 0 and 1"):
        calibrate(patches(label, probability), prevalences=(20,))


def test_predictive_values_move_with_prevalence_and_have_intervals():
    rare, common = calibrate(some_run(), prevalences=(0.05, 0.5), resampling=QUICK).predictive_values
    assert rare.ppv.value < common.ppv.value
    assert rare.npv.value > common.npv.value
    for one in (rare.ppv, rare.npv, common.ppv, common.npv):
        assert 0 <= one.low < one.value < one.high <= 1


def test_net_benefit_is_that_of_vickers_and_elkin():
    run = some_run(prior=0.2)
    curve = calibrate(run, resampling=QUICK).net_benefit
    p = expit(logit(run.probability[:, 1]) + logit(0.2))
    for k, at in enumerate(ACTING_FROM):
        tp, fp = ((p >= at) & (run.label == 1)).mean(), ((p >= at) & (run.label == 0)).mean()
        assert curve.run[k] == pytest.approx(tp - fp * at / (1 - at), abs=1e-12)
        assert curve.all[k] == pytest.approx(run.label.mean() - (1 - run.label.mean()) * at / (1 - at), abs=1e-12)
        assert np.isnan(curve.low[k]) or curve.low[k] <= curve.run[k] <= curve.high[k]
    assert min(curve.low) < 0  # never cut at 0: acting may do harm


def test_several_trainings_are_averaged():
    run = some_run(trainings=3, prior=0.2)
    whole = calibrate(run, resampling=QUICK, prevalences=(0.2,))
    each = [
        calibrate(
            patches(run.label, p, group=run.group, threshold=0.65, prior=0.2), resampling=QUICK, prevalences=(0.2,)
        )
        for p in run.positive
    ]
    for name in CALIBRATION_FIGURES:
        assert whole.corrected[name].value == pytest.approx(np.mean([one.corrected[name].value for one in each]))
    ppv = np.mean([one.predictive_values[0].ppv.value for one in each])
    assert whole.predictive_values[0].ppv.value == pytest.approx(ppv)
    assert whole.net_benefit.run[5] == pytest.approx(np.mean([one.net_benefit.run[5] for one in each]))
