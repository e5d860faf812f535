"""Which square around a point of a slide is a patch, and how are thousands of them read?

A square has `size` pixels of the slide's largest image (level 0), or covers `size_um` micrometres, which become pixels
of 0.25 um or as many as `size` says. Of the slide's levels the coarsest that is at least as fine is read, and resized
once. Where the square has as many pixels of that level as are wanted, to the nearest whole one, they are unchanged.
"""

from __future__ import annotations

import hashlib
import math
import os
import unicodedata
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from extract.slide_files import SUFFIXES, Region, Size, SlideFile, open_slide
from features.console import UserError, nearest, progress, say
from features.tables import first_of, refuse_rows

if TYPE_CHECKING:
    from extract.points import Points

MPP = 0.25  # um per pixel at which a square in micrometres is delivered, the resolution of 40x scanners
_MOST_SIZE = 4096  # pixels along the side of a patch
_MOST_UM = 1e5
_MOST_READ = 1 << 26  # pixels of a region that is resized to a patch, 256 MB
_CELL = 2048  # pixels: points of a square so wide are read together, whatever the slide's tiles are
_TOGETHER = 32  # points that one thread reads
_MOST_OPEN = 16  # slides
_MOST_HELD = 1 << 29  # bytes of open images without tiles
_MOST_KEPT = 1 << 29  # bytes of patches in memory: 10,000 of 128 pixels


@dataclass(frozen=True)
class Slides:
    """A folder of slides, and which square around a point of theirs is a patch.

    >>> Slides(Path("slides"), size_um=32).pixels
    128

    Attributes:
        folder: slides lie in it or in folders below.
        size: pixels along the side of a patch; without `size_um` pixels of the slide's level 0.
        size_um: micrometres along the side of a patch.
        mpp: micrometres per pixel of slides that do not say it.

    Raises:
        UserError: a value outside its range.
    """

    folder: Path
    size: int | None = None
    size_um: float | None = None
    mpp: float | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not 1 <= self.size <= _MOST_SIZE:
            raise UserError(f"`size={self.size}`: expected 1 to {_MOST_SIZE:,} pixels.")
        if self.size_um is not None and not 0 < self.size_um <= _MOST_UM:
            raise UserError(f"`size_um={self.size_um}`: expected micrometres, such as 32.")
        if self.mpp is not None and not 0.01 <= self.mpp <= 20:
            raise UserError(f"`mpp={self.mpp}`: expected micrometres per pixel, such as 0.25.")
        if self.is_sized and not 1 <= self.pixels <= _MOST_SIZE:
            raise UserError(
                f"`size_um={self.size_um}` gives a patch of {self.pixels:,} pixels of {MPP} um; expected 1 to "
                f"{_MOST_SIZE:,}. Say with `size` how many pixels it should have."
            )

    @property
    def is_sized(self) -> bool:
        """Whether it is said how large a patch is."""
        return self.size is not None or self.size_um is not None

    @property
    def pixels(self) -> int:
        """Pixels along the side of a patch.

        Raises:
            UserError: it is not said how large a patch is.
        """
        if self.size is not None:
            return self.size
        if self.size_um is None:
            raise UserError(
                "How large is a patch around a point? Give `size`, in pixels of the slide, such as 128, or `size_um`, "
                "in micrometres, such as 32."
            )
        return math.floor(self.size_um / MPP + 0.5)

    @classmethod
    def asked(
        cls, folder: Path | None, *, size: int | None = None, size_um: float | None = None, mpp: float | None = None
    ) -> Slides | None:
        """Make what a user asks for; None without a folder.

        Raises:
            UserError: a size without a folder, or a value outside its range.
        """
        if folder is not None:
            return cls(folder, size, size_um, mpp)
        given = {"size": size, "size_um": size_um, "mpp": mpp}
        if named := next((f"`{name}={value}`" for name, value in given.items() if value is not None), None):
            raise UserError(f"{named} is for points on slides: say with `slides` in which folder the slides are.")
        return None

    def crop_record(self) -> dict[str, Any]:
        """Describe how patches are cut, as the fingerprint keeps it."""
        given = {"size": self.size, "size_um": self.size_um, "mpp": self.mpp}
        return {**given, "resampling": "bicubic, antialiased", "padding": "white"}

    def as_record(self) -> dict[str, Any]:
        """Give folder and sizes as JSON values; what is not said is left out."""
        given = {"folder": str(self.folder.resolve()), "size": self.size, "size_um": self.size_um, "mpp": self.mpp}
        return {name: value for name, value in given.items() if value is not None}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Slides:
        """Read what `as_record` gave."""
        return cls(**{**record, "folder": Path(record["folder"])})

    def find(self, names: Iterable[str]) -> dict[str, Path]:
        """Find slides by their file names, with or without suffix, in the folder or below.

        Raises:
            UserError: no such folder, no such slide, or two of one name.
        """
        files = _slide_files(self.folder)
        by_name: dict[str, list[Path]] = defaultdict(list)
        for path in files:
            for name in _spellings(path.relative_to(self.folder).as_posix()):
                by_name[name.casefold()].append(path)  # Slide1.TIF is slide1.tif, as on Windows
        found, missing = {}, []
        for name in dict.fromkeys(names):
            written = unicodedata.normalize("NFC", name.replace("\\", "/"))
            short = written.rpartition("/")[2]
            spelled = (written.casefold(), short.casefold())
            fits: list[Path] = next((by_name[one] for one in spelled if one in by_name), [])
            whole = [path for path in fits if unicodedata.normalize("NFC", path.name) == short]
            same_case = [path for path in fits if short in _spellings(path.name)]
            fits = whole or same_case or fits
            if len(fits) > 1:
                raise UserError(
                    f"{self.folder} has {len(fits)} slides that {name!r} may mean: {first_of(sorted(map(str, fits)))}. "
                    "Write the name with its suffix or folder, or move the others away."
                )
            if fits:
                found[name] = fits[0]
            else:
                missing.append(name)
        if missing:
            raise UserError(
                f"{self.folder} has no slide {' and no slide '.join(map(repr, missing[:3]))}"
                f"{f' (nor {len(missing) - 3} others)' if len(missing) > 3 else ''}; looked for a file of that name, "
                f"with or without one of the suffixes {', '.join(sorted(SUFFIXES))}, there and below, among "
                f"{len(files)} slides.{nearest(missing[0], by_name)}"
            )
        return found


