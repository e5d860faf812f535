"""Do intervals cover, and is there none where the data give none?"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from drawn_runs import QUICK, alone, by_patch, patches, slides, some_run
from scipy import stats
from sklearn.metrics import roc_auc_score

from features.console import UserError
from probe import resample
from probe.evidence import judge
from probe.metrics import NAMES, scores
from probe.resample import NO_SCATTER, Clusters, Resampling, Scatter, Spread, Sums, interval, make_clusters, make_spread


def test_what_was_resampled_is_said():
    judged = some_run()
    by_slide, alone = judge(judged, resampling=QUICK), judge(by_patch(judged), resampling=QUICK)
    assert (by_slide.unit, by_slide.n_clusters, by_slide.n_alone) == ("slide", 30, 0)
    assert (alone.unit, alone.n_clusters, alone.n_alone) == ("sample", len(judged), 0)
    some_unknown = replace(judged, group=np.where(np.arange(len(judged)) < 3, "", judged.group))
    mixed = judge(some_unknown, resampling=QUICK)
    assert (mixed.unit, mixed.n_alone) == ("slide", 3)
    assert mixed.n_clusters == len(set(judged.group[3:])) + 3


def test_every_figure_has_an_interval_around_it():
    judgement = judge(some_run(n_slides=60), resampling=QUICK)
    assert tuple(judgement.figures) == NAMES
    for figure in judgement.figures.values():
        assert 0 <= figure.low < figure.value < figure.high <= 1
        assert figure.n_undefined == 0


def test_a_slide_drawn_twice_counts_twice():
    """The percentiles beneath an interval are those of resampling slides' rows one by one."""
    judged = some_run(n_slides=12)
    clusters = resample.make_clusters(judged.group)
    found = resample.resample([judged.tallies(clusters)], clusters, Resampling(replicates=100))
    for j, times in enumerate(np.concatenate(list(resample._draws(clusters.n, Resampling(replicates=100))))):
        rows = np.concatenate(
            [np.repeat(np.flatnonzero(clusters.index == k), int(times[k])) for k in range(clusters.n)]
        )
        if len(set(judged.label[rows])) == 2:
            assert found.drawn["auroc"][0, j] == pytest.approx(
                roc_auc_score(judged.label[rows], judged.probability[rows, 1]), abs=1e-12
            )


def test_the_same_seed_gives_the_same_intervals():
    judged = by_patch(some_run())
    assert judge(judged, resampling=QUICK) == judge(judged, resampling=QUICK)
    found, other = (judge(judged, resampling=replace(QUICK, seed=seed)).figures["auroc"] for seed in (0, 1))
    assert found.value == other.value
    assert found.low != other.low


def test_a_wider_level_gives_a_wider_interval():
    widths = []
    for level in (0.8, 0.95, 0.99):
        figure = judge(some_run(), resampling=Resampling(level=level)).figures["auroc"]
        widths.append(figure.high - figure.low)
    assert widths == sorted(widths)


def test_senseless_resampling_is_refused():
    with pytest.raises(UserError, match=r"50 replicates: an interval needs at least 100"):
        Resampling(replicates=50)
    with pytest.raises(UserError, match=r"at most 1,000,000"):
        Resampling(replicates=10**30)
    with pytest.raises(UserError, match=r"seed -1: expected a whole number"):
        Resampling(seed=-1)
    with pytest.raises(UserError, match=r"a level of 95: intervals need one from 0.5 to below 1"):
        Resampling(level=95)
    with pytest.raises(UserError, match=r"a design effect of 0.5: expected 1 \(patches are independent\) to 100"):
        Resampling(design_effect=0.5)


