"""How fast is the feature store, next to a raw file and to the layouts in common use?

    python tests/bench_store.py [--rows 100000] [--width 1536] [--folder DIR]

All figures are medians of one run with the page cache warm (reads) and with everything flushed to the disk (writes).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from features.samples import make_samples
from features.store import FeatureStore

REPEATS = 7
FILES = 2_000  # rows of the layouts that are too slow to write whole; their times are scaled up, and said to be
ENTRY = {"dataset": "bench", "model": "model", "view": "full"}

Embeddings = NDArray[np.float16]
Rows = NDArray[np.intp]


def seconds(*actions: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Median wall time of each action; they take turns, so that a busy machine is busy for all of them."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
        for action, taken in zip(actions, times, strict=True):
            start = time.perf_counter()
            action()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def flushed(write: Callable[[], object]) -> float:
    """Seconds to write once, until all of it is on the disk."""
    os.sync()
    start = time.perf_counter()
    write()
    os.sync()
    return time.perf_counter() - start


def write_store(store: FeatureStore, embeddings: Embeddings) -> None:
    n, width = embeddings.shape
    store.put_samples("bench", make_samples(list(map(str, range(n))), [0] * n, sha256=[""] * n), attrs={})
    writer = store.begin(**ENTRY, poolings={"cls": width}, card_pooling="cls", parts={})
    for rows in writer.missing():
        writer.write(rows, {"cls": embeddings[rows.start : rows.stop]})


def read_store(path: Path, rows: Rows | None = None) -> Embeddings:
    """With a store just opened: every block's checksum is computed."""
    return FeatureStore.open(path).read(**ENTRY, rows=rows)


def write_files(folder: Path, embeddings: Embeddings) -> None:
    folder.mkdir()
    for row, embedding in enumerate(embeddings):
        torch.save(torch.from_numpy(embedding.copy()), folder / f"{row}.pt")


def read_files(folder: Path, rows: Rows) -> torch.Tensor:
    return torch.stack([torch.load(folder / f"{row}.pt", weights_only=True) for row in rows])


def write_appended(path: Path, embeddings: Embeddings) -> None:
    """As CLAM writes: resizable, one row per chunk, a batch appended at a time."""
    with h5py.File(path, "w") as file:
        width = embeddings.shape[1]
        features = file.create_dataset("features", (0, width), np.float16, maxshape=(None, width), chunks=(1, width))
        for start in range(0, len(embeddings), 256):
            batch = embeddings[start : start + 256]
            features.resize(start + len(batch), axis=0)
            features[start:] = batch


def write_contiguous(path: Path, embeddings: Embeddings) -> None:
    with h5py.File(path, "w") as file:
        file["features"] = embeddings


def read_hdf5(path: Path, rows: Rows | None = None) -> Any:
    with h5py.File(path, "r") as file:
        return file["features"][...] if rows is None else file["features"][np.sort(rows)]


def measure(folder: Path, n: int, width: int) -> Table:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((n, width), dtype=np.float32).astype(np.float16)
    rows = rng.choice(n, n // 10, replace=False)
    few = min(n, FILES)
    some = rng.choice(few, few // 10, replace=False)
    scale = n / few
    raw, npy, zarr = folder / "raw.bin", folder / "x.npy", folder / "x.zarr"
    pt, appended, contiguous = folder / "pt", folder / "appended.h5", folder / "contiguous.h5"

    pt_layout = "one .pt per row" + f" ({few:,} rows, scaled up)" * (few < n)

    store = FeatureStore.open_or_create(zarr)
    layouts = {
        "raw file: fromfile, memmap gather": flushed(partial(embeddings.tofile, raw)),
        "feature store, checksums computed (first touch)": flushed(partial(write_store, store, embeddings)),
        "feature store, checksums known to hold": float("nan"),
        ".npy": flushed(partial(np.save, npy, embeddings)),
        "HDF5, contiguous": flushed(partial(write_contiguous, contiguous, embeddings)),
        "HDF5, appended, one row per chunk": flushed(partial(write_appended, appended, embeddings)),
        pt_layout: flushed(partial(write_files, pt, embeddings[:few])) * scale,
    }
    np.testing.assert_array_equal(store.read(**ENTRY), embeddings)
    np.testing.assert_array_equal(store.read(**ENTRY, rows=rows), embeddings[rows])
    whole = seconds(
        lambda: np.fromfile(raw, np.float16).reshape(n, width),
        partial(read_store, zarr),
        lambda: store.read(**ENTRY),
        partial(np.load, npy),
        partial(read_hdf5, contiguous),
    )
    whole += seconds(partial(read_hdf5, appended), repeats=2)
    whole += [t * scale for t in seconds(partial(read_files, pt, np.arange(few)), repeats=2)]
    tenth = seconds(
        lambda: np.memmap(raw, np.float16, "r", shape=(n, width))[rows],
        partial(read_store, zarr, rows),
        lambda: store.read(**ENTRY, rows=rows),
        lambda: np.load(npy, mmap_mode="r")[rows],
        partial(read_hdf5, contiguous, rows),
    )
    tenth += seconds(partial(read_hdf5, appended, rows), repeats=1)
    tenth += [t * scale for t in seconds(partial(read_files, pt, some), repeats=2)]

    title = f"{n:,} × {width:,} float16, {embeddings.nbytes / 1e6:,.0f} MB: seconds, and times the raw file's"
    table = Table("layout", title=title, title_justify="left")
    for name in ("write, flushed", "read all", "read 10 % random rows"):
        table.add_column(name, justify="right")
    base = layouts["raw file: fromfile, memmap gather"], whole[0], tenth[0]
    for (layout, written), *reads in zip(layouts.items(), whole, tenth, strict=True):
        times = zip((written, *reads), base, strict=True)
        table.add_row(layout, *("" if np.isnan(t) else f"{t:.3f}  {t / raw_time:6.2f}×" for t, raw_time in times))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=1_536)
    parser.add_argument(
        "--folder", type=Path, help="where to put the files for the time being (default: the temp folder)"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-store-", dir=options.folder))
    try:
        Console(width=120).print(measure(folder, options.rows, options.width))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
