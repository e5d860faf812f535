"""How does a GPU compute an adapter's thin products, reading each large tensor once?

The functions are those of `finetune.products`, written in Triton. A mask is drawn where it is used and never lies in
memory. Products of float32 are not rounded to TF32, and sums are kept in float32. Where several programs have parts of
a sum, they write them out, and another kernel adds them in a fixed order, so that results are repeatable.

Each is an operator that torch.compile calls without looking into it. Block sizes follow from shapes by rule: trying
several would wait for the GPU, and the choice, with the rounding that follows from it, could differ from run to run.
"""

# Triton has no types.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, warn-return-any=False, disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from features.device import agrees
from finetune import products
from finetune.dropout import BatchRows

try:
    import triton
    from triton import jit
    from triton import language as tl
    from triton.language import constexpr
except ImportError:  # not every platform has it
    triton = None

    def jit(function: Any) -> Any:
        return function


# Bytes per element of x -> largest rank of the fused kernels: with a larger one, tiles would not fit into registers.
FUSED_RANK = {2: 128, 4: 32, 8: 32}
FUSED_RANK_B = 32  # of backward_B: with a larger one, the parts of grad_B take more memory than the gradient read twice
_ENOUGH = 528  # programs that keep a GPU busy: four for each of the 132 multiprocessors of an H100
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def verify(device: torch.device, dtype: torch.dtype, *, rank: int = 8) -> bool:
    """Whether the kernels run on this device and compute what `finetune.products` does; if not, say so.

    Masks have to be the same to the bit. It takes milliseconds, once the kernels are compiled.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    # Sizes that no block divides, so that edges are tried; and widths divisible by 16, for which Triton compiles anew.
    cases = [
        (draw(2, 86, n_in), draw(2, rank, n_in), draw(2, 86, n_out), draw(2, n_out, rank), draw(2, 86, n_in))
        for n_in, n_out in ((72, 77), (80, 96))
    ]
    layer, keys = torch.tensor(3, device=device), torch.tensor([5, 2**62 + 7], device=device)

    def compute(module: Any, dtype: torch.dtype) -> list[Tensor]:
        results: list[Tensor] = []
        for case in cases:
            x, A, grad, B, grad_x = (tensor.to(dtype, copy=True) for tensor in case)
            drop = (keys, layer, 77, BatchRows(1, 2, 4))
            projected = module.project(x, A, *drop)
            grad_projected, grad_B = module.backward_B(grad, B, projected)
            grad_A = module.backward_A_(x, grad_projected, A, grad_x, *drop, 2.5)
            results += [projected, grad_projected, grad_B, grad_A, grad_x, module.masked(torch.ones_like(x), *drop)]
        return results

    return available() and agrees(
        f"The adapters' Triton code for {str(dtype).removeprefix('torch.')}",
        lambda: compute(sys.modules[__name__], dtype),
        lambda: compute(products, torch.float64),  # exact, whatever may be set for products of float32
        tolerance=_TOLERANCE[dtype],
    )


# ------------------------------------------------------------------------------------------------------ the interface


def masked(x: Tensor, keys: Tensor | None, layer: Tensor, threshold: int, rows: BatchRows) -> Tensor:
    """Drop what the mask drops, as `products.masked` does."""
    return x if keys is None or not threshold else _masked(x, keys, layer, threshold, _first_row(x, rows))


def project(x: Tensor, A: Tensor, keys: Tensor | None, layer: Tensor, threshold: int, rows: BatchRows) -> Tensor:
    """Project the inputs that are kept, as `products.project` does."""
    if A.shape[1] > FUSED_RANK[x.element_size()]:
        return torch.bmm(masked(x, keys, layer, threshold, rows), A.to(x.dtype).mT)
    return _project(x, A, keys, layer, threshold, _first_row(x, rows))


def backward_B(grad: Tensor, B: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the gradient of the outputs back through B, as `products.backward_B` does."""
    if B.shape[2] > FUSED_RANK_B:
        return products.backward_B(grad, B, projected)
    return _backward_B(grad, B, projected)


