"""How are all folds and all strengths of a linear probe fitted at once?

The problem. Fold f trains on the n_f rows of its mask m_f in {0, 1}^n; a strength C weighs data against penalty. Column
(f, C) minimises the class-balanced, L2-penalised mean logistic loss

    L(b, b0) = sum_i w_fi log(1 + exp(-s_i z_i)) + |b|^2 / (2 C n_f),    z_i = b . (x_i - mu_f) / sigma_f + b0,

with labels s_i = +-1, weights w_fi = m_fi / (2 n_f,class(i)) that sum to 1, mean mu_f and standard deviation sigma_f of
the fold's *own* training rows, and a free intercept b0. It is the objective of scikit-learn's `StandardScaler` followed
by `LogisticRegression(C=C, class_weight="balanced")` on the fold's rows, divided by n_f, and has one optimum.

One matrix. X is never copied per fold: sigma_f divides the coefficients, mu_f moves the intercept, w_f weighs the
residuals. Every column is one row of a matrix, and two products with X serve all of them:

    logits  Z = W X^T  (columns, n),      gradient  G = R X  (columns, d)  with residuals  R = w (sigmoid(Z) - y).

The method is the preconditioned nonlinear conjugate gradient of Hestenes & Stiefel (1952; Nocedal & Wright 2006,
ch. 5), in which every column takes its own steps. Four ideas make it fast:

1. A line search without products. Along a direction P the logits are Z + t (P X^T): once P X^T is known, the minimum
   over t is a safeguarded Newton iteration on n numbers.
2. One preconditioner for all columns. The Hessian is X^T diag(w p (1 - p)) X + I / (C n_f). Folds and strengths share
   the leading eigenvectors of X^T diag(w) X, and where predictions are confident, p (1 - p) shrinks everywhere by much
   the same factor, to which conjugate gradients are blind: 1/4 stands for it. Subspace iteration finds the eigenvectors
   (Halko, Martinsson & Tropp 2011); inverting "eigenvalue / 4 plus penalty" in their basis is the preconditioner of
   Frangella, Tropp & Udell (2023).
3. bfloat16 products, float32 truth. Inside a descent the products only ever see *changes* of coefficients and
   residuals, so their rounding is relative to what changes. After a hundredfold fall of the gradient, logits and
   gradient are recomputed in float32 and the descent restarts from there (iterative refinement, Wilkinson 1963).
   Convergence is declared on a float32 gradient alone.
4. A column leaves the batch as soon as it has converged.

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
FLOOR = 1e-8  # where the gradient of a mean loss is rounding in float32: no descent aims lower


@dataclass(frozen=True, eq=False)
class Fits:
    """The solution of every fold x strength, in the original feature space: logit = x @ coef + intercept.

    Attributes:
        coef: (F, S, d) float32.
        intercept: (F, S) float64.
        logits: (n, F, S) float32; of *every* row given, so a fold's held-out rows are its predictions.
        gradient_norm: (F, S) float64; largest absolute derivative of the mean loss in the fold's standardised space,
            intercept included: the quantity that scikit-learn's lbfgs compares with `tol`.
        n_iter: (F, S) int64; conjugate-gradient steps.
        converged: (F, S) bool; gradient_norm <= tol.
        n_dropped: (F,) int64; features that count as constant on the fold's training rows (`inverse_std`), and have a
            coefficient of 0.
    """

    coef: NDArray[np.float32]
    intercept: NDArray[np.float64]
    logits: NDArray[np.float32]
    gradient_norm: NDArray[np.float64]
    n_iter: NDArray[np.int64]
    converged: NDArray[np.bool_]
    n_dropped: NDArray[np.int64]


@full_float32()
def fit_logistic(
    X: NDArray[np.floating],
    y: NDArray[np.integer],
    *,
    masks: NDArray[np.bool_],
    strengths: Sequence[float] | NDArray[np.floating],
    tol: float = 1e-6,
    max_iter: int = 1000,
    device: str = "cpu",
) -> Fits:
    """Fit every fold x strength of a class-balanced, L2-penalised logistic regression as one batched problem.

    Args:
        X: (n, d) float16 or float32 embeddings.
        y: (n,) 0 or 1.
        masks: (F, n) bool; row f is True on the training rows of fold f.
        strengths: (S,) inverse penalties C > 0, in scikit-learn's sense.
        tol: largest gradient component of the mean loss accepted as converged. float32 carries it down to about 1e-7.
        max_iter: steps after which a column is given back as it is, with `converged` False.
        device: where to compute, as torch names it.

    Raises:
        UserError: shapes that do not match, NaN or infinite embeddings, labels other than 0 and 1, a strength that is
            not positive, or a fold whose training rows have one class only.
    """
    C = np.asarray(strengths, dtype=np.float64)
    check(X.shape, y, masks=masks, strengths=C)
    F, S, (n, d) = len(masks), len(C), X.shape
    data = _prepare(X, y, masks=masks, device=torch.device(device))
    basis = leading_curvature(data)

    # Column k = f * S + s. All start at zero, where a fold's strengths do not differ yet: F evaluations are enough.
    fold = torch.arange(F, device=data.X.device).repeat_interleave(S)
    ridge = torch.from_numpy(1 / (masks.sum(axis=1)[:, None] * C)).to(data.X).reshape(-1, 1)  # (K, 1): 1 / (C n_f)
    start = evaluate(data, torch.arange(F, device=fold.device), ridge[::S], data.X.new_zeros(F, d + 1))
    columns = start.keep(fold)
    columns.ridge = ridge

    theta = data.X.new_zeros(F * S, d + 1)  # standardised coefficients and, last, the intercept
    logits = data.X.new_zeros(F * S, n)
    norm = torch.full((F * S,), torch.inf, device=fold.device)
    n_iter = torch.zeros(F * S, dtype=torch.int64, device=fold.device)
    unfinished = torch.arange(F * S, device=fold.device)
    factor = data.fast  # the X that the descents multiply with
    while True:
        previous, now = norm[unfinished], columns.gradient.abs().amax(dim=1)
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
        target = (now * (0 if factor is data.X else REFINEMENT)).clamp_min(max(0.5 * tol, FLOOR))
        budget = max_iter - n_iter[unfinished]
        theta_reached, steps = descend(data, factor, basis, columns, target=target, budget=budget)
        n_iter[unfinished] += steps
        columns = evaluate(data, fold[unfinished], columns.ridge, theta_reached)

    return in_original_units(data, fold, theta, logits=logits, norm=norm, n_iter=n_iter, tol=tol)


def in_original_units(
    data: Standardised, fold: Tensor, theta: Tensor, *, logits: Tensor, norm: Tensor, n_iter: Tensor, tol: float
) -> Fits:
    """Convert solutions theta (F * S, d + 1) in the folds' standardised spaces into `Fits` of the features as given."""
    F, d = data.mean.shape
    coef = theta[:, :d] * data.inv_std[fold] / data.scale
    # float64: with embeddings far off centre the intercept is a small difference of large sums.
    origin = (data.centre.double() + data.mean.double() * data.scale)[fold]  # (K, d): the fold's mean, as given
    intercept = theta[:, d] - dot(coef.double(), origin)
    gradient_norm = norm.double().cpu().numpy().reshape(F, -1)
    return Fits(
        coef=coef.cpu().numpy().reshape(F, -1, d),
        intercept=intercept.cpu().numpy().reshape(F, -1),
        logits=logits.cpu().numpy().reshape(F, -1, logits.shape[1]).transpose(2, 0, 1),
        gradient_norm=gradient_norm,
        n_iter=n_iter.cpu().numpy().reshape(F, -1),
        converged=gradient_norm <= tol,
        n_dropped=(data.inv_std == 0).sum(dim=1).cpu().numpy(),
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
    shape: tuple[int, ...], y: NDArray[np.integer], *, masks: NDArray[np.bool_], strengths: NDArray[np.float64]
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
    if not np.isin(y, (0, 1)).all():
        raise UserError(f"labels must be 0 or 1 (1 = the positive class); found {np.unique(y).tolist()[:5]}.")
    if not (np.isfinite(strengths) & (strengths > 0)).all():
        raise UserError(f"every strength C must be positive and finite; found {strengths.tolist()}.")
    for f, mask in enumerate(masks):
        classes = np.unique(y[mask])
        if len(classes) < 2:
            content = f"only class {classes[0]}" if len(classes) else "no rows"
            raise UserError(
                f"fold {f}: its {mask.sum()} training rows hold {content}, and a probe needs both classes. "
                "Use fewer folds, or stratify them by class."
            )


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
    label: Tensor  # (n,) 0.0 or 1.0


def _prepare(
    X: NDArray[np.floating], y: NDArray[np.integer], *, masks: NDArray[np.bool_], device: torch.device
) -> Standardised:
    n, d = X.shape
    A = torch.from_numpy(X.astype(np.float32)).to(device)  # a copy, to be standardised in place
    label = torch.from_numpy(y.astype(np.float32)).to(device)
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

    positives = mask @ label[:, None]  # (F, 1)
    weight = mask * torch.where(label > 0, 0.5 / positives, 0.5 / (size - positives))
    fast = A.bfloat16() if has_bf16(device) else A
    return Standardised(A, fast, centre, scale, mean, inv_std, weight, label)


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


def leading_curvature(data: Standardised) -> tuple[Tensor, Tensor]:
    """Find the leading eigenvalues (r,), ascending, and eigenvectors (r, d) of X^T diag(weight) X / 4.

    The method is subspace iteration.

    Weights are the folds' average; a tall X is thinned to evenly spaced rows, as a preconditioner need not be exact.
    """
    n, d = data.X.shape
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
    return eigenvalues[-kept:].clamp_min(0) / 4, rotation.T[-kept:] @ basis


@dataclass(eq=False)
class Columns:
    """The columns still being solved, one per row of every tensor, at the point `theta`."""

    ridge: Tensor  # (K, 1) 1 / (C n_f)
    mean: Tensor  # (K, d)
    inv_std: Tensor  # (K, d)
    weight: Tensor  # (K, n)
    theta: Tensor  # (K, d + 1) standardised coefficients, then the intercept
    logits: Tensor  # (K, n)
    residual: Tensor  # (K, n) weight * (p - y): the loss's first derivative by the logits
    curvature: Tensor  # (K, n) weight * p (1 - p): the second
    gradient: Tensor  # (K, d + 1)

    def keep(self, rows: Tensor) -> Columns:
        return Columns(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _times(X: Tensor, mean: Tensor, inv_std: Tensor, step: Tensor) -> Tensor:
    """Compute the logits (K, n) of coefficients and intercepts (K, d + 1), in the precision of X."""
    W = (step[:, :-1] * inv_std).to(X.dtype)
    offset = step[:, -1] - dot(W.float(), mean)
    return (W @ X.T).float() + offset[:, None]


def _transposed_times(X: Tensor, mean: Tensor, inv_std: Tensor, residual: Tensor) -> Tensor:
    """Convert derivatives by the logits (K, n) into derivatives (K, d + 1) by coefficients and intercept."""
    total = residual.sum(dim=1, keepdim=True)
    product = (residual.to(X.dtype) @ X).float()
    return torch.cat([(product - total * mean) * inv_std, total], dim=1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1)


def _penalty(ridge: Tensor, theta: Tensor) -> Tensor:
    """Compute the gradient of the penalty; the intercept has none."""
    gradient = ridge * theta
    gradient[:, -1] = 0
    return gradient


def _derivatives(weight: Tensor, label: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the first and second derivative of the weighted logistic loss by the logits, each (K, n)."""
    p = torch.sigmoid(logits)
    residual = weight * (p - label)
    curvature = weight * (p - p * p)
    return residual, curvature


def evaluate(data: Standardised, fold: Tensor, ridge: Tensor, theta: Tensor) -> Columns:
    """Compute logits, residuals and gradients at theta (K, d + 1) in float32."""
    mean, inv_std, weight = data.mean[fold], data.inv_std[fold], data.weight[fold]
    logits = _times(data.X, mean, inv_std, theta)
    residual, curvature = _derivatives(weight, data.label, logits)
    gradient = _transposed_times(data.X, mean, inv_std, residual) + _penalty(ridge, theta)
    return Columns(ridge, mean, inv_std, weight, theta, logits, residual, curvature, gradient)


def descend(
    data: Standardised, X: Tensor, basis: tuple[Tensor, Tensor], columns: Columns, *, target: Tensor, budget: Tensor
) -> tuple[Tensor, Tensor]:
    """Run preconditioned conjugate gradients until each column's gradient (largest component) is at its target.

    Returns:
        theta (K, d + 1) and the steps taken (K,), of all columns given.
    """
    theta, steps = columns.theta.clone(), torch.zeros_like(budget)
    row = torch.arange(len(theta), device=theta.device)
    c = columns
    direction = change = torch.zeros_like(theta)
    while len(row):
        preconditioned = _precondition(basis, c.ridge, c.gradient)
        # Never negative, and 0 where it is 0 / 0: in the first step.
        beta = torch.nan_to_num(dot(preconditioned, change) / dot(direction, change), 0.0, 0.0, 0.0).clamp_min(0)
        direction = beta[:, None] * direction - preconditioned
        slope = dot(c.gradient, direction)
        uphill = slope > 0
        if uphill.any():
            direction[uphill] = -preconditioned[uphill]
            slope = dot(c.gradient, direction)

        shift = _times(X, c.mean, c.inv_std, direction)
        penalty = _penalty(c.ridge, direction)
        t, residual, c.curvature = _line_search(c, data.label, shift, slope=slope, stiffening=dot(direction, penalty))
        change = _transposed_times(X, c.mean, c.inv_std, residual - c.residual) + t * penalty
        c.residual = residual
        c.logits = torch.addcmul(c.logits, t, shift)
        c.theta = torch.addcmul(c.theta, t, direction)
        c.gradient = c.gradient + change

        steps[row] += 1
        left = (c.gradient.abs().amax(dim=1) > target) & (steps[row] < budget[row])
        if not left.all():
            theta[row] = c.theta
            row, target, direction, change, c = row[left], target[left], direction[left], change[left], c.keep(left)
    return theta, steps


def _precondition(basis: tuple[Tensor, Tensor], ridge: Tensor, gradient: Tensor) -> Tensor:
    """Multiply the gradient (K, d + 1) by an approximate inverse Hessian, made of the leading curvature."""
    curvature, eigenvectors = basis  # (r,), (r, d)
    outside = 1 / (curvature[0] + ridge)  # (K, 1)
    inside = 1 / (curvature + ridge)  # (K, r)
    by_coef, by_intercept = gradient[:, :-1], gradient[:, -1:]
    coordinates = (inside - outside) * (by_coef @ eigenvectors.T)
    return torch.cat([outside * by_coef + coordinates @ eigenvectors, 4 * by_intercept], dim=1)


def _line_search(
    c: Columns, label: Tensor, shift: Tensor, *, slope: Tensor, stiffening: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find each column's minimum along logits + t * shift, by Newton's method kept inside a bracket.

    The slope at t is taken as the slope at 0 plus changes, so that it agrees with the incremental gradient. A step is
    accepted where |slope| has fallen to a quarter: it then meets the approximate Wolfe conditions (Hager & Zhang 2005),
    which, unlike a comparison of losses, work at the rounding level of the loss.

    Returns:
        t (K, 1), and the residual and curvature (K, n) there.
    """
    squared = shift * shift
    following = -slope / (dot(c.curvature, squared) + stiffening)
    low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    for _ in range(40):  # two are usual; a bracket that halves 40 times is as narrow as float32 can tell
        t = following
        residual, curvature = _derivatives(c.weight, label, torch.addcmul(c.logits, t[:, None], shift))
        now = slope + dot(residual - c.residual, shift) + t * stiffening
        far = now.abs() > SLOPE * slope.abs()
        if not far.any():
            break
        low, high = torch.where(now < 0, t, low), torch.where(now < 0, high, t)
        newton = t - now / (dot(curvature, squared) + stiffening)
        halved = torch.where(high.isinf(), 2 * t, (low + high) / 2)
        following = torch.where(far, torch.where((newton > low) & (newton < high), newton, halved), t)
    return t[:, None], residual, curvature
