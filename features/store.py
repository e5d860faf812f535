"""Where do embeddings live, and when is one of them there, whole and right?

A Zarr v3 store (docs/store-format.md is its specification). Every array has its final shape from the start and is
written in blocks of whole rows, each once. zarr itself encodes and decodes the patch table; the blocks of embeddings
are plain files (raw float16 and a checksum), made and read here directly: the writer can then put them in their place
in a safe order, and the reader maps them into memory. Any Zarr reader opens them. Whether files lie in a folder or in
a bucket is for `features.storage` to know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.storage import MemoryStore

from features.console import ProgressCallback, UserError, nearest, progress
from features.fingerprint import differences, fingerprint
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
from features.storage import METADATA, Fetched, Storage, StorageError, find_storage

FORMAT = "mitofm-features"
FORMAT_VERSION = 1
_DIGEST = "attributes_digest"
_MOST_KEPT = 256  # blocks; a process may usually have 1,024 files open
# Of blocks that are held in memory; and of an array whose blocks stay mapped: pages of a mapped file count as memory.
_MOST_BYTES = 2**30
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
        place, key: where it lies.
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
    place: Storage
    key: str

    @property
    def n_blocks(self) -> int:
        return -(-self.n_rows // self.rows_per_block)

    @property
    def complete(self) -> bool:
        return self.n_done == self.n_blocks

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.model}/{self.view}"

    @property
    def folder(self) -> Path | str:
        """Where it lies, as messages say it."""
        return self.place.path(self.key)

    def rows(self, block: int) -> range:
        """The rows of a block."""
        start = block * self.rows_per_block
        return range(start, min(start + self.rows_per_block, self.n_rows))

    def grid(self, pooling: str) -> Grid:
        """How the array of a pooling is cut up."""
        return Grid(self.n_rows, self.poolings[pooling], self.rows_per_block)

    def block_key(self, pooling: str, block: int) -> str:
        """The key of a block's file."""
        return f"{self.key}/{pooling}/{_block_name(block)}"

    def block_path(self, pooling: str, block: int) -> Path | str:
        """The file of a block."""
        return self.place.path(self.block_key(pooling, block))

    def missing(self) -> list[int]:
        """The blocks that are not there now: those without a file of the last pooling."""
        there = set(self.place.names(f"{self.key}/{list(self.poolings)[-1]}"))
        return [block for block in range(self.n_blocks) if _block_name(block) not in there]

    def size(self) -> int:
        """Bytes where it lies."""
        return self.place.size(self.key)


def _block_name(block: int) -> str:
    return f"c.{block}.0"


@dataclass(frozen=True)
class Problem:
    """One thing that `FeatureStore.verify` found wrong."""

    where: str  # dataset[/model/view[/pooling]]
    block: int | None
    rows: tuple[int, int] | None  # first and last
    what: str  # the whole sentence, with the remedy


