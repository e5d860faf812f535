"""What is a dataset of labelled patches, and how does a name or a path become one?

A dataset is a known name (a row of `DATASETS`), a folder with one sub-folder per class, a table, a file of arrays, or
points on slides. All of them become a `PatchDataset`: the patch table, and a function that reads one patch.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from extract import demo, download
from extract.benchmark import (
    ATYPICAL,
    DATA_VARIABLE,
    check_known_files,
    difference_to_published,
    known_figures,
    known_files,
    known_phases,
    verify_download,
)
from extract.benchmark import DATASETS as DATASETS
from extract.images import Decode as Decode
from extract.images import file_decoder
from extract.points import Points
from extract.readers import Patches as Patches
from extract.readers import list_patches, require_points
from extract.readers import load_patches as load_patches
from extract.slides import Slides
from features.console import UserError, nearest, say
from features.labels import Classes, aligned, class_labels, numbered, read_labels, require_grades
from features.samples import Samples, make_samples
from features.tables import known_cells, read_splits


@dataclass(frozen=True, eq=False, repr=False)
class PatchDataset:
    """The patches of one dataset.

    Attributes:
        name: a short safe name, which the feature store knows the dataset by.
        samples: the patch table, in a fixed row order.
        label_names: the names of class 0, class 1, ...
        source: where the patches come from.
        mpp: micrometres per pixel, or None where unknown.
        decode: `decode(row)` gives that patch as (height, width, 3) uint8 RGB; thread-safe; raises UserError naming
            the patch when it cannot be decoded. Patches may differ in size.
        ordinal: whether the classes are grades, each more than the one before it.
        slides: of patches around points of slides, the folder of the slides, and how the patches are cut.
        points: of these, the points, row by row, in pixels of level 0.
    """

    name: str
    samples: Samples
    label_names: Classes
    source: str
    mpp: float | None
    decode: Decode
    ordinal: bool = False
    slides: Slides | None = None
    points: Points | None = None

    def __repr__(self) -> str:
        counts = np.bincount(self.samples.label, minlength=len(self.label_names))
        classes = ", ".join(f"{n:,} {name}" for n, name in zip(counts, self.label_names, strict=True))
        return f"PatchDataset({self.name!r}, {len(self.samples):,} patches: {classes}; source={self.source!r})"


def load_dataset(
    name_or_path: str,
    *,
    data: Path | None = None,
    positive: str | None = None,
    labels: Mapping[str, str] | None = None,
    classes: Classes | None = None,
    order: Sequence[str] | None = None,
    ordinal: bool = False,
    skip_unlabelled: bool = False,
    slides: Slides | None = None,
) -> PatchDataset:
    """Load the patch table of a dataset: list its patches, check and hash every file, and join what is known of each.

    >>> load_dataset("demo")
    PatchDataset('demo', 400 patches: 289 Normal, 111 Atypical; source='drawn by mitofm')

    Args:
        name_or_path: a name of `DATASETS`; or a folder with one sub-folder per class, a table, a file of arrays, or
            points on slides, also as NAME=PATH, to name the dataset otherwise than its path does.
        data: the folder of the known datasets, laid out like a clone of AMi-Br_Benchmark; by default the one in the
            environment variable MITOFM_DATA, else a download kept in the cache.
        positive: the class that is label 1 against all others, for paths; see `features.labels.class_labels`.
        labels: old class name to new, for paths; applied first.
        classes: the classes of the training set, if these patches are to test its models.
        order: all classes in the order of their labels, for paths, unless `classes` says it.
        ordinal: whether the classes are grades, for paths.
        skip_unlabelled: leave out patches whose label is missing, instead of refusing them.
        slides: where the slides of points are, and how large a patch around each is.

    Raises:
        UserError: when the name is unknown, files are missing, too many or unreadable, tables contradict them, or
            grades are two or in no order that can be known.
    """
    if record := DATASETS.get(name_or_path):
        if positive is not None and (record.classes or positive != ATYPICAL):
            has = f"{len(record.classes)} classes" if record.classes else f"the positive class {ATYPICAL}"
            raise UserError(f"{name_or_path} has {has}, not {positive!r}: leave `positive` out.")
        other = order is not None and tuple(order) != record.label_names
        if other or ordinal:
            has = f"the classes {numbered(record.label_names)}, which are no grades"
            raise UserError(f"{name_or_path} has {has}: leave `{'classes' if other else 'ordinal'}` out.")
        if record.phases or record.folder:
            dataset = _known(name_or_path, data or _default_data() or download.fetch_benchmark(verify_download))
        else:
            dataset = _drawn(name_or_path)
        return dataset if classes is None else aligned_dataset(dataset, classes, labels or {})
    name, path = parse_source(name_or_path)
    if not (path.is_dir() or path.is_file()):
        raise UserError(
            f"There is no dataset and no file or folder named {str(path)!r}.{nearest(str(path), DATASETS)} "
            f"Known datasets: {', '.join(DATASETS)}. Otherwise give a folder with one sub-folder per class, a table "
            "with the columns path and label, or a file of arrays with x and y."
        )
    patches = list_patches(path, labelled=True, slides=slides)
    where = [patches.where(row) for row in range(len(patches.id))]
    named, rows = read_labels(patches.columns["label"], labels, source=path, where=where, skip=skip_unlabelled)
    if len(rows) < len(patches.id):
        patches, where = patches.select(rows), [where[row] for row in rows]
    try:
        label, label_names = class_labels(named, positive, classes=classes, order=order)
        if ordinal:
            require_grades(label_names, ordered=order is not None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    columns = patches.columns
    samples = make_samples(
        patches.id,
        label,
        sha256=patches.digests(),
        group=known_cells(columns.get("group")),
        split=read_splits(columns.get("split"), source=path, where=where),
        domain=known_cells(columns.get("domain")),
    )
    source = str(path.resolve())
    return PatchDataset(
        name, samples, label_names, source, patches.mpp, patches.decode, ordinal, patches.slides, patches.points
    )


def aligned_dataset(test: PatchDataset, classes: Classes, labels: Mapping[str, str]) -> PatchDataset:
    """Read the labels of a test set by the classes of the training set.

    Raises:
        UserError: see `features.labels.aligned`.
    """
    found = aligned(classes, test.label_names, train_name="the training set", test_name=test.name, labels=labels)
    return replace(test, samples=test.samples.relabelled(found), label_names=classes)


def parse_source(name_or_path: str) -> tuple[str, Path]:
    """Split NAME=PATH, or make a name of a path.

    >>> parse_source("site-b=/data/b/patches.csv")
    ('site-b', PosixPath('/data/b/patches.csv'))
    >>> parse_source("My Patches/")[0]
    'my-patches'

    Returns:
        The name in the store and in every result, in lower case and plain characters; and the path.

    Raises:
        UserError: if there is no name, or it is that of a known dataset.
    """
    given, equals, rest = name_or_path.partition("=")
    if not equals or Path(name_or_path).exists() or re.search(r"[/\\]", given):
        given, rest = "", name_or_path
    path = Path(rest).expanduser()
    if given in DATASETS:
        raise UserError(f"{given!r} is a known dataset: give {rest} another name.")
    stem = path.resolve().name if path.is_dir() else path.with_suffix("").name
    name = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", given or stem).lower()).strip("-._")
    if not name:
        raise UserError(f"{given or stem!r} gives no name to a dataset: write NAME={rest}.")
    return (f"my-{name}" if name in DATASETS else name), path  # never that of a known dataset


def require_distinct_names(names_or_paths: Iterable[str]) -> None:
    """Refuse two datasets of one name, before any is read.

    Raises:
        UserError: naming both, and how to name one of them otherwise.
    """
    first: dict[str, str] = {}
    for text in names_or_paths:
        name = text if text in DATASETS else parse_source(text)[0]
        if first.setdefault(name, text) != text:
            raise UserError(
                f"{first[name]} and {text} would both be the dataset {name!r}. Name one of them otherwise: NAME={text}."
            )


def require_slides_used(names_or_paths: Iterable[str], slides: Slides | None) -> None:
    """Refuse slides where no dataset consists of points on them, before any is read.

    Raises:
        UserError: naming the datasets.
    """
    require_points([parse_source(text)[1] for text in names_or_paths if text not in DATASETS], slides)


def is_at_hand(name: str, data: Path | None = None) -> bool:
    """Whether the patches of a known dataset are in the data folder; without one they can be downloaded."""
    folder = data or _default_data()
    return folder is None or (folder / DATASETS[name].folder).is_dir()


def local_data(data: Path | None = None) -> Path | None:
    """Find a folder of the known datasets that is here already: the given one, MITOFM_DATA's, or a download."""
    return data or _default_data() or download.downloaded()


