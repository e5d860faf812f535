"""How do patches become embeddings? Decode, forward and write, overlapped; every model and view from one decode.

Three stages run at once: a few threads decode the next patches, the main thread runs the networks, one thread writes
whole blocks to the store. Nothing but the store remembers what is done, so an interrupted run continues where the
store ends. The images of a forward pass depend only on the row number and the recorded batch size, never on where a run
was interrupted: a resumed store equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from extract.backbones import Backbone, Weights, build_model, check_input_size, fetch_weights, pooling_widths
from extract.datasets import Decode, PatchDataset
from extract.hardware import choose_precision, embed_batch, find_device, largest_batch, out_of_memory, settle
from extract.views import Transform, View, make_transform, parse_view
from features.console import UserError, progress, say
from features.store import Entry, FeatureStore, Writer, fingerprint

_CALIBRATION_PATCHES = 8
_CPU_BATCH = 8  # larger batches leave the cache: a third slower for convolutions, no faster for transformers
Rows = TypeVar("Rows", bound=Sequence[int])
_UNITS_AHEAD = 2  # decoded, or waiting to be written


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
class Summary:
    """What one (model, view) took, and how it was computed. Seconds run from the first decode to the last write."""

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


@dataclass(frozen=True)
class _Task:
    """What one call of `extract_dataset` works on."""

    dataset: PatchDataset
    store: FeatureStore
    options: ExtractOptions
    device: torch.device
    first: list[NDArray[np.uint8]]  # a few patches to settle networks and precision on


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


def extract_dataset(
    dataset: PatchDataset,
    backbones: Sequence[Backbone],
    *,
    store: FeatureStore,
    options: ExtractOptions = ExtractOptions(),
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
    if store.put_samples(dataset.name, dataset.samples, attrs=_dataset_attrs(dataset), overwrite=options.overwrite):
        say(f"{dataset.name}: same patches, but labels, groups or splits have changed; the store's table was updated.")

    first = [dataset.decode(row) for row in range(min(_CALIBRATION_PATCHES, len(dataset.samples)))]
    task = _Task(dataset, store, options, device, first)
    jobs: list[_Job] = []
    finished: dict[tuple[str, str], Entry] = {}
    for backbone in backbones:
        loaded = fetch_weights(backbone, weights=weights)
        todo = []
        for view in views:
            entry = _complete_entry(task, backbone, loaded, view)
            if entry is None:
                todo.append(view)
            else:
                finished[backbone.name, view.name] = entry
        if todo:
            model = build_model(backbone, loaded, dynamic=any(view.input_size for view in todo))
            model = settle(model, device, example=make_transform(backbone, todo[0])(first, device))
            jobs += [_prepare(task, backbone, loaded, model, view) for view in todo]

    started = time.perf_counter()
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


def fingerprint_parts(
    dataset: PatchDataset, backbone: Backbone, weights: Weights, view: View, *, precision: str, device: torch.device
) -> dict[str, Any]:
    """Everything that decides an embedding's numbers, as plain JSON values; the store hashes it."""
    return backbone_parts(backbone, weights, view, precision=precision, device=device) | {
        "source_mpp": dataset.mpp,
        "dataset_digest": dataset.samples.images_digest,
    }


def backbone_parts(
    backbone: Backbone, weights: Weights, view: View, *, precision: str, device: torch.device
) -> dict[str, Any]:
    """What does not depend on the patches of `fingerprint_parts`."""
    return {
        "model": backbone.name,
        "hub_id": backbone.hub_id,
        "revision": weights.revision,
        "weights_sha256": weights.sha256,
        "architecture": backbone.arch,
        "kwargs": dict(backbone.kwargs),
        "layout": backbone.layout,
        "resample_pos_embed": backbone.resample_pos_embed,
        "transform": make_transform(backbone, view).record(),
        "view": view.name,
        "precision": precision,
        "device": device.type,
    }


def _dataset_attrs(dataset: PatchDataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "source": dataset.source,
        "label_names": list(dataset.label_names),
        "mpp": dataset.mpp,
    }


