"""Is a store probed fairly: choices made on training data, groups whole, every figure recomputable?"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from features.console import UserError
from features.folds import grouped_folds
from features.samples import Samples, make_samples
from features.store import FeatureStore
from finetune.report import make_report
from probe import candidates, experiment
from probe.evidence import evaluate
from probe.linear import fit_exact
from probe.metrics import FoldFigure, RunMetrics, SetMetrics, auroc
from probe.probing import ProbeOptions, probe_store
from probe.records import FoldsRecord, RunRecord
from probe.report.published import published
from probe.report.terminal import leaderboard, result_tables
from probe.resample import Resampling
from probe.runs import read_predictions, read_run
from probe.schedule import probe_recipe

WIDTH = 12


def probed(*arguments, **options) -> list[Path]:
    """Probe a store; return the folders of the runs."""
    return [run.folder for run in probe_store(*arguments, **options)]


def table(n: int = 240, seed: int = 0, split: bool = True) -> Samples:
    rng = np.random.default_rng(seed)
    slide = np.arange(n) // 8
    return make_samples(
        [f"{seed}-{row:03}.png" for row in range(n)],
        (rng.random(n) < 0.3).astype(int).tolist(),
        group=[f"slide {s}" if split else f"other slide {s}" for s in slide],
        split=["train" if s % 4 else "test" for s in slide] if split else ["test"] * n,
        sha256=[f"{seed}-{row}" for row in range(n)],
    )


def add(
    store: FeatureStore,
    dataset: str,
    samples: Samples,
    model: str,
    view: str,
    *,
    signal: float,
    seed: int = 0,
    dead: int = 0,
    **parts,
):
    """Embeddings of one view: noise, and the label in a few directions; the last features may be dead."""
    store.put_samples(dataset, samples, attrs={})
    rng = np.random.default_rng(seed)
    arrays = {}
    for pooling, strength in (("cls", signal), ("mean", signal / 3)):
        X = rng.standard_normal((len(samples), WIDTH))
        X[:, :3] += strength * (2.0 * samples.label[:, None] - 1)
        X[:, WIDTH - dead :] = 0.25
        arrays[pooling] = X
    writer = store.begin(
        dataset,
        model=model,
        view=view,
        poolings={"cls": WIDTH, "mean": WIDTH},
        card_pooling="cls",
        parts={"model": model, "view": view} | parts,
    )
    for rows in writer.missing():
        writer.write(rows, {name: X[rows.start : rows.stop] for name, X in arrays.items()})


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    samples, other = table(), table(seed=1, split=False)
    for view, signal in (("full", 0.2), ("center64", 0.9)):
        add(store, "ami-br", samples, "good", view, signal=signal)
        add(store, "atnorm-br", other, "good", view, signal=signal, seed=1)
    add(store, "ami-br", samples, "poor", "full", signal=0.0)
    return store


def test_every_model_is_probed_and_the_better_one_scores_better(store, tmp_path):
    folders = probed(store, options=ProbeOptions(), runs=tmp_path / "runs")
    runs = {run.model: run for run in map(read_run, folders)}
    assert set(runs) == {"good", "poor"}
    good = runs["good"].figures.sets
    assert set(good) == {"ami-br/validation", "ami-br/test", "atnorm-br/test"}
    assert good["atnorm-br/test"].folds["auroc"].mean > 0.85
    assert runs["poor"].figures.sets["ami-br/test"].folds["auroc"].mean < 0.75


def test_a_test_set_of_one_class_is_said_once_to_have_no_figures(store, tmp_path, capsys):
    alone = table(seed=2, split=False)
    alone = replace(alone, label=np.ones_like(alone.label))
    for model in ("good", "poor"):
        add(store, "alone", alone, model, "full", signal=0.2)
    options = ProbeOptions(test=("alone",), view="full", pooling="card")
    folders = probed(store, options=options, runs=tmp_path / "runs")
    said = capsys.readouterr().err
    assert said.count("there is neither a balanced accuracy nor an AUROC") == 1
    assert "alone, test: it has patches of one class alone, " in said
    figures = read_run(folders[0]).figures.sets["alone/test"].folds
    assert all(np.isnan(figures[name].mean) for name in ("balanced_accuracy", "auroc"))


def test_view_and_pooling_are_chosen_on_validation(store, tmp_path):
    (folder,) = probed(store, ["good"], options=ProbeOptions(), runs=tmp_path / "runs")
    run = read_run(folder)
    assert (run.view, run.pooling) == ("center64", "card")
    assert len(run.candidates) == 4
    assert max(run.candidates, key=lambda c: c.validation_auroc).view == "center64"


def test_a_given_view_and_pooling_are_kept(store, tmp_path):
    options = ProbeOptions(view="full", pooling="mean")
    (folder,) = probed(store, ["good"], options=options, runs=tmp_path / "runs")
    run = read_run(folder)
    assert (run.view, run.pooling, len(run.candidates)) == ("full", "mean", 1)


def test_a_views_modifiers_may_be_named_in_any_order(store, tmp_path):
    for name in ("ami-br", "atnorm-br"):
        add(store, name, store.samples(name), "good", "full+imagenet+flips", signal=0.9)
    options = ProbeOptions(view="full+flips+imagenet")
    (folder,) = probed(store, ["good"], options=options, runs=tmp_path / "runs")
    assert read_run(folder).view == "full+imagenet+flips"


def test_test_labels_choose_nothing(store, tmp_path):
    before = read_run(probed(store, ["good"], options=ProbeOptions(), runs=tmp_path / "a")[0])
    samples = store.samples("ami-br")
    flipped = samples.label.copy()
    flipped[samples.split == "test"] ^= 1
    columns = {name: getattr(samples, name) for name in Samples.__dataclass_fields__} | {"label": flipped}
    assert store.put_samples("ami-br", Samples(**columns), attrs={})
    after = read_run(probed(store, ["good"], options=ProbeOptions(), runs=tmp_path / "b")[0])
    assert after.candidates == before.candidates
    assert after.folds == before.folds
    assert after.figures.sets["ami-br/validation"] == before.figures.sets["ami-br/validation"]
    assert after.figures.sets["ami-br/test"] != before.figures.sets["ami-br/test"]


def test_strength_is_chosen_as_a_plain_nested_loop_would():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from probe.metrics import balanced_log_loss

    samples = table(160)
    folds = grouped_folds(samples, 4)
    rng = np.random.default_rng(3)
    X = rng.standard_normal((160, 20)) + 0.5 * samples.label[:, None]
    strengths = (1e-3, 1e-2, 1e-1, 1.0)
    probe = fit_exact(X.astype(np.float32), samples.label, folds=folds, strengths=strengths)
    for f in range(4):
        losses = np.zeros(len(strengths))
        for s, strength in enumerate(strengths):
            for g in set(range(4)) - {f}:
                trains = (folds.fold != f) & (folds.fold != g)
                reference = make_pipeline(
                    StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", tol=1e-8, max_iter=1000)
                ).fit(X[trains], samples.label[trains])
                held = folds.fold == g
                losses[s] += balanced_log_loss(
                    samples.label[held], reference.decision_function(X[held])[:, None, None]
                )[0]
        assert probe.fit.chosen_strength[f] == strengths[int(losses.argmin())]


def test_metrics_follow_from_predictions_csv(store, tmp_path):
    (folder,) = probed(store, ["good"], options=ProbeOptions(), runs=tmp_path / "runs")
    predictions = read_predictions(folder)
    run = read_run(folder)
    assert json.loads((folder / "metrics.json").read_text()) == evaluate(predictions).as_dict()
    part = predictions.select((predictions.dataset == "atnorm-br") & (predictions.fold == 2))
    assert run.figures.sets["atnorm-br/test"].folds["auroc"].each[2] == pytest.approx(
        auroc(part.label, part.logit[:, 0])
    )


def test_saved_weights_give_the_saved_logits(store, tmp_path):
    from safetensors.numpy import load_file

    (folder,) = probed(store, ["good"], options=ProbeOptions(), runs=tmp_path / "runs")
    run, predictions = read_run(folder), read_predictions(folder)
    weights = load_file(folder / "weights.safetensors")
    X = store.read("atnorm-br", model="good", view=run.view, pooling=run.pooling).astype(np.float32)
    expected = X @ weights["coef"][1] + weights["intercept"][1]
    part = predictions.select((predictions.dataset == "atnorm-br") & (predictions.fold == 1))
    np.testing.assert_allclose(part.logit[:, 0], expected, rtol=1e-4, atol=1e-4)


TEXT = "full@224+imagenet"
AS_TEXT = {"crop": None, "resize": 224, "input_size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture
def briefly(monkeypatch) -> None:
    """Trained probes of two epochs, on a table that is not AMi-Br's."""
    monkeypatch.setattr(experiment, "AMI_BR", "")
    monkeypatch.setattr(
        candidates, "probe_recipe", lambda name, *, model: replace(probe_recipe(name, model=model), max_epochs=2)
    )


