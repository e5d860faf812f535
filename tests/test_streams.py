"""Does a command say what it has to say wherever its output goes: other encodings, closed pipes, full disks?"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.cells import cell_len

from features import console
from features.samples import make_samples
from features.store import FeatureStore
from features.streams import encodable

FM_STORE = f"{sys.executable} -c 'from features.cli import main; main()'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, whose dataset has a name that few encodings have."""
    folder = tmp_path_factory.mktemp("streams")
    store = FeatureStore.open_or_create(folder / "embeddings.zarr")
    table = make_samples(["a", "b"], [0, 1], sha256=["1", "1"])
    store.put_samples("Zellkerne-Ä-核", table, attrs={})
    return folder


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    return subprocess.run(command, capture_output=True, cwd=cwd, env=os.environ | environment, timeout=120)


@pytest.mark.parametrize(
    ("encoding", "name", "dash"),
    [
        ("utf-8", "Zellkerne-Ä-核", "–"),
        ("utf-16", "Zellkerne-Ä-核", "–"),
        ("latin-1", "Zellkerne-Ä-\\u6838", "-"),
        ("ascii", "Zellkerne-\\xc4-\\u6838", "-"),
        ("cp1252", "Zellkerne-Ä-\\u6838", "–"),
    ],
)
def test_tables_are_printed_in_any_encoding(folder: Path, encoding: str, name: str, dash: str) -> None:
    done = shell(f"{FM_STORE} info", folder, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode(encoding).splitlines()
    row = next(line for line in lines if name in line)
    assert dash in row
    assert len(set(map(cell_len, lines[1:6]))) == 1  # the columns stand below each other
    assert ("+--" in lines[1]) == (not encoding.startswith("utf"))
    assert any(line.startswith(f"{name}: 1 set") for line in lines)  # the audit, which is no table


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_json_is_the_same_in_any_encoding(folder: Path, encoding: str) -> None:
    done = shell(f"{FM_STORE} info --json", folder, PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout.decode(encoding))["datasets"][0]["name"] == "Zellkerne-Ä-核"


def test_a_locale_without_unicode_gets_one_message_or_none(folder: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    fm_predict = FM_STORE.replace("features.cli import main", "finetune.cli import predict_main as main")
    assert b"PATH..." in shell(f"{fm_predict} --help", folder, **plain).stdout
    done = shell(f"{FM_STORE} export --dataset Zellkerne-Ä-核 --model m --out x.h5", folder, **plain)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
    assert b"Traceback" not in done.stderr


def test_a_reader_that_leaves_ends_the_command_quietly(folder: Path) -> None:
    for arguments in ("info", "info --json", "--help"):
        done = shell(f"{FM_STORE} {arguments} | true", folder)
        assert (done.returncode, done.stderr) == (128 + 13, b""), arguments


def test_closed_streams_are_nowhere_and_no_file_takes_their_place(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert shell(f"{FM_STORE} info >&-", folder).returncode == 0
    assert shell(f"{FM_STORE} verify 2>&- >&- <&-", folder).returncode == 0
    done = shell(f"{FM_STORE} info --store none 2>&- ", folder)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to write to")
def test_a_full_disk_is_said_once_and_messages_that_nobody_can_read_change_nothing(folder: Path) -> None:
    for arguments in ("info", "info --json", "--help"):
        done = shell(f"{FM_STORE} {arguments} >/dev/full", folder)
        assert done.returncode == 1
        assert done.stderr.startswith(b"error: the results cannot be written to stdout: No space left")
        assert done.stderr.count(b"\n") == 1
    assert shell(f"{FM_STORE} verify 2>/dev/full", folder).returncode == 0


def test_a_folder_that_is_gone_is_said(folder: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = shell(f"cd {gone} && rmdir {gone} && PYTHONPATH={Path.cwd()} {FM_STORE} info", folder)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: the current folder has been removed")


def test_a_width_that_is_no_number_is_not_read(folder: Path) -> None:
    for width in ("abc", "-1", ""):
        done = shell(f"{FM_STORE} info --no-such-option", folder, TERMINAL_WIDTH=width, COLUMNS=width)
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr


def test_what_an_encoding_lacks_is_replaced_by_what_looks_alike() -> None:
    latin, ascii = (io.TextIOWrapper(io.BytesIO(), encoding=name) for name in ("latin-1", "ascii"))
    assert encodable("0.80 ± 0.02 – 3 × 4…", latin) == "0.80 ± 0.02 - 3 × 4..."
    assert encodable("0.80 ± 0.02 – 3 × 4…", ascii) == "0.80 +- 0.02 - 3 x 4..."
    assert encodable("核 😀", ascii) == "\\u6838 \\U0001f600"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "there"), "error: there: Permission denied. Expected files"),
        (MemoryError("Unable to allocate 9 TiB"), "error: there is not enough memory (Unable to allocate 9 TiB)."),
        (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates"), "error: 'a\\udcff' is no UTF-8 text."),
        (UnicodeEncodeError("ascii", "é", 0, 1, "range"), "error: 'é' cannot be written in ascii, the encoding of"),
        (BrokenPipeError(32, "Broken pipe"), "error: a connection was closed from the other side."),
    ],
    ids=["permission", "memory", "surrogate", "locale", "connection"],
)
def test_what_the_system_refuses_is_one_message(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as end:
        console.run(app)
    assert end.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith(said)
    assert shown.count("error: ") == 1
