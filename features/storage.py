"""Where do a store's files lie: in a folder or in a bucket?

A `Storage` is all that the feature store asks of either. Keys are relative names joined by `/`; the empty key is the
root. A folder's files are mapped into memory, flushed and renamed (`features.storage_local`); a bucket's objects are
put and fetched whole, several at once (`features.storage_bucket`).
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from features.console import UserError

METADATA = "zarr.json"
_SCHEMES = ("s3", "gs", "az")

Pieces = Iterable[bytes | memoryview]
Fetched = tuple[Hashable, mmap.mmap | bytes | None]  # which version of a file, and its bytes
T = TypeVar("T")
R = TypeVar("R")


class StorageError(UserError):
    """The storage refuses or does not answer. Nothing is known to be wrong with the files in it."""


class DamageError(UserError):
    """A stored file is missing, cut short or changed."""


class Storage(Protocol):
    """The files of one store. Every method that changes something raises UserError if that is refused."""

    @property
    def root(self) -> Path | str:
        """A folder's path, or a bucket's address."""

    @property
    def has_locks(self) -> bool:
        """Whether `claim` keeps other processes from replacing what is being written."""

    def path(self, key: str) -> Path | str:
        """Make the path or address of a file or folder, as messages name it."""

    def exists(self, key: str) -> bool:
        """Whether a file is there; for the empty key, whether the root holds anything."""

    def list_folder(self, key: str) -> dict[str, int]:
        """List the files and folders right below a folder by name, with the files' sizes; empty if it is not there."""

    def read(self, key: str) -> bytes:
        """Read a whole file. Raises OSError if it is not there or cannot be read."""

    def fetch(
        self, folder: str, names: Sequence[str], known: Callable[[Hashable], bool]
    ) -> Iterator[Callable[[], Fetched]]:
        """Read named files of a folder, several ahead where that is faster.

        Yields:
            for each name a call that returns the file's version and its bytes (none if that version is `known`), or
            raises OSError.
        """

    def write(self, key: str, pieces: Pieces) -> None:
        """Write a file whole; when this returns, it is safe. A zarr.json makes its folder if there is none."""

    def put_folder(self, key: str, files: Mapping[str, Pieces], *, replace: bool = False) -> None:
        """Make a folder of these files, zarr.json among them, none of which appears before all are safe.

        A folder with a zarr.json that is already there stays or, with `replace`, is removed first. Without `replace`
        no lock is needed: of several processes that put a folder at once, the first one's stays.
        """

    def remove(self, key: str) -> None:
        """Remove a file or a folder, if it is there; a folder's zarr.json goes first: without it the folder is gone."""

    def sweep(self, key: str) -> None:
        """Remove what killed writers have left in a folder and in those right below it."""

    def lock(self) -> AbstractContextManager[bool]:
        """Wait until no other process adds or replaces folders.

        The context's value says whether there is a lock. Without one, unfinished files may be another process's work.
        """

    def claim(self, key: str, *, shared: bool = False) -> object:
        """Keep a folder from being replaced or removed for as long as the result lives. Several may claim it at once.

        The first claim sweeps the folder, unless it is `shared` with other machines, whose claims may not be seen here.
        """

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Apply a function to every item, several at once where that is faster."""


def find_groups(storage: Storage, key: str) -> list[str]:
    """List the keys of the finished folders right below a folder, sorted: those with a zarr.json."""
    names = sorted(name for name in storage.list_folder(key) if name[0] != "." and name != METADATA)
    keys = [f"{key}/{name}" if key else name for name in names]
    finished = storage.map(lambda group: storage.exists(f"{group}/{METADATA}"), keys)
    return [group for group, is_finished in zip(keys, finished, strict=True) if is_finished]


def find_storage(where: Path | str) -> Storage:
    """Find the storage that an address names: a folder's path, or `s3://bucket/prefix`, `gs://…`, `az://…`.

    Raises:
        UserError: if it names a bucket wrongly, or the package or the credentials for it are missing.
    """
    text = str(where)
    if re.match(rf"({'|'.join(_SCHEMES)}):/(?!/)", text):
        raise UserError(
            "`store` has lost a slash: write s3://bucket/prefix with two (in Python as a string, not as a Path)."
        )
    if "://" not in text:
        from features.storage_local import LocalStorage

        return LocalStorage(Path(where))
    expected = "expected a folder, or s3://bucket/prefix (also gs:// and az://)"
    try:
        url = urlsplit(text)
    except ValueError:
        raise UserError(f"`store` is not an address; {expected}.") from None
    if url.scheme not in _SCHEMES:
        raise UserError(f"`store` begins with {url.scheme}://, which is no kind of storage known here; {expected}.")
    if "@" in url.netloc or ":" in url.netloc or url.query or url.fragment:  # may hold a secret: not repeated
        raise UserError(
            "`store` takes the bucket and the prefix alone, without user, key, port or '?…'. Credentials come from the "
            f"environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, …), the server from AWS_ENDPOINT_URL; {expected}."
        )
    if not url.netloc:
        raise UserError(f"{text} names no bucket; {expected}.")
    prefix = url.path.strip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
        raise UserError(f"{text} holds an empty part, '.' or '..'; {expected}.")
    root = f"{url.scheme}://{url.netloc}" + f"/{prefix}" * bool(prefix)
    try:
        from features.storage_bucket import BucketStorage, connect
    except ImportError:
        raise UserError(f"{root} needs the package obstore: pip install 'mitofm[s3]'.") from None
    return BucketStorage(root, connect(root))
