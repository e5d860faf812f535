"""fm-probe: judge frozen embeddings by linear probes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from features.console import UserError, print_json, run, say, show

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def probe(
    cv: Annotated[int, typer.Option(help="Number of cross-validation folds; groups (slides) are never cut.")] = 5,
    store: Annotated[str, typer.Option(help="The feature store: a folder, or s3://bucket/prefix.")] = "embeddings.zarr",
    model: Annotated[str | None, typer.Option(help="Models, comma-separated. Default: all in the store.")] = None,
    train: Annotated[
        str | None, typer.Option(help="Dataset to train on. Default: ami-br, or the store's only one.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Datasets to score, comma-separated. Default: all in the store but the demo.")
    ] = None,
    view: Annotated[str | None, typer.Option(help="A view, e.g. full. Default: chosen by cross-validation.")] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="card, cls, mean, center, pooled or cls+mean. Default: chosen by cross-validation."),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="exact: logistic regression, strength chosen inside training data. paper: the paper's.")
    ] = "exact",
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**32 - 1, help="Seed of the folds, of the learning curve, and of the paper recipe's training."
        ),
    ] = 42,
    fractions: Annotated[
        str | None,
        typer.Option(help="Learning curve: shares of the training slides, comma-separated, e.g. 0.1,0.25,0.5,1."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to fit: auto, cpu, cuda or cuda:N.")] = "auto",
    runs: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    if recipe not in ("exact", "paper"):
        raise UserError(f"unknown recipe {recipe!r}: use exact or paper.")
    from features.store import FeatureStore
    from probe.curve import curve_tables, parse_fractions, read_curve, summarise
    from probe.metrics import as_dict
    from probe.protocol import ProbeOptions, probe_store
    from probe.runs import read_run

    options = ProbeOptions(
        cv=cv,
        train=train,
        test=names(test) if test is not None else None,
        view=view,
        pooling=pooling,
        recipe="paper" if recipe == "paper" else "exact",
        seed=seed,
        fractions=parse_fractions(fractions) if fractions is not None else (),
        device=device,
    )
    folders = probe_store(
        FeatureStore.open(store), names(model) if model is not None else None, options=options, runs=runs
    )
    records = [read_run(folder) for folder in folders]
    for record in records:
        for candidate in record["candidates"]:
            if candidate.get("n_not_converged"):
                say(
                    f"{record['model']} ({candidate['view']}, {candidate['pooling']}): "
                    f"{candidate['n_not_converged']} of {candidate['n_fits']} fits did not reach the tolerance "
                    f"(largest gradient {candidate['max_gradient']:.1e})."
                )
        curve = record.get("learning_curve", {})
        if curve.get("n_not_converged"):
            say(
                f"{record['model']}, learning curve: {curve['n_not_converged']} of {curve['n_fits']} fits did not "
                f"reach the tolerance (largest gradient {curve['max_gradient']:.1e})."
            )
    curves = {
        f"{record['model']} ({record['view']}, {record['pooling']})": read_curve(folder)
        for folder, record in zip(folders, records, strict=True)
    }
    if as_json:
        for record, points in zip(records, curves.values(), strict=True):
            if points:
                record["learning_curve"]["sets"] = as_dict(summarise(points))
        print_json({"runs": [str(folder) for folder in folders], "results": records})
        return
    from probe.tables import candidates_table, result_tables

    if any(len(record["candidates"]) > 1 for record in records):
        show(candidates_table(records))
    show(*result_tables(records), *curve_tables(curves))
    say(f"{len(folders)} run{'s' * (len(folders) != 1)} written to {runs}/")


def names(text: str) -> tuple[str, ...]:
    """A comma-separated option as distinct names, in order."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def main() -> None:
    """Entry point of `fm-probe`."""
    run(app)