def backward_A_(
    x: Tensor,
    grad_projected: Tensor,
    A: Tensor,
    grad_x: Tensor | None,
    keys: Tensor | None,
    layer: Tensor,
    threshold: int,
    rows: BatchRows,
    scale: float,
) -> Tensor:
    """Carry the gradient of the projection back through A, and add to that of x, as `products.backward_A_` does."""
    if A.shape[1] > FUSED_RANK[x.element_size()]:
        if grad_x is not None:
            added = torch.bmm(grad_projected, A.to(x.dtype))
            grad_x.add_(masked(added, keys, layer, threshold, rows), alpha=scale)
        return torch.bmm(grad_projected.mT, masked(x, keys, layer, threshold, rows)).to(_sum_dtype(x))
    first_row = _first_row(x, rows)
    if grad_x is None:
        return _backward_A(x, grad_projected, A, keys, layer, threshold, first_row)
    return _backward_A_(x, grad_projected, A, grad_x, keys, layer, threshold, first_row, scale)


def _first_row(x: Tensor, rows: BatchRows) -> int:
    """The index that the first row has in its fold's whole batch."""
    return rows.first * (x.shape[1] // rows.n)


# ------------------------------------------------------------------------------------------------------ the operators


def operator(*, fake: Callable[..., Any], mutates_args: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Register a function that starts kernels as an operator, and call it as one where something traces.

    Elsewhere it is called straight, which takes 30 us less of the host's time.

    Args:
        fake: makes empty tensors like the function's results.
        mutates_args: names of arguments that are changed in place.
    """

    def register(function: Any) -> Any:
        name = "mitofm::" + function.__name__.removeprefix("_")
        operator = torch.library.custom_op(name, function, mutates_args=mutates_args)
        operator.register_fake(fake)

        def call(x: Tensor, *arguments: Any) -> Any:
            traced = torch.compiler.is_compiling() or type(x) is not Tensor
            return operator(x, *arguments) if traced else function(x, *arguments)

        return call

    return register


def _like_A(x: Tensor, grad_projected: Tensor, A: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(A, dtype=_sum_dtype(x))


@operator(fake=lambda x, *_: torch.empty_like(x))
def _masked(x: Tensor, keys: Tensor, layer: Tensor, threshold: int, first_row: int) -> Tensor:
    n_folds, n_rows, width = x.shape
    out = torch.empty_like(x)
    rows, columns = 32 * x.element_size(), _columns(x, 1)  # a thread per group of 16 columns
    run(
        _masked_kernel, (cdiv(width, columns), n_folds, cdiv(n_rows, rows)),
        x, out, keys, layer, first_row, n_rows, width, THRESHOLD=threshold, BT=rows, BC=columns, num_warps=8,
    )  # fmt: skip
    return out


@operator(fake=lambda x, A, *_: x.new_empty(x.shape[0], x.shape[1], A.shape[1]))
def _project(x: Tensor, A: Tensor, keys: Tensor | None, layer: Tensor, threshold: int, first_row: int) -> Tensor:
    n_folds, n_rows, width = x.shape
    rank = A.shape[1]
    out = x.new_empty(n_folds, n_rows, rank)
    rows = 64 if n_folds * cdiv(n_rows, 64) >= _ENOUGH else 32
    run(
        _project_kernel, (cdiv(n_rows, rows), n_folds),
        x, A, out, keys, layer, first_row, n_rows, width, rank, A.stride(0),
        THRESHOLD=_threshold(keys, threshold), SUM=_sum_type(x), R=_padded(rank), BT=rows, BC=_columns(x, rank),
        num_warps=_warps(x, rank, rows), factor=A,
    )  # fmt: skip
    return out


@operator(fake=lambda grad, B, p: (torch.empty_like(p, dtype=grad.dtype), torch.empty_like(B, dtype=_sum_dtype(grad))))
def _backward_B(grad: Tensor, B: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    n_folds, n_rows, width = grad.shape
    rank = B.shape[2]
    columns = _columns(grad, rank)
    rows = 2 * columns
    n_parts = cdiv(n_rows, rows)  # of grad_B
    chunk = _chunk(width, columns, n_folds * n_parts)
    n_chunks = cdiv(width, chunk)  # parts of grad_projected
    grad_projected = grad.new_empty(n_chunks, n_folds, n_rows, rank, dtype=None if n_chunks == 1 else _sum_dtype(grad))
    grad_B = grad.new_empty(n_parts, n_folds, width, rank, dtype=_sum_dtype(grad))
    run(
        _backward_B_kernel, (n_parts, n_folds, n_chunks),
        grad, B, projected, grad_projected, grad_B, n_rows, width, rank, B.stride(0), chunk,
        SUM=_sum_type(grad), R=_padded(rank), BT=rows, BC=columns, num_warps=8, factor=B,
    )  # fmt: skip
    return _added(grad_projected, grad.dtype), _added(grad_B, grad_B.dtype)


@operator(fake=_like_A)
def _backward_A(
    x: Tensor, grad_projected: Tensor, A: Tensor, keys: Tensor | None, layer: Tensor, threshold: int, first_row: int
) -> Tensor:
    return _run_backward_A(x, grad_projected, A, None, keys, layer, threshold, first_row, 0.0)


# An operator of its own, for not all versions of torch take None for a tensor that is changed.
@operator(fake=_like_A, mutates_args=("grad_x",))
def _backward_A_(
    x: Tensor,
    grad_projected: Tensor,
    A: Tensor,
    grad_x: Tensor,
    keys: Tensor | None,
    layer: Tensor,
    threshold: int,
    first_row: int,
    scale: float,
) -> Tensor:
    return _run_backward_A(x, grad_projected, A, grad_x, keys, layer, threshold, first_row, scale)


def _run_backward_A(
    x: Tensor,
    grad_projected: Tensor,
    A: Tensor,
    grad_x: Tensor | None,
    keys: Tensor | None,
    layer: Tensor,
    threshold: int,
    first_row: int,
    scale: float,
) -> Tensor:
    n_folds, n_rows, width = x.shape
    rank = A.shape[1]
    rows, columns = 32, _columns(x, rank)
    n_columns = cdiv(width, columns)
    chunk = _chunk(n_rows, rows, n_folds * n_columns)
    n_parts = cdiv(n_rows, chunk)
    grad_A = x.new_empty(n_parts, n_folds, rank, width, dtype=_sum_dtype(x))
    run(
        _backward_A_kernel, (n_columns, n_folds, n_parts),
        x, grad_projected, A, grad_x, grad_A, keys, layer, first_row, n_rows, width, rank, A.stride(0), chunk,
        SCALE=scale, THRESHOLD=_threshold(keys, threshold), SUM=_sum_type(x), R=_padded(rank), BT=rows, BC=columns,
        num_warps=_warps(x, rank, rows), factor=A,
    )  # fmt: skip
    return _added(grad_A, grad_A.dtype)


# -------------------------------------------------------------------------------------------------- blocks and launches


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, factor: Tensor | None = None, **constants: Any) -> None:
    """Start a kernel on the GPU of its first tensor. Tensors have to be contiguous; `factor` within each fold."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if not all((tensor[0] if tensor is factor else tensor).is_contiguous() for tensor in tensors):
        raise ValueError(f"{kernel.__name__} takes contiguous tensors")
    # Triton starts kernels on the current GPU, which may be another.
    with torch.cuda.device_of(tensors[0]) if tensors[0].is_cuda else nullcontext():
        # Whether a product and a sum are rounded once is said here, for versions of Triton differ in what they assume.
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)


def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the parts of a sum, stacked along the first axis."""
    if len(parts) == 1:
        return parts[0]
    out = torch.empty_like(parts[0], dtype=dtype)
    grid, size = (cdiv(out.numel(), 512),), out.numel()
    run(_add_kernel, grid, parts, out, len(parts), size, SUM=_sum_type(parts), BLOCK=512, num_warps=4)
    return out


def cdiv(size: int, block: int) -> int:
    """Count the blocks that hold `size` elements."""
    return -(-size // block)


def _threshold(keys: Tensor | None, threshold: int) -> int:
    return 0 if keys is None else threshold


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sum_type(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _padded(rank: int) -> int:
    """The width of a tile that holds all ranks: a power of two, and as many as tensor cores take."""
    return max(16, 1 << (rank - 1).bit_length())


def _columns(x: Tensor, rank: int) -> int:
    """The columns of a tile: 128 bytes, the unit in which a GPU reads its memory, or half of it beside many ranks."""
    return (128 if rank <= 32 else 64) // x.element_size()


def _warps(x: Tensor, rank: int, rows: int) -> int:
    """The warps of a program: so few that no thread draws what another one does, unless tiles need more registers."""
    return 4 if rows == 32 and rank <= 32 and x.element_size() == 2 else 8


def _chunk(size: int, block: int, n_programs: int) -> int:
    """The part of an axis that one program goes through, in whole blocks: short enough for `_ENOUGH` programs."""
    n_blocks = cdiv(size, block)
    return block * cdiv(n_blocks, cdiv(_ENOUGH, n_programs))


# -------------------------------------------------------------------------------------------------------- the kernels
# Names in capitals are constants of a compilation. Tiles have BT rows, BC columns, and R ranks. A tile's place is an
# address of 64 bits, and offsets in it have 32, which take half the registers. `stride` is the distance between the
# factors of one fold and of the next, which lie in the row of their fold.


@jit
def _keep(key, layer, rows, column, width, THRESHOLD: constexpr, BT: constexpr, BC: constexpr):
    """Draw a tile of the mask that `dropout.philox_mask` draws.

    key, layer: numbers, of its fold and layer; rows: (BT,) indices in the fold's whole batch; column: the first, a
    multiple of 16.
    """
    if THRESHOLD == 0:
        keep = tl.full((BT, BC), 1, tl.int1)
    else:
        starts = rows.to(tl.uint32) * tl.cdiv(width, 16)
        counter = starts[:, None] + (column // 16 + tl.arange(0, BC // 16)).to(tl.uint32)[None, :]
        zero = counter * 0
        w0, w1, w2, w3 = tl.philox(key, counter, zero + layer.to(tl.uint32), zero, zero)
        # join() alternates elements along a new last axis, each pair within one thread: first the four words of a group
        # in their order, then four times each word, with the compared byte on top: bytes below it cannot decide.
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BT, BC // 4)
        tops = tl.join(tl.join(words << 24, words << 8), tl.join(words << 16, words)).reshape(BT, BC)
        keep = tops >= THRESHOLD << 24
    return keep


@jit
def _dot(a, b, total):
    """Add the product of two tiles to a total."""
    if total.dtype == tl.float64:  # for gradient checks; older versions of dot() do not take it
        total += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@jit
def _masked_kernel(x, out, keys, layer, first_row, n_rows, width, THRESHOLD: constexpr, BT: constexpr, BC: constexpr):
    """A program masks one tile."""
    fold = tl.program_id(1).to(tl.int64)
    key, layer = tl.load(keys + fold), tl.load(layer)
    row, column = tl.program_id(2) * BT, tl.program_id(0) * BC
    rows, columns = row + tl.arange(0, BT), column + tl.arange(0, BC)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    start, places = (fold * n_rows + row) * width, tl.arange(0, BT)[:, None] * width + columns[None, :]
    tile = tl.load(x + start + places, mask=inside, other=0.0)
    keep = _keep(key, layer, first_row + rows, column, width, THRESHOLD, BT, BC)
    tl.store(out + start + places, tl.where(keep, tile, tl.zeros_like(tile)), mask=inside)


@jit
def _project_kernel(
    x, A, out, keys, layer, first_row, n_rows, width, rank, stride,
    THRESHOLD: constexpr, SUM: constexpr, R: constexpr, BT: constexpr, BC: constexpr,
):  # fmt: skip
    """A program computes BT rows of a fold's projection."""
    fold = tl.program_id(1).to(tl.int64)
    key, layer = tl.load(keys + fold) if THRESHOLD else 0, tl.load(layer) if THRESHOLD else 0
    row = tl.program_id(0) * BT
    rows, ranks = row + tl.arange(0, BT), tl.arange(0, R)
    x += (fold * n_rows + row) * width
    A += fold * stride
    out += (fold * n_rows + row) * rank
    total = tl.zeros((BT, R), SUM)
    for column in range(0, width, BC):
        columns = column + tl.arange(0, BC)
        wide = (rows < n_rows)[:, None] & (columns < width)[None, :]
        tile = tl.load(x + (tl.arange(0, BT)[:, None] * width + columns[None, :]), mask=wide, other=0.0)
        high = (columns < width)[:, None] & (ranks < rank)[None, :]
        a = tl.load(A + (ranks[None, :] * width + columns[:, None]), mask=high, other=0.0)
        keep = _keep(key, layer, first_row + rows, column, width, THRESHOLD, BT, BC)
        total = _dot(tl.where(keep, tile, tl.zeros_like(tile)), a.to(tile.dtype), total)
    narrow = (rows < n_rows)[:, None] & (ranks < rank)[None, :]
    tl.store(out + (tl.arange(0, BT)[:, None] * rank + ranks[None, :]), total.to(out.dtype.element_ty), mask=narrow)


@jit
def _backward_B_kernel(
    grad, B, projected, grad_projected, grad_B, n_rows, width, rank, stride, chunk,
    SUM: constexpr, R: constexpr, BT: constexpr, BC: constexpr,
):  # fmt: skip
    """A program goes through BT rows and `chunk` columns of a fold's gradient.

    It has a part of two sums: over columns, for its rows of grad_projected (parts, f, t, r), and over rows, for its
    columns of grad_B (parts, f, out, r).
    """
    fold, n_folds = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row, first = tl.program_id(0) * BT, tl.program_id(2) * chunk
    rows, ranks = row + tl.arange(0, BT), tl.arange(0, R)
    grad += (fold * n_rows + row) * width
    B += fold * stride
    projected += (fold * n_rows + row) * rank
    grad_projected += ((tl.program_id(2) * n_folds + fold) * n_rows + row) * rank
    grad_B += (tl.program_id(0) * n_folds + fold) * width * rank
    narrow = (rows < n_rows)[:, None] & (ranks < rank)[None, :]
    own = tl.arange(0, BT)[:, None] * rank + ranks[None, :]
    p = tl.load(projected + own, mask=narrow, other=0.0)
    total = tl.zeros((BT, R), SUM)
    for column in range(first, tl.minimum(first + chunk, width), BC):
        columns = column + tl.arange(0, BC)
        wide = (rows < n_rows)[:, None] & (columns < width)[None, :]
        tile = tl.load(grad + (tl.arange(0, BT)[:, None] * width + columns[None, :]), mask=wide, other=0.0)
        high = (columns < width)[:, None] & (ranks < rank)[None, :]
        places = columns[:, None] * rank + ranks[None, :]
        b = tl.load(B + places, mask=high, other=0.0)
        total = _dot(tile, b.to(tile.dtype), total)
        tl.store(grad_B + places, _dot(tl.trans(tile), p, tl.zeros((BC, R), SUM)), mask=high)
    tl.store(grad_projected + own, total.to(grad_projected.dtype.element_ty), mask=narrow)


@jit
def _backward_A_kernel(
    x, grad_projected, A, grad_x, grad_A, keys, layer, first_row, n_rows, width, rank, stride, chunk,
    SCALE: constexpr, THRESHOLD: constexpr, SUM: constexpr, R: constexpr, BT: constexpr, BC: constexpr,
):  # fmt: skip
    """A program goes through BC columns and `chunk` rows of a fold's inputs.

    It has a part of a sum over rows: its columns of grad_A (parts, f, r, in).
    """
    fold, n_folds = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    key, layer = tl.load(keys + fold) if THRESHOLD else 0, tl.load(layer) if THRESHOLD else 0
    column, first = tl.program_id(0) * BC, tl.program_id(2) * chunk
    columns, ranks = column + tl.arange(0, BC), tl.arange(0, R)
    A += fold * stride
    grad_A += (tl.program_id(2) * n_folds + fold) * rank * width
    flat = (ranks < rank)[:, None] & (columns < width)[None, :]
    own = ranks[:, None] * width + columns[None, :]
    a = tl.load(A + own, mask=flat, other=0.0).to(x.dtype.element_ty)
    total = tl.zeros((R, BC), SUM)
    for row in range(first, tl.minimum(first + chunk, n_rows), BT):
        rows = row + tl.arange(0, BT)
        narrow = (rows < n_rows)[:, None] & (ranks < rank)[None, :]
        p_start, p_places = (fold * n_rows + row) * rank, tl.arange(0, BT)[:, None] * rank + ranks[None, :]
        p = tl.load(grad_projected + p_start + p_places, mask=narrow, other=0.0)
        wide = (rows < n_rows)[:, None] & (columns < width)[None, :]
        start, places = (fold * n_rows + row) * width, tl.arange(0, BT)[:, None] * width + columns[None, :]
        tile = tl.load(x + start + places, mask=wide, other=0.0)
        keep = _keep(key, layer, first_row + rows, column, width, THRESHOLD, BT, BC)
        total = _dot(tl.trans(p), tl.where(keep, tile, tl.zeros_like(tile)), total)
        if grad_x is not None:
            added = _dot(p, a, tl.zeros((BT, BC), SUM)) * SCALE
            frozen = tl.load(grad_x + start + places, mask=wide, other=0.0)
            result = frozen + tl.where(keep, added, 0.0)
            tl.store(grad_x + start + places, result.to(grad_x.dtype.element_ty), mask=wide)
    tl.store(grad_A + own, total, mask=flat)


@jit
def _add_kernel(parts, out, n_parts, size, SUM: constexpr, BLOCK: constexpr):
    """A program adds the parts (n_parts, size) of BLOCK elements, the first part first."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), SUM)
    for _ in range(n_parts):
        total += tl.load(parts + places, mask=places < size, other=0.0)
        parts += size
    tl.store(out + places, total.to(out.dtype.element_ty), mask=places < size)
