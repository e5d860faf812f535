"""How do several processes train as one?

torchrun starts the same command several times. Every process holds the whole training state. Of each fold's batch it
computes the rows of its own shard; the gradients are summed over all processes, so every process makes the same step as
a single process would with the whole batch. Evaluation is sharded over rows in the same way.

Only sums of tensors and short texts are exchanged. Every decision (early stopping, learning rate, epoch kept) follows
from numbers that are equal in all processes, so all decide alike. Only the first process writes files and prints.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from features.console import Interrupted, UserError, quieten
from features.fingerprint import differences

if TYPE_CHECKING:  # torch may have been built without torch.distributed
    from torch.distributed.distributed_c10d import Store

# How long to wait for the slowest process, which may be writing a checkpoint or downloading weights.
_TIMEOUT = timedelta(hours=2)
_POLL = 0.05  # seconds
_KNOWN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)


class ProcessLostError(UserError):
    """Another process of the training has ended."""


@dataclass(frozen=True, eq=False)
class ProcessGroup:
    """This process among those that train together. The default is a single process, for which every method is trivial.

    Attributes:
        rank: the number of this process, from 0.
        world_size: how many processes there are.
        local_rank: the number of this process on its machine.
        store: torch.distributed's key-value store, through which texts are exchanged; None for a single process.
        launch: names torchrun's launch, the same after every restart; None without torchrun.
        restarted: whether torchrun has restarted all processes because one had ended.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store: Store | None = None
    launch: str | None = None
    restarted: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def shard_rows(self, n: int) -> slice:
        """Return the rows of n that this process computes: contiguous, in order of rank, in nearly equal shares."""
        return slice(n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size)

    # ------------------------------------------------------------------------------------------------------- texts

    def broadcast(self, name: str, make: Callable[[], str]) -> str:
        """Return in every process the text that `make` returns in the first one; the others do not call it.

        Args:
            name: a key of the store; each name can be used once.
            make: called in the first process only.

        Raises:
            ProcessLostError: another process has ended; so do all methods below.
        """
        if self.store is None:
            return make()
        if self.is_first:
            text = make()
            self._call(lambda store: store.set(name, text))
        return self._read(name).decode()

    def assert_same(self, name: str, value: Mapping[str, Any]) -> None:
        """Wait until every process has called this with a value equal to the first process's.

        Raises:
            UserError: this process's value differs from the first process's.
        """
        if self.store is None:
            return
        expected = json.loads(self.broadcast(name, lambda: json.dumps(value)))
        differing = [f"{key} is {here} instead of {first}" for key, first, here in differences(expected, value)]
        if differing:
            raise UserError(
                f"process {self.rank} of {self.world_size} differs from process 0: {'; '.join(differing[:5])}. All "
                "need the same command, packages, data and weights, the same kind of device, and a runs folder that "
                "all see."
            )
        self.barrier(f"{name}, checked")

    def barrier(self, name: str) -> None:
        """Wait until every process has called this; each name can be used once."""
        if self.store is None:
            return
        if self._call(lambda store: store.add(name, 1)) == self.world_size:
            self._call(lambda store: store.set(f"{name}, all", ""))
        self._read(f"{name}, all")

    def fails_first(self) -> bool:
        """Record that this process has failed; True if it is the first, whose message tells the cause."""
        try:
            return self.store is None or self.store.add(_FAILED, 1) == 1
        except RuntimeError:
            return True  # the store is gone, and perhaps every other process

    def _read(self, name: str) -> bytes:
        """Poll for a key: torch's own waiting ignores signals."""
        until = time.monotonic() + _TIMEOUT.total_seconds()
        while not self._call(lambda store: store.check([name])):
            if time.monotonic() > until or self._call(lambda store: store.check([_FAILED])):
                raise ProcessLostError(_LOST)
            time.sleep(_POLL)
        value: bytes = self._call(lambda store: store.get(name))
        return value

    def _call(self, ask: Callable[[Store], Any]) -> Any:
        assert self.store is not None
        with _lost_if_unreachable():
            return ask(self.store)

    # ----------------------------------------------------------------------------------------------------- tensors

    def connect(self, device: torch.device) -> None:
        """Connect all processes before the first tensor is exchanged: through NCCL between GPUs, gloo between CPUs."""
        if self.store is None:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self._require_own_gpus(_gpu_id(device))
        from torch.distributed.distributed_c10d import PrefixStore

        self.barrier("about to connect")
        with _lost_if_unreachable():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("sums", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=_TIMEOUT,
            )

    def _require_own_gpus(self, gpu: str) -> None:
        """Wait until every process has named its GPU.

        Raises:
            UserError: another process, of a lower rank, has named the same one.
        """
        self._call(lambda store: store.set(f"gpu {self.rank}", gpu))
        for other in range(self.rank):
            if self._read(f"gpu {other}").decode() == gpu:
                raise UserError(
                    f"processes {other} and {self.rank} of this training have the same GPU ({gpu}), and each needs one "
                    "of its own. Start at most as many processes per machine as it has GPUs, with `device='cuda'`."
                )
        self.barrier("GPUs, checked")

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, which has the same bits in each."""
        if self.store is not None:
            with _lost_if_unreachable():
                dist.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace a tensor by the first process's."""
        if self.store is not None:
            with _lost_if_unreachable():
                dist.broadcast(tensor, 0)

    def all_gather(self, rows: NDArray[np.float32], n: int, device: torch.device) -> NDArray[np.float32]:
        """Join the rows of all processes: (shard, ...) of this process's `shard_rows(n)` to (n, ...) in each."""
        if self.store is None:
            return rows
        joined = torch.zeros(n, *rows.shape[1:], device=device)
        joined[self.shard_rows(n)] = torch.from_numpy(rows).to(device)
        self.all_reduce_(joined)  # every row is zero in all processes but one
        result: NDArray[np.float32] = joined.cpu().numpy()
        return result


