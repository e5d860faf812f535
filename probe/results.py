"""What does a run leave on disk, and how is it read back?

A run is a folder `runs/<id>/`. `run.json` is written last: a folder without it is no run, or not yet.

    run.json         options verbatim, versions, fingerprints, fold digest, what was chosen and how, cost
    predictions.csv  dataset, id, label, group, split, fold, logit, probability: every prediction of every fold's model
    metrics.json     figures computed from predictions.csv by probe.metrics
    *.safetensors    the weights; of a fine-tuned run in a folder per fold

Tables, intervals and plots are computed from these files alone.
"""

from __future__ import annotations

import csv
import io
import json
import platform
import resource
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from features.files import move_folder, write_file, writing
from features.samples import Samples
from features.store import store_key
from probe.metrics import THRESHOLD, best_threshold, scores

RUN_FORMAT = 1
VALIDATION = "validation"  # the split name of out-of-fold predictions
COLUMNS = ("dataset", "id", "label", "group", "split", "fold", "logit", "probability")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions as columns, one row per (patch, fold model). Out-of-fold rows have split "validation".

    Attributes:
        dataset, id, group, split: (n,) str.
        label: (n,) int8.
        fold: (n,) the fold whose model predicts.
        logit: (n,) float32; probability is its sigmoid.
    """

    dataset: NDArray[np.str_]
    id: NDArray[np.str_]
    label: NDArray[np.int8]
    group: NDArray[np.str_]
    split: NDArray[np.str_]
    fold: NDArray[np.intp]
    logit: NDArray[np.float32]

    @property
    def probability(self) -> NDArray[np.float64]:
        """(n,) sigmoid of the logit."""
        logit = self.logit.astype(np.float64)
        return np.asarray(np.exp(-np.logaddexp(0, -logit)))

    def sets(self) -> list[tuple[str, str]]:
        """The (dataset, split) pairs present, in order of appearance."""
        return list(dict.fromkeys(zip(self.dataset.tolist(), self.split.tolist(), strict=True)))

    def select(self, rows: NDArray[np.bool_]) -> Predictions:
        """The rows of a mask."""
        return Predictions(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


def predictions_of(
    dataset: str, samples: Samples, *, split: str, fold: NDArray[np.intp], logit: NDArray[np.floating]
) -> Predictions:
    """Predictions of one dataset: fold (n,) with logit (n,), or fold (F,) with logit (n, F) for every fold's model."""
    if logit.ndim == 2:
        n, n_folds = logit.shape
        rows, fold, logit = np.repeat(np.arange(n), n_folds), np.tile(fold, n), logit.reshape(-1)
    else:
        rows = np.arange(len(samples))
    return Predictions(
        dataset=np.full(len(rows), dataset),
        id=samples.id[rows],
        label=samples.label[rows],
        group=samples.group[rows],
        split=np.full(len(rows), split),
        fold=np.asarray(fold),
        logit=np.asarray(logit, dtype=np.float32),
    )


