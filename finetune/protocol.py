"""How is one backbone fine-tuned? Training data alone decide folds, recipe and best epochs; tests only score.

A run's folder appears at once, with `training.json` and soon a checkpoint. What makes it a run is written at the end:
each fold's weights, the predictions of all folds on held-out slides and on every test set, and last `run.json`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.backbones import (
    Backbone,
    Weights,
    build_model,
    check_input_size,
    fetch_weights,
    find_backbone,
)
from extract.datasets import DATASETS, Decode, PatchDataset, is_at_hand, load_dataset
from extract.embed import decoded
from extract.prepare import fingerprint_parts
from extract.registry import IMAGENET_MEAN, IMAGENET_STD
from extract.views import Transform, View, make_transform, parse_view
from features.console import Interrupted, ProgressCallback, UserError, nearest, progress, say
from features.device import find_device, has_bf16
from features.files import sweep, write_file, writing
from features.fingerprint import differences, fingerprint
from features.folds import SEED, Folds, grouped_folds
from features.samples import TEST, audit
from finetune.checkpoint import CHECKPOINT_FILE, FORMAT, GO_ON, START_FILE, State, load_state, save_state
from finetune.lora import LoraOptions
from finetune.network import METHODS, Method, Network
from finetune.process_group import SINGLE_PROCESS, ProcessGroup, ProcessLostError
from finetune.recipes import RECIPES, Recipe, best_epoch, recipe_for
from finetune.train import (
    EVALUATION_BATCH,
    Compute,
    TrainingSet,
    checkpoint_gradients,
    network_logits,
    new_state,
    train,
    validation_logits,
)
from probe.evidence import evaluate
from probe.predictions import VALIDATION, Predictions, concatenate, predictions_of
from probe.runs import finish_run, new_run_id, versions

_PREPARE_BATCH = 64  # patches decoded and resized together
_MEMORY_SHARE = 0.3  # of a GPU's free memory that patches may fill


@dataclass(frozen=True)
class FinetuneOptions:
    """What the user may choose about the result. None takes the recipe's value.

    Attributes:
        model, train: a model and a dataset, by name or path.
        test: datasets to score besides the training set's own test split; None for the other published ones.
        method: "lora", "full" or "head"; see `finetune.network`.
        recipe: "default" or "paper".
        lora: rank, alpha, dropout and targets.
        view, epochs, batch_size, learning_rate: instead of the recipe's.
        cv: number of folds.
        seed: of folds, initial values, sampling, augmentation and dropout.
        precision: "auto", "fp32" or "bf16".
        positive: the class that is label 1, for datasets of your own.
    """

    model: str = "efficientnet-lite0"
    train: str = "demo"
    test: tuple[str, ...] | None = None
    method: Method = "lora"
    recipe: str = "default"
    lora: LoraOptions = field(default_factory=LoraOptions)
    view: str | None = None
    cv: int = 5
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int = SEED
    precision: str = "auto"
    positive: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r}: use {', '.join(METHODS)}.")
        if self.recipe not in RECIPES:
            raise UserError(f"unknown recipe {self.recipe!r}: use {' or '.join(RECIPES)}.")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"precision {self.precision!r}: training computes in fp32 or bf16 (or auto).")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise UserError(f"learning rate {self.learning_rate}: expected a number above 0, such as 1e-4.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed}: expected a whole number from 0 to 2^32 - 1.")
        if self.cv < 2:
            raise UserError(f"cross-validation needs at least 2 folds, got {self.cv}.")

    def resolved(self, backbone: Backbone) -> Recipe:
        """The recipe with what the user chose instead."""
        recipe = recipe_for(self.recipe, method=self.method, convolutional=is_convolutional(backbone))
        chosen = {name: getattr(self, name) for name in ("epochs", "batch_size", "learning_rate")}
        return replace(recipe, **{name: value for name, value in chosen.items() if value is not None})

    def resolved_view(self, backbone: Backbone) -> View:
        """The user's view, else the recipe's, else the backbone's."""
        return parse_view(self.view or RECIPES[self.recipe].view or backbone.finetune_view)


