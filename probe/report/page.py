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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from features.console import printable
from features.labels import class_color
from features.samples import VOTE_LETTERS
from probe.commands import commands
from probe.metrics import COMPARED, as_dict, figure_titles
from probe.report.charts import N_STYLES
from probe.report.collect import Report, SetReport
from probe.report.gallery import EmbeddingMap, GalleryPatches, Places, Thumbnails
from probe.report.headlines import headlines
from probe.report.measures import MeasureTable, measure_tables
from probe.report.provenance import facts
from probe.report.published import SOURCES
from probe.report.read import Run
from probe.report.tables import say_departures
from probe.report.views import SetView, costs, set_view

SECTIONS = {
    "summary": "In short",
    "leaderboard": "Leaderboard",
    "differences": "Differences",
    "trainings": "Trainings",
    "across": "Across sets",
    "curves": "Curves",
    "decisions": "Decisions",
    "thresholds": "Thresholds",
    "slides": "Slides",
    "raters": "Raters",
    "domains": "Domains",
    "learning": "Learning curves",
    "measures": "Other measures",
    "map": "Map",
    "gallery": "Gallery",
    "provenance": "Provenance",
}
_DISSENTS = 24  # patches shown of those on which a run says otherwise than the raters
_PICTURES = Markup("<!--pictures-->")  # no name can be taken for it: the template escapes them
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
    places: Mapping[str, Places] = {},
) -> str:
    """Make the page, with a gap for pictures that `with_thumbnails` fills.

    Args:
        report: of `probe.report.collect`.
        runs: the same runs.
        patches: those of the gallery and the map.
        maps: their positions, as far as there are any.
        sizes: model to the parameters of its backbone, as far as they are known.
        has_pictures: whether there will be any; the page says so where there are none.
        places: dataset to the places of its patches on slides, for those that are around points of slides.
    """
    style, script = _resource("page.css"), _resource("page.js")
    titles = figure_titles(report.classes)
    views = [set_view(one, runs, index=index, margin=report.margin) for index, one in enumerate(report.sets)]
    measures = measure_tables(runs)
    page = _template().render(
        report=report,
        measures=measures,
        summary=report.summary,
        headlines=headlines(report, runs),
        contents=_contents(report, views, measures),
        folds=_folds(runs),
        runs=runs,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'",
        number={run.label: number for number, run in enumerate(runs, start=1)},
        style_of={run.label: number % N_STYLES for number, run in enumerate(runs)},
        names=report.classes,
        of_two=len(report.classes) == 2,
        titles=titles,
        figures=[name for name in titles if name.partition(" ")[2] == ""],  # those of the task, not of one class
        compared=COMPARED,
        sources=SOURCES,
        departures=say_departures(runs),
        views=views,
        n_dissents=_DISSENTS,
        costs={run.label: costs(run, sizes.get(run.record.model)) for run in runs},
        facts=facts,
        commands=lambda run: commands(run.record, members=[one.folder.resolve() for one in run.members]),
        pictures=_PICTURES,
        has_pictures=has_pictures,
        has_places=bool(places),
        maps=maps,
        n_left_out=sum(patches.n_left_out),
        n_shown=len(patches.id),
        everything=_figures_record(report),
        data=_script_data(report, runs, patches, maps) | _place_data(report, patches, places),
    )
    return _UNSEEN.sub(lambda match: printable(match[0]), page)


def with_thumbnails(page: str, thumbnails: Thumbnails) -> str:
    """Fill the gap in the page of `html`. Pictures are made last, so that they can use what room is left."""
    return page.replace(_PICTURES, _json(thumbnails.as_json()), 1)


@dataclass(frozen=True)
class _Folds:
    """A fold assignment: its digest, how many folds, which domains they are, and the numbers of the runs on it."""

    digest: str
    n: int
    names: tuple[str, ...]
    numbers: tuple[int, ...]


def _folds(runs: Sequence[Run]) -> list[_Folds]:
    by_digest: dict[tuple[str, int, tuple[str, ...]], list[int]] = {}
    for number, run in enumerate(runs, start=1):
        folds = run.record.folds
        by_digest.setdefault((folds.digest, folds.n, folds.names or ()), []).append(number)
    return [_Folds(*key, tuple(numbers)) for key, numbers in by_digest.items()]


def _contents(report: Report, views: Sequence[SetView], measures: Sequence[MeasureTable]) -> list[tuple[str, str]]:
    """List the sections of the page: id, which is the name of their template, and title."""
    present = {
        "trainings": any(view.trainings for view in views),
        "across": bool(report.across),
        "thresholds": any(one.thresholds for one in report.sets),
        "slides": any(one.rates for one in report.sets),
        "raters": any(one.raters for one in report.sets),
        "domains": any(one.domains for one in report.sets),
        "learning": any(view.learning for view in views),
        "measures": bool(measures),
    }
    return [(id, title) for id, title in SECTIONS.items() if present.get(id, True)]