class FeatureStore:
    """An open feature store. Build one with `FeatureStore.open` or `FeatureStore.open_or_create`."""

    def __init__(self, place: Storage) -> None:
        self.place = place
        self._verified: set[Hashable] = set()  # versions of blocks whose checksums have held
        self._kept: dict[Hashable, NDArray[np.float16]] = {}  # each holds a file descriptor, or memory:
        self._bytes = 0

    @property
    def path(self) -> Path | str:
        """A folder's path, or a bucket's address."""
        return self.place.root

    @classmethod
    def open(cls, where: Path | str) -> FeatureStore:
        """Open a store that exists: a folder, or `s3://bucket/prefix`.

        Raises:
            UserError: if there is none, it is something else, a newer version wrote it, or it cannot be reached.
        """
        return cls._open(find_storage(where))

    @classmethod
    def _open(cls, place: Storage) -> FeatureStore:
        if not place.exists(METADATA):
            what = "is not a feature store (it has no zarr.json)" if place.exists("") else "does not exist"
            raise UserError(f"{place.root} {what}. Run fm-extract first, or name the store with --store.")
        attributes = _attributes(place, "")
        if attributes.get("format") != FORMAT:
            raise UserError(f"{place.root} is a Zarr group, but not a mitofm feature store. Name another --store.")
        version = attributes.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise UserError(
                f"{place.root} was written in store format {version}; this mitofm reads formats up to "
                f"{FORMAT_VERSION}. Upgrade mitofm (pip install --upgrade mitofm), or use another --store."
            )
        return cls(place)

    @classmethod
    def open_or_create(cls, where: Path | str) -> FeatureStore:
        """Open a store, or make an empty one where nothing is.

        Raises:
            UserError: as `open`; if something else lies there; or if the place cannot be written.
        """
        place = find_storage(where)
        if not place.exists(METADATA):
            if not place.vacant() and not place.exists(METADATA):  # another process may just have made the store
                raise UserError(
                    f"{place.root} exists but is not a feature store. Name another --store; nothing was changed."
                )
            with place.writing(""):
                place.make()
                _write_group(place, "", {"format": FORMAT, "format_version": FORMAT_VERSION})
        return cls._open(place)

    def datasets(self) -> list[str]:
        """The true names of all datasets."""
        return self.place.each(lambda key: str(_attributes(self.place, key).get("name")), self.place.groups(""))

    def dataset_attrs(self, dataset: str) -> dict[str, Any]:
        """A dataset's attributes: its name, digests, counts, and what its maker recorded about it.

        Raises:
            UserError: if the store has no such dataset, or its metadata are damaged.
        """
        key = store_key(dataset)
        if not self.place.exists(f"{key}/{METADATA}"):
            known = self.datasets()
            raise UserError(
                f"{self.path} has no dataset {dataset!r}; it has: {', '.join(known) or 'none'}."
                f"{nearest(dataset, known)} Run fm-extract --dataset {dataset} first."
            )
        attributes = _attributes(self.place, key)
        if attributes.get("name") != dataset:
            raise UserError(
                f"{self.place.path(key)} holds the dataset {attributes.get('name')!r}, not {dataset!r}: names that "
                "differ only in special characters cannot share a store. Rename one, or use another --store."
            )
        return attributes

    def samples(self, dataset: str) -> Samples:
        """A dataset's patch table, checked against its recorded digest.

        Raises:
            UserError: if the store has no such dataset, or the table is damaged.
        """
        attributes = self.dataset_attrs(dataset)
        key = f"{store_key(dataset)}/samples"
        n_samples, n_raters = (int(attributes.get(name, 0)) for name in ("n_samples", "n_raters"))
        samples = _read_samples(self.place, key, n_samples, n_raters)
        if samples.table_digest != attributes.get("table_digest"):
            raise _damaged(self.place.path(key), "the patch table does not match its digest", _AGAIN)
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
        key = store_key(dataset)
        attributes = dict(attrs) | {
            "name": dataset,
            "n_samples": len(samples),
            "n_raters": samples.votes.shape[1],
            "images_digest": samples.images_digest,
            "table_digest": samples.table_digest,
        }
        table = {f"samples/{name}": data for name, data in _encode_samples(samples).items()}
        files = table | {METADATA: [_group(attributes)]}
        with self.place.alone() as locked:
            if locked and not shared:
                self.place.sweep("")
            if not self.place.has_folder(key):
                self.place.add_folder(key, files)
            if self.place.exists(f"{key}/{METADATA}"):
                stored = self.dataset_attrs(dataset)
                if stored.get("images_digest") == attributes["images_digest"]:
                    if locked and not shared:
                        self.place.sweep(key)
                    return self._update_table(key, samples, stored, attributes)
                if not overwrite:
                    raise UserError(
                        f"{self.path} already has a dataset {dataset!r} of other images: {stored.get('n_samples')} "
                        f"with digest {stored.get('images_digest')}, now {len(samples)} with digest "
                        f"{attributes['images_digest']}. Use another --store, or --overwrite to discard the stored "
                        "dataset and all its embeddings."
                    )
                self._discard(key)
            self.place.replace_folder(key, files)
        return False

    def _update_table(self, key: str, samples: Samples, stored: dict[str, Any], attributes: dict[str, Any]) -> bool:
        if stored.get("table_digest") == attributes["table_digest"]:
            try:
                self.samples(attributes["name"])
            except StorageError:
                raise
            except UserError:
                pass  # a damaged table, or one whose replacement was cut short, is written anew
            else:
                return False
        # Attributes first: whoever reads in between finds a table that does not match its digest, never a wrong one.
        _write_group(self.place, key, attributes)
        self.place.replace_folder(f"{key}/samples", _encode_samples(samples))
        return True

    def entries(self, dataset: str | None = None, model: str | None = None) -> list[Entry]:
        """Everything embedded so far, complete or not, in the order of the names.

        Raises:
            UserError: if an entry's metadata are damaged.
        """
        found = self.place.each(lambda key: _read_entry(self.place, key), self._entry_keys(dataset, model))
        return [entry for entry in found if model in (None, entry.model)]

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
            place=self.place,
            key=_entry_key(dataset, model, view),
        )
        with self.place.alone() as locked:
            replaced = self.place.has_folder(entry.key)  # asked first: one that appears from now on is whole, and stays
            if overwrite or not self.place.exists(f"{entry.key}/{METADATA}"):
                _create_entry(entry, replaced=replaced, swept=locked and not shared)
            stored = _read_entry(self.place, entry.key)
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
        for block, chunks in self._blocks(entry, pooling, range(entry.n_blocks)):
            for k, chunk in enumerate(chunks):
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
        touched = [block for block, (start, stop) in enumerate(pairwise(bounds)) if start < stop]
        for block, chunks in self._blocks(entry, pooling, touched):
            start, stop = bounds[block], bounds[block + 1]
            rows_of_bytes = chunks.view(row_type)[..., 0]
            targets[order[start:stop]] = rows_of_bytes[chunk[start:stop], row[start:stop]]
        return embeddings

    def _blocks(self, entry: Entry, pooling: str, blocks: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float16]]]:
        """Number and chunks of some blocks, mapped into memory or fetched, once their checksums have held."""
        for block, fetched in self._fetch(entry, pooling, blocks):
            yield block, self._chunks(entry, pooling, block, fetched)

    def _fetch(self, entry: Entry, pooling: str, blocks: Sequence[int]) -> Iterator[tuple[int, Callable[[], Fetched]]]:
        if self._is_full():
            self._forget()  # now, not in between: what was kept when fetching began must still be there later
        names = [_block_name(block) for block in blocks]
        return zip(blocks, self.place.fetch(f"{entry.key}/{pooling}", names, self._kept.__contains__), strict=True)

    def _chunks(self, entry: Entry, pooling: str, block: int, fetched: Callable[[], Fetched]) -> NDArray[np.float16]:
        """A block's chunks once their checksums have held: (chunks, rows per chunk, width)."""
        try:
            version, data = fetched()
        except OSError as error:
            raise _bad_block(entry, pooling, block, f"cannot be read ({error.strerror})") from error
        if data is None:
            return self._kept[version]
        try:
            check = version not in self._verified
            chunks = decode_block(data, len(entry.rows(block)), entry.grid(pooling), check=check)
        except ValueError as error:
            raise _bad_block(entry, pooling, block, str(error)) from error
        self._verified.add(version)
        if not self._is_full() and entry.n_rows * entry.poolings[pooling] * 2 <= _MOST_BYTES:
            self._kept[version] = chunks
            self._bytes += len(data) if isinstance(data, bytes) else 0
        return chunks

    def _is_full(self) -> bool:
        return len(self._kept) >= _MOST_KEPT or self._bytes >= _MOST_BYTES

    def _forget(self) -> None:
        self._kept.clear()
        self._bytes = 0

    def verify(self, dataset: str | None = None, model: str | None = None) -> list[Problem]:
        """Look at every byte: tables against their digests, blocks against their checksums, numbers for NaN.

        Args:
            dataset, model: only these.
        """
        problems: list[Problem] = []
        for key in self._dataset_keys(dataset):
            try:
                self.samples(dataset or str(_attributes(self.place, key).get("name")))
            except StorageError:
                raise
            except UserError as error:
                problems.append(Problem(key, None, None, str(error)))
        entries = []
        for key in self._entry_keys(dataset, model):
            try:
                entry = _read_entry(self.place, key)
            except StorageError:
                raise
            except UserError as error:
                problems.append(Problem(key, None, None, str(error)))
                continue
            if model in (None, entry.model):
                entries.append(entry)
        self._verified.clear()
        self._forget()
        total = sum(entry.n_done * len(entry.poolings) for entry in entries)
        with progress("verify", total, unit="blocks") as advance:
            for entry in entries:
                if not entry.complete:
                    problems.append(Problem(entry.name, None, None, _incomplete(entry)))
                for pooling in entry.poolings:
                    problems += self._verify_array(entry, pooling, advance)
        return problems

    def _verify_array(self, entry: Entry, pooling: str, advance: ProgressCallback) -> Iterator[Problem]:
        where = f"{entry.name}/{pooling}"
        try:
            _check_array(entry, pooling)
        except StorageError:
            raise
        except UserError as error:
            yield Problem(where, None, None, str(error))
            return
        there = sorted(set(range(entry.n_blocks)).difference(entry.missing()))
        for block, fetched in self._fetch(entry, pooling, there):
            rows = entry.rows(block)
            try:
                chunks = self._chunks(entry, pooling, block, fetched)
                embeddings = chunks.reshape(-1, entry.poolings[pooling])[: len(rows)]
                if not_finite(embeddings).any():
                    raise _bad_block(entry, pooling, block, "holds NaN or infinity")
            except StorageError:
                raise
            except UserError as error:
                yield Problem(where, block, (rows.start, rows.stop - 1), str(error))
            advance(1)

    def remove(self, dataset: str, model: str | None = None, view: str | None = None) -> None:
        """Remove an entry, all entries of a model, or a whole dataset.

        Raises:
            UserError: if there is no such thing, or another process is writing to it.
        """
        self.dataset_attrs(dataset)
        key = "/".join(store_key(name) for name in (dataset, model, view) if name is not None)
        with self.place.alone():
            if not self.place.exists(f"{key}/{METADATA}"):
                raise UserError(f"{self.path} has no {'/'.join(filter(None, (dataset, model, view)))}.")
            self._discard(key)

    def _discard(self, key: str) -> None:
        _refuse_in_use(self.place, key)
        self.place.remove_folder(key)

    def _entry(self, dataset: str, model: str, view: str) -> Entry:
        key = _entry_key(dataset, model, view)
        if not self.place.exists(f"{key}/{METADATA}"):
            self.dataset_attrs(dataset)
            there = [f"{entry.model}/{entry.view}" for entry in self.entries(dataset)]
            raise UserError(
                f"{self.path} has no embeddings of {dataset!r} by {model!r} with view {view!r}; it has: "
                f"{', '.join(there) or 'none'}.{nearest(f'{model}/{view}', there)} "
                f"Run fm-extract --dataset {dataset} --model {model} --view {view} first."
            )
        entry = _read_entry(self.place, key)
        if (entry.dataset, entry.model, entry.view) != (dataset, model, view):
            raise UserError(
                f"{entry.folder} holds {entry.name}, not {dataset}/{model}/{view}: names that differ only in special "
                "characters cannot share a store. Use another --store."
            )
        return entry

    def _dataset_keys(self, dataset: str | None) -> list[str]:
        return self.place.groups("") if dataset is None else [store_key(dataset)]

    def _entry_keys(self, dataset: str | None, model: str | None) -> list[str]:
        models = [
            key
            for found in self.place.each(self.place.groups, self._dataset_keys(dataset))
            for key in found
            if (name := key.rpartition("/")[2]) != "samples" and (model is None or name == store_key(model))
        ]
        return [key for found in self.place.each(self.place.groups, models) for key in found]


