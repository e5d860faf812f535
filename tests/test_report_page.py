"""Is the page whole, escaped and without a request, and are its figures the record's?"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from report_pages import (
    CONTROL,
    HOSTILE,
    cells_of,
    check_page,
    embedded,
    page_of,
    table_of,
    two_runs,
)
from test_runs import N_FOLDS, TABLES, edit_record, made_run, patches

from features.samples import make_samples
from finetune.report import make_report
from probe.curve import CurvePoint, curve_csv
from probe.evidence import COMPARED
from probe.predictions import VALIDATION, concatenate, predictions_of

pytestmark = pytest.mark.usefixtures("no_patches_at_hand")


def test_the_page_is_whole(tmp_path):
    two_runs(tmp_path)
    root = check_page(page_of(tmp_path))
    text = next(root.all("main")).text
    for on in ("ami-br, test", "atnorm-br, test", "atnorm-md, test", "ami-br, out of fold"):
        assert on in text
    assert "No map:" in text
    assert "The patches themselves are not at hand" in text
    assert {one.attributes["href"] for one in next(root.all("nav")).all("a")} >= {"#raters", "#domains", "#gallery"}


def test_the_page_of_one_run_is_whole(tmp_path):
    made_run(tmp_path, tables={"mine": patches("mine", 36, test_from=36)}, train="mine")
    root = check_page(page_of(tmp_path))
    assert "One run has nothing to be compared with" in root.text
    assert {one.attributes["href"] for one in next(root.all("nav")).all("a")}.isdisjoint({"#raters", "#domains"})


def test_the_page_of_many_runs_is_whole(tmp_path):
    tables = {"mine": patches("mine", 48, test_from=24)}
    for k in range(9):
        made_run(tmp_path, f"model-{k}", tables=tables, train="mine", seed=k, method="probe" if k % 2 else "lora")
    root = check_page(page_of(tmp_path))
    assert len(table_of(root, "Leaderboard of mine, test")) == 9
    assert "ROC, lora" in root.text


def test_figures_that_do_not_exist_leave_the_page_whole(tmp_path):
    """A set without positives, domains of two patches, two runs that never differ, slides and their lack."""
    alone = patches("alone", 24, raters=3)
    tiny = patches("tiny", 48, slides=False)
    label = (np.arange(48) % 2).astype(np.int8)
    tables = {
        "mine": patches("mine", 36, test_from=36),
        "alone": alone.select(alone.label == 0),
        "tiny": replace(tiny, label=label, domain=np.array([f"d{k // 2:02}" for k in range(48)])),
        "few": patches("few", 4, slides=False),
    }
    points = [
        CurvePoint(0.5, 0, 0, 3, 12, 4, 1.0, name, split, 0.5, float("nan") if name == "alone" else 0.6)
        for name, split in (("mine", VALIDATION), ("alone", "test"), ("tiny", "test"))
    ]
    for _ in range(2):
        made_run(tmp_path, tables=tables, train="mine", files={"learning_curve.csv": curve_csv(points)})
    page = page_of(tmp_path)
    root = check_page(page)
    assert "Learning curves" in root.text
    assert "−0.000" not in root.text  # of runs that are equal
    curves = [
        svg for svg in root.all("svg") if svg.attributes.get("aria-label", "").startswith("ROC curves, alone, test")
    ]
    assert not [line for svg in curves for line in svg.all("polyline")]


def test_the_gallery_calls_wrong_what_the_confusion_calls_wrong(tmp_path):
    """Also where a probability lies so close to the threshold that four digits do not tell."""
    tables = {"mine": patches("mine", 12, test_from=12), "t": patches("t", 9)}
    trained = predictions_of(
        "mine",
        tables["mine"],
        split=VALIDATION,
        fold=np.arange(12)[:, None] // 4,
        logit=np.where(tables["mine"].label == 1, 1.6e-4, 4e-5)[:, None, None],  # probabilities of .50004 and .50001
    )
    tested = predictions_of(
        "t", tables["t"], split="test", fold=np.arange(N_FOLDS), logit=np.full((9, N_FOLDS, 1), 1.2e-4)
    )
    made_run(tmp_path / "close", tables=tables, train="mine", predictions=concatenate([trained, tested]))
    two_runs(tmp_path / "far")
    for runs in (tmp_path / "close", tmp_path / "far"):
        page = page_of(runs)
        data, figures = embedded(page, "data"), embedded(page, "figures")
        for (k, run), (s, on) in itertools.product(enumerate(data["runs"]), enumerate(figures["sets"])):
            said = [
                (data["label"][row], data["probability"][k][row] >= data["thresholds"][k][s])
                for row, of in enumerate(data["set"])
                if of == s
            ]
            counts = on["confusion"][run]
            found = [[said.count((label, called)) for called in (False, True)] for label in (0, 1)]
            assert found == counts, (run, on["dataset"])


RAW = re.compile("[\u202a-\u202e\u2066-\u2069\x00-\x09\x0b-\x1f]")


def test_hostile_names_stand_in_the_page_as_text(tmp_path):
    n, name = 24, " ".join(HOSTILE)
    strange = name + CONTROL
    table = make_samples(
        [f"{HOSTILE[k % len(HOSTILE)]}{CONTROL}{k}" for k in range(n)],
        [int(k % 3 == 0) for k in range(n)],
        sha256=[f"{k // 2}" for k in range(n)],
        group=[f"{HOSTILE[k // 4]}" for k in range(n)],
        split=["train"] * 12 + ["test"] * 12,
        votes=np.array([[k % 3 == 0, k % 2, 1] for k in range(n)], dtype=np.int8),
        domain=[HOSTILE[k // 4 % 3] + CONTROL for k in range(n)],
    )
    tables = {strange: table, "other" + strange: table}
    point = CurvePoint(0.5, 0, 0, 3, 12, 4, 1.0, strange, "test", 0.5, 0.6)
    for method in ("probe", strange, strange):
        folder = made_run(tmp_path, tables=tables, train=strange, files={"learning_curve.csv": curve_csv([point])})
        edit_record(
            folder,
            model=strange,
            method=method,
            label_names=[strange, "b" + strange],
            options={strange: strange, "x": {strange: strange}},
            view=strange,
            pooling=strange,
            recipe={strange: strange},
            sources=dict.fromkeys(tables, strange),
            fingerprints={strange: strange},
            versions={strange: strange},
            embedding={"weights_sha256": strange, "revision": strange},
            folds={"n": N_FOLDS, "digest": strange, "source": strange},
            cost={"device": strange},
        )
    page = page_of(tmp_path)
    root = check_page(page)
    for section in ("leaderboard", "differences", "curves", "decisions", "raters", "domains", "learning", "provenance"):
        (found,) = (one for one in root.all("section") if one.attributes["id"] == section)
        assert name in found.text, section
    data = embedded(page, "data")
    assert data["groups"] == list(dict.fromkeys(table.group[12:].tolist() + table.group[:12].tolist()))
    assert set(data["id"]) == set(table.id.tolist())
    outside = re.sub(r"(?s)<script.*?</script>|<style.*?</style>", "", page)
    assert not RAW.search(outside), RAW.search(outside)


def test_damaged_weights_are_no_reason_to_have_no_report(tmp_path):
    folder = made_run(tmp_path, tables={"ami-br": TABLES["ami-br"]})

    def trained() -> str:
        root = check_page(page_of(tmp_path))
        (heads,), (row,) = cells_of(root, "Cost", header=True), cells_of(root, "Cost")
        return row[heads.index("Trained")]

    assert trained() == "9"  # eight features and the intercept
    (folder / "weights.safetensors").write_bytes(b"damaged")
    assert trained() == "–"
    (folder / "weights.safetensors").unlink()
    assert trained() == "–"


# --- what was published -----------------------------------------------------------------------------------------------


def test_what_was_published_stands_beside_our_own(tmp_path):
    made_run(tmp_path, "uni", signal=0.6)
    page = page_of(tmp_path)
    root = check_page(page)
    on = embedded(page, "figures")["sets"][0]
    folds = {name: on["folds"]["uni probe"][name]["mean"] for name in COMPARED}
    (row,) = table_of(root, "Leaderboard of ami-br, test")

    def delta(value: float) -> str:
        return f"{value:+.3f}".replace("-", "−")

    assert row[6].text == f"0.648 ± 0.011 {delta(folds['balanced_accuracy'] - 0.6477)}"
    assert row[7].text == f"0.717 ± 0.008 {delta(folds['auroc'] - 0.7171)}"
    assert row[8].text == f"0.634 {delta(folds['balanced_accuracy'] - 0.6339)}"
    assert row[9].text == f"0.695 {delta(folds['auroc'] - 0.6949)}"
    rows = table_of(root, "Published figures on ami-br")
    (uni,) = (row for row in rows if [cell.text for cell in row[:2]] == ["uni", "probe"])
    assert [cell.text for cell in uni[2:]] == [
        *("0.6477 ± 0.0108", delta(folds["balanced_accuracy"] - 0.6477)),
        *("0.7171 ± 0.0080", delta(folds["auroc"] - 0.7171)),
        *("0.63392025-07-13", delta(folds["balanced_accuracy"] - 0.6339)),
        *("0.6949", delta(folds["auroc"] - 0.6949)),
    ]


@pytest.mark.parametrize("train", ["mine", "atnorm-br"])
def test_nothing_published_stands_beside_runs_trained_on_other_data(train, tmp_path):
    tables = {train: patches(train, 60, test_from=36), "ami-br": patches("ami-br", 24)}
    made_run(tmp_path, "uni", tables=tables, train=train)
    root = check_page(page_of(tmp_path))
    for word in ("Table 3", "re-run", "Published figures"):
        assert word not in root.text
    assert not [one for one in root.all("path") if one.attributes.get("class") == "published"]


def test_a_page_without_pictures_stays_small(tmp_path):
    tables = {"ami-br": patches("ami-br", 200, raters=3, test_from=140), "atnorm-br": patches("atnorm-br", 100)}
    two_runs(tmp_path, tables=tables)
    assert len(make_report(tmp_path)[0]) < 400_000
