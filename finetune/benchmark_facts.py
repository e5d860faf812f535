"""What does a benchmark need, and what of it is here: patches, folds, weights?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants

from extract import hub
from extract.backbones import Backbone, find_backbone
from extract.datasets import DATASETS, load_dataset, local_data, parse_source
from extract.doctor import DoctorOptions, ModelCheck, diagnose
from features.console import UserError
from features.device import find_device
from features.exchange import IMPORTED
from features.labels import Classes, parse_renaming
from features.samples import Samples
from features.store import FeatureStore
from finetune.benchmark_cost import Counts
from finetune.benchmark_plan import Plan, Where, read_plan, require_parsable
from probe.experiment import make_experiment


@dataclass(frozen=True, eq=False)
class Facts:
    """What does not change while a benchmark runs.

    Attributes:
        plan, where: what is asked, and where things are.
        device: on which it runs.
        backbones: the models' records.
        lacks: model to why it cannot be had (in a few words) and what helps.
        downloads: model to bytes of its weights, where they are not here yet.
        problem: as `lacks`, of the patches; None if they are here, or can be downloaded.
        tables: dataset to digest of its patch table, and of its images; empty if they are not here yet.
        counts: of patches, by `Row.fold_options`.
        refusals: why rows cannot be run on these patches, likewise: no such folds, or no votes.
        notes: what else is to be said beforehand.
    """

    plan: Plan
    where: Where
    device: torch.device
    backbones: Mapping[str, Backbone]
    lacks: Mapping[str, tuple[str, str]]
    downloads: Mapping[str, float]
    problem: tuple[str, str] | None
    tables: Mapping[str, tuple[str, str]]
    counts: Mapping[Any, Counts]
    refusals: Mapping[Any, str]
    notes: tuple[str, ...]

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The datasets' names in store and runs."""
        return tuple(self.tables) or tuple(n if n in DATASETS else parse_source(n)[0] for n in self.plan.datasets)


def gather(plan_name: str, where: Where) -> Facts:
    """Find out what a benchmark needs, and what of it is here. Nothing is downloaded and nothing is written.

    Raises:
        UserError: a faulty plan, or a device that is not here.
    """
    device = find_device(where.device, apple=False)
    plan = read_plan(plan_name)
    data = local_data(where.data)
    absent = [name for name in plan.test if not _is_here(name, data)]
    if absent:
        plan = read_plan(plan_name, without=absent)
    require_parsable(plan)
    notes = [f"{name} is not in {data} and will not be scored." for name in absent]
    notes += [f"{note}." for note in plan.notes]
    problem, loaded = None, {}
    if not _is_here(plan.train, data):
        folder = DATASETS[plan.train].folder or DATASETS[DATASETS[plan.train].of].folder
        remedy = (
            f"{data} has no folder {folder}. Expected a clone of AMi-Br_Benchmark: give its path with `data`, or leave "
            "it out, and unset MITOFM_DATA, to download the patches."
        )
        problem = (f"no patches of {plan.train}", remedy)
    elif data is None and any(map(_has_files, plan.datasets)):
        notes.append("The patches are not here yet and will be downloaded (215 MB) by the first command.")
    else:
        try:
            loaded = _load(plan, where)
        except UserError as error:
            problem = ("its patches cannot be used", str(error))
    counts, refusals = _count(plan, loaded)
    backbones, lacks, downloads = _backbones(plan, where)
    return Facts(
        plan=plan,
        where=where,
        device=device,
        backbones=backbones,
        lacks=lacks,
        downloads=downloads,
        problem=problem,
        tables={name: (of.samples.table_digest, of.samples.images_digest) for name, of in loaded.items()},
        counts=counts,
        refusals=refusals,
        notes=tuple(notes),
    )


def _has_files(name: str) -> bool:
    return name in DATASETS and bool(DATASETS[name].phases or DATASETS[name].folder)


def _is_here(name: str, data: Path | None) -> bool:
    """Whether a known dataset is in the data folder; without one it can be downloaded. Paths are for the reader."""
    if data is None or not _has_files(name):
        return True
    return (data / (DATASETS[name].folder or DATASETS[DATASETS[name].of].folder)).is_dir()


class _Table(NamedTuple):
    """The patch table of a dataset: of `PatchDataset`, or of a store where no patches came with embeddings."""

    samples: Samples
    label_names: Classes


