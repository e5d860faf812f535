"""Is a download whole or absent, resumed rather than repeated, and unable to write anywhere but its own folder?"""

from __future__ import annotations

import hashlib
import http.server
import io
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extract import benchmark, download
from extract.datasets import DATASETS, load_dataset
from features.console import UserError

TOP = "AMi-Br_Benchmark-3acf4da"


@dataclass
class Server:
    """An http server of one file that counts requests and can break off, forget ranges or change the file."""

    body: bytes = b""
    etag: str | None = '"one"'
    ranges: bool = True
    cut: list[int] = field(default_factory=list)  # bytes to send before breaking off, one per request
    status: int = 200
    location: str | None = None  # where the first request is sent
    wrong_range: bool = False
    asked: list[str | None] = field(default_factory=list)  # the Range header of each request
    url: str = ""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            state.asked.append(wanted)
            if state.location or state.status != 200:
                self.send_response(302 if state.location else state.status)
                self.send_header("Location", state.location or "")
                self.end_headers()
                state.location = None
                return
            start = 0
            if wanted and state.ranges and self.headers["If-Range"] == state.etag:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(state.body) > 0:
                self.send_response(416)
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                shown = start + 1 if state.wrong_range else start
                self.send_header("Content-Range", f"bytes {shown}-{len(state.body) - 1}/{len(state.body)}")
            if state.etag:
                self.send_header("ETag", state.etag)
            self.send_header("Content-Length", str(len(state.body) - start))
            self.end_headers()
            rest = state.body[start:]
            self.wfile.write(rest[: state.cut.pop(0)] if state.cut else rest)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        state.url = f"http://127.0.0.1:{httpd.server_port}/archive.tar.gz"
        yield state
        httpd.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MITOFM_CACHE", str(folder))
    monkeypatch.setenv("MITOFM_DATA_URL", server.url)
    monkeypatch.delenv("MITOFM_DATA", raising=False)
    return folder


def tar_gz(members: dict[str, bytes], *extra: tarfile.TarInfo, commit: str | None = None) -> bytes:
    buffer = io.BytesIO()
    headers = {"comment": commit} if commit else {}
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return buffer.getvalue()


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def accept(folder: Path) -> None:
    """Any contents will do."""


SMALL = {f"{TOP}/AMi-Br/Normal/a.png": b"a" * 1000, f"{TOP}/README.md": b"no", f"{TOP}/AMi-Br/.DS_Store": b"no"}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- a whole download -------------------------------------------------------------------------------------------------


def test_only_the_data_is_unpacked_and_nothing_else_remains(server: Server, cache: Path) -> None:
    server.body = tar_gz(SMALL)
    folder = download.fetch_benchmark(accept)
    assert folder == cache / TOP == download.downloaded()
    assert files(folder) == ["AMi-Br/Normal/a.png"]
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [TOP]


def test_a_second_use_asks_for_nothing(server: Server) -> None:
    server.body = tar_gz(SMALL)
    download.fetch_benchmark(accept)
    download.fetch_benchmark(accept)
    assert len(server.asked) == 1


def test_the_cache_follows_the_xdg_convention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MITOFM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert download.cache_folder() == tmp_path / "mitofm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert download.cache_folder() == tmp_path / "home" / ".cache" / "mitofm"


def test_a_redirect_is_followed(server: Server) -> None:
    server.body, server.location = tar_gz(SMALL), server.url
    assert files(download.fetch_benchmark(accept)) == ["AMi-Br/Normal/a.png"]
    assert len(server.asked) == 2


def test_a_redirect_away_from_the_web_is_refused(server: Server) -> None:
    server.location = "ftp://127.0.0.1/archive.tar.gz"
    with pytest.raises(UserError, match="Could not download"):
        download.fetch_benchmark(accept)


# --- interrupted downloads --------------------------------------------------------------------------------------------


def test_a_broken_connection_is_resumed_where_it_broke(server: Server) -> None:
    server.body, server.cut = tar_gz(SMALL), [100]
    download.fetch_benchmark(accept)
    assert server.asked == [None, "bytes=100-"]


