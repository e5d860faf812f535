"""Where do embeddings live, and when is one of them there, whole and right?

A Zarr v3 store (docs/store-format.md is its specification). Every array has its final shape from the start and is
written in blocks of whole rows, each once. zarr itself writes and reads the patch table; the blocks of embeddings are
plain files (raw float16 and a checksum), written and read here directly: the writer can then flush them to the disk in
a safe order, and the reader maps them into memory. Any Zarr reader opens them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from features.console import Advance, UserError, nearest, progress
from features.files import (
    PARTIAL,
    Use,
    discard_folder,
    flush,
    in_use,
    move_folder,
    only_writer,
    place_folder,
    sweep,
    sweep_below,
    temporary_name,
    write_file,
    writing,
)
from features.layout import (
    MAX_ROWS_PER_BLOCK,
    MIN_ROWS_PER_BLOCK,
    ROWS_PER_CHUNK,
    STRING_COLUMNS,
    Grid,
    column_metadata,
    decode_block,
    encode_block,
    group_metadata,
    not_finite,
    rows_per_block,
)
from features.samples import Samples

FORMAT = "mitofm-features"
FORMAT_VERSION = 1
_DIGEST = "attributes_digest"
_MOST_MAPPED = 256  # blocks; a process may usually have 1,024 files open
_MOST_KEPT = 2**30  # bytes of an array whose blocks stay mapped: pages of a mapped file count as the process's memory
_OVERWRITE = "write this entry anew with --overwrite"
_AGAIN = "run fm-extract for this dataset again"


def store_key(name: str) -> str:
    """The Zarr node name of any name: `timm/x` -> `timm--x`, `hf-hub:a/b@r` -> `hf-hub--a--b@r`.

    Raises:
        UserError: if the name is empty, climbs (`..`), holds control characters, or would clash with a Zarr name.
    """
    key = re.sub(r"[^\w.@+=-]", "-", re.sub(r"[/:\\]+", "--", name))
    if not name.strip() or not name.isprintable() or ".." in name:
        raise UserError(f"{name!r} cannot name anything in a feature store: it is empty, unprintable, or holds '..'.")
    if key.startswith((".", "__")) or key == "zarr.json" or len(key.encode()) > 200:
        raise UserError(f"{name!r} cannot name anything in a feature store: use a plain name of at most 200 bytes.")
    return key


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the canonical JSON of everything that decides an embedding's numbers."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_float16(
    embeddings: NDArray[np.floating[Any]], what: str, *, ids: NDArray[np.str_], first_row: int = 0
) -> NDArray[np.float16]:
    """Embeddings (n, d) as they are stored, each of them finite.

    Args:
        embeddings: of any float type.
        what: whose they are, for the message.
        ids: (n,) the patches' ids, for the message.
        first_row: the number of the first one in its patch table, for the message.

    Raises:
        UserError: if one is NaN, infinite, or beyond the range of float16.
    """
    with np.errstate(over="ignore"):  # judged below
        halves = np.ascontiguousarray(embeddings, dtype="<f2")
    bad = np.flatnonzero(not_finite(halves).any(axis=1))
    if len(bad):
        fault = "beyond the range of float16 (±65504)" if np.isfinite(embeddings[bad]).all() else "NaN or infinite"
        raise UserError(
            f"{what}: {len(bad)} embeddings are {fault} (first: row {first_row + bad[0]}, {ids[bad[0]]}). Look at "
            "these patches, or compute with --precision fp32; what was written before is kept."
        )
    return halves


@dataclass(frozen=True)
class Entry:
    """What the store knows about one dataset seen by one model through one view.

    Attributes:
        dataset, model, view: true names, as given by the user.
        poolings: name -> width, in the order in which a block is written.
        card_pooling: the embedding that the model's card recommends, a sum of poolings: "cls", "cls+mean", "pooled".
        fingerprint: SHA-256 over `parts`.
        parts: everything that decides the numbers.
        n_rows: rows, as in the patch table.
        rows_per_block: rows written at once.
        batch_size: images per forward pass, where recorded; no part of the fingerprint.
        imported: whether the embeddings were computed elsewhere.
        n_done: blocks that were there when this record was made.
        folder: where it lies.
    """

    dataset: str
    model: str
    view: str
    poolings: dict[str, int]
    card_pooling: str
    fingerprint: str
    parts: dict[str, Any]
    n_rows: int
    rows_per_block: int
    batch_size: int | None
    imported: bool
    n_done: int
    folder: Path

    @property
    def n_blocks(self) -> int:
        return -(-self.n_rows // self.rows_per_block)

    @property
    def complete(self) -> bool:
        return self.n_done == self.n_blocks

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.model}/{self.view}"

    def rows(self, block: int) -> range:
        """The rows of a block."""
        start = block * self.rows_per_block
        return range(start, min(start + self.rows_per_block, self.n_rows))

    def grid(self, pooling: str) -> Grid:
        """How the array of a pooling is cut up."""
        return Grid(self.n_rows, self.poolings[pooling], self.rows_per_block)

    def block_path(self, pooling: str, block: int) -> Path:
        """The file of a block."""
        return Path(f"{self.folder}/{pooling}/c.{block}.0")

    def missing(self) -> list[int]:
        """The blocks that are not there now: those without a file of the last pooling."""
        last = self.folder / list(self.poolings)[-1]
        there = {path.name for path in last.glob("c.*.0")}
        return [block for block in range(self.n_blocks) if f"c.{block}.0" not in there]

    def size(self) -> int:
        """Bytes on the disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Problem:
    """One thing that `FeatureStore.verify` found wrong."""

    where: str  # dataset[/model/view[/pooling]]
    block: int | None
    rows: tuple[int, int] | None  # first and last
    what: str  # the whole sentence, with the remedy


