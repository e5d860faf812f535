"""How does a run, probed or fine-tuned, become a function from patches to logits?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
_Poolings = dict[str, NDArray[np.float32]]  # embeddings (b, d)
_Embedder = Callable[[Sequence[NDArray[np.uint8]]], _Poolings]
_Seen = Mapping[tuple[str, str], _Poolings]  # by embedder
_LogitsOf = Callable[[Patches, range, _Seen], NDArray[np.float32]]  # rows of patches to logits (b, n_models, c-1)


def load_backbones(
    records: Sequence[RunRecord], *, device: torch.device, weights: Path | None, named: Sequence[str]
) -> Backbones:
    """Find the backbones that runs were made by, and refuse those that do not compute what they computed then.

    Args:
        records: of the runs.
        device: that they are to compute on.
        weights: a local checkpoint of the one backbone instead of the hub's.
        named: the files of models of your own; they are run.

    Raises:
        UserError: a run of imported embeddings, a file by which no run was made, a checkpoint for several backbones, or
            a backbone that cannot be had as it was.
    """
    models = {part.model: (part, record.folder) for record in records for part in record.each_part}
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
    found = {}
    for model, (part, run) in models.items():
        revision = f"{part.revision}, weights with SHA-256 {part.weights_sha256}"
        found[model] = recorded_backbone(model, revision, named=own, where=run)
    backbones = {model: (backbone, fetch_weights(backbone, weights=weights)) for model, backbone in found.items()}
    for record in records:
        for part in record.each_part:
            _require_same_backbone(record, part, *backbones[part.model], device)
        if elsewhere := next((part.device for part in record.each_part if part.device != device.type), None):
            say(f"The run was computed on {elsewhere}, this is {device.type}: probabilities may differ slightly.")
    return backbones


def _require_same_backbone(
    record: RunRecord, part: Part, backbone: Backbone, loaded: Weights, device: torch.device
) -> None:
    view = parse_view(part.view)
    now = backbone_parts(backbone, loaded, view, precision=part.precision, device=device)
    now["transform"] = training_transform(backbone, view, record.statistics).record()
    was, found = ({k: of[k] for k in of if k not in _CIRCUMSTANCES} for of in (part.embedding, now))
    if differing := list(differences(was, found)):
        raise UserError(
            f"{record.folder}: its backbone cannot be reproduced here:\n"
            + "\n".join(f"  {name}: the run had {then}, found {here}" for name, then, here in differing)
            + "\nUse the version of mitofm, the `weights` and the files of the run, or train again."
        )
    if part.precision == "fp16" and device.type == "cpu":
        raise UserError(f"{record.folder} was computed in fp16, which needs a GPU. Predict with `device='cuda'`.")


def make_predictor(run: Path, record: RunRecord, *, backbones: Backbones, device: torch.device, n: int) -> Predictor:
    """Make the function that applies all fold models of a run to patches.

    Args:
        run, record: folder and record.
        backbones: from `load_backbones`.
        device: where it computes.
        n: how many patches it is for, about.

    Raises:
        UserError: weights of the run that are missing, damaged, or do not fit.
    """
    make = _probe_predictor if record.kind == "probe" else _finetuned_predictor
    return make(run, record, backbones, device, n)


def _probe_predictor(run: Path, record: RunRecord, backbones: Backbones, device: torch.device, n: int) -> Predictor:
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

    def logits_of(patches: Patches, rows: range, seen: _Seen) -> NDArray[np.float32]:
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
        return mean_logits(each).astype(np.float32)

    return _predictor_of(embedders, logits_of, device)


def _head_predictor(network: Network, transform: Transform, precision: str, device: torch.device, n: int) -> Predictor:
    """Embed patches once by the frozen backbone that all members share, then apply each member's classifier."""
    embed = _embedder(network.model, network.backbone, transform, precision, device, n)
    weight, bias = (tensor.detach().cpu().numpy() for tensor in (network.weight, network.bias))  # (f, c, d), (f, c)

    def logits_of(patches: Patches, rows: range, seen: _Seen) -> NDArray[np.float32]:
        outputs = np.einsum("bd,fcd->bfc", seen["", ""][network.pooling], weight, optimize=True) + bias
        return np.asarray(outputs[..., 1:] - outputs[..., :1])

    return _predictor_of({("", ""): embed}, logits_of, device)


def _embedder(
    model: nn.Module, backbone: Backbone, transform: Transform, precision: str, device: torch.device, n: int
) -> _Embedder:
    """Make what embeds n patches, about."""
    n_images = n * transform.n_shown
    model = fastest(model, backbone, device, size=transform.input_size, n_images=n_images, precision=precision)

    def embed(patches: Sequence[NDArray[np.uint8]]) -> _Poolings:
        shown = transform.shown(transform(patches, device))
        poolings = embed_shown(model, backbone, shown, precision=precision)
        return {name: values.cpu().numpy() for name, values in poolings.items()}

    return embed


def _predictor_of(
    embedders: Mapping[tuple[str, str], _Embedder], logits_of: _LogitsOf, device: torch.device
) -> Predictor:
    """Make a predictor of frozen backbones: batches are embedded side by side, then their rows get their logits."""
    size = _BATCH[device.type]
    n_at_once = torch.get_num_threads() if device.type == "cpu" else 1

    def predict(patches: Patches, advance: ProgressCallback) -> NDArray[np.float32]:
        every, step = range(len(patches.id)), size * n_at_once
        units = [every[start : start + step] for start in every[::step]]
        logits = []
        with (
            closing(decoded(patches.decode, units, device=device)) as ready,
            side_by_side(device, n_at_once) as map_all,
        ):
            for rows, images in ready:
                batches = [images[start : start + size] for start in range(0, len(images), size)]
                seen = {}
                for name, embed in embedders.items():
                    found = list(map_all(embed, batches))
                    seen[name] = {pooling: np.concatenate([one[pooling] for one in found]) for pooling in found[0]}
                logits.append(logits_of(patches, rows, seen))
                advance(len(rows) * logits[-1].shape[1])
        return np.concatenate(logits)

    return predict


def _finetuned_predictor(run: Path, record: RunRecord, backbones: Backbones, device: torch.device, n: int) -> Predictor:
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

    if options.method == "head":
        return _head_predictor(load(network_members[0]), transform, record.precision, device, n)
    network = load(network_members[0]) if len(network_members) == 1 else None

    def predict(patches: Patches, advance: ProgressCallback) -> NDArray[np.float32]:
        rows = np.arange(len(patches.id))
        logits = [
            patch_logits(network or load(members), patches.decode, rows, transform, compute=compute, advance=advance)
            for members in network_members
        ]
        return np.concatenate(logits, axis=1)

    return predict
