"""What does a store know about one dataset seen by one model through one view?"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from features.console import UserError
from features.fingerprint import differences, fingerprint
from features.layout import MAX_ROWS_PER_BLOCK, MIN_ROWS_PER_BLOCK, Grid
from features.metadata import check_array, damage, encode_group, encode_json, read_attributes, write_attributes
from features.storage import METADATA, Storage

_REMEDY = "write this entry anew with `overwrite=True`"


@dataclass(frozen=True)
class Entry:
    """The embeddings of one dataset by one model through one view, as their metadata describe them.

    Attributes:
        dataset, model, view: names as the user gives them; those of folders are made from them.
        poolings: name -> width, in the order in which a block is written.
        card_pooling: the embedding that the model's card recommends, a sum of poolings: "cls", "cls+mean", "pooled".
        fingerprint: SHA-256 over `parts`.
        parts: everything that decides the numbers.
        n_rows: rows, as in the patch table.
        rows_per_block: rows written at once.
        batch_size: images per forward pass, where recorded; no part of the fingerprint.
        imported: whether the embeddings were computed elsewhere.
        n_done: blocks that were there when this record was made.
        storage, key: where it lies.
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
    storage: Storage
    key: str

    def __repr__(self) -> str:
        poolings = ", ".join(f"{name} {width:,}" for name, width in self.poolings.items())
        state = "complete" if self.complete else f"{self.n_done} of {self.n_blocks} blocks"
        return f"Entry({self.name}: {self.n_rows:,} rows, {poolings}, {state})"

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
        """The path or address of its folder, as messages name it."""
        return self.storage.path(self.key)

    @property
    def last_pooling(self) -> str:
        """The pooling that is written last: a block is done when its file of this pooling exists."""
        return list(self.poolings)[-1]

    def rows(self, block: int) -> range:
        """Return the rows of a block."""
        start = block * self.rows_per_block
        return range(start, min(start + self.rows_per_block, self.n_rows))

    def grid(self, pooling: str) -> Grid:
        """Describe how the array of a pooling is cut into blocks."""
        return Grid(self.n_rows, self.poolings[pooling], self.rows_per_block)

    def block_key(self, pooling: str, block: int) -> str:
        """Make the key of a block's file."""
        return f"{self.key}/{pooling}/{block_name(block)}"

    def block_path(self, pooling: str, block: int) -> Path | str:
        """Make the path or address of a block's file, as messages name it."""
        return self.storage.path(self.block_key(pooling, block))

    def missing_blocks(self) -> list[int]:
        """List the numbers of the blocks that are missing now: those without a file of the last pooling."""
        written = self.storage.list_folder(f"{self.key}/{self.last_pooling}")
        return [block for block in range(self.n_blocks) if block_name(block) not in written]

    def size(self) -> int:
        """Sum the bytes of all its files."""
        folders = [self.key, *(f"{self.key}/{pooling}" for pooling in self.poolings)]
        return sum(sum(self.storage.list_folder(folder).values()) for folder in folders)

    def check_array(self, pooling: str) -> None:
        """Check the metadata of a pooling's array.

        Raises:
            DamageError: if they cannot be read or are not those of this entry.
        """
        check_array(self.storage, f"{self.key}/{pooling}", self.grid(pooling).metadata(), remedy=_REMEDY)

    def incomplete(self) -> str:
        """Make the sentence that says how many blocks are missing and what to do."""
        command = "fm-store import" if self.imported else "fm-extract"
        return (
            f"{self.name} is not complete: {self.n_blocks - self.n_done} of {self.n_blocks} blocks are missing. "
            f"Run the same {command} again to finish it."
        )


def block_name(block: int) -> str:
    """Make the name of a block's file."""
    return f"c.{block}.0"


def folder_name(name: str) -> str:
    """Replace those characters of a name that a folder of the store may not have."""
    return re.sub(r"[^\w.@+=-]", "-", re.sub(r"[/:\\]+", "--", name))


def store_key(name: str) -> str:
    """Make the folder name of a dataset, model or view: `timm/x` -> `timm--x`, `hf-hub:a/b@r` -> `hf-hub--a--b@r`.

    Raises:
        UserError: if the name is empty, climbs (`..`), holds control characters, or would clash with a Zarr name.
    """
    key = folder_name(name)
    if not name.strip() or not name.isprintable() or ".." in name:
        raise UserError(f"{name!r} cannot name anything in a feature store: it is empty, unprintable, or holds '..'.")
    if key.startswith((".", "__")) or key == METADATA or len(key.encode()) > 200:
        raise UserError(f"{name!r} cannot name anything in a feature store: use a plain name of at most 200 bytes.")
    return key


