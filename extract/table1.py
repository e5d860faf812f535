"""What does Table 1 of the paper say of each dataset, recomputed from what is on this machine?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extract.benchmark import Figure
from extract.datasets import DATASETS, load_dataset, local_data
from features.console import UserError
from features.samples import Samples, audit, make_samples


@dataclass(frozen=True)
class DatasetSummary:
    """One column of the paper's Table 1.

    Attributes:
        name, title, annotation, species, source: as in `DatasetRecord`.
        n_atypical, n_normal: patches of each class; the published counts where nothing is on this machine.
        basis: what the numbers were computed from: "images", "tables" (the images are absent), or "record".
        agreement: the fraction of patches with a unanimous vote; None for a single rater.
        n_slides: distinct slides; None where they are not known.
        domains: patches per domain.
        n_duplicate_sets, n_duplicates, n_conflicts: sets of byte-identical patches, the patches in them, and the sets
            with both labels; None without images.
        note: why numbers are missing; empty when none is.
    """

    name: str
    title: str
    annotation: str
    species: str
    source: str
    n_atypical: int
    n_normal: int
    basis: str
    agreement: float | None = None
    n_slides: int | None = None
    domains: dict[str, int] | None = None
    n_duplicate_sets: int | None = None
    n_duplicates: int | None = None
    n_conflicts: int | None = None
    note: str = ""

    @property
    def n_total(self) -> int:
        return self.n_atypical + self.n_normal

    @property
    def atypical_rate(self) -> float:
        return self.n_atypical / self.n_total

    def as_json(self) -> dict[str, Any]:
        """Make the object that `--json` prints."""
        return asdict(self) | {"n_total": self.n_total, "atypical_rate": self.atypical_rate}


def table1(data: Path | None = None) -> list[DatasetSummary]:
    """Recompute Table 1 of the paper from the images and tables at hand (`data`); never downloads patches."""
    folder = local_data(data)
    return [_summary(name, folder) for name, record in DATASETS.items() if not record.of]


def other_labels() -> list[dict[str, Any]]:
    """List the known datasets that give patches of another one other labels: how many patches of each class."""
    return [
        {
            "name": name,
            "title": record.title,
            "of": record.of,
            "annotation": record.annotation,
            "n_total": sum(record.classes.values()),
            "classes": dict(record.classes),
        }
        for name, record in DATASETS.items()
        if record.of
    ]


def table1_rows(summaries: Sequence[DatasetSummary]) -> list[tuple[str, list[str]]]:
    """Put the table into words: the title of each row, and its cell for each dataset."""
    cells: dict[str, Callable[[DatasetSummary], str]] = {
        "Patches": lambda s: f"{s.n_total:,}",
        "Atypical": lambda s: f"{s.n_atypical:,}",
        "Normal": lambda s: f"{s.n_normal:,}",
        "Atypical rate": lambda s: f"{s.atypical_rate:.2%}",
        "Annotation": lambda s: s.annotation,
        "Expert agreement": lambda s: "–" if s.agreement is None else f"{s.agreement:.2%}",
        "Slides": lambda s: f"{s.n_slides:,}" if s.n_slides else "unknown",
        "Domains": lambda s: "\n".join(f"{name} {n:,}" for name, n in (s.domains or {}).items()) or "–",
        "Source": lambda s: s.source,
        "Species": lambda s: s.species,
        "Identical patches": _duplicates,
        "Computed from": lambda s: f"{s.basis}\n{s.note}".strip(),
    }
    return [(title, [cell(summary) for summary in summaries]) for title, cell in cells.items()]


def _duplicates(summary: DatasetSummary) -> str:
    if summary.n_duplicates is None:
        return "–"
    if not summary.n_duplicates:
        return "none"
    return f"{summary.n_duplicates} in {summary.n_duplicate_sets} sets, {summary.n_conflicts} contradicting"


def _summary(name: str, data: Path | None) -> DatasetSummary:
    record = DATASETS[name]
    samples, basis, note = None, "record", ""
    try:
        if not record.folder or (data is not None and (data / record.folder).is_dir()):
            samples, basis = load_dataset(name, data=data).samples, "images"
        elif data is None:
            note = "not downloaded yet, and no data folder given: published counts"
        elif record.figures is not None:
            samples, basis, note = _table_samples(record.figures(data)), "tables", "images absent"
        else:
            note = "images absent: published counts"
    except UserError as error:  # one damaged dataset must not hide the others
        note = str(error)
    described = (name, record.title, record.annotation, record.species, record.source)
    if samples is None:
        return DatasetSummary(*described, record.n_atypical, record.n_normal, basis, note=note)
    n_atypical = int(samples.label.sum())
    votes = samples.votes  # (n, n_raters)
    unanimous = (votes == votes[:, :1]).all(axis=1)
    duplicates = audit(samples) if basis == "images" else None
    return DatasetSummary(
        *described,
        n_atypical,
        len(samples) - n_atypical,
        basis,
        agreement=float(unanimous.mean()) if votes.shape[1] > 1 else None,
        n_slides=len(set(samples.group.tolist()) - {""}) or None,
        domains=dict(sorted(Counter(samples.domain[samples.domain != ""].tolist()).items())) or None,
        n_duplicate_sets=len(duplicates.duplicates) if duplicates else None,
        n_duplicates=sum(map(len, duplicates.duplicates)) if duplicates else None,
        n_conflicts=len(duplicates.conflicts) if duplicates else None,
        note=note,
    )


def _table_samples(figures: dict[str, Figure]) -> Samples:
    """Make a patch table of the dataset's tables alone, for counting: without images there are no digests."""
    columns = {name: [getattr(figure, name) for figure in figures.values()] for name in Figure._fields}
    votes = np.array(columns.pop("votes"), dtype=np.int8)
    return make_samples(list(figures), columns.pop("label"), sha256=[""] * len(figures), votes=votes, **columns)
