"""Do intervals cover, do tests keep their level, and do known answers come out?"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from features.console import UserError
from probe import evidence, resample, significance
from probe.calibration import calibrate
from probe.domains import by_domain
from probe.ensembles import Ensemble, ensemble_of, rows_of
from probe.evidence import COMPARED, compare, evaluate, judge
from probe.metrics import NAMES, as_dict, best_threshold, scores
from probe.raters import by_agreement
from probe.rates import by_slide
from probe.resample import Resampling
from probe.runs import Predictions
from probe.thresholds import by_threshold

QUICK = Resampling(replicates=400)
SIZES = np.array([1, 1, 1, 2, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50])  # figures per slide: as skewed as AMi-Br's


def patches(
    label, probability, *, group=None, threshold: float = 0.5, ids=None, dataset: str = "ami-br", split: str = "test"
) -> Ensemble:
    n = len(label)
    return Ensemble(
        dataset=dataset,
        split=split,
        id=np.array([f"{i:04d}.png" for i in range(n)] if ids is None else ids, dtype=np.str_),
        label=np.asarray(label, dtype=np.int8),
        group=np.array([""] * n if group is None else group, dtype=np.str_),
        digest=np.full(n, ""),
        by_training=np.asarray(probability, dtype=np.float64)[None],
        thresholds=np.array([threshold]),
        threshold=threshold,
        prior=0.5,
    )


def slides(rng: np.random.Generator, n_slides: int, *, runs: int = 1, gain: float = 0.0) -> list[Ensemble]:
    """Runs on one set of slides whose figures resemble each other; every run after the first is better by `gain`."""
    size = SIZES[rng.integers(0, len(SIZES), n_slides)]
    slide = np.repeat(np.arange(n_slides), size)
    label = (rng.random(len(slide)) < rng.beta(1, 3, n_slides)[slide]).astype(np.int8)
    shared, noise = rng.standard_normal(n_slides), rng.standard_normal(len(slide))
    found = []
    for run in range(runs):
        own, own_noise = rng.standard_normal(n_slides), rng.standard_normal(len(slide))
        logit = (1.3 + gain * (run > 0)) * label + 0.7 * (shared + own)[slide] + 0.7 * (noise + own_noise)
        found.append(patches(label, 1 / (1 + np.exp(-logit)), group=slide.astype(str), threshold=0.65))
    return found


def by_patch(judged: Ensemble) -> Ensemble:
    return replace(judged, group=np.full(len(judged), ""))


def alone(judged: Ensemble) -> Ensemble:
    """Every patch from a slide of its own, which is known."""
    return replace(judged, group=np.array([f"slide {i}" for i in range(len(judged))]))


def some_run(seed: int = 0, n_slides: int = 30) -> Ensemble:
    return slides(np.random.default_rng(seed), n_slides)[0]


# --- what is judged ---------------------------------------------------------------------------------------------------


def predictions(seed: int = 0) -> Predictions:
    """Five out-of-fold patches and four test patches, judged by two fold models."""
    rng = np.random.default_rng(seed)
    tests = [(f"t{i}.png", i % 2, f"slide {i // 2}", "test", fold) for i in (2, 0, 3, 1) for fold in (0, 1)]
    held_out = [(f"v{i}.png", i % 2, "", "validation", i % 2) for i in range(5)]
    ids, label, group, split, fold = zip(*held_out, *tests, strict=True)
    return Predictions(
        dataset=np.full(len(ids), "ami-br"),
        id=np.array(ids),
        label=np.array(label, dtype=np.int8),
        group=np.array(group),
        split=np.array(split),
        fold=np.array(fold),
        seed=np.zeros(len(ids), dtype=np.intp),
        logit=rng.standard_normal(len(ids)).astype(np.float32),
    )


def test_an_ensemble_is_the_mean_over_fold_models_in_the_order_of_the_table():
    run = predictions()
    judged = ensemble_of(run, "ami-br", "test")
    assert judged.id.tolist() == ["t2.png", "t0.png", "t3.png", "t1.png"]
    assert judged.label.tolist() == [0, 0, 1, 1]
    assert judged.group.tolist() == ["slide 1", "slide 0", "slide 1", "slide 0"]
    of_t2 = run.probability[run.id == "t2.png"]
    assert judged.probability[0] == pytest.approx(of_t2.mean(), abs=1e-15)
    held_out = run.split == "validation"
    assert judged.threshold == best_threshold(run.label[held_out], run.probability[held_out])
    assert len(ensemble_of(run, "ami-br", "validation")) == 5


def test_the_figures_are_those_that_the_run_recorded():
    run = predictions()
    recorded = evaluate(run).as_dict()["sets"]["ami-br/test"]["ensemble"]
    figures = judge(ensemble_of(run, "ami-br", "test"), resampling=QUICK).figures
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(recorded, abs=1e-12)


def test_a_run_without_out_of_fold_predictions_is_judged_at_one_half():
    run = predictions()
    assert ensemble_of(run.select(run.split == "test"), "ami-br", "test").threshold == 0.5


def edited(run: Predictions, column: str, row: int, value: object) -> Predictions:
    values = getattr(run, column).copy()
    values[row] = value
    return replace(run, **{column: values})


def test_damaged_predictions_are_refused():
    run = predictions()
    row = int(np.flatnonzero(run.id == "t0.png")[0])
    with pytest.raises(UserError, match=r"no predictions of atnorm-br/test; it has: ami-br/test, ami-br/validation"):
        ensemble_of(run, "atnorm-br", "test")
    with pytest.raises(UserError, match=r"ami-br/test: a patch occurs twice for one fold"):
        ensemble_of(edited(run, "fold", row, run.fold[row + 1]), "ami-br", "test")
    with pytest.raises(UserError, match=r"t0.png has 1 fold models, others have 2"):
        ensemble_of(run.select(np.arange(len(run.id)) != row), "ami-br", "test")
    with pytest.raises(UserError, match=r"t0.png has two labels"):
        ensemble_of(edited(run, "label", row, 1), "ami-br", "test")
    with pytest.raises(UserError, match=r"t0.png has two groups"):
        ensemble_of(edited(run, "group", row, "slide 9"), "ami-br", "test")
    with pytest.raises(UserError, match=r"ami-br/test: 1 are no numbers"):
        ensemble_of(edited(run, "logit", row, np.nan), "ami-br", "test")


def test_a_patch_table_is_aligned_by_id():
    judged = patches([0, 1, 0], [0.1, 0.2, 0.3], ids=["b", "c", "a"])
    table = np.array(["a", "z", "b", "c"])
    assert table[rows_of(judged, table)].tolist() == ["b", "c", "a"]
    with pytest.raises(UserError, match=r"1 of 3 patches of ami-br/test are not in the patch table \(first: c\)"):
        rows_of(judged, table[:3])
    with pytest.raises(UserError, match=r"3 of 3 patches"):
        rows_of(judged, table[:0])


# --- intervals --------------------------------------------------------------------------------------------------------


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
                roc_auc_score(judged.label[rows], judged.probability[rows]), abs=1e-12
            )


def test_the_same_seed_gives_the_same_intervals():
    judged = some_run()
    assert judge(judged, resampling=QUICK) == judge(judged, resampling=QUICK)
    other = judge(judged, resampling=replace(QUICK, seed=1))
    assert other.figures["auroc"].value == judge(judged, resampling=QUICK).figures["auroc"].value
    assert other.figures["auroc"].low != judge(judged, resampling=QUICK).figures["auroc"].low


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


def test_slides_cover_as_asked_where_patches_fall_short():
    """95 % intervals on 40 slides as unequal as real ones; the truth is that of 20,000 slides."""
    rng = np.random.default_rng(4)
    everything = slides(rng, 20_000)[0]
    truth = scores(everything.label, everything.probability, threshold=everything.threshold)
    covered = {"slide": dict.fromkeys(NAMES, 0), "sample": dict.fromkeys(NAMES, 0)}
    samples = 250  # the standard error of a coverage of 95 % is 1.4 %
    for seed in range(samples):
        judged = slides(rng, 40)[0]
        resampling = Resampling(replicates=300, seed=seed)
        for judgement in (judge(judged, resampling=resampling), judge(by_patch(judged), resampling=resampling)):
            for name, figure in judgement.figures.items():
                covered[judgement.unit][name] += figure.low <= truth[name] <= figure.high
    for name in NAMES:
        assert covered["slide"][name] / samples > 0.87, name
        assert covered["sample"][name] / samples < 0.82, name
    for name in ("balanced_accuracy", "auroc", "average_precision"):
        assert 0.92 <= covered["slide"][name] / samples <= 0.98, name


def test_equal_slides_need_no_more_than_students_t():
    """Freedom is the number of equal clusters less one, and little more than one beside a single heavy slide."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(1000) / np.sqrt(40)
    moved = np.tile([-1.0, 1.0], 20) / 40
    assert resample.make_spread(0.0, drawn, moved, n_clusters=40).freedom == 39
    moved[0] = 10
    assert resample.make_spread(0.0, drawn, moved, n_clusters=40).freedom < 2.5


