"""Is a task of more than two classes judged as one of two is: figures, resamples, tests, files?"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from drawn_runs import QUICK
from sklearn import metrics as sk

from features.console import UserError
from features.folds import fold_models
from features.samples import make_samples
from features.store import FeatureStore
from probe import resample
from probe.ensembles import Ensemble, ensemble_of
from probe.evidence import compare, evaluate, fold_figures, judge
from probe.experiment import FoldLogits, make_experiment
from probe.metrics import (
    RunMetrics,
    balanced_log_loss,
    figure_names,
    figure_titles,
    judge_logits,
    predicted_classes,
    probabilities,
    scores,
)
from probe.predictions import columns_of, parse_predictions, predictions_csv, threshold_of, thresholds_of
from probe.probing import ProbeOptions, probe_store
from probe.records import FoldsRecord, RunRecord
from probe.report.read import labels_of
from probe.resample import Resampling
from probe.runs import read_predictions, read_run, read_samples, read_weights, write_run

NAMES = ("fat", "lymphocytes", "mucus", "stroma", "tumor")


def drawn(seed: int = 0, n: int = 300, n_classes: int = 5, *, signal: float = 1.5):
    """Labels and probabilities with ties; classes of very unequal size."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, n_classes + 1) / sum(range(1, n_classes + 1))
    label = rng.choice(n_classes, n, p=share)
    raw = rng.standard_normal((n, n_classes)) + signal * np.eye(n_classes)[label]
    p = np.round(np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True), 2) + 0.001
    return label, p / p.sum(axis=1, keepdims=True)


def a_run(seed: int = 0, *, trainings: int = 1, n: int = 300, n_classes: int = 5, signal: float = 1.5) -> Ensemble:
    label, _ = drawn(0, n, n_classes)
    rng = np.random.default_rng(seed)
    slide = np.sort(rng.integers(0, 30, n)) if seed < 0 else np.arange(n) // 10
    raw = signal * np.eye(n_classes)[label] + rng.standard_normal((n, n_classes))
    logits = raw + 0.3 * rng.standard_normal((trainings, n, n_classes))
    return Ensemble(
        dataset="tissue",
        split="test",
        id=np.arange(n).astype(str),
        label=label.astype(np.int8),
        group=slide.astype(str),
        digest=np.full(n, ""),
        by_training=probabilities(logits[..., 1:] - logits[..., :1]),
        thresholds=np.full(trainings, math.nan),
        threshold=math.nan,
        prior=0.2,
    )


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ordinal", [False, True])
def test_figures_equal_scikit_learns(seed, ordinal):
    y, p = drawn(seed)
    said = p.argmax(axis=1)
    found = scores(y, p, ordinal=ordinal)
    each = np.eye(5)[y]
    expected = {
        "balanced_accuracy": sk.balanced_accuracy_score(y, said),
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr", average="macro"),
        "average_precision": sk.average_precision_score(each, p, average="macro"),
        "f1": sk.f1_score(y, said, average="macro"),
        "mcc": sk.matthews_corrcoef(y, said),
        "kappa": sk.cohen_kappa_score(y, said, weights="quadratic" if ordinal else None),
        "log_loss": sk.log_loss(y, p),
        "brier": ((p - each) ** 2).sum(axis=1).mean(),
    }
    for k in range(5):
        expected[f"recall {k}"] = sk.recall_score(y == k, said == k)
        expected[f"auroc {k}"] = sk.roc_auc_score(y == k, p[:, k])
        expected[f"average_precision {k}"] = sk.average_precision_score(y == k, p[:, k])
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert tuple(found) == figure_names(5) == tuple(figure_titles(NAMES))
    assert found["kappa"] != pytest.approx(scores(y, p, ordinal=not ordinal)["kappa"], abs=1e-3)


def test_the_calibration_error_is_that_of_the_predicted_class():
    y, p = drawn(1, 2000)
    surest, right = p.max(axis=1), p.argmax(axis=1) == y
    edges = np.minimum((surest * 15).astype(int), 14)
    expected = sum(abs(right[edges == b].mean() - surest[edges == b].mean()) * (edges == b).mean() for b in set(edges))
    assert scores(y, p)["ece"] == pytest.approx(expected, abs=1e-12)


