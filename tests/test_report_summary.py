"""Do the three sentences on top say what the figures say, and never more?"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest

from probe.evidence import Comparison, Detectable, Pair, Rank
from probe.leaks import UNSEEN
from probe.metrics import COMPARED, Interval, Judgement
from probe.predictions import VALIDATION
from probe.report.summary import three_sentences
from probe.significance import Difference

NONE = Interval(math.nan, math.nan, math.nan)


def apart(value: float, p: float = 0.5, *, width: float = 0.05, **more: Any) -> Difference:
    return Difference(value, value - width, value + width, p, p, 0, detectable=0.07, detectable_holm=0.09, **more)


def judged(
    on: str,
    areas: dict[str, float],
    differences: dict[tuple[str, str], Difference] | None = None,
    *,
    split: str = "test",
    unit: str = "slide",
    n: int = 56,
    n_positive: int = 30,
    trainings: int = 1,
    turned: float = math.nan,
    wanted: tuple[float, int] | None = None,
    exact: tuple[str, ...] = (),
    classes: tuple[str, ...] = ("Normal", "Atypical"),
    held: tuple[int, ...] | None = None,
) -> Any:
    """A set with its runs' AUROCs; two runs are .05 apart and cannot be told so, unless said otherwise."""
    wide = {"wide": (0.8, 0.99)} if unit == "sample" else {}
    order = sorted(areas, key=lambda label: -areas[label])
    known = differences or {}
    pairs = [
        Pair(
            a, b, dict.fromkeys(COMPARED, known.get((a, b), apart(areas[a] - areas[b]))), "", None, {},
            dict.fromkeys(COMPARED, turned),
        )
        for a, b in combinations(areas, 2)
    ]  # fmt: skip
    figures = {
        label: {
            "auroc": NONE if math.isnan(area) else Interval(area, area - 0.03, area + 0.03, 0, **wide),
            "specificity": Interval(0.9, 0.85, 0.94, 0),
            "recall 2": Interval(0.7, 0.65, 0.74, 0),
        }
        for label, area in areas.items()
    }
    limit = Detectable(0.06, 0.09, 0.05, 0.08, n, wanted[0] if wanted else None, wanted[1] if wanted else None)
    comparison = Comparison(
        judgements={
            label: Judgement(
                ((n if unit == "sample" else 600) - n_positive, n_positive), unit, n, 0, 0.5, 0.95, 100, of, trainings
            )
            for label, of in figures.items()
        },
        pairs=tuple(pairs),
        ranks={"auroc": {label: Rank(order.index(label) + 1, 1, 2, 0.5) for label in areas}},
        detectable={"auroc": limit} if pairs else {},
        trainings={},
        exact=exact,
    )
    return SimpleNamespace(
        dataset=on,
        split=split,
        n_positive=n_positive,
        classes=classes,
        held=tuple(range(len(classes))) if held is None else held,
        is_validation=split == VALIDATION,
        comparison=comparison,
        any_judgement=next(iter(comparison.judgements.values())),
    )


def said(*sets: Any, margin: float | None = None) -> list[str]:
    sentences = three_sentences(SimpleNamespace(sets=sets, margin=margin))  # type: ignore[arg-type]
    assert 1 <= len(sentences) <= 3
    for sentence in sentences:
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert "nan" not in sentence
    return list(sentences)


ONCE = "As every run was trained once, another training may change the order of lora and probe: train with --seeds 3."
LORA_WINS = {("probe", "lora"): apart(-0.12, 0.001)}
TWO = {"probe": 0.8, "lora": 0.92}


def test_the_better_of_two_is_named_with_the_difference_and_its_interval():
    assert said(judged("ami-br", TWO, LORA_WINS)) == [
        "On ami-br's 56 held-out slides, lora is better than probe by .12 in AUROC (.07 to .17).",
        ONCE,
    ]


def test_two_that_cannot_be_told_apart_are_not_called_equal_and_the_limit_of_the_set_is_said():
    first, _ = said(judged("ami-br", {"probe": 0.89, "lora": 0.9}, wanted=(0.03, 210)))
    assert first == (
        "On ami-br's 56 held-out slides, lora and probe cannot be told apart in AUROC (−.04 to .06); there, "
        "differences below .07 would mostly go unseen; to show .03 it would take about 210 slides."
    )


TIE = Difference(0.0, 0.0, 0.0, 1.0, 1.0, 0)


