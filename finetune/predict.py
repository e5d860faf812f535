"""What does a run predict for new patches? The mean probability of its fold models, and the class that this gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from extract.backbones import Backbone, Weights, build_model, fetch_weights, find_backbone
from extract.compute import embed_batch, fastest, side_by_side
from extract.datasets import Patches, load_patches
from extract.embed import decoded
from extract.images import SUFFIXES
from extract.prepare import backbone_parts
from extract.views import parse_view
from features.blocks import to_float16
from features.console import ProgressCallback, UserError, progress, say
from features.device import compute_exactly, find_device
from features.files import write_file, writing
from features.fingerprint import differences
from features.labels import class_labels
from features.tables import first_of, is_missing
from finetune.compute import Compute
from finetune.network import Network
from finetune.options import ComputeOptions, FinetuneOptions
from finetune.predict_groups import (
    GroupCounts,
    by_group_path,
    count_groups,
    group_rates,
    groups_of,
    rate_table,
    share_table,
)
from finetune.score import load_members, patch_logits
from finetune.setup import build_network, training_transform
from probe.ensembles import ensemble_of
from probe.logistic import predict_logits
from probe.metrics import as_dict, predicted_classes, probabilities
from probe.predictions import VALIDATION, csv_bytes
from probe.rates import error_rates
from probe.runs import RunRecord, check_weights, read_predictions, read_run, read_weights

_BATCH = {"cpu": 8, "cuda": 64, "mps": 64}  # images per forward pass of a frozen backbone
# Parts of a fingerprint that say where, and of which patches, embeddings were computed, but not by which function.
_CIRCUMSTANCES = ("dataset_digest", "source_mpp", "poolings", "device", "numerics", "revision")
_Predictor = Callable[[Patches, ProgressCallback], NDArray[np.float32]]  # patches to logits (n, n_models, c-1)


def predict_paths(
    run: Path,
    paths: Sequence[Path],
    *,
    out: Path,
    device: str = "auto",
    weights: Path | None = None,
    threshold: float | None = None,
    by: str | None = None,
) -> dict[str, Any]:
    """Apply a run to patches and write a CSV, and with `by="group"` a second one with a row per group (slide).

    Its columns: source (the path given), id (below it), probability (of class 1, the mean over fold models), predicted
    (the class's name), spread (population standard deviation over fold models), and fold_0, fold_1, ... (each one's);
    of a run with several seeds seed_42_fold_0, seed_42_fold_1, ... Of a run with more than two classes: source, id, a
    column probability_<class> for each, predicted (the most probable), and spread (of that class's probability).

    Args:
        run: folder of a probe run or a fine-tuned one.
        paths: image files, folders, CSV files or HDF5 files; see `load_patches`.
        out: the CSV; replaced whole.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        weights: a local checkpoint of the backbone instead of the hub's; it must be the very same.
        threshold: of two classes: class 1 from this probability on; None for the run's own, chosen on its out-of-fold
            predictions.
        by: "group" for the share of class 1, or of each of more than two classes, in every group of patches; see
            `finetune.predict_groups`.

    Returns:
        n, n_positive, n_folds, n_models, threshold, label_names, out; with `by` by_group, what the second CSV holds. Of
        more than two classes counts, patches predicted to be of each, instead of n_positive and threshold.

    Raises:
        UserError: a threshold that is no probability, or for more than two classes, no run, a backbone that cannot be
            had as it was, patches that cannot be read or whose groups are not known, or a full disk.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"`threshold={threshold}` is no probability: expected a number from 0 to 1.")
    if by not in (None, "group"):
        raise UserError(f"`by={by}`: expected group, for the share of each class in every group of patches.")
    outs = [out, *([by_group_path(out)] if by else [])]
    for one in outs:
        _check_out(one, run, paths)
    record = read_run(run)
    two = record.n_classes == 2
    if threshold is not None and not two:
        raise UserError(
            f"`threshold={threshold}`: {run} has {record.n_classes} classes ({first_of(record.label_names)}), of which "
            "it predicts the most probable. A threshold is for two classes: leave it out."
        )
    check_weights(run, record)
    torch_device = find_device(device, apple=record.kind == "probe" and record.precision == "fp32")
    compute_exactly(torch_device)
    backbone = find_backbone(record.model)
    loaded = fetch_weights(backbone, weights=weights)
    _require_same_backbone(run, record, backbone, loaded, torch_device)
    sources = [load_patches(path, grouped=by is not None) for path in paths]
    groups = [groups_of(patches, path) for patches, path in zip(sources, paths, strict=True)] if by else []
    for patches in sources:
        _say_other_classes(patches, record)
    make = _probe_predictor if record.kind == "probe" else _finetuned_predictor
    predict = make(run, record, backbone, loaded, torch_device)
    n_models = len(record.fold_models)
    with progress("predict", n_models * sum(len(patches.id) for patches in sources)) as advance:
        logits = [predict(patches, advance) for patches in sources]
    limit = record.figures.threshold if threshold is None else threshold
    whole = np.concatenate([np.empty((0, n_models, record.n_classes - 1), dtype=np.float32), *logits])
    probability = np.ascontiguousarray(probabilities(whole).swapaxes(1, 2))  # (n, c, n_models)
    mean = probability.mean(axis=2)
    predicted = predicted_classes(mean, limit)
    ids = [(patches.source, id) for patches in sources for id in patches.id]
    tables = [_table(ids, probability, mean, predicted, record)]
    by_group: dict[str, Any] = {}
    if by:
        ends = np.cumsum([len(patches.id) for patches in sources])[:-1]
        of_source, parts = [patches.source for patches in sources], np.split(predicted, ends)
        counted = count_groups(of_source, groups, parts, n_classes=record.n_classes)
        table, described = _judge_groups(counted, run, record, limit)
        tables.append(table)
        without = sum(names.count("") for names in groups)
        by_group = {"by_group": as_dict({"out": str(outs[1]), "n_without": without} | described)}
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        for one, table in zip(outs, tables, strict=True):
            write_file(one, [table])
    counts = np.bincount(predicted, minlength=record.n_classes).tolist()
    return {
        "out": str(out),
        "n": len(ids),
        **({"n_positive": counts[1]} if two else {"counts": counts}),
        "n_folds": record.folds.n,
        "n_models": n_models,
        **({"threshold": limit} if two else {}),
        "label_names": list(record.label_names),
        **by_group,
    }


