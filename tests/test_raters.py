"""Are raters and run compared fairly, and is agreement what other packages call so?"""

import krippendorff
import numpy as np
import pytest
from drawn_runs import QUICK, patches, some_run
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, log_loss, recall_score
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

from features.console import UserError
from probe.raters import RATER_FIGURES, by_agreement


def panel(label, *, raters: int = 3, right: float = 0.85, missing: float = 0.0, seed: int = 0):
    """Votes of raters who are mostly right, each on their own."""
    rng = np.random.default_rng(seed)
    votes = np.where(
        rng.random((len(label), raters)) < right, np.asarray(label)[:, None], 1 - np.asarray(label)[:, None]
    )
    return np.where(rng.random(votes.shape) < missing, -1, votes)


# --- agreement of the raters ------------------------------------------------------------------------------------------


def test_fleiss_kappa_is_that_of_statsmodels_where_all_vote():
    judged = some_run()
    votes = panel(judged.label, raters=4)
    counts, _ = aggregate_raters(votes)
    view = by_agreement(judged, votes, resampling=QUICK)
    assert view.fleiss.value == pytest.approx(fleiss_kappa(counts), abs=1e-12)
    assert view.fleiss.low < view.fleiss.value < view.fleiss.high


def test_fleiss_kappa_of_unequal_numbers_of_votes():
    """By hand: 2 of 2, 1 of 2, 0 of 3 and 1 of 3 votes. Disagreeing pairs by m: 1/2 + 2/3; 6 votes beyond the first."""
    votes = np.array([[1, 1, -1], [-1, 1, 0], [0, 0, 0], [0, 1, 0]])
    view = by_agreement(patches([1, 1, 0, 0], [0.9, 0.8, 0.1, 0.2]), votes, resampling=QUICK)
    assert view.fleiss.value == pytest.approx(1 - (1 / 2 + 2 / 3) / (6 * 0.4 * 0.6), abs=1e-12)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_krippendorffs_alpha_is_that_of_its_package(missing):
    judged = some_run()
    votes = panel(judged.label, raters=4, missing=missing)
    data = np.where(votes < 0, np.nan, votes.astype(float)).T
    view = by_agreement(judged, votes, resampling=QUICK)
    expected = krippendorff.alpha(data, level_of_measurement="nominal")
    assert view.krippendorff.value == pytest.approx(expected, abs=1e-12)
    assert view.n_unrated == ((votes >= 0).sum(axis=1) < 2).sum()


def test_slides_make_agreement_less_certain_than_patches():
    """Whole slides are easy or hard to tell: the interval over slides is wider than over patches taken alone."""
    rng = np.random.default_rng(3)
    slide = np.repeat(np.arange(20), 12)
    label = rng.integers(0, 2, 240)
    right = np.where(rng.random(20) < 0.5, 0.6, 0.99)[slide]
    votes = np.where(rng.random((240, 3)) < right[:, None], label[:, None], 1 - label[:, None])
    by_slide = by_agreement(patches(label, rng.random(240), group=slide.astype(str)), votes, resampling=QUICK).fleiss
    by_patch = by_agreement(patches(label, rng.random(240)), votes, resampling=QUICK).fleiss
    assert by_slide.value == by_patch.value
    assert by_slide.high - by_slide.low > 1.3 * (by_patch.high - by_patch.low)


# --- the run in a rater's place ---------------------------------------------------------------------------------------


def test_every_rater_is_compared_on_the_same_patches():
    """Where all three voted, no row leaves out the patches on which the two others disagree."""
    judged = some_run(n_slides=60)
    votes = panel(judged.label)
    first, second, third = by_agreement(judged, votes, resampling=QUICK).raters
    assert first.n == second.n == third.n == len(judged)


def test_a_rater_and_the_run_are_compared_with_each_other_rater_in_turn():
    judged = some_run()
    votes = panel(judged.label, missing=0.2)
    says = (judged.probability[:, 1] >= judged.threshold).astype(int)
    for k, row in enumerate(by_agreement(judged, votes, resampling=QUICK).raters):
        for who, figures in ((votes[:, k], row.rater), (says, row.run)):
            expected = []
            for other in range(3):
                both = (votes[:, k] >= 0) & (votes[:, other] >= 0)
                if other != k:
                    y, p = votes[both, other], who[both]
                    kappa = cohen_kappa_score(y, p)
                    recalls = recall_score(y, p), recall_score(y, p, pos_label=0)
                    expected.append((balanced_accuracy_score(y, p), *recalls, kappa))
            found = [figures[name].value for name in RATER_FIGURES]
            assert found == pytest.approx(np.mean(expected, axis=0), abs=1e-12)
        assert row.n == ((votes[:, k] >= 0) & ((votes >= 0).sum(axis=1) > 1)).sum()


def test_the_run_is_better_or_worse_than_a_rater_with_p_values_for_all_raters():
    judged = some_run(n_slides=60)
    view = by_agreement(judged, panel(judged.label, raters=5, right=0.97), resampling=QUICK)
    for row in view.raters:
        values = row.run["balanced_accuracy"].value - row.rater["balanced_accuracy"].value
        assert row.difference.value == pytest.approx(values, abs=1e-12)
        assert row.difference.high < 0  # these raters are better than this run
        assert row.difference.p <= row.difference.p_holm < 0.05
        assert row.rater["kappa"].low < row.rater["kappa"].value < row.rater["kappa"].high


