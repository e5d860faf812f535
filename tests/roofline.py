"""What would extraction and LoRA reach on a GPU that is not at hand? A prediction from the operations they really run.

The real code runs on tensors without memory (torch's fake tensors), and a tape lists every operation that starts a
kernel, with its floating-point operations and the bytes it reads and writes. An operation then takes

    max(FLOPs / (peak x efficiency), bytes / (bandwidth x efficiency), shortest kernel),

and a step the sum of that, or the time the host needs to start its operations, whichever is longer (roofline model:
Williams, Waterman & Patterson 2009). Ways:

- plain: every operation of plain PyTorch is a kernel, which the host starts.
- kernels: the same, with the adapters' thin products and dropout in the Triton kernels of `finetune.kernels`.
- fused: a bound on what compiled blocks give. What lies between two products, or operators that the compiler does not
  look into, is one kernel that reads its inputs and writes its results once; the host is no limit, as in a CUDA graph.

Not modelled: partial sums within an operator, the 50 MB cache, tiles that leave processors idle, clocks that fall under
load. So a prediction is no measurement: docs/performance.md keeps the two apart.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from extract.backbones import Backbone, build_model, find_backbone
from extract.compute import embed_batch, hold_weights
from features.folds import fold_models
from finetune.lora import LoraOptions, adapters, add_adapters, default_targets, select_folds
from finetune.network import Network

MODELS = {"kaiko-s16": "ViT-S/16", "virchow2": "ViT-H/14", "h-optimus-1": "ViT-g/14"}
EXTRACTION_BATCH = 256
N_FOLDS, FOLD_BATCH = 5, 8

# Operations that hand out memory or another view of it: no kernel. Those whose schema says so need not be listed.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
_FREE |= {"_local_scalar_dense", "device", "_reshape_alias", "alias", "detach", "set_"}
_RANDOM = -1  # stands for the storage of random bytes
_OVERWRITES = {"copy_", "zero_", "fill_", "random_", "uniform_", "normal_", "bernoulli_"}  # what they write is not read


@dataclass(frozen=True)
class Chip:
    """A GPU. Efficiencies are what good kernels reach of the datasheet's figures; they are assumptions.

    Attributes:
        flops: dense bf16 products, per second.
        bandwidth: of the memory, bytes per second.
        products, attention, memory: fraction of those that products, attention and everything else reach.
        shortest: seconds that the shortest kernel takes, the gap to the next one included.
        host: seconds the host needs to start an operation of an eager training step, autograd included.
    """

    name: str
    flops: float
    bandwidth: float
    products: float = 0.70
    attention: float = 0.35
    memory: float = 0.85
    shortest: float = 2e-6
    host: float = 20e-6  # 17 to 24 us per kernel were measured on a server's CPU, see docs/performance.md

    @property
    def matmul_peak(self) -> float:
        """FLOP/s that large products are assumed to reach: what a benchmark would measure."""
        return self.flops * self.products


# NVIDIA H100 Tensor Core GPU datasheet, column SXM: 1,979 TFLOP/s in bf16 with sparsity, half of that dense; 3.35 TB/s.
H100 = Chip("H100 SXM", flops=989e12, bandwidth=3.35e12)


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation that starts `kernels` kernels; what it reads and writes is bytes by storage.

    An operator of mitofm's own is `opaque`: a compiler does not look into it.
    """

    name: str
    flops: float
    reads: Mapping[int, int]
    writes: Mapping[int, int]
    kernels: int = 1
    opaque: bool = False

    @property
    def bytes(self) -> int:
        """All that it moves."""
        return sum(self.reads.values()) + sum(self.writes.values())


