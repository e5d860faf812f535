"""Do class names mean the same in every dataset, and is everything else refused or said?"""

from __future__ import annotations

from types import MappingProxyType

import pytest

from features.console import UserError
from features.labels import aligned, class_labels, compare_classes, parse_renaming, read_labels


@pytest.mark.parametrize(
    ("names", "positive", "labels", "classes"),
    [
        (["cancer", "normal"], None, [1, 0], ("normal", "cancer")),  # not the last in the alphabet
        (["Non-Tumor", "Tumor"], None, [0, 1], ("Non-Tumor", "Tumor")),
        (["benign", "normal"], None, [0, 1], ("benign", "normal")),  # both say "nothing": the last, and said
        (["stroma", "tumour"], None, [0, 1], ("stroma", "tumour")),
        (["1.0", "0.0", "1"], None, [1, 0, 1], ("0", "1")),
        (["01", "00"], None, [1, 0], ("0", "1")),
        (["2", "1"], None, [1, 0], ("1", "2")),
        (["fat", "tumour", "stroma"], "TUMOUR", [0, 1, 0], ("not tumour", "tumour")),
        (["tumour"], "tumour", [1], ("not tumour", "tumour")),
        (["stroma"], "tumour", [0], ("stroma", "tumour")),
        (["Atypical"], None, [1], ("not Atypical", "Atypical")),
        (["normal"], None, [0], ("normal", "not normal")),
        (["0", "0"], None, [0, 0], ("0", "1")),
    ],
)
def test_the_positive_class_follows_from_the_names(names, positive, labels, classes):
    assert class_labels(names, positive) == (labels, classes)


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (["Tumor", "tumor", "normal"], {"positive": "Tumor"}, "'Tumor' and 'tumor' differ in case only"),
        (["tumour"], {}, "found one class .* cannot tell whether it is the positive one"),
        ([], {}, "no patches"),
        (["normal", "cancer"], {"classes": ("normal", "tumor")}, "cancer is none of them.*labels='cancer=tumor'"),
        # A slip of the pen must not turn the positive class into "every other".
        (["tumor", "fat"], {"classes": ("not tumour", "tumour")}, "tumor is none|fat, tumor"),
        (["fat", "tumor", "tumour"], {"classes": ("not tumour", "tumour")}, "tumor is none of them"),
        (["2", "1"], {"classes": ("Normal", "Atypical")}, "1, 2 is none of them"),
    ],
)
def test_what_could_mean_two_things_is_refused(names, arguments, message):
    with pytest.raises(UserError, match=message):
        class_labels(names, **arguments)


def test_a_test_set_takes_the_classes_of_the_training_set_by_name(capsys):
    assert class_labels(["TUMOR", "Normal"], classes=("normal", "tumor"))[0] == [1, 0]
    assert class_labels(["tumor", "tumor"], classes=("tumor", "normal"))[0] == [0, 0]  # the training set's side
    assert class_labels(["fat", "tumour"], classes=("not tumour", "tumour"))[0] == [0, 1]
    assert capsys.readouterr().err == ""
    assert class_labels(["1", "0"], classes=("normal", "tumor"))[0] == [1, 0]
    assert "0 and 1 are taken as normal and tumor" in capsys.readouterr().err


