"""Are runs judged on what they predicted, and compared on the same patches?"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from drawn_runs import QUICK, by_patch, patches, slides

from features.console import UserError
from probe import evidence
from probe.calibration import calibrate
from probe.domains import by_domain
from probe.ensembles import ensemble_of, rows_of
from probe.evidence import COMPARED, compare, evaluate, judge
from probe.metrics import as_dict, best_threshold
from probe.raters import by_agreement
from probe.rates import by_slide
from probe.runs import Predictions
from probe.thresholds import by_threshold

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
        logit=rng.standard_normal((len(ids), 1)).astype(np.float32),
    )


def test_an_ensemble_is_the_mean_over_fold_models_in_the_order_of_the_table():
    run = predictions()
    judged = ensemble_of(run, "ami-br", "test")
    assert judged.id.tolist() == ["t2.png", "t0.png", "t3.png", "t1.png"]
    assert judged.label.tolist() == [0, 0, 1, 1]
    assert judged.group.tolist() == ["slide 1", "slide 0", "slide 1", "slide 0"]
    of_t2 = run.probability[run.id == "t2.png", 1]
    assert judged.probability[0, 1] == pytest.approx(of_t2.mean(), abs=1e-15)
    held_out = run.split == "validation"
    assert judged.threshold == best_threshold(run.label[held_out], run.probability[held_out, 1])
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


# --- runs together ----------------------------------------------------------------------------------------------------


def test_a_clear_difference_is_found_and_its_sign_is_first_minus_second():
    first, second = slides(np.random.default_rng(1), 60, runs=2, gain=4.0)
    found = compare({"worse": first, "better": second})
    for name in COMPARED:
        difference = found.pairs[0].differences[name]
        assert difference.high < 0
        assert 0 < difference.p < 0.05
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
