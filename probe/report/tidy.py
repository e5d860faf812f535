"""Which figures does a report hold, one in each row of a table for R or pandas?"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

from features.labels import Classes
from probe.measure_records import Figure
from probe.metrics import FoldFigure, Interval, Judgement
from probe.report.collect import Report, SetReport
from probe.report.measures import figures_beside
from probe.report.read import Run
from probe.resample import SLIDE

COLUMNS = (
    "run",  # its id, the name of its folder
    "label",  # its name in the report
    "backbone",
    "method",
    "recipe",
    "view",
    "pooling",
    "train",  # the training set
    "dataset",
    "split",  # test; unseen: without patches known from training; validation: out of fold
    "domain",  # of the patches; empty for all of them
    "of",  # fold models: the mean over them; ensemble; mean of domains: of the ensemble; or a key of `MEASURES`
    "figure",
    "class",  # that the figure is of, against all others; empty for the task's
    "value",
    "std",  # over fold models
    "low",
    "high",
    "interval",  # what was resampled, slides or patches; or Clopper-Pearson
    "low_wide",  # where slides are not known: the ends at the largest plausible design effect
    "high_wide",
    "level",  # of the interval
    "threshold",  # of the ensemble
    "n_patches",
    "n_slides",
    "n_folds",
    "n_trainings",
    "seed",  # of the first training
    "fold_seed",
    "folds_digest",
    "embedding",  # fingerprints, of several embeddings joined by +
    "weights",  # SHA-256, likewise
    "chance",  # of a measure: the value if embeddings said nothing
)


def tidy(report: Report, runs: Mapping[str, Run]) -> str:
    """Tabulate every figure of a report: CSV with a row per run, set, domain and figure, and the columns `COLUMNS`.

    Numbers have all their digits; what does not exist is an empty cell. Out of fold, an ensemble's row is of each patch
    by the model that had not trained on it. Measures of embeddings that lie among the runs come last.

    Args:
        report: of `probe.report.collect`.
        runs: label to run.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for on in report.sets:
        for label in on.comparison.judgements:
            same = _of_run(runs[label], on)
            writer.writerows({name: _cell(value) for name, value in (same | row).items()} for row in _rows(on, label))
    for figure in figures_beside(list(runs.values())):
        writer.writerow({name: _cell(value) for name, value in _of_measure(figure).items()})
    return text.getvalue()


def _of_run(run: Run, on: SetReport) -> dict[str, Any]:
    record, parts = run.record, run.record.each_part
    if run.members:
        parts = tuple(part for member in run.members for part in member.record.each_part)
    fingerprints = [part.fingerprints.get(on.dataset, "") for part in parts]
    return {
        "run": record.id,
        "label": run.label,
        "backbone": record.model,
        "method": record.method,
        "recipe": record.options.get("recipe"),
        "view": record.view,
        "pooling": record.pooling,
        "train": record.train,
        "dataset": on.dataset,
        "split": on.split,
        "n_folds": record.folds.n,
        "n_trainings": None if run.members else len(record.seeds),
        "seed": None if run.members else record.seeds[0],
        "fold_seed": record.folds.seed,
        "folds_digest": record.folds.digest,
        "embedding": "+".join(dict.fromkeys(filter(None, fingerprints))),
        "weights": "+".join(dict.fromkeys(part.weights_sha256 for part in parts if part.weights_sha256)),
    }


def _rows(on: SetReport, label: str) -> Iterator[dict[str, Any]]:
    """Give the rows of one run on one set, without what is the same in all of them."""
    judgement = on.comparison.judgements[label]
    about = _about(judgement)
    for name, figure in on.folds[label].items():
        counted = {name: about[name] for name in ("n_patches", "n_slides")}
        yield {"of": "fold models", **_named(name, on.classes), **_of_folds(figure), **counted}
    for name, one in judgement.figures.items():
        yield {"of": "ensemble", **_named(name, on.classes), **_with_interval(one, judgement), **about}
    if view := on.domains.get(label):
        for name, one in view.macro.items():
            yield {"of": "mean of domains", **_named(name, on.classes), **_with_interval(one, judgement), **about}
        for domain, of in view.domains.items():
            for name, one in of.figures.items():
                named = {"domain": domain, "of": "ensemble", **_named(name, on.classes)}
                yield named | _with_interval(one, of) | _about(of)


def _of_measure(figure: Figure) -> dict[str, Any]:
    drawn = {"slide": "slides", "sample": "patches", "draw": "draws"}
    low_wide, high_wide = figure.wide or (None, None)
    row = {
        "label": figure.embedding,
        "method": "measure",
        "dataset": figure.dataset,
        "split": figure.split,
        "of": figure.measure,
        "figure": figure.name,
        "value": figure.value,
        "n_patches": figure.n,
        "n_slides": figure.n_clusters if figure.unit == "slide" else None,
        "chance": figure.chance,
    }
    if figure.low is None or math.isnan(figure.low):
        return row
    return row | {
        "low": figure.low,
        "high": figure.high,
        "interval": drawn[figure.unit],
        "low_wide": low_wide,
        "high_wide": high_wide,
        "level": 0.95,
    }


def _about(judgement: Judgement) -> dict[str, Any]:
    n_slides = judgement.n_clusters - judgement.n_alone if judgement.unit == SLIDE else None
    return {"n_patches": judgement.n, "n_slides": n_slides, "threshold": judgement.threshold}


def _named(name: str, classes: Classes) -> dict[str, str]:
    """Name a figure; that of class 2 is "recall 2" in the report.

    >>> _named("recall 2", ("low", "middle", "high"))
    {'figure': 'recall', 'class': 'high'}
    """
    figure, _, k = name.partition(" ")
    return {"figure": figure, "class": classes[int(k)] if k else ""}


def _of_folds(figure: FoldFigure) -> dict[str, float]:
    return {"value": figure.mean, "std": figure.std}


def _with_interval(figure: Interval, judgement: Judgement) -> dict[str, Any]:
    if math.isnan(figure.low):
        return {"value": figure.value}
    drawn = "slides" if judgement.unit == SLIDE else "patches"
    low, high = figure.wide or (None, None)
    return {
        "value": figure.value,
        "low": figure.low,
        "high": figure.high,
        "interval": "Clopper-Pearson" if figure.exact else drawn,
        "low_wide": low,
        "high_wide": high,
        "level": judgement.level,
    }


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