def _entry_key(dataset: str, model: str, view: str) -> str:
    if store_key(model) == "samples":
        raise UserError("a model cannot be called 'samples': that is the name of the patch table.")
    return "/".join(map(store_key, (dataset, model, view)))


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
        held: dict[str, tuple[int, NDArray[np.float16]]] = {}  # the block that the last chunk was of
        for start, stop in pairwise(bounds):
            if start < stop:
                parts = [self._within(name, start, stop, held) for name in self.poolings]
                yield slice(start, stop), parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _within(
        self, pooling: str, start: int, stop: int, held: dict[str, tuple[int, NDArray[np.float16]]]
    ) -> NDArray[np.float16]:
        """Rows `start` to `stop` of these, which lie in one chunk."""
        rows = np.arange(start, stop) if self.rows is None else self.rows[start:stop]
        block, inside = np.divmod(rows, self.entry.rows_per_block)
        chunk, row = np.divmod(inside, ROWS_PER_CHUNK)
        if pooling not in held or held[pooling][0] != block[0]:
            (held[pooling],) = self.store._blocks(self.entry, pooling, [int(block[0])])
        whole: NDArray[np.float16] = held[pooling][1][int(chunk[0])]
        return whole[row[0] : row[-1] + 1] if row[-1] - row[0] + 1 == len(row) else whole[row]


