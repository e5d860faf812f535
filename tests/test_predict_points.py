"""Do predictions for points come back in the form that QuPath imports, with nothing lost of what was read?"""

import csv
import json
import re
import uuid
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jsonschema
import numpy as np
import pytest
from PIL import Image

from extract.points import Points, read_points
from extract.readers import Patches
from features.console import UserError
from features.labels import class_color
from finetune.predict_groups import by_group_path, groups_of
from finetune.predict_places import Said, place_files, points_of

_NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3}
_COLOR = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}, "minItems": 3, "maxItems": 3}


def _geometry(kind: str, depth: int) -> dict:
    coordinates = _NUMBERS
    for _ in range(depth):
        coordinates = {"type": "array", "items": coordinates, "minItems": 1}
    members = {"type": {"const": kind}, "coordinates": coordinates, "isEllipse": {"type": "boolean"}}
    return {"type": "object", "required": ["type", "coordinates"], "properties": members}


# What QuPath 0.5 and 0.6 import, by https://qupath.readthedocs.io/en/0.5/docs/advanced/exporting_annotations.html and
# by QuPathTypeAdapters.java and ROITypeAdapters.java of their source: what is read of a feature must have the type that
# it is read as, because one exception ends the import of the whole file; what they do not know is passed over.
QUPATH = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["type", "features"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["type", "id", "geometry", "properties"],
                "properties": {
                    "type": {"const": "Feature"},
                    "id": {"type": ["string", "integer"]},
                    "geometry": {
                        "oneOf": [
                            _geometry("Point", 0),
                            _geometry("MultiPoint", 1),
                            _geometry("Polygon", 2),
                            _geometry("MultiPolygon", 3),
                        ]
                    },
                    "properties": {
                        "type": "object",
                        "required": ["objectType", "classification", "measurements"],
                        "properties": {
                            "objectType": {"enum": ["annotation", "detection", "cell", "tile", "tmaCore"]},
                            "name": {"type": "string"},
                            "color": _COLOR,
                            "isLocked": {"type": "boolean"},
                            "classification": {
                                "type": "object",
                                "required": ["name", "color"],
                                "properties": {"name": {"type": "string", "minLength": 1}, "color": _COLOR},
                                "additionalProperties": False,
                            },
                            "measurements": {
                                "oneOf": [
                                    {"type": "object", "additionalProperties": {"type": "number"}},
                                    {
                                        "type": "array",
                                        "items": {
                                            "type": "object",
                                            "required": ["name", "value"],
                                            "properties": {"name": {"type": "string"}, "value": {"type": "number"}},
                                        },
                                    },
                                ]
                            },
                            "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
                        },
                    },
                },
            },
        },
    },
}
SCHEMA = jsonschema.Draft202012Validator(QUPATH)

IDS = [str(uuid.UUID(int=k)) for k in range(4)]
FEATURES = [
    {
        "type": "Feature",
        "id": IDS[0],
        "geometry": {"type": "Point", "coordinates": [1234.56, 7]},
        "properties": {"objectType": "annotation", "name": "first", "classification": {"name": "Normal"}},
    },
    {
        "type": "Feature",
        "id": IDS[1],
        "geometry": {
            "type": "Polygon",
            "coordinates": [[[0.1, 0.2], [9, 0.2], [9, 4.7], [0.1, 0.2]]],
            "isEllipse": True,
        },
        "properties": {
            "objectType": "annotation",
            "isLocked": True,
            "measurements": {"Area": 12.25, "Threshold": 9},
            "metadata": {"reader": "B"},
            "of another program": {"kept": [1, None, {"a": "\u00e9"}]},
        },
        "of the feature": 5,
    },
    {
        "type": "Feature",
        "id": IDS[2],
        "geometry": {"type": "MultiPoint", "coordinates": [[5, 6], [7, 8]], "plane": {"c": -1, "z": 0, "t": 0}},
        "properties": {"measurements": [{"name": "Area", "value": 1}, {"name": "Threshold", "value": 9}]},
    },
]


def said(n: int, names: tuple[str, ...] = ("Normal", "Atypical")) -> Said:
    """Every other patch is of the last class, with a probability of 0.75."""
    mean = np.full((n, len(names)), 0.25 / (len(names) - 1))
    predicted = np.where(np.arange(n) % 2, len(names) - 1, 0)
    mean[np.arange(n), predicted] = 0.75
    return Said(names, mean, np.linspace(0, 0.1, n), predicted, 0.4)


