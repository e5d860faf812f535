"""Does a run say of its own test patches what it said when it was made, and refuse what it cannot reproduce?"""

import csv
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
import torch
from drawn_runs import QUICK, patches
from PIL import Image
from safetensors.torch import load_file, save_file

from extract.backbones import find_backbone
from extract.datasets import load_dataset, load_patches
from extract.embed import ExtractOptions, extract_dataset
from features.console import UserError
from features.store import FeatureStore
from finetune.cli import finetune_app, predict_app
from finetune.lora import LoraOptions
from finetune.options import ComputeOptions, FinetuneOptions
from finetune.predict import predict_paths
from finetune.predict_groups import count_groups, group_rates, groups_of
from finetune.report import make_report
from finetune.run import finetune
from finetune.setup import prepare
from probe import candidates
from probe.ensembles import ensemble_of
from probe.probing import ProbeOptions, probe_store
from probe.rates import error_rates
from probe.runs import read_predictions, read_run

MODEL, VIEW = "timm/test_vit", "full@32"
N = 48
GRADES = ("benign", "grade 1", "grade 2", "{grade}, 3")


def write_table(folder: Path, classes: tuple[str, ...]) -> Path:
    """A CSV of 48 small patches on 12 slides, the last three for testing; the higher the class, the brighter."""
    rng = np.random.default_rng(0)
    with (folder / "patches.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "split"])
        for row in range(N):
            label, slide = row % len(classes), row // 4
            pixels = rng.integers(0, 150, (32, 32, 3)) + 70 * label // (len(classes) - 1)
            name = f"{row:02}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            writer.writerow([name, classes[label], f"s{slide}", "train" if slide < 9 else "test"])
    return folder / "patches.csv"


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("patches"), ("Normal", "Atypical"))


@pytest.fixture(scope="module")
def grades(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("grades"), GRADES)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def runs(table: Path, weights: Path, tmp_path_factory) -> dict[str, Path]:
    """A probe run and a fine-tuned run of each method, of the same patches."""
    return make_runs(table, weights, tmp_path_factory.mktemp("runs"), ("lora", "full", "head"))


@pytest.fixture(scope="module")
def graded(grades: Path, weights: Path, tmp_path_factory) -> dict[str, Path]:
    """The same, of four classes."""
    return make_runs(grades, weights, tmp_path_factory.mktemp("graded"), ("lora", "head"))


def make_runs(table: Path, weights: Path, place: Path, methods: tuple[str, ...]) -> dict[str, Path]:
    store = FeatureStore.open_or_create(place / "store.zarr")
    dataset = load_dataset(str(table))
    extract_dataset(
        dataset,
        [find_backbone(MODEL)],
        store=store,
        options=ExtractOptions(precision="fp32", views=(VIEW,)),
        weights=weights,
    )
    (probe,) = probe_store(store, options=ProbeOptions(cv=3), runs=place)
    found = {"probe": probe.folder}
    for method in methods:
        options = FinetuneOptions(
            model=MODEL,
            train=str(table),
            view=VIEW,
            method=method,
            cv=3,
            epochs=6 if method == "lora" else 2,
            learning_rate=5e-3 if method == "lora" else None,
            lora=LoraOptions(rank=2),
            precision="fp32",
            tta=method == "lora",
        )
        found[method] = finetune(options, compute_options=ComputeOptions(weights=weights), runs=place).folder
    return found


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["probe", "lora", "full", "head"])
def test_a_run_repeats_its_own_test_predictions(kind, runs, table, weights, tmp_path):
    summary = predict_paths(runs[kind], [table], out=tmp_path / "out.csv", weights=weights)
    written = {row["id"]: row for row in rows_of(tmp_path / "out.csv")}
    assert list(written) == [f"{row:02}.png" for row in range(N)]  # labels and splits are not looked at
    own = read_predictions(runs[kind])
    threshold = read_run(runs[kind]).figures.threshold
    assert summary["threshold"] == threshold
    tested = own.select(own.split == "test")
    assert len(set(tested.id)) == 12
    for id in set(tested.id.tolist()):
        of_patch = tested.select(tested.id == id)
        folds = of_patch.probability[np.argsort(of_patch.fold), 1]
        row = written[id]
        assert [float(row[f"fold_{k}"]) for k in range(3)] == pytest.approx(folds, abs=2e-4)
        assert float(row["probability"]) == pytest.approx(folds.mean(), abs=2e-4)
        assert float(row["spread"]) == pytest.approx(folds.std(), abs=2e-4)
        if abs(folds.mean() - threshold) > 1e-3:
            assert row["predicted"] == ("Atypical" if folds.mean() >= threshold else "Normal")


