"""What does a fine-tuning need, and is all of it there?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from extract.backbones import (
    Backbone,
    Weights,
    build_model,
    check_forward,
    fetch_weights,
    find_backbone,
)
from extract.compute import worth_compiling
from extract.datasets import (
    DATASETS,
    PatchDataset,
    is_at_hand,
    load_dataset,
    require_distinct_names,
    require_slides_used,
)
from extract.embed import decoded
from extract.prepare import fingerprint_parts
from extract.registry import IMAGENET_MEAN, IMAGENET_STD
from extract.views import Transform, View, make_transform
from features.console import ProgressCallback, progress, say
from features.device import compute_exactly, find_device
from features.folds import FoldModel
from features.labels import parse_renaming
from features.samples import audit
from finetune.compute import Compute, checkpoint_gradients
from finetune.fast import try_compiled_blocks, try_kernels
from finetune.network import Network
from finetune.options import ComputeOptions, FinetuneOptions, training_precision
from finetune.process_group import SINGLE_PROCESS, ProcessGroup
from finetune.recipes import Recipe
from finetune.step import TrainingSet
from probe.experiment import Experiment, make_experiment
from probe.runs import weights_folder

_DECODE_BATCH = 64  # patches decoded and resized together
_MEMORY_FRACTION = 0.3  # of a GPU's free memory that patches may fill


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything that a fine-tuning needs, checked.

    Attributes:
        options, compute_options: as the user gave them.
        recipe, view: what the options mean for this backbone.
        backbone, weights: the model, and its weights on this machine.
        datasets: name to patches, of the training set first, then of those to score.
        experiment: which rows train, which validate together, and which test.
        transform: from patch to input of the network.
        compute: device, precision, folds per pass, and the processes that train together.
    """

    options: FinetuneOptions
    compute_options: ComputeOptions
    recipe: Recipe
    view: View
    backbone: Backbone
    weights: Weights
    datasets: dict[str, PatchDataset]
    experiment: Experiment
    transform: Transform
    compute: Compute

    @property
    def patches(self) -> PatchDataset:
        """The training set."""
        return self.datasets[self.experiment.train]

    @property
    def n_classes(self) -> int:
        """How many classes the training set has."""
        return len(self.patches.label_names)

    @property
    def network_members(self) -> list[tuple[int, ...]]:
        """The members of each network that is trained; the networks are trained one after the other."""
        return self.options.network_members(self.experiment.folds.n_folds)

    @property
    def fold_models(self) -> tuple[FoldModel, ...]:
        """Seed and fold of every member."""
        return self.options.fold_models(self.experiment.folds.n_folds)

    @property
    def scoring_transform(self) -> Transform:
        """From patch to input when trained members are scored."""
        return replace(self.transform, flips=self.recipe.tta)

    @property
    def n_validated(self) -> int:
        """How many patches a member validates on, about."""
        return len(self.experiment.rows) // self.experiment.folds.n_folds

    @property
    def n_evaluated(self) -> int:
        """How many images each trained member is scored on, about."""
        n = self.n_validated + sum(map(len, self.experiment.tests.values()))
        return n * self.scoring_transform.n_shown

    @property
    def compiles(self) -> bool:
        """Whether to compile the backbone's blocks: where the user says so, or where training is long enough for it."""
        if self.compute_options.compile is not None:
            return self.compute_options.compile
        n_images = self.recipe.epochs * self.options.seeds * int(self.experiment.folds.training.sum())
        # Forward, and the gradient of the input.
        return self.compute.fast and worth_compiling(self.backbone, 2 * n_images)

    def fingerprint_parts(self, patches: PatchDataset) -> dict[str, Any]:
        """List the parts of the fingerprint of a dataset's embeddings, as extraction records them."""
        precision, device = self.compute.precision, self.compute.device
        parts = fingerprint_parts(patches, self.backbone, self.weights, self.view, precision=precision, device=device)
        return parts | {"transform": self.transform.record()}

    def identity(self) -> dict[str, Any]:
        """Describe what must not change between the start and the end of a training, as JSON values."""
        digests = self.experiment.table_digests
        identity = {
            "options": self.options.as_record(),
            "recipe": asdict(self.recipe),
            "backbone": self.fingerprint_parts(self.patches),
            "folds": self.experiment.folds.digest,
            "table": digests[self.experiment.train],
            "tests": {name: digests[name] for name in self.experiment.test},
        }
        return dict(json.loads(json.dumps(identity)))


