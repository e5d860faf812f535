"""How does a network run on this machine: memory layout, precision, compiled or not, batch size?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from extract.backbones import Backbone
from extract.openvino import OpenvinoNetwork, is_convolutional, version
from extract.pooling import forward_poolings
from features.console import UserError
from features.device import agrees, copy_stream, free_cached_memory, has_bf16, out_of_memory

MIN_COSINE = 0.9999  # bf16 embeddings may stand for fp32 ones from this cosine on
# More is no faster, the end of a dataset is padded to it, and at 1,024 some tensors have more than 2^31 elements.
MAX_BATCH = 256
# FLOPs from which compiling pays: it takes half a minute to two, and saves a fifth of the time of an extraction and a
# third of that of a training, at some 4e14 and 2e14 FLOP/s on an H100. Predicted (docs/performance.md), not measured.
_WORTH_COMPILING = 5e16
# Pixels, of all images together, from which OpenVINO pays: converting takes as long as torch takes for 128 images of
# 128 pixels along the edge.
_WORTH_CONVERTING = 2**21
_MOST_KINDS = 4  # of blocks in a network that is compiled: each takes some seconds to a minute
_MOST_GRAPHS = 64  # compiled at once; torch's own 8 are gone after a few networks and views
# Compiled blocks round less often, and add in another order. What that may change, as a fraction of the largest value:
# eight roundings of a half-precision number, which has 8 or 11 bits; of float32 a thousand.
_TOLERANCE = {"fp32": 2**-14, "fp16": 2**-8, "bf16": 2**-5}
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
    return reformed(model, fold_batch_norms, example=example)


def reformed(model: nn.Module, change: Callable[[nn.Module], None], *, example: Tensor) -> nn.Module:
    """Make a network of another form that computes the same; the network given stays as it is.

    Args:
        model: frozen, in eval mode.
        change: what to do, in place, to a copy of its modules, which shares all tensors.
        example: (b, 3, h, w) input. If the copy does not reproduce the original on it, the result is the original.
    """
    copied = _copy_of_modules(model)
    change(copied)
    with torch.inference_mode():
        before, after = model(example), copied(example)
    scale = float(before.abs().max())
    same = math.isfinite(scale) and torch.allclose(before, after, rtol=1e-3, atol=1e-4 * scale)
    return copied if same else model  # of what is not finite, the patch is named later


Fuse = Callable[[nn.Module, nn.BatchNorm2d], nn.Module | None]


def fuse_convolution(layer: nn.Module, norm: nn.BatchNorm2d) -> nn.Module | None:
    """Make one convolution of a convolution and the norm that follows it; None where the layer is no convolution."""
    if not isinstance(layer, nn.Conv2d):
        return None
    return fuse_conv_bn_eval(layer, norm).to(memory_format=torch.channels_last)


def fold_batch_norms(module: nn.Module, fuse: Fuse = fuse_convolution) -> None:
    """Fold the batch norms of a frozen network, in place, into the layers before them, whose tensors become new ones.

    Which norm follows which layer is guessed from the order of registration: check the guess by `reformed`.

    Args:
        module: in eval mode.
        fuse: makes one layer of a layer and the norm that follows it; None where it cannot.
    """
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Identity):
            continue
        fused = fuse(before[1], child) if before is not None and isinstance(child, nn.BatchNorm2d) else None
        if before is not None and fused is not None:
            setattr(module, before[0], fused)
            # timm's norms carry their activation.
            setattr(
                module, name, nn.Sequential(getattr(child, "drop", nn.Identity()), getattr(child, "act", nn.Identity()))
            )
        else:
            fold_batch_norms(child, fuse)
        before = name, child


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
    if asked in ("fp16", "bf16") and device.type == "mps":
        raise UserError(
            f"{asked} on Apple's GPUs depends on the version of macOS: use `precision='fp32'` or `precision='auto'`."
        )
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


def settled(model: nn.Module, backbone: Backbone, images: Tensor, *, precision: str) -> nn.Module:
    """Give the fastest form of a network that embeds in a precision with the same bits: by `hold_weights`, if it can.

    It cannot for networks that compute something else in the type of their weights, as some of timm's do positions.

    Args:
        model: in float32, on its device.
        backbone: its record.
        images: (b, 3, h, w) normalised; the first one is tried.
        precision: to compute in.
    """
    held = hold_weights(model, precision)
    if held is model:
        return model
    expected, found = (embed_batch(one, backbone, images[:1], precision=precision) for one in (model, held))
    return held if all(torch.equal(found[name], expected[name]) for name in expected) else model


def hold_weights(model: nn.Module, precision: str) -> nn.Module:
    """Make a network that holds its weights as they are multiplied: those of linear layers and convolutions rounded.

    Autocast would round the same weights in every forward pass, to the same bits. The network given stays as it is and
    shares all other tensors with the one returned; in fp32 the two are one.
    """
    dtype = _AUTOCAST.get(precision)
    if dtype is None:
        return model
    held = _copy_of_modules(model)
    for module in held.modules():
        # Of these very types: their subclasses may compute with their weights first.
        if isinstance(module, nn.Linear | nn.Conv2d) and type(module) in (nn.Linear, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
    return held


def _copy_of_modules(model: nn.Module) -> nn.Module:
    """Copy a network's modules; parameters and buffers are shared."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def worth_compiling(backbone: Backbone, n_passes: int) -> bool:
    """Whether so many passes of an image through a network are more work than compiling it; False where not known."""
    return backbone.gflops is not None and n_passes * backbone.gflops * 1e9 >= _WORTH_COMPILING