def entry_key(dataset: str, model: str, view: str) -> str:
    """Make the key of an entry's folder. Raises UserError as `store_key`."""
    if store_key(model) == "samples":
        raise UserError("a model cannot be called 'samples': that is the name of the patch table.")
    return "/".join(map(store_key, (dataset, model, view)))


# The recorded fields. The files themselves show how much is done, and whoever reads them knows where they lie.
_RECORDED = [field.name for field in fields(Entry) if field.name not in ("n_done", "storage", "key")]


def read_entry(storage: Storage, key: str) -> Entry:
    """Read an entry's metadata.

    Raises:
        DamageError: if they cannot be read, are incomplete, or contradict each other.
    """
    read_attributes(storage, key.rpartition("/")[0])
    attributes = read_attributes(storage, key)
    try:
        recorded = {name: attributes[name] for name in _RECORDED}
        poolings = {str(pooling["name"]): int(pooling["width"]) for pooling in recorded["poolings"]}
        entry = Entry(**(recorded | {"poolings": poolings}), n_done=0, storage=storage, key=key)
        sound = (
            entry.fingerprint == fingerprint(entry.parts)
            and key == entry_key(entry.dataset, entry.model, entry.view)
            and all(store_key(name) == name for name in poolings)  # each names a folder below this one
            and set(entry.card_pooling.split("+")) <= set(poolings)
            and entry.n_rows > 0
            and MIN_ROWS_PER_BLOCK <= entry.rows_per_block <= MAX_ROWS_PER_BLOCK
        )
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise damage(storage.path(key), f"its attributes do not describe an entry ({error!r})", _REMEDY) from error
    if not sound:
        raise damage(storage.path(key), "its attributes contradict each other", _REMEDY)
    return replace(entry, n_done=entry.n_blocks - len(entry.missing_blocks()))


def create_entry(entry: Entry, *, replace: bool) -> None:
    """Make an entry's folder in one step, without blocks; with `replace` it takes the place of an existing one.

    Raises:
        ValueError: if a pooling has an impossible name or width, or the card pooling is not made of the poolings.
        UserError: if the entry to be replaced is being written.
    """
    for name, width in entry.poolings.items():
        if store_key(name) != name or "+" in name or name == "card" or width < 1:
            raise ValueError(f"{entry.name}: {name!r} of width {width} cannot be a pooling")
    if not set(entry.card_pooling.split("+")) <= set(entry.poolings):
        raise ValueError(f"{entry.name}: card pooling {entry.card_pooling!r} is not made of {list(entry.poolings)}")
    model = entry.key.rpartition("/")[0]
    if not entry.storage.exists(f"{model}/{METADATA}"):
        write_attributes(entry.storage, model, {"model": entry.model})
    attributes = {name: getattr(entry, name) for name in _RECORDED}
    attributes["poolings"] = [{"name": name, "width": width} for name, width in entry.poolings.items()]
    files = {f"{name}/{METADATA}": [encode_json(entry.grid(name).metadata())] for name in entry.poolings}
    entry.storage.put_folder(entry.key, files | {METADATA: [encode_group(attributes)]}, replace=replace)


def refuse_other(stored: Entry, asked: Entry) -> None:
    """Refuse to mix embeddings that were computed in another way.

    Raises:
        UserError: that says in which values the two entries differ.
    """
    names = ("dataset", "model", "view", "poolings", "card_pooling", "n_rows", "parts")
    old, new = ({name: getattr(entry, name) for name in names} for entry in (stored, asked))
    differing = {name: values for name, *values in differences(old, new)}
    if differing:
        raise UserError(
            f"the store already has {stored.name}, computed differently (fingerprint {stored.fingerprint[:12]}, now "
            f"{asked.fingerprint[:12]}):\n"
            + "\n".join(f"  {name}: stored {before}, now {now}" for name, (before, now) in differing.items())
            + "\nUse another `store` to keep both, or `overwrite=True` to discard the stored one."
        )
