"""Are combinations chosen on training data alone, and are they what they say: means of probabilities, or one probe?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_pages import OTHER_FOLDS, QUICK, check_page, two_runs
from scipy.special import expit, softmax
from test_runs import edit_record, made_run

from features.console import UserError
from features.samples import Samples, make_samples
from features.store import FeatureStore
from finetune.report import make_report
from probe import candidates
from probe.cli import app
from probe.combine import averaged, fitted_weights, forward_selection, gains, mean_logits
from probe.commands import commands
from probe.metrics import auroc
from probe.predictions import Predictions, concatenate, predictions_of
from probe.probing import ProbeOptions, probe_store
from probe.records import RunRecord
from probe.report.provenance import facts
from probe.report.read import ensemble_of_runs, read_runs
from probe.report.terminal import candidates_table, gain_table
from probe.runs import read_predictions, read_run, read_weights

# --- means ------------------------------------------------------------------------------------------------------------


def test_the_mean_is_of_probabilities_however_sure_they_are():
    first, second = np.array([[0.5, -1.0], [2.0, 0.0]]), np.array([[-3.0, 1.0], [0.0, 0.0]])
    shares = (0.3, 0.7)
    every = [softmax(np.column_stack([np.zeros(2), one]), axis=1) for one in (first, second)]
    expected = np.log(shares[0] * every[0] + shares[1] * every[1])
    np.testing.assert_allclose(mean_logits([first, second], shares), expected[:, 1:] - expected[:, :1])
    assert expit(mean_logits([np.array([900.0]), np.array([-900.0])])) == pytest.approx(0.5)
    assert mean_logits([np.array([900.0]), np.array([800.0])]) == pytest.approx(800 + np.log(2), rel=1e-6)


def test_what_is_added_is_what_helps_and_not_what_is_good_alone():
    label = np.array([0, 1] * 50)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 100))
    best = 2 * label - 1 + 1.5 * noise[0]
    like_it = best + 0.2 * rng.standard_normal(100)
    other = 0.9 * (2 * label - 1) + 1.5 * noise[1]
    candidates = [one[:, None] for one in (other, like_it, best)]
    alone = [auroc(label, one[:, 0]) for one in candidates]
    assert alone[0] < min(alone[1:]), "this example must have a weak candidate that helps"
    first = int(np.argmax(alone))
    path = forward_selection(candidates, lambda logit: auroc(label, logit[:, 0]), most=2)
    assert path == [first, 0]
    assert len(forward_selection(candidates, lambda logit: auroc(label, logit[:, 0]))) == 3


def test_weights_have_the_smallest_balanced_log_loss():
    rng = np.random.default_rng(1)
    label = (np.arange(400) % 5 == 0).astype(int)
    signal = 2 * label - 1
    positive = expit(np.stack([signal + rng.standard_normal(400), 1.5 * signal + 2 * rng.standard_normal(400)]))
    probability = np.stack([1 - positive, positive], axis=2)

    def loss(share: float) -> float:
        right = np.take_along_axis(share * probability[0] + (1 - share) * probability[1], label[:, None], axis=1)[:, 0]
        return -np.mean([np.log(right[label == k]).mean() for k in (0, 1)])

    found = fitted_weights(label, probability)
    grid = np.linspace(0, 1, 1001)
    assert found.sum() == pytest.approx(1)
    assert found[0] == pytest.approx(grid[np.argmin([loss(share) for share in grid])], abs=2e-3)
    assert 0.05 < found[0] < 0.95, "this example must need both"
    useless = np.full((1, 400, 2), 0.5)
    assert fitted_weights(label, np.concatenate([probability, useless]))[2] < 0.3


def table_of(n: int) -> Samples:
    return make_samples([f"{k}.png" for k in range(n)], [k % 2 for k in range(n)], sha256=[""] * n)


def predictions(n: int = 6, *, seeds: int = 1, shift: float = 0.0, order: list[int] | None = None) -> Predictions:
    """Out-of-fold and test predictions of two folds; `order` shuffles patches, which keep what is said of them."""
    table, rows = table_of(n), np.array(order or range(n))
    value = np.arange(n, dtype=np.float64)[:, None] + shift + 10 * np.arange(seeds)
    of_fold = np.repeat(value, 2, axis=1) + np.tile([0.0, 0.5], seeds)
    seed, fold = np.repeat(np.arange(seeds), 2), np.tile([0, 1], seeds)
    held_out = predictions_of(
        "t",
        table.select(rows),
        split="validation",
        fold=(rows % 2)[:, None],
        seed=np.arange(seeds),
        logit=value[rows, :, None],
    )
    tested = predictions_of("t", table.select(rows), split="test", fold=fold, seed=seed, logit=of_fold[rows, :, None])
    return concatenate([held_out, tested])


def test_runs_are_averaged_patch_by_patch_and_fold_by_fold_in_the_first_ones_order():
    first, second = predictions(order=[3, 0, 1, 5, 2, 4]), predictions(seeds=2, shift=-2.0, order=[5, 4, 3, 2, 1, 0])
    mean = averaged({"first": first, "second": second}, (0.25, 0.75))
    for column in ("id", "fold", "label", "split"):
        assert getattr(mean, column).tolist() == getattr(first, column).tolist()
    for id, fold, split, logit in zip(mean.id, mean.fold, mean.split, mean.logit[:, 0], strict=True):
        value = int(id.removesuffix(".png")) + 0.5 * (fold == 1 and split == "test")
        of_seeds = (expit(value - 2) + expit(value + 8)) / 2
        assert expit(float(logit)) == pytest.approx(0.25 * expit(value) + 0.75 * of_seeds, rel=1e-5)


def test_runs_of_other_folds_or_labels_are_not_averaged():
    first = predictions()
    for column, value in (("fold", 1 - first.fold), ("label", 1 - first.label)):
        other = replace(first, **{column: value.astype(getattr(first, column).dtype)})
        with pytest.raises(UserError, match=rf"a and b differ in the {column} of patches of t/validation"):
            averaged({"a": first, "b": other})


# --- combinations of embeddings ---------------------------------------------------------------------------------------

WIDTH = 8


def store_of(path: Path, *, flip_tests: bool = False) -> FeatureStore:
    """Two models of which each sees another half of what tells the classes apart."""
    store = FeatureStore.open_or_create(path)
    n = 160
    rng = np.random.default_rng(2)
    slide = np.arange(n) // 8
    label = (rng.random(n) < 0.4).astype(int)
    split = np.where(slide % 4, "train", "test")
    told = np.where((split == "test") & flip_tests, 1 - label, label)
    samples = make_samples(
        [f"{k:03}.png" for k in range(n)],
        told.tolist(),
        group=[f"s{k}" for k in slide],
        split=split.tolist(),
        sha256=[f"{k}" for k in range(n)],
    )
    store.put_samples("mine", samples, attrs={"label_names": ["Normal", "Atypical"]})
    for number, model in enumerate(("first", "second")):
        X = np.random.default_rng(10 + number).standard_normal((n, WIDTH))
        X[:, 0] += 1.2 * (2.0 * label - 1)
        writer = store.begin(
            "mine", model=model, view="full", poolings={"cls": WIDTH}, card_pooling="cls", parts={"model": model}
        )
        for rows in writer.missing():
            writer.write(rows, {"cls": X[rows.start : rows.stop]})
    return store


def runs_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str | None) -> list[RunRecord]:
    """The runs of a store where the given kind of combination is the best, or none for None."""
    monkeypatch.setattr(candidates, "validation_auroc", lambda fitted: fitted.record.combined == how)
    store = store_of(tmp_path / "store.zarr")
    return probe_store(store, options=ProbeOptions(cv=3, combine=True), runs=tmp_path / "runs")


@pytest.mark.parametrize("how", ["mean", "concatenation"])
def test_a_combination_says_what_its_parts_say_together(how, tmp_path, monkeypatch):
    first, second, run = runs_of(tmp_path, monkeypatch, how)
    assert (read_run(run.folder).parts, read_run(run.folder).candidates) == (run.parts, run.candidates)
    assert (run.combined, {part.model for part in run.parts}) == (how, {"first", "second"})
    assert run.model in ("first + second", "second + first")
    assert run.chosen_out_of_fold == "its parts"
    own = read_predictions(run.folder)
    alone = {one.model: read_predictions(one.folder) for one in (first, second)}
    if how == "mean":
        expected = np.mean([expit(one.logit) for one in alone.values()], axis=0)
        np.testing.assert_allclose(expit(own.logit), expected, rtol=1e-4)
    else:
        store, weights = FeatureStore.open(tmp_path / "store.zarr"), read_weights(run.folder)
        X = np.concatenate(
            [store.read("mine", model=part.model, view="full", pooling="card") for part in run.parts], axis=1
        )
        row = {id: k for k, id in enumerate(store.samples("mine").id.tolist())}
        W, b = weights["coef"][:, 0], weights["intercept"][:, 0]
        for id, fold, logit in zip(own.id, own.fold, own.logit[:, 0], strict=True):
            assert logit == pytest.approx(float(X[row[id]].astype(np.float64) @ W[fold] + b[fold]), abs=1e-3)
    # What each run keeps: those of one embedding what they always kept.
    assert not {"parts", "combined"} & first.as_json().keys()
    assert "combine" not in first.options
    assert run.options["combine"]
    assert [part.model in line for part, line in zip(run.parts, commands(run), strict=False)] == [True, True]
    assert "--combine" in commands(run)[-1]
    assert sum(name == f"{how} of" for name, _ in facts(run)) == 2
    chosen = [
        cells for cells in zip(*(column.cells for column in candidates_table([run]).columns), strict=True) if cells[-1]
    ]
    assert chosen == [(f"{run.model} ({how})", "full", "card", *chosen[0][3:])]


def test_a_combination_is_chosen_out_of_fold_and_tests_choose_nothing(tmp_path):
    found = []
    for flip in (False, True):
        place = tmp_path / str(flip)
        store = store_of(place / "store.zarr", flip_tests=flip)
        records = probe_store(store, options=ProbeOptions(cv=3, combine=True), runs=place / "runs")
        found.append(records[-1])
    run, flipped = found
    assert run.combined
    assert flipped.candidates == run.candidates
    assert len(run.candidates) == 4  # each alone, their mean, and both side by side
    best = max(run.candidates, key=lambda one: one.validation_auroc)
    assert (best.combined, best.model) == (run.combined, run.model)
    assert flipped.figures.sets["mine/validation"] == run.figures.sets["mine/validation"]
    assert flipped.figures.sets["mine/test"] != run.figures.sets["mine/test"]


def test_where_nothing_is_better_together_there_is_no_combination(tmp_path, monkeypatch, capsys):
    runs = runs_of(tmp_path, monkeypatch, None)
    assert [run.combined for run in runs] == [None, None]
    best = max(runs, key=lambda run: run.candidates[0].validation_auroc)
    said = " ".join(capsys.readouterr().err.split())
    alone = f"{best.model} (full, card) alone (AUROC {best.candidates[0].validation_auroc:.4f})"
    assert f"is better out of fold than {alone}: the best of 2 combinations of 2 embeddings reached 0." in said


def test_a_combination_is_compared_with_its_best_part_on_every_set(tmp_path, monkeypatch):
    first, second, run = runs_of(tmp_path, monkeypatch, "mean")
    part = next(one for one in (first, second) if one.model == run.parts[0].model)
    found = gains(run, part, resampling=QUICK)
    assert list(found) == ["mine/validation", "mine/test"]
    for name, differences in found.items():
        if name == "mine/test":
            value = [one.figures.sets[name].ensemble.figures["auroc"].value for one in (run, part)]
            assert differences["auroc"].value == pytest.approx(value[0] - value[1])
    assert np.isnan(found["mine/validation"]["auroc"].p)
    assert np.isfinite(found["mine/validation"]["auroc"].low)
    assert np.isfinite(found["mine/test"]["auroc"].p)
    assert list(gain_table(run, found).columns[0].cells) == ["mine validation", "mine test"]
    page, _, _ = make_report(tmp_path / "runs", resampling=QUICK)
    check_page(page)
    assert f"{run.model} mean of 2 probes" in page
    with pytest.raises(UserError, match=r"`combine` needs `recipe='exact'`"):
        ProbeOptions(recipe="paper", combine=True)


def test_the_command_tells_what_is_gained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(candidates, "validation_auroc", lambda fitted: fitted.record.combined == "concatenation")
    store_of(tmp_path / "store.zarr")
    arguments = ["--store", tmp_path / "store.zarr", "--runs", tmp_path / "runs", "--cv", "3", "--combine"]
    app([str(one) for one in [*arguments, "--json"]], standalone_mode=False)
    result = json.loads(capsys.readouterr().out)["results"][-1]
    assert result["method"] == "probe of 2 embeddings"
    assert set(result["gains"]) == {"mine/validation", "mine/test"}
    assert result["gains"]["mine/validation"]["auroc"]["p"] is None
    with pytest.raises(UserError, match=r"`folds_by=scanner`: expected domain"):
        app([str(one) for one in [*arguments, "--folds-by", "scanner"]], standalone_mode=False)


# --- ensembles of runs ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_patches_at_hand")
@pytest.mark.parametrize("weights", ["equal", "out-of-fold"])
def test_a_report_judges_an_ensemble_as_one_more_run(weights, tmp_path):
    two_runs(tmp_path)
    page, report, runs = make_report(tmp_path, ensemble=("all",), ensemble_weights=weights, resampling=QUICK)
    check_page(page)
    ensemble = runs[-1]
    assert [run.label for run in ensemble.members] == ["uni probe", "virchow probe"]
    assert report.labels[-1] == ensemble.label
    shares = [part.weight for part in ensemble.record.parts]
    assert shares == [None, None] if weights == "equal" else sum(shares) == pytest.approx(1)
    assert ("its weights" in ensemble.chose) == (weights != "equal")
    (again,) = commands(ensemble.record, members=[run.folder for run in runs[:2]])
    assert again.startswith(f"fm-report {runs[0].folder} {runs[1].folder} --ensemble all")
    said = dict(facts(ensemble.record))
    assert list(said) == ["written", "member 1", "member 2", "folds"]  # versions and cost are the members'
    assert said["member 1"].startswith("uni probe, weight ")
    sets = {one.name: one for one in report.sets}
    assert len(sets) == 4
    notes = [note for note in report.notes if "over uni probe, its best member out of fold" in note]
    assert len(notes) == 4
    for on in sets.values():
        found = on.comparison.judgements[ensemble.label].figures["auroc"].value
        gained = found - on.comparison.judgements["uni probe"].figures["auroc"].value
        assert any(note.startswith(on.title) and f"gains {gained:+.3f} (" in note for note in notes)
    pair = next(pair for pair in sets["ami-br/validation"].comparison.pairs if pair.second == ensemble.label)
    assert bool(pair.untested) == (weights != "equal")


def test_only_runs_on_the_same_folds_are_an_ensemble(tmp_path):
    first, second = two_runs(tmp_path)
    edit_record(second, folds={"n": 3, "digest": OTHER_FOLDS})
    with pytest.raises(UserError, match=r"virchow probe was trained on folds beefbeef, .* Name runs on the same folds"):
        make_report(tmp_path, ensemble=("all",), resampling=QUICK)
    with pytest.raises(UserError, match=f"at least two different runs; found {first.name}. Name others too"):
        make_report(tmp_path, ensemble=(first.name, first.name), resampling=QUICK)
    with pytest.raises(UserError, match=r"`ensemble_weights=out-of-fold` is for an ensemble"):
        make_report(tmp_path, ensemble_weights="out-of-fold", resampling=QUICK)
    with pytest.raises(UserError, match=r"`ensemble`: none is none of the runs reported"):
        make_report(tmp_path, ensemble=("none",), resampling=QUICK)
    with pytest.raises(UserError, match=r"at least two different runs; found "):
        make_report(tmp_path, ensemble=(str(first),), resampling=QUICK)
    read, _ = read_runs(tmp_path, named=[first, made_run(tmp_path / "again", "conch")])
    with pytest.raises(UserError, match=r"unknown weights 'best': use equal or out-of-fold"):
        ensemble_of_runs(read, weights="best")
