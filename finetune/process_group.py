"""How do several processes train as one?

torchrun starts the same command several times. Every process holds all that is trained and takes its share of each
fold's batch; the sum of their gradients is the gradient of the whole batch, so all make the same step. What is judged
is dealt out in the same way. Sums over all processes are the only numbers that are exchanged, and as every decision
follows from them, all decide alike. The first process alone writes and speaks.
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

if TYPE_CHECKING:  # torch may have been built without
    from torch.distributed.distributed_c10d import Store

# For the slowest of all: the first process may write a checkpoint, or another machine may still download weights.
_PATIENCE = timedelta(hours=2)
_POLL = 0.05  # seconds
_KNOWN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)


class ProcessLostError(UserError):
    """Another process of the training has ended."""


@dataclass(frozen=True, eq=False)
class ProcessGroup:
    """This process's place among those that train together; by default it is alone.

    Attributes:
        rank, size: which one of how many.
        local_rank: which one on this machine.
        store: of torch.distributed, where processes leave each other words; None for a single process.
        launch: names torchrun's launch, the same in every restart; None without torchrun.
        restarted: whether torchrun has started all processes anew, as one of them had ended.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Store | None = None
    launch: str | None = None
    restarted: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """The rows of n that are this process's: all processes' follow each other and differ by one at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def device(self, asked: str) -> str:
        """The name of this process's device: of several on a machine each takes a GPU of its own.

        Raises:
            UserError: fewer GPUs than processes, or one named for all of them.
        """
        if self.size == 1 or asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
            return asked
        if asked not in ("auto", "cuda"):
            raise UserError(
                f"device {asked!r} was asked for, for all of {self.size} processes. Use auto or cuda, by which each "
                "process takes a GPU of its own, or cpu."
            )
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {self.rank} is number {self.local_rank + 1} of its machine, where torch sees "
                f"{torch.cuda.device_count()} GPUs. Start at most as many processes per machine as it has GPUs, or use "
                "--device cpu."
            )
        return f"cuda:{self.local_rank}"

    # ------------------------------------------------------------------------------------------------------- words

    def told(self, name: str, make: Callable[[], str]) -> str:
        """What the first process makes, in all processes. A name is used once."""
        if self.store is None:
            return make()
        if self.first:
            made = make()
            self._call(lambda store: store.set(name, made))
        return self._heard(name).decode()

    def agree(self, name: str, own: Mapping[str, Any]) -> None:
        """Go on once all processes have found the same.

        Raises:
            UserError: what this process has found differs from what the first has.
        """
        if self.store is None:
            return
        of_first = json.loads(self.told(name, lambda: json.dumps(own)))
        differing = [f"{key} is {now} instead of {was}" for key, was, now in differences(of_first, own)]
        if differing:
            raise UserError(
                f"process {self.rank} of {self.size} differs from process 0: {'; '.join(differing[:5])}. All need the "
                "same command, packages, data and weights, the same kind of device, and a runs folder that all see."
            )
        self.wait(f"{name}, agreed")

    def wait(self, name: str) -> None:
        """Go on once all processes have come here. A name is used once."""
        if self.store is None:
            return
        if self._call(lambda store: store.add(name, 1)) == self.size:
            self._call(lambda store: store.set(f"{name}, all", ""))
        self._heard(f"{name}, all")

    def speaks(self) -> bool:
        """Whether this process is the first that failed, whose message tells the cause."""
        try:
            return self.store is None or self.store.add(_FAILED, 1) == 1
        except RuntimeError:
            return True  # the store is gone, so nobody else may be left

    def _heard(self, name: str) -> bytes:
        """Asked for again and again: within torch's own waiting no signal is heeded."""
        until = time.monotonic() + _PATIENCE.total_seconds()
        while not self._call(lambda store: store.check([name])):
            if time.monotonic() > until or self._call(lambda store: store.check([_FAILED])):
                raise ProcessLostError(_LOST)
            time.sleep(_POLL)
        found: bytes = self._call(lambda store: store.get(name))
        return found

    def _call(self, ask: Callable[[Store], Any]) -> Any:
        assert self.store is not None
        try:
            return ask(self.store)
        except RuntimeError as error:
            raise ProcessLostError(_LOST) from error

    # -------------------------------------------------------------------------------------------------------- sums

    def connect(self, device: torch.device) -> None:
        """Before the first sum: by NCCL between GPUs, by gloo between CPUs."""
        if self.store is None:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        from torch.distributed.distributed_c10d import PrefixStore

        self.wait("about to connect")
        with _reaching():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("sums", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=_PATIENCE,
            )

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, the same bits in each."""
        if self.store is not None:
            with _reaching():
                dist.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace a tensor by the first process's."""
        if self.store is not None:
            with _reaching():
                dist.broadcast(tensor, 0)

    def gathered(self, own: NDArray[np.float32], n: int, device: torch.device) -> NDArray[np.float32]:
        """All of n rows, of which every process has its own `share`."""
        if self.store is None:
            return own
        whole = torch.zeros(n, *own.shape[1:], device=device)
        whole[self.share(n)] = torch.from_numpy(own).to(device)
        self.all_reduce_(whole)
        found: NDArray[np.float32] = whole.cpu().numpy()
        return found


