"""Does each measure of an embedding say what its definition says, and only where it can?"""

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    adjusted_rand_score,
    average_precision_score,
    balanced_accuracy_score,
    normalized_mutual_info_score,
    roc_auc_score,
)
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

from features.console import UserError
from features.folds import effective_groups
from features.samples import Samples, make_samples
from features.store import FeatureStore
from finetune.report import make_report
from probe import measures as measuring
from probe.cli import app
from probe.clusterings import agreement
from probe.fewshot import draw_shots, few_shot, possible_shots
from probe.measure_records import MEASURES, Measured, MeasureRecord, newest_figures, read_measures, write_measures
from probe.measure_sets import patch_set
from probe.measures import class_means, measure_store
from probe.neighbours import (
    class_shares,
    mutual_neighbours,
    nearest,
    neighbours,
    precision_at,
    unit_vectors,
)
from probe.probing import ProbeOptions, probe_store
from probe.report.measures import tabulate, terminal_tables
from probe.resample import Resampling, make_clusters
from probe.robustness import (
    balanced_margin,
    balanced_robustness,
    draw_balanced,
    median_margin,
    robustness_counts,
    robustness_index,
    robustness_margins,
    robustness_of_chance,
    weighted_medians,
)
from probe.similarity import linear_cka, self_similarity

WIDTH = 10


def drawn(n: int, seed: int = 0, *, signal: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings with the class in a direction and the slide in the others, labels, and slides of unequal sizes."""
    rng = np.random.default_rng(seed)
    group = np.sort((12 * rng.random(n) ** 2).astype(int))
    group = np.unique(group, return_inverse=True)[1]
    label = rng.integers(0, 3, n) // 2
    X = rng.standard_normal((n, WIDTH)) + 0.5 * rng.standard_normal((12, WIDTH))[group]
    X[:, 0] += signal * label
    return X.astype(np.float32), label, group


# ---------------------------------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("k", [1, 5, 11])
def test_shares_of_nearest_neighbours_are_those_of_scikit_learn(k):
    X, label, _ = drawn(90)
    asked, _, _ = drawn(40, seed=1)
    shares = class_shares(label[nearest(unit_vectors(asked), unit_vectors(X), 11)], k, 2)
    expected = KNeighborsClassifier(k, metric="cosine").fit(X, label).predict_proba(asked)
    np.testing.assert_allclose(shares, expected)


def test_neighbours_within_a_set_in_blocks_are_those_of_a_loop(monkeypatch):
    """Never the patch itself; of `apart` none of its slide, and of its ranking the average precision."""
    monkeypatch.setattr("probe.neighbours._BLOCK", 7 * 60)  # of 60 patches 7 at a time
    X, label, group = drawn(60)
    found = neighbours(unit_vectors(X), group, label, most=6)
    cosine = (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float64)
    cosine = cosine @ cosine.T
    for row in range(60):
        others = np.delete(np.arange(60), row)
        assert found.any[row].tolist() == others[np.argsort(-cosine[row, others])][:6].tolist()
        apart = np.flatnonzero(group != group[row])
        assert found.apart[row].tolist() == apart[np.argsort(-cosine[row, apart])][:6].tolist()
        expected = average_precision_score(label[apart] == label[row], cosine[row, apart])
        assert found.average_precision[row] == pytest.approx(expected)
    share = [np.mean(label[found.apart[row, :5]] == label[row]) for row in range(60)]
    np.testing.assert_allclose(precision_at(label, found.apart, 5), share)


def test_a_set_of_one_slide_has_no_neighbours_apart_and_few_where_a_slide_has_nearly_all():
    X, label, _ = drawn(9)
    found = neighbours(unit_vectors(X), np.zeros(9, int), label, most=3)
    assert (found.any.shape, found.apart.shape) == ((9, 3), (9, 0))
    found = neighbours(unit_vectors(X), np.array([0] * 7 + [1, 2]), label, most=5)
    assert (found.any.shape, found.apart.shape) == ((9, 5), (9, 2))
    assert set(found.apart[0].tolist()) == {7, 8}


def test_a_class_on_one_slide_alone_has_no_average_precision():
    X, _, group = drawn(30)
    label = (group == group[0]).astype(int)
    precision = neighbours(unit_vectors(X), group, label, most=3).average_precision
    assert (np.isnan(precision) == (label == 1)).all()
    means = class_means({"ap": precision}, label, make_clusters(group.astype(str)))
    clusters = means.table.shape[0]
    assert means(np.ones((1, clusters)))["ap"][0] == pytest.approx(precision[label == 0].mean())


def test_the_robustness_index_worked_out_by_hand():
    """Six patches, two classes, laboratories 0 and 1; the last one's laboratory is not known."""
    label = np.array([0, 0, 1, 1, 0, 1])
    laboratory = np.array([0, 1, 0, 1, 0, -1])
    two_nearest = np.array([[1, 2], [0, 3], [0, 3], [4, 5], [0, 2], [2, 3]])
    # 0: patch 1 is of its class elsewhere (SO), 2 of another class from its laboratory (OS). 1: SO and OS. 2: OS, SO.
    # 3: 4 is of another class and laboratory, 5 unknown. 4: 0 is of both, 2 is OS. 5: unknown itself.
    counts = robustness_counts(two_nearest, label, laboratory)
    assert counts.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0], [0, 1], [0, 0]]
    assert counts[:, 0].sum() / counts.sum() == pytest.approx(3 / 7)


