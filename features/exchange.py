"""How do embeddings leave a feature store for other tools, and how do those made elsewhere come in?"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from features.blocks import to_float16
from features.console import UserError, progress
from features.entry import Entry
from features.files import new_file, writing
from features.labels import NUMBERS, Classes, binary_labels, read_labels
from features.samples import Samples, make_samples
from features.store import FeatureStore
from features.tables import known_cells, read_splits, read_table

IMPORTED_POOLING = "pooled"  # the one pooling of an imported embedding, whatever its maker calls it
_COLUMNS = ("features", "embeddings", "ids")  # of a file of embeddings
_SHOWN = 3

Record = dict[str, Any]  # what a file of embeddings says about itself, as JSON values
Columns = dict[str, Any]  # name -> array, row by row


def export_embeddings(
    store: FeatureStore, dataset: str, *, model: str, view: str, pooling: str, format: str, out: Path
) -> tuple[int, int]:
    """Write embeddings, with ids, labels, groups, splits, domains and votes beside them, to one file for other tools.

    Args:
        store: where they are.
        dataset, model, view: which embeddings.
        pooling: as for `FeatureStore.read`.
        format: one of `FORMATS`.
        out: the file; it is replaced in one step.

    Returns:
        The shape (n, d) of the embeddings.

    Raises:
        UserError: if they cannot be read, the format is unknown or lacks its package, or `out` cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}: use {', '.join(FORMATS)}.")
    embeddings = store.read(dataset, model=model, view=view, pooling=pooling)
    entry = store.entry(dataset, model=model, view=view)
    record = {
        "dataset": dataset,
        "model": model,
        "view": view,
        "pooling": entry.card_pooling if pooling == "card" else pooling,
        "fingerprint": entry.fingerprint,
        "parts": json.dumps(entry.parts),
    }
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_file(out) as temporary:
            FORMATS[format](temporary, embeddings, store.samples(dataset), record)
    n, d = embeddings.shape
    return n, d


def _columns(samples: Samples) -> Columns:
    return {
        "ids": samples.id,
        "labels": samples.label,
        "groups": samples.group,
        "splits": samples.split,
        "domains": samples.domain,
        "votes": samples.votes,
    }


def _write_hdf5(path: Path, embeddings: NDArray[np.float16], samples: Samples, record: Record) -> None:
    """Write the layout of TRIDENT and CLAM: a dataset `features` (n, d), and row-aligned columns beside it."""
    with h5py.File(path, "w") as file:
        file["features"] = embeddings
        for name, values in _columns(samples).items():
            strings = values.dtype.kind == "U"
            file.create_dataset(name, data=values.astype(object) if strings else values, dtype=_h5_type(values))
        file.attrs.update(record)


def _h5_type(values: NDArray[Any]) -> Any:
    return h5py.string_dtype() if values.dtype.kind == "U" else values.dtype


def _write_npz(path: Path, embeddings: NDArray[np.float16], samples: Samples, record: Record) -> None:
    with path.open("xb") as file:  # given a name, numpy would append its own suffix
        np.savez(file, features=embeddings, **_columns(samples), record=np.array(json.dumps(record)))


def _write_anndata(path: Path, embeddings: NDArray[np.float16], samples: Samples, record: Record) -> None:
    try:
        import anndata
    except ImportError as error:
        raise UserError("`format='anndata'` needs the package anndata: pip install anndata.") from error
    columns = {name.removesuffix("s"): values for name, values in _columns(samples).items()}
    votes = columns.pop("vote")
    columns["obs_names"] = columns.pop("id")
    anndata.AnnData(X=embeddings, obs=columns, obsm={"votes": votes}, uns=record).write_h5ad(path)


FORMATS: dict[str, Callable[[Path, NDArray[np.float16], Samples, Record], None]] = {
    "hdf5": _write_hdf5,
    "anndata": _write_anndata,
    "npz": _write_npz,
}


