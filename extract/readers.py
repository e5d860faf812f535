"""Which patches does a path hold, and how is each read: an image, a folder, a CSV or an HDF5 file?

Each form is read in one place, for labelled patches (`extract.datasets.load_dataset`) and for new ones without labels
(`load_patches`). Of labelled patches nothing is left out silently, and every doubt is an error.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from extract import images
from extract.images import Decode, check_files, file_decoder
from features.console import UserError, progress, say
from features.samples import TEST, TRAIN
from features.tables import read_csv

_OPTIONAL_COLUMNS = ("id", "group", "split", "domain")  # of a CSV of labelled patches
_SHOWN = 5  # how many of many bad files or rows an error names
_HDF5_ROWS = 256  # rows hashed per read
_HDF5_SUFFIXES = frozenset({".h5", ".hdf5"})
_SYSTEM_FILES = frozenset({"Thumbs.db", "desktop.ini"})
_IMAGE_SUFFIXES = ", ".join(sorted(images.SUFFIXES))


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of a path, listed but not yet read.

    Attributes:
        source: the path as it was given.
        id: names below that path, in a fixed order.
        decode: `decode(row)` gives that patch as (height, width, 3) uint8 RGB; thread-safe; raises UserError naming
            the patch when it cannot be decoded. Patches may differ in size.
        digests: reads every patch once and gives its hex SHA-256; raises UserError naming those that cannot be used.
        columns: what is known of every patch, column by column; `label` if labels were asked for.
    """

    source: str
    id: tuple[str, ...]
    decode: Decode
    digests: Callable[[], list[str]] = field(repr=False)
    columns: Mapping[str, list[str]] = field(default_factory=dict, repr=False)


class PatchFile(NamedTuple):
    """A patch in the folder of its class."""

    id: str
    label: str
    path: Path


def load_patches(path: Path) -> Patches:
    """List and check new patches: an image, a folder (images at any depth), a CSV with a column path, or HDF5 with x.

    Labels are neither needed nor read. Every file is checked first.

    Raises:
        UserError: no such path, no patches, or patches that cannot be read.
    """
    patches = list_patches(path, labelled=False)
    if not _is_hdf5(path):  # the rows of an HDF5 file have one type and shape; a file may hold anything
        patches.digests()
    return patches


def list_patches(path: Path, *, labelled: bool) -> Patches:
    """List the patches of a path without reading their pixels.

    Args:
        path: a folder, a CSV or an HDF5 file; without labels also an image file.
        labelled: whether every patch must have a label: by its class folder, a column `label`, or the array `y`.

    Raises:
        UserError: no such path, another kind of file, no patches, or entries that contradict each other.
    """
    if path.is_dir():
        return _from_class_folders(path) if labelled else _from_any_folder(path)
    if path.is_file() and path.suffix.lower() == ".csv":
        return _from_csv(path, labelled=labelled)
    if path.is_file() and _is_hdf5(path):
        return _from_hdf5(path, labelled=labelled)
    if labelled:
        raise UserError(f"{path} is neither a CSV (.csv) nor an HDF5 file (.h5, .hdf5), and not a folder of patches.")
    if path.is_file() and path.suffix.lower() in images.SUFFIXES:
        return _of_files(path, [path.name], [path])
    raise UserError(
        f"{path} is {'no patch' if path.exists() else 'not there'}. Expected an image ({_IMAGE_SUFFIXES}), a folder of "
        "images, a CSV with a column path, or an HDF5 file with x."
    )


def _of_files(
    source: Path, ids: Sequence[str], paths: Sequence[Path], columns: Mapping[str, list[str]] | None = None
) -> Patches:
    return Patches(
        str(source), tuple(ids), file_decoder(paths), lambda: check_files(paths, source.name)[0], columns or {}
    )


# --- folders ----------------------------------------------------------------------------------------------------------


