"""How does a run, probed or fine-tuned, become a function from patches to logits?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from extract.backbones import Backbone, Weights, build_model, fetch_weights, find_backbone, recorded_backbone
from extract.compute import embed_shown, fastest, side_by_side
from extract.custom import require_distinct
from extract.datasets import Patches
from extract.embed import decoded
from extract.prepare import backbone_parts
from extract.views import Transform, parse_view
from features.blocks import to_float16
from features.console import ProgressCallback, UserError, say
from features.fingerprint import differences
from finetune.compute import Compute
from finetune.network import Network
from finetune.options import ComputeOptions, FinetuneOptions
from finetune.score import patch_logits
from finetune.setup import build_network, load_members, training_transform
from probe.combine import mean_logits
from probe.logistic import predict_logits
from probe.records import Part, RunRecord
from probe.runs import read_weights, weight_name

_LAYER = ("coef", "intercept")
_BATCH = {"cpu": 8, "cuda": 64, "mps": 64}  # images per forward pass of a frozen backbone
# Parts of a fingerprint that say where, and of which patches, embeddings were computed, but not by which function.
_CIRCUMSTANCES = ("dataset_digest", "source_mpp", "crop", "poolings", "device", "numerics", "revision")
Backbones = Mapping[str, tuple[Backbone, Weights]]  # by model
Predictor = Callable[[Patches, ProgressCallback], NDArray[np.float32]]  # patches to logits (n, n_models, c-1)


def load_backbones(
    runs: Sequence[Path], records: Sequence[RunRecord], weights: Path | None, named: Sequence[str]
) -> dict[str, tuple[Backbone, Weights]]:
    models = {part.model: (part, run) for run, one in zip(runs, records, strict=True) for part in one.each_part}
    if weights is not None and len(models) > 1:
        raise UserError(f"`weights={weights}` is a checkpoint of one model, and {', '.join(models)} are needed here.")
    for part, run in models.values():
        if part.weights_sha256 is None:
            raise UserError(
                f"{run} was made of imported embeddings, and how they were computed is not known. Expected a run whose "
                "embeddings fm-extract computed: extract the training patches, probe again, and predict with that run."
            )
    own = [find_backbone(name, run_file=True) for name in named]
    require_distinct(own)
    if unused := [one.name for one in own if one.name not in models]:
        raise UserError(
            f"`model` names {unused[0]}, by which no run was made: expected the files of models of your own among "
            f"{', '.join(models)}."
        )
    backbones = {
        model: recorded_backbone(
            model, f"{part.revision}, weights with SHA-256 {part.weights_sha256}", named=own, where=run
        )
        for model, (part, run) in models.items()
    }
    return {model: (backbone, fetch_weights(backbone, weights=weights)) for model, backbone in backbones.items()}


def require_same_backbones(run: Path, record: RunRecord, backbones: Backbones, device: torch.device) -> None:
    """Refuse a run of which a backbone here is not the one that it had."""
    for part in record.each_part:
        _require_same_backbone(run, part, record.statistics, *backbones[part.model], device)
    if elsewhere := next((part.device for part in record.each_part if part.device != device.type), None):
        say(f"The run was computed on {elsewhere}, this is {device.type}: probabilities may differ slightly.")


def _require_same_backbone(
    run: Path, part: Part, statistics: str, backbone: Backbone, loaded: Weights, device: torch.device
) -> None:
    view = parse_view(part.view)
    now = backbone_parts(backbone, loaded, view, precision=part.precision, device=device)
    now["transform"] = training_transform(backbone, view, statistics).record()
    then = {key: value for key, value in part.embedding.items() if key not in _CIRCUMSTANCES}
    differing = list(differences(then, {key: value for key, value in now.items() if key not in _CIRCUMSTANCES}))
    if differing:
        raise UserError(
            f"{run}: its backbone cannot be reproduced here:\n"
            + "\n".join(f"  {name}: the run had {was}, found {here}" for name, was, here in differing)
            + "\nUse the version of mitofm, the `weights` and the files of the run, or train again."
        )
    if part.precision == "fp16" and device.type == "cpu":
        raise UserError(f"{run} was computed in fp16, which needs a GPU. Predict with `device='cuda'`.")


_Embedder = Callable[[Sequence[NDArray[np.uint8]]], dict[str, NDArray[np.float32]]]  # patches to pooling -> (b, d)


def probe_predictor(run: Path, record: RunRecord, backbones: Backbones, device: torch.device, n: int) -> Predictor:
    """Embed patches as extraction does, rounding to float16 included, then apply the fold models' linear layers."""
    weights, groups = read_weights(run), record.groups
    layers = [[weights[weight_name(name, k, len(groups))] for name in _LAYER] for k in range(len(groups))]
    embedders: dict[tuple[str, str], _Embedder] = {}
    for part in record.each_part:
        if (part.model, part.view) not in embedders:
            backbone, loaded = backbones[part.model]
            view = parse_view(part.view)
            model = build_model(backbone, loaded, dynamic=view.resizes(backbone.input_size))
            transform = training_transform(backbone, view, "card")
            embedders[part.model, part.view] = _embedder(model, backbone, transform, part.precision, device, n)

    def predict(patches: Patches, advance: ProgressCallback) -> NDArray[np.float32]:
        logits = []
        for rows, seen in _embedded(patches, embedders, device):
            ids = np.array([patches.id[row] for row in rows])
            rounded = []
            for part in record.each_part:
                pooling = part.card_pooling if part.pooling == "card" else part.pooling
                poolings = [seen[part.model, part.view][name] for name in pooling.split("+")]
                embeddings = np.concatenate(poolings, axis=1)
                rounded.append(to_float16(embeddings, patches.source, ids=ids, first_row=rows.start))
            each = [
                predict_logits(np.concatenate([rounded[k] for k in group], axis=1), *layer)
                for group, layer in zip(groups, layers, strict=True)
            ]
            logits.append(mean_logits(each).astype(np.float32))
            advance(len(rows) * logits[-1].shape[1])
        return np.concatenate(logits)

    return predict


