"""Which options do several commands share, and what do they mean?

Each is the annotation of a parameter, whose default stands in the command: `device: DeviceOption = "auto"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from features.console import UserError

DEFAULT_STORE = "embeddings.zarr"
DEFAULT_RUNS = Path("runs")

StoreOption = Annotated[str, typer.Option("--store", help="The feature store: a folder, or s3://bucket/prefix.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="The folder of all runs.")]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder laid out like AMi-Br_Benchmark. Default: $MITOFM_DATA, else download."),
]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="A local checkpoint of the model instead of the hub's.")
]
PositiveOption = Annotated[
    str | None,
    typer.Option("--positive", help="The class that counts as positive, against all others: of datasets of your own."),
]
LabelsOption = Annotated[
    str | None,
    typer.Option("--labels", help="old=new,...: what classes of your own datasets are called elsewhere: cancer=tumor."),
]
ClassesOption = Annotated[
    str | None,
    typer.Option("--classes", help="A,B,C: all classes of your own datasets, in the order of their labels 0, 1, 2."),
]
OrdinalOption = Annotated[
    bool, typer.Option("--ordinal", help="The classes are grades, each more than the one before it in --classes.")
]
SlidesOption = Annotated[
    Path | None,
    typer.Option("--slides", help="Of points (GeoJSON, COCO, CSV): the folder of the slides, which are found by name."),
]
# Of patches around points on slides.
SizeOption = Annotated[
    int | None,
    typer.Option(
        "--size", help="Of points: pixels along a patch's side; of the slide's full resolution without --size-um."
    ),
]
SizeUmOption = Annotated[
    float | None,
    typer.Option(
        "--size-um", help="Of points: um along a patch's side; it gets pixels of 0.25 um, or as many as --size says."
    ),
]
MppOption = Annotated[
    float | None, typer.Option("--mpp", help="Of points: um per pixel of slides that do not know it.")
]
EnsembleWeightsOption = Annotated[
    str,
    typer.Option("--ensemble-weights", help="equal; out-of-fold: shares that fit what runs said out of fold best."),
]
SoftLabelsOption = Annotated[
    str | None, typer.Option("--soft-labels", help="votes: train on each class's share of the raters' votes.")
]
SkipUnlabelledOption = Annotated[
    bool, typer.Option("--skip-unlabelled", help="Leave out patches without a label, instead of refusing them.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N; mps (an Apple GPU) for embeddings.")
]
# Upper ends of numbers: far beyond any use, and small enough that asking for them fails at once and not by and by.
MOST_FOLDS, MOST_IMAGES, MOST_EPOCHS, MOST_WORKERS = 1_000, 65_536, 100_000, 10_000
CvOption = Annotated[
    int,
    typer.Option("--cv", max=MOST_FOLDS, help="Number of cross-validation folds; groups (slides) are never cut."),
]
FoldsByOption = Annotated[
    str | None,
    typer.Option(
        "--folds-by", help="domain: each domain (scanner, centre, tumour type) is held out in turn, instead of --cv."
    ),
]
# As many trainings as anybody has run to measure their scatter, and some more.
MOST_SEEDS = 100
FoldSeedOption = Annotated[
    int, typer.Option("--fold-seed", min=0, max=2**32 - 1, help="Seed of the folds: which slides validate together.")
]
SeedsOption = Annotated[
    int,
    typer.Option("--seeds", min=1, max=MOST_SEEDS, help="Trainings on the same folds: seeds --seed, --seed + 1, ..."),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace embeddings that are there under the same names.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]


def parse_names(text: str, *, option: str | None = None) -> tuple[str, ...]:
    """Split a comma-separated option into its names, each once, in order.

    Args:
        text: as the user wrote it.
        option: the option's flag, if at least one name must be there.

    Raises:
        UserError: if `option` is given and there is no name.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names and option is not None:
        raise UserError(f"{option} names nothing: found {text!r}, expected one or more names separated by commas.")
    return names


def parse_numbers(text: str, *, option: str) -> tuple[float, ...]:
    """Split a comma-separated option into its numbers, ascending, each once.

    Args:
        text: as the user wrote it.
        option: the option's flag.

    Raises:
        UserError: if there is none, or one is no number.
    """
    such = "Give numbers separated by commas, such as 0.1,0.3."
    parts = parse_names(text)
    if not parts:
        raise UserError(f"{option} has no number: found {text!r}. {such}")
    try:
        return tuple(sorted({float(part) for part in parts}))
    except ValueError as error:
        raise UserError(f"{option}: {error}. {such}") from None
