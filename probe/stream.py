"""How are all folds and strengths solved where the rows do not fit into memory?

The problem and its optimum are those of `probe.logistic`. The rows stay in the store and are read in blocks. The
conjugate gradients of `probe.logistic` would read all rows twice in every step, forty times over, and keep n numbers
per column in between. Here a step reads all rows once, and about nine steps are enough:

1. A sample stands for all rows. Where rows are many and features few, the loss over some ten thousand rows curves
   nearly as the loss over all rows does. So `logistic.descend` runs on the sample, in memory, but with the gradient
   over *all* rows at its start: from theta_0, it minimises

       loss_sample(theta) + (gradient_all(theta_0) - gradient_sample(theta_0)) . theta,

   whose minimum is theta_0 only if theta_0 is the optimum over all rows (DANE: Shamir, Srebro & Zhang 2014;
   statistical preconditioning: Hendrikx et al. 2020). The sample decides how many steps are needed, not where they end.
2. The last steps correct what the sample gets wrong of the curvature, as in L-BFGS (Nocedal & Wright 2006, ch. 7): the
   descent on the sample takes the place of the scaled identity. This halves the number of steps.
3. The sample holds equally many rows of every class, as the loss weighs the classes equally. It prefers rows far from
   the mean, because a rare kind of row bends the loss more than its number says. Weights undo both preferences.
4. Most fits are made only to choose a strength by them. As soon as one cannot be chosen any more, its fits are given
   up, and once a fold's choice is made so are the fits that made it (`still_needed`).
5. A step that ends uphill, as steeply as it began downhill, is taken back and tried again, shorter.
   Convergence is declared only on the float32 gradient over all rows, summed in float64.

Measured choices and figures: docs/decisions/solver.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.blocks import Embeddings
from features.console import UserError, progress
from features.device import full_float32, has_bf16
from probe.logistic import (
    FLOOR,
    Columns,
    Curvature,
    Fits,
    Standardised,
    check,
    class_weights,
    columns_at,
    descend,
    dot,
    evaluate,
    in_original_units,
    inverse_std,
    leading_curvature,
    over_class_0,
    probabilities,
    ridges,
    targets,
)

BUDGET = 4 * 2**30  # bytes that a solve may take
ROWS_PER_FEATURE = 40  # of the sample: with half as many it takes half as many passes again
FIRST_ROWS = 8192  # enough for a centre and a scale to start from
PIECE = 512  # rows multiplied at a time on a processor: 3 MB in float32, which stay in its cache
START = 1e-2  # gradient to which the sample alone is solved first: its optimum is no nearer to that of all rows
FALL = 0.1  # of the gradient in one descent on the sample, which resembles all rows no better than that
MEMORY = 5  # steps whose change of the gradient is remembered
TOO_FAR = 0.9  # of its initial slope: a step that ends uphill more steeply than this has gained nothing
MAX_PASSES = 60  # after which a column is given back as it is
MAX_STEPS = 500  # of one descent on the sample


def bytes_per_row(d: int, n_columns: int, *, n_classes: int = 2) -> int:
    """Count the bytes that `fit_logistic` holds per row: embeddings in three types, and thirty numbers per vector."""
    return 8 * d + 120 * n_columns * (1 if n_classes == 2 else n_classes)


def fits_in_memory(shape: tuple[int, int], n_columns: int, *, n_classes: int = 2) -> bool:
    """Say whether `fit_logistic` of (n, d) float16 embeddings stays within `BUDGET`."""
    return shape[0] * bytes_per_row(shape[1], n_columns, n_classes=n_classes) <= BUDGET


@full_float32()
def fit_streamed(
    X: Embeddings,
    y: NDArray[np.integer],
    *,
    masks: NDArray[np.bool_],
    strengths: Sequence[float] | NDArray[np.floating],
    n_classes: int = 2,
    target: NDArray[np.floating] | None = None,
    tol: float = 1e-6,
    device: str = "cpu",
    sample: int | None = None,
    still_needed: Callable[[NDArray[np.float32]], NDArray[np.bool_]] | None = None,
) -> Fits:
    """Fit as `fit_logistic` does, with the embeddings left in the store; memory holds a sample of rows, and the logits.

    Args:
        X: (n, d), in ascending order of rows.
        y, masks, strengths, n_classes, target, tol, device: as for `fit_logistic`.
        sample: how many rows stand in for all; by default `ROWS_PER_FEATURE` per feature, in half of `BUDGET`.
        still_needed: from the logits (n, F, S, c - 1) after a pass, of every fit at the last point tried, says which
            fits (F, S) are still needed. The others are given up as they are.

    Raises:
        UserError: as `fit_logistic`; or if a checksum of the store fails.
    """
    C = np.asarray(strengths, dtype=np.float64)
    check(X.shape, y, masks=masks, strengths=C, n_classes=n_classes, target=target)
    F, S, (n, d) = len(masks), len(C), X.shape
    size = sample or min(ROWS_PER_FEATURE * d, BUDGET // 2 // bytes_per_row(d, F * S, n_classes=n_classes))
    with progress("probe", F * S, unit="fits") as advance:
        rows, data, chosen = _sampled(
            _rows(X, y, masks=masks, n_classes=n_classes, target=target, device=torch.device(device)), size=size
        )
        q = len(rows.target)
        basis = leading_curvature(data)
        # Column k = f * S + s. All start at zero.
        fold = torch.arange(F, device=rows.device).repeat_interleave(S)
        ridge = ridges(masks, C).to(data.X)
        columns = evaluate(data, fold, ridge, data.X.new_zeros(F * S, q, d + 1))
        step, n_iter = descend(
            data,
            data.fast,
            basis,
            columns,
            goal=torch.full((F * S,), max(START, tol), device=rows.device),
            budget=torch.full((F * S,), MAX_STEPS, device=rows.device),
        )

        logits = torch.empty(F * S, q, n)  # off the device: with the labels, all here that grows with n
        theta, gradient = torch.zeros_like(step), torch.zeros_like(step)  # the point reached, and the gradient there
        norm = torch.full((F * S,), torch.inf, device=rows.device)
        unfinished = torch.arange(F * S, device=rows.device)
        given_up = torch.zeros(F * S, dtype=torch.bool, device=rows.device)
        pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
        for k in range(MAX_PASSES):
            u = unfinished
            ahead = _gradient(rows, data, fold[u], ridge[u], theta[u] + step[u], logits, u)
            slope, slope_ahead = dot(gradient[u], step[u]), dot(ahead, step[u])
            taken = slope_ahead <= TOO_FAR * slope.abs() if k else torch.ones_like(slope, dtype=torch.bool)
            # Shorten a step that went too far to where the slope, taken as linear, is zero.
            step[u[~taken]] *= (slope / (slope - slope_ahead)).clamp(0.1, 0.9)[~taken, None, None]
            u = u[taken]
            if k:
                pairs.append(_pair(u, step[u], ahead[taken] - gradient[u], like=theta))
            theta[u] += step[u]
            gradient[u] = ahead[taken]
            norm[u] = gradient[u].abs().amax(dim=(1, 2))
            if still_needed is not None:
                needed = still_needed(over_class_0(logits).view(F, S, -1, n).permute(3, 0, 1, 2).numpy())
                given_up |= (norm > tol) & ~torch.from_numpy(needed).to(rows.device).flatten()
            going_on = (norm > tol) & ~given_up
            advance(
                len(unfinished) - int(going_on.sum()),
                note=f"{k + 1} passes, gradient {float(norm[~given_up].max()):.0e}",
            )
            unfinished = torch.nonzero(going_on)[:, 0]
            if not len(unfinished):
                break
            u = u[going_on[u]]
            # The sample's logits at theta are among those of all rows.
            held = logits[u.cpu()[:, None, None], torch.arange(q)[:, None], chosen].to(rows.device)
            columns = columns_at(data, fold[u], ridge[u], theta[u], logits=held, gradient=gradient[u])
            step[u], steps = _direction(
                data, basis, columns, [tuple(part[u] for part in pair) for pair in pairs], tol=tol
            )
            n_iter[u] += steps
        if len(unfinished):  # not converged: `logits` holds those of the last trial, not of theta
            u = unfinished
            _gradient(rows, data, fold[u], ridge[u], theta[u], logits, u)
    return in_original_units(data, fold, theta, logits=logits, norm=norm, n_iter=n_iter, tol=tol, given_up=given_up)


def _pair(which: Tensor, step: Tensor, change: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spread a step of some columns, and the change of their gradients by it, (k, q, d + 1) each, over all columns.

    Returns:
        The step and the change (K, q, d + 1), and the inverse of their product (K, 1, 1); 0 for columns not in `which`.
    """
    product = dot(step, change)[:, None, None]  # positive, as the loss is convex, but for rounding
    steps, changes, scale = torch.zeros_like(like), torch.zeros_like(like), torch.zeros_like(like[:, :1, :1])
    steps[which], changes[which], scale[which] = step, change, torch.where(product > 0, 1 / product, 0)
    return steps, changes, scale


