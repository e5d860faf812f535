"""Does the batched solver give, for every fold and strength, the optimum that scikit-learn gives one by one?"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from features.console import UserError
from probe import logistic
from probe.linear import Probe
from probe.logistic import Fits, fit_logistic, predict_logits
from probe.records import FitRecord

STRENGTHS = np.logspace(-4, 0, 4)


def embeddings(n: int, d: int, *, signal: float = 1.0, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Shaped like a network's: a decaying spectrum in a rotated basis, features off centre and of unequal scale."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, d + 1) ** -0.5
    latent = rng.standard_normal((n, d)) * spectrum
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    X = (latent @ rotation) * np.exp(0.5 * rng.standard_normal(d)) + 2 * rng.standard_normal(d)
    score = signal * latent @ (rng.standard_normal(d) * spectrum) + rng.logistic(size=n) * 0.3
    return X.astype(np.float32), (score > np.quantile(score, 0.75)).astype(np.int64)


def five_folds(n: int, folds: int = 5) -> NDArray[np.bool_]:
    return np.arange(n)[None, :] % folds != np.arange(folds)[:, None]


def many_classes(n: int, d: int, c: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The same embeddings; classes by the largest of c noisy linear scores, so unequal in size and confused."""
    X, _ = embeddings(n, d)
    rng = np.random.default_rng(1)
    scores = (X - X.mean(axis=0)) / X.std(axis=0) @ rng.standard_normal((d, c)) / np.sqrt(d)
    return X, (2 * scores + rng.gumbel(size=(n, c)) + np.linspace(0, 1, c)).argmax(axis=1)


def over_class_0(values: NDArray) -> NDArray:
    """What scikit-learn gives for class 1, 2, ... beyond class 0; of two classes it gives that itself."""
    return values if len(values) == 1 else values[1:] - values[:1]


def reference(
    X: NDArray, y: NDArray, C: float, *, target: NDArray | None = None, solver: str = "newton-cg"
) -> tuple[NDArray, NDArray]:
    """scikit-learn's solution in float64, in the original feature space: (c - 1, d) and (c - 1,).

    Where rows have a distribution, every row is there once per class.
    """
    scaler = StandardScaler().fit(X.astype(np.float64))
    rows, labels, weight = scaler.transform(X.astype(np.float64)), y, (len(y) / np.bincount(y) / len(np.unique(y)))[y]
    if target is not None:
        n, c = target.shape
        rows, labels = np.repeat(rows, c, axis=0), np.tile(np.arange(c), n)
        weight = (weight[:, None] * target).ravel()
    regression = LogisticRegression(C=C, tol=1e-10, max_iter=10_000, solver=solver)
    regression.fit(rows, labels, sample_weight=weight)
    coef = over_class_0(regression.coef_) / scaler.scale_
    return coef, over_class_0(regression.intercept_) - coef @ scaler.mean_


def gradient_norms(X: NDArray, y: NDArray, masks: NDArray, strengths: NDArray, fits: Fits) -> NDArray[np.float64]:
    """The mean loss's largest derivative in each fold's standardised space, recomputed in float64: (F, S).

    Of more than two classes, the coefficients over class 0 belong to those that sum to zero over the classes.
    """
    n_classes = y.max() + 1
    norms = np.zeros(fits.gradient_norm.shape)
    for f, mask in enumerate(masks):
        scaler = StandardScaler().fit(X[mask].astype(np.float64))
        rows, labels = scaler.transform(X[mask].astype(np.float64)), y[mask]
        weight = (len(labels) / n_classes / np.bincount(labels))[labels]
        for s, C in enumerate(strengths):
            beyond = fits.coef[f, s].astype(np.float64)
            logits = X[mask].astype(np.float64) @ beyond.T + fits.intercept[f, s]  # (m, c - 1)
            every = np.exp(np.column_stack([np.zeros(len(rows)), logits]))
            residual = weight[:, None] * (every / every.sum(axis=1, keepdims=True) - np.eye(n_classes)[labels])
            coef = beyond * scaler.scale_
            if n_classes == 2:
                residual = residual[:, 1:]
            else:
                coef = np.concatenate([0 * coef[:1], coef])
                coef -= coef.mean(axis=0)
            by_coef = (residual.T @ rows + coef / C) / len(rows)
            norms[f, s] = max(np.abs(by_coef).max(), np.abs(residual.mean(axis=0)).max())
    return norms


