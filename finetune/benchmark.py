"""How is a benchmark run: each row by its command, by any number of processes, killed at any time?

Every row is a child process, so that no crash, and no memory that is gone, ends the others. Its process holds a lock on
the row, which its child inherits: whoever is killed, no other process takes up a row that still runs. What is done is
looked up again before each row, so that the same command goes on wherever it was killed.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from extract.shard import Shard
from features.console import Interrupted, printable, say
from features.files import writing
from finetune.benchmark_cost import device_memory
from finetune.benchmark_facts import Facts
from finetune.benchmark_plan import EMBED, PROBE, Plan, Row, Where, command, resuming
from finetune.benchmark_state import Standing, look, standing

FOLDER = ".benchmark"  # below the runs: locks, and what commands said
_MAINS = {
    "fm-extract": ("extract.cli", "main"),
    "fm-probe": ("probe.cli", "main"),
    "fm-finetune": ("finetune.cli", "main"),
    "fm-report": ("finetune.cli", "report_main"),
}
# What says of a process that it is one of several: a row's command is one alone.
_OF_SEVERAL = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_\w+"
    r"|SLURM_(ARRAY_TASK_\w+|PROCID|NTASKS|LOCALID|STEP_ID))$"
)
_PATIENCE = 10.0  # seconds in which an interrupted command should end by itself
_WEIGHTS_SHARE = 0.4  # of memory, for the weights of models that are embedded by one command
Launch = Callable[[Sequence[str], Path, Mapping[str, str], Sequence[int]], int]


@dataclass(frozen=True)
class Outcome:
    """What a benchmark has come to.

    Attributes:
        standings: of all rows, in the order of the plan.
        report: the page; None where there is none.
        problem: why there is none, if it failed.
    """

    standings: list[Standing]
    report: Path | None = None
    problem: str = ""


def run_benchmark(
    facts: Facts,
    surveyed: Sequence[Standing],
    *,
    shard: Shard = Shard(),
    out: Path = Path("report.html"),
    launch: Launch | None = None,
) -> Outcome:
    """Run every row of a plan that is left and is this shard's, and make the report.

    A shard makes the report only if no row of the plan is left; a process that has all rows makes it of what there is.

    Args:
        facts, surveyed: see `gather` and `survey`.
        shard: units of the plan are dealt out by their number.
        out: the report's file.
        launch: runs a command; `run_child` by default. Others are for tests.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the child has ended then.
    """
    launch, where = launch or run_child, facts.where
    now = {one.row.number: one for one in surveyed}
    left = [one for one in surveyed if one.state in ("to do", "to resume") and shard.includes(one.row.unit)]
    with writing(where.runs):
        (where.runs / FOLDER).mkdir(parents=True, exist_ok=True)
    environment = _environment(shard)
    started = time.perf_counter()
    queue = list(_together(left, facts))
    n_rows, n_ended, waited = len(left), 0, set[int]()
    while queue:
        group = queue.pop(0)
        if group[0].method == PROBE and any(row.method == EMBED for rows in queue for row in rows):
            queue.append(group)  # another process embeds
            continue
        with _locked(group, where.runs, wait=group[0].number in waited) as descriptors:
            if descriptors is None:  # another process works at it: see to the others first
                waited |= {row.number for row in group}
                queue.append(group)
                continue
            found = look(where)
            ended = [standing(row, facts, found) for row in group]
            ended = [_without_embeddings(one, now) for one in ended]
            todo = [one for one in ended if one.state in ("to do", "to resume")]
            ended = [one for one in ended if one not in todo]
            seconds = 0.0
            if todo:
                line = _command(facts.plan, todo, where)
                if sys.stderr.isatty():
                    say(f"[{n_ended + 1} of {n_rows}] {shlex.join(line)}")
                begun = time.perf_counter()
                log = where.runs / FOLDER / f"{todo[0].row.key[:16]}.log"
                status = launch(line, log, environment, descriptors)
                seconds = time.perf_counter() - begun
                found = look(where)
                if status and len(todo) > 1:  # one of these models may be the reason: each by itself
                    queue = [[one.row] for one in todo] + queue
                    todo = []
                for one in todo:
                    after = standing(one.row, facts, found)
                    if after.state != "done":
                        after = replace(after, state="failed", reason=_message(log, status), remedy=f"All of it: {log}")
                    ended.append(after)
        for one in ended:
            now[one.row.number] = one
            n_ended += 1
            took = f" in {duration(seconds)}{', all together' * (len(ended) > 1)}" if seconds else ""
            said = f": {one.reason}" if one.state in ("failed", "cannot") else took
            say(f"[{n_ended} of {n_rows}] row {one.row.number}, {one.row.title}: {one.state}{said}")
    if left:
        say(f"{n_ended} row{'s' * (n_ended != 1)} in {duration(time.perf_counter() - started)}.")
    found = look(where)
    final = [one if one.state in ("failed", "cannot") else standing(one.row, facts, found) for one in now.values()]
    return _report(Outcome(final), facts, shard, out, launch, environment)


def _together(left: Sequence[Standing], facts: Facts) -> Iterator[list[Row]]:
    """Group rows into commands: models are embedded together, as long as their weights leave room in memory."""
    rows = [one.row for one in left]
    by_views: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.method == EMBED:
            by_views.setdefault(row.views, []).append(row)
    room = _WEIGHTS_SHARE * device_memory(facts.device)
    for of_views in by_views.values():
        group: list[Row] = []
        for row in of_views:
            together = sum(4 * facts.backbones[one.model].n_parameters for one in (*group, row))
            if group and together > room:
                yield group
                group = []
            group.append(row)
        yield group
    for row in rows:
        if row.method != EMBED:
            yield [row]


def _without_embeddings(one: Standing, now: Mapping[int, Standing]) -> Standing:
    """Fail a probe whose model has just not been embedded."""
    if one.row.method != PROBE or one.state == "done":
        return one
    for before in now.values():
        if before.row.method == EMBED and before.row.model == one.row.model and before.state == "failed":
            return replace(one, state="failed", reason=f"row {before.row.number}, its embeddings, failed")
    return one


def _command(plan: Plan, todo: Sequence[Standing], where: Where) -> list[str]:
    (first, *_) = todo
    if first.run is not None:
        return resuming(first.run, where)
    return command(plan, [one.row for one in todo], where)


def _report(
    outcome: Outcome,
    facts: Facts,
    shard: Shard,
    out: Path,
    launch: Launch,
    environment: Mapping[str, str],
) -> Outcome:
    """Make the report of the plan's runs, unless other shards have rows left."""
    where, runs = facts.where, [one.run for one in outcome.standings if one.run is not None and one.state == "done"]
    if not runs or (shard.n_shards > 1 and any(one.state in ("to do", "to resume") for one in outcome.standings)):
        return outcome
    line = report_command(runs, where, out)
    log = where.runs / FOLDER / "report.log"
    if status := launch(line, log, environment, ()):
        return replace(outcome, problem=_message(log, status))
    say(f"{out}: the report of {len(runs)} run{'s' * (len(runs) != 1)}")
    return replace(outcome, report=out)


