"""What must be there before the first embedding: networks, entries in the store, precision and batch size?

Several processes may extract the same dataset at once, on one machine or many. They agree through the store: the
precision and the batch size are those that the first of them recorded when it created the entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from extract.backbones import Backbone, Weights, build_model, check_forward, fetch_weights
from extract.compute import (
    choose_precision,
    compiled,
    embed_batch,
    largest_batch,
    optimize_for_inference,
    padded,
    require_as_on_cpu,
    settled,
    takes_openvino,
    worth_compiling,
)
from extract.custom import require_distinct
from extract.datasets import PatchDataset
from extract.openvino import NAME as OPENVINO
from extract.openvino import OpenvinoNetwork, version
from extract.pooling import pooling_widths
from extract.shard import Shard
from extract.views import Transform, View, make_transform, parse_view
from features.console import UserError, say
from features.device import compute_exactly, find_device, numerics
from features.entry import Entry
from features.fingerprint import fingerprint
from features.layout import rows_per_block
from features.store import FeatureStore, table_changed
from features.writer import Writer

_EXAMPLES = 8  # patches on which precision and folded networks are checked
_CPU_BATCH = 8  # larger batches leave the cache: a third slower for convolutions, no faster for transformers


@dataclass(frozen=True)
class ExtractOptions:
    """What the user may choose; everything else follows from the model's card.

    Attributes:
        views: input policies, see `parse_view`.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        precision: "auto", "fp32", "bf16" or "fp16"; see `choose_precision`.
        batch_size: images per forward pass; None finds one.
        overwrite: replace embeddings of the same name that were computed otherwise.
        fast: compile networks for NVIDIA GPUs where that pays, and have OpenVINO, where it is installed, compute
            convolutional ones in fp32 on processors. Both round otherwise, and entries go on as begun.
    """

    views: tuple[str, ...] = ("full",)
    device: str = "auto"
    precision: str = "auto"
    batch_size: int | None = None
    overwrite: bool = False
    fast: bool = True


DEFAULTS = ExtractOptions()


@dataclass(frozen=True)
class Extraction:
    """What to extract: which patches, by which models, into which store, and how.

    Attributes:
        dataset: the patches; its table is written to the store first.
        backbones: models, all held in memory at once so that one decode serves them all.
        store: where the embeddings go.
        options: device, views, precision, batch size.
        weights: a local checkpoint instead of the hub's; one backbone only.
        shard: which part of the work is this process's.
    """

    dataset: PatchDataset
    backbones: tuple[Backbone, ...]
    store: FeatureStore
    options: ExtractOptions = DEFAULTS
    weights: Path | None = None
    shard: Shard = Shard()

    @cached_property
    def device(self) -> torch.device:
        """Where the networks run."""
        return find_device(self.options.device, local_rank=self.shard.local_rank if self.shard.shared else None)

    @cached_property
    def examples(self) -> list[NDArray[np.uint8]]:
        """The first few patches."""
        return [self.dataset.decode(row) for row in range(min(_EXAMPLES, len(self.dataset.samples)))]


@dataclass
class Job:
    """One model and view in progress: its network, its transform, and its entry in the store."""

    backbone: Backbone
    view: View
    model: nn.Module
    transform: Transform
    precision: str
    batch_size: int
    writer: Writer
    shard: Shard

    @property
    def key(self) -> tuple[str, str]:
        """The names of model and view."""
        return self.backbone.name, self.view.name

    @property
    def step(self) -> int:
        """How many rows are computed together: whole blocks and whole forward batches."""
        return _step(self.writer.entry, self.batch_size)

    def steps(self) -> list[range]:
        """List the rows of every step of this shard in which a block is missing."""
        return _missing_steps(self.writer.entry, self.batch_size, self.shard)


@dataclass(frozen=True)
class Prepared:
    """Networks loaded and entries of the store opened: ready to embed."""

    extraction: Extraction
    jobs: list[Job]
    entries: dict[tuple[str, str], Entry]  # by model and view, as asked; a job's writer has the newer one

    def units(self) -> list[range]:
        """List row ranges that can be embedded independently: whole steps of every job that has work there."""
        unit = math.lcm(*(job.step for job in self.jobs))
        units: dict[int, range] = {}
        for job in self.jobs:
            for step in job.steps():
                rows = units.setdefault(step.start // unit, step)
                units[step.start // unit] = range(min(rows.start, step.start), max(rows.stop, step.stop))
        return [units[number] for number in sorted(units)]


def prepare(extraction: Extraction) -> Prepared:
    """Load the networks that have work to do, and open their entries in the store.

    Raises:
        UserError: as `extract.embed.extract_dataset`.
    """
    dataset, store, options, shard = extraction.dataset, extraction.store, extraction.options, extraction.shard
    if extraction.weights is not None and len(extraction.backbones) != 1:
        raise UserError(
            f"`weights` names one file, but {len(extraction.backbones)} models were asked for: give one `model`."
        )
    require_distinct(extraction.backbones)
    if options.overwrite and shard.shared:
        raise UserError(
            "`overwrite=True` is for one process: of several, each would discard what those before it have written. "
            "Start one alone with `shard='0/1'`, stop it at its first images, then start all without `overwrite=True`."
        )
    device = extraction.device
    compute_exactly(device)
    views = [parse_view(text) for text in dict.fromkeys(options.views)]
    attrs: dict[str, Any] = {
        "name": dataset.name,
        "source": dataset.source,
        "label_names": list(dataset.label_names),
        "mpp": dataset.mpp,
    } | ({"ordinal": True} if dataset.ordinal else {})
    if dataset.slides is not None:
        attrs["slides"] = dataset.slides.as_record()
    before = store.put_samples(
        dataset.name, dataset.samples, attrs=attrs, overwrite=options.overwrite, shared=shard.shared
    )
    if before is not None:
        say(f"{dataset.name}: {table_changed(before, dataset.label_names)}")

    jobs: list[Job] = []
    entries: dict[tuple[str, str], Entry] = {}
    for backbone in extraction.backbones:
        networks: dict[str, nn.Module] = {}  # by precision
        weights = fetch_weights(backbone, weights=extraction.weights)
        finished = {view.name: _finished_entry(extraction, backbone, weights, view) for view in views}
        unfinished = [view for view in views if finished[view.name] is None]
        if unfinished:
            model = build_model(
                backbone, weights, dynamic=any(view.resizes(backbone.input_size) for view in unfinished)
            ).to(device)
            for view in unfinished:
                check_forward(model, backbone, make_transform(backbone, view).input_size)
            images = make_transform(backbone, unfinished[0])(extraction.examples, device)
            networks["fp32"] = optimize_for_inference(model, device, example=images)
            del model
            if device.type == "mps":
                require_as_on_cpu(networks["fp32"], backbone, images[:1])
        for view in views:
            entry = finished[view.name]
            if entry is None:
                jobs.append(_make_job(extraction, backbone, weights, networks, view))
                entry = jobs[-1].writer.entry
            entries[backbone.name, view.name] = entry
    return Prepared(extraction, jobs, entries)


def fingerprint_parts(
    dataset: PatchDataset,
    backbone: Backbone,
    weights: Weights,
    view: View,
    *,
    precision: str,
    device: torch.device,
    compiled: bool = False,
) -> dict[str, Any]:
    """List everything that decides an embedding's numbers, as plain JSON values; the store hashes it."""
    return backbone_parts(backbone, weights, view, precision=precision, device=device, compiled=compiled) | {
        "source_mpp": dataset.mpp,
        "dataset_digest": dataset.samples.images_digest,
        **({} if dataset.slides is None else {"crop": dataset.slides.crop_record()}),
    }