def assert_agrees(
    X: NDArray,
    y: NDArray,
    masks: NDArray,
    strengths: NDArray,
    fits: Fits,
    *,
    atol: float,
    target: NDArray | None = None,
    solver: str = "newton-cg",
) -> None:
    """Logits of every row, also of those held out, agree with scikit-learn to `atol` of their spread."""
    assert fits.converged.all()
    for f, mask in enumerate(masks):
        for s, C in enumerate(strengths):
            learned = None if target is None else target[mask]
            coef, intercept = reference(X[mask], y[mask], C, target=learned, solver=solver)
            expected = X.astype(np.float64) @ coef.T + intercept
            np.testing.assert_allclose(fits.logits[:, f, s], expected, atol=atol * max(expected.std(), 1e-3), rtol=0)


@pytest.mark.parametrize(("n", "d"), [(600, 40), (600, 200), (120, 300)], ids=["n>>d", "n>d", "n<d"])
def test_every_fold_and_strength_agrees_with_scikit_learn(n, d):
    X, y = embeddings(n, d)
    masks = five_folds(n)
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    assert_agrees(X, y, masks, STRENGTHS, fits, atol=2e-3)


@pytest.mark.parametrize(("n", "d"), [(600, 40), (240, 300)], ids=["n>d", "n<d"])
@pytest.mark.parametrize("c", [3, 9])
def test_every_fold_and_strength_of_many_classes_agrees_with_scikit_learn(n, d, c):
    X, y = many_classes(n, d, c)
    masks = five_folds(n)[:2]
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS, n_classes=c)
    assert fits.coef.shape == (2, 4, c - 1, d)
    assert fits.intercept.shape == (2, 4, c - 1)
    assert fits.logits.shape == (n, 2, 4, c - 1)
    assert_agrees(X, y, masks, STRENGTHS, fits, atol=4e-3, solver="lbfgs")
    np.testing.assert_allclose(predict_logits(X, fits.coef, fits.intercept), fits.logits, atol=2e-4)


def test_a_class_of_three_rows_weighs_as_much_as_the_others():
    X, y = many_classes(600, 40, 4)
    rare = np.flatnonzero(y == 2)
    y[rare[3:]] = 0
    masks = five_folds(600)[:2]
    masks[0, rare[:3]], masks[1, rare[:3]] = [True, True, False], [False, True, False]
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS, n_classes=4)
    assert_agrees(X, y, masks, STRENGTHS, fits, atol=2e-3)


@pytest.mark.parametrize("c", [2, 3])
def test_distributions_are_learned_as_scikit_learn_learns_a_row_per_class(c):
    """Balanced by the label, also where most of a row's votes are for another class."""
    X, y = many_classes(300, 20, c)
    target = np.random.default_rng(2).dirichlet(np.ones(c), size=300).astype(np.float32)
    target[:100] = np.eye(c)[y[:100]]  # some unanimous
    masks = five_folds(300)[:2]
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS, n_classes=c, target=target)
    assert_agrees(X, y, masks, STRENGTHS, fits, atol=2e-3, target=target)


@pytest.mark.parametrize("c", [2, 3])
def test_a_distribution_that_is_certain_is_a_label(c):
    X, y = many_classes(200, 10, c)
    arguments = {"masks": five_folds(200), "strengths": STRENGTHS, "n_classes": c}
    by_label = fit_logistic(X, y, **arguments)
    by_share = fit_logistic(X, y, **arguments, target=np.eye(c)[y])
    np.testing.assert_allclose(by_share.logits, by_label.logits, rtol=1e-5, atol=1e-5)


def test_columns_are_the_same_however_many_a_line_search_takes_at_a_time(monkeypatch):
    X, y = many_classes(300, 20, 3)
    arguments = {"masks": five_folds(300), "strengths": STRENGTHS, "n_classes": 3}
    together = fit_logistic(X, y, **arguments)
    for block in (1, 5 * 900):  # two columns at a time; five or six
        monkeypatch.setattr(logistic, "BLOCK", block)
        fits = fit_logistic(X, y, **arguments)
        assert fits.converged.all()
        np.testing.assert_allclose(fits.logits, together.logits, rtol=1e-3, atol=1e-3)


def test_many_separable_classes_with_hardly_any_penalty_converge():
    X, y = many_classes(200, 20, 3)
    X[:, :3] += 20 * np.eye(3, dtype=np.float32)[y]
    masks = five_folds(200)
    strengths = np.array([1.0, 1e2, 1e4])
    fits = fit_logistic(X, y, masks=masks, strengths=strengths, n_classes=3)
    assert fits.converged.all()
    every = np.concatenate([np.zeros_like(fits.logits[..., :1]), fits.logits], axis=3)
    for f, mask in enumerate(masks):
        assert (every[mask, f].argmax(axis=2) == y[mask, None]).all()
    assert gradient_norms(X, y, masks, strengths, fits).max() <= 1.5e-6


