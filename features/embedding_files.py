"""How do embeddings lie in the files of other tools, and how are such files read and written?"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from features.console import UserError, progress, say
from features.samples import Samples
from features.tables import first_of, natural_order

Record = dict[str, Any]  # what a file of embeddings says about itself, as JSON values
Columns = dict[str, Any]  # name -> array, row by row

_FEATURES, _IDS, _COORDS, _LABELS = ("features", "embeddings"), "ids", "coords", "labels"
_READ = (*_FEATURES, _IDS, _COORDS, _LABELS)  # the arrays that are read; of others the name alone is known
_SAVE = "np.savez('x.npz', features=features, ids=np.array(ids, dtype=str))"
_DAMAGED = (
    OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, MemoryError, OverflowError, struct.error,
    zlib.error, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip
_HOW_TO_CONVERT = {
    ".pkl": "In Python, load it if you trust whoever made it: a pickle can run any program",
    ".parquet": "In Python: pandas.read_parquet(path) gives its columns",
    ".csv": "In Python: pandas.read_csv(path) gives its columns",
    ".mat": "In Python: scipy.io.loadmat(path) gives its arrays",
}

# ------------------------------------------------------------------------------------------------------------- reading


def read_embeddings(source: Path, ids: NDArray[np.str_] | None) -> tuple[NDArray[np.str_], NDArray[np.floating[Any]]]:
    """Read a file of embeddings.

    Args:
        source: `.npz`, `.h5` or `.pt` with `features` (or `embeddings`), `.npy`, `.pt` of a tensor, or `.h5ad`.
        ids: (n,) the rows' ids, if the file does not hold them.

    Returns:
        (n,) ids and (n, d) embeddings of some float type. Of an array such as (1, n, d) the axes of length 1 are left
        out.

    Raises:
        UserError: if the file cannot be read, or does not hold ids and embeddings of these shapes and types.
    """
    columns = _columns_of(source)
    name = next((name for name in _FEATURES if name in columns), None)
    if ids is not None and _IDS in columns:
        raise UserError(f"{source} holds its ids: leave out `ids`, which is for files without them.")
    names = columns.get(_IDS) if ids is None else ids
    if name is None or names is None:
        wanted = "'features' (or 'embeddings'), one row per patch" if name is None else "'ids', one string per row"
        without = "" if name is None else "; or give `ids` apart, a text file of one id per line"
        raise UserError(f"{source} holds {', '.join(columns) or 'nothing'}; expected {wanted}{without}. {_save()}")
    texts = _id_texts(np.asarray(names), source)
    return texts, _matrix(np.asarray(columns[name]), len(texts), f"{source}: {name}")


@dataclass(frozen=True, eq=False)
class SlideFeatures:
    """The embeddings of a folder with a file for each slide.

    Attributes:
        ids: (n,) `slide/x1024_y512` where files hold positions, else `slide/000012`; `slide` of its one embedding (d,).
        slides: (n,) the files' names without suffix.
        features: (n, d) of some float type.
        labels: (n,) class names or numbers, where every file holds them.
        sha256: of the files' names and bytes.
    """

    ids: NDArray[np.str_]
    slides: NDArray[np.str_]
    features: NDArray[np.floating[Any]]
    labels: NDArray[np.str_] | None
    sha256: str


def read_folder(folder: Path) -> SlideFeatures:
    """Read a folder of embeddings with a file for each slide, as TRIDENT, CLAM and slide2vec write them.

    Args:
        folder: of `.h5`, `.npz`, `.npy` or `.pt`: `features` (n, d) or (1, n, d), or (d,) for a slide as a whole; and
            perhaps `coords` (n, 2), `ids` and `labels` (n,). A `.pt` or `.npy` may be the features alone.

    Raises:
        UserError: no such files, two of one slide, of different widths, or one that cannot be read or holds no
            features of such a shape.
    """
    files = sorted((path for path in folder.iterdir() if _is_features(path)), key=lambda path: natural_order(path.name))
    if not files:
        inside = [
            path.name for path in sorted(folder.iterdir()) if path.is_dir() and any(map(_is_features, path.iterdir()))
        ]
        hint = f"Its folders {first_of(inside)} have some: name one." if inside else "Is it the right folder?"
        raise UserError(
            f"{folder} holds no file of features; expected one for each slide ({', '.join(_READERS)}). {hint}"
        )
    stems = [path.stem for path in files]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UserError(
            f"{folder} has two files of the slide {twice[0]}"
            f" ({', '.join(path.name for path in files if path.stem == twice[0])}). Keep one file of each slide."
        )
    digest = hashlib.sha256()
    ids, slides, labels = list[str](), list[str](), list[str]()
    parts: list[NDArray[np.floating[Any]]] = []
    with progress(f"read {folder.name}", len(files), unit="files") as advance:
        for path in files:
            columns = _columns_of(path)
            values = _features_of(path, columns)
            if parts and values.shape[1] != parts[0].shape[1]:
                raise UserError(
                    f"{path}: its features have {values.shape[1]:,} columns, those of {files[0].name} "
                    f"{parts[0].shape[1]:,}. Import the files of one model at a time."
                )
            whole = np.ndim(columns[_feature_name(path, columns)]) == 1
            ids += [path.stem] if whole else [f"{path.stem}/{name}" for name in _row_names(path, columns, len(values))]
            slides += [path.stem] * len(values)
            parts.append(values)
            if _LABELS in columns:
                labels += _row_labels(path, columns[_LABELS], len(values))
            with path.open("rb") as file:
                digest.update(json.dumps([path.name, hashlib.file_digest(file, "sha256").hexdigest()]).encode())
            advance(1)
    if empty := [path.name for path, values in zip(files, parts, strict=True) if not len(values)]:
        say(f"{folder}: {len(empty)} of {len(files)} files have no patch ({first_of(empty)}) and are left out.")
    if not ids:
        raise UserError(f"{folder}: none of its {len(files)} files has a patch. Compute the features again.")
    known = np.array(labels, dtype=np.str_) if len(labels) == len(ids) else None
    return SlideFeatures(np.array(ids), np.array(slides), np.concatenate(parts), known, digest.hexdigest())


def _is_features(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in _READERS and not path.name.startswith(".")


def _feature_name(path: Path, columns: Columns) -> str:
    name = next((name for name in _FEATURES if name in columns), None)
    if name is None:
        raise UserError(
            f"{path} holds {', '.join(columns) or 'nothing'}; expected 'features' (or 'embeddings'), a row for each "
            "patch of the slide. Files of positions or of slides are no features: leave them out of the folder."
        )
    return name


def _features_of(path: Path, columns: Columns) -> NDArray[np.floating[Any]]:
    name = _feature_name(path, columns)
    values = np.asarray(columns[name])
    if values.ndim == 1 or (values.ndim > 2 and values.shape[0] == 1):
        values = values[None] if values.ndim == 1 else values[0]
    return _matrix(values, len(values) if values.ndim else 0, f"{path}: {name}")


def _row_names(path: Path, columns: Columns, n: int) -> list[str]:
    """Name the rows of a slide: by its ids, else by their positions, else by their number."""
    numbers = [f"{row:06}" for row in range(n)]
    if columns.get(_IDS) is not None:
        names: list[str] = _id_texts(np.asarray(columns[_IDS]), path).tolist()
        if len(names) != n:
            raise UserError(f"{path}: {len(names):,} ids and {n:,} features. Compute the slide again.")
        return names
    if columns.get(_COORDS) is None:
        return numbers
    coords = np.asarray(columns[_COORDS])
    coords = coords[0] if coords.ndim == 3 and len(coords) == 1 else coords
    if coords.shape != (n, 2) or coords.dtype.kind not in "iuf" or (coords != np.floor(coords)).any():
        raise UserError(
            f"{path}: coords is {coords.dtype} {coords.shape}, and there are {n:,} features; expected whole numbers of "
            f"the shape ({n}, 2). Compute the slide again."
        )
    names = [f"x{x}_y{y}" for x, y in coords.astype(np.int64).tolist()]
    if len(set(names)) < n:
        say(f"{path}: {n - len(set(names))} of its positions are there twice: its patches are numbered.")
        return numbers
    return names


def _row_labels(path: Path, values: Any, n: int) -> list[str]:
    labels = np.asarray(values).reshape(-1)
    if len(labels) not in (1, n) or labels.dtype.kind not in "USiu":
        raise UserError(
            f"{path}: labels is {labels.dtype} {labels.shape}; expected a name or number for each of {n} rows."
        )
    texts = np.char.decode(labels, "utf-8") if labels.dtype.kind == "S" else labels.astype(np.str_)
    return [str(text) for text in np.broadcast_to(texts, (n,)).tolist()]


def _columns_of(source: Path) -> Columns:
    """Read the arrays of a file; of those that are not wanted, the name alone."""
    suffix = source.suffix.lower()
    if suffix not in _READERS:
        how = f" {_HOW_TO_CONVERT[suffix]}." if suffix in _HOW_TO_CONVERT else ""
        raise UserError(f"{source}: this kind of file is not read; give one of {', '.join(_READERS)}.{how} {_save()}")
    try:
        return _READERS[suffix](source)
    except _DAMAGED as error:
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{source} is damaged, or holds Python objects beside tensors, which are not read. {_save()}"
            ) from None
        if "allow_pickle" in str(error):
            raise UserError(
                f"{source} holds an array of Python objects, which is a pickle and is not read. {_save()}"
            ) from None
        raise UserError(f"{source} cannot be read as {suffix}: {error}.") from error


def _save() -> str:
    return f"Save embeddings by {_SAVE}."


def _id_texts(ids: NDArray[Any], source: Path) -> NDArray[np.str_]:
    """Make ids strings (n,), whether they are text, bytes or whole numbers."""
    if ids.ndim == 2 and ids.shape[1] == 1:
        ids = ids[:, 0]
    if ids.dtype.kind == "S":
        try:
            return np.char.decode(ids, "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{source}: its ids are bytes that are no UTF-8 text. {_save()}") from None
    if ids.ndim != 1 or ids.dtype.kind not in "Uiu":
        raise UserError(f"{source}: ids is {ids.dtype} {ids.shape}; expected one string per row. {_save()}")
    return ids.astype(np.str_)


def _matrix(values: NDArray[Any], n: int, name: str) -> NDArray[np.floating[Any]]:
    """Check that an array is one row of floats for each of `n` ids."""
    shape = values.shape
    lengths = [length for length in shape if length != 1]
    if len(shape) > 2 and len(lengths) <= 2 and (n == 1 or lengths[:1] == [n]):
        values = values.reshape(n, -1)
    if values.dtype.kind != "f":
        remedy = "Save them as float32."
        if values.dtype.kind == "V" and values.dtype.itemsize == 2:
            remedy = "They may be bfloat16, which NumPy's files do not know: convert them (.float() in torch) and save."
        elif values.dtype.kind in "iu":
            remedy = "Embeddings are fractions: if these are quantised, multiply by their scale and save as float32."
        raise UserError(f"{name} is {values.dtype} {shape}; expected float16, float32 or float64. {remedy}")
    if values.ndim != 2 or len(values) != n or values.shape[1] == 0:
        remedy = "Give one row per id."
        if values.ndim == 2 and shape[1] == n:
            remedy = "It seems to be transposed: save features.T."
        elif values.ndim == 3 and shape[0] == n:
            remedy = "It seems to hold several tokens per patch: save their mean, or the class token."
        raise UserError(f"{name} has the shape {shape}, and there are {n} ids; expected ({n}, d). {remedy}")
    return values


def _read_npy(path: Path) -> Columns:
    with path.open("rb") as file:
        values = np.load(file, allow_pickle=False)
    if not isinstance(values, np.ndarray):
        raise ValueError("it is an archive; name it .npz")
    return {"features": values}


def _read_npz(path: Path) -> Columns:
    file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
        raise ValueError("it is a single array; name it .npy")
    with file:
        return {name: file[name] if name in _READ else None for name in file.files}


def _read_pt(path: Path) -> Columns:
    import torch  # takes seconds, and no other file needs it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of other versions of pickle
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        content = {"features": content}

    def array(values: Any) -> NDArray[Any]:
        bf16 = isinstance(values, torch.Tensor) and values.dtype == torch.bfloat16  # which NumPy does not know
        return np.asarray(values.float() if bf16 else values)

    return {str(name): array(values) if name in _READ else None for name, values in content.items()}


def _read_hdf5(path: Path) -> Columns:
    with h5py.File(path, "r") as file:
        nodes = {name: file.get(name) for name in file}
        return {
            name: _h5_values(node) if name in _READ else None
            for name, node in nodes.items()
            if isinstance(node, h5py.Dataset)
        }


def _read_anndata(path: Path) -> Columns:
    """Read `X` and the names of observations, as AnnData writes them to HDF5."""
    with h5py.File(path, "r") as file:
        if not isinstance(file["X"], h5py.Dataset):
            raise ValueError("its X is sparse; make it dense (adata.X = adata.X.toarray()) and write it again")
        return {"features": file["X"][...], "ids": _h5_values(file["obs"][file["obs"].attrs["_index"]])}


def _h5_values(node: h5py.Dataset) -> NDArray[Any]:
    return np.asarray(node.asstr()[...], np.str_) if h5py.check_string_dtype(node.dtype) else np.asarray(node[...])


_READERS: dict[str, Callable[[Path], Columns]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
    ".pth": _read_pt,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
    ".h5ad": _read_anndata,
}

# ------------------------------------------------------------------------------------------------------------- writing

# `tile_x1024_y512.png`, and QuPath's `slide [x=1024,y=512,w=128,h=128].png`
_XY = re.compile(r"(?<![A-Za-z0-9])x=?(\d{1,9})(?![.\d])[ ,_]*y=?(\d{1,9})(?!\d)", re.IGNORECASE)


def coordinates(ids: NDArray[np.str_]) -> NDArray[np.int64] | None:
    """Read the position (x, y) of every patch from its id: (n, 2), or None unless every id holds exactly one.

    >>> coordinates(np.array(["s1_x1024_y512.png", "s1 [x=0,y=8,w=64,h=64].png"])).tolist()
    [[1024, 512], [0, 8]]
    """
    found = [_XY.findall(id) for id in ids.tolist()]
    if not all(len(pairs) == 1 for pairs in found):
        return None
    return np.array([pairs[0] for pairs in found], dtype=np.int64).reshape(-1, 2)


def _columns(samples: Samples) -> Columns:
    columns: Columns = {
        "ids": samples.id,
        "labels": samples.label,
        "groups": samples.group,
        "splits": samples.split,
        "domains": samples.domain,
        "votes": samples.votes,
    }
    coords = coordinates(samples.id)
    return columns if coords is None else columns | {"coords": coords}


def _write_hdf5(path: Path, embeddings: NDArray[Any], samples: Samples, record: Record) -> None:
    """Write the layout of TRIDENT and CLAM: `features` (n, d), `coords` (n, 2) if known, and row-aligned columns."""
    with h5py.File(path, "w") as file:
        file["features"] = embeddings
        for name, values in _columns(samples).items():
            strings = values.dtype.kind == "U"
            file.create_dataset(name, data=values.astype(object) if strings else values, dtype=_h5_type(values))
        file.attrs.update(record)


def _h5_type(values: NDArray[Any]) -> Any:
    return h5py.string_dtype() if values.dtype.kind == "U" else values.dtype


def _write_npz(path: Path, embeddings: NDArray[Any], samples: Samples, record: Record) -> None:
    with path.open("xb") as file:  # given a name, numpy would append its own suffix
        np.savez(file, features=embeddings, **_columns(samples), record=np.array(json.dumps(record)))


def _write_anndata(path: Path, embeddings: NDArray[Any], samples: Samples, record: Record) -> None:
    try:
        import anndata
    except ImportError as error:
        raise UserError("`format='anndata'` needs the package anndata: pip install anndata.") from error
    columns = {name.removesuffix("s"): values for name, values in _columns(samples).items()}
    matrices = {"votes": columns.pop("vote")}
    if "coord" in columns:
        matrices["spatial"] = columns.pop("coord")  # where scanpy and squidpy look for positions
    columns["obs_names"] = columns.pop("id")
    anndata.AnnData(X=embeddings, obs=columns, obsm=matrices, uns=record).write_h5ad(path)


FORMATS: dict[str, Callable[[Path, NDArray[Any], Samples, Record], None]] = {
    "hdf5": _write_hdf5,
    "anndata": _write_anndata,
    "npz": _write_npz,
}