def test_slides_cover_as_asked_where_patches_fall_short():
    """95 % intervals on 40 slides as unequal as real ones; the truth is that of 5,000 slides.

    tests/simulate_intervals.py measures it closely.
    """
    rng = np.random.default_rng(4)
    everything = slides(rng, 5_000)[0]
    truth = scores(everything.label, everything.probability, threshold=everything.threshold)
    covered = {"slide": dict.fromkeys(NAMES, 0), "sample": dict.fromkeys(NAMES, 0)}
    samples = 80  # the standard error of a coverage of 95 % is 2.4 %
    for seed in range(samples):
        judged = slides(rng, 40)[0]
        resampling = Resampling(replicates=100, seed=seed)
        for judgement in (judge(judged, resampling=resampling), judge(by_patch(judged), resampling=resampling)):
            for name, figure in judgement.figures.items():
                covered[judgement.unit][name] += figure.low <= truth[name] <= figure.high
    for name in NAMES:
        assert covered["slide"][name] / samples > 0.86, name
        assert covered["sample"][name] < covered["slide"][name], name
    assert covered["sample"]["auroc"] / samples < 0.85


def test_freedom_is_that_of_clusters_that_weigh_alike():
    """Their number less one if they are equal, and little more than one beside a single heavy slide."""
    drawn = np.random.default_rng(0).standard_normal(1000) / np.sqrt(40)
    moved = np.tile([-1.0, 1.0], 20) / 40
    assert make_spread(0.0, drawn, moved, n_clusters=40).degrees_of_freedom == 39
    moved[0] = 10
    assert make_spread(0.0, drawn, moved, n_clusters=40).degrees_of_freedom < 2.5


@pytest.mark.parametrize("value", [5 / 6, 500 / 6])
def test_what_resamples_differ_by_through_rounding_is_no_scatter(value: float) -> None:
    drawn = np.tile([value, np.nextafter(value, math.inf), np.nextafter(value, 0)], 100)
    spread = make_spread(value, drawn, drawn[1:3], n_clusters=2)
    assert spread.clusters.variance == 0
    found = interval("log_loss", spread, 0.95)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert make_spread(value, drawn + np.resize([0, 1e-6, 0], 300), drawn[1:3], n_clusters=2).clusters.variance > 0


def test_the_standard_error_is_that_of_a_mean():
    """Of the mean of 8 clusters it is s / sqrt(8), which resampling alone makes too small by sqrt(7 / 8)."""
    each = np.array([0.1, 0.9, 0.3, 0.2, 0.6, 0.5, 0.4, 0.8])
    mean = Sums(np.stack([each, np.ones(8)], axis=1), lambda sums: {"mean": sums[:, 0] / sums[:, 1]})
    clusters = Clusters(np.arange(8), 8, "slide", 8, 0)
    spread = resample.resample([[mean]], clusters, Resampling(replicates=2000)).of("mean", 0)
    assert spread.standard_error == pytest.approx(each.std(ddof=1) / np.sqrt(8), rel=0.05)


@pytest.mark.parametrize("freedom", [1.0, 1.5, 3.0, 7.0, 30.0, 1000.0])
def test_intervals_and_p_values_are_those_of_students_t(freedom):
    spread = Spread(0.2, 0, Scatter(0.04, freedom))
    for level in (0.6, 0.8, 0.95):
        t = stats.t.ppf((1 + level) / 2, freedom)
        low, high = spread.ends(level)
        assert (low, high) == pytest.approx((0.2 - 0.2 * t, 0.2 + 0.2 * t), rel=1e-9)
        assert spread.p_value(low) == pytest.approx(1 - level, rel=1e-9)
        assert spread.p_above(low) == pytest.approx((1 - level) / 2, rel=1e-9)
        assert spread.p_below(high) == pytest.approx((1 - level) / 2, rel=1e-9)
        assert spread.p_below(low) == pytest.approx((1 + level) / 2, rel=1e-9)
    known = {1.0: 12.706, 3.0: 3.1824, 7.0: 2.3646, 30.0: 2.0423}  # two-sided 95 %, from printed tables
    if freedom in known:
        assert spread.ends(0.95)[1] == pytest.approx(0.2 + 0.2 * known[freedom], rel=1e-4)
    tiny = replace(spread, clusters=Scatter(1e-4, 1000.0))
    assert 1e-90 < tiny.p_value(0.0) < 1e-60  # many runs can be told apart, and Holm multiplies


