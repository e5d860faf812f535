"""Are rates per slide corrected as the literature does, and do limits and concordance equal their definitions?"""

from dataclasses import replace

import numpy as np
import pytest
from drawn_runs import QUICK, patches, some_run

from features.console import UserError
from probe import rates
from probe.rates import by_slide, corrected_rate, error_rates, share_interval

# --- one slide --------------------------------------------------------------------------------------------------------


def test_a_rate_is_corrected_as_by_rogan_and_gladen():
    """All 40 positives and 60 negatives seen with sensitivity .8 and specificity .9: 32 + 6 are called positive."""
    value, low, high = corrected_rate(38, 100, 0.8, 0.9, n_sensitivity=50, n_specificity=50)
    assert value == pytest.approx(0.4, abs=1e-12)
    assert low < 0.4 < high


def test_its_interval_is_that_of_lang_and_reiczigel():
    """By hand, from the formulas of the paper: 30 of 100, sensitivity 45 of 50, specificity 76 of 80."""
    z2 = 1.959963984540054**2
    apparent, hit, rejected = (30 + z2 / 2) / (100 + z2), 46 / 52, 77 / 82
    gain = hit + rejected - 1
    share = (apparent + rejected - 1) / gain
    of_hit, of_rejected = hit * (1 - hit) / 52, rejected * (1 - rejected) / 82
    error = np.sqrt(apparent * (1 - apparent) / (100 + z2) + share**2 * of_hit + (1 - share) ** 2 * of_rejected) / gain
    middle = share + 2 * z2 * (share * of_hit - (1 - share) * of_rejected)
    value, low, high = corrected_rate(30, 100, 45 / 50, 76 / 80, n_sensitivity=50, n_specificity=80)
    assert value == pytest.approx((0.3 + 0.95 - 1) / (0.9 + 0.95 - 1), abs=1e-12)
    assert (low, high) == pytest.approx((middle - np.sqrt(z2) * error, middle + np.sqrt(z2) * error), abs=1e-12)


def test_rates_stay_between_0_and_1_and_do_not_exist_for_a_run_that_only_guesses():
    options = {"n_sensitivity": 50, "n_specificity": 50}
    assert corrected_rate(0, 20, 0.8, 0.8, **options)[:2] == (0, 0)
    assert corrected_rate(20, 20, 0.8, 0.8, **options)[::2] == (1, 1)
    assert np.isnan(corrected_rate(5, 20, 0.4, 0.6, **options)).all()
    assert np.isnan(corrected_rate(5, 20, 0.3, 0.6, **options)).all()
    assert np.isnan(corrected_rate(0, 0, 0.9, 0.9, **options)).all()


def test_less_is_known_of_a_slide_if_errors_differ_between_slides():
    options = {"n_sensitivity": 500, "n_specificity": 500}
    alike = corrected_rate(30, 100, 0.8, 0.9, **options)
    varying = corrected_rate(30, 100, 0.8, 0.9, **options, slides=(0.02, 0.01, 0.0))
    # Slides on which the run says class 1 too often, of either class: errors that add up.
    together = corrected_rate(30, 100, 0.8, 0.9, **options, slides=(0.02, 0.01, -0.014))
    assert alike[0] == varying[0] == together[0]
    widths = [high - low for _, low, high in (alike, varying, together)]
    assert widths == sorted(widths)
    assert widths[0] < 0.8 * widths[1] < 0.9 * widths[2]


def test_wilsons_interval():
    """The example of Newcombe (Statistics in Medicine 17, 1998): 81 of 263 is .2553 to .3662; and 0 of 20."""
    assert share_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert share_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


# --- what is known of a run's errors ----------------------------------------------------------------------------------


