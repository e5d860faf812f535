"""What does mitofm reach on this GPU? One command, ten minutes, most valuable figures first.

    python tests/bench_gpu.py --out bench-gpu            # measures what --out does not hold yet
    python tests/bench_gpu.py --out bench-gpu --table    # prints it as Markdown, for docs/performance.md

Each row writes a JSON file when it ends, so a run that was cut off goes on where it stopped. No row begins whose
estimated time would pass --minutes. A row that raises writes its error, and the bench goes on; --retry measures such
rows again. Networks have their true shapes and random weights, and patches are drawn: nothing is downloaded.
`--device cpu --tiny` runs every row with tiny networks in seconds, to see that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from extract.backbones import Backbone, build_model, find_backbone
from extract.compute import compile_blocks, embed_batch, optimize_for_inference
from extract.datasets import load_dataset
from extract.embed import decoded, embed_rows
from extract.prepare import Extraction, ExtractOptions, prepare
from features.console import say
from features.folds import fold_models
from features.store import FeatureStore
from finetune.compute import Compute
from finetune.fast import try_compiled_blocks, try_kernels
from finetune.lora import LoraOptions, default_targets, dropout_keys
from finetune.measure import bandwidth, matmul_peak
from finetune.network import Network
from finetune.recipes import recipe_for
from finetune.self_check import drawn_training_set, run_training, self_check, small_vit

N_FOLDS, FOLD_BATCH = 5, 8
FORWARD_BATCHES = (64, 128, 256, 512, 1024)
LEAST_LIMIT = 60.0  # seconds after which a row is stopped, besides three times its estimate
Figures = dict[str, Any]
TWO_BLOCKS = replace(small_vit(tiny=True), gflops=0.0003)
ONE_BLOCK = replace(TWO_BLOCKS, kwargs={**TWO_BLOCKS.kwargs, "depth": 1})


@dataclass(frozen=True)
class Bench:
    """Where and how large.

    Attributes:
        device: where the rows run.
        small, huge, giant: ViT-S/16, ViT-H/14 (Virchow2) and ViT-g/14 (H-optimus-1), or tiny networks.
        repeats: timed repetitions, whose median counts.
        patches: drawn for `fm-extract`; a training set has an eighth of them.
        precision: "bf16", or "fp32" on a CPU, where emulated bf16 would take long.
        tiny: for the tests.
    """

    device: torch.device
    small: Backbone
    huge: Backbone
    giant: Backbone
    repeats: int
    patches: int
    precision: str
    tiny: bool

    def build(self, backbone: Backbone) -> nn.Module:
        """Build a network with random weights, drawn on its device."""
        with self.device:
            return build_model(backbone, None).to(self.device)

    def seconds(self, work: Callable[[], object], *, repeats: int | None = None) -> float:
        """Median time of `work`, after two calls that warm up."""
        for _ in range(1 if self.tiny else 2):
            work()
        return statistics.median(self._timed(work) for _ in range(repeats or self.repeats))

    def _timed(self, work: Callable[[], object]) -> float:
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes that tensors take; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def peak(self) -> int:
        """The most bytes that tensors have taken since `start_peak`."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def start_peak(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def make_bench(device: torch.device, *, tiny: bool) -> Bench:
    """Make the bench of a GPU, or a tiny one."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)  # limits of memory are of a GPU with a number
    if tiny:
        return Bench(device, ONE_BLOCK, ONE_BLOCK, TWO_BLOCKS, repeats=1, patches=40, precision="fp32", tiny=True)
    small, huge, giant = map(find_backbone, ("kaiko-s16", "virchow2", "h-optimus-1"))
    return Bench(device, small, huge, giant, repeats=10, patches=4096, precision="bf16", tiny=False)


# ------------------------------------------------------------------------------------------------------------ the rows


def machine(bench: Bench) -> Figures:
    """Name what was measured, and measure what every share is a share of."""
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "matmul_peak": matmul_peak(bench.device, tiny=bench.tiny),
        "bandwidth": bandwidth(bench.device, tiny=bench.tiny),
        "cores": os.cpu_count(),
    }


def checks(bench: Bench) -> Figures:
    """Run the self-check of fm-doctor."""
    return {"checks": [asdict(check) for check in self_check(bench.device, tiny=bench.tiny)]}


def forward(bench: Bench, *, compiled: bool) -> Figures:
    """Images per second of the giant's forward pass, by batch size."""
    backbone = bench.giant
    example = torch.randn(8, 3, backbone.input_size, backbone.input_size, device=bench.device)
    model = optimize_for_inference(bench.build(backbone), bench.device, example=example)
    if compiled:
        compile_blocks(model)
    rates: Figures = {}
    for batch in (1, 2) if bench.tiny else (256,) if compiled else FORWARD_BATCHES:
        images = torch.randn(batch, 3, backbone.input_size, backbone.input_size, device=bench.device)
        try:
            work = partial(embed_batch, model, backbone, images, precision=bench.precision)
            rates[str(batch)] = batch / bench.seconds(work, repeats=max(1, min(bench.repeats, 1024 // batch)))
        except torch.OutOfMemoryError as error:
            rates[str(batch)] = str(error).splitlines()[0]
    return {"images_per_second": rates, "gflops": backbone.gflops}


def end_to_end(bench: Bench) -> Figures:
    """What `fm-extract --weights` does, from PNG files to the store, and the forward pass alone on such batches."""
    backbone = bench.giant
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "random.safetensors"
        save_file({key: value.cpu() for key, value in bench.build(backbone).state_dict().items()}, weights)
        dataset = load_dataset(str(draw_patches(folder / "patches", bench.patches)))
        store = FeatureStore.open_or_create(folder / "embeddings.zarr")
        options = ExtractOptions(
            device=str(bench.device), precision=bench.precision, batch_size=8 if bench.tiny else None
        )
        prepared = prepare(Extraction(dataset, (backbone,), store, options, weights))
        (job,) = prepared.jobs
        started = time.perf_counter()
        n_new = sum(embed_rows(prepared).values())
        whole = n_new / (time.perf_counter() - started)
        batch = torch.randn(job.batch_size, 3, backbone.input_size, backbone.input_size, device=bench.device)
        alone = partial(embed_batch, job.model, backbone, batch, precision=job.precision)
        rate = job.batch_size / bench.seconds(alone, repeats=3)
        started = time.perf_counter()
        n_decoded = sum(len(rows) for rows, _ in decoded(dataset.decode, [range(bench.patches // 4)]))
        decoding = n_decoded / (time.perf_counter() - started)
    figures = {"end_to_end": whole, "forward": rate, "decoding": decoding, "batch_size": job.batch_size}
    return figures | {"precision": job.precision, "gflops": backbone.gflops}


def draw_patches(folder: Path, n: int) -> Path:
    """Write n PNG patches of 128 pixels in two classes: blots of colour with noise, as large as files of real ones."""
    for name in ("Atypical", "Normal"):
        (folder / name).mkdir(parents=True)

    def write(row: int) -> None:
        generator = np.random.default_rng(row)
        blots = Image.fromarray(generator.integers(80, 240, (12, 12, 3), dtype=np.uint8)).resize((128, 128))
        pixels = (np.asarray(blots) + generator.integers(-8, 8, (128, 128, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / ("Atypical" if row % 4 == 0 else "Normal") / f"{row:05}.png")

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(n)))
    return folder


def lora(
    bench: Bench, backbone: Backbone, *, at_once: int = N_FOLDS, fast: bool = True, compiled: bool = False
) -> Figures:
    """The forward and backward pass of five folds, eight images each, by our stacked adapters."""
    network, compute = adapted(bench, backbone, at_once=at_once, fast=fast, compiled=compiled)
    keys = [
        torch.tensor(dropout_keys(fold_models([0], N_FOLDS)[first : first + at_once], 0), device=bench.device)
        for first in range(0, N_FOLDS, at_once)
    ]
    images = torch.randn(at_once * FOLD_BATCH, 3, backbone.input_size, backbone.input_size, device=bench.device)

    def step() -> None:
        for first, own in zip(range(0, N_FOLDS, at_once), keys, strict=True):
            with autocast(bench):
                logits = network(images, range(first, first + at_once), step=own)
            logits.square().mean().backward()
        network.gather_gradients()
        network.clear_gradients()

    figures = timed_step(bench, backbone, step, n_images=N_FOLDS * FOLD_BATCH, n_in_memory=at_once * FOLD_BATCH)
    return figures | {"fast_paths": sorted(compute.fast_paths)}


def adapted(
    bench: Bench, backbone: Backbone, *, at_once: int, fast: bool = True, compiled: bool = False
) -> tuple[Network, Compute]:
    """Make a network with adapters as `fm-finetune` does, with what is fast on this GPU or without."""
    network = Network(
        bench.build(backbone), backbone, method="lora", lora=LoraOptions(), fold_models=fold_models([0], N_FOLDS)
    )
    network.compute_in(bench.precision)
    fast = fast and bench.device.type == "cuda"
    compute = Compute(bench.device, bench.precision, at_once, same_shapes=fast or compiled, fast=fast)
    if fast:
        try_kernels(network, compute)
    if compiled:
        try_compiled_blocks(network, compute, batch_size=FOLD_BATCH, image_size=backbone.input_size)
    return network, compute


def lora_by_peft(bench: Bench, backbone: Backbone, *, precision: str, compiled: bool = False) -> Figures:
    """The step of one fold by `peft`; five in turn take five times as long, so images/s are the same."""
    import peft

    model = bench.build(backbone)
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.3, target_modules=default_targets(model))
    theirs: nn.Module = peft.get_peft_model(model, config).train()
    if compiled:
        compile_blocks(model)
    images = torch.randn(FOLD_BATCH, 3, backbone.input_size, backbone.input_size, device=bench.device)

    def step() -> None:
        with autocast(bench, enabled=precision == "bf16"):
            output: Tensor = theirs(images)
        output.float().square().mean().backward()
        theirs.zero_grad()

    return timed_step(bench, backbone, step, n_images=FOLD_BATCH, n_in_memory=FOLD_BATCH)


def autocast(bench: Bench, *, enabled: bool = True) -> torch.autocast:
    """Compute in bf16 where the bench does."""
    return torch.autocast(bench.device.type, torch.bfloat16, enabled=enabled and bench.precision == "bf16")


def timed_step(
    bench: Bench, backbone: Backbone, step: Callable[[], None], *, n_images: int, n_in_memory: int
) -> Figures:
    """Images per second of a step, and the memory that it takes."""
    step()
    before = bench.allocated()
    bench.start_peak()
    seconds = bench.seconds(step)
    return {
        "images_per_second": n_images / seconds,
        "step_seconds": seconds,
        "kept_per_image": (bench.peak() - before) / n_in_memory,
        "peak_bytes": bench.peak(),
        "gflops": backbone.gflops,
    }


def training(bench: Bench, backbone: Backbone, *, n: int, at_once: int = N_FOLDS, compiled: bool = False) -> Figures:
    """Two epochs of `finetune.train.train` on drawn patches; the second is timed, validation included."""
    network, compute = adapted(bench, backbone, at_once=at_once, compiled=compiled)
    data = drawn_training_set(backbone, n, bench.device)
    recipe = recipe_for("default", method="lora", convolutional=False)
    recipe = replace(recipe, epochs=2, batch_size=FOLD_BATCH, learning_rate=1e-5)
    marks: list[tuple[float, int]] = []
    bench.start_peak()
    run_training(
        network, data, recipe, compute, after_epoch=lambda state: marks.append((state.seconds, state.n_images))
    )
    (first_seconds, first_images), (seconds, images) = marks
    rate = (images - first_images) / (seconds - first_seconds)
    figures = {"images_per_second": rate, "first_epoch_seconds": first_seconds, "peak_bytes": bench.peak()}
    figures |= {"folds_at_once": compute.folds_at_once, "fast_paths": sorted(compute.fast_paths)}
    return figures | {"gflops": backbone.gflops}


def real_training(bench: Bench, backbone: Backbone, *, compiled: bool = False) -> Figures:
    """Images per second of real training steps: sampler, augmentation, passes, optimiser, validation."""
    return training(bench, backbone, n=bench.patches // 8 // N_FOLDS * N_FOLDS, compiled=compiled)


def capped(bench: Bench) -> Figures:
    """Train where the memory suffices for three fifths of what five folds take: folds per pass are halved."""
    n = 100 if not bench.tiny else 40
    free = training(bench, bench.small, n=n)
    with memory_limit(bench, int(0.6 * free["peak_bytes"])):
        figures = training(bench, bench.small, n=n)
    if figures["folds_at_once"] >= N_FOLDS:
        raise RuntimeError(f"the limit of memory did not act: still {N_FOLDS} folds at once")
    return figures


@contextmanager
def memory_limit(bench: Bench, limit: int) -> Iterator[None]:
    """Limit the memory of a GPU to `limit` bytes; on a CPU, have passes of more than three folds fail instead."""
    if bench.device.type == "cuda":
        tidy(bench)
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(bench.device)[1], bench.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
        return
    passes = Network.forward

    def refuse(network: Network, images: Tensor, folds: Any, **options: Any) -> Tensor:
        if len(folds) > 3 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("more than three folds")
        return passes(network, images, folds, **options)

    with patch.object(Network, "forward", refuse):
        yield


@dataclass(frozen=True)
class Row:
    """One measurement: the name of its file, about how many seconds it takes on an H100, and what it does."""

    name: str
    seconds: float
    measure: Callable[[Bench], Figures]


def list_rows(bench: Bench) -> list[Row]:
    """List all rows, the most valuable first."""
    s, h, g = bench.small, bench.huge, bench.giant
    return [
        Row("machine", 10, machine),
        Row("checks", 60, checks),
        Row("lora-s-ours", 15, partial(lora, backbone=s)),
        Row("lora-s-train", 15, partial(real_training, backbone=s)),
        Row("forward-g", 35, partial(forward, compiled=False)),
        Row("extract-g", 110, end_to_end),
        Row("lora-g-ours", 15, partial(lora, backbone=g)),
        Row("lora-s-peft-bf16", 8, partial(lora_by_peft, backbone=s, precision="bf16")),
        Row("lora-s-peft-bf16-compiled", 40, partial(lora_by_peft, backbone=s, precision="bf16", compiled=True)),
        Row("lora-g-peft-bf16", 10, partial(lora_by_peft, backbone=g, precision="bf16")),
        Row("lora-h-ours", 12, partial(lora, backbone=h)),
        Row("lora-h-peft-bf16", 10, partial(lora_by_peft, backbone=h, precision="bf16")),
        Row("lora-g-peft-bf16-compiled", 60, partial(lora_by_peft, backbone=g, precision="bf16", compiled=True)),
        Row("forward-g-compiled", 45, partial(forward, compiled=True)),
        Row("lora-h-peft-bf16-compiled", 60, partial(lora_by_peft, backbone=h, precision="bf16", compiled=True)),
        Row("lora-g-train", 25, partial(real_training, backbone=g)),
        Row("capped", 15, capped),
        Row("lora-s-plain", 10, partial(lora, backbone=s, fast=False)),
        Row("lora-s-ours-in-turn", 10, partial(lora, backbone=s, at_once=1)),
        Row("lora-s-ours-compiled", 40, partial(lora, backbone=s, compiled=True)),
        Row("lora-h-train", 20, partial(real_training, backbone=h)),
        Row("lora-g-plain", 15, partial(lora, backbone=g, fast=False)),
        Row("lora-s-peft-fp32", 8, partial(lora_by_peft, backbone=s, precision="fp32")),
        Row("lora-h-peft-fp32", 15, partial(lora_by_peft, backbone=h, precision="fp32")),
        Row("lora-g-peft-fp32", 20, partial(lora_by_peft, backbone=g, precision="fp32")),
        Row("lora-g-ours-in-turn", 15, partial(lora, backbone=g, at_once=1)),
        Row("lora-g-ours-compiled", 60, partial(lora, backbone=g, compiled=True)),
        Row("lora-h-ours-compiled", 60, partial(lora, backbone=h, compiled=True)),
    ]


# ---------------------------------------------------------------------------------------------------------- the running


class TooLong(Exception):
    """A row took several times its estimate."""


def run_rows(bench: Bench, out: Path, *, minutes: float, retry: bool = False) -> list[str]:
    """Measure every row that `out` does not hold and that fits into the minutes; return the names of those measured.

    Args:
        bench: where and how large.
        out: the folder of JSON files.
        minutes: of wall time, from now.
        retry: measure rows that raised again.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    measured: list[str] = []
    for row in list_rows(bench):
        path = out / f"{row.name}.json"
        known = json.loads(path.read_text()) if path.exists() else None
        if known is not None and not (retry and "error" in known):
            continue
        if not bench.tiny and time.monotonic() + row.seconds > deadline:
            say(f"{row.name}: takes about {row.seconds:.0f} s, more than is left.")
            continue
        # Where the row ends this process or is cut off, the next call does not meet it again.
        path.write_text(json.dumps({"error": "it began and did not end"}))
        started = time.perf_counter()
        figures = _measured(bench, row)
        seconds = time.perf_counter() - started
        path.write_text(json.dumps(figures | {"row_seconds": seconds}, indent=1) + "\n")
        measured.append(row.name)
        say(f"{row.name} ({seconds:.0f} s): {figures.get('error') or brief(figures)}")
        try:
            tidy(bench)
        except RuntimeError as error:
            say(f"the GPU is lost to this process ({str(error).splitlines()[0]}): the same command goes on after it.")
            sys.exit(3)
    return measured


def _measured(bench: Bench, row: Row) -> Figures:
    """Measure a row; what it raises is its result."""

    def stop(*_: object) -> None:
        raise TooLong(f"more than {limit:.0f} s")

    limit = LEAST_LIMIT + 3 * row.seconds
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # torch.compile looks at what warns
            return row.measure(bench)
    except Exception as error:  # noqa: BLE001 - the bench goes on, whatever a row meets
        return {"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tidy(bench: Bench) -> None:
    """Give memory and compiled code back."""
    torch.compiler.reset()
    if bench.device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(bench.device)
        torch.cuda.empty_cache()


def brief(figures: Figures) -> str:
    """Say the one or two figures of a row that matter."""
    if "checks" in figures:
        count = {status: sum(c["status"] == status for c in figures["checks"]) for status in ("ok", "note", "fail")}
        return ", ".join(f"{n} {status}" for status, n in count.items())
    if "matmul_peak" in figures:
        return (
            f"{figures['device']}, {figures['matmul_peak'] / 1e12:.3g} TFLOP/s, {figures['bandwidth'] / 1e12:.3g} TB/s"
        )
    if "end_to_end" in figures:
        return f"{figures['end_to_end']:,.0f} images/s end to end, {figures['forward']:,.0f} forward"
    rates = figures["images_per_second"]
    by_batch = rates if isinstance(rates, dict) else {"": rates}
    parts = [f"{batch} {rate:,.0f}".strip() if isinstance(rate, float) else batch for batch, rate in by_batch.items()]
    return f"{', '.join(parts)} images/s"


# ----------------------------------------------------------------------------------------------------------- the table


def markdown(out: Path) -> str:
    """Lay out what was measured beside its targets, as Markdown."""
    known = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    peak = known.get("machine", {}).get("matmul_peak")
    lines = [_headline(known.get("machine", {})), ""]

    def share(rate: float, passes: int, gflops: float) -> str:
        return f"{rate * passes * gflops * 1e9 / peak:.0%}" if peak else ""

    lines += ["| extraction, ViT-g/14 | batch | images/s | of the matmul peak (target 60 %) |", "|---|---|---|---|"]
    for name, way in (("forward-g", "forward, eager"), ("forward-g-compiled", "forward, blocks compiled")):
        figures = known.get(name, {})
        for batch, rate in figures.get("images_per_second", {}).items():
            cells = (f"{rate:,.0f}", share(rate, 1, figures["gflops"])) if isinstance(rate, float) else (rate, "")
            lines.append(f"| {way} | {batch} | {cells[0]} | {cells[1]} |")
    if "end_to_end" in (figures := known.get("extract-g", {})):
        rate, of_forward = figures["end_to_end"], figures["end_to_end"] / figures["forward"]
        lines.append(
            f"| PNG files to store, {of_forward:.2f} of its forward pass (target .95) | {figures['batch_size']} "
            f"| {rate:,.0f} | {share(rate, 1, figures['gflops'])} |"
        )
    lines += [
        "",
        "| LoRA, five folds x 8 | way | images/s | times peft bf16 compiled | of the matmul peak (target 45 %) "
        "| MB kept per image | of peft's (target .5) | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, title, target in (("s", "ViT-S/16", "3"), ("h", "ViT-H/14", "1.3"), ("g", "ViT-g/14", "1.3")):
        peft = known.get(f"lora-{size}-peft-bf16-compiled", {}).get("images_per_second")
        peft_kept = known.get(f"lora-{size}-peft-bf16", {}).get("kept_per_image")
        for way, words in WAYS.items():
            figures = known.get(f"lora-{size}-{way}", {})
            if "images_per_second" not in figures:
                continue
            rate, kept = figures["images_per_second"], figures.get("kept_per_image")
            ours = not way.startswith("peft")
            cells = [
                title,
                words,
                f"{rate:,.0f}",
                f"{rate / peft:.2f} (target {target})" if peft and ours else "",
                share(rate, 2, figures["gflops"]),
                f"{kept / 1e6:,.0f}" if kept else "",
                f"{kept / peft_kept:.2f}" if kept and peft_kept and ours else "",
                f"{figures['peak_bytes'] / 2**30:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    if "folds_at_once" in (figures := known.get("capped", {})):
        lines += [
            "",
            f"With three fifths of the memory, training went on with {figures['folds_at_once']} folds at once.",
        ]
    failed = {name: figures["error"] for name, figures in known.items() if "error" in figures}
    lines += ["", *(f"- {name}: {error}" for name, error in failed.items())] if failed else []
    lines += _check_lines(known.get("checks", {}).get("checks", []))
    return "\n".join(lines) + "\n"


WAYS = {
    "ours": "ours, all folds at once, Triton kernels",
    "plain": "ours, all folds at once, plain PyTorch",
    "ours-in-turn": "ours, fold after fold",
    "ours-compiled": "ours, all folds at once, Triton kernels, blocks compiled",
    "train": "ours, `finetune.train`: augmentation, optimiser and validation included",
    "peft-bf16-compiled": "peft, bf16, compiled",
    "peft-bf16": "peft, bf16",
    "peft-fp32": "peft, fp32",
}


def _headline(machine: Mapping[str, Any]) -> str:
    if "matmul_peak" not in machine:
        return "The machine was not measured."
    return (
        f"{machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}: bf16 products "
        f"{machine['matmul_peak'] / 1e12:.3g} TFLOP/s, memory {machine['bandwidth'] / 1e12:.3g} TB/s."
    )


def _check_lines(found: list[dict[str, str]]) -> list[str]:
    if not found:
        return []
    cells = [[check["name"], check["status"], f"{check['found']} {check['remedy']}".strip()] for check in found]
    return ["", "| self-check | | found |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in cells)]


def main(argv: list[str] | None = None) -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-gpu"), help="folder of the JSON files")
    parser.add_argument("--minutes", type=float, default=10, help="no row begins that would pass them")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and shapes, to see that every row works")
    parser.add_argument("--retry", action="store_true", help="measure rows that raised again")
    parser.add_argument("--table", action="store_true", help="print what --out holds as Markdown, and stop")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(markdown(arguments.out), end="")
        return
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        say("nothing was measured: torch sees no GPU here (`--device cpu --tiny` tries every row out).")
        return
    bench = make_bench(torch.device(arguments.device), tiny=arguments.tiny)
    with ExitStack() as stack:
        if arguments.tiny:  # tracing without a C++ compiler, which would take minutes
            stack.enter_context(patch.object(torch, "compile", partial(torch.compile, backend="eager")))
        run_rows(bench, arguments.out, minutes=arguments.minutes, retry=arguments.retry)
    print(markdown(arguments.out), end="")


if __name__ == "__main__":
    main()
