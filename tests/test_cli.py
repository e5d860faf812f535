"""Do the commands keep their contract: exit status, one clear message, JSON alone on stdout, quick help, full docs?"""

import importlib
import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image
from processes import SCRIPTS

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = sorted(SCRIPTS)


def command(name: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    script = str(Path(sys.executable).with_name(name))
    return subprocess.run([script, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture
def here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A command in this process, which has imported everything, in a folder with a table of two patches."""
    for row in range(2):
        Image.new("RGB", (8, 8), (row, 0, 0)).save(tmp_path / f"{row}.png")
    (tmp_path / "patches.csv").write_text("path,label,group\n0.png,Normal,a\n1.png,Atypical,b\n")

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        module, _, function = SCRIPTS[name].partition(":")
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(tmp_path)
            patched.setattr(sys, "argv", [name, *arguments])
            patched.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay
            patched.setenv("GOMP_SPINCOUNT", "10000")
            with pytest.raises(SystemExit) as end:
                getattr(importlib.import_module(module), function)()
        return subprocess.CompletedProcess(arguments, int(end.value.code or 0), *capsys.readouterr())

    return run


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one message of a command that failed."""
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder where the two bare commands have run, on fewer and smaller patches than the demo's."""
    folder = tmp_path_factory.mktemp("demo")
    rng = np.random.default_rng(0)
    rows = ["path,label,group,split"]
    for row in range(60):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(folder / f"{row}.png")
        rows.append(
            f"{row}.png,{'Atypical' if row % 3 == 0 else 'Normal'},slide {row // 3},{'test' if row > 44 else 'train'}"
        )
    (folder / "patches.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_at_once(name):
    def processor_seconds() -> float:  # of the children, so that a busy machine makes no difference
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = processor_seconds()
    assert command(name, "--help").returncode == 0
    assert processor_seconds() - before < 1  # well under half a second of it; torch alone would take several
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {SCRIPTS[name].partition(':')[0]}"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    for heavy in ("torch", "timm", "zarr", "sklearn", "h5py", "numpy", "huggingface_hub"):
        assert not re.search(rf"\| +{heavy}$", loaded, re.MULTILINE), f"{name} --help imports {heavy}"


def test_extract_probe_and_info_speak_json_alone_on_stdout(demo):
    extracted = command("fm-extract", "--dataset", "patches.csv", "--view", "full@64", "--json", cwd=demo)
    assert extracted.returncode == 0, extracted.stderr
    (embedding,) = json.loads(extracted.stdout)["embeddings"]
    assert (embedding["model"], embedding["n_rows"], embedding["view"]) == ("efficientnet-lite0", 60, "full@64")
    probed = processes.run("fm-probe", "--cv", "3", "--json", cwd=demo)
    assert probed.returncode == 0, probed.stderr
    (result,) = json.loads(probed.stdout)["results"]
    assert set(result["metrics"]["sets"]) == {"patches/validation", "patches/test"}
    assert (demo / "runs" / result["id"] / "predictions.csv").exists()
    assert "\r" not in extracted.stderr + probed.stderr  # no progress bar in a pipe
    shown = processes.run("fm-probe", "--cv", "3", cwd=demo)
    assert "efficientnet-lite0 (probe)" in shown.stdout
    info = json.loads(command("fm-store", "info", "--json", cwd=demo).stdout)
    assert info


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fm-extract", "--model", "h-optimus"), r"unknown model 'h-optimus'.*h-optimus-"),
        (("fm-extract", "--dataset", "atnorm"), r"'atnorm'.*atnorm-"),
        (("fm-extract", "--view", "middle"), r"unknown view 'middle'"),
        (("fm-extract", "--dataset", "patches.csv", "--precision", "fp8"), r"unknown precision 'fp8'"),
        (("fm-extract", "--dataset", "patches.csv", "--device", "tpu"), r"device 'tpu'"),
        (("fm-extract", "--model", ","), r"--model names nothing"),
        (("fm-probe",), r"embeddings.zarr does not exist. Run fm-extract first"),
        (("fm-probe", "--recipe", "best"), r"unknown recipe 'best'"),
        (("fm-store", "info"), r"does not exist"),
        (("fm-predict", "run", "0.png", "--out", "."), r"cannot write to '.': it is a folder.*by --out"),
        (("fm-predict", "run", "0.png", "--threshold", "50"), r"--threshold 50.0 is no probability"),
        (("fm-report", "--out", "-"), r"cannot write to '-'"),
        (("fm-report", "--seed", "-1"), r"seed -1"),
        (("fm-finetune", "--cv", "1000"), r"1000 folds: at most 100 are fine-tuned"),
    ],
)
def test_a_mistake_gets_one_clear_message(arguments, message, here):
    said = refused(here(*arguments))
    assert re.search(message, said.replace("\n", " ")), said
    assert said.startswith("error: ")


def test_wrong_usage_is_status_2(here):
    assert here("fm-extract", "--modle", "uni").returncode == 2
    assert here("fm-probe", "--cv", "many").returncode == 2
    for arguments in (
        ("fm-probe", "--cv", str(10**30)),
        ("fm-extract", "--batch-size", str(10**30)),
        ("fm-extract", "--workers", str(10**30)),
        ("fm-finetune", "--batch-size", str(10**30)),
        ("fm-finetune", "--epochs", str(10**30)),
        ("fm-finetune", "--folds-at-once", str(10**30)),
    ):
        assert here(*arguments).returncode == 2, arguments


def test_every_option_is_documented(here):
    document = (REPOSITORY / "docs" / "cli.md").read_text()
    for name in COMMANDS:
        help_text = here(name, "--help").stdout
        verbs = re.findall(r"^  (info|verify|export|import)\b", help_text, re.MULTILINE)
        texts = [help_text] + [here(name, verb, "--help").stdout for verb in verbs]
        for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(texts))) - {"--help", "--no-json"}:
            section = document.partition(f"## {name}")[2].partition("\n## ")[0]
            assert f"`{option}" in section, f"docs/cli.md says nothing of {name} {option}"
