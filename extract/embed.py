"""How do patches become embeddings? Decode, forward and write, overlapped; every model and view from one decode.

Three stages run at once: a few threads decode the next patches, the main thread runs the networks, one thread writes
whole blocks to the store. Nothing but the store remembers what is done, so an interrupted run continues where the
store ends. The images of a forward pass depend only on the row number and the recorded batch size, never on where a run
was interrupted: a resumed store equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from extract.backbones import Backbone, Weights, build_model, embed, fetch_weights, pooling_widths
from extract.datasets import PatchDataset
from features.console import UserError, progress, say
from features.store import Entry, FeatureStore, Writer, fingerprint

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIN_COSINE = 0.9999  # bf16 embeddings may stand for fp32 ones from this cosine on
_CALIBRATION_PATCHES = 8
_CPU_BATCH = 32  # larger batches gain nothing on CPUs
_MAX_GPU_BATCH = 1024
_UNITS_AHEAD = 2


@dataclass(frozen=True)
class ExtractOptions:
    """What the user may choose; everything else follows from the model's card.

    Attributes:
        views: input policies, see `parse_view`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto", "fp32", "bf16" or "fp16"; see `choose_precision`.
        batch_size: images per forward pass; None finds one.
        overwrite: replace embeddings of the same name that were computed otherwise.
    """

    views: tuple[str, ...] = ("full",)
    device: str = "auto"
    precision: str = "auto"
    batch_size: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class View:
    """An input policy: which source pixels the network sees, and at what size.

    Attributes:
        name: as in the store: "full", "center64", "center64@160".
        crop: edge of the central square in source pixels; None for the whole patch.
        input_size: edge of the network's input in pixels; None for the model's own.
    """

    name: str
    crop: int | None
    input_size: int | None


def parse_view(text: str) -> View:
    """Read a view's name: `full`, or `centerN` (central N source pixels), either with `@M` (input of M pixels).

    Raises:
        UserError: if the name is none of these.
    """
    found = re.fullmatch(r"(full|center([1-9]\d*))(?:@([1-9]\d*))?", text)
    if not found:
        raise UserError(
            f"unknown view {text!r}: use 'full' (the whole patch), 'center64' (its central 64 pixels) or "
            "'center64@160' (the same, resized to an input of 160 pixels)."
        )
    return View(text, int(found[2]) if found[2] else None, int(found[3]) if found[3] else None)


@dataclass(frozen=True)
class Transform:
    """Patch to network input. `crop` source pixels, shorter edge to `resize`, centre `input_size`, then normalise.

    The resize is antialiased and rounded to whole grey levels, as PIL does it on the images that the models were
    trained on: torch's uint8 kernel on CPU, the same kernel in float32 and rounded on other devices.
    """

    crop: int | None
    resize: int
    input_size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, patches: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
        """Patches, each (h, w, 3) uint8, to a normalised float32 batch (b, 3, input_size, input_size).

        Raises:
            UserError: if a patch is smaller than the view's crop.
        """
        if len({patch.shape for patch in patches}) == 1:
            pixels = self._resized(torch.from_numpy(np.stack(patches)), device)
        else:
            pixels = torch.cat([self._resized(torch.from_numpy(patch[None]), device) for patch in patches])
        # x/255 normalised by mean and std, as one multiplication and one addition.
        std = torch.tensor(self.std, device=device).view(3, 1, 1)
        mean = torch.tensor(self.mean, device=device).view(3, 1, 1)
        return pixels.to(torch.float32).mul_(1 / (255 * std)).sub_(mean / std)

    def _resized(self, patches: Tensor, device: torch.device) -> Tensor:
        _, height, width, _ = patches.shape
        if self.crop is not None:
            if min(height, width) < self.crop:
                raise UserError(
                    f"a patch of {width} x {height} pixels has no central {self.crop} pixels. "
                    f"Use --view center{min(height, width)} or --view full."
                )
            top, left = (height - self.crop) // 2, (width - self.crop) // 2
            patches = patches[:, top : top + self.crop, left : left + self.crop]
            height = width = self.crop
        pixels = patches.to(device, non_blocking=True).permute(0, 3, 1, 2)  # (b, 3, h, w), channels last in memory
        scale = self.resize / min(height, width)
        size = (round(height * scale), round(width * scale))
        if size != (height, width):
            if device.type != "cpu":
                pixels = pixels.to(torch.float32)
            pixels = F.interpolate(pixels, size=size, mode=self.interpolation, antialias=True, align_corners=False)
            if device.type != "cpu":
                pixels = pixels.round_().clamp_(0, 255)
        top, left = (size[0] - self.input_size) // 2, (size[1] - self.input_size) // 2
        return pixels[:, :, top : top + self.input_size, left : left + self.input_size]

    def record(self) -> dict[str, Any]:
        """The transform as the fingerprint keeps it."""
        return {
            "crop": self.crop,
            "resize": self.resize,
            "input_size": self.input_size,
            "interpolation": self.interpolation,
            "antialias": True,
            "rounding": "uint8",
            "mean": list(self.mean),
            "std": list(self.std),
        }


def make_transform(backbone: Backbone, view: View) -> Transform:
    """The card's transform for `full`; a centre view goes straight to the network's input, with nothing cropped off."""
    size = view.input_size or backbone.input_size
    as_card = view.crop is None and view.input_size is None
    return Transform(
        crop=view.crop,
        resize=backbone.resize if as_card else size,
        input_size=size,
        interpolation=backbone.interpolation,
        mean=tuple(backbone.mean),
        std=tuple(backbone.std),
    )


@dataclass(frozen=True)
class Summary:
    """What one (model, view) took: freshly embedded rows, seconds of the whole run, and how they were computed."""

    dataset: str
    model: str
    view: str
    n_rows: int
    n_new: int
    seconds: float
    images_per_second: float
    precision: str
    batch_size: int | None
    device: str
    fingerprint: str

    def line(self) -> str:
        """The summary as one sentence."""
        head = f"{self.dataset} / {self.model} / {self.view}: "
        if not self.n_new:
            return head + f"all {self.n_rows:,} patches were already in the store"
        return head + (
            f"{self.n_new:,} of {self.n_rows:,} patches in {self.seconds:.1f} s "
            f"({self.images_per_second:,.0f} images/s, {self.precision} on {self.device}, batch {self.batch_size})"
        )


@dataclass
class _Job:
    """One (model, view) in flight: its network, its transform, its place in the store."""

    backbone: Backbone
    view: View
    model: nn.Module
    transform: Transform
    precision: str
    batch_size: int
    writer: Writer
    todo: list[range]  # row ranges of whole forward batches that hold a missing block

    @property
    def step(self) -> int:
        return max(self.batch_size, self.writer.entry.rows_per_block)


def extract(
    dataset: PatchDataset,
    backbones: Sequence[Backbone],
    *,
    store: FeatureStore,
    options: ExtractOptions = ExtractOptions(),  # noqa: B008 - frozen
    weights: Path | None = None,
) -> list[Summary]:
    """Embed every patch of `dataset` by every backbone in every view, and write all poolings to the store.

    Blocks that are already there are kept; only missing ones are computed.

    Args:
        dataset: the patches; its table is written to the store first.
        backbones: models, all held in memory at once so that one decode serves them all.
        store: where the embeddings go.
        options: device, views, precision, batch size.
        weights: a local checkpoint instead of the hub's; one backbone only.

    Returns:
        One summary per (backbone, view), in that order.

    Raises:
        UserError: if embeddings of another fingerprint are in the way, weights cannot be had or do not fit, a patch
            cannot be decoded, an embedding is not finite, or the disk is full. Finished blocks are kept.
    """
    if weights is not None and len(backbones) != 1:
        raise UserError(f"--weights names one file, but {len(backbones)} models were asked for: give one --model.")
    device = find_device(options.device)
    views = [parse_view(text) for text in dict.fromkeys(options.views)]
    if store.put_samples(dataset.name, dataset.samples, attrs=_dataset_attrs(dataset)):
        say(f"{dataset.name}: same patches, but labels, groups or splits have changed; the store's table was updated.")

    started = time.perf_counter()
    jobs: list[_Job] = []
    finished: dict[tuple[str, str], Entry] = {}
    for backbone in backbones:
        loaded = fetch_weights(backbone, weights=weights)
        todo = []
        for view in views:
            entry = _complete_entry(store, dataset, backbone, loaded, view, options, device)
            if entry is None:
                todo.append(view)
            else:
                finished[backbone.name, view.name] = entry
        if todo:
            model = build_model(backbone, loaded, dynamic=any(view.input_size for view in todo)).to(device)
            if device.type == "cpu" and not any(hasattr(m, "num_prefix_tokens") for m in (model,)):
                model = model.to(memory_format=torch.channels_last)  # convolutions; no difference to transformers
            for view in todo:
                jobs.append(_prepare(store, dataset, backbone, loaded, model, view, options, device))

    new_rows = _run(dataset, jobs, device)
    seconds = time.perf_counter() - started
    entries = {(job.backbone.name, job.view.name): job.writer.entry for job in jobs} | finished
    summaries = []
    for backbone in backbones:
        for view in views:
            key = (backbone.name, view.name)
            entry, n_new = entries[key], new_rows.get(key, 0)
            summaries.append(
                Summary(
                    dataset=dataset.name,
                    model=backbone.name,
                    view=view.name,
                    n_rows=entry.n_rows,
                    n_new=n_new,
                    seconds=seconds,
                    images_per_second=n_new / seconds,
                    precision=str(entry.parts["precision"]),
                    batch_size=entry.batch_size,
                    device=device.type,
                    fingerprint=entry.fingerprint,
                )
            )
    return summaries


def find_device(name: str) -> torch.device:
    """The torch device of an option: "auto" takes the first GPU, else the CPU.

    Raises:
        UserError: if the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N.") from error
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise UserError(f"device {name!r} was asked for, but torch sees {n_gpus} GPUs here. Use --device cpu or auto.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N.")
    return device


