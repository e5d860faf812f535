"""Do the figures equal scikit-learn's, ties and absent classes included?"""

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sk

from probe import metrics, tally


def data(seed: int, n: int = 400, decimals: int = 2):
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.2).astype(np.int8)
    p = np.clip(np.round(0.3 + 0.2 * y + 0.25 * rng.standard_normal(n), decimals), 0, 1)  # rounded: many ties
    return y, p


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_scikit_learns(seed):
    y, p = data(seed)
    found = metrics.scores(y, p, threshold=0.4)
    predicted = p >= 0.4
    expected = {
        "balanced_accuracy": sk.balanced_accuracy_score(y, predicted),
        "auroc": sk.roc_auc_score(y, p),
        "average_precision": sk.average_precision_score(y, p),
        "sensitivity": sk.recall_score(y, predicted),
        "specificity": sk.recall_score(1 - y, ~predicted),
        "f1": sk.f1_score(y, predicted),
        "mcc": sk.matthews_corrcoef(y, predicted),
        "brier": sk.brier_score_loss(y, p),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert set(found) == set(metrics.NAMES)


def test_average_precision_is_that_of_the_positive_class():
    y = np.array([1, 0, 0, 0])
    assert metrics.average_precision(y, [0.9, 0.1, 0.2, 0.3]) == 1.0
    assert metrics.average_precision(y, [0.0, 0.1, 0.2, 0.3]) == 0.25


def test_calibration_error_of_known_predictions():
    assert metrics.expected_calibration_error([0, 1, 1, 1], [0.75] * 4) == pytest.approx(0)
    assert metrics.expected_calibration_error([0, 0, 1, 1], [0.9] * 4) == pytest.approx(0.4)


def test_an_absent_class_gives_nan_not_a_number():
    assert np.isnan(metrics.auroc([1, 1], [0.1, 0.2]))
    assert np.isnan(metrics.balanced_accuracy([0, 0], [0, 1]))
    with pytest.raises(ValueError, match="both classes"):
        metrics.best_threshold([1, 1], [0.1, 0.2])


def test_best_threshold_is_the_best_of_all():
    y, p = data(7)
    chosen = metrics.best_threshold(y, p)
    reached = sk.balanced_accuracy_score(y, p >= chosen)
    every = [sk.balanced_accuracy_score(y, p >= t) for t in np.unique(p)]
    assert reached == pytest.approx(max(every))


def test_balanced_log_loss_weighs_both_classes_the_same():
    y = np.array([1, 0, 0, 0])
    logit = np.array([[0.0], [0.0], [0.0], [0.0]])
    assert metrics.balanced_log_loss(y, logit) == pytest.approx(np.log(2))
    confident = np.array([[-1000.0], [-1000.0], [-1000.0], [-1000.0]])
    assert metrics.balanced_log_loss(y, confident) == pytest.approx(500)


def resamples(seed: int, n_clusters: int, n: int, replicates: int = 30):
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, n_clusters, n)
    count = np.stack(
        [np.bincount(rng.integers(0, n_clusters, n_clusters), minlength=n_clusters) for _ in range(replicates)]
    )
    return cluster, count


@pytest.mark.parametrize("dense", [0, 40, 10**9], ids=["gathered", "as chosen", "multiplied"])
@pytest.mark.parametrize("n_clusters", [12, 400])
def test_every_resample_equals_scikit_learns_with_weights(monkeypatch, dense, n_clusters):
    monkeypatch.setattr(tally, "_DENSE", dense)
    y, p = data(3)
    cluster, count = resamples(0, n_clusters, len(y))
    found = tally.tally(y, p, cluster=cluster, n_clusters=n_clusters)(count)
    for j, weight in enumerate(count[:, cluster]):
        assert found["auroc"][j] == pytest.approx(sk.roc_auc_score(y, p, sample_weight=weight), abs=1e-12)
        precision = sk.average_precision_score(y, p, sample_weight=weight)
        assert found["average_precision"][j] == pytest.approx(precision, abs=1e-12)


@pytest.mark.parametrize("block", [1, 2**17], ids=["one resample at a time", "as chosen"])
def test_every_resample_equals_the_figures_of_its_repeated_rows(monkeypatch, block):
    monkeypatch.setattr(tally, "_BLOCK", block)
    y, p = data(5)
    cluster, count = resamples(1, 25, len(y))
    tallied = tally.tally(y, p, cluster=cluster, n_clusters=25, threshold=0.4)
    found = tallied(count)
    for j, times in enumerate(count[:, cluster]):
        expected = metrics.scores(np.repeat(y, times), np.repeat(p, times), threshold=0.4)
        assert {name: found[name][j] for name in metrics.NAMES} == pytest.approx(expected, abs=1e-12)