def test_errors_are_known_from_out_of_fold_predictions_at_the_threshold_asked_for():
    run = some_run()
    y, p = run.label == 1, run.probability[:, 1]
    for threshold, at in ((None, 0.65), (0.3, 0.3)):
        found = error_rates(run, threshold=threshold, resampling=QUICK)
        assert found.sensitivity.value == pytest.approx((p[y] >= at).mean(), abs=1e-12)
        assert found.specificity.value == pytest.approx((p[~y] < at).mean(), abs=1e-12)
        assert 1 < found.n_sensitivity <= y.sum()
        assert 1 < found.n_specificity < 0.7 * (~y).sum()  # figures of one slide resemble each other


def test_variation_between_slides_is_found_and_chance_is_not():
    """2,000 slides of 10 figures of each class; sensitivity is .6 or 1, specificity 1 or .6: a variance of .04."""
    rng = np.random.default_rng(0)
    slide, label = np.repeat(np.arange(2000), 20), np.tile([0, 1] * 10, 2000)
    eager = rng.random(2000) < 0.5
    right = np.where(label == 1, np.where(eager[slide], 1.0, 0.6), np.where(eager[slide], 0.6, 1.0))
    for rate, expected in ((right, (0.04, 0.04, -0.04)), (np.full(len(label), 0.8), (0, 0, 0))):
        hit = rng.random(len(label)) < rate
        run = patches(label, np.where(hit, label, 1 - label), group=slide.astype(str))
        assert error_rates(run, resampling=replace(QUICK, replicates=100)).slides == pytest.approx(expected, abs=0.004)


