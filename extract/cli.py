"""fm-extract: run frozen backbones over patches once, and keep their embeddings in the feature store."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from features.console import UserError, no_progress, print_json, printable, run, say, show

if TYPE_CHECKING:
    from extract.doctor import Examination

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
            help="Datasets, comma-separated: a name of --list-datasets, a class-per-folder path, CSV or HDF5."
        ),
    ] = "demo",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder laid out like AMi-Br_Benchmark. Default: $MITOFM_DATA, else download."),
    ] = None,
    store: Annotated[str, typer.Option(help="The feature store: a folder, or s3://bucket/prefix.")] = "embeddings.zarr",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    view: Annotated[
        str,
        typer.Option(help="Views, comma-separated: full, centerN (central N source pixels), centerN@M (input of M)."),
    ] = "full",
    precision: Annotated[
        str, typer.Option(help="auto, fp32, bf16 or fp16. auto: as the card asks, else bf16 where it changes nothing.")
    ] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per forward pass. Default: found automatically.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="A local checkpoint instead of the hub's.")] = None,
    positive: Annotated[
        str | None, typer.Option(help="The class that counts as positive, for datasets of your own.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace embeddings that were computed otherwise.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(help="I/N: embed the I-th of N shares, from 0. Default: what torchrun or SLURM say, else all."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: a pool of Ray actors, one per GPU.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray actors. Default: one per GPU, else one per four processors.")
    ] = None,
    list_models: Annotated[bool, typer.Option("--list-models", help="Show every model and stop.")] = False,
    list_datasets: Annotated[
        bool, typer.Option("--list-datasets", help="Show every dataset (Table 1) and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    if list_models or list_datasets:
        _show_lists(list_models, list_datasets, data, as_json)
        return

    from extract.backbones import find_backbone
    from extract.datasets import load_dataset
    from extract.embed import ExtractOptions, extract_dataset
    from extract.shard import find_shard
    from extract.views import parse_view
    from features.samples import audit
    from features.store import FeatureStore

    options = ExtractOptions(
        views=_names(view, "--view"),
        device=device,
        precision=precision,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    for text in options.views:
        parse_view(text)
    share = find_shard(shard)
    if engine not in ("local", "ray"):
        raise UserError(f"unknown engine {engine!r}: use local or ray.")
    if engine == "ray":
        from extract.ray_actors import Work, embed_by_ray, find_ray

        find_ray()
    if engine == "ray" and share.shared:
        raise UserError("--engine ray deals the work out by itself: start it once, not by --shard, torchrun or SLURM.")
    if engine != "ray" and workers is not None:
        raise UserError("--workers is for --engine ray; for several processes without Ray see --shard.")
    if share.local_rank:
        no_progress()
    # Every mistake in a name is found before the first patch is read.
    backbones = [find_backbone(name) for name in _names(model, "--model")]
    if share.n_ranks > 1 and not share.local_rank:
        say(f"This is rank {share.rank} of {share.n_ranks}: it embeds its share of the blocks. --shard 0/1 takes all.")
    summaries = []
    for name in _names(dataset, "--dataset"):
        patches = load_dataset(name, data=data, positive=positive)
        for line in audit(patches.samples).lines() if not share.local_rank else ():
            say(f"{patches.name}: {line}.")
        target = FeatureStore.open_or_create(store)
        if engine == "ray":
            work = Work.here(name, [backbone.name for backbone in backbones], store, data, positive, weights, options)
            done = embed_by_ray(work, n_actors=workers)
        else:
            done = extract_dataset(patches, backbones, store=target, options=options, weights=weights, share=share)
        for summary in done:
            say(summary.line())
            summaries.append(summary)
    if as_json:
        print_json({"store": store, "embeddings": [asdict(summary) for summary in summaries]})


def _names(text: str, option: str) -> tuple[str, ...]:
    """A comma-separated option as distinct names, in order."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"{option} names nothing: found {text!r}, expected one or more names separated by commas.")
    return names


