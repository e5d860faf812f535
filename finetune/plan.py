"""What would be trained, and how much memory would it need? Answered without loading a weight.

The network is built of fake tensors, which have shapes, types and devices but no storage. One training step is run on
them, and the memory that it keeps for its backward pass is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from extract.backbones import build_model, check_forward, find_backbone
from extract.datasets import DATASETS
from extract.views import make_transform
from features.device import find_device
from features.labels import NUMBERS
from finetune.lora import adapters
from finetune.network import Network
from finetune.options import ComputeOptions, FinetuneOptions, training_precision
from finetune.setup import load_datasets
from probe.experiment import Experiment, make_experiment


@dataclass(frozen=True)
class Adapted:
    """One layer that gets adapters: its name, kind, widths, and trained parameters per fold."""

    name: str
    kind: str
    n_in: int
    n_out: int
    n_trained: int


@dataclass(frozen=True)
class Plan:
    """What a training would do.

    Attributes:
        model, method: as asked.
        modules: the layers that get adapters; none for the other methods.
        n_parameters: of the backbone, without classifier.
        n_trained: per fold model, classifier included.
        n_folds, n_seeds, folds_at_once, batch_size, precision: of the training.
        weights_mb: the frozen weights in float32.
        rows_mb: trained values, their gradients, two moments and the epoch kept, of all models trained at once.
        kept_mb: what one forward pass keeps for its backward pass.
    """

    model: str
    method: str
    modules: tuple[Adapted, ...]
    n_parameters: int
    n_trained: int
    n_folds: int
    n_seeds: int
    folds_at_once: int
    batch_size: int
    precision: str
    weights_mb: float
    rows_mb: float
    kept_mb: float


def make_plan(options: FinetuneOptions, compute_options: ComputeOptions = ComputeOptions()) -> Plan:
    """Build the training of fake tensors, and count.

    Patches are read only with `options.folds_by`, to count their domains. Else the user's own count as of two classes,
    unless `options.classes` names more.

    Raises:
        UserError: an unknown model, targets that match nothing, an input size that does not fit; with
            `options.folds_by` whatever keeps a training from having its folds.
    """
    n_classes = _n_classes(options)
    if options.folds_by is not None:
        experiment = _experiment(options, compute_options)
        options, n_classes = replace(options, cv=experiment.folds.n_folds), experiment.n_classes
    device = find_device(compute_options.device, apple=False)
    backbone = find_backbone(options.model, run_file=True)
    recipe = options.resolved_recipe(backbone)
    view = options.resolved_view(backbone)
    transform = make_transform(backbone, view)
    precision = training_precision(options.precision, backbone, device)
    members = options.network_members(options.cv)[0]
    at_once = compute_options.resolved_folds_at_once(device, len(members))
    with torch.device("meta"):  # where even constructors that compute with values run
        model = build_model(backbone, None, dynamic=view.resizes(backbone.input_size))
    check_forward(model, backbone, transform.input_size)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        network = Network(
            model,
            backbone,
            method=options.method,
            lora=options.lora,
            fold_models=options.fold_models(options.cv),
            members=members,
            n_classes=n_classes,
        )
        shape = (recipe.batch_size, 3, transform.input_size, transform.input_size)
        kept = at_once * _kept_bytes(network, torch.empty(shape), precision)
    modules = tuple(
        Adapted(
            name,
            type(module.base).__name__,
            n_in=module.A.shape[2],
            n_out=module.B.shape[1],
            n_trained=module.A[0].numel() + module.B[0].numel(),
        )
        for name, module in adapters(model)
    )
    return Plan(
        model=backbone.name,
        method=options.method,
        modules=modules,
        n_parameters=n_parameters,
        n_trained=network.n_trained,
        n_folds=options.cv,
        n_seeds=options.seeds,
        folds_at_once=at_once,
        batch_size=recipe.batch_size,
        precision=precision,
        weights_mb=0.0 if options.method == "full" else 4 * n_parameters / 2**20,
        rows_mb=4 * 5 * network.n_trained * len(members) / 2**20,
        kept_mb=kept / 2**20,
    )


def _experiment(options: FinetuneOptions, compute_options: ComputeOptions) -> Experiment:
    datasets = load_datasets(options, compute_options)
    train = next(iter(datasets))
    return make_experiment(
        train,
        {name: patches.samples for name, patches in datasets.items()},
        fold_seed=options.fold_seed,
        classes=datasets[train].label_names,
        folds_by=options.folds_by,
    )


def _n_classes(options: FinetuneOptions) -> int:
    known = DATASETS.get(options.train)
    return len(options.classes or (known.label_names if known else NUMBERS))


def _kept_bytes(network: Network, images: Tensor, precision: str) -> int:
    """Count the bytes that a step of one member keeps for its backward pass, each storage once, without parameters."""
    sizes: dict[int, int] = {}
    parameters = {
        tensor.untyped_storage()._cdata for tensor in (network.values, *network.parameters(), *network.buffers())
    }
    alive = []  # keeps tensors alive: the address of a freed one could be given to another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        network(images, network.members[:1], step=0)
    return sum(sizes.values())