def prepare(
    options: FinetuneOptions,
    compute_options: ComputeOptions = ComputeOptions(),
    process_group: ProcessGroup = SINGLE_PROCESS,
    *,
    recipe: Recipe | None = None,
) -> Setup:
    """Find and check everything that a fine-tuning needs.

    Args:
        options, compute_options, process_group: see `finetune.run.finetune`.
        recipe: of a training that is resumed, which may be older than what the options mean today.

    Raises:
        UserError: see `finetune.run.finetune`.
    """
    device = find_device(
        compute_options.device,
        local_rank=None if process_group.world_size == 1 else process_group.local_rank,
        apple=False,
    )
    compute_exactly(device)
    fast = compute_options.fast and device.type == "cuda"
    backbone = find_backbone(options.model, run_file=True)
    recipe = recipe or options.resolved_recipe(backbone)
    view = options.resolved_view(backbone, recipe)
    datasets = load_datasets(options, compute_options)
    train = next(iter(datasets))
    experiment = make_experiment(
        train,
        {name: patches.samples for name, patches in datasets.items()},
        cv=options.cv,
        fold_seed=options.fold_seed,
        paper_folds=options.recipe != "default",
        classes=datasets[train].label_names,
        soft_labels=options.soft_labels,
        folds_by=options.folds_by,
    )
    options = replace(options, cv=experiment.folds.n_folds)
    return Setup(
        options=options,
        compute_options=compute_options,
        recipe=recipe,
        view=view,
        backbone=backbone,
        datasets=datasets,
        experiment=experiment,
        weights=fetch_weights(backbone, weights=compute_options.weights),
        transform=training_transform(backbone, view, recipe.statistics),
        compute=Compute(
            device,
            training_precision(options.precision, backbone, device),
            folds_at_once=compute_options.resolved_folds_at_once(device, len(options.network_members(options.cv)[0])),
            process_group=process_group,
            same_shapes=fast or bool(compute_options.compile),
            fast=fast,
        ),
    )


def load_datasets(options: FinetuneOptions, compute_options: ComputeOptions) -> dict[str, PatchDataset]:
    """Load the training set and those to score, by name."""
    tests = _test_names(options, compute_options.data)
    require_distinct_names((options.train, *tests))
    slides = options.slides_in(compute_options.slides)
    require_slides_used((options.train, *tests), slides)
    renamed = parse_renaming(options.labels)
    reading: dict[str, Any] = {
        "data": compute_options.data,
        "labels": renamed,
        "skip_unlabelled": options.skip_unlabelled,
        "slides": slides,
    }
    patches = load_dataset(
        options.train,
        positive=options.positive,
        order=options.classes,
        ordinal=options.ordinal,
        **reading,
    )
    for line in audit(patches.samples).lines():
        say(f"{patches.name}: {line}.")
    loaded = [load_dataset(name, classes=patches.label_names, **reading) for name in tests]
    renamed.require_met()
    return {dataset.name: dataset for dataset in (patches, *loaded)}


def _test_names(options: FinetuneOptions, data: Path | None) -> list[str]:
    """List the datasets to score besides the training set's own test split."""
    if options.test is not None:
        return [name for name in options.test if name != options.train]
    if options.train not in DATASETS or not DATASETS[options.train].folder:
        return []
    others = [name for name, record in DATASETS.items() if record.folder and name != options.train]
    missing = [name for name in others if not is_at_hand(name, data)]
    for name in missing:
        say(f"{name} is not in the data folder and will not be scored.")
    return [name for name in others if name not in missing]


def find_copies(setup: Setup) -> dict[str, tuple[str, ...]]:
    """Find the test patches, by dataset, whose pixels are those of a training patch, in whatever format they are.

    Raises:
        UserError: a patch that cannot be read.
    """
    experiment = setup.experiment
    tests = experiment.tests
    with progress("compare pixels", len(experiment.rows) + sum(map(len, tests.values()))) as advance:
        known = set(_pixel_digests(setup.patches, experiment.rows, advance))
        copies = {}
        for name, rows in tests.items():
            digests = _pixel_digests(setup.datasets[name], rows, advance)
            same = rows[[digest in known for digest in digests]]
            if len(same):
                copies[name] = tuple(experiment.tables[name].id[same].tolist())
    return copies


def _pixel_digests(patches: PatchDataset, rows: NDArray[np.intp], advance: ProgressCallback) -> list[bytes]:
    batches = [rows[start : start + _DECODE_BATCH].tolist() for start in range(0, len(rows), _DECODE_BATCH)]
    digests = []
    with closing(decoded(patches.decode, batches)) as ready:
        for _, images in ready:
            digests += [hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest() for image in images]
            advance(len(images))
    return digests


