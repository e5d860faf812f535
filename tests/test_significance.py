"""Do tests keep their level, and do known answers come out?"""

from __future__ import annotations

import numpy as np
import pytest
from drawn_runs import QUICK, alone, by_patch, patches, slides, some_run
from scipy import stats
from sklearn.metrics import roc_auc_score
from statsmodels.stats.multitest import multipletests

from probe import significance
from probe.evidence import COMPARED, compare
from probe.metrics import as_dict
from probe.resample import Resampled, Resampling
from probe.significance import adjusted, detectable, difference, resampled_t, slides_needed, verdict


def test_the_paired_test_keeps_its_level():
    """Two runs that are equally good, each on its own slides and figures: about 5 % are called different.

    tests/simulate_intervals.py measures it closely.
    """
    rng = np.random.default_rng(5)
    rejected, naive, samples = dict.fromkeys(COMPARED, 0), 0, 100
    for seed in range(samples):
        first, second = slides(rng, 40, runs=2)
        resampling = Resampling(replicates=100, seed=seed)
        pair = compare({"a": first, "b": second}, resampling=resampling).pairs[0]
        for name in COMPARED:
            rejected[name] += pair.differences[name].p < 0.05
        area, covariance = significance.delong(
            first.label, np.stack([first.probability[:, 1], second.probability[:, 1]])
        )
        error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
        naive += stats.norm.sf(abs(area[0] - area[1]) / error) < 0.025
    for name in COMPARED:
        assert rejected[name] / samples <= 0.1, name
    assert naive / samples > 0.12  # DeLong's test takes every patch for independent


def test_p_and_interval_agree():
    rng = np.random.default_rng(6)
    called = 0
    for seed in range(20):
        first, second = slides(rng, 30, runs=2, gain=1.5)
        pair = compare({"a": first, "b": second}, resampling=Resampling(replicates=4000, seed=seed)).pairs[0]
        for one in pair.differences.values():
            excluded = one.low > 0 or one.high < 0
            called += excluded
            assert excluded == (one.p < 0.05)
    assert 10 < called < 40


def test_a_run_does_not_differ_from_itself():
    judged = some_run()
    found = compare({"a": judged, "again": judged}, resampling=QUICK)
    for name in COMPARED:
        same = found.pairs[0].differences[name]
        assert (same.value, same.low, same.high) == (0, 0, 0)
        assert same.p == same.p_holm == 1
        assert np.isnan(same.detectable)
        assert found.ranks[name]["a"].value == found.ranks[name]["again"].value == 1
        assert found.ranks[name]["again"].share_first == 1
    test = compare({"a": alone(judged), "again": alone(judged)}, resampling=QUICK).pairs[0].delong
    assert (test.value, test.standard_error, test.z, test.p) == (0, 0, 0, 1)


# --- Holm and DeLong: known answers -----------------------------------------------------------------------------------


def test_holm():
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert significance.holm([0.01, np.nan, 0.04]) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)
    assert len(significance.holm([])) == 0
    assert significance.holm([0.01, 0.004], n_tests=4) == pytest.approx([0.03, 0.016])
    raw = np.random.default_rng(0).random(50) ** 3
    assert significance.holm(raw) == pytest.approx(multipletests(raw, method="holm")[1])


# --- differences ------------------------------------------------------------------------------------------------------


def subjects(*trainings, noise: float = 0.02, n_clusters: int = 40, seed: int = 0) -> Resampled:
    """Figures of subjects whose resamples are normal, each on its own; clusters weigh the same."""
    rng = np.random.default_rng(seed)
    value = np.array([np.mean(each) for each in trainings])
    drawn = rng.standard_normal((len(value), 4000))
    drawn = value[:, None] + noise * (drawn - drawn.mean(axis=1, keepdims=True)) / drawn.std(axis=1, keepdims=True)
    moved = noise / np.sqrt(n_clusters) * np.where(np.arange(n_clusters) % 2, 1, -1) / 10  # less than resamples say
    return Resampled(
        value={"auroc": value},
        drawn={"auroc": drawn},
        without={"auroc": value[:, None] + moved * np.arange(1, len(value) + 1)[:, None]},
        trainings={"auroc": tuple(np.array(each, dtype=float) for each in trainings)},
        n_clusters=n_clusters,
        level=0.95,
        design_effect=1.0,
    )


