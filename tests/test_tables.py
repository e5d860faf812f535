"""Are tables for a paper whole, escaped, and right: ours beside what was published, the best in bold?"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_runs import TABLES, made_run, patches, predicted

from probe.ensembles import ensemble_of
from probe.evidence import evaluate, judge
from probe.predictions import VALIDATION
from probe.records import RunRecord
from probe.report.collect import Report, collect
from probe.report.published import published, published_for
from probe.report.read import Run, read_runs
from probe.report.tables import Cell, Grid, grids, latex, markdown
from probe.report.terminal import ensemble_table, result_tables
from probe.resample import Resampling
from probe.runs import read_predictions, read_run

QUICK = Resampling(replicates=200)
HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7*7 }}",
    "../..",
    "a|b",
    "first\nsecond\n\nthird",
    "\x1b[31mred",
    "\u202egnp.exe",
    "*[b]*",
    "--# 1",
    r"50 % & $5 #1 _x_ {y} ~z^2 \input{/etc/passwd} <t>",
)


def collected(runs: Path) -> tuple[Report, list[Run]]:
    read, notes = read_runs(runs)
    return collect(read, notes, resampling=QUICK), read


def two_runs(runs: Path, **record: object) -> tuple[Report, list[Run]]:
    made_run(runs, "uni", signal=0.6, **record)
    made_run(runs, "virchow", signal=0.3, seed=1, **record)
    return collected(runs)


def pipe_cells(line: str) -> list[str]:
    """The cells of a row of a pipe table."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def printed(value: float) -> str:
    return re.sub("^0", "", f"{value:.3f}")


# --- grids ------------------------------------------------------------------------------------------------------------


def test_a_grid_says_what_the_evidence_says(tmp_path):
    report, runs = two_runs(tmp_path)
    folds, ensembles, _ = grids(report, runs)
    assert folds.groups == ensembles.groups
    assert folds.groups == ("ami-br, test (n = 24)", "atnorm-br, test (n = 24)", "atnorm-md, test (n = 48)")
    ours = [row for row in folds.rows if row[0] in report.labels]
    for run, (name, cells, _), (other, judged, _) in zip(runs, ours, ensembles.rows, strict=True):
        assert name == other == run.label
        recorded = evaluate(run.predictions, resampling=QUICK).sets
        for k, dataset in enumerate(("ami-br", "atnorm-br", "atnorm-md")):
            one = judge(ensemble_of(run.predictions, dataset, "test"), resampling=QUICK)
            for j, figure in enumerate(("balanced_accuracy", "auroc")):
                of = recorded[f"{dataset}/test"].folds[figure]
                cell = cells[2 * k + j]
                assert (cell.value, cell.aside) == (printed(of.mean), f"± {printed(of.std)}")
                cell, interval = judged[2 * k + j], one.figures[figure]
                assert cell.value == printed(interval.value)
                assert cell.aside == f"[{printed(interval.low)}, {printed(interval.high)}]"


def test_the_caption_says_what_was_resampled(tmp_path):
    report, runs = two_runs(tmp_path)
    folds, ensembles, _ = grids(report, runs)
    assert "3 fold models trained on ami-br" in folds.caption
    assert "95% cluster-bootstrap intervals" in ensembles.caption
    for drawn in ("ami-br, test: 6 slides", "atnorm-br, test: 24 patches", "atnorm-md, test: 12 slides"):
        assert drawn in ensembles.caption


def test_the_best_of_every_column_is_marked_and_all_of_a_tie(tmp_path):
    for model in ("uni", "conch"):  # equals
        made_run(tmp_path, model, signal=1.2)
    made_run(tmp_path, "virchow", signal=0.0, seed=1)
    for grid in grids(*collected(tmp_path))[:2]:  # in the third, of differences, bold is another thing
        names = [name for name, cells, _ in grid.rows if cells]
        for column in zip(*(cells for _, cells, _ in grid.rows if cells), strict=True):
            best = max((cell.value for cell in column if cell.value not in ("", "–")), key=float)
            assert [cell.best for cell in column] == [cell.value == best for cell in column]
            assert column[names.index("uni probe")] == column[names.index("conch probe")]
    assert "**" in markdown(grid)


