"""How does text reach a stream that cannot take it: another encoding, a reader that has left, a full disk?

stdout carries results, so a failure to write there ends the command. stderr carries messages: what cannot be written
there is lost, and the command goes on.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

_ALIKE = {
    "–": "-", "—": "-", "−": "-", "×": "x", "±": "+-", "…": "...", "→": "->", "≥": ">=", "≤": "<=", "≈": "~",
    "Δ": "delta", "µ": "u", "μ": "u", "σ": "sigma", "°": "deg", "·": "*", "²": "^2", "‘": "'", "’": "'", "“": '"',
    "”": '"',
}  # fmt: skip
_ALIKE_OR_CODE = "mitofm.alike"  # the name of the error handler below, for codecs


class OutputError(Exception):
    """A result could not be written to stdout. Not an OSError: typer and rich would answer that one themselves.

    Attributes:
        closed: whether whoever read the results has stopped reading, as `head` does.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.closed = error.errno == errno.EPIPE


def encodable(text: str, stream: TextIO | Any) -> str:
    """Replace what the encoding of `stream` lacks by what looks alike in ASCII, or by its code.

    >>> import io
    >>> encodable("0.80 ± 0.02, Müller, ✓", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    '0.80 ± 0.02, Müller, \\\\u2713'
    >>> encodable("0.80 ± 0.02", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    '0.80 +- 0.02'
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, _ALIKE_OR_CODE).decode(encoding)


def _alike_or_code(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_ALIKE.get(c) or ascii(c)[1:-1] for c in lacking), error.end


codecs.register_error(_ALIKE_OR_CODE, _alike_or_code)


def takes(text: str, stream: TextIO | Any) -> bool:
    """Whether the encoding of `stream` has all characters of `text`."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Results(io.TextIOWrapper):
    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OutputError(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputError(error) from error


class _Messages(io.TextIOWrapper):
    def write(self, text: str, /) -> int:
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def open_streams() -> None:
    """Let stdout and stderr take any text, and fail as this module says. Closed ones are opened to nowhere.

    Without the latter, the next file that the process opens would be its stdout.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest free number: this one
    sys.stdout = _rebuilt(sys.stdout, 1, _Results)
    sys.stderr = _rebuilt(sys.stderr, 2, _Messages)


def _rebuilt(stream: TextIO | None, descriptor: int, kind: type[io.TextIOWrapper]) -> TextIO:
    encoding, by_line = "utf-8", False
    if stream is not None:
        if type(stream) is not io.TextIOWrapper:
            return stream  # a notebook's or a test's
        stream.flush()
        encoding, by_line = stream.encoding, stream.line_buffering or stream.write_through
    buffer = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
    return kind(buffer, encoding, _ALIKE_OR_CODE, line_buffering=by_line)


def flush_results() -> None:
    """Write out what is left of the results.

    Raises:
        OutputError: if that fails. What is left is dropped, so that the interpreter does not try again when it ends.
    """
    try:
        sys.stdout.flush()
    except OutputError:
        drop_results()
        raise


def drop_results() -> None:
    """Lead stdout to nowhere."""
    with suppress(OSError, ValueError):  # a test's stdout has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
