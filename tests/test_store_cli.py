"""Does fm-store do what its help says, with one message per mistake?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from features.cli import app
from features.console import UserError
from features.samples import make_samples
from features.store import FeatureStore

N = 70
IDS = [f"Atypical/{i}-é.png" for i in range(N)]
CLS = np.arange(N * 3, dtype=np.float32).reshape(N, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store = FeatureStore.open_or_create(tmp_path / "embeddings.zarr")
    table = make_samples(
        IDS,
        [i % 2 for i in range(N)],
        sha256=[str(i // 2) for i in range(N)],
        group=[f"slide{i // 10}" for i in range(N)],
        split=["train" if i < 50 else "test" for i in range(N)],
        votes=np.ones((N, 3), np.int8),
        domain=["lymphoma"] * N,
    )
    store.put_samples("ami-br", table, attrs={})
    parts = {"model": "uni", "precision": "bf16"}
    poolings = {"cls": 3, "mean": 3}
    writer = store.begin("ami-br", model="uni", view="full", poolings=poolings, card_pooling="cls+mean", parts=parts)
    for rows in writer.missing():
        part = CLS[rows.start : rows.stop]
        writer.write(rows, {"cls": part, "mean": -part})
    return store.path


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*arguments: object) -> dict[str, object]:
    return dict(json.loads(call(*arguments, "--json").stdout))


def test_info_shows_datasets_entries_and_the_audit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    shown = call("info", "--store", path).stdout
    for text in ("ami-br", "70", "35 (50.0%)", "uni", "cls × 3", "mean × 3", "2/2", "bf16"):
        assert text in shown
    assert "ami-br: 35 sets of identical patches" in shown
    said = as_json("info", "--store", path)
    assert said["datasets"][0]["raters"] == 3
    assert len(said["datasets"][0]["audit"]["conflicts"]) == 35
    assert said["entries"][0]["complete"] is True
    assert said["entries"][0]["bytes"] > 2 * 2 * 64 * 3 * 2


def test_verify_is_content_or_names_dataset_model_view_pooling_and_rows(path: Path) -> None:
    assert "is sound" in call("verify", "--store", path).stderr
    assert as_json("verify", "--store", path) == {"store": str(path), "sound": True, "problems": []}
    block = path / "ami-br" / "uni" / "full" / "mean" / "c.1.0"
    block.write_bytes(b"\x01" + block.read_bytes()[1:])
    with pytest.raises(UserError, match=r"\(1 found\):\n  ami-br/uni/full/mean: block 1 \(rows 64–69\) is damaged"):
        call("verify", "--store", path)
    result = call("verify", "--store", path, "--json")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert (problem["where"], problem["block"], problem["rows"]) == ("ami-br/uni/full/mean", 1, [64, 69])


def test_the_command_exits_with_one_message_and_status(path: Path, tmp_path: Path) -> None:
    def fm_store(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from features.cli import main; main()", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    bare = fm_store("info", "--store", tmp_path / "none")
    assert (bare.returncode, bare.stdout) == (1, "")
    assert bare.stderr.startswith("error: ")
    assert bare.stderr.count("\n") == 1
    (path / "ami-br" / "uni" / "full" / "cls" / "c.0.0").write_bytes(b"")
    assert fm_store("verify").returncode == 1  # the default store is ./embeddings.zarr
    assert fm_store("verify", "--json").returncode == 1
    assert fm_store("info").returncode == 0
    assert fm_store("nonsense").returncode == 2


def test_help_comes_without_the_heavy_imports() -> None:
    code = "import sys, features.cli; print([m for m in ('zarr', 'numpy', 'h5py', 'torch') if m in sys.modules])"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 10
    for verb in ("info", "verify", "export", "import"):
        assert "--store" in call(verb, "--help").stdout


@pytest.mark.parametrize("pooling", ["card", "cls"])
def test_hdf5_and_npz_leave_and_come_back_unchanged(path: Path, tmp_path: Path, pooling: str) -> None:
    expected = FeatureStore.open(path).read("ami-br", model="uni", view="full", pooling=pooling)
    for format, suffix in (("hdf5", "h5"), ("npz", "npz")):
        out = tmp_path / "new" / f"x.{suffix}"
        select = ("--store", path, "--dataset", "ami-br", "--model")
        named = ("--format", format) if pooling == "card" else ()  # else by the ending
        said = as_json("export", *select, "uni", "--pooling", pooling, *named, "--out", out)
        assert (said["n_rows"], said["width"], said["format"]) == (*expected.shape, format)
        said = as_json("import", out, *select, f"back-{suffix}")
        assert said["imported"] is True
        back = FeatureStore.open(path).read("ami-br", model=f"back-{suffix}", view="full")
        np.testing.assert_array_equal(back, expected)
    assert FeatureStore.open(path).verify() == []
    assert [file.name for file in (tmp_path / "new").iterdir() if file.name.startswith(".")] == []


def test_exports_carry_the_patch_table(path: Path, tmp_path: Path) -> None:
    select = ("--store", path, "--dataset", "ami-br", "--model", "uni")
    table = FeatureStore.open(path).samples("ami-br")
    call("export", *select, "--out", tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["features"].shape == (N, 6)
        assert file["ids"].asstr()[...].tolist() == IDS
        assert file["groups"].asstr()[3] == "slide0"
        np.testing.assert_array_equal(file["labels"], table.label)
        assert file["votes"].shape == (N, 3)
        assert (file.attrs["model"], file.attrs["pooling"]) == ("uni", "cls+mean")
    call("export", *select, "--format", "npz", "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert file["splits"].tolist() == table.split.tolist()
    call("export", *select, "--format", "anndata", "--pooling", "mean", "--out", tmp_path / "x.h5ad")
    data = anndata.read_h5ad(tmp_path / "x.h5ad")
    np.testing.assert_array_equal(data.X, -CLS)
    assert data.obs_names.tolist() == IDS
    assert data.obs["domain"].tolist() == ["lymphoma"] * N
    assert data.uns["fingerprint"] == FeatureStore.open(path).entries()[0].fingerprint


def test_a_csv_makes_a_new_dataset_in_a_new_store(tmp_path: Path) -> None:
    rows = "".join(f"{id},{i % 2},s{i}\n" for i, id in enumerate(IDS))
    (tmp_path / "table.csv").write_text("id,label,group\n" + rows, encoding="utf-8")
    (tmp_path / "ids.txt").write_text("\n".join(reversed(IDS)) + "\n", encoding="utf-8")
    np.save(tmp_path / "x.npy", CLS[::-1])
    store = tmp_path / "s"
    options = ("--ids", tmp_path / "ids.txt", "--table", tmp_path / "table.csv", "--store", store)
    for _ in range(2):  # again is no harm
        call("import", tmp_path / "x.npy", "--dataset", "mine", "--model", "my model", *options)
    opened = FeatureStore.open(store)
    np.testing.assert_array_equal(opened.read("mine", model="my model", view="full"), CLS)  # in the table's order
    assert opened.samples("mine").group[7] == "s7"
    np.save(tmp_path / "x.npy", 2 * CLS)
    with pytest.raises(UserError, match="`overwrite=True`"):
        call("import", tmp_path / "x.npy", "--dataset", "mine", "--model", "my model", *options)
    call("import", tmp_path / "x.npy", "--dataset", "mine", "--model", "my model", "--overwrite", *options)
    assert opened.read("mine", model="my model", view="full")[0].tolist() == (2 * CLS[-1]).tolist()


def test_rows_that_do_not_fit_are_named_and_nothing_is_imported(path: Path, tmp_path: Path) -> None:
    def refused(match: str, **arrays: object) -> None:
        np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=match):
            call("import", tmp_path / "x.npz", "--dataset", "ami-br", "--model", "mine", "--store", path)
        assert len(FeatureStore.open(path).entries()) == 1

    refused("1 patches have no embedding.*69-é.png", features=CLS[:-1], ids=IDS[:-1])
    refused("2 of its ids are no patches.*'x', 'y'", features=np.vstack([CLS, CLS[:2]]), ids=[*IDS, "y", "x"])
    refused("1 of its rows repeat an id", embeddings=np.vstack([CLS, CLS[:1]]), ids=[*IDS, IDS[0]])
    refused("expected 'ids'.*or give `ids`", features=CLS)
    refused("expected 'features'", feats=CLS, ids=IDS)
    refused(r"shape \(3,\), and there are 70 ids; expected \(70, d\)", features=CLS[0], ids=IDS)
    refused("which is a pickle and is not read", features=CLS, ids=np.array(IDS, dtype=object))
    refused(r"1 embedding \('Atypical/5-é.png'\) holds NaN", features=np.where(CLS == 15, np.nan, CLS), ids=IDS)


def test_files_of_the_wrong_kind_are_refused(path: Path, tmp_path: Path) -> None:
    select = ("--dataset", "ami-br", "--model", "mine", "--store", path)
    np.save(tmp_path / "x.npy", CLS)
    (tmp_path / "text.h5").write_text("no HDF5")
    (tmp_path / "x.csv").write_text("id,label\na,\n")
    (tmp_path / "header.csv").write_text("name\na\n")
    for arguments, match in [
        ((tmp_path / "x.npy",), "or give `ids` apart"),
        ((tmp_path / "x.pkl",), "give one of .npy, .npz"),
        ((tmp_path / "none.npz",), "cannot be read.*No such file"),
        ((tmp_path / "text.h5",), "cannot be read as .h5"),
        ((tmp_path / "x.npy", "--ids", tmp_path / "header.csv"), "lacks the column id; it has name"),
        ((tmp_path / "x.npy", "--table", tmp_path / "x.csv"), r"no label in 1 of 1 rows \(line 2: a \(empty\)\)"),
    ]:
        with pytest.raises(UserError, match=match):
            call("import", *arguments, *select)
    (tmp_path / "x.csv").write_text("id,label\na,1\n")
    with pytest.raises(UserError, match="Leave out `table`"):
        call("import", tmp_path / "x.npy", "--ids", tmp_path / "x.csv", "--table", tmp_path / "x.csv", *select)
    with pytest.raises(UserError, match="unknown format 'parquet'"):
        call("export", "--store", path, "--dataset", "ami-br", "--model", "uni", "--format", "parquet", "--out", "x")
    assert not os.path.exists("x")  # noqa: PTH110


def npy(tmp_path: Path, ids: list[str], *, values: np.ndarray = CLS) -> tuple[object, ...]:
    """A file of embeddings, its rows' ids apart: what `fm-store import` takes."""
    np.save(tmp_path / "x.npy", values)
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    return (tmp_path / "x.npy", "--ids", tmp_path / "ids.txt")


