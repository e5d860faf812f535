"""How are all folds and all strengths of a linear probe fitted at once?

The problem. Fold f trains on the n_f rows of its mask m_f in {0, 1}^n; a strength C weighs data against penalty. For
two classes, column (f, C) minimises the class-balanced, L2-penalised mean logistic loss

    L(b, b0) = sum_i w_fi log(1 + exp(-s_i z_i)) + |b|^2 / (2 C n_f),    z_i = b . (x_i - mu_f) / sigma_f + b0,

with labels s_i = +-1, weights w_fi = m_fi / (2 n_f,class(i)) that sum to 1, mean mu_f and standard deviation sigma_f of
the fold's *own* training rows, and a free intercept b0. For c > 2 classes a column holds q = c coefficient vectors b_k
instead of q = 1, the loss of row i is the cross-entropy of the softmax of its logits z_i1 ... z_ic, every |b_k|^2 is
penalised, and w_fi = m_fi / (c n_f,class(i)). All start at zero, so vectors and intercepts sum to zero over the classes
throughout. It is the objective of scikit-learn's `StandardScaler` followed by `LogisticRegression(C=C,
class_weight="balanced")` on the fold's rows, divided by n_f, and has one optimum.

A row may carry a distribution over the classes instead of one class, such as the shares of raters' votes: its loss is
then the cross-entropy against that, and its weight still that of its label's class.

One matrix. X is never copied per fold: sigma_f divides the coefficients, mu_f moves the intercept, w_f weighs the
residuals. Every vector of every column is one row of a matrix, and two products with X serve all of them:

    logits  Z = W X^T  (columns x q, n),      gradient  G = R X  (columns x q, d)  with residuals  R = w (p - y),

where p = sigmoid(Z) for two classes and the softmax over a column's vectors for more.

The method is the preconditioned nonlinear conjugate gradient of Hestenes & Stiefel (1952; Nocedal & Wright 2006,
ch. 5), in which every column takes its own steps. Four ideas make it fast:

1. A line search without products. Along a direction P the logits are Z + t (P X^T): once P X^T is known, the minimum
   over t is a safeguarded Newton iteration on n numbers.
2. One preconditioner for all columns. The Hessian is X^T diag(w p (1 - p)) X + I / (C n_f). Folds and strengths share
   the leading eigenvectors of X^T diag(w) X, and where predictions are confident, p (1 - p) shrinks everywhere by much
   the same factor, to which conjugate gradients are blind: its value at zero stands for it, 1/4 for two classes and 1/c
   for the c vectors of more, whose sum is zero. Subspace iteration finds the eigenvectors (Halko, Martinsson & Tropp
   2011); inverting "that times the eigenvalue plus penalty" in their basis is the preconditioner of Frangella, Tropp &
   Udell (2023).
3. bfloat16 products, float32 truth. Inside a descent the products only ever see *changes* of coefficients and
   residuals, so their rounding is relative to what changes. After a hundredfold fall of the gradient, logits and
   gradient are recomputed in float32 and the descent restarts from there (iterative refinement, Wilkinson 1963).
   Convergence is declared on a float32 gradient alone.
4. A column leaves the batch as soon as it has converged.
5. Between the products, a few columns at a time stay in the processor's cache (`BLOCK`).

Where the rows do not fit into memory, `probe.stream` solves the same problem. Measured choices and figures:
docs/decisions/solver.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.blocks import Embeddings
from features.console import UserError
from features.device import full_float32, has_bf16

RANK = 96  # eigenvectors in the preconditioner; twice as many save hardly a step
OVERSAMPLE = 32  # vectors of the subspace iteration beyond these: its last ones are poor
SKETCH_ROWS = 8192  # enough to find the leading eigenvectors of however many rows
SLOPE = 0.25  # the line search stops at |slope| <= this times the initial slope
REFINEMENT = 1e-2  # the fall of the gradient after which bfloat16 products are corrected
BLOCK = 2**20  # logits on which a line search works at a time: 4 MB per array. A GPU takes all at once
FLOOR = 1e-8  # where the gradient of a mean loss is rounding in float32: no descent aims lower


@dataclass(frozen=True, eq=False)
class Fits:
    """The solution of every fold x strength, in the original feature space: logit = x @ coef + intercept.

    The last axis of logits, of length c - 1, is class k = 1 ... c - 1 over class 0: what its logit exceeds that of
    class 0 by.

    Attributes:
        coef: (F, S, c - 1, d) float32.
        intercept: (F, S, c - 1) float64.
        logits: (n, F, S, c - 1) float32; of *every* row given, so a fold's held-out rows are its predictions.
        gradient_norm: (F, S) float64; largest absolute derivative of the mean loss in the fold's standardised space,
            intercept included: the quantity that scikit-learn's lbfgs compares with `tol`.
        n_iter: (F, S) int64; conjugate-gradient steps.
        converged: (F, S) bool; gradient_norm <= tol.
        n_dropped: (F,) int64; features that count as constant on the fold's training rows (`inverse_std`), and have a
            coefficient of 0.
        given_up: (F, S) bool; left unfinished on purpose, because nobody needs the solution (`fit_streamed`).
    """

    coef: NDArray[np.float32]
    intercept: NDArray[np.float64]
    logits: NDArray[np.float32]
    gradient_norm: NDArray[np.float64]
    n_iter: NDArray[np.int64]
    converged: NDArray[np.bool_]
    n_dropped: NDArray[np.int64]
    given_up: NDArray[np.bool_]


@full_float32()
def fit_logistic(
    X: NDArray[np.floating],
    y: NDArray[np.integer],
    *,
    masks: NDArray[np.bool_],
    strengths: Sequence[float] | NDArray[np.floating],
    n_classes: int = 2,
    target: NDArray[np.floating] | None = None,
    tol: float = 1e-6,
    max_iter: int = 1000,
    device: str = "cpu",
) -> Fits:
    """Fit every fold x strength of a class-balanced, L2-penalised logistic regression as one batched problem.

    Args:
        X: (n, d) float16 or float32 embeddings.
        y: (n,) the class of each row, 0 ... c - 1.
        masks: (F, n) bool; row f is True on the training rows of fold f.
        strengths: (S,) inverse penalties C > 0, in scikit-learn's sense.
        n_classes: c, two or more.
        target: (n, c) a distribution over the classes for every row, to be learned instead of `y`; classes are balanced
            by `y` all the same.
        tol: largest gradient component of the mean loss accepted as converged. float32 carries it down to about 1e-7.
        max_iter: steps after which a column is given back as it is, with `converged` False.
        device: where to compute, as torch names it.

    Raises:
        UserError: shapes that do not match, NaN or infinite embeddings, labels other than 0 ... c - 1, targets that are
            no distributions, a strength that is not positive, or a fold whose training rows lack a class.
    """
    C = np.asarray(strengths, dtype=np.float64)
    check(X.shape, y, masks=masks, strengths=C, n_classes=n_classes, target=target)
    F, S, (n, d) = len(masks), len(C), X.shape
    data = _prepare(X, y, masks=masks, n_classes=n_classes, target=target, device=torch.device(device))
    q = len(data.target)
    basis = leading_curvature(data)

    # Column k = f * S + s. All start at zero, where a fold's strengths do not differ yet: F evaluations are enough.
    fold = torch.arange(F, device=data.X.device).repeat_interleave(S)
    ridge = ridges(masks, C).to(data.X)
    start = evaluate(data, torch.arange(F, device=fold.device), ridge[::S], data.X.new_zeros(F, q, d + 1))
    columns = start.keep(fold)
    columns.ridge = ridge

    theta = data.X.new_zeros(F * S, q, d + 1)  # standardised coefficients and, last, the intercept
    logits = data.X.new_zeros(F * S, q, n)
    norm = torch.full((F * S,), torch.inf, device=fold.device)
    n_iter = torch.zeros(F * S, dtype=torch.int64, device=fold.device)
    unfinished = torch.arange(F * S, device=fold.device)
    factor = data.fast  # the X that the descents multiply with
    while True:
        previous, now = norm[unfinished], columns.gradient.abs().amax(dim=(1, 2))
        norm[unfinished], logits[unfinished], theta[unfinished] = now, columns.logits, columns.theta
        going_on = (now > tol) & (n_iter[unfinished] < max_iter)
        stuck = going_on & (now > 0.5 * previous)
        if stuck.any():
            # A descent that did not even halve the gradient has met the rounding of its products. Take the exact
            # ones from here on; where those were in use already, the column is reported as it is.
            if factor is data.X:
                going_on &= ~stuck
            factor = data.X
        unfinished, columns, now = unfinished[going_on], columns.keep(going_on), now[going_on]
        if len(unfinished) == 0:
            break
        goal = (now * (0 if factor is data.X else REFINEMENT)).clamp_min(max(0.5 * tol, FLOOR))
        budget = max_iter - n_iter[unfinished]
        theta_reached, steps = descend(data, factor, basis, columns, goal=goal, budget=budget)
        n_iter[unfinished] += steps
        columns = evaluate(data, fold[unfinished], columns.ridge, theta_reached)

    return in_original_units(data, fold, theta, logits=logits, norm=norm, n_iter=n_iter, tol=tol)


def in_original_units(
    data: Standardised,
    fold: Tensor,
    theta: Tensor,
    *,
    logits: Tensor,
    norm: Tensor,
    n_iter: Tensor,
    tol: float,
    given_up: Tensor | None = None,
) -> Fits:
    """Convert solutions theta (F * S, q, d + 1) in the folds' standardised spaces into `Fits` of the features as given.

    Logits (F * S, q, n) are those of the solutions.
    """
    F, d = data.mean.shape
    theta, logits = over_class_0(theta), over_class_0(logits)
    coef = theta[..., :d] * data.inv_std[fold][:, None] / data.scale
    # float64: with embeddings far off centre the intercept is a small difference of large sums.
    origin = (data.centre.double() + data.mean.double() * data.scale)[fold]  # (K, d): the fold's mean, as given
    intercept = theta[..., d] - (coef.double() * origin[:, None]).sum(dim=2)
    gradient_norm = norm.double().cpu().numpy().reshape(F, -1)
    per_fold = (F, len(theta) // F, theta.shape[1])
    return Fits(
        coef=coef.cpu().numpy().reshape(*per_fold, d),
        intercept=intercept.cpu().numpy().reshape(per_fold),
        logits=logits.cpu().numpy().reshape(*per_fold, -1).transpose(3, 0, 1, 2),
        gradient_norm=gradient_norm,
        n_iter=n_iter.cpu().numpy().reshape(F, -1),
        converged=gradient_norm <= tol,
        n_dropped=(data.inv_std == 0).sum(dim=1).cpu().numpy(),
        given_up=np.zeros((F, len(theta) // F), dtype=bool)
        if given_up is None
        else given_up.cpu().numpy().reshape(F, -1),
    )


def predict_logits(
    X: NDArray[np.floating] | Embeddings, coef: NDArray[np.float32], intercept: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Compute logits (m, ...) float32 of new rows X (m, d) under coefficients (..., d) and intercepts (...) of a fit.

    Rows that are still in a store are read block by block.
    """
    m, d = X.shape
    W, offset = coef.reshape(-1, d).T, intercept.reshape(-1)
    logits = np.empty((m, len(offset)), dtype=np.float32)
    for rows, block in [(slice(m), X)] if isinstance(X, np.ndarray) else X.blocks():
        logits[rows] = block.astype(np.float32) @ W + offset
    return logits.reshape(m, *intercept.shape)