def on_a_circle(degrees: list[int]) -> torch.Tensor:
    return torch.tensor([[np.cos(np.deg2rad(a)), np.sin(np.deg2rad(a))] for a in degrees], dtype=torch.float32)


def test_the_balanced_robustness_index_worked_out_by_hand(monkeypatch):
    """Two patches of each class from each laboratory, on a circle, each on a slide of its own."""
    monkeypatch.setattr("probe.robustness.FEW", 2)
    label = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    laboratory = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    embeddings, slide = on_a_circle([0, 10, 25, 100, 111, 135, 180, 200]), np.arange(8)
    drawn = draw_balanced(label, laboratory, draws=1, seed=0)
    assert [rows.tolist() for rows in drawn[0]] == [list(range(8))]
    # The two nearest to 0 are 1 (its class elsewhere, SO) and 2 (another class from its laboratory, OS); to 1: 0 (SO)
    # and 2 (neither); to 2: 1 (neither) and 0 (OS); to 3: 4 (neither) and 5 (OS); to 4: 3 (neither) and 5 (SO); to 5:
    # 4 (SO) and 3 (OS); to 6: 7 (SO) and 5 (neither); to 7: 6 (SO) and 5 (OS).
    counts = balanced_robustness(embeddings, slide, label, laboratory, drawn)[:, 0]
    assert counts.tolist() == [[1, 1], [1, 0], [0, 1], [0, 1], [1, 0], [1, 1], [1, 0], [1, 1]]
    clusters = make_clusters(slide.astype(str))
    index = robustness_index("balanced domain", counts[:, None], clusters)
    assert index(np.ones((1, 8)))["balanced domain"][0] == pytest.approx(6 / 11)
    # 0 and 1 from one slide are no neighbours: 0 then has 2 (OS) and 3 (neither), 1 has 2 (neither) and 3 (OS).
    together = np.array([0, 0, 2, 3, 4, 5, 6, 7])
    counts = balanced_robustness(embeddings, together, label, laboratory, drawn)[:, 0]
    assert counts.tolist()[:2] == [[0, 1], [0, 1]]
    # The mean over draws, not the index of their sums: 6 / 11 and, of a draw in which two patches alone count, 1 / 2.
    two = np.stack([counts * 0, counts * 0], axis=1)
    two[:, 0] = [[1, 1], [1, 0], [0, 1], [0, 1], [1, 0], [1, 1], [1, 0], [1, 1]]
    two[:2, 1] = [[1, 0], [0, 1]]
    mean = robustness_index("balanced domain", two, clusters)(np.ones((1, 8)))["balanced domain"][0]
    assert mean == pytest.approx((6 / 11 + 1 / 2) / 2)


def test_the_margin_worked_out_by_hand(monkeypatch):
    """Distances on a circle are one less the cosine; of each kind the two nearest count."""
    monkeypatch.setattr("probe.robustness._MARGIN_OF", 2)
    label = np.array([0, 0, 0, 1, 1, 1, 0])
    laboratory = np.array([0, 1, 1, 0, 0, 1, -1])
    embeddings, slide = on_a_circle([0, 10, 60, 20, 90, 50, 5]), np.arange(7)
    margin = robustness_margins(embeddings, slide, label, laboratory)
    # 0: of its class elsewhere 1 and 2, of the other class from its laboratory 3 and 4.
    so, os = (np.mean(1 - np.cos(np.deg2rad(degrees))) for degrees in ([10, 60], [20, 90]))
    assert margin[0] == pytest.approx((os - so) / (os + so), abs=1e-6)
    # 1 and 2 have one patch of their class elsewhere, 3 and 4 one of theirs; 5 has one of the other class from its
    # laboratory if 2 is from its slide; of 6 the laboratory is not known.
    assert np.isnan(margin[[1, 2, 3, 4, 6]]).all()
    assert np.isfinite(margin[5])
    assert np.isnan(robustness_margins(embeddings, np.array([0, 1, 2, 3, 4, 2, 6]), label, laboratory)[5])


def test_a_median_of_resampled_patches_is_that_of_the_patches_repeated():
    rng = np.random.default_rng(0)
    values, count = rng.integers(0, 9, 23) / 4, rng.integers(0, 4, (50, 23))
    count[3] = 0
    found = weighted_medians(values, count.astype(float))
    assert np.isnan(found[3])
    for j in set(range(50)) - {3}:
        assert found[j] == np.median(np.repeat(values, count[j]))


def test_a_margin_is_the_mean_over_draws_of_medians_over_sets():
    rng = np.random.default_rng(1)
    sets = [[(rng.integers(0, 6, n), rng.standard_normal(n)) for n in (7, 8, 9)] for _ in range(2)]
    sets[0][0][1][2] = np.nan
    (statistic,) = median_margin("margin domain", sets)
    count = np.array([[1.0, 1, 1, 1, 1, 1], [2, 0, 1, 0, 3, 1]])
    for j, weight in enumerate(count.astype(int)):
        medians = [[np.nanmedian(np.repeat(of, weight[cluster])) for cluster, of in one] for one in sets]
        expected = np.mean([np.median(one) for one in medians])
        assert statistic(count)["margin domain"][j] == pytest.approx(expected)
    assert np.isnan(statistic(np.zeros((1, 6)))["margin domain"]).all()
    assert median_margin("margin domain", [[(np.arange(3), np.full(3, np.nan))], []]) == []


