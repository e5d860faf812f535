"""Would more slides help? A learning curve: every fold's model again, trained on a share of its slides.

A subset holds whole slides. A draw is one seeded permutation of the slides; a fraction q takes the first ceil(q n) of
the n slides that do not validate, so that larger subsets contain the smaller ones. Subsets follow from the patch table,
the folds and the seed alone: every model of a store trains on the same ones, and where two curves cross, the reason is
the backbone and not the draw.

The strength C is chosen anew on every subset, as it would be with few slides. As in `probe.linear`, one fit without
folds f and g serves the choices of both, whose slides are in the same order. For the choice of fold f it is scored on
those rows of g that are in f's subset, so that no label outside the subset takes part.

A slide here is what a fold never cuts (`features.folds.effective_groups`). A patch without a slide counts as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from probe.evidence import fold_figures
from probe.metrics import COMPARED
from probe.predictions import Predictions, csv_bytes, parse_columns
from probe.runs import read_checked

CURVE_FILE = "learning_curve.csv"
DRAWS = 3  # permutations per fraction below 1: with five folds, fifteen models
_THOUSAND = 1000  # messages give the smallest possible fraction in thousandths


@dataclass(frozen=True, eq=False)
class Subset:
    """The slides that one fraction and draw leave to train on; m counts the combinations of held-out folds.

    Attributes:
        fraction: of the slides, in (0, 1].
        draw: which permutation, from 0; fraction 1 has but one.
        masks: (m, n) bool; the rows to train on.
        n_slides: (m,) int; how many slides those rows come from.
    """

    fraction: float
    draw: int
    masks: NDArray[np.bool_]
    n_slides: NDArray[np.intp]


@dataclass(frozen=True)
class CurvePoint:
    """One fold's model on one set: a row of learning_curve.csv.

    Attributes:
        fraction, draw, fold: which model.
        n_slides, n_patches, n_positive: what it trained on; positive is class 1.
        strength: the C chosen within that.
        dataset, split: what it is judged on; of split "validation", the rows of its held-out fold.
        balanced_accuracy, auroc: at threshold 0.5; NaN where the set lacks a class.
    """

    fraction: float
    draw: int
    fold: int
    n_slides: int
    n_patches: int
    n_positive: int
    strength: float
    dataset: str
    split: str
    balanced_accuracy: float
    auroc: float


@dataclass(frozen=True)
class CurveSummary:
    """A fraction on one set, over all folds and draws: means, and population standard deviations of the figures.

    There are `n_models` of them, folds times draws. A figure is NaN where a point's is.
    """

    dataset: str
    split: str
    fraction: float
    n_models: int
    n_slides: float
    n_patches: float
    n_positive: float
    balanced_accuracy: float
    balanced_accuracy_std: float
    auroc: float
    auroc_std: float

    @property
    def name(self) -> str:
        """Dataset and split, as in metrics.json."""
        return f"{self.dataset}/{self.split}"


def parse_fractions(text: str) -> tuple[float, ...]:
    """Read a comma-separated list as distinct fractions, ascending.

    Raises:
        UserError: if there is none, or one is no number or not in (0, 1].
    """
    such = "Give shares of the training slides, such as 0.1,0.25,0.5,1."
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"`fractions`: {error}. {such}") from None
    if not values:
        raise UserError(f"`fractions` names none. {such}")
    return checked_fractions(values)


def checked_fractions(values: Iterable[float]) -> tuple[float, ...]:
    """Sort fractions, drop repeated ones, and check them.

    Raises:
        UserError: if one is not in (0, 1].
    """
    distinct = tuple(sorted(set(values)))
    for value in distinct:
        if not 0 < value <= 1:
            raise UserError(
                f"`fractions`: {value:g} is no share of the training slides; expected more than 0 and at most 1, "
                "such as 0.1,0.25,0.5,1."
            )
    return distinct


def draw_subsets(
    label: NDArray[np.integer],
    fold: NDArray[np.intp],
    slide: NDArray[np.intp],
    *,
    left_out: Sequence[tuple[int, ...]],
    fractions: Sequence[float],
    seed: int,
) -> tuple[Subset, ...]:
    """Draw the subsets of every fraction, sorted by fraction and draw.

    Args:
        label: (n,) class numbers, of the training split.
        fold: (n,) the fold in which each row validates.
        slide: (n,) numbers of what is never cut.
        left_out: (m) the held-out folds of every fit: one, or two where the strength is chosen.
        fractions: of the slides, ascending.
        seed: of the permutations.

    Raises:
        UserError: if a fraction is not in (0, 1], or so small that a fit lacks a class, or that a fold cannot choose a
            strength, because its subset has two classes in no other fold.
    """
    fractions = checked_fractions(fractions)
    subsets = []
    smallest = 0  # the fraction that is enough for every fit, in thousandths
    too_few = ""  # what is wrong with the first fraction that is not enough
    for draw in range(DRAWS):
        places = [_places(slide, ~np.isin(fold, held), seed=(seed, draw)) for held in left_out]
        for q in fractions:
            if draw > 0 and q == 1:
                continue
            taken = [math.ceil(Fraction(str(q)) * n) for _, n in places]  # exact: 0.07 of 100 is 7, never 8
            for held, (place, n), k in zip(left_out, places, taken, strict=True):
                needed = _needed(place, n, label, fold, held)
                # ceil(q n) slides are enough from q above (needed - 1) / n on.
                smallest = max(smallest, (needed - 1) * _THOUSAND // n + 1)
                if k < needed and not too_few:
                    too_few = _too_few(q, draw, held, k, n)
            masks = np.stack([place < k for (place, _), k in zip(places, taken, strict=True)])
            subsets.append(Subset(q, draw, masks, np.array(taken, dtype=np.intp)))
    if too_few:
        raise UserError(f"{too_few} The smallest fraction that works is {smallest / _THOUSAND:g}.")
    return tuple(sorted(subsets, key=lambda subset: (subset.fraction, subset.draw)))


def curve_points(
    subset: Subset, label: NDArray[np.integer], strength: Sequence[float], predictions: Predictions
) -> list[CurvePoint]:
    """Score the models of one subset on the sets that they predict.

    Args:
        subset: its first F masks leave out one fold each, in order.
        label: (n,) class numbers, of the training split.
        strength: (F,) the C of every fold.
        predictions: of every fold's model.
    """
    points = []
    for dataset, split in predictions.sets():
        figures = fold_figures(predictions, dataset, split)
        for f, C in enumerate(strength):
            points.append(
                CurvePoint(
                    fraction=subset.fraction,
                    draw=subset.draw,
                    fold=f,
                    n_slides=int(subset.n_slides[f]),
                    n_patches=int(subset.masks[f].sum()),
                    n_positive=int((subset.masks[f] & (label == 1)).sum()),
                    strength=float(C),
                    dataset=dataset,
                    split=split,
                    **{name: figures[name].each[f] for name in COMPARED},
                )
            )
    return points


def curve_csv(points: Iterable[CurvePoint]) -> bytes:
    """Make learning_curve.csv; a figure that does not exist is an empty cell."""
    ordered = sorted(points, key=lambda point: (point.fraction, point.draw, point.fold))
    rows = [["" if value != value else value for value in astuple(point)] for point in ordered]  # NaN is no number
    return csv_bytes([field.name for field in fields(CurvePoint)], rows)


def read_curve(folder: Path) -> tuple[CurvePoint, ...]:
    """Read a run's learning curve; empty if it has none.

    Raises:
        UserError: if the file is not the one that the run wrote, or holds a malformed or impossible value.
    """
    if not (folder / CURVE_FILE).exists():
        return ()
    return read_checked(folder, CURVE_FILE, parse=_parse_curve)


def _parse_curve(text: str) -> tuple[CurvePoint, ...]:
    columns = parse_columns(text, [field.name for field in fields(CurvePoint)])
    points = []
    for line, cells in enumerate(zip(*columns.values(), strict=True), start=2):
        try:
            points.append(_point(dict(zip(columns, cells, strict=True))))
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from None
    return tuple(points)


def summarise(points: Iterable[CurvePoint]) -> tuple[CurveSummary, ...]:
    """Average over folds and draws: one summary per set and fraction, sets in order of appearance."""
    grouped: dict[tuple[str, str], dict[float, list[CurvePoint]]] = {}
    for point in points:
        grouped.setdefault((point.dataset, point.split), {}).setdefault(point.fraction, []).append(point)
    return tuple(
        _summary(dataset, split, fraction, grouped[dataset, split][fraction])
        for dataset, split in grouped
        for fraction in sorted(grouped[dataset, split])
    )


def _places(slide: NDArray[np.intp], left: NDArray[np.bool_], *, seed: tuple[int, int]) -> tuple[NDArray[np.intp], int]:
    """Permute the slides that have rows in `left`; return the position (n,) of each row's slide, and their number.

    The other rows, which are held out, get a position after all of these.
    """
    n_slides = int(slide.max()) + 1
    rank = np.empty(n_slides, dtype=np.intp)
    # RandomState, not Generator: its permutations are guaranteed never to change.
    rank[np.random.RandomState(seed).permutation(n_slides)] = np.arange(n_slides)
    _, place = np.unique(rank[slide[left]], return_inverse=True)
    n_left = int(place.max()) + 1
    places = np.full(len(slide), n_left, dtype=np.intp)
    places[left] = place
    return places, n_left


def _needed(
    place: NDArray[np.intp], n_left: int, label: NDArray[np.integer], fold: NDArray[np.intp], held: tuple[int, ...]
) -> int:
    """Count the slides, from the first on, that a fit needs with these folds held out.

    A fit needs every class that is left; with a single fold held out, also two classes within one other fold, to choose
    the strength on it.
    """

    def all_of(rows: NDArray[np.bool_], at_least: int) -> int:
        """Count the slides until `at_least` classes of these rows are there."""
        first = sorted(int(place[rows & (label == value)].min(initial=n_left)) for value in np.unique(label))
        return first[at_least - 1] + 1

    n_classes = len(np.unique(label[place < n_left]))
    every = all_of(place < n_left, n_classes)
    if len(held) > 1:
        return every
    return max(every, min(all_of(fold == g, 2) for g in np.unique(fold) if g not in held))


def _too_few(fraction: float, draw: int, held: tuple[int, ...], taken: int, n_left: int) -> str:
    where = f"fold{'s' * (len(held) > 1)} {' and '.join(map(str, held))}"
    lack = "which lack a class"
    if len(held) == 1:
        lack += ", or of which no other fold holds two classes to choose C on"
    return (
        f"`fractions`: {fraction:g} is too small. With {where} held out it leaves {taken} of {n_left} slides to train "
        f"on (draw {draw}), {lack}."
    )


def _point(row: Mapping[str, str]) -> CurvePoint:
    """Make a point of one row of learning_curve.csv, and refuse numbers that no point can have."""
    cells = {name: "nan" if name in COMPARED and not cell else cell for name, cell in row.items()}
    try:
        point = msgspec.convert(cells, CurvePoint, strict=False)  # numbers are read from their text
    except msgspec.ValidationError as error:
        raise ValueError(f"{error}: {','.join(row.values())}") from None
    possible = {
        "fraction": 0 < point.fraction <= 1,
        "draw": point.draw >= 0,
        "fold": point.fold >= 0,
        "n_slides": 0 < point.n_slides <= point.n_patches,
        "n_positive": 0 < point.n_positive < point.n_patches,
        "strength": 0 < point.strength < math.inf,
    } | {name: math.isnan(value := getattr(point, name)) or 0 <= value <= 1 for name in COMPARED}
    for name, holds in possible.items():
        if not holds:
            raise ValueError(f"{name} is {cells[name]}")
    return point


def _summary(dataset: str, split: str, fraction: float, points: Sequence[CurvePoint]) -> CurveSummary:
    values = {
        name: np.array([getattr(point, name) for point in points])
        for name in ("n_slides", "n_patches", "n_positive", *COMPARED)
    }
    means = {name: float(column.mean()) for name, column in values.items()}
    stds = {f"{name}_std": float(values[name].std()) for name in COMPARED}
    return CurveSummary(dataset=dataset, split=split, fraction=fraction, n_models=len(points), **means, **stds)