class Tape(TorchDispatchMode):
    """Lists the operations that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no identity is used twice

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and note it."""
        kwargs = kwargs or {}
        if func.namespace == "aten":  # without autograd, composed operations such as `linear` arrive whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if is_view or name in _FREE:
            return result
        written = [
            value
            for argument, value in _arguments(func, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        read = [value for _, value in _arguments(func, args, kwargs)]
        if name in _OVERWRITES or "out" in kwargs:
            read = [value for value in read if all(value is not one for one in written)]
        reads, writes = self._bytes(read), self._bytes([*written, *tree_leaves(result)])
        kernels = 1
        if name.strip("_") == "keep_mask":  # per fold, random bytes are compared with a threshold; `like` is not read
            mask = result.numel()
            reads, writes, kernels = {_RANDOM: 2 * mask}, self._bytes([result]), 2 * len(args[1])
        flops, opaque = _flops(func, args, kwargs, result), func.namespace == "mitofm"
        self.operations.append(Operation(name, flops, reads, writes, kernels, opaque))
        return result

    def _bytes(self, values: Sequence[Any]) -> dict[int, int]:
        """Count the bytes of tensors by storage: no more than the storage holds, however often it is repeated."""
        found: dict[int, int] = {}
        for tensor in (value for value in values if isinstance(value, Tensor)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            self._storages[key] = storage
            found[key] = max(found.get(key, 0), min(tensor.numel() * tensor.element_size(), storage.nbytes()))
        return found


def _arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Pair the tensors of a call with the arguments of its schema."""
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        yield from ((argument, leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> float:
    """Count 2 per multiply-add of products and attention; 0 for all else, which memory bounds."""
    packet = func.overloadpacket
    if packet not in flop_registry:  # baddbmm_ counts as baddbmm
        packet = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), None)
    return float(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0.0


# ------------------------------------------------------------------------------------------------------------ the times


def seconds(operation: Operation, chip: Chip) -> float:
    """Predict what the GPU needs for an operation."""
    efficiency = chip.attention if "attention" in operation.name else chip.products
    return max(
        operation.flops / (chip.flops * efficiency),
        operation.bytes / (chip.bandwidth * chip.memory),
        operation.kernels * chip.shortest,
    )


def fused(operations: Sequence[Operation]) -> list[Operation]:
    """Make one operation of all that lie between two products: what only they pass on is neither written nor read."""
    last_read = {key: place for place, operation in enumerate(operations) for key in operation.reads}
    result: list[Operation] = []
    run: list[tuple[int, Operation]] = []

    def close() -> None:
        if not run:
            return
        reads: dict[int, int] = {}
        writes: dict[int, int] = {}
        for _, operation in run:
            for key, n in operation.reads.items():
                if key not in writes:
                    reads[key] = max(reads.get(key, 0), n)
            for key, n in operation.writes.items():
                writes[key] = max(writes.get(key, 0), n)
        end = run[-1][0]
        kept = {key: n for key, n in writes.items() if not run[0][0] <= last_read.get(key, math.inf) <= end}
        result.append(Operation("fused", 0.0, reads, kept))
        run.clear()

    for place, operation in enumerate(operations):
        if operation.flops or operation.opaque:
            close()
            result.append(operation)
        else:
            run.append((place, operation))
    close()
    return result


@dataclass(frozen=True)
class Prediction:
    """What a chip would need for one step."""

    way: str
    kernels: int
    gigabytes: float
    device_seconds: float
    host_seconds: float

    @property
    def seconds(self) -> float:
        """Whichever is longer: the work on the GPU, or starting it."""
        return max(self.device_seconds, self.host_seconds)


def predict(operations: Sequence[Operation], chip: Chip, *, way: str) -> Prediction:
    """Predict a step in which the host starts every operation; if `way` is "fused", one compiled as far as can be."""
    kept, host = (fused(operations), 0.0) if way == "fused" else (operations, chip.host)
    n = sum(operation.kernels for operation in kept)
    moved = sum(operation.bytes for operation in kept) / 1e9
    return Prediction(way, n, moved, sum(seconds(operation, chip) for operation in kept), n * host)


# ------------------------------------------------------------------------------------------ the real code, on no memory


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, *_: object, scale: float | None = None, **__: object) -> Tensor:
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)[0]
    return result


def _fused_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x


_layer_norm = F.layer_norm


def _float32_layer_norm(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return _layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *arguments, **options)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Run what follows as on a GPU, on fake tensors: of "cuda", or of "cpu" where gradients are needed.

    Without a GPU autograd refuses "cuda", as it looks for the device's stream. "cpu" then stands for it: autocast to
    float32 for layer norms, flash attention and dropout in one kernel are what a GPU has and a CPU has not.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _flash_attention))
        stack.enter_context(patch.object(F, "layer_norm", _float32_layer_norm))
        stack.enter_context(patch.object(F, "dropout", _fused_dropout))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def fake_network(
    backbone: Backbone, device: str, *, adapt: Callable[[nn.Module], nn.Module] = lambda model: model
) -> nn.Module:
    """Build a backbone in float32 without memory, adapted; to be called inside `pretended_gpu`."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        model = adapt(build_model(backbone, None))
    return model.to_empty(device=device)


def extraction_operations(name: str, batch: int, *, device: str = "cuda") -> list[Operation]:
    """List the operations of one bf16 forward pass of `fm-extract`."""
    backbone = find_backbone(name)
    with pretended_gpu():
        model = hold_weights(fake_network(backbone, device), "bf16")
        images = torch.empty(batch, 3, backbone.input_size, backbone.input_size, device=device)
        with Tape() as tape:
            embed_batch(model, backbone, images, precision="bf16")
    return tape.operations


def training_operations(name: str, *, triton: bool, n_folds: int = N_FOLDS, batch: int = FOLD_BATCH) -> list[Operation]:
    """List the operations of the forward and backward pass of one LoRA step of all folds."""
    backbone = find_backbone(name)
    with pretended_gpu():
        model = fake_network(backbone, "cpu")
        network = Network(model, backbone, method="lora", lora=LoraOptions(), fold_models=fold_models([0], n_folds))
        network.compute_in("bf16")
        for _, layer in adapters(network.model):
            layer.triton = triton
        images = torch.empty(n_folds * batch, 3, backbone.input_size, backbone.input_size)
        with Tape() as tape:
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(images, range(n_folds), step=0)
            logits.square().mean().backward()
    return tape.operations


def peft_operations(name: str, *, batch: int = FOLD_BATCH) -> list[Operation]:
    """List the operations of the same step of one fold's `peft` model."""
    import peft

    def adapt(model: nn.Module) -> nn.Module:
        config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.3, target_modules=default_targets(model))
        adapted: nn.Module = peft.get_peft_model(model, config).train()
        return adapted

    backbone = find_backbone(name)
    with pretended_gpu():
        adapted = fake_network(backbone, "cpu", adapt=adapt)
        images = torch.empty(batch, 3, backbone.input_size, backbone.input_size)
        with Tape() as tape:
            with torch.autocast("cpu", torch.bfloat16):
                output = adapted(images)
            output.float().square().mean().backward()
    return tape.operations


def kernels_per_layer(*, triton: bool, n_folds: int = N_FOLDS) -> tuple[int, int]:
    """Count the kernels of one adapted layer, forward and backward, its frozen product included."""
    with pretended_gpu():
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        add_adapters(model, LoraOptions(targets="1"), fold_models=fold_models([0], n_folds))
        select_folds(model, range(n_folds), step=0)
        for _, layer in adapters(model):
            layer.triton = triton
        x = torch.empty(n_folds * 2, 4, 64, dtype=torch.bfloat16, requires_grad=True)
        with Tape() as forward, torch.autocast("cpu", torch.bfloat16):
            y = model[1](x)
        gradient = torch.empty_like(y)
        with Tape() as backward:
            y.backward(gradient)
    return sum(o.kernels for o in forward.operations), sum(o.kernels for o in backward.operations)


def rows(chip: Chip, models: Sequence[str]) -> Iterator[tuple[str, str, Prediction, float, float]]:
    """Predict model by model: (title, what, prediction, images/s, share of the matmul peak)."""
    extraction = partial(extraction_operations, batch=EXTRACTION_BATCH)
    ours, plain = partial(training_operations, triton=True), partial(training_operations, triton=False)
    works: list[tuple[str, str, Callable[[str], list[Operation]], int, int]] = [
        ("extraction", "plain", extraction, EXTRACTION_BATCH, 1),
        ("extraction", "fused", extraction, EXTRACTION_BATCH, 1),
        # Forward, and the gradient of the input: the frozen weights have none.
        ("LoRA", "plain", plain, N_FOLDS * FOLD_BATCH, 2),
        ("LoRA", "kernels", ours, N_FOLDS * FOLD_BATCH, 2),
        ("LoRA", "fused", ours, N_FOLDS * FOLD_BATCH, 2),
        ("LoRA by peft", "plain", peft_operations, FOLD_BATCH, 2),  # one fold; five in turn take five times as long
        ("LoRA by peft", "fused", peft_operations, FOLD_BATCH, 2),
    ]
    for name in models:
        gflops = find_backbone(name).gflops
        assert gflops is not None
        for what, way, list_operations, n_images, passes in works:
            found = predict(list_operations(name), chip, way=way)
            rate = n_images / found.seconds
            yield MODELS[name], what, found, rate, rate * passes * gflops * 1e9 / chip.matmul_peak


def main() -> None:
    """Print the predictions as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    arguments = parser.parse_args()
    chip = H100
    print(f"{chip.name}: {chip.matmul_peak / 1e12:.0f} TFLOP/s in products, {chip.products:.0%} of the datasheet's;")
    print(f"{chip.bandwidth * chip.memory / 1e12:.2f} TB/s, {chip.memory:.0%} of the datasheet's;")
    for way, triton in (("plain", False), ("kernels", True)):
        forward, backward = kernels_per_layer(triton=triton)
        print(f"kernels of an adapted layer, {way}: {forward} forward, {backward} backward")
    print()
    print("| model | work | way | kernels | GB moved | GPU ms | host ms | images/s | of the matmul peak |")
    print("|---|---|---|---|---|---|---|---|---|")
    for title, what, found, rate, share in rows(chip, arguments.models.split(",")):
        print(
            f"| {title} | {what} | {found.way} | {found.kernels:,} | {found.gigabytes:,.1f} "
            f"| {found.device_seconds * 1e3:,.1f} | {found.host_seconds * 1e3:,.1f} | {rate:,.0f} | {share:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