def test_the_same_file_with_its_ids_in_another_order_is_another_import(path: Path, tmp_path: Path) -> None:
    select = ("--dataset", "ami-br", "--model", "mine", "--store", path)
    call("import", *npy(tmp_path, IDS), *select)
    swapped = [IDS[1], IDS[0], *IDS[2:]]
    with pytest.raises(UserError, match=r"(?s)ids_digest.*`overwrite=True`"):
        call("import", *npy(tmp_path, swapped), *select)
    np.testing.assert_array_equal(FeatureStore.open(path).read("ami-br", model="mine", view="full"), CLS)
    call("import", *npy(tmp_path, swapped), "--overwrite", *select)
    np.testing.assert_array_equal(
        FeatureStore.open(path).read("ami-br", model="mine", view="full"), CLS[[1, 0, *range(2, N)]]
    )


def test_every_part_of_an_import_is_in_its_fingerprint(path: Path, tmp_path: Path) -> None:
    def imported(model: str, *, dataset: str = "ami-br", ids: list[str] = IDS, values: np.ndarray = CLS) -> str:
        call("import", *npy(tmp_path, ids, values=values), "--dataset", dataset, "--model", model, "--store", path)
        return next(entry.fingerprint for entry in FeatureStore.open(path).entries(dataset, model))

    store = FeatureStore.open(path)
    others = make_samples(IDS, [0] * N, sha256=[f"other {i}" for i in range(N)])  # other images of the same names
    store.put_samples("others", others, attrs={})
    found = [
        imported("a"),
        imported("b", ids=IDS[::-1]),
        imported("c", values=CLS + 1),
        imported("d", dataset="others"),
    ]
    assert len(set(found)) == 4
    assert imported("again") == found[0]