def test_runs_that_say_the_same_are_said_to_and_not_ranked():
    first, _ = said(judged("a", {"x": 1.0, "y": 1.0}, {("x", "y"): TIE}))
    assert first == "On a's 56 held-out slides, x and y reach the same AUROC, 1.00 (.97 to 1.03)."
    unbounded = replace(TIE, low=math.nan, high=math.nan)
    assert "x and y reach the same AUROC" in said(judged("a", {"x": 1.0, "y": 1.0}, {("x", "y"): unbounded}))[0]
    same_value_only = replace(TIE, low=-0.05, high=0.05)
    assert "cannot be told apart" in said(judged("a", {"x": 0.9, "y": 0.9}, {("x", "y"): same_value_only}))[0]
    areas = {"x": 0.9, "y": 0.9, "z": 0.9}
    of_three = said(judged("a", areas, dict.fromkeys(combinations(areas, 2), TIE)))[0]
    assert of_three == "On a's 56 held-out slides, all 3 runs reach the same AUROC, .90 (.87 to .93)."
    won = apart(0.12, 0.001)
    behind = {("x", "y"): TIE, ("x", "z"): won, ("y", "z"): won}
    assert said(judged("a", areas | {"z": 0.78}, behind))[0] == (
        "On a's 56 held-out slides, x and y share the highest AUROC, .90 (.87 to .93), and are better than z by .12 "
        "(.07 to .17)."
    )
    behind = {("x", "y"): TIE, ("x", "z"): apart(0.02), ("y", "z"): apart(0.02)}
    assert (
        "share the highest AUROC, .90 (.87 to .93); the other run cannot be told from them; there"
        in (said(judged("a", areas | {"z": 0.88}, behind))[0])
    )


def test_equal_figures_out_of_fold_are_no_range():
    first, _ = said(judged("a", {"x": 1.0, "y": 0.9999}, split=VALIDATION))
    assert first.startswith("Out of fold on a, the 2 runs reach the same AUROC, 1.00, which")
    assert "AUROCs of .80 to .92" in said(judged("a", TWO, split=VALIDATION))[0]


def test_a_difference_that_holm_does_not_leave_is_not_claimed():
    holm = Difference(0.12, 0.07, 0.17, 0.02, 0.06, 0, detectable=0.07)
    assert "cannot be told apart" in said(judged("a", {"x": 0.9, "y": 0.78}, {("x", "y"): holm}))[0]


def test_with_a_margin_runs_may_be_equivalent_or_not_worse():
    within = apart(0.003, width=0.01, p_equivalent_holm=0.01, p_not_worse_holm=0.004, p_not_better_holm=0.02)
    on = judged("a", {"x": 0.9, "y": 0.897}, {("x", "y"): within})
    assert "x and y are equivalent: their AUROCs differ by less than .02 (−.007 to .01)." in said(on, margin=0.02)[0]
    assert "cannot be told apart" in said(on)[0]
    only = apart(0.02, width=0.03, p_equivalent_holm=0.5, p_not_worse_holm=0.01, p_not_better_holm=0.5)
    on = judged("a", {"x": 0.9, "y": 0.88}, {("x", "y"): only})
    assert "x is not worse than y by .02 or more in AUROC, nor shown to be better" in said(on, margin=0.02)[0]
    turned = judged("a", {"y": 0.88, "x": 0.9}, {("y", "x"): apart(-0.02, p_not_better_holm=0.01)})
    assert "x is not worse than y" in said(turned, margin=0.02)[0]


def test_of_many_runs_it_is_counted_how_many_the_best_beats_and_cannot_be_told_from():
    areas = {"a": 0.9, "b": 0.89, "c": 0.85, "d": 0.7}
    wins = {("a", "c"): apart(0.05, 0.01), ("a", "d"): apart(0.2, 0.001)}
    first, _ = said(judged("ami-br", areas, wins))
    assert first == (
        "On ami-br's 56 held-out slides, a has the highest AUROC, .90 (.87 to .93); of the 3 other runs 2 are "
        "worse and 1 cannot be told from it; there, differences below .09 would mostly go unseen."
    )
    wins[("a", "b")] = apart(0.01, 0.04, width=0.009)
    assert said(judged("ami-br", areas, wins))[0] == (
        "On ami-br's 56 held-out slides, a has the highest AUROC, .90 (.87 to .93), and is better than every other "
        "run, than the next, b, by .01 (.001 to .02)."
    )


