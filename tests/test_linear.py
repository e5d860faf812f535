"""Does nested cross-validation choose strengths as a plain loop would, for any number of classes?"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_logistic import many_classes, over_class_0, reference

from features.console import UserError
from features.folds import Folds
from probe import linear
from probe.curve import Subset
from probe.linear import fit_exact, fit_paper
from probe.schedule import PaperRecipe

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)


def folds_of(fold: NDArray[np.intp]) -> Folds:
    return Folds(fold=fold, n_folds=int(fold.max()) + 1, source="here", digest="")


def balanced_loss(y: NDArray, logit: NDArray) -> float:
    """Mean over the classes that are there of the mean log loss of their rows, from logits (n, c - 1)."""
    every = np.column_stack([np.zeros(len(y)), logit])
    losses = np.log(np.exp(every).sum(axis=1)) - every[np.arange(len(y)), y]
    return float(np.mean([losses[y == k].mean() for k in np.unique(y)]))


def plain_loop(X: NDArray, y: NDArray, fold: NDArray, c: int) -> NDArray[np.float64]:
    """The inner loss (F, S): mean over folds g of fits without f and g, scored on g; left out where a class lacks."""
    F = fold.max() + 1
    losses = np.zeros((F, len(STRENGTHS)))
    for f in range(F):
        for s, C in enumerate(STRENGTHS):
            scored = []
            for g in set(range(F)) - {f}:
                trains, held = (fold != f) & (fold != g), fold == g
                if len(np.unique(y[trains])) < c or len(np.unique(y[held])) < 2:
                    continue
                scaler = StandardScaler().fit(X[trains])
                model = LogisticRegression(C=C, class_weight="balanced", tol=1e-8, max_iter=5000)
                model.fit(scaler.transform(X[trains]), y[trains])
                coef, intercept = over_class_0(model.coef_), over_class_0(model.intercept_)
                scored.append(balanced_loss(y[held], scaler.transform(X[held]) @ coef.T + intercept))
            losses[f, s] = np.mean(scored)
    return losses


def test_strengths_of_three_classes_are_chosen_as_a_plain_nested_loop_would():
    X, y = many_classes(240, 20, 3)
    fold = np.arange(240) % 4
    probe = fit_exact(X, y, folds=folds_of(fold), strengths=STRENGTHS, n_classes=3)
    expected = plain_loop(X.astype(np.float64), y, fold, 3)
    np.testing.assert_allclose(probe.fit.inner_loss, expected, atol=1e-4)
    chosen = expected.argmin(axis=1)
    assert probe.fit.chosen_strength == tuple(STRENGTHS[s] for s in chosen)
    assert probe.fit.n_fits == 10 * len(STRENGTHS)
    assert (probe.coef.shape, probe.validation_logit.shape) == ((4, 2, 20), (240, 1, 2))
    assert np.isnan(probe.threshold)
    for f in range(4):
        coef, intercept = reference(X[fold != f], y[fold != f], STRENGTHS[chosen[f]])
        held_out = X[fold == f].astype(np.float64) @ coef.T + intercept
        np.testing.assert_allclose(probe.validation_logit[fold == f, 0], held_out, atol=5e-3)


def test_a_fit_without_two_folds_that_lacks_a_class_is_not_made_and_says_nothing():
    """Class 2 is in folds 0 and 1 alone: without both there is none; without one of them, the rest choose."""
    X, y = many_classes(240, 10, 3)
    fold = np.arange(240) % 4
    y = np.where((y == 2) & (fold > 1), 0, y)
    probe = fit_exact(X, y, folds=folds_of(fold), strengths=STRENGTHS, n_classes=3)
    assert probe.fit.n_fits == (4 + 6 - 1) * len(STRENGTHS)
    np.testing.assert_allclose(probe.fit.inner_loss, plain_loop(X.astype(np.float64), y, fold, 3), atol=1e-4)


def test_a_fold_left_without_a_fit_to_choose_on_is_named():
    """Without fold 0, class 2 is in fold 1 and class 3 in fold 2 alone: leaving out either lacks one."""
    X, y = many_classes(150, 6, 2)
    fold = np.arange(150) % 3
    y = np.where(np.arange(150) < 60, np.array([2, 2, 3])[fold], y)
    y = np.where((np.arange(150) < 30) & (fold == 0), 3, y)
    with pytest.raises(UserError, match="fold 0: no strength can be chosen"):
        fit_exact(X, y, folds=folds_of(fold), strengths=STRENGTHS, n_classes=4)


def test_a_fold_whose_own_training_rows_lack_a_class_is_named():
    X, y = many_classes(150, 6, 3)
    fold = np.arange(150) % 3
    y = np.where((y == 2) & (fold != 1), 0, y)
    with pytest.raises(UserError, match="fold 1: its 100 training rows hold no row of class 2, "):
        fit_exact(X, y, folds=folds_of(fold), strengths=STRENGTHS, n_classes=3)


def test_distributions_are_learned_and_strengths_chosen_on_the_labels():
    X, y = many_classes(240, 10, 3)
    fold = np.arange(240) % 4
    target = 0.5 * np.eye(3)[y] + 0.5 * np.random.default_rng(0).dirichlet(np.ones(3), size=240)
    probe = fit_exact(X, y, folds=folds_of(fold), strengths=STRENGTHS[:1], n_classes=3, target=target)
    losses = []
    for g in (1, 2, 3):
        trains, held = (fold != 0) & (fold != g), fold == g
        coef, intercept = reference(X[trains], y[trains], STRENGTHS[0], target=target[trains])
        losses.append(balanced_loss(y[held], X[held].astype(np.float64) @ coef.T + intercept))
    assert probe.fit.inner_loss[0][0] == pytest.approx(np.mean(losses), abs=1e-4)
    coef, intercept = reference(X[fold != 2], y[fold != 2], STRENGTHS[0], target=target[fold != 2])
    held_out = X[fold == 2].astype(np.float64) @ coef.T + intercept
    np.testing.assert_allclose(probe.validation_logit[fold == 2, 0], held_out, atol=2e-3)


def test_strengths_of_two_domains_are_chosen_within_the_one_that_trains():
    X, y = many_classes(240, 20, 2)
    fold = np.repeat([0, 1], [90, 150])
    parts = np.where(fold == 0, 2 + np.arange(240) % 3, 5 + np.arange(240) % 3)
    folds = Folds(fold=fold, n_folds=2, source="here", digest="", parts=parts)
    probe = fit_exact(X, y, folds=folds, strengths=STRENGTHS)
    losses = np.zeros((2, len(STRENGTHS)))
    for f, s, part in itertools.product(range(2), range(len(STRENGTHS)), range(3)):
        held = parts == 2 + 3 * (1 - f) + part
        coef, intercept = reference(X[(fold != f) & ~held], y[(fold != f) & ~held], STRENGTHS[s])
        losses[f, s] += balanced_loss(y[held], X[held].astype(np.float64) @ coef.T + intercept) / 3
    np.testing.assert_allclose(probe.fit.inner_loss, losses, atol=1e-4)
    coef, intercept = reference(X[fold == 0], y[fold == 0], STRENGTHS[losses[1].argmin()])
    held_out = X[fold == 1].astype(np.float64) @ coef.T + intercept
    np.testing.assert_allclose(probe.validation_logit[fold == 1, 0], held_out, atol=2e-3)


def test_a_subset_trains_on_its_own_rows_distributions_among_them():
    X, y = many_classes(240, 10, 3)
    fold = np.arange(240) % 3
    target = np.random.default_rng(0).dirichlet(np.ones(3), size=240)
    kept = np.arange(240) % 5 != 0
    masks = np.stack([~np.isin(fold, held) & kept for held in linear.held_out_folds(folds_of(fold))])
    subset = Subset(**dict.fromkeys(Subset.__dataclass_fields__) | {"masks": masks})
    arguments = {"strengths": STRENGTHS, "n_classes": 3}
    probe = fit_exact(X, y, folds=folds_of(fold), subset=subset, target=target, **arguments)
    alone = fit_exact(X[kept], y[kept], folds=folds_of(fold[kept]), target=target[kept], **arguments)
    np.testing.assert_allclose(probe.coef, alone.coef, rtol=1e-3, atol=1e-4)
    assert probe.validation_logit.shape == (240, 1, 2)


@pytest.mark.parametrize(("c", "finite"), [(2, True), (3, False)])
def test_the_papers_probe_has_a_threshold_for_two_classes_alone(c, finite):
    X, y = many_classes(90, 5, c)
    recipe = PaperRecipe(learning_rate=1e-2, max_epochs=3)
    probe = fit_paper(X, y, folds=folds_of(np.arange(90) % 3), seeds=[0, 1], recipe=recipe, n_classes=c)
    assert probe.coef.shape == (6, c - 1, 5)
    assert probe.validation_logit.shape == (90, 2, c - 1)
    assert np.isfinite(probe.threshold) == finite
    every = probe.decision_function(X).reshape(90, 2, 3, c - 1)
    np.testing.assert_allclose(probe.validation_logit, every[np.arange(90), :, np.arange(90) % 3], rtol=1e-5, atol=1e-6)
