"""Which patches does a report show, what does it know of each, and how do thousands of thumbnails fit into one page?

Thumbnails travel in sheets of `_SIDE` x `_SIDE`, as WebP: one header for 256 pictures, and one picture for a browser to
decode when the first of them is looked at. Their size is the largest that keeps the page under `PAGE_BYTES`.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from features.console import UserError, progress
from features.samples import MISSING_VOTE
from features.store import FeatureStore
from probe.evidence import ensemble
from probe.report import Report, Run, fullest

if TYPE_CHECKING:
    from PIL import Image

MOST = 8_000  # patches in a page
PAGE_BYTES = 9_000_000  # of a page with its thumbnails, unless they are at their smallest
_SIDE = 16
_SIZES = (128, 112, 96, 80, 72, 64, 56, 48, 40, 32)  # pixels
_QUALITY = 60
_SAMPLE = 128  # patches whose compressed size stands for all
_COMPONENTS = 4
_MOST_FITTED = 20_000  # rows that principal components are fitted to
_SEED = 0

Pixels = Callable[[str], NDArray[np.uint8]]  # patch id to (height, width, 3)


@dataclass(frozen=True, eq=False)
class GalleryPatches:
    """The patches of a page, one row each, the sets in the report's order.

    Attributes:
        on: (n,) index of the set in `Report.sets`.
        id, group, domain: (n,) str.
        label: (n,) int8.
        votes: n strings, one letter per rater: 1, 0, or - where missing.
        probability: (runs, n) of the ensemble, NaN where a run has no prediction.
        n_left_out: per set, patches that are not shown.
    """

    on: NDArray[np.intp]
    id: NDArray[np.str_]
    group: NDArray[np.str_]
    domain: NDArray[np.str_]
    label: NDArray[np.int8]
    votes: tuple[str, ...]
    probability: NDArray[np.float64]
    n_left_out: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """Pictures of patches, in sheets.

    Attributes:
        size: pixels of a thumbnail's side.
        sheets: WebP files of `_SIDE` rows and columns, the last one shorter.
        place: (n,) which picture a row of `GalleryPatches` has, counted through all sheets; -1 for none.
    """

    size: int
    sheets: tuple[bytes, ...]
    place: NDArray[np.intp]

    def record(self) -> dict[str, Any]:
        """For the page."""
        return {
            "size": self.size,
            "side": _SIDE,
            "sheets": [base64.b64encode(sheet).decode() for sheet in self.sheets],
            "place": self.place.tolist(),
        }


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Principal components of stored embeddings.

    Attributes:
        title: model, view and pooling.
        explained: (c,) share of the variance of each component.
        coordinates: (n, c) of the rows of `GalleryPatches`; NaN where the store lacks a patch.
    """

    title: str
    explained: tuple[float, ...]
    coordinates: NDArray[np.float64]

    def record(self) -> dict[str, Any]:
        """For the page: every component scaled to 0 .. 1000, null where unknown."""
        low, high = np.nanmin(self.coordinates, axis=0), np.nanmax(self.coordinates, axis=0)
        scaled = 1000 * (self.coordinates - low) / np.where(high > low, high - low, 1)
        rows = [[None if not np.isfinite(value) else round(float(value)) for value in column] for column in scaled.T]
        return {"title": self.title, "explained": [round(share, 4) for share in self.explained], "components": rows}


