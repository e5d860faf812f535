"""Do several data sets say together what they should, and no more?"""

from dataclasses import replace
from math import isnan

import numpy as np
import pytest
from drawn_runs import QUICK, some_run
from scipy import stats

from probe.across import TAU_SCALE, across_sets, adjusted_over, critical_difference, mean_ranks, pooled
from probe.evidence import compare
from probe.significance import holm


def test_the_critical_difference_is_that_of_demsars_table():
    """Table 5 of Demsar 2006, q at 5 %, for 2 to 10 classifiers."""
    table = {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}
    for runs, q in table.items():
        assert critical_difference(runs, 14) == pytest.approx(q * np.sqrt(runs * (runs + 1) / (6 * 14)), rel=3e-4)
    assert isnan(critical_difference(1, 14))
    assert isnan(critical_difference(5, 1))


def test_mean_ranks_are_friedmans():
    """The example of Demsar's Table 6 in small: ties share their mean rank."""
    values = np.array([[0.9, 0.8, 0.8], [0.7, 0.9, 0.6], [0.5, 0.6, 0.7]])
    assert mean_ranks(values) == pytest.approx(np.mean([[1, 2.5, 2.5], [2, 1, 3], [3, 2, 1]], axis=0))


def test_pooling_equals_the_integrals():
    """The posterior of the mean and of a new set, by quadrature over mean and scatter."""
    d, s, scale, rope = np.array([0.06, 0.01, 0.04]), np.array([0.02, 0.015, 0.03]), 0.05, 0.01
    mu, tau = np.meshgrid(np.linspace(-0.4, 0.5, 1801), (np.arange(500) + 0.5) * 5 * scale / 500, indexing="ij")
    density = np.exp(-(tau**2) / (2 * scale**2))
    for value, error in zip(d, s, strict=True):
        density = density * stats.norm.pdf(value, mu, np.sqrt(error**2 + tau**2))
    density /= density.sum()
    mean, low, high, between, p_better, p_equivalent, p_worse = pooled(d, s, rope=rope, tau_scale=scale)
    assert mean == pytest.approx((density * mu).sum(), abs=1e-4)
    assert between == pytest.approx((density * tau).sum(), abs=1e-4)
    below = np.cumsum(density.sum(axis=1))
    assert np.interp([low, high], mu[:, 0], below) == pytest.approx([0.025, 0.975], abs=1e-3)
    assert p_better == pytest.approx((density * stats.norm.sf(rope, mu, tau)).sum(), abs=1e-4)
    assert p_worse == pytest.approx((density * stats.norm.cdf(-rope, mu, tau)).sum(), abs=1e-4)
    assert p_better + p_equivalent + p_worse == pytest.approx(1, abs=1e-12)


def test_many_sets_that_agree_leave_little_doubt_and_few_leave_some():
    many = pooled(np.full(30, 0.05), np.full(30, 0.01), rope=0.01)
    few = pooled(np.full(3, 0.05), np.full(3, 0.01), rope=0.01)
    assert many[4] > 0.99 > few[4] > 0.8  # better on a new set
    assert few[2] - few[1] > 3 * (many[2] - many[1])
    assert many[3] < 0.01 < few[3]  # scatter between sets


def test_with_three_sets_the_prior_of_the_scatter_matters_and_with_thirty_hardly():
    d, s = np.array([0.02, 0.05, 0.08]), np.full(3, 0.015)
    by_scale = [pooled(d, s, rope=0.01, tau_scale=scale)[4] for scale in (0.02, TAU_SCALE, 0.1)]
    assert by_scale == sorted(by_scale, reverse=True)
    assert by_scale[0] - by_scale[2] > 0.08
    d, s = np.tile(d, 10), np.tile(s, 10)
    by_scale = [pooled(d, s, rope=0.01, tau_scale=scale)[4] for scale in (0.02, TAU_SCALE, 0.1)]
    assert max(by_scale) - min(by_scale) < 0.02


def test_a_difference_turned_round_is_the_same():
    d, s = np.array([0.03, -0.01, 0.05]), np.array([0.02, 0.02, 0.03])
    mean, low, high, between, better, same, worse = pooled(d, s, rope=0.01)
    assert pooled(-d, s, rope=0.01) == pytest.approx((-mean, -high, -low, between, worse, same, better), abs=1e-9)