@pytest.fixture
def with_text(tmp_path, briefly) -> FeatureStore:
    """A store of one model in the view of the paper's text, and in `full`, which is not that."""
    store = FeatureStore.open_or_create(tmp_path / "text.zarr")
    for dataset, samples in (("ami-br", table()), ("atnorm-br", table(seed=1, split=False))):
        for view in ("full", TEXT):
            add(store, dataset, samples, "prov-gigapath", view, signal=0.6)
    return store


@pytest.mark.parametrize(
    ("recipe", "view", "rate", "decay"), [("paper", TEXT, 1e-4, 1e-5), ("authors", "full", 1e-3, 1e-4)]
)
def test_a_trained_probe_sees_what_its_recipe_asks_for(with_text, tmp_path, capsys, recipe, view, rate, decay):
    (folder,) = probed(with_text, options=ProbeOptions(recipe=recipe, cv=3), runs=tmp_path / "runs")
    run = read_run(folder)
    (candidate,) = run.candidates
    assert (run.view, run.pooling, len(candidate.n_epochs)) == (view, "card", 3)
    assert (candidate.recipe["learning_rate"], candidate.recipe["weight_decay"]) == (rate, decay)
    assert "text asks" not in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["ami-br", "atnorm-br"])
def test_a_store_without_the_texts_view_is_probed_in_the_cards_and_that_is_said(
    with_text, tmp_path, capsys, monkeypatch, lacking
):
    entries = with_text.entries
    without = [lacking, TEXT]
    monkeypatch.setattr(
        with_text, "entries", lambda *given: [e for e in entries(*given) if [e.dataset, e.view] != without]
    )
    (folder,) = probed(with_text, options=ProbeOptions(recipe="paper", cv=3), runs=tmp_path / "runs")
    assert read_run(folder).view == "full"
    command = f"fm-extract --model prov-gigapath --dataset ami-br,atnorm-br --view {TEXT}"
    said = " ".join(capsys.readouterr().err.split())
    assert f"prov-gigapath: the paper's text asks for view {TEXT}; used is full" in said
    assert command in said


