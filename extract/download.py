"""How do the public patches get onto this machine, whole and unchanged?

The archive of the benchmark's repository is downloaded at a pinned commit into a cache folder and unpacked beside its
final place. The folder takes its final name only after the caller has verified it, so a folder of that name is always
whole. An interrupted download is continued where it broke off. docs/decisions/dependencies.md says why no library does
this.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from features.console import UserError, progress, say

# The repository's state of 2025-12-12 (MIT licence). GitHub resolves the abbreviation; `git archive` writes the whole
# commit id into the archive, and that is compared as well.
COMMIT = "3acf4da"
ARCHIVE_URL = f"https://github.com/DeepMicroscopy/AMi-Br_Benchmark/archive/{COMMIT}.tar.gz"
FOLDER = f"AMi-Br_Benchmark-{COMMIT}"
WANTED = frozenset(
    {"AMi-Br", "AtNorM-Br", "AtNorM-MD", "amibr_train_split.csv", "AtNorM-MD_expert_votes.csv", "AMI-BR.csv"}
)

_TIMEOUT = 30  # seconds without a byte
_ATTEMPTS = 3
_BLOCK = 1 << 20
_USUAL_BYTES = 215_000_000  # GitHub sends archives without a length; this one is about the size of its patches
_MAX_BYTES = 2_000_000_000  # ten times the real contents: whatever is bigger is not this repository
_CACHE_REMEDY = "Make room or choose another cache folder with MITOFM_CACHE, or give the data with `data=DIR`."
_SAFE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_NETWORK = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)
_DAMAGED_ARCHIVE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)


def cache_folder() -> Path:
    """Find where downloads are kept: MITOFM_CACHE, else XDG_CACHE_HOME/mitofm, else ~/.cache/mitofm."""
    if folder := os.environ.get("MITOFM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mitofm"


def downloaded() -> Path | None:
    """Find the folder of the verified download; None where there has been none."""
    folder = cache_folder() / FOLDER
    return folder if folder.is_dir() else None


def fetch_benchmark(verify: Callable[[Path], None]) -> Path:
    """Fetch the benchmark's data folder, laid out like a clone; it is downloaded, verified and kept on first use.

    Args:
        verify: raises UserError when the unpacked folder is not what it should be; it is then thrown away.

    Raises:
        UserError: when the archive cannot be had, is damaged or unsafe, or does not verify.
    """
    url = os.environ.get("MITOFM_DATA_URL") or ARCHIVE_URL
    cache = _make_folder(cache_folder())
    with _locked(cache / f"{FOLDER}.lock"):
        if (folder := downloaded()) is not None:
            return folder
        archive = cache / f"{FOLDER}.tar.gz"
        _download(url, archive)
        with tempfile.TemporaryDirectory(prefix=f"{FOLDER}.", dir=cache) as temporary:
            unpacked = Path(temporary) / FOLDER
            try:
                unpack(archive, unpacked)
                verify(unpacked)
            except UserError as error:
                archive.unlink()
                raise UserError(
                    f"The download from {url} is not usable: {error}\nIt was thrown away. Run again to repeat it, or "
                    "give a clone of the repository with `data=DIR`."
                ) from None
            except OSError as error:
                raise UserError(f"Could not unpack {archive} ({error}). {_CACHE_REMEDY}") from None
            unpacked.rename(cache / FOLDER)
        archive.unlink()
    return cache / FOLDER


def fetch_file(url: str, sha256: str) -> Path:
    """Fetch one file into the cache on first use; it is kept only if its SHA-256 is `sha256`.

    Raises:
        UserError: when it cannot be had or its digest differs.
    """
    cache = _make_folder(cache_folder())
    path = cache / PurePosixPath(urlsplit(url).path).name
    with _locked(path.with_name(f"{path.name}.lock")):
        if not path.is_file():
            fresh = path.with_name(f"{path.name}.new")
            _download(url, fresh)
            digest = hashlib.sha256(fresh.read_bytes()).hexdigest()
            if digest != sha256:
                fresh.unlink()
                raise UserError(f"The file at {url} has SHA-256 {digest}, expected {sha256}; it was thrown away.")
            fresh.rename(path)
    return path


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the wanted files of a repository's tar.gz into `folder`, without the archive's own top folder.

    Hidden files and everything the repository holds besides the data are left out.

    Raises:
        UserError: when the archive is damaged, of another commit, or has a member that is absolute, climbs out of the
            archive, or is a link or device where a data file should be. Nothing outside `folder` is ever written.
    """
    n_bytes = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = _wanted_path(member)
                if path is None:
                    continue
                n_bytes += member.size
                if n_bytes > _MAX_BYTES:
                    raise UserError(f"the archive unpacks to more than {_MAX_BYTES:,} bytes.")
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None  # a regular file, as _wanted_path has made sure
                with source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, _BLOCK)
            commit = tar.pax_headers.get("comment", COMMIT)
    except _DAMAGED_ARCHIVE as error:
        raise UserError(f"the archive is damaged or not a tar.gz ({error}).") from None
    except FileExistsError as error:
        raise UserError(f"the archive holds {error.filename} twice.") from None
    if not commit.startswith(COMMIT):
        raise UserError(f"the archive is of commit {commit}, expected {COMMIT}.")


