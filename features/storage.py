"""Where do a store's files lie: in a folder or in a bucket?

A `Storage` is all that the feature store asks of either. Keys are relative names joined by `/`; the empty key is the
place itself. A folder's files are mapped into memory, flushed and renamed; a bucket's objects are put and fetched
whole, several at once. On a bucket nothing can be renamed: there a folder that holds a zarr.json is there exactly when
its zarr.json is, which is therefore put last and deleted first.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from features.console import UserError, say
from features.files import (
    PARTIAL,
    Use,
    discard_folder,
    flush,
    in_use,
    move_folder,
    only_writer,
    place_folder,
    sweep,
    sweep_below,
    temporary_name,
    write_file,
    writing,
)

METADATA = "zarr.json"
_SCHEMES = ("s3", "gs", "az")
_REQUESTS = 16  # in flight
_MOST_PER_REQUEST = 16 * 2**20  # bytes; of a larger object every part is retried on its own
_TIMEOUT = "120s"  # per request, with its body
_RETRIES: dict[str, Any] = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}  # obstore's own defaults
_LEASE = 60.0  # seconds after which the lock of a killed writer may be taken over
_LOCK = f".writer{PARTIAL}"  # format 1 ignores such names

Pieces = Iterable[bytes | memoryview]
Fetched = tuple[Hashable, mmap.mmap | bytes | None]  # which version of a file, and its bytes
T = TypeVar("T")
R = TypeVar("R")


class StorageError(UserError):
    """The place itself refuses or does not answer: of its files nothing bad is known."""


class Storage(Protocol):
    """The files of one store."""

    @property
    def root(self) -> Path | str:
        """The place, as its user names it."""

    @property
    def guarded(self) -> bool:
        """Whether `use` keeps others from replacing what is being written."""

    def path(self, key: str) -> Path | str:
        """What messages call a file or folder."""

    def exists(self, key: str) -> bool:
        """Whether a file is there; of the empty key, whether anything is."""

    def has_folder(self, key: str) -> bool:
        """Whether a folder is there that only `replace_folder` may touch: a finished or a damaged one."""

    def vacant(self) -> bool:
        """Whether nothing is there but what killed writers have left."""

    def names(self, key: str) -> list[str]:
        """Names of the files and folders right below a folder; none if it is not there."""

    def groups(self, key: str) -> list[str]:
        """The keys of the finished folders right below a folder: those with a zarr.json."""

    def read(self, key: str) -> bytes:
        """A whole file. Raises OSError if it is not there or cannot be read."""

    def fetch(
        self, folder: str, names: Sequence[str], known: Callable[[Hashable], bool]
    ) -> Iterator[Callable[[], Fetched]]:
        """For each named file of a folder a call that gives its version and bytes, or OSError; no bytes if `known`."""

    def size(self, key: str) -> int:
        """Bytes of all files below a folder."""

    def make(self) -> None:
        """Make the place, empty."""

    def make_folder(self, key: str) -> None:
        """Make a folder right below one that is there, if it is not there."""

    def write(self, key: str, pieces: Pieces) -> None:
        """Write a file whole; when this returns, it is safe."""

    def delete(self, key: str) -> None:
        """Delete a file, if it is there."""

    def add_folder(self, key: str, files: Mapping[str, Pieces]) -> None:
        """Make a folder of these files, zarr.json among them, unless one is there by then: the first one stays.

        This needs no lock.
        """

    def replace_folder(self, key: str, files: Mapping[str, Pieces]) -> None:
        """Make a folder of these files, zarr.json among them, in the place of one that may be there."""

    def remove_folder(self, key: str) -> None:
        """Remove a folder, beginning with what makes it count as there."""

    def sweep(self, key: str) -> None:
        """Remove what killed writers have left right below a folder."""

    def sweep_below(self, key: str) -> None:
        """Sweep a folder and those right below it."""

    def alone(self) -> AbstractContextManager[bool]:
        """Wait until no other process adds or replaces folders; turn refusals to write into one message.

        Its value: whether there is a lock. Without one nobody knows whose the unfinished files are.
        """

    def writing(self, key: str) -> AbstractContextManager[None]:
        """Turn refusals to write into one message."""

    def use(self, key: str, *, shared: bool = False) -> object:
        """Mark a folder as being written for as long as the result lives; sweep it if alone there and not shared."""

    def in_use(self, key: str) -> Path | str | None:
        """A folder at or below this one that is being written, as far as can be told."""

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """The function of every item, several at once where that is faster."""


def find_storage(where: Path | str) -> Storage:
    """The place that `--store` names: a folder's path, or `s3://bucket/prefix`, `gs://…`, `az://…`.

    Raises:
        UserError: if it names a bucket wrongly, or the package or the credentials for it are missing.
    """
    text = str(where)
    if re.match(rf"({'|'.join(_SCHEMES)}):/(?!/)", text):
        raise UserError(
            "--store has lost a slash: write s3://bucket/prefix with two (in Python as a string, not as a Path)."
        )
    if "://" not in text:
        return LocalStorage(Path(where))
    expected = "expected a folder, or s3://bucket/prefix (also gs:// and az://)"
    try:
        url = urlsplit(text)
    except ValueError:
        raise UserError(f"--store is not an address; {expected}.") from None
    if url.scheme not in _SCHEMES:
        raise UserError(f"--store begins with {url.scheme}://, which is no kind of place known here; {expected}.")
    if "@" in url.netloc or ":" in url.netloc or url.query or url.fragment:  # may hold a secret: not repeated
        raise UserError(
            "--store takes the bucket and the prefix alone, without user, key, port or '?…'. Credentials come from the "
            f"environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, …), the server from AWS_ENDPOINT_URL; {expected}."
        )
    if not url.netloc:
        raise UserError(f"{text} names no bucket; {expected}.")
    prefix = url.path.strip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
        raise UserError(f"{text} holds an empty part, '.' or '..'; {expected}.")
    root = f"{url.scheme}://{url.netloc}" + f"/{prefix}" * bool(prefix)
    return BucketStorage(root, _connect(root))


@dataclass(frozen=True)
class LocalStorage:
    """A folder of this machine's file systems."""

    root: Path
    guarded = True

    def path(self, key: str) -> Path:
        return Path(f"{self.root}/{key}") if key else self.root

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def has_folder(self, key: str) -> bool:
        return self.path(key).exists()

    def vacant(self) -> bool:
        return not self.root.exists() or (self.root.is_dir() and all(n.endswith(PARTIAL) for n in self.names("")))

    def names(self, key: str) -> list[str]:
        try:
            return [path.name for path in self.path(key).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def groups(self, key: str) -> list[str]:
        below = (f"{key}/{name}".lstrip("/") for name in sorted(self.names(key)) if name[0] != ".")
        return [group for group in below if self.exists(f"{group}/{METADATA}")]

    def read(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    def fetch(
        self, folder: str, names: Sequence[str], known: Callable[[Hashable], bool]
    ) -> Iterator[Callable[[], Fetched]]:
        return (partial(self._map, f"{folder}/{name}", known) for name in names)

    def _map(self, key: str, known: Callable[[Hashable], bool]) -> Fetched:
        path = self.path(key)
        status = path.stat()
        # A file is known by device, inode and time of change: one that is replaced is another file.
        version = (status.st_dev, status.st_ino, status.st_mtime_ns)
        if known(version):
            return version, None
        with path.open("rb") as file:
            return version, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""

    def size(self, key: str) -> int:
        return sum(path.stat().st_size for path in self.path(key).rglob("*") if path.is_file())

    def make(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        flush(self.root.parent)

    def make_folder(self, key: str) -> None:
        folder = self.path(key)
        if not folder.exists():
            folder.mkdir(exist_ok=True)  # of several processes, another one may just have made it
            flush(folder.parent)

    def write(self, key: str, pieces: Pieces) -> None:
        write_file(self.path(key), pieces)

    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def add_folder(self, key: str, files: Mapping[str, Pieces]) -> None:
        place_folder(self._aside(key, files), self.path(key))

    def replace_folder(self, key: str, files: Mapping[str, Pieces]) -> None:
        move_folder(self._aside(key, files), self.path(key))

    def _aside(self, key: str, files: Mapping[str, Pieces]) -> Path:
        """A folder of these files under a temporary name, all of it on the disk."""
        new = temporary_name(self.path(key))
        new.mkdir()
        made = {new}
        for name, pieces in files.items():
            file = new / name
            file.parent.mkdir(parents=True, exist_ok=True)
            made.update(folder for folder in file.parents if new in folder.parents)
            write_file(file, pieces)
        for folder in made:
            flush(folder)
        return new

    def remove_folder(self, key: str) -> None:
        discard_folder(self.path(key))

    def sweep(self, key: str) -> None:
        sweep(self.path(key))

    def sweep_below(self, key: str) -> None:
        sweep_below(self.path(key))

    @contextmanager
    def alone(self) -> Iterator[bool]:
        with writing(self.root), only_writer(self.root) as locked:
            yield locked

    def writing(self, key: str) -> AbstractContextManager[None]:
        return writing(self.path(key))

    def use(self, key: str, *, shared: bool = False) -> object:
        return Use(self.path(key), shared=shared)

    def in_use(self, key: str) -> Path | None:
        return next((found.parent for found in self.path(key).rglob(METADATA) if in_use(found.parent)), None)

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return [function(item) for item in items]


@dataclass(frozen=True)
class BucketStorage:
    """A prefix of a bucket. Requests that fail for a passing reason are repeated by obstore itself.

    Every method raises StorageError if the bucket refuses, does not exist, or does not answer.
    """

    root: str
    store: Any  # obstore's
    guarded = False  # nothing in a bucket goes away with the process that made it

    def path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def exists(self, key: str) -> bool:
        import obstore

        if not key:
            return bool(self.names(""))
        try:
            with self._asking():
                obstore.get(self.store, key)  # not head: without a body, a refusal does not say why
        except FileNotFoundError:
            return False
        return True

    def has_folder(self, key: str) -> bool:
        return self.exists(f"{key}/{METADATA}")

    def vacant(self) -> bool:
        return all(name.endswith(PARTIAL) for name in self.names(""))

    def names(self, key: str) -> list[str]:
        import obstore

        with self._asking():
            found = obstore.list_with_delimiter(self.store, key or None)
        paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        return [path.rpartition("/")[2] for path in paths]

    def groups(self, key: str) -> list[str]:
        import obstore

        with self._asking():
            below = sorted(obstore.list_with_delimiter(self.store, key or None)["common_prefixes"])
        finished = self.each(lambda folder: self.exists(f"{folder}/{METADATA}"), below)
        return [folder for folder, there in zip(below, finished, strict=True) if there]

    def read(self, key: str) -> bytes:
        import obstore

        with self._asking():
            return bytes(obstore.get(self.store, key).bytes())

    def fetch(
        self, folder: str, names: Sequence[str], known: Callable[[Hashable], bool]
    ) -> Iterator[Callable[[], Fetched]]:
        listed = {item["path"].rpartition("/")[2]: item for item in self._list(folder)}
        ahead: deque[Future[Fetched]] = deque()
        with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="fetch") as threads:
            try:
                for name in names:
                    ahead.append(threads.submit(self._get, f"{folder}/{name}", listed.get(name), known))
                    if len(ahead) > _REQUESTS:
                        yield ahead.popleft().result
                while ahead:
                    yield ahead.popleft().result
            finally:
                threads.shutdown(cancel_futures=True)

    def _get(self, key: str, listed: Mapping[str, Any] | None, known: Callable[[Hashable], bool]) -> Fetched:
        import obstore

        if listed is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path(key))
        version, size = (key, listed["e_tag"], listed["last_modified"]), listed["size"]
        if known(version):
            return version, None
        if size <= _MOST_PER_REQUEST:
            return version, self.read(key)
        with self._asking():
            starts = range(0, size, _MOST_PER_REQUEST)
            ends = [min(start + _MOST_PER_REQUEST, size) for start in starts]
            ranges = zip(starts, ends, strict=True)
            return version, b"".join(obstore.get_range(self.store, key, start=a, end=b) for a, b in ranges)

    def size(self, key: str) -> int:
        return sum(item["size"] for item in self._list(key))

    def make(self) -> None:
        pass  # a prefix is there with its first object

    def make_folder(self, key: str) -> None:
        pass

    def write(self, key: str, pieces: Pieces) -> None:
        import obstore

        with self._asking("write"):
            obstore.put(self.store, key, b"".join(pieces), chunk_size=_MOST_PER_REQUEST)

    def delete(self, key: str) -> None:
        self._delete([key])

    def add_folder(self, key: str, files: Mapping[str, Pieces]) -> None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        below = {item["path"] for item in self._list(key)}
        if self.has_folder(key):  # asked after the list: what it holds is then nobody's but an unfinished folder's
            return
        self._delete(sorted(below.difference(f"{key}/{name}" for name in files)))
        self._put_content(key, files)
        try:
            with self._asking("write", but=(AlreadyExistsError, PreconditionError, NotSupportedError)):
                obstore.put(self.store, f"{key}/{METADATA}", b"".join(files[METADATA]), mode="create")
        except (AlreadyExistsError, PreconditionError):
            pass
        except NotSupportedError:  # no conditional writes there: of several at the same moment the last one stays
            self.write(f"{key}/{METADATA}", files[METADATA])

    def replace_folder(self, key: str, files: Mapping[str, Pieces]) -> None:
        self.remove_folder(key)  # also what is left of one whose making or removal was cut short
        self._put_content(key, files)
        self.write(f"{key}/{METADATA}", files[METADATA])

    def _put_content(self, key: str, files: Mapping[str, Pieces]) -> None:
        """All of a folder but what makes it count as there."""
        content = [name for name in files if name != METADATA]
        self.each(lambda name: self.write(f"{key}/{name}", files[name]), content)

    def remove_folder(self, key: str) -> None:
        below = [item["path"] for item in self._list(key)]
        # What makes a folder count as there goes before its content, and outer folders go before inner ones.
        metadata = {path for path in below if path.rpartition("/")[2] == METADATA}
        for path in sorted(metadata, key=lambda path: path.count("/")):
            self._delete([path])
        self._delete([path for path in below if path not in metadata])

    def sweep(self, key: str) -> None:
        pass  # an object is there whole or not at all

    def sweep_below(self, key: str) -> None:
        pass

    @contextmanager
    def alone(self) -> Iterator[bool]:
        token = uuid.uuid4().hex.encode()
        locked = self._lock(token)
        try:
            yield locked
        finally:
            with suppress(UserError, OSError):  # it may have been taken over, and it runs out by itself
                if self.read(_LOCK) == token:
                    self._delete([_LOCK])

    def _lock(self, token: bytes) -> bool:
        """Put the lock's object where there is none, or in the place of one that has not changed for a minute.

        Returns:
            False where there are no conditional writes, and so no lock.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        seen: dict[str, str] = {}
        since = time.monotonic()
        waiting = False
        while True:
            stale = bool(seen) and time.monotonic() - since > _LEASE
            try:
                with self._asking("write", but=(AlreadyExistsError, PreconditionError, NotSupportedError)):
                    obstore.put(self.store, _LOCK, token, mode=seen if stale else "create")
                return True
            except NotSupportedError:
                return False
            except (AlreadyExistsError, PreconditionError):
                pass
            try:
                with self._asking():
                    found = obstore.get(self.store, _LOCK)
                    holder = bytes(found.bytes())
            except FileNotFoundError:
                continue
            if holder == token:
                return True  # it is ours: only the answer was lost
            version = {name: found.meta[name] for name in ("e_tag", "version") if found.meta.get(name)}
            if version != seen:
                seen, since = version, time.monotonic()
            if not waiting:
                waiting = True
                say(f"waiting for another writer of {self.root} (at most {_LEASE:.0f} s if it was killed).")
            time.sleep(min(0.5, _LEASE / 4))

    def writing(self, key: str) -> AbstractContextManager[None]:
        return nullcontext()

    def use(self, key: str, *, shared: bool = False) -> object:
        return None

    def in_use(self, key: str) -> None:
        return None

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="bucket") as threads:
            return list(threads.map(function, items))

    def _list(self, key: str) -> list[Mapping[str, Any]]:
        import obstore

        with self._asking():
            return list(obstore.list(self.store, key or None).collect())

    def _delete(self, keys: list[str]) -> None:
        import obstore

        if keys:
            with self._asking("write"), suppress(FileNotFoundError):
                obstore.delete(self.store, keys)

    @contextmanager
    def _asking(self, what: str = "read", *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Turn refusals into one message each, `but` for some. No text of the server's is repeated: it may echo keys.

        Raises:
            FileNotFoundError: if there is no such object.
        """
        from obstore.exceptions import BaseError

        try:
            yield
        except but:
            raise
        except (BaseError, OSError) as error:
            fault, remedy = _refusal(error, self.root)
            if fault is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.root) from None
            raise StorageError(
                f"cannot {what} {self.root}: {fault}. Everything written so far is kept: {remedy}, then run the same "
                "command again."
            ) from None