def test_a_run_of_several_trainings_is_their_mean():
    judged = some_run(trainings=3)
    votes = panel(judged.label)
    whole = by_agreement(judged, votes, resampling=QUICK)
    each = [
        by_agreement(patches(judged.label, p, group=judged.group, threshold=0.65), votes, resampling=QUICK)
        for p in judged.positive
    ]
    for name in RATER_FIGURES:
        values = [view.raters[0].run[name].value for view in each]
        assert len(set(values)) == 3
        assert whole.raters[0].run[name].value == pytest.approx(np.mean(values), abs=1e-12)
        assert whole.raters[0].rater[name] == each[0].raters[0].rater[name]
    assert whole.soft["brier"].value == pytest.approx(np.mean([view.soft["brier"].value for view in each]), abs=1e-12)


def test_a_rater_who_never_votes_has_no_figures():
    judged = patches([0, 1, 0, 1], [0.1, 0.9, 0.2, 0.8])
    votes = np.repeat(judged.label[:, None], 3, axis=1)
    votes[:, 2] = -1
    silent = by_agreement(judged, votes, resampling=QUICK).raters[2]
    assert silent.n == 0
    assert np.isnan([silent.rater["balanced_accuracy"].value, silent.run["kappa"].value]).all()


# --- agreed, disputed, soft -------------------------------------------------------------------------------------------


def test_unanimous_and_disputed_patches_are_judged_apart():
    votes = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 0], [-1, 1, 1], [-1, -1, 1]])
    judged = patches([1, 1, 1, 0, 0, 0, 1, 1], [0.9, 0.8, 0.7, 0.1, 0.2, 0.6, 0.3, 0.9])
    view = by_agreement(judged, votes, resampling=QUICK)
    assert (view.unanimous.n, view.disputed.n, view.n_unrated) == (3, 4, 1)
    assert view.unanimous.figures["balanced_accuracy"].value == balanced_accuracy_score([1, 0, 1], [1, 0, 0])
    alike = by_agreement(judged, np.repeat(judged.label[:, None], 3, axis=1), resampling=QUICK)
    assert alike.disputed is None


def test_soft_labels_are_the_share_of_votes():
    judged = some_run()
    votes = panel(judged.label, raters=5, missing=0.1)
    share = np.where(votes == 1, 1, 0).sum(axis=1) / (votes >= 0).sum(axis=1)
    soft = by_agreement(judged, votes, resampling=QUICK).soft
    p = judged.probability[:, 1]
    assert soft["brier"].value == pytest.approx(np.mean((p - share) ** 2), abs=1e-12)
    assert soft["correlation"].value == pytest.approx(np.corrcoef(p, share)[0, 1], abs=1e-12)
    weighted = log_loss(np.repeat([1, 0], len(p)), np.tile(p, 2), sample_weight=np.concatenate([share, 1 - share]))
    assert soft["log_loss"].value == pytest.approx(weighted, abs=1e-12)
    assert soft["log_loss"].low < soft["log_loss"].value < soft["log_loss"].high


def test_patches_on_which_the_run_stands_alone_are_listed_the_most_confident_first():
    #                  all for 1, run 0      all for 0, run 1      with two of three     with one of three
    votes = np.array(
        [[1, 1, 1], [1, 1, -1], [0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 0], [0, 1, -1]]
    )
    probability = [0.45, 0.1, 0.99, 0.2, 0.8, 0.3, 0.3, 0.9, 0.9]  # the last: one vote each way, no minority
    judged = patches([1, 1, 0, 0, 1, 0, 1, 0, 1], probability, ids=list("abcdefghi"))
    view = by_agreement(judged, votes, resampling=QUICK)
    assert [(one.id, one.label, one.probability) for one in view.against_unanimous] == [
        ("c", 0, 0.99),
        ("b", 1, 0.1),
        ("a", 1, 0.45),
    ]
    assert [one.id for one in view.with_minority] == ["h", "g"]
    assert (view.n_against_unanimous, view.n_with_minority) == (3, 2)


def test_at_most_fifty_of_many_are_listed():
    label = np.tile([0, 1], 40)
    view = by_agreement(patches(label, 1 - label), np.stack([label, label], axis=1), resampling=QUICK)
    assert (view.n_against_unanimous, len(view.against_unanimous)) == (80, 50)


def test_votes_that_are_none_are_refused():
    judged = patches([0, 1], [0.1, 0.9])
    with pytest.raises(ValueError, match=r"votes must be \(2, raters\), got shape \(3, 3\)"):
        by_agreement(judged, np.zeros((3, 3), dtype=int))
    with pytest.raises(ValueError, match=r"votes must be 0, 1 or -1, found \[2\]"):
        by_agreement(judged, np.full((2, 3), 2))
    with pytest.raises(UserError, match=r"ami-br has the votes of 1 raters; agreement needs two"):
        by_agreement(judged, np.zeros((2, 1), dtype=int))
    with pytest.raises(UserError, match=r"ami-br has no patch with two votes"):
        by_agreement(judged, np.array([[1, -1], [-1, 0]]))
