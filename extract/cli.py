"""fm-extract: run frozen backbones over patches once, and keep their embeddings in the feature store."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from features.console import UserError, no_progress, print_json, run, say, show
from features.options import (
    DEFAULT_STORE,
    MOST_IMAGES,
    MOST_WORKERS,
    ClassesOption,
    DataOption,
    DeviceOption,
    JsonOption,
    LabelsOption,
    MppOption,
    OrdinalOption,
    OverwriteOption,
    PositiveOption,
    SizeOption,
    SizeUmOption,
    SkipUnlabelledOption,
    SlidesOption,
    StoreOption,
    WeightsOption,
    parse_names,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def extract(
    model: Annotated[
        str,
        typer.Option(
            help="Models, comma-separated: a name of --list-models, timm/NAME, hf-hub:ORG/REPO[@REV], or a Python file "
            "of your own, FILE.py[:FUNCTION], which is run."
        ),
    ] = "efficientnet-lite0",
    dataset: Annotated[
        str,
        typer.Option(
            help="Datasets, comma-separated: names of --list-datasets, or PATH or NAME=PATH (folder, CSV, HDF5, NPZ, "
            "or points on slides)."
        ),
    ] = "demo",
    data: DataOption = None,
    store: StoreOption = DEFAULT_STORE,
    device: DeviceOption = "auto",
    view: Annotated[
        str,
        typer.Option(
            help="Views, comma-separated: full, centerN (central N source pixels); then @M (input of M pixels); then "
            "+imagenet or +half (normalised by these), +flips (mean over eight orientations), or +rot90, +fliph, "
            "+stain, +blur or +mpp2 (altered, to test a backbone)."
        ),
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
        typer.Option(help="Compile networks where that pays, on CPUs by OpenVINO; their last digits are others."),
    ] = True,
    weights: WeightsOption = None,
    positive: PositiveOption = None,
    classes: ClassesOption = None,
    ordinal: OrdinalOption = False,
    labels: LabelsOption = None,
    skip_unlabelled: SkipUnlabelledOption = False,
    slides: SlidesOption = None,
    size: SizeOption = None,
    size_um: SizeUmOption = None,
    mpp: MppOption = None,
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
        bool, typer.Option("--list-datasets", help="Show every dataset (Table 1 and others) and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    if list_models or list_datasets:
        _show_lists(list_models, list_datasets, data, as_json)
        return

    from extract.backbones import find_backbone
    from extract.datasets import load_dataset, local_data, require_distinct_names, require_slides_used
    from extract.embed import extract_dataset
    from extract.prepare import ExtractOptions
    from extract.shard import find_shard
    from extract.slides import Slides
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
    models = parse_names(model, option="--model")
    backbones = [find_backbone(name, run_file=True) for name in models]
    datasets = parse_names(dataset, option="--dataset")
    require_distinct_names(datasets)
    cut = Slides.asked(slides, size=size, size_um=size_um, mpp=mpp)
    require_slides_used(datasets, cut)
    renamed = parse_renaming(labels)
    reading: dict[str, Any] = {
        "positive": positive,
        "order": None if classes is None else parse_names(classes, option="--classes"),
        "ordinal": ordinal,
        "labels": renamed,
        "skip_unlabelled": skip_unlabelled,
        "slides": cut,
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
                "varied" if row["mpp"] is None else ", ".join(f"{mpp:g}" for mpp in row["mpp"]),
                row["licence"],
                "gated" if row["gated"] else "",
            )
        tables.append(table)
    if datasets:
        from extract.table1 import other_labels, table1, table1_rows

        summaries = table1(data)
        lists["datasets"] = [summary.as_json() for summary in summaries]
        lists["other_labels"] = other_labels()
        table = Table(title="Datasets (Table 1 of the paper, recomputed)", title_style="bold", header_style="bold")
        table.add_column("")
        for summary in summaries:
            table.add_column(f"{summary.title}\n{summary.name}", justify="right")
        for title, cells in table1_rows(summaries):
            table.add_row(title, *cells)
        tables.append(table)
        table = Table(title="The same patches under other labels", title_style="bold", header_style="bold")
        for column in ("Name", "Patches of", "Patches", "Classes", "Annotation"):
            table.add_column(column, justify="right" if column == "Patches" else "left", no_wrap=column == "Name")
        for row in lists["other_labels"]:
            classes = ", ".join(f"{name} {n:,}" for name, n in row["classes"].items())
            table.add_row(row["name"], row["of"], f"{row['n_total']:,}", classes, row["annotation"])
        tables.append(table)
    if as_json:
        print_json(lists)
        return
    show(*tables)


main = partial(run, app)  # the command fm-extract


if __name__ == "__main__":  # torchrun -m extract.cli
    main()