def check(
    shape: tuple[int, ...],
    y: NDArray[np.integer],
    *,
    masks: NDArray[np.bool_],
    strengths: NDArray[np.float64],
    n_classes: int,
    target: NDArray[np.floating] | None,
) -> None:
    """Check the arguments of `fit_logistic`; of the embeddings, only their shape.

    Raises:
        UserError: as `fit_logistic`, except for NaN and infinite embeddings.
    """
    if len(shape) != 2 or y.shape != shape[:1] or masks.ndim != 2 or masks.shape[1:] != shape[:1]:
        raise UserError(
            f"the probe was given embeddings {shape}, labels {y.shape} and fold masks {masks.shape}; "
            "expected (n, d), (n,) and (folds, n) with one n. Select the same rows for all three."
        )
    if n_classes < 2 or not np.isin(y, np.arange(n_classes)).all():
        raise UserError(
            f"labels of {n_classes} classes must be whole numbers from 0 to {n_classes - 1}; "
            f"found {np.unique(y).tolist()[:5]}. Give the number of classes as `n_classes`, two or more."
        )
    if target is not None:
        _check_target(target, (shape[0], n_classes))
    if not (np.isfinite(strengths) & (strengths > 0)).all():
        raise UserError(f"every strength C must be positive and finite; found {strengths.tolist()}.")
    for f, lacking in enumerate(lacked_classes(y, masks, n_classes)):
        if lacking.any():
            names = ", ".join(str(k) for k in np.flatnonzero(lacking))
            raise UserError(
                f"fold {f}: its {masks[f].sum()} training rows hold no row of class {names}, and a probe needs all "
                f"{n_classes} classes. Use fewer folds, or stratify them by class."
            )


