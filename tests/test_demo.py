"""Are the demo patches the same everywhere, and a fair small problem?"""

from __future__ import annotations

import numpy as np

from extract import demo
from extract.benchmark import DATASETS, files_digest
from extract.datasets import load_dataset
from features.folds import grouped_folds
from features.samples import audit


def test_the_demo_is_the_same_bytes_everywhere() -> None:
    samples = load_dataset("demo").samples
    assert files_digest(samples.id, samples.sha256) == DATASETS["demo"].digest


def test_the_demo_has_slides_votes_scanners_and_both_splits() -> None:
    samples = demo.draw().samples
    record = DATASETS["demo"]
    assert (int(samples.label.sum()), len(samples)) == (record.n_atypical, record.n_atypical + record.n_normal)
    assert len(set(samples.group)) == demo.N_SLIDES
    assert set(samples.domain) == {"scanner A", "scanner B"}
    assert set(samples.split) == {"train", "test"}
    assert len(set(samples.group[samples.split == "test"])) == 8
    for split in ("train", "test"):
        rows = samples.split == split
        assert 0.15 < samples.label[rows].mean() < 0.35
        assert len(set(samples.domain[rows])) == 2
    np.testing.assert_array_equal(samples.label, samples.votes.sum(axis=1) >= 2)
    assert 0.7 < (samples.votes == samples.votes[:, :1]).all(axis=1).mean() < 0.95


def test_the_demo_has_no_duplicates_and_no_slide_in_two_splits() -> None:
    found = audit(demo.draw().samples)
    assert not found.duplicates
    assert not found.split_groups
    assert found.n_without_group == 0


def test_colour_alone_does_not_give_the_class_away() -> None:
    patches = demo.draw()
    colours = patches.pixels.mean(axis=(1, 2))  # (n, 3)
    difference = colours[patches.samples.label == 1].mean(axis=0) - colours[patches.samples.label == 0].mean(axis=0)
    assert (np.abs(difference) < 0.5 * colours.std(axis=0)).all()


def test_a_demo_patch_is_a_writable_copy() -> None:
    dataset = load_dataset("demo")
    first = dataset.decode(0)
    assert first.shape == (demo.SIZE, demo.SIZE, 3)
    first[:] = 0
    assert dataset.decode(0).any()


def test_the_phases_are_the_kinds_that_were_drawn_of_the_same_patches() -> None:
    record, drawn = DATASETS["demo-phases"], demo.draw()
    dataset, two = load_dataset("demo-phases"), load_dataset("demo").samples
    samples = dataset.samples
    assert files_digest(samples.id, samples.sha256) == record.digest
    assert dataset.label_names == record.label_names == demo.KINDS
    assert dict(zip(demo.KINDS, np.bincount(samples.label).tolist(), strict=True)) == record.classes
    for column in ("sha256", "group", "split", "domain"):
        np.testing.assert_array_equal(getattr(samples, column), getattr(two, column))
    # An id says the class that was drawn, not what the raters made of it.
    assert samples.id.tolist() == [f"{demo.KINDS[k]}/{row:03d}" for row, k in enumerate(samples.label)]
    assert samples.votes.shape == (400, 0)
    atypical = samples.label >= 4
    assert (int(atypical.sum()), int((~atypical).sum())) == (record.n_atypical, record.n_normal)
    # The raters err on some, mostly one at a time: the majority is right but for a few.
    assert 0 < (atypical != (two.label == 1)).sum() < 0.05 * len(two)
    np.testing.assert_array_equal(dataset.decode(17), drawn.pixels[17])
    for split, least in (("train", 10), ("test", 3)):
        assert np.bincount(samples.label[samples.split == split], minlength=9).min() >= least


def test_the_demo_s_phases_can_be_cross_validated() -> None:
    samples = load_dataset("demo-phases").samples
    training = samples.select(samples.split == "train")
    folds = grouped_folds(training, 5, classes=demo.KINDS)
    for rows in folds.training:
        assert set(training.label[rows].tolist()) == set(range(9))
