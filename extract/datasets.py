"""Which patches are there, what is known of each, and how is one read?

A dataset is a known name (a row of `DATASETS`), a folder with one sub-folder per class, a CSV, or an HDF5 file. All of
them become a `PatchDataset`: the patch table, and a function that reads one patch.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from extract import demo, download, images
from features.console import UserError, nearest, progress, say
from features.samples import TEST, TRAIN, Samples, audit, make_samples

Decode = Callable[[int], NDArray[np.uint8]]

NORMAL, ATYPICAL = "Normal", "Atypical"
DATA_VARIABLE = "MITOFM_DATA"
AMI_BR_CSV_URL = "https://raw.githubusercontent.com/DeepMicroscopy/AMi-Br/20a217b3/AMI-BR.csv"
AMI_BR_CSV_SHA256 = "49eb286b4b45f524f34ee2655c4d2e8f1e0c94618424a59b30ff7412fea77690"

# The tables of the archive, verified with its patches.
TABLE_SHA256 = {
    "amibr_train_split.csv": "55b9e82113bea36da10461f6c4be3c8c7e920be86176d7def527507c1d9ec3e1",
    "AtNorM-MD_expert_votes.csv": "363db789f5d1814be676d701d89646631703dc963b7f28b8f2c4db76eb543193",
}

_SLIDES_CSV = Path(__file__).parent / "data" / "atnorm_md_slides.csv"
_SHOWN = 5  # how many of many bad files or rows an error names
_HDF5_ROWS = 256  # rows hashed per read
_HDF5_SUFFIXES = frozenset({".h5", ".hdf5"})
_SYSTEM_FILES = frozenset({"Thumbs.db", "desktop.ini"})


@dataclass(frozen=True, eq=False)
class Patches:
    """Patches of which nothing is known but where they are.

    Attributes:
        source: the path they were asked for by.
        id: names below that path, in a fixed order.
        decode: as of `PatchDataset`.
    """

    source: str
    id: tuple[str, ...]
    decode: Decode


@dataclass(frozen=True, eq=False)
class PatchDataset:
    """The patches of one dataset.

    Attributes:
        name: a short safe name, which the feature store knows the dataset by.
        samples: the patch table, in a fixed row order.
        label_names: the names of class 0 and class 1.
        source: where the patches come from.
        mpp: micrometres per pixel, or None where unknown.
        decode: `decode(row)` gives that patch as (height, width, 3) uint8 RGB; thread-safe; raises UserError naming
            the patch when it cannot be decoded. Patches may differ in size.
    """

    name: str
    samples: Samples
    label_names: tuple[str, str]
    source: str
    mpp: float | None
    decode: Decode


class Figure(NamedTuple):
    """What the tables of a known dataset say of one mitotic figure."""

    label: int
    group: str
    split: str
    votes: tuple[int, ...]
    domain: str


@dataclass(frozen=True)
class DatasetRecord:
    """A known dataset and what it must contain.

    Attributes:
        title: its name in print.
        folder: its folder below the data folder; empty for the drawn one.
        n_atypical, n_normal: how many patches of each class (Table 1 of the paper).
        n_bytes: the size of all files together; for the drawn one, of the pixels.
        digest: SHA-256 over the sorted lines `<sha256>  <id>`, or None where it is not known yet.
        annotation: who labelled the patches.
        species, source: as in Table 1 of the paper.
        figures: reads the dataset's tables from a data folder, by file name; None where there are no tables.
        mpp: micrometres per pixel.
    """

    title: str
    folder: str
    n_atypical: int
    n_normal: int
    n_bytes: int
    digest: str | None
    annotation: str
    species: str
    source: str
    figures: Callable[[Path], dict[str, Figure]] | None = None
    mpp: float = 0.25


def load_dataset(name_or_path: str, *, data: Path | None = None, positive: str | None = None) -> PatchDataset:
    """Find the patches, check and hash every file, and join what is known of each.

    Args:
        name_or_path: a name of `DATASETS`; or a folder with one sub-folder per class, a CSV, or an HDF5 file.
        data: the folder of the known datasets, laid out like a clone of AMi-Br_Benchmark; by default the one in the
            environment variable MITOFM_DATA, else a download kept in the cache.
        positive: the class that is label 1, for paths; see `binary_labels`.

    Raises:
        UserError: when the name is unknown, files are missing, too many or unreadable, or tables contradict them.
    """
    if record := DATASETS.get(name_or_path):
        if positive not in (None, ATYPICAL):
            raise UserError(
                f"{name_or_path} has the positive class {ATYPICAL}, not {positive!r}: leave --positive out."
            )
        if not record.folder:
            return _demo()
        return _known(name_or_path, data or _default_data() or download.fetch_benchmark(_verify_download))
    path = Path(name_or_path)
    if path.is_dir():
        return _from_folder(path, positive)
    if path.is_file() and path.suffix.lower() == ".csv":
        return _from_csv(path, positive)
    if path.is_file() and path.suffix.lower() in _HDF5_SUFFIXES:
        return _from_hdf5(path, positive)
    if path.is_file():
        raise UserError(f"{path} is neither a CSV (.csv) nor an HDF5 file (.h5, .hdf5), and not a folder of patches.")
    raise UserError(
        f"There is no dataset and no file or folder named {name_or_path!r}.{nearest(name_or_path, DATASETS)} "
        f"Known datasets: {', '.join(DATASETS)}. Otherwise give a folder with one sub-folder per class, a CSV with the "
        "columns path and label, or an HDF5 file with x and y."
    )


def is_at_hand(name: str, data: Path | None = None) -> bool:
    """Whether the patches of a known dataset are in the data folder; without one they can be downloaded."""
    folder = data or _default_data()
    return folder is None or (folder / DATASETS[name].folder).is_dir()


def local_data(data: Path | None = None) -> Path | None:
    """The folder of the known datasets that is here already: the one given, MITOFM_DATA's, or an earlier download."""
    return data or _default_data() or download.downloaded()


