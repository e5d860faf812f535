"""Which places on slides does a file name: a table with slide, x and y, a COCO or MIDOG file, or GeoJSON of QuPath?

Coordinates are those of QuPath and OpenSlide: x to the right and y down from the upper left corner of the slide's
largest image (level 0), so that the pixel in column 10 reaches from x = 10 to x = 11 and has its centre at 10.5. They
are taken as they stand, whole or not: the half pixel between a pixel's corner and its centre (0.1 um) is never added.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extract import images
from extract.geojson import Feature, are_pixels, holds_features, place_of, read_features
from features.console import UserError, progress
from features.tables import first_of, header_of, read_table, refuse_rows, same_name, spellings

COLUMNS = ("label", "group", "split", "domain")
_TABLES = frozenset({".csv", ".tsv", ".txt"})
_AXES = (("slide", "x", "y"), ("slide", "x_um", "y_um"))
_OTHERS = frozenset({".json", ".csv", ".tsv"})  # what may hold points as well, but not in a folder
_OF_A_FOLDER = (
    "Of a folder, GeoJSON alone is read, under names that end in .geojson: rename what is GeoJSON, and give a table or "
    "a COCO file by its own path."
)
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_LARGEST = 2**30  # bytes of a JSON file: some three million annotated points
_EXPECTED = (
    "Expected GeoJSON as QuPath exports it, or COCO's keys images, annotations and categories (MIDOG's files have them)"
)


@dataclass(frozen=True, eq=False, repr=False)
class Points:
    """Places on slides, and what is known of each.

    Attributes:
        source: the file or folder.
        id: (n,) unique names, in the order of the file.
        slide: (n,) each one's slide as it was written: a file's name, with or without its suffix.
        x: (n,) float64; columns from the left, in pixels of level 0, or in micrometres where `unit` says so.
        y: (n,) float64; rows from above.
        unit: "px" or "um".
        columns: what else is known, column by column as it was written: `label`, `group`, `split`, `domain`.
        lines: the line of the table on which each place stands, where there is one.
        features: (n,) the GeoJSON features, where there are any. Of a feature with several points each is one here.
        origin: (n, 2) of points that were found on their slides, where QuPath counts from, in pixels of level 0 from
            the corner of the whole image, from which x and y then count; None before, and x and y are as written.
        extent: (n, 2) width and height of each one's slide, in pixels of level 0, likewise.
    """

    source: Path
    id: list[str]
    slide: list[str]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    unit: str = "px"
    columns: Mapping[str, list[str]] = field(default_factory=dict)
    lines: Sequence[int] = ()
    features: list[dict[str, Any]] | None = None
    origin: NDArray[np.float64] | None = None
    extent: NDArray[np.float64] | None = None

    def __repr__(self) -> str:
        return f"Points({len(self.id):,} places on {len(set(self.slide)):,} slides; source={str(self.source)!r})"

    def select(self, rows: Sequence[int]) -> Points:
        """Select some of the places, in that order."""
        return replace(
            self,
            id=[self.id[row] for row in rows],
            slide=[self.slide[row] for row in rows],
            x=self.x[list(rows)],
            y=self.y[list(rows)],
            columns={name: [cells[row] for row in rows] for name, cells in self.columns.items()},
            lines=[self.lines[row] for row in rows] if self.lines else (),
            features=[self.features[row] for row in rows] if self.features else None,
            origin=None if self.origin is None else self.origin[list(rows)],
            extent=None if self.extent is None else self.extent[list(rows)],
        )

    @cached_property
    def in_qupath(self) -> NDArray[np.float64]:
        """Where QuPath shows the points, (n, 2): of some slides, such as MRXS, it counts from what was scanned."""
        return np.stack([self.x, self.y], axis=1) - (0 if self.origin is None else self.origin)

    def where(self, row: int) -> str:
        """Name a place for a message: its line in the table, if there is one, and its id."""
        return f"line {self.lines[row]}: {self.id[row]}" if self.lines else self.id[row]


def is_points_file(path: Path) -> bool:
    """Whether a path names places on slides: GeoJSON or other JSON, a folder of GeoJSON, or a table of coordinates.

    A table with the columns slide, x and y (or x_um and y_um) is one unless it also has a column of patch files. A
    folder is one if GeoJSON lies in it, or if GeoJSON and no images lie below it. Of JSON and GeoJSON only the suffix
    is looked at; `read_points` says what is wrong with the rest.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return _holds_geojson(path)
    if suffix not in _TABLES:
        return path.is_file() and suffix in (".geojson", ".json")
    names = {same_name(name) for name in header_of(path)} if path.is_file() else set()
    measured = any(name.startswith("centroidx") for name in names)  # QuPath's, whose column Image names the slide
    return any(not _lacking(names, axes) for axes in _AXES) and (measured or bool(_lacking(names, ("path",))))


