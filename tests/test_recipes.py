"""Do learning rates, best epochs and early stopping follow from a fold's history as torch and the recipes say?"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from features.console import UserError
from finetune.recipes import RATES, RECIPES, Recipe, learning_rate, recipe_for
from probe.schedule import best_epoch, should_stop

PAPER, DEFAULT = RECIPES["paper"], RECIPES["default"]


def plateau_rate(scores: list[float], recipe: Recipe) -> float:
    """The rate of any batch of the next epoch."""
    return learning_rate(scores, recipe, batch=0, n_batches=1)


def torchs_rates(scheduler: ReduceLROnPlateau, figures: list[float], *, start: float) -> list[float]:
    """The rate after each figure, as torch's scheduler sets it, begun anew."""
    (group,) = scheduler.optimizer.param_groups
    scheduler._reset()
    group["lr"] = start
    rates = []
    for figure in figures:
        scheduler.step(figure)
        rates.append(group["lr"])
    return rates


@pytest.mark.parametrize("seed", range(20))
def test_the_plateau_rate_is_that_of_torchs_scheduler(seed: int) -> None:
    rng = np.random.default_rng(seed)
    recipe = replace(
        PAPER,
        learning_rate=float(10 ** rng.uniform(-5, -1)),
        plateau_factor=float(rng.uniform(0.1, 0.9)),
        plateau_patience=int(rng.integers(0, 5)),
        min_learning_rate=float(10 ** rng.uniform(-9, -6)),
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate)
    chosen = {"factor": recipe.plateau_factor, "patience": recipe.plateau_patience, "min_lr": recipe.min_learning_rate}
    scheduler = ReduceLROnPlateau(optimizer, mode="max", **chosen)
    figures = (rng.integers(0, 8, size=100) / 8).tolist()  # coarse, so that many are equal
    ours = [plateau_rate(figures[: epoch + 1], recipe) for epoch in range(len(figures))]
    assert ours == torchs_rates(scheduler, figures, start=recipe.learning_rate)


def test_the_papers_schedule_is_torchs_with_its_defaults_on_two_thousand_trainings() -> None:
    """Balanced accuracies of a wandering classifier on 116 atypical and 449 normal figures."""
    rng = np.random.default_rng(0)
    drift = np.cumsum(rng.normal(0, 0.035, (2000, 25)), axis=1)
    hits = [rng.binomial(n, 1 / (1 + np.exp(-(logit + drift)))) / n for n, logit in ((116, 0.8), (449, 1.0))]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PAPER.learning_rate)
    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=3, min_lr=1e-7)
    without = replace(PAPER, plateau_threshold=0.0)
    n_other = 0
    for figures in np.mean(hits, axis=0).tolist():
        theirs = torchs_rates(scheduler, figures, start=PAPER.learning_rate)
        assert [plateau_rate(figures[: epoch + 1], PAPER) for epoch in range(25)] == theirs
        n_other += plateau_rate(figures, without) != theirs[-1]
    assert n_other > 0, "a schedule without torch's threshold must differ on some"


def test_the_papers_rate_halves_after_the_fourth_bad_epoch_and_stays_above_its_floor() -> None:
    assert plateau_rate([], PAPER) == 1e-4
    assert plateau_rate([0.7, 0.7, 0.6, 0.7], PAPER) == 1e-4
    assert plateau_rate([0.7, 0.7, 0.6, 0.7, 0.5], PAPER) == 5e-5
    assert plateau_rate([0.5] * 100, PAPER) == 1e-7


def test_a_rate_below_the_floor_never_rises() -> None:
    recipe = replace(PAPER, learning_rate=1e-8)
    assert plateau_rate([0.5] * 20, recipe) == 1e-8


def test_the_plateau_rate_is_the_same_for_all_batches_of_an_epoch() -> None:
    past = [0.7, 0.7, 0.6, 0.7, 0.5]
    assert {learning_rate(past, PAPER, batch=batch, n_batches=7) for batch in range(7)} == {5e-5}


