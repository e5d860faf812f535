"""fm-probe: judge frozen embeddings by linear probes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from features.console import UserError, print_json, run, say, show
from features.options import (
    DEFAULT_RUNS,
    DEFAULT_STORE,
    CvOption,
    FoldsByOption,
    FoldSeedOption,
    JsonOption,
    LabelsOption,
    RunsOption,
    SeedsOption,
    SoftLabelsOption,
    StoreOption,
    parse_names,
)

if TYPE_CHECKING:
    from probe.probing import ProbeOptions
    from probe.records import CurveFits, FitRecord, RunRecord

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_ALL = "all"  # what --measures means without a value
_OF_PROBES = ("cv", "folds_by", "recipe", "combine", "soft_labels", "seeds", "fold_seed", "fractions")


class _Command(TyperCommand):
    """A command whose `--measures` may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options, with the value that a bare `--measures` stands for."""
        following = [*args, "-"][1:]
        pairs = zip(args, following, strict=True)
        bare = [f"{one}={_ALL}" if one == "--measures" and after.startswith("-") else one for one, after in pairs]
        return super().parse_args(ctx, bare)


@app.command(help=__doc__, cls=_Command)
def probe(
    context: typer.Context,
    cv: CvOption = 5,
    folds_by: FoldsByOption = None,
    store: StoreOption = DEFAULT_STORE,
    model: Annotated[str | None, typer.Option(help="Models, comma-separated. Default: all in the store.")] = None,
    train: Annotated[
        str | None, typer.Option(help="Dataset to train on. Default: ami-br, or the store's only one.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Datasets to score, comma-separated. Default: all in the store but the demo.")
    ] = None,
    view: Annotated[
        str | None,
        typer.Option(
            help="A view, e.g. full; of several, joined by commas, cross-validation chooses. Default: of all."
        ),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            help="card (the embedding that the model card recommends), cls, mean, center, pooled or cls+mean. "
            "Default: chosen by cross-validation."
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="exact: logistic regression, strength chosen inside training data. paper: as the paper's text says. "
            "authors: as its scripts do."
        ),
    ] = "exact",
    combine: Annotated[
        bool,
        typer.Option(
            "--combine", help="Also join embeddings, of all models, where that is better out of fold than the best one."
        ),
    ] = False,
    measures: Annotated[
        str | None,
        typer.Option(
            metavar="[NAMES]",
            help="Instead of probing, compute other measures of the embeddings: knn, fewshot, retrieval, clustering, "
            "robustness, invariance, alignment, comma-separated; without names all that apply.",
        ),
    ] = None,
    labels: LabelsOption = None,
    soft_labels: SoftLabelsOption = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**32 - 1, help="Seed of the paper recipe's training, and of the learning curve."),
    ] = 42,
    seeds: SeedsOption = 1,
    fold_seed: FoldSeedOption = 42,
    fractions: Annotated[
        str | None,
        typer.Option(help="Learning curve: shares of the training slides, comma-separated, e.g. 0.1,0.25,0.5,1."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to fit: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    runs: RunsOption = DEFAULT_RUNS,
    as_json: JsonOption = False,
) -> None:
    from features.store import FeatureStore
    from probe.combine import gains
    from probe.curve import parse_fractions, read_curve, summarise
    from probe.metrics import as_dict
    from probe.probing import ProbeOptions, probe_store
    from probe.report.terminal import candidates_table, curve_tables, gain_table, result_tables

    if measures is not None:
        sources = {name: context.get_parameter_source(name) for name in _OF_PROBES}
        given = [f"`{name}`" for name, source in sources.items() if source and source.name == "COMMANDLINE"]
        if given:
            said = " and ".join([", ".join(given[:-1]), given[-1]] if given[1:] else given)
            raise UserError(
                f"{said} say{'s' * (len(given) == 1)} how probes are fitted, and `measures` fits none. Leave out "
                f"{said}, or `measures`."
            )
    options = ProbeOptions(
        cv=cv,
        train=train,
        test=None if test is None else parse_names(test),
        view=view,
        pooling=pooling,
        recipe=recipe,  # type: ignore[arg-type]
        combine=combine,
        labels=labels,
        soft_labels=soft_labels,
        folds_by=folds_by,
        seed=seed,
        seeds=seeds,
        fold_seed=fold_seed,
        fractions=() if fractions is None else parse_fractions(fractions),
        device=device,
    )
    models = None if model is None else parse_names(model)
    if measures is not None:
        _measure(Path(runs), store, models, measures, options=options, as_json=as_json)
        return
    records = probe_store(FeatureStore.open(store), models, options=options, runs=runs)
    for record in records:
        _say_what_did_not_converge(record)
    combined = {number: record for number, record in enumerate(records) if record.parts}
    gained = {number: gains(record, _best_part(record, records)) for number, record in combined.items()}
    curves = [read_curve(record.folder) if record.folder else () for record in records]
    if as_json:
        results = [record.as_json() for record in records]
        for result, points in zip(results, curves, strict=True):
            if points:
                result["learning_curve"]["sets"] = as_dict(summarise(points))
        for number, found in gained.items():
            results[number]["gains"] = as_dict(found)
        print_json({"runs": [str(record.folder) for record in records], "results": results})
        return
    if any(len(record.candidates or ()) > 1 for record in records):
        show(candidates_table(records))
    named = {
        f"{record.model} ({record.view}, {record.pooling})": points
        for record, points in zip(records, curves, strict=True)
    }
    show(*result_tables(records), *curve_tables(named, n_classes=records[0].n_classes))
    for number, found in gained.items():
        show(gain_table(records[number], found))
    say(f"{len(records)} run{'s' * (len(records) != 1)} written to {runs}/")


def _measure(
    runs: Path, store: str, models: tuple[str, ...] | None, named: str, *, options: ProbeOptions, as_json: bool
) -> None:
    """Compute measures of the store's embeddings, and print them."""
    from features.store import FeatureStore
    from probe.measures import measure_store
    from probe.metrics import as_dict
    from probe.report.measures import terminal_tables

    names = () if named == _ALL else parse_names(named)
    record = measure_store(FeatureStore.open(store), models, measures=names, options=options, runs=runs)
    if as_json:
        print_json({"measures": str(record.folder), "result": as_dict(record.as_json())})
        return
    show(*terminal_tables(record))
    say(f"measures written to {record.folder}/")


def _best_part(combined: RunRecord, records: list[RunRecord]) -> RunRecord:
    """Find the run of a combination's best part."""
    best = combined.each_part[0]
    own = (best.model, best.view, best.pooling)
    return next(record for record in records if (record.model, record.view, record.pooling) == own)


def _say_what_did_not_converge(record: RunRecord) -> None:
    fits: list[tuple[str, FitRecord | CurveFits]] = [
        (f"{candidate.model or record.model} ({candidate.view}, {candidate.pooling})", candidate)
        for candidate in record.candidates or ()
    ]
    if record.learning_curve:
        fits.append((f"{record.model}, learning curve", record.learning_curve))
    for name, fit in fits:
        if fit.n_not_converged:
            say(
                f"{name}: {fit.n_not_converged} of {fit.n_fits} fits did not reach the tolerance "
                f"(largest gradient {fit.max_gradient:.1e})."
            )


def main() -> None:
    """Run `fm-probe` from the command line."""
    run(app)