def test_balanced_sets_are_of_two_classes_and_two_laboratories_in_equal_parts(monkeypatch):
    label = np.array([0] * 40 + [1] * 60 + [0] * 30 + [1] * 12 + [0] * 25 + [1] * 9 + [0] * 5)
    laboratory = np.array([0] * 100 + [1] * 42 + [2] * 34 + [-1] * 5)
    drawn = draw_balanced(label, laboratory, draws=4, seed=3)
    for sets in drawn:
        (rows,) = sets  # laboratory 2 has nine of class 1: too few for ten neighbours
        cells = np.array([label[rows], laboratory[rows]])
        assert np.unique(cells, axis=1, return_counts=True)[1].tolist() == [12] * 4
        assert len(np.unique(rows)) == 48
    assert len({tuple(sets[0].tolist()) for sets in drawn}) == 4
    again = draw_balanced(label, laboratory, draws=4, seed=3)
    assert all((a == b).all() for (a,), (b,) in zip(drawn, again, strict=True))
    three = draw_balanced(np.tile([0, 1, 2], 90), np.repeat([0, 1, 2], 90), draws=1, seed=0)
    assert len(three[0]) == 3 * 3
    monkeypatch.setattr("probe.robustness._MOST_SETS", 4)
    monkeypatch.setattr("probe.robustness._MOST", 11)
    three = draw_balanced(np.tile([0, 1, 2], 90), np.repeat([0, 1, 2], 90), draws=2, seed=0)
    assert [[len(rows) for rows in sets] for sets in three] == [[44] * 4] * 2
    assert draw_balanced(label, np.zeros_like(label), draws=2, seed=0) == [[], []]


def test_a_balanced_index_is_that_of_croma_for_pairs_of_classes_and_centres():
    """https://github.com/clemsgrs/croma: the design `paired_2x2`."""
    croma, pandas = pytest.importorskip("croma"), pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    label, laboratory, slide = rng.integers(0, 2, 150), rng.integers(0, 3, 150), rng.integers(0, 40, 150)
    X = rng.standard_normal((150, 6)) + 0.8 * label[:, None] + 0.5 * np.eye(6)[laboratory]
    drawn = draw_balanced(label, laboratory, draws=1, seed=0)
    counts = balanced_robustness(unit_vectors(X), slide, label, laboratory, drawn).sum(axis=(0, 1))
    assert len(drawn[0]) == 3
    rows = np.concatenate(drawn[0])
    manifest = pandas.DataFrame(
        {
            "sample_id": [f"{k}" for k in range(len(rows))],
            "image_path": "",
            "label": label[rows].astype(str),
            "group_id": slide[rows].astype(str),
            "center": laboratory[rows].astype(str),
            "subset": np.repeat(["a", "b", "c"], [len(one) for one in drawn[0]]),
        }
    )
    theirs = croma.RI.compute_curve(
        X[rows], manifest, confounder_column="center", k_values=[10], evaluation_design="paired_2x2"
    )
    assert counts[0] / counts.sum() == pytest.approx(theirs[10], abs=1e-12)

    clusters = make_clusters(slide.astype(str))
    where = (unit_vectors(X), slide, label, laboratory)
    (statistic,) = balanced_margin("margin", *where, drawn, clusters)
    theirs = croma.CRoMa.compute(X[rows], manifest, confounder_column="center", evaluation_design="paired_2x2")
    assert statistic(np.ones((1, clusters.n)))["margin"][0] == pytest.approx(theirs.value, abs=1e-6)
    margin = robustness_margins(*where)
    manifest = pandas.DataFrame(
        {
            "sample_id": [f"{k}" for k in range(150)],
            "image_path": "",
            "label": label.astype(str),
            "group_id": slide.astype(str),
            "center": laboratory.astype(str),
        }
    )
    theirs = croma.CRoMa.compute(X, manifest, confounder_column="center")
    np.testing.assert_allclose(margin, theirs.sample_values_aligned, atol=1e-6)


def test_the_index_of_chance_is_that_of_all_pairs():
    _, label, group = drawn(80)
    domain = group % 3
    table = make_samples(
        [f"{k}" for k in range(80)],
        label.tolist(),
        sha256=[""] * 80,
        group=[f"s{g}" for g in group],
        domain=["" if d == 2 else f"d{d}" for d in domain],
    )
    of = patch_set("mine", "test", table, np.arange(80))
    assert of.confounded_by == "domain"
    others = np.array([np.delete(np.arange(80), row) for row in range(80)])
    counts = robustness_counts(others, of.label, of.confounder).sum(axis=0)
    assert robustness_of_chance(of.label, of.confounder) == pytest.approx(counts[0] / counts.sum())
    without = patch_set("mine", "test", replace(table, domain=np.full(80, "")), np.arange(80))
    assert without.confounded_by == "slide"


