"""Does a probe whose rows stay in the store find what one in memory finds?"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from test_logistic import embeddings, five_folds, many_classes, precision_inside

from features.blocks import Embeddings
from features.console import UserError
from features.samples import make_samples
from features.store import FeatureStore
from probe import linear, logistic, stream
from probe.logistic import Fits, fit_logistic, predict_logits
from probe.stream import fit_streamed

STRENGTHS = np.logspace(-4, 0, 4)
EXACT = 1e-4  # of the logits' spread: what two solutions to a gradient of 1e-6 may differ by


def stored(tmp_path, X: NDArray[np.floating], y: NDArray[np.integer]) -> Embeddings:
    """The embeddings in a store of 64 rows per block and more."""
    n = len(X)
    samples = make_samples([f"{row:06}" for row in range(n)], y.tolist(), sha256=[""] * n)
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    store.put_samples("data", samples, attrs={})
    writer = store.begin("data", model="model", view="full", poolings={"cls": X.shape[1]}, card_pooling="cls", parts={})
    for rows in writer.missing():
        writer.write(rows, {"cls": X[rows.start : rows.stop]})
    return store.embeddings("data", model="model", view="full")


def assert_same(found: Fits, expected: Fits, *, atol: float = EXACT) -> None:
    assert found.converged.all()
    assert expected.converged.all()
    spread = np.maximum(expected.logits.std(axis=0), 1e-2)
    assert (np.abs(found.logits - expected.logits).max(axis=0) / spread).max() < atol


@pytest.fixture
def problem(tmp_path) -> tuple[Embeddings, NDArray[np.int64], NDArray[np.bool_]]:
    X, y = embeddings(3000, 24)
    return stored(tmp_path, X, y), y, five_folds(3000)


def test_the_optimum_is_that_of_the_solver_in_memory_whatever_the_sample(problem):
    X, y, masks = problem
    expected = fit_logistic(X.read(), y, masks=masks, strengths=STRENGTHS)
    for sample in (300, 1000):
        assert_same(fit_streamed(X, y, masks=masks, strengths=STRENGTHS, sample=sample), expected)


@pytest.mark.parametrize("supported", [False, True])
def test_the_optimum_is_the_same_with_bfloat16_hardware_and_without(problem, monkeypatch, supported):
    X, y, masks = problem
    expected = fit_logistic(X.read(), y, masks=masks, strengths=STRENGTHS)
    monkeypatch.setattr(stream, "has_bf16", lambda device: supported)
    assert_same(fit_streamed(X, y, masks=masks, strengths=STRENGTHS, sample=300), expected)


def test_a_descent_starts_from_the_logits_of_the_samples_own_rows(tmp_path, monkeypatch):
    X, y = many_classes(600, 6, 3)
    checked = 0

    def watched(data, fold, ridge, theta, *, logits, gradient):
        nonlocal checked
        checked += len(fold)
        np.testing.assert_allclose(logits, logistic.evaluate(data, fold, ridge, theta).logits, atol=1e-4)
        return logistic.columns_at(data, fold, ridge, theta, logits=logits, gradient=gradient)

    monkeypatch.setattr(stream, "columns_at", watched)
    X = X.astype(np.float16)
    fit_streamed(stored(tmp_path, X, y), y, masks=five_folds(600), strengths=STRENGTHS, n_classes=3, sample=200)
    assert checked > 20  # in more descents than one, of fewer and fewer columns


def test_the_sample_may_be_all_rows(problem):
    X, y, masks = problem
    expected = fit_logistic(X.read(), y, masks=masks, strengths=STRENGTHS)
    assert_same(fit_streamed(X, y, masks=masks, strengths=STRENGTHS), expected)


def test_logits_are_those_of_the_returned_coefficients(problem):
    X, y, masks = problem
    fits = fit_streamed(X, y, masks=masks, strengths=STRENGTHS, sample=400)
    np.testing.assert_allclose(predict_logits(X.read(), fits.coef, fits.intercept), fits.logits, atol=1e-4)


def test_rows_of_a_kind_that_the_sample_hardly_holds_count(tmp_path):
    """Ten rows light up a feature that is dead elsewhere, and another only in one fold's own rows."""
    X, y = embeddings(3000, 24)
    X[:, 5] = 0
    X[100:2000:190, 5] = 3
    X[:, 6] = np.where(np.arange(3000) % 5 == 2, X[:, 6], 0.7)
    X[:, 7] = 1.25
    X = X.astype(np.float16)
    masks = five_folds(3000)
    expected = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    found = fit_streamed(stored(tmp_path, X, y), y, masks=masks, strengths=STRENGTHS, sample=300)
    assert_same(found, expected)
    assert (found.coef[2, ..., 6] == 0).all()
    assert (found.coef[..., 7] == 0).all()