@pytest.mark.parametrize(("transform", "said"), [(AS_TEXT, False), (AS_TEXT | {"resize": 256}, True)])
@pytest.mark.usefixtures("briefly")
def test_a_card_that_does_as_the_text_says_needs_no_other_view(tmp_path, capsys, transform, said):
    store = FeatureStore.open_or_create(tmp_path / "card.zarr")
    add(store, "ami-br", table(), "uni", "full", signal=0.6, transform=transform)
    probed(store, options=ProbeOptions(recipe="paper", cv=3), runs=tmp_path / "runs")
    assert ("text asks" in capsys.readouterr().err) == said


def test_features_without_a_weight_are_counted_recorded_and_said_once(tmp_path, capsys):
    store = FeatureStore.open_or_create(tmp_path / "dead.zarr")
    for view in ("full", "center64"):
        add(store, "ami-br", table(), "uni", view, signal=0.6, dead=2)
    (folder,) = probed(store, options=ProbeOptions(cv=3), runs=tmp_path / "runs")
    run = read_run(folder)
    assert [candidate.n_dropped for candidate in run.candidates] == [2] * 4
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("vary by no more than rounding") == 1
    assert f"uni ({run.view}, {run.pooling}): 2 of {WIDTH} features vary by no more than rounding" in said


