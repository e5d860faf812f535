"""How are slides with the demo's figures drawn, for those who want to try points on slides without having any?

    python -m extract.demo_slides drawn

draws, in some seconds, drawn/slides/slide-00.tif and 29 more: pyramidal, tiled TIFF files that OpenSlide and QuPath
open, with the figures of the dataset `demo`. Where they are and what they are is in drawn/points.csv, and once more for
each slide in drawn/geojson/, as QuPath exports points.
"""

from __future__ import annotations

import csv
import json
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from extract.demo import MPP, SIZE, draw
from features.console import UserError, print_text, progress
from features.files import writing

TILE = 256  # pixels along a tile
N_LEVELS = 3  # of 1, 2 and 4 times the pixel's width
_PITCH = 192  # pixels from figure to figure
_COLOURS = {"Normal": [0, 128, 0], "Atypical": [200, 0, 0]}
_NAMESPACE = uuid.UUID("6b1d4f0e-5d0c-4a52-9a5e-0d6f4c1b7a11")  # of the figures' identifiers in GeoJSON
_JPEG = 7  # TIFF's number of that compression

Level = tuple[tuple[int, int], Iterable[NDArray[np.uint8] | bytes]]  # height and width; tiles, row by row


def draw_slides(folder: Path, *, n_slides: int | None = None, compressed: bool = True) -> Path:
    """Draw the slides of the dataset `demo`, and say in a table and in GeoJSON where their figures are.

    Args:
        folder: becomes the parent of `slides`, `geojson` and `points.csv`.
        n_slides: only the first of them; None for all 30.
        compressed: whether tiles are JPEG. Without it, the square of 128 pixels around a point is the demo's patch.

    Returns:
        The table: id, slide, x, y (pixels of level 0), label, split, domain.

    Raises:
        UserError: the folder cannot be written, or the package tifffile is not here.
    """
    samples, _, pixels = draw()
    names = sorted(set(samples.group.tolist()))[:n_slides]
    rows: list[dict[str, Any]] = []
    with writing(folder), progress("draw slides", len(names), unit="slides") as advance:
        for part in ("slides", "geojson"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            figures = np.flatnonzero(samples.group == name)
            whole, centres = _lay_out(pixels[figures])
            of_slide = [
                {
                    "id": samples.id[row],
                    "slide": f"{name}.tif",
                    "x": x,
                    "y": y,
                    "label": ("Normal", "Atypical")[samples.label[row]],
                    "split": samples.split[row],
                    "domain": samples.domain[row],
                }
                for row, (x, y) in zip(figures, centres, strict=True)
            ]
            write_slide(folder / "slides" / f"{name}.tif", pyramid(whole), compressed=compressed)
            text = json.dumps({"type": "FeatureCollection", "features": list(map(_feature, of_slide))}, indent=1)
            (folder / "geojson" / f"{name}.geojson").write_text(text, encoding="utf-8")
            rows += of_slide
            advance(1)
        table = folder / "points.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return table


def _lay_out(figures: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], list[tuple[int, int]]]:
    """Lay patches (n, SIZE, SIZE, 3) out on a slide of their mean colour; also give their centres."""
    across = int(np.ceil(np.sqrt(len(figures))))
    down = -(-len(figures) // across)
    slide = np.empty((down * _PITCH, across * _PITCH, 3), np.uint8)
    slide[:] = figures.mean(axis=(0, 1, 2)).round()
    margin, centres = (_PITCH - SIZE) // 2, []
    for number, figure in enumerate(figures):
        top, left = number // across * _PITCH + margin, number % across * _PITCH + margin
        slide[top : top + SIZE, left : left + SIZE] = figure
        centres.append((left + SIZE // 2, top + SIZE // 2))
    return slide, centres


def _feature(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, row["id"])),
        "geometry": {"type": "Point", "coordinates": [row["x"], row["y"]]},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": row["label"], "color": _COLOURS[row["label"]]},
            "split": str(row["split"]),
            "domain": str(row["domain"]),
        },
    }


def pyramid(whole: NDArray[np.uint8], n_levels: int = N_LEVELS) -> list[Level]:
    """Make the levels of a slide (height, width, 3): every pixel is the mean of four of the level before."""
    levels = [whole]
    for _ in range(n_levels - 1):
        levels.append(np.asarray(Image.fromarray(levels[-1]).reduce(2)))
    return [(level.shape[:2], list(_tiles(level))) for level in levels]


def _tiles(level: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Cut a level into tiles; white lies beyond its border."""
    height, width, _ = level.shape
    padded = np.full((-(-height // TILE) * TILE, -(-width // TILE) * TILE, 3), 255, np.uint8)
    padded[:height, :width] = level
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            yield padded[top : top + TILE, left : left + TILE]


def write_slide(path: Path, levels: Sequence[Level], *, compressed: bool = True, mpp: float | None = MPP) -> None:
    """Write a pyramidal, tiled TIFF.

    Args:
        path: the file.
        levels: the largest first, each half as wide as the one before.
        compressed: whether tiles become JPEG; those that are bytes are JPEG already.
        mpp: micrometres per pixel of the largest level; None leaves it out.

    Raises:
        UserError: the package tifffile is not here.
    """
    try:
        import tifffile
    except ImportError:
        raise UserError("Drawing slides needs tifffile: pip install 'mitofm[slides]'.") from None
    with tifffile.TiffWriter(path, bigtiff=False) as file:
        for number, (size, tiles) in enumerate(levels):
            resolution = {} if mpp is None else {"resolution": (1e4 / (mpp * 2**number),) * 2, "resolutionunit": 3}
            file.write(
                map(jpeg_tile, tiles) if compressed else iter(tiles),
                shape=(*size, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="ycbcr" if compressed else "rgb",
                subsampling=(1, 1) if compressed else None,
                # Without imagecodecs, tifffile takes ready bytes only under the name of a compression that it knows.
                compression="deflate" if compressed else None,
                subfiletype=int(number > 0),
                metadata=None,
                **resolution,
            )
    if compressed:
        with tifffile.TiffFile(path, mode="r+") as file:
            for page in file.pages:
                page.tags["Compression"].overwrite(_JPEG)


def jpeg_tile(tile: NDArray[np.uint8] | bytes) -> bytes:
    """Compress a tile; one that is bytes is JPEG already."""
    if isinstance(tile, bytes):
        return tile
    buffer = BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


if __name__ == "__main__":
    (target,) = sys.argv[1:] or ["drawn"]
    written = draw_slides(Path(target))
    print_text(f"fm-extract --dataset {written} --slides {written.parent / 'slides'} --size 128")