def test_the_columns_of_two_classes_are_those_of_ever(runs, table, weights, tmp_path):
    predict_paths(runs["head"], [table], out=tmp_path / "out.csv", weights=weights, by="group")
    columns = "source,id,probability,predicted,spread,fold_0,fold_1,fold_2"
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == columns
    columns = "source,group,n,n_positive,rate,low,high,corrected,corrected_low,corrected_high"
    assert (tmp_path / "out-by-group.csv").read_text().splitlines()[0] == columns


# --- more than two classes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["probe", "lora", "head"])
def test_a_run_of_several_classes_repeats_its_own_test_predictions(kind, graded, grades, weights, tmp_path):
    summary = predict_paths(graded[kind], [grades], out=tmp_path / "out.csv", weights=weights)
    rows = rows_of(tmp_path / "out.csv")
    columns = [f"probability_{name}" for name in GRADES]
    assert list(rows[0]) == ["source", "id", *columns, "predicted", "spread"]
    own = read_predictions(graded[kind])
    tested = own.select(own.split == "test")
    written = {row["id"]: row for row in rows}
    assert len(set(tested.id)) == 12
    for id in set(tested.id.tolist()):
        models = tested.probability[tested.id == id]  # (3, 4)
        mean, row = models.mean(axis=0), written[id]
        assert [float(row[column]) for column in columns] == pytest.approx(mean, abs=2e-4)
        if np.diff(np.sort(mean))[-1] > 1e-3:
            assert row["predicted"] == GRADES[mean.argmax()]
            assert float(row["spread"]) == pytest.approx(models.std(axis=0)[mean.argmax()], abs=2e-4)
    assert "threshold" not in summary
    assert "n_positive" not in summary
    predicted = [row["predicted"] for row in rows]
    assert summary["counts"] == [predicted.count(name) for name in GRADES]
    assert len(set(predicted)) > 2, "this example must predict several classes"


def test_every_group_has_the_share_of_every_class(graded, grades, weights, tmp_path):
    out = tmp_path / "out.csv"
    found = predict_paths(graded["head"], [grades], out=out, weights=weights, by="group")["by_group"]
    rows, slides = rows_of(out), rows_of(tmp_path / "out-by-group.csv")
    assert list(slides[0]) == ["source", "group", "n", *(f"share_{name}" for name in GRADES)]
    assert (found["out"], found["n_without"]) == (str(tmp_path / "out-by-group.csv"), 0)
    for k, slide in enumerate(slides):
        predicted = [one["predicted"] for one in rows[4 * k : 4 * k + 4]]
        assert (slide["source"], slide["group"], slide["n"]) == (str(grades), f"s{k}", "4")
        assert [float(slide[f"share_{name}"]) for name in GRADES] == [predicted.count(name) / 4 for name in GRADES]
        counts = [predicted.count(name) for name in GRADES]
        group = found["groups"][k]
        assert (group["group"], group["n"], group["counts"]) == (f"s{k}", 4, counts)
        assert group["shares"] == [n / 4 for n in counts]