def test_datasets_embedded_differently_are_never_compared(store, tmp_path):
    other = table(seed=2, split=False)
    store.put_samples("third", other, attrs={})
    writer = store.begin(
        "third",
        model="good",
        view="full",
        poolings={"cls": WIDTH, "mean": WIDTH},
        card_pooling="cls",
        parts={"precision": "bf16"},
    )
    values = np.zeros((len(other), WIDTH))
    for rows in writer.missing():
        writer.write(rows, {"cls": values[rows.start : rows.stop], "mean": values[rows.start : rows.stop]})
    with pytest.raises(UserError, match=r"computed differently for ami-br and third: .*precision"):
        probed(store, ["good"], options=ProbeOptions(), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["goood"], ProbeOptions(), r"no embeddings of 'goood'.*Did you mean good.*fm-extract --model goood"),
        (["good"], ProbeOptions(train="ami"), r"no dataset 'ami'.*fm-extract --dataset ami"),
        (["good"], ProbeOptions(test=("atnorm-md",)), r"no dataset 'atnorm-md'"),
        (["poor"], ProbeOptions(view="center64"), r"no complete embeddings of poor in view center64"),
        (["good"], ProbeOptions(view="fulll"), r"unknown view 'fulll'. Did you mean full\? .*store.zarr has .*full"),
        (["good"], ProbeOptions(view="nope"), r"unknown view 'nope'. Use 'full'.*store.zarr has .*full[^?]*$"),
        (["good"], ProbeOptions(pooling="center"), r"cls.*mean"),
        (["good"], ProbeOptions(recipe="paper"), r"paper's fold assignment"),
        (["good"], ProbeOptions(cv=2), r"at least 3 folds, got 2.* Use `cv=3` or more\.$"),
    ],
)
def test_a_mistake_gets_one_clear_message(store, tmp_path, models, options, message):
    with pytest.raises(UserError, match=message):
        probed(store, models, options=options, runs=tmp_path / "runs")


