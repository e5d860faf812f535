"""Is a learning curve fair: whole slides, nested subsets, choices within them, and at its end the run itself?"""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from features.console import UserError
from features.folds import Folds, effective_groups, grouped_folds
from features.samples import Samples, make_samples
from features.store import FeatureStore
from probe.cli import app
from probe.curve import (
    DRAWS,
    CurvePoint,
    curve_csv,
    draw_subsets,
    parse_fractions,
    read_curve,
    summarise,
)
from probe.linear import fit_exact
from probe.logistic import fit_logistic
from probe.metrics import balanced_log_loss
from probe.probing import ProbeOptions, probe_store
from probe.report.terminal import curve_tables
from probe.runs import read_run

WIDTH = 8
N_FOLDS = 4
LEFT_OUT = [(f,) for f in range(N_FOLDS)] + list(combinations(range(N_FOLDS), 2))
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)


def probed(*arguments, **options) -> list[Path]:
    """Probe a store; return the folders of the runs."""
    return [run.folder for run in probe_store(*arguments, **options)]


def table(n: int = 240, seed: int = 0, split: bool = False, slides: int = 40) -> Samples:
    rng = np.random.default_rng(seed)
    slide = np.sort(rng.integers(0, slides, n))
    return make_samples(
        [f"{seed}-{row:03}.png" for row in range(n)],
        (rng.random(n) < 0.4).astype(int).tolist(),
        group=[f"slide {seed}.{s}" for s in slide],
        split=["test" if split and s % 4 == 0 else "train" for s in slide],
        sha256=[f"{seed}-{row}" for row in range(n)],
    )


def embeddings(samples: Samples, signal: float = 0.5, seed: int = 0) -> np.ndarray:
    X = np.random.default_rng(seed).standard_normal((len(samples), WIDTH))
    return (X + signal * samples.label[:, None]).astype(np.float32)


def cut(samples: Samples) -> tuple[Folds, np.ndarray]:
    return grouped_folds(samples, N_FOLDS), effective_groups(samples)


def subsets_of(samples: Samples, fractions: tuple[float, ...], seed: int = 42):
    folds, slide = cut(samples)
    return draw_subsets(samples.label, folds.fold, slide, left_out=LEFT_OUT, fractions=fractions, seed=seed)


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    for dataset, samples in (("own", table(split=True)), ("other", table(120, seed=1))):
        store.put_samples(dataset, samples, attrs={})
        for model, signal in (("good", 0.9), ("poor", 0.2)):
            writer = store.begin(
                dataset, model=model, view="full", poolings={"cls": WIDTH}, card_pooling="cls", parts={"m": model}
            )
            X = embeddings(samples, signal, seed=len(samples))
            for rows in writer.missing():
                writer.write(rows, {"cls": X[rows.start : rows.stop]})
    return store


OPTIONS = ProbeOptions(cv=N_FOLDS, train="own", fractions=(0.3, 1.0))


def test_a_fraction_takes_whole_slides_rounded_up():
    samples = table()
    folds, slide = cut(samples)
    for subset in subsets_of(samples, (0.25, 0.5)):
        for mask, n_slides, held in zip(subset.masks, subset.n_slides, LEFT_OUT, strict=True):
            left = ~np.isin(folds.fold, held)
            assert n_slides == len(np.unique(slide[mask])) == math.ceil(subset.fraction * len(np.unique(slide[left])))
            assert not (mask & ~left).any()
            np.testing.assert_array_equal(mask, left & np.isin(slide, slide[mask]))


def test_subsets_of_a_draw_are_nested_and_draws_differ():
    samples = table()
    by = {(subset.fraction, subset.draw): subset for subset in subsets_of(samples, (0.25, 0.5, 1.0))}
    assert set(by) == {(q, draw) for q in (0.25, 0.5) for draw in range(DRAWS)} | {(1.0, 0)}
    for draw in range(DRAWS):
        assert not (by[0.25, draw].masks & ~by[0.5, draw].masks).any()
        assert not (by[0.5, draw].masks & ~by[1.0, 0].masks).any()
    assert (by[0.25, 0].masks != by[0.25, 1].masks).any()


