"""Does fm-benchmark run what a plan asks for, each row once, wherever it was killed, and say what cannot be run?"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from stub_hub import COMMIT, StubHub, StubRepo
from test_finetune_command import write_patches

import finetune.benchmark as benchmark
import finetune.run
from extract import cli as extract_cli
from extract import hub
from extract.backbones import build_model
from extract.doctor import Access, ModelCheck
from extract.registry import BACKBONES, Backbone
from extract.shard import Shard, find_shard
from features.console import Interrupted, UserError
from finetune import cli
from finetune.benchmark import FOLDER, run_benchmark, run_child, shell_script, slurm_script
from finetune.benchmark_cost import Counts, estimate, measure_rates
from finetune.benchmark_facts import _lack, gather
from finetune.benchmark_plan import EMBED, PROBE, SHIPPED, Row, Where, command, read_plan
from finetune.benchmark_state import Found, look, standing, survey
from probe import cli as probe_cli
from probe.probing import ProbeOptions
from probe.runs import read_run

TINY = """
title = "a tiny benchmark"
train = "patches.csv"
models = "efficientnet-lite0"
methods = ["probe", "head"]
view = "full@32"
cv = 3

[[rows]]
epochs = 1

[[rows]]
methods = "head"
epochs = 2
batch_size = 4
"""
APPS = {"fm-extract": extract_cli.app, "fm-probe": probe_cli.app, "fm-finetune": cli.finetune_app}


class Launches:
    """Runs commands in this process, and notes them; a report is a file."""

    def __init__(self, do: Callable[[str, list[str]], int | None] = lambda name, arguments: None) -> None:
        self.lines: list[list[str]] = []
        self._do = do

    def __call__(self, line: Sequence[str], log: Path, environment: Mapping[str, str], fds: Sequence[int]) -> int:
        name, *arguments = line
        self.lines.append(list(line))
        log.write_text("")
        status = self._do(name, arguments)
        if status is not None:
            log.write_text("error: as the test says\n")
            return status
        if name == "fm-report":
            Path(arguments[arguments.index("--out") + 1]).write_text("page")
            return 0
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                APPS[name](arguments, standalone_mode=False)
        except UserError as error:
            log.write_text(f"error: {error}\n")
            return 1
        return 0

    @property
    def names(self) -> list[str]:
        return [line[0] for line in self.lines]


def nothing(name: str, arguments: list[str]) -> int:
    """A command that fails at once."""
    return 1


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured."""
    monkeypatch.setattr("finetune.benchmark_state.measure_rates", lambda device, kinds: dict.fromkeys(kinds, 1e10))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A plan of four rows on sixteen patches, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_patches(tmp_path)
    (tmp_path / "plan.toml").write_text(TINY)
    return "plan.toml"


def run_tiny(plan: str, launch: Launches, shard: Shard = Shard()) -> benchmark.Outcome:
    facts = gather(plan, Where())
    return run_benchmark(facts, survey(facts), shard=shard, launch=launch)


def states(plan: str) -> list[str]:
    facts = gather(plan, Where())
    found = look(facts.where)
    return [standing(row, facts, found).state for row in facts.plan.rows]


# --------------------------------------------------------------------------------------------------- what is said first