@dataclass(frozen=True)
class ComputeOptions:
    """What the user may choose about the computation, and may change on resuming.

    Attributes:
        data: folder of the known datasets.
        weights: a local checkpoint instead of the hub's.
        device: "auto", "cpu", "cuda" or "cuda:N".
        folds_at_once: folds per forward pass; None for all on a GPU and one on a CPU, whose caches they would leave.
        compile: compile the backbone with torch.compile.
        grad_checkpointing: compute activations twice instead of keeping them.
        merge: write each LoRA fold's merged network too.
    """

    data: Path | None = None
    weights: Path | None = None
    device: str = "auto"
    folds_at_once: int | None = None
    compile: bool = False
    grad_checkpointing: bool = False
    merge: bool = False

    def record(self) -> dict[str, Any]:
        """As JSON; paths absolute, so that a run can be resumed from anywhere."""
        paths = {"data": self.data, "weights": self.weights}
        return asdict(self) | {name: None if path is None else str(path.resolve()) for name, path in paths.items()}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> ComputeOptions:
        """As `record` gave it."""
        paths = {name: None if record[name] is None else Path(record[name]) for name in ("data", "weights")}
        return cls(**{**record, **paths})


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything a training needs, found and checked."""

    options: FinetuneOptions
    compute: ComputeOptions
    recipe: Recipe
    view: View
    backbone: Backbone
    weights: Weights
    patches: PatchDataset
    tests: tuple[PatchDataset, ...]
    rows: NDArray[np.intp]  # of the training set, that cross-validation may use
    folds: Folds
    transform: Transform
    precision: str
    device: torch.device
    ranks: ProcessGroup

    @property
    def rounds(self) -> list[tuple[int, ...]]:
        """The folds that train together."""
        return rounds_of(self.options, self.folds.n_folds)

    def parts(self, patches: PatchDataset) -> dict[str, Any]:
        """The fingerprint's parts, as extraction records them."""
        found = fingerprint_parts(
            patches, self.backbone, self.weights, self.view, precision=self.precision, device=self.device
        )
        return found | {"transform": self.transform.record()}

    def identity(self) -> dict[str, Any]:
        """What must not change between a training's start and its end."""
        return {
            "options": _plain(asdict(self.options)),
            "recipe": _plain(asdict(self.recipe)),
            "backbone": self.parts(self.patches),
            "folds": self.folds.digest,
            "table": self.patches.samples.table_digest,
            "tests": {test.name: test.samples.table_digest for test in self.tests},
        }


def finetune(
    options: FinetuneOptions, *, compute: ComputeOptions, runs: Path, ranks: ProcessGroup = SINGLE_PROCESS
) -> Path:
    """Train a backbone on patches, fold by fold, and write a run; returns its folder.

    Of processes that train together, each calls it with its own `ranks`. Where torchrun has started them anew, they go
    on with the run of its first start.

    Raises:
        UserError: names that lead nowhere, data or weights that cannot be had, targets that match nothing, folds that
            lack a class, a full disk, memory running out, or a loss that is not finite.
    """
    setup = prepare(options, compute, ranks)
    _meet(setup)
    network = new_network(setup, setup.rounds[0])  # refuses targets before there is a folder
    folder = Path(ranks.told("folder", lambda: str(_begun_before(setup, runs) or _begin(setup, runs))))
    return _train_and_finish(setup, folder, network)