SINGLE_PROCESS = ProcessGroup()
_FAILED = "failed"
_LOST = "another process of this training has ended, or cannot be reached."


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(_LOST) from error


@contextmanager
def joined() -> Iterator[ProcessGroup]:
    """This process's place among those that torchrun, or whatever sets the same variables, has started.

    Of all processes' failures only the first is told; the others follow from it.

    Raises:
        UserError: the processes cannot find each other.
    """
    ranks = _found()
    if ranks.size == 1:
        yield ranks
        return
    quieten(not ranks.first)
    _heed_signals(_interrupt_once)
    try:
        yield ranks
    except (UserError, Interrupted):
        _heed_signals(signal.SIG_IGN)  # torchrun ends all when one has ended, and nothing is to cut off the message
        quieten(not ranks.speaks())
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _found() -> ProcessGroup:
    given = os.environ
    run = given.get("TORCHELASTIC_RUN_ID")
    # A run without a name is the one of this parent process.
    launch = f"{socket.gethostname()}:{os.getppid()}" if run == "none" else run
    restarted = given.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in given for name in needed) or given["WORLD_SIZE"] == "1":
        return ProcessGroup(launch=launch, restarted=restarted)
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        local_rank = int(given.get("LOCAL_RANK", "0"))
        generation = _generation(store, rank, size)
    except (ValueError, RuntimeError) as error:
        described = ", ".join(f"{name}={given[name]}" for name in needed)
        raise UserError(
            f"the processes of this training cannot find each other by {described} ({error}). Start them with "
            "torchrun, or unset these variables to train in a single process."
        ) from error
    return ProcessGroup(rank, size, local_rank, PrefixStore(generation, store), launch, restarted)


def _generation(store: Store, rank: int, size: int) -> str:
    """A name for all processes that are alive now.

    torchrun's store outlives them: after a restart it still holds the words of those that have ended, and on several
    machines not even the number of restarts is the same. So the first process answers whoever is there until all have
    heard the new name.
    """
    until = time.monotonic() + _PATIENCE.total_seconds()

    def wait() -> None:
        if time.monotonic() > until:
            raise RuntimeError("not all have come")
        time.sleep(_POLL)

    if rank > 0:
        own = uuid.uuid4().hex
        store.set(f"hello {rank}", own)
        while not store.check([f"welcome {own}"]):
            wait()
        name: str = store.get(f"welcome {own}").decode()
        store.set(f"{name} here {rank}", "")
        return name
    name = f"generation {store.add('generation', 1)}"
    missing = set(range(1, size))
    while missing:
        for each in [each for each in missing if store.check([f"hello {each}"])]:
            store.set(f"welcome {store.get(f'hello {each}').decode()}", name)
        missing = {each for each in missing if not store.check([f"{name} here {each}"])}
        if missing:
            wait()
    return name