def test_a_difference_contains_the_scatter_of_both_runs_trainings():
    fixed = difference(subjects([0.8], [0.75]), "auroc", 0, 1)
    seeds = difference(subjects([0.79, 0.80, 0.81], [0.70, 0.75, 0.80]), "auroc", 0, 1)
    assert fixed.value == pytest.approx(0.05)
    assert seeds.value == pytest.approx(0.05)
    assert fixed.training_error == 0
    assert seeds.training_error**2 == pytest.approx((0.01**2 + 0.05**2) / 3)
    assert seeds.standard_error**2 == pytest.approx(fixed.standard_error**2 + seeds.training_error**2)
    assert seeds.freedom < fixed.freedom
    assert seeds.low < fixed.low < fixed.high < seeds.high
    assert seeds.p > fixed.p


def test_margins():
    """Two one-sided tests, each of Student's t, and what they allow to say."""
    resampled = subjects([0.800], [0.797])
    found = difference(resampled, "auroc", 0, 1, margin=0.1)
    t = [(0.003 + 0.1) / found.standard_error, (0.003 - 0.1) / found.standard_error]
    assert found.p_not_worse == pytest.approx(2 * stats.t.sf(t[0], found.freedom), rel=1e-6)
    assert found.p_not_better == pytest.approx(min(1, 2 * stats.t.cdf(t[1], found.freedom)), rel=1e-6)
    assert found.p_equivalent == max(found.p_not_worse, found.p_not_better)
    assert np.isnan(difference(resampled, "auroc", 0, 1).p_equivalent)
    (one,) = adjusted([found])
    assert verdict(one, 0.1) == "equivalent"
    assert verdict(one, None) == "unknown"
    (narrow,) = adjusted([difference(resampled, "auroc", 0, 1, margin=0.01)])
    assert verdict(narrow, 0.01) == "unknown"
    (above,) = adjusted([difference(subjects([0.83], [0.79]), "auroc", 0, 1, margin=0.05)])
    (below,) = adjusted([difference(subjects([0.79], [0.83]), "auroc", 0, 1, margin=0.05)])
    assert (verdict(above, 0.05), verdict(below, 0.05)) == ("not worse", "not better")
    (better,) = adjusted([difference(subjects([0.95], [0.75]), "auroc", 0, 1, margin=0.05)])
    (worse,) = adjusted([difference(subjects([0.75], [0.95]), "auroc", 0, 1, margin=0.05)])
    assert (verdict(better, 0.05), verdict(worse, 0.05)) == ("better", "worse")


def test_a_claim_with_a_margin_is_what_the_interval_shows():
    resampled = subjects([0.80], [0.81])
    interval = difference(resampled, "auroc", 0, 1)
    for edge, name in ((-interval.low, "p_not_worse"), (interval.high, "p_not_better")):
        for margin, expected in ((edge * 1.001, True), (edge * 0.999, False)):
            assert (getattr(difference(resampled, "auroc", 0, 1, margin=margin), name) < 0.05) == expected


def test_runs_that_never_differ_are_equivalent():
    same = subjects([0.80], [0.80])
    (one,) = adjusted([difference(same, "auroc", 0, 0, margin=0.01)])
    assert verdict(one, 0.01) == "equivalent"


def test_claims_with_a_margin_are_adjusted_too():
    resampled = subjects([0.80], [0.81], [0.79])
    found = adjusted([difference(resampled, "auroc", a, b, margin=0.08) for a, b in ((0, 1), (0, 2), (1, 2))])
    for name in ("p_equivalent", "p_not_worse", "p_not_better"):
        raw = [getattr(one, name) for one in found]
        expected = multipletests(raw, method="holm")[1]
        assert [getattr(one, f"{name}_holm") for one in found] == pytest.approx(expected, rel=1e-9)
        assert max(raw) > 1e-12


