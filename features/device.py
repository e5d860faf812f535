"""Which device does a process compute on, and what can that device do?"""

from __future__ import annotations

import ctypes
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.console import UserError, say
from features.console import out_of_memory as out_of_memory

_CPUINFO = Path("/proc/cpuinfo")  # of Linux
# From 2.9 on torch has other names for what `compute_exactly` sets, but earlier versions lack them.
warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32 behavior")


def find_device(name: str, *, local_rank: int | None = None, apple: bool = True) -> torch.device:
    """Find the torch device of an option: "auto" is a GPU if there is one, else the CPU.

    One rule holds for extraction, training, probing and prediction. With `local_rank`, "auto" and "cuda" give each
    process on a machine a GPU of its own. A process that sees one GPU takes that one, whatever its rank: some launchers
    show every process only the GPU (or the MIG part of one) that is meant for it. "cuda:N" is taken as it stands.

    Args:
        name: "auto", "cpu", "cuda", "cuda:N" or "mps" (the GPU of an Apple computer).
        local_rank: the number of this process among those on its machine, from 0; None if it is the only one.
        apple: whether it may be "mps": for embeddings in fp32, and nothing else.

    Raises:
        UserError: if the device does not exist here, cannot do what it is for, or there are fewer GPUs than processes.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if n_gpus else "mps" if has_mps and apple else "cpu"
    if name == "cuda" and local_rank is not None and n_gpus:
        return torch.device("cuda", _gpu_of(local_rank, n_gpus))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not supported: use auto, cpu, cuda, cuda:N or mps.")
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise UserError(
            f"device {name!r} was asked for, but torch sees {n_gpus} GPUs here. Use `device='cpu'` or `device='auto'`."
        )
    if device.type == "cuda":
        # Always with its number: tensors on it have one, and a device without is not equal to theirs.
        device = torch.device("cuda", device.index or 0)
    if device.type == "mps" and not has_mps:
        raise UserError(
            f"device {name!r} was asked for, but torch sees no Apple GPU here. Use `device='cpu'` or `device='auto'`."
        )
    if device.type == "mps" and not apple:
        raise UserError(
            "Apple's GPUs are for embeddings in fp32 alone: they have no float64, in which probes are summed, torch "
            "does not promise that a fine-tuning repeats itself there bit by bit, and half precision depends on the "
            "version of macOS. Use `device='cpu'`, or a machine with an NVIDIA GPU."
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


def compute_exactly(device: torch.device) -> None:
    """Make this process compute on a device as it says: float32 in full, and the same bits again. Call it first.

    By default NVIDIA GPUs round the factors of float32 convolutions to 11 bits (TF32), and cuDNN's attention, which
    newer versions of torch prefer, gives NaN at some lengths (pytorch#166211).
    """
    if hasattr(torch.backends, "fp32_precision"):  # from torch 2.9 on, and stronger there than what is set below
        torch.backends.fp32_precision = "none"
        torch.backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.index is not None:
        torch.cuda.set_device(device)  # or pinned memory and events would take room on the first GPU too


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in full within this context, whatever a program or the environment has allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def numerics(device: torch.device) -> dict[str, Any]:
    """List what else decides the last bits of a result computed on a GPU, as JSON values: kernels, and TF32."""
    attention = ["math"]
    if device.type == "cuda":
        kernels = ("flash", "mem_efficient", "cudnn", "math")
        attention = [name for name in kernels if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    tf32 = device.type == "cuda" and (
        torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    )
    return {"attention": attention, "tf32": tf32}


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 in hardware; emulated products are slower than those of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # torch has no public function for it on CPUs.
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if all(checks):
        return any(check() for check in checks if check is not None)
    return _CPUINFO.exists() and bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", _CPUINFO.read_text()))


def free_cached_memory(device: torch.device) -> None:
    """Give memory that torch keeps for later back to a GPU, so that blocks of other sizes fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


# Numbers of glibc's malloc.h: how many blocks may be mapped, each alone, and how many free bytes at the heap's end are
# kept. What `mallopt` is told while memory is kept, and afterwards, which is glibc's default.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1
_KEEPING = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
_GIVING_BACK = {_M_MMAP_MAX: 2**16, _M_TRIM_THRESHOLD: 2**17}


@contextmanager
def keeping_freed_memory(device: torch.device) -> Iterator[None]:
    """Have a CPU's process keep the memory that tensors free, for the next tensors; at the end it is given back.

    glibc gives large blocks back at once, and gets them again page by page: training steps, which need the same blocks
    each time, are a tenth faster without (docs/performance.md). No effect on a GPU, or with another C library.
    """
    try:
        libc = ctypes.CDLL(None) if device.type == "cpu" else None
        mallopt, malloc_trim = (libc.mallopt, libc.malloc_trim) if libc is not None else (None, None)
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
        mallopt = malloc_trim = None
    if mallopt is None or malloc_trim is None:
        yield
        return
    for setting, value in _KEEPING.items():
        mallopt(setting, value)
    try:
        yield
    finally:
        for setting, value in _GIVING_BACK.items():
            mallopt(setting, value)
        malloc_trim(0)


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Give the stream of an NVIDIA GPU on which data is copied to it and from it, beside what it computes."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


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