def _load(plan: Plan, where: Where) -> dict[str, _Table]:
    """Load the patch tables as fine-tuning does: those of the tests by the classes of the training set."""
    if of_store := _imported_tables(plan, where):
        return of_store
    data = where.data
    reading = dict(plan.reading)
    renamed = parse_renaming(reading.get("labels"))
    shared: dict[str, Any] = {"labels": renamed, "skip_unlabelled": reading.get("skip_unlabelled", False)}
    patches = load_dataset(
        plan.train,
        data=data,
        positive=reading.get("positive"),
        order=reading.get("classes"),
        ordinal=reading.get("ordinal", False),
        **shared,
    )
    tests = [load_dataset(name, data=data, classes=patches.label_names, **shared) for name in plan.datasets[1:]]
    return {one.name: _Table(one.samples, one.label_names) for one in (patches, *tests)}


def _imported_tables(plan: Plan, where: Where) -> dict[str, _Table]:
    """Read the tables that the store alone knows, because embeddings were imported without patches."""
    if not all(row.imported for row in plan.rows) or not where.has_store:
        return {}
    store = FeatureStore.open(where.store)
    if not set(plan.datasets) <= set(store.datasets()):
        return {}
    if not all(str(store.dataset_attrs(name).get("source", "")).startswith(IMPORTED) for name in plan.datasets):
        return {}
    return {name: _Table(store.samples(name), store.class_names(name)) for name in plan.datasets}


def _count(plan: Plan, loaded: Mapping[str, _Table]) -> tuple[dict[Any, Counts], dict[Any, str]]:
    """Count the patches of every fold assignment; of datasets that are not here, by what is published of them."""
    counts, refusals = {}, {}
    for asked in {row.fold_options for row in plan.rows}:
        cv, fold_seed, paper_folds, soft_labels, folds_by = asked
        if not loaded:
            sizes = [DATASETS[name].n_atypical + DATASETS[name].n_normal for name in plan.datasets if name in DATASETS]
            n = sizes[0] if plan.train in DATASETS and sizes else 0
            counts[asked] = Counts(sum(sizes), n, n * (cv - 1))
            continue
        train = next(iter(loaded))
        try:
            experiment = make_experiment(
                train,
                {name: patches.samples for name, patches in loaded.items()},
                cv=cv,
                fold_seed=fold_seed,
                paper_folds=paper_folds,
                classes=loaded[train].label_names,
                soft_labels=soft_labels,
                folds_by=folds_by,
            )
        except UserError as error:
            refusals[asked] = str(error)
            continue
        n_patches = sum(len(patches.samples) for patches in loaded.values())
        counts[asked] = Counts(n_patches, len(experiment.rows), int(experiment.folds.training.sum()))
    return counts, refusals


def _backbones(plan: Plan, where: Where) -> tuple[dict[str, Backbone], dict[str, tuple[str, str]], dict[str, float]]:
    """Find the records of all models, what keeps those on the hub from being had, and the bytes to download."""
    downloads: dict[str, float] = {}
    backbones: dict[str, Backbone] = {}
    lacks: dict[str, tuple[str, str]] = {}
    for model in dict.fromkeys(row.model for row in plan.rows if not row.imported):
        try:
            backbones[model] = find_backbone(model)
        except UserError as error:
            lacks[model] = ("no such model can be asked for", str(error))
    asked = tuple(model for model, backbone in backbones.items() if backbone.hub_id)
    if asked:
        diagnosis = diagnose(DoctorOptions(asked, data=where.data, store=None, runs=where.runs))
        for check in diagnosis.models:
            if check.status != "ok":
                lacks[check.name] = _lack(check, backbones[check.name])
            elif not check.cached:
                downloads[check.name] = 4.0 * backbones[check.name].n_parameters
    return backbones, lacks, downloads


# A plan names no files of weights: what is in it is the same on every machine.
_BY_HAND = (
    "run this model's commands yourself, with --weights FILE appended (fm-benchmark --json lists them): rows that were "
    "run so count as done"
)


def _lack(check: ModelCheck, backbone: Backbone) -> tuple[str, str]:
    """Say in a few words why a model's weights cannot be had, and what helps in a plan."""
    if check.access == "not asked":
        gate = f"is gated: request access on {backbone.url} (licence: {backbone.licence}). It " if check.gated else ""
        remedy = (
            f"{backbone.hub_id} {gate}is not in the cache {constants.HF_HUB_CACHE}, and the hub was not asked for it "
            f"(fm-doctor says why). Connect, or {_BY_HAND}."
        )
        reason = "gated, not in the cache, hub not asked" if check.gated else "weights cannot be had"
        return reason, remedy
    remedy = check.remedy.replace(hub.LOCAL_FILE, _BY_HAND)
    return "gated, no access" if check.access == "not granted" and check.gated else "weights cannot be had", remedy
