"""Do patches load with the right labels, splits, slides and votes, and is every bad input one clear message?"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from extract import benchmark, images
from extract.datasets import DATASETS, load_dataset, load_patches
from extract.table1 import table1
from features.console import UserError
from features.labels import class_labels, compare_classes
from features.samples import audit

# --- helpers ----------------------------------------------------------------------------------------------------------


def write_patch(path: Path, seed: int = 0, mode: str = "RGB", size: int = 8, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    folder = tmp_path / "my patches"
    for number in range(1, 12):
        write_patch(folder / ("Atypical" if number % 3 == 0 else "Normal") / f"{number}.png", seed=number)
    return folder


def write_csv(path: Path, *rows: tuple[object, ...]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_16_bit_rgb() -> bytes:
    rows = b"".join(b"\0" + b"\x12\x34" * 12 for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_patch_table_in_natural_order(two_classes: Path) -> None:
    dataset = load_dataset(str(two_classes))
    assert dataset.name == "my-patches"
    assert dataset.label_names == ("Normal", "Atypical")
    assert dataset.samples.id.tolist() == [
        *(f"Atypical/{n}.png" for n in (3, 6, 9)),
        *(f"Normal/{n}.png" for n in (1, 2, 4, 5, 7, 8, 10, 11)),
    ]
    assert dataset.samples.label.tolist() == [1] * 3 + [0] * 8
    assert dataset.mpp is None
    assert set(dataset.samples.group) == set(dataset.samples.split) == {""}


def test_every_patch_decodes_to_its_own_pixels_and_digest(two_classes: Path) -> None:
    dataset = load_dataset(str(two_classes))
    for row, id in enumerate(dataset.samples.id):
        file = two_classes / str(id)
        np.testing.assert_array_equal(dataset.decode(row), np.asarray(Image.open(file)))
        assert dataset.samples.sha256[row] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_decoded_patch_is_writable(two_classes: Path) -> None:
    assert load_dataset(str(two_classes)).decode(0).flags.writeable


def test_hidden_and_desktop_files_are_ignored(two_classes: Path) -> None:
    (two_classes / ".DS_Store").write_text("x")
    (two_classes / "Normal" / "._1.png").write_text("x")
    (two_classes / "Normal" / "Thumbs.db").write_text("x")
    (two_classes / ".cache").mkdir()
    (two_classes / "readme.txt").write_text("beside the classes")
    assert len(load_dataset(str(two_classes)).samples) == 11


def test_patches_may_differ_in_size_and_format(tmp_path: Path) -> None:
    for number, suffix in enumerate((".png", ".jpg", ".tif", ".bmp", ".webp")):
        write_patch(tmp_path / "a" / f"{number}{suffix}", size=8 + number)
        write_patch(tmp_path / "b" / f"{number}{suffix.upper()}", size=9 + number)
    dataset = load_dataset(str(tmp_path))
    assert [dataset.decode(row).shape[0] for row in range(10)] == [8, 9, 10, 11, 12, 9, 10, 11, 12, 13]


def test_an_empty_class_folder_is_named(two_classes: Path) -> None:
    (two_classes / "Unsure").mkdir()
    with pytest.raises(UserError, match="no patches for class Unsure"):
        load_dataset(str(two_classes))


def test_a_strange_file_among_the_patches_is_named(two_classes: Path) -> None:
    (two_classes / "Normal" / "notes.txt").write_text("x")
    (two_classes / "Normal" / "deeper").mkdir()
    with pytest.raises(UserError, match=r"2 entries .* not images \(Normal/deeper, Normal/notes.txt\)"):
        load_dataset(str(two_classes))


def test_images_outside_the_class_folders_are_named(two_classes: Path) -> None:
    write_patch(two_classes / "stray.png")
    with pytest.raises(UserError, match=r"1 images outside them \(stray.png\)"):
        load_dataset(str(two_classes))


def test_a_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no sub-folders"):
        load_dataset(str(tmp_path))


def test_file_names_that_cannot_be_printed_are_refused(two_classes: Path) -> None:
    write_patch(two_classes / "Normal" / "bell\a.png")
    with pytest.raises(UserError, match=r"bell\\x07"):
        load_dataset(str(two_classes))


# --- bad images -------------------------------------------------------------------------------------------------------


def test_all_bad_images_are_reported_at_once_before_any_work(two_classes: Path) -> None:
    normal = two_classes / "Normal"
    whole = (normal / "1.png").read_bytes()
    (normal / "1.png").write_bytes(whole[:-10])
    (normal / "2.png").write_text("this is no picture")
    (normal / "4.png").write_bytes(b"")
    (normal / "5.png").write_bytes(png_16_bit_rgb())
    with pytest.raises(UserError) as caught:
        load_dataset(str(two_classes))
    message = str(caught.value)
    assert message.startswith("4 of 11 patches")
    for line in ("1.png: the file is truncated", "2.png: not an image", "4.png: the file is empty", "5.png: 16 bits"):
        assert line in message


def test_only_the_first_of_many_bad_images_are_named(two_classes: Path) -> None:
    for file in (two_classes / "Normal").iterdir():
        file.write_text("no picture")
    with pytest.raises(UserError, match="8 of 11 patches") as caught:
        load_dataset(str(two_classes))
    assert str(caught.value).count("not an image") == 5
    assert "... and 3 more" in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", ".png"), ("P", ".png"), ("1", ".png"), ("L", ".jpg"), ("1", ".tif"), ("P", ".bmp")]
)
def test_grey_palette_and_bilevel_images_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    file = write_patch(tmp_path / f"patch{suffix}", mode=mode)
    assert images.flaw(file.read_bytes()) is None
    expected = np.asarray(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(images.decode(file.read_bytes(), "patch"), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_is_dropped_only_where_it_is_opaque(tmp_path: Path, mode: str) -> None:
    opaque = write_patch(tmp_path / "opaque.png", mode=mode)
    assert images.flaw(opaque.read_bytes()) is None
    assert images.decode(opaque.read_bytes(), "opaque").shape == (8, 8, 3)
    image = Image.open(opaque)
    image.putpixel((3, 3), (*image.getpixel((3, 3))[:-1], 254))
    image.save(tmp_path / "glass.png")
    assert images.flaw((tmp_path / "glass.png").read_bytes()) == "it has transparent pixels"


def test_a_transparent_palette_colour_is_refused(tmp_path: Path) -> None:
    file = write_patch(
        tmp_path / "glass.png",
        mode="P",
        transparency=Image.open(write_patch(tmp_path / "p.png", mode="P")).getpixel((0, 0)),
    )
    assert images.flaw(file.read_bytes()) == "it has transparent pixels"


def test_16_bit_grey_cmyk_and_float_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "grey16.png")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "grey16.tif")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    write_patch(tmp_path / "cmyk.jpg", mode="CMYK")
    write_patch(tmp_path / "cmyk.tif", mode="CMYK")
    flaws = {file.name: images.flaw(file.read_bytes()) for file in tmp_path.iterdir()}
    assert flaws == {
        "grey16.png": "16 bits per sample",
        "grey16.tif": "16 bits per sample",
        "float.tif": "32 bits per sample",
        "cmyk.jpg": "a CMYK image",
        "cmyk.tif": "a CMYK image",
    }


def test_a_stack_of_images_is_refused(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "stack.png", save_all=True, append_images=pages[1:])
    for name in ("stack.tif", "stack.png"):
        assert images.flaw((tmp_path / name).read_bytes()) == "it holds 2 images"


@pytest.mark.parametrize("side", [5_000, 12_000, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert "more than 16,777,216 pixels" in str(images.flaw(bomb))


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".bmp", ".webp"])
def test_a_truncated_image_is_found_without_its_end_mark(tmp_path: Path, suffix: str) -> None:
    whole = write_patch(tmp_path / f"patch{suffix}", size=64).read_bytes()
    assert images.flaw(whole) is None
    for keep in (0.2, 0.5, 0.9):
        assert images.flaw(whole[: int(len(whole) * keep)]) is not None


def test_corrupt_pixels_behind_a_good_header_name_the_file_when_decoded(two_classes: Path) -> None:
    file = two_classes / "Normal" / "1.png"
    data = file.read_bytes()
    middle = data.index(b"IDAT") + 20
    file.write_bytes(data[:middle] + bytes(40) + data[middle + 40 :])
    dataset = load_dataset(str(two_classes))
    row = dataset.samples.id.tolist().index("Normal/1.png")
    with pytest.raises(UserError, match=r"Normal/1\.png cannot be used: its pixel data is damaged"):
        dataset.decode(row)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_never_escape_as_another_exception(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in (".png", ".jpg", ".tif", ".bmp", ".webp"):
        whole = np.frombuffer(write_patch(tmp_path / f"patch{suffix}", size=16).read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(whole), 200), 4)] = rng.integers(0, 256, 4)
            if images.flaw(damaged.tobytes()) is None:
                with contextlib.suppress(UserError):
                    assert images.decode(damaged.tobytes(), "patch").dtype == np.uint8


def test_a_patch_that_vanishes_is_named_when_decoded(two_classes: Path) -> None:
    dataset = load_dataset(str(two_classes))
    (two_classes / "Atypical" / "3.png").unlink()
    with pytest.raises(UserError, match=r"3\.png cannot be read \(No such file"):
        dataset.decode(0)


def test_decoding_is_thread_safe(two_classes: Path) -> None:
    dataset = load_dataset(str(two_classes))
    expected = [dataset.decode(row) for row in range(11)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(dataset.decode, [row % 11 for row in range(330)]))
    assert all((patch == expected[n % 11]).all() for n, patch in enumerate(found))


# --- classes ----------------------------------------------------------------------------------------------------------


def test_the_class_named_atypical_is_positive_in_any_case() -> None:
    assert class_labels(["zebra", "ATYPICAL"], None) == ([0, 1], ("zebra", "ATYPICAL"))


def test_zero_and_one_keep_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert class_labels(["1", "0", "1"], None) == ([1, 0, 1], ("0", "1"))
    assert capsys.readouterr().err == ""


def test_otherwise_the_last_class_is_positive_and_this_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert class_labels(["stroma", "tumour"], None) == ([0, 1], ("stroma", "tumour"))
    assert "'tumour'" in capsys.readouterr().err


def test_positive_names_the_class_against_the_rest() -> None:
    assert class_labels(["a", "b", "c"], "b") == ([0, 1, 0], ("not b", "b"))
    assert class_labels(["a", "b"], "a") == ([1, 0], ("b", "a"))


@pytest.mark.parametrize(
    ("classes", "positive", "message"),
    [
        ([f"c{k}" for k in range(63)], None, "found 63 classes .*expected at most 62"),
        (["a", "a"], None, r"found one class \(a\) and cannot tell whether it is the positive one"),
        (["mitosis", "other"], "mitoses", "Did you mean mitosis"),
    ],
)
def test_unclear_classes_are_refused(classes: list[str], positive: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        class_labels(classes, positive)


@pytest.mark.parametrize("form", ["folder", "csv", "npz", "hdf5", "numbers"])
def test_several_classes_come_from_every_form_in_the_order_given(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["grade 3", "grade 1", "grade 10", "grade 1", "grade 3"]
    order: tuple[str, ...] = ("grade 1", "grade 3", "grade 10")
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    if form == "folder":
        for k, name in enumerate(names):
            write_patch(tmp_path / "set" / name / f"{k}.png", k)
        path = tmp_path / "set"
    elif form == "csv":
        for k in range(5):
            write_patch(tmp_path / f"{k}.png", k)
        path = write_csv(tmp_path / "t.csv", ("path", "label"), *((f"{k}.png", name) for k, name in enumerate(names)))
    else:
        order = ("1", "3", "10")
        y = np.array([3, 1, 10, 1, 3], dtype=np.float32 if form == "numbers" else np.int64)
        path = tmp_path / ("x.npz" if form == "npz" else "x.h5")
        if form == "npz":
            np.savez(path, x=x, y=y)
        else:
            write_hdf5(path, x=x, y=y)
    dataset = load_dataset(str(path))
    named = [dataset.label_names[k] for k in dataset.samples.label]
    expected = sorted(names, key=lambda name: int(name.split()[1])) if form == "folder" else names
    assert named == (expected if form in ("folder", "csv") else [name.split()[1] for name in names])
    assert dataset.label_names == order  # 10 after 3
    assert not dataset.ordinal
    assert f"{order[1]} (1) and {order[2]} (2)" in capsys.readouterr().err
    turned = load_dataset(str(path), order=order[::-1], ordinal=True)
    assert (turned.label_names, turned.ordinal) == (order[::-1], True)
    assert [turned.label_names[k] for k in turned.samples.label] == named
    assert capsys.readouterr().err == ""
    test = load_dataset(str(path), classes=(*order[1:], "other", order[0]))
    assert [test.label_names[k] for k in test.samples.label] == named
    assert load_dataset(str(path), ordinal=True).ordinal  # their numbers say which is more
    rest = load_dataset(str(path), positive=order[1])
    assert rest.label_names == (f"not {order[1]}", order[1])
    assert rest.samples.label.tolist() == [int(name == order[1]) for name in named]


def test_a_dataset_of_several_classes_shows_each() -> None:
    shown = repr(load_dataset("demo-phases"))
    assert shown.startswith("PatchDataset('demo-phases', 400 patches: 68 scattered, 117 plate, 50 ring, ")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("mild", "severe", "clear"), {"ordinal": True}, "which class is more: found clear, mild, severe.*`classes`"),
        (("grade 1", "grade 2"), {"ordinal": True}, "`ordinal` is for three and more classes; found two"),
        (("a", "b", "c"), {"ordinal": True, "positive": "b"}, "for three and more classes; found two, 'not b' and 'b'"),
        (("a", "b", "c"), {"order": ("a", "b")}, r"set: `classes` leaves out c"),
        (("a", "B", "b"), {}, "'B' and 'b' differ in case only"),
        ([f"{k}" for k in range(63)], {}, "set: found 63 classes"),
    ],
)
def test_classes_of_a_path_that_are_unclear_are_one_message(
    tmp_path: Path, names: tuple[str, ...], options: dict[str, object], message: str
) -> None:
    for k, name in enumerate(names):
        write_patch(tmp_path / "set" / name / "1.png", k)
    with pytest.raises(UserError, match=message):
        load_dataset(str(tmp_path / "set"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["demo", "demo-phases"])
def test_the_classes_of_a_known_dataset_are_its_own(name: str) -> None:
    dataset = load_dataset(name)
    assert load_dataset(name, order=dataset.label_names).label_names == dataset.label_names
    with pytest.raises(UserError, match=rf"{name} has the classes .* \(1\).*: leave `classes` out"):
        load_dataset(name, order=dataset.label_names[::-1])
    with pytest.raises(UserError, match="which are no grades: leave `ordinal` out"):
        load_dataset(name, ordinal=True)
    with pytest.raises(UserError, match="leave `positive` out"):
        load_dataset(name, positive="plate")


def test_known_datasets_of_other_classes_are_other_tasks() -> None:
    """So none is scored, unless asked for, by a model of another; and only those with patches of their own are."""
    for a in DATASETS.values():
        for b in DATASETS.values():
            same = a.label_names == b.label_names
            assert compare_classes(a.label_names, b.label_names) == ("same" if same else "other")
    assert [name for name, record in DATASETS.items() if record.of] == ["demo-phases", "ami-br-phases"]
    assert not any(record.folder for record in DATASETS.values() if record.of)
    with pytest.raises(UserError, match="no class is in both"):
        load_dataset("demo-phases", classes=("Normal", "Atypical"))


# --- CSV --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    for number in range(4):
        write_patch(tmp_path / "png" / f"{number}.png", seed=number)
    return tmp_path


def test_a_csv_gives_labels_groups_splits_and_domains_in_its_order(patches: Path) -> None:
    table = write_csv(
        patches / "Cohort A.csv",
        ("label", "path", "group", "split", "domain", "remark"),
        ("Normal", "png/2.png", "s1", "train", "lab 1", "any, thing"),
        ("Atypical", "png/0.png", "s2", "test", "lab 2", ""),
        ("Normal", "png/1.png", "", "", "", ""),
    )
    dataset = load_dataset(str(table))
    assert dataset.name == "cohort-a"
    assert dataset.samples.id.tolist() == ["png/2.png", "png/0.png", "png/1.png"]
    assert dataset.samples.label.tolist() == [0, 1, 0]
    assert dataset.samples.group.tolist() == ["s1", "s2", ""]
    assert dataset.samples.split.tolist() == ["train", "test", ""]
    assert dataset.samples.domain.tolist() == ["lab 1", "lab 2", ""]
    np.testing.assert_array_equal(dataset.decode(0), np.asarray(Image.open(patches / "png" / "2.png")))


def test_a_csv_may_name_its_patches_itself(patches: Path) -> None:
    table = write_csv(patches / "t.csv", ("id", "path", "label"), ("x", "png/0.png", "0"), ("y", "png/1.png", "1"))
    assert load_dataset(str(table)).samples.id.tolist() == ["x", "y"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("path", "stage"), ("png/0.png", "a")], "lacks the column label; it has path, stage"),
        ([("where", "label"), ("png/0.png", "a")], "lacks the column path; it has where, label"),
        ([("path", "label")], "no rows below its header"),
        ([("path", "label"), ("png/0.png", "a"), ("png/9.png", "b")], r"does not exist in 1 of 2 rows \(line 3: png/9"),
        (
            [("path", "label"), ("png/0.png", "a"), ("png/1.png", " ")],
            r"no label in 1 of 2 rows \(line 3: png/1.png \(empty\)\)",
        ),
        ([("path", "label"), ("", "a"), ("png/1.png", "b")], r"an empty path in 1 of 2 rows \(line 2: \(empty\)"),
        ([("path", "label"), ("png/0.png", "a"), ("png/0.png", "b")], "more than once in 2 of 2 rows"),
        ([("id", "path", "label"), ("x", "png/0.png", "a"), ("x", "png/1.png", "b")], r"more than once .*line 2: x"),
        ([("id", "path", "label"), ("x", "png/0.png", "a"), ("y", "./png/0.png", "b")], "a path that occurs more"),
        ([("path", "label", "split"), ("png/0.png", "a", "2"), ("png/1.png", "b", "")], r"unknown split in 1 of 2"),
        ([("path", "label"), ("png/0.png", "a", "more"), ("png/1.png", "b")], "header's 2 cells"),
        ([("path", "label"), ("png/0.png", "a"), ("png/1.png", "a")], r"t.csv: found one class \(a\)"),
    ],
)
def test_a_wrong_csv_is_one_message_naming_the_line(
    patches: Path, rows: list[tuple[object, ...]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(str(write_csv(patches / "t.csv", *rows)))


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 3000 + "y", "x" * 100_000])
def test_a_path_that_no_file_system_takes_is_a_file_that_does_not_exist(patches: Path, path: str) -> None:
    table = write_csv(patches / "t.csv", ("path", "label"), ("png/0.png", "a"), (path, "b"))
    for load in (lambda: load_dataset(str(table)), lambda: load_patches(table)):
        with pytest.raises(UserError, match="not exist"):
            load()


def test_a_pipe_or_a_device_or_a_huge_file_is_no_patch(two_classes: Path, tmp_path: Path) -> None:
    other = two_classes / "Normal" / "other.png"
    for make, said in (
        (lambda: os.mkfifo(other), "not a regular file"),
        (lambda: other.symlink_to("/dev/zero"), "not a regular file"),
        (lambda: os.truncate(os.open(other, os.O_CREAT | os.O_WRONLY), 1 << 40), "bytes are too many for a patch"),
    ):
        make()
        with pytest.raises(UserError, match=said):
            load_dataset(str(two_classes))
        other.unlink()


def test_a_csv_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"path,label\n\x81\xffpath\0,0\n")
    with pytest.raises(UserError, match=r"t\.csv, line 2: bytes that are no text"):
        load_dataset(str(tmp_path / "t.csv"))


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def write_hdf5(path: Path, **arrays: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


def test_patchcamelyon_files_are_read_as_they_ship(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
    y = (np.arange(12) % 2).astype(np.uint8).reshape(12, 1, 1, 1)
    path = write_hdf5(tmp_path / "camelyonpatch_level_2_split_train_x.h5", x=x)
    write_hdf5(tmp_path / "camelyonpatch_level_2_split_train_y.h5", y=y)
    dataset = load_dataset(str(path))
    assert dataset.samples.id.tolist() == [f"{row:02d}" for row in range(12)]
    assert dataset.samples.label.tolist() == [0, 1] * 6
    assert dataset.label_names == ("0", "1")
    assert dataset.samples.sha256[3] == hashlib.sha256(x[3].tobytes()).hexdigest()
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.extend((dataset.decode(r) == x[r]).all() for r in range(12)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 48


def test_an_hdf5_file_may_hold_images_and_labels_together(tmp_path: Path) -> None:
    x = np.zeros((3, 4, 5, 3), dtype=np.uint8)
    path = write_hdf5(tmp_path / "set.hdf5", x=x, y=np.array([b"Normal", b"Atypical", b"Normal"]))
    dataset = load_dataset(str(path))
    assert dataset.samples.label.tolist() == [0, 1, 0]
    assert dataset.decode(2).shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, r"images is float64 of shape \(3,\)"),
        ({"x": np.zeros((3, 4, 4, 3), np.uint8)}, r"has images in 'x' and no labels \(it has x\)"),
        ({"x": np.zeros((3, 4, 4, 3), np.float32), "y": np.arange(3)}, "x is float32"),
        ({"x": np.zeros((3, 2, 4, 4), np.uint8), "y": np.arange(3)}, r"of shape \(3, 2, 4, 4\)"),
        ({"stack": np.zeros((3, 2, 4, 4), np.uint8), "y": np.arange(3)}, r"no dataset of images \(it has stack, y\)"),
        ({"x": np.zeros((3, 4, 4, 3), np.uint8), "y": np.arange(2)}, "y holds 2 values for 3 patches"),
    ],
)
def test_a_wrong_hdf5_file_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(str(write_hdf5(tmp_path / "set.h5", **arrays)))


def test_a_file_that_is_no_hdf5_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set.h5").write_text("no")
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        load_dataset(str(tmp_path / "set.h5"))


# --- names ------------------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match=r"'amibr'.* Did you mean ami-br.*Known datasets: demo, ami-br"):
        load_dataset("amibr")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "patches.zip").write_text("x")
    with pytest.raises(UserError, match=r"patches\.zip is no file of patches\. Expected a folder"):
        load_dataset(str(tmp_path / "patches.zip"))


def test_a_path_never_takes_the_name_of_a_known_dataset(tmp_path: Path) -> None:
    for label in ("Atypical", "Normal"):
        write_patch(tmp_path / "AMi-Br" / label / "1.png")
    assert load_dataset(str(tmp_path / "AMi-Br")).name == "my-ami-br"


def test_a_known_dataset_keeps_its_positive_class(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="positive class Atypical"):
        load_dataset("ami-br", data=tmp_path, positive="Normal")


def test_a_data_folder_without_the_dataset_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no folder AMi-Br.*clone of the AMi-Br_Benchmark"):
        load_dataset("ami-br", data=tmp_path)


def test_the_data_folder_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MITOFM_DATA", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path} has no folder AtNorM-Br"):
        load_dataset("atnorm-br")


# --- the layout of the benchmark, in small ----------------------------------------------------------------------------


@pytest.fixture
def small_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four patches of AMi-Br, three of AtNorM-MD, two of AtNorM-Br, and records that expect them."""
    data = tmp_path / "clone"
    names = ["MIDOG21_7", "MIDOG21_10", "TUPAC16_3", "TUPAC16_20"]
    for seed, name in enumerate(names):
        write_patch(data / "AMi-Br" / ("Atypical" if seed % 2 else "Normal") / f"{name}.png", seed)
    votes = {"MIDOG21_7": "FFF", "MIDOG21_10": "TTF", "TUPAC16_3": "FFT", "TUPAC16_20": "TTT"}
    slides = {"MIDOG21_7": "001.tiff", "MIDOG21_10": "001.tiff", "TUPAC16_3": "01.tif", "TUPAC16_20": "02.tif"}
    spelled = {"T": "True", "F": "False"}
    rows = [
        (slides[n], *n.split("_"), *(spelled[v] for v in votes[n]), spelled["FT"[votes[n].count("T") > 1]])
        for n in names
    ]
    experts = ("expert1_atypical", "expert2_atypical", "expert3_atypical", "majority_atypical")
    write_csv(data / "AMI-BR.csv", ("slide", "dataset", "uid", *experts), *rows)
    train = [("MIDOG21_7.png", "Normal"), ("MIDOG21_10.png", "Atypical")]
    write_csv(data / "amibr_train_split.csv", ("dataset_uid", "final_label"), *train)
    for number, label in ((1, "Normal"), (44, "Atypical"), (190, "Normal")):
        write_patch(data / "AtNorM-MD" / label / f"{number}.png", number)
    write_csv(
        data / "AtNorM-MD_expert_votes.csv",
        ("Filename", *(f"Expert_{n}" for n in range(1, 6)), "Majority"),
        ("1.png", *["Normal"] * 6),
        ("44.png", *["Normal"] * 2, *["Atypical"] * 4),
        ("190.png", *["Normal"] * 6),
    )
    write_patch(data / "AtNorM-Br" / "Atypical" / "1.png", 100)
    write_patch(data / "AtNorM-Br" / "Normal" / "2.png", 100)
    for name, atypical, normal in (("ami-br", 2, 2), ("atnorm-md", 1, 2), ("atnorm-br", 1, 1)):
        record = DATASETS[name]
        size = sum(file.stat().st_size for file in (data / record.folder).rglob("*.png"))
        small = replace(record, n_atypical=atypical, n_normal=normal, n_bytes=size, digest=None)
        monkeypatch.setitem(DATASETS, name, small)
    return data


