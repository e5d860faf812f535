"""Where do embeddings live, and when is one of them there, whole and right?

A Zarr v3 store (docs/store-format.md is its specification). Every array has its final shape from the start and is
written in blocks of whole rows, each once. zarr itself writes and reads the patch table; the blocks of embeddings are
plain files (raw float16 and a checksum), written and read here directly: the writer can then flush them to the disk in
a safe order, and the reader maps them into memory. Any Zarr reader opens them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray

from features.console import Advance, UserError, nearest
from features.samples import Samples

FORMAT = "mitofm-features"
FORMAT_VERSION = 1
MIN_ROWS_PER_BLOCK, MAX_ROWS_PER_BLOCK = 64, 65536
ROWS_PER_CHUNK = 8192  # a larger block is a shard of chunks of this many rows

_PARTIAL = ".partial"  # the end of every temporary name; such names begin with a dot
_CRC_BYTES = 4
_NO_CHUNK = 2**64 - 1  # offset and size of a chunk that a shard does not hold
_FLOAT16_MAX = 65504
_CANNOT_WRITE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "choose a writable place with --store",
    errno.EACCES: "choose a writable place with --store",
    errno.EPERM: "choose a writable place with --store",
}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C = {"name": "crc32c"}
_STRING_COLUMNS = ("id", "group", "split", "domain", "sha256")


def store_key(name: str) -> str:
    """The one Zarr node name of a model, dataset, view or pooling: `timm/x` -> `timm--x`, `hf-hub:a/b@r` -> `hf-hub--a--b@r`.

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


