"""Does the paper's probe follow torch's own layers, and is each fold independent of the others?"""

import numpy as np
import pytest
import torch

from probe import paper


def problem(n: int = 80, d: int = 6, n_folds: int = 3):
    rng = np.random.default_rng(0)
    y = (rng.random(n) < 0.3).astype(np.int8)
    X = rng.standard_normal((n, d)).astype(np.float32) + 2 * y[:, None]
    masks = np.arange(n)[None] % n_folds != np.arange(n_folds)[:, None]
    return X, y, masks


@pytest.mark.parametrize("seed", range(20))
def test_steps_equal_torch_adam_on_a_linear_layer(seed):
    """In float64: sums differ in their last digit, 1e-16, which Adam magnifies where a gradient vanishes."""
    X, y, _ = problem()
    recipe = paper.PaperRecipe(learning_rate=0.01, weight_decay=0.1)
    torch.manual_seed(seed)
    layer = torch.nn.Linear(X.shape[1], 2, dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    weights, bias = layer.weight.detach().T[None].clone(), layer.bias.detach()[None, None].clone()
    adam = paper._Adam([weights, bias], recipe)
    for step in range(20):
        rows = slice(8 * (step % 8), 8 * (step % 8) + 8)
        x, target = torch.from_numpy(X[rows]).double(), torch.from_numpy(y[rows].astype(np.int64))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(x), target).backward()
        optimizer.step()
        gradients = paper._gradients(x[None], target[None], weights, bias, [0])
        adam.step([0], gradients, torch.full((1, 1, 1), recipe.learning_rate, dtype=torch.float64))
    torch.testing.assert_close(weights[0].T, layer.weight.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(bias[0, 0], layer.bias.detach(), rtol=0, atol=1e-10)


def test_a_folds_result_does_not_depend_on_the_others():
    X, y, masks = problem()
    recipe = paper.PaperRecipe(learning_rate=1e-2, max_epochs=6)
    together = paper.fit_paper_probe(X, y, masks=masks, seed=1, recipe=recipe)
    first = paper.fit_paper_probe(X, y, masks=masks[:1], seed=1, recipe=recipe)
    np.testing.assert_allclose(together.coef[0], first.coef[0], rtol=1e-5, atol=1e-6)


def test_training_stops_early_and_keeps_the_best_epoch():
    X, y, masks = problem()
    recipe = paper.PaperRecipe(learning_rate=1e-2, patience=3)
    fit = paper.fit_paper_probe(X, y, masks=masks, seed=0, recipe=recipe)
    assert (fit.n_epochs < recipe.max_epochs).all()
    assert (fit.n_epochs - 1 - fit.best_epoch == recipe.patience).all()
    held_out = ~masks[0]
    predicted = X[held_out] @ fit.coef[0] + fit.intercept[0] > 0
    assert (predicted == y[held_out]).mean() > 0.8


def test_weighted_sampling_shows_both_classes_equally_often():
    y = torch.tensor([1] + [0] * 9)
    weight = 1.0 / torch.bincount(y)[y]
    drawn = paper._draw(torch.arange(10), weight, 8, torch.Generator().manual_seed(0))
    many = torch.cat(
        [paper._draw(torch.arange(10), weight, 8, torch.Generator().manual_seed(k)).flatten() for k in range(200)]
    )
    assert drawn.shape == (2, 8)
    assert abs(float((many == 0).float().mean()) - 0.5) < 0.03
