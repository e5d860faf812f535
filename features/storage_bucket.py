"""How are a store's files kept in a bucket, safe from crashes, lost answers and other processes?

A bucket puts an object whole or not at all, but renames nothing. A folder that holds a zarr.json is there exactly when
its zarr.json is, which is therefore put last and deleted first.
"""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from features.console import UserError, say
from features.files import PARTIAL
from features.storage import METADATA, Fetched, Pieces, R, StorageError, T

_REQUESTS = 16  # in flight
_MOST_PER_REQUEST = 16 * 2**20  # bytes; of a larger object every part is retried on its own
_TIMEOUT = "120s"  # per request, with its body
_RETRIES: dict[str, Any] = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}  # obstore's own defaults
_LEASE = 60.0  # seconds after which the lock of a killed writer may be taken over
_LOCK = f".writer{PARTIAL}"  # format 1 ignores such names


@dataclass(frozen=True)
class BucketStorage:
    """A prefix of a bucket; a `features.storage.Storage`. obstore itself repeats requests that fail in passing.

    Every method raises StorageError if the bucket refuses, does not exist, or does not answer.
    """

    root: str
    store: Any  # obstore's
    has_locks = False  # nothing in a bucket goes away with the process that made it

    def path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def exists(self, key: str) -> bool:
        if not key:
            return bool(self.list_folder(""))
        try:
            with self._asking():
                obstore.get(self.store, key)  # not head: without a body, a refusal does not say why
        except FileNotFoundError:
            return False
        return True

    def list_folder(self, key: str) -> dict[str, int]:
        with self._asking():
            listed = obstore.list_with_delimiter(self.store, key or None)
        sizes = dict.fromkeys(listed["common_prefixes"], 0) | {item["path"]: item["size"] for item in listed["objects"]}
        return {path.rpartition("/")[2]: size for path, size in sizes.items()}

    def read(self, key: str) -> bytes:
        with self._asking():
            return bytes(obstore.get(self.store, key).bytes())

    def fetch(
        self, folder: str, names: Sequence[str], known: Callable[[Hashable], bool]
    ) -> Iterator[Callable[[], Fetched]]:
        listed = {item["path"].rpartition("/")[2]: item for item in self._list_below(folder)}
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

    def write(self, key: str, pieces: Pieces) -> None:
        with self._asking("write"):
            obstore.put(self.store, key, b"".join(pieces), chunk_size=_MOST_PER_REQUEST)

    def put_folder(self, key: str, files: Mapping[str, Pieces], *, replace: bool = False) -> None:
        if replace:
            self.remove(key)  # also what is left of one whose making or removal was cut short
            self._put_content(key, files)
            self.write(f"{key}/{METADATA}", files[METADATA])
            return
        below = {item["path"] for item in self._list_below(key)}
        if self.exists(f"{key}/{METADATA}"):  # asked after listing: without it, all that was listed is unfinished
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

    def _put_content(self, key: str, files: Mapping[str, Pieces]) -> None:
        """Put all of a folder but what makes it count as there."""
        content = [name for name in files if name != METADATA]
        self.map(lambda name: self.write(f"{key}/{name}", files[name]), content)

    def remove(self, key: str) -> None:
        below = [item["path"] for item in self._list_below(key)] or [key]
        # What makes a folder count as there goes before its content, and outer folders go before inner ones.
        metadata = {path for path in below if path.rpartition("/")[2] == METADATA}
        for path in sorted(metadata, key=lambda path: path.count("/")):
            self._delete([path])
        self._delete([path for path in below if path not in metadata])

    def sweep(self, key: str) -> None:
        pass  # an object is there whole or not at all

    @contextmanager
    def lock(self) -> Iterator[bool]:
        token = uuid.uuid4().hex.encode()
        locked = self._take_lock(token)
        try:
            yield locked
        finally:
            with suppress(UserError, OSError):  # it may have been taken over, and it runs out by itself
                if self.read(_LOCK) == token:
                    self._delete([_LOCK])

    def _take_lock(self, token: bytes) -> bool:
        """Put the lock's object where there is none, or replace one that has not changed for a minute.

        Returns:
            False where there are no conditional writes, and so no lock.
        """
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
                    lock = obstore.get(self.store, _LOCK)
                    holder = bytes(lock.bytes())
            except FileNotFoundError:
                continue
            if holder == token:
                return True  # this process holds it: only the answer was lost
            version = {name: lock.meta[name] for name in ("e_tag", "version") if lock.meta.get(name)}
            if version != seen:
                seen, since = version, time.monotonic()
            if not waiting:
                waiting = True
                say(f"waiting for another writer of {self.root} (at most {_LEASE:.0f} s if it was killed).")
            time.sleep(min(0.5, _LEASE / 4))

    def claim(self, key: str, *, shared: bool = False) -> object:
        return None

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="bucket") as threads:
            return list(threads.map(function, items))

    def _list_below(self, key: str) -> list[Mapping[str, Any]]:
        with self._asking():
            return list(obstore.list(self.store, key or None).collect())

    def _delete(self, keys: list[str]) -> None:
        if keys:
            with self._asking("write"), suppress(FileNotFoundError):
                obstore.delete(self.store, keys)

    @contextmanager
    def _asking(self, what: str = "read", *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Turn refusals into one message each, except for `but`. The server's text may hold keys and is not repeated.

        Raises:
            FileNotFoundError: if there is no such object.
        """
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
    """Say what went wrong and what to do; no fault if an object is simply not there."""
    text = str(error).partition("Debug source")[0]
    xml_code = re.search(r"<Code>(\w{1,60})</Code>", text)
    status = re.search(r"status code: (\d{3})", text)
    code = xml_code[1] if xml_code else f"HTTP status {status[1]}" if status else ""
    bucket = "/".join(root.split("/")[:3])
    if code in _NO_BUCKET or "bucket does not exist" in text:
        return f"{bucket} does not exist ({code})", "make it or name another `store`"
    if isinstance(error, FileNotFoundError):
        return None, ""
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or code in _KEYS_REFUSED:
        variables = _CREDENTIALS[root.partition(":")[0]]
        return f"access was refused ({code})", f"check {variables}, and what they may do there"
    if "redirect" in text or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return f"{bucket} lies in another region ({code or 'redirected'})", "set AWS_REGION"
    if code:
        return f"the server refused ({code})", "look after it or name another `store`"
    variable = " (and at AWS_ENDPOINT_URL)" * root.startswith("s3")
    return "it does not answer", f"look at the network{variable}"


def connect(root: str) -> Any:
    """Make obstore's store for an address."""
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
    """Find credentials, region and endpoint as the AWS tools do."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    env = os.environ
    if env.get("AWS_SKIP_SIGNATURE") or (env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY")):
        return options  # obstore reads them itself
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
        if not endpoint:
            url = session.client("s3").meta.endpoint_url
            options |= {} if "amazonaws.com" in url else {"endpoint": url}
    except BotoCoreError as error:
        raise UserError(f"{missing} Found: {type(error).__name__}.") from None
    return options | {"credential_provider": Boto3CredentialProvider(session)}
