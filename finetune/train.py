"""How do all folds train on patches, each by its own sampler, schedule and early stopping?

One loop, `train`. The patches lie decoded on the device as bytes. In every step each fold draws a batch, weighted
against its class frequencies. The batches are augmented and normalised on the device, pass through the network
together, and each fold's own optimiser steps its own row of values. After an epoch each fold is scored on its held-out
slides, and a fold whose score has not improved for long stops.

The random numbers of an epoch follow from (seed, fold, epoch). So a fold's training depends neither on the other folds
nor on interruptions. Several processes may share the batches (`finetune.process_group`): all draw the same batches, and
each computes its own rows of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.console import ProgressCallback, UserError, say
from finetune.augment import draw
from finetune.checkpoint import State
from finetune.compute import EVALUATION_BATCH, Compute, network_logits
from finetune.dropout import seed_of
from finetune.lora import dropout_keys
from finetune.network import Network
from finetune.optimizer import IDLE, scalars, schedule_of
from finetune.recipes import Recipe, learning_rate
from finetune.step import Batches, Step, TrainingSet
from probe.metrics import auroc, balanced_accuracy
from probe.paper import draw_batches
from probe.runs import EpochRecord
from probe.schedule import best_epoch, should_stop

STEPS_APART = 2**20  # between the numbers of the first steps of two epochs
_DRAW_SEED = 2  # keeps these generators apart from those that draw initial values


def new_state(network: Network, *, after: State | None = None) -> State:
    """Make the state before the first step of the network's folds; `after` is the state at the end of other folds."""
    return State(
        folds=network.folds,
        values=network.values,
        best=network.values.clone(),
        moments=torch.zeros(len(network.folds), 2, network.n_trained).to(network.values),
        n_steps=[0] * len(network.folds),
        history=(after.history if after else {}) | {fold: [] for fold in network.folds},
        seconds=after.seconds if after else 0.0,
        n_images=after.n_images if after else 0,
        fast_paths=after.fast_paths if after else None,
    )


