"""Does training all folds at once give what training each alone, written out plainly, would?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from test_network import CNN, VIT, backbone_model, stirred, tiny_network
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import ReduceLROnPlateau

from extract.registry import IMAGENET_MEAN, IMAGENET_STD
from extract.views import Transform
from features.console import UserError
from features.folds import FoldModel, Folds, fold_models
from finetune import compute as computing
from finetune import train as training
from finetune.augment import AugmentOptions, augment
from finetune.checkpoint import State, load_state, save_state
from finetune.compute import Compute
from finetune.lora import LoraOptions
from finetune.network import Method, Network
from finetune.recipes import Recipe
from finetune.score import patch_logits
from finetune.train import TrainingSet, new_state, train, validation_logits
from probe.records import EpochRecord
from probe.schedule import best_epoch

N_FOLDS = 3
SEED = 42
CPU = torch.device("cpu")
PLAIN = LoraOptions(rank=2, alpha=4, dropout=0.0)
DROPPING = replace(PLAIN, dropout=0.4)
TRANSFORM = Transform(None, 32, 32, "bicubic", IMAGENET_MEAN, IMAGENET_STD)
# Rates are high, so that weights move far in few steps.
RECIPE = Recipe(
    view="full",
    epochs=4,
    batch_size=4,
    learning_rate=2e-2,
    weight_decay=0.1,
    optimizer="adamw",
    schedule="cosine",
    warmup=0.5,
    augment=AugmentOptions(),
)
PLATEAU = replace(
    RECIPE, optimizer="adam", weight_decay=1e-3, schedule="plateau", plateau_patience=0, min_learning_rate=1e-3
)
# Differences of the order in which float64 sums are formed: 1e-15 of a gradient. A step of Adam is at most
# lr / eps = 2e-2 / 1e-8 = 2e6 times as much, and there are some sixteen. A wrong gradient moves a value by 2e-2.
TIGHT = {"rtol": 1e-6, "atol": 1e-6}


def patches(dtype: torch.dtype = torch.float64, *, n_classes: int = 2, voted: bool = False) -> TrainingSet:
    """Twenty patches in three folds of unequal size; the positive third is a little brighter. Bytes, or float64.

    Of three classes, each is a third. With `voted`, a quarter of the votes are not for the label.
    """
    rng = np.random.default_rng(0)
    label = (np.arange(20) % 3 == 0).astype(np.int64) if n_classes == 2 else np.arange(20) % n_classes
    fold = np.repeat([0, 1, 2], [5, 7, 8])
    pixels = rng.integers(0, 200, (20, 3, 32, 32)) + 15 * label[:, None, None, None]
    return TrainingSet(
        pixels=torch.from_numpy(pixels).to(torch.uint8).to(dtype),
        label=torch.from_numpy(label),
        folds=Folds(fold=fold, n_folds=N_FOLDS, source="by hand", digest=""),
        transform=TRANSFORM,
        target=(torch.eye(n_classes)[label] * 0.75 + torch.eye(n_classes)[label - 1] * 0.25) if voted else None,
    )


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features in float64, which extraction rounds to float32: then only the order of sums is left to differ."""

    def embed(model: Any, backbone: object, images: Tensor) -> dict[str, Tensor]:
        features = model.forward_features(images)
        return {"cls": features[:, 0]} if features.ndim == 3 else {"pooled": model.forward_head(features, True)}

    monkeypatch.setattr("finetune.network.forward_poolings", embed)


def nothing(*_: object) -> None:
    """For a checkpoint that is not kept, and for progress that nobody watches."""


def trained(
    network: Network,
    recipe: Recipe = RECIPE,
    *,
    data: TrainingSet | None = None,
    only: Sequence[int] | None = None,
    at_once: int = N_FOLDS,
    save: Callable[[State], None] = nothing,
    seed: int = SEED,
) -> State:
    """Train to the end; `only` some folds, the others being finished before they begin."""
    network.fold_models = fold_models([seed], N_FOLDS)
    state = new_state(network)
    for fold in set(network.members) - set(network.members if only is None else only):
        state.history[fold] = [EpochRecord(0.7, 0.5, 0.5, 0.0)] * recipe.epochs
    compute = Compute(CPU, "fp32", at_once)
    data = patches(network.values.dtype) if data is None else data
    train(network, data, recipe, state=state, compute=compute, save=save, advance=nothing)
    return state


def double(method: Method = "lora", lora: LoraOptions = PLAIN, **options: Any) -> Network:
    return tiny_network(method, lora=lora, dtype=torch.float64, **options)