def report_command(runs: Sequence[Path], where: Where, out: Path) -> list[str]:
    """Write the command that sets runs side by side, those named or all."""
    data = [] if where.data is None else ["--data", str(where.data)]
    return ["fm-report", *map(str, runs), *([] if runs else ["--runs", str(where.runs)]), "--out", str(out), *data]


# ---------------------------------------------------------------------------------------------------- a child process


def run_child(line: Sequence[str], log: Path, environment: Mapping[str, str], descriptors: Sequence[int]) -> int:
    """Run a command in a process of its own, and keep what it says in a file; on a terminal it is shown as well.

    Args:
        line: the command, such as fm-probe, and its arguments.
        log: the file.
        environment: of the process.
        descriptors: that it inherits, with the locks on them.

    Returns:
        Its exit status; -N after signal N.
    """
    name, *arguments = line
    module, function = _MAINS[name]
    code = f"import sys; from {module} import {function} as main; sys.argv[0] = {name!r}; main()"
    whole = [sys.executable, "-P", "-c", code, *arguments]  # -P: no module of the current folder
    with log.open("wb") as file, _stream(file.fileno()) as stream:
        child = subprocess.Popen(
            whole, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, pass_fds=descriptors
        )
        try:
            return child.wait()
        except Interrupted:
            try:  # Ctrl-C has reached it as well
                child.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                child.terminate()
                child.wait()
            raise


@contextmanager
def _stream(log: int) -> Iterator[int]:
    """Give what a child shall write to: the file, or a terminal whose content goes on to ours and into the file."""
    if not sys.stderr.isatty():
        yield log
        return
    ours, its = pty.openpty()
    with suppress(OSError):
        termios.tcsetwinsize(its, termios.tcgetwinsize(sys.stderr.fileno()))
    copier = threading.Thread(target=_copy, args=(ours, log), daemon=True)
    copier.start()
    try:
        yield its
    finally:
        os.close(its)
        copier.join(timeout=1.0)
        os.close(ours)