def why_no_points(path: Path) -> str:
    """Say what a path that names no places lacks to name some, for a message; empty if it is nothing of that kind."""
    if path.name.lower().endswith(".geojson.gz"):
        return f"{path} is compressed: unpack it (gunzip)."
    if path.is_dir():
        others = _files_below(path, _OTHERS)
        listed = first_of([file.relative_to(path).as_posix() for file in others])
        return f"{path} has no GeoJSON, but {listed}. {_OF_A_FOLDER}" if others else ""
    names = {same_name(name) for name in header_of(path)} if path.suffix.lower() in _TABLES else set()
    lacking = min((_lacking(names, axes) for axes in _AXES), key=len)
    if not lacking:
        return f"{path} has a column of patch files, which makes it a table of patches: remove that column."
    has = [column for column in dict.fromkeys(sum(_AXES, ())) if not _lacking(names, (column,))]
    return f"{path} has {', '.join(has)}; lacks {' and '.join(lacking)}." if has else ""


def _lacking(names: Set[str], columns: Sequence[str]) -> list[str]:
    return [column for column in columns if names.isdisjoint(spellings(column))]


def read_points(path: Path, *, labelled: bool = False) -> Points:
    """Read places on slides.

    - A table has the columns slide, x and y, in pixels of level 0, or x_um and y_um, in micrometres; and may have id,
      label, group, split and domain. Other usual names are understood, among them those of QuPath's measurements
      (Image, Centroid X px, Classification, Object ID).
    - COCO: the place is the centre of an annotation's box, its category the label, its image's `file_name` the slide.
      Boxes are [x, y, width, height] in COCO and [left, upper, right, lower] in MIDOG's files; which of the two is
      found out from the boxes: read in the right way, all have their centre inside their image, and MIDOG's are squares
      of one size.
    - GeoJSON: see `extract.geojson`. The slide is the file's name without `.geojson`, or a property `slide` or `image`.
      A folder of such files, in it and below it, is one set of places; other .json, .csv and .tsv files there are
      refused.

    Ids are those of the file; where several slides have the same ids, each is preceded by its slide, and where a place
    has none, its slide and coordinates are its id.

    Args:
        path: a table (.csv, .tsv), .json or .geojson, or a folder of .geojson files.
        labelled: whether a table must have labels.

    Raises:
        UserError: no such file, other content, no places, coordinates that are no numbers, geometry that has no centre,
            or two places of one id.
    """
    if path.is_dir():
        others = [file.relative_to(path).as_posix() for file in _files_below(path, _OTHERS)]
        if others:
            raise UserError(
                f"{path}: {len(others)} files beside its GeoJSON could hold points too ({first_of(others)}). "
                f"{_OF_A_FOLDER} Move the others out of the folder."
            )
        points = _from_features(path, [(file, _read_json(file)) for file in _files_below(path, {".geojson"})])
    elif path.suffix.lower() in _TABLES:
        points = _from_table(path, labelled=labelled)
    else:
        content = _read_json(path)
        coco = isinstance(content, dict) and "annotations" in content and "images" in content
        points = _from_coco(path, content) if coco else _from_features(path, [(path, content)])
    return _with_unique_ids(points)


