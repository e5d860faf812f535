"""Do folds keep groups whole, classes even, and never drift?"""

import csv
import re
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from features.console import UserError
from features.folds import domain_folds, effective_groups, grouped_folds
from features.samples import Samples, make_samples


def table(n_groups: int = 40, seed: int = 0) -> Samples:
    rng = np.random.RandomState(seed)
    group = np.repeat(np.arange(n_groups), rng.randint(1, 30, n_groups))
    n = len(group)
    return make_samples(
        [f"{row:04}.png" for row in range(n)],
        (rng.random_sample(n) < 0.25).astype(int).tolist(),
        group=[f"slide-{g}" for g in group],
        sha256=[f"{row:064x}" for row in range(n)],
    )


def test_groups_never_cross_folds():
    samples = table()
    folds = grouped_folds(samples, 5)
    for group in np.unique(samples.group):
        assert len(set(folds.fold[samples.group == group])) == 1


def test_every_row_validates_once_and_trains_elsewhere():
    folds = grouped_folds(table(), 5)
    assert (folds.training.sum(axis=0) == 4).all()
    assert set(folds.fold.tolist()) == set(range(5))


def test_class_rates_are_even():
    samples = table(120)
    folds = grouped_folds(samples, 5)
    rates = [samples.label[folds.fold == k].mean() for k in range(5)]
    sizes = np.bincount(folds.fold)
    assert max(rates) - min(rates) < 0.03
    assert sizes.max() / sizes.min() < 1.15


def test_assignment_never_drifts():
    assert np.bincount(grouped_folds(table(), 5).fold).tolist() == FROZEN_SIZES
    assert grouped_folds(table(), 5).digest == FROZEN_DIGEST


def test_order_of_rows_does_not_move_a_group():
    samples = table()
    shuffled = np.random.RandomState(1).permutation(len(samples))
    assert grouped_folds(samples.select(shuffled), 5).digest == grouped_folds(samples, 5).digest


def test_identical_patches_stay_together_across_groups():
    samples = make_samples(
        list("abcdef"), [0, 1] * 3, group=["g1", "g1", "g2", "g2", "", ""], sha256=["x", "1", "x", "2", "3", "2"]
    )
    groups = effective_groups(samples)
    assert len({groups[0], groups[1], groups[2], groups[3], groups[5]}) == 1
    assert groups[4] != groups[0]


def test_unknown_groups_are_groups_of_their_own():
    samples = make_samples(list("abcd"), [0, 1, 0, 1], sha256=list("1234"))
    assert len(set(effective_groups(samples).tolist())) == 4


def test_a_class_in_one_group_only_is_refused_with_the_remedy():
    samples = make_samples(
        [str(row) for row in range(20)],
        [1] * 4 + [0] * 16,
        group=["only"] * 4 + [f"g{row}" for row in range(16)],
        sha256=[str(row) for row in range(20)],
    )
    with pytest.raises(UserError, match=r"positive class .* occurs in 1 group; every fold needs both classes"):
        grouped_folds(samples, 5)


@pytest.mark.parametrize("n_folds", [7, 10**30])
def test_more_folds_than_groups_are_refused_before_they_are_dealt(n_folds):
    ids, slides = list("abcdefgh"), list("11234566")
    samples = make_samples(ids, [0, 1] * 4, sha256=[""] * 8, group=slides)
    with pytest.raises(UserError, match=r"there are 6 groups.*rarer class occurs in 4\. Use `cv=4` or fewer"):
        grouped_folds(samples, n_folds)


