"""Which patches do the arrays of an HDF5 or NumPy file hold, and what do its other arrays say of them?

Known layouts: PatchCamelyon's `x` and `y`, in one file or two; MedMNIST's `train_images`, `train_labels`, ...; and any
file with images and labels under their usual names. Arrays are read block by block, in bounded memory.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from features.console import UserError, say
from features.samples import TEST, TRAIN
from features.tables import SYNONYMS, first_of, same_name

HDF5_SUFFIXES = frozenset({".h5", ".hdf5", ".hdf"})
SUFFIXES = HDF5_SUFFIXES | {".npz"}
_IMAGES = ("x", "images", "patches", "imgs", "tiles", "data")
_NAMES: Mapping[str, tuple[str, ...]] = {**SYNONYMS, "label": ("y", *SYNONYMS["label"]), "images": _IMAGES}
_OWN_NAMES = {"images": ("x", "images"), "label": ("label", "labels", "y")}
_COLUMNS = ("label", "group", "split", "domain", "id")
_SPLITS = (TRAIN, "val", TEST)  # MedMNIST's prefixes
_CHUNK_CACHE = 1 << 30  # at most so many bytes of decompressed chunks are kept

Array = Any  # h5py.Dataset or a memory-mapped array: shape, dtype, rows by index


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """Images in arrays, and what other arrays say of them.

    Attributes:
        n: number of images.
        read: rows to pixels: an int gives (height, width, 3), a slice (rows, height, width, 3) uint8; thread-safe.
        columns: `label`, `group`, `split`, `domain`, `id` where they are there, as text.
    """

    n: int
    read: Callable[[int | slice], NDArray[np.uint8]]
    columns: Mapping[str, list[str]]


def read_arrays(path: Path, *, labelled: bool) -> ImageArrays:
    """Open the images of a file, and read its other columns.

    Raises:
        UserError: not readable, no images or labels in it, or images that are not uint8 RGB or grey.
    """
    arrays = _open_npz(path) if path.suffix.lower() == ".npz" else _open_hdf5(path)
    parts = {split: f"{split}_images" for split in _SPLITS if f"{split}_images" in arrays}
    if parts:
        return _joined(path, arrays, parts, labelled=labelled)
    name = _pick(path, "images", arrays, [key for key in arrays if same_name(key) in map(same_name, _IMAGES)])
    if name is None:
        raise UserError(
            f"{path} has no dataset of images (it has {first_of(sorted(arrays)) or 'nothing'}). Expected x or images, "
            "(n, height, width, 3) uint8, and y or labels, one per patch, in the same file or in one named with y in "
            "place of x."
        )
    n, read = _image_reader(path, name, arrays[name])
    sibling = _label_file(path)
    others = {key: array for key, array in arrays.items() if key != name}
    if sibling is not None and not any(same_name(key) in map(same_name, ("label", *_NAMES["label"])) for key in others):
        others |= {key: array for key, array in _open_hdf5(sibling).items() if key not in others}
    columns = {}
    for column in _COLUMNS:
        wanted = [same_name(key) for key in (column, *_NAMES[column])]
        found = _pick(path, column, others, [key for key in others if same_name(key) in wanted])
        if found is not None:
            columns[column] = _texts(path, found, others[found], n)
            if found not in (column, "y"):
                say(f"{path}: using {found} as {column}.")
    if labelled and "label" not in columns:
        raise UserError(
            f"{path} has images in {name!r} and no labels (it has {first_of(sorted(arrays))}). Expected y or labels, "
            "one per patch, in the same file or in one named with y in place of x."
        )
    return ImageArrays(n, read, columns)


def _joined(path: Path, arrays: Mapping[str, Array], parts: Mapping[str, str], *, labelled: bool) -> ImageArrays:
    """Join the splits of a file laid out like MedMNIST's, one after the other."""
    readers = [_image_reader(path, key, arrays[key]) for key in parts.values()]
    ends = np.cumsum([n for n, _ in readers])
    splits = [split for split, (n, _) in zip(parts, readers, strict=True) for _ in range(n)]
    ids = [f"{split}/{row}" for split, (n, _) in zip(parts, readers, strict=True) for row in range(n)]
    columns = {"split": splits, "id": ids}
    labels = [f"{split}_labels" for split in parts]
    if all(key in arrays for key in labels):
        columns["label"] = [
            text for key, (n, _) in zip(labels, readers, strict=True) for text in _texts(path, key, arrays[key], n)
        ]
    elif labelled:
        missing = next(key for key in labels if key not in arrays)
        raise UserError(f"{path} has no array {missing!r}. Expected the labels of every split, as MedMNIST ships them.")

    def read(rows: int | slice) -> NDArray[np.uint8]:
        if isinstance(rows, slice):
            blocks = [read(row) for row in range(*rows.indices(len(ids)))]
            return np.stack(blocks) if blocks else np.empty((0, 0, 0, 3), np.uint8)
        part = int(np.searchsorted(ends, rows, side="right"))
        return readers[part][1](rows - int(ends[part] - readers[part][0]))

    return ImageArrays(len(ids), read, columns)


