"""Does every file of points give the places that it means, and one message where it means none?"""

import copy
import csv
import json
import math
import random
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extract import points as points_module
from extract.points import Points, is_points_file, read_points
from extract.readers import load_patches, require_points
from extract.slides import Slides
from features.console import UserError

SQUARE = [[[10, 20], [30, 20], [30, 60], [10, 60], [10, 20]]]


def feature(kind: str | None, coordinates: object = None, id: object = None, **properties: object) -> dict:
    geometry = None if kind is None else {"type": kind, "coordinates": coordinates}
    whole = {"type": "Feature", "geometry": geometry, "properties": {"objectType": "annotation", **properties}}
    return whole if id is None else whole | {"id": id}


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def geojson(path: Path, *features: object) -> Path:
    return write_json(path, {"type": "FeatureCollection", "features": list(features)})


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def places(points: Points) -> list[tuple[float, float]]:
    return list(zip(points.x.tolist(), points.y.tolist(), strict=True))


def message(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_points(path)
    return str(caught.value)


class TestTables:
    def test_places_and_what_is_known_of_each(self, tmp_path):
        path = table(
            tmp_path / "points.csv",
            "slide,x,y,label,group,split,domain,id",
            "a.svs,1,2.5,Normal,p1,train,lung,f1",
            "b,3000,7,Atypical,p2,test,skin,f2",
        )
        points = read_points(path, labelled=True)
        assert places(points) == [(1, 2.5), (3000, 7)]
        assert (points.id, points.slide, points.unit, points.lines) == (["f1", "f2"], ["a.svs", "b"], "px", [2, 3])
        assert points.columns == {
            "label": ["Normal", "Atypical"],
            "group": ["p1", "p2"],
            "split": ["train", "test"],
            "domain": ["lung", "skin"],
        }

    def test_micrometres_have_columns_of_their_own(self, tmp_path):
        points = read_points(table(tmp_path / "points.csv", "slide,x_um,y_um", "a,10,20"))
        assert (points.unit, places(points)) == ("um", [(10, 20)])

    def test_pixels_go_before_micrometres(self, tmp_path):
        points = read_points(table(tmp_path / "points.csv", "slide,x_um,y_um,x,y", "a,10,20,40,80"))
        assert (points.unit, places(points)) == ("px", [(40, 80)])

    @pytest.mark.parametrize("sign", ["\u00b5", "\u03bc"])
    def test_measurements_as_qupath_exports_them(self, sign, tmp_path):
        path = tmp_path / "measurements.tsv"
        names = ["Image", "Object ID", "Classification", f"Centroid X {sign}m", f"Centroid Y {sign}m"]
        path.write_text("\t".join(names) + "\ncase1.svs\tabc\tTumor\t12.5\t8\n", encoding="utf-8")
        points = read_points(path)
        assert is_points_file(path)
        assert (points.unit, places(points), points.id, points.slide) == ("um", [(12.5, 8)], ["abc"], ["case1.svs"])
        assert points.columns["label"] == ["Tumor"]

    def test_a_place_without_an_id_is_called_by_its_slide_and_coordinates(self, tmp_path):
        points = read_points(table(tmp_path / "points.csv", "slide,x,y", "a,1,2", "a,1,3.25"))
        assert points.id == ["a@1,2", "a@1,3.25"]

    def test_ids_that_start_anew_on_every_slide_are_preceded_by_it(self, tmp_path):
        points = read_points(table(tmp_path / "points.csv", "slide,id,x,y", "a,1,1,2", "b,1,1,2", "b,2,5,5"))
        assert points.id == ["a/1", "b/1", "b/2"]

    @pytest.mark.parametrize("column", ["id", "uid"])
    def test_one_id_twice_on_a_slide_is_refused_by_line(self, column, tmp_path):
        path = table(tmp_path / "points.csv", f"slide,{column},x,y", "a,1,1,2", "a,2,1,2", "a,1,8,2")
        assert "2 of 3 rows (line 2: a/1, line 4: a/1)" in message(path)

    @pytest.mark.parametrize("cell", ["", "nan", "inf", "1,5", "twelve"])
    def test_a_coordinate_that_is_no_number_is_named_by_its_line(self, cell, tmp_path):
        path = table(tmp_path / "points.csv", "slide,x,y", "a,1,2", f'a,"{cell}",2')
        assert "a coordinate that is no number in 1 of 2 rows (line 3" in message(path)

    def test_the_cell_and_its_column_are_shown_and_a_decimal_comma_is_the_cause(self, tmp_path):
        path = table(tmp_path / "p.csv", "slide;x;y", "a;96,5;2", "a;1;two", "a;3;4")
        assert "in 2 of 3 rows (line 2: x is '96,5', line 3: y is 'two')" in message(path)
        assert "A comma is no decimal point: write 96.5 for 96,5." in message(path)
        assert "comma" not in message(table(tmp_path / "q.csv", "slide,x,y", "a,1,two"))

    def test_a_table_of_predictions_is_read_back(self, tmp_path, capsys):
        header = "source,id,slide,x,y,probability,predicted,spread,fold_0,fold_1"
        points = read_points(table(tmp_path / "p.csv", header, "t.csv,f1,a.svs,1.5,2,0.7,Atypical,0.1,0.6,0.8"))
        assert (points.id, points.slide, places(points), points.columns) == (["f1"], ["a.svs"], [(1.5, 2)], {})
        assert "columns not used: source, probability, predicted, spread, fold_0, fold_1" in capsys.readouterr().err
        assert "has a column 'splt'" in message(table(tmp_path / "q.csv", "slide,x,y,splt", "a,1,2,test"))

    def test_a_row_without_a_slide_is_refused(self, tmp_path):
        assert "no slide in 1 of 2 rows (line 2" in message(table(tmp_path / "p.csv", "slide,x,y", ",1,2", "a,1,3"))

    def test_labels_are_asked_for_where_they_are_needed(self, tmp_path):
        path = table(tmp_path / "points.csv", "slide,x,y", "a,1,2")
        with pytest.raises(UserError, match="lacks the column label"):
            read_points(path, labelled=True)
        assert "label" not in read_points(path).columns

    @pytest.mark.parametrize(
        ("header", "are_points"),
        [
            ("slide,x,y", True),
            ("Slide ID;X;Y", True),
            ("slide,x_um,y_um,label", True),
            ("path,label", False),
            ("path,slide,x,y", False),  # patches that know where they lay
            ("image,x,y", False),
            ("slide,x,label", False),
        ],
    )
    def test_a_table_of_patches_is_none_of_points(self, header, are_points, tmp_path):
        assert is_points_file(table(tmp_path / "t.csv", header, *["1" + ",1" * header.count(",")])) is are_points

    def test_what_a_table_is_said_to_be_is_said_when_it_is_read(self, tmp_path, capsys):
        path = tmp_path / "points.csv"
        path.write_bytes("slide,x,y\nM\u00fcller,1,2\n".encode("cp1252"))
        assert is_points_file(path)
        assert capsys.readouterr().err == ""
        assert read_points(path).slide == ["M\u00fcller"]
        assert capsys.readouterr().err.count("not UTF-8") == 1

    def test_every_figure_of_amibr_has_its_place(self, real_data):
        path = real_data / "AMI-BR.csv"
        points = read_points(path, labelled=True)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert is_points_file(path)
        assert len(points.id) == len(rows) == 3720
        assert places(points) == [(float(row["x"]), float(row["y"])) for row in rows]
        assert points.slide == [row["slide"] for row in rows]
        assert points.columns["label"] == [row["majority_atypical"] for row in rows]


class TestGeoJson:
    def test_every_kind_of_geometry_has_its_place(self, tmp_path):
        hole = [[12, 22], [28, 22], [28, 30], [12, 30], [12, 22]]
        l_shape = [[[0, 0], [4, 0], [4, 2], [2, 2], [2, 4], [0, 4], [0, 0]]]
        far = [[[x + 1e6, y + 1e6] for x, y in l_shape[0]]]
        path = geojson(
            tmp_path / "case1.svs.geojson",
            feature("Point", [5, 6.25]),
            feature("Polygon", SQUARE, "clockwise"),
            feature("Polygon", [SQUARE[0][::-1]], "the other way round"),
            feature("Polygon", [SQUARE[0], hole]),
            feature("Polygon", l_shape),
            feature("Polygon", far),
            feature("MultiPolygon", [[[[0, 0], [2, 0], [2, 2], [0, 2]]], [[[10, 0], [12, 0], [12, 6], [10, 6]]]]),
        )
        points = read_points(path)
        # By hand: 800 at (20, 40) less 128 at (20, 26); 4 x 2 at (2, 1) and 2 x 2 at (1, 3); 4 at (1, 1) and 12 at
        # (11, 3).
        l_centre = ((8 * 2 + 4 * 1) / 12, (8 * 1 + 4 * 3) / 12)
        expected = [
            (5, 6.25),
            (20, 40),
            (20, 40),
            (20, (800 * 40 - 128 * 26) / 672),
            l_centre,
            (1e6 + l_centre[0], 1e6 + l_centre[1]),
            ((4 * 1 + 12 * 11) / 16, (4 * 1 + 12 * 3) / 16),
        ]
        # Doubles near 1e6 are 1.2e-10 apart; the corners themselves are exact.
        assert np.allclose(places(points), expected, rtol=0, atol=1e-9)
        assert points.slide == ["case1.svs"] * 7

    def test_ids_labels_and_features_are_those_of_the_file(self, tmp_path):
        features = [
            feature("Point", [1, 2], "aa", classification={"name": "Atypical", "color": [200, 0, 0]}),
            feature("Point", [3, 4], 7, classification={"name": "Tumor: Positive", "colorRGB": -377282}),
            feature("Point", [5, 6], classification={"names": ["Tumor", "Negative"]}),
            feature("Point", [7, 8], "PathAnnotationObject", classification="Normal"),
            feature("Point", [9, 9], "PathAnnotationObject"),
        ]
        points = read_points(geojson(tmp_path / "s.geojson", *features))
        assert points.id == ["aa", "7", "s@5,6", "s@7,8", "s@9,9"]
        assert points.columns == {"label": ["Atypical", "Tumor: Positive", "Tumor: Negative", "Normal", ""]}
        assert points.features == features

    def test_slide_and_split_may_stand_in_properties_or_metadata(self, tmp_path):
        points = read_points(
            geojson(
                tmp_path / "s.geojson",
                feature("Point", [1, 2], "a", slide="other.svs", split="test"),
                feature("Point", [1, 2], "b", metadata={"image": "third.svs", "group": "p1"}),
                feature("Point", [1, 2], "c"),
            )
        )
        assert points.slide == ["other.svs", "third.svs", "s"]
        assert points.columns == {"label": [""] * 3, "split": ["test", "", ""], "group": ["", "p1", ""]}

    def test_each_of_several_points_is_a_place_with_an_id_of_its_own_and_the_same_ever_after(self, tmp_path):
        id = str(uuid.uuid4())
        path = geojson(tmp_path / "s.geojson", feature("MultiPoint", [[1, 2], [3, 4]], id, name="A"))
        points = read_points(path)
        assert places(points) == [(1, 2), (3, 4)]
        assert len({id, *points.id}) == 3
        assert [str(uuid.UUID(one)) for one in points.id] == points.id == read_points(path).id
        assert [one["geometry"] for one in points.features] == [
            {"type": "Point", "coordinates": [1, 2]},
            {"type": "Point", "coordinates": [3, 4]},
        ]
        assert [one["properties"]["name"] for one in points.features] == ["A", "A"]

    def test_one_point_of_several_possible_ones_stays_as_it_is(self, tmp_path):
        points = read_points(geojson(tmp_path / "s.geojson", feature("MultiPoint", [[1, 2]], "a")))
        assert (points.id, places(points)) == (["a"], [(1, 2)])
        assert points.features[0]["geometry"] == {"type": "MultiPoint", "coordinates": [[1, 2]]}

    @pytest.mark.parametrize("whole", [list, lambda one: one[0]], ids=["a list", "one feature"])
    def test_features_without_a_collection(self, whole, tmp_path):
        path = write_json(tmp_path / "s.json", whole([feature("Point", [1, 2], "a")]))
        assert is_points_file(path)
        assert (read_points(path).id, read_points(path).slide) == (["a"], ["s"])

    def test_a_folder_with_a_file_of_each_slide_is_one_set(self, tmp_path):
        geojson(tmp_path / "b.geojson", feature("Point", [1, 2], "1"))
        geojson(tmp_path / "a.geojson", feature("Point", [3, 4], "1"), feature("Point", [5, 6], "2"))
        points = read_points(tmp_path)
        assert is_points_file(tmp_path)
        assert (points.id, points.slide) == (["a/1", "a/2", "b/1"], ["a", "a", "b"])

    def test_suffixes_in_capitals_and_sub_folders_are_read_and_notes_may_lie_there(self, tmp_path):
        (tmp_path / "centre 1").mkdir()
        geojson(tmp_path / "centre 1" / "b.GEOJSON", feature("Point", [1, 2], "1"))
        geojson(tmp_path / "centre 1" / "._b.geojson")
        (tmp_path / ".trash").mkdir()
        table(tmp_path / ".trash" / "old.csv", "slide,x,y", "a,1,2")
        assert is_points_file(tmp_path)
        geojson(tmp_path / "a.svs.GeoJSON", feature("Point", [3, 4], "2"))
        (tmp_path / "notes.txt").write_text("slide 7 is out of focus")
        points = read_points(tmp_path)
        assert (points.id, points.slide) == (["2", "1"], ["a.svs", "b"])

    def test_other_files_of_points_in_a_folder_are_refused(self, tmp_path):
        geojson(tmp_path / "a.geojson", feature("Point", [1, 2], "1"))
        (tmp_path / "more").mkdir()
        geojson(tmp_path / "more" / "slide-25.JSON", feature("Point", [1, 2], "1"))
        table(tmp_path / "ok.csv", "slide,x,y", "a,1,2")
        assert "2 files beside its GeoJSON could hold points too (more/slide-25.JSON, ok.csv)" in message(tmp_path)
        assert "names that end in .geojson" in message(tmp_path)

    def test_geojson_below_a_folder_of_images_does_not_make_it_one_of_points(self, tmp_path):
        for name in ("Normal", "Atypical"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "1.png").touch()
        geojson(tmp_path / "Normal" / "a.geojson", feature("Point", [1, 2], "1"))
        assert not is_points_file(tmp_path)
        geojson(tmp_path / "a.geojson", feature("Point", [1, 2], "1"))
        assert is_points_file(tmp_path)

    def test_a_folder_of_patches_is_none_of_points(self, tmp_path):
        (tmp_path / "Normal").mkdir()
        assert not is_points_file(tmp_path)
        assert not is_points_file(tmp_path / "missing.geojson")

    @pytest.mark.parametrize(
        ("broken", "said"),
        [
            (feature(None), "feature 2 (b) has no geometry"),
            ({"type": "Feature", "id": "b"}, "feature 2 (b) has no geometry"),
            (feature("LineString", [[0, 0], [1, 1]]), "feature 2 (b) has the geometry LineString"),
            (feature("Point", [math.nan, 1]), "feature 2 (b) has coordinates that are no pairs of numbers"),
            (feature("Point", ["1", 1]), "feature 2 (b) has coordinates that are no pairs of numbers"),
            (feature("Point", [10**400, 1]), "feature 2 (b) has coordinates that are no pairs of numbers"),
            (feature("Point", []), "feature 2 (b) has coordinates that are no pairs of numbers"),
            (feature("MultiPoint", []), "feature 2 (b) has coordinates that are no pairs of numbers"),
            (feature("Polygon", [[[0, 0], [1, 1], [2, 2]]]), "feature 2 (b) is a polygon without an area"),
            (feature("Polygon", []), "feature 2 (b) is a polygon without an area"),
            (
                feature("Polygon", [[[0, 0], [4, 4], [4, 0], [0, 3], [0, 0]]]),
                "feature 2 (b) is a polygon whose outline",
            ),
            ("b", "entry 2 of its features is none"),
        ],
    )
    def test_one_message_names_a_feature_without_a_place(self, broken, said, tmp_path):
        broken = broken | {"id": "b"} if isinstance(broken, dict) else broken
        assert said in message(geojson(tmp_path / "s.geojson", feature("Point", [1, 2], "a"), broken))

    def test_an_outline_that_touches_itself_has_a_centre_and_one_that_crosses_has_none(self, tmp_path):
        touching = [[[0, 0], [4, 0], [4, 4], [2, 2], [0, 4], [2, 2], [0, 0]]]
        assert places(read_points(geojson(tmp_path / "s.geojson", feature("Polygon", touching)))) == [
            pytest.approx((32 / 12, 16 / 12))
        ]
        # A five-pointed star: every corner is a corner of its hull, and only the edges cross.
        star = [[math.cos(4 * math.pi * k / 5), math.sin(4 * math.pi * k / 5)] for k in range(6)]
        assert "crosses itself" in message(geojson(tmp_path / "s.geojson", feature("Polygon", [star])))

    def test_a_crossing_is_found_among_more_edges_than_are_compared_at_once(self, tmp_path):
        circle = [[100 * math.cos(2 * math.pi * k / 700), 100 * math.sin(2 * math.pi * k / 700)] for k in range(700)]
        assert places(read_points(geojson(tmp_path / "s.geojson", feature("Polygon", [circle])))) == [
            pytest.approx((0, 0), abs=1e-9)
        ]
        circle[600], circle[601] = circle[601], circle[600]
        assert "crosses itself" in message(geojson(tmp_path / "s.geojson", feature("Polygon", [circle])))

    def test_a_region_is_no_figure(self, tmp_path):
        outline = [[[k, 0] for k in range(10_001)] + [[10_000, 5]]]
        assert "has 10,002 corners" in message(geojson(tmp_path / "s.geojson", feature("Polygon", outline)))


class TestCoco:
    def write(self, path: Path, boxes: list[list[float]], **image: object) -> Path:
        content = {
            "images": [{"id": 3, "file_name": "003.tiff", **image}],
            "categories": [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "hard negative"}],
            "annotations": [
                {"id": k, "image_id": 3, "category_id": 1 + k % 2, "bbox": box} for k, box in enumerate(boxes)
            ],
        }
        return write_json(path, content)

    def test_boxes_of_midog_are_corners(self, tmp_path):
        path = self.write(tmp_path / "MIDOG.json", [[4336, 346, 4386, 396], [-5, 10, 45, 60]], width=7215, height=5412)
        points = read_points(path)
        assert is_points_file(path)
        assert places(points) == [(4361, 371), (20, 35)]
        assert (points.id, points.slide) == (["0", "1"], ["003.tiff"] * 2)
        assert points.columns == {"label": ["mitotic figure", "hard negative"]}

    def test_boxes_of_coco_have_sides(self, tmp_path):
        points = read_points(self.write(tmp_path / "coco.json", [[4336, 346, 50, 30], [10, 20, 40, 60]]))
        assert places(points) == [(4361, 361), (30, 50)]

    def test_where_both_are_possible_squares_of_one_size_decide(self, tmp_path):
        corners = [[100, 200, 150, 250], [300, 120, 350, 170]]
        assert places(read_points(self.write(tmp_path / "a.json", corners))) == [(125, 225), (325, 145)]
        sides = [[10, 20, 64, 64], [30, 5, 64, 64]]
        assert places(read_points(self.write(tmp_path / "b.json", sides))) == [(42, 52), (62, 37)]

    def test_the_size_of_the_image_may_decide(self, tmp_path):
        box = [[400, 300, 460, 340]]
        assert "can be read both" in message(self.write(tmp_path / "a.json", box))
        assert places(read_points(self.write(tmp_path / "b.json", box, width=500, height=500))) == [(430, 320)]

    def test_boxes_that_are_neither_are_refused(self, tmp_path):
        assert "can be read neither" in message(self.write(tmp_path / "a.json", [[50, 50, -10, 20]]))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"annotations": []}, "has no annotations"),
            ({"annotations": 5}, "annotations is no list"),
            ({"images": []}, "an image_id that no entry of images"),
            ({"annotations": [{"id": 9, "image_id": 3}]}, "no box of four numbers in 1 of 1 rows (annotation 9)"),
            ({"annotations": [{"id": 9, "image_id": 3, "bbox": [1, 2, math.nan, 4]}]}, "no box of four numbers"),
        ],
    )
    def test_one_message_for_each_lack(self, change, said, tmp_path):
        path = self.write(tmp_path / "a.json", [[1, 2, 3, 4]])
        assert said in message(write_json(path, json.loads(path.read_text()) | change))


