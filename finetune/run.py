"""How is one backbone fine-tuned: prepare, train, score, write the run?

Training data alone decide folds, recipe and the epochs kept; test patches are only scored. A run's folder appears at
once, with `training.json` and soon a checkpoint (`finetune.checkpoint`). What makes it a run is written at the end:
each fold's weights, the predictions for held-out slides and test sets, and last `run.json`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from extract.custom import is_code, named_again
from features.console import Interrupted, UserError, progress, say
from features.device import keeping_freed_memory
from features.files import writing
from features.fingerprint import differences, fingerprint
from finetune.checkpoint import RESUME, START_FILE, State, clear_up, load_state, read_start, save_state, write_start
from finetune.network import Network
from finetune.options import ComputeOptions, FinetuneOptions
from finetune.process_group import SINGLE_PROCESS, ProcessGroup, ProcessLostError
from finetune.recipes import Recipe
from finetune.score import score
from finetune.setup import (
    Setup,
    build_network,
    find_copies,
    load_members,
    load_training_set,
    member_folder,
    new_network,
    prepare,
)
from finetune.step import TrainingSet
from finetune.train import new_state, train
from probe.records import Cost, RunRecord
from probe.runs import finish_run, new_run_id, read_run, versions


def finetune(
    options: FinetuneOptions = FinetuneOptions(),
    *,
    compute_options: ComputeOptions = ComputeOptions(),
    runs: Path = Path("runs"),
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> RunRecord | None:
    """Train a backbone on patches with cross-validation, score it, and write a run.

    Args:
        options: what to train.
        compute_options: where and how to compute; the result does not depend on it, up to rounding.
        runs: the folder of all runs; created if missing.
        process_group: from `join_process_group`, where several processes train together. Each calls this function.
            Where torchrun has restarted them, they go on with the run that they began before.

    Returns:
        The run; None in processes other than the first, which alone writes it.

    Raises:
        UserError: unknown names, data or weights that cannot be had, targets that match nothing, folds that lack a
            class, a full disk, memory running out, or a loss that is not finite.
    """
    setup = prepare(options, compute_options, process_group)
    _compute_reproducibly(setup)
    _connect(setup)
    network = new_network(setup, setup.network_members[0])  # refuses wrong targets before there is a folder
    folder = process_group.broadcast("folder", lambda: str(_begun_before(setup, runs) or _begin(setup, runs)))
    return _train_and_finish(setup, Path(folder), network)


def resume(
    folder: Path, *, given: Mapping[str, Any] | None = None, process_group: ProcessGroup = SINGLE_PROCESS
) -> RunRecord | None:
    """Go on with an interrupted training. The run is the one that it would have written without the interruption.

    Args:
        folder: of the run.
        given: options that the user gave again, by name. Those of `ComputeOptions` replace the training's own. Those of
            `FinetuneOptions.by_name` must equal its own.
        process_group: as for `finetune`; there may be more or fewer processes than before.

    Returns:
        The run; None in processes other than the first.

    Raises:
        UserError: no interrupted training, other options, or data, weights or splits that have changed since; and as
            `finetune`.
    """
    folder = Path(folder)
    computing = {field.name for field in fields(ComputeOptions)}
    training = {name: value for name, value in (given or {}).items() if name not in computing}
    if (folder / "run.json").exists():
        run = read_run(folder)
        if run.kind == "finetune":
            _require_same_options(folder, FinetuneOptions.from_record(run.options), training)
        say(f"{folder} has finished already.")
        if not process_group.is_first:
            return None
        clear_up(folder)
        return run
    record = read_start(folder)
    options = FinetuneOptions.from_record(record["identity"]["options"])
    if is_code(options.model):  # run because it is named here, not because the record says so
        options = replace(options, model=named_again(folder, options.model, training.pop("model", None)))
    changes = {name: value for name, value in (given or {}).items() if name in computing}
    _require_same_options(folder, options, training)
    recipe = Recipe.from_record(record["identity"]["recipe"])  # as it was: what the options mean may have changed since
    computing_options = replace(ComputeOptions.from_record(record["compute"]), **changes)
    setup = prepare(options, computing_options, process_group, recipe=recipe)
    now = setup.identity()
    then = record["identity"] | {name: now[name] for name in ("options", "recipe")}  # they are the training's own
    differing = [f"{key} was {was} and is {is_now}" for key, was, is_now in differences(then, now)]
    if differing:
        raise UserError(
            f"{folder} cannot be resumed, because what it was started with has changed: {'; '.join(differing[:5])}. "
            "Restore it, or start a new run."
        )
    if record["versions"] != versions():
        say("Package versions have changed since the start: the result may differ in its last digits.")
    _compute_reproducibly(setup)
    _connect(setup)
    return _train_and_finish(setup, folder, new_network(setup, setup.network_members[0]))


def _require_same_options(folder: Path, options: FinetuneOptions, given: Mapping[str, Any]) -> None:
    old = options.by_name()
    differing = [f"{name} {value!r} instead of {old[name]!r}" for name, value in given.items() if value != old[name]]
    if differing:
        raise UserError(
            f"{folder} was started with other options: found {', '.join(differing)}. Resume it without them, or start "
            "a new run."
        )


def _connect(setup: Setup) -> None:
    """Make sure that all processes train the same, and connect them.

    Raises:
        UserError: they do not, or a batch has fewer patches than there are processes.
    """
    process_group, batch_size = setup.compute.process_group, setup.recipe.batch_size
    if batch_size < process_group.world_size:
        raise UserError(
            f"{batch_size} patches per fold and step cannot be shared by {process_group.world_size} processes: start "
            "fewer, or train with a larger `batch_size`."
        )
    packages = {name: version for name, version in versions().items() if name != "platform"}
    process_group.assert_same("setup", setup.identity() | {"versions": packages})
    process_group.connect(setup.compute.device)


def _begin(setup: Setup, runs: Path) -> Path:
    """Make a new run's folder, with what resuming has to know."""
    folder = runs / new_run_id("finetune", setup.backbone.name)
    launch = setup.compute.process_group.launch
    record = {"identity": setup.identity(), "compute": setup.compute_options.as_record(), "versions": versions()}
    write_start(folder, record if launch is None else record | {"launch": launch})
    return folder