def test_variation_between_few_slides_is_not_underestimated():
    """Six slides stray from a mean that they made themselves: by a sixth too little, if that is ignored."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(1000):
        rate, n = np.where(rng.random(6) < 0.5, 0.9, 0.5), np.full(6, 30.0)
        found.append(
            rates._between_slides(np.stack([n, n, rng.binomial(30, rate), rng.binomial(30, 1.4 - rate)], axis=1))
        )
    assert np.mean(found, axis=0) == pytest.approx((0.04, 0.04, -0.04), abs=0.003)


def test_a_run_that_never_errs_is_known_by_its_slides():
    label = np.tile([0, 1], 20)
    found = error_rates(patches(label, label, group=(np.arange(40) // 4).astype(str)), resampling=QUICK)
    assert (found.n_sensitivity, found.n_specificity, found.slides) == (10, 10, (0, 0, 0))


# --- the slides of a set ----------------------------------------------------------------------------------------------


def test_slides_are_compared_by_their_rates():
    run, out_of_fold = some_run(), some_run(1, 60, threshold=0.5)  # errors are those at the threshold of the set
    domain = np.where(run.group.astype(int) % 2 == 1, "b", "a")
    view = by_slide(run, domain, out_of_fold=out_of_fold, resampling=QUICK)
    names, n = np.unique(run.group, return_counts=True)
    assert [one.slide for one in view.slides] == names[n >= 10].tolist()
    assert view.n_left_out == (n < 10).sum()
    known = error_rates(out_of_fold, threshold=run.threshold, resampling=QUICK)
    assert (view.sensitivity, view.specificity) == (known.sensitivity, known.specificity)
    for one in view.slides:
        rows = run.group == one.slide
        assert (one.n, one.domain) == (rows.sum(), domain[rows][0])
        assert one.annotated == pytest.approx((run.label[rows] == 1).mean())
        positive = (run.probability[rows, 1] >= run.threshold).sum()
        assert one.predicted == pytest.approx(positive / one.n)
        assert (one.corrected, one.low, one.high) == pytest.approx(known.corrected(positive, one.n), abs=1e-12)


def test_agreement_is_that_of_bland_altman_and_lin():
    run, out_of_fold = some_run(), some_run(1, 60, threshold=0.5)
    domain = np.where(run.group.astype(int) % 3 == 0, "b", "a")
    view = by_slide(run, domain, out_of_fold=out_of_fold, resampling=QUICK)
    assert list(view.agreement) == ["all", "a", "b"]
    for name, agreement in view.agreement.items():
        slides = [one for one in view.slides if name in ("all", one.domain)]
        assert agreement.n_slides == len(slides)
        y = np.array([one.annotated for one in slides])
        for figures, column in ((agreement.predicted, "predicted"), (agreement.corrected, "corrected")):
            x = np.array([getattr(one, column) for one in slides])
            bias, limit = (x - y).mean(), 1.96 * (x - y).std(ddof=1)
            concordance = 2 * np.cov(x, y, ddof=0)[0, 1] / (x.var() + y.var() + bias**2)
            expected = {
                "bias": bias,
                "lower limit": bias - limit,
                "upper limit": bias + limit,
                "concordance": concordance,
            }
            assert {key: one.value for key, one in figures.items()} == pytest.approx(expected, abs=1e-9)
    for one in view.agreement["all"].corrected.values():
        assert one.low < one.value < one.high


def test_correction_takes_out_what_errors_add():
    """A run with equal errors on every slide draws rates to the middle; corrected rates are right on average."""
    rng = np.random.default_rng(0)
    slide = np.repeat(np.arange(40), 60)
    label = (rng.random(len(slide)) < rng.beta(1, 3, 40)[slide]).astype(int)

    def errs(labels):
        return np.where(rng.random(len(labels)) < np.where(labels == 1, 0.75, 0.85), labels, 1 - labels)

    run = patches(label, errs(label), group=slide.astype(str))
    view = by_slide(run, np.full(len(label), ""), out_of_fold=patches(label, errs(label)), resampling=QUICK)
    everywhere = view.agreement["all"]
    assert everywhere.predicted["bias"].low > 0
    assert everywhere.corrected["bias"].low < 0 < everywhere.corrected["bias"].high
    assert everywhere.corrected["concordance"].value > everywhere.predicted["concordance"].value
    assert np.mean([one.low <= one.annotated <= one.high for one in view.slides]) > 0.9


def test_agreement_of_several_trainings_is_their_mean():
    run, out_of_fold = some_run(trainings=2), some_run(1, 60, trainings=2)
    domain = np.full(len(run), "")
    whole = by_slide(run, domain, out_of_fold=out_of_fold, resampling=QUICK).agreement["all"]
    each = [
        by_slide(
            replace(run, by_training=run.by_training[[k]], thresholds=run.thresholds[[k]]),
            domain,
            out_of_fold=replace(out_of_fold, by_training=out_of_fold.by_training[[k]]),
            resampling=QUICK,
        ).agreement["all"]
        for k in range(2)
    ]
    for form in ("predicted", "corrected"):
        values = [getattr(one, form)["bias"].value for one in each]
        assert values[0] != values[1]
        assert getattr(whole, form)["bias"].value == pytest.approx(np.mean(values), abs=1e-12)


def test_a_slide_in_two_domains_has_a_row_in_each():
    run = patches(np.tile([0, 1], 30), np.full(60, 0.7), group=np.repeat(["s", "t", "u"], 20))
    domain = np.where(np.arange(60) < 10, "scanner 1", "scanner 2")
    view = by_slide(run, domain, out_of_fold=run, resampling=QUICK)
    assert [(one.slide, one.domain, one.n) for one in view.slides] == [
        ("s", "scanner 1", 10),
        ("s", "scanner 2", 10),
        ("t", "scanner 2", 20),
        ("u", "scanner 2", 20),
    ]
    assert view.agreement["all"].n_slides == view.agreement["scanner 2"].n_slides == 3
    assert "scanner 1" not in view.agreement  # limits of a single slide
    assert np.isnan(view.slides[0].corrected)  # this run says class 1 of everything


def test_what_is_none_is_refused():
    run = patches([0, 1], [0.1, 0.9])
    with pytest.raises(ValueError, match=r"domain must be \(2,\), got shape \(3,\)"):
        by_slide(run, np.array(["a", "b", "c"]), out_of_fold=run)
    with pytest.raises(UserError, match=r"ami-br has no slides"):
        by_slide(run, np.array(["", ""]), out_of_fold=run)
