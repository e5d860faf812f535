"""Do the GPU kernels hold what they promise, as far as a machine without a GPU can tell?

What they compute is checked by interpreted_kernels.py; here it is run, with the augmentation's, and the kernels are
compiled for two generations of GPUs with the blocks that real networks lead to.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune import kernels
from finetune.dropout import WHOLE_BATCH, philox_mask

REPOSITORY = Path(__file__).resolve().parent.parent
LAYER, KEYS = torch.tensor(3), torch.arange(5)


def test_interpreted_on_a_cpu_they_and_the_augmentations_compute_what_plain_pytorch_does() -> None:
    pytest.importorskip("triton")
    files = ("tests/interpreted_kernels.py", "tests/interpreted_augment_kernels.py")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider"],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert " passed" in found.stdout


def test_without_triton_there_are_none_and_everything_else_works() -> None:
    program = """
import sys, torch
sys.modules["triton"] = None
from finetune import augment_kernels, kernels, step
print(augment_kernels.available(), kernels.available(), kernels.verify(torch.device("cpu"), torch.float32))
"""
    # A new process: torch itself has to be loaded without Triton.
    assert processes.run("-c", program).stdout == "False False False\n"


@pytest.mark.parametrize("rank", [8, 40, 200])
def test_fake_tensors_of_a_gpu_pass_through(rank: int) -> None:
    pytest.importorskip("triton")
    with FakeTensorMode():
        x = torch.empty(2, 6, 40, dtype=torch.float16, device="cuda")
        A, B = torch.empty(2, rank, 40, device="cuda"), torch.empty(2, 24, rank, device="cuda")
        grad, layer = (
            torch.empty(2, 6, 24, dtype=torch.float16, device="cuda"),
            torch.empty((), dtype=int, device="cuda"),
        )
        drop = (torch.empty(2, dtype=int, device="cuda"), layer, 77, WHOLE_BATCH)
        projected = kernels.project(x, A, *drop)
        grad_projected, grad_B = kernels.backward_B(grad, B, projected)
        for grad_x in (None, torch.empty_like(x)):
            grad_A = kernels.backward_A_(x, grad_projected, A, grad_x, *drop, 2.0)
            assert (grad_A.shape, grad_A.dtype, grad_A.device.type) == (A.shape, torch.float32, "cuda")
        assert projected.shape == grad_projected.shape == (2, 6, rank)
        assert projected.dtype == grad_projected.dtype == torch.float16
        assert (grad_B.shape, grad_B.dtype) == (B.shape, torch.float32)
        assert kernels.masked(x, *drop).shape == x.shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_computes_what_plain_products_do(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    assert kernels.verify(device, dtype)
    ones = torch.ones(5, 300, 200, dtype=dtype, device=device)
    found = kernels.masked(ones, KEYS.to(device), LAYER.to(device), 77, WHOLE_BATCH)
    assert torch.equal(found.cpu(), philox_mask(ones.cpu(), KEYS, LAYER, threshold=77, first_row=0))


# ----------------------------------------------------------------------------------------------- compiled without a GPU


class PretendedGPU:
    """What Triton asks a driver for, up to the start of a kernel."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


# Tokens of 16 images of 224 pixels, and widths in and out of each adapted layer.
NETWORKS = {
    "ViT-S/16": (16 * 197, [(384, 1152), (384, 384), (384, 1536), (1536, 384)]),
    "ViT-H/14": (16 * 261, [(1280, 3840), (1280, 1280), (1280, 5120), (5120, 1280)]),
    "ViT-g/14": (16 * 261, [(1536, 4608), (1536, 1536), (1536, 8192), (4096, 1536)]),
}


def start_all(
    dtype: torch.dtype, tokens: int, width_in: int, width_out: int, *, rank: int, plain: bool = False
) -> None:
    """Ask for all kernels of an adapted layer; nothing is computed, so the tensors are never touched.

    plain: without dropout and without a gradient of the inputs.
    """
    x, grad_x, grad = (torch.empty(5, tokens, width, dtype=dtype) for width in (width_in, width_in, width_out))
    A, B = torch.empty(5, rank, width_in), torch.empty(5, width_out, rank)
    drop = (None if plain else KEYS, LAYER, 77, WHOLE_BATCH)
    projected = kernels.project(x, A, *drop)
    grad_projected, _ = kernels.backward_B(grad, B, projected)
    kernels.backward_A_(x, grad_projected, A, None if plain else grad_x, *drop, 2.86)
    kernels.masked(x, *drop)


@pytest.mark.parametrize(
    ("capability", "shared_memory", "dtype", "most_rank"),
    [
        pytest.param(80, 163 * 1024, torch.float32, 32, id="A100-fp32"),
        pytest.param(90, 227 * 1024, torch.bfloat16, 128, id="H100-bf16"),
        pytest.param(80, 163 * 1024, torch.bfloat16, 128, id="A100-bf16", marks=pytest.mark.slow),
        pytest.param(90, 227 * 1024, torch.float32, 32, id="H100-fp32", marks=pytest.mark.slow),
    ],
)
def test_compiled_kernels_spill_no_register(
    capability: int, shared_memory: int, dtype: torch.dtype, most_rank: int, tmp_path: Path, monkeypatch: Any
) -> None:
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this version of Triton asks more of a driver")
    # Wheels bring one assembler or two, the newer one named after the newer GPUs; it knows the older ones too.
    ptxas = max((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*"), key=lambda path: len(path.name))
    compiled = {}
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        assert min(grid) >= 1
        assert max(grid[1:], default=0) < 2**16  # CUDA's limit
        found = run(kernel, *arguments, grid=grid, warmup=True, **constants)
        compiled[found.hash] = (kernel.__name__, constants, found)

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver = triton.runtime.driver
    before = dict(vars(driver))  # reset_active() would look for a GPU
    driver.set_active(PretendedGPU(capability))
    try:
        for tokens, layers in NETWORKS.values():
            for width_in, width_out in layers:
                start_all(dtype, tokens, width_in, width_out, rank=8)
        start_all(dtype, 16 * 197, 384, 384, rank=most_rank)
        start_all(dtype, 64 * 197, 384, 384, rank=8)  # so many rows that blocks are larger
        start_all(dtype, 1, 40, 1, rank=1, plain=True)  # Triton compiles anew for sizes of 1
    finally:
        vars(driver).update(before)
    assert {name for name, _, _ in compiled.values()} == {
        "_project_kernel", "_backward_A_kernel", "_backward_B_kernel", "_masked_kernel", "_add_kernel"
    }  # fmt: skip
    for name, constants, found in compiled.values():
        assert found.metadata.shared <= shared_memory, (name, constants)
        (tmp_path / "kernel.ptx").write_text(found.asm["ptx"])
        arguments = ["-v", "--gpu-name=sm_" + {80: "80", 90: "90a"}[capability], "kernel.ptx", "-o", "kernel.cubin"]
        report = subprocess.run([ptxas, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stderr
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), (name, constants, report)
