"""What of a benchmark is done, what can go on, and what cannot be run here, and why?

A row knows its run by the record that the command writes: the same options on the same patches, whoever ran it. So
nothing but runs and store remembers where a benchmark stands.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants

from extract.backbones import Backbone
from features.console import UserError
from features.entry import Entry
from features.files import check_folder
from features.store import FeatureStore
from finetune.benchmark_cost import Estimate, device_memory, estimate, measure_rates
from finetune.benchmark_facts import Facts
from finetune.benchmark_plan import EMBED, PROBE, Row, Where
from finetune.checkpoint import START_FILE, epochs_done, read_start
from finetune.options import FinetuneOptions, is_convolutional
from finetune.recipes import Recipe
from probe.probing import ProbeOptions
from probe.records import RunRecord
from probe.runs import read_run

State = Literal["done", "to resume", "to do", "cannot", "failed"]


@dataclass(frozen=True)
class Standing:
    """Where a row stands.

    Attributes:
        row: of the plan.
        state: "failed" after it was tried, and only until the next look.
        reason: why it cannot be run, or failed; in a few words.
        remedy: what helps.
        run: the folder of its run, finished or interrupted.
        done: the fraction that is there already, of the embeddings of each view, or of the epochs ("").
        estimate: what it would take, or what is left of it; None where that cannot be said.
    """

    row: Row
    state: State
    reason: str = ""
    remedy: str = ""
    run: Path | None = None
    done: Mapping[str, float] = field(default_factory=dict)
    estimate: Estimate | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """What is on the disk now: finished runs, newest first, interrupted trainings, and what the store holds.

    `tables` are the digests of the patch tables in the store, by dataset.
    """

    runs: tuple[RunRecord, ...]
    starts: tuple[tuple[Path, Mapping[str, Any]], ...]
    entries: Mapping[tuple[str, str, str], Entry]
    tables: Mapping[str, str]


# --------------------------------------------------------------------------------------------------- what is there now


def look(where: Where) -> Found:
    """Read what runs and store hold now. What is damaged counts as not there; a new run then takes its place."""
    runs, starts = [], []
    for folder in sorted(where.runs.iterdir()) if where.runs.is_dir() else []:
        with suppress(UserError):
            if (folder / "run.json").is_file():
                runs.append(read_run(folder))
            elif (folder / START_FILE).is_file():
                starts.append((folder, read_start(folder)))
    entries: dict[tuple[str, str, str], Entry] = {}
    tables: dict[str, str] = {}
    if where.has_store:
        with suppress(UserError):
            store = FeatureStore.open(where.store)
            entries = {(one.dataset, one.model, one.view): one for one in store.entries()}
            tables = {name: str(store.dataset_attrs(name).get("table_digest")) for name in store.datasets()}
    by_date = sorted(runs, key=lambda record: record.created, reverse=True)
    last_first = sorted(starts, key=lambda start: (start[0] / START_FILE).stat().st_mtime, reverse=True)
    return Found(tuple(by_date), tuple(last_first), entries, tables)


def standing(row: Row, facts: Facts, found: Found) -> Standing:
    """Say where a row stands, but for what it would take."""
    run = _finished(row, facts, found)
    # Embeddings of the same images whose labels or groups have changed stay; the command renews their table.
    renewed = all(found.tables.get(name) == digest for name, (digest, _) in facts.tables.items())
    if run is not None or (row.method == EMBED and renewed and _is_embedded(row, facts, found)):
        return Standing(row, "done", run=run)
    if facts.problem is not None:
        return Standing(row, "cannot", *facts.problem)
    if refusal := facts.refusals.get(row.fold_options):
        return Standing(row, "cannot", "not on these patches", refusal)
    if row.imported and not _is_embedded(row, facts, found):
        names = ", ".join(facts.dataset_names)
        remedy = (
            f"{facts.where.store} has no imported embeddings of {names} by {row.model}, whole and in one view. Import "
            f"them: fm-store import FILE --model {row.model} --dataset {names} --store {facts.where.store}"
        )
        return Standing(row, "cannot", "not imported", remedy)
    if row.model in facts.lacks and not (row.method == PROBE and _is_embedded(row, facts, found)):
        return Standing(row, "cannot", *facts.lacks[row.model])
    begun = next((folder for folder, start in found.starts if _is_start_of(row, start, facts)), None)
    done = _done(row, begun, facts, found)
    return Standing(row, "to do" if begun is None and not any(done.values()) else "to resume", run=begun, done=done)


def _entry(name: str, row: Row, view: str, facts: Facts, found: Found) -> Entry | None:
    """Find a dataset's entry by the row's model in a view; None if there is none, or of other images."""
    entry = found.entries.get((name, row.model, view))
    digest = None if entry is None else entry.parts.get("dataset_digest")
    other = name in facts.tables and digest not in (None, facts.tables[name][1])
    return None if other else entry


def _is_embedded(row: Row, facts: Facts, found: Found) -> bool:
    """Whether the store holds every dataset, of the images that are here, by the row's model in its views."""
    names = facts.dataset_names
    views = row.views
    if row.imported and not views:  # any that all datasets have
        of = [
            {view for dataset, model, view in found.entries if (dataset, model) == (name, row.model)} for name in names
        ]
        views = tuple(set.intersection(*of))
        if not views:
            return False
    entries = [_entry(name, row, view, facts, found) for name in names for view in views]
    return all(entry is not None and entry.complete for entry in entries)


