"""What does a run leave on disk, and how is it read back?

A run is a folder `runs/<id>/`. `run.json` is written last: a folder without it is no run, or not one yet.

    run.json         options verbatim, versions, fingerprints, fold digest, what was chosen and how, cost: a `RunRecord`
    predictions.csv  dataset, id, label, group, split, fold, seed, logit, probability: every prediction of every model
    samples.csv      the rows of the patch tables that were predicted: votes, domains and digests beside the above
    metrics.json     figures computed from predictions.csv by probe.evidence: a `RunMetrics`
    learning_curve.csv  figures of probes fitted to fewer slides, where they were asked for
    *.safetensors    the weights; those of a fine-tuned run in a folder per model: `weights_folder`

A run holds one model per fold, or, where it was trained several times on the same folds, one per seed and fold. Lists
over models (`best_epoch`, `history`, the rows of a probe's weights) go seed by seed (`features.folds.fold_models`).
Format 2 is that of runs with several seeds, format 3 that of runs that tell more than two classes apart; all others are
of format 1, which every version reads.

Tables, intervals and plots are computed from these files alone. run.json holds the SHA-256 of every file, and under its
own name that of its other contents, whose keys are those of `probe.records`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from features.console import UserError, say
from features.entry import store_key
from features.files import PARTIAL, move_folder, write_file, writing
from features.folds import FoldModel
from features.samples import Samples
from probe.evidence import evaluate
from probe.leaks import known_patches, with_unseen
from probe.metrics import RunMetrics
from probe.predictions import (
    Predictions,
    parse_predictions,
    parse_samples,
    predictions_csv,
    samples_csv,
    samples_from,
)
from probe.records import CLASSES_FORMAT, RUN_FORMAT, SEEDS_FORMAT, RunRecord

WEIGHTS_FILE = "weights.safetensors"
_NDIM_OF_TWO = {"coef": 2, "intercept": 1}  # axes of a probe's weights in the file, of two classes
Parsed = TypeVar("Parsed")


# -------------------------------------------------------------------------------------------------------------- writing


def new_run_id(kind: str, model: str) -> str:
    """Name a run by its kind, its model, the time and four random digits."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return f"{kind}-{store_key(model.replace(' ', ''))}-{stamp}-{secrets.token_hex(2)}"


def write_run(
    runs: Path,
    record: RunRecord,
    *,
    predictions: Predictions,
    tables: Mapping[str, Samples],
    weights: Mapping[str, NDArray[Any]],
    seconds: float,
    files: Mapping[str, bytes] | None = None,
) -> RunRecord:
    """Write a new run's folder, whole or not at all.

    Args:
        runs: the folder of all runs; created if missing.
        record: what run.json shall say; id, date, versions, digests and memory are added.
        predictions: of every fold's model on every set.
        tables: the patch table of every dataset in the predictions, by its name.
        weights: of a probe, as `read_weights` gives them, saved as `weights.safetensors`.
        seconds: what the run took.
        files: name to content of whatever else the run keeps.

    Returns:
        The run as it was written. The name of its folder is its id.

    Raises:
        UserError: if the folder cannot be written.
    """
    from safetensors.numpy import save

    run_id = new_run_id(record.kind, record.model)
    unfinished = runs / f".{run_id}{PARTIAL}"
    try:
        with writing(runs):
            unfinished.mkdir(parents=True)
            content = save({name: np.ascontiguousarray(_stored(array, record)) for name, array in weights.items()})
            write_file(unfinished / WEIGHTS_FILE, [content])
            written = finish_run(
                unfinished,
                replace(record, id=run_id),
                predictions=predictions,
                tables=tables,
                seconds=seconds,
                files=files,
            )
            move_folder(unfinished, runs / run_id)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return replace(written, folder=runs / run_id)