def concatenate(parts: list[Predictions]) -> Predictions:
    """Several sets of predictions as one."""
    names = Predictions.__dataclass_fields__
    return Predictions(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def threshold_of(predictions: Predictions) -> float:
    """The run's threshold: the best on its out-of-fold predictions; 0.5 where it has none."""
    out_of_fold = predictions.select(predictions.split == VALIDATION)
    return best_threshold(out_of_fold.label, out_of_fold.probability) if len(out_of_fold.label) else THRESHOLD


def evaluate(predictions: Predictions) -> dict[str, Any]:
    """The figures of a run, from its predictions alone.

    Returns:
        `threshold`: chosen on the out-of-fold predictions, for the ensemble. Per set, named "dataset/split":
        n, n_positive; `folds`: every figure per fold model at threshold 0.5, with mean and population std (the
        paper's view); `ensemble` (test sets only): the mean probability over folds judged at `threshold`.
    """
    threshold = threshold_of(predictions)
    sets = {}
    for dataset, split in predictions.sets():
        part = predictions.select((predictions.dataset == dataset) & (predictions.split == split))
        folds = np.unique(part.fold)
        per_fold = [scores(part.label[part.fold == k], part.probability[part.fold == k]) for k in folds]
        first = part.fold == folds[0] if split != VALIDATION else np.ones(len(part.label), dtype=bool)
        figures: dict[str, Any] = {
            "n": int(first.sum()),
            "n_positive": int(part.label[first].sum()),
            "folds": {
                name: {
                    "mean": float(np.mean([figure[name] for figure in per_fold])),
                    "std": float(np.std([figure[name] for figure in per_fold])),
                    "each": [figure[name] for figure in per_fold],
                }
                for name in per_fold[0]
            },
        }
        if split != VALIDATION:
            ids, inverse = np.unique(part.id, return_inverse=True)
            mean = np.bincount(inverse, weights=part.probability) / np.bincount(inverse)
            label = np.empty(len(ids), dtype=np.int8)
            label[inverse] = part.label
            figures["ensemble"] = scores(label, mean, threshold=threshold)
        sets[f"{dataset}/{split}"] = figures
    return {"threshold": threshold, "sets": sets}


def new_run_id(kind: str, model: str) -> str:
    """A name for a run: what, of which model, when, and four random digits."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return f"{kind}-{store_key(model)}-{stamp}-{secrets.token_hex(2)}"


def write_run(
    runs: Path,
    run: Mapping[str, Any],
    predictions: Predictions,
    *,
    weights: Mapping[str, NDArray[Any]],
    seconds: float,
) -> Path:
    """Write a new run's folder, whole or not at all.

    Args:
        runs: the folder of all runs; created if missing.
        run: `kind`, `model`, `options` and whatever else run.json should say; id, format, versions and cost are added.
        predictions: of every fold's model on every set.
        weights: name to array, saved as `weights.safetensors`.
        seconds: what the run took.

    Returns:
        The run's folder; its name is the run's id.

    Raises:
        UserError: if the folder cannot be written.
    """
    from safetensors.numpy import save

    run_id = new_run_id(str(run["kind"]), str(run["model"]))
    half = runs / f".{run_id}.partial"
    try:
        with writing(runs):
            half.mkdir(parents=True)
            whole = save({name: np.ascontiguousarray(array) for name, array in weights.items()})
            write_file(half / "weights.safetensors", [whole])
            finish_run(half, run, predictions, run_id=run_id, seconds=seconds)
            move_folder(half, runs / run_id)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    return runs / run_id


def finish_run(folder: Path, run: Mapping[str, Any], predictions: Predictions, *, run_id: str, seconds: float) -> None:
    """Add to a folder that holds a run's weights what makes it a run; `run.json` comes last.

    Raises:
        OSError: if the folder cannot be written.
    """
    record = {
        "format": RUN_FORMAT,
        "id": run_id,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **run,
        "versions": versions(),
        "cost": {
            **run.get("cost", {}),
            "seconds": round(seconds, 3),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        },
    }
    write_file(folder / "predictions.csv", [_predictions_csv(predictions).encode()])
    write_file(folder / "metrics.json", [_json(evaluate(predictions))])
    write_file(folder / "run.json", [_json(record)])


def versions() -> dict[str, str]:
    """Versions of everything that decides a number."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("mitofm", "torch", "timm", "numpy", "scikit-learn", "zarr"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def read_run(folder: Path) -> dict[str, Any]:
    """A run's run.json with its metrics under `metrics`.

    Raises:
        UserError: if the folder is no run, or one of a newer format.
    """
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        record["metrics"] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is not a finished run: {Path(error.filename).name} is missing. Expected a folder written "
            "by fm-probe or fm-finetune; an interrupted training goes on with fm-finetune --resume."
        ) from error
    except ValueError as error:
        raise UserError(f"{folder}: run.json or metrics.json is damaged ({error}). Run the command again.") from error
    if record.get("format") != RUN_FORMAT:
        raise UserError(
            f"{folder} is a run of format {record.get('format')}; this version reads format {RUN_FORMAT}. "
            "Update mitofm, or run the command again."
        )
    return dict(record)


def read_weights(folder: Path) -> dict[str, NDArray[Any]]:
    """A probe run's weights.

    Raises:
        UserError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / "weights.safetensors"
    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run is incomplete. Run fm-probe again.") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}). Run fm-probe again.") from error


def read_predictions(folder: Path) -> Predictions:
    """A run's predictions.csv.

    Raises:
        UserError: if the file is missing, lacks a column, or holds a malformed row.
    """
    path = folder / "predictions.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = tuple(next(reader, ()))
            if header != COLUMNS:
                raise UserError(f"{path}: found columns {', '.join(header)}, expected {', '.join(COLUMNS)}.")
            rows = list(reader)
        columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(COLUMNS, ())
        return Predictions(
            dataset=np.array(columns["dataset"], dtype=np.str_),
            id=np.array(columns["id"], dtype=np.str_),
            label=np.array(columns["label"], dtype=np.int8),
            group=np.array(columns["group"], dtype=np.str_),
            split=np.array(columns["split"], dtype=np.str_),
            fold=np.array(columns["fold"], dtype=np.intp),
            logit=np.array(columns["logit"], dtype=np.float32),
        )
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run is incomplete. Run the command again.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Run the command again.") from error


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _predictions_csv(predictions: Predictions) -> str:
    columns = (
        predictions.dataset.tolist(),
        predictions.id.tolist(),
        predictions.label.tolist(),
        predictions.group.tolist(),
        predictions.split.tolist(),
        predictions.fold.tolist(),
        [f"{value:.9g}" for value in predictions.logit.tolist()],  # 9 digits give a float32 back exactly
        [f"{value:.6f}" for value in predictions.probability.tolist()],
    )
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(zip(*columns, strict=True))
    return file.getvalue()