def _direction(
    data: Standardised,
    basis: Curvature,
    columns: Columns,
    pairs: Sequence[tuple[Tensor, ...]],
    *,
    tol: float,
) -> tuple[Tensor, Tensor]:
    """Compute the L-BFGS direction (K, q, d + 1), a descent on the sample in place of a Hessian; and its steps (K,)."""
    shares = []
    columns.gradient = columns.gradient.clone()
    for taken, change, scale in reversed(pairs):
        shares.append(scale * dot(taken, columns.gradient)[:, None, None])
        columns.gradient -= shares[-1] * change
    goal = (FALL * columns.gradient.abs().amax(dim=(1, 2))).clamp_min(max(0.1 * tol, FLOOR))
    start, budget = columns.theta, torch.full((len(goal),), MAX_STEPS, device=goal.device)
    reached, steps = descend(data, data.fast, basis, columns, goal=goal, budget=budget)
    step = reached - start
    for (taken, change, scale), share in zip(pairs, reversed(shares), strict=True):
        step -= (share + scale * dot(change, step)[:, None, None]) * taken
    return step, steps


@dataclass(frozen=True, eq=False)
class _Rows:
    """All rows, and how they are standardised and weighed."""

    X: Embeddings  # (n, d)
    label: Tensor  # (n,) int64
    target: Tensor  # (q, n) the probabilities to be learned
    mask: Tensor  # (F, n) bool
    class_weight: Tensor  # (F, c) what a row of each class weighs: 1 / c, divided by the fold's rows of that class
    centre: Tensor  # (d,) of all rows, or near it
    scale: Tensor  # (d,) likewise

    @property
    def device(self) -> torch.device:
        return self.label.device

    def weight(self, rows: slice) -> Tensor:
        """Compute the weights (F, b) of some rows, as in `Standardised`."""
        return self.class_weight[:, self.label[rows]] * self.mask[:, rows]

    def standardise(self, embeddings: Tensor) -> Tensor:
        """Standardise rows (b, d) float16 on the device: float32, about the centre, in units of the scale."""
        return embeddings.float().sub_(self.centre).div_(self.scale)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Read the store once; yield row numbers and their standardised embeddings (b, d)."""
        pinned = self.device.type == "cuda"  # the next block is copied there while this one is multiplied
        for rows, block in self.X.blocks():
            size = len(block) if pinned else PIECE
            for first in range(0, len(block), size):
                part = block[first : first + size]
                held = torch.empty(part.shape, dtype=torch.float16, pin_memory=pinned)
                held.numpy()[:] = part
                start = rows.start + first
                yield slice(start, start + len(part)), self.standardise(held.to(self.device, non_blocking=True))


def _rows(
    X: Embeddings,
    y: NDArray[np.integer],
    *,
    masks: NDArray[np.bool_],
    n_classes: int,
    target: NDArray[np.floating] | None,
    device: torch.device,
) -> _Rows:
    first = torch.from_numpy(X.select(np.arange(0, len(X), -(-len(X) // FIRST_ROWS))).read()).to(device).float()
    std = first.std(dim=0, correction=0)
    # What hardly varies in these few rows may do so in others, and must not be blown up there.
    least = 0.01 * float(std.square().mean().sqrt()) or 1.0
    return _Rows(
        X,
        label=torch.from_numpy(y.astype(np.int64)).to(device),
        target=targets(y, target, n_classes).to(device),
        mask=torch.from_numpy(masks).to(device),
        class_weight=class_weights(y, masks, n_classes).float().to(device),
        centre=first.mean(dim=0),
        scale=std.clamp_min(least),
    )


def _sampled(rows: _Rows, *, size: int) -> tuple[_Rows, Standardised, NDArray[np.intp]]:
    """Find the centre and scale of all rows, in one pass; draw the sample, and say which rows it is."""
    (F, n), d = rows.mask.shape, rows.X.shape[1]
    mask = torch.cat([rows.mask, torch.ones_like(rows.mask[:1])])  # each fold's rows and, last, all
    count = mask.sum(dim=1, keepdim=True)
    sums, squares = (torch.zeros(F + 1, d, dtype=torch.float64, device=rows.device) for _ in range(2))
    length = torch.zeros(n, device=rows.device)  # squared
    for at, A in rows.pieces():
        within, squared = mask[:, at].float(), A.square()
        sums += within @ A
        squares += within @ squared
        length[at] = squared.sum(dim=1)
    if not bool(torch.isfinite(squares).all()):
        raise UserError("the embeddings hold NaN or infinity; a probe needs finite numbers. Extract them again.")
    mean, mean_square = sums / count, squares / count
    variance = _mended(rows, mask, mean, mean_square)

    std = torch.where(variance[-1] > 0, variance[-1].sqrt(), 1.0)  # of all rows, in units of the scale so far
    centre, scale = rows.centre + mean[-1] * rows.scale, std * rows.scale
    rows = replace(rows, centre=centre.float(), scale=scale.float())
    inv_std = inverse_std(
        (variance[:-1] / std**2).float(), centre=rows.centre, scale=rows.scale, dtype=np.dtype(np.float16)
    )

    chosen, times = _draw(rows.label.cpu().numpy(), length.cpu().numpy(), size)
    A = rows.standardise(torch.from_numpy(rows.X.select(chosen).read()).to(rows.device))
    stands_for, n_classes = rows.mask[:, chosen] * torch.from_numpy(times).to(A), rows.class_weight.shape[1]
    weight = torch.zeros_like(stands_for)
    for k in range(n_classes):
        of_class = stands_for * (rows.label[chosen] == k)
        total = of_class.sum(dim=1, keepdim=True)  # 0 where the sample has no row of the class for a fold
        weight += 1 / n_classes * of_class / total.clamp_min(torch.finfo(total.dtype).tiny)
    fast = A.bfloat16() if has_bf16(rows.device) else A
    fold_mean = ((mean[:-1] - mean[-1]) / std).float()
    target = rows.target[:, chosen]
    return rows, Standardised(A, fast, rows.centre, rows.scale, fold_mean, inv_std, weight, target), chosen


def _mended(rows: _Rows, mask: Tensor, mean: Tensor, mean_square: Tensor) -> Tensor:
    """Compute the variances (F, d) of the rows of each mask from moments (F, d); imprecise ones are computed again.

    A feature that is constant on a fold's rows has a variance of 0 there, not one of rounding.
    """
    variance = mean_square - mean**2
    doubtful = variance < 0.5 * mean_square
    features = torch.nonzero(doubtful.any(dim=0))[:, 0]
    if not len(features):
        return variance
    centre = mean[:, features]
    squares = torch.zeros_like(centre)
    low, high = torch.full_like(centre, torch.inf), torch.full_like(centre, -torch.inf)
    for at, A in rows.pieces():
        values = A[:, features].double()
        for f, within in enumerate(mask[:, at]):
            chosen = values[within]
            if len(chosen):
                squares[f] += (chosen - centre[f]).square().sum(dim=0)
                low[f] = torch.minimum(low[f], chosen.amin(dim=0))
                high[f] = torch.maximum(high[f], chosen.amax(dim=0))
    exact = torch.where(low == high, 0.0, squares / mask.sum(dim=1, keepdim=True))
    variance[:, features] = torch.where(doubtful[:, features], exact, variance[:, features])
    return variance


def _draw(
    label: NDArray[np.int64], length: NDArray[np.float32], size: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Draw the rows of the sample, ascending, and how many rows each of them stands for.

    It draws as many of every class, or all of a small one; half evenly over the table, half by squared length.
    """
    drawn: list[tuple[NDArray[np.intp], NDArray[np.float64]]] = []
    classes = sorted((np.flatnonzero(label == k) for k in np.unique(label)), key=len)
    left = size
    for k, of_class in enumerate(classes):
        wanted = left // (len(classes) - k)
        left -= min(wanted, len(of_class))
        if len(of_class) <= wanted:
            drawn.append((of_class, np.ones(len(of_class))))
            continue
        part = length[of_class].astype(np.float64)
        share = 0.5 / len(of_class) + 0.5 * part / part.sum() if part.any() else np.full(len(part), 1 / len(part))
        # Systematic: at even steps of the cumulated shares, so that no stretch of the table is left out.
        steps = (np.arange(wanted) + 0.5) / wanted
        picked, hits = np.unique(np.searchsorted(np.cumsum(share), steps), return_counts=True)
        drawn.append((of_class[picked], hits / (wanted * share[picked])))
    chosen = np.concatenate([rows for rows, _ in drawn])
    order = np.argsort(chosen)
    return chosen[order], np.concatenate([times for _, times in drawn])[order]