@pytest.mark.parametrize(
    ("n_slides", "n_folds", "message"),
    [
        (5, 2, r"at least 3 folds, got 2: a probe's strength .*\. Use `cv=3` or more\.$"),
        (3, 2, r"\. Use `cv=3`\.$"),
        (3, 4, r"\. Use `cv=3`, or label more slides\.$"),
        (5, 9, r"\. Use `cv=5` or fewer, or label more slides\.$"),
        (2, 2, r"at least 3 .* enough for 2 folds, .*: label more slides, or use `recipe='paper'` with `cv=2`\.$"),
        (2, 3, r"there are 2 groups .* enough for 2 folds, .*: label more slides, or use `recipe='paper'` with `cv=2`"),
        (1, 2, r"\. No number of folds will do: label more slides\.$"),
        (1, 3, r"there is 1 group .*\. No number of folds will do: label more slides\.$"),
    ],
)
def test_advice_on_folds_is_never_refused_in_its_turn(n_slides, n_folds, message):
    """Of an exact probe, which takes three folds: neither "cv=2 or fewer" nor "cv=3" where neither is possible."""
    ids = [f"{row}" for row in range(2 * n_slides)]
    samples = make_samples(ids, [0, 1] * n_slides, sha256=[""] * len(ids), group=[f"{int(row) // 2}" for row in ids])
    with pytest.raises(UserError, match=message) as refused:
        grouped_folds(samples, n_folds, at_least=3)
    for advised in re.findall(r"`cv=(\d)`", str(refused.value)):
        grouped_folds(samples, int(advised), at_least=2 if "recipe" in str(refused.value) else 3)


