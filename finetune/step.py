"""What happens in one training step of all members?

Patches become images, images losses, losses gradients, and gradients steps of Adam. On a GPU nothing in a step waits
for the device: rows, random numbers and learning rates of an epoch lie there when it begins, and losses are read when
it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from extract.views import Transform
from features.device import agrees, constant, out_of_memory
from features.folds import Folds
from finetune import augment_kernels
from finetune.augment import PALETTE, AugmentOptions, augment
from finetune.compute import Compute, allow_unrepeatable, save_memory
from finetune.fast import GRAPH_PARAMETERS, try_graph
from finetune.network import Network
from finetune.optimizer import adam_
from finetune.recipes import Recipe


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The patches that cross-validation uses.

    Attributes:
        pixels: (n, 3, s, s) uint8, resized as extraction does it; on the device, or in main memory where the device has
            no room.
        label: (n,) int64, on the device; patches are drawn, and members judged, by it.
        folds: in which fold each row validates.
        transform: whose normalisation the network expects.
        target: (n, c) float32, on the device: the distribution over classes that a patch is trained towards; None for
            its label alone.
    """

    pixels: Tensor
    label: Tensor
    folds: Folds
    transform: Transform
    target: Tensor | None = None

    def take(self, rows: Tensor, device: torch.device) -> Tensor:
        """Take to the device the pixels (m, 3, s, s) of m row numbers, which lie where the pixels do, in any shape."""
        pixels = self.pixels[rows.flatten()]
        if pixels.device.type != device.type:  # a GPU's: it copies pinned memory while the host goes on
            pixels = pixels.pin_memory().to(device, non_blocking=True)
        return pixels

    def held_out(self, fold: int) -> NDArray[np.intp]:
        """List the rows that validate in a fold."""
        return np.flatnonzero(self.folds.fold == fold)


@dataclass(frozen=True, eq=False)
class Batches:
    """What the members of a network see in the steps of an epoch; without the first axis, in one step.

    Attributes:
        rows: (n_batches, f, b) of the training set, on the device of its pixels.
        target: (n_batches, f, b) labels, or (n_batches, f, b, c) distributions over classes.
        draws: (n_batches, f, b, k) for augmentation; None for none.
        keys: (n_batches, f) `finetune.lora.dropout_keys`.
        schedule: (n_batches, f, 4) `finetune.optimizer.Scalars`.
    """

    rows: Tensor
    target: Tensor
    draws: Tensor | None
    keys: Tensor
    schedule: Tensor

    @property
    def n_batches(self) -> int:
        """The number of steps."""
        return len(self.rows)

    def at(self, index: int | slice | list[int]) -> Batches:
        """Take one step, or of one step some members."""
        return self._map(lambda part: part[index])

    def clone(self) -> Batches:
        """Copy all of it."""
        return self._map(Tensor.clone)

    def copy_(self, other: Batches) -> None:
        """Take the numbers of another in place."""
        for field in fields(self):
            if getattr(self, field.name) is not None:
                getattr(self, field.name).copy_(getattr(other, field.name))

    def draws_of(self, shard: slice) -> Tensor | None:
        """Take the draws (f * b, k) of one step, of these patches of every member's batch."""
        return None if self.draws is None else self.draws[:, shard].flatten(0, 1)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batches:
        parts = (getattr(self, field.name) for field in fields(self))
        return Batches(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]