class FeatureStore:
    """An open feature store. Build one with `FeatureStore.open` or `FeatureStore.open_or_create`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # A file is known by device, inode and time of change: one that is replaced is another file.
        self._verified: set[tuple[int, int, int]] = set()  # checksums have held
        self._mapped: dict[tuple[int, int, int], NDArray[np.float16]] = {}  # each holds a file descriptor

    @classmethod
    def open(cls, path: Path) -> FeatureStore:
        """Open a store that exists.

        Raises:
            UserError: if there is none, it is something else, or a newer version wrote it.
        """
        if not (path / "zarr.json").is_file():
            what = "is not a feature store (it has no zarr.json)" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}. Run fm-extract first, or name the store with --store.")
        attributes = _attributes(path)
        if attributes.get("format") != FORMAT:
            raise UserError(f"{path} is a Zarr group, but not a mitofm feature store. Name another --store.")
        version = attributes.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise UserError(
                f"{path} was written in store format {version}; this mitofm reads formats up to {FORMAT_VERSION}. "
                "Upgrade mitofm (pip install --upgrade mitofm), or use another --store."
            )
        return cls(path)

    @classmethod
    def open_or_create(cls, path: Path) -> FeatureStore:
        """Open a store, or make an empty one where nothing is.

        Raises:
            UserError: as `open`; if something else lies there; or if the place cannot be written.
        """
        if not (path / "zarr.json").exists():
            strange = path.exists() and (not path.is_dir() or any(not p.name.endswith(PARTIAL) for p in path.iterdir()))
            if strange and not (path / "zarr.json").exists():  # another process may just have made the store
                raise UserError(f"{path} exists but is not a feature store. Name another --store; nothing was changed.")
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
                _write_group(path, {"format": FORMAT, "format_version": FORMAT_VERSION})
                flush(path.parent)
        return cls.open(path)

    def datasets(self) -> list[str]:
        """The true names of all datasets."""
        return [str(_attributes(folder).get("name")) for folder in _groups(self.path)]

    def dataset_attrs(self, dataset: str) -> dict[str, Any]:
        """A dataset's attributes: its name, digests, counts, and what its maker recorded about it.

        Raises:
            UserError: if the store has no such dataset, or its metadata are damaged.
        """
        folder = self.path / store_key(dataset)
        if not (folder / "zarr.json").exists():
            known = self.datasets()
            raise UserError(
                f"{self.path} has no dataset {dataset!r}; it has: {', '.join(known) or 'none'}."
                f"{nearest(dataset, known)} Run fm-extract --dataset {dataset} first."
            )
        attributes = _attributes(folder)
        if attributes.get("name") != dataset:
            raise UserError(
                f"{folder} holds the dataset {attributes.get('name')!r}, not {dataset!r}: names that differ only in "
                "special characters cannot share a store. Rename one, or use another --store."
            )
        return attributes

    def samples(self, dataset: str) -> Samples:
        """A dataset's patch table, checked against its recorded digest.

        Raises:
            UserError: if the store has no such dataset, or the table is damaged.
        """
        attributes = self.dataset_attrs(dataset)
        folder = self.path / store_key(dataset) / "samples"
        samples = _read_samples(folder, int(attributes.get("n_samples", 0)), int(attributes.get("n_raters", 0)))
        if samples.table_digest != attributes.get("table_digest"):
            raise _damaged(folder, "the patch table does not match its digest", _AGAIN)
        return samples

    def put_samples(
        self, dataset: str, samples: Samples, *, attrs: Mapping[str, Any], overwrite: bool = False, shared: bool = False
    ) -> bool:
        """Record a dataset's patch table. The same table twice is no work.

        Args:
            dataset: true name.
            samples: the table; its row order is that of every embedding of this dataset.
            attrs: what else to record about the dataset, as JSON values.
            overwrite: whether to discard this dataset, with all its embeddings, if its images have changed.
            shared: whether other machines may be doing the same at this moment, see `begin`.

        Returns:
            Whether a table of the same images, but with other labels, groups, splits, votes or domains, was replaced.

        Raises:
            UserError: if the store has other images under this name, or cannot be written.
        """
        if len(samples) == 0:
            raise UserError(f"dataset {dataset!r} has no patches: there is nothing to store.")
        folder = self.path / store_key(dataset)
        attributes = dict(attrs) | {
            "name": dataset,
            "n_samples": len(samples),
            "n_raters": samples.votes.shape[1],
            "images_digest": samples.images_digest,
            "table_digest": samples.table_digest,
        }
        with writing(self.path), only_writer(self.path) as locked:
            if locked and not shared:
                sweep(self.path)
            if not folder.exists():
                new = temporary_name(folder)
                new.mkdir()
                _write_samples(new / "samples", samples)
                _write_group(new, attributes)
                place_folder(new, folder)
            if (folder / "zarr.json").exists():
                stored = self.dataset_attrs(dataset)
                if stored.get("images_digest") == attributes["images_digest"]:
                    if locked and not shared:
                        sweep(folder)
                    return self._update_table(folder, samples, stored, attributes)
                if not overwrite:
                    raise UserError(
                        f"{self.path} already has a dataset {dataset!r} of other images: {stored.get('n_samples')} "
                        f"with digest {stored.get('images_digest')}, now {len(samples)} with digest "
                        f"{attributes['images_digest']}. Use another --store, or --overwrite to discard the stored "
                        "dataset and all its embeddings."
                    )
                self._discard(folder)
            new = temporary_name(folder)
            new.mkdir()
            _write_samples(new / "samples", samples)
            _write_group(new, attributes)
            move_folder(new, folder)
        return False

    def _update_table(self, folder: Path, samples: Samples, stored: dict[str, Any], attributes: dict[str, Any]) -> bool:
        if stored.get("table_digest") == attributes["table_digest"]:
            with suppress(UserError):  # a damaged table, or one whose replacement was cut short, is written anew
                self.samples(attributes["name"])
                return False
        # Attributes first: whoever reads in between finds a table that does not match its digest, never a wrong one.
        _write_group(folder, attributes)
        new = temporary_name(folder / "samples")
        _write_samples(new, samples)
        move_folder(new, folder / "samples")
        return True

    def entries(self, dataset: str | None = None, model: str | None = None) -> list[Entry]:
        """Everything embedded so far, complete or not, in the order of the names.

        Raises:
            UserError: if an entry's metadata are damaged.
        """
        return [
            entry
            for folder in self._entry_folders(dataset)
            if (entry := _read_entry(folder)) and model in (None, entry.model)
        ]

    def begin(
        self,
        dataset: str,
        model: str,
        view: str,
        *,
        poolings: Mapping[str, int],
        card_pooling: str,
        parts: Mapping[str, Any],
        overwrite: bool = False,
        imported: bool = False,
        batch_size: int | None = None,
        shared: bool = False,
    ) -> Writer:
        """Start to write an entry, or go on with one that was interrupted.

        Args:
            dataset: a dataset whose patch table is in the store.
            model: true name.
            view: input policy, as "full" or "center64".
            poolings: name -> width, in the order in which they shall be written.
            card_pooling: the poolings, joined by "+", that make the embedding recommended by the model's card.
            parts: everything that decides the numbers, as JSON values.
            overwrite: whether to discard what another fingerprint, or this one, has left.
            imported: whether the embeddings were computed elsewhere.
            batch_size: images per forward pass, recorded if the entry is new; one that is there keeps its own.
            shared: whether other machines may be doing the same at this moment. Then nothing unfinished is swept up.
                Of several that make the entry at once the first wins, and all go on with what it recorded; for that
                no lock is needed.

        Raises:
            UserError: if embeddings of another fingerprint are in the way, another process is writing while they shall
                be overwritten, or the store cannot be written.
        """
        n_rows = int(self.dataset_attrs(dataset)["n_samples"])
        entry = Entry(
            dataset=dataset,
            model=model,
            view=view,
            poolings=dict(poolings),
            card_pooling=card_pooling,
            fingerprint=fingerprint(parts),
            parts=dict(parts),
            n_rows=n_rows,
            rows_per_block=rows_per_block(n_rows),
            batch_size=batch_size,
            imported=imported,
            n_done=0,
            folder=self._folder(dataset, model, view),
        )
        with writing(self.path), only_writer(self.path) as locked:
            replaced = entry.folder.exists()  # asked first: a folder that appears from now on is whole, and stays
            if overwrite or not (entry.folder / "zarr.json").exists():
                _create_entry(entry, replaced=replaced, swept=locked and not shared)
            stored = _read_entry(entry.folder)
            _refuse_other(stored, entry)
            return Writer(stored, self.samples(dataset).id, shared=shared)

    def read(
        self,
        dataset: str,
        model: str,
        view: str,
        pooling: str = "card",
        *,
        rows: NDArray[np.intp] | NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float16]:
        """Embeddings of one dataset by one model through one view.

        Each block's checksum is computed once per open store, when the block is first touched.

        Args:
            dataset, model, view: true names.
            pooling: a stored pooling, several joined by "+", or "card" for what the model's card recommends.
            rows: which rows, as indices in any order or as a mask; all by default.

        Returns:
            (n, d) float16, finite.

        Raises:
            UserError: if there is no such entry or pooling, if it is not complete, or if a checksum fails.
        """
        return self.embeddings(dataset, model, view, pooling, rows=rows).read()

    def embeddings(
        self,
        dataset: str,
        model: str,
        view: str,
        pooling: str = "card",
        *,
        rows: NDArray[np.intp] | NDArray[np.bool_] | None = None,
    ) -> Embeddings:
        """The same embeddings, not read yet. Args and raises: as `read`, but for the checksums."""
        entry = self._entry(dataset, model, view)
        if not entry.complete:
            missing = [f"{rows.start}–{rows.stop - 1}" for rows in map(entry.rows, entry.missing())]
            shown = ", ".join(missing[:4]) + ", …" * (len(missing) > 4)
            raise UserError(f"{_incomplete(entry)} Missing rows: {shown}.")
        names = (entry.card_pooling if pooling == "card" else pooling).split("+")
        for name in names:
            if name not in entry.poolings:
                raise UserError(
                    f"{entry.name} has no pooling {name!r}; it has {', '.join(entry.poolings)} (and card = "
                    f"{entry.card_pooling}).{nearest(name, entry.poolings)}"
                )
            _check_array(entry, name)
        return Embeddings(self, entry, tuple(names), None if rows is None else np.arange(entry.n_rows)[rows])

    def _read_all(self, entry: Entry, pooling: str) -> NDArray[np.float16]:
        grid = entry.grid(pooling)
        embeddings = np.empty((grid.n_rows, grid.width), np.float16)
        for block in range(entry.n_blocks):
            for k, chunk in enumerate(self._chunks(entry, pooling, block)):
                start = block * grid.rows_per_block + k * grid.rows_per_chunk
                part = embeddings[start : start + grid.rows_per_chunk]
                part[:] = chunk[: len(part)]
        return embeddings

    def _read_some(self, entry: Entry, pooling: str, indices: NDArray[np.intp]) -> NDArray[np.float16]:
        grid = entry.grid(pooling)
        embeddings = np.empty((len(indices), grid.width), np.float16)
        # A row is copied as one element of many bytes: twice as fast as number by number.
        row_type = f"V{2 * grid.width}"
        targets = embeddings.view(row_type)[:, 0]
        blocks, inside = np.divmod(indices, grid.rows_per_block)
        order = np.argsort(blocks, kind="stable")
        chunk, row = np.divmod(inside[order], grid.rows_per_chunk)
        bounds = np.searchsorted(blocks[order], np.arange(entry.n_blocks + 1)).tolist()
        for block, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop:
                rows_of_bytes = self._chunks(entry, pooling, block).view(row_type)[..., 0]
                targets[order[start:stop]] = rows_of_bytes[chunk[start:stop], row[start:stop]]
        return embeddings

    def _chunks(self, entry: Entry, pooling: str, block: int) -> NDArray[np.float16]:
        """A block's chunks, mapped into memory, once their checksums have held: (chunks, rows per chunk, width)."""
        path = entry.block_path(pooling, block)
        try:
            status = path.stat()
            known_as = (status.st_dev, status.st_ino, status.st_mtime_ns)
            if known_as in self._mapped:
                return self._mapped[known_as]
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""
        except OSError as error:
            raise _bad_block(entry, pooling, block, f"cannot be read ({error.strerror})") from error
        check = known_as not in self._verified
        try:
            chunks = decode_block(data, len(entry.rows(block)), entry.grid(pooling), check=check)
        except ValueError as error:
            raise _bad_block(entry, pooling, block, str(error)) from error
        self._verified.add(known_as)
        if len(self._mapped) >= _MOST_MAPPED:
            self._mapped.clear()
        if entry.n_rows * entry.poolings[pooling] * 2 <= _MOST_KEPT:
            self._mapped[known_as] = chunks
        return chunks

    def verify(self, dataset: str | None = None, model: str | None = None) -> list[Problem]:
        """Look at every byte: tables against their digests, blocks against their checksums, numbers for NaN.

        Args:
            dataset, model: only these.
        """
        problems: list[Problem] = []
        for folder in self._dataset_folders(dataset):
            try:
                self.samples(dataset or str(_attributes(folder).get("name")))
            except UserError as error:
                problems.append(Problem(folder.name, None, None, str(error)))
        entries = []
        for folder in self._entry_folders(dataset):
            try:
                entry = _read_entry(folder)
            except UserError as error:
                problems.append(Problem(folder.relative_to(self.path).as_posix(), None, None, str(error)))
                continue
            if model in (None, entry.model):
                entries.append(entry)
        self._verified.clear()
        self._mapped.clear()
        total = sum(entry.n_done * len(entry.poolings) for entry in entries)
        with progress("verify", total, unit="blocks") as advance:
            for entry in entries:
                if not entry.complete:
                    problems.append(Problem(entry.name, None, None, _incomplete(entry)))
                for pooling in entry.poolings:
                    problems += self._verify_array(entry, pooling, advance)
        return problems

    def _verify_array(self, entry: Entry, pooling: str, advance: Advance) -> Iterator[Problem]:
        where = f"{entry.name}/{pooling}"
        try:
            _check_array(entry, pooling)
        except UserError as error:
            yield Problem(where, None, None, str(error))
            return
        for block in sorted(set(range(entry.n_blocks)).difference(entry.missing())):
            rows = entry.rows(block)
            try:
                embeddings = self._chunks(entry, pooling, block).reshape(-1, entry.poolings[pooling])[: len(rows)]
                if not_finite(embeddings).any():
                    raise _bad_block(entry, pooling, block, "holds NaN or infinity")
            except UserError as error:
                yield Problem(where, block, (rows.start, rows.stop - 1), str(error))
            advance(1)

    def remove(self, dataset: str, model: str | None = None, view: str | None = None) -> None:
        """Remove an entry, all entries of a model, or a whole dataset.

        Raises:
            UserError: if there is no such thing, or another process is writing to it.
        """
        self.dataset_attrs(dataset)
        folder = self.path.joinpath(*(store_key(name) for name in (dataset, model, view) if name is not None))
        with writing(self.path), only_writer(self.path):
            if not (folder / "zarr.json").exists():
                raise UserError(f"{self.path} has no {'/'.join(filter(None, (dataset, model, view)))}.")
            self._discard(folder)

    def _discard(self, folder: Path) -> None:
        for zarr_json in folder.rglob("zarr.json"):
            if in_use(zarr_json.parent):
                raise _busy(zarr_json.parent)
        discard_folder(folder)

    def _entry(self, dataset: str, model: str, view: str) -> Entry:
        folder = self._folder(dataset, model, view)
        if not (folder / "zarr.json").exists():
            self.dataset_attrs(dataset)
            there = [f"{entry.model}/{entry.view}" for entry in self.entries(dataset)]
            raise UserError(
                f"{self.path} has no embeddings of {dataset!r} by {model!r} with view {view!r}; it has: "
                f"{', '.join(there) or 'none'}.{nearest(f'{model}/{view}', there)} "
                f"Run fm-extract --dataset {dataset} --model {model} --view {view} first."
            )
        entry = _read_entry(folder)
        if (entry.dataset, entry.model, entry.view) != (dataset, model, view):
            raise UserError(
                f"{folder} holds {entry.name}, not {dataset}/{model}/{view}: names that differ only in special "
                "characters cannot share a store. Use another --store."
            )
        return entry

    def _folder(self, dataset: str, model: str, view: str) -> Path:
        if store_key(model) == "samples":
            raise UserError("a model cannot be called 'samples': that is the name of the patch table.")
        return self.path / store_key(dataset) / store_key(model) / store_key(view)

    def _dataset_folders(self, dataset: str | None) -> list[Path]:
        return _groups(self.path) if dataset is None else [self.path / store_key(dataset)]

    def _entry_folders(self, dataset: str | None) -> list[Path]:
        models = [
            path for folder in self._dataset_folders(dataset) for path in _groups(folder) if path.name != "samples"
        ]
        return [view for model in models for view in _groups(model)]


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Rows of one entry that stay in the store until they are asked for: (n, d) float16, finite.

    Attributes:
        store, entry, poolings: where they are; poolings are joined side by side.
        rows: (n,) which rows of the entry; None for all of them.
    """

    store: FeatureStore
    entry: Entry
    poolings: tuple[str, ...]
    rows: NDArray[np.intp] | None

    def __len__(self) -> int:
        return self.entry.n_rows if self.rows is None else len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), sum(self.entry.poolings[name] for name in self.poolings)

    def select(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Embeddings:
        """Some of these rows, by number in the order given or by mask."""
        own = np.arange(len(self)) if self.rows is None else self.rows
        return replace(self, rows=own[rows])

    def read(self) -> NDArray[np.float16]:
        """All of them, in memory.

        Raises:
            UserError: if a checksum fails.
        """
        parts = [
            self.store._read_all(self.entry, name)
            if self.rows is None
            else self.store._read_some(self.entry, name, self.rows)
            for name in self.poolings
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float16]]]:
        """All of them in order, a few thousand at a time: which of the n they are, and their embeddings.

        Whole chunks come as they are mapped, without a copy, and are no longer in memory once let go.

        Raises:
            UserError: if a checksum fails.
            ValueError: if the rows are not in ascending order.
        """
        n, size = len(self), min(self.entry.rows_per_block, ROWS_PER_CHUNK)
        if self.rows is None:
            bounds = [*range(0, n, size), n]
        else:
            if (np.diff(self.rows) <= 0).any():
                raise ValueError(f"{self.entry.name}: blocks can be read of rows in ascending order only")
            bounds = np.searchsorted(self.rows, np.arange(0, self.entry.n_rows + size, size)).tolist()
        for start, stop in pairwise(bounds):
            if start < stop:
                parts = [self._within(name, start, stop) for name in self.poolings]
                yield slice(start, stop), parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _within(self, pooling: str, start: int, stop: int) -> NDArray[np.float16]:
        """Rows `start` to `stop` of these, which lie in one chunk."""
        rows = np.arange(start, stop) if self.rows is None else self.rows[start:stop]
        block, inside = np.divmod(rows, self.entry.rows_per_block)
        chunk, row = np.divmod(inside, ROWS_PER_CHUNK)
        whole: NDArray[np.float16] = self.store._chunks(self.entry, pooling, int(block[0]))[int(chunk[0])]
        return whole[row[0] : row[-1] + 1] if row[-1] - row[0] + 1 == len(row) else whole[row]


class Writer:
    """An entry being written, block by block. Several processes may share an entry if they write different blocks."""

    def __init__(self, entry: Entry, ids: NDArray[np.str_], *, shared: bool = False) -> None:
        self.entry = entry
        self._ids = ids
        for pooling in entry.poolings:
            _check_array(entry, pooling)
        self._use = Use(
            entry.folder, shared=shared
        )  # many may write blocks, but nobody may sweep or replace the folder meanwhile

    def missing(self) -> list[range]:
        """The rows of every block that is not there now; its number is `rows.start // entry.rows_per_block`."""
        return [self.entry.rows(block) for block in self.entry.missing()]

    def missing_within(self, rows: range) -> list[tuple[int, range]]:
        """Number and rows of every missing block that lies in `rows`, which must hold whole blocks."""
        inside = [block for block in self.missing() if rows.start <= block.start and block.stop <= rows.stop]
        return [(block.start // self.entry.rows_per_block, block) for block in inside]

    def write(self, block: int, embeddings: Mapping[str, NDArray[np.floating[Any]]]) -> None:
        """Write one block, whole; when this returns it is on the disk, and until then it does not count as there.

        Args:
            block: its number.
            embeddings: pooling -> (rows of the block, width) floats; they are stored as float16.

        Raises:
            UserError: if an embedding is not finite, or beyond float16, or the disk cannot be written.
            ValueError: if poolings or shapes are not those of the entry.
        """
        rows = self.entry.rows(block)
        shapes = {name: (len(rows), width) for name, width in self.entry.poolings.items()}
        given = {name: values.shape for name, values in embeddings.items()}
        if given != shapes:
            raise ValueError(f"{self.entry.name}, block {block}: expected {shapes}, got {given}")
        ids = self._ids[rows.start : rows.stop]
        halves = {
            name: to_float16(embeddings[name], f"{self.entry.name}/{name}", ids=ids, first_row=rows.start)
            for name in shapes
        }
        with writing(self.entry.folder):
            # In declared order, each safely on the disk before the next: the last one there means all are.
            try:
                for name, values in halves.items():
                    write_file(self.entry.block_path(name, block), encode_block(values, self.entry.grid(name)))
            except FileNotFoundError:
                if self.entry.missing():
                    raise
                # Somebody else was at the same block, finished the entry, and swept this unfinished file up.

    def sweep(self) -> None:
        """Remove what killed writers have left, once every block is there and nobody has anything to write."""
        if not self.entry.missing():
            sweep_below(self.entry.folder)

    def set_batch_size(self, n: int) -> None:
        """Record the images per forward pass, so that a resumed run uses the same."""
        folder = self.entry.folder
        with writing(folder):
            _write_group(folder, _attributes(folder) | {"batch_size": n})
        self.entry = replace(self.entry, batch_size=n)


def _write_samples(folder: Path, samples: Samples) -> None:
    folder.mkdir()
    _write_group(folder, {})
    for name, metadata in column_metadata(len(samples), samples.votes.shape[1]).items():
        (folder / name).mkdir()
        _write_json(folder / name / "zarr.json", metadata)
        # Even a column of nothing but fill values gets its chunk: an absent one is then always damage.
        with zarr.config.set({"array.write_empty_chunks": True}):
            zarr.open_array(folder / name, mode="r+")[...] = getattr(samples, name)
        for path in (folder / name).iterdir():
            flush(path)
        flush(folder / name)
    flush(folder)


def _read_samples(folder: Path, n_samples: int, n_raters: int) -> Samples:
    _attributes(folder)
    columns: dict[str, Any] = {"votes": np.empty((n_samples, 0), np.int8)}
    for name, metadata in column_metadata(n_samples, n_raters).items():
        _check_metadata(folder / name, metadata, _AGAIN)
        try:
            values = np.asarray(zarr.open_array(folder / name, mode="r")[...])
        except (ValueError, OSError) as error:
            raise _damaged(folder / name, str(error), _AGAIN) from error
        columns[name] = values.astype(object).astype(np.str_) if name in STRING_COLUMNS else values
    return Samples(**columns)


def _create_entry(entry: Entry, *, replaced: bool, swept: bool) -> None:
    """Make an entry's folder with no block in it, all of it at once, in place of one to be `replaced`."""
    for name, width in entry.poolings.items():
        if store_key(name) != name or "+" in name or name == "card" or width < 1:
            raise ValueError(f"{entry.name}: {name!r} of width {width} cannot be a pooling")
    if not set(entry.card_pooling.split("+")) <= set(entry.poolings):
        raise ValueError(f"{entry.name}: card pooling {entry.card_pooling!r} is not made of {list(entry.poolings)}")
    model = entry.folder.parent
    model.mkdir(exist_ok=True)
    if swept:
        sweep(model)
    if not (model / "zarr.json").exists():
        _write_group(model, {"model": entry.model})
        flush(model.parent)
    if replaced and in_use(entry.folder):
        raise _busy(entry.folder)
    new = temporary_name(entry.folder)
    new.mkdir()
    for name in entry.poolings:
        (new / name).mkdir()
        _write_json(new / name / "zarr.json", entry.grid(name).metadata())
    attributes = asdict(entry) | {"poolings": [{"name": n, "width": w} for n, w in entry.poolings.items()]}
    _write_group(new, {name: attributes[name] for name in _STORED})
    if replaced:
        move_folder(new, entry.folder)
    else:
        place_folder(new, entry.folder)


