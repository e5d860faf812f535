"""fm-extract: run frozen backbones over patches once, and keep their embeddings in the feature store."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from features.console import UserError, print_json, run, say

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__)
def extract(
    model: Annotated[
        str, typer.Option(help="Models, comma-separated: a name of --list-models, timm/NAME, or hf-hub:ORG/REPO[@REV].")
    ] = "efficientnet-lite0",
    dataset: Annotated[
        str,
        typer.Option(help="Datasets, comma-separated: a name of --list-datasets, a class-per-folder path, CSV or HDF5."),
    ] = "demo",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder laid out like AMi-Br_Benchmark. Default: $MITOFM_DATA, else download."),
    ] = None,
    store: Annotated[Path, typer.Option(help="The feature store.")] = Path("embeddings.zarr"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    view: Annotated[
        str, typer.Option(help="Views, comma-separated: full, centerN (central N source pixels), centerN@M (input of M).")
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
    list_models: Annotated[bool, typer.Option("--list-models", help="Show every model and stop.")] = False,
    list_datasets: Annotated[bool, typer.Option("--list-datasets", help="Show every dataset (Table 1) and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    if data is None and os.environ.get("MITOFM_DATA"):
        data = Path(os.environ["MITOFM_DATA"])
    if list_models or list_datasets:
        _show_lists(list_models, list_datasets, data, as_json)
        return

    from extract.backbones import find_backbone
    from extract.datasets import load_dataset
    from extract.embed import ExtractOptions, parse_view
    from extract.embed import extract as embed_dataset
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
    # Every mistake in a name is found before the first patch is read.
    backbones = [find_backbone(name) for name in _names(model, "--model")]
    summaries = []
    for name in _names(dataset, "--dataset"):
        patches = load_dataset(name, data=data, positive=positive)
        for line in audit(patches.samples).lines():
            say(f"{patches.name}: {line}.")
        target = FeatureStore.open_or_create(store)
        for summary in embed_dataset(patches, backbones, store=target, options=options, weights=weights):
            say(summary.line())
            summaries.append(summary)
    if as_json:
        print_json({"store": str(store), "embeddings": [asdict(summary) for summary in summaries]})


def _names(text: str, option: str) -> tuple[str, ...]:
    """A comma-separated option as distinct names, in order."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"{option} names nothing: found {text!r}, expected one or more names separated by commas.")
    return names


def _show_lists(models: bool, datasets: bool, data: Path | None, as_json: bool) -> None:
    from extract.lists import dataset_rows, model_rows, print_tables

    found = {}
    if models:
        found["models"] = model_rows()
    if datasets:
        found["datasets"] = dataset_rows(data)
    if as_json:
        print_json(dict(found))
    else:
        print_tables(found)


def main() -> None:
    """Entry point of `fm-extract`."""
    run(app)
