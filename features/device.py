"""Which device does a process compute on, and what can that device do?"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from features.console import UserError, say

_CPUINFO = Path("/proc/cpuinfo")  # of Linux


def find_device(name: str, *, local_rank: int | None = None, n_processes: int = 1) -> torch.device:
    """Find the torch device of an option: "auto" is a GPU if there is one, else the CPU.

    With `local_rank`, "auto" and "cuda" give each process on a machine a GPU of its own. A process that sees one GPU
    takes that one, whatever its rank: some launchers show every process only the GPU that is meant for it.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        local_rank: the number of this process among those on its machine, from 0; None if it is the only one.
        n_processes: how many processes train together, each with the same `name`.

    Raises:
        UserError: if the device does not exist here, there are fewer GPUs than processes, or one GPU is named for
            several processes.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if n_gpus else "cpu"
    if name == "cuda" and local_rank is not None and n_gpus:
        return torch.device("cuda", _gpu_of(local_rank, n_gpus))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N.")
    if device.index is not None and device.type == "cuda" and n_processes > 1:
        raise UserError(
            f"device {name!r} names one GPU for all of {n_processes} processes. Use auto or cuda, by which each "
            "process takes a GPU of its own, or cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise UserError(
            f"device {name!r} was asked for, but torch sees {n_gpus} GPUs here. Use `device='cpu'` or `device='auto'`."
        )
    return device


def _gpu_of(local_rank: int, n_gpus: int) -> int:
    if n_gpus == 1:
        return 0
    if local_rank >= n_gpus:
        raise UserError(
            f"process {local_rank} of this machine (counted from 0) needs a GPU of its own, but torch sees {n_gpus} "
            "GPUs. Start at most as many processes per machine as it has GPUs, or use `device='cpu'`."
        )
    return local_rank


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 in hardware; emulated products are slower than those of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch has no public function for it on CPUs.
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if all(checks):
        return any(check() for check in checks if check is not None)
    return _CPUINFO.exists() and bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", _CPUINFO.read_text()))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a torch error means that memory ran out, on any device."""
    return bool(isinstance(error, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@cache
def constant(values: tuple[float, ...] | tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """Give a float32 tensor of constants, copied to a device once: each copy would wait for all of a GPU's work."""
    with torch.inference_mode(False):  # so that it may take part in training too
        return torch.tensor(values, dtype=torch.float32, device=device)


def agrees(
    name: str, fast: Callable[[], Sequence[Tensor]], plain: Callable[[], Sequence[Tensor]], *, tolerance: float
) -> bool:
    """Whether a fast way to compute runs on this machine and gives what the plain one gives; if not, say so.

    Args:
        name: what is left out if it does not: the subject of a sentence.
        fast, plain: compute the same tensors; only `fast` may fail.
        tolerance: largest difference of a tensor, as a fraction of its largest element.
    """
    expected = plain()
    try:
        found = fast()
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise what they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(f"{name} cannot be used here ({reason}); going on without.")
        return False
    for one, other in zip(found, expected, strict=True):
        difference, size = (one - other).abs().max().item(), other.abs().max().item()
        if not difference <= tolerance * size:  # NaN included
            say(f"{name} differs here from plain PyTorch by {difference / max(size, 1e-30):.1e}; going on without.")
            return False
    return True
