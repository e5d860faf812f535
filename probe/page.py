"""How does a report become one page that works anywhere, offline, for decades?

A template (Jinja2, everything escaped), a style sheet and a script are put into one file. Its content policy forbids
every request, and every script and style but these two, by their digests: a hostile file name cannot run, and nothing
leaves the page. Tables and figures are there without the script; it adds sorting, the gallery and the map.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from features.console import printable
from probe import charts
from probe.charts import N_STYLES, Line, Row
from probe.curve import summarise
from probe.evidence import COMPARED, Difference, as_dict
from probe.gallery import EmbeddingMap, GalleryPatches, Thumbnails
from probe.metrics import NAMES
from probe.predictions import VALIDATION
from probe.report import Report, Run, SetReport
from probe.tables import SOURCES, TRAINED_ON, PublishedFigure, published, published_for

TITLES = {
    "balanced_accuracy": "Balanced accuracy",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
    "mcc": "MCC",
    "brier": "Brier",
    "ece": "ECE",
}
_PICTURES = Markup("<!--pictures-->")  # no name can be taken for it: the template escapes them
_MANY = 8  # runs in one square plot; more are drawn apart by method
# Control characters, and those that turn the direction of what follows a name.
_UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def html(
    report: Report,
    runs: Sequence[Run],
    *,
    patches: GalleryPatches,
    maps: Sequence[EmbeddingMap],
    sizes: Mapping[str, int],
    has_pictures: bool,
) -> str:
    """The page, with a place for pictures; `with_thumbnails` fills it.

    Args:
        report: of `probe.report.collect`.
        runs: the same runs.
        patches: those of the gallery and the map.
        maps: their places, as far as there are any.
        sizes: model to the parameters of its backbone, as far as they are known.
        has_pictures: whether there will be any; the page says so where there are none.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("probe", "data"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": _figure,
        "signed": _signed,
        "p": _p_value,
        "json": _json,
        "count": _count,
        "share": _share,
    }
    folder = files("probe").joinpath("data")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    names = _label_names(runs)
    page = environment.get_template("report.html").render(
        report=report,
        runs=runs,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'",
        number={run.label: number for number, run in enumerate(runs, start=1)},
        style_of={run.label: number % N_STYLES for number, run in enumerate(runs)},
        names=names,
        titles=TITLES,
        figures=NAMES,
        compared=COMPARED,
        sources=SOURCES,
        views=[_view(on, runs, sizes) for on in report.sets],
        learning=_learning(report, runs),
        provenance=[_provenance(run) for run in runs],
        pictures=_PICTURES,
        has_pictures=has_pictures,
        maps=maps,
        n_left_out=sum(patches.n_left_out),
        n_shown=len(patches.id),
        everything=_figures_record(report),
        data=_data(report, runs, patches, maps, names),
    )
    return _UNSEEN.sub(lambda found: printable(found[0]), page)


def with_thumbnails(page: str, thumbnails: Thumbnails) -> str:
    """The page of `html` with pictures, which are made last, so that they can fill what room is left."""
    return page.replace(_PICTURES, _json(thumbnails.record()), 1)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> Markup:
    """JSON that can stand inside a script element: no `<` ends it."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _signed(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0%}"


def _p_value(value: float) -> str:
    return "–" if math.isnan(value) else "< .001" if value < 0.001 else f"{value:.3f}"


def _count(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:,.1f} M" if value >= 1e6 else f"{value:,.0f}"


def _label_names(runs: Sequence[Run]) -> tuple[str, str]:
    found = [tuple(run.record.get("label_names", ("0", "1"))) for run in runs]
    return (str(found[0][0]), str(found[0][1]))


# ------------------------------------------------------------------------------------------------------------- sections


def _view(on: SetReport, runs: Sequence[Run], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Everything of one set."""
    having = [(number, run) for number, run in enumerate(runs) if run.label not in on.missing]
    board = _board(on, [run for _, run in having], sizes)
    return {
        "on": on,
        "judgement": next(iter(on.comparison.judgements.values())),
        "board": board,
        "has_published": any(one for row in board for of in row["published"].values() for one in of.values()),
        "intervals": _intervals(on, having),
        "squares": _squares(on, having),
        "calibration": {
            run.label: charts.reliability(
                on.curves[run.label].calibration,
                title=f"Calibration of {run.label} on {on.title}",
                style=number % N_STYLES,
            )
            for number, run in having
        },
        "published": _published(on, runs),
        "matrices": {name: _matrix(on, name) for name in COMPARED},
    }


