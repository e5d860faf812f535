"""Does the patch table refuse what is wrong, and the audit find what flatters a score?"""

import numpy as np
import pytest

from features.console import UserError
from features.samples import MOST_CLASSES, VOTE_LETTERS, audit, make_samples, vote_shares

SPLIT = ["train", "train", "test", "test", "test"]


def table(**columns):
    given = {"id": list("abcde"), "label": [0, 1, 0, 1, 1], "sha256": list("12345"), "split": SPLIT} | columns
    return make_samples(given.pop("id"), given.pop("label"), **given)


def test_a_clean_table_says_nothing():
    assert audit(table(group=["1", "1", "2", "2", "3"])).lines() == []


def test_identical_patches_conflicts_and_leaks_are_found():
    found = audit(table(sha256=["x", "y", "x", "z", "y"], group=["1", "1", "2", "3", "3"]))
    assert found.duplicates == (("a", "c"), ("b", "e"))
    assert found.conflicts == ()
    assert found.split_duplicates == (("a", "c"), ("b", "e"))
    assert found.n_surplus == 2
    contradicting = audit(table(sha256=["x", "x", "3", "4", "5"], group=list("11222")))
    assert contradicting.conflicts == (("a", "b"),)
    assert any("contradicting labels on identical patches: a, b" in line for line in contradicting.lines())


def test_groups_on_both_sides_of_a_split_are_found():
    found = audit(table(group=["1", "2", "2", "3", "3"]))
    assert found.split_groups == ("2",)
    assert "train and test at once" in " ".join(found.lines())


def test_unknown_digests_and_groups_are_not_each_others_equals():
    found = audit(table(sha256=[""] * 5))
    assert found.duplicates == ()
    assert found.split_groups == ()
    assert found.n_without_group == 5


def test_what_the_labels_are_does_not_change_which_images_they_are():
    assert table().images_digest == table(label=[1, 1, 1, 1, 0]).images_digest
    assert table().table_digest != table(label=[1, 1, 1, 1, 0]).table_digest
    assert table().images_digest != table(sha256=list("12346")).images_digest
    # No content of one cell can pass for a border between two.
    assert (
        table(id=["a1", *"bcde"], sha256=["2", *"2345"]).images_digest
        != table(id=["a", *"bcde"], sha256=["12", *"2345"]).images_digest
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": list("aacde")}, "1 ids occur more than once"),
        ({"label": [0, 1, 62, 0, -1]}, r"labels must be whole numbers from 0 to 61, .*; found -1, 62\."),
        ({"label": [0, 1, 300, 0, 1]}, "found 300"),  # not what is left of it in 8 bits
        ({"label": [0, 1, 0.5, 0, 1]}, "found 0.5"),
        ({"votes": np.array([[0, 62, -2]] * 5)}, r"votes must be .*, or -1 where one is missing; found -2, 62"),
        ({"split": ["train", "validation", "", "", ""]}, "unknown split 'validation'"),
    ],
)
def test_a_wrong_table_is_refused(columns, message):
    with pytest.raises(UserError, match=message):
        table(**columns)


def test_rows_are_selected_in_every_column():
    samples = table(votes=np.eye(5, 3, dtype=np.int8))
    picked = samples.select(np.array([3, 0]))
    assert picked.id.tolist() == ["d", "a"]
    assert picked.votes.tolist() == [[0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        (["train", "", "test", "train", "test"], [0, 3]),
        (["", "train", "", "", ""], [1]),
        (["test", "", "test", "", ""], [1, 3, 4]),
        (["", "", "", "", ""], [0, 1, 2, 3, 4]),
        (["test", "test", "test", "test", "test"], []),
    ],
)
def test_rows_without_a_split_train_only_where_none_says_train(split, rows):
    assert table(split=split).training_rows.tolist() == rows


@pytest.mark.parametrize(
    ("split", "leak"), [(["train", "test"], True), (["", "test"], False), (["", "train"], False), (["", ""], False)]
)
def test_only_what_lies_in_train_and_test_is_a_leak(split, leak):
    samples = make_samples(list("abc"), [1, 1, 0], sha256=["x", "x", "y"], group=["1", "1", "2"], split=[*split, ""])
    found = audit(samples)
    assert found.duplicates == (("a", "b"),)
    assert found.split_duplicates == ((("a", "b"),) if leak else ())
    assert found.split_groups == (("1",) if leak else ())
    assert ("train and test at once" in " ".join(found.lines())) is leak


CHANGES = {
    "id": list("bacde"),
    "label": [1, 0, 0, 1, 1],
    "group": ["1", "1", "2", "2", "4"],
    "split": ["train", "", "test", "test", "test"],
    "votes": np.array([[1, 0], [0, 0], [1, 1], [-1, 0], [0, -1]], dtype=np.int8),
    "domain": ["x", "x", "y", "y", ""],
    "sha256": list("12354"),
}


@pytest.mark.parametrize("column", CHANGES)
def test_every_column_and_its_order_is_in_the_digest_of_the_table(column):
    votes = np.array([[1, 0], [0, 0], [1, 1], [0, -1], [0, -1]], dtype=np.int8)
    given = {"group": ["1", "1", "2", "2", "3"], "domain": ["x", "x", "y", "y", "y"], "votes": votes}
    before, after = table(**given), table(**given | {column: CHANGES[column]})
    assert before.table_digest == table(**given).table_digest
    assert before.table_digest != after.table_digest
    assert (before.images_digest == after.images_digest) is (column not in ("id", "sha256"))
    order = np.array([1, 0, 2, 3, 4])
    assert before.select(order).images_digest != before.images_digest


