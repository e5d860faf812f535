"""Which patches does a report show, and how do thousands of thumbnails and their map fit into one page?

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
from features.samples import MISSING_VOTE, VOTE_LETTERS
from features.store import FeatureStore
from probe.ensembles import ensemble_of, rows_of
from probe.leaks import UNSEEN
from probe.report.collect import Report, fullest
from probe.report.read import Run

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
Places = Mapping[str, tuple[str, float, float]]  # patch id to its slide, and x and y as QuPath counts them


@dataclass(frozen=True, eq=False)
class GalleryPatches:
    """The patches of a page, one row each, the sets in the report's order.

    Attributes:
        set_index: (n,) index of the set in `Report.sets`.
        id, group, domain: (n,) str.
        label: (n,) int8.
        votes: n strings, one letter of `VOTE_LETTERS` per rater, or - where missing.
        probability: (runs, n, c) of the ensemble, NaN where a run has no prediction.
        n_left_out: per set, patches that are not shown.
    """

    set_index: NDArray[np.intp]
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
        picture: (n,) which picture a row of `GalleryPatches` has, counted through all sheets; -1 for none.
    """

    size: int
    sheets: tuple[bytes, ...]
    picture: NDArray[np.intp]

    def as_json(self) -> dict[str, Any]:
        """Make the object that the page's script reads."""
        return {
            "size": self.size,
            "side": _SIDE,
            "sheets": [base64.b64encode(sheet).decode() for sheet in self.sheets],
            "picture": self.picture.tolist(),
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

    def as_json(self) -> dict[str, Any]:
        """Make the object that the page's script reads: every component scaled to 0 .. 1000, null where unknown."""
        low, high = np.nanmin(self.coordinates, axis=0), np.nanmax(self.coordinates, axis=0)
        scaled = 1000 * (self.coordinates - low) / np.where(high > low, high - low, 1)
        rows = [[None if not np.isfinite(value) else round(float(value)) for value in column] for column in scaled.T]
        return {"title": self.title, "explained": [round(share, 4) for share in self.explained], "components": rows}


# ------------------------------------------------------------------------------------------------------------- patches


def select_patches(report: Report, runs: Sequence[Run]) -> GalleryPatches:
    """Select the patches of a page: all, or where they are too many half the worst judged of a set, half at random."""
    total = sum(set_report.n for set_report in report.sets if set_report.split != UNSEEN)
    columns: list[tuple[NDArray[Any], ...]] = []
    votes: list[str] = []
    n_left_out = []
    for index, set_report in enumerate(report.sets):
        if set_report.split == UNSEEN:  # its patches are shown as those of the whole test set
            n_left_out.append(0)
            continue
        scored = {run.label: run for run in runs if run.label not in set_report.missing}
        ensembles = {
            label: ensemble_of(run.predictions, set_report.dataset, set_report.split) for label, run in scored.items()
        }
        first = next(iter(ensembles.values()))
        probability = np.full((len(runs), len(first), first.n_classes), np.nan)
        for number, run in enumerate(runs):
            if run.label in ensembles:
                ensemble = ensembles[run.label]
                probability[number] = ensemble.probability[rows_of(first, ensemble.id)]
        most = len(first) if total <= MOST else MOST * len(first) // total
        rows = _worst_and_random(first.label, probability, most)
        n_left_out.append(len(first) - len(rows))
        table = fullest([run.tables[set_report.dataset] for run in scored.values()])
        table = table.select(rows_of(first, table.id)[rows])
        votes += [
            "".join("-" if vote == MISSING_VOTE else VOTE_LETTERS[vote] for vote in row) for row in table.votes.tolist()
        ]
        set_index = np.full(len(rows), index)
        columns.append(
            (set_index, table.id, table.group, table.domain, table.label, probability[:, rows].swapaxes(0, 1))
        )
    set_index, id, group, domain, label, probability = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    by_run = probability.swapaxes(0, 1)
    return GalleryPatches(set_index, id, group, domain, label, tuple(votes), by_run, tuple(n_left_out))


def _worst_and_random(label: NDArray[np.int8], probability: NDArray[np.float64], most: int) -> NDArray[np.intp]:
    if most >= len(label):
        return np.arange(len(label))
    others = np.where(np.arange(probability.shape[2]) == label[:, None], np.nan, probability)
    error = np.nanmax(others, axis=(0, 2))  # what the most mistaken run says of its favourite among the other classes
    worst = np.argsort(-error, kind="stable")
    drawn = np.random.default_rng(_SEED).permutation(worst[most // 2 :])[: most - most // 2]
    return np.sort(np.concatenate([worst[: most // 2], drawn]))


# ---------------------------------------------------------------------------------------------------------- thumbnails


def make_thumbnails(
    patches: GalleryPatches, report: Report, pixels: Mapping[str, Pixels], *, budget: int
) -> Thumbnails:
    """Make sheets of pictures of the patches.

    Args:
        patches: of `select_patches`.
        report: whose sets they belong to.
        pixels: dataset to what reads a patch by its id; patches of other datasets have no picture.
        budget: bytes that they may take in the page, in base64.
    """
    datasets = [report.sets[index].dataset for index in patches.set_index.tolist()]
    rows = np.flatnonzero([dataset in pixels for dataset in datasets])
    picture = np.full(len(datasets), -1, dtype=np.intp)
    picture[rows] = np.arange(len(rows))
    if not len(rows):
        return Thumbnails(0, (), picture)

    def read(row: int) -> Image.Image:
        from PIL import Image

        image = Image.fromarray(pixels[datasets[row]](str(patches.id[row])))
        # The largest square in the middle: a mitotic figure is centred on its patch.
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    size = _size_within(budget, [read(row) for row in rows[:: max(1, len(rows) // _SAMPLE)]], len(rows))

    def sheet(block: list[int]) -> bytes:
        encoded = _sheet([_resized(read(row), size) for row in block], size)
        advance(len(block))
        return encoded

    blocks = [rows[start : start + _SIDE**2].tolist() for start in range(0, len(rows), _SIDE**2)]
    with progress("thumbnails", len(rows)) as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        sheets = tuple(pool.map(sheet, blocks))
    return Thumbnails(size, sheets, picture)


def _size_within(budget: int, sample: Sequence[Image.Image], n: int) -> int:
    """Choose the largest of `_SIZES`, at most the pictures' own, at which n like these stay within the budget."""
    largest = max(picture.width for picture in sample)
    for size in _SIZES:
        if size <= max(largest, _SIZES[-1]):
            bytes_per_picture = len(_sheet([_resized(picture, size) for picture in sample], size)) / len(sample)
            if bytes_per_picture * n * 4 / 3 <= budget:
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


# ----------------------------------------------------------------------------------------------------------------- map


def embedding_maps(
    patches: GalleryPatches, report: Report, runs: Sequence[Run], store: FeatureStore
) -> list[EmbeddingMap]:
    """Make a map per backbone, view and pooling that was probed and that the store still holds as it was."""
    probed: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        if run.record.kind == "probe":
            probed.setdefault((run.record.model, run.record.view, run.record.pooling), []).append(run)
    maps = []
    for (model, view, pooling), same in probed.items():
        fingerprints = {pair for run in same for pair in run.record.fingerprints.items()}
        X, rows = _embeddings(patches, report, store, model, view, pooling, fingerprints)
        if len(X) and np.ptp(X, axis=0).any():  # one point is no map
            maps.append(_map(f"{model}, {view}, {pooling}", X, rows, len(patches.id)))
    return maps


def _embeddings(
    patches: GalleryPatches,
    report: Report,
    store: FeatureStore,
    model: str,
    view: str,
    pooling: str,
    fingerprints: set[tuple[str, str]],
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Read embeddings (m, d) of patches whose dataset the store holds with a known fingerprint, and their rows."""
    datasets = np.array([set_report.dataset for set_report in report.sets])
    X, rows = [np.empty((0, 0), dtype=np.float32)], [np.empty(0, dtype=np.intp)]
    for dataset in dict.fromkeys(datasets.tolist()):
        entries = store.entries(dataset, model) if dataset in store.datasets() else []
        entry = next((entry for entry in entries if entry.view == view and entry.complete), None)
        if entry is None or (dataset, entry.fingerprint) not in fingerprints:
            continue
        row_of = {id: row for row, id in enumerate(store.samples(dataset).id.tolist())}
        shown = np.flatnonzero(datasets[patches.set_index] == dataset)
        stored = np.array([row_of[id] for id in patches.id[shown].tolist()], dtype=np.intp)
        X.append(store.read(dataset, model=model, view=view, pooling=pooling, rows=stored).astype(np.float32))
        rows.append(shown)
    return np.concatenate(X[1:] or X), np.concatenate(rows)


def _map(title: str, X: NDArray[np.float32], rows: NDArray[np.intp], n: int) -> EmbeddingMap:
    from sklearn.decomposition import PCA

    fitted = X[np.random.default_rng(_SEED).permutation(len(X))[:_MOST_FITTED]]
    pca = PCA(min(_COMPONENTS, *fitted.shape), svd_solver="randomized", random_state=_SEED).fit(fitted)
    coordinates = np.full((n, pca.n_components_), np.nan)
    coordinates[rows] = pca.transform(X)
    return EmbeddingMap(title, tuple(float(share) for share in pca.explained_variance_ratio_), coordinates)


def open_store(runs: Sequence[Run], path: Path | str | None) -> FeatureStore | None:
    """Open the feature store at a path, else the first one there is of those that the runs were probed from.

    Raises:
        UserError: if a path was given and holds no store.
    """
    if path is not None:
        return FeatureStore.open(path)
    for known in dict.fromkeys(run.record.store for run in runs if run.record.store is not None):
        try:
            return FeatureStore.open(known)
        except UserError:
            continue  # moved or deleted since: the page says that there is no map
    return None
