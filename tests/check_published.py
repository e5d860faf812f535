"""Are the published figures that reports print those of the paper and of the authors' re-run, cell by cell?

    python tests/check_published.py PAPER.txt RE-RUN.md

PAPER.txt is the text of arXiv 2506.21444v1 with Table 3 in LaTeX, RE-RUN.md has a table of the re-run's means, a row
per model and method. What differs from probe/report/published.csv is printed, and the exit status is then 1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from probe.report.published import FIGURES, Published, published

DATASETS = ("ami-br", "atnorm-br", "atnorm-md")
MODELS = ("uni", "uni2-h", "virchow", "virchow2", "prov-gigapath", "h-optimus-0", "h-optimus-1")
BASELINES = ("efficientnetv2-m", "vit-l", "swin-b")
Row = tuple[str, str, str]  # model, method, dataset
Cells = Mapping[Row, Mapping[str, str]]  # figure, or figure_std, to what is printed


def in_table_3(text: str) -> Cells:
    """Read Table 3: three lines of six columns (two figures of three test sets), each with a cell per model."""
    columns = [
        [re.findall(r"(0\.\d{4})\}? *\\pm *(0\.\d{4})", column) for column in line.split("\t")[1:]]
        for line in text.splitlines()
        if line.count(r"\pm") > 6
    ]
    names = [[(model, "full") for model in BASELINES], *([(m, method) for m in MODELS] for method in ("probe", "lora"))]
    if [[len(column) for column in line] for line in columns] != [[len(of)] * 6 for of in names]:
        raise SystemExit(f"no Table 3 of 17 rows and 6 columns found: {[list(map(len, line)) for line in columns]}")
    cells: dict[Row, dict[str, str]] = {}
    for line, of in zip(columns, names, strict=True):
        for k, column in enumerate(line):
            dataset, figure = DATASETS[k // 2], tuple(FIGURES)[k % 2]
            for (model, method), (mean, std) in zip(of, column, strict=True):
                cells.setdefault((model, method, dataset), {}).update({figure: mean, f"{figure}_std": std})
    return cells


def in_re_run(text: str) -> Cells:
    """Read the table of the re-run: `| UNI probe | .6339 .6949 | ... |`, two figures of each test set."""
    rows = re.findall(r"^\| ([^|]+?) \|" + r" \.(\d{4}) \.(\d{4}) \|" * 3, text, flags=re.MULTILINE)
    cells: dict[Row, dict[str, str]] = {}
    for title, *digits in rows:
        model, _, method = re.sub(r" \(.*\)", "", title).lower().rpartition(" ")
        if method not in ("probe", "lora"):
            model, method = method.removesuffix("/16"), "full"
        for k, dataset in enumerate(DATASETS):
            figures = zip(FIGURES, digits[2 * k : 2 * k + 2], strict=True)
            cells[model, method, dataset] = {figure: f"0.{four}" for figure, four in figures}
    return cells


def differences(rows: Sequence[Published], table_3: Cells, re_run: Cells) -> Iterator[str]:
    """Yield what differs: a cell, a row too many or too few, or a mark on a row that is or is no second measurement."""
    for source, cells in (("table-3", table_3), ("re-run", re_run)):
        found = {(row.model, row.method, row.dataset): row for row in rows if row.source == source}
        yield from (f"{source} {key}: not in both" for key in found.keys() ^ cells.keys())
        for key in found.keys() & cells.keys():
            row, expected = found[key], dict(cells[key])
            same = source == "re-run" and all(expected[figure] == table_3[key][figure] for figure in FIGURES)
            if same:  # what is measured once has one standard deviation
                expected |= table_3[key]
            if row.same_as_table_3 != same:
                yield f"{source} {key}: marked {row.same_as_table_3}, its figures are Table 3's: {same}"
            for figure, value in row.figures.items():
                for name, number in ((figure, value.mean), (f"{figure}_std", value.std)):
                    printed = None if number is None else f"{number:.4f}"
                    if printed != expected.get(name):
                        yield f"{source} {key}: {name} {printed}, published {expected.get(name)}"


def main(paper: str, re_run: str) -> int:
    """Print what differs; return the exit status."""
    table_3, later = in_table_3(Path(paper).read_text()), in_re_run(Path(re_run).read_text())
    found = sorted(differences(published(), table_3, later))
    n_cells = sum(len(cells) for of in (table_3, later) for cells in of.values())
    print("\n".join([*found, f"{n_cells} published cells, {len(found)} differ"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
