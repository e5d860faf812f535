"""How do embeddings leave a feature store for other tools, and how do those made elsewhere come in?

A store holds float16. What comes in is therefore checked for what float16 cannot hold, and what goes out is float32
unless float16 is asked for: SciPy's sparse matrices, numpy.linalg and torch's layers refuse float16.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.blocks import to_float16
from features.console import UserError, progress, say
from features.embedding_files import FORMATS, SlideFeatures, coordinates, read_embeddings, read_folder
from features.entry import Entry
from features.files import check_output, new_file, writing
from features.labels import Classes, class_labels, read_labels, require_grades
from features.rounding import require_float16
from features.samples import Samples, make_samples
from features.store import FeatureStore, table_changed
from features.tables import Table, first_of, known_cells, natural_order, read_splits, read_table

IMPORTED_POOLING = "pooled"  # the one pooling of an imported embedding, whatever its maker calls it
IMPORTED = "imported from "  # how the source of a dataset begins that no patches came with
DTYPES = ("float32", "float16")
_SHOWN = 3


def format_of(path: Path) -> str:
    """Choose the format of `FORMATS` that a file's ending stands for.

    >>> [format_of(Path(name)) for name in ("x.npz", "x.h5ad", "x.h5", "x")]
    ['npz', 'anndata', 'hdf5', 'hdf5']
    """
    return {".npz": "npz", ".h5ad": "anndata"}.get(path.suffix.lower(), "hdf5")


def export_embeddings(
    store: FeatureStore,
    dataset: str,
    *,
    model: str,
    view: str,
    pooling: str,
    format: str,
    out: Path,
    dtype: str = "float32",
) -> tuple[int, int]:
    """Write embeddings, with ids, labels, groups, splits, domains and votes beside them, to one file for other tools.

    Labels are numbers. What those of more than two classes mean stands in `label_names` beside them, a JSON list.

    Positions are written too, as CLAM and TRIDENT have them, if every id holds x and y; see `coordinates`.

    Args:
        store: where they are.
        dataset, model, view: which embeddings.
        pooling: as for `FeatureStore.read`.
        format: one of `FORMATS`.
        out: the file; it is replaced in one step.
        dtype: one of `DTYPES`. Both hold the same numbers.

    Returns:
        The shape (n, d) of the embeddings.

    Raises:
        UserError: if they cannot be read, the format is unknown or lacks its package, or `out` cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}: use {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: use {' or '.join(DTYPES)}.")
    check_output(out)
    embeddings = store.read(dataset, model=model, view=view, pooling=pooling).astype(dtype, copy=False)
    entry = store.entry(dataset, model=model, view=view)
    record = {
        "dataset": dataset,
        "model": model,
        "view": view,
        "pooling": entry.card_pooling if pooling == "card" else pooling,
        "fingerprint": entry.fingerprint,
        "parts": json.dumps(entry.parts),
    }
    samples, classes = store.samples(dataset), store.class_names(dataset)
    if len(classes) > 2:  # what the numbers in the column of labels mean
        record |= {"label_names": json.dumps(classes, ensure_ascii=False)}
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_file(out) as temporary:
            FORMATS[format](temporary, embeddings, samples, record)
    if coordinates(samples.id) is None:
        say(f"{out} has no coords: not every id holds x and y, as in `tile_x1024_y512.png`.")
    n, d = embeddings.shape
    return n, d


def import_embeddings(
    store: FeatureStore,
    source: Path,
    *,
    dataset: str,
    model: str,
    view: str,
    ids: Path | None = None,
    table: Path | None = None,
    order: Sequence[str] | None = None,
    ordinal: bool = False,
    overwrite: bool = False,
) -> Entry:
    """Bring in embeddings that were made elsewhere, matched to a dataset's patches by id.

    Ids that differ from the dataset's in one way only (folders, suffixes, separators, spaces) are matched if that gives
    every patch exactly one embedding, and a message says so.

    Args:
        store: where they go.
        source: a file, see `read_embeddings`; or a folder with a file for each slide, see `read_folder`. Its slides are
            the groups, unless the table has others.
        dataset, model, view: the names to store them under.
        ids: the rows' ids if `source` does not hold them: a text file of one id per line, or a CSV with a column `id`.
        table: CSV with columns id, label and optionally group, split, domain, to make `dataset` from; of a folder, a
            column may name slides instead of patches, whose patches then have their label. Without it `dataset` must be
            in the store, or the files of a folder hold `labels`.
        order: all classes of `table` in the order of their labels; see `features.labels.class_labels`.
        ordinal: whether these are grades.
        overwrite: whether to replace embeddings under the same names.

    Returns:
        The entry, complete.

    Raises:
        UserError: if a name has commas or begins or ends with spaces, a file is not as described, ids are repeated,
            missing or unknown, or float16 does not hold what the embeddings say; see `require_float16`.
    """
    for name in (dataset, model, view):
        if "," in name or name != name.strip():
            raise UserError(
                f"{name!r} could not be named again: options take several names separated by commas, without the "
                "spaces around them. Leave out commas, and spaces at either end."
            )
    folder = read_folder(source) if source.is_dir() else None
    if folder is not None and ids is not None:
        raise UserError(f"{source} is a folder, whose files are matched by slide: leave out `ids`.")
    own_labels = folder is not None and folder.labels is not None and dataset not in store.datasets()
    if table is None and not own_labels and (order is not None or ordinal):
        raise UserError(
            f"`{'classes' if order is not None else 'ordinal'}` is about the labels of a `table`: give one."
        )
    if folder is not None and (table is not None or own_labels):
        samples, classes = _folder_samples(folder, source, table, order, ordinal=ordinal)
    elif table is not None:
        samples, classes = _read_samples(table, order, ordinal=ordinal)
    elif folder is not None and dataset not in store.datasets():
        raise UserError(
            f"{store.path} has no dataset {dataset!r}, and the files of {source} hold no labels. Give a `table` with a "
            "column of slides (or of patches) and a column `label`."
        )
    else:
        samples, classes = store.samples(dataset), store.class_names(dataset)
    if table is not None and dataset in store.datasets():
        stored = store.dataset_attrs(dataset)
        if stored.get("images_digest") != samples.images_digest:
            raise UserError(
                f"{store.path} already has a dataset {dataset!r} with other patches than {table}. Leave out `table` to "
                "add embeddings to that dataset, or give this one another name."
            )
    if folder is not None:
        source_ids, embeddings, source_sha256 = folder.ids, folder.features, folder.sha256
    else:
        source_ids, embeddings = read_embeddings(source, None if ids is None else _read_ids(ids))
        with source.open("rb") as file:
            source_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    embeddings = embeddings[_match(source_ids, samples, source)]
    require_float16(embeddings, str(source), ids=samples.id)
    halves = to_float16(embeddings, str(source), ids=samples.id)
    if table is not None or own_labels:
        attrs: dict[str, Any] = {"source": f"{IMPORTED}{(table or source).name}", "label_names": list(classes)}
        attrs |= {"ordinal": True} if ordinal else {}
        before = store.put_samples(dataset, samples, attrs=attrs)
        if before is not None:
            say(f"{dataset}: {table_changed(before, classes)}")
    parts = {
        "source_sha256": source_sha256,
        "ids_digest": _digest(source_ids),
        "images_digest": samples.images_digest,
    }
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


def _read_ids(path: Path) -> NDArray[np.str_]:
    if path.suffix.lower() in (".csv", ".tsv"):
        return np.array(read_table(path, required=("id",)).columns["id"], dtype=np.str_)
    try:
        with path.open(encoding="utf-8-sig") as file:
            return np.array([line.rstrip("\n") for line in file], dtype=np.str_)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a text file of ids: {error}.") from error


def _read_samples(path: Path, order: Sequence[str] | None, *, ordinal: bool) -> tuple[Samples, Classes]:
    """Read a patch table. The images are not at hand, so their digests stay unknown."""
    table = read_table(path, required=("id", "label"), optional=("group", "split", "domain"))
    where = [f"line {line}: {id}" for line, id in zip(table.lines, table.columns["id"], strict=True)]
    return _samples(path, table.columns, where, order, ordinal=ordinal)


def _samples(
    path: Path,
    columns: Mapping[str, Sequence[str]],
    where: Sequence[str],
    order: Sequence[str] | None,
    *,
    ordinal: bool,
) -> tuple[Samples, Classes]:
    """Make a patch table of the cells of columns, whose patches a message calls as `where` says."""
    names, _ = read_labels(columns["label"], None, source=path, where=where, skip=None)
    try:
        labels, classes = class_labels(names, order=order)
        if ordinal:
            require_grades(classes, ordered=order is not None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    samples = make_samples(
        columns["id"],
        labels,
        sha256=[""] * len(columns["id"]),
        group=known_cells(columns.get("group")),
        split=read_splits(columns.get("split"), source=path, where=where),
        domain=known_cells(columns.get("domain")),
    )
    return samples, classes


def _folder_samples(
    folder: SlideFeatures, source: Path, path: Path | None, order: Sequence[str] | None, *, ordinal: bool
) -> tuple[Samples, Classes]:
    """Make the patch table of a folder: labels of its files, or of a table of slides or patches; groups are slides."""
    ids, slides = folder.ids.tolist(), folder.slides.tolist()
    if path is None:
        assert folder.labels is not None
        columns = {"id": ids, "label": folder.labels.tolist(), "group": slides}
        return _samples(source, columns, ids, order, ordinal=ordinal)
    table = read_table(path, required=("label",), optional=("id", "group", "split", "domain"), say_unused=False)
    if not set(table.columns.get("id", ())).isdisjoint(ids):  # a table of patches
        table.say_unused()
        slide_of = dict(zip(ids, slides, strict=True))
        groups = table.columns.get("group") or [slide_of.get(id, "") for id in table.columns["id"]]
        where = [f"line {line}: {id}" for line, id in zip(table.lines, table.columns["id"], strict=True)]
        return _samples(path, {**table.columns, "group": groups}, where, order, ordinal=ordinal)
    name, rows = _rows_of_slides(table, dict.fromkeys(slides), source)
    table.say_unused(but=name)
    wanted = {key: table.columns[key] for key in ("label", "group", "split", "domain") if key in table.columns}
    spread = {key: [cells[rows[slide]] for slide in slides] for key, cells in wanted.items()}
    patients = slides if name == "group" else known_cells(spread.get("group")) or slides
    spread["group"] = [patient or slide for patient, slide in zip(patients, slides, strict=True)]
    return _samples(path, {**spread, "id": ids}, slides, order, ordinal=ordinal)


def _rows_of_slides(table: Table, slides: Iterable[str], source: Path) -> tuple[str, dict[str, int]]:
    """Find the column that names slides, with or without suffix, and the row of each slide."""
    wanted = set(slides)

    def named(column: str) -> list[str]:
        return [
            cell if cell in wanted else PurePosixPath(cell.replace("\\", "/")).stem for cell in table.columns[column]
        ]

    column = max(table.columns, key=lambda column: len(wanted.intersection(named(column))))
    cells = named(column)
    missing = sorted(wanted.difference(cells), key=natural_order)
    if len(missing) == len(wanted):
        raise UserError(
            f"{table.path}: no column names the slides of {source} ({first_of(missing)}). Expected a column of slides, "
            "called as their files are without suffix, or a column `id` of patches."
        )
    if missing:
        raise UserError(
            f"{table.path}: no label of {len(missing)} of the {len(wanted)} slides of {source} ({first_of(missing)}). "
            "Add them to the table, or take their files out of the folder."
        )
    if twice := [slide for slide in wanted if cells.count(slide) > 1]:
        raise UserError(
            f"{table.path}: the slide {min(twice)} is there more than once. Expected one row for each slide."
        )
    if column not in ("id", "group"):  # of which it was said
        say(f"{table.path}: its slides are those of the column {column}.")
    if others := [cell for cell in cells if cell not in wanted]:
        say(f"{table.path}: {len(others)} of its {len(cells)} slides have no file in {source} ({first_of(others)}).")
    return column, {cell: row for row, cell in enumerate(cells)}


# What may tell the ids of two tools apart, each with the words for it.
_SPELLINGS: dict[str, Callable[[str], str]] = {
    "spaces around them and the kind of separators": lambda id: id.strip().replace("\\", "/").removeprefix("./"),
    "the Unicode form of their letters": lambda id: unicodedata.normalize("NFC", id),
    "their suffixes": lambda id: str(PurePosixPath(id).with_suffix("")) if PurePosixPath(id).name else id,
    "their folders": lambda id: PurePosixPath(id.replace("\\", "/")).name,
    "their folders and suffixes": lambda id: PurePosixPath(id.replace("\\", "/")).stem,
}


def _match(ids: NDArray[np.str_], samples: Samples, source: Path) -> NDArray[np.intp]:
    """Find for every patch of the table the position of its id in `ids`."""
    found, wanted = ids.tolist(), samples.id.tolist()
    if set(found) != set(wanted):
        for difference, spell in _SPELLINGS.items():
            here, there = [spell(id) for id in found], [spell(id) for id in wanted]
            if set(here) == set(there) and len(set(there)) == len(there):
                say(f"{source}: its ids are those of the dataset but for {difference}, and are matched without them.")
                found, wanted = here, there
                break
    row_of = {id: row for row, id in enumerate(found)}
    missing = [id for id in wanted if id not in row_of]
    unknown = sorted(set(row_of).difference(wanted))
    faults = [
        f"{len(names)} {what} (first: {', '.join(map(repr, names[:_SHOWN]))})"
        for what, names in (("patches have no embedding in it", missing), ("of its ids are no patches", unknown))
        if names
    ]
    if len(row_of) < len(found):
        faults.append(f"{len(found) - len(row_of)} of its rows repeat an id")
    if faults:
        raise UserError(
            f"{source} does not fit the dataset's {len(wanted)} patches: {'; '.join(faults)}. {_hint(found, wanted)}"
            "Nothing was imported."
        )
    return np.array([row_of[id] for id in wanted], dtype=np.intp)


def _hint(found: list[str], wanted: list[str]) -> str:
    """Say what may tell ids apart that do not match."""
    if set(found).isdisjoint(wanted) and {id.lstrip("0") for id in found} & {id.lstrip("0") for id in wanted}:
        return "Leading zeros seem to be lost, as happens when ids are read as numbers: save them as strings. "
    return "Save the ids as the dataset has them. "
