"""What does a run say of new patches? Its fold models' mean probability, judged at the run's own threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from extract.backbones import Backbone, Weights, build_model, fetch_weights, find_backbone
from extract.compute import embed_batch, optimize_for_inference
from extract.datasets import Patches, load_patches
from extract.embed import decoded
from extract.prepare import backbone_parts
from extract.views import View, parse_view
from features.blocks import to_float16
from features.console import ProgressCallback, UserError, progress, say
from features.device import find_device
from features.files import write_file, writing
from features.fingerprint import differences
from finetune.network import Network
from finetune.protocol import (
    build_network,
    default_folds_at_once,
    load_folds,
    options_of,
    patch_logits,
    rounds_of,
    transform_of,
)
from finetune.train import Compute
from probe.logistic import predict_logits
from probe.predictions import csv_bytes
from probe.runs import check_weights, read_run, read_weights

COLUMNS = ("source", "id", "probability", "predicted", "spread")
_BATCH = {"cpu": 8, "cuda": 64}  # images per forward pass of a frozen backbone
# Parts of a fingerprint that say where and on what numbers were computed, not which function computed them.
_CIRCUMSTANCES = ("dataset_digest", "source_mpp", "poolings", "device", "revision")
_Judge = Callable[[Patches, ProgressCallback], NDArray[np.float32]]  # patches to logits (n, n_folds)


def predict_paths(
    run: Path,
    paths: Sequence[Path],
    *,
    out: Path,
    device: str = "auto",
    weights: Path | None = None,
    threshold: float | None = None,
) -> dict[str, Any]:
    """Apply a run to patches and write a CSV.

    Its columns: source (the path given), id (below it), probability (of class 1, the mean over fold models), predicted
    (the class's name), spread (population standard deviation over fold models), and fold_0, fold_1, ... (each one's).

    Args:
        run: folder of a probe run or a fine-tuned one.
        paths: image files, folders, CSV files or HDF5 files; see `load_patches`.
        out: the CSV; replaced whole.
        device: "auto", "cpu", "cuda" or "cuda:N".
        weights: a local checkpoint of the backbone instead of the hub's; it must be the very same.
        threshold: class 1 from this probability on; None for the run's own, chosen on its out-of-fold predictions.

    Returns:
        n, n_positive, n_folds, threshold, label_names, out.

    Raises:
        UserError: no run, a backbone that cannot be had as it was, patches that cannot be read, or a full disk.
    """
    record = read_run(run)
    check_weights(run, record)
    place = find_device(device)
    backbone = find_backbone(record["model"])
    loaded = fetch_weights(backbone, weights=weights)
    view = parse_view(record["view"])
    _require_same_backbone(run, record, backbone, loaded, view, place)
    every = [load_patches(path) for path in paths]
    make = _probe_judge if record["kind"] == "probe" else _finetuned_judge
    judge = make(run, record, backbone, loaded, place)
    n_folds = int(record["folds"]["n"])
    with progress("predict", n_folds * sum(len(patches.id) for patches in every)) as advance:
        logits = [judge(patches, advance) for patches in every]
    limit = float(record["metrics"]["threshold"]) if threshold is None else threshold
    probability = [np.exp(-np.logaddexp(0, -each.astype(np.float64))) for each in logits]  # (n, n_folds)
    names = record.get("label_names", ["0", "1"])  # runs before fm-predict did not keep them
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, [_table(every, probability, limit, names)])
    means = np.concatenate([each.mean(axis=1) for each in probability])
    return {
        "out": str(out),
        "n": len(means),
        "n_positive": int((means >= limit).sum()),
        "n_folds": n_folds,
        "threshold": limit,
        "label_names": names,
    }


def _require_same_backbone(
    run: Path, record: Mapping[str, Any], backbone: Backbone, loaded: Weights, view: View, device: torch.device
) -> None:
    then = record["embedding"]
    if "weights_sha256" not in then:
        raise UserError(
            f"{run} was made of imported embeddings, and how they were computed is not known. Expected a run whose "
            "embeddings fm-extract computed: extract the training patches, probe again, and predict with that run."
        )
    precision = str(then["precision"])
    now = backbone_parts(backbone, loaded, view, precision=precision, device=device)
    now["transform"] = transform_of(backbone, view, record.get("recipe", {}).get("statistics", "card")).record()
    known = {key: value for key, value in then.items() if key not in _CIRCUMSTANCES}
    differing = list(differences(known, {key: value for key, value in now.items() if key not in _CIRCUMSTANCES}))
    if differing:
        raise UserError(
            f"{run}: its backbone cannot be reproduced here:\n"
            + "\n".join(f"  {name}: the run had {was}, found {found}" for name, was, found in differing)
            + "\nUse the version of mitofm and the weights (--weights) of the run, or train again."
        )
    if precision == "fp16" and device.type == "cpu":
        raise UserError(f"{run} was computed in fp16, which needs a GPU. Predict with --device cuda.")
    if then["device"] != device.type:
        say(f"The run was computed on {then['device']}, this is {device.type}: probabilities may differ slightly.")


def _probe_judge(
    run: Path, record: Mapping[str, Any], backbone: Backbone, loaded: Weights, device: torch.device
) -> _Judge:
    """Embed as extraction does, float16 rounding included, then the fold models' linear layers."""
    weights = read_weights(run)
    view = parse_view(record["view"])
    transform = transform_of(backbone, view, "card")
    pooling = record["card_pooling"] if record["pooling"] == "card" else record["pooling"]
    model = build_model(backbone, loaded, dynamic=view.input_size is not None)
    example = torch.zeros(1, 3, transform.input_size, transform.input_size, device=device)
    model = optimize_for_inference(model, device, example=example)
    precision, size = str(record["embedding"]["precision"]), _BATCH[device.type]

    def judge(patches: Patches, advance: ProgressCallback) -> NDArray[np.float32]:
        units = [range(start, min(start + size, len(patches.id))) for start in range(0, len(patches.id), size)]
        found = []
        with closing(decoded(patches.decode, units)) as ready:
            for unit, batch in ready:
                poolings = embed_batch(model, backbone, transform(batch, device), precision=precision)
                embeddings = torch.cat([poolings[name] for name in pooling.split("+")], dim=1).cpu().numpy()
                ids = np.array([patches.id[row] for row in unit])
                halves = to_float16(embeddings, patches.source, ids=ids, first_row=unit.start)
                found.append(predict_logits(halves, weights["coef"], weights["intercept"]))
                advance(len(unit) * found[-1].shape[1])
        return np.concatenate(found)

    return judge


