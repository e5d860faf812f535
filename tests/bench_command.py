"""How long does `fm-probe --cv 5` take on eight models and all three test sets, process start included?

A store of the size of the paper: AMi-Br 3,720 rows on 202 slides, AtNorM-Br 746, AtNorM-MD 2,107; eight models of 1,536
columns with a power-law spectrum, as embeddings have.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.table import Table

from features.console import show
from features.samples import Samples, make_samples
from features.store import FeatureStore

WIDTH = 1536
MODELS = tuple(f"model-{k}" for k in range(8))
SETS = {"ami-br": (3720, 202, 0.224), "atnorm-br": (746, 0, 0.172), "atnorm-md": (2107, 60, 0.104)}
TARGET = 10.0  # seconds


def table(n: int, n_slides: int, rate: float, name: str) -> Samples:
    """A patch table with slides of uneven size; a fifth of AMi-Br's slides are held out."""
    rng = np.random.default_rng(n)
    slide = np.sort(rng.choice(max(n_slides, 1), n, p=rng.dirichlet(np.full(max(n_slides, 1), 0.7))))
    return make_samples(
        [f"{row:05}.png" for row in range(n)],
        (rng.random(n) < rate).astype(int).tolist(),
        group=[f"{name} {s}" if n_slides else "" for s in slide],
        split=["train" if name == "ami-br" and s % 5 else "test" for s in slide],
        sha256=[f"{name} {row}" for row in range(n)],
    )


def fill(store: FeatureStore) -> None:
    """Eight models' embeddings of the three sets."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, WIDTH + 1, dtype=np.float32) ** -0.7
    direction = rng.standard_normal(WIDTH).astype(np.float32)
    for name, (n, n_slides, rate) in SETS.items():
        samples = table(n, n_slides, rate, name)
        store.put_samples(name, samples, attrs={})
        for model in MODELS:
            X = rng.standard_normal((n, WIDTH), dtype=np.float32)
            X = (X + 0.08 * direction * (2.0 * samples.label[:, None] - 1)) * spectrum
            writer = store.begin(
                name, model=model, view="full", poolings={"cls": WIDTH}, card_pooling="cls", parts={"model": model}
            )
            for rows in writer.missing():
                writer.write(rows, {"cls": X[rows.start : rows.stop]})


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore.open_or_create(Path(folder) / "embeddings.zarr")
        fill(store)
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            command = [str(Path(sys.executable).with_name("fm-probe")), "--cv", "5"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            seconds.append(time.perf_counter() - started)
    shown = Table(title=f"fm-probe --cv 5: {len(MODELS)} models x {WIDTH} columns, three test sets")
    for column in ("Seconds, median of 3", "Target"):
        shown.add_column(column, justify="right")
    shown.add_row(f"{statistics.median(seconds):.1f}", f"< {TARGET:.0f}")
    show(shown)


if __name__ == "__main__":
    main()