def test_a_damaged_run_is_named(store, tmp_path):
    (folder,) = probed(store, ["poor"], options=ProbeOptions(), runs=tmp_path / "runs")
    (folder / "predictions.csv").write_text("dataset,id\n")
    with pytest.raises(UserError, match=r"predictions.csv is damaged \(found columns dataset, id, expected"):
        read_predictions(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_run(folder)
    with pytest.raises(UserError, match=r"is not a finished run: run.json is missing"):
        read_run(tmp_path)


def test_published_figures_stand_beside_ours():
    assert len(published()) == 2 * 17 * 3
    best = {row.model: row for row in published() if row.source == "table-3" and row.method == "lora"}
    assert (best["virchow2"].dataset, best["h-optimus-1"].figures["auroc"].mean) == ("atnorm-md", 0.6019)
    figures = {name: FoldFigure(0.5, 0.01, (0.49, 0.51)) for name in ("balanced_accuracy", "auroc")}
    metrics = SetMetrics(counts=(5, 4), folds=figures, ensemble=None)
    run = RunRecord(
        kind="probe",
        model="uni",
        method="probe",
        options={},
        train="ami-br",
        view="full",
        pooling="card",
        card_pooling="cls",
        folds=FoldsRecord(n=2, digest=""),
        metrics=RunMetrics(0.5, {"ami-br/validation": metrics, "ami-br/test": metrics}),
    )
    table = leaderboard([run])
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["uni (probe)", "  paper, Table 3", "  authors' re-run"]
    assert cells[4] == ["0.5000 ± 0.0100", "0.6477 ± 0.0108", "0.6339"]
    assert cells[2][1:] == ["", ""]
    named = [
        list(leaderboard([replace(run, model=model)]).columns[0].cells)[2] for model in ("prov-gigapath", "virchow")
    ]
    assert named == ["  authors' re-run (same figures as Table 3)", "  authors' re-run"]


def relabelled(samples: Samples, split: list[str]) -> Samples:
    """The same patches with another split."""
    columns = {name: getattr(samples, name) for name in Samples.__dataclass_fields__}
    return Samples(**columns | {"split": np.array(split)})


def scored(folder, dataset: str, split: str) -> set[str]:
    predictions = read_predictions(folder)
    return set(predictions.id[(predictions.dataset == dataset) & (predictions.split == split)].tolist())


@pytest.mark.parametrize(
    ("names", "training", "testing"),
    [
        (("train", "", "test"), {"train"}, {"test"}),
        (("", "", "test"), {""}, {"test"}),
        (("train", "train", ""), {"train"}, set()),
        (("", "", ""), {""}, set()),
    ],
)
def test_rows_without_a_split_are_never_scored_as_test_nor_trained_on_beside_train(tmp_path, names, training, testing):
    """Slides take the splits in turn, so that every mixture of train, test and neither is there."""
    samples = table(n=312)
    slide = np.arange(312) // 8
    samples = relabelled(samples, [names[s % 3] for s in slide])
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    add(store, "mine", samples, "m", "full", signal=0.5)
    (folder,) = probed(store, options=ProbeOptions(cv=3), runs=tmp_path / "runs")
    expected = {name: set(samples.id[samples.split == name].tolist()) for name in set(names)}
    assert scored(folder, "mine", "validation") == set().union(*(expected[name] for name in training))
    assert scored(folder, "mine", "test") == set().union(*(expected[name] for name in testing))


def test_another_dataset_is_scored_whole_whatever_its_split_says(tmp_path):
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    add(store, "mine", table(), "m", "full", signal=0.5)
    other = table(n=100, seed=1)
    other = relabelled(other, [("train", "test", "")[row % 3] for row in range(100)])
    add(store, "other", other, "m", "full", signal=0.5, seed=1)
    options = ProbeOptions(cv=3, train="mine")
    (folder,) = probed(store, options=options, runs=tmp_path / "runs")
    assert scored(folder, "other", "test") == set(other.id.tolist())
    assert scored(folder, "other", "validation") == set()


PARTS = {
    "model": "m",
    "hub_id": "org/m",
    "revision": "0" * 40,
    "weights_sha256": "a" * 64,
    "architecture": "vit",
    "kwargs": {"depth": 2},
    "layout": "timm",
    "resample_pos_embed": False,
    "transform": {"resize": 224, "mean": [0.5, 0.5, 0.5]},
    "view": "full",
    "precision": "fp32",
    "device": "cpu",
    "poolings": {"cls": WIDTH},
}
OTHER_PARTS = {
    "hub_id": "org/other",
    "revision": "1" * 40,
    "weights_sha256": "b" * 64,
    "architecture": "swin",
    "kwargs": {"depth": 3},
    "layout": "hf-vit",
    "resample_pos_embed": True,
    "transform": {"resize": 224, "mean": [0.5, 0.5, 0.6]},
    "precision": "bf16",
    "device": "cuda",
    "another": 1,
}
OWN_PARTS = {"dataset_digest": "d" * 64, "source_mpp": 0.5}


def stored_with(tmp_path, changes: dict, *, imported: bool = False) -> FeatureStore:
    """Two datasets of the same model, the second one's embeddings with other parts."""
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    for name, parts in (("mine", {}), ("other", changes)):
        samples = table(n=120, seed=len(name), split=name == "mine")
        store.put_samples(name, samples, attrs={})
        common = PARTS | {"dataset_digest": samples.images_digest, "source_mpp": 0.25}
        writer = store.begin(
            name,
            model="m",
            view="full",
            poolings={"cls": WIDTH},
            card_pooling="cls",
            parts=common | parts,
            imported=imported and name == "other",
        )
        rng = np.random.default_rng(len(name))
        for rows in writer.missing():
            writer.write(rows, {"cls": rng.standard_normal((len(rows), WIDTH)) + samples.label[rows, None]})
    return store


@pytest.mark.parametrize("part", OTHER_PARTS)
def test_sets_whose_embeddings_differ_in_one_part_are_not_compared(tmp_path, part):
    store = stored_with(tmp_path, {part: OTHER_PARTS[part]})
    with pytest.raises(UserError, match=rf"computed differently for mine and other: {part} \(") as caught:
        probe_store(store, options=ProbeOptions(cv=3, train="mine"), runs=tmp_path / "runs")
    assert str(OTHER_PARTS[part]) in str(caught.value)
    assert str(PARTS.get(part)) in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("part", OWN_PARTS)
def test_sets_that_differ_in_their_patches_alone_are_compared(tmp_path, part):
    store = stored_with(tmp_path, {part: OWN_PARTS[part]})
    (folder,) = probed(store, options=ProbeOptions(cv=3, train="mine"), runs=tmp_path / "runs")
    assert scored(folder, "other", "test") == set(store.samples("other").id.tolist())


def test_of_imported_embeddings_nobody_knows_the_parts(tmp_path):
    store = stored_with(tmp_path, {"weights_sha256": "b" * 64}, imported=True)
    assert probe_store(store, options=ProbeOptions(cv=3, train="mine"), runs=tmp_path / "runs")


@pytest.mark.parametrize("view", ["full", "center64"])
def test_a_run_records_the_fingerprints_of_the_view_it_was_probed_on(store, tmp_path, view):
    (folder,) = probed(store, ["good"], options=ProbeOptions(view=view, cv=3), runs=tmp_path / "runs")
    run = read_run(folder)
    found = {entry.dataset: entry for entry in store.entries(model="good") if entry.view == view}
    assert run.fingerprints == {name: entry.fingerprint for name, entry in found.items()}
    assert run.embedding == found["ami-br"].parts


def test_which_dataset_trains_is_part_of_the_question():
    samples = table(n=96)
    tables = {"one": samples, "two": samples}
    first, second = (experiment.make_experiment(name, tables, cv=3) for name in tables)
    assert first.folds.digest == second.folds.digest
    assert first.digest != second.digest
    assert list(second.tables) == ["two", "one"]
    assert second.test == ("one",)


def test_only_ami_br_has_the_papers_folds():
    samples = table(n=96)
    for asked in (False, True):
        assert experiment.make_experiment("mine", {"mine": samples}, cv=3, paper_folds=asked).folds.source.startswith(
            "greedy"
        )


def test_of_candidates_that_score_alike_the_first_is_chosen(tmp_path):
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    samples = table(n=120)
    store.put_samples("mine", samples, attrs={})
    X = np.random.default_rng(0).standard_normal((120, WIDTH)) + samples.label[:, None]
    writer = store.begin(
        "mine", model="m", view="full", poolings={"cls": WIDTH, "mean": WIDTH}, card_pooling="cls", parts={"model": "m"}
    )
    for rows in writer.missing():
        writer.write(rows, dict.fromkeys(("cls", "mean"), X[rows.start : rows.stop]))
    (run,) = probe_store(store, options=ProbeOptions(cv=3), runs=tmp_path / "runs")
    card, mean = run.candidates
    assert card.validation_auroc == mean.validation_auroc
    assert (card.pooling, mean.pooling, run.pooling) == ("card", "mean", "card")


def test_the_demo_is_scored_only_if_asked_for_and_never_chosen_beside_another(tmp_path):
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    add(store, "demo", table(n=120), "m", "full", signal=0.5)
    (alone,) = probe_store(store, options=ProbeOptions(cv=3), runs=tmp_path / "runs")
    assert (alone.train, alone.test) == ("demo", ())
    add(store, "mine", table(n=120, seed=1), "m", "full", signal=0.5, seed=1)
    add(store, "tested", table(n=24, seed=2, split=False), "m", "full", signal=0.5, seed=2)
    (beside,) = probe_store(store, options=ProbeOptions(cv=3), runs=tmp_path / "runs")
    assert (beside.train, beside.test) == ("mine", ("tested",))
    (asked,) = probe_store(store, options=ProbeOptions(cv=3, test=("demo",)), runs=tmp_path / "runs")
    assert (asked.train, asked.test) == ("mine", ("demo",))


def test_domains_are_held_out_in_turn_and_named(tmp_path, capsys):
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    samples = replace(table(n=192), domain=np.repeat(["Oslo", "Bern"], [64, 128]))
    add(store, "mine", samples, "m", "full", signal=0.5)
    options = ProbeOptions(folds_by="domain", cv=7)
    (run,) = probe_store(store, options=options, runs=tmp_path / "runs")
    assert "one fold per domain, Bern, Oslo, whatever `cv` says" in " ".join(capsys.readouterr().err.split())
    assert (run.folds.names, run.folds.n, run.options["cv"]) == (("Bern", "Oslo"), 2, 2)
    assert read_run(run.folder).folds == run.folds
    own = read_predictions(run.folder)
    own = own.select(own.split == "validation")
    domain = dict(zip(samples.id.tolist(), samples.domain.tolist(), strict=True))
    assert [domain[id] for id in own.id.tolist()] == [run.folds.names[fold] for fold in own.fold.tolist()]
    printed = result_tables([run])[1]
    held_out = own.select(own.fold == 1)
    assert [column.header for column in printed.columns][4:] == ["Oslo\nbal. acc.", "Oslo\nAUROC"]
    assert next(iter(printed.columns[5].cells)) == f"{auroc(held_out.label, held_out.logit[:, 0]):.4f}"

    page, report, _ = make_report(tmp_path / "runs", resampling=Resampling(replicates=200))
    assert "2 folds, each a domain: Bern, Oslo (digest" in page
    assert "was trained on the other domains alone" in page
    (out_of_fold,) = (one for one in report.sets if one.is_validation)
    view = next(iter(out_of_fold.domains.values()))
    assert view.domains["Oslo"].figures["auroc"].value == pytest.approx(auroc(held_out.label, held_out.logit[:, 0]))

    with pytest.raises(UserError, match="`folds_by=scanner`: expected domain"):
        probe_store(store, options=ProbeOptions(folds_by="scanner"), runs=tmp_path / "runs")
    assert "folds_by" not in ProbeOptions().as_record()  # earlier versions read it