def test_a_set_that_a_run_lacks_has_dashes(tmp_path):
    made_run(tmp_path, "uni")
    made_run(tmp_path, "virchow", tables={name: TABLES[name] for name in ("ami-br", "atnorm-br")}, seed=1)
    report, runs = collected(tmp_path)
    assert [on.missing for on in report.sets] == [(), (), ("virchow probe",), ()]
    for grid in grids(report, runs)[:2]:
        (cells,) = (cells for name, cells, _ in grid.rows if name == "virchow probe")
        assert [cell.value == "–" for cell in cells] == [False] * 4 + [True] * 2
        assert not any(cell.best for cell in cells[4:])
        (whole,) = (cells for name, cells, _ in grid.rows if name == "uni probe")
        assert all(cell.best for cell in whole[4:])


def test_out_of_fold_figures_are_tabulated_where_there_is_no_test_set(tmp_path):
    tables = {"mine": patches("mine", 36, test_from=36)}
    made_run(tmp_path, tables=tables, train="mine")
    report, runs = collected(tmp_path)
    for grid in grids(report, runs):
        assert grid.groups == ("mine, out of fold (n = 36)",)
        assert all(cell.value != "–" for cell in grid.rows[0][1])
    assert ensemble_table([read_run(run.folder) for run in runs]) is None


def test_figures_that_do_not_exist_are_dashes(tmp_path):
    alone = patches("alone", 24)
    alone = alone.select(alone.label == 0)
    tables = {"mine": patches("mine", 36, test_from=36), "alone": alone}
    made_run(tmp_path, tables=tables, train="mine")
    for grid in grids(*collected(tmp_path)):
        assert [(cell.value, cell.best) for cell in grid.rows[0][1]] == [("–", False)] * 2
        assert "nan" not in markdown(grid) + latex(grid)


# --- what was published -----------------------------------------------------------------------------------------------

TABLE_3 = {"ami-br": (0.6477, 0.7171), "atnorm-br": (0.6217, 0.6774), "atnorm-md": (0.5715, 0.6241)}
RE_RUN = {"ami-br": (0.6339, 0.6949), "atnorm-br": (0.6406, 0.7028), "atnorm-md": (0.5510, 0.5892)}


def test_uni_s_linear_probe_was_published_twice(tmp_path):
    uni = read_run(made_run(tmp_path, "uni"))
    for source, of in (("table-3", TABLE_3), ("re-run", RE_RUN)):
        for dataset, values in of.items():
            for figure, value in zip(("balanced_accuracy", "auroc"), values, strict=True):
                rows = published_for(uni, dataset, "test")
                assert rows[source].figures[figure].mean == value
    assert published_for(uni, "ami-br", VALIDATION) == {}


def test_nothing_published_stands_beside_runs_of_other_training_patches(tmp_path):
    tables = {"other": TABLES["ami-br"], "ami-br": patches("ami-br", 24), "atnorm-br": TABLES["atnorm-br"]}
    made_run(tmp_path, "uni", tables=tables, train="other")
    report, runs = collected(tmp_path)
    for grid in grids(report, runs):
        assert not any(others for *_, others in grid.rows)
        for text in (markdown(grid), latex(grid)):
            assert "Table 3" not in text
            assert "re-run" not in text


def test_published_figures_are_shares_of_known_sources():
    for row in published():
        assert row.source in ("table-3", "re-run")
        assert all(0.4 < row.figures[figure].mean < 1 for figure in ("balanced_accuracy", "auroc"))
    keys = [(row.source, row.model, row.method, row.dataset) for row in published()]
    assert len(keys) == len(set(keys))


# --- markdown ---------------------------------------------------------------------------------------------------------


def test_every_markdown_row_has_the_same_cells(tmp_path):
    for grid in grids(*two_runs(tmp_path)):
        caption, blank, *lines, last = markdown(grid).split("\n")
        assert caption.startswith(
            ("Mean ± standard deviation", "Ensemble of 3 fold models", "Differences of every two runs")
        )
        assert (blank, last) == ("", "")
        assert len(lines) == 2 + len(grid.rows)
        assert {len(pipe_cells(line)) for line in (lines[0], *lines[2:])} == {7}
        assert lines[1] == "|---|" + "|".join(["--:"] * 6) + "|"