def _complete_entry(task: _Task, backbone: Backbone, weights: Weights, view: View) -> Entry | None:
    """The store's entry if it is complete and computed just as asked: then no network need be built."""
    for entry in task.store.entries(task.dataset.name, backbone.name):
        if entry.view != view.name or not entry.complete:
            continue
        asked = task.options.precision
        precision = asked if asked != "auto" else str(entry.parts.get("precision"))
        parts = fingerprint_parts(task.dataset, backbone, weights, view, precision=precision, device=task.device)
        parts["poolings"] = entry.parts.get("poolings")
        if fingerprint(parts) == entry.fingerprint:
            return entry
    return None


def _settled_precision(task: _Task, backbone: Backbone, weights: Weights, view: View) -> str | None:
    """What `auto` chose before for this network and view: an interrupted run, and all datasets of a store, agree."""
    for entry in task.store.entries(model=backbone.name):
        parts = entry.parts
        same = parts.get("weights_sha256") == weights.sha256 and parts.get("device") == task.device.type
        if same and entry.view == view.name:
            return str(parts["precision"])
    return None


def _prepare(task: _Task, backbone: Backbone, weights: Weights, model: nn.Module, view: View) -> _Job:
    """Claim the view's place in the store, and settle precision and batch size."""
    dataset, options, device = task.dataset, task.options, task.device
    transform = make_transform(backbone, view)
    check_input_size(model, backbone, transform.input_size)
    example = transform(task.first, device)
    precision = options.precision
    if precision == "auto":
        precision = _settled_precision(task, backbone, weights, view) or precision
    precision = choose_precision(precision, backbone, model, example)
    widths = pooling_widths(model, backbone)
    parts = fingerprint_parts(dataset, backbone, weights, view, precision=precision, device=device)
    writer = task.store.begin(
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

        def forward(n: int) -> None:
            embed_batch(model, backbone, example[:1].expand(n, -1, -1, -1), precision=precision)

        batch_size = largest_batch(forward)
    if batch_size > rows_per_block:
        batch_size -= batch_size % rows_per_block  # whole blocks per batch
    writer.set_batch_size(batch_size)
    job = _Job(backbone, view, model, transform, precision, batch_size, writer, [])
    n_rows = len(dataset.samples)
    starts = sorted({rows.start // job.step * job.step for rows in writer.missing()})
    job.todo = [range(start, min(start + job.step, n_rows)) for start in starts]
    return job


def _run(dataset: PatchDataset, jobs: list[_Job], device: torch.device) -> dict[tuple[str, str], int]:
    """Work through all jobs, unit by unit of rows; returns the rows newly embedded per (model, view)."""
    n_rows = len(dataset.samples)
    unit = max((job.step for job in jobs), default=1)
    starts = sorted({rows.start // unit * unit for job in jobs for rows in job.todo})
    units = [range(start, min(start + unit, n_rows)) for start in starts]
    new_rows: dict[tuple[str, str], int] = {}
    total = sum(len(rows) for job in jobs for rows in job.todo)
    with (
        ThreadPoolExecutor(1, thread_name_prefix="write") as writers,
        progress(f"{dataset.name}", total) as advance,
        closing(decoded(dataset.decode, units)) as ready,
    ):
        writing: deque[Future[None]] = deque()
        for rows, patches in ready:
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
    return new_rows


def decoded(decode: Decode, units: Sequence[Rows]) -> Generator[tuple[Rows, list[NDArray[np.uint8]]], None, None]:
    """Each unit of rows with its decoded patches, while threads decode the next units. Close it if you leave early."""
    n_decoders = max(1, min(8, (os.cpu_count() or 2) // 2))
    ahead: deque[tuple[Rows, list[Future[NDArray[np.uint8]]]]] = deque()
    with ThreadPoolExecutor(n_decoders, thread_name_prefix="decode") as decoders:
        try:
            for rows in units:
                ahead.append((rows, [decoders.submit(decode, row) for row in rows]))
                if len(ahead) > _UNITS_AHEAD:
                    first, futures = ahead.popleft()
                    yield first, [future.result() for future in futures]
            for first, futures in ahead:
                yield first, [future.result() for future in futures]
        except BaseException:
            decoders.shutdown(wait=False, cancel_futures=True)
            raise


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