def test_a_later_run_resumes_too(server: Server, cache: Path) -> None:
    server.body, server.cut = tar_gz(SMALL), [100, 0, 0]
    with pytest.raises(UserError, match="the connection closed after 100 of"):
        download.fetch_benchmark(accept)
    assert download.downloaded() is None
    assert (cache / f"{TOP}.tar.gz.part").stat().st_size == 100
    server.cut = []
    download.fetch_benchmark(accept)
    assert server.asked[-1] == "bytes=100-"


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_the_download_starts_over(server: Server, etag: str | None) -> None:
    server.body, server.cut, server.etag = tar_gz(SMALL), [100], etag
    download.fetch_benchmark(accept)
    assert server.asked == [None, None]


def test_a_server_without_ranges_starts_over(server: Server) -> None:
    server.body, server.cut, server.ranges = tar_gz(SMALL), [100], False
    assert files(download.fetch_benchmark(accept)) == ["AMi-Br/Normal/a.png"]


def test_another_file_on_the_server_starts_over(server: Server) -> None:
    server.body, server.cut = tar_gz(SMALL), [100, 0]
    with pytest.raises(UserError):
        download.fetch_benchmark(accept)
    server.body, server.etag = tar_gz({f"{TOP}/AMi-Br/Normal/b.png": b"b"}), '"two"'
    assert files(download.fetch_benchmark(accept)) == ["AMi-Br/Normal/b.png"]


def test_a_part_longer_than_the_file_starts_over(server: Server, cache: Path) -> None:
    server.body = tar_gz(SMALL)
    cache.mkdir()
    (cache / f"{TOP}.tar.gz.part").write_bytes(bytes(len(server.body) + 5))
    (cache / f"{TOP}.tar.gz.part.etag").write_text('"one"')
    assert files(download.fetch_benchmark(accept)) == ["AMi-Br/Normal/a.png"]


def test_a_range_that_was_not_asked_for_is_not_joined(server: Server) -> None:
    server.body, server.cut, server.wrong_range = tar_gz(SMALL), [100], True
    with pytest.raises(UserError, match="another range"):
        download.fetch_benchmark(accept)


def test_an_archive_left_by_a_killed_run_is_unpacked_without_the_network(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / f"{TOP}.tar.gz").write_bytes(tar_gz(SMALL))
    assert files(download.fetch_benchmark(accept)) == ["AMi-Br/Normal/a.png"]
    assert server.asked == []


def test_two_processes_at_once_download_once(server: Server, cache: Path) -> None:
    server.body = tar_gz({f"{TOP}/AMi-Br/Normal/{n}.png": bytes(5_000) for n in range(50)})
    program = "from extract.download import *; print(len(list(fetch_benchmark(lambda _: None).rglob('*.png'))))"
    runs = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate(timeout=60)[0].strip() for run in runs] == ["50", "50"]
    assert len(server.asked) == 1


# --- what is refused --------------------------------------------------------------------------------------------------


def test_an_unreachable_server_is_one_message_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MITOFM_DATA_URL", "http://127.0.0.1:9/x.tar.gz")
    with pytest.raises(UserError, match=r"Could not download http://127.0.0.1:9.*refused.*`data=DIR`"):
        load_dataset("ami-br")


def test_a_missing_page_is_one_message(server: Server) -> None:
    server.status = 404
    with pytest.raises(UserError, match="HTTP Error 404"):
        download.fetch_benchmark(accept)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x.tar.gz", "x.tar.gz"])