def hostile(*, others: bool = False) -> Grid:
    """Every name twice: as a run and as a heading."""
    cells = tuple(Cell(".500", "[.400, .600]", best=k == 0) for k in range(2 * len(HOSTILE)))
    return Grid("A caption of " + ", ".join(HOSTILE), HOSTILE, tuple((name, cells, others) for name in HOSTILE))


def test_names_cannot_break_a_markdown_table():
    caption, blank, head, rule, *rows, last = markdown(hostile()).split("\n")
    assert (blank, last) == ("", "")
    assert len(rows) == len(HOSTILE)
    assert {len(pipe_cells(line)) for line in (head, *rows)} == {1 + 2 * len(HOSTILE)}
    assert len(rule.strip("|").split("|")) == 1 + 2 * len(HOSTILE)
    for line in (caption, head, *rows):
        plain = re.sub(r"\\.", "", line).replace("**.500**", "")
        assert not re.search(r"[<>*_`\[\]#&~$]", plain.replace("[.400, .600]", "")), line
        assert all(letter.isprintable() for letter in line)


def test_markdown_is_read_as_it_was_meant():
    markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py comes with rich")
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(markdown(hostile()))
    assert html.count("<table>") == 1
    assert html.count("<tr>") == 1 + len(HOSTILE)
    assert not re.search(r"<(script|img|em|a|h\d)\b", html)
    for name in HOSTILE:
        if name.isprintable():
            escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
            assert f"<td>{escaped}</td>" in html


# --- LaTeX ------------------------------------------------------------------------------------------------------------


def depth(text: str) -> int:
    """Open braces less closed ones, which must never be fewer than none."""
    level = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        level += 1 if brace == "{" else -1
        assert level >= 0, text
    return level


def test_every_latex_row_has_the_same_columns(tmp_path):
    for grid in grids(*two_runs(tmp_path)):
        text = latex(grid)
        assert depth(text) == 0
        assert "\\begin{tabular}{lrrrrrr}" in text
        assert "\\cmidrule(lr){2-3}\\cmidrule(lr){4-5}\\cmidrule(lr){6-7}" in text
        body = text.split("\\midrule\n")[1].split("\\bottomrule")[0]
        rows = [row for row in body.strip().split("\n") if row != "\\addlinespace"]
        assert len(rows) == len(grid.rows)
        assert all(row.endswith(" \\\\") for row in rows)
        assert all(row.count(" & ") == 6 for row in rows if not row.startswith("\\multicolumn{7}"))
        assert ("\\quad\\textit{uni: paper, Table 3}" in body) == ("standard deviation" in grid.caption)
        assert ("\\textbf{." in body) == (not grid.caption.startswith("Differences"))
        assert "±" not in text
        for begun in ("table", "tabular"):
            assert text.count(f"\\begin{{{begun}}}") == text.count(f"\\end{{{begun}}}") == 1


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a & b", r"a \& b"),
        ("50 %", r"50 \%"),
        ("$x$", r"\$x\$"),
        ("#1", r"\#1"),
        ("a_b", r"a\_b"),
        ("{a}", r"\{a\}"),
        ("~", r"\textasciitilde{}"),
        ("^", r"\textasciicircum{}"),
        ("\\", r"\textbackslash{}"),
        ("<a>", r"\textless{}a\textgreater{}"),
        (r"\input{x}", r"\textbackslash{}input\{x\}"),
        ("[1]", "{[}1]"),
        ("*", "{*}"),
    ],
)
def test_latex_s_own_letters_are_escaped(text, escaped):
    grid = Grid(text, (text,), ((text, (Cell(text, text), Cell(text, best=True)), False),))
    made = latex(grid)
    assert f"\\caption{{{escaped}}}" in made
    assert f"\\multicolumn{{2}}{{c}}{{{escaped}}}" in made
    assert f"\n{escaped} & {escaped} {{\\scriptsize {escaped}}} & \\textbf{{{escaped}}} \\\\\n" in made


