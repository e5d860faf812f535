"""Which fast ways to train does this machine take, and does each compute what plain PyTorch computes?

None is the only way. Each is tried on its first use: it has to run, and to agree with the plain one in the shapes of
the training. Otherwise one sentence says so, and training goes on without it. `fast=False` tries none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from features.device import agrees, free_cached_memory, out_of_memory
from finetune import kernels
from finetune.compute import Compute, allow_unrepeatable, save_memory
from finetune.lora import adapters, dropout_keys
from finetune.network import Network

# Largest difference, as a fraction of a tensor's largest element. Fused operations round in fewer places: in bf16, of 8
# bits, by a percent after many layers. A wrong mask or factor changes gradients by tenths.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
GRAPH_PARAMETERS = 100_000_000  # of backbones whose steps are captured: larger ones keep a GPU busy by themselves


def try_kernels(network: Network, compute: Compute) -> None:
    """Have adapters compute by Triton kernels on an NVIDIA GPU."""
    if compute.device.type != "cuda" or network.method != "lora" or not kernels.available():
        return
    dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
    rank = next(layer.options.rank for _, layer in adapters(network.model))
    if kernels.verify(compute.device, dtype, rank=rank):
        for _, layer in adapters(network.model):
            layer.triton = True
        network.forget_replicas()
        compute.fast_paths.add("kernels")


def try_compiled_blocks(
    network: Network, compute: Compute, *, batch_size: int, image_size: int, training: bool = True
) -> None:
    """Have torch.compile translate the blocks of a transformer, for training and for evaluation.

    Networks with random layers are left as they are: compiled code draws other numbers.

    Args:
        network: whose values are as they were in the end.
        compute: with the folds of a pass; lowered where memory runs out, as in training.
        batch_size: images per fold in a step of this process.
        image_size: edge of the network's input.
        training: whether it is to be trained, and not only to evaluate.
    """
    if network.has_random_layers:
        return
    before = network.values.clone()
    try:
        # B begins at zero, where half of the gradients are zero however they are computed.
        if network.method == "lora":
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(network.n_trained, generator=generator).to(before)
            network.values[:, : network.n_trained] += 0.02 * noise

        def plain() -> list[Tensor]:
            trained = _step_outcome(network, compute, batch_size, image_size) if training else []
            return [*trained, _evaluation_outcome(network, compute, image_size)]

        def compiled() -> list[Tensor]:
            network.compile_blocks()
            return plain()

        while True:
            try:
                tolerance = TOLERANCE[compute.precision]
                if not agrees("The compiled form of the backbone's blocks", compiled, plain, tolerance=tolerance):
                    network.forget_compiled()
                elif network.is_compiled:
                    compute.fast_paths.add("compiled blocks")
                return
            except RuntimeError as error:
                if out_of_memory(error):
                    save_memory(network, compute, batch_size, error)
                elif not allow_unrepeatable(compute, error):
                    raise
    finally:
        network.values.copy_(before)
        network.clear_gradients()


def _step_outcome(network: Network, compute: Compute, batch_size: int, image_size: int) -> list[Tensor]:
    """Compute logits and gradients of a step on random images."""
    members = network.members[: compute.folds_at_once]
    images = _images(len(members) * batch_size, image_size, compute.device)
    step = torch.tensor(dropout_keys([network.fold_models[m] for m in members], 0), device=compute.device)
    network.clear_gradients()
    with compute.autocast():
        logits = network(images, members, step=step)
    (logits * torch.linspace(-1, 1, batch_size, device=compute.device)[:, None]).sum().backward()
    network.gather_gradients()
    gradients = network.gradients.clone()
    network.clear_gradients()
    return [logits.detach().clone(), gradients]


@torch.inference_mode()
def _evaluation_outcome(network: Network, compute: Compute, image_size: int) -> Tensor:
    """Compute the logits of an evaluation of random images; if memory runs out, of half as many from then on."""
    members = network.members[: compute.folds_at_once]
    while True:
        try:
            images = _images(len(members) * compute.evaluation_batch, image_size, compute.device)
            with compute.autocast():
                logits: Tensor = network(images, members)
            return logits.clone()
        except RuntimeError as error:
            if not out_of_memory(error) or compute.evaluation_batch == 1 or network.is_compiled:
                raise
            free_cached_memory(compute.device)
            compute.evaluation_batch //= 2


def _images(n: int, size: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(n, 3, size, size, generator=generator, device=device)
    return images.contiguous(memory_format=torch.channels_last)


def try_graph(
    step: Callable[[], None], state: Sequence[Tensor], outcome: Sequence[Tensor], *, precision: str
) -> torch.cuda.CUDAGraph | None:
    """Capture a training step as one CUDA graph, which a GPU runs without the host; None if that does not work here.

    Args:
        step: works on tensors that stay where they are, and changes nothing but `state` and `outcome`.
        state: what a step changes; as before in the end.
        outcome: what must come out alike.
        precision: of the network.
    """
    before = [tensor.clone() for tensor in state]
    graph = torch.cuda.CUDAGraph()

    def restore() -> None:
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    def plain() -> list[Tensor]:
        step()
        found = [tensor.clone() for tensor in outcome]
        restore()
        return found

    def captured() -> list[Tensor]:
        # What libraries set up in their first calls must not be captured (docs: torch.cuda.graphs).
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        restore()
        with torch.cuda.graph(graph):
            step()
        restore()  # capturing computes nothing, but whoever has only tried may have
        graph.replay()
        found = [tensor.clone() for tensor in outcome]
        restore()
        return found

    try:
        same = agrees("A training step as a CUDA graph", captured, plain, tolerance=TOLERANCE[precision])
    finally:
        restore()
    return graph if same else None
