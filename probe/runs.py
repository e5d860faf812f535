"""What does a run leave on disk, and how is it read back?

A run is a folder `runs/<id>/`. `run.json` is written last: a folder without it is no run, or not yet.

    run.json         options verbatim, versions, fingerprints, fold digest, what was chosen and how, cost
    predictions.csv  dataset, id, label, group, split, fold, logit, probability: every prediction of every fold's model
    samples.csv      the rows of the patch tables that were predicted: votes, domains and digests beside the above
    metrics.json     figures computed from predictions.csv by probe.evidence
    learning_curve.csv  figures of probes fitted to fewer slides, where they were asked for
    *.safetensors    the weights; of a fine-tuned run in a folder per fold

Tables, intervals and plots are computed from these files alone. run.json holds the SHA-256 of every file, and under its
own name that of what it says itself.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import resource
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from features.files import PARTIAL, move_folder, write_file, writing
from features.samples import MISSING_VOTE, Samples, make_samples
from features.store import store_key
from probe.metrics import THRESHOLD, RunMetrics, best_threshold

RUN_FORMAT = 1
VALIDATION = "validation"  # the split name of out-of-fold predictions
COLUMNS = ("dataset", "id", "label", "group", "split", "fold", "logit", "probability")
SAMPLE_COLUMNS = ("dataset", "id", "label", "group", "split", "votes", "domain", "sha256")
_VOTE = {"0": 0, "1": 1, "-": MISSING_VOTE}  # a rater's vote as a letter
_ROWS = 2**16  # of a CSV file made at a time
_ROUNDED = 1e-6  # predictions.csv gives a probability with six digits


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
        return _sigmoid(self.logit)

    def sets(self) -> list[tuple[str, str]]:
        """The (dataset, split) pairs present, in order of appearance."""
        new = (self.dataset[1:] != self.dataset[:-1]) | (self.split[1:] != self.split[:-1])
        first = np.flatnonzero(np.append(len(self.id) > 0, new))
        return list(dict.fromkeys(zip(self.dataset[first].tolist(), self.split[first].tolist(), strict=True)))

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Predictions:
        """The rows of a mask or an index array; without a copy where a mask's stand together, as those of a set do."""
        chosen: NDArray[np.bool_] | NDArray[np.intp] | slice = rows
        if rows.dtype == np.bool_ and len(rows):
            together = slice(int(rows.argmax()), int(rows.argmax()) + int(rows.sum()))
            chosen = together if rows[together].all() else rows
        return Predictions(**{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__})