def _with_unique_ids(points: Points) -> Points:
    ids = [
        id or f"{slide}@{x:.10g},{y:.10g}"
        for id, slide, x, y in zip(points.id, points.slide, points.x.tolist(), points.y.tolist(), strict=True)
    ]
    if len(set(ids)) < len(ids):  # each slide counts its figures from 1
        ids = [f"{slide}/{id}" if own else id for own, slide, id in zip(points.id, points.slide, ids, strict=True)]
    points, counts = replace(points, id=ids), Counter(ids)
    repeated = [points.where(row) for row, id in enumerate(ids) if counts[id] > 1]
    what = "an id, or without ids a place, that occurs more than once on its slide"
    refuse_rows(points.source, repeated, len(ids), what, "Keep one of each, or give each an id of its own.")
    return points


# --- tables -----------------------------------------------------------------------------------------------------------


def _from_table(path: Path, *, labelled: bool) -> Points:
    names = {same_name(name) for name in header_of(path)}
    unit = "um" if names.isdisjoint(spellings("x")) and not names.isdisjoint(spellings("x_um")) else "px"
    axes = ("x_um", "y_um") if unit == "um" else ("x", "y")
    required = ("slide", *axes, *(("label",) if labelled else ()))
    left_out = set(required)
    if "fold0" in names and _lacking(names, ("split",)):  # a table of predictions, whose fold_0 is no misspelt split
        left_out.add("split")
    table = read_table(path, required=required, optional=("id", *(name for name in COLUMNS if name not in left_out)))
    n = len(table)
    x, y = (np.array([_number(cell) for cell in table.columns[axis]]) for axis in axes)
    columns = {name: table.columns[name] for name in COLUMNS if name in table.columns}
    slide = table.columns["slide"]
    points = Points(path, table.columns.get("id", [""] * n), slide, x, y, unit, columns, table.lines)
    empty = [points.where(row) for row in range(n) if not slide[row]]
    refuse_rows(path, empty, n, "no slide", "Every row needs the file name of its slide.")
    wrong = [
        (f"line {table.lines[row]}: {axis} is {table.columns[axis][row]!r}", table.columns[axis][row])
        for row in np.flatnonzero(~(np.isfinite(x) & np.isfinite(y))).tolist()
        for axis in axes
        if not np.isfinite(_number(table.columns[axis][row]))
    ]
    comma = next((cell for _, cell in wrong if _DECIMAL_COMMA.fullmatch(cell)), None)
    cause = f"A comma is no decimal point: write {comma.replace(',', '.')} for {comma}. " if comma else ""
    remedy = f"{cause}Correct these, or remove them."
    refuse_rows(path, [where for where, _ in wrong], n, "a coordinate that is no number", remedy)
    return points


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan


# --- JSON -------------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise UserError(
                f"{path} has {size / 1e9:,.1f} GB; expected at most {_LARGEST / 1e9:,.1f}. Export the figures alone, "
                "without other cells and measurements, or as a table with slide, x and y."
            )
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. {_EXPECTED}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {_EXPECTED}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8. {_EXPECTED}; a compressed file must be unpacked first.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: no readable JSON ({error.msg}). {_EXPECTED}. If it ends too early, export "
            "it again."
        ) from None
    except (RecursionError, ValueError):  # brackets within brackets, or a number of thousands of digits
        raise UserError(f"{path} is nested too deeply, or has a number too long to be read. {_EXPECTED}.") from None


def _from_coco(path: Path, content: Mapping[str, Any]) -> Points:
    images, annotations = _records(path, content, "images"), _records(path, content, "annotations")
    named = {str(category.get("id")): category.get("name") for category in _records(path, content, "categories")}
    image_of = {str(image.get("id")): image for image in images if image.get("file_name")}
    id = [str(one.get("id", "")) for one in annotations]
    n = len(annotations)
    if not n:
        raise UserError(f"{path} has no annotations. Expected one or more figures, each with its box.")

    def refuse(rows: Sequence[int], what: str, remedy: str) -> None:
        refuse_rows(path, [f"annotation {id[row] or row}" for row in rows], n, what, remedy)

    lost = [
        row
        for row, one in enumerate(annotations)
        if not isinstance(image_of.get(str(one.get("image_id")), {}).get("file_name"), str)
    ]
    refuse(lost, "an image_id that no entry of images with a file_name has", "Give each annotation its image.")
    boxes = [_box(one.get("bbox")) for one in annotations]
    refuse([row for row, box in enumerate(boxes) if box is None], "no box of four numbers", "Give each its bbox.")
    image = [image_of[str(one.get("image_id"))] for one in annotations]
    sizes = np.array([[_side(one.get("width")), _side(one.get("height"))] for one in image])
    centre = _centres(path, np.array(boxes, dtype=np.float64), sizes)
    columns = {"label": [str(named.get(str(one.get("category_id"))) or "") for one in annotations]}
    for name in COLUMNS[1:]:
        cells = [str(one.get(name) or whole.get(name) or "") for one, whole in zip(annotations, image, strict=True)]
        if any(cells):
            columns[name] = cells
    x, y = centre.T
    return Points(path, id, [one["file_name"] for one in image], x, y, columns=columns)


