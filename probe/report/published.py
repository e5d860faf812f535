"""What has been published on these test sets? It stands next to our figures, never among them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from features.samples import TEST
from probe.candidates import TEXT_TRANSFORM, TRAINED_VIEWS
from probe.records import RunRecord

SOURCES = {"table-3": "paper, Table 3", "re-run": "authors' re-run"}
FIGURES = {"balanced_accuracy": "bal. acc.", "auroc": "AUROC"}  # those that were published, in print
FIGURES_OF_MORE = FIGURES | {"auroc": "macro AUROC"}  # of more than two classes, of which nothing was
SAME = " (same figures as Table 3)"  # printed behind a source whose figures are no second measurement
_FOLDS, _PAPER_FOLDS = 5, "AMi-Br, sklearn-1.7, frozen"  # see features/folds.py
TRAINED_ON = "ami-br"  # what the published models were trained on


@dataclass(frozen=True)
class PublishedFigure:
    """A published mean over fold models and its standard deviation, where it was given."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Published:
    """What one source published of one model on one test set.

    Attributes:
        source: key of `SOURCES`.
        model, method: as a run's record names them.
        dataset: the test set.
        figures: figure (`FIGURES`) to its value.
        date: "2025-06-09" or "2025-06", as printed beside the figures; empty where they are not dated.
        same_as_table_3: of a re-run whose figures are those of Table 3 to the last digit: no second measurement.
    """

    source: str
    model: str
    method: str
    dataset: str
    figures: Mapping[str, PublishedFigure]
    date: str = ""
    same_as_table_3: bool = False

    @property
    def title(self) -> str:
        """Where the figures stand, in print; with a warning where they are no second measurement."""
        return SOURCES[self.source] + (SAME if self.same_as_table_3 else "")


@cache
def published() -> tuple[Published, ...]:
    """Read all published figures, those of each source in its order.

    Sources: Table 3 of Banerjee et al. 2025 (arXiv 2506.21444v1), and the authors' later re-run in the notebooks of the
    AMi-Br_Benchmark repository (commit 3acf4dad). Means over five fold models on the same test images. Of the re-run,
    the standard deviations are known where its figures are those of Table 3; tests/check_published.py compares.
    """
    with files("probe.report").joinpath("published.csv").open(encoding="utf-8") as file:
        return tuple(
            Published(
                row["source"],
                row["model"],
                row["method"],
                row["dataset"],
                {
                    name: PublishedFigure(float(row[name]), float(std) if (std := row[f"{name}_std"]) else None)
                    for name in FIGURES
                },
                row["date"],
                row["same_as_table_3"] == "yes",
            )
            for row in csv.DictReader(file)
        )


def departures(record: RunRecord, source: str) -> tuple[str, ...]:
    """Say in words what a run did otherwise than the published ones, as far as its record tells.

    Table 3 is compared with the paper's section 4, the re-run with the authors' scripts; see docs/protocol.md.

    Args:
        record: of the run.
        source: key of `SOURCES`.

    Returns:
        A phrase for each difference; none for a run by the same protocol.
    """
    return (*_folds_of(record), *_input_of(record, source), *_fit_of(record, source))


def _folds_of(record: RunRecord) -> list[str]:
    said = []
    if record.folds.names:
        said.append(f"{record.folds.n} folds by domain instead of five of slides")
    elif record.folds.n != _FOLDS:
        said.append(f"{record.folds.n} folds instead of five")
    elif record.folds.source != _PAPER_FOLDS:
        said.append("another assignment of slides to the five folds")
    if len(record.seeds) > 1:
        said.append(f"{len(record.seeds)} trainings per fold instead of one")
    return said


def _input_of(record: RunRecord, source: str) -> list[str]:
    if record.kind == "ensemble" or record.combined:
        return [
            f"{len(record.each_part)} {'runs' if record.kind == 'ensemble' else 'embeddings'} together instead of one"
        ]
    said = []
    seen = record.embedding.get("transform", {})
    is_text = bool(seen) and all(seen.get(name) == value for name, value in TEXT_TRANSFORM.items())
    is_text |= record.view == TRAINED_VIEWS["paper"]
    if not record.view.startswith("full"):
        said.append(f"view {record.view} instead of the whole patch")
    elif source == "table-3" and not is_text:
        said.append("the patch as the model's card prepares it instead of at 224 pixels with ImageNet's statistics")
    elif source == "re-run" and record.view != "full" and record.options.get("recipe") != "authors":
        said.append(f"view {record.view} instead of the patch as the model's card prepares it")
    if "+flips" in record.view:
        said.append("embeddings are means over eight flips and turns")
    if record.pooling not in ("card", record.card_pooling):
        said.append(f"pooling {record.pooling} instead of the card's")
    return said


def _fit_of(record: RunRecord, source: str) -> list[str]:
    if record.kind == "ensemble":
        return []
    name, theirs = str(record.options.get("recipe", "exact")), {"table-3": "paper", "re-run": "authors"}[source]
    said = []
    if record.kind == "probe" and name == "exact":
        said.append(
            "logistic regression solved exactly at a strength chosen in training data instead of training by Adam"
        )
    elif record.kind == "probe" and source == "table-3":
        said.append("no augmentation, as embeddings are frozen")
    if name not in ("exact", theirs):
        recipe = record.recipe or {}
        how = f" ({recipe['optimizer']}, {recipe['epochs']} epochs at most)" if "optimizer" in recipe else ""
        said.append(f"recipe {name}{how} instead of that of the {'text' if source == 'table-3' else 'scripts'}")
    if (record.recipe or {}).get("tta"):
        said.append("scores are means over eight flips and turns")
    if record.options.get("soft_labels"):
        said.append("trained towards the raters' votes")
    return said


def published_on(dataset: str, split: str, *, train: str) -> list[Published]:
    """List what was published on a test set, of models trained on the same data."""
    if split != TEST or train != TRAINED_ON:
        return []
    return [row for row in published() if row.dataset == dataset]


def published_for(record: RunRecord, dataset: str, split: str) -> dict[str, Published]:
    """Find what was published of a run's model and method on a test set, by source."""
    return {
        row.source: row
        for row in published_on(dataset, split, train=record.train)
        if (row.model, row.method) == (record.model, record.method)
    }