def _check_target(target: NDArray[np.floating], shape: tuple[int, int]) -> None:
    if target.shape != shape:
        raise UserError(
            f"the probe was given target distributions {target.shape}; expected {shape}, a row for every label and a "
            "column for every class."
        )
    wrong = np.flatnonzero(~((target >= 0).all(axis=1) & (np.abs(target.sum(axis=1) - 1) <= 1e-3)))
    if len(wrong):
        raise UserError(
            f"{len(wrong)} target rows are no distribution (first: row {wrong[0]}, {target[wrong[0]].tolist()}); "
            "expected shares of at least 0 that sum to 1. Divide each row's votes by their number."
        )


def lacked_classes(y: NDArray[np.integer], masks: NDArray[np.bool_], n_classes: int) -> NDArray[np.bool_]:
    """Say for each of (F, n) masks which classes its rows lack: (F, c)."""
    return ~np.stack([(masks & (y == k)).any(axis=1) for k in range(n_classes)], axis=1)


@dataclass(frozen=True, eq=False)
class Standardised:
    """What all columns share: X standardised over all rows, and each fold's own mean and deviation relative to that."""

    X: Tensor  # (n, d) float32
    fast: Tensor  # (n, d) the same in bfloat16 where the hardware multiplies it faster, else X itself
    centre: Tensor  # (d,) of all rows
    scale: Tensor  # (d,) of all rows
    mean: Tensor  # (F, d) of the fold's training rows, in units of X
    inv_std: Tensor  # (F, d) likewise; 0 where the fold's training rows are constant, which pins the coefficient to 0
    weight: Tensor  # (F, n) mask x class weight / n_f: sums to 1, so losses and gradients are means
    target: Tensor  # (q, n) the probabilities to be learned