def _records(path: Path, content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    records = content.get(key, [])
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise UserError(f"{path}: {key} is no list of objects. {_EXPECTED}.")
    return records


def _box(box: Any) -> list[float] | None:
    return box if isinstance(box, list) and len(box) == 4 and are_pixels(box) else None


def _side(pixels: Any) -> float:
    return pixels if are_pixels([pixels]) and pixels > 0 else np.inf


def _centres(path: Path, boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find the centres (n, 2) of boxes (n, 4), in whichever of both ways they were written; sizes (n, 2) of images."""
    start = boxes[:, :2]
    possible = []
    for sides in (boxes[:, 2:], boxes[:, 2:] - start):  # COCO's, MIDOG's
        centre = start + sides / 2
        if (sides > 0).all() and (centre >= 0).all() and (centre <= sizes).all():
            possible.append((centre, bool((sides == sides[0, 0]).all())))  # whether all are squares of one size
    if len(possible) == 2 and possible[0][1] != possible[1][1]:
        possible = [one for one in possible if one[1]]
    if len(possible) == 1:
        return possible[0][0]
    found = "can be read both" if possible else "can be read neither"
    raise UserError(
        f"{path}: its boxes {found} as [x, y, width, height], as in COCO, {'and' if possible else 'nor'} as [left, "
        "upper, right, lower], as in MIDOG's files, with positive sides and centres inside their images. Give the "
        "width and height of every entry of images, or a table with slide, x and y instead."
    )


# --- GeoJSON ----------------------------------------------------------------------------------------------------------


def _files_below(folder: Path, suffixes: Set[str]) -> list[Path]:
    listed = (parent / name for parent, names in _walk(folder) for name in names)
    return sorted(file for file in listed if file.suffix.lower() in suffixes)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """List the folder, and all below it, each with the names of its files; nothing that is hidden."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk enters those that are left
        yield Path(parent), [name for name in names if not name.startswith(".")]


def _holds_geojson(folder: Path) -> bool:
    found = False
    for parent, names in _walk(folder):
        suffixes = {Path(name).suffix.lower() for name in names}
        found |= ".geojson" in suffixes
        if found and parent == folder:
            return True
        if suffixes & images.SUFFIXES:  # a folder of patches; the first of them ends the search
            return False
    return found


def _from_features(source: Path, files: Sequence[tuple[Path, Any]]) -> Points:
    listed: list[tuple[str, Feature]] = []
    for file, content in files:
        if not holds_features(content):
            raise UserError(f"{file} is JSON, but no GeoJSON. {_EXPECTED}.")
        stem = file.stem if file.suffix.lower() in (".geojson", ".json") else file.name
        listed += [(one.known("slide") or one.known("image") or stem, one) for one in read_features(file, content)]
    if not listed:
        raise UserError(f"{source} has no features. Select the figures in QuPath before exporting them.")
    with progress(f"read {source.name}", len(listed)) as advance:
        centre = []
        for _, feature in listed:
            centre.append(place_of(feature))
            advance(1)
    columns = {name: [one.label if name == "label" else one.known(name) for _, one in listed] for name in COLUMNS}
    x, y = np.array(centre, dtype=np.float64).T
    return Points(
        source,
        [one.id for _, one in listed],
        [slide for slide, _ in listed],
        x,
        y,
        columns={name: cells for name, cells in columns.items() if name == "label" or any(cells)},
        features=[one.content for _, one in listed],
    )
