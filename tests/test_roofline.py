"""Does the prediction count what a GPU would do: products, bytes, kernels, and nothing for a view?"""

from dataclasses import replace

import pytest
import roofline
import torch
from roofline import Chip, Operation, Tape, fused, predict, pretended_gpu, seconds
from torch import nn

# Round figures: 1 TFLOP/s, 1 GB/s, no kernel shorter than a microsecond.
CHIP = Chip("round", flops=1e12, bandwidth=1e9, products=1.0, attention=0.5, memory=1.0, shortest=1e-6, host=10e-6)


def operation(name: str, *, flops: float = 0, reads: tuple[int, ...] = (), writes: tuple[int, ...] = ()) -> Operation:
    """Each storage holds a thousand bytes."""
    return Operation(name, flops, dict.fromkeys(reads, 1000), dict.fromkeys(writes, 1000))


def test_the_flops_of_linear_layers_forward_and_back() -> None:
    with pretended_gpu():
        model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
        with Tape() as forward:
            y = model(torch.ones(3, 8))
        with Tape() as backward:
            y.backward(torch.empty_like(y))
    first, second = 2 * 3 * 8 * 16, 2 * 3 * 16 * 4
    assert sum(o.flops for o in forward.operations) == first + second
    # The gradients of both weights, and of the second layer's input; nobody asks for that of the first's.
    assert sum(o.flops for o in backward.operations) == first + 2 * second


def test_a_product_in_place_counts_as_one_out_of_place() -> None:
    with pretended_gpu(), Tape() as tape:
        y, a, b = torch.ones(2, 3, 5), torch.ones(2, 3, 4), torch.ones(2, 4, 5)
        tape.operations.clear()
        y.baddbmm_(a, b)
    assert [o.flops for o in tape.operations] == [2 * 2 * 3 * 4 * 5]


def test_the_bytes_of_an_addition_in_bf16() -> None:
    with pretended_gpu(), Tape() as tape:
        a, b = torch.empty(100, dtype=torch.bfloat16), torch.empty(100, dtype=torch.bfloat16)
        _ = a + b
    (added,) = tape.operations
    assert (added.name, added.flops, added.kernels) == ("add", 0, 1)
    assert (sum(added.reads.values()), sum(added.writes.values())) == (400, 200)


def test_views_cost_nothing_and_what_is_repeated_is_read_once() -> None:
    with pretended_gpu(), Tape() as tape:
        x = torch.empty(4, 6)
        x = x.view(2, 12)[:, :6].mT.unsqueeze(0).detach()
        x = x.expand(50, 6, 2)
        assert tape.operations == []
        x.clone()
    (copied,) = tape.operations
    assert sum(copied.reads.values()) == 4 * 6 * 4  # the storage of x, not fifty times it
    assert sum(copied.writes.values()) == 50 * 6 * 2 * 4


def test_what_is_overwritten_is_not_read() -> None:
    with pretended_gpu(), Tape() as tape:
        x, y = torch.empty(10), torch.empty(10)
        x.copy_(y)
        x.add_(y)
    copied, added = tape.operations
    assert (copied.bytes, added.bytes) == (80, 120)


def test_an_operation_takes_as_long_as_what_bounds_it() -> None:
    assert seconds(operation("mm", flops=4e9), CHIP) == pytest.approx(4e-3)
    assert seconds(operation("_flash_attention", flops=4e9), CHIP) == pytest.approx(8e-3)
    assert seconds(operation("mm", flops=1e3, reads=(1, 2, 3), writes=(4,)), CHIP) == pytest.approx(4e-6)
    assert seconds(operation("add"), CHIP) == pytest.approx(1e-6)
    assert seconds(replace(operation("add"), kernels=3), CHIP) == pytest.approx(3e-6)


def test_fused_operations_move_only_what_others_gave_or_need() -> None:
    chain = [
        operation("mm", flops=1, reads=(0,), writes=(1,)),
        operation("add", reads=(1, 2), writes=(3,)),
        operation("gelu", reads=(3,), writes=(4,)),  # 3 is passed on within the run: neither written nor read
        operation("mul", reads=(4, 4), writes=(5,)),
        operation("mm", flops=1, reads=(5,), writes=(6,)),
        operation("gelu_backward", reads=(4, 6), writes=(7,)),  # so 4 has to be kept
    ]
    _, forward, _, backward = fused(chain)
    assert forward.reads.keys() == {1, 2}
    assert forward.writes.keys() == {4, 5}
    assert (backward.reads.keys(), backward.writes.keys()) == ({4, 6}, {7})


def test_operators_that_a_compiler_does_not_look_into_stay_alone() -> None:
    step = [operation("add", writes=(1,)), replace(operation("project"), opaque=True), operation("mul", reads=(1,))]
    assert [o.name for o in fused(step)] == ["fused", "project", "fused"]


def test_a_step_is_bound_by_the_gpu_or_by_the_host() -> None:
    step = [operation("add", reads=(1,), writes=(2,)), operation("add", reads=(2,))]
    eager = predict(step, CHIP, way="plain")
    assert (eager.kernels, eager.device_seconds, eager.host_seconds) == (2, pytest.approx(3e-6), pytest.approx(2e-5))
    assert eager.seconds == eager.host_seconds
    # The second read of what the first wrote is gone, and so are the writes: 2 is read by no later one.
    together = predict(step, CHIP, way="fused")
    assert (together.kernels, together.seconds) == (1, pytest.approx(1e-6))


@pytest.mark.slow
def test_the_adapters_kernels_stand_for_what_they_compute() -> None:
    plain, ours = (roofline.kernels_per_layer(triton=triton) for triton in (False, True))
    assert ours[0] < plain[0]
    assert ours[1] < plain[1]
    lists = [roofline.training_operations("timm/vit_tiny_patch16_224", triton=t, n_folds=2, batch=1) for t in (0, 1)]
    names = [{o.name for o in operations if o.opaque} for operations in lists]
    assert names == [{"keep_mask"}, {"project", "backward_B", "backward_A_", "backward_A"}]
    # Thin products count as memory traffic alone; the frozen ones and attention are the same.
    frozen = [sum(o.flops for o in ops if o.name in ("addmm", "mm", "convolution")) for ops in lists]
    assert frozen[0] == frozen[1] > 0


def test_the_stand_in_for_a_gpu_runs_what_autocast_on_cuda_runs() -> None:
    """Operation by operation, but for one cast of the pooled embedding."""
    lists = [roofline.extraction_operations("timm/vit_tiny_patch16_224", 2, device=d) for d in ("cuda", "cpu")]
    on_cuda, stand_in = ([o.name for o in operations if o.name != "_to_copy"] for operations in lists)
    assert on_cuda == stand_in
    assert set(on_cuda) == {
        "convolution", "cat", "add", "native_layer_norm", "addmm", "_scaled_dot_product_flash_attention", "gelu", "mean"
    }  # fmt: skip
    assert abs(len(lists[0]) - len(lists[1])) <= 1
    assert sum(o.flops for o in lists[0]) == sum(o.flops for o in lists[1]) > 2 * 2e9


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_layer_norms_are_in_float32_as_autocast_has_it_on_cuda_alone(device: str) -> None:
    with pretended_gpu(), Tape() as tape, torch.autocast(device, torch.bfloat16):
        y = nn.functional.layer_norm(torch.empty(3, 8, device=device, dtype=torch.bfloat16), (8,))
    assert y.dtype == torch.float32
    assert [o.name for o in tape.operations] == ["_to_copy", "native_layer_norm"]
