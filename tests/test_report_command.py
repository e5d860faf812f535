"""Does fm-report write what was asked for, whole or not at all, and name what cannot be done?"""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import dataclass

import pytest
from report_pages import (
    CONTROL,
    check_page,
    two_runs,
)
from test_runs import edit_record, edit_row, made_run, patches

from finetune.cli import report_main

pytestmark = pytest.mark.usefixtures("no_patches_at_hand")


@dataclass(frozen=True)
class Done:
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def fm_report(tmp_path, monkeypatch, capsys):
    """fm-report in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["fm-report", "--replicates", "200", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            report_main()
        stdout, stderr = capsys.readouterr()
        assert "Traceback" not in stderr
        return Done(ended.value.code or 0, stdout, stderr)

    return call


def refused(done: Done) -> str:
    """The one message of a command that failed."""
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.count("error: ") == 1
    return done.stderr


def test_the_bare_command_writes_a_page_and_nothing_on_stdout(fm_report, tmp_path):
    two_runs(tmp_path / "runs")
    done = fm_report()
    assert (done.status, done.stdout) == (0, "")
    assert re.search(r"report\.html: 2 runs on 4 sets, [0-9.]+ MB\n$", done.stderr)
    check_page((tmp_path / "report.html").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "runs"]


def test_one_run_is_one_run(fm_report, tmp_path):
    made_run(tmp_path / "runs", tables={"mine": patches("mine", 36, test_from=36)}, train="mine")
    assert "report.html: 1 run on 1 set, " in fm_report().stderr


@pytest.mark.parametrize("format", ["markdown", "latex", "csv"])
def test_tables_go_to_stdout_alone(format, fm_report, tmp_path):
    two_runs(tmp_path / "runs")
    done = fm_report("--format", format)
    assert done.status == 0
    assert done.stderr.startswith("On ami-br's 6 held-out slides, ")  # what they show, in three sentences
    assert {"markdown": "| uni probe |", "latex": "\nuni probe & ", "csv": ",uni probe,uni,probe,"}[
        format
    ] in done.stdout
    assert not (tmp_path / "report.html").exists()
    written = fm_report("--format", format, "--out", "deep/er/table.txt")
    assert written.stdout == ""
    assert (tmp_path / "deep/er/table.txt").read_text() == done.stdout


def test_json_is_one_object_alone_on_stdout(fm_report, tmp_path):
    two_runs(tmp_path / "runs")
    for arguments in ([], ["--format", "markdown"]):
        found = json.loads(fm_report("--json", *arguments).stdout)
        assert found["labels"] == ["uni probe", "virchow probe"]
        assert [on["dataset"] for on in found["sets"]] == ["ami-br", "atnorm-br", "atnorm-md", "ami-br"]
        assert found["how"] == {"replicates": 200, "level": 0.95, "seed": 42, "design_effect": 2.0}


def test_runs_may_be_named(fm_report, tmp_path):
    first, _ = two_runs(tmp_path / "elsewhere")
    found = json.loads(fm_report(first, "--json").stdout)
    assert found["labels"] == ["uni probe"]


def test_a_page_is_replaced_whole_and_kept_when_the_command_fails(fm_report, tmp_path):
    first, second = two_runs(tmp_path / "runs")
    page = tmp_path / "report.html"
    page.write_text("the page before" * 1_000_000)
    shutil.move(second, tmp_path / "aside")
    assert fm_report().status == 0
    check_page(page.read_text())
    before = page.read_bytes()
    edit_row(first / "predictions.csv", 2, "group", "slide 9")
    assert "predictions.csv is not the file that the run wrote" in refused(fm_report())
    assert page.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", "report.html", "runs"]


def test_what_cannot_be_done_is_one_message(fm_report, tmp_path):
    made_run(tmp_path / "runs")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert "unknown format 'pdf': use html, csv, markdown or latex" in refused(fm_report("--format", "pdf"))
    assert "5 replicates: an interval needs at least 100" in refused(fm_report("--replicates", "5"))
    assert "no run has folds abcd" in refused(fm_report("--folds", "abcd"))
    assert "none does not exist" in refused(fm_report("--runs", "none"))
    assert "file is not a folder" in refused(fm_report("--runs", "file"))
    assert "file is not a finished run" in refused(fm_report("file"))
    assert re.search(r"runs is no run, but a folder of runs.* by fm-report --runs runs\.", refused(fm_report("runs")))
    assert "none.zarr" in refused(fm_report("--store", "none.zarr"))
    for out in ("folder", "file/report.html", "folder/.."):
        assert "cannot write" in refused(fm_report("--out", out)), out
    assert (tmp_path / "file").read_text() == ""
    assert not list((tmp_path / "folder").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "runs"]


def test_hostile_names_do_not_drive_the_terminal(fm_report, tmp_path):
    name = "a" + CONTROL
    folder = made_run(tmp_path / "runs", tables={name: patches("x", 48, test_from=24)}, train=name)
    edit_record(folder, model=name, sources={name: name})
    for format in ("markdown", "latex", "html"):
        done = fm_report("--format", format)
        assert done.status == 0
        assert all(letter.isprintable() or letter == "\n" for letter in done.stdout + done.stderr)
