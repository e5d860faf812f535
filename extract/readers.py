"""Which patches does a path hold, and how is each read: an image, a folder, a table, arrays, or points on slides?

Each form is read in one place, for labelled patches (`extract.datasets.load_dataset`) and for new ones without labels
(`load_patches`). Of labelled patches nothing is left out silently, and every doubt is an error.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from PIL import Image

from extract import images
from extract.arrays import SUFFIXES as ARRAY_SUFFIXES
from extract.arrays import ImageArrays, read_arrays
from extract.images import Decode, check_files, file_decoder
from extract.points import Points, is_points_file, read_points, why_no_points
from extract.slide_files import SUFFIXES as SLIDE_SUFFIXES
from extract.slides import Crops, Slides
from features.console import UserError, progress, say
from features.tables import Table, first_of, is_missing, natural_order, read_table, refuse_rows

_OPTIONAL_COLUMNS = ("id", "group", "split", "domain")
_COLUMNS = ("label", "group", "split", "domain")
_ROWS = 256  # rows of an array hashed per read
_TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".txt"})
_FOREIGN = re.compile(r"[A-Za-z]:[\\/]|\\\\|(https?|ftp|s3|gs|az)://", re.IGNORECASE)
_SPLIT_FOLDERS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
_SYSTEM_FILES = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})
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
        columns: what is known of every patch, column by column as it was written: `label`, `group`, `split`, `domain`.
        lines: the line of the table on which each patch stands, where there is one.
        points: of patches around points of slides, these points, row by row, in pixels of level 0.
        slides: of these, the folder of the slides, and how the patches are cut.
        mpp: micrometres per pixel, or None where unknown.
    """

    source: str
    id: tuple[str, ...]
    decode: Decode
    digests: Callable[[], list[str]] = field(repr=False)
    columns: Mapping[str, list[str]] = field(default_factory=dict, repr=False)
    lines: Sequence[int] = field(default=(), repr=False)
    points: Points | None = field(default=None, repr=False)
    slides: Slides | None = None
    mpp: float | None = None

    def where(self, row: int) -> str:
        """Name a patch for a message: its line in the table, if there is one, and its id."""
        return f"line {self.lines[row]}: {self.id[row]}" if self.lines else self.id[row]

    def select(self, rows: Sequence[int]) -> Patches:
        """Select some of the patches, in that order."""
        return Patches(
            self.source,
            tuple(self.id[row] for row in rows),
            lambda row: self.decode(rows[row]),
            lambda: list(map(self.digests().__getitem__, rows)),
            {name: [cells[row] for row in rows] for name, cells in self.columns.items()},
            [self.lines[row] for row in rows] if self.lines else (),
            None if self.points is None else self.points.select(rows),
            self.slides,
            self.mpp,
        )


class PatchFile(NamedTuple):
    """A patch in the folder of its class."""

    id: str
    label: str
    path: Path


def load_patches(path: Path, *, grouped: bool = False, slides: Slides | None = None) -> Patches:
    """List and check new patches: an image, a folder (images at any depth), a table with a column path, arrays, or
    points on slides.

    Labels are not needed. Every file is checked first. With `grouped`, a table's column of groups may have any of the
    names that it may have for training.

    Raises:
        UserError: no such path, no patches, or patches that cannot be read.
    """
    patches = list_patches(path, labelled=False, grouped=grouped, slides=slides)
    if (
        path.suffix.lower() not in ARRAY_SUFFIXES
    ):  # the rows of an array have one type and shape; a file may hold anything
        patches.digests()
    return patches