def test_an_interval_is_students_t_on_the_logit_scale_and_stays_within_its_range():
    spread = Spread(0.9, 0, Scatter(0.05**2, 10.0))
    low, high = spread.ends(0.95, within=(0, 1))
    reach = stats.t.ppf(0.975, 10) * 0.05 / (0.9 * 0.1)
    assert np.log([low / (1 - low), high / (1 - high)]) == pytest.approx([np.log(9) - reach, np.log(9) + reach])
    assert spread.ends(0.95, within=(-1, 1)) == pytest.approx(
        np.tanh(np.arctanh(0.9) + np.array([-1, 1]) * stats.t.ppf(0.975, 10) * 0.05 / (1 - 0.9**2))
    )
    assert replace(spread, clusters=Scatter(0.05, 2.0)).ends(0.95, within=(0, 1))[1] < 1
    assert spread.ends(0.95, within=(0, np.inf))[1] > 1


def test_a_design_effect_widens_what_slides_give_and_not_what_trainings_give():
    spread = Spread(0.5, 0, Scatter(0.01, np.inf), Scatter(0.03, np.inf), design_effect=4.0)
    assert spread.standard_error == pytest.approx(0.2)
    low, high = spread.ends(0.95, 4.0)
    assert (high - low) / 2 == pytest.approx(1.959964 * np.sqrt(0.04 + 0.03), rel=1e-6)
    assert spread.p_value(0.1, 4.0) == pytest.approx(2 * stats.norm.sf(0.4 / np.sqrt(0.07)), rel=1e-9)


def test_scatter_adds_up_as_welch_and_satterthwaite_say():
    """The example of Welch's test in SciPy: two samples of unequal variance."""
    first, second = np.array([19.1, 22.3, 20.5, 24.0]), np.array([25.1, 31.9, 21.0, 40.2, 28.8, 22.2])
    both = Scatter.of(first) + Scatter.of(second)
    expected = stats.ttest_ind(first, second, equal_var=False)
    assert both.freedom == pytest.approx(expected.df)
    assert (first.mean() - second.mean()) / np.sqrt(both.variance) == pytest.approx(expected.statistic)
    assert Scatter.of(first[:1]) == NO_SCATTER
    assert Scatter.of(first) + NO_SCATTER == Scatter.of(first)
    assert (NO_SCATTER + NO_SCATTER).variance == 0


def test_identical_files_are_one_cluster():
    """Copies of unknown slide are drawn together, and known slides that share a file are one slide."""
    group = np.array(["", "", "", "", ""])
    digest = np.array(["a", "b", "a", "", ""])  # two without a digest are not the same
    clusters = make_clusters(group, digest)
    assert (clusters.n, clusters.n_units, clusters.unit, clusters.n_alone) == (4, 4, "sample", 0)
    assert clusters.index[0] == clusters.index[2]
    assert len(set(clusters.index.tolist())) == 4
    assert not clusters.independent
    chain = make_clusters(np.array(["s", "t", "t", "u", "v", ""]), np.array(["1", "1", "2", "2", "3", "3"]))
    assert chain.index.tolist() == [0, 0, 0, 0, 1, 1]
    assert (chain.n, chain.unit, chain.n_alone) == (2, "slide", 0)
    plain = make_clusters(np.array(["s", "t", ""]), np.array(["1", "2", "3"]))
    assert plain.index.tolist() == make_clusters(np.array(["s", "t", ""])).index.tolist()