@pytest.mark.parametrize("freedom", [1.0, 1.5, 3.0, 7.0, 30.0, 1000.0])
def test_intervals_and_p_values_are_those_of_students_t(freedom):
    """Of resamples that are normal, the ends lie at t times their scatter, and p is that of t."""
    drawn = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    spread = resample.Spread(0.0, drawn, 0, ratio=1.0, freedom=freedom, usable=True)
    for level in (0.6, 0.8, 0.95):
        t = stats.t.ppf((1 + level) / 2, freedom)
        low, high = spread.ends(level)
        assert (low, high) == pytest.approx((-t, t), rel=2e-3)
        assert spread.p_value(low) == pytest.approx(1 - level, rel=5e-3)
    known = {1.0: 12.706, 3.0: 3.1824, 7.0: 2.3646, 30.0: 2.0423}  # two-sided 95 %, from printed tables
    if freedom in known:
        assert spread.ends(0.95)[1] == pytest.approx(known[freedom], rel=2e-3)
    wider = replace(spread, ratio=1.25)
    assert wider.ends(0.8)[1] == pytest.approx(1.25 * stats.t.ppf(0.9, freedom), rel=5e-3)
    assert wider.p_value(wider.ends(0.8)[0]) == pytest.approx(0.2, rel=5e-3)