def _template() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_resource),
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
        "indented": partial(json.dumps, indent=1),
    }
    return environment.get_template("page.html")


def _resource(name: str) -> str:
    return files("probe.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> Markup:
    """Encode JSON that can stand inside a script element: no `<` ends it."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _figure(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # no −0.000


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.3f}".replace("-", "−")


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0%}"


def _p_value(value: float) -> str:
    return "–" if math.isnan(value) else "< .001" if value < 0.001 else f"{value:.3f}"


def _count(value: float | None) -> str:
    if value is None:
        return "–"
    if 0 < value < 1:
        return f"{value:.2g}"  # images per second of a large network on a CPU
    return f"{value / 1e6:,.1f} M" if value >= 1e6 else f"{value:,.0f}"


def _figures_record(report: Report) -> dict[str, Any]:
    """Record every figure of the page, for whoever wants to check it; curves are drawn, not tabulated."""
    record = dict(as_dict(report))
    for set_report in record["sets"]:
        del set_report["curves"]
    return record


def _script_data(
    report: Report,
    runs: Sequence[Run],
    patches: GalleryPatches,
    maps: Sequence[EmbeddingMap],
) -> dict[str, Any]:
    """Gather what the script needs; strings that repeat are numbered.

    Of two classes that is the probability of class 1, beside the thresholds. Of more it is the class that a run
    predicts, its probability, and that of the patch's label.
    """
    groups, group = _numbered(patches.group.tolist())
    domains, domain = _numbered(patches.domain.tolist())
    votes, vote = _numbered(patches.votes)
    sets = patches.set_index.tolist()
    thresholds = [[_threshold(set_report, run.label) for set_report in report.sets] for run in runs]
    if len(report.classes) == 2:
        said: dict[str, Any] = {
            "thresholds": thresholds,
            "probability": [
                [_rounded(value, by_set[index]) for value, index in zip(row, sets, strict=True)]
                for row, by_set in zip(patches.probability[..., 1].tolist(), thresholds, strict=True)
            ],
        }
    else:
        known = np.isfinite(patches.probability[..., 0])
        predicted = np.where(known, patches.probability.argmax(axis=2), -1)
        of_label = np.take_along_axis(patches.probability, patches.label[None, :, None].astype(np.intp), axis=2)
        said = {
            "predicted": predicted.tolist(),
            "probability": _digits(patches.probability.max(axis=2)),
            "probability_of_label": _digits(of_label[..., 0]),
        }
    return {
        "names": report.classes,
        "sets": [{"title": one.title, "validation": one.is_validation} for one in report.sets],
        "runs": [run.label for run in runs],
        "set": sets,
        "id": patches.id.tolist(),
        "label": patches.label.tolist(),
        "groups": groups,
        "group": group,
        "domains": domains,
        "domain": domain,
        "votes": votes,
        "vote": vote,
        "letters": VOTE_LETTERS,
        **said,
        "maps": [one.as_json() for one in maps],
    }


def _place_data(report: Report, patches: GalleryPatches, places: Mapping[str, Places]) -> dict[str, Any]:
    """Say where patches lie on slides, which are numbered; None for those that lie on none."""
    of_set = [places.get(one.dataset, {}) for one in report.sets]
    found = [of_set[index].get(id) for index, id in zip(patches.set_index.tolist(), patches.id.tolist(), strict=True)]
    slides = {slide: k for k, slide in enumerate(dict.fromkeys(one[0] for one in found if one))}
    return {
        "slides": list(slides),
        "place": [[slides[one[0]], *one[1:]] if one else None for one in found] if slides else [],
        "colors": [class_color(k) for k in range(len(report.classes))],
    }


def _digits(probability: NDArray[np.float64]) -> list[list[float | None]]:
    """Round (runs, n) probabilities to four digits; None where a run has no prediction."""
    return [[None if math.isnan(value) else round(value, 4) for value in row] for row in probability.tolist()]


def _rounded(value: float, threshold: float | None) -> float | None:
    """Round to four digits, unless that would cross the threshold."""
    if threshold is None or math.isnan(value):
        return None
    short = round(value, 4)
    return short if (short >= threshold) == (value >= threshold) else value


def _threshold(set_report: SetReport, label: str) -> float | None:
    return None if label in set_report.missing else set_report.comparison.judgements[label].threshold


def _numbered(values: Iterable[str]) -> tuple[list[str], list[int]]:
    number: dict[str, int] = {}
    rows = [number.setdefault(value, len(number)) for value in values]
    return list(number), rows
