"""fm-predict: apply a run, or several together, to new patches or points on slides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from features.console import print_json, say
from features.files import check_output
from features.options import (
    DeviceOption,
    EnsembleWeightsOption,
    JsonOption,
    MppOption,
    SizeOption,
    SizeUmOption,
    SlidesOption,
    WeightsOption,
    parse_names,
)

predict_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@predict_app.command(help="fm-predict: apply a run, or several together, to new patches.")
def predict(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run; of several, one after another.")],
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH…", help="Image files, folders, CSV files (column path), HDF5 (x), or points."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write; of GeoJSON also a folder, with a file of each slide. Default: predictions.csv, "
            "predictions.geojson or (coco) predictions.json, by --format."
        ),
    ] = None,
    format: Annotated[
        str, typer.Option(help="csv; of points on slides also geojson, which QuPath imports, or coco.")
    ] = "csv",
    device: DeviceOption = "auto",
    weights: WeightsOption = None,
    model: Annotated[
        str | None, typer.Option(help="Of runs of models of your own: their files, comma-separated, which are run.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Of two classes: positive from this probability on. Default: the run's own."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="group: write a second CSV with the share of each class in every group (slide)."),
    ] = None,
    ensemble_weights: EnsembleWeightsOption = "equal",
    slides: SlidesOption = None,
    size: SizeOption = None,
    size_um: SizeUmOption = None,
    mpp: MppOption = None,
    as_json: JsonOption = False,
) -> None:
    out = out or Path(f"predictions.{'json' if format == 'coco' else format}")
    if format != "geojson" or out.suffix.lower() in (".geojson", ".json"):
        check_output(out)
    from extract.slides import Slides
    from finetune.predict import predict_paths

    folders = [folder]
    while len(paths) > 1 and (paths[0] / "run.json").is_file():
        folders.append(paths[0])
        paths = paths[1:]
    summary = predict_paths(
        folders,
        paths,
        out=out,
        device=device,
        weights=weights,
        model=() if model is None else parse_names(model, option="--model"),
        threshold=threshold,
        by=by,
        ensemble_weights=ensemble_weights,
        format=format,
        slides=Slides.asked(slides, size=size, size_um=size_um, mpp=mpp),
    )
    if as_json:
        print_json(summary)
        return
    names, of_groups = summary["label_names"], summary.get("by_group")
    models, patches = _count(summary["n_models"], "fold model"), _count(summary["n"], "patch", "patches")
    written = f"{out}: {patches}"
    if "n_files" in summary:
        written = f"{out}/: {_count(summary['n_files'], 'file')}, {patches}"
    if "runs" in summary:
        models += f" of {len(summary['runs'])} runs, weights {', '.join(f'{one:.3f}' for one in summary['weights'])}"
    if "counts" in summary:
        said = ", ".join(f"{n:,} {name}" for n, name in zip(summary["counts"], names, strict=True) if n)
        say(f"{written}; the most probable class is {said} ({models}).")
    else:
        say(
            f"{written}, {summary['n_positive']:,} predicted {names[1]} at a probability of "
            f"{summary['threshold']:.3f} or more ({models})."
        )
    if not of_groups:
        return
    without = ""
    if n_without := of_groups["n_without"]:
        without = f"; {_count(n_without, 'patch', 'patches')} {'has' if n_without == 1 else 'have'} no group"
    said = "with the share of each class"
    if "sensitivity" in of_groups:
        rates = [one["rate"] for one in of_groups["groups"]]
        lowest_to_highest = " to ".join(dict.fromkeys(f"{rate:.0%}" for rate in (min(rates), max(rates))))
        sensitivity, specificity = (of_groups[name]["value"] for name in ("sensitivity", "specificity"))
        said = (
            f"{lowest_to_highest} predicted {names[1]}, beside shares corrected for a sensitivity of "
            f"{sensitivity:.3f} and a specificity of {specificity:.3f} out of fold"
        )
    say(f"{of_groups['out']}: {_count(len(of_groups['groups']), 'group')}, {said}{without}.")


def _count(n: int, one: str, several: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else several or f'{one}s'}"