def _finetuned_judge(
    run: Path, record: Mapping[str, Any], backbone: Backbone, loaded: Weights, device: torch.device
) -> _Judge:
    options = options_of(record["options"])
    view = parse_view(record["view"])
    transform = transform_of(backbone, view, record["recipe"]["statistics"])
    n_folds = int(record["folds"]["n"])
    machine = Compute(device, str(record["embedding"]["precision"]), default_folds_at_once(device, n_folds))
    rounds = rounds_of(options, n_folds)

    def network_of(folds: tuple[int, ...]) -> Network:
        network = build_network(backbone, loaded, options, view, folds, device=device)
        load_folds(network, run)
        network.compute_in(machine.precision)
        return network

    shared = network_of(rounds[0]) if len(rounds) == 1 else None

    def judge(patches: Patches, advance: ProgressCallback) -> NDArray[np.float32]:
        rows = np.arange(len(patches.id))
        each = [
            patch_logits(shared or network_of(folds), patches.decode, rows, transform, machine=machine, advance=advance)
            for folds in rounds
        ]
        return np.concatenate(each, axis=1)

    return judge


def _table(
    every: Sequence[Patches], probability: Sequence[NDArray[np.float64]], threshold: float, names: Sequence[str]
) -> bytes:
    header = (*COLUMNS, *(f"fold_{fold}" for fold in range(probability[0].shape[1])))
    rows = []
    for patches, each in zip(every, probability, strict=True):
        for id, folds in zip(patches.id, each, strict=True):
            mean = folds.mean()
            row = (f"{mean:.6f}", names[int(mean >= threshold)], f"{folds.std():.6f}")
            rows.append((patches.source, id, *row, *(f"{value:.6f}" for value in folds)))
    return csv_bytes(header, rows)