def _check_out(out: Path, run: Path, paths: Sequence[Path]) -> None:
    """Refuse a result that would replace what it is made from."""
    is_input = out.resolve() in {path.resolve() for path in paths}
    if is_input or out.suffix.lower() in SUFFIXES or (out.exists() and run.resolve() in out.resolve().parents):
        raise UserError(f"{out} is an image, one of the inputs, or part of the run. Name another file as `out`.")


def _say_other_classes(patches: Patches, record: RunRecord) -> None:
    """Say that a table's labels, which are not used, are not the classes that are predicted."""
    names = sorted({label for label in patches.columns.get("label", ()) if not is_missing(label)})
    try:
        class_labels(names, classes=record.label_names)
    except UserError:
        say(
            f"{patches.source}: its labels ({first_of(names)}) are not the classes of the run "
            f"({', '.join(record.label_names)}), which are what is predicted."
        )


def _require_same_backbone(
    run: Path, record: RunRecord, backbone: Backbone, loaded: Weights, device: torch.device
) -> None:
    if record.weights_sha256 is None:
        raise UserError(
            f"{run} was made of imported embeddings, and how they were computed is not known. Expected a run whose "
            "embeddings fm-extract computed: extract the training patches, probe again, and predict with that run."
        )
    view = parse_view(record.view)
    now = backbone_parts(backbone, loaded, view, precision=record.precision, device=device)
    now["transform"] = training_transform(backbone, view, record.statistics).record()
    then = {key: value for key, value in record.embedding.items() if key not in _CIRCUMSTANCES}
    differing = list(differences(then, {key: value for key, value in now.items() if key not in _CIRCUMSTANCES}))
    if differing:
        raise UserError(
            f"{run}: its backbone cannot be reproduced here:\n"
            + "\n".join(f"  {name}: the run had {was}, found {here}" for name, was, here in differing)
            + "\nUse the version of mitofm and the `weights` of the run, or train again."
        )
    if record.precision == "fp16" and device.type == "cpu":
        raise UserError(f"{run} was computed in fp16, which needs a GPU. Predict with `device='cuda'`.")
    if record.device != device.type:
        say(f"The run was computed on {record.device}, this is {device.type}: probabilities may differ slightly.")


