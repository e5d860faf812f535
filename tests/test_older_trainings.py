"""Does a training that an earlier version began end with the recipe that it began with?"""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_checkpoint import Killed as StoppedTraining
from test_checkpoint import compute_options, material, options, outcome, remembering, run_folder  # noqa: F401

from finetune import recipes
from finetune.checkpoint import START_FILE, read_start, write_start
from finetune.options import FinetuneOptions
from finetune.predict import predict_paths
from finetune.run import finetune, resume
from probe.runs import read_predictions, read_run

# `paper` before views said how images are normalised, and before its plateau knew torch's threshold.
BEFORE = replace(recipes.RECIPES["paper"], view="full@32", statistics="imagenet", plateau_threshold=0.0, batch_size=3)


def test_an_interrupted_training_of_an_older_recipe_ends_with_that_recipe(
    material: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    chosen = options(material, "head", recipe="paper", view=None, batch_size=None)
    computing = compute_options(material, "head")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(recipes.RECIPES, "paper", BEFORE)
        expected = outcome(run_folder(finetune(chosen, compute_options=computing, runs=tmp_path / "whole")))
        remembering(patched, kill_after=1)
        with pytest.raises(StoppedTraining):
            finetune(chosen, compute_options=computing, runs=tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    start = read_start(folder)
    # As that version wrote it, which refuses options that it does not know.
    assert not {"classes", "ordinal", "soft_labels", "folds_by"} & start["identity"]["options"].keys()
    del start["identity"]["recipe"]["plateau_threshold"]  # which no record had
    write_start(tmp_path / "start", start)
    shutil.copy(tmp_path / "start" / START_FILE, folder / START_FILE)

    run_folder(resume(folder))
    assert outcome(folder) == expected
    record = read_run(folder)
    assert record.recipe == json.loads(json.dumps(expected["recipe"]))
    assert (record.view, record.statistics) == ("full@32", "imagenet")
    assert record.embedding["transform"]["mean"] == [0.485, 0.456, 0.406]

    predict_paths(folder, [material / "patches.csv"], out=tmp_path / "out.csv", device="cpu", weights=computing.weights)
    own = read_predictions(folder)
    tested = own.select(own.split == "test")
    written = {row["id"]: row for row in csv.DictReader((tmp_path / "out.csv").read_text().splitlines())}
    assert len(tested.id)
    for id, fold, probability in zip(tested.id, tested.fold, tested.probability[:, 1], strict=True):
        assert float(written[id][f"fold_{fold}"]) == pytest.approx(probability, abs=2e-4)


def test_options_of_more_than_two_classes_are_recorded_where_they_say_something() -> None:
    chosen = FinetuneOptions(classes=("low", "middle", "high"), ordinal=True, soft_labels="votes", test=("demo",))
    record = json.loads(json.dumps(chosen.as_record()))
    assert (record["classes"], record["ordinal"], record["soft_labels"]) == (["low", "middle", "high"], True, "votes")
    assert FinetuneOptions.from_record(record) == chosen
    plain = FinetuneOptions()
    assert FinetuneOptions.from_record(json.loads(json.dumps(plain.as_record()))) == plain
    assert FinetuneOptions(test=()).as_record()["test"] == ()