@pytest.mark.parametrize("warmup", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("n_batches", [1, 9])
def test_the_cosine_rate_rises_to_its_peak_and_falls_to_nearly_nothing(warmup: float, n_batches: int) -> None:
    recipe = replace(DEFAULT, epochs=12, warmup=warmup)
    rates = np.array(
        [
            learning_rate([0.5] * epoch, recipe, batch=batch, n_batches=n_batches)
            for epoch in range(recipe.epochs)
            for batch in range(n_batches)
        ]
    )
    at = (np.arange(len(rates)) + 0.5) / n_batches
    assert (rates > 0).all()
    assert rates.max() <= recipe.learning_rate
    assert (np.diff(rates[at < warmup]) > 0).all()
    assert (np.diff(rates[at >= warmup]) < 0).all()
    assert rates[-1] < 0.01 * recipe.learning_rate
    halfway = (recipe.epochs + warmup) / 2
    assert np.interp(halfway, at, rates) == pytest.approx(recipe.learning_rate / 2, rel=0.02)


def test_the_cosine_rate_does_not_look_at_the_figures() -> None:
    rates = {learning_rate(figures, DEFAULT, batch=2, n_batches=5) for figures in ((0.9, 0.1), (0.1, 0.9))}
    assert len(rates) == 1


def test_one_epoch_is_a_whole_cosine() -> None:
    recipe = replace(DEFAULT, epochs=1)
    rates = [learning_rate([], recipe, batch=batch, n_batches=100) for batch in range(100)]
    assert max(rates) == pytest.approx(recipe.learning_rate, rel=0.01)
    assert rates[-1] < 1e-3 * recipe.learning_rate


def test_the_first_of_equally_good_epochs_is_the_best() -> None:
    assert best_epoch([]) == -1
    assert best_epoch([0.5]) == 0
    assert best_epoch([0.5, 0.8, 0.7, 0.8, 0.8]) == 1


def test_our_recipe_keeps_the_last_epoch_and_the_papers_the_best() -> None:
    scores = [0.5, 0.8, 0.7]
    assert (DEFAULT.kept_epoch(scores), RECIPES["paper"].kept_epoch(scores)) == (2, 1)
    before = {name: value for name, value in asdict(DEFAULT).items() if name != "keep"}
    assert Recipe.from_record(before).keep == "best", "as recipes did before they said it"


def test_a_cosine_is_never_stopped_early() -> None:
    worse_and_worse = [0.9 - 0.01 * epoch for epoch in range(40)]
    longer = replace(DEFAULT, epochs=50)
    assert not should_stop(worse_and_worse, patience=longer.patience, max_epochs=longer.epochs)


def test_a_fold_stops_when_its_patience_or_its_epochs_end() -> None:
    assert not should_stop([], patience=2, max_epochs=6)
    assert not should_stop([0.5, 0.6, 0.6], patience=2, max_epochs=6)
    assert should_stop([0.5, 0.6, 0.6, 0.6], patience=2, max_epochs=6)
    assert not should_stop([0.5, 0.6, 0.6, 0.7, 0.8], patience=2, max_epochs=6)
    assert should_stop([0.5, 0.6, 0.6, 0.7, 0.8, 0.9], patience=2, max_epochs=6)


def test_the_papers_recipe_is_the_papers_text() -> None:
    assert (PAPER.optimizer, PAPER.learning_rate, PAPER.weight_decay, PAPER.batch_size) == ("adam", 1e-4, 1e-5, 8)
    assert (PAPER.epochs, PAPER.patience, PAPER.schedule, PAPER.view) == (100, 15, "plateau", "full@224+imagenet")
    assert (PAPER.plateau_factor, PAPER.plateau_patience, PAPER.min_learning_rate) == (0.5, 3, 1e-7)


@pytest.mark.parametrize(("method", "convolutional"), RATES)
def test_our_recipe_takes_its_rate_from_method_and_backbone_and_the_papers_does_not(method, convolutional) -> None:
    ours = recipe_for("default", method=method, convolutional=convolutional)
    assert ours == replace(DEFAULT, learning_rate=RATES[method, convolutional])
    assert recipe_for("paper", method=method, convolutional=convolutional) == PAPER


@pytest.mark.parametrize(
    ("method", "model", "view", "patience", "rotation", "scale", "saturation", "hue"),
    [
        ("lora", "uni", "full@224+imagenet", 10, 15, (0.08, 1), 0, 0),
        ("lora", "prov-gigapath", "full@224+imagenet", 10, 15, (0.08, 1), 0, 0),
        ("lora", "h-optimus-0", "full@224", 10, 15, (0.08, 1), 0, 0),
        ("lora", "h-optimus-1", "full@224", 10, 15, (1, 1), 0, 0),
        ("lora", "virchow", "full@224+half", 10, 0, (0.8, 1), 0.2, 0.1),
        ("lora", "virchow2", "full@224+half", 10, 0, (0.8, 1), 0.2, 0.1),
        ("full", "vit-l", "full@224+imagenet", 15, 10, (0.8, 1), 0.2, 0.1),
        ("full", "swin-b", "full@224+imagenet", 15, 10, (0.8, 1), 0.2, 0.1),
    ],
)
def test_the_authors_recipe_is_that_of_their_scripts(
    method, model, view, patience, rotation, scale, saturation, hue
) -> None:
    """As published: docs/protocol.md has the table."""
    recipe = recipe_for("authors", method=method, model=model, convolutional=False)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.batch_size, recipe.epochs) == (5e-5, 1e-5, 8, 100)
    assert (recipe.view, recipe.patience) == (view, patience)
    assert recipe.augment is not None
    changes = (recipe.augment.rotation, recipe.augment.scale, recipe.augment.saturation, recipe.augment.hue)
    assert changes == (rotation, scale, saturation, hue)
    flips = (recipe.augment.flip, recipe.augment.flip_vertical)
    assert (flips, recipe.augment.brightness, recipe.augment.contrast) == ((0.5, 0), 0.2, 0.2)