def _known(name: str, data: Path) -> PatchDataset:
    record = DATASETS[name]
    if record.of:
        return _relabelled(name, _known(record.of, data), data)
    files = known_files(name, data)
    figures = known_figures(name, data, files)
    sha256, n_bytes = check_known_files(name, files)
    # A user may have re-encoded the patches on purpose; the store records the digests.
    if difference := difference_to_published(name, files, sha256, n_bytes):
        say(f"Note: the patches in {data / record.folder} are not the published files: {difference}.")
    samples = make_samples(
        [file.id for file in files],
        [int(file.label == ATYPICAL) for file in files],
        sha256=sha256,
        group=[figure.group for figure in figures],
        split=[figure.split for figure in figures],
        votes=np.array([figure.votes for figure in figures], dtype=np.int8),
        domain=[figure.domain for figure in figures],
    )
    decode = file_decoder([file.path for file in files])
    return PatchDataset(name, samples, record.label_names, record.source, record.mpp, decode)


def _relabelled(name: str, whole: PatchDataset, data: Path) -> PatchDataset:
    """Give those patches of a dataset another label that have one, and leave out the others."""
    labels = known_phases(name, data, whole.samples.id.tolist())
    rows = list(labels)
    samples = replace(
        whole.samples.select(np.array(rows)),
        label=np.array(list(labels.values()), dtype=np.int8),
        votes=np.empty((len(rows), 0), dtype=np.int8),
    )
    return PatchDataset(
        name, samples, DATASETS[name].label_names, whole.source, whole.mpp, lambda row: whole.decode(rows[row])
    )


def _drawn(name: str) -> PatchDataset:
    record, drawn = DATASETS[name], demo.draw()
    samples = drawn.phases if record.of else drawn.samples
    return PatchDataset(
        name, samples, record.label_names, record.source, demo.MPP, lambda row: drawn.pixels[row].copy()
    )


def _default_data() -> Path | None:
    folder = os.environ.get(DATA_VARIABLE)
    return Path(folder) if folder else None