def test_ami_br_joins_slides_splits_votes_and_sources(small_clone: Path) -> None:
    samples = load_dataset("ami-br", data=small_clone).samples
    assert samples.id.tolist() == [
        "Atypical/MIDOG21_10.png",
        "Atypical/TUPAC16_20.png",
        "Normal/MIDOG21_7.png",
        "Normal/TUPAC16_3.png",
    ]
    assert samples.split.tolist() == ["train", "test", "train", "test"]
    assert samples.group.tolist() == ["001.tiff", "02.tif", "001.tiff", "01.tif"]
    assert samples.domain.tolist() == ["MIDOG21", "TUPAC16", "MIDOG21", "TUPAC16"]
    assert samples.votes.tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1]]


def test_atnorm_md_is_all_test_with_slides_and_domains(small_clone: Path) -> None:
    samples = load_dataset("atnorm-md", data=small_clone).samples
    assert samples.id.tolist() == ["Atypical/44.png", "Normal/1.png", "Normal/190.png"]
    assert samples.group.tolist() == ["211", "210", "248"]
    assert samples.domain.tolist() == ["canine lung cancer", "canine lung cancer", "canine lymphoma"]
    assert set(samples.split) == {"test"}
    assert samples.votes.shape == (3, 5)


def test_atnorm_br_is_all_test_without_slides_or_votes(small_clone: Path) -> None:
    samples = load_dataset("atnorm-br", data=small_clone).samples
    assert samples.votes.shape == (2, 0)
    assert set(samples.group) == {""}
    assert set(samples.split) == {"test"}


