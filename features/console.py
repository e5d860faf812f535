"""How does a command talk to its user?

Results go to stdout, progress and prose to stderr; a mistake the user can mend is one `UserError`, shown as one
message with exit status 1; progress bars appear on a terminal only, so a pipe or a log file stays clean.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from features.streams import OutputError, drop_results, encodable, flush_results, open_streams, takes

if TYPE_CHECKING:
    import typer
    from rich.table import Table

_PIPE_WIDTH = 240
# Rounds of a waiting OpenMP thread before it sleeps. Without a limit, two-thread products beside any other busy process
# take up to fifty times as long (docs/decisions/solver.md); torch reads it when it is loaded.
_SPIN_COUNT = "10000"
# torch's RuntimeErrors on any device and of NVIDIA's libraries; this module is too light to import torch.
_OUT_OF_MEMORY = re.compile(
    r"^OutOfMemoryError|CUDA error: out of memory|MPS backend out of memory|_STATUS_\w*ALLOC\w*_FAILED"
    r"|can't allocate memory|Storage size calculation overflowed"
)
_READER_LEFT = 128 + signal.SIGPIPE  # the status that a shell gives a command which died of it
# huggingface_hub reads these when it is loaded, and fails there on anything else.
_SECONDS = re.compile(r"\s*\d*\s*"), "a whole number of seconds"
_ADDRESS = (
    re.compile(r"(https?://([^\s/@]*@)?(\[\S+\]|[^\s/:]+)(:\d+)?(/\S*)?)?"),
    "an address like https://huggingface.co",
)
_SETTINGS = {"HF_HUB_ETAG_TIMEOUT": _SECONDS, "HF_HUB_DOWNLOAD_TIMEOUT": _SECONDS, "HF_ENDPOINT": _ADDRESS}
# Share of letters in common, in their order, from which a name is close to another: a slip or two, or a part of it.
_CLOSE = 0.65
_bars, _quiet = True, False


class ProgressCallback(Protocol):
    """Moves a progress bar on by `n` finished units and may say beside it what is going on."""

    def __call__(self, n: int, note: str | None = None) -> None: ...


class UserError(Exception):
    """A mistake the user can mend. The message says what was found, what was expected, and what to do."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, raised in the main thread. Not a KeyboardInterrupt: typer would answer that one itself."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Make a ' Did you mean ...?' suffix of the closest known names; an empty string when none is close.

    >>> nearest("veiw", ["view", "views", "device"]), nearest("device", ["view"])
    (' Did you mean view or views?', '')
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=_CLOSE)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a torch error means that memory ran out, on any device."""
    return bool(_OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"))


def quieten(quiet: bool) -> None:
    """Silence this process's messages and results, or end the silence: of several processes only one speaks."""
    global _quiet
    _quiet = quiet


def say(message: str) -> None:
    """Print one message on stderr; a hostile file name in it cannot drive the terminal."""
    if _quiet:
        return
    print(_plain(message, sys.stderr), file=sys.stderr, flush=True)


def print_text(text: str) -> None:
    """Print a result on stdout, made safe as `say` makes its message."""
    if not _quiet:
        print(_plain(text, sys.stdout))


def print_json(value: dict[str, Any]) -> None:
    """Print the one JSON object that `--json` promises on stdout.

    Control characters, and what the encoding of stdout lacks, become \\u escapes.
    """
    if _quiet:
        return
    text = json.dumps(value, indent=2, ensure_ascii=not takes("–é漢", sys.stdout))
    print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def show(*tables: Table) -> None:
    """Print tables on stdout, as wide as the terminal; in a pipe or file as wide as they need."""
    if _quiet:
        return
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            """Render a name as data: markup is not read, and control characters are escaped."""
            return super().render_str(_plain(text, sys.stdout), **options)

    console = Plain(width=None if sys.stdout.isatty() else _PIPE_WIDTH, markup=False, highlight=False)
    for table in tables:
        console.print(table)


def printable(text: str) -> str:
    """Escape the control characters of `text`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _plain(text: str, stream: TextIO) -> str:
    """Make text safe for a terminal, line by line, and for the encoding of `stream`."""
    return encodable("\n".join(map(printable, text.split("\n"))), stream)


def rate(per_second: float, unit: str = "images") -> str:
    """Say how many units are done per second; of slow ones also how many seconds each takes.

    >>> rate(1234.5), rate(3.14), rate(0.031)
    ('1,234 images/s', '3.1 images/s', '0.031 images/s, 32 s an image')
    """
    if per_second >= 10 or per_second == 0:
        return f"{per_second:,.0f} {unit}/s"
    if per_second >= 1:
        return f"{per_second:.1f} {unit}/s"
    one = unit.removesuffix("s")
    article = "an" if one[0] in "aeiou" else "a"
    return f"{per_second:.2g} {unit}/s, {1 / per_second:,.0f} s {article} {one}"


def no_progress() -> None:
    """Draw no progress bars in this process: another one draws its own on the same terminal."""
    global _bars
    _bars = False


@contextmanager
def progress(description: str, total: int, unit: str = "images") -> Iterator[ProgressCallback]:
    """Show a progress bar with rate and time left if stderr is a terminal; elsewhere show nothing.

    Yields:
        `advance(n)`, to be called after every `n` finished units; safe to call from any thread.
    """
    if _quiet or not (_bars and sys.stderr.isatty()):
        yield lambda n, note=None: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else rate(speed, unit))

    columns = (
        TextColumn("{task.description}", markup=False),  # file names are no markup
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(printable(description), total=total, note="")

        def advance(n: int, note: str | None = None) -> None:
            bar.advance(task, n)
            if note is not None:
                bar.update(task, note=printable(note))

        yield advance


def _interrupt(signum: int, frame: object) -> None:
    raise Interrupted


def run(app: typer.Typer) -> None:
    """Run a typer application under the exit-status contract: 0 done, 1 one clear message, 2 wrong usage.

    If whoever reads stdout stops reading, as `head` does, the command ends quietly with 141, as others do there.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    if not os.environ.get("TERMINAL_WIDTH", "0").isdecimal():
        del os.environ["TERMINAL_WIDTH"]  # typer reads it as a number, when it first prints
    open_streams()
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    status = _run(app)
    with suppress(OutputError):  # something else has been said by then
        flush_results()
    sys.exit(status)