def backbone_parts(
    backbone: Backbone,
    weights: Weights,
    view: View,
    *,
    precision: str,
    device: torch.device,
    compiled: bool = False,
) -> dict[str, Any]:
    """List those of `fingerprint_parts` that do not depend on the patches."""
    parts = {
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
    if device.type == "cpu":  # entries that torch computed have no such part
        return parts | ({"numerics": {"compiled": OPENVINO}} if compiled else {})
    return parts | {"numerics": numerics(device) | {"compiled": compiled}}


def whole_blocks(batch_size: int, rows_per_block: int) -> int:
    """Round a batch size down to whole blocks; one that is no larger than a block stays as it is.

    >>> whole_blocks(200, 64), whole_blocks(48, 64)
    (192, 48)
    """
    return batch_size - batch_size % rows_per_block if batch_size > rows_per_block else batch_size


def _step(entry: Entry, batch_size: int) -> int:
    return max(batch_size, entry.rows_per_block)


def _missing_steps(entry: Entry, batch_size: int, shard: Shard) -> list[range]:
    step = _step(entry, batch_size)
    # Steps are numbered from the first row on, missing or not, so that all shards number them alike at any time.
    numbers = sorted({block * entry.rows_per_block // step for block in entry.missing_blocks()})
    return [range(k * step, min((k + 1) * step, entry.n_rows)) for k in numbers if shard.includes(k)]


def _stored_entry(extraction: Extraction, backbone: Backbone, view: View) -> Entry | None:
    entries = extraction.store.entries(extraction.dataset.name, backbone.name)
    return next((entry for entry in entries if entry.view == view.name), None)


def _finished_entry(extraction: Extraction, backbone: Backbone, weights: Weights, view: View) -> Entry | None:
    """Find the stored entry if it was computed just as asked and this shard has nothing left to do; else None."""
    entry = _stored_entry(extraction, backbone, view)
    if entry is None:
        return None
    if not entry.complete and (entry.batch_size is None or _missing_steps(entry, entry.batch_size, extraction.shard)):
        return None
    options = extraction.options
    parts = fingerprint_parts(
        extraction.dataset,
        backbone,
        weights,
        view,
        precision=options.precision if options.precision != "auto" else str(entry.parts.get("precision")),
        device=extraction.device,
        compiled=options.fast and _is_compiled(entry.parts),
    )
    parts["poolings"] = entry.parts.get("poolings")
    return entry if fingerprint(parts) == entry.fingerprint else None


@dataclass(frozen=True)
class _Chosen:
    """How a view is computed: the network in its final form, and what of it decides the numbers."""

    network: nn.Module
    precision: str
    compiled: bool
    batch_size: int


def _make_job(
    extraction: Extraction, backbone: Backbone, weights: Weights, networks: dict[str, nn.Module], view: View
) -> Job:
    """Open the entry of a model and view; the process that creates it decides how all compute it.

    Args:
        extraction, backbone, weights, view: what is extracted.
        networks: by the precision that they hold their weights in, with that of "fp32"; others are added, and the one
            that OpenVINO computes by its name.
    """
    options, device, shared = extraction.options, extraction.device, extraction.shard.shared
    transform = make_transform(backbone, view)
    widths = pooling_widths(networks["fp32"], backbone)
    begun = None if options.overwrite else _stored_entry(extraction, backbone, view)
    if begun is not None and widths.keys() >= begun.poolings.keys():
        widths = {name: widths[name] for name in begun.poolings}  # an earlier version knew fewer

    def begin(chosen: _Chosen) -> Writer:
        parts = fingerprint_parts(
            extraction.dataset,
            backbone,
            weights,
            view,
            precision=chosen.precision,
            device=device,
            compiled=chosen.compiled,
        )
        return extraction.store.begin(
            extraction.dataset.name,
            model=backbone.name,
            view=view.name,
            poolings=widths,
            card_pooling=backbone.card_pooling,
            parts=parts | {"poolings": dict(widths)},
            overwrite=options.overwrite,
            batch_size=chosen.batch_size,
            shared=shared,
        )

    recorded = _recorded_parts(extraction, backbone, weights, view)
    chosen = _choose(extraction, backbone, networks, view, recorded)
    try:
        writer = begin(chosen)
    except UserError:
        # Another process may have created the entry since, on a machine where the options mean something else.
        since = _recorded_parts(extraction, backbone, weights, view)
        if since == recorded:
            raise
        chosen = _choose(extraction, backbone, networks, view, since)
        writer = begin(chosen)
    batch_size = _agree_on_batch_size(writer, chosen.batch_size, asked=options.batch_size, shared=shared)
    return Job(backbone, view, chosen.network, transform, chosen.precision, batch_size, writer, extraction.shard)


def _choose(
    extraction: Extraction,
    backbone: Backbone,
    networks: dict[str, nn.Module],
    view: View,
    recorded: Mapping[str, Any] | None,
) -> _Chosen:
    """Choose precision, batch size, and whether to compile: as recorded, where the options leave it open."""
    options, device = extraction.options, extraction.device
    images = make_transform(backbone, view)(extraction.examples, device)
    wanted = str(recorded["precision"]) if recorded and options.precision == "auto" else options.precision
    precision = choose_precision(wanted, backbone, networks["fp32"], images)
    if precision not in networks:
        networks[precision] = settled(networks["fp32"], backbone, images, precision=precision)
    network = networks[precision]
    batch_size = _choose_batch_size(extraction, backbone, network, view, images[:1], precision)
    fast = None
    if recorded is not None:
        worth = _is_compiled(recorded)
    elif device.type == "cpu":
        worth = version() is not None  # converting takes no longer than embedding some 50 patches
    else:
        worth = worth_compiling(backbone, len(extraction.dataset.samples))
    can = device.type == "cuda" or takes_openvino(network, device, precision=precision)
    if options.fast and worth and can:
        batch = padded(images[:batch_size], batch_size)
        fast = compiled(network, backbone, batch, precision=precision, earlier=networks.get(OPENVINO))
        if isinstance(fast, OpenvinoNetwork):
            networks[OPENVINO] = fast  # serves all views
    return _Chosen(network if fast is None else fast, precision, fast is not None, batch_size)


def _is_compiled(parts: Mapping[str, Any]) -> bool:
    return bool(parts.get("numerics", {}).get("compiled"))


def _recorded_parts(
    extraction: Extraction, backbone: Backbone, weights: Weights, view: View
) -> Mapping[str, Any] | None:
    """Find the parts of the fingerprint under which this network, view and device were used before; None if never.

    So an interrupted run continues as it began, and all datasets of a store are embedded alike.
    """
    entries = extraction.store.entries(model=backbone.name)
    for entry in sorted(entries, key=lambda entry: entry.dataset != extraction.dataset.name):  # this dataset's first
        parts = entry.parts
        same = parts.get("weights_sha256") == weights.sha256 and parts.get("device") == extraction.device.type
        if same and entry.view == view.name:
            return parts
    return None


def _choose_batch_size(
    extraction: Extraction, backbone: Backbone, model: nn.Module, view: View, image: Tensor, precision: str
) -> int:
    """Choose the batch size: the one asked for, else the recorded one, else the one that suits this device."""
    options = extraction.options
    stored = None if options.overwrite else _stored_entry(extraction, backbone, view)
    batch_size = options.batch_size or (stored.batch_size if stored else None)
    if batch_size is None and extraction.device.type == "cpu":
        batch_size = _CPU_BATCH
    elif batch_size is None:

        def forward(n: int) -> None:
            embed_batch(model, backbone, image.expand(n, -1, -1, -1), precision=precision)

        batch_size = largest_batch(forward, device=extraction.device)
    return whole_blocks(batch_size, rows_per_block(len(extraction.dataset.samples)))


def _agree_on_batch_size(writer: Writer, batch_size: int, *, asked: int | None, shared: bool) -> int:
    """Agree on the batch size to go on with: the recorded one, unless the user of a single process asks for another."""
    recorded = writer.entry.batch_size
    if recorded is not None and recorded != batch_size:
        if asked is None:
            return recorded
        if shared:
            raise UserError(
                f"{writer.entry.name} was begun with batches of {recorded}, now `batch_size` says {batch_size}: all "
                "processes must use one size, or the last bits differ from block to block. Leave `batch_size` out to "
                "go on as begun."
            )
    if recorded != batch_size:
        writer.set_batch_size(batch_size)
    return batch_size
