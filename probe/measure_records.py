"""What do the measures of a store's embeddings leave on disk, and how are they read back?

A folder `measures-<time>-<digits>/` among the runs with one file, measures.json: which embeddings of which patches were
measured, what came out, and the SHA-256 of all this. It is no run, and reports of runs pass it over.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from features.console import UserError
from features.files import PARTIAL, move_folder, write_file, writing
from features.fingerprint import fingerprint
from probe.metrics import Interval

MEASURES = {
    "knn": "k nearest neighbours",
    "fewshot": "Few labelled patches",
    "retrieval": "Retrieval",
    "clustering": "Clusters",
    "robustness": "Robustness index",
    "invariance": "Altered patches",
    "alignment": "Alignment of backbones",
}
FORMAT = 1
FILE = "measures.json"
_PREFIX = "measures-"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of one embedding, or of two, on one set of patches.

    Attributes:
        measure: a key of `MEASURES`; `name` is the figure, see docs/measures.md.
        embedding: model, view and pooling, as "uni (full, card)"; of two embeddings both, joined by " and ".
        dataset, split: of the patches; "train" for those that probes train on, else "test".
        value: the figure; NaN if it does not exist.
        low, high: ends of its 95 % interval over slides; of `draws` figures, between which 95 % of the draws lie; NaN
            where there is none.
        wide: where slides are unknown, the ends at the largest plausible design effect.
        chance: what the figure would be if embeddings said nothing; NaN where that has no meaning.
        n: patches.
        unit, n_clusters: what the interval is over, "slide" or "sample", and how many of them; of `draws`, draws.
    """

    measure: str
    name: str
    embedding: str
    dataset: str
    split: str
    value: float | None
    low: float | None = None
    high: float | None = None
    wide: tuple[float, float] | None = None
    chance: float | None = None
    n: int
    unit: str = ""
    n_clusters: int = 0

    @property
    def interval(self) -> Interval:
        """The figure with its interval."""
        value, low, high = (float("nan") if one is None else one for one in (self.value, self.low, self.high))
        return Interval(value, low, high, wide=self.wide)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An embedding that was measured: what it is, why this one of its model, and what decides its numbers.

    `neighbours` is the k of its k nearest neighbours, chosen on training patches.
    """

    model: str
    view: str
    pooling: str
    chosen: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    neighbours: int | None = None

    @property
    def label(self) -> str:
        """Its name in figures."""
        return f"{self.model} ({self.view}, {self.pooling})"


@dataclass(frozen=True, kw_only=True)
class MeasureRecord:
    """Everything that measures.json says.

    Attributes:
        id, created: name and UTC time; empty until written.
        train, test: datasets, as of a probe.
        store: that was measured.
        options: what the user chose.
        measures: which were computed.
        label_names: of the classes.
        embeddings: that were measured.
        table_digests: dataset to the digest of its patch table.
        figures: all of them.
        seconds: by measure; "neighbours" and "intervals" are of several.
        versions: of the packages that decide a number.
        sha256: of all this, but for itself.
        folder: where it was read from or written to.
    """

    id: str = ""
    created: str = ""
    train: str
    test: tuple[str, ...] = ()
    store: str
    options: Mapping[str, Any]
    measures: tuple[str, ...]
    label_names: tuple[str, ...]
    embeddings: tuple[Measured, ...]
    table_digests: Mapping[str, str]
    figures: tuple[Figure, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    folder: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """Make the object of measures.json; what does not exist is left out of a figure, or null."""
        raw: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(replace(self, folder=None)))
        del raw["folder"]
        for one in (*raw["figures"], *raw["embeddings"]):
            for name in [name for name in _OPTIONAL if one.get(name, "") in (None, "")]:
                one.pop(name, None)
        return {"format": FORMAT} | raw


_OPTIONAL = ("low", "high", "wide", "chance", "unit", "neighbours")


def write_measures(runs: Path, record: MeasureRecord) -> MeasureRecord:
    """Write measures among the runs, whole or not at all. Returns them with id, date, digest and folder.

    Raises:
        UserError: if the folder cannot be written.
    """
    name = f"{_PREFIX}{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    record = replace(record, id=name, created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), sha256="")
    record = replace(record, sha256=_digest(record.as_json()))
    unfinished = runs / f".{name}{PARTIAL}"
    try:
        with writing(runs):
            unfinished.mkdir(parents=True)
            text = json.dumps(record.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
            write_file(unfinished / FILE, [f"{text}\n".encode()])
            move_folder(unfinished, runs / name)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return read_measures(runs / name)


def read_measures(folder: Path) -> MeasureRecord:
    """Read measures.json.

    Raises:
        UserError: if it is missing, damaged, of a newer format, or not as it was written.
    """
    path = Path(folder) / FILE
    try:
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError("expected a JSON object")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. Expected a folder written by fm-probe --measures.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Run fm-probe --measures again.") from error
    if raw.get("format") != FORMAT:
        raise UserError(
            f"{path} is of format {raw.get('format')}; this version reads format {FORMAT}. Update mitofm, or run "
            "fm-probe --measures again."
        )
    if raw.get("sha256") != _digest(raw):
        raise UserError(
            f"{path} is not as it was written: its SHA-256 differs from the one in it. Restore it, or run fm-probe "
            "--measures again."
        )
    try:
        return replace(msgspec.convert(raw, MeasureRecord), folder=Path(folder))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Run fm-probe --measures again.") from error


def all_measures(runs: Path) -> Iterator[MeasureRecord]:
    """Read all measures among the runs, the newest first.

    Raises:
        UserError: as `read_measures`.
    """
    found = [read_measures(path.parent) for path in runs.glob(f"{_PREFIX}*/{FILE}")]
    yield from sorted(found, key=lambda record: (record.created, record.id), reverse=True)


def newest_figures(records: Sequence[MeasureRecord]) -> list[Figure]:
    """Gather the figures of several records, given the newest first: of each embedding, set and measure the newest."""
    taken: dict[tuple[str, str, str, str], list[Figure]] = {}
    for record in records:
        own: dict[tuple[str, str, str, str], list[Figure]] = {}
        for figure in record.figures:
            own.setdefault((figure.measure, figure.embedding, figure.dataset, figure.split), []).append(figure)
        taken = taken | {key: figures for key, figures in own.items() if key not in taken}
    return [figure for figures in taken.values() for figure in figures]


def _digest(raw: Mapping[str, Any]) -> str:
    return fingerprint({name: value for name, value in raw.items() if name != "sha256"})