def test_of_unknown_slides_the_ends_at_the_largest_design_effect_are_given():
    judged = some_run()
    known, unknown = judge(judged, resampling=QUICK), judge(by_patch(judged), resampling=QUICK)
    assert known.design_effect == 1
    assert unknown.design_effect == 2
    assert all(figure.wide is None for figure in known.figures.values())
    for name in ("balanced_accuracy", "auroc", "brier"):
        figure = unknown.figures[name]
        assert figure.wide[0] < figure.low < figure.high < figure.wide[1]
        logit_widths = [
            np.log(high / (1 - high)) - np.log(low / (1 - low))
            for low, high in (figure.wide, (figure.low, figure.high))
        ]
        assert logit_widths[0] / logit_widths[1] == pytest.approx(np.sqrt(2), rel=1e-6)
    plain = judge(by_patch(judged), resampling=replace(QUICK, design_effect=1.0))
    assert plain.figures["auroc"].wide is None
    assert (plain.figures["auroc"].low, plain.design_effect) == (unknown.figures["auroc"].low, 1)


def test_no_interval_where_the_data_give_none():
    constant = patches([0, 0, 1, 1] * 5, [0.3] * 20, group=np.repeat(np.arange(10), 2).astype(str))
    figure = judge(constant, resampling=QUICK).figures["auroc"]
    assert figure.value == 0.5
    assert np.isnan([figure.low, figure.high]).all()

    one_slide = judge(patches([0, 0, 1, 1] * 5, [0.1, 0.2, 0.8, 0.9] * 5, group=["only"] * 20), resampling=QUICK)
    assert one_slide.n_clusters == 1
    assert np.isnan(one_slide.figures["brier"].low)

    rng = np.random.default_rng(0)
    judged = patches(np.arange(40) < 4, rng.random(40), group=(np.arange(40) // 4).astype(str))  # positives: one slide
    figures = judge(judged, resampling=QUICK).figures
    assert np.isnan(figures["auroc"].low)
    assert figures["auroc"].n_undefined > 100
    assert figures["specificity"].low < figures["specificity"].high

    no_positives = judge(patches([0] * 5, rng.random(5)), resampling=QUICK).figures["auroc"]
    assert np.isnan(no_positives.value)
    assert no_positives.n_undefined == QUICK.replicates


def test_resamples_without_a_class_are_counted():
    rng = np.random.default_rng(0)
    judged = patches(np.arange(40) % 20 == 0, rng.random(40), group=(np.arange(40) // 4).astype(str))  # in 2 of 10
    figure = judge(judged, resampling=Resampling()).figures["auroc"]
    assert figure.n_undefined / 10_000 == pytest.approx(0.8**10, abs=0.02)
    assert figure.low < figure.value < figure.high


def test_very_many_clusters_need_no_jackknife(monkeypatch):
    judged = some_run()
    widened = judge(judged, resampling=QUICK).figures["auroc"]
    monkeypatch.setattr(resample, "_MOST_LEFT_OUT", 10)
    plain = judge(judged, resampling=QUICK).figures["auroc"]
    assert widened.high - widened.low > plain.high - plain.low


def test_of_very_many_patches_bundles_are_drawn_and_intervals_stay_as_wide(monkeypatch):
    rng = np.random.default_rng(1)
    label = np.arange(3000) % 4 == 0
    judged = patches(label, np.clip(0.3 + 0.2 * label + 0.2 * rng.standard_normal(3000), 0, 1))
    resampling = Resampling(replicates=2000)
    one_by_one = judge(judged, resampling=resampling)
    monkeypatch.setattr(resample, "_MANY", 1000)
    monkeypatch.setattr(resample, "_BUNDLES", 500)
    bundled = judge(judged, resampling=resampling)
    assert (bundled.n_clusters, bundled.unit) == (3000, "sample")
    assert not resample.make_clusters(judged.group).independent  # two of them may come from one slide
    assert resample.make_clusters(alone(judged).group).independent
    for name, figure in bundled.figures.items():
        expected = one_by_one.figures[name]
        assert figure.value == pytest.approx(expected.value, abs=1e-12)
        assert figure.high - figure.low == pytest.approx(expected.high - expected.low, rel=0.15)