def finish_run(
    folder: Path,
    record: RunRecord,
    *,
    predictions: Predictions,
    tables: Mapping[str, Samples],
    seconds: float,
    files: Mapping[str, bytes] | None = None,
) -> RunRecord:
    """Complete a folder that holds a run's weights: predictions, tables, metrics, and last `run.json`. See `write_run`.

    Raises:
        OSError: if the folder cannot be written.
    """
    known = known_patches(record.train, tables, record.similar or {})
    for one in known.values():
        say(f"{one.line(record.train)}.")
    metrics = evaluate(with_unseen(predictions, known.values()), tables=tables, ordinal=record.ordinal)
    for name, figures in metrics.sets.items():
        absent = [record.label_names[k] for k, count in enumerate(figures.counts) if not count]
        if absent and record.n_classes > 2:
            means = "are over the other classes" if record.n_classes - len(absent) > 1 else "do not exist"
            say(f"{name} has no patch of {', '.join(absent)}: its means {means}.")
    contents: dict[str, Iterable[bytes]] = {
        "predictions.csv": predictions_csv(predictions),
        "samples.csv": samples_csv(predictions, tables),
        **{name: [content] for name, content in (files or {}).items()},
        "metrics.json": [_json(metrics.as_dict())],
    }
    digests = {name: _write(folder / name, pieces) for name, pieces in contents.items()}
    digests |= {path.relative_to(folder).as_posix(): _digest(path) for path in _weight_files(folder)}
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record = replace(
        record,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        cost=replace(record.cost, seconds=round(seconds, 3), peak_memory_mb=round(peak_memory)),
        versions=versions(),
        sha256=digests,
    )
    record = replace(record, sha256=digests | {"run.json": _own_digest(record.as_json())})
    write_file(folder / "run.json", [_json(record.as_json())])
    return replace(record, metrics=metrics, folder=folder)


def versions() -> dict[str, str]:
    """List the versions of everything that decides a number."""
    known = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("mitofm", "torch", "timm", "numpy", "scikit-learn", "zarr"):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "not installed"
    return known


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write(path: Path, pieces: Iterable[bytes]) -> str:
    """Write a file whole; return its SHA-256."""
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for piece in pieces:
            digest.update(piece)
            yield piece

    write_file(path, hashed())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- reading


def read_run(folder: Path) -> RunRecord:
    """Read run.json and metrics.json of a run.

    Raises:
        UserError: if the folder is no run, one of a newer format, or not as it was written.
    """
    folder = Path(folder)
    for name in ("run.json", "metrics.json"):
        if not (folder / name).is_file():
            if held := sorted(folder.glob("*/run.json")):
                raise UserError(
                    f"{folder} is no run, but a folder of runs. Name one of them, such as {held[0].parent}; all of "
                    f"them are compared by fm-report --runs {folder}."
                )
            raise UserError(
                f"{folder} is not a finished run: {name} is missing. Expected a folder written by fm-probe or "
                "fm-finetune; an interrupted training goes on with fm-finetune --resume."
            )
    raw = _parsed(folder, "run.json", lambda: _json_object((folder / "run.json").read_bytes()))
    if raw.get("format") not in (RUN_FORMAT, SEEDS_FORMAT, CLASSES_FORMAT):
        raise UserError(
            f"{folder} is a run of format {raw.get('format')}; this version reads formats {RUN_FORMAT} to "
            f"{CLASSES_FORMAT}. Update mitofm, or run the command again."
        )
    if _digests(raw).get("run.json") not in (None, _own_digest(raw)):
        raise _not_as_written(folder / "run.json")
    metrics = read_checked(folder, "metrics.json", parse=lambda text: RunMetrics.from_dict(_json_object(text)))
    record = _parsed(folder, "run.json", lambda: RunRecord.from_json(raw))
    missing = [name for name in ("id", "created") if not getattr(record, name)]
    if missing:
        raise UserError(f"{folder / 'run.json'} is damaged ({' and '.join(missing)} missing). Run the command again.")
    return replace(record, metrics=metrics, folder=folder)


def _json_object(content: str | bytes) -> dict[str, Any]:
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    return record


def _parsed(folder: Path, name: str, parse: Callable[[], Parsed]) -> Parsed:
    """Parse a file of a run, and turn what is wrong with it into one message."""
    try:
        return parse()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / name} is damaged ({error}). Run the command again.") from error


def read_predictions(folder: Path, *, seed: int = 0) -> Predictions:
    """Read a run's predictions.csv.

    Args:
        folder: of the run.
        seed: of its only training, for runs of early versions, whose predictions do not say it.

    Raises:
        UserError: if the file is missing, is not the one that the run wrote, lacks a column, or holds a malformed row.
    """
    return read_checked(folder, "predictions.csv", parse=lambda text: parse_predictions(text, seed=seed))


