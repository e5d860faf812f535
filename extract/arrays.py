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
from features.tables import SYNONYMS, first_of, is_slip, same_name, widest

HDF5_SUFFIXES = frozenset({".h5", ".hdf5", ".hdf"})
SUFFIXES = HDF5_SUFFIXES | {".npz"}
_IMAGES = ("x", "images", "patches", "imgs", "tiles", "data")
_NAMES: Mapping[str, tuple[str, ...]] = {**SYNONYMS, "label": ("y", *SYNONYMS["label"])}
_COLUMNS = ("label", "group", "split", "domain", "id")
_SPLITS = (TRAIN, "training", "val", "valid", "validation", TEST, "testing")  # prefixes: MedMNIST's, and their variants
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
    parts = [split for split in _SPLITS if f"{split}_images" in arrays]
    if parts:
        return _joined(path, arrays, parts, labelled=labelled)
    named = _named(arrays, _IMAGES)
    name = _pick(path, "images", arrays, [key for key in named if len(arrays[key].shape) > 2] or named[:1])
    if name is None:
        found = first_of(sorted(arrays)) or "nothing at its top"
        raise UserError(
            f"{path} has no dataset of images (it has {found}). Expected x or images, (n, height, width, 3) uint8, and "
            "y or labels, one per patch, in the same file or in one named with y in place of x."
        )
    n, read = _image_reader(path, name, arrays[name])
    others = {key: array for key, array in arrays.items() if key != name}
    sibling = _label_file(path)
    if sibling is not None and not _named(others, ("label", *_NAMES["label"])):
        others |= {key: array for key, array in _open_hdf5(sibling).items() if key not in others}
    columns = _columns(path, others, n)
    if labelled and "label" not in columns:
        raise UserError(
            f"{path} has images in {name!r} and no labels (it has {first_of(sorted(arrays))}). Expected y or labels, "
            "one per patch, in the same file or in one named with y in place of x."
        )
    return ImageArrays(n, read, columns)


def _joined(path: Path, arrays: Mapping[str, Array], parts: Sequence[str], *, labelled: bool) -> ImageArrays:
    """Join the splits of a file laid out like MedMNIST's, one after the other."""
    unknown = [key for key in arrays if not key.startswith(tuple(f"{split}_" for split in parts))]
    if unknown:
        raise UserError(
            f"{path} has {first_of(sorted(unknown))} beside the arrays of the splits {', '.join(parts)}, and what they "
            "mean is not known. Remove or rename them: <split>_images, <split>_labels, <split>_group, ..."
        )
    readers = [_image_reader(path, f"{split}_images", arrays[f"{split}_images"]) for split in parts]
    ends = np.cumsum([n for n, _ in readers])
    columns: dict[str, list[str]] = {}
    for split, (n, _) in zip(parts, readers, strict=True):
        prefix = f"{split}_"
        own = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
        del own["images"]
        known = {"split": [split] * n, "id": [f"{split}/{row}" for row in range(n)]} | _columns(path, own, n)
        if columns and set(known) != set(columns):
            odd = sorted(set(known) ^ set(columns))[0]
            raise UserError(f"{path}: {odd} is known of some splits only. Expected the same arrays of every split.")
        for name, cells in known.items():
            columns[name] = columns.get(name, []) + cells
    if labelled and "label" not in columns:
        raise UserError(f"{path} has no array {parts[0]}_labels. Expected the labels of every split.")

    def read(rows: int | slice) -> NDArray[np.uint8]:
        if isinstance(rows, slice):
            blocks = [read(row) for row in range(*rows.indices(int(ends[-1])))]
            return np.stack(blocks) if blocks else np.empty((0, 0, 0, 3), np.uint8)
        part = int(np.searchsorted(ends, rows, side="right"))
        return readers[part][1](rows - int(ends[part] - readers[part][0]))

    return ImageArrays(int(ends[-1]), read, columns)


def _columns(path: Path, arrays: Mapping[str, Array], n: int) -> dict[str, list[str]]:
    """Read what arrays say of n patches, column by column; those that are not used are named."""
    columns: dict[str, list[str]] = {}
    used: list[str] = []
    for column in _COLUMNS:
        named = [key for key in _named(arrays, (column, *_NAMES[column])) if key not in used]
        found = _pick(path, column, arrays, [key for key in named if arrays[key].size == n] or named)
        if found is not None:
            columns[column] = _texts(path, found, arrays[found], n)
            used.append(found)
            if found not in (column, "y", "labels"):
                say(f"{path}: using {found} as {column}.")
    unused = sorted(set(arrays) - set(used))
    names = [name for column in _COLUMNS if column not in columns for name in (column, *_NAMES[column])]
    near = [key for key in unused if any(is_slip(key, name) for name in names)]
    if near:
        raise UserError(f"{path} has an array {near[0]!r}, nearly the name of a known one. Rename or remove it.")
    if unused:
        say(f"{path}: arrays not used: {', '.join(unused)}.")
    return columns


def _named(arrays: Mapping[str, Array], names: Sequence[str]) -> list[str]:
    wanted = set(map(same_name, names))
    return [key for key in arrays if same_name(key) in wanted]


def _pick(path: Path, what: str, arrays: Mapping[str, Array], found: Sequence[str]) -> str | None:
    """Choose the one array for a purpose: of several groups the widest; several others are refused."""
    if len(found) > 1 and what != "group":
        raise UserError(f"{path} has {' and '.join(sorted(found))}, and each could be the {what}. Rename the others.")
    if len(found) > 1 and what not in found:
        chosen: str = widest([(key, _texts(path, key, arrays[key], arrays[key].size)) for key in found])
        return chosen
    return what if what in found else next(iter(found), None)


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
