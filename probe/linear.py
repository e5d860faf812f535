"""How are linear probes fitted to one matrix of embeddings, and what chooses their strength?

Every fit goes into one batched problem (`probe.logistic`). With F folds these are the F fits that leave one fold out
and the F (F - 1) / 2 fits that leave two out, each at every strength. The fit without folds f and g, scored on g, is an
inner validation of outer fold f; scored on f, it is one of outer fold g. That is nested cross-validation for the price
of half its fits. So the strength of fold f is chosen by grouped validation within fold f's training rows, and the rows
that f holds out choose nothing.

Of two folds, one of them is all that is left to train on: it is cut into parts (`Folds.parts`), which take turns there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from features.blocks import Embeddings
from features.console import UserError
from features.folds import Folds
from probe.curve import Subset
from probe.logistic import Fits, fit_logistic, lacked_classes, predict_logits
from probe.metrics import balanced_log_loss, best_threshold, predicted_classes, probabilities
from probe.paper import fit_paper_probe
from probe.records import FitRecord
from probe.schedule import PAPER, PaperRecipe
from probe.stream import fit_streamed, fits_in_memory

# Inverse L2 strengths C, half a decade apart: from "only the mean direction" to "nearly unpenalised" on
# standardised embeddings of a few thousand patches.
STRENGTHS = tuple(float(f"{c:.3g}") for c in np.logspace(-5, -0.5, 10))
FEWEST_FOLDS = 3  # of the exact probe: one validates, and of the others each in turn chooses the strength


@dataclass(frozen=True, eq=False)
class Probe:
    """Linear probes of one matrix of embeddings, one per seed and fold: logit = x @ coef[m] + intercept[m].

    The exact probe draws nothing and has one seed; m is then the fold, else as in `features.folds.fold_models`.
    Of c classes, the c - 1 logits of a row are those of class 1 ... c - 1 over class 0.

    Attributes:
        coef: (K * F, c - 1, d) float32.
        intercept: (K * F, c - 1) float64, because for uncentred embeddings it is a small difference of large sums.
        validation_logit: (n, K, c - 1) each training row under the models, one per seed, of the fold that it validates.
        threshold: of two classes, with the highest balanced accuracy on the validation rows' mean probabilities;
            `predict` uses it. NaN for more classes.
        fit: what was chosen and how well it converged.
    """

    coef: NDArray[np.float32]
    intercept: NDArray[np.float64]
    validation_logit: NDArray[np.float32]
    threshold: float
    fit: FitRecord

    def __repr__(self) -> str:
        n_models, n_logits, width = self.coef.shape
        strength = (
            "" if self.fit.chosen_strength is None else f", C {' '.join(f'{c:g}' for c in self.fit.chosen_strength)}"
        )
        classes = f"threshold {self.threshold:.3f}" if n_logits == 1 else f"{n_logits + 1} classes"
        return f"Probe({n_models} fold models, {width:,} features{strength}, {classes})"

    def decision_function(self, X: NDArray[np.floating] | Embeddings) -> NDArray[np.float32]:
        """Compute the logits (m, K * F, c - 1) of embeddings (m, d) under every model."""
        return predict_logits(X, self.coef, self.intercept)

    def predict_proba(self, X: NDArray[np.floating] | Embeddings) -> NDArray[np.float64]:
        """Compute the probabilities (m, c) of all classes, the mean over fold models, for embeddings (m, d)."""
        return np.asarray(probabilities(self.decision_function(X)).mean(axis=1))

    def predict(self, X: NDArray[np.floating] | Embeddings) -> NDArray[np.int8]:
        """Predict the class (m,) of embeddings (m, d): of two classes 1 from `threshold` on, else the most probable."""
        return predicted_classes(self.predict_proba(X), self.threshold)


def fit_exact(
    X: NDArray[np.floating] | Embeddings,
    y: NDArray[np.integer],
    *,
    folds: Folds,
    subset: Subset | None = None,
    strengths: Sequence[float] = STRENGTHS,
    n_classes: int = 2,
    target: NDArray[np.floating] | None = None,
    device: str = "cpu",
) -> Probe:
    """Fit L2-regularised logistic regressions by nested, grouped cross-validation, as one batched solve.

    >>> from features import grouped_folds, make_samples
    >>> slides = [f"slide {k // 2}" for k in range(12)]
    >>> samples = make_samples([f"{k}.png" for k in range(12)], [0, 1] * 6, sha256=[""] * 12, group=slides)
    >>> X = np.stack([samples.label, np.arange(12) % 3], axis=1).astype(np.float32)
    >>> probe = fit_exact(X, samples.label, folds=grouped_folds(samples, 3))
    >>> probe.coef.shape, probe.predict(X).tolist()
    ((3, 1, 2), [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])

    Args:
        X: (n, d) embeddings of the training rows, in memory or still in the store.
        y: (n,) labels, 0 ... c - 1.
        folds: in which fold each row validates.
        subset: of `draw_subsets`, its masks in the order of `held_out_folds`: train on this share of the slides.
        strengths: (S,) values of C to choose from, per fold.
        n_classes: c.
        target: (n, c) a distribution over the classes for every row, to be learned instead of `y`, such as the shares
            of raters' votes. Strength and threshold are chosen on `y` all the same.
        device: where to compute, as torch names it.

    Raises:
        UserError: if there are fewer than three folds, so that none is left to choose on; if a fold has no other to
            choose on; and as `fit_logistic` does.
    """
    held_out = held_out_folds(folds)
    inner, fitted, label, learned = folds.inner, X, y, target
    masks = np.stack([~(np.isin(folds.fold, held) | np.isin(inner, held)) for held in held_out])
    if subset is not None:
        used = np.flatnonzero(subset.masks.any(axis=0))
        masks, inner, label = subset.masks[:, used], inner[used], y[used]
        learned = None if target is None else target[used]
        fitted = X[used] if isinstance(X, np.ndarray) else in_memory(X.select(used), len(held_out), n_classes=n_classes)
    # Without two folds a class may be missing: that fit says nothing. Without one, it is refused.
    lacking = np.asarray(lacked_classes(label, masks, n_classes).any(axis=1))
    made = [m for m in range(len(masks)) if m < folds.n_folds or not lacking[m]]
    masks, held_out = masks[made], [held_out[m] for m in made]
    choice = _Choice(label, inner=inner, masks=masks, held_out=held_out, strengths=strengths)
    fit = (
        partial(fit_logistic, fitted)
        if isinstance(fitted, np.ndarray)
        else partial(fit_streamed, fitted, still_needed=choice.still_needed)
    )
    solved = fit(label, masks=masks, strengths=strengths, n_classes=n_classes, target=learned, device=device)
    chosen, record = choice.made(solved)
    every_fold = np.arange(folds.n_folds)
    coef, intercept = solved.coef[every_fold, chosen], solved.intercept[every_fold, chosen]
    logits = solved.logits[:, every_fold, chosen] if subset is None else predict_logits(X, coef, intercept)
    return _probe(coef, intercept, logits, y=y, folds=folds, record=record)


def fit_paper(
    X: NDArray[np.floating],
    y: NDArray[np.integer],
    *,
    folds: Folds,
    seeds: Sequence[int],
    recipe: PaperRecipe = PAPER,
    n_classes: int = 2,
    target: NDArray[np.floating] | None = None,
) -> Probe:
    """Fit the paper's own probe, once per seed; see `probe.paper`."""
    coef, intercept, record = fit_paper_probe(
        X, y, masks=folds.training, seeds=seeds, recipe=recipe, n_classes=n_classes, target=target
    )
    return _probe(coef, intercept, predict_logits(X, coef, intercept), y=y, folds=folds, record=record)