def compile_blocks(model: nn.Module) -> bool:
    """Compile the repeated blocks of a network, in place and for inputs of one shape, when they are first called.

    A block is compiled once for all that are alike. Networks whose blocks differ (most convolutional ones) stay as
    they are, because compiling each would take longer than most extractions.

    Returns:
        Whether there is anything to compile.
    """
    blocks = _blocks(model)
    kinds = {(type(block), tuple(tensor.shape for tensor in block.parameters())) for block in blocks}
    if not 0 < len(kinds) <= min(_MOST_KINDS, len(blocks) - 1):
        return False
    import torch._dynamo as dynamo  # these take a second
    import torch._inductor.config as inductor

    dynamo.config.cache_size_limit = max(dynamo.config.cache_size_limit, _MOST_GRAPHS)
    # What the compiler chooses by timing, it chooses by chance; older versions cannot leave all of that out.
    options = {"deterministic": True} if hasattr(inductor, "deterministic") else {"shape_padding": False}
    for block in blocks:
        block.compile(dynamic=False, fullgraph=True, options=options)
    return True


def _blocks(module: nn.Module) -> list[nn.Module]:
    """List the modules that stand in a row and are made of others: the innermost such rows."""
    inner = [block for child in module.children() for block in _blocks(child)]
    if inner or not isinstance(module, nn.Sequential | nn.ModuleList):
        return inner
    return [child for child in module if any(True for _ in child.children())]


def takes_openvino(model: nn.Module, device: torch.device, *, precision: str) -> bool:
    """Whether OpenVINO computes a network faster than torch: convolutions on a processor in float32."""
    return device.type == "cpu" and precision == "fp32" and is_convolutional(model)


def compiled(
    model: nn.Module, backbone: Backbone, images: Tensor, *, precision: str, earlier: nn.Module | None = None
) -> nn.Module | None:
    """Make a compiled form of a network, if it has one that embeds these images alike; say so if not.

    OpenVINO computes it where `takes_openvino`; of others the blocks are compiled.

    Args:
        model: as `hold_weights` gives it; the two share all tensors.
        backbone: its record.
        images: (b, 3, h, w) normalised, of the shape of every batch to come.
        precision: to compute in.
        earlier: what this function gave for the same network and images of another size.
    """
    fast: nn.Module
    if takes_openvino(model, images.device, precision=precision):
        fast = earlier or OpenvinoNetwork(model, backbone)
    else:
        fast = _copy_of_modules(model)
        if not compile_blocks(fast):
            return None

    def outputs(network: nn.Module) -> list[Tensor]:
        return list(embed_batch(network, backbone, images, precision=precision).values())

    name = f"The compiled form of {backbone.name}"
    same = agrees(name, lambda: outputs(fast), lambda: outputs(model), tolerance=_TOLERANCE[precision])
    return fast if same else None


