"""How fast are all folds and strengths solved, next to scikit-learn solving the same problems to the same tolerance?

    python tests/bench_probe.py [--quick | --many]

Both get the same rows, folds and strengths (the protocol's grid). scikit-learn runs at its own best: columns spread
over two processes with one BLAS thread each, hardest first, on folds standardised beforehand (not timed); one process
with two BLAS threads is tried too, and counted where it is faster. The two solvers take turns in one run; times are
wall time, median and best, and the ratios are theirs. The largest gradient component is recomputed in float64.

With --many the classes are nine. scikit-learn then takes minutes: it solves one fold at all strengths, which is scaled
up. Both have one thread, and times are processor seconds, which other work on the machine hardly changes.
"""

from __future__ import annotations

import os
import sys

# Threads that spin for long wait out whole time slices on a core that has other work (docs/decisions/solver.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "OPENBLAS_CORETYPE" in os.environ:  # it can halve numpy's matrix products; BLAS reads it on loading only
    del os.environ["OPENBLAS_CORETYPE"]
    os.execv(sys.executable, [sys.executable, *sys.argv])

import argparse
import multiprocessing
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from probe.linear import STRENGTHS
from probe.logistic import Fits, fit_logistic

CORES = 2
HARD_STRENGTHS = tuple(np.logspace(-4, 2, 10))  # up to hardly any penalty on separable classes
REFERENCES = {1e-6: np.float64, 1e-4: np.float32}  # scikit-learn's precision at each tolerance


@dataclass(frozen=True, eq=False)
class Problem:
    X: NDArray[np.float16]
    y: NDArray[np.int64]
    masks: NDArray[np.bool_]
    strengths: tuple[float, ...]

    @property
    def n_classes(self) -> int:
        return int(self.y.max()) + 1