def _embedder(
    model: nn.Module, backbone: Backbone, transform: Transform, precision: str, device: torch.device, n: int
) -> _Embedder:
    """Make what embeds n patches, about."""
    n_images = n * transform.n_shown
    model = fastest(model, backbone, device, size=transform.input_size, n_images=n_images, precision=precision)

    def embed(patches: Sequence[NDArray[np.uint8]]) -> dict[str, NDArray[np.float32]]:
        shown = transform.shown(transform(patches, device))
        poolings = embed_shown(model, backbone, shown, precision=precision)
        return {name: values.cpu().numpy() for name, values in poolings.items()}

    return embed


def _embedded(
    patches: Patches, embedders: Mapping[tuple[str, str], _Embedder], device: torch.device
) -> Iterator[tuple[range, dict[tuple[str, str], dict[str, NDArray[np.float32]]]]]:
    """Yield rows of patches with every pooling (n, d) of every embedder; batches are computed side by side."""
    size = _BATCH[device.type]
    n_at_once = torch.get_num_threads() if device.type == "cpu" else 1
    starts = range(0, len(patches.id), size * n_at_once)
    units = [range(start, min(start + size * n_at_once, len(patches.id))) for start in starts]
    with (
        closing(decoded(patches.decode, units, device=device)) as ready,
        side_by_side(device, n_at_once) as map_batches,
    ):
        for rows, images in ready:
            batches = [images[start : start + size] for start in range(0, len(images), size)]
            seen = {}
            for name, embed in embedders.items():
                found = list(map_batches(embed, batches))
                seen[name] = {pooling: np.concatenate([one[pooling] for one in found]) for pooling in found[0]}
            yield rows, seen


def _head_predictor(network: Network, transform: Transform, precision: str, device: torch.device, n: int) -> Predictor:
    """Embed patches once by the frozen backbone that all members share, then apply each member's classifier."""
    embed = _embedder(network.model, network.backbone, transform, precision, device, n)
    weight, bias = (tensor.detach().cpu().numpy() for tensor in (network.weight, network.bias))  # (f, c, d), (f, c)

    def predict(patches: Patches, advance: ProgressCallback) -> NDArray[np.float32]:
        logits = []
        for rows, seen in _embedded(patches, {("", ""): embed}, device):
            outputs = np.einsum("bd,fcd->bfc", seen["", ""][network.pooling], weight, optimize=True) + bias
            logits.append(outputs[..., 1:] - outputs[..., :1])
            advance(len(rows) * len(network.members))
        return np.concatenate(logits)

    return predict


def finetuned_predictor(run: Path, record: RunRecord, backbones: Backbones, device: torch.device, n: int) -> Predictor:
    backbone, loaded = backbones[record.model]
    options = FinetuneOptions.from_record(record.options)
    view = parse_view(record.view)
    tta = bool((record.recipe or {}).get("tta"))  # runs from before it was an ingredient have none
    transform = replace(training_transform(backbone, view, record.statistics), flips=tta)
    network_members = options.network_members(record.folds.n)
    at_once = ComputeOptions().resolved_folds_at_once(device, len(record.fold_models))
    compute = Compute(device, record.precision, at_once)

    def load(members: tuple[int, ...]) -> Network:
        network = build_network(
            backbone,
            loaded,
            options,
            view,
            fold_models=record.fold_models,
            members=members,
            n_classes=record.n_classes,
            device=device,
        )
        load_members(network, run)
        if options.method != "head":
            network.freeze(size=transform.input_size, n_images=n * transform.n_shown, precision=compute.precision)
            network.compute_in(compute.precision)
        return network

    network = load(network_members[0]) if len(network_members) == 1 else None
    if options.method == "head" and network is not None:
        return _head_predictor(network, transform, record.precision, device, n)

    def predict(patches: Patches, advance: ProgressCallback) -> NDArray[np.float32]:
        rows = np.arange(len(patches.id))
        logits = [
            patch_logits(network or load(members), patches.decode, rows, transform, compute=compute, advance=advance)
            for members in network_members
        ]
        return np.concatenate(logits, axis=1)

    return predict
