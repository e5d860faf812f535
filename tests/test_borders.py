"""Between datasets: do labels keep their meaning, and are patches that a model knows from training set apart?"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_finetune_command import Command, finetune, refused, write_patches  # noqa: F401

from features.console import UserError
from features.samples import Samples, make_samples
from features.store import FeatureStore
from finetune.predict import predict_paths
from finetune.report import make_report
from probe.leaks import UNSEEN, known_patches, with_unseen
from probe.probing import ProbeOptions, probe_store
from probe.records import RunRecord
from probe.runs import read_predictions, read_run

WIDTH = 12


def table(name: str, n: int, *, labels: np.ndarray | None = None, split: str = "") -> Samples:
    label = np.random.default_rng(len(name)).integers(0, 2, n) if labels is None else labels
    return make_samples(
        [f"{name} {row}" for row in range(n)],
        label.tolist(),
        group=[f"{name} slide {row // 4}" for row in range(n)],
        split=[split] * n,
        sha256=[f"{name}{row}" for row in range(n)],
    )


def embeddings(samples: Samples, seed: int) -> np.ndarray:
    X = np.random.default_rng(seed).standard_normal((len(samples), WIDTH))
    X[:, 0] += 3 * (2.0 * samples.label - 1)
    return X


def add(store: FeatureStore, name: str, samples: Samples, X: np.ndarray, classes: tuple[str, str]) -> None:
    store.put_samples(name, samples, attrs={"label_names": list(classes)})
    parts = {"model": "m"}
    writer = store.begin(name, model="m", view="full", poolings={"cls": WIDTH}, card_pooling="cls", parts=parts)
    for rows in writer.missing():
        writer.write(rows, {"cls": X[rows.start : rows.stop]})


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    train = table("train", 160)
    add(store, "train", train, embeddings(train, 0), ("normal", "tumor"))
    return store


def probed(store: FeatureStore, tmp_path: Path, **options: object) -> RunRecord:
    (run,) = probe_store(store, options=ProbeOptions(train="train", **options), runs=tmp_path / "runs")
    return run


# --- labels -----------------------------------------------------------------------------------------------------------


def add_test(store: FeatureStore, classes: tuple[str, str], *, turned: bool = False) -> None:
    """A test set whose class 1 looks like the training set's; `turned` calls the same patches class 0."""
    samples = table("test", 80)
    X = embeddings(samples, 1)
    add(store, "test", samples.relabelled((1, 0)) if turned else samples, X, classes)


@pytest.mark.parametrize(
    ("classes", "found"),
    [
        (("cancer", "normal"), "normal changes sides"),
        (("tumor", "normal"), "tumor changes sides"),
        (("normal", "cancer"), "only normal is in both"),
    ],
)
@pytest.mark.parametrize("test", [None, ("test",)])
def test_a_test_set_of_other_classes_is_refused_with_both_lists_and_the_remedy(store, tmp_path, classes, found, test):
    add_test(store, classes, turned=classes[1] == "normal")
    with pytest.raises(UserError, match=rf"test has the classes .*{classes[0]}.*train has normal.*: {found}.*labels="):
        probed(store, tmp_path, test=test)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("classes", [("cancer", "normal"), ("normal", "cancer")])
def test_a_renaming_says_what_the_classes_are(store, tmp_path, classes):
    add_test(store, classes, turned=classes[1] == "normal")
    run = probed(store, tmp_path, labels="cancer=tumor")
    assert run.figures.sets["test/test"].folds["auroc"].mean > 0.95
    rows = read_predictions(run.folder)
    expected = np.repeat(table("test", 80).label, 5)
    np.testing.assert_array_equal(rows.label[rows.dataset == "test"], expected)


def test_another_task_in_the_store_is_left_out_and_named_or_refused_if_asked_for(store, tmp_path, capsys):
    add_test(store, ("metaphase", "anaphase"))
    assert list(probed(store, tmp_path).figures.sets) == ["train/validation"]
    said = capsys.readouterr().err
    assert "test has other classes (metaphase, anaphase) than train (normal, tumor) and is not scored" in said
    with pytest.raises(UserError, match="no class is in both"):
        probed(store, tmp_path, test=("test",))


def test_a_test_set_of_one_class_is_scored_on_what_exists(store, tmp_path):
    samples = table("test", 40, labels=np.ones(40, int))
    add(store, "test", samples, embeddings(samples, 1), ("normal", "tumor"))
    figures = probed(store, tmp_path).figures.sets["test/test"]
    assert figures.ensemble.figures["sensitivity"].value > 0.9
    assert np.isnan(figures.ensemble.figures["auroc"].value)
    assert np.isnan(figures.folds["balanced_accuracy"].mean)
    text, _, _ = make_report(tmp_path / "runs", format="markdown")
    assert "nan" not in text.lower()