def test_a_difference_of_the_detectable_size_is_found_in_four_of_five_sets():
    for freedom in (3.0, 20.0, 1000.0):
        for alpha in (0.05, 0.05 / 10):
            size = detectable(0.02, freedom, alpha=alpha)
            power = stats.nct.sf(stats.t.isf(alpha / 2, freedom), freedom, size / 0.02)
            assert power == pytest.approx(0.8, abs=1e-3)
    three = adjusted([difference(subjects([0.8], [0.75 + k / 100]), "auroc", 0, 1) for k in range(3)])
    for one in three:
        assert one.detectable == pytest.approx(detectable(one.standard_error, one.freedom))
        assert one.detectable_holm == pytest.approx(detectable(one.standard_error, one.freedom, alpha=0.05 / 3))
        assert one.detectable < one.detectable_holm
    assert np.isnan(detectable(0.0, 10.0))


def test_slides_needed():
    fixed = difference(subjects([0.8], [0.75]), "auroc", 0, 1)
    assert slides_needed(fixed, 40, fixed.detectable) == 40
    assert slides_needed(fixed, 40, -fixed.detectable) == 40
    assert slides_needed(fixed, 40, fixed.detectable / 2) == pytest.approx(4 * 40, rel=0.05)
    seeds = difference(subjects([0.79, 0.80, 0.81], [0.70, 0.75, 0.80]), "auroc", 0, 1)
    assert slides_needed(seeds, 40, seeds.training_error) is None  # trainings scatter by as much on any set
    never = difference(subjects([0.8], [0.8], noise=0.0), "auroc", 0, 0)
    assert slides_needed(never, 40, 0.1) is None


def test_without_a_valid_test_there_is_a_difference_with_its_interval_and_no_p():
    found = difference(subjects([0.8], [0.75]), "auroc", 0, 1, margin=0.02)
    without = significance.untested(found)
    assert (without.value, without.low, without.high) == (found.value, found.low, found.high)
    (one,) = adjusted([without])
    numbers = [one.p, one.p_holm, one.p_equivalent, one.p_not_worse_holm, one.detectable, one.detectable_holm]
    assert np.isnan(numbers).all()
    assert verdict(one, 0.02) == "unknown"


def test_the_corrected_resampled_t_is_that_of_baycomp():
    """Its posterior is Student's t about the mean: P(difference < 0) is one half of p on the other side."""
    from baycomp import CorrelatedTTest

    first = np.array([0.80, 0.82, 0.79, 0.85, 0.81])
    second = np.array([0.78, 0.80, 0.80, 0.81, 0.77])
    found = resampled_t(first - second, test_share=0.2)
    worse, better = CorrelatedTTest.probs(second, first)
    assert found.p / 2 == pytest.approx(min(worse, better), rel=1e-9)
    mean, variance, freedom = CorrelatedTTest.compute_statistics(second, first)
    assert (found.value, found.freedom) == (pytest.approx(mean), freedom)
    assert found.high == pytest.approx(mean + stats.t.isf(0.025, freedom) * np.sqrt(variance))
    naive = stats.ttest_rel(first, second).pvalue
    assert found.p > naive
    assert resampled_t(np.zeros(5), test_share=0.2).p == 1
    assert resampled_t(np.full(5, 0.25), test_share=0.2).p == 0


def test_differences_are_adjusted_for_all_pairs():
    runs = dict(zip("abcd", slides(np.random.default_rng(4), 40, runs=4, gain=0.8), strict=True))
    pairs = compare(runs, resampling=QUICK).pairs
    assert [(pair.first, pair.second) for pair in pairs] == [
        ("a", "b"),
        ("a", "c"),
        ("a", "d"),
        ("b", "c"),
        ("b", "d"),
        ("c", "d"),
    ]
    for name in COMPARED:
        raw = [pair.differences[name].p for pair in pairs]
        assert [pair.differences[name].p_holm for pair in pairs] == pytest.approx(significance.holm(raw))


