"""How do patches become embeddings? Decode, forward and write, overlapped; every model and view from one decode.

Three stages run at once: a few threads decode the next patches, the main thread runs the networks, one thread writes
whole blocks to the store. On a CPU, batches run side by side, a thread each: a busy core then holds up one batch, not
all, and the last bits of an embedding do not depend on the number of threads.

Nothing but the store remembers what is done, so an interrupted run continues where the store ends. The images of a
forward pass depend only on the row number and the recorded batch size, never on where a run was interrupted: a
resumed store equals an uninterrupted one bit for bit. Nor do they depend on who computes them: several processes, on
one machine or many, take their shares of whole steps (extract/shard.py), and what they must agree on (precision,
batch size) is what the first of them recorded in the store when it made the entry.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from extract.backbones import Backbone, Weights, build_model, check_input_size, fetch_weights, pooling_widths
from extract.compute import (
    choose_precision,
    embed_batch,
    largest_batch,
    optimize_for_inference,
)
from extract.datasets import Decode, PatchDataset
from extract.shard import Shard
from extract.views import Transform, View, make_transform, parse_view
from features.console import UserError, progress, say
from features.device import find_device, out_of_memory
from features.entry import Entry
from features.fingerprint import fingerprint
from features.layout import rows_per_block
from features.store import FeatureStore
from features.writer import Writer

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
    """What one (model, view) took, and how it was computed. Seconds run from the first decode to the last write.

    `n_new` rows are what this process embedded; `n_missing` blocks, of all of them, were in nobody's store at its end.
    """

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
    rank: int = 0
    n_ranks: int = 1
    n_missing: int = 0

    def line(self) -> str:
        """The summary as one sentence; a rank's also says whether all of it is there now."""
        head = f"{self.dataset} / {self.model} / {self.view}: "
        if self.n_ranks > 1:
            head = f"rank {self.rank} of {self.n_ranks}: {head}"
        if self.n_new:
            done = (
                f"{self.n_new:,} of {self.n_rows:,} patches in {self.seconds:.1f} s "
                f"({self.images_per_second:,.0f} images/s, {self.precision} on {self.device}, batch {self.batch_size})"
            )
        elif self.n_ranks > 1 and self.n_missing:
            done = "nothing left to do in this share"
        else:
            done = f"all {self.n_rows:,} patches were already in the store"
        if self.n_missing:
            return f"{head}{done}; not complete yet, {self.n_missing:,} blocks are left to other ranks"
        return f"{head}{done}; complete" if self.n_ranks > 1 and self.n_new else head + done


@dataclass(frozen=True)
class _Task:
    """What one call of `prepare` works on."""

    dataset: PatchDataset
    store: FeatureStore
    options: ExtractOptions
    share: Shard
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
    share: Shard

    @property
    def step(self) -> int:
        return _step(self.writer.entry, self.batch_size)

    def todo(self) -> list[range]:
        """Row ranges of whole forward batches that hold a missing block and are this share's."""
        return _todo(self.writer.entry, self.batch_size, self.share)


@dataclass(frozen=True)
class Prepared:
    """Networks loaded, places in the store claimed: ready to embed."""

    task: _Task
    jobs: list[_Job]
    entries: dict[tuple[str, str], Entry]  # by model and view, in the order asked for; not up to date


def extract_dataset(
    dataset: PatchDataset,
    backbones: Sequence[Backbone],
    *,
    store: FeatureStore,
    options: ExtractOptions = ExtractOptions(),
    weights: Path | None = None,
    share: Shard = Shard(),
) -> list[Summary]:
    """Embed every patch of `dataset` by every backbone in every view, and write all poolings to the store.

    Blocks that are already there are kept; only missing ones are computed.

    Args:
        dataset: the patches; its table is written to the store first.
        backbones: models, all held in memory at once so that one decode serves them all.
        store: where the embeddings go.
        options: device, views, precision, batch size.
        weights: a local checkpoint instead of the hub's; one backbone only.
        share: which part of the work is this process's.

    Returns:
        One summary per (backbone, view), in that order.

    Raises:
        UserError: if embeddings of another fingerprint are in the way, weights cannot be had or do not fit, a patch
            cannot be decoded, an embedding is not finite, or the disk is full. Finished blocks are kept.
    """
    prepared = prepare(dataset, backbones, store=store, options=options, weights=weights, share=share)
    started = time.perf_counter()
    new_rows = embed_rows(prepared)
    return summaries(prepared, new_rows, seconds=time.perf_counter() - started)