@pytest.mark.parametrize("format", ["hdf5", "npz"])
def test_an_export_says_of_every_row_what_the_table_says(tmp_path: Path, format: str) -> None:
    """No two columns, and hardly two rows, are alike here."""
    store = FeatureStore.open_or_create(tmp_path / "store")
    table = make_samples(
        IDS,
        [int(i % 3 == 0) for i in range(N)],
        sha256=[f"digest {i}" for i in range(N)],
        group=[f"slide {i // 7}" for i in range(N)],
        split=[("train", "test", "")[i % 3] for i in range(N)],
        votes=np.arange(4 * N, dtype=np.int8).reshape(N, 4) % 3 - 1,
        domain=[f"domain {i % 5}" for i in range(N)],
    )
    store.put_samples("d", table, attrs={})
    for view, scale in (("center32", 2), ("center64", 1), ("full", 3)):  # only the middle one is asked for
        parts = {"model": "m", "view": view}
        writer = store.begin(
            "d", model="m", view=view, poolings={"cls": 3, "mean": 3}, card_pooling="mean", parts=parts
        )
        for rows in writer.missing():
            part = scale * CLS[rows.start : rows.stop]
            writer.write(rows, {"cls": part, "mean": -part})
    out = tmp_path / "out"
    select = ("--dataset", "d", "--model", "m", "--view", "center64", "--store", store.path)
    call("export", *select, "--format", format, "--out", out)
    if format == "npz":
        with np.load(out, allow_pickle=False) as file:
            found, record = dict(file), json.loads(str(file["record"]))
    else:
        with h5py.File(out) as file:
            found = {
                name: node.asstr()[...] if h5py.check_string_dtype(node.dtype) else node[...]
                for name, node in file.items()
            }
            record = dict(file.attrs)
    np.testing.assert_array_equal(found["features"], -CLS)
    assert found["ids"].tolist() == IDS
    assert found["labels"].tolist() == table.label.tolist()
    assert found["groups"].tolist() == table.group.tolist()
    assert found["splits"].tolist() == table.split.tolist()
    assert found["domains"].tolist() == table.domain.tolist()
    assert found["votes"].tolist() == table.votes.tolist()
    (entry,) = (entry for entry in store.entries() if entry.view == "center64")
    said = {name: record[name] for name in ("dataset", "model", "view", "pooling", "fingerprint")}
    assert said == {
        "dataset": "d",
        "model": "m",
        "view": "center64",
        "pooling": "mean",
        "fingerprint": entry.fingerprint,
    }
    assert json.loads(record["parts"]) == {"model": "m", "view": "center64"}


