"""Does each process get the device that it should, and is a device that is not there one clear message?"""

import os
import platform
import re
import subprocess
import sys

import pytest
import torch

from features import device
from features.console import UserError
from features.device import (
    compute_exactly,
    find_device,
    free_cached_memory,
    full_float32,
    has_bf16,
    keeping_freed_memory,
    numerics,
    out_of_memory,
)

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def gpus(monkeypatch):
    """Make torch see this many NVIDIA GPUs, or one of Apple's."""

    def see(n: int, *, apple: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)

    return see


@pytest.mark.parametrize(
    ("n_gpus", "name", "local_rank", "expected"),
    [
        (0, "auto", None, "cpu"),
        (0, "auto", 3, "cpu"),
        (4, "cpu", 3, "cpu"),
        (4, "auto", None, "cuda:0"),
        (4, "cuda", None, "cuda:0"),
        (4, "cuda:2", 0, "cuda:2"),
        (4, "auto", 3, "cuda:3"),
        (4, "cuda", 2, "cuda:2"),
        (4, "cuda:2", 1, "cuda:2"),  # scripts may name the GPU of each process
        (1, "auto", 3, "cuda:0"),  # the launcher shows each process its GPU alone, or its part of one (MIG)
        (1, "cuda:0", 3, "cuda:0"),
    ],
)
@pytest.mark.parametrize("apple", [False, True])
def test_each_process_takes_a_gpu_of_its_own(gpus, n_gpus, name, local_rank, expected, apple):
    gpus(n_gpus)
    assert find_device(name, local_rank=local_rank, apple=apple) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "apple", "expected"),
    [("auto", True, "mps"), ("mps", True, "mps"), ("mps:0", True, "mps:0"), ("auto", False, "cpu")],
)
@pytest.mark.parametrize("local_rank", [None, 1])
def test_an_apple_gpu_embeds_and_does_not_train(gpus, name, apple, expected, local_rank):
    gpus(0, apple=True)
    assert find_device(name, local_rank=local_rank, apple=apple) == torch.device(expected)


def test_training_and_probing_on_an_apple_gpu_are_refused_with_the_reasons(gpus):
    gpus(0, apple=True)
    with pytest.raises(
        UserError,
        match=r"no float64, in which probes are summed, .* repeats itself there bit by bit, .* Use `device='cpu'`",
    ):
        find_device("mps", apple=False)


@pytest.mark.parametrize(
    ("n_gpus", "name", "options", "message"),
    [
        (0, "cuda", {}, "torch sees 0 GPUs here"),
        (0, "cuda", {"local_rank": 1}, "torch sees 0 GPUs here"),
        (2, "cuda:2", {}, "torch sees 2 GPUs here"),
        (2, "auto", {"local_rank": 2}, r"process 2 of this machine .* torch sees 2 GPUs"),
        (1, "cuda:1", {"local_rank": 1}, "torch sees 1 GPUs here"),
        (4, "mps", {}, "torch sees no Apple GPU here"),
        (4, "xpu", {}, "not supported: use auto, cpu, cuda, cuda:N or mps"),
        (4, "gpu", {}, "unknown device 'gpu'"),
    ],
)
def test_a_device_that_cannot_be_had_is_one_message(gpus, n_gpus, name, options, message):
    gpus(n_gpus)
    with pytest.raises(UserError, match=message):
        find_device(name, **options)


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_bf16_of_a_cpu_is_what_torch_says(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert has_bf16(torch.device("cpu")) == (avx512 or amx)


def test_without_that_function_bf16_of_a_cpu_is_read_from_the_kernel(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.setattr(device, "_CPUINFO", tmp_path / "cpuinfo")
    assert not has_bf16(torch.device("cpu"))
    for flags, expected in (("avx2 avx512_bf16", True), ("amx_bf16", True), ("avx2 avx512_bf162", False)):
        (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}\n")
        assert has_bf16(torch.device("cpu")) == expected


def test_no_other_device_than_these_has_bf16():
    assert not has_bf16(MPS)


def test_running_out_of_memory_is_told_from_other_errors():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match=re.escape("can't allocate memory")) as error:
        torch.empty(2**55, dtype=torch.uint8)
    assert out_of_memory(error.value)
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "MPS backend out of memory (MPS allocated: 8.9 GB, other allocations: 1 GB, max allowed: 9.07 GB)",
    ],
)
def test_every_library_has_its_own_words_for_it(message):
    assert out_of_memory(RuntimeError(message))


@pytest.mark.parametrize(("device", "expected"), [(CPU, []), (CUDA, ["cuda"]), (MPS, ["mps"])])
def test_cached_memory_is_given_back_to_the_gpu_that_has_it(monkeypatch, device, expected):
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: given_back.append("mps"))
    free_cached_memory(device)
    assert given_back == expected


@pytest.fixture
def settings(monkeypatch):
    """Restore what decides how torch multiplies."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    attention = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    torch.backends.cuda.enable_cudnn_sdp(attention)


def allow_by_the_old_names() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def allow_by_the_new_names() -> None:
    torch.backends.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.parametrize("allow", [lambda: None, allow_by_the_old_names, allow_by_the_new_names])
def test_a_gpu_computes_in_full_float32_whatever_was_allowed_before(settings, allow):
    if allow is allow_by_the_new_names and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has the old names alone")
    allow()
    compute_exactly(CUDA)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    conv = getattr(torch.backends.cudnn, "conv", None)  # of newer versions
    assert getattr(conv, "fp32_precision", "none") in ("none", "ieee")
    assert numerics(CUDA) == {"attention": ["flash", "mem_efficient", "math"], "tf32": False}


def test_cublas_gets_the_workspace_that_repeats_itself_unless_another_is_set(settings, monkeypatch):
    compute_exactly(CPU)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    compute_exactly(CUDA)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    compute_exactly(CUDA)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_gpu_of_a_process_becomes_its_current_one(settings, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for one in (CPU, CUDA, torch.device("cuda:3")):
        compute_exactly(one)
    assert chosen == [torch.device("cuda:3")]


def test_what_was_left_on_is_listed(settings):
    compute_exactly(CUDA)
    torch.backends.cudnn.allow_tf32 = True
    assert numerics(CUDA)["tf32"]
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("high")
    assert numerics(CUDA)["tf32"]
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert "cudnn" in numerics(CUDA)["attention"]
    assert numerics(MPS) == {"attention": ["math"], "tf32": False}


def test_full_products_end_with_their_context(settings):
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(KeyError, match="highest"), full_float32():
        raise KeyError(torch.get_float32_matmul_precision())
    assert torch.get_float32_matmul_precision() == "medium"


KEEP = """
import os
from pathlib import Path
import torch
from features.device import keeping_freed_memory

def megabytes():  # of this process, in RAM, after it has freed 256
    torch.ones(2**28, dtype=torch.uint8)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

before = megabytes()
with keeping_freed_memory(torch.device("meta")):
    elsewhere = megabytes()
with keeping_freed_memory(torch.device("cpu")):
    kept = megabytes()
after = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
print(elsewhere - before, kept - before, after - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_cpu_keeps_freed_memory_as_long_as_it_is_asked_to():
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run([sys.executable, "-c", KEEP], env=env, capture_output=True, text=True, check=True)
    elsewhere, kept, after = map(int, done.stdout.split())
    assert abs(elsewhere) < 32
    assert kept > 256 - 32
    assert after < 32


def test_without_glibc_nothing_is_asked_of_it(monkeypatch):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: object())  # such as macOS's: no mallopt
    with keeping_freed_memory(CPU):
        assert torch.ones(3).sum() == 3
