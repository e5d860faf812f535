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
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from extract.views import Transform
from features.console import ProgressCallback, UserError
from features.device import out_of_memory
from features.folds import Folds
from finetune.augment import augment, draw
from finetune.checkpoint import State
from finetune.compute import EVALUATION_BATCH, Compute, network_logits, save_memory
from finetune.dropout import seed_of
from finetune.network import Network
from finetune.recipes import Recipe, learning_rate
from probe.metrics import auroc, balanced_accuracy
from probe.paper import draw_batches
from probe.runs import EpochRecord
from probe.schedule import best_epoch, should_stop

_DRAW_SEED = 2  # keeps these generators apart from those that draw initial values


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The patches that cross-validation uses.

    Attributes:
        pixels: (n, 3, s, s) uint8, resized as extraction does it; on the device, or in main memory where the device has
            no room.
        label: (n,) int64, on the device.
        folds: in which fold each row validates.
        transform: whose normalisation the network expects.
    """

    pixels: Tensor
    label: Tensor
    folds: Folds
    transform: Transform

    def take(self, rows: Tensor) -> Tensor:
        """Take the pixels (m, 3, s, s) of m row numbers, which may come in any shape."""
        return self.pixels[rows.flatten().to(self.pixels.device)]

    def held_out(self, fold: int) -> NDArray[np.intp]:
        """List the rows that validate in a fold."""
        return np.flatnonzero(self.folds.fold == fold)


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
    optimizers = {
        fold: _optimizer(row, recipe, state.moments[index], state.n_steps[index])
        for index, (fold, row) in enumerate(zip(network.folds, network.rows(), strict=True))
    }
    labels = data.label.cpu().numpy()

    def is_training(fold: int) -> bool:
        return not should_stop(state.scores(fold), patience=recipe.patience, max_epochs=recipe.epochs)

    while active := list(filter(is_training, network.folds)):
        started = time.perf_counter()
        epoch = len(state.history[active[0]])  # the same for all: a fold that has stopped never trains again
        batches = {fold: draw_epoch(data, fold, recipe, seed=seed, epoch=epoch) for fold in active}
        losses = {fold: torch.zeros((), device=compute.device) for fold in active}

        for batch in range(max(drawn.n_batches for drawn in batches.values())):
            folds = [fold for fold in active if batch < batches[fold].n_batches]  # smaller folds' epochs end earlier
            step = epoch * 2**20 + batch
            step_losses = _backward(network, data, recipe, batches, folds, batch, step=step, compute=compute)
            process_group.all_reduce_(network.gradients)
            for fold in folds:
                losses[fold] += step_losses[fold]
                rate = learning_rate(state.scores(fold), recipe, batch=batch, n_batches=batches[fold].n_batches)
                optimizers[fold].param_groups[0]["lr"] = rate
                optimizers[fold].step()
                state.n_steps[network.folds.index(fold)] += 1
            advance(len(folds) * recipe.batch_size)
            state.n_images += len(folds) * recipe.batch_size

        total = torch.stack([losses[fold] for fold in active])
        process_group.all_reduce_(total)
        mean_loss = {fold: loss / batches[fold].n_batches for fold, loss in zip(active, total.tolist(), strict=True)}
        _require_finite(mean_loss, epoch, recipe)
        logits = validation_logits(network, data, active, compute=compute)
        _require_finite({fold: float(np.abs(logit).max()) for fold, logit in logits.items()}, epoch, recipe)
        for fold in active:
            label, n_batches = labels[data.held_out(fold)], batches[fold].n_batches
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
        save(state)
        advance(0, _describe_epoch(epoch, [state.history[fold][-1] for fold in active]))


def _describe_epoch(epoch: int, records: Sequence[EpochRecord]) -> str:
    return (
        f"epoch {epoch + 1}, loss {np.mean([record.loss for record in records]):.3f}, validation bal. acc. "
        + " ".join(f"{record.balanced_accuracy:.3f}" for record in records)
    )


def _optimizer(row: Tensor, recipe: Recipe, moments: Tensor, n_steps: int) -> torch.optim.Optimizer:
    """Make an optimiser of one fold's row, whose moments lie in the given memory."""
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind([row], lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=row.is_cuda)
    steps = torch.tensor(float(n_steps), device=row.device if row.is_cuda else None)
    optimizer.state[row] = {"step": steps, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    return optimizer


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


def _images(
    data: TrainingSet, recipe: Recipe, batches: Sequence[EpochBatches], batch: int, shard: slice, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prepare this process's rows of one batch of each fold, fold after fold.

    Returns:
        Augmented, normalised images (f * b, 3, s, s), and labels (f * b,).
    """
    rows = torch.cat([drawn.rows[batch, shard] for drawn in batches])
    pixels = data.take(rows).to(device, non_blocking=True)
    draws = [drawn.draws[batch, shard] for drawn in batches if drawn.draws is not None]
    if recipe.augment is not None:
        changed = augment(pixels / 255, torch.cat(draws).to(device), size=pixels.shape[-1], options=recipe.augment)
        pixels = changed * 255
    images = data.transform.normalise(pixels).contiguous(memory_format=torch.channels_last)
    return images, data.label[rows.to(data.label.device)]


# --------------------------------------------------------------------------------------------- one step, and validation


def _backward(
    network: Network,
    data: TrainingSet,
    recipe: Recipe,
    batches: Mapping[int, EpochBatches],
    folds: Sequence[int],
    batch: int,
    *,
    step: int,
    compute: Compute,
) -> dict[int, Tensor]:
    """Compute the network's gradients on this process's rows of one batch of each fold.

    Returns:
        These rows' part of each fold's mean loss. Like the gradients, it has to be summed over all processes.
    """
    statistics = network.values[:, network.n_trained :]
    shard = compute.process_group.shard_rows(recipe.batch_size)

    def losses_of(network: Network, group: list[int]) -> dict[int, Tensor]:
        drawn = [batches[fold] for fold in group]
        images, label = _images(data, recipe, drawn, batch, shard, compute.device)
        with compute.autocast():
            logits = network(images, group, step=step)  # (f, b, 2)
        losses = F.cross_entropy(logits.flatten(0, 1), label, reduction="none").view(len(group), -1).mean(dim=1)
        losses = losses * ((shard.stop - shard.start) / recipe.batch_size)  # exactly 1 in a single process
        after = statistics.clone()
        losses.sum().backward()
        statistics.copy_(after)  # checkpointed activations, computed again, have updated them a second time
        return dict(zip(group, losses.detach(), strict=True))

    while True:
        before = statistics.clone()
        try:
            network.clear_gradients()
            losses = compute.map_passes(network, folds, losses_of)
            network.gather_gradients()
            return {fold: loss for part in losses for fold, loss in part.items()}
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            statistics.copy_(before)
            save_memory(network, compute, recipe.batch_size, error)


def validation_logits(
    network: Network, data: TrainingSet, folds: Sequence[int], *, compute: Compute
) -> dict[int, NDArray[np.float32]]:
    """Compute each fold's logit (Atypical minus Normal) of the rows that validate in it, in their order."""
    size = EVALUATION_BATCH[compute.device.type]
    process_group = compute.process_group
    held_out = {fold: data.held_out(fold) for fold in folds}
    shards = {fold: rows[process_group.shard_rows(len(rows))] for fold, rows in held_out.items()}

    def logits_of(network: Network, group: list[int]) -> dict[int, NDArray[np.float32]]:
        # A process whose shard of a small fold is empty computes any row, as all processes must make every pass.
        rows_of = [shards[fold] if len(shards[fold]) else held_out[fold][:1] for fold in group]
        longest = max(map(len, rows_of))
        # All folds of a pass hold equally many images: shorter ones repeat their last.
        padded = torch.from_numpy(np.stack([np.pad(rows, (0, longest - len(rows)), mode="edge") for rows in rows_of]))
        parts = [
            network_logits(network, data.transform, data.take(rows), group, compute=compute)
            for rows in torch.split(padded, size, dim=1)
        ]
        logits = torch.cat(parts, dim=1).cpu().numpy()  # (f, longest)
        return {fold: row[: len(shards[fold])] for fold, row in zip(group, logits, strict=True)}

    parts = compute.map_passes(network, folds, logits_of)
    logits = {fold: logit for part in parts for fold, logit in part.items()}
    return {fold: process_group.all_gather(logits[fold], len(held_out[fold]), compute.device) for fold in folds}