def test_names_cannot_break_a_latex_table():
    for others in (False, True):
        comment, text = latex(hostile(others=others)).split("\n", 1)
        assert comment == r"% \usepackage{booktabs}"
        assert depth(text) == 0
        assert not re.search(r"(?<!\\)[%$#_~^]", text.replace(r"$\pm$", ""))
        body = text.split("\\midrule\n")[1].split("\n\\bottomrule")[0].split("\n")
        assert len(body) == len(HOSTILE)
        assert all(len(re.findall(r"(?<!\\)&", row)) == 2 * len(HOSTILE) for row in body)
        assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_latex_compiles(tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex (apt-get install texlive-latex-extra)")
    made_run(tmp_path / "runs", "uni")
    tables = [*grids(*collected(tmp_path / "runs")), hostile(), hostile(others=True)]
    lines = ["\\documentclass{article}", "\\usepackage{booktabs}", "\\begin{document}", *map(latex, tables)]
    (tmp_path / "t.tex").write_text("\n".join([*lines, "\\end{document}"]))
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-no-shell-escape", "t.tex"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]


# --- on a terminal ----------------------------------------------------------------------------------------------------


def shown(*records: RunRecord) -> str:
    console = Console(width=240, markup=False, highlight=False)
    with console.capture() as capture:
        for table in result_tables(records):
            console.print(table)
    return capture.get()


def with_metrics(folder: Path) -> RunRecord:
    return replace(read_run(folder), metrics=evaluate(read_predictions(folder), resampling=QUICK))


def test_ensembles_are_shown_with_their_intervals(tmp_path):
    first, second = (
        with_metrics(made_run(tmp_path, "uni")),
        with_metrics(made_run(tmp_path, "virchow", seed=1, tables={"ami-br": TABLES["ami-br"]})),
    )
    text = shown(first, second)
    for record in (first, second):
        assert f"{record.figures.threshold:.3f}" in text
        for name, metrics in record.figures.sets.items():
            assert f"{metrics.folds['auroc'].mean:.4f} ± {metrics.folds['auroc'].std:.4f}" in text
            assert (metrics.ensemble is None) == name.endswith(VALIDATION)
            if metrics.ensemble is not None:
                figure = metrics.ensemble.figures["auroc"]
                assert f"{figure.value:.4f} ({figure.low:.3f}–{figure.high:.3f})" in text
    assert "95% intervals" in text
    for heading in ("6 slides", "24 samples", "12 slides"):
        assert heading in text
    assert "nan" not in text


def test_figures_that_do_not_exist_are_dashes_on_a_terminal(tmp_path):
    alone = patches("alone", 24)
    tables = {"mine": patches("mine", 36, test_from=36), "alone": alone.select(alone.label == 0)}
    record = with_metrics(
        made_run(tmp_path, tables=tables, train="mine", predictions=predicted(tables, "mine", signal=2))
    )
    text = shown(record)
    assert "None" not in text
    assert "–" in text


# --- in a notebook ----------------------------------------------------------------------------------------------------


def test_results_show_themselves_in_a_notebook(tmp_path):
    made_run(tmp_path, "uni")
    made_run(tmp_path, "<b>", seed=1)
    report, runs = collected(tmp_path)
    first = report.sets[0]
    ensemble = ensemble_of(runs[0].predictions, "ami-br", "test")
    assert repr(ensemble) == f"Ensemble(ami-br/test: 24 patches, 8 positive, threshold {ensemble.threshold:.3f})"
    judgement = first.comparison.judgements["uni probe"]
    auroc = judgement.figures["auroc"]
    assert f"auroc {auroc.value:.3f} ({auroc.low:.3f}–{auroc.high:.3f})" in repr(judgement)
    assert repr(judgement).startswith("Judgement(24 patches, 8 positive, 6 slides: balanced_accuracy ")
    assert repr(report).startswith("Report(2 runs trained on ami-br, 3 folds: ami-br/test, ")
    html = report._repr_html_()
    assert html.count("<table>") == len(report.sets)
    rank = first.comparison.ranks["auroc"]["uni probe"].value
    assert f"<td>{auroc}</td><td>{rank}</td>" in html
    assert "&lt;b&gt; probe" in html
    assert "<b>" not in html