def read_samples(folder: Path, predictions: Predictions) -> dict[str, Samples]:
    """Read the patch tables of a run, by dataset, from its samples.csv.

    Early runs have none: their tables hold what the predictions tell.

    Raises:
        UserError: if the file is not the one that the run wrote, or is damaged.
    """
    if not (folder / "samples.csv").exists():
        return samples_from(predictions)

    def parse(text: str) -> dict[str, Samples]:
        tables = parse_samples(text)
        for name in dict.fromkeys(predictions.dataset.tolist()):
            ids = predictions.id[predictions.dataset == name]
            missing = np.setdiff1d(ids, tables[name].id if name in tables else [])
            if len(missing):
                raise ValueError(f"{len(missing)} patches of {name} are missing, first: {missing[0]}")
            highest = max(tables[name].label.max(initial=0), tables[name].votes.max(initial=0))
            if highest >= predictions.n_classes:
                raise ValueError(f"{name} has a label or vote of {highest}, the run {predictions.n_classes} classes")
        return tables

    return read_checked(folder, "samples.csv", parse=parse)


def read_checked(folder: Path, name: str, *, parse: Callable[[str], Parsed]) -> Parsed:
    """Read a text file of a run and compare it with the digest in run.json; `parse` raises ValueError of damage.

    Raises:
        UserError: if the file is missing, damaged, or not the one that the run wrote.
    """
    path = folder / name
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run is incomplete. Run the command again.") from error
    parsed = _parsed(folder, name, lambda: parse(content.decode()))
    try:
        expected = _digests(_json_object((folder / "run.json").read_bytes())).get(name)
    except (OSError, ValueError, RecursionError):
        expected = None  # `read_run` says what is wrong with run.json
    if expected not in (None, hashlib.sha256(content).hexdigest()):
        raise _not_as_written(path)
    return parsed


def read_weights(folder: Path) -> dict[str, NDArray[Any]]:
    """Read a probe run's weights: "coef" (K * F, c - 1, d) float32 and "intercept" (K * F, c - 1) float64.

    Of a mean of probes these are "coef 0", "intercept 0", "coef 1" and so on (`weight_name`). The file of two classes
    has no axis for them.

    Raises:
        UserError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / WEIGHTS_FILE
    try:
        weights = dict(load_file(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run is incomplete. Run fm-probe again.") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}). Run fm-probe again.") from error
    return {
        name: array[:, None] if array.ndim == _NDIM_OF_TWO.get(name.split()[0]) else array
        for name, array in weights.items()
    }


def weight_name(name: str, group: int, n_groups: int) -> str:
    """Name "coef" or "intercept" of one of a run's probes in its file."""
    return name if n_groups == 1 else f"{name} {group}"


def _stored(array: NDArray[Any], record: RunRecord) -> NDArray[Any]:
    """Take the axis of classes from the weights of two classes."""
    return array[:, 0] if record.n_classes == 2 else array


def check_weights(folder: Path, record: RunRecord) -> None:
    """Compare a run's weights with their digests; runs of early versions have none.

    Raises:
        UserError: if a file is not the one that the run wrote.
    """
    for path in _weight_files(folder):
        if record.sha256.get(path.relative_to(folder).as_posix()) not in (None, _digest(path)):
            raise _not_as_written(path)


def weights_folder(run: Path, model: FoldModel, *, n_seeds: int) -> Path:
    """Return the folder in which a fine-tuned run keeps a model: "fold-0", or "seed-42/fold-0" of several seeds."""
    return (run if n_seeds == 1 else run / f"seed-{model.seed}") / f"fold-{model.fold}"


def _weight_files(folder: Path) -> list[Path]:
    """List the weights of a probe, or all files in the folders of a fine-tuned run's models."""
    candidates = (folder / WEIGHTS_FILE, *folder.glob("fold-*/*"), *folder.glob("seed-*/fold-*/*"))
    return sorted(path for path in candidates if path.is_file() and not path.name.endswith(PARTIAL))


def _digests(raw: Mapping[str, Any]) -> dict[str, str]:
    """Read the SHA-256 of every file from run.json."""
    digests = raw.get("sha256")
    return digests if isinstance(digests, dict) else {}


def _own_digest(raw: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of the canonical JSON of run.json without this digest."""
    others = {name: digest for name, digest in _digests(raw).items() if name != "run.json"}
    text = json.dumps(dict(raw) | {"sha256": others}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_as_written(path: Path) -> UserError:
    return UserError(
        f"{path} is not the file that the run wrote: its SHA-256 differs from the one in run.json. "
        "Restore it, or run the command again."
    )
