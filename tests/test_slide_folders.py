"""Does a folder with a file of features for each slide come in as one dataset, whose slides are its groups?"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from extract.shard import Shard
from features.cli import app
from features.console import UserError
from features.embedding_files import coordinates, read_folder
from features.exchange import import_embeddings
from features.store import FeatureStore
from finetune.benchmark import run_benchmark
from finetune.benchmark_cli import _show_benchmark
from finetune.benchmark_facts import gather
from finetune.benchmark_plan import Where
from finetune.benchmark_state import survey
from probe.cli import app as probe_app
from probe.probing import ProbeOptions, probe_store
from probe.runs import read_predictions, read_run

SLIDES = [f"slide_{k}" for k in range(1, 13)]  # slide_10 follows slide_9
D = 6


def features(slide: str, n: int = 8) -> NDArray[np.float32]:
    """Features of a slide, whose first column tells the class of the slide: every third is tumour."""
    k = SLIDES.index(slide)
    values = np.random.default_rng(k).normal(size=(n, D)).astype(np.float32)
    values[:, 0] += 4 * (k % 3 == 0)
    return values


def positions(n: int = 8) -> NDArray[np.int64]:
    return np.array([[256 * row, 512] for row in range(n)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As TRIDENT writes it: features in float16 or float32, and positions with attributes."""
    path = tmp_path / "features_uni_v1"
    path.mkdir()
    for k, slide in enumerate(SLIDES):
        with h5py.File(path / f"{slide}.h5", "w") as file:
            file["features"] = features(slide).astype(np.float16 if k % 2 else np.float32)
            file["coords"] = positions()
            file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40})
    (path / ".DS_Store").write_text("x")
    (path / "_config_feats_uni_v1.json").write_text("{}")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """As CLAM's: a case, a slide with the suffix of its file, and a label."""
    rows = [f"case_{k // 2},{slide}.svs,{'tumor' if k % 3 == 0 else 'normal'}" for k, slide in enumerate(SLIDES)]
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["case_id,slide_id,label", *rows, "case_99,slide_99.svs,tumor"]) + "\n")
    return path


def come_in(store: FeatureStore, source: Path, table: Path | None = None, *, model: str = "uni") -> None:
    import_embeddings(store, source, dataset="d", model=model, view="full", table=table)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.open_or_create(tmp_path / "store")


