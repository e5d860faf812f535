"""How are blocks of embeddings read, checked once, and kept in memory?

The blocks are plain files (raw float16 and a checksum), read here directly: a file of a folder is mapped into memory,
an object of a bucket fetched whole. Either is verified when it is first touched and kept as long as there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from features.entry import Entry, block_name
from features.layout import ROWS_PER_CHUNK, decode_block, not_finite
from features.storage import DamageError, Fetched, Storage

_MOST_KEPT = 256  # blocks; a process may usually have 1,024 files open
# Limits the fetched blocks in memory, and the size of an array whose blocks stay mapped: mapped pages count as memory.
_MOST_BYTES = 2**30

Chunks = NDArray[np.float16]  # of one block: (chunks, rows per chunk, width)


def to_float16(
    embeddings: NDArray[np.floating[Any]], name: str, *, ids: NDArray[np.str_], first_row: int = 0
) -> NDArray[np.float16]:
    """Round embeddings (n, d) to float16, as they are stored, and check that each of them is finite.

    Args:
        embeddings: of any float type.
        name: what the message calls them.
        ids: (n,) the patches' ids, for the message.
        first_row: the number of the first one in its patch table, for the message.

    Raises:
        UserError: if one is NaN, infinite, or beyond the range of float16.
    """
    with np.errstate(over="ignore"):  # reported below
        halves = np.ascontiguousarray(embeddings, dtype="<f2")
    bad = np.flatnonzero(not_finite(halves).any(axis=1))
    if len(bad):
        fault = "beyond the range of float16 (±65504)" if np.isfinite(embeddings[bad]).all() else "NaN or infinite"
        raise UserError(
            f"{name}: {len(bad)} embeddings are {fault} (first: row {first_row + bad[0]}, {ids[bad[0]]}). Look at "
            "these patches, or compute with `precision='fp32'`; what was written before is kept."
        )
    return halves


class BlockReader:
    """Reads blocks of one store and remembers which versions of them were sound."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._verified: set[Hashable] = set()  # versions of blocks whose checksums were right
        self._kept: dict[Hashable, Chunks] = {}  # a mapped block holds a file descriptor
        self._bytes = 0  # of fetched blocks, which are held in memory

    def forget(self) -> None:
        """Verify every block anew when it is next read."""
        self._verified.clear()
        self._let_go()

    def read(self, entry: Entry, pooling: str) -> NDArray[np.float16]:
        """Read all rows of a pooling: (n, width)."""
        grid = entry.grid(pooling)
        embeddings = np.empty((grid.n_rows, grid.width), np.float16)
        for block, chunks in self.blocks(entry, pooling, range(entry.n_blocks)):
            for k, chunk in enumerate(chunks):
                start = block * grid.rows_per_block + k * grid.rows_per_chunk
                part = embeddings[start : start + grid.rows_per_chunk]
                part[:] = chunk[: len(part)]
        return embeddings

    def read_rows(self, entry: Entry, pooling: str, rows: NDArray[np.intp]) -> NDArray[np.float16]:
        """Read some rows of a pooling, in any order: (m, width)."""
        grid = entry.grid(pooling)
        embeddings = np.empty((len(rows), grid.width), np.float16)
        # A row is copied as one element of many bytes: twice as fast as number by number.
        row_type = f"V{2 * grid.width}"
        targets = embeddings.view(row_type)[:, 0]
        blocks, row_in_block = np.divmod(rows, grid.rows_per_block)
        order = np.argsort(blocks, kind="stable")
        chunk, row = np.divmod(row_in_block[order], grid.rows_per_chunk)
        bounds = np.searchsorted(blocks[order], np.arange(entry.n_blocks + 1)).tolist()
        touched = [block for block, (start, stop) in enumerate(pairwise(bounds)) if start < stop]
        for block, chunks in self.blocks(entry, pooling, touched):
            start, stop = bounds[block], bounds[block + 1]
            rows_of_bytes = chunks.view(row_type)[..., 0]
            targets[order[start:stop]] = rows_of_bytes[chunk[start:stop], row[start:stop]]
        return embeddings

    def blocks(self, entry: Entry, pooling: str, blocks: Sequence[int]) -> Iterator[tuple[int, Chunks]]:
        """Read some blocks of a pooling and yield the number and the chunks of each.

        Raises:
            DamageError: if a block cannot be read or its checksum is wrong.
        """
        for block, read in self._calls(entry, pooling, blocks):
            yield block, read()

    def verify(self, entry: Entry, pooling: str, blocks: Sequence[int]) -> Iterator[tuple[int, DamageError | None]]:
        """Read some blocks of a pooling and yield the number and the damage of each, if there is any."""
        for block, read in self._calls(entry, pooling, blocks):
            try:
                embeddings = read().reshape(-1, entry.poolings[pooling])[: len(entry.rows(block))]
                if not_finite(embeddings).any():
                    raise _bad_block(entry, pooling, block, "holds NaN or infinity")
            except DamageError as error:
                yield block, error
            else:
                yield block, None

    def _calls(self, entry: Entry, pooling: str, blocks: Sequence[int]) -> Iterator[tuple[int, Callable[[], Chunks]]]:
        """Yield the number of each block and a call that reads it, while the storage fetches ahead."""
        if self._is_full():
            self._let_go()  # only here: the storage does not fetch what is kept when fetching begins
        names = [block_name(block) for block in blocks]
        fetched = self._storage.fetch(f"{entry.key}/{pooling}", names, self._kept.__contains__)
        for block, get in zip(blocks, fetched, strict=True):
            yield block, partial(self._chunks, entry, pooling, block, get)

    def _chunks(self, entry: Entry, pooling: str, block: int, get: Callable[[], Fetched]) -> Chunks:
        try:
            version, data = get()
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

    def _let_go(self) -> None:
        self._kept.clear()
        self._bytes = 0