@dataclass(frozen=True)
class DataVerdict:
    """What was found of one dataset or table of a data folder.

    Attributes:
        what: the dataset's name, or the table's file name.
        found: how many patches, or "as published"; otherwise how it differs.
        published: whether it is the published one, as far as was looked.
        usable: whether it is accepted as it is.
    """

    what: str
    found: str
    published: bool
    usable: bool


def check_data(data: Path, *, whole: bool = False) -> list[DataVerdict]:
    """Compare what a data folder holds with the published files.

    Args:
        data: laid out like a clone of AMi-Br_Benchmark; datasets that are absent are left out.
        whole: read and hash every patch. Otherwise tables are hashed, and patches counted and their sizes added up.
    """
    verdicts = []
    for name, expected in (TABLE_SHA256 | {"AMI-BR.csv": AMI_BR_CSV_SHA256}).items():
        if (data / name).is_file():
            same = hashlib.sha256((data / name).read_bytes()).hexdigest() == expected
            verdicts.append(DataVerdict(name, "as published" if same else "another SHA-256 than published", same, True))
    for name, record in DATASETS.items():
        if not record.folder or not (data / record.folder).is_dir():
            continue
        try:
            files = _known_files(name, data)
            paths = [file.path for file in files]
            if whole:
                difference = _difference(record, files, *_hash_files(paths, record.title))
            else:
                n_bytes = sum(path.stat().st_size for path in paths)
                same = n_bytes == record.n_bytes
                difference = None if same else f"{n_bytes:,} bytes, expected {record.n_bytes:,}"
        except UserError as error:
            verdicts.append(DataVerdict(name, str(error), False, False))
            continue
        looked = "every byte" if whole and record.digest else "number and size"
        found = f"{len(files):,} patches, {difference or f'as published ({looked})'}"
        verdicts.append(DataVerdict(name, found, difference is None, True))
    return verdicts


