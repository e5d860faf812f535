"""How fast is a device, and what does it do while some work runs?

What only a GPU can be asked (kernels, waits) is in small functions here, so that all else runs on a CPU too.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch._C._autograd import DeviceType


@dataclass(frozen=True)
class Profile:
    """What a device did while some work ran.

    Attributes:
        kernels: name and seconds of every kernel, in order.
        host: seconds until all work was started.
        whole: seconds until it was done.
    """

    kernels: tuple[tuple[str, float], ...]
    host: float
    whole: float


def matmul_peak(device: torch.device, *, tiny: bool = False) -> float:
    """Measure FLOP/s of a large bf16 product: the best of ten."""
    n = 64 if tiny else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / _best(lambda: a @ b, device)


def bandwidth(device: torch.device, *, tiny: bool = False) -> float:
    """Measure bytes per second that a copy reads and writes: the best of ten."""
    a = torch.zeros(2**10 if tiny else 2**28, device=device)  # 1 GiB, far more than any cache
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / _best(lambda: b.copy_(a), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    def timed() -> float:
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        return time.perf_counter() - started

    work()
    return min(timed() for _ in range(10))


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all that was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(work: Callable[[], object], device: torch.device) -> Profile:
    """List the kernels that work runs on a device (on a CPU: torch's operations)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    kind = DeviceType.CPU
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        kind = DeviceType.CUDA
    with torch.profiler.profile(activities=activities) as profiler:
        timing = timed(work, device)
    # Annotations, such as those of compiled code, span kernels that are in the list themselves.
    events = [
        event
        for event in profiler.events() or ()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    return replace(timing, kernels=tuple((event.name, event.time_range.elapsed_us() / 1e6) for event in events))


def timed(work: Callable[[], object], device: torch.device) -> Profile:
    """Time work: until the host has started it, and until it is done."""
    wait(device)
    started = time.perf_counter()
    work()
    host = time.perf_counter() - started
    wait(device)
    return Profile((), host, time.perf_counter() - started)


def synchronisations(work: Callable[[], object]) -> int:
    """Count the operations of work that wait for the GPU, after a first call that may wait for what is kept."""
    work()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


_ATTENTION = {
    "cuDNN": r"cudnn.*(sdpa|attention|flash|fmha)|sdpa.*cudnn",
    "flash": r"flash",
    "memory-efficient": r"fmha|efficient_attention|mem_eff",
    "plain products": r"softmax",
}


def attention_kind(kernels: Sequence[str]) -> str:
    """Tell by the names of its kernels which of torch's attentions ran."""
    text = "\n".join(kernels).lower()
    return next((kind for kind, pattern in _ATTENTION.items() if re.search(pattern, text)), "unknown")