SINGLE_PROCESS = ProcessGroup()
_FAILED = "failed"
_LOST = "another process of this training has ended, or cannot be reached."


def _gpu_id(device: torch.device) -> str:
    """Name a GPU, or the part of one (MIG) that this process sees, so that no other one has this name."""
    return f"{socket.gethostname()}, {torch.cuda.get_device_properties(device).uuid}"


@contextmanager
def _lost_if_unreachable() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ProcessLostError(f"{_LOST} ({reason})") from error


@contextmanager
def join_process_group() -> Iterator[ProcessGroup]:
    """Join the process group in which torchrun, or what else sets its environment variables, started this process.

    When several processes fail, only the first to fail prints its message: the others' failures follow from it.

    Raises:
        UserError: the processes cannot find each other.
    """
    process_group = _from_environment()
    if process_group.world_size == 1:
        yield process_group
        return
    quieten(not process_group.is_first)
    _handle_signals(_interrupt_once)
    try:
        yield process_group
    except (UserError, Interrupted):
        _handle_signals(signal.SIG_IGN)  # torchrun now ends all processes, and must not cut off the message
        quieten(not process_group.fails_first())
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _from_environment() -> ProcessGroup:
    environment = os.environ
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    # torchrun calls every run without a name "none": its parent process tells those apart.
    launch = f"{socket.gethostname()}:{os.getppid()}" if run_id == "none" else run_id
    restarted = environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in environment for name in needed) or environment["WORLD_SIZE"] == "1":
        return ProcessGroup(launch=launch, restarted=restarted)
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, world_size = next(rendezvous("env://", timeout=_TIMEOUT))
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        generation = _generation(store, rank, world_size)
    except (ValueError, RuntimeError) as error:
        described = ", ".join(f"{name}={environment[name]}" for name in needed)
        raise UserError(
            f"the processes of this training cannot find each other by {described} ({error}). Start them with "
            "torchrun, or unset these variables to train in a single process."
        ) from error
    return ProcessGroup(rank, world_size, local_rank, PrefixStore(generation, store), launch, restarted)


def _generation(store: Store, rank: int, world_size: int) -> str:
    """Agree on a prefix for the keys of all processes that are alive now.

    torchrun's store outlives the processes: after a restart it still holds the texts of those that have ended, and on
    several machines not even the number of restarts is the same. So the first process makes up a new prefix and answers
    whoever says hello until every other process has confirmed it.
    """
    until = time.monotonic() + _TIMEOUT.total_seconds()

    def sleep() -> None:
        if time.monotonic() > until:
            raise RuntimeError("not all processes have come")
        time.sleep(_POLL)

    if rank > 0:
        caller = uuid.uuid4().hex
        store.set(f"hello {rank}", caller)
        while not store.check([f"welcome {caller}"]):
            sleep()
        name: str = store.get(f"welcome {caller}").decode()
        store.set(f"{name} here {rank}", "")
        return name
    name = f"generation {store.add('generation', 1)}"
    missing = set(range(1, world_size))
    while missing:
        for other in [other for other in missing if store.check([f"hello {other}"])]:
            store.set(f"welcome {store.get(f'hello {other}').decode()}", name)
        missing = {other for other in missing if not store.check([f"{name} here {other}"])}
        if missing:
            sleep()
    return name


