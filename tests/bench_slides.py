"""How fast are patches cut from slides on this machine, and in how much memory? `make bench` prints it.

One drawn slide, pyramidal and in JPEG tiles, and points strewn over it. Three ways over the same points, in turn,
several times: OpenSlide's own `read_region` in a loop; the same as patches, on white and in RGB; and `Crops`, which
reads those that are near each other together, computes their digests and keeps them. Then 10,000 points of the slide in
a process of their own, for its memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import openslide
from rich.table import Table

from extract.demo import draw
from extract.demo_slides import TILE, jpeg_tile, write_slide
from extract.points import Points
from extract.slide_files import open_slide
from extract.slides import Crops, Slides
from features.console import show

SIZE = 128


def large_slide(path: Path, tiles_across: int) -> None:
    """Write a slide of so many tiles squared, of some 60 different ones: drawn patches, four to a tile."""
    pixels = draw().pixels
    corner = TILE - SIZE
    drawn = []
    for first in range(0, 240, 4):
        tile = np.empty((TILE, TILE, 3), np.uint8)
        for k, (top, left) in enumerate(((0, 0), (0, corner), (corner, 0), (corner, corner))):
            tile[top : top + SIZE, left : left + SIZE] = pixels[first + k]
        drawn.append(jpeg_tile(tile))

    def level(n: int) -> Iterator[bytes]:
        return (drawn[(7 * k + k // n) % len(drawn)] for k in range(n * n))

    widths = [tiles_across // 2**k for k in range(3)]
    write_slide(path, [((n * TILE, n * TILE), level(n)) for n in widths])


def strewn(slide: Path, n: int, *, clusters: int) -> Points:
    """Draw n points: in clusters of some 2,000 pixels, as figures lie in hot spots, or anywhere (0)."""
    rng = np.random.default_rng(0)
    edge = openslide.OpenSlide(slide).dimensions[0]
    places = rng.uniform(SIZE, edge - SIZE, (n, 2))
    if clusters:
        centres = rng.uniform(2_000, edge - 2_000, (clusters, 2))
        places = np.clip(centres[rng.integers(clusters, size=n)] + rng.normal(0, 700, (n, 2)), SIZE, edge - SIZE)
    x, y = places.round().T
    return Points(Path("points.csv"), [str(k) for k in range(n)], [slide.name] * n, x, y)


def timed(work: Callable[[], object], n: int) -> np.ndarray:
    """Patches per second of wall time, and of processor time, which other work on the machine changes less."""
    wall, busy = time.perf_counter(), time.process_time()
    work()
    return n / np.array([time.perf_counter() - wall, time.process_time() - busy])


def plain_loop(slide: Path, points: Points, threads: int) -> None:
    """Read every region by OpenSlide alone, in the order of the points; each thread its own part, by its own handle."""

    def part(rows: np.ndarray) -> None:
        opened = openslide.OpenSlide(slide)
        for row in rows:
            corner = (int(points.x[row]) - SIZE // 2, int(points.y[row]) - SIZE // 2)
            opened.read_region(corner, 0, (SIZE, SIZE))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, np.array_split(np.arange(len(points.id)), threads)))


def as_rgb(slide: Path, points: Points, threads: int) -> None:
    """Read every region as the patch that it becomes, in the order of the points, by one handle for all threads."""
    opened = open_slide(slide)

    def part(rows: np.ndarray) -> None:
        for row in rows:
            opened.read(0, int(points.x[row]) - SIZE // 2, int(points.y[row]) - SIZE // 2, SIZE, SIZE)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, np.array_split(np.arange(len(points.id)), threads)))


def ours(slide: Path, points: Points, threads: int) -> None:
    """Cut every patch and compute its digest, as load_dataset does."""
    digests = Crops(Slides(slide.parent, size=SIZE), points).digests(n_threads=threads)
    assert len(set(digests)) > len(digests) // 2


def memory(slide: Path, n: int) -> None:
    """Print the peak memory of this process before and after cutting n patches, in MB."""
    points = strewn(slide, n, clusters=0)
    before = peak()
    crops = Crops(Slides(slide.parent, size=SIZE), points)
    crops.digests()
    for row in range(n):
        crops.read(row)
    print(before, peak())


def peak() -> int:
    """Peak memory of this process in MB; getrusage would count the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=160, help="along the slide's edge, of 256 pixels each")
    parser.add_argument("--memory", type=int, default=10_000, help="points read for the peak memory")
    parser.add_argument("--slide", type=Path, help="of a process that measures its memory")
    arguments = parser.parse_args()
    if arguments.slide:
        memory(arguments.slide, arguments.memory)
        return
    n_cores = os.cpu_count() or 1
    table = Table(title=f"Patches of {SIZE} pixels from a slide of {arguments.tiles * TILE:,} pixels squared")
    names = ("Points", "Threads", "Clock", "OpenSlide alone /s", "As patches /s", "With digests /s")
    for column in (*names, "patches of alone (target 0.9)", "with digests of alone"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        slide = Path(folder) / "slide.tif"
        large_slide(slide, arguments.tiles)
        for title, clusters in (("in clusters", 5), ("anywhere", 0)):
            points = strewn(slide, arguments.points, clusters=clusters)
            for threads in sorted({1, n_cores}):
                ways = [partial(way, slide, points, threads) for way in (plain_loop, as_rgb, ours)]
                rounds = [[timed(way, arguments.points) for way in ways] for _ in range(arguments.repeats)]
                for k, clock in enumerate(("wall", "processor")):
                    rates = np.median(rounds, axis=0)[:, k]
                    ratios = np.median([[r[1][k] / r[0][k], r[2][k] / r[0][k]] for r in rounds], axis=0)
                    cells = (*(f"{rate:,.0f}" for rate in rates), *(f"{ratio:.2f}" for ratio in ratios))
                    table.add_row(title, str(threads), clock, *cells)
        command = [sys.executable, __file__, "--slide", str(slide), "--memory", str(arguments.memory)]
        before, after = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    show(table)
    print(f"{arguments.memory:,} points: {after} MB at most, {before} MB of them before the first patch")


if __name__ == "__main__":
    main()