# The ovarian-cancer data of DeLong, DeLong and Clarke-Pearson (1988) as the SAS/STAT User's Guide prints them, PROC
# LOGISTIC, "Comparing Receiver Operating Characteristic Curves": albumin, total protein, K-G score (10 minus it is
# used), and whether surgery helped. The guide's results: areas .7366, .6478, .7258 with standard errors .0927, .1000,
# .1028; albumin - K-G .0108 (.0953), chi-square .0127; total protein - K-G -.0780 (.1046), chi-square .5554.
OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0
4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1
4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1
2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""


def test_delongs_own_example():
    albumin, protein, kg, helped = np.array(OVARIAN.split(), dtype=float).reshape(-1, 4).T
    area, covariance = significance.delong(helped, np.stack([albumin, protein, 10 - kg]))
    assert area == pytest.approx([0.7366, 0.6478, 0.7258], abs=5e-5)
    assert np.sqrt(np.diag(covariance)) == pytest.approx([0.0927, 0.1000, 0.1028], abs=5e-5)
    runs = {
        name: alone(patches(helped, values))
        for name, values in (("albumin", albumin), ("protein", protein), ("kg", 10 - kg))
    }
    tests = {(pair.first, pair.second): pair.delong for pair in compare(runs, resampling=QUICK).pairs}
    first, second = tests["albumin", "kg"], tests["protein", "kg"]
    assert (first.value, first.standard_error, first.z**2) == pytest.approx((0.0108, 0.0953, 0.0127), abs=5e-5)
    assert (second.value, second.standard_error, second.z**2) == pytest.approx((-0.0780, 0.1046, 0.5554), abs=5e-5)
    assert (first.p, second.p) == pytest.approx((0.9102, 0.4561), abs=5e-5)
    assert second.p_holm == pytest.approx(2 * second.p)  # beside .24 and .91


def placements(label, score):
    """DeLong's structural components, pair by pair."""
    psi = [
        [float(x > y) + 0.5 * float(x == y) for y in score[label == 0]] for x in score[label == 1]
    ]  # (positives, negatives)
    return np.mean(psi, axis=1), np.mean(psi, axis=0)


@pytest.mark.parametrize("decimals", [1, 8], ids=["ties", "no ties"])
def test_delong_equals_the_sum_over_pairs(decimals):
    rng = np.random.default_rng(1)
    label = rng.random(80) < 0.3
    score = np.round(rng.standard_normal((3, 80)) + label, decimals)
    area, covariance = significance.delong(label, score)
    positives, negatives = zip(*(placements(label, row) for row in score), strict=True)
    assert area == pytest.approx([roc_auc_score(label, row) for row in score], abs=1e-12)
    expected = np.cov(positives) / label.sum() + np.cov(negatives) / (~label).sum()
    assert covariance == pytest.approx(expected, abs=1e-14)


def test_delong_is_for_independent_samples_only():
    first, second = slides(np.random.default_rng(1), 30, runs=2)
    for dependent in (first, second), (by_patch(first), by_patch(second)):  # of unknown slides too
        assert compare(dict(zip("ab", dependent, strict=True)), resampling=QUICK).pairs[0].delong is None
    test = compare({"a": alone(first), "b": alone(second)}, resampling=QUICK).pairs[0].delong
    assert test.first == pytest.approx(roc_auc_score(first.label, first.probability[:, 1]), abs=1e-12)


def test_delong_without_variance():
    label = [0, 0, 1, 1]
    right, wrong = (alone(patches(label, values)) for values in ([0.1, 0.2, 0.8, 0.9], [0.9, 0.8, 0.2, 0.1]))
    test = compare({"right": right, "wrong": wrong}, resampling=QUICK).pairs[0].delong
    assert (test.value, test.p) == (1, 0)
    assert as_dict(test)["z"] is None
    with pytest.raises(ValueError, match="needs two samples of each class, got 1 and 3"):
        significance.delong([0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4])
    single = alone(patches([0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4]))
    assert compare({"a": single, "b": single}, resampling=QUICK).pairs[0].delong is None