# ------------------------------------------------------------------------------------------------ all folds as if alone


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("lora", [PLAIN, DROPPING], ids=["plain", "dropout"])
@pytest.mark.parametrize("recipe", [RECIPE, PLATEAU], ids=["cosine", "plateau"])
def test_folds_trained_at_once_end_as_each_trained_alone(recipe: Recipe, lora: LoraOptions) -> None:
    together = trained(double(lora=lora), recipe)
    for fold in range(N_FOLDS):
        network = double(lora=lora)
        start = network.values.clone()
        alone = trained(network, recipe, only=[fold])
        assert (alone.values[fold] - start[fold]).abs().max() > 0.01
        torch.testing.assert_close(together.values[fold], alone.values[fold], **TIGHT)
        torch.testing.assert_close(together.best[fold], alone.best[fold], **TIGHT)
        assert together.n_steps[fold] == alone.n_steps[fold]
        for one, other in zip(together.history[fold], alone.history[fold], strict=True):
            assert astuple(one) == pytest.approx(astuple(other), rel=1e-6)
        others = [k for k in range(N_FOLDS) if k != fold]
        assert torch.equal(alone.values[others], start[others])


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("lora", [PLAIN, DROPPING], ids=["plain", "dropout"])
def test_any_number_of_folds_at_once_gives_the_same(lora: LoraOptions) -> None:
    expected = trained(double(lora=lora), at_once=N_FOLDS)
    for at_once in (1, 2):
        found = trained(double(lora=lora), at_once=at_once)
        torch.testing.assert_close(found.values, expected.values, **TIGHT)
        torch.testing.assert_close(found.moments, expected.moments, **TIGHT)
        assert found.n_images == expected.n_images


@pytest.mark.usefixtures("exact")
def test_folds_trained_side_by_side_end_with_the_same_bits() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = trained(tiny_network(), at_once=1)
        torch.set_num_threads(2)
        two = trained(tiny_network(), at_once=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.values, two.values)
    assert one.history == two.history


def test_classifiers_alone_train_at_once_as_each_alone() -> None:
    together = trained(double("head"))
    for fold in range(N_FOLDS):
        alone = trained(double("head", folds=[fold]))
        torch.testing.assert_close(together.values[fold], alone.values[0], **TIGHT)