def test_a_set_that_lacks_classes_is_judged_on_those_it_holds():
    y, p = drawn(2)
    kept = np.isin(y, (1, 4))
    found = scores(y[kept], p[kept])
    said = p[kept].argmax(axis=1)
    recalls = [(said[y[kept] == k] == k).mean() for k in (1, 4)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["auroc"] == pytest.approx(np.mean([found["auroc 1"], found["auroc 4"]]))
    assert math.isnan(found["auroc 0"])
    assert math.isnan(found["recall 0"])
    alone = scores(y[y == 3], p[y == 3])
    assert all(math.isnan(alone[name]) for name in ("balanced_accuracy", "auroc", "f1", "kappa", "mcc"))
    assert alone["recall 3"] == pytest.approx((p[y == 3].argmax(axis=1) == 3).mean())


def test_two_classes_are_judged_alike_in_either_form():
    rng = np.random.default_rng(3)
    y, z = rng.integers(0, 2, 200), rng.standard_normal((200, 1)).astype(np.float32)
    p = probabilities(z)
    assert scores(y, p, threshold=0.6) == scores(y, p[:, 1], threshold=0.6)
    assert predicted_classes(p, 0.6).tolist() == (p[:, 1] >= 0.6).astype(int).tolist()
    assert p.sum(axis=1) == pytest.approx(1)
    two = np.concatenate([np.zeros_like(z), z], axis=1).astype(np.float64)
    assert p == pytest.approx(np.exp(two) / np.exp(two).sum(axis=1, keepdims=True), abs=1e-12)


def test_logits_are_judged_as_their_probabilities():
    y, _ = drawn(4)
    p = np.random.default_rng(4).dirichlet(np.ones(5) + np.eye(5)[0], len(y))  # without ties, which logits may break
    logit = np.log(p[:, 1:] / p[:, :1])
    assert probabilities(logit) == pytest.approx(p, abs=1e-12)
    expected = scores(y, p)
    assert judge_logits(y, logit) == pytest.approx((expected["balanced_accuracy"], expected["auroc"]))
    each = [sk.log_loss(y[y == k], p[y == k], labels=range(5)) for k in range(5)]
    assert balanced_log_loss(y, logit[:, None]) == pytest.approx([np.mean(each)])
    part = y != 2  # a class that no row has weighs nothing
    assert balanced_log_loss(y[part], logit[part][:, None]) == pytest.approx([np.mean(np.delete(each, 2))])


# ----------------------------------------------------------------------------------------------------------- resamples


def test_a_slide_drawn_twice_counts_twice_in_every_figure():
    run = replace(a_run(), ordinal=True)
    clusters = run.clusters
    drawn_counts = np.concatenate(list(resample._draws(clusters.n, Resampling(replicates=100))))
    found = resample.resample([run.tallies(clusters)], clusters, Resampling(replicates=100))
    for j in (0, 7, 55):
        rows = np.concatenate(
            [np.repeat(np.flatnonzero(clusters.index == k), int(drawn_counts[j, k])) for k in range(clusters.n)]
        )
        expected = scores(run.label[rows], run.probability[rows], ordinal=True)
        assert {name: float(found.drawn[name][0, j]) for name in expected} == pytest.approx(expected, abs=1e-10)


def test_every_figure_has_an_interval_and_runs_are_compared():
    good, poor = a_run(1, trainings=2), a_run(2, signal=0.6)
    compared = compare({"good": good, "poor": poor}, resampling=QUICK)
    for judged in compared.judgements.values():
        assert tuple(judged.figures) == figure_names(5)
        assert judged.counts == good.counts
        for figure in judged.figures.values():
            assert figure.low < figure.value < figure.high
    (pair,) = compared.pairs
    assert pair.differences["auroc"].value > 0.1
    assert pair.differences["auroc"].p_holm < 0.001
    assert pair.delong is None
    assert compared.ranks["balanced_accuracy"]["good"].value == 1
    assert math.isfinite(compared.detectable["auroc"].one)


def test_a_perfect_recall_has_an_exact_interval_and_means_have_none():
    run = a_run()
    sure = replace(run, by_training=np.eye(5)[run.label][None] * 0.9 + 0.02)
    figures = judge(sure, resampling=QUICK).figures
    n = len(np.unique(run.group[run.label == 0]))
    assert figures["recall 0"].exact
    assert figures["recall 0"].low == pytest.approx(0.025 ** (1 / n))
    assert figures["recall 4"].low > figures["recall 0"].low
    assert math.isnan(figures["balanced_accuracy"].low)


def test_a_class_of_a_single_slide_leaves_means_without_an_interval():
    run = a_run()
    label = np.where(run.label == 0, 1, run.label)
    label[:3] = 0
    figures = judge(replace(run, label=label), resampling=QUICK).figures
    assert math.isfinite(figures["balanced_accuracy"].value)
    assert math.isnan(figures["balanced_accuracy"].low)
    assert math.isfinite(figures["recall 4"].low)


def test_one_class_against_the_rest_is_a_run_of_two():
    run = a_run(trainings=2)
    one = run.against_rest(3)
    assert one.n_classes == 2
    assert one.label.tolist() == (run.label == 3).astype(int).tolist()
    whole = judge(run, resampling=QUICK).figures["auroc 3"]
    assert judge(one, resampling=QUICK).figures["auroc"].value == pytest.approx(whole.value)


def test_runs_of_other_classes_are_not_compared():
    with pytest.raises(UserError, match=r"a tells 5 classes apart, b 4"):
        compare({"a": a_run(), "b": a_run(n_classes=4)}, resampling=QUICK)


# --------------------------------------------------------------------------------------------------------------- files


def a_table(n: int = 90, *, test_from: int = 60, votes: bool = False):
    label = (np.arange(n) * 7 % 11 % 5).tolist()
    return make_samples(
        [f"{k:02d}.png" for k in range(n)],
        label,
        sha256=[""] * n,
        group=[f"slide {k // 3}" for k in range(n)],
        split=["train" if k < test_from else "test" for k in range(n)],
        votes=np.array([[y, (y + k % 2) % 5, -1] for k, y in enumerate(label)], dtype=np.int8) if votes else None,
    )


def an_experiment(**options):
    return make_experiment("tissue", {"tissue": a_table(**options.pop("table", {}))}, cv=3, classes=NAMES, **options)


def predictions_of_run(experiment, seeds=(42, 43)):
    rng = np.random.default_rng(0)
    tests = {
        name: rng.standard_normal((len(rows), len(fold_models(seeds, 3)), 4)).astype(np.float32)
        for name, rows in experiment.tests.items()
    }
    validation = rng.standard_normal((len(experiment.rows), len(seeds), 4)).astype(np.float32)
    return experiment.predictions(FoldLogits(validation, tests, seeds))


def test_predictions_have_a_logit_and_a_probability_of_every_class():
    predictions = predictions_of_run(an_experiment())
    text = b"".join(predictions_csv(predictions)).decode()
    assert text.partition("\n")[0] == ",".join(columns_of(5))
    read = parse_predictions(text)
    np.testing.assert_array_equal(read.logit, predictions.logit)
    assert read.n_classes == 5
    assert math.isnan(threshold_of(read))
    assert np.isnan(thresholds_of(read)).all()
    lines = text.splitlines()
    cells = lines[3].split(",")
    for column, said in ((-1, "the probability is"), (2, "a label is not from 0 to 4"), (7, "no number")):
        changed = list(cells)
        changed[column] = {-1: "0.123456", 2: "5", 7: "nan"}[column]
        with pytest.raises(ValueError, match=said):
            parse_predictions("\n".join([*lines[:3], ",".join(changed), *lines[4:]]))
    with pytest.raises(ValueError, match="found columns"):
        parse_predictions(text.replace("probability_4", "probability_5", 1))


def test_an_ensemble_averages_every_class_over_fold_models():
    predictions = predictions_of_run(an_experiment())
    run = ensemble_of(predictions, "tissue", "test", ordinal=True)
    assert (run.by_training.shape, run.ordinal) == ((2, 30, 5), True)
    rows = (predictions.seed == 43) & (predictions.id == "63.png")
    assert run.by_training[1, 3] == pytest.approx(predictions.probability[rows].mean(axis=0))
    assert run.predicted.tolist() == run.probability.argmax(axis=1).tolist()
    each = fold_figures(predictions, "tissue", "test")["recall 2"].each
    assert len(each) == 6


def test_a_run_of_many_classes_comes_back(tmp_path):
    experiment = an_experiment(table={"votes": True})
    predictions = predictions_of_run(experiment)
    coef = np.arange(6 * 4 * 8, dtype=np.float32).reshape(6, 4, 8)
    record = RunRecord(
        kind="probe",
        model="m",
        method="probe",
        options={},
        train="tissue",
        view="full",
        pooling="card",
        label_names=NAMES,
        ordinal=True,
        folds=FoldsRecord(n=3, digest=experiment.folds.digest),
        seeds=(42, 43),
    )
    written = write_run(
        tmp_path,
        record,
        predictions=predictions,
        tables=experiment.tables,
        weights={"coef": coef, "intercept": np.ones((6, 4))},
        seconds=1.0,
    )
    run = read_run(written.folder)
    assert json.loads((written.folder / "run.json").read_text())["format"] == 3
    assert (run.label_names, run.ordinal, run.n_classes) == (NAMES, True, 5)
    np.testing.assert_array_equal(read_weights(run.folder)["coef"], coef)
    read = read_predictions(run.folder)
    table = read_samples(run.folder, read)["tissue"]
    assert table.votes.tolist() == experiment.tables["tissue"].votes.tolist()
    assert run.metrics.as_dict() == evaluate(read, tables={"tissue": table}, ordinal=True).as_dict()
    figures = run.metrics.sets["tissue/test"]
    assert figures.counts == tuple(np.bincount(experiment.tables["tissue"].label[60:], minlength=5))
    assert math.isnan(run.metrics.threshold)
    assert RunMetrics.from_dict(run.metrics.as_dict()).as_dict() == run.metrics.as_dict()


def test_a_vote_for_a_class_that_the_run_does_not_have_is_damage(tmp_path):
    test_a_run_of_many_classes_comes_back(tmp_path)
    (folder,) = tmp_path.iterdir()
    table = (folder / "samples.csv").read_text()
    (folder / "samples.csv").write_text(table.replace(",test,", ",test,5", 1))
    record = json.loads((folder / "run.json").read_text())
    del record["sha256"]["samples.csv"]
    del record["sha256"]["run.json"]
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="damaged"):
        read_samples(folder, read_predictions(folder))


