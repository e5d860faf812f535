"""Are patches found that a model knows from its training, however they come into the test set?"""

from __future__ import annotations

import numpy as np
import pytest

from features import leaks
from features.leaks import find_leak, shared_with_others, similar_rows
from features.samples import make_samples
from features.store import FeatureStore

WIDTH = 48


def samples_of(prefix, n, *, sha256=None, group=None):
    ids = [f"{prefix}{row}" for row in range(n)]
    labels = [row % 2 for row in range(n)]
    return make_samples(ids, labels, sha256=sha256 or [f"{id}." for id in ids], group=group)


def add(store, dataset, X):
    store.put_samples(dataset, samples_of(dataset, len(X)), attrs={})
    writer = store.begin(
        dataset, model="m", view="full", poolings={"cls": X.shape[1]}, card_pooling="cls", parts={"model": "m"}
    )
    for rows in writer.missing():
        writer.write(rows, {"cls": X[rows.start : rows.stop]})
    return store.embeddings(dataset, model="m", view="full")


def test_a_patch_is_known_by_its_bytes_its_pixels_or_its_group():
    train = samples_of("a", 4, sha256=["1", "2", "", "4"], group=["s", "s", "t", ""])
    test = samples_of("b", 5, sha256=["2", "9", "", "8", "7"], group=["x", "t", "", "u", "S"])
    leak = find_leak(train, test)
    assert leak.identical.tolist() == [True, False, False, False, False]  # two unknown digests are not the same
    assert leak.grouped.tolist() == [False, True, False, False, True]  # S may well be s
    assert leak.seen.tolist() == [True, True, False, False, True]
    assert leak.found() == "1 identical, 2 of a group (slide, patient) in both"
    pixels = (["p", "q", "", "s"], ["?", "!", "", "s", "."])
    assert find_leak(train, test, pixels=pixels).identical.tolist() == [True, False, False, True, False]
    near = np.array([True, False, False, False, True])
    assert find_leak(train, test, similar=near).seen.tolist() == [True, True, False, False, True]
    assert find_leak(train, test, similar=near).found().startswith("1 identical, 1 nearly identical, 2 of a group")


@pytest.mark.parametrize("width", [48, 600])  # 600 are projected first
@pytest.mark.parametrize("block", [7, 4096])
def test_patches_that_look_the_same_are_found_and_no_others(tmp_path, monkeypatch, block, width):
    monkeypatch.setattr(leaks, "_BLOCK", block)
    rng = np.random.default_rng(0)
    scale = np.logspace(-2, 2, width)  # features differ in size; what looks the same does not depend on it
    known, other = rng.standard_normal((300, width)), rng.standard_normal((40, width))
    other[3] = known[17]
    other[20] = known[299] + 0.4 * rng.standard_normal(width)  # a fifth as far as its other neighbours, squared
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    train = add(store, "a", known * scale + 3 * scale)
    test = add(store, "b", other * scale + 3 * scale)
    assert np.flatnonzero(similar_rows(train, test)).tolist() == [3, 20]
    part = train.select(np.arange(100, 300))
    assert np.flatnonzero(similar_rows(part, test.select(np.array([3, 20])))).tolist() == [1]


def test_many_copies_of_a_patch_are_no_neighbourhood(tmp_path):
    """A dozen copies are as near as each other: that is no reason to think that none is a copy."""
    rng = np.random.default_rng(1)
    known = rng.standard_normal((100, WIDTH))
    known[:12] = known[0] + 0.01 * rng.standard_normal((12, WIDTH))
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    train, test = add(store, "a", known), add(store, "b", known[:1])
    assert similar_rows(train, test).tolist() == [True]


@pytest.mark.parametrize("n", [3, 49])
def test_among_few_patches_only_copies_are_found(tmp_path, n):
    rng = np.random.default_rng(2)
    known = rng.standard_normal((n, WIDTH))
    other = np.stack([known[0], known[1] + 0.3 * rng.standard_normal(WIDTH)])
    known[:, 4:] = other[:, 4:] = 2.5  # constant features decide nothing
    other[1, :4] = known[1, :4] + 0.4
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    assert similar_rows(add(store, "a", known), add(store, "b", other)).tolist() == [True, False]


def test_embeddings_that_are_all_equal_say_nothing_and_warn_of_nothing(tmp_path):
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    constant = np.zeros((100, WIDTH))
    assert not similar_rows(add(store, "a", constant), add(store, "b", constant[:3])).any()


def test_sets_too_large_to_compare_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(leaks, "_MOST_PAIRS", 99)
    X = np.random.default_rng(2).standard_normal((10, WIDTH))
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    assert not similar_rows(add(store, "a", X), add(store, "b", X)).any()


def test_datasets_of_a_store_that_share_patches_are_named(tmp_path):
    store = FeatureStore.open_or_create(tmp_path / "s.zarr")
    store.put_samples("one", samples_of("a", 3, sha256=["1", "2", "3"]), attrs={})
    store.put_samples("two", samples_of("b", 3, sha256=["4", "5", "6"]), attrs={})
    new = samples_of("c", 2, sha256=["2", "9"])
    assert list(shared_with_others(store, "new", new)) == [
        "new shares patches with one (1 identical): where one trains, the other is no independent test"
    ]