def list_patches(path: Path, *, labelled: bool, grouped: bool = False, slides: Slides | None = None) -> Patches:
    """List the patches of a path without reading their pixels.

    Args:
        path: a folder, a table (.csv, .tsv), a file of arrays (.h5, .npz), or points on slides (`extract.points`);
            without labels also an image file.
        labelled: whether every patch must have a label: by its class folder, a column `label`, or an array of labels.
        grouped: whether groups are wanted of patches without labels.
        slides: where the slides of points are, and how large a patch is; other paths do not need it.

    Raises:
        UserError: no such path, another kind of file, no patches, or entries that contradict each other.
    """
    suffix = path.suffix.lower()
    if is_points_file(path):
        return _from_points(path, slides, labelled=labelled)
    if path.is_dir():
        return _from_class_folders(path) if labelled else _from_any_folder(path)
    if path.is_file() and suffix in _TABLE_SUFFIXES:
        return _from_table(path, labelled=labelled, grouped=grouped)
    if path.is_file() and suffix in ARRAY_SUFFIXES:
        return _from_arrays(path, labelled=labelled)
    if path.is_file() and suffix in images.SUFFIXES and not labelled:
        return _of_files(path, [path.name], [path])
    _refuse_slides([path] if path.is_file() else [])
    found = f"no file of patches{_hint(suffix)}" if path.exists() else "not there"
    expected = (
        "a folder with one sub-folder per class, a table (.csv, .tsv) with the columns path and label, or arrays of "
        "images and labels (.h5, .npz)"
        if labelled
        else f"an image ({_IMAGE_SUFFIXES}), a folder of images, a table (.csv, .tsv) with a column path, or arrays of "
        "images (.h5, .npz)"
    )
    raise UserError(f"{path} is {found}. Expected {expected}.")


def _hint(suffix: str) -> str:
    return {".xlsx": ": save the workbook as CSV", ".xls": ": save the workbook as CSV"}.get(suffix, "")


def _of_files(
    source: Path,
    ids: Sequence[str],
    paths: Sequence[Path],
    columns: Mapping[str, list[str]] | None = None,
    lines: Sequence[int] = (),
) -> Patches:
    def digests() -> list[str]:
        try:
            return check_files(paths, source.name)[0]
        except UserError:
            _refuse_slides(paths)
            raise

    return Patches(str(source), tuple(ids), file_decoder(paths), digests, columns or {}, lines)


def _may_be_slide(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix not in (".tif", ".tiff"):
        return suffix in SLIDE_SUFFIXES - images.SUFFIXES
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1 or image.width * image.height > images.MAX_PIXELS
    except Image.DecompressionBombError:
        return True
    except images.DAMAGE:
        return False


def _refuse_slides(paths: Iterable[Path]) -> None:
    """Refuse files that cannot be read as patches, if one is a whole slide: of a slide's suffix, or several images."""
    slide = next((path for path in paths if _may_be_slide(path)), None)
    if slide is not None:
        raise UserError(
            f"{slide} looks like a whole slide. Expected patches; to read a slide, give a file of points on it, and "
            "the slides' folder by --slides (docs/slides.md)."
        )


# --- folders ----------------------------------------------------------------------------------------------------------


def _from_class_folders(folder: Path) -> Patches:
    """List `<class>/<patch>`, or `train/<class>/<patch>` and `test/<class>/<patch>`."""
    classes = _sub_folders(folder)
    splits = [name for name in classes if name.casefold() in _SPLIT_FOLDERS]
    if not splits:
        return _of_class_files(folder, list_classes(folder, classes))
    if len(splits) < len(classes):
        others = [name for name in classes if name not in splits]
        raise UserError(
            f"{folder} has {first_of(splits)} beside {first_of(others)}: are these splits or classes? Expected one "
            "sub-folder per class, or train and test with one sub-folder per class in each. Move the others away."
        )
    files, split = [], []
    for name in splits:
        listed = list_classes(folder / name, _sub_folders(folder / name))
        files += [PatchFile(f"{name}/{file.id}", file.label, file.path) for file in listed]
        split += [name] * len(listed)
    return _of_class_files(folder, files, split=split)


def _of_class_files(folder: Path, files: Sequence[PatchFile], **columns: list[str]) -> Patches:
    labels = {"label": [file.label for file in files]}
    return _of_files(folder, [file.id for file in files], [file.path for file in files], labels | columns)


def _sub_folders(folder: Path) -> list[str]:
    entries = [entry for entry in sorted(folder.iterdir()) if not _is_ignored(entry.name)]
    loose = [entry.name for entry in entries if entry.suffix.lower() in images.SUFFIXES and not entry.is_dir()]
    classes = [entry.name for entry in entries if entry.is_dir()]
    if loose or not classes:
        content = f"{len(loose)} images outside them ({first_of(loose)})" if loose else "no sub-folders"
        raise UserError(f"{folder} has {content}. Expected one sub-folder per class with the class's patches inside.")
    return classes


def _from_any_folder(folder: Path) -> Patches:
    below = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in below if not any(map(_is_ignored, path.parts))]
    ids = sorted((path.as_posix() for path in kept if path.suffix.lower() in images.SUFFIXES), key=natural_order)
    if not ids:
        _refuse_slides(folder / name for name in kept)
        raise UserError(f"{folder} holds no images ({_IMAGE_SUFFIXES}), only {len(kept)} other files.")
    if len(ids) < len(kept):
        others = sorted(path.as_posix() for path in kept if path.suffix.lower() not in images.SUFFIXES)
        say(f"{folder}: {len(others)} files that are no {_IMAGE_SUFFIXES} were left out: {first_of(others)}.")
    return _of_files(folder, ids, [folder / name for name in ids])


