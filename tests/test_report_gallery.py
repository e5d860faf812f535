"""Does the page show the patches that the runs saw, each its own, and map their embeddings?"""

from __future__ import annotations

import base64
import io
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_pages import (
    check_page,
    collected,
    colour_of,
    draw_own_patches,
    embedded,
    page_of,
    run_on,
    two_runs,
)
from sklearn.decomposition import PCA
from test_runs import TABLES, edit_record, made_run

from features.console import UserError
from features.store import FeatureStore
from probe.report import gallery
from probe.report.gallery import (
    PAGE_BYTES,
    GalleryPatches,
    embedding_maps,
    make_thumbnails,
    open_store,
    select_patches,
)
from probe.report.read import read_runs

pytestmark = pytest.mark.usefixtures("no_patches_at_hand")


def test_all_patches_are_shown_where_they_are_few(tmp_path):
    two_runs(tmp_path)
    report, runs = collected(tmp_path)
    found = select_patches(report, runs)
    assert found.n_left_out == (0, 0, 0, 0)
    assert np.bincount(found.set_index).tolist() == [on.n for on in report.sets] == [24, 24, 48, 36]
    for k, on in enumerate(report.sets):
        rows = found.set_index == k
        part = TABLES[on.dataset].select(np.isin(TABLES[on.dataset].id, found.id[rows]))
        place = {id: row for row, id in enumerate(part.id.tolist())}
        of = part.select(np.array([place[id] for id in found.id[rows].tolist()]))
        assert of.label.tolist() == found.label[rows].tolist()
        assert of.group.tolist() == found.group[rows].tolist()
        votes = ["".join("01-"[vote] for vote in row) for row in of.votes.tolist()]
        assert votes == [found.votes[row] for row in np.flatnonzero(rows)]


