"""How do all folds train on patches, each by its own sampler, schedule and early stopping?

One loop, `train`. Patches lie decoded on the device as bytes. In every step each fold draws a batch, weighted against
its class frequencies; the batches are augmented and normalised there, pass the network together, and each fold's own
optimiser moves its own row. After an epoch each fold is judged on its held-out slides; a fold that has not improved for
long leaves. The random numbers of an epoch follow from (seed, fold, epoch), so a fold's training depends neither on the
folds beside it nor on interruptions.

Several processes may share the batches (`finetune.process_group`): each takes its rows of the very same draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from extract.views import Transform
from features.console import ProgressCallback, UserError, say
from features.device import out_of_memory
from features.folds import Folds
from finetune.augment import augment, draw
from finetune.checkpoint import State
from finetune.dropout import seed_of
from finetune.network import Network
from finetune.process_group import SINGLE_PROCESS, ProcessGroup
from finetune.recipes import Recipe, best_epoch, learning_rate, stopped
from probe.metrics import auroc, balanced_accuracy

Found = TypeVar("Found")
EVALUATION_BATCH = {"cpu": 16, "cuda": 64}  # images per fold and forward pass
_DRAW_SEED = 2  # apart from the generators of initial values


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The patches that cross-validation may use.

    Attributes:
        pixels: (n, 3, s, s) uint8, prepared as extraction prepares them; on the device, or in main memory where the
            device has no room.
        label: (n,) int64, on the device.
        folds: which row validates where.
        transform: whose normalisation the network expects.
    """

    pixels: Tensor
    label: Tensor
    folds: Folds
    transform: Transform

    def take(self, rows: Tensor) -> Tensor:
        """Pixels (m, 3, s, s) of rows, of any shape, m in all."""
        return self.pixels[rows.flatten().to(self.pixels.device)]


