"""Are patches around points of slides the right pixels, whatever the file, and is every bad input one clear message?"""

from __future__ import annotations

import builtins
import csv
import hashlib
import json
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from extract import slide_files, slides
from extract.backbones import find_backbone
from extract.datasets import DATASETS, PatchDataset, load_dataset, load_patches
from extract.demo_slides import draw_slides, pyramid, write_slide
from extract.embed import extract_dataset
from extract.points import Points
from extract.prepare import ExtractOptions, fingerprint_parts
from extract.slide_files import open_slide
from extract.slides import Crops, Slides, square_around
from extract.views import parse_view
from features.console import UserError
from features.store import FeatureStore
from finetune import cli, predict_cli
from finetune import run as finetuning
from finetune.predict import predict_paths
from probe.commands import commands, missing_embeddings
from probe.runs import read_run

WIDTH, HEIGHT = 640, 512  # halved and quartered without a rest
LITE = "efficientnet-lite0"


def drawn(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A slide's pixels: coarse spots and fine grain, so that no two squares are alike."""
    rng = np.random.default_rng(seed)
    spots = Image.fromarray(rng.integers(0, 200, (16, 20, 3), dtype=np.uint8)).resize((width, height))
    return np.asarray(spots) + rng.integers(0, 50, (height, width, 3), dtype=np.uint8)


def halved(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).reduce(2))


def around(pixels: np.ndarray, x: int, y: int, size: int) -> np.ndarray:
    """The square around a point; white beyond the border."""
    padded = np.pad(pixels, ((size, size), (size, size), (0, 0)), constant_values=255)
    left, top = x + size - size // 2, y + size - size // 2
    return padded[top : top + size, left : left + size]


def points(slide: list[str], x: list[float], y: list[float], **others: object) -> Points:
    ids = [f"p{row}" for row in range(len(x))]
    return Points(Path("points.csv"), ids, slide, np.array(x, float), np.array(y, float), **others)


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides a and b, uncompressed, with 0.25 um per pixel."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate("ab"):
        write_slide(folder / f"{name}.tif", pyramid(drawn(seed)), compressed=False)
    return folder


# --- pixels -----------------------------------------------------------------------------------------------------------


PLACES = [(320, 256), (64, 64), (601, 77), (33, 480)]


@pytest.mark.parametrize(
    "asked", [{"size": 128}, {"size_um": 32}, {"size_um": 32, "size": 128}], ids=["pixels", "um", "both"]
)
def test_pixels_of_the_native_resolution_are_unchanged(asked, folder):
    x, y = zip(*PLACES, strict=True)
    crops = Crops(Slides(folder, **asked), points(["a"] * 4, x, y))
    for row, place in enumerate(PLACES):
        np.testing.assert_array_equal(crops.read(row), around(drawn(), *place, 128))
    assert crops.mpp == 0.25


def test_half_the_resolution_is_the_next_level_unchanged(folder):
    crops = Crops(Slides(folder, size=64, size_um=32), points(["a"], [320], [256]))
    np.testing.assert_array_equal(crops.read(0), around(halved(drawn()), 160, 128, 64))
    assert crops.mpp == 0.5


def test_between_two_levels_the_finer_one_is_resized_once(folder):
    crops = Crops(Slides(folder, size=48, size_um=32), points(["a"], [320], [256]))
    native = Image.fromarray(around(halved(drawn()), 160, 128, 64))
    np.testing.assert_array_equal(crops.read(0), np.asarray(native.resize((48, 48), Image.Resampling.BICUBIC)))


def test_micrometres_and_pixels_are_the_same_place(folder):
    um = Crops(Slides(folder, size=128), points(["b"], [320 / 4], [100 / 4], unit="um"))
    np.testing.assert_array_equal(um.read(0), around(drawn(1), 320, 100, 128))
    assert (um.points.x[0], um.points.y[0], um.points.unit) == (320, 100, "px")


def test_a_point_at_the_border_sees_white_beyond_it(folder):
    crops = Crops(Slides(folder, size=128), points(["a", "a"], [10, WIDTH], [500, 256]))
    np.testing.assert_array_equal(crops.read(0), around(drawn(), 10, 500, 128))
    assert (crops.read(1)[:, 64:] == 255).all()
    assert not (crops.read(1)[:, :64] == 255).all()