def test_no_interval_where_the_data_give_none():
    perfect = patches([0, 0, 1, 1] * 5, [0.1, 0.2, 0.8, 0.9] * 5, group=np.repeat(np.arange(10), 2).astype(str))
    figure = judge(perfect, resampling=QUICK).figures["auroc"]
    assert figure.value == 1
    assert np.isnan([figure.low, figure.high]).all()

    one_slide = judge(replace(perfect, group=np.full(20, "only")), resampling=QUICK)
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


def test_very_many_clusters_need_no_widening(monkeypatch):
    judged = some_run()
    widened = judge(judged, resampling=QUICK).figures["auroc"]
    monkeypatch.setattr(resample, "_MOST_LEFT_OUT", 10)
    plain = judge(judged, resampling=QUICK).figures["auroc"]
    assert widened.low < plain.low < plain.high < widened.high


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


# --- runs together ----------------------------------------------------------------------------------------------------


def test_the_paired_test_keeps_its_level():
    """Two runs that are equally good, each on its own slides and figures: about 5 % are called different."""
    rng = np.random.default_rng(5)
    rejected, naive, samples = dict.fromkeys(COMPARED, 0), 0, 300
    for seed in range(samples):
        first, second = slides(rng, 40, runs=2)
        resampling = Resampling(replicates=300, seed=seed)
        pair = compare({"a": first, "b": second}, resampling=resampling).pairs[0]
        for name in COMPARED:
            rejected[name] += pair.differences[name].p < 0.05
        area, covariance = significance.delong(first.label, np.stack([first.probability, second.probability]))
        error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
        naive += stats.norm.sf(abs(area[0] - area[1]) / error) < 0.025
    for name in COMPARED:
        assert 0.02 <= rejected[name] / samples <= 0.075, name
    assert naive / samples > 0.15  # DeLong's test takes every patch for independent


def test_p_and_interval_agree():
    rng = np.random.default_rng(6)
    called = 0
    for seed in range(20):
        first, second = slides(rng, 30, runs=2, gain=1.5)
        pair = compare({"a": first, "b": second}, resampling=Resampling(replicates=4000, seed=seed)).pairs[0]
        for difference in pair.differences.values():
            excluded = difference.low > 0 or difference.high < 0
            called += excluded
            if abs(difference.p - 0.05) > 0.003:
                assert excluded == (difference.p < 0.05)
    assert 10 < called < 40


def test_beyond_all_resamples_the_tail_goes_on():
    """With 10,000 resamples, or with 100: many pairs can be told apart, and a demanding level finds no end."""
    rng = np.random.default_rng(0)
    for replicates in (100, 10_000):
        spread = resample.make_spread(0.1, 0.1 + 0.01 * rng.standard_normal(replicates), np.empty(0), n_clusters=10_000)
        assert 1e-30 < spread.p_value(0.0) < 1e-15
        low, high = spread.ends(1 - 1e-9)
        assert (low, high) == pytest.approx((0.1 - 0.061, 0.1 + 0.061), abs=0.01)
        assert spread.p_value(low) == pytest.approx(1e-9, rel=1e-3)


def test_a_clear_difference_is_found_and_its_sign_is_first_minus_second():
    first, second = slides(np.random.default_rng(1), 60, runs=2, gain=4.0)
    found = compare({"worse": first, "better": second})
    for name in COMPARED:
        difference = found.pairs[0].differences[name]
        assert difference.high < 0
        assert 0 < difference.p < 0.005
        values = [found.judgements[run].figures[name].value for run in ("worse", "better")]
        assert difference.value == pytest.approx(values[0] - values[1], abs=1e-12)
        assert found.ranks[name]["better"] == evidence.Rank(1, 1, 1, 1.0)
        assert found.ranks[name]["worse"] == evidence.Rank(2, 2, 2, 0.0)