class TestPathsThatNearlyNamePlaces:
    def said(self, path: Path) -> str:
        with pytest.raises(UserError, match="is for points on slides") as caught:
            require_points([path], Slides(path.parent, size=128))
        return str(caught.value)

    @pytest.mark.parametrize(
        ("header", "said"),
        [
            ("Slide,x,label", "has slide, x; lacks y."),
            ("x,y,label", "has x, y; lacks slide."),
            ("slide,x,y_um", "has slide, x, y_um; lacks y."),
            ("slide,y_um", "has slide, y_um; lacks x_um."),
            ("path,slide,x,y", "has a column of patch files"),
        ],
    )
    def test_a_table_lacks_a_column(self, header, said, tmp_path):
        path = table(tmp_path / "t.csv", header, "1" + ",1" * header.count(","))
        assert f"{path} {said}" in self.said(path)

    def test_a_table_of_patches_lacks_nothing(self, tmp_path):
        path = table(tmp_path / "t.csv", "path,label", "a.png,1")
        assert "; lacks" not in self.said(path)

    def test_compressed_geojson_is_to_be_unpacked(self, tmp_path):
        (tmp_path / "a.geojson.gz").touch()
        assert "a.geojson.gz is compressed: unpack it" in self.said(tmp_path / "a.geojson.gz")

    def test_of_a_folder_geojson_alone_is_read(self, tmp_path):
        table(tmp_path / "a.csv", "slide,x,y", "a,1,2")
        assert "has no GeoJSON, but a.csv. Of a folder, GeoJSON alone is read" in self.said(tmp_path)