@pytest.mark.usefixtures("exact")
def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    first, again, other = (trained(double(lora=DROPPING), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.values, again.values)
    assert first.history == again.history
    assert not torch.allclose(first.values, other.values)


def test_bytes_train_in_float32_as_well() -> None:
    expected = trained(tiny_network(lora=DROPPING), data=patches(torch.uint8))
    found = trained(tiny_network(lora=DROPPING), data=patches(torch.uint8), at_once=1)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("exact")
def test_a_stopped_fold_leaves_the_batch() -> None:
    recipe = replace(PLATEAU, epochs=8, patience=2)
    saved: list[State] = []

    def save(state: State) -> None:
        history = {fold: list(own) for fold, own in state.history.items()}
        saved.append(replace(state, values=state.values.clone(), moments=state.moments.clone(), history=history))

    seen: list[tuple[int, ...]] = []
    network = double(lora=DROPPING)
    network.register_forward_pre_hook(
        lambda _, given, options: seen.append(tuple(given[1])) if options else None, with_kwargs=True
    )
    together = trained(network, recipe, save=save)
    n_epochs = {fold: len(own) for fold, own in together.history.items()}
    assert len(set(n_epochs.values())) > 1, "the folds of this example must stop at different times"
    assert min(n_epochs.values()) < recipe.epochs
    for fold, n in n_epochs.items():
        at_its_end = saved[n - 1]
        assert torch.equal(together.values[fold], at_its_end.values[fold])
        assert torch.equal(together.moments[fold], at_its_end.moments[fold])
        n_batches = training.draw_epoch(patches(), FoldModel(SEED, fold), recipe, epoch=0).n_batches
        assert together.n_steps[fold] == n * n_batches == sum(fold in folds for folds in seen)
        alone = trained(double(lora=DROPPING), recipe, only=[fold])
        assert len(alone.history[fold]) == n
        torch.testing.assert_close(together.values[fold], alone.values[fold], **TIGHT)


# -------------------------------------------------------------------------------------------------- written out plainly


@dataclass
class Reference:
    """One fold, trained by a plain loop over one network whose adapters are added to its weights."""

    values: dict[str, Tensor]
    best: dict[str, Tensor]
    figures: list[tuple[float, float, float]]  # loss, balanced accuracy, AUROC
    rates: list[float]


def reference(network: Network, fold: int, recipe: Recipe, data: TrainingSet | None = None) -> Reference:
    data = patches() if data is None else data
    backbone = backbone_model(VIT, torch.float64)
    adapted = dict(network.model.named_modules())
    values = {"head.weight": network.weight[fold], "head.bias": network.bias[fold]}
    for name in network.adapted:
        values |= {f"{name}.A": adapted[name].A[fold], f"{name}.B": adapted[name].B[fold]}
    values = {name: nn.Parameter(value.detach().clone()) for name, value in values.items()}
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    optimizer = kind(values.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    plateau = ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=recipe.plateau_factor,
        patience=recipe.plateau_patience,
        threshold=0,
        min_lr=recipe.min_learning_rate,
    )

    def logits(pixels: Tensor) -> Tensor:
        mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
        changed = {
            f"{name}.weight": backbone.get_submodule(name).weight + 2 * values[f"{name}.B"] @ values[f"{name}.A"]
            for name in network.adapted
        }
        features = functional_call(backbone, changed, ((pixels - mean) / std,))
        return F.linear(features, values["head.weight"], values["head.bias"])

    held_out, label = data.folds.fold == fold, data.label
    target = label if data.target is None else data.target
    found = Reference({}, {}, [], [])
    for epoch in range(recipe.epochs):
        plan = training.draw_epoch(data, FoldModel(SEED, fold), recipe, epoch=epoch)
        losses = []
        for batch, rows in enumerate(plan.rows):
            if recipe.schedule == "cosine":
                at = epoch + (batch + 0.5) / len(plan.rows)
                progress = (at - recipe.warmup) / (recipe.epochs - recipe.warmup)
                factor = at / recipe.warmup if at < recipe.warmup else (1 + np.cos(np.pi * progress)) / 2
                optimizer.param_groups[0]["lr"] = recipe.learning_rate * factor
            found.rates.append(optimizer.param_groups[0]["lr"])
            pixels = data.pixels[rows] / 255
            if recipe.augment is not None:
                assert plan.draws is not None
                pixels = augment(pixels, plan.draws[batch], size=32, options=recipe.augment)
            loss = F.cross_entropy(logits(pixels), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            probability = logits(data.pixels[held_out] / 255).softmax(dim=1)
        judged = balanced_accuracy_score(label[held_out], probability.argmax(dim=1))
        score = probability if probability.shape[1] > 2 else probability[:, 1]
        auroc = roc_auc_score(label[held_out], score, multi_class="ovr")
        found.figures.append((float(np.mean(losses)), judged, auroc))
        plateau.step(judged)
        found.values = {name: value.detach().clone() for name, value in values.items()}
        if judged > max([figure for _, figure, _ in found.figures[:-1]], default=-1.0):
            found.best = found.values
    return found


def of_row(network: Network, row: Tensor, fold: int) -> dict[str, Tensor]:
    """A fold's trained values by name, when its row holds them."""
    network.values[fold] = row
    adapted = dict(network.model.named_modules())
    found = {"head.weight": network.weight[fold], "head.bias": network.bias[fold]}
    for name in network.adapted:
        found |= {f"{name}.A": adapted[name].A[fold], f"{name}.B": adapted[name].B[fold]}
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("recipe", [RECIPE, PLATEAU, replace(RECIPE, augment=None)], ids=["adamw", "adam", "as-it-is"])
def test_a_fold_ends_as_in_a_plain_loop(recipe: Recipe) -> None:
    fold = 1
    expected = reference(double(), fold, recipe)
    network = double()
    state = trained(network, recipe)
    history = state.history[fold]
    for epoch, figures in zip(history, expected.figures, strict=True):
        assert (epoch.loss, epoch.balanced_accuracy, epoch.auroc) == pytest.approx(figures, rel=1e-5)
    n_batches = len(expected.rates) // len(history)
    midway = expected.rates[n_batches // 2 :: n_batches]
    assert [epoch.learning_rate for epoch in history] == pytest.approx(midway)
    if recipe.schedule == "plateau":
        assert len(set(expected.rates)) > 1, "the rate of this example must fall"
    for row, plain in ((state.values[fold], expected.values), (state.best[fold], expected.best)):
        for name, value in of_row(network, row.clone(), fold).items():
            # Means and deviations of colours are float32, so pixels differ by 1e-8, which steps of Adam magnify.
            torch.testing.assert_close(
                value, plain[name], rtol=1e-4, atol=1e-5, msg=lambda said, name=name: name + said
            )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("n_classes", "voted"), [(2, True), (3, False), (3, True)])
def test_a_fold_of_any_classes_trained_on_labels_or_votes_ends_as_in_a_plain_loop(n_classes: int, voted: bool) -> None:
    fold, data = 1, patches(n_classes=n_classes, voted=voted)
    expected = reference(double(n_classes=n_classes), fold, RECIPE, data)
    network = double(n_classes=n_classes)
    state = trained(network, RECIPE, data=data)
    for epoch, figures in zip(state.history[fold], expected.figures, strict=True):
        assert (epoch.loss, epoch.balanced_accuracy, epoch.auroc) == pytest.approx(figures, rel=1e-5)
    for name, value in of_row(network, state.best[fold].clone(), fold).items():
        torch.testing.assert_close(value, expected.best[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("exact")
def test_full_training_ends_as_in_a_plain_loop() -> None:
    fold, recipe, data = 2, replace(RECIPE, learning_rate=1e-3), patches()
    network = tiny_network("full", CNN, folds=[fold], dtype=torch.float64)
    model = backbone_model(CNN, torch.float64).requires_grad_(True)
    head = nn.Linear(256, 2).double()
    head.load_state_dict({"weight": network.weight[0], "bias": network.bias[0]})
    state = trained(network, recipe)

    optimizer = torch.optim.AdamW(
        [*model.parameters(), *head.parameters()], lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    for epoch in range(recipe.epochs):
        plan = training.draw_epoch(data, FoldModel(SEED, fold), recipe, epoch=epoch)
        assert plan.draws is not None
        model.train()
        for batch, (rows, draws) in enumerate(zip(plan.rows, plan.draws, strict=True)):
            rate = training.learning_rate([0.5] * epoch, recipe, batch=batch, n_batches=plan.n_batches)
            optimizer.param_groups[0]["lr"] = rate
            pixels = augment(data.pixels[rows] / 255, draws, size=32, options=AugmentOptions())
            loss = F.cross_entropy(head(model(TRANSFORM.normalise(255 * pixels))), data.label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.values.copy_(state.values)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(
            network.model.state_dict()[name], expected, rtol=1e-4, atol=1e-5, msg=lambda said, name=name: name + said
        )
    torch.testing.assert_close(network.weight[0], head.weight, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- sampling and judging


def test_only_training_rows_are_drawn_and_classes_about_equally_often() -> None:
    data = patches(torch.uint8)
    for fold in range(N_FOLDS):
        plans = [training.draw_epoch(data, FoldModel(SEED, fold), RECIPE, epoch=epoch) for epoch in range(60)]
        drawn = torch.cat([plan.rows.flatten() for plan in plans])
        assert set(drawn.tolist()) == set(np.flatnonzero(data.folds.fold != fold).tolist())
        assert data.label[drawn].double().mean() == pytest.approx(0.5, abs=0.06)  # about four standard errors
        # Within a class every patch is as likely as another.
        for value in (0, 1):
            counts = torch.bincount(drawn[data.label[drawn] == value])
            counts = counts[counts > 0].double()
            assert ((counts - counts.mean()).abs() < 5 * counts.mean().sqrt()).all()


def test_an_epoch_draws_as_many_patches_as_the_fold_trains_on_in_whole_batches() -> None:
    data = patches(torch.uint8)
    for fold, n_batches in enumerate([4, 4, 3]):  # of 15, 13 and 12 patches, four at a time
        plan = training.draw_epoch(data, FoldModel(SEED, fold), RECIPE, epoch=0)
        assert plan.rows.shape == (n_batches, 4)
        assert plan.draws is not None
        assert plan.draws.shape[:2] == (n_batches, 4)
    assert training.draw_epoch(data, FoldModel(SEED, 0), replace(RECIPE, augment=None), epoch=0).draws is None


def test_what_a_fold_sees_depends_on_seed_fold_and_epoch() -> None:
    data = patches(torch.uint8)

    def seen(fold: int, seed: int, epoch: int) -> tuple[Any, ...]:
        plan = training.draw_epoch(data, FoldModel(seed, fold), RECIPE, epoch=epoch)
        assert plan.draws is not None
        return (*plan.rows.flatten().tolist(), *plan.draws.flatten().tolist())

    keys = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]
    assert len({seen(*key) for key in keys}) == len(keys)
    assert seen(0, 1, 0) == seen(0, 1, 0)


@pytest.mark.parametrize("method", ["lora", "head"])
def test_the_kept_rows_are_those_of_the_best_epoch(method: Method) -> None:
    rows: list[Tensor] = []
    state = trained(
        tiny_network(method), replace(RECIPE, epochs=6), save=lambda state: rows.append(state.values.clone())
    )
    for fold in range(N_FOLDS):
        assert torch.equal(state.best[fold], rows[best_epoch(state.scores(fold))][fold])
    assert len({best_epoch(state.scores(fold)) for fold in state.history} | {5}) > 1, "not all may be the last epoch"


def test_a_full_networks_kept_row_holds_the_running_statistics_of_its_best_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[Tensor] = []
    network = tiny_network("full", CNN, folds=[1])
    recipe = replace(RECIPE, epochs=5, learning_rate=0.3)
    scores = iter([0.5, 0.6, 0.9, 0.7, 0.8])
    monkeypatch.setattr(training, "judge_logits", lambda *_: (next(scores), 0.5))
    state = trained(network, recipe, save=lambda state: rows.append(state.values.clone()))
    best = best_epoch(state.scores(1))
    assert best == 2
    assert not torch.equal(rows[2], rows[4])
    assert torch.equal(state.best[0], rows[best][0])


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_every_fold_is_judged_on_its_own_patches_under_its_own_weights(at_once: int) -> None:
    network, data = stirred(tiny_network()), patches(torch.uint8)
    found = validation_logits(network, data, range(N_FOLDS), compute=Compute(CPU, "fp32", at_once))
    for fold, own in found.items():
        held_out = np.flatnonzero(data.folds.fold == fold)
        with torch.no_grad():
            expected = network(TRANSFORM.normalise(data.pixels[held_out]), [fold])[0].diff(dim=1)[:, 0]
        np.testing.assert_allclose(own[:, 0], expected.numpy(), rtol=1e-4, atol=1e-6)


def test_validation_takes_any_number_of_patches_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    network, data, compute = stirred(tiny_network()), patches(torch.uint8), Compute(CPU, "fp32", N_FOLDS)
    expected = validation_logits(network, data, range(N_FOLDS), compute=compute)
    monkeypatch.setitem(training.EVALUATION_BATCH, "cpu", 5)
    found = validation_logits(network, data, range(N_FOLDS), compute=compute)
    for fold, own in found.items():
        np.testing.assert_allclose(own, expected[fold], rtol=1e-4, atol=1e-6)


def test_training_learns_what_can_be_learned() -> None:
    data = patches(torch.uint8)
    data.pixels[data.label == 1] = 255 - data.pixels[data.label == 1] // 4
    state = trained(tiny_network(), replace(RECIPE, epochs=6, learning_rate=5e-3), data=data)
    assert all(max(state.scores(fold)) > 0.9 for fold in state.history)
    assert all(history[-1].loss < history[0].loss for history in state.history.values())


# -------------------------------------------------------------------------------------------------------- when it fails


def test_a_loss_that_is_not_finite_ends_training_with_fold_epoch_and_remedy() -> None:
    saved: list[State] = []

    def save(state: State) -> None:
        saved.append(state)
        if len(saved) == 2:
            state.values[1].fill_(float("nan"))

    message = r"fold 1 is not finite in epoch 3.*0\.02.*checkpoint of the epoch before.*`learning_rate`.*fp32"
    with pytest.raises(UserError, match=message):
        trained(tiny_network(), save=save)
    assert len(saved) == 2


def test_a_loss_that_is_not_finite_at_once_promises_no_checkpoint() -> None:
    network, saved = tiny_network(), []
    network.values[2].fill_(float("nan"))
    with pytest.raises(UserError, match=r"fold 2 is not finite in epoch 1.*`learning_rate`") as refusal:
        trained(network, save=saved.append)
    assert "checkpoint" not in str(refusal.value)
    assert not saved


def test_weights_that_the_last_step_of_an_epoch_breaks_are_not_saved() -> None:
    network, saved = tiny_network(), []
    recipe = replace(RECIPE, epochs=1, augment=None)
    gather = network.gather_gradients
    n_batches = training.draw_epoch(patches(), FoldModel(SEED, 0), recipe, epoch=0).n_batches

    def broken() -> None:
        gather()
        nonlocal n_batches
        n_batches -= 1
        if n_batches == 0:
            network.gradients[0] = float("inf")

    network.gather_gradients = broken  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"fold 0.*not finite"):
        trained(network, recipe, save=saved.append)
    assert not saved


class SmallMemory:
    """Lets a forward pass hold so many folds, with and without checkpointed gradients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, plain: int, checkpointed: int) -> None:
        self.seen: list[tuple[int, bool]] = []
        forward = Network.forward

        def limited(network: Network, images: Tensor, folds: Sequence[int], *, step: int | None = None) -> Tensor:
            if step is not None:
                saving = bool(getattr(network.model, "grad_checkpointing", False))
                self.seen.append((len(folds), saving))
                if len(folds) > (checkpointed if saving else plain):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.14 GiB.")
            return forward(network, images, folds, step=step)

        monkeypatch.setattr(Network, "forward", limited)


@pytest.mark.usefixtures("exact")
def test_memory_running_out_halves_the_folds_at_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = trained(double(lora=DROPPING))
    memory = SmallMemory(monkeypatch, plain=1, checkpointed=1)
    found = trained(double(lora=DROPPING))
    torch.testing.assert_close(found.values, expected.values, **TIGHT)
    torch.testing.assert_close(found.best, expected.best, **TIGHT)
    assert found.n_images == expected.n_images
    assert found.n_steps == expected.n_steps
    sizes = [n for n, _ in memory.seen]
    assert sizes[0] == 3
    # Groups train side by side, one per thread: of (two folds, one) either may come first.
    assert (sizes.count(3), sizes.count(2), set(sizes)) == (1, 1, {1, 2, 3})  # what did not fit is not tried again
    said = capsys.readouterr().err
    assert said.splitlines() == [
        "out of memory on cpu; going on with 2 folds at once.",
        "out of memory on cpu; going on with 1 folds at once.",
    ]


@pytest.mark.usefixtures("exact")
def test_memory_that_cannot_hold_one_fold_checkpoints_gradients_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = trained(double(lora=DROPPING))
    memory = SmallMemory(monkeypatch, plain=0, checkpointed=1)
    found = trained(double(lora=DROPPING))
    torch.testing.assert_close(found.values, expected.values, **TIGHT)
    assert [one for one in memory.seen if one[0] > 1] == [(3, False), (2, False)]
    # Groups train side by side, one per thread: of (two folds, one) the one, then each of three, may meet the limit.
    assert 1 <= memory.seen.count((1, False)) <= 4
    assert "gradient checkpointing" in capsys.readouterr().err


@pytest.mark.usefixtures("exact")
def test_memory_that_holds_nothing_ends_training_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    SmallMemory(monkeypatch, plain=0, checkpointed=0)
    with pytest.raises(UserError, match=r"tiny-vit: 4 images of one fold.*cpu.*`batch_size`.*`resume`"):
        trained(double())


def test_an_error_that_is_not_about_memory_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Network, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trained(tiny_network())


@pytest.mark.usefixtures("exact")
def test_full_training_with_checkpointed_gradients_changes_nothing() -> None:
    recipe = replace(RECIPE, epochs=2)
    expected = trained(tiny_network("full", CNN, dtype=torch.float64), recipe)
    network = tiny_network("full", CNN, dtype=torch.float64)
    assert computing.checkpoint_gradients(network)
    found = trained(network, recipe)
    torch.testing.assert_close(found.values, expected.values, **TIGHT)


@pytest.mark.usefixtures("exact")
def test_a_repeated_step_of_full_training_moves_the_running_statistics_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, epochs=2)
    expected = trained(tiny_network("full", CNN, dtype=torch.float64), recipe)
    cross_entropy, failures = F.cross_entropy, iter([True])

    def short_of_memory_once(*given: Any, **options: Any) -> Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return cross_entropy(*given, **options)

    monkeypatch.setattr(F, "cross_entropy", short_of_memory_once)
    # Checkpointing, which would follow, is another test's.
    monkeypatch.setattr(computing, "checkpoint_gradients", lambda network: True)
    found = trained(tiny_network("full", CNN, dtype=torch.float64), recipe)
    torch.testing.assert_close(found.values, expected.values, **TIGHT)


def test_autocast_trains_in_bf16_and_keeps_float32_values() -> None:
    network = tiny_network()
    network.fold_models = fold_models([SEED], N_FOLDS)
    state = new_state(network)
    data, compute = patches(torch.uint8), Compute(CPU, "bf16", N_FOLDS)
    train(network, data, RECIPE, state=state, compute=compute, save=nothing, advance=nothing)
    assert state.values.dtype == state.moments.dtype == torch.float32
    exact = trained(tiny_network(), data=data)
    losses = [[epoch.loss for epoch in each.history[0]] for each in (state, exact)]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.1)


# ----------------------------------------------------------------------------------- what the network is shown, by step


@dataclass
class GalleryPatches:
    """One training step: its folds, their images (f, b, 3, 32, 32) in grey levels, and the logits (f, b, 2)."""

    folds: tuple[int, ...]
    images: Tensor
    logits: Tensor


def shown(network: Network, data: TrainingSet, recipe: Recipe, *, seed: int = SEED) -> list[list[GalleryPatches]]:
    """All training steps, epoch by epoch, of a training whose every epoch runs."""
    epochs: list[list[GalleryPatches]] = [[]]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))

    def watch(_: nn.Module, given: tuple[Any, ...], options: dict[str, Any], logits: Tensor) -> None:
        if logits.requires_grad:  # evaluation keeps no graph
            pixels = 255 * (given[0] * std + mean)
            epochs[-1].append(
                GalleryPatches(tuple(given[1]), pixels.view(len(given[1]), -1, 3, 32, 32), logits.detach())
            )

    hook = network.register_forward_hook(watch, with_kwargs=True)
    recipe = replace(recipe, patience=recipe.epochs)
    trained(network, recipe, data=data, seed=seed, save=lambda _: epochs.append([]))
    hook.remove()
    return epochs[:-1]


def numbered(fold: Sequence[int], label: Sequence[int], target: Tensor | None = None) -> TrainingSet:
    """Patches of a single grey level each, which is the row's number."""
    rows = torch.arange(len(fold), dtype=torch.float64)
    return TrainingSet(
        pixels=rows.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).clone(),
        label=torch.tensor(label),
        folds=Folds(fold=np.array(fold), n_folds=N_FOLDS, source="by hand", digest=""),
        transform=TRANSFORM,
        target=target,
    )


def rows_shown(data: TrainingSet, recipe: Recipe, *, seed: int = SEED) -> dict[int, list[list[list[int]]]]:
    """The rows that each fold is shown: epoch by epoch, batch by batch."""
    found: dict[int, list[list[list[int]]]] = {fold: [] for fold in range(N_FOLDS)}
    network = double("head", n_classes=int(data.label.max()) + 1)
    for steps in shown(network, data, replace(recipe, augment=None), seed=seed):
        for fold, epochs in found.items():
            mine = [step.images[step.folds.index(fold), :, 0, 0, 0] for step in steps if fold in step.folds]
            epochs.append([batch.round().int().tolist() for batch in mine])
    return found


# Five, seven and eleven patches; positives are many in the first fold, few in the last.
UNEVEN = numbered([0] * 5 + [1] * 7 + [2] * 11, [1, 1, 1, 1, 0] + [1, 1, 0, 0, 0, 0, 0] + [1] + [0] * 10)


# Three classes of which the last is rare; the votes are for the second of them, whatever the label.
VOTED = numbered([0] * 5 + [1] * 7 + [2] * 11, [1, 0, 2, 1, 0] + [0, 1, 1, 0, 0, 0, 2] + [0, 0, 2] + [1] * 8)
VOTED = replace(VOTED, target=torch.tensor([0.0, 1.0, 0.0]).expand(23, 3))


@pytest.mark.parametrize("data", [UNEVEN, VOTED], ids=["two classes", "three classes with votes"])
def test_a_fold_is_shown_its_own_training_rows_classes_equally_and_rows_of_a_class_equally(data: TrainingSet) -> None:
    n_epochs, n_classes = 24, int(data.label.max()) + 1
    seen = rows_shown(data, replace(RECIPE, epochs=n_epochs))
    for fold, epochs in seen.items():
        own = np.flatnonzero(data.folds.fold != fold)
        n_batches = int(np.ceil(len(own) / RECIPE.batch_size))
        assert [[len(batch) for batch in epoch] for epoch in epochs] == [[4] * n_batches] * n_epochs
        counts = np.bincount(np.array(epochs).flatten(), minlength=len(data.label))
        assert counts[data.folds.fold == fold].sum() == 0
        label = data.label.numpy()[own]
        # Each class is drawn as often as another, and each of its rows.
        expected = counts.sum() / n_classes / np.bincount(label)[label]
        statistic = ((counts[own] - expected) ** 2 / expected).sum()
        assert statistic < chi2.isf(1e-6, len(own) - 1), f"fold {fold}: {counts}"
        # The last batch is filled up by draws of its own, not by repeating one.
        share = 1 / n_classes / np.bincount(label)[label]
        expected_same, last = (share**2).sum(), np.array(epochs)[:, -1]
        deviation = (expected_same * (1 - expected_same) / n_epochs) ** 0.5
        for first, second in combinations(last.T, 2):
            assert (first == second).mean() < expected_same + 5 * deviation, f"fold {fold}"


def test_folds_epochs_and_seeds_draw_differently() -> None:
    # Folds of one make: the n-th training row of each is of the same class, so equal random numbers would show.
    data = numbered([0, 1, 2] * 4, [0] * 9 + [1] * 3)
    recipe = replace(RECIPE, epochs=3, batch_size=3)
    places = []
    for seed in (1, 2):
        for fold, epochs in rows_shown(data, recipe, seed=seed).items():
            own = np.flatnonzero(data.folds.fold != fold)
            places += [tuple(np.searchsorted(own, np.array(epoch).flatten())) for epoch in epochs]
    assert len(set(places)) == len(places) == 2 * N_FOLDS * 3


@pytest.mark.usefixtures("exact")
def test_random_numbers_of_others_change_nothing() -> None:
    found = []
    for other in (1, 2):
        network = double(lora=DROPPING)
        torch.manual_seed(other)
        np.random.seed(other)
        random.seed(other)
        found.append(trained(network, replace(RECIPE, epochs=1)).values)
    torch.testing.assert_close(*found, **TIGHT)


def test_every_image_is_changed_by_numbers_of_its_own() -> None:
    data = numbered([0] * 5 + [1] * 7 + [2] * 11, UNEVEN.label.tolist())
    data.pixels.fill_(100)
    brightness = AugmentOptions(0, 0, 0, (1, 1), (1, 1), brightness=0.2, contrast=0, saturation=0, hue=0)
    epochs = shown(double("head"), data, replace(RECIPE, augment=brightness))
    levels = torch.cat([step.images.mean(dim=(2, 3, 4)).flatten() for steps in epochs for step in steps])
    assert len(levels) == 4 * 4 * (5 + 4 + 3)  # epochs, batch, batches of 18, 16 and 12 training rows
    # Numbers of 24 bits: two of 192 are the same with a probability of 0.001, four pairs never.
    assert len(set(levels.tolist())) > len(levels) - 4
    assert levels.min() >= 80 - 1e-6
    assert levels.max() <= 120 + 1e-6
    # Uniform from 80 to 120: variance 40^2 / 12, of the mean an n-th of it.
    assert abs(levels.mean().item() - 100) < 5 * (40**2 / 12 / len(levels)) ** 0.5


@pytest.mark.usefixtures("exact")
def test_no_step_drops_what_another_has_dropped() -> None:
    data = numbered([0] * 5 + [1] * 7 + [2] * 11, UNEVEN.label.tolist())
    data.pixels.fill_(100)
    recipe = replace(RECIPE, augment=None, learning_rate=1e-30, epochs=3)  # weights stay: only masks can differ
    network = stirred(double(lora=DROPPING))
    for row in network.values[1:]:
        row.copy_(network.values[0])
    logits = [own.flatten() for steps in shown(network, data, recipe) for step in steps for own in step.logits]
    assert len(logits) == 3 * (5 + 4 + 3)
    assert torch.pdist(torch.stack(logits)).min() > 1e-6


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("recipe", [RECIPE, PLATEAU], ids=["adamw", "adam"])
def test_a_fold_of_fewer_batches_than_others_ends_as_in_a_plain_loop(recipe: Recipe) -> None:
    fold = 2
    expected = reference(double(), fold, recipe)
    network = double()
    state = trained(network, recipe)
    assert state.n_steps[fold] == len(expected.rates) < state.n_steps[0]
    figures = [(epoch.loss, epoch.balanced_accuracy, epoch.auroc) for epoch in state.history[fold]]
    for found, plain in zip(figures, expected.figures, strict=True):
        assert found == pytest.approx(plain, rel=1e-5)
    for name, value in of_row(network, state.values[fold].clone(), fold).items():
        torch.testing.assert_close(value, expected.values[name], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("exact")
def test_a_training_resumed_after_folds_have_stopped_ends_as_if_undisturbed(tmp_path: Path) -> None:
    recipe = replace(PLATEAU, epochs=9, patience=2)
    expected = trained(double(lora=DROPPING), recipe, seed=7)
    lengths = [len(expected.history[fold]) for fold in range(N_FOLDS)]
    assert lengths[0] < max(lengths), "the first fold of this example must stop before another"

    def save(state: State) -> None:
        save_state(tmp_path, state)
        if len(state.history[0]) == lengths[0]:
            raise KeyboardInterrupt  # it has just stopped, others go on

    with pytest.raises(KeyboardInterrupt):
        trained(double(lora=DROPPING), recipe, save=save, seed=7)
    state = load_state(tmp_path, CPU)
    assert state is not None
    compute = Compute(CPU, "fp32", N_FOLDS)
    options: dict[str, Any] = {"state": state, "compute": compute, "save": nothing, "advance": nothing}
    train(double(lora=DROPPING), patches(torch.float64), recipe, **options)
    for name in ("values", "best", "moments"):
        torch.testing.assert_close(getattr(state, name), getattr(expected, name), **TIGHT)
    assert (state.n_steps, state.n_images) == (expected.n_steps, expected.n_images)
    for fold, history in expected.history.items():
        for epoch, plain in zip(state.history[fold], history, strict=True):
            assert astuple(epoch) == pytest.approx(astuple(plain), rel=1e-6)


# --------------------------------------------------------------------------------------------------- passes of any size


@pytest.mark.parametrize(("at_once", "n_classes"), [(1, 2), (2, 2), (3, 2), (2, 4)])
def test_patches_of_a_last_shorter_batch_get_the_logits_of_every_fold_in_order(at_once: int, n_classes: int) -> None:
    network, data = stirred(tiny_network(n_classes=n_classes)), patches(torch.uint8)
    rows = np.array([3, 17, 0, 8, 5, 19, 2, 11, 4, 13, 6, 1, 18, 7, 9, 10, 12, 14, 16])  # 16 and 3 on a CPU
    compute = Compute(CPU, "fp32", at_once)
    found = patch_logits(
        network,
        lambda row: data.pixels[row].permute(1, 2, 0).numpy(),
        rows,
        TRANSFORM,
        compute=compute,
        advance=nothing,
    )
    assert found.shape == (len(rows), N_FOLDS, n_classes - 1)
    for fold in range(N_FOLDS):
        with torch.no_grad():
            expected = network(TRANSFORM.normalise(data.pixels[rows]), [fold])[0]
        np.testing.assert_allclose(found[:, fold], expected[:, 1:] - expected[:, :1], rtol=1e-4, atol=1e-5)
    assert np.abs(found - found[:, :1]).max() > 0.01, "folds must differ"


def test_evaluation_that_runs_out_of_memory_halves_its_batch_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, data, compute = stirred(tiny_network()), patches(torch.uint8), Compute(CPU, "fp32", N_FOLDS)
    expected = validation_logits(network, data, range(N_FOLDS), compute=compute)  # eight images of each fold at once
    forward, sizes = Network.forward, []

    def limited(network: Network, images: Tensor, folds: Sequence[int], *, step: int | None = None) -> Tensor:
        sizes.append(len(images) // len(folds))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.14 GiB.")
        return forward(network, images, folds, step=step)

    monkeypatch.setattr(Network, "forward", limited)
    found = validation_logits(network, data, range(N_FOLDS), compute=compute)
    assert max(sizes) == 8
    for fold, own in found.items():
        np.testing.assert_allclose(own, expected[fold], rtol=1e-4, atol=1e-5)


def test_evaluation_that_cannot_hold_an_image_of_each_fold_ends_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.14 GiB.")

    monkeypatch.setattr(Network, "forward", full)
    network, data = tiny_network(), patches(torch.uint8)
    with pytest.raises(UserError, match=r"one image of 3 folds does not fit.*`folds_at_once=1`"):
        validation_logits(network, data, range(N_FOLDS), compute=Compute(CPU, "fp32", N_FOLDS))
