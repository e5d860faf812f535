"""How is a table read that a user hands in: CSV of any usual delimiter and encoding, whatever its columns are called?

Every command reads tables here. Nothing in a table is passed over silently: a column that is used under another name,
or not used at all, is said, and whatever can be meant in two ways is refused.
"""

from __future__ import annotations

import codecs
import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from features.console import UserError, say
from features.samples import TEST, TRAIN

_SHOWN = 5  # how many of many rows or names a message gives
_DELIMITERS = (",", ";", "\t", "|")
# What the field calls a column, compared without case, spaces, hyphens, underscores and plural. Of several that are
# there for `group`, the first of the list is taken: a patient holds slides, and too large a group is never wrong.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "path": (
        *("file", "filename", "filepath", "image", "imagepath", "imagefile", "img", "imgpath"),
        *("patch", "patchpath", "patchfile", "tile", "tilepath", "location"),
    ),
    "label": ("class", "classname", "classification", "target", "category", "groundtruth", "gt", "majorityatypical"),
    "group": (
        *("patient", "patientid", "subject", "subjectid", "participant", "participantid", "case", "caseid"),
        *("specimen", "specimenid", "slide", "slideid", "slidename", "wsi", "wsiid", "groupid", "cluster"),
    ),
    "split": ("set", "subset", "partition", "traintest", "fold"),
    "domain": ("center", "centre", "centerid", "hospital", "institution", "site", "scanner", "cohort", "tumortype"),
    "id": ("patchid", "sampleid", "imageid", "tileid", "uid", "objectid"),
    # Of places on slides. QuPath's tables of measurements have Image and Centroid X px, or Centroid X \u00b5m.
    "slide": ("slidename", "slidefile", "slideid", "wsi", "wsiname", "wsiid", "image"),
    "x": ("xpx", "xcoord", "coordx", "centerx", "centrex", "centroidx", "centroidxpx"),
    "y": ("ypx", "ycoord", "coordy", "centery", "centrey", "centroidy", "centroidypx"),
    "x_um": ("x\u00b5m", "centroidxum", "centroidx\u00b5m"),
    "y_um": ("y\u00b5m", "centroidyum", "centroidy\u00b5m"),
}
_ORDERED = ("group",)
_MISSING = frozenset(
    {"na", "n/a", "n.a.", "n.a", "nan", "none", "null", "nil", "nat", "missing", "unknown", "unlabelled", "unlabeled"}
    | {
        "undefined",
        "?",
        "-",
        "--",
        ".",
        "#n/a",
        "#na",
        "<na>",
        "#value!",
        "#ref!",
        "#name?",
        "#div/0!",
        "#null!",
        "#num!",
    }
    | {"n.d.", "nd", "k.a.", "tbd", "no label", "not available", "not applicable", "not labelled", "not labeled"}
    | {"exclude", "excluded", "ignore", "unclear", "uncertain", "unsure"}
)
_VALIDATION = frozenset({"val", "valid", "validation", "dev", "tune"})
_SPLITS = {"": "", TRAIN: TRAIN, "training": TRAIN, TEST: TEST, "testing": TEST} | dict.fromkeys(_VALIDATION, TRAIN)
# How files begin that are no text.
_BINARY = {
    b"PK\x03\x04": "an Excel workbook or another ZIP archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook of the old kind",
    b"\x1f\x8b": "compressed by gzip",
    b"PAR1": "a Parquet file",
    b"\x89HDF": "an HDF5 file",
    b"ARROW1": "a Feather file",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF": "a PDF document",
}
_EXPECTED = "Expected a table as text: comma-separated (or ; or tab), with {columns} in its first line"


class Row(dict[str, str]):
    """The cells of one row by the names of their columns; `line` is its line in the file."""

    line: int


@dataclass(frozen=True, eq=False)
class Table:
    """The columns of a table, cell by cell as stripped strings.

    Attributes:
        path: the file.
        columns: name to the cells of its rows; wanted columns under the name they are wanted by.
        lines: the line of the file on which each row ends.
        unused: the columns besides those that were wanted.
    """

    path: Path
    columns: Mapping[str, list[str]]
    lines: list[int]
    unused: Sequence[str]

    def say_unused(self, *, but: str | None = None) -> None:
        """Say which columns are not used, besides one that is."""
        if names := [name for name in self.unused if name != but]:
            say(f"{self.path}: columns not used: {', '.join(names)}.")

    def __len__(self) -> int:
        return len(self.lines)

    def __iter__(self) -> Iterator[Row]:
        for line, *cells in zip(self.lines, *self.columns.values(), strict=True):
            row = Row(zip(self.columns, cells, strict=True))
            row.line = line
            yield row


