"""How are the measures of embeddings shown: on a terminal, on the page, and as rows of a table?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from features.alterations import ALTERATIONS
from probe.measure_records import MEASURES, Figure, MeasureRecord, all_measures, newest_figures
from probe.report.read import Run

# What a table shows of a measure, in words; a name with a number or another word after it is explained by its first.
_WORDS = {
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "draws": "95 % of draws",
    "precision": "precision at",
    "average_precision": "mean average precision",
    "ari": "adjusted Rand index:",
    "nmi": "mutual information:",
    "index": "index, confounder:",
    "balanced": "balanced index, confounder:",
    "margin": "margin, confounder:",
    "balanced_margin": "balanced margin, confounder:",
    "cosine": "cosine:",
    "found": "found:",
    "cka": "linear CKA",
    "mutual": "mutual neighbours",
}
LEADS = {
    "knn": "Each patch gets the class of most of its nearest training patches (cosine; k chosen on training patches). "
    "Of the training set itself: of the nearest on other slides.",
    "fewshot": "Each patch gets the class whose mean over a few labelled training patches is nearest: the mean over "
    "1,000 draws of these, and the range in which 95 % of the draws lie.",
    "retrieval": "Of the patches on other slides most like a patch, the share with its class; mean over classes.",
    "clustering": "Clusters by k-means, as many as classes: do they agree with the classes, or with domains and "
    "slides?",
    "robustness": "Among the ten nearest patches: those of the same class elsewhere, against those of another class "
    "from the same place. 1: the class alone counts; 0: the place alone. Margin: how much nearer the five nearest of "
    "the one kind are than those of the other, the median over patches; above 0 the class is nearer. Balanced: among "
    "equally many patches of each class and place, the mean of ten draws.",
    "invariance": "A patch and its altered self: their cosine after centring (by chance: that of two patches), and the "
    "share of patches whose nearest altered patch is their own.",
    "alignment": "Do two backbones see the same? 1: the same up to rotation (CKA), the same ten neighbours (mutual).",
}
_TERMINAL = (
    ("knn", "balanced_accuracy", "k-NN\nbal. acc."),
    ("knn", "auroc", "k-NN\nAUROC"),
    ("fewshot", "balanced_accuracy 1", "1 shot\nbal. acc."),
    ("fewshot", "balanced_accuracy 16", "16 shots\nbal. acc."),
    ("fewshot", "balanced_accuracy 64", "64 shots\nbal. acc."),
    ("retrieval", "precision 1", "Retrieval\nprecision at 1"),
    ("retrieval", "average_precision", "Retrieval\nmAP"),
    ("clustering", "ari class", "Clusters\nARI of classes"),
    ("robustness", "index domain", "Robustness\nof domains"),
    ("robustness", "balanced domain", "Robustness\nbalanced"),
    ("robustness", "balanced_margin domain", "Margin\nbalanced"),
    ("robustness", "index slide", "Robustness\nof slides"),
)


@dataclass(frozen=True)
class MeasureTable:
    """A table of the page: one measure on one set; a row per embedding or pair, None where there is no such figure.

    `chances` are what figures would be if embeddings said nothing, by column; None where rows differ in that.
    """

    title: str
    lead: str
    set: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[Figure | None, ...]]
    chances: tuple[float | None, ...]


def figures_beside(runs: Sequence[Run]) -> list[Figure]:
    """Find the newest measures that lie among runs and are of the same training patches.

    Raises:
        UserError: as `probe.measure_records.read_measures`.
    """
    single = [run for run in runs if not run.members]
    tables = {(run.record.train, run.record.table_digests.get(run.record.train)) for run in single}
    found = [record for folder in dict.fromkeys(run.folder.parent for run in single) for record in all_measures(folder)]
    found.sort(key=lambda record: (record.created, record.id), reverse=True)
    return newest_figures([one for one in found if (one.train, one.table_digests.get(one.train)) in tables])


def measure_tables(runs: Sequence[Run]) -> list[MeasureTable]:
    """Tabulate the measures beside runs, for the page; an empty list where there are none."""
    return tabulate(figures_beside(runs))


def tabulate(figures: Sequence[Figure]) -> list[MeasureTable]:
    """Make a table per measure and set, rows and columns in the order in which figures come."""
    tables = []
    for measure, title in MEASURES.items():
        of_measure = [one for one in figures if one.measure == measure]
        for dataset, split in dict.fromkeys((one.dataset, one.split) for one in of_measure):
            own = {(one.embedding, one.name): one for one in of_measure if (one.dataset, one.split) == (dataset, split)}
            names = sorted(dict.fromkeys(name for _, name in own), key=_order)
            n = next(iter(own.values())).n
            rows = {
                embedding: tuple(own.get((embedding, name)) for name in names)
                for embedding in dict.fromkeys(embedding for embedding, _ in own)
            }
            tables.append(
                MeasureTable(
                    title=title,
                    lead=LEADS[measure],
                    set=f"{dataset} {split}, {n:,} patches",
                    columns=tuple(map(in_words, names)),
                    rows=rows,
                    chances=tuple(map(_same_chance, zip(*rows.values(), strict=True))),
                )
            )
    return tables


def _same_chance(column: Sequence[Figure | None]) -> float | None:
    """Give what all figures of a column would be by chance, if that is one number in print."""
    chances = {None if one.chance is None else round(one.chance, 3) for one in column if one is not None}
    return chances.pop() if len(chances) == 1 else None


def _order(name: str) -> tuple[int, str]:
    """Put figures with a number in its order, each beside what is told of the same number."""
    number = name.split()[-1]
    return (int(number), "") if number.isdigit() else (10**6, "")


def in_words(name: str) -> str:
    """Say what a figure is.

    >>> in_words("precision 5"), in_words("balanced_accuracy 16"), in_words("cosine rot90")
    ('precision at 5', '16 shots: balanced accuracy', 'cosine: rot90')
    """
    first, _, more = name.partition(" ")
    if first in ("balanced_accuracy", "draws") and more:
        return f"{more} shot{'s' * (more != '1')}: {_WORDS[first]}"
    return f"{_WORDS.get(first, first)} {more}".strip()


# ------------------------------------------------------------------------------------------------------------ terminal


def terminal_tables(record: MeasureRecord) -> list[Table]:
    """Tabulate the main figures: a table per set with a row per backbone; altered patches; pairs of backbones."""
    found = {(one.dataset, one.split, one.embedding, one.measure, one.name): one for one in record.figures}
    sets = list(dict.fromkeys((one.dataset, one.split) for one in record.figures))
    labels = [one.label for one in record.embeddings]
    chosen = {one.label: one.neighbours for one in record.embeddings}
    altered = [
        ("invariance", f"{what} {name}", f"{what}\n{name}") for name in ALTERATIONS for what in ("cosine", "found")
    ]
    pairs = [("alignment", "cka", "linear CKA"), ("alignment", "mutual", "mutual\nneighbours")]
    kinds = {"": list(_TERMINAL), "altered patches, ": altered, "pairs of backbones, ": pairs}
    tables = []
    for title, columns in kinds.items():
        for dataset, split in sets:
            rows = labels
            if columns[0][0] == "alignment":
                rows = list(dict.fromkeys(one.embedding for one in record.figures if one.measure == "alignment"))
            cells = {
                label: [found.get((dataset, split, label, measure, name)) for measure, name, _ in columns]
                for label in rows
            }
            used = [k for k in range(len(columns)) if any(row[k] for row in cells.values())]
            if not used:
                continue
            n = next(one.n for row in cells.values() for one in row if one)
            shown = [one.interval for row in cells.values() for k in used if (one := row[k])]
            ends = "; 95% intervals" if any(one.low == one.low for one in shown) else ""
            table = Table(title=f"{title}{dataset} {split}, {n:,} patches{ends}", title_style="bold")
            table.add_column("Embedding")
            for k in used:
                table.add_column(columns[k][2], justify="right")
            for label, row in cells.items():
                if any(row[k] for k in used):
                    k_of = chosen.get(label) if columns[used[0]][0] == "knn" else None
                    table.add_row(label + (f"\nk-NN with k = {k_of}" if k_of else ""), *(_cell(row[k]) for k in used))
            chances = [_same_chance([row[k] for row in cells.values()]) for k in used]
            said = ["" if chance is None else f"{chance:.3f}" for chance in chances]
            if any(said):
                table.add_section()
                table.add_row("by chance", *said, style="dim")
            tables.append(table)
    return tables


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    one = figure.interval
    return "–" if one.value != one.value else f"{one.value:.3f}" + (f"\n{one.ends}" if one.ends else "")