def test_a_feature_in_other_units_than_the_rest_drops_nothing(tmp_path):
    X, y = embeddings(3000, 12)
    X[:, 3] *= 1e4
    X[:, 7] *= 1e-3
    X[:, 9] = 1 + 2**-10 * (np.arange(3000) % 3 == 0)  # rounded up or down in float16
    X = X.astype(np.float16)
    masks = five_folds(3000)
    expected = fit_logistic(X, y, masks=masks, strengths=STRENGTHS)
    found = fit_streamed(stored(tmp_path, X, y), y, masks=masks, strengths=STRENGTHS, sample=300)
    assert_same(found, expected)
    assert found.n_dropped.tolist() == expected.n_dropped.tolist() == [1] * 5
    assert (found.coef[..., 7] != 0).all()


def test_a_rare_class_is_in_the_sample_whole(tmp_path):
    X, y = embeddings(3000, 12)
    y[np.flatnonzero(y == 1)[40:]] = 0
    masks = five_folds(3000)
    expected = fit_logistic(X.astype(np.float16), y, masks=masks, strengths=STRENGTHS)
    assert_same(fit_streamed(stored(tmp_path, X, y), y, masks=masks, strengths=STRENGTHS, sample=400), expected)
    chosen, times = stream._draw(y, np.ones(3000, np.float32), 400)
    assert y[chosen].sum() == 40
    assert (times[y[chosen] == 1] == 1).all()
    assert times.sum() == pytest.approx(3000, rel=0.02)


@pytest.mark.parametrize("c", [2, 3, 5])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "distributions"])
def test_many_classes_and_distributions_have_the_optimum_of_the_solver_in_memory(tmp_path, c, soft):
    X, y = many_classes(3000, 12, c)
    X = X.astype(np.float16)
    shares = 0.7 * np.eye(c)[y] + 0.3 * np.random.default_rng(2).dirichlet(np.ones(c), size=3000)
    masks, target = five_folds(3000)[:3], shares if soft else None
    # With 1 / c of the curvature of a class, the same gradient is further from the optimum: hence a smaller one.
    arguments = {"masks": masks, "strengths": STRENGTHS, "n_classes": c, "target": target, "tol": 2e-7}
    expected = fit_logistic(X, y, **arguments)
    found = fit_streamed(stored(tmp_path, X, y), y, **arguments, sample=400)
    assert found.logits.shape == expected.logits.shape == (3000, 3, 4, c - 1)
    assert_same(found, expected)


def test_the_sample_holds_equally_many_rows_of_every_class_and_small_ones_whole(tmp_path):
    sizes = [1700, 20, 900, 380]
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(4), sizes))
    chosen, times = stream._draw(y, np.ones(3000, np.float32), 410)
    assert np.bincount(y[chosen]).tolist() == [130, 20, 130, 130]
    for k, size in enumerate(sizes):
        assert times[y[chosen] == k].sum() == pytest.approx(size, rel=1e-6)


def test_a_fold_that_lacks_one_of_many_classes_is_refused(tmp_path):
    X, y = many_classes(600, 6, 3)
    masks = five_folds(600)
    masks[1] &= y != 2
    where = stored(tmp_path, X, y)
    with pytest.raises(UserError, match=r"fold 1: its \d+ training rows hold no row of class 2, "):
        fit_streamed(where, y, masks=masks, strengths=STRENGTHS, n_classes=3)


def test_memory_counts_the_vectors_of_a_column():
    two, nine = (stream.bytes_per_row(100, 50, n_classes=c) - 8 * 100 for c in (2, 9))
    assert nine == 9 * two
    n = stream.BUDGET // stream.bytes_per_row(100, 50, n_classes=9)
    assert stream.fits_in_memory((n, 100), 50, n_classes=9)
    assert not stream.fits_in_memory((n + 1, 100), 50, n_classes=9)


def test_a_step_too_far_is_taken_back(problem, monkeypatch):
    """A sample of far too few rows has the curvature wrong by factors; shorter steps lead home all the same."""
    X, y, masks = problem
    monkeypatch.setattr(stream, "MAX_PASSES", 200)
    expected = fit_logistic(X.read(), y, masks=masks[:2], strengths=STRENGTHS)
    assert_same(fit_streamed(X, y, masks=masks[:2], strengths=STRENGTHS, sample=90), expected)


def test_what_has_not_converged_is_reported_with_its_own_logits(problem, monkeypatch):
    X, y, masks = problem
    monkeypatch.setattr(stream, "MAX_PASSES", 2)
    fits = fit_streamed(X, y, masks=masks, strengths=STRENGTHS, sample=300)
    assert not fits.converged.all()
    assert (fits.gradient_norm[~fits.converged] > 1e-6).all()
    np.testing.assert_allclose(predict_logits(X.read(), fits.coef, fits.intercept), fits.logits, atol=1e-4)


