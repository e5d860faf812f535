"""Does the check of the published figures find every cell that is not as published?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from check_published import BASELINES, DATASETS, MODELS, differences, in_re_run, in_table_3, main
from conftest import REPOSITORY

from probe.report.published import FIGURES, Published, PublishedFigure, published

PAPER = REPOSITORY.parent / "shared" / "paper" / "banerjee2025.txt"
RE_RUN = REPOSITORY.parent / "shared" / "facts" / "published_results.md"


def test_no_published_cell_differs() -> None:
    if not (PAPER.exists() and RE_RUN.exists()):
        pytest.skip(f"no text of the paper at {PAPER}")
    assert main(str(PAPER), str(RE_RUN)) == 0


def as_printed(rows: Sequence[Published]) -> tuple[str, str]:
    """Table 3 in LaTeX, the best of a column in bold, and the re-run's means as a Markdown table."""
    figures = {(row.source, row.model, row.method, row.dataset): row.figures for row in rows}
    lines = []
    for models, method in ((BASELINES, "full"), (MODELS, "probe"), (MODELS, "lora")):
        columns = [" ".join(models)]
        for dataset in DATASETS:
            for figure in FIGURES:
                of = [figures["table-3", model, method, dataset][figure] for model in models]
                cells = [f"{one.mean:.4f} \\pm {one.std:.4f}" for one in of]
                cells[0] = f"\\textbf{{{of[0].mean:.4f}}} \\pm {of[0].std:.4f}"
                columns.append("$\\begin{array}{c} " + " \\\\ ".join(cells) + " \\end{array}$")
        lines.append("\t".join(columns))
    titles = {"full": {model: model for model in BASELINES} | {"vit-l": "ViT-L/16"}}
    titles |= {method: {m: f"{m.upper()} {method} (a remark)" for m in MODELS} for method in ("probe", "lora")}
    table = ["| model | AMi-Br test | AtNorM-Br | AtNorM-MD |", "|---|---|---|---|"]
    for method, of_models in titles.items():
        for model, title in of_models.items():
            cells = [
                " ".join(f"{figures['re-run', model, method, dataset][figure].mean:.4f}"[1:] for figure in FIGURES)
                for dataset in DATASETS
            ]
            table.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines), "\n".join(table)


def changed(row: Published, name: str, **values: float) -> Published:
    return replace(row, figures={**row.figures, name: replace(row.figures[name], **values)})


def test_a_cell_that_is_not_as_published_is_found() -> None:
    rows = published()
    table_3, re_run = map(lambda read, text: read(text), (in_table_3, in_re_run), as_printed(rows))
    assert sum(len(cells) for cells in (*table_3.values(), *re_run.values())) == 51 * 4 + 51 * 2

    def found(*mutants: Published) -> list[str]:
        mutated = {(row.source, row.model, row.method, row.dataset): row for row in (*rows, *mutants)}
        return list(differences(list(mutated.values()), table_3, re_run))

    assert found() == []
    first = next(row for row in rows if row.source == "table-3")
    repeated = next(row for row in rows if row.same_as_table_3)
    again = next(row for row in rows if row.source == "re-run" and not row.same_as_table_3)
    assert again.figures["auroc"].std is None
    for mutant in (
        changed(first, "auroc", mean=first.figures["auroc"].mean + 1e-4),
        changed(first, "balanced_accuracy", std=0.0001),
        changed(again, "balanced_accuracy", mean=0.5),
        changed(again, "auroc", std=0.01),
        changed(repeated, "auroc", std=0.0001),
        replace(again, same_as_table_3=True),
        replace(repeated, same_as_table_3=False),
        replace(first, dataset="atnorm-xy"),
    ):
        assert len(found(mutant)) == 1, mutant
    assert len(list(differences(rows[1:], table_3, re_run))) == 1


def test_eighteen_rows_of_the_re_run_are_no_second_measurement() -> None:
    same = [row for row in published() if row.same_as_table_3]
    assert {(row.model, row.method) for row in same} == {
        ("prov-gigapath", "probe"),
        *((model, "lora") for model in ("uni", "uni2-h", "virchow", "virchow2", "prov-gigapath")),
    }
    assert (len(same), {row.title for row in same}) == (18, {"authors' re-run (same figures as Table 3)"})
    others = {row.title for row in published() if not row.same_as_table_3}
    assert others == {"paper, Table 3", "authors' re-run"}


def test_dates_are_those_stamped_in_the_notebooks() -> None:
    dates = {(row.method, row.date) for row in published() if row.source == "re-run"}
    assert dates == {
        ("full", "2025-07-13"),
        ("probe", "2025-07-13"),
        ("probe", "2025-06-09"),
        ("probe", "2025-12-11"),
        ("lora", ""),
    }
    late = {row.model for row in published() if row.date == "2025-12-11"}
    assert late == {"h-optimus-0", "h-optimus-1"}
    assert {row.model for row in published() if row.date == "2025-06-09"} == {"prov-gigapath"}
    assert PublishedFigure(0.6091, 0.0140) in {
        row.figures["balanced_accuracy"] for row in published() if row.date == "2025-06-09"
    }