def files_digest(ids: Iterable[str], sha256: Iterable[str]) -> str:
    """SHA-256 over the sorted lines `<sha256>  <id>`, which is what `sha256sum` prints of the files."""
    lines = sorted(f"{digest}  {id}\n" for digest, id in zip(sha256, ids, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def binary_labels(classes: Sequence[str], positive: str | None) -> tuple[list[int], tuple[str, str]]:
    """Class names to labels: 1 for the positive class, 0 for every other.

    The positive class is `positive`; else, of two classes, the one named Atypical (in any case); else the one that
    sorts last (so 1 of 0 and 1), and this choice is said on stderr.

    Returns:
        The labels, and the names of class 0 and class 1.

    Raises:
        UserError: for fewer than two classes, an unknown `positive`, or three and more classes without `positive`.
    """
    names = sorted(set(classes))
    if len(names) < 2:
        raise UserError(f"found {len(names)} class ({', '.join(names) or 'none'}); a probe needs two.")
    if positive is not None and positive not in names:
        raise UserError(
            f"there is no class {positive!r}.{nearest(positive, names)} The classes are {', '.join(names)}."
        )
    if positive is None and len(names) > 2:
        raise UserError(
            f"found {len(names)} classes ({', '.join(names)}); name the one to tell from all others with --positive."
        )
    if positive is None:
        positive = next((name for name in names if name.lower() == ATYPICAL.lower()), names[-1])
        if positive.lower() != ATYPICAL.lower() and names != ["0", "1"]:
            say(f"The positive class (label 1) is {positive!r}; choose another with --positive.")
    others = [name for name in names if name != positive]
    return [int(name == positive) for name in classes], (
        others[0] if len(others) == 1 else f"not {positive}",
        positive,
    )


# --- the known datasets -----------------------------------------------------------------------------------------------


def _known(name: str, data: Path) -> PatchDataset:
    record = DATASETS[name]
    files = _known_files(name, data)
    label = [int(file.label == ATYPICAL) for file in files]
    if record.figures is None:
        figures = [Figure(y, "", TEST, (), "") for y in label]
    else:
        figures = _join(files, record.figures(data), record)
    sha256, n_bytes = _hash_files([file.path for file in files], record.title)
    samples = make_samples(
        [file.id for file in files],
        label,
        sha256=sha256,
        group=[figure.group for figure in figures],
        split=[figure.split for figure in figures],
        votes=np.array([figure.votes for figure in figures], dtype=np.int8),
        domain=[figure.domain for figure in figures],
    )
    # Re-encoded patches are the user's to use; they are told, and the store records the digests.
    if difference := _difference(record, files, sha256, n_bytes):
        say(f"Note: the patches in {data / record.folder} are not the published files: {difference}.")
    decode = _file_decoder([file.path for file in files])
    return PatchDataset(name, samples, (NORMAL, ATYPICAL), record.source, record.mpp, decode)


def _verify_download(data: Path) -> None:
    for name, expected in TABLE_SHA256.items():
        found = hashlib.sha256((data / name).read_bytes()).hexdigest() if (data / name).is_file() else "no such file"
        if found != expected:
            raise UserError(f"{name} has SHA-256 {found}, expected {expected}.")
    for name, record in DATASETS.items():
        if record.folder:
            files = _known_files(name, data)
            sha256, n_bytes = _hash_files([file.path for file in files], record.title)
            if difference := _difference(record, files, sha256, n_bytes):
                raise UserError(f"{record.title} differs from the published files: {difference}.")


def _known_files(name: str, data: Path) -> list[_File]:
    """The files of a known dataset, as many of each class as there must be."""
    record = DATASETS[name]
    folder = data / record.folder
    if not folder.is_dir():
        raise UserError(
            f"{data} has no folder {record.folder}, which holds the patches of {name}. Expected a clone of the "
            "AMi-Br_Benchmark repository (folders AMi-Br, AtNorM-Br, AtNorM-MD and two CSV files). Give its path with "
            f"--data or {DATA_VARIABLE}, or leave both out to download it."
        )
    files = _class_files(folder, (ATYPICAL, NORMAL))
    counts = Counter(file.label for file in files)
    if (counts[ATYPICAL], counts[NORMAL]) != (record.n_atypical, record.n_normal):
        raise UserError(
            f"{folder} has {counts[ATYPICAL]:,} patches in {ATYPICAL} and {counts[NORMAL]:,} in {NORMAL}; {name} has "
            f"{record.n_atypical:,} and {record.n_normal:,}. Restore the missing files or remove the added ones; to "
            "use the folder as it is, give its path as the dataset."
        )
    return files


def _difference(record: DatasetRecord, files: Sequence[_File], sha256: Sequence[str], n_bytes: int) -> str | None:
    """How the files differ from the published ones, or None."""
    if n_bytes != record.n_bytes:
        return f"{n_bytes:,} bytes, expected {record.n_bytes:,}"
    digest = files_digest([file.id for file in files], sha256)
    if record.digest is not None and digest != record.digest:
        return f"digest {digest}, expected {record.digest}"
    return None


def _join(files: list[_File], figures: dict[str, Figure], record: DatasetRecord) -> list[Figure]:
    """The figure of each file, checked against the folder the file lies in."""
    unknown = [file.id for file in files if file.path.name not in figures]
    if unknown:
        raise UserError(
            f"{len(unknown)} patches of {record.title} are in no table ({_first(unknown)}). Expected the files of the "
            "repository under their own names; restore them."
        )
    joined = [figures[file.path.name] for file in files]
    wrong = [file.id for file, figure in zip(files, joined, strict=True) if (file.label == ATYPICAL) != figure.label]
    if wrong:
        raise UserError(
            f"{len(wrong)} patches of {record.title} lie in the folder of the class that their table contradicts "
            f"({_first(wrong)}). Expected folder and majority vote to agree; restore the files or the table."
        )
    return joined


def _ami_br_figures(data: Path) -> dict[str, Figure]:
    table = data / "AMI-BR.csv"
    if not table.is_file():  # it belongs to the AMi-Br repository; a clone of the benchmark does not have it
        table = download.fetch_file(AMI_BR_CSV_URL, AMI_BR_CSV_SHA256)
    rows = _read_csv(table, ("slide", "dataset", "uid", *_AMI_BR_VOTES, "majority_atypical"))
    train_table = data / "amibr_train_split.csv"
    train = {
        row["dataset_uid"]: row["final_label"] for _, row in _read_csv(train_table, ("dataset_uid", "final_label"))
    }
    figures = {}
    for line, row in rows:
        file_name = f"{row['dataset']}_{row['uid']}.png"
        votes = tuple(_vote(row[expert], {"True": 1, "False": 0}, table, line) for expert in _AMI_BR_VOTES)
        label = _vote(row["majority_atypical"], {"True": 1, "False": 0}, table, line)
        if file_name in train and (train[file_name] == ATYPICAL) != label:
            raise UserError(f"{train_table} labels {file_name} {train[file_name]}, but {table} does not. Restore both.")
        split = TRAIN if file_name in train else TEST
        figures[file_name] = Figure(label, row["slide"], split, votes, row["dataset"])
    if missing := sorted(set(train) - set(figures)):
        raise UserError(f"{len(missing)} rows of {train_table} are not in {table} ({_first(missing)}). Restore both.")
    return figures


def _atnorm_md_figures(data: Path) -> dict[str, Figure]:
    slides: dict[str, tuple[str, str]] = {}  # by file name: the benchmark numbers the patches slide by slide
    for _, row in _read_csv(_SLIDES_CSV, ("first_id", "last_id", "slide", "domain")):
        for number in range(int(row["first_id"]), int(row["last_id"]) + 1):
            slides[f"{number}.png"] = (row["slide"], row["domain"])
    table = data / "AtNorM-MD_expert_votes.csv"
    meaning = {ATYPICAL: 1, NORMAL: 0}
    figures = {}
    for line, row in _read_csv(table, ("Filename", *_ATNORM_MD_VOTES, "Majority")):
        if row["Filename"] not in slides:
            raise UserError(f"{table}, line {line}: {row['Filename']!r} is not one of 1.png to {len(slides)}.png.")
        slide, domain = slides[row["Filename"]]
        votes = tuple(_vote(row[expert], meaning, table, line) for expert in _ATNORM_MD_VOTES)
        label = _vote(row["Majority"], meaning, table, line)
        figures[row["Filename"]] = Figure(label, slide, TEST, votes, domain)
    return figures


_AMI_BR_VOTES = ("expert1_atypical", "expert2_atypical", "expert3_atypical")
_ATNORM_MD_VOTES = ("Expert_1", "Expert_2", "Expert_3", "Expert_4", "Expert_5")


def _vote(cell: str, meaning: dict[str, int], table: Path, line: int) -> int:
    if cell not in meaning:
        raise UserError(f"{table}, line {line}: the vote is {cell!r}, expected {' or '.join(meaning)}.")
    return meaning[cell]


def _demo() -> PatchDataset:
    patches = demo.draw()
    return PatchDataset(
        "demo",
        patches.samples,
        (NORMAL, ATYPICAL),
        DATASETS["demo"].source,
        demo.MPP,
        lambda row: patches.pixels[row].copy(),
    )


DATASETS: dict[str, DatasetRecord] = {
    "demo": DatasetRecord(
        title="demo",
        folder="",
        n_atypical=111,
        n_normal=289,
        n_bytes=demo.N_PATCHES * demo.SIZE * demo.SIZE * 3,
        digest="542b44d052b57601313a7fb0596de9eaace6f96f23009178b17248844d2e7483",
        annotation="3 simulated votes",
        species="none",
        source="drawn by mitofm",
    ),
    "ami-br": DatasetRecord(
        title="AMi-Br",
        folder="AMi-Br",
        n_atypical=832,
        n_normal=2_888,
        n_bytes=113_012_974,
        digest="d577c3a961c50254f4600cd5270a79ef602554d25595afe6b183a1fa64be62ef",
        annotation="3-expert vote",
        species="Human",
        source="TUPAC16, MIDOG21",
        figures=_ami_br_figures,
    ),
    "atnorm-md": DatasetRecord(
        title="AtNorM-MD",
        folder="AtNorM-MD",
        n_atypical=219,
        n_normal=1_888,
        n_bytes=77_124_777,
        digest=None,  # not computed yet: the commit of the archive, the counts and the size stand in for it
        annotation="5-expert vote",
        species="Human + Canine",
        source="MIDOG++",
        figures=_atnorm_md_figures,
    ),
    "atnorm-br": DatasetRecord(
        title="AtNorM-Br",
        folder="AtNorM-Br",
        n_atypical=128,
        n_normal=618,
        n_bytes=21_796_933,
        digest="c4add2ecb13ad26730f0b62b25ee1832447524014cb8142581ff964ad5ff5a19",
        annotation="Single expert",
        species="Human",
        source="TCGA (BRCA)",
    ),
}


# --- any unlabelled patches -------------------------------------------------------------------------------------------


def load_patches(path: Path) -> Patches:
    """New patches: an image file, a folder (images at any depth), a CSV with a column path, or an HDF5 file with x.

    Labels are neither needed nor read. Every file is checked first.

    Raises:
        UserError: no such path, no patches, or patches that cannot be read.
    """
    if path.is_dir():
        return _patches_of_folder(path)
    if path.is_file() and path.suffix.lower() == ".csv":
        rows = _read_csv(path, ("path",))
        names = [row["path"].strip() for _, row in rows]
        missing = [
            f"line {line}: {name or '(empty)'}"
            for (line, _), name in zip(rows, names, strict=True)
            if not _is_file(path.parent / name)
        ]
        if missing or not names:
            found = f"{len(missing)} of {len(names)} files do not exist ({_first(missing)})" if names else "no rows"
            raise UserError(f"{path}: {found}. Expected paths of patches, relative to {path.parent.resolve()}.")
        return _patches_of_files(path, names, [path.parent / name for name in names])
    if path.is_file() and path.suffix.lower() in _HDF5_SUFFIXES:
        x, read = _hdf5_images(path)
        return Patches(str(path), tuple(_row_names(x.shape[0])), read)
    if path.is_file() and path.suffix.lower() in images.SUFFIXES:
        return _patches_of_files(path, [path.name], [path])
    raise UserError(
        f"{path} is {'no patch' if path.exists() else 'not there'}. Expected an image "
        f"({', '.join(sorted(images.SUFFIXES))}), a folder of images, a CSV with a column path, or an HDF5 file with x."
    )


def _patches_of_folder(folder: Path) -> Patches:
    below = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in below if not any(_ignored(Path(part)) for part in path.parts)]
    names = sorted((path.as_posix() for path in kept if path.suffix.lower() in images.SUFFIXES), key=_natural)
    if not names:
        raise UserError(
            f"{folder} holds no images ({', '.join(sorted(images.SUFFIXES))}), only {len(kept)} other files."
        )
    if len(names) < len(kept):
        say(f"{folder}: {len(kept) - len(names)} files that are no images were left out.")
    return _patches_of_files(folder, names, [folder / name for name in names])


def _patches_of_files(source: Path, names: Sequence[str], paths: Sequence[Path]) -> Patches:
    _hash_files(paths, source.name)
    return Patches(str(source), tuple(names), _file_decoder(paths))


# --- any labelled patches ---------------------------------------------------------------------------------------------


def _from_folder(folder: Path, positive: str | None) -> PatchDataset:
    entries = [entry for entry in sorted(folder.iterdir()) if not _ignored(entry)]
    loose = [entry.name for entry in entries if entry.suffix.lower() in images.SUFFIXES]
    classes = tuple(entry.name for entry in entries if entry.is_dir())
    if loose or len(classes) < 2:
        found = f"{len(loose)} images outside them ({_first(loose)})" if loose else f"{len(classes)} sub-folders"
        raise UserError(f"{folder} has {found}. Expected one sub-folder per class with the class's patches inside.")
    files = _class_files(folder, classes)
    label, label_names = _labels([file.label for file in files], positive, folder)
    sha256, _ = _hash_files([file.path for file in files], folder.name)
    samples = make_samples([file.id for file in files], label, sha256=sha256)
    decode = _file_decoder([file.path for file in files])
    return PatchDataset(_safe_name(folder), samples, label_names, str(folder.resolve()), None, decode)


def _from_csv(table: Path, positive: str | None) -> PatchDataset:
    rows = _read_csv(table, ("path", "label"))
    if not rows:
        raise UserError(f"{table} has no rows below its header. Expected one row per patch.")
    optional = {name: name in rows[0][1] for name in ("id", "group", "split", "domain")}
    columns = ("path", "label", *(name for name, there in optional.items() if there))
    cells = {name: [row[name].strip() for _, row in rows] for name in columns}
    lines = [line for line, _ in rows]
    paths = [table.parent / path for path in cells["path"]]
    ids = cells.get("id", cells["path"])

    def refuse(bad: Iterable[int], what: str, remedy: str) -> None:
        named = [f"line {lines[row]}: {ids[row] or '(empty)'}" for row in bad]
        if named:
            raise UserError(f"{table}: {what} in {len(named)} of {len(rows)} rows ({_first(named)}). {remedy}")

    def empty(name: str) -> list[int]:
        return [row for row, cell in enumerate(cells[name]) if not cell]

    def repeated(values: Sequence[object]) -> list[int]:
        counts = Counter(values)
        return [row for row, value in enumerate(values) if counts[value] > 1]

    refuse(empty("path"), "an empty path", "Every row needs the path of its patch.")
    refuse(empty("label"), "an empty label", "Every row needs a label; remove unlabelled patches.")
    refuse(repeated(ids), "an id or path that occurs more than once", "Every patch needs one row and an id of its own.")
    refuse(
        repeated([os.path.normpath(path) for path in paths]),
        "a path that occurs more than once",
        "Keep one row of each.",
    )
    if "split" in cells:
        unknown = [row for row, split in enumerate(cells["split"]) if split not in (TRAIN, TEST, "")]
        refuse(unknown, "an unknown split", f"A split is '{TRAIN}', '{TEST}' or empty (folds are made from '{TRAIN}').")
    missing = [row for row, path in enumerate(paths) if not _is_file(path)]
    refuse(missing, "a file that does not exist", f"Paths are relative to {table.parent.resolve()}.")

    label, label_names = _labels(cells["label"], positive, table)
    sha256, _ = _hash_files(paths, table.name)
    samples = make_samples(
        ids, label, sha256=sha256, group=cells.get("group"), split=cells.get("split"), domain=cells.get("domain")
    )
    return PatchDataset(
        _safe_name(table.with_suffix("")), samples, label_names, str(table.resolve()), None, _file_decoder(paths)
    )


def _from_hdf5(path: Path, positive: str | None) -> PatchDataset:
    x, read = _hdf5_images(path)
    # PatchCamelyon ships images and labels as two files, ..._x.h5 and ..._y.h5.
    sibling = path.with_name(re.sub(r"(?<![A-Za-z0-9])x(?![A-Za-z0-9])", "y", path.name))
    y = _hdf5_dataset(path if "y" in x.file or not sibling.is_file() else sibling, "y")
    n = x.shape[0]
    if not n or y.size != n:
        raise UserError(f"{path}: x holds {n} patches and y {y.size} labels; expected one label per patch.")
    values = y[()].reshape(n).tolist()
    classes = [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    label, label_names = _labels(classes, positive, path)
    sha256 = []
    with progress(f"check {path.name}", n) as advance:
        for start in range(0, n, _HDF5_ROWS):
            block = read(slice(start, start + _HDF5_ROWS))  # (rows, height, width, 3)
            sha256 += [hashlib.sha256(patch.tobytes()).hexdigest() for patch in block]
            advance(len(block))
    samples = make_samples(_row_names(n), label, sha256=sha256)
    return PatchDataset(_safe_name(path.with_suffix("")), samples, label_names, str(path.resolve()), None, read)


def _hdf5_images(path: Path) -> tuple[h5py.Dataset, Callable[[int | slice], NDArray[np.uint8]]]:
    """The patches of an HDF5 file, and a thread-safe function that reads one or some of them."""
    x = _hdf5_dataset(path, "x")
    if x.ndim != 4 or x.shape[-1] != 3 or x.dtype != np.uint8:
        raise UserError(f"{path}: x is {x.dtype} of shape {x.shape}, expected uint8 of shape (n, height, width, 3).")
    lock = Lock()  # HDF5 files are not safe to read from several threads

    def read(rows: int | slice) -> NDArray[np.uint8]:
        try:
            with lock:
                return np.asarray(x[rows])
        except OSError as error:
            raise UserError(f"{path}, row {rows} cannot be read ({error}). Restore the file, then run again.") from None

    return x, read


def _row_names(n: int) -> list[str]:
    """Row numbers that sort as text."""
    return [f"{row:0{len(str(n - 1))}d}" for row in range(n)]


def _hdf5_dataset(path: Path, key: str) -> h5py.Dataset:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} is not a readable HDF5 file ({error}). Expected datasets x and y.") from None
    if not isinstance(file.get(key), h5py.Dataset):
        raise UserError(
            f"{path} has no dataset {key!r} (it has {', '.join(sorted(file)) or 'nothing'}). Expected x, (n, height, "
            "width, 3) uint8, and y, one label per patch, in the same file or in one named with y in place of x."
        )
    return file[key]


def _labels(classes: Sequence[str], positive: str | None, source: Path) -> tuple[list[int], tuple[str, str]]:
    try:
        return binary_labels(classes, positive)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _safe_name(path: Path) -> str:
    """A store name from a path: lower case, plain characters, and never the name of a known dataset."""
    name = re.sub(r"[^a-z0-9._-]+", "-", path.resolve().name.lower()).strip("-._") or "patches"
    return f"my-{name}" if name in DATASETS else name


# --- files ------------------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    id: str
    label: str
    path: Path


def _class_files(folder: Path, classes: Sequence[str]) -> list[_File]:
    """The patches of each class folder, in natural order of their ids; nothing in them is left out silently.

    Hidden files and the files that desktop systems leave behind are ignored; anything else that is no image is refused.
    """
    files, strange, empty, unprintable = [], [], [], []
    for label in classes:
        class_folder = folder / label
        entries = [entry for entry in class_folder.iterdir() if not _ignored(entry)] if class_folder.is_dir() else []
        for entry in entries:
            if not entry.name.isprintable():  # also bytes that are no UTF-8: they could not be stored as an id
                unprintable.append(f"{label}/{entry.name!a}")
            if entry.suffix.lower() in images.SUFFIXES and not entry.is_dir():
                files.append(_File(f"{label}/{entry.name}", label, entry))
            else:
                strange.append(f"{label}/{entry.name}")
        if not entries:
            empty.append(label)
    if empty:
        raise UserError(
            f"{folder}: no patches for class {' and '.join(empty)} (no such folder, or an empty one). Expected "
            "images in every class folder; add them, or remove the folder."
        )
    if unprintable:
        raise UserError(
            f"{folder}: {len(unprintable)} file names hold characters that cannot be printed "
            f"({_first(sorted(unprintable))}). Rename them: the name is the patch's id."
        )
    if strange:
        raise UserError(
            f"{folder}: {len(strange)} entries of the class folders are not images ({_first(sorted(strange))}). "
            f"Expected only files ending in {', '.join(sorted(images.SUFFIXES))}; move the others away."
        )
    return sorted(files, key=lambda file: _natural(file.id))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than a file system takes
        return False


def _ignored(entry: Path) -> bool:
    return entry.name.startswith(".") or entry.name in _SYSTEM_FILES


def _natural(text: str) -> tuple[list[str | int], str]:
    """A sort key under which 10.png follows 9.png."""
    parts = re.split(r"([0-9]+)", text)  # text and number in turn
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], text