def _handle_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt_once(signum: int, frame: object) -> None:
    """Interrupt, and ignore further signals: torchrun repeats the terminal's, which would disturb the cleaning up."""
    _handle_signals(signal.SIG_IGN)
    raise Interrupted


# --------------------------------------------------------------------------------------------------------- batch norms


def synchronize_batch_norms(model: nn.Module, process_group: ProcessGroup) -> int:
    """Replace every batch norm of a model, in place, by one whose statistics are of all processes' images.

    The names of modules and tensors stay. torch's `SyncBatchNorm` is not used because it needs a GPU
    (docs/decisions/lora.md).

    Returns:
        How many batch norms were replaced.

    Raises:
        UserError: a batch norm of a class that is not known.
    """
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    for name, module in norms:
        if type(module) not in _KNOWN_NORMS or not module.track_running_stats or module.momentum is None:
            raise UserError(
                f"{type(model).__name__} has a batch norm of its own kind ({name}, {type(module).__name__}), whose "
                "statistics over several processes are not known. Train the whole network in a single process, or use "
                "`method='lora'`."
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SynchronizedBatchNorm(module, process_group))
    return len(norms)


class SynchronizedBatchNorm(nn.Module):
    """A batch norm, with its activation where timm joins the two, over the images of all processes."""

    def __init__(self, norm: _BatchNorm, process_group: ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity())
        assert norm.momentum is not None
        self.momentum, self.eps, self.process_group = norm.momentum, norm.eps, process_group
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate (n, c, ...)."""
        mean: Tensor = self.running_mean  # type: ignore[assignment]
        var: Tensor = self.running_var  # type: ignore[assignment]
        if self.training:
            y = self._normalise_together(x, mean, var)
        else:
            y = F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        activated: Tensor = self.act(self.drop(y))
        return activated

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _normalise_together(self, x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        y: Tensor
        y, mean, unbiased = _SynchronizedBatchNorm.apply(x, self.weight, self.bias, self.eps, self.process_group)
        running_mean.mul_(1 - self.momentum).add_(mean, alpha=self.momentum)
        running_var.mul_(1 - self.momentum).add_(unbiased, alpha=self.momentum)
        return y


class _SynchronizedBatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and var over the images of all processes.

    The gradients of weight and bias are those of this process's images alone, like all other gradients before they are
    summed over processes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, process_group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes, shape = _axes(x)
        var, mean = torch.var_mean(wide, axes, correction=0)
        count = x.numel() // x.shape[1]
        # (world_size, 2c + 1): each process fills one row. Merged in float64, by the means and the squares about them.
        rows = torch.zeros(process_group.world_size, 2 * len(mean) + 1, dtype=torch.float64, device=x.device)
        rows[process_group.rank] = torch.cat([mean, var, mean.new_tensor([count])])
        process_group.all_reduce_(rows)
        means, variances, counts = torch.split(rows, [len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        overall = (counts * means).sum(0) / total
        squares = (counts * (variances + (means - overall) ** 2)).sum(0)
        mean, scale = overall.to(wide), (squares / total + eps).rsqrt().to(wide)
        gain = scale if weight is None else scale * weight
        offset = -mean * gain if bias is None else bias - mean * gain
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.total, ctx.process_group = total.to(wide), process_group
        unbiased = (squares / (total - 1)).to(wide)
        ctx.mark_non_differentiable(mean, unbiased)
        return torch.addcmul(offset.view(shape), wide, gain.view(shape)).to(x.dtype), mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        axes, shape = _axes(x)
        wide = grad.to(mean.dtype)
        normed = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        local = torch.stack([wide.sum(axes), (wide * normed).sum(axes)])  # (2, c) over this process's images
        overall = local.clone()
        ctx.process_group.all_reduce_(overall)
        along, across = (overall / ctx.total).unbind()
        gain = scale if weight is None else scale * weight
        grad_x = (wide - along.view(shape) - normed * across.view(shape)) * gain.view(shape)
        grad_weight = None if weight is None else local[1].to(weight.dtype)
        grad_bias = None if weight is None else local[0].to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def _axes(x: Tensor) -> tuple[list[int], list[int]]:
    """Find the axes that a batch norm averages over, and the shape in which a value per channel broadcasts to x."""
    return [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
