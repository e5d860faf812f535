"""On what are passes through the network computed, how many members at a time, and what if memory runs out?"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from extract.compute import side_by_side
from extract.views import Transform
from features.console import UserError, say
from features.device import free_cached_memory, out_of_memory
from finetune.network import Network
from finetune.process_group import SINGLE_PROCESS, ProcessGroup

Result = TypeVar("Result")
EVALUATION_BATCH = {"cpu": 16, "cuda": 64}  # images per member and forward pass


@dataclass
class Compute:
    """How passes are computed. It does not change what they compute, up to rounding.

    Attributes:
        device: of the network.
        precision: "fp32" or "bf16" (autocast).
        folds_at_once: how many members (folds, of all seeds) share a forward pass; halved when memory runs out.
        process_group: the processes that share the batches.
        same_shapes: whether all passes are made alike, as compiled code needs it. Members that have stopped then stay
            in the passes of others, and the last patches of an evaluation are filled up.
        evaluation_batch: images per member and forward pass; halved when memory runs out.
        fast: whether fast ways to train are tried (`finetune.fast`).
        fast_paths: those in use.
        unrepeatable: operations that this GPU cannot repeat bit by bit, which training needed.
    """

    device: torch.device
    precision: str
    folds_at_once: int
    process_group: ProcessGroup = SINGLE_PROCESS
    same_shapes: bool = False
    evaluation_batch: int = 0
    fast: bool = False
    fast_paths: set[str] = field(default_factory=set)
    unrepeatable: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.evaluation_batch = self.evaluation_batch or EVALUATION_BATCH[self.device.type]

    def autocast(self) -> torch.autocast:
        """Return a context that computes in the precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def map_passes(
        self, network: Network, members: Sequence[int], work: Callable[[Network, list[int]], Result]
    ) -> list[Result]:
        """Call `work` with the network, or a replica, and the members of every pass; returns the results in order.

        With `same_shapes` passes also hold members of the network that were not asked for.

        On a CPU passes run side by side, in as many threads as torch may use. The operations of one member's batch are
        too short to be divided among threads: where a core is busy with other work, all would wait after every one.
        """
        wanted = network.members if self.same_shapes else members
        starts = range(0, len(wanted), self.folds_at_once)
        passes = [list(wanted[start : start + self.folds_at_once]) for start in starts]
        passes = [group for group in passes if not set(group).isdisjoint(members)]
        n = min(torch.get_num_threads(), len(passes)) if self.device.type == "cpu" else 1
        idle: SimpleQueue[Network] = SimpleQueue()
        for replica in network.replicas(n):
            idle.put(replica)

        def with_replica(group: list[int]) -> Result:
            replica = idle.get()
            try:
                return work(replica, group)
            finally:
                idle.put(replica)

        with side_by_side(self.device, n) as map_passes:
            return list(map_passes(with_replica, passes))


@torch.inference_mode()
def network_logits(
    network: Network, transform: Transform, pixels: Tensor, members: Sequence[int], *, compute: Compute
) -> Tensor:
    """Compute the logits (f, b, c-1), of class k over class 0, of pixels (f, b, 3, s, s): each member's by its weights.

    They are means over the orientations in which the transform shows a patch. If memory runs out, the batch is halved.

    Raises:
        UserError: if not even one image of each fold fits.
    """
    logits, first = [], 0
    while first < pixels.shape[1]:
        part = pixels[:, first : first + compute.evaluation_batch]
        n = part.shape[1]
        if compute.same_shapes and n < compute.evaluation_batch:
            part = torch.cat([part, part[:, -1:].expand(-1, compute.evaluation_batch - n, -1, -1, -1)], dim=1)
        try:
            images = transform.normalise(part.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
            with compute.autocast():
                shown = [network(one, members) for one in transform.shown(images)]
            outputs = torch.stack(shown).mean(dim=0)  # (f, b, c)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if compute.evaluation_batch == 1:
                raise UserError(
                    f"{network.backbone.name}: one image of {len(members)} folds does not fit in the memory of "
                    f"{compute.device}. Use `folds_at_once=1`, free memory, or take a smaller model."
                ) from error
            free_cached_memory(compute.device)
            compute.evaluation_batch = min(compute.evaluation_batch, n) // 2 or 1
            continue
        logits.append((outputs[:, :n, 1:] - outputs[:, :n, :1]).float())
        first += n
    return torch.cat(logits, dim=1)


def save_memory(network: Network, compute: Compute, batch_size: int, error: RuntimeError) -> None:
    """Make the next training step need less memory: halve the folds per pass, then checkpoint gradients.

    Raises:
        UserError: a step cannot be repeated here, or both have been tried.
    """
    free_cached_memory(compute.device)
    if network.n_synchronized_norms:
        raise UserError(  # the other processes wait inside a pass that cannot be repeated
            f"{network.backbone.name}: this process's part of {batch_size} images does not fit in the memory of "
            f"{compute.device}. The last checkpoint is kept: go on with `resume` and `grad_checkpointing=True`, or "
            "with more processes."
        ) from error
    if compute.folds_at_once > 1:
        compute.folds_at_once = -(-compute.folds_at_once // 2)
        say(f"out of memory on {compute.device}; going on with {compute.folds_at_once} folds at once.")
    elif checkpoint_gradients(network):
        say(f"out of memory on {compute.device}; going on with gradient checkpointing, which is slower.")
    else:
        raise UserError(
            f"{network.backbone.name}: {batch_size} images of one fold do not fit in the memory of {compute.device}. "
            "The last checkpoint is kept: use a smaller `batch_size` or model in a new run, or free memory and "
            "`resume`."
        ) from error


def allow_unrepeatable(compute: Compute, error: RuntimeError) -> bool:
    """Let an operation that has no deterministic form go on as it is, and say so; False for any other error."""
    # The second where a program has used cuBLAS before the variable was set that makes it repeat itself.
    refused = r"(\S+) does not have a deterministic implementation|Deterministic behavior was enabled .*CuBLAS"
    match = re.match(refused, str(error), re.DOTALL)
    if match is None or torch.is_deterministic_algorithms_warn_only_enabled():
        return False
    name = match[1] or "cuBLAS"
    compute.unrepeatable.add(name)
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", "(?s).*deterministic", UserWarning)
    say(
        f"{compute.device} cannot repeat {name} bit by bit: a training that is interrupted and resumed may differ "
        "in its last digits from one that is not."
    )
    return True


def checkpoint_gradients(network: Network) -> bool:
    """Have the backward pass compute activations again instead of keeping them; False if it does so already."""
    model: Any = network.model
    if getattr(model, "grad_checkpointing", False) or not hasattr(model, "set_grad_checkpointing"):
        return False
    model.set_grad_checkpointing(True)
    network.forget_replicas()
    return True