def patches(points: Points | None, **columns: list[str]) -> Patches:
    ids = ("1", "2") if points is None else tuple(points.id)
    return Patches("a/folder", ids, lambda row: np.zeros((1, 1, 3), np.uint8), list, columns, points=points)


def read(folder: Path, content: object, name: str = "case1.svs.geojson") -> Points:
    (folder / name).write_text(json.dumps(content))
    return read_points(folder / name)


def collection(features: object) -> dict:
    return {"type": "FeatureCollection", "features": features}


@pytest.fixture
def points(tmp_path: Path) -> Points:
    return read(tmp_path, collection(FEATURES))


def written(points: Points, said: Said, out: Path = Path("result.geojson")) -> dict:
    ((path, content),) = place_files([points], [said], "geojson", out).items()
    assert path == out
    return json.loads(content)


class TestGeoJson:
    @pytest.mark.parametrize("names", [("Normal", "Atypical"), ("a", "b", "c: d")])
    def test_qupath_can_import_it(self, names, points):
        SCHEMA.validate(written(points, said(4, names)))

    @pytest.mark.parametrize(
        "break_it",
        [
            lambda one: one.pop("geometry"),
            lambda one: one["properties"].update(measurements={"a": None}),
            lambda one: one["properties"].update(classification="Atypical"),
            lambda one: one["properties"].update(metadata={"slide": 5}),
            lambda one: one["properties"].update(objectType="figure"),
            lambda one: one["properties"].pop("classification"),
        ],
    )
    def test_the_schema_refuses_what_qupath_cannot_import(self, break_it, points):
        result = written(points, said(4))
        break_it(result["features"][0])
        assert not SCHEMA.is_valid(result)

    def test_nothing_that_was_read_is_lost(self, points, tmp_path):
        result = written(points, said(4))["features"]
        for before, after in zip(points.features, result, strict=True):
            assert {**before, "properties": 0} == {**after, "properties": 0}
            changed = {"objectType", "classification", "measurements", "metadata"}
            kept = {name: value for name, value in before["properties"].items() if name not in changed}
            assert kept == {name: value for name, value in after["properties"].items() if name not in changed}
        again = read(tmp_path, collection(result), "result.geojson")
        assert (again.id, again.slide) == (points.id, points.slide) == (points.id, ["case1.svs"] * 4)
        assert np.array_equal([again.x, again.y], [points.x, points.y])  # the same digits, read the same way
        assert written(again, said(4))["features"] == result
        assert [one["properties"]["metadata"] for one in result] == [
            {"slide": "case1.svs", "annotated class": "Normal"},
            {"reader": "B", "slide": "case1.svs"},
            {"slide": "case1.svs"},
            {"slide": "case1.svs"},
        ]

    def test_a_point_says_what_the_run_says(self, points):
        first, second, third, fourth = (one["properties"] for one in written(points, said(4))["features"])
        assert first["objectType"] == second["objectType"] == "detection"
        assert first["classification"] == {"name": "Normal", "color": [0, 114, 178]}
        assert second["classification"] == {"name": "Atypical", "color": [213, 94, 0]}
        assert first["measurements"] == {"Probability Atypical": 0.25, "Probability spread": 0, "Threshold": 0.4}
        assert second["measurements"] == {
            "Area": 12.25,
            "Probability Atypical": 0.75,
            "Probability spread": pytest.approx(0.1 / 3, abs=1e-6),
            "Threshold": 0.4,
        }
        for old in (third, fourth):  # as QuPath wrote measurements before 0.4
            assert [one["name"] for one in old["measurements"]] == [
                "Area",
                "Probability Atypical",
                "Probability spread",
                "Threshold",
            ]
            assert old["measurements"][-1]["value"] == 0.4

    def test_of_several_classes_each_has_its_probability(self, points):
        measured = written(points, said(4, ("a", "b", "c")))["features"][1]["properties"]["measurements"]
        assert {name: value for name, value in measured.items() if name.startswith("Probability ")} == {
            "Probability a": 0.125,
            "Probability b": 0.125,
            "Probability c": 0.75,
            "Probability spread": pytest.approx(0.1 / 3, abs=1e-6),
        }
        assert measured["Threshold"] == 9  # that of the file: a run of three classes has none

    def test_points_of_a_table_become_features(self, tmp_path):
        (tmp_path / "p.csv").write_text("slide,x,y,label\ncase1.svs,10,20.5,Normal\ncase1.svs,30,40,\n")
        result = written(read_points(tmp_path / "p.csv"), said(2))
        SCHEMA.validate(result)
        again = read(tmp_path, result, "result.geojson")
        assert again.id == ["case1.svs@10,20.5", "case1.svs@30,40"]
        assert (again.x.tolist(), again.y.tolist()) == ([10, 30], [20.5, 40])
        assert [one["properties"]["name"] for one in result["features"]] == again.id

    def test_qupath_counts_from_what_was_scanned(self, points, tmp_path):
        origin = np.array([[100.0, 50.0]] * 4)
        found = replace(points, x=points.x + 100, y=points.y + 50, origin=origin)  # as slides place what QuPath wrote
        assert [one["geometry"] for one in written(found, said(4))["features"]] == [
            one["geometry"] for one in points.features
        ]
        of_table = replace(found, features=None)
        assert [one["geometry"]["coordinates"] for one in written(of_table, said(4))["features"]] == [
            pytest.approx([x, y]) for x, y in zip(points.x, points.y, strict=True)
        ]
        ((_, content),) = place_files([found], [said(4)], "coco", tmp_path / "a.json").items()
        assert json.loads(content)["annotations"][2]["bbox"] == [105 - 25, 56 - 25, 50, 50]

    def test_every_class_has_a_colour_of_its_own(self):
        assert len({class_color(k) for k in range(62)}) == 62


