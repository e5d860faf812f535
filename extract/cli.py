"""fm-extract: run frozen backbones over patches once, and keep their embeddings in the feature store."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from features.console import UserError, as_flags, no_progress, print_json, print_text, printable, run, say, show
from features.options import (
    DEFAULT_RUNS,
    DEFAULT_STORE,
    MOST_IMAGES,
    MOST_WORKERS,
    DataOption,
    DeviceOption,
    JsonOption,
    LabelsOption,
    OverwriteOption,
    PositiveOption,
    RunsOption,
    SkipUnlabelledOption,
    StoreOption,
    WeightsOption,
    parse_names,
)

if TYPE_CHECKING:
    from extract.doctor import Diagnosis

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
doctor_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def extract(
    model: Annotated[
        str, typer.Option(help="Models, comma-separated: a name of --list-models, timm/NAME, or hf-hub:ORG/REPO[@REV].")
    ] = "efficientnet-lite0",
    dataset: Annotated[
        str,
        typer.Option(
            help="Datasets, comma-separated: names of --list-datasets, or PATH or NAME=PATH (folder, CSV, HDF5 or NPZ)."
        ),
    ] = "demo",
    data: DataOption = None,
    store: StoreOption = DEFAULT_STORE,
    device: DeviceOption = "auto",
    view: Annotated[
        str,
        typer.Option(help="Views, comma-separated: full, centerN (central N source pixels), centerN@M (input of M)."),
    ] = "full",
    precision: Annotated[
        str,
        typer.Option(
            help="auto, fp32, bf16 or fp16. auto: as the model card asks, else bf16 where embeddings hardly change."
        ),
    ] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=MOST_IMAGES, help="Images per forward pass. Default: found automatically.")
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(help="Compile networks for an NVIDIA GPU: faster after the first minute, other last digits."),
    ] = True,
    weights: WeightsOption = None,
    positive: PositiveOption = None,
    labels: LabelsOption = None,
    skip_unlabelled: SkipUnlabelledOption = False,
    overwrite: OverwriteOption = False,
    shard: Annotated[
        str | None,
        typer.Option(help="I/N: embed the I-th of N shards, from 0. Default: what torchrun or SLURM say, else all."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: a pool of Ray actors, one per GPU.")] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_WORKERS, help="Ray actors. Default: one per GPU, else one per four processors."),
    ] = None,
    list_models: Annotated[bool, typer.Option("--list-models", help="Show every model and stop.")] = False,
    list_datasets: Annotated[
        bool, typer.Option("--list-datasets", help="Show every dataset (Table 1) and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    if list_models or list_datasets:
        _show_lists(list_models, list_datasets, data, as_json)
        return

    from extract.backbones import find_backbone
    from extract.datasets import load_dataset, local_data, require_distinct_names
    from extract.embed import extract_dataset
    from extract.prepare import ExtractOptions
    from extract.shard import find_shard
    from extract.views import parse_view
    from features.labels import parse_renaming
    from features.leaks import shared_with_others
    from features.samples import audit
    from features.store import FeatureStore

    options = ExtractOptions(parse_names(view, option="--view"), device, precision, batch_size, overwrite, fast)
    for text in options.views:
        parse_view(text)
    part = find_shard(shard)
    if engine not in ("local", "ray"):
        raise UserError(f"unknown engine {engine!r}: use local or ray.")
    if engine == "ray":
        from extract.ray_actors import ExtractionSpec, embed_by_ray, find_ray, require_no_gpu_named

        require_no_gpu_named(options)
        find_ray()
        if part.shared:
            raise UserError("--engine ray divides the work: start it once, not by --shard, torchrun or SLURM.")
    elif workers is not None:
        raise UserError("--workers is for --engine ray; for several processes without Ray see --shard.")
    if part.local_rank:
        no_progress()
    # Every mistake in a name is found before the first patch is read.
    backbones = [find_backbone(name) for name in parse_names(model, option="--model")]
    datasets = parse_names(dataset, option="--dataset")
    require_distinct_names(datasets)
    renamed = parse_renaming(labels)
    reading: dict[str, Any] = {
        "positive": positive,
        "labels": renamed,
        "skip_unlabelled": skip_unlabelled,
    }
    if part.n_shards > 1 and not part.local_rank:
        say(f"This is rank {part.index} of {part.n_shards}: it embeds its shard of the blocks. --shard 0/1 takes all.")
    loaded = [load_dataset(name, data=data, **reading) for name in datasets]
    renamed.require_met()
    summaries = []
    for name, patches in zip(datasets, loaded, strict=True):
        target = FeatureStore.open_or_create(store)
        if not part.local_rank:
            for line in audit(patches.samples).lines():
                say(f"{patches.name}: {line}.")
            for line in shared_with_others(target, patches.name, patches.samples):
                say(f"{line}.")
        if engine == "ray":
            models = tuple(backbone.name for backbone in backbones)
            spec = ExtractionSpec(name, models, store, {"data": local_data(data), **reading}, weights, options)
            done = embed_by_ray(spec, n_actors=workers)
        else:
            done = extract_dataset(patches, backbones, store=target, options=options, weights=weights, shard=part)
        for summary in done:
            say(summary.line())
        summaries += done
    if as_json:
        print_json({"store": store, "embeddings": [asdict(summary) for summary in summaries]})


def _show_lists(models: bool, datasets: bool, data: Path | None, as_json: bool) -> None:
    from rich.table import Table

    lists: dict[str, Any] = {}
    tables = []
    if models:
        from extract.backbones import list_models

        lists["models"] = list_models()
        table = Table(title="Models", title_style="bold", header_style="bold")
        for column in ("Name", "Parameters", "Embedding", "GFLOPs", "mpp", "Licence", "Gated"):
            numeric = column in ("Parameters", "Embedding", "GFLOPs", "mpp")
            table.add_column(column, justify="right" if numeric else "left", no_wrap=column in ("Name", "Parameters"))
        for row in lists["models"]:
            table.add_row(
                row["name"],
                f"{row['parameters'] / 1e6:,.1f} M",
                f"{row['embedding']:,}",
                f"{row['gflops']:,.1f}",
                ", ".join(f"{mpp:g}" for mpp in row["mpp"]),
                row["licence"],
                "gated" if row["gated"] else "",
            )
        tables.append(table)
    if datasets:
        from extract.table1 import table1, table1_rows

        summaries = table1(data)
        lists["datasets"] = [summary.as_json() for summary in summaries]
        table = Table(title="Datasets (Table 1 of the paper, recomputed)", title_style="bold", header_style="bold")
        table.add_column("")
        for summary in summaries:
            table.add_column(f"{summary.title}\n{summary.name}", justify="right")
        for title, cells in table1_rows(summaries):
            table.add_row(title, *cells)
        tables.append(table)
    if as_json:
        print_json(lists)
        return
    show(*tables)


@doctor_app.command(help="fm-doctor: can this machine do what is asked of it, and if not, what helps?")
def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Models, comma-separated, that must be available here. Default: all, as information."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; a GPU that is named must be there.")
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


main, doctor_main = partial(run, app), partial(run, doctor_app)  # the commands fm-extract and fm-doctor


if __name__ == "__main__":  # torchrun -m extract.cli
    main()