class TestSlidesInPlaceOfPatches:
    def said(self, path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_patches(path)
        return str(caught.value)

    @pytest.mark.parametrize("name", ["a.svs", "a.NDPI", "a.mrxs"])
    def test_a_file_with_the_suffix_of_a_slide(self, name, tmp_path):
        (tmp_path / name).touch()
        for path in (tmp_path / name, tmp_path):
            assert f"{tmp_path / name} looks like a whole slide" in self.said(path)

    def test_a_tiff_of_several_images(self, tmp_path):
        pages = [Image.new("RGB", (side, side)) for side in (32, 16)]
        pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
        for path in (tmp_path / "a.tif", tmp_path):
            assert f"{tmp_path / 'a.tif'} looks like a whole slide" in self.said(path)
            assert "by --slides (docs/slides.md)" in self.said(path)

    def test_a_damaged_tiff_is_no_slide(self, tmp_path):
        (tmp_path / "a.tif").write_bytes(b"II*\0")
        assert "whole slide" not in self.said(tmp_path / "a.tif")


class TestOtherContent:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ('{"type": "FeatureCollection", "features": []}', "has no features"),
            ("[]", "has no features"),
            ("", "line 1: no readable JSON"),
            ('{"type": "FeatureCollection",\n"features": [', "line 2: no readable JSON"),
            ('{"a": 1}', "is JSON, but no GeoJSON"),
            ("5", "is JSON, but no GeoJSON"),
            ("[1, 2]", "is JSON, but no GeoJSON"),
            ('{"type": "FeatureCollection"}', "is JSON, but no GeoJSON"),
            ("[" * 200_000, "nested too deeply"),
            ('{"a": ' + "9" * 5000 + "}", "nested too deeply, or has a number too long"),
        ],
    )
    def test_json_that_holds_no_points(self, text, said, tmp_path):
        path = tmp_path / "s.geojson"
        path.write_text(text)
        assert said in message(path)
        assert str(path) in message(path)

    def test_bytes_that_are_no_text(self, tmp_path):
        path = tmp_path / "s.geojson"
        path.write_bytes(b"\x1f\x8b\x08\x00\xff")
        assert "is no text in UTF-8" in message(path)

    def test_a_file_that_is_not_there(self, tmp_path):
        assert "does not exist" in message(tmp_path / "s.geojson")

    def test_a_file_too_large_is_refused_unread(self, tmp_path, monkeypatch):
        path = tmp_path / "s.geojson"
        with path.open("wb") as file:
            file.truncate(points_module._LARGEST + 1)  # takes no room on the disk
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read"))
        assert "expected at most 1.1" in message(path)


