"""Which zarr.json documents and which bytes does store format 1 put on the disk?

Values only, no files: docs/store-format.md says the same in words. What is made here is bit-identical to what
zarr-python writes for the same codecs (tested).
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

MIN_ROWS_PER_BLOCK, MAX_ROWS_PER_BLOCK = 64, 65536
ROWS_PER_CHUNK = 8192  # a larger block is a shard of chunks of this many rows
STRING_COLUMNS = ("id", "group", "split", "domain", "sha256")

_CRC_BYTES = 4
_NO_CHUNK = 2**64 - 1  # offset and size of a chunk that a shard does not hold
_CRC32C: dict[str, Any] = {"name": "crc32c"}
_HALVES: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}, _CRC32C]
_INT8: dict[str, Any] = {"data_type": "int8", "fill_value": 0, "codecs": [{"name": "bytes"}, _CRC32C]}
_STRINGS: dict[str, Any] = {"data_type": "string", "fill_value": "", "codecs": [{"name": "vlen-utf8"}, _CRC32C]}


def rows_per_block(n: int) -> int:
    """Choose how many of `n` rows form a block: a power of two that makes at most 128 blocks, from 64 to 65,536.

    The lower bound keeps files from being tiny, the upper one what a writer must hold in memory.
    """
    return min(max(1 << (-(-n // 128) - 1).bit_length(), MIN_ROWS_PER_BLOCK), MAX_ROWS_PER_BLOCK)


@dataclass(frozen=True)
class Grid:
    """How an (n_rows, width) array of embeddings is cut into blocks of rows, and a block into chunks."""

    n_rows: int
    width: int
    rows_per_block: int

    @property
    def rows_per_chunk(self) -> int:
        return min(self.rows_per_block, ROWS_PER_CHUNK)

    @property
    def chunks_per_shard(self) -> int:
        """Chunks of a block that is a shard; 0 if blocks are plain chunks."""
        return self.rows_per_block // ROWS_PER_CHUNK if self.rows_per_block > ROWS_PER_CHUNK else 0

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk without its checksum."""
        return self.rows_per_chunk * self.width * 2

    def metadata(self) -> dict[str, Any]:
        """Make the array's zarr.json."""
        codecs = _HALVES
        if self.chunks_per_shard:
            sharding = {"chunk_shape": [self.rows_per_chunk, self.width], "codecs": codecs, "index_codecs": codecs}
            codecs = [{"name": "sharding_indexed", "configuration": sharding | {"index_location": "end"}}]
        values = {"data_type": "float16", "fill_value": "NaN", "codecs": codecs}
        return _array((self.n_rows, self.width), (self.rows_per_block, self.width), ("sample", "feature")) | values


def column_metadata(n_samples: int, n_raters: int) -> dict[str, dict[str, Any]]:
    """Make the zarr.json of every column of a patch table, each one chunk; without raters there are no votes."""
    per_sample = _array((n_samples,), (n_samples,), ("sample",))
    columns = dict.fromkeys(STRING_COLUMNS, per_sample | _STRINGS) | {"label": per_sample | _INT8}
    if n_raters:
        columns["votes"] = _array((n_samples, n_raters), (n_samples, n_raters), ("sample", "rater")) | _INT8
    return columns


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """Make the zarr.json of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _array(shape: tuple[int, ...], chunk_shape: tuple[int, ...], dimensions: tuple[str, ...]) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        # Flat keys (c.0.0): one folder per array to list and to flush, not one per block.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "dimension_names": list(dimensions),
    }


def encode_block(values: NDArray[np.float16], grid: Grid) -> list[memoryview]:
    """Encode a block as the bytes of its file, in pieces: chunks and, of a shard, the index, each with its CRC-32C.

    Args:
        values: (rows of the block, width).
        grid: the array's.
    """
    pieces = []
    for start in range(0, len(values), grid.rows_per_chunk):
        chunk = np.ascontiguousarray(values[start : start + grid.rows_per_chunk], dtype="<f2")
        if len(chunk) < grid.rows_per_chunk:  # Zarr's chunks are whole: the rest is fill value
            fill = np.full((grid.rows_per_chunk - len(chunk), grid.width), np.nan, "<f2")
            chunk = np.concatenate([chunk, fill])
        pieces.append(_as_bytes(chunk))
    if grid.chunks_per_shard:
        pieces.append(_shard_index(len(pieces), grid))
    return [part.data for piece in pieces for part in (piece, _crc32c(piece))]


def decode_block(data: mmap.mmap | bytes, n_rows: int, grid: Grid, *, check: bool) -> NDArray[np.float16]:
    """Decode the bytes of a block of `n_rows` rows into its chunks, without a copy.

    Returns:
        (chunks, rows per chunk, width) float16; rows beyond the block's are fill value.

    Raises:
        ValueError: if the size is not the right one or, with `check`, if any bit of it has changed.
    """
    n_chunks = -(-n_rows // grid.rows_per_chunk)
    stride = grid.chunk_bytes + _CRC_BYTES
    tail = b""
    if grid.chunks_per_shard:
        index = _shard_index(n_chunks, grid)
        tail = index.tobytes() + _crc32c(index).tobytes()
    if len(data) != n_chunks * stride + len(tail):
        raise ValueError(f"has {len(data):,} bytes instead of {n_chunks * stride + len(tail):,}")
    chunks: NDArray[np.float16] = np.ndarray(
        (n_chunks, grid.rows_per_chunk, grid.width), "<f2", data, strides=(stride, grid.width * 2, 2)
    )
    if check:
        for k, chunk in enumerate(chunks):
            if _crc32c(_as_bytes(chunk)).tobytes() != data[(k + 1) * stride - _CRC_BYTES : (k + 1) * stride]:
                raise ValueError("is damaged (its checksum does not match)")
        if data[n_chunks * stride :] != tail:
            raise ValueError("is damaged (its shard index is not right)")
    return chunks


def not_finite(values: NDArray[np.float16]) -> NDArray[np.bool_]:
    """Mark NaN and infinity by their exponent bits, ten times as fast as numpy's isfinite on float16."""
    finite: NDArray[np.bool_] = (values.view(np.uint16) & 0x7C00) != 0x7C00
    return ~finite


def _shard_index(n_chunks: int, grid: Grid) -> NDArray[np.uint8]:
    """Make a shard's index, offset and size of every chunk; chunks beyond the array's end are marked absent."""
    index = np.full((grid.chunks_per_shard, 2), _NO_CHUNK, "<u8")
    index[:n_chunks, 0] = np.arange(n_chunks) * (grid.chunk_bytes + _CRC_BYTES)
    index[:n_chunks, 1] = grid.chunk_bytes + _CRC_BYTES
    return _as_bytes(index)


def _as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8)


def _crc32c(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array([google_crc32c.value(data)], "<u4").view(np.uint8)
