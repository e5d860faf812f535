"""Which public datasets are known, what do their tables say of each patch, and are these the published files?

A known dataset is a row of `DATASETS`. Its files lie in a data folder that is laid out like a clone of the repository
AMi-Br_Benchmark; `demo` is drawn and has no files. Two rows give patches of another dataset finer labels, their phases.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from extract import demo, download
from extract.images import check_files
from extract.readers import PatchFile, list_classes
from features.console import UserError
from features.labels import ATYPICAL as ATYPICAL
from features.labels import Classes
from features.samples import TEST, TRAIN
from features.tables import first_of, read_table

NORMAL = "Normal"
DATA_VARIABLE = "MITOFM_DATA"
AMI_BR_CSV = "AMI-BR.csv"  # of the AMi-Br repository; a clone of the benchmark does not have it
AMI_BR_CSV_URL = f"https://raw.githubusercontent.com/DeepMicroscopy/AMi-Br/20a217b3/{AMI_BR_CSV}"
AMI_BR_CSV_SHA256 = "49eb286b4b45f524f34ee2655c4d2e8f1e0c94618424a59b30ff7412fea77690"

# The tables of the archive, verified with its patches.
TABLE_SHA256 = {
    "amibr_train_split.csv": "55b9e82113bea36da10461f6c4be3c8c7e920be86176d7def527507c1d9ec3e1",
    "AtNorM-MD_expert_votes.csv": "363db789f5d1814be676d701d89646631703dc963b7f28b8f2c4db76eb543193",
}

_SLIDES_CSV = Path(__file__).parent / "data" / "atnorm_md_slides.csv"
_AMI_BR_VOTES = ("expert1_atypical", "expert2_atypical", "expert3_atypical")
_AMI_BR_PHASES = ("expert1_label", "expert2_label")
# What two experts of AMi-Br wrote (AMF: atypical mitotic figure, NMF: normal), and the class it is.
_PHASE_OF = {
    "NMF prometaphase": "prometaphase",
    "NMF metaphase": "metaphase",
    "NMF anaphase-telophase": "anaphase-telophase",
    "NMF ring shape": "ring shape",
    "AMF segregation": "segregation",
    "AMF multipolar": "multipolar",
    "AMF bipolar assymetric": "bipolar asymmetric",
    "AMF other": "other",
}
_ATNORM_MD_VOTES = ("Expert_1", "Expert_2", "Expert_3", "Expert_4", "Expert_5")


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
        folder: its folder below the data folder; empty for the drawn one, and for those without files of their own.
        n_atypical, n_normal: how many patches of each class (Table 1 of the paper).
        n_bytes: the size of all files together; for the drawn one, of the pixels.
        digest: SHA-256 over the sorted lines `<sha256>  <id>`, or None where it is not known yet.
        annotation: who labelled the patches.
        species, source: as in Table 1 of the paper.
        figures: reads the dataset's tables from a data folder, by file name; None where there are no tables.
        size: pixels along the side of a patch.
        mpp: micrometres per pixel.
        of: the dataset whose patches these are, under other labels; empty if they are its own.
        classes: number of patches by class, in the order of the labels, where the classes are not normal and atypical.
        phases: reads the class of every patch from the tables of a data folder, by file name; None of what is drawn.
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
    size: int = 128
    mpp: float = 0.25
    of: str = ""
    classes: Mapping[str, int] = field(default_factory=dict)
    phases: Callable[[Path], dict[str, str]] | None = None

    @property
    def label_names(self) -> Classes:
        """The names of class 0, class 1, ..."""
        return tuple(self.classes) or (NORMAL, ATYPICAL)


# --- what the tables say ----------------------------------------------------------------------------------------------


def _ami_br_table(data: Path) -> Path:
    table = data / AMI_BR_CSV
    return table if table.is_file() else download.fetch_file(AMI_BR_CSV_URL, AMI_BR_CSV_SHA256)


def _ami_br_figures(data: Path) -> dict[str, Figure]:
    table, train_table = _ami_br_table(data), data / "amibr_train_split.csv"
    rows = read_table(table, required=("slide", "dataset", "uid", *_AMI_BR_VOTES, "majority_atypical"))
    train_rows = read_table(train_table, required=("dataset_uid", "final_label"))
    train = {row["dataset_uid"]: row["final_label"] for row in train_rows}
    meaning = {"True": 1, "False": 0}
    figures = {}
    for row in rows:
        file_name = f"{row['dataset']}_{row['uid']}.png"
        votes = tuple(_vote(row[expert], meaning, table, row.line) for expert in _AMI_BR_VOTES)
        label = _vote(row["majority_atypical"], meaning, table, row.line)
        if file_name in train and (train[file_name] == ATYPICAL) != label:
            raise UserError(f"{train_table} labels {file_name} {train[file_name]}, but {table} does not. Restore both.")
        split = TRAIN if file_name in train else TEST
        figures[file_name] = Figure(label, row["slide"], split, votes, row["dataset"])
    if missing := sorted(set(train) - set(figures)):
        raise UserError(f"{len(missing)} rows of {train_table} are not in {table} ({first_of(missing)}). Restore both.")
    return figures


def _ami_br_phases(data: Path) -> dict[str, str]:
    """Read the phase of every figure of AMi-Br on which its two experts who named one agree; others are left out."""
    table = _ami_br_table(data)
    meaning = {"True": 1, "False": 0}
    phases = {}
    for row in read_table(table, required=("dataset", "uid", *_AMI_BR_PHASES, "majority_atypical")):
        first, second = (row[expert] for expert in _AMI_BR_PHASES)
        for name in (first, second):
            if name not in _PHASE_OF:
                raise UserError(f"{table}, line {row.line}: the label is {name!r}, expected {' or '.join(_PHASE_OF)}.")
        if first != second:
            continue
        if first.startswith("AMF") != _vote(row["majority_atypical"], meaning, table, row.line):
            raise UserError(
                f"{table}, line {row.line}: two of three experts say {first!r}, the majority does not. Restore it."
            )
        phases[f"{row['dataset']}_{row['uid']}.png"] = _PHASE_OF[first]
    return phases


def _atnorm_md_figures(data: Path) -> dict[str, Figure]:
    slides: dict[str, tuple[str, str]] = {}  # by file name: the benchmark numbers the patches slide by slide
    for row in read_table(_SLIDES_CSV, required=("first_id", "last_id", "slide", "domain")):
        for number in range(int(row["first_id"]), int(row["last_id"]) + 1):
            slides[f"{number}.png"] = (row["slide"], row["domain"])
    table = data / "AtNorM-MD_expert_votes.csv"
    meaning = {ATYPICAL: 1, NORMAL: 0}
    figures = {}
    for row in read_table(table, required=("Filename", *_ATNORM_MD_VOTES, "Majority")):
        file_name = row["Filename"]
        if file_name not in slides:
            raise UserError(f"{table}, line {row.line}: {file_name!r} is not one of 1.png to {len(slides)}.png.")
        slide, domain = slides[file_name]
        votes = tuple(_vote(row[expert], meaning, table, row.line) for expert in _ATNORM_MD_VOTES)
        label = _vote(row["Majority"], meaning, table, row.line)
        figures[file_name] = Figure(label, slide, TEST, votes, domain)
    return figures


def _vote(cell: str, meaning: dict[str, int], table: Path, line: int) -> int:
    if cell not in meaning:
        raise UserError(f"{table}, line {line}: the vote is {cell!r}, expected {' or '.join(meaning)}.")
    return meaning[cell]


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
    "demo-phases": DatasetRecord(
        title="demo, phases",
        folder="",
        n_atypical=107,
        n_normal=293,
        n_bytes=demo.N_PATCHES * demo.SIZE * demo.SIZE * 3,
        digest="131b569a441a9e370602e9690cd393285d6745e16f3090e3a1e2c2a62048aa63",
        annotation="the kind that was drawn",
        species="none",
        source="drawn by mitofm",
        of="demo",
        classes=dict(zip(demo.KINDS, (68, 117, 50, 58, 25, 23, 21, 23, 15), strict=True)),
    ),
    "ami-br-phases": DatasetRecord(
        title="AMi-Br, phases",
        folder="",
        n_atypical=304,
        n_normal=2_324,
        n_bytes=79_681_312,
        digest="199861b7a7f82b87c31d3dd94a5cdbab55e7cb6d05f48b8f980bf6311db36007",
        annotation="2 experts agree",
        species="Human",
        source="TUPAC16, MIDOG21",
        of="ami-br",
        classes={
            "prometaphase": 949,
            "metaphase": 1_175,
            "anaphase-telophase": 166,
            "ring shape": 34,
            "segregation": 120,
            "multipolar": 28,
            "bipolar asymmetric": 35,
            "other": 121,
        },
        phases=_ami_br_phases,
    ),
}


# --- the files --------------------------------------------------------------------------------------------------------


def known_files(name: str, data: Path) -> list[PatchFile]:
    """List the files of a known dataset.

    Raises:
        UserError: if the dataset's folder is missing, or a class has more or fewer files than were published.
    """
    record = DATASETS[name]
    folder = data / record.folder
    if not folder.is_dir():
        raise UserError(
            f"{data} has no folder {record.folder}, which holds the patches of {name}. Expected a clone of the "
            "AMi-Br_Benchmark repository (folders AMi-Br, AtNorM-Br, AtNorM-MD and two CSV files). Give its path with "
            f"`data` or {DATA_VARIABLE}, or leave both out to download it."
        )
    files = list_classes(folder, (ATYPICAL, NORMAL))
    counts = Counter(file.label for file in files)
    if (counts[ATYPICAL], counts[NORMAL]) != (record.n_atypical, record.n_normal):
        raise UserError(
            f"{folder} has {counts[ATYPICAL]:,} patches in {ATYPICAL} and {counts[NORMAL]:,} in {NORMAL}; {name} has "
            f"{record.n_atypical:,} and {record.n_normal:,}. Restore the missing files or remove the added ones; to "
            "use the folder as it is, give its path as the dataset."
        )
    return files


def known_figures(name: str, data: Path, files: Sequence[PatchFile]) -> list[Figure]:
    """Look up what the dataset's tables say of each file.

    Raises:
        UserError: if a file is in no table, or lies in the folder of another class than its table says.
    """
    record = DATASETS[name]
    if record.figures is None:
        return [Figure(int(file.label == ATYPICAL), "", TEST, (), "") for file in files]
    figures = record.figures(data)
    unknown = [file.id for file in files if file.path.name not in figures]
    if unknown:
        raise UserError(
            f"{len(unknown)} patches of {record.title} are in no table ({first_of(unknown)}). Expected the files of "
            "the repository under their own names; restore them."
        )
    joined = [figures[file.path.name] for file in files]
    wrong = [file.id for file, figure in zip(files, joined, strict=True) if (file.label == ATYPICAL) != figure.label]
    if wrong:
        raise UserError(
            f"{len(wrong)} patches of {record.title} lie in the folder of the class that their table contradicts "
            f"({first_of(wrong)}). Expected folder and majority vote to agree; restore the files or the table."
        )
    return joined


def known_phases(name: str, data: Path, ids: Sequence[str]) -> dict[int, int]:
    """Look up the class of each patch of a dataset under other labels; patches without a class are left out.

    Args:
        name: of the dataset.
        data: the data folder.
        ids: all patches of the dataset that it is of.

    Returns:
        By row of `ids`, the label.

    Raises:
        UserError: if the tables contradict themselves, or have more or fewer patches of a class than were published.
    """
    record = DATASETS[name]
    phases = record.phases(data) if record.phases else {}
    named = {row: phases.get(Path(id).name) for row, id in enumerate(ids)}
    labels = {row: record.label_names.index(phase) for row, phase in named.items() if phase is not None}
    counts = Counter(record.label_names[label] for label in labels.values())
    for phase, n in record.classes.items():
        if counts[phase] != n:
            raise UserError(
                f"{name} has {counts[phase]:,} patches of the class {phase} by the tables in {data}, expected {n:,}. "
                "Restore the tables."
            )
    return labels


# --- the published files ----------------------------------------------------------------------------------------------


def verify_download(data: Path) -> None:
    """Raise UserError unless a downloaded folder holds the published tables and patches."""
    for name, expected in TABLE_SHA256.items():
        digest = _sha256(data / name) if (data / name).is_file() else "no such file"
        if digest != expected:
            raise UserError(f"{name} has SHA-256 {digest}, expected {expected}.")
    for name, record in DATASETS.items():
        if record.folder:
            files = known_files(name, data)
            if difference := difference_to_published(name, files, *check_known_files(name, files)):
                raise UserError(f"{record.title} differs from the published files: {difference}.")


def check_known_files(name: str, files: Sequence[PatchFile]) -> tuple[list[str], int]:
    """Read and hash the files of a known dataset; see `check_files`."""
    return check_files([file.path for file in files], DATASETS[name].title)


def difference_to_published(
    name: str, files: Sequence[PatchFile], sha256: Sequence[str] | None, n_bytes: int
) -> str | None:
    """Say how files differ from the published ones; None if they do not.

    Args:
        name: of the dataset.
        files: its files.
        sha256: the digest of each; None compares sizes only.
        n_bytes: the size of all together.
    """
    record = DATASETS[name]
    if n_bytes != record.n_bytes:
        return f"{n_bytes:,} bytes, expected {record.n_bytes:,}"
    if sha256 is None or record.digest is None:
        return None
    digest = files_digest([file.id for file in files], sha256)
    return None if digest == record.digest else f"digest {digest}, expected {record.digest}"


def files_digest(ids: Iterable[str], sha256: Iterable[str]) -> str:
    """Compute SHA-256 over the sorted lines `<sha256>  <id>`, which is what `sha256sum` prints of the files.

    >>> files_digest(["b.png", "a.png"], ["22", "11"])[:16]
    'c805dee2e555ec38'
    """
    lines = sorted(f"{digest}  {id}\n" for digest, id in zip(sha256, ids, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