def test_selected_points_keep_everything_that_is_known(tmp_path):
    features = [feature("Point", [k, 2 * k], f"f{k}", slide=f"s{k}", classification={"name": str(k)}) for k in range(4)]
    points = read_points(geojson(tmp_path / "s.geojson", *features)).select([3, 1])
    assert (points.id, points.slide, places(points)) == (["f3", "f1"], ["s3", "s1"], [(3, 6), (1, 2)])
    assert (points.columns["label"], points.features) == (["3", "1"], [features[3], features[1]])


def test_whatever_stands_in_a_file_there_are_points_or_one_message(tmp_path):
    """Of valid files any values, at any depth, are left out or replaced by others."""
    whole = [
        {
            "type": "FeatureCollection",
            "features": [
                feature("Point", [1, 2], "a", classification={"name": "A", "names": ["x"]}, metadata={"split": "test"}),
                feature("MultiPoint", [[1, 2], [3, 4]], "b"),
                feature("MultiPolygon", [[[[0, 0], [1, 0], [1, 1], [0, 0]]]], "c"),
            ],
        },
        {
            "images": [{"id": 1, "file_name": "a", "width": 100, "height": 100}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 51, 52], "split": "train"}],
            "categories": [{"id": 1, "name": "m"}],
        },
    ]
    values = [None, True, 0, -1, 1e308, math.nan, math.inf, 10**30, "", "x", [], {}, [[]], [None], {"a": 1}, [[1, 2]]]

    def places_in(value: object) -> list[tuple[dict | list, object]]:
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        return [(value, key) for key in keys] + [one for key in keys for one in places_in(value[key])]

    rng, path, n_read, said = random.Random(0), tmp_path / "s.geojson", 0, []
    for _ in range(600):
        content = copy.deepcopy(rng.choice(whole))
        for _ in range(rng.choice((1, 1, 2))):
            if inside := places_in(content):
                holder, key = rng.choice(inside)
                if rng.random() < 0.2:
                    del holder[key]
                else:
                    holder[key] = copy.deepcopy(rng.choice(values))
        try:
            read = read_points(write_json(path, content))
        except UserError as error:
            said.append(str(error))
            continue
        n_read += 1
        assert len(set(read.id)) == len(read.slide) == len(read.x) == len(read.y) > 0
        assert np.isfinite([read.x, read.y]).all()
    assert all(str(path) in one for one in said)
    assert 60 < n_read < 540
