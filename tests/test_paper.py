"""Does the paper's probe follow torch's own layers, and is each fold independent of the others?"""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from probe import paper, schedule


def problem(n: int = 80, d: int = 6, n_folds: int = 3):
    rng = np.random.default_rng(0)
    y = (rng.random(n) < 0.3).astype(np.int8)
    X = rng.standard_normal((n, d)).astype(np.float32) + 2 * y[:, None]
    masks = np.arange(n)[None] % n_folds != np.arange(n_folds)[:, None]
    return X, y, masks


@pytest.mark.parametrize("c", [2, 3])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "distributions"])
def test_a_fold_follows_a_plain_loop_over_torchs_scheduler(c, soft):
    """Same draws, torch's own layer, optimiser and scheduler; weights, stopping and the kept epoch must agree.

    Rows are drawn, and epochs judged, by the label, also where a distribution is learned.
    """
    X, y, masks = problem()
    rng = np.random.default_rng(1)
    y = np.where(rng.random(len(y)) < 0.25, 1 - y, y)  # noisy: accuracies rise and fall
    y = np.where(rng.random(len(y)) < (0.3 if c == 3 else 0), 2, y)
    X[y == 2, 0] += 4
    shares = (0.6 * np.eye(c)[y] + 0.4 * rng.dirichlet(np.ones(c), size=len(y))).astype(np.float32)
    learned = torch.from_numpy(shares if soft else y.astype(np.int64))
    recipe = schedule.PaperRecipe(learning_rate=0.02, weight_decay=0.1, max_epochs=40, patience=8, plateau_patience=2)
    coef, intercept, fit = paper.fit_paper_probe(
        X, y, masks=masks, seeds=[3], recipe=recipe, n_classes=c, target=shares if soft else None
    )
    assert coef.shape == (3, c - 1, X.shape[1])
    assert intercept.shape == (3, c - 1)
    features, target = torch.from_numpy(X), torch.from_numpy(y.astype(np.int64))
    for k, mask in enumerate(masks):
        generator = torch.Generator().manual_seed(3000 + k)
        bound = X.shape[1] ** -0.5
        initial = torch.rand(X.shape[1] + 1, c, generator=generator) * 2 * bound - bound
        layer = torch.nn.Linear(X.shape[1], c)
        layer.load_state_dict({"weight": initial[:-1].T, "bias": initial[-1]})
        optimizer = torch.optim.Adam(layer.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=0.5, patience=2, min_lr=recipe.min_learning_rate
        )
        rows = torch.from_numpy(np.flatnonzero(mask))
        counts = torch.bincount(target[rows])
        best, best_epoch, weight = -1.0, 0, None
        for epoch in range(recipe.max_epochs):
            n_batches = -(-len(rows) // recipe.batch_size)
            drawn = torch.multinomial(1 / counts[target[rows]], n_batches * 8, replacement=True, generator=generator)
            for batch in rows[drawn].split(8):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(layer(features[batch]), learned[batch]).backward()
                optimizer.step()
            predicted = layer(features[~mask]).argmax(dim=1).numpy()
            score = balanced_accuracy_score(y[~mask], predicted)
            scheduler.step(score)
            if score > best:
                best, best_epoch, weight = score, epoch, layer.weight.detach().clone()
            if epoch - best_epoch >= recipe.patience:
                break
        assert (fit.best_epoch[k], fit.n_epochs[k]) == (best_epoch, epoch + 1)
        assert 0 < best_epoch < epoch  # the kept epoch is neither the first nor the last
        np.testing.assert_allclose(coef[k], (weight[1:] - weight[:1]).numpy(), rtol=1e-4, atol=1e-5)


def test_a_folds_result_does_not_depend_on_the_others():
    X, y, masks = problem()
    recipe = schedule.PaperRecipe(learning_rate=1e-2, max_epochs=6)
    together, _, _ = paper.fit_paper_probe(X, y, masks=masks, seeds=[1], recipe=recipe)
    first, _, _ = paper.fit_paper_probe(X, y, masks=masks[:1], seeds=[1], recipe=recipe)
    np.testing.assert_allclose(together[0], first[0], rtol=1e-5, atol=1e-6)


def test_training_stops_early_and_keeps_the_best_epoch():
    X, y, masks = problem()
    recipe = schedule.PaperRecipe(learning_rate=1e-2, patience=3)
    coef, intercept, fit = paper.fit_paper_probe(X, y, masks=masks, seeds=[0], recipe=recipe)
    assert max(fit.n_epochs) < recipe.max_epochs
    assert (np.subtract(fit.n_epochs, fit.best_epoch) - 1 == recipe.patience).all()
    held_out = ~masks[0]
    predicted = X[held_out] @ coef[0, 0] + intercept[0, 0] > 0
    assert (predicted == y[held_out]).mean() > 0.8


def test_weighted_sampling_shows_both_classes_equally_often():
    y = torch.tensor([1] + [0] * 9)
    drawn = paper.draw_batches(torch.arange(10), y, batch_size=8, generator=torch.Generator().manual_seed(0))
    many = torch.cat(
        [
            paper.draw_batches(torch.arange(10), y, batch_size=8, generator=torch.Generator().manual_seed(k)).flatten()
            for k in range(200)
        ]
    )
    assert drawn.shape == (2, 8)
    assert abs(float((many == 0).float().mean()) - 0.5) < 0.03