def test_of_a_large_set_the_same_patches_are_measured_each_time(monkeypatch, capsys):
    monkeypatch.setattr("probe.measure_sets._MOST", 10)
    one, again = (patch_set("mine", "test", table(40, 0), np.arange(3, 40)) for _ in range(2))
    assert len(one.samples) == 10
    assert one.rows.tolist() == again.rows.tolist() == sorted(set(one.rows.tolist()))
    assert one.samples.id.tolist() == table(40, 0).id[one.rows].tolist()
    assert "mine: 10 of 37 test patches are measured" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- few labelled patches


def test_drawn_patches_are_of_different_slides_as_long_as_there_are_any():
    label = np.array([0] * 9 + [1] * 5)
    group = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2, 0, 0, 3, 3, 3])
    rows = draw_shots(label, group, n_classes=2, shots=5, draws=200, seed=3)
    for draw in rows:
        for k, n_slides in enumerate((3, 2)):
            assert (label[draw[k]] == k).all()
            assert len(set(draw[k].tolist())) == 5
            for m in range(1, 6):  # any first m of a draw are a draw of m
                assert len(set(group[draw[k, :m]].tolist())) == min(m, n_slides)
    # Slides count alike whatever they hold, and so do the patches of a slide.
    first = np.bincount(group[rows[:, 0, 0]], minlength=3) / 200
    assert np.abs(first - 1 / 3).max() < 5 * np.sqrt(2 / 9 / 200)
    assert set(rows[:, 0, 0].tolist()) == set(range(9))
    assert possible_shots(label, 2) == [1, 2, 4]


def test_few_shots_are_nearest_class_means_of_a_loop():
    X, label, group = drawn(70, signal=2.0)
    Z, asked, _ = drawn(31, seed=1, signal=2.0)
    rows = draw_shots(label, group, n_classes=2, shots=4, draws=6, seed=0)
    share, accuracy = few_shot(torch.from_numpy(X), torch.from_numpy(Z), asked, rows)
    centre = X.mean(axis=0)
    base, test = ((one - centre) / np.linalg.norm(one - centre, axis=1, keepdims=True) for one in (X, Z))
    said = []
    for draw in rows:
        means = np.stack([base[draw[k]].mean(axis=0) for k in (0, 1)])
        said.append(((test[:, None] - means) ** 2).sum(axis=2).argmin(axis=1))
    np.testing.assert_allclose(share, np.mean(np.array(said) == asked, axis=0))
    np.testing.assert_allclose(accuracy, [balanced_accuracy_score(asked, one) for one in said])


# ------------------------------------------------------------------------------------------- clusters and similarities


def test_agreement_of_groupings_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 3, 50), rng.integers(0, 4, 50)
    second[:20] = first[:20]
    of = np.array([2] * 10 + [0] * 10 + [1] * 30)  # a resample: some rows twice, some not at all
    tables = np.zeros((2, 3, 4))
    for k, weight in enumerate((np.ones(50), of)):
        np.add.at(tables[k], (first, second), weight)
    found = agreement(tables)
    for k, rows in enumerate((np.arange(50), np.repeat(np.arange(50), of))):
        assert found["ari"][k] == pytest.approx(adjusted_rand_score(first[rows], second[rows]))
        assert found["nmi"][k] == pytest.approx(normalized_mutual_info_score(first[rows], second[rows]))


@pytest.mark.parametrize("n", [8, 40])  # fewer patches than features, and more
def test_linear_cka_is_that_of_centred_gram_matrices(n):
    X, Y = (drawn(n, seed=seed)[0].astype(np.float64) for seed in (0, 1))
    Y = np.concatenate([Y[:, :4] + X[:, :4], Y], axis=1)
    H = np.eye(n) - 1 / n
    K, L = H @ X @ X.T @ H, H @ Y @ Y.T @ H
    expected = np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L))
    orders = [np.random.default_rng(seed).permutation(n) for seed in range(200)]
    shuffled = [np.trace(K @ L[order][:, order]) for order in orders] / np.sqrt(np.trace(K @ K) * np.trace(L @ L))
    X, Y = torch.from_numpy(X), torch.from_numpy(Y)
    found, chance = linear_cka(X, Y)
    assert found == pytest.approx(expected, rel=1e-9)
    assert abs(chance - shuffled.mean()) < 4 * shuffled.std() / np.sqrt(200)
    turned = torch.from_numpy(np.linalg.qr(np.random.default_rng(2).standard_normal((WIDTH, WIDTH)))[0])
    assert linear_cka(X, 3 * X @ turned + 1)[0] == pytest.approx(1, rel=1e-9)


