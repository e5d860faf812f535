"""Do seeds decide training and fold seeds the folds, and are several trainings in one run those of as many runs?"""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_checkpoint import (  # noqa: F401 - `material` is a fixture
    Killed,
    compute_options,
    material,
    options,
    remembering,
    run_folder,
)
from test_probe import add, table

from features.console import UserError
from features.folds import fold_models, grouped_folds
from features.samples import make_samples
from features.store import FeatureStore
from finetune.checkpoint import read_start
from finetune.options import ComputeOptions, FinetuneOptions
from finetune.plan import make_plan
from finetune.predict import predict_paths
from finetune.run import finetune, resume
from probe.commands import commands
from probe.ensembles import ensemble_of
from probe.evidence import evaluate, fold_figures
from probe.experiment import FoldLogits, make_experiment
from probe.metrics import best_threshold, scores
from probe.predictions import (
    Predictions,
    by_training,
    concatenate,
    parse_predictions,
    predictions_csv,
    threshold_of,
    thresholds_of,
)
from probe.probing import ProbeOptions, probe_store
from probe.records import RunRecord
from probe.report.read import labels_of
from probe.report.terminal import leaderboard, training_table
from probe.runs import check_weights, read_predictions, read_run, read_weights

SEEDS = (42, 43)
EPOCHS = 2


def of_seed(predictions: Predictions, seed: int) -> Predictions:
    return predictions.select(np.flatnonzero(predictions.seed == seed))


def assert_same(found: Predictions, expected: Predictions) -> None:
    for column in ("dataset", "id", "label", "group", "split", "fold", "seed"):
        assert getattr(found, column).tolist() == getattr(expected, column).tolist()
    # The same passes, one model at a time; sums over rows of a matrix may be formed in another order.
    np.testing.assert_allclose(found.logit, expected.logit, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request, material, tmp_path_factory):  # noqa: F811
    """Two trainings in one run, and each of them in a run of its own."""

    def run_of(seed: int, seeds: int) -> Path:
        return run_folder(
            finetune(
                options(material, request.param, epochs=EPOCHS, seed=seed, seeds=seeds),
                compute_options=compute_options(material, request.param),
                runs=tmp_path_factory.mktemp("runs"),
            )
        )

    return SimpleNamespace(
        method=request.param, together=run_of(42, 2), alone={seed: run_of(seed, 1) for seed in SEEDS}
    )


def test_trainings_in_one_run_are_those_of_separate_runs(trained):
    together, predictions = read_run(trained.together), read_predictions(trained.together)
    n_folds = together.folds.n
    for k, seed in enumerate(SEEDS):
        own = read_run(trained.alone[seed])
        assert_same(of_seed(predictions, seed), read_predictions(trained.alone[seed]))
        assert together.best_epoch[k * n_folds :][:n_folds] == own.best_epoch
        histories = together.history[k * n_folds :][:n_folds]
        assert [asdict(epoch) for history in histories for epoch in history] == [
            pytest.approx(asdict(epoch), rel=1e-5) for history in own.history for epoch in history
        ]
    first, second = (of_seed(predictions, seed).logit for seed in SEEDS)
    assert np.abs(first - second).max() > 1e-3, "another seed must train otherwise"
    assert together.cost.training_images == sum(read_run(run).cost.training_images for run in trained.alone.values())


def test_a_run_of_several_seeds_says_so_and_older_versions_refuse_it(trained):
    raw = json.loads((trained.together / "run.json").read_text())
    assert (raw["format"], raw["seeds"]) == (2, [42, 43])
    raw = json.loads((trained.alone[43] / "run.json").read_text())
    assert (raw["format"], raw["seeds"]) == (1, [43])
    folders = {path.parent.relative_to(trained.together).as_posix() for path in trained.together.rglob("*.safetensors")}
    assert folders == {f"seed-{seed}/fold-{fold}" for seed in SEEDS for fold in range(2)}
    assert {path.parent.name for path in trained.alone[43].rglob("*.safetensors")} == {"fold-0", "fold-1"}


def test_every_file_of_weights_is_checked(trained, tmp_path):
    record = read_run(trained.together)
    check_weights(trained.together, record)
    path = next(trained.together.glob("seed-43/fold-1/*.safetensors"))
    assert path.relative_to(trained.together).as_posix() in record.sha256
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(UserError, match="is not the file that the run wrote"):
            check_weights(trained.together, record)
    finally:
        path.write_bytes(whole)