class TestSeveralSlides:
    @pytest.fixture
    def of_two(self, tmp_path: Path) -> Points:
        (tmp_path / "p.csv").write_text("slide,x,y\nb/one.svs,1,2\ntwo.svs,3,4\nb/one.svs,5,6\n")
        return read_points(tmp_path / "p.csv")

    def test_one_file_for_several_slides_is_refused(self, of_two):
        with pytest.raises(UserError, match=r"2 slides .*onto one\. Name a folder as `out`, such as out/result"):
            points_of([patches(of_two)], "geojson", Path("out/result.geojson"))

    def test_a_folder_gets_a_file_of_each_slide(self, of_two, tmp_path):
        assert points_of([patches(of_two)], "geojson", Path("results")) == [of_two]
        files = place_files([of_two], [said(3)], "geojson", Path("results"))
        assert list(files) == [Path("results/b/one.svs.geojson"), Path("results/two.svs.geojson")]
        found = [[one["id"] for one in json.loads(content)["features"]] for content in files.values()]
        assert found == [["b/one.svs@1,2", "b/one.svs@5,6"], ["two.svs@3,4"]]

    def test_points_of_one_slide_in_two_files_come_together(self, of_two):
        files = place_files([of_two, of_two.select([1])], [said(3), said(1)], "geojson", Path("results"))
        assert len(json.loads(files[Path("results/two.svs.geojson")])["features"]) == 2

    def test_coco_holds_several_slides_and_is_read_back(self, of_two, tmp_path):
        ((path, content),) = place_files([of_two], [said(3)], "coco", tmp_path / "result.json").items()
        path.write_bytes(content)
        again = read_points(path)
        assert again.slide == of_two.slide
        assert np.array_equal([again.x, again.y], [of_two.x, of_two.y])  # whole and half numbers: exact
        assert again.columns["label"] == ["Normal", "Atypical", "Normal"]
        annotations = json.loads(content)["annotations"]
        assert [one["name"] for one in annotations] == of_two.id
        assert annotations[1] | {"spread": 0} == {
            "id": 2,
            "image_id": 2,
            "category_id": 2,
            "bbox": [-22, -21, 50, 50],
            "area": 2500,
            "iscrowd": 0,
            "score": 0.75,
            "name": "two.svs@3,4",
            "spread": 0,
            "probabilities": {"Normal": 0.25, "Atypical": 0.75},
        }

    @pytest.mark.parametrize("format", ["geojson", "coco"])
    def test_patches_lie_nowhere(self, format, of_two):
        with pytest.raises(UserError, match="a/folder holds patches, which lie nowhere"):
            points_of([patches(of_two), patches(None)], format, Path("results"))

    def test_the_slide_is_the_group_where_no_other_is_known(self, of_two):
        assert groups_of(patches(of_two), of_two.source) == of_two.slide
        assert groups_of(patches(of_two, group=["p1", "", "p1"]), of_two.source) == ["p1", "", "p1"]

    def test_the_table_of_groups_is_a_csv_beside_file_or_folder(self):
        assert by_group_path(Path("r/results")) == Path("r/results-by-group.csv")
        assert by_group_path(Path("r/result.json")) == Path("r/result-by-group.csv")


