"""Does every way of not getting weights end in one clear message, quickly, without a token in it?"""

import errno
import hashlib
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.utils
import pytest
from huggingface_hub import constants
from stub_hub import COMMIT, StubHub, StubRepo

from extract import hub, hub_settings
from extract.backbones import BACKBONES, Backbone, fetch_weights
from features.console import UserError

WEIGHTS = b"not really weights, but bytes are bytes"
OTHER_COMMIT = COMMIT[::-1]
Point = Callable[[str], None]


@pytest.fixture
def stub(point: Point) -> Iterator[StubHub]:
    repos = {
        "org/open": StubRepo({"model.safetensors": WEIGHTS}),
        "org/gated": StubRepo({"pytorch_model.bin": WEIGHTS}, gated=True),
        "org/busy": StubRepo({}, fault=429),
        "org/broken": StubRepo({}, fault=503),
        "org/forbidden": StubRepo({}, fault=403),
    }
    with StubHub(repos) as hub:
        point(hub.url)
        yield hub


def fails_with(
    *parts: str,
    repo: str = "org/open",
    filename: str = "model.safetensors",
    revision: str = "main",
    pause: float = 0,
) -> str:
    """The message, after pauses of at most that many seconds in all, which are noted and not made."""
    pauses: list[float] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "sleep", pauses.append)
        with pytest.raises(UserError) as caught:
            hub.fetch_file(repo, filename, revision=revision, licence="CC-BY-NC-ND-4.0")
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # a cause may quote headers
    assert "hf_" not in message.replace("hf_hub", "")
    assert sum(pauses) <= pause
    return message


def test_a_branch_is_resolved_and_the_served_commit_recorded(stub: StubHub) -> None:
    file = hub.fetch_file("org/open", "model.safetensors", revision="main")
    assert file.path.read_bytes() == WEIGHTS
    assert file.commit == COMMIT


def test_a_moved_branch_is_followed(stub: StubHub) -> None:
    hub.fetch_file("org/open", "model.safetensors", revision="main")
    stub.repos["org/open"] = StubRepo({"model.safetensors": b"newer"}, commit=OTHER_COMMIT)
    file = hub.fetch_file("org/open", "model.safetensors", revision="main")
    assert (file.path.read_bytes(), file.commit) == (b"newer", OTHER_COMMIT)


def test_a_cached_pinned_file_needs_no_request(stub: StubHub) -> None:
    hub.fetch_file("org/open", "model.safetensors", revision=COMMIT)
    stub.requests.clear()
    assert hub.fetch_file("org/open", "model.safetensors", revision=COMMIT).commit == COMMIT
    assert stub.requests == []


