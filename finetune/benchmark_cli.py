"""fm-benchmark: run every row of a plan, and report them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from features.console import UserError, as_flags, print_json, print_text, say, show
from features.files import check_output
from features.options import DEFAULT_RUNS, DEFAULT_STORE, DataOption, DeviceOption, JsonOption, RunsOption, StoreOption

if TYPE_CHECKING:  # torch takes seconds to import: the command imports it when it runs
    from extract.shard import Shard
    from finetune.benchmark_facts import Facts
    from finetune.benchmark_state import Standing

benchmark_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@benchmark_app.command(help="fm-benchmark: run every row of a plan, backbones x methods x recipes, and report them.")
def benchmark(
    plan: Annotated[
        str, typer.Argument(metavar="PLAN", help="A TOML file, or demo, embedded or banerjee2025.")
    ] = "demo",
    data: DataOption = None,
    store: StoreOption = DEFAULT_STORE,
    runs: RunsOption = DEFAULT_RUNS,
    device: DeviceOption = "auto",
    shard: Annotated[
        str | None,
        typer.Option(help="I/N: run the I-th of N shards, from 0. Default: what torchrun or SLURM say, else all."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The report's file.")] = Path("report.html"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is done, what is left and what cannot be run here, and stop.")
    ] = False,
    script: Annotated[
        str | None, typer.Option("--print", help="sh or slurm: print what is left as a script, and stop.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    if script not in (None, "sh", "slurm"):
        raise UserError(f"unknown script {script!r}: use --print sh or slurm.")
    if script is not None and (as_json or shard is not None):
        raise UserError(
            f"--print {script} prints a script of all rows: leave out {'--json' if as_json else '--shard'}."
        )
    check_output(out)
    given = os.environ.get("HF_HUB_ETAG_TIMEOUT")
    os.environ["HF_HUB_ETAG_TIMEOUT"] = given or "4"  # as in fm-doctor; it is read when it is imported
    from extract.shard import find_shard
    from finetune.benchmark import run_benchmark, shell_script, slurm_script
    from finetune.benchmark_facts import gather
    from finetune.benchmark_plan import Where
    from finetune.benchmark_state import survey

    if not given:  # children download, with huggingface_hub's own ten seconds
        del os.environ["HF_HUB_ETAG_TIMEOUT"]
    part = find_shard(shard)
    facts = gather(plan, Where(data, store, runs, device))
    rows = survey(facts)
    nothing = UserError("no row of this benchmark can be run here; fm-benchmark --dry-run says what each lacks.")
    if script is not None:
        if all(one.state == "cannot" for one in rows):
            raise nothing
        print_text((shell_script if script == "sh" else slurm_script)(facts, rows, out))
        return
    if not as_json:
        _show_benchmark(facts, rows, part)
    if dry_run:
        if as_json:
            print_json(_benchmark_json(facts, rows, part))
        return
    outcome = run_benchmark(facts, rows, shard=part, out=out)
    failed = [one for one in outcome.standings if one.state == "failed"]
    if as_json:
        print_json(
            _benchmark_json(facts, outcome.standings, part)
            | {"report": None if outcome.report is None else str(outcome.report)}
        )
    messages = [
        f"- row {one.row.number}, {one.row.title}: {_sentences(_flagged(one.reason), one.remedy)}" for one in failed
    ]
    if outcome.problem:
        messages.append(f"- the report: {outcome.problem}")
    if messages:
        raise UserError(
            f"{len(messages)} of this benchmark failed; the same command tries them again:\n" + "\n".join(messages)
        )
    if all(one.state == "cannot" for one in outcome.standings):
        raise nothing


def _sentences(*parts: str) -> str:
    """Join what is said one after the other, each part with its full stop; a path at the end has none."""
    first, *rest = (part for part in parts if part)
    return " ".join([first if first.endswith((".", "?", "!")) else f"{first}.", *rest])


def _flagged(text: str) -> str:
    flags = {name: f"--{name}" for name in ("device", "data", "store", "runs")}  # others are keys of the plan
    return as_flags(text, flags)


def _show_benchmark(facts: Facts, rows: list[Standing], part: Shard) -> None:
    """Show the rows of this part of the plan, what helps where one cannot be run, and what is left."""
    from rich.table import Table

    from finetune.benchmark import duration
    from finetune.benchmark_state import gigabytes

    n_rows, rows = len(rows), [one for one in rows if part.includes(one.row.unit)]
    table = Table(title=facts.plan.title, title_style="bold", header_style="bold")
    for column in ("Row", "Model", "Method", "Recipe", "", "Time, about", "Memory"):
        numeric = column in ("Row", "Time, about", "Memory")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for one in rows:
        row, needs = one.row, one.estimate
        left = one.state in ("to do", "to resume") and needs is not None
        table.add_row(
            str(row.number),
            row.model,
            row.method,
            row.recipe,
            f"{one.state}: {one.reason}" if one.reason else one.state,
            duration(needs.seconds) if left and needs and needs.seconds is not None else "",
            gigabytes(needs.memory) if needs is not None and one.state != "done" else "",
        )
    show(table)
    remedies: dict[str, list[str]] = {}
    for one in rows:
        if one.state == "cannot":
            remedies.setdefault(f"{one.row.model}: {_flagged(one.remedy)}", []).append(str(one.row.number))
    for note in facts.notes:
        say(_flagged(note))
    for remedy, numbers in remedies.items():
        say(f"Row{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {remedy}")
    counts = {state: sum(one.state == state for one in rows) for state in ("done", "to resume", "to do", "cannot")}
    estimates = [one.estimate for one in rows if one.state in ("to do", "to resume")]
    seconds = [each.seconds for each in estimates if each is not None and each.seconds is not None]
    said = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    if seconds:  # of probes of imported embeddings nothing is known beforehand
        what = "What is left" if len(seconds) == len(estimates) else "What of it has an estimate"
        said += f". {what} should take about {duration(sum(seconds))} here, on a machine that does nothing else"
    of_all = f" of {n_rows}, part {part.index}/{part.n_shards}" if part.n_shards > 1 else ""
    say(f"{len(rows)} row{'s' * (len(rows) != 1)}{of_all}: {said or 'none'}.")


def _benchmark_json(facts: Facts, rows: list[Standing], part: Shard) -> dict[str, object]:
    """Make the object that --json prints: all rows of the plan, and the seconds that this part of it should take."""
    from finetune.benchmark_plan import command

    left = [one.estimate for one in rows if one.state in ("to do", "to resume") and part.includes(one.row.unit)]
    return {
        "plan": facts.plan.source,
        "title": facts.plan.title,
        "notes": [_flagged(note) for note in facts.notes],
        "seconds": sum(needs.seconds or 0 for needs in left if needs),
        "rows": [
            {
                "row": one.row.number,
                "unit": one.row.unit,
                "model": one.row.model,
                "method": one.row.method,
                "recipe": one.row.recipe,
                "state": one.state,
                "reason": one.reason,
                "remedy": _flagged(one.remedy),
                "run": None if one.run is None else str(one.run),
                "command": command(facts.plan, [one.row], facts.where),
                "seconds": one.estimate.seconds if one.estimate else None,
                "memory_bytes": round(one.estimate.memory) if one.estimate else None,
            }
            for one in rows
        ],
    }