def test_every_fit_of_a_draw_takes_the_slides_in_the_same_order():
    samples = table()
    folds, slide = cut(samples)
    for subset in subsets_of(samples, (0.5,)):
        for m, (f, g) in enumerate(LEFT_OUT[N_FOLDS:], start=N_FOLDS):
            # What both leave is a start of the same order, so one lies within the other.
            one = set(slide[subset.masks[f] & (folds.fold != g)])
            both = set(slide[subset.masks[m]])
            assert one <= both or both <= one


def test_the_order_of_rows_and_nothing_but_the_seed_changes_no_subset():
    samples = table()
    order = np.random.default_rng(5).permutation(len(samples))
    (first, *_), (again, *_) = subsets_of(samples, (0.3,)), subsets_of(samples.select(order), (0.3,))
    np.testing.assert_array_equal(first.masks[0][order], again.masks[0])
    (other, *_) = subsets_of(samples, (0.3,), seed=7)
    assert (other.masks[0] != first.masks[0]).any()


def test_identical_patches_stay_together_and_patches_without_a_slide_count_alone():
    n = 120
    samples = make_samples(
        [f"{row:03}" for row in range(n)],
        [row % 2 for row in range(n)],
        sha256=[str(row // 4) if row < 80 else str(row) for row in range(n)],
    )
    for subset in subsets_of(samples, (0.5,)):
        mask = subset.masks[0]
        assert all(len(set(mask[first : first + 4])) == 1 for first in range(0, 80, 4))
        assert subset.n_slides[0] == mask[:80].sum() / 4 + mask[80:].sum()


def test_a_share_is_taken_exactly():
    label, fold, slide = np.arange(400) % 2, np.arange(400) // 2 % 4, np.arange(400) // 2
    (subset, *_) = draw_subsets(label, fold, slide, left_out=LEFT_OUT, fractions=(0.14,), seed=0)
    assert list(subset.n_slides) == [21] * 4 + [14] * 6  # .14 of 150 and 100; floating point makes it 22 and 15


def test_all_slides_are_the_runs_own_fit():
    samples = table()
    folds, _ = cut(samples)
    X = embeddings(samples)
    (subset,) = subsets_of(samples, (1.0,))
    whole = fit_exact(X, samples.label, folds=folds, strengths=STRENGTHS)
    again = fit_exact(X, samples.label, folds=folds, subset=subset, strengths=STRENGTHS)
    # Where a copy of the same rows lies in memory decides how products are cut up, so their last digits.
    rounded = {"max_gradient": None, "inner_loss": None}
    assert replace(again.fit, **rounded) == replace(whole.fit, **rounded)
    np.testing.assert_allclose(again.fit.inner_loss, whole.fit.inner_loss, rtol=0, atol=1e-4)
    assert again.fit.n_not_converged == 0
    # Both end where no component of the mean loss's gradient exceeds 1e-6. Along the direction of the difference the
    # loss curves by 1 / (C n) or more, so in standardised features, of spread 1 here, solutions are as near as this.
    n_trained = len(samples) * (N_FOLDS - 1) / N_FOLDS
    within = 2 * 1e-6 * math.sqrt(WIDTH + 1) * n_trained * np.array(whole.fit.chosen_strength)
    assert within.max() < 1e-2
    for fold, bound in enumerate(within):
        np.testing.assert_allclose(again.coef[fold], whole.coef[fold], rtol=0, atol=2 * bound)


def test_the_strength_is_chosen_on_the_subsets_labels_alone():
    samples = table()
    folds, _ = cut(samples)
    X, y = embeddings(samples), samples.label
    for subset in subsets_of(samples, (0.4,)):
        probe = fit_exact(X, y, folds=folds, subset=subset, strengths=STRENGTHS)
        for f in range(N_FOLDS):
            losses = np.zeros(len(STRENGTHS))
            for g in set(range(N_FOLDS)) - {f}:
                held = subset.masks[f] & (folds.fold == g)
                if len(set(y[held])) == 2:
                    inner = subset.masks[LEFT_OUT.index((min(f, g), max(f, g)))]
                    fit = fit_logistic(X, y, masks=inner[None], strengths=STRENGTHS)
                    losses += balanced_log_loss(y[held], fit.logits[held, 0])
            assert probe.fit.chosen_strength[f] == STRENGTHS[int(losses.argmin())]
            # The model is the fit on all of the fold's subset, at that strength.
            fit = fit_logistic(X, y, masks=subset.masks[f][None], strengths=[STRENGTHS[int(losses.argmin())]])
            np.testing.assert_allclose(probe.coef[f], fit.coef[0, 0], atol=1e-3)


def test_at_fraction_1_the_curve_is_the_run(store, tmp_path):
    for folder in probed(store, options=OPTIONS, runs=tmp_path / "runs"):
        run, points = read_run(folder), read_curve(folder)
        chosen = run.candidates[0].chosen_strength
        for name, figures in run.figures.sets.items():
            last = [p for p in points if f"{p.dataset}/{p.split}" == name and p.fraction == 1]
            assert [p.fold for p in last] == list(range(N_FOLDS))
            assert tuple(p.strength for p in last) == chosen
            for figure in ("balanced_accuracy", "auroc"):
                assert [getattr(p, figure) for p in last] == list(figures.folds[figure].each)
            (summary,) = [s for s in summarise(points) if f"{s.dataset}/{s.split}" == name and s.fraction == 1]
            assert (summary.auroc, summary.auroc_std) == (figures.folds["auroc"].mean, figures.folds["auroc"].std)


def test_all_models_train_on_the_same_slides_and_more_of_them_help(store, tmp_path):
    good, poor = map(read_curve, probed(store, ["good", "poor"], options=OPTIONS, runs=tmp_path / "runs"))

    def trained_on(points):
        return [(p.fraction, p.draw, p.fold, p.n_slides, p.n_patches, p.n_positive) for p in points]

    assert trained_on(good) == trained_on(poor)
    assert len(good) == (DRAWS + 1) * N_FOLDS * 3  # validation, own test split, the other dataset
    few, many = (s for s in summarise(good) if s.dataset == "other")
    assert few.auroc < many.auroc
    assert (few.n_models, many.n_models) == (DRAWS * N_FOLDS, N_FOLDS)
    assert few.n_slides < many.n_slides


def test_a_curve_changes_nothing_of_its_run(store, tmp_path):
    (plain,) = probed(store, ["good"], options=ProbeOptions(cv=N_FOLDS, train="own"), runs=tmp_path / "plain")
    (curved,) = probed(store, ["good"], options=OPTIONS, runs=tmp_path / "curved")
    for name in ("predictions.csv", "metrics.json", "weights.safetensors"):
        assert (plain / name).read_bytes() == (curved / name).read_bytes()
    assert read_curve(plain) == ()
    assert read_run(plain).options["fractions"] == []
    assert read_run(curved).options["fractions"] == [0.3, 1.0]
    assert read_run(curved).learning_curve.n_not_converged == 0


def test_fractions_are_read_distinct_and_ascending():
    assert parse_fractions("1, .25,0.1,,0.25") == (0.1, 0.25, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.1,half", r"could not convert.* 'half'.*such as"),
        ("", r"names none"),
        ("0,0.5", r"0 is no share.*more than 0 and at most 1"),
        ("25", r"25 is no share"),
        ("nan", r"nan is no share"),
    ],
)
def test_a_fraction_that_is_none_gets_one_clear_message(text, message):
    with pytest.raises(UserError, match=message):
        parse_fractions(text)


def test_a_fraction_too_small_names_the_smallest_that_works():
    samples = table()
    with pytest.raises(UserError, match=r"0.01 is too small\. With fold.* held out it leaves 1 of \d+ slides") as error:
        subsets_of(samples, (0.01, 0.5))
    thousandths = round(float(str(error.value).rstrip(".").split()[-1]) * 1000)
    assert len(subsets_of(samples, (thousandths / 1000,))) == DRAWS
    with pytest.raises(UserError, match=f"is too small.*works is {thousandths / 1000:g}"):
        subsets_of(samples, ((thousandths - 1) / 1000,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "paper", "fractions": (0.5,)}, r"`fractions` needs `recipe='exact'`"),
        ({"cv": 2, "fractions": (0.5,)}, r"at least 3 folds"),
        ({"fractions": (1.5,)}, r"1.5 is no share"),
        ({"fractions": (0.001,)}, r"0.001 is too small"),
    ],
)
def test_nothing_is_fitted_before_a_mistake_is_told(store, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        probed(store, options=ProbeOptions(train="own", **options), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def points(*, auroc: float = 0.75) -> list[CurvePoint]:
    subsets = [(0.25, 0), (0.25, 1), (1.0, 0)]
    return [
        CurvePoint(q, draw, fold, int(8 * q), int(80 * q), int(20 * q), 1e-3, "own", split, 0.5 + fold / 10, auroc)
        for q, draw in subsets
        for fold in range(3)
        for split in ("validation", "test")
    ]


@pytest.mark.parametrize("auroc", [1 / 3, math.nan])
def test_what_is_written_is_read_back(tmp_path, auroc):
    written = points(auroc=auroc)
    (tmp_path / "learning_curve.csv").write_bytes(curve_csv(written[::-1]))
    read = read_curve(tmp_path)
    assert sorted(map(repr, read)) == sorted(map(repr, written))
    assert read_curve(tmp_path / "elsewhere") == ()


def test_a_summary_is_the_mean_and_spread_over_folds_and_draws():
    few, many = (summary for summary in summarise(points()) if summary.split == "test")
    assert (few.fraction, few.n_models, few.n_slides, few.n_patches, few.n_positive) == (0.25, 6, 2, 20, 5)
    assert few.balanced_accuracy == pytest.approx(0.6)
    assert few.balanced_accuracy_std == pytest.approx(np.std([0.5, 0.6, 0.7]))
    assert (many.n_models, many.auroc, many.auroc_std) == (3, 0.75, 0.0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("n_slides", "slides"), r"found columns .*slides.*, expected fraction, draw"),
        (lambda text: "", r"found columns none"),
        (lambda text: text[:-30], r"damaged"),
        (lambda text: text.replace("0.75", "7.5", 1), r"line 2: auroc is 7.5"),
        (lambda text: text.replace("0.75", "o.75", 1), r"line 2: .*o.75"),
        (lambda text: text.replace("0.25,0,0,2,20,5", "0.25,0,0,2,20,20", 1), r"line 2: n_positive is 20"),
        (lambda text: text.replace("0.25,0", "1.25,0", 1), r"line 2: fraction is 1.25"),
    ],
)
def test_a_damaged_curve_is_named(tmp_path, damage, message):
    path = tmp_path / "learning_curve.csv"
    path.write_text(damage(curve_csv(points()).decode()))
    with pytest.raises(UserError, match=message) as error:
        read_curve(tmp_path)
    assert str(path) in str(error.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="damaged"):
        read_curve(tmp_path)