def test_new_patches_are_predicted_by_all_models(trained, material, tmp_path):  # noqa: F811
    weights = compute_options(material, trained.method).weights
    summary = predict_paths(trained.together, [material / "15.png"], out=tmp_path / "out.csv", weights=weights)
    assert (summary["n_folds"], summary["n_models"]) == (2, 4)
    (row,) = csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    own = read_predictions(trained.together)
    own = own.select(np.flatnonzero(own.id == "15.png"))
    expected = {f"seed_{s}_fold_{f}": p for s, f, p in zip(own.seed, own.fold, own.probability[:, 1], strict=True)}
    assert [name for name in row if name.startswith("seed")] == [f"seed_{s}_fold_{f}" for s in SEEDS for f in (0, 1)]
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected, abs=2e-5)
    assert float(row["probability"]) == pytest.approx(np.mean(list(expected.values())), abs=2e-5)


def killed(begun: FinetuneOptions, material: Path, runs: Path, *, after: int) -> Path:  # noqa: F811
    """The folder of a training that ends after so many epochs."""
    with pytest.MonkeyPatch.context() as patched:
        remembering(patched, kill_after=after)
        with pytest.raises(Killed):
            finetune(begun, compute_options=compute_options(material, begun.method), runs=runs)
    (folder,) = runs.iterdir()
    return folder


def test_a_training_of_several_seeds_goes_on_after_it_was_killed(trained, material, tmp_path):  # noqa: F811
    """In the third network of a full training, which is of the second seed, and between two epochs of LoRA."""
    begun = options(material, trained.method, epochs=EPOCHS, seeds=2)
    folder = killed(begun, material, tmp_path, after=1 if trained.method == "lora" else 5)
    assert run_folder(resume(folder)) == folder
    assert_same(read_predictions(folder), read_predictions(trained.together))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == set(read_run(folder).sha256)


def test_a_training_begun_by_an_early_version_goes_on(material, tmp_path):  # noqa: F811
    """Its options name one seed, which drew the folds too."""
    begun = options(material, "lora", epochs=EPOCHS, seed=7, fold_seed=7)
    folder = killed(begun, material, tmp_path, after=1)
    early = read_start(folder)
    for name in ("seeds", "fold_seed"):
        del early["identity"]["options"][name]
    (folder / "training.json").write_text(json.dumps(early))
    record = read_run(run_folder(resume(folder)))
    assert (record.seeds, record.folds.seed) == ((7,), 7)


def test_the_plan_counts_the_rows_of_all_seeds(material):  # noqa: F811
    device = ComputeOptions(device="cpu", folds_at_once=3)
    one, two = (make_plan(options(material, "lora", seeds=seeds), device) for seeds in (1, 2))
    assert (two.n_folds, two.n_seeds, one.folds_at_once, two.folds_at_once) == (2, 2, 2, 3)
    assert two.rows_mb == pytest.approx(2 * one.rows_mb)
    assert two.kept_mb == pytest.approx(1.5 * one.kept_mb)  # three members in a pass instead of two
    assert two.weights_mb == one.weights_mb


def test_the_terminal_lists_every_model(trained):
    together, alone = read_run(trained.together), read_run(trained.alone[43])
    assert [column.header for column in training_table(together).columns][:2] == ["Seed", "Fold"]
    assert list(training_table(together).columns[0].cells) == ["42", "42", "43", "43"]
    assert training_table(alone).columns[0].header == "Fold"
    assert leaderboard([together]).title.startswith("Mean ± std over 4 fold models (2 seeds x 2 folds)")
    assert leaderboard([alone]).title.startswith("Mean ± std over fold models;")


def test_a_run_is_named_by_how_its_seeds_differ_and_made_again_by_its_command(trained):
    labels = labels_of([read_run(trained.together), read_run(trained.alone[42]), read_run(trained.alone[43])])
    assert ["seeds=2" in label for label in labels] == [True, False, False]
    assert ["seed=43" in label for label in labels] == [False, False, True]
    (command,) = commands(read_run(trained.together))
    assert "--seed 42 --seeds 2 --fold-seed 42" in command


