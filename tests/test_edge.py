"""Has a perfect score an interval, and is it as wide as slides without an error leave it?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from drawn_runs import QUICK, by_patch, of_two, patches
from scipy import stats

from probe.edge import Held, edge_ends, held
from probe.evidence import judge
from probe.metrics import NAMES, scores


def perfect(n_slides: int = 12):
    """Four patches a slide, two of each class, all told apart."""
    group = np.repeat(np.arange(n_slides), 4).astype(str)
    return patches([0, 0, 1, 1] * n_slides, [0.1, 0.2, 0.8, 0.9] * n_slides, group=group)


def test_a_perfect_score_has_an_exact_interval():
    figures = judge(perfect(), resampling=QUICK).figures
    least = stats.binomtest(12, 12).proportion_ci(0.95, "exact").low  # 12 slides without an error
    half = stats.binomtest(12, 12).proportion_ci(0.975, "exact").low
    assert figures["sensitivity"].low == pytest.approx(least)
    assert figures["specificity"].low == pytest.approx(least)
    assert figures["balanced_accuracy"].low == pytest.approx(half)
    assert figures["auroc"].low == pytest.approx(half**2)
    for name in ("sensitivity", "specificity", "balanced_accuracy", "auroc", "average_precision", "f1", "mcc"):
        figure = figures[name]
        assert figure.exact
        assert 0 < figure.low < figure.value == figure.high == 1
    assert not figures["brier"].exact


def test_clusters_that_hold_the_class_are_counted_and_not_patches():
    judged = perfect()
    assert held(judged.label, judged.clusters.index, judged.by_training) == Held((12, 12), 0.5)
    one_class = judged.select((judged.label == 0) | (np.arange(len(judged)) < 16))  # atypical ones on four slides
    assert held(one_class.label, one_class.clusters.index, one_class.by_training).n_positive == 4
    figures = judge(one_class, resampling=QUICK).figures
    assert figures["sensitivity"].low == pytest.approx(0.025 ** (1 / 4))
    assert figures["specificity"].low == pytest.approx(0.025 ** (1 / 12))


def test_all_wrong_and_one_class_predicted():
    judged = perfect()
    wrong = judge(replace(judged, by_training=1 - judged.by_training), resampling=QUICK).figures
    right = judge(judged, resampling=QUICK).figures
    for name in ("sensitivity", "specificity", "balanced_accuracy", "auroc"):
        assert (wrong[name].value, wrong[name].low) == (0, 0)
        assert wrong[name].high == pytest.approx(1 - right[name].low)
    assert wrong["mcc"].high == pytest.approx(-right["mcc"].low)
    negative = judge(replace(judged, by_training=of_two(judged.positive / 10)), resampling=QUICK).figures
    assert negative["balanced_accuracy"].value == 0.5
    least = (0.05 / 4) ** (1 / 12)
    assert (negative["balanced_accuracy"].low, negative["balanced_accuracy"].high) == pytest.approx(
        (least / 2, (1 - least + 1) / 2)
    )
    assert negative["f1"].low == 0 < negative["f1"].high < 1


@pytest.mark.parametrize(("score", "sensitivity"), [(0.5, 1.0), (0.2, 0.0)])
def test_one_score_for_every_patch_has_no_interval_where_a_threshold_decides(score, sensitivity):
    """It says one class of all patches on any slides: a bound would have it better than chance on some."""
    same = replace(perfect(), by_training=np.full((1, 48, 2), [1 - score, score]))
    figures = judge(same, resampling=QUICK).figures
    assert (figures["sensitivity"].value, figures["balanced_accuracy"].value) == (sensitivity, 0.5)
    assert figures["auroc"].value == 0.5
    for name in ("sensitivity", "specificity", "balanced_accuracy", "f1", "mcc", "auroc"):
        assert np.isnan([figures[name].low, figures[name].high]).all(), name
        assert not figures[name].exact
    # One patch with another score, and what a threshold decides is a finding again.
    scores = np.full(48, score)
    scores[3] = score / 2
    other = judge(replace(same, by_training=of_two(scores)[None]), resampling=QUICK).figures["sensitivity"]
    assert other.exact or 0 < other.low < other.value < other.high


def test_no_set_that_the_box_allows_has_a_lower_score():
    """With 10 % of positives and 4 % of negatives on the wrong side, in the worst place, and the others in order."""
    n_positive, n_negative = 50, 100
    label = np.repeat([1, 0], [n_positive, n_negative])
    probability = np.concatenate([np.linspace(0.8, 0.9, 45), np.zeros(5), np.full(4, 0.99), np.full(96, 0.2)])
    reached = scores(label, probability)
    values = dict.fromkeys(NAMES, 1.0)
    classes = Held((np.log(0.025 / 2) / np.log(0.96), np.log(0.025 / 2) / np.log(0.9)), n_positive / len(label))
    for name in ("balanced_accuracy", "f1", "mcc"):
        assert edge_ends(name, values, classes, 0.95)[0] == pytest.approx(reached[name], abs=1e-9)
    for name in ("auroc", "average_precision"):
        low = edge_ends(name, values, classes, 0.95)[0]
        assert reached[name] - 0.05 < low <= reached[name] + 1e-12


def test_of_unknown_slides_fewer_count():
    figure = judge(by_patch(perfect()), resampling=QUICK).figures["sensitivity"]
    assert figure.low == pytest.approx(0.025 ** (1 / 24))  # 24 atypical patches
    assert figure.wide == pytest.approx((0.025 ** (1 / 12), 1.0))