class Writer:
    """An entry being written, block by block. Several processes may share an entry if they write different blocks."""

    def __init__(self, entry: Entry, ids: NDArray[np.str_], *, shared: bool = False) -> None:
        self.entry = entry
        self._ids = ids
        for pooling in entry.poolings:
            _check_array(entry, pooling)
        # Many may write blocks, but nobody may sweep or replace the folder meanwhile.
        self._use = entry.place.use(entry.key, shared=shared)

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
        entry = self.entry
        self._require_own()
        with entry.place.writing(entry.key):
            # In declared order, each safely in its place before the next: the last one there means all are.
            try:
                for name, values in halves.items():
                    entry.place.write(entry.block_key(name, block), encode_block(values, entry.grid(name)))
            except FileNotFoundError:
                if entry.missing():
                    raise
                # Somebody else was at the same block, finished the entry, and swept this unfinished file up.
        try:
            self._require_own()
        except UserError:
            entry.place.delete(entry.block_key(list(entry.poolings)[-1], block))
            raise

    def _require_own(self) -> None:
        """Where nothing keeps others from replacing the entry, see whether one has."""
        if self.entry.place.guarded:
            return
        try:
            stored = _attributes(self.entry.place, self.entry.key).get("fingerprint")
        except StorageError:
            raise
        except UserError:
            stored = None
        if stored != self.entry.fingerprint:
            raise UserError(
                f"{self.entry.folder} was removed or replaced by another process while this one was writing to it: "
                "this one stops. Let one of them finish, or use another --store."
            )

    def sweep(self) -> None:
        """Remove what killed writers have left, once every block is there and nobody has anything to write."""
        if not self.entry.missing():
            self.entry.place.sweep_below(self.entry.key)

    def set_batch_size(self, n: int) -> None:
        """Record the images per forward pass, so that a resumed run uses the same."""
        self._require_own()
        place, key = self.entry.place, self.entry.key
        with place.writing(key):
            _write_group(place, key, _attributes(place, key) | {"batch_size": n})
        self.entry = replace(self.entry, batch_size=n)