def prepare(
    dataset: PatchDataset,
    backbones: Sequence[Backbone],
    *,
    store: FeatureStore,
    options: ExtractOptions = ExtractOptions(),
    weights: Path | None = None,
    share: Shard = Shard(),
) -> Prepared:
    """All of `extract_dataset` that comes before the first embedding; see there."""
    if weights is not None and len(backbones) != 1:
        raise UserError(f"--weights names one file, but {len(backbones)} models were asked for: give one --model.")
    if options.overwrite and share.shared:
        raise UserError(
            "--overwrite is for one process: of several, each would discard what those before it have written. "
            "Start it alone with --shard 0/1, stop it at its first images, then start all without --overwrite."
        )
    device = find_device(options.device, local_rank=share.local_rank if share.shared else None)
    views = [parse_view(text) for text in dict.fromkeys(options.views)]
    attrs = _dataset_attrs(dataset)
    if store.put_samples(dataset.name, dataset.samples, attrs=attrs, overwrite=options.overwrite, shared=share.shared):
        say(f"{dataset.name}: same patches, but labels, groups or splits have changed; the store's table was updated.")

    first = [dataset.decode(row) for row in range(min(_CALIBRATION_PATCHES, len(dataset.samples)))]
    task = _Task(dataset, store, options, share, device, first)
    jobs: list[_Job] = []
    entries: dict[tuple[str, str], Entry] = {}
    for backbone in backbones:
        loaded = fetch_weights(backbone, weights=weights)
        todo = []
        for view in views:
            entry = _finished_entry(task, backbone, loaded, view)
            if entry is None:
                todo.append(view)
            else:
                entries[backbone.name, view.name] = entry
        if todo:
            model = build_model(backbone, loaded, dynamic=any(view.input_size for view in todo))
            model = optimize_for_inference(model, device, example=make_transform(backbone, todo[0])(first, device))
            jobs += [_prepare(task, backbone, loaded, model, view) for view in todo]
    entries |= {(job.backbone.name, job.view.name): job.writer.entry for job in jobs}
    names = [(backbone.name, view.name) for backbone in backbones for view in views]
    return Prepared(task, jobs, {name: entries[name] for name in names})


def summaries(prepared: Prepared, new_rows: Mapping[tuple[str, str], int], *, seconds: float) -> list[Summary]:
    """What became of each (model, view), after `new_rows` of it were embedded in `seconds`."""
    task = prepared.task
    written = {(job.backbone.name, job.view.name): job.writer.entry for job in prepared.jobs}
    found = []
    for (model, view), entry in (prepared.entries | written).items():
        n_new = new_rows.get((model, view), 0)
        found.append(
            Summary(
                dataset=task.dataset.name,
                model=model,
                view=view,
                n_rows=entry.n_rows,
                n_new=n_new,
                seconds=seconds,
                images_per_second=n_new / seconds,
                precision=str(entry.parts["precision"]),
                batch_size=entry.batch_size,
                device=task.device.type,
                fingerprint=entry.fingerprint,
                rank=task.share.rank,
                n_ranks=task.share.n_ranks,
                n_missing=len(entry.missing_blocks()),
            )
        )
    return found


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


def _step(entry: Entry, batch_size: int) -> int:
    """How many rows make a step: whole blocks and whole forward batches."""
    return max(batch_size, entry.rows_per_block)