def import_embeddings(
    store: FeatureStore,
    source: Path,
    *,
    dataset: str,
    model: str,
    view: str,
    ids: Path | None = None,
    table: Path | None = None,
    overwrite: bool = False,
) -> Entry:
    """Bring in embeddings that were made elsewhere, matched to a dataset's patches by id.

    Args:
        store: where they go.
        source: `.npz` or `.h5` with `features` (or `embeddings`) and `ids`; or `.npy`, with `ids` apart.
        dataset, model, view: the names to store them under.
        ids: for `.npy`, the rows' ids: a text file of one id per line, or a CSV with a column `id`.
        table: CSV with columns id, label and optionally group, split, domain, to make `dataset` from; without it
            `dataset` must be in the store.
        overwrite: whether to replace embeddings under the same names.

    Returns:
        The entry, complete.

    Raises:
        UserError: if a file is not as described, ids are repeated, missing or unknown, or numbers do not fit float16.
    """
    samples, classes = (store.samples(dataset), None) if table is None else _read_samples(table)
    if table is not None and dataset in store.datasets():
        stored = store.dataset_attrs(dataset)
        if stored.get("images_digest") != samples.images_digest:
            raise UserError(
                f"{store.path} already has a dataset {dataset!r} with other patches than {table}. Leave out `table` to "
                "add embeddings to that dataset, or give this one another name."
            )
    source_ids, embeddings = _read_embeddings(source, ids)
    positions = _match(source_ids, samples, source)
    halves = to_float16(embeddings[positions], str(source), ids=samples.id)
    if table is not None:
        attrs = {"source": f"imported from {table.name}", "label_names": list(classes or NUMBERS)}
        store.put_samples(dataset, samples, attrs=attrs)
    with source.open("rb") as file:
        parts = {"source_sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    parts |= {"ids_digest": _digest(source_ids), "images_digest": samples.images_digest}
    writer = store.begin(
        dataset,
        model=model,
        view=view,
        poolings={IMPORTED_POOLING: halves.shape[1]},
        card_pooling=IMPORTED_POOLING,
        parts=parts,
        overwrite=overwrite,
        imported=True,
    )
    with progress("import", len(samples), unit="rows") as advance:
        for rows in writer.missing():
            writer.write(rows, {IMPORTED_POOLING: halves[rows.start : rows.stop]})
            advance(len(rows))
    return store.entry(dataset, model=model, view=view)


def _digest(ids: NDArray[np.str_]) -> str:
    return hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest()


def _read_embeddings(source: Path, ids: Path | None) -> tuple[NDArray[np.str_], NDArray[np.floating[Any]]]:
    """Read a file of embeddings: (n,) ids and (n, d) embeddings."""
    if source.suffix not in _READERS:
        raise UserError(f"{source}: cannot import this kind of file; give one of {', '.join(_READERS)}.")
    if (source.suffix == ".npy") != (ids is not None):
        raise UserError(f"{source}: `ids` belongs to .npy files and to no other; .npz and .h5 files hold their ids.")
    try:
        columns = _READERS[source.suffix](source)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{source} cannot be read as {source.suffix}: {error}.") from error
    if ids is not None:
        columns["ids"] = np.array(_read_ids(ids), dtype=np.str_)
    name = next((name for name in ("features", "embeddings") if name in columns), None)
    if name is None or "ids" not in columns:
        raise UserError(
            f"{source} holds {', '.join(columns) or 'nothing'}; expected 'features' (or 'embeddings'), one row per "
            "patch, and 'ids', one string per row."
        )
    embeddings, names = columns[name], columns["ids"].astype(np.str_)
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or names.shape != embeddings.shape[:1]:
        raise UserError(
            f"{source}: {name} is {embeddings.dtype} {embeddings.shape} and ids {names.shape}; expected floats of "
            "shape (n, d) and ids of shape (n,)."
        )
    return names, embeddings


def _read_npy(path: Path) -> Columns:
    return {"features": np.load(path, allow_pickle=False)}


def _read_npz(path: Path) -> Columns:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in _COLUMNS if name in file}


def _read_hdf5(path: Path) -> Columns:
    with h5py.File(path, "r") as file:
        nodes = {name: file[name] for name in _COLUMNS if name in file}
        return {name: _h5_values(node) for name, node in nodes.items() if isinstance(node, h5py.Dataset)}


def _h5_values(node: h5py.Dataset) -> NDArray[Any]:
    return np.asarray(node.asstr()[...] if h5py.check_string_dtype(node.dtype) else node[...])


_READERS: dict[str, Callable[[Path], Columns]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
}


def _read_ids(path: Path) -> list[str]:
    if path.suffix == ".csv":
        return read_table(path, required=("id",)).columns["id"]
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a text file of ids: {error}.") from error


def _read_samples(path: Path) -> tuple[Samples, Classes]:
    """Read a patch table. The images are not at hand, so their digests stay unknown."""
    table = read_table(path, required=("id", "label"), optional=("group", "split", "domain"))
    columns, ids = table.columns, table.columns["id"]
    where = [f"line {line}: {id}" for line, id in zip(table.lines, ids, strict=True)]
    names, _ = read_labels(columns["label"], None, source=path, where=where, skip=False)
    try:
        labels, classes = binary_labels(names)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    samples = make_samples(
        ids,
        labels,
        sha256=[""] * len(ids),
        group=known_cells(columns.get("group")),
        split=read_splits(columns.get("split"), source=path, where=where),
        domain=known_cells(columns.get("domain")),
    )
    return samples, classes


def _match(ids: NDArray[np.str_], samples: Samples, source: Path) -> NDArray[np.intp]:
    """Find for every patch of the table the position of its id in `ids`."""
    row_of = {id: row for row, id in enumerate(ids.tolist())}
    wanted = samples.id.tolist()
    missing = [id for id in wanted if id not in row_of]
    unknown = sorted(set(row_of).difference(wanted))
    faults = [
        f"{len(names)} {what} (first: {', '.join(map(repr, names[:_SHOWN]))})"
        for what, names in (("patches have no embedding in it", missing), ("of its ids are no patches", unknown))
        if names
    ]
    if len(row_of) < len(ids):
        faults.append(f"{len(ids) - len(row_of)} of its rows repeat an id")
    if faults:
        raise UserError(
            f"{source} does not fit the dataset's {len(wanted)} patches: {'; '.join(faults)}. Nothing was imported."
        )
    return np.array([row_of[id] for id in wanted], dtype=np.intp)