def _done(row: Row, begun: Path | None, facts: Facts, found: Found) -> dict[str, float]:
    """Say which fraction is there of an unfinished row: of the patches in each view, or of the epochs ("")."""
    counts = facts.counts.get(row.fold_options)
    if row.method == EMBED and counts is not None:
        names = facts.dataset_names
        entries = {view: [_entry(name, row, view, facts, found) for name in names] for view in row.views}
        n_rows = {view: sum(e.n_rows * e.n_done / e.n_blocks for e in of if e) for view, of in entries.items()}
        return {view: min(1.0, n / counts.patches) for view, n in n_rows.items()}
    if begun is not None and isinstance(row.options, FinetuneOptions):
        with suppress(UserError):  # the command says it
            n_epochs = row.options.resolved_recipe(facts.backbones[row.model]).epochs
            return {"": min(1.0, epochs_done(begun) / (n_epochs * row.options.seeds * row.options.cv))}
    return {}


def _finished(row: Row, facts: Facts, found: Found) -> Path | None:
    """Find the newest run of the same options on the same patches."""
    if row.options is None:
        return None
    for record in found.runs:
        same_train = record.train == facts.dataset_names[0]
        if record.model != row.model or not same_train or not _same_tables(record.table_digests, facts):
            continue
        with suppress(UserError, KeyError, TypeError, ValueError):  # options of an early version, or of a later one
            if isinstance(row.options, FinetuneOptions):
                if record.kind == "finetune" and _same_training(
                    record.options, record.view, record.recipe or {}, row.options, facts.backbones[row.model]
                ):
                    return record.folder
            elif record.kind == "probe" and not record.combined and _same_probe(record, row, found):
                return record.folder
    return None


def _same_tables(digests: Mapping[str, str], facts: Facts) -> bool:
    """Whether a run trained and tested on the plan's patches; if these are not here, on datasets of the same names."""
    if not facts.tables:
        return digests.keys() == set(facts.dataset_names)
    return dict(digests) == {name: digest for name, (digest, _) in facts.tables.items()}


# Options whose meaning a record tells otherwise: patches by their tables, images by view, a training by its recipe.
_MEANT = ("train", "test", "view", "epochs", "batch_size", "learning_rate", "tta")


def _same_training(
    recorded: Mapping[str, Any], view: str, recipe: Mapping[str, Any], asked: FinetuneOptions, backbone: Backbone
) -> bool:
    """Whether a training is the one asked for: by the same options, or by others that mean the same today."""
    options = FinetuneOptions.from_record(recorded)
    wanted, had = asked.resolved_recipe(backbone), Recipe.from_record(recipe)
    # A patience of all epochs and more is one that never ends a training.
    alike = [replace(one, patience=min(one.patience, one.epochs)) for one in (wanted, had)]
    same_meaning = alike[0] == alike[1] and view == asked.resolved_view(backbone, wanted).name
    of_its_own = {name: getattr(options, name) for name in (*_MEANT, *(["cv"] * bool(asked.folds_by)))}
    return same_meaning and options == replace(asked, **of_its_own)


def _is_start_of(row: Row, start: Mapping[str, Any], facts: Facts) -> bool:
    if not isinstance(row.options, FinetuneOptions):
        return False
    identity = start["identity"]
    with suppress(UserError, KeyError, TypeError, ValueError):
        digests = {facts.dataset_names[0]: identity["table"], **identity["tests"]}
        same_device = identity["backbone"].get("device") == facts.device.type  # another would be refused
        view, backbone = identity["backbone"]["view"], facts.backbones[row.model]
        same = _same_training(identity["options"], view, identity["recipe"], row.options, backbone)
        return same and same_device and _same_tables(digests, facts)
    return False


