"""What does GeoJSON of QuPath say: which place has each feature, of which class is it, and what is it called?

QuPath writes every object as a feature (https://qupath.readthedocs.io/en/0.5/docs/advanced/exporting_annotations.html):
an `id`, which is a UUID since version 0.4; a geometry in pixels of level 0; and `properties` with `objectType`,
`classification` (`name` and `color`; before 0.4 `colorRGB`), `measurements` and, since 0.5, `metadata`. The file is a
FeatureCollection, a list of features, or one feature.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.console import UserError

# What QuPath 0.2 wrote as the id of every feature: its type.
_TYPES_AS_IDS = frozenset(
    f"{kind}Object" for kind in ("PathAnnotation", "PathDetection", "PathTile", "PathCell", "TMACore", "PathRoot")
)
_AREAS = ("Polygon", "MultiPolygon")
_FARTHEST = 1e9  # pixels; the widest slides have some 300,000
_CORNERS = 10_000  # of an outline: more is a region
_ROWS = 256  # edges that are compared with all others at once


@dataclass(frozen=True, eq=False)
class Feature:
    """One feature of a file, as it was written.

    Attributes:
        name: what to call it in a message.
        content: the feature.
    """

    name: str
    content: dict[str, Any]

    @property
    def properties(self) -> dict[str, Any]:
        """Its properties; empty if it has none."""
        return _object(self.content.get("properties"))

    @property
    def id(self) -> str:
        """Its id; empty if it has none."""
        id = self.content.get("id")
        return str(id) if isinstance(id, str | int) and id not in _TYPES_AS_IDS else ""

    @property
    def label(self) -> str:
        """The name of its class, "Tumor: Positive" of one below another; empty if it is not classified."""
        classification = self.properties.get("classification")
        if isinstance(classification, dict):
            names = classification.get("names")
            whole = ": ".join(map(str, names)) if isinstance(names, list) else ""
            classification = classification.get("name") or whole
        return classification if isinstance(classification, str) else ""

    def known(self, name: str) -> str:
        """Look up a property, or an entry of QuPath's metadata, that is text or a number; empty if there is none."""
        for values in (self.properties, _object(self.properties.get("metadata"))):
            if isinstance(values.get(name), str | int | float) and not isinstance(values[name], bool):
                return str(values[name])
        return ""


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def are_pixels(values: Sequence[Any]) -> bool:
    """Whether all values are numbers that can be coordinates on a slide.

    >>> are_pixels([10, 0.5]), are_pixels([float("nan"), 0]), are_pixels(["1", 0])
    (True, False, False)
    """
    return all(type(value) in (int, float) and abs(value) < _FARTHEST for value in values)


def holds_features(content: Any) -> bool:
    """Whether JSON is GeoJSON with features: a FeatureCollection, a list of features, or one feature."""
    if isinstance(content, list):
        return all(isinstance(one, dict) and one.get("type") == "Feature" for one in content)
    kind = content.get("type") if isinstance(content, dict) else None
    return kind == "Feature" or (kind == "FeatureCollection" and isinstance(content.get("features"), list))


def read_features(path: Path, content: Any) -> list[Feature]:
    """List the features of GeoJSON, each with one place: a feature with several points becomes one of each.

    Each of several points gets an id of its own, made from that of the feature (UUID version 5) and so the same
    whenever it is read; QuPath takes no other.

    Args:
        path: its file, for messages.
        content: what `holds_features` says is GeoJSON.

    Raises:
        UserError: for an entry that is no feature.
    """
    features = content if isinstance(content, list) else content.get("features", [content])
    listed = []
    for row, feature in enumerate(features):
        if not isinstance(feature, dict) or feature.get("type") != "Feature":
            raise UserError(f"{path}: entry {row + 1} of its features is none. Expected objects of the type Feature.")
        one = Feature(f"{path}: feature {row + 1}", feature)
        one = Feature(f"{one.name} ({one.id})", feature) if one.id else one
        listed += _each_point(one)
    return listed