def _todo(entry: Entry, batch_size: int, share: Shard) -> list[range]:
    step = _step(entry, batch_size)
    # Steps are numbered from the first row on, missing or not, so that all ranks number them alike at any time.
    numbers = sorted({block * entry.rows_per_block // step for block in entry.missing_blocks()})
    return [range(k * step, min((k + 1) * step, entry.n_rows)) for k in numbers if share.owns(k)]


def _stored_entry(task: _Task, backbone: Backbone, view: View) -> Entry | None:
    entries = task.store.entries(task.dataset.name, backbone.name)
    return next((entry for entry in entries if entry.view == view.name), None)


def _finished_entry(task: _Task, backbone: Backbone, weights: Weights, view: View) -> Entry | None:
    """The store's entry if this share of it is there, computed just as asked: then no network need be built."""
    entry = _stored_entry(task, backbone, view)
    if entry is None:
        return None
    if not entry.complete and (entry.batch_size is None or _todo(entry, entry.batch_size, task.share)):
        return None
    asked = task.options.precision
    precision = asked if asked != "auto" else str(entry.parts.get("precision"))
    parts = fingerprint_parts(task.dataset, backbone, weights, view, precision=precision, device=task.device)
    parts["poolings"] = entry.parts.get("poolings")
    return entry if fingerprint(parts) == entry.fingerprint else None


def _settled_precision(task: _Task, backbone: Backbone, weights: Weights, view: View) -> str | None:
    """What `auto` chose before for this network and view: an interrupted run, and all datasets of a store, agree."""
    entries = task.store.entries(model=backbone.name)
    for entry in sorted(entries, key=lambda entry: entry.dataset != task.dataset.name):  # its own first
        parts = entry.parts
        same = parts.get("weights_sha256") == weights.sha256 and parts.get("device") == task.device.type
        if same and entry.view == view.name:
            return str(parts["precision"])
    return None


def _prepare(task: _Task, backbone: Backbone, weights: Weights, model: nn.Module, view: View) -> _Job:
    """Claim the view's place in the store, and settle precision and batch size: whoever makes the entry decides."""
    dataset, options, device = task.dataset, task.options, task.device
    transform = make_transform(backbone, view)
    check_input_size(model, backbone, transform.input_size)
    example = transform(task.first, device)
    precision = options.precision
    if precision == "auto":
        precision = _settled_precision(task, backbone, weights, view) or precision
    precision = choose_precision(precision, backbone, model, example)
    widths = pooling_widths(model, backbone)

    stored = None if options.overwrite else _stored_entry(task, backbone, view)
    batch_size = options.batch_size or (stored.batch_size if stored else None)
    if batch_size is None and device.type == "cpu":
        batch_size = _CPU_BATCH
    elif batch_size is None:

        def forward(n: int) -> None:
            embed_batch(model, backbone, example[:1].expand(n, -1, -1, -1), precision=precision)

        batch_size = largest_batch(forward)
    batch_size = _whole_blocks(batch_size, rows_per_block(len(dataset.samples)))

    def begin(precision: str) -> Writer:
        parts = fingerprint_parts(dataset, backbone, weights, view, precision=precision, device=device)
        return task.store.begin(
            dataset.name,
            model=backbone.name,
            view=view.name,
            poolings=widths,
            card_pooling=backbone.card_pooling,
            parts=parts | {"poolings": dict(widths)},
            overwrite=options.overwrite,
            batch_size=batch_size,
            shared=task.share.shared,
        )

    try:
        writer = begin(precision)
    except UserError:
        # Another rank may have made the entry since we looked, on a machine where `auto` means something else.
        decided = _settled_precision(task, backbone, weights, view) if options.precision == "auto" else None
        if decided in (None, precision):
            raise
        precision = str(decided)
        writer = begin(precision)
    recorded = writer.entry.batch_size
    if recorded is not None and recorded != batch_size:
        if options.batch_size is None:
            batch_size = recorded
        elif task.share.shared:
            raise UserError(
                f"{writer.entry.name} was begun with batches of {recorded}, now --batch-size says {batch_size}: ranks "
                "must agree, or the last bits differ from block to block. Leave --batch-size out to go on as begun."
            )
    if recorded != batch_size:
        writer.set_batch_size(batch_size)
    return _Job(backbone, view, model, transform, precision, batch_size, writer, task.share)


def _whole_blocks(batch_size: int, rows_per_block: int) -> int:
    """A batch of at most as many images, of whole blocks if it is larger than one."""
    return batch_size - batch_size % rows_per_block if batch_size > rows_per_block else batch_size


def units(prepared: Prepared) -> list[range]:
    """Row ranges that can be embedded one without the other: whole steps of every job that has any there to do."""
    unit = math.lcm(*(job.step for job in prepared.jobs))
    found: dict[int, range] = {}
    for job in prepared.jobs:
        for step in job.todo():
            known = found.setdefault(step.start // unit, step)
            found[step.start // unit] = range(min(known.start, step.start), max(known.stop, step.stop))
    return [found[number] for number in sorted(found)]


def embed_rows(prepared: Prepared, within: Sequence[range] | None = None) -> dict[tuple[str, str], int]:
    """Work through all jobs, unit by unit of rows, and write what they give.

    Args:
        prepared: networks and places.
        within: only these of `units`.

    Returns:
        How many rows were newly embedded, per (model, view).
    """
    dataset, jobs, device = prepared.task.dataset, prepared.jobs, prepared.task.device
    wanted = units(prepared)
    if within is not None:
        wanted = [rows for rows in wanted if any(rows.start in part for part in within)]
    todo = [(job, [step for step in job.todo() if any(step.start in rows for rows in wanted)]) for job in jobs]
    new_rows: dict[tuple[str, str], int] = {}
    total = sum(len(step) for _, steps in todo for step in steps)
    with (
        ThreadPoolExecutor(1, thread_name_prefix="write") as writers,
        progress(f"{dataset.name}", total) as advance,
        closing(decoded(dataset.decode, wanted)) as ready,
        _side_by_side(device) as map_batches,
    ):
        writing: deque[Future[None]] = deque()
        for rows, patches in ready:
            for job, steps in todo:
                for step in (step for step in steps if step.start in rows):
                    batch = patches[step.start - rows.start : step.stop - rows.start]
                    poolings = _forward(job, batch, device, map_batches)
                    writing.append(writers.submit(_write, job.writer, step, poolings))
                    if len(writing) > _UNITS_AHEAD:
                        writing.popleft().result()
                    key = (job.backbone.name, job.view.name)
                    new_rows[key] = new_rows.get(key, 0) + len(step)
                    advance(len(step))
        while writing:
            writing.popleft().result()
    if prepared.task.share.shared:
        for job in jobs:
            job.writer.sweep()
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


@contextmanager
def _side_by_side(device: torch.device) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over batches: on a CPU, as many at once as torch has threads."""
    if device.type != "cpu":
        yield map
        return
    n_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n_threads, "forward", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(n_threads)  # each thread's own, but also what later threads begin with


def _forward(
    job: _Job,
    patches: Sequence[NDArray[np.uint8]],
    device: torch.device,
    map_batches: Callable[..., Iterator[dict[str, Tensor]]],
) -> dict[str, Tensor]:
    """Embed a step batch by batch. Memory running out halves the batch instead of ending the run."""

    def embed_from(start: int) -> dict[str, Tensor]:
        batch = job.transform(patches[start : start + job.batch_size], device)
        return embed_batch(job.model, job.backbone, batch, precision=job.precision)

    while True:
        try:
            outputs = list(map_batches(embed_from, range(0, len(patches), job.batch_size)))
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
            if job.share.shared:
                raise UserError(
                    f"{job.backbone.name}: batches of {job.batch_size}, which all ranks share, do not fit in the "
                    f"memory of {device}. Finished blocks are kept. Close other programs there or leave this machine "
                    "to others: the same command elsewhere does the rest. Or begin another --store with a smaller "
                    "--batch-size."
                ) from error
            job.batch_size = _whole_blocks(job.batch_size // 2, job.writer.entry.rows_per_block)
            job.writer.set_batch_size(job.batch_size)
            say(f"{job.backbone.name}: out of memory on {device}; going on with batches of {job.batch_size}.")


def _write(writer: Writer, step: range, poolings: Mapping[str, Tensor]) -> None:
    """Write the missing blocks of a step; `.cpu()` waits here for the device, not in the main thread."""
    arrays = {name: values.cpu().numpy() for name, values in poolings.items()}
    for rows in writer.missing(step):
        part = slice(rows.start - step.start, rows.stop - step.start)
        writer.write(rows, {name: values[part] for name, values in arrays.items()})