def test_a_fold_without_a_class_is_refused(problem):
    X, y, masks = problem
    with pytest.raises(UserError, match="no row of class 1, "):
        fit_streamed(X, y, masks=masks & (y == 0), strengths=STRENGTHS)


def test_rows_in_a_store_are_predicted_as_in_memory(problem):
    X, _, _ = problem
    rng = np.random.default_rng(0)
    coef, intercept = rng.standard_normal((5, 24)).astype(np.float32), rng.standard_normal(5)
    some = X.select(np.arange(len(X)) % 3 == 0)
    expected = predict_logits(some.read(), coef, intercept)
    np.testing.assert_allclose(predict_logits(some, coef, intercept), expected, rtol=1e-5, atol=1e-5)


def test_blocks_are_all_rows_once_in_order(tmp_path):
    X, y = embeddings(1000, 6)
    whole = stored(tmp_path, X, y)
    for chosen in (whole, whole.select(np.arange(0, 1000, 7)), whole.select(np.arange(1000) > 990)):
        found = np.full(chosen.shape, np.nan, np.float16)
        for rows, block in chosen.blocks():
            assert np.isnan(found[rows]).all()
            found[rows] = block
        np.testing.assert_array_equal(found, chosen.read())
    with pytest.raises(ValueError, match="ascending"):
        list(whole.select(np.array([3, 1])).blocks())


def test_a_store_beyond_the_budget_is_streamed_and_judged_the_same(problem, monkeypatch):
    from features.folds import Folds

    X, y, _ = problem
    folds = Folds(fold=np.arange(3000) % 5, n_folds=5, source="here", digest="")
    here = linear.fit_exact(X.read(), y, folds=folds)
    assert isinstance(linear.in_memory(X, 15), np.ndarray)
    monkeypatch.setattr(stream, "BUDGET", 2**25)
    assert linear.in_memory(X, 15) is X
    there = linear.fit_exact(X, y, folds=folds)
    assert there.fit.chosen_strength == here.fit.chosen_strength
    np.testing.assert_allclose(there.validation_logit, here.validation_logit, atol=1e-3)
    # Of 150 fits, 5 are used, and those that choose among the best strengths take as many passes as these.
    assert 60 < there.fit.n_given_up < 146
    assert here.fit.n_given_up == there.fit.n_not_converged == 0
    assert there.fit.max_gradient <= 1e-6


def test_a_strength_is_given_up_only_where_its_loss_no_longer_changes_by_what_it_lacks(monkeypatch):
    fold = np.arange(12) % 3
    held_out = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    masks = np.stack([~np.isin(fold, held) for held in held_out])
    choice = linear._Choice(np.arange(12) // 6, inner=fold, masks=masks, held_out=held_out, strengths=(0.1, 1, 10))
    passes = [
        [[0.6, 0.8, 0.95], [0.5, 0.6, 0.9], [0.7, 0.8, 0.9]],
        [[0.5, 0.6, 0.9], [0.5, 0.6, 0.9], [0.6, 0.7, 0.9]],
        [[0.5, 0.58, 0.9], [0.5, 0.6, 0.9], [0.5, 0.6, 0.8]],  # for fold 2 all change alike, and lack as much as before
        [[0.5, 0.53, 0.9], [0.5, 0.59, 0.5], [0.4, 0.5, 0.7]],
        [[0.5, 0.52, 0.9], [0.5, 0.59, 0.49], [0.4, 0.5, 0.7]],
    ]
    losses = iter(np.array(passes))
    monkeypatch.setattr(choice, "losses", lambda logits: next(losses))
    nothing = np.zeros(0, np.float32)
    assert choice.still_needed(nothing).all()
    assert choice.still_needed(nothing).all()
    needed = choice.still_needed(nothing)
    assert needed[:3].tolist() == [[True, True, False], [True, False, False], [True, False, False]]
    assert needed[3:].tolist() == [[True, True, False], [True, True, False], [False, False, False]]
    choice.possible[1] = True, True, True
    choice.still_needed(nothing)
    assert choice.possible.tolist() == [[True, True, False], [True, False, True], [True, False, False]]
    needed = choice.still_needed(nothing)
    assert needed[3:].tolist() == [[True, True, True], [True, True, False], [True, False, True]]


def test_products_are_full_float32_whatever_was_allowed_before(problem, monkeypatch):
    X, y, masks = problem
    found = precision_inside(monkeypatch, stream, lambda: fit_streamed(X, y, masks=masks, strengths=STRENGTHS))
    assert found == ["highest", "medium"]