def _probe(
    coef: NDArray[np.float32],
    intercept: NDArray[np.float64],
    logits: NDArray[np.float32],
    *,
    y: NDArray[np.integer],
    folds: Folds,
    record: FitRecord,
) -> Probe:
    """Make a probe of its models and the logits (n, K * F, c - 1) of the training rows under each of them."""
    n, n_logits = len(y), logits.shape[2]
    validation = logits.reshape(n, -1, folds.n_folds, n_logits)[np.arange(n), :, folds.fold]  # (n, K, c - 1)
    probability = probabilities(validation).mean(axis=1)  # (n, c)
    threshold = best_threshold(y, probability[:, 1]) if n_logits == 1 else math.nan
    return Probe(coef, intercept, validation, threshold, record)


def in_memory(stored: Embeddings, n_fits: int, *, n_classes: int = 2) -> NDArray[np.float16] | Embeddings:
    """Read embeddings into memory if there is room for them and a solver of so many fits; else leave them stored."""
    n_columns = n_fits * len(STRENGTHS)
    return stored.read() if fits_in_memory(stored.shape, n_columns, n_classes=n_classes) else stored


def held_out_folds(folds: Folds) -> list[tuple[int, ...]]:
    """List the folds that each fit leaves out: each one, then each two; of two, each with each part of the other.

    >>> held_out_folds(Folds(fold=np.array([0, 1, 2]), n_folds=3, source="", digest=""))
    [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    >>> fold, parts = np.array([0, 0, 1, 1]), np.array([2, 3, 4, 5])
    >>> held_out_folds(Folds(fold=fold, n_folds=2, source="", digest="", parts=parts))
    [(0,), (1,), (0, 4), (0, 5), (1, 2), (1, 3)]
    """
    each = range(folds.n_folds)
    alone = [(f,) for f in each]
    if folds.parts is not None:
        return alone + [(f, int(part)) for f in each for part in np.unique(folds.parts[folds.fold != f])]
    if folds.n_folds < FEWEST_FOLDS:
        raise UserError(
            f"choosing a strength within each training set needs at least {FEWEST_FOLDS} folds, got {folds.n_folds}."
        )
    return alone + list(combinations(each, 2))


