"""How does a frozen convolutional network compute the same in fewer passes over memory, forward and backward?

On a CPU most of a step's time goes into reading and writing activations. So batch norms are folded into the layers
before them, activations are applied in place, and no input is copied to be padded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from extract.compute import fold_batch_norms, fuse_convolution
from finetune.lora import StackedLora


def simplify(model: nn.Module) -> None:
    """Change a frozen network in place to compute the same in fewer passes, for `extract.compute.reformed`."""
    fold_batch_norms(model, fuse_adapted)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.ReLU6 and child.inplace:
                setattr(module, name, InPlaceReLU6())
            elif type(child) is Conv2dSame and EvenConvolution.can_replace(child):
                setattr(module, name, EvenConvolution(child))


def fuse_adapted(layer: nn.Module, norm: nn.BatchNorm2d) -> nn.Module | None:
    """Make one layer of a layer, perhaps an adapted one, and the batch norm that follows it; None where it cannot.

    With W' = gain W, the norm of an adapted layer is W' x + offset + gain s B A x: the same A and B, and the same
    gradients of them.
    """
    if not isinstance(layer, StackedLora):
        return fuse_convolution(layer, norm)
    base = fuse_convolution(layer.base, norm)
    if base is None:
        return None
    assert norm.running_var is not None  # or the convolution could not have been fused
    gain = torch.rsqrt(norm.running_var + norm.eps)
    layer.base, layer.output_gain = base, gain if norm.weight is None else gain * norm.weight
    return layer


class InPlaceReLU6(nn.Module):
    """ReLU6 in place. Torch's own copies its input first, though the backward pass needs the result alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Clamp x, of any shape, to 0..6."""
        y: Tensor = F.relu6(x) if x._is_view() else _ReLU6.apply(x)
        return y


class _ReLU6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.clamp_(0, 6)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        result: Tensor = torch.ops.aten.hardtanh_backward(grad, y, 0, 6)
        return result


class EvenConvolution(nn.Module):
    """A convolution of stride 2 with "same" padding, which does not copy an input of even height and width to pad it.

    There, "same" adds one row and column more at the end than at the beginning. A kernel with a row and a column of
    zeros before its own, and equal padding, reads the same pixels.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution  # for odd sizes
        larger = F.pad(convolution.weight, (1, 0, 1, 0)).contiguous(memory_format=torch.channels_last)
        self.larger: Tensor
        self.register_buffer("larger", larger, persistent=False)

    @staticmethod
    def can_replace(convolution: nn.Conv2d) -> bool:
        """Whether it is of stride 2, and its kernel square, of an odd size of at least 3."""
        height, width = convolution.kernel_size
        plain = convolution.stride == (2, 2) and convolution.dilation == (1, 1)
        return plain and height == width and height >= 3 and height % 2 == 1

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in, h, w) to (n, out, h / 2, w / 2), rounded up."""
        if x.shape[-1] % 2 or x.shape[-2] % 2:
            y: Tensor = self.convolution(x)
            return y
        padding, groups = self.convolution.kernel_size[0] // 2, self.convolution.groups
        return F.conv2d(x, self.larger, self.convolution.bias, stride=2, padding=padding, groups=groups)