def _from_class_folders(folder: Path) -> Patches:
    entries = [entry for entry in sorted(folder.iterdir()) if not _is_ignored(entry.name)]
    loose = [entry.name for entry in entries if entry.suffix.lower() in images.SUFFIXES]
    classes = [entry.name for entry in entries if entry.is_dir()]
    if loose or len(classes) < 2:
        content = f"{len(loose)} images outside them ({first_of(loose)})" if loose else f"{len(classes)} sub-folders"
        raise UserError(f"{folder} has {content}. Expected one sub-folder per class with the class's patches inside.")
    files = list_classes(folder, classes)
    labels = {"label": [file.label for file in files]}
    return _of_files(folder, [file.id for file in files], [file.path for file in files], labels)


def _from_any_folder(folder: Path) -> Patches:
    below = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in below if not any(map(_is_ignored, path.parts))]
    ids = sorted((path.as_posix() for path in kept if path.suffix.lower() in images.SUFFIXES), key=_natural)
    if not ids:
        raise UserError(f"{folder} holds no images ({_IMAGE_SUFFIXES}), only {len(kept)} other files.")
    if len(ids) < len(kept):
        say(f"{folder}: {len(kept) - len(ids)} files that are no images were left out.")
    return _of_files(folder, ids, [folder / name for name in ids])


def list_classes(folder: Path, classes: Sequence[str]) -> list[PatchFile]:
    """List the patches of each class folder, in natural order of their ids.

    Hidden files and the files that desktop systems leave behind are ignored; anything else that is no image is refused.

    Raises:
        UserError: an empty class, an entry that is no image, or a name that cannot be stored as an id.
    """
    files, others, empty, unprintable = [], [], [], []
    for label in classes:
        class_folder = folder / label
        entries = list(class_folder.iterdir()) if class_folder.is_dir() else []
        entries = [entry for entry in entries if not _is_ignored(entry.name)]
        for entry in entries:
            if not entry.name.isprintable():  # names that are no UTF-8 are among these
                unprintable.append(f"{label}/{entry.name!a}")
            if entry.suffix.lower() in images.SUFFIXES and not entry.is_dir():
                files.append(PatchFile(f"{label}/{entry.name}", label, entry))
            else:
                others.append(f"{label}/{entry.name}")
        if not entries:
            empty.append(label)
    if empty:
        raise UserError(
            f"{folder}: no patches for class {' and '.join(empty)} (no such folder, or an empty one). Expected "
            "images in every class folder; add them, or remove the folder."
        )
    if unprintable:
        raise UserError(
            f"{folder}: {len(unprintable)} file names hold characters that cannot be printed "
            f"({first_of(sorted(unprintable))}). Rename them: the name is the patch's id."
        )
    if others:
        raise UserError(
            f"{folder}: {len(others)} entries of the class folders are not images ({first_of(sorted(others))}). "
            f"Expected only files ending in {_IMAGE_SUFFIXES}; move the others away."
        )
    return sorted(files, key=lambda file: _natural(file.id))


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FILES


def _natural(text: str) -> tuple[list[str | int], str]:
    """Make a sort key under which 10.png follows 9.png."""
    parts = re.split(r"([0-9]+)", text)  # text and number in turn
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], text


# --- CSV --------------------------------------------------------------------------------------------------------------