def test_mutual_neighbours_are_those_of_sets():
    rng = np.random.default_rng(0)
    first, second = (np.stack([rng.permutation(9)[:4] for _ in range(20)]) for _ in range(2))
    expected = [len(set(a) & set(b)) / 4 for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    np.testing.assert_allclose(mutual_neighbours(first, second), expected)


def test_altered_patches_are_compared_with_their_own_and_with_others():
    X = drawn(25)[0]
    Y = X + 1.5 * np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
    own, found, others = self_similarity(torch.from_numpy(X), torch.from_numpy(Y))
    a, b = ((one - X.mean(axis=0)) for one in (X, Y))
    cosine = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    np.testing.assert_allclose(own, np.diag(cosine), atol=1e-5)
    assert found.tolist() == (cosine.argmax(axis=1) == np.arange(25)).tolist()
    assert 0 < found.mean() < 1
    assert others == pytest.approx((cosine.sum() - np.trace(cosine)) / (25 * 24), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- a store


def table(n: int, seed: int, *, domains: bool = True, groups: bool = True, test: bool = True) -> Samples:
    rng = np.random.default_rng(seed)
    slide = np.arange(n) // 8
    return make_samples(
        [f"{seed}-{row:03}.png" for row in range(n)],
        (rng.random(n) < 0.35).astype(int).tolist(),
        group=[f"{seed}: {s}" for s in slide] if groups else None,
        domain=[f"scanner {s % 2}" for s in slide] if domains else None,
        split=["test" if test and s % 3 == 0 else "train" for s in slide],
        sha256=[f"{seed}-{row}" for row in range(n)],
    )


def add(
    store: FeatureStore,
    dataset: str,
    samples: Samples,
    model: str,
    view: str,
    seed: int = 0,
    *,
    noise: float = 0.0,
    signal: float = 1.2,
    names: tuple[str, ...] = ("no", "yes"),
):
    store.put_samples(dataset, samples, attrs={"label_names": list(names)})
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((len(samples), WIDTH))
    X[:, :2] += signal * samples.label[:, None]
    X = X + noise * np.random.default_rng(99).standard_normal(X.shape)
    writer = store.begin(
        dataset, model=model, view=view, poolings={"cls": WIDTH}, card_pooling="cls", parts={"model": model}
    )
    for rows in writer.missing():
        writer.write(rows, {"cls": X[rows.start : rows.stop]})


@pytest.fixture
def store(tmp_path, monkeypatch) -> FeatureStore:
    """Two backbones, one of them on altered patches too; a training set with a test split, and a second test set."""
    monkeypatch.setattr(measuring, "DRAWS", 20)
    monkeypatch.setattr(measuring, "Resampling", partial(Resampling, replicates=200))
    store = FeatureStore.open_or_create(tmp_path / "store.zarr")
    own, other = table(120, 0), table(40, 1, domains=False, groups=False, test=False)
    for model, seed in (("one", 3), ("two", 4)):
        add(store, "mine", own, model, "full", seed)
        add(store, "other", other, model, "full", seed)
    add(store, "mine", own, "one", "full+blur", 3, noise=0.4)
    return store


def measured(store: FeatureStore, runs: Path, *names: str, models=None, **options) -> MeasureRecord:
    return measure_store(store, models, measures=names, options=ProbeOptions(train="mine", **options), runs=runs)


def test_all_measures_of_a_store_stand_in_one_file_that_is_read_back(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "NEIGHBOURS", (1, 5, 21))
    record = measured(store, tmp_path / "runs")
    assert {one.measure for one in record.figures} == set(MEASURES)
    assert {(one.dataset, one.split) for one in record.figures} == {
        ("mine", "train"),
        ("mine", "test"),
        ("other", "test"),
    }
    for one in record.figures:
        if one.low is not None:
            assert one.low <= one.value <= one.high
    found = {(one.measure, one.name, one.embedding, one.dataset, one.split): one for one in record.figures}

    # k is chosen on training patches by neighbours on other slides, and the test patches' neighbours are training ones.
    samples = store.samples("mine")
    train, test = (np.flatnonzero(samples.split == split) for split in ("train", "test"))
    X = store.read("mine", model="one", view="full").astype(np.float64)
    group, y = effective_groups(samples), samples.label

    def predicted(k: int, row: int, rows: np.ndarray) -> float:
        return KNeighborsClassifier(k, metric="cosine").fit(X[rows], y[rows]).predict_proba(X[row : row + 1])[0, -1]

    def judged(k: int) -> float:
        shares = [predicted(k, row, train[group[train] != group[row]]) for row in train]
        return balanced_accuracy_score(y[train], np.array(shares) > 0.5)

    chosen = record.embeddings[0].neighbours
    assert chosen == max((1, 5, 21), key=judged)
    shares = np.array([predicted(chosen, row, train) for row in test])
    one = found["knn", "auroc", "one (full, card)", "mine", "test"]
    assert one.value == pytest.approx(roc_auc_score(y[test], shares))
    assert (one.n, one.unit, one.n_clusters, one.chance) == (len(test), "slide", len(np.unique(group[test])), 0.5)
    accuracy = found["knn", "balanced_accuracy", "one (full, card)", "mine", "test"]
    assert accuracy.value == pytest.approx(balanced_accuracy_score(y[test], shares > 0.5))

    # Which confounder, which altered patches, which pairs.
    assert ("robustness", "index domain", "one (full, card)", "mine", "train") in found
    assert not any(key[0] == "robustness" and key[3] == "other" for key in found)
    balanced = found["robustness", "balanced domain", "one (full, card)", "mine", "train"]
    assert balanced.low < balanced.value < balanced.high
    assert balanced.chance == 0.5
    for name, chance in (("margin domain", None), ("balanced_margin domain", 0.0)):
        margin = found["robustness", name, "one (full, card)", "mine", "train"]
        assert -1 < margin.low < margin.value < margin.high < 1
        assert margin.chance == chance
    assert {key[2:4] for key in found if key[0] == "invariance"} == {("one (full, card)", "mine")}
    assert {key[2] for key in found if key[0] == "alignment"} == {"one (full, card) and two (full, card)"}
    assert found["alignment", "mutual", "one (full, card) and two (full, card)", "mine", "train"].n == len(train)

    # Robustness is of neighbours on other slides where domains confound; alignment of all neighbours.
    of = patch_set("mine", "train", samples, train)
    near = {
        model: neighbours(
            unit_vectors(store.read("mine", model=model, view="full", rows=train)), of.group, of.label, most=10
        )
        for model in ("one", "two")
    }
    speaks = robustness_counts(near["one"].apart, of.label, of.confounder).sum(axis=0)
    index = found["robustness", "index domain", "one (full, card)", "mine", "train"]
    assert index.value == pytest.approx(speaks[0] / speaks.sum())
    mutual = found["alignment", "mutual", "one (full, card) and two (full, card)", "mine", "train"]
    assert mutual.value == pytest.approx(mutual_neighbours(near["one"].any, near["two"].any).mean())
    precision = precision_at(of.label, near["one"].apart, 5)
    expected = np.mean([precision[of.label == k].mean() for k in (0, 1)])
    assert found["retrieval", "precision 5", "one (full, card)", "mine", "train"].value == pytest.approx(expected)

    shown = tabulate(record.figures)
    assert sum(one is not None for of in shown for row in of.rows.values() for one in row) == len(record.figures)
    retrieval = next(of for of in shown if of.title == MEASURES["retrieval"])
    assert retrieval.chances == (0.5,) * len(retrieval.columns)
    altered = next(of for of in shown if of.title == MEASURES["invariance"])
    assert altered.chances[0] == round(altered.rows["one (full, card)"][0].chance, 3)
    assert [one.columns[0] for one in terminal_tables(record)]
    assert "one (full, card)" in capsys.readouterr().err


def test_measures_say_what_changes_between_records_and_refuse_changed_files(store, tmp_path):
    first = measured(store, tmp_path / "runs", "retrieval", "knn", models=["one"])
    later = measured(store, tmp_path / "runs", "knn", models=["one"])
    assert {one.measure for one in later.figures} == {"knn"}
    early = replace(first, figures=tuple(replace(one, value=2.0) for one in first.figures))
    newest = newest_figures([later, early])
    assert len(newest) == len(first.figures)
    assert {(one.measure, one.value == 2) for one in newest} == {("knn", False), ("retrieval", True)}
    path = later.folder / "measures.json"
    path.write_text(path.read_text().replace('"value": 0.', '"value": 0.9', 1))
    with pytest.raises(UserError, match="is not as it was written"):
        read_measures(later.folder)
    path.write_text(json.dumps({"format": 2}))
    with pytest.raises(UserError, match="of format 2; this version reads format 1"):
        read_measures(later.folder)


def test_the_embedding_that_the_newest_probe_chose_is_measured(store, tmp_path):
    for name in ("mine", "other"):
        add(store, name, store.samples(name), "one", "center64", 5, signal=4)
    runs = tmp_path / "runs"

    def embedding(**options) -> Measured:
        return measured(store, runs, "clustering", models=["one"], **options).embeddings[0]

    assert embedding().label == "one (full, card)"
    probe_store(store, ["one"], options=ProbeOptions(cv=3, train="mine"), runs=runs)
    assert embedding().label == "one (center64, card)"
    assert "newest probe" in embedding().chosen
    probe_store(store, ["one"], options=ProbeOptions(cv=3, train="mine", view="full"), runs=runs)
    assert embedding().view == "center64"  # the one that was named was not chosen
    assert embedding(view="full").label == "one (full, card)"


def test_altered_views_are_no_candidates_of_a_probe_unless_named(store, tmp_path):
    options = ProbeOptions(cv=3, train="mine", test=("mine",))
    (run,) = probe_store(store, ["one"], options=options, runs=tmp_path / "runs")
    assert {one.view for one in run.candidates} == {"full"}
    (run,) = probe_store(store, ["one"], options=replace(options, view="full+blur"), runs=tmp_path / "runs")
    assert run.view == "full+blur"


def test_what_cannot_be_measured_is_said_once_with_what_to_do(store, tmp_path, capsys):
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match=r"unknown measure 'nearest': expected knn, fewshot"):
        measured(store, runs, "nearest")
    with pytest.raises(UserError, match=r"alignment compares two backbones, and here is one, one\. .*--model one,NAME"):
        measured(store, runs, "alignment", models=["one"])
    command = r"Run: fm-extract --model two --dataset mine,other --view full,full\+rot90,full\+fliph,"
    with pytest.raises(
        UserError, match=rf"no altered patches are embedded in view full\. {command}.* --store \S+zarr$"
    ):
        measured(store, runs, "invariance", models=["two"])
    with pytest.raises(UserError, match=r"view full\+blur is of altered ones\. Name the unaltered one: `view='full'`"):
        measured(store, runs, "invariance", models=["one"], view="full+blur", test=())
    bare = FeatureStore.open_or_create(tmp_path / "bare.zarr")
    own = table(60, 2, domains=False, groups=False, test=False)
    bare.put_samples("mine", own, attrs={"label_names": ["no", "yes"], "source": "/of/mine.csv"})
    add(bare, "mine", own, "one", "full")
    command = r"fm-extract --model one,NAME --dataset mine=/of/mine\.csv --view full --store \S+zarr --positive yes$"
    with pytest.raises(UserError, match=command):  # runs wherever it is typed
        measured(bare, runs, "alignment")
    with pytest.raises(UserError, match=r"no set has two domains or two slides\. .* columns `domain` or `group`"):
        measured(bare, runs, "robustness")
    with pytest.raises(UserError, match=r"mine has no test split"):
        measured(bare, runs, "fewshot")
    assert not runs.exists()
    capsys.readouterr()
    record = measured(bare, runs)
    assert {one.measure for one in record.figures} == {"knn", "retrieval", "clustering"}
    assert capsys.readouterr().err.count("Left out: ") == 4


def test_what_imported_embeddings_lack_is_to_be_imported(store, tmp_path):
    own = table(60, 5)
    store.put_samples("theirs", own, attrs={"label_names": ["no", "yes"], "source": "imported from x"})
    writer = store.begin(
        "theirs", model="titan", view="full", poolings={"pooled": 3}, card_pooling="pooled", parts={}, imported=True
    )
    for rows in writer.missing():
        writer.write(rows, {"pooled": np.random.default_rng(0).standard_normal((len(rows), 3))})
    options = ProbeOptions(cv=3, train="theirs", test=("theirs",))
    with pytest.raises(
        UserError, match=r"no altered patches .*: fm-store import FILE --dataset theirs --model titan .*--store"
    ):
        measure_store(store, measures=["invariance"], options=options, runs=tmp_path / "runs")
    with pytest.raises(UserError, match=r"Embed another: fm-store import FILE --dataset theirs --model NAME"):
        measure_store(store, measures=["alignment"], options=options, runs=tmp_path / "runs")


def test_the_command_takes_measures_with_and_without_names(store, tmp_path):
    def probe(*arguments: str):
        options = ["--store", str(store.path), "--runs", str(tmp_path / "runs"), "--train", "mine"]
        return CliRunner().invoke(app, [*options, *arguments])

    named = json.loads(probe("--measures", "clustering", "--json").stdout)
    assert named["result"]["measures"] == ["clustering"]
    assert set(named["result"]["options"]) == {
        *("train", "test", "view", "pooling", "labels", "seed", "device", "measures")
    }
    assert Path(named["measures"], "measures.json").is_file()
    every = json.loads(probe("--model", "two", "--measures", "--json").stdout)
    assert every["result"]["measures"] == ["knn", "fewshot", "retrieval", "clustering", "robustness"]
    shown = probe("--measures=knn", "--model", "two").stdout
    assert "k-NN" in shown
    assert "two (full, card)" in shown
    assert re.search(r"two \(full, card\).*\n.*k-NN with k = \d", shown)
    # All at once, and not the advice of another recipe, which measures would refuse as well.
    for given, named in (
        (["--combine"], "`combine` says"),
        (["--cv", "5"], "`cv` says"),
        (["--seeds", "3", "--folds-by", "domain", "--recipe", "paper"], "`folds_by`, `recipe` and `seeds` say"),
    ):
        with pytest.raises(UserError, match=f"{named} how probes are fitted, and `measures` fits none"):
            raise probe(*given, "--measures", "knn").exception
    assert not list(tmp_path.glob("runs/probe-*"))


def test_the_report_folds_measures_away_and_shows_those_of_its_patches(store, tmp_path):
    runs = tmp_path / "runs"
    options = ProbeOptions(cv=3, train="mine", test=("mine",))
    probe_store(store, ["two"], options=options, runs=runs)
    page, _, _ = make_report(runs, resampling=Resampling(replicates=100))
    assert 'id="measures"' not in page
    record = measured(store, runs, "retrieval", models=["two"])
    page, _, _ = make_report(runs, resampling=Resampling(replicates=100))
    section = page[page.index('<section id="measures"') :]
    section = section[: section.index("</section>")]
    assert section.index("<details") < section.index("<table")
    precision = next(one for one in record.figures if (one.name, one.split) == ("precision 5", "test"))
    assert f'<span class="value">{precision.value:.3f}</span>' in section
    assert '<th scope="row">by chance</th><td><span class="ends">0.500</span></td>' in section
    assert section.count("by chance") == section.count("<table")  # once in each, not in every cell
    table, _, _ = make_report(runs, resampling=Resampling(replicates=100), format="csv")
    rows = {(row["figure"], row["dataset"], row["split"]): row for row in csv.DictReader(io.StringIO(table))}
    row = rows["precision 5", precision.dataset, "test"]
    assert [float(row[name]) for name in ("value", "low", "high", "chance")] == [
        *(precision.value, precision.low, precision.high, precision.chance)
    ]
    assert (row["label"], row["interval"]) == (precision.embedding, "slides")
    assert int(row["n_slides"]) == precision.n_clusters
    # Those of other training patches are not shown.
    raw = replace(record, table_digests={"mine": "0" * 64})
    shutil.rmtree(record.folder)
    write_measures(runs, raw)
    page, _, _ = make_report(runs, resampling=Resampling(replicates=100))
    assert 'id="measures"' not in page


def test_sets_that_lack_classes_slides_or_nearly_all_patches_are_measured_as_far_as_they_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "DRAWS", 20)
    monkeypatch.setattr(measuring, "Resampling", partial(Resampling, replicates=200))
    store, rng = FeatureStore.open_or_create(tmp_path / "store.zarr"), np.random.default_rng(0)
    labels = {
        "mine": rng.integers(0, 3, 60),
        "slides": np.arange(20) // 10,
        "two": rng.integers(0, 2, 20),
        "single": np.array([1]),
    }
    for name, label in labels.items():
        n = len(label)
        samples = make_samples(
            [f"{name} {row}" for row in range(n)],
            label.tolist(),
            sha256=[f"{name} {row}" for row in range(n)],
            group=[f"{row // 5}" for row in range(n)] if name in ("mine", "slides") else None,
            split=["train" if name == "mine" else "test"] * n,
        )
        add(store, name, samples, "one", "full", names=("a", "b", "c"))
    record = measured(store, tmp_path / "runs")
    found = {(one.measure, one.name, one.dataset): one for one in record.figures}
    assert found["knn", "balanced_accuracy", "mine"].chance == pytest.approx(1 / 3)
    assert found["knn", "balanced_accuracy", "two"].chance is None  # it depends on what is guessed
    assert found["retrieval", "precision 1", "two"].chance == 0.5  # of the patches of the set itself
    assert found["fewshot", "balanced_accuracy 1", "two"].chance == pytest.approx(1 / 3)
    assert not any(key[2] == "single" for key in found)
    assert ("robustness", "index slide", "mine") in found
    assert ("robustness", "index slide", "slides") not in found  # a slide there is of one class
    assert terminal_tables(record)