def make_problem(n: int, d: int, strengths: tuple[float, ...] = STRENGTHS, seed: int = 0) -> Problem:
    """Shaped like embeddings of patches: slides shift them, the spectrum is a power law, the label is planted.

    At n = 3,720, d = 1,536 the eigenvalues of the correlation matrix fall from 160 over 4 (the 64th) to 0.02 (the
    last); those of AMi-Br under an EfficientNet fall from 90 over 4 to 0.004.
    """
    rng = np.random.default_rng(seed)
    spectrum = (np.arange(1, d + 1) ** -0.5).astype(np.float32)
    slides = rng.integers(0, max(10, n // 20), n)
    latent = rng.standard_normal((n, d), dtype=np.float32)
    latent += 0.7 * rng.standard_normal((slides.max() + 1, d), dtype=np.float32)[slides]
    latent *= spectrum
    score = latent @ (rng.standard_normal(d) * np.arange(1, d + 1) ** -0.3).astype(np.float32)
    score = 2 * score / score.std() + rng.logistic(size=n)
    y = (score > np.quantile(score, 0.78)).astype(np.int64)  # 22 % positives
    return _as_problem(latent, y, slides, strengths, rng)


def make_many(n: int, d: int, c: int, strengths: tuple[float, ...] = STRENGTHS, seed: int = 0) -> Problem:
    """Embeddings of the same shape in c classes of unequal size: a mean each, two of them near, 8 % labelled at random.

    At n = 10,000, d = 1,536, c = 9 the best strengths predict 72 % of the held-out labels.
    """
    rng = np.random.default_rng(seed)
    spectrum = (np.arange(1, d + 1) ** -0.5).astype(np.float32)
    slides = rng.integers(0, max(10, n // 20), n)
    latent = rng.standard_normal((n, d), dtype=np.float32)
    latent += 0.7 * rng.standard_normal((slides.max() + 1, d), dtype=np.float32)[slides]
    share = np.exp(0.6 * rng.standard_normal(c))
    share /= share.sum()
    y = rng.choice(c, n, p=share)
    means = rng.standard_normal((c, d), dtype=np.float32) * np.arange(1, d + 1, dtype=np.float32) ** -0.2
    means[1] = (means[0] + means[1]) / 2
    latent += 0.35 * means[y]
    latent *= spectrum
    y = np.where(rng.random(n) < 0.08, rng.choice(c, n, p=share), y)
    return _as_problem(latent, y, slides, strengths, rng)


def _as_problem(
    latent: NDArray[np.float32],
    y: NDArray[np.int64],
    slides: NDArray[np.int64],
    strengths: tuple[float, ...],
    rng: np.random.Generator,
) -> Problem:
    """Rotate, scale and shift latent features, and draw five folds that do not cut slides."""
    n, d = latent.shape
    rotation = np.linalg.qr(rng.standard_normal((d, d), dtype=np.float32))[0]
    X = latent @ rotation
    X *= np.exp(0.5 * rng.standard_normal(d)).astype(np.float32)
    X += (2 * rng.standard_normal(d)).astype(np.float32)
    masks = np.ones((5, n), dtype=bool)
    for f, (_, held_out) in enumerate(StratifiedGroupKFold(5, shuffle=True, random_state=42).split(y, y, slides)):
        masks[f, held_out] = False
    return Problem(X.astype(np.float16), y, masks, strengths)


def nested(problem: Problem) -> Problem:
    """The folds, and every two of them left out together: what choosing C inside the training data takes."""
    pairs = [problem.masks[f] & problem.masks[g] for f, g in combinations(range(len(problem.masks)), 2)]
    return Problem(problem.X, problem.y, np.stack([*problem.masks, *pairs]), problem.strengths)


class Reference:
    """scikit-learn on one problem, in two processes that hold the standardised folds."""

    _folds: tuple[tuple[NDArray[np.floating], NDArray[np.int64]], ...] = ()  # of a worker process

    def __init__(self, problem: Problem, dtype: type, folds: int) -> None:
        self.problem = problem
        self.columns = [(f, C) for C in sorted(problem.strengths, reverse=True) for f in range(folds)]
        self.pool = ProcessPoolExecutor(
            CORES, multiprocessing.get_context("spawn"), Reference._start, (problem, dtype, folds)
        )
        list(self.pool.map(Reference._fit, [(f, 1e-6, 1e-2) for f in range(folds)] * CORES))  # started and warm

    @staticmethod
    def _start(problem: Problem, dtype: type, folds: int) -> None:
        threadpool_limits(1)
        Reference._folds = tuple(
            (StandardScaler(copy=False).fit_transform(problem.X[mask].astype(dtype)), problem.y[mask])
            for mask in problem.masks[:folds]
        )

    @staticmethod
    def _fit(column: tuple[int, float, float], threads: int = 1) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        f, C, tol = column
        model = LogisticRegression(C=C, tol=tol, class_weight="balanced", max_iter=10_000)
        with threadpool_limits(threads), warnings.catch_warnings(action="ignore"):
            model.fit(*Reference._folds[f])
        return model.coef_, model.intercept_

    def solve(self, tol: float) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        return list(self.pool.map(Reference._fit, [(f, C, tol) for f, C in self.columns]))

    def one_process(self, tol: float, C: float) -> tuple[float, float]:
        """Seconds for one column in one process: with one BLAS thread, and with two."""
        times = []
        for threads in (1, CORES):
            start = time.perf_counter()
            self.pool.submit(Reference._fit, (0, C, tol), threads).result()
            times.append(time.perf_counter() - start)
        return times[0], times[1]

    def gradient(self, solutions: list[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> float:
        """Largest gradient component of the mean loss, of all columns."""
        worst = 0.0
        for f in sorted({f for f, _ in self.columns}):
            rows, labels = standardised(self.problem, f)
            for (of, C), (coef, intercept) in zip(self.columns, solutions, strict=True):
                if of == f:
                    worst = max(worst, gradient_norm(rows, labels, C, coef, intercept))
        return worst

    def close(self) -> None:
        self.pool.shutdown()


def standardised(problem: Problem, f: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    mask = problem.masks[f]
    return StandardScaler(copy=False).fit_transform(problem.X[mask].astype(np.float64)), problem.y[mask]


def gradient_norm(
    rows: NDArray[np.float64],
    labels: NDArray[np.int64],
    C: float,
    coef: NDArray[np.floating],
    intercept: NDArray[np.floating],
) -> float:
    """Largest gradient component at coefficients (q, d), intercepts (q,): q = 1 for two classes, else q = c."""
    counts = np.bincount(labels)
    logits = rows @ coef.astype(np.float64).T + intercept
    if len(coef) == 1:
        logits = np.column_stack([np.zeros(len(rows)), logits])
    residual = (len(labels) / len(counts) / counts)[labels, None] * (softmax(logits, 1) - np.eye(len(counts))[labels])
    residual = residual[:, -len(coef) :]
    by_coef = residual.T @ rows + coef / C
    return float(max(np.abs(by_coef).max(), np.abs(residual.sum(axis=0)).max()) / len(rows))


def fit(problem: Problem, tol: float = 1e-6) -> Fits:
    return fit_logistic(
        problem.X,
        problem.y,
        masks=problem.masks,
        strengths=problem.strengths,
        n_classes=problem.n_classes,
        tol=tol,
    )


def our_gradient(problem: Problem, fits: Fits, *, folds: int = 5) -> float:
    """Largest gradient component of the first folds' columns."""
    worst = 0.0
    for f, mask in enumerate(problem.masks[:folds]):
        scaler = StandardScaler().fit(problem.X[mask].astype(np.float64))
        rows, labels = standardised(problem, f)
        for s, C in enumerate(problem.strengths):
            coef = fits.coef[f, s].astype(np.float64)  # (c - 1, d), over class 0
            intercept = fits.intercept[f, s] + coef @ scaler.mean_
            if problem.n_classes > 2:  # the ones that sum to zero over the classes
                coef = np.concatenate([0 * coef[:1], coef])
                coef -= coef.mean(axis=0)
                intercept = np.concatenate([[0], intercept])
            worst = max(worst, gradient_norm(rows, labels, C, coef * scaler.scale_, intercept))
    return worst


def compare_many(name: str, problem: Problem, table: Table, *, tol: float = 1e-6, turns: int = 2) -> None:
    """One row of the table of many classes: scikit-learn solves the first fold between our turns."""
    ours, theirs, worst = [], [], 0.0
    rows, labels = standardised(problem, 0)
    for turn in range(turns):
        start = time.process_time()
        fits = fit(problem, tol)
        ours.append(time.process_time() - start)
        for C in problem.strengths[turn::turns]:
            start = time.process_time()
            model = LogisticRegression(C=C, tol=tol, class_weight="balanced", max_iter=10_000).fit(rows, labels)
            theirs.append(time.process_time() - start)
            worst = max(worst, gradient_norm(rows, labels, C, model.coef_, model.intercept_))
            print(f"{name}: C = {C:g} took scikit-learn {theirs[-1]:.1f} s, {model.n_iter_[0]} steps", flush=True)
    total = sum(theirs) * len(problem.masks)
    table.add_row(
        name,
        f"{total:.0f}",
        f"{statistics.median(ours):.1f} / {min(ours):.1f}",
        f"[bold]{total / statistics.median(ours):.1f}[/] / {total / min(ours):.1f}",
        f"{worst:.1e}",
        f"{our_gradient(problem, fits, folds=1):.1e}",
        f"{fits.n_iter.mean():.0f} / {fits.n_iter.max()}",
    )


def many() -> None:
    torch.set_num_threads(1)
    table = Table(title=f"5 folds x {len(STRENGTHS)} strengths of 9 classes to 1e-6: processor seconds of one thread")
    for heading in ("problem", "scikit-learn", "ours, median / best", "ratio", "its gradient", "ours", "our steps"):
        table.add_column(heading, justify="left" if heading == "problem" else "right", no_wrap=heading == "problem")
    with threadpool_limits(1):
        for n in (1000, 10_000):
            compare_many(f"n = {n:,}, d = 1,536", make_many(n, 1536, 9), table)
    Console(width=160).print(table)


def compare(name: str, problem: Problem, tol: float, table: Table, *, turns: int, folds: int = 5) -> None:
    """One row of the table. scikit-learn solves the first `folds` folds only, and its time is scaled up."""
    reference = Reference(problem, REFERENCES[tol], folds)
    one, two = reference.one_process(tol, C=1e-2)
    theirs, ours = [], []
    for _ in range(turns):
        start = time.perf_counter()
        solutions = reference.solve(tol)
        theirs.append((time.perf_counter() - start) * len(problem.masks) / folds)
        for _ in range(3):
            start = time.perf_counter()
            fits = fit(problem, tol)
            ours.append(time.perf_counter() - start)
    reference.close()
    best = min(two / one * CORES, 1.0)  # where two BLAS threads beat two processes, scikit-learn gets them
    theirs = [seconds * best for seconds in theirs]
    their, our = statistics.median(theirs), statistics.median(ours)
    table.add_row(
        name + " *" * (folds < len(problem.masks)),
        f"{tol:.0e}",
        f"{their:.2f} / {min(theirs):.2f}",
        f"{two / one:.1f}",
        f"{our:.3f} / {min(ours):.3f}",
        f"[bold]{their / our:.1f}[/] / {min(theirs) / min(ours):.1f}",
        f"{reference.gradient(solutions):.1e}",
        f"{our_gradient(problem, fits):.1e}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two targets at d = 1,536 only")
    parser.add_argument("--many", action="store_true", help="nine classes instead of two")
    arguments = parser.parse_args()
    if arguments.many:
        many()
        return
    quick = arguments.quick
    torch.set_num_threads(CORES)

    table = Table(
        title=f"5 folds x {len(STRENGTHS)} strengths on {CORES} cores: wall seconds, median / best",
        caption="* scikit-learn solved one fold, and its time is scaled up",
    )
    headings = ("problem", "tolerance", "scikit-learn", "its 2 threads : 1", "ours", "ratio", "its gradient", "ours")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "problem" else "right", no_wrap=heading == "problem")

    for d in (1536,) if quick else (1536, 2560):
        problem = make_problem(3720, d)
        for tol in REFERENCES:
            compare(f"n = 3,720, d = {d:,}", problem, tol, table, turns=3)
    if not quick:
        hard = make_problem(3720, 1536, HARD_STRENGTHS)
        for tol in REFERENCES:
            compare("the same, C up to 100", hard, tol, table, turns=1)
        compare("n = 100,000, d = 1,536", make_problem(100_000, 1536), 1e-4, table, turns=1, folds=1)
    Console(width=160).print(table)

    if not quick:
        problem = nested(make_problem(3720, 1536))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            fit(problem)
            times.append(time.perf_counter() - start)
        Console().print(
            f"Nested choice of C, {len(problem.masks)} x {len(STRENGTHS)} columns to 1e-6: "
            f"{statistics.median(times):.2f} s (best {min(times):.2f})."
        )


if __name__ == "__main__":
    main()