def test_several_classes_that_count_as_negative_are_named(capsys):
    class_labels(["fat", "tumour", "stroma"], "tumour")
    assert "every class but 'tumour': fat, stroma" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "order", "labels", "classes"),
    [
        (["mild", "severe", "none", "mild"], ("none", "mild", "severe"), [1, 2, 0, 1], ("none", "mild", "severe")),
        (["mild", "none"], ("MILD", "None"), [0, 1], ("mild", "none")),  # spelled as the patches spell them
        (["normal", "cancer"], ("cancer", "normal"), [1, 0], ("cancer", "normal")),  # (negative, positive) as given
        (["10", "9", "9.0", "8"], ("10", "09", "8"), [0, 1, 1, 2], ("10", "9", "8")),
        (["1", "0"], ("1", "0"), [0, 1], ("1", "0")),
    ],
)
def test_classes_are_numbered_in_the_order_given(names, order, labels, classes):
    assert class_labels(names, order=order) == (labels, classes)


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["grade 10", "grade 2", "grade 9"], [2, 0, 1], ("grade 2", "grade 9", "grade 10")),
        (["2", "0", "1.0"], [2, 0, 1], ("0", "1", "2")),
        (["3", "1", "2", "3"], [2, 0, 1, 2], ("1", "2", "3")),
        (["5", "7", "70"], [0, 1, 2], ("5", "7", "70")),  # ranks, not values
        ([f"c{k}" for k in range(62)], list(range(62)), tuple(f"c{k}" for k in range(62))),
    ],
)
def test_three_and_more_classes_are_in_the_order_of_their_names_and_that_is_said(names, labels, classes, capsys):
    assert class_labels(names) == (labels, classes)
    said = capsys.readouterr().err
    assert f"{len(classes)} classes in the order {classes[0]} (0), {classes[1]} (1)" in said
    assert f"and {classes[-1]} ({len(classes) - 1})." in said
    assert "`classes` gives another order, `positive` tells one class" in said


def test_a_set_that_lacks_some_of_the_classes_is_read_in_their_order(capsys):
    assert class_labels(["High", "low"], order=("low", "moderate", "high")) == ([2, 0], ("low", "moderate", "High"))
    assert "No patch is of moderate" in capsys.readouterr().err
    assert class_labels(["c"], order=("a", "b", "c")) == ([2], ("a", "b", "c"))


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (["a", "b", "c"], {"order": ("a", "b")}, "leaves out c; expected every class .* labels: a, b, c"),
        (["a", "b, c"], {"order": ("a", "b", "c")}, "leaves out b, c; .*'b, c' cannot be listed, as it has a comma"),
        (["mild", "severe", "none"], {"order": ("none", "mild", "sever")}, "leaves out severe.*Did you mean severe"),
        (["a", "b"], {"order": ("a", "B", "A")}, "names A twice"),
        (["a", "b"], {"order": ()}, "leaves out a, b"),
        (["a"], {"order": ("a",)}, r"names one class \(a\)"),
        (["a", "b", "c"], {"order": ("a", "b", "c"), "positive": "b"}, "give one of both"),
        (
            [str(k) for k in range(63)],
            {},
            "found 63 classes .*expected at most 62.*another column.*`labels`.*`positive`",
        ),
        ([str(k) for k in range(1_000)], {}, "found 1,000 classes"),
        ([str(k) for k in range(63)], {"order": [str(k) for k in range(63)]}, "found 63 classes"),
        (["a", "b", "x"], {"classes": ("a", "b", "c")}, r"a \(0\), b \(1\) and c \(2\): x is none"),
        (["prometaphse"], {"classes": ("metaphase", "other", "prometaphase")}, "labels='prometaphse=prometaphase'"),
        (["0", "1", "2"], {"classes": ("a", "b", "c")}, "0, 1, 2 is none of them"),  # from 0 or from 1?
        (["A", "a", "b"], {"order": ("a", "b")}, "differ in case only"),
    ],
)
def test_classes_that_do_not_fit_are_refused(names, arguments, message):
    with pytest.raises(UserError, match=message):
        class_labels(names, **arguments)


def test_one_of_a_thousand_classes_is_told_from_the_rest(capsys):
    names = [f"c{k}" for k in range(1_000)]
    labels, classes = class_labels(names, "c7")
    assert (sum(labels), labels[7], classes) == (1, 1, ("not c7", "c7"))
    assert "Class 0 is every class but 'c7': c0, c1, " in (said := capsys.readouterr().err)
    assert len(said) < 200
    with pytest.raises(UserError, match="no class 'x'") as refused:
        class_labels(names, "x")
    assert len(str(refused.value)) < 400