def test_a_threshold_is_for_two_classes(graded, grades, weights, tmp_path):
    with pytest.raises(UserError, match=r"has 4 classes \(benign, grade 1, .*\), of which .* leave it out"):
        predict_paths(graded["head"], [grades], out=tmp_path / "out.csv", weights=weights, threshold=0.5)
    assert not (tmp_path / "out.csv").exists()


def test_the_command_says_how_many_patches_are_of_each_class(graded, grades, weights, tmp_path, capsys):
    out = tmp_path / "out.csv"
    arguments = [graded["head"], grades, "--out", out, "--weights", weights, "--by", "group"]
    predict_app([str(one) for one in arguments], standalone_mode=False)
    said = " ".join(capsys.readouterr().err.split())
    predicted = [row["predicted"] for row in rows_of(out)]
    for name in GRADES:
        assert (f"{predicted.count(name)} {name}" in said) == (name in predicted)
    assert "12 groups, with the share of each class" in said


def test_folders_files_and_hdf5_are_read_alike(runs, table, weights, tmp_path):
    nested = tmp_path / "new" / "a" / "b"
    nested.mkdir(parents=True)
    for name in ("10.png", "9.png"):
        (nested / name).write_bytes((table.parent / name.zfill(6)).read_bytes())
    (tmp_path / "new" / "notes.txt").write_text("not a patch")
    with h5py.File(tmp_path / "new.h5", "w") as file:
        file["x"] = np.stack([np.asarray(Image.open(nested / "9.png"))])
    paths = [tmp_path / "new", nested / "9.png", tmp_path / "new.h5"]
    predict_paths(runs["lora"], paths, out=tmp_path / "out.csv", weights=weights)
    rows = rows_of(tmp_path / "out.csv")
    assert [row["id"] for row in rows] == ["a/b/9.png", "a/b/10.png", "9.png", "0"]
    assert rows[0]["probability"] == rows[2]["probability"] == rows[3]["probability"]


def test_a_threshold_of_ones_own(runs, table, weights, tmp_path):
    summary = predict_paths(runs["head"], [table], out=tmp_path / "out.csv", weights=weights, threshold=0.0)
    assert summary["n_positive"] == N
    assert {row["predicted"] for row in rows_of(tmp_path / "out.csv")} == {"Atypical"}


@pytest.mark.parametrize("threshold", [50, -0.1, float("nan"), float("inf")])
def test_a_threshold_that_is_no_probability_is_refused_before_the_run_is_read(threshold, tmp_path):
    with pytest.raises(UserError, match=r"is no probability: expected a number from 0 to 1"):
        predict_paths(tmp_path / "none", [tmp_path], out=tmp_path / "out.csv", threshold=threshold)


def test_other_weights_are_refused_by_name(runs, table, tmp_path):
    torch.manual_seed(1)
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), other)
    with pytest.raises(UserError, match=r"cannot be reproduced here:\n  weights_sha256: the run had"):
        predict_paths(runs["lora"], [table], out=tmp_path / "out.csv", weights=other)
    assert not (tmp_path / "out.csv").exists()


def altered(run: Path, to: Path, **parts) -> Path:
    """A copy of a run whose record says something else, and has no digests, as those of older versions."""
    shutil.copytree(run, to)
    record = json.loads((to / "run.json").read_text())
    record["embedding"] |= parts
    del record["sha256"]
    (to / "run.json").write_text(json.dumps(record))
    return to


def test_another_transform_is_refused_by_name(runs, table, weights, tmp_path):
    transform = json.loads((runs["lora"] / "run.json").read_text())["embedding"]["transform"]
    run = altered(runs["lora"], tmp_path / "run", transform=transform | {"resize": 999})
    with pytest.raises(UserError, match=r"transform\.resize: the run had 999, found"):
        predict_paths(run, [table], out=tmp_path / "out.csv", weights=weights)


def test_half_precision_needs_a_gpu(runs, table, weights, tmp_path):
    run = altered(runs["probe"], tmp_path / "run", precision="fp16")
    with pytest.raises(UserError, match="fp16, which needs a GPU"):
        predict_paths(run, [table], out=tmp_path / "out.csv", weights=weights, device="cpu")


