"""Which runs stand in one report, what is each called, and are the others refused?"""

from __future__ import annotations

import itertools
import re
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from report_pages import (
    OTHER_FOLDS,
    collected,
    record,
    two_runs,
)
from test_runs import TABLES, edit_record, edit_row, made_run, patches

from features.console import UserError
from probe.report.read import labels_of, read_runs

# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none does not exist\. Expected the folder of all runs; make one with fm-"):
        read_runs(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no finished run\. Make one with fm-probe or fm-finetune"):
        read_runs(tmp_path)
    (tmp_path / ".probe-x.partial").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("no run")
    with pytest.raises(UserError, match="holds no finished run"):
        read_runs(tmp_path)
    (tmp_path / "measures-1").mkdir()
    with pytest.raises(UserError, match=r"holds measures but no finished run\. .*fm-probe, without --measures"):
        read_runs(tmp_path)
    for named in (tmp_path / "notes", tmp_path / "notes.txt", tmp_path / "none"):
        with pytest.raises(UserError, match=r"is not a finished run: run\.json is missing"):
            read_runs(tmp_path, named=[named])


def test_an_unfinished_training_is_named_with_its_remedy(tmp_path):
    training = tmp_path / "finetune-uni-1"
    training.mkdir()
    (training / "training.json").write_text("{}")
    with pytest.raises(UserError, match=rf"no finished run\. finetune-uni-1 has not finished .* --resume {training}"):
        read_runs(tmp_path)
    made_run(tmp_path)
    read, notes = read_runs(tmp_path)
    assert len(read) == 1
    assert notes == [f"finetune-uni-1 has not finished and is left out: fm-finetune --resume {training}"]


@pytest.mark.parametrize("key", ["id", "created", "kind", "model", "method", "train", "view", "options", "folds"])
def test_a_record_without_what_is_needed_is_refused(key, tmp_path):
    folder = made_run(tmp_path)
    edit_record(folder, **{key: None})
    with pytest.raises(
        UserError, match=rf"{folder.name}/run\.json is damaged \(.*\b{key}\b.*\)\. Run the command again"
    ):
        read_runs(tmp_path)


@pytest.mark.parametrize("folds", [{"n": 5}, {"digest": "x"}, {}, "abc", []])
def test_a_record_without_folds_is_refused(folds, tmp_path):
    edit_record(made_run(tmp_path), folds=folds)
    with pytest.raises(UserError, match=r"run\.json is damaged \(.*(field `(n|digest)`|object).*folds"):
        read_runs(tmp_path)


def test_runs_on_other_folds_are_read_too_unless_some_are_asked_for(tmp_path):
    first, second = two_runs(tmp_path)
    third = made_run(tmp_path, "conch", digest=OTHER_FOLDS)
    read, notes = read_runs(tmp_path)
    assert {run.folder for run in read} == {first, second, third}
    assert notes == [
        "These runs were trained on 2 different fold assignments. They are compared on test sets; out of fold, only "
        "with runs on the same folds."
    ]
    read, notes = read_runs(tmp_path, folds="f01d")
    assert {run.folder for run in read} == {first, second}
    assert notes == ["1 run on other folds left out, as --folds asks for."]
    read, notes = read_runs(tmp_path, folds=OTHER_FOLDS)
    assert [run.folder for run in read] == [third]
    assert notes == ["2 runs on other folds left out, as --folds asks for."]
    with pytest.raises(
        UserError, match=r"no run has folds beefbeer\. Did you mean beefbeef\? The runs have .*f01df01d"
    ):
        read_runs(tmp_path, folds="beefbeer")


def test_runs_trained_on_different_datasets_are_refused(tmp_path):
    first, second = two_runs(tmp_path)
    third = made_run(tmp_path, "conch", tables={"mine": patches("mine", 48, test_from=24)}, train="mine")
    edit_record(third, created="2999-01-01T00:00:00Z")  # the last
    with pytest.raises(UserError) as refusal:
        read_runs(tmp_path)
    message = str(refusal.value)
    assert "2 different datasets" in message
    assert "ami-br: 2 runs (" in message
    assert f"mine: 1 run ({third.name})" in message
    assert message.endswith(f"fm-report {first} {second}") or message.endswith(f"fm-report {second} {first}")
    assert {run.folder for run in read_runs(tmp_path, named=[first, second])[0]} == {first, second}


def test_runs_trained_on_different_patches_of_one_dataset_are_noted(tmp_path):
    first, _ = two_runs(tmp_path)
    edit_record(first, table_digests={"ami-br": "another"})
    assert read_runs(tmp_path)[1] == ["These runs were trained on 2 different patch tables of ami-br."]


def test_named_runs_alone_are_read(tmp_path):
    first, second = two_runs(tmp_path)
    read, notes = read_runs(tmp_path / "elsewhere", named=[second])
    assert ([run.folder for run in read], notes) == ([second], [])
    assert len(read_runs(tmp_path, named=[first, first])[0]) == 1


def test_runs_stand_by_date(tmp_path):
    first, second = two_runs(tmp_path)
    edit_record(first, created="2026-02-01T00:00:00Z")
    edit_record(second, created="2026-01-01T00:00:00Z")
    assert [run.folder for run in read_runs(tmp_path)[0]] == [second, first]


def test_a_run_and_its_copy_are_one_run(tmp_path):
    first, _ = two_runs(tmp_path)
    shutil.copytree(first, tmp_path / "copy")
    read, notes = read_runs(tmp_path)
    assert [run.label for run in read] == ["uni probe", "virchow probe"]
    (note,) = notes
    assert "copy" in note
    assert first.name in note


def test_a_run_without_predictions_of_its_own_test_set_is_refused(tmp_path):
    folder = made_run(tmp_path, test=["atnorm-br", "mine"])
    with pytest.raises(UserError, match=r"scored on mine, but its predictions\.csv has only ami-br, atnorm-br") as said:
        read_runs(tmp_path)
    assert str(folder) in str(said.value)


def test_a_changed_file_of_a_run_is_refused_by_name(tmp_path):
    folder = made_run(tmp_path)
    edit_row(folder / "samples.csv", 2, "group", "slide 9")
    with pytest.raises(UserError, match=rf"{folder.name}/samples\.csv is not the file that the run wrote"):
        read_runs(tmp_path)


def test_a_set_that_one_run_lacks_is_a_note(tmp_path):
    made_run(tmp_path, "uni")
    made_run(tmp_path, "virchow", tables={name: TABLES[name] for name in ("ami-br", "atnorm-md")}, seed=1)
    report, _ = collected(tmp_path)
    assert {on.name: on.missing for on in report.sets} == {
        "ami-br/test": (),
        "atnorm-br/test": ("virchow probe",),
        "atnorm-md/test": (),
        "ami-br/validation": (),
    }
    (note,) = report.notes
    assert note.startswith("virchow probe was not scored on atnorm-br: run it again by fm-extract --model virchow ")
    assert "--dataset ami-br,atnorm-md,atnorm-br " in note
    assert "--test atnorm-md,atnorm-br" in note
    on = report.sets[1]
    assert set(on.folds) == set(on.confusion) == set(on.curves) == {"uni probe"}


# --- names ------------------------------------------------------------------------------------------------------------


def test_model_and_method_name_a_run():
    assert labels_of([record(), record("virchow"), record(method="lora")]) == [
        "uni probe",
        "virchow probe",
        "uni lora",
    ]


def test_namesakes_are_told_apart_by_what_differs():
    def lora(rank: int) -> dict[str, Any]:
        return record(method="lora", lora={"rank": rank, "alpha": 16, "targets": None})

    assert labels_of([lora(8), lora(16)]) == ["uni lora rank=8", "uni lora rank=16"]
    assert labels_of([record(recipe="exact"), record(recipe="paper")]) == ["uni probe exact", "uni probe paper"]
    assert labels_of([record(view="full"), record(view="center64")]) == ["uni probe full", "uni probe center64"]
    assert labels_of([record(pooling="cls"), record(pooling="mean")]) == ["uni probe cls", "uni probe mean"]
    assert labels_of([record(epochs=None), record(epochs=5)]) == ["uni probe epochs=default", "uni probe epochs=5"]
    assert labels_of([record(seed=1), record(seed=2), record("conch", seed=3)])[2] == "conch probe"
    assert labels_of([record(seed=1), record(seed=1), record(seed=2)])[2] == "uni probe seed=2"


def test_an_option_that_only_one_of_them_has_tells_too():
    assert labels_of([record(), record(batch_size=8)])[1] == "uni probe batch_size=8"
    assert labels_of([record(batch_size=8), record()])[0] == "uni probe batch_size=8"


def test_which_sets_were_scored_tells_nothing():
    first, second = record(test=["a"]), record(test=None, fractions=[0.5])
    assert all(re.fullmatch(r"uni probe #[0-9a-f]{4}", label) for label in labels_of([first, second]))


def test_identical_runs_are_told_apart_by_their_ids():
    runs = [record() for _ in range(3)]
    assert labels_of(runs) == [f"uni probe #{run.id[-4:]}" for run in runs]
    runs[1] = replace(runs[1], id="x" + runs[0].id)  # the same last digits, on another day
    assert len(set(labels_of(runs))) == 3


def test_no_two_runs_share_a_name():
    kinds = list(itertools.product(("uni", "uni probe"), ("probe", "lora"), ("full", "center64"), (1, 2)))
    rng = np.random.default_rng(0)
    for _ in range(200):
        chosen = [kinds[k] for k in rng.integers(0, len(kinds), size=rng.integers(1, 9))]
        records = [record(model, method, view=view, seed=seed) for model, method, view, seed in chosen]
        labels = labels_of(records)
        assert len(set(labels)) == len(labels)
        for label, one in zip(labels, records, strict=True):
            assert label.startswith(f"{one.model} {one.method}")