def list_classes(folder: Path, classes: Sequence[str]) -> list[PatchFile]:
    """List the patches of each class folder, in natural order of their ids.

    Hidden files and the files that desktop systems leave behind are ignored; anything else that is no image is refused.

    Raises:
        UserError: an empty class, an entry that is no image, or a name that cannot be stored as an id.
    """
    files, others, empty, unprintable = [], [], [], []
    for label in classes:
        class_folder = os.path.join(folder, label)
        entries = list(os.scandir(class_folder)) if os.path.isdir(class_folder) else []
        entries = [entry for entry in entries if not _is_ignored(entry.name)]
        for entry in entries:
            if not entry.name.isprintable():  # names that are no UTF-8 are among these
                unprintable.append(f"{label}/{entry.name!a}")
            if os.path.splitext(entry.name)[1].lower() in images.SUFFIXES and not entry.is_dir():
                files.append(PatchFile(f"{label}/{entry.name}", label, Path(entry.path)))
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
    return sorted(files, key=lambda file: natural_order(file.id))


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FILES


# --- tables -----------------------------------------------------------------------------------------------------------


def _from_table(path: Path, *, labelled: bool, grouped: bool) -> Patches:
    required = ("path", "label") if labelled else ("path",)
    optional = _OPTIONAL_COLUMNS if labelled else ("id", "label", *(("group",) if grouped else ()))
    table = read_table(path, required=required, optional=optional)
    paths = _locate(table)
    ids = table.columns.get("id", table.columns["path"])
    columns = {name: table.columns[name] for name in _COLUMNS if name in table.columns}
    patches = _of_files(path, ids, paths, columns, table.lines)
    _refuse(patches, _repeated(ids), "an id or path that occurs more than once", "Every patch needs an id of its own.")
    if labelled:
        places = [os.path.normpath(path) for path in paths]
        _refuse(patches, _repeated(places), "a path that occurs more than once", "Keep one row of each.")
    return patches


def _refuse(patches: Patches, rows: Iterable[int], what: str, remedy: str) -> None:
    refuse_rows(patches.source, [patches.where(row) for row in rows], len(patches.id), what, remedy)


def _repeated(values: Sequence[str]) -> list[int]:
    counts = Counter(values)
    return [row for row, value in enumerate(values) if counts[value] > 1]


