"""How do predictions for points on slides get back onto the slide: as GeoJSON for QuPath, or as a COCO file?

QuPath 0.4 and later take GeoJSON by drag and drop onto the opened slide. What they read is set out in the page
https://qupath.readthedocs.io/en/0.5/docs/advanced/exporting_annotations.html and in `QuPathTypeAdapters.java` of their
source: an `id` that is a UUID is kept, any other replaced; of `properties` they read `objectType`, `classification`
(`name`, `color`), `measurements` (name to number), `metadata` (name to text; since 0.5), `name`, `color`, `isLocked`
and child objects, and pass over the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extract.points import Points
from extract.readers import Patches
from features.console import UserError
from features.labels import Classes, class_color
from features.tables import first_of

FORMATS = ("csv", "geojson", "coco")
_FILES = (".geojson", ".json")  # what else GeoJSON is written to is a folder
_BOX = 50  # pixels; the side of MIDOG's boxes around mitotic figures, 12.5 um


@dataclass(frozen=True, eq=False)
class Said:
    """What a run says of n patches.

    Attributes:
        label_names: the classes.
        mean: (n, c) probabilities, the means over fold models.
        spread: (n,) population standard deviation over fold models, of class 1 of two, else of the predicted class.
        predicted: (n,) class numbers.
        threshold: of two classes.
    """

    label_names: Classes
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    predicted: NDArray[np.integer]
    threshold: float

    def rows(self, rows: slice) -> Said:
        """Select some of the patches."""
        return Said(self.label_names, self.mean[rows], self.spread[rows], self.predicted[rows], self.threshold)

    def measurements(self, row: int) -> dict[str, float]:
        """Name what is known of one patch, as QuPath shows it: rounded to six digits, like the CSV."""
        names, mean = self.label_names, self.mean[row].tolist()
        two = len(names) == 2
        known = {f"Probability {names[k]}": mean[k] for k in ((1,) if two else range(len(names)))}
        known |= {"Probability spread": float(self.spread[row])} | ({"Threshold": self.threshold} if two else {})
        return {name: round(value, 6) for name, value in known.items()}


def check_ending(out: Path, format: str) -> None:
    """Raise UserError if a name says another format than the one that is written."""
    ending = out.suffix.lower()
    fits, expected = {
        "csv": (ending not in _FILES, "a name such as predictions.csv"),
        "geojson": (
            ending in _FILES or out.is_dir() or not (ending or out.exists()),
            "a file that ends in .geojson or .json, or a folder: one that exists, or a name without an ending",
        ),
        "coco": (ending == ".json", "a file that ends in .json"),
    }[format]
    if not fits:
        raise UserError(f"`format={format}` and `out` do not fit together: found {out}, expected {expected}.")


def points_of(sources: Sequence[Patches], format: str, out: Path) -> list[Points]:
    """Find the points of every source, and check that a format other than CSV can hold them.

    Raises:
        UserError: patches that are around no points; points on several slides, which QuPath would draw onto one, and
            `out` is no folder.
    """
    without = [patches.source for patches in sources if patches.points is None]
    if without:
        raise UserError(
            f"`format={format}` is for points on slides, and {first_of(without)} holds patches, which lie nowhere. "
            "Predict from a file of points, or leave the format out."
        )
    points = [patches.points for patches in sources if patches.points is not None]
    slides = list(dict.fromkeys(slide for one in points for slide in one.slide))
    if format == "geojson" and len(slides) > 1 and out.suffix.lower() in _FILES:
        raise UserError(
            f"the points lie on {len(slides):,} slides ({first_of(slides)}), and QuPath imports a file onto one. Name "
            f"a folder as `out`, such as {out.with_suffix('')}: it gets a file of each slide."
        )
    return points


def place_files(points: Sequence[Points], said: Sequence[Said], format: str, out: Path) -> dict[Path, bytes]:
    """Make the files that hold predictions for points.

    GeoJSON is one file if `out` ends so, else a folder of one file for each slide, of the slide's name. COCO is one.

    Args:
        points: of each source, as they were found on their slides.
        said: of each source.
        format: "geojson" or "coco".
        out: the file or folder.
    """
    if format == "coco":
        return {out: coco(points, said)}
    features: dict[Path, list[dict[str, Any]]] = {}
    for one, of_one in zip(points, said, strict=True):
        for row, slide in enumerate(one.slide):
            features.setdefault(file_of(slide, out), []).append(feature(one, row, of_one))
    return {file: _collection(of_file) for file, of_file in features.items()}


def file_of(slide: str, out: Path) -> Path:
    """Name the GeoJSON file of a slide: `out` if it ends so, else one in that folder, of the slide's name.

    >>> file_of("lung/1.svs", Path("results")), file_of("1.svs", Path("one.geojson"))
    (PosixPath('results/lung/1.svs.geojson'), PosixPath('one.geojson'))
    """
    return out if out.suffix.lower() in _FILES else out / f"{slide}.geojson"


def feature(points: Points, row: int, said: Said) -> dict[str, Any]:
    """Make the GeoJSON feature of one point, as QuPath imports it.

    The feature that was read keeps its id, geometry and properties, but for three: `objectType` is "detection",
    `classification` the predicted class, and `measurements` gain the probabilities, their spread and the threshold. In
    `metadata` stand the slide, and the class as annotated, if it was. A point that came from a table becomes a feature
    of its own, named by its id.
    """
    read = points.features[row] if points.features else _new_feature(points, row)
    properties = dict(read.get("properties") or {})
    names, predicted = said.label_names, int(said.predicted[row])
    is_annotated = properties.get("objectType") != "detection"  # a detection's class was predicted before
    properties["objectType"] = "detection"
    properties["classification"] = {"name": names[predicted], "color": list(class_color(predicted))}
    properties["measurements"] = _with_measurements(properties.get("measurements"), said.measurements(row))
    metadata = properties.get("metadata", {})
    if isinstance(metadata, dict):
        label = points.columns["label"][row] if is_annotated and "label" in points.columns else ""
        properties["metadata"] = metadata | {"slide": points.slide[row]} | ({"annotated class": label} if label else {})
    return read | {"properties": properties}


def _new_feature(points: Points, row: int) -> dict[str, Any]:
    geometry = {"type": "Point", "coordinates": points.in_qupath[row].tolist()}
    return {"type": "Feature", "id": points.id[row], "geometry": geometry, "properties": {"name": points.id[row]}}


def _with_measurements(read: Any, new: dict[str, float]) -> Any:
    if isinstance(read, list):  # as QuPath wrote them before 0.4
        others = [one for one in read if not (isinstance(one, dict) and one.get("name") in new)]
        return others + [{"name": name, "value": value} for name, value in new.items()]
    return (read if isinstance(read, dict) else {}) | new


def _collection(features: Sequence[dict[str, Any]]) -> bytes:
    lines = ",\n".join(map(json.dumps, features))
    return f'{{"type": "FeatureCollection", "features": [\n{lines}\n]}}\n'.encode()


def coco(points: Sequence[Points], said: Sequence[Said]) -> bytes:
    """Make a COCO file (https://cocodataset.org/#format-data): a box of 50 pixels around each point.

    Every annotation has the probability of its class as `score`, as COCO's results do, and beside it the id of its
    point (`name`), the spread over fold models, and the probability of each class.
    """
    slides = list(dict.fromkeys(slide for one in points for slide in one.slide))
    number = {slide: k for k, slide in enumerate(slides, start=1)}
    sizes = {
        slide: dict(zip(("width", "height"), map(int, extent), strict=True))
        for one in points
        if one.extent is not None
        for slide, extent in zip(one.slide, one.extent.tolist(), strict=True)
    }
    names = said[0].label_names
    annotations: list[dict[str, Any]] = []
    for one, of_one in zip(points, said, strict=True):
        for row, (x, y) in enumerate(zip(one.x.tolist(), one.y.tolist(), strict=True)):
            predicted, mean = int(of_one.predicted[row]), of_one.mean[row].round(6).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number[one.slide[row]],
                    "category_id": predicted + 1,
                    "bbox": [x - _BOX / 2, y - _BOX / 2, _BOX, _BOX],
                    "area": _BOX**2,
                    "iscrowd": 0,
                    "score": mean[predicted],
                    "name": one.id[row],
                    "spread": round(float(of_one.spread[row]), 6),
                    "probabilities": dict(zip(names, mean, strict=True)),
                }
            )
    content = {
        "info": {"description": "predictions of mitofm"}
        | ({"threshold": said[0].threshold} if len(names) == 2 else {}),
        "images": [{"id": k, "file_name": slide} | sizes.get(slide, {}) for slide, k in number.items()],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, start=1)],  # 0 is often the background
        "annotations": annotations,
    }
    return (json.dumps(content, indent=1) + "\n").encode()