# --------------------------------------------------------------------------------------------------------------- probes


@pytest.fixture
def probed(tmp_path):
    """A function that probes a small store of one dataset."""
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    add(store, "mine", table(n=64), "m", "full", signal=0.3)

    def probe(**chosen: object) -> RunRecord:
        (run,) = probe_store(store, options=ProbeOptions(cv=3, view="full", pooling="card", **chosen), runs=tmp_path)
        return run

    return probe


def test_the_papers_probe_is_trained_once_per_seed(probed):
    together, first, second = probed(recipe="paper", seeds=2), probed(recipe="paper"), probed(recipe="paper", seed=43)
    assert [run.seeds for run in (together, first, second)] == [(42, 43), (42,), (43,)]
    predictions, weights = read_predictions(together.folder), read_weights(together.folder)
    for k, alone in enumerate((first, second)):
        own = slice(3 * k, 3 * k + 3)
        assert_same(of_seed(predictions, 42 + k), read_predictions(alone.folder))
        for name, array in read_weights(alone.folder).items():
            np.testing.assert_array_equal(weights[name][own], array)
        assert together.candidates[0].best_epoch[own] == alone.candidates[0].best_epoch
    aurocs = [run.candidates[0].validation_auroc for run in (together, first, second)]
    assert aurocs[1] != aurocs[2]
    assert aurocs[0] == pytest.approx(np.mean(aurocs[1:]))
    assert read_run(together.folder).seeds == (42, 43)
    assert "6 fold models" in leaderboard([together]).title


def test_the_seed_decides_training_alone_and_the_fold_seed_the_folds(probed):
    runs = {chosen: probed(recipe="paper", seed=chosen[0], fold_seed=chosen[1]) for chosen in ((1, 1), (2, 1), (1, 4))}
    plain, other_seed, other_folds = runs.values()
    assert plain.folds == other_seed.folds
    assert plain.folds.digest != other_folds.folds.digest
    assert (other_folds.folds.seed, other_folds.seeds) == (4, (1,))
    assert not np.array_equal(*(read_weights(run.folder)["coef"] for run in (plain, other_seed)))
    exact = [read_weights(probed(seed=seed).folder)["coef"] for seed in (1, 2)]
    np.testing.assert_array_equal(*exact)


def test_the_exact_probe_has_no_seeds_to_repeat(probed):
    with pytest.raises(UserError, match=r"`seeds=2`.*same probe.*`recipe='paper'`"):
        probed(seeds=2)


# ---------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "`seeds=0`: expected how many times to train, at least 1"),
        ({"seed": 2**32 - 1, "seeds": 2}, r"with `seeds=2` at most 2\^32 - 2"),
        ({"seed": -1}, r"seed -1: expected a whole number from 0 to 2\^32 - 1\."),
        ({"fold_seed": 2**32}, "seed 4294967296: expected"),
        ({"cv": 100, "seeds": 6}, "100 folds with 6 seeds: at most 500 models"),
    ],
)
def test_seeds_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        FinetuneOptions(**options)
    FinetuneOptions(seed=2**32 - 2, seeds=2)


def test_fold_seeds_reach_the_folds_of_both_commands():
    samples = table(n=64)
    for seed in (1, 2):
        made = make_experiment("mine", {"mine": samples}, cv=3, fold_seed=seed)
        assert made.folds_record().seed == seed
        assert made.folds.digest == grouped_folds(samples.select(made.rows), 3, seed=seed).digest
    with pytest.raises(UserError, match="`fold_seed=42`; `seed` may be any"):
        make_experiment("ami-br", {"ami-br": samples}, fold_seed=1, paper_folds=True)


# ---------------------------------------------------------------------------------------------------------- predictions


def judged(n_seeds: int = 3) -> Predictions:
    """Twelve training patches in two folds and four test patches in another order, each under all models."""
    samples = make_samples(
        [f"{k}.png" for k in (9, 3, 0, 1, 2, 4, 5, 6, 7, 8, 10, 11)],
        [0, 1] * 6,
        sha256=[""] * 12,
        group=[f"slide {k // 2}" for k in range(12)],
    )
    other = make_samples(["d", "b", "c", "a"], [0, 1, 0, 1], sha256=[""] * 4)
    made = make_experiment("mine", {"mine": samples, "other": other}, cv=2)
    rng = np.random.default_rng(0)
    signal = {"mine": samples.label[:, None, None] - 0.5, "other": other.label[:, None, None] - 0.5}
    logits = FoldLogits(
        validation=(rng.normal(size=(12, n_seeds, 1)) + signal["mine"]).astype("f4"),
        tests={"other": (rng.normal(size=(4, 2 * n_seeds, 1)) + signal["other"]).astype("f4")},
        seeds=tuple(range(5, 5 + n_seeds)),
    )
    return made.predictions(logits)