def _encode_samples(samples: Samples) -> dict[str, list[bytes]]:
    """The files of a patch table."""
    files = {METADATA: [_group({})]}
    for name, metadata in column_metadata(len(samples), samples.votes.shape[1]).items():
        column: dict[str, Buffer] = {METADATA: cpu.Buffer.from_bytes(_as_json(metadata))}
        # Even a column of nothing but fill values gets its chunk: an absent one is then always damage.
        with zarr.config.set({"array.write_empty_chunks": True}):
            zarr.open_array(MemoryStore(column), mode="r+")[...] = getattr(samples, name)
        files |= {f"{name}/{file}": [content.to_bytes()] for file, content in column.items()}
    return files


def _read_samples(place: Storage, key: str, n_samples: int, n_raters: int) -> Samples:
    _attributes(place, key)
    metadata = column_metadata(n_samples, n_raters)

    def read(name: str) -> NDArray[Any]:
        column = f"{key}/{name}"
        stored: dict[str, Buffer] = {
            METADATA: cpu.Buffer.from_bytes(_as_json(_check_metadata(place, column, metadata[name], _AGAIN)))
        }
        chunk = "c" + ".0" * len(metadata[name]["shape"])
        try:
            stored[chunk] = cpu.Buffer.from_bytes(place.read(f"{column}/{chunk}"))
            values = np.asarray(zarr.open_array(MemoryStore(stored), mode="r")[...])
        except (ValueError, OSError) as error:
            raise _damaged(place.path(column), str(error), _AGAIN) from error
        return values.astype(object).astype(np.str_) if name in STRING_COLUMNS else values

    columns: dict[str, Any] = {"votes": np.empty((n_samples, 0), np.int8)}
    return Samples(**columns | dict(zip(metadata, place.each(read, metadata), strict=True)))


def _create_entry(entry: Entry, *, replaced: bool, swept: bool) -> None:
    """Make an entry's folder with no block in it, all of it at once, in place of one to be `replaced`."""
    for name, width in entry.poolings.items():
        if store_key(name) != name or "+" in name or name == "card" or width < 1:
            raise ValueError(f"{entry.name}: {name!r} of width {width} cannot be a pooling")
    if not set(entry.card_pooling.split("+")) <= set(entry.poolings):
        raise ValueError(f"{entry.name}: card pooling {entry.card_pooling!r} is not made of {list(entry.poolings)}")
    place = entry.place
    model = entry.key.rpartition("/")[0]
    place.make_folder(model)
    if swept:
        place.sweep(model)
    if not place.exists(f"{model}/{METADATA}"):
        _write_group(place, model, {"model": entry.model})
    if replaced:
        _refuse_in_use(place, entry.key)
    attributes = {name: getattr(entry, name) for name in _STORED}
    attributes["poolings"] = [{"name": name, "width": width} for name, width in entry.poolings.items()]
    files = {f"{name}/{METADATA}": [_as_json(entry.grid(name).metadata())] for name in entry.poolings}
    make = place.replace_folder if replaced else place.add_folder
    make(entry.key, files | {METADATA: [_group(attributes)]})