@pytest.fixture
def of_slides(tmp_path, monkeypatch):
    """Make stores of one backbone: the classes of each slide of the training patches, and of a test set."""
    monkeypatch.setattr(measuring, "DRAWS", 20)
    monkeypatch.setattr(measuring, "Resampling", partial(Resampling, replicates=200))

    def make(train: list[list[int]], test: list[list[int]], *, domain: str = "") -> FeatureStore:
        store = FeatureStore.open_or_create(tmp_path / "store.zarr")
        for name, slides in (("mine", train), ("other", test)):
            label = [k for classes in slides for k in classes]
            group = [f"{name} {slide}" for slide, classes in enumerate(slides) for _ in classes]
            ids = [f"{name}-{row}" for row in range(len(label))]
            samples = make_samples(
                ids, label, sha256=ids, group=group, domain=[f"{domain}{k}" if domain else "" for k in label]
            )
            add(store, name, samples, "one", "full")
        return store

    return make


MIXED = [0, 1] * 5


def test_measures_need_no_folds(of_slides, tmp_path, capsys):
    record = measured(of_slides([MIXED] * 2, [MIXED] * 3), tmp_path / "runs")
    assert record.measures == ("knn", "fewshot", "retrieval", "clustering", "robustness")
    assert record.embeddings[0].neighbours