def test_a_missing_file_of_a_known_dataset_is_counted(small_clone: Path) -> None:
    (small_clone / "AMi-Br" / "Normal" / "MIDOG21_7.png").unlink()
    with pytest.raises(UserError, match="2 patches in Atypical and 1 in Normal; ami-br has 2 and 2"):
        load_dataset("ami-br", data=small_clone)


def test_a_patch_in_the_folder_of_the_wrong_class_is_refused(small_clone: Path) -> None:
    folder = small_clone / "AMi-Br"
    (folder / "Normal" / "MIDOG21_7.png").rename(folder / "Atypical" / "MIDOG21_7.png")
    (folder / "Atypical" / "MIDOG21_10.png").rename(folder / "Normal" / "MIDOG21_10.png")
    with pytest.raises(UserError, match=r"2 patches .* contradicts \(Atypical/MIDOG21_7.png, Normal/MIDOG21_10.png\)"):
        load_dataset("ami-br", data=small_clone)


def test_a_patch_that_no_table_knows_is_refused(small_clone: Path) -> None:
    folder = small_clone / "AMi-Br" / "Normal"
    (folder / "MIDOG21_7.png").rename(folder / "MIDOG21_8.png")
    with pytest.raises(UserError, match=r"1 patches of AMi-Br are in no table \(Normal/MIDOG21_8.png\)"):
        load_dataset("ami-br", data=small_clone)


