"""Do the GPU kernels compute what they should, element by element?

Triton's interpreter runs them on a CPU. It has to be asked for before Triton is loaded, so tests/test_kernels.py runs
this file in a process of its own, with TRITON_INTERPRET=1. Every program takes it long, so tensors have as few folds,
rows and columns as lead to several blocks of each kind, the last one short.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from test_network import CNN, VIT, images, stirred, tiny_network
from torch import Tensor
from triton import language as tl

from extract.backbones import Backbone
from finetune import kernels, products
from finetune.dropout import WHOLE_BATCH, BatchRows, philox_mask
from finetune.lora import LoraOptions, adapters

F, T = 2, 40  # folds and rows: no block divides these
ALL_KEYS = torch.tensor([5, 2**62 + 12345, 2**63 - 1])
KEYS = ALL_KEYS[1:]
LAYER = torch.tensor(7)
DROP = (KEYS, LAYER, 77, WHOLE_BATCH)
CASES = pytest.mark.parametrize(
    ("rank", "width", "threshold", "dtype"),
    [
        *((*case, dtype) for case in ((1, 40, 77), (8, 131, 77), (16, 16, 255), (40, 67, 128))
          for dtype in ("float32", "float16")),
        (8, 131, 77, "bfloat16"),  # blocks follow from the size of a number, which is float16's
    ],
    indirect=["dtype"],
)  # fmt: skip


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_mask(
        like: Tensor, keys: Tensor, *, layer: Tensor, threshold: int, first: int, n: int, total: int
    ) -> Tensor:
        return philox_mask(like, keys, layer, threshold=threshold, first_row=first * (like.shape[1] // n))

    monkeypatch.setattr(products, "keep_mask", keep_mask)
    monkeypatch.setattr(kernels, "_ENOUGH", 1)  # the interpreter takes long for every program


@triton.jit
def _wide_dot(a, b, total):
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total)


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    if request.param == "bfloat16":  # the interpreter multiplies such numbers as if their bits were integers
        monkeypatch.setattr(kernels, "_dot", _wide_dot)
    return getattr(torch, request.param)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def factor(*shape: int, dtype: torch.dtype) -> Tensor:
    """A factor in float32, each fold's in a longer row of its own, as a network has them.

    Beside bf16 it is of numbers that bf16 has too, as the interpreter does not round but cut off.
    """
    n = shape[1] * shape[2]
    rows = draw(shape[0], n + 5, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).float()
    return rows[:, :n].view(shape)


def bound(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The product of two batches of matrices in float64, and how far off one summed in float32 may be.

    n terms summed in any order are off by n 2^-24 of the sum of their magnitudes; rounding to dtype comes on top.
    """
    a, b = a.double(), b.double()
    exact = a @ b
    summed = (a.shape[-1] + 2) * 2**-24 * (a.abs() @ b.abs())
    return exact, summed + torch.finfo(dtype).eps * (exact.abs() + summed) + 1e-7  # and float16's smallest steps


# ---------------------------------------------------------------------------------------------------------- the masks


@pytest.mark.parametrize(("width", "threshold"), [(1, 77), (16, 255), (40, 1), (197, 128)])
def test_the_masks_are_those_of_plain_philox_to_the_bit(width: int, threshold: int, dtype: torch.dtype) -> None:
    ones = torch.ones(3, 75, width, dtype=dtype)
    found = kernels.masked(ones, ALL_KEYS, LAYER, threshold, WHOLE_BATCH)
    assert torch.equal(found, philox_mask(ones, ALL_KEYS, LAYER, threshold=threshold, first_row=0))


@pytest.mark.parametrize("layer", [LAYER.int(), LAYER.reshape(1), LAYER.int().reshape(1)])
def test_a_layer_is_any_whole_number(layer: Tensor) -> None:
    ones = torch.ones(F, 5, 20)
    expected = kernels.masked(ones, KEYS, LAYER, 77, WHOLE_BATCH)
    assert torch.equal(kernels.masked(ones, KEYS, layer, 77, WHOLE_BATCH), expected)
    assert not torch.equal(kernels.masked(ones, KEYS, layer + 1, 77, WHOLE_BATCH), expected)


def test_shares_of_a_batch_drop_what_the_whole_one_does() -> None:
    x, A = draw(F, 7 * 5, 40), draw(F, 8, 40)  # 7 images of 5 tokens
    masks = kernels.masked(torch.ones_like(x), *DROP)
    whole = kernels.project(x, A, *DROP)
    shares = [(x[:, 5 * first : 5 * (first + n)].contiguous(), BatchRows(first, n, 7)) for first, n in ((0, 2), (2, 5))]
    parts = [kernels.masked(torch.ones_like(share), KEYS, LAYER, 77, rows) for share, rows in shares]
    assert torch.equal(torch.cat(parts, dim=1), masks)
    parts = [kernels.project(share, A, KEYS, LAYER, 77, rows) for share, rows in shares]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("drop", [(None, LAYER, 77, WHOLE_BATCH), (KEYS, LAYER, 0, WHOLE_BATCH)])