def test_one_training_slide_is_no_reason_to_measure_nothing(of_slides, tmp_path, capsys):
    store = of_slides([MIXED], [MIXED] * 3)
    record = measured(store, tmp_path / "runs")
    said = capsys.readouterr().err
    assert record.measures == ("fewshot", "retrieval", "clustering", "robustness")
    assert "Left out: k of the k nearest neighbours is chosen on mine's training patches, " in said
    assert "other slides: it has one slide. Leave knn out" in said
    with pytest.raises(UserError, match="k of the k nearest neighbours is chosen on mine's training patches"):
        measured(store, tmp_path / "runs", "knn")


def test_of_a_test_set_of_one_class_what_says_nothing_is_left_out_in_one_line(of_slides, tmp_path, capsys):
    record = measured(of_slides([MIXED] * 3, [[1] * 8] * 3), tmp_path / "runs")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("other, test: ")]
    assert line.endswith("it has patches of one class alone, yes. Left out: knn, retrieval, robustness.")
    assert {one.measure for one in record.figures if one.dataset == "other"} == {"clustering"}
    assert {"knn", "retrieval"} <= {one.measure for one in record.figures if one.dataset == "mine"}


def test_a_test_set_of_one_slide_is_said_to_have_no_intervals(of_slides, tmp_path, capsys):
    record = measured(of_slides([MIXED] * 3, [MIXED]), tmp_path / "runs")
    said = capsys.readouterr().err
    assert "other, test: it has one slide. Left out: retrieval, robustness, intervals.\n" in said
    of_other = [one for one in record.figures if one.dataset == "other"]
    assert {one.measure for one in of_other} == {"knn", "fewshot", "clustering"}
    titles = [str(table.title) for table in terminal_tables(record)]
    assert [title.endswith("; 95% intervals") for title in titles] == ["mine" in title for title in titles]


def test_where_nothing_can_be_measured_nothing_is_written(of_slides, tmp_path):
    store = of_slides([MIXED] * 3, [MIXED] * 3, domain="scanner ")
    reason = "no domain has patches of two classes"
    with pytest.raises(
        UserError, match=f"robustness would say nothing of any set. mine, train: .*other, test: {reason}"
    ):
        measured(store, tmp_path / "runs", "robustness")
    assert not (tmp_path / "runs").exists()


def test_a_training_set_that_lacks_a_class_has_no_few_labelled_patches_of_it(of_slides, tmp_path, capsys):
    store = of_slides([[0] * 9] * 3, [MIXED] * 3)
    record = measured(store, tmp_path / "runs")
    assert "Left out: few labelled patches are drawn of each class, and mine has no training patch of yes." in (
        capsys.readouterr().err
    )
    assert record.measures == ("retrieval", "clustering", "robustness")