def _slide_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is {'no folder' if folder.exists() else 'not there'}. Give the folder of the slides, or put "
            "them back where they were read."
        )
    listed = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    files = sorted(path for path in listed if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(
            f"{folder} holds no slides, only {len(listed)} other files. Expected {', '.join(sorted(SUFFIXES))}."
        )
    return files


def _spellings(path: str) -> set[str]:
    """List what a slide may be called: its name or path, with its suffix and without."""
    path = unicodedata.normalize("NFC", path)
    names = {path, path.rpartition("/")[2]}
    return names | {slide_name(name) for name in names}


def slide_name(file_name: str) -> str:
    """Remove the suffix of a slide's file name.

    >>> slide_name("A1.ome.tif"), slide_name("A1.2")
    ('A1', 'A1.2')
    """
    stem, dot, suffix = file_name.rpartition(".")
    return stem.removesuffix(".ome") if f"{dot}{suffix.lower()}" in SUFFIXES else file_name


@dataclass(frozen=True)
class Square:
    """A square around a point, on the level of its slide from which it is read.

    Attributes:
        level: number of the level.
        left, top, width, height: whole pixels of that level that are read.
        box: left, upper, right and lower end within them of what becomes the patch; None if all of it is the patch.
    """

    level: int
    left: int
    top: int
    width: int
    height: int
    box: tuple[float, float, float, float] | None = None


def square_around(
    x: float, y: float, *, sizes: Sequence[Size], mpp: tuple[float, float] | None, slides: Slides
) -> Square:
    """Choose the level that the square around a point is read from, and its pixels there.

    Args:
        x, y: of the point, in pixels of level 0 from the corner of the first pixel.
        sizes: of the slide's levels, the largest first.
        mpp: micrometres per pixel of level 0; None is enough for a square in pixels.
        slides: how large the square is.
    """
    pixels = slides.pixels
    across, down = (pixels, pixels)
    if slides.size_um is not None:
        assert mpp is not None
        across, down = slides.size_um / mpp[0], slides.size_um / mpp[1]  # type: ignore[assignment]
    for level in reversed(range(len(sizes))):
        scale = _scale(sizes[0], sizes[level])
        width, height = across / scale[0], down / scale[1]
        if level == 0 or min(_nearest(width), _nearest(height)) >= pixels:
            break
    x, y = x / scale[0], y / scale[1]
    if _nearest(width) == _nearest(height) == pixels:
        return Square(level, _nearest(x - pixels / 2), _nearest(y - pixels / 2), pixels, pixels)
    ends = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    left, top = math.floor(ends[0]), math.floor(ends[1])
    box = (ends[0] - left, ends[1] - top, ends[2] - left, ends[3] - top)
    return Square(level, left, top, math.ceil(ends[2]) - left, math.ceil(ends[3]) - top, box)


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


def _scale(whole: Size, level: Size) -> tuple[float, float]:
    """Find how many pixels of level 0 are one of a level: a whole number, if that explains its size."""
    scale = whole[0] / level[0], whole[1] / level[1]
    near = round(scale[0])
    explained = all(abs(large / near - small) < 1 for large, small in zip(whole, level, strict=True))
    return (near, near) if explained else scale


class Crops:
    """The squares around points, read from their slides.

    Slides are open once for all threads, at most 16 at a time. Patches stay in memory once they were read, up to 512
    MB: reading all of them for their digests then reads most of them for the last time.

    Attributes:
        slides: the folder, and how large a patch is.
        points: places on slides, in pixels of level 0; slides are called by their files, with the folder where two
            slides would else have one name.
        names: of each point's slide, without suffix.
        mpp: micrometres per pixel of the patches; None where that is not known, or not the same for all.
    """

    def __init__(self, slides: Slides, points: Points) -> None:
        """Find and open every slide, and place the squares.

        Args:
            slides: the folder, and how large a patch is.
            points: places on slides; those of GeoJSON count from where QuPath does.

        Raises:
            UserError: a slide that is missing, ambiguous, not readable or without a resolution that is needed; a
                point outside its slide; or no size.
        """
        self.slides, self._given = slides, points
        slides.pixels  # noqa: B018 - refuses what has no size
        self._lock = Lock()
        self._open: OrderedDict[Path, SlideFile] = OrderedDict()
        self._kept: dict[int, Region] = {}
        self._n_kept = 0
        found = slides.find(points.slide)
        self._paths = [found[name] for name in points.slide]
        called = self._called(found)
        self._given = replace(points, slide=[called[path] for path in self._paths])
        self.names = [slide_name(name) for name in self._given.slide]
        self.points, self._squares, self.mpp = self._place()

    def _called(self, found: Mapping[str, Path]) -> dict[Path, str]:
        """Name every slide by its file; with its folder, if others have that name without their suffix.

        Raises:
            UserError: a slide that is written in two ways, so that its points could be there twice unnoticed.
        """
        written: dict[Path, str] = {}
        for name, path in found.items():
            if written.setdefault(path, name) != name:
                raise UserError(
                    f"{self._given.source} names the slide {path.name} in two ways, {written[path]!r} and {name!r}. "
                    "Write it in one."
                )
        counts = Counter(slide_name(path.name) for path in written)
        return {
            path: path.name if counts[slide_name(path.name)] == 1 else path.relative_to(self.slides.folder).as_posix()
            for path in written
        }

    def read(self, row: int) -> Region:
        """Read the square around a point, (pixels, pixels, 3).

        Raises:
            UserError: its slide is damaged.
        """
        kept = self._kept.get(row)
        return self._read(row) if kept is None else kept.copy()

    def digests(self, *, n_threads: int | None = None) -> list[str]:
        """Read all squares, those close to each other together, and give the hex SHA-256 of the pixels of each.

        Args:
            n_threads: that read at once; None for one per core.

        Raises:
            UserError: a slide is damaged.
        """
        found = [""] * len(self._squares)
        order = sorted(range(len(found)), key=self._place_in_order)
        parts = [order[start : start + _TOGETHER] for start in range(0, len(order), _TOGETHER)]
        with (
            progress(f"read {self._given.source.name}", len(order)) as advance,
            ThreadPoolExecutor(n_threads or os.cpu_count(), thread_name_prefix="slides") as pool,
        ):
            try:
                for rows, digests in zip(parts, pool.map(self._digest, parts), strict=True):
                    for row, digest in zip(rows, digests, strict=True):
                        found[row] = digest
                    advance(len(rows))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _digest(self, rows: Sequence[int]) -> list[str]:
        digests = []
        for row in rows:
            pixels = self.read(row)
            digests.append(hashlib.sha256(pixels.data).hexdigest())
            with self._lock:
                if row not in self._kept and self._n_kept + pixels.nbytes <= _MOST_KEPT:
                    self._kept[row] = pixels
                    self._n_kept += pixels.nbytes
        return digests

    def _place_in_order(self, row: int) -> tuple[str, int, int, int, int]:
        square = self._squares[row]
        return str(self._paths[row]), square.level, square.top // _CELL, square.left // _CELL, square.top

    def _read(self, row: int) -> Region:
        square, slide = self._squares[row], self._slide(self._paths[row])
        region = slide.read(square.level, square.left, square.top, square.width, square.height)
        if square.box is None:
            return region
        side = (self.slides.pixels, self.slides.pixels)
        return np.array(Image.fromarray(region).resize(side, Image.Resampling.BICUBIC, box=square.box))

    def _slide(self, path: Path) -> SlideFile:
        """Give an open slide. One that is read while another takes its place closes when that thread is done."""
        with self._lock:
            if path not in self._open:
                self._open[path] = open_slide(path)
            self._open.move_to_end(path)
            while len(self._open) > 1 and (
                len(self._open) > _MOST_OPEN or sum(slide.n_bytes for slide in self._open.values()) > _MOST_HELD
            ):
                self._open.popitem(last=False)
            return self._open[path]

    def _place(self) -> tuple[Points, list[Square], float | None]:
        """Choose the square of every point; also give the points in pixels, and the resolution of the patches."""
        points, slides = self._given, self.slides
        places, origins, extents = (np.empty((len(points.id), 2)) for _ in range(3))
        rows_of: dict[Path, list[int]] = defaultdict(list)
        for row, path in enumerate(self._paths):
            rows_of[path].append(row)
        squares: list[Square | None] = [None] * len(self._paths)
        outside, unknown, enlarged = [], [], []
        known: list[tuple[float, float] | None] = []
        with progress(f"open {slides.folder.name}", len(rows_of), unit="slides") as advance:
            for path, rows in rows_of.items():
                slide = self._slide(path)
                mpp = slide.mpp or (None if slides.mpp is None else (slides.mpp, slides.mpp))
                known.append(mpp)
                if mpp is None and (slides.size_um is not None or points.unit == "um"):
                    unknown.append(path)
                    continue
                place = np.stack([points.x[rows], points.y[rows]], axis=1)  # (n, 2)
                if points.unit == "um" and mpp is not None:
                    place /= mpp
                # QuPath shows no more of a slide than OpenSlide's bounds, and counts from their corner.
                place = place if points.features is None else place + slide.origin
                places[rows], origins[rows], extents[rows] = place, slide.origin, slide.sizes[0]
                inside: NDArray[np.bool_] = np.all((place >= 0) & (place <= slide.sizes[0]), axis=1)
                outside += [
                    f"{points.where(row)} at {x:.6g}, {y:.6g} on {path.name}, {slide.sizes[0][0]} x {slide.sizes[0][1]}"
                    for row, (x, y), is_inside in zip(rows, place.tolist(), inside, strict=True)
                    if not is_inside
                ]
                for row, (x, y) in zip(rows, place.tolist(), strict=True):
                    square = square_around(x, y, sizes=slide.sizes, mpp=mpp, slides=slides)
                    squares[row] = square
                self._require_readable(path, square)
                if square.box is not None and square.box[2] - square.box[0] < slides.pixels:
                    enlarged.append(path.name)
                advance(1)
        if unknown:
            raise UserError(
                f"{len(unknown)} of {len(rows_of)} slides in {slides.folder} do not say how many micrometres a pixel "
                f"has ({first_of([path.name for path in unknown])}). Say it with `mpp`, such as 0.25, or give `size` "
                "and points in pixels."
            )
        what, remedy = "a place outside its slide", "Are these the right slides, and pixels of their largest image?"
        refuse_rows(points.source, outside, len(squares), what, remedy)
        if enlarged:
            say(
                f"{len(enlarged)} slides are coarser than the patches that are asked for, which are enlarged: "
                f"{first_of(enlarged)}."
            )
        in_pixels = replace(points, x=places[:, 0], y=places[:, 1], unit="px", origin=origins, extent=extents)
        return in_pixels, [square for square in squares if square is not None], self._resolution(known)

    def _require_readable(self, path: Path, square: Square) -> None:
        if square.width * square.height > _MOST_READ:
            raise UserError(
                f"{path}: {self.slides.size_um:g} um are {square.width:,} x {square.height:,} pixels of its coarsest "
                f"level with {self.slides.pixels:,} or more, too many to be read. Give a smaller `size_um`, or a "
                "larger `size`."
            )

    def _resolution(self, known: Sequence[tuple[float, float] | None]) -> float | None:
        """Find micrometres per pixel of the patches; None if that is not known, or not the same for all."""
        slides = self.slides
        if slides.size_um is not None:
            return slides.size_um / slides.pixels
        each = [value for mpp in known if mpp is not None for value in mpp]
        if None in known or max(each) > 1.01 * min(each):
            return None
        return Counter(round(value, 4) for value in each).most_common(1)[0][0]