# --------------------------------------------------------------------------------------------------------- experiments


def test_soft_labels_are_the_shares_of_votes():
    table = a_table(votes=True)
    target = an_experiment(table={"votes": True}, soft_labels="votes").target
    assert target.shape == (60, 5)
    assert target.sum(axis=1) == pytest.approx(1)
    assert target[0, table.label[0]] == 1  # both votes alike
    assert target[1, table.label[1]] == 0.5
    assert an_experiment(table={"votes": True}).target is None
    with pytest.raises(UserError, match="tissue has no votes of raters"):
        an_experiment(soft_labels="votes")
    with pytest.raises(UserError, match="soft_labels=shares"):
        an_experiment(table={"votes": True}, soft_labels="shares")


def test_an_experiment_knows_classes_that_its_table_lacks():
    assert an_experiment().n_classes == 5
    two = make_samples(["a", "b", "c", "d"], [0, 1, 0, 1], sha256=[""] * 4)
    assert make_experiment("t", {"t": two}, cv=2).n_classes == 2


# -------------------------------------------------------------------------------------------------------------- probes


def a_store(path, *datasets: str, votes: bool = True) -> FeatureStore:
    """Embeddings of many classes in which a few directions tell them apart."""
    store = FeatureStore.open_or_create(path)
    for name in datasets:
        many = name != "demo"
        table = a_table(votes=votes)
        table = table if many else table.relabelled([0, 1, 0, 1, 0])
        store.put_samples(name, table, attrs={"label_names": list(NAMES) if many else ["Normal", "Atypical"]})
        X = np.random.default_rng(0).standard_normal((len(table), 12)).astype(np.float16)
        X[:, :5] += 2 * np.eye(5)[a_table().label].astype(np.float16)
        writer = store.begin(
            name, model="m", view="full", poolings={"cls": 12}, card_pooling="cls", parts={"model": "m", "view": "full"}
        )
        for rows in writer.missing():
            writer.write(rows, {"cls": X[rows.start : rows.stop]})
    return store