# --- more than two classes --------------------------------------------------------------------------------------------

GRADES = ("absent", "mild", "severe")


def add_grades(path: Path) -> None:
    """The patches of `path` under the labels 0, 1, 2, 0, ..., the last as its two raters say."""
    store = FeatureStore.open(path)
    labels = [i % 3 for i in range(N)]
    votes = np.array([labels, labels], np.int8).T
    table = make_samples(IDS, labels, sha256=[str(i) for i in range(N)], votes=votes)
    store.put_samples("grades", table, attrs={"label_names": list(GRADES), "ordinal": True})
    writer = store.begin("grades", model="m", view="full", poolings={"cls": 3}, card_pooling="cls", parts={})
    for rows in writer.missing():
        writer.write(rows, {"cls": CLS[rows.start : rows.stop]})


def test_info_counts_every_class(path: Path) -> None:
    before = as_json("info", "--store", path)["datasets"]
    assert "positive or classes" not in call("info", "--store", path).stdout
    add_grades(path)
    by_name = {of["name"]: of for of in as_json("info", "--store", path)["datasets"]}  # type: ignore[attr-defined]
    grades, two = by_name["grades"], by_name["ami-br"]
    assert [two] == before
    assert (grades["classes"], grades["ordinal"]) == ({"absent": 24, "mild": 23, "severe": 23}, True)
    assert "positive" not in grades
    assert (two["positive"], two["negative"]) == (35, 35)
    assert "classes" not in two
    shown = call("info", "--store", path).stdout
    for text in ("absent 24", "mild 23", "severe 23", "35 (50.0%)"):
        assert text in shown


