"""How are blocks of embeddings written, each once, whole, and never mixed with another process's?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.blocks import to_float16
from features.console import UserError
from features.entry import Entry
from features.layout import encode_block
from features.metadata import read_attributes, write_attributes
from features.storage import DamageError


class Writer:
    """An entry being written, block by block. Several processes may share an entry if they write different blocks."""

    def __init__(self, entry: Entry, ids: NDArray[np.str_], *, shared: bool = False) -> None:
        self.entry = entry
        self._ids = ids
        for pooling in entry.poolings:
            entry.check_array(pooling)
        # Many may write blocks, but nobody may sweep or replace the folder meanwhile.
        self._claim = entry.storage.claim(entry.key, shared=shared)

    def missing(self, within: range | None = None) -> list[range]:
        """List the rows of every block that is missing now; with `within`, only of blocks that lie in these rows."""
        blocks = [self.entry.rows(block) for block in self.entry.missing_blocks()]
        if within is None:
            return blocks
        return [rows for rows in blocks if within.start <= rows.start and rows.stop <= within.stop]

    def write(self, rows: range, embeddings: Mapping[str, NDArray[np.floating[Any]]]) -> None:
        """Write one block, whole; when this returns it is on the disk, and until then it does not count as there.

        Args:
            rows: the rows of the block, as `missing` gives them.
            embeddings: pooling -> (rows of the block, width) floats; they are stored as float16.

        Raises:
            UserError: if an embedding is not finite, or beyond float16, or the storage cannot be written.
            ValueError: if the rows are not those of a block, or poolings or shapes not those of the entry.
        """
        entry = self.entry
        block = rows.start // entry.rows_per_block
        if rows != entry.rows(block):
            raise ValueError(f"{entry.name}: {rows} are not the rows of a block; `missing` gives them")
        expected = {name: (len(rows), width) for name, width in entry.poolings.items()}
        shapes = {name: values.shape for name, values in embeddings.items()}
        if shapes != expected:
            raise ValueError(f"{entry.name}, rows {rows.start}–{rows.stop - 1}: expected {expected}, got {shapes}")
        ids = self._ids[rows.start : rows.stop]
        halves = {
            name: to_float16(embeddings[name], f"{entry.name}/{name}", ids=ids, first_row=rows.start)
            for name in expected
        }
        self._require_not_replaced()
        # In declared order, each on the disk before the next is begun: where the last one is, all are.
        try:
            for name, values in halves.items():
                entry.storage.write(entry.block_key(name, block), encode_block(values, entry.grid(name)))
        except FileNotFoundError:
            if entry.missing_blocks():
                raise
            # Another process wrote the same block, finished the entry, and swept this unfinished file.
        try:
            self._require_not_replaced()
        except UserError:
            entry.storage.remove(entry.block_key(entry.last_pooling, block))
            raise

    def sweep(self) -> None:
        """Remove what killed writers have left, once every block is there and nobody has anything to write."""
        if not self.entry.missing_blocks():
            self.entry.storage.sweep(self.entry.key)

    def set_batch_size(self, n: int) -> None:
        """Record the images per forward pass, so that a resumed run uses the same."""
        self._require_not_replaced()
        storage, key = self.entry.storage, self.entry.key
        write_attributes(storage, key, read_attributes(storage, key) | {"batch_size": n})
        self.entry = replace(self.entry, batch_size=n)

    def _require_not_replaced(self) -> None:
        """Raise UserError if another process has replaced the entry, which is possible where there are no locks."""
        entry = self.entry
        if entry.storage.has_locks:
            return
        try:
            stored = read_attributes(entry.storage, entry.key).get("fingerprint")
        except DamageError:
            stored = None
        if stored != entry.fingerprint:
            raise UserError(
                f"{entry.folder} was removed or replaced by another process while this one was writing to it: "
                "this one stops. Let one of them finish, or use another `store`."
            )