def test_of_very_many_samples_resamples_are_rounded_and_the_figures_themselves_are_not(monkeypatch):
    y, p = data(3, n=4000, decimals=6)
    cluster, count = resamples(0, 200, len(y), replicates=200)
    exact = tally.tally(y, p, cluster=cluster, n_clusters=200)(count)
    monkeypatch.setattr(tally, "_MANY", 1000)
    monkeypatch.setattr(tally, "_STEPS", 500)
    scores = metrics.scores(y, p)
    assert scores["auroc"] == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)
    assert scores["average_precision"] == pytest.approx(sk.average_precision_score(y, p), abs=1e-12)
    rounded = tally.tally(y, p, cluster=cluster, n_clusters=200)(count)
    for name in metrics.NAMES:
        expected, found = (np.quantile(values[name], [0.025, 0.975]) for values in (exact, rounded))
        np.testing.assert_allclose(found, expected, atol=0.01 * (expected[1] - expected[0]))


def test_only_the_figures_asked_for_are_given():
    y, p = data(2)
    tallied = tally.tally(y, p, cluster=np.arange(len(y)), n_clusters=len(y), names=("f1", "auroc"))
    assert set(tallied(np.ones((2, len(y))))) == {"f1", "auroc"}


def test_a_resample_without_a_class_has_the_figures_that_need_none_of_it():
    y, p = np.array([1, 1, 0, 0]), np.array([0.9, 0.2, 0.3, 0.6])
    tallied = tally.tally(y, p, cluster=np.array([0, 0, 1, 1]), n_clusters=3)  # the third brings nothing
    found = tallied(np.array([[2, 0, 1], [0, 2, 1], [1, 1, 1], [0, 0, 3]]))
    defined = {name: np.isfinite(values).tolist() for name, values in found.items()}
    assert defined["auroc"] == defined["balanced_accuracy"] == defined["mcc"] == [False, False, True, False]
    assert defined["sensitivity"] == defined["f1"] == defined["average_precision"] == [True, False, True, False]
    assert defined["specificity"] == [False, True, True, False]
    assert defined["brier"] == defined["ece"] == [True, True, True, False]
    assert found["average_precision"][0] == 1


def test_predictions_of_one_class_have_no_correlation():
    assert metrics.scores([0, 1, 1], [0.1, 0.2, 0.3])["mcc"] == 0


def test_metrics_of_a_run_come_back_from_their_json():
    interval = metrics.Interval(0.8, 0.7, 0.9)
    undefined = metrics.Interval(math.nan, math.nan, math.nan)
    ensemble = metrics.Judgement((5, 4), "slide", 3, 1, 0.4, 0.95, 1000, {"auroc": interval, "f1": undefined})
    folds = {"auroc": metrics.FoldFigure(0.75, 0.05, (0.7, 0.8)), "f1": metrics.FoldFigure(math.nan, math.nan, (0.5,))}
    written = metrics.RunMetrics(
        0.4,
        {
            "a/test": metrics.SetMetrics((5, 4), folds, ensemble),
            "a/validation": metrics.SetMetrics((3, 2), folds, None),
        },
    ).as_dict()
    assert list(written["sets"]["a/test"]) == ["n", "n_positive", "folds", "ensemble", "intervals"]
    assert written["sets"]["a/test"]["ensemble"] == {"auroc": 0.8, "f1": None}
    assert written["sets"]["a/test"]["intervals"]["figures"] == {"auroc": [0.7, 0.9], "f1": [None, None]}
    read = metrics.RunMetrics.from_dict(json.loads(json.dumps(written)))
    assert read.as_dict() == written
    assert read.sets["a/test"].ensemble.threshold == 0.4
    assert read.sets["a/test"].ensemble.figures["auroc"] == interval
    assert read.sets["a/validation"].ensemble is None
    del written["sets"]["a/test"]["n"]
    for damaged in (written, {"sets": {}}, {"threshold": 0.5, "sets": []}, {"threshold": "a", "sets": {}}):
        with pytest.raises(ValueError, match=r"is missing|missing required field|no attribute|Expected `float`"):
            metrics.RunMetrics.from_dict(damaged)
