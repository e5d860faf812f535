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
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

if TYPE_CHECKING:
    import typer
    from rich.table import Table

_PIPE_WIDTH = 240
# Rounds of a waiting OpenMP thread before it sleeps. Without a limit, two-thread products beside any other busy process
# take up to fifty times as long (docs/decisions/solver.md); torch reads it when it is loaded.
_SPIN_COUNT = "10000"
# huggingface_hub reads these when it is loaded, and fails there on anything else.
_SECONDS = re.compile(r"\s*\d*\s*"), "a whole number of seconds"
_ADDRESS = (
    re.compile(r"(https?://([^\s/@]*@)?(\[\S+\]|[^\s/:]+)(:\d+)?(/\S*)?)?"),
    "an address like https://huggingface.co",
)
_SETTINGS = {"HF_HUB_ETAG_TIMEOUT": _SECONDS, "HF_HUB_DOWNLOAD_TIMEOUT": _SECONDS, "HF_ENDPOINT": _ADDRESS}
_bars, _quiet = True, False


class ProgressCallback(Protocol):
    """Moves a progress bar on by `n` finished units and may say beside it what is going on."""

    def __call__(self, n: int, note: str | None = None) -> None: ...


class UserError(Exception):
    """A mistake the user can mend. The message says what was found, what was expected, and what to do."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, raised in the main thread. Not a KeyboardInterrupt: typer would answer that one itself."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Make a ' Did you mean ...?' suffix of the closest known names; an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def quieten(quiet: bool) -> None:
    """Silence this process's messages and results, or end the silence: of several processes only one speaks."""
    global _quiet
    _quiet = quiet


def say(message: str) -> None:
    """Print one message on stderr; a hostile file name in it cannot drive the terminal."""
    if _quiet:
        return
    print("\n".join(map(printable, message.split("\n"))), file=sys.stderr, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """Print the one JSON object that `--json` promises on stdout; control characters become \\u escapes."""
    if _quiet:
        return
    text = json.dumps(value, indent=2, ensure_ascii=False)
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
            return super().render_str("\n".join(map(printable, text.split("\n"))), **options)

    console = Plain(width=None if sys.stdout.isatty() else _PIPE_WIDTH, markup=False, highlight=False)
    for table in tables:
        console.print(table)


def printable(text: str) -> str:
    """Escape the control characters of `text`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
            return Text("" if speed is None else f"{speed:,.0f} {unit}/s")

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
    """Run a typer application under the exit-status contract: 0 done, 1 one clear message, 2 wrong usage."""
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        for name, (pattern, kind) in _SETTINGS.items():
            if not pattern.fullmatch(os.environ.get(name, "")):
                raise UserError(f"The environment variable {name} is not {kind}: correct it, or unset it.")
        app()
    except UserError as error:
        _fail(as_flags(str(error), _flags(app)))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _fail(f"{error.filename}: this name is longer than a file system takes. Name a file or folder that exists.")
    except Interrupted:
        _fail("interrupted. Everything finished so far is kept: run the same command again to finish the rest.")


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


def _fail(message: str) -> NoReturn:
    say(f"error: {message}")
    sys.exit(1)