def _from_csv(table: Path, *, labelled: bool) -> Patches:
    required = ("path", "label") if labelled else ("path",)
    rows = read_csv(table, required=required)
    optional = [name for name in _OPTIONAL_COLUMNS if labelled and name in rows[0]]
    cells = {name: [row[name].strip() for row in rows] for name in (*required, *optional)}
    paths = [table.parent / path for path in cells["path"]]
    ids = cells.get("id", cells["path"])

    def refuse(bad: Iterable[int], what: str, remedy: str) -> None:
        named = [f"line {rows[row].line}: {ids[row] or '(empty)'}" for row in bad]
        if named:
            raise UserError(f"{table}: {what} in {len(named)} of {len(rows)} rows ({first_of(named)}). {remedy}")

    refuse(_empty(cells["path"]), "an empty path", "Every row needs the path of its patch.")
    if labelled:
        refuse(_empty(cells["label"]), "an empty label", "Every row needs a label; remove unlabelled patches.")
        refuse(
            _repeated(ids),
            "an id or path that occurs more than once",
            "Every patch needs one row and an id of its own.",
        )
        repeated_paths = _repeated([os.path.normpath(path) for path in paths])
        refuse(repeated_paths, "a path that occurs more than once", "Keep one row of each.")
        unknown = [row for row, split in enumerate(cells.get("split", ())) if split not in (TRAIN, TEST, "")]
        refuse(unknown, "an unknown split", f"A split is '{TRAIN}', '{TEST}' or empty (folds are made from '{TRAIN}').")
    missing = [row for row, path in enumerate(paths) if not _is_file(path)]
    refuse(missing, "a file that does not exist", f"Paths are relative to {table.parent.resolve()}.")
    return _of_files(table, ids, paths, cells)


def _empty(cells: Sequence[str]) -> list[int]:
    return [row for row, cell in enumerate(cells) if not cell]


def _repeated(values: Sequence[str]) -> list[int]:
    counts = Counter(values)
    return [row for row, value in enumerate(values) if counts[value] > 1]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than a file system takes
        return False


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def _is_hdf5(path: Path) -> bool:
    return path.suffix.lower() in _HDF5_SUFFIXES


def _from_hdf5(path: Path, *, labelled: bool) -> Patches:
    x = _hdf5_array(path, "x")
    if x.ndim != 4 or x.shape[-1] != 3 or x.dtype != np.uint8:
        raise UserError(f"{path}: x is {x.dtype} of shape {x.shape}, expected uint8 of shape (n, height, width, 3).")
    lock = Lock()  # HDF5 files are not safe to read from several threads

    def read(rows: int | slice) -> NDArray[np.uint8]:
        try:
            with lock:
                return np.asarray(x[rows])
        except OSError as error:
            raise UserError(f"{path}, row {rows} cannot be read ({error}). Restore the file, then run again.") from None

    n = x.shape[0]
    ids = tuple(f"{row:0{len(str(n - 1))}d}" for row in range(n))  # row numbers that sort as text
    columns = {"label": _hdf5_labels(path, x)} if labelled else {}
    return Patches(str(path), ids, read, lambda: _hdf5_digests(path, n, read), columns)


def _hdf5_digests(path: Path, n: int, read: Callable[[slice], NDArray[np.uint8]]) -> list[str]:
    digests = []
    with progress(f"check {path.name}", n) as advance:
        for start in range(0, n, _HDF5_ROWS):
            block = read(slice(start, start + _HDF5_ROWS))  # (rows, height, width, 3)
            digests += [hashlib.sha256(patch.tobytes()).hexdigest() for patch in block]
            advance(len(block))
    return digests


def _hdf5_labels(path: Path, x: h5py.Dataset) -> list[str]:
    # PatchCamelyon ships images and labels as two files, ..._x.h5 and ..._y.h5.
    sibling = path.with_name(re.sub(r"(?<![A-Za-z0-9])x(?![A-Za-z0-9])", "y", path.name))
    y = _hdf5_array(path if "y" in x.file or not sibling.is_file() else sibling, "y")
    n = x.shape[0]
    if not n or y.size != n:
        raise UserError(f"{path}: x holds {n} patches and y {y.size} labels; expected one label per patch.")
    values = y[()].reshape(n).tolist()
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _hdf5_array(path: Path, key: str) -> h5py.Dataset:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} is not a readable HDF5 file ({error}). Expected datasets x and y.") from None
    if not isinstance(file.get(key), h5py.Dataset):
        raise UserError(
            f"{path} has no dataset {key!r} (it has {', '.join(sorted(file)) or 'nothing'}). Expected x, (n, height, "
            "width, 3) uint8, and y, one label per patch, in the same file or in one named with y in place of x."
        )
    return file[key]


def first_of(names: Sequence[str]) -> str:
    """Join the first few of many names, for an error."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
