"""Runs on sets that are drawn at random, for tests of what is said about them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from probe.ensembles import Ensemble
from probe.resample import Resampling

QUICK = Resampling(replicates=400)
SIZES = np.array([1, 1, 1, 2, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50])  # figures per slide: as skewed as AMi-Br's


def patches(
    label,
    probability,
    *,
    group=None,
    threshold: float = 0.5,
    ids=None,
    dataset: str = "ami-br",
    split: str = "test",
    prior: float = 0.5,
) -> Ensemble:
    """A run on a set of (n,) labels, of one training (n,) or several (K, n); of more than two classes (K, n, c)."""
    n, by_training = len(label), np.atleast_2d(np.asarray(probability, dtype=np.float64))
    by_training = of_two(by_training) if by_training.ndim == 2 else by_training
    return Ensemble(
        dataset=dataset,
        split=split,
        id=np.array([f"{i:04d}.png" for i in range(n)] if ids is None else ids, dtype=np.str_),
        label=np.asarray(label, dtype=np.int8),
        group=np.array([""] * n if group is None else group, dtype=np.str_),
        digest=np.full(n, ""),
        by_training=by_training,
        thresholds=np.full(len(by_training), threshold),
        threshold=threshold,
        prior=prior,
    )


def of_two(positive) -> np.ndarray:
    """Probabilities (..., 2) of both classes, from those of class 1 (...)."""
    return np.stack([1 - positive, positive], axis=-1)


def some_run(seed: int = 0, n_slides: int = 30, *, trainings: int = 1, **options) -> Ensemble:
    """A run on slides whose figures resemble each other; its trainings differ by noise of their own."""
    rng = np.random.default_rng(seed)
    slide = np.repeat(np.arange(n_slides), SIZES[rng.integers(0, len(SIZES), n_slides)])
    label = (rng.random(len(slide)) < rng.beta(1, 3, n_slides)[slide]).astype(np.int8)
    shared = 1.3 * label + rng.standard_normal(n_slides)[slide] + 0.7 * rng.standard_normal(len(slide))
    logit = shared + 0.7 * rng.standard_normal((trainings, len(slide)))
    return patches(label, 1 / (1 + np.exp(-logit)), **{"group": slide.astype(str), "threshold": 0.65} | options)


def slides(rng: np.random.Generator, n_slides: int, *, runs: int = 1, gain: float = 0.0) -> list[Ensemble]:
    """Runs on one set of slides whose figures resemble each other; every run after the first is better by `gain`."""
    size = SIZES[rng.integers(0, len(SIZES), n_slides)]
    slide = np.repeat(np.arange(n_slides), size)
    label = (rng.random(len(slide)) < rng.beta(1, 3, n_slides)[slide]).astype(np.int8)
    shared, noise = rng.standard_normal(n_slides), rng.standard_normal(len(slide))
    found = []
    for run in range(runs):
        own, own_noise = rng.standard_normal(n_slides), rng.standard_normal(len(slide))
        logit = (1.3 + gain * (run > 0)) * label + 0.7 * (shared + own)[slide] + 0.7 * (noise + own_noise)
        found.append(patches(label, 1 / (1 + np.exp(-logit)), group=slide.astype(str), threshold=0.65))
    return found


def by_patch(judged: Ensemble) -> Ensemble:
    return replace(judged, group=np.full(len(judged), ""))


def alone(judged: Ensemble) -> Ensemble:
    """Every patch from a slide of its own, which is known."""
    return replace(judged, group=np.array([f"slide {i}" for i in range(len(judged))]))
