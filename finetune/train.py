"""How do all members train on patches, each by its own sampler, schedule and early stopping?

A member (`finetune.network`) is the model of one seed and one fold. One loop, `train`. The patches lie decoded on the
device as bytes. In every step each member draws a batch from its training rows, weighted against the frequencies of
their labels. The batches are augmented and normalised on the device, pass through the network together, and each
member's own optimiser steps its own row of values. After an epoch each member is scored on the slides that its fold
holds out, and one whose score has not improved for long stops.

The random numbers of an epoch follow from (seed, fold, epoch). So a member's training depends neither on the others nor
on interruptions. Several processes may share the batches (`finetune.process_group`): all draw the same batches, and
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
from features.folds import FoldModel
from finetune.augment import draw
from finetune.checkpoint import State
from finetune.compute import EVALUATION_BATCH, Compute, network_logits
from finetune.dropout import seed_of
from finetune.lora import dropout_keys
from finetune.network import Network
from finetune.optimizer import IDLE, scalars, schedule_of
from finetune.recipes import Recipe, learning_rate
from finetune.step import Batches, Step, TrainingSet
from probe.metrics import judge_logits
from probe.paper import draw_batches
from probe.records import EpochRecord
from probe.schedule import should_stop

STEPS_APART = 2**20  # between the numbers of the first steps of two epochs
_MOST_SAID = 10  # members whose accuracies progress tells one by one
_DRAW_SEED = 2  # keeps these generators apart from those that draw initial values


def new_state(network: Network, *, after: State | None = None) -> State:
    """Make the state before the first step of the network's members; `after` is that at the end of other members."""
    return State(
        members=network.members,
        values=network.values,
        best=network.values.clone(),
        moments=torch.zeros(len(network.members), 2, network.n_trained).to(network.values),
        n_steps=[0] * len(network.members),
        history=(after.history if after else {}) | {member: [] for member in network.members},
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
    compute: Compute,
    save: Callable[[State], None],
    advance: ProgressCallback,
) -> None:
    """Train the network's members until each has stopped; the rows of the epochs they keep are then in `state.best`.

    Args:
        network: its rows are overwritten by the state's.
        data: the patches of all folds.
        state: from `new_state`, or from a checkpoint; updated in place.
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

    def is_training(member: int) -> bool:
        return not should_stop(state.scores(member), patience=recipe.patience, max_epochs=recipe.epochs)

    while active := list(filter(is_training, network.members)):
        started = time.perf_counter()
        epoch = len(state.history[active[0]])  # the same for all: a member that has stopped never trains again
        drawn = {member: draw_epoch(data, network.fold_models[member], recipe, epoch=epoch) for member in active}
        batches = epoch_batches(network, data, recipe, drawn, state=state, epoch=epoch)
        step.begin(batches, first=epoch * STEPS_APART)
        for batch in range(batches.n_batches):
            stepped = [member for member in active if batch < drawn[member].n_batches]  # some epochs end earlier
            step(batch, stepped)
            advance(len(stepped) * recipe.batch_size)
        for member in active:
            state.n_steps[network.members.index(member)] += drawn[member].n_batches
            state.n_images += drawn[member].n_batches * recipe.batch_size

        process_group.all_reduce_(step.losses)
        total = dict(zip(network.members, step.losses.tolist(), strict=True))
        mean_loss = {member: total[member] / drawn[member].n_batches for member in active}
        _require_finite(mean_loss, network, epoch, recipe)
        logits = validation_logits(network, data, active, compute=compute)
        largest = {member: float(np.abs(logit).max()) for member, logit in logits.items()}
        _require_finite(largest, network, epoch, recipe)
        for member in active:
            label, n_batches = labels[data.held_out(network.fold_models[member].fold)], drawn[member].n_batches
            accuracy, auroc = judge_logits(label, logits[member])
            record = EpochRecord(
                loss=mean_loss[member],
                balanced_accuracy=accuracy,
                auroc=auroc,
                learning_rate=learning_rate(state.scores(member), recipe, batch=n_batches // 2, n_batches=n_batches),
            )
            state.history[member].append(record)
            if recipe.kept_epoch(state.scores(member)) == epoch:
                index = network.members.index(member)
                state.best[index] = network.values[index]
        state.seconds += time.perf_counter() - started
        _record_fast_paths(state, compute)
        save(state)
        advance(0, _describe_epoch(epoch, [state.history[member][-1] for member in active]))


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
    accuracies = [record.balanced_accuracy for record in records]
    said = " ".join(f"{accuracy:.3f}" for accuracy in accuracies)
    if len(accuracies) > _MOST_SAID:
        said = f"{np.mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})"
    return f"epoch {epoch + 1}, loss {np.mean([record.loss for record in records]):.3f}, validation bal. acc. {said}"


def _require_finite(losses: Mapping[int, float], network: Network, epoch: int, recipe: Recipe) -> None:
    broken = [network.fold_models[member] for member, loss in losses.items() if not np.isfinite(loss)]
    if broken:
        raise UserError(
            f"the loss of fold {broken[0].fold} is not finite in epoch {epoch + 1} of the training of seed "
            f"{broken[0].seed}, at a learning rate of {recipe.learning_rate:g}."
            + (" The checkpoint of the epoch before is kept." if epoch else "")
            + " Start a new run with a smaller `learning_rate`, or with `precision='fp32'`."
        )


# ----------------------------------------------------------------------------------------------------- one epoch's data


@dataclass(frozen=True, eq=False)
class EpochBatches:
    """What one member sees in one epoch: rows (n_batches, b), and draws (n_batches, b, k) for augmentation."""

    rows: Tensor
    draws: Tensor | None

    @property
    def n_batches(self) -> int:
        """The number of whole batches."""
        return len(self.rows)


def draw_epoch(data: TrainingSet, model: FoldModel, recipe: Recipe, *, epoch: int) -> EpochBatches:
    """Draw a member's batches of one epoch (see `probe.paper.draw_batches`), and how each patch is augmented."""
    generator = torch.Generator().manual_seed(seed_of(*model, epoch, _DRAW_SEED))
    rows = torch.from_numpy(np.flatnonzero(data.folds.fold != model.fold))
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

    Batches have the same shape to the end: where a member has stopped, or has fewer batches than others, it is shown
    the first patches with a weight of 0.
    """
    n_batches = max(own.n_batches for own in drawn.values())
    one = next(iter(drawn.values()))
    rows = torch.zeros(n_batches, len(network.members), recipe.batch_size, dtype=torch.int64)
    draws = None if one.draws is None else torch.zeros(*rows.shape, one.draws.shape[-1])
    plan = [[IDLE] * len(network.members) for _ in range(n_batches)]
    for member, own in drawn.items():
        index, scores = network.members.index(member), state.scores(member)
        rows[: own.n_batches, index] = own.rows
        if draws is not None and own.draws is not None:
            draws[: own.n_batches, index] = own.draws
        for batch in range(own.n_batches):
            rate = learning_rate(scores, recipe, batch=batch, n_batches=own.n_batches)
            plan[batch][index] = scalars(recipe, rate=rate, step=state.n_steps[index] + batch + 1)
    steps = range(epoch * STEPS_APART, epoch * STEPS_APART + n_batches)
    models = [network.fold_models[member] for member in network.members]
    keys = torch.tensor([dropout_keys(models, step) for step in steps])
    device = network.values.device
    target = data.label if data.target is None else data.target
    return Batches(
        rows=rows.to(data.pixels.device),
        target=target[rows.to(target.device)],
        draws=None if draws is None else draws.to(device),
        keys=keys.to(device),
        schedule=schedule_of(plan, network.values),
    )


# ---------------------------------------------------------------------------------------------------------- validation


def validation_logits(
    network: Network, data: TrainingSet, members: Sequence[int], *, compute: Compute
) -> dict[int, NDArray[np.float32]]:
    """Compute each member's logits (n, c-1), class k over class 0, of the rows that validate in its fold, in order."""
    process_group = compute.process_group
    held_out = {member: data.held_out(network.fold_models[member].fold) for member in network.members}
    shards = {member: rows[process_group.shard_rows(len(rows))] for member, rows in held_out.items()}

    def logits_of(network: Network, group: list[int]) -> dict[int, Tensor]:
        # A process whose shard of a small fold is empty computes any row, as all processes must make every pass.
        rows_of = [shards[member] if len(shards[member]) else held_out[member][:1] for member in group]
        longest = max(map(len, rows_of))
        # All members of a pass hold equally many images: shorter ones repeat their last.
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
        logits = torch.cat(parts, dim=1)  # (f, longest, c-1)
        return {member: row[: len(shards[member])] for member, row in zip(group, logits, strict=True)}

    parts = compute.map_passes(network, members, logits_of)
    logits = {member: logit.cpu().numpy() for part in parts for member, logit in part.items()}
    return {
        member: process_group.all_gather(logits[member], len(held_out[member]), compute.device) for member in members
    }