def train(
    network: Network,
    data: TrainingSet,
    recipe: Recipe,
    *,
    state: State,
    seed: int,
    compute: Compute,
    save: Callable[[State], None],
    advance: ProgressCallback,
) -> None:
    """Train the network's folds until each has stopped; the rows of their best epochs are then in `state.best`.

    Args:
        network: its rows are overwritten by the state's.
        data: the patches of all folds.
        state: from `new_state`, or from a checkpoint; updated in place.
        seed: of samplers, augmentation and dropout.
        save: called after every epoch.
        advance: progress, in images.

    Raises:
        UserError: a loss that is not finite, or memory running out with a single fold and checkpointed gradients.
    """
    process_group = compute.process_group
    network.shard_batches(process_group, recipe.batch_size)
    network.values.copy_(state.values)
    process_group.broadcast_(network.values)  # another processor may have drawn another last bit
    state.values = network.values
    step = Step(network, data, recipe, moments=state.moments, compute=compute)
    labels = data.label.cpu().numpy()

    def is_training(fold: int) -> bool:
        return not should_stop(state.scores(fold), patience=recipe.patience, max_epochs=recipe.epochs)

    while active := list(filter(is_training, network.folds)):
        started = time.perf_counter()
        epoch = len(state.history[active[0]])  # the same for all: a fold that has stopped never trains again
        drawn = {fold: draw_epoch(data, fold, recipe, seed=seed, epoch=epoch) for fold in active}
        batches = epoch_batches(network, data, recipe, drawn, state=state, epoch=epoch)
        step.begin(batches, first=epoch * STEPS_APART)
        for batch in range(batches.n_batches):
            folds = [fold for fold in active if batch < drawn[fold].n_batches]  # smaller folds' epochs end earlier
            step(batch, folds)
            advance(len(folds) * recipe.batch_size)
        for fold in active:
            state.n_steps[network.folds.index(fold)] += drawn[fold].n_batches
            state.n_images += drawn[fold].n_batches * recipe.batch_size

        process_group.all_reduce_(step.losses)
        total = dict(zip(network.folds, step.losses.tolist(), strict=True))
        mean_loss = {fold: total[fold] / drawn[fold].n_batches for fold in active}
        _require_finite(mean_loss, epoch, recipe)
        logits = validation_logits(network, data, active, compute=compute)
        _require_finite({fold: float(np.abs(logit).max()) for fold, logit in logits.items()}, epoch, recipe)
        for fold in active:
            label, n_batches = labels[data.held_out(fold)], drawn[fold].n_batches
            record = EpochRecord(
                loss=mean_loss[fold],
                balanced_accuracy=balanced_accuracy(label, logits[fold] >= 0),
                auroc=auroc(label, logits[fold]),
                learning_rate=learning_rate(state.scores(fold), recipe, batch=n_batches // 2, n_batches=n_batches),
            )
            state.history[fold].append(record)
            if best_epoch(state.scores(fold)) == epoch:
                index = network.folds.index(fold)
                state.best[index] = network.values[index]
        state.seconds += time.perf_counter() - started
        _record_fast_paths(state, compute)
        save(state)
        advance(0, _describe_epoch(epoch, [state.history[fold][-1] for fold in active]))


def _record_fast_paths(state: State, compute: Compute) -> None:
    """Record which fast ways this epoch took; if they are not those of the one before, say so."""
    now = tuple(sorted(compute.fast_paths))
    if state.fast_paths is not None and state.fast_paths != now:
        say(
            f"Training went on with {', '.join(now) or 'plain PyTorch'} instead of "
            f"{', '.join(state.fast_paths) or 'plain PyTorch'}: the result may differ in its last digits."
        )
    state.fast_paths = now


def _describe_epoch(epoch: int, records: Sequence[EpochRecord]) -> str:
    return (
        f"epoch {epoch + 1}, loss {np.mean([record.loss for record in records]):.3f}, validation bal. acc. "
        + " ".join(f"{record.balanced_accuracy:.3f}" for record in records)
    )


def _require_finite(losses: Mapping[int, float], epoch: int, recipe: Recipe) -> None:
    broken = [fold for fold, loss in losses.items() if not np.isfinite(loss)]
    if broken:
        raise UserError(
            f"the loss of fold {broken[0]} is not finite in epoch {epoch + 1}, at a learning rate of "
            f"{recipe.learning_rate:g}."
            + (" The checkpoint of the epoch before is kept." if epoch else "")
            + " Start a new run with a smaller `learning_rate`, or with `precision='fp32'`."
        )


# ----------------------------------------------------------------------------------------------------- one epoch's data


@dataclass(frozen=True, eq=False)
class EpochBatches:
    """What one fold sees in one epoch: rows (n_batches, b), and draws (n_batches, b, k) for augmentation."""

    rows: Tensor
    draws: Tensor | None

    @property
    def n_batches(self) -> int:
        """The number of whole batches."""
        return len(self.rows)


def draw_epoch(data: TrainingSet, fold: int, recipe: Recipe, *, seed: int, epoch: int) -> EpochBatches:
    """Draw a fold's batches of one epoch (see `probe.paper.draw_batches`), and how each patch is augmented."""
    generator = torch.Generator().manual_seed(seed_of(seed, fold, epoch, _DRAW_SEED))
    rows = torch.from_numpy(np.flatnonzero(data.folds.fold != fold))
    batches = draw_batches(rows, data.label.cpu()[rows], batch_size=recipe.batch_size, generator=generator)
    draws = None
    if recipe.augment is not None:
        draws = draw(batches.numel(), generator=generator).view(*batches.shape, -1)
    return EpochBatches(batches, draws)


def epoch_batches(
    network: Network,
    data: TrainingSet,
    recipe: Recipe,
    drawn: Mapping[int, EpochBatches],
    *,
    state: State,
    epoch: int,
) -> Batches:
    """Gather all that decides the steps of an epoch, and move it to the device at once.

    Batches have the same shape to the end: where a fold has stopped, or has fewer batches than others, it is shown its
    first patches with a weight of 0.
    """
    n_batches = max(own.n_batches for own in drawn.values())
    one = next(iter(drawn.values()))
    rows = torch.zeros(n_batches, len(network.folds), recipe.batch_size, dtype=torch.int64)
    draws = None if one.draws is None else torch.zeros(*rows.shape, one.draws.shape[-1])
    plan = [[IDLE] * len(network.folds) for _ in range(n_batches)]
    for fold, own in drawn.items():
        index, scores = network.folds.index(fold), state.scores(fold)
        rows[: own.n_batches, index] = own.rows
        if draws is not None and own.draws is not None:
            draws[: own.n_batches, index] = own.draws
        for batch in range(own.n_batches):
            rate = learning_rate(scores, recipe, batch=batch, n_batches=own.n_batches)
            plan[batch][index] = scalars(recipe, rate=rate, step=state.n_steps[index] + batch + 1)
    steps = range(epoch * STEPS_APART, epoch * STEPS_APART + n_batches)
    keys = torch.tensor([dropout_keys(network.seed, network.folds, step) for step in steps])
    device = network.values.device
    return Batches(
        rows=rows.to(data.pixels.device),
        label=data.label[rows.to(data.label.device)],
        draws=None if draws is None else draws.to(device),
        keys=keys.to(device),
        schedule=schedule_of(plan, network.values),
    )


# ---------------------------------------------------------------------------------------------------------- validation


def validation_logits(
    network: Network, data: TrainingSet, folds: Sequence[int], *, compute: Compute
) -> dict[int, NDArray[np.float32]]:
    """Compute each fold's logit (Atypical minus Normal) of the rows that validate in it, in their order."""
    process_group = compute.process_group
    held_out = {fold: data.held_out(fold) for fold in network.folds}
    shards = {fold: rows[process_group.shard_rows(len(rows))] for fold, rows in held_out.items()}

    def logits_of(network: Network, group: list[int]) -> dict[int, Tensor]:
        # A process whose shard of a small fold is empty computes any row, as all processes must make every pass.
        rows_of = [shards[fold] if len(shards[fold]) else held_out[fold][:1] for fold in group]
        longest = max(map(len, rows_of))
        # All folds of a pass hold equally many images: shorter ones repeat their last.
        padded = np.stack([np.pad(rows, (0, longest - len(rows)), mode="edge") for rows in rows_of])
        rows = torch.from_numpy(padded).to(data.pixels.device)
        parts = [
            network_logits(
                network,
                data.transform,
                data.take(part, compute.device).view(*part.shape, *data.pixels.shape[1:]),
                group,
                compute=compute,
            )
            for part in torch.split(rows, EVALUATION_BATCH[compute.device.type], dim=1)
        ]
        logits = torch.cat(parts, dim=1)  # (f, longest)
        return {fold: row[: len(shards[fold])] for fold, row in zip(group, logits, strict=True)}

    parts = compute.map_passes(network, folds, logits_of)
    logits = {fold: logit.cpu().numpy() for part in parts for fold, logit in part.items()}
    return {fold: process_group.all_gather(logits[fold], len(held_out[fold]), compute.device) for fold in folds}