def shown(report: Report, runs: Sequence[Run]) -> GalleryPatches:
    """The patches that a page shows: all of them, or of every set half the worst judged and half drawn at random."""
    total = sum(on.n for on in report.sets)
    parts: list[tuple[NDArray[Any], ...]] = []
    votes: list[str] = []
    left_out = []
    for number, on in enumerate(report.sets):
        having = [run for run in runs if run.label not in on.missing]
        judged = {run.label: ensemble(run.predictions, on.dataset, on.split) for run in having}
        first = judged[having[0].label]
        order = np.argsort(first.id, kind="stable")
        probability = np.full((len(runs), len(first)), np.nan)
        for row, run in enumerate(runs):
            if run.label in judged:
                other = judged[run.label]
                probability[row, order] = other.probability[np.argsort(other.id, kind="stable")]
        rows = _kept(first.label, probability, len(first) if total <= MOST else MOST * len(first) // total)
        left_out.append(len(first) - len(rows))
        table = fullest([run.tables[on.dataset] for run in having])
        place = {id: row for row, id in enumerate(table.id.tolist())}
        of = table.select(np.array([place[id] for id in first.id[rows].tolist()], dtype=np.intp))
        votes += ["".join("-" if vote == MISSING_VOTE else str(vote) for vote in row) for row in of.votes.tolist()]
        parts.append((np.full(len(rows), number), of.id, of.group, of.domain, of.label, probability[:, rows].T))
    index, id, group, domain, label, each = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return GalleryPatches(index, id, group, domain, label, tuple(votes), each.T, tuple(left_out))


def _kept(label: NDArray[np.int8], probability: NDArray[np.float64], most: int) -> NDArray[np.intp]:
    if most >= len(label):
        return np.arange(len(label))
    wrong = np.nanmax(np.abs(probability - label), axis=0)
    worst = np.argsort(-wrong, kind="stable")
    others = np.random.default_rng(_SEED).permutation(worst[most // 2 :])[: most - most // 2]
    return np.sort(np.concatenate([worst[: most // 2], others]))


def make_thumbnails(
    patches: GalleryPatches, report: Report, pixels: Mapping[str, Pixels], *, budget: int
) -> Thumbnails:
    """Sheets of pictures of the patches.

    Args:
        patches: of `shown`.
        report: whose sets they belong to.
        pixels: dataset to what reads a patch by its id; patches of other datasets have no picture.
        budget: bytes that they may take in the page, in base64.
    """
    datasets = [on.dataset for on in report.sets]
    rows = np.flatnonzero([datasets[on] in pixels for on in patches.on])
    place = np.full(len(patches.on), -1, dtype=np.intp)
    place[rows] = np.arange(len(rows))
    if not len(rows):
        return Thumbnails(0, (), place)

    def read(row: int) -> Image.Image:
        from PIL import Image

        picture = Image.fromarray(pixels[datasets[patches.on[row]]](str(patches.id[row])))
        # The largest square in the middle: a mitotic figure is centred on its patch.
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return picture.crop((left, top, left + side, top + side))

    size = _size_within(budget, [read(row) for row in rows[:: max(1, len(rows) // _SAMPLE)]], len(rows))

    def sheet(block: list[int]) -> bytes:
        made = _sheet([_resized(read(row), size) for row in block], size)
        advance(len(block))
        return made

    blocks = [rows[start : start + _SIDE**2].tolist() for start in range(0, len(rows), _SIDE**2)]
    with progress("thumbnails", len(rows)) as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        sheets = tuple(pool.map(sheet, blocks))
    return Thumbnails(size, sheets, place)


def _size_within(budget: int, sample: Sequence[Image.Image], n: int) -> int:
    """The largest of `_SIZES` at which n pictures like these stay within the budget; no larger than the pictures."""
    largest = max(picture.width for picture in sample)
    for size in _SIZES:
        if size <= max(largest, _SIZES[-1]):
            bytes_each = len(_sheet([_resized(picture, size) for picture in sample], size)) / len(sample)
            if bytes_each * n * 4 / 3 <= budget:
                return size
    return _SIZES[-1]


def _resized(picture: Image.Image, size: int) -> Image.Image:
    from PIL import Image

    return picture if picture.width == size else picture.resize((size, size), Image.Resampling.LANCZOS)


def _sheet(pictures: Sequence[Image.Image], size: int) -> bytes:
    from PIL import Image

    sheet = Image.new("RGB", (min(len(pictures), _SIDE) * size, -(-len(pictures) // _SIDE) * size))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % _SIDE * size, number // _SIDE * size))
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=_QUALITY, method=4)
    return file.getvalue()


def embedding_maps(
    patches: GalleryPatches, report: Report, runs: Sequence[Run], store: FeatureStore
) -> list[EmbeddingMap]:
    """One map per backbone, view and pooling that was probed and that the store still holds as it was."""
    from sklearn.decomposition import PCA

    wanted: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        if run.record["kind"] == "probe":
            key = (str(run.record["model"]), str(run.record["view"]), str(run.record["pooling"]))
            wanted.setdefault(key, []).append(run)
    datasets = list(dict.fromkeys(on.dataset for on in report.sets))
    maps = []
    for (model, view, pooling), probed in wanted.items():
        found, at = [], []
        for dataset in datasets:
            entries = store.entries(dataset, model) if dataset in store.datasets() else []
            entry = next((entry for entry in entries if entry.view == view and entry.complete), None)
            seen = {run.record.get("fingerprints", {}).get(dataset) for run in probed}
            if entry is None or entry.fingerprint not in seen:
                continue
            place = {id: row for row, id in enumerate(store.samples(dataset).id.tolist())}
            of = np.flatnonzero(np.isin(patches.on, _sets_of(report, dataset)))
            rows = np.array([place[id] for id in patches.id[of].tolist()], dtype=np.intp)
            found.append(store.read(dataset, model=model, view=view, pooling=pooling, rows=rows).astype(np.float32))
            at.append(of)
        if not found:
            continue
        X = np.concatenate(found)  # (m, d)
        if not np.ptp(X, axis=0).any():
            continue  # one point is no map
        fitted = X[np.random.default_rng(_SEED).permutation(len(X))[:_MOST_FITTED]]
        pca = PCA(min(_COMPONENTS, *fitted.shape), svd_solver="randomized", random_state=_SEED).fit(fitted)
        coordinates = np.full((len(patches.on), pca.n_components_), np.nan)
        coordinates[np.concatenate(at)] = pca.transform(X)
        shares = tuple(float(share) for share in pca.explained_variance_ratio_)
        maps.append(EmbeddingMap(f"{model}, {view}, {pooling}", shares, coordinates))
    return maps


def _sets_of(report: Report, dataset: str) -> list[int]:
    return [index for index, on in enumerate(report.sets) if on.dataset == dataset]


def open_store(runs: Sequence[Run], given: Path | str | None) -> FeatureStore | None:
    """The feature store given, else the one that the runs were probed from; None if there is none.

    Raises:
        UserError: if a store was given and is none.
    """
    if given is not None:
        return FeatureStore.open(given)
    for path in dict.fromkeys(str(run.record["store"]) for run in runs if "store" in run.record):
        try:
            return FeatureStore.open(path)
        except UserError:
            continue  # moved or deleted since: the page says that there is no map
    return None
