"""Can foreign weights, images, tables, archives, stores or runs do more than be read? Does a token ever leave?"""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image
from rich.table import Table
from stub_hub import StubHub, StubRepo

from features import console, files
from features.console import print_json, progress, say, show

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("extract", "features", "finetune", "probe")
HOSTILE = "\x1b]0;owned\x07\x9b31m\u202egnp[/x][red]"
TOKEN = "hf_" + "PlantedSecretOfThisTest"


# --- what the code never does -----------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Every call of the four packages: where, the called name, the call."""
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield f"{path.name}:{node.lineno}", ast.unparse(node.func), node


def given(call: ast.Call, name: str) -> object:
    return next((ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


def test_no_pickle_is_read_and_no_text_is_run() -> None:
    never = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load",
             "torch.hub.load", "marshal.loads", "joblib.load", "torch.jit.load"}  # fmt: skip
    seen = list(calls())
    assert [f"{where}: {name}" for where, name, _ in seen if name in never] == []
    started = [where for where, name, _ in seen if name.startswith("subprocess.")]
    assert [where.partition(":")[0] for where in started] == [
        "doctor.py",
        "benchmark.py",
    ]  # nvidia-smi; our own commands
    loads = [(where, call) for where, name, call in seen if name == "torch.load"]
    assert loads
    assert [where for where, call in loads if given(call, "weights_only") is not True] == []
    arrays = [(where, call) for where, name, call in seen if name in ("np.load", "numpy.load")]
    assert arrays
    assert [where for where, call in arrays if given(call, "allow_pickle") is not False] == []


def test_no_code_is_taken_from_a_hub_and_no_archive_is_unpacked_as_a_whole() -> None:
    names = [(where, name) for where, name, _ in calls()]
    assert [
        where for where, name in names if name.rpartition(".")[2] in ("extractall", "extract_all", "unpack_archive")
    ] == []
    text = "".join(path.read_text(encoding="utf-8") for p in PACKAGES for path in (REPOSITORY / p).rglob("*.py"))
    assert "trust_remote_code" not in text
    assert "verify=False" not in text


# --- terminals --------------------------------------------------------------------------------------------------------


def test_no_name_drives_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(f"{HOSTILE}\nsecond line")
    show(table)
    say(HOSTILE)
    print_json({HOSTILE: [HOSTILE, "\udcff", "\n"]})
    out, err = capsys.readouterr()
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress(HOSTILE, 1) as advance:
        advance(1, HOSTILE)
    for text in (out, err, terminal.getvalue()):
        assert "[/x][red]" in text or "second line" in text
        for raw in ("\x1b]", "\x07", "\x9b", "\u202e"):
            assert raw not in text
    assert all(letter.isprintable() or letter == "\n" for letter in out)


def test_json_means_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    value = {HOSTILE: ["é 漢字 🧫", "\n\t", "\U000e0001"]}
    print_json(value)
    out = capsys.readouterr().out
    assert json.loads(out) == value
    assert "é 漢字 🧫" in out


# --- names and places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r" * 255, "é" * 127, "🧫" * 63])
def test_a_file_of_the_longest_name_is_written(tmp_path: Path, name: str) -> None:
    files.write_file(tmp_path / name, [b"whole"])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_longer_name_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(console.UserError, match="choose a shorter name"), files.writing(tmp_path):
        files.write_file(tmp_path / ("r" * 256), [b"whole"])


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_token_is_in_nothing_that_commands_write_or_print(tmp_path: Path) -> None:
    rows = ["path,label,group,split"]
    rng = np.random.default_rng(0)
    for row in range(24):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(tmp_path / f"{row}.png")
        rows.append(
            f"{row}.png,{'Atypical' if row % 2 else 'Normal'},slide {row // 4},{'test' if row > 15 else 'train'}"
        )
    (tmp_path / "patches.csv").write_text("\n".join(rows) + "\n")
    said = b""
    with StubHub(
        {"org/gated": StubRepo({"model.safetensors": b"x"}, gated=True), "org/down": StubRepo({}, fault=503)}
    ) as hub:
        environment = os.environ | {
            "HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip

        def command(name: str, *arguments: str, status: int) -> None:
            nonlocal said
            if name == "fm-extract":  # huggingface_hub reads its settings while it is loaded
                script = str(Path(sys.executable).with_name(name))
                done = subprocess.run(
                    [script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
                )
            else:
                done = processes.run(name, *arguments, cwd=tmp_path, **environment)
            assert done.returncode == status, done.stderr
            said += (done.stdout + done.stderr).encode()

        local = ("--dataset", "patches.csv", "--view", "full@32", "--precision", "fp32")
        command("fm-extract", *local, "--json", status=0)
        command("fm-extract", *local, "--model", "uni", status=1)
        command("fm-probe", "--cv", "3", status=0)
        command("fm-report", "--replicates", "100", status=0)
        assert any(TOKEN in sent for _, _, sent in hub.requests)  # it was in use
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"report" in said
    assert TOKEN.encode() not in said
    assert TOKEN.encode() not in written
