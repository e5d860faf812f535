"""How is a file written so that no crash, full disk or second process leaves half of it?

Everything new is made under a temporary name (`.<name>.<random>.partial`), flushed to the disk, and only then renamed;
so a final name always stands for something whole. What a killed writer leaves behind is ignored by readers and swept up
by the next writer. Linux and macOS.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from features.console import UserError

PARTIAL = ".partial"
_KEPT_OF_NAME = 50  # characters, of up to four bytes each: with the rest of a temporary name below 255 bytes

_CANNOT_WRITE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "choose a writable place",
    errno.EACCES: "choose a writable place",
    errno.EPERM: "choose a writable place",
    errno.ENOTDIR: "choose a folder",
    errno.EEXIST: "choose a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def writing(place: Path, *, remedy: str = "run the same command again") -> Iterator[None]:
    """Turn a refusal of the disk into one message, which ends with what to do: `remedy`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise UserError(
            f"cannot write to {place}: {error.strerror}. Everything written so far is kept: "
            f"{_CANNOT_WRITE[error.errno]}, then {remedy}."
        ) from error


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file whole; when this returns, it and its name are on the disk."""
    with new_file(path) as temporary, temporary.open("xb") as file:
        file.writelines(pieces)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; what is there at the end replaces `path` in one step, an error removes it."""
    temporary = temporary_name(path)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else uses, and no longer than a file system takes."""
    return path.with_name(f".{path.name[:_KEPT_OF_NAME]}.{uuid.uuid4().hex}{PARTIAL}")


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_folder(new: Path, place: Path) -> None:
    """Put a folder in its place: in one step, or, if a folder is there, in two between which there is none."""
    flush(new)
    if place.exists():
        discard_folder(place)
    new.rename(place)
    flush(place.parent)


def place_folder(new: Path, place: Path) -> None:
    """Put a folder in its place in one step, or remove it if another one is there by then: the first one stays.

    This needs no lock: of several folders renamed to one name at the same moment, one succeeds.
    """
    flush(new)
    try:
        new.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(new)
    flush(place.parent)


def discard_folder(folder: Path) -> None:
    """Remove a folder; its name goes first, in one step."""
    aside = temporary_name(folder)
    folder.rename(aside)
    flush(folder.parent)
    shutil.rmtree(aside)


def sweep(folder: Path) -> None:
    """Remove what killed writers have left right below a folder."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sweep_below(folder: Path) -> None:
    """Sweep a folder and those right below it."""
    for place in (folder, *filter(Path.is_dir, folder.iterdir())):
        sweep(place)


@contextmanager
def only_writer(folder: Path) -> Iterator[bool]:
    """Wait until no other process is inside this block for the same folder (where the file system has locks).

    Yields:
        Whether there is a lock. Without one nobody knows whose the unfinished files are, and they must stay.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    locked = False
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        yield locked
    finally:
        os.close(descriptor)


class Use:
    """A folder in use by this object, together with other users; given up when the object goes.

    Whoever finds nobody else there first sweeps the folder and those right below it, unless it is shared: the locks of
    some clusters' file systems hold on one machine only.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        if not shared and _lock(descriptor, fcntl.LOCK_EX):
            sweep_below(folder)
        _lock(descriptor, fcntl.LOCK_SH)


def in_use(folder: Path) -> bool:
    """Whether a `Use` of the folder exists, here or in another process, as far as the file system can tell."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return _lock(descriptor, fcntl.LOCK_EX) is False
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool | None:
    """Whether the lock was had at once; None where there are no locks."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
