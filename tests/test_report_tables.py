"""Do the tables for a paper say what the report says, and over what it holds?"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from report_pages import collected, record, two_runs
from test_runs import TABLES, made_run

from probe.candidates import TEXT_TRANSFORM
from probe.records import FoldsRecord
from probe.report import tables
from probe.report.published import Published, departures, published
from probe.report.tables import Cell, Grid, grids, latex, markdown


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


def test_published_models_stand_beside_ours_by_method_with_what_differs_in_words(made):
    report, runs = made
    grid = grids(report, runs)[0]
    names = [name for name, _, _ in grid.rows]
    assert [name for name, cells, _ in grid.rows if not cells] == ["End to end", "Linear probes", "LoRA"]
    assert (
        names.index("Linear probes")
        < names.index("uni probe")
        < names.index("uni: paper, Table 3")
        < names.index("LoRA")
    )
    assert sum(others for _, _, others in grid.rows) == 2 * 17 - 6  # each model of both sources, once
    uni = names.index("uni probe")
    on, figures = report.sets[0], report.sets[0].comparison.judgements["uni probe"].figures
    mean, ends = grid.rows[uni][1][1], grid.rows[uni + 1][1][1]
    assert mean.value == short(on.folds["uni probe"]["auroc"].mean)
    one = figures["auroc"]
    assert ends == Cell("", f"{short(one.value)} [{short(one.low)}, {short(one.high)}]")
    theirs = next(row for row in published() if (row.source, row.model, row.method) == ("table-3", "uni", "probe"))
    assert grid.rows[names.index("uni: paper, Table 3")][1][1].value == short(theirs.figures["auroc"].mean)
    column = [cells[1] for _, cells, _ in grid.rows if cells]
    assert {cell.value for cell in column if cell.best} == {
        max((cell.value for cell in column if cell.value), key=float)
    }
    same = (
        "3 folds instead of five, logistic regression solved exactly at a strength chosen in training data instead of"
    )
    assert f"Other than in the authors' re-run – all our runs: {same} training by Adam." in grid.caption
    text = latex(grid)
    assert "\n\\addlinespace\n\\multicolumn{7}{l}{LoRA} \\\\\n" in text
    assert text.count("{") == text.count("}")
    widths = {line.count(" & ") for line in text.splitlines() if line.endswith("\\\\") and "multicolumn" not in line}
    assert widths == {6}
    assert f"\\quad\\textit{{uni: paper, Table 3}} & {mean_of(theirs, 'balanced_accuracy')} " in text
    assert "| **LoRA** |  |" in markdown(grid)


def mean_of(row: Published, name: str) -> str:
    return short(row.figures[name].mean)


def test_what_differs_from_the_published_protocol_follows_from_the_record():
    folds = FoldsRecord(n=5, source="AMi-Br, sklearn-1.7, frozen", digest="")
    paper = replace(record(view="full@224+imagenet", recipe="paper"), folds=folds)
    assert departures(paper, "table-3") == ("no augmentation, as embeddings are frozen",)
    assert departures(paper, "re-run") == (
        "view full@224+imagenet instead of the patch as the model's card prepares it",
        "recipe paper instead of that of the scripts",
    )
    flipped = replace(paper, view="center64+flips")
    assert "embeddings are means over eight flips and turns" in departures(flipped, "table-3")
    authors = replace(record(view="full", recipe="authors"), folds=folds)
    assert departures(authors, "re-run") == ()
    card = "the patch as the model's card prepares it instead of at 224 pixels with ImageNet's statistics"
    assert card in departures(authors, "table-3")
    as_text = replace(authors, embedding={"transform": TEXT_TRANSFORM | {"rounding": "uint8"}})
    assert card not in departures(as_text, "table-3")
    exact = replace(record(view="center64", pooling="mid"), folds=replace(folds, source="AMi-Br, sklearn-1.9, frozen"))
    assert departures(exact, "re-run") == (
        "another assignment of slides to the five folds",
        "view center64 instead of the whole patch",
        "pooling mid instead of the card's",
        "logistic regression solved exactly at a strength chosen in training data instead of training by Adam",
    )
    recipe = {"optimizer": "adamw", "epochs": 8, "tta": True}
    tuned = replace(record(method="lora", recipe="default"), kind="finetune", recipe=recipe, seeds=(1, 2))
    tuned = replace(tuned, folds=replace(folds, n=6, names=tuple("abcdef")))
    runs = [SimpleNamespace(label=k, record=one) for k, one in zip("abc", (exact, exact, authors), strict=True)]
    first, second = tables.say_departures(runs)
    assert second == (
        "Other than in the authors' re-run – all but c: another assignment of slides to the five folds, view center64 "
        "instead of the whole patch, pooling mid instead of the card's, logistic regression solved exactly at a "
        "strength chosen in training data instead of training by Adam."
    )
    assert f"; c: {card}, " in first
    assert departures(tuned, "table-3") == (
        "6 folds by domain instead of five of slides",
        "2 trainings per fold instead of one",
        card,
        "recipe default (adamw, 8 epochs at most) instead of that of the text",
        "scores are means over eight flips and turns",
    )


COMMANDS = (
    "begin end caption centering footnotesize multicolumn quad scriptsize setlength tabcolsep textbf textit "
    "delta pm textasciicircum textasciitilde textbackslash textbar textgreater textless"
)
PACKAGES = {"booktabs": "addlinespace bottomrule cmidrule midrule toprule"}


def read_latex(text: str) -> list[int]:
    """Read a table as LaTeX does, and give the width of every row in columns.

    Raises:
        ValueError: what LaTeX would stop at: braces, environments or formulas that do not end, a bare special
            character, a command that neither LaTeX nor a package named in a comment has, a letter outside ASCII, rows
            of another width than the table's, and a row that begins with what the end of the one before it would take.
    """
    known, widths, opened = set(COMMANDS.split()), [], []
    depth, formula, width, columns = 0, False, 1, 0
    at = 0

    def argument(start: int) -> str:
        return text[text.index("{", start) + 1 : text.index("}", start)]

    while at < len(text):
        letter = text[at]
        if letter == "%":
            end = text.index("\n", at)
            if found := re.search(r"\\usepackage\{(\w+)\}", text[at:end]):
                known |= set(PACKAGES[found[1]].split())
            at = end
        elif letter == "\\":
            name = re.match(r"[a-zA-Z]+|.", text[at + 1 :], re.DOTALL)[0]
            at += 1 + len(name)
            if name == "\\":
                if depth or formula or opened[-1:] != ["tabular"] or width != columns:
                    raise ValueError(f"a row of {width} of {columns} columns ends at {text[:at][-60:]!r}")
                if text[at:].lstrip()[:1] in ("[", "*"):
                    raise ValueError("the end of a row would take what begins the next one")
                widths.append(width)
                width = 1
            elif name == "begin":
                opened.append(argument(at))
                if opened[-1] == "tabular":
                    columns = len(argument(text.index("}", at) + 1))
            elif name == "end":
                if depth or not opened or opened.pop() != argument(at):
                    raise ValueError(f"{argument(at)} ends where something else is open")
            elif name == "multicolumn":
                width += int(argument(at)) - 1
            elif name not in known and name not in "&%$#_{}":
                raise ValueError(f"unknown command {name}")
            continue
        elif letter in "{}":
            depth += 1 if letter == "{" else -1
            if depth < 0:
                raise ValueError("a brace closes nothing")
        elif letter == "$":
            formula = not formula
        elif letter == "&":
            if depth or formula or opened[-1:] != ["tabular"]:
                raise ValueError("a bare &")
            width += 1
        elif letter in "#~^_" or not letter.isascii():
            raise ValueError(f"a bare {letter}")
        at += 1
    if depth or formula or opened or width != 1:
        raise ValueError("something is left open")
    return widths


def test_latex_can_read_every_table(made):
    report, runs = made
    read = [read_latex(latex(grid)) for grid in grids(report, runs)]
    assert [set(widths) for widths in read] == [{7}] * 3
    assert [len(widths) for widths in read] == [2 + len(grid.rows) for grid in grids(report, runs)]  # two of headings


def test_latex_can_read_whatever_runs_are_called():
    names = [r"50 % of {a_b} & #1 ~^ \end{table} $x$ | < > – −", "[1] two", "−", "* three", "", "{", "}", "\\"]
    cells = (tables.Cell(".8", "± .1 [.7, .9], δ = .05"), tables.Cell("–", best=True))
    rows = [(name, cells, number % 2 == 0) for number, name in enumerate(names)]
    grid = Grid(f"a {names[0]} b", (names[0],), (*rows, ("A & B_1", (), False), *rows))
    text = latex(grid)
    assert read_latex(text) == [3] * (2 + 2 * len(names) + 1)
    assert text.startswith("% \\usepackage{booktabs}\n")
    broken = [
        *(text.replace(f"\\{letter}", letter, 1) for letter in "&#_{}$%"),
        *((text.replace("{[}", "["), text.replace("{*}", "*"), text.replace("usepackage", "package"))),
        *(text.replace(one, "", 1) for one in ("\\end{tabular}", "\\end{table}\n", " & ", " \\\\", "$")),
        text.replace("$\\pm$", "±", 1),
        text.replace("\\textbar{}", "\\mytextbar{}", 1),
        text.replace("\\multicolumn{3}", "\\multicolumn{2}", 1),
    ]
    for one in broken:
        assert one != text
        with pytest.raises((ValueError, IndexError)):
            read_latex(one)


def test_one_run_has_no_differences(tmp_path):
    made_run(tmp_path, tables={"ami-br": TABLES["ami-br"]})
    assert len(grids(*collected(tmp_path))) == 2


def test_signs_are_printed_as_markdown_and_latex_know_them():
    cells = (tables.Cell("−.120", "[−.170, −.070], δ = .05"), tables.Cell("+.010", "", best=True))
    grid = Grid("a − b", ("set",), (("x − y", cells, False),))
    assert "| x − y | −.120 [−.170, −.070], δ = .05 | **+.010** |" in markdown(grid)
    assert r"x $-$ y & $-$.120 {\scriptsize {[}$-$.170, $-$.070], $\delta$ = .05} & \textbf{+.010} \\" in latex(grid)
