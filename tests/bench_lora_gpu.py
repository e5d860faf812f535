"""What do all folds at once buy on a GPU? Five folds, eight images each, beside `peft` fold after fold; `make bench`.

Networks of the true shapes with random weights: ViT-S/16, ViT-H/14 (Virchow2) and ViT-g/14 (H-optimus-1), rank 8,
dropout 0.3. The ways: (a) peft, fp32, as the authors of the benchmark run it; (b) peft, bf16 autocast; (c) the same,
compiled; (d) ours, bf16, all folds at once and fold after fold, eager and compiled. A step is the forward and backward
pass of every fold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import peft
import torch
from rich.table import Table
from torch import Tensor, nn

from extract.backbones import build_model, find_backbone
from features.console import say, show
from finetune.lora import LoraOptions, default_targets
from finetune.network import Network

N_FOLDS = 5
TRAINING_PATCHES = 2315  # of one fold of AMi-Br
DEVICE = torch.device("cuda")


def matmul_peak() -> float:
    """FLOP/s of a large bf16 product, the best of ten."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / min(timed(lambda: a @ b) for _ in range(10))


def timed(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def peft_step(name: str, batch: int, *, precision: str, compiled: bool) -> Callable[[], None]:
    """One fold's step of a peft model; the folds in turn take the same time each."""
    model = build_model(find_backbone(name), None).to(DEVICE)
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.3, target_modules=default_targets(model))
    adapted: nn.Module = peft.get_peft_model(model, config).train()
    if compiled:
        adapted = torch.compile(adapted)  # type: ignore[assignment]
    images = torch.randn(batch, 3, 224, 224, device=DEVICE)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            output: Tensor = adapted(images)
        output.float().square().mean().backward()
        adapted.zero_grad()

    return step


def our_step(name: str, batch: int, *, at_once: int, compiled: bool) -> Callable[[], None]:
    """One step of all folds, as many at a time as given."""
    backbone = find_backbone(name)
    model = build_model(backbone, None).to(DEVICE)
    network = Network(model, backbone, method="lora", lora=LoraOptions(), folds=range(N_FOLDS), seed=0)
    network.compute_in("bf16")
    if compiled:
        network.compile_backbone()
    images = torch.randn(at_once * batch, 3, 224, 224, device=DEVICE)

    def step() -> None:
        network.clear_gradients()
        for first in range(0, N_FOLDS, at_once):
            with torch.autocast("cuda", torch.bfloat16):
                logits = network(images, range(first, first + at_once), step=0)
            logits.square().mean().backward()
        network.gather_gradients()

    return step


def measure(name: str, batch: int, repeats: int, peak: float, table: Table) -> None:
    ways: dict[str, tuple[int, Callable[[], Callable[[], None]]]] = {
        "(a) peft, fp32": (1, lambda: peft_step(name, batch, precision="fp32", compiled=False)),
        "(b) peft, bf16": (1, lambda: peft_step(name, batch, precision="bf16", compiled=False)),
        "(c) peft, bf16, compiled": (1, lambda: peft_step(name, batch, precision="bf16", compiled=True)),
        "(d) ours, all folds at once": (5, lambda: our_step(name, batch, at_once=5, compiled=False)),
        "(d) ours, fold after fold": (5, lambda: our_step(name, batch, at_once=1, compiled=False)),
        "(d) ours, all at once, compiled": (5, lambda: our_step(name, batch, at_once=5, compiled=True)),
    }
    backbone = find_backbone(name)
    assert backbone.gflops is not None
    for way, (n_folds, make) in ways.items():
        step = make()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        seconds = statistics.median(timed(step) for _ in range(repeats))
        kept = (torch.cuda.max_memory_allocated() - before) / (n_folds * batch if "at once" in way else batch)
        rate = n_folds * batch / seconds
        # Forward, and the gradient of the input: the frozen weights have none.
        share = rate * 2 * backbone.gflops * 1e9 / peak
        table.add_row(
            name,
            way,
            f"{rate:,.0f}",
            f"{60 * rate / TRAINING_PATCHES:.1f}",
            f"{share:.0%}",
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f}",
            f"{kept / 2**20:.0f}",
        )
        say(f"{name} {way}: {rate:.0f} images/s")
        del step
        torch.compiler.reset()
        torch.cuda.empty_cache()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="kaiko-s16,virchow2,h-optimus-1")
    parser.add_argument("--batch-size", type=int, default=8, help="images per fold")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        say("LoRA on a GPU: not measured, there is none here.")
        sys.exit()
    peak = matmul_peak()
    table = Table(
        title=f"{torch.cuda.get_device_name()}: bf16 matmul {peak / 1e12:.0f} TFLOP/s, torch {torch.__version__}"
    )
    for column in ("Model", "Way", "images/s", "fold-epochs/min", "of matmul peak", "peak GiB", "kept MB/image"):
        table.add_column(column, justify="left" if column in ("Model", "Way") else "right")
    for name in arguments.models.split(","):
        measure(name, arguments.batch_size, arguments.repeats, peak, table)
    show(table)


if __name__ == "__main__":
    main()
