"""How is a region of a slide read, whichever program wrote the file?

OpenSlide reads the formats of scanners and tiled TIFF; tifffile the other TIFF files, of which it decodes only the
tiles or strips that are needed; Pillow plain images. What a slide does not hold, beyond its border or never scanned,
is white.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from extract import images
from features.console import UserError

PLAIN = frozenset({".png", ".jpg", ".jpeg", ".bmp"})
TIFF = frozenset({".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif", ".svslide"})
SUFFIXES = PLAIN | TIFF | {".mrxs", ".vms", ".vmu", ".czi"}
WHITE = 255
_MOST_PIXELS = 1 << 27  # of an image that is decoded as a whole, 400 MB; a region of 11,000 x 11,000
_MOST_BYTES = 1 << 30  # of its file
_SEGMENT_CACHE = 1 << 24  # bytes of tifffile's decoded tiles, of one slide
_MPP = (0.01, 20.0)  # um per pixel; a file that says 72 dots per inch (353 um) knows no resolution
_UM = {"centimeter": 1e4, "inch": 25_400.0}

Region = NDArray[np.uint8]  # (height, width, 3) RGB
Size = tuple[int, int]  # width, height


class SlideFile(Protocol):
    """An open slide. Reading is thread-safe; it is closed when nothing refers to it any more.

    Attributes:
        path: the file.
        sizes: of every level, the largest (level 0) first.
        mpp: micrometres per pixel of level 0 along x and y, or None where the file does not say.
        origin: where QuPath counts from, in pixels of level 0: the corner of what was scanned, or 0, 0.
        n_bytes: what it holds in memory for as long as it is open.
    """

    path: Path
    sizes: Sequence[Size]
    mpp: tuple[float, float] | None
    origin: tuple[int, int]
    n_bytes: int

    def read(self, level: int, left: int, top: int, width: int, height: int) -> Region:
        """Read a region, in pixels of a level; what lies outside the slide is white.

        Raises:
            UserError: the file is damaged.
        """
        ...


def open_slide(path: Path) -> SlideFile:
    """Open a slide by what reads its format: OpenSlide, else tifffile or Pillow.

    Raises:
        UserError: not readable, empty, truncated, of another format, or too large an image without tiles; or a package
            that is not installed.
    """
    if not path.is_file():  # reading a pipe or a device might never end
        lost = path.is_symlink() and not path.exists()
        found = f"a link to {path.readlink()}, which is not there" if lost else "not a regular file"
        raise UserError(f"{path} is {found}. Expected a slide.")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty. Copy the slide again.")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    if path.suffix.lower() in PLAIN:
        return _PlainFile(path)
    openslide, tifffile = _libraries()
    try:
        if openslide.OpenSlide.detect_format(path) is not None:
            return _OpenSlideFile(path, openslide)
        found = "of no format that it knows"
    except openslide.OpenSlideError as error:
        found = str(error)
    if path.suffix.lower() in TIFF:
        try:
            return _TiffFile(path, tifffile)
        except images.DAMAGE as error:
            found += f"; tifffile: {error}"
    raise UserError(
        f"{path} cannot be opened as a slide (OpenSlide: {found}). Expected an intact file of a scanner's format, a "
        "TIFF of 8-bit RGB or grey, PNG or JPEG. A truncated one must be copied again."
    )


def _libraries() -> tuple[Any, Any]:
    try:
        import openslide
        import tifffile
    except (ImportError, OSError) as error:
        raise UserError(f"Slides need packages that are not here ({error}): pip install 'mitofm[slides]'.") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file, our message says
    return openslide, tifffile


def _damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path}: its pixels cannot be read ({why}). Is the file whole? Copy the slide again.")


def _plausible(*mpp: float) -> tuple[float, float] | None:
    x, y = mpp
    return (x, y) if all(_MPP[0] <= value <= _MPP[1] for value in mpp) else None


def _resolution(text: str, dots: Sequence[float], unit: str) -> tuple[float, float] | None:
    """Find micrometres per pixel in a TIFF's description (OME's or Aperio's) or in its tags.

    Args:
        text: the description.
        dots: pixels per unit along x and y.
        unit: "centimeter", "inch" or another.
    """
    sides = [re.search(rf'<Pixels\b[^>]*\bPhysicalSize{axis}="([0-9.eE+-]+)"', text) for axis in "XY"]
    units = [re.search(rf'<Pixels\b[^>]*\bPhysicalSize{axis}Unit="([^"]*)"', text) for axis in "XY"]
    scale = {"nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
    if all(sides):
        known = [
            float(side[1]) * (scale.get(unit[1], 1) if unit else 1)
            for side, unit in zip(sides, units, strict=True)
            if side
        ]
        return _plausible(*known)
    if aperio := re.search(r"\bMPP *= *([0-9.]+)", text):
        return _plausible(float(aperio[1]), float(aperio[1]))
    if unit not in _UM or len(dots) != 2 or min(dots) <= 0:
        return None
    return _plausible(*(_UM[unit] / value for value in dots))


class _OpenSlideFile:
    """A slide that OpenSlide reads, whose cache holds 32 MB of tiles: larger ones cost more than they save."""

    def __init__(self, path: Path, openslide: Any) -> None:
        self.path, self.n_bytes = path, 0
        self._slide = openslide.OpenSlide(path)
        self._failure = openslide.OpenSlideError
        self.sizes = self._slide.level_dimensions
        self._downsamples = self._slide.level_downsamples
        known: Mapping[str, str] = self._slide.properties
        self.mpp = self._resolution(known)
        self.origin = (int(known.get("openslide.bounds-x", 0)), int(known.get("openslide.bounds-y", 0)))

    @staticmethod
    def _resolution(known: Mapping[str, str]) -> tuple[float, float] | None:
        mpp = [float(known.get(f"openslide.mpp-{axis}", 0)) for axis in "xy"]
        dots = [float(known.get(f"tiff.{axis}Resolution", 0)) for axis in "XY"]
        unit = known.get("tiff.ResolutionUnit", "")
        return _plausible(*mpp) or _resolution(known.get("tiff.ImageDescription", ""), dots, unit)

    def read(self, level: int, left: int, top: int, width: int, height: int) -> Region:
        scale = self._downsamples[level]
        try:
            rgba = self._slide.read_region((round(left * scale), round(top * scale)), level, (width, height))
        except self._failure as error:
            raise _damaged(self.path, error) from None
        if rgba.getchannel("A").getextrema()[0] == 255:  # opaque, as nearly all are
            return np.array(rgba.convert("RGB"))
        ground = Image.new("RGB", rgba.size, (WHITE,) * 3)
        ground.paste(rgba, mask=rgba.getchannel("A"))
        return np.array(ground)


class _TiffFile:
    """A TIFF that OpenSlide refuses: in strips, with its pyramid in SubIFDs, compressed in ways that it does not read.

    Without the package imagecodecs, tifffile decodes uncompressed data, Deflate, PackBits, LZMA and Zstandard; a single
    image of another compression is read by Pillow as a whole.
    """

    def __init__(self, path: Path, tifffile: Any) -> None:
        self.path, self.origin, self.n_bytes = path, (0, 0), 0
        self._file: Any = None
        self._file = tifffile.TiffFile(path)
        self._decoded: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        self._lock = Lock()
        series = max(self._file.series, key=lambda one: one.keyframe.imagewidth * one.keyframe.imagelength)
        self._pages = _pyramid(self._file, series)
        page = self._pages[0]
        if (
            page.dtype != np.uint8
            or page.samplesperpixel not in (1, 3)
            or page.imagedepth != 1
            or len(series.pages) > 1
        ):
            raise ValueError(f"it holds {page.dtype} of shape {series.shape}, not one 8-bit RGB or grey image")
        if max(np.prod(one.chunks) for one in self._pages) > 3 * _MOST_PIXELS:
            raise ValueError("it has tiles or strips that are too large; convert it to tiles of 256 pixels")
        self.sizes: Sequence[Size] = [(one.imagewidth, one.imagelength) for one in self._pages]
        tags = {name: page.tags[name].value for name in ("XResolution", "YResolution") if name in page.tags}
        dots = [numerator / max(denominator, 1) for numerator, denominator in tags.values()]
        unit = page.tags["ResolutionUnit"].value.name.lower() if "ResolutionUnit" in page.tags else ""
        self.mpp = _resolution(self._file.ome_metadata or page.description, dots, unit)
        self._whole: Region | None = None
        if page.compression not in tifffile.TIFF.DECOMPRESSORS:
            if len(self._pages) > 1:
                raise ValueError(f"{page.compression.name} needs the package imagecodecs")
            self._whole = _decoded_whole(path)
            self.n_bytes = self._whole.nbytes

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, level: int, left: int, top: int, width: int, height: int) -> Region:
        if self._whole is not None:
            return _part(self._whole, left, top, width, height)
        page, out = self._pages[level], np.full((height, width, 3), WHITE, np.uint8)
        rows, columns = page.chunks[-3:-1] if page.planarconfig == 1 and page.samplesperpixel > 1 else page.chunks[-2:]
        for row in range(max(top, 0) // rows, -(-min(top + height, page.imagelength) // rows)):
            for column in range(max(left, 0) // columns, -(-min(left + width, page.imagewidth) // columns)):
                tile = self._tile(level, row, column, rows, columns)
                y, x = row * rows, column * columns
                above, before = max(y, top), max(x, left)
                part = tile[above - y : top + height - y, before - x : left + width - x]
                out[above - top : above - top + len(part), before - left : before - left + part.shape[1]] = part
        return out

    def _tile(self, level: int, row: int, column: int, rows: int, columns: int) -> NDArray[np.uint8]:
        """Give a tile or strip, (height, width, 3) or (height, width, 1), without what lies beyond the border."""
        page = self._pages[level]
        across, down = -(-page.imagewidth // columns), -(-page.imagelength // rows)
        number = row * across + column
        numbers = (
            [number] if page.planarconfig == 1 else [number + k * across * down for k in range(page.samplesperpixel)]
        )
        height, width = min(rows, page.imagelength - row * rows), min(columns, page.imagewidth - column * columns)
        planes = [self._segment(level, one)[:height, :width] for one in numbers]
        return np.concatenate(planes, axis=-1)

    def _segment(self, level: int, number: int) -> NDArray[np.uint8]:
        page, key = self._pages[level], (level, number)
        try:
            with self._lock:
                if key in self._decoded:
                    self._decoded.move_to_end(key)
                    return self._decoded[key]
                n_bytes = page.databytecounts[number]
                self._file.filehandle.seek(page.dataoffsets[number])
                data = self._file.filehandle.read(n_bytes)
            if len(data) < n_bytes:
                raise ValueError(f"it ends {n_bytes - len(data):,} bytes too early")
            found, _, shape = page.decode(data, number, jpegtables=page.jpegtables)
        except images.DAMAGE as error:
            raise _damaged(self.path, error) from None
        segment = np.full(shape[1:], WHITE, np.uint8) if found is None else found[0]  # of depth 1
        with self._lock:
            self._decoded[key] = segment
            while len(self._decoded) > 1 and sum(one.nbytes for one in self._decoded.values()) > _SEGMENT_CACHE:
                self._decoded.popitem(last=False)
        return segment


def _pyramid(file: Any, series: Any) -> list[Any]:
    """List the pages of all levels of a series, the largest first: its own levels, or smaller copies behind it."""
    pages = [level.keyframe for level in series.levels]
    if len(pages) == 1:
        later = [one.keyframe for one in file.series if one is not series]
        pages += [page for page in later if page.is_reduced and page.samplesperpixel == pages[0].samplesperpixel]
    whole = pages[0]
    alike = [  # a label or a macro image has other proportions
        page
        for page in pages
        if abs(page.imagelength * whole.imagewidth / (whole.imagelength * page.imagewidth) - 1) < 0.02
    ]
    return sorted(alike, key=lambda page: -page.imagewidth)


class _PlainFile:
    def __init__(self, path: Path) -> None:
        self.path, self.origin = path, (0, 0)
        self.mpp: tuple[float, float] | None = None
        self._whole = _decoded_whole(path)
        self.n_bytes = self._whole.nbytes
        height, width, _ = self._whole.shape
        self.sizes: Sequence[Size] = [(width, height)]

    def read(self, level: int, left: int, top: int, width: int, height: int) -> Region:
        return _part(self._whole, left, top, width, height)


def _decoded_whole(path: Path) -> Region:
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path} is too large to be read as a whole. Convert it to a tiled, pyramidal TIFF.")
    return images.decode(path.read_bytes(), str(path), most_pixels=_MOST_PIXELS)


def _part(whole: Region, left: int, top: int, width: int, height: int) -> Region:
    out = np.full((height, width, 3), WHITE, np.uint8)
    above, before = max(top, 0), max(left, 0)
    part = whole[above : max(top + height, 0), before : max(left + width, 0)]
    out[above - top : above - top + len(part), before - left : before - left + part.shape[1]] = part
    return out
