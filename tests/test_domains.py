"""Does every domain count the same, and is the worst one found?"""

from dataclasses import replace

import numpy as np
import pytest
from drawn_runs import QUICK, of_two, patches, some_run

from features.console import UserError
from probe.domains import by_domain
from probe.evidence import judge
from probe.metrics import NAMES


def test_every_domain_counts_the_same():
    judged = some_run(2, 90)
    slide = judged.group.astype(int)
    domain = np.where(slide < 60, "lymphoma", np.where(slide < 75, "mast cell", "lung"))
    domain[:4] = ""
    view = by_domain(judged, domain, resampling=QUICK)
    assert list(view.domains) == ["lung", "lymphoma", "mast cell"]
    assert view.n_without == 4
    for name in NAMES:
        values = {d: judgement.figures[name].value for d, judgement in view.domains.items()}
        assert view.macro[name].value == pytest.approx(np.mean(list(values.values())), abs=1e-12)
        assert view.n_domains[name] == 3
        worst = (max if name in ("brier", "ece") else min)(values, key=values.__getitem__)
        assert (view.worst[name].domain, view.worst[name].value) == (worst, pytest.approx(values[worst]))
        assert 0 < view.worst[name].share <= 1
        assert view.macro[name].low < view.macro[name].high
    lung = judge(judged.select(domain == "lung"), resampling=QUICK)
    assert view.domains["lung"] == lung
    assert lung.n_clusters == 15


def test_a_slide_may_lie_in_two_domains():
    judged = some_run(n_slides=40)
    view = by_domain(judged, np.where(np.arange(len(judged)) % 2, "scanner 1", "scanner 2"), resampling=QUICK)
    whole = judge(judged, resampling=QUICK).figures["specificity"]
    assert view.macro["specificity"].value == pytest.approx(whole.value, abs=0.05)
    assert view.macro["specificity"].low < whole.value < view.macro["specificity"].high
    # Both halves of a slide are drawn together: their mean is as uncertain as the whole.
    width = view.macro["specificity"].high - view.macro["specificity"].low
    assert width == pytest.approx(whole.high - whole.low, rel=0.2)


def test_domains_that_share_no_slide_are_independent():
    """The mean of two domains that are the same patches on other slides is known better than either, by root 2."""
    one = some_run(n_slides=40)
    twice = patches(
        np.tile(one.label, 2),
        np.tile(one.probability[:, 1], 2),
        group=np.concatenate([np.char.add("a", one.group), np.char.add("b", one.group)]),
        threshold=0.65,
    )
    view = by_domain(twice, np.repeat(["a", "b"], len(one)), resampling=QUICK)
    for name in ("specificity", "auroc", "brier"):
        single, mean = view.domains["a"].figures[name], view.macro[name]
        assert mean.value == pytest.approx(single.value, abs=1e-12)
        assert mean.high - mean.low == pytest.approx((single.high - single.low) / np.sqrt(2), rel=0.15)


def test_a_domain_without_a_class_is_left_out_of_the_mean():
    judged = patches([0, 1, 0, 1, 0, 1, 0, 0], [0.1, 0.8, 0.3, 0.4, 0.7, 0.9, 0.4, 0.6])
    view = by_domain(judged, np.array(["a"] * 6 + ["b"] * 2), resampling=QUICK)
    assert view.n_domains["auroc"] == 1
    assert view.n_domains["brier"] == 2
    assert view.macro["auroc"].value == view.domains["a"].figures["auroc"].value
    nothing = by_domain(judged.select(judged.label == 0), np.array(["a"] * 5), resampling=QUICK)
    assert np.isnan(nothing.macro["auroc"].value)
    assert nothing.worst["auroc"] is None


def test_trainings_are_averaged_and_their_scatter_makes_the_mean_less_certain():
    judged = some_run(n_slides=60, trainings=3)
    domain = np.where(judged.group.astype(int) % 2 == 1, "a", "b")
    whole = by_domain(judged, domain, resampling=QUICK)
    each = [
        by_domain(replace(judged, by_training=p[None], thresholds=judged.thresholds[:1]), domain, resampling=QUICK)
        for p in judged.by_training
    ]
    values = [one.macro["auroc"].value for one in each]
    assert whole.macro["auroc"].value == pytest.approx(np.mean(values), abs=1e-12)
    assert whole.domains["a"].trainings == 3
    # The same run thrice has no scatter of training.
    repeated = replace(judged, by_training=np.repeat(judged.by_training[:1], 3, axis=0))
    steady = by_domain(repeated, domain, resampling=QUICK).macro["auroc"]
    assert (steady.low, steady.high) == pytest.approx((each[0].macro["auroc"].low, each[0].macro["auroc"].high))
    far = replace(
        judged, by_training=of_two(np.stack([judged.positive[0], judged.positive[0] ** 9, np.full(len(judged), 0.5)]))
    )
    scattered = by_domain(far, domain, resampling=QUICK).macro["auroc"]
    assert scattered.high - scattered.low > 2 * (steady.high - steady.low)


def test_the_share_of_the_worst_domain_is_that_of_the_largest_error():
    rng = np.random.default_rng(4)
    label = np.tile([0, 1], 60).astype(np.int8)
    bad = np.arange(120) < 60
    sure = np.where(label == 1, 0.9, 0.1) + 0.05 * rng.standard_normal(120).clip(-1, 1)
    view = by_domain(patches(label, np.where(bad, 1 - sure, sure)), np.where(bad, "bad", "good"), resampling=QUICK)
    for name in ("brier", "balanced_accuracy"):
        assert (view.worst[name].domain, view.worst[name].share) == ("bad", 1.0)


def test_domains_that_are_none_are_refused():
    judged = patches([0, 1], [0.1, 0.9])
    with pytest.raises(ValueError, match=r"domain must be \(2,\), got shape \(3,\)"):
        by_domain(judged, np.array(["a", "b", "c"]))
    with pytest.raises(UserError, match=r"ami-br has no domains"):
        by_domain(judged, np.array(["", ""]))