def _bad_block(entry: Entry, pooling: str, block: int, what: str) -> DamageError:
    rows = entry.rows(block)
    # Without the file of its last pooling a block counts as missing, and only this block is computed again.
    last = entry.block_path(entry.last_pooling, block)
    remedy = (
        "import it again with `overwrite=True`"
        if entry.imported
        else f"delete {last} and run the same fm-extract again"
    )
    return DamageError(
        f"{entry.name}/{pooling}: block {block} (rows {rows.start}–{rows.stop - 1}) {what}: "
        f"{entry.block_path(pooling, block)}. To mend it, {remedy}."
    )


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Rows of one entry that stay in the store until they are asked for: (n, d) float16, finite.

    Attributes:
        reader, entry, poolings: where they are; poolings are joined side by side.
        rows: (n,) which rows of the entry; None for all of them.
    """

    reader: BlockReader
    entry: Entry
    poolings: tuple[str, ...]
    rows: NDArray[np.intp] | None

    def __len__(self) -> int:
        return self.entry.n_rows if self.rows is None else len(self.rows)

    def __repr__(self) -> str:
        n, d = self.shape
        return f"Embeddings({self.entry.name}, {'+'.join(self.poolings)}: {n:,} × {d:,} float16, not read yet)"

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), sum(self.entry.poolings[name] for name in self.poolings)

    def select(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Embeddings:
        """Select some of these rows, by index in the order given or by mask."""
        current = np.arange(len(self)) if self.rows is None else self.rows
        return replace(self, rows=current[rows])

    def read(self) -> NDArray[np.float16]:
        """Read all of them into memory.

        Raises:
            DamageError: if a checksum is wrong.
        """
        return _side_by_side(
            [
                self.reader.read(self.entry, name)
                if self.rows is None
                else self.reader.read_rows(self.entry, name, self.rows)
                for name in self.poolings
            ]
        )

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float16]]]:
        """Read all of them in order, a few thousand at a time.

        Whole chunks come as they are mapped, without a copy, and leave memory once nobody holds them.

        Yields:
            which of the n rows they are, and their embeddings.

        Raises:
            DamageError: if a checksum is wrong.
            ValueError: if the rows are not in ascending order.
        """
        n, size = len(self), min(self.entry.rows_per_block, ROWS_PER_CHUNK)
        if self.rows is None:
            bounds = [*range(0, n, size), n]
        else:
            if (np.diff(self.rows) <= 0).any():
                raise ValueError(f"{self.entry.name}: blocks can be read of rows in ascending order only")
            bounds = np.searchsorted(self.rows, np.arange(0, self.entry.n_rows + size, size)).tolist()
        held: dict[str, tuple[int, Chunks]] = {}  # pooling -> the block that the last chunk was part of
        for start, stop in pairwise(bounds):
            if start < stop:
                parts = [self._chunk_rows(name, start, stop, held) for name in self.poolings]
                yield slice(start, stop), _side_by_side(parts)

    def _chunk_rows(
        self, pooling: str, start: int, stop: int, held: dict[str, tuple[int, Chunks]]
    ) -> NDArray[np.float16]:
        """Read rows `start` to `stop` of these embeddings, which lie in one chunk."""
        rows = np.arange(start, stop) if self.rows is None else self.rows[start:stop]
        block, row_in_block = np.divmod(rows, self.entry.rows_per_block)
        chunk, row = np.divmod(row_in_block, ROWS_PER_CHUNK)
        if pooling not in held or held[pooling][0] != block[0]:
            (held[pooling],) = self.reader.blocks(self.entry, pooling, [int(block[0])])
        whole: NDArray[np.float16] = held[pooling][1][int(chunk[0])]
        return whole[row[0] : row[-1] + 1] if row[-1] - row[0] + 1 == len(row) else whole[row]


def _side_by_side(parts: list[NDArray[np.float16]]) -> NDArray[np.float16]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