def _begun_before(setup: Setup, runs: Path) -> Path | None:
    """Find the unfinished run that this launch of torchrun began before it restarted its processes."""
    process_group = setup.compute.process_group
    if not process_group.restarted:
        return None
    for start in sorted(runs.glob(f"*/{START_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(UserError):
            record = read_start(start.parent)
            if record.get("launch") == process_group.launch and record["identity"] == setup.identity():
                return start.parent
    return None


def _train_and_finish(setup: Setup, folder: Path, network: Network) -> RunRecord | None:
    """Train, score and write the run; an interruption on the way says how to go on."""
    process_group = setup.compute.process_group
    resumed = f"fm-finetune --resume {folder}"
    if is_code(setup.options.model):  # which is run only where it is named
        resumed += f" --model {setup.options.model}"
    say(f"{folder}: training. If it is interrupted: {resumed}")
    try:
        copies = find_copies(setup) if process_group.is_first else {}
        data = load_training_set(setup)
        with keeping_freed_memory(setup.compute.device):
            network, state = _train_networks(setup, folder, network, data)
        if setup.compute_options.merge and process_group.is_first:
            _merge_members(setup, folder)
        process_group.barrier("weights")
        started = time.perf_counter()
        predictions = setup.experiment.predictions(score(setup, folder, data))
        seconds = state.seconds + time.perf_counter() - started
        if not process_group.is_first:
            return None
        record = replace(_record(setup, folder.name, network, state), similar=copies or None)
        tables = setup.experiment.tables
        with writing(folder, remedy=RESUME):
            run = finish_run(folder, record, predictions=predictions, tables=tables, seconds=seconds)
        clear_up(folder)
        return run
    except Interrupted:
        raise UserError(f"interrupted. Finished epochs are kept; go on with: {resumed}") from None
    except ProcessLostError as error:
        raise UserError(f"{error} Finished epochs are kept; go on with: {resumed}") from error


def _compute_reproducibly(setup: Setup) -> None:
    """Have a GPU repeat its sums in the same order, so that a resumed training equals an uninterrupted one.

    With `warn_only` attention would take its other backward pass. An operation that refuses is let go on where it is
    met (`allow_unrepeatable`).
    """
    if setup.compute.device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _train_networks(setup: Setup, folder: Path, network: Network, data: TrainingSet) -> tuple[Network, State]:
    """Train every network that has not finished, and save the epoch that each member keeps.

    Returns:
        The last network and the last state, whose history is that of all members.
    """
    process_group, size = setup.compute.process_group, setup.recipe.batch_size
    state = load_state(folder, setup.compute.device)
    summary = None if state is None else [state.members, state.n_steps, state.n_images]
    process_group.assert_same("checkpoint", {"n_steps": summary})
    first = 0 if state is None else setup.network_members.index(state.members)  # earlier ones are finished and saved
    n_training = setup.experiment.folds.training.sum(axis=1).tolist()
    total = setup.recipe.epochs * setup.options.seeds * sum(-(-n // size) * size for n in n_training)
    with progress(f"train {setup.backbone.name}", total) as advance:
        advance(0 if state is None else state.n_images)
        for members in setup.network_members[first:]:
            if members != network.members:
                network = new_network(setup, members)
            if state is None or state.members != members:
                state = new_state(network, after=state)
            train(
                network,
                data,
                setup.recipe,
                state=state,
                compute=setup.compute,
                save=lambda state: save_state(folder, state) if process_group.is_first else None,
                advance=advance,
            )
            network.values.copy_(state.best)
            if process_group.is_first:
                for member in members:
                    network.save_member(member_folder(folder, network, member), member)
            network.release()  # callers hold the first one while others train, and all are scored from their files
            state.values = state.best = state.moments = network.values
    assert state is not None  # there is at least one network
    return network, state


def _merge_members(setup: Setup, folder: Path) -> None:
    """Write each member of a LoRA run as a plain timm network too."""
    if setup.options.method != "lora":
        return
    (members,) = setup.network_members
    network = build_network(
        setup.backbone,
        setup.weights,
        setup.options,
        setup.view,
        fold_models=setup.fold_models,
        members=members,
        n_classes=setup.n_classes,
        device=setup.compute.device,
    )
    load_members(network, folder)
    for member in members:
        network.save_merged(member_folder(folder, network, member), member)


def _record(setup: Setup, run_id: str, network: Network, state: State) -> RunRecord:
    """Make the record of a fine-tuned run for run.json."""
    experiment, options, compute = setup.experiment, setup.options, setup.compute
    on_gpu = compute.device.type == "cuda"
    return RunRecord(
        id=run_id,
        kind="finetune",
        model=setup.backbone.name,
        method=options.method,
        options=options.as_record(),
        compute=setup.compute_options.as_record(defaults=False) or None,
        recipe=asdict(setup.recipe),
        train=experiment.train,
        test=experiment.test,
        view=setup.view.name,
        pooling=network.pooling,
        card_pooling=setup.backbone.card_pooling,
        label_names=setup.patches.label_names,
        ordinal=setup.patches.ordinal,
        sources={name: patches.source for name, patches in setup.datasets.items()},
        slides={n: patches.slides.as_record() for n, patches in setup.datasets.items() if patches.slides} or None,
        adapted_modules=network.adapted,
        n_trained=network.n_trained,
        fingerprints={n: fingerprint(setup.fingerprint_parts(patches)) for n, patches in setup.datasets.items()},
        embedding=setup.fingerprint_parts(setup.patches),
        folds=experiment.folds_record(),
        seeds=options.training_seeds,
        table_digests=experiment.table_digests,
        best_epoch=tuple(setup.recipe.kept_epoch(state.scores(member)) for member in range(len(setup.fold_models))),
        history=tuple(tuple(state.history[member]) for member in range(len(setup.fold_models))),
        cost=Cost(
            device=compute.device.type,
            training_seconds=round(state.seconds, 3),
            training_images=state.n_images,
            images_per_second=round(state.n_images / max(state.seconds, 1e-9), 4),
            folds_at_once=compute.folds_at_once,
            processes=compute.process_group.world_size,
            fast_paths=tuple(sorted(compute.fast_paths)),
            unrepeatable=tuple(sorted(compute.unrepeatable)),
            device_name=torch.cuda.get_device_name(compute.device) if on_gpu else None,
            peak_device_memory_mb=round(torch.cuda.max_memory_allocated(compute.device) / 2**20) if on_gpu else None,
        ),
    )
