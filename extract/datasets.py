"""What is a dataset of labelled patches, and how does a name or a path become one?

A dataset is a known name (a row of `DATASETS`), a folder with one sub-folder per class, a CSV, or an HDF5 file. All of
them become a `PatchDataset`: the patch table, and a function that reads one patch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from extract import demo, download
from extract.benchmark import (
    ATYPICAL,
    DATA_VARIABLE,
    NORMAL,
    check_known_files,
    difference_to_published,
    known_figures,
    known_files,
    verify_download,
)
from extract.benchmark import DATASETS as DATASETS
from extract.images import Decode as Decode
from extract.images import file_decoder
from extract.readers import Patches as Patches
from extract.readers import list_patches
from extract.readers import load_patches as load_patches
from features.console import UserError, nearest, say
from features.samples import Samples, make_samples


@dataclass(frozen=True, eq=False, repr=False)
class PatchDataset:
    """The patches of one dataset.

    Attributes:
        name: a short safe name, which the feature store knows the dataset by.
        samples: the patch table, in a fixed row order.
        label_names: the names of class 0 and class 1.
        source: where the patches come from.
        mpp: micrometres per pixel, or None where unknown.
        decode: `decode(row)` gives that patch as (height, width, 3) uint8 RGB; thread-safe; raises UserError naming
            the patch when it cannot be decoded. Patches may differ in size.
    """

    name: str
    samples: Samples
    label_names: tuple[str, str]
    source: str
    mpp: float | None
    decode: Decode

    def __repr__(self) -> str:
        counts = np.bincount(self.samples.label, minlength=2)
        classes = ", ".join(f"{n:,} {name}" for n, name in zip(counts, self.label_names, strict=True))
        return f"PatchDataset({self.name!r}, {len(self.samples):,} patches: {classes}; source={self.source!r})"


def load_dataset(name_or_path: str, *, data: Path | None = None, positive: str | None = None) -> PatchDataset:
    """Load the patch table of a dataset: list its patches, check and hash every file, and join what is known of each.

    >>> load_dataset("demo")
    PatchDataset('demo', 400 patches: 289 Normal, 111 Atypical; source='drawn by mitofm')

    Args:
        name_or_path: a name of `DATASETS`; or a folder with one sub-folder per class, a CSV, or an HDF5 file.
        data: the folder of the known datasets, laid out like a clone of AMi-Br_Benchmark; by default the one in the
            environment variable MITOFM_DATA, else a download kept in the cache.
        positive: the class that is label 1, for paths; see `binary_labels`.

    Raises:
        UserError: when the name is unknown, files are missing, too many or unreadable, or tables contradict them.
    """
    if record := DATASETS.get(name_or_path):
        if positive not in (None, ATYPICAL):
            raise UserError(
                f"{name_or_path} has the positive class {ATYPICAL}, not {positive!r}: leave `positive` out."
            )
        if not record.folder:
            return _drawn(name_or_path)
        return _known(name_or_path, data or _default_data() or download.fetch_benchmark(verify_download))
    path = Path(name_or_path)
    if not (path.is_dir() or path.is_file()):
        raise UserError(
            f"There is no dataset and no file or folder named {name_or_path!r}.{nearest(name_or_path, DATASETS)} "
            f"Known datasets: {', '.join(DATASETS)}. Otherwise give a folder with one sub-folder per class, a CSV with "
            "the columns path and label, or an HDF5 file with x and y."
        )
    patches = list_patches(path, labelled=True)
    try:
        label, label_names = binary_labels(patches.columns["label"], positive)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    known = patches.columns.get
    samples = make_samples(
        patches.id, label, sha256=patches.digests(), group=known("group"), split=known("split"), domain=known("domain")
    )
    name = _safe_name(path if path.is_dir() else path.with_suffix(""))
    return PatchDataset(name, samples, label_names, str(path.resolve()), None, patches.decode)


def is_at_hand(name: str, data: Path | None = None) -> bool:
    """Whether the patches of a known dataset are in the data folder; without one they can be downloaded."""
    folder = data or _default_data()
    return folder is None or (folder / DATASETS[name].folder).is_dir()


def local_data(data: Path | None = None) -> Path | None:
    """Find a folder of the known datasets that is here already: the given one, MITOFM_DATA's, or a download."""
    return data or _default_data() or download.downloaded()


def binary_labels(classes: Sequence[str], positive: str | None) -> tuple[list[int], tuple[str, str]]:
    """Turn class names into labels: 1 for the positive class, 0 for every other.

    The positive class is `positive`; else, of two classes, the one named Atypical (in any case); else the one that
    sorts last (so 1 of 0 and 1), and a message names the choice.

    >>> binary_labels(["Normal", "Atypical", "Normal"], None)
    ([0, 1, 0], ('Normal', 'Atypical'))
    >>> binary_labels(["stroma", "tumour", "fat"], "tumour")
    ([0, 1, 0], ('not tumour', 'tumour'))

    Returns:
        The labels, and the names of class 0 and class 1.

    Raises:
        UserError: for fewer than two classes, an unknown `positive`, or three and more classes without `positive`.
    """
    names = sorted(set(classes))
    if len(names) < 2:
        raise UserError(f"found {len(names)} class ({', '.join(names) or 'none'}); a probe needs two.")
    if positive is not None and positive not in names:
        raise UserError(
            f"there is no class {positive!r}.{nearest(positive, names)} The classes are {', '.join(names)}."
        )
    if positive is None and len(names) > 2:
        raise UserError(
            f"found {len(names)} classes ({', '.join(names)}); name the one to tell from all others with `positive`."
        )
    if positive is None:
        positive = next((name for name in names if name.lower() == ATYPICAL.lower()), names[-1])
        if positive.lower() != ATYPICAL.lower() and names != ["0", "1"]:
            say(f"The positive class (label 1) is {positive!r}; the option `positive` names another.")
    others = [name for name in names if name != positive]
    negative = others[0] if len(others) == 1 else f"not {positive}"
    return [int(name == positive) for name in classes], (negative, positive)


def _known(name: str, data: Path) -> PatchDataset:
    record = DATASETS[name]
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
    return PatchDataset(name, samples, (NORMAL, ATYPICAL), record.source, record.mpp, decode)


def _drawn(name: str) -> PatchDataset:
    samples, pixels = demo.draw()
    source = DATASETS[name].source
    return PatchDataset(name, samples, (NORMAL, ATYPICAL), source, demo.MPP, lambda row: pixels[row].copy())


def _safe_name(path: Path) -> str:
    """Make a store name from a path: lower case, plain characters, and never the name of a known dataset."""
    name = re.sub(r"[^a-z0-9._-]+", "-", path.resolve().name.lower()).strip("-._") or "patches"
    return f"my-{name}" if name in DATASETS else name


def _default_data() -> Path | None:
    folder = os.environ.get(DATA_VARIABLE)
    return Path(folder) if folder else None
