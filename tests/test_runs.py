"""Does a run come back from disk as it was written, and is a changed or damaged file refused by name?"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from test_store import Disk

from features.console import UserError
from features.samples import Samples, make_samples
from probe import predictions as prediction_files
from probe.metrics import RunMetrics
from probe.predictions import (
    COLUMNS,
    SAMPLE_COLUMNS,
    VALIDATION,
    Predictions,
    concatenate,
    parse_predictions,
    predictions_csv,
    predictions_of,
)
from probe.records import RunRecord
from probe.runs import check_weights, read_predictions, read_run, read_samples, write_run

ODD = (
    "a,b",
    "\r",
    "i\rj",
    'c "d"',
    "e\nf",
    "g\r\nh",
    "Größe ✓ 漢字",
    "<i>&amp;",
    " spaces ",
    "{{ 7*7 }}",
    "../..",
    "\u202egnp",
)


def patches(
    name: str, n: int, *, raters: int = 0, domains: int = 0, slides: bool = True, test_from: int | None = None
) -> Samples:
    """A patch table: every third patch is positive, four patches lie on a slide, some votes are missing."""
    prefix = "" if name == "ami-br" else f"{name} "  # no slide is in two datasets
    row = np.arange(n)
    label = (row % 3 == 0).astype(np.int8)
    votes = np.repeat(label[:, None], raters, axis=1)
    if raters:
        votes[row % 4 == 1, 0] ^= 1  # disputed
        votes[row % 8 == 2, -1] = -1
    return make_samples(
        [f"{name}/{k:03}.png" for k in range(n)],
        label.tolist(),
        group=[f"{prefix}slide {k // 4}" if slides else "" for k in range(n)],
        split=["train" if test_from is not None and k < test_from else "test" for k in range(n)],
        votes=votes,
        domain=[f"domain {k // 4 % domains}" if domains else "" for k in range(n)],
        sha256=[f"{name} {k}" for k in range(n)],
    )


TABLES = {
    "ami-br": patches("ami-br", 60, raters=3, test_from=36),
    "atnorm-br": patches("atnorm-br", 24, slides=False),
    "atnorm-md": patches("atnorm-md", 48, raters=5, domains=3),
}
N_FOLDS = 3


def predicted(
    tables: Mapping[str, Samples], train: str, *, signal: float = 1.0, seed: int = 0, n_folds: int = N_FOLDS
) -> Predictions:
    """What the fold models of one run say: out of fold of the training split, and each of every test set."""
    rng = np.random.default_rng(seed)

    def logit(samples: Samples, n_models: int = 1) -> np.ndarray:
        centre = signal * (2.0 * samples.label - 1) + rng.standard_normal(len(samples))
        own = centre[:, None] + 0.3 * rng.standard_normal((len(samples), n_models))
        return own.astype("f4")[..., None]

    trained = tables[train].select(tables[train].split == "train")
    fold = np.arange(len(trained)) // 4 % n_folds
    parts = [predictions_of(train, trained, split=VALIDATION, fold=fold[:, None], logit=logit(trained))]
    for name, table in tables.items():
        held_out = table.select(table.split == "test")
        if len(held_out):
            parts.append(
                predictions_of(name, held_out, split="test", fold=np.arange(n_folds), logit=logit(held_out, n_folds))
            )
    return concatenate(parts)


def made_run(
    runs: Path,
    model: str = "uni",
    *,
    tables: Mapping[str, Samples] = TABLES,
    train: str = "ami-br",
    predictions: Predictions | None = None,
    signal: float = 1.0,
    seed: int = 0,
    digest: str = "f01d" * 16,
    files: Mapping[str, bytes] | None = None,
    **record: Any,
) -> Path:
    """A run made by hand; `record` replaces what its run.json would say."""
    told: dict[str, Any] = {
        "kind": "probe",
        "model": model,
        "method": "probe",
        "options": {"cv": N_FOLDS, "train": train, "test": None, "view": None, "recipe": "exact", "seed": 42},
        "train": train,
        "test": [name for name in tables if name != train],
        "view": "full",
        "pooling": "card",
        "card_pooling": "pooled",
        "label_names": ["Normal", "Atypical"],
        "sources": dict.fromkeys(tables, ""),
        "fingerprints": {},
        "table_digests": {name: table.table_digest for name, table in tables.items()},
        "folds": {"n": N_FOLDS, "source": "grouped", "digest": digest, "seed": 42},
    }
    unwritten = {"id": "", "created": "", "versions": {}, "cost": {}}
    with unscored():
        written = write_run(
            runs,
            RunRecord.from_json(unwritten | told | record),
            predictions=predicted(tables, train, signal=signal, seed=seed) if predictions is None else predictions,
            tables=tables,
            weights={"coef": np.zeros((N_FOLDS, 1, 8), dtype=np.float32), "intercept": np.zeros((N_FOLDS, 1))},
            seconds=1.0,
            files=files,
        )
    assert written.folder is not None
    return written.folder


def unscored() -> AbstractContextManager[Any]:
    """Runs are written without figures meanwhile, which would take longer than all else."""
    return mock.patch("probe.runs.evaluate", return_value=RunMetrics(0.5, {}))


def edit_record(folder: Path, **changes: Any) -> None:
    """Change what a run's run.json says, as if it had been written so; None takes a key out."""
    record = json.loads((folder / "run.json").read_text()) | changes
    kept = {name: value for name, value in record.items() if changes.get(name, "") is not None}
    if "sha256" in kept:
        kept["sha256"].pop("run.json", None)
    (folder / "run.json").write_text(json.dumps(kept))


