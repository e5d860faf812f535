"""What does probing a large store take, next to reading it once: seconds and memory?

    python tests/bench_million.py [--rows 1000000] [--folder DIR]

Writes a store of drawn embeddings through the public writer (1,536 columns, 2,000 slides in order, a test set of a
fifth as many rows), then runs the whole `fm-probe` on it in a process of its own, and where the rows fit into memory
once more with a budget in which they do not. The read limit is the time in which all training rows pass by once,
checksums known to hold. Two threads. A million rows take 4 GB of disk while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from features.samples import make_samples
from features.store import FeatureStore

WIDTH, SLIDES, MIXED = 1536, 2000, 128
CORES = 2
SMALL_BUDGET = 3_000_000_000  # just below what 100,000 rows take in memory


class Drawn:
    """Rows shaped like embeddings of patches, as `bench_probe.make_problem`, but mixed 128 columns at a time."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        order = np.arange(1, WIDTH + 1, dtype=np.float32).reshape(MIXED, -1).T.ravel()  # each mixture has its share
        self.spectrum = order**-0.5
        self.shift = 0.7 * rng.standard_normal((SLIDES, WIDTH), dtype=np.float32)
        self.signal = rng.standard_normal(WIDTH).astype(np.float32) * order**-0.3
        self.mixtures = np.stack(
            [np.linalg.qr(rng.standard_normal((MIXED, MIXED)))[0].astype(np.float32) for _ in range(WIDTH // MIXED)]
        )
        self.scale = np.exp(0.5 * rng.standard_normal(WIDTH)).astype(np.float32)
        self.centre = 2 * rng.standard_normal(WIDTH).astype(np.float32)

    def rows(self, seed: int, slides: NDArray[np.intp]) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
        """Embeddings (b, d) of patches on these slides (b,), and their labels: 22 % positive, AUROC about .9."""
        rng = np.random.default_rng(seed)
        latent = rng.standard_normal((len(slides), WIDTH), dtype=np.float32)
        latent += self.shift[slides]
        latent *= self.spectrum
        score = latent @ self.signal
        score = 2 * score / np.linalg.norm(self.spectrum * self.signal) + rng.logistic(size=len(slides))
        mixed = latent.reshape(len(slides), -1, MIXED).swapaxes(0, 1) @ self.mixtures
        X = mixed.swapaxes(0, 1).reshape(len(slides), WIDTH) * self.scale + self.centre
        return X.astype(np.float16), (score > 2.3).astype(np.int64)


def write(store: FeatureStore, name: str, n: int, drawn: Drawn, seed: int) -> None:
    slides = np.arange(n) * SLIDES // n
    size = 8192
    blocks = [range(start, min(start + size, n)) for start in range(0, n, size)]
    label = np.concatenate([drawn.rows(seed + k, slides[rows])[1] for k, rows in enumerate(blocks)])
    ids = [f"slide-{slide:04}/patch-{row:07}.png" for row, slide in enumerate(slides.tolist())]
    group = [f"{name}-{slide:04}" for slide in slides.tolist()]
    store.put_samples(name, make_samples(ids, label.tolist(), sha256=[""] * n, group=group), attrs={})
    writer = store.begin(
        name, model="drawn", view="full", poolings={"cls": WIDTH}, card_pooling="cls", parts={"model": "drawn"}
    )
    made: tuple[int, NDArray[np.float16]] = (-1, np.empty((0, WIDTH), np.float16))
    for rows in writer.missing():
        if rows.start // size != made[0]:
            k = rows.start // size
            made = k, drawn.rows(seed + k, slides[blocks[k].start : blocks[k].stop])[0]
        writer.write(rows, {"cls": made[1][rows.start - made[0] * size :][: len(rows)]})


def read_once(store: FeatureStore) -> float:
    """Seconds in which all training rows pass by."""
    rows = store.embeddings("train", model="drawn", view="full")
    held = np.empty((8192, WIDTH), np.float16)
    start = time.perf_counter()
    for _, block in rows.blocks():
        held[: len(block)] = block
    return time.perf_counter() - start


CHILD = """
import sys
from pathlib import Path
import probe.stream as stream
from probe.cli import main
budget, passes, *sys.argv[1:] = sys.argv[1:]
if budget != "None":
    stream.BUDGET = int(budget)
gradient = stream._gradient
def counted(rows, data, fold, *rest):
    with Path(passes).open("a") as file:
        file.write(f"{len(fold)}\\n")
    return gradient(rows, data, fold, *rest)
stream._gradient = counted
main()
"""


def probe(folder: Path, budget: int | None) -> tuple[float, float, float, dict, list[int]]:
    """Run a whole `fm-probe`: wall and processor seconds, peak memory (GiB), its record, and the fits of each pass."""
    passes = folder / "passes.txt"
    passes.write_text("")
    options = ["--store", str(folder / "store.zarr"), "--runs", str(folder / "runs"), "--train", "train", "--json"]
    threads = {"OMP_NUM_THREADS": str(CORES), "OPENBLAS_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "10000"}
    start = time.perf_counter()
    with (folder / "answer.json").open("w+") as answer:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(budget), str(passes), *options],
            stdout=answer,
            env={**os.environ, **threads},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(process.returncode)
        answer.seek(0)
        record = json.load(answer)["results"][0]
    fits = [int(line) for line in passes.read_text().split()]
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20, record, fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where to write; emptied afterwards")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=asked.folder, prefix="bench-million-"))
    console = Console(width=160)
    try:
        store = FeatureStore.open_or_create(folder / "store.zarr")
        start = time.perf_counter()
        drawn = Drawn()
        write(store, "train", asked.rows, drawn, seed=0)
        write(store, "test", asked.rows // 5, drawn, seed=10**6)
        console.print(f"{asked.rows:,} rows drawn and written in {time.perf_counter() - start:.0f} s")
        read_once(store)  # checksums
        table = Table(title=f"fm-probe on {asked.rows:,} + {asked.rows // 5:,} rows x {WIDTH}, {CORES} threads")
        headings = (
            "rows",
            "wall s",
            "processor s",
            "peak GiB",
            "read limit s",
            "ratio",
            "passes",
            "solved",
            "max gradient",
            "AUROC",
        )
        for heading in headings:
            table.add_column(heading, justify="right")
        for budget in (None, SMALL_BUDGET) if asked.rows <= 100_000 else (None,):
            limits = [read_once(store) for _ in range(3)]
            seconds, busy, peak, record, passes = probe(folder, budget)
            limits += [read_once(store) for _ in range(3)]
            limit = float(np.median(limits))
            fits = record["candidates"][0]
            table.add_row(
                "left in the store" if budget or asked.rows > 100_000 else "read",
                f"{seconds:.1f}",
                f"{busy:.1f}",
                f"{peak:.2f}",
                f"{limit:.2f}",
                f"{seconds / limit:.0f}",
                f"{len(passes)}, {sum(passes) / fits['n_fits']:.1f} of all fits",
                f"{fits['n_fits'] - fits['n_not_converged'] - fits['n_given_up']} of {fits['n_fits']}",
                f"{fits['max_gradient']:.1e}",
                f"{record['metrics']['sets']['test/test']['ensemble']['auroc']:.4f}",
            )
        console.print(table)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