def read_table(path: Path, *, required: Sequence[str], optional: Sequence[str] = (), say_unused: bool = True) -> Table:
    """Read a table: UTF-8, UTF-16 or Windows-1252 text, delimited by comma, semicolon, tab or bar.

    A wanted column may be there under one of its `SYNONYMS`; case, spaces, hyphens, underscores and a plural s make no
    difference. What is used as what is said on the terminal; with `optional`, so are the columns that are not used.

    Args:
        path: the file; its first line names the columns.
        required: columns that must be there.
        optional: columns that may be there.
        say_unused: whether to say which columns are not used. Whoever may use others calls `Table.say_unused` itself.

    Raises:
        UserError: if the file cannot be read or is no such text, lacks a column or has two for one purpose, has one
            that nearly has a wanted name, has no rows, repeats its header, or has rows of more or fewer cells.
    """
    expected = _EXPECTED.format(columns=" and ".join(required) or "the columns' names")
    text = _decoded(path, expected)
    delimiter, text = _delimiter(text, required, optional)
    reader = csv.reader(StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] = []
    rows, lines, ragged = [], [], []
    try:
        for cells in reader:
            stripped = [_stripped(cell) for cell in cells]
            if not any(stripped):
                continue
            if not header:
                header = stripped
                continue
            if len(stripped) != len(header):
                ragged.append(reader.line_num)
            rows.append(stripped)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: no readable table ({error}). {expected}.") from None
    if rows and all(len(cells) == len(header) + 1 for cells in rows):  # R writes no header above the names of rows
        header, ragged = ["", *header], []
    whole = [cells for cells in rows if len(cells) == len(header)]
    found = _find_columns(path, header, whole, required, optional, expected)
    if ragged:
        raise UserError(
            f"{path}: {len(ragged)} of {len(rows)} rows do not have the header's {len(header)} cells "
            f"({first_of([f'line {line}' for line in ragged])}). Quote cells that contain {delimiter!r}."
        )
    broken = [line for cells, line in zip(rows, lines, strict=True) if any("\n" in cells[k] for k in found.values())]
    if broken:
        raise UserError(
            f"{path}, line {broken[0]}: a cell goes over several lines. Is a quotation mark missing before?"
        )
    repeated = [line for cells, line in zip(rows, lines, strict=True) if cells == header]
    if repeated:
        raise UserError(f"{path}, line {repeated[0]}: the header is repeated. Remove that line, and others like it.")
    if not rows:
        raise UserError(f"{path} has no rows below its header. Expected one row per patch.")
    cells_of = dict(zip(range(len(header)), map(list, zip(*rows, strict=True)), strict=True))
    named = {name: cells_of[position] for name, position in found.items()}
    others = {header[position]: cells for position, cells in cells_of.items() if position not in found.values()}
    _say_what_is_used(path, header, found)
    table = Table(path, others | named, lines, [name for name in others if optional and _has_name(name)])
    if say_unused:
        table.say_unused()
    return table


def header_of(path: Path) -> list[str]:
    """Read the names of a table's columns, as `read_table` would, but silently; none if it is no readable table."""
    try:
        delimiter, text = _delimiter(_decoded(path, "Expected a table", silent=True), tuple(SYNONYMS), ())
    except UserError:
        return []
    header = next(csv.reader([line for line in text.splitlines() if line.strip()][:1], delimiter=delimiter), [])
    return [_stripped(name) for name in header]


def spellings(column: str) -> set[str]:
    """Give the names under which a column is found, reduced by `same_name`.

    >>> sorted(spellings("split"))
    ['fold', 'partition', 'set', 'split', 'subset', 'traintest']
    """
    return {same_name(name) for name in (column, *SYNONYMS.get(column, ()))}


def is_missing(cell: str) -> bool:
    """Whether a cell says that there is no value: it is empty, or one of the usual spellings (NA, nan, None, null, ?).

    >>> [cell for cell in ("0", "NA", "none", "", "<NA>", "Normal") if is_missing(cell)]
    ['NA', 'none', '', '<NA>']
    """
    return not cell or cell.casefold().replace("_", " ").strip() in _MISSING


def known_cells(cells: Sequence[str] | None) -> list[str] | None:
    """Empty the cells that say that there is no value."""
    return None if cells is None else ["" if is_missing(cell) else unicodedata.normalize("NFC", cell) for cell in cells]