def test_nothing_is_dropped_without_keys_or_at_threshold_zero(drop: Any) -> None:
    x, A, grad_projected, frozen = draw(F, T, 40), draw(F, 8, 40), draw(F, T, 8), draw(F, T, 40)
    assert kernels.masked(x, *drop) is x
    torch.testing.assert_close(kernels.project(x, A, *drop), x @ A.mT)
    grad_x = frozen.clone()
    grad_A = kernels.backward_A_(x, grad_projected, A, grad_x, *drop, 2.0)
    torch.testing.assert_close(grad_A, grad_projected.mT @ x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_x, frozen + 2 * grad_projected @ A, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the products


@pytest.mark.parametrize(("backbone", "dropout"), [(VIT, 0.0), (VIT, 0.3), (CNN, 0.3)])
def test_a_whole_network_trains_by_them_as_by_plain_pytorch(backbone: Backbone, dropout: float) -> None:
    lora = LoraOptions(rank=3, alpha=6, dropout=dropout)
    found, expected = (stirred(tiny_network(backbone=backbone, lora=lora)) for _ in range(2))
    for _, layer in adapters(found.model):
        layer.triton = True
    for network in (found, expected):
        network.clear_gradients()
        logits = network(images(), network.members, step=3)
        (logits * torch.linspace(-1, 1, 2)).sum().backward()
        network.gather_gradients()
    assert expected.gradients.abs().amax(dim=1).min() > 0.01
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-3, atol=1e-5)


@CASES
def test_projections_are_exact_but_for_rounding(rank: int, width: int, threshold: int, dtype: torch.dtype) -> None:
    x, A = draw(F, T, width, dtype=dtype), factor(F, rank, width, dtype=dtype)
    mask = philox_mask(x, KEYS, LAYER, threshold=threshold, first_row=0)
    exact, off = bound(mask * x, A.to(dtype).mT, dtype)
    found = kernels.project(x, A, KEYS, LAYER, threshold, WHOLE_BATCH)
    assert (found.dtype, found.shape) == (dtype, (F, T, rank))
    assert ((found - exact).abs() <= off).all()


@CASES
def test_gradients_of_B_and_of_the_projection_are_exact_but_for_rounding(
    rank: int, width: int, threshold: int, dtype: torch.dtype
) -> None:
    grad, B = draw(F, T, width, dtype=dtype), factor(F, width, rank, dtype=dtype)
    projected = draw(F, T, rank, dtype=dtype)
    grad_projected, grad_B = kernels.backward_B(grad, B, projected)
    exact, off = bound(grad, B.to(dtype), dtype)
    assert grad_projected.dtype == dtype
    assert ((grad_projected - exact).abs() <= off).all()
    exact, off = bound(grad.mT, projected, dtype if rank > kernels.FUSED_RANK_B else torch.float32)
    assert grad_B.dtype == torch.float32
    assert ((grad_B - exact).abs() <= off).all()


@CASES
def test_gradients_of_A_and_of_the_inputs_are_exact_but_for_rounding(
    rank: int, width: int, threshold: int, dtype: torch.dtype
) -> None:
    x, grad_projected = draw(F, T, width, dtype=dtype), draw(F, T, rank, dtype=dtype)
    A, frozen = factor(F, rank, width, dtype=dtype), draw(F, T, width, dtype=dtype)
    mask = philox_mask(x, KEYS, LAYER, threshold=threshold, first_row=0)
    grad_x = frozen.clone()
    grad_A = kernels.backward_A_(x, grad_projected, A, grad_x, KEYS, LAYER, threshold, WHOLE_BATCH, 1.7)
    exact, off = bound(
        grad_projected.mT, mask * x, dtype if rank > kernels.FUSED_RANK[dtype.itemsize] else torch.float32
    )
    assert grad_A.dtype == torch.float32
    assert ((grad_A - exact).abs() <= off).all()
    exact, off = bound(grad_projected, A.to(dtype), dtype)
    total = frozen.double() + 1.7 * mask * exact
    off = 1.7 * mask * off + torch.finfo(dtype).eps * total.abs() + 1e-7
    assert ((grad_x - total).abs() <= off).all()
    alone = kernels.backward_A_(x, grad_projected, A, None, KEYS, LAYER, threshold, WHOLE_BATCH, 1.7)
    assert torch.equal(alone, grad_A)