class Step:
    """One training step of all members of a network.

    Attributes:
        losses: (n_rows,) this process's part of each member's loss, summed over the steps since `begin`.
    """

    def __init__(
        self, network: Network, data: TrainingSet, recipe: Recipe, *, moments: Tensor, compute: Compute
    ) -> None:
        self._network, self._data, self._recipe = network, data, recipe
        self._moments, self._compute = moments, compute
        self._input: Callable[..., Tensor] = network_input
        device = compute.device
        self._constants = (*data.transform.scale_and_offset(device), constant(PALETTE, device), recipe.augment)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._first = True
        self._number = 0
        self.losses = torch.zeros(len(network.members), dtype=network.values.dtype, device=network.values.device)

    def begin(self, batches: Batches, *, first: int = 0) -> None:
        """Take the batches of the next epoch, whose first step has this number among all."""
        self._batches, self._first_number = batches, first
        self.losses.zero_()

    def __call__(self, batch: int, members: Sequence[int]) -> None:
        """Step these members once: those that train in this batch of the epoch.

        Raises:
            UserError: memory running out with a single member and checkpointed gradients.
        """
        now = self._batches.at(batch)
        self._number = self._first_number + batch
        if self._first:
            self._try_fast(now, members)
            self._first = False
        if self._graph is None:
            self._step(now, members)
        else:
            self._captured.copy_(now)
            self._graph.replay()

    def _try_fast(self, batch: Batches, members: Sequence[int]) -> None:
        """Augment by Triton kernels, and capture the step of a small network, where this machine can."""
        network, compute = self._network, self._compute
        if not compute.fast or compute.device.type != "cuda":
            return
        if self._recipe.augment is not None and augment_kernels.available():
            shard = compute.process_group.shard_rows(self._recipe.batch_size)
            pixels = self._data.take(batch.rows[:, shard], compute.device)
            given: tuple[Any, ...] = (pixels, batch.draws_of(shard), *self._constants)
            # In float32 they read a pixel up to a thousandth of a pixel away from where plain PyTorch reads it.
            if agrees(
                "The augmentation's Triton code",
                lambda: [augment_kernels.network_input(*given)],
                lambda: [network_input(*given)],
                tolerance=5e-3,
            ):
                self._input = augment_kernels.network_input
                compute.fast_paths.add("augmentation kernels")
        n_parameters = sum(parameter.numel() for parameter in network.model.parameters())
        small = n_parameters <= GRAPH_PARAMETERS and network.method != "full"
        # Checkpointed blocks look at the state of random numbers, which a capture forbids.
        small = small and not getattr(network.model, "grad_checkpointing", False)
        whole = compute.process_group.world_size == 1 and self._data.pixels.device.type == compute.device.type
        if small and whole:
            self._captured = batch.clone()
            state = [network.values, self._moments, self.losses]
            outcome = [network.gradients, self.losses]
            self._graph = try_graph(
                lambda: self._step(self._captured, network.members), state, outcome, precision=compute.precision
            )
            if self._graph is not None:
                compute.fast_paths.add("CUDA graph")

    def _step(self, batch: Batches, members: Sequence[int]) -> None:
        network = self._network
        for rows, losses in self._backward(batch, members):
            self.losses[rows] += losses
        self._compute.process_group.all_reduce_(network.gradients)
        adam_(network.values[:, : network.n_trained], network.gradients, self._moments, batch.schedule, self._recipe)

    def _backward(self, batch: Batches, members: Sequence[int]) -> list[tuple[slice | list[int], Tensor]]:
        """Compute the network's gradients on this process's rows of a batch.

        Returns:
            Of each pass, which rows of the network it held, and these patches' part of each member's mean loss. Like
            the gradients, it has to be summed over all processes.
        """
        network, compute, recipe = self._network, self._compute, self._recipe
        statistics = network.values[:, network.n_trained :]
        shard = compute.process_group.shard_rows(recipe.batch_size)

        def losses_of(network: Network, group: list[int]) -> tuple[slice | list[int], Tensor]:
            rows = network.rows_of(group)
            part = batch.at(rows)
            pixels = self._data.take(part.rows[:, shard], compute.device)
            images = self._input(pixels, part.draws_of(shard), *self._constants)
            with compute.autocast():
                logits = network(images, group, step=part.keys)  # (f, b, c)
            target = part.target[:, shard].flatten(0, 1)
            losses = F.cross_entropy(logits.flatten(0, 1), target, reduction="none").view(len(group), -1).mean(dim=1)
            losses = losses * (part.schedule[:, 0] * ((shard.stop - shard.start) / recipe.batch_size))
            after = statistics.clone()
            losses.sum().backward()
            statistics.copy_(after)  # checkpointed activations, computed again, have updated them a second time
            return rows, losses.detach()

        while True:
            before = statistics.clone()
            try:
                network.seed_layers(self._number, shard.start)
                network.clear_gradients()
                losses = compute.map_passes(network, members, losses_of)
                network.gather_gradients()
                return losses
            except RuntimeError as error:
                if compute.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise  # nothing that helps is allowed while a graph is captured
                statistics.copy_(before)
                if out_of_memory(error):
                    save_memory(network, compute, recipe.batch_size, error)
                elif not allow_unrepeatable(compute, error):
                    raise


def network_input(
    pixels: Tensor,
    draws: Tensor | None,
    scale: Tensor,
    offset: Tensor,
    palette: Tensor,
    options: AugmentOptions | None,
) -> Tensor:
    """Make a network's input of pixels: augmented, normalised, channels last (`finetune.augment_kernels` on a GPU).

    Args:
        pixels: (m, 3, s, s) uint8.
        draws: (m, k) uniform numbers for augmentation; None for none.
        scale, offset: (3, 1, 1) of the transform.
        palette: `finetune.augment.PALETTE` on the device.
        options: of augmentation; None for none.
    """
    if options is not None and draws is not None:
        pixels = augment(pixels / 255, draws, size=pixels.shape[-1], options=options, palette=palette) * 255
    return (pixels * scale - offset).contiguous(memory_format=torch.channels_last)
