"""Where are embeddings stored, and how is it known that they are complete and undamaged?

A Zarr v3 store (docs/store-format.md is its specification). Every array has its final shape from the start and is
written in blocks of whole rows, each once. The blocks are plain files that `features.blocks` reads and
`features.writer` writes directly, in a safe order; any Zarr reader opens them. Whether files lie in a folder or in a
bucket is for `features.storage` to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.blocks import BlockReader, Embeddings
from features.console import ProgressCallback, UserError, nearest, progress
from features.display import html_table
from features.entry import Entry, create_entry, entry_key, folder_name, read_entry, refuse_other, store_key
from features.files import PARTIAL, check_folder
from features.fingerprint import fingerprint
from features.labels import NUMBERS, Classes, numbered
from features.layout import rows_per_block
from features.metadata import damage, encode_group, read_attributes, write_attributes
from features.patch_table import encode_samples, read_samples
from features.samples import Samples
from features.storage import METADATA, DamageError, Storage, find_groups, find_storage
from features.writer import Writer

FORMAT = "mitofm-features"
FIRST_VERSION = 1  # of a store in which every dataset has two classes
FORMAT_VERSION = 2  # of one with a dataset of more: whoever knows two would read its labels wrong


_MEANING = ("label_names", "ordinal")  # the attributes of a dataset that say what its labels mean


def table_changed(before: Classes, after: Classes) -> str:
    """Say that a dataset's table was replaced, and what its labels meant before if that has changed.

    >>> table_changed(("a", "b"), ("b", "a")).partition("updated.")[2]
    ' Its classes were a (0) and b (1), now b (0) and a (1).'
    """
    names = f" Its classes were {numbered(before)}, now {numbered(after)}." if before != after else ""
    changed = "labels, classes, whether these are grades, groups or splits"
    return f"same patches, but {changed} have changed; the store's table was updated.{names}"


@dataclass(frozen=True)
class Problem:
    """One thing that `FeatureStore.verify` found wrong."""

    where: str  # dataset[/model/view[/pooling]]
    block: int | None
    rows: tuple[int, int] | None  # first and last
    what: str  # the whole sentence, with the remedy


class FeatureStore:
    """An open feature store. Make one with `FeatureStore.open` or `FeatureStore.open_or_create`."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._reader = BlockReader(storage)

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}: {', '.join(self.datasets()) or 'no dataset'})"

    def _repr_html_(self) -> str:
        rows = []
        for entry in self.entries():
            poolings = ", ".join(f"{name} × {width:,}" for name, width in entry.poolings.items())
            blocks = f"{entry.n_done} of {entry.n_blocks}"
            rows.append((entry.dataset, entry.model, entry.view, f"{entry.n_rows:,}", poolings, blocks))
        without = set(self.datasets()) - {row[0] for row in rows}
        rows += [(name, "–", "–", f"{len(self.samples(name)):,}", "–", "–") for name in sorted(without)]
        return html_table(("dataset", "model", "view", "rows", "poolings", "blocks"), rows, caption=str(self.path))

    @property
    def path(self) -> Path | str:
        """A folder's path, or a bucket's address."""
        return self.storage.root

    @classmethod
    def open(cls, where: Path | str) -> FeatureStore:
        """Open a store that exists: a folder, or `s3://bucket/prefix`.

        Raises:
            UserError: if there is none, it is something else, a newer version wrote it, or it cannot be reached.
        """
        return cls._open(find_storage(where))

    @classmethod
    def _open(cls, storage: Storage) -> FeatureStore:
        if not storage.exists(METADATA):
            what = "is not a feature store (it has no zarr.json)" if storage.exists("") else "does not exist"
            raise UserError(f"{storage.root} {what}. Run fm-extract first, or name the store by `store`.")
        attributes = read_attributes(storage, "")
        if attributes.get("format") != FORMAT:
            raise UserError(f"{storage.root} is a Zarr group, but not a mitofm feature store. Name another `store`.")
        version = attributes.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise UserError(
                f"{storage.root} was written in store format {version}; this mitofm reads formats up to "
                f"{FORMAT_VERSION}. Upgrade mitofm (pip install --upgrade mitofm), or use another `store`."
            )
        return cls(storage)

    @classmethod
    def open_or_create(cls, where: Path | str) -> FeatureStore:
        """Open a store, or make an empty one where nothing is.

        Raises:
            UserError: as `open`; if something else lies there; or if it cannot be written.
        """
        storage = find_storage(where)
        if not storage.exists(METADATA):
            _require_nothing_else(storage)
            write_attributes(storage, "", {"format": FORMAT, "format_version": FIRST_VERSION})
        return cls._open(storage)

    @classmethod
    def check_place(cls, where: Path | str) -> None:
        """Check, before the work begins, that a store can be opened or made in a folder, and written; nothing is made.

        A bucket is not asked.

        Raises:
            UserError: as `open_or_create`.
        """
        if "://" in str(where):
            return
        storage = find_storage(where)
        if storage.exists(METADATA):
            cls._open(storage)
        else:
            _require_nothing_else(storage)
        check_folder(Path(where), name="store")

    def datasets(self) -> list[str]:
        """List the names of all datasets, as the user gave them."""
        keys = find_groups(self.storage, "")
        return self.storage.map(lambda key: str(read_attributes(self.storage, key).get("name")), keys)

    def dataset_attrs(self, dataset: str) -> dict[str, Any]:
        """Read a dataset's attributes: its name, digests, counts, and what its maker recorded about it.

        Raises:
            UserError: if the store has no such dataset, or its metadata are damaged.
        """
        key = store_key(dataset)
        if not self.storage.exists(f"{key}/{METADATA}"):
            known = self.datasets()
            raise UserError(
                f"{self.path} has no dataset {dataset!r}; it has: {', '.join(known) or 'none'}."
                f"{nearest(dataset, known)} Run fm-extract --dataset {dataset} first."
            )
        attributes = read_attributes(self.storage, key)
        if attributes.get("name") != dataset:
            raise UserError(
                f"{self.storage.path(key)} holds the dataset {attributes.get('name')!r}, not {dataset!r}: names that "
                "differ only in special characters cannot share a store. Rename one, or use another `store`."
            )
        return attributes

    def class_names(self, dataset: str) -> Classes:
        """Read the names of a dataset's classes, in the order of their labels; numbers where no names are recorded.

        Raises:
            UserError: as `dataset_attrs`.
        """
        return tuple(map(str, self.dataset_attrs(dataset).get("label_names", NUMBERS)))

    def samples(self, dataset: str) -> Samples:
        """Read a dataset's patch table and check it against its recorded digest.

        Raises:
            UserError: if the store has no such dataset, or the table is damaged.
        """
        return self._read_samples(store_key(dataset), self.dataset_attrs(dataset))

    def _read_samples(self, key: str, attributes: Mapping[str, Any]) -> Samples:
        n_samples, n_raters = (int(attributes.get(name, 0)) for name in ("n_samples", "n_raters"))
        digest = attributes.get("table_digest")
        return read_samples(self.storage, f"{key}/samples", n_samples=n_samples, n_raters=n_raters, digest=digest)

    def put_samples(
        self, dataset: str, samples: Samples, *, attrs: Mapping[str, Any], overwrite: bool = False, shared: bool = False
    ) -> Classes | None:
        """Record a dataset's patch table; nothing is written if the same table is there.

        A dataset of more than two classes turns the store to format 2, which mitofm for two classes refuses to open.

        Args:
            dataset: its name.
            samples: the table; its row order is that of every embedding of this dataset.
            attrs: what else to record about the dataset, as JSON values: `label_names`, the names of the classes;
                `ordinal` if they are grades; ...
            overwrite: whether to discard this dataset, with all its embeddings, if its images have changed.
            shared: whether other machines may be doing the same at this moment, see `begin`.

        Returns:
            If a table of the same images, but with other labels, names of classes, groups, splits, votes or domains,
            was replaced: the names that its classes had. Otherwise None.

        Raises:
            UserError: if the store has other images under this name, or cannot be written.
            ValueError: if `label_names` are fewer than the classes.
        """
        if len(samples) == 0:
            raise UserError(f"dataset {dataset!r} has no patches: there is nothing to store.")
        key = store_key(dataset)
        numbers = tuple(map(str, range(samples.n_classes)))
        n_classes = len(attrs.get("label_names", numbers))
        if n_classes < samples.n_classes:
            raise ValueError(f"{dataset}: {n_classes} label_names for {samples.n_classes} classes")
        attributes = (
            ({"label_names": list(numbers)} if n_classes > 2 else {})
            | dict(attrs)
            | {
                "name": dataset,
                "n_samples": len(samples),
                "n_raters": samples.votes.shape[1],
                "images_digest": samples.images_digest,
                "table_digest": samples.table_digest,
            }
        )
        table = {f"samples/{name}": data for name, data in encode_samples(samples).items()}
        files = table | {METADATA: [encode_group(attributes)]}
        with self.storage.lock() as locked:
            if locked and not shared:
                self.storage.sweep("")
            if n_classes > 2:
                self._raise_format()
            if not self.storage.exists(f"{key}/{METADATA}"):
                self.storage.put_folder(key, files)  # if another process was faster, its folder stays
            stored = self.dataset_attrs(dataset)
            if stored.get("images_digest") == attributes["images_digest"]:
                if locked and not shared:
                    self.storage.sweep(key)
                return self._update_table(key, samples, stored, attributes)
            if not overwrite:
                why = " (in another order, or with other ids)" if _same_images(self, dataset, samples) else ""
                before, now = (_cut_by(of.get("slides", {})) for of in (stored, attributes))
                if before != now:
                    why = f" (cut from slides by {before}, now by {now})"
                raise UserError(
                    f"{self.path} already has a dataset {dataset!r} of other images{why}: {stored.get('n_samples')} "
                    f"with digest {stored.get('images_digest')}, now {len(samples)} with digest "
                    f"{attributes['images_digest']}. Name this one otherwise (NAME=PATH), use another `store`, or "
                    "`overwrite=True` to discard the stored dataset and all its embeddings."
                )
            self.storage.put_folder(key, files, replace=True)
        return None

    def _raise_format(self) -> None:
        """Record format 2 before the first dataset of more than two classes is there."""
        attributes = read_attributes(self.storage, "")
        if attributes["format_version"] < FORMAT_VERSION:
            write_attributes(self.storage, "", attributes | {"format_version": FORMAT_VERSION})

    def _update_table(
        self, key: str, samples: Samples, stored: dict[str, Any], attributes: dict[str, Any]
    ) -> Classes | None:
        before = tuple(map(str, stored.get("label_names", NUMBERS)))
        if stored.get("table_digest") == attributes["table_digest"]:
            try:
                self._read_samples(key, stored)
            except DamageError:
                pass  # a damaged table, or one whose replacement was cut short, is written anew
            else:
                # What labels mean is said as a whole: classes that are no longer grades lose that too.
                old, new = ({name: of[name] for name in _MEANING if name in of} for of in (stored, attributes))
                if new == old or "label_names" not in new:
                    return None
                kept = {name: value for name, value in stored.items() if name not in _MEANING}
                write_attributes(self.storage, key, kept | new)
                return before
        # Attributes first: whoever reads in between finds a table that does not match its digest, never a wrong one.
        write_attributes(self.storage, key, attributes)
        self.storage.put_folder(f"{key}/samples", encode_samples(samples), replace=True)
        return before

    def entries(self, dataset: str | None = None, model: str | None = None) -> list[Entry]:
        """List everything embedded so far, complete or not, in the order of the names.

        Raises:
            UserError: if an entry's metadata are damaged.
        """
        keys = self._entry_keys(dataset, model)
        entries = self.storage.map(lambda key: read_entry(self.storage, key), keys)
        return [entry for entry in entries if model in (None, entry.model)]

    def entry(self, dataset: str, *, model: str, view: str) -> Entry:
        """Read what the store knows about one dataset seen by one model through one view, complete or not.

        Raises:
            UserError: if there is none, or its metadata are damaged.
        """
        key = entry_key(dataset, model, view)
        if not self.storage.exists(f"{key}/{METADATA}"):
            self.dataset_attrs(dataset)
            known = [f"{entry.model}/{entry.view}" for entry in self.entries(dataset)]
            raise UserError(
                f"{self.path} has no embeddings of {dataset!r} by {model!r} with view {view!r}; it has: "
                f"{', '.join(known) or 'none'}.{nearest(f'{model}/{view}', known)} "
                f"Run fm-extract --dataset {dataset} --model {model} --view {view} first."
            )
        entry = read_entry(self.storage, key)
        if (entry.dataset, entry.model, entry.view) != (dataset, model, view):
            raise UserError(
                f"{entry.folder} holds {entry.name}, not {dataset}/{model}/{view}: names that differ only in special "
                "characters cannot share a store. Use another `store`."
            )
        return entry

    def begin(
        self,
        dataset: str,
        *,
        model: str,
        view: str,
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
            model: its name.
            view: input policy, as "full" or "center64".
            poolings: name -> width, in the order in which they shall be written.
            card_pooling: the poolings, joined by "+", that make the embedding recommended by the model's card.
            parts: everything that decides the numbers, as JSON values.
            overwrite: whether to discard what is there under these names, whatever its fingerprint.
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
            storage=self.storage,
            key=entry_key(dataset, model, view),
        )
        with self.storage.lock() as locked:
            if locked and not shared:
                self.storage.sweep(store_key(dataset))
            exists = self.storage.exists(f"{entry.key}/{METADATA}")  # one that appears from now on is whole, and stays
            if overwrite or not exists:
                create_entry(entry, replace=exists)
            stored = read_entry(self.storage, entry.key)
            refuse_other(stored, entry)
            return Writer(stored, self.samples(dataset).id, shared=shared)

    def read(
        self,
        dataset: str,
        *,
        model: str,
        view: str,
        pooling: str = "card",
        rows: NDArray[np.intp] | NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float16]:
        """Read the embeddings of one dataset by one model through one view.

        Each block's checksum is computed once per open store, when the block is first touched.

        Args:
            dataset, model, view: which embeddings.
            pooling: a stored pooling, several joined by "+", or "card" for what the model's card recommends.
            rows: which rows, as indices in any order or as a mask; all by default.

        Returns:
            (n, d) float16, finite.

        Raises:
            UserError: if there is no such entry or pooling, if it is not complete, or if a checksum is wrong.
        """
        return self.embeddings(dataset, model=model, view=view, pooling=pooling, rows=rows).read()

    def embeddings(
        self,
        dataset: str,
        *,
        model: str,
        view: str,
        pooling: str = "card",
        rows: NDArray[np.intp] | NDArray[np.bool_] | None = None,
    ) -> Embeddings:
        """Find the embeddings that `read` would read, still unread. Args and raises: as `read`, but for checksums."""
        entry = self.entry(dataset, model=model, view=view)
        if not entry.complete:
            missing = [f"{rows.start}–{rows.stop - 1}" for rows in map(entry.rows, entry.missing_blocks())]
            shown = ", ".join(missing[:4]) + ", …" * (len(missing) > 4)
            raise UserError(f"{entry.incomplete()} Missing rows: {shown}.")
        names = (entry.card_pooling if pooling == "card" else pooling).split("+")
        for name in names:
            if name not in entry.poolings:
                raise UserError(
                    f"{entry.name} has no pooling {name!r}; it has {', '.join(entry.poolings)} (and card = "
                    f"{entry.card_pooling}).{nearest(name, entry.poolings)}"
                )
            entry.check_array(name)
        return Embeddings(self._reader, entry, tuple(names), None if rows is None else np.arange(entry.n_rows)[rows])

    def verify(self, dataset: str | None = None, model: str | None = None) -> list[Problem]:
        """Look at every byte: tables against their digests, blocks against their checksums, numbers for NaN.

        Args:
            dataset, model: only these.

        Raises:
            UserError: if the store has no such dataset, or cannot be reached.
        """
        if dataset is not None and not self.storage.exists(f"{store_key(dataset)}/{METADATA}"):
            self.dataset_attrs(dataset)  # raises
        problems: list[Problem] = []
        for key in self._dataset_keys(dataset):
            try:
                self._check_table(key)
            except DamageError as error:
                problems.append(Problem(key, None, None, str(error)))
        entries = []
        for key in self._entry_keys(dataset, model):
            try:
                entry = read_entry(self.storage, key)
            except DamageError as error:
                problems.append(Problem(key, None, None, str(error)))
                continue
            if model in (None, entry.model):
                entries.append(entry)
        self._reader.forget()
        total = sum(entry.n_done * len(entry.poolings) for entry in entries)
        with progress("verify", total, unit="blocks") as advance:
            for entry in entries:
                if not entry.complete:
                    problems.append(Problem(entry.name, None, None, entry.incomplete()))
                for pooling in entry.poolings:
                    problems += self._check_blocks(entry, pooling, advance)
        return problems

    def _check_table(self, key: str) -> None:
        attributes = read_attributes(self.storage, key)
        name = str(attributes.get("name"))
        if folder_name(name) != key:
            remedy = "restore it from a copy, or give the folder its name again"
            raise damage(self.storage.path(key), f"its attributes are those of the dataset {name!r}", remedy)
        self._read_samples(key, attributes)

    def _check_blocks(self, entry: Entry, pooling: str, advance: ProgressCallback) -> Iterator[Problem]:
        where = f"{entry.name}/{pooling}"
        try:
            entry.check_array(pooling)
        except DamageError as error:
            yield Problem(where, None, None, str(error))
            return
        done = sorted(set(range(entry.n_blocks)).difference(entry.missing_blocks()))
        for block, fault in self._reader.verify(entry, pooling, done):
            if fault is not None:
                rows = entry.rows(block)
                yield Problem(where, block, (rows.start, rows.stop - 1), str(fault))
            advance(1)

    def remove(self, dataset: str, *, model: str | None = None, view: str | None = None) -> None:
        """Remove an entry, all entries of a model, or a whole dataset.

        Raises:
            UserError: if there is no such thing, or another process is writing to it.
        """
        if view is not None and model is None:
            raise ValueError("a view is removed of one model: say which")
        self.dataset_attrs(dataset)
        key = "/".join(store_key(name) for name in (dataset, model, view) if name is not None)
        with self.storage.lock():
            if not self.storage.exists(f"{key}/{METADATA}"):
                raise UserError(f"{self.path} has no {'/'.join(filter(None, (dataset, model, view)))}.")
            self.storage.remove(key)

    def _dataset_keys(self, dataset: str | None) -> list[str]:
        return find_groups(self.storage, "") if dataset is None else [store_key(dataset)]

    def _entry_keys(self, dataset: str | None, model: str | None) -> list[str]:
        def below(keys: list[str]) -> list[str]:
            groups = self.storage.map(lambda key: find_groups(self.storage, key), keys)
            return [key for several in groups for key in several]

        models = [
            key
            for key in below(self._dataset_keys(dataset))
            if (name := key.rpartition("/")[2]) != "samples" and (model is None or name == store_key(model))
        ]
        return below(models)


def _require_nothing_else(storage: Storage) -> None:
    """Refuse a folder that is no store and holds something."""
    others = any(not name.endswith(PARTIAL) for name in storage.list_folder(""))
    if others and not storage.exists(METADATA):  # another process may just have made the store
        raise UserError(f"{storage.root} exists but is not a feature store. Name another `store`; nothing was changed.")


def _cut_by(slides: Mapping[str, Any]) -> str:
    """Write the options by which patches were cut from slides; their folder does not matter."""
    return ", ".join(f"`{name}={value}`" for name, value in slides.items() if name != "folder") or "none"


def _same_images(store: FeatureStore, dataset: str, samples: Samples) -> bool:
    try:
        stored = store.samples(dataset)
    except DamageError:
        return False
    return sorted(stored.sha256.tolist()) == sorted(samples.sha256.tolist())
