"""Do thresholds per domain, at a fixed specificity and chosen on a few slides give what they should?"""

from dataclasses import replace

import numpy as np
import pytest
from drawn_runs import QUICK, of_two, patches, some_run
from sklearn.metrics import roc_curve

from features.console import UserError
from probe import thresholds
from probe.metrics import balanced_accuracy, best_threshold
from probe.thresholds import by_threshold


def shifted(seed: int = 0, shift: float = 1.5, n_slides: int = 24):
    """A run whose logits are higher by `shift` on every slide of domain "b"; half of the slides are of each."""
    run = some_run(seed, n_slides)
    domain = np.where(run.group.astype(int) % 2 == 1, "b", "a")
    odds = run.positive / (1 - run.positive) * np.exp(shift * (domain == "b"))
    return replace(run, by_training=of_two(odds / (1 + odds))), domain


def test_every_domain_is_judged_at_the_runs_threshold_and_at_the_best_there():
    run, domain = shifted()
    view = by_threshold(run, domain, resampling=QUICK)
    assert list(view.domains) == ["a", "b"]
    for name, found in view.domains.items():
        y, p = run.label[domain == name] == 1, run.probability[domain == name, 1]
        assert (found.n, found.n_positive, found.n_clusters) == (len(y), y.sum(), 12)
        for figures, threshold in ((found.own, 0.65), (found.oracle, best_threshold(y, p))):
            expected = [balanced_accuracy(y, p >= threshold), (p[y] >= threshold).mean(), (p[~y] < threshold).mean()]
            names = ("balanced_accuracy", "sensitivity", "specificity")
            assert [figures[name].value for name in names] == pytest.approx(expected, abs=1e-12)
        assert found.oracle_threshold == best_threshold(y, p)
        assert found.own["specificity"].low < found.own["specificity"].value
    b = view.domains["b"]
    assert b.oracle_threshold > 0.75 > 0.65  # in "b" the run says too much
    assert b.own["specificity"].value < view.domains["a"].own["specificity"].value
    assert view.all.n == len(run)


@pytest.mark.parametrize("specificity", [0.5, 0.9])
def test_sensitivity_at_a_specificity_is_read_off_the_roc_curve(specificity):
    run, domain = shifted()
    found = by_threshold(run, domain, specificity=specificity, resampling=QUICK).all.at_specificity
    false, true, _ = roc_curve(run.label, run.probability[:, 1], drop_intermediate=False)
    assert found.value == pytest.approx(true[false <= 1 - specificity + 1e-9].max(), abs=1e-12)
    assert found.low < found.value < found.high


