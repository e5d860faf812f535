"""Do the figures equal scikit-learn's, ties and absent classes included?"""

import numpy as np
import pytest
from sklearn import metrics as sk

from probe import metrics


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
