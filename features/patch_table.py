"""How does a dataset's patch table lie in the store? One array per column, which zarr itself encodes and decodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.storage import MemoryStore

from features.layout import STRING_COLUMNS, column_metadata
from features.metadata import check_array, damage, encode_group, encode_json, read_attributes
from features.samples import Samples
from features.storage import METADATA, Storage

_REMEDY = "run fm-extract for this dataset again"


def encode_samples(samples: Samples) -> dict[str, list[bytes]]:
    """Encode a patch table as the files of its folder: name -> content."""
    files = {METADATA: [encode_group({})]}
    for name, metadata in column_metadata(len(samples), samples.votes.shape[1]).items():
        column: dict[str, Buffer] = {METADATA: cpu.Buffer.from_bytes(encode_json(metadata))}
        # Even a column of nothing but fill values gets its chunk: an absent one is then always damage.
        with zarr.config.set({"array.write_empty_chunks": True}):
            zarr.open_array(MemoryStore(column), mode="r+")[...] = getattr(samples, name)
        files |= {f"{name}/{file}": [content.to_bytes()] for file, content in column.items()}
    return files


def read_samples(storage: Storage, key: str, *, n_samples: int, n_raters: int, digest: object) -> Samples:
    """Read a patch table from its folder and check it against its recorded digest.

    Raises:
        DamageError: if a file is missing, cut short or changed, or the table is another one.
    """
    read_attributes(storage, key)
    columns = column_metadata(n_samples, n_raters)
    values = storage.map(lambda name: _read_column(storage, key, name, columns[name]), columns)
    no_votes: dict[str, Any] = {"votes": np.empty((n_samples, 0), np.int8)}
    samples = Samples(**no_votes | dict(zip(columns, values, strict=True)))
    if samples.table_digest != digest:
        raise damage(storage.path(key), "the patch table does not match its digest", _REMEDY)
    return samples


def _read_column(storage: Storage, key: str, name: str, metadata: dict[str, Any]) -> NDArray[Any]:
    column = f"{key}/{name}"
    document = check_array(storage, column, metadata, remedy=_REMEDY)
    chunk = "c" + ".0" * len(metadata["shape"])
    try:
        files: dict[str, Buffer] = {
            METADATA: cpu.Buffer.from_bytes(encode_json(document)),
            chunk: cpu.Buffer.from_bytes(storage.read(f"{column}/{chunk}")),
        }
        values = np.asarray(zarr.open_array(MemoryStore(files), mode="r")[...])
    except (ValueError, OSError) as error:
        raise damage(storage.path(column), str(error), _REMEDY) from error
    return values.astype(object).astype(np.str_) if name in STRING_COLUMNS else values