def _run(app: typer.Typer) -> int | str | None:
    """Run an application, and say what ended it. Returns the exit status."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return _fail("the current folder has been removed. Change to one that exists (cd), then run this again.")
    try:
        status = _status(app)
        flush_results()
    except UserError as error:
        return _fail(as_flags(str(error), _flags(app)))
    except OutputError as error:
        return _lost(error)
    except OSError as error:
        return _fail(_refused(error))
    except MemoryError as error:
        return _fail(
            f"there is not enough memory{f' ({error})' if str(error) else ''}. Close other programs, or ask for less."
        )
    except UnicodeEncodeError as error:
        return _fail(_not_text(error))
    except Interrupted:
        return _fail("interrupted. Everything finished so far is kept: run the same command again to finish the rest.")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return _fail(
            f"there is not enough memory ({str(error).splitlines()[0]}). Close other programs, or ask for less."
        )
    return status


def _status(app: typer.Typer) -> int | str | None:
    """Run an application. Returns the exit status that typer gives it."""
    try:
        for name, (pattern, kind) in _SETTINGS.items():
            if not pattern.fullmatch(os.environ.get(name, "")):
                raise UserError(f"The environment variable {name} is not {kind}: correct it, or unset it.")
        app()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # not stdout's: see OutputError
            return _fail("a connection was closed from the other side. Run the same command again.")
        return end.code
    return 0


def _refused(error: OSError) -> str:
    """Say what the system has refused, where no other message does."""
    if error.errno == errno.ENAMETOOLONG:
        return f"{error.filename}: this name is longer than a file system takes. Name a file or folder that exists."
    where = f"{error.filename}: " if error.filename is not None else ""
    return (
        f"{where}{error.strerror or error}. Expected files and folders that may be read and written here; look at what "
        "is there, or name others."
    )


def _not_text(error: UnicodeEncodeError) -> str:
    found = printable(error.object[max(0, error.start - 20) : error.end + 20])
    if error.encoding.startswith("utf"):
        return f"'{found}' is no UTF-8 text. Expected a name in UTF-8: rename it."
    return (
        f"'{found}' cannot be written in {error.encoding}, the encoding of file names here. Set a UTF-8 locale "
        "(LC_ALL=C.UTF-8) or PYTHONUTF8=1, then run this again."
    )


def _lost(error: OutputError) -> int:
    """Say why the results cannot be written to stdout, unless nobody reads them. Returns the exit status."""
    drop_results()
    if error.closed:
        return _READER_LEFT
    return _fail(f"the results cannot be written to stdout: {error}. Free some space, or write them elsewhere.")


def as_flags(message: str, flags: Mapping[str, str]) -> str:
    """Rewrite the arguments that a library's message names as the flags of a command.

    >>> flags = {"device": "--device", "batch_size": "--batch-size", "overwrite": "--overwrite"}
    >>> as_flags("Lower `batch_size`, use `device='cpu'`, or `overwrite=True`.", flags)
    'Lower --batch-size, use --device cpu, or --overwrite.'

    Args:
        message: arguments stand in it in Python's form between backticks.
        flags: parameter -> flag of the options that the command has. Other arguments stay as they are.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in flags:
            return match[0]
        if value in (None, "True"):
            return flags[name]
        return f"{flags[name]} {value[1:-1] if value[0] in _QUOTES else value}"

    return _ARGUMENT.sub(flag, message)


_QUOTES = "'\""
_ARGUMENT = re.compile(r"`(?P<name>[a-z_]+)(=(?P<value>'[^'`]*'|\"[^\"`]*\"|[\w.+-]+))?`")


def _flags(app: typer.Typer) -> dict[str, str]:
    """Map parameter -> flag for every option of an application, of all its commands together."""
    from typer.main import get_command

    command = get_command(app)
    commands = [command, *getattr(command, "commands", {}).values()]
    options = [option for command in commands for option in command.params if option.param_type_name == "option"]
    return {str(option.name): option.opts[0] for option in options}


def _fail(message: str) -> int:
    say(f"error: {message}")
    return 1