def edit_row(path: Path, line: int, column: str, value: str) -> None:
    """Change a cell of a CSV; line 1 is the header."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    rows[line - 1][rows[0].index(column)] = value
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def same_table(found: Samples, expected: Samples) -> None:
    for column in ("id", "label", "group", "split", "votes", "domain", "sha256"):
        assert getattr(found, column).tolist() == getattr(expected, column).tolist(), column
    assert found.table_digest == expected.table_digest


# --- there and back ---------------------------------------------------------------------------------------------------


def test_patch_tables_come_back_as_they_were(tmp_path):
    folder = made_run(tmp_path)
    predictions = read_predictions(folder)
    tables = read_samples(folder, predictions)
    assert list(tables) == ["ami-br", "atnorm-br", "atnorm-md"]
    for name, table in tables.items():
        same_table(table, TABLES[name])
    assert (tables["ami-br"].votes == -1).any()
    assert tables["atnorm-br"].votes.shape == (24, 0)
    assert set(tables["atnorm-md"].domain) == {"domain 0", "domain 1", "domain 2"}


def test_predictions_come_back_to_the_last_bit(tmp_path):
    written = predicted(TABLES, "ami-br")
    read = read_predictions(made_run(tmp_path, predictions=written))
    for column in Predictions.__dataclass_fields__:
        assert getattr(read, column).tolist() == getattr(written, column).tolist(), column
    assert read.logit.dtype == np.float32


@pytest.mark.parametrize("column", ["id", "group", "domain"])
def test_any_name_comes_back(column, tmp_path):
    n = 2 * len(ODD)
    names = [f"{name}{k // len(ODD)}" for k, name in enumerate(ODD * 2)]
    columns = {"id": [str(k) for k in range(n)], "group": [""] * n, "domain": [""] * n} | {column: names}
    table = make_samples(
        columns["id"],
        [k % 2 for k in range(n)],
        group=columns["group"],
        domain=columns["domain"],
        split=["train"] * len(ODD) + ["test"] * len(ODD),
        votes=np.array([[1, -1], [0, 1]] * len(ODD), dtype=np.int8),
        sha256=["0" * 64] * n,
    )
    hostile = 'a,"b"\n<c>'
    folder = made_run(tmp_path, tables={hostile: table}, train=hostile, options={"train": hostile})
    predictions = read_predictions(folder)
    assert set(predictions.dataset.tolist()) == {hostile}
    same_table(read_samples(folder, predictions)[hostile], table)


def test_only_what_was_predicted_is_kept(tmp_path):
    written = predicted(TABLES, "ami-br")
    folder = made_run(tmp_path, predictions=written.select(written.id != "ami-br/000.png"))
    table = read_samples(folder, read_predictions(folder))["ami-br"]
    same_table(table, TABLES["ami-br"].select(np.arange(60) > 0))


def test_a_run_without_patch_tables_knows_what_its_predictions_say(tmp_path):
    folder = made_run(tmp_path)
    (folder / "samples.csv").unlink()
    tables = read_samples(folder, read_predictions(folder))
    for name, table in tables.items():
        assert table.id.tolist() == TABLES[name].id.tolist()
        assert table.label.tolist() == TABLES[name].label.tolist()
        assert table.group.tolist() == TABLES[name].group.tolist()
        assert table.votes.shape == (len(table), 0)
        assert set(table.domain) == {""}
        assert set(table.sha256) == {""}


# --- changed or damaged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["predictions.csv", "samples.csv"])
def test_a_changed_digit_is_refused(name, tmp_path):
    folder = made_run(tmp_path)
    predictions = read_predictions(folder)
    content = (folder / name).read_bytes()
    at = content.rindex(b"1")
    (folder / name).write_bytes(content[:at] + b"0" + content[at + 1 :])
    with pytest.raises(UserError, match=rf"{name} (is not the file that the run wrote|is damaged)"):
        read_predictions(folder) if name == "predictions.csv" else read_samples(folder, predictions)
    (folder / name).write_bytes(content)
    read_samples(folder, read_predictions(folder))


def test_a_change_that_makes_sense_in_itself_is_refused_too(tmp_path):
    folder = made_run(tmp_path)
    predictions = read_predictions(folder)
    edit_row(folder / "predictions.csv", 2, "group", "slide 1")
    edit_row(folder / "samples.csv", 2, "domain", "lung")
    for read, name in (
        (lambda: read_predictions(folder), "predictions.csv"),
        (lambda: read_samples(folder, predictions), "samples.csv"),
    ):
        with pytest.raises(UserError, match=rf"{name} is not the file that the run wrote: its SHA-256 differs"):
            read()


def test_a_changed_record_metric_or_weight_is_refused_by_name(tmp_path):
    folder = made_run(tmp_path)
    check_weights(folder, read_run(folder))
    for name, old, new in (
        ("run.json", b'"Normal"', b'"Formal"'),
        ("run.json", b'"seed": 42', b'"seed": 43'),
        ("metrics.json", b"0.5", b"0.7"),
        ("weights.safetensors", b"\0\0\0\0", b"\0\0\0\1"),
    ):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[::-1].replace(old[::-1], new[::-1], 1)[::-1])
        with pytest.raises(UserError, match=rf"{name} is not the file that the run wrote"):
            check_weights(folder, read_run(folder))
        (folder / name).write_bytes(whole)
    check_weights(folder, read_run(folder))


def test_weights_outside_the_folder_are_never_looked_at(tmp_path):
    folder = made_run(tmp_path)
    edit_record(folder, sha256={"../../secret": "0", "/etc/passwd": "0"})
    check_weights(folder, read_run(folder))


def unsigned(tmp_path: Path) -> Path:
    """A run that keeps no digests, as older ones do: its files are judged by what they say."""
    folder = made_run(tmp_path)
    edit_record(folder, sha256=None)
    return folder


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("probability", "0.123456", r"line 2: the probability is 0\.123456, that of its logit is"),
        ("probability", "nan", r"line 2: the probability is nan"),
        ("probability", "high", "damaged"),
        ("logit", "nan", "line 2"),
        ("logit", "", "damaged"),
        ("label", "2", "a label is neither 0 nor 1"),
        ("label", "-1", "a label is neither 0 nor 1"),
        ("label", "300", "damaged"),
        ("label", "1.5", "damaged"),
        ("fold", "first", "damaged"),
        ("fold", "9" * 30, "damaged"),
    ],
)
def test_an_impossible_prediction_is_refused_by_name(column, value, said, tmp_path):
    folder = unsigned(tmp_path)
    edit_row(folder / "predictions.csv", 2, column, value)
    with pytest.raises(UserError, match=said) as refusal:
        read_predictions(folder)
    assert str(folder / "predictions.csv") in str(refusal.value)


@pytest.mark.parametrize(
    ("column", "value"), [("label", "2"), ("label", "x"), ("label", ""), ("votes", "1"), ("votes", "1x0")]
)
def test_an_impossible_patch_is_refused_by_name(column, value, tmp_path):
    folder = unsigned(tmp_path)
    predictions = read_predictions(folder)
    edit_row(folder / "samples.csv", 2, column, value)
    with pytest.raises(UserError, match="damaged") as refusal:
        read_samples(folder, predictions)
    assert str(folder / "samples.csv") in str(refusal.value)


def test_a_patch_twice_in_a_table_is_refused_by_name(tmp_path):
    folder = unsigned(tmp_path)
    predictions = read_predictions(folder)
    edit_row(folder / "samples.csv", 2, "id", "ami-br/001.png")
    with pytest.raises(UserError) as refusal:
        read_samples(folder, predictions)
    assert str(folder / "samples.csv") in str(refusal.value)


def test_a_patch_table_without_a_predicted_patch_is_refused(tmp_path):
    folder = unsigned(tmp_path)
    predictions = read_predictions(folder)
    edit_row(folder / "samples.csv", 2, "id", "other.png")
    with pytest.raises(UserError, match=r"1 patches of ami-br are missing, first: ami-br/000\.png"):
        read_samples(folder, predictions)


@pytest.mark.parametrize(("name", "columns"), [("predictions.csv", COLUMNS), ("samples.csv", SAMPLE_COLUMNS)])
def test_other_content_is_refused_by_name(name, columns, tmp_path):
    folder = unsigned(tmp_path)
    predictions, path = read_predictions(folder), folder / name
    whole = path.read_bytes()
    header, rest = whole.split(b"\n", 1)
    for content, said in (
        (b"", r"found columns none, expected dataset, id"),
        (header.replace(b"id", b"path") + b"\n" + rest, r"found columns dataset, path"),
        (header + b",note\n" + rest, r"found columns .*note, expected"),
        (header + b"\n" + b",".join([b"1"] * (len(columns) - 1)) + b"\n" + rest, "damaged"),
        (header + b"\n" + b"\xff\xfe" + rest, "damaged"),
        (whole + b'"unclosed,' + b"x" * 200_000, "damaged"),
        (b"x" * 200_000, "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as refusal:
            read_predictions(folder) if name == "predictions.csv" else read_samples(folder, predictions)
        assert str(path) in str(refusal.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a finished run: run\.json is missing"):
        read_run(tmp_path)
    with pytest.raises(UserError, match=r"none is not a finished run"):
        read_run(tmp_path / "none")
    (tmp_path / "report.html").write_text("<!doctype html>")
    with pytest.raises(UserError, match=r"report\.html is not a finished run"):
        read_run(tmp_path / "report.html")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff"])
@pytest.mark.parametrize("name", ["run.json", "metrics.json"])
def test_a_damaged_record_is_refused(name, content, tmp_path):
    folder = made_run(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        read_run(folder)


def test_a_run_of_another_format_is_refused(tmp_path):
    folder = made_run(tmp_path)
    edit_record(folder, format=4)
    with pytest.raises(UserError, match="is a run of format 4; this version reads formats 1 to 3"):
        read_run(folder)


def test_csv_files_made_in_pieces_are_the_same(tmp_path, monkeypatch):
    whole = made_run(tmp_path / "whole")
    monkeypatch.setattr(prediction_files, "_ROWS", 7)
    pieces = made_run(tmp_path / "pieces")
    for name in ("predictions.csv", "samples.csv"):
        assert (pieces / name).read_bytes() == (whole / name).read_bytes()
        assert read_run(pieces).sha256[name] == read_run(whole).sha256[name]
    read_samples(pieces, read_predictions(pieces))


@pytest.mark.skipif(sys.platform != "linux", reason="what a descriptor is of, as Linux tells it")
def test_a_run_has_its_name_only_when_all_of_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    folder = made_run(tmp_path, files={"more.txt": b"more"})
    assert disk.check() == 1
    assert [path for what, path in disk.events if what == "rename"][-1] == folder
    assert disk.events[-1] == ("fsync", tmp_path)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["predictions.csv", "metrics.json", "weights.safetensors"])
def test_a_digest_that_was_changed_to_fit_a_changed_file_is_refused(name, tmp_path):
    folder = made_run(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["sha256"][name] = "0" * 64
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"run\.json is not the file that the run wrote"):
        read_run(folder)


@pytest.mark.parametrize("key", ["id", "created"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_record_without_name_or_date_is_damaged(key, value, tmp_path):
    folder = made_run(tmp_path)
    edit_record(folder, **{key: value})
    with pytest.raises(UserError, match=rf"run\.json is damaged \({key} missing\)"):
        read_run(folder)


def test_rows_are_selected_by_any_mask_and_contiguous_ones_without_a_copy():
    predictions = predicted(TABLES, "ami-br")
    n = len(predictions)
    scattered, middle, none = np.arange(n) % 3 == 1, np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    middle[5:9] = True
    for mask in (scattered, middle, none, ~none):
        part = predictions.select(mask)
        assert part.id.tolist() == predictions.id[np.flatnonzero(mask)].tolist()
        assert part.logit.tolist() == predictions.logit[np.flatnonzero(mask)].tolist()
    assert np.shares_memory(predictions.select(middle).logit, predictions.logit)
    assert not len(predictions.select(none).select(np.zeros(0, dtype=bool)))


def test_a_file_of_no_predictions_has_its_header_and_is_read():
    nothing = predicted(TABLES, "ami-br").select(np.zeros(0, dtype=np.intp))
    (content,) = predictions_csv(nothing)
    assert content.decode() == ",".join(COLUMNS) + "\n"
    assert len(parse_predictions(content.decode())) == 0


def test_none_is_kept_in_options_and_left_out_of_what_was_not_measured(tmp_path):
    folder = made_run(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    assert record["options"] == read_run(folder).options
    assert record["options"]["test"] is None
    assert record["options"]["view"] is None
    assert None not in record.values()
    assert None not in record["cost"].values()