@pytest.mark.parametrize(("format", "suffix"), [("hdf5", "h5"), ("npz", "npz"), ("anndata", "h5ad")])
def test_exports_say_what_labels_of_several_classes_mean(path: Path, tmp_path: Path, format: str, suffix: str) -> None:
    add_grades(path)
    for dataset, model in (("grades", "m"), ("ami-br", "uni")):
        out = tmp_path / f"{dataset}.{suffix}"
        call("export", "--store", path, "--dataset", dataset, "--model", model, "--format", format, "--out", out)
        if format == "hdf5":
            with h5py.File(out) as file:
                record, labels = dict(file.attrs), file["labels"][...]
        elif format == "npz":
            with np.load(out) as file:
                record, labels = json.loads(str(file["record"])), file["labels"]
        else:
            data = anndata.read_h5ad(out)
            record, labels = dict(data.uns), data.obs["label"].to_numpy()
        if dataset == "ami-br":
            assert "label_names" not in record  # as ever
        else:
            names = json.loads(record["label_names"])
            assert [names[label] for label in labels.tolist()] == [GRADES[i % 3] for i in range(N)]
    call("import", tmp_path / f"grades.{suffix}", "--store", path, "--dataset", "grades", "--model", "back")
    assert FeatureStore.open(path).class_names("grades") == GRADES


@pytest.mark.parametrize("numbers", [False, True])
def test_a_table_names_or_numbers_several_classes(tmp_path: Path, numbers: bool) -> None:
    cells = [str(3 - i % 3) if numbers else GRADES[i % 3] for i in range(N)]
    (tmp_path / "t.csv").write_text("id,label\n" + "".join(f"{i},{c}\n" for i, c in zip(IDS, cells, strict=True)))
    np.savez(tmp_path / "x.npz", features=CLS, ids=IDS)
    select = ("import", tmp_path / "x.npz", "--store", tmp_path / "s", "--dataset", "d", "--model", "m")
    done = call(*select, "--table", tmp_path / "t.csv")
    assert ("1 (0), 2 (1) and 3 (2)" if numbers else "absent (0), mild (1) and severe (2)") in done.stderr
    store = FeatureStore.open(tmp_path / "s")
    names = store.class_names("d")
    assert [names[label] for label in store.samples("d").label] == cells
    order = "3,2,1" if numbers else "severe,mild,absent"
    again = call(*select, "--table", tmp_path / "t.csv", "--classes", order, "--ordinal", "--overwrite")
    assert "d: same patches, but labels, classes" in again.stderr
    assert "Its classes were " in again.stderr
    names = store.class_names("d")
    assert (names, store.dataset_attrs("d")["ordinal"]) == (tuple(order.split(",")), True)
    assert [names[label] for label in store.samples("d").label] == cells
    assert store.samples("d").label.tolist() == [i % 3 if numbers else 2 - i % 3 for i in range(N)]
    for options, message in (
        (("--classes", "absent,mild"), "`classes` is about the labels of a `table`"),
        (("--ordinal",), "`ordinal` is about the labels of a `table`"),
    ):
        with pytest.raises(UserError, match=message):
            call(*select, *options)