@dataclass
class Compute:
    """How steps are computed; never what they compute, up to rounding.

    Attributes:
        device: of the network.
        precision: "fp32" or "bf16" (autocast).
        folds_at_once: how many folds share a forward pass; halved when memory runs out.
        process_group: the processes that share the batches.
    """

    device: torch.device
    precision: str
    folds_at_once: int
    process_group: ProcessGroup = SINGLE_PROCESS

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision as a context."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def each(self, network: Network, folds: Sequence[int], work: Callable[[Network, list[int]], Found]) -> list[Found]:
        """Do some work for every group of folds, with the network or a twin of it.

        On a CPU groups are worked on side by side, by as many threads as torch may use: operations of one fold's batch
        are too short to be cut up, and where a core has other work to do, all threads would wait after every one.
        """
        groups = list(self.groups(folds))
        n_cores = torch.get_num_threads()
        n = min(n_cores, len(groups)) if self.device.type == "cpu" else 1
        if n == 1:
            return [work(network, group) for group in groups]
        idle: SimpleQueue[Network] = SimpleQueue()
        for twin in network.replicas(n):
            idle.put(twin)

        def one(group: list[int]) -> Found:
            twin = idle.get()
            try:
                return work(twin, group)
            finally:
                idle.put(twin)

        try:
            with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(n_cores // n,)) as pool:
                return list(pool.map(one, groups))
        finally:
            torch.set_num_threads(n_cores)  # each thread's own, but also what later threads begin with

    def groups(self, folds: Sequence[int]) -> Iterator[list[int]]:
        """The folds, as many at a time as share a forward pass."""
        for start in range(0, len(folds), self.folds_at_once):
            yield list(folds[start : start + self.folds_at_once])


def new_state(network: Network, *, after: State | None = None) -> State:
    """The state before the first step of the network's folds, perhaps after other folds have finished."""
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
    machine: Compute,
    save: Callable[[State], None],
    advance: ProgressCallback,
) -> None:
    """Train the network's folds until each has stopped; the best rows are then in `state.best`.

    Args:
        network: its rows are overwritten by the state's.
        data: all folds' patches.
        recipe: how.
        state: from `new_state`, or from a checkpoint; moved on in place.
        seed: of samplers, augmentation and dropout.
        machine: device, precision, folds per pass.
        save: called after every epoch.
        advance: progress, in images.

    Raises:
        UserError: a loss that is not finite, or memory running out with a single fold and checkpointed gradients.
    """
    process_group = machine.process_group
    network.shard_batches(process_group, recipe.batch_size)
    network.values.copy_(state.values)
    process_group.broadcast_(network.values)  # should another processor have drawn another last bit
    state.values = network.values
    optimizers = {
        fold: _optimizer(row, recipe, state.moments[at], state.n_steps[at])
        for at, (fold, row) in enumerate(zip(network.folds, network.rows(), strict=True))
    }
    label = data.label.cpu().numpy()

    while active := [fold for fold in network.folds if not stopped(state.history[fold], recipe)]:
        started = time.perf_counter()
        epoch = len(state.history[active[0]])  # of all: a fold that has stopped is never active again
        plans = {fold: _plan(data, fold, recipe, seed=seed, epoch=epoch) for fold in active}
        losses = {fold: torch.zeros((), device=machine.device) for fold in active}

        for batch in range(max(plan.n_batches for plan in plans.values())):
            folds = [fold for fold in active if batch < plans[fold].n_batches]  # smaller folds' epochs end earlier
            step = epoch * 2**20 + batch
            for fold, loss in _backward(network, data, recipe, plans, folds, batch, step=step, machine=machine).items():
                losses[fold] += loss
            process_group.all_reduce_(network.gradients)
            for fold in folds:
                rate = learning_rate(state.history[fold], recipe, batch=batch, n_batches=plans[fold].n_batches)
                optimizers[fold].param_groups[0]["lr"] = rate
                optimizers[fold].step()
                state.n_steps[network.folds.index(fold)] += 1
            advance(len(folds) * recipe.batch_size)
            state.n_images += len(folds) * recipe.batch_size

        total = torch.stack([losses[fold] for fold in active])
        process_group.all_reduce_(total)
        mean_loss = {fold: loss / plans[fold].n_batches for fold, loss in zip(active, total.tolist(), strict=True)}
        _require_finite(mean_loss, epoch, recipe)
        logits = validation_logits(network, data, active, machine=machine)
        _require_finite({fold: float(np.abs(own).max()) for fold, own in logits.items()}, epoch, recipe)
        for fold in active:
            held_out = label[data.folds.fold == fold]
            history = state.history[fold]
            middle = plans[fold].n_batches // 2
            rate = learning_rate(history, recipe, batch=middle, n_batches=plans[fold].n_batches)
            history.append(
                {
                    "loss": mean_loss[fold],
                    "balanced_accuracy": balanced_accuracy(held_out, logits[fold] >= 0),
                    "auroc": auroc(held_out, logits[fold]),
                    "learning_rate": rate,
                }
            )
            if best_epoch(history) == epoch:
                at = network.folds.index(fold)
                state.best[at] = network.values[at]
        state.seconds += time.perf_counter() - started
        save(state)
        latest = [state.history[fold][-1] for fold in active]
        advance(
            0,
            f"epoch {epoch + 1}, loss {np.mean([record['loss'] for record in latest]):.3f}, validation bal. acc. "
            + " ".join(f"{record['balanced_accuracy']:.3f}" for record in latest),
        )


