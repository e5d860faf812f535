"""Which rows train and which validate? One frozen, grouped, stratified assignment for every stage.

A fold assignment is part of every result, so it must never drift: not with the version of scikit-learn (whose
StratifiedGroupKFold changed in 1.8), not with the platform's floating point. Two sources, both frozen:

- AMi-Br's training split, five folds, seed 42: the two assignments that scikit-learn gives there, shipped as a table.
  `sklearn_1_9` is the default, because 1.8 corrected the stratification; `sklearn_1_7` is the paper's.
- everything else: the greedy rule of StratifiedGroupKFold with an exact criterion (integers, no rounding).

Or the patch table decides: every domain (scanner, centre, tumour type) validates in turn.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from features.display import html_table
from features.labels import Classes
from features.samples import Samples

Scheme = Literal["default", "paper"]
SEED = 42  # the paper's code, StratifiedGroupKFold(5, shuffle=True, random_state=42)
_FROZEN_COLUMN = {"default": "sklearn_1_9", "paper": "sklearn_1_7"}
_FROZEN_FOLDS = 5
_PARTS = 4  # of each of two folds, within which choices are made


@dataclass(frozen=True, eq=False)
class Folds:
    """A cross-validation assignment: in which fold each row validates.

    Attributes:
        fold: (n,) int; the fold in which each row validates.
        n_folds: how many folds there are.
        source: where the assignment comes from, for the record.
        digest: SHA-256 over (id, fold) sorted by id; equal digests mean the same rows validate together.
        names: of the folds, where each is a domain; else none.
        parts: (n,) int; of two domains, the part of its fold that a row is in, numbered from `n_folds` on. None where
            there are folds enough to choose on.
    """

    fold: NDArray[np.intp]
    n_folds: int
    source: str
    digest: str
    names: tuple[str, ...] = ()
    parts: NDArray[np.intp] | None = None

    def __repr__(self) -> str:
        sizes = ", ".join(map(str, self.sizes))
        return f"Folds({len(self.fold):,} rows in {self.n_folds} folds of {sizes}; {self.source}; {self.digest[:12]})"

    def _repr_html_(self) -> str:
        named = zip(self.names or range(self.n_folds), self.sizes, strict=True)
        rows = ((name, size, len(self.fold) - size) for name, size in named)
        caption = f"{self.source}; digest {self.digest[:12]}"
        return html_table(("fold", "validation rows", "training rows"), rows, caption=caption)

    @property
    def sizes(self) -> list[int]:
        """How many rows validate in each fold."""
        return [int(size) for size in np.bincount(self.fold, minlength=self.n_folds)]

    @property
    def training(self) -> NDArray[np.bool_]:
        """(n_folds, n) True where a row trains in a fold: in all but the one in which it validates."""
        return np.asarray(self.fold[None, :] != np.arange(self.n_folds)[:, None])

    @property
    def inner(self) -> NDArray[np.intp]:
        """(n,) with what each row is left out where a choice is made within training rows: its fold, or its part."""
        return self.fold if self.parts is None else self.parts


class FoldModel(NamedTuple):
    """One of the models of a cross-validation: the seed of its training, and the fold that it does not train on."""

    seed: int
    fold: int


def fold_models(seeds: Iterable[int], n_folds: int) -> tuple[FoldModel, ...]:
    """List the models of a cross-validation that is trained once per seed on the same folds, seed after seed.

    >>> fold_models([42, 43], 2)
    (FoldModel(seed=42, fold=0), FoldModel(seed=42, fold=1), FoldModel(seed=43, fold=0), FoldModel(seed=43, fold=1))
    """
    return tuple(FoldModel(seed, fold) for seed, fold in product(seeds, range(n_folds)))


def require_seeds(seed: int, seeds: int) -> None:
    """Refuse seeds that no generator takes, or no training.

    Raises:
        UserError: a negative seed, one above 2^32 - 1, or no training.
    """
    if seeds < 1:
        raise UserError(f"`seeds={seeds}`: expected how many times to train, at least 1.")
    if not 0 <= seed <= 2**32 - seeds:
        last = f", and with `seeds={seeds}` at most 2^32 - {seeds}" if seeds > 1 else ""
        raise UserError(f"seed {seed}: expected a whole number from 0 to 2^32 - 1{last}.")


def grouped_folds(
    samples: Samples,
    n_folds: int,
    *,
    seed: int = SEED,
    scheme: Scheme = "default",
    classes: Classes | None = None,
    at_least: int = 2,
) -> Folds:
    """Assign every row to one validation fold; no group is ever cut, and class rates are kept as even as that allows.

    Every fold validates on both of two classes. Of more than two, a rare one may be absent from a fold, but every fold
    trains on all of them.

    A row without a known group counts as a group by itself; byte-identical patches always stay together.

    >>> from features.samples import make_samples
    >>> slides = ["a", "a", "b", "c", "c", "d"]
    >>> samples = make_samples([f"{i}.png" for i in range(6)], [1, 0, 1, 0, 1, 0], sha256=[""] * 6, group=slides)
    >>> folds = grouped_folds(samples, 2)
    >>> folds.fold.tolist()
    [0, 0, 0, 1, 1, 1]
    >>> folds.training[0].tolist()
    [False, False, False, True, True, True]

    Args:
        samples: (n,) patch table; only these rows are assigned.
        n_folds: how many, `at_least` or more.
        seed: decides the order of groups whose classes are equally unbalanced.
        scheme: "paper" takes the assignment of the paper's runs (AMi-Br, five folds, seed 42 only).
        classes: names of all classes, of which some may be absent here; by default those that the labels count, by
            number.
        at_least: the fewest folds that can be fitted: 3 where a choice is made within the folds that train, as the
            exact probe makes it of its strength.

    Raises:
        UserError: if there are too few folds, a class occurs in too few groups for every fold to validate on both
            classes (or, of more than two, to train on all), or the paper's assignment is asked for where there is none.
    """
    names = classes or tuple(map(str, range(samples.n_classes)))
    groups = effective_groups(samples)
    remedy = _remedy(samples.label, groups, n_folds, names, at_least)
    if n_folds < at_least:
        why = ": a probe's strength is chosen within the folds that train" if at_least > 2 else ""
        raise UserError(f"cross-validation needs at least {at_least} folds, got {n_folds}{why}. {remedy}")
    _require_groups(samples.label, groups, n_folds, names, remedy)
    frozen = _frozen(samples, n_folds, seed, scheme) if len(names) == 2 else None
    if frozen is not None:
        fold, source = frozen, f"AMi-Br, {_FROZEN_COLUMN[scheme].replace('_', '-', 1).replace('_', '.')}, frozen"
    elif scheme == "paper":
        raise UserError(
            "the paper's fold assignment exists for the two classes of AMi-Br's training split with five folds and the "
            "fold seed 42 only. "
            "Use `recipe='exact'` here, or `train='ami-br'`, `cv=5` and `fold_seed=42`; `seed` may be any."
        )
    else:
        fold, source = (
            _deal(samples.label, groups, n_folds, seed, len(names)),
            f"greedy grouped stratified, seed {seed}",
        )
    _require_classes(samples.label, groups, fold, n_folds, names, remedy=remedy)
    return Folds(fold=fold, n_folds=n_folds, source=source, digest=_digest(samples, fold))


def no_folds(n: int) -> Folds:
    """Make what stands for the folds of n rows where nothing is fitted to them: all lie together."""
    return Folds(fold=np.zeros(n, np.intp), n_folds=1, source="none", digest="")


def domain_folds(samples: Samples, *, seed: int = SEED, classes: Classes | None = None) -> Folds:
    """Let every domain (scanner, centre, tumour type) validate in turn, whatever its size; no group is ever cut.

    >>> from features.samples import make_samples
    >>> ids, centres = [f"{i}.png" for i in range(6)], ["Oslo", "Bern"] * 3
    >>> domain_folds(make_samples(ids, [0, 0, 1, 1, 0, 1], sha256=[""] * 6, domain=centres))
    Folds(6 rows in 2 folds of 3, 3; by domain; 8d111d813acb)

    Args:
        samples: (n,) patch table; only these rows are assigned.
        seed: of two domains, decides which groups of one are in a part of it, on which a choice is made.
        classes: as for `grouped_folds`.

    Raises:
        UserError: if a patch has no domain, there is but one, a group (or byte-identical patches) lies in two, or a
            domain lacks one of two classes, or of more holds all patches of one.
    """
    without = samples.id[samples.domain == ""].tolist()
    if without:
        raise UserError(
            f"`folds_by=domain`: {len(without):,} of {len(samples):,} training patches have no domain (first: "
            f"{without[0]}). Name it in the column domain (or scanner, centre, site), or use `cv`."
        )
    names, fold = np.unique(samples.domain, return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"`folds_by=domain`: all training patches are of {', '.join(names.tolist()) or 'no domain'}. Expected two "
            "domains or more, so that one validates while others train. Use `cv`."
        )
    groups = effective_groups(samples)
    first = np.full(groups.max() + 1, len(samples))
    np.minimum.at(first, groups, np.arange(len(samples)))
    crossing = np.flatnonzero(fold != fold[first[groups]])
    if len(crossing):
        row, other = crossing[0], first[groups[crossing[0]]]
        named = samples.group[row]
        what = f"the group {named} lies" if named and named == samples.group[other] else "identical patches lie"
        raise UserError(
            f"`folds_by=domain`: {what} in two domains, {samples.domain[other]} ({samples.id[other]}) and "
            f"{samples.domain[row]} ({samples.id[row]}), so that a fold would train on what it validates on. Correct "
            "the table: a slide or patient has one domain, and different ones have different names."
        )
    known = classes or tuple(map(str, range(samples.n_classes)))
    _require_classes(samples.label, groups, fold, len(names), known, domains=names.tolist())
    parts = None
    if len(names) == 2:
        parts, n_parts = np.empty_like(fold), 2
        for k in range(2):
            rows = np.flatnonzero(fold == k)
            _, own = np.unique(groups[rows], return_inverse=True)
            n_own = min(_PARTS, int(own.max()) + 1)
            parts[rows] = n_parts + _deal(samples.label[rows], own, n_own, seed, len(known))
            n_parts += n_own
    return Folds(
        fold=fold,
        n_folds=len(names),
        source="by domain",
        digest=_digest(samples, fold),
        names=tuple(names.tolist()),
        parts=parts,
    )


def _digest(samples: Samples, fold: NDArray[np.intp]) -> str:
    lines = sorted(f"{id}\t{k}\n" for id, k in zip(samples.id.tolist(), fold.tolist(), strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def effective_groups(samples: Samples) -> NDArray[np.intp]:
    """Number the groups that no split may cut: (n,) known groups, joined wherever two rows are byte-identical.

    A row without a known group is a group by itself. Identical rows in two groups join those groups, so that a
    patch never validates a model that has trained on its copy.

    >>> from features.samples import make_samples
    >>> samples = make_samples(list("abcd"), [0, 1, 0, 1], sha256=list("1213"), group=["x", "x", "y", ""])
    >>> effective_groups(samples).tolist()
    [0, 0, 0, 1]
    """
    n = len(samples)
    parent = np.arange(n)

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    for column in (samples.group, samples.sha256):
        first: dict[str, int] = {}
        for row, key in enumerate(column.tolist()):
            if key:  # an empty group or digest is unknown, and two unknowns are not the same
                parent[root(row)] = root(first.setdefault(key, row))
    # Numbered in the order of their first ids, not of rows: shuffling the table must not move a group.
    roots = np.array([root(row) for row in range(n)])
    by_id = np.argsort(samples.id, kind="stable")
    _, first_in_order, number = np.unique(roots[by_id], return_index=True, return_inverse=True)
    groups = np.empty(n, dtype=np.intp)
    groups[by_id] = np.argsort(np.argsort(first_in_order))[number]
    return groups


def _frozen(samples: Samples, n_folds: int, seed: int, scheme: Scheme) -> NDArray[np.intp] | None:
    if n_folds != _FROZEN_FOLDS or seed != SEED:
        return None
    with files("features").joinpath("data/ami-br-folds.csv").open(encoding="utf-8") as file:
        fold_of = {row["slide"]: int(row[_FROZEN_COLUMN[scheme]]) for row in csv.DictReader(file)}
    if set(samples.group.tolist()) != set(fold_of):
        return None
    return np.array([fold_of[slide] for slide in samples.group.tolist()], dtype=np.intp)


def _deal(
    label: NDArray[np.int8], groups: NDArray[np.intp], n_folds: int, seed: int, n_classes: int
) -> NDArray[np.intp]:
    """Assign groups to folds, those with the most unequal classes first, each to the fold that keeps classes most even.

    Of equally good folds, the one with the fewest rows is taken.

    How unequal the classes of a group are is the variance of its counts: sum_c g_c^2 - (sum_c g_c)^2 / C, made an
    integer by C, the number of classes. Of two classes that is (g_0 - g_1)^2.

    The unevenness of a class c is the variance over folds of its share n_kc / n_c. Adding a group with g_c rows of
    class c to fold k raises the sum of squared shares by ((n_kc + g_c)^2 - n_kc^2) / n_c^2; only that increment
    differs between folds, and scaled by the least common multiple of all n_c^2 it is an integer.
    """
    n_groups = int(groups.max()) + 1
    counts = np.zeros((n_groups, n_classes), dtype=np.int64)
    np.add.at(counts, (groups, label.astype(np.intp)), 1)
    # RandomState, not Generator: its permutations are guaranteed never to change.
    shuffled = np.random.RandomState(seed).permutation(n_groups)
    inequality = n_classes * (counts[shuffled] ** 2).sum(axis=1) - counts[shuffled].sum(axis=1) ** 2
    order = shuffled[np.argsort(-inequality, kind="stable")]

    totals = [max(total, 1) for total in counts.sum(axis=0).tolist()]
    multiple = math.lcm(*totals) ** 2
    weights = [multiple // total**2 for total in totals]
    in_fold = [[0] * n_classes for _ in range(n_folds)]
    n_rows = [0] * n_folds
    fold_of = np.empty(n_groups, dtype=np.intp)
    for group in order:
        new = [(c, count) for c, count in enumerate(counts[group].tolist()) if count]

        def unevenness(k: int, new: list[tuple[int, int]] = new) -> tuple[int, int]:
            held = in_fold[k]
            return sum(weights[c] * count * (2 * held[c] + count) for c, count in new), n_rows[k]

        best = min(range(n_folds), key=unevenness)
        for c, count in new:
            in_fold[best][c] += count
            n_rows[best] += count
        fold_of[group] = best
    return np.asarray(fold_of[groups])


def _remedy(label: NDArray[np.int8], groups: NDArray[np.intp], n_folds: int, names: Classes, at_least: int) -> str:
    """Say what helps where there cannot be so many folds: never a number of folds that would be refused in its turn."""
    fewest = min(len(np.unique(groups[label == value])) for value in range(len(names)))
    # More than two classes need not be in every fold, but one of a single group is lacking where that validates.
    most = fewest if len(names) == 2 or fewest < 2 else len(np.unique(groups))
    if most >= at_least:
        if n_folds < at_least:
            return f"Use `cv={at_least}`{' or more' if most > at_least else ''}."
        if n_folds > most:
            return f"Use `cv={most}`{' or fewer' if most > at_least else ''}, or label more slides."
        return f"Use another `fold_seed`{', fewer folds' if n_folds > at_least else ''}, or label more slides."
    if most >= 2:
        return (
            f"There are slides enough for {most} folds, and the exact probe takes at least {at_least}: label more "
            f"slides, or use `recipe='paper'` with `cv={most}`."
        )
    return "No number of folds will do: label more slides."


def _require_groups(
    label: NDArray[np.int8], groups: NDArray[np.intp], n_folds: int, names: Classes, remedy: str
) -> None:
    """Refuse more folds than there are groups, before they are dealt."""
    n_groups = len(np.unique(groups))
    if n_folds > n_groups:
        fewest, rarest = min((len(np.unique(groups[label == value])), value) for value in range(len(names)))
        rarer = "the rarer class" if len(names) == 2 else f"the rarest class ({names[rarest]})"
        raise UserError(
            f"{n_folds} folds were asked for, but there {'is' if n_groups == 1 else 'are'} {n_groups} "
            f"group{'s' * (n_groups != 1)} (slides), which are never cut, and {rarer} occurs in {fewest}. {remedy}"
        )


def _require_classes(
    label: NDArray[np.int8],
    groups: NDArray[np.intp],
    fold: NDArray[np.intp],
    n_folds: int,
    names: Classes,
    *,
    domains: Sequence[str] = (),
    remedy: str = "",
) -> None:
    """Refuse folds of which one cannot validate on both of two classes, or cannot train on one of more."""
    for value, name in enumerate(names):
        n_groups = len(np.unique(groups[label == value]))
        within = set(fold[label == value].tolist())
        lacking = sorted(set(range(n_folds)) - within)
        many = len(names) > 2
        if len(within) >= 2 if many else not lacking:
            continue
        if domains:
            where = domains[lacking[0]] if not many else f"all but {domains[within.pop()]}" if within else "the table"
            raise UserError(
                f"`folds_by=domain`: {where} has no training patch of the class {name} (label {value}), and every fold "
                f"must {'train' if many else 'validate'} on it. Make two domains one in the table, or use `cv`."
            )
        occurs = f"which occurs in {n_groups} group{'s' * (n_groups != 1)}"
        if not many:
            role = "positive" if value else "negative"
            raise UserError(
                f"fold {lacking[0]} of {n_folds} has no patch of the {role} class (label {value}), {occurs}; every "
                f"fold needs both classes, and groups (slides) are never cut. {remedy}"
            )
        found = "one fold alone would validate on" if within else "there is no training patch of"
        fits = "Use another `fold_seed`" if n_groups >= 2 else "Make it one with another class by `labels`"
        raise UserError(
            f"{found} the class {name} (label {value}), {occurs}; every fold must train on every class, and groups "
            f"(slides) are never cut. {fits}, or label more slides."
        )