def test_only_web_addresses_are_fetched(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("MITOFM_DATA_URL", url)
    with pytest.raises(UserError, match="only http:// and https://"):
        download.fetch_benchmark(accept)


def test_a_download_that_does_not_verify_is_thrown_away(server: Server, cache: Path) -> None:
    server.body = tar_gz(SMALL)

    def refuse(folder: Path) -> None:
        raise UserError("one patch differs")

    with pytest.raises(UserError, match="one patch differs\nIt was thrown away"):
        download.fetch_benchmark(refuse)
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"<html>not here</html>"])
def test_a_damaged_archive_is_thrown_away(server: Server, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    server.body = damage(tar_gz(SMALL))
    with pytest.raises(UserError, match="damaged or not a tar"):
        download.fetch_benchmark(accept)
    assert download.downloaded() is None
    assert not (cache / f"{TOP}.tar.gz").exists()


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (tar_gz({f"{TOP}/../../evil": b"x"}), "points outside"),
        (tar_gz({"/tmp/evil": b"x"}), "points outside"),
        (tar_gz({f"{TOP}/AMi-Br/../../evil": b"x"}), "points outside"),
        (tar_gz({}, member(f"{TOP}/AMi-Br/Normal/a.png", tarfile.SYMTYPE, "/etc/passwd")), "not a regular file"),
        (tar_gz({}, member(f"{TOP}/AMi-Br", tarfile.SYMTYPE, "/tmp")), "not a regular file"),
        (tar_gz({}, member(f"{TOP}/AMi-Br/a.png", tarfile.LNKTYPE, "/etc/passwd")), "not a regular file"),
        (tar_gz({}, member(f"{TOP}/AMi-Br/a.png", tarfile.FIFOTYPE)), "not a regular file"),
        (tar_gz({f"{TOP}/AMi-Br/a\\b.png": b"x"}), "not safe on every system"),
        (tar_gz({f"{TOP}/AMi-Br/C:": b"x"}), "not safe on every system"),
        (tar_gz(SMALL, commit="0" * 40), "is of commit 0000"),
    ],
)
def test_an_unsafe_or_foreign_archive_writes_nothing(tmp_path: Path, archive: bytes, message: str) -> None:
    (tmp_path / "a.tar.gz").write_bytes(archive)
    before = files(tmp_path)
    with pytest.raises(UserError, match=message):
        download.unpack(tmp_path / "a.tar.gz", tmp_path / "inside" / "folder")
    assert [name for name in files(tmp_path) if not name.startswith("inside/folder/")] == before


def test_an_archive_may_name_its_commit(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(tar_gz(SMALL, commit=download.COMMIT + "0" * 33))
    download.unpack(tmp_path / "a.tar.gz", tmp_path / "folder")
    assert files(tmp_path / "folder") == ["AMi-Br/Normal/a.png"]


def test_an_archive_that_swells_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MAX_BYTES", 10_000)
    (tmp_path / "a.tar.gz").write_bytes(tar_gz({f"{TOP}/AMi-Br/{n}.png": bytes(4_000) for n in range(9)}))
    with pytest.raises(UserError, match="unpacks to more than 10,000 bytes"):
        download.unpack(tmp_path / "a.tar.gz", tmp_path / "folder")


def test_a_file_twice_in_an_archive_is_refused(tmp_path: Path) -> None:
    twice = [member(f"{TOP}/AMi-Br/a.png", tarfile.REGTYPE)] * 2
    (tmp_path / "a.tar.gz").write_bytes(tar_gz({}, *twice))
    with pytest.raises(UserError, match="twice"):
        download.unpack(tmp_path / "a.tar.gz", tmp_path / "folder")


def test_a_cache_that_cannot_be_made_names_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MITOFM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="choose another cache folder with MITOFM_CACHE"):
        download.fetch_benchmark(accept)


# --- single files -----------------------------------------------------------------------------------------------------


def test_a_single_file_is_kept_only_with_the_right_digest(server: Server, cache: Path) -> None:
    server.body = b"a table"
    with pytest.raises(UserError, match="it was thrown away"):
        download.fetch_file(server.url, "0" * 64)
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []
    path = download.fetch_file(server.url, hashlib.sha256(server.body).hexdigest())
    assert path.read_bytes() == b"a table"
    download.fetch_file(server.url, hashlib.sha256(server.body).hexdigest())
    assert len(server.asked) == 2


# --- from an address to patches ---------------------------------------------------------------------------------------