def _heed_signals(how: Any) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, how)


def _interrupt_once(signum: int, frame: object) -> None:
    """torchrun signals what the terminal has signalled before: the second must not disturb what follows the first."""
    _heed_signals(signal.SIG_IGN)
    raise Interrupted


# --------------------------------------------------------------------------------------------------------- batch norms


def synchronize_batch_norms(model: nn.Module, ranks: ProcessGroup) -> int:
    """Have every batch norm of a model, in place, take its statistics of the whole batch; returns how many.

    Names and tensors stay. torch's own `SyncBatchNorm` needs a GPU, and this one is the same code on any device.

    Raises:
        UserError: a kind of batch norm that is not known.
    """
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    for name, module in norms:
        if type(module) not in _KNOWN_NORMS or not module.track_running_stats or module.momentum is None:
            raise UserError(
                f"{type(model).__name__} has a batch norm of its own kind ({name}, {type(module).__name__}), whose "
                "statistics over several processes are not known. Train the whole network in a single process, or use "
                "--method lora."
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SynchronizedBatchNorm(module, ranks))
    return len(norms)


class SynchronizedBatchNorm(nn.Module):
    """A batch norm, with its activation where timm joins the two, whose batch is that of all processes."""

    def __init__(self, own: _BatchNorm, ranks: ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias = own.weight, own.bias
        for name, buffer in own.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.drop: nn.Module = getattr(own, "drop", nn.Identity())
        self.act: nn.Module = getattr(own, "act", nn.Identity())
        assert own.momentum is not None
        self.momentum, self.eps, self.ranks = own.momentum, own.eps, ranks
        self.train(own.training)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, ...) -> (n, c, ...)."""
        mean: Tensor = self.running_mean  # type: ignore[assignment]
        var: Tensor = self.running_var  # type: ignore[assignment]
        if self.training:
            y = self._shared(x, mean, var)
        else:
            y = F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        found: Tensor = self.act(self.drop(y))
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _shared(self, x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        y, mean, unbiased = _SynchronizedBatchNorm.apply(x, self.weight, self.bias, self.eps, self.ranks)
        running_mean.mul_(1 - self.momentum).add_(mean, alpha=self.momentum)
        running_var.mul_(1 - self.momentum).add_(unbiased, alpha=self.momentum)
        shared: Tensor = y
        return shared


class _SynchronizedBatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over the batches of all processes.

    Gradients of weight and bias are of this process's images alone, as all others are before they are summed.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes, shape = _axes(x)
        var, mean = torch.var_mean(wide, axes, correction=0)
        count = x.numel() // x.shape[1]
        # (size, 2c + 1): every process fills its own row. Merged by means and squares about them, in float64.
        rows = torch.zeros(ranks.size, 2 * len(mean) + 1, dtype=torch.float64, device=x.device)
        rows[ranks.rank] = torch.cat([mean, var, mean.new_tensor([count])])
        ranks.all_reduce_(rows)
        means, variances, counts = torch.split(rows, [len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        together = (counts * means).sum(0) / total
        squares = (counts * (variances + (means - together) ** 2)).sum(0)
        mean, scale = together.to(wide), (squares / total + eps).rsqrt().to(wide)
        gain = scale if weight is None else scale * weight
        offset = -mean * gain if bias is None else bias - mean * gain
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.total, ctx.ranks = total.to(wide), ranks
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
        own = torch.stack([wide.sum(axes), (wide * normed).sum(axes)])  # (2, c)
        together = own.clone()
        ctx.ranks.all_reduce_(together)
        along, across = (together / ctx.total).unbind()
        gain = scale if weight is None else scale * weight
        grad_x = (wide - along.view(shape) - normed * across.view(shape)) * gain.view(shape)
        grad_weight = None if weight is None else own[1].to(weight.dtype)
        grad_bias = None if weight is None else own[0].to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def _axes(x: Tensor) -> tuple[list[int], list[int]]:
    """The axes that a batch norm averages over, and the shape in which a value per channel meets x."""
    return [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
