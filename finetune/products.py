"""What do an adapter's thin products compute, forward and backward?

For a fold with inputs x (t, in), factors A (r, in) and B (out, r), and a dropout mask m, the adapter adds
s B A (m * x) to the frozen layer's output. Each step stands here in plain PyTorch, for every device. For GPUs
`finetune/kernels.py` has the same functions, each of which reads its large tensors once; these are what they are held
to.

Everything is computed in the dtype of x. Gradients of the factors come as float32 (float64 for float64), not yet
multiplied by s.

Arguments that recur:
    x: (f, t, in), contiguous: the tokens or pixels of all images of a fold below each other.
    A: (f, r, in), B: (f, out, r): the factors, in any floating dtype.
    keys: (f,) int64 on the device: a seed per fold for this step. None: no dropout.
    layer: () or (1,) integer tensor on the device: position of the layer in the network.
    threshold: from `drop_threshold`; 0 drops nothing.
    rows: which images of each fold's batch x holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.dropout import BatchRows, keep_mask


def masked(x: Tensor, keys: Tensor | None, layer: Tensor, threshold: int, rows: BatchRows) -> Tensor:
    """Drop what the mask drops: m * x, or x itself where nothing is dropped."""
    mask = _mask(x, keys, layer, threshold, rows)
    return x if mask is None else mask.mul_(x)  # in place: on a CPU new memory takes longer than the product


def project(x: Tensor, A: Tensor, keys: Tensor | None, layer: Tensor, threshold: int, rows: BatchRows) -> Tensor:
    """Project the inputs that are kept: (m * x) A^T, of shape (f, t, r)."""
    return torch.bmm(masked(x, keys, layer, threshold, rows), A.to(x.dtype).mT)


def backward_B(grad: Tensor, B: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the gradient of the outputs back through B.

    Args:
        grad: (f, t, out) gradient of the adapted layer's output.
        B: (f, out, r).
        projected: (f, t, r) from `project`.

    Returns:
        grad B, the gradient of the projection, (f, t, r) in the dtype of grad; and grad^T projected, that of B,
        (f, out, r). Both without the factor s.
    """
    return torch.bmm(grad, B.to(grad.dtype)), _float(torch.bmm(grad.mT, projected))


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
    """Carry the gradient of the projection back through A, and add the adapter's part to the gradient of the inputs.

    Args:
        x: (f, t, in).
        grad_projected: (f, t, r) from `backward_B`.
        A: (f, r, in).
        grad_x: (f, t, in) contiguous, the gradient that came through the frozen layer; in place,
            s * m * (grad_projected A) is added. None where nobody asks for it.
        keys, layer, threshold, rows: as above, those of the forward pass.
        scale: s.

    Returns:
        grad_projected^T (m * x), the gradient of A, (f, r, in).
    """
    # Drawn in the shape of the gradient: asked for a mask in the shape of the input again, torch.compile would draw it
    # once, in the forward pass, and keep it.
    mask = _mask(x if grad_x is None else grad_x, keys, layer, threshold, rows)
    if grad_x is not None and mask is None:
        grad_x.baddbmm_(grad_projected, A.to(x.dtype), alpha=scale)
    elif grad_x is not None and mask is not None:
        grad_x.addcmul_(torch.bmm(grad_projected, A.to(x.dtype)), mask, value=scale)
    return _float(torch.bmm(grad_projected.mT, x if mask is None else mask.mul_(x)))


def _mask(like: Tensor, keys: Tensor | None, layer: Tensor, threshold: int, rows: BatchRows) -> Tensor | None:
    if keys is None or not threshold:
        return None
    # One by one: older versions of torch.compile do not look into `_asdict`.
    parts = {"first": rows.first, "n": rows.n, "total": rows.total}
    return keep_mask(like, keys, layer=layer, threshold=threshold, **parts)


def _float(gradient: Tensor) -> Tensor:
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