def _each_point(feature: Feature) -> list[Feature]:
    geometry = _object(feature.content.get("geometry"))
    points = geometry.get("coordinates")
    if geometry.get("type") != "MultiPoint" or not isinstance(points, list) or len(points) < 2:
        return [feature]
    split = []
    for k, position in enumerate(points):
        content = feature.content | {"geometry": geometry | {"type": "Point", "coordinates": position}}
        if feature.id:
            content["id"] = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{feature.id}/{k}"))
        split.append(Feature(f"{feature.name}, point {k + 1}", content))
    return split


def place_of(feature: Feature) -> tuple[float, float]:
    """Find the place of a feature: its point, or the centroid of its area, holes left out.

    Raises:
        UserError: no geometry, another one, coordinates that are no numbers, or an area without a centroid: one that is
            empty, or whose outline crosses itself.
    """
    geometry = _object(feature.content.get("geometry"))
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind in ("Point", "MultiPoint"):  # of the latter one is left, see `read_features`
        x, y = _positions(feature, [coordinates] if kind == "Point" else coordinates)[0].tolist()
        return x, y
    if kind not in _AREAS:
        found = f"the geometry {kind}" if isinstance(kind, str) else "no geometry"
        raise UserError(
            f"{feature.name} has {found}. Expected a point or an area (Point, MultiPoint, Polygon or MultiPolygon): "
            "remove it, or mark the figure's place by a point."
        )
    polygons = [coordinates] if kind == "Polygon" else coordinates
    total, moments = 0.0, np.zeros(2)
    for polygon in polygons if isinstance(polygons, list) else []:
        for k, ring in enumerate(polygon if isinstance(polygon, list) else []):
            area, centroid = _centroid(feature, _positions(feature, ring))
            total += -area if k else area  # all rings but the first are holes
            moments += (-area if k else area) * centroid
    if not total > 0:
        raise UserError(
            f"{feature.name} is a polygon without an area. Remove it, or mark the figure's place by a point."
        )
    x, y = (moments / total).tolist()
    return x, y


def _positions(feature: Feature, positions: Any) -> NDArray[np.float64]:
    """Read positions as (n, 2); a third number, the height, is left out."""
    listed = positions if isinstance(positions, list) else []
    if not listed or not all(isinstance(one, list) and len(one) > 1 and are_pixels(one[:2]) for one in listed):
        raise UserError(f"{feature.name} has coordinates that are no pairs of numbers. Correct it, or remove it.")
    return np.array([one[:2] for one in listed], dtype=np.float64)


def _centroid(feature: Feature, ring: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Compute area and centroid of a closed line (n, 2) by Gauss's formula; relative to its first corner, for accuracy.

    Raises:
        UserError: if the line crosses itself, because parts of the area would then count against each other.
    """
    ring = ring[:-1] if len(ring) > 1 and (ring[0] == ring[-1]).all() else ring
    if len(ring) > _CORNERS:
        raise UserError(
            f"{feature.name} has {len(ring):,} corners; expected the outline of one figure, with {_CORNERS:,} at most. "
            "Export the figures without the regions around them."
        )
    if _crosses_itself(ring):
        raise UserError(
            f"{feature.name} is a polygon whose outline crosses itself, so that its centre is not defined. Draw it "
            "again in QuPath, or mark the figure's place by a point."
        )
    corners = ring - ring[0]
    following = np.roll(corners, -1, axis=0)
    cross = corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]
    twice = float(cross.sum())
    if twice == 0:
        return 0.0, ring[0]
    centroid: NDArray[np.float64] = ring[0] + ((corners + following) * cross[:, None]).sum(axis=0) / (3 * twice)
    return abs(twice) / 2, centroid


def _crosses_itself(corners: NDArray[np.float64]) -> bool:
    """Whether two edges of a closed line (n, 2) cross, each within the other; those that only touch do not count."""
    along = np.roll(corners, -1, axis=0) - corners  # of every edge
    parted = np.empty((len(corners), len(corners)), dtype=bool)  # by the line of which edge, which edge
    for start in range(0, len(corners), _ROWS):
        rows = slice(start, start + _ROWS)
        apart = corners[None] - corners[rows, None]
        side = np.sign(along[rows, None, 0] * apart[..., 1] - along[rows, None, 1] * apart[..., 0])
        parted[rows] = side * np.roll(side, -1, axis=1) < 0
    return bool((parted & parted.T).any())