def training_transform(backbone: Backbone, view: View, statistics: str) -> Transform:
    """Make the view's transform; runs from before views said so normalise by ImageNet's `statistics` ("imagenet")."""
    transform = make_transform(backbone, view)
    return transform if statistics == "card" else replace(transform, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def new_network(setup: Setup, members: Sequence[int], *, run: Path | None = None) -> Network:
    """Build the network of some members before training; or with the weights of a finished `run`, only to evaluate."""
    compute, size = setup.compute, setup.recipe.batch_size
    network = build_network(
        setup.backbone,
        setup.weights,
        setup.options,
        setup.view,
        fold_models=setup.fold_models,
        members=members,
        n_classes=setup.n_classes,
        device=compute.device,
    )
    if run is not None:
        load_members(network, run)
    # The backbone of heads has its final weights from the start.
    if setup.compute_options.fast and (run is not None or network.method == "head"):
        network.freeze(
            size=setup.transform.input_size,
            n_images=setup.n_evaluated if run is not None else setup.n_validated * setup.recipe.epochs,
            precision=compute.precision,
        )
    if network.compute_in(compute.precision, fold_norms=setup.compute_options.fast):
        compute.fast_paths.add("folded norms")
    if setup.compute_options.grad_checkpointing:
        checkpoint_gradients(network)
    if compute.fast:
        try_kernels(network, compute)
    if setup.compiles:
        shard = compute.process_group.shard_rows(size)
        n, image_size = shard.stop - shard.start, setup.transform.input_size
        try_compiled_blocks(network, compute, batch_size=n, image_size=image_size, training=run is None)
    return network


def member_folder(run: Path, network: Network, member: int) -> Path:
    """Return the folder in which a run keeps the weights of a member."""
    n_seeds = len({model.seed for model in network.fold_models})
    return weights_folder(run, network.fold_models[member], n_seeds=n_seeds)


def load_members(network: Network, run: Path) -> None:
    """Read the weights of all of a network's members from a run.

    Raises:
        UserError: a missing, truncated or foreign file.
    """
    for member in network.members:
        network.load_member(member_folder(run, network, member), member)


def build_network(
    backbone: Backbone,
    weights: Weights,
    options: FinetuneOptions,
    view: View,
    *,
    fold_models: Sequence[FoldModel],
    members: Sequence[int],
    n_classes: int,
    device: torch.device,
) -> Network:
    """Build the backbone on its device, with the adapters and classifiers of some members.

    Raises:
        UserError: weights that do not fit, an input size that does not, or targets that match nothing.
    """
    model = build_model(backbone, weights, dynamic=view.resizes(backbone.input_size))
    check_forward(model.to(device), backbone, make_transform(backbone, view).input_size)
    model = model.to(memory_format=torch.channels_last)  # of convolutions; other layers stay as they are
    return Network(
        model,
        backbone,
        method=options.method,
        lora=options.lora,
        fold_models=fold_models,
        members=members,
        n_classes=n_classes,
    )


def load_training_set(setup: Setup) -> TrainingSet:
    """Decode every patch that cross-validation uses, once.

    Raises:
        UserError: a patch that cannot be read.
    """
    rows, size = setup.experiment.rows, setup.transform.input_size
    shape = (len(rows), 3, size, size)
    device = setup.compute.device
    if device.type == "cuda" and np.prod(shape) > _MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]:
        device = torch.device("cpu")
    pixels = torch.empty(shape, dtype=torch.uint8, device=device)
    starts = range(0, len(rows), _DECODE_BATCH)
    batches = [rows[start : start + _DECODE_BATCH].tolist() for start in starts]
    with (
        progress(f"decode {setup.patches.name}", len(rows)) as advance,
        closing(decoded(setup.patches.decode, batches, device=setup.compute.device)) as ready,
    ):
        for start, (batch, images) in zip(starts, ready, strict=True):
            pixels[start : start + len(batch)] = setup.transform.resized(images, setup.compute.device)
            advance(len(batch))
    experiment, on_device = setup.experiment, setup.compute.device
    label = torch.from_numpy(experiment.label.astype(np.int64)).to(on_device)
    shares = experiment.target
    target = None if shares is None else torch.from_numpy(shares).to(on_device)
    return TrainingSet(pixels, label, folds=experiment.folds, transform=setup.transform, target=target)