def test_the_authors_uni2_h_is_not_augmented_and_seen_as_its_card_says() -> None:
    recipe = recipe_for("authors", method="lora", model="uni2-h", convolutional=False)
    assert (recipe.view, recipe.augment, recipe.patience) == ("full", None, 10)


@pytest.mark.parametrize(("method", "model"), [("head", "uni"), ("full", "uni"), ("lora", "h0-mini")])
def test_what_the_authors_published_no_script_of_is_refused(method: str, model: str) -> None:
    with pytest.raises(UserError, match=rf"no script for {model} by `method='{method}'`; .*uni.*`recipe='paper'`"):
        recipe_for("authors", method=method, model=model, convolutional=False)


@pytest.mark.parametrize("recipe", [PAPER, DEFAULT, replace(PAPER, augment=None, plateau_threshold=0.5)])
def test_a_recipe_comes_back_from_its_record(recipe: Recipe) -> None:
    assert Recipe.from_record(json.loads(json.dumps(asdict(recipe)))) == recipe


def test_a_record_from_before_thresholds_and_statistics_in_views_keeps_its_schedule_and_its_images() -> None:
    record = json.loads(json.dumps(asdict(PAPER))) | {"view": "full", "statistics": "imagenet"}
    del record["plateau_threshold"]
    recipe = Recipe.from_record(record)
    assert (recipe.view, recipe.statistics, recipe.plateau_threshold) == ("full", "imagenet", 0)


@pytest.mark.parametrize(("epochs", "warmup", "n_batches"), [(7, 1.5, 3), (5, 0.3, 4), (3, 0.0, 5)])
def test_the_cosine_rate_at_the_middle_of_every_batch(epochs: int, warmup: float, n_batches: int) -> None:
    recipe = replace(DEFAULT, epochs=epochs, warmup=warmup, learning_rate=0.3)
    for epoch in range(epochs):
        for batch in range(n_batches):
            at = epoch + (batch + 0.5) / n_batches
            expected = (
                0.3 * at / warmup if at < warmup else 0.3 * np.cos(np.pi / 2 * (at - warmup) / (epochs - warmup)) ** 2
            )
            found = learning_rate([0.5] * epoch, recipe, batch=batch, n_batches=n_batches)
            assert found == pytest.approx(expected, rel=1e-9)


def test_the_plateau_falls_by_its_own_factor_after_its_own_patience_again_and_again() -> None:
    recipe = replace(PAPER, learning_rate=1.0, plateau_factor=0.1, plateau_patience=1, min_learning_rate=0.005)
    figures = [0.6, 0.6, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.8, 0.7, 0.7]
    expected = [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.005, 0.005, 0.005, 0.005]
    found = [plateau_rate(figures[:epoch], recipe) for epoch in range(len(figures))]
    assert found == pytest.approx(expected)


def test_an_improvement_starts_patience_anew_and_an_equal_figure_does_not() -> None:
    assert not should_stop([0.5, 0.6, 0.5, 0.5], patience=3, max_epochs=99)
    assert should_stop([0.5, 0.6, 0.6, 0.6, 0.6], patience=3, max_epochs=99)
    assert not should_stop([0.5, 0.6, 0.5, 0.5, 0.61], patience=3, max_epochs=99)
    assert not should_stop([0.5, 0.6, 0.5, 0.5, 0.61, 0.6, 0.6], patience=3, max_epochs=99)
    assert should_stop([0.5, 0.6, 0.5, 0.5, 0.61, 0.6, 0.6, 0.61], patience=3, max_epochs=99)