def read_splits(cells: Sequence[str] | None, *, source: object, where: Sequence[str]) -> list[str] | None:
    """Read the splits of patches: "train", "test" or empty.

    Patches for validation count as training patches, and that is said: cross-validation makes folds of its own.

    Args:
        cells: (n,) as they were written; None where nothing is known.
        source: their file, for messages.
        where: (n,) what to call each patch in a message.

    Raises:
        UserError: for any other split.
    """
    known = known_cells(cells)
    if known is None:
        return None
    meant = [_SPLITS.get(cell.casefold()) for cell in known]
    refuse_rows(
        source,
        [f"{name} ({cell})" for name, cell, split in zip(where, known, meant, strict=True) if split is None],
        len(known),
        "an unknown split",
        f"A split is '{TRAIN}', '{TEST}' or empty; folds are made from '{TRAIN}', never read from a table. Correct "
        "these, or rename the column if it means something else.",
    )
    n_without = meant.count("") if TRAIN in meant else 0
    if n_without:
        say(f"{source}: {n_without} patches are in no split, and neither trained on nor tested.")
    n_validation = sum(cell.casefold() in _VALIDATION for cell in known)
    if n_validation:
        say(
            f"{source}: {n_validation} patches of the validation split count as training patches, because "
            f"cross-validation makes validation folds of its own. Call their split '{TEST}' to keep them out."
        )
    return [split or "" for split in meant]


def same_name(name: str) -> str:
    """Reduce a name to what is compared: no case, spaces, hyphens, underscores, and no plural s.

    >>> same_name("Slide IDs"), same_name("slide_id"), same_name("class")
    ('slideid', 'slideid', 'class')
    """
    reduced = re.sub(r"[\s_\-]+", "", name.casefold())
    return reduced[:-1] if len(reduced) > 3 and reduced.endswith("s") and not reduced.endswith("ss") else reduced


def refuse_rows(source: object, rows: Sequence[str], n: int, what: str, remedy: str) -> None:
    """Raise UserError if there are bad rows among the `n` of a source; `rows` names each by line or id."""
    if rows:
        raise UserError(f"{source}: {what} in {len(rows)} of {n} rows ({first_of(rows)}). {remedy}")


def natural_order(text: str) -> tuple[list[str | int], str]:
    """Make a sort key under which 10.png follows 9.png.

    >>> sorted(["10.png", "9.png"], key=natural_order)
    ['9.png', '10.png']
    """
    parts = re.split(r"([0-9]+)", text)  # text and number in turn
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], text


def first_of(names: Sequence[str]) -> str:
    """Join the first few of many names, for a message."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


# ----------------------------------------------------------------------------------------------------------------- text


def _decoded(path: Path, expected: str, *, silent: bool = False) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. {expected}; restore it or name another.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read as a table: {error.strerror}. {expected}.") from None
    for start, kind in _BINARY.items():
        if data.startswith(start):
            raise UserError(f"{path} is {kind}. {expected}: save or export it as CSV.")
    encoding = _encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        # No text of another encoding is valid UTF-8 by chance, and of Western ones nearly all is Windows-1252.
        encoding, text = "cp1252", data.decode("cp1252", errors="replace")
        if "\0" not in text and "\ufffd" not in text and not silent:
            say(f"{path} is not UTF-8; it was read as Windows-1252 (Latin-1). Save it as UTF-8 if letters look wrong.")
    strange = next((char for char in ("\0", "\ufffd") if char in text), None)
    if strange:
        line = text[: text.index(strange)].count("\n") + 1
        raise UserError(f"{path}, line {line}: bytes that are no text in {encoding}. {expected}.")
    return re.sub("\r\n?", "\n", text)


def _encoding(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # Without a mark: of Western text in UTF-16 every second byte is zero.
    if len(data) % 2 == 0 and len(data) > 3 and (not any(data[1:200:2]) or not any(data[0:200:2])):
        return "utf-16-le" if not any(data[1:200:2]) else "utf-16-be"
    return "utf-8-sig"


def _stripped(cell: str) -> str:
    return cell.strip(" \t\r\n\v\f\ufeff\u00a0\u200b")


def _delimiter(text: str, required: Sequence[str], optional: Sequence[str]) -> tuple[str, str]:
    """Find the delimiter by the first line that is not empty: the one that yields most wanted columns, or most columns.

    Returns:
        The delimiter, and the text without a line `sep=;`, which Excel writes and reads.
    """
    text = text.lstrip("\n")
    if match := re.match(r"""["']?sep=(.)["']?\n""", text):
        return match[1], text[match.end() :]
    line = next((line for line in text.splitlines() if line.strip()), "")
    wanted = {same_name(name) for column in (*required, *optional) for name in (column, *SYNONYMS.get(column, ()))}

    def columns(delimiter: str) -> tuple[int, int]:
        names = next(csv.reader([line], delimiter=delimiter), [])
        return sum(same_name(_stripped(name)) in wanted for name in names), len(names)

    return max(_DELIMITERS, key=columns), text


# -------------------------------------------------------------------------------------------------------------- columns


def _find_columns(
    path: Path,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    required: Sequence[str],
    optional: Sequence[str],
    expected: str,
) -> dict[str, int]:
    """Find the position of every wanted column that is there."""
    reduced = [same_name(name) for name in header]
    twice = [name for name, count in Counter(name for name in header if name).items() if count > 1]
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r}. Rename or remove one of them.")
    found: dict[str, int] = {}
    for column in (*required, *optional):
        position = _find_column(path, column, header, reduced, rows, taken=found.values())
        if position is not None:
            found[column] = position
    missing = [column for column in required if column not in found]
    if missing:
        columns = f"column{'s' * (len(missing) > 1)} {' and '.join(missing)}"
        names = ", ".join(filter(None, header)) or "none"
        near = [hint for column in missing if (hint := _near(column, header, reduced, found.values()))]
        hint = f" Is {near[0]!r} meant?" if near else ""
        raise UserError(f"{path} lacks the {columns}; it has {names}.{hint} {expected}.")
    for column in optional:
        near_name = None if column in found else _near(column, header, reduced, found.values())
        if near_name:
            raise UserError(
                f"{path} has a column {near_name!r} and none called {column!r}. If that is meant, rename it to "
                f"{column!r}; if not, to a name further off, such as 'my_{near_name}'."
            )
    return found