def targets(y: NDArray[np.integer], target: NDArray[np.floating] | None, n_classes: int) -> Tensor:
    """Lay out the probabilities (q, n) that a column's q logits are to give: of class 1 alone for two classes."""
    shares = (
        np.eye(n_classes, dtype=np.float32)[y.astype(np.int64)] if target is None else target.astype(np.float32)
    )  # (n, c)
    return torch.from_numpy(np.ascontiguousarray(shares.T[1:] if n_classes == 2 else shares.T))


def class_weights(y: NDArray[np.integer], masks: NDArray[np.bool_], n_classes: int) -> Tensor:
    """Compute what a row of each class weighs in each fold, (F, c) float64: 1 / (c n_f,class)."""
    counts = np.stack([masks @ (y == k).astype(np.float64) for k in range(n_classes)], axis=1)
    return torch.from_numpy(1 / n_classes / counts)


def ridges(masks: NDArray[np.bool_], strengths: NDArray[np.float64]) -> Tensor:
    """Compute the weight 1 / (C n_f) of the penalty of every column, (F * S, 1, 1) float64."""
    return torch.from_numpy(1 / (masks.sum(axis=1)[:, None] * strengths)).reshape(-1, 1, 1)


def _prepare(
    X: NDArray[np.floating],
    y: NDArray[np.integer],
    *,
    masks: NDArray[np.bool_],
    n_classes: int,
    target: NDArray[np.floating] | None,
    device: torch.device,
) -> Standardised:
    n, d = X.shape
    A = torch.from_numpy(X.astype(np.float32)).to(device)  # a copy, to be standardised in place
    mask = torch.from_numpy(masks.astype(np.float32)).to(device)  # (F, n)
    size = mask.sum(dim=1, keepdim=True)

    centre = A.mean(dim=0)
    A -= centre
    sums = torch.cat([mask, torch.ones_like(mask[:1])])  # over each fold's rows and, last, over all
    squares = A.new_zeros(len(sums), d)
    for first in range(0, n, 512):  # in blocks: no second copy of X
        rows = slice(first, first + 512)
        squares += sums[:, rows] @ A[rows].square()
    if not bool(torch.isfinite(squares).all()):
        bad = np.flatnonzero(~np.isfinite(X).all(axis=1))
        fault = f"{len(bad)} rows with NaN or infinity (first: row {bad[0]})" if len(bad) else "values beyond 1e18"
        raise UserError(f"the embeddings have {fault}; a probe needs finite numbers. Extract these rows again.")
    scale = (squares[-1] / n).sqrt()
    scale[scale == 0] = 1
    A /= scale

    mean = mask @ A / size
    mean_square = squares[:-1] / size / scale**2
    variance = mean_square - mean**2
    # The difference of two float32 sums is poor where a fold's mean is far from that of all rows: redo those features.
    for f in range(len(mask)):
        j = torch.nonzero(variance[f] < 0.5 * mean_square[f])[:, 0]
        if len(j):
            values = A[:, j][mask[f] > 0].double()
            constant = (values == values[0]).all(dim=0)
            variance[f, j] = torch.where(constant, 0.0, values.var(dim=0, correction=0)).float()
    inv_std = inverse_std(variance, centre=centre, scale=scale, dtype=X.dtype)

    weight = mask * class_weights(y, masks, n_classes).to(A)[:, torch.from_numpy(y.astype(np.int64)).to(device)]
    fast = A.bfloat16() if has_bf16(device) else A
    return Standardised(A, fast, centre, scale, mean, inv_std, weight, targets(y, target, n_classes).to(device))