def test_a_run_from_another_device_is_used_with_a_note(runs, table, weights, tmp_path, capsys):
    run = altered(runs["head"], tmp_path / "run", device="cuda")
    predict_paths(run, [table], out=tmp_path / "out.csv", weights=weights, device="cpu")
    assert "computed on cuda, this is cpu" in capsys.readouterr().err


def test_imported_embeddings_are_refused(runs, table, weights, tmp_path):
    run = altered(runs["probe"], tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["embedding"] = {"source": "theirs.npz"}
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="imported embeddings"):
        predict_paths(run, [table], out=tmp_path / "out.csv", weights=weights)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_adapter_is_named(damage, runs, table, weights, tmp_path):
    run = altered(runs["lora"], tmp_path / "run")
    path = run / "fold-1" / "adapter_model.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"fold-1/adapter_model\.safetensors: (no such file|not a whole)"):
        predict_paths(run, [table], out=tmp_path / "out.csv", weights=weights)


@pytest.mark.parametrize("kind", ["probe", "lora", "head"])
def test_any_flipped_bit_of_the_weights_is_refused_by_name(kind, runs, table, weights, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[kind], run)
    paths = [path for path in run.rglob("*") if path.suffix == ".safetensors" or "fold-" in str(path.parent)]
    for path in paths:
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(UserError, match=rf"{path.name} is not the file that the run wrote"):
            predict_paths(run, [table], out=tmp_path / "out.csv", weights=weights)
        path.write_bytes(whole)
    assert paths


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    with pytest.raises(UserError, match="fm-finetune --resume"):
        predict_paths(tmp_path, [tmp_path], out=tmp_path / "out.csv")