def _wanted_path(member: tarfile.TarInfo) -> PurePosixPath | None:
    """Find where a member goes below the data folder; None for what is not needed.

    A name that points outside the archive is refused even if the file is not needed: whoever made it meant harm.
    """
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"the archive's member {member.name!r} points outside the archive.")
    parts = path.parts[1:]
    if not parts or parts[0] not in WANTED or member.isdir() or parts[-1].startswith("."):
        return None
    if not member.isreg():
        raise UserError(f"the archive's member {member.name!r} is not a regular file.")
    if not all(_SAFE_PART.fullmatch(part) for part in parts):
        raise UserError(f"the archive's member {member.name!r} has a name that is not safe on every system.")
    return PurePosixPath(*parts)


def _download(url: str, path: Path) -> None:
    """Download `url` to `path`, which appears only when complete; what arrived before a break is kept and continued."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url} is not a web address: only http:// and https:// are fetched (see MITOFM_DATA_URL).")
    if path.is_file():
        return
    part = path.with_name(f"{path.name}.part")
    for attempt in range(1, _ATTEMPTS + 1):
        before = _size(part)
        try:
            _fetch(url, part)
            break
        except _NETWORK as error:
            if attempt < _ATTEMPTS and _size(part) > before:
                continue  # it broke off on the way: ask for the rest
            raise UserError(
                f"Could not download {url} ({_reason(error)}). Expected a connection to it. Run again when there is "
                "one (what has arrived is kept), or clone https://github.com/DeepMicroscopy/AMi-Br_Benchmark elsewhere "
                "and give its folder with `data=DIR` or the environment variable MITOFM_DATA."
            ) from None
        except OSError as error:
            raise UserError(f"Could not write {part} ({error}). {_CACHE_REMEDY}") from None
    part.rename(path)
    _validator(part).unlink(missing_ok=True)


def _fetch(url: str, part: Path) -> None:
    """Make one request: append to `part` what is missing, or start over where the server cannot resume."""
    validator = _validator(part)
    request = urllib.request.Request(url, headers={"User-Agent": "mitofm"})
    start = _size(part)
    if start and validator.is_file():
        # If-Range: the rest is sent only when the file is still the one the first part came from.
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", validator.read_text())
    try:
        response = _opener().open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        part.unlink()  # what we have is longer than the file: it is another file
        response = _opener().open(urllib.request.Request(url, headers={"User-Agent": "mitofm"}), timeout=_TIMEOUT)
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT and response.headers.get(
            "Content-Range", ""
        ).startswith(f"bytes {start}-")
        if response.status == http.HTTPStatus.PARTIAL_CONTENT and not resumed:
            raise http.client.HTTPException("the server sent another range than the one asked for")
        if not resumed:
            start = 0
            part.unlink(missing_ok=True)
            etag = response.headers.get("ETag", "")
            validator.unlink(missing_ok=True)
            if etag.startswith('"'):  # a weak validator (W/"...") does not promise identical bytes
                validator.write_text(etag)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        _copy(response, part, start=start, total=total)


def _copy(response: IO[bytes], part: Path, *, start: int, total: int | None) -> None:
    n_bytes = start
    with part.open("ab") as file, progress("download", (total or _USUAL_BYTES) // _BLOCK, "MB") as advance:
        advance(start // _BLOCK)
        while block := response.read(_BLOCK):
            file.write(block)
            advance((n_bytes + len(block)) // _BLOCK - n_bytes // _BLOCK)
            n_bytes += len(block)
            if n_bytes > _MAX_BYTES:
                raise UserError(f"The download is larger than {_MAX_BYTES:,} bytes: this is not the data. Stopped.")
    if total is not None and n_bytes != total:
        raise http.client.HTTPException(f"the connection closed after {n_bytes:,} of {total:,} bytes")


def _opener() -> urllib.request.OpenerDirector:
    """Make an opener for http and https only: urllib's default one follows redirects to ftp and opens files."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Let one process at a time download; the others wait, then find the result. A killed process holds no lock."""
    file_lock = FileLock(lock)
    try:
        file_lock.acquire(timeout=1)
    except Timeout:
        say(f"Another process is downloading (lock {lock}); waiting for it ...")
        file_lock.acquire()
    try:
        yield
    finally:
        file_lock.release()


def _make_folder(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The cache folder {cache} cannot be made ({error}). {_CACHE_REMEDY}") from None
    if not os.access(cache, os.W_OK):
        raise UserError(f"The cache folder {cache} cannot be written to. {_CACHE_REMEDY}")
    return cache


def _validator(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)  # str(error) wraps it in angle brackets
    return str(error) or type(error).__name__