def inverse_std(variance: Tensor, *, centre: Tensor, scale: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """Compute inverse standard deviations of the folds' training rows; 0 for a feature that counts as constant there.

    It does if its deviation is at most half a unit in the last place of its own size, which is the root mean square
    over all rows. So much is a constant moved by rounding to the type that the embeddings were given in, and more than
    the arithmetic here adds. Divided by that, what is rounding in training would outweigh all else in a row where the
    feature varies. Other features do not matter: one in other units than the rest drops nothing.

    Args:
        variance: (F, d) in units of `scale`.
        centre, scale: (d,) mean and standard deviation of all rows; a scale of 1 where that is 0.
        dtype: of the embeddings as they were given; rounding is at least that of float32.

    Returns:
        (F, d) in units of 1 / `scale`.
    """
    rounding = 0.5 * max(np.finfo(dtype).eps, np.finfo(np.float32).eps)
    std = variance.clamp_min(0).sqrt() * scale
    constant = std <= float(rounding) * torch.hypot(centre, scale)
    return torch.where(constant, torch.inf, variance).rsqrt()


@dataclass(frozen=True, eq=False)
class Curvature:
    """What the preconditioner knows of the Hessian without penalty, at zero."""

    intercept: float  # second derivative by the intercept
    eigenvalues: Tensor  # (r,) of that by the coefficients, ascending
    eigenvectors: Tensor  # (r, d)


def leading_curvature(data: Standardised) -> Curvature:
    """Find the leading eigenvalues and eigenvectors of the Hessian at zero, h X^T diag(weight) X.

    The method is subspace iteration. h is the second derivative of a row's loss by a logit there: 1/4 for two classes.
    For c classes it is a matrix, I / c - 1 / c^2, and on vectors that sum to zero it multiplies by 1 / c.

    Weights are the folds' average; a tall X is thinned to evenly spaced rows, as a preconditioner need not be exact.
    """
    (n, d), q = data.X.shape, len(data.target)
    h = 1 / 4 if q == 1 else 1 / q
    thin = slice(None, None, max(1, n // SKETCH_ROWS))
    X, weight = data.fast[thin], data.weight.mean(dim=0)[thin]
    weight = weight / weight.sum()

    def multiply(V: Tensor) -> Tensor:  # (l, d) -> (l, d)
        return (((V.to(X.dtype) @ X.T) * weight).to(X.dtype) @ X).float()

    size = min(RANK + OVERSAMPLE, n, d)
    # Rows of X are random vectors already filtered by the square root of the covariance: half an iteration saved.
    V = data.X[torch.linspace(0, n - 1, size, device=data.X.device).long()]
    for _ in range(2):
        V = torch.linalg.qr(V.T).Q.T.contiguous()
        V, basis = multiply(V), V
    eigenvalues, rotation = torch.linalg.eigh((V @ basis.T + basis @ V.T) / 2)  # Rayleigh and Ritz
    kept = min(RANK, size)
    return Curvature(h, eigenvalues[-kept:].clamp_min(0) * h, rotation.T[-kept:] @ basis)


@dataclass(eq=False)
class Columns:
    """The columns still being solved, one per row of every tensor, at the point `theta`."""

    ridge: Tensor  # (K, 1, 1) 1 / (C n_f)
    mean: Tensor  # (K, 1, d)
    inv_std: Tensor  # (K, 1, d)
    weight: Tensor  # (K, 1, n)
    theta: Tensor  # (K, q, d + 1) standardised coefficients, then the intercept
    logits: Tensor  # (K, q, n)
    probability: Tensor  # (K, q, n) of the logits
    residual: Tensor  # (K, q, n) weight * (probability - target): the loss's first derivative by the logits
    gradient: Tensor  # (K, q, d + 1)

    def keep(self, rows: Tensor | slice) -> Columns:
        """Select columns: copies where they are numbered or masked, views where they are a slice."""
        return Columns(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


# ---------------------------------------------------------------------------- what two classes do otherwise than more


def probabilities(logits: Tensor) -> Tensor:
    """Compute the probabilities (K, q, n) of logits: sigmoid of the one that two classes have, softmax over more."""
    return torch.sigmoid(logits) if logits.shape[1] == 1 else torch.softmax(logits, dim=1)


def _second_derivative(weight: Tensor, p: Tensor, shift: Tensor) -> Tensor:
    """Compute the second derivative (K,) of the loss along logits + t * shift, where probabilities are p (K, q, n).

    It is a row's variance of `shift` under its probabilities, weighed; taken about the mean, so that it is never
    negative.
    """
    if p.shape[1] == 1:
        return dot(weight * (p - p * p), shift * shift)
    centred = shift - (p * shift).sum(dim=1, keepdim=True)
    return dot(weight, centred.square_().mul_(p).sum(dim=1, keepdim=True))


def _summing_to_zero(gradient: Tensor) -> Tensor:
    """Take from a gradient (K, q, d + 1) its mean over the c vectors of many classes, which is 0 but for rounding.

    Left in, it would drive the vectors' sum away from zero, where nothing but the penalty brings it back.
    """
    return gradient if gradient.shape[1] == 1 else gradient - gradient.mean(dim=1, keepdim=True)


def over_class_0(values: Tensor) -> Tensor:
    """Subtract class 0's values from the other classes': (K, q, m) -> (K, c - 1, m). Two classes' are that already."""
    return values if values.shape[1] == 1 else values[:, 1:] - values[:, :1]


# ---------------------------------------------------------------------------------------------------------- the descent


def _times(X: Tensor, mean: Tensor, inv_std: Tensor, step: Tensor) -> Tensor:
    """Compute the logits (K, q, n) of coefficients and intercepts (K, q, d + 1), in the precision of X."""
    W = (step[..., :-1] * inv_std).to(X.dtype)
    offset = step[..., -1:] - (W.float() * mean).sum(dim=2, keepdim=True)
    return (W.flatten(0, 1) @ X.T).float().view(*W.shape[:2], len(X)).add_(offset)


def _transposed_times(X: Tensor, mean: Tensor, inv_std: Tensor, residual: Tensor) -> Tensor:
    """Convert derivatives by the logits (K, q, n) into derivatives (K, q, d + 1) by coefficients and intercepts."""
    total = residual.sum(dim=2, keepdim=True)
    product = (residual.flatten(0, 1).to(X.dtype) @ X).float().view(*residual.shape[:2], X.shape[1])
    return _summing_to_zero(torch.cat([(product - total * mean) * inv_std, total], dim=2))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute the inner product (K,) of each column's numbers in a and b (K, ...)."""
    return (a * b).flatten(1).sum(dim=1)


def _penalty(ridge: Tensor, theta: Tensor) -> Tensor:
    """Compute the gradient of the penalty; the intercept has none."""
    gradient = ridge * theta
    gradient[..., -1] = 0
    return gradient


def evaluate(data: Standardised, fold: Tensor, ridge: Tensor, theta: Tensor) -> Columns:
    """Compute logits, residuals and gradients at theta (K, q, d + 1) in float32."""
    mean, inv_std = data.mean[fold][:, None], data.inv_std[fold][:, None]
    c = columns_at(data, fold, ridge, theta, logits=_times(data.X, mean, inv_std, theta), gradient=theta)
    c.gradient = _transposed_times(data.X, mean, inv_std, c.residual) + _penalty(ridge, theta)
    return c


def columns_at(
    data: Standardised, fold: Tensor, ridge: Tensor, theta: Tensor, *, logits: Tensor, gradient: Tensor
) -> Columns:
    """Build columns at theta (K, q, d + 1) from the logits (K, q, n) and gradients (K, q, d + 1) there."""
    mean, inv_std, weight = data.mean[fold][:, None], data.inv_std[fold][:, None], data.weight[fold][:, None]
    p = probabilities(logits)
    return Columns(ridge, mean, inv_std, weight, theta, logits, p, weight * (p - data.target), gradient)


def descend(
    data: Standardised, X: Tensor, basis: Curvature, columns: Columns, *, goal: Tensor, budget: Tensor
) -> tuple[Tensor, Tensor]:
    """Run preconditioned conjugate gradients until each column's gradient (largest component) is at its goal.

    The numbers in `columns` are worked on in place.

    Returns:
        theta (K, q, d + 1) and the steps taken (K,), of all columns given.
    """
    theta, steps = columns.theta.clone(), torch.zeros_like(budget)
    row = torch.arange(len(theta), device=theta.device)
    c = columns
    direction = change = torch.zeros_like(theta)
    while len(row):
        preconditioned = _precondition(basis, c.ridge, c.gradient)
        # Never negative, and 0 where it is 0 / 0: in the first step.
        beta = torch.nan_to_num(dot(preconditioned, change) / dot(direction, change), 0.0, 0.0, 0.0).clamp_min(0)
        direction = beta[:, None, None] * direction - preconditioned
        slope = dot(c.gradient, direction)
        uphill = slope > 0
        if uphill.any():
            direction[uphill] = -preconditioned[uphill]
            slope = dot(c.gradient, direction)

        shift = _times(X, c.mean, c.inv_std, direction)
        penalty = _penalty(c.ridge, direction)
        stiffening = dot(direction, penalty)
        t = torch.empty_like(slope)
        for at in _blocks(c.logits):
            t[at] = _line_search(c.keep(at), data.target, shift[at], slope=slope[at], stiffening=stiffening[at])
        t = t[:, None, None]
        change = _transposed_times(X, c.mean, c.inv_std, shift) + t * penalty  # of the gradient
        c.theta = torch.addcmul(c.theta, t, direction)
        c.gradient = c.gradient + change

        steps[row] += 1
        left = (c.gradient.abs().amax(dim=(1, 2)) > goal) & (steps[row] < budget[row])
        if not left.all():
            theta[row] = c.theta
            row, goal, direction, change, c = row[left], goal[left], direction[left], change[left], c.keep(left)
    return theta, steps


def _precondition(basis: Curvature, ridge: Tensor, gradient: Tensor) -> Tensor:
    """Multiply the gradient (K, q, d + 1) by an approximate inverse Hessian, made of the leading curvature."""
    outside = 1 / (basis.eigenvalues[0] + ridge)  # (K, 1, 1)
    inside = 1 / (basis.eigenvalues + ridge)  # (K, 1, r)
    by_coef, by_intercept = gradient[..., :-1], gradient[..., -1:]
    coordinates = (inside - outside) * (by_coef @ basis.eigenvectors.T)
    return torch.cat([outside * by_coef + coordinates @ basis.eigenvectors, by_intercept / basis.intercept], dim=2)


def _blocks(logits: Tensor) -> list[slice]:
    """Cut columns (K, q, n) into even runs of about `BLOCK` logits, of two columns at least.

    Not on a GPU; and not where a column has one vector, q = 1: its arrays are small, and where a run ends decides how
    torch rounds the last numbers.
    """
    K, q, n = logits.shape
    n_blocks = 1 if logits.is_cuda or q == 1 else max(1, K // max(2, BLOCK // (q * n)))
    return [slice(K * i // n_blocks, K * (i + 1) // n_blocks) for i in range(n_blocks)]


def _line_search(c: Columns, target: Tensor, shift: Tensor, *, slope: Tensor, stiffening: Tensor) -> Tensor:
    """Move columns to their minimum along logits + t * shift, by Newton's method kept inside a bracket.

    The slope at t is taken as the slope at 0 plus changes, so that it agrees with the incremental gradient. A step is
    accepted where |slope| has fallen to a quarter: it then meets the approximate Wolfe conditions (Hager & Zhang 2005),
    which, unlike a comparison of losses, work at the rounding level of the loss.

    Logits, probabilities and residuals are overwritten by those at the minimum, `shift` by the change of the residuals:
    copies would take longer than the arithmetic.

    Returns:
        t (K,).
    """
    following = -slope / (_second_derivative(c.weight, c.probability, shift) + stiffening)
    low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    for _ in range(40):  # two are usual; a bracket that halves 40 times is as narrow as float32 can tell
        t = following
        logits = torch.addcmul(c.logits, t[:, None, None], shift)
        p = probabilities(logits)
        residual = (p - target).mul_(c.weight)
        change = residual - c.residual
        now = slope + dot(change, shift) + t * stiffening
        far = now.abs() > SLOPE * slope.abs()
        if not far.any():
            break
        low, high = torch.where(now < 0, t, low), torch.where(now < 0, high, t)
        newton = t - now / (_second_derivative(c.weight, p, shift) + stiffening)
        halved = torch.where(high.isinf(), 2 * t, (low + high) / 2)
        following = torch.where(far, torch.where((newton > low) & (newton < high), newton, halved), t)
    for held, new in ((c.logits, logits), (c.probability, p), (c.residual, residual), (shift, change)):
        held.copy_(new)
    return t