@pytest.mark.parametrize("enough", [1, 100])
def test_a_sum_in_parts_is_the_sum_and_repeats_to_the_bit(enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ENOUGH", enough)  # as few parts as can be, and several
    x, A, grad, B = draw(2, 75, 40), draw(2, 8, 40), draw(2, 75, 70), draw(2, 70, 8)
    projected = draw(2, 75, 8)
    drop = (KEYS[:2], LAYER, 77, WHOLE_BATCH)
    first, again = ((*kernels.backward_B(grad, B, projected), kernels.backward_A_(x, projected, A, None, *drop, 1.0))
                    for _ in range(2))  # fmt: skip
    exact = (*products.backward_B(grad, B, projected), products.backward_A_(x, projected, A, None, *drop, 1.0))
    for one, other, product in zip(first, again, exact, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, product, rtol=1e-4, atol=1e-4)


def test_tensors_that_are_not_contiguous_are_refused() -> None:
    with pytest.raises(ValueError, match="_project_kernel takes contiguous tensors"):
        kernels.project(draw(F, 40, T).mT, draw(F, 8, 40), *DROP)


# ------------------------------------------------------------------------------------------------- autograd and compile


class _Adapter(torch.autograd.Function):
    """scale B A (m * x), by the interface, as an adapted layer uses it."""

    @staticmethod
    def forward(ctx: Any, module: ModuleType, x: Tensor, A: Tensor, B: Tensor, layer: Tensor, scale: float) -> Tensor:
        drop = (KEYS[: len(x)], layer, 77, BatchRows(1, 1, 2))
        projected = module.project(x, A, *drop)
        ctx.save_for_backward(x, A, B, projected)
        ctx.module, ctx.drop, ctx.scale = module, drop, scale
        return scale * torch.bmm(projected, B.to(x.dtype).mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, A, B, projected = ctx.saved_tensors
        grad_projected, grad_B = ctx.module.backward_B(grad.contiguous(), B, projected)
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        grad_A = ctx.module.backward_A_(x, grad_projected, A, grad_x, *ctx.drop, ctx.scale)
        return None, grad_x, grad_A * ctx.scale, grad_B * ctx.scale, None, None


@pytest.mark.parametrize("module", [kernels, products], ids=["kernels", "products"])
@pytest.mark.parametrize("needs_x", [True, False])
def test_gradients_are_those_of_finite_differences(module: ModuleType, needs_x: bool) -> None:
    x, A, B = (draw(2, *shape, dtype=torch.float64) for shape in ((3, 5), (2, 5), (4, 2)))
    for tensor, needed in ((x, needs_x), (A, True), (B, True)):
        tensor.requires_grad_(needed)
    assert torch.autograd.gradcheck(
        lambda *tensors: _Adapter.apply(module, *tensors, LAYER, 1.5), (x, A, B), fast_mode=True
    )


def test_the_operators_say_of_themselves_what_is_true() -> None:
    x, A, grad_projected = draw(F, 5, 20), draw(F, 8, 20), draw(F, 5, 8)
    drop = (KEYS, LAYER, 77, 0)
    torch.library.opcheck(torch.ops.mitofm.masked.default, (x, *drop))
    torch.library.opcheck(torch.ops.mitofm.project.default, (x, A, *drop))
    torch.library.opcheck(torch.ops.mitofm.backward_B.default, (draw(F, 5, 20), draw(F, 20, 8), grad_projected))
    torch.library.opcheck(torch.ops.mitofm.backward_A.default, (x, grad_projected, A, *drop))
    torch.library.opcheck(torch.ops.mitofm.backward_A_.default, (x, grad_projected, A, draw(F, 5, 20), *drop, 2.0))


def test_torch_compile_takes_them_whole_and_once_for_all_layers() -> None:
    x, A, B = draw(2, 5, 24), draw(2, 8, 24).requires_grad_(), draw(2, 20, 8).requires_grad_()
    x.requires_grad_()

    def outputs(layer: Tensor) -> Tensor:
        return _Adapter.apply(kernels, x, A, B, layer, 1.5).square().sum()

    plain = [torch.autograd.grad(outputs(torch.tensor(layer)), (x, A, B)) for layer in (0, 1, 2)]
    compiled = torch.compile(outputs, backend="aot_eager", fullgraph=True)
    with torch.compiler.set_stance("default"):
        found = [torch.autograd.grad(compiled(torch.tensor(0)), (x, A, B))]
    with torch.compiler.set_stance("fail_on_recompile"):
        found += [torch.autograd.grad(compiled(torch.tensor(layer)), (x, A, B)) for layer in (1, 2)]
    for some, others in zip(found, plain, strict=True):
        assert all(map(torch.equal, some, others))
    assert not torch.equal(plain[0][1], plain[1][1])


# ------------------------------------------------------------------------------------------------------------ at start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_that_agree_are_used(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.verify(torch.device("cpu"), dtype)
    assert capsys.readouterr().err == ""


@triton.jit
def _off_by_one(key, layer, rows, column, width, THRESHOLD: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    keep = tl.full((BT, BC), 1, tl.int1)
    return keep & ((rows % 2) == 0)[:, None]


@triton.jit
def _ten_percent_more(a, b, total):
    return total + 1.1 * tl.dot(a, b, tl.zeros_like(total))


@pytest.mark.parametrize(("name", "wrong"), [("_keep", _off_by_one), ("_dot", _ten_percent_more)])
def test_kernels_that_differ_are_left_out_in_one_message(
    name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, name, wrong)
    assert not kernels.verify(torch.device("cpu"), torch.float32)
    assert "Triton code for float32 differs here from plain PyTorch" in capsys.readouterr().err