def test_runs_of_other_classes_never_stand_in_one_report(store, tmp_path):
    probed(store, tmp_path)
    store.put_samples("train", store.samples("train").relabelled((1, 0)), attrs={"label_names": ["tumor", "normal"]})
    probed(store, tmp_path)
    with pytest.raises(UserError, match=r"they answer different questions"):
        make_report(tmp_path / "runs", format="markdown")


# --- leaks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def leaking(store: FeatureStore) -> FeatureStore:
    """A test set of 60: 3 have the bytes of training patches, 5 their slide, 6 look the same, one is all three."""
    train, X = store.samples("train"), store.read("train", model="m", view="full", pooling="cls").astype(float)
    test = table("test", 60)
    Y = embeddings(test, 1)
    sha256, group, label = test.sha256.copy(), test.group.astype("<U20"), test.label.copy()
    for row, known in ((0, 10), (1, 20), (2, 30)):
        sha256[row], Y[row], label[row] = train.sha256[known], X[known], train.label[known]
    group[[2, 3, 4, 5, 6]] = train.group[7]
    for row, known in ((2, 30), (7, 31), (8, 33), (9, 99)):
        Y[row], label[row] = X[known], train.label[known]
    columns = {name: getattr(test, name) for name in ("id", "split", "votes", "domain")}
    add(store, "test", Samples(sha256=sha256, group=group, label=label, **columns), Y, ("normal", "tumor"))
    return store


def test_known_patches_are_said_recorded_and_set_apart(leaking, tmp_path, capsys):
    run = probed(leaking, tmp_path)
    assert (
        "10 of 60 test patches of test are known from the training patches of train (3 identical, 3 nearly identical, "
        "5 of a group (slide, patient) in both): figures without them are those of test/unseen"
    ) in capsys.readouterr().err
    assert set(run.similar["test"]) == {f"test {row}" for row in (0, 1, 2, 7, 8, 9)}
    assert read_run(run.folder).similar == run.similar
    assert (sum(run.figures.sets["test/test"].counts), sum(run.figures.sets["test/unseen"].counts)) == (60, 50)
    rows = read_predictions(run.folder)
    kept = rows.select((rows.dataset == "test") & np.isin(rows.id, [f"test {row}" for row in range(10, 60)]))
    right = np.mean(
        [((kept.logit[:, 0] >= 0) == kept.label)[(kept.fold == f) & (kept.label == 1)].mean() for f in range(5)]
    )
    wrong = np.mean(
        [((kept.logit[:, 0] >= 0) == kept.label)[(kept.fold == f) & (kept.label == 0)].mean() for f in range(5)]
    )
    assert run.figures.sets["test/unseen"].folds["balanced_accuracy"].mean == pytest.approx((right + wrong) / 2)


def test_the_report_gives_the_figures_with_and_without_them(leaking, tmp_path):
    probed(leaking, tmp_path)
    _, report, _ = make_report(tmp_path / "runs", format="markdown")
    assert [one.name for one in report.sets] == ["test/test", "test/unseen", "train/validation"]
    assert [one.n for one in report.sets] == [60, 50, 160]
    assert any("10 of 60 test patches of test are known" in note for note in report.notes)
    page, _, _ = make_report(tmp_path / "runs", format="html")
    assert "test without patches known from training" in page


def test_runs_that_find_different_patches_share_what_none_of_them_knows(leaking, tmp_path):
    train, test = leaking.samples("train"), leaking.samples("test")
    for name, samples, seed in (("train", train, 5), ("test", test, 6)):
        X = embeddings(samples, seed)
        parts = {"model": "other"}
        writer = leaking.begin(
            name, model="other", view="full", poolings={"cls": WIDTH}, card_pooling="cls", parts=parts
        )
        for rows in writer.missing():
            writer.write(rows, {"cls": X[rows.start : rows.stop]})
    runs = probe_store(leaking, options=ProbeOptions(train="train"), runs=tmp_path / "runs")
    by_model = {run.model: run for run in runs}
    assert by_model["other"].similar is None
    assert sum(by_model["other"].figures.sets["test/unseen"].counts) == 53
    _, report, _ = make_report(tmp_path / "runs", format="markdown")
    (unseen,) = (one for one in report.sets if one.split == UNSEEN)
    assert (unseen.n, len(unseen.comparison.judgements)) == (50, 2)