def test_a_test_set_may_lack_classes_and_keeps_the_numbers_of_the_training_set(capsys):
    classes = ("none", "mild", "severe")
    assert class_labels(["SEVERE", "none"], classes=classes) == ([2, 0], classes)
    assert class_labels(["2", "0"], classes=("0", "1", "2")) == ([1 + 1, 0], ("0", "1", "2"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("spelling", ["", "NA", "nan", "None", "null", "?", "<NA>", "N/A", "unknown"])
def test_a_missing_label_is_no_class(spelling, capsys):
    cells, where = ["1", spelling, "0"], ["line 2: a", "line 3: b", "line 4: c"]
    with pytest.raises(UserError, match=r"t.csv: no label in 1 of 3 rows \(line 3: b \("):
        read_labels(cells, None, source="t.csv", where=where, skip=False)
    assert read_labels(cells, None, source="t.csv", where=where, skip=True) == (["1", "0"], [0, 2])
    assert "1 of 3 patches have no label and are left out" in capsys.readouterr().err
    # Where it is the name of a class, the user says so.
    renamed = {spelling: "2"}
    assert read_labels(cells, renamed, source="t.csv", where=where, skip=False) == (["1", "2", "0"], [0, 1, 2])


@pytest.mark.parametrize(
    ("train", "test", "relation"),
    [
        (("normal", "tumor"), ("Normal", "TUMOR"), "same"),
        (("normal", "tumor"), ("0", "1"), "same"),
        (("0", "1"), ("Normal", "Atypical"), "same"),
        (("not tumor", "tumor"), ("stroma", "tumor"), "same"),
        (("stroma", "tumor"), ("not tumor", "tumor"), "same"),
        (("normal", "tumor"), ("tumor", "normal"), "swapped"),
        (("normal", "tumor"), ("cancer", "normal"), "swapped"),
        (("normal", "tumor"), ("normal", "cancer"), "partly"),
        (("normal", "tumor"), ("stroma", "tumor"), "partly"),
        (("not tumour", "tumour"), ("fat", "tumor"), "other"),
        (("normal", "tumor"), ("metaphase", "anaphase"), "other"),
        (("a", "b", "c"), ("A", "b", "C"), "same"),
        (("a", "b", "c"), ("a", "c", "b"), "swapped"),
        (("a", "b", "c"), ("a", "b"), "swapped"),  # fewer classes are not the same classes
        (("a", "b", "c"), ("a", "b", "c", "d"), "partly"),
        (("a", "b"), ("a", "b", "c"), "partly"),
        (("0", "1"), ("0", "1", "2"), "partly"),
        (("0", "1"), ("x", "y", "z"), "other"),  # numbers stand for the names of two classes only
        (("a", "b", "c"), ("0", "1"), "other"),
        (("Normal", "Atypical"), ("metaphase", "anaphase", "other"), "other"),
        (("not tumor", "tumor"), ("fat", "stroma", "tumor"), "swapped"),
        (("not tumour", "tumour"), ("fat", "tumor", "tumour"), "partly"),  # a slip of the pen
        (("not tumor", "tumor"), ("fat", "stroma", "muscle"), "other"),
    ],
)
def test_classes_of_two_datasets_are_compared_by_name(train, test, relation):
    assert compare_classes(train, test) == relation


def test_labels_are_turned_round_only_where_the_user_says_what_they_mean():
    def align(test, labels):
        return aligned(("normal", "tumor"), test, train_name="a", test_name="b", labels=labels)

    assert align(("normal", "tumor"), {}) == (0, 1)
    assert align(("normal", "cancer"), {"cancer": "tumor"}) == (0, 1)
    assert align(("cancer", "normal"), {"cancer": "tumor"}) == (1, 0)
    for test in (("tumor", "normal"), ("cancer", "normal"), ("normal", "cancer"), ("x", "y")):
        with pytest.raises(UserError, match=r"b has the classes .* a has normal \(0\) and tumor \(1\): .*labels="):
            align(test, {})
    with pytest.raises(UserError, match="normal changes sides"):
        align(("cancer", "normal"), {"something": "else"})


def test_more_than_two_classes_are_found_by_name():
    def align(train, test, labels=MappingProxyType({})):
        return aligned(train, test, train_name="a", test_name="b", labels=labels)

    phases = ("pro", "meta", "ana")
    assert align(phases, phases) == (0, 1, 2)
    assert align(phases, ("Ana", "pro", "meta")) == (2, 0, 1)
    assert align(phases, ("ana", "meta")) == (2, 1)
    assert align(phases, ("ana", "early", "late"), {"early": "pro", "late": "pro"}) == (2, 0, 0)
    assert align(("not meta", "meta"), ("pro", "meta", "ana")) == (0, 1, 0)
    with pytest.raises(UserError, match=r"ana \(0\), telo \(1\) and pro \(2\).*only ana, pro are in both.*'telo=meta'"):
        align(phases, ("ana", "telo", "pro"))
    with pytest.raises(UserError, match="no class is in both"):
        align(phases, ("Normal", "Atypical"))


def test_a_renaming_is_read_or_refused():
    assert parse_renaming(None) == {}
    assert parse_renaming("a=b, c = d") == {"a": "b", "c": "d"}
    for text in ("a", "a=", "=b", "a=b,a=c"):
        with pytest.raises(UserError, match="expected old=new"):
            parse_renaming(text)


def test_numbers_are_renamed_however_they_are_written():
    renaming = parse_renaming("0=tumor,1=normal")
    where = ["a", "b", "c"]
    names, _ = read_labels(["1.0", "0.0", "1"], renaming, source="t", where=where, skip=False)
    assert names == ["normal", "tumor", "normal"]
    renaming.require_met()
    names, _ = read_labels(["1.0", "NA", "0.0"], {"0": "x"}, source="t", where=where, skip=True)
    assert names == ["1", "x"]


def test_a_renaming_that_meets_no_class_is_refused():
    renaming = parse_renaming("Cancer=tumor,cancr=tumor")
    names, _ = read_labels(["cancer", "normal"], renaming, source="t", where=["a", "b"], skip=False)
    assert names == ["tumor", "normal"]  # whatever the case
    with pytest.raises(UserError, match=r"renames 'cancr', and there is no such class\. Did you mean cancer"):
        renaming.require_met()


@pytest.mark.parametrize(
    ("names", "positive"),
    [
        (("atypical mitosis", "normal mitosis"), "atypical mitosis"),
        (("1_atypical", "2_normal"), "1_atypical"),
        (("tumor", "tumor-free"), "tumor"),
        (("cancer", "nontumor"), "cancer"),
        (("adenocarcinoma", "normal tissue"), "adenocarcinoma"),
        (("high grade", "low grade"), "high grade"),
        (("9", "10"), "10"),
        (("grade 10", "grade 2"), "grade 10"),
        (("ja", "nein"), "ja"),
        (("MUT", "WT"), "MUT"),
    ],
)
def test_words_within_names_and_numbers_decide_too(names, positive):
    assert class_labels(list(names))[1][1] == positive


@pytest.mark.parametrize("name", ["no label", "no_label", "tbd", "exclude", "#VALUE!", "Unclear"])
def test_what_is_no_class_is_missing(name):
    with pytest.raises(UserError, match="no label in 1 of 2 rows"):
        read_labels(["Normal", name], None, source="t", where=["a", "b"], skip=False)


def test_names_in_two_forms_of_unicode_are_one_class():
    names, _ = read_labels(["La\u0308sion", "L\u00e4sion", "Normal "], None, source="t", where=list("abc"), skip=False)
    assert names == ["L\u00e4sion", "L\u00e4sion", "Normal"]


def test_other_numbers_than_0_and_1_are_compared_as_names():
    assert compare_classes(("0", "1"), ("1", "2")) == "swapped"
    assert compare_classes(("0", "1"), ("0", "1")) == "same"
    assert class_labels(["1", "1"]) == ([1, 1], ("0", "1"))