def test_one_run_is_compared_with_nothing():
    assert said(judged("a", {"x": 0.9}), judged("b", {"x": 0.8}, unit="sample", n=1746)) == [
        "On a's 56 held-out slides, x reaches an AUROC of .90 (.87 to .93).",
        "On b's 1,746 held-out patches, x reaches an AUROC of .80 (.77 to .83; .80 to .99 if patients gave several "
        "patches).",
        "As x was trained once, another training may change its figures: train with --seeds 3.",
    ]
    assert said(judged("a", {"x": 0.9}, trainings=3))[1] == (
        "The interval includes how much x changes from one of its 3 trainings to another."
    )


def test_without_a_test_set_nothing_is_claimed():
    sentences = said(judged("ami-br", TWO, LORA_WINS, split=VALIDATION))
    assert sentences[0].startswith("Out of fold on ami-br, the 2 runs reach AUROCs of .80 to .92, which is optimistic")
    alone = said(judged("ami-br", {"probe": 0.8}, split=VALIDATION))
    assert alone[0].startswith("Out of fold on ami-br, probe reaches an AUROC of .80, which is optimistic")
    assert "There is no test set" in sentences[1]
    assert not any("better than" in sentence for sentence in sentences)


def test_a_set_of_one_class_has_no_auroc():
    on = judged("a", {"x": math.nan, "y": math.nan}, n_positive=0)
    assert said(on)[0] == (
        "On a's 56 held-out slides, all of one class, there is no AUROC; the runs reach the same specificity, .90."
    )
    of_three = judged("a", {"x": math.nan, "y": math.nan}, classes=("p", "q", "r"), held=(2,))
    assert said(of_three)[0].endswith("there is no AUROC; the runs reach the same recall of r, .70.")
    assert (
        "the recall of r by x is .70 (.65 to .74)"
        in said(judged("a", {"x": math.nan}, classes=tuple("pqr"), held=(2,)))[0]
    )
    assert "the specificity of x is .90 (.85 to .94)" in said(judged("a", {"x": math.nan}, n_positive=0))[0]


def test_of_more_than_two_classes_the_macro_auroc_and_its_classes_are_named():
    three = {"classes": ("p", "q", "r", "s"), "held": (0, 1, 3)}
    assert said(judged("ami-br", TWO, LORA_WINS, **three))[0] == (
        "On ami-br's 56 held-out slides, lora is better than probe by .12 in macro AUROC over 3 classes (.07 to .17)."
    )
    assert "cannot be told apart in macro AUROC over 3 classes (" in said(judged("a", TWO, **three))[0]
    assert "x reaches a macro AUROC over 3 classes of .90 (" in said(judged("a", {"x": 0.9}, **three))[0]
    assert "has the highest macro AUROC over 3 classes, .92 (" in said(judged("a", TWO | {"z": 0.7}, **three))[0]
    within = apart(0.003, width=0.01, p_equivalent_holm=0.01, p_not_worse_holm=0.004, p_not_better_holm=0.02)
    on = judged("a", {"x": 0.9, "y": 0.897}, {("x", "y"): within}, **three)
    assert "their macro AUROCs over 3 classes differ by less than .02" in said(on, margin=0.02)[0]
    out_of_fold = judged("a", TWO, split=VALIDATION, **three)
    assert "the 2 runs reach macro AUROCs over 3 classes of .80 to .92" in said(out_of_fold)[0]


def test_a_set_too_small_for_an_interval_compares_nothing():
    lacking = Difference(0.1, math.nan, math.nan, math.nan, math.nan, 0)
    on = judged("a", {"x": 0.9, "y": 0.8}, {("x", "y"): lacking})
    assert "x and y cannot be compared: there are too few slides for an interval" in said(on)[0]
    as_wide = apart(0.1, width=0.6)
    assert (
        "there are too few slides or trainings" in said(judged("a", TWO, {("probe", "lora"): as_wide}, trainings=2))[0]
    )
    three = dict.fromkeys([("x", "y"), ("x", "z"), ("y", "z")], lacking)
    assert "too small to compare runs" in said(judged("a", {"x": 0.9, "y": 0.8, "z": 0.7}, three))[0]