def test_a_probe_of_many_classes_is_a_run_whose_weights_give_its_logits(tmp_path):
    store = a_store(tmp_path / "s.zarr", "tissue")
    hard, soft = (
        probe_store(store, options=ProbeOptions(cv=3, soft_labels=soft), runs=tmp_path / "runs")[0]
        for soft in (None, "votes")
    )
    weights, predictions = read_weights(hard.folder), read_predictions(hard.folder)
    assert weights["coef"].shape == (3, 4, 12)
    assert (hard.label_names, hard.candidates[0].n_not_converged) == (NAMES, 0)
    X = store.read("tissue", model="m", view="full", pooling="cls").astype(np.float32)
    part = predictions.select((predictions.split == "test") & (predictions.fold == 1))
    expected = X[60:] @ weights["coef"][1].T + weights["intercept"][1]
    np.testing.assert_allclose(part.logit, expected, rtol=1e-4, atol=1e-4)
    assert hard.figures.sets["tissue/test"].folds["balanced_accuracy"].mean > 0.4  # chance is .2
    assert soft.options["soft_labels"] == "votes"
    assert "soft_labels" not in hard.options
    assert labels_of([hard, soft]) == ["m probe", "m probe soft_labels=votes"]
    softened = read_predictions(soft.folder).probability.max(axis=1).mean()
    assert softened < predictions.probability.max(axis=1).mean()