def test_an_unknown_vote_names_its_line(small_clone: Path) -> None:
    table = small_clone / "AtNorM-MD_expert_votes.csv"
    table.write_text(table.read_text().replace("Normal,Normal,Atypical", "Normal,Normal,Unsure"))
    with pytest.raises(UserError, match=r"line 3: the vote is 'Unsure', expected Atypical or Normal"):
        load_dataset("atnorm-md", data=small_clone)


def test_changed_patches_are_used_and_said(small_clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_dataset("atnorm-br", data=small_clone)
    assert capsys.readouterr().err == ""
    write_patch(small_clone / "AtNorM-Br" / "Normal" / "2.png", size=9)
    load_dataset("atnorm-br", data=small_clone)
    assert "not the published files" in capsys.readouterr().err


def test_table_1_counts_what_is_there(small_clone: Path) -> None:
    demo, ami_br, atnorm_md, atnorm_br = table1(small_clone)
    assert (demo.name, demo.basis, demo.n_slides) == ("demo", "images", 30)
    assert (ami_br.n_total, ami_br.n_atypical, ami_br.atypical_rate) == (4, 2, 0.5)
    assert (ami_br.agreement, ami_br.n_slides, ami_br.domains) == (0.5, 3, {"MIDOG21": 2, "TUPAC16": 2})
    assert atnorm_md.agreement == pytest.approx(2 / 3)
    assert (atnorm_br.agreement, atnorm_br.n_slides) == (None, None)
    assert (atnorm_br.n_duplicate_sets, atnorm_br.n_duplicates, atnorm_br.n_conflicts) == (1, 2, 1)


def test_table_1_hides_no_dataset_behind_a_damaged_one(small_clone: Path) -> None:
    (small_clone / "AMI-BR.csv").write_text("nothing")
    _, ami_br, atnorm_md, _ = table1(small_clone)
    assert ami_br.basis == "record"
    assert "lacks the column" in ami_br.note
    assert atnorm_md.basis == "images"


def test_table_1_needs_neither_images_nor_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MITOFM_CACHE", str(tmp_path))
    monkeypatch.delenv("MITOFM_DATA", raising=False)
    _, ami_br, atnorm_md, atnorm_br = table1()
    assert [summary.basis for summary in (ami_br, atnorm_md, atnorm_br)] == ["record"] * 3
    assert (ami_br.n_total, atnorm_md.n_total, atnorm_br.n_total) == (3_720, 2_107, 746)
    assert not list(tmp_path.iterdir())


def test_other_labels_of_known_patches_are_listed_beside_table_1(tmp_path: Path) -> None:
    from extract.cli import app

    arguments = ["--list-datasets", "--data", str(tmp_path)]
    listed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [of["name"] for of in listed["datasets"]] == ["demo", "ami-br", "atnorm-md", "atnorm-br"]
    demo_phases, ami_br_phases = listed["other_labels"]
    assert (demo_phases["name"], demo_phases["of"], demo_phases["n_total"]) == ("demo-phases", "demo", 400)
    assert (ami_br_phases["of"], ami_br_phases["n_total"]) == ("ami-br", 2_628)
    assert list(ami_br_phases["classes"].items())[:2] == [("prometaphase", 949), ("metaphase", 1_175)]
    shown = " ".join(CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}).stdout.split())
    assert "ami-br-phases" in shown
    assert "prometaphase 949, metaphase 1,175" in shown


