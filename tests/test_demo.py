"""Are the demo patches the same everywhere, and a fair small problem?"""

from __future__ import annotations

import numpy as np

from extract import demo
from extract.benchmark import DATASETS, files_digest
from extract.datasets import load_dataset
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