def test_a_folder_of_trident_is_imported_by_one_call_and_probed(
    folder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "store"
    arguments = ["import", folder, "--dataset", "d", "--model", "uni", "--table", table, "--store", path]
    app(list(map(str, arguments)), standalone_mode=False)
    said = capsys.readouterr().err
    assert "its slides are those of the column slide_id" in said
    assert "1 of its 13 slides have no file" in said
    store = FeatureStore.open(path)
    samples = store.samples("d")
    assert samples.id[:2].tolist() == ["slide_1/x0_y512", "slide_1/x256_y512"]
    assert coordinates(samples.id).tolist() == positions().tolist() * len(SLIDES)  # type: ignore[union-attr]
    assert samples.group[::8].tolist() == [f"case_{k // 2}" for k in range(len(SLIDES))]
    assert samples.label[::8].tolist() == [int(k % 3 == 0) for k in range(len(SLIDES))]
    stored = store.read("d", model="uni", view="full")
    np.testing.assert_array_equal(stored, np.concatenate([features(slide) for slide in SLIDES]).astype(np.float16))
    (run,) = probe_store(store, options=ProbeOptions(cv=3, train="d", device="cpu"), runs=tmp_path / "runs")
    assert run.folder is not None
    own = read_predictions(run.folder)
    assert ((own.probability[:, 1] > 0.5) == own.label).mean() > 0.8
    # Another model's features of the same slides are matched by position, whatever the order; no table is needed.
    for file in folder.iterdir():
        if file.suffix == ".h5":
            with h5py.File(file, "r+") as slide:
                values, coords = slide["features"][...][None, ::-1], slide["coords"][...][::-1]
                del slide["features"], slide["coords"]
                slide["features"], slide["coords"] = values, coords  # (1, n, d), as CLAM's
    come_in(store, folder, model="other")
    np.testing.assert_array_equal(store.read("d", model="other", view="full"), stored)


def test_the_column_of_slides_is_not_said_to_be_unused(
    folder: Path, store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "labels.csv"
    rows = [f"{slide},{'tumor' if k % 3 == 0 else 'normal'},case_{k // 2},S" for k, slide in enumerate(SLIDES)]
    path.write_text("\n".join(["slide,label,group,stainer", *rows]) + "\n")
    come_in(store, folder, path)
    said = capsys.readouterr().err
    assert "its slides are those of the column slide." in said
    assert "columns not used: stainer.\n" in said


@pytest.mark.parametrize("name", ["a,b", " a", "a\t"])
def test_names_that_no_option_could_name_are_not_imported(
    folder: Path, table: Path, store: FeatureStore, name: str
) -> None:
    for names in ({"dataset": name}, {"model": name}, {"view": name}):
        with pytest.raises(UserError, match=r"could not be named again.*Leave out commas"):
            import_embeddings(store, folder, table=table, **{"dataset": "d", "model": "uni", "view": "full"} | names)
    assert not store.datasets()


def test_a_plan_of_imported_embeddings_runs_every_probe_or_says_what_to_import(
    folder: Path, table: Path, tmp_path: Path, store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    come_in(store, folder, table)
    plan = tmp_path / "plan.toml"
    plan.write_text(
        "train = 'd'\nimported = ['uni', 'titan']\nmethods = 'probe'\nrecipes = ['default', 'paper']\ncv = 3"
    )
    where = Where(store=str(store.path), runs=tmp_path / "runs")

    def launch(line: Sequence[str], log: Path, environment: Mapping[str, str], descriptors: Sequence[int]) -> int:
        if line[0] == "fm-probe":
            probe_app(list(line[1:]), standalone_mode=False)
        log.write_text("")
        return 0

    facts = gather(str(plan), where)
    rows = survey(facts)
    assert [(one.row.model, one.row.method, one.row.recipe, one.state) for one in rows] == [
        ("uni", "probe", "exact", "to do"),
        ("uni", "probe", "paper", "to do"),
        ("titan", "probe", "exact", "cannot"),
        ("titan", "probe", "paper", "cannot"),
    ]
    assert f"fm-store import FILE --model titan --dataset d --store {store.path}" in rows[2].remedy
    _show_benchmark(facts, rows, Shard())
    assert "4 rows: 2 to do, 2 cannot.\n" in capsys.readouterr().err  # and no guess of how long that takes
    outcome = run_benchmark(facts, rows, out=tmp_path / "report.html", launch=launch)
    assert [one.state for one in outcome.standings] == ["done", "done", "cannot", "cannot"]
    runs = [read_run(path.parent) for path in (tmp_path / "runs").glob("*/run.json")]
    assert sorted((run.model, run.options["recipe"]) for run in runs) == [("uni", "exact"), ("uni", "paper")]


def test_slides_are_the_groups_and_patches_or_files_may_have_the_labels(
    folder: Path, store: FeatureStore, tmp_path: Path
) -> None:
    (tmp_path / "slides.csv").write_text(
        "slide,label,split\n"
        + "".join(f"{s}.svs,{int(s > 'slide_3')},{'test' if s == 'slide_2' else 'train'}\n" for s in SLIDES)
    )
    come_in(store, folder, tmp_path / "slides.csv")
    samples = store.samples("d")
    assert samples.group.tolist() == [slide for slide in SLIDES for _ in range(8)]
    assert set(samples.group[samples.split == "test"].tolist()) == {"slide_2"}
    (tmp_path / "gaps.csv").write_text(
        "slide,label,group\n" + "".join(f"{s},{k % 2},{'NA' if k else 'p'}\n" for k, s in enumerate(SLIDES))
    )
    import_embeddings(store, folder, dataset="gaps", model="uni", view="full", table=tmp_path / "gaps.csv")
    assert store.samples("gaps").group[::8].tolist() == ["p", *SLIDES[1:]]  # where no patient is known, the slide
    ids = read_folder(folder).ids.tolist()
    (tmp_path / "patches.csv").write_text(
        "id,label\n" + "".join(f"{id},{row % 2}\n" for row, id in enumerate(ids[::-1]))
    )
    import_embeddings(store, folder, dataset="patches", model="uni", view="full", table=tmp_path / "patches.csv")
    by_patch = store.samples("patches")
    assert by_patch.group.tolist() == samples.group.tolist()[::-1]
    assert by_patch.label.tolist() == [0, 1] * (len(ids) // 2)
    (other := tmp_path / "pt").mkdir()
    for k, slide in enumerate(SLIDES[:4]):
        torch.save(
            {"features": torch.from_numpy(features(slide)).bfloat16(), "labels": torch.tensor([k % 2])},
            other / f"{slide}.pt",
        )
    import_embeddings(store, other, dataset="of_files", model="uni", view="full")
    assert store.samples("of_files").label.tolist() == [k % 2 for k in range(4) for _ in range(8)]
    assert store.samples("of_files").id[8] == "slide_2/000000"


def test_slide2vecs_tensors_and_one_embedding_for_each_slide_come_in(
    store: FeatureStore, table: Path, tmp_path: Path
) -> None:
    (tiles := tmp_path / "tile_embeddings").mkdir()
    (whole := tmp_path / "slide_embeddings").mkdir()
    for slide in SLIDES:
        torch.save(torch.from_numpy(features(slide)), tiles / f"{slide}.pt")
        (tiles / f"{slide}.meta.json").write_text("{}")
        np.savez(whole / f"{slide}.npz", features=features(slide)[0])
    come_in(store, tiles, table)
    assert store.entry("d", model="uni", view="full").n_rows == 8 * len(SLIDES)
    import_embeddings(store, whole, dataset="whole", model="titan", view="full", table=table)
    assert store.samples("whole").id.tolist() == SLIDES
    with pytest.raises(UserError, match="Its folders slide_embeddings, tile_embeddings have some"):
        read_folder(tmp_path)


def other_width(folder: Path) -> None:
    np.savez(folder / "slide_13.npz", features=np.ones((3, D + 1), np.float32))


def twice(folder: Path) -> None:
    torch.save(torch.ones(3, D), folder / "slide_3.pt")


def truncated(folder: Path) -> None:
    path = folder / "slide_3.h5"
    path.write_bytes(path.read_bytes()[:300])


def hostile(folder: Path) -> None:
    with (folder / "slide_13.pt").open("wb") as file:
        pickle.dump(Path("x"), file)


def without_features(folder: Path) -> None:
    np.savez(folder / "slide_13.npz", coords=positions())


def other_coords(folder: Path) -> None:
    np.savez(folder / "slide_13.npz", features=np.ones((3, D), np.float32), coords=positions())


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_width, r"slide_13\.npz: its features have 7 columns, those of slide_1\.h5 6"),
        (twice, r"two files of the slide slide_3 \(slide_3\.h5, slide_3\.pt\)"),
        (truncated, r"slide_3\.h5 cannot be read as \.h5"),
        (hostile, r"slide_13\.pt is damaged, or holds Python objects"),
        (without_features, r"slide_13\.npz holds coords; expected 'features'"),
        (other_coords, r"coords is int64 \(8, 2\), and there are 3 features"),
        (emptied, "holds no file of features"),
    ],
)
def test_faults_of_a_folder_are_named(
    store: FeatureStore, folder: Path, table: Path, change: Callable[[Path], None], message: str
) -> None:
    change(folder)
    with pytest.raises(UserError, match=message):
        come_in(store, folder, table)
    assert store.datasets() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,label\nslide_1,0\nslide_2,1\n", r"no label of 10 of the 12 slides .*\(slide_3, slide_4"),
        ("slide,label\na,0\nb,1\n", r"no column names the slides of .*\(slide_1, slide_2"),
        (
            "slide,label\n" + "".join(f"{s},1\n" for s in [*SLIDES, "slide_7"]),
            "the slide slide_7 is there more than once",
        ),
        ("slide,label\n" + "".join(f"{s},\n" for s in SLIDES), "no label in 96 of 96 rows"),
    ],
)
def test_faults_of_a_table_of_slides_are_named(
    store: FeatureStore, folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        come_in(store, folder, tmp_path / "x.csv")
    with pytest.raises(UserError, match="leave out `ids`"):
        import_embeddings(store, folder, dataset="d", model="uni", view="full", ids=tmp_path / "x.csv")
    with pytest.raises(UserError, match=r"hold no labels\. Give a `table`"):
        come_in(store, folder)
    assert store.datasets() == []