def _hash_files(paths: Sequence[Path], title: str) -> tuple[list[str], int]:
    """Hash every file and check that each can be read, so that a bad one is known before any long computation.

    Returns:
        The hex SHA-256 of each file, and the size of all together in bytes.
    """

    def check(path: Path) -> tuple[str, int, str | None]:
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe or a device might never end
                return "", 0, "not a regular file"
            if status.st_size > images.MAX_BYTES:
                return "", 0, f"{status.st_size:,} bytes are too many for a patch"
            data = path.read_bytes()
        except OSError as error:
            return "", 0, str(error.strerror)
        return hashlib.sha256(data).hexdigest(), len(data), images.flaw(data)

    checked = []
    with progress(f"check {title}", len(paths)) as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(check, paths):
            checked.append(result)
            advance(1)
    flaws = [f"{path}: {flaw}" for path, (_, _, flaw) in zip(paths, checked, strict=True) if flaw is not None]
    if flaws:
        raise UserError(
            f"{len(flaws)} of {len(paths)} patches of {title} cannot be used:\n  "
            + "\n  ".join(flaws[:_SHOWN])
            + (f"\n  ... and {len(flaws) - _SHOWN} more" if len(flaws) > _SHOWN else "")
            + f"\nExpected {images.ACCEPTED}. Repair, convert or remove them, then run again."
        )
    return [sha256 for sha256, _, _ in checked], sum(size for _, size, _ in checked)