def fingerprint_parts(
    dataset: PatchDataset, backbone: Backbone, weights: Weights, view: View, *, precision: str, device: torch.device
) -> dict[str, Any]:
    """Everything that decides an embedding's numbers, as plain JSON values; the store hashes it."""
    return {
        "model": backbone.name,
        "hub_id": backbone.hub_id,
        "revision": weights.revision,
        "weights_sha256": weights.sha256,
        "architecture": backbone.arch,
        "kwargs": {key: _plain(value) for key, value in backbone.kwargs.items()},
        "transform": make_transform(backbone, view).record(),
        "view": view.name,
        "source_mpp": dataset.mpp,
        "precision": precision,
        "device": device.type,
        "dataset_digest": dataset.samples.images_digest,
    }


def _plain(value: Any) -> Any:
    """Layer classes by name, everything else as it is."""
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value


def _dataset_attrs(dataset: PatchDataset) -> dict[str, Any]:
    return {"name": dataset.name, "source": dataset.source, "label_names": list(dataset.label_names), "mpp": dataset.mpp}


def _complete_entry(
    store: FeatureStore,
    dataset: PatchDataset,
    backbone: Backbone,
    weights: Weights,
    view: View,
    options: ExtractOptions,
    device: torch.device,
) -> Entry | None:
    """The store's entry if it is complete and computed just as asked: then no network need be built."""
    for entry in store.entries(dataset.name, backbone.name):
        if entry.view != view.name or not entry.complete:
            continue
        precision = options.precision if options.precision != "auto" else str(entry.parts.get("precision"))
        parts = fingerprint_parts(dataset, backbone, weights, view, precision=precision, device=device)
        parts["poolings"] = entry.parts.get("poolings")
        if fingerprint(parts) == entry.fingerprint:
            return entry
    return None