# --- a run ------------------------------------------------------------------------------------------------------------

SIDE, N_SLIDES, PER_SLIDE = 32, 12, 4


class Made(NamedTuple):
    run: Path
    weights: Path
    points: Path
    slides: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A probe of small drawn figures, trained and tested on points of slides as QuPath exports them."""
    timm, torch, safetensors = (pytest.importorskip(name) for name in ("timm", "torch", "safetensors.torch"))
    from extract.backbones import find_backbone
    from extract.datasets import load_dataset
    from extract.embed import ExtractOptions, extract_dataset
    from extract.slides import Slides
    from features.store import FeatureStore
    from probe.probing import ProbeOptions, probe_store

    folder, rng = tmp_path_factory.mktemp("slides"), np.random.default_rng(0)
    (folder / "points").mkdir()
    for k in range(N_SLIDES):
        pixels, features = rng.integers(0, 150, (2 * SIDE, 2 * SIDE, 3)), []
        for figure in range(PER_SLIDE):
            top, left, label = figure // 2 * SIDE, figure % 2 * SIDE, (figure + k) % 2
            pixels[top : top + SIDE, left : left + SIDE] += 70 * label  # atypical figures are brighter
            known = {"classification": {"name": ("Normal", "Atypical")[label]}, "split": "test" if k > 8 else "train"}
            geometry = {"type": "Point", "coordinates": [left + SIDE / 2, top + SIDE / 2]}
            id = str(uuid.UUID(int=10 * k + figure))
            features.append({"type": "Feature", "id": id, "geometry": geometry, "properties": known})
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"s{k:02}.png")
        (folder / "points" / f"s{k:02}.geojson").write_text(json.dumps(collection(features)))
    torch.manual_seed(0)
    weights = folder / "tiny.safetensors"
    safetensors.save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    dataset = load_dataset(str(folder / "points"), slides=Slides(folder, size=SIDE, mpp=0.25))
    store, options = FeatureStore.open_or_create(folder / "store.zarr"), ExtractOptions(precision="fp32")
    extract_dataset(dataset, [find_backbone("timm/test_vit")], store=store, options=options, weights=weights)
    (probe,) = probe_store(store, options=ProbeOptions(cv=3), runs=folder / "runs")
    return Made(probe.folder, weights, folder / "points", folder)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_gives_points_back_to_their_slides(made, tmp_path):
    from extract.slides import Slides
    from finetune.predict import predict_paths

    asked = {"weights": made.weights, "slides": Slides(made.slides, size=SIDE)}
    predict_paths(made.run, [made.points], out=tmp_path / "all.csv", **asked)
    summary = predict_paths(
        made.run, [made.points], out=tmp_path / "all", **asked, format="geojson", by="group", threshold=0.3
    )
    assert summary["out"] == str(tmp_path / "all")
    by_id, n = {row["id"]: row for row in rows_of(tmp_path / "all.csv")}, N_SLIDES * PER_SLIDE
    assert len(by_id) == n
    again, before = read_points(tmp_path / "all.csv"), read_points(made.points)  # the table serves as points
    assert (again.id, again.slide) == (before.id, [f"{slide}.png" for slide in before.slide])
    assert np.array_equal([again.x, again.y], [before.x, before.y])
    for name in (f"s{k:02}.geojson" for k in range(N_SLIDES)):
        before = json.loads((made.points / name).read_text())
        result = json.loads((tmp_path / "all" / name.replace(".geojson", ".png.geojson")).read_text())
        SCHEMA.validate(result)
        for one, original in zip(result["features"], before["features"], strict=True):
            row, said = by_id[one["id"]], one["properties"]["measurements"]
            assert (one["id"], one["geometry"]) == (original["id"], original["geometry"])
            assert [float(row["x"]), float(row["y"])] == one["geometry"]["coordinates"]
            assert row["slide"] == name.replace(".geojson", ".png")
            # The same computation twice: the last of six digits may be rounded otherwise.
            assert said["Probability Atypical"] == pytest.approx(float(row["probability"]), abs=2e-6)
            assert said["Probability spread"] == pytest.approx(float(row["spread"]), abs=2e-6)
            assert said["Threshold"] == 0.3
            atypical = said["Probability Atypical"] >= 0.3
            assert one["properties"]["classification"]["name"] == ("Atypical" if atypical else "Normal")
            assert one["properties"]["metadata"]["annotated class"] == original["properties"]["classification"]["name"]
    slides = rows_of(tmp_path / "all-by-group.csv")
    assert [row["group"] for row in slides] == [f"s{k:02}" for k in range(N_SLIDES)]
    assert {row["n"] for row in slides} == {str(PER_SLIDE)}
    assert sum(int(row["n_positive"]) for row in slides) == summary["n_positive"]


def test_the_command_writes_one_slide_and_refuses_several_before_it_predicts(made, tmp_path, monkeypatch):
    from finetune import predict
    from finetune.predict_cli import predict_app

    monkeypatch.chdir(tmp_path)
    common = ["--slides", made.slides, "--size", SIDE, "--weights", made.weights, "--format"]

    def run(*arguments: object) -> None:
        predict_app([str(one) for one in (made.run, *arguments)], standalone_mode=False)

    run(made.points / "s03.geojson", *common, "geojson")
    again = read_points(tmp_path / "predictions.geojson")
    assert (again.id, again.slide) == (read_points(made.points / "s03.geojson").id, ["s03.png"] * PER_SLIDE)
    run(made.points, *common, "coco")
    assert len(read_points(tmp_path / "predictions.json").id) == N_SLIDES * PER_SLIDE
    (image, *_) = json.loads((tmp_path / "predictions.json").read_text())["images"]
    assert image == {"id": 1, "file_name": "s00.png", "width": 2 * SIDE, "height": 2 * SIDE}
    monkeypatch.setattr(predict, "probabilities", lambda _: pytest.fail("it predicted"))
    with pytest.raises(UserError, match="lie on 12 slides"):
        run(made.points, *common, "geojson")
    with pytest.raises(UserError, match="`format=xml`: expected one of csv, geojson, coco"):
        run(made.points, *common, "xml")
    with pytest.raises(UserError, match="one of the inputs"):
        run(made.points / "s03.geojson", *common, "geojson", "--out", made.points / "s03.geojson")
    other_spelling = made.points / ".." / made.points.name
    with pytest.raises(UserError, match=f"is given twice, first as {re.escape(str(made.points))}"):
        run(made.points, other_spelling, *common, "csv")
    monkeypatch.setattr(predict, "read_run", lambda _: pytest.fail("it read the run"))
    with pytest.raises(UserError, match=r"s03\.geojson is given twice\. Name every path once"):
        predict.predict_paths(made.run, [made.points / "s03.geojson"] * 2, out=tmp_path / "out.csv")


@pytest.mark.parametrize(
    ("format", "out"),
    [
        *[("csv", "x.geojson"), ("csv", "x.JSON")],
        *[("geojson", "x.csv"), ("geojson", "file"), ("geojson", "new.folder")],
        *[("coco", "x.csv"), ("coco", "x.geojson"), ("coco", "x")],
    ],
)
def test_a_name_that_contradicts_the_format_is_refused(format, out, tmp_path):
    from finetune.predict import predict_paths

    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=rf"`format={format}` and `out` do not fit together: found .*{out}, expected a"):
        predict_paths(tmp_path / "no run", [tmp_path / "no points"], out=tmp_path / out, format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("format", "out"),
    [
        *[("csv", "x.csv"), ("csv", "x.tsv"), ("csv", "x"), ("coco", "x.json")],
        *[("geojson", "x.geojson"), ("geojson", "x.json"), ("geojson", "x"), ("geojson", "old.folder")],
    ],
)
def test_a_name_that_fits_the_format_is_taken(format, out, tmp_path):
    from finetune.predict import predict_paths

    (tmp_path / "old.folder").mkdir()
    with pytest.raises(UserError) as refused:
        predict_paths(tmp_path / "no run", [tmp_path / "no points"], out=tmp_path / out, format=format)
    assert "no run" in str(refused.value)
    assert "do not fit" not in str(refused.value)


def test_the_command_counts_what_it_wrote_and_replaced(made, tmp_path, capsys):
    from finetune.predict_cli import predict_app

    def said_of(points: Path, *arguments: object) -> str:
        common = ["--slides", made.slides, "--size", SIDE, "--weights", made.weights, *arguments]
        predict_app([str(one) for one in (made.run, points, *common)], standalone_mode=False)
        return " ".join(capsys.readouterr().err.split())

    to_folder = ("--format", "geojson", "--out", tmp_path / "all.of them")
    (tmp_path / "all.of them").mkdir()
    first, again = said_of(made.points / "s03.geojson", *to_folder), said_of(made.points, *to_folder)
    assert f"them/: 1 file, {PER_SLIDE} patches, " in first
    assert "replaced" not in first
    assert f"them/: {N_SLIDES} files, {N_SLIDES * PER_SLIDE} patches, " in again
    assert "them/: 1 existing file is replaced." in again
    assert f"them/: {N_SLIDES} existing files are replaced." in said_of(made.points, *to_folder)
    (tmp_path / "one.csv").write_text("slide,x,y\ns03,16,16\n")
    one = said_of(tmp_path / "one.csv", "--out", tmp_path / "out.csv", "--by", "group", "--threshold", "0")
    assert "out.csv: 1 patch, 1 predicted Atypical" in one
    assert "-by-group.csv: 1 group, 100% predicted Atypical" in one


def test_patches_of_another_size_than_in_training_are_announced(made, tmp_path, capsys, monkeypatch):
    from extract.slides import Slides
    from finetune import predict

    def said_of(asked: Slides) -> str:
        capsys.readouterr()
        predict.predict_paths(
            made.run, [made.points / "s03.geojson"], out=tmp_path / "out.csv", weights=made.weights, slides=asked
        )
        return " ".join(capsys.readouterr().err.split())

    assert (
        "These patches have 0.5 um per pixel and cover 16 um; the run was trained on 0.25 and 8: its probabilities may "
        "not hold."
    ) in said_of(Slides(made.slides, SIDE, mpp=0.5))
    assert "cover 10 um; the run" in said_of(Slides(made.slides, 40, mpp=0.25))
    for alike in (Slides(made.slides, SIDE, mpp=0.26), Slides(made.slides, SIDE), Slides(made.slides, mpp=0.5)):
        assert "may not hold" not in said_of(alike)
    assert "Patches have 32 pixels and cover 8 um, as in training." in said_of(Slides(made.slides, mpp=0.5))
    monkeypatch.setattr(predict, "_patch_size", lambda _: (SIDE, None))  # as of a run that does not know its resolution
    assert "may not hold" not in said_of(Slides(made.slides, SIDE, mpp=0.5))


def test_the_report_knows_where_its_patches_lie(made):
    from finetune.report import make_report
    from probe.resample import Resampling

    page, _, _ = make_report(made.run.parent, resampling=Resampling(replicates=100))
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    thumbnails = json.loads(re.search(r'id="thumbnails">(.*?)</script>', page, re.DOTALL)[1])
    points = read_points(made.points)
    lies = {
        id: [f"{slide}.png", x, y] for id, slide, x, y in zip(points.id, points.slide, points.x, points.y, strict=True)
    }
    assert set(data["id"]) == set(points.id)
    assert {
        id: [data["slides"][slide], x, y] for id, (slide, x, y) in zip(data["id"], data["place"], strict=True)
    } == lies
    assert data["colors"] == [list(class_color(k)) for k in range(2)]
    assert min(thumbnails["picture"]) >= 0
    assert "Save for QuPath" in page


def test_slides_of_one_name_get_files_of_their_own(made, tmp_path, capsys):
    from extract.slides import Slides
    from finetune.predict import predict_paths

    for patient in "ab":
        (tmp_path / "slides" / patient).mkdir(parents=True)
        (tmp_path / "slides" / patient / "s00.png").write_bytes((made.slides / "s00.png").read_bytes())
    (tmp_path / "p.csv").write_text("slide,x,y\na/s00,16,16\nb/s00,16,16\nb/s00,48,16\n")
    summary = predict_paths(
        made.run,
        [tmp_path / "p.csv"],
        out=tmp_path / "out",
        weights=made.weights,
        slides=Slides(tmp_path / "slides", SIDE),
        format="geojson",
        by="group",
    )
    assert summary["n_files"] == 2
    listed = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.geojson"))
    assert listed == ["a/s00.png.geojson", "b/s00.png.geojson"]
    assert [(row["group"], row["n"]) for row in rows_of(tmp_path / "out-by-group.csv")] == [
        ("a/s00", "1"),
        ("b/s00", "2"),
    ]
    again = read_points(tmp_path / "out")
    assert again.slide == ["a/s00.png", "b/s00.png", "b/s00.png"]