# What is done is seen in the files, and where they lie is not theirs to say.
_STORED = [field.name for field in fields(Entry) if field.name not in ("n_done", "folder")]


def _read_entry(folder: Path) -> Entry:
    _attributes(folder.parent)
    attributes = _attributes(folder)
    try:
        stored = {name: attributes[name] for name in _STORED}
        poolings = {str(pooling["name"]): int(pooling["width"]) for pooling in stored["poolings"]}
        entry = Entry(**(stored | {"poolings": poolings}), n_done=0, folder=folder)
        sound = (
            entry.fingerprint == fingerprint(entry.parts)
            and folder.parts[-3:] == (store_key(entry.dataset), store_key(entry.model), store_key(entry.view))
            and all(store_key(name) == name for name in poolings)  # each names a folder below this one
            and set(entry.card_pooling.split("+")) <= set(poolings)
            and entry.n_rows > 0
            and MIN_ROWS_PER_BLOCK <= entry.rows_per_block <= MAX_ROWS_PER_BLOCK
        )
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise _damaged(folder, f"its attributes do not describe an entry ({error!r})", _OVERWRITE) from error
    if not sound:
        raise _damaged(folder, "its attributes contradict each other", _OVERWRITE)
    return replace(entry, n_done=entry.n_blocks - len(entry.missing()))