class _Choice:
    """Chooses each fold's strength within its training rows, and gives up strengths that cannot turn out best.

    The fit that leaves out f and g is scored for f on those rows of g that f trains on, and the other way round. Where
    g has only one class among them, it says nothing for f.

    Attributes:
        possible: (F, S) bool; which strengths may still turn out best.
    """

    def __init__(
        self,
        y: NDArray[np.integer],
        *,
        inner: NDArray[np.intp],
        masks: NDArray[np.bool_],
        held_out: Sequence[tuple[int, ...]],
        strengths: Sequence[float],
    ) -> None:
        self._y, self._strengths, self._n_fits = y, strengths, len(held_out)
        n_folds = sum(len(held) == 1 for held in held_out)
        self._scored: list[list[tuple[int, NDArray[np.intp]]]] = [[] for _ in range(n_folds)]  # of f: fit and rows
        for m, held in enumerate(held_out[n_folds:], start=n_folds):
            for f, g in (held, held[::-1]):
                if f < n_folds:  # else a part, which is no fold itself
                    rows = np.flatnonzero(masks[f] & (inner == g))
                    if len(np.unique(y[rows])) > 1:
                        self._scored[f].append((m, rows))
        self.possible = np.ones((n_folds, len(strengths)), dtype=bool)
        self._passes: list[NDArray[np.float64]] = []  # the losses after the last three

    def still_needed(self, logits: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Say which fits (M, S) still matter, given the logits (n, M, S, c - 1) of all of them at the points reached.

        From one pass over the rows to the next, solutions mostly change by a third or less of what they changed by
        before. So what a strength lacks to the best one is taken to stay within twice the larger of its last two
        changes. Where one strength is left, the fits that chose it are done.
        """
        self._passes = [*self._passes[-2:], self.losses(logits)]
        loss = self._passes[-1]
        best = np.where(self.possible, loss, np.inf).argmin(axis=1)[:, None]
        lacks = [past - np.take_along_axis(past, best, axis=1) for past in self._passes]
        if len(lacks) == 3:
            self.possible &= lacks[2] <= 2 * np.abs(np.diff(lacks, axis=0)).max(axis=0)
        needed = np.zeros((self._n_fits, len(self._strengths)), dtype=bool)
        for f, possible in enumerate(self.possible):
            needed[f] = possible
            if possible.sum() > 1:
                for m, _ in self._scored[f]:
                    needed[m] |= possible
        return needed

    def made(self, fits: Fits) -> tuple[NDArray[np.intp], FitRecord]:
        """Choose the strengths by finished fits: the index (F,) of each fold's; and record how the fits converged.

        Raises:
            UserError: if nothing is said for a fold.
        """
        silent = [f for f, scored in enumerate(self._scored) if not scored]
        if silent:
            raise UserError(
                f"fold {silent[0]}: no strength can be chosen within its training rows. Without each of the other "
                "folds in turn they lack a class, or the one left out holds only one. Use more folds, or fewer classes."
            )
        loss = self.losses(fits.logits)
        chosen = np.where(self.possible, loss, np.inf).argmin(axis=1)
        return chosen, FitRecord(
            strengths=tuple(self._strengths),
            chosen_strength=tuple(self._strengths[s] for s in chosen),
            at_edge=bool(np.isin(chosen, (0, len(self._strengths) - 1)).any()),
            inner_loss=tuple(map(tuple, np.round(loss, 5).tolist())),
            max_gradient=float(fits.gradient_norm[~fits.given_up].max()),
            n_not_converged=int((~fits.converged & ~fits.given_up).sum()),
            n_fits=int(fits.converged.size),
            n_given_up=int(fits.given_up.sum()),
            n_dropped=int(fits.n_dropped.max()),
        )

    def losses(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Compute the mean (F, S) over the other folds g of the balanced log loss of the fit that saw neither f nor g.

        A strength that was given up keeps its last one.
        """
        losses = self._passes[-1].copy() if self._passes else np.full(self.possible.shape, np.nan)
        for f, scored in enumerate(self._scored):
            asked = np.flatnonzero(self.possible[f])
            by_fold = [balanced_log_loss(self._y[rows], logits[:, m, asked][rows]) for m, rows in scored]
            if by_fold:
                losses[f, asked] = np.mean(by_fold, axis=0)
        return losses
