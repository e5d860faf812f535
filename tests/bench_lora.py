"""What do all folds at once cost, beside `peft` fold after fold? Ratios measured in one run; `make bench` prints them.

ViT-S/16 with random weights, rank 8, dropout 0.3, five folds. A round is one training step of every fold: ours with all
folds in one batch, ours with one fold at a time, and five `peft` models in turn, on the same images. Rounds are
interleaved and medians taken.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import peft
import timm
import torch
from rich.table import Table
from torch import Tensor, nn

from features.console import show
from finetune.lora import TARGETS, LoraOptions, add_adapters, lower_frozen, select_folds, trainable

N_FOLDS = 5


def new_backbone(depth: int) -> nn.Module:
    """A ViT-S/16 with random weights."""
    model: nn.Module = timm.create_model("vit_small_patch16_224", num_classes=0, depth=depth)
    return model


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
    options = LoraOptions(rank=8, alpha=16, dropout=0.3, targets=TARGETS)

    ours = new_backbone(arguments.depth)
    add_adapters(ours, options, n_folds=N_FOLDS, seed=0)
    if precision == "bf16":
        lower_frozen(ours, torch.bfloat16)  # as training does
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.3, target_modules=TARGETS)
    theirs = [peft.get_peft_model(new_backbone(arguments.depth), config) for _ in range(N_FOLDS)]

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def train(model: nn.Module, images: Tensor, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = None
        with autocast():
            loss = model(images).float().square().mean()
        loss.backward()

    def at_once() -> None:
        select_folds(ours, range(N_FOLDS), step=0)
        train(ours, batch, list(trainable(ours)))

    def in_turn() -> None:
        for fold, images in enumerate(batch.split(n)):
            select_folds(ours, [fold], step=0)
            train(ours, images, list(trainable(ours)))

    def with_peft() -> None:
        for model, images in zip(theirs, batch.split(n), strict=True):
            train(model, images, [p for p in model.parameters() if p.requires_grad])

    ways = {"at once": at_once, "in turn": in_turn, "peft": with_peft}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):
        for name, step in ways.items():
            started = time.perf_counter()
            step()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    select_folds(ours, range(N_FOLDS), step=0)
    kept_ours = kept_bytes(lambda: train(ours, batch, []), list(ours.parameters())) / len(batch)
    first = theirs[0]
    kept_theirs = kept_bytes(lambda: train(first, batch[:n], []), list(first.parameters())) / n

    def ratio(name: str) -> str:
        return f"{statistics.median(b / a for a, b in zip(seconds[name], seconds['peft'], strict=True)):.2f}"

    rates = [f"{len(batch) / statistics.median(seconds[name]):.1f}" for name in ways]
    megabytes = [f"{kept / 1e6:.0f}" for kept in (kept_ours, kept_theirs)]
    table.add_row(precision, *rates, ratio("at once"), ratio("in turn"), *megabytes, f"{kept_ours / kept_theirs:.2f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=12, help="blocks")
    parser.add_argument("--batch-size", type=int, default=8, help="images per fold")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    table = Table(
        title=f"LoRA training steps on CPU: ViT-S/16 of {arguments.depth} blocks, {torch.get_num_threads()} threads, "
        f"{N_FOLDS} folds x {arguments.batch_size} images"
    )
    columns = (
        "Precision",
        "At once /s",
        "In turn /s",
        "peft /s",
        "at once to peft\n(target 1.5 bf16, 1.3 fp32)",
        "in turn to peft",
        "Kept MB/image",
        "peft's",
        "ratio\n(target 0.5)",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for precision in ("bf16", "fp32"):
        measure(arguments, precision, table)
    show(table)


if __name__ == "__main__":
    main()