def _probe_predictor(
    run: Path, record: RunRecord, backbone: Backbone, loaded: Weights, device: torch.device
) -> _Predictor:
    """Embed patches as extraction does, rounding to float16 included, then apply the fold models' linear layers."""
    weights = read_weights(run)
    view = parse_view(record.view)
    transform = training_transform(backbone, view, "card")
    pooling = record.card_pooling if record.pooling == "card" else record.pooling
    model = build_model(backbone, loaded, dynamic=view.resizes(backbone))
    model = fastest(model, backbone, device, size=transform.input_size, precision=record.precision)
    size = _BATCH[device.type]
    unit = size * (torch.get_num_threads() if device.type == "cpu" else 1)

    def embed(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        poolings = embed_batch(model, backbone, transform(images, device), precision=record.precision)
        return torch.cat([poolings[name] for name in pooling.split("+")], dim=1).cpu().numpy()

    def predict(patches: Patches, advance: ProgressCallback) -> NDArray[np.float32]:
        units = [range(start, min(start + unit, len(patches.id))) for start in range(0, len(patches.id), unit)]
        logits = []
        with (
            closing(decoded(patches.decode, units, device=device)) as ready,
            side_by_side(device, torch.get_num_threads()) as map_batches,
        ):
            for batch, images in ready:
                batches = [images[start : start + size] for start in range(0, len(images), size)]
                embeddings = np.concatenate(list(map_batches(embed, batches)))
                ids = np.array([patches.id[row] for row in batch])
                rounded = to_float16(embeddings, patches.source, ids=ids, first_row=batch.start)
                logits.append(predict_logits(rounded, weights["coef"], weights["intercept"]))
                advance(len(batch) * logits[-1].shape[1])
        return np.concatenate(logits)

    return predict


def _finetuned_predictor(
    run: Path, record: RunRecord, backbone: Backbone, loaded: Weights, device: torch.device
) -> _Predictor:
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
        network.compute_in(compute.precision)
        return network

    network = load(network_members[0]) if len(network_members) == 1 else None

    def predict(patches: Patches, advance: ProgressCallback) -> NDArray[np.float32]:
        rows = np.arange(len(patches.id))
        logits = [
            patch_logits(network or load(members), patches.decode, rows, transform, compute=compute, advance=advance)
            for members in network_members
        ]
        return np.concatenate(logits, axis=1)

    return predict


def _table(
    ids: Sequence[tuple[str, str]],
    probability: NDArray[np.float64],
    mean: NDArray[np.float64],
    predicted: NDArray[np.integer],
    record: RunRecord,
) -> bytes:
    """Make the CSV of patches: of two classes it tells the probability of class 1, of more that of every class.

    Args:
        ids: (n,) source and id.
        probability: (n, c, n_models).
        mean: (n, c) over models.
        predicted: (n,) class numbers.
        record: of the run.
    """
    names, several, two = record.label_names, len(record.seeds) > 1, record.n_classes == 2
    means = {"probability": mean[:, 1]} if two else {f"probability_{n}": mean[:, k] for k, n in enumerate(names)}
    told = probability[np.arange(len(ids)), np.ones_like(predicted) if two else predicted]  # (n, n_models)
    models = [f"seed_{seed}_fold_{fold}" if several else f"fold_{fold}" for seed, fold in record.fold_models]
    each = dict(zip(models, told.T, strict=True)) if two else {}
    columns = [
        *(map(_digits, means.values())),
        [names[k] for k in predicted.tolist()],
        _digits(told.std(axis=1)),
        *(map(_digits, each.values())),
    ]
    header = ("source", "id", *means, "predicted", "spread", *each)
    return csv_bytes(header, ((*id, *row) for id, *row in zip(ids, *columns, strict=True)))


def _digits(values: NDArray[np.float64]) -> list[str]:
    return [f"{value:.6f}" for value in values.tolist()]


def _judge_groups(
    counted: Sequence[GroupCounts], run: Path, record: RunRecord, threshold: float
) -> tuple[bytes, dict[str, Any]]:
    """Make the CSV of groups, and what the summary says of them: of two classes with rates corrected for errors."""
    if record.n_classes > 2:
        groups = [{**vars(one), "n": one.n, "shares": one.shares} for one in counted]
        return share_table(counted, record.label_names), {"groups": groups}
    out_of_fold = ensemble_of(read_predictions(run), record.train, VALIDATION)
    errors = error_rates(out_of_fold, threshold=threshold)
    rates = group_rates(counted, errors)
    described = {"sensitivity": errors.sensitivity, "specificity": errors.specificity, "groups": rates}
    return rate_table(rates), described