class TestNewPatches:
    def test_a_folder_without_images(self, tmp_path):
        (tmp_path / "a.txt").write_text("")
        with pytest.raises(UserError, match="holds no images"):
            load_patches(tmp_path)

    def test_a_path_that_is_not_there(self, tmp_path):
        with pytest.raises(UserError, match=r"is not there\. Expected an image"):
            load_patches(tmp_path / "nothing.png")

    def test_a_csv_of_missing_files(self, tmp_path):
        (tmp_path / "t.csv").write_text("path\na.png\n")
        with pytest.raises(UserError, match=r"does not exist in 1 of 1 rows \(line 2: a.png\)"):
            load_patches(tmp_path / "t.csv")

    def test_an_empty_csv(self, tmp_path):
        (tmp_path / "t.csv").write_text("path\n")
        with pytest.raises(UserError, match="no rows"):
            load_patches(tmp_path / "t.csv")

    def test_a_broken_image(self, tmp_path):
        (tmp_path / "a.png").write_text("no image")
        with pytest.raises(UserError, match=r"a\.png"):
            load_patches(tmp_path)

    def test_hdf5_of_another_shape(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["x"] = np.zeros((2, 5, 8, 8), np.uint8)
        with pytest.raises(UserError, match="expected uint8 of shape"):
            load_patches(tmp_path / "x.h5")


def test_a_run_keeps_its_statistics_and_what_its_classes_mean(table, weights, tmp_path):
    """The paper's recipe normalises by ImageNet's statistics, which are not this model's; Normal counts as positive."""
    options = FinetuneOptions(
        model=MODEL,
        train=str(table),
        method="head",
        recipe="paper",
        positive="Normal",
        cv=2,
        epochs=3,
        learning_rate=1e-2,
        precision="fp32",
    )
    run = finetune(options, compute_options=ComputeOptions(weights=weights), runs=tmp_path / "runs").folder
    summary = predict_paths(run, [table], out=tmp_path / "out.csv", weights=weights)
    assert summary["label_names"] == ["Atypical", "Normal"]
    own = read_predictions(run)
    tested = own.select(own.split == "test")
    written = {row["id"]: row for row in rows_of(tmp_path / "out.csv")}
    probabilities = tested.probability[:, 1]
    for id, fold, label, probability in zip(tested.id, tested.fold, tested.label, probabilities, strict=True):
        assert label == 1 - int(id.removesuffix(".png")) % 2
        assert float(written[id][f"fold_{fold}"]) == pytest.approx(probability, abs=2e-4)
    for row in written.values():
        mean = np.mean([float(row[f"fold_{fold}"]) for fold in range(2)])
        assert float(row["probability"]) == pytest.approx(mean, abs=2e-6)  # numbers of six digits
        if abs(mean - summary["threshold"]) > 1e-5:
            assert row["predicted"] == ("Normal" if mean >= summary["threshold"] else "Atypical")
    assert {row["predicted"] for row in written.values()} == {"Normal", "Atypical"}


@pytest.mark.parametrize("kind", ["probe", "lora", "full", "head"])
def test_the_threshold_is_the_best_on_out_of_fold_predictions(kind, runs):
    predictions = read_predictions(runs[kind])
    own = predictions.select(predictions.split == "validation")
    probability = own.probability[:, 1]
    assert len(own.label) == 36

    def balanced(threshold: float) -> float:
        predicted = probability >= threshold
        return float(np.mean([(predicted == own.label)[own.label == value].mean() for value in (0, 1)]))

    threshold = read_run(runs[kind]).figures.threshold
    values = np.unique(probability)
    every = [values[0], *((values[1:] + values[:-1]) / 2), 1.0]
    assert balanced(threshold) == pytest.approx(max(map(balanced, every)))
    # The same cut: no out-of-fold prediction lies between the threshold and the nearest that was tried.
    assert min(abs(threshold - each) for each in every) < 1e-6


def test_a_probability_at_the_threshold_is_positive_one_below_it_is_not(runs, table, weights, tmp_path):
    run = altered(runs["head"], tmp_path / "run")
    for path in run.glob("fold-*/head.safetensors"):
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)
    for threshold, n_positive, name in ((0.5, N, "Atypical"), (float(np.nextafter(0.5, 1)), 0, "Normal")):
        summary = predict_paths(run, [table], out=tmp_path / "out.csv", weights=weights, threshold=threshold)
        rows = rows_of(tmp_path / "out.csv")
        assert {(row["probability"], row["spread"], row["predicted"]) for row in rows} == {
            ("0.500000", "0.000000", name)
        }
        assert summary["n_positive"] == n_positive


def test_folds_are_joined_by_their_mean_probability_in_rows_and_in_the_summary(runs, table, weights, tmp_path):
    predict_paths(runs["lora"], [table], out=tmp_path / "out.csv", weights=weights)
    folds = np.array([[float(row[f"fold_{fold}"]) for fold in range(3)] for row in rows_of(tmp_path / "out.csv")])
    mean, median = folds.mean(axis=1), np.median(folds, axis=1)
    logits = np.log(folds / (1 - folds)).mean(axis=1)
    # A threshold between a mean and another average, far from every mean.
    halfway = np.concatenate([(mean + median) / 2, (mean + 1 / (1 + np.exp(-logits))) / 2])
    cuts = [cut for cut in halfway if np.abs(mean - cut).min() > 1e-5]
    for average in (median, 1 / (1 + np.exp(-logits))):
        cut = max(cuts, key=lambda cut, average=average: abs((mean >= cut).sum() - (average >= cut).sum()))
        assert (mean >= cut).sum() != (average >= cut).sum(), "this example must tell averages apart"
        summary = predict_paths(runs["lora"], [table], out=tmp_path / "out.csv", weights=weights, threshold=float(cut))
        predicted = np.array([row["predicted"] == "Atypical" for row in rows_of(tmp_path / "out.csv")])
        np.testing.assert_array_equal(predicted, mean >= cut)
        assert summary["n_positive"] == predicted.sum()