def test_a_cached_gated_bin_needs_neither_token_nor_network(
    stub: StubHub, point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    hub.fetch_file("org/gated", "pytorch_model.bin", revision=COMMIT)
    monkeypatch.delenv("HF_TOKEN")
    stub.requests.clear()
    assert hub.fetch_file("org/gated", "pytorch_model.bin", revision=COMMIT).path.read_bytes() == WEIGHTS
    assert stub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    point("http://127.0.0.1:9")
    assert hub.fetch_file("org/gated", "pytorch_model.bin", revision=COMMIT).commit == COMMIT


@pytest.mark.parametrize("offline", [False, True])
def test_a_cached_branch_is_used_when_the_hub_is_away(
    stub: StubHub, point: Point, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offline: bool
) -> None:
    hub.fetch_file("org/open", "model.safetensors", revision="main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    point("http://127.0.0.1:9")
    assert hub.fetch_file("org/open", "model.safetensors", revision="main").commit == COMMIT
    assert COMMIT[:12] in capsys.readouterr().err


def test_gated_without_token(stub: StubHub) -> None:
    message = fails_with(
        "https://huggingface.co/org/gated",
        "CC-BY-NC-ND-4.0",
        "Request access",
        "HF_TOKEN",
        "hf auth login",
        repo="org/gated",
        filename="pytorch_model.bin",
    )
    assert "no token was found" in message


def test_gated_with_a_token_that_has_no_access(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    fails_with("your token has no access", "Request access", repo="org/gated", filename="pytorch_model.bin")


def test_an_unknown_token(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    fails_with("rejected your token", "settings/tokens")


def test_a_malformed_token_is_not_sent(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_member “quoted”")
    fails_with("characters that no token has")
    assert stub.requests == []


def test_a_token_is_sent_and_lets_in(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    assert hub.fetch_file("org/gated", "pytorch_model.bin", revision="main").commit == COMMIT


def test_missing_repository_revision_and_file(stub: StubHub) -> None:
    fails_with("no repository 'org/absent'", repo="org/absent")
    fails_with("no revision 'v9'", revision="v9")
    fails_with("no file 'absent.bin'", filename="absent.bin")


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("answered", [0, 1, 2])  # the question, huggingface_hub's own question, the download
def test_a_busy_hub_is_said_at_once_and_one_that_turns_busy_after_a_while(
    stub: StubHub, status: int, answered: int
) -> None:
    stub.repos["org/open"].fault = status
    stub.repos["org/open"].fault_after = answered
    fails_with(f"answered {status}", "Try again", pause=30 if answered else 0)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Downloads arrive in small pieces; pauses between attempts are noted, not made."""
    pauses: list[float] = []
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4)
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def test_a_download_that_breaks_off_is_taken_up_where_it_stopped(stub: StubHub, small_steps: list[float]) -> None:
    stub.repos["org/open"].cuts = 2
    assert hub.fetch_file("org/open", "model.safetensors", revision="main").path.read_bytes() == WEIGHTS
    assert len(stub.resumed) == 2
    assert stub.resumed[1] > stub.resumed[0] > 0
    assert sum(small_steps) <= 2


def test_a_download_that_always_breaks_off_leaves_nothing(
    stub: StubHub, small_steps: list[float], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stub.repos["org/open"].cuts = 1000
    fails_with("could not be fetched", "RemoteProtocolError", "run again", pause=30)
    assert capfd.readouterr() == ("", "")  # the one message is all
    assert not [path for path in (tmp_path / "cache").rglob("blobs/*") if path.is_file()]
    assert hub.cached_commit("org/open", "model.safetensors", revision="main") is None
    stub.repos["org/open"].cuts = 0
    assert hub.fetch_file("org/open", "model.safetensors", revision="main").path.read_bytes() == WEIGHTS


def test_a_hub_that_never_answers(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    stub.silent = True
    fails_with("could not be fetched", "ReadTimeout")
    stub.silent = False
    hub.fetch_file("org/open", "model.safetensors", revision="main")
    stub.silent = True
    assert hub.fetch_file("org/open", "model.safetensors", revision="main").commit == COMMIT


@pytest.mark.parametrize(
    ("repo", "part"),
    [("org/busy", "429 (too many requests)"), ("org/broken", "503"), ("org/forbidden", "refused org/forbidden (403)")],
)
def test_faults_of_the_hub(stub: StubHub, repo: str, part: str) -> None:
    fails_with(part, "`weights=PATH`", repo=repo)
    assert len(stub.requests) == 1


def test_nobody_listens(point: Point) -> None:
    point("http://user:secret@127.0.0.1:9")
    message = fails_with("could not be fetched", "ConnectError", "not cached")
    assert "secret" not in message


def test_offline_and_not_cached(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails_with("HF_HUB_OFFLINE", "not in the cache", str(constants.HF_HUB_CACHE))


@pytest.mark.parametrize(("number", "part"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only")])
def test_a_disk_that_takes_no_more(stub: StubHub, monkeypatch: pytest.MonkeyPatch, number: int, part: str) -> None:
    def no_room(*args: object, **kwargs: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(hub, "hf_hub_download", no_room)
    fails_with(part, "HF_HOME")


@pytest.mark.parametrize("below", ["", "hub"])
def test_a_cache_that_is_a_file(stub: StubHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / below))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    fails_with("could not be saved to the cache", "is a file, not a folder", "point HF_HOME at")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / below))
    fails_with("point HF_HUB_CACHE at")


SETTINGS = [
    (
        "SSL_CERT_FILE",
        "/nonexistent/ca.pem",
        "SSL_CERT_FILE names /nonexistent/ca.pem, which is no file of certificates",
    ),
    ("SSL_CERT_FILE", __file__, "which is no file of certificates"),
    ("all_proxy", "socks5://user:secret@127.0.0.1:9", "all_proxy names a SOCKS proxy, for which the package socksio"),
    ("HTTP_PROXY", "http://user:secret@127.0.0.1:port", "HTTP_PROXY is no address of a proxy"),
    ("HTTP_PROXY", "http://[::1", "HTTP_PROXY is no address of a proxy"),
    ("https_proxy", "ftp://127.0.0.1:9", "https_proxy is no address of a proxy"),
]


@pytest.mark.parametrize(("name", "value", "part"), SETTINGS)
def test_a_setting_that_the_client_cannot_use_is_named_and_not_the_network(
    stub: StubHub, monkeypatch: pytest.MonkeyPatch, name: str, value: str, part: str
) -> None:
    monkeypatch.setattr(hub_settings, "find_spec", lambda package: None)
    monkeypatch.setenv(name, value)
    message = fails_with("is not cached, and the hub cannot be asked", part, "`weights=PATH`")
    assert "connection" not in message
    assert "secret" not in message
    with pytest.raises(UserError, match=part):
        hub.check_hub()
    with pytest.raises(UserError, match=part):
        hub.check_access("org/open", "model.safetensors", revision="main")


def test_a_setting_that_does_no_harm_is_not_complained_of(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fetch_file("org/open", "model.safetensors", revision="main")
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/ca.pem")
    huggingface_hub.utils.close_session()  # the next client cannot be built
    assert hub.fetch_file("org/open", "model.safetensors", revision="main").commit == COMMIT


def test_a_full_disk_is_no_matter_of_settings(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args: object, **kwargs: object) -> str:
        monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/ca.pem")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub, "hf_hub_download", no_room)
    fails_with("the disk is full", "HF_HOME")


def test_a_file_with_another_digest_is_refused(stub: StubHub) -> None:
    record = replace(BACKBONES["kaiko-s16"], hub_id="org/open", sha256="0" * 64)
    with pytest.raises(UserError, match="0" * 64) as caught:
        fetch_weights(record)
    assert hashlib.sha256(WEIGHTS).hexdigest() in str(caught.value)


def test_bytes_that_are_not_what_the_hub_says_are_refused(stub: StubHub) -> None:
    """Where the record has no digest, the hub's own counts; the message names the file whose removal helps."""
    record = replace(BACKBONES["kaiko-s16"], hub_id="org/open", sha256=None)
    stub.repos["org/open"].swapped = True
    with pytest.raises(UserError, match=hashlib.sha256(WEIGHTS).hexdigest()) as caught:
        fetch_weights(record)
    stub.repos["org/open"].swapped = False
    with pytest.raises(UserError, match="not the published weights"):
        fetch_weights(record)  # the cache has it still
    Path(str(caught.value).partition(": ")[0]).unlink()
    assert fetch_weights(record).path.read_bytes() == WEIGHTS


@pytest.mark.parametrize("way", ["offline", "no token", "down"])
def test_cached_weights_of_the_older_name_need_nobody(
    stub: StubHub, point: Point, monkeypatch: pytest.MonkeyPatch, older: Backbone, way: str
) -> None:
    """Asking for model.safetensors first would be refused at the gate, or fail on a dead line."""
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    fetch_weights(older)
    monkeypatch.delenv("HF_TOKEN")
    if way == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if way != "no token":
        point("http://127.0.0.1:9")
    stub.requests.clear()
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    weights = fetch_weights(older)
    assert len(stub.requests) == (1 if way == "no token" else 0)  # what main is now, which is not told
    assert pauses == []
    assert (weights.path.name, weights.path.read_bytes(), weights.revision) == ("pytorch_model.bin", WEIGHTS, COMMIT)


@pytest.fixture
def older() -> Backbone:
    """A model outside the registry whose gated repository has no model.safetensors."""
    return replace(BACKBONES["kaiko-s16"], name="hf-hub:org/gated", hub_id="org/gated", sha256=None)


def test_the_token_goes_to_the_hub_and_nowhere_else(
    stub: StubHub,
    point: Point,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    small_steps: list[float],
) -> None:
    seen = []
    stub.repos["org/cut"] = StubRepo({"pytorch_model.bin": WEIGHTS}, cuts=1000)
    with caplog.at_level(logging.DEBUG):
        for token in ("hf_member", "hf_stranger", "hf_revoked"):
            monkeypatch.setenv("HF_TOKEN", token)
            for url in (stub.url, "http://127.0.0.1:9"):
                point(url)
                for repo in ("org/gated", "org/busy", "org/broken", "org/forbidden", "org/absent", "org/cut"):
                    try:
                        seen.append(str(hub.fetch_file(repo, "pytorch_model.bin", revision="main")))
                    except UserError as error:
                        seen += [str(error), *traceback.format_exception(error)]
    seen += [caplog.text, *capfd.readouterr()]
    seen += [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert {sent for _, _, sent in stub.requests} >= {"Bearer hf_member", "Bearer hf_stranger", "Bearer hf_revoked"}
    for token in ("hf_member", "hf_stranger", "hf_revoked"):
        assert not [text for text in seen if token in text]


def test_the_digest_of_the_very_bytes_is_recorded(stub: StubHub) -> None:
    weights = fetch_weights(replace(BACKBONES["kaiko-s16"], hub_id="org/open"))
    assert weights.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert (weights.revision, weights.source) == (COMMIT, "hub")


def test_a_local_file_replaces_the_hub(point: Point, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(WEIGHTS)
    weights = fetch_weights(BACKBONES["uni"], weights=path)
    assert (weights.path, weights.revision, weights.source) == (path, "local", "file")
    same = replace(BACKBONES["uni"], sha256=weights.sha256)
    assert fetch_weights(same, weights=path).revision == same.revision
    with pytest.raises(UserError, match="no such weights file"):
        fetch_weights(BACKBONES["uni"], weights=tmp_path / "absent.bin")


def test_the_environment_decides_in_a_fresh_process(tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN, as a shell sets them; exit status 1, one message, no traceback, no token."""
    script = (
        "import typer\nfrom features.console import run\nfrom extract.hub import fetch_file\napp = typer.Typer()\n"
        "@app.command()\ndef main(): fetch_file('MahmoodLab/UNI', 'pytorch_model.bin', revision='main')\nrun(app)\n"
    )
    with StubHub({"MahmoodLab/UNI": StubRepo({}, gated=True)}) as stub:
        environment = {
            "PATH": os.environ["PATH"],
            "HF_ENDPOINT": stub.url,
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": "hf_stranger",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ("HEAD", "/MahmoodLab/UNI/resolve/main/pytorch_model.bin", "Bearer hf_stranger") in (stub.requests)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: MahmoodLab/UNI is gated and your token has no access to it.")
    assert "Traceback" not in done.stderr
    assert "hf_stranger" not in done.stderr


@pytest.mark.parametrize("filename", ["model.safetensors", "sub/model.safetensors", "a/b/c/model.safetensors"])
def test_the_commit_of_a_file_in_a_subfolder_is_its_commit(stub: StubHub, point: Point, filename: str) -> None:
    stub.repos["org/open"] = StubRepo({filename: WEIGHTS})
    file = hub.fetch_file("org/open", filename, revision="main")
    assert (file.path.read_bytes(), file.commit) == (WEIGHTS, COMMIT)
    assert hub.cached_commit("org/open", filename, revision="main") == COMMIT
    assert hub.fetch_file("org/open", filename, revision=COMMIT).commit == COMMIT
    point("http://127.0.0.1:9")
    assert hub.fetch_file("org/open", filename, revision="main").commit == COMMIT


def test_a_pinned_commit_is_asked_for_even_where_another_one_is_cached(stub: StubHub) -> None:
    hub.fetch_file("org/open", "model.safetensors", revision="main")
    stub.repos["org/open"] = StubRepo({"model.safetensors": b"newer"}, commit=OTHER_COMMIT)
    assert hub.cached_commit("org/open", "model.safetensors", revision=OTHER_COMMIT) is None
    file = hub.fetch_file("org/open", "model.safetensors", revision=OTHER_COMMIT)
    assert (file.path.read_bytes(), file.commit) == (b"newer", OTHER_COMMIT)


def test_the_records_own_digest_counts_before_the_hubs(stub: StubHub) -> None:
    """The hub may serve other bytes under the same name, with a digest that fits them."""
    record = replace(BACKBONES["kaiko-s16"], hub_id="org/open", sha256=hashlib.sha256(WEIGHTS).hexdigest())
    assert fetch_weights(record).sha256 == record.sha256
    stub.repos["org/open"] = StubRepo({"model.safetensors": b"others"}, commit=OTHER_COMMIT)
    with pytest.raises(UserError, match="not the published weights"):
        fetch_weights(replace(record, revision=OTHER_COMMIT))
