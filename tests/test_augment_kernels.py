"""Do the augmentation's GPU kernels hold what they promise, as far as a machine without a GPU can tell?

What they compute is checked by interpreted_augment_kernels.py, which test_kernels.py runs. Here the kernels are
compiled for two generations of GPUs, and a training step takes them only where they agree.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_network import tiny_network
from test_train import RECIPE, patches
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune import augment_kernels
from finetune.augment import PALETTE, AugmentOptions, draw
from finetune.compute import Compute
from finetune.recipes import Recipe
from finetune.step import Batches, Step, TrainingSet, network_input

REPOSITORY = Path(__file__).resolve().parent.parent
OPTIONS = AugmentOptions(rotation=180.0)


def inputs(n: int, size: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Pixels, draws, scale, offset and palette."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    scale, offset = torch.tensor([0.01, 0.02, 0.03]).view(3, 1, 1), torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)
    given = pixels, draw(n, generator=generator), scale, offset, torch.tensor(PALETTE)
    return tuple(tensor.to(device) for tensor in given)


def test_fake_tensors_of_a_gpu_pass_through_and_come_out_channels_last() -> None:
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(tensor).to("cuda") for tensor in inputs(3, 20)]
        found = augment_kernels._augmented_input(given[0], given[1], given[4], *given[2:])
        assert (found.shape, found.dtype, found.device.type) == (given[0].shape, torch.float32, "cuda")
        assert found.is_contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------- compiled without a GPU


@pytest.mark.parametrize(
    ("capability", "shared_memory", "size"),
    [
        (80, 163 * 1024, 224),  # A100
        (90, 227 * 1024, 224),  # H100
        (90, 227 * 1024, 17),  # a single tile
    ],
)
def test_two_kernels_are_started_and_spill_no_register(
    capability: int, shared_memory: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    started: list[tuple[Any, tuple[Tensor, ...], dict[str, int]]] = []

    def collect(kernel: Any, grid: tuple[int, int], *arguments: Tensor, **constants: int) -> None:
        assert grid == ((-(-size // 32)) ** 2, 2)
        started.append((kernel, arguments, constants))

    monkeypatch.setattr(augment_kernels, "run", collect)
    augment_kernels.network_input(*inputs(2, size), OPTIONS)
    assert len(started) == 2
    types = {torch.uint8: "*u8", torch.float32: "*fp32"}
    for kernel, arguments, constants in started:
        signature = dict.fromkeys(kernel.arg_names, "constexpr")
        signature |= dict(zip(kernel.arg_names, (types[tensor.dtype] for tensor in arguments), strict=False))
        attributes = {(place,): [["tt.divisibility", 16]] for place in range(len(arguments))}
        source = ASTSource(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": 8, "enable_fp_fusion": True})
        assert compiled.metadata.shared <= shared_memory
        (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
        architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
        command = [ptxas, "-v", f"--gpu-name={architecture}", "kernel.ptx", "-o", "kernel.cubin"]
        report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
        match = re.search(r"Used (\d+) registers", report)
        assert match is not None
        assert int(match[1]) <= 128  # so that two programs of 256 threads share a multiprocessor's 65,536


# ------------------------------------------------------------------------------------------------- in a training step


def first_step(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[Step, Compute]:
    """Take the first step of a training that believes to be on a GPU, with Triton."""
    monkeypatch.setattr(augment_kernels, "available", lambda: True)
    monkeypatch.setattr(TrainingSet, "take", lambda data, rows, _: data.pixels[rows.flatten()])
    network, data = tiny_network(), patches(torch.uint8)
    compute = Compute(torch.device("cpu"), "fp32", 3, fast=True)
    step = Step(network, data, recipe, moments=torch.zeros(3, 2, network.n_trained), compute=compute)
    rows = torch.arange(12).view(1, 3, 4)
    drawn = None if recipe.augment is None else inputs(12, 1)[1].view(1, 3, 4, 11)
    keys = torch.zeros(1, 3, dtype=torch.int64)
    step.begin(Batches(rows, data.label[rows], drawn, keys, torch.zeros(1, 3, 4)))
    compute.device = torch.device("cuda")
    step._try_fast(step._batches.at(0), [0, 1, 2])
    compute.device = torch.device("cpu")
    step._first = False
    step(0, [0, 1, 2])
    return step, compute


@pytest.mark.parametrize(
    ("factor", "said"), [(1.0, ""), (1.05, "code differs here from plain"), (None, "cannot be used here (no)")]
)
def test_a_step_takes_the_kernels_where_they_agree(
    factor: float | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kernels(*given: Any) -> Tensor:
        calls.append(1)
        if factor is None:
            raise RuntimeError("no")
        return network_input(*given) * factor

    calls: list[int] = []
    monkeypatch.setattr(augment_kernels, "network_input", kernels)
    _, compute = first_step(RECIPE, monkeypatch)
    assert compute.fast_paths == (set() if said else {"augmentation kernels"})
    assert len(calls) == (1 if said else 2)  # tried once, then in the step
    assert said in capsys.readouterr().err


def test_without_augmentation_they_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    _, compute = first_step(replace(RECIPE, augment=None), monkeypatch)
    assert compute.fast_paths == set()


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("size", [17, 224, 518])
def test_a_gpu_computes_what_plain_pytorch_does_and_the_same_again(size: int) -> None:
    given = inputs(16, size, "cuda")
    found = augment_kernels.network_input(*given, OPTIONS)
    expected = network_input(given[0].double(), given[1], given[2].double(), given[3].double(), given[4], OPTIONS)
    # A place is off by some 2^-18 of a patch where exponentials and roots are approximate, and a level by that times
    # the largest step of 255, in two directions, and three to four times as much after colours have changed.
    assert (found - expected).abs().max() < 255 * 0.03 * 8 * (size * 2**-18 + 2**-20)
    assert torch.equal(augment_kernels.network_input(*given, OPTIONS), found)
