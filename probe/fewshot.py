"""How well are classes told apart from a few labelled patches? Nearest class means of many draws.

SimpleShot (Wang, Chao, Weinberger and van der Maaten, 2019): embeddings are centred by the mean of the training patches
and scaled to length 1; a patch is given the class whose mean over the drawn patches is nearest. Draws are taken from
different slides as far as there are enough. All draws are one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

SHOTS = (1, 2, 4, 8, 16, 32, 64)
DRAWS = 1_000
_BLOCK = 2**23  # distances at a time


def draw_shots(
    label: NDArray[np.integer], group: NDArray[np.intp], *, n_classes: int, shots: int, draws: int, seed: int
) -> NDArray[np.intp]:
    """Draw patches of every class, slides first: (draws, n_classes, shots) rows, of which any first m are a draw of m.

    No slide gives a second patch of a class before each slide with that class has given one; which slide is next, and
    which of its patches, is drawn.

    >>> drawn = draw_shots(np.zeros(4, int), np.array([0, 0, 0, 1]), n_classes=1, shots=2, draws=50, seed=0)
    >>> all(3 in rows for rows in drawn[:, 0].tolist())
    True

    Raises:
        ValueError: if a class has fewer patches than `shots`.
    """
    rng = np.random.default_rng(seed)
    drawn = np.empty((draws, n_classes, shots), np.intp)
    for k in range(n_classes):
        rows = np.flatnonzero(label == k)
        if len(rows) < shots:
            raise ValueError(f"class {k} has {len(rows)} patches, fewer than {shots}")
        rows = rows[np.argsort(group[rows], kind="stable")]
        _, start, slide = np.unique(group[rows], return_index=True, return_inverse=True)
        for draw in range(draws):
            shuffled = np.lexsort((rng.random(len(rows)), slide))  # patches within their slides
            turn = np.arange(len(rows)) - start[slide]  # slides stay where they are, so this is the place in its slide
            chance = rng.random(len(start))[slide]
            drawn[draw, k] = rows[shuffled[np.lexsort((chance, turn))[:shots]]]
    return drawn


def few_shot(
    train: Tensor, test: Tensor, label: NDArray[np.integer], drawn: NDArray[np.intp]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Classify patches by the nearest class means of every draw.

    Args:
        train: (n, d) embeddings that are drawn from.
        test: (m, d) those that are classified.
        label: (m,) of these.
        drawn: (draws, n_classes, shots) rows of `train`.

    Returns:
        (m,) the share of draws in which a patch is given its class, whose mean over the patches of a class, and over
        classes, is the mean balanced accuracy; (draws,) the balanced accuracy of each draw.
    """
    draws, n_classes, _ = drawn.shape
    centre = train.mean(0)
    base, asked = (F.normalize(one - centre, dim=1) for one in (train, test))
    rows = torch.from_numpy(drawn.reshape(draws * n_classes, -1)).to(base.device)
    means = F.embedding_bag(rows, base, mode="mean")  # (draws * c, d)
    half = means.square().sum(1) / 2  # |x - m|^2 is smallest where x m - |m|^2 / 2 is largest
    y = torch.from_numpy(np.asarray(label, np.int64)).to(base.device)
    share = np.empty(len(test))
    right = torch.zeros(n_classes, draws, dtype=torch.float64, device=base.device)
    step = max(1, _BLOCK // len(means))
    for start in range(0, len(test), step):
        block = slice(start, start + step)
        scores = torch.addmm(-half, asked[block], means.T).view(-1, draws, n_classes)
        correct = (scores.argmax(2) == y[block, None]).double()  # (b, draws)
        share[block] = correct.mean(1).cpu().numpy()
        right.index_add_(0, y[block], correct)
    held = np.bincount(label, minlength=n_classes)
    accuracy = right.cpu().numpy()[held > 0] / held[held > 0, None]
    return share, accuracy.mean(axis=0)


def possible_shots(label: NDArray[np.integer], n_classes: int) -> Sequence[int]:
    """List those of `SHOTS` for which every class has patches enough."""
    fewest = int(np.bincount(label, minlength=n_classes).min())
    return [shots for shots in SHOTS if shots <= fewest]