def _begin(setup: Setup, runs: Path) -> Path:
    """A new run's folder, with what resuming has to know."""
    folder = runs / new_run_id("finetune", setup.backbone.name)
    record = {
        "format": FORMAT,
        "identity": setup.identity(),
        "compute": setup.compute.record(),
        "versions": versions(),
    }
    if setup.ranks.launch is not None:
        record["launch"] = setup.ranks.launch
    with writing(runs):
        folder.mkdir(parents=True)
        whole = record | {"sha256": fingerprint(record)}
        write_file(folder / START_FILE, [json.dumps(whole, indent=2).encode()])
    return folder


def _begun_before(setup: Setup, runs: Path) -> Path | None:
    """The unfinished run that this very launch of torchrun began before a process ended and all were started anew."""
    if not setup.ranks.restarted:
        return None
    for start in sorted(runs.glob(f"*/{START_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(UserError):
            record = _read_start(start.parent)
            if record.get("launch") == setup.ranks.launch and record["identity"] == setup.identity():
                return start.parent
    return None


def _meet(setup: Setup) -> None:
    """Make sure that all processes train the same, and connect them.

    Raises:
        UserError: they do not, or a batch has fewer patches than there are processes.
    """
    if setup.recipe.batch_size < setup.ranks.size:
        raise UserError(
            f"{setup.recipe.batch_size} patches per fold and step cannot be shared by {setup.ranks.size} processes: "
            "start fewer, or train with a larger --batch-size."
        )
    packages = {name: version for name, version in versions().items() if name != "platform"}
    setup.ranks.agree("setup", setup.identity() | {"versions": packages})
    setup.ranks.connect(setup.device)


def resume(
    folder: Path, *, given: Mapping[str, Any], compute: Mapping[str, Any], ranks: ProcessGroup = SINGLE_PROCESS
) -> Path:
    """Go on with an interrupted training; the result is the one it would have had.

    Args:
        folder: of the run.
        given: training options that the user gave again, nested names joined by dots; they must equal the run's own.
        compute: computing options that the user gave; they replace the run's own.
        ranks: of this process, as in `finetune`; their number may be another than before.

    Raises:
        UserError: no training, other options, or data, weights or splits that have changed since; and as `finetune`.
    """
    if (folder / "run.json").exists():
        say(f"{folder} has finished already.")
        if ranks.first:
            _clear_up(folder)
        return folder
    record = _read_start(folder)
    options = options_of(record["identity"]["options"])
    own = flat(options)
    differing = [f"{name} {value!r} instead of {own[name]!r}" for name, value in given.items() if value != own[name]]
    if differing:
        raise UserError(
            f"{folder} was started with other options: found {', '.join(differing)}. Resume it without them, or start "
            "a new run."
        )
    setup = prepare(options, replace(ComputeOptions.of_record(record["compute"]), **compute), ranks)
    differing = [f"{key} was {was} and is {now}" for key, was, now in differences(record["identity"], setup.identity())]
    if differing:
        raise UserError(
            f"{folder} cannot be resumed, because what it was started with has changed: {'; '.join(differing[:5])}. "
            "Restore it, or start a new run."
        )
    if record["versions"] != versions():
        say("Package versions have changed since the start: the result may differ in its last digits.")
    _meet(setup)
    return _train_and_finish(setup, folder, new_network(setup, setup.rounds[0]))


def prepare(options: FinetuneOptions, compute: ComputeOptions, ranks: ProcessGroup = SINGLE_PROCESS) -> Setup:
    """Find and check everything that a training needs.

    Raises:
        UserError: see `finetune`.
    """
    device = find_device(ranks.device(compute.device))
    backbone = find_backbone(options.model)
    recipe = options.resolved(backbone)
    view = options.resolved_view(backbone)
    patches = load_dataset(options.train, data=compute.data, positive=options.positive)
    for line in audit(patches.samples).lines():
        say(f"{patches.name}: {line}.")
    tests = tuple(
        load_dataset(name, data=compute.data, positive=options.positive)
        for name in _test_names(options, patches, compute.data)
    )
    names = [patches.name, *(test.name for test in tests)]
    if len(set(names)) < len(names):
        raise UserError(f"two of the datasets have the same name: {', '.join(names)}. Rename a folder or file.")
    rows = patches.samples.training_rows
    if not len(rows):
        raise UserError(f"{patches.name} has no patch to train on: its split says test everywhere.")
    scheme: Literal["default", "paper"] = (
        "paper" if (options.recipe, options.train) == ("paper", "ami-br") else "default"
    )
    folds = grouped_folds(patches.samples.select(rows), options.cv, seed=options.seed, scheme=scheme)
    return Setup(
        options=options,
        compute=compute,
        recipe=recipe,
        view=view,
        backbone=backbone,
        weights=fetch_weights(backbone, weights=compute.weights),
        patches=patches,
        tests=tests,
        rows=rows,
        folds=folds,
        transform=transform_of(backbone, view, recipe.statistics),
        precision=choose_precision(options.precision, backbone, device),
        device=device,
        ranks=ranks,
    )


def transform_of(backbone: Backbone, view: View, statistics: str) -> Transform:
    """The view's transform, normalising by the card's statistics ("card") or by ImageNet's ("imagenet")."""
    transform = make_transform(backbone, view)
    return transform if statistics == "card" else replace(transform, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def new_network(setup: Setup, folds: Sequence[int]) -> Network:
    """The network of some folds before training, computing as the user wants it."""
    network = build_network(setup.backbone, setup.weights, setup.options, setup.view, folds, device=setup.device)
    network.compute_in(setup.precision)
    if setup.compute.grad_checkpointing:
        checkpoint_gradients(network)
    if setup.compute.compile:
        network.compile_backbone()
    return network


def build_network(
    backbone: Backbone,
    weights: Weights,
    options: FinetuneOptions,
    view: View,
    folds: Sequence[int],
    *,
    device: torch.device,
) -> Network:
    """The backbone on its device, with the adapters and classifiers of some folds."""
    model = build_model(backbone, weights, dynamic=view.input_size is not None)
    check_input_size(model, backbone, make_transform(backbone, view).input_size)
    model = model.to(device).to(memory_format=torch.channels_last)  # of convolutions; others stay as they are
    return Network(model, backbone, method=options.method, lora=options.lora, folds=folds, seed=options.seed)


def rounds_of(options: FinetuneOptions, n_folds: int) -> list[tuple[int, ...]]:
    """The folds that train together: all, or each alone where each trains the whole backbone."""
    return [(fold,) for fold in range(n_folds)] if options.method == "full" else [tuple(range(n_folds))]


# ------------------------------------------------------------------------------------------------- training to the end


def _train_and_finish(setup: Setup, folder: Path, network: Network) -> Path:
    say(f"{folder}: training. If it is interrupted: fm-finetune --resume {folder}")
    try:
        _train(setup, folder, network)
    except Interrupted:
        raise UserError(f"interrupted. Finished epochs are kept; go on with: fm-finetune --resume {folder}") from None
    except ProcessLostError as error:
        raise UserError(f"{error} Finished epochs are kept; go on with: fm-finetune --resume {folder}") from error
    return folder


def _train(setup: Setup, folder: Path, network: Network) -> None:
    """Train every round that has not finished, save each fold's best epoch, judge them all, and complete the run."""
    at_once = setup.compute.folds_at_once or default_folds_at_once(setup.device, setup.folds.n_folds)
    ranks = setup.ranks
    machine = Compute(setup.device, setup.precision, min(at_once, len(setup.rounds[0])), ranks)
    if setup.device.type == "cuda":
        _compute_reproducibly()
    data = TrainingSet(
        pixels=_pixels(setup),
        label=torch.from_numpy(setup.patches.samples.label[setup.rows].astype(np.int64)).to(setup.device),
        folds=setup.folds,
        transform=setup.transform,
    )
    state = load_state(folder, setup.device)
    ranks.agree("checkpoint", {"n_steps": None if state is None else [state.folds, state.n_steps, state.n_images]})
    first = 0 if state is None else setup.rounds.index(state.folds)
    size = setup.recipe.batch_size
    total = setup.recipe.epochs * sum(-(-n // size) * size for n in setup.folds.training.sum(axis=1).tolist())
    with progress(f"train {setup.backbone.name}", total) as advance:
        advance(0 if state is None else state.n_images)
        for number, folds in enumerate(setup.rounds):
            if number < first:
                continue  # finished and saved before a later round's first checkpoint
            if number > 0:
                network = new_network(setup, folds)
            if state is None or state.folds != folds:
                state = new_state(network, after=state)
            train(
                network,
                data,
                setup.recipe,
                state=state,
                seed=setup.options.seed,
                machine=machine,
                save=lambda state: save_state(folder, state) if ranks.first else None,
                advance=advance,
            )
            network.values.copy_(state.best)
            if ranks.first:
                for fold in folds:
                    network.save_fold(fold_folder(folder, fold), fold)
    assert state is not None  # there is at least one round
    if setup.compute.merge and ranks.first:
        _merge_folds(setup, folder)
    ranks.wait("weights")
    started = time.perf_counter()
    predictions = concatenate(list(_judge(setup, folder, data, machine)))
    seconds = state.seconds + time.perf_counter() - started
    if not ranks.first:
        return
    with writing(folder, remedy=GO_ON):
        record = _record(setup, network, state, machine)
        finish_run(
            folder,
            record,
            predictions,
            tables={patches.name: patches.samples for patches in (setup.patches, *setup.tests)},
            metrics=evaluate(predictions),
            run_id=folder.name,
            seconds=seconds,
        )
    _clear_up(folder)


def _clear_up(folder: Path) -> None:
    """Remove what only an unfinished training needs, and what killed writers have left."""
    for name in (CHECKPOINT_FILE, START_FILE):
        (folder / name).unlink(missing_ok=True)
    for place in (folder, *folder.glob("fold-*")):
        sweep(place)


def _merge_folds(setup: Setup, folder: Path) -> None:
    """Write each fold of a LoRA run as a plain timm network too."""
    if setup.options.method != "lora":
        return
    (folds,) = setup.rounds
    network = build_network(setup.backbone, setup.weights, setup.options, setup.view, folds, device=setup.device)
    load_folds(network, folder)
    for fold in folds:
        network.save_merged(fold_folder(folder, fold), fold)


def _judge(setup: Setup, folder: Path, data: TrainingSet, machine: Compute) -> Iterator[Predictions]:
    """Held-out rows under their own fold's weights, and every test set under all folds', from the saved weights."""
    samples = setup.patches.samples
    sets = [(setup.patches, np.flatnonzero(samples.split == TEST))]
    sets += [(test, np.arange(len(test.samples))) for test in setup.tests]
    sets = [(patches, rows) for patches, rows in sets if len(rows)]
    n_folds = setup.folds.n_folds
    validation = np.empty(len(setup.rows), dtype=np.float32)
    logits = [np.empty((len(rows), n_folds), dtype=np.float32) for _, rows in sets]
    with progress("score", n_folds * sum(len(rows) for _, rows in sets)) as advance:
        for folds in setup.rounds:
            network = new_network(setup, folds)
            load_folds(network, folder)
            for fold, own in validation_logits(network, data, folds, machine=machine).items():
                validation[setup.folds.fold == fold] = own
            for (patches, rows), into in zip(sets, logits, strict=True):
                into[:, list(folds)] = patch_logits(
                    network, patches.decode, rows, setup.transform, machine=machine, advance=advance
                )
    yield predictions_of(
        setup.patches.name, samples.select(setup.rows), split=VALIDATION, fold=setup.folds.fold, logit=validation
    )
    for (patches, rows), found in zip(sets, logits, strict=True):
        selected = patches.samples.select(rows)
        yield predictions_of(patches.name, selected, split=TEST, fold=np.arange(n_folds), logit=found)


def patch_logits(
    network: Network,
    decode: Decode,
    rows: NDArray[np.intp],
    transform: Transform,
    *,
    machine: Compute,
    advance: ProgressCallback,
) -> NDArray[np.float32]:
    """Logits (len(rows), n_folds) of patches, each under the weights of all of the network's folds."""
    size = EVALUATION_BATCH[machine.device.type]
    own = rows[machine.ranks.share(len(rows))]
    units = [own[start : start + size].tolist() for start in range(0, len(own), size)]
    found = [np.empty((0, len(network.folds)), dtype=np.float32)]
    with closing(decoded(decode, units)) as ready:
        for unit, batch in ready:
            pixels = transform.resized(batch, machine.device)

            def logits_of(network: Network, group: list[int], pixels: Tensor = pixels) -> Tensor:
                repeated = pixels.repeat(len(group), 1, 1, 1)
                return network_logits(network, transform, repeated, group, machine=machine)

            each = machine.each(network, network.folds, logits_of)
            found.append(torch.cat(each).T.cpu().numpy())  # (b, f)
            advance(len(unit) * len(network.folds) * machine.ranks.size)
    return machine.ranks.gathered(np.concatenate(found), len(rows), machine.device)


def _record(setup: Setup, network: Network, state: State, machine: Compute) -> dict[str, Any]:
    """What run.json says of a fine-tuned run."""
    patches = [setup.patches, *setup.tests]
    cost: dict[str, Any] = {
        "device": setup.device.type,
        "training_seconds": round(state.seconds, 3),
        "training_images": state.n_images,
        "images_per_second": round(state.n_images / max(state.seconds, 1e-9), 2),
        "folds_at_once": machine.folds_at_once,
        "processes": machine.ranks.size,
    }
    if setup.device.type == "cuda":
        cost["device_name"] = torch.cuda.get_device_name(setup.device)
        cost["peak_device_memory_mb"] = round(torch.cuda.max_memory_allocated(setup.device) / 2**20)
    return {
        "kind": "finetune",
        "model": setup.backbone.name,
        "method": setup.options.method,
        "options": asdict(setup.options),
        "recipe": asdict(setup.recipe),
        "train": setup.patches.name,
        "test": [test.name for test in setup.tests],
        "view": setup.view.name,
        "pooling": network.pooling,
        "card_pooling": setup.backbone.card_pooling,
        "label_names": list(setup.patches.label_names),
        "sources": {each.name: each.source for each in patches},
        "adapted_modules": list(network.adapted),
        "n_trained": network.n_trained,
        "fingerprints": {each.name: fingerprint(setup.parts(each)) for each in patches},
        "embedding": setup.parts(setup.patches),
        "folds": {
            "n": setup.folds.n_folds,
            "source": setup.folds.source,
            "digest": setup.folds.digest,
            "seed": setup.options.seed,
        },
        "table_digests": {each.name: each.samples.table_digest for each in patches},
        "best_epoch": [best_epoch(state.history[fold]) for fold in range(setup.folds.n_folds)],
        "history": [state.history[fold] for fold in range(setup.folds.n_folds)],
        "cost": cost,
    }


def fold_folder(run: Path, fold: int) -> Path:
    """Where a run keeps the weights of a fold."""
    return run / f"fold-{fold}"


def load_folds(network: Network, run: Path) -> None:
    """Read the weights of all of a network's folds from a run."""
    for fold in network.folds:
        network.load_fold(fold_folder(run, fold), fold)


# ------------------------------------------------------------------------------------------------------------- details


def _pixels(setup: Setup) -> Tensor:
    """Every patch that cross-validation may use, decoded once: (n, 3, s, s) uint8, as extraction prepares it."""
    size = setup.transform.input_size
    shape = (len(setup.rows), 3, size, size)
    place = setup.device
    if place.type == "cuda" and np.prod(shape) > _MEMORY_SHARE * torch.cuda.mem_get_info(place)[0]:
        place = torch.device("cpu")
    pixels = torch.empty(shape, dtype=torch.uint8, device=place)
    starts = range(0, len(setup.rows), _PREPARE_BATCH)
    units = [setup.rows[start : start + _PREPARE_BATCH].tolist() for start in starts]
    with (
        progress(f"decode {setup.patches.name}", len(setup.rows)) as advance,
        closing(decoded(setup.patches.decode, units)) as ready,
    ):
        for start, (unit, batch) in zip(starts, ready, strict=True):
            pixels[start : start + len(unit)] = setup.transform.resized(batch, setup.device)
            advance(len(unit))
    return pixels


def choose_precision(asked: str, backbone: Backbone, device: torch.device) -> str:
    """`auto` is bf16 where the processor has it; on a CPU for transformers only: convolutions gain nothing there."""
    if asked != "auto":
        return asked
    return "bf16" if has_bf16(device) and not (is_convolutional(backbone) and device.type == "cpu") else "fp32"


def is_convolutional(backbone: Backbone) -> bool:
    """Whether a backbone is no transformer: those have tokens to pool by name, Swin aside."""
    return backbone.card_pooling == "pooled" and "swin" not in backbone.arch


def default_folds_at_once(device: torch.device, n_folds: int) -> int:
    """All folds share a forward pass on a GPU; on a CPU each has its own: together they would leave its caches."""
    return n_folds if device.type == "cuda" else 1


def _compute_reproducibly() -> None:
    """Have a GPU repeat its sums in the same order, so that a resumed training equals an uninterrupted one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _test_names(options: FinetuneOptions, patches: PatchDataset, data: Path | None) -> list[str]:
    """What to score besides the training set's own test split."""
    if options.test is not None:
        return [name for name in options.test if name != options.train]
    if options.train not in DATASETS or not DATASETS[options.train].folder:
        return []
    others = [name for name, record in DATASETS.items() if record.folder and name != options.train]
    absent = [name for name in others if not is_at_hand(name, data)]
    for name in absent:
        say(f"{name} is not in the data folder and will not be scored.")
    return [name for name in others if name not in absent]


def _read_start(folder: Path) -> dict[str, Any]:
    path = folder / START_FILE
    try:
        record = json.loads(path.read_bytes())
        found = record["format"]
        if found == FORMAT and not record.keys() >= {"identity", "compute", "versions"}:
            raise KeyError("identity")
        if record.pop("sha256", None) not in (None, fingerprint(record)) and found == FORMAT:
            raise ValueError("its digest does not match")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is no interrupted training: it has no {START_FILE}. Expected a folder that fm-finetune made "
            f"below its --runs.{nearest(folder.name, _trainings(folder.parent))}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Start a new run.") from None
    if found != FORMAT:
        raise UserError(
            f"{folder} is a training of format {found}; this version resumes format {FORMAT}. Resume it with the "
            "version it was started with, or start a new run."
        )
    return dict(record)


def _trainings(runs: Path) -> list[str]:
    return [path.parent.name for path in runs.glob(f"*/{START_FILE}")]


def options_of(stored: Mapping[str, Any]) -> FinetuneOptions:
    """Options as JSON gives them back."""
    test = stored["test"]
    changed = {"lora": LoraOptions(**stored["lora"]), "test": None if test is None else tuple(test)}
    return FinetuneOptions(**{**stored, **changed})


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def flat(options: FinetuneOptions) -> dict[str, Any]:
    """All options by name, the adapters' as `lora.rank` and so on."""
    own = asdict(options)
    return {name: value for name, value in own.items() if name != "lora"} | {
        f"lora.{name}": value for name, value in own["lora"].items()
    }