def test_a_curve_other_than_the_one_that_the_run_wrote_is_refused(store, tmp_path):
    (folder,) = probed(store, ["good"], options=OPTIONS, runs=tmp_path / "runs")
    path = folder / "learning_curve.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"learning_curve.csv is not the file that the run wrote"):
        read_curve(folder)


def test_tables_lay_models_beside_each_other_per_set():
    tables = curve_tables({"a": points(), "none": (), "b": points(auroc=math.nan)})
    assert ["own/validation" in str(table.title) for table in tables] == [True, False]
    cells = [list(column.cells) for column in tables[0].columns]
    assert cells[0] == ["a", "", "b", ""]
    assert cells[1] == ["0.25", "1"] * 2
    assert cells[4] == ["0.7500 ± 0.0000"] * 2 + ["–"] * 2


def test_the_command_shows_a_curve_and_speaks_json(store, tmp_path):
    arguments = ["--store", str(store.path), "--runs", str(tmp_path / "runs"), "--train", "own", "--cv", "4"]
    shown = CliRunner().invoke(app, [*arguments, "--fractions", "0.3,1", "--model", "good"])
    assert shown.exit_code == 0, shown.output
    assert "Learning curve, own/validation" in shown.stdout
    assert "good (full, card)" in shown.stdout
    told = CliRunner().invoke(app, [*arguments, "--fractions", "1", "--model", "good", "--json"])
    (record,) = json.loads(told.stdout)["results"]
    assert [s["fraction"] for s in record["learning_curve"]["sets"]] == [1.0] * 3