def run_command(
    capsys: pytest.CaptureFixture[str], *arguments: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["fm-benchmark", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.benchmark_main()
    return int(end.value.code or 0), *capsys.readouterr()


def test_without_access_and_network_every_row_says_why_and_what_helps(
    tmp_path: Path,
    point: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MITOFM_DATA", raising=False)
    monkeypatch.setenv("MITOFM_CACHE", str(tmp_path / "none"))
    point("http://127.0.0.1:9")
    status, out, err = run_command(capsys, "banerjee2025", "--dry-run", "--json", monkeypatch=monkeypatch)
    assert status == 0, err
    found = json.loads(out)
    assert len(found["rows"]) == 64
    assert {row["state"] for row in found["rows"]} == {"cannot"}
    for row in found["rows"]:
        if row["method"] == "full":
            assert "not in the cache" in row["remedy"]
        else:
            assert "gated" in row["reason"]
            assert "request access on https://huggingface.co/" in row["remedy"]
        assert row["command"][0].startswith("fm-")
        assert row["memory_bytes"] > 0
    assert not list(tmp_path.iterdir())  # nothing was written
    status, out, err = run_command(capsys, "banerjee2025", "--dry-run", monkeypatch=monkeypatch)
    assert status == 0
    assert out.count("cannot: gated") == 8 * 4 + 23
    assert "64 rows: 64 cannot" in err
    # A plan names no files of weights; but rows that were run with one count.
    assert err.count("run this model's commands yourself, with --weights FILE appended") == 11
    assert "`weights=" not in out + err
    assert run_command(capsys, "banerjee2025", monkeypatch=monkeypatch)[0] == 1


def test_a_part_of_a_plan_says_what_is_left_of_it(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two parts the first has the embeddings and their probe, the second both trainings."""
    for part, methods in (("0/2", {EMBED, PROBE}), ("1/2", {"head"})):
        status, out, err = run_command(capsys, tiny, "--dry-run", "--shard", part, monkeypatch=monkeypatch)
        assert status == 0, err
        assert f"2 rows of 4, part {part}: 2 to do. " in err
        assert {method for method in (EMBED, PROBE, "head") if f" {method} " in out} == methods
    _, _, err = run_command(capsys, tiny, "--dry-run", "--shard", "1/3", monkeypatch=monkeypatch)
    assert "1 row of 4, part 1/3: 1 to do. " in err
    seconds = {}
    for part in ("0/1", "0/2", "1/2"):
        _, out, _ = run_command(capsys, tiny, "--dry-run", "--json", "--shard", part, monkeypatch=monkeypatch)
        found = json.loads(out)
        seconds[part] = found["seconds"]
        assert len(found["rows"]) == 4
    assert seconds["0/2"] + seconds["1/2"] == pytest.approx(seconds["0/1"])
    assert min(seconds.values()) > 0


def test_a_test_set_that_is_not_in_the_folder_is_left_out_and_a_training_set_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "AtNorM-Br").mkdir()
    facts = gather("embedded", Where(data=tmp_path))
    assert facts.plan.test == ("atnorm-br",)
    assert any("atnorm-md is not in" in note for note in facts.notes)
    assert facts.problem is not None
    one = standing(facts.plan.rows[0], facts, Found((), (), {}, {}))
    assert (one.state, one.reason) == ("cannot", "no patches of ami-br")
    assert "AMi-Br" in one.remedy


def test_places_that_cannot_be_written_to_are_refused_before_anything_runs(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("kept")
    Path("full").mkdir()
    Path("full/file").write_text("kept")
    Path("link").symlink_to("nowhere")
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(benchmark, "run_child", launch := Launches())
    for option, place, message in (
        ("--runs", "file", "file is a file and no folder. Name a folder that can be written to by --runs."),
        ("--runs", "file/runs", "file is a file and no folder. "),
        ("--runs", "link", "link is a link to nothing. "),
        ("--runs", "/proc/x", "/proc is no folder on a disk. "),
        ("--store", "file", "file is a file and no folder. Name a folder that can be written to by --store."),
        ("--store", "/proc/x.zarr", "/proc is no folder on a disk. "),
        ("--store", "full", "full exists but is not a feature store. Name another --store; nothing was changed."),
    ):
        for asked in ((), ("--dry-run",)):
            status, out, err = run_command(capsys, tiny, option, place, *asked, monkeypatch=monkeypatch)
            assert (status, out) == (1, ""), err
            assert err.startswith("error: ")
            assert message in " ".join(err.split())
    assert launch.lines == []
    assert sorted(Path().rglob("*")) == before


def test_patches_without_votes_are_not_said_to_lack_folds(tiny: str) -> None:
    Path(tiny).write_text(TINY.replace("cv = 3", 'cv = 3\nsoft_labels = "votes"'))
    rows = survey(gather(tiny, Where()))
    assert {(one.state, one.reason) for one in rows if one.row.method != EMBED} == {("cannot", "not on these patches")}
    assert all("has no votes of raters" in one.remedy for one in rows if one.row.method != EMBED)


def test_what_is_larger_than_memory_or_disk_cannot_be_run(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = gather(tiny, Where())
    by_state = [one.state for one in survey(facts)]
    assert by_state == ["to do"] * 4
    monkeypatch.setattr("finetune.benchmark_state.device_memory", lambda device: 5e6)
    assert [one.reason for one in survey(facts)] == ["memory"] * 4  # and so what would be probed


def test_an_estimate_counts_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, cpu = {True: 1e9}, torch.device("cpu")
    monkeypatch.setattr("finetune.benchmark_cost.openvino.version", lambda: None)
    lite = BACKBONES["efficientnet-lite0"]
    rows = read_plan("demo").rows
    embed, training = (next(row for row in rows if row.method == method) for method in (EMBED, "lora"))
    flops = 0.77e9 * (128 / 224) ** 2
    found = estimate(replace(embed, views=("center64@128",)), lite, Counts(400, 280, 1120), rates, cpu)
    assert found.seconds == pytest.approx(8 + 400 * flops / 1e9)
    assert estimate(replace(embed, views=("full+flips",)), lite, Counts(400, 280, 1120), rates, cpu).seconds == (
        pytest.approx(8 + 400 * 8 * 0.77)
    )
    found = estimate(training, lite, Counts(400, 280, 1120), rates, cpu)
    passes = 2 * (2 * 1120 + 280) + 8 * (280 + 120 * 5)  # epochs: steps and validation; then eight orientations
    assert found.seconds == pytest.approx(8 + passes * flops / 1e9)
    monkeypatch.setattr("finetune.benchmark_cost.openvino.version", lambda: "2026.1")  # of what trains nothing
    passes = 2 * (2 * 1120 + 280 / 2.1) + 8 / 2.1 * (280 + 120 * 5)
    assert estimate(training, lite, Counts(400, 280, 1120), rates, cpu).seconds == pytest.approx(
        8 + passes * flops / 1e9
    )
    assert found.memory > found.fixed > 4 * lite.n_parameters
    seconds = iter([0.0, 9.0, 9.0, 11.0, 11.0, 14.0])  # three passes of four images: the first, 9 s, does not count
    monkeypatch.setattr("time.process_time", lambda: next(seconds))
    monkeypatch.setattr("finetune.benchmark_cost.build_model", lambda backbone, weights: torch.nn.Identity())
    monkeypatch.setattr("finetune.benchmark_cost.embed_batch", lambda *_, **__: None)
    assert measure_rates(cpu, [True])[True] == pytest.approx(4 * 0.77e9 / 2 * torch.get_num_threads())


def test_rows_share_what_is_free_on_a_disk(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = gather(tiny, Where())
    needs = [one.estimate for one in survey(facts)]
    enough_for_three = sum(one.store + one.runs for one in needs[:3] if one) + max(
        one.checkpoint for one in needs if one
    )

    class Usage(NamedTuple):
        free: float

    monkeypatch.setattr("finetune.benchmark_state.shutil.disk_usage", lambda folder: Usage(enough_for_three))
    assert [one.reason for one in survey(facts)] == ["", "", "", "disk"]


def test_scripts_hold_what_is_left_and_say_what_cannot_be_run(tiny: str) -> None:
    Path(tiny).write_text(TINY.replace("a tiny benchmark", "tiny\\nrm everything"))
    facts = gather(tiny, Where(runs=Path("my runs")))
    rows = survey(facts)
    rows[-1] = replace(rows[-1], state="cannot", reason="memory")
    script = shell_script(facts, rows, Path("page.html"))
    lines = [shlex.split(line) for line in script.splitlines() if line.startswith("fm-")]
    assert [line[0] for line in lines] == ["fm-extract", "fm-probe", "fm-finetune", "fm-report"]
    assert lines[2][:-2] == [*command(facts.plan, [rows[2].row], facts.where)]
    assert "my runs" in lines[2]
    assert "# cannot: efficientnet-lite0 head default: memory" in script
    script = slurm_script(facts, rows, Path("page.html"))
    assert "#SBATCH --array=0,1\n" in script
    assert '--shard "$SLURM_ARRAY_TASK_ID/3"' in script  # of all units, done or not
    assert [unit for unit in range(3) if find_shard(f"{unit}/3").includes(unit)] == [0, 1, 2]
    assert "--runs 'my runs'" in script
    assert "rm everything" in script
    assert "\nrm" not in script + shell_script(facts, rows, Path("page.html"))


# ------------------------------------------------------------------------------------------------------------- running


def test_killed_after_any_row_the_same_command_goes_on_to_the_report(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: before the second command, and in the middle of a training. Then all is done, each row by one run."""
    assert states(tiny) == ["to do"] * 4

    def kill(name: str, arguments: list[str]) -> None:
        if name == "fm-probe":
            raise Interrupted

    with pytest.raises(Interrupted):
        run_tiny(tiny, Launches(kill))
    assert states(tiny) == ["done", "to do", "to do", "to do"]

    save = finetune.run.save_state

    def save_and_die(*given: Any) -> None:
        save(*given)
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(finetune.run, "save_state", save_and_die)
        outcome = run_tiny(tiny, first := Launches())  # a training says how to go on, and fails
    assert first.names == ["fm-probe", "fm-finetune", "fm-finetune", "fm-report"]
    assert [one.state for one in outcome.standings] == ["done", "done", "failed", "failed"]
    assert "--resume" in outcome.standings[2].reason
    assert states(tiny) == ["done", "done", "to resume", "to resume"]
    folders = {path.name for path in Path("runs").glob("*-*")}
    facts, found = gather(tiny, Where()), look(Where())
    on_gpu = replace(facts, device=torch.device("cuda"))  # which would be refused
    assert [standing(row, on_gpu, found).state for row in facts.plan.rows[2:]] == ["to do"] * 2
    run_tiny(tiny, idle := Launches(), Shard(8, 9, shared=True))
    assert idle.lines == []  # of rows that others have left there is no report yet

    capsys.readouterr()
    outcome = run_tiny(tiny, again := Launches())
    assert [line[:2] for line in again.lines[:2]] == [["fm-finetune", "--resume"]] * 2
    assert [one.state for one in outcome.standings] == states(tiny) == ["done"] * 4
    assert outcome.report == Path("report.html")
    assert {path.name for path in Path("runs").glob("*-*")} == folders
    assert set(again.lines[-1][1:4]) == {str(one.run) for one in outcome.standings if one.run}
    assert capsys.readouterr().err.count("\n[2 of 2]") == 1

    run_tiny(tiny, last := Launches(), Shard(8, 9, shared=True))
    assert last.names == ["fm-report"]
    probed_otherwise_is_not_done(tiny)
    trained_by_options_that_mean_the_same_is_done(tiny)
    # Other patches are another question.
    write_patches(Path(), seed=1)
    assert states(tiny) == ["to do"] * 4


def probed_otherwise_is_not_done(plan: str) -> None:
    """A probe is done if it chose from the views of the plan, on the embeddings that the store has."""
    facts, found = gather(plan, Where()), look(Where())
    row, (record,) = facts.plan.rows[1], (one for one in found.runs if one.kind == "probe")
    assert isinstance(row.options, ProbeOptions)
    chose = replace(found, runs=(replace(record, options={**record.options, "view": None}),))
    open_row = replace(row, options=replace(row.options, view=None))
    assert standing(open_row, facts, chose).state == "done"
    assert standing(replace(open_row, views=("full@32", "center24@32")), facts, chose).state == "to do"
    assert standing(replace(open_row, views=("center24@32",)), facts, chose).state == "to do"
    by_hand = replace(record, options={**record.options, "train": None, "test": None, "view": None})
    assert standing(row, facts, replace(found, runs=(by_hand,))).state == "done"
    assert standing(row, facts, replace(found, runs=(replace(record, train="other"),))).state == "to do"
    assert standing(replace(row, options=replace(row.options, pooling="card")), facts, found).state == "to do"
    entries = {key: replace(entry, fingerprint="another") for key, entry in found.entries.items()}
    assert standing(row, facts, replace(found, entries=entries)).state == "to do"


def trained_by_options_that_mean_the_same_is_done(plan: str) -> None:
    """A training is done if recipe and view are those that the plan's options mean today, however they were named."""
    facts, found = gather(plan, Where()), look(Where())
    row = facts.plan.rows[3]  # two epochs, batches of 4
    run = standing(row, facts, found).run
    (record,) = (one for one in found.runs if one.folder == run)

    def state(**changes: Any) -> str:
        return standing(row, facts, replace(found, runs=(replace(record, **changes),))).state

    recipe = dict(record.recipe or {})
    assert state() == "done"
    assert state(options={**record.options, "test": [], "tta": recipe["tta"]}) == "done"
    assert state(recipe={**recipe, "patience": recipe["epochs"]}) == "done"  # nor is it ever stopped early
    assert state(recipe={**recipe, "patience": 1}) == "to do"
    assert state(recipe={**recipe, "learning_rate": 1.0}) == "to do"
    assert state(view="full") == "to do"
    assert state(options={**record.options, "seed": 7}) == "to do"


ONE_PROBE = """
train = "patches.csv"
models = "efficientnet-lite0"
methods = "probe"
views = {views}
cv = 3
"""


def test_a_probe_chooses_from_the_views_of_the_plan_whatever_the_store_holds(tiny: str) -> None:
    for views in (["full@32"], ["center24@32", "full@32"], ["center24@32+rot90"]):
        Path(tiny).write_text(ONE_PROBE.format(views=views))
        outcome = run_tiny(tiny, Launches())
        assert [one.state for one in outcome.standings] == ["done", "done"]
        run = outcome.standings[1].run
        assert run is not None
        assert {candidate.view for candidate in read_run(run).candidates or ()} == set(views)
        assert states(tiny) == ["done", "done"]
    assert len(list(Path("runs").glob("probe-*"))) == 3
    for given in (["--view", "full@32"], ["--view", "full@32, center24@32", "--train", "patches", "--test", ""]):
        with contextlib.redirect_stdout(io.StringIO()):  # by hand; the plans above then find these
            arguments = ["--cv", "3", "--model", "efficientnet-lite0", *given, "--runs", "by hand"]
            probe_cli.app(arguments, standalone_mode=False)
    for views in (["full@32"], ["center24@32", "full@32"]):
        Path(tiny).write_text(ONE_PROBE.format(views=views))
        facts = gather(tiny, Where(runs=Path("by hand")))
        assert standing(facts.plan.rows[1], facts, look(facts.where)).state == "done"


def test_a_label_that_is_corrected_afterwards_reaches_the_store_and_the_probe(tiny: str) -> None:
    Path(tiny).write_text(ONE_PROBE.format(views=["full@32"]))
    run_tiny(tiny, Launches())
    table = Path("patches.csv").read_text().splitlines()
    path, label, *rest = table[1].split(",")
    other = next(line.split(",")[1] for line in table[2:] if line.split(",")[1] != label)
    Path("patches.csv").write_text("\n".join([table[0], ",".join([path, other, *rest]), *table[2:]]) + "\n")
    assert states(tiny) == ["to resume", "to do"]  # the embeddings stay, their table does not
    outcome = run_tiny(tiny, again := Launches())
    assert again.names == ["fm-extract", "fm-probe", "fm-report"]
    assert [one.state for one in outcome.standings] == states(tiny) == ["done", "done"]


def test_what_is_left_of_a_row_that_was_interrupted_is_estimated(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.benchmark_cost.openvino.version", lambda: None)
    rates = dict.fromkeys((True, False), 1e6)  # FLOP/s: the start of a command counts for little
    monkeypatch.setattr("finetune.benchmark_state.measure_rates", lambda device, kinds: rates)
    run_tiny(tiny, Launches(lambda name, arguments: None if name == "fm-extract" else 1))  # the others fail
    found = look(Where())
    half = {key: replace(entry, rows_per_block=4, n_done=2) for key, entry in found.entries.items()}  # of four blocks
    save = finetune.run.save_state

    def save_and_die(*given: Any) -> None:
        save(*given)
        raise Interrupted

    monkeypatch.setattr(finetune.run, "save_state", save_and_die)
    plan = gather(tiny, Where()).plan
    training = plan.rows[3]
    with pytest.raises(UserError, match="interrupted"):
        cli.finetune_app(command(plan, [training], Where())[1:], standalone_mode=False)
    monkeypatch.setattr("finetune.benchmark_state.look", lambda where: replace(look(where), entries=half))
    facts = gather(tiny, Where())
    rows = survey(facts)
    assert [one.state for one in rows] == ["to resume", "to do", "to do", "to resume"]
    assert rows[0].done == {"full@32": 0.5}
    assert rows[3].done == {"": 0.5}  # one epoch of two, of each of three folds
    given = (facts.backbones["efficientnet-lite0"], next(iter(facts.counts.values())), rates, facts.device)
    for one in (rows[0], rows[3]):
        whole, left = estimate(one.row, *given).seconds, one.estimate and one.estimate.seconds
        assert whole is not None
        assert left is not None
        assert 0.3 < left / whole < 0.9  # held-out patches are scored at the end of a training
    damaged = rows[3].run
    assert damaged is not None
    (damaged / "checkpoint.safetensors").write_bytes(b"damaged")
    assert survey(facts)[3].done == {}


@pytest.mark.parametrize(
    ("access", "gated", "reason"),
    [
        ("not asked", True, "gated, not in the cache, hub not asked"),
        ("not granted", True, "gated, no access"),
        ("not granted", False, "weights cannot be had"),
    ],
)
def test_what_keeps_a_model_from_being_had(access: Access, gated: bool, reason: str) -> None:
    check = ModelCheck("uni", "fail", "MahmoodLab/UNI", None, gated, access, f"Do this. Or {hub.LOCAL_FILE}.")
    said, remedy = _lack(check, BACKBONES["uni"])
    assert said == reason
    assert remedy.startswith("Do this.") == (access == "not granted")
    assert "or run this model's commands yourself, with --weights FILE appended" in remedy.replace("Or", "or")
    assert hub.LOCAL_FILE not in remedy
    assert ("request access on https://huggingface.co/MahmoodLab/UNI" in remedy) == (access == "not asked")


def test_a_row_that_fails_does_not_end_the_others(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Launches(nothing)
    monkeypatch.setattr(benchmark, "run_child", launch)
    status, _, err = run_command(capsys, tiny, monkeypatch=monkeypatch)
    assert status == 1
    assert launch.names == ["fm-extract", "fm-finetune", "fm-finetune"]  # there is nothing to probe, nothing to report
    assert "4 of this benchmark failed" in err
    assert err.count("as the test says") == 2 * 3  # as it happens, and at the end
    listed = err.partition("4 of this benchmark failed")[2].splitlines()
    assert "- row 2, efficientnet-lite0 probe exact: row 1, its embeddings, failed." in listed
    assert sum("as the test says. All of it: runs/" in line for line in listed) == 3


def test_models_are_embedded_together_and_each_alone_where_that_fails(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(tiny).write_text(TINY.replace('"efficientnet-lite0"', '["efficientnet-lite0", "efficientnet-lite1"]'))
    run_tiny(tiny, launch := Launches(nothing))
    embedded = [line[line.index("--model") + 1] for line in launch.lines if line[0] == "fm-extract"]
    assert embedded == ["efficientnet-lite0,efficientnet-lite1", "efficientnet-lite0", "efficientnet-lite1"]
    monkeypatch.setattr(benchmark, "device_memory", lambda device: 1e6)
    run_tiny(tiny, launch := Launches(nothing))
    embedded = [line[line.index("--model") + 1] for line in launch.lines if line[0] == "fm-extract"]
    assert embedded == ["efficientnet-lite0", "efficientnet-lite1"]  # memory is short


def flat(launches: Sequence[Launches]) -> list[tuple[str, ...]]:
    """The rows that were run; those that were embedded together one by one."""
    rows = []
    for line in (line for launch in launches for line in launch.lines):
        at = line.index("--model") + 1 if "--model" in line else 0
        rows += [(*line[:at], model, *line[at + 1 :]) for model in line[at].split(",")] if at else [tuple(line)]
    return sorted(rows)


def test_shards_run_what_one_process_runs_and_nothing_twice(tiny: str) -> None:
    """Of models that are embedded, the shard that embeds also probes."""
    Path(tiny).write_text(TINY.replace('"efficientnet-lite0"', '["efficientnet-lite0", "efficientnet-lite1"]'))
    facts = gather(tiny, Where())
    rows = survey(facts)
    alone: list[Row] = []
    dealt: list[Row] = []
    for n_shards, taken in ((1, alone), (2, dealt), (5, dealt := [])):
        taken.clear()
        for index in range(n_shards):
            shard = Shard(index, n_shards)
            mine = [one.row for one in rows if shard.includes(one.row.unit)]
            embedded = {row.model for row in mine if row.method == EMBED}
            assert {row.model for row in mine if row.method == PROBE} == embedded
            taken += mine
        assert sorted(row.number for row in taken) == [row.number for row in facts.plan.rows]
    one, two = Launches(nothing), [Launches(nothing), Launches(nothing)]
    run_benchmark(facts, rows, launch=one)
    for index, launch in enumerate(two):
        run_benchmark(facts, rows, launch=launch, shard=Shard(index, 2, shared=True))
    assert set(flat(two)) == set(flat([one]))
    assert not set(map(tuple, two[0].lines)) & set(map(tuple, two[1].lines))


def shrunk(record: Backbone) -> Backbone:
    """A model of the same layout, one block deep."""
    small: dict[str, Any] = {"arch": record.arch, "kwargs": {"depth": 1, "embed_dim": 32, "num_heads": 2}}
    if "swin" in record.arch:
        small["kwargs"] = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    elif record.card_pooling == "pooled":
        small = {"arch": "test_efficientnet", "kwargs": {}}
    return replace(
        record, arch=small["arch"], kwargs={**record.kwargs, **small["kwargs"]}, sha256=None, n_parameters=10**6
    )


@pytest.mark.slow
def test_every_row_of_banerjee2025_runs_to_the_report_where_there_is_access(
    tiny: str, point: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a hub of shrunken networks, whose gates let this token in; an epoch each."""
    text = (SHIPPED / "banerjee2025.toml").read_text()
    text = text.replace('"ami-br"', '"patches.csv"').replace('["atnorm-br", "atnorm-md"]', "[]")
    Path(tiny).write_text(f"cv = 3\n{text}".replace("[[rows]]", "[[rows]]\nepochs = 1").replace("center64", "center16"))
    repos = {}
    for model in dict.fromkeys(row.model for row in read_plan(tiny).rows):
        record = shrunk(BACKBONES[model])
        monkeypatch.setitem(BACKBONES, model, record)
        state = build_model(record, None).state_dict()
        binary = io.BytesIO()
        torch.save(state, binary)
        content = binary.getvalue() if record.weight_file.endswith(".bin") else safetensors.torch.save(state)
        commit = record.revision if record.revision != "main" else COMMIT
        repos[record.hub_id] = StubRepo({record.weight_file: content}, gated=record.gated, commit=commit)
    with StubHub(repos) as hub:
        point(hub.url)
        assert states(tiny).count("cannot") == 8 * 4 + 23
        monkeypatch.setenv("HF_TOKEN", "hf_member")
        outcome = run_tiny(tiny, launch := Launches())
    failed = [f"{one.row.title}: {one.reason}" for one in outcome.standings if one.state != "done"]
    assert failed == []
    assert launch.names.count("fm-extract") == 1
    assert len(launch.lines[-1]) == 1 + len(read_plan(tiny).rows) - 8 + 2  # fm-report, a run per row, --out


def test_a_row_that_another_process_works_at_is_left_for_last(tiny: str) -> None:
    """As it is while a child lives on whose parent was killed."""
    facts = gather(tiny, Where())
    rows = survey(facts)
    lock = Path("runs") / FOLDER / f"{rows[2].row.key[:16]}.lock"
    lock.parent.mkdir(parents=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    launch = Launches(nothing)

    def release() -> None:
        deadline = time.monotonic() + 60
        while len(launch.lines) < 2 and time.monotonic() < deadline:  # the others
            time.sleep(0.01)
        os.close(descriptor)

    thread = threading.Thread(target=release)
    thread.start()
    run_benchmark(facts, rows, launch=launch)
    thread.join()
    trainings = [line[line.index("--epochs") + 1] for line in launch.lines if line[0] == "fm-finetune"]
    assert trainings == ["2", "1"]


def test_a_child_says_all_in_its_file_and_gives_its_status(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = benchmark._environment(Shard(local_rank=1)) | {"CUDA_VISIBLE_DEVICES": ""}
    assert run_child(["fm-probe", "--nope"], log, environment, ()) == 2
    assert "No such option: --nope" in log.read_text()
    assert benchmark._message(log, -9) == "ended by signal 9, as when memory runs out"


def test_a_child_is_one_process_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_ARRAY_TASK_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    environment = benchmark._environment(Shard(1, 2, local_rank=1))
    assert find_shard(environment=environment) == Shard()
    assert environment["CUDA_VISIBLE_DEVICES"] == "6"
    assert benchmark._environment(Shard())["CUDA_VISIBLE_DEVICES"] == "4,6"
