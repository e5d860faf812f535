"""How are a store's files kept in a folder, safe from crashes and from other processes?"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from features.console import UserError
from features.files import flush, move_folder, remove_folder, sweep, temporary_name, write_file, writing
from features.storage import METADATA, Fetched, Pieces, R, T


@dataclass(frozen=True)
class LocalStorage:
    """A folder of this machine's file systems; a `features.storage.Storage`."""

    root: Path
    has_locks = True

    def path(self, key: str) -> Path:
        return Path(f"{self.root}/{key}") if key else self.root

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def list_folder(self, key: str) -> dict[str, int]:
        try:
            with os.scandir(self.path(key)) as entries:
                return {entry.name: _size(entry) for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def read(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    def fetch(
        self, folder: str, names: Sequence[str], known: Callable[[Hashable], bool]
    ) -> Iterator[Callable[[], Fetched]]:
        return (partial(self._map_file, self.path(f"{folder}/{name}"), known) for name in names)

    def _map_file(self, path: Path, known: Callable[[Hashable], bool]) -> Fetched:
        status = path.stat()
        # A file is known by device, inode and time of change: one that is replaced is another file.
        version = (status.st_dev, status.st_ino, status.st_mtime_ns)
        if known(version):
            return version, None
        with path.open("rb") as file:
            return version, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""

    def write(self, key: str, pieces: Pieces) -> None:
        path = self.path(key)
        with writing(path.parent):
            if path.name == METADATA and not path.parent.exists():
                path.parent.mkdir(parents=True, exist_ok=True)  # of several processes, another may just have made it
                flush(path.parent.parent)
            write_file(path, pieces)

    def put_folder(self, key: str, files: Mapping[str, Pieces], *, replace: bool = False) -> None:
        target = self.path(key)
        if replace:
            _refuse_if_claimed(target)
        with writing(target.parent):
            new = _write_folder(temporary_name(target), files)
            if replace:
                move_folder(new, target)
                return
            flush(new)
            try:
                new.rename(target)  # of several folders renamed to one name at the same moment, one succeeds
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if (target / METADATA).exists():
                    shutil.rmtree(new)
                else:  # folders appear with their zarr.json: this one is damaged
                    move_folder(new, target)
            flush(target.parent)

    def remove(self, key: str) -> None:
        path = self.path(key)
        with writing(path.parent):
            if path.is_dir():
                _refuse_if_claimed(path)
                remove_folder(path)
            else:
                path.unlink(missing_ok=True)

    def sweep(self, key: str) -> None:
        sweep(self.path(key))

    @contextmanager
    def lock(self) -> Iterator[bool]:
        with writing(self.root):
            descriptor = os.open(self.root, os.O_RDONLY)
            try:
                yield _flock(descriptor, fcntl.LOCK_EX) is True
            finally:
                os.close(descriptor)

    def claim(self, key: str, *, shared: bool = False) -> object:
        return _Claim(self.path(key), shared=shared)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return [function(item) for item in items]


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size if entry.is_file() else 0
    except FileNotFoundError:  # another writer has just renamed its unfinished file
        return 0


def _write_folder(folder: Path, files: Mapping[str, Pieces]) -> Path:
    """Make a folder of these files, all of it on the disk."""
    folder.mkdir()
    made = {folder}
    for name, pieces in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        made.update(parent for parent in file.parents if folder in parent.parents)
        write_file(file, pieces)
    for parent in made:
        flush(parent)
    return folder


class _Claim:
    """A lock on a folder that other claims share, held for as long as this object lives.

    Whoever claims a folder alone sweeps it first, unless it is shared with other machines: the locks of some clusters'
    file systems hold on one machine only.
    """

    def __init__(self, folder: Path, *, shared: bool) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        if not shared and _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            sweep(folder)
        _flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _refuse_if_claimed(folder: Path) -> None:
    """Refuse to replace what this or another process is writing, as far as the file system can tell."""
    for path in folder.rglob(METADATA):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) is False:
                raise UserError(f"{path.parent} is being written: wait until its writer has finished, or stop it.")
        finally:
            os.close(descriptor)


def _flock(descriptor: int, operation: int) -> bool | None:
    """Take a lock; False if another holder is in the way, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