def sets(runs: int = 3, n: int = 3):
    """Comparisons of runs on several sets."""
    found = {}
    for k in range(n):
        judged = some_run(k, 20, trainings=runs)
        alone = [
            replace(judged, by_training=p[None], thresholds=judged.thresholds[:1], dataset=f"set {k}")
            for p in judged.by_training
        ]
        found[f"set {k}"] = compare({f"run {r}": one for r, one in enumerate(alone)}, resampling=QUICK)
    return found


def test_every_pair_and_rank_comes_from_all_sets():
    comparisons = sets()
    across = across_sets(comparisons, rope=0.02)
    assert across.rope == 0.02
    for name, figure in across.figures.items():
        assert [(one.first, one.second, one.n_sets) for one in figure.pairs] == [
            ("run 0", "run 1", 3),
            ("run 0", "run 2", 3),
            ("run 1", "run 2", 3),
        ]
        shown = [comparison.pairs[1].differences[name] for comparison in comparisons.values()]
        expected = pooled(
            np.array([one.value for one in shown]), np.array([one.standard_error for one in shown]), rope=0.02
        )
        one = figure.pairs[1]
        found = (one.mean, one.low, one.high, one.between, one.p_better, one.p_equivalent, one.p_worse)
        assert found == pytest.approx(expected, abs=1e-12)
        assert sum(figure.mean_ranks.values()) == pytest.approx(6)
        assert figure.critical_difference == pytest.approx(critical_difference(3, 3))
        assert figure.n_sets == 3


def test_a_run_that_lacks_a_set_is_in_no_rank_but_in_pairs_of_the_others():
    comparisons = sets()
    judged = some_run(9, 20, trainings=2)
    alone = [replace(judged, by_training=p[None], thresholds=judged.thresholds[:1]) for p in judged.by_training]
    comparisons["set 9"] = compare({"run 2": alone[0], "run 0": alone[1]}, resampling=QUICK)
    figure = across_sets(comparisons, rope=0.01).figures["auroc"]
    assert sorted(figure.mean_ranks) == ["run 0", "run 2"]
    by_pair = {(one.first, one.second): one for one in figure.pairs}
    assert {pair: one.n_sets for pair, one in by_pair.items()} == {
        ("run 0", "run 1"): 3,
        ("run 0", "run 2"): 4,
        ("run 1", "run 2"): 3,
    }
    values = [comparison.judgements for comparison in comparisons.values()]
    d = [one["run 0"].figures["auroc"].value - one["run 2"].figures["auroc"].value for one in values]
    assert min(d) - 0.01 < by_pair["run 0", "run 2"].mean < max(d) + 0.01  # signs turned to agree


def test_it_says_that_three_sets_are_few():
    assert across_sets(sets(), rope=0.01).figures["auroc"].sentence.startswith("3 test sets are few: ")
    many = across_sets(sets(2, 10), rope=0.01).figures["auroc"].sentence
    assert many == "10 test sets say how much a difference varies from set to set, and so what a new set would show."
    # Six runs on three sets: even always first and always last (5 apart) are closer than the critical difference.
    assert critical_difference(6, 2) > 5
    assert across_sets(sets(6, 2), rope=0.01).figures["auroc"].sentence.endswith("by its mean rank.")
    assert across_sets(dict(list(sets().items())[:1]), rope=0.01) is None
    assert across_sets(sets(1), rope=0.01) is None


def test_p_values_are_adjusted_over_pairs_figures_and_sets():
    comparisons = sets()
    adjusted = adjusted_over(comparisons)
    before = [one for c in comparisons.values() for pair in c.pairs for one in pair.differences.values()]
    after = [one for c in adjusted.values() for pair in c.pairs for one in pair.differences.values()]
    assert len(after) == 3 * 3 * 2
    assert [one.p_holm for one in after] == pytest.approx(holm([one.p for one in before]))
    assert [one.p for one in after] == [one.p for one in before]
    smallest = min(after, key=lambda one: one.p)
    assert smallest.p_holm == pytest.approx(min(1, 18 * smallest.p))
    assert adjusted["set 0"].judgements == comparisons["set 0"].judgements