_CREDENTIALS = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
_KEYS_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}


def _refusal(error: Exception, root: str) -> tuple[str | None, str]:
    """What went wrong and what to do; no fault if an object is simply not there."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    text = str(error).partition("Debug source")[0]
    named = re.search(r"<Code>(\w{1,60})</Code>", text)
    status = re.search(r"status code: (\d{3})", text)
    code = named[1] if named else f"HTTP status {status[1]}" if status else ""
    bucket = "/".join(root.split("/")[:3])
    if code in _NO_BUCKET or "bucket does not exist" in text:
        return f"{bucket} does not exist ({code})", "make it or name another --store"
    if isinstance(error, FileNotFoundError):
        return None, ""
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or code in _KEYS_REFUSED:
        variables = _CREDENTIALS[root.partition(":")[0]]
        return f"access was refused ({code})", f"check {variables}, and what they may do there"
    if "redirect" in text or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return f"{bucket} lies in another region ({code or 'redirected'})", "set AWS_REGION"
    if code:
        return f"the server refused ({code})", "look after it or name another --store"
    variable = " (and at AWS_ENDPOINT_URL)" * root.startswith("s3")
    return "it does not answer", f"look at the network{variable}"


def _connect(root: str) -> Any:
    """obstore's store for an address."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise UserError(f"{root} needs the package obstore: pip install 'mitofm[s3]'.") from None
    options: dict[str, Any] = {"client_options": {"timeout": _TIMEOUT}, "retry_config": _RETRIES}
    if root.startswith("s3:"):
        options |= _from_aws(root)
        if options.get("endpoint", "").startswith("http://"):
            options["client_options"]["allow_http"] = True  # asked for by its address
    try:
        return from_url(root, **options)
    except (BaseError, ValueError, TypeError):
        variables = _CREDENTIALS[root.partition(":")[0]]
        raise UserError(f"cannot open {root} with what the environment says: check {variables}.") from None


def _from_aws(root: str) -> dict[str, Any]:
    """Credentials, region and endpoint, as the AWS tools find them."""
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    found: dict[str, Any] = {"endpoint": named} if named else {}
    env = os.environ
    if env.get("AWS_SKIP_SIGNATURE") or (env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY")):
        return found  # obstore reads them itself
    missing = f"no credentials for {root}: set {_CREDENTIALS['s3']} (or AWS_SKIP_SIGNATURE=true for a public bucket)."
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise UserError(f"{missing} Profiles and roles need boto3: pip install 'mitofm[s3]'.") from None
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            raise UserError(missing)
        if not named:
            url = session.client("s3").meta.endpoint_url
            found |= {} if "amazonaws.com" in url else {"endpoint": url}
    except BotoCoreError as error:
        raise UserError(f"{missing} Found: {type(error).__name__}.") from None
    return found | {"credential_provider": Boto3CredentialProvider(session)}