def test_of_many_patches_the_worst_and_some_others_are_shown(tmp_path, monkeypatch):
    two_runs(tmp_path)
    report, runs = collected(tmp_path)
    whole = select_patches(report, runs)
    monkeypatch.setattr(gallery, "MOST", 40)
    found = select_patches(report, runs)
    kept = [40 * on.n // 132 for on in report.sets]
    assert np.bincount(found.set_index).tolist() == kept == [7, 7, 14, 10]
    assert found.n_left_out == tuple(on.n - n for on, n in zip(report.sets, kept, strict=True))
    random = 0
    for k, n in enumerate(kept):
        rows, all_rows = found.set_index == k, whole.set_index == k
        wrong = np.abs(whole.probability[:, all_rows, 1] - whole.label[all_rows]).max(axis=0)
        order = whole.id[all_rows][np.argsort(-wrong, kind="stable")].tolist()
        mine = set(found.id[rows].tolist())
        assert set(order[: n // 2]) <= mine
        random += mine != set(order[:n])
    assert random  # the others are not the next worst
    again = select_patches(report, runs)
    assert again.id.tolist() == found.id.tolist()
    place = {
        (on, id): row for row, (on, id) in enumerate(zip(whole.set_index.tolist(), whole.id.tolist(), strict=True))
    }
    at = [place[key] for key in zip(found.set_index.tolist(), found.id.tolist(), strict=True)]
    assert found.probability.tolist() == whole.probability[:, at].tolist()
    assert found.votes == tuple(whole.votes[row] for row in at)
    text = check_page(page_of(tmp_path)).text
    assert "94 of 132 patches are left out of map and gallery" in text


def test_a_patch_that_a_run_was_not_scored_on_has_no_probability(tmp_path):
    made_run(tmp_path, "uni")
    made_run(tmp_path, "virchow", tables={"ami-br": TABLES["ami-br"]}, seed=1)
    report, runs = collected(tmp_path)
    found = select_patches(report, runs)
    missing = np.array([runs[1].label in on.missing for on in report.sets])[found.set_index]
    assert np.isnan(found.probability[1, :, 1]).tolist() == missing.tolist()
    assert not np.isnan(found.probability[0]).any()
    page = page_of(tmp_path)
    check_page(page)
    data = embedded(page, "data")
    assert [p is None for p in data["probability"][1]] == missing.tolist()
    assert [t is None for t in data["thresholds"][1]] == [False, True, True, False]


def of_patches(n: int, *datasets: str) -> tuple[GalleryPatches, Any]:
    """n patches of every dataset, as the gallery shows them."""
    on = np.repeat(np.arange(len(datasets)), n)
    empty = np.full(len(on), "")
    ids = np.array([f"{k}" for k in range(len(on))])
    found = GalleryPatches(
        on, ids, empty, empty, np.zeros(len(on), "i1"), ("",) * len(on), np.zeros((1, len(on), 2)), (0,)
    )
    return found, SimpleNamespace(sets=[SimpleNamespace(dataset=name) for name in datasets])


def drawn(thumbnails: gallery.Thumbnails, row: int) -> np.ndarray:
    """The thumbnail of a row, cut from its sheet."""
    size, at = thumbnails.size, int(thumbnails.picture[row])
    left, top = at % 256 % 16 * size, at % 256 // 16 * size
    return decoded(thumbnails.sheets[at // 256])[top : top + size, left : left + size]


@cache
def decoded(sheet: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(sheet))
    assert picture.format == "WEBP"
    return np.asarray(picture.convert("RGB")).astype(float)


def test_every_thumbnail_is_of_its_own_patch():
    found, report = of_patches(150, "a", "away", "b")

    def flat(id: str) -> np.ndarray:
        return np.full((32, 32, 3), colour_of(id), dtype=np.uint8)

    thumbnails = make_thumbnails(found, report, {"a": flat, "b": flat}, budget=PAGE_BYTES)
    assert thumbnails.size == 32
    assert len(thumbnails.sheets) == 2
    assert (thumbnails.picture < 0).tolist() == (found.set_index == 1).tolist()
    assert sorted(thumbnails.picture[thumbnails.picture >= 0].tolist()) == list(range(300))
    for row in np.flatnonzero(thumbnails.picture >= 0):
        mean = drawn(thumbnails, row)[8:-8, 8:-8].mean(axis=(0, 1))
        assert np.abs(mean - colour_of(str(found.id[row]))).max() < 8, row


def test_thumbnails_shrink_to_the_budget():
    found, report = of_patches(16, "a")

    def noise(id: str) -> np.ndarray:
        return np.random.default_rng(int(id)).integers(0, 256, (128, 128, 3), dtype=np.uint8)

    sizes = []
    for budget in (10_000_000, 75_000, 25_000):
        thumbnails = make_thumbnails(found, report, {"a": noise}, budget=budget)
        assert sum(len(base64.b64encode(sheet)) for sheet in thumbnails.sheets) <= 1.1 * budget
        sizes.append(thumbnails.size)
    assert sizes[0] == 128
    assert sizes[0] > sizes[1] > sizes[2] >= 32
    assert make_thumbnails(found, report, {"a": noise}, budget=1).size == 32


@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
def test_the_middle_of_a_patch_that_is_not_square_is_shown(shape):
    found, report = of_patches(4, "a")

    def framed(id: str) -> np.ndarray:
        height, width = shape
        pixels = np.full((*shape, 3), (20, 20, 220), dtype=np.uint8)
        top, left = (height - 64) // 2, (width - 64) // 2
        pixels[top : top + 64, left : left + 64] = (200, 30, 30)
        return pixels

    thumbnails = make_thumbnails(found, report, {"a": framed}, budget=PAGE_BYTES)
    assert thumbnails.size == 64
    for row in range(4):
        assert np.abs(drawn(thumbnails, row)[8:-8, 8:-8] - (200, 30, 30)).max() < 25


def test_no_patches_at_hand_are_no_thumbnails():
    found, report = of_patches(3, "a")
    thumbnails = make_thumbnails(found, report, {}, budget=PAGE_BYTES)
    assert (thumbnails.sheets, thumbnails.picture.tolist()) == ((), [-1, -1, -1])


@pytest.fixture
def own_patches(tmp_path) -> Path:
    return draw_own_patches(tmp_path)


def test_the_patches_that_the_runs_saw_are_shown(own_patches, tmp_path, capsys):
    run_on(own_patches, tmp_path / "runs")
    page = page_of(tmp_path / "runs")
    check_page(page)
    assert "No pictures" not in capsys.readouterr().err
    data = embedded(page, "data")
    pictures = embedded(page, "thumbnails")
    sheets = tuple(base64.b64decode(sheet) for sheet in pictures["sheets"])
    thumbnails = gallery.Thumbnails(pictures["size"], sheets, np.array(pictures["picture"]))
    assert pictures["side"] == 16
    for row, id in enumerate(data["id"]):
        mean = drawn(thumbnails, row)[8:-8, 8:-8].mean(axis=(0, 1))
        assert np.abs(mean - colour_of(id.removesuffix(".png"))).max() < 8


@pytest.mark.parametrize("change", ["a patch", "gone", "a label", "unknown"])
def test_other_patches_than_the_runs_saw_are_not_shown(change, own_patches, tmp_path, capsys):
    folder = run_on(own_patches, tmp_path / "runs")
    if change == "a patch":
        Image.new("RGB", (32, 32), (9, 9, 9)).save(own_patches.parent / "7.png")
    elif change == "gone":
        shutil.rmtree(own_patches.parent)
    elif change == "a label":
        own_patches.write_text(own_patches.read_text().replace("0.png,Atypical", "0.png,Normal", 1))
    else:
        edit_record(folder, sources=None, label_names=None)
    page = page_of(tmp_path / "runs")
    root = check_page(page)
    assert capsys.readouterr().err.count("No pictures of own: ") == 1
    assert embedded(page, "thumbnails")["sheets"] == []
    assert set(embedded(page, "thumbnails")["picture"]) == {-1}
    assert "The patches themselves are not at hand" in root.text


def test_patches_without_named_classes_are_no_reason_to_have_no_report(own_patches, tmp_path):
    edit_record(run_on(own_patches, tmp_path / "runs"), label_names=None)
    check_page(page_of(tmp_path / "runs"))


# --- the map ----------------------------------------------------------------------------------------------------------

WIDTH = 12


def embed(store: FeatureStore, dataset: str, *, constant: bool = False, **parts: Any) -> str:
    """Embeddings of a dataset by uni; gives their fingerprint."""
    table = TABLES[dataset]
    store.put_samples(dataset, table, attrs={})
    X = np.random.default_rng(len(table)).standard_normal((len(table), WIDTH)) * np.arange(WIDTH, 0, -1) ** 2
    X = np.ones_like(X) if constant else X
    writer = store.begin(
        dataset,
        model="uni",
        view="full",
        poolings={"cls": WIDTH},
        card_pooling="cls",
        parts={"dataset": dataset} | parts,
    )
    for rows in writer.missing():
        writer.write(rows, {"cls": X[rows.start : rows.stop]})
    return store.entries(dataset, "uni")[0].fingerprint


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    return FeatureStore.open_or_create(tmp_path / "store.zarr")


def test_a_map_is_the_principal_components_of_the_embeddings(store, tmp_path):
    fingerprints = {name: embed(store, name) for name in ("ami-br", "atnorm-br")}
    made_run(tmp_path / "runs", store=str(store.path), fingerprints=fingerprints)
    report, runs = collected(tmp_path / "runs")
    found = select_patches(report, runs)
    (one,) = embedding_maps(found, report, runs, store)
    assert one.title == "uni, full, card"
    rows, X = [], []
    for row, (on, id) in enumerate(zip(found.set_index.tolist(), found.id.tolist(), strict=True)):
        name = report.sets[on].dataset
        if name in fingerprints:
            rows.append(row)
            at = TABLES[name].id.tolist().index(id)
            X.append(store.read(name, model="uni", view="full", pooling="cls", rows=np.array([at]))[0])
    reference = PCA(4, svd_solver="full").fit(np.array(X, dtype=np.float64))
    expected = reference.transform(np.array(X, dtype=np.float64))
    mine = one.coordinates[rows]
    sign = np.sign((mine * expected).sum(axis=0))
    np.testing.assert_allclose(mine * sign, expected, atol=1e-3 * np.abs(expected).max())
    assert one.explained == pytest.approx(reference.explained_variance_ratio_, abs=1e-4)
    unknown = np.setdiff1d(np.arange(len(found.id)), rows)
    assert {report.sets[on].dataset for on in found.set_index[unknown]} == {"atnorm-md"}
    assert np.isnan(one.coordinates[unknown]).all()

    page = page_of(tmp_path / "runs")
    root = check_page(page)
    (drawn_map,) = embedded(page, "data")["maps"]
    for column in drawn_map["components"]:
        assert [k for k, value in enumerate(column) if value is None] == unknown.tolist()
        known = [value for value in column if value is not None]
        assert (min(known), max(known)) == (0, 1000)
    assert "uni, full, card" in root.text


def test_embeddings_of_another_fingerprint_are_not_mapped(store, tmp_path):
    embed(store, "ami-br")
    made_run(tmp_path / "runs", store=str(store.path), fingerprints={"ami-br": "another"})
    report, runs = collected(tmp_path / "runs")
    assert embedding_maps(select_patches(report, runs), report, runs, store) == []
    assert "No map:" in check_page(page_of(tmp_path / "runs")).text


def test_every_run_of_a_backbone_brings_its_sets_to_the_map(store, tmp_path):
    fingerprints = {name: embed(store, name) for name in ("ami-br", "atnorm-br")}
    made_run(tmp_path, "uni", store=str(store.path), fingerprints=fingerprints)
    last = made_run(
        tmp_path, "uni", tables={"ami-br": TABLES["ami-br"]}, fingerprints={"ami-br": fingerprints["ami-br"]}, seed=1
    )
    edit_record(last, created="2099-01-01T00:00:00Z")
    report, runs = collected(tmp_path)
    found = select_patches(report, runs)
    (one,) = embedding_maps(found, report, runs, store)
    on = [report.sets[k].dataset for k in found.set_index[np.isfinite(one.coordinates[:, 0])]]
    assert set(on) == {"ami-br", "atnorm-br"}


def test_embeddings_that_are_all_equal_leave_the_page_whole(store, tmp_path):
    fingerprint = embed(store, "ami-br", constant=True)
    made_run(tmp_path / "runs", store=str(store.path), fingerprints={"ami-br": fingerprint})
    check_page(page_of(tmp_path / "runs"))


def test_the_store_that_was_probed_is_found_or_a_given_one_refused(store, tmp_path):
    made_run(tmp_path / "runs", store=str(store.path))
    runs, _ = read_runs(tmp_path / "runs")
    assert open_store(runs, None).path == store.path
    shutil.rmtree(store.path)
    assert open_store(runs, None) is None
    with pytest.raises(UserError, match=r"store\.zarr"):
        open_store(runs, store.path)