def test_patches_of_a_dataset_s_own_test_split_are_compared_too(store, tmp_path):
    samples = store.samples("train")
    split = np.where(np.arange(160) < 120, "train", "test")
    columns = {name: getattr(samples, name) for name in ("id", "label", "votes", "domain", "sha256")}
    group = samples.group.copy()
    group[120] = group[0]
    known = known_patches("train", {"train": Samples(split=split, group=group, **columns)}, {})
    assert known["train"].ids.tolist() == ["train 120"]


def test_where_every_test_patch_is_known_there_is_no_set_without_them(store, tmp_path, capsys):
    samples, X = store.samples("train"), store.read("train", model="m", view="full", pooling="cls")
    add(store, "test", samples.select(np.arange(20)), X[:20].astype(float), ("normal", "tumor"))
    assert set(probed(store, tmp_path).figures.sets) == {"train/validation", "test/test"}
    assert "all 20 test patches of test are known" in capsys.readouterr().err


def test_copies_in_another_fold_are_said(store, tmp_path, capsys):
    samples, X = store.samples("train"), store.read("train", model="m", view="full", pooling="cls").astype(float)
    X[[100, 110, 130, 150]] = X[3]
    add(store, "twice", samples, X, ("normal", "tumor"))
    probe_store(store, options=ProbeOptions(train="twice", test=()), runs=tmp_path / "runs")
    assert "training patches of twice look like one in another fold" in capsys.readouterr().err


def test_without_known_patches_predictions_stay_as_they_are(store, tmp_path):
    run = probed(store, tmp_path)
    predictions = read_predictions(run.folder)
    assert with_unseen(predictions, []) is predictions
    assert run.similar is None


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def test_the_same_pixels_in_another_format_are_the_same_patch(finetune: Command, tmp_path: Path) -> None:  # noqa: F811
    write_patches(tmp_path / "others", table="others.csv", seed=1)
    for row, known in ((0, 1), (5, 2)):
        Image.open(tmp_path / f"{known}.png").save(tmp_path / "others" / f"{row}.tif")
    rows = (tmp_path / "others" / "others.csv").read_text()
    rows = rows.replace("\n0.png", "\n0.tif").replace("\n5.png", "\n5.tif")
    (tmp_path / "others" / "others.csv").write_text(rows)
    done = finetune("--method", "head", "--test", "others/others.csv")
    assert done.status == 0, done.err
    assert "2 of 16 test patches of others are known" in done.err
    (folder,) = (tmp_path / "runs").iterdir()
    run = read_run(folder)
    assert run.similar == {"others": ("0.tif", "5.tif")}
    assert sum(run.figures.sets["others/unseen"].counts) == 14


def test_a_test_set_of_other_classes_is_refused_before_training(finetune: Command, tmp_path: Path) -> None:  # noqa: F811
    path = write_patches(tmp_path / "others", table="others.csv", seed=1)
    path.write_text(path.read_text().replace("Atypical", "Mitosis"))
    said = refused(finetune("--method", "head", "--test", "others/others.csv"))
    assert "its classes are Mitosis, Normal, those of the training set Normal (0) and Atypical (1)" in said
    assert "--labels Mitosis=Atypical" in said
    assert not (tmp_path / "runs").exists()
    done = finetune("--method", "head", "--test", "others/others.csv", "--labels", "Mitosis=Atypical")
    assert done.status == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    rows = read_predictions(folder)
    labels = dict(zip(rows.id[rows.dataset == "others"].tolist(), rows.label[rows.dataset == "others"], strict=True))
    assert labels == {f"{row}.png": row % 2 for row in range(16)}


def test_predictions_name_the_classes_of_the_run_and_say_if_the_table_has_others(
    finetune: Command,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert finetune("--method", "head").status == 0
    (folder,) = (tmp_path / "runs").iterdir()
    path = write_patches(tmp_path / "others", table="others.csv", seed=1)
    path.write_text(path.read_text().replace("Atypical", "Mitosis").replace("path,", "path,").replace("group", "slide"))
    capsys.readouterr()
    predict_paths(folder, [path], out=tmp_path / "out.csv", device="cpu")
    said = capsys.readouterr().err
    assert "its labels (Mitosis, Normal) are not the classes of the run (Normal, Atypical)" in said
    with (tmp_path / "out.csv").open() as file:
        assert {row["predicted"] for row in csv.DictReader(file)} <= {"Normal", "Atypical"}
