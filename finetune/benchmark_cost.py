"""How long would a row of a benchmark take here, and how much memory and disk? Estimates, from what this device does.

Two small networks of random weights are timed, one of convolutions and one transformer; every other is taken to compute
as many FLOPs a second. `fm-finetune --dry-run` knows the memory of a training better.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from extract import openvino
from extract.backbones import BACKBONES, Backbone, build_model
from extract.compute import embed_batch
from extract.views import View, make_transform, parse_view
from finetune.benchmark_plan import EMBED, Row
from finetune.measure import wait
from finetune.options import FinetuneOptions, is_convolutional, training_precision

_SAMPLES = {True: "efficientnet-lite0", False: "kaiko-s16"}  # by whether they are convolutional
# Forward passes that take as long as a step. With LoRA the first stages of a convolutional network have no backward
# pass, and its norms are folded: 1.7 to 2.0 measured, on EfficientNet-Lite0 at 192 and 224 px and Lite2 at 160.
_PASSES = {"lora": 3.0, "full": 3.0, "head": 1.0}
_PASSES_OF_CONVOLUTIONS = {**_PASSES, "lora": 2.0}
_OPENVINO = 2.1  # times as fast as torch, where nothing is trained (docs/performance.md)
# A probe's fit and start, measured on two busy cores with AMi-Br: ten strengths per fold, or a hundred epochs.
_START = 8.0  # seconds until a command has loaded torch and looked at its patches, measured on two cores
_PROBE_SECONDS = {"exact": 20.0, "paper": 60.0, "authors": 60.0}
# Kept for the backward pass, MB per image and GFLOP of its forward pass: `finetune.plan` counts 36 MB for
# EfficientNet-Lite0, 114 for UNI, 414 for H-optimus-0 (LoRA), 240 for ViT-L (whole).
_KEPT_MB = {True: 47.0, False: 1.0}
_KEPT_OF_WHOLE = 2.0
_PROCESS = 0.9e9  # bytes of a process that has loaded torch and has done nothing yet; measured
_ADAPTED = {True: 0.05, False: 0.01}  # of a backbone's parameters, at rank 8


@dataclass(frozen=True)
class Counts:
    """How many patches there are: in all datasets, to train on, and that all folds together train on."""

    patches: int
    rows: int
    trained: int


@dataclass(frozen=True)
class Estimate:
    """What a row would take: seconds, at most (None where FLOPs are not known), and bytes.

    `fixed` is the memory without which nothing works: weights, and what is trained with its optimiser. `memory` adds
    what passes keep. `checkpoint` is on the disk of `runs`, but only while the row is run.
    """

    seconds: float | None
    fixed: float = 0.0
    memory: float = 0.0
    store: float = 0.0
    runs: float = 0.0
    checkpoint: float = 0.0


def measure_rates(device: torch.device, convolutional: Iterable[bool]) -> dict[bool, float]:
    """Measure FLOP/s of a forward pass, of convolutional networks (True) and others, as far as asked.

    On a CPU processor time counts, of one thread, times the threads there are: the rate of a machine that does nothing
    else, whatever it does now.
    """
    on_cpu, n_threads = device.type == "cpu", torch.get_num_threads()
    clock = time.process_time if on_cpu else time.perf_counter
    rates = {}
    for kind in set(convolutional):
        backbone = BACKBONES[_SAMPLES[kind]]
        n = 4 if on_cpu else 64
        precision = training_precision("auto", backbone, device)
        model = build_model(backbone, None).to(device)
        images = torch.zeros(n, 3, backbone.input_size, backbone.input_size, device=device)
        seconds = []
        try:
            torch.set_num_threads(1 if on_cpu else n_threads)
            for _ in range(3):
                started = clock()
                embed_batch(model, backbone, images, precision=precision)
                wait(device)
                seconds.append(clock() - started)
        finally:
            torch.set_num_threads(n_threads)
        rates[kind] = n * _flops(backbone) / min(seconds[1:]) * (n_threads if on_cpu else 1)
    return rates


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory that a process may use on a device, those in use included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container or a cluster's job
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def estimate(
    row: Row,
    backbone: Backbone,
    counts: Counts,
    rates: dict[bool, float],
    device: torch.device,
    *,
    done: Mapping[str, float] | None = None,
) -> Estimate:
    """Estimate what a row takes on this device.

    Args:
        row: of a plan.
        backbone: its model.
        counts: of the patches.
        rates: from `measure_rates`.
        device: on which it runs.
        done: the fraction that is there already, of the embeddings of each view, or of the epochs ("").
    """
    options, done = row.options, done or {}
    kind, weights = is_convolutional(backbone), 4.0 * backbone.n_parameters
    rate, base = rates.get(kind), _PROCESS if device.type == "cpu" else 0.0
    gain = _OPENVINO if kind and device.type == "cpu" and openvino.version() is not None else 1.0
    if row.method == EMBED:
        of_each = {view: _flops(backbone, parse_view(view)) * counts.patches for view in row.views}
        flops = sum(of_all * (1 - done.get(view, 0)) for view, of_all in of_each.items())
        stored = 3 * 2 * backbone.embedding_dim * counts.patches * len(of_each)  # some three poolings in float16
        return Estimate(_over(flops / gain, rate), fixed=weights, memory=base + weights * 1.5, store=stored)
    if not isinstance(options, FinetuneOptions):
        seconds = _PROBE_SECONDS[row.recipe] * (options.seeds if options else 1)
        held = 3 * 4.0 * backbone.embedding_dim * counts.patches
        return Estimate(seconds, memory=_PROCESS + held, runs=2e3 * counts.patches)
    recipe = options.resolved_recipe(backbone)
    view = options.resolved_view(backbone, recipe)
    n_models = options.seeds * options.cv
    forward = _flops(backbone, view)
    scored = counts.rows * options.seeds + (counts.patches - counts.rows) * n_models
    passes = (_PASSES_OF_CONVOLUTIONS if kind else _PASSES)[options.method]
    epoch = options.seeds * (passes * counts.trained + counts.rows / gain)  # steps and validation
    flops = forward * (recipe.epochs * epoch * (1 - done.get("", 0)) + scored / gain * (8 if recipe.tta else 1))
    trained = {
        "full": float(backbone.n_parameters),
        "lora": _ADAPTED[kind] * backbone.n_parameters * options.lora.rank / 8,
        "head": 0.0,
    }[options.method] + 2 * backbone.embedding_dim
    at_once = 1 if options.method == "full" else n_models
    fixed = (0 if options.method == "full" else weights) + 20 * trained * at_once
    at_a_time = at_once if device.type == "cuda" else 1
    kept = 0.0 if options.method == "head" else _KEPT_MB[kind] * forward / 1e9 * 2**20 * recipe.batch_size * at_a_time
    if options.method == "full" and not kind:
        kept *= _KEPT_OF_WHOLE
    return Estimate(
        _over(flops, rate),
        fixed=fixed,
        memory=base + fixed + kept,
        runs=4 * trained * n_models + 2e3 * counts.patches,
        checkpoint=4 * 4 * trained * at_once,  # the values, the best ones and two moments
    )


def _flops(backbone: Backbone, view: View | None = None) -> float:
    """FLOPs of one patch in a view; NaN where the record does not say."""
    flops = (backbone.gflops or float("nan")) * 1e9
    if view is None:
        return flops
    transform = make_transform(backbone, view)
    return flops * (transform.input_size / backbone.input_size) ** 2 * transform.n_shown


def _over(flops: float, rate: float | None) -> float | None:
    return None if rate is None or flops != flops else _START + flops / rate