def test_another_seed_is_advised_where_the_fewest_folds_leave_one_without_a_class(monkeypatch):
    monkeypatch.setattr("features.folds._deal", lambda label, *_: np.arange(len(label)) // 2 % 2)
    samples = make_samples(list("abcdef"), [0, 1] * 3, sha256=[""] * 6, group=list("abcdef"))
    with pytest.raises(UserError, match=r"never cut\. Use another `fold_seed`, or label more slides\.$"):
        grouped_folds(samples, 3, at_least=3)


def test_too_few_folds_is_refused():
    with pytest.raises(UserError, match="at least 2 folds"):
        grouped_folds(table(), 1)


def test_the_papers_assignment_exists_for_ami_br_only():
    with pytest.raises(UserError, match="paper's fold assignment"):
        grouped_folds(table(), 5, scheme="paper")


def test_ami_br_gets_the_two_frozen_assignments(real_data):
    from extract.datasets import load_dataset

    samples = load_dataset("ami-br", data=real_data).samples
    train = samples.select(samples.split == "train")
    # Validation sizes and atypical rates as scikit-learn 1.7.2 and 1.9.1 give them, measured once.
    for scheme, sizes, rates in (
        ("default", [563, 564, 632, 571, 564], [21.3, 21.6, 25.3, 21.9, 21.5]),
        ("paper", [592, 805, 451, 379, 667], [27.7, 16.4, 28.6, 23.5, 20.1]),
    ):
        fold = grouped_folds(train, 5, scheme=scheme).fold
        assert np.bincount(fold).tolist() == sizes
        assert [round(100 * train.label[fold == k].mean(), 1) for k in range(5)] == pytest.approx(rates)


def test_the_greedy_rule_is_as_even_as_scikit_learns():
    from sklearn.model_selection import StratifiedGroupKFold

    samples = table(60, seed=3)

    def unevenness(fold: np.ndarray) -> float:
        shares = [[np.mean(fold[samples.label == c] == k) for k in range(5)] for c in (0, 1)]
        return float(np.std(shares, axis=1).sum())

    theirs = np.empty(len(samples), dtype=int)
    splits = StratifiedGroupKFold(5, shuffle=True, random_state=42).split(samples.id, samples.label, samples.group)
    for k, (_, rows) in enumerate(splits):
        theirs[rows] = k
    assert unevenness(grouped_folds(samples, 5).fold) <= unevenness(theirs) * 1.5


FROZEN_SIZES = [122, 109, 115, 117, 130]
FROZEN_DIGEST = "9e5b2f94affbf5d368115e164b8d5c40ab1422a7a3915dac69e6f9b4d9fed3df"


def slides_of_ami_br(*, without: int = 0, more: int = 0) -> Samples:
    """Two patches, one of either class, of every slide that the frozen assignment knows."""
    slides = sorted(FROZEN_SLIDES)[without:] + [f"another {k}" for k in range(more)]
    rows = [(slide, label) for slide in slides for label in (0, 1)]
    return make_samples(
        [f"{slide}-{label}.png" for slide, label in rows],
        [label for _, label in rows],
        group=[slide for slide, _ in rows],
        sha256=[f"{k}" for k in range(len(rows))],
    )


@pytest.mark.parametrize(("scheme", "column"), [("default", "sklearn_1_9"), ("paper", "sklearn_1_7")])
def test_all_slides_of_ami_br_take_the_frozen_folds(scheme, column):
    samples = slides_of_ami_br()
    folds = grouped_folds(samples, 5, scheme=scheme)
    assert folds.fold.tolist() == [int(FROZEN_SLIDES[slide][column]) for slide in samples.group.tolist()]
    assert "frozen" in folds.source
    assert column.removeprefix("sklearn_").replace("_", ".") in folds.source
    assert folds.digest == grouped_folds(samples.select(np.arange(len(samples))[::-1]), 5, scheme=scheme).digest


@pytest.mark.parametrize(
    ("change", "options"),
    [({"without": 1}, {}), ({"more": 1}, {}), ({"without": 100}, {}), ({}, {"seed": 43}), ({}, {"n_folds": 4})],
)
def test_other_slides_seeds_or_numbers_of_folds_do_not(change, options):
    samples = slides_of_ami_br(**change)
    n_folds, seed = options.get("n_folds", 5), options.get("seed", 42)
    folds = grouped_folds(samples, n_folds, seed=seed)
    assert folds.source == f"greedy grouped stratified, seed {seed}"
    sizes = np.bincount(folds.fold, minlength=n_folds)
    assert sizes.max() - sizes.min() <= 2  # slides of two: as even as can be; the frozen folds are not
    with pytest.raises(UserError, match="paper's fold assignment"):
        grouped_folds(samples, n_folds, seed=seed, scheme="paper")


def test_the_seed_and_the_ids_are_in_the_folds_and_their_digest():
    samples = table()
    digests = {grouped_folds(samples, 5, seed=seed).digest for seed in range(4)}
    assert len(digests) == 4
    renamed = make_samples(
        [f"x{id}" for id in samples.id.tolist()],
        samples.label.tolist(),
        group=samples.group.tolist(),
        sha256=samples.sha256.tolist(),
    )
    before, after = grouped_folds(samples, 5), grouped_folds(renamed, 5)
    assert before.fold.tolist() == after.fold.tolist()
    assert before.digest != after.digest


@pytest.mark.parametrize("n_classes", [2, 3, 8])
def test_groups_are_dealt_as_a_plain_loop_over_fractions_deals_them(n_classes):
    """The rule of the docstring again, in exact fractions: the fold whose shares become the least uneven."""
    from fractions import Fraction
    from statistics import pvariance

    samples = table(37, seed=5)
    if n_classes > 2:
        samples = replace(samples, label=np.random.RandomState(6).randint(0, n_classes, len(samples)).astype(np.int8))
    groups, n_folds, classes = effective_groups(samples), 4, range(n_classes)
    counts = [[int(((groups == g) & (samples.label == c)).sum()) for c in classes] for g in range(groups.max() + 1)]
    order = np.random.RandomState(7).permutation(len(counts)).tolist()
    order = sorted(order, key=lambda g: -pvariance(map(Fraction, counts[g])))  # stable
    held = [[0] * n_classes for _ in range(n_folds)]
    total = np.sum(counts, axis=0).tolist()
    fold_of = {}
    for group in order:
        found = []
        for k in range(n_folds):
            trial = [list(of) for of in held]
            trial[k] = [trial[k][c] + counts[group][c] for c in classes]
            squares = sum(Fraction(of[c], total[c]) ** 2 for of in trial for c in classes)
            found.append((squares, sum(held[k]), k))
        fold_of[group] = min(found)[2]
        held[fold_of[group]] = [held[fold_of[group]][c] + counts[group][c] for c in classes]
    assert grouped_folds(samples, n_folds, seed=7).fold.tolist() == [fold_of[g] for g in groups.tolist()]


def of_classes(groups_of: dict[int, int], *, rows: int = 2) -> Samples:
    """Some rows of each class in each of so many groups of its own."""
    place = [(f"{label}-{g}", label) for label, n in groups_of.items() for g in range(n) for _ in range(rows)]
    ids = [f"{k}.png" for k in range(len(place))]
    return make_samples(ids, [label for _, label in place], group=[g for g, _ in place], sha256=[""] * len(ids))


def test_a_rare_class_of_several_may_be_absent_from_a_fold_but_not_from_its_training():
    samples = of_classes({0: 20, 1: 10, 2: 2})
    folds = grouped_folds(samples, 5)
    assert len(set(folds.fold[samples.label == 2].tolist())) == 2
    for training in folds.training:
        assert set(samples.label[training].tolist()) == {0, 1, 2}
    names = ("pro", "meta", "ana", "telo")
    assert grouped_folds(samples, 5, classes=names[:3]).digest == folds.digest  # names change nothing
    for groups_of, classes, message in (
        (
            {0: 20, 1: 10, 2: 1},
            names[:3],
            r"one fold alone .* class ana \(label 2\), which occurs in 1 group; .*`labels`",
        ),
        ({0: 20, 1: 10, 2: 1}, None, r"the class 2 \(label 2\), which occurs in 1 group;"),
        ({0: 20, 1: 10, 2: 5}, names, r"no training patch of the class telo \(label 3\), which occurs in 0 groups"),
        ({0: 20, 1: 10}, names[:3], r"no training patch of the class ana \(label 2\)"),
        ({0: 2, 1: 2, 3: 2}, names, r"no training patch of the class ana"),
    ):
        with pytest.raises(UserError, match=message):
            grouped_folds(of_classes(groups_of), 5, classes=classes)


def test_two_groups_of_a_class_in_one_fold_are_refused_with_another_remedy(monkeypatch):
    from features import folds

    samples = of_classes({0: 4, 1: 4, 2: 2})
    monkeypatch.setattr(folds, "_deal", lambda label, *_: np.where(label == 2, 0, np.arange(len(label)) % 3))
    with pytest.raises(UserError, match=r"label 2\), which occurs in 2 groups; .* Use another `fold_seed`"):
        grouped_folds(samples, 3)


def test_more_folds_than_groups_of_several_classes_are_refused():
    with pytest.raises(UserError, match=r"7 groups.*rarest class \(meta\) occurs in 2\. Use `cv=7` or fewer"):
        grouped_folds(of_classes({0: 3, 1: 2, 2: 2}), 8, classes=("pro", "meta", "telo"))
    assert set(grouped_folds(of_classes({0: 3, 1: 2, 2: 2}), 7).fold.tolist()) == set(range(7))


def test_the_frozen_folds_are_for_two_classes():
    samples = slides_of_ami_br()
    three = replace(samples, label=np.where(np.arange(len(samples)) % 4 == 3, 2, samples.label).astype(np.int8))
    assert grouped_folds(three, 5).source == "greedy grouped stratified, seed 42"
    with pytest.raises(UserError, match="paper's fold assignment exists for the two classes"):
        grouped_folds(three, 5, scheme="paper")


def test_the_fold_that_lacks_the_negative_class_is_refused_too():
    samples = make_samples(
        [str(row) for row in range(12)],
        [0] * 2 + [1] * 10,
        group=["a", "b", *(f"g{row}" for row in range(10))],
        sha256=[""] * 12,
    )
    with pytest.raises(
        UserError, match=r"negative class \(label 0\), which occurs in 2 groups.*Use `cv=2`, or label more"
    ):
        grouped_folds(samples, 3)
    assert set(grouped_folds(samples, 2).fold[:2].tolist()) == {0, 1}


def frozen_slides() -> dict[str, dict[str, str]]:
    with files("features").joinpath("data/ami-br-folds.csv").open(encoding="utf-8") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


FROZEN_SLIDES = frozen_slides()


def test_folds_show_their_sizes_source_and_digest():
    samples = make_samples([str(i) for i in range(7)], [0, 1] * 3 + [0], sha256=[""] * 7)
    folds = grouped_folds(samples, 2, seed=1)
    assert sorted(folds.sizes) == [3, 4]
    assert repr(folds) == (
        f"Folds(7 rows in 2 folds of {folds.sizes[0]}, {folds.sizes[1]}; greedy grouped stratified, seed 1; "
        f"{folds.digest[:12]})"
    )
    page = folds._repr_html_()
    assert f"<td>1</td><td>{folds.sizes[1]}</td><td>{folds.sizes[0]}</td>" in page


def of_domains(domains: dict[str, int], *, groups: int = 6) -> Samples:
    """So many rows of each domain, on `groups` slides of its own, with both classes on each."""
    place = [(domain, f"{domain} {row % groups}") for domain, n in domains.items() for row in range(n)]
    return make_samples(
        [f"{row:03}.png" for row in range(len(place))],
        [int(row % 3 == 0) for row in range(len(place))],
        group=[group for _, group in place],
        domain=[domain for domain, _ in place],
        sha256=[f"{row}" for row in range(len(place))],
    )


def changed(samples: Samples, column: str, row: int, value: str | int) -> Samples:
    cells = getattr(samples, column).astype(object)
    cells[row] = value
    return replace(samples, **{column: cells.astype(np.int8 if column == "label" else np.str_)})


def test_every_domain_is_a_fold_of_its_name():
    samples = of_domains({"Oslo": 30, "Bern": 60, "Rome": 18})
    folds = domain_folds(samples)
    assert (folds.names, folds.n_folds, folds.sizes) == (("Bern", "Oslo", "Rome"), 3, [60, 30, 18])
    assert np.array(folds.names)[folds.fold].tolist() == samples.domain.tolist()
    assert folds.inner is folds.fold
    shuffled = np.random.RandomState(1).permutation(len(samples))
    assert domain_folds(samples.select(shuffled)).digest == folds.digest
    assert "<td>Rome</td><td>18</td><td>90</td>" in folds._repr_html_()


def test_of_two_domains_each_has_parts_of_whole_groups_for_what_is_chosen_in_it():
    samples = of_domains({"Oslo": 60, "Bern": 60, "Rome": 60})
    two = samples.select(samples.domain != "Rome")
    folds = domain_folds(two)
    parts = {(fold, part) for fold, part in zip(folds.fold.tolist(), folds.inner.tolist(), strict=True)}
    assert parts == {(0, 2), (0, 3), (0, 4), (0, 5), (1, 6), (1, 7), (1, 8), (1, 9)}
    for group in np.unique(two.group):
        assert len(set(folds.inner[two.group == group].tolist())) == 1
    other = domain_folds(two, seed=3)
    assert (other.inner != folds.inner).any()
    assert other.digest == folds.digest


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (changed(of_domains({"a": 12, "b": 12}), "group", 15, "a 3"), r"the group a 3 lies in two domains, a \(003"),
        (changed(of_domains({"a": 12, "b": 12}), "sha256", 15, "3"), r"identical patches lie in two .* b \(015.png\)"),
        (changed(of_domains({"a": 12, "b": 12}), "domain", 7, ""), r"1 of 24 training patches have no .*: 007.png\)"),
        (of_domains({"a": 12}), r"all training patches are of a\. Expected two domains or more.*`cv`"),
        (of_domains({"a": 12, "b": 1}), r"b has no training patch of the class 0 \(label 0\)"),
    ],
)
def test_domains_that_cannot_be_folds_are_refused_by_name(samples, message):
    with pytest.raises(UserError, match=message):
        domain_folds(samples)


def test_of_several_classes_every_fold_of_domains_trains_on_all():
    samples = of_domains({"a": 12, "b": 12, "c": 12})
    one, both = (changed(samples, "label", row, 2) for row in (0, 13))
    both = changed(both, "label", 0, 2)
    assert domain_folds(both, classes=("x", "y", "z")).n_folds == 3
    with pytest.raises(UserError, match=r"all but a has no training patch of the class z .* must train on it"):
        domain_folds(one, classes=("x", "y", "z"))
