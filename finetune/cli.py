"""fm-finetune, fm-report, fm-doctor: adapt backbones, compare runs, test a machine."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from features.console import UserError, as_flags, print_json, print_text, printable, run, say, show
from features.files import check_output
from features.options import (
    DEFAULT_RUNS,
    MOST_EPOCHS,
    MOST_FOLDS,
    MOST_IMAGES,
    ClassesOption,
    CvOption,
    DataOption,
    DeviceOption,
    EnsembleWeightsOption,
    FoldsByOption,
    FoldSeedOption,
    JsonOption,
    LabelsOption,
    MppOption,
    OrdinalOption,
    PositiveOption,
    RunsOption,
    SeedsOption,
    SizeOption,
    SizeUmOption,
    SkipUnlabelledOption,
    SlidesOption,
    SoftLabelsOption,
    WeightsOption,
    parse_names,
    parse_numbers,
)
from finetune.benchmark_cli import benchmark_app
from finetune.predict_cli import predict_app

if TYPE_CHECKING:  # torch takes seconds to import: commands import it when they run
    from extract.doctor import Diagnosis
    from finetune.plan import Plan

finetune_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
report_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
doctor_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@finetune_app.command(help="fm-finetune: adapt a backbone to patches, by LoRA or as a whole, all folds at once.")
def finetune(
    context: typer.Context,
    lora_rank: Annotated[int, typer.Option(help="Inner width of the adapters.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="Adapters are scaled by alpha / rank.")] = 16,
    lora_dropout: Annotated[
        float, typer.Option(help="Fraction of an adapter's inputs that is dropped while training.")
    ] = 0.3,
    lora_targets: Annotated[
        str | None, typer.Option(help="Regular expression of whole module names. Default: the family's, see --dry-run.")
    ] = None,
    model: Annotated[str, typer.Option(help="One model, named as for fm-extract.")] = "efficientnet-lite0",
    train: Annotated[
        str, typer.Option(help="Dataset whose training split is cross-validated: a name, or a path as in fm-extract.")
    ] = "demo",
    test: Annotated[
        str | None, typer.Option(help="More datasets to score, comma-separated. Default: the other published ones.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="lora, full (the whole backbone, folds in turn) or head (the classifier alone).")
    ] = "lora",
    recipe: Annotated[
        str, typer.Option(help="default; paper: the text of Banerjee et al. 2025; authors: its scripts.")
    ] = "default",
    view: Annotated[
        str | None, typer.Option(help="full, centerN, centerN@M, any with +imagenet. Default: the recipe's.")
    ] = None,
    cv: CvOption = 5,
    folds_by: FoldsByOption = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=MOST_EPOCHS, help="Epochs, at most. Default: the recipe's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=MOST_IMAGES, help="Patches per fold and step. Default: the recipe's.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its start or peak. Default: the recipe's.")] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**32 - 1, help="Seed of everything that training draws: not of the folds."),
    ] = 42,
    seeds: SeedsOption = 1,
    fold_seed: FoldSeedOption = 42,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    positive: PositiveOption = None,
    labels: LabelsOption = None,
    skip_unlabelled: SkipUnlabelledOption = False,
    classes: ClassesOption = None,
    ordinal: OrdinalOption = False,
    soft_labels: SoftLabelsOption = None,
    tta: Annotated[
        bool | None,
        typer.Option(
            "--tta/--no-tta", help="Score patches by the mean over eight flips and turns. Default: the recipe's."
        ),
    ] = None,
    slides: SlidesOption = None,
    size: SizeOption = None,
    size_um: SizeUmOption = None,
    mpp: MppOption = None,
    data: DataOption = None,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    folds_at_once: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_FOLDS, help="Folds, of all seeds, per forward pass. Default: all on a GPU, one on a CPU."
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Compile the backbone's blocks. Default: on an NVIDIA GPU, where it pays."
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast/--no-fast", help="Fold norms on a CPU, try kernels and graphs on NVIDIA GPUs; or plain PyTorch."
        ),
    ] = True,
    grad_checkpointing: Annotated[
        bool, typer.Option("--grad-checkpointing", help="Recompute activations: less memory, a third more time.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also write each fold as a plain timm network, adapters merged.")
    ] = False,
    runs: RunsOption = DEFAULT_RUNS,
    resume: Annotated[Path | None, typer.Option(help="The folder of an interrupted run to go on with.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be adapted, its parameters and memory, and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    from finetune.lora import LoraOptions
    from finetune.options import ComputeOptions, FinetuneOptions
    from finetune.process_group import join_process_group
    from finetune.run import finetune
    from finetune.run import resume as resume_training

    with join_process_group() as process_group:
        options = FinetuneOptions(
            model=model,
            train=train,
            test=None if test is None else parse_names(test),
            method=method,  # type: ignore[arg-type]
            recipe=recipe,
            lora=LoraOptions(rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, targets=lora_targets),
            view=view,
            cv=cv,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            seeds=seeds,
            fold_seed=fold_seed,
            precision=precision,
            positive=positive,
            labels=labels,
            skip_unlabelled=skip_unlabelled,
            classes=None if classes is None else parse_names(classes, option="--classes"),
            ordinal=ordinal,
            soft_labels=soft_labels,
            tta=tta,
            folds_by=folds_by,
            size=size,
            size_um=size_um,
            mpp=mpp,
        )
        compute_options = ComputeOptions(
            data=data,
            weights=weights,
            device=device,
            folds_at_once=folds_at_once,
            compile=compile,
            fast=fast,
            grad_checkpointing=grad_checkpointing,
            merge=merge,
            slides=slides,
        )
        if dry_run:
            from finetune.plan import make_plan

            plan = make_plan(options, compute_options)
            if as_json:
                print_json(asdict(plan))
            else:
                _show_plan(plan)
            return
        if resume is None:
            run = finetune(options, compute_options=compute_options, runs=runs, process_group=process_group)
        else:
            values = options.by_name() | vars(compute_options)
            names = [name.replace("lora_", "lora.") for name in _given(context)]
            given = {name: values[name] for name in names if name in values}
            run = resume_training(resume, given=given, process_group=process_group)
    if run is None:
        return  # another process prints
    if as_json:
        print_json({"runs": [str(run.folder)], "results": [run.as_json()]})
        return
    from probe.report.terminal import result_tables, training_table

    show(training_table(run), *result_tables([run]))
    say(f"run written to {run.folder}/")


def _given(context: typer.Context) -> list[str]:
    """List the parameters that stood on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _show_plan(plan: Plan) -> None:
    from rich.table import Table

    modules = Table(title=f"{plan.model}: {len(plan.modules)} modules would be adapted", header_style="bold")
    for column in ("Module", "Kind", "in", "out", "Trained per fold"):
        modules.add_column(column, justify="left" if column in ("Module", "Kind") else "right", no_wrap=True)
    for module in plan.modules:
        modules.add_row(module.name, module.kind, f"{module.n_in:,}", f"{module.n_out:,}", f"{module.n_trained:,}")
    memory = {
        "frozen weights": plan.weights_mb,
        "trained values, gradients, moments, best": plan.rows_mb,
        f"activations ({plan.precision}, {plan.batch_size} images per fold)": plan.kept_mb,
        "estimated peak": plan.weights_mb + plan.rows_mb + plan.kept_mb,
    }
    total = Table(title="Together", header_style="bold", show_header=False)
    total.add_column()
    total.add_column(justify="right")
    total.add_row("Parameters of the backbone", f"{plan.n_parameters:,}")
    total.add_row("Trained per fold", f"{plan.n_trained:,} ({plan.n_trained / plan.n_parameters:.2%})")
    seeds = f" x {plan.n_seeds} seeds" if plan.n_seeds > 1 else ""
    total.add_row("Folds", f"{plan.n_folds}{seeds} ({plan.folds_at_once} per forward pass)")
    for what, megabytes in memory.items():
        total.add_row(f"Memory: {what}", f"{megabytes:,.0f} MB")
    show(*([modules] if plan.modules else []), total)


