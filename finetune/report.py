"""How do runs, patches and embeddings come together in one page?

`probe.report` computes the page's figures from run folders. Patches add pictures, and the feature store a map, where
they are at hand and have not changed since the runs. No patches are downloaded for a report. This is done here because
only this package may import both patches and runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from extract.datasets import DATASETS, PatchDataset, load_dataset, local_data
from extract.points import Points
from extract.registry import BACKBONES
from extract.slides import Slides
from features.console import UserError, say
from features.exchange import IMPORTED
from features.files import write_file, writing
from features.labels import NUMBERS, parse_renaming
from probe.records import RunRecord
from probe.report.collect import Report, ReportOptions, collect
from probe.report.gallery import PAGE_BYTES, Pixels, Places, embedding_maps, make_thumbnails, open_store, select_patches
from probe.report.page import html, with_thumbnails
from probe.report.read import Run, ensemble_of_runs, named_runs, read_runs
from probe.report.tables import grids, latex, markdown
from probe.report.tidy import tidy
from probe.resample import Resampling

Format = Literal["html", "csv", "markdown", "latex"]


def make_report(
    runs: Path,
    *,
    named: Sequence[Path] = (),
    ensemble: Sequence[str] = (),
    ensemble_weights: str = "equal",
    folds: str | None = None,
    format: Format = "html",
    data: Path | None = None,
    store: Path | str | None = None,
    resampling: Resampling = Resampling(),
    options: ReportOptions = ReportOptions(),
) -> tuple[str, Report, list[Run]]:
    """Compare runs.

    Args:
        runs: the folder of all runs.
        named: folders of runs, instead of all.
        ensemble: folders or ids of some of these runs, or "all", of which the mean is judged as one more run.
        ensemble_weights: "equal" or "out-of-fold", see `probe.report.read.ensemble_of_runs`.
        folds: the first digits of a fold digest: only runs on those folds.
        format: "html" for the page; "csv" for every figure, one a row; "markdown" or "latex" for its main tables.
        data: the folder of the known datasets.
        store: the feature store that the map is drawn from; None for the one that runs were probed from.
        resampling: how resamples are drawn.
        options: what else is asked: a margin, prevalences, and so on.

    Returns:
        The text, the figures in it, and the runs.

    Raises:
        UserError: no runs, damaged ones, runs of different training sets or classes, or of different patches; an
            ensemble of runs on different folds.
    """
    read, notes = read_runs(runs, named=named, folds=folds)
    if not ensemble and ensemble_weights != "equal":
        raise UserError(
            f"`ensemble_weights={ensemble_weights}` is for an ensemble: name its runs by `ensemble`, or all."
        )
    if ensemble:
        read.append(ensemble_of_runs(named_runs(read, ensemble), weights=ensemble_weights))
    report = collect(read, notes, resampling=resampling, options=options)
    if format == "csv":
        return tidy(report, {run.label: run for run in read}), report, read
    if format != "html":
        table = markdown if format == "markdown" else latex
        return "\n".join(table(grid) for grid in grids(report, read)), report, read
    patches = select_patches(report, read)
    opened = open_store(read, store)
    maps = embedding_maps(patches, report, read, opened) if opened else []
    sizes = {name: backbone.n_parameters for name, backbone in BACKBONES.items()}
    at_hand = _datasets_at_hand(report, read, data)
    pixels = {name: _reader(dataset) for name, dataset in at_hand.items()}
    places = {name: _places(dataset.points) for name, dataset in at_hand.items() if dataset.points is not None}
    page = html(report, read, patches=patches, maps=maps, sizes=sizes, has_pictures=bool(pixels), places=places)
    thumbnails = make_thumbnails(patches, report, pixels, budget=PAGE_BYTES - len(page.encode()))
    return with_thumbnails(page, thumbnails), report, read


def write_report(text: str, out: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    if out.is_dir():
        raise UserError(f"cannot write to {out}: it is a folder. Name a file, such as {out / 'report.html'}.")
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, [text.encode()])


def _datasets_at_hand(report: Report, runs: Sequence[Run], data: Path | None) -> dict[str, PatchDataset]:
    """Load every dataset that is at hand and has not changed since the runs."""
    at_hand = {}
    for dataset in dict.fromkeys(set_report.dataset for set_report in report.sets):
        run = next(run for run in runs if dataset in run.tables)
        try:
            patches = _load_patches(dataset, run.record, data)
            if patches.samples.table_digest != run.record.table_digests.get(dataset):
                raise UserError(f"the patches at hand are not those of {run.record.id}.")
        except UserError as error:
            say(f"No pictures of {dataset}: {error}")
            continue
        at_hand[dataset] = patches
    return at_hand


def _load_patches(dataset: str, run: RunRecord, data: Path | None) -> PatchDataset:
    """Load a dataset that a run names, without a download.

    Raises:
        UserError: it is not at hand.
    """
    labels = parse_renaming(run.options.get("labels"))
    several, of_training = len(run.label_names) > 2, dataset == run.train
    if known := DATASETS.get(dataset):
        folder = local_data(data)
        if (known.folder or known.phases) and folder is None:
            raise UserError("give the folder of the datasets with --data.")
        # Two classes of a known dataset have one order only.
        return load_dataset(
            dataset, data=folder, labels=labels, classes=run.label_names if several and not of_training else None
        )
    source = run.sources.get(dataset, "")
    if source.startswith(IMPORTED):
        raise UserError("its embeddings were imported, and no patches with them.")
    if not Path(source).is_absolute() or not Path(source).exists():
        raise UserError(f"{source or 'where they lie'} is not {'there' if source else 'known'}.")
    named = run.label_names != NUMBERS  # early runs do not know the names of their classes
    slides = (run.slides or {}).get(dataset)
    return load_dataset(
        source,
        positive=run.label_names[1] if named and of_training and not several else None,
        order=run.label_names if of_training and several else None,
        classes=run.label_names if named and not of_training else None,
        labels=labels,
        skip_unlabelled=bool(run.options.get("skip_unlabelled")),
        slides=None if slides is None else Slides.from_record(slides),
    )


def _reader(patches: PatchDataset) -> Pixels:
    row = {id: row for row, id in enumerate(patches.samples.id.tolist())}

    def read(id: str) -> NDArray[np.uint8]:
        return patches.decode(row[id])

    return read


def _places(points: Points) -> Places:
    return {id: (slide, *xy) for id, slide, xy in zip(points.id, points.slide, points.in_qupath.tolist(), strict=True)}