def _gradient(
    rows: _Rows, data: Standardised, fold: Tensor, ridge: Tensor, theta: Tensor, logits: Tensor, which: Tensor
) -> Tensor:
    """Compute gradients (K, q, d + 1) over all rows at theta (K, q, d + 1) in one pass, and write `logits[which]`."""
    mean, inv_std = data.mean[fold][:, None], data.inv_std[fold][:, None]
    W = theta[..., :-1] * inv_std
    offset = theta[..., -1:] - (W * mean).sum(dim=2, keepdim=True)
    product = torch.zeros(W.shape, dtype=torch.float64, device=W.device)
    total = torch.zeros_like(product[..., :1])
    which = which.cpu()
    for at, A in rows.pieces():
        Z = torch.addmm(offset.flatten(0, 1), W.flatten(0, 1), A.T).view(*W.shape[:2], len(A))
        logits[which, :, at] = Z.cpu()
        residual = rows.weight(at)[fold][:, None] * (probabilities(Z) - rows.target[:, at])
        product += (residual.flatten(0, 1) @ A).view(W.shape)
        total += residual.sum(dim=2, keepdim=True)
    by_coef = ((product - total * mean) * inv_std).float() + ridge * theta[..., :-1]
    return torch.cat([by_coef, total.float()], dim=2)