@report_app.command(
    help="fm-report: set runs side by side in one page, with intervals, tests and the patches themselves."
)
def report(
    named: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]…", help="Folders of runs. Default: all in the runs folder.")
    ] = None,
    runs: RunsOption = DEFAULT_RUNS,
    out: Annotated[
        Path | None, typer.Option(help="The file to write. Default: report.html; tables go to the terminal.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="html; csv: every figure, a row each; markdown or latex: tables for a paper.")
    ] = "html",
    ensemble: Annotated[
        str | None,
        typer.Option(help="RUN,RUN,... or all: also judge the mean of these runs, which share training set and folds."),
    ] = None,
    ensemble_weights: EnsembleWeightsOption = "equal",
    folds: Annotated[str | None, typer.Option(help="First digits of a fold digest: only runs on those folds.")] = None,
    data: Annotated[
        Path | None, typer.Option(envvar="MITOFM_DATA", show_envvar=False, help="Folder of the known datasets.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Feature store of the embedding map. Default: the one that was probed.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(help="Differences below this do not matter, e.g. 0.02: which runs are equivalent, or no worse?"),
    ] = None,
    difference: Annotated[
        float | None, typer.Option(help="A difference to be shown, e.g. 0.03: how many slides would do?")
    ] = None,
    prevalence: Annotated[
        str | None,
        typer.Option(help="Rates of the positive class for predictive values, e.g. 0.1,0.3."),
    ] = None,
    specificity: Annotated[float, typer.Option(help="Specificity at which sensitivities are compared.")] = 0.9,
    holm: Annotated[
        str,
        typer.Option(
            help="set: p-values are adjusted for all pairs of a set and figure; all: of all sets and figures."
        ),
    ] = "set",
    design_effect: Annotated[
        float,
        typer.Option(
            help="Where slides are unknown: how many times the variance may be what independent patches would give. "
            "Intervals are given for 1 and for this."
        ),
    ] = 2.0,
    replicates: Annotated[int, typer.Option(help="Resamples that intervals and tests are drawn from.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the resamples.")] = 42,
    as_json: JsonOption = False,
) -> None:
    if format not in ("html", "csv", "markdown", "latex"):
        raise UserError(f"unknown format {format!r}: use html, csv, markdown or latex.")
    path = Path("report.html") if out is None and format == "html" else out
    if path is not None:
        check_output(path)
    from finetune.report import make_report, write_report
    from probe.evidence import Question
    from probe.metrics import as_dict
    from probe.report.collect import ReportOptions
    from probe.resample import Resampling

    text, figures, _ = make_report(
        runs,
        named=named or (),
        ensemble=() if ensemble is None else parse_names(ensemble, option="--ensemble"),
        ensemble_weights=ensemble_weights,
        folds=folds,
        format=format,  # type: ignore[arg-type]
        data=data,
        store=store,
        resampling=Resampling(replicates=replicates, seed=seed, design_effect=design_effect),
        options=ReportOptions(
            question=Question(margin=margin, wanted=difference),
            prevalences=() if prevalence is None else parse_numbers(prevalence, option="--prevalence"),
            specificity=specificity,
            holm=holm,  # type: ignore[arg-type]
        ),
    )
    for sentence in figures.summary:
        say(sentence)
    for note in figures.notes:
        say(f"note: {note}")
    if path is not None:
        write_report(text, path)
        n_runs, n_sets = len(figures.labels), len(figures.sets)
        say(
            f"{path}: {n_runs} run{'s' * (n_runs > 1)} on {n_sets} set{'s' * (n_sets > 1)}, "
            f"{len(text.encode()) / 1e6:.1f} MB"
        )
    elif not as_json:
        print_text(text.removesuffix("\n"))
    if as_json:
        print_json(as_dict(figures))


@doctor_app.command(help="fm-doctor: can this machine do what is asked of it, and if not, what helps?")
def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Models, comma-separated, that must be available here. Default: all, as information."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; a GPU that is named must be there, and is tested.")
    ] = "auto",
    data: DataOption = None,
    store: Annotated[
        str | None, typer.Option(help="A feature store that must be there. Default: embeddings.zarr, if there is one.")
    ] = None,
    runs: RunsOption = DEFAULT_RUNS,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte of the patches and of the store.")] = False,
    as_json: JsonOption = False,
) -> None:
    # huggingface_hub reads it when it is imported. Its default of ten seconds is meant for downloads.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "4")

    from extract.doctor import DoctorOptions, diagnose

    models = parse_names(model, option="--model") if model is not None else ()
    diagnosis = diagnose(DoctorOptions(models, device, data, store, runs, verify))
    if device.startswith("cuda") and not any(c.status == "fail" for c in diagnosis.checks if c.group == "machine"):
        from features.device import find_device
        from finetune.self_check import self_check

        diagnosis = replace(diagnosis, checks=[*diagnosis.checks, *self_check(find_device(device))])
    # The remedies concern the options of every command.
    flags = {name: f"--{name}" for name in ("device", "data", "store", "runs", "model", "weights", "positive", "view")}
    diagnosis = replace(
        diagnosis,
        checks=[replace(check, remedy=as_flags(check.remedy, flags)) for check in diagnosis.checks],
        models=[replace(check, remedy=as_flags(check.remedy, flags)) for check in diagnosis.models],
    )
    if as_json:
        print_json({"ok": not diagnosis.failed} | asdict(diagnosis))
        raise typer.Exit(1 if diagnosis.failed else 0)
    _show_diagnosis(diagnosis, all_models=model is None)