def test_the_gradient_norm_reported_for_many_classes_is_the_true_one():
    X, y = many_classes(400, 100, 5)
    masks = five_folds(400)
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS, n_classes=5, tol=1e-3)
    true = gradient_norms(X, y, masks, STRENGTHS, fits)
    assert true.max() > 1e-5
    np.testing.assert_allclose(fits.gradient_norm, true, rtol=0.02, atol=1e-6)


def test_logits_are_those_of_the_returned_coefficients():
    X, y = embeddings(300, 30)
    fits = fit_logistic(X, y, masks=five_folds(300), strengths=STRENGTHS)
    assert fits.logits.shape == (300, 5, 4, 1)
    np.testing.assert_allclose(predict_logits(X, fits.coef, fits.intercept), fits.logits, atol=1e-4)


def test_predict_logits_takes_one_chosen_column_per_fold():
    X, y = embeddings(100, 8)
    fits = fit_logistic(X, y, masks=five_folds(100), strengths=STRENGTHS)
    chosen = predict_logits(X, fits.coef[:, 2], fits.intercept[:, 2])
    assert chosen.dtype == np.float32
    np.testing.assert_allclose(chosen, fits.logits[:, :, 2], atol=1e-5)


def test_separable_classes_with_hardly_any_penalty_converge():
    X, y = embeddings(200, 20)
    X[:, 0] += 20 * y
    masks = five_folds(200)
    strengths = np.array([1.0, 1e2, 1e4])
    fits = fit_logistic(X, y, masks=masks, strengths=strengths)
    assert fits.converged.all()
    for f, mask in enumerate(masks):
        assert ((fits.logits[mask, f, :, 0] > 0) == (y[mask, None] == 1)).all()
    assert gradient_norms(X, y, masks, strengths, fits).max() <= 1.5e-6


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_a_constant_feature_gets_no_coefficient_and_changes_nothing(value):
    X, y = embeddings(200, 10)
    masks = five_folds(200)
    X[:, 4] = value
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    assert (fits.coef[..., 4] == 0).all()
    assert_agrees(X, y, masks, STRENGTHS, fits, atol=1e-3)


def test_a_feature_constant_in_one_fold_only_is_constant_there():
    X, y = embeddings(200, 10)
    masks = five_folds(200)
    X[:, 4] = np.where(masks[2], 0.1, X[:, 4])  # it varies in the rows that fold 2 holds out
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    assert (fits.coef[2, ..., 4] == 0).all()
    assert (fits.coef[1, ..., 4] != 0).all()
    assert_agrees(X, y, masks, STRENGTHS, fits, atol=2e-3)


def test_a_feature_that_hardly_varies_around_a_large_mean_is_standardised_all_the_same():
    X, y = embeddings(200, 10)
    X[:, 3] = 100 + 1e-3 * X[:, 3]
    masks = five_folds(200)
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    assert_agrees(X, y, masks, STRENGTHS, fits, atol=5e-3)


def test_a_feature_that_all_but_never_varies_in_training_does_not_rule_the_rows_where_it_does():
    X, y = embeddings(200, 10)
    masks = five_folds(200)
    X[:, 4] = 0  # a dead unit ...
    X[1, 4] = 1e-6  # ... but for a speck in the training rows of fold 0, and a held-out row that excites it
    X[0, 4] = 0.5
    fits = fit_logistic(X.astype(np.float16), y, masks=masks[:1], strengths=STRENGTHS)
    assert (fits.coef[0, ..., 4] == 0).all()
    assert np.abs(fits.logits[0]).max() <= np.abs(fits.logits[1:]).max() * 2


@pytest.mark.parametrize(("dtype", "largest"), [(np.float32, 1e6), (np.float16, 1e4)])
def test_a_feature_in_other_units_than_the_rest_drops_nothing(dtype, largest):
    """Unit features, one a million (or ten thousand) times as large, one as much smaller: all are used."""
    X, y = embeddings(400, 12)
    X[:, 3] *= largest
    X[:, 7] /= largest
    X = X.astype(dtype)
    masks = five_folds(400)
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    assert (fits.n_dropped == 0).all()
    assert (fits.coef != 0).all()
    assert_agrees(X, y, masks, STRENGTHS, fits, atol=2e-3)
    coef, intercept = reference(X[masks[0]], y[masks[0]], STRENGTHS[-1])
    held_out = ~masks[0]
    theirs = roc_auc_score(y[held_out], X[held_out].astype(np.float64) @ coef[0] + intercept)
    assert roc_auc_score(y[held_out], fits.logits[held_out, 0, -1, 0]) == pytest.approx(theirs, abs=1e-3)


