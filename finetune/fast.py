"""Which fast ways to train does this machine take, and does each compute what plain PyTorch computes?

None is the only way. Each is tried on its first use: it has to run, and to agree with the plain one in the shapes of
the training. Otherwise one sentence says so, and training goes on without it. `fast=False` tries none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from features.device import agrees, out_of_memory
from finetune import kernels
from finetune.compute import Compute, save_memory
from finetune.dropout import seed_of
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
    if kernels.verify(compute.device, dtype):
        for _, layer in adapters(network.model):
            layer.triton = True
        network.forget_replicas()
        compute.fast_paths.add("kernels")


def try_compiled_blocks(network: Network, compute: Compute, *, batch_size: int, image_size: int) -> None:
    """Have torch.compile translate the blocks of a transformer, for training and for evaluation.

    Args:
        network: whose values are as they were in the end.
        compute: with the folds of a pass; lowered where memory runs out, as in training.
        batch_size: images per fold in a step of this process.
        image_size: edge of the network's input.
    """
    before = network.values.clone()
    try:
        # B begins at zero, where half of the gradients are zero however they are computed.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(network.n_trained, generator=generator).to(before)
        network.values[:, : network.n_trained] += 0.02 * noise

        def plain() -> list[Tensor]:
            return _outcome(network, compute, batch_size, image_size)

        def compiled() -> list[Tensor]:
            return _outcome(network, compute, batch_size, image_size) if network.compile_blocks() else plain()

        while True:
            try:
                tolerance = TOLERANCE[compute.precision]
                if not agrees("The compiled form of the backbone's blocks", compiled, plain, tolerance=tolerance):
                    network.forget_compiled()
                elif network.is_compiled:
                    compute.fast_paths.add("compiled blocks")
                return
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                save_memory(network, compute, batch_size, error)
    finally:
        network.values.copy_(before)
        network.clear_gradients()


def _outcome(network: Network, compute: Compute, batch_size: int, image_size: int) -> list[Tensor]:
    """Compute logits and gradients of a step on random images, and logits of an evaluation."""
    folds = network.folds[: compute.folds_at_once]
    seed = seed_of(network.seed, 0)
    step = torch.tensor(dropout_keys(network.seed, folds, 0), device=compute.device)
    with compute.autocast():
        network.clear_gradients()
        logits = network(_images(len(folds) * batch_size, image_size, seed, compute.device), folds, step=step)
        (logits * torch.linspace(-1, 1, batch_size, device=compute.device)[:, None]).sum().backward()
        network.gather_gradients()
        results = [logits.detach().clone(), network.gradients.clone()]
        network.clear_gradients()
        with torch.inference_mode():
            images = _images(len(folds) * compute.evaluation_batch, image_size, seed + 1, compute.device)
            results.append(network(images, folds).clone())
    return results


def _images(n: int, size: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
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
