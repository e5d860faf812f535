"""What do all folds at once cost, beside `peft` fold after fold? Ratios measured in one run; `make bench` prints them.

ViT-S/16 with random weights, rank 8, dropout 0.3, five folds. A round is one training step of every fold: ours with all
folds in one forward pass, ours fold by fold and side by side (as `fm-finetune` does on a CPU), and five `peft` models
in turn, on the same images. Rounds are interleaved and medians taken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest.mock import patch

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the commands do, before torch is loaded

import peft
import torch
from rich.table import Table
from torch import Tensor, nn

from extract.backbones import Backbone, build_model, fetch_weights, find_backbone
from features.console import say, show
from features.folds import fold_models
from finetune import kernels
from finetune.compute import Compute
from finetune.lora import TARGETS, LoraOptions, adapters, dropout_keys
from finetune.network import Network

N_FOLDS = 5


def vit(depth: int) -> Backbone:
    """A record of ViT-S/16, perhaps with fewer blocks."""
    record = find_backbone("kaiko-s16")
    return replace(record, kwargs={**record.kwargs, "depth": depth})


def kept_bytes(step: Callable[[], None], parameters: list[Tensor]) -> int:
    """Bytes of all tensors that one step keeps for its backward pass, each storage once, parameters aside."""
    sizes: dict[int, int] = {}
    alive = []  # an address may be used again once its tensor is gone

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    for parameter in parameters:
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def measure(arguments: argparse.Namespace, precision: str, table: Table) -> None:
    """One row."""
    n = arguments.batch_size
    batch = torch.randn(N_FOLDS * n, 3, 224, 224)
    backbone = vit(arguments.depth)
    network = Network(
        build_model(backbone, None), backbone, method="lora", lora=LoraOptions(), fold_models=fold_models([0], N_FOLDS)
    )
    network.compute_in(precision)
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.3, target_modules=TARGETS)
    theirs = [peft.get_peft_model(build_model(backbone, None), config) for _ in range(N_FOLDS)]

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def train_group(network: Network, folds: Sequence[int]) -> None:
        images = torch.cat([batch[fold * n : (fold + 1) * n] for fold in folds])
        with autocast():
            logits = network(images, folds, step=0)
        logits.square().mean().backward()

    def ours(folds_at_once: int) -> None:
        network.clear_gradients()
        Compute(torch.device("cpu"), precision, folds_at_once).map_passes(network, range(N_FOLDS), train_group)
        network.gather_gradients()

    def train_peft(model: nn.Module, images: Tensor) -> None:
        model.zero_grad()
        with autocast():
            loss = model(images).float().square().mean()
        loss.backward()

    def with_peft() -> None:
        for model, images in zip(theirs, batch.split(n), strict=True):
            train_peft(model, images)

    ways = {"at once": lambda: ours(N_FOLDS), "side by side": lambda: ours(1), "peft": with_peft}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):
        for name, step in ways.items():
            started = time.perf_counter()
            step()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    own = [network.values, *network.parameters(), *([] if network.copies is None else [network.copies])]
    kept_ours = kept_bytes(lambda: train_group(network, range(N_FOLDS)), own) / len(batch)
    first = theirs[0]
    kept_theirs = kept_bytes(lambda: train_peft(first, batch[:n]), list(first.parameters())) / n

    def ratio(name: str) -> str:
        return f"{statistics.median(b / a for a, b in zip(seconds[name], seconds['peft'], strict=True)):.2f}"

    rates = [f"{len(batch) / statistics.median(seconds[name]):.1f}" for name in ways]
    megabytes = [f"{kept / 1e6:.0f}" for kept in (kept_ours, kept_theirs)]
    table.add_row(
        precision, *rates, ratio("at once"), ratio("side by side"), *megabytes, f"{kept_ours / kept_theirs:.2f}"
    )


def host_time(repeats: int) -> str:
    """Say how long the host needs per adapted layer and step, beside five `peft` models in turn.

    Twelve blocks so small that hardly anything else takes time. For want of a GPU the launches of kernels are left out.
    """
    small = replace(vit(12), kwargs={**vit(12).kwargs, "img_size": 32, "embed_dim": 16, "num_heads": 2})
    batch = torch.randn(N_FOLDS, 3, 32, 32)
    step = torch.tensor(dropout_keys(fold_models([0], N_FOLDS), 0))
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.3, target_modules=TARGETS)
    theirs = [peft.get_peft_model(build_model(small, None), config) for _ in range(N_FOLDS)]

    def ours(*, triton: bool) -> Callable[[], None]:
        network = Network(
            build_model(small, None), small, method="lora", lora=LoraOptions(), fold_models=fold_models([0], N_FOLDS)
        )
        for _, layer in adapters(network.model):
            layer.triton = triton

        def train() -> None:
            network.clear_gradients()
            network(batch, range(N_FOLDS), step=step).sum().backward()
            network.gather_gradients()

        return train

    def with_peft() -> None:
        for model, images in zip(theirs, batch.split(1), strict=True):
            model.zero_grad()
            model(images).sum().backward()

    ways = {"with kernels": ours(triton=True), "plain": ours(triton=False), "peft, five in turn": with_peft}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch.object(kernels, "run", lambda *_, **__: None):
        for repeat in range(10 * repeats + 2):
            for name, train in ways.items():
                started = time.perf_counter()
                train()
                if repeat > 1:
                    seconds[name].append(time.perf_counter() - started)
    torch.set_num_threads(n_threads)
    medians = {name: 1e6 * statistics.median(own) / (4 * 12) for name, own in seconds.items()}
    return "Host time per adapted layer and step: " + ", ".join(f"{name} {us:,.0f} us" for name, us in medians.items())


def folded_norms(repeats: int) -> str:
    """Say what it gives to compute a frozen EfficientNet-Lite0 in fewer passes (`finetune.frozen`), what it changes.

    One fold of 16 images of 128 px on one thread, as `fm-finetune` trains it, with adapters that add something.
    """
    backbone = find_backbone("efficientnet-lite0")
    weights = fetch_weights(backbone)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def build(dtype: torch.dtype, *, fold_norms: bool) -> Callable[[], Tensor]:
        model = build_model(backbone, weights).to(dtype).to(memory_format=torch.channels_last)
        network = Network(model, backbone, method="lora", lora=LoraOptions(), fold_models=fold_models([0], N_FOLDS))
        network.values += 0.02 * torch.randn(network.values.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        network.compute_in("fp32", fold_norms=fold_norms)
        batch = torch.randn(16, 3, 128, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
        batch = batch.contiguous(memory_format=torch.channels_last)
        signs = torch.linspace(-1, 1, 32, dtype=dtype).view(1, 16, 2)

        def step() -> Tensor:
            network.clear_gradients()
            (network(batch, [0], step=0) * signs).sum().backward()
            network.gather_gradients()
            return network.gradients

        return step

    said = []
    for dtype in (torch.float64, torch.float32):
        before, after = (build(dtype, fold_norms=fold_norms) for fold_norms in (False, True))
        expected = before()
        difference = float((after() - expected).norm() / expected.norm())
        said.append(f"gradients differ by {difference:.1e} of their length in {dtype}".replace("torch.", ""))
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    seconds: dict[tuple[str, int], list[float]] = {(clock, way): [] for clock in clocks for way in (0, 1)}
    for _ in range(4 * repeats):
        for way, step in enumerate((before, after)):
            started = {name: clock() for name, clock in clocks.items()}
            step()
            for name, clock in clocks.items():
                seconds[name, way].append(clock() - started[name])
    torch.set_num_threads(n_threads)
    for name in clocks:
        ratio = statistics.median(a / b for a, b in zip(seconds[name, 0], seconds[name, 1], strict=True))
        rate = 16 / statistics.median(seconds[name, 1])
        said.append(f"{ratio:.2f} times as many images per second of {name} time ({rate:.0f})")
    return "EfficientNet-Lite0 in fewer passes: " + ", ".join(said)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=12, help="blocks")
    parser.add_argument("--batch-size", type=int, default=8, help="images per fold")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only-folded", action="store_true", help="only EfficientNet-Lite0 with and without norms")
    arguments = parser.parse_args()
    say(folded_norms(arguments.repeats))
    if arguments.only_folded:
        return
    table = Table(
        title=f"LoRA training steps on CPU: ViT-S/16 of {arguments.depth} blocks, {torch.get_num_threads()} threads, "
        f"{N_FOLDS} folds x {arguments.batch_size} images"
    )
    columns = (
        "Precision",
        "At once /s",
        "Side by side /s",
        "peft /s",
        "at once to peft\n(target 1.5 bf16, 1.3 fp32)",
        "side by side to peft",
        "Kept MB/image",
        "peft's",
        "ratio\n(target 0.5)",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for precision in ("bf16", "fp32"):
        measure(arguments, precision, table)
    show(table)
    say(host_time(arguments.repeats))


if __name__ == "__main__":
    main()