def test_what_is_constant_but_for_rounding_is_dropped_and_counted():
    X, y = embeddings(400, 8)
    masks = five_folds(400)
    unit = np.float16(2**-10)  # of float16 in the last place, at 1
    X = X.astype(np.float16)
    X[:, 2] = 1 + unit * (np.arange(400) % 3 == 0)  # rounded up or down: half a unit at most
    X[:, 5] = 1 + unit * (np.arange(400) % 4)  # over four values: more than that
    X[masks[1], 6] = -0.3  # constant in one fold only
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    assert fits.n_dropped.tolist() == [1, 2, 1, 1, 1]
    assert (fits.coef[..., 2] == 0).all()
    assert (fits.coef[..., 5] != 0).all()
    in_full = fit_logistic(
        X.astype(np.float32), y, masks=masks, strengths=STRENGTHS
    )  # of float32 it is far from rounding
    assert in_full.n_dropped.tolist() == [0, 1, 0, 0, 0]


def test_folds_far_from_the_mean_of_all_rows_are_standardised_by_their_own():
    X, y = embeddings(200, 10)
    masks = np.zeros((2, 200), dtype=bool)
    masks[0, :20] = masks[1, 20:] = True
    X[:20] += 5
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    assert_agrees(X, y, masks, STRENGTHS, fits, atol=2e-3)


def test_float16_embeddings_are_taken_as_they_are():
    X, y = embeddings(200, 20)
    X = X.astype(np.float16)
    given = X.copy()
    fits = fit_logistic(X, y, masks=five_folds(200), strengths=STRENGTHS)
    assert_agrees(X, y, five_folds(200), STRENGTHS, fits, atol=1e-3)
    assert (given == X).all()


def test_the_embeddings_given_are_not_changed():
    X, y = embeddings(100, 5)
    given = X.copy()
    fit_logistic(X, y, masks=five_folds(100), strengths=STRENGTHS)
    assert (given == X).all()


def test_read_only_memory_is_accepted():
    X, y = embeddings(100, 5)
    X.flags.writeable = False
    assert fit_logistic(X, y, masks=five_folds(100), strengths=STRENGTHS).converged.all()


def test_one_fold_and_one_strength():
    X, y = embeddings(150, 12)
    masks = np.ones((1, 150), dtype=bool)
    fits = fit_logistic(X, y, masks=masks, strengths=[0.01])
    assert fits.coef.shape == (1, 1, 1, 12)
    assert_agrees(X, y, masks, np.array([0.01]), fits, atol=1e-3)


def test_a_column_does_not_depend_on_its_batch():
    X, y = embeddings(300, 60)
    masks = five_folds(300)
    together = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    alone = fit_logistic(X, y, masks=masks[3:4], strengths=STRENGTHS[1:2])
    np.testing.assert_allclose(alone.logits[:, 0, 0], together.logits[:, 3, 1], rtol=1e-3, atol=1e-3)


def test_the_order_of_rows_does_not_matter():
    X, y = embeddings(300, 60)
    masks = five_folds(300)
    order = np.random.default_rng(1).permutation(300)
    straight = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    shuffled = fit_logistic(X[order], y[order], masks=masks[:, order], strengths=STRENGTHS)
    np.testing.assert_allclose(shuffled.logits, straight.logits[order], rtol=1e-3, atol=1e-3)


def test_the_same_call_gives_the_same_bits():
    X, y = embeddings(200, 40)
    first, second = (fit_logistic(X, y, masks=five_folds(200), strengths=STRENGTHS) for _ in range(2))
    assert (first.coef == second.coef).all()


def test_the_gradient_norm_reported_is_the_true_one():
    X, y = embeddings(400, 100)
    masks = five_folds(400)
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS, tol=1e-3)
    true = gradient_norms(X, y, masks, STRENGTHS, fits)
    assert true.max() > 1e-5  # a loose tolerance, so that there is something to compare
    np.testing.assert_allclose(fits.gradient_norm, true, rtol=0.02, atol=1e-6)