def _copy(source: int, log: int) -> None:
    """Copy what a terminal says, until nobody has it open to write."""
    with suppress(OSError):  # what Linux answers then
        while said := os.read(source, 1 << 16):
            os.write(log, said)
            os.write(2, said)


def _environment(shard: Shard) -> dict[str, str]:
    """Make the environment of children: each is one process, on this process's GPU of several."""
    environment = {name: value for name, value in os.environ.items() if not _OF_SEVERAL.match(name)}
    if shard.local_rank:
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        rank = shard.local_rank
        environment["CUDA_VISIBLE_DEVICES"] = visible[rank % len(visible)] if visible else str(rank)
    return environment


@contextmanager
def _locked(rows: Sequence[Row], runs: Path, *, wait: bool) -> Iterator[list[int] | None]:
    """Hold the locks of rows; give None where another process, or a child that it has left, holds one."""
    descriptors: list[int] = []
    try:
        for row in rows:
            path = runs / FOLDER / f"{row.key[:16]}.lock"
            descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
            if not _lock(descriptors[-1], fcntl.LOCK_NB):
                if not wait:
                    yield None
                    return
                say(f"row {row.number}, {row.title}: waiting for another process that works at it")
                _lock(descriptors[-1], 0)
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
    except BlockingIOError:
        return False
    except OSError:  # no locks here: shards keep processes apart
        return True
    return True


def _message(log: Path, status: int) -> str:
    """Find the message with which a command failed."""
    said = log.read_text(errors="replace").replace("\r", "\n") if log.is_file() else ""
    if "error: " in said:
        return " ".join(said.rpartition("error: ")[2].split())
    if status < 0:
        return f"ended by signal {-status}" + (", as when memory runs out" if status == -9 else "")
    last = said.strip().splitlines()[-1:] or ["it said nothing"]
    return f"exit status {status}: {last[0]}" if status else "it has ended without a run of these options"


def duration(seconds: float) -> str:
    """Say a number of seconds in a unit that suits it.

    >>> duration(75), duration(1500), duration(90_000)
    ('75 s', '25 min', '25.0 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------------------------------------------------- scripts


def shell_script(facts: Facts, surveyed: Sequence[Standing], out: Path) -> str:
    """Write what is left as a shell script; rows that cannot be run are comments."""
    left = [one for one in surveyed if one.state in ("to do", "to resume")]
    by_number = {one.row.number: one for one in left}
    lines = ["#!/bin/sh", f"# {facts.plan.title}", "# A row that fails does not end the others; the status says so."]
    lines += [f"# cannot: {one.row.title}: {one.reason}" for one in surveyed if one.state == "cannot"]
    lines += ["status=0"]
    for rows in _together(left, facts):
        lines.append(
            f"{shlex.join(_command(facts.plan, [by_number[row.number] for row in rows], facts.where))} || status=1"
        )
    lines += [f"{shlex.join(report_command((), facts.where, out))} || status=1", "exit $status"]
    return _script(lines)


def slurm_script(facts: Facts, surveyed: Sequence[Standing], out: Path) -> str:
    """Write what is left as a SLURM array script, an element per unit, each of which goes on where it was ended."""
    left = [one for one in surveyed if one.state in ("to do", "to resume")]
    units = sorted({one.row.unit for one in left})
    n, where = facts.plan.n_units, facts.where
    flags = [f"--out {shlex.quote(str(out))}"] + [
        f"--{name} {shlex.quote(str(value))}" for name, value in vars(where).items() if value != getattr(Where(), name)
    ]
    if not units:
        return "#!/bin/bash\n# Nothing is left to do."
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={shlex.quote(Path(facts.plan.source).stem)}",
        f"#SBATCH --array={','.join(map(str, units))}",
        "#SBATCH --gpus=1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=64G",
        "#SBATCH --time=24:00:00",
        "#SBATCH --requeue                 # an element that is ended goes on where it was",
        "#SBATCH --output=benchmark-%A_%a.log",
        "#",
        f"# {facts.plan.title}",
        *(f"# {unit}: {', '.join(one.row.title for one in left if one.row.unit == unit)}" for unit in units),
        *(f"# cannot: {one.row.title}: {one.reason}" for one in surveyed if one.state == "cannot"),
        "",
        "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
        " ".join([f'fm-benchmark {shlex.quote(facts.plan.source)} --shard "$SLURM_ARRAY_TASK_ID/{n}"', *flags]),
    ]
    return _script(lines)


def _script(lines: Sequence[str]) -> str:
    """Join the lines of a script; no title or name in a comment makes a line of its own."""
    return "\n".join(printable(line) if line.startswith("#") else line for line in lines)
