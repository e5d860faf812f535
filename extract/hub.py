"""How does a file get here from the Hugging Face hub, and what does a message say if it does not?

Everything goes through huggingface_hub's public functions, so its cache, its environment variables (`HF_HOME`,
`HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN`) and its login work as everywhere else. A cached file of a pinned commit
needs neither network nor token. No message ever contains a token.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]
from huggingface_hub.utils import logging as hub_logging

from extract.hub_settings import faulty_setting
from features.console import UserError, progress, say

# huggingface_hub has used requests, httpx and httpx2. In each, the class from which its errors derive is the root of
# the transport's errors, and all other errors are OSErrors.
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_TRANSPORT = _TRANSPORT_ERROR.__module__.partition(".")[0]
_INVALID_URL: type[Exception] = getattr(
    sys.modules[_TRANSPORT], "InvalidURL", ValueError
)  # of httpx: no error above it
# The last three come from settings that the client cannot use.
_DOWNLOAD_ERRORS: tuple[type[Exception], ...] = (
    *(_TRANSPORT_ERROR, OSError, EntryNotFoundError, RuntimeError),
    *(_INVALID_URL, ValueError, ImportError),
)

TOKEN_REJECTED = (
    "The hub rejected your token (401): it is mistyped, expired or revoked. Create a new one on "
    "https://huggingface.co/settings/tokens and pass it in HF_TOKEN, or run `hf auth login`. "
    "A repository that is not gated needs none: unset HF_TOKEN or run `hf auth logout`."
)
LOCAL_FILE = "pass a local file with `weights=PATH`"  # a remedy, in a sentence


@dataclass(frozen=True)
class HubFile:
    """A file in the local cache and the commit it belongs to."""

    path: Path
    commit: str


class MissingFile(UserError):
    """The repository is there and readable, but has no file of that name."""


def fetch_file(repo: str, filename: str, *, revision: str, licence: str = "") -> HubFile:
    """Fetch one file of a model repository, from the cache or the hub.

    A pinned commit that is cached is used as it is. Otherwise the hub is asked once what `revision` means now. If it
    does not answer, the cached copy of a branch is used, and its commit is named on stderr.

    Args:
        repo: "organisation/name".
        filename: the file's path in the repository.
        revision: a 40-digit commit, or a branch or tag ("main").
        licence: named in the message of a gated repository.

    Raises:
        UserError: no access, no such repository, revision or file, hub out of reach and nothing cached, disk full.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision) and (path := _cached(repo, filename, revision)):
        return HubFile(path, revision)
    try:
        # This question is asked once, so a hub that is down or busy is known at once. hf_hub_download would repeat it
        # for 23 seconds or longer; that patience is left to a download that has begun.
        _ask(repo, filename, revision)
        with _quiet():
            path = Path(hf_hub_download(repo, filename, revision=revision))
    except _DOWNLOAD_ERRORS as error:
        cached = _cached(repo, filename, revision)
        if cached is None or _is_about_the_disk(error):
            _explain(error, repo, filename, revision, licence)
        path = cached
        say(
            f"{repo}: the hub cannot be asked what '{revision}' is now ({type(error).__name__}); using the cached "
            f"commit {_commit(path, filename)[:12]}."
        )
    return HubFile(path, _commit(path, filename))


def endpoint() -> str:
    """Return the hub's address, without a password."""
    return re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)


def refuse_malformed_token() -> None:
    """Raise UserError for a token that no hub can have given out."""
    token = get_token()
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        # Sent anyway, it would come back inside the transport's error message.
        raise UserError(
            "The hub token holds characters that no token has (a space, a line break or a typographic quote, copied "
            "along with it?). Set HF_TOKEN to the bare token, or run `hf auth login`."
        )