def _show_lists(models: bool, datasets: bool, data: Path | None, as_json: bool) -> None:
    from rich.table import Table

    found: dict[str, Any] = {}
    tables = []
    if models:
        from extract.backbones import list_models

        found["models"] = list_models()
        table = Table(title="Models", title_style="bold", header_style="bold")
        for column in ("Name", "Parameters", "Embedding", "GFLOPs", "mpp", "Licence", "Gated"):
            numeric = column in ("Parameters", "Embedding", "GFLOPs", "mpp")
            table.add_column(column, justify="right" if numeric else "left", no_wrap=column in ("Name", "Parameters"))
        for row in found["models"]:
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
        found["datasets"] = [
            asdict(summary) | {"n_total": summary.n_total, "atypical_rate": summary.atypical_rate}
            for summary in summaries
        ]
        table = Table(title="Datasets (Table 1 of the paper, recomputed)", title_style="bold", header_style="bold")
        table.add_column("")
        for summary in summaries:
            table.add_column(f"{summary.title}\n{summary.name}", justify="right")
        for title, cells in table1_rows(summaries):
            table.add_row(title, *cells)
        tables.append(table)
    if as_json:
        print_json(found)
        return
    show(*tables)


@doctor_app.command(help="fm-doctor: can this machine do what is asked of it, and if not, what mends it?")
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Models, comma-separated, that must be had here. Default: a look at every one.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; a GPU that is named must be there.")] = "auto",
    data: Annotated[
        Path | None, typer.Option(help="Folder laid out like AMi-Br_Benchmark. Default: $MITOFM_DATA, else a download.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="A feature store that must be there. Default: embeddings.zarr, if there is one.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="The folder of all runs.")] = Path("runs"),
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte of the patches and of the store.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    # huggingface_hub reads it when it is imported. Its own ten seconds are for downloads, not for a look.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "4")

    from extract.doctor import DoctorOptions, examine

    models = _names(model, "--model") if model is not None else ()
    found = examine(DoctorOptions(models, device, data, store, runs, verify))
    if as_json:
        print_json({"ok": not found.failed} | asdict(found))
        raise typer.Exit(1 if found.failed else 0)
    _show_examination(found, complete=model is None)


def _show_examination(found: Examination, *, complete: bool) -> None:
    from rich.table import Table

    marks = {"ok": "ok", "note": "note", "fail": "FAIL"}
    checks = Table(header_style="bold")
    for column in ("", "", "", "Found"):
        checks.add_column(column, no_wrap=column == "")
    before = ""
    for check in found.checks:
        if check.group != before:
            checks.add_section()
        title = check.group if check.group != before else ""
        checks.add_row(title, check.name, marks[check.status], printable(check.found))
        before = check.group
    models = Table(header_style="bold")
    for column in ("Model", "", "Cached", "Gated", "Access"):
        models.add_column(column, no_wrap=True)
    for line in found.models:
        cached = line.cached.split()[-1][:12] if line.cached else "–"  # a commit, or a package's version
        models.add_row(line.name, marks[line.status], cached, "gated" if line.gated else "", line.access)
    show(checks, models)
    for check in found.checks:
        if check.status == "note" and check.remedy:
            print(printable(f"{check.name}: {check.remedy}"))
    if complete and any(line.status == "note" for line in found.models):
        print("`fm-doctor --model NAME` says what a model lacks.")
    if found.failed:
        raise UserError(
            f"{len(found.failed)} of these cannot work as they are:\n"
            + "\n".join(f"- {line.name}: {line.remedy}" for line in found.failed)
        )
    print("Everything that was asked for can work here.")


def main() -> None:
    """Entry point of `fm-extract`."""
    run(app)


def doctor_main() -> None:
    """Entry point of `fm-doctor`."""
    run(doctor_app)


if __name__ == "__main__":  # torchrun -m extract.cli
    main()