def rows_per_block(n: int) -> int:
    """How many rows of `n` are written at once: a power of two that makes at most 128 blocks, but 64 to 65,536 rows.

    The lower bound keeps files from being tiny, the upper one what a writer must hold in memory.
    """
    return min(max(1 << (-(-n // 128) - 1).bit_length(), MIN_ROWS_PER_BLOCK), MAX_ROWS_PER_BLOCK)


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
        n_done: blocks that are there.
        batch_size: images per forward pass, where recorded; no part of the fingerprint.
        imported: whether the embeddings were computed elsewhere.
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
    n_done: int
    batch_size: int | None
    imported: bool

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


@dataclass(frozen=True)
class Problem:
    """One thing `FeatureStore.verify` found wrong; `str()` is the sentence for people."""

    where: str  # dataset[/model/view[/pooling]]
    block: int | None
    rows: tuple[int, int] | None  # first and last
    what: str

    def __str__(self) -> str:
        return self.what


class FeatureStore:
    """An open feature store. Build one with `FeatureStore.open` or `FeatureStore.open_or_create`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._verified: set[tuple[Path, int, int]] = set()  # block files whose checksum held, as (path, inode, mtime)

    @classmethod
    def open(cls, path: Path) -> FeatureStore:
        """Open a store that exists.

        Raises:
            UserError: if there is none, it is something else, or a newer version wrote it.
        """
        if not (path / "zarr.json").exists():
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
            if path.exists() and (not path.is_dir() or any(not p.name.endswith(_PARTIAL) for p in path.iterdir())):
                raise UserError(f"{path} exists but is not a feature store. Name another --store; nothing was changed.")
            with _writing(path):
                path.mkdir(parents=True, exist_ok=True)
                _write_group(path, {"format": FORMAT, "format_version": FORMAT_VERSION})
                _flush(path.parent)
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
                f"{self.path} has no dataset {dataset!r}; it has: {', '.join(known) or 'none'}.{nearest(dataset, known)} "
                f"Run fm-extract --dataset {dataset} first."
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
            raise _damaged(folder, "the patch table does not match its digest", "run fm-extract for this dataset again")
        return samples

    def put_samples(self, dataset: str, samples: Samples, *, attrs: Mapping[str, Any], overwrite: bool = False) -> bool:
        """Record a dataset's patch table. The same table twice is no work.

        Args:
            dataset: true name.
            samples: the table; its row order is that of every embedding of this dataset.
            attrs: what else to record about the dataset, as JSON values.
            overwrite: whether to discard this dataset, with all its embeddings, if its images have changed.

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
        with _writing(self.path), _only_writer(self.path):
            _sweep(self.path)
            if (folder / "zarr.json").exists():
                stored = self.dataset_attrs(dataset)
                if stored.get("images_digest") == attributes["images_digest"]:
                    return self._update_table(folder, samples, stored, attributes)
                if not overwrite:
                    raise UserError(
                        f"{self.path} already has a dataset {dataset!r} of other images: {stored.get('n_samples')} with "
                        f"digest {stored.get('images_digest')}, now {len(samples)} with digest "
                        f"{attributes['images_digest']}. Use another --store, or --overwrite to discard the stored "
                        "dataset and all its embeddings."
                    )
            new = _temporary(folder)
            new.mkdir()
            _write_samples(new / "samples", samples)
            _write_group(new, attributes)
            _move_folder(new, folder)
        return False

    def _update_table(self, folder: Path, samples: Samples, stored: dict[str, Any], attributes: dict[str, Any]) -> bool:
        _sweep(folder)
        with suppress(UserError):  # a damaged table, or one whose replacement was cut short, is written anew
            if stored.get("table_digest") == attributes["table_digest"] and self.samples(attributes["name"]):
                return False
        # Attributes first: whoever reads in between finds a table that does not match its digest, never a wrong one.
        _write_group(folder, attributes)
        new = _temporary(folder / "samples")
        _write_samples(new, samples)
        _move_folder(new, folder / "samples")
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

    def size(self, entry: Entry) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self._folder(entry.dataset, entry.model, entry.view).rglob("*"))

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
            n_done=0,
            batch_size=None,
            imported=imported,
        )
        folder = self._folder(dataset, model, view)
        with _writing(self.path), _only_writer(self.path):
            if overwrite or not (folder / "zarr.json").exists():
                _create_entry(folder, entry)
            stored = _read_entry(folder)
            _refuse_other(stored, entry)
            return Writer(folder, stored, self.samples(dataset).id)

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
        entry = self._entry(dataset, model, view)
        folder = self._folder(dataset, model, view)
        missing = [entry.rows(block) for block in _missing(folder, entry)]
        if missing:
            shown = ", ".join(f"{rows.start}–{rows.stop - 1}" for rows in missing[:4]) + ", …" * (len(missing) > 4)
            raise UserError(
                f"{entry.name} is not complete: {len(missing)} of {entry.n_blocks} blocks are missing (rows {shown}). "
                f"{_remedy(entry)} to finish it."
            )
        names = (entry.card_pooling if pooling == "card" else pooling).split("+")
        for name in names:
            if name not in entry.poolings:
                raise UserError(
                    f"{entry.name} has no pooling {name!r}; it has {', '.join(entry.poolings)} (and card = "
                    f"{entry.card_pooling}).{nearest(name, entry.poolings)}"
                )
        indices = None if rows is None else np.flatnonzero(rows) if rows.dtype == bool else np.asarray(rows, np.intp)
        parts = [self._read_array(folder, entry, name, indices) for name in names]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _read_array(
        self, folder: Path, entry: Entry, pooling: str, indices: NDArray[np.intp] | None
    ) -> NDArray[np.float16]:
        _check_array(folder, entry, pooling)
        width, rows_per_chunk = entry.poolings[pooling], min(entry.rows_per_block, ROWS_PER_CHUNK)
        if indices is None:
            whole = np.empty((entry.n_rows, width), np.float16)
            for block in range(entry.n_blocks):
                target = whole[entry.rows(block).start : entry.rows(block).stop]
                for k, chunk in enumerate(self._chunks(folder, entry, pooling, block)):
                    part = target[k * rows_per_chunk : (k + 1) * rows_per_chunk]
                    part[:] = chunk[: len(part)]
            return whole
        if len(indices) and not (0 <= indices.min() and indices.max() < entry.n_rows):
            raise IndexError(f"rows must lie in 0 … {entry.n_rows - 1}, got {indices.min()} … {indices.max()}")
        some = np.empty((len(indices), width), np.float16)
        blocks = indices // entry.rows_per_block
        order = np.argsort(blocks, kind="stable")
        touched, starts = np.unique(blocks[order], return_index=True)
        for block, where in zip(touched.tolist(), np.split(order, starts[1:]), strict=False):
            chunk, row = np.divmod(indices[where] - block * entry.rows_per_block, rows_per_chunk)
            some[where] = self._chunks(folder, entry, pooling, block)[chunk, row]
        return some

    def _chunks(self, folder: Path, entry: Entry, pooling: str, block: int) -> NDArray[np.float16]:
        """A block's chunks, mapped into memory: (chunks, rows per chunk, width); the checksum has been seen to hold."""
        path = _block_path(folder, pooling, block)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                seen = (path, status.st_ino, status.st_mtime_ns)
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""
        except OSError as error:
            raise _bad_block(folder, entry, pooling, block, f"cannot be read ({error.strerror})") from error
        try:
            return _decode_block(data, entry, entry.poolings[pooling], block, check=seen not in self._verified)
        except ValueError as error:
            raise _bad_block(folder, entry, pooling, block, str(error)) from error
        finally:
            self._verified.add(seen)

    def verify(
        self, dataset: str | None = None, model: str | None = None, *, advance: Advance = lambda n: None
    ) -> list[Problem]:
        """Look at every byte: tables against their digests, blocks against their checksums, numbers for NaN.

        Args:
            dataset, model: only these.
            advance: called with 1 after every block.
        """
        problems = []

        def note(where: str, error: UserError, block: int | None = None, rows: range | None = None) -> None:
            problems.append(Problem(where, block, (rows.start, rows.stop - 1) if rows else None, str(error)))

        self._verified.clear()
        for table in _groups(self.path) if dataset is None else [self.path / store_key(dataset)]:
            try:
                self.samples(dataset or str(_attributes(table).get("name")))
            except UserError as error:
                note(table.name, error)
        for folder in self._entry_folders(dataset):
            try:
                entry = _read_entry(folder)
            except UserError as error:
                note(folder.relative_to(self.path).as_posix(), error)
                continue
            if model not in (None, entry.model):
                continue
            missing = _missing(folder, entry)
            if missing:
                what = f"{entry.name} is not complete: {len(missing)} of {entry.n_blocks} blocks are missing."
                note(entry.name, UserError(f"{what} {_remedy(entry)} to finish it."))
            for pooling in entry.poolings:
                where = f"{entry.name}/{pooling}"
                try:
                    _check_array(folder, entry, pooling)
                except UserError as error:
                    note(where, error)
                    continue
                for block in sorted(set(range(entry.n_blocks)) - set(missing)):
                    try:
                        chunks = self._chunks(folder, entry, pooling, block)
                        rows = chunks.reshape(-1, entry.poolings[pooling])[: len(entry.rows(block))]
                        if _not_finite(rows).any():
                            raise _bad_block(folder, entry, pooling, block, "holds NaN or infinity")
                    except UserError as error:
                        note(where, error, block, entry.rows(block))
                    advance(1)
        return problems

    def remove(self, dataset: str, model: str | None = None, view: str | None = None) -> None:
        """Remove an entry, all entries of a model, or a whole dataset.

        Raises:
            UserError: if there is no such thing, or another process is writing to it.
        """
        self.dataset_attrs(dataset)
        folder = self.path.joinpath(*(store_key(name) for name in (dataset, model, view) if name is not None))
        with _writing(self.path), _only_writer(self.path):
            if not (folder / "zarr.json").exists():
                raise UserError(f"{self.path} has no {'/'.join(filter(None, (dataset, model, view)))}.")
            for entry_folder in self._entry_folders(dataset):
                if entry_folder.is_relative_to(folder):
                    _refuse_busy(entry_folder)
            _discard_folder(folder)

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

    def _entry_folders(self, dataset: str | None) -> list[Path]:
        datasets = _groups(self.path) if dataset is None else [self.path / store_key(dataset)]
        models = [model for folder in datasets for model in _groups(folder) if model.name != "samples"]
        return [view for model in models for view in _groups(model)]


class Writer:
    """An entry being written, block by block. Several processes may share an entry if they write different blocks."""

    def __init__(self, folder: Path, entry: Entry, ids: NDArray[np.str_]) -> None:
        self.entry = entry
        self._folder = folder
        self._ids = ids
        for pooling in entry.poolings:
            _check_array(folder, entry, pooling)
        lock = os.open(folder, os.O_RDONLY)
        self._unlock = weakref.finalize(self, os.close, lock)
        with suppress(OSError):  # another process writes here, or the file system has no locks: leave its files alone
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for place in (folder, *(folder / pooling for pooling in entry.poolings)):
                _sweep(place)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def missing(self) -> list[range]:
        """The rows of every block that is not there yet; block number = `rows.start // entry.rows_per_block`."""
        return [self.entry.rows(block) for block in _missing(self._folder, self.entry)]

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
        halves = {name: self._as_float16(name, rows, embeddings[name]) for name in shapes}
        with _writing(self._folder):
            # In declared order, each safely on the disk before the next: the last one there means all are.
            for name, values in halves.items():
                _write_file(_block_path(self._folder, name, block), _encode_block(values, self.entry.rows_per_block))

    def _as_float16(self, pooling: str, rows: range, values: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
        with np.errstate(over="ignore"):  # judged below
            halves = np.ascontiguousarray(values, dtype="<f2")
        bad = np.flatnonzero(_not_finite(halves).any(axis=1))
        if len(bad):
            finite = np.isfinite(values[bad]).all()
            what = f"beyond the range of float16 (±{_FLOAT16_MAX})" if finite else "NaN or infinite"
            raise UserError(
                f"{self.entry.name}: the {pooling} embedding of {len(bad)} patches is {what} (first: row "
                f"{rows[bad[0]]}, {self._ids[rows[bad[0]]]}). Look at these images, or compute with --precision fp32; "
                "the blocks written so far are kept."
            )
        return halves

    def set_batch_size(self, n: int) -> None:
        """Record the images per forward pass, so that a resumed run uses the same."""
        with _writing(self._folder):
            _write_group(self._folder, _attributes(self._folder) | {"batch_size": n})


# Blocks: the bytes of one file.


def _encode_block(values: NDArray[np.float16], rows_per_block: int) -> list[NDArray[np.uint8]]:
    """The file of a block: its chunks, each followed by its CRC-32C, and the index if the block is a shard.

    Bit-identical to what zarr-python writes for the codecs in `_array_metadata` (tested).
    """
    rows_per_chunk = min(rows_per_block, ROWS_PER_CHUNK)
    pieces = []
    for start in range(0, len(values), rows_per_chunk):
        chunk = values[start : start + rows_per_chunk]
        if len(chunk) < rows_per_chunk:  # Zarr's chunks are whole: the rest is fill value
            fill = np.full((rows_per_chunk - len(chunk), values.shape[1]), np.nan, "<f2")
            chunk = np.concatenate([chunk, fill])
        pieces.append(chunk.reshape(-1).view(np.uint8))
    if rows_per_block > rows_per_chunk:
        pieces.append(_shard_index(len(pieces), pieces[0].nbytes, rows_per_block // rows_per_chunk))
    return [part for piece in pieces for part in (piece, _crc32c(piece))]


def _decode_block(data: mmap.mmap | bytes, entry: Entry, width: int, block: int, *, check: bool) -> NDArray[np.float16]:
    """The chunks in a block's bytes, without a copy: (chunks, rows per chunk, width).

    Raises:
        ValueError: if the size is not the right one or, with `check`, a checksum fails.
    """
    rows_per_chunk = min(entry.rows_per_block, ROWS_PER_CHUNK)
    chunk_bytes = rows_per_chunk * width * 2
    n_chunks = -(-len(entry.rows(block)) // rows_per_chunk)
    index = np.empty(0, np.uint8)
    if entry.rows_per_block > rows_per_chunk:
        index = _shard_index(n_chunks, chunk_bytes, entry.rows_per_block // rows_per_chunk)
    index_start = n_chunks * (chunk_bytes + _CRC_BYTES)
    expected = index_start + (index.nbytes + _CRC_BYTES if index.nbytes else 0)
    if len(data) != expected:
        raise ValueError(f"has {len(data)} bytes instead of {expected}")
    stride = chunk_bytes + _CRC_BYTES
    chunks: NDArray[np.float16] = np.ndarray(
        (n_chunks, rows_per_chunk, width), "<f2", data, strides=(stride, width * 2, 2)
    )
    if check:
        for k, chunk in enumerate(chunks):
            if (
                _crc32c(chunk.reshape(-1).view(np.uint8)).tobytes()
                != data[(k + 1) * stride - _CRC_BYTES : (k + 1) * stride]
            ):
                raise ValueError("is damaged (its checksum does not match)")
        if index.nbytes and data[index_start:] != index.tobytes() + _crc32c(index).tobytes():
            raise ValueError("is damaged (its shard index is wrong)")
    return chunks


def _shard_index(n_chunks: int, chunk_bytes: int, chunks_per_shard: int) -> NDArray[np.uint8]:
    """Offset and size of every chunk of a shard; chunks beyond the array's end are not there."""
    index = np.full((chunks_per_shard, 2), _NO_CHUNK, "<u8")
    index[:n_chunks, 0] = np.arange(n_chunks) * (chunk_bytes + _CRC_BYTES)
    index[:n_chunks, 1] = chunk_bytes + _CRC_BYTES
    return index.reshape(-1).view(np.uint8)


def _crc32c(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array([google_crc32c.value(data)], "<u4").view(np.uint8)


def _not_finite(values: NDArray[np.float16]) -> NDArray[np.bool_]:
    """All exponent bits set; ten times faster than numpy's isfinite on float16."""
    return (values.view(np.uint16) & 0x7C00) == 0x7C00


# Metadata: the zarr.json documents of format 1.


def _array_metadata(
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    *,
    data_type: str,
    fill_value: str | int,
    codecs: list[dict[str, Any]],
    dimension_names: tuple[str, ...],
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        # Flat keys (c.0.0): one folder per array to list and to flush, not one per block.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill_value,
        "codecs": codecs,
        "dimension_names": list(dimension_names),
    }


def _embedding_metadata(entry: Entry, pooling: str) -> dict[str, Any]:
    width = entry.poolings[pooling]
    codecs: list[dict[str, Any]] = [_BYTES, _CRC32C]
    if entry.rows_per_block > ROWS_PER_CHUNK:
        sharding = {"chunk_shape": [ROWS_PER_CHUNK, width], "codecs": codecs, "index_codecs": codecs}
        codecs = [{"name": "sharding_indexed", "configuration": sharding | {"index_location": "end"}}]
    return _array_metadata(
        (entry.n_rows, width),
        (entry.rows_per_block, width),
        data_type="float16",
        fill_value="NaN",
        codecs=codecs,
        dimension_names=("sample", "feature"),
    )


def _column_metadata(n_samples: int, n_raters: int) -> dict[str, dict[str, Any]]:
    """The documents of the patch table's columns; without raters there are no votes."""
    strings = _array_metadata(
        (n_samples,),
        (n_samples,),
        data_type="string",
        fill_value="",
        codecs=[{"name": "vlen-utf8"}, _CRC32C],
        dimension_names=("sample",),
    )
    label = strings | {"data_type": "int8", "fill_value": 0, "codecs": [{"name": "bytes"}, _CRC32C]}
    votes = label | _array_metadata(
        (n_samples, n_raters),
        (n_samples, n_raters),
        data_type="int8",
        fill_value=0,
        codecs=[{"name": "bytes"}, _CRC32C],
        dimension_names=("sample", "rater"),
    )
    columns = {name: strings for name in _STRING_COLUMNS} | {"label": label}
    return columns | {"votes": votes} if n_raters else columns


def _write_samples(folder: Path, samples: Samples) -> None:
    folder.mkdir()
    _write_group(folder, {})
    for name, metadata in _column_metadata(len(samples), samples.votes.shape[1]).items():
        (folder / name).mkdir()
        _write_json(folder / name / "zarr.json", metadata)
        # Even a column of nothing but fill values gets its chunk: an absent one is then always damage.
        with zarr.config.set({"array.write_empty_chunks": True}):
            zarr.open_array(folder / name, mode="r+")[...] = getattr(samples, name)
        for path in (folder / name).iterdir():
            _flush(path)
        _flush(folder / name)
    _flush(folder)


def _read_samples(folder: Path, n_samples: int, n_raters: int) -> Samples:
    columns: dict[str, Any] = {"votes": np.empty((n_samples, 0), np.int8)}
    for name, metadata in _column_metadata(n_samples, n_raters).items():
        _check_metadata(folder / name, metadata, "run fm-extract for this dataset again")
        try:
            values = np.asarray(zarr.open_array(folder / name, mode="r")[...])
        except (ValueError, OSError) as error:
            raise _damaged(folder / name, str(error), "run fm-extract for this dataset again") from error
        columns[name] = values.astype(object).astype(np.str_) if name in _STRING_COLUMNS else values
    return Samples(**columns)


def _create_entry(folder: Path, entry: Entry) -> None:
    """Make an entry's folder with no block in it, in place of one that may be there; all of it appears at once."""
    for name, width in entry.poolings.items():
        if store_key(name) != name or "+" in name or name == "card" or width < 1:
            raise ValueError(f"{entry.name}: {name!r} of width {width} cannot be a pooling")
    if not set(entry.card_pooling.split("+")) <= set(entry.poolings):
        raise ValueError(f"{entry.name}: card pooling {entry.card_pooling!r} is not made of {list(entry.poolings)}")
    model = folder.parent
    model.mkdir(exist_ok=True)
    _sweep(model)
    if not (model / "zarr.json").exists():
        _write_group(model, {"model": entry.model})
        _flush(model.parent)
    if folder.exists():
        _refuse_busy(folder)
    new = _temporary(folder)
    new.mkdir()
    for name in entry.poolings:
        (new / name).mkdir()
        _write_json(new / name / "zarr.json", _embedding_metadata(entry, name))
    attributes = asdict(entry) | {"poolings": [{"name": n, "width": w} for n, w in entry.poolings.items()]}
    del attributes["n_done"]  # what is done is seen in the files
    _write_group(new, attributes)
    _move_folder(new, folder)


def _read_entry(folder: Path) -> Entry:
    attributes = _attributes(folder)
    try:
        poolings = {str(pooling["name"]): int(pooling["width"]) for pooling in attributes["poolings"]}
        entry = Entry(**(attributes | {"poolings": poolings, "n_done": 0}))
        sound = (
            entry.fingerprint == fingerprint(entry.parts)
            and folder.parts[-3:] == tuple(map(store_key, (entry.dataset, entry.model, entry.view)))
            and set(entry.card_pooling.split("+")) <= set(poolings)
            and entry.n_rows > 0
            and MIN_ROWS_PER_BLOCK <= entry.rows_per_block <= MAX_ROWS_PER_BLOCK
        )
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise _damaged(folder, f"its attributes do not describe an entry ({error})", _OVERWRITE) from error
    if not sound:
        raise _damaged(folder, "its attributes contradict each other", _OVERWRITE)
    return Entry(**(vars(entry) | {"n_done": entry.n_blocks - len(_missing(folder, entry))}))


_OVERWRITE = "write this entry anew with --overwrite"


def _missing(folder: Path, entry: Entry) -> list[int]:
    """The blocks that are not done: those without a file of the last pooling."""
    last = folder / list(entry.poolings)[-1]
    there = set(os.listdir(last)) if last.is_dir() else set()
    return [block for block in range(entry.n_blocks) if _block_path(last.parent, last.name, block).name not in there]


def _block_path(folder: Path, pooling: str, block: int) -> Path:
    return folder / pooling / f"c.{block}.0"


def _check_array(folder: Path, entry: Entry, pooling: str) -> None:
    _check_metadata(folder / pooling, _embedding_metadata(entry, pooling), _OVERWRITE)


def _check_metadata(folder: Path, expected: dict[str, Any], remedy: str) -> None:
    document = _read_json(folder / "zarr.json", remedy)
    for key, value in expected.items():
        if document.get(key) != value:
            raise _damaged(folder, f"{key} is {json.dumps(document.get(key))}, expected {json.dumps(value)}", remedy)


def _attributes(folder: Path) -> dict[str, Any]:
    """The attributes of a group."""
    document = _read_json(folder / "zarr.json", "restore it from a copy, or remove this folder and compute it again")
    attributes = document.get("attributes", {})
    if document.get("zarr_format") != 3 or document.get("node_type") != "group" or not isinstance(attributes, dict):
        raise _damaged(folder, "this is not a Zarr v3 group", "restore it from a copy, or use another --store")
    return attributes


def _groups(folder: Path) -> list[Path]:
    """The groups right below a group, without those still being made."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and (path / "zarr.json").exists())


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path.parent, f"zarr.json is not JSON ({error})", remedy) from error
    except OSError as error:
        raise _damaged(path.parent, f"zarr.json cannot be read ({error.strerror})", remedy) from error
    if not isinstance(document, dict):
        raise _damaged(path.parent, "zarr.json is not a JSON object", remedy)
    return document


# Messages.


def _damaged(folder: Path, what: str, remedy: str) -> UserError:
    return UserError(f"{folder} is damaged: {what}. To mend it, {remedy}.")


def _bad_block(folder: Path, entry: Entry, pooling: str, block: int, what: str) -> UserError:
    rows = entry.rows(block)
    # Without its last pooling the block counts as missing, and only it is computed again.
    marker = _block_path(folder, list(entry.poolings)[-1], block)
    mend = _OVERWRITE if entry.imported else f"delete {marker} and run the same fm-extract again"
    return UserError(
        f"{entry.name}/{pooling}: block {block} (rows {rows.start}–{rows.stop - 1}, {_block_path(folder, pooling, block)}) "
        f"{what}. To mend it, {mend}."
    )


def _remedy(entry: Entry) -> str:
    return "Run the same fm-store import again" if entry.imported else "Run the same fm-extract again"


def _refuse_other(stored: Entry, asked: Entry) -> None:
    """Embeddings that were computed in another way are never mixed."""
    names = ("dataset", "model", "view", "poolings", "card_pooling", "n_rows", "parts")
    old, new = ({name: getattr(entry, name) for name in names} for entry in (stored, asked))
    differing = list(_differences(old, new))
    if differing:
        raise UserError(
            f"the store already has {stored.name}, computed differently (fingerprint {stored.fingerprint[:12]}, now "
            f"{asked.fingerprint[:12]}):\n"
            + "\n".join(f"  {name}: stored {was}, now {now}" for name, was, now in differing)
            + "\nUse another --store to keep both, or --overwrite to discard the stored one."
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key, "(none)"), new.get(key, "(none)")
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now, f"{prefix}{key}.")
        elif json.dumps(was) != json.dumps(now):
            yield prefix.removeprefix("parts.") + key, json.dumps(was), json.dumps(now)


def _refuse_busy(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing to {folder}: wait until it has finished, or stop it.") from None
    except OSError:  # a file system without locks cannot tell
        pass
    finally:
        os.close(lock)


# Files: nothing half-written under a final name, nothing reported done before it is on the disk.


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Turn the ways in which a disk refuses to be written into one message each."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise UserError(
            f"cannot write to {place}: {error.strerror}. Everything written so far is kept: "
            f"{_CANNOT_WRITE[error.errno]}, then run the same command again."
        ) from error


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Let one process at a time add or replace folders, where the file system has locks."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write_group(folder: Path, attributes: Mapping[str, Any]) -> None:
    _write_json(folder / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    _write_file(path, [json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode()])


def _write_file(path: Path, pieces: Iterable[bytes | NDArray[np.uint8]]) -> None:
    """Write a file whole: it appears under its name only when all of it is on the disk."""
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")


def _move_folder(new: Path, place: Path) -> None:
    """Put a folder in its place, in one step where none is there, else in two between which there is none."""
    if place.exists():
        _discard_folder(place)
    _flush(new)
    new.rename(place)
    _flush(place.parent)


def _discard_folder(folder: Path) -> None:
    aside = _temporary(folder)
    folder.rename(aside)
    _flush(folder.parent)
    shutil.rmtree(aside)


def _sweep(folder: Path) -> None:
    """Remove what killed writers have left right below a folder."""
    for path in folder.glob(f".*{_PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