def test_the_drawn_sets_are_trained_on_only_where_there_is_nothing_else(tmp_path):
    def trained(name: str, *datasets: str) -> str:
        store = a_store(tmp_path / f"{name}.zarr", *datasets)
        return probe_store(store, options=ProbeOptions(cv=3), runs=tmp_path / "runs")[0].train

    assert trained("a", "demo-phases", "demo") == "demo"
    assert trained("b", "demo-phases") == "demo-phases"
    assert trained("c", "demo", "demo-phases", "tissue") == "tissue"


def test_classes_that_a_test_set_lacks_are_said(tmp_path, capsys):
    store = a_store(tmp_path / "s.zarr", "tissue")
    table = store.samples("tissue")
    label = np.where((table.split == "test") & (table.label == 2), 3, table.label).astype(np.int8)
    store.put_samples("tissue", replace(table, label=label), attrs={"label_names": list(NAMES)})
    (run,) = probe_store(store, options=ProbeOptions(cv=3), runs=tmp_path / "runs")
    said = " ".join(capsys.readouterr().err.split())
    assert "tissue/test has no patch of mucus: its means are over the other classes." in said
    assert "validation has no patch" not in said
    assert run.figures.sets["tissue/test"].counts[2] == 0


def test_a_fold_that_validates_on_one_class_is_refused():
    label = [0, 0, 0, 0, 1, 2, 1, 2, 1, 2]
    table = make_samples(
        [str(k) for k in range(10)],
        label,
        sha256=[""] * 10,
        group=["a", "b", "a", "b", "c", "c", "d", "d", "d", "c"],
    )
    with pytest.raises(UserError, match=r"fold \d of 4 validates on fat alone"):
        make_experiment("t", {"t": table}, cv=4, classes=("fat", "mucus", "tumor"))