# What is done is seen in the files, and where they lie is not theirs to say.
_STORED = [field.name for field in fields(Entry) if field.name not in ("n_done", "place", "key")]


def _read_entry(place: Storage, key: str) -> Entry:
    _attributes(place, key.rpartition("/")[0])
    attributes = _attributes(place, key)
    try:
        stored = {name: attributes[name] for name in _STORED}
        poolings = {str(pooling["name"]): int(pooling["width"]) for pooling in stored["poolings"]}
        entry = Entry(**(stored | {"poolings": poolings}), n_done=0, place=place, key=key)
        sound = (
            entry.fingerprint == fingerprint(entry.parts)
            and key == _entry_key(entry.dataset, entry.model, entry.view)
            and all(store_key(name) == name for name in poolings)  # each names a folder below this one
            and set(entry.card_pooling.split("+")) <= set(poolings)
            and entry.n_rows > 0
            and MIN_ROWS_PER_BLOCK <= entry.rows_per_block <= MAX_ROWS_PER_BLOCK
        )
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise _damaged(place.path(key), f"its attributes do not describe an entry ({error!r})", _OVERWRITE) from error
    if not sound:
        raise _damaged(place.path(key), "its attributes contradict each other", _OVERWRITE)
    return replace(entry, n_done=entry.n_blocks - len(entry.missing()))


def _check_array(entry: Entry, pooling: str) -> None:
    _check_metadata(entry.place, f"{entry.key}/{pooling}", entry.grid(pooling).metadata(), _OVERWRITE)


def _check_metadata(place: Storage, key: str, expected: dict[str, Any], remedy: str) -> dict[str, Any]:
    document = _read_json(place, key, remedy)
    for name, value in expected.items():
        if document.get(name) != value:
            found = f"{name} is {json.dumps(document.get(name))}, expected {json.dumps(value)}"
            raise _damaged(place.path(key), found, remedy)
    return document


def _attributes(place: Storage, key: str) -> dict[str, Any]:
    """The attributes of a group, checked against their digest where they have one."""
    remedy = "restore it from a copy, or remove this folder and compute it again"
    document = _read_json(place, key, remedy)
    attributes = document.get("attributes", {})
    if document.get("zarr_format") != 3 or document.get("node_type") != "group" or not isinstance(attributes, dict):
        raise _damaged(place.path(key), "this is not a Zarr v3 group", "restore it from a copy, or use another --store")
    written = attributes.pop(_DIGEST, None)  # stores of older versions have none
    if written not in (None, fingerprint(attributes)):
        raise _damaged(place.path(key), "its attributes do not match their digest", remedy)
    return attributes


def _read_json(place: Storage, key: str, remedy: str) -> dict[str, Any]:
    try:
        document = json.loads(place.read(f"{key}/{METADATA}" if key else METADATA))
    except (ValueError, RecursionError) as error:
        raise _damaged(place.path(key), f"zarr.json is not JSON ({error})", remedy) from error
    except OSError as error:
        raise _damaged(place.path(key), f"zarr.json cannot be read ({error.strerror})", remedy) from error
    if not isinstance(document, dict):
        raise _damaged(place.path(key), "zarr.json is not a JSON object", remedy)
    return document


# Messages.


def _damaged(folder: Path | str, what: str, remedy: str) -> UserError:
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


def _refuse_in_use(place: Storage, key: str) -> None:
    folder = place.in_use(key)
    if folder is not None:
        raise UserError(f"{folder} is being written: wait until its writer has finished, or stop it.")


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


def _write_group(place: Storage, key: str, attributes: dict[str, Any]) -> None:
    place.write(f"{key}/{METADATA}" if key else METADATA, [_group(attributes)])


def _group(attributes: dict[str, Any]) -> bytes:
    # Of labels' names, the source or the batch size nothing else would tell that a bit has flipped.
    return _as_json(group_metadata(attributes | {_DIGEST: fingerprint(attributes)}))


def _as_json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode()
