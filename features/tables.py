"""How is a CSV file read that a user hands in?"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from features.console import UserError

_SHOWN = 3


class Row(dict[str, str]):
    """The cells of one row by the names of their columns; `line` is its line in the file."""

    line: int


def read_csv(path: Path, *, required: Sequence[str] = ()) -> list[Row]:
    """Read the rows of a comma-separated UTF-8 file (with or without a byte order mark), every cell as a string.

    Args:
        path: the file; its first line names the columns.
        required: columns that must be there; there may be more.

    Raises:
        UserError: if the file cannot be read, is not such text, lacks a column, has no rows, or has rows of more or
            fewer cells than its header.
    """
    expected = f"Expected a comma-separated file with {', '.join(required) or 'the columns'} in its first line"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            missing = [column for column in required if column not in header]
            if missing:
                columns = f"column{'s' * (len(missing) > 1)} {' and '.join(missing)}"
                raise UserError(f"{path} lacks the {columns}; it has {', '.join(header) or 'none'}. {expected}.")
            rows = [_row(cells, reader.line_num) for cells in reader]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. {expected}; restore it or name another.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 CSV ({error}). Save it as comma-separated UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read as a CSV file: {error.strerror}. {expected}.") from None
    ragged = [f"line {row.line}" for row in rows if None in row or None in row.values()]
    if ragged:
        raise UserError(
            f"{path}: {len(ragged)} rows do not have the header's {len(header)} cells "
            f"({', '.join(ragged[:_SHOWN])}{', ...' * (len(ragged) > _SHOWN)}). Quote cells that contain commas."
        )
    if not rows:
        raise UserError(f"{path} has no rows below its header. Expected one row per patch.")
    return rows


def _row(cells: dict[str, str], line: int) -> Row:
    row = Row(cells)
    row.line = line
    return row
