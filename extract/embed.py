"""How do patches become embeddings? Decode, forward and write, overlapped; every model and view from one decode.

Three stages run at once: a few threads decode the next patches, the main thread runs the networks, and one thread
writes whole blocks to the store. On a CPU, batches run side by side in one thread each. A busy core then delays one
batch and not all of them, and the last bits of an embedding do not depend on the number of threads. On an NVIDIA GPU
the main thread only hands out work: patches and embeddings are copied beside it, and the writing thread waits for the
step that it writes.

Only the store remembers what is done, so an interrupted run continues where the store ends. Which images share a
forward pass depends on the row number and the recorded batch size alone, not on where a run was interrupted or which
process computes it: a store that was resumed, or written by many processes, equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.backbones import Backbone
from extract.compute import embed_shown, fetch, mark, padded, side_by_side
from extract.datasets import Decode, PatchDataset
from extract.prepare import DEFAULTS, Extraction, ExtractOptions, Job, Prepared, prepare, whole_blocks
from extract.shard import Shard
from features.console import UserError, progress, rate, say
from features.device import free_cached_memory, out_of_memory
from features.store import FeatureStore
from features.writer import Writer

Rows = TypeVar("Rows", bound=Sequence[int])
_UNITS_AHEAD = 2  # decoded, or waiting to be written
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Summary:
    """How long one model and view took, and how it was computed. Seconds run from the first decode to the last write.

    `n_new` counts the rows that this process embedded, `n_missing` all blocks that were missing when it ended.
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
        """Make one sentence of the summary; for one of several shards it also says whether all is complete now."""
        head = f"{self.dataset} / {self.model} / {self.view}: "
        if self.n_ranks > 1:
            head = f"rank {self.rank} of {self.n_ranks}: {head}"
        if self.n_new:
            done = (
                f"{self.n_new:,} of {self.n_rows:,} patches in {self.seconds:.1f} s "
                f"({rate(self.images_per_second)}, {self.precision} on {self.device}, batch {self.batch_size})"
            )
        elif self.n_ranks > 1 and self.n_missing:
            done = "nothing left to do in this share"
        else:
            done = f"all {self.n_rows:,} patches were already in the store"
        if self.n_missing:
            return f"{head}{done}; not complete yet, {self.n_missing:,} blocks are left to other ranks"
        return f"{head}{done}; complete" if self.n_ranks > 1 and self.n_new else head + done


def extract_dataset(
    dataset: PatchDataset,
    backbones: Sequence[Backbone],
    *,
    store: FeatureStore,
    options: ExtractOptions = DEFAULTS,
    weights: Path | None = None,
    shard: Shard = Shard(),
) -> list[Summary]:
    """Embed every patch of `dataset` by every backbone in every view, and write all poolings to the store.

    Blocks that are already there are kept; only missing ones are computed. `Extraction` describes the arguments.

    Returns:
        One summary per (backbone, view), in that order.

    Raises:
        UserError: if embeddings of another fingerprint are in the way, weights are missing or do not fit, a patch
            cannot be decoded, an embedding is not finite, or the disk is full. Finished blocks are kept.
    """
    prepared = prepare(Extraction(dataset, tuple(backbones), store, options, weights, shard))
    started = time.perf_counter()
    n_new = embed_rows(prepared)
    return summaries(prepared, n_new, seconds=time.perf_counter() - started)


def summaries(prepared: Prepared, n_new: Mapping[tuple[str, str], int], *, seconds: float) -> list[Summary]:
    """Summarise each model and view, after `n_new` rows of it were embedded in `seconds`."""
    extraction = prepared.extraction
    entries = prepared.entries | {job.key: job.writer.entry for job in prepared.jobs}
    return [
        Summary(
            dataset=extraction.dataset.name,
            model=model,
            view=view,
            n_rows=entry.n_rows,
            n_new=n_new.get((model, view), 0),
            seconds=seconds,
            images_per_second=n_new.get((model, view), 0) / seconds,
            precision=str(entry.parts["precision"]),
            batch_size=entry.batch_size,
            device=extraction.device.type,
            fingerprint=entry.fingerprint,
            rank=extraction.shard.index,
            n_ranks=extraction.shard.n_shards,
            n_missing=len(entry.missing_blocks()),
        )
        for (model, view), entry in entries.items()
    ]