@pytest.fixture
def small_repository(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """An archive with two patches of AMi-Br and two of AtNorM-Br, and records that expect just these."""

    def png(seed: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    ami_br = {"Atypical/MIDOG21_1.png": png(0), "Normal/TUPAC16_2.png": png(1)}
    atnorm_br = {"Atypical/1.png": png(2), "Normal/2.png": png(3)}
    train = b"dataset_uid,final_label\nMIDOG21_1.png,Atypical\n"
    experts = b"expert1_atypical,expert2_atypical,expert3_atypical,majority_atypical"
    votes = b"slide,dataset,uid," + experts + b"\na,MIDOG21,1,True,True,True,True\nb,TUPAC16,2" + b",False" * 4 + b"\n"
    members = {f"{TOP}/AMi-Br/{name}": data for name, data in ami_br.items()}
    members |= {f"{TOP}/AtNorM-Br/{name}": data for name, data in atnorm_br.items()}
    members |= {f"{TOP}/amibr_train_split.csv": train, f"{TOP}/AMI-BR.csv": votes}
    kept = {name: DATASETS[name] for name in ("ami-br", "atnorm-br")}
    for name in ("atnorm-br", "atnorm-md"):  # put back in the other order, so that the table keeps its own
        monkeypatch.delitem(DATASETS, name)
    for name, patches in (("ami-br", ami_br), ("atnorm-br", atnorm_br)):
        digest = benchmark.files_digest(patches, [hashlib.sha256(data).hexdigest() for data in patches.values()])
        size = sum(map(len, patches.values()))
        small = replace(kept[name], n_atypical=1, n_normal=1, n_bytes=size, digest=digest)
        monkeypatch.setitem(DATASETS, name, small)
    monkeypatch.setattr(benchmark, "TABLE_SHA256", {"amibr_train_split.csv": hashlib.sha256(train).hexdigest()})
    server.body = tar_gz(members)
    return members


def test_a_known_dataset_is_downloaded_when_no_folder_is_given(small_repository: dict[str, bytes]) -> None:
    samples = load_dataset("ami-br").samples
    assert samples.split.tolist() == ["train", "test"]
    assert samples.group.tolist() == ["a", "b"]
    assert len(load_dataset("atnorm-br").samples) == 2


def test_a_changed_patch_makes_the_whole_download_unusable(
    server: Server, small_repository: dict[str, bytes], cache: Path
) -> None:
    name = f"{TOP}/AtNorM-Br/Normal/2.png"
    changed = bytearray(small_repository[name])
    changed[60] ^= 1
    server.body = tar_gz(small_repository | {name: bytes(changed)})
    with pytest.raises(UserError, match="AtNorM-Br differs from the published files: digest"):
        load_dataset("ami-br")
    assert download.downloaded() is None


@pytest.mark.parametrize("table", [b"dataset_uid,final_label\n", None])
def test_a_changed_or_missing_table_makes_the_download_unusable(
    server: Server, small_repository: dict[str, bytes], table: bytes | None
) -> None:
    name = f"{TOP}/amibr_train_split.csv"
    members = {key: data for key, data in small_repository.items() if key != name}
    server.body = tar_gz(members | ({name: table} if table is not None else {}))
    with pytest.raises(UserError, match=r"amibr_train_split.csv has SHA-256"):
        load_dataset("ami-br")


def test_the_votes_are_fetched_from_their_own_repository(
    server: Server, small_repository: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    votes = small_repository.pop(f"{TOP}/AMI-BR.csv")
    clone = tmp_path / "clone"
    for name, data in small_repository.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(data)
    server.body = votes
    monkeypatch.setattr(benchmark, "AMI_BR_CSV_URL", server.url.replace("archive.tar.gz", "AMI-BR.csv"))
    monkeypatch.setattr(benchmark, "AMI_BR_CSV_SHA256", hashlib.sha256(votes).hexdigest())
    assert load_dataset("ami-br", data=clone / TOP).samples.votes.tolist() == [[1, 1, 1], [0, 0, 0]]