def with_phases(data: Path, monkeypatch: pytest.MonkeyPatch, **phases: str) -> None:
    """Give the figures of the small clone the phases of two experts, and the record what is then expected."""
    table = data / "AMI-BR.csv"
    header, *rows = csv.reader(table.read_text().splitlines())
    columns = [phases[f"{row[1]}_{row[2]}"].split("|") for row in rows]
    named = [row + (both if len(both) == 2 else both * 2) for row, both in zip(rows, columns, strict=True)]
    write_csv(table, (*header, "expert1_label", "expert2_label"), *map(tuple, named))
    record = DATASETS["ami-br-phases"]
    expected = dict.fromkeys(record.classes, 0) | {"metaphase": 1, "bipolar asymmetric": 1}
    monkeypatch.setitem(DATASETS, "ami-br-phases", replace(record, classes=expected))


AGREED = {
    "MIDOG21_7": "NMF prometaphase|NMF metaphase",
    "MIDOG21_10": "AMF bipolar assymetric",
    "TUPAC16_3": "NMF metaphase",
    "TUPAC16_20": "AMF other|AMF segregation",
}


def test_phases_of_ami_br_are_what_two_experts_agree_on(small_clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_phases(small_clone, monkeypatch, **AGREED)
    dataset, whole = load_dataset("ami-br-phases", data=small_clone), load_dataset("ami-br", data=small_clone)
    samples = dataset.samples
    assert samples.id.tolist() == ["Atypical/MIDOG21_10.png", "Normal/TUPAC16_3.png"]
    assert [dataset.label_names[k] for k in samples.label] == ["bipolar asymmetric", "metaphase"]
    assert dataset.label_names == tuple(DATASETS["ami-br-phases"].classes)
    assert samples.votes.shape == (2, 0)
    of_whole = whole.samples.select(np.array([0, 3]))
    for column in ("group", "split", "domain", "sha256"):
        np.testing.assert_array_equal(getattr(samples, column), getattr(of_whole, column))
    np.testing.assert_array_equal(dataset.decode(1), whole.decode(3))
    assert (dataset.name, dataset.mpp) == ("ami-br-phases", 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TUPAC16_3": "NMF mataphase"}, "line 4: the label is 'NMF mataphase', expected NMF prometaphase or"),
        ({"TUPAC16_3": "AMF other"}, "line 4: two of three experts say 'AMF other', the majority does not"),
        ({"TUPAC16_3": "NMF ring shape"}, "ami-br-phases has 0 patches of the class metaphase .*, expected 1"),
        ({"MIDOG21_7": "NMF metaphase"}, "has 2 patches of the class metaphase"),
    ],
)
def test_a_table_of_other_phases_is_refused(
    small_clone: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    with_phases(small_clone, monkeypatch, **(AGREED | changes))
    with pytest.raises(UserError, match=message):
        load_dataset("ami-br-phases", data=small_clone)
    assert len(load_dataset("ami-br", data=small_clone).samples) == 4


# --- the real data ----------------------------------------------------------------------------------------------------


def test_the_real_tables_reproduce_table_1(real_data: Path) -> None:
    _, ami_br, atnorm_md, atnorm_br = table1(real_data)
    assert (ami_br.n_total, ami_br.n_atypical, ami_br.n_normal) == (3_720, 832, 2_888)
    assert f"{ami_br.atypical_rate:.2%} {ami_br.agreement:.2%}" == "22.37% 78.17%"
    assert (ami_br.n_slides, ami_br.domains) == (202, {"MIDOG21": 1_721, "TUPAC16": 1_999})
    assert (ami_br.n_duplicates, ami_br.note) == (0, "")
    assert (atnorm_md.n_total, atnorm_md.n_atypical, atnorm_md.n_normal) == (2_107, 219, 1_888)
    assert f"{atnorm_md.atypical_rate:.2%} {atnorm_md.agreement:.2%}" == "10.39% 69.58%"
    assert atnorm_md.n_slides == 60
    assert atnorm_md.domains is not None
    assert len(atnorm_md.domains) == 6
    assert f"{atnorm_md.domains['canine lymphoma'] / 2_107:.1%}" == "46.5%"
    assert (atnorm_br.n_total, atnorm_br.n_atypical, atnorm_br.n_normal) == (746, 128, 618)
    assert f"{atnorm_br.atypical_rate:.2%}" == "17.16%"
    assert (atnorm_br.n_duplicate_sets, atnorm_br.n_duplicates, atnorm_br.n_conflicts) == (27, 62, 2)


def test_the_real_ami_br_has_the_papers_split(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = load_dataset("ami-br", data=real_data).samples
    assert capsys.readouterr().err == ""  # the digest is the published one
    train = samples.split == "train"
    assert (train.sum(), (~train).sum()) == (2_894, 826)
    assert (samples.label[train].sum(), samples.label[~train].sum()) == (648, 184)
    assert (len(set(samples.group[train])), len(set(samples.group[~train]))) == (146, 56)
    assert not audit(samples).split_groups
    assert np.bincount(samples.votes.sum(axis=1)).tolist() == [2_496, 392, 420, 412]
    np.testing.assert_array_equal(samples.votes.sum(axis=1) >= 2, samples.label == 1)


def test_the_real_ami_br_has_the_documented_phases(real_data: Path) -> None:
    dataset, record = load_dataset("ami-br-phases", data=real_data), DATASETS["ami-br-phases"]
    samples = dataset.samples
    assert benchmark.files_digest(samples.id, samples.sha256) == record.digest
    assert sum((real_data / "AMi-Br" / id).stat().st_size for id in samples.id) == record.n_bytes
    assert dict(zip(dataset.label_names, np.bincount(samples.label).tolist(), strict=True)) == record.classes
    atypical = np.char.startswith(samples.id, "Atypical/")
    np.testing.assert_array_equal(atypical, samples.label >= 4)
    assert (atypical.sum(), (~atypical).sum()) == (record.n_atypical, record.n_normal)
    for split, n, slides, counts, of_slides in (
        ("train", 2_042, 139, [737, 920, 131, 27, 87, 22, 22, 96], [118, 120, 52, 12, 43, 16, 13, 39]),
        ("test", 586, 55, [212, 255, 35, 7, 33, 6, 13, 25], [43, 44, 18, 6, 17, 4, 12, 11]),
    ):
        part = samples.select(samples.split == split)
        assert (len(part), len(set(part.group))) == (n, slides)
        assert np.bincount(part.label).tolist() == counts
        assert [len(set(part.group[part.label == k])) for k in range(8)] == of_slides


def test_the_real_atnorm_br_has_its_known_contradictions(real_data: Path) -> None:
    dataset = load_dataset("atnorm-br", data=real_data)
    conflicts = {frozenset(Path(id).stem for id in ids) for ids in audit(dataset.samples).conflicts}
    assert conflicts == {frozenset({"390", "391", "398", "404", "410"}), frozenset({"428", "425"})}
    assert dataset.decode(0).shape == (128, 128, 3)


def test_the_real_atnorm_md_votes_are_consistent(real_data: Path) -> None:
    figures = benchmark._atnorm_md_figures(real_data)
    votes = np.array([figure.votes for figure in figures.values()]).sum(axis=1)
    assert np.bincount(votes).tolist() == [1_407, 364, 117, 83, 77, 59]
    assert [figure.label for figure in figures.values()] == (votes >= 3).astype(int).tolist()


def test_two_ways_to_one_file_are_one_patch(patches: Path) -> None:
    rows = (("x", "png/0.png", "a"), ("y", "png/../png/0.png", "b"))
    table = write_csv(patches / "t.csv", ("id", "path", "label"), *rows)
    with pytest.raises(UserError, match="a path that occurs more than once in 2 of 2 rows"):
        load_dataset(str(table))


@pytest.mark.parametrize(("n", "first", "last"), [(2, "0", "1"), (10, "0", "9"), (11, "00", "10"), (100, "00", "99")])
def test_rows_of_an_hdf5_file_are_numbered_as_wide_as_the_last(tmp_path: Path, n: int, first: str, last: str) -> None:
    pixels = np.arange(n * 12, dtype=np.int64).reshape(n, 2, 2, 3).astype(np.uint8)
    dataset = load_dataset(str(write_hdf5(tmp_path / "all.h5", x=pixels, y=np.arange(n) % 2)))
    assert (dataset.samples.id[0], dataset.samples.id[-1]) == (first, last)