def _pick(path: Path, what: str, arrays: Mapping[str, Array], found: Sequence[str]) -> str | None:
    """Choose the one array for a purpose: of several, the one that is called just so; of groups, the widest."""
    exact = [key for key in _OWN_NAMES.get(what, (what,)) if key in found]
    if len(found) > 1 and not exact and what != "group":
        raise UserError(f"{path} has {' and '.join(sorted(found))}, and each could be the {what}. Rename the others.")
    order = [same_name(name) for name in (what, *_NAMES.get(what, ()))]
    return exact[0] if exact else min(found, key=lambda key: order.index(same_name(key)), default=None)


# --------------------------------------------------------------------------------------------------------------- images


def _image_reader(path: Path, name: str, x: Array) -> tuple[int, Callable[[int | slice], NDArray[np.uint8]]]:
    """Make a function that reads rows of an array of images as RGB."""
    shape = tuple(x.shape)
    grey = len(shape) == 3 or (len(shape) == 4 and shape[-1] == 1)
    channels_first = len(shape) == 4 and shape[1] in (1, 3) and shape[-1] not in (1, 3)
    if x.dtype != np.uint8 or not (grey or channels_first or (len(shape) == 4 and shape[-1] == 3)):
        hint = " Scale them to 0 to 255 and store them as uint8." if x.dtype.kind == "f" else ""
        raise UserError(
            f"{path}: {name} is {x.dtype} of shape {shape}, expected uint8 of shape (n, height, width, 3), or grey as "
            f"(n, height, width).{hint}"
        )
    lock = Lock()  # HDF5 files are not safe to read from several threads

    def read(rows: int | slice) -> NDArray[np.uint8]:
        try:
            with lock:
                pixels = np.array(x[rows])
        except (OSError, ValueError) as error:
            raise UserError(f"{path}, row {rows} cannot be read ({error}). Restore the file, then run again.") from None
        if channels_first:
            pixels = np.moveaxis(pixels, -3, -1)
        elif len(shape) == 3:
            pixels = pixels[..., None]
        if pixels.shape[-1] == 1:
            pixels = np.repeat(pixels, 3, axis=-1)
        return np.ascontiguousarray(pixels)

    return shape[0], read


def _texts(path: Path, name: str, array: Array, n: int) -> list[str]:
    """Read one column as text: (n,) or (n, 1) or (n, 1, 1, 1) of strings, integers or floats that are integers."""
    if array.size != n:
        raise UserError(f"{path}: {name} holds {array.size} values for {n} patches; expected one per patch.")
    values = np.asarray(array[()]).reshape(n).tolist()
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values]


# ---------------------------------------------------------------------------------------------------------------- files


def _open_hdf5(path: Path) -> dict[str, Array]:
    """Open every dataset at the top of an HDF5 file, with a cache that holds the chunks of a row.

    Rows are read in order, so that each chunk is then decompressed once. HDF5's own cache of 1 MB holds no large chunk.
    """
    try:
        with h5py.File(path, "r") as file:
            needed = max((_chunk_bytes(node) for node in file.values() if isinstance(node, h5py.Dataset)), default=0)
        file = h5py.File(path, "r", rdcc_nbytes=min(max(2 * needed, 1 << 20), _CHUNK_CACHE), rdcc_w0=1.0)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not a readable HDF5 file ({error}). Expected datasets x and y.") from None
    return {name: node for name, node in file.items() if isinstance(node, h5py.Dataset)}


def _chunk_bytes(dataset: h5py.Dataset) -> int:
    """Give the size of all chunks that one row lies in, decompressed."""
    if dataset.chunks is None or dataset.ndim < 2:
        return 0
    sizes = [-(-size // chunk) * chunk for size, chunk in zip(dataset.shape[1:], dataset.chunks[1:], strict=True)]
    return int(dataset.chunks[0] * np.prod(sizes) * dataset.dtype.itemsize)


def _label_file(path: Path) -> Path | None:
    """Find the file of labels beside one of images: PatchCamelyon ships ..._x.h5 and ..._y.h5."""
    sibling = path.with_name(re.sub(r"(?<![A-Za-z0-9])x(?![A-Za-z0-9])", "y", path.name))
    return sibling if sibling != path and sibling.is_file() else None


def _open_npz(path: Path) -> dict[str, Array]:
    """Unpack the arrays of an .npz file to temporary files and map those, so that memory stays bounded."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {Path(name).stem: _mapped(archive, name) for name in archive.namelist() if name.endswith(".npy")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as .npz: {error}. Expected arrays of numbers or text saved by numpy.savez, without "
            "Python objects."
        ) from None


def _mapped(archive: zipfile.ZipFile, name: str) -> Array:
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        with archive.open(name) as source:
            while block := source.read(1 << 22):
                file.write(block)
        file.flush()
        with suppress(ValueError):  # arrays without a row cannot be mapped
            return np.load(file.name, mmap_mode="r", allow_pickle=False)
        return np.load(file.name, allow_pickle=False)