def _find_column(
    path: Path,
    column: str,
    header: Sequence[str],
    reduced: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    taken: Iterable[int],
) -> int | None:
    if column in header:
        return header.index(column)
    names = (same_name(column), *map(same_name, SYNONYMS.get(column, ())))
    positions = [k for name in names for k, other in enumerate(reduced) if other == name and k not in taken]
    own = [k for k in positions if reduced[k] == names[0]]
    if len(positions) > 1 and len(own) != 1 and column not in _ORDERED:
        found = " and ".join(repr(header[k]) for k in positions)
        raise UserError(f"{path} has {found}, and each could be the column {column!r}. Rename the one that is.")
    if column in _ORDERED and not own and len(positions) > 1:
        chosen: int = widest([(k, [row[k] for row in rows]) for k in positions])
        return chosen
    return next(iter(positions), None)


def widest(columns: Sequence[tuple[Any, Sequence[str]]]) -> Any:
    """Choose the column of groups that knows most rows and, of those, cuts them into the fewest groups.

    >>> widest([("patient", ["p", "", ""]), ("slide", ["s", "s", "t"]), ("block", ["1", "2", "3"])])
    'slide'
    """

    def badness(column: tuple[Any, Sequence[str]]) -> tuple[int, int]:
        cells = column[1]
        return sum(map(is_missing, cells)), len({cell for cell in cells if not is_missing(cell)})

    return min(columns, key=badness)[0]


def _near(column: str, header: Sequence[str], reduced: Sequence[str], taken: Iterable[int]) -> str | None:
    """Find a column whose name is one slip of the pen from a wanted one."""
    names = [same_name(name) for name in (column, *SYNONYMS.get(column, ())) if len(name) > 3]
    return next(
        (
            header[k]
            for k, other in enumerate(reduced)
            if k not in taken and any(_one_slip(other, name) for name in names)
        ),
        None,
    )


def is_slip(name: str, known: str) -> bool:
    """Whether a name is one slip of the pen from a known one of four and more letters.

    >>> is_slip("gruop", "group"), is_slip("lable", "label"), is_slip("scan", "slide")
    (True, True, False)
    """
    return len(known) > 3 and same_name(name) != same_name(known) and _one_slip(same_name(name), same_name(known))


def _one_slip(a: str, b: str) -> bool:
    """Whether one inserted, missing or wrong letter, or two swapped ones, turn one word into the other."""
    if len(a) > len(b):
        a, b = b, a
    start = next((k for k in range(len(a)) if a[k] != b[k]), len(a))
    if len(a) < len(b):
        return len(b) - len(a) == 1 and a[start:] == b[start + 1 :]
    rest_a, rest_b = a[start:], b[start:]
    return rest_a[1:] == rest_b[1:] or (rest_a[:2] == rest_b[:2][::-1] and rest_a[2:] == rest_b[2:])


def _has_name(column: str) -> bool:
    return bool(column) and not column.startswith("Unnamed:")  # pandas' index columns


def _say_what_is_used(path: Path, header: Sequence[str], found: Mapping[str, int]) -> None:
    renamed = [f"{header[k]} as {column}" for column, k in found.items() if header[k] != column]
    if renamed:
        say(f"{path}: using column{'s' * (len(renamed) > 1)} {', '.join(renamed)}.")
