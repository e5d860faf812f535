"""fm-store: what is in a feature store, is it sound, and how do embeddings get out of it and into it?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from features.console import UserError, print_json, print_text, run, say, show
from features.options import (
    DEFAULT_STORE,
    ClassesOption,
    JsonOption,
    OrdinalOption,
    OverwriteOption,
    StoreOption,
    parse_names,
)

if TYPE_CHECKING:
    from features.entry import Entry
    from features.store import FeatureStore

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Look into a feature store, check it, and exchange embeddings with other tools.",
)

Dataset = Annotated[str, typer.Option("--dataset", help="Name of the dataset.")]
Model = Annotated[str, typer.Option("--model", help="Name of the model.")]
View = Annotated[str, typer.Option("--view", help="Name of the view.")]
OnlyDataset = Annotated[str | None, typer.Option("--dataset", help="Only this dataset.")]
OnlyModel = Annotated[str | None, typer.Option("--model", help="Only this model.")]


@app.command()
def info(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """List datasets and embeddings, and what could make scores on them look too good."""
    from features.store import FeatureStore

    opened = FeatureStore.open(store)
    contents = _contents(opened)
    if json:
        print_json(contents)
    else:
        _print_contents(contents)


@app.command()
def verify(
    store: StoreOption = DEFAULT_STORE, dataset: OnlyDataset = None, model: OnlyModel = None, json: JsonOption = False
) -> None:
    """Check every byte: tables, checksums, completeness, finite numbers. Exit status 1 if anything is wrong."""
    from features.store import FeatureStore

    problems = FeatureStore.open(store).verify(dataset, model)
    if json:
        print_json({"store": str(store), "sound": not problems, "problems": [asdict(problem) for problem in problems]})
        raise typer.Exit(1 if problems else 0)
    if problems:
        lines = "\n".join(f"  {problem.what}" for problem in problems)
        raise UserError(f"{store} is not sound ({len(problems)} found):\n{lines}")
    say(f"{store} is sound.")


@app.command()
def export(
    dataset: Dataset,
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    view: View = "full",
    pooling: Annotated[
        str, typer.Option("--pooling", help='A stored pooling, several joined by "+", or "card".')
    ] = "card",
    format: Annotated[
        str | None,
        typer.Option(
            "--format", help="hdf5 (as TRIDENT and CLAM write it), anndata or npz. Default: by --out's ending."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or float16, which hold the same numbers.")] = "float32",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Write embeddings, with ids, labels, groups, splits, domains and votes beside them, to one file."""
    from features.exchange import export_embeddings, format_of
    from features.store import FeatureStore

    format = format or format_of(out)
    n, d = export_embeddings(
        FeatureStore.open(store), dataset, model=model, view=view, pooling=pooling, format=format, out=out, dtype=dtype
    )
    if json:
        print_json({"out": str(out), "format": format, "n_rows": n, "width": d, "dtype": dtype})
    else:
        say(f"{out}: {n:,} embeddings of width {d:,}.")


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help=".npz, .h5 or .pt with `features` (or `embeddings`) and `ids`; .h5ad; .npy with --ids; or a folder "
            "with one such file for each slide (TRIDENT, CLAM, slide2vec)."
        ),
    ],
    dataset: Dataset,
    model: Model,
    view: View = "full",
    ids: Annotated[
        Path | None,
        typer.Option("--ids", help="For files without ids: the rows' ids, one per line, or a CSV with a column id."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table",
            help="CSV (id, label[, group, split, domain]) to make a new dataset from; of 0 and 1, 1 is positive. For a "
            "folder a column may name slides instead of patches.",
        ),
    ] = None,
    classes: ClassesOption = None,
    ordinal: OrdinalOption = False,
    overwrite: OverwriteOption = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Bring in embeddings made elsewhere, row by id: into a dataset of the store or, with --table, a new one."""
    from features.exchange import import_embeddings
    from features.store import FeatureStore

    opened = FeatureStore.open(store) if table is None else FeatureStore.open_or_create(store)
    entry = import_embeddings(
        opened,
        source,
        dataset=dataset,
        model=model,
        view=view,
        ids=ids,
        table=table,
        order=None if classes is None else parse_names(classes, option="--classes"),
        ordinal=ordinal,
        overwrite=overwrite,
    )
    if json:
        print_json(_entry(entry))
    else:
        say(f"{entry.name}: {entry.n_rows:,} embeddings of width {sum(entry.poolings.values()):,} imported.")


def _contents(store: FeatureStore) -> dict[str, Any]:
    return {
        "store": str(store.path),
        "datasets": [_dataset(store, name) for name in store.datasets()],
        "entries": [_entry(entry) for entry in store.entries()],
    }


def _dataset(store: FeatureStore, name: str) -> dict[str, Any]:
    import numpy as np

    from features.samples import audit

    samples, classes = store.samples(name), store.class_names(name)
    audited = audit(samples)
    counts = np.bincount(samples.label, minlength=len(classes)).tolist()
    by_class: dict[str, Any] = {"positive": counts[1], "negative": counts[0]}
    if len(classes) > 2:
        ordinal = bool(store.dataset_attrs(name).get("ordinal", False))
        by_class = {"classes": dict(zip(classes, counts, strict=True)), "ordinal": ordinal}
    return {
        "name": name,
        "rows": len(samples),
        **by_class,
        "groups": len(set(samples.group.tolist()) - {""}),
        "domains": len(set(samples.domain.tolist()) - {""}),
        "raters": samples.votes.shape[1],
        "images_digest": samples.images_digest,
        "audit": audited.as_dict(),
        "audit_lines": audited.lines(),
    }


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "dataset": entry.dataset,
        "model": entry.model,
        "view": entry.view,
        "poolings": entry.poolings,
        "card_pooling": entry.card_pooling,
        "rows": entry.n_rows,
        "blocks_done": entry.n_done,
        "blocks": entry.n_blocks,
        "complete": entry.complete,
        "precision": entry.parts.get("precision"),
        "batch_size": entry.batch_size,
        "imported": entry.imported,
        "bytes": entry.size(),
        "fingerprint": entry.fingerprint,
    }


def _print_contents(contents: dict[str, Any]) -> None:
    from rich.table import Table

    datasets = Table("dataset", title="Datasets", title_justify="left")
    several = any("classes" in row for row in contents["datasets"])
    for name in ("rows", "positive or classes" if several else "positive", "groups", "domains", "raters"):
        datasets.add_column(name, justify="right")
    for row in contents["datasets"]:
        if "classes" in row:
            positive = "\n".join(f"{name} {n:,}" for name, n in row["classes"].items())
        else:
            positive = f"{row['positive']:,} ({row['positive'] / row['rows']:.1%})"
        counts = (f"{row[name]:,}" if row[name] else "–" for name in ("groups", "domains", "raters"))
        datasets.add_row(row["name"], f"{row['rows']:,}", positive, *counts)

    entries = Table("dataset", "model", "view", "poolings", title="Embeddings", title_justify="left")
    for name in ("blocks", "precision", "MB", "fingerprint"):
        entries.add_column(name, justify="right")
    for row in contents["entries"]:
        poolings = "\n".join(f"{name} × {width:,}" for name, width in row["poolings"].items())
        blocks = f"{row['blocks_done']}/{row['blocks']}"
        origin = "imported" if row["imported"] else row["precision"] or "–"
        entries.add_row(
            row["dataset"],
            row["model"],
            row["view"],
            poolings,
            blocks,
            origin,
            f"{row['bytes'] / 1e6:,.1f}",
            row["fingerprint"][:12],
        )
    show(datasets, entries)
    for row in contents["datasets"]:
        for line in row["audit_lines"]:
            print_text(f"{row['name']}: {line}")


def main() -> None:
    """Run `fm-store` from the command line."""
    run(app)