def test_running_out_of_steps_is_reported():
    X, y = embeddings(400, 100)
    fits = fit_logistic(X, y, masks=five_folds(400), strengths=[1e-5, 1.0], max_iter=3)
    assert not fits.converged[:, 1].any()
    assert (fits.n_iter[:, 1] == 3).all()
    assert (fits.gradient_norm[:, 1] > 1e-6).all()
    assert np.isfinite(fits.coef).all()


def test_a_tolerance_below_the_floor_of_float32_ends_and_is_reported():
    X, y = embeddings(200, 20)
    fits = fit_logistic(X, y, masks=five_folds(200), strengths=STRENGTHS, tol=1e-12)
    assert not fits.converged.all()
    assert fits.gradient_norm.max() < 1e-5
    assert fits.n_iter.max() < 1000


def test_without_bfloat16_hardware_the_answer_is_the_same(monkeypatch):
    X, y = embeddings(300, 60)
    masks = five_folds(300)
    fits = {}
    for supported in (True, False):
        monkeypatch.setattr(logistic, "has_bf16", lambda device, supported=supported: supported)
        fits[supported] = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
        assert fits[supported].converged.all()
    np.testing.assert_allclose(fits[True].logits, fits[False].logits, rtol=1e-3, atol=1e-3)


def test_more_columns_than_one_strength_grid():
    """The nested protocol: five folds and the ten pairs of folds left out together."""
    X, y = embeddings(400, 50)
    one = five_folds(400)
    masks = np.stack([*one, *(one[i] & one[j] for i in range(5) for j in range(i))])
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    assert fits.converged.all()
    assert gradient_norms(X, y, masks, STRENGTHS, fits).max() <= 1.5e-6


@pytest.mark.parametrize("label", [0, 1])
def test_a_fold_with_one_class_is_named(label):
    X, y = embeddings(40, 5)
    masks = five_folds(40)
    masks[3] = y == label
    with pytest.raises(UserError, match=rf"fold 3: its \d+ training rows hold no row of class {1 - label}, "):
        fit_logistic(X, y, masks=masks, strengths=STRENGTHS)


def test_a_fold_that_lacks_one_of_many_classes_is_named():
    X, y = many_classes(60, 5, 4)
    masks = five_folds(60)
    masks[2] &= y != 3
    with pytest.raises(UserError, match=r"fold 2: its \d+ training rows hold no row of class 3, .* all 4 classes"):
        fit_logistic(X, y, masks=masks, strengths=STRENGTHS, n_classes=4)


