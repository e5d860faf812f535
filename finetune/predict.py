"""What does a run predict for new patches? The mean probability of its fold models, and the class that this gives.

Several runs predict together: the mean of what each of them says, equally or by weights of their out-of-fold errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from extract.datasets import DATASETS, Patches, load_patches
from extract.images import SUFFIXES
from extract.readers import require_points
from extract.slides import Slides
from features.console import UserError, progress, say
from features.device import compute_exactly, find_device
from features.files import write_file, writing
from features.labels import class_labels
from features.tables import first_of, is_missing
from finetune.predict_groups import (
    GroupCounts,
    by_group_path,
    count_groups,
    group_rates,
    groups_of,
    rate_table,
    share_table,
)
from finetune.predict_places import FORMATS, Said, check_ending, file_of, place_files, points_of
from finetune.predictor import load_backbones, make_predictor
from probe.combine import averaged, weights_of
from probe.ensembles import Ensemble, ensemble_of
from probe.metrics import as_dict, predicted_classes, probabilities
from probe.predictions import VALIDATION, csv_bytes, threshold_of
from probe.rates import error_rates
from probe.records import RunRecord
from probe.runs import check_weights, read_predictions, read_run


def predict_paths(
    run: Path | Sequence[Path],
    paths: Sequence[Path],
    *,
    out: Path,
    device: str = "auto",
    weights: Path | None = None,
    model: Sequence[str] = (),
    threshold: float | None = None,
    by: str | None = None,
    ensemble_weights: str = "equal",
    slides: Slides | None = None,
    format: str = "csv",
) -> dict[str, Any]:
    """Apply a run, or several together, to patches and write a CSV; with `by="group"` a second one of groups.

    Its columns: source (the path given), id (below it), probability (of class 1, the mean over fold models), predicted
    (the class's name), spread (population standard deviation over fold models), and fold_0, fold_1, ... (each one's);
    of a run with several seeds seed_42_fold_0, seed_42_fold_1, ... Of a run with more than two classes: source, id, a
    column probability_<class> for each, predicted (the most probable), and spread (of that class's probability). Of
    several runs, each run's mean stands where that of a fold model does, in a column of the run's name. Of points on
    slides, slide, x and y (in pixels of its full resolution) follow the id; they can also be written as GeoJSON for
    QuPath, or as a COCO file, see `finetune.predict_places`.

    Args:
        run: folder of a probe run or a fine-tuned one; or of several, which tell the same classes apart.
        paths: image files, folders, CSV files, HDF5 files, or points on slides; see `load_patches`.
        out: the CSV; replaced whole. Of GeoJSON a file ending in .geojson or .json, or a folder; of COCO a .json file.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        weights: a local checkpoint of the backbone instead of the hub's; it must be the very same.
        model: the files of models of your own that the runs were made by (`extract.custom.run_code`). They are run
            because they are named here; what a run records is never run.
        threshold: of two classes: class 1 from this probability on; None for the run's own, chosen on its out-of-fold
            predictions. That of several runs is chosen on the mean of theirs; if they do not share their training set
            and folds, it is the mean of their own.
        by: "group" for the share of class 1, or of each of more than two classes, in every group of patches; see
            `finetune.predict_groups`.
        ensemble_weights: of several runs, "equal" or "out-of-fold" (`probe.combine.fitted_weights`).
        slides: where the slides of points are; without a size, patches are as large as those of the training set.
        format: "csv"; or of points on slides "geojson" or "coco".

    Returns:
        n, n_positive, n_folds, n_models, threshold, label_names, out; with `by` by_group, what the second CSV holds. Of
        more than two classes counts, patches predicted to be of each, instead of n_positive and threshold. Of several
        runs also runs and weights; of a folder of GeoJSON n_files.

    Raises:
        UserError: a threshold that is no probability, or for more than two classes, no run, a backbone that cannot be
            had as it was, patches that cannot be read or whose groups are not known, or a full disk; a run or a path
            twice, runs of different classes, or weights for runs that do not share their folds; a format that cannot
            hold these patches, or that the ending of `out` contradicts.
    """
    runs = [run] if isinstance(run, Path) else list(run)
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"`threshold={threshold}` is no probability: expected a number from 0 to 1.")
    if by not in (None, "group"):
        raise UserError(f"`by={by}`: expected group, for the share of each class in every group of patches.")
    if format not in FORMATS:
        raise UserError(f"`format={format}`: expected one of {', '.join(FORMATS)}.")
    _refuse_twice(paths)
    outs = [out, *([by_group_path(out)] if by else [])]
    for one in outs:
        for folder in runs:
            _check_out(one, folder, paths)
    check_ending(out, format)
    records = [read_run(folder) for folder in runs]
    record = records[0]
    two = record.n_classes == 2
    for k, other in enumerate(records):
        if other.id in [one.id for one in records[:k]]:
            raise UserError(f"{runs[k]} is a run that stands before it already, {other.id}: name each run once.")
    orders = [_order_of_classes(record, other) for other in records]
    if threshold is not None and not two:
        raise UserError(
            f"`threshold={threshold}`: {runs[0]} has {record.n_classes} classes ({first_of(record.label_names)}), of "
            "which it predicts the most probable. A threshold is for two classes: leave it out."
        )
    for folder, other in zip(runs, records, strict=True):
        check_weights(folder, other)
    joint = _joint(runs, records, ensemble_weights)
    on_apple = all(other.kind == "probe" and part.precision == "fp32" for other in records for part in other.each_part)
    torch_device = find_device(device, apple=on_apple)
    compute_exactly(torch_device)
    backbones = load_backbones(records, device=torch_device, weights=weights, named=model)
    require_points(paths, slides)
    if slides is not None and not slides.is_sized:
        slides = _sized_as_trained(slides, records)
    sources = [load_patches(path, grouped=by is not None, slides=slides) for path in paths]
    places = [] if format == "csv" else points_of(sources, format, out)
    if format == "geojson":
        for file in {file_of(slide, out) for points in places for slide in points.slide}:
            _check_out(file, runs[0], paths)
    groups = [groups_of(patches, path) for patches, path in zip(sources, paths, strict=True)] if by else []
    for patches in sources:
        _say_other_classes(patches, record)
    _say_other_size(sources, records)
    n_models, n = sum(len(other.fold_models) for other in records), sum(len(patches.id) for patches in sources)
    with progress("predict", n_models * n) as advance:
        of_runs = []  # of each run (n, c, n_models)
        for folder, other, order in zip(runs, records, orders, strict=True):
            predict = make_predictor(folder, other, backbones=backbones, device=torch_device, n=n)
            nothing = np.empty((0, len(other.fold_models), other.n_classes - 1), dtype=np.float32)
            whole = np.concatenate([nothing, *(predict(patches, advance) for patches in sources)])
            of_runs.append(np.ascontiguousarray(probabilities(whole)[..., order].swapaxes(1, 2)))
    limit = joint.threshold if threshold is None else threshold
    probability, columns = of_runs[0], _columns_of(record)
    if len(runs) > 1:
        probability, columns = np.stack([one.mean(axis=2) for one in of_runs], axis=2), [one.id for one in records]
    mean = np.average(probability, axis=2, weights=joint.weights)
    predicted = predicted_classes(mean, limit)
    told = probability[np.arange(n), np.ones_like(predicted) if two else predicted]  # (n, n_models)
    said = Said(record.label_names, mean, told.std(axis=1), predicted, limit)
    ends = np.cumsum([0, *(len(patches.id) for patches in sources)]).tolist()
    parts = [slice(*pair) for pair in pairwise(ends)]
    if format == "csv":
        files = {out: _table(sources, said, dict(zip(columns, told.T, strict=True)))}
    else:
        files = place_files(places, [said.rows(part) for part in parts], format, out)
    by_group: dict[str, Any] = {}
    if by:
        of_source, of_classes = [patches.source for patches in sources], [predicted[part] for part in parts]
        counted = count_groups(of_source, groups, of_classes, n_classes=record.n_classes)
        files[outs[1]], described = _judge_groups(counted, joint, record, limit)
        without = sum(names.count("") for names in groups)
        by_group = {"by_group": as_dict({"out": str(outs[1]), "n_without": without} | described)}
    in_folder = [file for file in files if file not in outs]  # of GeoJSON, in it or below
    if n_replaced := sum(file.exists() for file in in_folder):
        say(f"{out}/: {n_replaced:,} existing file{'s are' if n_replaced > 1 else ' is'} replaced.")
    for one, content in files.items():
        with writing(one.parent):
            one.parent.mkdir(parents=True, exist_ok=True)
            write_file(one, [content])
    counts = np.bincount(predicted, minlength=record.n_classes).tolist()
    return {
        "out": str(out),
        "n": n,
        **({"n_positive": counts[1]} if two else {"counts": counts}),
        "n_folds": record.folds.n,
        "n_models": n_models,
        **({"threshold": limit} if two else {}),
        "label_names": list(record.label_names),
        **({"runs": columns, "weights": list(joint.weights or [1 / len(runs)] * len(runs))} if len(runs) > 1 else {}),
        **({"n_files": len(in_folder)} if in_folder else {}),
        **by_group,
    }


@dataclass(frozen=True)
class _Joint:
    """What several runs, or one, say together.

    Attributes:
        threshold: of two classes.
        weights: the runs' shares; None for equal ones.
        out_of_fold: makes what they say of their training patches.
    """

    threshold: float
    weights: tuple[float, ...] | None
    out_of_fold: Callable[[], Ensemble]


def _joint(runs: Sequence[Path], records: Sequence[RunRecord], how: str) -> _Joint:
    record = records[0]
    if len(runs) == 1:
        if how != "equal":
            raise UserError(f"`ensemble_weights={how}` is for several runs, found one. Name more, or leave it out.")
        return _Joint(
            record.figures.threshold, None, lambda: ensemble_of(read_predictions(runs[0]), record.train, VALIDATION)
        )
    if len({(one.train, one.folds.digest, one.label_names) for one in records}) > 1:
        apart = "the runs differ in training set, folds or classes, so that out of fold they say nothing together"
        if how != "equal":
            raise UserError(f"`ensemble_weights={how}`: {apart}. Use equal.")
        say(f"{apart[0].upper()}{apart[1:]}: the threshold is the mean of theirs.")

        def nothing() -> Ensemble:
            raise UserError(f"`by=group`: {apart}, and their errors are not known. Predict with one of them.")

        return _Joint(float(np.mean([one.figures.threshold for one in records])), None, nothing)
    predictions = {str(run): read_predictions(run, seed=one.seeds[0]) for run, one in zip(runs, records, strict=True)}
    own = {name: one.select(one.split == VALIDATION) for name, one in predictions.items()}
    shares = weights_of(own, how)
    together = averaged(own, shares)
    return _Joint(threshold_of(together), shares, lambda: ensemble_of(together, record.train, VALIDATION))


def _sized_as_trained(slides: Slides, records: Sequence[RunRecord]) -> Slides:
    """Cut patches as large as those of the training sets: as many pixels, of the same resolution if it is known."""
    found = {_patch_size(record) for record in records}
    (size, mpp), *others = found
    if size is None or others:
        raise UserError(
            f"How large were the patches of {records[0].folder}{' and of the other runs, all alike' * bool(others)}? "
            "That is not known. Say with `size`, in pixels of the slide, or `size_um`, in micrometres, how large a "
            "patch around a point is."
        )
    covered = None if mpp is None else size * mpp
    say(f"Patches have {size} pixels{'' if covered is None else f' and cover {covered:g} um'}, as in training.")
    return replace(slides, size=size, size_um=covered)


def _patch_size(record: RunRecord) -> tuple[int | None, float | None]:
    """Find pixels along the side of the patches that a run was trained on, and um per pixel; None where unknown."""
    embedding, known, cut = record.each_part[0].embedding, DATASETS.get(record.train), (record.slides or {})
    mpp = embedding.get("source_mpp")
    if record.train in cut:
        return Slides.from_record(cut[record.train]).pixels, mpp
    return (None, None) if known is None else (known.size, mpp)


def _order_of_classes(first: RunRecord, other: RunRecord) -> list[int]:
    """Find each class of the first run among those of another, by name."""
    place = {name.casefold(): k for k, name in enumerate(other.label_names)}
    names = [name.casefold() for name in first.label_names]
    if set(names) != set(place):
        raise UserError(
            f"{other.folder} tells {', '.join(other.label_names)} apart, the first run {', '.join(first.label_names)}. "
            "Runs that predict together must tell the same classes apart, by name."
        )
    return [place[name] for name in names]


def _check_out(out: Path, run: Path, paths: Sequence[Path]) -> None:
    """Refuse a result that would replace what it is made from."""
    inputs, whole = {path.resolve() for path in paths}, out.resolve()
    is_input = whole in inputs or (out.suffix.lower() == ".geojson" and out.exists() and whole.parent in inputs)
    if is_input or out.suffix.lower() in SUFFIXES or (out.exists() and run.resolve() in out.resolve().parents):
        raise UserError(f"{out} is an image, one of the inputs, or part of the run. Name another file as `out`.")


def _refuse_twice(paths: Sequence[Path]) -> None:
    """Refuse patches of which all predictions would be written twice."""
    given: dict[Path, Path] = {}
    for path in paths:
        whole = path.resolve()
        if whole in given:
            spelled = "" if given[whole] == path else f", first as {given[whole]}"
            raise UserError(f"{path} is given twice{spelled}. Name every path once.")
        given[whole] = path


def _say_other_classes(patches: Patches, record: RunRecord) -> None:
    """Say that a table's labels, which are not used, are not the classes that are predicted."""
    names = sorted({label for label in patches.columns.get("label", ()) if not is_missing(label)})
    try:
        class_labels(names, classes=record.label_names)
    except UserError:
        say(
            f"{patches.source}: its labels ({first_of(names)}) are not the classes of the run "
            f"({', '.join(record.label_names)}), which are what is predicted."
        )


def _say_other_size(sources: Sequence[Patches], records: Sequence[RunRecord]) -> None:
    """Say that patches around points differ from those of training by more than 10 %, in resolution or in extent."""
    now = {(one.slides.pixels, one.mpp) for one in sources if one.slides is not None and one.mpp is not None}
    for record in records:
        size, mpp = _patch_size(record)
        if size is None or mpp is None:
            continue
        run = "the run" if len(records) == 1 else f"the run {record.id}"
        for size_now, mpp_now in sorted(now):
            covers, covered = size_now * mpp_now, size * mpp
            if any(max(a, b) > 1.1 * min(a, b) for a, b in ((mpp_now, mpp), (covers, covered))):
                say(
                    f"These patches have {mpp_now:g} um per pixel and cover {covers:g} um; {run} was trained on "
                    f"{mpp:g} and {covered:g}: its probabilities may not hold."
                )


def _table(sources: Sequence[Patches], said: Said, told: Mapping[str, NDArray[np.float64]]) -> bytes:
    """Make the CSV of patches: of two classes it tells the probability of class 1, of more that of every class.

    Args:
        sources: the patches.
        said: of all of them.
        told: of every model, by its column's name, (n,) probabilities of class 1; not used for more than two classes.
    """
    names, mean, two = said.label_names, said.mean, len(said.label_names) == 2
    means = {"probability": mean[:, 1]} if two else {f"probability_{n}": mean[:, k] for k, n in enumerate(names)}
    columns = {
        "source": [patches.source for patches in sources for _ in patches.id],
        "id": [id for patches in sources for id in patches.id],
        **(_places(sources) if any(patches.points for patches in sources) else {}),
        **{name: _digits(values) for name, values in means.items()},
        "predicted": [names[k] for k in said.predicted.tolist()],
        "spread": _digits(said.spread),
        **({name: _digits(values) for name, values in told.items()} if two else {}),
    }
    return csv_bytes(tuple(columns), zip(*columns.values(), strict=True))


def _places(sources: Sequence[Patches]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {"slide": [], "x": [], "y": []}
    for patches in sources:
        points, nowhere = patches.points, [""] * len(patches.id)
        places["slide"] += nowhere if points is None else points.slide
        for axis in ("x", "y"):
            places[axis] += nowhere if points is None else [f"{at:.10g}" for at in getattr(points, axis).tolist()]
    return places


def _columns_of(record: RunRecord) -> list[str]:
    several = len(record.seeds) > 1
    return [f"seed_{seed}_fold_{fold}" if several else f"fold_{fold}" for seed, fold in record.fold_models]


def _digits(values: NDArray[np.float64]) -> list[str]:
    return [f"{value:.6f}" for value in values.tolist()]


def _judge_groups(
    counted: Sequence[GroupCounts], joint: _Joint, record: RunRecord, threshold: float
) -> tuple[bytes, dict[str, Any]]:
    """Make the CSV of groups, and what the summary says of them: of two classes with rates corrected for errors."""
    if record.n_classes > 2:
        groups = [{**vars(one), "n": one.n, "shares": one.shares} for one in counted]
        return share_table(counted, record.label_names), {"groups": groups}
    errors = error_rates(joint.out_of_fold(), threshold=threshold)
    rates = group_rates(counted, errors)
    described = {"sensitivity": errors.sensitivity, "specificity": errors.specificity, "groups": rates}
    return rate_table(rates), described