def test_where_slides_are_not_known_better_holds_only_if_it_does_for_several_patches_per_patient():
    sure = apart(0.12, 0.001, wide=(0.05, 0.19), p_wide=0.01, p_wide_holm=0.01)
    on = judged("br", {"x": 0.9, "y": 0.78}, {("x", "y"): sure}, unit="sample", n=684)
    assert said(on)[0] == "On br's 684 held-out patches, x is better than y by .12 in AUROC (.07 to .17)."
    unsure = apart(0.06, 0.03, wide=(-0.01, 0.13), p_wide=0.08, p_wide_holm=0.08)
    on = judged("br", {"x": 0.9, "y": 0.84}, {("x", "y"): unsure}, unit="sample", n=684)
    assert said(on)[0] == (
        "On br's 684 held-out patches, x is better than y by .06 in AUROC (.01 to .11) if every patch comes from its "
        "own patient, and uncertain otherwise (−.01 to .13)."
    )
    of_three = {("x", "y"): unsure, ("x", "z"): sure}
    first = said(judged("br", {"x": 0.9, "y": 0.84, "z": 0.78}, of_three, unit="sample", n=684))[0]
    assert "of the 2 other runs 1 is worse and 1 cannot be told from it (if every patch comes from its own" in first
    assert "patient: the 2 other runs are worse)" in first


def test_sets_that_repeat_the_first_are_said_in_short():
    sets = [judged("a", TWO, LORA_WINS), judged("b", TWO, LORA_WINS, n=60), judged("c", TWO, LORA_WINS, n=9)]
    assert said(*sets)[1] == (
        "So it is on b's 60 held-out slides by .12 (.07 to .17) and c's 9 held-out slides by .12 (.07 to .17)."
    )


def test_sets_that_disagree_are_said_to():
    other = {("probe", "lora"): apart(0.1, 0.001)}
    sentences = said(judged("a", TWO, LORA_WINS), judged("b", {"probe": 0.9, "lora": 0.8}, other))
    assert sentences[1].startswith("The sets disagree: on b's 56 held-out slides, probe is better than lora by .10")
    unsure = said(judged("a", TWO, LORA_WINS), judged("b", {"probe": 0.9, "lora": 0.8}))
    assert unsure[1].startswith("On b's 56 held-out slides, probe and lora cannot be told apart")


def test_patches_known_from_training_are_left_out_where_that_is_known():
    whole = judged("a", TWO, LORA_WINS)
    unseen = judged("a", {"probe": 0.8, "lora": 0.81}, split=UNSEEN, n=40)
    sentences = said(whole, unseen)
    assert len(sentences) == 2
    assert "a's 40 held-out slides without patches known from training, lora and probe cannot be told" in sentences[0]


@pytest.mark.parametrize(
    ("chance", "cases"), [(0.06, "1 of 20"), (0.31, "6 of 20"), (0.001, "fewer than 1 of 20"), (0.5, "10 of 20")]
)
def test_with_several_seeds_it_is_said_how_often_the_order_would_turn(chance, cases):
    on = judged("ami-br", TWO, LORA_WINS, trainings=3, turned=chance)
    assert said(on)[1] == (
        f"With another training seed the order of lora and probe on ami-br would turn in {cases} cases."
    )


def test_runs_without_seeds_beside_runs_with_them_are_named():
    on = judged("a", TWO, LORA_WINS)
    on.comparison.judgements["lora"] = replace(on.comparison.judgements["lora"], trainings=3)
    assert said(on)[1].startswith("As probe was trained once, another training may change the order of lora and probe:")


def test_a_set_that_shows_hardly_any_difference_plans_nothing():
    few = replace(apart(0.05, width=0.3), detectable=0.7)
    first, _ = said(judged("a", {"x": 0.9, "y": 0.85}, {("x", "y"): few}, n=4, wanted=(0.03, 900)))
    assert first.endswith("(−.25 to .35); with so few slides hardly any difference would show.")
    some = replace(few, detectable=0.2)
    first, _ = said(judged("a", {"x": 0.9, "y": 0.85}, {("x", "y"): some}, n=9, wanted=(0.03, 900)))
    assert first.endswith("; there, differences below .20 would mostly go unseen.")


def test_exact_runs_have_no_other_training():
    both = judged("a", TWO, LORA_WINS, turned=0.0, exact=("lora", "probe"))
    assert said(both)[1] == "Training lora and probe again would change nothing: their solution is exact."
    alone = judged("a", {"probe": 0.8}, exact=("probe",))
    assert said(alone)[1] == "Training probe again would change nothing: its solution is exact."
    beside = judged("a", TWO, LORA_WINS, exact=("probe",))
    assert said(beside)[1].startswith("As lora was trained once, another training may change the order of lora and")