def test_logits_become_rows_of_their_seed_and_fold():
    predictions = judged()
    tested = predictions.select(predictions.split == "test")
    assert list(zip(tested.seed, tested.fold, strict=True))[:6] == [(5, 0), (5, 1), (6, 0), (6, 1), (7, 0), (7, 1)]
    assert tested.id.tolist()[::6] == ["d", "b", "c", "a"]
    held_out = predictions.select(predictions.split == "validation")
    assert held_out.seed.tolist() == [5, 6, 7] * 12
    assert all(len(set(held_out.fold[held_out.id == id])) == 1 for id in held_out.id)


def test_each_training_has_its_ensemble_and_its_threshold_and_the_run_those_of_their_mean():
    predictions = judged()
    seeds, probability = by_training(predictions, "other", "test")
    assert seeds.tolist() == [5, 6, 7]
    for k, seed in enumerate(seeds.tolist()):
        alone = of_seed(predictions, seed)
        own = ensemble_of(alone, "other", "test")
        np.testing.assert_array_equal(probability[k], own.probability)
        assert own.id.tolist() == ["d", "b", "c", "a"]
        assert thresholds_of(predictions)[k] == threshold_of(alone) == own.threshold
    whole = ensemble_of(predictions, "other", "test")
    np.testing.assert_allclose(whole.probability, probability.mean(axis=0), rtol=1e-15)
    out_of_fold = ensemble_of(predictions, "mine", "validation")
    held_out = predictions.probability[predictions.split == "validation"].reshape(12, 3, 2)
    np.testing.assert_allclose(out_of_fold.probability, held_out.mean(axis=1), rtol=1e-15)
    assert whole.threshold == best_threshold(out_of_fold.label, held_out[..., 1].mean(axis=1))
    assert len({*thresholds_of(predictions).tolist(), whole.threshold}) == 4, "these must differ in this example"


def test_figures_of_fold_models_go_seed_by_seed():
    predictions = judged()
    each = fold_figures(predictions, "other", "test")["auroc"].each
    expected = []
    for seed, fold in fold_models((5, 6, 7), 2):
        rows = (predictions.split == "test") & (predictions.seed == seed) & (predictions.fold == fold)
        expected.append(scores(predictions.label[rows], predictions.probability[rows])["auroc"])
    assert each == tuple(expected)
    assert len(set(expected)) > 2
    assert evaluate(predictions).sets["mine/validation"].folds["auroc"].each != each


def test_a_patch_that_one_training_lacks_is_damage():
    predictions = judged(2)
    first = int(np.flatnonzero(predictions.id == "b")[0])
    with pytest.raises(UserError, match="b has 1 fold models, others have 2"):
        ensemble_of(predictions.select(np.delete(np.arange(len(predictions)), first)), "other", "test")
    repeated = concatenate([predictions, predictions.select(np.array([first]))])
    with pytest.raises(UserError, match="a patch occurs twice for one fold"):
        ensemble_of(repeated, "other", "test")


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_predictions_come_back_with_their_seeds(n_seeds):
    predictions = judged(n_seeds)
    text = b"".join(predictions_csv(predictions)).decode()
    assert text.splitlines()[0] == "dataset,id,label,group,split,fold,seed,logit,probability"
    assert_same(parse_predictions(text, seed=99), predictions)


def test_predictions_of_early_versions_are_of_the_only_seed():
    text = b"".join(predictions_csv(judged(1))).decode()
    early = "".join(",".join(line.split(",")[:6] + line.split(",")[7:]) for line in text.splitlines(keepends=True))
    assert early.startswith("dataset,id,label,group,split,fold,logit,probability\n")
    assert set(parse_predictions(early, seed=7).seed.tolist()) == {7}
    assert set(parse_predictions(early).seed.tolist()) == {0}