def validation_logits(
    network: Network, data: TrainingSet, folds: Sequence[int], *, machine: Compute
) -> dict[int, NDArray[np.float32]]:
    """Each fold's logit (Atypical minus Normal) of its own held-out rows, in their order."""
    size = EVALUATION_BATCH[machine.device.type]
    held_out = {fold: np.flatnonzero(data.folds.fold == fold) for fold in folds}
    share = {fold: rows[machine.process_group.shard_rows(len(rows))] for fold, rows in held_out.items()}

    def logits_of(network: Network, group: list[int]) -> dict[int, NDArray[np.float32]]:
        # A process that got no row of a small fold judges any.
        held = [share[fold] if len(share[fold]) else held_out[fold][:1] for fold in group]
        longest = max(map(len, held))
        # All folds of a pass hold equally many images: shorter ones repeat their last.
        padded = torch.from_numpy(np.stack([np.pad(own, (0, longest - len(own)), mode="edge") for own in held]))
        parts = [
            network_logits(network, data.transform, data.take(rows), group, machine=machine)
            for rows in torch.split(padded, size, dim=1)
        ]
        together = torch.cat(parts, dim=1).cpu().numpy()  # (f, longest)
        return {fold: own[: len(share[fold])] for fold, own in zip(group, together, strict=True)}

    found = _joined(machine.each(network, folds, logits_of))
    return {fold: machine.process_group.all_gather(found[fold], len(held_out[fold]), machine.device) for fold in folds}


@torch.inference_mode()
def network_logits(
    network: Network, transform: Transform, pixels: Tensor, folds: Sequence[int], *, machine: Compute
) -> Tensor:
    """Logits (f, b), Atypical minus Normal, of pixels (f * b, 3, s, s), fold after fold, each under its own weights.

    Memory running out halves the batch.

    Raises:
        UserError: if not even one image of each fold fits.
    """
    try:
        images = transform.normalise(pixels.to(machine.device)).contiguous(memory_format=torch.channels_last)
        with machine.autocast():
            both: Tensor = network(images, folds)  # (f, b, 2)
        return (both[..., 1] - both[..., 0]).float()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        if len(pixels) == len(folds):
            raise UserError(
                f"{network.backbone.name}: one image of {len(folds)} folds does not fit in the memory of "
                f"{machine.device}. Use --folds-at-once 1, free memory, or take a smaller model."
            ) from error
    torch.cuda.empty_cache()
    by_fold = pixels.view(len(folds), -1, *pixels.shape[1:])  # (f, b, 3, s, s)
    halves = torch.tensor_split(by_fold, 2, dim=1)
    return torch.cat(
        [network_logits(network, transform, half.flatten(0, 1), folds, machine=machine) for half in halves], dim=1
    )


# ----------------------------------------------------------------------------------------------------------- one epoch


@dataclass(frozen=True, eq=False)
class _Plan:
    """What one fold sees in one epoch: rows (n_batches, b), and draws (n_batches, b, k) for augmentation."""

    rows: Tensor
    draws: Tensor | None

    @property
    def n_batches(self) -> int:
        return len(self.rows)