def worth_converting(n_images: int, *, size: int) -> bool:
    """Whether OpenVINO is installed, and so many images of some pixels along the edge worth the time to convert."""
    return version() is not None and n_images * size**2 >= _WORTH_CONVERTING


def fastest(
    model: nn.Module, backbone: Backbone, device: torch.device, *, size: int, n_images: int, precision: str
) -> nn.Module:
    """Give the fastest form of a frozen network on a device that embeds as it does, up to rounding.

    Args:
        model: from `build_model`.
        backbone: its record.
        device: where it will run.
        size: pixels along the edge of the network's input.
        n_images: how many it is for, about.
        precision: to compute in.
    """
    example = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    model = optimize_for_inference(model, device, example=example)
    if not takes_openvino(model, device, precision=precision) or not worth_converting(n_images, size=size):
        return model
    return compiled(model, backbone, example, precision=precision) or model


def embed_batch(model: nn.Module, backbone: Backbone, images: Tensor, *, precision: str) -> dict[str, Tensor]:
    """Run one forward pass: (b, 3, h, w) float32 normalised images to every pooling, each (b, d) float32."""
    dtype = _AUTOCAST.get(precision)
    with torch.inference_mode(), torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        if isinstance(model, OpenvinoNetwork):
            return model(images)  # type: ignore[no-any-return]
        return {name: values.float() for name, values in forward_poolings(model, backbone, images).items()}


def embed_shown(model: nn.Module, backbone: Backbone, shown: Iterable[Tensor], *, precision: str) -> dict[str, Tensor]:
    """Average every pooling over batches (b, 3, h, w) of the same images, in several orientations or in one."""
    outputs = [embed_batch(model, backbone, images, precision=precision) for images in shown]
    if len(outputs) == 1:
        return outputs[0]
    return {name: torch.stack([output[name] for output in outputs]).mean(dim=0) for name in outputs[0]}


def require_as_on_cpu(model: nn.Module, backbone: Backbone, images: Tensor) -> None:
    """Check that a device embeds images (b, 3, h, w) as the processor does; torch is new to Apple's GPUs.

    Raises:
        UserError: if it does not.
    """
    found = embed_batch(model, backbone, images, precision="fp32")
    expected = embed_batch(copy.deepcopy(model).cpu(), backbone, images.cpu(), precision="fp32")
    cosines = [float(F.cosine_similarity(found[name].cpu(), expected[name]).min()) for name in expected]
    if not all(cosine >= MIN_COSINE for cosine in cosines):  # NaN included
        raise UserError(
            f"{backbone.name}: this machine's GPU embeds otherwise than its processor (cosines down to "
            f"{min(cosines):.4f}, expected {MIN_COSINE} and more). Use `device='cpu'`, or another version of torch."
        )


def padded(images: Tensor, n: int) -> Tensor:
    """Repeat the last of some images (b, 3, h, w) so that there are n: a GPU then computes every batch alike.

    On a CPU nothing is added: a smaller batch is less work there.
    """
    missing = n - len(images)
    if images.device.type == "cpu" or missing <= 0:
        return images
    return torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Mark the point that the work given to a GPU has come to, for `fetch`; None where work is done at once."""
    if device.type != "cuda":
        return None
    event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # whoever waits sleeps
    event.record(torch.cuda.current_stream(device))
    return event


def fetch(tensors: Mapping[str, Tensor], done: torch.cuda.Event | None) -> dict[str, NDArray[np.float32]]:
    """Wait until tensors are computed, and copy them from their device.

    On a GPU's stream of work the copy would come after all that has been given to it since, so it has its own stream.
    """
    if done is None:
        return {name: values.cpu().numpy() for name, values in tensors.items()}
    done.synchronize()
    device = next(iter(tensors.values())).device
    with torch.cuda.stream(copy_stream(device)):
        return {name: values.cpu().numpy() for name, values in tensors.items()}


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


def largest_batch(forward: Callable[[int], None], *, device: torch.device, at_most: int = MAX_BATCH) -> int:
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
            free_cached_memory(device)
            break
        fits, n = n, n * 2
    else:
        return fits
    if not fits:
        raise UserError("not even one image fits in the device's memory: use a smaller model, or `device='cpu'`.")
    return max(1, fits // 2)