def _show_diagnosis(diagnosis: Diagnosis, *, all_models: bool) -> None:
    from rich.table import Table

    marks = {"ok": "ok", "note": "note", "fail": "FAIL"}
    checks = Table(header_style="bold")
    for column in ("", "", "", "Found"):
        checks.add_column(column, no_wrap=column == "")
    group = ""
    for check in diagnosis.checks:
        if check.group != group:
            checks.add_section()
        title = check.group if check.group != group else ""
        checks.add_row(title, check.name, marks[check.status], printable(check.found))
        group = check.group
    models = Table(header_style="bold")
    for column in ("Model", "", "Cached", "Gated", "Access"):
        models.add_column(column, no_wrap=True)
    for line in diagnosis.models:
        cached = line.cached.split()[-1][:12] if line.cached else "–"  # a commit, or a package's version
        models.add_row(line.name, marks[line.status], cached, "gated" if line.gated else "", line.access)
    show(checks, models)
    for check in diagnosis.checks:
        if check.status == "note" and check.remedy:
            print_text(f"{check.name}: {check.remedy}")
    if all_models and any(line.status == "note" for line in diagnosis.models):
        print_text("`fm-doctor --model NAME` says what a model lacks.")
    if diagnosis.failed:
        raise UserError(
            f"{len(diagnosis.failed)} of these cannot work as they are:\n"
            + "\n".join(f"- {line.name}: {line.remedy}" for line in diagnosis.failed)
        )
    print_text("Everything that was asked for can work here.")


# The commands fm-finetune, fm-predict, fm-report, fm-doctor and fm-benchmark.
main, predict_main, report_main = partial(run, finetune_app), partial(run, predict_app), partial(run, report_app)
doctor_main, benchmark_main = partial(run, doctor_app), partial(run, benchmark_app)


if __name__ == "__main__":  # torchrun -m finetune.cli
    main()