def test_a_pixel_that_is_wider_than_high_is_respected(tmp_path):
    wide = np.asarray(Image.fromarray(drawn()).resize((WIDTH // 2, HEIGHT), Image.Resampling.BOX))
    resolution = {"resolution": (1e4 / 0.5, 1e4 / 0.25), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "wide.tif", wide, tile=(256, 256), photometric="rgb", metadata=None, **resolution)
    crops = Crops(Slides(tmp_path, size_um=32), points(["wide"], [160], [256]))
    region = Image.fromarray(wide[256 - 64 : 256 + 64, 160 - 32 : 160 + 32])
    np.testing.assert_array_equal(crops.read(0), np.asarray(region.resize((128, 128), Image.Resampling.BICUBIC)))
    assert Crops(Slides(tmp_path, size=64), points(["wide"], [160], [256])).mpp is None  # no one resolution


@pytest.mark.parametrize(
    ("um", "level", "width"), [(32, 0, 128), (63, 0, 252), (64, 1, 128), (127, 1, 254), (1000, 2, 1000)]
)
def test_the_coarsest_level_that_is_fine_enough_is_read(um, level, width):
    sizes = [(4000, 4000), (2000, 2000), (1000, 1000)]
    square = square_around(2000, 2000, sizes=sizes, mpp=(0.25, 0.25), slides=Slides(Path(), size=128, size_um=um))
    assert (square.level, square.width) == (level, width)


def test_levels_that_are_rounded_are_halves_all_the_same():
    slides = Slides(Path(), size=64, size_um=32)
    square = square_around(1e5, 1e5, sizes=[(199_999, 199_999), (100_000, 100_000)], mpp=(0.25, 0.25), slides=slides)
    assert (square.left, square.box) == (50_000 - 32, None)  # 100,000 / 199,999 would be one less


def test_a_coarse_slide_is_enlarged_and_that_is_said(folder, capsys):
    crops = Crops(Slides(folder, size=128, size_um=16), points(["a"], [320], [256]))
    enlarged = Image.fromarray(around(drawn(), 320, 256, 64)).resize((128, 128), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(crops.read(0), np.asarray(enlarged))
    assert "1 slides are coarser than the patches" in capsys.readouterr().err


def test_digests_are_those_of_the_pixels_in_the_order_of_the_points(folder, monkeypatch):
    rng = np.random.default_rng(0)
    names, x, y = rng.choice(["a", "b"], 40).tolist(), rng.integers(0, WIDTH, 40), rng.integers(0, HEIGHT, 40)
    monkeypatch.setattr(slides, "_MOST_KEPT", 15 * 32 * 32 * 3)
    monkeypatch.setattr(slides, "_MOST_OPEN", 1)
    crops = Crops(Slides(folder, size=32), points(names, x.tolist(), y.tolist()))
    wanted = [around(drawn("ab".index(n)), *at, 32) for n, *at in zip(names, x.tolist(), y.tolist(), strict=True)]
    assert crops.digests() == [hashlib.sha256(np.ascontiguousarray(patch)).hexdigest() for patch in wanted]
    assert len(crops._kept) == 15  # bounded, and the others are read again
    assert all((crops.read(row) == wanted[row]).all() for row in range(40))
    crops.read(0)[:] = 0  # a copy
    assert (crops.read(0) == wanted[0]).all()


def test_geojson_counts_from_the_corner_that_qupath_shows(folder):
    feature = [{"type": "Feature"}]
    crops = Crops(Slides(folder, size=64), points(["a"], [100], [100], features=feature))
    np.testing.assert_array_equal(crops.read(0), around(drawn(), 100, 100, 64))
    crops._slide(folder / "a.tif").origin = (200, 50)  # as OpenSlide's bounds of an MRXS slide
    placed = crops._place()
    assert (placed[1][0].left, placed[1][0].top) == (300 - 32, 150 - 32)
    assert (placed[0].x[0], placed[0].y[0]) == (300, 150)
    assert placed[0].origin.tolist() == [[200, 50]]


# --- files ------------------------------------------------------------------------------------------------------------


def write_file(path: Path, kind: str) -> Path:
    whole = drawn()
    levels = [whole, halved(whole), halved(halved(whole))]
    options: dict = {"photometric": "rgb", "metadata": None, "resolution": (25_400 / 0.25,) * 2, "resolutionunit": 2}
    if kind == "png":
        Image.fromarray(whole).save(path.with_suffix(".png"))
        return path.with_suffix(".png")
    if kind == "lzw":
        Image.fromarray(whole).save(path, compression="tiff_lzw", dpi=(25_400 / 0.25,) * 2)
        return path
    if kind == "grey":
        tifffile.imwrite(path, whole[..., 0], **(options | {"photometric": "minisblack"}), rowsperstrip=100)
        return path
    if kind == "planar":
        tifffile.imwrite(path, np.moveaxis(whole, 2, 0), **options, planarconfig="separate", rowsperstrip=64)
        return path
    if kind == "ome":
        um = {f"PhysicalSize{axis}{what}": value for axis in "XY" for what, value in (("", 250), ("Unit", "nm"))}
        with tifffile.TiffWriter(path, ome=True) as file:
            file.write(whole, photometric="rgb", rowsperstrip=50, subifds=2, metadata={"axes": "YXS"} | um)
            for level in levels[1:]:
                file.write(level, photometric="rgb", rowsperstrip=50, subfiletype=1)
        return path
    layout = {"tiles": {"tile": (128, 128)}, "strips": {"rowsperstrip": 13}, "deflate": {"compression": "zlib"}}[kind]
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            scaled = options | {"resolution": (25_400 / 0.25 / 2**number,) * 2}
            file.write(level, **scaled, **layout, subfiletype=int(number > 0))
    return path


@pytest.mark.parametrize(
    ("kind", "by", "n_levels"),
    [
        ("tiles", "_OpenSlideFile", 3),
        ("strips", "_TiffFile", 3),
        ("deflate", "_TiffFile", 3),
        ("ome", "_TiffFile", 3),
        ("grey", "_TiffFile", 1),
        ("planar", "_TiffFile", 1),
        ("lzw", "_TiffFile", 1),
        ("png", "_PlainFile", 1),
    ],
)
def test_every_kind_of_file_gives_the_pixels_that_were_written(kind, by, n_levels, tmp_path, monkeypatch):
    monkeypatch.setattr(slide_files, "_SEGMENT_CACHE", 100_000)
    slide = open_slide(write_file(tmp_path / "slide.tif", kind))
    assert (type(slide).__name__, len(slide.sizes), slide.sizes[0]) == (by, n_levels, (WIDTH, HEIGHT))
    assert slide.mpp == (None if kind == "png" else pytest.approx((0.25, 0.25)))
    level = np.repeat(drawn()[..., :1], 3, axis=2) if kind == "grey" else drawn()
    for number in range(n_levels):
        for x, y in ((100, 90), (5, 7), (WIDTH // 2**number - 9, HEIGHT // 2**number - 3)):
            region = slide.read(number, x - 40, y - 40, 80, 80)
            np.testing.assert_array_equal(region, around(level, x, y, 80))
        level = halved(level)


def test_jpeg_is_read_by_openslide_as_pillow_decodes_it(tmp_path):
    write_slide(tmp_path / "slide.tif", pyramid(drawn()))
    slide = open_slide(tmp_path / "slide.tif")
    assert (slide.sizes, slide.mpp) == (((640, 512), (320, 256), (160, 128)), (0.25, 0.25))
    error = np.abs(slide.read(0, 100, 200, 256, 256).astype(int) - drawn()[200:456, 100:356])
    assert 0 < error.mean() < 8  # grain that JPEG of quality 90 loses


@pytest.mark.parametrize(
    ("text", "dots", "unit", "mpp"),
    [
        ('<OME><Pixels ID="p" PhysicalSizeX="0.22" PhysicalSizeY="0.23" SizeX="9">', (), "", (0.22, 0.23)),
        (
            '<Pixels PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.00025" PhysicalSizeYUnit="mm"',
            (),
            "",
            0.25,
        ),
        ("Aperio|AppMag = 40|MPP = 0.2498|Left", (), "", 0.2498),
        ("", (40_000, 20_000), "centimeter", (0.25, 0.5)),
        ("", (101_600, 101_600), "inch", 0.25),
        ("", (72, 72), "inch", None),
        ("", (40_000, 40_000), "none", None),
        ("", (0, 0), "inch", None),
    ],
)
def test_the_resolution_of_a_tiff(text, dots, unit, mpp):
    wanted = (mpp, mpp) if isinstance(mpp, float) else mpp
    found = slide_files._resolution(text, dots, unit)
    assert found == (None if wanted is None else pytest.approx(wanted))


# --- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of three drawn slides, uncompressed."""
    return draw_slides(tmp_path_factory.mktemp("drawn"), n_slides=3, compressed=False)


def as_pngs(dataset: PatchDataset, folder: Path) -> PatchDataset:
    """The same patches as files, in the same order."""
    folder.mkdir()
    rows = ["path,label"]
    for row in range(len(dataset.samples)):
        Image.fromarray(dataset.decode(row)).save(folder / f"{row}.png")
        rows.append(f"{row}.png,{dataset.label_names[dataset.samples.label[row]]}")
    return load_dataset(str(table(folder / "pngs.csv", *rows)))


def test_points_of_drawn_slides_are_the_patches_of_the_demo(demo):
    dataset = load_dataset(f"here={demo}", slides=Slides(demo.parent / "slides", size=128))
    known = load_dataset("demo")
    rows = [known.samples.id.tolist().index(id) for id in dataset.samples.id.tolist()]
    assert len(rows) > 30
    for column in ("sha256", "label", "group", "split", "domain"):
        np.testing.assert_array_equal(getattr(dataset.samples, column), getattr(known.samples, column)[rows])
    np.testing.assert_array_equal(dataset.decode(7), known.decode(rows[7]))
    assert (dataset.name, dataset.label_names, dataset.mpp) == ("here", known.label_names, 0.25)
    (demo.parent / "geojson" / "notes.txt").write_text("other files are left alone")
    geojson = load_dataset(str(demo.parent / "geojson"), slides=Slides(demo.parent / "slides", size_um=32))
    for column in ("sha256", "label", "group", "split", "domain"):
        np.testing.assert_array_equal(getattr(geojson.samples, column), getattr(dataset.samples, column))


@pytest.mark.parametrize("asked", [{"size": 128}, {"size": 64, "size_um": 32}], ids=["native", "half"])
def test_embeddings_of_points_are_those_of_the_same_crops_as_files(asked, demo, tmp_path):
    first = table(tmp_path / "points.csv", *demo.read_text().splitlines()[:13])
    dataset = load_dataset(str(first), slides=Slides(demo.parent / "slides", **asked))
    store = FeatureStore.open_or_create(tmp_path / "embeddings.zarr")
    options = ExtractOptions(views=("full@64",), device="cpu", precision="fp32", batch_size=4, fast=False)
    for patches in (dataset, as_pngs(dataset, tmp_path / "files")):
        extract_dataset(patches, [find_backbone(LITE)], store=store, options=options)
    ours, files = (store.read(name, model=LITE, view="full@64") for name in ("points", "pngs"))
    np.testing.assert_array_equal(ours, files)
    assert len(np.unique(ours, axis=0)) == 12
    assert f"--slides {demo.parent / 'slides'} --size {asked['size']}" in missing_embeddings(store, LITE, ["points"])
    (entry,) = store.entries("points")
    assert entry.parts["crop"]["size"] == asked["size"]
    assert entry.parts["source_mpp"] == (0.25 if asked["size"] == 128 else 0.5)
    assert store.dataset_attrs("points")["slides"]["folder"] == str(demo.parent / "slides")


def test_what_decides_the_pixels_is_in_the_fingerprint(demo):
    backbone = find_backbone(LITE)
    weights = SimpleNamespace(revision="r", sha256="s")

    def parts(**asked):
        slides = Slides(demo.parent / "slides", **asked)
        dataset = PatchDataset("d", load_dataset("demo").samples, ("a", "b"), "", slides.size_um, lambda row: None)
        dataset = PatchDataset(**(vars(dataset) | {"slides": slides}))
        found = fingerprint_parts(
            dataset, backbone, weights, parse_view("full"), precision="fp32", device=SimpleNamespace(type="cpu")
        )
        return json.dumps(found, sort_keys=True)

    asked = [{"size": 128}, {"size_um": 32}, {"size_um": 32, "size": 64}, {"size": 128, "mpp": 0.5}]
    assert len({parts(**one) for one in asked}) == 4
    assert '"padding": "white", "resampling": "bicubic, antialiased"' in parts(size=128)


def test_the_group_of_the_points_is_the_slides_only_where_none_is_known(folder, tmp_path):
    lines = ["slide,x,y,label,patient", "a.tif,100,100,Normal,p1", "b,100,100,Atypical,", "b,200,200,Atypical,p1"]
    dataset = load_dataset(str(table(tmp_path / "t.csv", *lines)), slides=Slides(folder, size=32))
    assert dataset.samples.group.tolist() == ["p1", "b", "p1"]


def test_new_points_need_no_labels(folder, tmp_path):
    path = table(tmp_path / "t.csv", "slide,x,y", "a,100,100", "b,100,90")
    patches = load_patches(path, grouped=True, slides=Slides(folder, size=32))
    np.testing.assert_array_equal(patches.decode(1), around(drawn(1), 100, 90, 32))
    assert patches.columns["group"] == ["a", "b"]


# --- slides by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["A.1", "A.1.tif", "sub/A.1", "sub\\A.1.tif", "elsewhere/A.1"])
def test_a_slide_is_found_with_or_without_suffix_and_in_sub_folders(name, tmp_path):
    for file in ("sub/A.1.tif", "sub/A.tif", "A.1.dat", "B.ome.tif"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert Slides(tmp_path).find([name, "B"]) == {name: tmp_path / "sub/A.1.tif", "B": tmp_path / "B.ome.tif"}


def test_two_slides_of_one_name_are_refused_unless_one_has_it_whole(tmp_path):
    for file in ("x/a.tif", "y/a.tif", "b.svs", "b.tif"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    for name in ("a", "a.tif", "b"):
        with pytest.raises(UserError, match=f"has 2 slides that '{name}' may mean"):
            Slides(tmp_path).find([name])
    assert Slides(tmp_path).find(["b.svs", "y/a"]) == {"b.svs": tmp_path / "b.svs", "y/a": tmp_path / "y/a.tif"}


def test_a_slide_is_found_in_whatever_case_unless_another_is_the_same(tmp_path):
    for file in ("One.TIF", "two.svs"):
        (tmp_path / file).touch()
    assert Slides(tmp_path).find(["one", "TWO"]) == {"one": tmp_path / "One.TIF", "TWO": tmp_path / "two.svs"}
    if (tmp_path / "TWO.svs").exists():
        pytest.skip("this file system knows no case")
    (tmp_path / "TWO.svs").touch()
    found = Slides(tmp_path).find(["one", "two", "TWO.svs"])
    assert found == {"one": tmp_path / "One.TIF", "two": tmp_path / "two.svs", "TWO.svs": tmp_path / "TWO.svs"}
    with pytest.raises(UserError, match="has 2 slides that 'Two' may mean"):
        Slides(tmp_path).find(["Two"])


# --- mistakes ---------------------------------------------------------------------------------------------------------


def message(slides: Slides, **others: object) -> str:
    places = points(**({"slide": ["a"], "x": [100], "y": [100]} | others))
    with pytest.raises(UserError) as caught:
        Crops(slides, places).digests()
    return str(caught.value)


def test_slides_of_one_name_in_two_folders_are_two_groups(tmp_path):
    for patient, grey in (("a", 10), ("b", 200)):
        (tmp_path / patient).mkdir()
        Image.new("RGB", (64, 64), (grey,) * 3).save(tmp_path / patient / "1.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "2.png")
    (tmp_path / "p.csv").write_text("slide,x,y\na/1,32,32\nb/1.png,32,32\n2,32,32\n")
    patches = load_patches(tmp_path / "p.csv", slides=Slides(tmp_path, size=8))
    assert patches.columns["group"] == ["a/1", "b/1", "2"]
    assert patches.points is not None
    assert patches.points.slide == ["a/1.png", "b/1.png", "2.png"]
    assert [int(patches.decode(row).max()) for row in range(3)] == [10, 200, 0]


def test_a_slide_written_in_two_ways_is_refused(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    (tmp_path / "p.csv").write_text("slide,x,y\n1,32,32\n1.png,32,32\n")
    with pytest.raises(UserError, match=r"1\.png in two ways, '1' and '1\.png'"):
        load_patches(tmp_path / "p.csv", slides=Slides(tmp_path, size=8))


def test_a_missing_slide_is_named_with_what_was_looked_for(folder):
    text = message(Slides(folder, size=8), slide=["a", "c", "c"], x=[1, 2, 3], y=[1, 2, 3])
    assert "no slide 'c'; looked for a file of that name" in text
    assert "among 2 slides" in text


def test_a_point_outside_its_slide_is_named(folder):
    text = message(Slides(folder, size=8), slide=["a", "a", "b"], x=[1, 640.5, 3], y=[1, 2, -1])
    assert "a place outside its slide in 2 of 3 rows (p1 at 640.5, 2 on a.tif, 640 x 512, p2 at 3, -1" in text


def test_a_slide_without_resolution_is_refused_unless_mpp_says_it(tmp_path):
    write_slide(tmp_path / "a.tif", pyramid(drawn()), compressed=False, mpp=None)
    text = message(Slides(tmp_path, size_um=32))
    assert "1 of 1 slides" in text
    assert "a.tif" in text
    assert "`mpp`" in text
    assert "`mpp`" in message(Slides(tmp_path, size=32), unit="um")
    assert Crops(Slides(tmp_path, size=32), points(["a"], [9], [9])).mpp is None
    told = Crops(Slides(tmp_path, size_um=16, mpp=0.5), points(["a"], [100], [100]))
    assert np.asarray(told.read(0)).shape == (64, 64, 3)
    np.testing.assert_array_equal(
        told.read(0),
        np.asarray(Image.fromarray(around(drawn(), 100, 100, 32)).resize((64, 64), Image.Resampling.BICUBIC)),
    )


def test_mpp_changes_nothing_about_slides_that_say_their_own(folder):
    crops = Crops(Slides(folder, size_um=32, mpp=1), points(["a"], [320], [256]))
    np.testing.assert_array_equal(crops.read(0), around(drawn(), 320, 256, 128))


def test_without_a_size_it_is_asked_for(folder):
    assert "Give `size`, in pixels of the slide, such as 128, or `size_um`" in message(Slides(folder))


@pytest.mark.parametrize(
    "asked", [{"size": 0}, {"size": 5000}, {"size_um": -1}, {"size_um": float("nan")}, {"size_um": 0.1}, {"mpp": 0}]
)
def test_sizes_out_of_range_are_refused(asked):
    with pytest.raises(UserError, match=next(iter(asked))):
        Slides(Path(), **asked)


def test_a_square_too_large_to_be_read_is_refused(folder):
    assert "too many to be read" in message(Slides(folder, size=128, size_um=50_000))


@pytest.mark.parametrize("kind", ["tiles", "strips", "png"])
@pytest.mark.parametrize("part", [0, 0.02, 0.5])
def test_a_truncated_file_is_one_message(kind, part, tmp_path):
    path = write_file(tmp_path / "a.tif", kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    text = message(Slides(tmp_path, size=128), x=[600], y=[500])
    assert str(path) in text
    assert ("Copy the slide again" in text) or ("copied again" in text) or ("Repair" in text)


@pytest.mark.parametrize("level", [0, 1])
def test_damage_within_a_slide_is_found_before_anything_is_computed(level, tmp_path):
    write_slide(tmp_path / "a.tif", pyramid(drawn()))
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        start, length = file.pages[level].dataoffsets[0], file.pages[level].databytecounts[0]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[start : start + length] = b"\0" * length
    (tmp_path / "a.tif").write_bytes(data)
    sizes = {"size": 128} if level == 0 else {"size": 64, "size_um": 32}
    assert f"{tmp_path / 'a.tif'}: its pixels cannot be read" in message(Slides(tmp_path, **sizes))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tif")
    assert "is not a regular file" in message(Slides(tmp_path, size=8))


def test_a_link_to_a_slide_that_has_moved_is_told(tmp_path):
    (tmp_path / "1.svs").symlink_to(tmp_path / "archive" / "1.svs")
    (tmp_path / "p.csv").write_text("slide,x,y\n1,32,32\n")
    with pytest.raises(UserError, match=r"1\.svs is a link to .*archive/1\.svs, which is not there"):
        load_patches(tmp_path / "p.csv", slides=Slides(tmp_path, size=8))


def test_a_strip_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_files, "_MOST_PIXELS", WIDTH * HEIGHT - 1)
    tifffile.imwrite(tmp_path / "a.tif", drawn(), photometric="rgb", rowsperstrip=HEIGHT)
    assert "too large; convert it" in message(Slides(tmp_path, size=8))
    write_file(tmp_path / "b.tif", "png")
    assert "pixels" in message(Slides(tmp_path, size=8), slide=["b"])


def test_files_that_are_no_slides_are_one_message(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"this is text" * 100)
    assert "cannot be opened as a slide" in message(Slides(tmp_path, size=8))
    (tmp_path / "a.svs").unlink()
    tifffile.imwrite(tmp_path / "a.tif", drawn().astype(np.uint16), photometric="rgb")
    assert "uint16" in message(Slides(tmp_path, size=8))


def test_without_the_packages_one_message_names_the_extra(folder, monkeypatch):
    real = builtins.__import__

    def lacking(name, *rest):
        if name == "openslide":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    assert "pip install 'mitofm[slides]'" in message(Slides(folder, size=8))


def test_a_folder_that_is_none_or_has_no_slides(tmp_path):
    assert "is not there" in message(Slides(tmp_path / "nowhere", size=8))
    (tmp_path / "a.txt").touch()
    assert "holds no slides, only 1 other files" in message(Slides(tmp_path, size=8))
    assert "is no folder" in message(Slides(tmp_path / "a.txt", size=8))


# --- commands ---------------------------------------------------------------------------------------------------------


def run(app, *arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_points_ask_for_slides_and_slides_for_points(folder, demo, tmp_path):
    with pytest.raises(UserError, match="Say with `slides` in which folder the slides are"):
        load_dataset(str(demo))
    from extract import cli as extract_cli

    for arguments, text in (
        (["--dataset", "demo", "--slides", folder], "is for points on slides; found known datasets alone"),
        (["--dataset", "demo", "--size", 128], "`size=128` is for points on slides: say with `slides`"),
        (["--dataset", f"demo,{demo}", "--slides", folder], "Give `size`, in pixels"),
    ):
        done = run(extract_cli.app, *arguments, "--store", tmp_path / "store.zarr")
        assert isinstance(done.exception, UserError)
        assert text in str(done.exception)
    assert not (tmp_path / "store.zarr").exists()


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory) -> tuple[Path, Path]:
    """A fine-tuned run on points, interrupted after its training and gone on with; and the table of the points."""
    place = tmp_path_factory.mktemp("trained")
    lines = demo.read_text().splitlines()
    few = table(place / "points.csv", lines[0], *lines[1::3])
    slides = ("--slides", demo.parent / "slides", "--size", 64, "--size-um", 32)
    small = ("--view", "full@32", "--cv", 2, "--epochs", 1, "--batch-size", 4, "--precision", "fp32", "--no-tta")
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(*_):
            raise UserError("the light went out")

        patch.setattr(finetuning, "score", interrupted)
        done = run(cli.finetune_app, "--train", few, *slides, *small, "--runs", place / "runs")
        assert "the light went out" in str(done.exception)
    (folder,) = (place / "runs").iterdir()
    done = run(cli.finetune_app, "--resume", folder)
    assert done.exit_code == 0, done.exception
    return folder, few


def test_a_training_on_points_goes_on_and_says_how_to_make_it_again(trained, demo):
    folder, few = trained
    record = read_run(folder)
    assert (record.options["size"], record.options["size_um"]) == (64, 32)
    assert record.slides == {"points": {"folder": str(demo.parent / "slides"), "size": 64, "size_um": 32.0}}
    (line,) = commands(record)
    assert f"--train points={few} " in line
    assert "--size 64 --size-um 32.0" in line
    assert f"--slides {demo.parent / 'slides'}" in line
    done = run(cli.finetune_app, "--resume", folder, "--size", 128)
    assert "size 128 instead of 64" in str(done.exception)


def test_a_run_cuts_patches_as_it_was_trained(trained, demo, tmp_path, capsys):
    folder, few = trained
    unsized = Slides(demo.parent / "slides")
    predict_paths(folder, [few], out=tmp_path / "a.csv", slides=unsized)
    assert "Patches have 64 pixels and cover 32 um, as in training." in capsys.readouterr().err
    predict_paths(folder, [few], out=tmp_path / "b.csv", slides=Slides(unsized.folder, 64, 32))
    predict_paths(folder, [few], out=tmp_path / "c.csv", slides=Slides(unsized.folder, 64))
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text() != (tmp_path / "c.csv").read_text()
    done = run(predict_cli.predict_app, folder, demo.parent / "slides", "--slides", unsized.folder, "--size", 64)
    assert "is for points on slides; found" in str(done.exception)


def test_known_datasets_say_how_large_their_patches_are(real_data):
    for name, record in DATASETS.items():
        if record.folder:
            patch = load_dataset(name, data=real_data).decode(0) if (real_data / record.folder).is_dir() else None
            assert patch is None or patch.shape == (record.size, record.size, 3)
    assert load_dataset("demo").decode(0).shape == (DATASETS["demo"].size, DATASETS["demo"].size, 3)


# --- real patches -----------------------------------------------------------------------------------------------------


def test_figures_of_ami_br_on_blank_slides_are_its_patches(real_data, tmp_path):
    """Patches pasted at their places on blank slides come back, where no other patch was pasted over them."""
    if not (real_data / "AMI-BR.csv").is_file():
        pytest.skip(f"no AMI-BR.csv in {real_data}")
    known = load_dataset("ami-br", data=real_data)
    row_of = {Path(id).stem: row for row, id in enumerate(known.samples.id.tolist())}
    of_slide = defaultdict(list)
    with (real_data / "AMI-BR.csv").open(newline="") as file:
        for figure in csv.DictReader(file):
            row = row_of.get(f"{figure['dataset']}_{figure['uid']}")
            if row is not None:
                of_slide[figure["dataset"], figure["slide"]].append((row, int(figure["x"]), int(figure["y"])))
    chosen = sorted(name for name, figures in of_slide.items() if len(figures) >= 4)[:3]
    assert len(chosen) == 3
    lines, rows = ["id,slide,x,y,label"], []
    (tmp_path / "slides").mkdir()
    for number, name in enumerate(chosen):
        figures = of_slide[name]
        right, bottom = (max(figure[k] for figure in figures) + 200 for k in (1, 2))
        slide = np.full((bottom, right, 3), 255, np.uint8)
        for row, x, y in figures:
            patch = known.decode(row)
            left, top = max(64 - x, 0), max(64 - y, 0)
            slide[y - 64 + top : y + 64, x - 64 + left : x + 64] = patch[top:, left:]
        tifffile.imwrite(
            tmp_path / "slides" / f"{number}.tif", slide, tile=(512, 512), photometric="rgb", compression="zlib"
        )
        for row, x, y in figures:
            alone = all(max(abs(x - u), abs(y - v)) >= 128 for other, u, v in figures if other != row)
            if alone and min(x, y) >= 64:
                lines.append(f"{known.samples.id[row]},{number},{x},{y},{known.label_names[known.samples.label[row]]}")
                rows.append(row)
    assert len(rows) >= 8
    slides = Slides(tmp_path / "slides", size_um=32, mpp=0.25)
    dataset = load_dataset(str(table(tmp_path / "figures.csv", *lines)), slides=slides)
    for mine, row in enumerate(rows):
        np.testing.assert_array_equal(dataset.decode(mine), known.decode(row))
    few = load_dataset(str(table(tmp_path / "few.csv", *lines[:9])), slides=slides)
    store = FeatureStore.open_or_create(tmp_path / "embeddings.zarr")
    options = ExtractOptions(views=("center64@64",), device="cpu", precision="fp32", batch_size=8, fast=False)
    files = as_pngs(few, tmp_path / "files")
    for patches in (few, files):
        extract_dataset(patches, [find_backbone(LITE)], store=store, options=options)
    ours, pasted = (store.read(one.name, model=LITE, view="center64@64") for one in (few, files))
    np.testing.assert_array_equal(ours, pasted)
