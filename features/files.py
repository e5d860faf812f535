"""How is a file written so that no crash, full disk or second process leaves half of it?

Everything new is made under a temporary name (`.<name>.<random>.partial`), flushed to the disk, and only then renamed;
so a final name always stands for something whole. What a killed writer leaves behind is ignored by readers and removed
by the next writer. This works on Linux and macOS.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from features.console import UserError

PARTIAL = ".partial"
_KEPT_OF_NAME = 50  # characters of up to four bytes: a temporary name stays below 255 bytes, the usual limit
_DEVICES, _PROCESSES = Path("/dev"), Path("/proc")  # below the latter, /dev/stdout

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
def writing(path: Path, *, remedy: str = "run the same command again") -> Iterator[None]:
    """Turn a refusal of the disk into one message, which ends with what to do: `remedy`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise UserError(
            f"cannot write to {path}: {error.strerror}. Everything written so far is kept: "
            f"{_CANNOT_WRITE[error.errno]}, then {remedy}."
        ) from error


def check_output(out: Path) -> None:
    """Check, before the work begins, that a file can be written at its end, and that nothing but a file is replaced.

    Raises:
        UserError: `out` is a folder, a device, or `-`, or its folder is none or cannot be written to.
    """
    remedy = "Name a file in a folder that can be written to by `out`."
    if out.is_dir():
        raise UserError(f"cannot write to {str(out)!r}: it is a folder. {remedy}")
    if str(out) == "-":
        raise UserError(f"cannot write to '-': the result is a file, and is not written to stdout. {remedy}")
    is_device = out.exists() and not out.is_file()
    if is_device or out.absolute().parent == _DEVICES or _PROCESSES in out.absolute().parents:
        raise UserError(f"cannot write to {out}: it is no file on a disk, and must not be replaced by one. {remedy}")
    _require_writable(out, out.absolute().parent, remedy)


def check_folder(folder: Path, *, name: str) -> None:
    """Check, before the work begins, that a folder can be written to, or can be made; nothing is made.

    Args:
        folder: that is there, or will be.
        name: of the argument that names it.

    Raises:
        UserError: it is a file, or below one, or may not be written to.
    """
    remedy = f"Name a folder that can be written to by `{name}`."
    if _PROCESSES in (folder.absolute(), *folder.absolute().parents):
        raise UserError(f"cannot write to {folder}: {_PROCESSES} is no folder on a disk. {remedy}")
    _require_writable(folder, folder.absolute(), remedy)


def _require_writable(path: Path, folder: Path, remedy: str) -> None:
    """Refuse a folder that is none, or that may not be written to or made; `path` is what the user named."""
    there = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
    if not there.is_dir():
        what = "a link to nothing" if there.is_symlink() and not there.exists() else "a file and no folder"
        raise UserError(f"cannot write to {path}: {there} is {what}. {remedy}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {path}: the folder {there} may not be written to. {remedy}")


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file whole; when this returns, it and its name are on the disk."""
    with new_file(path) as temporary, temporary.open("xb") as file:
        file.writelines(pieces)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; at the end that file replaces `path` in one step. An error removes it."""
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
    """Make a name beside `path` that nobody else uses, and no longer than a file system takes."""
    return path.with_name(f".{path.name[:_KEPT_OF_NAME]}.{uuid.uuid4().hex}{PARTIAL}")


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_folder(new: Path, target: Path) -> None:
    """Rename a folder to `target`; a folder that is there is removed first, so that for a moment there is none."""
    flush(new)
    if target.exists():
        remove_folder(target)
    new.rename(target)
    flush(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder. Its name goes first, in one step, so that nobody sees half of it."""
    unnamed = temporary_name(folder)
    folder.rename(unnamed)
    flush(folder.parent)
    shutil.rmtree(unnamed)


def sweep(folder: Path) -> None:
    """Remove the unfinished files and folders that killed writers have left in a folder and in those right below it."""
    for parent in (folder, *filter(Path.is_dir, folder.iterdir())):
        for path in parent.glob(f".*{PARTIAL}"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
