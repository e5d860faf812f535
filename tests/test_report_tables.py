"""Do the tables for a paper say what the report says, and over what it holds?"""

from __future__ import annotations

from typing import Any

import pytest
from report_pages import collected, two_runs
from test_runs import TABLES, made_run

from probe.report import tables
from probe.report.tables import Grid, grids, latex, markdown


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Any, Any]:
    """A report of three runs on slides and on patches of unknown slide."""
    folder = tmp_path_factory.mktemp("tables")
    two_runs(folder)
    made_run(folder, "conch", tables={name: TABLES[name] for name in ("ami-br", "atnorm-br")}, seed=3)
    return collected(folder)


def short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def test_captions_say_what_intervals_generalise_over(made):
    _, ensembles, differences = grids(*made)
    assert "ami-br, test: 6 slides, intervals over other slides" in ensembles.caption
    assert "atnorm-br, test: 24 patches, intervals over other patches" in ensembles.caption
    assert (
        "ami-br, test: 3 pairs, over other slides; atnorm-br, test: 3 pairs, over other patches" in differences.caption
    )
    assert "atnorm-md, test: 1 pair, over other slides" in differences.caption


def test_every_two_runs_stand_with_difference_interval_p_and_what_the_set_could_show(made):
    report, _ = made
    grid = grids(*made)[2]
    assert [name for name, _, _ in grid.rows] == [
        f"{pair.first} − {pair.second}" for pair in report.sets[0].comparison.pairs
    ]
    for (_, cells, _), pair in zip(grid.rows, report.sets[0].comparison.pairs, strict=True):
        one = pair.differences["auroc"]
        cell = cells[1]
        assert cell.value == ("+" if one.value >= 0 else "−") + short(abs(one.value))
        assert cell.aside.startswith("[")
        assert cell.best == (one.p_holm < 0.05)
        assert cell.best or f"p = {short(one.p_holm)}, δ = {short(one.detectable_holm)}" in cell.aside
    lacking = next(cells for name, cells, _ in grid.rows if "conch" in name)
    assert lacking[-1].value == "–"  # not scored on the third set


def test_of_many_pairs_only_those_with_the_best_are_printed(made, monkeypatch):
    monkeypatch.setattr(tables, "_MOST_PAIRS", 2)
    report, runs = made
    grid = grids(report, runs)[2]
    ranks = report.sets[0].comparison.ranks["auroc"]
    best = min(ranks, key=lambda label: ranks[label].value)
    assert [name for name, _, _ in grid.rows] == [f"{best} − {label}" for label in report.labels if label != best]
    assert grid.caption.startswith(f"Differences of {best} and every other run")


def test_one_run_has_no_differences(tmp_path):
    made_run(tmp_path, tables={"ami-br": TABLES["ami-br"]})
    assert len(grids(*collected(tmp_path))) == 2


def test_signs_are_printed_as_markdown_and_latex_know_them():
    cells = (tables.Cell("−.120", "[−.170, −.070], δ = .05"), tables.Cell("+.010", "", best=True))
    grid = Grid("a − b", ("set",), (("x − y", cells, False),))
    assert "| x − y | −.120 [−.170, −.070], δ = .05 | **+.010** |" in markdown(grid)
    assert r"x $-$ y & $-$.120 {\scriptsize {[}$-$.170, $-$.070], $\delta$ = .05} & \textbf{+.010} \\" in latex(grid)