def test_the_threshold_for_a_specificity_is_chosen_again_on_every_resample():
    """Each equals the ROC curve of the resample's own rows; ties and an odd number of negatives included."""
    rng = np.random.default_rng(0)
    run = patches(rng.integers(0, 2, 41), rng.integers(0, 12, 41) / 12, group=(np.arange(41) // 4).astype(str))
    clusters = run.clusters
    ranked = thresholds._Ranked.of(run.label == 1, run.probability[:, 1], clusters)
    count = rng.multinomial(clusters.n, np.full(clusters.n, 1 / clusters.n), size=30)
    found = thresholds._AtSpecificity(ranked, 0.8)(count.astype(float))["sensitivity"]
    for value, times in zip(found, count, strict=True):
        rows = np.repeat(np.arange(41), times[clusters.index])
        false, true, _ = roc_curve(run.label[rows], run.probability[rows, 1], drop_intermediate=False)
        assert value == pytest.approx(true[false <= 0.2 + 1e-9].max(), abs=1e-6)  # counted in float32


def test_recalibration_equals_choosing_and_judging_slide_by_slide():
    run, _ = shifted()
    clusters = run.clusters
    ranked = thresholds._Ranked.of(run.label == 1, run.probability[:, 1], clusters)
    rng = np.random.default_rng(0)
    chosen = (rng.random((20, clusters.n)) < 0.3).astype(np.float32)
    chosen[0] = 0  # no slide: nothing to choose on
    tuned, own = thresholds._on_others(ranked, 0.65, chosen)
    for k, slides in enumerate(chosen):
        rows = slides[clusters.index] == 1
        y, p = run.label == 1, run.probability[:, 1]
        both = y[rows].any() and not y[rows].all()
        threshold = best_threshold(y[rows], p[rows]) if both else 0.65
        assert tuned[k] == pytest.approx(balanced_accuracy(y[~rows], p[~rows] >= threshold), abs=1e-12)
        assert own[k] == pytest.approx(balanced_accuracy(y[~rows], p[~rows] >= 0.65), abs=1e-12)
    assert tuned[0] == own[0]


def test_a_domain_where_the_threshold_is_wrong_needs_few_slides_and_one_where_it_is_right_none():
    run, domain = shifted(shift=3)
    run = replace(run, thresholds=np.array([0.5]), threshold=0.5)
    view = by_threshold(run, domain, resampling=QUICK)
    wrong, right = view.domains["b"], view.domains["a"]
    assert [point.n_slides for point in wrong.recalibration] == [1, 2, 4]  # up to half of 12, doubling
    assert wrong.n_slides_needed in (1, 2)
    last = wrong.recalibration[-1]
    assert last.own < last.balanced_accuracy < wrong.oracle["balanced_accuracy"].value
    assert last.low <= last.balanced_accuracy <= last.high
    assert right.n_slides_needed is None or right.n_slides_needed >= 2


def test_fewest_slides_are_those_from_which_on_it_is_better():
    def curve(*gains):
        return tuple(thresholds.Recalibration(2**k, 0.7 + gain, 0.6, 0.8, 0.7) for k, gain in enumerate(gains))

    assert thresholds._fewest(curve(-0.1, 0.1, 0.2)) == 2
    assert thresholds._fewest(curve(0.1, -0.1, 0.2)) == 4
    assert thresholds._fewest(curve(0.1, 0.1, -0.2)) is None
    assert thresholds._fewest(()) is None


def test_the_same_seed_draws_the_same_slides():
    run, domain = shifted()
    first = by_threshold(run, domain, resampling=QUICK)
    assert by_threshold(run, domain, resampling=QUICK).all.recalibration == first.all.recalibration
    other = by_threshold(run, domain, resampling=replace(QUICK, seed=1))
    assert other.all.recalibration != first.all.recalibration


def test_trainings_are_averaged_each_at_its_own_threshold():
    run = replace(some_run(trainings=2), thresholds=np.array([0.5, 0.8]))
    domain = np.full(len(run), "a")
    whole = by_threshold(run, domain, resampling=QUICK).all
    each = [
        by_threshold(replace(run, by_training=p[None], thresholds=np.array([t])), domain, resampling=QUICK).all
        for p, t in zip(run.by_training, (0.5, 0.8), strict=True)
    ]
    assert each[0].own["sensitivity"].value > each[1].own["sensitivity"].value
    for read in (
        lambda one: one.own["sensitivity"].value,
        lambda one: one.oracle["specificity"].value,
        lambda one: one.oracle_threshold,
        lambda one: one.at_specificity.value,
        lambda one: one.recalibration[1].balanced_accuracy,
    ):
        assert read(whole) == pytest.approx(np.mean([read(one) for one in each]), abs=1e-12)


def test_a_domain_of_one_class_and_a_patch_without_domain():
    run = patches([0, 0, 0, 1, 0, 1], [0.1, 0.6, 0.2, 0.9, 0.3, 0.4])
    view = by_threshold(run, np.array(["a", "a", "a", "b", "b", ""]), resampling=QUICK)
    one_class = view.domains["a"]
    assert (one_class.recalibration, one_class.n_slides_needed) == ((), None)
    assert np.isnan([one_class.oracle_threshold, one_class.at_specificity.value]).all()
    assert one_class.own["specificity"].value == pytest.approx(2 / 3)
    assert (view.domains["b"].n, view.all.n) == (2, 6)


def test_many_distinct_probabilities_are_rounded_and_stay_close(monkeypatch):
    run, domain = shifted()
    exact = by_threshold(run, domain, resampling=QUICK).all
    monkeypatch.setattr(thresholds, "_CELLS", 1)  # leaves the fewest values
    rounded = by_threshold(run, domain, resampling=QUICK).all
    assert rounded.at_specificity.value == pytest.approx(exact.at_specificity.value, abs=0.05)
    assert rounded.recalibration != exact.recalibration


def test_what_is_none_is_refused():
    run = patches([0, 1], [0.1, 0.9])
    with pytest.raises(ValueError, match=r"domain must be \(2,\), got shape \(3,\)"):
        by_threshold(run, np.array(["a", "b", "c"]))
    with pytest.raises(UserError, match=r"`specificity=90`: expected a share between 0 and 1"):
        by_threshold(run, np.array(["a", "b"]), specificity=90)