def check_hub() -> bool | None:
    """Ask the hub whether it answers and, where there is a token, whether it accepts the token.

    Returns:
        Whether the token is accepted; None where there is none.

    Raises:
        UserError: if the hub does not answer, or only with an error.
    """
    has_token = get_token() is not None
    url = f"{constants.ENDPOINT}/api/whoami-v2" if has_token else constants.ENDPOINT
    try:
        with _quiet():
            response = get_session().get(url, headers=build_hf_headers(), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except _DOWNLOAD_ERRORS as error:
        if fault := faulty_setting(_TRANSPORT):
            raise UserError(f"The hub cannot be asked: {fault}") from None
        raise UserError(
            f"{endpoint()} could not be asked ({type(error).__name__}). Check the connection, HF_ENDPOINT and any "
            "proxy; what is in the cache works without the hub, at once with HF_HUB_OFFLINE=1."
        ) from None
    if response.status_code == 429 or response.status_code >= 500:
        raise UserError(f"{endpoint()} answers {response.status_code}: try again in a few minutes.")
    return response.status_code != 401 if has_token else None


def check_access(repo: str, filename: str, *, revision: str, licence: str = "") -> None:
    """Ask the hub, once and without downloading, whether `fetch_file` could have this file.

    Raises:
        UserError: the one `fetch_file` would raise.
    """
    try:
        _ask(repo, filename, revision)
    except _DOWNLOAD_ERRORS as error:
        _explain(error, repo, filename, revision, licence)


def cached_commit(repo: str, filename: str, *, revision: str) -> str | None:
    """Find the commit of the cached file that `revision` means; None where it is not cached. No server is asked."""
    path = _cached(repo, filename, revision)
    return None if path is None else _commit(path, filename)


def published_sha256(path: Path) -> str | None:
    """Find the SHA-256 that the hub gave for a cached file; None where it gave none.

    The cache keeps a file under its ETag, which for large files is that digest; a snapshot's name is a link to it.
    huggingface_hub itself compares sizes only.
    """
    blob = path.resolve().name
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None


def sha256_of(path: Path) -> str:
    """Compute the hex SHA-256 of a file, with a progress bar (weights reach 4.5 GB)."""
    digest = hashlib.sha256()
    with path.open("rb") as file, progress(f"checking {path.name}", path.stat().st_size, unit="bytes") as advance:
        while block := file.read(1 << 23):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _ask(repo: str, filename: str, revision: str) -> None:
    refuse_malformed_token()
    with _quiet():
        get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence huggingface_hub's warnings: they quote addresses, which may hold a password or a signature."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def _cached(repo: str, filename: str, revision: str) -> Path | None:
    path = try_to_load_from_cache(repo, filename, revision=revision)
    return Path(path) if isinstance(path, str) else None  # or a marker object for "known not to exist"


def _commit(path: Path, filename: str) -> str:
    """Read the commit from the path `<cache>/models--org--name/snapshots/<commit>/<filename>`."""
    return path.parents[filename.count("/")].name


def _is_about_the_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "it is not writable",
    errno.EPERM: "it is not writable",
    errno.EROFS: "it is read-only",
}
_FOLDER_ERRORS = {
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "a part of this path is a file, not a folder",
    errno.ENOENT: "it cannot be created",
}


def _cache_variable() -> str:
    return next((name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if os.environ.get(name)), "HF_HOME")


def _explain(error: Exception, repo: str, filename: str, revision: str, licence: str) -> NoReturn:
    """Raise a UserError that explains a failed download. The cause is dropped: it may quote request headers."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, _DOWNLOAD_ERRORS):
        error = error.__cause__  # out of reach, and nothing cached: the cause says why it is out of reach
    page = f"https://huggingface.co/{repo}"
    local = f"Or {LOCAL_FILE}."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    message: str
    if isinstance(error, GatedRepoError):
        refusal = "no token was found" if get_token() is None else "your token has no access to it"
        message = (
            f"{repo} is gated and {refusal}.\n"
            f"  1. Request access on {page} (log in; licence: {licence or 'see that page'}) and wait for approval.\n"
            "  2. Create a token on https://huggingface.co/settings/tokens with read access to gated repositories.\n"
            f"  3. Pass it in the environment variable HF_TOKEN, or run `hf auth login`.\n{local}"
        )
    elif isinstance(error, RevisionNotFoundError):
        message = f"{repo} has no revision '{revision}'. {page}/commits/main lists its commits."
    elif isinstance(error, EntryNotFoundError) and status is not None:
        raise MissingFile(
            f"{repo} has no file '{filename}' at revision '{revision}'. {page}/tree/main lists its files."
        ) from None
    elif isinstance(error, RepositoryNotFoundError):
        hint = "" if get_token() else " If it is private, pass a token in HF_TOKEN or run `hf auth login`."
        message = f"The hub has no repository '{repo}' that you may read. Check the name on {page}.{hint}"
    elif status == 401:
        message = TOKEN_REJECTED
    elif status == 403:
        message = (
            f"The hub refused {repo} (403): your token lacks the permission. Open {page}, check that you may see its "
            f"files, and give the token read access to gated repositories. {local}"
        )
    elif status is not None:
        reason = "too many requests" if status == 429 else "a fault on its side" if status >= 500 else "unexpected"
        message = (
            f"The hub answered {status} ({reason}) for {repo}, and {filename} is not cached. Try again in a few "
            f"minutes. {local}"
        )
    elif isinstance(error, OfflineModeIsEnabled):
        message = (
            f"HF_HUB_OFFLINE is set and {repo}/{filename} (revision '{revision}') is not in the cache "
            f"{constants.HF_HUB_CACHE}. Run once without it, or point HF_HOME at the cache that has the file. {local}"
        )
    elif not _is_about_the_disk(error) and (fault := faulty_setting(_TRANSPORT)):
        message = f"{repo}/{filename} is not cached, and the hub cannot be asked: {fault} {local}"
    elif isinstance(error, OSError) and (obstacle := (_DISK_ERRORS | _FOLDER_ERRORS).get(error.errno or 0)):
        message = (
            f"{repo}/{filename} could not be saved to the cache {constants.HF_HUB_CACHE}: {obstacle}. "
            f"Free space or permit writing there, or point {_cache_variable()} at another disk, then run again."
        )
    else:
        message = (
            f"{repo}/{filename} is not cached and could not be fetched from {endpoint()} "
            f"({type(error).__name__}). Check the connection, HF_ENDPOINT and any proxy, then run again. {local}"
        )
    raise UserError(message) from None