def _sigmoid(logit: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(np.exp(-np.logaddexp(0, -logit.astype(np.float64))))


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
        dataset=np.broadcast_to(dataset, len(rows)),
        id=samples.id[rows],
        label=samples.label[rows],
        group=samples.group[rows],
        split=np.broadcast_to(split, len(rows)),
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


def new_run_id(kind: str, model: str) -> str:
    """A name for a run: what, of which model, when, and four random digits."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return f"{kind}-{store_key(model)}-{stamp}-{secrets.token_hex(2)}"


def write_run(
    runs: Path,
    run: Mapping[str, Any],
    predictions: Predictions,
    *,
    tables: Mapping[str, Samples],
    metrics: RunMetrics,
    weights: Mapping[str, NDArray[Any]],
    seconds: float,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a new run's folder, whole or not at all.

    Args:
        runs: the folder of all runs; created if missing.
        run: `kind`, `model`, `options` and whatever else run.json should say; id, format, versions and cost are added.
        predictions: of every fold's model on every set.
        tables: the patch table of every dataset in the predictions, by its name.
        metrics: of `probe.evidence.evaluate`.
        weights: name to array, saved as `weights.safetensors`.
        seconds: what the run took.
        files: name to content of whatever else the run keeps.

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
            finish_run(
                half, run, predictions, tables=tables, metrics=metrics, run_id=run_id, seconds=seconds, files=files
            )
            move_folder(half, runs / run_id)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    return runs / run_id


def finish_run(
    folder: Path,
    run: Mapping[str, Any],
    predictions: Predictions,
    *,
    tables: Mapping[str, Samples],
    metrics: RunMetrics,
    run_id: str,
    seconds: float,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Add to a folder that holds a run's weights what makes it a run; `run.json` comes last. See `write_run`.

    Raises:
        OSError: if the folder cannot be written.
    """
    contents: dict[str, Iterable[bytes]] = {
        "predictions.csv": _predictions_csv(predictions),
        "samples.csv": _samples_csv(predictions, tables),
        **{name: [content] for name, content in (files or {}).items()},
    }
    contents["metrics.json"] = [_json(metrics.as_dict())]
    digests = {name: _write(folder / name, pieces) for name, pieces in contents.items()}
    record: dict[str, Any] = {
        "format": RUN_FORMAT,
        "id": run_id,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **run,
        "sha256": digests | {path.relative_to(folder).as_posix(): _digest(path) for path in _weight_files(folder)},
        "versions": versions(),
        "cost": {
            **run.get("cost", {}),
            "seconds": round(seconds, 3),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        },
    }
    record["sha256"]["run.json"] = _own_digest(record)
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
        UserError: if the folder is no run, one of a newer format, or not as it was written.
    """
    try:
        contents = {name: (folder / name).read_bytes() for name in ("run.json", "metrics.json")}
        record, metrics = (json.loads(content.decode()) for content in contents.values())
        if not isinstance(record, dict) or not isinstance(metrics, dict):
            raise ValueError("expected a JSON object")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} is not a finished run: {Path(error.filename).name} is missing. Expected a folder written "
            "by fm-probe or fm-finetune; an interrupted training goes on with fm-finetune --resume."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}: run.json or metrics.json is damaged ({error}). Run the command again.") from error
    if record.get("format") != RUN_FORMAT:
        raise UserError(
            f"{folder} is a run of format {record.get('format')}; this version reads format {RUN_FORMAT}. "
            "Update mitofm, or run the command again."
        )
    written = _written(record)
    if written.get("run.json") not in (None, _own_digest(record)):
        raise _not_as_written(folder / "run.json")
    if written.get("metrics.json") not in (None, hashlib.sha256(contents["metrics.json"]).hexdigest()):
        raise _not_as_written(folder / "metrics.json")
    return record | {"metrics": metrics}


def check_weights(folder: Path, record: Mapping[str, Any]) -> None:
    """Compare a run's weights with their digests; runs of older versions have none.

    Args:
        folder: of the run.
        record: its run.json.

    Raises:
        UserError: if a file is not the one that the run wrote.
    """
    written = _written(record)
    for path in _weight_files(folder):
        if written.get(path.relative_to(folder).as_posix()) not in (None, _digest(path)):
            raise _not_as_written(path)


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
        UserError: if the file is missing, is not the one that the run wrote, lacks a column, or holds a malformed row.
    """
    path = folder / "predictions.csv"
    columns = read_columns(folder, path.name, COLUMNS)
    try:
        predictions = Predictions(
            dataset=np.array(columns["dataset"], dtype=np.str_),
            id=np.array(columns["id"], dtype=np.str_),
            label=np.array(columns["label"], dtype=np.int8),
            group=np.array(columns["group"], dtype=np.str_),
            split=np.array(columns["split"], dtype=np.str_),
            fold=np.array(columns["fold"], dtype=np.intp),
            logit=np.array(columns["logit"], dtype=np.float32),
        )
        written = np.array(columns["probability"], dtype=np.float64)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({error}). Run the command again.") from error
    if not np.isin(predictions.label, (0, 1)).all():
        raise UserError(f"{path} is damaged (a label is neither 0 nor 1). Run the command again.")
    undefined = np.flatnonzero(~np.isfinite(predictions.logit))
    if len(undefined):
        raise UserError(f"{path}: the logit of line {undefined[0] + 2} is no number. Run the command again.")
    off = np.flatnonzero(~(np.abs(predictions.probability - written) < _ROUNDED))
    if len(off):
        raise UserError(
            f"{path} is damaged (line {off[0] + 2}: the probability is {written[off[0]]:g}, that of its logit is "
            f"{predictions.probability[off[0]]:.6f}). Run the command again."
        )
    return predictions


def read_samples(folder: Path, predictions: Predictions) -> dict[str, Samples]:
    """The patch tables of a run, by dataset: its samples.csv; what predictions.csv knows where there is none.

    Raises:
        UserError: if the file is not the one that the run wrote, or is damaged.
    """
    path = folder / "samples.csv"
    if not path.exists():
        return {name: _samples_of(predictions, name) for name in dict.fromkeys(predictions.dataset.tolist())}
    columns = read_columns(folder, path.name, SAMPLE_COLUMNS)
    dataset = np.array(columns["dataset"], dtype=np.str_)
    try:
        tables = {name: _table(columns, np.flatnonzero(dataset == name)) for name in dict.fromkeys(columns["dataset"])}
    except (ValueError, KeyError, UserError) as error:  # the last of a table that contradicts itself
        raise UserError(f"{path} is damaged ({error}). Run the command again.") from error
    for name in dict.fromkeys(predictions.dataset.tolist()):
        ids = predictions.id[predictions.dataset == name]
        missing = np.setdiff1d(ids, tables[name].id if name in tables else [])
        if len(missing):
            raise UserError(
                f"{path} is damaged ({len(missing)} patches of {name} are missing, first: {missing[0]}). "
                "Run the command again."
            )
    return tables


def _table(columns: Mapping[str, Sequence[str]], rows: NDArray[np.intp]) -> Samples:
    of = {name: [columns[name][row] for row in rows] for name in SAMPLE_COLUMNS}
    votes = [[_VOTE[letter] for letter in cell] for cell in of["votes"]]
    return make_samples(
        of["id"],
        [int(label) for label in of["label"]],
        sha256=of["sha256"],
        group=of["group"],
        split=of["split"],
        votes=np.array(votes, dtype=np.int8).reshape(len(rows), -1),
        domain=of["domain"],
    )


def _samples_of(predictions: Predictions, dataset: str) -> Samples:
    """What predictions alone tell: no votes, domains or digests."""
    of = predictions.select(predictions.dataset == dataset)
    _, first = np.unique(of.id, return_index=True)
    of = of.select(np.sort(first))
    return make_samples(of.id.tolist(), of.label.tolist(), sha256=[""] * len(of.id), group=of.group.tolist())


def read_columns(folder: Path, name: str, expected: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The columns of a CSV file of a run, as text.

    Args:
        folder: of the run.
        name: of the file.
        expected: the columns, in order.

    Raises:
        UserError: if the file is missing, has other columns or ragged rows, or is not the one that the run wrote.
    """
    path = folder / name
    try:
        content = path.read_bytes()
        text = content.decode()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run is incomplete. Run the command again.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}). Run the command again.") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = tuple(next(reader, ()))
        if header != expected:
            raise UserError(f"{path}: found columns {', '.join(header) or 'none'}, expected {', '.join(expected)}.")
        rows = list(reader)
        ragged = next((line for line, row in enumerate(rows, start=2) if len(row) != len(expected)), None)
        if ragged:
            raise ValueError(f"row {ragged} has {len(rows[ragged - 2])} cells of {len(expected)}")
        columns: dict[str, tuple[str, ...]] = dict.fromkeys(expected, ())
        if rows:
            columns = dict(zip(expected, zip(*rows, strict=True), strict=True))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}). Run the command again.") from error
    try:
        written = _written(json.loads((folder / "run.json").read_text(encoding="utf-8"))).get(name)
    except (OSError, ValueError, AttributeError, RecursionError):
        written = None  # `read_run` says what is wrong with it
    if written not in (None, hashlib.sha256(content).hexdigest()):
        raise _not_as_written(path)
    return columns


def _weight_files(folder: Path) -> list[Path]:
    """The weights of a probe, or all that the fold folders of a fine-tuned run hold."""
    found = (folder / "weights.safetensors", *folder.glob("fold-*/*"))
    return sorted(path for path in found if path.is_file() and not path.name.endswith(PARTIAL))


def _written(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """File name to SHA-256, as run.json has it."""
    found = record.get("sha256")
    return found if isinstance(found, dict) else {}


def _own_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a record without this digest."""
    digests = {name: digest for name, digest in _written(record).items() if name != "run.json"}
    text = json.dumps(dict(record) | {"sha256": digests}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_as_written(path: Path) -> UserError:
    return UserError(
        f"{path} is not the file that the run wrote: its SHA-256 differs from the one in run.json. "
        "Restore it, or run the command again."
    )


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write(path: Path, pieces: Iterable[bytes]) -> str:
    """Write a file whole; its SHA-256."""
    digest = hashlib.sha256()

    def counted() -> Iterator[bytes]:
        for piece in pieces:
            digest.update(piece)
            yield piece

    write_file(path, counted())
    return digest.hexdigest()


def _predictions_csv(predictions: Predictions) -> Iterator[bytes]:
    for start in range(0, max(1, len(predictions.id)), _ROWS):
        rows = slice(start, start + _ROWS)
        columns = (
            predictions.dataset[rows].tolist(),
            predictions.id[rows].tolist(),
            predictions.label[rows].tolist(),
            predictions.group[rows].tolist(),
            predictions.split[rows].tolist(),
            predictions.fold[rows].tolist(),
            [f"{value:.9g}" for value in predictions.logit[rows].tolist()],  # 9 digits give a float32 back exactly
            [f"{value:.6f}" for value in _sigmoid(predictions.logit[rows]).tolist()],
        )
        yield csv_bytes(() if start else COLUMNS, zip(*columns, strict=True))


def _samples_csv(predictions: Predictions, tables: Mapping[str, Samples]) -> Iterator[bytes]:
    letter = {vote: letter for letter, vote in _VOTE.items()}
    yield csv_bytes(SAMPLE_COLUMNS, ())
    for name in dict.fromkeys(dataset for dataset, _ in predictions.sets()):
        table, ids = tables[name], predictions.id[predictions.dataset == name]
        ids = ids[np.append(True, ids[1:] != ids[:-1])]  # a patch's fold models mostly stand together
        if not np.array_equal(ids, table.id):
            table = table.select(np.isin(table.id, ids))
        for start in range(0, len(table), _ROWS):
            rows = slice(start, start + _ROWS)
            votes = ["".join(letter[vote] for vote in row) for row in table.votes[rows].tolist()]
            columns = (table.id, table.label, table.group, table.split, None, table.domain, table.sha256)
            listed = (votes if column is None else column[rows].tolist() for column in columns)
            yield csv_bytes((), zip(repeat(name), *listed, strict=False))


class _Lines:
    """What a csv.writer writes to: lines that end in a bare line feed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line.removesuffix("\r\n") + "\n")


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A CSV file that gives every cell back, whatever characters it holds; without a header, a further part of one."""
    out = _Lines()
    writer = csv.writer(out, lineterminator="\r\n")  # told "\n", Python before 3.13 leaves a lone "\r" unquoted
    if header:
        writer.writerow(header)
    writer.writerows(rows)
    return "".join(out.lines).encode()
