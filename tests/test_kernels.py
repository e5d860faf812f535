"""Do the GPU kernels hold what they promise, as far as a machine without a GPU can tell?

What they compute is checked by interpreted_kernels.py; here it is run, and the kernels are compiled for two generations
of GPUs with the blocks that real networks lead to.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune import kernels
from finetune.dropout import WHOLE_BATCH, philox_mask

REPOSITORY = Path(__file__).resolve().parent.parent
LAYER, KEYS = torch.tensor(3), torch.arange(5)


def run(*arguments: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_interpreted_on_a_cpu_they_compute_what_plain_products_do() -> None:
    pytest.importorskip("triton")
    assert " passed" in run(
        "-m", "pytest", "tests/interpreted_kernels.py", "-p", "no:cacheprovider", TRITON_INTERPRET="1"
    )


def test_without_triton_there_are_none_and_everything_else_works() -> None:
    program = """
import sys, torch
sys.modules["triton"] = None
from finetune import kernels
print(kernels.available(), kernels.verify(torch.device("cpu"), torch.float32))
"""
    assert run("-c", program) == "False False\n"


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


class Launch:
    """A kernel that would have been started: what Triton compiles it from."""

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
        self.kernel, self.constants = kernel, dict(constants)
        self.signature, self.attributes = {}, {}
        for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if value is None or (isinstance(value, int) and value == 1):
                self.constants[name] = value
            elif isinstance(value, torch.Tensor):
                self.signature[name] = types[value.dtype]
            else:
                self.signature[name] = "i32" if value < 2**31 else "i64"
            divisible = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            if name in self.signature and divisible:
                self.attributes[(place,)] = [["tt.divisibility", 16]]
        self.signature = {name: self.signature.get(name, "constexpr") for name in kernel.arg_names}

    def key(self) -> str:
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.attributes}"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launch]:
    """Collects the kernels that the operators would start, without starting any."""
    started: dict[str, Launch] = {}

    def collect(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        assert all(size >= 1 for size in grid)
        assert max(grid[1:], default=0) < 2**16  # CUDA's limit
        launch = Launch(kernel, arguments, constants)
        started[launch.key()] = launch

    monkeypatch.setattr(kernels, "_run", collect)
    return started


# Tokens of eight images of 224 pixels, and widths in and out of each adapted layer.
NETWORKS = {
    "ViT-S/16": (8 * 197, [(384, 1152), (384, 384), (384, 1536), (1536, 384)]),
    "ViT-H/14": (8 * 261, [(1280, 3840), (1280, 1280), (1280, 5120), (5120, 1280)]),
    "ViT-g/14": (8 * 261, [(1536, 4608), (1536, 1536), (1536, 8192), (4096, 1536)]),
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
        (80, 163 * 1024, torch.bfloat16, 128),  # A100
        (80, 163 * 1024, torch.float32, 32),
        (90, 227 * 1024, torch.bfloat16, 128),  # H100
        (90, 227 * 1024, torch.float32, 32),
    ],
)
def test_compiled_kernels_spill_no_register(
    capability: int, shared_memory: int, dtype: torch.dtype, most_rank: int, launches: dict[str, Launch],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this version of Triton describes the source of a compilation in another way")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Wheels bring one assembler or two, the newer one named after the newer GPUs; it knows the older ones too.
    ptxas = max(
        (Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*"),
        key=lambda path: len(path.name),
        default=None,
    )
    if ptxas is None:
        pytest.skip("this wheel of Triton has no assembler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for tokens, layers in NETWORKS.values():
        for width_in, width_out in layers:
            start_all(dtype, tokens, width_in, width_out, rank=8)
    start_all(dtype, 8 * 197, 384, 384, rank=most_rank)
    if capability == 90 and dtype == torch.bfloat16:
        start_all(dtype, 1, 40, 1, rank=1, plain=True)  # Triton compiles anew for sizes of 1
    assert len(launches) >= 8
    for launch in launches.values():
        source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": 8, "enable_fp_fusion": True})
        assert compiled.metadata.shared <= shared_memory, launch.key()
        (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
        architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
        arguments = ["-v", f"--gpu-name={architecture}", "kernel.ptx", "-o", "kernel.cubin"]
        report = subprocess.run([ptxas, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stderr
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), launch.key() + report
