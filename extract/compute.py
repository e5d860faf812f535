"""How does a network run on this machine: device, memory layout, precision, batch size?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from extract.backbones import Backbone, forward_poolings
from features.console import UserError
from features.device import has_bf16, out_of_memory

MIN_COSINE = 0.9999  # bf16 embeddings may stand for fp32 ones from this cosine on
MAX_BATCH = 1024
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def optimize_for_inference(model: nn.Module, device: torch.device, *, example: Tensor) -> nn.Module:
    """Move a frozen network to its device, in the memory layout and form that run fastest there.

    On CPUs a convolution is about twice as fast with channels last. Batch norms are folded into the convolutions
    before them, which computes the same function in fewer passes over memory.

    Args:
        model: in eval mode.
        device: where it will run.
        example: (b, 3, h, w) input on that device, on which the folded network must reproduce the original.
    """
    model = model.to(device)
    if device.type != "cpu":
        return model
    model = model.to(memory_format=torch.channels_last)
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    folded = copy.deepcopy(model)
    _fold_batch_norms(folded)
    folded = folded.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        before, after = model(example), folded(example)
    # Which norm follows which convolution was guessed from the order of registration; this checks the guess.
    return folded if torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max())) else model


def _fold_batch_norms(module: nn.Module) -> None:
    convolution: tuple[str, nn.Conv2d] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            convolution = name, child
        elif isinstance(child, nn.BatchNorm2d) and convolution is not None:
            setattr(module, convolution[0], fuse_conv_bn_eval(convolution[1], child))
            # timm's norms carry their activation.
            setattr(
                module, name, nn.Sequential(getattr(child, "drop", nn.Identity()), getattr(child, "act", nn.Identity()))
            )
            convolution = None
        elif not isinstance(child, nn.Identity):
            convolution = None
            _fold_batch_norms(child)


def choose_precision(asked: str, backbone: Backbone, model: nn.Module, images: Tensor) -> str:
    """Choose the precision to compute in.

    On a GPU `auto` is the precision that the model's card asks for. Where the card names none, and on every CPU, it is
    bf16 if the processor has bf16 and if on these images the cosine of every pooling to that in fp32 is at least
    `MIN_COSINE`; else fp32.

    Args:
        asked: "auto", "fp32", "bf16" or "fp16".
        backbone: record with the card's `amp`.
        model: the network, on its device.
        images: (b, 3, h, w) float32, normalised, on the same device.

    Raises:
        UserError: if the precision is unknown or the device cannot compute it.
    """
    device = images.device
    if asked not in ("auto", "fp32", "bf16", "fp16"):
        raise UserError(f"unknown precision {asked!r}: use auto, fp32, bf16 or fp16.")
    if asked == "fp16" and device.type == "cpu":
        raise UserError("fp16 is for GPUs: on a CPU use `precision='bf16'`, `precision='fp32'` or `precision='auto'`.")
    if asked != "auto":
        return asked
    if device.type == "cuda" and backbone.amp:
        return backbone.amp
    if not has_bf16(device):
        return "fp32"
    exact = embed_batch(model, backbone, images, precision="fp32")
    rounded = embed_batch(model, backbone, images, precision="bf16")
    cosine = min(float(F.cosine_similarity(exact[name], rounded[name]).min()) for name in exact)
    return "bf16" if cosine >= MIN_COSINE else "fp32"


def embed_batch(model: nn.Module, backbone: Backbone, images: Tensor, *, precision: str) -> dict[str, Tensor]:
    """Run one forward pass: (b, 3, h, w) float32 normalised images to every pooling, each (b, d) float32."""
    dtype = _AUTOCAST.get(precision)
    with torch.inference_mode(), torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return {name: values.float() for name, values in forward_poolings(model, backbone, images).items()}


@contextmanager
def side_by_side(device: torch.device, n: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Give a `map` that computes n calls at once, which share torch's threads; on a GPU one call after the other."""
    n_threads = torch.get_num_threads()
    if device.type != "cpu" or n == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(n, "forward", initializer=torch.set_num_threads, initargs=(n_threads // n,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(n_threads)  # a setting of each thread, but new threads begin with the last one set


def largest_batch(forward: Callable[[int], None], *, at_most: int = MAX_BATCH) -> int:
    """Find the largest power of two whose forward pass fits in memory, with room to spare.

    The batch is doubled until memory runs out; the result is half of the last that fitted, because fragmentation and
    other models need room, or `at_most` if that still fits.

    Raises:
        UserError: if not even one image fits.
    """
    fits, n = 0, 1
    while n <= at_most:
        try:
            forward(n)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            break
        fits, n = n, n * 2
    else:
        return fits
    if not fits:
        raise UserError("not even one image fits in the device's memory: use a smaller model, or `device='cpu'`.")
    return max(1, fits // 2)


def compile_blocks(model: nn.Module) -> list[nn.Module]:
    """Have torch.compile translate a transformer's blocks; returns them, none where the network has no equal blocks."""
    blocks = list(getattr(model, "blocks", []))
    if len({type(block) for block in blocks}) != 1:
        return []
    for block in blocks:
        block.compile(dynamic=False)
    return blocks