def _file_decoder(paths: Sequence[Path]) -> Decode:
    def decode(row: int) -> NDArray[np.uint8]:
        try:
            data = paths[row].read_bytes()
        except OSError as error:
            raise UserError(f"{paths[row]} cannot be read ({error.strerror}). Restore it, then run again.") from None
        return images.decode(data, str(paths[row]))

    return decode


def _read_csv(table: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV with their line numbers, every cell a string; `columns` must be there, more may be."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            missing = [column for column in columns if column not in header]
            if missing:
                raise UserError(
                    f"{table} lacks the column {' and '.join(missing)}; it has {', '.join(header) or 'none'}. Expected "
                    f"a comma-separated file with {', '.join(columns)} in its first line."
                )
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise UserError(f"{table} does not exist. Expected a CSV with {', '.join(columns)}; restore it.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is not a UTF-8 CSV ({error}). Save it as comma-separated UTF-8 text.") from None
    ragged = [f"line {line}" for line, row in rows if None in row or None in row.values()]
    if ragged:
        raise UserError(
            f"{table}: {len(ragged)} rows do not have the header's {len(header)} cells ({_first(ragged)}). Quote cells "
            "that contain commas."
        )
    return rows


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _default_data() -> Path | None:
    folder = os.environ.get(DATA_VARIABLE)
    return Path(folder) if folder else None


# --- Table 1 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetSummary:
    """One column of the paper's Table 1, recomputed from what is on this machine.

    Attributes:
        name, title, annotation, species, source: as in `DatasetRecord`.
        n_atypical, n_normal: patches of each class; the published counts where nothing is on this machine.
        basis: what the numbers were computed from: "images", "tables" (the images are absent), or "record".
        agreement: the share of patches with a unanimous vote; None for a single rater.
        n_slides: distinct slides; None where they are not known.
        domains: patches per domain.
        n_duplicate_sets, n_duplicates, n_conflicts: sets of byte-identical patches, the patches in them, and the sets
            with both labels; None without images.
        note: why numbers are missing; empty when none is.
    """

    name: str
    title: str
    annotation: str
    species: str
    source: str
    n_atypical: int
    n_normal: int
    basis: str
    agreement: float | None = None
    n_slides: int | None = None
    domains: dict[str, int] | None = None
    n_duplicate_sets: int | None = None
    n_duplicates: int | None = None
    n_conflicts: int | None = None
    note: str = ""

    @property
    def n_total(self) -> int:
        return self.n_atypical + self.n_normal

    @property
    def atypical_rate(self) -> float:
        return self.n_atypical / self.n_total


def table1(data: Path | None = None) -> list[DatasetSummary]:
    """Table 1 of the paper, recomputed from the images and tables at hand; never downloads patches.

    Args:
        data: as for `load_dataset`.
    """
    folder = local_data(data)
    return [_summary(name, folder) for name in DATASETS]


def _summary(name: str, data: Path | None) -> DatasetSummary:
    record = DATASETS[name]
    samples, basis, note = None, "record", ""
    try:
        if not record.folder:
            samples, basis = _demo().samples, "images"
        elif data is None:
            note = "not downloaded yet, and no data folder given: published counts"
        elif (data / record.folder).is_dir():
            samples, basis = _known(name, data).samples, "images"
        elif record.figures is not None:
            samples, basis, note = _figures_alone(record.figures(data)), "tables", "images absent"
        else:
            note = "images absent: published counts"
    except UserError as error:  # one damaged dataset must not hide the others
        note = str(error)
    common = (name, record.title, record.annotation, record.species, record.source)
    if samples is None:
        return DatasetSummary(*common, record.n_atypical, record.n_normal, basis, note=note)
    n_atypical = int(samples.label.sum())
    votes = samples.votes  # (n, n_raters)
    unanimous = (votes == votes[:, :1]).all(axis=1)
    duplicates = audit(samples) if basis == "images" else None
    return DatasetSummary(
        *common,
        n_atypical,
        len(samples) - n_atypical,
        basis,
        agreement=float(unanimous.mean()) if votes.shape[1] > 1 else None,
        n_slides=len(set(samples.group.tolist()) - {""}) or None,
        domains=dict(sorted(Counter(samples.domain[samples.domain != ""].tolist()).items())) or None,
        n_duplicate_sets=len(duplicates.duplicates) if duplicates else None,
        n_duplicates=sum(map(len, duplicates.duplicates)) if duplicates else None,
        n_conflicts=len(duplicates.conflicts) if duplicates else None,
        note=note,
    )


def _figures_alone(figures: dict[str, Figure]) -> Samples:
    """The patch table that the dataset's own tables give, for counting: without images there are no digests."""
    columns = {name: [getattr(figure, name) for figure in figures.values()] for name in Figure._fields}
    votes = np.array(columns["votes"], dtype=np.int8)
    return make_samples(
        list(figures),
        columns["label"],
        sha256=[""] * len(figures),
        group=columns["group"],
        split=columns["split"],
        votes=votes,
        domain=columns["domain"],
    )
