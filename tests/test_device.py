"""Does each process get the device that it should, and is a device that is not there one clear message?"""

import re

import pytest
import torch

from features import device
from features.console import UserError
from features.device import find_device, has_bf16, out_of_memory


@pytest.fixture
def gpus(monkeypatch):
    """Make torch see this many GPUs."""

    def see(n: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)

    return see


@pytest.mark.parametrize(
    ("n_gpus", "name", "local_rank", "expected"),
    [
        (0, "auto", None, "cpu"),
        (0, "auto", 3, "cpu"),
        (4, "cpu", 3, "cpu"),
        (4, "auto", None, "cuda"),
        (4, "cuda:2", 0, "cuda:2"),
        (4, "auto", 3, "cuda:3"),
        (4, "cuda", 2, "cuda:2"),
        (1, "auto", 3, "cuda:0"),  # the launcher shows each process its GPU alone
    ],
)
def test_each_process_takes_a_gpu_of_its_own(gpus, n_gpus, name, local_rank, expected):
    gpus(n_gpus)
    assert find_device(name, local_rank=local_rank) == torch.device(expected)


@pytest.mark.parametrize(
    ("n_gpus", "name", "options", "message"),
    [
        (0, "cuda", {}, "torch sees 0 GPUs here"),
        (0, "cuda", {"local_rank": 1}, "torch sees 0 GPUs here"),
        (2, "cuda:2", {}, "torch sees 2 GPUs here"),
        (2, "auto", {"local_rank": 2}, r"process 2 of this machine .* torch sees 2 GPUs"),
        (4, "cuda:1", {"local_rank": 1, "n_processes": 4}, "for all of 4 processes"),
        (4, "cuda:1", {"local_rank": 0, "n_processes": 2}, "for all of 2 processes"),
        (4, "mps", {}, "not supported"),
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


def test_running_out_of_memory_is_told_from_other_errors():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match=re.escape("can't allocate memory")) as error:
        torch.empty(2**55, dtype=torch.uint8)
    assert out_of_memory(error.value)
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