def test_a_fold_without_rows_is_named():
    X, y = embeddings(40, 5)
    masks = five_folds(40)
    masks[1] = False
    with pytest.raises(UserError, match="fold 1: its 0 training rows hold no row of class 0, 1, "):
        fit_logistic(X, y, masks=masks, strengths=STRENGTHS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_that_are_not_finite_are_named(value, dtype):
    X, y = embeddings(40, 5)
    X[[7, 9], 2] = value
    with pytest.raises(UserError, match=r"2 rows with NaN or infinity \(first: row 7\)"):
        fit_logistic(X.astype(dtype), y, masks=five_folds(40), strengths=STRENGTHS)


def test_shapes_that_do_not_match_are_refused():
    X, y = embeddings(40, 5)
    masks = five_folds(40)
    for bad in ({"y": y[:-1]}, {"masks": masks[:, :-1]}, {"masks": masks[0]}, {"X": X[:-1]}):
        arguments = {"X": X, "y": y, "masks": masks} | bad
        with pytest.raises(UserError, match="expected"):
            fit_logistic(arguments["X"], arguments["y"], masks=arguments["masks"], strengths=STRENGTHS)


@pytest.mark.parametrize("strength", [0.0, -1.0, np.nan, np.inf])
def test_a_strength_that_is_not_positive_is_refused(strength):
    X, y = embeddings(40, 5)
    with pytest.raises(UserError, match="positive"):
        fit_logistic(X, y, masks=five_folds(40), strengths=[1.0, strength])


def test_labels_other_than_0_and_1_are_refused():
    X, y = embeddings(40, 5)
    with pytest.raises(UserError, match="from 0 to 1; found"):
        fit_logistic(X, y * 2, masks=five_folds(40), strengths=STRENGTHS)
    with pytest.raises(UserError, match=r"labels of 3 classes .* from 0 to 2; found \[0, 3\]"):
        fit_logistic(X, y * 3, masks=five_folds(40), strengths=STRENGTHS, n_classes=3)


def test_targets_that_are_no_distributions_are_refused():
    X, y = embeddings(40, 5)
    good = np.eye(2)[y]
    negative, short, missing = good.copy(), good.copy(), good.copy()
    negative[7] = [1.5, -0.5]
    short[[7, 9]] = [0.5, 0.4]
    missing[7] = np.nan
    for target, message in (
        (good[:-1], r"\(39, 2\); expected \(40, 2\)"),
        (negative, "1 target rows are no distribution .*row 7"),
        (short, "2 target rows are no distribution .*row 7"),
        (missing, "1 target rows are no distribution .*row 7"),
    ):
        with pytest.raises(UserError, match=message):
            fit_logistic(X, y, masks=five_folds(40), strengths=STRENGTHS, target=target)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_answer():
    X, y = embeddings(600, 200)
    masks = five_folds(600)
    fits = fit_logistic(X, y, masks=masks, strengths=STRENGTHS, device="cuda")
    assert_agrees(X, y, masks, STRENGTHS, fits, atol=2e-3)


def hand_made_probe(threshold: float) -> Probe:
    """Two folds of one feature: logits x and 3 x."""
    return Probe(
        coef=np.array([[[1]], [[3]]], dtype=np.float32),
        intercept=np.zeros((2, 1)),
        validation_logit=np.zeros((2, 1, 1), dtype=np.float32),
        threshold=threshold,
        fit=FitRecord(),
    )


def test_a_probes_probabilities_are_means_over_folds_and_class_0_comes_first():
    x = np.array([[-1.0], [0.0], [2.0]], dtype=np.float32)
    positive = (1 / (1 + np.exp(-x[:, 0])) + 1 / (1 + np.exp(-3 * x[:, 0]))) / 2
    np.testing.assert_allclose(
        hand_made_probe(0.5).predict_proba(x), np.stack([1 - positive, positive], axis=1), rtol=1e-5
    )


def test_a_probe_calls_positive_from_its_threshold_on():
    x = np.array([[-1.0], [0.0], [2.0]], dtype=np.float32)  # the middle one has probability 0.5 exactly
    assert hand_made_probe(0.5).predict(x).tolist() == [0, 1, 1]
    assert hand_made_probe(0.51).predict(x).tolist() == [0, 0, 1]
    assert hand_made_probe(0.1).predict(x).tolist() == [1, 1, 1]


def test_a_probe_of_three_classes_predicts_the_most_probable_on_average():
    """Two folds, class 1 over 0 and 2 over 0: at x = 1 the folds disagree, and their probabilities decide."""
    probe = Probe(
        coef=np.array([[[1], [0]], [[0], [4]]], dtype=np.float32),
        intercept=np.array([[0.5, 0], [0, 0]]),
        validation_logit=np.zeros((2, 1, 2), dtype=np.float32),
        threshold=np.nan,
        fit=FitRecord(),
    )
    x = np.array([[-4.0], [0.0], [1.0]], dtype=np.float32)
    assert probe.decision_function(x).shape == (3, 2, 2)
    first, second = np.exp([0, 1.5, 0]), np.exp([0, 0, 4.0])
    expected = (first / first.sum() + second / second.sum()) / 2
    np.testing.assert_allclose(probe.predict_proba(x)[2], expected, rtol=1e-5)
    np.testing.assert_allclose(probe.predict_proba(x).sum(axis=1), 1, rtol=1e-12)
    assert probe.predict(x).tolist() == [0, 1, 2]
    assert "3 classes" in repr(probe)


def precision_inside(monkeypatch: pytest.MonkeyPatch, module: ModuleType, fit: Callable[[], Fits]) -> list[str]:
    """What torch may do to float32 products inside a solver and after it, where rounding to bfloat16 was allowed."""
    seen, find_basis = [], logistic.leading_curvature

    def watched(data: logistic.Standardised) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(torch.get_float32_matmul_precision())
        return find_basis(data)

    monkeypatch.setattr(module, "leading_curvature", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        fit()
        return [*seen, torch.get_float32_matmul_precision()]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_are_full_float32_whatever_was_allowed_before(monkeypatch):
    """With factors of 11 bits (TF32) or 8 (bfloat16) the gradient that convergence is declared on is not the true one.

    Few processors round so, therefore what the solver asks of torch is looked at.
    """
    X, y = embeddings(100, 8)
    found = precision_inside(
        monkeypatch, logistic, lambda: fit_logistic(X, y, masks=five_folds(100), strengths=STRENGTHS)
    )
    assert found == ["highest", "medium"]