def _locate(table: Table) -> list[Path]:
    """Find the file of every row: relative to the table, absolute, from the home folder (~), or a file:// address."""
    cells, folder = table.columns["path"], table.path.parent

    def refuse(rows: Iterable[int], what: str, remedy: str) -> None:
        named = [f"line {table.lines[row]}: {cells[row] or '(empty)'}" for row in rows]
        refuse_rows(table.path, named, len(table), what, remedy)

    refuse(
        (row for row, cell in enumerate(cells) if is_missing(cell)),
        "an empty path",
        "Every row needs the path of its patch.",
    )
    refuse(
        (row for row, cell in enumerate(cells) if _FOREIGN.match(cell)),
        "a path on a Windows drive, the web or a bucket",
        "Copy the patches to this machine and give their paths here, best relative to the table.",
    )
    paths = [os.path.join(folder, _as_path(cell)) for cell in cells]
    missing = [row for row, path in enumerate(paths) if not _is_file(path)]
    turned = {row: os.path.join(folder, cells[row].replace("\\", "/")) for row in missing if "\\" in cells[row]}
    if missing and len(turned) == len(missing) and all(map(_is_file, turned.values())):
        say(f"{table.path}: backslashes in {len(turned)} paths are read as slashes.")
        return [Path(turned.get(row, path)) for row, path in enumerate(paths)]
    for form in ("NFC", "NFD"):  # a Mac writes names of files in the second, a spreadsheet in the first
        turned = {row: os.path.join(folder, unicodedata.normalize(form, cells[row])) for row in missing}
        if missing and all(map(_is_file, turned.values())):
            return [Path(turned.get(row, path)) for row, path in enumerate(paths)]
    elsewhere = bool(missing) and all(_is_file(cells[row]) for row in missing)
    hint = " They are there relative to the current folder: move the table there." if elsewhere else ""
    refuse(missing, "a file that does not exist", f"Paths are relative to {folder.resolve()}.{hint}")
    return list(map(Path, paths))


def _as_path(cell: str) -> str:
    if cell.lower().startswith("file://"):
        return unquote(urlsplit(cell).path)
    return os.path.expanduser(cell) if cell.startswith("~/") else cell


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):  # a name longer than a file system takes, or with a null character
        return False


# --- points on slides -------------------------------------------------------------------------------------------------


def require_points(paths: Sequence[Path], slides: Slides | None) -> None:
    """Refuse slides where no path names points on them.

    Raises:
        UserError: naming the paths.
    """
    if slides is not None and not any(is_points_file(path) or not path.exists() for path in paths):
        found = first_of(list(map(str, paths))) or "known datasets alone"
        raise UserError(
            f"`slides={slides.folder}` is for points on slides; found {found}. Expected GeoJSON or a folder of it, "
            "COCO JSON, or a table with the columns slide, x and y (or x_um and y_um). "
            + "".join(f"{reason} " for path in paths if (reason := why_no_points(path)))
            + "Leave `slides` out for patches."
        )


def _from_points(path: Path, slides: Slides | None, *, labelled: bool) -> Patches:
    if slides is None:
        raise UserError(
            f"{path} names places on slides. Say with `slides` in which folder the slides are, and with `size`, in "
            "pixels, or `size_um`, in micrometres, how large a patch around each is."
        )
    points = read_points(path, labelled=labelled)
    crops = Crops(slides, points)
    known = points.columns.get("group", [""] * len(points.id))
    group = [name if is_missing(cell) else cell for cell, name in zip(known, crops.names, strict=True)]
    return Patches(
        str(path),
        tuple(points.id),
        crops.read,
        crops.digests,
        {**points.columns, "group": group},
        points.lines,
        crops.points,
        slides,
        crops.mpp,
    )


# --- arrays -----------------------------------------------------------------------------------------------------------


def _from_arrays(path: Path, *, labelled: bool) -> Patches:
    arrays = read_arrays(path, labelled=labelled)
    columns = dict(arrays.columns)
    width = len(str(arrays.n - 1))
    ids = columns.pop("id", None) or [f"{row:0{width}d}" for row in range(arrays.n)]  # numbers that sort as text
    repeated = [id for id, count in Counter(ids).items() if count > 1]
    if not arrays.n or repeated:
        found = f"{len(repeated)} ids that occur more than once ({first_of(repeated)})" if repeated else "no patches"
        raise UserError(f"{path} has {found}. Expected one or more patches, each with an id of its own.")
    return Patches(str(path), tuple(ids), arrays.read, lambda: _array_digests(path, arrays), columns)


def _array_digests(path: Path, arrays: ImageArrays) -> list[str]:
    digests = []
    with progress(f"check {path.name}", arrays.n) as advance:
        for start in range(0, arrays.n, _ROWS):
            block = arrays.read(slice(start, start + _ROWS))  # (rows, height, width, 3)
            digests += [hashlib.sha256(patch).hexdigest() for patch in block]
            advance(len(block))
    return digests