def embed_rows(prepared: Prepared, within: Sequence[range] | None = None) -> Counter[tuple[str, str]]:
    """Embed all missing rows, unit by unit, and write them to the store.

    Args:
        prepared: networks and entries.
        within: only these of `prepared.units()`; None for all.

    Returns:
        How many rows were newly embedded, per (model, view).
    """
    extraction, jobs = prepared.extraction, prepared.jobs
    units = prepared.units()
    if within is not None:
        units = [rows for rows in units if any(rows.start in part for part in within)]
    steps = [(job, [step for step in job.steps() if any(step.start in rows for rows in units)]) for job in jobs]
    n_new: Counter[tuple[str, str]] = Counter()
    total = sum(len(step) for _, job_steps in steps for step in job_steps)
    with (
        ThreadPoolExecutor(1, thread_name_prefix="write") as writers,
        progress(extraction.dataset.name, total) as advance,
        closing(decoded(extraction.dataset.decode, units, device=extraction.device)) as ready,
        side_by_side(extraction.device, torch.get_num_threads()) as map_batches,
    ):
        writing: deque[Future[None]] = deque()
        for rows, patches in ready:
            for job, job_steps in steps:
                for step in (step for step in job_steps if step.start in rows):
                    batch = patches[step.start - rows.start : step.stop - rows.start]
                    poolings = _forward(job, batch, extraction.device, map_batches)
                    writing.append(writers.submit(_write, job.writer, step, poolings, mark(extraction.device)))
                    if len(writing) > _UNITS_AHEAD:
                        writing.popleft().result()
                    n_new[job.key] += len(step)
                    advance(len(step))
        while writing:
            writing.popleft().result()
    if extraction.shard.shared:
        for job in jobs:
            job.writer.sweep()
    return n_new


def decoded(
    decode: Decode, units: Sequence[Rows], *, device: torch.device = _CPU
) -> Generator[tuple[Rows, list[NDArray[np.uint8]]], None, None]:
    """Yield each unit of rows with its decoded patches, while threads decode the next units.

    Close the generator if you leave it early: its threads then stop.

    Args:
        decode: row -> its patch, (height, width, 3).
        units: the rows, in the order in which they are wanted.
        device: where the networks run; on a CPU they need half of the cores.
    """
    n_cores = os.cpu_count() or 2
    n_decoders = max(1, min(8, n_cores // 2)) if device.type == "cpu" else min(16, n_cores)
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


def _forward(
    job: Job,
    patches: Sequence[NDArray[np.uint8]],
    device: torch.device,
    map_batches: Callable[..., Iterator[dict[str, Tensor]]],
) -> dict[str, Tensor]:
    """Embed a step batch by batch. Where memory runs out, the batch is halved and the run goes on."""

    def embed_from(start: int) -> dict[str, Tensor]:
        images = job.transform(patches[start : start + job.batch_size], device)
        shown = (padded(one, job.batch_size) for one in job.transform.shown(images))
        outputs = embed_shown(job.model, job.backbone, shown, precision=job.precision)
        return {name: values[: len(images)] for name, values in outputs.items()}

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
                    "Close other programs there, use a smaller model, or `device='cpu'`."
                ) from error
            free_cached_memory(device)
            if job.shard.shared:
                raise UserError(
                    f"{job.backbone.name}: batches of {job.batch_size}, which all ranks share, do not fit in the "
                    f"memory of {device}. Finished blocks are kept. Close other programs there or leave this machine "
                    "to others: the same command elsewhere does the rest. Or begin another `store` with a smaller "
                    "`batch_size`."
                ) from error
            job.batch_size = whole_blocks(job.batch_size // 2, job.writer.entry.rows_per_block)
            job.writer.set_batch_size(job.batch_size)
            say(f"{job.backbone.name}: out of memory on {device}; going on with batches of {job.batch_size}.")


def _write(writer: Writer, step: range, poolings: Mapping[str, Tensor], done: torch.cuda.Event | None) -> None:
    """Write the missing blocks of a step; this thread waits for the device, and not the main one."""
    arrays = fetch(poolings, done)
    for rows in writer.missing(step):
        part = slice(rows.start - step.start, rows.stop - step.start)
        writer.write(rows, {name: values[part] for name, values in arrays.items()})