def test_the_findings_are_counted_and_only_the_first_conflicts_are_shown():
    ids = [f"{row:02}" for row in range(17)]
    label = [row % 2 for row in range(14)] + [0, 0, 1]
    sha256 = [f"{row // 2}" for row in range(14)] + ["z", "z", "z"]
    group = ["slide"] * 4 + [""] * 13
    samples = make_samples(ids, label, sha256=sha256, group=group)
    found = audit(samples)
    assert (len(found.duplicates), len(found.conflicts), found.n_surplus, found.n_without_group) == (8, 8, 9, 13)
    said = found.lines()
    assert said[0].startswith("8 sets of identical patches (17 patches, 9 surplus)")
    assert [line for line in said if line.startswith("contradicting")] == [
        f"contradicting labels on identical patches: {ids[2 * k]}, {ids[2 * k + 1]}" for k in range(5)
    ]
    assert "... and 3 more sets with contradicting labels" in said
    assert said[-1].startswith("13 of 17 patches have no known group")
    assert found.as_dict() == {
        "duplicates": [list(ids) for ids in found.duplicates],
        "conflicts": [list(ids) for ids in found.conflicts],
        "split_duplicates": [],
        "split_groups": [],
        "alike_groups": [],
        "n_without_group": 13,
    }
    assert "14, 15, 16" in ", ".join(found.duplicates[-1])


@pytest.mark.parametrize("column", ["group", "votes"])
def test_columns_of_another_length_or_shape_are_a_programming_error(column):
    with pytest.raises(ValueError, match=column):
        table(**{column: {"group": ["1"] * 4, "votes": np.zeros(5, dtype=np.int8)}[column]})


def test_a_table_shows_its_counts_and_in_a_notebook_its_first_rows_escaped():
    table = make_samples(
        ["<b>.png", "b.png"], [1, 0], sha256=["", ""], group=["slide", "slide"], split=["train", "test"]
    )
    assert repr(table) == "Samples(2 patches: 1 positive; 1 train, 1 test; 1 groups)"
    page = table._repr_html_()
    assert "<td>&lt;b&gt;.png</td><td>1</td><td>slide</td><td>train</td>" in page
    assert "<b>" not in page


def test_groups_that_are_written_in_several_ways_are_named():
    ids = list("abcdef")
    samples = make_samples(ids, [0, 1] * 3, sha256=[""] * 6, group=["S1", "s1", "T7", "T7", "t7", "9"])
    (line,) = (line for line in audit(samples).lines() if "several ways" in line)
    assert line.startswith("2 groups are written in several ways (first: S1, s1)")


def test_a_table_of_several_classes_counts_each():
    samples = table(label=[3, 1, 0, 3, 61], votes=np.array([[3, -1], [1, 0], [0, 0], [61, 3], [-1, -1]]))
    assert (samples.n_classes, MOST_CLASSES, len(set(VOTE_LETTERS))) == (62, 62, 62)
    assert samples.label.dtype == samples.votes.dtype == np.int8
    few = table(label=[2, 1, 0, 2, 2])
    assert (few.n_classes, table(label=[0] * 5).n_classes, table(label=[1] * 5).n_classes) == (3, 2, 2)
    assert repr(few).startswith("Samples(5 patches: 1, 1, 3 of classes; 2 train")
    assert audit(table(label=[2, 1, 0, 1, 2], sha256=list("11345"))).conflicts == (("a", "b"),)


def test_a_vote_is_one_letter_of_the_digest():
    votes = [np.full((5, 1), vote) for vote in (-1, 0, 9, 10, 35, 36, 61)]
    assert len({table(votes=of).table_digest for of in votes}) == len(votes)
    # Two classes as ever: a change of the digest would make every store look damaged.
    assert table(votes=np.array([[1, 0], [0, 0], [1, 1], [0, -1], [-1, -1]])).table_digest == (
        "ddd69a8022a9d2f613031a6e2d2d583897458d0462d2aef7e3d9e0fd5503ab0e"
    )


def test_classes_are_relabelled_in_labels_and_votes():
    samples = table(label=[0, 1, 2, 1, 0], votes=np.array([[0, 2], [1, -1], [2, 2], [-1, 0], [-1, -1]]))
    new = samples.relabelled((4, 0, 1))
    assert new.label.tolist() == [4, 0, 1, 0, 4]
    assert new.votes.tolist() == [[4, 1], [0, -1], [1, 1], [-1, 4], [-1, -1]]
    assert new.label.dtype == new.votes.dtype == np.int8
    assert samples.relabelled((0, 1, 2)).table_digest == samples.table_digest
    assert table().relabelled((1, 0)).label.tolist() == [1, 0, 1, 0, 0]
    assert new.id is samples.id


def test_votes_become_shares():
    votes = np.array([[0, 2, 2, -1], [1, -1, -1, -1], [-1, -1, -1, -1], [2, 1, 0, 0], [3, 3, 3, 3]])
    samples = table(label=[2, 0, 1, 0, 3], votes=votes)
    third, half, quarter = 1 / 3, 1 / 2, 1 / 4
    np.testing.assert_allclose(
        vote_shares(samples, 4),
        [[third, 0, 2 * third, 0], [0, 1, 0, 0], [0, 1, 0, 0], [half, quarter, quarter, 0], [0, 0, 0, 1]],
        rtol=1e-7,
    )
    assert vote_shares(samples, 5).shape == (5, 5)
    assert vote_shares(table(), 2).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1], [0, 1]]  # no raters
    assert vote_shares(table(), 2).dtype == np.float32
    for few in (samples, table(label=[0] * 5, votes=votes), table(label=[0, 0, 0, 0, 3])):
        with pytest.raises(ValueError, match="class 3 is none of 3"):
            vote_shares(few, 3)