def test_a_comparison_turned_round_is_the_same():
    first, second = slides(np.random.default_rng(2), 30, runs=2)
    there, back = (
        compare({"a": first, "b": second}, resampling=QUICK),
        compare({"b": second, "a": first}, resampling=QUICK),
    )
    for name in COMPARED:
        one, other = there.pairs[0].differences[name], back.pairs[0].differences[name]
        expected = (-other.value, -other.high, -other.low, other.p)
        assert (one.value, one.low, one.high, one.p) == pytest.approx(expected, rel=1e-12)
    assert there.judgements["a"] == back.judgements["a"] == judge(first, resampling=QUICK)


def test_rows_are_matched_by_id():
    first, second = slides(np.random.default_rng(2), 30, runs=2)
    shuffled = second.select(np.random.default_rng(0).permutation(len(second)))
    found, expected = (compare({"a": first, "b": run}, resampling=QUICK) for run in (shuffled, second))
    assert as_dict(found) == as_dict(expected)


def test_a_run_does_not_differ_from_itself():
    judged = some_run()
    found = compare({"a": judged, "again": judged}, resampling=QUICK)
    for name in COMPARED:
        difference = found.pairs[0].differences[name]
        assert (difference.value, difference.low, difference.high) == (0, 0, 0)
        assert difference.p == difference.p_holm == 1
        assert np.isnan(difference.detectable)
        assert found.ranks[name]["a"].value == found.ranks[name]["again"].value == 1
        assert found.ranks[name]["again"].share_first == 1
    test = compare({"a": alone(judged), "again": alone(judged)}, resampling=QUICK).pairs[0].delong
    assert (test.value, test.standard_error, test.z, test.p) == (0, 0, 0, 1)


def test_what_cannot_be_compared_is_refused_and_named():
    judged = patches([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4], group=["s", "s", "t", "t"])
    with pytest.raises(UserError, match="no runs to compare"):
        compare({})
    with pytest.raises(UserError, match=r"a is judged on ami-br/test, b on atnorm-br/test"):
        compare({"a": judged, "b": replace(judged, dataset="atnorm-br")})
    with pytest.raises(UserError, match=r"different patches of ami-br: 1 only in a \(first: 0003.png\). Run both"):
        compare({"a": judged, "b": judged.select(np.arange(3))})
    renamed = replace(judged, id=np.array(["0000.png", "0001.png", "0002.png", "new.png"]))
    with pytest.raises(UserError, match=r"1 only in a \(first: 0003.png\), 1 only in b \(first: new.png\)"):
        compare({"a": judged, "b": renamed})
    with pytest.raises(UserError, match=r"different labels for 1 patches of ami-br \(first: 0003.png, 1 and 0\)"):
        compare({"a": judged, "b": replace(judged, label=np.array([0, 1, 0, 0], dtype=np.int8))})
    with pytest.raises(UserError, match=r"different slides for 2 patches of ami-br \(first: 0002.png, t and u\)"):
        compare({"a": judged, "b": replace(judged, group=np.array(["s", "s", "u", "u"]))})


def test_ranks_share_the_better_place():
    value = np.array([0.8, 0.9, 0.8])
    drawn = np.array([[0.8, 0.7, np.nan, 0.8], [0.9, 0.7, np.nan, 0.7], [0.8, 0.6, np.nan, 0.9]])
    first, second, third = evidence._ranks(value, drawn, 0.95)
    assert (first.value, second.value, third.value) == (2, 1, 2)
    assert (first.low, first.high, third.low, third.high) == (1, 2, 1, 3)
    assert second.share_first == pytest.approx(2 / 3)
    assert np.isnan(evidence._ranks(value, np.full((3, 2), np.nan), 0.95)[0].share_first)


# --- Holm and DeLong: known answers -----------------------------------------------------------------------------------


def test_holm():
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert significance.holm([0.01, np.nan, 0.04]) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)
    assert len(significance.holm([])) == 0


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
    assert test.first == pytest.approx(roc_auc_score(first.label, first.probability), abs=1e-12)


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


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_results_are_plain_json():
    judged, other = slides(np.random.default_rng(0), 20, runs=2)
    votes = np.stack([judged.label] * 3, axis=1)
    domain = np.array(["a", "b"])[np.arange(len(judged)) % 2]
    results = (
        compare({"a": judged, "b": other}, resampling=QUICK),
        compare({"a": by_patch(judged), "b": by_patch(other)}, resampling=QUICK),
        by_agreement(judged, votes, resampling=QUICK),
        by_domain(judged, domain, resampling=QUICK),
        calibrate(judged, prevalences=(0.2,), resampling=QUICK),
        by_threshold(judged, domain, resampling=QUICK),
        by_slide(judged, domain, out_of_fold=other, resampling=QUICK),
        judge(patches([0, 0], [0.1, 0.2]), resampling=QUICK),
    )
    for result in results:
        plain = as_dict(result)
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert as_dict(results[-1])["figures"]["auroc"]["value"] is None