def _plan(data: TrainingSet, fold: int, recipe: Recipe, *, seed: int, epoch: int) -> _Plan:
    """Weighted sampling with replacement, inverse to class frequency: as many draws as the fold has training rows."""
    generator = torch.Generator().manual_seed(seed_of(seed, fold, epoch, _DRAW_SEED))
    rows = torch.from_numpy(np.flatnonzero(data.folds.fold != fold))
    label = data.label.cpu()[rows]
    weight = (1.0 / torch.bincount(label))[label]
    n_batches = -(-len(rows) // recipe.batch_size)
    n = n_batches * recipe.batch_size  # whole batches only: the last one is filled up
    drawn = rows[torch.multinomial(weight, n, replacement=True, generator=generator)]
    draws = None
    if recipe.augment is not None:
        draws = draw(n, recipe.augment, generator=generator).view(n_batches, recipe.batch_size, -1)
    return _Plan(drawn.view(n_batches, -1), draws)


def _backward(
    network: Network,
    data: TrainingSet,
    recipe: Recipe,
    plans: Mapping[int, _Plan],
    folds: Sequence[int],
    batch: int,
    *,
    step: int,
    machine: Compute,
) -> dict[int, Tensor]:
    """Fill the network's gradients from this process's share of one batch of each fold.

    Returns:
        The share's part of each fold's mean loss; like the gradients, it has to be summed over all processes.
    """
    statistics = network.values[:, network.n_trained :]
    own = machine.process_group.shard_rows(recipe.batch_size)

    def losses_of(network: Network, group: list[int]) -> dict[int, Tensor]:
        images, label = _images(data, recipe, [plans[fold] for fold in group], batch, own, machine.device)
        with machine.autocast():
            logits = network(images, group, step=step)  # (f, b, 2)
        each = F.cross_entropy(logits.flatten(0, 1), label, reduction="none").view(len(group), -1).mean(dim=1)
        each = each * ((own.stop - own.start) / recipe.batch_size)  # by 1, to the bit, in a single process
        after = statistics.clone()
        each.sum().backward()
        statistics.copy_(after)  # activations computed again have moved them again
        return dict(zip(group, each.detach(), strict=True))

    while True:
        before = statistics.clone()
        try:
            network.clear_gradients()
            losses = _joined(machine.each(network, folds, losses_of))
            network.gather_gradients()
            return losses
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            statistics.copy_(before)
            _save_memory(network, machine, recipe, error)


def _joined(parts: Sequence[dict[int, Found]]) -> dict[int, Found]:
    return {fold: found for part in parts for fold, found in part.items()}


def _images(
    data: TrainingSet, recipe: Recipe, plans: Sequence[_Plan], batch: int, own: slice, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The `own` rows of one batch of each fold, fold after fold.

    Returns:
        Augmented, normalised images (f * b, 3, s, s), and labels (f * b,).
    """
    rows = torch.cat([plan.rows[batch, own] for plan in plans])
    pixels = data.take(rows).to(device, non_blocking=True)
    draws = [plan.draws[batch, own] for plan in plans if plan.draws is not None]
    if recipe.augment is not None:
        changed = augment(pixels / 255, torch.cat(draws).to(device), size=pixels.shape[-1], options=recipe.augment)
        pixels = changed * 255
    images = data.transform.normalise(pixels).contiguous(memory_format=torch.channels_last)
    return images, data.label[rows.to(data.label.device)]


def _save_memory(network: Network, machine: Compute, recipe: Recipe, error: RuntimeError) -> None:
    """Make the next attempt need less memory, or give up."""
    torch.cuda.empty_cache()
    if network.n_synchronized_norms:
        raise UserError(  # the others wait inside a pass that cannot be begun again
            f"{network.backbone.name}: a share of {recipe.batch_size} images does not fit in the memory of "
            f"{machine.device}. The last checkpoint is kept: go on with --resume and --grad-checkpointing, or with "
            "more processes."
        ) from error
    if machine.folds_at_once > 1:
        machine.folds_at_once = -(-machine.folds_at_once // 2)
        say(f"out of memory on {machine.device}; going on with {machine.folds_at_once} folds at once.")
    elif checkpoint_gradients(network):
        say(f"out of memory on {machine.device}; going on with gradient checkpointing, which is slower.")
    else:
        raise UserError(
            f"{network.backbone.name}: {recipe.batch_size} images of one fold do not fit in the memory of "
            f"{machine.device}. The last checkpoint is kept: use a smaller --batch-size or model in a new run, or free "
            "memory and --resume."
        ) from error


def checkpoint_gradients(network: Network) -> bool:
    """Compute activations again in the backward pass instead of keeping them; False if that is so already."""
    model: Any = network.model
    if getattr(model, "grad_checkpointing", False) or not hasattr(model, "set_grad_checkpointing"):
        return False
    model.set_grad_checkpointing(True)
    network.forget_replicas()
    return True


def _optimizer(row: Tensor, recipe: Recipe, moments: Tensor, n_steps: int) -> torch.optim.Optimizer:
    """An optimiser of one fold's row whose moments are the given memory."""
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
            + " Start a new run with a smaller --learning-rate, or with --precision fp32."
        )