def _prepare(
    store: FeatureStore,
    dataset: PatchDataset,
    backbone: Backbone,
    weights: Weights,
    model: nn.Module,
    view: View,
    options: ExtractOptions,
    device: torch.device,
) -> _Job:
    transform = make_transform(backbone, view)
    some = [dataset.decode(row) for row in range(min(_CALIBRATION_PATCHES, len(dataset.samples)))]
    recorded = next((e for e in store.entries(dataset.name, backbone.name) if e.view == view.name), None)
    if options.precision == "auto" and recorded and recorded.parts.get("device") == device.type:
        precision = str(recorded.parts.get("precision"))  # what was chosen when the run began
    else:
        precision = choose_precision(options.precision, backbone, model, transform(some, device))
    widths = pooling_widths(model, backbone)
    parts = fingerprint_parts(dataset, backbone, weights, view, precision=precision, device=device)
    writer = store.begin(
        dataset.name,
        backbone.name,
        view.name,
        poolings=widths,
        card_pooling=backbone.card_pooling,
        parts=parts | {"poolings": dict(widths)},
        overwrite=options.overwrite,
    )
    rows_per_block = writer.entry.rows_per_block
    batch_size = options.batch_size or writer.entry.batch_size
    if batch_size is None and device.type == "cpu":
        batch_size = _CPU_BATCH
    elif batch_size is None:
        example = transform(some[:1], device)

        def forward(n: int) -> None:
            embed_batch(model, backbone, example.expand(n, -1, -1, -1), precision=precision)

        batch_size = largest_batch(forward, at_most=_MAX_GPU_BATCH)
    if batch_size > rows_per_block:
        batch_size -= batch_size % rows_per_block  # whole blocks per batch
    writer.set_batch_size(batch_size)
    job = _Job(backbone, view, model, transform, precision, batch_size, writer, [])
    n_rows = len(dataset.samples)
    starts = sorted({rows.start // job.step * job.step for rows in writer.missing()})
    job.todo = [range(start, min(start + job.step, n_rows)) for start in starts]
    return job


def choose_precision(asked: str, backbone: Backbone, model: nn.Module, images: Tensor) -> str:
    """The precision to compute in. `auto` on a GPU is what the model's card asks for, where it asks for any.

    Where the card is silent, and on every CPU, `auto` is bf16 if the processor has it and if on these images every
    pooling's cosine to fp32 is at least `MIN_COSINE`; else fp32.

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
        raise UserError("fp16 is for GPUs: on a CPU use --precision bf16, fp32 or auto.")
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


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bf16 in hardware (else it is slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", cpuinfo.read_text()))


def embed_batch(model: nn.Module, backbone: Backbone, images: Tensor, *, precision: str) -> dict[str, Tensor]:
    """One forward pass: (b, 3, h, w) float32 normalised images to every pooling, each (b, d) float32."""
    dtype = _AUTOCAST.get(precision)
    autocast: AbstractContextManager[Any] = torch.autocast(images.device.type, dtype=dtype) if dtype else nullcontext()
    with torch.inference_mode(), autocast:
        return {name: values.float() for name, values in embed(model, backbone, images).items()}


def largest_batch(forward: Callable[[int], None], *, at_most: int) -> int:
    """The largest power of two whose forward pass fits in memory, with room to spare.

    Doubles until memory runs out, then takes half of the last that fitted (fragmentation and other models need
    room), unless `at_most` was reached first.

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
        raise UserError("not even one image fits in the device's memory: use a smaller model, or --device cpu.")
    return max(1, fits // 2)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a torch error means that memory ran out, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _run(dataset: PatchDataset, jobs: list[_Job], device: torch.device) -> dict[tuple[str, str], int]:
    """Work through all jobs, unit by unit of rows; returns the rows newly embedded per (model, view)."""
    n_rows = len(dataset.samples)
    unit = max((job.step for job in jobs), default=1)
    starts = sorted({rows.start // unit * unit for job in jobs for rows in job.todo})
    units = [range(start, min(start + unit, n_rows)) for start in starts]
    new_rows: dict[tuple[str, str], int] = {}
    n_decoders = max(1, min(8, (os.cpu_count() or 2) // 2))
    total = sum(len(rows) for job in jobs for rows in job.todo)
    with (
        ThreadPoolExecutor(n_decoders, thread_name_prefix="decode") as decoders,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writers,
        progress(f"{dataset.name}", total) as advance,
    ):
        writing: deque[Future[None]] = deque()
        try:
            for rows, patches in _decoded(dataset, units, decoders):
                for job in jobs:
                    for step in (step for step in job.todo if step.start in rows):
                        batch = patches[step.start - rows.start : step.stop - rows.start]
                        poolings = _forward(job, batch, device)
                        writing.append(writers.submit(_write, job.writer, step, poolings))
                        if len(writing) > _UNITS_AHEAD:
                            writing.popleft().result()
                        key = (job.backbone.name, job.view.name)
                        new_rows[key] = new_rows.get(key, 0) + len(step)
                        advance(len(step))
            while writing:
                writing.popleft().result()
        except BaseException:
            for pool in (decoders, writers):
                pool.shutdown(wait=False, cancel_futures=True)
            raise
    return new_rows


def _decoded(
    dataset: PatchDataset, units: list[range], decoders: ThreadPoolExecutor
) -> Iterator[tuple[range, list[NDArray[np.uint8]]]]:
    """Each unit with its decoded patches, while the next units are being decoded."""
    ahead: deque[tuple[range, list[Future[NDArray[np.uint8]]]]] = deque()
    for rows in units:
        ahead.append((rows, [decoders.submit(dataset.decode, row) for row in rows]))
        if len(ahead) > _UNITS_AHEAD:
            first, futures = ahead.popleft()
            yield first, [future.result() for future in futures]
    for first, futures in ahead:
        yield first, [future.result() for future in futures]


def _forward(job: _Job, patches: Sequence[NDArray[np.uint8]], device: torch.device) -> dict[str, Tensor]:
    """Embed a step batch by batch. Memory running out halves the batch instead of ending the run."""
    while True:
        try:
            outputs = [
                embed_batch(
                    job.model,
                    job.backbone,
                    job.transform(patches[start : start + job.batch_size], device),
                    precision=job.precision,
                )
                for start in range(0, len(patches), job.batch_size)
            ]
            return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if job.batch_size == 1:
                raise UserError(
                    f"{job.backbone.name}: not even one image fits in the memory of {device}. "
                    "Close other programs there, use a smaller model, or --device cpu."
                ) from error
            torch.cuda.empty_cache()
            job.batch_size //= 2
            job.writer.set_batch_size(job.batch_size)
            say(f"{job.backbone.name}: out of memory on {device}; going on with batches of {job.batch_size}.")


def _write(writer: Writer, step: range, poolings: Mapping[str, Tensor]) -> None:
    """Write the missing blocks of a step; `.cpu()` waits here for the device, not in the main thread."""
    arrays = {name: values.cpu().numpy() for name, values in poolings.items()}
    for block, rows in writer.missing_within(step):
        part = slice(rows.start - step.start, rows.stop - step.start)
        writer.write(block, {name: values[part] for name, values in arrays.items()})
