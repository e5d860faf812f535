"""Are people's own files read as they are meant: folders of splits, arrays, paths, names, turned images?"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from extract.datasets import load_dataset, load_patches, parse_source, require_distinct_names
from features.console import UserError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
Y = np.array([0, 1, 1, 0, 1, 0])


def write_patch(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return path


def write_hdf5(path: Path, **arrays: object) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


# --- folders ----------------------------------------------------------------------------------------------------------


def split_folders(folder: Path, *names: str) -> Path:
    for k, name in enumerate(names):
        write_patch(folder / name / "Atypical" / "1.png", 2 * k)
        write_patch(folder / name / "Normal" / "1.png", 2 * k + 1)
    return folder


def test_folders_of_splits_hold_folders_of_classes(tmp_path, capsys):
    samples = load_dataset(str(split_folders(tmp_path / "set", "Train", "test", "val"))).samples
    found = dict(
        zip(samples.id.tolist(), zip(samples.split.tolist(), samples.label.tolist(), strict=True), strict=True)
    )
    assert found == {
        "Train/Atypical/1.png": ("train", 1),
        "Train/Normal/1.png": ("train", 0),
        "test/Atypical/1.png": ("test", 1),
        "test/Normal/1.png": ("test", 0),
        "val/Atypical/1.png": ("train", 1),
        "val/Normal/1.png": ("train", 0),
    }
    assert "2 patches of the validation split count as training" in capsys.readouterr().err


def test_splits_beside_other_folders_are_refused(tmp_path):
    split_folders(tmp_path / "set", "train", "test", "masks")
    with pytest.raises(UserError, match="test, train beside masks: are these splits or classes"):
        load_dataset(str(tmp_path / "set"))


def test_a_folder_of_one_class_needs_to_know_which(tmp_path):
    write_patch(tmp_path / "set" / "tumour" / "1.png")
    with pytest.raises(UserError, match="cannot tell whether it is the positive one"):
        load_dataset(str(tmp_path / "set"))
    assert load_dataset(str(tmp_path / "set"), positive="tumour").samples.label.tolist() == [1]
    assert load_dataset(str(tmp_path / "set"), classes=("normal", "tumour")).samples.label.tolist() == [1]
    assert load_dataset(str(tmp_path / "set"), classes=("tumour", "other")).samples.label.tolist() == [0]


def test_a_class_may_be_renamed_and_one_without_a_name_is_refused(tmp_path):
    for k, name in enumerate(("cancer", "normal")):
        write_patch(tmp_path / "set" / name / "1.png", k)
    renamed = load_dataset(str(tmp_path / "set"), labels={"cancer": "tumor"}, classes=("normal", "tumor"))
    assert renamed.samples.label.tolist() == [1, 0]
    with pytest.raises(UserError, match="cancer is none of them"):
        load_dataset(str(tmp_path / "set"), classes=("normal", "tumor"))
    (tmp_path / "set" / "cancer").rename(tmp_path / "set" / "NA")
    with pytest.raises(UserError, match=r"no label in 1 of 2 rows \(NA/1.png \(NA\)\)"):
        load_dataset(str(tmp_path / "set"))


# --- tables -----------------------------------------------------------------------------------------------------------


def table(folder: Path, *rows: str) -> str:
    for k in range(3):
        write_patch(folder / "p" / f"{k} a.png", k)
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    return str(folder / "t.csv")


def test_rows_without_a_label_are_refused_by_line_or_left_out(tmp_path, capsys):
    path = table(tmp_path, "path,label,group", "p/0 a.png,1,x", "p/1 a.png,NA,x", "p/2 a.png,0,N/A")
    with pytest.raises(UserError, match=r"no label in 1 of 3 rows \(line 3: p/1 a.png \(NA\)\).*skip_unlabelled"):
        load_dataset(path)
    dataset = load_dataset(path, skip_unlabelled=True)
    assert dataset.samples.id.tolist() == ["p/0 a.png", "p/2 a.png"]
    assert dataset.samples.group.tolist() == ["x", ""]  # N/A is no slide
    expected = np.asarray(Image.open(tmp_path / "p" / "2 a.png"))
    np.testing.assert_array_equal(dataset.decode(1), expected)
    whole = load_patches(Path(path))
    assert dataset.samples.sha256.tolist() == [whole.digests()[0], whole.digests()[2]]
    assert "1 of 3 patches have no label and are left out" in capsys.readouterr().err


def test_paths_of_other_systems_are_understood_or_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    uri = (tmp_path / "p" / "1 a.png").as_uri()
    assert "%20" in uri
    good = table(tmp_path, "path,label", "~/p/0 a.png,1", f"{uri},0", f"{tmp_path}/p/2 a.png,1")
    dataset = load_dataset(good)
    for row in range(3):
        np.testing.assert_array_equal(dataset.decode(row), np.asarray(Image.open(tmp_path / "p" / f"{row} a.png")))
    load_dataset(table(tmp_path, "path,label", r"p\0 a.png,1", r"p\1 a.png,0"))
    assert "backslashes in 2 paths are read as slashes" in capsys.readouterr().err
    for foreign in (r"C:\p\1 a.png", r"\\server\p\1 a.png", "https://x.org/1.png", "s3://bucket/1.png"):
        with pytest.raises(UserError, match=r"a path on a Windows drive, the web or a bucket in 1 of 2 rows \(line 3"):
            load_dataset(table(tmp_path, "path,label", "p/0 a.png,1", f"{foreign},0"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tables").mkdir()
    Path(table(tmp_path, "path,label", "p/0 a.png,1", "p/1 a.png,0")).rename(tmp_path / "tables" / "t.csv")
    with pytest.raises(UserError, match="They are there relative to the current folder"):
        load_dataset("tables/t.csv")


def test_predictions_may_be_asked_for_under_the_ids_of_a_table(tmp_path):
    path = table(tmp_path, "sample_id,path", "007,p/0 a.png", "008,p/1 a.png")
    assert load_patches(Path(path)).id == ("007", "008")


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_an_hdf5_file_may_say_more_of_its_patches(tmp_path):
    columns = {
        "slide": ["a", "a", "b", "b", "c", "c"],
        "split": ["train"] * 4 + ["test"] * 2,
        "scanner": list("xyxyxy"),
    }
    path = write_hdf5(tmp_path / "set.h5", images=X, labels=Y, **columns)
    samples = load_dataset(str(path)).samples
    assert samples.label.tolist() == Y.tolist()
    assert samples.group.tolist() == columns["slide"]
    assert samples.split.tolist() == columns["split"]
    assert samples.domain.tolist() == columns["scanner"]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.moveaxis(X, -1, 1), X),  # channels first
        (X[..., :1], np.repeat(X[..., :1], 3, axis=-1)),
        (X[..., 0], np.repeat(X[..., :1], 3, axis=-1)),
    ],
)
def test_other_layouts_of_pixels_give_the_same_pixels(tmp_path, stored, expected):
    dataset = load_dataset(str(write_hdf5(tmp_path / "set.h5", x=stored, y=Y)))
    for row in range(len(X)):
        np.testing.assert_array_equal(dataset.decode(row), expected[row])
    assert dataset.decode(0).flags.writeable


@pytest.mark.parametrize(
    ("labels", "label"), [([0.0, 1.0] * 3, [0, 1] * 3), ([b"Normal", b"Atypical"] * 3, [0, 1] * 3)]
)
def test_labels_of_arrays_may_be_floats_or_bytes(tmp_path, labels, label):
    path = write_hdf5(tmp_path / "set.h5", x=X, y=np.array(labels).reshape(6, 1))
    assert load_dataset(str(path)).samples.label.tolist() == label


@pytest.mark.parametrize("missing", [np.nan, b"NA", b""])
def test_a_missing_label_of_an_array_is_no_class(tmp_path, missing):
    y = np.array([missing, *([0.0, 1.0] if isinstance(missing, float) else [b"a", b"b"]), *[missing] * 3])
    with pytest.raises(UserError, match=r"no label in 4 of 6 rows \(0 \("):
        load_dataset(str(write_hdf5(tmp_path / "set.h5", x=X, y=y)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X, "target": Y, "class": Y}, "class and target, and each could be the label"),
        ({"x": X, "y": Y, "labels": 1 - Y}, "labels and y, and each could be the label"),
        ({"x": X, "images": X, "y": Y}, "images and x, and each could be the images"),
        ({"x": X, "y": Y, "gruop": Y}, "an array 'gruop', nearly the name of a known one"),
    ],
)
def test_arrays_that_could_mean_two_things_are_refused(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        load_dataset(str(write_hdf5(tmp_path / "set.h5", **arrays)))


def test_arrays_that_are_not_used_are_named(tmp_path, capsys):
    path = write_hdf5(tmp_path / "set.h5", images=X, labels=Y, x=np.arange(6), slide=Y, patient=[""] * 6, meta=Y)
    assert load_dataset(str(path)).samples.group.tolist() == [str(y) for y in Y]  # the patients are unknown
    said = capsys.readouterr().err
    assert "using slide as group" in said
    assert "arrays not used: meta, patient, x" in said


def test_splits_of_arrays_may_know_their_groups(tmp_path):
    arrays = {f"{split}_{kind}": values[part] for split, part in (("train", slice(0, 4)), ("validation", slice(4, 6)))
              for kind, values in (("images", X), ("labels", Y), ("slide_id", np.array(list("aabbcc"))))}  # fmt: skip
    np.savez(tmp_path / "set.npz", **arrays)
    samples = load_dataset(str(tmp_path / "set.npz")).samples
    assert samples.group.tolist() == list("aabbcc")
    assert samples.split.tolist() == ["train"] * 6
    for extra, message in (
        ({"external_images": X}, "external_images beside the arrays of the splits"),
        ({"group": Y}, "group beside the arrays of the splits"),
        ({"train_domain": Y[:4]}, "domain is known of some splits only"),
    ):
        np.savez(tmp_path / "set.npz", **arrays, **extra)
        with pytest.raises(UserError, match=message):
            load_dataset(str(tmp_path / "set.npz"))


def test_medmnist_is_read_as_it_ships(tmp_path, capsys):
    arrays = {
        f"{split}_{kind}": values[part][:, None] if kind == "labels" else values[part]
        for split, part in (("train", slice(0, 3)), ("val", slice(3, 4)), ("test", slice(4, 6)))
        for kind, values in (("images", X), ("labels", Y))
    }
    np.savez_compressed(tmp_path / "breastmnist.npz", **arrays)
    dataset = load_dataset(str(tmp_path / "breastmnist.npz"))
    assert dataset.name == "breastmnist"
    assert dataset.samples.id.tolist() == ["train/0", "train/1", "train/2", "val/0", "test/0", "test/1"]
    assert dataset.samples.label.tolist() == Y.tolist()
    assert dataset.samples.split.tolist() == ["train"] * 4 + ["test"] * 2
    for row in range(6):
        np.testing.assert_array_equal(dataset.decode(row), X[row])
    assert "validation split count as training" in capsys.readouterr().err


def test_arrays_of_python_objects_are_never_read(tmp_path):
    np.savez(tmp_path / "set.npz", x=X, y=np.array(["a", None] * 3, dtype=object))
    with pytest.raises(UserError, match=r"cannot be read as \.npz.*without Python objects"):
        load_dataset(str(tmp_path / "set.npz"))


def test_large_compressed_chunks_are_decompressed_once(tmp_path, monkeypatch):
    """All rows in one chunk of 2 MB, which HDF5's own cache of 1 MB does not hold."""
    x = RNG.integers(0, 4, (100, 80, 80, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "set.h5", "w") as file:
        file.create_dataset("x", data=x, chunks=x.shape, compression="gzip")
        file["y"] = np.arange(100) % 2
    opened = []
    original = h5py.File

    def spy(*args, **options):
        opened.append(options.get("rdcc_nbytes", 0))
        return original(*args, **options)

    monkeypatch.setattr(h5py, "File", spy)
    dataset = load_dataset(str(tmp_path / "set.h5"))
    assert max(opened) >= x.nbytes
    np.testing.assert_array_equal(dataset.decode(99), x[99])


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_turned_image_is_turned_back(tmp_path, suffix):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, :8] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    path = tmp_path / "set" / "a" / f"1{suffix}"
    path.parent.mkdir(parents=True)
    lossless = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(path, exif=exif, **lossless)
    write_patch(tmp_path / "set" / "b" / "1.png")
    pixels = load_dataset(str(tmp_path / "set")).decode(0)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() < 10


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_may_be_given_and_no_two_datasets_share_one(tmp_path):
    write_patch(tmp_path / "a" / "patches" / "x" / "1.png", 0)
    write_patch(tmp_path / "a" / "patches" / "y" / "1.png", 1)
    assert load_dataset(f"Site B={tmp_path / 'a' / 'patches'}").name == "site-b"
    require_distinct_names(["a/patches.csv", "b/other.csv", "ami-br"])
    require_distinct_names(["x=a/patches.csv", "b/patches.csv"])
    with pytest.raises(
        UserError, match=r"a/patches.csv and b/patches.csv would both be .*'patches'.*NAME=b/patches.csv"
    ):
        require_distinct_names(["a/patches.csv", "b/patches.csv"])
    with pytest.raises(UserError, match="'ami-br' is a known dataset"):
        load_dataset(f"ami-br={tmp_path}")


def test_names_keep_the_letters_of_every_script(tmp_path):
    names = [parse_source(name)[0] for name in ("数据", "病理", "Снимки-1", "Данные-1", "e\u0301te\u0301")]
    assert names == ["数据", "病理", "снимки-1", "данные-1", "été"]
    with pytest.raises(UserError, match=r"gives no name to a dataset: write NAME=\+\+\+"):
        parse_source("+++")


def test_an_equals_sign_in_a_path_is_no_name(tmp_path):
    assert parse_source("/data/k=5/patches.csv")[0] == "patches"
    (tmp_path / "k=5").mkdir()
    assert parse_source(str(tmp_path / "k=5"))[0] == "k-5"