def _same_probe(record: RunRecord, row: Row, found: Found) -> bool:
    """Whether a probe had the row's options, chose from its views, and read the embeddings that the store has."""
    assert isinstance(row.options, ProbeOptions)
    asked, recorded = (
        json.loads(json.dumps(asdict(ProbeOptions()) | dict(options)))
        for options in (asdict(row.options), record.options)
    )
    whatever = {"device", *_MEANT} | ({"cv"} if row.options.folds_by else set())
    tried = {candidate.view for candidate in record.candidates or ()} or {record.view}
    same = all(asked[name] == recorded.get(name) for name in asked.keys() - whatever)
    same = same and (tried == set(row.views) or not row.views)
    entries = {name: found.entries.get((name, row.model, record.view)) for name in record.fingerprints}
    return same and all(
        entry is None or entry.fingerprint == record.fingerprints[name] for name, entry in entries.items()
    )


# ------------------------------------------------------------------------------------------------------------ survey


def survey(facts: Facts) -> list[Standing]:
    """Say of every row where it stands, and of those that are left what they would take and whether there is room.

    Raises:
        UserError: the runs, or embeddings that are left, cannot be written where they should be.
    """
    check_folder(facts.where.runs, name="runs")
    found = look(facts.where)
    rows = [standing(row, facts, found) for row in facts.plan.rows]
    left = [one for one in rows if one.state in ("to do", "to resume")]
    if any(one.row.method == EMBED for one in left):
        FeatureStore.check_place(facts.where.store)
    kinds = {is_convolutional(facts.backbones[one.row.model]) for one in left if one.row.method != PROBE}
    rates = measure_rates(facts.device, kinds)
    memory, room = device_memory(facts.device), _Room()
    downloads = dict(facts.downloads)
    surveyed = []
    for one in rows:
        backbone, counts = facts.backbones.get(one.row.model), facts.counts.get(one.row.fold_options)
        if one.state != "done" and backbone is not None and counts is not None:
            with suppress(UserError):  # what this says, the command says
                one = replace(one, estimate=estimate(one.row, backbone, counts, rates, facts.device, done=one.done))
        if one.estimate is not None and one.state in ("to do", "to resume"):
            needed: list[tuple[float, float, Path | str, str]] = [
                (downloads.pop(one.row.model, 0.0), 0.0, Path(constants.HF_HUB_CACHE), "HF_HOME"),
                (one.estimate.store, 0.0, facts.where.store, "`store`"),
                (one.estimate.runs, one.estimate.checkpoint, facts.where.runs, "`runs`"),
            ]
            one = _unless_too_large(one, one.estimate, memory, facts.device)
            if one.state != "cannot":
                one = _if_there_is_room(one, needed, room)
        surveyed.append(one)
    without = {one.row.model: one for one in surveyed if one.row.method == EMBED and one.state == "cannot"}
    return [
        replace(one, state="cannot", reason=without[one.row.model].reason, remedy=without[one.row.model].remedy)
        if one.row.method == PROBE and one.state == "to do" and one.row.model in without
        else one
        for one in surveyed
    ]


class _Room:
    """What is left on the disks, of which rows take one after another."""

    def __init__(self) -> None:
        self.left: dict[int, float] = {}

    def take(self, path: Path, n_bytes: float, beside: float) -> float | None:
        """Take room below a path, with some beside it for a while; or return how much there is if it is too little."""
        folder = next(one for one in (path.absolute(), *path.absolute().parents) if one.is_dir())
        disk = folder.stat().st_dev
        left = self.left.setdefault(disk, float(shutil.disk_usage(folder).free))
        if n_bytes + beside > left:
            return left
        self.left[disk] = left - n_bytes
        return None


def _unless_too_large(one: Standing, needs: Estimate, memory: float, device: torch.device) -> Standing:
    if needs.fixed <= memory:
        return one
    remedy = (
        f"it needs about {gigabytes(needs.fixed)} for what must be in memory at once, and {device} has "
        f"{gigabytes(memory)}. Run this row where there is more."
    )
    return replace(one, state="cannot", reason="memory", remedy=remedy)


def _if_there_is_room(one: Standing, needed: Sequence[tuple[float, float, Path | str, str]], room: _Room) -> Standing:
    for n_bytes, beside, path, choose in needed:
        if n_bytes and "://" not in str(path) and (free := room.take(Path(path), n_bytes, beside)) is not None:
            remedy = (
                f"it needs about {gigabytes(n_bytes + beside)} at {path}, where {gigabytes(free)} are left after the "
                f"rows before it. Make room, or choose another folder with {choose}."
            )
            return replace(one, state="cannot", reason="disk", remedy=remedy)
    return one


def gigabytes(n_bytes: float) -> str:
    """Say a number of bytes in GB.

    >>> gigabytes(23_400_000_000), gigabytes(40_000_000)
    ('23.4 GB', '0.04 GB')
    """
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e9:,.2f} GB"