@pytest.mark.parametrize("out", ["in.csv", "0.png", "run/run.json", "new.png"])
def test_nothing_that_predictions_are_made_from_is_replaced(tmp_path, out):
    for name in ("in.csv", "0.png", "run/run.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("kept")
    with pytest.raises(UserError, match="is an image, one of the inputs, or part of the run"):
        predict_paths(tmp_path / "run", [tmp_path / "in.csv", tmp_path / "0.png"], out=tmp_path / out)
    assert (tmp_path / "in.csv").read_text() == (tmp_path / "run" / "run.json").read_text() == "kept"


# --- several runs together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["equal", "out-of-fold"])
def test_runs_predict_together_what_the_report_says_of_their_ensemble(how, runs, table, weights, tmp_path):
    chosen = [runs["probe"], runs["head"], runs["lora"]]
    out = tmp_path / "out.csv"
    summary = predict_paths(chosen, [table], out=out, weights=weights, ensemble_weights=how, by="group")
    _, _, read = make_report(tmp_path, named=chosen, ensemble=("all",), ensemble_weights=how, resampling=QUICK)
    ensemble = read[-1]
    ids = [read_run(run).id for run in chosen]
    assert summary["runs"] == ids
    share = {part.model: 1 / 3 if part.weight is None else part.weight for part in ensemble.record.parts}
    assert summary["weights"] == pytest.approx([share[id] for id in ids], abs=1e-6)
    if how == "out-of-fold":
        assert max(abs(one - 1 / 3) for one in summary["weights"]) > 0.01, "this example must have other weights"
    judged = ensemble_of(ensemble.predictions, "patches", "test")
    assert summary["threshold"] == pytest.approx(judged.threshold, abs=1e-6)
    written = {row["id"]: row for row in rows_of(out)}
    assert list(rows_of(out)[0]) == ["source", "id", "probability", "predicted", "spread", *ids]
    for id, probability in zip(judged.id.tolist(), judged.probability[:, 1], strict=True):
        row = written[id]
        assert float(row["probability"]) == pytest.approx(probability, abs=2e-4)
        each = [float(row[name]) for name in ids]
        assert float(row["probability"]) == pytest.approx(np.average(each, weights=summary["weights"]), abs=2e-6)
        assert float(row["spread"]) == pytest.approx(np.std(each), abs=2e-6)
    errors = error_rates(ensemble_of(ensemble.predictions, "patches", "validation"), threshold=summary["threshold"])
    assert summary["by_group"]["sensitivity"]["value"] == pytest.approx(errors.sensitivity.value)


def test_classes_of_several_runs_are_aligned_by_name(runs, table, weights, tmp_path, capsys):
    record = json.loads((runs["head"] / "run.json").read_text())
    turned = altered(runs["head"], tmp_path / "turned")
    edit = json.loads((turned / "run.json").read_text()) | {
        "label_names": record["label_names"][::-1],
        "id": "turned",
    }
    (turned / "run.json").write_text(json.dumps(edit))
    arguments = [runs["head"], turned, table, "--out", tmp_path / "out.csv", "--weights", weights]
    predict_app([str(one) for one in arguments], standalone_mode=False)
    rows = rows_of(tmp_path / "out.csv")
    columns = list(rows[0])[5:]
    assert columns == [record["id"], "turned"]
    for row in rows:
        assert float(row[columns[0]]) == pytest.approx(1 - float(row[columns[1]]), abs=2e-6)
        assert float(row["probability"]) == pytest.approx(0.5, abs=1e-6)
    said = " ".join(capsys.readouterr().err.split())
    assert "differ in training set, folds or classes" in said
    assert "6 fold models of 2 runs, weights 0.500, 0.500" in said
    for asked, message in (({"ensemble_weights": "out-of-fold"}, "Use equal"), ({"by": "group"}, "one of them")):
        with pytest.raises(UserError, match=message):
            predict_paths([runs["head"], turned], [table], out=tmp_path / "out.csv", weights=weights, **asked)
    with pytest.raises(UserError, match="name each run once"):
        predict_paths([runs["head"], runs["head"]], [table], out=tmp_path / "out.csv", weights=weights)
    edit["label_names"] = ["Normal", "Mitosis"]
    (turned / "run.json").write_text(json.dumps(edit))
    with pytest.raises(UserError, match=r"tells Normal, Mitosis apart, the first run Normal, Atypical"):
        predict_paths([runs["head"], turned], [table], out=tmp_path / "out.csv", weights=weights)


@pytest.mark.parametrize("how", ["mean", "concatenation"])
def test_a_combination_of_views_repeats_its_own_test_predictions(how, table, weights, tmp_path, monkeypatch):
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    options = ExtractOptions(precision="fp32", views=(VIEW, "center16@32"))
    extract_dataset(load_dataset(str(table)), [find_backbone(MODEL)], store=store, options=options, weights=weights)
    monkeypatch.setattr(candidates, "validation_auroc", lambda fitted: fitted.record.combined == how)
    *_, run = probe_store(store, options=ProbeOptions(cv=3, combine=True), runs=tmp_path)
    assert run.combined == how
    embeddings = {(part.view, part.pooling) for part in run.parts}
    assert len(embeddings) == len(run.parts)
    predict_paths(run.folder, [table], out=tmp_path / "out.csv", weights=weights)
    written = {row["id"]: row for row in rows_of(tmp_path / "out.csv")}
    own = read_predictions(run.folder)
    tested = own.select(own.split == "test")
    assert len(tested) == 36
    for id, fold, probability in zip(tested.id, tested.fold, tested.probability[:, 1], strict=True):
        assert float(written[id][f"fold_{fold}"]) == pytest.approx(probability, abs=2e-4)


# --- folds by domain --------------------------------------------------------------------------------------------------


def test_a_training_holds_domains_out_in_turn(table, weights, tmp_path):
    rows = rows_of(table)
    with (tmp_path / "patches.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "scanner"])
        writer.writerows(
            [table.parent / r["path"], r["label"], r["group"], "AB"[int(r["group"][1:]) > 4]] for r in rows
        )
    options = FinetuneOptions(model=MODEL, train=str(tmp_path / "patches.csv"), view=VIEW, cv=5, folds_by="domain")
    setup = prepare(options, ComputeOptions(weights=weights))
    assert (setup.experiment.folds.names, setup.experiment.folds.sizes) == (("A", "B"), [20, 28])
    assert (setup.options.cv, len(setup.fold_models)) == (2, 2)
    assert setup.identity()["options"]["folds_by"] == "domain"
    with pytest.raises(UserError, match="`folds_by=group`: expected domain"):
        finetune_app(
            ["--train", str(tmp_path / "patches.csv"), "--model", MODEL, "--view", VIEW, "--folds-by", "group"],
            standalone_mode=False,
        )


# --- by group ---------------------------------------------------------------------------------------------------------


def test_every_slide_has_its_rate_as_predicted_and_as_corrected_by_out_of_fold_errors(runs, table, weights, tmp_path):
    out = tmp_path / "new.csv"
    summary = predict_paths(runs["head"], [table], out=out, weights=weights, by="group")
    rows, slides = rows_of(out), rows_of(tmp_path / "new-by-group.csv")
    assert [row["group"] for row in slides] == [f"s{k}" for k in range(12)]
    own = read_predictions(runs["head"])
    own = own.select(own.split == "validation")
    hit = (own.probability[:, 1] >= summary["threshold"]) == (own.label == 1)
    sensitivity, specificity = hit[own.label == 1].mean(), hit[own.label == 0].mean()
    found = summary["by_group"]
    assert found["sensitivity"]["value"] == pytest.approx(sensitivity)
    assert found["specificity"]["value"] == pytest.approx(specificity)
    assert (found["out"], found["n_without"], len(found["groups"])) == (str(tmp_path / "new-by-group.csv"), 0, 12)
    for k, row in enumerate(slides):
        predicted = [one["predicted"] == "Atypical" for one in rows[4 * k : 4 * k + 4]]
        assert (row["source"], row["n"], row["n_positive"]) == (str(table), "4", str(sum(predicted)))
        assert float(row["rate"]) == sum(predicted) / 4
        assert float(row["low"]) <= float(row["rate"]) <= float(row["high"])
        if sensitivity + specificity > 1:
            share = np.clip((sum(predicted) / 4 + specificity - 1) / (sensitivity + specificity - 1), 0, 1)
            assert float(row["corrected"]) == pytest.approx(share, abs=1e-6)
            assert float(row["corrected_low"]) <= share + 1e-6


def test_errors_are_those_at_the_threshold_that_is_used(runs, table, weights, tmp_path):
    out = tmp_path / "new.csv"
    found = predict_paths(runs["head"], [table], out=out, weights=weights, threshold=0.0, by="group")["by_group"]
    assert (found["sensitivity"]["value"], found["specificity"]["value"]) == (1, 0)
    assert {row["rate"] for row in rows_of(tmp_path / "new-by-group.csv")} == {"1.000000"}
    assert {row["corrected"] for row in rows_of(tmp_path / "new-by-group.csv")} == {""}  # all are called positive
    assert found["groups"][0]["corrected"] is None


class TestGroups:
    """Where the group of a new patch comes from. A rate by wrong groups would be worse than none."""

    def patch(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
        return path

    def of(self, path: Path) -> list[str]:
        return groups_of(load_patches(path, grouped=True), path)

    def test_from_a_column_under_any_of_its_names(self, tmp_path):
        for name in "abc":
            self.patch(tmp_path / f"{name}.png")
        for column in ("group", "Slide ID", "patient"):
            (tmp_path / "t.csv").write_text(f"path,{column}\na.png,s1\nb.png,NA\nc.png,s2\n")
            assert self.of(tmp_path / "t.csv") == ["s1", "", "s2"]

    def test_from_the_folder_of_its_slide(self, tmp_path):
        for name in ("s1/a.png", "s1/b.png", "centre/s2/a.png"):
            self.patch(tmp_path / "new" / name)
        assert self.of(tmp_path / "new") == ["centre/s2", "s1", "s1"]

    def test_from_arrays(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["x"] = np.zeros((3, 8, 8, 3), np.uint8)
            file["group"] = np.array([b"s1", b"s2", b"s1"])
        assert self.of(tmp_path / "x.h5") == ["s1", "s2", "s1"]

    def test_from_nowhere(self, tmp_path):
        for name in ("s1/a.png", "b.png"):
            self.patch(tmp_path / "new" / name)
        with pytest.raises(UserError, match=r"1 images \(first: b.png\) lie in no folder of their slide"):
            self.of(tmp_path / "new")
        (tmp_path / "t.csv").write_text("path\nnew/b.png\n")
        for path in (tmp_path / "t.csv", tmp_path / "new" / "b.png"):
            with pytest.raises(UserError, match=r"the groups \(slides\) of its patches are not known. Give a table"):
                self.of(path)

    def test_by_anything_else(self, tmp_path):
        with pytest.raises(UserError, match=r"`by=slide`: expected group"):
            predict_paths(tmp_path, [tmp_path], out=tmp_path / "out.csv", by="slide")

    def test_a_slide_of_one_name_in_two_sources_is_two(self):
        errors = error_rates(patches([0, 1, 0, 1], [0.1, 0.9, 0.2, 0.6]))
        names, values = [["s", "", "s"], ["s"]], [np.array([0.9, 0.9, 0.1]), np.array([0.5])]
        predicted = [(of_source >= 0.5).astype(np.int8) for of_source in values]
        found = group_rates(count_groups(["a", "b"], names, predicted, n_classes=2), errors)
        assert [(one.source, one.group, one.n, one.n_positive) for one in found] == [("a", "s", 2, 1), ("b", "s", 1, 1)]
