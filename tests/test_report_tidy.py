"""Does the table for R and pandas hold every figure of a report, with all its digits?"""

from __future__ import annotations

import io
import math
from pathlib import Path

import pandas as pd
import pytest
from conftest import REPOSITORY
from report_pages import PHASES, QUICK, collected, patches_of_classes, run_of_classes, two_runs

from finetune.report import make_report
from probe.report.tidy import COLUMNS, tidy

TEXT = dict.fromkeys(("run", "folds_digest", "embedding", "weights", "domain", "class", "interval", "n_slides"), str)


def read(text: str) -> pd.DataFrame:
    empty = {"value": [""], "low": [""]}
    return pd.read_csv(
        io.StringIO(text), dtype=TEXT, keep_default_na=False, na_values=empty, float_precision="round_trip"
    )


def one(table: pd.DataFrame, **of: str) -> pd.Series:
    """The only row with these cells."""
    rows = table.loc[(table[list(of)] == pd.Series(of)).all(axis=1)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_every_figure_stands_in_one_row_with_all_its_digits(tmp_path):
    two_runs(tmp_path, fingerprints={"ami-br": "ab12"}, embedding={"weights_sha256": "cd34"})
    report, runs = collected(tmp_path)
    table = read(tidy(report, {run.label: run for run in runs}))
    assert tuple(table.columns) == COLUMNS
    key = ["run", "dataset", "split", "domain", "of", "figure", "class"]
    assert not table.duplicated(key).any()
    for on in report.sets:
        of_set = {"label": "uni probe", "dataset": on.dataset, "split": on.split, "domain": ""}
        judgement = on.comparison.judgements["uni probe"]
        for name, figure in judgement.figures.items():
            row = one(table, **of_set, of="ensemble", figure=name)
            assert (row.value, float(row.threshold), row.n_patches) == (figure.value, judgement.threshold, on.n)
            assert row.low == figure.low or (math.isnan(row.low) and math.isnan(figure.low))
        row = one(table, **of_set, of="fold models", figure="auroc")
        folds = on.folds["uni probe"]["auroc"]
        assert (row.value, float(row["std"])) == (folds.mean, folds.std)
        assert (math.isnan(row.low), row.interval) == (True, "")
    assert set(table.loc[table.dataset == "atnorm-br", "n_slides"]) == {""}  # not known there
    assert set(table.loc[(table.dataset == "ami-br") & (table.domain == ""), "n_slides"]) == {"6", "9"}
    assert set(table.interval) >= {"slides", "patches", ""}
    assert set(table.loc[table.dataset == "ami-br", "embedding"]) == {"ab12"}
    assert set(table.loc[table.dataset == "atnorm-br", "embedding"]) == {""}
    assert set(table.weights) == {"cd34"}
    md = next(on for on in report.sets if on.dataset == "atnorm-md")
    for domain, of in md.domains["virchow probe"].domains.items():
        row = one(table, label="virchow probe", dataset="atnorm-md", split="test", domain=domain, figure="auroc")
        assert (row.value, row.n_patches) == (of.figures["auroc"].value, of.n)
    assert one(table, label="uni probe", dataset="atnorm-md", of="mean of domains", figure="auroc").value == (
        md.domains["uni probe"].macro["auroc"].value
    )


@pytest.mark.usefixtures("no_patches_at_hand")
def test_an_ensemble_of_runs_has_rows_and_its_members_embeddings(tmp_path):
    first, _ = two_runs(tmp_path)
    text, _, runs = make_report(tmp_path, ensemble=("all",), format="csv", resampling=QUICK)
    table = read(text)
    assert list(dict.fromkeys(table.label)) == [run.label for run in runs]
    assert first.name in table.loc[table.label == runs[-1].label, "run"].iloc[0]


def test_figures_of_one_class_name_it(tmp_path):
    run_of_classes(tmp_path, patches_of_classes("cells", 120, 5))
    report, runs = collected(tmp_path)
    table = read(tidy(report, {run.label: run for run in runs}))
    row = one(table, split="test", domain="", of="ensemble", figure="recall", **{"class": PHASES[2]})
    assert row.value == report.sets[0].comparison.judgements["uni probe"].figures["recall 2"].value
    assert set(table.threshold) == {""}


def test_every_column_is_described():
    page = (
        (Path(REPOSITORY) / "docs" / "figures.md")
        .read_text(encoding="utf-8")
        .partition("## The table of all figures")[2]
    )
    described = [line.split("|")[1].strip().strip("`") for line in page.splitlines() if line.startswith("| `")]
    assert described == list(COLUMNS)
