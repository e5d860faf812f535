"""Does the patch table refuse what is wrong, and the audit find what flatters a score?"""

import numpy as np
import pytest

from features.console import UserError
from features.samples import audit, make_samples

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
        ({"label": [0, 1, 2, 0, 1]}, "labels must be 0 or 1"),
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


def test_a_table_shows_its_counts_and_in_a_notebook_its_first_rows_escaped():
    table = make_samples(
        ["<b>.png", "b.png"], [1, 0], sha256=["", ""], group=["slide", "slide"], split=["train", "test"]
    )
    assert repr(table) == "Samples(2 patches: 1 positive; 1 train, 1 test; 1 groups)"
    page = table._repr_html_()
    assert "<td>&lt;b&gt;.png</td><td>1</td><td>slide</td><td>train</td>" in page
    assert "<b>" not in page