def _check_array(entry: Entry, pooling: str) -> None:
    _check_metadata(entry.folder / pooling, entry.grid(pooling).metadata(), _OVERWRITE)


def _check_metadata(folder: Path, expected: dict[str, Any], remedy: str) -> None:
    document = _read_json(folder / "zarr.json", remedy)
    for key, value in expected.items():
        if document.get(key) != value:
            raise _damaged(folder, f"{key} is {json.dumps(document.get(key))}, expected {json.dumps(value)}", remedy)


def _attributes(folder: Path) -> dict[str, Any]:
    """The attributes of a group, checked against their digest where they have one."""
    remedy = "restore it from a copy, or remove this folder and compute it again"
    document = _read_json(folder / "zarr.json", remedy)
    attributes = document.get("attributes", {})
    if document.get("zarr_format") != 3 or document.get("node_type") != "group" or not isinstance(attributes, dict):
        raise _damaged(folder, "this is not a Zarr v3 group", "restore it from a copy, or use another --store")
    written = attributes.pop(_DIGEST, None)  # stores of older versions have none
    if written not in (None, fingerprint(attributes)):
        raise _damaged(folder, "its attributes do not match their digest", remedy)
    return attributes


def _groups(folder: Path) -> list[Path]:
    """The groups right below a group, without those still being made."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and (path / "zarr.json").exists())


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path.parent, f"zarr.json is not JSON ({error})", remedy) from error
    except OSError as error:
        raise _damaged(path.parent, f"zarr.json cannot be read ({error.strerror})", remedy) from error
    if not isinstance(document, dict):
        raise _damaged(path.parent, "zarr.json is not a JSON object", remedy)
    return document


# Messages.


def _damaged(folder: Path, what: str, remedy: str) -> UserError:
    return UserError(f"{folder} is damaged: {what}. To mend it, {remedy}.")


def _bad_block(entry: Entry, pooling: str, block: int, what: str) -> UserError:
    rows = entry.rows(block)
    # Without its last pooling the block counts as missing, and only it is computed again.
    last = entry.block_path(list(entry.poolings)[-1], block)
    mend = "import it again with --overwrite" if entry.imported else f"delete {last} and run the same fm-extract again"
    return UserError(
        f"{entry.name}/{pooling}: block {block} (rows {rows.start}–{rows.stop - 1}) {what}: "
        f"{entry.block_path(pooling, block)}. To mend it, {mend}."
    )


def _incomplete(entry: Entry) -> str:
    command = "fm-store import" if entry.imported else "fm-extract"
    return (
        f"{entry.name} is not complete: {entry.n_blocks - entry.n_done} of {entry.n_blocks} blocks are missing. "
        f"Run the same {command} again to finish it."
    )


def _busy(folder: Path) -> UserError:
    return UserError(f"{folder} is being written: wait until its writer has finished, or stop it.")


def _refuse_other(stored: Entry, asked: Entry) -> None:
    """Embeddings that were computed in another way are never mixed."""
    names = ("dataset", "model", "view", "poolings", "card_pooling", "n_rows", "parts")
    old, new = ({name: getattr(entry, name) for name in names} for entry in (stored, asked))
    differing = {name: values for name, *values in differences(old, new)}
    if differing:
        raise UserError(
            f"the store already has {stored.name}, computed differently (fingerprint {stored.fingerprint[:12]}, now "
            f"{asked.fingerprint[:12]}):\n"
            + "\n".join(f"  {name}: stored {was}, now {now}" for name, (was, now) in differing.items())
            + "\nUse another --store to keep both, or --overwrite to discard the stored one."
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, old, new) of every value in which two records differ, nested names joined by dots, values as JSON."""
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key, "(none)"), new.get(key, "(none)")
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from differences(was, now, f"{prefix}{key}.")
        elif json.dumps(was) != json.dumps(now):
            yield prefix.removeprefix("parts.") + key, json.dumps(was), json.dumps(now)


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    # Of labels' names, the source or the batch size nothing else would tell that a bit has flipped.
    _write_json(folder / "zarr.json", group_metadata(attributes | {_DIGEST: fingerprint(attributes)}))


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_file(path, [json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode()])
