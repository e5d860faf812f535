"""Does a frozen network without batch norms, copies and paddings compute what it did before, forward and backward?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_network import CNN, n_norms, outcome, with_uneven_norms
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from finetune.frozen import EvenConvolution, InPlaceReLU6


@pytest.mark.parametrize("size", [12, 13])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("groups", [1, 4])
def test_even_and_odd_sizes_are_padded_as_timm_pads_them(groups: int, kernel: int, size: int) -> None:
    torch.manual_seed(0)
    theirs = Conv2dSame(4, 8, kernel, stride=2, groups=groups, dtype=torch.float64).requires_grad_(False)
    ours = EvenConvolution(theirs)
    x = torch.randn(2, 4, size, 12, dtype=torch.float64, requires_grad=True)
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), x)[0])


@pytest.mark.parametrize(
    ("convolution", "expected"),
    [
        (Conv2dSame(3, 3, 3, stride=2), True),
        (Conv2dSame(3, 3, 1, stride=2), False),
        (Conv2dSame(3, 3, 4, stride=2), False),
        (Conv2dSame(3, 3, (3, 5), stride=2), False),
        (Conv2dSame(3, 3, 3, stride=2, dilation=2), False),
        (Conv2dSame(3, 3, 3, stride=3), False),
    ],
)
def test_only_what_pads_more_at_the_end_is_replaced(convolution: Conv2dSame, expected: bool) -> None:
    assert EvenConvolution.can_replace(convolution) == expected


def test_relu6_in_place_is_relu6_and_keeps_no_copy() -> None:
    x = torch.linspace(-2, 8, 11, dtype=torch.float64, requires_grad=True)  # 0 and 6, where the gradient is zero, too
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    given = x * 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = InPlaceReLU6()(given)
    assert y.data_ptr() == given.data_ptr()
    assert {tensor.data_ptr() for tensor in kept} == {given.data_ptr()}
    assert torch.equal(y, F.relu6(x))
    weights = torch.arange(1.0, 12, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.equal(gradient, torch.autograd.grad((F.relu6(x) * weights).sum(), x)[0])
    view = (x * 1)[1:]  # whose base others may need
    assert InPlaceReLU6()(view).data_ptr() != view.data_ptr()


def test_a_network_with_both_is_simplified_and_computes_the_same() -> None:
    """As EfficientNet-Lite has them: "same" padding and ReLU6."""
    network = with_uneven_norms("lora", replace(CNN, kwargs={"pad_type": "same", "act_layer": "relu6"}))
    expected = outcome(network)
    assert network.compute_in("fp32")
    assert n_norms(network) == 0
    kinds = {type(module) for module in network.model.modules()}
    assert {InPlaceReLU6, EvenConvolution} <= kinds
    assert not any(isinstance(module, nn.ReLU6) for module in network.model.modules())
    torch.testing.assert_close(outcome(network), expected, rtol=1e-9, atol=1e-9)