def _board(on: SetReport, runs: Sequence[Run], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """The leaderboard's rows, best AUROC first."""
    rows = [
        {
            "run": run,
            "judgement": on.comparison.judgements[run.label],
            "folds": on.folds[run.label],
            "ranks": {figure: on.comparison.ranks[figure][run.label] for figure in COMPARED},
            "published": {name: _published_of(run, on, name) for name in COMPARED},
            "cost": _cost(run) | {"n_parameters": sizes.get(run.record["model"])},
        }
        for run in runs
    ]
    return sorted(rows, key=lambda row: row["ranks"]["auroc"].value)


def _cost(run: Run) -> dict[str, Any]:
    cost = run.record["cost"]
    return {
        "seconds": cost.get("seconds"),
        "images_per_second": cost.get("images_per_second"),
        "peak_memory_mb": cost.get("peak_device_memory_mb", cost.get("peak_memory_mb")),
        "n_trained": run.record.get("n_trained", _n_of_probe(run)),
    }


def _n_of_probe(run: Run) -> int | None:
    """Numbers that a fold's probe trains: one per feature and one more."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(run.folder / "weights.safetensors", framework="numpy") as file:
            return int(file.get_slice("coef").get_shape()[1]) + 1 if "coef" in file.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError):
        return None  # no figure depends on it


def _intervals(on: SetReport, having: Sequence[tuple[int, Run]]) -> Markup:
    rows = []
    for number, run in having:
        figures = on.comparison.judgements[run.label].figures
        rows.append(
            Row(
                label=run.label,
                style=number % N_STYLES,
                value=[figures[name].value for name in COMPARED],
                low=[figures[name].low for name in COMPARED],
                high=[figures[name].high for name in COMPARED],
                folds=[on.folds[run.label][name].each for name in COMPARED],
                published=[
                    [
                        (one.source, one.mean, f"{run.label}, {SOURCES[one.source]}: {one.mean:.4f}")
                        for one in _published_of(run, on, name).values()
                        if one
                    ]
                    for name in COMPARED
                ],
            )
        )
    rows.sort(key=lambda row: -row.value[1])
    rows += [_everything_published(on, source) for source in SOURCES if _is_published(on, [run for _, run in having])]
    title = f"{on.title}: ensembles with {_percent(on)} intervals"
    return charts.intervals([TITLES[name] for name in COMPARED], rows, title=title)


def _is_published(on: SetReport, runs: Sequence[Run]) -> bool:
    """Whether others published figures on this test set, of models trained on the same data."""
    return (
        on.split != VALIDATION
        and runs[0].record["train"] == TRAINED_ON
        and any(row["dataset"] == on.dataset for row in published())
    )


def _everything_published(on: SetReport, source: str) -> Row:
    """A row of the interval plot with every published model."""
    rows = [row for row in published() if (row["dataset"], row["source"]) == (on.dataset, source)]
    nothing = [math.nan] * len(COMPARED)
    return Row(
        label=f"published: {SOURCES[source]}",
        style=0,
        value=nothing,
        low=nothing,
        high=nothing,
        folds=[()] * len(COMPARED),
        published=[
            [
                (source, float(row[name]), f"{row['model']} {row['method']}, {SOURCES[source]}: {row[name]}")
                for row in rows
            ]
            for name in COMPARED
        ],
    )


def _published_of(run: Run, on: SetReport, figure: str) -> dict[str, PublishedFigure | None]:
    """Source to what it published of the run's model and method on this test set."""
    found = [] if on.split == VALIDATION else published_for(run.record, on.dataset, figure)
    return {source: next((one for one in found if one.source == source), None) for source in SOURCES}


def _matrix(on: SetReport, name: str) -> list[tuple[str, list[Difference | None]]]:
    """Row minus column for every two runs; None where they are the same."""
    labels = list(on.comparison.judgements)
    of = {(pair.first, pair.second): pair.differences[name] for pair in on.comparison.pairs}

    def cell(first: str, second: str) -> Difference | None:
        if first == second:
            return None
        if (first, second) in of:
            return of[first, second]
        one = of[second, first]
        return replace(one, value=0.0 - one.value, low=0.0 - one.high, high=0.0 - one.low)  # no -0.0

    return [(first, [cell(first, second) for second in labels]) for first in labels]


def _percent(on: SetReport) -> str:
    level = next(iter(on.comparison.judgements.values())).level
    return f"{level:.0%}"


def _squares(on: SetReport, having: Sequence[tuple[int, Run]]) -> list[dict[str, Any]]:
    """ROC and precision-recall curves: all runs together, or apart by method where they are many."""
    methods = list(dict.fromkeys(run.record["method"] for _, run in having)) if len(having) > _MANY else [None]
    panels = []
    for method in methods:
        mine = [(number, run) for number, run in having if method in (None, run.record["method"])]
        lines: dict[str, list[Line]] = {"roc": [], "precision_recall": []}
        for number, run in mine:
            figures = on.comparison.judgements[run.label].figures
            for kind, figure in (("roc", "auroc"), ("precision_recall", "average_precision")):
                if math.isnan(figures[figure].value):
                    continue  # without both classes there is no curve
                points = getattr(on.curves[run.label], kind)
                said = f"{run.label}: {TITLES[figure]} {figures[figure].value:.3f}"
                lines[kind].append(Line(run.label, number % N_STYLES, points, said))
        where = f"{on.title}, {method}" if method else on.title
        panels.append(
            {
                "method": method,
                "runs": [(number, run.label, on.comparison.judgements[run.label].figures) for number, run in mine],
                "roc": charts.square(
                    lines["roc"],
                    title=f"ROC curves, {where}",
                    x="1 − specificity",
                    y="sensitivity",
                    diagonal=True,
                ),
                "precision_recall": charts.square(
                    lines["precision_recall"],
                    title=f"Precision-recall curves, {where}",
                    x="recall",
                    y="precision",
                    level=on.n_positive / on.n,
                ),
            }
        )
    return panels


def _published(on: SetReport, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every published model on this set, both sources side by side, and by how much our best run of the kind is off."""
    if not _is_published(on, runs):
        return []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in published():
        if row["dataset"] == on.dataset:
            rows.setdefault((row["model"], row["method"]), {})[row["source"]] = row
    best = {figure: max((of[figure].mean for of in on.folds.values()), default=math.nan) for figure in COMPARED}
    return [
        {
            "model": model,
            "method": method,
            "sources": {
                source: {
                    figure: (
                        float(row[figure]),
                        float(row[f"{figure}_std"]) if row[f"{figure}_std"] else None,
                        best[figure] - float(row[figure]),
                    )
                    for figure in COMPARED
                }
                for source, row in of.items()
            },
        }
        for (model, method), of in rows.items()
    ]


def _learning(report: Report, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Learning curves per set, of the runs that have one."""
    found = []
    for on in report.sets:
        of = {
            (number, run.label): [point for point in summarise(run.curve) if (point.dataset, point.split) == _pair(on)]
            for number, run in enumerate(runs)
            if run.curve
        }
        of = {key: points for key, points in of.items() if points}
        if of:
            plots = [
                charts.over_slides(
                    [
                        Line(
                            label,
                            number % N_STYLES,
                            [(point.n_slides, getattr(point, figure)) for point in points],
                            label,
                            [getattr(point, f"{figure}_std") for point in points],
                        )
                        for (number, label), points in of.items()
                    ],
                    title=f"{TITLES[figure]} over training slides, {on.title}",
                    y=TITLES[figure],
                )
                for figure in COMPARED
            ]
            found.append({"on": on, "runs": of, "plots": plots})
    return found


def _pair(on: SetReport) -> tuple[str, str]:
    return (on.dataset, on.split)


def _provenance(run: Run) -> dict[str, Any]:
    record = run.record
    facts: list[tuple[str, str]] = [
        ("run", str(record["id"])),
        ("written", str(record["created"])),
        ("view, pooling", f"{record['view']}, {record['pooling']}"),
        ("folds", f"{record['folds']['n']}: {record['folds'].get('source', '')}, digest {record['folds']['digest']}"),
        *((f"embedding of {name}", str(digest)) for name, digest in record.get("fingerprints", {}).items()),
        *((f"table of {name}", str(digest)) for name, digest in record.get("table_digests", {}).items()),
        *((name, str(digest)) for name, digest in record.get("sha256", {}).items() if "/" not in name),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        ("cost", ", ".join(f"{name} {value}" for name, value in record["cost"].items())),
    ]
    embedding = record.get("embedding", {})
    if "weights_sha256" in embedding:
        facts.insert(3, ("weights", f"{embedding.get('revision') or 'local'}, SHA-256 {embedding['weights_sha256']}"))
    return {
        "run": run,
        "facts": facts,
        "commands": commands(record),
        "options": json.dumps(record["options"], indent=1),
    }


def commands(record: Mapping[str, Any]) -> list[str]:
    """The command lines that would make a run again, datasets of one's own by where they lay."""
    options, sources = dict(record["options"]), record.get("sources", {})
    names = dict.fromkeys([record["train"], *record.get("test", ())])
    sets = ",".join(str(sources[name]) if PurePath(sources.get(name, "")).is_absolute() else name for name in names)
    if record["kind"] == "probe":
        steps = [
            ["fm-extract", "--model", record["model"], "--dataset", sets, "--view", record["view"]],
            ["fm-probe", "--model", record["model"], *_flags(options)],
        ]
    else:
        lora = options.pop("lora", {}) if record["method"] == "lora" else options.pop("lora", None) and {}
        steps = [
            ["fm-finetune", *_flags({f"lora_{name}": value for name, value in (lora or {}).items()}), *_flags(options)]
        ]
    return [shlex.join(map(str, step)) for step in steps]


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        if value is None or (value == [] and name != "test"):  # an empty --test is: none but the training set's own
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        flags += [f"--{name.replace('_', '-')}", text]
    return flags


# ---------------------------------------------------------------------------------------------------------------- data


def _figures_record(report: Report) -> dict[str, Any]:
    """Every figure of the page, for whoever wants to check it; curves are drawn, not tabulated."""
    record = as_dict(report)
    for on in record["sets"]:
        del on["curves"]
    return dict(record)


def _data(
    report: Report,
    runs: Sequence[Run],
    patches: GalleryPatches,
    maps: Sequence[EmbeddingMap],
    names: tuple[str, str],
) -> dict[str, Any]:
    """What the script needs; strings that repeat are numbered."""
    groups, group = _numbered(patches.group.tolist())
    domains, domain = _numbered(patches.domain.tolist())
    votes, vote = _numbered(patches.votes)
    thresholds = [[_threshold(on, run.label) for on in report.sets] for run in runs]
    return {
        "names": names,
        "sets": [{"title": on.title, "validation": on.split == VALIDATION} for on in report.sets],
        "runs": [run.label for run in runs],
        "thresholds": thresholds,
        "on": patches.on.tolist(),
        "id": patches.id.tolist(),
        "label": patches.label.tolist(),
        "groups": groups,
        "group": group,
        "domains": domains,
        "domain": domain,
        "votes": votes,
        "vote": vote,
        "probability": [
            [_rounded(value, of[on]) for value, on in zip(row, patches.on.tolist(), strict=True)]
            for row, of in zip(patches.probability.tolist(), thresholds, strict=True)
        ],
        "maps": [one.record() for one in maps],
    }


def _rounded(value: float, threshold: float | None) -> float | None:
    """Four digits, unless they would lie on the other side of the threshold."""
    if threshold is None or math.isnan(value):
        return None
    short = round(value, 4)
    return short if (short >= threshold) == (value >= threshold) else value


def _threshold(on: SetReport, label: str) -> float | None:
    return None if label in on.missing else on.comparison.judgements[label].threshold


def _numbered(values: Iterable[str]) -> tuple[list[str], list[int]]:
    number: dict[str, int] = {}
    rows = [number.setdefault(value, len(number)) for value in values]
    return list(number), rows
